"""The sizes that every part of EmojiCanvas shares, and what each call of its pipeline needs.

``FluxPipeline`` takes 1024 pixels and 512 tokens where it is told nothing, and no file of a model tells it otherwise.
So whoever calls it passes :data:`CALL`, the one place where these numbers are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

IMAGE_SIZE = 64
"""Pixels of a picture's side."""

MAX_TOKENS = 16
"""Tokens of a prompt for either text encoder. Padding is read too, so another number is another prompt to the model."""

CALL: Mapping[str, int] = MappingProxyType(
    {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "max_sequence_length": MAX_TOKENS}
)
"""What every call of the pipeline must be given."""

SAMPLING: Mapping[str, float | int | str] = MappingProxyType(
    {"num_inference_steps": 12, "true_cfg_scale": 1.5, "negative_prompt": ""}
)
"""What the model card's numbers are measured with. ``guidance_scale`` does nothing: the model has no guidance input."""
