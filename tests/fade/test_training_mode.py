"""The one-product mode: what a step computes with, that nothing else sees it, and whole runs in 16 bits."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTokenizer

import fade
from fade import training_mode
from fade.config import Config
from fade.layers import MaskedLoraLayer, MaskedLoraLinear
from fade.report import how_it_was_trained
from fade.training_mode import ResolvedMode, memory_plan, rows_in

from .adapters import ATTENTION, CONVOLUTIONS, random_adapter
from .conftest import denoise, same_bits, tiny_pipeline, weights
from .test_unlearning import WORDS, interrupted_after, tensors

LOW = [torch.bfloat16, torch.float16]
FORMS = pytest.mark.parametrize("values", [False, True], ids=["factors", "values"])
PLANS = pytest.mark.parametrize("plan", ["kept", "refilled"])


def resolved(adapter: fade.Adapter, plan: str = "kept", asked: str = "one-product") -> ResolvedMode:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_mode, "memory_plan", lambda *_: plan)
        return ResolvedMode.of(asked, adapter.name, list(adapter.layers.values()), lambda: [])


def delta(layer: MaskedLoraLayer) -> Tensor:
    return layer.get_delta_weight("fade").flatten(1)


def input_of(layer: MaskedLoraLayer, seed: int = 0) -> Tensor:
    weight, generator = layer.get_base_layer().weight, torch.Generator().manual_seed(seed)
    shape = (2, 7, weight.shape[1]) if weight.dim() == 2 else (2, weight.shape[1], 5, 6)
    return torch.randn(shape, generator=generator).to(weight.dtype)


def weight_used(layer: MaskedLoraLinear) -> tuple[Tensor, Tensor]:
    """The weight that a linear layer multiplies by, forward and for dX, as [N, K] without the bias."""
    weight = layer.get_base_layer().weight
    x = torch.eye(weight.shape[1], dtype=weight.dtype, requires_grad=True)
    bias, layer.get_base_layer().bias = layer.get_base_layer().bias, None
    try:
        y = layer(x)
    finally:
        layer.get_base_layer().bias = bias
    # Each row of dX is then a row of the weight, too.
    rows = [torch.autograd.grad(y[0], x, one, retain_graph=True)[0][0] for one in torch.eye(len(weight)).to(y)]
    return y.detach().t(), torch.stack(rows)


@FORMS
@PLANS
@pytest.mark.parametrize("dtype", LOW)
def test_both_passes_of_a_step_use_one_weight_of_the_two_nearest(
    pipeline: StableDiffusionPipeline, dtype: torch.dtype, plan: str, values: bool
) -> None:
    pipeline.to(dtype)
    adapter = random_adapter(pipeline, values=values, strength=0.05)
    mode, layer = resolved(adapter, plan), next(iter(adapter.layers.values()))
    base, added = layer.get_base_layer().weight.detach(), delta(layer)
    mask, exact = layer.lora_mask["fade"].mask.unpack(), base.float() + added
    seen = []
    for step in range(24):
        with mode.step(step):
            forward, backward = weight_used(layer)
        assert torch.equal(forward, backward)
        assert torch.equal(forward[~mask], base[~mask])
        seen.append(forward.float())
    # The neighbours of a 16-bit number differ by at most 2^-7 (bf16) or 2^-10 (fp16) of it.
    spacing = exact.abs() * torch.finfo(dtype).eps + 1e-7
    assert all(((one - exact).abs() <= spacing).all() for one in seen)
    kept = torch.stack(seen).mean(0) - base.float()
    share = (kept * added).sum() / added.square().sum()
    assert share.item() == pytest.approx(1, abs=0.05)
    assert not torch.equal(seen[0], seen[1])


@FORMS
@PLANS
def test_a_step_repeats_itself_and_the_next_one_does_not(
    pipeline: StableDiffusionPipeline, plan: str, values: bool
) -> None:
    """Convolutions and linear layers alike; the adapter's own gradients are those of the exact mode."""
    pipeline.to(torch.bfloat16)
    adapter = random_adapter(pipeline, values=values, targets=(*ATTENTION, *CONVOLUTIONS), strength=0.05)
    mode = resolved(adapter, plan)
    for parameter in adapter.parameters():
        parameter.requires_grad_(True)
    for layer in adapter.layers.values():
        x = input_of(layer).requires_grad_(True)

        def results(x: Tensor = x, layer: MaskedLoraLayer = layer) -> list[Tensor]:
            y = layer(x)
            generator = torch.Generator().manual_seed(1)
            gradients = torch.autograd.grad(
                y, [x, *layer.adapter_parameters("fade")], torch.randn(y.shape, generator=generator).to(y)
            )
            return [y.detach(), *gradients]

        exact = results()
        with mode.step(3):
            third, again = results(), results()
        with mode.step(4):
            fourth = results()
        after = results()
        assert all(map(torch.equal, third, again)) and all(map(torch.equal, exact, after))
        assert not torch.equal(third[0], fourth[0]) and not torch.equal(third[1], fourth[1])
        assert not torch.equal(third[0], exact[0])
        for rounded, wanted in zip(third, exact, strict=True):
            assert (rounded.float() - wanted.float()).norm() < 0.02 * wanted.float().norm()
        for rounded, wanted in zip(third[2:], exact[2:], strict=True):
            torch.testing.assert_close(rounded, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_layers_of_one_shape_are_rounded_each_in_its_own_way(pipeline: StableDiffusionPipeline) -> None:
    pipeline.to(torch.bfloat16)
    adapter = random_adapter(pipeline, density=1.0, strength=0.05)
    for plan in ("kept", "refilled"):
        mode, ups = resolved(adapter, plan), {}
        with mode.step(0):
            for layer in adapter.layers.values():
                exact = layer.get_base_layer().weight.float() + delta(layer)
                away = weight_used(layer)[0].float().abs() > exact.abs()  # from zero, as the random bits say
                ups.setdefault(exact.shape, []).append(away)
        first, second = next(layers for layers in ups.values() if len(layers) > 1)[:2]
        assert (first == second).float().mean().item() == pytest.approx(0.5, abs=0.1)


@PLANS
def test_the_teacher_and_what_is_judged_are_exact(pipeline: StableDiffusionPipeline, plan: str) -> None:
    pipeline.to(torch.bfloat16)
    base = denoise(pipeline)
    adapter = random_adapter(pipeline)
    before, exact = weights(pipeline), denoise(pipeline)
    mode = resolved(adapter, plan)
    with mode.step(0):
        assert not torch.equal(denoise(pipeline), exact)
        with adapter.disabled():
            assert torch.equal(denoise(pipeline), base)
    assert torch.equal(denoise(pipeline), exact)
    assert same_bits(weights(pipeline), before)
    with pytest.raises(KeyError), mode.step(1):
        raise KeyError
    assert torch.equal(denoise(pipeline), exact)


@PLANS
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_recomputes_is_the_same(
    pipeline: StableDiffusionPipeline, plan: str, reentrant: bool
) -> None:
    pipeline.to(torch.bfloat16)
    adapter = random_adapter(pipeline, strength=0.1)
    mode = resolved(adapter, plan)
    layers = list(adapter.layers.values())[:4]
    layers = [layer for layer in layers if layer.get_base_layer().weight.shape == (16, 16)]
    assert len(layers) >= 2
    parameters = [p for layer in layers for p in layer.adapter_parameters("fade")]
    for parameter in parameters:
        parameter.requires_grad_(True)
    x = input_of(layers[0])

    def block(h: Tensor) -> Tensor:
        for layer in layers:
            h = layer(h)
        return h

    def gradients(run) -> list[Tensor]:
        h = x.clone().requires_grad_(True)
        run(h).float().square().sum().backward()
        found = [h.grad, *(parameter.grad for parameter in parameters)]
        for parameter in parameters:
            parameter.grad = None
        return found

    with mode.step(7):
        plain = gradients(block)
        recomputed = gradients(lambda h: checkpoint(block, h, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, recomputed))


@PLANS
def test_beside_another_adapter_and_at_another_strength(pipeline: StableDiffusionPipeline, plan: str) -> None:
    pipeline.to(torch.bfloat16)
    random_adapter(pipeline, "other", seed=5, strength=0.2)
    adapter = random_adapter(pipeline, values=True, strength=0.2)
    layer = next(iter(adapter.layers.values()))
    mode, x = resolved(adapter, plan), input_of(layer)
    exact = layer(x).float()
    with mode.step(0):
        rounded = layer(x).float()
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()
    adapter.scale = 0.0
    with mode.step(1):  # nothing of this adapter is left to round, and the other one is exact
        assert torch.equal(layer(x), layer.base_layer(x) + layer._delta("other", x))


def test_the_plan_follows_from_what_the_weights_take() -> None:
    attention_of_flux = 5_000_000_000
    assert memory_plan(attention_of_flux, 141 * 10**9) == "kept"
    assert memory_plan(attention_of_flux, 24 * 10**9) == "refilled"
    assert memory_plan(0, 0) == "kept"


def test_rows_are_counted_where_they_are_multiplied(pipeline: StableDiffusionPipeline) -> None:
    adapter = random_adapter(pipeline, targets=(*ATTENTION, *CONVOLUTIONS))
    rows = dict(zip(adapter.layers, rows_in(list(adapter.layers.values()), lambda: denoise(pipeline)), strict=True))
    assert rows["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"] == 2 * 8 * 8
    assert rows["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"] == 2 * 5
    assert rows["down_blocks.1.resnets.0.conv1"] == 2 * 4 * 4
    assert not any(layer._forward_hooks for layer in adapter.layers.values())


def test_auto_asks_the_cost_model_for_each_layer(
    pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.to(torch.float16)
    adapter = random_adapter(pipeline)
    layers = list(adapter.layers.values())
    rows = [10 + i for i in range(len(layers))]
    asked = []

    def choose(dtype, tokens, rows, columns, density, occupancy) -> str:
        asked.append((dtype, tokens, rows, columns, density, occupancy))
        return "one-product" if tokens % 2 else "exact"

    monkeypatch.setattr(training_mode.choices, "choose_training_mode", choose)
    here = ResolvedMode.of("auto", "fade", layers, lambda: rows)
    assert not asked and not here.one_product
    assert here.record("auto")["exact_because"] == ["it costs no second product on cpu"]

    monkeypatch.setattr(training_mode, "WHERE_EXACT_COSTS", ("cpu",))
    mixed = ResolvedMode.of("auto", "fade", layers, lambda: rows)
    for layer, count, call in zip(layers, rows, asked, strict=True):
        mask = layer.lora_mask["fade"].mask
        assert call[:4] == (torch.float16, count, *mask.shape)
        assert call[4] == pytest.approx(mask.density) and 0 < call[5] <= 1
    assert mixed.one_product == [layer for layer, count in zip(layers, rows, strict=True) if count % 2]
    record = mixed.record("auto")
    assert record["used"] == "mixed" and record["rounded_weights"] == "kept"
    assert record["layers"] == {"one-product": len(mixed.one_product), "exact": mixed.exact}
    assert "the cost model prefers it" in how_it_was_trained({"training_mode": record})


@pytest.mark.parametrize(("method", "plan"), [("distillation", "refilled"), ("both", "kept")])
def test_whole_runs_in_16_bits(
    tokenizer: CLIPTokenizer, quick: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, plan: str
) -> None:
    """Another adapter than the exact mode's, near it; resumed, the same bits as without an interruption."""
    monkeypatch.setattr(training_mode, "memory_plan", lambda *_: plan)
    config = quick.replace(
        overwrite__method=method, overwrite__accumulation=2, overwrite__checkpoint_every=1, overwrite__steps=4,
        locate__saliency="auto" if method == "both" else "random", overwrite__pool=2,
    ).without_ignored()  # fmt: skip

    def pipeline() -> StableDiffusionPipeline:
        made = tiny_pipeline(tokenizer)
        made.to(torch.bfloat16)
        return made

    exact = fade.unlearn(pipeline(), **WORDS, config=config)
    config = config.replace(overwrite__training_mode="one-product")
    used = pipeline()
    before = weights(used)
    whole = fade.unlearn(used, **WORDS, config=config)
    assert same_bits(weights(used), before)
    assert torch.equal(denoise(used), denoise(used))
    assert exact.run["training_mode"]["used"] == "exact"
    mode = whole.run["training_mode"]
    assert (mode["used"], mode["rounded_weights"], mode["layers"]["exact"]) == ("one-product", plan, 0)
    assert re.match(r"\d+ layers in one product, weights rounded", how_it_was_trained(whole.run))

    found, wanted = (torch.cat([t.flatten() for t in tensors(one).values()]) for one in (whole, exact))
    assert not torch.equal(found, wanted)
    assert (found - wanted).norm() < 0.2 * wanted.norm()

    with interrupted_after(2):
        fade.unlearn(pipeline(), **WORDS, config=config, output=tmp_path / "out")
    resumed = fade.unlearn(pipeline(), **WORDS, config=config, output=tmp_path / "out", resume=True)
    assert same_bits(tensors(resumed), tensors(whole))
    assert resumed.run["losses"] == whole.run["losses"]


def test_in_float32_there_is_nothing_to_round(tokenizer: CLIPTokenizer, quick: Config) -> None:
    config = quick.replace(locate__saliency="random", overwrite__steps=2).without_ignored()
    config = config.replace(overwrite__training_mode="exact")
    exact = fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config)
    config = config.replace(overwrite__training_mode="one-product")
    asked = fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config)
    assert same_bits(tensors(asked), tensors(exact))
    mode = asked.run["training_mode"]
    assert (mode["asked"], mode["used"]) == ("one-product", "exact")
    assert how_it_was_trained(asked.run) == "every product exact (nothing to round in float32)"
    assert how_it_was_trained(exact.run) == "every product exact"
    assert how_it_was_trained({}) is None
