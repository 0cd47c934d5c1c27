"""Adapters as files that programs without this package load: one file per format, one line in the registry.

Nothing is imported before a format is asked for, so that the command line can list them at once. A format is a module
with `write(edit, path, say, overwrite, …)`, whose further parameters are the options that it takes.
"""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fade.errors import FadeError

if TYPE_CHECKING:
    from fade.export.edit import Edit, ExportReport

FORMATS = {
    "lora": "fade.export.lora",
    "shira": "fade.export.shira",
    "diff": "fade.export.diff",
    "merged": "fade.export.merged",
}
"""The module of each format."""


def export(
    edit: "Edit",
    path: str | Path,
    format: str,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> "ExportReport":
    """Writes an edit in one of the `FORMATS`; the target appears complete or not at all.

    Args:
        edit: what to write, of an attached adapter (`Adapter.export`) or of a file (`fade.export.edit.read_edit`).
        path: a file, or a folder for `shira`, `lora` with `keys="peft"` and `merged` without `single_file`.
        format: `lora`, `shira`, `diff` or `merged`.
        overwrite: replace a target of the same kind.
        say: is told, before anything is written, how large it will be.
        options: `lossy` (all: write also what is not exact), `dtype` (`fp32`, `fp16`, `bf16`; all but `merged`), `keys`
            (`lora`: `diffusers`, `peft`, `kohya`), `rank` (`lora`, with `lossy`), `single_file` (`merged`). None is as
            if left out.

    Raises FadeError for an unknown format or option, where the target exists and `overwrite` is not set or is of
    another kind, where the result would not be exact and `lossy` is not set, and where it cannot be written.
    """
    if format not in FORMATS:
        raise FadeError(f"there is no format {format!r}; choose one of {', '.join(FORMATS)}")
    write = importlib.import_module(FORMATS[format]).write
    options = {name: value for name, value in options.items() if value is not None}
    for name in options.keys() - inspect.signature(write).parameters.keys():
        raise FadeError(f"the format {format} takes no option {name.replace('_', '-')}; leave it out")
    return write(edit, Path(path), say, overwrite, **options)
