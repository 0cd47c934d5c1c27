"""Makes the compositions of `cuda/` and the definitions serve the operators on CUDA devices, and on the CPU the one
composition that it has.

What cannot run on a machine (an old GPU, a Triton that does not compile, a library that was not built) is served by
the definition, after one warning that says why.
"""

import functools
import subprocess
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fade_kernels import _ops, least_squares_by_size, reference
from fade_kernels._environment import FORCED, INTERPRETED
from fade_kernels._extension import MISSING_CUDA, build_info, cuda_library_loaded, missing_cuda, runs_on
from fade_kernels.cuda import conv2d, least_squares, linear, merging, saliency

OLDEST_CAPABILITY = (8, 0)  # bf16 and TF32 products; Triton 3 compiles for nothing older

KERNELS: dict[str, Callable[..., Any]] = {
    kernel.__name__: kernel
    for kernel in (
        linear.masked_lora_linear,
        linear.masked_lora_linear_input_gradient,
        linear.masked_lora_linear_factor_gradients,
        linear.masked_lora_linear_backward,
        linear.masked_values_linear,
        linear.masked_values_linear_input_gradient,
        linear.masked_values_linear_gradient,
        linear.masked_values_linear_backward,
        conv2d.masked_lora_conv2d,
        conv2d.masked_lora_conv2d_input_gradient,
        conv2d.masked_lora_conv2d_factor_gradients,
        conv2d.masked_values_conv2d,
        conv2d.masked_values_conv2d_input_gradient,
        conv2d.masked_values_conv2d_gradient,
        merging.masked_factor_values,
        merging.effective_weight,
        merging.effective_weight_out,
        merging.effective_weights_out,
        merging.effective_weight_from_values_out,
        merging.effective_weights_from_values_out,
        saliency.accumulate_linear_gradient_magnitude_,
    )
}

_unusable: set[tuple[str, torch.device]] = set()
"""Operators and devices: one GPU may be too old, or hold another's shared memory, where the next one is not."""


_FP64 = torch.float64


def _device(arguments: tuple[Any, ...]) -> torch.device:
    first = arguments[0]
    return (first[0] if isinstance(first, list) else first).device


def _wide(arguments: tuple[Any, ...]) -> bool:
    """fp64 is for definitions: nobody trains in it, and no matrix unit that Triton reaches computes it."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.dtype is _FP64 and argument.dim() > 0:  # scalars are read as what is needed
                return True
        elif argument.__class__ is list and _wide(tuple(argument)):
            return True
    return False


@functools.cache
def _too_old(index: int | None) -> str:
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST_CAPABILITY:
        return ""
    return f"the GPU has compute capability {capability[0]}.{capability[1]}, older than 8.0"


def _cannot_run(error: Exception) -> bool:
    """Whether the tool chain failed, and not the call: what went wrong on the device must be heard."""
    if isinstance(error, (ImportError, FileNotFoundError, subprocess.CalledProcessError)):
        return True
    if isinstance(error, RuntimeError) and "C compiler" in str(error):  # Triton builds its launchers with one
        return True
    return type(error).__module__.startswith("triton")


def _with_definition(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    definition = getattr(reference, name, None) or getattr(_ops, name)

    def serve(*arguments: Any) -> Any:
        device = _device(arguments)
        if (name, device) in _unusable or _wide(arguments):
            return definition(*arguments)
        reason = _too_old(device.index) if device.type == "cuda" else ""
        if not reason:
            try:
                return kernel(*arguments)
            except Exception as error:
                if not _cannot_run(error):
                    raise
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        _unusable.add((name, device))
        warnings.warn(
            f"fade_kernels::{name} runs as its plain-PyTorch definition, slower, because its GPU kernel cannot run "
            f"on {device} ({reason}). FADE_KERNELS=reference silences this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return definition(*arguments)

    return serve


def served_by_definitions(device: torch.device | None = None) -> list[str]:
    """Operators of `cuda/` whose kernel could not run on a device, or on any, so that their definitions serve there."""
    return sorted({name for name, where in _unusable if device in (None, where)})


def register(device: str) -> None:
    """Makes the kernels of `cuda/` serve tensors on a device type."""
    for name, kernel in KERNELS.items():
        _ops.implement(name, _with_definition(name, kernel), device)


def _register_definitions(names: tuple[str, ...], reason: str) -> None:
    """Definitions serve CUDA for what the CUDA library would; the first call says so, once for all."""
    told: list[bool] = []

    def with_warning(definition: Callable[..., Any]) -> Callable[..., Any]:
        def serve(*arguments: Any) -> Any:
            if not told:
                told.append(True)
                warnings.warn(reason, RuntimeWarning, stacklevel=2)
            return definition(*arguments)

        return serve

    for name in names:
        _ops.implement(name, with_warning(getattr(reference, name)), "CUDA")


LIBRARY_OPERATORS = (
    "accumulate_gradient_magnitude_",
    "select_top_k",
    "pack_mask",
    "unpack_mask",
    "mask_row_counts",
    "mask_occupancy",
    "gather_masked",
    "scatter_masked_",
    "add_gathered_lora_",
    "add_gathered_values_",
    "sampled_gradient",
    "sampled_factor_gradients",
    "masked_least_squares_rows_",
)
"""What csrc/cuda serves."""


def _serve_gpus_without_code() -> None:
    """Definitions take the CUDA library's place where it holds no code for a GPU of this machine."""
    held = build_info()["architectures"]
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not runs_on(held, capability):
            shown = ".".join(map(str, capability))
            reason = f"it was built for compute capability {', '.join(held)}, and GPU {index} has {shown}"
            _register_definitions(LIBRARY_OPERATORS, MISSING_CUDA.format(reason=reason))
            _ops.implement("masked_least_squares", least_squares.padded_masked_least_squares, "CUDA")
            return


if FORCED in ("", "triton"):
    register("CUDA")
if missing_cuda():
    _register_definitions(LIBRARY_OPERATORS, missing_cuda())
elif cuda_library_loaded() and not FORCED:
    # Once torch has made contact with the driver, and so before any tensor is on a GPU; not by importing this package.
    torch.cuda._lazy_call(_serve_gpus_without_code)
if FORCED in ("", "cuda", "triton") and not INTERPRETED:
    # In fp64 always, and so not among KERNELS: torch is faster than the definition where the library is not there.
    solver = least_squares.masked_least_squares if cuda_library_loaded() else least_squares.padded_masked_least_squares
    _ops.implement("masked_least_squares", solver, "CUDA")
if FORCED != "reference" and not INTERPRETED:
    _ops.implement(
        "masked_least_squares",
        functools.partial(least_squares_by_size.masked_least_squares, launches=least_squares_by_size.CPU_SIZES),
        "CPU",
    )
if INTERPRETED:
    register("CPU")
