"""What the interpreter tests share: random problems and masks, rows with gaps, errors relative to the reference."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fade_kernels import reference


def random_mask(rows: int, columns: int, kind: str, rng: torch.Generator) -> Tensor:
    """Packed words [rows, ceil(columns/32)]: "empty", "full", "random" (20 %), "block" (one 16 x 32 corner) or
    "overwritten" (random, and every bit beyond the last column set, which must not matter)."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    if kind == "full":
        mask[:] = True
    elif kind in ("random", "overwritten"):
        mask = torch.rand(rows, columns, generator=rng) < 0.2
    elif kind == "block":
        mask[-16:, -32:] = True
    elif kind != "empty":
        raise ValueError(f"unknown kind of mask {kind!r}")
    words = reference.pack_mask(mask)
    if kind == "overwritten":
        words[:, -1] |= ~reference.pack_mask(torch.ones(1, columns, dtype=torch.bool))[0, -1]
    return words


def strided_rows(matrix: Tensor) -> Tensor:
    """The same values with gaps of NaN between the rows: a kernel that ignores the row stride reads them."""
    padded = torch.full((matrix.shape[0], matrix.shape[1] + 5), float("nan"), dtype=matrix.dtype)
    padded[:, : matrix.shape[1]] = matrix
    return padded[:, : matrix.shape[1]]


def frobenius_error(actual: Tensor, expected: Tensor, terms: Sequence[Tensor] = ()) -> float:
    """||actual - expected|| / ||expected||, or where it and its terms are 0 the sum of errors; NaN counts as infinite.

    Where `expected` is a sum, its `terms` are rounded relative to their own sizes, and may nearly cancel: the error is
    then relative to the largest of the sum and its terms, which of more than a few random numbers is the sum. Below the
    normal numbers of its dtype a result is rounded absolutely."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = actual.double() - expected.double()
    norm = max(tensor.double().norm() for tensor in (expected, *terms))
    error = difference.norm() / norm.clamp_min(torch.finfo(actual.dtype).tiny) if norm > 0 else difference.abs().sum()
    return float("inf") if torch.isnan(error) else float(error)


def factor_gradient_errors(
    actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], gradient: Tensor, lora_a: Tensor, lora_b: Tensor,
    words: Tensor, scale: Tensor,
) -> tuple[float, float]:  # fmt: skip
    """`frobenius_error` of dA = B^T G and dB = G A^T, with G = scale * gradient under the mask.

    Their terms nearly cancel where one row or column is all there is; so beside each sum stands the root of its terms'
    squares, which of many random terms is about the sum."""
    g = (scale.double() * gradient.double() * reference.unpack_mask(words, gradient.shape[1])).square()
    spread = ((lora_b.double().square().t() @ g).sqrt(), (g @ lora_a.double().square().t()).sqrt())
    return tuple(frobenius_error(a, e, terms=(s,)) for a, e, s in zip(actual, expected, spread, strict=True))


def linear_problem(
    T: int, N: int, K: int, R: int, kind: str, dtype: torch.dtype, rng: torch.Generator, delta_scale: float = 1.0
) -> dict[str, Any]:
    """Random arguments of the masked-LoRA linear; W about 1/sqrt(K), B A about `delta_scale` times as large."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return {
        "x": normal(T, K).to(dtype),
        "weight": (normal(N, K) / K**0.5).to(dtype),
        "bias": normal(N).to(dtype),
        "lora_a": (normal(R, K) / R**0.5).to(dtype),
        "lora_b": (normal(N, R) * delta_scale / K**0.5).to(dtype),
        "mask_words": random_mask(N, K, kind, rng),
        "scale": torch.tensor(1.5),
    }


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same rounded values in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
