"""The backward operators of the masked linears: one call for all gradients, against the definitions in float64.

What is particular to one call: which gradients are asked for, and dY's panels that serve two of them where both are
gathered. Everything that the operators it is composed of share: `test_masked_lora.py`.
"""

import os
import subprocess
import sys

import pytest
import torch
from kernel_testing import OPS, generator, opcheck
from test_masked_lora import MASKS, SHAPES, TOLERANCE, Layer, error, make_layer
from torch import Tensor

import fade_kernels
from fade_kernels import reference
from fade_kernels.masked_lora import REGIMES

# Beside the usual shapes: enough rows for several panels and parts, and a wide layer whose products are gathered.
LAYERS = [*SHAPES, (256, 320, 352, 16)]
NEEDS = [(True, True), (True, False), (False, True), (False, False)]


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def lora_arguments(layer: Layer, weight: Tensor | None) -> tuple[Tensor | None, ...]:
    scale = torch.tensor(layer.scale, dtype=torch.float64)
    return layer.grad_output, layer.x, weight, layer.lora_a, layer.lora_b, layer.mask.words, scale


def values_arguments(layer: Layer, weight: Tensor | None, values: Tensor) -> tuple[Tensor | None, ...]:
    scale = torch.tensor(layer.scale, dtype=torch.float64)
    return layer.grad_output, layer.x, weight, values, layer.mask.words, scale


def check(
    actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], needed: tuple[bool, ...], tolerance: float, what: object
) -> None:
    assert len(actual) == len(expected)
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if needed[i]:
            assert error(one, other) <= tolerance, (what, i)
        else:
            assert one.shape == (0,), (what, i)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("mask", MASKS)
def test_backward_matches_definition(regime: str, mask: str) -> None:
    for seed, shape in enumerate(LAYERS):
        dtype = torch.float64 if seed % 3 == 1 else torch.float32
        layer = make_layer(shape, mask, dtype, 10 * seed)
        values = torch.randn(layer.mask.count, generator=generator(seed), dtype=dtype)
        for weight in (layer.weight, None):
            lora, sparse = lora_arguments(layer, weight), values_arguments(layer, weight, values)
            needs = NEEDS[seed % 4] if weight is None else (True, True)
            dy, x, w, a, b, words, scale = lora
            wide = (*double(dy, x, w), *double(a, b), words, scale, 0, True, True)
            expected = reference.masked_lora_linear_backward(*wide)
            actual = OPS.masked_lora_linear_backward(*lora, REGIMES[regime], *needs)
            check(actual, expected, (needs[0], needs[1], needs[1]), TOLERANCE[dtype], (shape, needs))
            wide = (*double(dy, x, w, values), words, scale, 0, True, True)
            expected = reference.masked_values_linear_backward(*wide)
            actual = OPS.masked_values_linear_backward(*sparse, REGIMES[regime], *needs)
            check(actual, expected, needs, TOLERANCE[dtype], (shape, needs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    layer = make_layer((200, 96, 130, 5), "1 %", dtype, factor_dtype=torch.float32)
    dy, x, w, a, b, words, scale = lora_arguments(layer, layer.weight)
    expected = reference.masked_lora_linear_backward(*double(dy, x, w, a, b), words, scale, 0, True, True)
    grad_x, *factors = OPS.masked_lora_linear_backward(dy, x, w, a, b, words, scale, REGIMES["gather"], True, True)
    assert grad_x.dtype == dtype and [factor.dtype for factor in factors] == [torch.float32] * 2
    # To nearest, once: an ulp at most where fp32's own error lies across a tie.
    assert float((grad_x == expected[0].to(dtype)).double().mean()) > 0.99
    for actual, one in zip(factors, expected[1:], strict=True):
        assert error(actual, one) <= 1e-5


@pytest.mark.parametrize("regime", REGIMES)
def test_strides(regime: str) -> None:
    layer = make_layer((120, 70, 97, 5), "10 %", seed=3)
    dy, x, w, a, b, words, scale = lora_arguments(layer, layer.weight)
    expected = reference.masked_lora_linear_backward(*double(dy, x, w, a, b), words, scale, 0, True, True)
    wide = torch.full((120, 140), torch.nan)
    wide[:, 21:91] = dy
    turned = [tensor.t().contiguous().t() for tensor in (x, w, a, b)]
    for grad_output in (wide[:, 21:91], dy.t().contiguous().t(), dy.reshape(2, 3, 20, 70)):
        rows = turned[0].reshape(*grad_output.shape[:-1], 97)
        actual = OPS.masked_lora_linear_backward(
            grad_output, rows, *turned[1:], words, scale, REGIMES[regime], True, True
        )
        assert actual[0].shape == rows.shape
        flat = (actual[0].reshape(120, 97), *actual[1:])
        check(flat, expected, (True, True, True), TOLERANCE[torch.float32], grad_output.stride())


def test_backward_does_not_depend_on_the_number_of_threads() -> None:
    """Fewer threads gather all from one set of panels, more share the mask's rows out."""
    layer = make_layer((256, 128, 160, 8), "1 %", seed=5)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(OPS.masked_lora_linear_backward(*lora_arguments(layer, None), 1, True, True))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


CAPABILITY_CHECK = """
import test_masked_lora_backward as tests
for regime in tests.REGIMES:
    for mask in ("1 %", "half", "tiles"):
        tests.test_backward_matches_definition(regime, mask)
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


def test_opcheck() -> None:
    layer = make_layer((6, 5, 35, 3), "half")
    values = torch.randn(layer.mask.count)
    for needs, weight in ((NEEDS[0], layer.weight), (NEEDS[1], None)):
        opcheck(OPS.masked_lora_linear_backward, (*lora_arguments(layer, weight), 0, *needs))
        opcheck(OPS.masked_values_linear_backward, (*values_arguments(layer, weight, values), 0, *needs[::-1]))


def test_sizes_that_do_not_fit_are_refused() -> None:
    layer = make_layer((13, 70, 200, 20), "half")
    dy, x, w, a, b, words, scale = lora_arguments(layer, layer.weight)
    values = torch.zeros(layer.mask.count)
    for regime in REGIMES.values():
        for bad in ((dy[:12], x, w, a, b, words), (dy, x[:, :199], w, a, b, words), (dy, x, w, a, b, words[:69])):
            with pytest.raises(RuntimeError):
                OPS.masked_lora_linear_backward(*bad, scale, regime, True, True)
        with pytest.raises(RuntimeError):
            OPS.masked_values_linear_backward(dy, x, w, values[1:], words, scale, regime, True, True)
        with pytest.raises(RuntimeError):
            OPS.masked_values_linear_backward(dy[:12], x, w, values, words, scale, regime, True, True)


def test_autograd_calls_one_operator() -> None:
    """All gradients that are needed in one call; none that is not."""
    layer = make_layer((20, 16, 40, 4), "half")
    x, a, b = (tensor.requires_grad_() for tensor in (layer.x, layer.lora_a, layer.lora_b))
    y = fade_kernels.masked_lora_linear(x, layer.weight, None, a, b, layer.mask)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(y, (x, a, b), layer.grad_output)
    names = [event.name for event in profile.events() if event.name.startswith("fade_kernels::")]
    assert names == ["fade_kernels::masked_lora_linear_backward"]
