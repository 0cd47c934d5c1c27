"""Masked LoRA and masked values: every regime, layout and dtype against the definition in float64, and the contracts.

Contracts: numerics (a small delta is not lost in a 16-bit weight), memory (nothing but the inputs is kept for
backward), work (no gradient that nobody asked for), determinism, and messages that name the wrong argument.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernel_testing import OPS, generator, opcheck
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import fade_kernels
from fade_kernels import BitMask, reference
from fade_kernels.masked_lora import REGIMES, force_regime

MASKS = ["empty", "few", "1 %", "10 %", "half", "full", "tiles", "rows"]
# T, N, K, r: panels of every width, rows and columns beside whole tiles and words, ranks beside whole vectors.
SHAPES = [(1, 1, 1, 1), (77, 33, 65, 3), (300, 96, 128, 16), (13, 70, 200, 20), (129, 64, 32, 128), (1040, 40, 100, 7)]
# Frobenius norm of the error over that of the result: rounding alone, a little more where terms of B A cancel.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


def make_mask(kind: str, rows: int, columns: int, seed: int) -> BitMask:
    random = torch.rand(rows, columns, generator=generator(seed))
    if kind == "tiles":
        tiles = torch.rand(-(-rows // 32), -(-columns // 32), generator=generator(seed)) < 0.3
        mask = tiles.repeat_interleave(32, 0).repeat_interleave(32, 1)[:rows, :columns]
    elif kind == "rows":
        mask = (torch.rand(rows, 1, generator=generator(seed)) < 0.3).expand(rows, columns)
    elif kind == "few":  # corners, edges and the middle
        mask = torch.zeros(rows, columns, dtype=torch.bool)
        for i in {0, rows // 2, rows - 1}:
            mask[i, [0, columns // 2, columns - 1]] = True
    else:
        mask = random < {"empty": 0.0, "1 %": 0.01, "10 %": 0.1, "half": 0.5, "full": 1.0}[kind]
    return BitMask.pack(mask)


@dataclass
class Layer:
    """Arguments of a masked linear layer and a gradient of its output."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor
    mask: BitMask
    grad_output: Tensor
    scale: float = 0.7

    def delta(self) -> Tensor:
        """Float64 [N, K]."""
        product = self.lora_b.double() @ self.lora_a.double()
        return torch.where(self.mask.unpack(), self.scale * product, 0.0)


def make_layer(
    shape: tuple[int, int, int, int],
    mask: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    factor_dtype: torch.dtype | None = None,
) -> Layer:
    t, n, k, r = shape

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        nonlocal seed
        seed += 1
        return torch.randn(*size, generator=generator(seed), dtype=torch.float64).to(dtype)

    factor_dtype = factor_dtype or dtype
    return Layer(
        x=normal(t, k),
        weight=normal(n, k),
        bias=normal(n),
        lora_a=normal(r, k, dtype=factor_dtype),
        lora_b=normal(n, r, dtype=factor_dtype),
        mask=make_mask(mask, n, k, seed),
        grad_output=normal(t, n),
    )


def error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected; where nothing is expected, of what is there."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).detach().norm() / (expected.detach().double().norm() or 1.0))


def gradients(
    function: Callable[..., Tensor], differentiable: list[Tensor], grad_output: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients with respect to leaves made of `differentiable`."""
    leaves = [tensor.detach().requires_grad_() for tensor in differentiable]
    output = function(*leaves)
    return output.detach(), torch.autograd.grad(output, leaves, grad_output)


def lora_gradients(layer: Layer, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    return gradients(
        lambda x, a, b: fade_kernels.masked_lora_linear(x, weight, bias, a, b, layer.mask, layer.scale),
        [layer.x, layer.lora_a, layer.lora_b],
        layer.grad_output,
    )


def expected_lora(layer: Layer, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same by autograd through the formula, in float64."""
    mask = layer.mask.unpack()

    def formula(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        delta = torch.where(mask, layer.scale * (b @ a), 0.0)
        base = 0.0 if weight is None else weight.double()
        return functional.linear(x, base + delta, None if bias is None else bias.double())

    inputs = [tensor.double() for tensor in (layer.x, layer.lora_a, layer.lora_b)]
    return gradients(formula, inputs, layer.grad_output.double())


def values_gradients(layer: Layer, weight: Tensor | None, values: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return gradients(
        lambda x, v: fade_kernels.masked_values_linear(x, weight, layer.bias, v, layer.mask, layer.scale),
        [layer.x, values],
        layer.grad_output,
    )


def expected_values(layer: Layer, weight: Tensor | None, values: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    mask = layer.mask.unpack()

    def formula(x: Tensor, v: Tensor) -> Tensor:
        delta = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, layer.scale * v)
        return functional.linear(x, delta if weight is None else weight.double() + delta, layer.bias.double())

    return gradients(formula, [layer.x.double(), values.double()], layer.grad_output.double())


# --- linear: every regime against float64 ----------------------------------------------------------------------------


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("mask", MASKS)
def test_linear_matches_definition(regime: str, mask: str) -> None:
    for seed, shape in enumerate(SHAPES):
        for dtype, with_weight in ((torch.float32, True), (torch.float32, False), (torch.float64, seed % 2 == 0)):
            layer = make_layer(shape, mask, dtype, seed)
            weight, bias = (layer.weight if with_weight else None), (layer.bias if seed % 3 else None)
            with force_regime(regime):
                y, grads = lora_gradients(layer, weight, bias)
            expected_y, expected_grads = expected_lora(layer, weight, bias)
            assert error(y, expected_y) <= TOLERANCE[dtype], (shape, dtype)
            for name, actual, expected in zip(("x", "lora_a", "lora_b"), grads, expected_grads, strict=True):
                assert error(actual, expected) <= TOLERANCE[dtype], (shape, dtype, name)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("mask", MASKS)
def test_values_linear_matches_definition(regime: str, mask: str) -> None:
    for seed, shape in enumerate(SHAPES[1:]):
        layer = make_layer(shape, mask, torch.float32, seed)
        values = torch.randn(layer.mask.count, generator=generator(seed))
        for weight in (layer.weight, None):
            with force_regime(regime):
                y, grads = values_gradients(layer, weight, values)
            expected_y, expected_grads = expected_values(layer, weight, values)
            assert error(y, expected_y) <= TOLERANCE[torch.float32], shape
            for name, actual, expected in zip(("x", "values"), grads, expected_grads, strict=True):
                assert error(actual, expected) <= TOLERANCE[torch.float32], (shape, name)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("mask", ["empty", "10 %", "full"])
def test_padding_bits_are_ignored(regime: str, mask: str) -> None:
    """Words that somebody overwrote, with every bit beyond the last column set: the same results, bit for bit."""
    for shape, dtype in (((77, 33, 65, 3), torch.float32), ((300, 70, 100, 16), torch.float64)):
        layer = make_layer(shape, mask, dtype)
        clean, scale, number = layer.mask.words, torch.tensor(layer.scale), REGIMES[regime]
        words = clean.clone()
        words[:, -1] |= ~BitMask.full((1, shape[2])).words[0, -1]
        values = torch.randn(layer.mask.count, generator=generator(1), dtype=dtype)

        def results(words: Tensor, layer: Layer, values: Tensor, scale: Tensor, number: int) -> list[Tensor]:
            x, dy, weight = layer.x, layer.grad_output, layer.weight
            lora, sparse = (layer.lora_a, layer.lora_b, words, scale), (values, words, scale)
            out = torch.empty_like(weight)
            OPS.effective_weight_from_values_out(out, weight, *sparse)
            return [
                OPS.masked_lora_linear(x, weight, layer.bias, *lora, number),
                OPS.masked_lora_linear_input_gradient(dy, weight, *lora, number),
                *OPS.masked_lora_linear_factor_gradients(dy, x, *lora, number),
                OPS.masked_values_linear(x, weight, layer.bias, *sparse, number),
                OPS.masked_values_linear_input_gradient(dy, weight, *sparse, x.shape[1], number),
                OPS.masked_values_linear_gradient(dy, x, *sparse, number),
                OPS.masked_factor_values(layer.lora_a, layer.lora_b, words, values.numel()),
                *OPS.masked_factor_gradients(weight, *lora),
                OPS.effective_weight(weight, *lora),
                out,
            ]

        given = (layer, values, scale, number)
        for actual, expected in zip(results(words, *given), results(clean, *given), strict=True):
            assert torch.equal(actual, expected), shape


def test_operators_refuse_sizes_that_do_not_fit() -> None:
    """Also where they are called without the checks in Python: nothing is read or written beyond a tensor."""
    layer = make_layer((13, 70, 200, 20), "half")
    words, scale, values = layer.mask.words, torch.tensor(0.7), torch.zeros(layer.mask.count)
    good = (layer.lora_a, layer.lora_b)
    for a, b, mask in [
        (layer.lora_a, layer.lora_b, words[:69]),
        (layer.lora_a, layer.lora_b, words[:, :6]),
        (layer.lora_a, layer.lora_b[:69], words),
        (layer.lora_a[:19], layer.lora_b, words),
        (layer.lora_a[:, :150], layer.lora_b, words),
    ]:
        for regime in REGIMES.values():
            with pytest.raises(RuntimeError):
                OPS.masked_lora_linear(layer.x, layer.weight, None, a, b, mask, scale, regime)
            with pytest.raises(RuntimeError):
                OPS.masked_lora_linear_factor_gradients(layer.grad_output, layer.x, a, b, mask, scale, regime)
        with pytest.raises(RuntimeError):
            OPS.effective_weight(layer.weight, a, b, mask, scale)
        with pytest.raises(RuntimeError):
            OPS.masked_factor_gradients(layer.weight, a, b, mask, scale)
    for regime in REGIMES.values():
        for x, dy in [(layer.x[:12], layer.grad_output), (layer.x[:, :199], layer.grad_output)]:
            with pytest.raises(RuntimeError):
                OPS.masked_lora_linear_factor_gradients(dy, x, *good, words, scale, regime)
            with pytest.raises(RuntimeError):
                OPS.masked_values_linear_gradient(dy, x, values, words, scale, regime)
        with pytest.raises(RuntimeError):
            OPS.masked_values_linear(layer.x, None, None, values[1:], words, scale, regime)
    for weight in (layer.weight[:69], layer.weight[:, :199]):
        with pytest.raises(RuntimeError):
            OPS.effective_weight(weight, *good, words, scale)
        with pytest.raises(RuntimeError):
            OPS.masked_factor_gradients(weight, *good, words, scale)
        with pytest.raises(RuntimeError):
            OPS.effective_weight_out(layer.weight.clone(), weight, *good, words, scale)


def test_tolerance_would_notice_a_wrong_kernel() -> None:
    layer = make_layer((77, 33, 65, 3), "10 %")
    right = expected_lora(layer, layer.weight, layer.bias)
    wrong_mask, wrong_scale, wrong_factor = (make_layer((77, 33, 65, 3), "10 %") for _ in range(3))
    flipped = layer.mask.unpack().clone()
    flipped[3, 64] = ~flipped[3, 64]
    wrong_mask.mask = BitMask.pack(flipped)
    wrong_scale.scale *= 1.001
    wrong_factor.lora_a[1, 40] *= 1.01
    for wrong in (wrong_mask, wrong_scale, wrong_factor):
        y, (grad_x, grad_a, grad_b) = expected_lora(wrong, layer.weight, layer.bias)
        assert error(y, right[0]) > 2 * TOLERANCE[torch.float32]
        assert error(grad_x, right[1][0]) > 2 * TOLERANCE[torch.float32]
        assert error(grad_b, right[1][2]) > 2 * TOLERANCE[torch.float32]
        if wrong is not wrong_factor:  # dA does not depend on A
            assert error(grad_a, right[1][1]) > 2 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("regime", REGIMES)
def test_strided_inputs(regime: str) -> None:
    layer = make_layer((60, 40, 70, 5), "10 %")
    expected_y, expected_grads = expected_lora(layer, layer.weight, layer.bias)
    wide = torch.zeros(60, 100)
    wide[:, 20:90] = layer.x
    variants = {
        "leading dimensions": layer.x.view(3, 4, 5, 70),
        "column major": layer.x.t().contiguous().t(),
        "columns of a wider tensor": wide[:, 20:90],
        "permuted": layer.x.view(3, 20, 70).transpose(0, 1).contiguous().transpose(0, 1),
    }
    for name, x in variants.items():
        strided = Layer(
            x=x,
            weight=layer.weight.t().contiguous().t(),
            bias=layer.bias,
            lora_a=layer.lora_a.t().contiguous().t(),
            lora_b=layer.lora_b.t().contiguous().t(),
            mask=layer.mask,
            grad_output=layer.grad_output.t().contiguous().t().reshape(*x.shape[:-1], 40),
        )
        with force_regime(regime):
            y, grads = lora_gradients(strided, strided.weight, strided.bias)
            assert y.shape == (*x.shape[:-1], 40)
            assert error(y.reshape(60, 40), expected_y) <= TOLERANCE[torch.float32], name
            for actual, expected in zip(grads, expected_grads, strict=True):
                assert error(actual.reshape(expected.shape), expected) <= TOLERANCE[torch.float32], name


@pytest.mark.parametrize("regime", REGIMES)
def test_expanded_grad_output(regime: str) -> None:
    layer = make_layer((60, 40, 70, 5), "10 %")
    layer.grad_output = torch.tensor(0.5).expand(60, 40)  # what y.sum().backward() gives: all strides are 0
    with force_regime(regime):
        _, grads = lora_gradients(layer, layer.weight, layer.bias)
    for actual, expected in zip(grads, expected_lora(layer, layer.weight, layer.bias)[1], strict=True):
        assert error(actual, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(
    ("leading", "n", "k"), [((0,), 4, 5), ((2, 0, 3), 4, 5), ((3,), 4, 0), ((3,), 0, 5), ((), 4, 5)]
)
def test_sizes_of_zero(regime: str, leading: tuple[int, ...], n: int, k: int) -> None:
    random = generator(1)
    x, grad_output = torch.randn(*leading, k, generator=random), torch.randn(*leading, n, generator=random)
    weight, bias = torch.randn(n, k, generator=random), torch.randn(n, generator=random)
    lora_a, lora_b = torch.randn(2, k, generator=random), torch.randn(n, 2, generator=random)
    layer = Layer(x, weight, bias, lora_a, lora_b, make_mask("half", n, k, 3), grad_output)
    with force_regime(regime):
        y, grads = lora_gradients(layer, weight, bias)
    expected_y, expected_grads = expected_lora(layer, weight, bias)
    assert error(y, expected_y) <= TOLERANCE[torch.float32]
    for actual, expected in zip(grads, expected_grads, strict=True):
        assert error(actual, expected) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_empty_mask_is_the_frozen_layer_bit_for_bit(dtype: torch.dtype) -> None:
    layer = make_layer((100, 48, 70, 4), "empty", dtype)
    for x in (layer.x, layer.x.view(4, 25, 70)):
        for bias in (layer.bias, None):
            y = fade_kernels.masked_lora_linear(x, layer.weight, bias, layer.lora_a, layer.lora_b, layer.mask)
            assert torch.equal(y, functional.linear(x, layer.weight, bias))


def test_full_mask_is_dense_lora() -> None:
    layer = make_layer((50, 48, 70, 4), "full", torch.float64)
    y = fade_kernels.masked_lora_linear(layer.x, layer.weight, None, layer.lora_a, layer.lora_b, layer.mask, 0.5)
    dense = layer.x @ layer.weight.t() + 0.5 * (layer.x @ layer.lora_a.t()) @ layer.lora_b.t()
    assert error(y, dense) <= 1e-14


def test_scale_may_be_a_tensor() -> None:
    layer = make_layer((20, 16, 40, 4), "half")
    arguments = (layer.x, layer.weight, None, layer.lora_a, layer.lora_b, layer.mask)
    expected = fade_kernels.masked_lora_linear(*arguments, 0.375)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(fade_kernels.masked_lora_linear(*arguments, torch.tensor(0.375, dtype=dtype)), expected)


# --- numerics contract: the delta must not drown in a 16-bit weight --------------------------------------------------


def projection(actual: Tensor, base: Tensor, term: Tensor) -> float:
    """How much of `term` is in actual - base: 1 if all of it, 0 if it was lost. Rounding of the output averages out."""
    return float(((actual.double() - base) * term).sum() / term.square().sum())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("regime", ["gather", "whole"])
@pytest.mark.parametrize("factor_dtype", [torch.float32, None])
def test_small_delta_survives(
    dtype: torch.dtype, tolerance: float, regime: str, factor_dtype: torch.dtype | None
) -> None:
    layer = make_layer((512, 256, 128, 8), "half", dtype, factor_dtype=factor_dtype)
    layer.scale = 1e-3 * float(layer.weight.double().norm() / (layer.delta().norm() / layer.scale))
    delta = layer.delta()
    assert 0.9e-3 < float(delta.norm() / layer.weight.double().norm()) < 1.1e-3
    x, weight, grad_output = layer.x.double(), layer.weight.double(), layer.grad_output.double()
    with force_regime(regime):
        y, (grad_x, grad_a, grad_b) = lora_gradients(layer, layer.weight, None)
        assert abs(projection(y, x @ weight.t(), x @ delta.t()) - 1) <= tolerance
        assert abs(projection(grad_x, grad_output @ weight, grad_output @ delta) - 1) <= tolerance
        alone, (alone_grad, _, _) = lora_gradients(layer, None, None)
    assert error(alone, x @ delta.t()) <= tolerance
    assert error(alone_grad, grad_output @ delta) <= tolerance
    _, (_, expected_a, expected_b) = expected_lora(layer, layer.weight, None)
    assert error(grad_a, expected_a) <= min(tolerance, 1e-2)
    assert error(grad_b, expected_b) <= min(tolerance, 1e-2)
    assert y.dtype == grad_x.dtype == dtype
    assert grad_a.dtype == grad_b.dtype == (factor_dtype or dtype)


def test_projection_notices_a_rounded_merge() -> None:
    layer = make_layer((512, 256, 128, 8), "half", torch.bfloat16)
    layer.scale = 1e-3 * float(layer.weight.double().norm() / (layer.delta().norm() / layer.scale))
    delta = layer.delta()
    merged = (layer.weight.double() + delta).bfloat16()
    y = layer.x.double() @ merged.double().t()
    x = layer.x.double()
    assert abs(projection(y, x @ layer.weight.double().t(), x @ delta.t()) - 1) > 0.05


# --- effective weight, factor values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
def test_effective_weight(dtype: torch.dtype, mask: str) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for seed, shape in enumerate(SHAPES):
        layer = make_layer(shape, mask, dtype, seed, factor_dtype=wide)
        arguments = (layer.lora_a, layer.lora_b, layer.mask, layer.scale)
        merged = fade_kernels.effective_weight(layer.weight, *arguments)
        exact = layer.weight.double() + layer.delta()
        assert merged.dtype == dtype
        assert torch.equal(merged[~layer.mask.unpack()], layer.weight[~layer.mask.unpack()])
        # One rounding to the dtype, after r + 2 operations in at least fp32.
        terms = layer.weight.double().abs() + layer.scale * layer.lora_b.double().abs() @ layer.lora_a.double().abs()
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + (shape[3] + 2) * torch.finfo(wide).eps * terms
        assert bool(((merged.double() - exact).abs() <= bound).all())
        out = torch.full_like(layer.weight, torch.nan)
        assert fade_kernels.effective_weight(layer.weight, *arguments, out=out) is out
        assert torch.equal(out, merged)
        strided = torch.full_like(layer.weight.t().contiguous(), torch.nan).t()
        assert torch.equal(fade_kernels.effective_weight(layer.weight, *arguments, out=strided), merged)
        own = layer.weight.clone()
        fade_kernels.effective_weight(own, *arguments, out=own)
        assert torch.equal(own, merged)


@pytest.mark.parametrize("mask", MASKS)
def test_masked_factor_values(mask: str) -> None:
    for seed, shape in enumerate(SHAPES):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            layer = make_layer(shape, mask, dtype, seed)
            values = fade_kernels.masked_factor_values(layer.lora_a, layer.lora_b, layer.mask)
            assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            expected = (layer.lora_b.double() @ layer.lora_a.double())[layer.mask.unpack()]
            assert error(values, expected) <= TOLERANCE[values.dtype]


# --- what is kept and what is computed -------------------------------------------------------------------------------


def saved_bytes(call: Callable[[], Tensor], inputs: list[Tensor]) -> int:
    """Bytes saved for backward in storages that are not the inputs'."""
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    extra: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            extra[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    assert output.requires_grad
    return sum(extra.values())


@pytest.mark.parametrize("regime", REGIMES)
def test_nothing_but_inputs_is_kept_for_backward(regime: str) -> None:
    layer = make_layer((64, 96, 128, 4), "10 %")
    x, a, b = (tensor.requires_grad_() for tensor in (layer.x, layer.lora_a, layer.lora_b))
    inputs = [x, a, b, layer.weight, layer.mask.words]
    values = torch.randn(layer.mask.count, requires_grad=True)
    with force_regime(regime):
        assert (
            saved_bytes(lambda: fade_kernels.masked_lora_linear(x, layer.weight, layer.bias, a, b, layer.mask), inputs)
            <= 8
        )  # the scale
        assert (
            saved_bytes(
                lambda: fade_kernels.masked_values_linear(x, layer.weight, None, values, layer.mask), [*inputs, values]
            )
            <= 8
        )
    images, kernel = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(12, 8, 3, 3)
    conv_a, conv_b = torch.randn(4, 8, 3, 3, requires_grad=True), torch.randn(12, 4, 1, 1, requires_grad=True)
    mask = make_mask("10 %", 12, 72, 0)
    assert (
        saved_bytes(
            lambda: fade_kernels.masked_lora_conv2d(images, kernel, None, conv_a, conv_b, mask),
            [images, kernel, conv_a, conv_b, mask.words],
        )
        <= 8
    )


class OperatorNames(TorchDispatchMode):
    """Names of the operators of fade_kernels that ran, and what those that make several gradients were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.needed: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "fade_kernels":
            self.names.append(func._opname)
            if func._opname.endswith("linear_backward"):
                regime = next(i for i, argument in enumerate(func._schema.arguments) if argument.name == "regime")
                self.needed.append(tuple(args[regime + 1 : regime + 3]))
        return func(*args, **(kwargs or {}))


def test_only_gradients_that_are_needed_are_computed() -> None:
    layer = make_layer((20, 16, 40, 4), "half")
    values = torch.randn(layer.mask.count)
    images = torch.randn(1, 2, 5, 5)
    conv_a, conv_b, conv_mask = torch.randn(3, 2, 3, 3), torch.randn(4, 3, 1, 1), make_mask("half", 4, 18, 0)
    calls: dict[str, tuple[Callable[..., Tensor], list[Tensor], str]] = {
        "masked_lora_linear": (
            lambda x, a, b: fade_kernels.masked_lora_linear(x, layer.weight, None, a, b, layer.mask),
            [layer.x, layer.lora_a, layer.lora_b],
            "factor_gradients",
        ),
        "masked_values_linear": (
            lambda x, v: fade_kernels.masked_values_linear(x, layer.weight, None, v, layer.mask),
            [layer.x, values],
            "gradient",
        ),
        "masked_lora_conv2d": (
            lambda x, a, b: fade_kernels.masked_lora_conv2d(x, None, None, a, b, conv_mask),
            [images, conv_a, conv_b],
            "factor_gradients",
        ),
        "masked_values_conv2d": (
            lambda x, v: fade_kernels.masked_values_conv2d(x, None, None, v, conv_mask, kernel_size=3),
            [images, torch.randn(conv_mask.count)],
            "gradient",
        ),
    }
    for name, (call, inputs, adapter) in calls.items():
        for needs_input in (True, False):
            leaves = [tensor.detach() for tensor in inputs]
            for i, leaf in enumerate(leaves):
                leaf.requires_grad_((i == 0) == needs_input)
            output = call(*leaves)
            with OperatorNames() as ran:
                output.sum().backward()
            mine = [operator for operator in ran.names if operator.startswith(name)]
            if name.endswith("linear"):
                assert mine == [f"{name}_backward"] and ran.needed == [(needs_input, not needs_input)]
            else:
                assert mine == [f"{name}_input_gradient" if needs_input else f"{name}_{adapter}"]


def test_weight_and_bias_that_are_not_frozen_get_their_gradients() -> None:
    layer = make_layer((20, 16, 40, 4), "half", torch.float64)
    words, scale = layer.mask.words, torch.tensor(0.5, dtype=torch.float64)
    _, actual = gradients(
        lambda w, b: fade_kernels.masked_lora_linear(layer.x, w, b, layer.lora_a, layer.lora_b, layer.mask, 0.5),
        [layer.weight, layer.bias],
        layer.grad_output,
    )
    _, expected = gradients(
        lambda w, b: reference.masked_lora_linear(layer.x, w, b, layer.lora_a, layer.lora_b, words, scale),
        [layer.weight, layer.bias],
        layer.grad_output,
    )
    for one, other in zip(actual, expected, strict=True):
        assert error(one, other) <= 1e-14


@pytest.mark.parametrize("regime", ["gather", "tile"])
def test_gradients_do_not_depend_on_the_number_of_threads(regime: str) -> None:
    layer = make_layer((700, 256, 160, 8), "10 %")
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            with force_regime(regime):
                results.append(lora_gradients(layer, None, None)[1][1:])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("regime", REGIMES)
def test_training_after_inference_mode(regime: str) -> None:
    layer = make_layer((40, 300, 128, 4), "10 %")
    with force_regime(regime):
        with torch.inference_mode():
            fade_kernels.masked_lora_linear(layer.x, layer.weight, None, layer.lora_a, layer.lora_b, layer.mask)
        _, grads = lora_gradients(layer, layer.weight, None)
    for actual, expected in zip(grads, expected_lora(layer, layer.weight, None)[1], strict=True):
        assert error(actual, expected) <= TOLERANCE[torch.float32]


CAPABILITY_CHECK = """
import test_masked_lora as tests
for regime in tests.REGIMES:
    for mask in ("1 %", "half", "tiles"):
        tests.test_linear_matches_definition(regime, mask)
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_every_instruction_set(capability: str) -> None:
    environment = {**os.environ, "FADE_CPU_CAPABILITY": capability}
    here = os.path.dirname(__file__)
    root = os.path.dirname(os.path.dirname(here))
    environment["PYTHONPATH"] = os.pathsep.join([here, root, environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CAPABILITY_CHECK], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- autograd, operators, autocast, compile --------------------------------------------------------------------------


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("mask", ["10 %", "full"])
def test_gradcheck_linear(regime: str, mask: str) -> None:
    layer = make_layer((6, 5, 35, 3), mask, torch.float64)
    values = torch.randn(layer.mask.count, dtype=torch.float64, generator=generator(1)).requires_grad_()
    x, a, b = (tensor.requires_grad_() for tensor in (layer.x, layer.lora_a, layer.lora_b))
    with force_regime(regime):
        assert torch.autograd.gradcheck(
            lambda x, a, b: fade_kernels.masked_lora_linear(x, layer.weight, layer.bias, a, b, layer.mask, 0.7),
            (x, a, b),
        )
        assert torch.autograd.gradcheck(
            lambda x, v: fade_kernels.masked_values_linear(x, layer.weight, None, v, layer.mask, 0.7), (x, values)
        )


def test_gradcheck_effective_weight_and_factor_values() -> None:
    layer = make_layer((1, 5, 35, 3), "half", torch.float64)
    weight, a, b = (tensor.requires_grad_() for tensor in (layer.weight, layer.lora_a, layer.lora_b))
    assert torch.autograd.gradcheck(
        lambda w, a, b: fade_kernels.effective_weight(w, a, b, layer.mask, 0.7), (weight, a, b)
    )
    assert torch.autograd.gradcheck(lambda a, b: fade_kernels.masked_factor_values(a, b, layer.mask), (a, b))


@pytest.mark.parametrize("weight", [True, False])
def test_opcheck_linear(weight: bool) -> None:
    layer = make_layer((6, 5, 35, 3), "half")
    scale = torch.tensor(0.7)
    x, a, b = (tensor.requires_grad_() for tensor in (layer.x, layer.lora_a, layer.lora_b))
    values = torch.randn(layer.mask.count, requires_grad=True)
    frozen = layer.weight if weight else None
    delta, sparse = (a, b, layer.mask.words, scale), (values, layer.mask.words, scale)
    opcheck(OPS.masked_lora_linear, (x, frozen, layer.bias, *delta, 0))
    opcheck(OPS.masked_values_linear, (x, frozen, layer.bias, *sparse, 0))
    with torch.no_grad():
        delta, sparse = tuple(t.detach() for t in delta), tuple(t.detach() for t in sparse)
        opcheck(OPS.masked_lora_linear_input_gradient, (layer.grad_output, frozen, *delta, 0))
        opcheck(OPS.masked_lora_linear_factor_gradients, (layer.grad_output, x.detach(), *delta, 0))
        opcheck(OPS.masked_values_linear_input_gradient, (layer.grad_output, frozen, *sparse, 35, 0))
        opcheck(OPS.masked_values_linear_gradient, (layer.grad_output, x.detach(), *sparse, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_effective_weights_are_those_of_each_layer(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layers = [make_layer(shape, "half", dtype, seed, factor_dtype=wide) for seed, shape in enumerate(SHAPES)]
    names = ("weight", "lora_a", "lora_b", "mask", "scale")
    weights, *rest = lists = [[getattr(layer, name) for layer in layers] for name in names]
    merged = fade_kernels.effective_weights(*lists)
    for i, result in enumerate(merged):
        assert torch.equal(result, fade_kernels.effective_weight(*(column[i] for column in lists)))
    own = [weight.clone() for weight in weights]
    assert fade_kernels.effective_weights(own, *rest, out=own)[0] is own[0]
    assert all(torch.equal(one, other) for one, other in zip(own, merged, strict=True))
    assert fade_kernels.effective_weights([], [], [], [], []) == []


def test_effective_weights_of_convolutions() -> None:
    lora_a, lora_b, weight = torch.randn(2, 3, 3, 3), torch.randn(4, 2, 1, 1), torch.randn(4, 3, 3, 3)
    mask = BitMask.full((4, 27))
    (merged,) = fade_kernels.effective_weights([weight], [lora_a], [lora_b], [mask], [0.5])
    assert error(merged, weight + 0.5 * torch.einsum("nr,rchw->nchw", lora_b[:, :, 0, 0], lora_a)) <= 1e-6


# (values, dtype, distance of neighbours): of both signs; fp16 below its normal and below its smallest numbers.
ROUNDED = {
    "bf16": (1.0, torch.bfloat16, 2.0**-7),
    "fp16": (1.0, torch.float16, 2.0**-10),
    "fp16, subnormal": (2.0**-15, torch.float16, 2.0**-24),
    "fp16, below the smallest": (2.0**-25, torch.float16, 2.0**-24),
}


@pytest.mark.parametrize("case", ROUNDED)
def test_stochastic_rounding_is_unbiased(case: str) -> None:
    size, dtype, step = ROUNDED[case]
    values = (size * (1 + 0.9 * torch.rand(1, 64))).repeat(400, 1) * torch.tensor([1.0, -1.0]).repeat(32)
    weight, lora_b = torch.zeros(400, 64, dtype=dtype), torch.ones(400, 1)
    lora = ([weight], [values[:1]], [lora_b], [BitMask.full((400, 64))], [1.0])
    draws = torch.cat(
        [fade_kernels.effective_weights(*lora, stochastic=True, seed=seed)[0].double() for seed in range(8)]
    )
    exact = values[0].double()
    assert ((draws - exact).abs() < step).all()
    fraction = (exact / step).abs().frac()
    deviation = step * (fraction * (1 - fraction) / len(draws)).sqrt()
    inexact = (fraction > 0.01) & (fraction < 0.99)
    assert 0.6 < float(((draws.mean(dim=0) - exact) / deviation)[inexact].square().mean().sqrt()) < 1.4


def test_stochastic_rounding_keeps_what_is_representable() -> None:
    kept = torch.tensor([[0.0, -0.0, 1.0, -2.5, 65504.0, 2.0**-24, float("inf"), -float("inf"), float("nan")]])
    for dtype in (torch.float16, torch.bfloat16):
        exact = kept.to(dtype).float()
        for seed in range(5):
            random = torch.randint(0, 2**32, exact.shape, generator=torch.Generator().manual_seed(seed))
            drawn = reference.round_stochastically(exact, dtype, random)
            assert torch.equal(drawn.float().nan_to_num(7.0), exact.nan_to_num(7.0))


def test_effective_weights_name_the_layer_of_bad_input() -> None:
    good = [torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(2, 1), BitMask.full((2, 3)), 1.0]
    for position, bad, message in (
        (0, torch.zeros(2, 4), "layer 1: weight"),
        (1, torch.zeros(2, 3), "layer 1: .*ranks must agree"),
        (3, BitMask.full((2, 4)), "layer 1: a mask of shape"),
        (4, torch.zeros(2), "layer 1: scale"),
    ):
        lists = [[item, bad if i == position else item] for i, item in enumerate(good)]
        with pytest.raises(ValueError, match=message):
            fade_kernels.effective_weights(*lists)
    with pytest.raises(ValueError, match="every layer needs one of each.*weight 1, lora_a 2"):
        fade_kernels.effective_weights([good[0]], *([item, item] for item in good[1:]))
    with pytest.raises(ValueError, match="layer 0: out must be contiguous"):
        fade_kernels.effective_weights(*([item] for item in good), out=[torch.zeros(3, 2).t()])


def test_opcheck_effective_weight() -> None:
    layer = make_layer((1, 5, 35, 3), "half")
    delta = (layer.lora_a, layer.lora_b, layer.mask.words, torch.tensor(0.7))
    sparse = (torch.randn(layer.mask.count), layer.mask.words, torch.tensor(0.7))
    grads = tuple(tensor.detach().clone().requires_grad_() for tensor in (layer.weight, layer.lora_a, layer.lora_b))
    opcheck(OPS.effective_weight, (*grads, *delta[2:]))
    opcheck(OPS.masked_factor_values, (*grads[1:], layer.mask.words, layer.mask.count))
    opcheck(OPS.masked_factor_gradients, (layer.weight, *delta))
    for stochastic in (False, True):
        two = [[tensor, tensor.clone()] for tensor in (layer.weight.half(), *delta)]
        opcheck(OPS.effective_weights_out, ([torch.empty(5, 35).half() for _ in range(2)], *two, stochastic, 1))
    for weight in (layer.weight, None):
        opcheck(OPS.effective_weight_out, (torch.empty(5, 35), weight, *delta))
        opcheck(OPS.effective_weight_from_values_out, (torch.empty(5, 35), weight, *sparse))


@pytest.mark.parametrize("density", ["1 %", "half", "full"])
def test_masked_factor_gradients(density: str) -> None:
    for shape in SHAPES:
        layer = make_layer(shape, density)
        gradient = torch.randn(layer.weight.shape, generator=generator(9))
        delta = (layer.lora_a, layer.lora_b, layer.mask.words, torch.tensor(0.7))
        expected = reference.masked_factor_gradients(gradient.double(), *(t.double() for t in delta[:2]), *delta[2:])
        for actual, one in zip(OPS.masked_factor_gradients(gradient, *delta), expected, strict=True):
            assert error(actual, one) <= TOLERANCE[torch.float32], shape


def test_autocast() -> None:
    layer = make_layer((12, 16, 40, 4), "half")
    values = torch.randn(layer.mask.count)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, grads = lora_gradients(layer, layer.weight, layer.bias)
        sparse = fade_kernels.masked_values_linear(layer.x, layer.weight, layer.bias, values, layer.mask)
    by_hand = fade_kernels.masked_lora_linear(
        layer.x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16(), layer.lora_a, layer.lora_b, layer.mask, 0.7
    )
    assert y.dtype == sparse.dtype == torch.bfloat16
    assert torch.equal(y, by_hand)
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    for actual, expected in zip(grads, expected_lora(layer, layer.weight, layer.bias)[1], strict=True):
        assert error(actual, expected) <= 1e-2


class Block(torch.nn.Module):
    """A masked linear and a masked convolution with another scale at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = make_layer((8, 16, 40, 4), "half")
        self.lora_a = torch.nn.Parameter(self.layer.lora_a)
        self.lora_b = torch.nn.Parameter(self.layer.lora_b)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = fade_kernels.masked_lora_linear(
            x, self.layer.weight, None, self.lora_a, self.lora_b, self.layer.mask, scale
        )
        return torch.relu(y).sum()


def test_compile_without_graph_breaks_or_recompilation() -> None:
    torch.compiler.reset()
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for i, scale in enumerate((0.5, 1.0, 2.0)):
        x = torch.randn(8, 40, generator=generator(i))
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            loss = compiled(x, torch.tensor(scale))
        compiled_grads = torch.autograd.grad(loss, list(block.parameters()))
        expected = block(x, torch.tensor(scale))
        grads = torch.autograd.grad(expected, list(block.parameters()))
        assert error(loss, expected) <= 1e-6
        assert all(error(one, other) <= 1e-6 for one, other in zip(compiled_grads, grads, strict=True))


# --- bad input -------------------------------------------------------------------------------------------------------


BAD_LINEAR: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x features": ({"x": torch.zeros(3, 39)}, ValueError, "x .*40 features"),
    "x without dimensions": ({"x": torch.zeros(())}, ValueError, "x "),
    "x integer": ({"x": torch.zeros(3, 40, dtype=torch.int64)}, TypeError, "x must be"),
    "x dtype": ({"x": torch.zeros(3, 40, dtype=torch.float64)}, TypeError, "dtypes must agree.*x torch.float64"),
    "weight shape": ({"weight": torch.zeros(16, 41)}, ValueError, "weight"),
    "weight dtype": ({"weight": torch.zeros(16, 40).half()}, TypeError, "weight torch.float16"),
    "bias shape": ({"bias": torch.zeros(15)}, ValueError, "bias"),
    "lora_a dimensions": ({"lora_a": torch.zeros(4, 40, 1, 1)}, ValueError, "mask|lora_a"),
    "lora_b dimensions": ({"lora_b": torch.zeros(16)}, ValueError, "lora_b"),
    "rank 0": ({"lora_a": torch.zeros(0, 40), "lora_b": torch.zeros(16, 0)}, ValueError, "rank must be at least 1"),
    "ranks differ": ({"lora_b": torch.zeros(16, 3)}, ValueError, "ranks must agree"),
    "factor dtype": ({"lora_a": torch.zeros(4, 40, dtype=torch.int32)}, TypeError, "lora_a must be"),
    "mask type": ({"mask": torch.ones(16, 40, dtype=torch.bool)}, TypeError, "BitMask"),
    "mask shape": ({"mask": BitMask.full((16, 41))}, ValueError, "mask of shape"),
    "scale shape": ({"scale": torch.ones(1)}, ValueError, "scale"),
    "scale gradient": ({"scale": torch.ones((), requires_grad=True)}, ValueError, "scale must not require"),
    "scale device": ({"scale": torch.ones((), device="meta")}, ValueError, "scale is on meta"),
    "device": ({"weight": torch.zeros(16, 40, device="meta")}, ValueError, "one device.*weight on meta"),
}


@pytest.mark.parametrize("case", BAD_LINEAR)
def test_bad_input_names_the_argument(case: str) -> None:
    changes, exception, message = BAD_LINEAR[case]
    arguments: dict[str, Any] = {
        "x": torch.zeros(3, 40),
        "weight": torch.zeros(16, 40),
        "bias": torch.zeros(16),
        "lora_a": torch.zeros(4, 40),
        "lora_b": torch.zeros(16, 4),
        "mask": BitMask.full((16, 40)),
        "scale": 1.0,
    }
    fade_kernels.masked_lora_linear(**arguments)
    with pytest.raises(exception, match=message):
        fade_kernels.masked_lora_linear(**{**arguments, **changes})


def test_bad_values_and_regime() -> None:
    mask = BitMask.full((2, 3))
    with pytest.raises(ValueError, match="values has 5 elements, but the mask has 6"):
        fade_kernels.masked_values_linear(torch.zeros(1, 3), None, None, torch.zeros(5), mask)
    with pytest.raises(ValueError, match="values must be one-dimensional"):
        fade_kernels.masked_values_linear(torch.zeros(1, 3), None, None, torch.zeros(2, 3), mask)
    with pytest.raises(ValueError, match="unknown regime 'dense'"), force_regime("dense"):
        pass
    with pytest.raises(ValueError, match="out .* must have the weight's shape"):
        fade_kernels.effective_weight(
            torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(2, 1), mask, out=torch.zeros(2, 4)
        )
