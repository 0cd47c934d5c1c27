"""Effective weight W + s M o (B A), or the delta alone, in one pass; many layers in one launch.

For merging, for fp32 forwards by one library GEMM, and with stochastic rounding for 16-bit scratch weights in training.
A program owns one BN x BK tile: rank-R product of the factors' rows and columns in fp32, mask bits from words, one fp32
addition, one rounding. Where the tile's words are all zero there is no product, and in place there is nothing to do.
Traffic: the weight read and written once, 1/32 word per element and the factors beside it.

Stochastic rounding takes v to one of its two neighbours with probabilities that make the mean v: with d the bits of
fp32 that the 16-bit format lacks at v's magnitude, a uniform integer in [0, 2^d) is added to v's bits and the low d
bits are cleared; a carry runs into the exponent as it should. d is 16 for bf16, 13 for fp16 and one more for each power
of two below 2^-14; below 2^-24, fp16's smallest number, v becomes it with probability |v| / 2^-24. Representable
values, infinities and NaN stay. The integers are a hash of seed, layer and element: independent of tiling and device.

One launch for many layers reads a table of int64: addresses, sizes and first tile of each layer (`LayerTable`). A
program finds its layer by counting the first tiles that are not after it.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fade_kernels.mask_facts import capturing, first_places
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
    power_of_2_from,
)

TABLE_FIELDS = tl.constexpr(13)
"""Columns of a `LayerTable`: addresses of out, weight, A, B, mask words, scale; N, K, R, row strides of weight and out,
first tile, place among all layers of the call."""

SEEDS = 2**31
"""Seeds are taken modulo this."""


@triton.jit
def hash_bits(b_bits):
    """A bijection of uint32 in which every input bit changes every output bit about half the time."""
    b_bits = (b_bits ^ (b_bits >> 16)) * 0x7FEB352D
    b_bits = (b_bits ^ (b_bits >> 15)) * 0x846CA68B
    return b_bits ^ (b_bits >> 16)


@triton.jit
def round_stochastically(b_v, b_random, FP16: tl.constexpr):
    """fp32 -> fp32 that bf16 (or fp16) represents, by random bits (uint32) of the same shape."""
    b_bits = b_v.to(tl.uint32, bitcast=True)
    b_exponent = (b_bits >> 23) & 0xFF
    if FP16:
        b_dropped = 13 + tl.minimum(tl.maximum(113 - b_exponent.to(tl.int32), 0), 10)
        b_low = (1 << b_dropped).to(tl.uint32) - 1
    else:
        b_low = tl.full(b_bits.shape, 0xFFFF, dtype=tl.uint32)
    b_rounded = (b_bits + (b_random & b_low)) & (b_low ^ 0xFFFFFFFF)
    if FP16:
        # Of 2^-24, the fraction |v| 2^24 in units of 2^-24: the hash's upper 24 bits, exact in fp32.
        b_up = (b_random >> 8).to(tl.float32) < tl.abs(b_v) * 281474976710656.0
        b_least = tl.where(b_up, 0x33800000, 0).to(tl.uint32) | (b_bits & 0x80000000)
        b_rounded = tl.where(b_exponent < 103, b_least, b_rounded)
    b_rounded = tl.where(b_exponent == 255, b_bits, b_rounded)
    return b_rounded.to(tl.float32, bitcast=True)


@triton.jit
def effective_weight_tile(
    out,
    weight,
    lora_a,
    lora_b,
    mask_words,
    b_scale,
    key,
    i_tile,
    N,
    K,
    R,
    stride_weight,
    stride_out,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """One tile of one layer; `key` (uint32) seeds its random bits."""
    i_n = i_tile // tl.cdiv(K, BK)
    i_k = i_tile % tl.cdiv(K, BK)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = i_k * BK + tl.arange(0, BK)
    m_n = o_n < N
    m_k = o_k < K
    o_word = i_k * (BK // 32) + tl.arange(0, BK // 32)
    p_words = mask_words + o_n.to(tl.int64)[:, None] * tl.cdiv(K, 32) + o_word[None, :]
    b_words = tl.load(p_words, mask=m_n[:, None] & (o_word * 32 < K)[None, :], other=0)  # [BN, BK/32]
    b_words &= column_bits(o_word, K)[None, :]
    is_occupied = any_nonzero(b_words)
    if is_occupied or not IN_PLACE:
        m_out = m_n[:, None] & m_k[None, :]
        if HAS_WEIGHT:
            p_weight = weight + o_n.to(tl.int64)[:, None] * stride_weight + o_k[None, :]
            b_out = tl.load(p_weight, mask=m_out, other=0.0).to(tl.float32)  # [BN, BK]
        else:
            b_out = tl.zeros((BN, BK), dtype=tl.float32)
        if is_occupied:
            b_delta = tl.zeros((BN, BK), dtype=tl.float32)
            for i_r in range(0, R, BR):
                o_r = i_r + tl.arange(0, BR)
                m_r = o_r < R
                p_a = lora_a + o_r.to(tl.int64)[:, None] * K + o_k[None, :]
                p_b = lora_b + o_n.to(tl.int64)[:, None] * R + o_r[None, :]
                b_a = tl.load(p_a, mask=m_r[:, None] & m_k[None, :], other=0.0)  # [BR, BK]
                b_b = tl.load(p_b, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [BN, BR]
                # [BN, BR] @ [BR, BK] -> [BN, BK]
                b_delta = tl.dot(b_b, b_a, b_delta, input_precision="ieee")
            b_out += tl.where(expand_rows(b_words, BN, BK) != 0, b_delta * b_scale, 0.0)  # [BN, BK]
        if STOCHASTIC:
            o_element = o_n.to(tl.uint32)[:, None] * K + o_k.to(tl.uint32)[None, :]
            b_random = hash_bits(hash_bits(o_element) + hash_bits(key))  # [BN, BK]
            b_out = round_stochastically(b_out, b_random, out.dtype.element_ty == tl.float16)
        p_out = out + o_n.to(tl.int64)[:, None] * stride_out + o_k[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_out)


@triton.jit(do_not_specialize=["seed"])
def effective_weight_kernel(
    out,
    weight,
    lora_a,
    lora_b,
    mask_words,
    scale,
    seed,
    N,
    K,
    R,
    stride_weight,
    stride_out,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SCALE_POINTER: tl.constexpr,
):
    b_scale = tl.load(scale) if SCALE_POINTER else scale
    effective_weight_tile(
        out, weight, lora_a, lora_b, mask_words, b_scale, seed.to(tl.uint32), tl.program_id(0), N, K, R,
        stride_weight, stride_out, BN, BK, BR, HAS_WEIGHT, IN_PLACE, STOCHASTIC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["seed", "layer"])
def effective_weight_from_values_kernel(
    out,
    weight,
    values,
    mask_words,
    places,
    scale,
    seed,
    layer,
    N,
    K,
    COUNT,
    stride_weight,
    stride_out,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SCALE_POINTER: tl.constexpr,
):
    TILES_K = tl.cdiv(K, BK)
    i_n = tl.program_id(0) // TILES_K
    i_k = tl.program_id(0) % TILES_K
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = i_k * BK + tl.arange(0, BK)
    m_n = o_n < N
    m_out = m_n[:, None] & (o_k < K)[None, :]
    o_word = i_k * (BK // 32) + tl.arange(0, BK // 32)
    p_words = mask_words + o_n.to(tl.int64)[:, None] * tl.cdiv(K, 32) + o_word[None, :]
    b_words = tl.load(p_words, mask=m_n[:, None] & (o_word * 32 < K)[None, :], other=0)  # [BN, BK/32]
    b_bits = expand_rows(b_words & column_bits(o_word, K)[None, :], BN, BK)
    b_first = tl.load(places + o_n.to(tl.int64) * TILES_K + i_k, mask=m_n, other=0)  # [BN]
    o_value = b_first[:, None] + tl.cumsum(b_bits, axis=1) - b_bits  # [BN, BK]
    m_value = (b_bits != 0) & (o_value < COUNT)
    b_scale = tl.load(scale) if SCALE_POINTER else scale
    b_values = tl.load(values + o_value, mask=m_value, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        p_weight = weight + o_n.to(tl.int64)[:, None] * stride_weight + o_k[None, :]
        b_out = tl.load(p_weight, mask=m_out, other=0.0).to(tl.float32)  # [BN, BK]
    else:
        b_out = tl.zeros((BN, BK), dtype=tl.float32)
    b_out += tl.where(m_value, b_values * b_scale, -0.0)  # -0.0 leaves every number its bits
    if STOCHASTIC:
        o_element = o_n.to(tl.uint32)[:, None] * K + o_k.to(tl.uint32)[None, :]
        key = hash_bits(layer.to(tl.uint32)) + seed.to(tl.uint32)
        b_random = hash_bits(hash_bits(o_element) + hash_bits(key))  # [BN, BK]
        b_out = round_stochastically(b_out, b_random, out.dtype.element_ty == tl.float16)
    p_out = out + o_n.to(tl.int64)[:, None] * stride_out + o_k[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_out)


@triton.jit
def load_field(p_row, i_field: tl.constexpr, ALIGNED: tl.constexpr):
    """An int64 of the table; ALIGNED: known to be a multiple of 16, which is what lets loads be 16 bytes wide."""
    field = tl.load(p_row + i_field)
    return tl.multiple_of(field, [16]) if ALIGNED else field


@triton.jit
def load_pointer(p_row, i_field: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address of the table as a pointer to TYPE."""
    pointer = tl.load(p_row + i_field).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, [16]) if ALIGNED else pointer


@triton.jit(do_not_specialize=["seed"])
def effective_weights_kernel(
    table,
    seed,
    LAYERS,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BL: tl.constexpr,
    OUT_TYPE: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    FACTOR_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    o_layer = tl.arange(0, BL)
    p_first = table + o_layer * TABLE_FIELDS + 11
    b_first = tl.load(p_first, mask=o_layer < LAYERS, other=0x7FFFFFFF)  # [BL]
    i_layer = tl.sum((b_first <= tl.program_id(0)).to(tl.int32), axis=0) - 1
    p_row = table + i_layer * TABLE_FIELDS
    key = hash_bits(tl.load(p_row + 12).to(tl.uint32)) + seed.to(tl.uint32)
    effective_weight_tile(
        load_pointer(p_row, 0, OUT_TYPE, ALIGNED),
        load_pointer(p_row, 1, WEIGHT_TYPE, ALIGNED),
        load_pointer(p_row, 2, FACTOR_TYPE, ALIGNED),
        load_pointer(p_row, 3, FACTOR_TYPE, ALIGNED),
        load_pointer(p_row, 4, tl.int32, ALIGNED),
        tl.load(load_pointer(p_row, 5, tl.float32, False)),
        key,
        tl.program_id(0) - tl.load(p_row + 11).to(tl.int32),
        load_field(p_row, 6, False).to(tl.int32),
        load_field(p_row, 7, ALIGNED).to(tl.int32),
        load_field(p_row, 8, False).to(tl.int32),
        load_field(p_row, 9, ALIGNED),
        load_field(p_row, 10, ALIGNED),
        BN,
        BK,
        BR,
        HAS_WEIGHT,
        IN_PLACE,
        STOCHASTIC,
    )


TILINGS = (Tiling({"BN": 64, "BK": 32, "BR": 16}, num_warps=4, num_stages=2),)
"""The first is the default: bound by memory, so that any tile of whole words and sectors does."""

TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Layer(NamedTuple):
    """One layer of `effective_weights`; the arguments of `effective_weight`."""

    weight: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    mask_words: Tensor
    scale: Tensor
    out: Tensor | None = None
    dtype: torch.dtype | None = None


class _Matrices(NamedTuple):
    """A layer as the kernel takes it, and its place among all.

    Rows of `out` and `weight` with stride 1 inside; factors contiguous and of one dtype.
    """

    index: int
    result: Tensor
    out: Tensor
    weight: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    mask_words: Tensor
    scale: Tensor

    @property
    def in_place(self) -> bool:
        out, weight = self.out, self.weight
        return (
            weight is not None
            and (out.data_ptr(), out.stride(), out.dtype) == (weight.data_ptr(), weight.stride(), weight.dtype)
        )  # fmt: skip


def _matrices(layer: Layer, index: int = 0) -> _Matrices:
    """Flattens convolutions, allocates the result and brings factors to one dtype."""
    weight, out = layer.weight, layer.out
    lora_a, lora_b = layer.lora_a.flatten(1), layer.lora_b.flatten(1)
    if lora_a.dtype != lora_b.dtype:
        lora_a, lora_b = lora_a.float(), lora_b.float()
    n, k = lora_b.shape[0], lora_a.shape[1]
    if out is None:
        dtype = layer.dtype or (lora_a.dtype if weight is None else weight.dtype)
        shape = (n, *layer.lora_a.shape[1:])
        out = torch.empty(shape, dtype=dtype, device=lora_a.device)
    elif layer.dtype not in (None, out.dtype):
        raise ValueError(f"out is {out.dtype}, but dtype is {layer.dtype}")
    try:
        rows = out.view(n, k)
    except RuntimeError:
        raise ValueError(f"out, strides {out.stride()}, must be a [{n}, {k}] matrix in memory") from None
    if k > 1 and rows.stride(1) != 1:
        raise ValueError(f"out, strides {out.stride()}, must have contiguous rows")
    if weight is not None:
        weight = weight.reshape(n, k)
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
    factors = (lora_a.contiguous(), lora_b.contiguous())
    return _Matrices(index, out, rows, weight, *factors, layer.mask_words.contiguous(), layer.scale)


def effective_weight(
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    stochastic: bool = False,
    seed: int = 0,
    tiling: Tiling | None = None,
) -> Tensor:
    """W + s M o (B A), added in fp32 and rounded once; without a weight the delta alone.

    Args:
        weight: [N, K] or a convolution's [N, C, kh, kw], fp32, fp16 or bf16, or None.
        lora_a, lora_b: [R, K] and [N, R] (or PEFT's shapes for a convolution), fp32, fp16 or bf16.
        mask_words: int32 [N, ceil(K/32)].
        scale: 0-d; read on the device where it lives there.
        out: where to write, which may be the weight itself; None: new memory.
        dtype: of the result; None: the one of `out`, the weight or, without either, the factors.
        stochastic: rounds to fp16 or bf16 so that the mean over seeds is the exact value.
        seed: modulo 2^31; the same seed gives the same bits.

    Raises:
        ValueError: `out` is no matrix with contiguous rows, or has another dtype than `dtype`.
    """
    layer = _matrices(Layer(weight, lora_a, lora_b, mask_words, scale, out, dtype))
    if layer.out.numel() == 0:
        return layer.result
    scale_argument = as_scale(scale)
    launch = _launch_of(layer, scale_argument, stochastic and layer.out.dtype.itemsize == 2, tiling)
    with on_device(layer.out):
        launch(
            layer.out,
            layer.out if layer.weight is None else layer.weight,
            layer.lora_a,
            layer.lora_b,
            layer.mask_words,
            scale_argument,
            seed % SEEDS,
        )
    return layer.result


_launches: dict[Hashable, Launch] = {}


class Ready(NamedTuple):
    """The launch of calls alike: same sizes, strides and types, nothing to be copied or converted first."""

    launch: Launch
    shape: tuple[int, int]
    dtype: torch.dtype

    def __call__(
        self, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor, seed: int
    ) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=lora_a.device)
        with on_device(out):
            self.launch(
                out, out if weight is None else weight, lora_a, lora_b, mask_words, as_scale(scale), seed % SEEDS
            )
        return out


def ready(
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    stochastic: bool,
) -> Ready | None:
    """What makes W + Delta of a linear layer, or Delta alone, in new memory; None where something must be made of the
    arguments first."""
    plain = lora_a.dtype == lora_b.dtype and all(t.is_contiguous() for t in (lora_a, lora_b, mask_words))
    if not plain or 0 in (*lora_a.shape, *lora_b.shape) or (weight is not None and weight.stride(1) != 1):
        return None
    out = torch.empty(lora_b.shape[0], lora_a.shape[1], dtype=dtype, device=lora_a.device)
    layer = _Matrices(0, out, out, weight, lora_a, lora_b, mask_words, scale)
    return Ready(_launch_of(layer, as_scale(scale), stochastic and dtype.itemsize == 2, None), tuple(out.shape), dtype)


def _launch_of(layer: _Matrices, scale: Tensor | float, rounded: bool, tiling: Tiling | None) -> Launch:
    """The launch for one layer of these types, sizes and strides."""
    base = layer.weight

    def make() -> Launch:
        (n, k), blocks = layer.out.shape, (tiling or TILINGS[0]).blocks
        return Launch(
            effective_weight_kernel,
            (ceil_div(n, blocks["BN"]) * ceil_div(k, blocks["BK"]),),
            (n, k, layer.lora_a.shape[0], 0 if base is None else base.stride(0), layer.out.stride(0)),
            {
                "HAS_WEIGHT": base is not None,
                "IN_PLACE": layer.in_place,
                "STOCHASTIC": rounded,
                "SCALE_POINTER": isinstance(scale, Tensor),
            },
            tiling or TILINGS[0],
        )

    if tiling is not None:
        return make()
    key = (
        *(layer.out.shape, layer.out.stride(), layer.out.dtype, layer.lora_a.shape[0], layer.lora_a.dtype),
        None if base is None else (base.stride(), base.dtype, layer.in_place),
        *(rounded, scale.__class__ is float),
    )
    return kept(_launches, key, make)


VALUES_TILINGS = (Tiling({"BN": 16, "BK": 128}, num_warps=4, num_stages=1),)
"""Rows of 256 bytes in 16 bits; a tile's first place in the values is kept with the mask, 1/8 of the mask's bytes."""


def effective_weight_from_values(
    out: Tensor,
    weight: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    *,
    stochastic: bool = False,
    seed: int = 0,
    layer: int = 0,
) -> None:
    """out = W + Delta with the delta given by its values, added in fp32 and rounded once, in one pass.

    Args:
        out: [N, K] or a convolution's [N, C, kh, kw], fp32, fp16 or bf16; may be the weight itself.
        weight: of out's shape, or None for the delta alone.
        values: [nnz], row-major, fp32, fp16 or bf16.
        mask_words: int32 [N, ceil(K/32)].
        scale: 0-d; read on the device where it lives there.
        stochastic, seed: as for `effective_weight`.
        layer: place among the layers of a call, each of which has random bits of its own.
    """
    if out.numel() == 0:
        return
    rows = out.flatten(1)  # a copy where rows have gaps
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    n, k = rows.shape
    base = None if weight is None else weight.flatten(1)
    base = base if base is None or base.stride(1) == 1 else base.contiguous()
    values, mask_words, scale_argument = values.contiguous(), mask_words.contiguous(), as_scale(scale)
    rounded = stochastic and out.dtype.itemsize == 2

    def make() -> Launch:
        (tiling,) = VALUES_TILINGS
        return Launch(
            effective_weight_from_values_kernel,
            (ceil_div(n, tiling.blocks["BN"]) * ceil_div(k, tiling.blocks["BK"]),),
            (n, k, values.numel(), 0 if base is None else base.stride(0), rows.stride(0)),
            {
                "HAS_WEIGHT": base is not None,
                "STOCHASTIC": rounded,
                "SCALE_POINTER": isinstance(scale_argument, Tensor),
            },
            tiling,
        )

    key = (
        *(rows.shape, rows.stride(), rows.dtype, values.shape, values.dtype),
        None if base is None else (base.stride(), base.dtype),
        *(rounded, scale_argument.__class__ is float),
    )
    places = first_places(mask_words, k, VALUES_TILINGS[0].blocks["BK"])
    launch = kept(_values_launches, key, make)
    with on_device(rows):
        launch(rows, rows if base is None else base, values, mask_words, places, scale_argument, seed % SEEDS, layer)
    if rows.data_ptr() != out.data_ptr():
        out.copy_(rows.view(out.shape))


_values_launches: dict[Hashable, Launch] = {}


class _Group(NamedTuple):
    """Layers that one launch serves: of the same dtypes and alignment."""

    table: Tensor
    nearest: Launch
    stochastic: Launch
    scales: list[Tensor]
    """To whose memory the table points: copies of those that were on the host."""


@dataclass(frozen=True)
class LayerTable:
    """Addresses and sizes of layers on their device, for repeated launches: build once, `effective_weights` often.

    Holds on to the tensors. They may change their values, a scale on the device too, but not move.
    """

    groups: list[_Group]
    layers: list[_Matrices]
    results: list[Tensor]

    @classmethod
    def build(cls, layers: Sequence[Layer], tiling: Tiling | None = None) -> "LayerTable":
        """One group, so one launch, for each combination of device, dtypes and alignment.

        Raises:
            RuntimeError: a CUDA graph is being captured, into which the table cannot be copied.
        """
        tiling = tiling or TILINGS[0]
        matrices = [_matrices(layer, index) for index, layer in enumerate(layers)]
        if any(capturing(layer.out) for layer in matrices):
            raise RuntimeError(
                "the effective weights of many layers are asked for first while a CUDA graph is captured, which cannot "
                "take the copy of their addresses to the device: call once before the capture, with the same tensors "
                "(results, weights, factors, masks and scales on the device)"
            )
        matrices = _with_scales_on_device(matrices)
        groups: dict[tuple[Any, ...], list[_Matrices]] = {}
        for layer in matrices:
            if layer.out.numel() > 0:
                weight = layer.weight if layer.weight is not None else layer.out
                types = (layer.out.dtype, weight.dtype, layer.lora_a.dtype, layer.weight is not None, layer.in_place)
                groups.setdefault((layer.out.device, *types, _aligned(layer)), []).append(layer)
        built = []
        for (device, out_type, weight_type, factor_type, has_weight, in_place, aligned), members in groups.items():
            rows, tiles = [], 0
            for layer in members:
                rows.append(_row(layer, tiles))
                n, k = layer.out.shape
                tiles += ceil_div(n, tiling.blocks["BN"]) * ceil_div(k, tiling.blocks["BK"])
            constants = {
                "BL": power_of_2_from(len(members)),
                "OUT_TYPE": TRITON_TYPES[out_type],
                "WEIGHT_TYPE": TRITON_TYPES[weight_type],
                "FACTOR_TYPE": TRITON_TYPES[factor_type],
                "ALIGNED": aligned,
                "HAS_WEIGHT": has_weight,
                "IN_PLACE": in_place,
            }
            nearest, stochastic = (
                Launch(
                    effective_weights_kernel,
                    (tiles,),
                    (len(members),),
                    constants | {"STOCHASTIC": rounded and out_type.itemsize == 2},
                    tiling,
                )
                for rounded in (False, True)
            )
            table = torch.tensor(rows, dtype=torch.int64).to(device)
            built.append(_Group(table, nearest, stochastic, [layer.scale for layer in members]))
        return cls(built, matrices, [layer.result for layer in matrices])


def _with_scales_on_device(layers: list[_Matrices]) -> list[_Matrices]:
    """The layers with scales that the kernel can read; those on the host go there in one copy for each device."""
    numbers: dict[torch.device, list[float]] = {}
    for layer in layers:
        if layer.scale.device != layer.out.device:
            numbers.setdefault(layer.out.device, []).append(float(layer.scale))
    copied = {device: iter(torch.tensor(values).to(device)) for device, values in numbers.items()}
    return [
        layer._replace(
            scale=layer.scale.to(torch.float32) if layer.scale.device == layer.out.device
            else next(copied[layer.out.device])
        )
        for layer in layers
    ]  # fmt: skip


def _row(layer: _Matrices, first_tile: int) -> list[int]:
    weight = layer.weight if layer.weight is not None else layer.out
    tensors = (layer.out, weight, layer.lora_a, layer.lora_b, layer.mask_words, layer.scale)
    sizes = (*layer.out.shape, layer.lora_a.shape[0], weight.stride(0), layer.out.stride(0))
    return [*(t.data_ptr() for t in tensors), *sizes, first_tile, layer.index]


def _aligned(layer: _Matrices) -> bool:
    row = _row(layer, 0)
    return all(row[i] % 16 == 0 for i in (0, 1, 2, 3, 4, 7, 9, 10))


_tables: dict[Hashable, list[_Group]] = {}
_captured_tables: dict[Hashable, list[_Group]] = {}
"""Those that a CUDA graph reads whenever it is replayed: never dropped."""

MOST_TABLES = 16
"""Tables kept: a training step has one or two, of about 100 bytes a layer."""


def _key_of(layers: Sequence[Layer]) -> Hashable:
    """Where and what the tensors are, and the value of a scale that is on the host and has been copied. A table holds
    no more, so that it is right for whatever tensors are there now."""
    return tuple(
        None if tensor is None
        else float(tensor) if tensor is layer.scale and _on_host(layer)
        else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        for layer in layers
        for tensor in (layer.out, layer.weight, layer.lora_a, layer.lora_b, layer.mask_words, layer.scale)
    )  # fmt: skip


def _on_host(layer: Layer) -> bool:
    """Whether its scale is on the host, though the layer is not."""
    return layer.scale.device != layer.lora_a.device


def _holds_no_copies(table: LayerTable, layers: Sequence[Layer]) -> bool:
    """Whether a table has the addresses of the layers' own tensors, and none of a copy that goes with this call."""
    names = ("out", "weight", "lora_a", "lora_b", "mask_words", "scale")
    pairs = (
        (getattr(a, name), getattr(b, name))
        for a, b in zip(layers, table.layers, strict=True)
        for name in names
        if name != "scale" or not _on_host(a)
    )
    return all(b is None or (a is not None and a.data_ptr() == b.data_ptr()) for a, b in pairs)


def effective_weights(layers: Sequence[Layer] | LayerTable, *, stochastic: bool = False, seed: int = 0) -> list[Tensor]:
    """`effective_weight` of every layer, in one launch where their dtypes agree; shapes and ranks may differ.

    Each layer has random bits of its own. The table that the launch reads is kept for the next call with the same
    memory; a `LayerTable` saves looking for it.

    Raises:
        RuntimeError: a CUDA graph is being captured, and no call before it had these tensors.
    """
    if isinstance(layers, LayerTable):
        return _launch(layers.groups, layers.results, stochastic, seed)
    key = _key_of(layers)
    groups = _tables.get(key)
    if groups is not None:
        if layers and capturing(layers[0].lora_a):
            _captured_tables[key] = groups
        return _launch(groups, [layer.out for layer in layers], stochastic, seed)
    table = LayerTable.build(layers)
    if _holds_no_copies(table, layers):
        if len(_tables) >= MOST_TABLES:
            _tables.pop(next(iter(_tables)), None)
        _tables[key] = table.groups
    return _launch(table.groups, table.results, stochastic, seed)


def _launch(groups: list[_Group], results: list[Tensor], stochastic: bool, seed: int) -> list[Tensor]:
    for group in groups:
        with on_device(group.table):
            (group.stochastic if stochastic else group.nearest)(group.table, seed % SEEDS)
    return results


RANK_LOOP = "a step or two: of a table's layer nothing is known when its code is made, so that B is loaded as it is"


def compile_cases() -> list[CompileCase]:
    """One layer and a table of 64, rounded to nearest and stochastically.

    fp32 without TF32: the delta is added to a weight that has fp32's digits.
    """
    cases = []
    for dtype, element in TRITON_DTYPES.items():
        for stochastic in (False, True) if dtype.itemsize == 2 else (False,):
            flags = {"HAS_WEIGHT": True, "IN_PLACE": False, "STOCHASTIC": stochastic}
            types = dict.fromkeys(("OUT_TYPE", "WEIGHT_TYPE", "FACTOR_TYPE"), TRITON_TYPES[dtype])
            pointers = dict.fromkeys(("out", "weight", "lora_a", "lora_b"), f"*{element}")
            sizes = dict.fromkeys(("seed", "N", "K", "R", "stride_weight", "stride_out"), "i32")
            one = CompileCase(
                name=f"effective_weight{', stochastic' * stochastic}",
                kernel=effective_weight_kernel,
                dtype=element,
                signature={**pointers, "mask_words": "*i32", "scale": "*fp32", **sizes},
                constants={**TILINGS[0].blocks, **flags, "SCALE_POINTER": True},
                tiling=TILINGS[0],
                tensor_cores=dtype != torch.float32,
                divisible_by_16=("N", "K", "R", "stride_weight", "stride_out"),
            )
            many = CompileCase(
                name=f"effective_weights, table{', stochastic' * stochastic}",
                kernel=effective_weights_kernel,
                dtype=element,
                signature={"table": "*i64", "seed": "i32", "LAYERS": "i32"},
                constants={**TILINGS[0].blocks, "BL": 64, **types, "ALIGNED": True, **flags},
                tiling=TILINGS[0],
                tensor_cores=dtype != torch.float32,
                allowed=(Allowance("load", 1, RANK_LOOP), Allowance("wait", 1, RANK_LOOP)),
            )
            given = CompileCase(
                name=f"effective_weight_from_values{', stochastic' * stochastic}",
                kernel=effective_weight_from_values_kernel,
                dtype=element,
                signature={
                    **dict.fromkeys(("out", "weight", "values"), f"*{element}"),
                    **dict.fromkeys(("mask_words", "places"), "*i32"),
                    "scale": "*fp32",
                    **dict.fromkeys(("seed", "layer", "N", "K", "COUNT", "stride_weight", "stride_out"), "i32"),
                },
                constants={
                    **VALUES_TILINGS[0].blocks,
                    **{"HAS_WEIGHT": True, "STOCHASTIC": stochastic, "SCALE_POINTER": True},
                },
                tiling=VALUES_TILINGS[0],
                tensor_cores=False,
                divisible_by_16=("N", "K", "stride_weight", "stride_out"),
            )
            for case in (one, many, given):
                signature = {**case.signature, **dict.fromkeys(case.constants, "constexpr")}
                cases.append(replace(case, signature=signature))
    return cases
