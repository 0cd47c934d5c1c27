"""Effective weights under the interpreter, against the definition in float64; rounding by its distribution."""

from types import ModuleType
from typing import Any

import pytest
import torch
from interpreter_testing import frobenius_error, random_mask, strided_rows
from torch import Tensor

from fade_kernels import reference
from fade_kernels.triton_kernels import effective_weight as module

# N, K, R: rows, columns and ranks beside whole tiles and words; several tiles both ways; a large rank.
SHAPES = [(1, 1, 1), (33, 65, 3), (130, 100, 16), (40, 96, 20), (70, 40, 128)]
MASKS = ["empty", "random", "block", "full", "overwritten"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4}


def inputs(
    shape: tuple[int, int, int], kind: str, dtype: torch.dtype, rng: torch.Generator, factors: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """W, A, B, mask words and scale."""
    n, k, rank = shape
    weight, lora_a, lora_b = (torch.randn(size, generator=rng) for size in ((n, k), (rank, k), (n, rank)))
    lora_a, lora_b = lora_a.to(factors or dtype), lora_b.to(factors or dtype)
    return weight.to(dtype), lora_a, lora_b, random_mask(n, k, kind, rng), torch.tensor(0.7)


def defined(weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """The exact result, in float64."""
    base = torch.zeros(lora_b.shape[0], lora_a.shape[1]) if weight is None else weight
    return reference.effective_weight(base.double(), lora_a.double(), lora_b.double(), words, scale.double())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype, rng: torch.Generator) -> None:
    for kind in MASKS:
        arguments = inputs(shape, kind, dtype, rng)
        actual = module.effective_weight(*arguments)
        assert actual.dtype == dtype
        exact = defined(None, *arguments[1:])
        assert frobenius_error(actual, defined(*arguments), terms=(arguments[0], exact)) < TOLERANCE[dtype], kind
        delta = module.effective_weight(None, *arguments[1:])
        assert frobenius_error(delta, exact) < TOLERANCE[dtype], kind


def test_unmasked_weights_keep_their_bits_and_masked_ones_are_rounded_once(rng: torch.Generator) -> None:
    weight, lora_a, lora_b, words, scale = inputs((40, 70, 4), "random", torch.float16, rng, torch.float32)
    expected = (defined(weight, lora_a, lora_b, words, scale)).half()
    actual = module.effective_weight(weight, lora_a, lora_b, words, scale)
    mask = reference.unpack_mask(words, 70)
    assert torch.equal(actual[~mask], weight[~mask])
    assert (actual == expected).float().mean() > 0.99  # fp32 sums on the other side of a tie


def test_out_in_place_and_strided(rng: torch.Generator) -> None:
    weight, *delta = inputs((70, 100, 5), "block", torch.float32, rng)
    expected = defined(weight, *delta)
    out = torch.full_like(weight, float("nan"))
    assert module.effective_weight(weight, *delta, out=out) is out
    assert frobenius_error(out, expected) < 1e-6
    assert frobenius_error(module.effective_weight(strided_rows(weight), *delta), expected) < 1e-6
    assert frobenius_error(module.effective_weight(weight.t().contiguous().t(), *delta), expected) < 1e-6
    assert frobenius_error(module.effective_weight(weight, *delta, dtype=torch.float16), expected) < 5e-4
    changed = weight.clone()
    module.effective_weight(changed, *delta, out=changed)
    assert frobenius_error(changed, expected) < 1e-6
    rows = strided_rows(weight)
    with pytest.raises(ValueError, match="out"):
        module.effective_weight(weight, *delta, out=torch.empty(100, 70).t())
    with pytest.raises(ValueError, match="dtype"):
        module.effective_weight(weight, *delta, out=rows, dtype=torch.float16)
    module.effective_weight(rows, *delta, out=rows)
    assert frobenius_error(rows, expected) < 1e-6


def test_convolution_shapes_and_factors_of_two_dtypes(rng: torch.Generator) -> None:
    weight, lora_a, lora_b, words, scale = inputs((24, 36, 4), "random", torch.float32, rng)
    expected = defined(weight, lora_a, lora_b, words, scale)
    shape = (4, 3, 3)
    factors = (lora_a.reshape(-1, *shape), lora_b.reshape(24, 4, 1, 1))
    actual = module.effective_weight(weight.reshape(-1, *shape), *factors, words, scale)
    assert actual.shape == (24, *shape)
    assert frobenius_error(actual.flatten(1), expected) < 1e-6
    half = lora_b.half()
    actual = module.effective_weight(weight, lora_a, half, words, scale)
    assert frobenius_error(actual, defined(weight, lora_a, half, words, scale)) < 1e-6


def test_many_layers(rng: torch.Generator) -> None:
    """Shapes, ranks, dtypes and alignments differ; one result each, in order, also from a table used twice."""
    layers, expected = [], []
    for i, (shape, dtype) in enumerate((s, d) for d in DTYPES.values() for s in [*SHAPES, (64, 64, 16)]):
        arguments = inputs(shape, MASKS[i % 4], dtype, rng)
        if i % 5 == 4:
            arguments = (None, *arguments[1:])
        layers.append(module.Layer(*arguments))
        expected.append(defined(*arguments))
    nothing = (torch.ones(0, 32), torch.ones(2, 32), torch.ones(0, 2), torch.ones(0, 1, dtype=torch.int32))
    layers.append(module.Layer(*nothing, torch.tensor(1.0)))
    expected.append(torch.ones(0, 32))
    table = module.LayerTable.build(layers)
    assert 2 <= len(table.groups) <= 8
    for actual in (module.effective_weights(layers), module.effective_weights(table), module.effective_weights(table)):
        for one, other in zip(actual, expected, strict=True):
            assert frobenius_error(one, other) < 5e-4
    assert module.effective_weights([]) == []


def test_many_layers_in_place(rng: torch.Generator) -> None:
    arguments = [inputs(shape, "random", torch.float32, rng) for shape in SHAPES]
    expected = [defined(*a) for a in arguments]
    results = module.effective_weights([module.Layer(*a, out=a[0]) for a in arguments])
    for a, result, e in zip(arguments, results, expected, strict=True):
        assert result is a[0]
        assert frobenius_error(result, e) < 1e-6


# --- stochastic rounding ---------------------------------------------------------------------------------------------

SEEDS, ROWS = 4, 64
"""Every value is drawn SEEDS x ROWS times: each element of a weight has random bits of its own."""


def rounded(built: ModuleType, values: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Values [1, K] rounded stochastically ROWS times: the delta alone of A = values, B = 1, a full mask."""
    words = torch.full((ROWS, -(-values.shape[1] // 32)), -1, dtype=torch.int32)
    ones, scale = torch.ones(ROWS, 1), torch.tensor(1.0)
    return built.effective_weight(None, values, ones, words, scale, dtype=dtype, stochastic=True, seed=seed)


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of the dtype's neighbours of each value, in float64."""
    bits, least = {torch.float16: (10, -14), torch.bfloat16: (7, -126)}[dtype]
    exponent = torch.floor(torch.log2(values.double().abs().clamp_min(2.0**-200))).clamp_min(least)
    return 2.0 ** (exponent - bits)


def bias(built: ModuleType, values: Tensor, dtype: torch.dtype) -> float:
    """Mean draw minus the value in standard deviations, its root mean square over the values: 1 if fair."""
    draws = torch.cat([rounded(built, values, dtype, seed) for seed in range(SEEDS)]).double()
    step, exact = spacing(values, dtype), values.double()
    assert ((draws - exact).abs() < step).all(), "not a neighbour"
    fraction = (exact / step).abs().frac()
    deviation = step * (fraction * (1 - fraction) / len(draws)).sqrt()
    inexact = (fraction > 0.01) & (fraction < 0.99)
    assert (draws == exact).all(dim=0)[fraction[0] == 0].all(), "a representable value moved"
    return float(((draws.mean(dim=0, keepdim=True) - exact) / deviation)[inexact].square().mean().sqrt())


def sample(kind: str, rng: torch.Generator) -> Tensor:
    """fp32 values [1, 128] of both signs, among them representable ones."""
    values = torch.randn(1, 128, generator=rng)
    if kind == "subnormal":
        values *= 2.0**-17
    elif kind == "below the smallest":
        values = (torch.rand(1, 128, generator=rng) - 0.5) * 2.0**-23
    values[:, :8] = values[:, :8].half().float()
    return values


CASES = [
    ("normal", torch.float16),
    ("subnormal", torch.float16),
    ("below the smallest", torch.float16),
    ("normal", torch.bfloat16),
]


@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_stochastic_rounding_is_unbiased(kind: str, dtype: torch.dtype, rng: torch.Generator) -> None:
    values = sample(kind, rng)
    if dtype == torch.bfloat16:
        values[:, :8] = values[:, :8].bfloat16().float()
    # The mean square over 120 values is within 1 +- 0.13 per standard deviation.
    assert 0.6 < bias(module, values, dtype) < 1.4


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_stochastic_rounding_keeps_what_has_no_neighbours() -> None:
    values = torch.tensor([[0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65504.0, 2.0**-24, -1.0]])
    for seed in range(5):
        draws = rounded(module, values, torch.float16, seed).nan_to_num(7.0)
        assert torch.equal(draws, values.half().nan_to_num(7.0).expand_as(draws))


def test_seeds_and_layers_have_bits_of_their_own(rng: torch.Generator) -> None:
    weight, lora_a, lora_b, words, scale = inputs((32, 64, 4), "full", torch.float16, rng)
    arguments = (weight, lora_a, lora_b, words, scale)
    draws = [module.effective_weight(*arguments, stochastic=True, seed=seed) for seed in (0, 1, 2**40 + 7, 0)]
    assert torch.equal(draws[0], draws[3])
    two = module.effective_weights([module.Layer(*arguments), module.Layer(*arguments)], stochastic=True, seed=0)
    exact = module.effective_weight(*arguments)
    for one, other in ((draws[0], draws[1]), (draws[1], draws[2]), (two[0], two[1])):
        different = (one != other).float().mean()
        assert 0.2 < different < 0.5  # 1/3 for uniform fractions
    assert 0.15 < (draws[0] != exact).float().mean() < 0.35  # 1/4


def test_stochastic_in_place_leaves_the_rest_alone(rng: torch.Generator) -> None:
    weight, *delta = inputs((70, 100, 4), "random", torch.float16, rng)
    mask = reference.unpack_mask(delta[2], 100)
    for dropped in (weight.clone(), None):
        out = module.effective_weight(weight, *delta, out=dropped, stochastic=True, seed=3)
        assert torch.equal(out[~mask], weight[~mask])
        assert not torch.equal(out[mask], weight[mask])


def test_fp32_results_are_not_rounded_stochastically(rng: torch.Generator) -> None:
    arguments = inputs((33, 65, 3), "random", torch.float32, rng)
    assert torch.equal(module.effective_weight(*arguments, stochastic=True), module.effective_weight(*arguments))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("expand_rows(b_words, BN, BK) != 0", "expand_rows(b_words, BN, BK) >= 0"),
        ("b_delta * b_scale, 0.0", "b_delta, 0.0"),
        ("for i_r in range(0, R, BR):", "for i_r in range(0, BR, BR):"),
        ("        b_out += tl.where(", "        b_out = tl.where("),
    ],
    ids=["mask dropped", "scale dropped", "rank cut off", "weight dropped"],
)
def test_mutants_fail(old: str, new: str, mutate, rng: torch.Generator) -> None:
    arguments = inputs((40, 70, 20), "random", torch.float32, rng)
    expected = defined(*arguments)
    assert frobenius_error(module.effective_weight(*arguments), expected) < 1e-6
    assert frobenius_error(mutate(module, old, new).effective_weight(*arguments), expected) > 1e-2


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("(b_random & b_low)", "(b_random & (b_low >> 1))", "normal"),
        ("b_dropped = 13 + tl.minimum", "b_dropped = 13 + 0 * tl.minimum", "subnormal"),
        ("281474976710656.0", "140737488355328.0", "below the smallest"),
    ],
    ids=["half the noise", "subnormals as normals", "half the probability"],
)
def test_mutants_of_the_rounding_are_biased(old: str, new: str, kind: str, mutate, rng: torch.Generator) -> None:
    values = sample(kind, rng)
    assert bias(module, values, torch.float16) < 1.4
    assert bias(mutate(module, old, new), values, torch.float16) > 2


def values_problem(n: int, k: int, kind: str, dtype: torch.dtype, rng: torch.Generator) -> tuple[Tensor, ...]:
    """W, values, mask words and scale."""
    words = random_mask(n, k, kind, rng)
    count = int(reference.unpack_mask(words, k).sum())
    return torch.randn(n, k, generator=rng).to(dtype), torch.randn(count, generator=rng), words, torch.tensor(0.7)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", [(1, 1), (33, 65), (20, 300)], ids=str)
def test_given_by_values_it_is_the_definition_bit_for_bit(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    weight, *delta = values_problem(*shape, kind, dtype, rng)
    for base in (weight, None):
        for stochastic in (False, True):
            actual, expected = torch.empty_like(weight), torch.empty_like(weight)
            first = torch.zeros_like(weight) if base is None else base
            options = (stochastic, 11)
            lists = [[first, first], *([part, part] for part in delta)]
            reference.effective_weights_from_values_out([torch.empty_like(weight), expected], *lists, *options)
            module.effective_weight_from_values(actual, base, *delta, stochastic=stochastic, seed=11, layer=1)
            assert torch.equal(actual, expected), (base is None, stochastic)


def test_values_into_other_layouts_and_dtypes(rng: torch.Generator) -> None:
    weight, *delta = values_problem(24, 70, "random", torch.float16, rng)
    expected = torch.empty(24, 70)
    reference.effective_weight_from_values_out(expected, weight.float(), *delta)
    for out in (torch.full((24, 70), float("nan")), strided_rows(torch.zeros(24, 70)), torch.zeros(70, 24).t()):
        module.effective_weight_from_values(out, weight, *delta)
        assert torch.equal(out, expected)
    images = torch.zeros(24, 7, 2, 5)
    module.effective_weight_from_values(images, weight.view(24, 7, 2, 5), *delta)
    assert torch.equal(images.flatten(1), expected)
    module.effective_weight_from_values(weight, weight, delta[0].half(), *delta[1:])
    assert frobenius_error(weight, expected.double()) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("old", "new"),
    [("tl.cumsum(b_bits, axis=1) - b_bits", "tl.cumsum(b_bits, axis=1)"), ("b_values * b_scale", "b_values")],
    ids=["next value", "scale lost"],
)
def test_a_mutant_of_the_values_kernel_is_noticed(old: str, new: str, rng: torch.Generator, mutate: Any) -> None:
    weight, *delta = values_problem(33, 65, "random", torch.float32, rng)
    actual, expected = torch.empty_like(weight), torch.empty_like(weight)
    reference.effective_weight_from_values_out(expected, weight, *delta)
    mutate(module, old, new).effective_weight_from_values(actual, weight, *delta)
    assert frobenius_error(actual, expected) > 1e-3
