"""The adapter file: one safetensors file, checked in full before anything is built from it.

For every layer it holds either factors and packed mask or the masked values and their positions, whichever is smaller
for the whole file (FADE's authors store factors without the mask, which is another adapter than the one trained). The
keys are not LoRA keys, so that a loader that knows no masks refuses the file instead of loading a dense adapter.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fade.errors import AdapterFileError
from fade.files import atomic_write
from fade_kernels import BitMask, masked_factor_values

FORMAT, FORMAT_VERSION = "fade-adapter", 1
PREFIX = "fade.unet."
MOST_WEIGHTS = 2**31
"""Weights of a layer; the largest of today's models have 6e8. A damaged size must not ask for all memory."""
MOST_SCALE = 1e6
"""Beyond any strength that draws something, and within every dtype's range that it meets."""


@dataclass(frozen=True)
class LayerTensors:
    """One layer of an adapter. `factors` is (A, B) or None; `values` float32 [nnz] or None; one of them is set."""

    mask: BitMask
    factors: tuple[Tensor, Tensor] | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class AdapterFile:
    """A file as read: its metadata, its layers by name, its size."""

    metadata: dict[str, Any]
    layers: dict[str, LayerTensors]
    bytes: int

    @property
    def selected(self) -> int:
        return sum(layer.mask.count for layer in self.layers.values())

    @property
    def total(self) -> int:
        return sum(layer.mask.shape[0] * layer.mask.shape[1] for layer in self.layers.values())


def _mask_tensors(mask: BitMask, key: str) -> dict[str, Tensor]:
    """A mask as packed words, or as entries per row and their columns, whichever is smaller."""
    n, k = mask.shape
    words = mask.words.cpu().contiguous()
    if k > 65536 or 2 * mask.count + 4 * n >= words.numel() * 4:
        return {f"{key}.mask": words}
    rows, columns = mask.unpack().cpu().nonzero(as_tuple=True)
    return {f"{key}.row_counts": torch.bincount(rows, minlength=n).int(), f"{key}.columns": columns.to(torch.uint16)}


def write_adapter_file(path: str | Path, metadata: dict[str, Any], layers: Mapping[str, LayerTensors]) -> int:
    """Writes the smaller of the two forms and returns the file's bytes. The old file survives any failure.

    Layers with factors may be written as values M⊙(BA); layers with values stay values.
    """
    masks, as_values, as_factors = {}, {}, {}
    for name, layer in layers.items():
        key = PREFIX + name
        masks |= _mask_tensors(layer.mask, key)
        if layer.factors is None:
            as_values[f"{key}.values"] = layer.values.detach().float().cpu()
            continue
        lora_a, lora_b = (factor.detach() for factor in layer.factors)
        as_values[f"{key}.values"] = masked_factor_values(lora_a, lora_b, layer.mask).float().cpu()
        as_factors |= {f"{key}.a": lora_a.cpu().contiguous(), f"{key}.b": lora_b.cpu().contiguous()}

    def size(tensors: dict[str, Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors.values())

    complete = len(as_factors) == 2 * len(layers)
    form = "factors" if complete and size(as_factors) < size(as_values) else "values"
    shapes = {name: list(layer.mask.shape) for name, layer in layers.items()}
    header = {**metadata, "format": FORMAT, "version": FORMAT_VERSION, "form": form, "shapes": shapes}
    with atomic_write(path) as temporary:
        tensors = masks | (as_factors if form == "factors" else as_values)
        save_file(tensors, temporary, metadata={"format": FORMAT, "fade": json.dumps(header, separators=(",", ":"))})
    return Path(path).stat().st_size


def read_adapter_file(path: str | Path) -> AdapterFile:
    """Reads and checks a file; needs no pipeline. Raises AdapterFileError saying what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise AdapterFileError(f"there is no adapter file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{path} is not a readable safetensors file (truncated or damaged?): {error}") from error
    if header.get("format") != FORMAT:
        raise AdapterFileError(f"{path} is not a FADE adapter; its metadata does not say format={FORMAT}")
    try:
        metadata = json.loads(header["fade"])
        version = metadata["version"]
        if version != FORMAT_VERSION:
            raise AdapterFileError(f"{path} has format version {version}; this release reads {FORMAT_VERSION}")
        layers = {
            name: _read_layer(PREFIX + name, (int(shape[0]), int(shape[1])), metadata["form"], tensors)
            for name, shape in metadata["shapes"].items()
        }
        _check_metadata(metadata, layers)
    except AdapterFileError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise AdapterFileError(f"{path} is damaged or was not written by FADE: {error}") from error
    if tensors:
        raise AdapterFileError(f"{path} holds tensors that belong to no layer: {', '.join(sorted(tensors)[:3])}")
    return AdapterFile(metadata, layers, path.stat().st_size)


def _check_metadata(metadata: dict[str, Any], layers: dict[str, LayerTensors]) -> None:
    """Raises ValueError where something has another type or size than what is written here."""

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(message)

    scale = metadata["scale"]
    require(type(scale) in (int, float) and abs(scale) <= MOST_SCALE, f"scale {scale!r}"[:60])
    digests = metadata["fingerprint"]
    require(isinstance(digests, dict) and len(digests) > 0, "fingerprint is empty")
    require(all(isinstance(word, str) for pair in digests.items() for word in pair), "fingerprint is no text")
    concept = metadata["concept"]
    require(isinstance(concept["forget"], str), "concept has no words")
    require(isinstance(concept.get("surrogate", ""), str), "surrogate has no words")
    require(isinstance(metadata.get("base", ""), str), "base is no name")
    for part, inner in (
        ("config", ("data", "locate", "overwrite")),
        ("run", ("seconds", "peak_memory_bytes", "losses")),
    ):
        section = metadata.get(part, {})
        require(isinstance(section, dict), f"{part} is no table")
        require(all(isinstance(section.get(name, {}), dict) for name in inner), f"{part} is no table of tables")
    for name in ("seconds", "peak_memory_bytes"):
        numbers = metadata.get("run", {}).get(name, {}).values()
        require(all(type(number) in (int, float) for number in numbers), f"{name} are no numbers")
    require(isinstance(metadata.get("versions", {}), dict), "versions is no table")
    ranks = {tensors.factors[0].shape[0] for tensors in layers.values() if tensors.factors is not None}
    require(len(ranks) <= 1 and 0 not in ranks, f"layers have the ranks {sorted(ranks)}")


def _read_layer(key: str, shape: tuple[int, int], form: str, tensors: dict[str, Tensor]) -> LayerTensors:
    """Takes one layer's tensors out of `tensors`, checking sizes before anything is built from them."""
    n, k = shape
    if n < 1 or k < 1 or n * k > MOST_WEIGHTS:
        raise ValueError(f"{key} has the shape {list(shape)}"[:120])

    def take(part: str, dtype: torch.dtype | None, shape: tuple[int, ...] | None) -> Tensor:
        tensor = tensors.pop(f"{key}.{part}", None)
        if tensor is None:
            raise ValueError(f"tensor {key}.{part} is missing")
        if (dtype is not None and tensor.dtype != dtype) or (shape is not None and tensor.shape != shape):
            raise ValueError(f"tensor {key}.{part} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}")
        return tensor

    if f"{key}.mask" in tensors:
        mask = BitMask.from_words(take("mask", torch.int32, (n, -(-k // 32))), shape)
    else:
        counts = take("row_counts", torch.int32, (n,)).long()
        if counts.min() < 0 or counts.max() > k:
            raise ValueError(f"tensor {key}.row_counts is out of range")
        columns = take("columns", torch.uint16, (int(counts.sum()),)).long()
        rows = torch.repeat_interleave(torch.arange(n), counts)
        flat = rows * k + columns
        if columns.numel() and (columns.max() >= k or (flat.diff() <= 0).any()):
            raise ValueError(f"tensor {key}.columns is out of range or out of order")
        dense = torch.zeros(n * k, dtype=torch.bool)
        dense[flat] = True
        mask = BitMask.pack(dense.view(n, k))

    def finite(tensor: Tensor, part: str) -> Tensor:
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {key}.{part} holds NaN, infinity or no floating-point numbers")
        return tensor

    if form == "values":
        return LayerTensors(mask, values=finite(take("values", torch.float32, (mask.count,)), "values"))
    if form != "factors":
        raise ValueError(f"unknown form {form!r}")
    lora_a, lora_b = finite(take("a", None, None), "a"), finite(take("b", None, None), "b")
    rank = lora_a.shape[0]
    if lora_a.flatten(1).shape != (rank, k) or lora_b.flatten(1).shape != (n, rank):
        raise ValueError(f"the factors of {key} have shapes {tuple(lora_a.shape)} and {tuple(lora_b.shape)}")
    return LayerTensors(mask, factors=(lora_a, lora_b))
