"""Exact selection of the most salient fraction over all weights together: saliency tensors in, packed masks out.

Apart from saliency because it only reads accumulators. Units of every granularity (weights, tiles, rows and columns,
whole tensors) go through one operator, `select_top_k`; only their scores differ. The paper: elements and modules.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_kernels import _ops
from fade_kernels.bitmask import BitMask

GRANULARITIES = ("element", "tile", "channel", "module")


@dataclass(frozen=True)
class Selection:
    """What `select_top_fraction` chose.

    Attributes:
        masks: one BitMask per saliency tensor, in order.
        threshold: score of the last selected unit (the k-th largest).
        count: selected units, k.
        total: units there were, n.
    """

    masks: list[BitMask]
    threshold: float
    count: int
    total: int

    @property
    def density(self) -> float:
        """Selected weights over all weights; equals count / total for elements."""
        weights = sum(rows * columns for rows, columns in (mask.shape for mask in self.masks))
        return sum(mask.count for mask in self.masks) / max(1, weights)


def select_top_fraction(
    saliency: Sequence[Tensor], keep: float, granularity: str = "element", tile: int = 32
) -> Selection:
    """Selects exactly k = floor(keep * n) of n units, those of the highest score over all tensors together.

    Units and their scores:

    - `element`: each weight, by its saliency;
    - `tile`: blocks of tile x tile weights (smaller at the edges), by summed saliency;
    - `channel`: rows and columns compete, by mean saliency; the mask is the union of those selected;
    - `module`: whole tensors, by mean saliency.

    Ties at the threshold go to the first in (tensor, flat index) order; rows come before columns. For `element` nothing
    is copied: beyond the masks the extra memory is a histogram.

    Args:
        saliency: float32 tensors [N, ...] of at least two dimensions, seen as [N, K]; non-negative, may hold inf.
        keep: fraction of the units to select, in (0, 1].
        granularity: "element", "tile", "channel" or "module".
        tile: edge of a tile, for granularity "tile".

    Raises:
        TypeError: a tensor is not float32.
        ValueError: no tensors or no values, a tensor of fewer than two dimensions, NaN or negative saliency (the
            message names the tensor), keep outside (0, 1] or so small that k is 0, unknown granularity, tile below 1.
    """
    saliency = [s.detach() for s in saliency]
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {granularity!r}")
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    if granularity != "element":
        for i, s in enumerate(saliency):
            if s.numel() and not bool(s.min() >= 0):
                raise _invalid(saliency, i)
    if granularity == "tile":
        scores, expand = _tile_units(saliency, tile)
    elif granularity == "channel":
        scores, expand = _channel_units(saliency)
    elif granularity == "module":
        scores, expand = _module_units(saliency)
    else:
        scores, expand = saliency, None

    total = sum(s.numel() for s in scores)
    if total == 0:
        raise ValueError("there is no saliency to select from: the list is empty or all of its tensors are")
    count = math.floor(keep * total)
    if count == 0:
        smallest = 1 / total
        while math.floor(smallest * total) == 0:
            smallest = math.nextafter(smallest, 1.0)
        raise ValueError(f"keep {keep} selects none of {total} {granularity} units: use at least {smallest}")
    words, threshold, invalid = _ops.select_top_k(scores, count)
    if int(invalid) >= 0:
        raise _invalid(saliency, int(invalid))
    shapes = [(s.shape[0], math.prod(s.shape[1:])) for s in scores]
    units = [BitMask._trusted(w, shape) for w, shape in zip(words, shapes, strict=True)]
    return Selection(units if expand is None else expand(units), float(threshold), count, total)


def _invalid(saliency: list[Tensor], index: int) -> ValueError:
    found = "NaN" if bool(saliency[index].isnan().any()) else "negative values"
    return ValueError(f"saliency[{index}] holds {found}: saliency must be finite or inf, and not negative")


Expand = Callable[[list[BitMask]], list[BitMask]]


def _matrices(saliency: list[Tensor]) -> list[Tensor]:
    for i, s in enumerate(saliency):
        if s.dtype != torch.float32:
            raise TypeError(f"saliency[{i}] must be float32, not {s.dtype}: convert it with .float()")
        if s.dim() < 2:
            raise ValueError(f"saliency[{i}] must have at least two dimensions [N, ...], not {list(s.shape)}")
    return [s.reshape(s.shape[0], math.prod(s.shape[1:])) for s in saliency]


def _tile_units(saliency: list[Tensor], tile: int) -> tuple[list[Tensor], Expand]:
    matrices = _matrices(saliency)
    scores = []
    for s in matrices:
        padded = torch.nn.functional.pad(s, (0, -s.shape[1] % tile, 0, -s.shape[0] % tile))
        scores.append(padded.unflatten(1, (-1, tile)).sum(2).unflatten(0, (-1, tile)).sum(1))

    def expand(units: list[BitMask]) -> list[BitMask]:
        masks = []
        for unit, s in zip(units, matrices, strict=True):
            wide = unit.unpack().repeat_interleave(tile, 0)[: s.shape[0]].repeat_interleave(tile, 1)[:, : s.shape[1]]
            masks.append(BitMask.pack(wide))
        return masks

    return scores, expand


def _channel_units(saliency: list[Tensor]) -> tuple[list[Tensor], Expand]:
    matrices = _matrices(saliency)
    # An empty tensor has no rows or columns to compete: its mean over nothing would be NaN.
    scores = [torch.cat([s.mean(1), s.mean(0)])[None] if s.numel() else s.new_empty((1, 0)) for s in matrices]

    def expand(units: list[BitMask]) -> list[BitMask]:
        masks = []
        for unit, s in zip(units, matrices, strict=True):
            if s.numel() == 0:
                masks.append(BitMask.pack(torch.zeros_like(s, dtype=torch.bool)))
                continue
            rows, columns = unit.unpack()[0].split(list(s.shape))
            masks.append(BitMask.pack(rows[:, None] | columns[None, :]))
        return masks

    return scores, expand


def _module_units(saliency: list[Tensor]) -> tuple[list[Tensor], Expand]:
    matrices = _matrices(saliency)
    scores = [s.mean().reshape(1, 1) if s.numel() else s.new_empty((1, 0)) for s in matrices]

    def expand(units: list[BitMask]) -> list[BitMask]:
        return [BitMask.pack(unit.unpack().any().expand(s.shape)) for unit, s in zip(units, matrices, strict=True)]

    return scores, expand
