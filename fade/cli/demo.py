"""`fade demo`."""

from pathlib import Path
from typing import Annotated

import typer

from fade.cli.options import Keep, Overwrite, OverwriteMethod, Quiet, Seed, TrainingSteps, config_from, refuse_ignored
from fade.cli.output import open_in_browser, say, terminal


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

    config = config_from(None, overwrite__method=method, locate__keep=keep, overwrite__steps=steps, seed=seed)
    refuse_ignored(config, steps=steps)
    evaluation, record = run_demo(output, forget, surrogate, config, overwrite=overwrite, progress=not quiet)
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
