"""The path for very sparse masks (about 1 %): work by set position, not by tile.

Delta is sparse with values v at the mask's positions (n_j, k_j): v_j = <B[n_j], A[:, k_j]>, or values learnt directly.

    y  += s x Delta^T      y[t, n]  += s sum over j in row n of v_j x[t, k_j]
    dx += s dy Delta       dx[t, k] += s sum over j in column k of v_j dy[t, n_j]
    g_j  = sum over t of dy[t, n_j] x[t, k_j]                     the weight's gradient at the positions alone
    dB[n] = s sum over j in row n of g_j A[:, k_j],               dA[:, k] = s sum over j in column k of g_j B[n_j]

Two forms cover all of them. A segment sum, out[i] += s sum over j in segment i of v_j table[index_j], adds up rows of a
table: of x^T over the mask's rows, dy^T over its columns, A^T, B. A sampled product, g_j = <left[n_j], right[k_j]>,
multiplies rows of two: B and A^T, dy^T and x^T. Both need rows that lie contiguous in memory: reading a column of x for
each position would use 2 of every 32 bytes fetched. So x and dy are transposed first, [T, K] -> [K, T], by a kernel of
its own, once a call; Triton has no indexed access to shared memory by which a block could transpose its rows in place.

Bytes beyond the frozen layer's forward and input gradient, in units of one activation of a square layer (2 T N bytes;
the frozen layer moves 4): transposing x and dy once each, 4; y and dx read and written, 4; x^T and dy^T read by the
sums, 2, and by the sampled product, 2. 12 in all, and 2 nnz T bytes from L2 in each of four reads: where the frozen
layer is bound by memory, the whole then takes about four times its time. The place of this path is where the frozen
layer is bound by arithmetic, T N^2 against T nnz. A kernel that keeps its rows of x in shared memory needs neither the
transposes nor x^T: 6 units.

No atomics: every sum has one owner and a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fade_kernels import reference
from fade_kernels.triton_kernels.launch import TRITON_DTYPES, CompileCase, Tiling, as_scale, on_device
from fade_kernels.triton_kernels.split import split_rows

MOST_SPLITS = 32
"""Ranges of T of a sampled product whose partial sums are added up."""


class Segments(NamedTuple):
    """A mask's positions grouped by row (CSR) or by column (CSC)."""

    starts: Tensor
    """Int32 [segments + 1]: positions starts[i]..starts[i + 1] - 1 belong to segment i."""
    index: Tensor
    """Int32 [nnz]: the column of each position (CSR) or its row (CSC)."""
    segment: Tensor
    """Int32 [nnz]: the segment of each position."""
    order: Tensor | None
    """Int32 [nnz]: where the position's value stands among the values, which are row-major; None: at its own place."""


def csr_from_words(mask_words: Tensor, columns: int) -> Segments:
    """The positions of a mask (int32 words [N, ceil(columns/32)]) by row. Waits for the device: once per mask."""
    mask = reference.unpack_mask(mask_words, columns)
    rows, index = mask.nonzero(as_tuple=True)
    return Segments(_starts(mask.sum(dim=1)), index.to(torch.int32), rows.to(torch.int32), None)


def csc_from_csr(csr: Segments, columns: int) -> Segments:
    """The same positions by column, rows ascending within each."""
    order = torch.sort(csr.index, stable=True).indices
    counts = torch.bincount(csr.index, minlength=columns)
    return Segments(_starts(counts), csr.segment[order], csr.index[order], order.to(torch.int32))


def _starts(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


@triton.jit
def transpose_kernel(x, out, T, K, stride_x, BT: tl.constexpr, BK: tl.constexpr):
    i_t = tl.program_id(0)
    i_k = tl.program_id(1)
    o_t = i_t.to(tl.int64) * BT + tl.arange(0, BT)
    o_k = i_k.to(tl.int64) * BK + tl.arange(0, BK)
    m_x = (o_t < T)[:, None] & (o_k < K)[None, :]
    b_x = tl.load(x + o_t[:, None] * stride_x + o_k[None, :], mask=m_x)  # [BT, BK]
    tl.store(out + o_k[:, None] * T + o_t[None, :], tl.trans(b_x), mask=tl.trans(m_x))


@triton.jit
def segment_sum_kernel(
    starts,
    index,
    order,
    values,
    table,
    scale,
    out,
    SEGMENTS,
    COLUMNS,
    stride_table,
    stride_segment,
    stride_column,
    BS: tl.constexpr,
    BC: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    ADD: tl.constexpr,
    SCALE_POINTER: tl.constexpr,
):
    """out[i, c] (+)= s sum over j in segment i of values[order_j] table[index_j, c], summed in fp32."""
    i_s = tl.program_id(0)
    i_c = tl.program_id(1)
    o_s = i_s * BS + tl.arange(0, BS)
    o_c = i_c.to(tl.int64) * BC + tl.arange(0, BC)
    m_s = o_s < SEGMENTS
    m_c = o_c < COLUMNS
    b_start = tl.load(starts + o_s, mask=m_s, other=0)  # [BS]
    b_length = tl.load(starts + o_s + 1, mask=m_s, other=0) - b_start  # [BS]
    longest = tl.max(b_length, axis=0)
    if ADD and longest == 0:
        return
    b_sum = tl.zeros((BS, BC), dtype=tl.float32)
    # The segments' first positions, their second ones ...: every row of the table is read along its columns.
    for i_j in range(0, longest):
        m_j = i_j < b_length
        o_j = b_start + i_j
        b_index = tl.load(index + o_j, mask=m_j, other=0)  # [BS]
        o_v = tl.load(order + o_j, mask=m_j, other=0) if HAS_ORDER else o_j
        b_v = tl.load(values + o_v, mask=m_j, other=0.0).to(tl.float32)  # [BS]
        p_table = table + b_index.to(tl.int64)[:, None] * stride_table + o_c[None, :]
        b_table = tl.load(p_table, mask=m_j[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BS, BC]
        b_sum += b_v[:, None] * b_table
    b_scale = tl.load(scale) if SCALE_POINTER else scale
    b_sum *= b_scale
    p_out = out + o_s.to(tl.int64)[:, None] * stride_segment + o_c[None, :] * stride_column
    m_out = m_s[:, None] & m_c[None, :]
    if ADD:
        b_sum += tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_out)


@triton.jit
def sampled_product_kernel(
    left,
    right,
    left_row,
    right_row,
    out,
    POSITIONS,
    COLUMNS,
    RANGE,
    stride_left,
    stride_right,
    BJ: tl.constexpr,
    BC: tl.constexpr,
):
    """out[i, j] = <left[left_row_j], right[right_row_j]> over range i of the columns, summed in fp32."""
    i_range = tl.program_id(1)
    o_j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    m_j = o_j < POSITIONS
    p_left = left + tl.load(left_row + o_j, mask=m_j, other=0).to(tl.int64)[:, None] * stride_left
    p_right = right + tl.load(right_row + o_j, mask=m_j, other=0).to(tl.int64)[:, None] * stride_right
    end = tl.minimum((i_range + 1) * RANGE, COLUMNS)
    b_sum = tl.zeros((BJ, BC), dtype=tl.float32)
    for i_c in range(i_range * RANGE, end, BC):
        o_c = i_c + tl.arange(0, BC)
        m_block = m_j[:, None] & (o_c < end)[None, :]
        b_left = tl.load(p_left + o_c[None, :], mask=m_block, other=0.0).to(tl.float32)  # [BJ, BC]
        b_right = tl.load(p_right + o_c[None, :], mask=m_block, other=0.0).to(tl.float32)  # [BJ, BC]
        b_sum += b_left * b_right
    tl.store(out + i_range.to(tl.int64) * POSITIONS + o_j, tl.sum(b_sum, axis=1), mask=m_j)


TILINGS = {
    "transpose": Tiling({"BT": 64, "BK": 64}, num_warps=4, num_stages=1),
    # 16 rows of y^T: of y's rows, the 32 bytes of a sector in 16 bits. 256 of its columns: 512 bytes of a row of x^T.
    "segment_sum": Tiling({"BS": 16, "BC": 256}, num_warps=8, num_stages=1),
    "segment_sum, factors": Tiling({"BS": 16, "BC": 16}, num_warps=2, num_stages=1),
    "sampled_product": Tiling({"BJ": 8, "BC": 512}, num_warps=8, num_stages=1),
    "sampled_product, factors": Tiling({"BJ": 64, "BC": 16}, num_warps=4, num_stages=1),
}
"""By kernel; "factors": where the rows are those of A^T or B, R elements long."""


def transpose(x: Tensor) -> Tensor:
    """[T, K] with any row stride -> [K, T] contiguous."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    out = torch.empty(columns, rows, dtype=x.dtype, device=x.device)
    tiling = TILINGS["transpose"]
    grid = (triton.cdiv(rows, tiling.blocks["BT"]), triton.cdiv(columns, tiling.blocks["BK"]))
    if x.numel():
        with on_device(x):
            transpose_kernel[grid](x, out, rows, columns, x.stride(0), **tiling.blocks, num_warps=tiling.num_warps)
    return out


def _segment_sum(
    out: Tensor, segments: Segments, values: Tensor, table: Tensor, scale: Tensor, *, add: bool, factors: bool
) -> None:
    """out [segments, columns], any strides, (+)= the sums of rows of `table` [*, columns], contiguous."""
    tiling = TILINGS["segment_sum, factors" if factors else "segment_sum"]
    count, columns = out.shape
    if out.numel() == 0:
        return
    scale_argument, scale_pointer = as_scale(scale)
    grid = (triton.cdiv(count, tiling.blocks["BS"]), triton.cdiv(columns, tiling.blocks["BC"]))
    with on_device(out):
        segment_sum_kernel[grid](
            segments.starts,
            segments.index,
            segments.index if segments.order is None else segments.order,
            values,
            table,
            scale_argument,
            out,
            count,
            columns,
            table.stride(0),
            out.stride(0),
            out.stride(1),
            HAS_ORDER=segments.order is not None,
            ADD=add,
            SCALE_POINTER=scale_pointer,
            **tiling.blocks,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )


def _sampled_product(left: Tensor, right: Tensor, csr: Segments, *, factors: bool, splits: int | None = None) -> Tensor:
    """<left[n_j], right[k_j]> of every position, fp32 [nnz]; the rows of left and right contiguous."""
    tiling = TILINGS["sampled_product, factors" if factors else "sampled_product"]
    positions, columns = csr.index.numel(), left.shape[1]
    if positions == 0 or columns == 0:
        return torch.zeros(positions, dtype=torch.float32, device=left.device)
    blocks, step = triton.cdiv(positions, tiling.blocks["BJ"]), tiling.blocks["BC"]
    split = split_rows(columns, step, step, blocks, left.device, 1 if factors else MOST_SPLITS, splits)
    partial = torch.empty(split.count, positions, dtype=torch.float32, device=left.device)
    with on_device(left):
        sampled_product_kernel[(blocks, split.count)](
            left,
            right,
            csr.segment,
            csr.index,
            partial,
            positions,
            columns,
            split.rows,
            left.stride(0),
            right.stride(0),
            **tiling.blocks,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
    return partial[0] if split.count == 1 else partial.sum(dim=0)


def gather_values(lora_a: Tensor, lora_b: Tensor, csr: Segments) -> Tensor:
    """v_j = <B[n_j], A[:, k_j]>: fp32 [nnz] of factors [R, K] and [N, R]."""
    return _sampled_product(lora_b.contiguous(), transpose(lora_a), csr, factors=True)


def add_sparse_product(
    y: Tensor, x: Tensor, segments: Segments, values: Tensor, scale: Tensor, *, x_transposed: Tensor | None = None
) -> None:
    """y [T, N] += s x Delta^T for x [T, K] by row (CSR); with a CSC, dx [T, K] += s dy Delta for dy [T, N].

    In place, summed in fp32 and rounded once to y's dtype. `values` [nnz] are row-major, in any float dtype.
    `x_transposed`: `transpose(x)` where it is at hand.
    """
    table = transpose(x) if x_transposed is None else x_transposed
    _segment_sum(y.t(), segments, values, table, scale, add=True, factors=False)


def sampled_gradient(
    dy: Tensor,
    x: Tensor,
    csr: Segments,
    *,
    dy_transposed: Tensor | None = None,
    x_transposed: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """g_j = sum over t of dy[t, n_j] x[t, k_j]: fp32 [nnz] of dy [T, N] and x [T, K].

    `dy_transposed`, `x_transposed`: their `transpose` where it is at hand. `splits`: ranges that T is divided into,
    None: as many as fill the device.
    """
    left = transpose(dy) if dy_transposed is None else dy_transposed
    right = transpose(x) if x_transposed is None else x_transposed
    return _sampled_product(left, right, csr, factors=False, splits=splits)


def factor_gradients_from_values(
    gradient: Tensor, csr: Segments, csc: Segments, lora_a: Tensor, lora_b: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """dA = s B^T G [R, K] and dB = s G A^T [N, R] of a sparse gradient G with values [nnz], in the factors' dtypes."""
    grad_a = torch.empty_like(lora_a, memory_format=torch.contiguous_format)
    grad_b = torch.empty_like(lora_b, memory_format=torch.contiguous_format)
    _segment_sum(grad_b, csr, gradient, transpose(lora_a), scale, add=False, factors=True)
    _segment_sum(grad_a.t(), csc, gradient, lora_b.contiguous(), scale, add=False, factors=True)
    return grad_a, grad_b


def compile_cases() -> list[CompileCase]:
    """Every kernel and tiling; none multiplies matrices, so none uses tensor cores."""
    cases = []
    for element in TRITON_DTYPES.values():
        transposes = {"x": f"*{element}", "out": f"*{element}", **dict.fromkeys(("T", "K", "stride_x"), "i32")}
        sums = {
            **dict.fromkeys(("starts", "index", "order"), "*i32"),
            **{"values": "*fp32", "table": f"*{element}", "scale": "*fp32", "out": f"*{element}"},
            **dict.fromkeys(("SEGMENTS", "COLUMNS", "stride_table", "stride_segment", "stride_column"), "i32"),
        }
        products = {
            **dict.fromkeys(("left", "right"), f"*{element}"),
            **{"left_row": "*i32", "right_row": "*i32", "out": "*fp32"},
            **dict.fromkeys(("POSITIONS", "COLUMNS", "RANGE", "stride_left", "stride_right"), "i32"),
        }
        flags = {"HAS_ORDER": True, "ADD": True, "SCALE_POINTER": True}
        # A stride of 1 is a constant to the compiler: y is [T, N], so its transpose's segments are adjacent.
        for name, kernel, arguments, constants in (
            ("transpose", transpose_kernel, transposes, {}),
            ("segment_sum", segment_sum_kernel, sums, {"stride_segment": 1, **flags}),
            ("segment_sum, factors", segment_sum_kernel, sums, {"stride_column": 1, **flags, "ADD": False}),
            ("sampled_product", sampled_product_kernel, products, {}),
            ("sampled_product, factors", sampled_product_kernel, products, {}),
        ):
            strides = tuple(a for a in arguments if a.startswith("stride_") and a not in constants)
            constexprs = dict.fromkeys((*TILINGS[name].blocks, *constants), "constexpr")
            cases.append(
                CompileCase(
                    name=name,
                    kernel=kernel,
                    dtype=element,
                    signature={**arguments, **constexprs},
                    constants={**TILINGS[name].blocks, **constants},
                    tiling=TILINGS[name],
                    tensor_cores=False,
                    divisible_by_16=("T", "K", "COLUMNS", "RANGE", *strides),
                )
            )
    return cases
