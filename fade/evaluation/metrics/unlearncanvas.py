"""UA, IRA, CRA and NA: accuracies of a judge on images of the unlearned model, apart because they are pure arithmetic.

Definitions of UnlearnCanvas (Zhang et al., arXiv 2402.11846, section 3). Its aggregation was never published, so the
denominators are spelled out here; per-receiver accuracies count as its `accuracy.py` does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fade.evaluation.intervals import paired_share_interval, wilson_interval
from fade.evaluation.metrics.metric import Drawn, Interval, Metric, Value


def receiver_accuracy(prompted: Tensor, judged: Tensor, classes: int) -> Tensor:
    """acc(e→x) for every receiver x: share of the images prompted as x that the judge calls x.

    `prompted` and `judged` are int64 [n] class indices; returns float64 [classes] in [0, 1], NaN for a class that no
    prompt names. The denominator is every image prompted as x, whatever it shows of the other domain.
    """
    _check(prompted, judged, classes)
    asked = torch.bincount(prompted, minlength=classes).double()
    right = torch.bincount(prompted[prompted == judged], minlength=classes).double()
    return right / asked


def cell_accuracy(rows: Tensor, columns: Tensor, right: Tensor, shape: tuple[int, int]) -> Tensor:
    """Share of `right` (bool [n]) in each cell of two crossed domains; float64 `shape`, NaN for an empty cell."""
    index = rows * shape[1] + columns
    cells = shape[0] * shape[1]
    asked = torch.bincount(index, minlength=cells).double()
    return (torch.bincount(index[right], minlength=cells).double() / asked).reshape(shape)


@dataclass(frozen=True)
class Target:
    """A class that is to be forgotten, by its domain and index, the class that takes its place, if that is one, and the
    classes of the domain that look most like it."""

    domain: str
    forget: int
    surrogate: int | None = None
    neighbours: tuple[int, ...] = ()

    def named(self, prompted: Mapping[str, Tensor]) -> Tensor:
        """bool [n]: the image's prompt names the class."""
        return prompted[self.domain] == self.forget


def named_by_any(prompted: Mapping[str, Tensor], targets: Sequence[Target]) -> Tensor:
    """bool [n]: the image's prompt names something that is to be forgotten."""
    return torch.stack([target.named(prompted) for target in targets]).any(0)


def unlearncanvas_metrics(
    prompted: Mapping[str, Tensor],
    judged: Mapping[str, Tensor],
    classes: Mapping[str, int],
    domain: str,
    forget: int,
    surrogate: int | None = None,
) -> dict[str, float | None]:
    """The metrics in percent, for an emitter e = (`domain`, `forget`) and one or two domains.

    `prompted[d]` and `judged[d]` are int64 [n]: the class of domain d that image i was prompted as and is judged as.

    - `UA` = 100 · (1 − acc(e→e)). Denominator: the images whose prompt names e.
    - `IRA` = mean of 100 · acc(e→x) over the receivers x ≠ e of e's domain. The images of e are in none of them.
    - `CRA` = mean of 100 · acc(e→x) over all receivers x of the other domain, judged by that domain's head. As in
      the official `accuracy.py`, all images of x count, also those whose prompt names e too: forgetting an object
      must not cost them their style. None where there is no other domain.
    - `CRA_retained`: the same without the images whose prompt names e.
    - `redirected` = share of e's images that the judge calls the surrogate; None without a surrogate class.

    Means are over receivers, each with the same weight. Raises ValueError for labels that do not fit together.
    """
    return metrics_of_several(prompted, judged, classes, [Target(domain, forget, surrogate)])


def metrics_of_several(
    prompted: Mapping[str, Tensor],
    judged: Mapping[str, Tensor],
    classes: Mapping[str, int],
    targets: Sequence[Target],
) -> dict[str, float | None]:
    """`unlearncanvas_metrics` for several emitters, of one domain or of both; for one it is the same.

    - `UA` and `redirected` are means over the emitters (those with a surrogate class), each on its own images.
    - `IRA`: the receivers are the classes, other than emitters, of every domain that has an emitter, on the images
      whose prompts name no emitter.
    - `CRA`: the receivers are the classes, other than emitters, of every domain beside that of an emitter, on all of
      their images; where both domains have emitters, both are beside one.
    - `CRA_retained`: the same on the images whose prompts name no emitter.
    """
    of_emitters = list(dict.fromkeys(target.domain for target in targets))
    unknown = not targets or any(domain not in classes for domain in of_emitters)
    if unknown or len(classes) > 2 or set(prompted) != set(classes) or set(judged) != set(classes):
        named = " and ".join(map(repr, of_emitters)) or "an emitter"
        raise ValueError(f"need labels of the domain {named} and at most one other, got {sorted(prompted)}")
    for domain, size in classes.items():
        _check(prompted[domain], judged[domain], size)
    kept = ~named_by_any(prompted, targets)

    def accuracies(domains: Sequence[str], counted: Tensor) -> float | None:
        """Mean over the receivers of these domains."""
        found = []
        for domain in domains:
            own = receiver_accuracy(prompted[domain][counted], judged[domain][counted], classes[domain])
            own[[target.forget for target in targets if target.domain == domain]] = math.nan
            found.append(own[~own.isnan()])
        receivers = torch.cat(found) if found else torch.empty(0)
        return 100.0 * receivers.mean().item() if len(receivers) else None

    unlearned, redirected = [], []
    for target in targets:
        own = target.named(prompted)
        if not bool(own.any()):
            raise ValueError(f"no image was prompted as class {target.forget} of {target.domain!r}: UA is undefined")
        answers = judged[target.domain][own]
        unlearned.append(100.0 * (1.0 - (answers == target.forget).double().mean().item()))
        if target.surrogate is not None:
            redirected.append(100.0 * (answers == target.surrogate).double().mean().item())
    beside = [domain for domain in classes if any(target.domain != domain for target in targets)]
    return {
        "UA": _mean(unlearned),
        "IRA": accuracies(of_emitters, kept),
        "CRA": accuracies(beside, torch.ones_like(kept)),
        "CRA_retained": accuracies(beside, kept),
        "redirected": _mean(redirected) if redirected else None,
    }


def neighbours_of(targets: Sequence[Target]) -> dict[str, list[int]]:
    """By domain, the look-alikes of the emitters that are not to be forgotten themselves."""
    found: dict[str, list[int]] = {}
    for target in targets:
        gone = {other.forget for other in targets if other.domain == target.domain}
        found.setdefault(target.domain, []).extend(index for index in target.neighbours if index not in gone)
    return {domain: list(dict.fromkeys(near)) for domain, near in found.items() if near}


def neighbour_accuracy(
    prompted: Mapping[str, Tensor],
    judged: Mapping[str, Tensor],
    classes: Mapping[str, int],
    targets: Sequence[Target],
) -> float | None:
    """NA in percent: IRA over the receivers alone that look like an emitter (`Target.neighbours`); None without any.

    What a method costs shows there first, and the mean over all receivers hides it (ours; UnlearnCanvas has no such
    number).
    """
    kept, found = ~named_by_any(prompted, targets), []
    for domain, near in neighbours_of(targets).items():
        own = receiver_accuracy(prompted[domain][kept], judged[domain][kept], classes[domain])[near]
        found.append(own[~own.isnan()])
    receivers = torch.cat(found) if found else torch.empty(0)
    return 100.0 * receivers.mean().item() if len(receivers) else None


def unlearncanvas_intervals(
    prompted: Mapping[str, Tensor], judged: Mapping[str, Tensor], domain: str, forget: int
) -> dict[str, dict[str, float | int]]:
    """How many images stand behind each metric, and its 95 % Wilson interval in percent.

    The interval treats images as independent draws and pools the receivers; `images` is the pooled denominator.
    """
    return intervals_of_several(prompted, judged, [Target(domain, forget)])


def intervals_of_several(
    prompted: Mapping[str, Tensor], judged: Mapping[str, Tensor], targets: Sequence[Target]
) -> dict[str, dict[str, float | int]]:
    """`unlearncanvas_intervals` of `metrics_of_several`, and of `neighbour_accuracy` where there is one: emitters are
    pooled like receivers, and an image counts once for each of them that its prompt names."""
    intervals = {}
    for name, parts in _groups(prompted, judged, targets).items():
        if parts and name in ("UA", "IRA", "CRA", "NA"):
            hits = torch.cat(parts)
            low, high = wilson_interval(int(hits.sum()), len(hits))
            intervals[name] = {"images": len(hits), "low": 100.0 * low, "high": 100.0 * high}
    return intervals


def _groups(
    prompted: Mapping[str, Tensor], judged: Mapping[str, Tensor], targets: Sequence[Target]
) -> dict[str, list[Tensor]]:
    """By metric, for each emitter or receiver that it is a mean over, which of its images count: bool [n_g] each."""
    kept = ~named_by_any(prompted, targets)
    of_emitters = list(dict.fromkeys(target.domain for target in targets))
    beside = [domain for domain in prompted if any(target.domain != domain for target in targets)]
    near = neighbours_of(targets)

    def receivers(domains: Sequence[str], counted: Tensor, only: Mapping[str, list[int]] | None = None) -> list[Tensor]:
        found = []
        for domain in domains:
            gone = {target.forget for target in targets if target.domain == domain}
            for index in prompted[domain].unique().tolist() if only is None else only.get(domain, []):
                own = counted & (prompted[domain] == index)
                if index not in gone and bool(own.any()):
                    found.append(judged[domain][own] == index)
        return found

    everything = torch.ones_like(kept)
    return {
        "UA": [judged[t.domain][t.named(prompted)] != t.forget for t in targets],
        "IRA": receivers(of_emitters, kept),
        "NA": receivers(of_emitters, kept, near),
        "CRA": receivers(beside, everything),
        "CRA_retained": receivers(beside, kept),
        "redirected": [judged[t.domain][t.named(prompted)] == t.surrogate for t in targets if t.surrogate is not None],
    }


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _check(prompted: Tensor, judged: Tensor, classes: int) -> None:
    if prompted.ndim != 1 or prompted.shape != judged.shape:
        raise ValueError(f"labels must be two [n] tensors, got {tuple(prompted.shape)} and {tuple(judged.shape)}")
    for name, labels in (("prompted", prompted), ("judged", judged)):
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"{name} labels must be in [0, {classes}), got {int(labels.min())} to {int(labels.max())}")


def _measured(name: str) -> Callable[[Drawn], Value]:
    """How the accuracy `name` is measured: Wilson's interval with receivers pooled, a paired one of its change."""

    def measure(drawn: Drawn) -> Value:
        answers, numbers, groups = drawn.answers, [], []
        for judged in (drawn.judged_base, drawn.judged_adapted):
            if name == "NA":
                numbers.append(neighbour_accuracy(answers.prompted, judged, drawn.sizes, answers.targets))
            else:
                numbers.append(metrics_of_several(answers.prompted, judged, drawn.sizes, answers.targets)[name])
            groups.append(_groups(answers.prompted, judged, answers.targets)[name])
        base, adapted = numbers
        if adapted is None:
            return Value(None, base)
        hits = torch.cat(groups[1])
        low, high = wilson_interval(int(hits.sum()), len(hits))
        change = paired_share_interval(torch.cat(groups[0]), hits)
        return Value(
            adapted, base, Interval(100.0 * low, 100.0 * high, len(hits)),
            Interval(100.0 * change[0], 100.0 * change[1], len(hits)),
        )  # fmt: skip

    return measure


def _metric(name: str, meaning: str, shown: bool = True) -> Metric:
    return Metric(name, meaning, "%", "higher", _measured(name), shown=shown)


METRICS = (
    _metric("UA", "% forgotten prompts no longer recognised"),
    _metric("IRA", "% others of the same kind still right"),
    _metric("NA", "% of the nearest look-alikes still right"),
    _metric("CRA", "% of the other kind still right"),
    _metric("CRA_retained", "CRA without the prompts that name the concept", shown=False),
    _metric("redirected", "% forgotten prompts recognised as the surrogate"),
)
