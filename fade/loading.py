"""From what a user types as MODEL to a pipeline: the bundled DigitCanvas, a diffusers folder, or a hub id.

It is apart from the command line so that benchmarks and notebooks resolve a model in the same way.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fade.errors import FadeError

DIGITCANVAS = "digitcanvas"
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip


def load_model(model: str, device: str | None = None, dtype: str | None = None) -> Any:
    """The pipeline, on `device` (a GPU where there is one, by default) in `dtype` (float32 by default).

    Raises FadeError for a missing folder or hub model, a folder that is no pipeline, a pipeline class without a
    backbone (before its weights are read or downloaded), and an unknown device or dtype.
    """
    where, precision = _device(device), _dtype(dtype)
    if model == DIGITCANVAS and not Path(model).exists():
        from fade.digitcanvas import load_pipeline

        pipeline = load_pipeline(torch_dtype=precision)
    else:
        pipeline = _load(model, precision)
    return pipeline.to(where)


def _load(model: str, dtype: torch.dtype) -> Any:
    import diffusers

    from fade.backbones import BACKBONES

    folder = Path(model).expanduser()
    if folder.exists():
        source = str(folder)
        if not (folder / "model_index.json").is_file():
            raise FadeError(f"{model} is not a diffusers pipeline: it holds no model_index.json")
    elif model.startswith((".", "~", os.sep)) or model.count("/") != 1:
        raise FadeError(
            f"there is no model {model!r}: it is not a folder here, not a hub id (owner/name), and not {DIGITCANVAS!r}"
        )
    else:
        source = model
    try:
        config = diffusers.DiffusionPipeline.load_config(source)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise FadeError(f"cannot load the model {model!r}: {_first_line(error)}") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    name = name if isinstance(name, str) else "pipeline of an unknown class"
    cls = getattr(diffusers, name, None)
    if not isinstance(cls, type) or not any(base.__name__ in BACKBONES for base in cls.__mro__):
        raise FadeError(f"{model} is a {name}, which is not supported; supported: {', '.join(BACKBONES)}")
    try:
        with without_loading_bars():
            pipeline = cls.from_pretrained(source, torch_dtype=dtype)
    # A damaged folder shows itself anywhere in the libraries that read it.
    except Exception as error:
        raise FadeError(f"cannot load the model {model!r}: {_first_line(error)}") from error
    if getattr(pipeline.tokenizer, "model_max_length", 2**20) >= 2**20:
        raise FadeError(f"cannot load the model {model!r}: its tokenizer is missing or damaged")
    return pipeline


@contextlib.contextmanager
def without_loading_bars() -> Iterator[None]:
    """diffusers' and transformers' bars for reading and writing files off meanwhile; those of downloads stay on."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    silenced = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in silenced:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in silenced:
            log.enable_progress_bar()


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FadeError(f"unknown device {name!r}; say cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FadeError(f"there is no device {name}; this machine has {torch.cuda.device_count()} CUDA devices")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, NotImplementedError) as error:
        raise FadeError(f"the device {name!r} cannot be used here; say cpu, cuda or cuda:0") from error
    return device


def _dtype(name: str | None) -> torch.dtype:
    if name is None:
        return torch.float32
    if name not in DTYPES:
        raise FadeError(f"unknown dtype {name!r}; say one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
