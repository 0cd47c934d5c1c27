"""Progress bars, and remarks between them: one look for every long loop, drawn only where somebody watches."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fade.errors import printable

T = TypeVar("T")


@contextlib.contextmanager
def progress_bar(description: str, total: int, enabled: bool) -> Iterator[Callable[..., None]]:
    """Yields `advance(note="")`, to be called once a step; the note (such as losses) is shown behind the bar."""
    bar = Progress(
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        disable=not enabled,
    )
    with bar:
        task = bar.add_task(printable(description), total=total, note="")
        yield lambda note="": bar.update(task, advance=1, note=note)


def track(items: Sequence[T], description: str, enabled: bool) -> Iterator[T]:
    """The items, one tick each."""
    with progress_bar(description, len(items), enabled) as advance:
        for item in items:
            yield item
            advance()


def tell(remark: str, enabled: bool) -> None:
    """One line beside the bars, on stderr."""
    if enabled:
        print(remark, file=sys.stderr)
