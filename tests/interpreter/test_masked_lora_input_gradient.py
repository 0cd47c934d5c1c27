"""Masked-LoRA input gradient under the interpreter, against the float64 definition."""

from types import ModuleType
from typing import Any

import pytest
import torch
from interpreter_testing import frobenius_error, linear_problem, strided_rows, wide

from fade_kernels import reference
from fade_kernels.triton_kernels import masked_lora_input_gradient as kernel
from fade_kernels.triton_kernels.launch import Tiling

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}
SMALL = Tiling({"BT": 16, "BN": 32, "BK": 32})
SMALL_APART = Tiling({"APART": 1, "BT": 16, "BN": 32, "BK": 32})


def gradient_problem(
    T: int, N: int, K: int, R: int, kind: str, dtype: torch.dtype, rng: torch.Generator, delta_scale: float = 1.0
) -> dict[str, Any]:
    """Random arguments of the input gradient: a linear's, with dY for x and bias."""
    arguments = linear_problem(T, N, K, R, kind, dtype, rng, delta_scale)
    del arguments["x"], arguments["bias"]
    return {"dy": torch.randn(T, N, generator=rng, dtype=torch.float64).to(dtype), **arguments}


def definition(arguments: dict[str, Any]) -> torch.Tensor:
    exact = wide(arguments)
    return reference.masked_lora_linear_input_gradient(exact.pop("dy"), **exact)


def gradient_error(module: ModuleType, arguments: dict[str, Any], **options: Any) -> float:
    """Error of dX relative to ||dX||, or to ||dY W|| or ||dY Delta|| where they cancel, in fp32."""
    out = torch.full((arguments["dy"].shape[0], arguments["lora_a"].shape[1]), float("nan"))
    assert module.masked_lora_input_gradient(**arguments, out=out, **options) is out
    delta = definition(arguments | {"weight": None})
    expected = definition(arguments)
    return frobenius_error(out, expected, terms=(delta, expected - delta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("T", "N", "K", "R", "kind"),
    [
        (1, 1, 1, 1, "full"),
        (1, 70, 100, 4, "random"),
        (33, 40, 72, 3, "random"),
        (33, 40, 72, 3, "overwritten"),
        (20, 33, 64, 16, "empty"),
        (35, 48, 96, 17, "full"),
        (17, 65, 130, 128, "block"),
        (140, 24, 40, 33, "random"),
    ],
)
def test_matches_the_definition(
    T: int, N: int, K: int, R: int, kind: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    arguments = gradient_problem(T, N, K, R, kind, dtype, rng)
    assert gradient_error(kernel, arguments, tiling=SMALL) <= TOLERANCE[dtype]
    assert gradient_error(kernel, arguments, tiling=SMALL, form="full") <= TOLERANCE[dtype]
    assert gradient_error(kernel, arguments | {"weight": None}) <= TOLERANCE[dtype]
    assert gradient_error(kernel, arguments, tiling=SMALL_APART) <= TOLERANCE[dtype]
    assert gradient_error(kernel, arguments, tiling=SMALL_APART, form="full") <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_default_tiling_and_output(dtype: torch.dtype, rng: torch.Generator) -> None:
    arguments = gradient_problem(150, 130, 200, 8, "random", dtype, rng)
    dx = kernel.masked_lora_input_gradient(**arguments)
    assert dx.dtype == dtype and dx.is_contiguous()
    assert frobenius_error(dx, definition(arguments)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("tiling", kernel.TILINGS, ids=str)
def test_every_tiling(tiling: Tiling, rng: torch.Generator) -> None:
    arguments = gradient_problem(130, 70, 100, 5, "random", torch.float16, rng)
    assert gradient_error(kernel, arguments, tiling=tiling) <= TOLERANCE[torch.float16]


def test_strided_and_transposed_arguments(rng: torch.Generator) -> None:
    arguments = gradient_problem(21, 37, 70, 6, "random", torch.float32, rng)
    for name in ("dy", "weight", "lora_a", "lora_b"):
        strided = arguments | {name: strided_rows(arguments[name])}
        assert gradient_error(kernel, strided, tiling=SMALL) <= 1e-5, name
        transposed = arguments | {name: arguments[name].t().contiguous().t()}
        assert gradient_error(kernel, transposed, tiling=SMALL) <= 1e-5, name
    out = torch.full((21, 80), float("nan"))
    kernel.masked_lora_input_gradient(**arguments, out=out[:, 5:75], tiling=SMALL)
    assert frobenius_error(out[:, 5:75], definition(arguments)) <= 1e-5
    assert out[:, :5].isnan().all() and out[:, 75:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_do(shape: tuple[int, int], rng: torch.Generator) -> None:
    T, K = shape
    arguments = gradient_problem(T, 40, K, 2, "full", torch.float32, rng)
    assert kernel.masked_lora_input_gradient(**arguments).shape == shape


def test_without_output_features_the_gradient_is_zero(rng: torch.Generator) -> None:
    arguments = gradient_problem(7, 0, 40, 2, "full", torch.float32, rng)
    assert torch.equal(kernel.masked_lora_input_gradient(**arguments), torch.zeros(7, 40))


def contract_error(module: ModuleType, arguments: dict[str, Any]) -> float:
    """||(dX - dY W) - dY Delta|| / ||dY Delta|| with dX in fp32."""
    exact = wide(arguments)
    out = torch.empty((arguments["dy"].shape[0], arguments["lora_a"].shape[1]), dtype=torch.float32)
    module.masked_lora_input_gradient(**arguments, out=out, tiling=SMALL)
    return frobenius_error(out.double() - exact["dy"] @ exact["weight"], definition(arguments | {"weight": None}))


def test_numerics_contract(rng: torch.Generator) -> None:
    # Delta 1000 times smaller than W: in fp16 W + Delta would round most of it away.
    arguments = gradient_problem(64, 160, 48, 4, "random", torch.float16, rng, delta_scale=1e-3)
    assert contract_error(kernel, arguments) <= 3e-3


def test_numerics_contract_fails_where_the_terms_share_a_rounding(rng: torch.Generator, mutate: Any) -> None:
    arguments = gradient_problem(64, 160, 48, 4, "random", torch.float16, rng, delta_scale=1e-3)
    merged = mutate(
        kernel,
        "tl.dot(b_delta.to(dy.dtype.element_ty), b_dy,",
        "tl.dot((b_weight + b_delta).to(dy.dtype.element_ty) - b_weight, b_dy,",
    )
    assert contract_error(merged, arguments) > 3e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_walks_occupied_tiles_first_and_all_of_them(dtype: torch.dtype, rng: torch.Generator) -> None:
    # One bit in every second tile, so that every strip has occupied and empty ones.
    mask = torch.zeros(200, 40, dtype=torch.bool)
    for n in range(0, 200, 32):
        mask[n, (n // 32 % 2) * 32] = True
    arguments = gradient_problem(19, 200, 40, 5, "empty", dtype, rng) | {"mask_words": reference.pack_mask(mask)}
    assert gradient_error(kernel, arguments, tiling=SMALL) <= TOLERANCE[dtype]
    assert gradient_error(kernel, arguments | {"weight": None}, tiling=SMALL) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("b_product * b_scale, 0.0)", "b_product * b_scale, b_product)"),
        ("o_word = i_k * (BK // 32)", "o_word = 0 * (BK // 32)"),
        ("tl.minimum(i_step + 1, TILES - 1)) if SKIP", "i_step) if SKIP"),
        ("for i_step in range(0 if APART else steps, TILES)", "for i_step in range(steps, TILES - 1)"),
        ("b_product * b_scale", "b_product"),
        ("range(0 if APART else steps, TILES)", "range(steps if APART else steps, TILES)"),
        ("if HAS_WEIGHT and not APART:", "if HAS_WEIGHT or APART:"),
    ],
    ids=[
        *("mask ignored", "first words for all", "next tile lost", "last tile lost", "scale lost"),
        *("weight of occupied tiles lost", "weight of occupied tiles twice"),
    ],
)
def test_check_fails_on_a_mutant(old: str, new: str, rng: torch.Generator, mutate: Any) -> None:
    arguments = gradient_problem(33, 72, 72, 3, "random", torch.float32, rng)
    arguments["mask_words"][32:64] = 0  # an empty tile in every strip
    tiling = SMALL_APART if "APART" in new else SMALL
    assert gradient_error(mutate(kernel, old, new), arguments, tiling=tiling) > TOLERANCE[torch.float32]


def test_refuses_what_the_kernel_does_not_take(rng: torch.Generator) -> None:
    arguments = gradient_problem(4, 8, 32, 2, "full", torch.float32, rng)
    with pytest.raises(TypeError, match="float64"):
        kernel.masked_lora_input_gradient(**wide(arguments))
    with pytest.raises(ValueError, match="out must be"):
        kernel.masked_lora_input_gradient(**arguments, out=torch.empty(4, 8))
