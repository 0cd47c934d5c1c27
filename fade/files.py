"""Writing files so that a full disk, Ctrl-C or a crash never costs the old file: write beside it, flush, rename."""

import contextlib
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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
    probe = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.mkdir()
    except OSError as error:
        raise FadeError(f"cannot write {path}: {error.strerror or error}; name another place") from error
    finally:
        with contextlib.suppress(OSError):
            probe.rmdir()


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path below `path`'s folder; on success it is flushed to disk and renamed to `path`.

    On any exception, KeyboardInterrupt included, the temporary file is removed and an existing `path` stays as it was;
    what a killed process leaves is `remove_parts`'. Raises FadeError when the folder cannot be made or written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FadeError(f"cannot create the folder {path.parent}: {error.strerror or error}") from error
    part = _part(path)
    try:
        # A folder of its own, because some writers put temporary files of theirs beside the one that they were given.
        part.mkdir()
        temporary = part / path.name
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
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path, marker: str) -> Iterator[Path]:
    """Yields the name of a folder to make beside `path`; on success it takes `path`'s place, complete.

    On any exception, KeyboardInterrupt included, it is removed and an existing `path` stays as it was. Among the files
    must be `marker`. Raises FadeError where the folder cannot be written.
    """
    path = Path(path).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FadeError(f"cannot create the folder {path.parent}: {error.strerror or error}") from error
    mark = secrets.token_hex(4)
    fresh, old = (path.with_name(f".{path.name}.{mark}.{state}") for state in ("part", "old"))
    try:
        yield fresh
        mode = (fresh / marker).stat().st_mode
        for weights in fresh.rglob("*.safetensors"):
            weights.chmod(mode)  # written for their owner alone
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(fresh, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
    except WRITE_ERRORS as error:
        raise FadeError(f"cannot write {path}: {reason(error)}; nothing was changed") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(path: Path, overwrite: bool, marker: str | None = None, kind: str = "") -> None:
    """Raises FadeError where something is at `path` and `overwrite` is not set, or where it is of another kind: no
    folder that holds the file `marker`, or no file, where there is no marker."""
    ours = path.is_file() if marker is None else (path / marker).is_file()
    if path.exists() and not ours:
        raise FadeError(f"{path} is not a {kind or 'file'}, so it is not replaced; name another output")
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise FadeError(f"{path} exists already; pass --overwrite to replace it")


def remove_parts(path: str | Path) -> None:
    """Removes what killed processes left half-written for `path`. Nobody else may be writing it meanwhile."""
    path = Path(path)
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if re.fullmatch(r"[0-9a-f]{8}", part.name[len(path.name) + 2 : -len(".part")]):
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, dtypes and shapes, on whichever device they are."""
    value = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        value.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        value.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return value.hexdigest()


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], record: Any) -> None:
    """Writes a safetensors file that tells whether it is whole, with a record for JSON to hold. Raises FadeError."""
    text = json.dumps(record)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(stored, temporary, metadata={"record": text, "digest": _whole(stored, text)})


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors, on the CPU, and the record that `write_tensors` wrote.

    Raises FadeError where the file cannot be read or is not, to the last bit, what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies, because what safetensors gives is the file itself, mapped into memory.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
        text = metadata["record"]
        whole = metadata["digest"] == _whole(tensors, text)
        record = json.loads(text)
    except (*WRITE_ERRORS, KeyError, ValueError, RuntimeError) as error:
        raise FadeError(f"{path} is damaged or was not written by FADE: {_first_line(error)}") from error
    if not whole:
        raise FadeError(f"{path} is damaged: its tensors are not those that were written")
    return tensors, record


def _whole(tensors: Mapping[str, Tensor], text: str) -> str:
    return hashlib.sha256((digest(tensors) + text).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
