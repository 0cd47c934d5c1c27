"""Every operator of fade_kernels on a GPU against the definitions in float64, and what only a GPU can show.

`python -m pytest tests/fade_kernels/test_cuda.py` needs torch and pytest. Each test runs on the CPU, too, so that its
own code is known to be right before a GPU is there; without one the GPU's half is skipped, and FADE_TEST_DEVICES=cuda
leaves out the CPU's half. Expected values are computed on the CPU from the rounded inputs.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_checks
import pytest
import torch
import torch.nn.functional as F
from kernel_testing import OPS, generator, opcheck
from torch import Tensor, nn

import fade_kernels
from fade.modes import plain_mode
from fade_kernels import BitMask, choices, reference, registration
from fade_kernels.masked_lora import REGIMES, force_regime
from fade_kernels.positions import find_positions
from fade_kernels.window import Window
from tests import delta_survival

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing to run GPU kernels on")
DEVICES = [
    device
    for device in ("cpu", pytest.param("cuda", marks=needs_cuda))
    if os.environ.get("FADE_TEST_DEVICES") != "cuda" or device != "cpu"
]
on_every_device = pytest.mark.parametrize("device", DEVICES)

# Frobenius norm of the error over that of the result (design: kernels.md, numerics contract).
FORWARD = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
FACTORS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}
DTYPES = list(FORWARD)

# T, N, K, r: tiles cut off on every side, one token, rank 1, and sizes models have.
SHAPES = [
    (1, 1, 1, 1),
    (1, 320, 320, 16),
    (77, 33, 65, 3),
    (300, 96, 128, 128),
    (130, 70, 200, 20),
    (1024, 320, 768, 16),
]
MASKS = {"empty": 0.0, "0.1 %": 0.001, "10 %": 0.1, "full": 1.0, "corner": -1.0}


@pytest.fixture(autouse=True)
def exact_fp32_products() -> Iterator[None]:
    """fp32 means fp32 here: TF32 has a contract of its own."""
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def kernels_run_themselves() -> Iterator[None]:
    """A definition in place of a kernel would pass every test of numbers."""
    yield
    assert not registration.served_by_definitions()


def error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected; where nothing is expected, of what is there."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return float((actual - expected).norm() / (expected.norm() or 1.0))


def term_error(actual: Tensor, expected: Tensor, frozen: Tensor) -> float:
    """`error` where the frozen term and the delta's may nearly cancel: each is rounded relative to its own size."""
    return error(actual, expected) * min(1.0, float(expected.norm()) / (float(frozen.norm()) or 1.0))


def make_mask(kind: str, shape: tuple[int, int], seed: int) -> Tensor:
    """Bool [N, K] on the CPU."""
    density = MASKS[kind]
    if density < 0:  # some tiles hold everything, others nothing
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[: shape[0] // 2 + 1, shape[1] // 3 :] = True
        return mask
    return torch.rand(shape, generator=generator(seed)) < density


@dataclass
class Layer:
    """A masked LoRA layer and the gradient of its output, on a device, and the same in float64 on the CPU."""

    device: str
    tensors: dict[str, Tensor]
    wide: dict[str, Tensor]
    mask: BitMask
    words: Tensor
    scale: float

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise AttributeError(name) from None


def make_layer(
    device: str,
    sizes: dict[str, tuple[int, ...]],
    mask: Tensor,
    dtype: torch.dtype,
    factor_dtype: torch.dtype | None = None,
    scale: float = 0.7,
    seed: int = 0,
) -> Layer:
    random = generator(seed)
    cpu = {}
    for name, size in sizes.items():
        factor = factor_dtype or dtype if name in ("lora_a", "lora_b", "values") else dtype
        cpu[name] = torch.randn(size, generator=random, dtype=torch.float64).to(factor)
    packed = reference.pack_mask(mask)
    return Layer(
        device,
        {name: tensor.to(device) for name, tensor in cpu.items()},
        {name: tensor.double() for name, tensor in cpu.items()},
        BitMask.from_words(packed.to(device), tuple(mask.shape)),
        packed,
        scale,
    )


def make_linear(
    device: str, shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype, seed: int = 0, **options: Any
) -> Layer:
    t, n, k, r = shape
    mask = make_mask(kind, (n, k), seed)
    sizes = {"x": (t, k), "weight": (n, k), "bias": (n,), "lora_a": (r, k), "lora_b": (n, r), "grad_output": (t, n)}
    return make_layer(device, {**sizes, "values": (int(mask.sum()),)}, mask, dtype, seed=seed, **options)


def run(
    function: Callable[..., Tensor], leaves: list[Tensor], grad_output: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients with respect to `leaves`."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = function(*leaves)
    return output.detach(), torch.autograd.grad(output, leaves, grad_output)


def lora_results(layer: Layer, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    """y, dX, dA, dB through the public function."""
    y, gradients = run(
        lambda x, a, b: fade_kernels.masked_lora_linear(x, weight, bias, a, b, layer.mask, layer.scale),
        [layer.x, layer.lora_a, layer.lora_b],
        layer.grad_output,
    )
    return [y, *gradients]


def expected_lora(layer: Layer, with_weight: bool, with_bias: bool) -> list[Tensor]:
    """The same by the definitions in float64."""
    w, scale = layer.wide, torch.tensor(layer.scale, dtype=torch.float64)
    weight, bias = w["weight"] if with_weight else None, w["bias"] if with_bias else None
    delta = (w["lora_a"], w["lora_b"], layer.words, scale)
    return [
        reference.masked_lora_linear(w["x"], weight, bias, *delta),
        reference.masked_lora_linear_input_gradient(w["grad_output"], weight, *delta),
        *reference.masked_lora_linear_factor_gradients(w["grad_output"], w["x"], *delta),
    ]


def check_lora(layer: Layer, with_weight: bool, with_bias: bool, dtype: torch.dtype, what: Any) -> None:
    actual = lora_results(layer, layer.weight if with_weight else None, layer.bias if with_bias else None)
    expected = expected_lora(layer, with_weight, with_bias)
    tolerances = [FORWARD[dtype], FORWARD[dtype], FACTORS[dtype], FACTORS[dtype]]
    for name, a, e, tolerance in zip(("y", "dX", "dA", "dB"), actual, expected, tolerances, strict=True):
        assert error(a, e) <= tolerance, (name, what)


# --- the CUDA library: masks, accumulation, selection, the gather path -----------------------------------------------

CHECKS = [
    cuda_checks.check_pack_mask,
    cuda_checks.check_unpack_mask,
    cuda_checks.check_mask_row_counts,
    cuda_checks.check_padding_bits,
    cuda_checks.check_mask_occupancy,
    cuda_checks.check_gather_scatter,
    cuda_checks.check_gathered_product,
    cuda_checks.check_gathered_layouts,
    cuda_checks.check_sampled_gradient,
    cuda_checks.check_sampled_factor_gradients,
    cuda_checks.check_accumulate,
    cuda_checks.check_accumulate_alignment,
    cuda_checks.check_accumulate_strides,
    cuda_checks.check_accumulate_half_values,
    cuda_checks.check_least_squares,
    cuda_checks.check_least_squares_of_some_rows,
    cuda_checks.check_least_squares_singular,
    cuda_checks.check_select,
    cuda_checks.check_select_layouts,
    cuda_checks.check_select_invalid,
]


@on_every_device
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_kernels_of_the_cuda_library(check: Callable[[Any, str], None], device: str) -> None:
    check(OPS, device)


@needs_cuda
def test_the_cuda_library_is_loaded_and_serves_its_operators() -> None:
    info = fade_kernels.build_info()
    assert info["cuda"] is True, info["cuda_reason"]
    assert info["architectures"]
    for name in (
        *("pack_mask", "unpack_mask", "mask_row_counts", "mask_occupancy", "gather_masked", "scatter_masked_"),
        *("accumulate_gradient_magnitude_", "select_top_k"),
        *("add_gathered_lora_", "add_gathered_values_", "sampled_gradient", "sampled_factor_gradients"),
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fade_kernels::{name}", "CUDA"), name
    cuda_checks.check_wrong_count(OPS, "cuda")


@on_every_device
@pytest.mark.parametrize("granularity", ["element", "tile", "channel", "module"])
def test_selection_is_that_of_the_cpu(granularity: str, device: str) -> None:
    random = generator(1)
    shapes = [(70, 45), (8, 4, 3, 3), (300, 320), (1, 9)]
    scores = [torch.randint(0, 9, shape, generator=random).float() for shape in shapes]  # sums are exact in any order
    expected = fade_kernels.select_top_fraction(scores, 0.31, granularity, tile=16)
    actual = fade_kernels.select_top_fraction([s.to(device) for s in scores], 0.31, granularity, tile=16)
    assert actual.count == expected.count
    if granularity in ("element", "tile"):
        assert actual.threshold == expected.threshold
        assert actual.masks == expected.masks


@needs_cuda
def test_more_than_two_to_the_31_elements() -> None:
    elements = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 6 * 4 * elements:
        pytest.skip("needs 48 GiB of free GPU memory")
    scores = torch.zeros(elements // 64, 64, device="cuda")
    scores[-3:] = 2.0
    scores[-1, -1] = 3.0
    words, threshold, invalid = OPS.select_top_k([scores], 150)
    assert (int(invalid), float(threshold)) == (-1, 2.0)
    counts = OPS.mask_row_counts(words[0], 64)
    assert int(counts.sum()) == 150
    assert counts[-3:].tolist() == [64, 64, 22]  # all ties but the last, and the one value above them
    assert bool(OPS.unpack_mask(words[0][-1:], 64)[0, -1])
    gathered = OPS.gather_masked(scores, words[0], 150)
    assert gathered.tolist() == [2.0] * 149 + [3.0]
    OPS.accumulate_gradient_magnitude_([scores], [scores], "abs")
    assert scores[-1, -1].item() == 6.0
    assert scores[0, 0].item() == 0.0
    ties, _, _ = OPS.select_top_k([scores], 2**31 + 1)
    assert int(OPS.mask_row_counts(ties[0], 64).sum()) == 2**31 + 1


@needs_cuda
def test_selection_waits_for_nothing_and_repeats_itself() -> None:
    scores = [torch.rand(700, 333, device="cuda"), torch.rand(64, 3, 3, 3, device="cuda")]
    expected = OPS.select_top_k(scores, 1000)
    saliency = [torch.zeros_like(s) for s in scores]
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = OPS.select_top_k(scores, 1000)
        OPS.accumulate_gradient_magnitude_(saliency, scores, "square")
        values = OPS.gather_masked(scores[0], again[0][0], 10)
        OPS.mask_occupancy(again[0][0], 333, 32, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert values.shape == (10,)
    assert all(torch.equal(a, b) for a, b in zip(again[0], expected[0], strict=True))
    assert torch.equal(saliency[0], scores[0] * scores[0])


# --- masked linear ---------------------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
def test_masked_lora_linear(kind: str, dtype: torch.dtype, device: str) -> None:
    for seed, shape in enumerate(SHAPES):
        layer = make_linear(device, shape, kind, dtype, seed)
        check_lora(layer, True, True, dtype, shape)
    layer = make_linear(device, SHAPES[2], kind, dtype, factor_dtype=torch.float32)
    for with_weight, with_bias in ((True, False), (False, True), (False, False)):
        check_lora(layer, with_weight, with_bias, dtype, (with_weight, with_bias))


@on_every_device
@pytest.mark.parametrize("regime", [name for name in REGIMES if name != "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_lora_linear_in_every_regime(regime: str, dtype: torch.dtype, device: str) -> None:
    for seed, kind in enumerate(("empty", "0.1 %", "10 %", "corner")):
        layer = make_linear(device, (130, 320, 200, 20), kind, dtype, seed)
        with force_regime(regime):
            check_lora(layer, True, True, dtype, kind)


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "thresholds",
    [
        {},
        {"gather_density": -1.0, "sampled_density": -1.0},
        {
            **{"gather_density": 9e9, "gather_occupancy": 0.0, "gather_flops": 0.0},
            **{"sampled_density": 9e9, "sampled_flops": 0.0},
        },
        {"library_flops": 0.0, "library_occupancy": 0.0, "sampled_density": -1.0},
    ],
    ids=["auto", "fused", "gather", "library"],
)
def test_masked_lora_linear_on_every_chosen_path(
    thresholds: dict[str, float], dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths that no regime names are reached by moving the thresholds."""
    monkeypatch.setattr(choices, "THRESHOLDS", choices.THRESHOLDS._replace(**thresholds))
    shape = (2048, 1280, 1280, 16) if device == "cuda" else (64, 256, 256, 16)
    for kind in ("0.1 %", "10 %", "corner"):
        check_lora(make_linear(device, shape, kind, dtype), True, True, dtype, kind)


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("regime", REGIMES)
def test_one_token_without_a_weight_leaves_the_bias_alone(regime: str, dtype: torch.dtype, device: str) -> None:
    layer = make_linear(device, (1, 24, 40, 3), "10 %", dtype)
    bias = layer.bias.clone()
    with force_regime(regime):
        check_lora(layer, False, True, dtype, "10 %")
        fade_kernels.masked_values_linear(layer.x, None, layer.bias, layer.values, layer.mask, layer.scale)
    assert torch.equal(layer.bias, bias)


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_empty_inputs(dtype: torch.dtype, device: str) -> None:
    layer = make_linear(device, (60, 48, 72, 5), "10 %", dtype)
    expected = expected_lora(layer, True, True)
    # The same numbers, elsewhere in memory: columns apart, transposed, and with leading dimensions.
    layer.tensors["x"] = torch.stack([layer.x, layer.x], dim=-1)[..., 0].reshape(3, 20, 72).transpose(0, 1).contiguous()
    layer.tensors["x"] = layer.x.transpose(0, 1)
    layer.tensors["weight"] = layer.weight.t().contiguous().t()
    layer.tensors["lora_a"] = layer.lora_a.t().contiguous().t()
    layer.tensors["grad_output"] = layer.grad_output.t().contiguous().t().reshape(3, 20, 48)
    actual = lora_results(layer, layer.weight, layer.bias)
    for a, e, tolerance in zip(actual, expected, [FORWARD[dtype]] * 2 + [FACTORS[dtype]] * 2, strict=True):
        assert error(a.reshape(e.shape), e) <= tolerance
    for tokens in ((0,), (2, 0)):
        empty = torch.zeros(*tokens, 72, dtype=dtype, device=device)
        y, (grad_x, grad_a, grad_b) = run(
            lambda x, a, b: fade_kernels.masked_lora_linear(x, layer.weight, layer.bias, a, b, layer.mask, 0.5),
            [empty, layer.lora_a, layer.lora_b],
            torch.zeros(*tokens, 48, dtype=dtype, device=device),
        )
        assert y.shape == (*tokens, 48)
        assert grad_x.shape == empty.shape
        assert not grad_a.any() and not grad_b.any()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [0, 3])
@pytest.mark.parametrize("regime", ["gather", "tile", "whole", "auto"])
def test_a_delta_10000_times_smaller_survives_in_16_bit_outputs(
    regime: str, kernel: int, dtype: torch.dtype, device: str
) -> None:
    sizes = {"kernel": 3, "side": 64, "tokens": 16, "rows": 64, "columns": 64} if kernel else {"tokens": 8192}
    for density in (0.01, 0.1, 1.0):
        layer = delta_survival.Layer(dtype, **{"rows": 512, "columns": 512, **sizes}, density=density).to(device)
        for values in (False, True):

            def both(sign: float, layer: Any = layer, values: bool = values) -> Tensor:
                x = layer.x.clone().requires_grad_()
                name = f"masked_{'values' if values else 'lora'}_{'conv2d' if kernel else 'linear'}"
                window = {"padding": 1} if kernel else {}
                given = (*layer.adapter(values), layer.mask, sign * layer.scale)
                y = getattr(fade_kernels, name)(x, layer.weight, None, *given, **window)
                (dx,) = torch.autograd.grad(y, x, layer.grad_output)
                return torch.cat([y.detach().flatten(), dx.flatten()])

            term = torch.cat([layer.term.flatten(), layer.gradient_term.flatten()])
            with force_regime(regime):
                delta_survival.assert_kept({f"{density} {values}": delta_survival.share(term, both)})


def projection(actual: Tensor, base: Tensor, term: Tensor) -> float:
    """How much of `term` is in actual - base: 1 if all of it, 0 if it was lost. Rounding of the output averages out."""
    return float(((actual.cpu().double() - base) * term).sum() / term.square().sum())


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["0.1 %", "10 %", "full"])
def test_small_delta_survives(kind: str, dtype: torch.dtype, device: str) -> None:
    """Delta 1000 times smaller than W, where a merged 16-bit weight would have lost it."""
    shape = (512, 512, 256, 8)
    layer = make_linear(device, shape, kind, dtype, seed=3)
    product = layer.wide["lora_b"] @ layer.wide["lora_a"]
    delta = torch.where(make_mask(kind, shape[1:3], 3), product, 0.0)
    density = delta.count_nonzero() / delta.numel()
    # As large, where it is, as a thousandth of the weight.
    layer.scale = 1e-3 * float(layer.wide["weight"].norm() / (delta.norm() / density.sqrt()))
    delta *= layer.scale
    x, weight, grad_output = (layer.wide[name] for name in ("x", "weight", "grad_output"))
    y, grad_x, grad_a, grad_b = lora_results(layer, layer.weight, None)
    # Where few outputs carry the term, the rounding of y itself does not average out: it is measured, too.
    for name, actual, base, term in (
        ("y", y, x @ weight.t(), x @ delta.t()),
        ("dX", grad_x, grad_output @ weight, grad_output @ delta),
    ):
        rounding = abs(projection((base + term).to(dtype), base, term) - 1)
        # In fp32 a library's order of summation moves it by some 1e-5; a delta that is lost would move it by 1.
        assert abs(projection(actual, base, term) - 1) <= max(FORWARD[dtype], 1e-4) + 3 * rounding, name
        assert rounding < 0.5, "the test would notice nothing"
    alone = lora_results(layer, None, None)
    assert error(alone[0], x @ delta.t()) <= FORWARD[dtype]
    assert error(alone[1], grad_output @ delta) <= FORWARD[dtype]
    expected = expected_lora(layer, True, False)
    assert error(grad_a, expected[2]) <= FACTORS[dtype]
    assert error(grad_b, expected[3]) <= FACTORS[dtype]


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
def test_masked_values_linear(kind: str, dtype: torch.dtype, device: str) -> None:
    for seed, shape in enumerate(SHAPES):
        layer = make_linear(device, shape, kind, dtype, seed)
        y, (grad_x, grad_values) = run(
            lambda x, v, layer=layer: fade_kernels.masked_values_linear(
                x, layer.weight, layer.bias, v, layer.mask, layer.scale
            ),
            [layer.x, layer.values],
            layer.grad_output,
        )
        w, delta = layer.wide, (layer.wide["values"], layer.words, torch.tensor(layer.scale, dtype=torch.float64))
        expected_y = reference.masked_values_linear(w["x"], w["weight"], w["bias"], *delta)
        assert term_error(y, expected_y, nn.functional.linear(w["x"], w["weight"], w["bias"])) <= FORWARD[dtype]
        expected_x = reference.masked_values_linear_input_gradient(w["grad_output"], w["weight"], *delta, shape[2])
        assert term_error(grad_x, expected_x, w["grad_output"] @ w["weight"]) <= FORWARD[dtype]
        expected_values = reference.masked_values_linear_gradient(w["grad_output"], w["x"], *delta)
        assert error(grad_values, expected_values) <= FACTORS[dtype], shape


# --- weights and factor values ---------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
def test_effective_weight(kind: str, dtype: torch.dtype, device: str) -> None:
    half_ulp = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    for seed, (t, n, k, r) in enumerate(SHAPES):
        layer = make_linear(device, (t, n, k, r), kind, dtype, seed, factor_dtype=torch.float32)
        mask = layer.mask.unpack().cpu()
        arguments = (layer.lora_a, layer.lora_b, layer.mask, layer.scale)
        merged = fade_kernels.effective_weight(layer.weight, *arguments)
        scale = torch.tensor(layer.scale, dtype=torch.float64)
        w = layer.wide
        exact = reference.effective_weight(w["weight"], w["lora_a"], w["lora_b"], layer.words, scale)
        assert merged.dtype == dtype
        assert error(merged, exact) <= half_ulp
        assert cuda_checks.same_bits(merged.cpu()[~mask], layer.weight.cpu()[~mask])  # the mask holds
        values = fade_kernels.masked_factor_values(layer.lora_a, layer.lora_b, layer.mask)
        assert error(values, (w["lora_b"] @ w["lora_a"])[mask]) <= 1e-5
        # Differentiable, and into memory that exists.
        grad = torch.randn(n, k, generator=generator(9)).to(dtype).to(device)
        _, gradients = run(
            lambda a, b, layer=layer: fade_kernels.effective_weight(layer.weight, a, b, layer.mask, layer.scale),
            [layer.lora_a, layer.lora_b],
            grad,
        )
        expected = reference.masked_factor_gradients(grad.cpu().double(), w["lora_a"], w["lora_b"], layer.words, scale)
        assert all(error(a, e) <= FACTORS[dtype] for a, e in zip(gradients, expected, strict=True)), (n, k)
        in_place = layer.weight.clone()
        assert fade_kernels.effective_weight(in_place, *arguments, out=in_place) is in_place
        assert error(in_place, exact) <= half_ulp


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_restore_are_exact(dtype: torch.dtype, device: str) -> None:
    layer = make_linear(device, (1, 70, 200, 4), "10 %", dtype)
    weight = layer.weight.clone()
    kept = fade_kernels.gather_masked(weight, layer.mask)
    fade_kernels.effective_weight(weight, layer.lora_a, layer.lora_b, layer.mask, out=weight)
    assert not torch.equal(weight, layer.weight)
    fade_kernels.scatter_masked_(weight, kept, layer.mask)
    assert cuda_checks.same_bits(weight, layer.weight)


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_effective_weights_of_many_layers(dtype: torch.dtype, device: str) -> None:
    one_ulp = max(torch.finfo(dtype).eps, 1e-6)  # in fp32 the order of a sum over 128 ranks decides more than rounding
    layers = [make_linear(device, shape, "10 %", dtype, seed) for seed, shape in enumerate(SHAPES)]
    lists = [[getattr(layer, name) for layer in layers] for name in ("weight", "lora_a", "lora_b", "mask", "scale")]
    for layer, merged in zip(layers, fade_kernels.effective_weights(*lists), strict=True):
        alone = fade_kernels.effective_weight(layer.weight, layer.lora_a, layer.lora_b, layer.mask, layer.scale)
        assert error(merged, alone) <= one_ulp
    drawn, again = (fade_kernels.effective_weights(*lists, stochastic=True, seed=5) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(drawn, again, strict=True))
    # The definition draws the same bits; a sum in another order may fall on the other side of one.
    # Where nothing is rounded to 16 bits it is computed in float64.
    exact = torch.float64 if dtype == torch.float32 else dtype
    cpu = [[tensor.cpu().to(exact) for tensor in tensors] for tensors in lists[:3]]
    words, scales = [layer.words for layer in layers], [torch.tensor(layer.scale) for layer in layers]
    expected = [torch.empty_like(weight) for weight in cpu[0]]
    reference.effective_weights_out(expected, *cpu, words, scales, True, 5)
    for one, other in zip(drawn, expected, strict=True):
        assert error(one, other) <= one_ulp
        assert (one.cpu() == other).float().mean() > 0.98 or dtype == torch.float32


@on_every_device
def test_a_table_of_layers_is_kept_while_numbers_stay(device: str) -> None:
    """A scale that is a number is copied to the device once, and another number is another table."""
    layers = [make_linear(device, shape, "10 %", torch.bfloat16, seed) for seed, shape in enumerate(SHAPES)]
    lists = [[getattr(layer, name) for layer in layers] for name in ("weight", "lora_a", "lora_b", "mask")]
    out = [torch.empty_like(layer.weight) for layer in layers]

    def merged(scale: float) -> list[Tensor]:
        fade_kernels.effective_weights(*lists, [scale] * len(layers), out=out)
        return [result.clone() for result in out]

    first = merged(0.7)
    if device == "cuda":
        from fade_kernels.triton_kernels.effective_weight import _tables

        known = len(_tables)
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = merged(0.7)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(_tables) == known
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    for layer, result in zip(layers, merged(-1.3), strict=True):
        alone = fade_kernels.effective_weight(layer.weight, layer.lora_a, layer.lora_b, layer.mask, -1.3)
        assert error(result, alone) <= torch.finfo(torch.bfloat16).eps


# --- convolution -----------------------------------------------------------------------------------------------------

# n, C_in, C_out, height, width, kernel, stride, padding, dilation, r
WINDOWS = [
    (2, 3, 5, 7, 6, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    (1, 8, 4, 9, 11, (3, 3), (2, 2), (1, 1), (1, 1), 16),
    (3, 5, 33, 8, 8, (1, 1), (1, 1), (0, 0), (1, 1), 4),
    (1, 5, 7, 8, 8, (1, 1), (2, 2), (0, 0), (1, 1), 4),
    (2, 4, 6, 10, 9, (3, 2), (2, 1), (0, 2), (1, 2), 1),
    (0, 3, 5, 7, 6, (3, 3), (1, 1), (1, 1), (1, 1), 2),
]


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_masked_conv2d(
    window: tuple[Any, ...], dtype: torch.dtype, memory_format: torch.memory_format, device: str
) -> None:
    n, c_in, c_out, height, width, kernel, stride, padding, dilation, r = window
    places = (stride, padding, dilation)
    named = {"stride": stride, "padding": padding, "dilation": dilation}
    out = [
        (s + 2 * p - d * (k - 1) - 1) // q + 1 for s, k, q, p, d in zip((height, width), kernel, *places, strict=True)
    ]
    columns = c_in * kernel[0] * kernel[1]
    for kind in ("empty", "10 %", "full"):
        mask = make_mask(kind, (c_out, columns), 1)
        sizes = {
            "x": (n, c_in, height, width), "weight": (c_out, c_in, *kernel), "bias": (c_out,),
            "lora_a": (r, c_in, *kernel), "lora_b": (c_out, r, 1, 1),
            "values": (int(mask.sum()),), "grad_output": (n, c_out, *out),
        }  # fmt: skip
        layer = make_layer(device, sizes, mask, dtype, factor_dtype=torch.float32)
        for name in ("x", "weight", "grad_output"):
            layer.tensors[name] = layer.tensors[name].contiguous(memory_format=memory_format)
        scale = torch.tensor(layer.scale, dtype=torch.float64)
        w, moves = layer.wide, Window(*(list(pair) for pair in places))

        y, gradients = run(
            lambda x, a, b, layer=layer: fade_kernels.masked_lora_conv2d(
                x, layer.weight, layer.bias, a, b, layer.mask, layer.scale, **named
            ),
            [layer.x, layer.lora_a, layer.lora_b],
            layer.grad_output,
        )
        delta = (w["lora_a"], w["lora_b"], layer.words, scale)
        assert error(y, reference.masked_lora_conv2d(w["x"], w["weight"], w["bias"], *delta, moves)) <= FORWARD[dtype]
        expected = [
            reference.masked_lora_conv2d_input_gradient(w["grad_output"], w["weight"], *delta, sizes["x"], moves),
            *reference.masked_lora_conv2d_factor_gradients(w["grad_output"], w["x"], *delta, moves),
        ]
        for a, e in zip(gradients, expected, strict=True):
            assert error(a, e) <= FORWARD[dtype], kind

        y, gradients = run(
            lambda x, v, layer=layer: fade_kernels.masked_values_conv2d(
                x, layer.weight, layer.bias, v, layer.mask, layer.scale, **named
            ),
            [layer.x, layer.values],
            layer.grad_output,
        )
        delta, size = (w["values"], layer.words, scale), list(kernel)
        exact = reference.masked_values_conv2d(w["x"], w["weight"], w["bias"], *delta, size, moves)
        assert error(y, exact) <= FORWARD[dtype]
        expected = [
            reference.masked_values_conv2d_input_gradient(
                w["grad_output"], w["weight"], *delta, sizes["x"], size, moves
            ),
            reference.masked_values_conv2d_gradient(w["grad_output"], w["x"], *delta, size, moves),
        ]
        for a, e in zip(gradients, expected, strict=True):
            assert error(a, e) <= FORWARD[dtype], kind


# --- saliency of layers ----------------------------------------------------------------------------------------------


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_accumulate_linear_gradient_magnitude(per_sample: bool, dtype: torch.dtype, device: str) -> None:
    """Products of 16-bit numbers are summed in fp32, so that every dtype meets the fp32 bound."""
    random = generator(4)
    for leading, rows, columns in [
        ((5,), 3, 7), ((4, 9), 33, 65), ((1, 1), 1, 1), ((3, 50), 320, 200), ((2, 1000), 64, 96), ((0, 4), 6, 8),
    ]:  # fmt: skip
        if per_sample and len(leading) < 2:
            continue
        dy = torch.randn(*leading, rows, generator=random).to(dtype)
        x = torch.randn(*leading, columns, generator=random).to(dtype)
        start = torch.rand(rows, columns, generator=random)
        for mode in cuda_checks.MODES:
            expected, saliency = start.double(), start.clone().to(device)
            reference.accumulate_linear_gradient_magnitude_(expected, dy.double(), x.double(), mode, per_sample)
            fade_kernels.accumulate_linear_gradient_magnitude_(saliency, dy.to(device), x.to(device), mode, per_sample)
            assert error(saliency, expected) <= 1e-5, (leading, rows, columns, mode)
    strided, start = torch.zeros(65, 33, device=device).t(), torch.zeros(33, 65, dtype=torch.float64)
    dy, x = (torch.randn(size, 4, 9, generator=random).to(dtype) for size in (33, 65))
    reference.accumulate_linear_gradient_magnitude_(
        start, dy.double().permute(1, 2, 0), x.double().permute(1, 2, 0), "abs", per_sample
    )
    dy, x = dy.to(device).permute(1, 2, 0), x.to(device).permute(1, 2, 0)
    fade_kernels.accumulate_linear_gradient_magnitude_(strided, dy, x, "abs", per_sample)
    assert error(strided, start) <= 1e-5


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).flatten(2).transpose(1, 2)).square().mean()


@on_every_device
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("on_host", [False, True])
def test_gradient_magnitude_of_a_network(on_host: bool, per_sample: bool, device: str) -> None:
    torch.manual_seed(5)
    network, images = Network().double(), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    expected = {name: torch.zeros_like(module.weight) for name, module in network.named_children()}
    for batch in images.split(1) if per_sample else [images]:
        network.zero_grad()
        (network(batch) * len(batch) / len(images)).backward()
        for name, module in network.named_children():
            expected[name] += module.weight.grad.abs()
    network.zero_grad()
    network = network.float().to(device)
    layers = dict(network.named_children())
    with fade_kernels.GradientMagnitude(layers, per_sample=per_sample, on_host=on_host) as watch:
        network(images.float().to(device)).backward()
    for name, saliency in watch.saliency.items():
        assert saliency.device.type == ("cpu" if on_host else torch.device(device).type)
        assert error(saliency, expected[name]) <= 1e-5, name
        assert getattr(network, name).weight.grad is None


# --- framework -------------------------------------------------------------------------------------------------------


def operator_calls(device: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator, those of the differentiable ones requiring gradients."""
    layer = make_linear(device, (6, 34, 70, 3), "10 %", torch.float32)
    words, scale, nnz = layer.mask.words, torch.tensor(0.7, device=device), layer.mask.count
    x, a, b, v = (layer.tensors[name].clone().requires_grad_() for name in ("x", "lora_a", "lora_b", "values"))
    lora, fixed = (a, b, words, scale), (layer.lora_a, layer.lora_b, words, scale)
    mask = make_mask("10 %", (5, 27), 2)
    sizes = {
        "x": (2, 3, 6, 7), "weight": (5, 3, 3, 3), "bias": (5,), "lora_a": (2, 3, 3, 3), "lora_b": (5, 2, 1, 1),
        "values": (int(mask.sum()),), "grad_output": (2, 5, 6, 7),
    }  # fmt: skip
    conv = make_layer(device, sizes, mask, torch.float32)
    images, ca, cb, cv = (conv.tensors[name].clone().requires_grad_() for name in ("x", "lora_a", "lora_b", "values"))
    window = ([1, 1], [1, 1], [1, 1])
    conv_fixed = (conv.lora_a, conv.lora_b, conv.mask.words, scale)
    conv_values = (conv.values, conv.mask.words, scale)
    pairs = [torch.zeros(34, 70, device=device), torch.zeros(5, 3, 3, 3, device=device)]
    by_row, by_column, order = find_positions(words, 70)
    y, dx = torch.zeros_like(layer.grad_output), torch.zeros_like(layer.x)
    both = (by_row.starts, by_row.index, by_column.starts, by_column.index, order)
    tokens = torch.randn(200, 70, generator=generator(8)).to(device)
    gram = tokens.T @ tokens / 200 + torch.eye(70, device=device)
    return {
        "pack_mask": (layer.mask.unpack(),),
        "unpack_mask": (words, 70),
        "mask_row_counts": (words, 70),
        "mask_occupancy": (words, 70, 16, 32),
        "gather_masked": (layer.weight, words, nnz),
        "scatter_masked_": (layer.weight.clone(), layer.values, words),
        "accumulate_gradient_magnitude_": (pairs, [layer.weight, conv.weight.half()], "abs"),
        "accumulate_linear_gradient_magnitude_": (pairs[0].clone(), layer.grad_output, layer.x, "abs", False),
        "select_top_k": ([layer.weight.abs(), conv.weight.abs()], 100),
        "masked_least_squares": (layer.weight, gram, words, nnz, True),
        "masked_least_squares_rows_": (
            torch.empty(nnz, device=device), torch.empty(nnz, device=device), torch.tensor(40, device=device),
            layer.weight, gram, words, by_row.starts[:-1].long(), torch.arange(len(words), device=device), 70,
        ),
        "masked_lora_linear": (x, layer.weight, layer.bias, *lora, 0),
        "masked_lora_linear_input_gradient": (layer.grad_output, layer.weight, *fixed, 0),
        "masked_lora_linear_factor_gradients": (layer.grad_output, layer.x, *fixed, 0),
        "masked_lora_linear_backward": (layer.grad_output, layer.x, layer.weight, *fixed, 0, True, True),
        "masked_values_linear_backward": (
            layer.grad_output, layer.x, layer.weight, layer.values, words, scale, 0, True, True,
        ),
        "masked_values_linear": (x, layer.weight, layer.bias, v, words, scale, 0),
        "masked_values_linear_input_gradient": (layer.grad_output, layer.weight, layer.values, words, scale, 70, 0),
        "masked_values_linear_gradient": (layer.grad_output, layer.x, layer.values, words, scale, 0),
        "add_gathered_lora_": (y, layer.x, layer.lora_a, layer.lora_b, *by_row, False, scale),
        "add_gathered_values_": (
            dx, layer.grad_output, layer.values, order, by_column.starts, by_column.index, scale,
        ),
        "sampled_gradient": (layer.grad_output, layer.x, *by_row),
        "sampled_factor_gradients": (layer.values, *both, layer.lora_a, layer.lora_b, scale),
        "masked_factor_gradients": (layer.weight, *fixed),
        "masked_factor_values": (a, b, words, nnz),
        "effective_weight": (layer.weight, *lora),
        "effective_weight_out": (layer.weight.clone(), layer.weight, *fixed),
        "effective_weight_from_values_out": (layer.weight.clone(), layer.weight, layer.values, words, scale),
        "effective_weights_out": (
            [layer.weight.clone(), layer.weight.half()], [layer.weight, layer.weight.half()], [layer.lora_a] * 2,
            [layer.lora_b] * 2, [words] * 2, [scale] * 2, True, 3,
        ),
        "effective_weights_from_values_out": (
            [layer.weight.clone(), layer.weight.half()], [layer.weight, layer.weight.half()], [layer.values] * 2,
            [words] * 2, [scale] * 2, True, 3,
        ),
        "masked_lora_conv2d": (images, conv.weight, conv.bias, ca, cb, conv.mask.words, scale, *window),
        "masked_lora_conv2d_input_gradient": (
            conv.grad_output, conv.weight, *conv_fixed, list(sizes["x"]), *window,
        ),
        "masked_lora_conv2d_factor_gradients": (conv.grad_output, conv.x, *conv_fixed, *window),
        "masked_values_conv2d": (images, conv.weight, conv.bias, cv, conv.mask.words, scale, [3, 3], *window),
        "masked_values_conv2d_input_gradient": (
            conv.grad_output, conv.weight, *conv_values, list(sizes["x"]), [3, 3], *window,
        ),
        "masked_values_conv2d_gradient": (conv.grad_output, conv.x, *conv_values, [3, 3], *window),
    }  # fmt: skip


OPERATORS = sorted(
    name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fade_kernels::")
)


@on_every_device
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, device: str) -> None:
    arguments = operator_calls(device)[name]
    kwargs: dict[str, Any] = {}
    if device == "cuda":  # sums in another order than the compiled graph's
        kwargs = {"atol": 1e-4, "rtol": 1e-4}
    opcheck(getattr(OPS, name), arguments, **kwargs)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_block_without_graph_breaks_or_recompilation(dtype: torch.dtype, device: str) -> None:
    layer = make_linear(device, (64, 48, 48, 4), "10 %", dtype)
    conv_mask = BitMask.pack(make_mask("10 %", (8, 72), 1)).to(device)
    random = generator(7)
    conv = [
        torch.randn(size, generator=random).to(dtype).to(device) for size in ((8, 8, 3, 3), (2, 8, 3, 3), (8, 2, 1, 1))
    ]

    def block(x: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        y = fade_kernels.masked_lora_linear(x, layer.weight, layer.bias, a, b, layer.mask, scale)
        y = torch.nn.functional.gelu(y).reshape(1, 8, 16, 24)
        y = fade_kernels.masked_lora_conv2d(y, conv[0], None, conv[1], conv[2], conv_mask, scale, padding=1)
        return y.float().square().mean()

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for i, scale in enumerate((0.5, 1.25, -3.0)):
        leaves = [tensor.clone().requires_grad_() for tensor in (layer.x, layer.lora_a, layer.lora_b)]
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            loss = compiled(*leaves, torch.tensor(scale, device=device))
        gradients = torch.autograd.grad(loss, leaves)
        expected_loss = block(*leaves, torch.tensor(scale, device=device))
        expected = torch.autograd.grad(expected_loss, leaves)
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        assert error(loss, expected_loss) <= tolerance
        assert all(error(a, e) <= tolerance for a, e in zip(gradients, expected, strict=True))


@on_every_device
def test_autocast_and_checkpointing(device: str) -> None:
    layer = make_linear(device, (40, 48, 64, 4), "10 %", torch.float32)
    leaves = [tensor.clone().requires_grad_() for tensor in (layer.x, layer.lora_a, layer.lora_b)]

    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return fade_kernels.masked_lora_linear(x, layer.weight, layer.bias, a, b, layer.mask, layer.scale)

    with torch.autocast(device, dtype=torch.bfloat16):
        y = torch.utils.checkpoint.checkpoint(forward, *leaves, use_reentrant=False)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, leaves, layer.grad_output.bfloat16())
    expected = expected_lora(layer, True, True)
    assert error(y, expected[0]) <= FORWARD[torch.bfloat16]
    assert all(error(a, e) <= 2e-2 for a, e in zip(gradients, expected[1:], strict=True))


@on_every_device
def test_gradients_of_attention_do_not_depend_on_earlier_calls(device: str) -> None:
    """`fade.modes` keeps to kernels of which that is true: cuDNN's planned for the first gradient's strides."""
    heads, tokens, width = 4, 256, 128
    source = generator(7)

    def rows(times: int = 1) -> Tensor:
        wide = torch.randn(1, tokens, times * heads * width, generator=source).bfloat16().to(device)
        return wide[..., : heads * width].unflatten(2, (heads, width)).transpose(1, 2)

    with plain_mode():
        for times in (1, 5, 1):  # a gradient of its own, a slice of a wider one, its own again
            q, k, v = leaves = [rows().requires_grad_() for _ in range(3)]
            grad_output = rows(times)
            got = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), leaves, grad_output)
            exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
            scores = exact[0] @ exact[1].mT / math.sqrt(width)
            expected = torch.autograd.grad(scores.softmax(-1) @ exact[2], exact, grad_output.cpu().double())
            assert all(error(g, e) <= FACTORS[torch.bfloat16] for g, e in zip(got, expected, strict=True)), times


@on_every_device
def test_bad_input_is_a_clear_error(device: str) -> None:
    layer = make_linear(device, (4, 33, 65, 2), "10 %", torch.float32)
    other = "meta" if device == "cpu" else "cpu"
    arguments = (layer.lora_a, layer.lora_b, layer.mask)
    with pytest.raises(ValueError, match="one device"):
        fade_kernels.masked_lora_linear(layer.x, layer.weight.to(other), None, *arguments)
    with pytest.raises(TypeError, match="dtypes must agree"):
        fade_kernels.masked_lora_linear(layer.x, layer.weight.half(), None, *arguments)
    with pytest.raises(ValueError, match="does not fit"):
        fade_kernels.masked_lora_linear(layer.x, layer.weight[:, 1:], None, *arguments)
    with pytest.raises(ValueError, match="one device"):
        fade_kernels.accumulate_gradient_magnitude_([layer.weight], [layer.weight.to(other)])
    with pytest.raises(ValueError, match=r"saliency\[1\] holds NaN"):
        fade_kernels.select_top_fraction([layer.weight.abs(), layer.weight * math.nan], 0.5)


# --- what only a GPU has: graphs, streams, devices -------------------------------------------------------------------


@contextmanager
def warmed_up() -> Iterator[None]:
    """A side stream on which a first call compiles and allocates before the same is captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


@needs_cuda
def test_accumulation_and_selection_in_a_cuda_graph() -> None:
    shapes = [(320, 320), (64, 32, 3, 3), *[(7, 33)] * 150]
    gradient = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]
    saliency = [torch.zeros(shape, device="cuda") for shape in shapes]
    with warmed_up():
        OPS.accumulate_gradient_magnitude_(saliency, gradient, "abs")
        OPS.select_top_k(saliency, 5000)
    for s in saliency:
        s.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS.accumulate_gradient_magnitude_(saliency, gradient, "abs")
        words, threshold, invalid = OPS.select_top_k(saliency, 5000)
        kept = OPS.gather_masked(saliency[0], words[0], 3000)
    expected = [torch.zeros_like(s) for s in saliency]
    for _ in range(3):
        for g, e in zip(gradient, expected, strict=True):
            g.normal_()
            e += g.float().abs()
        graph.replay()
        assert all(torch.equal(s, e) for s, e in zip(saliency, expected, strict=True))
        masks, kth = cuda_checks.stable_sort_masks([e.cpu() for e in expected], 5000)
        assert (float(threshold), int(invalid)) == (float(kth), -1)
        assert all(torch.equal(w.cpu(), reference.pack_mask(m)) for w, m in zip(words, masks, strict=True))
        chosen = expected[0].cpu()[masks[0]][:3000]
        assert torch.equal(kept.cpu()[: chosen.numel()], chosen)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["0.1 %", "10 %"])
def test_masked_lora_linear_in_a_cuda_graph(kind: str, dtype: torch.dtype) -> None:
    layer = make_linear("cuda", (256, 320, 320, 16), kind, dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (layer.x, layer.lora_a, layer.lora_b)]
    scale = torch.tensor(0.7, device="cuda")

    def step() -> list[Tensor]:
        y = fade_kernels.masked_lora_linear(
            leaves[0], layer.weight, layer.bias, *leaves[1:], layer.mask, scale
        )  # fmt: skip
        return [y, *torch.autograd.grad(y, leaves, layer.grad_output)]

    with warmed_up():
        for _ in range(2):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed, factor in ((11, 0.7), (12, -1.5)):  # other numbers in the same memory
        fresh = make_linear("cuda", (256, 320, 320, 16), kind, dtype, seed=0, scale=factor)
        with torch.no_grad():
            leaves[0].copy_(torch.randn(fresh.x.shape, generator=generator(seed)))
            scale.fill_(factor)
        fresh.wide["x"] = leaves[0].detach().cpu().double()
        graph.replay()
        expected = expected_lora(fresh, True, True)
        tolerances = [FORWARD[dtype]] * 2 + [FACTORS[dtype]] * 2
        assert all(error(a, e) <= t for a, e, t in zip(captured, expected, tolerances, strict=True)), factor


DOCUMENTED = re.findall(
    r"^```python\n(.*?)^```", (Path(__file__).parents[2] / "docs/cuda_graphs.md").read_text(), re.DOTALL | re.MULTILINE
)


@needs_cuda
@pytest.mark.parametrize("code", DOCUMENTED, ids=["training", "inference"])
def test_documented_cuda_graphs(code: str) -> None:
    exec(compile(code, "docs/cuda_graphs.md", "exec"), {"__name__": "documented"})


@needs_cuda
def test_work_goes_to_the_current_stream() -> None:
    saliency = torch.zeros(1 << 22, device="cuda")
    gradient = torch.zeros(1 << 22, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what follows must wait for this stream, and is wrong on any other
        gradient.fill_(1.0)
        OPS.accumulate_gradient_magnitude_([saliency], [gradient], "abs")
        words = OPS.pack_mask((saliency > 0).reshape(1024, -1))
        total = OPS.mask_row_counts(words, 1 << 12).sum()
    stream.synchronize()
    assert int(total) == 1 << 22


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_of_several_devices_in_one_call() -> None:
    saliency = [torch.zeros(5, 5, device=f"cuda:{i}") for i in (1, 0, 1)]
    gradient = [torch.full_like(s, float(i + 1)) for i, s in enumerate(saliency)]
    fade_kernels.accumulate_gradient_magnitude_(saliency, gradient)
    assert [float(s.mean()) for s in saliency] == [1.0, 2.0, 3.0]
    assert torch.cuda.current_device() == 0
