"""A roofline model: what every algorithm must move and compute, and so how long it should take on a given chip.

Each algorithm is a small function that lists its kernels with their bytes and FLOPs, so that a count can be checked by
hand. A kernel takes the longer of its memory time and its arithmetic time, and a launch; kernels follow one another.
What the model leaves out: caches (a tensor that the kernel before has left in L2 is read from memory all the same),
partly filled tiles and waves, and time the host needs to launch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.shapes import Linear

BF16, FP32, INT32_PER_BIT = 2, 4, 1 / 8


@dataclass(frozen=True)
class Chip:
    """The constants of the model; the one place where they are.

    Attributes:
        bandwidth: bytes a second of device memory, reads and writes together.
        matrix: FLOP/s of large bf16 matrix products through the vendor's library.
        fp32: FLOP/s of fp32 matrix products without TF32.
        gathered: FLOP/s of multiply-adds that fetch a bf16 operand by an index from shared memory: by the compiled
            code for sm_90, 9.3 instructions a position and warp (64 of them) and 30 a row of 13 positions, four issued
            a cycle on each of 132 multiprocessors at 1.75 GHz. Nobody has measured it here.
        sampled: the same of products with both operands fetched: four accesses to shared memory or other lanes, one of
            them issued a cycle.
        launch: seconds from one kernel's end to the next one's start.
        efficiency: share of `matrix` that a kernel of our own reaches where arithmetic or memory binds it.
        row_tile: rows of x for which a fused kernel makes a tile of the delta once; 0: making it costs nothing.
    """

    name: str
    bandwidth: float
    matrix: float
    fp32: float
    gathered: float
    sampled: float
    launch: float = 2.5e-6
    efficiency: float = 0.85
    row_tile: int = 128


# H200: bandwidth and matrix rate as measured (copy of 8.6 GB; 8192^3 product on random data); the others are data
# sheets' values for bandwidth and dense bf16, times the same shares that the H200 reached of its own (0.9 and 0.78).
CHIPS = {
    "h200": Chip("NVIDIA H200", bandwidth=4.3e12, matrix=0.77e15, fp32=50e12, gathered=10e12, sampled=7.4e12),
    "h100": Chip("NVIDIA H100 SXM", bandwidth=3.0e12, matrix=0.77e15, fp32=50e12, gathered=10e12, sampled=7.4e12),
    "a100": Chip("NVIDIA A100 80 GB", bandwidth=1.8e12, matrix=0.24e15, fp32=15e12, gathered=6.6e12, sampled=4.9e12),
    "b200": Chip("NVIDIA B200", bandwidth=7.2e12, matrix=1.75e15, fp32=60e12, gathered=11.8e12, sampled=8.7e12),
}


@dataclass(frozen=True)
class Kernel:
    """One launch: its work and the unit that does the arithmetic ("matrix", "fp32", "gathered" or "sampled")."""

    name: str
    flops: float
    bytes: float
    unit: str = "matrix"
    ours: bool = False
    of_factors: bool = False  # belongs to the gradients of the factors

    def seconds(self, chip: Chip) -> float:
        arithmetic = self.flops / getattr(chip, self.unit)
        if self.ours and self.unit == "matrix":
            arithmetic /= chip.efficiency
        return max(arithmetic, self.bytes / chip.bandwidth) + chip.launch


@dataclass(frozen=True)
class Cost:
    """Kernels of one layer's forward pass and of its backward pass."""

    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...] = ()

    def kernels(self, mode: str) -> tuple[Kernel, ...]:
        """Of "forward", or of "training": both passes."""
        return self.forward if mode == "forward" else self.forward + self.backward

    def seconds(self, chip: Chip, mode: str = "training") -> float:
        return sum(kernel.seconds(chip) for kernel in self.kernels(mode))

    def flops(self, mode: str = "training") -> float:
        return sum(kernel.flops for kernel in self.kernels(mode))

    def bytes(self, mode: str = "training") -> float:
        return sum(kernel.bytes for kernel in self.kernels(mode))


# --- building blocks -------------------------------------------------------------------------------------------------


def gemm(name: str, m: int, n: int, k: int, element: int = BF16) -> Kernel:
    """[m, k] @ [k, n]: each operand read once, the result written once."""
    unit = "matrix" if element == BF16 else "fp32"
    return Kernel(name, 2.0 * m * n * k, element * (m * k + k * n + m * n), unit)


def elementwise(name: str, count: int, *element_bytes: float) -> Kernel:
    """A pass over `count` elements that reads and writes tensors of these element sizes."""
    return Kernel(name, 0.0, count * sum(element_bytes))


def _sizes(layer: Linear) -> tuple[int, int, int]:
    return layer.tokens, layer.out_features, layer.in_features


# --- paths of the linear layer ---------------------------------------------------------------------------------------


def frozen(layer: Linear) -> Cost:
    """y = x W^T; dX = dY W. Also what a merged weight costs."""
    t, n, k = _sizes(layer)
    return Cost((gemm("x Wᵀ", t, n, k),), (gemm("dY W", t, k, n),))


def peft(layer: Linear, rank: int) -> Cost:
    """PEFT's dense LoRA with adapters in bf16: base(x) + B(A(x)) s. 5 and 7 launches."""
    t, n, k = _sizes(layer)
    base = frozen(layer)
    forward = (
        gemm("x Aᵀ", t, rank, k),
        gemm("h Bᵀ", t, n, rank),
        elementwise("scale", t * n, BF16, BF16),
        elementwise("add to y", t * n, BF16, BF16, BF16),
    )
    backward = (
        elementwise("scale dY", t * n, BF16, BF16),
        gemm("dY B", t, rank, n),
        gemm("dB", n, rank, t),
        gemm("dH A", t, k, rank),
        gemm("dA", rank, k, t),
        elementwise("add to dX", t * k, BF16, BF16, BF16),
    )
    return Cost(base.forward + forward, base.backward + backward)


def peft_default(layer: Linear, rank: int) -> Cost:
    """The same with PEFT's default adapters in fp32, for which x and dY are turned to fp32. 7 and 10 launches."""
    t, n, k = _sizes(layer)
    base = frozen(layer)
    forward = (
        elementwise("x to fp32", t * k, BF16, FP32),
        gemm("x Aᵀ", t, rank, k, FP32),
        gemm("h Bᵀ", t, n, rank, FP32),
        elementwise("scale", t * n, FP32, FP32),
        elementwise("add to y in fp32", t * n, BF16, FP32, FP32),
        elementwise("y to bf16", t * n, FP32, BF16),
    )
    backward = (
        elementwise("dY to fp32", t * n, BF16, FP32),
        elementwise("dY to bf16", t * n, FP32, BF16),
        elementwise("scale dY", t * n, FP32, FP32),
        gemm("dY B", t, rank, n, FP32),
        gemm("dB", n, rank, t, FP32),
        gemm("dH A", t, k, rank, FP32),
        gemm("dA", rank, k, t, FP32),
        elementwise("dX to bf16", t * k, FP32, BF16),
        elementwise("add to dX", t * k, BF16, BF16, BF16),
    )
    return Cost(base.forward + forward, base.backward + backward)


def peft_autocast(layer: Linear, rank: int) -> Cost:
    """PEFT's default adapters under bf16 autocast: x goes to fp32 and back, products run in bf16. 9 and 11 launches."""
    t, n, k = _sizes(layer)
    dense = peft(layer, rank)
    small_a, small_b = (elementwise("factor to bf16", rank * size, FP32, BF16) for size in (k, n))
    forward = (elementwise("x to fp32", t * k, BF16, FP32), elementwise("x to bf16", t * k, FP32, BF16))
    backward = (elementwise("dX to fp32", t * k, BF16, FP32), elementwise("dX to bf16", t * k, FP32, BF16))
    return Cost(dense.forward + forward + (small_a, small_b), dense.backward + backward + (small_a, small_b))


def naive_masked(layer: Linear, rank: int, two_products: bool = True, mask_bytes: int = 1) -> Cost:
    """Masked LoRA in eager PyTorch: D = s (B A) M as a tensor.

    Two products: x W^T + x D^T, exact, as a PEFT layer computes it. One product: x (W + D)^T, as SparsePEFT does, which
    loses a small D to the rounding of W + D.
    """
    t, n, k = _sizes(layer)
    base, weights = frozen(layer), n * k
    make = (
        gemm("B A", n, k, rank),
        elementwise("times mask", weights, BF16, mask_bytes, BF16),
        elementwise("times scale", weights, BF16, BF16),
    )
    gradients = (
        gemm("dYᵀ X", n, k, t),
        elementwise("dD times scale", weights, BF16, BF16),
        elementwise("dD times mask", weights, BF16, mask_bytes, BF16),
        gemm("dB", n, rank, k),
        gemm("dA", rank, k, n),
    )
    if two_products:
        forward = (gemm("x Dᵀ", t, n, k), elementwise("add to y", t * n, BF16, BF16, BF16))
        backward = (gemm("dY D", t, k, n), elementwise("add to dX", t * k, BF16, BF16, BF16))
    else:
        forward, backward = (elementwise("W + D", weights, BF16, BF16, BF16),), ()
    return Cost(make + base.forward + forward, base.backward + backward + gradients)


def _factor_gradients(layer: Linear, rank: int, occupancy: float) -> Kernel:
    """dA and dB from dY, X and the mask: occupied tiles of dY^T X, contracted with A and B in registers."""
    t, n, k = _sizes(layer)
    flops = occupancy * (2.0 * t * n * k + 4.0 * n * k * rank)
    bytes_ = BF16 * t * (n + k) + INT32_PER_BIT * n * k + (BF16 + FP32) * rank * (n + k)
    return Kernel("factor gradients", flops, bytes_, ours=True, of_factors=True)


def _delta_flops(layer: Linear, rank: int, occupancy: float, chip: Chip) -> float:
    """FLOPs of x D^T on the occupied tiles, with D made anew from A and B for every `row_tile` rows of x."""
    t, n, k = _sizes(layer)
    made = -(-t // chip.row_tile) if chip.row_tile else 0
    return occupancy * (2.0 * t * n * k + made * 2.0 * n * k * rank)


def fused(layer: Linear, rank: int, occupancy: float, chip: Chip) -> Cost:
    """One kernel for x W^T + x D^T, one for the input gradient, one for the factors' gradients."""
    t, n, k = _sizes(layer)
    flops = 2.0 * t * n * k + _delta_flops(layer, rank, occupancy, chip)
    bytes_ = BF16 * (t * k + n * k + t * n + rank * (n + k)) + INT32_PER_BIT * n * k
    forward = Kernel("x (W, D)ᵀ", flops, bytes_, ours=True)
    backward = replace(forward, name="dY (W, D)")
    return Cost((forward,), (backward, _factor_gradients(layer, rank, occupancy)))


def split(layer: Linear, rank: int, occupancy: float, chip: Chip) -> Cost:
    """The library's x W^T, then the occupied tiles of x D^T added in place."""
    t, n, k = _sizes(layer)
    base, flops = frozen(layer), _delta_flops(layer, rank, occupancy, chip)
    mask_and_factors = INT32_PER_BIT * n * k + BF16 * rank * (n + k)
    # Without occupied tiles nothing is read but the mask; a few are enough to touch every row of x and y.
    touched = min(1.0, 4 * occupancy)
    added = Kernel("y += x Dᵀ", flops, touched * BF16 * (t * k + 2 * t * n) + mask_and_factors, ours=True)
    back = Kernel("dX += dY D", flops, touched * BF16 * (t * n + 2 * t * k) + mask_and_factors, ours=True)
    return Cost((*base.forward, added), (*base.backward, back, _factor_gradients(layer, rank, occupancy)))


def whole(layer: Linear, rank: int) -> Cost:
    """The library's x W^T; D in scratch; the library's y += x D^T. For masks that leave no tile empty."""
    t, n, k = _sizes(layer)
    base = frozen(layer)
    build = Kernel("D", 2.0 * n * k * rank, n * k * (BF16 + INT32_PER_BIT) + BF16 * rank * (n + k), ours=True)
    added, back = gemm("y += x Dᵀ", t, n, k), gemm("dX += dY D", t, k, n)
    added = replace(added, bytes=added.bytes + BF16 * t * n)
    back = replace(back, bytes=back.bytes + BF16 * t * k)
    return Cost((*base.forward, build, added), (*base.backward, build, back, _factor_gradients(layer, rank, 1.0)))


def scratch(layer: Linear, rank: int, kept: bool = False) -> Cost:
    """W + D rounded into scratch in one pass, then the library's product with it.

    For the backward pass it is made again, or, where `kept`, still there (N K elements a layer).
    """
    _, n, k = _sizes(layer)
    bytes_ = n * k * (2 * BF16 + INT32_PER_BIT) + BF16 * rank * (n + k)
    build = Kernel("W + D", 2.0 * n * k * rank, bytes_, ours=True)
    base = frozen(layer)
    again = () if kept else (build,)
    return Cost((build, *base.forward), (*again, *base.backward, _factor_gradients(layer, rank, 1.0)))


def gather(layer: Linear, rank: int, density: float) -> Cost:
    """The library's x W^T; values of D at the mask's positions only; sparse products and a sampled gradient.

    A position costs 8 bytes: a column and a value. The sparse products read one activation and update the other.
    """
    t, n, k = _sizes(layer)
    nnz = density * n * k
    values = Kernel("values of D", 2.0 * rank * nnz, 16 * nnz + BF16 * rank * (n + k), "gathered", ours=True)
    flops = 2.0 * t * nnz
    product = Kernel("y += x Dᵀ", flops, 8 * nnz + BF16 * (t * k + 2 * t * n), "gathered", ours=True)
    back = Kernel("dX += dY D", flops, 8 * nnz + BF16 * (t * n + 2 * t * k), "gathered", ours=True)
    sampled = Kernel("dYᵀ X sampled", flops, 8 * nnz + BF16 * t * (n + k), "sampled", ours=True, of_factors=True)
    # One partial sum a block, two blocks on each of 132 multiprocessors or one for each 32 rows of x.
    parts = min(264, -(-t // 32))
    summed = Kernel("its partial sums", 0.0, 2 * FP32 * parts * nnz, ours=True, of_factors=True)
    moved = 16 * nnz + (BF16 + FP32) * rank * (n + k)
    contracted = Kernel("dA, dB", 4.0 * rank * nnz, moved, "gathered", ours=True, of_factors=True)
    base = frozen(layer)
    return Cost((*base.forward, values, product), (*base.backward, values, back, sampled, summed, contracted))


def combined(products: Cost, gradients: Cost) -> Cost:
    """The products of one path with the factors' gradients of another."""
    kept = [kernel for kernel in products.backward if not kernel.of_factors]
    return Cost(products.forward, (*kept, *(kernel for kernel in gradients.backward if kernel.of_factors)))


# --- saliency and selection ------------------------------------------------------------------------------------------


def weight_gradient_kept(layer: Linear) -> Cost:
    """Forward and backward with the weight's gradient kept: dY^T X is a product more."""
    t, n, k = _sizes(layer)
    base = frozen(layer)
    return Cost(base.forward, (*base.backward, gemm("dYᵀ X", n, k, t)))


def weight_gradient_added(layer: Linear) -> Cost:
    """The same, then S += |dW|: an absolute value and an addition to fp32."""
    kept, weights = weight_gradient_kept(layer), layer.out_features * layer.in_features
    add = (elementwise("|dW|", weights, BF16, BF16), elementwise("S += |dW|", weights, BF16, FP32, FP32))
    return Cost(kept.forward, kept.backward + add)


def saliency_streamed(layer: Linear) -> Cost:
    """The same with S += |dY^T X| at the end of the product, where it is still in registers."""
    t, n, k = _sizes(layer)
    base = frozen(layer)
    product = Kernel("S += |dYᵀ X|", 2.0 * t * n * k, BF16 * t * (n + k) + 2 * FP32 * n * k, ours=True)
    return Cost(base.forward, (*base.backward, product))


def accumulate(values: int, tensors: int, foreach: bool | None) -> Cost:
    """S += |g| for bf16 gradients: ours in one pass; by foreach calls in two (|g|, then the sum); by loops likewise."""
    if foreach is None:
        return Cost((elementwise("S += |g|", values, BF16, FP32, FP32),))
    passes = (elementwise("|g|", values, BF16, BF16), elementwise("S += |g|", values, BF16, FP32, FP32))
    if foreach:
        return Cost(passes)
    return Cost(tuple(replace(p, bytes=p.bytes / tensors) for p in passes for _ in range(tensors)))


def selection(values: int) -> Cost:
    """Three passes of histograms and one that packs the mask; a few small kernels between them."""
    passes = [elementwise(f"histogram {i}", values, FP32) for i in range(3)]
    small = [Kernel("threshold", 0, 0) for _ in range(4)]
    return Cost((*passes, elementwise("pack", values, FP32, INT32_PER_BIT), *small))


def reading(values: int, times: int) -> Cost:
    """Reading fp32 values so many times, in as many launches."""
    return Cost(tuple(elementwise("read", values, FP32) for _ in range(times)))


# --- totals ----------------------------------------------------------------------------------------------------------


def total(costs: Sequence[tuple[int, Cost]], chip: Chip, mode: str = "training") -> float:
    """Seconds of layers that occur so many times each."""
    return sum(count * cost.seconds(chip, mode) for count, cost in costs)
