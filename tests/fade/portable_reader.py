"""A reader of the `lora_unet_…` files that ComfyUI, A1111 and kohya's trainers share, from their description alone: it
knows torch and safetensors, and nothing of this package, diffusers or PEFT."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


def merged_state(path: Path, state: dict[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    """A denoiser's state dict with a file's LoRAs and diffs added to its weights, in float32.

    LoRA: W + strength · alpha / rank · up @ down, where a missing alpha is the rank. Diff: W + strength · diff.
    Raises KeyError for a key that belongs to no weight.
    """
    names = {
        f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}": key for key in state if key.endswith(".weight")
    }
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            layer, _, part = key.partition(".")
            parts.setdefault(names[layer], {})[part] = file.get_tensor(key).float()
    merged = dict(state)
    for key, found in parts.items():
        weight = state[key]
        if found.keys() == {"diff"}:
            assert found["diff"].shape == weight.shape
            merged[key] = weight + strength * found["diff"]
            continue
        down, up = found.pop("lora_down.weight"), found.pop("lora_up.weight")
        alpha = found.pop("alpha", torch.tensor(float(len(down))))
        assert not found and down.shape[1:] == weight.shape[1:] and up.shape[0] == weight.shape[0]
        assert up.dim() == down.dim() and alpha.dim() == 0
        product = up.flatten(1) @ down.flatten(1)
        merged[key] = weight + strength * float(alpha) / len(down) * product.reshape(weight.shape)
    return merged
