"""What an evaluation must reach: `UA=99,IRA=98`, for a check that fails when a model no longer does."""

import math
from dataclasses import dataclass

from fade.errors import FadeError
from fade.evaluation.metrics.metric import Metric, Value
from fade.evaluation.metrics.registry import known_metrics
from fade.evaluation.run import Evaluation

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Requirement:
    """At least `bound` of a metric of which more is better, at most of one of which less is, in the metric's unit."""

    metric: Metric
    bound: float

    def falls_short(self, value: Value) -> str | None:
        """In what way a value misses the bound, on one line; None where it does not."""
        name, found = self.metric.name, value.adapted
        unit = f" {self.metric.unit}" if self.metric.unit else ""
        asked = f"{'at least' if self.metric.better == 'higher' else 'at most'} {self.bound:g}{unit} is required"
        if found is None:
            return f"{name} is undefined here{f' ({value.note})' if value.note else ''}; {asked}"
        missing = self.bound - found if self.metric.better == "higher" else found - self.bound
        # NaN misses every bound.
        if missing <= _ROUNDING * max(1.0, abs(self.bound)):
            return None
        return f"{name} is {found:.6g}{unit}; {asked}"


def requirements(text: str | None) -> tuple[Requirement, ...]:
    """What `NAME=NUMBER,…` asks for. Raises FadeError for other text, unknown metrics (with the known ones), a metric
    named twice, and a percentage out of range."""
    found: dict[str, Requirement] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, separator, number = (piece.strip() for piece in part.partition("="))
        (metric,) = known_metrics([name])
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if not separator or not math.isfinite(bound):
            raise FadeError(f"{part.strip()!r} is no requirement; write a metric and a number: UA=99,IRA=98")
        if metric.unit == "%" and not 0 <= bound <= 100:
            raise FadeError(f"{name} is a percentage, so {bound:g} cannot be required of it; give 0 to 100")
        if name in found:
            raise FadeError(f"{name} is required twice; name it once")
        found[name] = Requirement(metric, bound)
    if text is not None and not found:
        raise FadeError("nothing is required; write metrics and numbers: UA=99,IRA=98")
    return tuple(found.values())


def shortfalls(evaluation: Evaluation, required: tuple[Requirement, ...]) -> list[str]:
    """One line for each requirement that an evaluation misses."""
    lines = (one.falls_short(evaluation.values[one.metric.name]) for one in required)
    return [line for line in lines if line is not None]
