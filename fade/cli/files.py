"""`fade merge`, `fade export`, `fade combine` and `fade inspect`: adapter files and what is made of them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fade.cli.options import AdapterPath, AnyBase, Dtype, Model, Overwrite
from fade.cli.output import fact_table, json_text, say, terminal
from fade.errors import FadeError, printable
from fade.export import FORMATS


def merge(
    model: Model,
    adapter: AdapterPath,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the merged model, in diffusers' layout.")],
    scale: Annotated[float, typer.Option(metavar="S", help="Strength of the adapter: 0 off, 1 as trained.")] = 1.0,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    any_base: AnyBase = False,
) -> None:
    """Write MODEL with the adapter merged into its weights: `fade export --format merged`, in short.

    What rounding to a 16-bit dtype costs is said, not asked for. Example: [bold]fade merge digitcanvas --adapter
    no-three/adapter.safetensors --output merged[/bold]
    """
    _export(
        adapter, "merged", output, model=model, scale=scale, any_base=any_base, loaded_in=dtype, overwrite=overwrite,
        single_file=False, lossy=True,
    )  # fmt: skip


def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter file, or the folder that holds it.")],
    format: Annotated[
        str,
        typer.Option(
            metavar="|".join(FORMATS),
            help="lora: a LoRA, exact for masks of whole rows and columns and for low-rank edits. shira: PEFT's sparse "
            "format. diff: dense, for ComfyUI and A1111. merged: the whole model.",
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="PATH", help="A .safetensors file; a folder for shira, --keys peft and merged.")
    ],
    keys: Annotated[
        str | None,
        typer.Option(
            metavar="diffusers|peft|kohya",
            help="What a LoRA's tensors are called; ComfyUI reads kohya. Default diffusers.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model it was made for; merged needs it, others where they say so."),
    ] = None,
    scale: Annotated[float, typer.Option(metavar="S", help="Strength that is written: 1 as trained.")] = 1.0,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Write also what is not exact, and say how far off it is.")
    ] = False,
    rank: Annotated[
        int | None, typer.Option(metavar="R", help="With --lossy: the nearest LoRA of this rank, layer by layer.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="fp32|fp16|bf16", help="Dtype written; 16 bits need --lossy. Default fp32.")
    ] = None,
    single_file: Annotated[
        bool,
        typer.Option(
            "--single-file",
            help="With merged: one file in the original layout (Stable Diffusion 1.x, 2.x), as where PATH ends so.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    any_base: AnyBase = False,
) -> None:
    """Write an adapter as files that other programs load, exactly or not at all (but see --lossy).

    Example: [bold]fade export no-three --format lora --keys kohya --output no-three-lora.safetensors[/bold]
    """
    _export(
        adapter, format, output, model=model, scale=scale, any_base=any_base,
        loaded_in=dtype if format == "merged" else None, overwrite=overwrite, lossy=lossy, keys=keys, rank=rank,
        dtype=None if format == "merged" else dtype, single_file=single_file or None,
    )  # fmt: skip


def _export(
    adapter: Path, format: str, output: Path, *, model: str | None, scale: float, any_base: bool, loaded_in: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Exports a file through the model, where one is given, else from the file alone, and says what came of it."""
    if output.exists() and adapter.exists() and output.samefile(adapter):
        raise FadeError(f"the output {output} is the adapter itself; name another output")
    if model is not None:
        from fade.adapter import load_adapter
        from fade.loading import load_model

        attached = load_adapter(load_model(model, "cpu", loaded_in), adapter, scale=scale, check_base=not any_base)
        report = attached.export(output, format, say=say, **options)
    else:
        from fade.export import export as run
        from fade.export.edit import read_edit

        report = run(read_edit(adapter, scale), output, format, say=say, **options)
    if not report.exact:
        for name, error in report.layer_errors.items():
            say(f"  {name}: {100 * error:.3g} % of the change is lost")
    say(report.exactness)
    say(f"{'model' if format == 'merged' else format}: {report.path} ({report.bytes:,} bytes)")


def combine(
    adapters: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Adapter files of the same base model.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")],
    weights: Annotated[
        str | None, typer.Option(metavar="X,Y,...", help="A weight for each of the files. Default 1 each.")
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART", help="Take a part out again: its concept in words, or its file; repeat for several."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Add adapters up into one file, which costs as much as one of them; or take one out of it. Needs no model.

    Example: [bold]fade combine no-three.safetensors no-neon.safetensors --output both.safetensors[/bold]
    """
    from fade.combine import combine_adapters
    from fade.report import human_bytes

    if len(adapters) == 1 and not without:
        raise FadeError("one adapter is no sum: give two files or more, or one that was combined and --without PART")
    try:
        factors = None if weights is None else [float(word) for word in weights.split(",")]
    except ValueError:
        raise FadeError(f"--weights must be numbers with commas between them, not {weights!r}") from None
    made = combine_adapters(adapters, output, factors, without or (), overwrite)
    say(f"forgets: {', '.join(made.concepts)}")
    size = f"{human_bytes(made.bytes)}; {made.selected:,} weights, {100 * made.density:.3g} % of its layers"
    say(f"adapter: {output} ({size})")


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Adapter file (.safetensors).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what is in an adapter file. Needs no model.

    Example: [bold]fade inspect no-three/adapter.safetensors[/bold]
    """
    from fade.concept import pairs_in
    from fade.peft_file import read_any_file
    from fade.report import human_bytes, short_layer_name, where_it_sits

    file, content = read_any_file(file)
    metadata = content.metadata
    layers = {
        name: {"shape": list(tensors.mask.shape), "selected": tensors.mask.count, "density": tensors.mask.density}
        for name, tensors in content.layers.items()
    }
    if as_json:
        record = {**metadata, "bytes": content.bytes, "selected": content.selected, "total": content.total}
        print(json_text({**record, "layers": layers}))
        return
    concepts = pairs_in(metadata["concept"])
    run, settings_used = metadata.get("run", {}), metadata.get("config", {})
    memory = run.get("peak_memory_bytes", {})
    digests = [f"{dtype} {digest[:16]}…" for dtype, digest in metadata["fingerprint"].items()]
    console = terminal()
    console.print(
        fact_table(
            f"{file.name}",
            {
                "forgets": "; ".join(f"{pair.forget}, as {pair.surrogate or 'nothing'}" for pair in concepts),
                "made": f"{metadata.get('created', 'unknown')} with "
                + ", ".join(f"{package} {version}" for package, version in metadata.get("versions", {}).items()),
                "base model": f"{metadata.get('base', 'unknown')} ({', '.join(digests)})",
                "form": {"factors": "factors A, B and mask", "values": "masked values and their positions"}[
                    metadata["form"]
                ],
                "changes": f"{content.selected:,} of {content.total:,} weights "
                f"({100 * content.selected / max(1, content.total):.3g} %) in {len(layers)} layers",
                **(
                    {"parts": "; ".join(f"{part['concept']['forget']} × {part['weight']:g}" for part in parts)}
                    if (parts := metadata.get("parts"))
                    else {}
                ),
                **({"method": run["method"]} if "method" in run else {}),
                "sits in": where_it_sits(run.get("path")),
                "size": human_bytes(content.bytes),
                **{
                    f"{part} cost": f"{seconds:.1f} s"
                    + (f", peak {human_bytes(peak)}" if (peak := memory.get(part)) else "")
                    for part, seconds in run.get("seconds", {}).items()
                },
            },
        )
    )
    flat = {f"{section}.{key}": value for section, values in settings_used.items() if isinstance(values, dict)
            for key, value in values.items()}  # fmt: skip
    console.print(fact_table("settings", {**flat, "seed": settings_used.get("seed", "unknown")}))
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="layers", title_justify="left")
    for name, justify in (("layer", "left"), ("shape", "right"), ("weights", "right"), ("density", "right")):
        table.add_column(name, justify=justify)
    for name, layer in layers.items():
        table.add_row(
            escape(printable(short_layer_name(name))), "×".join(map(str, layer["shape"])), f"{layer['selected']:,}",
            f"{100 * layer['density']:.2f} %",
        )  # fmt: skip
    console.print(table)
