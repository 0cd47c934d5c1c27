"""Masked-LoRA linear input gradient: dX = dY W + dY Delta with Delta = s M o (B A), in one pass over dY.

The forward's scheme (`masked_lora_forward`) read the other way: dX^T = W^T dY^T + Delta^T dY^T with accumulator
[BK, BT] and the contraction over N. Delta^T is made as the left operand, from A^T B^T and the mask's words read as
[BK/32, BN] and expanded along their first dimension, so that nothing is transposed in registers.

`masked_lora_input_gradient` does all of it; `add_masked_lora_input_gradient` adds dY Delta in the occupied tiles to the
dY W that a library GEMM wrote.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fade_kernels.triton_kernels.blocks import any_nonzero, expand_columns, grouped_tile, product_by_rank_steps
from fade_kernels.triton_kernels.launch import CompileCase, Tiling, as_scale, on_device
from fade_kernels.triton_kernels.masked_lora_launch import (
    GROUP_T,
    as_factors,
    check_arguments,
    check_output,
    compile_cases_of,
    precision_constants,
    problem,
    with_unit_stride,
)
from fade_kernels.triton_kernels.occupied_tiles import OccupiedTiles, occupied_tiles
from fade_kernels.triton_kernels.tuning import choose_tiling


@triton.jit(do_not_specialize=["T"])
def masked_lora_input_gradient_kernel(
    dy,
    weight,
    lora_a,
    lora_b,
    mask_words,
    scale,
    tiles,
    counts,
    dx,
    T,
    N,
    K,
    R,
    stride_dy,
    stride_weight,
    stride_a,
    stride_b,
    stride_mask,
    stride_tiles,
    stride_dx,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP_T: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ADD: tl.constexpr,
    SKIP: tl.constexpr,
    SCALE_POINTER: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    i_t, i_k = grouped_tile(tl.program_id(0), tl.cdiv(T, BT), tl.cdiv(K, BK), GROUP_T)
    if ADD:
        steps = tl.load(counts + i_k)
        if steps == 0:
            return  # dX stays as the library GEMM left it
        p_tile = tiles + i_k.to(tl.int64) * stride_tiles
        i_n = tl.load(p_tile)
    else:
        steps = tl.cdiv(N, BN)
        i_n = 0
    o_t = i_t * BT + tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    o_r = tl.arange(0, BR)
    o_word = i_k * (BK // 32) + tl.arange(0, BK // 32)
    m_t = o_t < T
    m_k = o_k < K
    m_r = o_r < R
    m_word = o_word < tl.cdiv(K, 32)
    p_dy = dy + o_t.to(tl.int64)[None, :] * stride_dy
    p_a = lora_a + o_r.to(tl.int64)[None, :] * stride_a + o_k[:, None]
    b_scale = tl.load(scale) if SCALE_POINTER else scale
    if not RANK_STEPS:
        b_a = tl.load(p_a, mask=m_k[:, None] & m_r[None, :], other=0.0)  # [BK, BR]

    b_acc = tl.zeros((BK, BT), dtype=tl.float32)
    for i_step in range(0, steps):
        o_n = i_n * BN + tl.arange(0, BN)
        m_n = o_n < N
        p_b = lora_b + o_n.to(tl.int64)[None, :] * stride_b + o_r[:, None]
        p_mask = mask_words + o_n.to(tl.int64)[None, :] * stride_mask + o_word[:, None]
        b_dy = tl.load(p_dy + o_n[:, None], mask=m_n[:, None] & m_t[None, :], other=0.0)  # [BN, BT]
        b_words = tl.load(p_mask, mask=m_word[:, None] & m_n[None, :], other=0)  # [BK/32, BN]
        if not RANK_STEPS:
            b_b = tl.load(p_b, mask=m_r[:, None] & m_n[None, :], other=0.0)  # [BR, BN]
        if HAS_WEIGHT:
            p_weight = weight + o_n.to(tl.int64)[None, :] * stride_weight + o_k[:, None]
            b_weight = tl.load(p_weight, mask=m_k[:, None] & m_n[None, :], other=0.0)  # [BK, BN]
            # [BK, BN] @ [BN, BT] -> [BK, BT]
            b_acc = tl.dot(b_weight, b_dy, b_acc, input_precision=INPUT_PRECISION)
        occupied = True
        if SKIP:
            occupied = any_nonzero(b_words)
        if occupied:
            if RANK_STEPS:
                b_product = product_by_rank_steps(
                    p_a, p_b, stride_a, 1, m_k, m_n, R, BK, BN, BR, INPUT_PRECISION
                )  # [BK, BN]
            else:
                b_product = tl.dot(b_a, b_b, input_precision=INPUT_PRECISION)  # [BK, BR] @ [BR, BN] -> [BK, BN]
            b_delta = tl.where(expand_columns(b_words, BN, BK) != 0, b_product * b_scale, 0.0)  # [BK, BN]
            # [BK, BN] @ [BN, BT] -> [BK, BT]
            b_acc = tl.dot(b_delta.to(dy.dtype.element_ty), b_dy, b_acc, input_precision=INPUT_PRECISION)
        if ADD:
            # One tile ahead, so that the loads of the next step do not wait for their own address.
            i_n = tl.load(p_tile + tl.minimum(i_step + 1, steps - 1))
        else:
            i_n += 1

    p_dx = dx + o_t.to(tl.int64)[None, :] * stride_dx + o_k[:, None]
    m_dx = m_k[:, None] & m_t[None, :]
    if ADD:
        b_acc += tl.load(p_dx, mask=m_dx, other=0.0).to(tl.float32)
    tl.store(p_dx, b_acc.to(dx.dtype.element_ty), mask=m_dx)


# The default for large T, its rivals, then small T: the forward's reasons.
TILINGS: tuple[Tiling, ...] = (
    Tiling({"BT": 128, "BN": 64, "BK": 64}, num_warps=4, num_stages=3),
    Tiling({"BT": 128, "BN": 64, "BK": 128}, num_warps=8, num_stages=3),
    Tiling({"BT": 64, "BN": 64, "BK": 64}, num_warps=4, num_stages=4),
    Tiling({"BT": 16, "BN": 64, "BK": 64}, num_warps=4, num_stages=4),
)
"""16-bit activations, ranks up to 32."""

WIDE_RANK_TILINGS: tuple[Tiling, ...] = (
    Tiling({"BT": 128, "BN": 64, "BK": 64}, num_warps=4, num_stages=2),
    Tiling({"BT": 128, "BN": 64, "BK": 128}, num_warps=8, num_stages=2),
    Tiling({"BT": 16, "BN": 64, "BK": 64}, num_warps=4, num_stages=2),
)
"""16-bit activations, larger ranks, whose factors need the shared memory of a stage."""

TF32_TILINGS: tuple[Tiling, ...] = (
    Tiling({"BT": 128, "BN": 32, "BK": 64}, num_warps=4, num_stages=3),
    Tiling({"BT": 16, "BN": 32, "BK": 64}, num_warps=4, num_stages=3),
)

WIDE_RANK_TF32_TILINGS: tuple[Tiling, ...] = (
    Tiling({"BT": 128, "BN": 32, "BK": 64}, num_warps=4, num_stages=2),
    Tiling({"BT": 16, "BN": 32, "BK": 64}, num_warps=4, num_stages=2),
)
"""Ranks above 64: with a stage more they need 105 KiB of shared memory, and sm_86 and sm_89 have 99."""

IEEE_TILINGS: tuple[Tiling, ...] = (Tiling({"BT": 64, "BN": 32, "BK": 32}, num_warps=8, num_stages=3),)
"""fp32 without tensor cores: every product of a tile is unrolled, so tiles are small."""


def candidate_tilings(dtype: torch.dtype, rank: int, input_precision: str) -> tuple[Tiling, ...]:
    """The tilings that serve an element type and rank."""
    if dtype == torch.float32:
        if input_precision == "ieee":
            return IEEE_TILINGS
        return TF32_TILINGS if rank <= 64 else WIDE_RANK_TF32_TILINGS
    return TILINGS if rank <= 32 else WIDE_RANK_TILINGS


def default_tiling(dtype: torch.dtype, T: int, N: int, K: int, R: int, input_precision: str = "ieee") -> Tiling:
    """The tiling of a launch that nobody measured: by T, and by whether there are tiles enough for every processor."""
    candidates = candidate_tilings(dtype, R, input_precision)
    if T <= 32:
        return min(candidates, key=lambda tiling: tiling.blocks["BT"])
    if candidates is TILINGS and triton.cdiv(T, 128) * triton.cdiv(K, 64) < 128:
        return TILINGS[2]
    return candidates[0]


def _launch(
    dx: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    tiling: Tiling,
    input_precision: str,
    *,
    occupied: OccupiedTiles | None = None,
    skip_empty: bool = True,
) -> None:
    """dX = dY W + dY Delta, or with `occupied` tiles dX += dY Delta."""
    T, N = dy.shape
    R, K = lora_a.shape
    scale_argument, scale_pointer = as_scale(scale)
    # Pointers of absent arguments are never read.
    tiles, counts = occupied or (mask_words, mask_words)
    grid = (triton.cdiv(T, tiling.blocks["BT"]) * triton.cdiv(K, tiling.blocks["BK"]),)
    with on_device(dy):
        masked_lora_input_gradient_kernel[grid](
            dy,
            dy if weight is None else weight,
            lora_a,
            lora_b,
            mask_words,
            scale_argument,
            tiles,
            counts,
            dx,
            T,
            N,
            K,
            R,
            dy.stride(0),
            0 if weight is None else weight.stride(0),
            lora_a.stride(0),
            lora_b.stride(0),
            mask_words.stride(0),
            tiles.stride(0),
            dx.stride(0),
            **tiling.blocks,
            **precision_constants(dy.dtype, R, input_precision),
            GROUP_T=GROUP_T,
            HAS_WEIGHT=weight is not None,
            ADD=occupied is not None,
            SKIP=skip_empty and occupied is None,
            SCALE_POINTER=scale_pointer,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )


def masked_lora_input_gradient(
    dy: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    *,
    out: Tensor | None = None,
    tiling: Tiling | None = None,
    input_precision: str = "ieee",
    skip_empty: bool = True,
) -> Tensor:
    """dX [T, K] = dY W + dY (s M o (B A)) in one launch.

    Args:
        dy: [T, N] fp32, fp16 or bf16; rows may be strided.
        weight: [N, K] in dY's dtype, or None for the delta's term alone.
        lora_a: [r, K] in any of the dtypes, r from 1 to 128.
        lora_b: [N, r].
        mask_words: int32 [N, ceil(K/32)].
        scale: 0-d; on the device it is read there.
        out: [T, K] to write, of dY's dtype or fp32; None: new, in dY's dtype.
        tiling: None: `default_tiling`, or measured (`tuning`).
        input_precision: of fp32 products: "ieee" or "tf32".
        skip_empty: test each tile of the mask and skip the delta of empty ones; False pays where none is empty.

    Raises:
        TypeError, ValueError: element types, ranks and precisions the kernel does not take.
    """
    T, N = dy.shape
    R, K = lora_a.shape
    check_arguments(R, input_precision, dy=dy, weight=weight, lora_a=lora_a, lora_b=lora_b, out=out)
    dx = dy.new_empty((T, K)) if out is None else out
    check_output("out", dx, (T, K), dy.dtype)
    if dx.numel() == 0:
        return dx
    lora_a, lora_b = as_factors(lora_a, lora_b)
    dy, mask_words = with_unit_stride(dy), with_unit_stride(mask_words)
    weight = None if weight is None else with_unit_stride(weight)

    def run(tiling: Tiling) -> None:
        delta = (lora_a, lora_b, mask_words, scale)
        _launch(dx, dy, weight, *delta, tiling, input_precision, skip_empty=skip_empty)

    if tiling is None:
        default = default_tiling(dy.dtype, T, N, K, R, input_precision)
        candidates = candidate_tilings(dy.dtype, R, input_precision)
        sizes = problem(dy, lora_a, lora_b, input_precision)
        tiling = choose_tiling("masked_lora_input_gradient", sizes, default, candidates, dy.device, run)
    run(tiling)
    return dx


def add_masked_lora_input_gradient(
    dx: Tensor,
    dy: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    *,
    tiling: Tiling | None = None,
    input_precision: str = "ieee",
) -> Tensor:
    """dX [T, K] += dY (s M o (B A)) in the occupied tiles, summed in fp32 and rounded once; returns dX.

    A small launch lists the occupied tiles first. Columns of tiles without any bit are neither read nor written.

    Args:
        dx: dY W, of dY's dtype or fp32; stride 1 in the last dimension.
        dy, lora_a, lora_b, mask_words, scale, tiling, input_precision: as for `masked_lora_input_gradient`.

    Raises:
        TypeError, ValueError: as there; ValueError if dX is strided in its last dimension.
    """
    T, N = dy.shape
    R, K = lora_a.shape
    check_arguments(R, input_precision, dx=dx, dy=dy, lora_a=lora_a, lora_b=lora_b)
    check_output("dx", dx, (T, K), dy.dtype)
    if dx.numel() == 0 or N == 0:
        return dx
    lora_a, lora_b = as_factors(lora_a, lora_b)
    dy, mask_words = with_unit_stride(dy), with_unit_stride(mask_words)

    def run(tiling: Tiling, dx: Tensor) -> None:
        occupied = occupied_tiles(mask_words, tiling.blocks["BN"], tiling.blocks["BK"], along="n")
        _launch(dx, dy, None, lora_a, lora_b, mask_words, scale, tiling, input_precision, occupied=occupied)

    if tiling is None:
        default = default_tiling(dy.dtype, T, N, K, R, input_precision)
        candidates = candidate_tilings(dy.dtype, R, input_precision)
        sizes = problem(dy, lora_a, lora_b, input_precision)
        # A measurement adds many times, so not into dx.
        tiling = choose_tiling(
            "add_masked_lora_input_gradient",
            sizes,
            default,
            candidates,
            dy.device,
            lambda tiling: run(tiling, torch.empty_like(dx)),
        )
    run(tiling, dx)
    return dx


def compile_cases() -> list[CompileCase]:
    """Fused and add, every tiling, with the ranks and factor dtypes that bound registers and shared memory."""
    strides = ("stride_dy", "stride_weight", "stride_a", "stride_b", "stride_mask", "stride_tiles", "stride_dx")
    return compile_cases_of(
        masked_lora_input_gradient_kernel,
        "masked_lora_input_gradient",
        pointers=("dy", "weight", "dx"),
        integers=("T", "N", "K", "R", *strides),
        divisible=("N", "K", "stride_dy", "stride_weight", "stride_a", "stride_dx"),
        candidates=candidate_tilings,
        flags={},
    )
