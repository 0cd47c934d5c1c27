"""The adapter file: one safetensors file, checked in full before anything is built from it.

For every layer it holds either factors and packed mask or the masked values and their positions, whichever is smaller
for the whole file (FADE's authors store factors without the mask, which is another adapter than the one trained). The
keys are not LoRA keys, so that a loader that knows no masks refuses the file instead of loading a dense adapter.

A file that adapters were combined into also holds its parts (`fade.combine`): for each, which of the positions are its
own and, where several parts share a position, its value there; elsewhere the sum is its value.

A file may come from anywhere. It is read, never mapped, at most twice its size is held, and masks stay positions until
a layer takes them (`BitMask.from_positions`), so that no size written in it makes anything as large as it says.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fade.concept import pairs_in
from fade.errors import AdapterFileError
from fade.files import atomic_write
from fade_kernels import BitMask, masked_factor_values, scatter_masked_

FORMAT, FORMAT_VERSION = "fade-adapter", 1
VERSION_WITH_PARTS = 2
"""Of files with parts, which releases that know none would take for damaged."""
PART_PREFIX = "fade.part."
COMPONENTS = ("unet", "transformer")
"""Of a pipeline, that layers are in; the unet where the metadata does not say."""
MOST_WEIGHTS = 2**31
"""Weights of a layer; the largest of today's models have 6e8."""
LEAST_SCALE, MOST_SCALE = 1e-6, 1e6
"""Between any strengths that draw something, and within every dtype's range that they meet."""
MOST_NUMBER = 1e300
"""Of the numbers in the metadata, so that each of them is a float."""
MOST_HEADER_BYTES, MOST_HEADER_ITEMS = 2**24, 200_000
"""Of a header, as bytes and as entries of its tables and lists, which take 20 times as much once they are read. A file
of 2000 layers after 10 000 steps has a quarter of that."""
MOST_DEPTH, MOST_NAME = 16, 1000
"""Tables within tables of the metadata; characters of a name or a concept."""
_DAMAGES = (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError)
"""What reading something of another type or size than was written raises."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LayerTensors:
    """One layer of an adapter. `factors` is (A, B) or None; `values` float32 [nnz] or None; one of them is set.

    `kernel` is what a weight has beyond its two first dimensions: () of a Linear, (height, width) of a convolution,
    None where it is not known.
    """

    mask: BitMask
    factors: tuple[Tensor, Tensor] | None = None
    values: Tensor | None = None
    kernel: tuple[int, ...] | None = None


@dataclass(frozen=True)
class AdapterFile:
    """A file as read: its metadata, its layers by name, its size."""

    metadata: dict[str, Any]
    layers: dict[str, LayerTensors]
    bytes: int
    part_tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """What the file holds of its parts, as it is there; `read_parts` makes layers of it."""

    @property
    def selected(self) -> int:
        return sum(layer.mask.count for layer in self.layers.values())

    @property
    def total(self) -> int:
        return sum(layer.mask.shape[0] * layer.mask.shape[1] for layer in self.layers.values())


def _mask_tensors(mask: BitMask, key: str) -> dict[str, Tensor]:
    """A mask as packed words, or as entries per row and their columns, whichever is smaller."""
    n, k = mask.shape
    if k > 65536 or 2 * mask.count + 4 * n >= n * -(-k // 32) * 4:
        return {f"{key}.mask": mask.words.cpu().contiguous()}
    row_counts, columns = mask.positions()
    return {
        f"{key}.row_counts": row_counts.int().cpu().contiguous(),
        f"{key}.columns": columns.to(torch.uint16).cpu().contiguous(),
    }


def component_of(metadata: Mapping[str, Any]) -> str:
    """The component of a pipeline that an adapter's layers are in. Raises ValueError for one that no pipeline has."""
    component = metadata.get("component", COMPONENTS[0])
    if component not in COMPONENTS:
        raise ValueError(f"component is none of {', '.join(COMPONENTS)}")
    return component


def _prefix(metadata: Mapping[str, Any]) -> str:
    """What the keys of the layers' tensors begin with."""
    return f"fade.{component_of(metadata)}."


def write_adapter_file(
    path: str | Path,
    metadata: dict[str, Any],
    layers: Mapping[str, LayerTensors],
    parts: Sequence[Mapping[str, LayerTensors]] = (),
) -> int:
    """Writes the smaller of the two forms and returns the file's bytes. The old file survives any failure.

    Layers with factors may be written as values M⊙(BA); layers with values stay values. Where `layers` are the sum of
    `parts`, all in values form, `metadata["parts"]` has a record for each of them.
    """
    masks, as_values, as_factors = {}, {}, {}
    for name, layer in layers.items():
        key = _prefix(metadata) + name
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
    version = VERSION_WITH_PARTS if parts else FORMAT_VERSION
    header = {**metadata, "format": FORMAT, "version": version, "form": form, "shapes": shapes}
    header.pop("kernels", None)
    if all(layer.kernel is not None for layer in layers.values()):
        header["kernels"] = {name: list(layer.kernel) for name, layer in layers.items() if layer.kernel}
    tensors = masks | (as_factors if form == "factors" else as_values) | _part_tensors(parts)
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT, "fade": json.dumps(header, separators=(",", ":"))})
    return Path(path).stat().st_size


def read_adapter_file(path: str | Path) -> AdapterFile:
    """Reads and checks a file; needs no pipeline. Raises AdapterFileError saying what is wrong with it.

    The text in the metadata is as the file has it: show it through `fade.errors.printable`.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterFileError(f"there is no adapter file {path}")
    try:
        header, tensors, size = _read_safetensors(path)
    except (SafetensorError, *_DAMAGES, OSError, AssertionError) as error:
        raise AdapterFileError(f"{path} is not a readable safetensors file (truncated or damaged?): {error}") from error
    if header.get("format") != FORMAT:
        raise AdapterFileError(f"{path} is not a FADE adapter; its metadata does not say format={FORMAT}")
    try:
        metadata = _parse(header["fade"].encode())
        version = metadata["version"]
        if version not in (FORMAT_VERSION, VERSION_WITH_PARTS):
            told = str(version)[:40]
            raise AdapterFileError(f"{path} has format version {told}; this release reads up to {VERSION_WITH_PARTS}")
        kernels = metadata.get("kernels")
        prefix, form = _prefix(metadata), metadata["form"]
        layers = {
            name: read_layer(prefix + name, shape, form, tensors, None if kernels is None else kernels.get(name, []))
            for name, shape in metadata["shapes"].items()
        }
        check_metadata(metadata, layers)
    except AdapterFileError:
        raise
    except _DAMAGES as error:
        raise AdapterFileError(f"{path} is damaged or was not written by FADE: {error}") from error
    parts = {}
    if version == VERSION_WITH_PARTS:
        parts = {key: tensors.pop(key) for key in list(tensors) if key.startswith(PART_PREFIX)}
    if tensors:
        raise AdapterFileError(f"{path} holds tensors that belong to no layer: {', '.join(sorted(tensors)[:3])[:300]}")
    return AdapterFile(metadata, layers, size, parts)


def _part_tensors(parts: Sequence[Mapping[str, LayerTensors]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer in dict.fromkeys(name for part in parts for name in part):
        shared = _owners([part[layer].mask for part in parts if layer in part]) > 1
        for index, part in enumerate(parts):
            if layer in part:
                key, mask = f"{PART_PREFIX}{index}.{layer}", part[layer].mask
                own = part[layer].values[shared[mask.unpack()]]
                tensors |= {**_mask_tensors(mask, key), f"{key}.values": own.contiguous()}
    return tensors


def _owners(masks: Sequence[BitMask]) -> Tensor:
    """How many of the masks have each position: int16 [N, K]."""
    return sum(mask.unpack().short() for mask in masks)


def read_parts(file: AdapterFile) -> list[dict[str, LayerTensors]]:
    """The parts that a file was combined from, in the order of `metadata["parts"]`, each with its layers in values
    form; none where it was not combined. Raises AdapterFileError where they are not what the file is the sum of.
    """
    if not file.part_tensors:
        return []
    tensors = dict(file.part_tensors)
    parts: list[dict[str, LayerTensors]] = [{} for _ in file.metadata["parts"]]
    try:
        for layer, total in file.layers.items():
            masks = {}
            for index in range(len(parts)):
                key = f"{PART_PREFIX}{index}.{layer}"
                if f"{key}.values" in tensors:
                    masks[index] = _read_mask(key, total.mask.shape, tensors)
            sums = torch.zeros(total.mask.shape, dtype=torch.float32)
            dense = scatter_masked_(sums.clone(), total.values, total.mask)
            shared = _owners(list(masks.values())) > 1 if masks else torch.zeros_like(dense, dtype=torch.bool)
            for index, mask in masks.items():
                at = mask.unpack()
                values, several = dense[at], shared[at]
                values[several] = _finite(tensors.pop(f"{PART_PREFIX}{index}.{layer}.values"), layer, several.sum())
                parts[index][layer] = LayerTensors(mask, values=values, kernel=total.kernel)
                sums[at] += values
            if not torch.equal(sums, dense):
                raise ValueError(f"the parts of {layer} do not add up to what it holds")
        if tensors:
            raise ValueError(f"it holds parts of no layer: {', '.join(sorted(tensors)[:3])[:300]}")
    except _DAMAGES as error:
        raise AdapterFileError(f"the file's parts are damaged: {error}") from error
    return parts


def _finite(values: Tensor, layer: str, count: Any) -> Tensor:
    if values.dtype != torch.float32 or values.shape != (int(count),) or not math.isfinite(_largest(values)):
        raise ValueError(f"a part's values of {layer} are not {int(count)} finite numbers")
    return values


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, by tensor and with its `__metadata__`, and the file's bytes.

    safetensors checks the file, but only after its header was measured here. Raises ValueError where it is none.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise ValueError("its header goes beyond its end")
        if length > MOST_HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes; no adapter has more than {MOST_HEADER_BYTES}")
        return _parse(file.read(length)), size


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor], int]:
    """The metadata and tensors of a safetensors file, and its bytes; no tensors where it is no FADE adapter.

    The file is read and not mapped: one that is cut short meanwhile would end the process.
    """
    table, size = read_header(path)
    header = table.get("__metadata__", {})
    if header.get("format") != FORMAT:
        return {}, {}, size
    return header, safetensors.torch.load(path.read_bytes()), size


def _parse(text: bytes) -> dict[str, Any]:
    """A JSON table. Raises ValueError for one that would take far more memory than its text, or holds no Unicode."""
    if sum(map(text.count, b",[{")) > MOST_HEADER_ITEMS:
        raise ValueError(f"it holds tables of more than {MOST_HEADER_ITEMS} entries")
    try:
        table = json.loads(text)
    except RecursionError:
        raise ValueError("it holds tables within tables without end") from None
    if not isinstance(table, dict):
        raise ValueError("its header is no table")
    level: list[Any] = [table]
    for _ in range(MOST_DEPTH):
        for value in level:
            if isinstance(value, str):
                value.encode()  # a lone surrogate can be neither printed nor written
        tables = [value for value in level if isinstance(value, dict)]
        level = [inner for value in level if isinstance(value, list) for inner in value]
        level += [inner for value in tables for entry in value.items() for inner in entry]
        if not level:
            return table
    raise ValueError(f"it holds tables within tables, more than {MOST_DEPTH} deep")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MOST_NUMBER


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_saliency(value: Any) -> bool:
    """None, or a float32 sum: any two of them can be divided."""
    return value is None or (_is_number(value) and (value == 0 or 1e-60 <= value <= 1e60))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MOST_NAME


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(holds, value))


_LAYER_FACTS: dict[str, Callable[[Any], bool]] = {
    "name": _is_name,
    "shape": lambda value: _is_list(value, _is_number),
    "saliency_mean": _is_saliency,
    "saliency_max": _is_saliency,
    "selected": _is_number,
    "density": _is_share,
    "tiles_occupied": _is_share,
}
"""What the run's record says of each layer, as the report shows it."""


def check_metadata(metadata: dict[str, Any], layers: dict[str, LayerTensors]) -> None:
    """Raises ValueError where something has another type or size than what is written here; what may be left out is
    filled in, so that whoever reads the metadata finds it."""

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(message)

    scale = metadata["scale"]
    strong = type(scale) in (int, float) and LEAST_SCALE <= abs(scale) <= MOST_SCALE
    require(strong, f"scale {scale!r}"[:60] + f" is no number from {LEAST_SCALE:g} to {MOST_SCALE:g} or its negative")
    digests = metadata["fingerprint"]
    require(isinstance(digests, dict) and len(digests) > 0, "fingerprint is empty")
    require(all(_is_name(word) for pair in digests.items() for word in pair), "fingerprint is no text")

    metadata["concept"] = _checked_concept(metadata["concept"])
    records = metadata.get("parts", [])
    require(_is_list(records, lambda part: isinstance(part, dict)), "parts are no list of tables")
    for part in records:
        part["concept"] = _checked_concept(part["concept"])
        require(_is_number(part["weight"]) and _is_name(part["digest"]), "a part has no weight or no digest")
    for name in ("base", "created"):
        require(_is_name(metadata.get(name, "")), f"{name} is no name")

    for part, inner in (
        ("config", ("data", "locate", "overwrite", "closed_form", "options")),
        ("run", ("seconds", "peak_memory_bytes", "losses", "held_out_losses", "residual")),
    ):
        section = metadata.get(part, {})
        require(isinstance(section, dict), f"{part} is no table")
        require(all(isinstance(section.get(name, {}), dict) for name in inner), f"{part} is no table of tables")
    run = metadata.get("run", {})
    for name in ("path", "saliency", "method"):
        require(_is_name(run.get(name, "")), f"{name} is no name")
    for name in ("seconds", "peak_memory_bytes", "residual"):
        require(all(map(_is_number, run.get(name, {}).values())), f"{name} are no numbers")
    for name in ("losses", "held_out_losses"):
        require(all(_is_list(values, _is_number) for values in run.get(name, {}).values()), f"{name} are no numbers")
    require(all(_is_number(run.get(name, 0)) for name in ("selected", "total")), "selected, total are no numbers")
    for layer in run.get("layers", []):
        wrong = [name for name, holds in _LAYER_FACTS.items() if name not in layer or not holds(layer[name])]
        require(not wrong, f"the run's record of a layer has no good {', '.join(wrong)}")
    require(isinstance(metadata.get("versions", {}), dict), "versions is no table")

    ranks = {tensors.factors[0].shape[0] for tensors in layers.values() if tensors.factors is not None}
    require(len(ranks) <= 1 and 0 not in ranks, f"layers have the ranks {sorted(ranks)}")
    for name, tensors in layers.items():
        strength = abs(scale) * _largest_delta(tensors)
        require(strength <= torch.finfo(torch.float32).max, f"{name}: a change of {strength:.1g} is none of a weight")


def _checked_concept(concept: dict[str, Any]) -> dict[str, Any]:
    """The record of what is forgotten, with what may be left out. Raises ValueError where it is none."""
    prompts = ("forget_prompts", "surrogate_prompts", "retain_prompts")
    concept = {"surrogate": "", **{kind: [] for kind in prompts}, **concept}
    if not _is_name(concept["forget"]) or not concept["forget"].strip():
        raise ValueError("concept has no words")
    if not _is_name(concept["surrogate"]):
        raise ValueError("surrogate has no words")
    for kind in prompts:
        if not _is_list(concept[kind], lambda prompt: isinstance(prompt, str)):
            raise ValueError(f"{kind} are no text")
    for pair in pairs_in(concept):
        if not _is_name(pair.forget) or not pair.forget.strip() or not _is_name(pair.surrogate):
            raise ValueError("one of the concepts has no words")
    return concept


def _largest_delta(tensors: LayerTensors) -> float:
    """A bound of the delta's entries, without the scale."""
    if tensors.factors is None:
        return _largest(tensors.values)
    lora_a, lora_b = tensors.factors
    return _largest(lora_a) * _largest(lora_b) * lora_a.shape[0]


def _largest(tensor: Tensor) -> float:
    """Largest magnitude, NaN where there is one; makes no copy."""
    return max((abs(end.item()) for end in tensor.aminmax()), default=0.0) if tensor.numel() else 0.0


def read_layer(
    key: str, shape: Any, form: str, tensors: dict[str, Tensor], kernel: list[int] | None = None
) -> LayerTensors:
    """Takes one layer's tensors out of `tensors`, checking sizes before anything is built from them."""
    n, k = shape if isinstance(shape, list) and list(map(type, shape)) == [int, int] else (0, 0)
    if n < 1 or k < 1 or n * k > MOST_WEIGHTS or len(key) > MOST_NAME:
        raise ValueError(f"{key[:100]} has the shape {str(shape)[:100]} or a name of {len(key)} characters")
    if kernel is not None:
        sides = isinstance(kernel, list) and all(type(side) is int and 1 <= side <= k for side in kernel)
        if not sides or len(kernel) not in (0, 2) or k % math.prod(kernel):
            raise ValueError(f"{key[:100]} has the kernel {str(kernel)[:100]}")
        kernel = tuple(kernel)

    mask = _read_mask(key, (n, k), tensors)

    def finite(tensor: Tensor, part: str) -> Tensor:
        if tensor.dtype not in FLOATS or not math.isfinite(_largest(tensor)):
            raise ValueError(f"tensor {key}.{part} holds NaN, infinity or no floating-point numbers")
        return tensor

    if form == "values":
        return LayerTensors(
            mask, values=finite(_take(tensors, f"{key}.values", torch.float32, (mask.count,)), "values"), kernel=kernel
        )
    if form != "factors":
        raise ValueError(f"unknown form {form!r}"[:100])
    lora_a, lora_b = (finite(_take(tensors, f"{key}.{part}"), part) for part in ("a", "b"))
    rank = lora_a.shape[0]
    kernels = tuple(factor.shape[2:] for factor in (lora_a, lora_b))
    fits = len(kernels[0]) in (0, 2) and kernels[1] == (1,) * len(kernels[0])
    if not fits or lora_a.flatten(1).shape != (rank, k) or lora_b.flatten(1).shape != (n, rank):
        raise ValueError(f"the factors of {key} have shapes {tuple(lora_a.shape)} and {tuple(lora_b.shape)}")
    return LayerTensors(mask, factors=(lora_a, lora_b), kernel=tuple(lora_a.shape[2:]))


def _take(
    tensors: dict[str, Tensor], key: str, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None
) -> Tensor:
    tensor = tensors.pop(key, None)
    if tensor is None:
        raise ValueError(f"tensor {key} is missing")
    if (dtype is not None and tensor.dtype != dtype) or (shape is not None and tensor.shape != shape):
        raise ValueError(f"tensor {key} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}")
    return tensor


def _read_mask(key: str, shape: tuple[int, int], tensors: dict[str, Tensor]) -> BitMask:
    """Takes a mask, as `_mask_tensors` makes it, out of `tensors`."""
    n, k = shape
    if f"{key}.mask" in tensors:
        return BitMask(_take(tensors, f"{key}.mask", torch.int32, (n, -(-k // 32))), (n, k))
    counts = _take(tensors, f"{key}.row_counts", torch.int32, (n,))
    columns = _take(tensors, f"{key}.columns", torch.uint16)
    try:
        return BitMask.from_positions(counts, columns, (n, k))
    except ValueError as error:
        raise ValueError(f"tensor {key}.{error}") from error
