"""Builds the compiled extension fade_kernels._C; everything else about the package is in pyproject.toml.

The operators are written against LibTorch's stable ABI (target 2.10): one binary serves every torch from 2.10 on. The
Python module itself is pybind11. Environment: FADE_REQUIRE_EXT=1 makes a failed compile an error instead of a
pure-Python installation; FADE_CUDA=0|1 forces the CUDA library off or on (default: on where torch has CUDA and a
toolkit is found).
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"fade-unlearning: cannot build without '{error.name}': install torch first (and setuptools, wheel, ninja, "
        "pybind11), then `pip install --no-build-isolation .`"
    )

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10: the oldest torch the binary must load into


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def cuda_sources() -> list[str]:
    """Sources of the CUDA library, built apart from _C: all there are where torch has CUDA and a toolkit is found."""
    forced = os.environ.get("FADE_CUDA", "")
    if forced not in ("", "0", "1"):
        sys.exit(f"fade-unlearning: FADE_CUDA must be 0 or 1, not {forced!r}")
    files = sources("csrc/cuda/*.cu")
    if forced == "1" and not files:
        sys.exit("fade-unlearning: FADE_CUDA=1, but there are no CUDA kernels in this version yet: unset FADE_CUDA")
    found = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    return files if forced == "1" or (forced == "" and found) else []


def extensions() -> list[Extension]:
    compile_args = ["/std:c++20", "/O2"] if os.name == "nt" else ["-std=c++20", "-O3", "-Wall", "-fvisibility=hidden"]
    torch_library = os.path.join(os.path.dirname(torch.__file__), "lib")
    cpu = Extension(
        "fade_kernels._C",
        sources=["csrc/module.cpp", *sources("csrc/cpu/*.cpp")],
        depends=sources("csrc/**/*.h"),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include(), *cpp_extension.include_paths()],
        library_dirs=[torch_library],
        # Not libtorch_python: the operators need only the C shim of libtorch_cpu, whatever the torch version.
        libraries=["c10", "torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=compile_args,
        language="c++",
    )
    if cuda_sources():
        sys.exit("fade-unlearning: csrc/cuda has sources, but this setup.py declares no _C_cuda library for them")
    return [cpu]


class BuildExtension(cpp_extension.BuildExtension):
    """Compiles with ninja where it exists; a failed compile leaves a pure-Python package unless FADE_REQUIRE_EXT=1."""

    def run(self) -> None:
        try:
            super().run()
        # Whatever the tool chain raises (missing compiler, ninja, compile error) has the same consequence.
        except (Exception, SystemExit) as error:
            if os.environ.get("FADE_REQUIRE_EXT") == "1":
                raise
            self.extensions = []
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            print(
                f"\nfade-unlearning: the C++ extension was not built ({reason}). Installing without it: every operator "
                "runs in plain PyTorch, slower. It needs a C++20 compiler; FADE_REQUIRE_EXT=1 makes this an error.\n",
                file=sys.stderr,
            )


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
