"""What cached latents depend on, as digests: the parts of a pipeline by their content, and files by theirs."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

_PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")
"""Parts of a pipeline that latents depend on beside the denoiser, or what their names begin with."""


def pipeline_digests(pipeline: Any) -> dict[str, str]:
    """A digest of each part beside the denoiser that pictures, prompts and samples go through, by its name."""
    digests = {"class": type(pipeline).__name__}
    for name, part in sorted(pipeline.components.items()):
        if not name.startswith(_PARTS) or part is None:
            continue
        if isinstance(part, nn.Module):
            digests[name] = module_digest(part)
        elif hasattr(part, "get_vocab"):
            digests[name] = _tokenizer_digest(part)
        else:
            digests[name] = _scheduler_digest(part)
    return digests


def library_versions() -> dict[str, str]:
    """The libraries whose releases change samples, prompts' embeddings or what is read from a picture."""
    return {name: ".".join(version(name).split(".")[:2]) for name in ("diffusers", "transformers", "pillow")}


def module_digest(module: nn.Module) -> str:
    """SHA-256 of what a module computes with: its config, its weights and buffers, and the adapters that are on.

    A wrapper of torch.compile or PEFT around it changes nothing, nor does an adapter that is off; weights that
    accelerate keeps elsewhere are looked at where they are. Weights that cannot be seen give a digest like no other.
    """
    module = getattr(module, "_orig_mod", module)
    if isinstance(module, PeftModel):
        module = module.get_base_model()
    digest = hashlib.sha256(_text(_config(module)))
    active: dict[str, list[str]] = {}
    for name, part in module.named_modules():
        if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            active[name] = _active(part)
            if active[name]:
                scaling = {a: str(s) for a, s in getattr(part, "scaling", {}).items() if a in active[name]}
                digest.update(_text([_plain_name(name), active[name], scaling]))
    for name, part in module.named_modules():
        own = list(chain(part.named_parameters(recurse=False), part.named_buffers(recurse=False)))
        if own and not _is_off(name, active):
            with _looked_at(part, own):
                for key, _ in own:
                    full = f"{name}.{key}" if name else key
                    if not _is_off(full, active):
                        digest.update(_text(_plain_name(full)))
                        _add_tensor(digest, getattr(part, key))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read piece by piece; of a file that cannot be read, why."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"


def sources_digest(folder: Path) -> str:
    """SHA-256 of every Python file in a folder and those below, by name and content."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(_text([file.relative_to(folder).as_posix(), file_digest(file)]))
    return digest.hexdigest()


def _active(layer: BaseTunerLayer | AuxiliaryTrainingWrapper) -> list[str]:
    """The adapters that change what a layer computes; merged ones are in its weights already."""
    if layer.disable_adapters or (isinstance(layer, BaseTunerLayer) and layer.merged):
        return []
    return list(layer.active_adapters)


def _is_off(name: str, active: dict[str, list[str]]) -> bool:
    """Whether a module or tensor belongs to an adapter that is off: below an adapter layer, but of neither the base
    layer nor an active adapter."""
    parts = name.split(".")
    for depth in range(len(parts)):
        owner, inner = ".".join(parts[:depth]), parts[depth:]
        if owner not in active or inner[0] in ("base_layer", "original_module"):
            continue
        # lora_A.NAME.weight, modules_to_save.NAME.…: a container alone is looked into, a name in it decides.
        if len(inner) > 1 and not set(active[owner]) & set(inner):
            return True
    return False


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module", "_orig_mod"))


@contextlib.contextmanager
def _looked_at(module: nn.Module, own: list[tuple[str, Tensor]]) -> Iterator[None]:
    """The module's own tensors are there meanwhile, also where accelerate's offloading holds them elsewhere."""
    if hasattr(module, "_hf_hook") and any(tensor.is_meta for _, tensor in own):
        with align_module_device(module, "cpu"):
            yield
    else:
        yield


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(_text([str(tensor.dtype), list(tensor.shape)]))
    if tensor.is_meta:
        digest.update(os.urandom(16))
        return
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:  # a subclass that quantises, say: what it is made of
        names, context = flatten()
        digest.update(_text(str(context)))
        for name in names:
            _add_tensor(digest, getattr(tensor, name))
        return
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _tokenizer_digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = getattr(tokenizer, "bpe_ranks", {}) if backend is None else json.loads(backend.to_str())
    # Padding and truncation there are those of the last call.
    rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    settings = [tokenizer.model_max_length, tokenizer.padding_side, tokenizer.special_tokens_map]
    return hashlib.sha256(_text([type(tokenizer).__name__, tokenizer.get_vocab(), settings, _keys(rules)])).hexdigest()


def _scheduler_digest(scheduler: Any) -> str:
    digest = hashlib.sha256(_text([type(scheduler).__name__, _config(scheduler)]))
    if isinstance(levels := getattr(scheduler, "alphas_cumprod", None), Tensor):
        _add_tensor(digest, levels)  # also where they were set by hand
    return digest.hexdigest()


def _config(part: Any) -> dict[str, Any]:
    """A part's settings, without where it was loaded from and what wrote it."""
    config = getattr(part, "config", {})
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {k: v for k, v in values.items() if not k.startswith("_") and k != "transformers_version"}


def _keys(values: dict[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in values.items()}


def _text(value: Any) -> bytes:
    def plain(other: Any) -> Any:
        return other.tolist() if hasattr(other, "tolist") else str(other)

    return json.dumps(value, sort_keys=True, default=plain).encode()
