"""Distance between two models' images of the same prompts and seeds, in pixels.

Accuracies saturate: a model may still be judged right while it draws everything differently. Drift of the retained
prompts is the finer measure of collateral change; it needs no judge and no network.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fade.evaluation.intervals import mean_interval
from fade.evaluation.metrics.metric import Drawn, Interval, Metric, Value


def rms_difference(images: Tensor, others: Tensor) -> float:
    """Root mean square difference over all images, channels and pixels, in the units of the pixels ([0, 1] here).

    Both are float tensors [n, 3, H, W], image i of the one paired with image i of the other. Raises ValueError for
    tensors of different shape and for none at all.
    """
    if images.shape != others.shape:
        raise ValueError(f"images to compare have shapes {tuple(images.shape)} and {tuple(others.shape)}")
    if images.numel() == 0:
        raise ValueError("there are no images to compare")
    return (images.double() - others.double()).square().mean().sqrt().item()


def _measured(forgotten: bool) -> Callable[[Drawn], Value]:
    def measure(drawn: Drawn) -> Value:
        counted = drawn.answers.forgotten == forgotten
        if not bool(counted.any()):
            return Value(None)
        images, others = drawn.adapted[counted], drawn.base[counted]
        squares = [
            (image.double() - other.double()).square().mean() for image, other in zip(images, others, strict=True)
        ]
        low, high = mean_interval(torch.stack(squares))
        return Value(rms_difference(images, others), interval=Interval(low**0.5, high**0.5, len(images)))

    return measure


METRICS = (
    Metric("drift", "RMS pixel change of retained images", "of the pixel range", "lower", _measured(False), digits=4),
    Metric(
        "drift_forget",
        "RMS pixel change of forgotten images",
        "of the pixel range",
        "higher",
        _measured(True),
        digits=4,
    ),
)
