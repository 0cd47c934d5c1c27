"""What every kernel file shares: tilings, the cases a compile report builds, and how a kernel is launched."""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on the CPU, block by block: for tests without a GPU. Triton reads the variable when it is imported."""

TRITON_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""Names of the element types the kernels take, as they appear in signatures; fp64 is served by the definitions."""


@dataclass(frozen=True)
class Tiling:
    """Block sizes of a kernel and how many warps and pipeline stages work on them."""

    blocks: Mapping[str, int]
    """Compile-time block sizes by argument name, e.g. {"BT": 128, "BN": 128, "BK": 64}."""
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class CompileCase:
    """One shipped configuration of a kernel, compiled for chips that need not be there (`compile_report`)."""

    name: str
    """Kernel and variant, e.g. "masked_lora_forward, bias"."""
    kernel: Any
    """The @triton.jit function."""
    dtype: str
    """Element type of the activations: "fp32", "tf32", "fp16" or "bf16"."""
    signature: Mapping[str, str]
    """Type of every argument in order, constants as "constexpr": {"x": "*bf16", "T": "i32", "BT": "constexpr"}."""
    constants: Mapping[str, Any]
    """Values of the constexpr arguments, block sizes included."""
    tiling: Tiling
    tensor_cores: bool
    """Whether the code must use matrix instructions (wgmma on sm_90)."""
    divisible_by_16: tuple[str, ...] = field(default=())
    """Integer arguments whose values are multiples of 16 in practice; pointers always are."""


def on_device(tensor: Tensor) -> Any:
    """Context in which kernels are launched on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def as_scale(scale: Tensor) -> tuple[Tensor | float, bool]:
    """The scale as a kernel argument, and whether it is a pointer the kernel loads from.

    A scale on the device is read there, so that it can change without synchronising and inside a captured graph; one
    on the host is passed by value.
    """
    return (scale.to(torch.float32), True) if scale.is_cuda or INTERPRETED else (float(scale), False)
