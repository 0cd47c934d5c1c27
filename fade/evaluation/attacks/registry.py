"""The attacks by name: one line each."""

from collections.abc import Sequence
from dataclasses import fields, replace

from fade.errors import FadeError
from fade.evaluation.attacks import (
    benign_tuning,
    completion,
    embedding_inversion,
    image_to_image,
    inpainting,
    noise_probe,
    null_text_inversion,
    prompt_tokens,
    pruning,
    quantising,
    relearning,
    removal,
    textual_inversion,
    token_search,
)
from fade.evaluation.attacks.settings import as_text, changed, checked, usual
from fade.evaluation.attacks.subject import Attack, Subject

ATTACKS: dict[str, tuple[Attack, ...]] = {
    "removal": removal.VARIANTS,
    "completion": completion.VARIANTS,
    "noise-probe": noise_probe.VARIANTS,
    "image-to-image": image_to_image.VARIANTS,
    "inpainting": inpainting.VARIANTS,
    "token-search": token_search.VARIANTS,
    "prompt-tokens": prompt_tokens.VARIANTS,
    "quantising": quantising.VARIANTS,
    "pruning": pruning.VARIANTS,
    "null-text-inversion": null_text_inversion.VARIANTS,
    "textual-inversion": textual_inversion.VARIANTS,
    "embedding-inversion": embedding_inversion.VARIANTS,
    "benign-fine-tuning": benign_tuning.VARIANTS,
    "relearning": relearning.VARIANTS,
}
"""Each attack with the settings it is tried with, cheap ones first."""

_EXAMPLE = "textual-inversion:vectors=3,iterations=500"


def chosen_attacks(attacks: Sequence[str | Attack] | None) -> tuple[Attack, ...]:
    """Attacks by name, those with settings of the caller's own as they are, and texts of both: `relearning`,
    `textual-inversion:vectors=3,iterations=500`, or several with commas between them. None are all that there are.

    Raises FadeError for an unknown name, setting or value, telling the known ones, and where none is chosen.
    """
    kinds = tuple(type(variants[0]) for variants in ATTACKS.values())
    found: list[Attack] = []
    for attack in ATTACKS if attacks is None else attacks:
        if isinstance(attack, str):
            found += _named(attack)
        else:
            found.append(checked(attack) if isinstance(attack, kinds) else attack)
    if not found:
        raise FadeError(f"no attack is chosen; choose among {', '.join(ATTACKS)}")
    return tuple(dict.fromkeys(found))


def setting_of(attack: Attack, subject: Subject) -> str:
    """An attack's setting in a few words; with settings of the caller's own, those that its words leave out behind."""
    words, variants = attack.setting(subject), ATTACKS.get(attack.name, ())
    if attack in variants or not any(isinstance(attack, type(one)) for one in variants):
        return words
    before = usual(variants)
    unsaid = {
        one.name: getattr(attack, one.name)
        for one in fields(attack)
        if getattr(attack, one.name) != (value := getattr(before, one.name))
        and replace(attack, **{one.name: value}).setting(subject) == words
    }
    return ", ".join([words, *(f"{name}={as_text(value)}" for name, value in unsaid.items())])


def _named(text: str) -> list[Attack]:
    """The attacks of a text. Raises FadeError for what is none."""
    asked: list[tuple[str, dict[str, str] | None]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, colon, item = part.partition(":")
        if colon:
            asked.append((_known(name.strip()), {}))
        elif "=" in part:
            item = part
        else:
            asked.append((_known(part), None))
            continue
        key, equals, value = (piece.strip() for piece in item.partition("="))
        settings = asked[-1][1] if asked else None
        if settings is None or not (key and equals and value):
            raise FadeError(f"{part!r} is no attack with settings, such as {_EXAMPLE}")
        if key in settings:
            raise FadeError(f"{text!r} gives {key} twice")
        settings[key] = value
    found: list[Attack] = []
    for name, settings in asked:
        found += ATTACKS[name] if settings is None else [changed(ATTACKS[name], settings)]
    return found


def _known(name: str) -> str:
    if name not in ATTACKS:
        raise FadeError(
            f"there is no attack {name!r}; choose among {', '.join(ATTACKS)} (`fade attack --list` has their settings)"
        )
    return name
