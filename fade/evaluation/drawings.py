"""Draws answer sets, and keeps them: the same prompts and seeds from the same weights are not drawn twice.

A set is found again by everything that its pictures depend on: the content of the denoiser with the adapters that are
on, every other part of the pipeline, prompts, seeds, how it is drawn and by which libraries. The base model's are
therefore shared by all adapters on it. The folder is `$FADE_CACHE`, else `fade` in the user's cache folder; the oldest
sets go when it outgrows `MOST_BYTES`. Several processes may use it at once.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fade.backbones import Backbone
from fade.bundled import Drawing
from fade.cache_key import library_versions, module_digest, pipeline_digests
from fade.errors import FadeError
from fade.files import read_tensors, write_tensors

MOST_BYTES = 4 * 10**9
_FORMAT = 1
_WRITTEN_WITHIN = 3600.0
"""Seconds after which a half-written set is nobody's."""


def default_cache() -> Path:
    """The folder of answer sets where nobody names another."""
    if own := os.environ.get("FADE_CACHE"):
        return Path(own) / "answers"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fade" / "answers"


class Kept:
    """What takes long to compute, found again by all that it depends on. In memory for as long as this lives, and in
    files of a folder, unless that is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._held: dict[str, dict[str, Tensor]] = {}

    def __call__(self, request: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors on the CPU, by name: those that were kept for a request (ready for JSON), or `compute()`."""
        text = json.dumps({"format": _FORMAT, **request}, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        if key in self._held:
            return self._held[key]
        path = None if self.folder is None else self.folder / f"{key}.safetensors"
        found = None if path is None else _load(path)
        if found is None:
            found = {name: tensor.cpu() for name, tensor in compute().items()}
            if path is not None:
                _save(path, found)
        self._held[key] = found
        return found


def drawing_conditions(backbone: Backbone, batch_size: int) -> dict[str, Any]:
    """What pictures depend on beside the denoiser, their prompts, seeds and settings. Arithmetic, and with it the last
    bits, differs by device, dtype and batch."""
    return {
        "pipeline": pipeline_digests(backbone.pipeline),
        "libraries": {**library_versions(), "torch": torch.__version__},
        "device": backbone.device.type,
        "dtype": str(backbone.dtype),
        "batch_size": batch_size,
    }


class Drawings:
    """Draws with a pipeline as it is at each call; `cache` is the folder of answer sets, None keeps none."""

    def __init__(
        self, backbone: Backbone, drawn: Drawing, batch_size: int, progress: bool = False, cache: Path | None = None
    ) -> None:
        self._backbone, self._drawn, self._batch_size, self._progress = backbone, drawn, batch_size, progress
        self._cache = cache
        self._conditions = {} if cache is None else drawing_conditions(backbone, batch_size)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], description: str) -> Tensor:
        """One picture a prompt and seed: float32 [n, 3, H, W] in [0, 1], on the CPU."""

        def draw() -> dict[str, Tensor]:
            images = self._backbone.generate(
                prompts, seeds, self._drawn.steps, self._drawn.guidance_scale, self._batch_size, self._progress,
                description,
            )  # fmt: skip
            return {"images": images}

        if self._cache is None:
            return draw()["images"].cpu()
        request = {
            **self._conditions,
            "denoiser": module_digest(self._backbone.denoiser),
            "prompts": list(prompts),
            "seeds": list(seeds),
            **vars(self._drawn),
        }
        return Kept(self._cache)(request, draw)["images"]


def _load(path: Path) -> dict[str, Tensor] | None:
    """The tensors in a file; None where there is none or, with a warning, where it is damaged."""
    if not path.is_file():
        return None
    try:
        tensors = read_tensors(path)[0]
    except FadeError as error:
        if not path.exists():  # another process has made room meanwhile
            return None
        warnings.warn(f"kept pictures are damaged and are drawn again: {error}", stacklevel=4)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the oldest go first
    return tensors


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Keeps tensors; that they cannot be kept is a warning, not an error."""
    if sum(tensor.nbytes for tensor in tensors.values()) > MOST_BYTES:
        return
    try:
        _remove_left(path.parent)
        write_tensors(path, tensors, {})
        _prune(path.parent)
    except (FadeError, OSError) as error:
        warnings.warn(f"the pictures are not kept, a rerun draws them again: {error}", stacklevel=4)


def _remove_left(folder: Path) -> None:
    """Removes what killed processes left half-written: whatever is older than a write takes, as others may be writing
    the same set just now."""
    for part in folder.glob(".*.safetensors.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > _WRITTEN_WITHIN:
                shutil.rmtree(part)


def _prune(folder: Path) -> None:
    files = []
    for file in folder.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # another process prunes, too
            files.append((file.stat(), file))
    total = sum(stat.st_size for stat, _ in files)
    for stat, file in sorted(files, key=lambda pair: pair[0].st_mtime):
        if total <= MOST_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= stat.st_size
