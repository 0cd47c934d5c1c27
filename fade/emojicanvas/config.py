"""The sizes that every part of EmojiCanvas shares, and what each call of its pipeline needs.

``FluxPipeline`` takes 1024 pixels and 512 tokens where it is told nothing, and no file of a model tells it otherwise.
So whoever calls it passes :data:`CALL`, the one place where these numbers are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

IMAGE_SIZE = 64
"""Pixels of a picture's side."""

MAX_TOKENS = 16
"""Tokens of a prompt for either text encoder. Padding is read too, so another number is another prompt to the model."""

CALL: Mapping[str, int] = MappingProxyType(
    {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "max_sequence_length": MAX_TOKENS}
)
"""What every call of the pipeline must be given."""

SAMPLING: Mapping[str, float] = MappingProxyType({"num_inference_steps": 12, "true_cfg_scale": 1.5})
"""What the model card's numbers are measured with. ``guidance_scale`` does nothing: the model has no guidance input."""

NEGATIVE_PROMPT = ""
"""What classifier-free guidance leads away from; without one the pipeline draws without guidance."""


def call_for(prompts: str | Sequence[str]) -> dict[str, Any]:
    """All that the pipeline is told beside ``prompts`` to draw them as the model card's pictures were drawn.

    ``pipeline(prompts, **call_for(prompts))``
    """
    negative = NEGATIVE_PROMPT if isinstance(prompts, str) else [NEGATIVE_PROMPT] * len(prompts)
    return {**CALL, **SAMPLING, "negative_prompt": negative}
