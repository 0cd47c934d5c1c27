"""What is asked for: the arguments of `fade.unlearn` and their settings, as concepts in prompts.

Everything that can be told of a request before anything is begun is told here.
"""

import os
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fade.adapter import Adapter
from fade.backbones import Backbone
from fade.base_model import base_name, check_same_base, fingerprint, short_digest
from fade.bundled import recognised
from fade.concept import Concept, Pair, bundled_concept, concept_from_words, pairs_in
from fade.config import Config
from fade.errors import FadeError
from fade.images import listed
from fade.peft_file import read_any_file


def with_method(config: Config | None, method: str | None, resume: bool = False) -> Config:
    """The settings, of the method where one is named. Raises FadeError for an unknown one, and for settings that were
    given and that it does not read; a run that is resumed goes on with those that it was begun with."""
    if method is not None and not isinstance(method, str):
        raise FadeError(f"method must be a name, not {method!r}"[:200])
    if not isinstance(config, Config | None):
        raise FadeError(f"config must be a fade.Config, not a {type(config).__name__}; see fade.Config().replace")
    config = config or Config()
    config = config if method is None else config.replace(overwrite__method=method)
    if not resume:
        config.refuse_ignored()
    return config


def check_arguments(output: str | Path | None, name: str, overwrite: bool, resume: bool) -> None:
    if resume and (output is None or overwrite):
        why = "needs the output folder of the interrupted run" if output is None else "excludes overwrite"
        raise FadeError(f"resume {why}; give output and resume alone to go on, or overwrite to start again")
    if not isinstance(name, str):
        raise FadeError(f"name must be a text, not {name!r}"[:200])
    if not isinstance(output, str | os.PathLike | None):
        raise FadeError(f"output must be a folder's path, not {output!r}"[:200])


def requested_concepts(
    pipeline: Any,
    forget: str | Mapping[str, str] | None,
    surrogate: str | None,
    concept: Concept | Sequence[Concept] | None,
    templates: Sequence[str] | None,
    retain: Sequence[str] | None,
    config: Config,
) -> list[Concept]:
    """Each concept that the arguments name, in prompts. Raises FadeError where they do not fit together."""
    if concept is not None:
        concepts = list(concept) if isinstance(concept, list | tuple) else [concept]
        for one in concepts:
            if not isinstance(one, Concept):
                raise FadeError(f"concept must be a fade.Concept, not a {type(one).__name__}; or a list of them")
        given = {"forget": forget, "surrogate": surrogate, "templates": templates, "retain": retain}
        if ignored := [name for name, value in given.items() if value is not None]:
            names = ", ".join(ignored)
            raise FadeError(f"{names} would be ignored beside concept, which holds all prompts; give either")
        return concepts
    if forget is None and surrogate is None and config.concepts:
        forget = {words.forget: words.surrogate for words in config.concepts}
        if len(forget) < len(config.concepts):
            raise FadeError("the settings name a concept to forget twice; name each concept once")
    if isinstance(forget, Mapping):
        if surrogate is not None:
            raise FadeError(
                "surrogate would be ignored beside several concepts, which name their own: give "
                "forget={'three': 'eight', 'seven': 'one'} alone, or forget='three' with surrogate='eight'"
            )
        words = dict(forget)
    elif forget is None or surrogate is None:
        raise FadeError("name the concept to forget and its surrogate, e.g. forget='three', surrogate='eight'")
    else:
        words = {forget: surrogate}
    for argument, texts in (("forget", words), ("surrogate", words.values())):
        for text in texts:
            if not isinstance(text, str):
                raise FadeError(f"{argument} must be a text, not {text!r}"[:200])
    concepts = [_concept(pipeline, *pair, templates, retain, config.data.plurals) for pair in words.items()]
    if len(concepts) > 1 and retain is not None:
        naming = [prompt for prompt in retain if any(one.named_in(prompt, config.data.plurals) for one in concepts)]
        if naming:
            warnings.warn(
                f"left out {len(naming)} of {len(retain)} retain prompts, which name a concept that is to be "
                f"forgotten: {listed([repr(prompt) for prompt in naming])}",
                stacklevel=3,
            )
    return concepts


def _concept(
    pipeline: Any,
    forget: str,
    surrogate: str,
    templates: Sequence[str] | None,
    retain: Sequence[str] | None,
    plurals: bool,
) -> Concept:
    if templates is None and (model := recognised(pipeline)) is not None:
        return bundled_concept(model, forget, surrogate, retain)
    return concept_from_words(forget, surrogate, templates, retain, plurals)


def concepts_of(backbone: Backbone, adapters: Sequence[str | Path | Adapter]) -> list[Pair]:
    """What the adapters forget that the new one acts beside. Raises FadeError for one of other weights."""
    if isinstance(adapters, str | os.PathLike | Adapter):
        adapters = [adapters]
    pairs = []
    for adapter in adapters:
        if isinstance(adapter, Adapter):
            shown, metadata = f"the adapter {adapter.name!r}", adapter.metadata
        else:
            shown, file = read_any_file(adapter)
            metadata = file.metadata
        found = fingerprint(backbone.denoiser, tuple(metadata["fingerprint"]))
        check_same_base(
            metadata["fingerprint"],
            found,
            f"{shown} was trained on {metadata.get('base', 'another model')} ({short_digest(metadata['fingerprint'])})",
            f", and the new adapter cannot act beside it on {base_name(backbone.pipeline)} ({short_digest(found)})",
        )
        pairs += pairs_in(metadata["concept"])
    return pairs


BESIDE_CHANGE = 0.15
"""Of `closed_form.retain_change`, for an adapter whose changes add up with those of others; it is then held, whatever
is `left`. With 12 of DigitCanvas's 18 concepts forgotten, at 0.25 of it one that was taken out came back in 75 % of its
images, and at 0.1 one was not forgotten in all; at 0.15 all were, and came back whole."""


def settings_for(config: Config, concepts: int, beside: bool) -> Config:
    """The settings of an adapter that forgets so many concepts, or acts beside others: `keep` is for each concept."""
    if beside:
        config = config.replace(
            closed_form__retain_change=BESIDE_CHANGE * config.closed_form.retain_change, closed_form__left=None
        )
        if config.closed_form.refit is None and config.solves and config.trains:
            config = config.replace(closed_form__refit=True)
    return config.replace(locate__keep=min(1.0, concepts * config.locate.keep))


def slugs(concepts: Sequence[str]) -> list[str]:
    """A name for each concept that may be a folder's and an adapter's: its letters and digits, joined by underscores;
    numbered where two would be alike."""
    names: list[str] = []
    for words in concepts:
        slug = base = re.sub(r"\W+", "_", unicodedata.normalize("NFKC", words)).strip("_")[:80] or "concept"
        number = 1
        while slug in names:
            slug = f"{base}_{(number := number + 1)}"
        names.append(slug)
    return names
