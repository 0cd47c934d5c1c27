"""EmojiCanvas: a hundred objects in six styles of real emoji, drawn by a small, complete pipeline in FLUX.1's layout.

The harder of the two bundled models: many classes, near neighbours among them, and a flow-matching transformer where
DigitCanvas has a UNet. ``FluxPipeline.from_pretrained(MODEL_PATH)`` loads it like FLUX.1, with judges of what it draws;
MODEL_CARD.md beside this file holds its measured accuracy.

What a backbone for it needs, all of it as in FLUX.1:

- A prompt is two things. The T5 encoder (``text_encoder_2``) reads it as exactly 16 tokens, padding included and
  without an attention mask: its last hidden states [n, 16, 96] are ``encoder_hidden_states``, with ``txt_ids`` zeros
  [16, 3]. The CLIP encoder (``text_encoder``) reads it as 16 tokens as well: its pooled state [n, 96] is
  ``pooled_projections``. The negative prompt of classifier-free guidance (``true_cfg_scale``) is the empty one.
- Latents are 16 x 8 x 8 for 64 x 64 pixels, ``(z - shift_factor) * scaling_factor`` of what the VAE encodes (the shift
  is 0), packed to [n, 16, 64] in patches of 2 x 2 with channels ordered (c, row, column). ``img_ids`` are (0, row,
  column) of each patch, float [16, 3].
- Time is sigma in [0, 1], given to the transformer as such (the pipeline divides its time steps by 1,000); it predicts
  the velocity noise - picture of ``(1 - sigma) * picture + sigma * noise``, of which ``guidance`` is no input. The
  scheduler is flow-matching Euler without a shift; training drew sigma as the sigmoid of a standard normal.
- Every call of the pipeline takes :data:`CALL`; :func:`call_for` adds steps, guidance and the negative prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fade.bundled import load_pretrained
from fade.emojicanvas.config import CALL, NEGATIVE_PROMPT, SAMPLING, call_for
from fade.emojicanvas.prompts import OBJECTS, STYLES, neighbours, object_prompt, prompt, style_prompt

if TYPE_CHECKING:
    import torch
    from diffusers import FluxPipeline

    from fade.emojicanvas.judges import Judges

__all__ = [
    "CALL",
    "MODEL_PATH",
    "NEGATIVE_PROMPT",
    "OBJECTS",
    "SAMPLING",
    "STYLES",
    "call_for",
    "load_judges",
    "load_pipeline",
    "neighbours",
    "object_prompt",
    "prompt",
    "style_prompt",
]

MODEL_PATH: Path = Path(__file__).parent / "model"


def load_pipeline(**kwargs: Any) -> FluxPipeline:
    """The EmojiCanvas pipeline, with its progress bar off.

    Args:
        kwargs: handed to ``FluxPipeline.from_pretrained``, such as ``torch_dtype=torch.bfloat16``.

    Returns:
        A pipeline that is to be called with :data:`CALL` at least; ``pipeline(prompts, **call_for(prompts))`` draws as
        the model card's accuracy was measured.
    """
    from diffusers import FluxPipeline

    return load_pretrained(FluxPipeline, MODEL_PATH, **kwargs)


def load_judges(device: str | torch.device = "cpu") -> Judges:
    """The judges of EmojiCanvas: which object and which style a picture shows.

    See :class:`fade.emojicanvas.judges.Judges` for their input and their answers.
    """
    from fade.emojicanvas import judges

    return judges.load_judges(device)
