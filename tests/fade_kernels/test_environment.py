"""FADE_KERNELS: each value in a process of its own, because it is read once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_testing import needs_interpreter

from fade_kernels import registration
from fade_kernels._extension import runs_on

ROOT = Path(__file__).resolve().parents[2]

LAYER = """
import sys, torch, fade_kernels
from fade_kernels import BitMask, reference
torch.manual_seed(0)
x, w, a, b = torch.randn(5, 40), torch.randn(9, 40), torch.randn(3, 40), torch.randn(9, 3)
mask = BitMask.pack(torch.rand(9, 40) < 0.4)
y = fade_kernels.masked_lora_linear(x, w, None, a, b, mask, 0.5)
expected = reference.masked_lora_linear(x, w, None, a, b, mask.words, torch.tensor(0.5))
torch.testing.assert_close(y, expected)
triton = "fade_kernels.triton_kernels.launch" in sys.modules
print("extension", fade_kernels.build_info()["extension"], "triton", triton)
print("exactly the definition", torch.equal(y, expected))
"""


def run(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("FADE_KERNELS", "TRITON_INTERPRET")
    }
    return subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        capture_output=True, text=True, cwd=ROOT, env={**environment, **variables},
    )  # fmt: skip


def test_unset_takes_the_compiled_kernels() -> None:
    done = run(LAYER)
    assert "extension True triton False" in done.stdout, done.stderr


def test_reference_takes_the_definitions() -> None:
    done = run(LAYER, FADE_KERNELS="reference")
    assert "extension False triton False" in done.stdout, done.stderr
    assert "exactly the definition True" in done.stdout


def test_cpu_insists_on_the_extension() -> None:
    done = run(LAYER, FADE_KERNELS="cpu")
    assert "extension True triton False" in done.stdout, done.stderr
    hidden = "import sys; sys.modules['fade_kernels._C'] = None\n" + LAYER
    done = run(hidden, FADE_KERNELS="cpu")
    assert done.returncode != 0
    assert "ImportError: FADE_KERNELS=cpu, but the compiled extension fade_kernels._C is not available" in done.stderr


@needs_interpreter
def test_triton_serves_the_cpu_under_the_interpreter() -> None:
    done = run(LAYER, FADE_KERNELS="triton", TRITON_INTERPRET="1")
    assert "extension False triton True" in done.stdout, done.stderr


@pytest.mark.parametrize("value", ["gpu", "Triton"])
def test_an_unknown_value_is_an_error(value: str) -> None:
    done = run(LAYER, FADE_KERNELS=value)
    assert done.returncode != 0
    assert f"FADE_KERNELS must be one of reference, cpu, triton, cuda or unset, not '{value}'" in done.stderr


def test_a_missing_cuda_library_is_told_at_the_first_call_that_needs_it() -> None:
    code = """
import warnings, torch
from fade_kernels import _extension, reference, registration
registered = {}
registration._ops.implement = lambda name, kernel, device: registered.setdefault(name, kernel)
missing = _extension.MISSING_CUDA.format(reason="it was not built")
registration._register_definitions(registration.LIBRARY_OPERATORS, missing)
assert sorted(registered) == sorted(registration.LIBRARY_OPERATORS)
mask = torch.rand(5, 40) < 0.5
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    words = registered["pack_mask"](mask)
    assert torch.equal(registered["unpack_mask"](words, 40), mask)
print(len(caught), caught[0].message)
"""
    done = run(code)
    assert done.stdout.startswith("1 the CUDA library fade_kernels._C_cuda is not available (it was not built)"), done


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 0), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), True), ((12, 0), True)],
)
def test_which_gpus_run_a_library(capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(["8.0", "9.0"], capability) == runs


def test_a_library_built_for_newer_or_other_gpus_runs_on_fewer() -> None:
    assert not runs_on(["9.0"], (8, 0))
    assert not runs_on(["8.9"], (8, 6))
    assert not runs_on(["8.0", "12.0"], (10, 0))


def test_a_gpu_that_the_library_holds_no_code_for_is_served_by_definitions() -> None:
    code = """
import torch
from fade_kernels import registration
torch.cuda.device_count = lambda: 2
torch.cuda.get_device_capability = lambda index: [(8, 6), (7, 0)][index]
registration.build_info = lambda: {"architectures": ["8.0", "9.0"]}
registration._ops.implement = lambda name, kernel, device: print("registered", name, device)
real = registration._register_definitions
registration._register_definitions = lambda names, reason: (print(reason), real(names, reason))
registration._serve_gpus_without_code()
"""
    done = run(code)
    assert "built for compute capability 8.0, 9.0, and GPU 1 has 7.0" in done.stdout, done
    served = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("registered")}
    assert served == {*registration.LIBRARY_OPERATORS, "masked_least_squares"}  # torch's, without the kernel for its rows
    assert done.stdout.count("registered") == done.stdout.count(" CUDA\n")
