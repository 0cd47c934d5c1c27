"""The compiled extension: what it says of itself, the same results without it, and clear errors when it is built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_testing import generator, relative_error

import fade_kernels

ROOT = Path(__file__).resolve().parents[2]


COMPILED = (
    "pack_mask",
    "unpack_mask",
    "mask_row_counts",
    "mask_occupancy",
    "gather_masked",
    "scatter_masked_",
    "accumulate_gradient_magnitude_",
    "accumulate_linear_gradient_magnitude_",
    "select_top_k",
    "masked_least_squares",
    "masked_least_squares_rows_",
)


def every_result() -> dict[str, torch.Tensor]:
    """The masks, selections and accumulators of fixed random inputs, through the public functions."""
    random = generator(1)
    weight = torch.randn(33, 5, 3, 3, generator=random)
    scores = [torch.randint(0, 9, (33, 45), generator=random).float(), torch.rand(20, 70, generator=random)]
    mask = fade_kernels.BitMask.pack(torch.rand(33, 45, generator=random) < 0.3)
    results = {"words": mask.words, "counts": mask.row_counts, "occupancy": mask.occupancy((5, 7))}
    results["unpacked"] = mask.unpack()
    results["gathered"] = fade_kernels.gather_masked(weight, mask)
    results["scattered"] = fade_kernels.scatter_masked_(weight.clone(), -results["gathered"], mask)
    for granularity in ("element", "tile", "channel", "module"):
        selection = fade_kernels.select_top_fraction(scores, 0.5, granularity, tile=8)
        results |= {f"{granularity} {i}": m.words for i, m in enumerate(selection.masks)}
        results[f"{granularity} threshold"] = torch.tensor(selection.threshold)
    dy, x = torch.randn(4, 6, 33, generator=random), torch.randn(4, 6, 45, generator=random)
    for mode in ("abs", "signed", "square"):
        linear, summed = torch.zeros(33, 45), torch.zeros(4, 6, 33)
        fade_kernels.accumulate_linear_gradient_magnitude_(linear, dy, x, mode, per_sample=True)
        fade_kernels.accumulate_gradient_magnitude_([summed], [dy.bfloat16()], mode)
        results |= {f"linear {mode}": linear, f"summed {mode}": summed}
    return results


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_extension_is_loaded_and_its_kernels_are_registered() -> None:
    info = fade_kernels.build_info()
    assert info["extension"] is True, info["reason"]
    assert info["torch_target"] == "2.10"
    assert info["cuda"] is (torch.version.cuda is not None), info["cuda_reason"]
    assert bool(info["architectures"]) is info["cuda"]
    assert info["cpu_capability"]
    assert info["compiler"]
    assert Path(info["path"]).exists()
    for name in COMPILED:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fade_kernels::{name}", "CPU")


def test_results_without_the_extension_are_the_same(tmp_path: Path) -> None:
    code = (
        f"import sys, warnings; warnings.simplefilter('error'); sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch, fade_kernels, test_extension\n"
        "info = fade_kernels.build_info()\n"
        "assert info['extension'] is False and 'FADE_KERNELS=reference' in info['reason'], info\n"
        "torch.save(test_extension.every_result(), sys.argv[1])\n"
    )
    done = run("-c", code, str(tmp_path / "results.pt"), FADE_KERNELS="reference")
    assert done.returncode == 0, done.stderr
    definition, compiled = torch.load(tmp_path / "results.pt"), every_result()
    assert definition.keys() == compiled.keys()
    for name, value in compiled.items():
        if name.startswith(("linear", "summed")):
            assert relative_error(definition[name], value) < 1e-6, name
        else:
            assert torch.equal(definition[name], value), name


def test_a_missing_extension_warns_once() -> None:
    code = (
        "import sys, warnings; sys.modules['fade_kernels._C'] = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import torch; caught.clear(); import fade_kernels\n"
        "    mask = fade_kernels.BitMask.full((3, 40)); assert mask.count == 120\n"
        "print(len(caught), caught[0].category.__name__, caught[0].message)\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 RuntimeWarning the compiled extension fade_kernels._C is not available")
    assert "pip install --no-build-isolation ." in done.stdout


# --- setup.py --------------------------------------------------------------------------------------------------------


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_build_without_torch_says_what_to_do() -> None:
    done = run(
        "-c", "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']\n"
        "runpy.run_path('setup.py')"
    )  # fmt: skip
    assert done.returncode != 0
    assert "install torch first" in last_line(done.stderr)
    assert "pip install --no-build-isolation ." in last_line(done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("value", "message"), [("1", "no nvcc was found"), ("yes", "must be 0 or 1")])
def test_forced_cuda_is_an_honest_error(value: str, message: str, tmp_path: Path) -> None:
    done = run("setup.py", "--version", FADE_CUDA=value, CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert message in last_line(done.stderr)
    assert "Traceback" not in done.stderr


def source_tree(root: Path) -> None:
    """A copy of what a build needs."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, root)
    for name in ("csrc", "fade_kernels"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))


def build(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build"],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("required", [False, True])
def test_failed_compile(required: bool, tmp_path: Path) -> None:
    """Leaves a pure-Python package and one message, or is an error where the extension is required."""
    source_tree(tmp_path)
    (tmp_path / "csrc" / "module.cpp").write_text("#error no compiler would take this\n")
    for source in (tmp_path / "csrc" / "cpu").glob("*.cpp"):
        source.unlink()
    done = build(tmp_path, FADE_REQUIRE_EXT="1" if required else "0", FADE_CUDA="0")
    message = "the C++ extension was not built"
    if required:
        assert done.returncode != 0
        assert message not in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(message) == 1
        assert list(tmp_path.glob("build/lib*/fade_kernels/__init__.py"))
    assert not list(tmp_path.glob("build/**/_C*.so"))


# A toolkit of torch's version whose compiler takes nothing.
BROKEN_NVCC = """#!/bin/sh
case "$1" in
  --version) echo "release {version}, V{version}" ;;
  --list-gpu-code) echo sm_80 sm_90 ;;
  *) exit 1 ;;
esac
"""


@pytest.mark.parametrize("required", [False, True])
def test_failed_cuda_build_leaves_the_cpu_library(required: bool, tmp_path: Path) -> None:
    source_tree(tmp_path)
    for source in (tmp_path / "csrc" / "cpu").glob("*.cpp"):  # the module alone compiles quickly
        source.unlink()
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(BROKEN_NVCC.format(version=torch.version.cuda or "13.0"))
    nvcc.chmod(0o755)
    cuda_home = str(tmp_path / "toolkit")
    done = build(tmp_path, FADE_REQUIRE_EXT="1" if required else "0", FADE_CUDA="1", CUDA_HOME=cuda_home)
    message = "the CUDA library was not built (nvcc csrc/cuda/accumulate.cu failed)"
    if required:
        assert done.returncode != 0
        assert message not in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(message) == 1
        assert "FADE_REQUIRE_EXT=1 makes this an error" in done.stderr
        assert list(tmp_path.glob("build/lib*/fade_kernels/_C.*"))
    assert not list(tmp_path.glob("build/**/_C_cuda*"))
