"""Where a mask's bits are, as lists: what the kernels for very sparse masks walk (`csrc/cuda/gather.cu`)."""

from typing import NamedTuple

import torch
from torch import Tensor

from fade_kernels import reference


class Segments(NamedTuple):
    """A mask's positions grouped by row (CSR) or by column (CSC)."""

    starts: Tensor
    """Int32 [segments + 1]: positions starts[i]..starts[i + 1] - 1 belong to segment i."""
    index: Tensor
    """Int32 [nnz]: the column of each position (CSR) or its row (CSC)."""
    segment: Tensor
    """Int32 [nnz]: the segment of each position."""


class MaskPositions(NamedTuple):
    """The positions of a mask [N, K] in both orders."""

    by_row: Segments
    by_column: Segments
    order: Tensor
    """Int32 [nnz]: where each position of `by_column` stands in `by_row`."""


class TileOrder(NamedTuple):
    """The tiles of every strip of a mask, those that hold any bit before the others."""

    tiles: Tensor
    """Int32 [strips, tiles of a strip]: row i begins with its counts[i] tiles that hold a bit, in ascending order."""
    counts: Tensor
    """Int32 [strips]."""


def find_tile_order(mask_words: Tensor, columns: int, tile_n: int, tile_k: int, *, along: str) -> TileOrder:
    """The order in which the kernels of masked LoRA walk a mask's tiles of tile_n x tile_k bits.

    Args:
        mask_words: int32 [N, ceil(columns/32)].
        along: "k": a strip is tile_n rows, its tiles numbered along K; "n": tile_k columns, numbered along N.
    """
    occupied = torch.ops.fade_kernels.mask_occupancy(mask_words, columns, tile_n, tile_k)
    occupied = occupied if along == "k" else occupied.t()
    tiles = torch.sort((~occupied).to(torch.uint8), dim=1, stable=True).indices
    return TileOrder(tiles.to(torch.int32).contiguous(), occupied.sum(dim=1, dtype=torch.int32))


def find_first_places(mask_words: Tensor, columns: int, width: int) -> Tensor:
    """Int32 [N, ceil(columns/width)]: how many bits come before each row's tiles of `width` columns, row by row."""
    mask = reference.unpack_mask(mask_words, columns)
    counts = torch.nn.functional.pad(mask, (0, -columns % width)).view(mask.shape[0], -1, width).sum(dim=2)
    return (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).to(torch.int32)


def find_positions(mask_words: Tensor, columns: int) -> MaskPositions:
    """The positions of a mask (int32 words [N, ceil(columns/32)]). Waits for the device: once per mask."""
    mask = reference.unpack_mask(mask_words, columns)
    rows, index = (positions.to(torch.int32) for positions in mask.nonzero(as_tuple=True))
    order = torch.sort(index, stable=True).indices  # rows stay ascending within a column
    by_row = Segments(_starts(mask.sum(dim=1)), index, rows)
    by_column = Segments(_starts(mask.sum(dim=0)), rows[order], index[order])
    return MaskPositions(by_row, by_column, order.to(torch.int32))


def _starts(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
