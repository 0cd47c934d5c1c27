"""Masked least squares: against the float64 definition on every kind of mask, its prices against what they promise."""

from collections import Counter
from typing import Any

import cuda_checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import OPS, generator, opcheck, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from fade_kernels import (
    BitMask,
    build_info,
    least_squares_by_size,
    masked_least_squares,
    masked_least_squares_prices,
    reference,
)
from fade_kernels.cuda import least_squares


def problem(
    rows: int, columns: int, density: float, seed: int, damping: float = 0.05, samples: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A right-hand side, the Gram matrix of random columns plus a multiple of the identity, and a random mask."""
    random = generator(seed)
    points = torch.randn(columns, samples or 2 * columns + 1, generator=random, dtype=torch.float64)
    gram = points @ points.T / points.shape[1] + damping * torch.eye(columns, dtype=torch.float64)
    rhs = torch.randn(rows, columns, generator=random, dtype=torch.float64)
    return rhs, (gram + gram.T) / 2, torch.rand(rows, columns, generator=random) < density


def kernels(rhs: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """What the registered kernel and the compositions for CUDA answer, prices included: by torch alone, and with its
    smaller rows in launches by size, whose kernel is the definition here."""
    arguments = (rhs, gram, reference.pack_mask(mask), int(mask.sum()), True)
    return [
        OPS.masked_least_squares(*arguments),
        least_squares.padded_masked_least_squares(*arguments),
        least_squares.masked_least_squares(*arguments, launches=(1, 7, 12)),
    ]


def check(rhs: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor, tolerance: float) -> None:
    expected = reference.masked_least_squares(
        rhs.double(), gram.double(), reference.pack_mask(mask), int(mask.sum()), True
    )
    for values, prices, singular in kernels(rhs, gram, mask):
        assert values.dtype == prices.dtype == rhs.dtype
        assert int(singular) == int(expected[2]) == -1
        assert relative_error(values, expected[0]) <= tolerance
        assert relative_error(prices, expected[1]) <= tolerance


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 90), st.sampled_from([0.0, 0.03, 0.3, 0.8, 1.0]), st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_the_kernels_are_the_definition(rows: int, columns: int, density: float, seed: int, dtype: torch.dtype) -> None:
    rhs, gram, mask = problem(rows, columns, density, seed)
    # The arithmetic is float64 for float32 inputs, too: only the answer is rounded.
    check(rhs.to(dtype), gram.to(dtype), mask, 2e-12 if dtype == torch.float64 else 2e-7)


@pytest.mark.parametrize("columns", [255, 256, 257, 330])
def test_supports_around_the_largest_that_share_a_vector(columns: int) -> None:
    rhs, gram, mask = problem(11, columns, 0.9, columns)
    mask[0], mask[1], mask[2, 1:] = True, False, False
    check(rhs, gram, mask, 1e-11)


def test_rows_of_equal_support() -> None:
    """As masks of whole channels have them: in groups of different sizes, beside rows of their own."""
    rhs, gram, mask = problem(300, 50, 0.4, 3)
    mask[10:200] = mask[5]
    mask[200:231] = mask[4]
    mask[231:260] = True
    check(rhs, gram, mask, 1e-11)
    rhs, gram, mask = problem(1500, 300, 1.0, 4)
    check(rhs[:40], gram, mask[:40], 1e-11)
    values, _ = masked_least_squares_prices(rhs, gram, BitMask.pack(mask))
    assert relative_error(values.reshape(rhs.shape) @ gram, rhs) < 1e-11


def test_the_answer_solves_the_masked_problem() -> None:
    """The gradient of x G xᵀ − 2 b xᵀ vanishes on the support, and a price is what dropping the entry costs."""
    rhs, gram, mask = problem(6, 23, 0.4, 5)
    packed = BitMask.pack(mask)
    values, prices = masked_least_squares_prices(rhs, gram, packed)
    x = torch.zeros_like(rhs)
    x[mask] = values
    assert float((x @ gram - rhs)[mask].abs().max()) < 1e-12

    def minimum(kept: torch.Tensor) -> torch.Tensor:
        x = torch.zeros_like(rhs)
        x[kept] = masked_least_squares(rhs, gram, BitMask.pack(kept))
        return ((x @ gram) * x - 2 * rhs * x).sum()

    for index, (row, column) in enumerate(mask.nonzero().tolist()):
        without = mask.clone()
        without[row, column] = False
        assert float(minimum(without) - minimum(mask)) == pytest.approx(float(prices[index]), rel=1e-8, abs=1e-12)


def test_an_ill_conditioned_gram_matrix() -> None:
    """Fewer samples than columns, some of them a thousand times larger, damped: condition 1e10."""
    rhs, gram, mask = problem(40, 120, 0.5, 6, damping=0.0, samples=30)
    stretch = torch.where(torch.arange(120) % 17 == 0, 1000.0, 1.0).double()
    gram = gram * stretch * stretch[:, None] + 1e-4 * torch.eye(120, dtype=torch.float64)
    rhs = torch.randn(40, 120, generator=generator(7), dtype=torch.float64) @ gram
    check(rhs, (gram + gram.T) / 2, mask, 1e-6)
    exact = torch.randn(40, 120, generator=generator(8), dtype=torch.float64)
    full = BitMask.full((40, 120))
    found = masked_least_squares(exact @ gram, (gram + gram.T) / 2, full).reshape(40, 120)
    assert relative_error(found @ gram, exact @ gram) < 1e-12


def test_strides() -> None:
    rhs, gram, mask = problem(30, 37, 0.4, 9)
    wide = torch.zeros(30, 74, dtype=torch.float64)
    wide[:, ::2] = rhs
    packed = BitMask.pack(mask)
    expected = masked_least_squares_prices(rhs, gram, packed)
    for given_rhs, given_gram in ((wide[:, ::2], gram.T), (rhs.T.contiguous().T, gram.T.contiguous())):
        found = masked_least_squares_prices(given_rhs, given_gram, packed)
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_threads_and_other_rows_change_nothing() -> None:
    rhs, gram, mask = problem(500, 64, 0.3, 10)
    whole = masked_least_squares(rhs, gram, BitMask.pack(mask))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = masked_least_squares(rhs, gram, BitMask.pack(mask))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, again)
    some = masked_least_squares(rhs[:100], gram, BitMask.pack(mask[:100]))
    assert torch.equal(some, whole[: some.numel()])


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_other_instruction_sets(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    """The environment is read at each call."""
    monkeypatch.setenv("FADE_CPU_CAPABILITY", capability)
    check(*problem(30, 75, 0.5, 15), 1e-11)


def test_blocks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(least_squares_by_size._BLOCK_BYTES, "cpu", 8 * 30**2 * 3)
    check(*problem(50, 60, 0.5, 11), 1e-11)


@pytest.mark.parametrize("kind", ["equal columns", "zero column", "not a number", "negative"])
@pytest.mark.parametrize("columns", [40, 600])
def test_a_singular_block_names_its_row(kind: str, columns: int) -> None:
    rhs, gram, mask = problem(9, columns, 0.6, 12)
    mask[:, [3, 5]] = False
    mask[4, [3, 5]] = mask[7, [3, 5]] = True
    if kind == "equal columns":
        gram[:, 5] = gram[:, 3]
        gram[5] = gram[3]
    elif kind == "zero column":
        gram[:, 5] = gram[5] = 0.0
    else:
        gram[5, 5] = float("nan") if kind == "not a number" else -1.0
    for _, _, singular in (
        reference.masked_least_squares(rhs, gram, reference.pack_mask(mask), int(mask.sum()), True),
        *kernels(rhs, gram, mask),
    ):
        assert int(singular) == 4
    message = "finite" if kind == "not a number" else r"singular on the support of row 4 \(\d+ columns\)"
    with pytest.raises(ValueError, match=message):
        masked_least_squares(rhs, gram, BitMask.pack(mask))
    mask[[4, 7]] = False
    if kind != "not a number":
        assert torch.isfinite(masked_least_squares(rhs, gram, BitMask.pack(mask))).all()


@pytest.mark.parametrize("check", [
    cuda_checks.check_least_squares, cuda_checks.check_least_squares_of_some_rows,
    cuda_checks.check_least_squares_singular,
])  # fmt: skip
def test_some_rows_alone(check: Any) -> None:
    check(OPS, "cpu")


@pytest.mark.skipif(not build_info()["extension"], reason="the compiled kernel checks where it reads and writes")
def test_rows_that_are_not_there() -> None:
    rhs, gram, mask = problem(4, 6, 0.9, 13)
    words, starts, singular = reference.pack_mask(mask), torch.arange(4) * 6, torch.tensor(4)
    for rows, more, message in (([1, 4], 0, "row 4 of a mask with 4 rows"), ([3], 1, "do not fit into values")):
        out = torch.empty(24 - more, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
        with pytest.raises(RuntimeError, match=message):
            OPS.masked_least_squares_rows_(*out, singular, rhs, gram, words, starts + 6 * more, torch.tensor(rows), 6)


# --- large supports --------------------------------------------------------------------------------------------------


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many supports were factored directly, and how many through the inverse of the Gram matrix."""
    found: Counter[str] = Counter()

    def counting(name: str, original: Any) -> Any:
        def call(*arguments: Any) -> Any:
            found[name] += len(arguments[-2])
            return original(*arguments)

        return call

    for name in ("directly", "through_inverse"):
        whole = f"_solve_{name}_"
        monkeypatch.setattr(least_squares_by_size, whole, counting(name, getattr(least_squares_by_size, whole)))
    return found


def mixed_supports(columns: int, seed: int) -> torch.Tensor:
    """Of every size, some of them equal: [80, columns]."""
    random = generator(seed)
    density = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.95, 0.98, 1.0, 1.0]).repeat_interleave(10)[:, None]
    mask = torch.rand(80, columns, generator=random) < density
    mask[31:36] = mask[30]
    mask[48] = mask[47]
    return mask[torch.randperm(80, generator=random)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [60, 290])
def test_large_supports(ways: Counter[str], columns: int, dtype: torch.dtype) -> None:
    """Through the inverse those that leave out few columns; on the CPU, of more than 256."""
    mask = mixed_supports(columns, columns)
    rhs, gram, _ = problem(80, columns, 1.0, columns + 1)
    rhs, gram, tolerance = rhs.to(dtype), gram.to(dtype), 1e-11 if dtype == torch.float64 else 2e-7
    check(rhs, gram, mask, tolerance)
    assert ways["through_inverse"] > 20
    assert ways["directly"] > 20
    arguments = (rhs, gram, reference.pack_mask(mask), int(mask.sum()), False)
    values, prices, _ = least_squares.padded_masked_least_squares(*arguments)
    assert prices.numel() == 0
    assert relative_error(values, reference.masked_least_squares(*arguments)[0]) <= tolerance
    distinct = len(mask[mask.any(1)].unique(dim=0))
    ways.clear()
    least_squares.padded_masked_least_squares(*arguments)
    assert ways.total() == distinct


def test_the_inverse_pays_only_for_several_rows(ways: Counter[str]) -> None:
    rhs, gram, mask = problem(60, 90, 0.95, 31)
    check(rhs[:1], gram, mask[:1], 1e-11)
    assert not ways["through_inverse"]
    check(rhs, gram, mask, 1e-11)
    assert ways["through_inverse"]


@pytest.mark.parametrize("apart", [1e-3, 1e-5])
def test_an_inverse_that_lost_digits(ways: Counter[str], apart: float) -> None:
    """Pairs of columns that are all but equal, of which each row has one: its own block is conditioned well, and the
    answers are as exact as that allows. Where the inverse does not yield them, rows are solved directly."""
    columns, pairs, random = 90, 12, generator(32)
    points = torch.randn(2 * columns, columns, generator=random, dtype=torch.float64)
    points[:, -pairs:] = points[:, :pairs] + apart * torch.randn(2 * columns, pairs, generator=random).double()
    mask = torch.ones(60, columns, dtype=torch.bool)
    first = torch.rand(60, pairs, generator=random) < 0.5
    mask[:, :pairs], mask[:, -pairs:] = first, ~first
    rhs = torch.randn(60, columns, generator=random, dtype=torch.float64)
    arguments = (rhs, points.T @ points / 200, reference.pack_mask(mask), int(mask.sum()), True)
    expected = reference.masked_least_squares(*arguments)
    values, prices, singular = least_squares.padded_masked_least_squares(*arguments)
    assert ways["through_inverse"] == len(mask.unique(dim=0))
    assert ways["directly"] == (0 if apart == 1e-3 else ways["through_inverse"])
    assert int(singular) == -1
    assert relative_error(values, expected[0]) < 1e-12
    assert relative_error(prices, expected[1]) < 1e-7


def test_units_of_columns_do_not_matter(ways: Counter[str]) -> None:
    rhs, gram, _ = problem(80, 60, 1.0, 33)
    units = 10 ** torch.linspace(-6, 6, 60, dtype=torch.float64)[torch.randperm(60, generator=generator(34))]
    mask = mixed_supports(60, 35)
    more = (reference.pack_mask(mask), int(mask.sum()), True)
    values, prices, _ = least_squares.padded_masked_least_squares(rhs, gram, *more)
    before = dict(ways)
    scaled = least_squares.padded_masked_least_squares(rhs * units, gram * units * units[:, None], *more)
    assert relative_error(scaled[0] * units.expand_as(rhs)[mask], values) < 1e-10
    assert relative_error(scaled[1], prices) < 1e-10
    assert before["through_inverse"] > 10
    assert ways == {way: 2 * count for way, count in before.items()}


@pytest.mark.parametrize("kind", ["equal columns", "zero column"])
@pytest.mark.parametrize("columns", [60, 290])
def test_a_gram_matrix_that_is_singular_outside_of_large_supports(kind: str, columns: int) -> None:
    rhs, gram, mask = problem(70, columns, 0.95, 36)
    mask[:, 5] = False
    gram[:, 5] = gram[5] = gram[3] if kind == "equal columns" else 0.0
    gram[5, 5] = gram[3, 3] if kind == "equal columns" else 0.0
    check(rhs, gram, mask, 1e-11)
    mask[[41, 62]] = True
    for _, _, singular in kernels(rhs, gram, mask):
        assert int(singular) == 41


def test_singular_rows_are_those_of_the_definition() -> None:
    """Whatever is added to a singular Gram matrix: the inverse serves only where it is beyond doubt."""
    rhs, gram, mask = problem(60, 60, 0.95, 37, damping=0.0, samples=59)
    mask[:7, :4], mask[7] = False, True
    found = []
    for damping in 10.0 ** torch.arange(-17, -8, dtype=torch.float64):
        arguments = (rhs, gram + damping * torch.eye(60).double(), reference.pack_mask(mask), int(mask.sum()), True)
        _, _, expected = reference.masked_least_squares(*arguments)
        assert int(least_squares.padded_masked_least_squares(*arguments)[2]) == int(expected)
        found.append(int(expected))
    assert found[0] == 7
    assert found[-1] == -1


def test_strides_of_large_supports() -> None:
    rhs, gram, mask = problem(40, 290, 0.95, 38)
    wide = torch.zeros(40, 580, dtype=torch.float64)
    wide[:, ::2] = rhs
    packed = BitMask.pack(mask)
    expected = masked_least_squares_prices(rhs, gram, packed)
    for given_rhs, given_gram in ((wide[:, ::2], gram.T), (rhs.T.contiguous().T, gram.T.contiguous())):
        found = masked_least_squares_prices(given_rhs, given_gram, packed)
        assert all(relative_error(f, e) < 1e-12 for f, e in zip(found, expected, strict=True))


def test_numbers_that_are_not_finite_in_large_supports() -> None:
    """Of a row, they concern no other, and none at all outside of the support."""
    rhs, gram, mask = problem(40, 290, 0.95, 39)
    mask[3, 7], mask[4, 7] = True, False
    packed = BitMask.pack(mask)
    expected = masked_least_squares(rhs, gram, packed)
    rhs[4, 7] = float("nan")
    assert relative_error(masked_least_squares(rhs, gram, packed), expected) < 1e-12
    rhs[3, 7] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        masked_least_squares(rhs, gram, packed)


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator makes."""

    found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor):
                self.found = max(self.found, result.untyped_storage().nbytes())
        return results


@pytest.mark.parametrize("density", [0.5, 0.9])
def test_memory_of_large_supports_is_bounded(monkeypatch: pytest.MonkeyPatch, density: float) -> None:
    """Nothing is much larger than the Gram matrix or the answers, neither for many rows nor for many of one support."""
    rhs, gram, mask = problem(400, 100, density, 40)
    mask[300:] = mask[299]
    arguments = (rhs, gram, reference.pack_mask(mask), int(mask.sum()), True)
    expected = reference.masked_least_squares(*arguments)
    monkeypatch.setitem(least_squares_by_size._BLOCK_BYTES, "cpu", 8 * 100**2)
    with _Largest() as largest:
        found = least_squares.padded_masked_least_squares(*arguments)
    for own, right in zip(found[:2], expected[:2], strict=True):
        assert relative_error(own, right) < 1e-11
    assert largest.found <= max(8 * found[0].numel(), 2 * 8 * 100**2)


def test_no_rows_and_no_columns() -> None:
    for rows, columns in ((0, 5), (4, 0), (3, 8)):
        found = masked_least_squares_prices(
            torch.zeros(rows, columns), torch.eye(columns), BitMask.pack(torch.zeros(rows, columns, dtype=torch.bool))
        )
        assert [tensor.shape for tensor in found] == [(0,), (0,)]


def test_errors_say_what_to_do() -> None:
    rhs, gram, mask = problem(4, 6, 0.5, 13)
    packed = BitMask.pack(mask)
    for arguments, error, message in (
        ((rhs.half(), gram, packed), TypeError, "rhs must be float32 or float64"),
        ((rhs, gram.float(), packed), TypeError, "dtypes must agree"),
        ((rhs, gram[:5], packed), ValueError, r"rhs must be \[N, K\] and gram \[K, K\], not \[4, 6\] and \[5, 6\]"),
        ((rhs[0], gram, packed), ValueError, r"rhs must be \[N, K\]"),
        ((rhs[:3], gram, packed), ValueError, "the mask has 4 rows"),
        ((rhs, gram, mask), TypeError, "BitMask.pack"),
        ((rhs, gram + torch.ones(6).cumsum(0), packed), ValueError, "not symmetric"),
        ((rhs / 0, gram, packed), ValueError, "finite"),
    ):
        with pytest.raises(error, match=message):
            masked_least_squares(*arguments)
    for call in (OPS.masked_least_squares, least_squares.padded_masked_least_squares, reference.masked_least_squares):
        with pytest.raises((ValueError, RuntimeError), match="set bits, not 99"):
            call(rhs, gram, packed.words, 99, False)


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.float64):
        rhs, gram, mask = problem(5, 37, 0.4, 14)
        arguments = (rhs.to(dtype), gram.to(dtype), reference.pack_mask(mask), int(mask.sum()))
        for with_prices in (False, True):
            opcheck(OPS.masked_least_squares, (*arguments, with_prices))
        values, starts = torch.empty(int(mask.sum()), dtype=dtype), mask.sum(1).cumsum(0) - mask.sum(1)
        outputs = (values, values.clone(), torch.tensor(5))
        opcheck(OPS.masked_least_squares_rows_, (*outputs, *arguments[:3], starts, torch.arange(5), 37))
