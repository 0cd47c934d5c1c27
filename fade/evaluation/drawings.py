"""Draws answer sets, and keeps them: the same prompts and seeds from the same weights are not drawn twice.

A set is found again by everything that its pictures depend on: the content of the denoiser with the adapters that are
on, every other part of the pipeline, prompts, seeds, how it is drawn and by which libraries. The base model's are
therefore shared by all adapters on it. The folder is `$FADE_CACHE`, else `fade` in the user's cache folder; the oldest
sets go when it outgrows `MOST_BYTES`.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fade.backbones import Backbone
from fade.bundled import Drawing
from fade.cache_key import library_versions, module_digest, pipeline_digests
from fade.errors import FadeError
from fade.files import read_tensors, remove_parts, write_tensors

MOST_BYTES = 4 * 10**9
_FORMAT = 1


def default_cache() -> Path:
    """The folder of answer sets where nobody names another."""
    if own := os.environ.get("FADE_CACHE"):
        return Path(own) / "answers"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fade" / "answers"


class Drawings:
    """Draws with a pipeline as it is at each call; `cache` is the folder of answer sets, None keeps none."""

    def __init__(
        self, backbone: Backbone, drawn: Drawing, batch_size: int, progress: bool = False, cache: Path | None = None
    ) -> None:
        self._backbone, self._drawn, self._batch_size, self._progress = backbone, drawn, batch_size, progress
        self._cache = cache
        self._others = None if cache is None else pipeline_digests(backbone.pipeline)

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], description: str) -> Tensor:
        """One picture a prompt and seed: float32 [n, 3, H, W] in [0, 1], on the CPU."""
        path = None if self._cache is None else self._cache / f"{self._key(prompts, seeds)}.safetensors"
        if path is not None and (found := _load(path)) is not None:
            return found
        images = self._backbone.generate(
            prompts, seeds, self._drawn.steps, self._drawn.guidance_scale, self._batch_size, self._progress, description
        ).cpu()  # fmt: skip
        if path is not None:
            _save(path, images)
        return images

    def _key(self, prompts: Sequence[str], seeds: Sequence[int]) -> str:
        backbone = self._backbone
        request: dict[str, Any] = {
            "format": _FORMAT,
            "denoiser": module_digest(backbone.denoiser),
            "pipeline": self._others,
            "libraries": {**library_versions(), "torch": torch.__version__},
            # Arithmetic, and with it the last bits, differs by device, dtype and batch.
            "device": backbone.device.type,
            "dtype": str(backbone.dtype),
            "batch_size": self._batch_size,
            "prompts": list(prompts),
            "seeds": list(seeds),
            **vars(self._drawn),
        }
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _load(path: Path) -> Tensor | None:
    """The pictures in a file; None where there is none or, with a warning, where it is damaged."""
    if not path.is_file():
        return None
    try:
        images = read_tensors(path)[0]["images"]
    except (FadeError, KeyError) as error:
        warnings.warn(f"kept pictures are damaged and are drawn again: {error}", stacklevel=3)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the oldest go first
    return images


def _save(path: Path, images: Tensor) -> None:
    """Keeps pictures; that they cannot be kept is a warning, not an error."""
    if images.nbytes > MOST_BYTES:
        return
    try:
        remove_parts(path)
        write_tensors(path, {"images": images}, {})
        _prune(path.parent)
    except (FadeError, OSError) as error:
        warnings.warn(f"the pictures are not kept, a rerun draws them again: {error}", stacklevel=3)


def _prune(folder: Path) -> None:
    files = [(file.stat(), file) for file in folder.glob("*.safetensors")]
    total = sum(stat.st_size for stat, _ in files)
    for stat, file in sorted(files, key=lambda pair: pair[0].st_mtime):
        if total <= MOST_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= stat.st_size
