"""A small delta in the fp16 outputs of every path of a CUDA tensor: kept on average, forward and for dX."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fade_kernels.cuda import conv2d
from fade_kernels.masked_lora import REGIMES
from fade_kernels.registration import KERNELS
from fade_kernels.window import Window
from tests.delta_survival import Layer, assert_kept, share

# Rows of x for a share within 1 %: few bits make a small x Delta^T, of which rounding leaves less.
TOKENS = {0.01: 3072, 0.1: 1024, 1.0: 512}
IMAGES = {0.01: 8, 0.1: 2, 1.0: 1}


def arguments(layer: Layer, values: bool, sign: float) -> tuple[Tensor, ...]:
    return (*layer.adapter(values), layer.mask.words, torch.tensor(sign * layer.scale))


def shares(
    layer: Layer, values: bool, forward: Callable[..., Tensor], backward: Callable[..., Tensor], *rest: object
) -> dict[str, float]:
    def y(sign: float) -> Tensor:
        return forward(layer.x, layer.weight, None, *arguments(layer, values, sign), *rest[1:])

    def dx(sign: float) -> Tensor:
        return backward(layer.grad_output, layer.weight, *arguments(layer, values, sign), *rest[0], *rest[1:])

    return {"y": share(layer.term, y), "dX": share(layer.gradient_term, dx)}


@pytest.mark.parametrize("density", list(TOKENS))
@pytest.mark.parametrize("path", ["gather", "tile", "whole"])
def test_linear(path: str, density: float) -> None:
    layer = Layer(torch.float16, TOKENS[density], 128, 128, density)
    for values in (False, True):
        name = "masked_values_linear" if values else "masked_lora_linear"
        kernels = KERNELS[name], KERNELS[name + "_input_gradient"]
        assert_kept(shares(layer, values, *kernels, (128,) if values else (), REGIMES[path]))


def test_ranks_beyond_those_of_the_tile_kernels() -> None:
    layer = Layer(torch.float16, 1024, 128, 128, 0.1, rank=129)
    kernels = KERNELS["masked_lora_linear"], KERNELS["masked_lora_linear_input_gradient"]
    assert_kept(shares(layer, False, *kernels, (), REGIMES["tile"]))


CONVOLUTIONS = [(1, 0.1, False), *((3, density, one) for density in IMAGES for one in (False, True))]


@pytest.mark.parametrize(("kernel", "density", "one_convolution"), CONVOLUTIONS)
def test_convolution(kernel: int, density: float, one_convolution: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv2d, "_one_convolution", lambda x: one_convolution and x.dtype == torch.float32)
    layer = Layer(torch.float16, IMAGES[density], 48, 40, density, kernel=kernel, side=32)
    window = Window([1, 1], [kernel // 2] * 2, [1, 1])
    for values in (False, True):
        name = "masked_values_conv2d" if values else "masked_lora_conv2d"
        place = ([kernel, kernel],) if values else ()

        def forward(x: Tensor, *rest: object, name: str = name, place: tuple = place) -> Tensor:
            return KERNELS[name](x, *rest[:-1], *place, rest[-1])

        size = (list(layer.x.shape), *place)
        backward = KERNELS[name + "_input_gradient"]
        assert_kept(shares(layer, values, forward, backward, size, window))
