"""Masked least squares: the row-wise optimum of a quadratic on a sparse support, and the price of each of its entries.

For a right-hand side B [N, K] and a Gram matrix G [K, K] that all rows share, rows decouple: with support S,
x[i, S] = B[i, S] (G[S, S])^-1. It is what a weight's sparse change solves in closed form, and its prices are those of
optimal brain surgeon (Hassibi and Stork, 1993). Definition: `reference.py`; kernels: csrc/cpu/least_squares.cpp and
csrc/cuda/least_squares.cu, behind `least_squares_by_size.py`, where large supports are solved, too.
"""

import torch
from torch import Tensor

from fade_kernels import _ops
from fade_kernels.bitmask import BitMask


def masked_least_squares(rhs: Tensor, gram: Tensor, mask: BitMask) -> Tensor:
    """x[i, S] = rhs[i, S] (gram[S, S])^-1 for each row i of the mask with support S, computed in float64.

    Args:
        rhs: [N, K], float32 or float64, any strides.
        gram: [K, K] in the same dtype, symmetric; positive definite on every row's support.
        mask: of shape (N, K). Rows may be empty or full. Rows of equal support share one factorisation, on CUDA where
            it has more than 256 columns. A support of most columns costs no more than one of the few that it leaves
            out, once gram is inverted for several such rows.

    Returns:
        [mask.count] in rhs's dtype, row-major over the mask, as `scatter_masked_` takes it. Not differentiable. The
        result of a row with at most 256 entries, of the compiled kernels, depends on neither the other rows nor the
        number of threads. That of a larger one does in rounding: both may change how torch's libraries sum products,
        and other rows whether the inverse of gram pays. Its residual is that of a Cholesky solution either way.

    Raises:
        TypeError: other dtypes. ValueError: shapes or devices that do not fit, a Gram matrix that is not symmetric,
            numbers that are not finite, or a block that is singular in float64: the message names its row.
    """
    return _solve(rhs, gram, mask, with_prices=False)[0]


def masked_least_squares_prices(rhs: Tensor, gram: Tensor, mask: BitMask) -> tuple[Tensor, Tensor]:
    """`masked_least_squares`, and what dropping each entry would add to the row's minimum of x G x^T - 2 rhs x^T.

    The price of entry j is x[i, j]^2 / ((gram[S, S])^-1)[j, j]: the increase with all others of the row re-solved.

    Args, errors: as `masked_least_squares`.

    Returns:
        Values and prices, each [mask.count] in rhs's dtype, row-major over the mask. Prices that were found through the
        inverse of gram have about 7 digits or more.
    """
    return _solve(rhs, gram, mask, with_prices=True)


def _solve(rhs: Tensor, gram: Tensor, mask: BitMask, with_prices: bool) -> tuple[Tensor, Tensor]:
    if not isinstance(mask, BitMask):
        raise TypeError(f"mask must be a BitMask, not {type(mask).__name__}: use BitMask.pack to make one")
    rhs, gram = rhs.detach(), gram.detach()
    values, prices, singular = _ops.masked_least_squares(rhs, gram, mask.words, mask.count, with_prices)
    # Everything below costs a look at what is small. The kernels read one triangle only, and equality is seen at once.
    trouble = int(singular) >= 0 or not bool(torch.isfinite(values).all())
    if trouble and not (bool(torch.isfinite(rhs).all()) and bool(torch.isfinite(gram).all())):
        raise ValueError("rhs and gram must hold finite numbers")
    if not torch.equal(gram, gram.T):
        tolerance = 64 * torch.finfo(gram.dtype).eps * gram.abs().max()
        if bool(((gram - gram.T).abs() > tolerance).any()):
            raise ValueError("gram is not symmetric: pass (gram + gram.T) / 2")
    if int(singular) >= 0:
        raise ValueError(
            f"the Gram matrix is singular on the support of row {int(singular)} "
            f"({int(mask.row_counts[int(singular)])} columns): add a multiple of the identity to it"
        )
    return values, prices
