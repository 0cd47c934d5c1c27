"""Confidence intervals of 95 %: Wilson's of a share, the jackknife's of a Fréchet distance, the bootstrap's of anything
else. What the adapter changed has one that is paired, as both models drew the same prompts from the same seeds.

Images are treated as independent draws. The bootstrap (Efron, 1979) resamples images with a fixed seed, so that the
same images give the same interval, and takes percentiles. The jackknife leaves groups of images out in turn: where a
resample's repeated images would raise a distance that is the higher the fewer different ones there are.
"""

import math

import torch
from torch import Tensor

RESAMPLES = 1000
GROUPS = 20
"""Of images, that the jackknife leaves out in turn."""
_Z = 1.959964


def wilson_interval(right: int, total: int, z: float = _Z) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default, as fractions; (0, 1) when nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low = 0.0 if right == 0 else max(0.0, centre - half)
    high = 1.0 if right == total else min(1.0, centre + half)
    return low, high


def paired_share_interval(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Newcombe's interval of the change of a share, of pairs: bool [n] and [n] -> fractions in [-1, 1].

    Wilson's intervals of both shares, combined by how the two go together (Newcombe, Stat. Med. 17, 1998, method 10).
    Unlike a bootstrap's it does not shrink to nothing where every pair, or none, has changed.
    """
    both, only_before, only_after, neither = (
        int((first & second).sum()) for first in (before, ~before) for second in (after, ~after)
    )
    total = len(before)
    shares, lows, highs = [], [], []
    for right in (both + only_after, both + only_before):
        low, high = wilson_interval(right, total)
        share = right / total
        shares.append(share)
        lows.append(share - low)
        highs.append(high - share)
    margins = math.prod((both + only_before, only_after + neither, both + only_after, only_before + neither))
    cross = both * neither - only_before * only_after
    if cross > 0:
        cross = max(cross - total / 2, 0.0)
    together = cross / math.sqrt(margins) if margins else 0.0
    change = shares[0] - shares[1]
    down = math.sqrt(max(0.0, lows[0] ** 2 - 2 * together * lows[0] * highs[1] + highs[1] ** 2))
    up = math.sqrt(max(0.0, highs[0] ** 2 - 2 * together * highs[0] * lows[1] + lows[1] ** 2))
    return change - down, change + up


def resampled(count: int, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """How often each of `count` images is in each resample: float64 [resamples, count], rows of sum `count`. Samples
    that are independent of one another take different seeds."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(count, (resamples, count), generator=generator)
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(1, picks, torch.ones_like(picks).double())


def percentiles(statistics: Tensor) -> tuple[float, float]:
    """The middle 95 % of a statistic's resamples, float64 [resamples]; those that are NaN are left out."""
    found = statistics[~statistics.isnan()]
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def without_each_group(count: int) -> list[Tensor]:
    """Of `count` images, those that are left without each group in turn: bool [count], `GROUPS` of them."""
    return [torch.arange(count) % GROUPS != group for group in range(GROUPS)]


def jackknife_interval(found: float, left: Tensor) -> tuple[float, float]:
    """Of a statistic, its value and those [GROUPS] without each group (Quenouille, 1956; Tukey, 1958): normal, with the
    delete-a-group jackknife's variance. Two samples that lose their groups together have the sum of both variances."""
    spread = math.sqrt((len(left) - 1) / len(left) * float((left - left.mean()).square().sum()))
    return found - _Z * spread, found + _Z * spread


def mean_interval(values: Tensor) -> tuple[float, float]:
    """Bootstrap interval of the mean of one number an image, [n]. Of differences of pairs, it is the paired one."""
    return percentiles(resampled(len(values)) @ values.double() / len(values))
