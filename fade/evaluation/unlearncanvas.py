"""UA, IRA and CRA: accuracies of a judge on images of the unlearned model, apart because they are pure arithmetic.

Definitions of UnlearnCanvas (Zhang et al., arXiv 2402.11846, section 3). Its aggregation was never published, so the
denominators are spelled out here; per-receiver accuracies count as its `accuracy.py` does.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


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
    if domain not in classes or len(classes) > 2 or set(prompted) != set(classes) or set(judged) != set(classes):
        raise ValueError(f"need labels of the domain {domain!r} and at most one other, got {sorted(prompted)}")
    accuracy = receiver_accuracy(prompted[domain], judged[domain], classes[domain])
    forgotten = prompted[domain] == forget
    if not bool(forgotten.any()):
        raise ValueError(f"no image was prompted as class {forget} of {domain!r}: UA is undefined")
    others = torch.cat([accuracy[:forget], accuracy[forget + 1 :]])
    others = others[~others.isnan()]
    metrics: dict[str, float | None] = {
        "UA": 100.0 * (1.0 - accuracy[forget].item()),
        "IRA": 100.0 * others.mean().item() if len(others) else None,
        "CRA": None,
        "CRA_retained": None,
        "redirected": None,
    }
    if surrogate is not None:
        metrics["redirected"] = 100.0 * (judged[domain][forgotten] == surrogate).double().mean().item()
    for other in classes.keys() - {domain}:
        across = receiver_accuracy(prompted[other], judged[other], classes[other])
        metrics["CRA"] = 100.0 * across.nanmean().item()
        kept = receiver_accuracy(prompted[other][~forgotten], judged[other][~forgotten], classes[other])
        metrics["CRA_retained"] = 100.0 * kept.nanmean().item() if not bool(kept.isnan().all()) else None
    return metrics


def unlearncanvas_intervals(
    prompted: Mapping[str, Tensor], judged: Mapping[str, Tensor], domain: str, forget: int
) -> dict[str, dict[str, float | int]]:
    """How many images stand behind each metric, and its 95 % Wilson interval in percent.

    The interval treats images as independent draws and pools the receivers; `images` is the pooled denominator.
    """
    forgotten = prompted[domain] == forget
    counted = {"UA": (judged[domain] != forget)[forgotten], "IRA": (judged[domain] == prompted[domain])[~forgotten]}
    for other in prompted.keys() - {domain}:
        counted["CRA"] = judged[other] == prompted[other]
    intervals = {}
    for name, hits in counted.items():
        low, high = wilson_interval(int(hits.sum()), len(hits))
        intervals[name] = {"images": len(hits), "low": 100.0 * low, "high": 100.0 * high}
    return intervals


def _check(prompted: Tensor, judged: Tensor, classes: int) -> None:
    if prompted.ndim != 1 or prompted.shape != judged.shape:
        raise ValueError(f"labels must be two [n] tensors, got {tuple(prompted.shape)} and {tuple(judged.shape)}")
    for name, labels in (("prompted", prompted), ("judged", judged)):
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"{name} labels must be in [0, {classes}), got {int(labels.min())} to {int(labels.max())}")
