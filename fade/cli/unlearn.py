"""`fade unlearn`: makes an adapter, or one for each of several concepts."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from fade import config as settings
from fade import processes
from fade.cli.options import (
    LOCATE,
    OVERWRITE,
    Device,
    Dtype,
    Keep,
    MethodOptions,
    Model,
    Overwrite,
    OverwriteMethod,
    Quiet,
    Seed,
    TrainingSteps,
    choice,
    config_from,
    of_method,
    options_from,
    path_text,
)
from fade.cli.output import say, terminal
from fade.errors import FadeError


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
    option: MethodOptions = None,
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
            metavar=choice(settings.Saliency),
            help=f"What ranks the weights; denoising is the paper's. {of_method('closed-form')}",
        ),
    ] = None,
    scaling: Annotated[
        str | None,
        typer.Option(
            metavar=choice(settings.Scaling),
            help=f"module divides each layer's saliency by its mean. {of_method(LOCATE.scaling)}",
        ),
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            metavar=choice(settings.Granularity),
            help=f"What is kept as a whole; none keeps everything (dense LoRA). {of_method(LOCATE.granularity)}",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Layer name or glob; a region of rows and columns may follow, as in 'to_out[:, :3072]'; or attention, "
            "beyond-attention, convolutions, all. Repeat for several. "
            f"{of_method('the projections of the attention')}",
        ),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Device memory, as 8GB or in bytes, that ranking the weights by gradients may take beside the model. "
            "Default: 90 % of what is free.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Rank of the factors. {of_method(OVERWRITE.rank, 'distillation')}"),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(metavar="X", help=f"LoRA alpha; scale = alpha/rank. {of_method(OVERWRITE.alpha, 'distillation')}"),
    ] = None,
    steps: TrainingSteps = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(metavar="X", help=f"AdamW's peak learning rate. {of_method(OVERWRITE.peak_rate)}"),
    ] = None,
    forget_weight: Annotated[
        float | None,
        typer.Option(metavar="X", help=f"Weight of the forget loss. {of_method(OVERWRITE.forget_weight)}"),
    ] = None,
    retain_weight: Annotated[
        float | None,
        typer.Option(metavar="X", help=f"Weight of the retain loss. {of_method(OVERWRITE.retain_weight)}"),
    ] = None,
    dual_rate: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Step size of the dual ascent that changes the forget loss's weight; 0 leaves it as it is. "
            f"{of_method(OVERWRITE.dual_rate)}",
        ),
    ] = None,
    gift: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Weight of GIFT's pull of the adapter to its start, by the Fisher information of each step. "
            f"Default {OVERWRITE.gift:g}, which is none.",
        ),
    ] = None,
    ekpc: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Weight of EKPC's penalty on what the adapter changes, by what each weight matters to the retain "
            f"latents. Default {OVERWRITE.ekpc:g}, which is none.",
        ),
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(
            metavar=choice(settings.TimestepSampler),
            help=f"Where in the diffusion forgetting is trained. {of_method(OVERWRITE.timesteps)}",
        ),
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option(
            metavar=choice(settings.Parameters),
            help=f"Train low-rank factors or the masked weights themselves. {of_method('values')}",
        ),
    ] = None,
    training_mode: Annotated[
        str | None,
        typer.Option(
            metavar=choice(settings.TrainingMode),
            help="How a model in 16 bits is trained: with both products summed in float32, or in one product with a "
            f"stochastically rounded weight. {of_method(OVERWRITE.training_mode)}",
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Less memory for more time: fade plan MODEL says how much."),
    ] = False,
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
    chosen = config_from(
        config,
        resume,
        concepts=words,
        data__forget_images=path_text(forget_images),
        data__retain_images=path_text(retain_images),
        data__plurals=plurals,
        locate__keep=keep,
        locate__saliency=saliency,
        locate__scaling=scaling,
        locate__granularity=granularity,
        locate__targets=target or None,
        locate__memory_budget=memory_budget,
        overwrite__method=method,
        options=options_from(option),
        overwrite__rank=rank,
        overwrite__alpha=alpha,
        overwrite__steps=steps,
        overwrite__learning_rate=learning_rate,
        overwrite__forget_weight=forget_weight,
        overwrite__retain_weight=retain_weight,
        overwrite__dual_rate=dual_rate,
        overwrite__gift=gift,
        overwrite__ekpc=ekpc,
        overwrite__timesteps=timesteps,
        overwrite__parameters=parameters,
        overwrite__training_mode=training_mode,
        closed_form__protect=protect or None,
        closed_form__hardening=hardening,
        gradient_checkpointing=gradient_checkpointing or None,
        seed=seed,
    )
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
    with processes.together():
        pipeline = load_model(model, device, dtype)
        if separate:
            runs = {concept: adapter.run for concept, adapter in unlearn_each(pipeline, **given).items()}
        else:
            runs = {"": run(pipeline, **given).run}
        if not processes.first():
            return
    files = [output / slug / ADAPTER_FILE for slug in slugs(list(runs))] if separate else [output / ADAPTER_FILE]
    for (concept, record), file in zip(runs.items(), files, strict=True):
        if separate:
            say(f"{concept}:")
        _tell_of_run(record, file)
    if separate:
        together = shlex.join(["fade", "combine", *map(str, files), "--output", str(output / "all.safetensors")])
        say(f"next: {together}")
    else:
        say(f"next: fade evaluate {shlex.quote(model)} --adapter {shlex.quote(str(files[0]))}")


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
    terminal().print(
        f"{record['selected']:,} of {record['total']:,} target weights changed "
        f"({100 * record['selected'] / record['total']:.3g} %); locate {seconds['locate']:.1f} s "
        f"(peak {memory['locate'] / 1e6:,.0f} MB), overwrite {seconds['overwrite']:.1f} s "
        f"(peak {memory['overwrite'] / 1e6:,.0f} MB)"
    )
    say(f"the edit sits in {where_it_sits(record['path'])}")
    left = record.get("residual", {}).get("forget", 0.0)
    if left > settings.ClosedFormConfig().left and "stopped_by" not in record:
        say(
            f"the solved edit leaves {100 * left:.0f} % of the wanted change undone; evaluate it, and where too much "
            "is left train on with --method both, or raise --keep"
        )
    if "stopped_by" in record:
        why = {"forgotten": ", until held-out noise said that the concept is forgotten"}.get(record["stopped_by"], "")
        if not why and "held_out_losses" in record:
            why = ", all that were allowed, before held-out noise said forgotten; evaluate it, or raise --steps"
        say(f"trained for {record['steps']} steps{why}; {how_it_was_trained(record)}")
    say(f"adapter: {file} ({file.stat().st_size:,} bytes)")
