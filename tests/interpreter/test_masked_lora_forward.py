"""Masked-LoRA forward under the interpreter, against the float64 definition."""

from types import ModuleType
from typing import Any

import pytest
import torch
from interpreter_testing import frobenius_error, linear_problem, strided_rows, wide

from fade_kernels import mask_facts, reference
from fade_kernels.triton_kernels import masked_lora_forward as kernel
from fade_kernels.triton_kernels.launch import Tiling

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}
SMALL = Tiling({"BT": 16, "BN": 16, "BK": 32})
SMALL_APART = Tiling({"APART": 1, "BT": 16, "BN": 16, "BK": 32})


def forward_error(module: ModuleType, arguments: dict[str, Any], **options: Any) -> float:
    """Error of y relative to ||y||, or to the largest of its terms where they cancel, in fp32."""
    out = torch.full((arguments["x"].shape[0], arguments["lora_b"].shape[0]), float("nan"))
    y = module.masked_lora_forward(**arguments, out=out, **options)
    assert y is out
    exact = wide(arguments)
    with_weight = reference.masked_lora_linear(**exact | {"bias": None})
    delta = reference.masked_lora_linear(**exact | {"weight": None, "bias": None})
    bias = [] if exact["bias"] is None else [exact["bias"].expand_as(y)]
    return frobenius_error(y, reference.masked_lora_linear(**exact), terms=(delta, with_weight - delta, *bias))


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
    arguments = linear_problem(T, N, K, R, kind, dtype, rng)
    assert forward_error(kernel, arguments, tiling=SMALL) <= TOLERANCE[dtype]
    assert forward_error(kernel, arguments | {"bias": None}, tiling=SMALL, form="full") <= TOLERANCE[dtype]
    assert forward_error(kernel, arguments | {"weight": None}) <= TOLERANCE[dtype]
    assert forward_error(kernel, arguments, tiling=SMALL_APART) <= TOLERANCE[dtype]
    assert forward_error(kernel, arguments, tiling=SMALL_APART, form="full") <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_default_tiling_and_output(dtype: torch.dtype, rng: torch.Generator) -> None:
    arguments = linear_problem(150, 130, 200, 8, "random", dtype, rng)
    y = kernel.masked_lora_forward(**arguments)
    assert y.dtype == dtype and y.is_contiguous()
    assert frobenius_error(y, reference.masked_lora_linear(**wide(arguments))) <= TOLERANCE[dtype]


@pytest.mark.parametrize("tiling", kernel.TILINGS, ids=str)
def test_every_tiling(tiling: Tiling, rng: torch.Generator) -> None:
    arguments = linear_problem(130, 70, 100, 5, "random", torch.float16, rng)
    assert forward_error(kernel, arguments, tiling=tiling) <= TOLERANCE[torch.float16]


def test_strided_and_transposed_arguments(rng: torch.Generator) -> None:
    arguments = linear_problem(21, 37, 70, 6, "random", torch.float32, rng)
    for name in ("x", "weight", "lora_a", "lora_b"):
        strided = arguments | {name: strided_rows(arguments[name])}
        assert forward_error(kernel, strided, tiling=SMALL) <= 1e-5, name
        transposed = arguments | {name: arguments[name].t().contiguous().t()}
        assert forward_error(kernel, transposed, tiling=SMALL) <= 1e-5, name
    out = torch.full((21, 50), float("nan"))
    kernel.masked_lora_forward(**arguments, out=out[:, 5:42], tiling=SMALL)
    assert frobenius_error(out[:, 5:42], reference.masked_lora_linear(**wide(arguments))) <= 1e-5
    assert out[:, :5].isnan().all() and out[:, 42:].isnan().all()


@pytest.mark.parametrize("factors", [torch.float32, torch.float16], ids=["fp32 A", "fp16 A"])
def test_fp32_factors_beside_fp16_rows(factors: torch.dtype, rng: torch.Generator) -> None:
    # Values of B below the subnormals of fp16: cast to it, they would be gone.
    arguments = linear_problem(20, 40, 64, 4, "random", torch.float16, rng) | {"weight": None, "bias": None}
    arguments["lora_a"] = (arguments["lora_a"].double() * 1e3).to(factors)
    arguments["lora_b"] = arguments["lora_b"].float() * 1e-8
    arguments["scale"] = torch.tensor(100.0)
    assert forward_error(kernel, arguments, tiling=SMALL) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_do(shape: tuple[int, int], rng: torch.Generator) -> None:
    arguments = linear_problem(*shape, 40, 2, "full", torch.float32, rng)
    assert kernel.masked_lora_forward(**arguments).shape == shape


def contract_error(module: ModuleType, arguments: dict[str, Any]) -> float:
    """||(y - x W^T) - x Delta^T|| / ||x Delta^T|| with y in fp32."""
    exact = wide(arguments)
    y = torch.empty((arguments["x"].shape[0], arguments["lora_b"].shape[0]), dtype=torch.float32)
    module.masked_lora_forward(**arguments, out=y, tiling=SMALL)
    base = torch.nn.functional.linear(exact["x"], exact["weight"], exact["bias"])
    delta = reference.masked_lora_linear(**(exact | {"weight": None, "bias": None}))
    return frobenius_error(y.double() - base, delta)


def test_numerics_contract(rng: torch.Generator) -> None:
    # Delta 1000 times smaller than W: in fp16 W + Delta would round most of it away.
    arguments = linear_problem(64, 48, 160, 4, "random", torch.float16, rng, delta_scale=1e-3)
    assert contract_error(kernel, arguments) <= 3e-3


def test_numerics_contract_fails_where_the_terms_share_a_rounding(rng: torch.Generator, mutate: Any) -> None:
    arguments = linear_problem(64, 48, 160, 4, "random", torch.float16, rng, delta_scale=1e-3)
    merged = mutate(
        kernel,
        "tl.dot(b_delta.to(x.dtype.element_ty), b_x,",
        "tl.dot((b_weight + b_delta).to(x.dtype.element_ty) - b_weight, b_x,",
    )
    assert contract_error(merged, arguments) > 3e-3


def checkered(rows: int, columns: int, tile: tuple[int, int]) -> torch.Tensor:
    """Words of a mask with one bit in every second tile, so that every strip has occupied and empty ones."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for n in range(0, rows, tile[0]):
        mask[n, (n // tile[0] % 2) * tile[1] :: 2 * tile[1]] = True
    return reference.pack_mask(mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_walks_occupied_tiles_first_and_all_of_them(dtype: torch.dtype, rng: torch.Generator) -> None:
    arguments = linear_problem(19, 40, 200, 5, "empty", dtype, rng) | {"mask_words": checkered(40, 200, (16, 32))}
    assert forward_error(kernel, arguments, tiling=SMALL) <= TOLERANCE[dtype]
    assert forward_error(kernel, arguments | {"weight": None}, tiling=SMALL) <= TOLERANCE[dtype]


def test_the_list_of_tiles_is_made_once_and_again_for_other_words(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = linear_problem(19, 40, 200, 5, "empty", torch.float32, rng)
    made = []
    find = mask_facts.find_tile_order
    monkeypatch.setattr(mask_facts, "find_tile_order", lambda *a, **k: made.append(1) or find(*a, **k))
    for _ in range(3):
        assert forward_error(kernel, arguments, tiling=SMALL) <= 1e-5
    assert len(made) == 1
    arguments["mask_words"].copy_(checkered(40, 200, (16, 32)))
    assert forward_error(kernel, arguments, tiling=SMALL) <= 1e-5
    assert len(made) == 2


def test_while_a_graph_is_captured_an_unknown_list_is_done_without(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = linear_problem(19, 40, 200, 5, "random", torch.float32, rng)
    monkeypatch.setattr(mask_facts, "capturing", lambda words: True)
    assert forward_error(kernel, arguments) <= 1e-5
    assert not mask_facts.kept_with(arguments["mask_words"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("b_product * b_scale, 0.0)", "b_product * b_scale, b_product)"),
        ("m_word = (o_word * 32 < K)", "m_word = (o_word * 32 < K - 32)"),
        ("tl.minimum(i_step + 1, TILES - 1)) if SKIP", "i_step) if SKIP"),
        ("for i_step in range(0 if APART else steps, TILES)", "for i_step in range(steps, TILES - 1)"),
        ("b_product * b_scale", "b_product"),
        ("range(0 if APART else steps, TILES)", "range(steps if APART else steps, TILES)"),
        ("if HAS_WEIGHT and not APART:", "if HAS_WEIGHT or APART:"),
    ],
    ids=[
        *("mask ignored", "last word lost", "next tile lost", "last tile lost", "scale lost"),
        *("weight of occupied tiles lost", "weight of occupied tiles twice"),
    ],
)
def test_check_fails_on_a_mutant(old: str, new: str, rng: torch.Generator, mutate: Any) -> None:
    arguments = linear_problem(33, 40, 72, 3, "random", torch.float32, rng)
    arguments["mask_words"][:, 1] = 0  # an empty tile in every strip
    tiling = SMALL_APART if "APART" in new else SMALL
    assert forward_error(mutate(kernel, old, new), arguments, tiling=tiling) > TOLERANCE[torch.float32]


def test_refuses_what_the_kernel_does_not_take(rng: torch.Generator) -> None:
    arguments = linear_problem(4, 8, 32, 2, "full", torch.float32, rng)
    with pytest.raises(TypeError, match="float64"):
        kernel.masked_lora_forward(**wide(arguments))
    with pytest.raises(ValueError, match="input_precision"):
        kernel.masked_lora_forward(**arguments, input_precision="bf16")
    with pytest.raises(ValueError, match="ranks from 1 to 128"):
        kernel.masked_lora_forward(**(arguments | {"lora_a": torch.ones(129, 32), "lora_b": torch.ones(8, 129)}))
    with pytest.raises(ValueError, match="out must be"):
        kernel.masked_lora_forward(**arguments, out=torch.empty(8, 4))
    with pytest.raises(ValueError, match="stride 1"):
        kernel.masked_lora_forward(**arguments, out=torch.empty(8, 4).t())
