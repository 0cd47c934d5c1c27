"""Factor gradients from a given weight gradient, under the interpreter, against the definition in float64."""

from types import ModuleType

import pytest
import torch
from interpreter_testing import factor_gradient_errors, random_mask, strided_rows
from torch import Tensor

from fade_kernels import reference
from fade_kernels.triton_kernels import masked_gradient_contraction as module
from fade_kernels.triton_kernels.launch import Tiling

# N, K, R: sizes and ranks beside whole strips, tiles and words; the largest rank.
SHAPES = [(1, 1, 1), (5, 7, 1), (33, 65, 3), (150, 100, 16), (64, 96, 20), (40, 70, 64)]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


def inputs(shape: tuple[int, int, int], kind: str, dtype: torch.dtype, rng: torch.Generator) -> tuple[Tensor, ...]:
    """G, A, B, mask words and scale."""
    n, k, rank = shape
    gradient, lora_a, lora_b = (torch.randn(size, generator=rng).to(dtype) for size in ((n, k), (rank, k), (n, rank)))
    return gradient, lora_a, lora_b, random_mask(n, k, kind, rng), torch.tensor(0.7)


def errors(built: ModuleType, arguments: tuple[Tensor, ...], **options: object) -> tuple[float, float]:
    """Errors of dA and dB, as `factor_gradient_errors` has them."""
    gradient, lora_a, lora_b, words, scale = arguments
    mask = reference.unpack_mask(words, gradient.shape[1])
    g = scale.double() * torch.where(mask, gradient.double(), 0.0)
    expected = (lora_b.double().t() @ g, g @ lora_a.double().t())
    actual = built.contract_masked_gradient(*arguments, **options)
    assert [grad.dtype for grad in actual] == [lora_a.dtype, lora_b.dtype]
    return factor_gradient_errors(actual, expected, gradient, lora_a, lora_b, words, scale)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, rng: torch.Generator) -> None:
    for kind in ("empty", "random", "block", "full", "overwritten"):
        assert max(errors(module, inputs(shape, kind, dtype, rng))) < TOLERANCE[dtype], kind


def test_every_tiling(rng: torch.Generator) -> None:
    for key, tilings in module.TILINGS.items():
        dtype = torch.float16 if key == "16bit" else torch.float32
        arguments = inputs((90, 130, 16), "random", dtype, rng)
        for tiling in tilings:
            precision = "tf32" if key == "tf32" else "ieee"
            assert max(errors(module, arguments, tiling=tiling, input_precision=precision)) < TOLERANCE[dtype], tiling


def test_strided_rows_and_factors_of_another_dtype(rng: torch.Generator) -> None:
    gradient, lora_a, lora_b, words, scale = inputs((50, 70, 4), "random", torch.float32, rng)
    factors = (lora_a.t().contiguous().t(), lora_b.half())
    for given in (strided_rows(gradient), gradient.t().contiguous().t()):
        assert max(errors(module, (given, *factors, words, scale))) < 1e-3
    gradient = gradient.half()
    assert max(errors(module, (gradient, lora_a, lora_b, words, scale))) < 1e-3


def test_nothing_to_contract_and_ranks_beyond(rng: torch.Generator) -> None:
    for n, k in ((0, 40), (40, 0)):
        words = torch.zeros(n, (k + 31) // 32, dtype=torch.int32)
        grad_a, grad_b = module.contract_masked_gradient(
            torch.ones(n, k), torch.ones(4, k), torch.ones(n, 4), words, torch.tensor(1.0)
        )
        assert grad_a.shape == (4, k) and grad_b.shape == (n, 4) and not grad_a.any() and not grad_b.any()
    for dtype, most in ((torch.float16, 128), (torch.float32, 64)):
        assert max(errors(module, inputs((8, 8, most), "full", dtype, rng))) < TOLERANCE[dtype]
        with pytest.raises(ValueError, match=f"ranks from 1 to {most} in .*, not {most + 1}"):
            module.contract_masked_gradient(*inputs((8, 8, most + 1), "full", dtype, rng))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("expand_rows(b_words, BN, BK) != 0", "expand_rows(b_words, BN, BK) >= 0"),
        ("b_db * b_scale", "b_db"),
        ("b_da * b_scale", "b_da"),
        ("for i_k in range(0, K, BC):", "for i_k in range(0, BC, BC):"),
        ("for i_n in range(0, N, BC):", "for i_n in range(0, BC, BC):"),
    ],
    ids=["mask dropped", "scale of dB dropped", "scale of dA dropped", "columns cut off", "rows cut off"],
)
def test_mutants_fail(old: str, new: str, mutate, rng: torch.Generator) -> None:
    tiling = Tiling({"BS": 32, "BC": 32})

    def worst(built: ModuleType) -> float:
        return max(errors(built, inputs((70, 100, 20), "random", torch.float32, rng), tiling=tiling))

    assert worst(module) < 1e-6
    assert worst(mutate(module, old, new)) > 1e-3
