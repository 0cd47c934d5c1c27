"""Builds the compiled extensions fade_kernels._C (CPU) and fade_kernels._C_cuda; all else is in pyproject.toml.

The operators are written against LibTorch's stable ABI (target 2.10): one binary serves every torch from 2.10 on. _C is
a Python module (pybind11), _C_cuda a plain library that nvcc compiles and links, with its own CUDA runtime inside.

Environment:
    FADE_REQUIRE_EXT=1      a failed compile is an error instead of an installation without that extension
    FADE_CUDA=0|1           forces the CUDA library off or on (default: on where torch has CUDA and nvcc is found);
                            1 works with a CPU torch, too: what it makes can be checked there, not loaded
    CUDA_HOME               the toolkit to use; else nvcc on the PATH, /usr/local/cuda, or NVIDIA's Python packages
    FADE_SANITIZE           e.g. "address,undefined": the CPU extension with these sanitizers, for `make asan` alone
    TORCH_CUDA_ARCH_LIST    e.g. "8.0;9.0+PTX"; default: the GPUs in this machine, or without one DEFAULT_ARCHITECTURES
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
TORCH_LIBRARY = os.path.join(os.path.dirname(torch.__file__), "lib")
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10: the oldest torch the binary must load into
DEFAULT_ARCHITECTURES = (
    "8.0",
    "8.6",
    "8.9",
    "9.0",
    "10.0",
)  # those nvcc knows; of the last one PTX, too, for newer GPUs


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


# --- the CUDA library ------------------------------------------------------------------------------------------------


class CudaLibrary(Extension):
    """A library that nvcc builds (`build_cuda_library`): its sources are no business of the C++ compiler."""


def find_nvcc() -> str | None:
    """The toolkit's compiler: in CUDA_HOME where that is set, else wherever toolkits are usually found."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return shutil.which("nvcc", path=os.path.join(os.environ[variable], "bin"))
    packages = Path(torch.__file__).parents[1] / "nvidia"
    places = ["/usr/local/cuda/bin", *(str(path) for path in sorted(packages.glob("cu*/bin"), reverse=True))]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))


def wants_cuda() -> bool:
    forced = os.environ.get("FADE_CUDA", "")
    if forced not in ("", "0", "1"):
        sys.exit(f"fade-unlearning: FADE_CUDA must be 0 or 1, not {forced!r}")
    nvcc = find_nvcc()
    if forced == "1" and nvcc is None:
        sys.exit("fade-unlearning: FADE_CUDA=1, but no nvcc was found: install a CUDA toolkit and set CUDA_HOME to it")
    return forced == "1" or (forced == "" and torch.version.cuda is not None and nvcc is not None and os.name != "nt")


def architecture_flags(nvcc: str) -> list[str]:
    """-gencode flags for the architectures asked for, present, or usual, in this order of preference."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if listed and listed != "native":
        names = re.split(r"[;, ]+", listed)
    elif torch.cuda.is_available():
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        names = [f"{major}.{minor}" for major, minor in sorted(capabilities)]
        names[-1] += "+PTX"
    else:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
        names = [name for name in DEFAULT_ARCHITECTURES if f"sm_{name.replace('.', '')}" in known]
        names[-1] += "+PTX"
    flags = []
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST must list compute capabilities like 9.0 or 9.0+PTX, not {name!r}")
        number = "".join(match.group(1, 2, 3))
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match.group(4):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def check_versions(nvcc: str) -> None:
    """Raises where the toolkit is of another major version than torch: the driver may serve only torch's."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is None:
        raise RuntimeError(f"{nvcc} --version tells no release")
    if torch.version.cuda is not None and torch.version.cuda.split(".")[0] != release[1]:
        raise RuntimeError(
            f"torch is built for CUDA {torch.version.cuda}, but {nvcc} is {release[1]}.{release[2]}: set CUDA_HOME to "
            "a toolkit of torch's major version"
        )


def build_cuda_library(files: list[str], target: Path, scratch: Path, depends: list[str], force: bool) -> None:
    """Compiles csrc/cuda with nvcc, in parallel, and links the library, unless it is newer than everything in it."""
    nvcc = find_nvcc()
    check_versions(nvcc)
    compile_flags = [
        *("-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA"),
        *(f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", f"-I{ROOT / 'csrc'}"),
        *(f"-isystem={path}" for path in cpp_extension.include_paths()),
        *architecture_flags(nvcc),
    ]
    home = Path(nvcc).resolve().parents[1]
    libraries = ["-lc10", "-ltorch_cpu", *(["-ltorch_cuda"] if torch.version.cuda is not None else [])]
    # The runtime inside, so that any libcudart may be around; hidden, so that it meets no other.
    link_flags = [
        *("-shared", "-cudart=static", "-Xlinker", "--exclude-libs,ALL", f"-L{TORCH_LIBRARY}", *libraries),
        *(f"-L{path}" for path in (home / "lib64", home / "lib") if path.is_dir()),
    ]
    scratch.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    recipe, stamp = " ".join([nvcc, *compile_flags, *link_flags]), scratch / "recipe"
    newest = max(os.path.getmtime(ROOT / path) for path in depends)
    same_recipe = stamp.is_file() and stamp.read_text() == recipe
    if not force and same_recipe and target.is_file() and target.stat().st_mtime > newest:
        return
    stamp.unlink(missing_ok=True)

    def run(*arguments: str) -> None:
        done = subprocess.run([nvcc, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        sys.stdout.write(done.stdout)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc {arguments[-1]} failed")

    objects = [str(scratch / f"{Path(file).stem}.o") for file in files]
    jobs = min(len(files), int(os.environ.get("MAX_JOBS", os.cpu_count() or 1)))
    with ThreadPoolExecutor(jobs) as pool:
        compiled = [
            pool.submit(run, *compile_flags, "-o", output, "-c", file)
            for file, output in zip(files, objects, strict=True)
        ]
        for job in compiled:
            job.result()
    run(*objects, *link_flags, "-o", str(target))
    stamp.write_text(recipe)


# --- both ------------------------------------------------------------------------------------------------------------


def extensions() -> list[Extension]:
    compile_args = ["/std:c++20", "/O2"] if os.name == "nt" else ["-std=c++20", "-O3", "-Wall", "-fvisibility=hidden"]
    link_args = []
    if sanitizers := os.environ.get("FADE_SANITIZE"):
        link_args = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        compile_args += [*link_args, "-O1", "-g1", "-fno-omit-frame-pointer"]
    cpu = Extension(
        "fade_kernels._C",
        sources=["csrc/module.cpp", *sources("csrc/cpu/*.cpp")],
        depends=[*sources("csrc/common/*.h"), *sources("csrc/cpu/*.h")],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include(), *cpp_extension.include_paths()],
        library_dirs=[TORCH_LIBRARY],
        # Not libtorch_python: the operators need only the C shim of libtorch_cpu, whatever the torch version.
        libraries=["c10", "torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        language="c++",
    )
    cuda_files = sources("csrc/cuda/*.cu")
    depends = ["setup.py", *cuda_files, *sources("csrc/common/*.h"), *sources("csrc/cuda/*.h")]
    return [cpu, CudaLibrary("fade_kernels._C_cuda", sources=[], depends=depends)] if wants_cuda() else [cpu]


class BuildExtension(cpp_extension.BuildExtension):
    """Compiles with ninja and nvcc; what cannot be built is left out with one message unless FADE_REQUIRE_EXT=1."""

    def run(self) -> None:
        try:
            super().run()
        # Whatever the tool chain raises (missing compiler, ninja, compile error) has the same consequence.
        except (Exception, SystemExit) as error:
            self._leave_out(
                error,
                self.extensions,
                "the C++ extension was not built ({}). Installing without it: every operator runs in plain PyTorch, "
                "slower. It needs a C++20 compiler",
            )

    def build_extension(self, extension: Extension) -> None:
        if not isinstance(extension, CudaLibrary):
            super().build_extension(extension)
            return
        files = [path for path in extension.depends if path.endswith(".cu")]
        target = Path(self.get_ext_fullpath(extension.name)).absolute()
        scratch = Path(self.build_temp).absolute() / "cuda"
        try:
            build_cuda_library(files, target, scratch, extension.depends, bool(self.force))
        except (Exception, SystemExit) as error:
            self._leave_out(
                error,
                [extension],
                "the CUDA library was not built ({}). Installing without it: on CUDA devices the operators it serves "
                "run in plain PyTorch, slower. It needs a CUDA toolkit of torch's version and a C++20 compiler",
            )

    def _leave_out(self, error: BaseException, left_out: list[Extension], message: str) -> None:
        if os.environ.get("FADE_REQUIRE_EXT") == "1":
            raise error
        self.extensions = [extension for extension in self.extensions if extension not in left_out]
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        text = message.format(reason)
        print(f"\nfade-unlearning: {text}; FADE_REQUIRE_EXT=1 makes this an error.\n", file=sys.stderr)


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
