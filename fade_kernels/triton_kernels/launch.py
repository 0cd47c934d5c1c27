"""What every kernel file shares: tilings, the cases a compile report builds, and how a kernel is launched."""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

Made = TypeVar("Made")

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
class Allowance:
    """Something in a kernel's loops of matrix products that waits for memory or for a product, or registers that do not
    suffice, and why that may be."""

    kind: str
    """"load": a load that stays where it is instead of being copied to shared memory steps ahead; "wait": a product
    whose result is waited for at once; "spill": bytes of a thread that are not in registers, on sm_90."""
    count: int
    """At most so many."""
    reason: str


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
    allowed: tuple[Allowance, ...] = field(default=())
    """What its loops of matrix products may hold although it is not pipelined; everything else is a violation."""


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up. Triton's `cdiv` takes 2 us on the host."""
    return -(-a // b)


def power_of_2_from(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def on_device(tensor: Tensor) -> Any:
    """Context in which kernels are launched on the tensor's device."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def as_scale(scale: Tensor) -> Tensor | float:
    """The scale as a kernel argument: a tensor that the kernel loads from, or a number.

    A scale on the device is read there, so that it can change without synchronising and inside a captured graph; one
    on the host is passed by value.
    """
    if not (scale.is_cuda or INTERPRETED):
        return float(scale)
    return scale if scale.dtype == torch.float32 else scale.to(torch.float32)


class Launch:
    """A kernel whose grid, integers and constants are settled: called with its pointers alone, often.

    Triton binds, specialises and hashes every argument of every launch, about 40 us for 30 of them; here the code is
    looked up by the only things that may still differ: the device, and which pointers are multiples of 16.
    """

    __slots__ = ("_compiled", "_grid", "_kernel", "_options", "_places", "_settled", "_sizes")

    def __init__(
        self, kernel: Any, grid: Sequence[int], sizes: Sequence[int], constants: Mapping[str, Any], tiling: Tiling
    ) -> None:
        """For a kernel whose arguments are, in this order: pointers (and a scale), `sizes`, constants.

        Args:
            kernel: the @triton.jit function.
            grid: one to three numbers of programs.
            sizes: its integers in order.
            constants: its constexpr arguments by name, the tiling's blocks left out.
            tiling: blocks, warps and stages.
        """
        constants = {**tiling.blocks, **constants}
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        self._sizes = tuple(sizes)
        self._options = {**constants, "num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
        self._settled = (*sizes, *(constants[name] for name in kernel.arg_names[-len(constants) :]))
        self._compiled: dict[Hashable, Any] = {}
        self._places: list[int] | None = None  # of the arguments that are pointers

    def __call__(self, *pointers: Tensor | float) -> None:
        """Launches on the current stream.

        Args:
            pointers: tensors of the dtypes of the first call, and numbers that are not specialised (scale, seed).
        """
        if INTERPRETED:
            self._kernel[self._grid](*pointers, *self._sizes, **self._options)
            return
        active = driver.active
        device = active.get_current_device()
        if self._places is None:
            self._places = [i for i, pointer in enumerate(pointers) if isinstance(pointer, Tensor)]
        misaligned = tuple([i for i in self._places if pointers[i].data_ptr() & 15])
        compiled = self._compiled.get((device, misaligned))
        if compiled is None:
            compiled = self._kernel[self._grid](*pointers, *self._sizes, **self._options)
            self._compiled[device, misaligned] = compiled
            return
        stream, arguments = active.get_current_stream(device), (*pointers, *self._settled)
        enter, leave, metadata = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, None
        if _hooked(enter) or _hooked(leave):  # a profiler's
            metadata = compiled.launch_metadata(self._grid, stream, *arguments)
        else:
            enter = leave = None
        compiled.run(
            *self._grid, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *arguments
        )


def _hooked(hook: Any) -> bool:
    """Whether anything is called there; from Triton 3.5 on the hook is a chain, which may be empty."""
    return hook is not None and bool(getattr(hook, "calls", True))


MOST_KEPT = 4096
"""Launches that a kernel keeps: a model has a few hundred layers and shapes; with a new shape in every call, as with
texts of any length, the oldest go."""


def kept(launches: dict[Hashable, Made], key: Hashable, make: Callable[[], Made]) -> Made:
    """launches[key], made where it is missing."""
    launch = launches.get(key)
    if launch is None:
        launch = make()
        if len(launches) >= MOST_KEPT:
            launches.pop(next(iter(launches)), None)
        launches[key] = launch
    return launch
