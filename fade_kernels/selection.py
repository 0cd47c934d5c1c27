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
from fade_kernels.bitmask import BitMask, gather_masked, scatter_masked_

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
    selection = GroupedSelection(sum(s.numel() for s in saliency), keep, granularity, tile)
    selection.add(saliency)
    return selection.result()


class GroupedSelection:
    """`select_top_fraction` of tensors that are not all there at once; the same units, ties included.

        selection = GroupedSelection(weights, keep=0.01)
        for group in groups:
            selection.add(group)  # which may be freed then
        masks = selection.result().masks

    Between two groups it holds in host memory what may still be selected: of weights the values of no more than k and a
    bit for each, of other units their scores. Where the first group is all there is, nothing is copied.
    """

    def __init__(self, weights: int, keep: float, granularity: str = "element", tile: int = 32) -> None:
        """Prepares for groups of so many weights in all. Other arguments, and ValueError, as `select_top_fraction`."""
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"keep must be in (0, 1], got {keep}")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {granularity!r}")
        if tile < 1:
            raise ValueError(f"tile must be at least 1, got {tile}")
        self._weights, self._keep, self._granularity, self._tile = weights, keep, granularity, tile
        self._added, self._tensors = 0, 0
        self._masks: list[BitMask] = []  # element: of what may still be selected
        self._values: list[Tensor] = []  # element: [count] of each mask, unless all was added at once
        self._threshold: float | None = None
        self._scores: list[Tensor] = []  # of other units
        self._expand: list[tuple[Expand, int]] = []  # and what makes masks of so many of them
        if granularity == "element":
            self._count = _kept(keep, weights, granularity)

    def add(self, saliency: Sequence[Tensor]) -> None:
        """Takes the next tensors, float32 [N, ...]. Raises as `select_top_fraction`; NaN is in tensor i of all."""
        saliency = [s.detach() for s in saliency]
        if self._granularity == "element":
            self._add_weights(saliency)
        else:
            self._add_units(saliency)
        self._added += sum(s.numel() for s in saliency)
        self._tensors += len(saliency)

    def result(self) -> Selection:
        """What is selected of all that was added; the masks are in host memory where it was several groups.

        Raises ValueError where that is another number of weights than was said, or nothing.
        """
        if self._added != self._weights:
            raise ValueError(f"{self._weights} weights were to come, and {self._added} did: add every group once")
        if self._granularity == "element":
            if self._threshold is None:
                self._threshold = min(float(values.abs().min()) for values in self._values if values.numel())
            return Selection(self._masks, self._threshold, self._count, self._weights)
        total = sum(s.numel() for s in self._scores)
        count = _kept(self._keep, total, self._granularity)
        words, threshold, _ = _ops.select_top_k(self._scores, count)
        units = iter(BitMask._trusted(w, tuple(s.shape)) for w, s in zip(words, self._scores, strict=True))
        masks = [mask for expand, length in self._expand for mask in expand([next(units) for _ in range(length)])]
        return Selection(masks, float(threshold), count, total)

    def _add_weights(self, saliency: list[Tensor]) -> None:
        size = sum(s.numel() for s in saliency)
        shapes = [(s.shape[0], math.prod(s.shape[1:])) for s in saliency]
        if size == 0:
            self._masks += [BitMask.pack(torch.zeros(shape, dtype=torch.bool)) for shape in shapes]
            self._values += [torch.zeros(0) for _ in shapes]
            return
        # What is not among the k highest of its own group is not among those of all.
        words, threshold, invalid = _ops.select_top_k(saliency, min(self._count, size))
        if int(invalid) >= 0:
            raise _invalid(saliency[int(invalid)], self._tensors + int(invalid))
        masks = [BitMask._trusted(w, shape) for w, shape in zip(words, shapes, strict=True)]
        if size == self._weights and not self._masks:
            self._masks, self._threshold = masks, float(threshold)
            return
        self._values += [gather_masked(s, mask).cpu() for s, mask in zip(saliency, masks, strict=True)]
        self._masks += [mask.to("cpu") for mask in masks]
        if sum(values.numel() for values in self._values) > self._count:
            self._drop()

    def _drop(self) -> None:
        """Leaves the k highest of what may be selected: a mask's values are in the order of its bits, so that ties go
        where they would among the weights themselves."""
        words, _, _ = _ops.select_top_k([values[None] for values in self._values], self._count)
        for i, (word, values) in enumerate(zip(words, self._values, strict=True)):
            kept = _ops.unpack_mask(word, values.numel())[0]
            if not bool(kept.all()):
                bits = torch.zeros(self._masks[i].shape, dtype=torch.bool)
                self._masks[i] = BitMask.pack(scatter_masked_(bits, kept, self._masks[i]))
                self._values[i] = values[kept]

    def _add_units(self, saliency: list[Tensor]) -> None:
        for i, s in enumerate(saliency):
            if s.numel() and not bool(s.min() >= 0):
                raise _invalid(s, self._tensors + i)
        if self._granularity == "tile":
            scores, expand = _tile_units(saliency, self._tile)
        elif self._granularity == "channel":
            scores, expand = _channel_units(saliency)
        else:
            scores, expand = _module_units(saliency)
        everything = sum(s.numel() for s in saliency) == self._weights
        self._scores += scores if everything else [score.cpu() for score in scores]
        self._expand.append((expand, len(scores)))


def _kept(keep: float, total: int, granularity: str) -> int:
    """How many of so many units are kept. Raises ValueError where that is none."""
    if total == 0:
        raise ValueError("there is no saliency to select from: the list is empty or all of its tensors are")
    count = math.floor(keep * total)
    if count == 0:
        smallest = 1 / total
        while math.floor(smallest * total) == 0:
            smallest = math.nextafter(smallest, 1.0)
        raise ValueError(f"keep {keep} selects none of {total} {granularity} units: use at least {smallest}")
    return count


def _invalid(saliency: Tensor, index: int) -> ValueError:
    found = "NaN" if bool(saliency.isnan().any()) else "negative values"
    return ValueError(f"saliency[{index}] holds {found}: saliency must be finite or inf, and not negative")


Expand = Callable[[list[BitMask]], list[BitMask]]


def _matrices(saliency: list[Tensor]) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """The tensors as [N, K], and those shapes: what makes masks of units must not keep the tensors."""
    for i, s in enumerate(saliency):
        if s.dtype != torch.float32:
            raise TypeError(f"saliency[{i}] must be float32, not {s.dtype}: convert it with .float()")
        if s.dim() < 2:
            raise ValueError(f"saliency[{i}] must have at least two dimensions [N, ...], not {list(s.shape)}")
    shapes = [(s.shape[0], math.prod(s.shape[1:])) for s in saliency]
    return [s.reshape(shape) for s, shape in zip(saliency, shapes, strict=True)], shapes


def _tile_units(saliency: list[Tensor], tile: int) -> tuple[list[Tensor], Expand]:
    matrices, shapes = _matrices(saliency)
    scores = []
    for s in matrices:
        padded = torch.nn.functional.pad(s, (0, -s.shape[1] % tile, 0, -s.shape[0] % tile))
        scores.append(padded.unflatten(1, (-1, tile)).sum(2).unflatten(0, (-1, tile)).sum(1))

    def expand(units: list[BitMask]) -> list[BitMask]:
        masks = []
        for unit, (rows, columns) in zip(units, shapes, strict=True):
            wide = unit.unpack().repeat_interleave(tile, 0)[:rows].repeat_interleave(tile, 1)[:, :columns]
            masks.append(BitMask.pack(wide))
        return masks

    return scores, expand


def _channel_units(saliency: list[Tensor]) -> tuple[list[Tensor], Expand]:
    matrices, shapes = _matrices(saliency)
    # An empty tensor has no rows or columns to compete: its mean over nothing would be NaN.
    scores = [torch.cat([s.mean(1), s.mean(0)])[None] if s.numel() else s.new_empty((1, 0)) for s in matrices]

    def expand(units: list[BitMask]) -> list[BitMask]:
        masks = []
        for unit, shape in zip(units, shapes, strict=True):
            if math.prod(shape) == 0:
                masks.append(BitMask.pack(torch.zeros(shape, dtype=torch.bool, device=unit.device)))
                continue
            rows, columns = unit.unpack()[0].split(list(shape))
            masks.append(BitMask.pack(rows[:, None] | columns[None, :]))
        return masks

    return scores, expand


def _module_units(saliency: list[Tensor]) -> tuple[list[Tensor], Expand]:
    matrices, shapes = _matrices(saliency)
    scores = [s.mean().reshape(1, 1) if s.numel() else s.new_empty((1, 0)) for s in matrices]

    def expand(units: list[BitMask]) -> list[BitMask]:
        return [BitMask.pack(unit.unpack().any().expand(shape)) for unit, shape in zip(units, shapes, strict=True)]

    return scores, expand
