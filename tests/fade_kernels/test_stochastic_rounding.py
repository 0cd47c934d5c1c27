"""W + Delta rounded stochastically to 16 bits on the CPU: the bits that the definition draws, and in the mask alone."""

import os
import subprocess
import sys

import pytest
import torch
from kernel_testing import OPS, generator
from test_masked_lora import MASKS, SHAPES, Layer, make_layer
from torch import Tensor

from fade_kernels import BitMask, reference

NARROW = [torch.float16, torch.bfloat16]
LAYERS = [*SHAPES, (1, 5, 1000, 4)]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


def layers_of(mask: str, dtype: torch.dtype, factor_dtype: torch.dtype, exact: bool) -> list[Layer]:
    """Weights over the whole range of the format; with `exact`, factors whose products fp32 holds in any order."""
    layers = []
    for seed, shape in enumerate(LAYERS):
        layer = make_layer(shape, mask, dtype, 7 * seed, factor_dtype)
        size = torch.exp2(torch.randint(-30, 14, layer.weight.shape, generator=generator(seed)).float())
        layer.weight = (layer.weight.float() * size).to(dtype)
        if exact:
            layer.lora_a, layer.lora_b = (
                (8 * factor).round().clamp(-15, 15) / 64 for factor in (layer.lora_a, layer.lora_b)
            )
        layers.append(layer)
    return layers


def rounded(operator: str, weights: list[Tensor], deltas: list[tuple[Tensor, ...]], seed: int) -> list[Tensor]:
    """What the operator, or its definition (`reference`), makes of several layers."""
    out = [torch.full_like(weight, torch.nan) for weight in weights]
    lists = [list(column) for column in zip(*deltas, strict=True)]
    function = getattr(OPS if operator.startswith("kernel") else reference, operator.split(".")[1])
    function(out, weights, *lists, True, seed)
    return out


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", NARROW)
def test_same_bits_as_the_definition(dtype: torch.dtype, mask: str) -> None:
    for factor_dtype in (torch.float32, dtype):
        layers = layers_of(mask, dtype, factor_dtype, exact=True)
        scale = torch.tensor(0.7, dtype=torch.float64)
        weights = [layer.weight for layer in layers]
        factors = [(layer.lora_a, layer.lora_b, layer.mask.words, scale) for layer in layers]
        values = [
            (torch.randn(layer.mask.count, generator=generator(i), dtype=factor_dtype), layer.mask.words, scale)
            for i, layer in enumerate(layers)
        ]
        for name, deltas in (("effective_weights_out", factors), ("effective_weights_from_values_out", values)):
            for seed in (0, 12345, 2**31 + 3):
                actual = rounded(f"kernel.{name}", weights, deltas, seed)
                expected = rounded(f"reference.{name}", weights, deltas, seed)
                for one, other in zip(actual, expected, strict=True):
                    # The definition adds 0 to what is not in the mask, which makes a negative zero positive.
                    assert torch.equal(bits(one + 0.0), bits(other + 0.0)), name


@pytest.mark.parametrize("dtype", NARROW)
def test_factors_of_any_digits(dtype: torch.dtype) -> None:
    """B A is summed in another order than the definition's, so that a sum in a million falls on the other side."""
    layers = layers_of("half", dtype, torch.float32, exact=False)
    weights = [layer.weight for layer in layers]
    deltas = [(layer.lora_a, layer.lora_b, layer.mask.words, torch.tensor(layer.scale)) for layer in layers]
    actual = rounded("kernel.effective_weights_out", weights, deltas, 1)
    expected = rounded("reference.effective_weights_out", weights, deltas, 1)
    for one, other in zip(actual, expected, strict=True):
        assert float((one != other).double().mean()) <= 1e-2 * min(1.0, 1000 / one.numel())
        assert torch.allclose(one.double(), other.double(), rtol=2 * torch.finfo(dtype).eps, atol=2.0**-23)


@pytest.mark.parametrize("dtype", NARROW)
def test_what_is_not_masked_keeps_its_bits(dtype: torch.dtype) -> None:
    """NaN payloads and signs of zero, too, in place and into other memory."""
    weight = torch.randint(-(2**15), 2**15, (40, 70), generator=generator(2)).to(torch.int16).view(dtype)
    mask = torch.rand(40, 70, generator=generator(3)) < 0.2
    words = BitMask.pack(mask).words
    values = torch.randn(int(mask.sum()), generator=generator(4))
    other, own = torch.empty_like(weight), weight.clone()
    for out, base in ((other, weight), (own, own)):
        OPS.effective_weights_from_values_out([out], [base], [values], [words], [torch.tensor(0.5)], True, 9)
        assert torch.equal(bits(out)[~mask], bits(weight)[~mask])
    assert torch.equal(bits(own), bits(other))
    strided = torch.empty_like(weight.t().contiguous()).t()
    OPS.effective_weights_from_values_out([strided], [weight], [values], [words], [torch.tensor(0.5)], True, 9)
    assert torch.equal(bits(strided), bits(other))


@pytest.mark.parametrize("dtype", NARROW)
def test_numbers_at_the_ends_of_the_format(dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, 1.0, 65504.0, 3e38, torch.inf, -torch.inf, torch.nan, 2.0**-14, 2.0**-24, 2.0**-126])
    steps = torch.tensor([0.0, 2.0**-25, -(2.0**-26), 2.0**-40, 1.0, 17.0, 1e30, torch.inf, torch.nan, -3e38])
    weight = ends.to(dtype).repeat(len(steps), 1)
    values = steps[:, None].expand(-1, len(ends)).reshape(-1)
    words = BitMask.full(tuple(weight.shape)).words
    for seed in range(20):
        deltas = [(values, words, torch.tensor(1.0))]
        (actual,) = rounded("kernel.effective_weights_from_values_out", [weight], deltas, seed)
        (expected,) = rounded("reference.effective_weights_from_values_out", [weight], deltas, seed)
        nan = expected.isnan()
        assert torch.equal(actual.isnan(), nan) and torch.equal(bits(actual)[~nan], bits(expected)[~nan])


def test_fp32_and_nearest_are_the_ordinary_merge() -> None:
    for dtype, stochastic in ((torch.float32, True), (torch.float64, True), (torch.bfloat16, False)):
        layer = make_layer((1, 33, 65, 3), "half", dtype)
        delta = (torch.randn(layer.mask.count), layer.mask.words, torch.tensor(0.5))
        one, other = torch.empty_like(layer.weight), torch.empty_like(layer.weight)
        lists = [[item] for item in delta]
        OPS.effective_weights_from_values_out([one], [layer.weight], *lists, stochastic, 3)
        OPS.effective_weight_from_values_out(other, layer.weight, *delta)
        assert torch.equal(one, other)


CAPABILITY_CHECK = """
import test_stochastic_rounding as tests
for dtype in tests.NARROW:
    for mask in ("1 %", "full"):
        tests.test_same_bits_as_the_definition(dtype, mask)
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_every_instruction_set(capability: str) -> None:
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(os.path.dirname(here)), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "FADE_CPU_CAPABILITY": capability, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", CAPABILITY_CHECK], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- one product -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
def test_one_product_is_the_layer_of_the_rounded_weight(dtype: torch.dtype) -> None:
    for shape, kind in (((77, 33, 65, 3), "10 %"), ((130, 64, 128, 16), "full"), ((5, 40, 90, 4), "empty")):
        layer = make_layer(shape, kind, dtype, seed=4, factor_dtype=torch.float32)
        x, dy, words, scale = layer.x, layer.grad_output, layer.mask.words, torch.tensor(layer.scale)
        values = torch.randn(layer.mask.count, generator=generator(5))
        for weight in (layer.weight, None):
            base = torch.zeros_like(layer.weight) if weight is None else weight
            for name, delta in (
                ("lora", (layer.lora_a, layer.lora_b, words, scale)),
                ("values", (values, words, scale)),
            ):
                made = f"kernel.effective_weights_{'from_values_' * (name == 'values')}out"
                (merged,) = rounded(made, [base], [delta], 6)
                features = (shape[2],) if name == "values" else ()
                y = torch.nn.functional.linear(x, merged, layer.bias)
                for one_product in ((6, None), (None, merged)):
                    forward, input_gradient, backward = (
                        getattr(OPS, f"masked_{name}_linear{part}") for part in ("", "_input_gradient", "_backward")
                    )
                    assert torch.equal(forward(x, weight, layer.bias, *delta, 0, *one_product), y)
                    dx = input_gradient(dy, weight, *delta, *features, 0, *one_product)
                    assert torch.equal(dx, dy @ merged)
                    both = backward(dy, x, weight, *delta, 0, True, True, *one_product)
                    assert torch.equal(both[0], dx)
                    alone = backward(dy, x, weight, *delta, 0, False, True)
                    assert all(torch.equal(one, other) for one, other in zip(both[1:], alone[1:], strict=True))


def test_a_seed_changes_nothing_in_fp32() -> None:
    layer = make_layer((77, 33, 65, 3), "10 %")
    arguments = (layer.x, layer.weight, None, layer.lora_a, layer.lora_b, layer.mask.words, torch.tensor(0.7), 0)
    assert torch.equal(OPS.masked_lora_linear(*arguments, 3), OPS.masked_lora_linear(*arguments))


# --- nothing beyond the weight ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_words_beyond_the_last_column_write_nothing(dtype: torch.dtype) -> None:
    """A weight between two guards, and words with every padding bit set: the guards stay, and so do the results."""
    n, k, guard = 7, 70, 64
    layer = make_layer((1, n, k, 3), "half", dtype, factor_dtype=torch.float32)
    scale, clean = torch.tensor(0.5), layer.mask.words
    dirty = clean.clone()
    dirty[:, -1] |= ~BitMask.full((1, k)).words[0, -1]
    values = torch.randn(layer.mask.count, generator=generator(1))
    lora, sparse = (layer.lora_a, layer.lora_b), (values,)

    def between_guards() -> tuple[Tensor, Tensor]:
        memory = torch.full((2 * guard + n * k,), 123.0, dtype=dtype)
        out = memory[guard : guard + n * k].view(n, k)
        out.copy_(layer.weight)
        return memory, out

    calls = {
        "effective_weight_out": lambda out, words: OPS.effective_weight_out(out, out, *lora, words, scale),
        "from values": lambda out, words: OPS.effective_weight_from_values_out(out, out, *sparse, words, scale),
        "scatter": lambda out, words: OPS.scatter_masked_(out, values.to(dtype), words),
        "many": lambda out, words: OPS.effective_weights_out(
            [out], [out], *([tensor] for tensor in (*lora, words, scale)), True, 2
        ),
        "many from values": lambda out, words: OPS.effective_weights_from_values_out(
            [out], [out], [values], [words], [scale], True, 2
        ),
    }
    for name, call in calls.items():
        results = []
        for words in (clean, dirty):
            memory, out = between_guards()
            call(out, words)
            assert bool((memory[:guard] == 123.0).all() and (memory[-guard:] == 123.0).all()), name
            results.append(out)
        assert torch.equal(*results), name
