"""Builds the compiled extension fade_kernels._C; everything else about the package is in pyproject.toml.

The operators are written against LibTorch's stable ABI (target 2.10), so one binary serves every torch from 2.10 on; the
Python module itself is pybind11. Environment: FADE_REQUIRE_EXT=1 makes a failed compile an error instead of a pure-Python
installation, FADE_CUDA=0|1 forces the CUDA library off or on (default: on when torch has CUDA and a toolkit is found).
"""

import os
import platform
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
    """The .cu files to build: none without a CUDA torch and a toolkit; FADE_CUDA=0|1 forces the answer."""
    forced = os.environ.get("FADE_CUDA")
    if forced not in (None, "", "0", "1"):
        sys.exit(f"fade-unlearning: FADE_CUDA must be 0 or 1, not {forced!r}")
    files = sources("csrc/cuda/*.cu")
    if forced == "1" and not files:
        sys.exit("fade-unlearning: FADE_CUDA=1, but there are no CUDA kernels in this version yet: unset FADE_CUDA")
    possible = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    return files if forced == "1" or (forced != "0" and possible) else []


def extensions() -> list[Extension]:
    compile_args = ["-std=c++20", "-O3", "-Wall", "-fvisibility=hidden"] if os.name != "nt" else ["/std:c++20", "/O2"]
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


cuda_files = cuda_sources()
assert not cuda_files, "csrc/cuda exists but no CUDA library is declared in setup.py"
# Python and NumPy headers differ by platform only in these two: nothing is compiled for the build machine's own CPU.
os.environ.setdefault("MAX_JOBS", str(min(os.cpu_count() or 1, 8)))
if platform.system() == "Darwin":
    os.environ.setdefault("MACOSX_DEPLOYMENT_TARGET", "11.0")

setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
