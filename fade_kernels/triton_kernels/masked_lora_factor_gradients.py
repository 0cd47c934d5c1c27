"""Factor gradients of masked LoRA from dY [T, N] and X [T, K], with no weight gradient in memory.

With G = dY^T X and Delta = s M o (B A):  dB = s (M o G) A^T  [N, R],  dA = s B^T (M o G)  [R, K].

A program owns one BN x BK tile of G and one range of T. It sums dY^T X over its rows in fp32 registers, drops what the
mask does not hold, and contracts the tile at once with the factors' rows and columns that meet it: two products with
R columns, against T for the tile itself. A tile with no set bit returns before its loop, so that work is occupancy
times a GEMM. The small products take s (M o G) and the factors rounded once: to bf16 where the activations are bf16
(2^-9 relative, and half the registers); to TF32 where they are fp16, whose range G can leave at either end; not at all
where `input_precision` is "ieee" and the activations are fp32.

Both contractions are linear in G, so T can be split and partial sums added. Each program writes its partial dA [R, BK]
and dB [BN, R] into a workspace and notes whether its tile is occupied; `reduce_partials_kernel` adds them in an order
that depends on shapes only, reading nothing of empty tiles. With `atomics`, programs add into the result directly:
no workspace and no second launch, but the last bits differ from run to run.

Traffic: dY is read K/BK times and X N/BN times (mostly from L2: the tiles of one range of T run together), the
workspace 4 R (BN + BK) bytes written and read per tile and split (R = 16: a quarter of G in fp32 for each split).
"""

from collections.abc import Hashable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fade_kernels.triton_kernels.blocks import any_nonzero, column_bits, expand_rows
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
)
from fade_kernels.triton_kernels.masked_lora_launch import MaskForm
from fade_kernels.triton_kernels.split import multiprocessors, split_rows, together

MOST_SPLITS = 32
"""More partial sums than this cost more to reduce than their programs save."""

REDUCE_BLOCKS = {"BP": 32, "BE": 128}
"""Partials and elements that a program of the reduction holds at a time."""


@triton.jit
def masked_lora_factor_gradients_kernel(
    dy,
    x,
    lora_a,
    lora_b,
    mask_words,
    scale,
    occupied,
    partial_a,
    partial_b,
    T,
    N,
    K,
    R,
    ROWS,
    stride_dy,
    stride_x,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    SCALE_POINTER: tl.constexpr,
    ATOMICS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    FACTOR_BF16: tl.constexpr,
    FACTOR_PRECISION: tl.constexpr,
):
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1)
    TILES_K = tl.cdiv(K, BK)
    i_n = i_tile // TILES_K
    i_k = i_tile % TILES_K
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = i_k * BK + tl.arange(0, BK)
    m_n = o_n < N
    m_k = o_k < K
    o_word = i_k * (BK // 32) + tl.arange(0, BK // 32)
    p_words = mask_words + o_n.to(tl.int64)[:, None] * tl.cdiv(K, 32) + o_word[None, :]
    b_words = tl.load(p_words, mask=m_n[:, None] & (o_word * 32 < K)[None, :], other=0)  # [BN, BK/32]
    b_words &= column_bits(o_word, K)[None, :]
    is_occupied = any_nonzero(b_words)
    if not ATOMICS:
        tl.store(occupied + i_tile, is_occupied.to(tl.int32), mask=i_split == 0)
    if not is_occupied:
        return

    # G = dY^T X over this program's rows.
    b_g = tl.zeros((BN, BK), dtype=tl.float32)
    end = tl.minimum((i_split + 1) * ROWS, T)
    for i_t in range(i_split * ROWS, end, BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = o_t < end
        p_dy = dy + o_t.to(tl.int64)[None, :] * stride_dy + o_n[:, None]
        p_x = x + o_t.to(tl.int64)[:, None] * stride_x + o_k[None, :]
        b_dy = tl.load(p_dy, mask=m_n[:, None] & m_t[None, :], other=0.0)  # [BN, BT]
        b_x = tl.load(p_x, mask=m_t[:, None] & m_k[None, :], other=0.0)  # [BT, BK]
        b_g = tl.dot(b_dy, b_x, b_g, input_precision=INPUT_PRECISION)  # [BN, BT] @ [BT, BK] -> [BN, BK]
    b_scale = tl.load(scale) if SCALE_POINTER else scale
    b_g = tl.where(expand_rows(b_words, BN, BK) != 0, b_g * b_scale, 0.0)  # [BN, BK]
    if FACTOR_BF16:
        b_g = b_g.to(dy.dtype.element_ty)

    i_partial = i_split.to(tl.int64) * tl.num_programs(0) + i_tile
    for i_r in range(0, R, BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < R
        m_ra = m_r[:, None] & m_k[None, :]
        m_rb = m_n[:, None] & m_r[None, :]
        b_a = tl.load(lora_a + o_r.to(tl.int64)[:, None] * K + o_k[None, :], mask=m_ra, other=0.0)  # [BR, BK]
        b_b = tl.load(lora_b + o_n.to(tl.int64)[:, None] * R + o_r[None, :], mask=m_rb, other=0.0)  # [BN, BR]
        # [BN, BK] @ [BK, BR] -> [BN, BR]
        b_db = tl.dot(b_g, tl.trans(b_a.to(b_g.dtype)), input_precision=FACTOR_PRECISION)
        # [BR, BN] @ [BN, BK] -> [BR, BK]
        b_da = tl.dot(tl.trans(b_b.to(b_g.dtype)), b_g, input_precision=FACTOR_PRECISION)
        if ATOMICS:
            p_da = partial_a + o_r.to(tl.int64)[:, None] * K + o_k[None, :]
            p_db = partial_b + o_n.to(tl.int64)[:, None] * R + o_r[None, :]
            tl.atomic_add(p_da, b_da, mask=m_ra, sem="relaxed")
            tl.atomic_add(p_db, b_db, mask=m_rb, sem="relaxed")
        else:
            p_da = partial_a + i_partial * (R * BK) + o_r[:, None] * BK + tl.arange(0, BK)[None, :]
            p_db = partial_b + i_partial * (R * BN) + tl.arange(0, BN)[:, None] * R + o_r[None, :]
            tl.store(p_da, b_da, mask=m_r[:, None])
            tl.store(p_db, b_db, mask=m_r[None, :])


@triton.jit
def sum_partials(
    partial, occupied, i_own, o_e, SIZE, OTHERS, SPLITS, TILES, stride_own, stride_other, BP: tl.constexpr
):
    """Elements o_e [BE] of the partials, SIZE elements each, of one row or column of tiles: the sum over its tiles and
    splits. An empty tile wrote none."""
    b_sum = tl.zeros_like(o_e).to(tl.float32)
    for i_p in range(0, OTHERS * SPLITS, BP):
        o_p = i_p + tl.arange(0, BP)
        m_p = o_p < OTHERS * SPLITS
        o_tile = i_own * stride_own + (o_p // SPLITS) * stride_other
        m_p &= tl.load(occupied + o_tile, mask=m_p, other=0) != 0
        o_partial = (o_p % SPLITS).to(tl.int64) * TILES + o_tile
        p_partial = partial + o_partial[:, None] * SIZE + o_e[None, :]
        b_partial = tl.load(p_partial, mask=m_p[:, None] & (o_e < SIZE)[None, :], other=0.0)  # [BP, BE]
        b_sum += tl.sum(b_partial, axis=0)
    return b_sum


@triton.jit
def reduce_partials_kernel(
    partial_a,
    partial_b,
    occupied,
    grad_a,
    grad_b,
    N,
    K,
    R,
    SPLITS,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    BE: tl.constexpr,
):
    """Programs (i, 0) sum partials of dA: BE elements of the columns of one tile; programs (i, 1) those of dB."""
    TILES_N = tl.cdiv(N, BN)
    TILES_K = tl.cdiv(K, BK)
    TILES = TILES_N * TILES_K
    if tl.program_id(1) == 0:
        chunks = tl.cdiv(R * BK, BE)
        i_k = tl.program_id(0) // chunks
        o_e = (tl.program_id(0) % chunks) * BE + tl.arange(0, BE)
        o_k = i_k * BK + o_e % BK
        if i_k < TILES_K:
            b_da = sum_partials(partial_a, occupied, i_k, o_e, R * BK, TILES_N, SPLITS, TILES, 1, TILES_K, BP)  # [BE]
            p_da = grad_a + (o_e // BK).to(tl.int64) * K + o_k
            tl.store(p_da, b_da.to(grad_a.dtype.element_ty), mask=(o_e < R * BK) & (o_k < K))
    else:
        chunks = tl.cdiv(BN * R, BE)
        i_n = tl.program_id(0) // chunks
        o_e = (tl.program_id(0) % chunks) * BE + tl.arange(0, BE)
        if i_n < TILES_N:
            b_db = sum_partials(partial_b, occupied, i_n, o_e, BN * R, TILES_K, SPLITS, TILES, TILES_K, 1, BP)  # [BE]
            p_db = grad_b + i_n.to(tl.int64) * (BN * R) + o_e
            tl.store(p_db, b_db.to(grad_b.dtype.element_ty), mask=(o_e < BN * R) & (i_n * BN + o_e // R < N))


# The rank is walked in tiles of BR = 16, so that registers do not grow with it.
TILINGS = {
    # In bf16 two programs of 128 x 128, or three of 128 x 64, fit into a multiprocessor (registers); 64 x 64 divides
    # SD 1.5's channels (320, 640) and is occupied less often, for twice the traffic of the first.
    "16bit": (
        Tiling({"BT": 64, "BN": 128, "BK": 128, "BR": 16}, num_warps=8, num_stages=3),
        Tiling({"BT": 64, "BN": 128, "BK": 64, "BR": 16}, num_warps=4, num_stages=3),
        Tiling({"BT": 64, "BN": 64, "BK": 64, "BR": 16}, num_warps=4, num_stages=3),
    ),
    "tf32": (Tiling({"BT": 32, "BN": 64, "BK": 64, "BR": 16}, num_warps=4, num_stages=3),),
    "ieee": (Tiling({"BT": 16, "BN": 64, "BK": 64, "BR": 16}, num_warps=8, num_stages=2),),
}
"""By the arithmetic of the large product; the first is the default, the last of 16 bits that of sparse masks."""


def default_tiling(dtype: torch.dtype, input_precision: str, form: MaskForm) -> Tiling:
    """Where at least half of the tiles are empty, small tiles leave more out than they lose (an H100, 10 % of the
    64 x 64 tiles: 0.46 of the library's whole product at 3072 channels, 0.77 in tiles of 128)."""
    tilings = TILINGS[arithmetic(dtype, input_precision)]
    return tilings[-1] if form == "sparse" else tilings[0]


def arithmetic(dtype: torch.dtype, input_precision: str) -> str:
    """The key of `TILINGS`."""
    return "16bit" if dtype.itemsize == 2 else input_precision


def masked_lora_factor_gradients(
    dy: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    *,
    splits: int | None = None,
    atomics: bool = False,
    tiling: Tiling | None = None,
    input_precision: str = "ieee",
    form: MaskForm = "mixed",
) -> tuple[Tensor, Tensor]:
    """dA = s B^T (M o dY^T X) [R, K] and dB = s (M o dY^T X) A^T [N, R], in the factors' dtypes.

    Args:
        dy, x: [T, N] and [T, K], fp32, fp16 or bf16, the same dtype; rows may be strided.
        lora_a, lora_b: [R, K] and [N, R], fp32, fp16 or bf16.
        mask_words: int32 [N, ceil(K/32)].
        scale: 0-d; read on the device where it lives there.
        splits: ranges that T is divided into; None: as many as fill the device.
        atomics: adds into fp32 results directly; the last bits then depend on the order of arrival.
        tiling: one of `TILINGS`; None: `default_tiling`.
        form: what is known of the mask's tiles; "sparse": most are empty.
        input_precision: of dY^T X where the activations are fp32: "ieee" or "tf32".
    """
    (rows, n), (rank, k) = dy.shape, lora_a.shape
    if 0 in (rows, n, k, rank):
        return lora_a.new_zeros(lora_a.shape), lora_b.new_zeros(lora_b.shape)
    dy, x = (t if t.stride(1) == 1 else t.contiguous() for t in (dy, x))
    mask_words = mask_words.contiguous()
    lora_a, lora_b = lora_a.contiguous(), lora_b.contiguous()
    scale_argument = as_scale(scale)

    def make() -> Plan:
        return _plan(dy, x, lora_a, lora_b, scale_argument, splits, atomics, tiling, input_precision, form)

    if tiling is None:
        key = (
            *(dy.shape, dy.stride(), dy.dtype, dy.device, x.stride()),
            *(lora_a.shape, lora_a.dtype, lora_b.dtype),
            *(scale_argument.__class__ is float, splits, atomics, input_precision, form),
        )
        plan = kept(_plans, key, make)
    else:
        plan = make()
    if not atomics:
        return plan(dy, x, lora_a, lora_b, mask_words, scale)
    with on_device(dy):
        grad_a, grad_b = (torch.zeros(f.shape, dtype=torch.float32, device=dy.device) for f in (lora_a, lora_b))
        plan.products(dy, x, lora_a, lora_b, mask_words, scale_argument, mask_words, grad_a, grad_b)
    return grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype)


def ready(
    dy: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    input_precision: str,
    form: MaskForm,
) -> "Plan | None":
    """What calls with arguments like these need no more than launch; None where something must be copied first."""
    plain = dy.stride(1) == x.stride(1) == 1 and all(t.is_contiguous() for t in (lora_a, lora_b, mask_words))
    if not plain or 0 in (*dy.shape, *lora_a.shape):
        return None
    return _plan(dy, x, lora_a, lora_b, as_scale(scale), None, False, None, input_precision, form)


class Plan(NamedTuple):
    """Both launches and the sizes of the workspace, for arguments alike: same sizes, strides and types."""

    products: Launch
    reduction: Launch
    tiles: int
    partial_a: int
    partial_b: int

    def __call__(
        self, dy: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dA and dB in the factors' dtypes."""
        with on_device(dy):
            device = dy.device
            occupied = torch.empty(self.tiles, dtype=torch.int32, device=device)
            partial_a = torch.empty(self.partial_a, dtype=torch.float32, device=device)
            partial_b = torch.empty(self.partial_b, dtype=torch.float32, device=device)
            grad_a, grad_b = torch.empty_like(lora_a), torch.empty_like(lora_b)
            self.products(dy, x, lora_a, lora_b, mask_words, as_scale(scale), occupied, partial_a, partial_b)
            self.reduction(partial_a, partial_b, occupied, grad_a, grad_b)
        return grad_a, grad_b


_plans: dict[Hashable, Plan] = {}


def _plan(
    dy: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor | float,
    splits: int | None,
    atomics: bool,
    tiling: Tiling | None,
    input_precision: str,
    form: MaskForm,
) -> Plan:
    """Launches for arguments of these types, sizes and strides."""
    (rows, n), (rank, k) = dy.shape, lora_a.shape
    tiling = tiling or default_tiling(dy.dtype, input_precision, form)
    tile_n, tile_k, step = (tiling.blocks[size] for size in ("BN", "BK", "BT"))
    tiles_n, tiles_k = ceil_div(n, tile_n), ceil_div(k, tile_k)
    tiles = tiles_n * tiles_k
    split = split_rows(
        rows, step, step, tiles, multiprocessors(dy.device), MOST_SPLITS, splits, side_by_side=together(tile_n * tile_k)
    )  # fmt: skip
    constants = {
        "SCALE_POINTER": isinstance(scale, Tensor),
        "ATOMICS": atomics,
        "INPUT_PRECISION": input_precision,
        "FACTOR_BF16": dy.dtype == torch.bfloat16,
        "FACTOR_PRECISION": factor_precision(dy.dtype, input_precision),
    }
    sizes = (rows, n, k, rank, split.rows, dy.stride(0), x.stride(0))
    chunks_a = ceil_div(rank * tile_k, REDUCE_BLOCKS["BE"]) * tiles_k
    chunks_b = ceil_div(rank * tile_n, REDUCE_BLOCKS["BE"]) * tiles_n
    reduction = Launch(
        reduce_partials_kernel,
        (max(chunks_a, chunks_b), 2),
        (n, k, rank, split.count),
        {"BN": tile_n, "BK": tile_k},
        Tiling(REDUCE_BLOCKS),
    )
    return Plan(
        Launch(masked_lora_factor_gradients_kernel, (tiles, split.count), sizes, constants, tiling),
        reduction,
        tiles,
        split.count * tiles * rank * tile_k,
        split.count * tiles * tile_n * rank,
    )


def factor_precision(dtype: torch.dtype, input_precision: str) -> str:
    """Precision of the small products with the factors."""
    return "ieee" if dtype == torch.float32 and input_precision == "ieee" else "tf32"


RANK_LOOP = "the loop over ranks, a step for each 16 of them, comes once after the main loop of T/64 steps"

ALLOWED = (Allowance("load", 1, RANK_LOOP), Allowance("wait", 2, RANK_LOOP))
"""Not of the main loop: in the loop over ranks B's 16-bit rows are loaded as they are, and its two products stored."""


def compile_cases() -> list[CompileCase]:
    """Every tiling with both ways of summing, and the reduction."""
    cases = []
    for dtype, precision in (
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.float16, ""),
        (torch.bfloat16, ""),
    ):
        element = TRITON_DTYPES[dtype]
        name = "tf32" if precision == "tf32" else element
        for tiling in TILINGS[arithmetic(dtype, precision)]:
            for atomics in (False, True):
                shape = "x".join(str(tiling.blocks[size]) for size in ("BN", "BK", "BT"))
                constants = {
                    **tiling.blocks,
                    "SCALE_POINTER": True,
                    "ATOMICS": atomics,
                    "INPUT_PRECISION": precision or "ieee",
                    "FACTOR_BF16": dtype == torch.bfloat16,
                    "FACTOR_PRECISION": factor_precision(dtype, precision),
                }
                activations = dict.fromkeys(("dy", "x", "lora_a", "lora_b"), f"*{element}")
                workspace = {"occupied": "*i32", "partial_a": "*fp32", "partial_b": "*fp32"}
                sizes = ("T", "N", "K", "R", "ROWS", "stride_dy", "stride_x")
                cases.append(
                    CompileCase(
                        name=f"masked_lora_factor_gradients {shape}{', atomics' * atomics}",
                        kernel=masked_lora_factor_gradients_kernel,
                        dtype=name,
                        signature={
                            **activations,
                            "mask_words": "*i32",
                            "scale": "*fp32",
                            **workspace,
                            **dict.fromkeys(sizes, "i32"),
                            **dict.fromkeys(constants, "constexpr"),
                        },
                        constants=constants,
                        tiling=tiling,
                        tensor_cores=name != "fp32",
                        divisible_by_16=("N", "K", "R", "ROWS", "stride_dy", "stride_x"),
                        allowed=ALLOWED,
                    )
                )
        if precision != "tf32":
            constants = {"BN": 128, "BK": 128, **REDUCE_BLOCKS}
            cases.append(
                CompileCase(
                    name="masked_lora_factor_gradients reduction",
                    kernel=reduce_partials_kernel,
                    dtype=name,
                    signature={
                        "partial_a": "*fp32",
                        "partial_b": "*fp32",
                        "occupied": "*i32",
                        "grad_a": f"*{element}",
                        "grad_b": f"*{element}",
                        **dict.fromkeys(("N", "K", "R", "SPLITS"), "i32"),
                        **dict.fromkeys(constants, "constexpr"),
                    },
                    constants=constants,
                    tiling=Tiling(REDUCE_BLOCKS),
                    tensor_cores=False,
                    divisible_by_16=("N", "K", "R"),
                )
            )
    return cases
