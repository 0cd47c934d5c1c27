"""Masked least squares, row by row: csrc/cpu/least_squares.cpp, `least_squares.py`."""

import torch
from torch import Tensor

from fade_kernels import reference
from fade_kernels._ops.define import check_mask_words, check_same_device, define, shape_of


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
