"""What a command prints: lines, tables and JSON, with nothing in them that reaches the terminal raw."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fade.errors import printable

if TYPE_CHECKING:
    from rich.table import Table


def terminal() -> Console:
    """Standard output; at least 110 columns where it is not a terminal, so that a log keeps whole table cells."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(110, console.width))


def say(line: str) -> None:
    """One line on standard output as it is: no markup is read in it, and nothing in it reaches the terminal raw."""
    terminal().print(printable(line), soft_wrap=True, markup=False)


def one_line(message: object) -> str:
    return printable(" ".join(str(message).split()))


def json_text(record: dict[str, Any]) -> str:
    """JSON for the terminal: as people read it, or in ASCII where it holds what steers a terminal."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    return text if all(line == printable(line) for line in text.split("\n")) else json.dumps(record, indent=2)


def fact_table(title: str, values: dict[str, Any]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(printable(title)), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in values.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        table.add_row(escape(printable(name)), escape(printable(shown)))
    return table


def open_in_browser(report: Path) -> None:
    """Opens the report where somebody can see it; that it cannot be opened is no failure."""
    import webbrowser

    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    with contextlib.suppress(webbrowser.Error, OSError):
        webbrowser.open(report.as_uri())
