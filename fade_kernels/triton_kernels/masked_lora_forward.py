"""Masked-LoRA linear forward: y = x W^T + x Delta^T + bias with Delta = s M o (B A), in one pass over x.

Both terms are accumulated in one fp32 accumulator. Delta is rounded to the activations' dtype by itself, relative to
its own size: rounding W + Delta instead would lose every |Delta| below half an ulp of W, which in bf16 is nearly all of
it in the first hundreds of training steps.

The product is computed transposed, y^T = W x^T + Delta x^T with accumulator [BN, BT], because the tensor cores of sm_90
take only their left operand from registers, and that is where Delta is made: a rank-r product per tile, the bits of
the mask's words, a select. Tiles of the mask without any bit are left out by a list (`masked_lora_launch`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fade_kernels.triton_kernels.blocks import column_bits, expand_rows, grouped_tile, product_by_rank_steps
from fade_kernels.triton_kernels.launch import CompileCase, Tiling, ceil_div
from fade_kernels.triton_kernels.masked_lora_launch import LARGE, LinearKernel, MaskForm, compile_cases_of


@triton.jit(do_not_specialize=["T"])
def masked_lora_forward_kernel(
    x,
    weight,
    bias,
    lora_a,
    lora_b,
    mask_words,
    scale,
    order,
    counts,
    y,
    T,
    N,
    K,
    R,
    stride_x,
    stride_weight,
    stride_a,
    stride_b,
    stride_mask,
    stride_y,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP_T: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SKIP: tl.constexpr,
    SCALE_POINTER: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    APART: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    i_t, i_n = grouped_tile(tl.program_id(0), tl.cdiv(T, BT), tl.cdiv(N, BN), GROUP_T)
    TILES = tl.cdiv(K, BK)
    o_t = i_t * BT + tl.arange(0, BT)
    o_n = i_n * BN + tl.arange(0, BN)
    o_r = tl.arange(0, BR)
    m_t = o_t < T
    m_n = o_n < N
    m_r = o_r < R
    # Within a tile 32 bits hold every offset, and half the registers of a pointer. Rows of x and of the weight beyond
    # the last one are the last one again, which costs less than leaving them out; what comes of them is not written.
    p_x = x + (i_t * BT).to(tl.int64) * stride_x
    p_weight = weight + (i_n * BN).to(tl.int64) * stride_weight
    o_x = tl.minimum(tl.arange(0, BT), T - 1 - i_t * BT)[None, :] * stride_x
    o_row = tl.minimum(tl.arange(0, BN), N - 1 - i_n * BN)[:, None]
    o_weight = o_row * stride_weight
    o_a = o_r[:, None] * stride_a
    p_b = lora_b + o_n.to(tl.int64)[:, None] * stride_b + o_r[None, :]
    p_mask = mask_words + (i_n * BN).to(tl.int64) * stride_mask
    o_mask = o_row * stride_mask
    p_order = order + i_n.to(tl.int64) * TILES
    b_scale = tl.load(scale) if SCALE_POINTER else scale
    if not RANK_STEPS:
        b_b = tl.load(p_b, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BN, BR]

    # Both terms, in the tiles that hold any bit. Two accumulators, because a product whose sum the next one takes is
    # waited for within a step.
    steps = tl.load(counts + i_n) if SKIP else TILES
    i_k = tl.load(p_order) if SKIP else 0
    b_acc = tl.zeros((BN, BT), dtype=tl.float32)
    b_acc_delta = tl.zeros((BN, BT), dtype=tl.float32)
    for i_step in range(0, steps):
        o_k = i_k * BK + tl.arange(0, BK)
        o_word = i_k * (BK // 32) + tl.arange(0, BK // 32)
        m_k = o_k < K
        b_x = tl.load(p_x + (o_x + o_k[:, None]), mask=m_k[:, None], other=0.0)  # [BK, BT]
        m_word = (o_word * 32 < K)[None, :]
        b_words = tl.load(p_mask + (o_mask + o_word[None, :]), mask=m_word, other=0) & column_bits(o_word, K)[None, :]
        # The product of the factors first: its result is waited for, and the term of W is computed while Delta is made.
        if RANK_STEPS:
            b_product = product_by_rank_steps(
                p_b, lora_a + (o_a + o_k[None, :]), 1, stride_a, m_n, m_k, R, BN, BK, BR, INPUT_PRECISION
            )  # [BN, BK]
        else:
            b_a = tl.load(lora_a + (o_a + o_k[None, :]), mask=m_r[:, None] & m_k[None, :], other=0.0)  # [BR, BK]
            b_product = tl.dot(b_b, b_a, input_precision=INPUT_PRECISION)  # [BN, BR] @ [BR, BK] -> [BN, BK]
        if HAS_WEIGHT and not APART:
            b_weight = tl.load(p_weight + (o_weight + o_k[None, :]), mask=m_k[None, :], other=0.0)  # [BN, BK]
            # [BN, BK] @ [BK, BT] -> [BN, BT]
            b_acc = tl.dot(b_weight, b_x, b_acc, input_precision=INPUT_PRECISION)
        b_delta = tl.where(expand_rows(b_words, BN, BK) != 0, b_product * b_scale, 0.0)  # [BN, BK]
        # [BN, BK] @ [BK, BT] -> [BN, BT]
        b_acc_delta = tl.dot(b_delta.to(x.dtype.element_ty), b_x, b_acc_delta, input_precision=INPUT_PRECISION)
        # One tile ahead, so that the loads of the next step do not wait for their own address.
        i_k = tl.load(p_order + tl.minimum(i_step + 1, TILES - 1)) if SKIP else i_k + 1
    b_acc += b_acc_delta
    if HAS_WEIGHT and (SKIP or APART):
        # The term of W alone, in the others; in all of them where the terms are summed apart.
        for i_step in range(0 if APART else steps, TILES):
            i_k = i_step if APART else i_k
            o_k = i_k * BK + tl.arange(0, BK)
            m_k = o_k < K
            b_x = tl.load(p_x + (o_x + o_k[:, None]), mask=m_k[:, None], other=0.0)  # [BK, BT]
            b_weight = tl.load(p_weight + (o_weight + o_k[None, :]), mask=m_k[None, :], other=0.0)  # [BN, BK]
            # [BN, BK] @ [BK, BT] -> [BN, BT]
            b_acc = tl.dot(b_weight, b_x, b_acc, input_precision=INPUT_PRECISION)
            if not APART:
                i_k = tl.load(p_order + tl.minimum(i_step + 1, TILES - 1))
    if HAS_BIAS:
        b_acc += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]

    p_y = y + o_t.to(tl.int64)[None, :] * stride_y + o_n[:, None]
    tl.store(p_y, b_acc.to(y.dtype.element_ty), mask=m_n[:, None] & m_t[None, :])


# The default for large T, its rivals, then small T. Two blocks of four warps on a multiprocessor hide
# each other's rank product; on sm_80 the tilings of eight warps spill.
TILINGS: tuple[Tiling, ...] = (
    Tiling({"BT": 128, "BN": 64, "BK": 64}, num_warps=4, num_stages=3),
    Tiling({"BT": 128, "BN": 128, "BK": 64}, num_warps=8, num_stages=3),
    Tiling({"BT": 64, "BN": 64, "BK": 64}, num_warps=4, num_stages=4),
    Tiling({"BT": 16, "BN": 64, "BK": 64}, num_warps=4, num_stages=4),
    Tiling({"BT": 256, "BN": 128, "BK": 64, "APART": 1}, num_warps=8, num_stages=3),
)
"""16-bit activations, ranks up to 32."""

WIDE_RANK_TILINGS: tuple[Tiling, ...] = (
    Tiling({"BT": 128, "BN": 64, "BK": 32}, num_warps=4, num_stages=2),
    Tiling({"BT": 128, "BN": 128, "BK": 64}, num_warps=8, num_stages=2),
    Tiling({"BT": 16, "BN": 64, "BK": 64}, num_warps=4, num_stages=2),
)
"""16-bit activations, larger ranks, whose factors need the shared memory of a stage."""

TF32_TILINGS: tuple[Tiling, ...] = (
    Tiling({"BT": 128, "BN": 64, "BK": 32}, num_warps=4, num_stages=3),
    Tiling({"BT": 16, "BN": 64, "BK": 32}, num_warps=4, num_stages=3),
)

WIDE_RANK_TF32_TILINGS: tuple[Tiling, ...] = (
    Tiling({"BT": 128, "BN": 64, "BK": 32}, num_warps=4, num_stages=2),
    Tiling({"BT": 16, "BN": 64, "BK": 32}, num_warps=4, num_stages=2),
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
    if candidates is TILINGS and ceil_div(T, 128) * ceil_div(N, 64) < 64:
        return TILINGS[2]
    if candidates is TILINGS and T >= 1024 and (N * K >= LARGE or form == "sparse"):
        return TILINGS[4]
    return candidates[0]


KERNEL = LinearKernel(masked_lora_forward_kernel, "k", candidate_tilings, default_tiling)


def masked_lora_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
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
    """y [T, N] = x W^T + x (s M o (B A))^T + bias in one launch.

    Args:
        x: [T, K] fp32, fp16 or bf16; rows may be strided.
        weight: [N, K] in x's dtype, or None for the delta's term alone.
        bias: [N], or None.
        lora_a: [r, K] in any of the dtypes, r from 1 to 128.
        lora_b: [N, r].
        mask_words: int32 [N, ceil(K/32)].
        scale: 0-d; on the device it is read there.
        out: [T, N] to write, of x's dtype or fp32; None: new, in x's dtype.
        tiling: None: `default_tiling`, or measured (`tuning`).
        input_precision: of fp32 products: "ieee" or "tf32".
        form: what is known of the mask's tiles. "mixed": the delta is left out of those without any bit, by a list that
            is kept with the mask; "sparse": likewise, and they are most; "full": nearly all have one, so no list pays.

    Raises:
        TypeError, ValueError: element types, ranks and precisions the kernel does not take.
    """
    return KERNEL(out, x, weight, bias, lora_a, lora_b, mask_words, scale, tiling, input_precision, form)


def compile_cases() -> list[CompileCase]:
    """With and without a list of tiles, every tiling, with the ranks and factors that bound registers and memory."""
    strides = ("stride_x", "stride_weight", "stride_a", "stride_b", "stride_mask", "stride_y")
    return compile_cases_of(
        masked_lora_forward_kernel,
        "masked_lora_forward",
        pointers=("x", "weight", "bias", "y"),
        integers=("T", "N", "K", "R", *strides),
        divisible=("N", "K", "R", "stride_x", "stride_weight", "stride_a", "stride_b", "stride_y"),
        candidates=candidate_tilings,
        flags={"HAS_BIAS": True},
    )
