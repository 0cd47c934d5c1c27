"""Masked-LoRA linear input gradient: dX = dY W + dY Delta with Delta = s M o (B A), in one pass over dY.

The forward's scheme (`masked_lora_forward`) read the other way: dX^T = W^T dY^T + Delta^T dY^T with accumulator
[BK, BT] and the contraction over N. Delta^T is made as the left operand, from A^T B^T and the mask's words read as
[BK/32, BN] and expanded along their first dimension, so that nothing is transposed in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fade_kernels.triton_kernels.blocks import column_bits, expand_columns, grouped_tile, product_by_rank_steps
from fade_kernels.triton_kernels.launch import CompileCase, Tiling, ceil_div
from fade_kernels.triton_kernels.masked_lora_launch import LARGE, LinearKernel, MaskForm, compile_cases_of


@triton.jit(do_not_specialize=["T"])
def masked_lora_input_gradient_kernel(
    dy,
    weight,
    lora_a,
    lora_b,
    mask_words,
    scale,
    order,
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
    stride_dx,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP_T: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SKIP: tl.constexpr,
    SCALE_POINTER: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    APART: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    i_t, i_k = grouped_tile(tl.program_id(0), tl.cdiv(T, BT), tl.cdiv(K, BK), GROUP_T)
    TILES = tl.cdiv(N, BN)
    o_t = i_t * BT + tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    o_r = tl.arange(0, BR)
    o_word = i_k * (BK // 32) + tl.arange(0, BK // 32)
    m_t = o_t < T
    m_k = o_k < K
    m_r = o_r < R
    m_word = o_word * 32 < K
    b_columns = column_bits(o_word, K)[:, None]  # [BK/32, 1]
    # Within a tile 32 bits hold every offset, and half the registers of a pointer. Rows of dY beyond the last one are
    # the last one again, which costs less than leaving them out; they are not written.
    p_dy = dy + (i_t * BT).to(tl.int64) * stride_dy
    o_dy = tl.minimum(tl.arange(0, BT), T - 1 - i_t * BT)[None, :] * stride_dy
    o_weight = tl.arange(0, BN)[None, :] * stride_weight + o_k[:, None]
    o_b = tl.arange(0, BN)[None, :] * stride_b + o_r[:, None]
    o_mask = tl.arange(0, BN)[None, :] * stride_mask + o_word[:, None]
    p_a = lora_a + o_r.to(tl.int64)[None, :] * stride_a + o_k[:, None]
    p_order = order + i_k.to(tl.int64) * TILES
    b_scale = tl.load(scale) if SCALE_POINTER else scale
    if not RANK_STEPS:
        b_a = tl.load(p_a, mask=m_k[:, None] & m_r[None, :], other=0.0)  # [BK, BR]

    # Both terms, in the tiles that hold any bit. Two accumulators, because a product whose sum the next one takes is
    # waited for within a step.
    steps = tl.load(counts + i_k) if SKIP else TILES
    i_n = tl.load(p_order) if SKIP else 0
    b_acc = tl.zeros((BK, BT), dtype=tl.float32)
    b_acc_delta = tl.zeros((BK, BT), dtype=tl.float32)
    for i_step in range(0, steps):
        o_n = i_n * BN + tl.arange(0, BN)
        m_n = o_n < N
        first = (i_n * BN).to(tl.int64)
        p_b = lora_b + first * stride_b + o_b
        b_dy = tl.load(p_dy + (o_dy + o_n[:, None]), mask=m_n[:, None], other=0.0)  # [BN, BT]
        b_words = (
            tl.load(mask_words + first * stride_mask + o_mask, mask=m_word[:, None] & m_n[None, :], other=0) & b_columns
        )  # [BK/32, BN]
        # The product of the factors first: its result is waited for, and the term of W is computed while Delta is made.
        if RANK_STEPS:
            b_product = product_by_rank_steps(
                p_a, p_b, stride_a, 1, m_k, m_n, R, BK, BN, BR, INPUT_PRECISION
            )  # [BK, BN]
        else:
            b_b = tl.load(p_b, mask=m_r[:, None] & m_n[None, :], other=0.0)  # [BR, BN]
            b_product = tl.dot(b_a, b_b, input_precision=INPUT_PRECISION)  # [BK, BR] @ [BR, BN] -> [BK, BN]
        if HAS_WEIGHT and not APART:
            p_weight = weight + first * stride_weight + o_weight
            b_weight = tl.load(p_weight, mask=m_k[:, None] & m_n[None, :], other=0.0)  # [BK, BN]
            # [BK, BN] @ [BN, BT] -> [BK, BT]
            b_acc = tl.dot(b_weight, b_dy, b_acc, input_precision=INPUT_PRECISION)
        b_delta = tl.where(expand_columns(b_words, BN, BK) != 0, b_product * b_scale, 0.0)  # [BK, BN]
        # [BK, BN] @ [BN, BT] -> [BK, BT]
        b_acc_delta = tl.dot(b_delta.to(dy.dtype.element_ty), b_dy, b_acc_delta, input_precision=INPUT_PRECISION)
        # One tile ahead, so that the loads of the next step do not wait for their own address.
        i_n = tl.load(p_order + tl.minimum(i_step + 1, TILES - 1)) if SKIP else i_n + 1
    b_acc += b_acc_delta
    if HAS_WEIGHT and (SKIP or APART):
        # The term of W alone, in the others; in all of them where the terms are summed apart.
        for i_step in range(0 if APART else steps, TILES):
            i_n = i_step if APART else i_n
            o_n = i_n * BN + tl.arange(0, BN)
            m_n = o_n < N
            b_dy = tl.load(p_dy + (o_dy + o_n[:, None]), mask=m_n[:, None], other=0.0)  # [BN, BT]
            p_weight = weight + (i_n * BN).to(tl.int64) * stride_weight + o_weight
            b_weight = tl.load(p_weight, mask=m_k[:, None] & m_n[None, :], other=0.0)  # [BK, BN]
            # [BK, BN] @ [BN, BT] -> [BK, BT]
            b_acc = tl.dot(b_weight, b_dy, b_acc, input_precision=INPUT_PRECISION)
            if not APART:
                i_n = tl.load(p_order + tl.minimum(i_step + 1, TILES - 1))

    p_dx = dx + o_t.to(tl.int64)[None, :] * stride_dx + o_k[:, None]
    tl.store(p_dx, b_acc.to(dx.dtype.element_ty), mask=m_k[:, None] & m_t[None, :])


# The default for large T, its rivals, then small T: the forward's reasons.
TILINGS: tuple[Tiling, ...] = (
    Tiling({"BT": 128, "BN": 64, "BK": 64}, num_warps=4, num_stages=3),
    Tiling({"BT": 128, "BN": 64, "BK": 128}, num_warps=8, num_stages=3),
    Tiling({"BT": 64, "BN": 64, "BK": 64}, num_warps=4, num_stages=4),
    Tiling({"BT": 16, "BN": 64, "BK": 64}, num_warps=4, num_stages=4),
    Tiling({"BT": 256, "BN": 64, "BK": 128, "APART": 1}, num_warps=8, num_stages=3),
)
"""16-bit activations, ranks 16 and 32."""

UNEVEN_RANK_TILINGS: tuple[Tiling, ...] = (
    Tiling({"BT": 128, "BN": 32, "BK": 64}, num_warps=4, num_stages=4),
    Tiling({"BT": 128, "BN": 64, "BK": 128}, num_warps=8, num_stages=3),
    Tiling({"BT": 64, "BN": 64, "BK": 64}, num_warps=4, num_stages=3),
    Tiling({"BT": 16, "BN": 64, "BK": 64}, num_warps=4, num_stages=4),
    Tiling({"BT": 256, "BN": 64, "BK": 128, "APART": 1}, num_warps=8, num_stages=3),
)
"""The same with other ranks up to 32, whose B is copied in 4 bytes at a time: more addresses in registers."""

WIDE_RANK_TILINGS: tuple[Tiling, ...] = (
    Tiling({"BT": 128, "BN": 32, "BK": 64}, num_warps=4, num_stages=2),
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
    if rank > 32:
        return WIDE_RANK_TILINGS
    return TILINGS if rank % 16 == 0 else UNEVEN_RANK_TILINGS


def default_tiling(
    dtype: torch.dtype, T: int, N: int, K: int, R: int, input_precision: str = "ieee", form: MaskForm = "mixed"
) -> Tiling:
    """The tiling of a launch that nobody measures: by T, by whether there are tiles enough for every processor, and
    by where summing the two terms apart was faster on an H100 (`bench/results/tilings.json`).

    Args:
        form: "full", where the kernel gets no list of tiles; "sparse", where most tiles are known to be empty.
    """
    candidates = candidate_tilings(dtype, R, input_precision)
    if T <= 32:
        return min(candidates, key=lambda tiling: tiling.blocks["BT"])
    narrow = candidates in (TILINGS, UNEVEN_RANK_TILINGS)
    if narrow and ceil_div(T, 128) * ceil_div(K, 64) < 64:
        return candidates[2]
    if narrow and T >= 1024 and (N * K >= LARGE or form != "mixed"):
        return candidates[4]
    return candidates[0]


KERNEL = LinearKernel(masked_lora_input_gradient_kernel, "n", candidate_tilings, default_tiling)


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
    form: MaskForm = "mixed",
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
        form: what is known of the mask's tiles. "mixed": the delta is left out of those without any bit, by a list that
            is kept with the mask; "sparse": likewise, and they are most; "full": nearly all have one, so no list pays.

    Raises:
        TypeError, ValueError: element types, ranks and precisions the kernel does not take.
    """
    return KERNEL(out, dy, weight, None, lora_a, lora_b, mask_words, scale, tiling, input_precision, form)


def compile_cases() -> list[CompileCase]:
    """With and without a list of tiles, every tiling, with the ranks and factors that bound registers and memory."""
    strides = ("stride_dy", "stride_weight", "stride_a", "stride_b", "stride_mask", "stride_dx")
    return compile_cases_of(
        masked_lora_input_gradient_kernel,
        "masked_lora_input_gradient",
        pointers=("dy", "weight", "dx"),
        integers=("T", "N", "K", "R", *strides),
        divisible=("N", "K", "R", "stride_dy", "stride_weight", "stride_a", "stride_b", "stride_dx"),
        candidates=candidate_tilings,
        flags={},
    )
