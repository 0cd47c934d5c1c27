"""From what a user types as MODEL to a pipeline: a bundled model, a diffusers folder, a hub id or a checkpoint.

It is apart from the command line so that benchmarks and notebooks resolve a model in the same way.
"""

import contextlib
import inspect
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fade import bundled, processes
from fade.errors import FadeError

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip
_WEIGHTS = ("diffusion_pytorch_model", "model")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")


def load_model(model: str, device: str | None = None, dtype: str | None = None) -> Any:
    """The pipeline, on `device` (a GPU where there is one, by default) in `dtype` (float32 by default). Of several
    processes that a launcher started, each is on a GPU of its own.

    `model` is a bundled model's name, a diffusers folder, a hub id, or one safetensors checkpoint in the original
    layout, for which diffusers needs the family's configuration from the hub or its cache. A folder that has its
    weights only as a variant (`*.fp16.safetensors`) is loaded from that. Pickled weights are not read.

    Raises FadeError for a missing or incomplete folder, file or hub model, for pickled weights, for a pipeline class
    without a backbone (before its weights are read or downloaded), and for an unknown device or dtype.
    """
    where, precision = _device(device), _dtype(dtype)
    path = Path(model).expanduser()
    if model in bundled.PACKAGES and not Path(model).exists():
        pipeline = bundled.model(model).load_pipeline(torch_dtype=precision)
    elif path.is_file():
        pipeline = _load_file(model, path, precision)
    else:
        pipeline = _load_pipeline(model, path, precision)
    return pipeline.to(where)


def _load_pipeline(model: str, path: Path, dtype: torch.dtype) -> Any:
    if path.exists():
        if not (path / "model_index.json").is_file():
            raise FadeError(f"{model} is not a diffusers pipeline: it holds no model_index.json{_elsewhere(path)}")
    elif model.startswith((".", "~", os.sep)) or model.count("/") != 1:
        raise FadeError(
            f"there is no model {model!r}: it is not a folder here, not a hub id (owner/name), and not one of the "
            f"bundled {' and '.join(bundled.PACKAGES)}"
        )
    source, names = find_files(model, "model_index.json", "the model")
    index = _read_index(model, source)
    classes = {
        name: value[1]
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)
    }
    cls = pipeline_class(model, index, classes)
    parts = {name: {file.partition("/")[2] for file in names if file.startswith(f"{name}/")} for name in classes}
    for name, files in parts.items():
        if not files:
            raise FadeError(f"cannot load the model {model!r}: its folder {name}/ is missing or empty")
    variant = weights_variant(model, parts, "DiffusionPipeline", source)
    try:
        with without_loading_bars():
            pipeline = cls.from_pretrained(source, torch_dtype=dtype, variant=variant, use_safetensors=True)
    # A damaged folder shows itself anywhere in the libraries that read it.
    except Exception as error:
        raise FadeError(f"cannot load the model {model!r}: {_first_line(error)}") from error
    if getattr(pipeline.tokenizer, "model_max_length", 2**20) >= 2**20:
        raise FadeError(f"cannot load the model {model!r}: its tokenizer is missing or damaged")
    if not path.exists():
        pipeline.register_to_config(_name_or_path=model)  # it may have come from the cache's folder
    return pipeline


def _elsewhere(folder: Path) -> str:
    """Where the pipeline may be that somebody meant by a folder that is none."""
    snapshots = sorted(folder.glob("snapshots/*/model_index.json"), key=lambda file: file.stat().st_mtime)
    if snapshots:
        return f"; it is a hub cache, give {snapshots[-1].parent}"
    if (folder.parent / "model_index.json").is_file():
        return f"; it is one part of a pipeline, give {folder.parent}"
    checkpoints = sorted(folder.glob("*.safetensors"))
    return f"; to load the checkpoint in it, give {checkpoints[0]}" if checkpoints else ""


def _read_index(model: str, source: str) -> dict[str, Any]:
    import diffusers

    try:
        index = diffusers.DiffusionPipeline.load_config(source)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise FadeError(f"cannot load the model {model!r}: {_first_line(error)}") from error
    return index if isinstance(index, dict) else {}


def pipeline_class(model: str, index: Mapping[str, Any], classes: Mapping[str, str]) -> Any:
    import diffusers

    from fade.backbones import FAMILIES, supported_families

    name = index.get("_class_name")
    name = name if isinstance(name, str) else "pipeline of an unknown class"
    cls = getattr(diffusers, name, None)
    taken = inspect.signature(cls).parameters if isinstance(cls, type) else {}
    known = isinstance(cls, type) and any(
        family.draws(cls) or family.has_parts({part: classes.get(part, "") for part in taken}) for family in FAMILIES
    )
    if not known:
        newer = next((family for family in FAMILIES if name in (family.pipeline, *family.others)), None)
        if newer is not None:
            raise FadeError(
                f"{model} is a {name}, which the installed diffusers {diffusers.__version__} does not have; "
                f"{newer.name} needs diffusers {newer.since} or later"
            )
        raise FadeError(f"{model} is a {name}, which is not supported; supported: {supported_families()}")
    for part, parameter in taken.items():
        if part not in classes and parameter.default is parameter.empty and part not in cls._optional_components:
            raise FadeError(f"cannot load the model {model!r}: its model_index.json names no {part}")
    return cls


def _load_file(model: str, path: Path, dtype: torch.dtype) -> Any:
    from diffusers import StableDiffusionPipeline
    from safetensors import SafetensorError, safe_open

    if path.name == "model_index.json":
        raise FadeError(f"{model} is the index of a pipeline; give its folder, {path.parent}")
    if path.suffix.lower() in PICKLES:
        raise FadeError(
            f"{model} is a pickle, which can run code and is not read; convert it once, if you trust it, with "
            f"StableDiffusionPipeline.from_single_file({str(path)!r}).save_pretrained(FOLDER), and give FOLDER"
        )
    if path.suffix.lower() != ".safetensors":
        raise FadeError(f"{model} is no model: give a diffusers folder, a hub id or a .safetensors checkpoint")
    _refuse_pointers(model, [path])
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise FadeError(f"cannot read the checkpoint file {model}: {_first_line(error)}") from error
    if any(key.startswith("fade.") for key in keys):
        raise FadeError(
            f"{model} is an adapter, not a model; pass it as --adapter, with the model that it was made for"
        )
    if "model.diffusion_model.input_blocks.0.0.weight" not in keys or any(k.startswith("conditioner.") for k in keys):
        raise FadeError(
            f"{model} is no single-file checkpoint of Stable Diffusion 1.x or 2.x (one that has "
            "model.diffusion_model.input_blocks and one text encoder); give such a file or a diffusers folder"
        )
    try:
        with without_loading_bars():
            pipeline = StableDiffusionPipeline.from_single_file(str(path), torch_dtype=dtype)
    except Exception as error:
        raise FadeError(
            f"cannot load the single-file checkpoint {model}: {_first_line(error)}. Its configuration comes from the "
            f"hub; without one, convert it with StableDiffusionPipeline.from_single_file({str(path)!r}, config="
            "ANY_FOLDER_OF_ITS_FAMILY).save_pretrained(FOLDER), and give FOLDER"
        ) from error
    pipeline.register_to_config(_name_or_path=path.name)
    return pipeline


def find_files(model: str, index: str, what: str) -> tuple[str, set[str]]:
    """Where to load a folder or hub id from, and the files there by their relative paths.

    A hub that does not answer is not asked again: the copy in its local cache, recognised by the file `index`, is
    taken. Raises FadeError where there is neither. `what` names the thing in messages, such as "the model".
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    folder = Path(model).expanduser()
    if not folder.exists():
        try:
            info = HfApi().model_info(model, timeout=10)
            return model, {sibling.rfilename for sibling in info.siblings or ()}
        except GatedRepoError as error:
            raise FadeError(
                f"cannot load {what} {model!r}: it is gated; accept its terms on its page, then run hf auth login"
            ) from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise FadeError(
                f"cannot load {what} {model!r}: the hub has no such model, or it is private and needs hf auth login"
            ) from error
        # No network, offline mode, a hub in trouble: each HTTP library that hub versions use has errors of its own.
        except Exception as unreachable:
            try:
                folder = Path(hf_hub_download(model, index, local_files_only=True)).parent
            except Exception as error:
                raise FadeError(
                    f"cannot load {what} {model!r}: it is not in the local cache, and the hub cannot be reached "
                    f"({_first_line(unreachable)})"
                ) from error
    return str(folder), {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def weights_variant(model: str, parts: Mapping[str, Collection[str]], loader: str, source: str) -> str | None:
    """The variant (such as "fp16") to load weights in, None for the plain files.

    `parts` has the names of the files of each part of the model; the plain weights are preferred where every part has
    them. `loader` is the class with which weights are converted and `source` the folder. Raises FadeError for parts
    whose weights are pickled, missing, Git LFS pointers, or in variants that have nothing in common.
    """
    variants: dict[str, set[str | None]] = {}
    for part, files in parts.items():
        prefix = f"{part}/" if part else ""
        weights = {file for file in files if file.endswith(".safetensors") and file.startswith(_WEIGHTS)}
        pickles = sorted(file for file in files if Path(file).suffix in PICKLES)
        if weights:
            if Path(source).is_dir():
                _check_local(model, Path(source) / part, weights, files)
            variants[part] = {_variant(file) for file in weights}
        elif pickles:
            raise FadeError(
                f"{model} has pickled weights ({prefix}{pickles[0]}), which can run code and are not read; convert it "
                f"once, if you trust it, with {loader}.from_pretrained({model!r}).save_pretrained(FOLDER)"
            )
        elif "config.json" in files:
            raise FadeError(f"cannot load {model!r}: {prefix or 'it'} holds no weights (*.safetensors)")
    only = [found for found in variants.values() if None not in found]
    if not only:
        return None
    if not (shared := set.intersection(*only)):
        listed = "; ".join(f"{part}: {', '.join(sorted(map(str, found)))}" for part, found in variants.items())
        raise FadeError(f"cannot load {model!r}: its parts have no variant of the weights in common ({listed})")
    for part, files in parts.items():
        if bare := [file for file in files if "." not in Path(file).name]:  # diffusers looks for a variant in its name
            raise FadeError(f"cannot load {model!r} while {part}/{bare[0]} is there, a file without an ending; move it")
    return min(shared, key=lambda name: (name != "fp16", name))


def _variant(file: str) -> str | None:
    """`model.fp16-00001-of-00002.safetensors` -> "fp16"."""
    stem = re.sub(r"-\d{5}-of-\d{5}", "", file.removesuffix(".safetensors"))
    return stem.partition(".")[2] or None


def _check_local(model: str, folder: Path, weights: Collection[str], files: Collection[str]) -> None:
    _refuse_pointers(model, [folder / file for file in weights])
    for index in sorted(file for file in files if ".safetensors.index" in file):
        try:
            shards = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise FadeError(f"cannot load {model!r}: {folder.name}/{index} is damaged") from error
        if missing := sorted(shards - set(files)):
            raise FadeError(f"cannot load {model!r}: {folder.name}/{missing[0]} is missing, one of {len(shards)} files")


def _refuse_pointers(model: str, files: Collection[Path]) -> None:
    """Git without LFS writes a few lines of text in the place of each large file."""
    for file in files:
        with file.open("rb") as opened:
            if opened.read(40).startswith(b"version https://git-lfs"):
                raise FadeError(f"{model}: {file.name} is a Git LFS pointer, not the weights; run git lfs pull there")


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
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FadeError(f"unknown device {name!r}; say cpu, cuda or cuda:0") from error
    own = processes.local_rank()
    if device.type == "cuda" and own is not None:
        if device.index is not None:
            raise FadeError(f"several processes cannot share the device {name}; leave out --device, or say cuda")
        # A launcher may let each process see its own GPU alone.
        device = torch.device("cuda", own if torch.cuda.device_count() > 1 else 0)
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        why = "" if own is None else "; start no more processes than that, or say --device cpu"
        raise FadeError(f"there is no device {device}; this machine has {count} CUDA devices{why}")
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
