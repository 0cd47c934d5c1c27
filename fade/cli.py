"""`fade`: a thin skin over the Python functions. It reads options, calls one function and prints what came of it.

Nothing heavy is imported before a command runs, so that `fade --help` answers at once. Everything a user can cause ends
in one line on stderr and a status: 2 for bad input, 1 for a failing system, 130 for Ctrl-C.
"""

import contextlib
import errno
import io
import json
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console

from fade import config as settings
from fade.errors import FadeError, printable
from fade.export import FORMATS

if TYPE_CHECKING:
    from rich.table import Table

    from fade.config import Config

app = typer.Typer(
    name="fade",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make a diffusion model forget a concept. Start with: [bold]fade demo[/bold]",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DATA, _LOCATE, _OVERWRITE = settings.DataConfig(), settings.LocateConfig(), settings.OverwriteConfig()


def _words(literal: Any) -> str:
    return "|".join(get_args(literal))


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A diffusers folder, a hub id (owner/name), or [bold]digitcanvas[/bold].")
]
Device = Annotated[
    str | None, typer.Option(metavar="cpu|cuda|cuda:N", help="Where to run. Default: a GPU where there is one.")
]
Dtype = Annotated[
    str | None, typer.Option(metavar="fp32|fp16|bf16", help="Dtype in which the model is loaded. Default fp32.")
]
Keep = Annotated[
    float | None,
    typer.Option(metavar="X", help=f"Fraction of target weights that may change, in (0, 1]. Default {_LOCATE.keep}."),
]
OverwriteMethod = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar=_words(settings.Method),
        help="Train the adapter, solve it (in the layers that read the prompt alone, in about a second), or train "
        f"on from what is solved. Default {_OVERWRITE.method}.",
    ),
]
TrainingSteps = Annotated[
    int | None, typer.Option(metavar="N", help=f"Most optimiser steps of stage 2. Default {_OVERWRITE.steps}.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed of everything random. Default 0.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output where it exists already.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
AdapterPath = Annotated[Path, typer.Option("--adapter", metavar="FILE", help="Adapter file (.safetensors).")]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Attach the adapter although it was trained on other weights.")
]
DrawSteps = Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Denoising steps per image.")]
JudgeModel = Annotated[
    str | None,
    typer.Option(
        "--judge", metavar="CLIP", help="Folder or hub id of a CLIP model that judges; DigitCanvas needs none."
    ),
]
Classes = Annotated[
    str | None,
    typer.Option("--classes", metavar="A,B,C", help="Words the CLIP judge tells apart, beside concept and surrogate."),
]
Guidance = Annotated[float, typer.Option("--guidance", metavar="X", help="Classifier-free guidance scale.")]


@app.command()
def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for report, adapter and metrics.")] = Path(
        "demo-report"
    ),
    forget: Annotated[str, typer.Option(metavar="WORD", help="Digit (three) or style (neon) to forget.")] = "three",
    surrogate: Annotated[str, typer.Option(metavar="WORD", help="What is drawn instead; of the same kind.")] = "eight",
    method: OverwriteMethod = None,
    keep: Keep = None,
    steps: TrainingSteps = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    open_report: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the report in the browser where there is a display.")
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Forget a digit or a style in the bundled model and write a report with pictures.

    Example: [bold]fade demo --forget neon --surrogate plain[/bold]
    """
    from fade.demo import REPORT_FILE, run_demo

    config = _config(None, overwrite__method=method, locate__keep=keep, overwrite__steps=steps, seed=seed)
    _refuse_ignored(config, steps=steps)
    evaluation, record = run_demo(output, forget, surrogate, config, overwrite=overwrite, progress=not quiet)
    console = _console()
    console.print(evaluation.table())
    seconds = record["seconds"]
    console.print(
        f"{seconds['locate']:.1f} s locate, {seconds['overwrite']:.1f} s overwrite, {seconds['evaluate']:.1f} s "
        f"evaluate, {seconds['total']:.1f} s in all; adapter {record['adapter_bytes']:,} bytes"
    )
    report = (output / REPORT_FILE).resolve()
    _say(f"report: {report}")
    if open_report:
        _open_in_browser(report)


@app.command()
def unlearn(
    model: Model,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for adapter.safetensors and run.json.")],
    forget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORDS",
            help="The concept to forget, e.g. three or 'Van Gogh'. Several: --forget three=eight --forget seven=one, "
            "each with what takes its place.",
        ),
    ] = None,
    surrogate: Annotated[
        str | None,
        typer.Option(metavar="WORDS", help="What takes the place of a single concept, e.g. eight or 'a painter'."),
    ] = None,
    separate: Annotated[
        bool, typer.Option("--separate", help="An adapter for each concept, in DIR/CONCEPT, instead of one for all.")
    ] = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Adapter that the new one is to act beside (they add up); repeat for several."
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Prompt with one {} where the concept goes; repeat for several."),
    ] = None,
    retain: Annotated[
        list[str] | None, typer.Option(metavar="PROMPT", help="Prompt of what must stay; repeat for several.")
    ] = None,
    retain_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text file with more such prompts, one a line.")
    ] = None,
    forget_images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Images of the concept, in subfolders too, with captions in NAME.txt, NAME.caption, metadata.jsonl or "
            "metadata.csv where there are any. Default: sampled from the model itself.",
        ),
    ] = None,
    retain_images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Images of all else, likewise. Default: sampled from the model itself."),
    ] = None,
    plurals: Annotated[
        bool | None,
        typer.Option(
            "--plurals/--no-plurals", help="Find the concept's English plural in captions, too. Default: only the word."
        ),
    ] = None,
    method: OverwriteMethod = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROMPT",
            help="Prompt whose meaning to the model must not change at all, with the method closed-form; repeat for "
            "several.",
        ),
    ] = None,
    hardening: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Rounds in which the closed form forgets what revives the concept, too, 0 to 3. "
            f"Default {settings.ClosedFormConfig().hardening}.",
        ),
    ] = None,
    keep: Keep = None,
    saliency: Annotated[
        str | None,
        typer.Option(
            metavar=_words(settings.Saliency),
            help="What ranks the weights; denoising is the paper's. Default: closed-form where the adapter is solved, "
            "else distillation.",
        ),
    ] = None,
    scaling: Annotated[
        str | None,
        typer.Option(
            metavar=_words(settings.Scaling),
            help=f"module divides each layer's saliency by its mean. Default {_LOCATE.scaling}.",
        ),
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            metavar=_words(settings.Granularity),
            help=f"What is kept as a whole; none keeps everything (dense LoRA). Default {_LOCATE.granularity}.",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Layer name or glob; a region of rows and columns may follow, as in 'to_out[:, :3072]'. Repeat for "
            "several. Default: the projections of the attention.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="N", help=f"Rank of the factors. Default {_OVERWRITE.rank}.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(metavar="X", help=f"LoRA alpha; scale = alpha/rank. Default {_OVERWRITE.alpha:g}.")
    ] = None,
    steps: TrainingSteps = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(metavar="X", help="AdamW's peak learning rate. Default 0.01; 0.005 to train on what is solved."),
    ] = None,
    forget_weight: Annotated[
        float | None,
        typer.Option(metavar="X", help=f"Weight of the forget loss. Default {_OVERWRITE.forget_weight:g}."),
    ] = None,
    retain_weight: Annotated[
        float | None,
        typer.Option(metavar="X", help=f"Weight of the retain loss. Default {_OVERWRITE.retain_weight:g}."),
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(
            metavar=_words(settings.TimestepSampler),
            help=f"Where in the diffusion forgetting is trained. Default {_OVERWRITE.timesteps}.",
        ),
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option(
            metavar=_words(settings.Parameters),
            help="Train low-rank factors or the masked weights themselves. Default: values where the adapter is "
            "solved, else factors.",
        ),
    ] = None,
    training_mode: Annotated[
        str | None,
        typer.Option(
            metavar=_words(settings.TrainingMode),
            help="How a model in 16 bits is trained: with both products summed in float32, or in one product with a "
            f"stochastically rounded weight. Default {_OVERWRITE.training_mode}.",
        ),
    ] = None,
    seed: Seed = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="TOML file with any setting; options given here come before it."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    name: Annotated[str, typer.Option(metavar="NAME", help="The adapter's name on the pipeline.")] = "fade",
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in the same folder.")] = False,
    quiet: Quiet = False,
) -> None:
    """Make MODEL answer one concept as it answers another, and write the adapter that does it.

    Example: [bold]fade unlearn digitcanvas --forget three --surrogate eight --output no-three[/bold]
    """
    words = _concept_words(forget or [], surrogate)
    chosen = _config(
        config,
        concepts=words,
        data__forget_images=_text(forget_images),
        data__retain_images=_text(retain_images),
        data__plurals=plurals,
        locate__keep=keep,
        locate__saliency=saliency,
        locate__scaling=scaling,
        locate__granularity=granularity,
        locate__targets=target or None,
        overwrite__method=method,
        overwrite__rank=rank,
        overwrite__alpha=alpha,
        overwrite__steps=steps,
        overwrite__learning_rate=learning_rate,
        overwrite__forget_weight=forget_weight,
        overwrite__retain_weight=retain_weight,
        overwrite__timesteps=timesteps,
        overwrite__parameters=parameters,
        overwrite__training_mode=training_mode,
        closed_form__protect=protect or None,
        closed_form__hardening=hardening,
        seed=seed,
    )
    _refuse_ignored(
        chosen, steps=steps, learning_rate=learning_rate, forget_weight=forget_weight, retain_weight=retain_weight,
        timesteps=timesteps, training_mode=training_mode,
    )  # fmt: skip
    if not chosen.concepts:
        raise FadeError("name the concept to forget and what takes its place: --forget three --surrogate eight")
    from fade.concept import read_prompts
    from fade.loading import load_model
    from fade.request import slugs
    from fade.unlearning import ADAPTER_FILE, unlearn_each
    from fade.unlearning import unlearn as run

    kept = [*(retain or []), *(read_prompts(retain_file) if retain_file else [])]
    given = {
        "templates": template or None, "retain": kept or None, "beside": beside or (), "config": chosen,
        "output": output, "name": name, "overwrite": overwrite, "resume": resume, "progress": not quiet,
    }  # fmt: skip
    if separate:
        adapters = unlearn_each(load_model(model, device, dtype), **given)
        files = [output / slug / ADAPTER_FILE for slug in slugs(list(adapters))]
        for (concept, adapter), file in zip(adapters.items(), files, strict=True):
            _say(f"{concept}:")
            _tell_of_run(adapter.run, file)
        together = shlex.join(["fade", "combine", *map(str, files), "--output", str(output / "all.safetensors")])
        _say(f"next: {together}")
        return
    file = output / ADAPTER_FILE
    _tell_of_run(run(load_model(model, device, dtype), **given).run, file)
    _say(f"next: fade evaluate {shlex.quote(model)} --adapter {shlex.quote(str(file))}")


def _concept_words(forget: list[str], surrogate: str | None) -> "tuple[settings.ConceptWords, ...] | None":
    """The concepts that --forget and --surrogate name; None where there is no --forget. Raises FadeError."""
    forms = "--forget three --surrogate eight for one concept, --forget three=eight --forget seven=one for several"
    if surrogate is not None:
        if len(forget) != 1:
            raise FadeError(f"--surrogate goes with a single --forget: give {forms}")
        if "=" in forget[0]:
            raise FadeError(
                f"--forget {forget[0]} names what takes its place, and so does --surrogate {surrogate}: give {forms}; "
                "a concept with = in it is named in a settings file (concepts)"
            )
        return (settings.ConceptWords(forget[0], surrogate),)
    pairs = [tuple(part.strip() for part in text.partition("=")[::2]) for text in forget]
    for text, (concept, answer) in zip(forget, pairs, strict=True):
        if not (concept and answer):
            raise FadeError(f"--forget {text!r} does not say what takes its place: give {forms}")
    if len({concept for concept, _ in pairs}) < len(pairs):
        twice = next(concept for i, (concept, _) in enumerate(pairs) if concept in [other for other, _ in pairs[:i]])
        raise FadeError(f"--forget names {twice!r} twice; name each concept once")
    return tuple(settings.ConceptWords(*pair) for pair in pairs) or None


def _tell_of_run(record: dict[str, Any], file: Path) -> None:
    """What an unlearning run did and cost, and the file it wrote."""
    from fade.report import how_it_was_trained, where_it_sits

    seconds, memory = record["seconds"], record["peak_memory_bytes"]
    _console().print(
        f"{record['selected']:,} of {record['total']:,} target weights changed "
        f"({100 * record['selected'] / record['total']:.3g} %); locate {seconds['locate']:.1f} s "
        f"(peak {memory['locate'] / 1e6:,.0f} MB), overwrite {seconds['overwrite']:.1f} s "
        f"(peak {memory['overwrite'] / 1e6:,.0f} MB)"
    )
    _say(f"the edit sits in {where_it_sits(record['path'])}")
    if "stopped_by" in record:
        why = {"forgotten": ", until held-out noise said that the concept is forgotten"}.get(record["stopped_by"], "")
        if not why and "held_out_losses" in record:
            why = ", all that were allowed, before held-out noise said forgotten; evaluate it, or raise --steps"
        _say(f"trained for {record['steps']} steps{why}; {how_it_was_trained(record)}")
    _say(f"adapter: {file} ({file.stat().st_size:,} bytes)")


@app.command()
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
    steps: DrawSteps = 20,
    guidance: Guidance = 3.0,
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
    from fade.files import atomic_write, check_writable
    from fade.loading import load_model

    for index in range(1, count + 1):
        check_writable(output if count == 1 else output.with_stem(f"{output.stem}-{index}"))
    pipeline = load_model(model, device, dtype)
    for index, path in enumerate(adapter or []):
        load_adapter(pipeline, path, name=f"fade_{index}", scale=scale, check_base=not any_base)
    images = backbone_for(pipeline).generate(
        [prompt] * count, range(seed, seed + count), steps, guidance, batch_size=8, progress=not quiet
    )
    for index, image in enumerate(images, 1):
        path = output if count == 1 else output.with_stem(f"{output.stem}-{index}")
        picture = Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy())
        with atomic_write(path) as temporary:
            picture.save(temporary, format=kind)
        _say(f"{path}")


@app.command()
def evaluate(
    model: Model,
    adapter: AdapterPath,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every number here.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="HTML", help="Write a report with pictures here.")] = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Images per prompt, one per seed.")] = 3,
    judge: JudgeModel = None,
    classes: Classes = None,
    phrasings: Annotated[
        bool, typer.Option("--phrasings", help="Also ask for the concept in words that nothing was made with.")
    ] = False,
    scale: Annotated[float, typer.Option(metavar="S", help="Strength of the adapter: 0 off, 1 as trained.")] = 1.0,
    steps: DrawSteps = 20,
    guidance: Guidance = 3.0,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images drawn at once.")] = 64,
    device: Device = None,
    dtype: Dtype = None,
    any_base: AnyBase = False,
    quiet: Quiet = False,
) -> None:
    """Measure what an adapter made MODEL forget (UA) and keep (IRA, CRA, drift).

    Example: [bold]fade evaluate digitcanvas --adapter no-three/adapter.safetensors --json metrics.json[/bold]
    """
    from fade.adapter import load_adapter
    from fade.evaluation import evaluate as run
    from fade.evaluation import first_seeds, full_record, held_out
    from fade.files import atomic_write, check_writable
    from fade.loading import load_model
    from fade.measure import measured
    from fade.report import where_it_sits, write_report

    for wanted in (json_file, report):
        if wanted is not None:
            check_writable(wanted)
    pipeline = load_model(model, device, dtype)
    attached = load_adapter(pipeline, adapter, scale=scale, check_base=not any_base)
    drawing = {
        "seeds": first_seeds(seeds), "steps": steps, "guidance_scale": guidance, "batch_size": batch_size,
        "judge": judge, "classes": _listed(classes),
        "progress": not quiet,
    }  # fmt: skip
    with measured(pipeline.device) as cost:
        evaluation = run(pipeline, attached, **drawing)
    otherwise = held_out(pipeline, attached, **drawing) if phrasings else None
    evaluation.settings["scale"] = scale
    size = adapter.stat().st_size
    console = _console()
    console.print(evaluation.table())
    if otherwise is not None:
        console.print(otherwise.table())
    _say(f"the edit sits in {where_it_sits(attached.run.get('path'))}")
    if json_file is not None:
        record = full_record(evaluation, attached.metadata, size, cost.seconds)
        if otherwise is not None:
            record["held_out_phrasings"] = otherwise.to_dict()
        with atomic_write(json_file) as temporary:
            temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
        _say(f"numbers: {json_file}")
    if report is not None:
        write_report(report, evaluation, attached.metadata, adapter_bytes=size, evaluate_seconds=cost.seconds)
        _say(f"report: {report}")


@app.command()
def attack(
    model: Model,
    adapter: AdapterPath,
    attacks: Annotated[
        list[str] | None,
        typer.Option("--attack", metavar="NAME", help="Attack to try; repeat for several. Default: all there are."),
    ] = None,
    forget: Annotated[
        str | None,
        typer.Option(metavar="WORDS", help="The concept to bring back, where the adapter forgets several."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write numbers and pictures here after each attack; a file is gone on with."
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="HTML", help="Write a page with the pictures here.")] = None,
    pictures: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures that each attack draws.")] = 24,
    judge: JudgeModel = None,
    classes: Classes = None,
    scale: Annotated[float, typer.Option(metavar="S", help="Strength of the adapter: 0 off, 1 as trained.")] = 1.0,
    steps: DrawSteps = 20,
    guidance: Guidance = 3.0,
    seed: Seed = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images drawn at once.")] = 64,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    any_base: AnyBase = False,
    quiet: Quiet = False,
) -> None:
    """Try to get back what an adapter made MODEL forget, and say how often it works.

    Example: [bold]fade attack digitcanvas --adapter no-three/adapter.safetensors --json attacks.json[/bold]
    """
    from fade.adapter import load_adapter
    from fade.evaluation.attacks import attack as run
    from fade.evaluation.attacks import chosen_attacks
    from fade.files import check_writable
    from fade.loading import load_model
    from fade.report import where_it_sits, write_attack_report

    chosen = chosen_attacks(attacks or None)
    for wanted in (json_file, report):
        if wanted is not None:
            check_writable(wanted)
    pipeline = load_model(model, device, dtype)
    attached = load_adapter(pipeline, adapter, scale=scale, check_base=not any_base)
    record = run(
        pipeline, attached, chosen, pictures=pictures, steps=steps, guidance_scale=guidance, batch_size=batch_size,
        seed=seed or 0, forget=forget, judge=judge, classes=_listed(classes), record=json_file, overwrite=overwrite,
        progress=not quiet,
    )  # fmt: skip
    _console().print(record.table())
    _say(f"the edit sits in {where_it_sits(record.path)}")
    if json_file is not None:
        _say(f"numbers and pictures: {json_file}")
    if report is not None:
        write_attack_report(report, record, attached.metadata)
        _say(f"report: {report}")


@app.command()
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


@app.command()
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
        report = attached.export(output, format, say=_say, **options)
    else:
        from fade.export import export as run
        from fade.export.edit import read_edit

        report = run(read_edit(adapter, scale), output, format, say=_say, **options)
    if not report.exact:
        for name, error in report.layer_errors.items():
            _say(f"  {name}: {100 * error:.3g} % of the change is lost")
    _say(report.exactness)
    _say(f"{'model' if format == 'merged' else format}: {report.path} ({report.bytes:,} bytes)")


@app.command()
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
    _say(f"forgets: {', '.join(made.concepts)}")
    size = f"{human_bytes(made.bytes)}; {made.selected:,} weights, {100 * made.density:.3g} % of its layers"
    _say(f"adapter: {output} ({size})")


@app.command()
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
        print(_json({**record, "layers": layers}))
        return
    concepts = pairs_in(metadata["concept"])
    run, settings_used = metadata.get("run", {}), metadata.get("config", {})
    memory = run.get("peak_memory_bytes", {})
    digests = [f"{dtype} {digest[:16]}…" for dtype, digest in metadata["fingerprint"].items()]
    console = _console()
    console.print(
        _facts(
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
    console.print(_facts("settings", {**flat, "seed": settings_used.get("seed", "unknown")}))
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


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Say which versions, devices and compiled kernels are in use; paste it into a bug report.

    Example: [bold]fade env[/bold]
    """
    import importlib.metadata
    import importlib.util
    import platform

    import torch

    import fade
    import fade_kernels
    from fade.adapter import versions

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "fade": fade.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: version for package, version in versions().items() if package != "fade-unlearning"},
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed",
        "cpu threads": torch.get_num_threads(),
        "gpus": gpus or "none",
        **{f"kernels: {name}": value for name, value in fade_kernels.build_info().items()},
    }
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        _console().print(_facts("environment", facts))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, 2 for bad input, 1 for a failing system, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # On import the libraries speak up about optional parts that nothing here uses, later about names that they change
    # and about several adapters at once, which is what was asked for.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):  # an encoding that lacks a character must not end a command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers|transformers|peft")
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {_one_line(message)}\n"
    try:
        with typer.main.get_command(app).make_context("fade", list(arguments)) as context:
            context.command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except _USAGE_ERROR as error:
        where = error.ctx.command_path if getattr(error, "ctx", None) else "fade"
        return _fail(f"{error.format_message().rstrip('.')}. See {where} --help", 2)
    except FadeError as error:
        return _fail(str(error), 1 if _is_the_systems(error.__cause__) else 2)
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        full = " (the disk is full; files that were there before are unharmed)" if error.errno == errno.ENOSPC else ""
        what = f"{error.filename}: " if error.filename else ""
        return _fail(f"{what}{error.strerror or error}{full}", 1)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_how_to_go_on(arguments), 130, "interrupted")
    except Exception as error:
        if os.environ.get("FADE_DEBUG"):
            raise
        told = (str(error).strip() or "no message").splitlines()[0]
        return _fail(f"{type(error).__name__}: {told} (unexpected: FADE_DEBUG=1 shows where; please report it)", 1)
    return 0


def _is_the_systems(cause: BaseException | None) -> bool:
    """Whether what a FadeError tells of is a failing system: a full or broken disk, and not bad input."""
    full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    return full or (type(cause).__name__ == "SafetensorError" and "I/O error" in str(cause))


# typer brings its own copy of click from some release on, so the class is taken from typer's own public error.
_USAGE_ERROR = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def _how_to_go_on(arguments: list[str]) -> str:
    if arguments[0] != "unlearn":
        return "nothing that was there before is harmed; run the same command again"
    given = dict(zip(arguments, [*arguments[1:], ""], strict=True))
    output = next((a.partition("=")[2] for a in arguments if a.startswith("--output=")), given.get("--output", ""))
    if not (Path(output) / "request.json").is_file():
        return "nothing was started yet, and nothing that was there before is harmed; run the same command again"
    again = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    return f"go on with: {shlex.join(['fade', *again, '--resume'])}"


def _fail(message: str, status: int, word: str = "error") -> int:
    print(f"{word}: {_one_line(message)}", file=sys.stderr)
    return status


def _config(file: Path | None, **changes: Any) -> "Config":
    """The file's settings, or the defaults, with every change that is not None."""
    config = settings.Config.load(file) if file is not None else settings.Config()
    return config.replace(**{name: value for name, value in changes.items() if value is not None})


def _refuse_ignored(config: "Config", **given: Any) -> None:
    """Raises FadeError for an option of training that was given where nothing is trained."""
    if not config.trains and (named := [name for name, value in given.items() if value is not None]):
        raise FadeError(
            f"--{named[0].replace('_', '-')} would be ignored: the method {config.overwrite.method} trains nothing. "
            "Leave it out, or choose both or distillation"
        )


def _listed(words: str | None) -> list[str]:
    return [word for word in (words or "").split(",") if word.strip()]


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _console() -> Console:
    """Standard output; at least 110 columns where it is not a terminal, so that a log keeps whole table cells."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(110, console.width))


def _say(line: str) -> None:
    """One line on standard output as it is: no markup is read in it, and nothing in it reaches the terminal raw."""
    _console().print(printable(line), soft_wrap=True, markup=False)


def _one_line(message: object) -> str:
    return printable(" ".join(str(message).split()))


def _json(record: dict[str, Any]) -> str:
    """JSON for the terminal: as people read it, or in ASCII where it holds what steers a terminal."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    return text if all(line == printable(line) for line in text.split("\n")) else json.dumps(record, indent=2)


def _facts(title: str, values: dict[str, Any]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(printable(title)), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in values.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        table.add_row(escape(printable(name)), escape(printable(shown)))
    return table


def _open_in_browser(report: Path) -> None:
    """Opens the report where somebody can see it; that it cannot be opened is no failure."""
    import webbrowser

    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    with contextlib.suppress(webbrowser.Error, OSError):
        webbrowser.open(report.as_uri())


if __name__ == "__main__":
    sys.exit(main())
