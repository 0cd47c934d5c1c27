"""Measures how often the model draws what its prompt says: ``python -m fade.digitcanvas.check``.

Every digit is drawn in every style and shown to the judges. The numbers of MODEL_CARD.md are this command's output.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

from fade.digitcanvas import MODEL_PATH
from fade.digitcanvas.data import load_digits
from fade.digitcanvas.judges import JUDGES_PATH, Judges, judge_accuracy, load_judges
from fade.digitcanvas.prompts import DIGITS, STYLES, prompt


@dataclass(frozen=True)
class Check:
    """What the judges said of generated pictures.

    ``digit_right`` and ``style_right`` are bool [digits, styles, samples]; ``pictures`` is float32
    [digits, styles, samples, 3, 32, 32] in [0, 1]; ``seconds`` is the time it took to draw them.
    """

    digit_right: Tensor
    style_right: Tensor
    pictures: Tensor
    seconds: float


def check_pipeline(
    pipeline: StableDiffusionPipeline,
    judges: Judges,
    samples: int = 3,
    steps: int = 20,
    guidance: float = 3.0,
    batch_size: int = 60,
    seed: int = 0,
    progress: bool = False,
) -> Check:
    """Draw every digit in every style ``samples`` times and judge the pictures.

    Picture ``i`` starts from noise of seed ``seed + i``, whatever the batch size.

    Raises:
        ValueError: ``samples``, ``steps`` or ``batch_size`` is below 1.
    """
    for name, value in (("samples", samples), ("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    prompts = [prompt(digit, style) for digit in DIGITS for style in STYLES for _ in range(samples)]
    batches = [range(first, min(first + batch_size, len(prompts))) for first in range(0, len(prompts), batch_size)]
    pictures = []
    start = time.perf_counter()
    for batch in track(batches, "drawing", disable=not progress, transient=True):
        output = pipeline(
            [prompts[i] for i in batch],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + i) for i in batch],
            output_type="pt",
        )
        pictures.append(output.images.float().cpu())
    seconds = time.perf_counter() - start
    drawn = torch.cat(pictures)
    shape = (len(DIGITS), len(STYLES), samples)
    digit_right = judges.digit(drawn).view(shape) == torch.arange(len(DIGITS)).view(-1, 1, 1)
    style_right = judges.style(drawn).view(shape) == torch.arange(len(STYLES)).view(1, -1, 1)
    return Check(digit_right, style_right, drawn.view(*shape, *drawn.shape[1:]), seconds)


def _table(words: tuple[str, ...], digit: Tensor, style: Tensor) -> Table:
    table = Table("asked for", "right digit", "right style")
    for word, *shares in zip(words, digit.tolist(), style.tolist(), strict=True):
        table.add_row(word, *(f"{share:.1%}" for share in shares))
    return table


def main(
    samples: Annotated[int, typer.Option(min=1, help="Pictures of each digit in each style.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 3.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Pipeline folder.")] = MODEL_PATH,
    judges: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Judges folder.")] = JUDGES_PATH,
    picture: Annotated[Path | None, typer.Option(help="Write the drawn pictures to this PNG file.")] = None,
) -> None:
    """Print the judges' accuracy on held-out digits and the model's accuracy as the judges see it."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    console = Console()
    loaded_judges = load_judges(path=judges)
    accuracy = judge_accuracy(loaded_judges, load_digits("held_out"))
    console.print(f"judges on held-out digits: digit {accuracy['digit']:.2%}, style {accuracy['style']:.2%}")

    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    check = check_pipeline(pipeline, loaded_judges, samples, steps, guidance, batch_size, seed, progress=True)
    digit, style = check.digit_right.float(), check.style_right.float()
    console.print(f"{digit.numel()} pictures, DDIM {steps} steps, guidance {guidance:g}, seed {seed}")
    console.print(f"model: digit {digit.mean():.2%}, style {style.mean():.2%}")
    console.print(f"drawn in {check.seconds:.1f} s, {batch_size} at once, {torch.get_num_threads()} threads")
    console.print(_table(DIGITS, digit.mean((1, 2)), style.mean((1, 2))))
    console.print(_table(STYLES, digit.mean((0, 2)), style.mean((0, 2))))
    if picture is not None:
        from PIL import Image

        # One row a style, one column a digit; each cell holds the first picture.
        sheet = check.pictures[:, :, 0].permute(1, 3, 0, 4, 2).reshape(len(STYLES) * 32, len(DIGITS) * 32, 3)
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet.mul(255).round().byte().numpy()).save(picture)
        console.print(f"first picture of each prompt: {picture}")


if __name__ == "__main__":
    typer.run(main)
