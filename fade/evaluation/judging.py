"""Who tells what images show.

A bundled model has judges of its own; any other pipeline is judged by CLIP, or by a function of the user's, on words of
the user's choice.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fade.bundled import recognised
from fade.concept import pairs_in
from fade.errors import FadeError
from fade.evaluation.answers import SEEDS, AnswerSet, class_answers, crossed_answers
from fade.evaluation.features import FeatureExtractor, JudgeFeatures
from fade.evaluation.plugin_judge import NONE, PREFIX, PluginJudge


@dataclass(frozen=True)
class Judge:
    """Who tells what images show: one head per domain, float images [n, 3, H, W] in [0, 1] -> int64 [n]."""

    name: str
    heads: dict[str, Callable[[Tensor], Tensor]]
    answers: Callable[[Sequence[int]], AnswerSet]
    """What to draw for it, given the seeds."""
    features: FeatureExtractor | None = None
    """Features of its own to compare pictures by."""
    clip: str | None = None
    """The CLIP model that it is."""


def judge_for(
    pipeline: Any,
    concept: dict[str, Any],
    model: str | None,
    classes: Sequence[str],
    device: torch.device,
    everything: bool = False,
    neighbours: Sequence[str] = (),
) -> Judge:
    """The bundled model's own judge, or the CLIP `model` with `classes`, or the function `python:module.function`, for
    a concept as an adapter's metadata names it; `everything` draws every word of the bundled model, `neighbours` are
    the look-alikes of the concept among the words of another judge.

    Raises FadeError where there is none, where it does not know the concept, and for neighbours that are no classes.
    """
    if model is None:
        if (bundled := recognised(pipeline)) is None:
            raise FadeError(
                "this pipeline has no judge of its own (only bundled models have); name a CLIP model and the words it "
                "should tell apart: --judge openai/clip-vit-base-patch16 --classes dog,cat,horse, or a function of "
                "your own: --judge python:module.function"
            )
        if neighbours:
            raise FadeError(
                f"{bundled.title}'s own judge knows the look-alikes of its words; leave --neighbours out, or name "
                "another judge with --judge"
            )
        pairs = pairs_in(concept)
        answers = functools.partial(
            crossed_answers, bundled, [pair.forget for pair in pairs], [pair.surrogate for pair in pairs],
            everything=everything,
        )  # fmt: skip
        answers(SEEDS)  # knows the concept
        features = JudgeFeatures(bundled.title, bundled.load_judges())
        return Judge(f"{bundled.title} classifiers", bundled.heads(), answers, features)
    answers = functools.partial(class_answers, concept, classes, neighbours=neighbours)
    words = answers(SEEDS).classes["class"]
    if model.startswith(PREFIX):
        own = PluginJudge(model, words)
        return Judge(model, {"class": own}, functools.partial(answers, beside=(NONE,)))
    from fade.evaluation.clip_judge import ClipJudge

    return Judge(f"CLIP zero-shot, {model}", {"class": ClipJudge(model, words, device)}, answers, clip=model)
