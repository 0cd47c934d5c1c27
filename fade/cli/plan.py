"""`fade plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fade.cli.options import OVERWRITE, Keep, OverwriteMethod, config_from, of_method
from fade.cli.output import json_text, say, terminal
from fade.errors import FadeError

if TYPE_CHECKING:
    from rich.table import Table

    from fade.planning import Plan


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A diffusers folder (its config.json files are enough), digitcanvas, emojicanvas, or a model whose "
            "configurations are known, such as flux.1-dev, qwen-image or sdxl.",
        ),
    ],
    size: Annotated[
        int | None, typer.Option(metavar="N", help="Side of the pictures in pixels. Default: the model's own.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Latents at once: in each pass that is differentiated (in stage 2 half of them retained ones), and "
            "when they are sampled. Default: the settings' own.",
        ),
    ] = None,
    keep: Keep = None,
    method: OverwriteMethod = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="fp32|bf16|nf4", help="Plan this dtype alone. Default: all three.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Rank of the factors. {of_method(OVERWRITE.rank, 'distillation')}"),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Memory of the device, such as 24GB: says what fits, and what to change where it does not. Default: "
            "90 % of what is free on the GPU, where there is one.",
        ),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Plan a run on the CPU, where nothing leaves meanwhile.")] = False,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file with any setting; options given here come before it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, in bytes.")] = False,
) -> None:
    """Say how much memory unlearning on MODEL takes, phase by phase, from its configuration alone.

    Example: [bold]fade plan flux.1-dev --dtype nf4 --budget 24GB[/bold]
    """
    chosen = config_from(config, locate__keep=keep, overwrite__method=method, overwrite__rank=rank)
    if batch_size is not None and batch_size < 1:
        raise FadeError(f"--batch-size must be at least 1, not {batch_size}")
    if dtype not in (None, "fp32", "bf16", "nf4"):
        raise FadeError(f"unknown dtype {dtype!r}; say fp32, bf16 or nf4")
    from fade.config import parse_bytes

    room = None if budget is None else parse_bytes(budget)

    from fade.planning import advise, with_batch
    from fade.planning import plan as count

    if batch_size is not None:
        chosen = with_batch(chosen, batch_size)
    dtypes = (dtype,) if dtype else ("fp32", "bf16", "nf4")
    made = count(model, chosen, size, dtypes, on_gpu=not cpu, device_bytes=room or _memory(cpu))
    if room is None:
        room = _free(cpu)
    found = [] if room is None else [advise(made.run, column.dtype, room) for column in made.columns]
    if as_json:
        print(json_text({**made.to_dict(), "budget": [vars(one) for one in found]}))
        return
    terminal().print(_table(made))
    for one in found:
        say(_verdict(one))


def _free(cpu: bool) -> int | None:
    """What is free for a run on this machine's GPU; None where there is none."""
    import torch

    from fade.measure import free_memory

    return None if cpu or not torch.cuda.is_available() else int(0.9 * free_memory("cuda"))


def _memory(cpu: bool) -> int | None:
    """Of this machine's GPU; None where there is none."""
    import torch

    from fade.training_mode import device_memory

    return None if cpu or not torch.cuda.is_available() else device_memory(torch.device("cuda"))


def _table(made: "Plan") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    from fade.measure import human_bytes

    run, config, columns = made.run, made.run.config, made.columns
    name, family = run.model.name, run.model.backbone.family
    table = Table(
        title=escape(
            f"{name} ({family.name}): {config.overwrite.method}, keep {config.locate.keep:g}, pictures of "
            f"{run.model.side} pixels, on a {'GPU' if run.on_gpu else 'CPU'}"
        ),
        title_justify="left",
    )
    table.add_column("")
    table.add_column("numbers", justify="right")
    for column in columns:
        table.add_column(column.dtype, justify="right")

    def row(label: str, numbers: str, values: list[int | None], **more: Any) -> None:
        shown = ["–" if value is None else human_bytes(value) for value in values]
        table.add_row(escape(label), numbers, *shown, **more)

    parameters = run.model.parameters
    encoders = sum(parameters[part] for part in run.model.encoders)
    row(family.component, _count(parameters[family.component]), [column.denoiser for column in columns])
    row("text encoders", _count(encoders), [column.encoders for column in columns])
    row("VAE", _count(parameters["vae"]), [column.vae for column in columns])
    row("encoded prompts, latents", "", [column.prompts + column.latents for column in columns], end_section=True)
    each = len(columns)
    row(f"masks of {len(run.layers)} target layers", _count(run.weights), [run.mask_bytes] * each)
    if run.accumulators:
        row("saliency accumulators", "", [run.accumulators] * each)
    row("adapter", _count(run.adapter.numbers), [run.adapter_bytes] * each)
    if config.trains:
        row("gradients, optimiser", "", [3 * run.adapter_bytes] * each)
        rounded = [run.rounded_bytes(column.dtype) for column in columns]
        if any(rounded):
            row("rounded weights of a step", "", [size or None for size in rounded])
        step = f"activations of {run.step_latents} latents"
        row(step, "", [column.activations["plain"] for column in columns])
        row("   with gradient checkpointing", "", [column.activations["checkpointed"] for column in columns])
    table.columns[0].no_wrap = True
    table.add_section()
    for phase in columns[0].peaks:
        peaks = [column.peaks.get(phase, {}) for column in columns]
        row(f"peak: {phase}", "", [peak.get("plain") for peak in peaks])
        if any(peak.get("plain") != peak.get("checkpointed") for peak in peaks):
            row("   with gradient checkpointing", "", [peak.get("checkpointed") for peak in peaks])
    return table


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"


def _verdict(advice: Any) -> str:
    from fade.measure import human_bytes

    where = f"{advice.dtype} in {human_bytes(advice.budget)}"
    if advice.fits:
        return f"{where}: fits"
    if advice.blocked is not None:
        return f"{where}: does not fit: {advice.blocked}" + (
            ". In nf4 it would take less" if advice.dtype != "nf4" else ""
        )
    return f"{where}: fits with {'; '.join(advice.changes)}"
