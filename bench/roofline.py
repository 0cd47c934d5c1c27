"""A roofline model: what every algorithm must move and compute, and so how long it should take on a given chip.

Each algorithm is a small function that lists its kernels with their bytes and FLOPs, so that a count can be checked by
hand. A kernel takes the longer of its memory time and its arithmetic time, and a launch; kernels follow one another.
What a kernel reads of a tensor that an earlier kernel of the same pass wrote comes from the second-level cache where
the tensor fits there. `lower_bound` is what no algorithm can undercut. Host time stands apart (`HOST`).
What the model leaves out: partly filled tiles and waves, and caches in every other respect.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.shapes import Linear
from fade_kernels.triton_kernels.split import split_rows

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
        efficiency: share of `matrix` that a kernel of our own reaches where arithmetic binds it.
        row_tile: rows of x for which a fused kernel makes a tile of the delta once; 0: making it costs nothing.
        partial_sums: whether the partial sums of the factors' gradients, and the launch that adds them up, cost
            anything.
        cache: bytes a second of what is read from the second-level cache.
        cache_bytes: largest tensor that is still there when the next kernels read it; 0: none.
        multiprocessors: over which a product with few tiles is divided.
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
    partial_sums: bool = True
    cache: float = 6.5e12
    cache_bytes: float = 40e6
    multiprocessors: int = 132


# H200: bandwidth and matrix rate as measured (copy of 8.6 GB; 8192^3 product on random data); the others are data
# sheets' values for bandwidth and dense bf16, times the same shares that the H200 reached of its own (0.9 and 0.78).
# Caches: 50 MB at 6.5 TB/s on the first two; on the others in proportion of multiprocessors, clock and size.
CHIPS = {
    "h200": Chip("NVIDIA H200", bandwidth=4.3e12, matrix=0.77e15, fp32=50e12, gathered=10e12, sampled=7.4e12),
    "h100": Chip("NVIDIA H100 SXM", bandwidth=3.0e12, matrix=0.77e15, fp32=50e12, gathered=10e12, sampled=7.4e12),
    "a100": Chip("NVIDIA A100 80 GB", bandwidth=1.8e12, matrix=0.24e15, fp32=15e12, gathered=6.6e12, sampled=4.9e12,
                 cache=4.3e12, cache_bytes=32e6, multiprocessors=108),
    "b200": Chip("NVIDIA B200", bandwidth=7.2e12, matrix=1.75e15, fp32=60e12, gathered=11.8e12, sampled=8.7e12,
                 cache=7.7e12, cache_bytes=100e6, multiprocessors=148),
}  # fmt: skip

EFFICIENCIES = (0.85, 0.65, 0.5)
"""Shares of the library's rate for which predictions are printed: two products that depend on each other in one loop
make the first an optimistic one."""

GRAPH_LAUNCH = 1e-6
"""Seconds a launch within a CUDA graph."""


@dataclass(frozen=True)
class Kernel:
    """One launch: its work and the unit that does the arithmetic ("matrix", "fp32", "gathered" or "sampled").

    Attributes:
        launches: 0 where the launch serves many layers at once.
        warm: sizes of tensors among `bytes` that an earlier kernel of the pass wrote and this one reads.
    """

    name: str
    flops: float
    bytes: float
    unit: str = "matrix"
    ours: bool = False
    of_factors: bool = False  # belongs to the gradients of the factors
    launches: float = 1.0
    warm: tuple[float, ...] = ()

    def seconds(self, chip: Chip) -> float:
        arithmetic = self.flops / getattr(chip, self.unit)
        if self.ours and self.unit == "matrix":
            arithmetic /= chip.efficiency
        cached = sum(size for size in self.warm if size <= chip.cache_bytes)
        memory = (self.bytes - cached) / chip.bandwidth + cached / chip.cache
        return max(arithmetic, memory) + self.launches * chip.launch


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


def gemm(
    name: str, m: int, n: int, k: int, element: int = BF16, result: int | None = None, warm: Sequence[float] = ()
) -> Kernel:
    """[m, k] @ [k, n]: each operand read once, the result written once, in elements of `result` bytes."""
    unit = "matrix" if element == BF16 else "fp32"
    bytes_ = element * (m * k + k * n) + (result or element) * m * n
    return Kernel(name, 2.0 * m * n * k, bytes_, unit, warm=tuple(warm))


def elementwise(name: str, count: int, *element_bytes: float, warm: Sequence[float] = ()) -> Kernel:
    """A pass over `count` elements that reads and writes tensors of these element sizes, `warm` among them."""
    return Kernel(name, 0.0, count * sum(element_bytes), warm=tuple(count * size for size in warm))


def _sizes(layer: Linear) -> tuple[int, int, int]:
    return layer.tokens, layer.out_features, layer.in_features


# --- the lower bound -------------------------------------------------------------------------------------------------


def lower_bound(layer: Linear, gradients: float = 1.0, element: int = BF16) -> Cost:
    """What no algorithm can undercut: x, W and y once; dY, x, W and dX once, in one backward kernel.

    Its products are those of the frozen layer, and dY^T X for a share `gradients` of the weights: 1 where the gradient
    of every weight is formed, the mask's density where only those under the mask are. All at the library's rate; mask
    and factors are left out.
    """
    t, n, k = _sizes(layer)
    unit = "matrix" if element == BF16 else "fp32"
    moved = element * (t * n + t * k + n * k + t * k)
    backward = Kernel("dY W and dYᵀ X", (1 + gradients) * 2.0 * t * n * k, moved, unit)
    return Cost((gemm("x Wᵀ", t, n, k, element),), (backward,))


# --- paths of the linear layer ---------------------------------------------------------------------------------------


def frozen(layer: Linear) -> Cost:
    """y = x W^T; dX = dY W. Also what a merged weight costs."""
    t, n, k = _sizes(layer)
    return Cost((gemm("x Wᵀ", t, n, k),), (gemm("dY W", t, k, n),))


def peft(layer: Linear, rank: int) -> Cost:
    """PEFT's dense LoRA with adapters in bf16: base(x) + B(A(x)) s. 5 and 7 launches."""
    t, n, k = _sizes(layer)
    base, hidden = frozen(layer), BF16 * t * rank
    forward = (
        gemm("x Aᵀ", t, rank, k),
        gemm("h Bᵀ", t, n, rank, warm=(hidden,)),
        elementwise("scale", t * n, BF16, BF16, warm=(BF16,)),
        elementwise("add to y", t * n, BF16, BF16, BF16, warm=(BF16, BF16)),
    )
    backward = (
        elementwise("scale dY", t * n, BF16, BF16),
        gemm("dY B", t, rank, n, warm=(BF16 * t * n,)),
        gemm("dB", n, rank, t, warm=(BF16 * t * n,)),
        gemm("dH A", t, k, rank, warm=(hidden,)),
        gemm("dA", rank, k, t, warm=(hidden,)),
        elementwise("add to dX", t * k, BF16, BF16, BF16, warm=(BF16, BF16)),
    )
    return Cost(base.forward + forward, base.backward + backward)


def peft_default(layer: Linear, rank: int) -> Cost:
    """The same with PEFT's default adapters in fp32, for which x and dY are turned to fp32. 7 and 10 launches."""
    t, n, k = _sizes(layer)
    base, hidden = frozen(layer), FP32 * t * rank
    forward = (
        elementwise("x to fp32", t * k, BF16, FP32),
        gemm("x Aᵀ", t, rank, k, FP32, warm=(FP32 * t * k,)),
        gemm("h Bᵀ", t, n, rank, FP32, warm=(hidden,)),
        elementwise("scale", t * n, FP32, FP32, warm=(FP32,)),
        elementwise("add to y in fp32", t * n, BF16, FP32, FP32, warm=(BF16, FP32)),
        elementwise("y to bf16", t * n, FP32, BF16, warm=(FP32,)),
    )
    backward = (
        elementwise("dY to fp32", t * n, BF16, FP32),
        elementwise("dY to bf16", t * n, FP32, BF16, warm=(FP32,)),
        elementwise("scale dY", t * n, FP32, FP32, warm=(FP32,)),
        gemm("dY B", t, rank, n, FP32, warm=(FP32 * t * n,)),
        gemm("dB", n, rank, t, FP32, warm=(FP32 * t * n,)),
        gemm("dH A", t, k, rank, FP32, warm=(hidden,)),
        gemm("dA", rank, k, t, FP32, warm=(hidden,)),
        elementwise("dX to bf16", t * k, FP32, BF16, warm=(FP32,)),
        elementwise("add to dX", t * k, BF16, BF16, BF16, warm=(BF16, BF16)),
    )
    return Cost(base.forward + forward, base.backward + backward)


def peft_autocast(layer: Linear, rank: int) -> Cost:
    """PEFT's default adapters under bf16 autocast: x goes to fp32 and back, products run in bf16. 9 and 11 launches."""
    t, n, k = _sizes(layer)
    dense = peft(layer, rank)
    small_a, small_b = (elementwise("factor to bf16", rank * size, FP32, BF16) for size in (k, n))
    there, back = (BF16, FP32), (FP32, BF16)
    forward = (elementwise("x to fp32", t * k, *there), elementwise("x to bf16", t * k, *back, warm=(FP32,)))
    backward = (
        elementwise("dX to fp32", t * k, *there, warm=(BF16,)),
        elementwise("dX to bf16", t * k, *back, warm=(FP32,)),
    )
    return Cost(dense.forward + forward + (small_a, small_b), dense.backward + backward + (small_a, small_b))


def naive_masked(layer: Linear, rank: int, two_products: bool = True, mask_bytes: int = 1) -> Cost:
    """Masked LoRA in eager PyTorch: D = s (B A) M as a tensor.

    Two products: x W^T + x D^T, as a PEFT layer computes it. One product: x (W + D)^T, as SparsePEFT does, which loses
    a small D to the rounding of W + D.
    """
    t, n, k = _sizes(layer)
    base, weights = frozen(layer), n * k
    delta = (BF16 * weights,)
    make = (
        gemm("B A", n, k, rank),
        elementwise("times mask", weights, BF16, mask_bytes, BF16, warm=(BF16,)),
        elementwise("times scale", weights, BF16, BF16, warm=(BF16,)),
    )
    gradients = (
        gemm("dYᵀ X", n, k, t),
        elementwise("dD times scale", weights, BF16, BF16, warm=(BF16,)),
        elementwise("dD times mask", weights, BF16, mask_bytes, BF16, warm=(BF16,)),
        gemm("dB", n, rank, k, warm=delta),
        gemm("dA", rank, k, n, warm=delta),
    )
    if two_products:
        forward = (
            *base.forward,
            gemm("x Dᵀ", t, n, k, warm=delta),
            elementwise("add to y", t * n, BF16, BF16, BF16, warm=(BF16, BF16)),
        )
        backward = (gemm("dY D", t, k, n), elementwise("add to dX", t * k, BF16, BF16, BF16, warm=(BF16, BF16)))
    else:
        # The product that reads W + D, just written, is the only one.
        added = elementwise("W + D", weights, BF16, BF16, BF16, warm=(BF16,))
        forward, backward = (added, gemm("x Wᵀ", t, n, k, warm=delta)), ()
    return Cost(make + forward, base.backward + backward + gradients)


TILE, STEP, MOST_SPLITS = 128, 64, 32
"""Tiles of dY^T X, and rows of T a step, of the factors' gradients (`triton_kernels/masked_lora_factor_gradients`)."""


def splits(layer: Linear, chip: Chip) -> int:
    """Ranges that T is divided into so that the tiles fill the chip (`triton_kernels/split.py`)."""
    t, n, k = _sizes(layer)
    tiles = -(-n // TILE) * -(-k // TILE)
    return split_rows(t, STEP, STEP, tiles, chip.multiprocessors, MOST_SPLITS).count


def _factor_gradients(
    layer: Linear, rank: int, occupancy: float, chip: Chip, element: int = BF16
) -> tuple[Kernel, ...]:
    """dA and dB from dY, X and the mask: occupied tiles of dY^T X, contracted with A and B in registers.

    Each tile and split leaves its part of dA and of dB in fp32; a second launch adds them up.
    """
    t, n, k = _sizes(layer)
    flops = occupancy * (2.0 * t * n * k + 4.0 * n * k * rank)
    unit = "matrix" if element == BF16 else "fp32"
    moved = element * (t + rank) * (n + k) + INT32_PER_BIT * n * k
    result = FP32 * rank * (n + k)
    if not chip.partial_sums:
        return (Kernel("factor gradients", flops, moved + result, unit, ours=True, of_factors=True),)
    tiles = occupancy * -(-n // TILE) * -(-k // TILE)
    partials = splits(layer, chip) * tiles * FP32 * rank * 2 * TILE
    return (
        Kernel("factor gradients", flops, moved + partials, unit, ours=True, of_factors=True),
        Kernel("their partial sums", 0.0, partials + result, ours=True, of_factors=True, warm=(partials,)),
    )


def _delta_flops(layer: Linear, rank: int, occupancy: float, chip: Chip) -> float:
    """FLOPs of x D^T on the occupied tiles, with D made anew from A and B for every `row_tile` rows of x."""
    t, n, k = _sizes(layer)
    made = -(-t // chip.row_tile) if chip.row_tile else 0
    return occupancy * (2.0 * t * n * k + made * 2.0 * n * k * rank)


def fused(layer: Linear, rank: int, occupancy: float, chip: Chip) -> Cost:
    """Exact: one kernel for x W^T + x D^T in one fp32 sum, one for the input gradient, and the factors' gradients."""
    t, n, k = _sizes(layer)
    flops = 2.0 * t * n * k + _delta_flops(layer, rank, occupancy, chip)
    bytes_ = BF16 * (t * k + n * k + t * n + rank * (n + k)) + INT32_PER_BIT * n * k
    forward = Kernel("x (W, D)ᵀ", flops, bytes_, ours=True)
    backward = replace(forward, name="dY (W, D)")
    return Cost((forward,), (backward, *_factor_gradients(layer, rank, occupancy, chip)))


def one_product(layer: Linear, rank: int, occupancy: float, chip: Chip, kept: bool = True) -> Cost:
    """One library product in each direction with W + D, stochastically rounded to 16 bits in scratch.

    `kept`: W + D of all layers is made by one launch a step, and stays for the backward pass (N K elements a layer);
    else each pass refills the scratch.
    """
    return _from_scratch(layer, rank, occupancy, chip, kept, BF16)


def scratch(layer: Linear, rank: int, occupancy: float, chip: Chip) -> Cost:
    """The same in fp32, where W + D is exact enough: it is made in each pass."""
    return _from_scratch(layer, rank, occupancy, chip, False, FP32)


def _from_scratch(layer: Linear, rank: int, occupancy: float, chip: Chip, kept: bool, element: int) -> Cost:
    t, n, k = _sizes(layer)
    bytes_ = n * k * (2 * element + INT32_PER_BIT) + element * rank * (n + k)
    made = Kernel("W + D", occupancy * 2.0 * n * k * rank, bytes_, ours=True, launches=0.0 if kept else 1.0)
    warm = () if kept else (element * n * k,)
    product, back = gemm("x (W + D)ᵀ", t, n, k, element, warm=warm), gemm("dY (W + D)", t, k, n, element, warm=warm)
    gradients = _factor_gradients(layer, rank, occupancy, chip, element)
    return Cost((made, product), (*(() if kept else (made,)), back, *gradients))


def one_product_stored(layer: Linear, rank: int, density: float, occupancy: float, chip: Chip) -> Cost:
    """A design, not built: `one_product` whose gradients are stored at the mask's positions, and contracted with the
    factors for all layers by one launch a step."""
    t, n, k = _sizes(layer)
    moved = BF16 * t * (n + k) + INT32_PER_BIT * n * k + FP32 * density * n * k
    gradient = Kernel("dYᵀ X at the mask", occupancy * 2.0 * t * n * k, moved, ours=True, of_factors=True)
    base = one_product(layer, rank, occupancy, chip)
    products = tuple(kernel for kernel in base.backward if not kernel.of_factors)
    return Cost(base.forward, (*products, gradient, _contracted(layer, rank, density)))


def one_product_sampled(layer: Linear, rank: int, density: float, chip: Chip) -> Cost:
    """A design, not built: one backward kernel that computes dX, and dY^T X in strips of 16 rows of the mask, of which
    it takes the columns that the strip's bits touch, gathered at a third of the rate (assumed)."""
    t, n, k = _sizes(layer)
    strips = 3 * (1 - (1 - density) ** 16)
    moved = BF16 * (t * n + 2 * t * k + n * k) + INT32_PER_BIT * n * k + FP32 * density * n * k
    both = Kernel("dY W' and dYᵀ X", (1 + strips) * 2.0 * t * n * k, moved, ours=True)
    base = one_product(layer, rank, 1.0, chip)
    return Cost(base.forward, (both, _contracted(layer, rank, density)))


def _contracted(layer: Linear, rank: int, density: float) -> Kernel:
    """dA and dB from the gradient at the mask's positions; a share of one launch for all layers."""
    _, n, k = _sizes(layer)
    moved = 8 * density * n * k + (BF16 + FP32) * rank * (n + k)
    flops = 4.0 * rank * density * n * k
    return Kernel("dA, dB", flops, moved, "gathered", ours=True, of_factors=True, launches=0.0)


def gather(layer: Linear, rank: int, density: float) -> Cost:
    """Exact: the library's x W^T with a result in fp32; the delta, at the mask's positions alone, added to it; one
    rounding. The gradient is sampled at those positions.

    A position costs 8 bytes: a column and a value. The sparse products read one activation and update the other.
    """
    t, n, k = _sizes(layer)
    nnz = density * n * k
    values = Kernel("values of D", 2.0 * rank * nnz, 16 * nnz + BF16 * rank * (n + k), "gathered", ours=True)

    def added(name: str, of: int, to: int) -> tuple[Kernel, Kernel]:
        moved, result = 8 * nnz + BF16 * t * of + 2 * FP32 * t * to, FP32 * t * to
        product = Kernel(name, 2.0 * t * nnz, moved, "gathered", ours=True, warm=(result,))
        return product, elementwise("rounded", t * to, FP32, BF16, warm=(FP32,))

    moved = 8 * nnz + BF16 * t * (n + k)
    sampled = Kernel("dYᵀ X sampled", 2.0 * t * nnz, moved, "sampled", ours=True, of_factors=True)
    # One partial sum a block, two blocks on each of 132 multiprocessors or one for each 32 rows of x.
    parts = min(264, -(-t // 32))
    partials = FP32 * parts * nnz
    summed = Kernel("its partial sums", 0.0, 2 * partials, ours=True, of_factors=True, warm=(partials,))
    contracted = replace(_contracted(layer, rank, density), bytes=16 * nnz + 6 * rank * (n + k), launches=1.0)
    return Cost(
        (gemm("x Wᵀ", t, n, k, result=FP32), values, *added("y += x Dᵀ", k, n)),
        (gemm("dY W", t, k, n, result=FP32), values, *added("dX += dY D", n, k), sampled, summed, contracted),
    )


def from_library(layer: Linear, rank: int) -> Cost:
    """The factors' gradients from the library's dY^T X, read once for each of them while it is in the cache."""
    t, n, k = _sizes(layer)
    product = replace(gemm("dYᵀ X", n, k, t), of_factors=True)
    gradient, result = BF16 * n * k, (BF16 + FP32) * rank * (n + k)
    moved = 2 * (gradient + INT32_PER_BIT * n * k) + result
    contracted = Kernel(
        "dA, dB", 4.0 * n * k * rank, moved, ours=True, of_factors=True, warm=(gradient, gradient)
    )  # fmt: skip
    return Cost((), (product, contracted))


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


# --- host ------------------------------------------------------------------------------------------------------------

HOST = {"frozen": 27e-6, "PEFT": 90e-6, "exact": 372e-6, "one-product": 372e-6}
"""Seconds that the host needs to launch one layer's forward and backward pass in eager mode, kernels left out: of the
layer alone, of PEFT's three linears, of ours by mode. Measured on a CPU before the launches were made lean; what
`bench/host_overhead.py` measures takes their place."""


# --- totals ----------------------------------------------------------------------------------------------------------


def total(costs: Sequence[tuple[int, Cost]], chip: Chip, mode: str = "training") -> float:
    """Seconds of layers that occur so many times each."""
    return sum(count * cost.seconds(chip, mode) for count, cost in costs)
