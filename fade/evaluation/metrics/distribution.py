"""How far the adapted model's pictures of retained prompts are, as a whole, from the base model's: FID, KID, precision
and recall, on whatever features the evaluation has.

What is compared is the answer set without what is to be forgotten, as UnlearnCanvas does; it has real pictures on the
other side, which nobody has for a concept of their own, so the base model's pictures of the same prompts and seeds
stand there. FID-real and KID-real compare both models with a folder of real pictures, where one is given. The features
are not Inception's unless such a model is given: compare numbers of one extractor alone.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fade.evaluation.intervals import (
    jackknife_interval,
    percentiles,
    resampled,
    wilson_interval,
    without_each_group,
)
from fade.evaluation.metrics.metric import Drawn, Interval, Metric, Value

NEIGHBOURS = 3
"""k of Kynkäänniemi et al."""


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """FID (Heusel et al., arXiv 1706.08500): ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), of features [n, D] and [m, D].

    In float64; Σ has n − 1 below. Biased upwards, the more the fewer pictures. Raises ValueError for fewer than two.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError("the Fréchet distance needs two pictures a side at least")
    (mean, root, trace), (other_mean, other_root, other_trace) = map(_moments, (first, second))
    # The singular values of Σ₁^½ Σ₂^½ are the square roots of the eigenvalues of Σ₁Σ₂.
    cross = torch.linalg.svdvals(root @ other_root.T).sum()
    return max(0.0, float((mean - other_mean).square().sum() + trace + other_trace - 2 * cross))


def _moments(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, a matrix R with RᵀR the covariance, and the trace of that."""
    features = features.double()
    mean = features.mean(0)
    centred = (features - mean) / math.sqrt(len(features) - 1)
    # The smaller of two matrices with the same RᵀR.
    root = torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred
    return mean, root, centred.square().sum()


def polynomial_kernel(first: Tensor, second: Tensor) -> Tensor:
    """(x·y / D + 1)³, KID's kernel: [n, D] and [m, D] -> float64 [n, m]."""
    return (first.double() @ second.double().T / first.shape[1] + 1) ** 3


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """KID (Bińkowski et al., arXiv 1801.01401): the unbiased squared maximum mean discrepancy of two independent sets
    of features, [n, D] and [m, D]. Over all pictures at once, where others average over random subsets."""
    own, other = (_off_diagonal(polynomial_kernel(x, x)).sum() / (len(x) * (len(x) - 1)) for x in (first, second))
    return float(own + other - 2 * polynomial_kernel(first, second).mean())


def paired_kernel_terms(first: Tensor, second: Tensor) -> Tensor:
    """h(i, j) of the U-statistic for pairs (Gretton et al., JMLR 13, 2012, eq. 4): float64 [n, n] with diagonal 0.

    Picture i of both sets is of the same prompt and seed, so the two are not independent, and a pair's likeness to
    itself must not count: `kernel_distance` would go below zero for an adapter that changes nothing, this is 0 there.
    """
    cross = polynomial_kernel(first, second)
    return _off_diagonal(polynomial_kernel(first, first) + polynomial_kernel(second, second) - cross - cross.T)


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix - matrix.diagonal().diag()


def inside(points: Tensor, manifold: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Of each point [n, D] whether it is in the manifold that [m, D] span: no farther from one of those than that one's
    k-th nearest neighbour among them is. bool [n]. Raises ValueError for a manifold of k points or fewer."""
    if len(manifold) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more than {neighbours} points, not {len(manifold)}")
    manifold = manifold.double()
    exact = "donot_use_mm_for_euclid_dist"  # equal points are at distance 0
    among = torch.cdist(manifold, manifold, compute_mode=exact)
    radii = among.kthvalue(neighbours + 1, dim=1).values  # the nearest is the point itself
    return (torch.cdist(points.double(), manifold, compute_mode=exact) <= radii).any(1)


def retained_features(drawn: Drawn) -> tuple[Tensor, Tensor]:
    """Features of the base and of the adapted model's pictures of retained prompts: two float32 [m, D]."""
    assert drawn.features is not None
    kept = ~drawn.answers.forgotten
    return drawn.features(drawn.base[kept]), drawn.features(drawn.adapted[kept])


def _fid(drawn: Drawn) -> Value:
    base, adapted = drawn.once(retained_features)
    count, width = adapted.shape
    if count <= width:
        kid = f"KID is {number:.4g}" if (number := _kid(drawn).adapted) is not None else "more seeds draw more"
        return Value(None, note=f"needs more than {width} images for {width} features, there are {count}; {kid}")
    groups = without_each_group(count)
    left = torch.tensor([frechet_distance(base[kept], adapted[kept]) for kept in groups], dtype=torch.float64)
    found = frechet_distance(base, adapted)
    low, high = jackknife_interval(found, left)
    return Value(found, interval=Interval(max(0.0, low), high, count))


def _kid(drawn: Drawn) -> Value:
    base, adapted = drawn.once(retained_features)
    if len(adapted) < 2:
        return Value(None, note="needs two images of retained prompts at least")
    terms = paired_kernel_terms(base, adapted)
    weights = resampled(len(terms))
    estimates = _among(weights, terms)
    found = float(terms.sum() / (len(terms) * (len(terms) - 1)))
    return Value(found, interval=Interval(*percentiles(estimates), len(terms)))


def _shares(adapted_in_base: bool) -> Callable[[Drawn], Value]:
    def measure(drawn: Drawn) -> Value:
        base, adapted = drawn.once(retained_features)
        if len(adapted) <= NEIGHBOURS:
            return Value(None, note=f"needs more than {NEIGHBOURS} images of retained prompts")
        hits = inside(adapted, base) if adapted_in_base else inside(base, adapted)
        low, high = wilson_interval(int(hits.sum()), len(hits))
        return Value(100.0 * hits.double().mean().item(), interval=Interval(100.0 * low, 100.0 * high, len(hits)))

    return measure


def _to_real(measured: Callable[[Tensor, Tensor, Tensor], Value], whole_rank: bool) -> Callable[[Drawn], Value]:
    """How a distance to real pictures is measured, of features (base, adapted, real)."""

    def measure(drawn: Drawn) -> Value:
        base, adapted = drawn.once(retained_features)
        assert drawn.real is not None
        count, width = min(len(adapted), len(drawn.real)), adapted.shape[1]
        if whole_rank and count <= width:
            return Value(None, note=f"needs more than {width} images a side for {width} features, there are {count}")
        if count < 2:
            return Value(None, note="needs two images of retained prompts and two real ones at least")
        return measured(base, adapted, drawn.real)

    return measure


def _fid_to_real(base: Tensor, adapted: Tensor, real: Tensor) -> Value:
    def distances(kept: Tensor, kept_real: Tensor) -> tuple[float, float]:
        return tuple(frechet_distance(real[kept_real], drew[kept]) for drew in (base, adapted))

    count = len(adapted)
    everything = torch.ones(count, dtype=torch.bool), torch.ones(len(real), dtype=torch.bool)
    before, after = distances(*everything)
    groups = zip(without_each_group(count), without_each_group(len(real)), strict=True)
    left = torch.tensor([distances(*group) for group in groups], dtype=torch.float64)
    low, high = jackknife_interval(after, left[:, 1])
    change = jackknife_interval(after - before, left[:, 1] - left[:, 0])
    return Value(after, before, Interval(max(0.0, low), high, count), Interval(*change, count))


def _kid_to_real(base: Tensor, adapted: Tensor, real: Tensor) -> Value:
    count = len(adapted)
    weights, of_real = resampled(count), resampled(len(real), seed=1)
    among_real = _among(of_real, _off_diagonal(polynomial_kernel(real, real)))

    def estimates(drew: Tensor) -> Tensor:
        """The distance in every resample, of which both models' and the real pictures are the same."""
        own = _among(weights, _off_diagonal(polynomial_kernel(drew, drew)))
        cross = ((weights @ polynomial_kernel(drew, real)) * of_real).sum(1) / (count * len(real))
        return own + among_real - 2 * cross

    before, after = estimates(base), estimates(adapted)
    return Value(
        kernel_distance(real, adapted), kernel_distance(real, base), Interval(*percentiles(after), count),
        Interval(*percentiles(after - before), count),
    )  # fmt: skip


def _among(weights: Tensor, terms: Tensor) -> Tensor:
    """The mean of a term for pairs, [n, n] with diagonal 0, in each resample, [resamples, n], over its pairs without
    those of an image with itself; NaN where there are none."""
    pairs = weights.sum(1).square() - weights.square().sum(1)
    return ((weights @ terms) * weights).sum(1) / pairs


METRICS = (
    Metric("FID", "Fréchet distance of retained images to base's", "", "lower", _fid, 4, needs="features"),
    Metric("KID", "kernel distance of the same, for few images", "", "lower", _kid, None, needs="features"),
    Metric(
        "precision", "% of retained images within base's variety", "%", "higher",
        _shares(True), needs="features",
    ),
    Metric(
        "recall", "% of base's variety that they still cover", "%", "higher", _shares(False),
        needs="features",
    ),
    Metric(
        "FID-real", "Fréchet distance to real images", "", "lower", _to_real(_fid_to_real, True), 4, needs="real",
    ),
    Metric(
        "KID-real", "kernel distance to real images", "", "lower", _to_real(_kid_to_real, False), None, needs="real",
    ),
)  # fmt: skip
