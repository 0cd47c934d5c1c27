"""What the interpreter tests share: random masks, errors relative to the reference, rows with gaps between them."""

import torch
from torch import Tensor

from fade_kernels import reference


def random_mask(rows: int, columns: int, kind: str, rng: torch.Generator) -> Tensor:
    """Packed words [rows, ceil(columns/32)]: "empty", "full", "random" (20 %) or "block" (one 16 x 32 corner)."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    if kind == "full":
        mask[:] = True
    elif kind == "random":
        mask = torch.rand(rows, columns, generator=rng) < 0.2
    elif kind == "block":
        mask[-16:, -32:] = True
    elif kind != "empty":
        raise ValueError(f"unknown kind of mask {kind!r}")
    return reference.pack_mask(mask)


def strided_rows(matrix: Tensor) -> Tensor:
    """The same values with gaps of NaN between the rows: a kernel that ignores the row stride reads them."""
    padded = torch.full((matrix.shape[0], matrix.shape[1] + 5), float("nan"), dtype=matrix.dtype)
    padded[:, : matrix.shape[1]] = matrix
    return padded[:, : matrix.shape[1]]


def frobenius_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, or where expected is 0 the sum of errors; NaN counts as infinite."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = actual.double() - expected.double()
    norm = expected.double().norm()
    error = difference.norm() / norm if norm > 0 else difference.abs().sum()
    return float("inf") if torch.isnan(error) else float(error)
