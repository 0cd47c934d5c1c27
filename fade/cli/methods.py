"""`fade methods`."""

import json
from typing import Annotated

import typer

from fade.cli.output import terminal


def methods(as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False) -> None:
    """Say in a sentence how each method forgets, where it is from, and which settings it brings.

    Example: [bold]fade methods[/bold]
    """
    import dataclasses

    from fade.methods import METHODS, method

    found = [method(name) for name in METHODS]
    options = [dataclasses.asdict(one.options()) for one in found]
    if as_json:
        print(
            json.dumps(
                [
                    {
                        "name": one.name, "summary": one.summary, "source": one.source,
                        "settings": {key.replace("__", "."): value for key, value in one.settings.items()},
                        "options": own,
                    }
                    for one, own in zip(found, options, strict=True)
                ],
                indent=2,
            )
        )  # fmt: skip
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="fade unlearn MODEL --method NAME", title_justify="left")
    for column in ("method", "what it does", "source", "options"):
        table.add_column(column, style="bold" if column == "method" else None, overflow="fold")
    for one, own in zip(found, options, strict=True):
        shown = ", ".join(f"{key}={value}" for key, value in own.items())
        table.add_row(*map(escape, (one.name, one.summary, one.source, shown)))
    terminal().print(table)
