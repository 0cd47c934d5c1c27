"""Masked least squares on CUDA: rows by size, small ones each in a block of the compiled kernel, the others by torch.

csrc/cuda/least_squares.cu keeps a row's triangle in shared memory, and gives a block as much as the largest row of its
launch needs: rows of like size share a launch, so that small ones do not wait for room.
"""

import torch
from torch import Tensor

from fade_kernels import _ops, reference

SIZES: tuple[int, ...] = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Entries that a row of a launch has at most; rows with more are for torch's own blocking."""
_BLOCK_BYTES = 64 * 2**20
"""Of padded blocks that torch factors at once; a single block may be larger, and it takes several such beside them."""


def masked_least_squares(
    rhs: Tensor, gram: Tensor, mask_words: Tensor, count: int, with_prices: bool, launches: tuple[int, ...] = SIZES
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, with rows of at most so many entries in each launch of the kernel, and larger ones by torch.

    Looks at the rows' sizes, and so waits for the device.
    """
    ops, rows = torch.ops.fade_kernels, rhs.shape[0]
    sizes = ops.mask_row_counts.default(mask_words, rhs.shape[1])
    ordered, order = sizes.sort(stable=True)
    bounds = torch.tensor((0, *launches), device=rhs.device)
    *places, found = [*torch.searchsorted(ordered, bounds, right=True), sizes.sum()]
    *places, found = torch.stack([*places, found]).tolist()
    if found != count:
        raise ValueError(f"the mask has {found} set bits, not {count}")
    values, prices = rhs.new_empty(count), rhs.new_empty(count if with_prices else 0)
    singular = torch.full((), rows, dtype=torch.int64, device=rhs.device)
    starts = sizes.cumsum(0) - sizes
    for begin, end, most in zip(places, places[1:], launches, strict=False):
        if end > begin:
            ops.masked_least_squares_rows_.default(
                values, prices, singular, rhs, gram, mask_words, starts, order[begin:end], most
            )
    if places[-1] < rows:
        _padded_(values, prices, singular, rhs, gram, mask_words, starts, order[places[-1] :], ordered[places[-1] :])
    return values, prices, torch.where(singular == rows, -1, singular)


def padded_masked_least_squares(
    rhs: Tensor, gram: Tensor, mask_words: Tensor, count: int, with_prices: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator by torch alone, where there is no compiled kernel."""
    return masked_least_squares(rhs, gram, mask_words, count, with_prices, launches=())


def _padded_(
    values: Tensor, prices: Tensor, singular: Tensor, rhs: Tensor, gram: Tensor, mask_words: Tensor, starts: Tensor,
    rows: Tensor, sizes: Tensor,
) -> None:  # fmt: skip
    """`masked_least_squares_rows_` of rows of ascending sizes as torch's batched Cholesky, blocks being padded with
    rows of the identity."""
    square, done, many = gram.double(), 0, sizes.tolist()
    while done < len(rows):
        # Sizes ascend, so that a block is as large as its last row.
        take = max(1, min(len(rows) - done, _BLOCK_BYTES // (8 * many[done] ** 2)))
        while take > 1 and take * 8 * many[done + take - 1] ** 2 > _BLOCK_BYTES:
            take //= 2
        index, own, n = rows[done : done + take], sizes[done : done + take, None], many[done + take - 1]
        # The columns of a row, then what is left of it, in order: the first n of a stable sort of its bits.
        bits = _ops.unpack_mask(mask_words[index], rhs.shape[1])
        support = bits.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :n]
        used = torch.arange(n, device=rhs.device) < own
        identity = torch.eye(n, dtype=torch.float64, device=rhs.device)
        pair = used[:, :, None] & used[:, None, :]
        blocks = torch.where(pair, square[support[:, :, None], support[:, None, :]], identity)
        del pair
        factor, info = torch.linalg.cholesky_ex(blocks)
        pivots, diagonal = factor.diagonal(dim1=1, dim2=2).square(), blocks.diagonal(dim1=1, dim2=2)
        failed = (info != 0) | ~(pivots > reference.pivot_tolerance(1) * own * diagonal).all(1)
        factor = torch.where(failed[:, None, None], identity, factor)
        singular.copy_(torch.minimum(singular, torch.where(failed, index, rhs.shape[0]).min()))
        right = torch.where(used, rhs[index].gather(1, support).double(), 0.0)
        x = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
        place = (starts[index, None] + torch.arange(n, device=rhs.device))[used]
        values[place] = x[used].to(rhs.dtype)
        if prices.numel():
            inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
            prices[place] = (x.square() / inverse.square_().sum(1))[used].to(rhs.dtype)
        done += take
