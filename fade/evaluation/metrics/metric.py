"""What a metric is: a name and its meaning, and how it is measured on what both models drew.

A metric file has one or more `Metric`s in its `METRICS`, which one line of `registry` enters; table, JSON, report and
`--require` go through the registry and know none by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import Tensor

from fade.evaluation.intervals import mean_interval

if TYPE_CHECKING:
    from fade.evaluation.answers import AnswerSet
    from fade.evaluation.clip_judge import Clip
    from fade.evaluation.features import FeatureExtractor
    from fade.evaluation.metrics.lpips import Lpips
    from fade.evaluation.metrics.phrasings import PhrasingResult

T = TypeVar("T")


@dataclass(frozen=True)
class Drawn:
    """The pictures of both models, and what was made of them.

    `base` and `adapted` are float32 [n, 3, H, W] in [0, 1], picture i of both from prompt and seed i of `answers`;
    `judged_base` and `judged_adapted` the judges' classes, int64 [n] a domain. The rest is there where asked for;
    `real` are features [m, D] of real pictures.
    """

    answers: AnswerSet
    base: Tensor
    adapted: Tensor
    judged_base: Mapping[str, Tensor]
    judged_adapted: Mapping[str, Tensor]
    features: FeatureExtractor | None = None
    clip: Clip | None = None
    phrasings: PhrasingResult | None = None
    real: Tensor | None = None
    lpips: Lpips | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The number of classes of each domain."""
        return {domain: len(words) for domain, words in self.answers.classes.items()}

    @cached_property
    def _found(self) -> dict[Any, Any]:
        return {}

    def once(self, work: Callable[[Drawn], T]) -> T:
        """What `work` makes of this, which several metrics share and only the first one computes."""
        if work not in self._found:
            self._found[work] = work(self)
        return self._found[work]


@dataclass(frozen=True)
class Interval:
    """95 % of what a number may be, in its unit, and the images behind it."""

    low: float
    high: float
    images: int

    def to_dict(self) -> dict[str, float | int]:
        return {"images": self.images, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Value:
    """What a metric comes to. None is undefined here, for the reason in `note` where it is not plain.

    `base` is the base model's, where the metric is not itself a comparison with that; `change` is the interval of
    `adapted` − `base`, paired by prompt and seed.
    """

    adapted: float | None
    base: float | None = None
    interval: Interval | None = None
    change: Interval | None = None
    note: str = ""


@dataclass(frozen=True)
class Metric:
    """One number about an adapter."""

    name: str
    meaning: str
    """What it says, for people."""
    unit: str
    """Of the number; empty where it has none."""
    better: Literal["higher", "lower"]
    measure: Callable[[Drawn], Value]
    digits: int | None = 1
    """Decimals that people are shown; None is three significant digits."""
    shown: bool = True
    """In tables; JSON has every metric."""
    needs: Literal["", "features", "clip", "phrasings", "real", "lpips"] = ""
    """The part of `Drawn` without which it is not measured."""

    def text(self, number: float | None) -> str:
        """A number of this metric as tables show it."""
        if number is None:
            return ""
        return f"{number:.3g}" if self.digits is None else f"{number:.{self.digits}f}"

    def measurable(self, drawn: Any) -> bool:
        return not self.needs or getattr(drawn, self.needs) is not None


def mean_of(distances: Callable[[Drawn], Tensor], *, forgotten: bool) -> Callable[[Drawn], Value]:
    """Measures the mean, with its interval, of one number for every pair of pictures, float64 [n], over those that name
    a forgotten concept or over the others."""

    def measure(drawn: Drawn) -> Value:
        counted = drawn.answers.forgotten == forgotten
        if not bool(counted.any()):
            return Value(None)
        found = drawn.once(distances)[counted]
        return Value(found.mean().item(), interval=Interval(*mean_interval(found), len(found)))

    return measure
