"""BitMask: which entries of a weight matrix an adapter may change, one bit each.

Apart from the operators that use it because every stage of the method passes it on: selection makes it, masked LoRA
computes with it, the adapter file stores its words. Layout: row-major int32 words, bit j of word w is column 32 w + j.
"""

from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from fade_kernels import _ops


class BitMask:
    """Packed mask of a weight matrix [N, K]; a weight with more dimensions is seen as [N, product of the rest].

    `BitMask(words, shape)` takes words as they were stored and checks them; `pack`, `full` and `from_positions` make
    them. Immutable: words must not be written to, because the number of set bits and the tile occupancy are kept. (The
    kernels ignore padding bits all the same, so that words which somebody else overwrites cannot lead them astray.)
    """

    __slots__ = ("_count", "_occupancy", "_positions", "_shape", "_words")
    __hash__ = None

    def __init__(self, words: Tensor, shape: tuple[int, ...]) -> None:
        """Takes words as they were stored, for a weight of this shape.

        Args:
            words: int32 [N, ceil(K/32)]; bit j of word w is column 32 w + j, padding bits are 0.
            shape: of the weight, two or more dimensions.

        Raises:
            TypeError: the words are not int32.
            ValueError: they do not fit the shape, or a padding bit is set.
        """
        rows, columns = _matrix_shape(shape)
        _ops.check_mask_words(words, rows, columns)
        padding = -columns % 32
        if padding and rows and not words.is_meta and bool((words[:, -1] >> (32 - padding) != 0).any()):
            raise ValueError(f"mask words have bits set beyond column {columns}: they belong to another shape")
        self._set(words.contiguous(), (rows, columns))

    def _set(self, words: Tensor | None, shape: tuple[int, int]) -> None:
        self._words = None if words is None else _outside_inference(words)
        self._shape = shape
        self._count: int | None = None
        self._occupancy: dict[tuple[int, int], Tensor] = {}
        self._positions: tuple[Tensor, Tensor] | None = None

    @classmethod
    def _trusted(cls, words: Tensor, shape: tuple[int, int]) -> "BitMask":
        """For words that an operator of this library has just made: no check, which would wait for the device."""
        mask = cls.__new__(cls)
        mask._set(words, shape)
        return mask

    @staticmethod
    def pack(mask: Tensor) -> "BitMask":
        """Packs a bool tensor [N, ...], flattened from dimension 1.

        Raises:
            TypeError: the mask is not bool.
            ValueError: the mask has fewer than two dimensions.
        """
        if mask.dim() < 2:
            raise ValueError(f"a mask must have at least two dimensions [N, ...], not {list(mask.shape)}")
        rows, columns = mask.shape[0], prod(mask.shape[1:])
        return BitMask._trusted(_ops.pack_mask(mask.reshape(rows, columns)), (rows, columns))

    @staticmethod
    def full(shape: tuple[int, ...], device: torch.device | str | None = None) -> "BitMask":
        """A mask that selects every entry of a weight of this shape (two or more dimensions)."""
        return BitMask.pack(torch.ones((), dtype=torch.bool, device=device).expand(shape))

    @staticmethod
    def from_words(words: Tensor, shape: tuple[int, ...]) -> "BitMask":
        """`BitMask(words, shape)`, by a name that says what is taken."""
        return BitMask(words, shape)

    @staticmethod
    def from_positions(row_counts: Tensor, columns: Tensor, shape: tuple[int, ...]) -> "BitMask":
        """A mask from its set bits: how many each row has, and their columns, ascending in each row.

        The words are made when they are first asked for; until then the mask is no larger than these two tensors.

        Args:
            row_counts: int [N].
            columns: int, uint16 included, [nnz], row by row.
            shape: of the weight, two or more dimensions.

        Raises:
            ValueError: they do not fit the shape or each other, or are out of range or out of order.
        """
        rows, width = _matrix_shape(shape)
        if row_counts.is_floating_point() or columns.is_floating_point():
            raise ValueError("row_counts and columns must be integers")
        counts, at = row_counts.cpu().numpy(), columns.cpu().numpy()
        if counts.shape != (rows,) or (rows and (counts.min() < 0 or counts.max() > width)):
            raise ValueError(f"row_counts is out of range: {rows} numbers from 0 to {width} are needed")
        if at.shape != (int(counts.sum(dtype="int64")),):
            raise ValueError(f"there are {at.shape} columns, but row_counts add up to {counts.sum(dtype='int64')}")
        if at.size:
            ascending = at[1:] > at[:-1]
            starts = counts.cumsum(dtype="int64")[:-1]
            ascending[starts[(starts > 0) & (starts < at.size)] - 1] = True  # a row may begin anywhere
            if at.min() < 0 or at.max() >= width or not ascending.all():
                raise ValueError(f"columns is out of range or out of order: a row's ascend, from 0 to {width - 1}")
        mask = BitMask.__new__(BitMask)
        mask._set(None, (rows, width))
        mask._positions, mask._count = (row_counts, columns), at.size
        return mask

    @property
    def words(self) -> Tensor:
        """int32 [N, ceil(K/32)], contiguous; bit j of word w is column 32 w + j, padding bits are 0."""
        positions = self._positions
        if self._words is None:
            self._words = _outside_inference(_words_of(*positions, self.shape))
            self._positions = None  # last, because another thread may be here
        return self._words

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self._shape

    def positions(self) -> tuple[Tensor, Tensor]:
        """The set bits as `from_positions` takes them: integers [N] and [nnz]."""
        if self._positions is not None:
            return self._positions
        return self.row_counts, self.unpack().nonzero()[:, 1]

    def unpack(self) -> Tensor:
        """The mask as bool [N, K]."""
        return _ops.unpack_mask(self.words, self.shape[1])

    @property
    def row_counts(self) -> Tensor:
        """Number of set bits in each row: int64 [N]."""
        return _ops.mask_row_counts(self.words, self.shape[1])

    @property
    def count(self) -> int:
        """Number of set bits. Counted when first asked for, which torch.compile cannot trace: ask once before."""
        if self._count is None:
            self._count = int(self.row_counts.sum())
        return self._count

    @property
    def density(self) -> float:
        """Set bits over all entries; 0.0 for an empty shape."""
        return self.count / max(1, self.shape[0] * self.shape[1])

    def occupancy(self, tile: int | tuple[int, int] = 32) -> Tensor:
        """Which tiles hold any set bit: bool [ceil(N/tile_n), ceil(K/tile_k)], made once for each tile size.

        Args:
            tile: tile size, or (tile_n, tile_k).

        Raises:
            ValueError: a tile size below 1.
        """
        tile_n, tile_k = (tile, tile) if isinstance(tile, int) else tile
        if (tile_n, tile_k) not in self._occupancy:
            self._occupancy[tile_n, tile_k] = _ops.mask_occupancy(self.words, self.shape[1], tile_n, tile_k)
        return self._occupancy[tile_n, tile_k]

    @property
    def device(self) -> torch.device:
        return (self._positions[0] if self._words is None else self._words).device

    def to(self, device: torch.device | str) -> "BitMask":
        """The same mask on another device; itself where it is there already."""
        words = self.words.to(device)
        return self if words is self.words else self._with_words(words)

    def _with_words(self, words: Tensor) -> "BitMask":
        """The same mask in other memory; what was counted of it stays known."""
        mask = BitMask._trusted(words, self.shape)
        mask._count = self._count
        return mask

    def __eq__(self, other: object) -> bool:
        """Same shape and the same bits, wherever the words are."""
        if not isinstance(other, BitMask):
            return NotImplemented
        return self.shape == other.shape and torch.equal(self.words, other.words.to(self.device))

    def __repr__(self) -> str:
        return f"BitMask(shape={self.shape}, count={self.count}, density={self.density:.3g}, device={self.device})"


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) < 2:
        raise ValueError(f"a masked weight must have at least two dimensions, not {list(shape)}")
    return int(shape[0]), prod(int(size) for size in shape[1:])


def _outside_inference(words: Tensor) -> Tensor:
    """A mask outlives the inference mode that it was made in: autograd must be able to keep its words."""
    if not words.is_inference():
        return words
    with torch.inference_mode(False):
        return words.clone()


def _words_of(row_counts: Tensor, columns: Tensor, shape: tuple[int, int]) -> Tensor:
    """Words from positions as `from_positions` takes them, about a million at a time: 40 bytes of scratch each."""
    rows, width = shape[0], _ops.words_per_row(shape[1])
    words = torch.zeros((rows, width), dtype=torch.int32, device=columns.device)
    blocks = max(1, columns.numel() >> 20)
    first_rows = [rows * i // blocks for i in range(blocks + 1)]
    done = 0
    for first, last in pairwise(first_rows):
        counts = row_counts[first:last].long()
        at = columns[done : done + int(counts.sum())].long()
        row = torch.repeat_interleave(torch.arange(last - first, device=columns.device), counts)
        bit = torch.ones((), dtype=torch.int32, device=columns.device) << (at & 31).int()
        # Every bit comes once, so that a sum is a union.
        words[first:last].view(-1).index_add_(0, row.mul_(width).add_(at >> 5), bit)
        done += at.numel()
    return words


def gather_masked(weight: Tensor, mask: BitMask) -> Tensor:
    """The weight's values at the mask's positions.

    Args:
        weight: [N, ...], any dtype, contiguous or not; seen as [N, K].
        mask: of the same shape.

    Returns:
        [mask.count] in the weight's dtype, row-major, bit for bit. Not differentiable.

    Raises:
        ValueError: the mask does not fit the weight, or is on another device.
    """
    _check_shape(weight, mask)
    return _ops.gather_masked(weight.detach(), mask.words, mask.count)


def scatter_masked_(weight: Tensor, values: Tensor, mask: BitMask) -> Tensor:
    """Writes values into the weight at the mask's positions, in place: the inverse of `gather_masked`.

    Entries outside the mask keep their bits, and so do the values, NaN payloads included. Autograd is not told.

    Args:
        weight: [N, ...], any dtype, contiguous or not.
        values: [mask.count] in the weight's dtype, row-major.
        mask: of the weight's shape.

    Returns:
        The weight.

    Raises:
        TypeError: the values have another dtype.
        ValueError: mask or number of values do not fit, or another device.
    """
    _check_shape(weight, mask)
    if values.numel() != mask.count:
        raise ValueError(f"the mask has {mask.count} set bits, but there are {values.numel()} values")
    _ops.scatter_masked_(weight.detach(), values.detach(), mask.words)
    return weight


def _check_shape(weight: Tensor, mask: BitMask) -> None:
    if weight.dim() < 2 or (weight.shape[0], prod(weight.shape[1:])) != mask.shape:
        raise ValueError(f"a mask of shape {mask.shape} does not fit a weight of shape {tuple(weight.shape)}")
