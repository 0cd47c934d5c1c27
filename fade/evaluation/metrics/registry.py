"""The metrics that there are, in the order in which they are shown."""

from collections.abc import Sequence

from fade.errors import FadeError
from fade.evaluation.metrics import (
    clip_score,
    composition,
    distribution,
    drift,
    entangled,
    lpips,
    perceptual,
    phrasings,
    unlearncanvas,
)
from fade.evaluation.metrics.metric import Metric

METRICS: tuple[Metric, ...] = (
    *unlearncanvas.METRICS,
    *drift.METRICS,
    *composition.METRICS,
    *distribution.METRICS,
    *perceptual.METRICS,
    *lpips.METRICS,
    *clip_score.METRICS,
    *entangled.METRICS,
    *phrasings.METRICS,
)


def known_metrics(names: Sequence[str]) -> tuple[Metric, ...]:
    """The metrics of these names. Raises FadeError for another name, with those that there are."""
    by_name = {metric.name: metric for metric in METRICS}
    for name in names:
        if name not in by_name:
            raise FadeError(f"there is no metric {name!r}; there are {', '.join(by_name)}")
    return tuple(by_name[name] for name in names)
