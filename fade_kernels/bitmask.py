"""BitMask: which entries of a weight matrix an adapter may change, one bit each.

Apart from the operators that use it because every stage of the method passes it on: selection makes it, masked LoRA
computes with it, the adapter file stores its words. Layout: row-major int32 words, bit j of word w is column 32 w + j.
"""

from math import prod

import torch
from torch import Tensor

from fade_kernels import _ops


class BitMask:
    """Packed mask of a weight matrix [N, K]; a weight with more dimensions is seen as [N, product of the rest].

    Immutable: `words` must not be written to, because the number of set bits and the tile occupancy are kept.

    Attributes:
        words: int32 [N, ceil(K/32)], contiguous; bit j of word w is column 32 w + j, padding bits are 0.
        shape: (N, K).
    """

    __slots__ = ("_count", "_occupancy", "shape", "words")
    __hash__ = None

    words: Tensor
    shape: tuple[int, int]

    def __init__(self, words: Tensor, shape: tuple[int, int]) -> None:
        """Use `pack`, `full` or `from_words`: they check what this constructor takes for granted."""
        self.words = words
        self.shape = shape
        self._count: int | None = None
        self._occupancy: dict[tuple[int, int], Tensor] = {}

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
        return BitMask(_ops.pack_mask(mask.reshape(rows, columns)), (rows, columns))

    @staticmethod
    def full(shape: tuple[int, ...], device: torch.device | str | None = None) -> "BitMask":
        """A mask that selects every entry of a weight of this shape (two or more dimensions)."""
        return BitMask.pack(torch.ones((), dtype=torch.bool, device=device).expand(shape))

    @staticmethod
    def from_words(words: Tensor, shape: tuple[int, ...]) -> "BitMask":
        """Takes words as they were stored, for a weight of this shape.

        Raises:
            TypeError: the words are not int32.
            ValueError: they do not fit the shape, or a padding bit is set.
        """
        if len(shape) < 2:
            raise ValueError(f"a masked weight must have at least two dimensions, not {list(shape)}")
        rows, columns = int(shape[0]), prod(int(size) for size in shape[1:])
        _ops.check_mask_words(words, rows, columns)
        padding = -columns % 32
        if padding and rows and bool((words[:, -1] >> (32 - padding) != 0).any()):
            raise ValueError(f"mask words have bits set beyond column {columns}: they belong to another shape")
        return BitMask(words.contiguous(), (rows, columns))

    def unpack(self) -> Tensor:
        """The mask as bool [N, K]."""
        return _ops.unpack_mask(self.words, self.shape[1])

    @property
    def row_counts(self) -> Tensor:
        """Number of set bits in each row: int64 [N]."""
        return _ops.mask_row_counts(self.words)

    @property
    def count(self) -> int:
        """Number of set bits."""
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
        return self.words.device

    def to(self, device: torch.device | str) -> "BitMask":
        """The same mask on another device; itself where it is there already."""
        words = self.words.to(device)
        if words is self.words:
            return self
        moved = BitMask(words, self.shape)
        moved._count = self._count
        return moved

    def __eq__(self, other: object) -> bool:
        """Same shape and the same bits, wherever the words are."""
        if not isinstance(other, BitMask):
            return NotImplemented
        return self.shape == other.shape and torch.equal(self.words, other.words.to(self.device))

    def __repr__(self) -> str:
        return f"BitMask(shape={self.shape}, count={self.count}, density={self.density:.3g}, device={self.device})"


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
