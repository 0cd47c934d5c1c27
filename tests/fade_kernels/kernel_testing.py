"""What the kernel tests share: seeded random numbers, opcheck that says what failed, whether Triton interprets."""

import importlib.util
from importlib.metadata import version
from typing import Any

import pytest
import torch
from packaging.version import Version

import fade_kernels  # noqa: F401  defines the operators

OPS = torch.ops.fade_kernels


def interpreter_fault() -> str:
    """Why Triton's interpreter cannot run here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    # https://github.com/triton-lang/triton/issues/9171
    if Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
        return "the interpreter of Triton 3.6 and older needs NumPy below 2.4: pip install 'numpy<2.4'"
    return ""


needs_interpreter = pytest.mark.skipif(bool(interpreter_fault()), reason=interpreter_fault())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def opcheck(packet: Any, args: tuple[Any, ...], **kwargs: Any) -> None:
    """torch.library's four tests: schema and aliasing, autograd registration, fake tensor, AOT with dynamic sizes."""
    results = torch.library.opcheck(packet.default, args, **kwargs)
    assert set(results.values()) == {"SUCCESS"}, results


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over the largest expected magnitude; 0 for equal empty tensors."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-300))
