"""What is to be forgotten, what takes its place and what must stay: words turned into prompts.

A concept is put into several templates; the surrogate goes into the same ones, so that prompt i of the surrogate
answers prompt i of the concept. The retain prompts span what the model should keep drawing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fade.errors import FadeError

TEMPLATES = ("{}", "an image of {}", "a photo of {}", "a picture of {}")
"""Templates for a concept of an unknown kind; pass your own, such as "a painting in the style of {}", where you can."""

_SUBJECTS = (
    "a dog", "a cat", "a horse", "a bird", "a bowl of fruit", "a vase of flowers", "a car in a street", "a bicycle",
    "a mountain lake", "a forest path", "a beach at sunset", "a city skyline at night", "a wooden house", "a castle",
    "a man", "a woman", "a child", "a crowd of people", "a sailing ship", "an aeroplane", "a cup of coffee",
    "a bookshelf", "a kitchen", "a chair", "a train", "a field of wheat", "a snowy village", "a robot",
)  # fmt: skip
_MANNERS = ("a photo of {}", "an oil painting of {}", "a pencil drawing of {}", "{}, digital art")
RETAIN_PROMPTS = ("", *(manner.format(subject) for subject in _SUBJECTS for manner in _MANNERS))
"""Neutral prompts kept when the user names none: common subjects in common manners, and the empty prompt."""


@dataclass(frozen=True)
class Concept:
    """A forgetting request in prompts.

    `forget_prompts[i]` is to be answered as the frozen model answers `surrogate_prompts[i]`, and each of
    `retain_prompts` as before.
    """

    forget: str
    surrogate: str
    forget_prompts: tuple[str, ...]
    surrogate_prompts: tuple[str, ...]
    retain_prompts: tuple[str, ...]

    def __post_init__(self) -> None:
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
        for prompt in (*self.forget_prompts, *self.surrogate_prompts, *self.retain_prompts):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise FadeError(f"the prompt {prompt!r} is no valid text; check its encoding") from error


def concept_from_words(
    forget: str,
    surrogate: str,
    templates: Sequence[str] | None = None,
    retain: Sequence[str] | None = None,
) -> Concept:
    """A concept of any model, from templates with one `{}` each.

    `retain` defaults to `RETAIN_PROMPTS`, without those that contain the concept. Raises FadeError for a template
    without exactly one `{}`, and where concept and surrogate are the same.
    """
    for name, given in (("templates", templates), ("retain", retain)):
        if isinstance(given, str):
            raise FadeError(f"{name} must be a list of texts, not one text: {name}=[{given!r}]")
    templates = tuple(templates) if templates else TEMPLATES
    for template in templates:
        if template.count("{}") != 1:
            raise FadeError(f"a template needs exactly one {{}} where the concept goes, not {template!r}")
    word = forget.strip().lower()
    kept = tuple(retain) if retain else tuple(p for p in RETAIN_PROMPTS if not word or word not in p.lower())
    return Concept(
        forget=forget,
        surrogate=surrogate,
        forget_prompts=tuple(t.replace("{}", forget) for t in templates),
        surrogate_prompts=tuple(t.replace("{}", surrogate) for t in templates),
        retain_prompts=kept,
    )


def digitcanvas_concept(forget: str, surrogate: str, retain: Sequence[str] | None = None) -> Concept:
    """A digit or a style of the bundled model: its crossings with the whole other axis; all other crossings are kept.

    Raises FadeError where the words are not two digits or two styles.
    """
    from fade.digitcanvas import DIGITS, STYLES, prompt

    if isinstance(retain, str):
        raise FadeError(f"retain must be a list of texts, not one text: retain=[{retain!r}]")
    for axis, pairs in (
        (DIGITS, lambda word: tuple(prompt(word, style) for style in STYLES)),
        (STYLES, lambda word: tuple(prompt(digit, word) for digit in DIGITS)),
    ):
        if forget in axis:
            if surrogate not in axis:
                raise FadeError(f"the surrogate of {forget!r} must be one of {', '.join(axis)}, not {surrogate!r}")
            others = tuple(prompt(d, s) for d in DIGITS for s in STYLES if forget not in (d, s))
            return Concept(forget, surrogate, pairs(forget), pairs(surrogate), tuple(retain) if retain else others)
    raise FadeError(
        f"DigitCanvas knows the digits {', '.join(DIGITS)} and the styles {', '.join(STYLES)}, not {forget!r}"
    )


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """Prompts from a text file, one a line; empty lines are skipped. Raises FadeError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FadeError(f"cannot read the prompts in {path}: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise FadeError(f"{path} holds no prompt; write one a line")
    return prompts
