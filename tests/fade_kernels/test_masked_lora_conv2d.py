"""Masked convolutions against the definition in float64: windows, dtypes, layouts, autograd, operators, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_testing import OPS, generator, opcheck
from torch import Tensor
from torch.nn import functional

import fade_kernels
from fade_kernels import BitMask

# n, C_in, C_out, height, width, kernel, stride, padding, dilation, r
WINDOWS = [
    (2, 3, 5, 7, 6, (3, 3), 1, 1, 1, 2),
    (1, 8, 4, 9, 11, (3, 3), 2, 1, 1, 16),
    (3, 5, 33, 8, 8, (1, 1), 1, 0, 1, 4),
    (1, 5, 7, 8, 8, (1, 1), 2, 0, 1, 4),
    (2, 4, 6, 10, 9, (3, 2), (2, 1), (0, 2), (1, 2), 1),
    (0, 3, 5, 7, 6, (3, 3), 1, 1, 1, 2),
]
DENSITIES = [0.0, 0.1, 1.0]


def error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / (expected.norm() or 1.0))


class Convolution:
    """Arguments of a masked convolution, and what it is in float64."""

    def __init__(self, window: tuple[Any, ...], density: float, dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
        n, c_in, c_out, height, width, kernel, stride, padding, dilation, r = window
        random = generator(11)

        def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*size, generator=random, dtype=torch.float64).to(dtype)

        self.x = normal(n, c_in, height, width)
        self.weight, self.bias = normal(c_out, c_in, *kernel), normal(c_out)
        self.lora_a = normal(r, c_in, *kernel, dtype=factor_dtype)
        self.lora_b = normal(c_out, r, 1, 1, dtype=factor_dtype)
        self.selected = torch.rand(c_out, c_in, *kernel, generator=random) < density
        self.mask = BitMask.pack(self.selected)
        self.values = normal(self.mask.count, dtype=factor_dtype)
        self.window = {"stride": stride, "padding": padding, "dilation": dilation}
        self.kernel = kernel

    def lora(self, weight: Tensor | None, bias: Tensor | None) -> Callable[..., Tensor]:
        return lambda x, a, b: fade_kernels.masked_lora_conv2d(x, weight, bias, a, b, self.mask, 0.7, **self.window)

    def with_values(self, weight: Tensor | None, bias: Tensor | None) -> Callable[..., Tensor]:
        return lambda x, v: fade_kernels.masked_values_conv2d(
            x, weight, bias, v, self.mask, 0.7, **self.window, kernel_size=self.kernel
        )

    def expected(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, delta: Tensor) -> Tensor:
        base = 0.0 if weight is None else weight.double()
        return functional.conv2d(x, base + delta, None if bias is None else bias.double(), **self.window)

    def expected_lora(self, weight: Tensor | None, bias: Tensor | None) -> Callable[..., Tensor]:
        def formula(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            product = (b.flatten(1) @ a.flatten(1)).reshape(self.selected.shape)
            return self.expected(x, weight, bias, torch.where(self.selected, 0.7 * product, 0.0))

        return formula

    def expected_values(self, weight: Tensor | None, bias: Tensor | None) -> Callable[..., Tensor]:
        def formula(x: Tensor, v: Tensor) -> Tensor:
            zero = torch.zeros(self.selected.shape, dtype=torch.float64)
            return self.expected(x, weight, bias, zero.masked_scatter(self.selected, 0.7 * v))

        return formula


def compare(
    actual: Callable[..., Tensor], expected: Callable[..., Tensor], inputs: list[Tensor], tolerance: float
) -> None:
    """Output and all gradients, for a random gradient of the output."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y, expected_y = actual(*leaves), expected(*exact)
    assert y.dtype == inputs[0].dtype
    assert error(y, expected_y) <= tolerance
    grad_output = torch.randn(y.shape, generator=generator(5)).to(y.dtype)
    grads = torch.autograd.grad(y, leaves, grad_output)
    expected_grads = torch.autograd.grad(expected_y, exact, grad_output.double())
    for i, (one, other) in enumerate(zip(grads, expected_grads, strict=True)):
        assert one.dtype == inputs[i].dtype
        assert error(one, other) <= tolerance, f"gradient of argument {i}"


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(
    ("dtype", "factor_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 3e-6),
        (torch.float64, torch.float64, 1e-14),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.float16, torch.float16, 2e-3),
    ],
    ids=str,
)
def test_matches_definition(
    window: tuple[Any, ...], density: float, dtype: torch.dtype, factor_dtype: torch.dtype, tolerance: float
) -> None:
    layer = Convolution(window, density, dtype, factor_dtype)
    for weight, bias in ((layer.weight, layer.bias), (layer.weight, None), (None, None)):
        inputs = [layer.x, layer.lora_a, layer.lora_b]
        compare(layer.lora(weight, bias), layer.expected_lora(weight, bias), inputs, tolerance)
        compare(
            layer.with_values(weight, bias), layer.expected_values(weight, bias), [layer.x, layer.values], tolerance
        )


def test_channels_last() -> None:
    layer = Convolution(WINDOWS[0], 0.1, torch.float32, torch.float32)
    x = layer.x.to(memory_format=torch.channels_last)
    weight = layer.weight.to(memory_format=torch.channels_last)
    compare(layer.lora(weight, None), layer.expected_lora(weight, None), [x, layer.lora_a, layer.lora_b], 3e-6)


def test_empty_mask_is_the_frozen_layer_bit_for_bit() -> None:
    for window in WINDOWS:
        layer = Convolution(window, 0.0, torch.float32, torch.float32)
        y = layer.lora(layer.weight, layer.bias)(layer.x, layer.lora_a, layer.lora_b)
        assert torch.equal(y, functional.conv2d(layer.x, layer.weight, layer.bias, **layer.window))


def test_small_delta_survives_a_16_bit_weight() -> None:
    layer = Convolution((4, 32, 32, 12, 12, (3, 3), 1, 1, 1, 8), 0.5, torch.bfloat16, torch.float32)
    delta = torch.where(layer.selected, (layer.lora_b.flatten(1) @ layer.lora_a.flatten(1)).reshape(32, 32, 3, 3), 0.0)
    scale = 1e-3 * float(layer.weight.double().norm() / delta.double().norm())
    y = fade_kernels.masked_lora_conv2d(
        layer.x, layer.weight, None, layer.lora_a, layer.lora_b, layer.mask, scale, **layer.window
    )
    base = functional.conv2d(layer.x.double(), layer.weight.double(), **layer.window)
    term = functional.conv2d(layer.x.double(), scale * delta.double(), **layer.window)
    kept = float(((y.double() - base) * term).sum() / term.square().sum())
    assert abs(kept - 1) <= 3e-2


@pytest.mark.parametrize("window", WINDOWS[:5], ids=str)
def test_gradcheck(window: tuple[Any, ...]) -> None:
    layer = Convolution((*window[:9], 2), 0.2, torch.float64, torch.float64)
    x, a, b, values = (t.requires_grad_() for t in (layer.x, layer.lora_a, layer.lora_b, layer.values))
    assert torch.autograd.gradcheck(layer.lora(layer.weight, layer.bias), (x, a, b), fast_mode=True)
    assert torch.autograd.gradcheck(layer.with_values(layer.weight, None), (x, values), fast_mode=True)


def test_weight_and_bias_that_are_not_frozen_get_their_gradients() -> None:
    layer = Convolution(WINDOWS[1], 0.2, torch.float64, torch.float64)
    weight, bias = layer.weight.requires_grad_(), layer.bias.requires_grad_()
    arguments = (layer.lora_a, layer.lora_b, layer.mask, 0.7)
    assert torch.autograd.gradcheck(
        lambda w, b: fade_kernels.masked_lora_conv2d(layer.x, w, b, *arguments, **layer.window),
        (weight, bias),
        fast_mode=True,
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["", "channels last"])
@pytest.mark.parametrize("weight", [True, False])
def test_opcheck(weight: bool, layout: torch.memory_format) -> None:
    layer = Convolution(WINDOWS[0], 0.3, torch.float32, torch.float32)
    images = layer.x.contiguous(memory_format=layout)
    x, a, b, values = (t.requires_grad_() for t in (images, layer.lora_a, layer.lora_b, layer.values))
    frozen = layer.weight if weight else None
    words, scale, window = layer.mask.words, torch.tensor(0.7), ([1, 1], [1, 1], [1, 1])
    opcheck(OPS.masked_lora_conv2d, (x, frozen, layer.bias, a, b, words, scale, *window))
    opcheck(OPS.masked_values_conv2d, (x, frozen, layer.bias, values, words, scale, [3, 3], *window))
    x, a, b, values = (t.detach() for t in (x, a, b, values))
    dy = torch.randn(2, 5, 7, 6).contiguous(memory_format=layout)
    opcheck(OPS.masked_lora_conv2d_input_gradient, (dy, frozen, a, b, words, scale, list(x.shape), *window))
    opcheck(OPS.masked_lora_conv2d_factor_gradients, (dy, x, a, b, words, scale, *window))
    opcheck(OPS.masked_values_conv2d_input_gradient, (dy, frozen, values, words, scale, list(x.shape), [3, 3], *window))
    opcheck(OPS.masked_values_conv2d_gradient, (dy, x, values, words, scale, [3, 3], *window))


def test_autocast() -> None:
    layer = Convolution(WINDOWS[0], 0.3, torch.float32, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer.lora(layer.weight, layer.bias)(layer.x, layer.lora_a, layer.lora_b)
    by_hand = layer.lora(layer.weight.bfloat16(), layer.bias.bfloat16())(layer.x.bfloat16(), layer.lora_a, layer.lora_b)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, by_hand)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "groups": ({"groups": 2}, ValueError, "groups is 2"),
    "x dimensions": ({"x": torch.zeros(4, 6, 6)}, ValueError, "x "),
    "x channels": ({"x": torch.zeros(1, 3, 6, 6)}, ValueError, "x .*4"),
    "image too small": ({"x": torch.zeros(1, 4, 2, 6)}, ValueError, "smaller than the kernel"),
    "weight": ({"weight": torch.zeros(5, 4, 1, 1)}, ValueError, "weight"),
    "bias": ({"bias": torch.zeros(4)}, ValueError, "bias"),
    "lora_b": ({"lora_b": torch.zeros(5, 2)}, ValueError, "lora_b"),
    "lora_b kernel": ({"lora_b": torch.zeros(5, 2, 3, 3)}, ValueError, "lora_b"),
    "mask": ({"mask": BitMask.full((5, 37))}, ValueError, "mask of shape"),
    "dtype": ({"x": torch.zeros(1, 4, 6, 6).half()}, TypeError, "x torch.float16"),
    "stride": ({"stride": 0}, ValueError, "stride"),
    "padding by name": ({"padding": "same"}, ValueError, "'same' is no number: pad the input first"),
    "padding": ({"padding": -1}, ValueError, "padding"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case: str) -> None:
    changes, exception, message = BAD[case]
    arguments: dict[str, Any] = {
        "x": torch.zeros(1, 4, 6, 6),
        "weight": torch.zeros(5, 4, 3, 3),
        "bias": torch.zeros(5),
        "lora_a": torch.zeros(2, 4, 3, 3),
        "lora_b": torch.zeros(5, 2, 1, 1),
        "mask": BitMask.full((5, 36)),
    }
    fade_kernels.masked_lora_conv2d(**arguments)
    with pytest.raises(exception, match=message):
        fade_kernels.masked_lora_conv2d(**{**arguments, **changes})


def test_values_need_a_kernel_size() -> None:
    with pytest.raises(ValueError, match="kernel_size is needed"):
        fade_kernels.masked_values_conv2d(torch.zeros(1, 4, 6, 6), None, None, torch.zeros(180), BitMask.full((5, 36)))
