"""Draws the answer set with the adapter off and on, has it judged, and gathers every number of one evaluation.

It is the only part of the evaluation that runs a model; metric files see labels and pixels alone. A bundled model has
its own judges and two crossed domains; any other pipeline is judged by CLIP on words of the user's choice.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones import backbone_for
from fade.bundled import BundledModel, drawing, recognised
from fade.concept import Pair, pairs_in
from fade.errors import FadeError
from fade.evaluation.drift import rms_difference
from fade.evaluation.unlearncanvas import (
    Target,
    cell_accuracy,
    intervals_of_several,
    metrics_of_several,
    named_by_any,
    neighbour_accuracy,
    neighbours_of,
    receiver_accuracy,
)

if TYPE_CHECKING:
    from rich.table import Table

_UNLEARNCANVAS_SEEDS = (188, 288, 588, 688, 888)
SEEDS = _UNLEARNCANVAS_SEEDS[:3]
"""The first three of UnlearnCanvas's five seeds."""


@dataclass(frozen=True)
class AnswerSet:
    """The prompts that are drawn, one image per prompt and seed, and the classes they ask for.

    `classes[d]` are the words of domain d, `prompted[d]` (int64 [n]) the class that image i's prompt names. `targets`
    are the classes to forget, one at least; `domain`, `forget` and `surrogate` are the first one's.
    """

    targets: tuple[Target, ...]
    classes: dict[str, tuple[str, ...]]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    prompted: dict[str, Tensor]

    @property
    def domain(self) -> str:
        return self.targets[0].domain

    @property
    def forget(self) -> int:
        return self.targets[0].forget

    @property
    def surrogate(self) -> int | None:
        return self.targets[0].surrogate

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that have something to forget."""
        return tuple(dict.fromkeys(target.domain for target in self.targets))

    @property
    def forgotten(self) -> Tensor:
        """bool [n]: the prompt names something to forget."""
        return named_by_any(self.prompted, self.targets)

    def retained(self, domain: str) -> list[int]:
        """The classes of a domain that are drawn and not to be forgotten."""
        gone = {target.forget for target in self.targets if target.domain == domain}
        return [index for index in self.prompted[domain].unique().tolist() if index not in gone]

    def neighbours(self, domain: str) -> list[int]:
        """The look-alikes of what is to be forgotten of a domain, nearest first, without that itself."""
        return neighbours_of(self.targets).get(domain, [])

    def words(self, target: Target) -> tuple[str, str | None]:
        """A target and its surrogate in words."""
        words = self.classes[target.domain]
        return words[target.forget], None if target.surrogate is None else words[target.surrogate]


@dataclass
class Evaluation:
    """Numbers and images of one evaluation.

    `metrics` and `base` map UA, IRA, NA (the accuracy on look-alikes alone), CRA, CRA_retained and redirected to
    percent (None where undefined), for the model with the adapter on and off; `metrics` also has drift and drift_forget
    (RMS pixel difference in [0, 1] to the base model at equal seeds, over retained and over forgotten prompts).
    `images` and `baseline` are float32 [n, 3, H, W].
    """

    answers: AnswerSet
    metrics: dict[str, float | None]
    base: dict[str, float | None]
    intervals: dict[str, dict[str, float | int]]
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
            "forgotten_as": self.forgotten_as,
            "neighbours": self.neighbours,
            "receivers": self.receivers,
            "matrix": self.matrix,
            "settings": self.settings,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def table(self) -> "Table":
        """The metrics as a rich table: with the adapter off and on, and the 95 % interval."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=escape("forgetting " + ", ".join(map(repr, self._forgotten()))), title_justify="left")
        for name, justify in (("metric", "left"), ("base model", "right"), ("adapted", "right"), ("95 %", "right")):
            table.add_column(name, justify=justify)
        for name in METRICS:
            after = self.metrics[name]
            if after is None:
                continue
            span = self.intervals.get(name)
            digits = 4 if name.startswith("drift") else 1
            before = self.base.get(name)
            table.add_row(
                f"{name}  [dim]{escape(self.meaning(name))}[/dim]",
                "" if before is None else f"{before:.{digits}f}",
                f"{after:.{digits}f}",
                f"{span['low']:.1f}–{span['high']:.1f} (n={span['images']})" if span else "",
            )
        if len(self.concepts) > 1:
            for concept in self.concepts:
                table.add_row(
                    f"UA  [dim]of {escape(repr(concept['forget']))} alone[/dim]", "", f"{concept['UA']:.1f}", ""
                )
        return table

    def meaning(self, name: str) -> str:
        """What a metric says, for people; of NA with the look-alikes by name."""
        return METRICS[name] + (f" ({', '.join(self.neighbours)})" if name == "NA" else "")

    def _forgotten(self) -> list[str]:
        return [self.answers.words(target)[0] for target in self.answers.targets]


METRICS = {
    "UA": "% forgotten prompts no longer recognised",
    "IRA": "% others of the same kind still right",
    "NA": "% of the nearest look-alikes still right",
    "CRA": "% of the other kind still right",
    "redirected": "% forgotten prompts recognised as the surrogate",
    "drift": "RMS pixel change of retained images",
    "drift_forget": "RMS pixel change of forgotten images",
}
"""What is shown to people, in this order, with its meaning."""


def first_seeds(count: int) -> tuple[int, ...]:
    """UnlearnCanvas's five seeds, then every hundredth number after them. Raises FadeError for a count below 1."""
    if count < 1:
        raise FadeError(f"evaluation needs at least one seed, not {count}")
    more = range(_UNLEARNCANVAS_SEEDS[-1] + 100, _UNLEARNCANVAS_SEEDS[-1] + 100 * count, 100)
    return (*_UNLEARNCANVAS_SEEDS, *more)[:count]


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


def crossed_answers(
    model: BundledModel,
    forget: str | Sequence[str],
    surrogate: str | Sequence[str | None] | None,
    seeds: Sequence[int],
    everything: bool = False,
) -> AnswerSet:
    """Words of a bundled model's first domain crossed with those of its second, once per seed: `BundledModel.concerned`
    says which, `everything` takes all. `forget` and `surrogate` are words, or lists of them.

    Raises FadeError for a word to forget that is of neither domain.
    """
    classes = {domain.name: domain.words for domain in model.domains}
    forgets, surrogates = ([forget], [surrogate]) if isinstance(forget, str) else (forget, surrogate)

    def target(forget: str, surrogate: str | None) -> Target:
        if not any(forget in words for words in classes.values()):
            raise FadeError(
                f"the adapter forgets {forget!r}, which the judges do not know: {model.knows(forget)}. Use a CLIP "
                "judge instead: --judge MODEL --classes A,B,C"
            )
        domain = model.domain(forget)
        return Target(
            domain.name, domain.words.index(forget),
            domain.words.index(surrogate) if surrogate in domain.words else None,
            tuple(map(domain.words.index, domain.neighbours(forget))),
        )  # fmt: skip

    targets = tuple(target(*words) for words in zip(forgets, surrogates, strict=True))
    rows, columns = (
        [domain.words.index(word) for word in drawn]
        for domain, drawn in zip(model.domains, model.concerned(list(forgets), everything), strict=True)
    )
    first, second = model.domains
    cells = [(i, j) for _ in seeds for i in rows for j in columns]
    return AnswerSet(
        targets=targets,
        classes=classes,
        prompts=tuple(model.prompt(first.words[i], second.words[j]) for i, j in cells),
        seeds=tuple(seed for seed in seeds for _ in range(len(rows) * len(columns))),
        prompted={first.name: torch.tensor([i for i, _ in cells]), second.name: torch.tensor([j for _, j in cells])},
    )


def class_answers(concept: dict[str, Any], classes: Sequence[str], seeds: Sequence[int]) -> AnswerSet:
    """The forget prompts, and the same prompts with every other class in the concept's place, once per seed.

    The classes are the concepts, their surrogates and `classes`, in this order. Raises FadeError where the forget
    prompts of a concept do not contain its words, so that nothing can take their place.
    """
    pairs = pairs_in(concept)
    given = (*(pair.forget for pair in pairs), *(pair.surrogate for pair in pairs), *classes)
    words = tuple(dict.fromkeys(word.strip() for word in given if word.strip()))
    templates = list(dict.fromkeys(template for pair in pairs for template in _templates(pair)))
    cells = [(c, t) for _ in seeds for c in range(len(words)) for t in range(len(templates))]
    return AnswerSet(
        targets=tuple(
            Target(
                "class", words.index(pair.forget.strip()),
                words.index(pair.surrogate.strip()) if pair.surrogate.strip() else None,
            )
            for pair in pairs
        ),
        classes={"class": words},
        prompts=tuple(templates[t].replace("{}", words[c]) for c, t in cells),
        seeds=tuple(seed for seed in seeds for _ in range(len(words) * len(templates))),
        prompted={"class": torch.tensor([c for c, _ in cells])},
    )  # fmt: skip


def _templates(pair: Pair) -> list[str]:
    templates = [prompt.replace(pair.forget, "{}") for prompt in pair.forget_prompts if pair.forget in prompt]
    if not templates:
        raise FadeError(
            f"no forget prompt of the adapter contains {pair.forget!r}, so it cannot be compared with others"
        )
    return templates


@dataclass(frozen=True)
class Judge:
    """Who tells what images show: one head per domain, float images [n, 3, H, W] in [0, 1] -> int64 [n]."""

    name: str
    heads: dict[str, Callable[[Tensor], Tensor]]
    answers: Callable[[Sequence[int]], AnswerSet]
    """What to draw for it, given the seeds."""


def judge_for(
    pipeline: Any,
    concept: dict[str, Any],
    model: str | None,
    classes: Sequence[str],
    device: torch.device,
    everything: bool = False,
) -> Judge:
    """The bundled model's own judge, or the CLIP `model` with `classes`, for a concept as an adapter's metadata names
    it; `everything` draws every word of the bundled model.

    Raises FadeError where there is none, and where it does not know the concept.
    """
    if model is None:
        if (bundled := recognised(pipeline)) is None:
            raise FadeError(
                "this pipeline has no judge of its own (only bundled models have); name a CLIP model and the words it "
                "should tell apart: --judge openai/clip-vit-base-patch16 --classes dog,cat,horse"
            )
        pairs = pairs_in(concept)
        answers = functools.partial(
            crossed_answers, bundled, [pair.forget for pair in pairs], [pair.surrogate for pair in pairs],
            everything=everything,
        )  # fmt: skip
        answers(SEEDS)  # knows the concept
        return Judge(f"{bundled.title} classifiers", bundled.heads(), answers)
    from fade.evaluation.clip_judge import ClipJudge

    answers = functools.partial(class_answers, concept, classes)
    clip = ClipJudge(model, answers(SEEDS).classes["class"], device)
    return Judge(f"CLIP zero-shot, {model}", {"class": clip}, answers)


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
    everything: bool = False,
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
        judge: folder or hub id of a CLIP model. Needed for pipelines that are not bundled ones.
        classes: words that the CLIP judge tells apart, beside the concept and its surrogate.
        everything: draw every word of a bundled model.

    Raises:
        FadeError: no judge knows the concept, or `seeds` is empty, or `baseline` is of other images.
    """
    if not seeds:
        raise FadeError("evaluation needs at least one seed")
    concept = adapter.metadata["concept"]
    backbone = backbone_for(pipeline)
    drawn = drawing(pipeline, steps, guidance_scale)
    chosen = judge_for(pipeline, concept, judge, classes, backbone.device, everything)
    answers = chosen.answers(seeds)
    if isinstance(baseline, Evaluation):
        earlier, drew = baseline.answers, {name: baseline.settings.get(name) for name in vars(drawn)}
        if (earlier.prompts, earlier.seeds, drew) != (answers.prompts, answers.seeds, vars(drawn)):
            raise FadeError("the baseline is of other prompts, seeds, steps or guidance; draw it anew")
        baseline = baseline.baseline
    if baseline is not None and len(baseline) != len(answers.prompts):
        raise FadeError(f"the baseline has {len(baseline)} images, but these seeds ask for {len(answers.prompts)}")

    def draw(description: str) -> Tensor:
        return backbone.generate(
            answers.prompts, answers.seeds, drawn.steps, drawn.guidance_scale, batch_size, progress, description
        ).cpu()  # fmt: skip

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
    }
    return _summarise(
        answers,
        {domain: head(baseline) for domain, head in chosen.heads.items()},
        {domain: head(images) for domain, head in chosen.heads.items()},
        baseline,
        images,
        settings,
    )


def _summarise(
    answers: AnswerSet,
    judged_before: dict[str, Tensor],
    judged_after: dict[str, Tensor],
    baseline: Tensor,
    images: Tensor,
    settings: dict[str, Any],
) -> Evaluation:
    """All numbers from images and the judges' answers (int64 [n] per domain)."""
    sizes = {domain: len(words) for domain, words in answers.classes.items()}
    forgotten = answers.forgotten

    def measure(judged: dict[str, Tensor]) -> dict[str, float | None]:
        return {
            **metrics_of_several(answers.prompted, judged, sizes, answers.targets),
            "NA": neighbour_accuracy(answers.prompted, judged, sizes, answers.targets),
        }

    def rows(judged: dict[str, Tensor]) -> dict[str, list[float]]:
        return {d: (100 * receiver_accuracy(answers.prompted[d], judged[d], sizes[d])).tolist() for d in sizes}

    def cells(judged: dict[str, Tensor], domain: str) -> list[list[float]]:
        (first, height), (second, width) = sizes.items()
        right = judged[domain] == answers.prompted[domain]
        table = cell_accuracy(answers.prompted[first], answers.prompted[second], right, (height, width))
        return (100 * table[answers.prompted[first].unique()][:, answers.prompted[second].unique()]).tolist()

    kept = ~forgotten
    metrics = measure(judged_after)
    metrics["drift"] = rms_difference(images[kept], baseline[kept]) if bool(kept.any()) else None
    metrics["drift_forget"] = rms_difference(images[forgotten], baseline[forgotten])
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
        metrics=metrics,
        base=measure(judged_before),
        intervals=intervals_of_several(answers.prompted, judged_after, answers.targets),
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
    )
