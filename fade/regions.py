"""Regions of weights: rows and columns of a matrix that hold something of their own where a model keeps several in one
layer, as a block's queries, keys, values and the input of its MLP.

Only masks know of regions: what is measured, selected, solved and counted is the region, and the mask that comes of it
is a mask of the whole weight, without a bit elsewhere.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fade.errors import FadeError
from fade_kernels import BitMask, weight_shape

_PATTERN = re.compile(r"(?P<layers>.+)\[\s*(\d*)\s*:\s*(\d*)\s*(?:,\s*(\d*)\s*:\s*(\d*)\s*)?\]", re.DOTALL)


@dataclass(frozen=True)
class Region:
    """Rows and columns of a weight seen as [N, K]."""

    rows: range
    columns: range

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)

    @property
    def slices(self) -> tuple[slice, slice]:
        """What to index a matrix with."""
        return slice(self.rows.start, self.rows.stop), slice(self.columns.start, self.columns.stop)

    def cut(self, mask: BitMask) -> BitMask:
        """The region's part of a mask of the whole weight."""
        return BitMask.pack(mask.unpack()[self.slices])

    def embed(self, mask: BitMask, shape: tuple[int, int]) -> BitMask:
        """A mask of the region as one of the whole weight [N, K]."""
        whole = torch.zeros(shape, dtype=torch.bool, device=mask.words.device)
        whole[self.slices] = mask.unpack()
        return BitMask.pack(whole)


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """A layer's weight seen as [N, K]."""
    rows, *columns = weight_shape(layer)
    return rows, math.prod(columns)


def target_shapes(layers: Mapping[str, nn.Module], regions: Mapping[str, Region]) -> dict[str, tuple[int, int]]:
    """What of each layer may change: its region, or all of it."""
    return {name: regions[name].shape if name in regions else matrix_shape(m) for name, m in layers.items()}


def split_pattern(pattern: str) -> tuple[str, tuple[str | None, ...] | None]:
    """A target pattern without its region, and the region's four bounds as written, empty or None where none is."""
    if (found := _PATTERN.fullmatch(pattern)) is None:
        return pattern, None
    return found["layers"], found.groups()[1:]


def region_of(pattern: str, bounds: tuple[str | None, ...], name: str, layer: nn.Module) -> Region:
    """The region that a pattern names in a layer. Raises FadeError for one that is empty or outside the weight."""
    shape = matrix_shape(layer)
    ranges = [
        range(int(first or 0), int(end) if end else most)
        for first, end, most in zip(bounds[::2], bounds[1::2], shape, strict=True)
    ]
    for ours, most in zip(ranges, shape, strict=True):
        if not 0 <= ours.start < ours.stop <= most:
            rows, columns = (f"{one.start}:{one.stop}" for one in ranges)
            raise FadeError(
                f"the target pattern {pattern!r} asks for rows {rows} and columns {columns} of {name}, whose weight "
                f"has {shape[0]} rows and {shape[1]} columns; name a region [ROWS, COLUMNS] within it that is not empty"
            )
    return Region(*ranges)


def cut(masks: Mapping[str, BitMask], regions: Mapping[str, Region]) -> dict[str, BitMask]:
    """Of each mask the part in its layer's region, if it has one."""
    return {name: regions[name].cut(mask) if name in regions else mask for name, mask in masks.items()}


def embed(
    masks: Mapping[str, BitMask], layers: Mapping[str, nn.Module], regions: Mapping[str, Region]
) -> dict[str, BitMask]:
    """Masks of regions as masks of the whole weights."""
    return {
        name: regions[name].embed(mask, matrix_shape(layers[name])) if name in regions else mask
        for name, mask in masks.items()
    }
