"""`fade methods`."""

import json
from typing import Annotated, Any

import typer

from fade.cli.output import say, terminal

OF_TRAINED = {
    "overwrite.dual_rate": "--dual-rate (dual ascent finds the weight of the forget loss)",
    "overwrite.gift": "--gift (GIFT's pull of the adapter to its start)",
    "overwrite.ekpc": "--ekpc (EKPC's penalty on what it changes)",
}
"""Options that the methods which train share, by setting."""


def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="All of this method: its settings, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """Say in a sentence how each method forgets, where it is from, and which options only it has; of one, also which
    settings it brings that are not the default, and which it does not read.

    Example: [bold]fade methods salun[/bold]
    """
    from fade.methods import METHODS

    shown = [described(one) for one in (METHODS if name is None else [name])]
    if as_json:
        print(json.dumps(shown if name is None else shown[0], indent=2))
    elif name is not None:
        _tell(shown[0])
    else:
        terminal().print(_table(shown))
        say(f"methods that train also take {', '.join(OF_TRAINED.values())}")
        say("fade methods NAME says which settings a method brings, and which it does not read")


def described(name: str) -> dict[str, Any]:
    """What is told of a method, as JSON has it: `settings` are those that differ from the default, `unread` those that
    would be refused beside them."""
    import dataclasses

    from fade.config import Config
    from fade.methods import method

    found = method(name)
    return {
        "name": name, "summary": found.summary, "source": found.source,
        "settings": {key.replace("__", "."): value for key, value in found.settings.items()},
        "options": dataclasses.asdict(found.options()),
        "unread": sorted(Config.of(name).unread()),
    }  # fmt: skip


def _tell(one: dict[str, Any]) -> None:
    say(f"{one['name']}: {one['summary']}")
    say(f"source: {one['source']}")
    for title, table in (("settings that are not the default", one["settings"]), ("options", one["options"])):
        say(f"{title}:{'' if table else ' none'}")
        for key, value in table.items():
            say(f"  {key} = {json.dumps(value)}")
    say(f"not read: {', '.join(one['unread'])}")
    if shared := [text for setting, text in OF_TRAINED.items() if setting not in one["unread"]]:
        say(f"takes {', '.join(shared)}")


def _table(shown: list[dict[str, Any]]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="fade unlearn MODEL --method NAME", title_justify="left")
    for column in ("method", "what it does", "source", "options"):
        table.add_column(column, style="bold" if column == "method" else None, overflow="fold")
    for one in shown:
        options = ", ".join(f"{key}={value}" for key, value in one["options"].items())
        table.add_row(*map(escape, (one["name"], one["summary"], one["source"], options)))
    return table
