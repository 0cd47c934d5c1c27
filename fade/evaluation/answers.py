"""Answer sets: what is drawn to be judged, and which classes it asks for.

A bundled model's words are crossed with one another; on any other pipeline, words of the user's choice take the
concept's place in its own prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fade.bundled import BundledModel
from fade.concept import Pair, pairs_in
from fade.errors import FadeError
from fade.evaluation.metrics.unlearncanvas import Target, named_by_any, neighbours_of

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


def first_seeds(count: int) -> tuple[int, ...]:
    """UnlearnCanvas's five seeds, then every hundredth number after them. Raises FadeError for a count below 1."""
    if count < 1:
        raise FadeError(f"evaluation needs at least one seed, not {count}")
    more = range(_UNLEARNCANVAS_SEEDS[-1] + 100, _UNLEARNCANVAS_SEEDS[-1] + 100 * count, 100)
    return (*_UNLEARNCANVAS_SEEDS, *more)[:count]


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


def class_answers(
    concept: dict[str, Any],
    classes: Sequence[str],
    seeds: Sequence[int],
    beside: Sequence[str] = (),
    neighbours: Sequence[str] = (),
) -> AnswerSet:
    """The forget prompts, and the same prompts with every other class in the concept's place, once per seed.

    The classes are the concepts, their surrogates and `classes`, in this order, then `beside`, which a judge may answer
    and nothing asks for. `neighbours` are those of them that look like a concept. Raises FadeError where the forget
    prompts of a concept do not contain its words, so that nothing can take their place, and for a neighbour that is no
    class or is to be forgotten itself.
    """
    pairs = pairs_in(concept)
    given = (*(pair.forget for pair in pairs), *(pair.surrogate for pair in pairs), *classes)
    words = tuple(dict.fromkeys(word.strip() for word in given if word.strip()))
    near = tuple(dict.fromkeys(word.strip() for word in neighbours if word.strip()))
    gone = [pair.forget.strip() for pair in pairs]
    for word in near:
        if word not in words:
            raise FadeError(
                f"the look-alike {word!r} is none of the classes, which are {', '.join(words)}; name it among the "
                "classes, too (--classes)"
            )
        if word in gone:
            raise FadeError(f"the look-alike {word!r} is to be forgotten itself; leave it out of --neighbours")
    templates = list(dict.fromkeys(template for pair in pairs for template in _templates(pair)))
    cells = [(c, t) for _ in seeds for c in range(len(words)) for t in range(len(templates))]
    return AnswerSet(
        targets=tuple(
            Target(
                "class", words.index(pair.forget.strip()),
                words.index(pair.surrogate.strip()) if pair.surrogate.strip() else None,
                tuple(map(words.index, near)),
            )
            for pair in pairs
        ),
        classes={"class": (*words, *beside)},
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
