"""A pipeline's parts as they really are: wrapped by torch.compile or data parallelism, moved or cast by hooks."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from diffusers.models.modeling_utils import get_parameter_device
from peft import PeftModel
from torch import Tensor, nn


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside a wrapper: torch.compile's has `_orig_mod` as its one child, DDP's and averaging's `module`;
    PEFT's model has the one that its adapters were put into."""
    while True:
        if isinstance(module, PeftModel):
            module = module.get_base_model()
        elif [name for name, _ in module.named_children()] in (["_orig_mod"], ["module"]):
            (module,) = module.children()
        else:
            return module


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    return chain(module.parameters(), module.buffers())


def execution_device(module: nn.Module) -> torch.device:
    """The device a module computes on: that of its weights, or the one to which offloading brings them."""
    for part in module.modules():
        for hook in _hooks(part):
            if (device := getattr(hook, "execution_device", None)) is not None:
                return torch.device(device)
    return get_parameter_device(unwrapped(module))  # knows diffusers' group offloading


def is_managed(module: nn.Module) -> bool:
    """Whether hooks (accelerate's and diffusers' offloading, layerwise casting) or quantisation decide where and in
    which dtype the module's weights are, so that nobody else may move or cast them."""
    return getattr(module, "hf_quantizer", None) is not None or any(
        hasattr(part, "_hf_hook") or (hasattr(part, "_diffusers_hook") and part._diffusers_hook.hooks)
        for part in module.modules()
    )


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))
