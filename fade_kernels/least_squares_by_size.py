"""Masked least squares as every device computes it: rows by size, small ones in its compiled kernel, large ones here.

A row with support S needs (G[S, S])^-1. Small supports go to `masked_least_squares_rows_` (csrc/cpu/least_squares.cpp,
csrc/cuda/least_squares.cu), in launches of like size. Larger ones are factored by torch's batched Cholesky, and by
whichever is less work: G[S, S] itself, or, with H = G^-1 once for all rows, H[C, C] for the columns C that the support
leaves out: x = z H with z = b on S solves the row exactly where z on C is such that x vanishes there:

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
_BLOCK_BYTES = {"cpu": 2**24, "cuda": 2**26}
"""Of blocks that are factored at once, by device; a single one may be larger. It takes a few such beside them. For 512
rows of 600 entries on average an H100 took 498 ms with 2**24 bytes, 123 with 2**26, 72 with 2**28 and 0.8 GB."""
_ACCURACY = 1e-7
"""A row is solved through H where its solution changes no more than by this part when what it leaves of the right-hand
side is solved for in turn. The prices have an error of that part (at most twice as much in Gram matrices of
condition 1e6 to 1e14), the values one of its square."""


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
        _solve_large_(problem, _Supports.of(mask_words, order[places[-1] :], rhs.shape[1]))
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


@dataclass(frozen=True)
class _Supports:
    """The distinct supports of some rows: their words, how many columns each has, and how many rows share it."""

    words: Tensor
    columns: int
    sizes: list[int]
    sharing: list[int]
    rows: Tensor
    first: Tensor
    """Where a support's rows begin in `rows`."""

    @classmethod
    def of(cls, mask_words: Tensor, rows: Tensor, columns: int) -> "_Supports":
        words, support, sharing = torch.unique(mask_words[rows], dim=0, return_inverse=True, return_counts=True)
        sizes = _ops.mask_row_counts(words, columns).tolist()
        first = sharing.cumsum(0) - sharing
        return cls(words, columns, sizes, sharing.tolist(), rows[support.argsort(stable=True)], first)

    def left_out(self, u: int) -> int:
        return self.columns - self.sizes[u]

    def saved(self, u: int, with_prices: bool) -> int:
        """Multiplications that H saves a support, times six: n^3 for a Cholesky factor, 6 n^2 for a row's two
        triangles, n^3 to 3 n^3 for a triangle's inverse, 6 n^2 for a product with a matrix."""
        n, c = self.sizes[u], self.left_out(u)
        work = n**3 - c**3 + self.sharing[u] * (6 * n**2 - 12 * c**2 - 30 * self.columns**2)
        return work + (2 * n**3 - 3 * c**2 * n if with_prices else 0)

    def batches(self, some: Collection[int], block: Callable[[int], int]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Some supports in batches to factor at once, by their blocks' sizes, with bits [U, K] and rows [U, R]."""
        batch: list[int] = []
        most = _BLOCK_BYTES[self.rows.device.type]
        for u in sorted(some, key=lambda u: (self.sharing[u], block(u))):
            numbers = (len(batch) + 1) * max(block(u) ** 2, 4 * self.columns)
            if batch and (self.sharing[u] != self.sharing[batch[0]] or 8 * numbers > most):
                yield batch, *self._of(batch)
                batch = []
            batch.append(u)
        if batch:
            yield batch, *self._of(batch)

    def _of(self, batch: list[int]) -> tuple[Tensor, Tensor]:
        place = self.first[batch][:, None] + torch.arange(self.sharing[batch[0]], device=self.rows.device)
        return _ops.unpack_mask(self.words[batch], self.columns), self.rows[place]


def _solve_large_(problem: _Problem, supports: _Supports) -> None:
    """`masked_least_squares_rows_` of the rows, by torch: one factorisation for each distinct support."""
    columns, with_prices = len(problem.gram), problem.prices.numel() > 0
    saved = {u: supports.saved(u, with_prices) for u in range(len(supports.sizes))}
    direct, through = set(saved), {u for u, work in saved.items() if work > 0}
    inverse = _inverse(problem.gram) if sum(saved[u] for u in through) > 3 * columns**3 else None
    if inverse is not None:
        direct -= through
        found = [
            (batch, _solve_through_inverse_(problem, inverse, bits, rows))
            for batch, bits, rows in supports.batches(through, supports.left_out)
        ]
        for batch, inaccurate in found:
            direct |= {u for u, again in zip(batch, inaccurate.tolist(), strict=True) if again}
    for _, bits, rows in supports.batches(direct, supports.sizes.__getitem__):
        _solve_directly_(problem, bits, rows)


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


def _columns_of(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The set columns of each row [U, K] in order, padded with others to the most of a row, and which are its own."""
    sizes = bits.sum(1, keepdim=True)
    most = int(sizes.max())
    order = bits.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return order, torch.arange(most, device=bits.device) < sizes


def _blocks(matrix: Tensor, columns: Tensor, own: Tensor) -> Tensor:
    """The matrix on each list of columns, padded with rows of the identity: [U, n, n]."""
    blocks = matrix[columns[:, :, None], columns[:, None, :]]
    blocks.masked_fill_(~own[:, :, None], 0.0).masked_fill_(~own[:, None, :], 0.0)
    blocks.diagonal(dim1=1, dim2=2).masked_fill_(~own, 1.0)
    return blocks


def _pieces(rows: Tensor, columns: int) -> Iterator[Tensor]:
    """Rows [U, R] as a few of each support, so that a few dense float64 matrices of them stay within the bytes."""
    yield from rows.split(max(1, _BLOCK_BYTES[rows.device.type] // (32 * columns * len(rows))), dim=1)


def _parts(columns: int, own: Tensor) -> Iterator[slice]:
    """Columns of a matrix with a row for each of `own`, as many at a time as the bytes hold."""
    width = max(1, _BLOCK_BYTES[own.device.type] // (8 * max(1, own.numel())))
    yield from (slice(begin, min(begin + width, columns)) for begin in range(0, columns, width))


def _squared_lengths(factor: Tensor, right: Tensor) -> Tensor:
    """Those of the columns of L^-1 R, for L [U, n, n] and R [U or 1, n, m]: [U, m]."""
    return torch.linalg.solve_triangular(factor, right, upper=False).square_().sum(1)


def _solve_directly_(problem: _Problem, bits: Tensor, rows: Tensor) -> None:
    """Rows [U, R] of supports [U, K], with the Cholesky factors of G[S, S]."""
    support, own = _columns_of(bits)
    blocks = _blocks(problem.gram, support, own)
    factor, info = torch.linalg.cholesky_ex(blocks)
    pivots, given = factor.diagonal(dim1=1, dim2=2).square(), blocks.diagonal(dim1=1, dim2=2)
    tolerance = reference.pivot_tolerance(1) * own.sum(1, keepdim=True)
    failed = (info != 0) | ~(pivots > tolerance * given).all(1)
    del blocks
    if bool(failed.any()):
        factor[failed] = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
        problem.singular.clamp_(max=rows[failed].min())
    diagonal = None
    if problem.prices.numel():
        diagonal = torch.zeros_like(own, dtype=torch.float64)
        for part in _parts(own.shape[1], own):
            # Column j of a triangle's inverse begins with row j.
            triangle = factor[:, part.start :, part.start :]
            one = torch.eye(triangle.shape[1], part.stop - part.start, dtype=factor.dtype, device=factor.device)
            diagonal[:, part] = _squared_lengths(triangle, one)
    for piece in _pieces(rows, len(problem.gram)):
        at = support[:, None, :].expand(*piece.shape, -1)
        right = torch.where(own[:, None, :], problem.rhs[piece].gather(2, at).double(), 0.0)
        x = torch.cholesky_solve(right.mT, factor).mT
        problem.write_(piece, own, x, diagonal)


def _solve_through_inverse_(problem: _Problem, inverse: Tensor, bits: Tensor, rows: Tensor) -> Tensor:
    """Rows [U, R] of supports [U, K], with the Cholesky factors of H[C, C]. Which are not accurate enough: [U]."""
    support, own = _columns_of(bits)
    outside, left_out = _columns_of(~bits)
    factor, info = torch.linalg.cholesky_ex(_blocks(inverse, outside, left_out))
    inaccurate = info != 0
    diagonal = None
    if problem.prices.numel():
        diagonal = inverse.diagonal()[support]
        for part in _parts(support.shape[1], outside):
            crossing = inverse[outside[:, :, None], support[:, None, part]].masked_fill_(~left_out[:, :, None], 0.0)
            diagonal[:, part] -= _squared_lengths(factor, crossing)
        inaccurate |= ~((diagonal > 0) | ~own).all(1)
    within = bits[:, None, :]

    def solved(right: Tensor) -> Tensor:
        at = outside[:, None, :].expand(*right.shape[:2], -1)
        over = torch.where(left_out[:, None, :], (right @ inverse).gather(2, at), 0.0)
        return (right.scatter_add(2, at, -torch.cholesky_solve(over.mT, factor).mT) @ inverse).mul_(within)

    lengths = problem.gram.diagonal().sqrt()
    for piece in _pieces(rows, len(inverse)):
        right = torch.where(within, problem.rhs[piece].double(), 0.0)
        x = solved(right)
        correction = solved((right - x @ problem.gram).mul_(within))
        x += correction
        # Lengths of columns: so that units do not matter.
        change, size = ((solution * lengths).norm(dim=2) for solution in (correction, x))
        inaccurate |= ~(change <= _ACCURACY * size).all(1)
        problem.write_(piece, own, x.gather(2, support[:, None, :].expand(*piece.shape, -1)), diagonal)
    return inaccurate
