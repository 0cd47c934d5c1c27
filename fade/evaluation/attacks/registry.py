"""The attacks by name: one line each."""

from collections.abc import Sequence

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
from fade.evaluation.attacks.subject import Attack

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


def chosen_attacks(attacks: Sequence[str | Attack] | None) -> tuple[Attack, ...]:
    """Attacks by name, and those with settings of the caller's own as they are; None are all that there are.

    Raises FadeError for an unknown name, listing the known ones, and where none is chosen.
    """
    found: list[Attack] = []
    for attack in ATTACKS if attacks is None else attacks:
        if isinstance(attack, str) and attack not in ATTACKS:
            raise FadeError(f"there is no attack {attack!r}; choose among {', '.join(ATTACKS)}")
        found += ATTACKS[attack] if isinstance(attack, str) else [attack]
    if not found:
        raise FadeError(f"no attack is chosen; choose among {', '.join(ATTACKS)}")
    return tuple(dict.fromkeys(found))
