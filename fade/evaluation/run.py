"""Draws the answer set with the adapter off and on, has it judged, and gathers every number of one evaluation.

Metrics see what was drawn and judged, and run no model (the held-out phrasings, which have prompts of their own, do).
"""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones import backbone_for
from fade.bundled import drawing
from fade.concept import pairs_in
from fade.errors import FadeError
from fade.evaluation.answers import SEEDS, AnswerSet
from fade.evaluation.drawings import Drawings
from fade.evaluation.features import ModelFeatures, features_of_folder
from fade.evaluation.judging import judge_for
from fade.evaluation.metrics.lpips import Lpips
from fade.evaluation.metrics.metric import Drawn, Metric, Value
from fade.evaluation.metrics.phrasings import PhrasingResult, held_out, own_prompts
from fade.evaluation.metrics.registry import METRICS, known_metrics
from fade.evaluation.metrics.unlearncanvas import cell_accuracy, metrics_of_several, receiver_accuracy
from fade.images import find_pictures, refuse_unreadable

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class Evaluation:
    """Numbers and images of one evaluation.

    `values` has every metric of the registry that was measured, by name (`fade.evaluation.metrics`). `images` and
    `baseline` are float32 [n, 3, H, W]: with the adapter on and off.
    """

    answers: AnswerSet
    values: dict[str, Value]
    receivers: dict[str, dict[str, dict[str, float]]]
    """acc(e→x) in percent: domain -> class -> {"before", "after"}."""
    matrix: dict[str, dict[str, list[list[float]]]]
    """Accuracy in percent per object (row) and style (column), those of `receivers` in the same order: judged domain ->
    {"before", "after"}. Empty for CLIP."""
    forgotten_as: dict[str, float]
    """What the judge calls the forgotten concepts' images now: class -> percent."""
    concepts: list[dict[str, Any]]
    """Of each concept: forget, surrogate, domain, UA and redirected (None without a surrogate class)."""
    settings: dict[str, Any]
    images: Tensor = field(repr=False)
    baseline: Tensor = field(repr=False)
    phrasings: PhrasingResult | None = None
    """Held-out phrasings, where they were asked for."""

    @property
    def metrics(self) -> dict[str, float | None]:
        """Each metric with the adapter on; None where it is undefined."""
        return {name: value.adapted for name, value in self.values.items()}

    @property
    def base(self) -> dict[str, float | None]:
        """Each metric of the base model, of those that are no comparison with it."""
        found = self.values.items()
        return {name: value.base for name, value in found if value.base is not None or value.adapted is None}

    @property
    def intervals(self) -> dict[str, dict[str, float | int]]:
        """Of each metric the 95 % interval with the adapter on, and the images behind it."""
        return {name: value.interval.to_dict() for name, value in self.values.items() if value.interval}

    @property
    def changes(self) -> dict[str, dict[str, float | int]]:
        """Of each metric the paired 95 % interval of what the adapter changed it by."""
        return {name: value.change.to_dict() for name, value in self.values.items() if value.change}

    @property
    def shown(self) -> list[tuple[Metric, Value]]:
        """What tables show: the metrics that have a number, in the registry's order."""
        found = [(metric, self.values[metric.name]) for metric in METRICS if metric.name in self.values]
        return [(metric, value) for metric, value in found if metric.shown and value.adapted is not None]

    @property
    def notes(self) -> dict[str, str]:
        """Why a metric is undefined here, or what else must be said of it."""
        return {name: value.note for name, value in self.values.items() if value.note}

    @property
    def neighbours(self) -> dict[str, dict[str, float]]:
        """acc(e→x) in percent of the look-alikes x of the concepts: class -> {"before", "after"}."""
        answers = self.answers
        near = [answers.classes[domain][i] for domain in answers.domains for i in answers.neighbours(domain)]
        rows = {word: row for receivers in self.receivers.values() for word, row in receivers.items()}
        return {word: rows[word] for word in near if word in rows}

    @property
    def forget(self) -> str:
        """The concept in words; several are listed."""
        return ", ".join(self._forgotten())

    @property
    def surrogate(self) -> str | None:
        """What takes its place, likewise; None where nothing does."""
        words = [self.answers.words(target)[1] for target in self.answers.targets]
        return ", ".join(word or "nothing" for word in words) if any(words) else None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, ready for JSON; the metrics are at the top level."""
        return {
            **self.metrics,
            "forget": self.forget,
            "surrogate": self.surrogate,
            "domain": ", ".join(self.answers.domains),
            "concepts": self.concepts,
            "base": self.base,
            "interval_95": self.intervals,
            "change_95": self.changes,
            "forgotten_as": self.forgotten_as,
            "neighbours": self.neighbours,
            "receivers": self.receivers,
            "matrix": self.matrix,
            "settings": self.settings,
            **({"notes": self.notes} if self.notes else {}),
            **({"held_out_phrasings": self.phrasings.to_dict()} if self.phrasings else {}),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def table(self) -> "Table":
        """The metrics as a rich table: with the adapter off and on, and the 95 % interval."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=escape("forgetting " + ", ".join(map(repr, self._forgotten()))),
            title_justify="left",
            caption=escape("\n".join(f"{name}: {note}" for name, note in self.notes.items())) or None,
            caption_justify="left",
        )
        for name, justify in (("metric", "left"), ("base model", "right"), ("adapted", "right"), ("95 %", "right")):
            table.add_column(name, justify=justify)
        for metric, value in self.shown:
            span = value.interval
            table.add_row(
                f"{metric.name}  [dim]{escape(self.meaning(metric))}[/dim]",
                metric.text(value.base),
                metric.text(value.adapted),
                f"{metric.text(span.low)}–{metric.text(span.high)} (n={span.images})" if span else "",
            )
        if len(self.concepts) > 1:
            for concept in self.concepts:
                table.add_row(
                    f"UA  [dim]of {escape(repr(concept['forget']))} alone[/dim]", "", f"{concept['UA']:.1f}", ""
                )
        return table

    def meaning(self, metric: Metric) -> str:
        """What a metric says, for people; of NA with the look-alikes by name."""
        return metric.meaning + (f" ({', '.join(self.neighbours)})" if metric.name == "NA" else "")

    def _forgotten(self) -> list[str]:
        return [self.answers.words(target)[0] for target in self.answers.targets]


def full_record(
    evaluation: Evaluation,
    metadata: dict[str, Any],
    adapter_bytes: int,
    evaluate_seconds: float | None = None,
    total_seconds: float | None = None,
) -> dict[str, Any]:
    """The evaluation with what the run cost, ready for JSON: the adapter's keep, bytes, seconds and peak memory."""
    run = metadata.get("run", {})
    seconds = {**run.get("seconds", {}), "evaluate": evaluate_seconds, "total": total_seconds}
    return {
        **evaluation.metrics,
        "keep": metadata.get("config", {}).get("locate", {}).get("keep"),
        "path": run.get("path"),
        "adapter_bytes": adapter_bytes,
        "seconds": {part: value for part, value in seconds.items() if value is not None},
        "peak_memory_bytes": run.get("peak_memory_bytes", {}),
        **evaluation.to_dict(),
    }


def evaluate(
    pipeline: Any,
    adapter: Any,
    *,
    seeds: Sequence[int] = SEEDS,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 64,
    baseline: "Evaluation | Tensor | None" = None,
    judge: str | None = None,
    classes: Sequence[str] = (),
    neighbours: Sequence[str] = (),
    everything: bool = False,
    features: str | None = None,
    clip: str | None = None,
    real: str | Path | None = None,
    lpips: str | Path | None = None,
    phrasings: bool | Sequence[str] = False,
    wanted: Sequence[str] = (),
    cache: Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Images with the adapter on, the same prompts and seeds with it off, and what the judge makes of both.

    Args:
        adapter: the attached `fade.Adapter`; its metadata names the concept. It is enabled when this returns.
        seeds: every prompt is drawn once per seed. On a bundled model the prompts are its objects in its styles: all 80
            on DigitCanvas, 120 of 600 on EmojiCanvas (`fade.bundled.BundledModel.concerned`: the concept, the words
            most like it, and a fixed random choice of others, in every style).
        steps: denoising steps per image.
        guidance_scale: classifier-free guidance. Of both None is what the bundled model's accuracy was measured with,
            and 20 steps and 3 for any other model (`fade.bundled.drawing`).
        batch_size: images drawn at once.
        baseline: an earlier evaluation, or its `baseline` (float [n, 3, H, W]), of the same base, prompts, seeds, steps
            and guidance, to save half of the time.
        judge: folder or hub id of a CLIP model, or `python:module.function` (`fade.evaluation.plugin_judge`). Needed
            for pipelines that are not bundled ones.
        classes: words that such a judge tells apart, beside the concept and its surrogate.
        neighbours: those of these words that look like the concept, for NA; a bundled model's judges know theirs.
        everything: draw every word of a bundled model.
        features: folder of a transformers image model, for FID, KID, precision, recall and the LPIPS-like distance. A
            bundled model has its judges' features without one.
        clip: folder or hub id of a CLIP model for the CLIP score. A CLIP judge is taken without it.
        real: folder of real pictures of what must stay, to which FID-real and KID-real compare both models by the same
            features.
        lpips: safetensors file, or a folder with one, of the published LPIPS weights, for LPIPS
            (`fade.evaluation.metrics.lpips` says how it is written).
        phrasings: also measure the held-out phrasings, at the same seeds (`fade.evaluation.held_out`); or these.
        wanted: names of metrics that must be measurable; asked before anything is drawn.
        cache: folder in which answer sets are kept and looked for (`fade.evaluation.drawings`); None keeps none.

    Raises:
        FadeError: no judge knows the concept, `seeds` is empty, `baseline` is of other images, or a neighbour is none
            of the classes; a model that
            cannot be loaded, a judge of the user's that fails, a wanted metric that is unknown or lacks its model, real
            pictures that cannot be read or have no features to go by, or a phrasing without the concept.
    """
    if not seeds:
        raise FadeError("evaluation needs at least one seed")
    asked = known_metrics(wanted)
    concept = adapter.metadata["concept"]
    backbone = backbone_for(pipeline)
    drawn = drawing(pipeline, steps, guidance_scale)
    chosen = judge_for(pipeline, concept, judge, classes, backbone.device, everything, neighbours)
    answers = chosen.answers(seeds)
    if isinstance(baseline, Evaluation):
        earlier, drew = baseline.answers, {name: baseline.settings.get(name) for name in vars(drawn)}
        if (earlier.prompts, earlier.seeds, drew) != (answers.prompts, answers.seeds, vars(drawn)):
            raise FadeError("the baseline is of other prompts, seeds, steps or guidance; draw it anew")
        baseline = baseline.baseline
    if baseline is not None and len(baseline) != len(answers.prompts):
        raise FadeError(f"the baseline has {len(baseline)} images, but these seeds ask for {len(answers.prompts)}")

    instruments = {
        "features": chosen.features if features is None else ModelFeatures(features, backbone.device),
        "clip": _clip(clip or chosen.clip, backbone.device),
        "lpips": None if lpips is None else Lpips(lpips, backbone.device),
    }
    given = {**instruments, "phrasings": phrasings, "real": real}
    if real is not None and instruments["features"] is None:
        raise FadeError(f"real pictures cannot be compared without {_GIVEN_BY['features']}")
    found = None if real is None else find_pictures(real)
    if found is not None:
        refuse_unreadable(found)  # before anything is drawn
    if not isinstance(phrasings, bool):
        own_prompts(phrasings, pairs_in(concept))
    for metric in asked:
        if metric.needs and not given[metric.needs]:
            raise FadeError(f"{metric.name} cannot be measured without {_GIVEN_BY[metric.needs]}")
    drawings = Drawings(backbone, drawn, batch_size, progress, cache)
    draw = functools.partial(drawings, answers.prompts, answers.seeds)
    if baseline is None:
        adapter.disable()
        try:
            baseline = draw("drawing with the base model")
        finally:
            adapter.enable()
    adapter.enable()
    images = draw("drawing with the adapter")
    settings = {
        "judge": chosen.name,
        "images": len(answers.prompts),
        "seeds": list(seeds),
        **vars(drawn),
        **{name: model.name for name, model in instruments.items() if model is not None},
    }
    if found is not None:
        instruments["real"] = features_of_folder(found, images.shape[-1], instruments["features"], progress)
        settings["real"] = f"{len(instruments['real'])} pictures in {found.folder.name}"
    if phrasings:
        instruments["phrasings"] = held_out(
            pipeline, adapter, phrasings=None if phrasings is True else phrasings, seeds=seeds, steps=steps,
            guidance_scale=guidance_scale, batch_size=batch_size, judge=judge, classes=classes, cache=cache,
            progress=progress,
        )  # fmt: skip
    return _summarise(
        answers,
        {domain: head(baseline) for domain, head in chosen.heads.items()},
        {domain: head(images) for domain, head in chosen.heads.items()},
        baseline,
        images,
        settings,
        **instruments,
    )


_GIVEN_BY = {
    "features": "features to compare pictures by: give --features FOLDER, an image model of transformers",
    "clip": "a CLIP model: give --clip MODEL",
    "phrasings": "drawing other words: give --phrasings",
    "lpips": "its weights: give --lpips FILE",
    "real": "real pictures to compare with: give --real FOLDER",
}


def _clip(model: str | None, device: torch.device) -> Any:
    if model is None:
        return None
    from fade.evaluation.clip_judge import Clip

    return Clip(model, device)


def _summarise(
    answers: AnswerSet,
    judged_before: dict[str, Tensor],
    judged_after: dict[str, Tensor],
    baseline: Tensor,
    images: Tensor,
    settings: dict[str, Any],
    **instruments: Any,
) -> Evaluation:
    """All numbers from images and the judges' answers (int64 [n] per domain); `instruments` is the rest of `Drawn`."""
    drawn = Drawn(answers, baseline, images, judged_before, judged_after, **instruments)
    sizes = drawn.sizes

    def rows(judged: dict[str, Tensor]) -> dict[str, list[float]]:
        return {d: (100 * receiver_accuracy(answers.prompted[d], judged[d], sizes[d])).tolist() for d in sizes}

    def cells(judged: dict[str, Tensor], domain: str) -> list[list[float]]:
        (first, height), (second, width) = sizes.items()
        right = judged[domain] == answers.prompted[domain]
        table = cell_accuracy(answers.prompted[first], answers.prompted[second], right, (height, width))
        return (100 * table[answers.prompted[first].unique()][:, answers.prompted[second].unique()]).tolist()

    before, after = rows(judged_before), rows(judged_after)
    shown = {
        domain: torch.cat(
            [judged_after[domain][t.named(answers.prompted)] for t in answers.targets if t.domain == domain]
        ).bincount(minlength=sizes[domain])
        for domain in answers.domains
    }
    asked = sum(int(counts.sum()) for counts in shown.values())
    forgotten_as = {
        word: 100 * int(count) / asked
        for domain, counts in shown.items()
        for word, count in zip(answers.classes[domain], counts, strict=True)
        if count
    }
    concepts = []
    for target in answers.targets:
        alone = metrics_of_several(answers.prompted, judged_after, sizes, [target])
        forget, surrogate = answers.words(target)
        concepts.append(
            {
                "forget": forget,
                "surrogate": surrogate,
                "domain": target.domain,
                "UA": alone["UA"],
                "redirected": alone["redirected"],
            }
        )
    return Evaluation(
        answers=answers,
        values={metric.name: metric.measure(drawn) for metric in METRICS if metric.measurable(drawn)},
        receivers={
            domain: {
                word: {"before": before[domain][i], "after": after[domain][i]}
                for i, word in enumerate(words)
                if not math.isnan(after[domain][i])
            }
            for domain, words in answers.classes.items()
        },
        matrix={
            domain: {"before": cells(judged_before, domain), "after": cells(judged_after, domain)} for domain in sizes
        }
        if len(sizes) == 2
        else {},
        forgotten_as=forgotten_as,
        concepts=concepts,
        settings=settings,
        images=images,
        baseline=baseline,
        phrasings=drawn.phrasings,
    )
