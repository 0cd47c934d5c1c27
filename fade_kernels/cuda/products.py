"""The library's matrix products where 16 bits need a sum in fp32: what is added to it is rounded with it, once."""

import torch
import torch.nn.functional as F
from torch import Tensor


def wide_product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows [T, C] @ matrix [C, D] in fp32: of 16 bits, the product's own fp32 sums, not yet rounded."""
    if rows.is_cuda and rows.dtype.itemsize == 2:
        return torch.mm(rows, matrix, out_dtype=torch.float32)
    return rows.float() @ matrix.float()


def wide_linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, rows: int) -> Tensor:
    """x W^T + bias [T, rows] in fp32, in new memory; zeros where there is neither."""
    if weight is not None and x.dtype == torch.float32:
        return F.linear(x, weight, bias)
    wide = x.new_zeros((x.shape[0], rows), dtype=torch.float32) if weight is None else wide_product(x, weight.t())
    return wide if bias is None else wide.add_(bias)
