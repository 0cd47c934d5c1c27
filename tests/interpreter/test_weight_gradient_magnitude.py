"""Saliency of a linear layer under the interpreter, against the definition in float64."""

from types import ModuleType

import pytest
import torch
from interpreter_testing import frobenius_error, strided_rows
from torch import Tensor

from fade_kernels import reference
from fade_kernels.triton_kernels import weight_gradient_magnitude as module
from fade_kernels.triton_kernels.launch import Tiling

# Leading dimensions, N, K: one row; rows and columns beside whole tiles; several tiles both ways.
SHAPES = [((1, 1), 5, 7), ((3, 25), 33, 65), ((2, 5, 13), 130, 150)]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
SMALL = Tiling({"BT": 16, "BN": 32, "BK": 32})
"""Many tiles and splits of a small layer."""


def inputs(
    leading: tuple[int, ...], n: int, k: int, dtype: torch.dtype, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """S, already holding something, dY and X."""
    dy, x = (torch.randn(*leading, size, generator=rng).to(dtype) for size in (n, k))
    return torch.rand(n, k, generator=rng), dy, x


def error(
    built: ModuleType, tensors: tuple[Tensor, Tensor, Tensor], magnitude: str, per_sample: bool, **options: object
) -> float:
    """Of what was added: both kernels accumulate in fp32, products of fp16 are exact there."""
    saliency, dy, x = tensors
    expected, actual = saliency.double(), saliency.clone()
    reference.accumulate_linear_gradient_magnitude_(expected, dy.double(), x.double(), magnitude, per_sample)
    built.accumulate_linear_gradient_magnitude_(actual, dy, x, magnitude, per_sample, **options)
    return frobenius_error(actual - saliency, expected - saliency.double())


@pytest.mark.parametrize("magnitude", ["abs", "square", "signed"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype, magnitude: str, rng) -> None:
    tensors = inputs(*shape, dtype, rng)
    for per_sample in (False, True):
        assert error(module, tensors, magnitude, per_sample) < 1e-6


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("magnitude", ["abs", "square", "signed"])
def test_splits(magnitude: str, per_sample: bool, rng: torch.Generator) -> None:
    """The magnitude is of the whole sum, however many programs share it."""
    tensors = inputs((5, 23), 40, 70, torch.float32, rng)
    for splits in (1, 2, 3, 5, 1000):
        assert error(module, tensors, magnitude, per_sample, tiling=SMALL, splits=splits) < 1e-6, splits


def test_every_tiling(rng: torch.Generator) -> None:
    for key, tilings in module.TILINGS.items():
        tensors = inputs((2, 50), 70, 130, torch.float16 if key == "16bit" else torch.float32, rng)
        precision = "tf32" if key == "tf32" else "ieee"
        for tiling in tilings:
            for per_sample in (False, True):
                for splits in (None, 2):
                    options = {"tiling": tiling, "splits": splits, "input_precision": precision}
                    assert error(module, tensors, "abs", per_sample, **options) < 1e-6, (tiling, per_sample)


def test_strided_rows_and_transposed_inputs(rng: torch.Generator) -> None:
    saliency, dy, x = inputs((40,), 50, 70, torch.float32, rng)
    assert error(module, (saliency, strided_rows(dy), strided_rows(x)), "abs", False) < 1e-6
    assert error(module, (saliency, dy.t().contiguous().t(), x.t().contiguous().t()), "abs", False) < 1e-6
    assert error(module, (saliency, dy.expand(3, 40, 50), x.expand(3, 40, 70)), "abs", True) < 1e-6


def test_no_rows_add_nothing() -> None:
    for leading, n, k in (((0,), 3, 4), ((2, 0), 3, 4), ((0, 2), 3, 4), ((2, 2), 0, 4), ((2, 2), 3, 0)):
        saliency = torch.ones(n, k)
        for per_sample in (False, len(leading) > 1):
            module.accumulate_linear_gradient_magnitude_(
                saliency, torch.ones(*leading, n), torch.ones(*leading, k), "abs", per_sample
            )
        assert torch.equal(saliency, torch.ones(n, k))


def test_an_accumulator_that_cannot_be_added_to_is_refused() -> None:
    dy, x = torch.ones(2, 3), torch.ones(2, 4)
    for saliency in (torch.zeros(3, 4, dtype=torch.float16), torch.zeros(4, 3).t()):
        with pytest.raises(ValueError, match="saliency"):
            module.accumulate_linear_gradient_magnitude_(saliency, dy, x, "abs", False)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("        b_g = tl.abs(b_g)\n", "        b_g = b_g\n"),
        ("tl.minimum(first + ROWS, T)", "T"),
        ("< tl.num_programs(1) - 1:", "< tl.num_programs(1) - 2:"),
        ("    if not PER_SAMPLE:\n        b_s = magnitude_of(b_s, MAGNITUDE)\n", ""),
        ("dy, x, i_sample, i_sample + SAMPLE,", "dy, x, first, i_sample + SAMPLE,"),
        ("        tl.store(p_partial + i_split.to(tl.int64) * (BN * BK), b_s)", "        b_s = magnitude_of(b_s, 0)\n"
         "        tl.store(p_partial + i_split.to(tl.int64) * (BN * BK), b_s)"),
    ],
    ids=["signed", "rows counted twice", "two reduce", "no magnitude", "samples run on", "magnitude of parts"],
)  # fmt: skip
def test_mutants_fail(old: str, new: str, mutate, rng: torch.Generator) -> None:
    tensors = inputs((6, 20), 40, 70, torch.float32, rng)

    def worst(built: ModuleType) -> float:
        return max(error(built, tensors, "abs", per_sample, tiling=SMALL, splits=3) for per_sample in (False, True))

    assert worst(module) < 1e-6
    assert worst(mutate(module, old, new)) > 1e-2
