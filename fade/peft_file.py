"""Masked adapters as diffusers' and PEFT's own calls write them: `save_lora_adapter`, `save_lora_weights`,
`PeftModel.save_pretrained`. What such a file holds is decided in `fade.tuner`; it is checked as adapter files are.
"""

import json
from pathlib import Path

import safetensors.torch
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError
from torch import Tensor

from fade.adapter_file import (
    FORMAT,
    AdapterFile,
    check_metadata,
    read_adapter_file,
    read_header,
    read_layer,
)
from fade.errors import AdapterFileError
from fade.tuner import HEADER, bare_name

FILE_NAMES = ("adapter.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""What a folder's adapter is called: by `fade.unlearn`, by PEFT, by diffusers."""
_COMPONENTS = ("unet.", "transformer.")
_PREFIX = "fade.unet."
"""Of keys while a file is read; which component it was is not kept in one that PEFT wrote."""
_PARTS = {"lora_mask.words": "mask", "lora_A.weight": "a", "lora_B.weight": "b"}
_DAMAGES = (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError)


def read_any_file(path: str | Path) -> tuple[Path, AdapterFile]:
    """Reads an adapter file, or one that diffusers or PEFT wrote, or the one in a folder; returns which file it was.

    Raises AdapterFileError saying what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found:
            raise AdapterFileError(f"there is no adapter file in {path}: none of {', '.join(FILE_NAMES)}")
        path = found[0]
    return path, read_peft_file(path) if _by_peft(path) else read_adapter_file(path)


def _by_peft(path: Path) -> bool:
    try:
        table, _ = read_header(path)
        return table.pop("__metadata__", {}).get("format") != FORMAT and any("lora_" in key for key in table)
    except (OSError, *_DAMAGES):
        return False


def read_peft_file(path: str | Path) -> AdapterFile:
    """Reads and checks the file of a masked adapter that diffusers or PEFT wrote. Raises AdapterFileError."""
    path = Path(path)
    try:
        data = path.read_bytes()  # not mapped: a file cut short meanwhile would end the process
        size = len(data)
        state = {_without_component(key): tensor for key, tensor in safetensors.torch.load(data).items()}
        state = convert_unet_state_dict_to_peft(state)  # `lora.down` and `lora.up`, if it went through diffusers' names
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{path} is not a readable safetensors file (truncated or damaged?): {error}") from error
    if HEADER not in state:
        raise AdapterFileError(
            f"{path} is a LoRA without a mask, or was not written by this release: load_lora_weights loads LoRAs, and "
            "adapter.save writes adapters"
        )
    try:
        header = json.loads(state.pop(HEADER).to(torch.uint8).numpy().tobytes())
        rank, shapes, values = header["r"], header["shapes"], set(header["values"])
        if type(rank) is not int or rank < 1:
            raise ValueError(f"rank {rank!r}"[:60])
        form = "values" if values == shapes.keys() else "factors"
        metadata = {**header["metadata"], "scale": header["lora_alpha"] / rank, "form": form}
        tensors = _as_in_adapter_files(state, values)
        layers = {
            name: read_layer(_PREFIX + name, shape, "values" if name in values else "factors", tensors)
            for name, shape in shapes.items()
        }
        if not {"fingerprint", "concept"} <= metadata.keys():
            raise ValueError("it does not say what it forgets and which weights it was trained on")
        check_metadata(metadata, layers)
    except AdapterFileError:
        raise
    except (RecursionError, *_DAMAGES) as error:
        raise AdapterFileError(f"{path} is damaged or was not written by FADE: {error}") from error
    if tensors:
        raise AdapterFileError(f"{path} holds tensors that belong to no layer: {', '.join(sorted(tensors)[:3])[:300]}")
    return AdapterFile(metadata, layers, size)


def _without_component(key: str) -> str:
    for component in _COMPONENTS:
        key = key.removeprefix(component)
    return key


def _as_in_adapter_files(state: dict[str, Tensor], values: set[str]) -> dict[str, Tensor]:
    """The tensors under the keys of adapter files; `values` are the layers in that form."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        layer, part, own = key.rsplit(".", 2)
        if part != "lora_mask":
            if tensor.dim() < 3 or len(tensor) != 1:
                raise ValueError(f"tensor {key} has the shape {list(tensor.shape)}"[:200])
            tensor = tensor[0]
        tensors[f"{_PREFIX}{bare_name(layer)}.{_PARTS.get(f'{part}.{own}', f'{part}.{own}')}"] = tensor
    for name in values:
        # As a layer holds them (`MaskedLoraLayer.set_values`): lora_A [1, nnz] beside a lora_B of one 1.
        row, one = tensors.pop(f"{_PREFIX}{name}.a"), tensors.pop(f"{_PREFIX}{name}.b")
        if one.numel() != 1 or one.item() != 1 or row.numel() != row.shape[1]:
            raise ValueError(f"the values of {name} have the shapes {list(row.shape)} and {list(one.shape)}"[:200])
        tensors[f"{_PREFIX}{name}.values"] = row.flatten().float()
    return tensors
