"""DigitCanvas: a small but complete text-to-image pipeline that ships with the package, with judges of what it draws.

It is the embedded default on which everything runs on two CPU cores: handwritten digits in eight styles, in diffusers'
layout, loaded like any Stable Diffusion checkpoint. MODEL_CARD.md beside this file holds its measured accuracy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fade.bundled import load_pretrained
from fade.digitcanvas.prompts import DIGITS, STYLES, digit_prompt, prompt, style_prompt

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

    from fade.digitcanvas.judges import Judges

__all__ = [
    "DIGITS",
    "MODEL_PATH",
    "STYLES",
    "digit_prompt",
    "load_judges",
    "load_pipeline",
    "prompt",
    "style_prompt",
]

MODEL_PATH: Path = Path(__file__).parent / "model"


def load_pipeline(**kwargs: Any) -> StableDiffusionPipeline:
    """The DigitCanvas pipeline, with its progress bar off.

    Args:
        kwargs: handed to ``StableDiffusionPipeline.from_pretrained``, such as ``torch_dtype=torch.bfloat16``.

    Returns:
        A pipeline whose call draws 32x32 pictures when no height and width are given; 20 steps and
        ``guidance_scale=3.0`` are what its accuracy was measured with.
    """
    from diffusers import StableDiffusionPipeline

    return load_pretrained(StableDiffusionPipeline, MODEL_PATH, **kwargs)


def load_judges(device: str | torch.device = "cpu") -> Judges:
    """The judges of DigitCanvas: which digit and which style a picture shows.

    See :class:`fade.digitcanvas.judges.Judges` for their input and their answers.
    """
    from fade.digitcanvas import judges

    return judges.load_judges(device)
