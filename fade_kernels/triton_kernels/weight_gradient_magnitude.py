"""Saliency of a linear layer from dY [T, N] and X [T, K]: S [N, K] += f(G), G = dY^T X, with no gradient in memory.

f is the magnitude (FADE), the square (Fisher information) or G itself. A program owns one BN x BK tile of S: it sums
dY^T X over T in fp32 registers, applies f there and adds to S by a relaxed fp32 atomic. One program owns each element,
so the result is the same in every run; the atomic only saves the load, the add and their registers.

Per sample, S += sum_i f(dY_i^T X_i): the same products, with f taken at the end of each sample's rows and summed in a
second accumulator.

f does not commute with splitting T, which a layer with few tiles needs. There each program of a tile writes its partial
G to a workspace and counts itself in; the last to arrive adds the partials in fixed order and applies f once. Per
sample the split is over whole samples, the partials are sums of f, and the last program just adds them.

Traffic: dY is read K/BK times and X N/BN times (mostly from L2), S read and written once; with splits, 4 bytes per
element of S and split written and read, which the last program reads alone: hence few splits.
"""

from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fade_kernels.triton_kernels.launch import TRITON_DTYPES, CompileCase, Launch, Tiling, ceil_div, kept, on_device
from fade_kernels.triton_kernels.split import multiprocessors, split_rows, together

MOST_SPLITS = 16
"""The last program of a tile reads this many partials of it by itself."""

PARTIAL = 0.7
"""Steps of the loop that a program takes to write or read one partial sum of its tile."""

MAGNITUDES = {"abs": 0, "square": 1, "signed": 2}
"""f by the operators' names, as the kernel's constant."""


@triton.jit
def magnitude_of(b_g, MAGNITUDE: tl.constexpr):
    """f(G) by element: |g|, g^2 or g."""
    if MAGNITUDE == 0:
        b_g = tl.abs(b_g)
    elif MAGNITUDE == 1:
        b_g = b_g * b_g
    return b_g


@triton.jit
def weight_gradient_block(
    dy, x, first, end, o_n, o_k, m_n, m_k, stride_dy, stride_x,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """dY^T X of rows first..end - 1 at the tile's rows and columns: fp32 [BN, BK]."""
    b_g = tl.zeros((BN, BK), dtype=tl.float32)
    for i_t in range(first, end, BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = o_t < end
        p_dy = dy + o_t.to(tl.int64)[None, :] * stride_dy + o_n[:, None]
        p_x = x + o_t.to(tl.int64)[:, None] * stride_x + o_k[None, :]
        b_dy = tl.load(p_dy, mask=m_n[:, None] & m_t[None, :], other=0.0)  # [BN, BT]
        b_x = tl.load(p_x, mask=m_t[:, None] & m_k[None, :], other=0.0)  # [BT, BK]
        b_g = tl.dot(b_dy, b_x, b_g, input_precision=INPUT_PRECISION)  # [BN, BT] @ [BT, BK] -> [BN, BK]
    return b_g


@triton.jit
def weight_gradient_magnitude_kernel(
    dy,
    x,
    saliency,
    partial,
    arrived,
    T,
    N,
    K,
    ROWS,
    SAMPLE,
    stride_dy,
    stride_x,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    SPLIT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1)
    i_n = i_tile // tl.cdiv(K, BK)
    i_k = i_tile % tl.cdiv(K, BK)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = i_k * BK + tl.arange(0, BK)
    m_n = o_n < N
    m_k = o_k < K
    first = i_split * ROWS
    end = tl.minimum(first + ROWS, T)
    if PER_SAMPLE:
        b_s = tl.zeros((BN, BK), dtype=tl.float32)
        for i_sample in range(first, end, SAMPLE):
            b_g = weight_gradient_block(
                dy, x, i_sample, i_sample + SAMPLE, o_n, o_k, m_n, m_k, stride_dy, stride_x,
                BT, BN, BK, INPUT_PRECISION,
            )  # fmt: skip
            b_s += magnitude_of(b_g, MAGNITUDE)  # [BN, BK]
    else:
        b_s = weight_gradient_block(
            dy, x, first, end, o_n, o_k, m_n, m_k, stride_dy, stride_x, BT, BN, BK, INPUT_PRECISION
        )  # fmt: skip
    if SPLIT:
        o_tile = tl.arange(0, BN)[:, None] * BK + tl.arange(0, BK)[None, :]
        p_partial = partial + i_tile.to(tl.int64) * tl.num_programs(1) * (BN * BK) + o_tile
        tl.store(p_partial + i_split.to(tl.int64) * (BN * BK), b_s)
        # Every thread's part is written before one of them counts the program in: release there, acquire in the last.
        tl.debug_barrier()
        if tl.atomic_add(arrived + i_tile, 1, sem="acq_rel") < tl.num_programs(1) - 1:
            return
        b_s = tl.zeros((BN, BK), dtype=tl.float32)
        for _ in range(0, tl.num_programs(1)):
            b_s += tl.load(p_partial, cache_modifier=".cg")  # from L2, where the others' stores are: L1 is not coherent
            p_partial += BN * BK
    if not PER_SAMPLE:
        b_s = magnitude_of(b_s, MAGNITUDE)
    p_saliency = saliency + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    tl.atomic_add(p_saliency, b_s, mask=m_n[:, None] & m_k[None, :], sem="relaxed")


TILINGS = {
    "16bit": (
        Tiling({"BT": 64, "BN": 128, "BK": 128}, num_warps=8, num_stages=3),
        Tiling({"BT": 64, "BN": 128, "BK": 128}, num_warps=8, num_stages=4),
        Tiling({"BT": 64, "BN": 128, "BK": 64}, num_warps=4, num_stages=4),
        Tiling({"BT": 64, "BN": 64, "BK": 64}, num_warps=4, num_stages=3),
    ),
    "tf32": (Tiling({"BT": 32, "BN": 64, "BK": 64}, num_warps=4, num_stages=3),),
    "ieee": (Tiling({"BT": 16, "BN": 64, "BK": 64}, num_warps=8, num_stages=2),),
}
"""By the arithmetic of the product. A tile of 128 x 256 spills with two accumulators."""


def default_tiling(dtype: torch.dtype, input_precision: str, rows: int, n: int, k: int) -> Tiling:
    """What was the fastest on an H100 (`bench/results/tilings.json`): small weights are summed by many programs, of
    which one more stage hides the memory; few rows leave no time to fill large tiles."""
    tilings = TILINGS["16bit" if dtype.itemsize == 2 else input_precision]
    if len(tilings) == 1:
        return tilings[0]
    if n * k < 300_000 and rows < 1024:
        return tilings[3]
    if n * k <= 640 * 640:
        return tilings[1]
    return tilings[2] if rows <= 2048 else tilings[0]


def accumulate_linear_gradient_magnitude_(
    saliency: Tensor,
    dy: Tensor,
    x: Tensor,
    magnitude: str,
    per_sample: bool,
    *,
    tiling: Tiling | None = None,
    splits: int | None = None,
    input_precision: str = "ieee",
) -> None:
    """S += f(dY^T X) over all leading dimensions, or with `per_sample` S += sum over dim 0 of f(dY_i^T X_i).

    Args:
        saliency: fp32 [N, K], contiguous; changed in place.
        dy, x: [..., N] and [..., K], fp32, fp16 or bf16, the same dtype; rows may be strided.
        magnitude: "abs", "square" or "signed".
        tiling: one of `TILINGS`; None: `default_tiling`.
        splits: ranges that T (per sample: the samples) is divided into; None: as many as fill the device.
        input_precision: of the product where the activations are fp32: "ieee" or "tf32".
    """
    if saliency.dtype != torch.float32 or not saliency.is_contiguous():
        raise ValueError("saliency must be float32 and contiguous: it is added to in place")
    if 0 in (dy.numel(), x.numel()):
        return
    samples = dy.shape[0] if per_sample and magnitude != "signed" else 1
    dy, x = (t.reshape(-1, t.shape[-1]) for t in (dy, x))
    dy, x = (t if t.stride(1) == 1 else t.contiguous() for t in (dy, x))

    def make() -> _Plan:
        return _plan(saliency, dy, x, magnitude, samples, tiling, splits, input_precision)

    if tiling is None:
        key = (
            dy.shape,
            dy.stride(),
            dy.dtype,
            dy.device,
            x.shape,
            x.stride(),
            magnitude,
            samples,
            splits,
            input_precision,
        )
        plan = kept(_plans, key, make)
    else:
        plan = make()
    partial = arrived = saliency
    if plan.partial:
        partial = torch.empty(plan.partial, dtype=torch.float32, device=dy.device)
        arrived = torch.zeros(plan.tiles, dtype=torch.int32, device=dy.device)
    with on_device(dy):
        plan.launch(dy, x, saliency, partial, arrived)


class _Plan(NamedTuple):
    """The launch and the sizes of its workspace; no partial sums: it needs none."""

    launch: Launch
    tiles: int
    partial: int


_plans: dict[Hashable, _Plan] = {}


def _plan(
    saliency: Tensor,
    dy: Tensor,
    x: Tensor,
    magnitude: str,
    samples: int,
    tiling: Tiling | None,
    splits: int | None,
    input_precision: str,
) -> _Plan:
    """The launch for arguments of these types, sizes and strides."""
    (n, k), rows = saliency.shape, dy.shape[0]
    tiling = tiling or default_tiling(dy.dtype, input_precision, rows, n, k)
    tile_n, tile_k, step = (tiling.blocks[size] for size in ("BN", "BK", "BT"))
    tiles, sample = ceil_div(n, tile_n) * ceil_div(k, tile_k), rows // samples
    split = split_rows(
        rows, step if samples == 1 else sample, step, tiles, multiprocessors(dy.device), MOST_SPLITS, splits,
        side_by_side=together(tile_n * tile_k), partial=PARTIAL,
    )  # fmt: skip
    constants = {
        "MAGNITUDE": MAGNITUDES[magnitude],
        "PER_SAMPLE": samples > 1,
        "SPLIT": split.count > 1,
        "INPUT_PRECISION": input_precision,
    }
    sizes = (rows, n, k, split.rows, sample, dy.stride(0), x.stride(0))
    launch = Launch(weight_gradient_magnitude_kernel, (tiles, split.count), sizes, constants, tiling)
    return _Plan(launch, tiles, tiles * split.count * tile_n * tile_k if split.count > 1 else 0)


def compile_cases() -> list[CompileCase]:
    """Every tiling for |.|, whole and split, over the batch and per sample."""
    cases = []
    for dtype, precision in (
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.float16, ""),
        (torch.bfloat16, ""),
    ):
        element = TRITON_DTYPES[dtype]
        name = "tf32" if precision == "tf32" else element
        for tiling in TILINGS[precision or "16bit"]:
            shape = "x".join(str(tiling.blocks[size]) for size in ("BN", "BK", "BT"))
            for per_sample in (False, True):
                for split in (False, True):
                    constants = {
                        **tiling.blocks,
                        "MAGNITUDE": MAGNITUDES["abs"],
                        "PER_SAMPLE": per_sample,
                        "SPLIT": split,
                        "INPUT_PRECISION": precision or "ieee",
                    }
                    sizes = ("T", "N", "K", "ROWS", "SAMPLE", "stride_dy", "stride_x")
                    cases.append(
                        CompileCase(
                            name=f"weight_gradient_magnitude {shape}{', per sample' * per_sample}{', split' * split}",
                            kernel=weight_gradient_magnitude_kernel,
                            dtype=name,
                            signature={
                                "dy": f"*{element}",
                                "x": f"*{element}",
                                "saliency": "*fp32",
                                "partial": "*fp32",
                                "arrived": "*i32",
                                **dict.fromkeys(sizes, "i32"),
                                **dict.fromkeys(constants, "constexpr"),
                            },
                            constants=constants,
                            tiling=tiling,
                            tensor_cores=name != "fp32",
                            divisible_by_16=("N", "K", "ROWS", "stride_dy", "stride_x"),
                        )
                    )
    return cases
