"""What is to be forgotten, what takes its place and what must stay: words turned into prompts.

A concept is put into several templates; the surrogate goes into the same ones, so that prompt i of the surrogate
answers prompt i of the concept. The retain prompts span what the model should keep drawing. In texts that people wrote
the concept is found as words: `man` is no part of `woman`. Several concepts are forgotten by one adapter (`together`),
or by adapters that add up (`beside`).
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from fade.bundled import BundledModel, choices
from fade.errors import FadeError

TEMPLATES = ("{}", "an image of {}", "a photo of {}", "a picture of {}")
"""Templates for a concept of an unknown kind; pass your own, such as "a painting in the style of {}", where you can."""

PHRASINGS = (
    "{}", "a {}", "the {}", "{} style", "an image of {}", "a photo of {}", "a picture of {}", "a drawing of {}",
    "a painting of {}", "a painting in the style of {}", "in the style of {}", "{}, digital art",
)  # fmt: skip
"""How people may put a concept, be it a thing, a person or a style: what the solved edit reads beside the templates.
`fade.evaluation.metrics.phrasings` measures with others."""

_SUBJECTS = (
    "a dog", "a cat", "a horse", "a bird", "a bowl of fruit", "a vase of flowers", "a car in a street", "a bicycle",
    "a mountain lake", "a forest path", "a beach at sunset", "a city skyline at night", "a wooden house", "a castle",
    "a man", "a woman", "a child", "a crowd of people", "a sailing ship", "an aeroplane", "a cup of coffee",
    "a bookshelf", "a kitchen", "a chair", "a train", "a field of wheat", "a snowy village", "a robot",
)  # fmt: skip
_MANNERS = ("a photo of {}", "an oil painting of {}", "a pencil drawing of {}", "{}, digital art")
RETAIN_PROMPTS = ("", *(manner.format(subject) for subject in _SUBJECTS for manner in _MANNERS))
"""Neutral prompts kept when the user names none: common subjects in common manners, and the empty prompt."""


LOOK_ALIKES = 0.1
"""Least share of a bundled model's retain prompts that are of the concept's look-alikes."""


@dataclass(frozen=True)
class Pair:
    """One concept to forget and what takes its place, in words and in prompts that answer each other; `phrasings`,
    `neighbours` and `apart` as in `Concept`."""

    forget: str
    surrogate: str
    forget_prompts: tuple[str, ...]
    surrogate_prompts: tuple[str, ...]
    phrasings: tuple[str, ...] = PHRASINGS
    neighbours: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()


@dataclass(frozen=True)
class Concept:
    """A forgetting request in prompts.

    `forget_prompts[i]` is to be answered as the frozen model answers `surrogate_prompts[i]`, and each of
    `retain_prompts` as before. The solved edit reads more: `phrasings` are further templates, with one `{}` each, in
    which the concept is to be answered as the surrogate, and each of `neighbours`, words of what must stay, as before.
    Texts that name one of `apart` do not name the concept thereby: "hot dog" is apart from "dog".
    Where several concepts are forgotten together, `forget` and `surrogate` name all of them, the prompts are those of
    all, and `several` says which belong to which, phrasings and neighbours included; it is empty for a single one.
    """

    forget: str
    surrogate: str
    forget_prompts: tuple[str, ...]
    surrogate_prompts: tuple[str, ...]
    retain_prompts: tuple[str, ...]
    phrasings: tuple[str, ...] = PHRASINGS
    neighbours: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    several: tuple[Pair, ...] = ()

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every concept of the request by itself; one at least."""
        own = Pair(
            self.forget, self.surrogate, self.forget_prompts, self.surrogate_prompts, self.phrasings, self.neighbours,
            self.apart,
        )  # fmt: skip
        return self.several or (own,)

    def to_dict(self) -> dict[str, Any]:
        """As adapter files hold it, for JSON; `pairs_in` reads it. Of several concepts, `pairs` gives the words of
        each and how many of the prompts are its own, in order."""
        return record_of(self.pairs, self.retain_prompts)

    def named_in(self, text: str, plurals: bool = False) -> bool:
        """Whether a text `mentions` what is to be forgotten."""
        return any(mentions(text, pair.forget, plurals, pair.apart) for pair in self.pairs)

    def answer(self, text: str, plurals: bool = False) -> str:
        """The text with each concept's surrogate in its place (`substitute`)."""
        return _answered(text, self.pairs, plurals)

    def phrased(self, pair: Pair, plurals: bool = False) -> tuple[tuple[str, str], ...]:
        """One of the `pairs` in its phrasings: (prompt, answer). Where an answer names another of the concepts, that
        one's surrogate takes its place, too."""
        others = [other for other in self.pairs if other != pair]
        return tuple(
            (template.replace("{}", pair.forget), _answered(template.replace("{}", pair.surrogate), others, plurals))
            for template in pair.phrasings
        )

    def phrased_neighbours(self, plurals: bool = False) -> tuple[str, ...]:
        """All neighbours in the phrasings, without prompts that name what is to be forgotten."""
        prompts = (t.replace("{}", word) for pair in self.pairs for word in pair.neighbours for t in pair.phrasings)
        return without_mention(dict.fromkeys(prompts), self.several, plurals)

    def __post_init__(self) -> None:
        prompts = (*self.forget_prompts, *self.surrogate_prompts, *self.retain_prompts, *self.phrasings)
        for text in (self.forget, self.surrogate, *self.neighbours, *self.apart, *prompts):
            if not isinstance(text, str):
                raise FadeError(f"concept and prompts must be texts, not {text!r}")
        if not self.forget.strip():
            raise FadeError("the concept to forget is empty; name it, e.g. --forget three")
        if self.forget.strip().lower() == self.surrogate.strip().lower():
            raise FadeError(
                f"the concept to forget and its surrogate are both {self.forget!r}; nothing would change. "
                "Choose another surrogate"
            )
        if len(self.forget_prompts) != len(self.surrogate_prompts) or not self.forget_prompts:
            raise FadeError("there must be as many surrogate prompts as forget prompts, and at least one")
        if not self.retain_prompts:
            raise FadeError("no retain prompt is left; give at least one prompt of what the model must keep")
        _check_templates("phrasing", self.phrasings)
        for prompt in prompts:
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise FadeError(f"the prompt {prompt!r} is no valid text; check its encoding") from error


def concept_from_words(
    forget: str,
    surrogate: str,
    templates: Sequence[str] | None = None,
    retain: Sequence[str] | None = None,
    plurals: bool = False,
) -> Concept:
    """A concept of any model, from templates with one `{}` each.

    `retain` defaults to `RETAIN_PROMPTS`, without those that mention the concept (`mentions`, which `plurals` is for).
    Raises FadeError for a template without exactly one `{}`, for an empty list of templates or retain prompts, and
    where concept and surrogate are the same.
    """
    templates = _texts("templates", templates) or TEMPLATES
    _check_templates("template", templates)
    kept = _texts("retain", retain) or tuple(p for p in RETAIN_PROMPTS if not mentions(p, forget, plurals))
    return Concept(
        forget=forget,
        surrogate=surrogate,
        forget_prompts=tuple(t.replace("{}", forget) for t in templates),
        surrogate_prompts=tuple(t.replace("{}", surrogate) for t in templates),
        retain_prompts=kept,
        neighbours=(surrogate,),
    )


def _check_templates(kind: str, templates: Sequence[str]) -> None:
    for template in templates:
        if template.count("{}") != 1:
            raise FadeError(f"a {kind} needs exactly one {{}} where the concept goes, not {template!r}")


def bundled_concept(model: BundledModel, forget: str, surrogate: str, retain: Sequence[str] | None = None) -> Concept:
    """A word of a bundled model: its crossings with the whole other domain; all other crossings are kept, those of its
    look-alikes so many times over that they are `LOOK_ALIKES` of what is.

    Raises FadeError where concept and surrogate are not two words of one domain.
    """
    kept, domain = _texts("retain", retain), model.domain(forget)
    if surrogate not in domain.words:
        known = choices(surrogate, domain.words)
        raise FadeError(f"the surrogate of {forget!r} must be one of {known}, not {surrogate!r}")
    others = {prompt: words for prompt, words in model.all_prompts.items() if forget not in words}
    near = [prompt for prompt, words in others.items() if not set(domain.neighbours(forget)).isdisjoint(words)]
    again = near * max(0, round(LOOK_ALIKES * len(others) / max(1, len(near))) - 1)
    return Concept(
        forget=forget,
        surrogate=surrogate,
        forget_prompts=model.prompts(forget),
        surrogate_prompts=model.prompts(surrogate),
        retain_prompts=kept or (*others, *again),
        phrasings=tuple(dict.fromkeys(template for _, template in model.crossed(domain.phrasings, forget))),
        neighbours=tuple(word for word in domain.words if word != forget),
        apart=tuple(word for word in domain.words if word != forget and mentions(word, forget)),
    )


# --- several concepts ------------------------------------------------------------------------------------------------


def record_of(pairs: Sequence[Pair], retain_prompts: Sequence[str]) -> dict[str, Any]:
    """What adapter files hold of concepts that are forgotten together; `pairs_in` reads it."""
    record: dict[str, Any] = {
        "forget": _in_short([pair.forget for pair in pairs]),
        "surrogate": _in_short([pair.surrogate for pair in pairs]),
        "forget_prompts": tuple(prompt for pair in pairs for prompt in pair.forget_prompts),
        "surrogate_prompts": tuple(prompt for pair in pairs for prompt in pair.surrogate_prompts),
        "retain_prompts": tuple(retain_prompts),
    }
    if len(pairs) > 1:
        record["pairs"] = [
            {"forget": pair.forget, "surrogate": pair.surrogate, "prompts": len(pair.forget_prompts)} for pair in pairs
        ]
    return record


def _in_short(words: Sequence[str], most: int = 400) -> str:
    """The words as one name; of very many, the first and how many more there are."""
    ends = accumulate(len(word) + 2 for word in words)
    shown = [word for end, word in zip(ends, words, strict=True) if end <= most] or words[:1]
    more = len(words) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def pairs_in(record: Mapping[str, Any]) -> tuple[Pair, ...]:
    """The concepts that an adapter's metadata names under `concept`: one, or all that were forgotten together.

    The one reader of that record, whoever wrote it. Raises ValueError where its parts do not fit together.
    """
    forget, surrogate = tuple(record.get("forget_prompts", ())), tuple(record.get("surrogate_prompts", ()))
    if "pairs" not in record:
        return (Pair(record["forget"], record.get("surrogate") or "", forget, surrogate),)
    pairs, start = [], 0
    for pair in record["pairs"]:
        many = pair["prompts"]
        if type(many) is not int or not 0 <= many <= len(forget) - start:
            raise ValueError("the concepts have other prompts than they say")
        own = slice(start, start := start + many)
        pairs.append(Pair(pair["forget"], pair["surrogate"], forget[own], surrogate[own]))
    if not pairs or start != len(forget) or start != len(surrogate):
        raise ValueError("the concepts have other prompts than they say")
    return tuple(pairs)


def check_together(pairs: Sequence[Pair], plurals: bool = False) -> None:
    """Raises FadeError where concepts cannot be forgotten beside each other: one is there twice, or the surrogate of
    one is itself to be forgotten."""
    seen = set()
    for pair in pairs:
        if (word := plain_words(pair.forget)) in seen:
            raise FadeError(f"{pair.forget!r} is to be forgotten twice; name each concept once")
        seen.add(word)
    for pair in pairs:
        for other in pairs:
            if other is not pair and mentions(pair.surrogate, other.forget, plurals, other.apart):
                raise FadeError(
                    f"the surrogate {pair.surrogate!r} of {pair.forget!r} is itself to be forgotten ({other.forget!r}, "
                    f"as {other.surrogate!r}); choose another surrogate"
                )


def together(concepts: Sequence[Concept], plurals: bool = False) -> Concept:
    """One request for several concepts, to be forgotten by one adapter.

    Where a surrogate prompt names another of the concepts, that one's surrogate takes its place, too. The retain
    prompts are those of all, with the surrogates' own, but none that names any of the concepts: it would hold that one
    in place. Raises FadeError where the concepts do not go together (`check_together`) or no retain prompt is left.
    """
    if not concepts:
        raise FadeError("there is no concept to forget; name one at least")
    if len(concepts) == 1:
        return concepts[0]
    pairs = [pair for concept in concepts for pair in concept.pairs]
    check_together(pairs, plurals)
    pairs = [
        replace(
            pair,
            surrogate_prompts=tuple(
                _answered(prompt, [other for other in pairs if other is not pair], plurals)
                for prompt in pair.surrogate_prompts
            ),
        )
        for pair in pairs
    ]
    answers = [prompt for pair in pairs for prompt in pair.surrogate_prompts]
    kept = dict.fromkeys([*(prompt for concept in concepts for prompt in concept.retain_prompts), *answers])
    record = record_of(pairs, without_mention(kept, pairs, plurals))
    record.pop("pairs")
    return Concept(**record, several=tuple(pairs))


def beside(concept: Concept, others: Sequence[Pair], plurals: bool = False) -> Concept:
    """The request for an adapter that acts beside those which forget `others`, so that their changes add up.

    What the others forget is theirs to change, so that this adapter leaves it as it is: their prompts and their
    surrogates' join the retain prompts, without those that name what this one forgets. Raises FadeError as `together`.
    """
    if not others:
        return concept
    check_together([*concept.pairs, *others], plurals)
    theirs = [p for pair in others for p in (*pair.forget_prompts, *pair.surrogate_prompts)]
    kept = dict.fromkeys([*concept.retain_prompts, *theirs])
    return replace(concept, retain_prompts=without_mention(kept, concept.pairs, plurals))


def holding_surrogates(concept: Concept, plurals: bool = False) -> Concept:
    """The request with the surrogates' prompts among the retain prompts, those that are not there yet behind them, but
    none that names what is forgotten."""
    answers = without_mention(dict.fromkeys(concept.surrogate_prompts), concept.pairs, plurals)
    missing = tuple(prompt for prompt in answers if prompt not in concept.retain_prompts)
    return replace(concept, retain_prompts=(*concept.retain_prompts, *missing)) if missing else concept


def _answered(text: str, pairs: Sequence[Pair], plurals: bool) -> str:
    # The longest first: "black cat" is found before the "cat" in it.
    for pair in sorted(pairs, key=lambda pair: -len(pair.forget)):
        text = substitute(text, pair.forget, pair.surrogate, plurals, pair.apart)
    return text


def without_mention(prompts: Iterable[str], pairs: Sequence[Pair], plurals: bool = False) -> tuple[str, ...]:
    """The prompts that name none of the concepts."""
    return tuple(p for p in prompts if not any(mentions(p, pair.forget, plurals, pair.apart) for pair in pairs))


def plain_words(words: str) -> str:
    """Words without what makes no difference between two names: case, form of accents, number of spaces."""
    return " ".join(unicodedata.normalize("NFC", words).casefold().split())


def _texts(name: str, given: Sequence[str] | None) -> tuple[str, ...] | None:
    """A list that the user gave, None where none was. Raises FadeError for one text, no text, and what is no text."""
    if given is None:
        return None
    if isinstance(given, str):
        raise FadeError(f"{name} must be a list of texts, not one text: {name}=[{given!r}]")
    texts = tuple(given)
    for text in texts:
        if not isinstance(text, str):
            raise FadeError(f"{name} must be a list of texts; {text!r} is none")
    if not texts:
        raise FadeError(f"{name} is an empty list; give at least one, or leave it out for the default ones")
    return texts


# --- the concept as words --------------------------------------------------------------------------------------------


def mentions(text: str, concept: str, plurals: bool = False, apart: Sequence[str] = ()) -> bool:
    """Whether a text names the concept as words, whatever their case, and not as part of one of `apart`.

    A word ends where its letters, digits and accents do: at spaces, punctuation, underscores, hyphens and the
    apostrophe of "cat's" (but not of "can't", which is one word). Between the concept's own words may stand spaces,
    hyphens or underscores: "Van Gogh" is found in "van-gogh". Scripts without spaces between words (Chinese, Japanese,
    Thai, …) have no ends to look for. With `plurals` the English plural of the last word counts, too.
    """
    return next(_found(text, concept, plurals, apart), None) is not None


def substitute(text: str, concept: str, surrogate: str, plurals: bool = False, apart: Sequence[str] = ()) -> str:
    """The text with the surrogate in the concept's place wherever it `mentions` it, and everything else as it is (in
    Unicode's composed form). The plural of the concept becomes that of the surrogate."""
    text = unicodedata.normalize("NFC", text)
    parts, end = [], 0
    for match in _found(text, concept, plurals, apart):
        parts += [text[end : match.start()], plural(surrogate) if match.lastgroup == "plural" else surrogate]
        end = match.end()
    return "".join([*parts, text[end:]])


_IRREGULAR_PLURALS = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "mouse": "mice", "goose": "geese",
    "foot": "feet", "tooth": "teeth", "ox": "oxen", "wolf": "wolves", "knife": "knives", "leaf": "leaves",
    "wife": "wives", "elf": "elves", "shelf": "shelves", "hero": "heroes", "potato": "potatoes", "tomato": "tomatoes",
    "sheep": "sheep", "fish": "fish", "deer": "deer", "aircraft": "aircraft",
}  # fmt: skip


def plural(words: str) -> str:
    """The English plural of a noun phrase, without its indefinite article: "a wild cat" -> "wild cats"."""
    words = re.sub(r"^an?\s+", "", words.strip(), flags=re.IGNORECASE)
    start = re.search(r"[^\W_]*$", words).start()
    last = words[start:]
    for ending, many in sorted(_IRREGULAR_PLURALS.items(), key=lambda pair: -len(pair[0])):
        if last.lower() == ending or (ending in ("man", "woman", "child") and last.lower().endswith(ending)):
            return words[:start] + last[: len(last) - len(ending)] + many
    if re.search(r"(s|x|z|ch|sh)$", last, re.IGNORECASE):
        return words + "es"
    if re.search(r"[^aeiou]y$", last, re.IGNORECASE):
        return words[:-1] + "ies"
    return words + "s"


def _found(text: str, concept: str, plurals: bool, apart: Sequence[str] = ()) -> Iterator[re.Match[str]]:
    pattern = _pattern(concept, plurals)
    text = unicodedata.normalize("NFC", text)
    others = [other.span() for words in apart for other in _found(text, words, plurals)]
    position = 0
    while pattern is not None and (match := pattern.search(text, position)):
        within = any(start <= match.start() and match.end() <= end for start, end in others)
        if not within and _stands_alone(text, match.start(), match.end()):
            yield match
            position = match.end()
        else:
            position = match.start() + 1


@lru_cache(maxsize=256)
def _pattern(concept: str, plurals: bool) -> re.Pattern[str] | None:
    """The concept's spellings, wherever they stand; None for a concept without any word."""
    forms = {"plural": plural(concept), "own": concept} if plurals else {"own": concept}
    spellings = []
    for name, form in forms.items():
        words = [word for word in re.split(rf"[\s{_HYPHENS}]+", unicodedata.normalize("NFC", form)) if word]
        if not words:
            return None
        spelt = rf"[\s{_HYPHENS}]+".join(re.sub("['’ʼ]", "['’ʼ]", re.escape(word)) for word in words)
        spellings.append(f"(?P<{name}>{spelt})")
    return re.compile("|".join(spellings), re.IGNORECASE)


_HYPHENS = "_\\-\u2010-\u2015\u2212"
_APOSTROPHES = "'’ʼ"


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] begins and ends where words do."""
    if start > 0 and _one_word(text[start - 1], text[start]):
        return False
    rest = text[end:]
    if not rest:
        return True
    if rest[0] in _APOSTROPHES and _is_letter(text[end - 1]):
        contraction = re.match(r"[^\W\d_]*", rest[1:]).group()
        return contraction.lower() in ("", "s")
    return not _one_word(text[end - 1], rest[0])


def _one_word(left: str, right: str) -> bool:
    return _is_letter(left) and _is_letter(right) and not (_is_unspaced(left) or _is_unspaced(right))


def _is_letter(character: str) -> bool:
    """Letters, digits, and the marks that some scripts write their vowels with."""
    return unicodedata.category(character)[0] in "LMN"


def _is_unspaced(character: str) -> bool:
    """Whether it belongs to a script that writes words without spaces, or particles (Korean) without."""
    return unicodedata.name(character, "").startswith(_UNSPACED)


_UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """Prompts from a text file, one a line; empty lines are skipped. Raises FadeError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FadeError(f"cannot read the prompts in {path}: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise FadeError(f"{path} holds no prompt; write one a line")
    return prompts
