"""The frozen model an adapter sits on: its own parameters and layers, seen through whatever adapters are attached, and
the fingerprint that ties an adapter file to them."""

import hashlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fade.digitcanvas import DIGITS, MODEL_PATH, STYLES
from fade.errors import FadeError
from fade.layers import MASKED_LAYERS

# Coarsest last: an adapter trained in a wide dtype also fits the same weights loaded in a narrower one.
_FINGERPRINT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def base_parameters(denoiser: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The denoiser's own parameters under the names they have without any adapter attached."""
    adapter_parts = {"lora_mask", *lora.LoraLayer.adapter_layer_names, "lora_values"}
    for name, parameter in denoiser.named_parameters():
        parts = name.split(".")
        if adapter_parts.isdisjoint(parts):
            yield ".".join(part for part in parts if part != "base_layer"), parameter


def target_layers(denoiser: nn.Module, patterns: tuple[str, ...] | None = None) -> dict[str, nn.Module]:
    """Linear and Conv2d layers of the denoiser by name, without adapters' own; all, or those matching a pattern.

    A pattern is a name, the end of a name after a dot, or a glob such as `*.attn2.to_k`. The modules are the base
    layers, also where an adapter wraps them. Raises FadeError naming a pattern that matches nothing.
    """
    layers = {}
    for name, module in denoiser.named_modules():
        parts = name.split(".")
        if isinstance(module, BaseTunerLayer) or any(part.startswith("lora_") for part in parts):
            continue
        if type(module) in MASKED_LAYERS:
            layers[".".join(part for part in parts if part != "base_layer")] = module
    if patterns is None:
        return layers

    def matches(name: str, pattern: str) -> bool:
        return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)

    for pattern in patterns:
        if not any(matches(name, pattern) for name in layers):
            some = ", ".join(list(layers)[:: max(1, len(layers) // 4)][:4])
            raise FadeError(f"the target pattern {pattern!r} matches no Linear or Conv2d layer; there are e.g. {some}")
    return {name: m for name, m in layers.items() if any(matches(name, pattern) for pattern in patterns)}


def fingerprint(denoiser: nn.Module) -> dict[str, str]:
    """SHA-256 of all base weights, in their own dtype and in the coarser ones that they may be loaded in.

    Raises FadeError while adapters are merged into the weights, and for weights in an integer or 64-bit dtype.
    """
    refuse_merged(denoiser)
    own = str(next(p for _, p in base_parameters(denoiser)).dtype).removeprefix("torch.")
    order = list(_FINGERPRINT_DTYPES)
    if own not in order:
        raise FadeError(f"the denoiser's weights are {own}; load the pipeline in {', '.join(order)}")
    digests = {dtype: hashlib.sha256() for dtype in order[order.index(own) :]}
    for name, parameter in sorted(base_parameters(denoiser), key=lambda item: item[0]):
        for dtype, digest in digests.items():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            weight = parameter.detach().to("cpu", _FINGERPRINT_DTYPES[dtype]).reshape(-1)
            digest.update(weight.view(torch.uint8).numpy().data)
    return {dtype: digest.hexdigest() for dtype, digest in digests.items()}


def same_base(trained_on: Mapping[str, str], found: Mapping[str, str]) -> bool:
    """Whether two fingerprints are of the same weights, compared in the finest dtype that both could be in."""
    shared = [dtype for dtype in _FINGERPRINT_DTYPES if dtype in trained_on and dtype in found]
    return bool(shared) and trained_on[shared[0]] == found[shared[0]]


def refuse_merged(denoiser: nn.Module) -> None:
    """Raises FadeError where an adapter is merged into the weights."""
    for module in denoiser.modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            names = ", ".join(module.merged_adapters)
            raise FadeError(f"the adapters {names} are merged into the weights; call unmerge() or unfuse_lora() first")


def is_digitcanvas(pipeline: Any) -> bool:
    """Whether the pipeline is DigitCanvas, the bundled one or one trained again: it draws 32x32 images and its small
    vocabulary has every digit and style as one token."""
    tokenizer, unet = getattr(pipeline, "tokenizer", None), getattr(pipeline, "unet", None)
    if tokenizer is None or unet is None or unet.config.sample_size != 8 or len(tokenizer) > 2048:
        return False
    vocabulary = tokenizer.get_vocab()
    return all(f"{word}</w>" in vocabulary for word in (*DIGITS, *STYLES))


def base_name(pipeline: Any) -> str:
    """What the pipeline was loaded from: `digitcanvas`, a hub id, or a folder's name without the folders above it."""
    source = str(getattr(pipeline, "name_or_path", "") or pipeline.config.get("_name_or_path") or "unnamed")
    if source == str(MODEL_PATH):
        return "digitcanvas"
    return Path(source).name if Path(source).is_absolute() else source


def short_digest(digests: Mapping[str, str]) -> str:
    """The first digits of a fingerprint, to tell two apart in a message."""
    dtype, digest = next(iter(digests.items()))
    return f"{dtype}:{digest[:12]}"
