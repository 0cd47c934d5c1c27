"""Loads the compiled extensions, once, and knows the facts about them.

Apart from the operators because they exist without them: `fade_kernels._C` (CPU) and `fade_kernels._C_cuda` only
register kernels for operators that `_ops` has defined, and where one is missing the plain-PyTorch definitions serve.
FADE_KERNELS=reference leaves both out; cpu or cuda insists on one and leaves out the other's device.
"""

import ctypes
import importlib
import importlib.util
import warnings
from types import ModuleType

import torch

from fade_kernels._environment import FORCED, INTERPRETED

LEFT_OUT = f"disabled by FADE_KERNELS={FORCED}"
MISSING_CUDA = (
    "the CUDA library fade_kernels._C_cuda is not available ({reason}); on CUDA devices masks, selection and saliency "
    "accumulation run in plain PyTorch, slower. Build it with `pip install --no-build-isolation .` and a CUDA toolkit "
    "of torch's version."
)


def _load() -> tuple[ModuleType | None, str]:
    """The extension module, or None and the reason why there is none."""
    if FORCED == "reference" or INTERPRETED:
        return None, LEFT_OUT
    try:
        return importlib.import_module("fade_kernels._C"), ""
    except ImportError as error:
        reason = str(error)
    message = (
        f"the compiled extension fade_kernels._C is not available ({reason}); every operator runs in plain PyTorch, "
        "slower. Build it with `pip install --no-build-isolation .` and a C++20 compiler."
    )
    if FORCED == "cpu":
        raise ImportError(f"FADE_KERNELS=cpu, but {message}")
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return None, reason


def _load_cuda() -> tuple[ctypes.CDLL | None, str]:
    """The CUDA library, or None and the reason why there is none.

    Loading it asks nothing of the driver. That it is missing is told when a CUDA tensor would need it
    (`registration.py`): most machines with a CUDA build of torch and no toolkit have no GPU either.
    """
    if FORCED not in ("", "cuda"):
        return None, LEFT_OUT
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
    if FORCED == "cuda":
        raise ImportError(f"FADE_KERNELS=cuda, but {MISSING_CUDA.format(reason=reason)}")
    return None, reason


_module, _reason = _load()
_cuda, _cuda_reason = _load_cuda()


def cuda_library_loaded() -> bool:
    """Whether the CUDA library serves its operators."""
    return _cuda is not None


def missing_cuda() -> str:
    """A sentence that says why there is no CUDA library, "" where there is one or the user left it out."""
    return "" if _cuda is not None or FORCED else MISSING_CUDA.format(reason=_cuda_reason)


def runs_on(held: list[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU of a compute capability runs code for one of those in `held`, e.g. ["8.0", "9.0"].

    Code for 8.0 runs on every 8.x; on newer generations what was built for the newest in `held` is compiled again.
    """
    known = [tuple(map(int, name.split("."))) for name in held]
    return any(have[0] == capability[0] and have <= capability for have in known) or capability > max(known)


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
