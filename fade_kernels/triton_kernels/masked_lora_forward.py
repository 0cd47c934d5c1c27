"""Masked-LoRA linear forward: y = x W^T + x Delta^T + bias with Delta = s M o (B A), in one pass over x.

Both terms are accumulated in one fp32 accumulator. Delta is rounded to the activations' dtype by itself, relative to
its own size: rounding W + Delta instead would lose every |Delta| below half an ulp of W, which in bf16 is nearly all of
it in the first hundreds of training steps.

The product is computed transposed, y^T = W x^T + Delta x^T with accumulator [BN, BT], because the tensor cores of sm_90
take only their left operand from registers, and that is where Delta is made: a rank-r product per tile, the bits of
the mask's words, a select. A tile whose words are all zero skips it.

`masked_lora_forward` does all of it. `add_masked_lora` adds x Delta^T to what a library GEMM wrote into y, for shapes
where that GEMM is faster than the first term here; it walks a list of the occupied tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fade_kernels.triton_kernels.blocks import any_nonzero, expand_rows, grouped_tile, product_by_rank_steps
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
def masked_lora_forward_kernel(
    x,
    weight,
    bias,
    lora_a,
    lora_b,
    mask_words,
    scale,
    tiles,
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
    stride_tiles,
    stride_y,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP_T: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    SKIP: tl.constexpr,
    SCALE_POINTER: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    i_t, i_n = grouped_tile(tl.program_id(0), tl.cdiv(T, BT), tl.cdiv(N, BN), GROUP_T)
    if ADD:
        steps = tl.load(counts + i_n)
        if steps == 0:
            return  # y stays as the library GEMM left it
        p_tile = tiles + i_n.to(tl.int64) * stride_tiles
        i_k = tl.load(p_tile)
    else:
        steps = tl.cdiv(K, BK)
        i_k = 0
    o_t = i_t * BT + tl.arange(0, BT)
    o_n = i_n * BN + tl.arange(0, BN)
    o_r = tl.arange(0, BR)
    m_t = o_t < T
    m_n = o_n < N
    m_r = o_r < R
    WORDS = tl.cdiv(K, 32)
    p_x = x + o_t.to(tl.int64)[None, :] * stride_x
    p_weight = weight + o_n.to(tl.int64)[:, None] * stride_weight
    p_a = lora_a + o_r.to(tl.int64)[:, None] * stride_a
    p_b = lora_b + o_n.to(tl.int64)[:, None] * stride_b + o_r[None, :]
    p_mask = mask_words + o_n.to(tl.int64)[:, None] * stride_mask
    b_scale = tl.load(scale) if SCALE_POINTER else scale
    if not RANK_STEPS:
        b_b = tl.load(p_b, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BN, BR]

    b_acc = tl.zeros((BN, BT), dtype=tl.float32)
    for i_step in range(0, steps):
        o_k = i_k * BK + tl.arange(0, BK)
        o_word = i_k * (BK // 32) + tl.arange(0, BK // 32)
        m_k = o_k < K
        b_x = tl.load(p_x + o_k[:, None], mask=m_k[:, None] & m_t[None, :], other=0.0)  # [BK, BT]
        m_word = m_n[:, None] & (o_word < WORDS)[None, :]
        b_words = tl.load(p_mask + o_word[None, :], mask=m_word, other=0)  # [BN, BK/32]
        if not RANK_STEPS:
            b_a = tl.load(p_a + o_k[None, :], mask=m_r[:, None] & m_k[None, :], other=0.0)  # [BR, BK]
        if HAS_WEIGHT:
            b_weight = tl.load(p_weight + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)  # [BN, BK]
            # [BN, BK] @ [BK, BT] -> [BN, BT]
            b_acc = tl.dot(b_weight, b_x, b_acc, input_precision=INPUT_PRECISION)
        occupied = True
        if SKIP:
            occupied = any_nonzero(b_words)
        if occupied:
            if RANK_STEPS:
                b_product = product_by_rank_steps(
                    p_b, p_a + o_k[None, :], 1, stride_a, m_n, m_k, R, BN, BK, BR, INPUT_PRECISION
                )  # [BN, BK]
            else:
                b_product = tl.dot(b_b, b_a, input_precision=INPUT_PRECISION)  # [BN, BR] @ [BR, BK] -> [BN, BK]
            b_delta = tl.where(expand_rows(b_words, BN, BK) != 0, b_product * b_scale, 0.0)  # [BN, BK]
            # [BN, BK] @ [BK, BT] -> [BN, BT]
            b_acc = tl.dot(b_delta.to(x.dtype.element_ty), b_x, b_acc, input_precision=INPUT_PRECISION)
        if ADD:
            # One tile ahead, so that the loads of the next step do not wait for their own address.
            i_k = tl.load(p_tile + tl.minimum(i_step + 1, steps - 1))
        else:
            i_k += 1
    if HAS_BIAS:
        b_acc += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]

    p_y = y + o_t.to(tl.int64)[None, :] * stride_y + o_n[:, None]
    m_y = m_n[:, None] & m_t[None, :]
    if ADD:
        b_acc += tl.load(p_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y, b_acc.to(y.dtype.element_ty), mask=m_y)


# The default for large T, its rivals, then small T. Two blocks of four warps on a multiprocessor hide
# each other's rank product; on sm_80 the tilings of eight warps spill.
TILINGS: tuple[Tiling, ...] = (
    Tiling({"BT": 128, "BN": 64, "BK": 64}, num_warps=4, num_stages=3),
    Tiling({"BT": 128, "BN": 128, "BK": 64}, num_warps=8, num_stages=3),
    Tiling({"BT": 64, "BN": 64, "BK": 64}, num_warps=4, num_stages=4),
    Tiling({"BT": 16, "BN": 64, "BK": 64}, num_warps=4, num_stages=4),
)
"""16-bit activations, ranks up to 32."""

WIDE_RANK_TILINGS: tuple[Tiling, ...] = (
    Tiling({"BT": 128, "BN": 64, "BK": 64}, num_warps=4, num_stages=2),
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


def default_tiling(dtype: torch.dtype, T: int, N: int, K: int, R: int, input_precision: str = "ieee") -> Tiling:
    """The tiling of a launch that nobody measured: by T, and by whether there are tiles enough for every processor."""
    candidates = candidate_tilings(dtype, R, input_precision)
    if T <= 32:
        return min(candidates, key=lambda tiling: tiling.blocks["BT"])
    if candidates is TILINGS and triton.cdiv(T, 128) * triton.cdiv(N, 64) < 128:
        return TILINGS[2]
    return candidates[0]


def _launch(
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
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
    """y = x W^T + x Delta^T + bias, or with `occupied` tiles y += x Delta^T."""
    T, K = x.shape
    N, R = lora_b.shape
    scale_argument, scale_pointer = as_scale(scale)
    # Pointers of absent arguments are never read.
    tiles, counts = occupied or (mask_words, mask_words)
    grid = (triton.cdiv(T, tiling.blocks["BT"]) * triton.cdiv(N, tiling.blocks["BN"]),)
    with on_device(x):
        masked_lora_forward_kernel[grid](
            x,
            x if weight is None else weight,
            x if bias is None else bias,
            lora_a,
            lora_b,
            mask_words,
            scale_argument,
            tiles,
            counts,
            y,
            T,
            N,
            K,
            R,
            x.stride(0),
            0 if weight is None else weight.stride(0),
            lora_a.stride(0),
            lora_b.stride(0),
            mask_words.stride(0),
            tiles.stride(0),
            y.stride(0),
            **tiling.blocks,
            **precision_constants(x.dtype, R, input_precision),
            GROUP_T=GROUP_T,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            ADD=occupied is not None,
            SKIP=skip_empty and occupied is None,
            SCALE_POINTER=scale_pointer,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )


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
    skip_empty: bool = True,
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
        skip_empty: test each tile of the mask and skip the delta of empty ones; False pays where none is empty.

    Raises:
        TypeError, ValueError: element types, ranks and precisions the kernel does not take.
    """
    N, R = lora_b.shape
    T, K = x.shape
    check_arguments(R, input_precision, x=x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, out=out)
    y = x.new_empty((T, N)) if out is None else out
    check_output("out", y, (T, N), x.dtype)
    if y.numel() == 0:
        return y
    lora_a, lora_b = as_factors(lora_a, lora_b)
    x, mask_words = with_unit_stride(x), with_unit_stride(mask_words)
    weight = None if weight is None else with_unit_stride(weight)
    bias = None if bias is None else bias.contiguous()

    def run(tiling: Tiling) -> None:
        delta = (lora_a, lora_b, mask_words, scale)
        _launch(y, x, weight, bias, *delta, tiling, input_precision, skip_empty=skip_empty)

    if tiling is None:
        default = default_tiling(x.dtype, T, N, K, R, input_precision)
        candidates = candidate_tilings(x.dtype, R, input_precision)
        sizes = problem(x, lora_a, lora_b, input_precision)
        tiling = choose_tiling("masked_lora_forward", sizes, default, candidates, x.device, run)
    run(tiling)
    return y


def add_masked_lora(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    *,
    tiling: Tiling | None = None,
    input_precision: str = "ieee",
) -> Tensor:
    """y [T, N] += x (s M o (B A))^T in the occupied tiles, summed in fp32 and rounded once; returns y.

    A small launch lists the occupied tiles first. Rows of tiles without any bit are neither read nor written.

    Args:
        y: x W^T + bias, of x's dtype or fp32; stride 1 in the last dimension.
        x, lora_a, lora_b, mask_words, scale, tiling, input_precision: as for `masked_lora_forward`.

    Raises:
        TypeError, ValueError: as there; ValueError if y is strided in its last dimension.
    """
    N, R = lora_b.shape
    T, K = x.shape
    check_arguments(R, input_precision, y=y, x=x, lora_a=lora_a, lora_b=lora_b)
    check_output("y", y, (T, N), x.dtype)
    if y.numel() == 0 or K == 0:
        return y
    lora_a, lora_b = as_factors(lora_a, lora_b)
    x, mask_words = with_unit_stride(x), with_unit_stride(mask_words)

    def run(tiling: Tiling, y: Tensor) -> None:
        occupied = occupied_tiles(mask_words, tiling.blocks["BN"], tiling.blocks["BK"], along="k")
        _launch(y, x, None, None, lora_a, lora_b, mask_words, scale, tiling, input_precision, occupied=occupied)

    if tiling is None:
        default = default_tiling(x.dtype, T, N, K, R, input_precision)
        candidates = candidate_tilings(x.dtype, R, input_precision)
        sizes = problem(x, lora_a, lora_b, input_precision)
        # A measurement adds many times, so not into y.
        tiling = choose_tiling(
            "add_masked_lora", sizes, default, candidates, x.device, lambda tiling: run(tiling, torch.empty_like(y))
        )
    run(tiling, y)
    return y


def compile_cases() -> list[CompileCase]:
    """Fused and add, every tiling, with the ranks and factor dtypes that bound registers and shared memory."""
    strides = ("stride_x", "stride_weight", "stride_a", "stride_b", "stride_mask", "stride_tiles", "stride_y")
    return compile_cases_of(
        masked_lora_forward_kernel,
        "masked_lora_forward",
        pointers=("x", "weight", "bias", "y"),
        integers=("T", "N", "K", "R", *strides),
        divisible=("N", "K", "stride_x", "stride_weight", "stride_a", "stride_y"),
        candidates=candidate_tilings,
        flags={"HAS_BIAS": True},
    )
