"""Factor gradients of masked LoRA from a weight gradient G = dY^T X [N, K] that a library's product has made.

    dB = s (M o G) A^T  [N, R],  dA = s B^T (M o G)  [R, K]

A program owns a strip: rows of G for dB, columns of G for dA. It walks the strip tile by tile, drops what the mask does
not hold, and adds a product with R columns to its result in fp32 registers, which is scaled and written once: no
partial sums, no second launch, and the same bits in every run. G is read twice, the second time mostly from L2, where
it has just been written. `masked_lora_factor_gradients` needs no G in memory; a library's product is the faster one
where a layer is large and its mask has bits everywhere.

The products take G as it is and the factors rounded to its dtype; in fp32 `input_precision` says how they round.
"""

from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fade_kernels.triton_kernels.blocks import column_bits, expand_rows
from fade_kernels.triton_kernels.launch import (
    TRITON_DTYPES,
    Allowance,
    CompileCase,
    Launch,
    Tiling,
    as_scale,
    ceil_div,
    kept,
    on_device,
    power_of_2_from,
)
from fade_kernels.triton_kernels.masked_lora_launch import MAX_RANK


@triton.jit
def masked_tile(
    gradient, mask_words, o_n, o_k, i_word, N, K, stride_g, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """M o G in rows o_n [BN] and columns o_k [BK], whose first word of the mask is i_word."""
    m_n = o_n < N
    o_word = i_word + tl.arange(0, BK // 32)
    p_words = mask_words + o_n.to(tl.int64)[:, None] * tl.cdiv(K, 32) + o_word[None, :]
    b_words = tl.load(p_words, mask=m_n[:, None] & (o_word * 32 < K)[None, :], other=0)  # [BN, BK/32]
    b_words &= column_bits(o_word, K)[None, :]
    p_g = gradient + o_n.to(tl.int64)[:, None] * stride_g + o_k[None, :]
    b_g = tl.load(p_g, mask=m_n[:, None] & (o_k < K)[None, :], other=0.0)  # [BN, BK]
    return tl.where(expand_rows(b_words, BN, BK) != 0, b_g, 0.0)


@triton.jit
def masked_gradient_contraction_kernel(
    gradient,
    lora_a,
    lora_b,
    mask_words,
    scale,
    grad_a,
    grad_b,
    N,
    K,
    R,
    stride_g,
    BS: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    SCALE_POINTER: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    i_strip = tl.program_id(0)
    STRIPS_N = tl.cdiv(N, BS)
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    b_scale = tl.load(scale) if SCALE_POINTER else scale
    if i_strip < STRIPS_N:
        o_n = i_strip * BS + tl.arange(0, BS)
        b_db = tl.zeros((BS, BR), dtype=tl.float32)
        for i_k in range(0, K, BC):
            o_k = i_k + tl.arange(0, BC)
            b_g = masked_tile(gradient, mask_words, o_n, o_k, i_k // 32, N, K, stride_g, BS, BC)
            p_a = lora_a + o_r.to(tl.int64)[:, None] * K + o_k[None, :]
            b_a = tl.load(p_a, mask=m_r[:, None] & (o_k < K)[None, :], other=0.0).to(b_g.dtype)  # [BR, BC]
            # [BS, BC] @ [BC, BR] -> [BS, BR]
            b_db = tl.dot(b_g, tl.trans(b_a), b_db, input_precision=INPUT_PRECISION)
        p_db = grad_b + o_n.to(tl.int64)[:, None] * R + o_r[None, :]
        tl.store(p_db, (b_db * b_scale).to(grad_b.dtype.element_ty), mask=(o_n < N)[:, None] & m_r[None, :])
    else:
        i_k = (i_strip - STRIPS_N) * BS
        o_k = i_k + tl.arange(0, BS)
        b_da = tl.zeros((BR, BS), dtype=tl.float32)
        for i_n in range(0, N, BC):
            o_n = i_n + tl.arange(0, BC)
            b_g = masked_tile(gradient, mask_words, o_n, o_k, i_k // 32, N, K, stride_g, BC, BS)
            p_b = lora_b + o_n.to(tl.int64)[:, None] * R + o_r[None, :]
            b_b = tl.load(p_b, mask=(o_n < N)[:, None] & m_r[None, :], other=0.0).to(b_g.dtype)  # [BC, BR]
            # [BR, BC] @ [BC, BS] -> [BR, BS]
            b_da = tl.dot(tl.trans(b_b), b_g, b_da, input_precision=INPUT_PRECISION)
        p_da = grad_a + o_r.to(tl.int64)[:, None] * K + o_k[None, :]
        tl.store(p_da, (b_da * b_scale).to(grad_a.dtype.element_ty), mask=m_r[:, None] & (o_k < K)[None, :])


TILINGS = {
    "16bit": (
        Tiling({"BS": 32, "BC": 128}, num_warps=4, num_stages=3),
        Tiling({"BS": 32, "BC": 64}, num_warps=4, num_stages=3),
        Tiling({"BS": 64, "BC": 64}, num_warps=4, num_stages=3),
    ),
    "tf32": (Tiling({"BS": 32, "BC": 64}, num_warps=4, num_stages=2),),
    "ieee": (Tiling({"BS": 32, "BC": 32}, num_warps=8, num_stages=2),),
}
"""By the arithmetic of the products; the first is the default. Strips are narrow so that there are enough of them:
a 1280 x 1280 layer has 80 of 32."""

MOST_RANKS = {"16bit": MAX_RANK, "tf32": MAX_RANK, "ieee": 64}
"""A product in plain arithmetic is unrolled; with 128 columns it does not fit the registers."""


class Plan(NamedTuple):
    """A launch for arguments alike: same sizes, strides and types."""

    launch: Launch

    def __call__(
        self, gradient: Tensor, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dA and dB in the factors' dtypes."""
        with on_device(gradient):
            grad_a, grad_b = torch.empty_like(lora_a), torch.empty_like(lora_b)
            self.launch(gradient, lora_a, lora_b, mask_words, as_scale(scale), grad_a, grad_b)
        return grad_a, grad_b


_plans: dict[Hashable, Plan] = {}


def contract_masked_gradient(
    gradient: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    *,
    tiling: Tiling | None = None,
    input_precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """dA = s B^T (M o G) [R, K] and dB = s (M o G) A^T [N, R], in the factors' dtypes.

    Args:
        gradient: G [N, K], fp32, fp16 or bf16; rows may be strided.
        lora_a, lora_b: [R, K] and [N, R] in any of the dtypes; R from 1 to 128.
        mask_words: int32 [N, ceil(K/32)].
        scale: 0-d; read on the device where it lives there.
        tiling: one of `TILINGS`; None: the first that fits the dtype.
        input_precision: of the products where G is fp32: "ieee" or "tf32".

    Raises:
        ValueError: a rank that the kernel does not take.
    """
    (n, k), rank = gradient.shape, lora_a.shape[0]
    arithmetic = "16bit" if gradient.dtype.itemsize == 2 else input_precision
    if not 1 <= rank <= MOST_RANKS[arithmetic]:
        raise ValueError(f"the kernel takes ranks from 1 to {MOST_RANKS[arithmetic]} in {arithmetic}, not {rank}")
    if 0 in (n, k):
        return torch.zeros_like(lora_a), torch.zeros_like(lora_b)
    gradient = gradient if gradient.stride(1) == 1 else gradient.contiguous()
    lora_a, lora_b, mask_words = lora_a.contiguous(), lora_b.contiguous(), mask_words.contiguous()
    scale_argument = as_scale(scale)
    number = scale_argument.__class__ is float

    def make() -> Plan:
        chosen = tiling or TILINGS[arithmetic][0]
        constants = {
            "BR": max(16, power_of_2_from(rank)),
            "SCALE_POINTER": not number,
            "INPUT_PRECISION": "tf32" if arithmetic == "16bit" else input_precision,
        }
        strips = ceil_div(n, chosen.blocks["BS"]) + ceil_div(k, chosen.blocks["BS"])
        sizes = (n, k, rank, gradient.stride(0))
        return Plan(Launch(masked_gradient_contraction_kernel, (strips,), sizes, constants, chosen))

    key = (
        *(gradient.shape, gradient.stride(), gradient.dtype, gradient.device),
        *(rank, lora_a.dtype, lora_b.dtype, number, input_precision),
    )
    plan = make() if tiling is not None else kept(_plans, key, make)
    return plan(gradient, lora_a, lora_b, mask_words, scale)


ALLOWED = (
    Allowance("load", 3, "G and its mask words are made into an operand in registers, and the factors are converted"),
    Allowance("wait", 1, "the one product of a step, R columns wide: the kernel is bound by memory"),
)


def compile_cases() -> list[CompileCase]:
    """Every tiling with a usual and the largest rank."""
    cases = []
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "")):
        element = TRITON_DTYPES[dtype]
        for tiling in TILINGS[precision or "16bit"]:
            for rank in (16, MOST_RANKS[precision or "16bit"]):
                constants = {
                    **tiling.blocks,
                    "BR": rank,
                    "SCALE_POINTER": True,
                    "INPUT_PRECISION": precision or "tf32",
                }
                cases.append(
                    CompileCase(
                        name=f"masked_gradient_contraction, r = {rank}",
                        kernel=masked_gradient_contraction_kernel,
                        dtype=precision if precision == "tf32" else element,
                        signature={
                            **dict.fromkeys(("gradient", "lora_a", "lora_b"), f"*{element}"),
                            "mask_words": "*i32",
                            "scale": "*fp32",
                            **dict.fromkeys(("grad_a", "grad_b"), f"*{element}"),
                            **dict.fromkeys(("N", "K", "R", "stride_g"), "i32"),
                            **dict.fromkeys(constants, "constexpr"),
                        },
                        constants=constants,
                        tiling=tiling,
                        tensor_cores=False,
                        divisible_by_16=("N", "K", "R", "stride_g"),
                        allowed=ALLOWED,
                    )
                )
    return cases
