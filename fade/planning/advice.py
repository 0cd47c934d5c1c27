"""What to change in a run that does not fit into a device's memory: settings that leave the result as it is first."""

from dataclasses import dataclass, replace
from typing import Any

from fade.errors import FadeError
from fade.measure import human_bytes
from fade.planning.memory import Dtype, Run, mode

CUDA_CONTEXT = 500_000_000
"""Bytes that CUDA and its libraries take before the first tensor, about."""


@dataclass(frozen=True)
class Advice:
    """Whether a run fits into a budget in one dtype, and with which changes.

    Attributes:
        fits: as it is planned.
        changes: what makes it fit, in words; empty where nothing needs to be changed.
        settings: the same as settings (`fade.Config.replace`), as far as they are settings.
        blocked: why no change makes it fit; None where one does.
    """

    dtype: Dtype
    budget: int
    fits: bool
    changes: tuple[str, ...]
    settings: dict[str, Any]
    blocked: str | None = None


def advise(run: Run, dtype: Dtype, budget: int, host: int | None = None) -> Advice:
    """Fits each phase by itself: gradient checkpointing, accumulators on the host or in groups, then fewer latents at
    once. `host` is what host memory has for accumulators, None: enough."""
    room = budget - (CUDA_CONTEXT if run.on_gpu else 0)
    column = run.column(dtype)
    data = run.config.data
    unread = {"encode pictures"} if data.forget_images is None and data.retain_images is None else set()
    over = {phase for phase, peaks in column.peaks.items() if phase not in unread and peaks[mode(False)] > room}
    if not over:
        return Advice(dtype, budget, True, (), {})
    changes: list[str] = []
    settings: dict[str, Any] = {}
    try:
        for phase in over & {"encode prompts", "encode pictures", "merge"}:
            raise _Blocked(f"{phase} takes {human_bytes(column.peaks[phase][mode(False)])}, which no setting changes")
        left = room - column.resident
        if "sample latents" in over:
            settings["data__batch_size"] = _sampled(run, dtype, room, column.peaks["sample latents"][mode(False)])
            changes.append(f"sample {settings['data__batch_size']} latents at once (data.batch_size)")
        if "overwrite" in over:
            found, checkpointed = _trained(run, dtype, left)
            settings |= found
            if checkpointed:
                settings["gradient_checkpointing"] = True
                changes.append("gradient checkpointing (--gradient-checkpointing)")
            if found:
                changes.append(
                    f"{found['overwrite__batch_size']} + {found['overwrite__retain_batch_size']} latents a training "
                    f"step and {found['overwrite__accumulation']} such batches added up (overwrite.batch_size, "
                    "retain_batch_size, accumulation)"
                )
        if "locate" in over:
            found, told, checkpointed = _located(run, dtype, left, host if host is not None else 2**63)
            settings |= found
            if checkpointed and "gradient_checkpointing" not in settings:
                settings["gradient_checkpointing"] = True
                changes.append("gradient checkpointing (--gradient-checkpointing)")
            changes += told
    except _Blocked as blocked:
        return Advice(dtype, budget, False, tuple(changes), settings, str(blocked))
    return Advice(dtype, budget, False, tuple(changes), settings)


class _Blocked(Exception):
    """Nothing makes a phase fit."""


def _halves(count: int) -> list[int]:
    found = [count]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return found


def _modes(run: Run) -> tuple[bool, ...]:
    return (False, True) if run.model.checkpoints else (False,)


def _sampled(run: Run, dtype: Dtype, room: int, peak: int) -> int:
    data = run.config.data
    fixed = peak - run.model.passes(dtype).frozen(run.drawn_at_once)
    for count in _halves(min(data.batch_size, max(data.forget_samples, data.retain_samples)))[1:]:
        fewer = replace(run, config=run.config.replace(data__batch_size=count))
        if fixed + run.model.passes(dtype).frozen(fewer.drawn_at_once) <= room:
            return count
    raise _Blocked(f"sampling takes more than {human_bytes(room)} even of one latent at a time")


def _trained(run: Run, dtype: Dtype, left: int) -> tuple[dict[str, Any], bool]:
    """Settings of stage 2, and whether it needs checkpointing."""
    overwrite, needed = run.config.overwrite, 0
    for count in _halves(overwrite.batch_size):
        share = overwrite.batch_size // count
        retained = max(1, overwrite.retain_batch_size // share)
        given = {"overwrite__batch_size": count, "overwrite__retain_batch_size": retained}
        fewer = replace(run, config=run.config.replace(**given))
        for on in _modes(run):
            needed = fewer.overwrite_bytes(dtype, on)
            if needed <= left:
                accumulated = {"overwrite__accumulation": overwrite.accumulation * share}
                return ({} if share == 1 else given | accumulated), on
    raise _Blocked(
        f"training takes {human_bytes(needed)} beside {human_bytes(max(0, left))} that are left, even of the smallest "
        "batch; a smaller --size or targets in fewer layers take less"
    )


def _located(run: Run, dtype: Dtype, left: int, host: int) -> tuple[dict[str, Any], list[str], bool]:
    """Settings of stage 1, what they are in words, and whether it needs checkpointing."""
    if not run.accumulators:
        raise _Blocked(
            f"solving takes {human_bytes(run.locate_bytes(dtype, False))} beside {human_bytes(max(0, left))} that are "
            "left; the method distillation takes less"
        )
    told = ""
    for count in _halves(run.config.locate.batch_size):
        fewer = replace(run, config=run.config.replace(locate__batch_size=count))
        for on in _modes(run):
            try:
                planned = fewer.saliency_plan(dtype, on, left, host)
            except FadeError as error:
                told = str(error)
                continue
            words = {
                "device": [],
                "host": ["accumulators in host memory (by itself; locate.memory_budget)"],
                "groups": [f"saliency in {len(planned.groups)} groups of layers (by itself; locate.memory_budget)"],
            }[planned.place]
            if count == run.config.locate.batch_size:
                return {}, words, on
            return {"locate__batch_size": count}, [*words, f"{count} latents a pass (locate.batch_size)"], on
    raise _Blocked(told)
