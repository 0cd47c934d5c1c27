"""Composition: the style is kept with the object gone, or the object with the style gone.

A prompt that names the concept also asks for something of the other kind. Forgetting should take the one and leave the
other in the same picture, which UA and CRA, each counted alone, do not show.
"""

import torch
from torch import Tensor

from fade.evaluation.intervals import paired_share_interval, wilson_interval
from fade.evaluation.metrics.metric import Drawn, Interval, Metric, Value


def composed(drawn: Drawn) -> tuple[Tensor, Tensor] | None:
    """For each picture whose prompt names an emitter and something else of the other domain, whether the judges miss
    the emitter and find the other: bool [m] of the base and of the adapted model. None where nothing is crossed."""
    prompted, targets = drawn.answers.prompted, drawn.answers.targets
    parts: list[tuple[Tensor, Tensor]] = []
    for target in targets:
        for other in prompted:
            if other == target.domain:
                continue
            gone = torch.tensor([t.forget for t in targets if t.domain == other], dtype=torch.int64)
            own = target.named(prompted) & ~torch.isin(prompted[other], gone)
            base, adapted = (
                (judged[target.domain][own] != target.forget) & (judged[other][own] == prompted[other][own])
                for judged in (drawn.judged_base, drawn.judged_adapted)
            )
            parts.append((base, adapted))
    found = [torch.cat(half) for half in zip(*parts, strict=True)]
    return (found[0], found[1]) if found and len(found[0]) else None


def _measure(drawn: Drawn) -> Value:
    if (found := composed(drawn)) is None:
        return Value(None)
    base, adapted = found
    low, high = (100.0 * bound for bound in wilson_interval(int(adapted.sum()), len(adapted)))
    change = (100.0 * bound for bound in paired_share_interval(base, adapted))
    shares = (100.0 * hits.double().mean().item() for hits in (adapted, base))
    return Value(*shares, Interval(low, high, len(adapted)), Interval(*change, len(adapted)))


METRICS = (Metric("composition", "% concept gone and the rest of the prompt right", "%", "higher", _measure),)
