"""Factor gradients of masked LoRA under the interpreter, against the definition in float64."""

from types import ModuleType

import pytest
import torch
from interpreter_testing import factor_gradient_errors, random_mask, strided_rows
from torch import Tensor

from fade_kernels import reference
from fade_kernels.triton_kernels import masked_lora_factor_gradients as module
from fade_kernels.triton_kernels.launch import Tiling
from fade_kernels.triton_kernels.split import split_rows

# T, N, K, R: one row; rows, columns and ranks beside whole tiles and words; several tiles both ways; large ranks.
SHAPES = [(1, 5, 7, 1), (77, 33, 65, 3), (130, 150, 100, 16), (40, 64, 96, 20), (33, 40, 70, 128)]
MASKS = ["empty", "random", "block", "full"]
# fp32: rounding of fp32 sums. fp16: the contract; what the interpreter cannot show, TF32, adds 2^-11 per product.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
SMALL = Tiling({"BT": 16, "BN": 32, "BK": 32, "BR": 16})
"""Many tiles and splits of a small layer."""


def inputs(
    shape: tuple[int, int, int, int],
    kind: str,
    dtype: torch.dtype,
    rng: torch.Generator,
    factors: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """dY, X, A, B, mask words and scale."""
    rows, n, k, rank = shape
    sizes = ((rows, n), (rows, k), (rank, k), (n, rank))
    dy, x, lora_a, lora_b = (torch.randn(size, generator=rng) for size in sizes)
    lora_a, lora_b = lora_a.to(factors or dtype), lora_b.to(factors or dtype)
    return dy.to(dtype), x.to(dtype), lora_a, lora_b, random_mask(n, k, kind, rng), torch.tensor(0.7)


def errors(built: ModuleType, arguments: tuple[Tensor, ...], **options: object) -> tuple[float, float]:
    """Errors of dA and dB, as `factor_gradient_errors` has them."""
    dy, x, lora_a, lora_b, words, scale = arguments
    expected = reference.masked_lora_linear_factor_gradients(
        dy.double(), x.double(), lora_a.double(), lora_b.double(), words, scale.double()
    )
    actual = built.masked_lora_factor_gradients(*arguments, **options)
    assert [grad.dtype for grad in actual] == [lora_a.dtype, lora_b.dtype]
    return factor_gradient_errors(actual, expected, dy.double().t() @ x.double(), lora_a, lora_b, words, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int, int], dtype: torch.dtype, rng: torch.Generator) -> None:
    for kind in ("random", "block", "overwritten"):
        arguments = inputs(shape, kind, dtype, rng)
        assert max(errors(module, arguments)) < TOLERANCE[dtype], kind


@pytest.mark.parametrize("atomics", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_many_tiles_and_splits(kind: str, atomics: bool, rng: torch.Generator) -> None:
    arguments = inputs((70, 70, 100, 20), kind, torch.float32, rng)
    for splits in (1, 3, 1000):
        assert max(errors(module, arguments, tiling=SMALL, splits=splits, atomics=atomics)) < 1e-6, splits


def test_every_tiling(rng: torch.Generator) -> None:
    for key, tilings in module.TILINGS.items():
        dtype = torch.float16 if key == "16bit" else torch.float32
        arguments = inputs((90, 70, 130, 16), "random", dtype, rng)
        for tiling in tilings:
            options = {"tiling": tiling, "splits": 2, "input_precision": "tf32" if key == "tf32" else "ieee"}
            assert max(errors(module, arguments, **options)) < TOLERANCE[dtype], tiling


def test_strided_rows_and_transposed_inputs(rng: torch.Generator) -> None:
    dy, x, lora_a, lora_b, words, scale = inputs((40, 50, 70, 4), "random", torch.float32, rng)
    factors = (lora_a.t().contiguous().t(), lora_b.t().contiguous().t())
    assert max(errors(module, (strided_rows(dy), strided_rows(x), *factors, words, scale))) < 1e-6
    columns_first = (dy.t().contiguous().t(), x.t().contiguous().t())
    assert max(errors(module, (*columns_first, lora_a, lora_b, words, scale))) < 1e-6


def test_factors_of_another_dtype(rng: torch.Generator) -> None:
    arguments = inputs((60, 40, 64, 8), "random", torch.float16, rng, factors=torch.float32)
    assert max(errors(module, arguments)) < 1e-6


def test_fp16_gradients_beyond_its_range(rng: torch.Generator) -> None:
    """G of 1e6 and of 1e-9, neither an fp16 number, contracted with factors that bring it back."""
    for magnitude, factor in ((300.0, 1e-3), (1e-4, 1.0)):
        dy, x, lora_a, lora_b, words, scale = inputs((60, 40, 64, 4), "full", torch.float16, rng, factors=torch.float32)
        dy, x = dy * magnitude, x * magnitude
        arguments = (dy, x, lora_a * factor, lora_b * factor, words, scale)
        assert max(errors(module, arguments)) < 1e-6, magnitude


def test_rows_or_sizes_of_zero() -> None:
    for rows, n, k, rank in ((0, 40, 64, 4), (5, 0, 64, 4), (5, 40, 0, 4)):
        words = torch.zeros(n, (k + 31) // 32, dtype=torch.int32)
        sizes = ((rows, n), (rows, k), (rank, k), (n, rank))
        tensors = (torch.ones(size) for size in sizes)
        grad_a, grad_b = module.masked_lora_factor_gradients(*tensors, words, torch.tensor(1.0))
        assert grad_a.shape == (rank, k) and grad_b.shape == (n, rank)
        assert not grad_a.any() and not grad_b.any()


def test_splits_cover_every_row_once() -> None:
    for total in (1, 15, 16, 17, 1000, 32768):
        for tiles in (1, 9, 500):
            for asked in (None, 1, 2, 7, 10**6):
                split = split_rows(total, 16, 16, tiles, 132, 32, asked)
                assert split.rows % 16 == 0
                assert (split.count - 1) * split.rows < total <= split.count * split.rows
    for tiles, together in ((9, 2), (25, 2), (25, 4), (100, 3)):
        # Whole rounds of programs: a few more than fit would take a round more.
        programs = split_rows(32768, 64, 64, tiles, 132, 32, side_by_side=together).count * tiles
        assert programs / (132 * together) > 0.75 * -(-programs // (132 * together))
    with pytest.raises(ValueError, match="splits"):
        split_rows(10, 16, 16, 1, 132, 32, 0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("expand_rows(b_words, BN, BK) != 0", "expand_rows(b_words, BN, BK) >= 0"),
        ("b_g * b_scale, 0.0", "b_g, 0.0"),
        ("tl.minimum((i_split + 1) * ROWS, T)", "T"),
        ("m_p &= tl.load(occupied + o_tile, mask=m_p, other=0) != 0", "m_p &= o_tile >= 0"),
        ("for i_r in range(0, R, BR):", "for i_r in range(0, BR, BR):"),
    ],
    ids=["mask dropped", "scale dropped", "rows counted twice", "empty tiles read", "rank cut off"],
)
def test_mutants_fail(old: str, new: str, mutate, rng: torch.Generator) -> None:
    tiling = Tiling({"BT": 64, "BN": 32, "BK": 32, "BR": 16})

    def worst(built: ModuleType) -> float:
        arguments = [inputs((150, 40, 70, 20), kind, torch.float32, rng) for kind in ("random", "block")]
        return max(max(errors(built, a, tiling=tiling, splits=2)) for a in arguments)

    assert worst(module) < 1e-6
    assert worst(mutate(module, old, new)) > 1e-2
