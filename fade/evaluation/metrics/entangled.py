"""ForgetMe's Entangled (Yu et al., arXiv 2504.12574): what changed inside the region to forget, and outside.

The formulas are those of its code (`tools/entangled.py`). ForgetMe has pictures with an object, the same pictures with
that erased, and its mask; an evaluation of a generator has none of them, so three things here are a reconstruction:

- X is the base model's picture of a forgotten prompt, Y the adapted model's from the same seed;
- the mask is where X differs from what the base model draws in the concept's place: the absolute difference to its mean
  picture over the retained classes of the same prompt and seed, averaged over channels and cut by Otsu's threshold;
- numbers are means over pictures.

S_in is how *alike* the region to forget is before and after: as published, a concept left untouched raises S and D.
They are therefore given apart, and none replaces UA.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fade.evaluation.intervals import mean_interval
from fade.evaluation.metrics.metric import Drawn, Interval, Metric, Value

EPS = 1e-6
ALPHA = BETA = 0.5


@dataclass(frozen=True)
class Entangled:
    """One picture's numbers. With m pixels in the mask, RMSE pools pixels and channels, and is 0 for an empty region.

    s_in = 1 − RMSE(X_in, Y_in) and s_out = RMSE(X_out, Y_out); s, their harmonic mean, takes 1 − s_out. c = M·V
    compares mean and standard deviation of Y inside and outside. d is Entangled-D; Entangled-S, without X, is c.
    """

    s_in: float
    s_out: float
    s: float
    c: float
    d: float


def entangled(original: Tensor, result: Tensor, mask: Tensor) -> Entangled:
    """X, Y: float [3, H, W] in [0, 1]; mask: bool [H, W], true in the region to forget.

    Raises ValueError for shapes that do not fit.
    """
    if original.shape != result.shape or original.shape[1:] != mask.shape:
        shapes = (tuple(original.shape), tuple(result.shape), tuple(mask.shape))
        raise ValueError(f"pictures and mask have shapes {', '.join(map(str, shapes))}")
    before, after = original.double(), result.double()

    def rmse(region: Tensor) -> float:
        return (before - after)[:, region].square().mean().sqrt().item() if bool(region.any()) else 0.0

    def alike(first: float, second: float) -> float:
        return 2 * first * second / (first**2 + second**2 + EPS)

    def moments(region: Tensor) -> tuple[float, float]:
        values = after[:, region]
        return (values.mean().item(), values.std(correction=0).item()) if values.numel() else (0.0, 0.0)

    s_in, s_out = 1 - rmse(mask), rmse(~mask)
    s = 2 * s_in * (1 - s_out) / (s_in + (1 - s_out) + EPS)
    c = 1.0
    for inner, outer in zip(moments(mask), moments(~mask), strict=True):
        c *= alike(inner, outer)
    return Entangled(s_in, s_out, s, c, (ALPHA + BETA) * s * c / (ALPHA * c + BETA * s + EPS))


def otsu(values: Tensor) -> float:
    """The threshold that parts values [n] into two classes of the largest variance between them (Otsu, 1979); those
    above it are the upper class."""
    ordered = values.double().flatten().sort().values
    share = torch.arange(1, len(ordered), dtype=torch.float64) / len(ordered)
    sums = ordered.cumsum(0)[:-1] / len(ordered)
    between = (ordered.mean() * share - sums).square() / (share * (1 - share))
    return ordered[int(between.argmax())].item()


def regions(drawn: Drawn) -> dict[int, Tensor]:
    """By index of a forgotten prompt's picture, the reconstructed mask: bool [H, W]. A picture whose prompt has no
    counterpart with a retained class is left out."""
    answers = drawn.answers
    forgotten, found = answers.forgotten, {}
    for domain in answers.domains:
        words, gone = answers.classes[domain], {t.forget for t in answers.targets if t.domain == domain}
        labels = answers.prompted[domain].tolist()
        places = [
            (seed, prompt.replace(words[label], "{}"))
            for seed, prompt, label in zip(answers.seeds, answers.prompts, labels, strict=True)
        ]
        others: dict[tuple[int, str], list[int]] = {}
        for index, place in enumerate(places):
            if not forgotten[index]:
                others.setdefault(place, []).append(index)
        for index, (place, label) in enumerate(zip(places, labels, strict=True)):
            if label in gone and place in others:
                change = (drawn.base[index] - drawn.base[others[place]].mean(0)).abs().mean(0)
                found[index] = change > otsu(change)
    return found


def of_pictures(drawn: Drawn) -> dict[str, list[Entangled]]:
    """Of every picture that has a mask, of the base model (X with itself) and of the adapted one."""
    masks = regions(drawn)
    return {
        which: [entangled(drawn.base[i], images[i], mask) for i, mask in masks.items()]
        for which, images in (("base", drawn.base), ("adapted", drawn.adapted))
    }


def _part(name: str, of_one: bool = False) -> Callable[[Drawn], Value]:
    """`of_one`: the number is of Y alone, so that the base model has one as well."""

    def measure(drawn: Drawn) -> Value:
        found = drawn.once(of_pictures)
        if not found["base"]:
            return Value(None, note="no prompt of a retained class differs from a forgotten one in the class alone")
        base, adapted = (
            torch.tensor([getattr(one, name) for one in found[which]], dtype=torch.float64)
            for which in ("base", "adapted")
        )
        return Value(
            adapted.mean().item(),
            base.mean().item() if of_one else None,
            Interval(*mean_interval(adapted), len(adapted)),
            Interval(*mean_interval(adapted - base), len(adapted)) if of_one else None,
        )

    return measure


METRICS = (
    Metric("Entangled-D", "ForgetMe's, pairs of forgotten images", "", "higher", _part("d"), 3),
    Metric("Entangled-S", "ForgetMe's, adapted images alone", "", "higher", _part("c", of_one=True), 3),
    Metric("S_in", "likeness to base's in the region to forget", "", "higher", _part("s_in"), 3),
    Metric("S_out", "change outside of that region", "", "lower", _part("s_out"), 3),
    Metric("C", "Entangled-S under its name in Entangled-D", "", "higher", _part("c", of_one=True), 3, shown=False),
)
