"""Masked least squares: the row-wise optimum of a quadratic on a sparse support, and the price of each of its entries.

For a right-hand side B [N, K] and a Gram matrix G [K, K] that all rows share, rows decouple: with support S,
x[i, S] = B[i, S] (G[S, S])^-1. It is what a weight's sparse change solves in closed form, and its prices are those of
optimal brain surgeon (Hassibi and Stork, 1993). Definition: `reference.py`; CPU kernel: csrc/cpu/least_squares.cpp; on
CUDA a composition of torch's batched Cholesky, below.
"""

import torch
from torch import Tensor

from fade_kernels import _ops, reference
from fade_kernels._environment import FORCED, INTERPRETED
from fade_kernels.bitmask import BitMask

_BLOCK_BYTES = 256 * 2**20
"""Of padded blocks that are factored at once on CUDA; a single block may be larger."""


def masked_least_squares(rhs: Tensor, gram: Tensor, mask: BitMask) -> Tensor:
    """x[i, S] = rhs[i, S] (gram[S, S])^-1 for each row i of the mask with support S, computed in float64.

    Args:
        rhs: [N, K], float32 or float64, any strides.
        gram: [K, K] in the same dtype, symmetric; positive definite on every row's support.
        mask: of shape (N, K). Rows may be empty or full; rows of equal support share one factorisation on the CPU.

    Returns:
        [mask.count] in rhs's dtype, row-major over the mask, as `scatter_masked_` takes it. Not differentiable. The
        result of a row depends on neither the other rows nor the number of threads.

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
        Values and prices, each [mask.count] in rhs's dtype, row-major over the mask.
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


def padded_masked_least_squares(
    rhs: Tensor, gram: Tensor, mask_words: Tensor, count: int, with_prices: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator as torch's batched Cholesky of blocks padded with rows of the identity, rows sorted by size."""
    rows, columns = rhs.shape
    mask = _ops.unpack_mask(mask_words, columns)
    sizes = mask.sum(1)
    if int(sizes.sum()) != count:
        raise ValueError(f"the mask has {int(sizes.sum())} set bits, not {count}")
    values, prices = rhs.new_empty(count), rhs.new_empty(count if with_prices else 0)
    singular = torch.full((), rows, dtype=torch.int64, device=rhs.device)
    starts, at = sizes.cumsum(0) - sizes, mask.nonzero()[:, 1]
    wide, square = rhs.double(), gram.double()
    order = sizes.argsort(stable=True)
    ordered, done = sizes[order].tolist(), int((sizes == 0).sum())
    while done < rows:
        # Sizes ascend, so that a block is as large as its last row.
        take = max(1, min(rows - done, _BLOCK_BYTES // (8 * ordered[done] ** 2)))
        while take > 1 and take * 8 * ordered[done + take - 1] ** 2 > _BLOCK_BYTES:
            take //= 2
        index, n = order[done : done + take], ordered[done + take - 1]
        step = torch.arange(n, device=rhs.device)
        used = step < sizes[index, None]  # [R, n]
        place = (starts[index, None] + step).clamp_max(count - 1)
        support = at[place] * used
        blocks = square[support[:, :, None], support[:, None, :]]
        pair = used[:, :, None] & used[:, None, :]
        identity = torch.eye(n, dtype=torch.float64, device=rhs.device)
        blocks = torch.where(pair, blocks, identity)
        factor, info = torch.linalg.cholesky_ex(blocks)
        tolerance = reference.pivot_tolerance(1) * sizes[index, None]
        pivots, diagonal = factor.diagonal(dim1=1, dim2=2).square(), blocks.diagonal(dim1=1, dim2=2)
        failed = (info != 0) | ~(pivots > tolerance * diagonal).all(1)
        factor = torch.where(failed[:, None, None], identity, factor)
        singular = torch.minimum(singular, torch.where(failed, index, rows).min())
        right = torch.where(used, wide[index].gather(1, support), 0.0)
        x = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
        values[place[used]] = x[used].to(rhs.dtype)
        if with_prices:
            inverse = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)
            prices[place[used]] = (x.square() / inverse)[used].to(rhs.dtype)
        done += take
    return values, prices, torch.where(singular == rows, -1, singular)


if FORCED in ("", "cuda", "triton") and not INTERPRETED:
    _ops.implement("masked_least_squares", padded_masked_least_squares, "CUDA")
