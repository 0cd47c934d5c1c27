"""`fade demo`."""

from pathlib import Path
from typing import Annotated

import typer

from fade import bundled
from fade.cli.options import (
    Keep,
    NoCache,
    Overwrite,
    OverwriteMethod,
    Quiet,
    Seed,
    TrainingSteps,
    config_from,
)
from fade.cli.output import open_in_browser, say, terminal


def demo(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for report, adapter and metrics.")] = Path(
        "demo-report"
    ),
    model: Annotated[
        str, typer.Option(metavar="|".join(bundled.PACKAGES), help="The bundled model to show.")
    ] = bundled.DEFAULT,
    forget: Annotated[
        str | None,
        typer.Option(
            metavar="WORD",
            help="What to forget: a digit (three), an object (tiger) or a style (neon, ink). Default three, or tiger.",
        ),
    ] = None,
    surrogate: Annotated[
        str | None,
        typer.Option(metavar="WORD", help="What is drawn instead; of the same kind. Default eight, or dog."),
    ] = None,
    method: OverwriteMethod = None,
    keep: Keep = None,
    steps: TrainingSteps = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    no_cache: NoCache = False,
    open_report: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the report in the browser where there is a display.")
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Forget a word of a bundled model and write a report with pictures.

    Example: [bold]fade demo --model emojicanvas --forget rose --surrogate cactus[/bold]
    """
    from fade.demo import REPORT_FILE, run_demo
    from fade.evaluation.drawings import default_cache

    config = config_from(None, overwrite__method=method, locate__keep=keep, overwrite__steps=steps, seed=seed)
    evaluation, record = run_demo(
        output, forget, surrogate, config, model=model, overwrite=overwrite,
        cache=None if no_cache else default_cache(), progress=not quiet,
    )  # fmt: skip
    console = terminal()
    console.print(evaluation.table())
    seconds = record["seconds"]
    console.print(
        f"{seconds['locate']:.1f} s locate, {seconds['overwrite']:.1f} s overwrite, {seconds['evaluate']:.1f} s "
        f"evaluate, {seconds['total']:.1f} s in all; adapter {record['adapter_bytes']:,} bytes"
    )
    report = (output / REPORT_FILE).resolve()
    say(f"report: {report}")
    if open_report:
        open_in_browser(report)
