"""CLIP score (Hessel et al., arXiv 2104.08718): how well pictures fit their prompts, 100 · max(cos, 0) as torchmetrics
scales it. Of retained prompts it should stay what it was, of forgotten ones it should fall."""

from collections.abc import Callable

from torch import Tensor

from fade.evaluation.intervals import mean_interval
from fade.evaluation.metrics.metric import Drawn, Interval, Metric, Value


def scores(drawn: Drawn) -> tuple[Tensor, Tensor]:
    """Of every picture of the base and of the adapted model: float64 [n] each."""
    assert drawn.clip is not None
    base, adapted = (drawn.clip.score(images, drawn.answers.prompts) for images in (drawn.base, drawn.adapted))
    return base, adapted


def _measured(forgotten: bool) -> Callable[[Drawn], Value]:
    def measure(drawn: Drawn) -> Value:
        counted = drawn.answers.forgotten == forgotten
        if not bool(counted.any()):
            return Value(None)
        base, adapted = (found[counted] for found in drawn.once(scores))
        return Value(
            adapted.mean().item(), base.mean().item(), Interval(*mean_interval(adapted), len(adapted)),
            Interval(*mean_interval(adapted - base), len(adapted)),
        )  # fmt: skip

    return measure


METRICS = (
    Metric("CLIP", "fit of retained images to their prompts", "", "higher", _measured(False), 2, needs="clip"),
    Metric("CLIP_forget", "the same of forgotten prompts", "", "lower", _measured(True), 2, needs="clip"),
)
"""100 times a cosine each."""
