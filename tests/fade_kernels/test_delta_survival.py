"""A small delta in 16-bit outputs: kept on average by the CPU kernels and by the definitions; the one-product mode."""

from types import SimpleNamespace

import pytest
import torch
from kernel_testing import OPS, opcheck
from torch import Tensor

import fade_kernels
from fade_kernels import reference
from fade_kernels.masked_lora import REGIMES
from fade_kernels.window import Window
from tests.delta_survival import Layer, assert_kept, fresh_generator, share

HALVES = [torch.bfloat16, torch.float16]
# Rows of x for a share within 1 %: outputs of bf16 are 8 times coarser, and few bits make a small x Delta^T.
TOKENS = {
    (torch.bfloat16, 0.01): 8192, (torch.bfloat16, 0.1): 2048, (torch.bfloat16, 1.0): 1024,
    (torch.float16, 0.01): 1024, (torch.float16, 0.1): 512, (torch.float16, 1.0): 256,
}  # fmt: skip
REGIME = {0.01: "gather", 0.1: "tile", 1.0: "whole"}
WINDOW = Window([1, 1], [1, 1], [1, 1])
DEFINITIONS = SimpleNamespace(**{name: getattr(reference, name) for name in dir(reference)})
SOURCES = pytest.mark.parametrize("operators", [OPS, DEFINITIONS], ids=["cpu", "definition"])


def arguments(layer: Layer, values: bool, sign: float) -> tuple[Tensor, ...]:
    return (*layer.adapter(values), layer.mask.words, torch.tensor(sign * layer.scale))


@SOURCES
@pytest.mark.parametrize("values", [False, True], ids=["factors", "values"])
@pytest.mark.parametrize("density", list(REGIME))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_linear(operators: SimpleNamespace, dtype: torch.dtype, density: float, values: bool) -> None:
    layer = Layer(dtype, TOKENS[dtype, density], 512, 512, density)
    name = "masked_values_linear" if values else "masked_lora_linear"
    forward, backward = (getattr(operators, name + suffix) for suffix in ("", "_input_gradient"))
    regime, size = REGIMES[REGIME[density]], (512,) if values else ()

    def y(sign: float) -> Tensor:
        return forward(layer.x, layer.weight, None, *arguments(layer, values, sign), regime)

    def dx(sign: float) -> Tensor:
        return backward(layer.grad_output, layer.weight, *arguments(layer, values, sign), *size, regime)

    assert_kept({"y": share(layer.term, y), "dX": share(layer.gradient_term, dx)})


@SOURCES
@pytest.mark.parametrize("values", [False, True], ids=["factors", "values"])
@pytest.mark.parametrize(("dtype", "density"), [(torch.bfloat16, 0.1), (torch.float16, 0.01), (torch.float16, 1.0)])
def test_convolution(operators: SimpleNamespace, dtype: torch.dtype, density: float, values: bool) -> None:
    images = 16 if dtype == torch.bfloat16 else 4
    layer = Layer(dtype, images, 48, 40, density, kernel=3, side=32)
    name, size = ("masked_values_conv2d", ([3, 3],)) if values else ("masked_lora_conv2d", ())
    forward, backward = (getattr(operators, name + suffix) for suffix in ("", "_input_gradient"))
    window = WINDOW if operators is OPS else (WINDOW,)

    def y(sign: float) -> Tensor:
        return forward(layer.x, layer.weight, None, *arguments(layer, values, sign), *size, *window)

    def dx(sign: float) -> Tensor:
        given = (layer.grad_output, layer.weight, *arguments(layer, values, sign), list(layer.x.shape))
        return backward(*given, *size, *window)

    assert_kept({"y": share(layer.term, y), "dX": share(layer.gradient_term, dx)})


# --- the one-product mode --------------------------------------------------------------------------------------------


def rounded_weight(layer: Layer, values: bool, seed: int, sign: float = 1.0) -> Tensor:
    rest = ([layer.mask], [sign * layer.scale])
    if values:
        made = fade_kernels.effective_weights_from_values(
            [layer.weight], [layer.values], *rest, stochastic=True, seed=seed
        )
    else:
        made = fade_kernels.effective_weights(
            [layer.weight], [layer.lora_a], [layer.lora_b], *rest, stochastic=True, seed=seed
        )
    return made[0]


def call(layer: Layer, values: bool, x: Tensor, adapter: tuple[Tensor, ...], **mode: object) -> Tensor:
    kind = "conv2d" if layer.weight.dim() == 4 else "linear"
    function = getattr(fade_kernels, f"masked_{'values' if values else 'lora'}_{kind}")
    window = {"padding": layer.padding} if kind == "conv2d" else {}
    return function(x, layer.weight, None, *adapter, layer.mask, layer.scale, **window, **mode)


@pytest.mark.parametrize("values", [False, True], ids=["factors", "values"])
@pytest.mark.parametrize("density", list(REGIME))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounded_weights_are_unbiased(dtype: torch.dtype, density: float, values: bool) -> None:
    side = 1024 if density == 0.01 else 256
    layer = Layer(dtype, 1, side, side, density)
    seeds = iter(range(2, 10_000))

    def weight(sign: float) -> Tensor:
        return rounded_weight(layer, values, next(seeds) // 2, sign)

    repeats = 1 + int((600_000 if dtype == torch.bfloat16 else 100_000) / layer.mask.count)
    assert_kept({"W'": share(layer.delta, weight, repeats)})
    drawn = rounded_weight(layer, values, 1)
    assert torch.equal(drawn, rounded_weight(layer, values, 1))
    assert not torch.equal(drawn, rounded_weight(layer, values, 2))
    bits = layer.mask.unpack()
    assert torch.equal(drawn[~bits], layer.weight[~bits])


def test_many_layers_are_rounded_as_the_definition_rounds_them() -> None:
    dtypes = [torch.float16, torch.float64, torch.bfloat16, torch.float16]
    layers = [Layer(dtype, 1, 12 + i, 70, 0.3, ratio=0.1) for i, dtype in enumerate(dtypes)]
    weights, values = ([getattr(layer, name) for layer in layers] for name in ("weight", "values"))
    rest = ([layer.mask.words for layer in layers], [torch.tensor(layer.scale) for layer in layers], True, 7)
    expected = [torch.empty_like(weight) for weight in weights]
    reference.effective_weights_from_values_out(expected, weights, values, *rest)
    masks, scales = ([getattr(layer, name) for layer in layers] for name in ("mask", "scale"))
    for out in (None, [weight.clone() for weight in weights]):
        given = weights if out is None else out  # in place
        made = fade_kernels.effective_weights_from_values(
            given, values, masks, scales, out=out, stochastic=True, seed=7
        )
        for one, other in zip(made, expected, strict=True):
            # A fused multiply-add may round the fp64 layer otherwise.
            assert torch.equal(one, other) or (one.dtype == torch.float64 and torch.allclose(one, other, rtol=1e-14))
    assert not torch.equal(made[0], fade_kernels.effective_weights_from_values(
        weights[:1], values[:1], masks[:1], scales[:1], stochastic=True, seed=8
    )[0])  # fmt: skip


@pytest.mark.parametrize("values", [False, True], ids=["factors", "values"])
@pytest.mark.parametrize("kernel", [0, 1, 3])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_product_is_the_product_with_the_rounded_weight(dtype: torch.dtype, kernel: int, values: bool) -> None:
    """Forward and dX with the same bits, whether made inside or beforehand, and the adapter's gradients as always."""
    layer = Layer(dtype, 6, 40, 36, 0.3, ratio=0.03, kernel=kernel, side=5)
    weight = rounded_weight(layer, values, 3)
    results = []
    for mode in ({"rounding_seed": 3}, {"rounding_seed": 3 + 2**31}, {"rounded_weight": weight}, {}):
        leaves = [layer.x.clone().requires_grad_(), *(t.clone().requires_grad_() for t in layer.adapter(values))]
        y = call(layer, values, leaves[0], leaves[1:], **mode)
        results.append([y, *torch.autograd.grad(y, leaves, layer.grad_output)])
    for other in results[1:3]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    assert not torch.equal(results[0][0], results[3][0])
    assert all(torch.equal(one, two) for one, two in zip(results[0][2:], results[3][2:], strict=True))
    x, frozen = layer.x.double().requires_grad_(), weight.double()
    if kernel:
        exact = torch.nn.functional.conv2d(x, frozen, padding=layer.padding)
    else:
        exact = torch.nn.functional.linear(x, frozen)
    (exact_dx,) = torch.autograd.grad(exact, x, layer.grad_output.double())
    eps = torch.finfo(dtype).eps
    for got, want in ((results[0][0], exact), (results[0][1], exact_dx)):
        # Half an ulp, and what fp32 sums may move across it.
        assert ((got - want).abs() <= 0.51 * eps * want.abs() + 1e-5).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_product_of_sparse_masks_errs_hardly_more_than_the_rounding_of_the_output(dtype: torch.dtype) -> None:
    for density in (0.01, 0.1):
        layer = Layer(dtype, 256, 256, 256, density, ratio=1e-2)
        exact = layer.x.double() @ (layer.weight.double() + layer.delta.double()).t()
        y = call(layer, False, layer.x, layer.adapter(False), rounding_seed=1).double()
        least = (exact.to(dtype).double() - exact).norm()
        assert (y - exact).norm() <= 1.12 * least


@pytest.mark.parametrize(("density", "ratio"), [(0.01, 1e-2), (0.1, 1e-3), (1.0, 3e-4)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_product_keeps_the_delta_in_outputs(dtype: torch.dtype, density: float, ratio: float) -> None:
    layer = Layer(dtype, 64, 256, 256, density, ratio=ratio)
    seeds = iter(range(2, 10_000))

    def both(sign: float) -> Tensor:
        mode = (0, next(seeds) // 2, None)
        given = arguments(layer, False, sign)
        y = OPS.masked_lora_linear(layer.x, layer.weight, None, *given, *mode)
        return torch.cat([y, OPS.masked_lora_linear_input_gradient(layer.grad_output, layer.weight, *given, *mode)])

    assert_kept({"y and dX": share(torch.cat([layer.term, layer.gradient_term]), both, 32)})


def test_where_nothing_is_rounded_to_16_bits_a_seed_changes_nothing() -> None:
    for dtype in (torch.float32, torch.float64):
        layer = Layer(dtype, 5, 12, 20, 0.4, ratio=0.1)
        for values in (False, True):
            y = call(layer, values, layer.x, layer.adapter(values))
            assert torch.equal(y, call(layer, values, layer.x, layer.adapter(values), rounding_seed=1))


def test_what_the_one_product_mode_refuses() -> None:
    layer = Layer(torch.bfloat16, 3, 12, 20, 0.4)
    weight = rounded_weight(layer, False, 1)
    for mode, error, match in (
        ({"rounding_seed": 1, "rounded_weight": weight}, ValueError, "rounding_seed or rounded_weight, not both"),
        ({"rounding_seed": -1}, ValueError, "rounding_seed must not be negative, got -1"),
        ({"rounded_weight": weight[1:]}, ValueError, r"rounded_weight \[11, 20\] does not fit .* \[12, 20\]"),
        ({"rounded_weight": weight.float()}, TypeError, "rounded_weight is torch.float32, the activations torch.bf"),
        ({"rounded_weight": weight.clone().requires_grad_()}, ValueError, "rounded_weight must not require a grad"),
    ):
        for values in (False, True):
            with pytest.raises(error, match=match):
                call(layer, values, layer.x, layer.adapter(values), **mode)


def test_operators_of_the_one_product_mode() -> None:
    layer = Layer(torch.bfloat16, 3, 8, 20, 0.4)
    x, words, scale = layer.x.requires_grad_(), layer.mask.words, torch.tensor(0.5)
    factors = [t.clone().requires_grad_() for t in layer.adapter(False)]
    weight = rounded_weight(layer, False, 1)
    opcheck(OPS.masked_lora_linear, (x, layer.weight, None, *factors, words, scale, 0, 1, None))
    opcheck(OPS.masked_values_linear, (x, layer.weight, None, layer.values, words, scale, 0, None, weight))
    with pytest.raises(ValueError, match="layer 0: values has 1 elements, but the mask has"):
        fade_kernels.effective_weights_from_values([layer.weight], [torch.zeros(1)], [layer.mask], [1.0])


def test_a_compiled_layer_takes_every_seed_in_one_graph() -> None:
    layer = Layer(torch.bfloat16, 3, 12, 20, 0.4, ratio=0.1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, seed: int) -> Tensor:
        return call(layer, False, x, layer.adapter(False), rounding_seed=seed)

    compiled(layer.x, 2)
    compiled(layer.x, 3)  # numbers that differ become inputs of the graph
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in (4, 5, 100):
            expected = call(layer, False, layer.x, layer.adapter(False), rounding_seed=seed)
            assert torch.equal(compiled(layer.x, seed), expected)


def test_the_training_mode_follows_the_model() -> None:
    choose = fade_kernels.choices.choose_training_mode
    bf16 = torch.bfloat16
    assert choose(bf16, 4096, 1280, 1280, 0.1, 1.0) == "one-product"
    assert choose(bf16, 9216, 3072, 3072, 0.01, 1.0) == "one-product"
    assert choose(bf16, 512, 1280, 1280, 0.002, 0.02) == "exact"  # a few tiles cost less than a weight made anew
    assert choose(bf16, 4096, 1280, 1280, 0.5, 1.0) == "exact"  # too dense for rounding noise to be small
    assert choose(bf16, 4096, 1280, 1280, 0.0, 0.0) == "exact"
    assert choose(torch.float32, 4096, 1280, 1280, 0.1, 1.0) == "exact"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_sum_at_positions_may_be_wider_than_its_factors(dtype: torch.dtype) -> None:
    generator = fresh_generator()
    layer = Layer(dtype, 9, 12, 20, 0.4, ratio=0.1)
    by_row = fade_kernels.positions.find_positions(layer.mask.words, 20).by_row
    start = torch.randn(9, 12, generator=generator)
    y, scale = start.clone(), torch.tensor(layer.scale)
    OPS.add_gathered_values_(y, layer.x, layer.values, None, by_row.starts, by_row.index, scale)
    assert torch.allclose(y, start + layer.term, atol=1e-6)
    again = start.clone()
    OPS.add_gathered_lora_(again, layer.x, layer.lora_a, layer.lora_b, *by_row, False, scale)
    assert torch.allclose(again, y, atol=1e-6)
    with pytest.raises(TypeError, match="dtypes must agree, got y"):
        fade_kernels._ops.add_gathered_values_(
            y.double(), layer.x, layer.values, None, by_row.starts, by_row.index, scale
        )
