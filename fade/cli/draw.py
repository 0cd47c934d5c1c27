"""`fade generate`."""

from pathlib import Path
from typing import Annotated

import typer

from fade.cli.options import AnyBase, Device, DrawSteps, Dtype, Guidance, Model, Quiet
from fade.cli.output import say
from fade.errors import FadeError


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to draw.")],
    output: Annotated[Path, typer.Option(metavar="IMG", help="Image file; with --count, IMG-1, IMG-2 and so on.")],
    adapter: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Adapter file; several add up. None draws with the base model."),
    ] = None,
    scale: Annotated[float, typer.Option(metavar="S", help="Strength of the adapters: 0 off, 1 as trained.")] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**40, metavar="N", help="Seed of the first image; image n has seed + n - 1.")
    ] = 0,
    count: Annotated[int, typer.Option(min=1, max=10_000, metavar="N", help="Images to draw.")] = 1,
    steps: DrawSteps = None,
    guidance: Guidance = None,
    device: Device = None,
    dtype: Dtype = None,
    any_base: AnyBase = False,
    quiet: Quiet = False,
) -> None:
    """Draw images, with adapters or without.

    Example: [bold]fade generate digitcanvas --adapter A.safetensors --prompt "the digit three" --output 3.png[/bold]
    """
    from PIL import Image

    kind = Image.registered_extensions().get(output.suffix.lower())
    if kind not in Image.SAVE:
        raise FadeError(f"the image file {output} must end in a known image type, such as .png or .jpg")
    from fade.adapter import load_adapter
    from fade.backbones import backbone_for
    from fade.bundled import drawing
    from fade.files import atomic_write, check_writable
    from fade.loading import load_model

    for index in range(1, count + 1):
        check_writable(output if count == 1 else output.with_stem(f"{output.stem}-{index}"))
    pipeline = load_model(model, device, dtype)
    for index, path in enumerate(adapter or []):
        load_adapter(pipeline, path, name=f"fade_{index}", scale=scale, check_base=not any_base)
    drawn = drawing(pipeline, steps, guidance)
    images = backbone_for(pipeline).generate(
        [prompt] * count, range(seed, seed + count), drawn.steps, drawn.guidance_scale, batch_size=8, progress=not quiet
    )
    for index, image in enumerate(images, 1):
        path = output if count == 1 else output.with_stem(f"{output.stem}-{index}")
        picture = Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy())
        with atomic_write(path) as temporary:
            picture.save(temporary, format=kind)
        say(f"{path}")
