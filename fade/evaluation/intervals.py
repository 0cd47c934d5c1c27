"""Confidence intervals of 95 %: Wilson's of a share, the bootstrap's of anything else, paired where base and adapted
model drew the same prompts from the same seeds.

Images are treated as independent draws. The bootstrap (Efron, 1979) resamples images with a fixed seed, so that the
same images give the same interval, and takes percentiles.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RESAMPLES = 1000


def wilson_interval(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default, as fractions; (0, 1) when nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low = 0.0 if right == 0 else max(0.0, centre - half)
    high = 1.0 if right == total else min(1.0, centre + half)
    return low, high


def resampled(count: int, resamples: int = RESAMPLES) -> Tensor:
    """How often each of `count` images is in each resample: float64 [resamples, count], rows of sum `count`."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(count, (resamples, count), generator=generator)
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(1, picks, torch.ones_like(picks).double())


def percentiles(statistics: Tensor) -> tuple[float, float]:
    """The middle 95 % of a statistic's resamples, float64 [resamples]; those that are NaN are left out."""
    found = statistics[~statistics.isnan()]
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def mean_interval(values: Tensor) -> tuple[float, float]:
    """Bootstrap interval of the mean of one number an image, [n]. Of differences of pairs, it is the paired one."""
    return percentiles(resampled(len(values)) @ values.double() / len(values))


def grouped_interval(values: Sequence[Tensor]) -> tuple[float, float]:
    """Bootstrap interval of a mean over groups of each group's mean, as an accuracy over receivers is.

    `values` has one tensor [n_g] for each group; all images are resampled together, and a group that a resample misses
    is left out of it.
    """
    pooled = torch.cat(list(values)).double()
    groups = torch.cat([torch.full((len(part),), index) for index, part in enumerate(values)])
    member = torch.nn.functional.one_hot(groups, len(values)).double()
    weights = resampled(len(pooled))
    return percentiles(((weights * pooled) @ member / (weights @ member)).nanmean(1))
