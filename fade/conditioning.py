"""What prompts become: named tensors with a row for each prompt, as a model family's text encoders give them.

Only the backbone that made a conditioning knows what its tensors mean; everything else picks rows, joins and moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

Rows = Tensor | tuple[Tensor, ...]
"""Of every prompt a row: a tensor [n, …], or, where rows differ in size (a text of its own length), n tensors."""


class Conditioning(Mapping[str, Rows]):
    """n prompts, encoded: names to tensors [n, …], or to tuples of n tensors where their sizes differ.

    Immutable. `conditioning[name]` is one of its tensors, `rows(index)` another conditioning. Raises ValueError where
    the tensors do not have as many rows as one another.
    """

    __slots__ = ("_rows", "_tensors")

    def __init__(self, tensors: Mapping[str, Rows]) -> None:
        self._tensors = dict(tensors)
        counts = {name: len(value) for name, value in self._tensors.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"a conditioning needs tensors with a row for each prompt, got {counts}")
        self._rows = next(iter(counts.values()))

    def __getitem__(self, name: str) -> Rows:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        """The number of its tensors, as of any mapping; of prompts: `count`."""
        return len(self._tensors)

    @property
    def count(self) -> int:
        """The number of prompts, n."""
        return self._rows

    def rows(self, index: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """Those rows, in that order; of an integer the one row, still as a batch."""
        if isinstance(index, int):
            index = [index]
        if isinstance(index, Tensor):
            index = index.tolist()
        if isinstance(index, slice):
            return self._each(lambda value: value[index])
        picked = list(index)
        return self._each(lambda v: v[picked] if isinstance(v, Tensor) else tuple(v[i] for i in picked))

    def repeat(self, count: int) -> Conditioning:
        """The one row, `count` times, without a copy. Raises ValueError where there are more."""
        if self.count != 1:
            raise ValueError(f"only a single prompt can be repeated, not {self.count}")
        return self._each(
            lambda value: value.expand(count, *value.shape[1:]) if isinstance(value, Tensor) else value * count
        )

    def stacked(self) -> Conditioning:
        """Rows that have one size each, as tensors. Raises ValueError where sizes differ."""
        sizes = {name: {row.shape for row in value} for name, value in self.items() if not isinstance(value, Tensor)}
        if any(len(found) > 1 for found in sizes.values()):
            raise ValueError(f"rows of different sizes cannot be stacked: {self}")
        return self._each(lambda value: value if isinstance(value, Tensor) else torch.stack(value))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, one after the other. Raises ValueError where their tensors have other names."""
        first = parts[0]
        if any(part.keys() != first.keys() for part in parts):
            raise ValueError(f"conditionings with other tensors cannot be joined: {[sorted(part) for part in parts]}")

        def joined(values: list[Rows]) -> Rows:
            if all(isinstance(value, Tensor) for value in values):
                same = {value.shape[1:] for value in values}
                if len(same) == 1:
                    return torch.cat(values)
            return tuple(chain.from_iterable(values))

        return Conditioning({name: joined([part[name] for part in parts]) for name in first})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """The same on a device; floating-point tensors in `dtype`, too, where it is given."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        return self._map(moved)

    def detach(self) -> Conditioning:
        """The same, cut from whatever made it."""
        return self._map(Tensor.detach)

    def float(self) -> Conditioning:
        """Floating-point tensors in float32."""
        return self._map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)

    def equal(self, other: Conditioning) -> bool:
        """Whether both hold the same numbers."""
        return self.keys() == other.keys() and all(
            len(ours) == len(theirs)
            and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            for ours, theirs in ((self[name], other[name]) for name in self)
        )

    def tensors(self) -> dict[str, Tensor]:
        """All numbers as tensors by name, for a file: those of rows of different sizes as NAME.0, NAME.1, …"""
        found = {}
        for name, value in self.items():
            if isinstance(value, Tensor):
                found[name] = value
            else:
                found |= {f"{name}.{row}": tensor for row, tensor in enumerate(value)}
        return found

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Conditioning:
        """The conditioning whose `tensors()` these are. Raises ValueError where rows are missing."""
        whole: dict[str, Rows] = {}
        ragged: dict[str, dict[int, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, row = key.rpartition(".")
            if name and row.isdecimal():
                ragged.setdefault(name, {})[int(row)] = tensor
            else:
                whole[key] = tensor
        for name, found in ragged.items():
            if sorted(found) != list(range(len(found))):
                raise ValueError(f"rows of {name} are missing")
            whole[name] = tuple(found[row] for row in range(len(found)))
        return Conditioning(whole)

    def _each(self, change: Callable[[Rows], Rows]) -> Conditioning:
        return Conditioning({name: change(value) for name, value in self.items()})

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return self._each(lambda value: change(value) if isinstance(value, Tensor) else tuple(map(change, value)))

    def __repr__(self) -> str:
        shown = {
            name: list(value.shape) if isinstance(value, Tensor) else [list(row.shape) for row in value]
            for name, value in self.items()
        }
        return f"Conditioning({self.count} prompts: {shown})"


class EncodedPrompts:
    """Every prompt of a run, encoded once."""

    def __init__(self, prompts: Sequence[str], conditioning: Conditioning) -> None:
        """Raises ValueError where there is not a row for each of the (different) prompts."""
        if len(set(prompts)) != len(prompts) or len(prompts) != conditioning.count:
            raise ValueError(f"{conditioning.count} rows for {len(set(prompts))} different prompts")
        self.conditioning = conditioning
        self._row = {prompt: row for row, prompt in enumerate(prompts)}

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(self._row)

    def rows(self, prompts: Sequence[str]) -> Tensor:
        """Which rows of `conditioning` the prompts are: int64 [n]. Raises KeyError for one that is not among them."""
        return torch.tensor([self._row[prompt] for prompt in prompts], dtype=torch.int64)

    def __getitem__(self, prompt: str) -> Conditioning:
        """The one row of a prompt."""
        return self.conditioning.rows(self._row[prompt])
