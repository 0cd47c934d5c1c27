"""Measures how often the model draws what its prompt says: ``python -m fade.emojicanvas.check``.

Every object is drawn in every style and shown to the judges. The numbers of MODEL_CARD.md are this command's output.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import FluxPipeline
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

from fade.emojicanvas import MODEL_PATH
from fade.emojicanvas.config import SAMPLING, call_for
from fade.emojicanvas.judges import JUDGES_PATH, Judges, load_judges
from fade.emojicanvas.prompts import OBJECTS, STYLES, prompt


@dataclass(frozen=True)
class Check:
    """What the judges said of generated pictures.

    ``object`` and ``style`` are their answers, int64 [objects, styles, samples]; ``pictures`` is float32
    [objects, styles, samples, 3, 64, 64] in [0, 1]; ``seconds`` is the time it took to draw them.
    """

    object: Tensor
    style: Tensor
    pictures: Tensor
    seconds: float

    @property
    def object_right(self) -> Tensor:
        """Whether each picture shows the object asked for: bool [objects, styles, samples]."""
        return self.object == torch.arange(len(self.object)).view(-1, 1, 1)

    @property
    def style_right(self) -> Tensor:
        """Whether each picture is in the style asked for: bool [objects, styles, samples]."""
        return self.style == torch.arange(self.style.shape[1]).view(1, -1, 1)


def check_pipeline(
    pipeline: FluxPipeline,
    judges: Judges,
    samples: int = 1,
    steps: int = SAMPLING["num_inference_steps"],
    guidance: float = SAMPLING["true_cfg_scale"],
    batch_size: int = 60,
    seed: int = 0,
    bfloat16: bool = False,
    progress: bool = False,
) -> Check:
    """Draw every object in every style ``samples`` times and judge the pictures.

    Picture ``i`` starts from noise of seed ``seed + i``, whatever the batch size. ``bfloat16`` draws under autocast.

    Raises:
        ValueError: ``samples``, ``steps`` or ``batch_size`` is below 1.
    """
    for name, value in (("samples", samples), ("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    prompts = [prompt(object, style) for object in OBJECTS for style in STYLES for _ in range(samples)]
    batches = [range(first, min(first + batch_size, len(prompts))) for first in range(0, len(prompts), batch_size)]
    pictures = []
    start = time.perf_counter()
    for batch in track(batches, "drawing", disable=not progress, transient=True):
        with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=bfloat16):
            texts = [prompts[i] for i in batch]
            call = {**call_for(texts), "num_inference_steps": steps, "true_cfg_scale": guidance}
            generators = [torch.Generator().manual_seed(seed + i) for i in batch]
            output = pipeline(texts, generator=generators, output_type="pt", **call)
        pictures.append(output.images.float().cpu())
    seconds = time.perf_counter() - start
    drawn = torch.cat(pictures)
    shape = (len(OBJECTS), len(STYLES), samples)
    return Check(
        judges.object(drawn).view(shape), judges.style(drawn).view(shape), drawn.view(*shape, *drawn.shape[1:]), seconds
    )


def _table(title: str, right: Tensor, answers: Tensor, words: tuple[str, ...]) -> Table:
    """One row a word that is not always right: its share, and what the judge saw instead."""
    table = Table("asked for", "right", "judged instead", title=title, title_justify="left")
    for i, word in enumerate(words):
        wrong = answers[i][~right[i]]
        if len(wrong):
            counts = wrong.bincount(minlength=len(words)).tolist()
            instead = sorted((-count, words[j]) for j, count in enumerate(counts) if count)
            share = f"{right[i].float().mean():.1%}"
            table.add_row(word, share, ", ".join(f"{name} {-count}" for count, name in instead))
    return table


def main(
    samples: Annotated[int, typer.Option(min=1, help="Pictures of each object in each style.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Euler steps.")] = SAMPLING["num_inference_steps"],
    guidance: Annotated[float, typer.Option(help="True guidance scale; 1 for none.")] = SAMPLING["true_cfg_scale"],
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    bfloat16: Annotated[bool, typer.Option(help="Draw under bf16 autocast, where the CPU is faster so.")] = False,
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Pipeline folder.")] = MODEL_PATH,
    judges: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Judges folder.")] = JUDGES_PATH,
    picture: Annotated[Path | None, typer.Option(help="Write the drawn pictures to this PNG file.")] = None,
) -> None:
    """Print the model's accuracy as the judges see it, for all objects in all styles."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    console = Console()
    pipeline = FluxPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    judged = load_judges(path=judges)
    check = check_pipeline(pipeline, judged, samples, steps, guidance, batch_size, seed, bfloat16, progress=True)
    object_right, style_right = check.object_right, check.style_right
    console.print(f"{object_right.numel()} pictures, Euler {steps} steps, guidance {guidance:g}, seed {seed}")
    console.print(
        f"model: object {object_right.float().mean():.2%}, style {style_right.float().mean():.2%}, "
        f"both {(object_right & style_right).float().mean():.2%}"
    )
    console.print(f"drawn in {check.seconds:.1f} s, {batch_size} at once, {torch.get_num_threads()} threads")
    console.print(_table("objects", object_right.flatten(1), check.object.flatten(1), OBJECTS))
    styles = (tensor.transpose(0, 1).flatten(1) for tensor in (style_right, check.style))
    console.print(_table("styles", *styles, STYLES))
    if picture is not None:
        from PIL import Image

        # Ten objects a row, in all styles below one another; each cell holds the first picture.
        sheet = check.pictures[:, :, 0].unflatten(0, (10, -1)).permute(0, 2, 4, 1, 5, 3)
        sheet = sheet.reshape(sheet.shape[0] * sheet.shape[1] * sheet.shape[2], -1, 3)
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet.mul(255).round().byte().numpy()).save(picture)
        console.print(f"first picture of each prompt: {picture}")


if __name__ == "__main__":
    typer.run(main)
