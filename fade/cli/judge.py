"""`fade evaluate` and `fade attack`: what was forgotten, what was kept, and what comes back."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fade.cli.options import (
    AdapterPath,
    AnyBase,
    Classes,
    Device,
    DrawSteps,
    Dtype,
    Guidance,
    JudgeModel,
    Model,
    NoCache,
    Overwrite,
    Quiet,
    Seed,
    listed,
)
from fade.cli.output import one_line, say, terminal


def evaluate(
    model: Model,
    adapter: AdapterPath,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every number here.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="HTML", help="Write a report with pictures here.")] = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Images per prompt, one per seed.")] = 3,
    judge: JudgeModel = None,
    classes: Classes = None,
    neighbours: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Words among concept, surrogate and --classes that look like the concept, for NA; bundled models' "
            "judges know theirs.",
        ),
    ] = None,
    phrasings: Annotated[
        bool, typer.Option("--phrasings", help="Also ask for the concept in words that nothing was made with.")
    ] = False,
    phrasing: Annotated[
        list[str] | None,
        typer.Option(
            "--phrasing",
            metavar="TEXT",
            help="Ask for the concept in these words instead, say in another language: 'ein Foto von {}', or "
            "'une photo de {chat=chien}', which names concept and surrogate. May be given several times.",
        ),
    ] = None,
    require: Annotated[
        str | None,
        typer.Option(
            "--require",
            metavar="NAME=X,…",
            help="Exit with status 3 where a metric falls short, say UA=99,IRA=98: at least X, or at most where less "
            "is better. In the metric's unit, as the table has it.",
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Image model of transformers on disk by whose features FID, KID, precision and recall compare; "
            "bundled models have their judges'.",
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(metavar="CLIP", help="Folder or hub id of a CLIP model for the CLIP score. Default: the judge."),
    ] = None,
    real: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Real pictures of what must stay, to which FID-real and KID-real compare both models.",
        ),
    ] = None,
    lpips: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Weights for LPIPS, with AlexNet or VGG: the state dict of the lpips package's model "
            "(net.slice1.0.weight to lin4.model.1.weight) as a safetensors file, or a folder with that.",
        ),
    ] = None,
    every_word: Annotated[
        bool,
        typer.Option(
            "--every-word",
            help="Draw every word of a bundled model. Of EmojiCanvas's 100 objects an evaluation otherwise draws 20, "
            "in every style: the concept, its look-alikes, and a fixed random choice of others.",
        ),
    ] = False,
    scale: Annotated[float, typer.Option(metavar="S", help="Strength of the adapter: 0 off, 1 as trained.")] = 1.0,
    steps: DrawSteps = None,
    guidance: Guidance = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images drawn at once.")] = 64,
    no_cache: NoCache = False,
    device: Device = None,
    dtype: Dtype = None,
    any_base: AnyBase = False,
    quiet: Quiet = False,
) -> None:
    """Measure what an adapter made MODEL forget (UA) and keep (IRA, look-alikes NA, CRA, drift).

    Example: [bold]fade evaluate digitcanvas --adapter no-three/adapter.safetensors --json metrics.json[/bold]
    """
    from fade.adapter import load_adapter
    from fade.evaluation import evaluate as run
    from fade.evaluation import first_seeds, full_record
    from fade.evaluation.drawings import default_cache
    from fade.evaluation.requirements import requirements, shortfalls
    from fade.files import atomic_write, check_writable
    from fade.loading import load_model
    from fade.measure import measured
    from fade.report import where_it_sits, write_report

    required = requirements(require)
    for wanted in (json_file, report):
        if wanted is not None:
            check_writable(wanted)
    pipeline = load_model(model, device, dtype)
    attached = load_adapter(pipeline, adapter, scale=scale, check_base=not any_base)
    with measured(pipeline.device) as cost:
        evaluation = run(
            pipeline, attached, seeds=first_seeds(seeds), steps=steps, guidance_scale=guidance, batch_size=batch_size,
            judge=judge, classes=listed(classes), neighbours=listed(neighbours), everything=every_word,
            features=features, clip=clip, real=real, lpips=lpips, phrasings=phrasing or phrasings,
            wanted=[one.metric.name for one in required], cache=None if no_cache else default_cache(),
            progress=not quiet,
        )  # fmt: skip
    evaluation.settings["scale"] = scale
    size = adapter.stat().st_size
    console = terminal()
    console.print(evaluation.table())
    if evaluation.phrasings is not None:
        console.print(evaluation.phrasings.table())
    say(f"the edit sits in {where_it_sits(attached.run.get('path'))}")
    if json_file is not None:
        record = full_record(evaluation, attached.metadata, size, cost.seconds)
        with atomic_write(json_file) as temporary:
            temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
        say(f"numbers: {json_file}")
    if report is not None:
        write_report(report, evaluation, attached.metadata, adapter_bytes=size, evaluate_seconds=cost.seconds)
        say(f"report: {report}")
    if missed := shortfalls(evaluation, required):
        for line in missed:
            print(f"falls short: {one_line(line)}", file=sys.stderr)
        raise typer.Exit(3)


def _list_attacks(wanted: bool) -> None:
    """Prints every attack with what can be set, and ends the command."""
    if not wanted:
        return
    from rich.markup import escape
    from rich.table import Table

    from fade.evaluation.attacks.registry import ATTACKS
    from fade.evaluation.attacks.settings import difference, told, usual

    table = Table(title="fade attack MODEL --adapter FILE --attack NAME:KEY=VALUE,KEY=VALUE", title_justify="left")
    for column in ("attack", "settings, if nothing else is said", "tried by its name with", "needs"):
        table.add_column(column, style="bold" if column == "attack" else None, overflow="fold")
    for name, variants in ATTACKS.items():
        tried = "; ".join(difference(one, usual(variants)) or "these" for one in variants)
        table.add_row(*map(escape, (name, told(usual(variants)), tried, variants[0].needs)))
    terminal().print(table)
    raise typer.Exit


def attack(
    model: Model,
    adapter: AdapterPath,
    attacks: Annotated[
        list[str] | None,
        typer.Option(
            "--attacks",
            "--attack",
            metavar="NAME[:KEY=VALUE],…",
            help="Attacks to try, by name, or with settings of your own: textual-inversion:vectors=3,iterations=500. "
            "May be given several times. Default: all there are, each with its usual settings.",
        ),
    ] = None,
    show: Annotated[
        bool,
        typer.Option(
            "--list", is_eager=True, callback=_list_attacks, help="Show all attacks with their settings, and exit."
        ),
    ] = False,
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
    steps: DrawSteps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images drawn at once.")] = 64,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    no_cache: NoCache = False,
    any_base: AnyBase = False,
    quiet: Quiet = False,
) -> None:
    """Try to get back what an adapter made MODEL forget, and say how often it works.

    Example: [bold]fade attack digitcanvas --adapter no-three/adapter.safetensors --json attacks.json[/bold]
    """
    from fade.adapter import load_adapter
    from fade.evaluation.attacks import attack as run
    from fade.evaluation.attacks import chosen_attacks
    from fade.evaluation.drawings import default_cache
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
        seed=seed or 0, forget=forget, judge=judge, classes=listed(classes), record=json_file, overwrite=overwrite,
        cache=None if no_cache else default_cache(), progress=not quiet,
    )  # fmt: skip
    terminal().print(record.table())
    for name, reason in record.left_out.items():
        say(f"{name} was left out: {reason}")
    say(f"the edit sits in {where_it_sits(record.path)}")
    if json_file is not None:
        say(f"numbers and pictures: {json_file}")
    if report is not None:
        write_attack_report(report, record, attached.metadata)
        say(f"report: {report}")
