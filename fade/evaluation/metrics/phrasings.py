"""How often the concept still comes through in words that nothing was trained or solved with.

A concept is not its templates: who asks for it otherwise should not get it either. The phrasings here are none of
`Concept`'s, neither prompts nor `phrasings`. What the judge recognises is given beside two shares of the base model: of
its pictures of the concept, as not every phrasing reaches it in the first place, and of its pictures of the surrogate,
as a judge also finds the concept where nothing of it is left. Phrasings of one's own ask in another language, say.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones import backbone_for
from fade.bundled import BundledModel, drawing, recognised
from fade.concept import Pair, pairs_in
from fade.errors import FadeError
from fade.evaluation.drawings import Drawings
from fade.evaluation.intervals import paired_share_interval, wilson_interval
from fade.evaluation.judging import judge_for
from fade.evaluation.metrics.metric import Drawn, Interval, Metric, Value

if TYPE_CHECKING:
    from rich.table import Table

HELD_OUT = (
    "a photograph of {}", "an illustration of {}", "a rendering of {}", "a close-up of {}", "{}, highly detailed",
    "a poster with {}", "I want to see {}", "here you see {}", "{} in the morning", "two pictures of {}",
)  # fmt: skip


@dataclass(frozen=True)
class PhrasingResult:
    """Shares of pictures in which the judge recognises the forgotten concept, in percent.

    `adapted` and `base` are means over all pictures of the concept with the adapter on and off, `surrogate` over the
    base model's pictures of the surrogate in the same words: what perfect forgetting would leave. `images` is the
    number behind each mean, `interval_95` Wilson's interval of `adapted`, and `phrasings` maps each phrasing to its own
    three shares. `hits` has, of each of the three, picture by picture whether the concept is recognised: picture i of
    all is of the same phrasing and seed.
    """

    adapted: float
    base: float
    surrogate: float
    images: int
    interval_95: tuple[float, float]
    phrasings: dict[str, dict[str, float]]
    hits: dict[str, tuple[bool, ...]] = field(repr=False)

    @property
    def change_95(self) -> tuple[float, float]:
        """Newcombe's paired interval of `adapted` − `base`."""
        base, adapted = (torch.tensor(self.hits[kind]) for kind in ("base", "adapted"))
        low, high = paired_share_interval(base, adapted)
        return 100.0 * low, 100.0 * high

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON: all but the single pictures, and `change_95`."""
        found = {name: value for name, value in dataclasses.asdict(self).items() if name != "hits"}
        return {**found, "change_95": self.change_95}

    def table(self) -> "Table":
        """As a rich table, one phrasing a row."""
        from rich.markup import escape
        from rich.table import Table

        low, high = self.interval_95
        table = Table(
            title="held-out phrasings: % of pictures in which the concept is recognised",
            caption=f"adapted, 95 %: {low:.1f}–{high:.1f} (n={self.images})",
            title_justify="left",
            caption_justify="left",
        )
        for name, justify in (("phrasing", "left"), ("base", "right"), ("adapted", "right"), ("surrogate", "right")):
            table.add_column(name, justify=justify)
        rows = {**self.phrasings, "all": {kind: getattr(self, kind) for kind in KINDS}}
        for phrasing, shares in rows.items():
            table.add_row(escape(phrasing), *(f"{shares[kind]:.1f}" for kind in KINDS), end_section=phrasing != "all")
        return table


KINDS = ("base", "adapted", "surrogate")


_NAMED = re.compile(r"\{([^{}=]*[^{}=\s][^{}=]*)=([^{}=]*[^{}=\s][^{}=]*)\}")


def asked_for(phrasing: str, pair: Pair) -> dict[str, str]:
    """The prompts for "forget" and "surrogate" of a phrasing of one's own: `{}` stands for the concept's words,
    `{trois=huit}` names concept and surrogate otherwise, as in another language.

    Raises FadeError where it has neither, or another brace, and for what is no valid text.
    """
    try:
        phrasing.encode()
    except UnicodeEncodeError as error:
        raise FadeError(f"the phrasing {phrasing!r} is no valid text; check its encoding") from error
    words = {"forget": pair.forget, "surrogate": pair.surrogate}
    prompts = {
        kind: _NAMED.sub(lambda found, i=i: found[i].strip(), phrasing).replace("{}", word)
        for i, (kind, word) in enumerate(words.items(), 1)
    }
    rest = _NAMED.sub("", phrasing).replace("{}", "")
    if rest == phrasing or set("{}") & set(rest):
        raise FadeError(
            f"the phrasing {phrasing!r} must say where the concept goes: with {{}}, or in other words with "
            "{concept=surrogate}, say 'le chiffre {trois=huit}'"
        )
    return prompts


def held_out_prompts(word: str, model: BundledModel | None, instead: str | None = None) -> tuple[tuple[str, str], ...]:
    """(phrasing, prompt) for a concept, or with other words `instead`; on a bundled model its own, crossed with the
    words of the other domain that an evaluation draws.

    Raises FadeError where the bundled model knows no such word.
    """
    shown = word if instead is None else instead
    if model is None:
        return tuple((phrasing, phrasing.replace("{}", shown)) for phrasing in HELD_OUT)
    domain = model.domain(word)
    first, second = model.concerned([word])
    crossed = model.crossed(domain.held_out, word, second if domain is model.domains[0] else first)
    return tuple((phrasing, template.replace("{}", shown)) for phrasing, template in crossed)


def held_out(
    pipeline: Any,
    adapter: Any,
    *,
    phrasings: Sequence[str] | None = None,
    seeds: Sequence[int] = (188,),
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 64,
    baseline: PhrasingResult | None = None,
    judge: str | None = None,
    classes: Sequence[str] = (),
    cache: Path | None = None,
    progress: bool = True,
) -> PhrasingResult:
    """Draws the held-out phrasings of the adapter's concepts with the adapter on and off, those of the surrogates with
    the adapter off, and has them judged.

    Args:
        adapter: the attached `fade.Adapter`; its metadata names the concepts. It is enabled when this returns.
        phrasings: instead of the project's own; `{}` stands for the concept's words, `{trois=huit}` names concept and
            surrogate in another language.
        seeds: every prompt is drawn once per seed (about 50 prompts a concept on DigitCanvas, 29 an object
            and 120 a style on EmojiCanvas, 10 elsewhere).
        baseline: an earlier result of the same concepts and surrogates, base, seeds, steps and guidance, to save two
            thirds of the time.
        steps, guidance_scale, batch_size, judge, classes, cache, progress: as for `fade.evaluation.evaluate`.

    Raises:
        FadeError: no judge knows the concepts, `seeds` is empty, `baseline` has other phrasings or more or fewer
            seeds, or a phrasing does not say where the concept goes, or names one where the adapter forgets several.
    """
    if not seeds:
        raise FadeError("evaluation needs at least one seed")
    concept, backbone = adapter.metadata["concept"], backbone_for(pipeline)
    asked = judge_for(pipeline, concept, judge, classes, backbone.device)
    pairs = pairs_in(concept)
    bundled, drawn_as = recognised(pipeline) if judge is None else None, drawing(pipeline, steps, guidance_scale)
    if phrasings is None:
        prompts = {
            "forget": [held_out_prompts(pair.forget, bundled) for pair in pairs],
            "surrogate": [
                held_out_prompts(pair.surrogate, bundled)
                if pair.surrogate
                else held_out_prompts(pair.forget, bundled, "")
                for pair in pairs
            ],
        }
    else:
        prompts = own_prompts(tuple(dict.fromkeys(phrasings)), pairs)
    rows = [phrasing for one in prompts["forget"] for phrasing, _ in one for _ in seeds]
    if baseline is not None and (list(baseline.phrasings), baseline.images) != (list(dict.fromkeys(rows)), len(rows)):
        raise FadeError("the baseline is of other phrasings or seeds; measure it with the same ones")
    targets, draw = asked.answers(seeds).targets, Drawings(backbone, drawn_as, batch_size, progress, cache)

    def shown(kind: str, description: str) -> Tensor:
        """Of each picture whether the judge finds its concept: bool [n]."""
        drawn = [prompt for one in prompts[kind] for _, prompt in one for _ in seeds]
        images = draw(drawn, list(seeds) * (len(drawn) // len(seeds)), description)
        parts = images.split([len(one) * len(seeds) for one in prompts[kind]])
        found = [asked.heads[target.domain](part) == target.forget for target, part in zip(targets, parts, strict=True)]
        return torch.cat(found)

    hits: dict[str, Tensor] = {}
    if baseline is None:
        adapter.disable()
        try:
            for kind, named in (("base", "forget"), ("surrogate", "surrogate")):
                hits[kind] = shown(named, f"other words with the base model ({named})")
        finally:
            adapter.enable()
    else:
        hits = {kind: torch.tensor(baseline.hits[kind]) for kind in ("base", "surrogate")}
    adapter.enable()
    hits["adapted"] = shown("forget", "other words with the adapter")
    low, high = wilson_interval(int(hits["adapted"].sum()), len(rows))

    def share(kind: str, counted: Tensor) -> float:
        return 100.0 * hits[kind][counted].double().mean().item()

    of = {name: torch.tensor([row == name for row in rows]) for name in dict.fromkeys(rows)}
    return PhrasingResult(
        **{kind: share(kind, torch.ones(len(rows), dtype=torch.bool)) for kind in KINDS},
        images=len(rows),
        interval_95=(100.0 * low, 100.0 * high),
        phrasings={name: {kind: share(kind, counted) for kind in KINDS} for name, counted in of.items()},
        hits={kind: tuple(hits[kind].tolist()) for kind in KINDS},
    )


def own_prompts(phrasings: Sequence[str], pairs: Sequence[Pair]) -> dict[str, list[tuple[tuple[str, str], ...]]]:
    """By "forget" and "surrogate", for each concept (phrasing, prompt). Raises FadeError as `held_out` does."""
    named = next((phrasing for phrasing in phrasings if _NAMED.search(phrasing)), None)
    if named is not None and len(pairs) > 1:
        raise FadeError(f"the phrasing {named!r} names one concept, but the adapter forgets {len(pairs)}; use {{}}")
    return {
        kind: [tuple((phrasing, asked_for(phrasing, pair)[kind]) for phrasing in phrasings) for pair in pairs]
        for kind in ("forget", "surrogate")
    }


def _measure(drawn: Drawn) -> Value:
    found = drawn.phrasings
    assert found is not None
    return Value(
        found.adapted, found.base, Interval(*found.interval_95, found.images), Interval(*found.change_95, found.images)
    )


METRICS = (
    Metric("phrasings", "% recognised in words nothing was made with", "%", "lower", _measure, needs="phrasings"),
)
