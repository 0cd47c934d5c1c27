"""The models that come with the package, each described once: its words, prompts and judges, and how it draws.

A bundled model draws objects in styles, two crossed domains of words each of which can be forgotten, as UnlearnCanvas
has them (Zhang et al., arXiv 2402.11846). Its package contributes one `BundledModel`, and nothing outside this file and
the packages knows a bundled model by name. Importing this imports neither a package nor torch.
"""

import difflib
import importlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fade.errors import FadeError

PACKAGES = {"digitcanvas": "fade.digitcanvas.bundled", "emojicanvas": "fade.emojicanvas.bundled"}
"""Each bundled model by the name that a user types, and the module whose `MODEL` describes it."""

DEFAULT = "digitcanvas"
"""The one that the demo shows unless told otherwise."""

MOST_LISTED = 20
"""Words that a message lists; of more it names those nearest to the one that was typed."""
LEAST_OTHERS = 12
"""Words that an evaluation draws beside those which a request is about and their neighbours."""


@dataclass(frozen=True)
class Domain:
    """One of a bundled model's two kinds of words.

    Templates hold one `{}` for the word; in `phrasings` and `held_out` a `<other>` may stand for a word of the other
    domain, and each of those is tried.
    """

    name: str
    """The kind, in the singular, as judges and metrics are called: `object`, `style`."""
    words: tuple[str, ...]
    caption: str
    """What the model was trained with where the other domain is left open."""
    phrasings: tuple[str, ...]
    """Further templates, which the solved edit reads."""
    held_out: tuple[str, ...]
    """Others, with which nothing is made: only measured (`fade.evaluation.metrics.phrasings`)."""
    look_alikes: tuple[tuple[str, ...], ...] = ()
    """Groups of words whose pictures are alike."""
    drawn: int | None = None
    """Of how many words an evaluation draws; None is of all."""

    def neighbours(self, word: str) -> tuple[str, ...]:
        """The words most like a word, without itself; none where it has no look-alike."""
        near = (other for group in self.look_alikes if word in group for other in group if other != word)
        return tuple(dict.fromkeys(near))


@dataclass(frozen=True)
class BundledModel:
    """What a request in words, an evaluation or the demo must know of a bundled model."""

    name: str
    """As a user types it for MODEL."""
    title: str
    path: Path
    """Its folder, in diffusers' layout."""
    domains: tuple[Domain, Domain]
    """Objects, then styles."""
    caption: str
    """Template of a prompt, with a `{}` for an object and one for a style, in this order."""
    marks: tuple[tuple[str, str, Any], ...]
    """By which its pipelines are known beside their vocabulary: (part, setting of its configuration, value)."""
    load_pipeline: Callable[..., Any]
    load_judges: Callable[..., Any]
    """A classifier for each domain, as a method of the domain's name: float images [n, 3, H, W] in [0, 1] -> index into
    the domain's words, int64 [n]."""
    steps: int
    guidance_scale: float
    """What its accuracy was measured with."""
    demo: tuple[str, str]
    """Concept and surrogate that the demo shows."""

    def prompt(self, first: str, second: str) -> str:
        """The caption of a word of the first domain and one of the second."""
        return self.caption.format(first, second)

    def prompts(self, word: str) -> tuple[str, ...]:
        """The captions of a word with every word of the other domain."""
        domain, other = self.domain(word), self.other(word)
        return tuple(self.prompt(*((word, o) if domain is self.domains[0] else (o, word))) for o in other.words)

    @property
    def all_prompts(self) -> dict[str, tuple[str, str]]:
        """Every caption, and the words of both domains in it."""
        first, second = (domain.words for domain in self.domains)
        return {self.prompt(a, b): (a, b) for a in first for b in second}

    def domain(self, word: str) -> Domain:
        """The domain of a word. Raises FadeError for a word of neither, with those nearest to it."""
        for domain in self.domains:
            if word in domain.words:
                return domain
        raise FadeError(f"{self.knows(word)}, not {word!r}")

    def other(self, word: str) -> Domain:
        """The domain that a word is crossed with. Raises FadeError as `domain`."""
        first, second = self.domains
        return second if self.domain(word) is first else first

    def knows(self, word: str) -> str:
        """The words of both domains, of many those nearest to a `word` that is none of them."""
        kinds = (f"the {domain.name}s {choices(word, domain.words)}" for domain in self.domains)
        return f"{self.title} knows {' and '.join(kinds)}"

    def alone(self, text: str) -> str:
        """A word alone as the caption that leaves the other domain open; any other text as it is."""
        word = text.strip()
        return next((domain.caption.format(word) for domain in self.domains if word in domain.words), text)

    def crossed(
        self, templates: Sequence[str], word: str, others: Sequence[str] | None = None
    ) -> tuple[tuple[str, str], ...]:
        """(template, template with each of the `others` in the place of `<other>`), `{}` left for the word; others are
        by default all words of the other domain."""
        others = others or self.other(word).words
        return tuple(
            (template, template.replace("<other>", other))
            for template in templates
            for other in (others if "<other>" in template else others[:1])
        )

    def concerned(self, words: Sequence[str], everything: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Of both domains the words that an evaluation draws of a request about `words`: every one, or these and their
        neighbours with a fixed random choice of others, `drawn` words in all and `LEAST_OTHERS` others at least."""
        chosen = []
        for domain in self.domains:
            own = [word for word in words if word in domain.words]
            named = list(dict.fromkeys([*own, *(near for word in own for near in domain.neighbours(word))]))
            if not everything and domain.drawn is not None:
                shuffled = random.Random(0).sample(domain.words, len(domain.words))
                others = [word for word in shuffled if word not in named]
                named += others[: max(domain.drawn - len(named), LEAST_OTHERS)]
            else:
                named = domain.words
            chosen.append(tuple(word for word in domain.words if word in named))
        return tuple(chosen)

    def heads(self, device: Any = "cpu") -> Mapping[str, Callable[[Any], Any]]:
        """By domain, the judge of it."""
        judges = self.load_judges(device)
        return {domain.name: getattr(judges, domain.name) for domain in self.domains}

    def drew(self, pipeline: Any) -> bool:
        """Whether a pipeline is this model, the bundled one or one trained again: its parts have the same sizes, and
        its small vocabulary has every word of both domains as whole tokens."""
        tokenizer = getattr(pipeline, "tokenizer", None)
        for part, name, value in self.marks:
            config = getattr(getattr(pipeline, part, None), "config", None)
            if getattr(config, name, None) != value:
                return False
        if tokenizer is None or len(tokenizer) > 2048:
            return False
        vocabulary = tokenizer.get_vocab()
        tokens = (token for domain in self.domains for word in domain.words for token in word.split())
        return all(f"{token}</w>" in vocabulary for token in tokens)


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn to be judged where nobody says otherwise: denoising steps, and the scale of
    classifier-free guidance."""

    steps: int = 20
    guidance_scale: float = 3.0


def model(name: str) -> BundledModel:
    """A bundled model by its name. Raises FadeError for another name."""
    if name not in PACKAGES:
        raise FadeError(f"there is no bundled model {name!r}; there are {' and '.join(PACKAGES)}")
    return _described(name)


@cache
def _described(name: str) -> BundledModel:
    return importlib.import_module(PACKAGES[name]).MODEL


def recognised(pipeline: Any) -> BundledModel | None:
    """The bundled model that a pipeline is, if it is one."""
    return next((found for name in PACKAGES if (found := model(name)).drew(pipeline)), None)


def name_of(source: str) -> str | None:
    """The name of the bundled model in a folder, if it is one's."""
    return next((name for name in PACKAGES if str(model(name).path) == source), None)


def drawing(pipeline: Any, steps: int | None = None, guidance_scale: float | None = None) -> Drawing:
    """How a pipeline's pictures are drawn to be judged: as given, else as the bundled model's accuracy was measured,
    and any other model in `Drawing`'s steps and scale."""
    own = recognised(pipeline) or Drawing()
    return Drawing(
        own.steps if steps is None else steps, own.guidance_scale if guidance_scale is None else guidance_scale
    )


def load_pretrained(pipeline_class: Any, path: Path, **kwargs: Any) -> Any:
    """A bundled model's pipeline, with its progress bar off and without bars for a load of a tenth of a second."""
    from fade.loading import without_loading_bars

    with without_loading_bars():
        pipeline = pipeline_class.from_pretrained(path, **{"use_safetensors": True, **kwargs})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def known(word: str, words: Sequence[str], kind: str) -> str:
    """The word. Raises ValueError where it is none of the words, with those to choose from."""
    if word not in words:
        raise ValueError(f"unknown {kind} {word!r}: choose one of {choices(word, words)}")
    return word


def choices(word: str, words: Sequence[str]) -> str:
    """The words, as a list to read; of more than `MOST_LISTED` those nearest to `word`, or the first where none is."""
    if len(words) <= MOST_LISTED:
        return ", ".join(words)
    return f"{', '.join(_near(word, words) or words[:3])}, … ({len(words)} in all)"


def _near(word: str, words: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(word.strip().casefold(), words, n=5)
