"""Loads the compiled extension, once, and knows the facts about it.

Apart from the operators because they exist without it: `fade_kernels._C` only registers CPU kernels for operators that
`_ops.py` has defined, and where it is missing the plain-PyTorch definitions serve. FADE_DISABLE_EXT=1 leaves it out.
"""

import importlib
import os
import warnings
from types import ModuleType

import torch


def _load() -> tuple[ModuleType | None, str]:
    """The extension module, or None and the reason why there is none."""
    if os.environ.get("FADE_DISABLE_EXT") == "1":
        return None, "disabled by FADE_DISABLE_EXT=1"
    try:
        return importlib.import_module("fade_kernels._C"), ""
    except ImportError as error:
        reason = str(error)
    warnings.warn(
        f"the compiled extension fade_kernels._C is not available ({reason}); every operator runs in plain PyTorch, "
        "slower. Build it with `pip install --no-build-isolation .` and a C++20 compiler.",
        RuntimeWarning,
        stacklevel=2,
    )
    return None, reason


_module, _reason = _load()


def build_info() -> dict[str, object]:
    """What was built and what is in use.

    Returns:
        A dict with the keys `extension` (bool: compiled CPU kernels are in use), `reason` (why not, else ""), `path`,
        `compiler`, `torch_target` (oldest torch the binary serves), `cpu_capability` (instruction set chosen at run
        time), `threads`, `torch` (version in use), `cuda` (bool: compiled CUDA kernels are in use) and
        `architectures` (CUDA architectures compiled for).
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
        "cuda": False,
        "architectures": [],
    }
    if _module is not None:
        info.update(_module.build_info())
    return info
