"""What a failed call of a compiled library is worth: torch's own error, with its class and text.

The libraries speak with torch through its C interface, across which an exception loses both: "aoti_torch_aten_new_empty
API call failed". From torch 2.13 on the text can be asked for; before, what failed is told by its name.
"""

import ctypes
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_ALLOCATES = re.compile(r"empty|contiguous|clone|zeros|full|aten::(to|_to_copy)\b")
"""Calls of torch that the libraries make for memory."""


def cause_of(error: RuntimeError, name: str, arguments: Sequence[Any]) -> RuntimeError | None:
    """The error to raise in place of one that operator `name` has raised; None: the error itself says what is wrong.

    Memory that ran out is a torch.OutOfMemoryError on a device and has the words of torch's allocator on the host, as
    whoever retries with a smaller batch expects. Raises what a CUDA device has to say, where that is the cause.
    """
    text = str(error)
    if text == "std::bad_alloc":
        return RuntimeError(f"fade_kernels::{name}: DefaultCPUAllocator: can't allocate memory for its workspace")
    if isinstance(error, torch.OutOfMemoryError) or "API call failed" not in text:
        return None
    cuda = _cuda_device(arguments)
    heard = _last_words()()
    if not heard and _ALLOCATES.search(text):
        if cuda is not None:
            torch.cuda.synchronize(cuda)  # an earlier kernel's failure is told where memory is asked for next
        heard = "CUDA out of memory." if cuda is not None else "DefaultCPUAllocator: can't allocate memory"
    if not heard:
        return None
    kind = torch.OutOfMemoryError if cuda is not None and "out of memory" in heard else RuntimeError
    return kind(f"fade_kernels::{name}: {heard}")


def _cuda_device(arguments: Sequence[Any]) -> torch.device | None:
    flat = (b for a in arguments for b in (a if isinstance(a, (list, tuple)) else [a]))
    return next((tensor.device for tensor in flat if isinstance(tensor, Tensor) and tensor.is_cuda), None)


@functools.cache
def _last_words() -> Callable[[], str]:
    """What asks torch for the text of the last exception in this thread that its C interface kept back."""
    try:
        ask = ctypes.CDLL(torch._C.__file__).torch_exception_get_what_without_backtrace
    except (AttributeError, OSError):
        return lambda: ""
    ask.restype = ctypes.c_char_p
    return lambda: (ask() or b"").decode(errors="replace").strip()
