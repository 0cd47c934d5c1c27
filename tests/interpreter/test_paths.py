"""Every path that a CUDA tensor can take, through the operators' own kernels, against the definition in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreter_testing import frobenius_error
from torch import Tensor

from fade_kernels import BitMask, accumulate_linear_gradient_magnitude_, choices, mask_facts, reference, registration
from fade_kernels.cuda import conv2d, linear
from fade_kernels.masked_lora import REGIMES
from fade_kernels.registration import KERNELS
from fade_kernels.window import Window

# What makes `choose_linear` take a path: the regime that is asked for, and thresholds.
PATHS: dict[str, tuple[int, dict[str, float]]] = {
    "gather": (REGIMES["gather"], {}),
    "fused": (REGIMES["tile"], {}),
    "two products": (REGIMES["whole"], {}),
    "sampled": (
        REGIMES["auto"],
        {
            **{"gather_density": 9e9, "gather_occupancy": 0.0, "gather_flops": 0.0},
            **{"sampled_density": 9e9, "sampled_flops": 0.0},
        },
    ),
    "auto": (REGIMES["auto"], {}),
}
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3}


class Layer:
    """Random tensors of one linear layer, in a dtype and, for the definition, in float64."""

    def __init__(
        self, dtype: torch.dtype, density: float, generator: torch.Generator, leading: tuple[int, ...] = (3, 7)
    ) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        rows, columns, rank = 37, 70, 5
        self.x, self.dy = random(*leading, columns), random(*leading, rows)
        self.weight, self.bias = random(rows, columns) * 0.1, random(rows)
        self.lora_a, self.lora_b = random(rank, columns) * 0.3, random(rows, rank) * 0.3
        self.bits = torch.rand(rows, columns, generator=generator) < density
        self.mask = BitMask.pack(self.bits)
        self.values = torch.randn(self.mask.count, generator=generator)
        self.scale = torch.tensor(0.7)


def wide(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def check(name: str, arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Operator `name` on `arguments` against its definition on float64 copies of them."""
    result = KERNELS[name](*arguments)
    expected = getattr(reference, name)(*wide(arguments))
    results, expecteds = (r if isinstance(r, tuple) else (r,) for r in (result, expected))
    for got, want in zip(results, expecteds, strict=True):
        assert got.shape == want.shape
        assert frobenius_error(got, want) <= TOLERANCES[dtype], name


@pytest.fixture(params=sorted(PATHS))
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    asked, thresholds = PATHS[request.param]
    monkeypatch.setattr(choices, "THRESHOLDS", choices.THRESHOLDS._replace(**thresholds))
    return asked


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_linear_on_every_path(regime: int, dtype: torch.dtype, density: float, rng: torch.Generator) -> None:
    layer = Layer(dtype, density, rng)
    words, scale = layer.mask.words, layer.scale
    factors = (layer.lora_a, layer.lora_b, words, scale, regime)
    values = (layer.values, words, scale)
    for weight, bias in ((layer.weight, layer.bias), (layer.weight, None), (None, None)):
        if weight is None and density == 0.0:
            assert not linear.masked_lora_linear(layer.x, None, None, *factors).any()
            continue
        check("masked_lora_linear", (layer.x, weight, bias, *factors), dtype)
        check("masked_lora_linear_input_gradient", (layer.dy, weight, *factors), dtype)
        check("masked_values_linear", (layer.x, weight, bias, *values, regime), dtype)
        check("masked_values_linear_input_gradient", (layer.dy, weight, *values, 70, regime), dtype)
    check("masked_lora_linear_factor_gradients", (layer.dy, layer.x, *factors), dtype)
    check("masked_values_linear_gradient", (layer.dy, layer.x, *values, regime), dtype)


@pytest.mark.parametrize("leading", [(0,), (1,), ()], ids=str)
def test_few_and_no_tokens(regime: int, leading: tuple[int, ...], rng: torch.Generator) -> None:
    layer = Layer(torch.float32, 0.1, rng, leading)
    factors = (layer.lora_a, layer.lora_b, layer.mask.words, layer.scale, regime)
    if leading != (0,):
        check("masked_lora_linear", (layer.x, layer.weight, layer.bias, *factors), torch.float32)
        check("masked_lora_linear_input_gradient", (layer.dy, layer.weight, *factors), torch.float32)
        check("masked_lora_linear_factor_gradients", (layer.dy, layer.x, *factors), torch.float32)
        return
    assert linear.masked_lora_linear(layer.x, layer.weight, layer.bias, *factors).shape == (0, 37)
    assert linear.masked_lora_linear_input_gradient(layer.dy, layer.weight, *factors).shape == (0, 70)
    assert not any(g.any() for g in linear.masked_lora_linear_factor_gradients(layer.dy, layer.x, *factors))


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["", "channels last"])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), 1), ((3, 3), 2), ((1, 1), 1)], ids=str)
@pytest.mark.parametrize("one_convolution", [True, False])
@pytest.mark.parametrize("density", ["none", "few channels", "half"])
def test_convolution(
    dtype: torch.dtype, layout: torch.memory_format, kernel: tuple[int, int], stride: int, one_convolution: bool,
    density: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(conv2d, "_one_convolution", lambda x: one_convolution and x.dtype == torch.float32)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    size = (6, 5, *kernel)
    padding = kernel[0] // 2
    x = random(2, 5, 8, 7).contiguous(memory_format=layout)
    bits = torch.rand(size, generator=rng) < 0.5
    if density == "few channels":  # so that they are copied
        bits[:4], bits[:, :3], bits[5, 4] = False, False, True
    elif density == "none":
        bits[:] = False
    mask = BitMask.pack(bits)
    window = Window([stride, stride], [padding, padding], [1, 1])
    weight, bias = random(*size) * 0.2, random(6)
    lora_a, lora_b, scale = random(3, 5, *kernel), random(6, 3, 1, 1), torch.tensor(0.7)
    values = torch.randn(mask.count, generator=rng)
    dy = torch.randn(reference.masked_lora_conv2d(x, None, None, lora_a, lora_b, mask.words, scale, window).shape)
    dy = dy.to(dtype).contiguous(memory_format=layout)
    factors, given = (lora_a, lora_b, mask.words, scale), (values, mask.words, scale)
    check("masked_lora_conv2d", (x, weight, bias, *factors, window), dtype)
    if density != "none":
        check("masked_lora_conv2d", (x, None, None, *factors, window), dtype)
    check("masked_values_conv2d", (x, weight, bias, *given, list(kernel), window), dtype)
    check("masked_lora_conv2d_input_gradient", (dy, weight, *factors, list(x.shape), window), dtype)
    check("masked_values_conv2d_input_gradient", (dy, weight, *given, list(x.shape), list(kernel), window), dtype)
    check("masked_lora_conv2d_factor_gradients", (dy, x, *factors, window), dtype)
    check("masked_values_conv2d_gradient", (dy, x, *given, list(kernel), window), dtype)
    y = conv2d.masked_lora_conv2d(x, weight, bias, *factors, window)
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_merging(dtype: torch.dtype, rng: torch.Generator) -> None:
    layer = Layer(dtype, 0.2, rng)
    words, scale = layer.mask.words, layer.scale
    check("effective_weight", (layer.weight, layer.lora_a, layer.lora_b, words, scale), dtype)
    check("masked_factor_values", (layer.lora_a, layer.lora_b, words, layer.mask.count), dtype)
    for name, adapter in (
        ("effective_weight_out", (layer.lora_a, layer.lora_b)),
        ("effective_weight_from_values_out", (layer.values,)),
    ):
        for weight in (layer.weight, None):
            out = torch.full_like(layer.weight, float("nan"))
            expected = torch.zeros_like(layer.weight, dtype=torch.float64)
            KERNELS[name](out, weight, *adapter, words, scale)
            getattr(reference, name)(expected, *wide((weight, *adapter, words, scale)))
            assert frobenius_error(out, expected) <= TOLERANCES[dtype]
            outside = torch.zeros_like(layer.weight) if weight is None else weight
            assert torch.equal(out[~layer.bits], outside[~layer.bits])


@pytest.mark.parametrize("stochastic", [False, True])
def test_merging_many_layers(stochastic: bool, rng: torch.Generator) -> None:
    layers = [Layer(dtype, 0.3, rng) for dtype in (torch.float16, torch.float32, torch.float16)]
    lists = [[getattr(layer, name) for layer in layers] for name in ("weight", "lora_a", "lora_b")]
    rest = ([layer.mask.words for layer in layers], [layer.scale for layer in layers], stochastic, 7)
    results, expected = ([torch.full_like(weight, float("nan")) for weight in lists[0]] for _ in range(2))
    KERNELS["effective_weights_out"](results, *lists, *rest)
    reference.effective_weights_out(expected, *lists, *rest)
    for got, want in zip(results, expected, strict=True):  # the same random bits
        assert frobenius_error(got, want) <= 1e-3
        assert (got == want).float().mean() > 0.98 or got.dtype == torch.float32


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3])
def test_one_product(dtype: torch.dtype, density: float, rng: torch.Generator) -> None:
    """The definition's random bits, whether the weight is made inside or beforehand."""
    layer = Layer(dtype, density, rng)
    words, scale = layer.mask.words, layer.scale
    adapters = {"lora": (layer.lora_a, layer.lora_b), "values": (layer.values,)}
    for kind, adapter in adapters.items():
        weight, drawn = torch.full_like(layer.weight, float("nan")), torch.empty_like(layer.weight)
        name = "effective_weights_out" if kind == "lora" else "effective_weights_from_values_out"
        lists = ([layer.weight], *([tensor] for tensor in adapter), [words], [scale], True, 7)
        KERNELS[name]([weight], *lists)
        getattr(reference, name)([drawn], *lists)
        assert (weight == drawn).float().mean() > 0.98 or dtype == torch.float32
        delta = (*adapter, words, scale)
        for given, name, rest in (
            ((layer.x, layer.weight, layer.bias), f"masked_{kind}_linear", ()),
            ((layer.dy, layer.weight), f"masked_{kind}_linear_input_gradient", (70,) if kind == "values" else ()),
        ):
            inside = KERNELS[name](*given, *delta, *rest, REGIMES["auto"], 7, None)
            beforehand = KERNELS[name](*given, *delta, *rest, REGIMES["auto"], None, weight)
            assert torch.equal(inside, beforehand) or dtype == torch.float32
            exact = getattr(reference, name)(*wide(given), *wide(delta), *rest, 0, None, weight.double())
            assert frobenius_error(inside, exact) <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("kernel", [[1, 1], [3, 3]], ids=str)
def test_one_product_of_a_convolution(dtype: torch.dtype, kernel: list[int], rng: torch.Generator) -> None:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    size = (6, 5, *kernel)
    bits = torch.rand(size, generator=rng) < 0.3
    words, scale, window = BitMask.pack(bits).words, torch.tensor(0.1), Window([1, 1], [0, 0], [1, 1])
    x, weight, bias = random(2, 5, 8, 7), random(*size) * 0.2, random(6)
    values = torch.randn(int(bits.sum()), generator=rng)
    adapters = {"lora": (random(3, 5, *kernel), random(6, 3, 1, 1)), "values": (values,)}
    dy = random(2, 6, 9 - kernel[0], 8 - kernel[1])
    for kind, adapter in adapters.items():
        delta, place = (*adapter, words, scale), (kernel,) if kind == "values" else ()
        for given, name, rest in (
            ((x, weight, bias), f"masked_{kind}_conv2d", place),
            ((dy, weight), f"masked_{kind}_conv2d_input_gradient", (list(x.shape), *place)),
        ):
            inside = KERNELS[name](*given, *delta, *rest, window, 7, None)
            expected = getattr(reference, name)(*given, *delta, *rest, window, 7, None)
            assert frobenius_error(inside, expected.double()) <= TOLERANCES[dtype]
            made = random(*size)
            beforehand = KERNELS[name](*given, *delta, *rest, window, None, made)
            exact = getattr(reference, name)(*wide(given), *wide(delta), *rest, window, None, made.double())
            assert frobenius_error(beforehand, exact) <= TOLERANCES[dtype]


def test_one_token_without_a_weight_leaves_the_bias_alone(regime: int, rng: torch.Generator) -> None:
    layer = Layer(torch.float32, 0.3, rng)
    words, scale, bias = layer.mask.words, layer.scale, layer.bias.clone()
    factors = (layer.lora_a, layer.lora_b)
    linear.masked_lora_linear(layer.x[0, :1], None, layer.bias, *factors, words, scale, regime)
    linear.masked_values_linear(layer.x[0, :1], None, layer.bias, layer.values, words, scale, regime)
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("choice", ["fused", "scratch"])
@pytest.mark.parametrize("magnitude", ["abs", "signed", "square"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_linear_magnitude(
    choice: str, magnitude: str, per_sample: bool, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "choose_linear_magnitude", lambda *_: choice)
    layer = Layer(torch.float32, 0.2, rng)
    before = torch.rand(37, 70, generator=rng)
    for start in (before, before.t().contiguous().t()):
        saliency, expected = start.clone(memory_format=torch.preserve_format), before.double()
        KERNELS["accumulate_linear_gradient_magnitude_"](saliency, layer.dy, layer.x, magnitude, per_sample)
        reference.accumulate_linear_gradient_magnitude_(
            expected, layer.dy.double(), layer.x.double(), magnitude, per_sample
        )
        assert frobenius_error(saliency, expected) <= 1e-5


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_linear_magnitude_of_mixed_dtypes(dtypes: tuple[torch.dtype, torch.dtype], rng: torch.Generator) -> None:
    layer = Layer(torch.float32, 0.2, rng)
    dy, x = layer.dy.to(dtypes[0]), layer.x.to(dtypes[1])
    saliency, expected = torch.zeros(37, 70), torch.zeros(37, 70, dtype=torch.float64)
    KERNELS["accumulate_linear_gradient_magnitude_"](saliency, dy, x, "abs", False)
    reference.accumulate_linear_gradient_magnitude_(expected, dy.double(), x.double(), "abs", False)
    assert frobenius_error(saliency, expected) <= 1e-5


def test_a_magnitude_under_autocast_is_summed_in_fp32(rng: torch.Generator) -> None:
    layer = Layer(torch.float32, 0.2, rng)
    saliency, expected = torch.zeros(37, 70), torch.zeros(37, 70, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        accumulate_linear_gradient_magnitude_(saliency, layer.dy, layer.x, "abs")
    reference.accumulate_linear_gradient_magnitude_(expected, layer.dy.double(), layer.x.double(), "abs", False)
    assert frobenius_error(saliency, expected) <= 1e-5


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_ranks_beyond_those_of_the_tile_kernels(regime: int, dtype: torch.dtype, rng: torch.Generator) -> None:
    layer = Layer(dtype, 0.3, rng)
    lora_a, lora_b = (torch.randn(size, generator=rng).to(dtype) * 0.1 for size in ((129, 70), (37, 129)))
    factors = (lora_a, lora_b, layer.mask.words, layer.scale, regime)
    check("masked_lora_linear", (layer.x, layer.weight, layer.bias, *factors), dtype)
    check("masked_lora_linear_input_gradient", (layer.dy, layer.weight, *factors), dtype)
    check("masked_lora_linear_factor_gradients", (layer.dy, layer.x, *factors), dtype)


@pytest.mark.parametrize("wide_factor", ["lora_a", "lora_b"])
def test_factors_of_two_dtypes(regime: int, wide_factor: str, rng: torch.Generator) -> None:
    layer = Layer(torch.float16, 0.3, rng)
    setattr(layer, wide_factor, getattr(layer, wide_factor).float())
    factors = (layer.lora_a, layer.lora_b, layer.mask.words, layer.scale, regime)
    check("masked_lora_linear", (layer.x, layer.weight, layer.bias, *factors), torch.float16)
    check("masked_lora_linear_input_gradient", (layer.dy, layer.weight, *factors), torch.float16)
    check("masked_lora_linear_factor_gradients", (layer.dy, layer.x, *factors), torch.float16)
    grads = linear.masked_lora_linear_factor_gradients(layer.dy, layer.x, *factors)
    assert [grad.dtype for grad in grads] == [layer.lora_a.dtype, layer.lora_b.dtype]


def test_layouts_of_factors_and_masks(regime: int, rng: torch.Generator) -> None:
    layer = Layer(torch.float32, 0.3, rng)
    words = torch.stack([layer.mask.words, ~layer.mask.words], dim=-1)[..., 0]
    lora_a, lora_b = (factor.t().contiguous().t() for factor in (layer.lora_a, layer.lora_b))
    factors = (lora_a, lora_b, words, layer.scale, regime)
    check("masked_lora_linear", (layer.x, layer.weight, layer.bias, *factors), torch.float32)
    check("masked_lora_linear_input_gradient", (layer.dy, layer.weight, *factors), torch.float32)
    check("masked_lora_linear_factor_gradients", (layer.dy, layer.x, *factors), torch.float32)
    check("effective_weight", (layer.weight, *factors[:-1]), torch.float32)
    nothing = (lora_a, lora_b, torch.zeros_like(words), layer.scale, regime)
    for given in (factors, nothing):  # torch.compile was promised contiguous ones
        grads = linear.masked_lora_linear_factor_gradients(layer.dy, layer.x, *given)
        assert all(grad.is_contiguous() for grad in grads)


def test_values_of_factors_leave_nothing_behind(rng: torch.Generator) -> None:
    layer = Layer(torch.float32, 0.3, rng)
    KERNELS["masked_factor_values"](layer.lora_a, layer.lora_b, layer.mask.words, layer.mask.count)
    assert not mask_facts.positions_known(layer.mask.words)


def test_one_by_one_convolutions_are_linear_layers_on_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    images, window = torch.zeros(2, 8, 4, 4), Window([1, 1], [0, 0], [1, 1])
    nhwc = images.contiguous(memory_format=torch.channels_last)
    assert conv2d._on_pixels(nhwc, [1, 1], window)
    assert conv2d._on_pixels(images.half(), [1, 1], window)
    assert not conv2d._on_pixels(images, [1, 1], window)  # one convolution with W + Delta copies nothing
    assert not conv2d._on_pixels(nhwc, [3, 3], window._replace(padding=[1, 1]))
    assert not conv2d._on_pixels(nhwc, [1, 1], window._replace(stride=[2, 2]))


def test_while_a_graph_is_captured_nothing_is_gathered_from_unknown_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    words = BitMask.pack(torch.eye(64, dtype=torch.bool)).words
    assert mask_facts.mask_facts(words, 64).density == 1 / 64
    monkeypatch.setattr(mask_facts, "capturing", lambda tensor: True)
    assert mask_facts.facts_for_choice(words, 64).density == 1.0
    with pytest.raises(RuntimeError, match="call the operator once before the capture"):
        mask_facts.mask_positions(words, 64)
    monkeypatch.setattr(mask_facts, "capturing", lambda tensor: False)
    mask_facts.mask_positions(words, 64)
    monkeypatch.setattr(mask_facts, "capturing", lambda tensor: True)
    assert mask_facts.facts_for_choice(words, 64).density == 1 / 64


def test_a_mask_that_changes_in_place_is_counted_again() -> None:
    words = BitMask.pack(torch.zeros(64, 64, dtype=torch.bool)).words
    assert mask_facts.mask_facts(words, 64).density == 0.0
    words.copy_(BitMask.full((64, 64)).words)
    facts = mask_facts.mask_facts(words, 64)
    assert (facts.density, facts.occupancy) == (1.0, 1.0)


@pytest.mark.parametrize("regime", [REGIMES["tile"], REGIMES["gather"], REGIMES["whole"]])
def test_a_bias_with_gaps(regime: int, rng: torch.Generator) -> None:
    layer = Layer(torch.float16, 0.2, rng)
    gaps = torch.randn(2 * len(layer.bias), generator=rng).half()[::2]
    for bias in (layer.bias, gaps, layer.bias):  # what was found for one must not serve the other
        arguments = (layer.x, layer.weight, bias, layer.lora_a, layer.lora_b, layer.mask.words, layer.scale, regime)
        check("masked_lora_linear", arguments, torch.float16)


@pytest.mark.parametrize("regime", [REGIMES["tile"], REGIMES["gather"], REGIMES["whole"]])
def test_what_was_found_for_some_arguments_serves_no_others(regime: int, rng: torch.Generator) -> None:
    """One mask, and after each call one thing in another layout or dtype, or as it was."""
    layer = Layer(torch.float16, 0.2, rng)

    def gaps(tensor: Tensor) -> Tensor:
        wide = torch.randn(*tensor.shape[:-1], 2 * tensor.shape[-1], generator=rng).to(tensor.dtype)
        return wide[..., ::2].copy_(tensor)

    plain = {
        "x": layer.x.flatten(0, 1), "dy": layer.dy.flatten(0, 1), "weight": layer.weight, "bias": layer.bias,
        "a": layer.lora_a, "b": layer.lora_b, "scale": layer.scale,
    }  # fmt: skip
    others = [{name: gaps(plain[name])} for name in ("x", "dy", "weight", "bias", "a", "b")]
    others += [{"a": layer.lora_a.float(), "b": layer.lora_b.float()}, {"scale": layer.scale.double()}]
    others += [{"weight": None}, {"bias": None}, {"x": plain["x"][:5], "dy": plain["dy"][:5]}]
    for change in (step for other in others for step in ({}, other)):
        p = plain | change
        delta = (p["a"], p["b"], layer.mask.words, p["scale"], regime)
        check("masked_lora_linear", (p["x"], p["weight"], p["bias"], *delta), torch.float16)
        check("masked_lora_linear_input_gradient", (p["dy"], p["weight"], *delta), torch.float16)
        check("masked_lora_linear_factor_gradients", (p["dy"], p["x"], *delta), torch.float16)
        both = linear.masked_lora_linear_backward(p["dy"], p["x"], p["weight"], *delta, True, True)
        assert torch.equal(both[0], linear.masked_lora_linear_input_gradient(p["dy"], p["weight"], *delta))
        assert all(
            torch.equal(*pair)
            for pair in zip(both[1:], linear.masked_lora_linear_factor_gradients(p["dy"], p["x"], *delta), strict=True)
        )


def test_how_a_call_runs_is_found_once_for_a_mask_and_a_kind(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, asked = Layer(torch.float16, 0.2, rng), []
    choose = choices.choose_linear
    monkeypatch.setattr(choices, "choose_linear", lambda *a: asked.append(a) or choose(*a))

    def forward(x: Tensor, words: Tensor) -> Tensor:
        return linear.masked_lora_linear(
            x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, words, layer.scale, REGIMES["auto"]
        )  # fmt: skip

    words = layer.mask.words
    first = forward(layer.x, words)
    assert torch.equal(forward(layer.x.clone(), words), first)
    assert len(asked) == 1
    forward(layer.x[:1], words)  # another shape
    forward(layer.x, words.clone())  # another mask
    assert len(asked) == 3
    words.zero_()
    assert not torch.equal(forward(layer.x, words), first)  # the same memory, another mask
    assert len(asked) == 4
    monkeypatch.setattr(linear, "_MOST_KINDS", 2)
    for tokens in range(1, 6):
        forward(layer.x[0, :tokens], words)
    assert len(mask_facts.kept_with(words)["forward"]) <= 2
    monkeypatch.setattr(linear, "capturing", lambda tensor: True)
    before = dict(mask_facts.kept_with(words)["forward"])
    forward(layer.x[:2], words)
    assert mask_facts.kept_with(words)["forward"] == before


def test_choices_follow_the_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "THRESHOLDS", choices.THRESHOLDS._replace(gather_density=0.0125))

    def choose(density: float, occupancy: float, tokens: int, dtype: torch.dtype, tf32: bool = False) -> str:
        facts = mask_facts.MaskFacts(0, density, occupancy)
        return choices.choose_linear(dtype, tokens, 1280, 1280, facts, tf32)

    half = torch.float16
    assert choose(0.0, 0.0, 100, half) == "frozen"
    assert choose(0.1, 1.0, 100, torch.float32) == "scratch"
    assert choose(0.1, 1.0, 100, torch.float32, tf32=True) == "fused"
    sparse = choices.THRESHOLDS.gather_density
    assert choose(sparse, 1.0, 100_000, half) == "gather"
    assert choose(sparse, 1.0, 100, half) == "fused"
    assert choose(sparse, 0.9, 100_000, half) == "fused"
    assert choose(sparse / 2, 0.6, 100_000, half) == "gather"
    assert choose(sparse / 9, 0.3, 100_000, half) == "fused"
    assert choose(0.1, 1.0, 100_000, half) == "fused"


def test_nothing_is_gathered_where_no_density_was_low_enough() -> None:
    facts = mask_facts.MaskFacts(0, 1e-6, 1.0)
    assert choices.choose_linear(torch.bfloat16, 100_000, 1280, 1280, facts, False) == "fused"
    assert choices.choose_factor_gradients(torch.float16, 100_000, 1280, 1280, facts) == "tile"


@pytest.mark.parametrize(("occupancy", "form"), [(1.0, "full"), (0.9, "full"), (0.5, "mixed"), (0.25, "sparse")])
def test_kernels_are_told_how_many_tiles_are_empty(occupancy: float, form: str) -> None:
    assert choices.mask_form(mask_facts.MaskFacts(0, 0.01, occupancy)) == form


def test_gradients_are_sampled_of_sparser_masks_than_products_are(monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds = choices.THRESHOLDS._replace(gather_density=0.0125, sampled_density=0.003)
    monkeypatch.setattr(choices, "THRESHOLDS", thresholds)

    def choose(
        density: float, occupancy: float = 1.0, tokens: int = 100_000, dtype: torch.dtype = torch.float16
    ) -> str:
        facts = mask_facts.MaskFacts(0, density, occupancy)
        return choices.choose_factor_gradients(dtype, tokens, 1280, 1280, facts)

    assert choose(0.0, 0.0) == "zero"
    assert choose(choices.THRESHOLDS.sampled_density) == "gather"
    assert choose(choices.THRESHOLDS.sampled_density, tokens=100) == "tile"
    assert choose(choices.THRESHOLDS.gather_density) == "tile"
    # All of dY^T X by the library: in bf16, of large layers, of masks with bits nearly everywhere.
    assert choose(0.1, dtype=torch.bfloat16) == "library"
    assert choose(choices.THRESHOLDS.sampled_density, dtype=torch.bfloat16) == "gather"
    assert choose(0.1, dtype=torch.bfloat16, tokens=100) == "tile"
    assert choose(0.1, 0.1, dtype=torch.bfloat16) == "tile"


def test_without_the_cuda_library_nothing_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    words = BitMask.pack(torch.eye(64, dtype=torch.bool)).words
    monkeypatch.setattr(mask_facts, "_can_gather", lambda words, columns: False)
    assert mask_facts.facts_for_choice(words, 64).density == 1.0
    nothing = BitMask.pack(torch.zeros(64, 64, dtype=torch.bool)).words
    assert mask_facts.facts_for_choice(nothing, 64).density == 0.0


@pytest.mark.parametrize(
    "broken",
    [
        ImportError("no module named triton"),
        FileNotFoundError("no such file: gcc"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    ],
)
def test_a_kernel_that_cannot_run_is_replaced_by_its_definition_with_one_warning(broken: Exception) -> None:
    def served(error: Exception) -> Callable[..., Any]:
        def kernel(*_: Any) -> Any:
            raise error

        return registration._with_definition("effective_weight", kernel)

    layer = Layer(torch.float32, 0.2, torch.Generator())
    arguments = (layer.weight, layer.lora_a, layer.lora_b, layer.mask.words, layer.scale)
    serve = served(broken)
    try:
        with pytest.warns(RuntimeWarning, match=f"effective_weight.*{broken}"):
            first = serve(*arguments)
        assert torch.equal(first, reference.effective_weight(*arguments))
        assert torch.equal(serve(*arguments), first)  # pytest turns a second warning into an error
    finally:
        registration._unusable.clear()
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        served(RuntimeError("CUDA error: an illegal memory access was encountered"))(*arguments)
