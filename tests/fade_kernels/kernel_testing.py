"""What the kernel tests share: seeded random numbers and opcheck with the message of what failed."""

from typing import Any

import torch

import fade_kernels  # noqa: F401  defines the operators

OPS = torch.ops.fade_kernels


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
