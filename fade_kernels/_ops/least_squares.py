"""Masked least squares, row by row: csrc/{cpu,cuda}/least_squares.* behind `least_squares_by_size.py`."""

import torch
from torch import Tensor

from fade_kernels import reference
from fade_kernels._ops.define import check_mask_words, check_same_device, define, no_output, shape_of


def _check_masked_least_squares(rhs: Tensor, gram: Tensor, mask_words: Tensor, count: int, with_prices: bool) -> None:
    for name, tensor in (("rhs", rhs), ("gram", gram)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, not {tensor.dtype}: convert it first")
    if rhs.dtype != gram.dtype:
        raise TypeError(f"dtypes must agree, got rhs {rhs.dtype}, gram {gram.dtype}")
    if rhs.dim() != 2 or tuple(gram.shape) != (rhs.shape[1], rhs.shape[1]):
        raise ValueError(f"rhs must be [N, K] and gram [K, K], not {shape_of(rhs)} and {shape_of(gram)}")
    check_mask_words(mask_words, *rhs.shape)
    check_same_device(rhs=rhs, gram=gram, mask=mask_words)
    if count < 0:
        raise ValueError(f"count must be the number of set bits, got {count}")


# Third output: the first row whose block of the Gram matrix is singular, -1 if there is none; its values mean nothing.
masked_least_squares = define(
    "masked_least_squares(Tensor rhs, Tensor gram, Tensor mask_words, int count, bool with_prices) "
    "-> (Tensor values, Tensor prices, Tensor singular)",
    check=_check_masked_least_squares,
    fake=lambda rhs, gram, mask_words, count, with_prices: (
        rhs.new_empty((count,)),
        rhs.new_empty((count if with_prices else 0,)),
        rhs.new_empty((), dtype=torch.int64),
    ),
    default=reference.masked_least_squares,
)


def _check_masked_least_squares_rows_(
    values: Tensor, prices: Tensor, singular: Tensor, rhs: Tensor, gram: Tensor, mask_words: Tensor, starts: Tensor,
    rows: Tensor, most: int,
) -> None:  # fmt: skip
    _check_masked_least_squares(rhs, gram, mask_words, values.numel(), False)
    check_same_device(
        rhs=rhs, values=values, prices=prices, singular=singular, starts=starts, rows=rows
    )  # fmt: skip
    if values.dtype != rhs.dtype or prices.dtype != rhs.dtype:
        raise TypeError(f"values and prices must be {rhs.dtype} as rhs, not {values.dtype} and {prices.dtype}")
    if prices.numel() not in (0, values.numel()):
        raise ValueError(f"prices must be [0] or [{values.numel()}], not {shape_of(prices)}")
    for name, tensor in (("singular", singular), ("starts", starts), ("rows", rows)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, not {tensor.dtype}")
    if tuple(starts.shape) != (rhs.shape[0],):
        raise ValueError(f"starts must be [{rhs.shape[0]}], not {shape_of(starts)}")


# The same for some rows, of at most `most` entries each: into `values` and `prices` (or [0]) from `starts[row]` on.
# `singular` becomes the first of them whose block is singular, if that is before what it is.
masked_least_squares_rows_ = define(
    "masked_least_squares_rows_(Tensor(a!) values, Tensor(b!) prices, Tensor(c!) singular, Tensor rhs, Tensor gram, "
    "Tensor mask_words, Tensor starts, Tensor rows, int most) -> ()",
    check=_check_masked_least_squares_rows_,
    fake=no_output,
    default=reference.masked_least_squares_rows_,
)
