"""Writing files so that a full disk, Ctrl-C or a crash never costs the old file: write beside it, flush, rename."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fade.errors import FadeError

WRITE_ERRORS = (OSError, SafetensorError)
"""What a file that cannot be written raises: safetensors has an error of its own, also for a full disk."""


def reason(error: BaseException) -> str:
    """Why a file could not be written, in a few words."""
    return getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2] or type(error).__name__


def check_writable(path: str | Path) -> None:
    """Raises FadeError where a file could not be written to `path`: asked before the work whose result it will hold.

    Makes the folder, as writing would, and leaves nothing else.
    """
    path = Path(path)
    if path.is_dir():
        raise FadeError(f"cannot write {path}: it is a folder; name a file")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise FadeError(f"cannot write {path}: {parent} is a file, not a folder; name another place")
    probe = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise FadeError(f"cannot write {path}: {error.strerror or error}; name another place") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in `path`'s folder; on success it is flushed to disk and renamed to `path`.

    On any exception, KeyboardInterrupt included, the temporary file is removed and an existing `path` stays as it was.
    Raises FadeError when the folder cannot be made or written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FadeError(f"cannot create the folder {path.parent}: {error.strerror or error}") from error
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(mode)  # some writers replace the file by one that only its owner may read
        os.replace(temporary, path)
    except WRITE_ERRORS as error:
        raise FadeError(f"cannot write {path}: {reason(error)}; nothing was changed") from error
    finally:
        temporary.unlink(missing_ok=True)
