"""Loads the compiled extensions, once, and knows the facts about them.

Apart from the operators because they exist without them: `fade_kernels._C` (CPU) and `fade_kernels._C_cuda` only
register kernels for operators that `_ops.py` has defined, and where one is missing the plain-PyTorch definitions serve.
FADE_DISABLE_EXT=1 leaves both out; FADE_KERNELS=cpu or cuda insists on one and leaves out the other's device.
"""

import ctypes
import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import torch

from fade_kernels._environment import FORCED, INTERPRETED


def _left_out(forced_out: bool) -> str:
    """Why the user's environment leaves an extension out, else ""."""
    if os.environ.get("FADE_DISABLE_EXT") == "1":
        return "disabled by FADE_DISABLE_EXT=1"
    return f"disabled by FADE_KERNELS={FORCED}" if forced_out else ""


def _missing(name: str, reason: str, consequence: str, insisted_on: bool) -> None:
    """Says once that an extension is not there, as an error where FADE_KERNELS insists on it."""
    message = f"{name} is not available ({reason}); {consequence}"
    if insisted_on:
        raise ImportError(f"FADE_KERNELS={FORCED}, but {message}")
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _load() -> tuple[ModuleType | None, str]:
    """The extension module, or None and the reason why there is none."""
    reason = _left_out(FORCED == "reference" or INTERPRETED)
    if reason:
        return None, reason
    try:
        return importlib.import_module("fade_kernels._C"), ""
    except ImportError as error:
        reason = str(error)
    _missing(
        "the compiled extension fade_kernels._C",
        reason,
        "every operator runs in plain PyTorch, slower. Build it with `pip install --no-build-isolation .` and a C++20 "
        "compiler.",
        insisted_on=FORCED == "cpu",
    )
    return None, reason


def _load_cuda() -> tuple[ctypes.CDLL | None, str]:
    """The CUDA library, or None and the reason why there is none. Loading it asks nothing of the driver."""
    reason = _left_out(FORCED not in ("", "cuda"))
    if reason:
        return None, reason
    if torch.version.cuda is None:
        return None, "this torch is built without CUDA"
    found = importlib.util.find_spec("fade_kernels._C_cuda")
    if found is None or found.origin is None:
        reason = "it was not built"
    else:
        try:
            torch.ops.load_library(found.origin)
            return ctypes.CDLL(found.origin), ""
        except (OSError, RuntimeError) as error:
            reason = str(error)
    _missing(
        "the CUDA library fade_kernels._C_cuda",
        reason,
        "on CUDA devices masks, selection and saliency accumulation run in plain PyTorch, slower. Build it with "
        "`pip install --no-build-isolation .` and a CUDA toolkit of torch's version.",
        insisted_on=FORCED == "cuda",
    )
    return None, reason


_module, _reason = _load()
_cuda, _cuda_reason = _load_cuda()


def _cuda_facts() -> dict[str, object]:
    if _cuda is None:
        return {"cuda": False, "cuda_reason": _cuda_reason, "cuda_runtime": None, "architectures": []}
    _cuda.fade_cuda_architectures.restype = ctypes.c_char_p
    version = int(_cuda.fade_cuda_version())
    return {
        "cuda": True,
        "cuda_reason": "",
        "cuda_runtime": f"{version // 1000}.{version % 1000 // 10}",
        "architectures": _cuda.fade_cuda_architectures().decode().split(", "),
    }


def build_info() -> dict[str, object]:
    """What was built and what is in use.

    Returns:
        A dict with the keys `extension` (bool: compiled CPU kernels are in use), `reason` (why not, else ""), `path`,
        `compiler`, `torch_target` (oldest torch the binary serves), `cpu_capability` (instruction set chosen at run
        time), `threads`, `torch` (version in use), `cuda` (bool: compiled CUDA kernels are in use), `cuda_reason` (why
        not, else ""), `cuda_runtime` (version inside the library) and `architectures` (compute capabilities it holds
        code for, e.g. "9.0").
    """
    info: dict[str, object] = {
        "extension": _module is not None,
        "reason": _reason,
        "path": getattr(_module, "__file__", None),
        "compiler": None,
        "torch_target": None,
        "cpu_capability": None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **_cuda_facts(),
    }
    if _module is not None:
        info.update(_module.build_info())
    return info
