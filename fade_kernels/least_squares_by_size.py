"""Masked least squares as every device computes it: rows by size, small ones in its compiled kernel, large ones here.

A row with support S needs (G[S, S])^-1. Small supports go to `masked_least_squares_rows_` (csrc/cpu/least_squares.cpp,
csrc/cuda/least_squares.cu), in launches of like size. Larger ones are factored by torch's batched Cholesky, and by
whichever is less work: G[S, S] itself, or, with H = G^-1 once for all rows, H[C, C] for the columns C that the support
leaves out. For x = z H with z = b on S solves the row exactly where z on C is such that x vanishes there:

    z[C] = -(b H)[C] (H[C, C])^-1        ((G[S, S])^-1)[j, j] = H[j, j] - H[j, C] (H[C, C])^-1 H[C, j].

So a row without 400 of 4096 columns costs 400^3 instead of 3700^3, and a full row nothing but products with H.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_kernels import _ops, reference

CPU_SIZES = (256,)
"""Entries of a row that the CPU kernel takes at most: eight larger triangles leave the second-level cache, and torch's
own blocking wins."""
_BLOCK_BYTES = 2**25
"""Of blocks that are factored at once; a single one may be larger. It takes a few such beside them."""
_ACCURACY = 1e-7
"""A row is solved through H where its solution changes no more than by this part when what it leaves of the right-hand
side is solved for in turn. That part is the error of the inverse that prices are made of (within a factor of 3, for
Gram matrices of condition 1e6 to 1e14), and its square what is then left in the values."""


def masked_least_squares(
    rhs: Tensor, gram: Tensor, mask_words: Tensor, count: int, with_prices: bool, launches: tuple[int, ...]
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
        problem = _Problem(values, prices, singular, rhs, gram.double(), starts)
        _solve_large_(problem, mask_words, order[places[-1] :])
    return values, prices, torch.where(singular == rows, -1, singular)


@dataclass(frozen=True)
class _Problem:
    """What is given, with the Gram matrix in float64, and where answers go: a row's begin at `starts[row]`."""

    values: Tensor
    prices: Tensor
    singular: Tensor
    rhs: Tensor
    gram: Tensor
    starts: Tensor

    def write_(self, rows: Tensor, own: Tensor, x: Tensor, diagonal: Tensor | None) -> None:
        """Answers x [U, R, n] of rows [U, R], of which `own` [U, n] are some, and the inverse's diagonal [U, n]."""
        place = self.starts[rows][:, :, None] + torch.arange(own.shape[1], device=rows.device)
        own = own[:, None, :].expand_as(place)
        place = place[own]
        self.values[place] = x[own].to(self.values.dtype)
        if diagonal is not None:
            self.prices[place] = (x.square() / diagonal[:, None, :])[own].to(self.prices.dtype)


def _solve_large_(problem: _Problem, mask_words: Tensor, rows: Tensor) -> None:
    """`masked_least_squares_rows_` of the rows, by torch: one factorisation for each distinct support."""
    columns, priced = problem.rhs.shape[1], bool(problem.prices.numel())
    words, support_of, sharing = torch.unique(mask_words[rows], dim=0, return_inverse=True, return_counts=True)
    members, first = rows[support_of.argsort(stable=True)], sharing.cumsum(0) - sharing
    bits = _ops.unpack_mask(words, columns)
    sizes, many = bits.sum(1).tolist(), sharing.tolist()

    def batches(supports: Collection[int], block: Callable[[int], int]) -> Iterator[tuple[list[int], Tensor]]:
        """Supports with as many rows each and blocks of like size, and their rows [U, R]."""
        batch: list[int] = []
        for u in sorted(supports, key=lambda u: (many[u], block(u))):
            numbers = (len(batch) + 1) * max(block(u) ** 2, 4 * columns)
            if batch and (many[u] != many[batch[0]] or 8 * numbers > _BLOCK_BYTES):
                yield batch, _rows_of(batch)
                batch = []
            batch.append(u)
        if batch:
            yield batch, _rows_of(batch)

    def _rows_of(batch: list[int]) -> Tensor:
        return members[first[batch][:, None] + torch.arange(many[batch[0]], device=rows.device)]

    def left_out(u: int) -> int:
        return columns - sizes[u]

    # Multiplications, times three: a Cholesky factor of n columns takes n^3, its inverse 3 n^3, H in all 3 columns^3.
    through, saved = [u for u, n in enumerate(sizes) if left_out(u) < n], 0
    for u in through:
        n, c = sizes[u], left_out(u)
        saved += n**3 - c**3 + (3 * n**3 - 3 * c**2 * n if priced else 0)
    inverse = _inverse(problem.gram) if saved > 3 * columns**3 else None
    direct = set(range(len(sizes)))
    if inverse is not None:
        direct -= set(through)
        inaccurate = [
            (batch, _solve_through_inverse_(problem, inverse, bits[batch], batch_rows, max(map(left_out, batch))))
            for batch, batch_rows in batches(through, left_out)
        ]
        direct |= {u for batch, found in inaccurate for u, bad in zip(batch, found.tolist(), strict=True) if bad}
    for batch, batch_rows in batches(direct, sizes.__getitem__):
        _solve_directly_(problem, bits[batch], batch_rows, max(sizes[u] for u in batch))


def _inverse(gram: Tensor) -> Tensor | None:
    """G^-1, where that is known to tell that no block of G is singular.

    A pivot of G is at most that of the same column in any block that has it, for fewer columns come before it there,
    and a pivot of n columns is computed to n eps of its diagonal: twice the tolerance is beyond doubt.
    """
    factor, info = torch.linalg.cholesky_ex(gram)
    least = 2 * reference.pivot_tolerance(len(gram)) * gram.diagonal()
    if int(info) != 0 or not bool((factor.diagonal().square() > least).all()):
        return None
    return torch.cholesky_inverse(factor)


def _columns_of(bits: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The set columns of each row [U, K] in order, padded with others to [U, most], and which are none of those."""
    order = bits.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return order, torch.arange(most, device=bits.device) < bits.sum(1, keepdim=True)


def _blocks(matrix: Tensor, columns: Tensor, own: Tensor) -> Tensor:
    """The matrix on each list of columns, padded with rows of the identity: [U, n, n]."""
    identity = torch.eye(columns.shape[1], dtype=matrix.dtype, device=matrix.device)
    blocks = matrix[columns[:, :, None], columns[:, None, :]]
    return torch.where(own[:, :, None] & own[:, None, :], blocks, identity)


def _pieces(rows: Tensor, columns: int) -> Iterator[Tensor]:
    """Rows [U, R] as a few of each support, so that a few dense float64 matrices of them stay within the bytes."""
    yield from rows.split(max(1, _BLOCK_BYTES // (32 * columns * len(rows))), dim=1)


def _solve_directly_(problem: _Problem, bits: Tensor, rows: Tensor, most: int) -> None:
    """Rows [U, R] of supports [U, K] of at most `most` columns, with the Cholesky factors of G[S, S]."""
    support, own = _columns_of(bits, most)
    blocks = _blocks(problem.gram, support, own)
    factor, info = torch.linalg.cholesky_ex(blocks)
    pivots, given = factor.diagonal(dim1=1, dim2=2).square(), blocks.diagonal(dim1=1, dim2=2)
    tolerance = reference.pivot_tolerance(1) * bits.sum(1, keepdim=True)
    failed = (info != 0) | ~(pivots > tolerance * given).all(1)
    identity = torch.eye(most, dtype=torch.float64, device=rows.device)
    factor = torch.where(failed[:, None, None], identity, factor)
    problem.singular.copy_(
        torch.minimum(problem.singular, torch.where(failed[:, None], rows, len(problem.rhs)).min())
    )
    del blocks
    diagonal = None
    if problem.prices.numel():
        diagonal = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False).square_().sum(1)
    for piece in _pieces(rows, problem.rhs.shape[1]):
        at = support[:, None, :].expand(*piece.shape, most)
        right = torch.where(own[:, None, :], problem.rhs[piece].gather(2, at).double(), 0.0)
        x = torch.cholesky_solve(right.mT, factor).mT
        problem.write_(piece, own, x, diagonal)


def _solve_through_inverse_(problem: _Problem, inverse: Tensor, bits: Tensor, rows: Tensor, most: int) -> Tensor:
    """Rows [U, R] of supports [U, K] that leave out at most `most` columns, with the Cholesky factors of H[C, C].

    Returns which supports' answers are not accurate enough [U].
    """
    outside, left_out = _columns_of(~bits, most)
    support, own = _columns_of(bits, int(bits.sum(1).max()))
    factor, info = torch.linalg.cholesky_ex(_blocks(inverse, outside, left_out))
    inaccurate = info != 0
    diagonal = None
    if problem.prices.numel():
        diagonal = inverse.diagonal()[support]
        width = max(1, _BLOCK_BYTES // (8 * max(1, outside.numel())))
        for begin in range(0, support.shape[1] if most else 0, width):
            part = slice(begin, begin + width)
            crossing = inverse[outside[:, :, None], support[:, None, part]]
            crossing.masked_fill_(~left_out[:, :, None], 0.0)
            diagonal[:, part] -= torch.linalg.solve_triangular(factor, crossing, upper=False).square_().sum(1)
        inaccurate |= ~((diagonal > 0) | ~own).all(1)
    within = bits[:, None, :]

    def solved(right: Tensor) -> Tensor:
        at = outside[:, None, :].expand(*right.shape[:2], most)
        over = torch.where(left_out[:, None, :], (right @ inverse).gather(2, at), 0.0)
        return (right.scatter_add(2, at, -torch.cholesky_solve(over.mT, factor).mT) @ inverse).mul_(within)

    lengths = problem.gram.diagonal().sqrt()
    for piece in _pieces(rows, problem.rhs.shape[1]):
        right = torch.where(within, problem.rhs[piece].double(), 0.0)
        x = solved(right)
        correction = solved((right - x @ problem.gram).mul_(within))
        x += correction
        # Lengths of columns: so that units do not matter.
        change, size = ((solution * lengths).norm(dim=2) for solution in (correction, x))
        inaccurate |= ~(change <= _ACCURACY * size).all(1)
        problem.write_(piece, own, x.gather(2, support[:, None, :].expand(*piece.shape, -1)), diagonal)
    return inaccurate
