"""An LPIPS-like distance between both models' pictures of the same prompt and seed.

LPIPS (Zhang et al., arXiv 1801.03924) weighs the channels of AlexNet or VGG by what people find alike; its weights are
not here (`fade.evaluation.metrics.lpips` takes them). This is its formula on the features that the evaluation has, with
all weights 1 (the paper's unlearned baseline): numbers are comparable within one extractor, and not with LPIPS.
"""

import torch
from torch import Tensor

from fade.evaluation.metrics.metric import Drawn, Metric, mean_of

_AT_ONCE = 8


def feature_distance(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Σ over layers of the mean over places of ‖x̂ − ŷ‖², x̂ and ŷ of unit length over channels; [n, C, h, w] a layer
    on both sides -> float64 [n]."""

    def unit(features: Tensor) -> Tensor:
        features = features.double()
        return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)

    layers = [(unit(x) - unit(y)).square().sum(1).mean((1, 2)) for x, y in zip(first, second, strict=True)]
    return torch.stack(layers).sum(0)


def distances(drawn: Drawn) -> Tensor:
    """Of every pair of pictures: float64 [n]."""
    assert drawn.features is not None
    pairs = zip(drawn.base.split(_AT_ONCE), drawn.adapted.split(_AT_ONCE), strict=True)
    return torch.cat([feature_distance(drawn.features.maps(base), drawn.features.maps(new)) for base, new in pairs])


METRICS = (
    Metric(
        "LPIPS-like", "feature change of retained images", "", "lower", mean_of(distances, forgotten=False), 4,
        needs="features",
    ),
    Metric(
        "LPIPS-like_forget", "feature change of forgotten images", "", "higher", mean_of(distances, forgotten=True), 4,
        needs="features",
    ),
)  # fmt: skip
