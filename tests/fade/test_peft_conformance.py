"""What masked adapters do under PEFT's own calls, next to what a plain LoRA does there: both forms, random, full and
single-layer masks, linear layers and convolutions. The rows of `docs/conformance.md`.

The pinned adapters of pipelines, under diffusers' calls: `test_pipeline_conformance`.
"""

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from peft import (
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    ShiraConfig,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fade_kernels import BitMask

from .conformance_table import DOCUMENT, behaviour, table
from .peft_pair import (
    FORMS,
    LAYERS,
    MASKS,
    RANK,
    Net,
    Pair,
    columns,
    dense_definition,
    fill,
    images,
    masked_config,
    masked_layers,
    targets_of,
    tuner_layers,
)

BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
PADDINGS = [(0, "zeros"), (1, "zeros"), ((2, 1), "zeros"), ("same", "zeros"), ("valid", "zeros")]
PADDINGS += [(padding, mode) for mode in ("circular", "reflect", "replicate") for padding in (1, (2, 1), "same")]
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.fixture(params=[(form, mask) for form in FORMS for mask in MASKS], ids=lambda p: f"{p[0]}-{p[1]}")
def pair(request: pytest.FixtureRequest) -> Pair:
    """A masked adapter "ours" on our side, its dense equal on PEFT's."""
    return Pair(*request.param).masked("ours", scale=0.7)


@pytest.fixture(params=[(form, mask) for form in FORMS for mask in MASKS], ids=lambda p: f"{p[0]}-{p[1]}")
def ours(request: pytest.FixtureRequest) -> Pair:
    """As `pair`, our adapter made as the product makes it."""
    return Pair(*request.param, fade=True).masked("ours", scale=0.7)


@pytest.fixture
def two(pair: Pair) -> Pair:
    """A second masked adapter, "second", beside the first; only the first is on."""
    pair.masked("second", scale=1.3)
    pair.call(lambda model: model.set_adapter("ours"))
    return pair


def style(**settings: Any) -> LoraConfig:
    """A plain LoRA that is not zero."""
    defaults = {"r": 2, "lora_alpha": 3, "target_modules": list(LAYERS), "init_lora_weights": False}
    return LoraConfig(**(defaults | settings))


def activate(pair: Pair, *names: str) -> None:
    pair.call(lambda model: model.base_model.set_adapter(list(names)))


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# What the layer computes


@behaviour(1)
def test_forward_is_the_masked_weights(pair: Pair) -> None:
    """The output is that of W + s·M⊙(BA), both forms, all masks"""
    pair.same()
    pair.is_dense(ours=0.7)


@behaviour(1, "PEFT's own LoRA pads with zeros whatever the layer's padding mode; ours computes with W + Δ in each")
@BOTH_FORMS
@pytest.mark.parametrize(("padding", "mode"), PADDINGS)
def test_convolutions_of_every_padding(form: str, padding: int | str | tuple[int, int], mode: str) -> None:
    """Convolutions of every padding, in numbers and in words, and every padding mode"""
    stride = 1 if padding == "same" else 2
    pair = Pair(form, "random", Net(padding, mode, stride)).masked()
    pair.is_dense(ours=1.0)
    if mode == "zeros":
        pair.same()
    pair.ours.disable_adapter_layers()
    x = images()
    assert torch.equal(pair.ours(x), pair.base(x))


@behaviour(1, "PEFT's own LoRA pads with zeros; a Δ of zero leaves every convolution as it is here")
@BOTH_FORMS
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_zero_delta_changes_nothing(form: str, mode: str) -> None:
    """A Δ of zero changes nothing"""
    pair = Pair(form, "random", Net(padding_mode=mode)).masked()
    for layer in masked_layers(pair.ours, "ours").values():
        layer.set_scale("ours", 0.0)
    x = images()
    torch.testing.assert_close(pair.ours(x), pair.base(x), rtol=1e-6, atol=1e-6)


@behaviour(1)
def test_gradients_are_the_dense_definitions(pair: Pair) -> None:
    """Gradients of the input and of the trained tensors"""
    layers = masked_layers(pair.ours, "ours")
    for layer in layers.values():
        for parameter in layer.adapter_parameters("ours"):
            parameter.requires_grad_(True)
    x = images().requires_grad_()
    weighting = torch.randn(len(x), 4)
    (pair.ours(x) * weighting).sum().backward()

    wide = x.detach().double().requires_grad_()
    leaves: dict[str, list[Tensor]] = {}
    changed = {}
    for name, layer in layers.items():
        weight = pair.base.get_submodule(name).weight.detach().double()
        leaves[name] = [p.detach().double().requires_grad_() for p in layer.adapter_parameters("ours")]
        bits = layer.lora_mask["ours"].mask.unpack()
        if pair.form == "values":
            delta = torch.zeros(bits.shape, dtype=torch.float64)
            delta = delta.masked_scatter(bits, leaves[name][0].flatten())
        else:
            lora_a, lora_b = leaves[name]
            delta = (lora_b.flatten(1) @ lora_a.flatten(1)) * bits
        changed[f"{name}.weight"] = weight + 0.7 * delta.view(weight.shape)
    model = copy.deepcopy(pair.base).double()
    (torch.func.functional_call(model, changed, wide) * weighting).sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    for name, layer in layers.items():
        for parameter, leaf in zip(layer.adapter_parameters("ours"), leaves[name], strict=True):
            torch.testing.assert_close(parameter.grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for n, p in pair.ours.named_parameters() if n.endswith("base_layer.weight"))


@behaviour(1)
def test_training_moves_the_same_delta() -> None:
    """A step of SGD on a full mask's factors is plain LoRA's"""
    base = Net()
    x, wanted = images(), torch.randn(5, 4)
    ours = get_peft_model(copy.deepcopy(base), masked_config("factors"), adapter_name="ours")
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, lora_alpha=3, target_modules=list(LAYERS)), "ours")
    for name, layer in tuner_layers(ours).items():
        fill(layer, "ours", "factors", "full")
        for part in ("lora_A", "lora_B"):
            factor = getattr(layer, part)["ours"].weight
            getattr(tuner_layers(plain)[name], part)["ours"].weight.data.copy_(factor.data)
    for model in (ours, plain):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), wanted).backward()
            optimizer.step()
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)


# Which adapters are on


@behaviour(1)
def test_several_active_adapters_add_up(two: Pair) -> None:
    """Several active adapters add up, in any order"""
    for names in (["ours", "second"], ["second", "ours"]):
        activate(two, *names)
        two.same()
        two.is_dense(ours=0.7, second=1.3)


@behaviour(1)
def test_set_adapter(two: Pair) -> None:
    """`set_adapter` under a plain LoraConfig: the named ones are on, the others off"""
    x = images()
    two.is_dense(x, ours=0.7)
    two.call(lambda model: model.set_adapter("second"))
    two.same(x)
    two.is_dense(x, second=1.3)
    activate(two)
    torch.testing.assert_close(two.ours(x), two.base(x))


@behaviour(1, "ours is pinned: what names others leaves it on, beside those named")
@BOTH_FORMS
def test_pinned_in_a_peft_model(form: str) -> None:
    """`set_adapter`, `delete_adapter`, `merge_adapter` of others in a PeftModel with a pinned adapter"""
    pair = Pair(form, fade=True).masked(scale=0.7, pinned=True).masked("second", scale=1.3).masked("third")
    model = pair.ours
    model.set_adapter("second")
    pair.is_dense(ours=0.7, second=1.3)
    model.set_adapter("third")
    pair.is_dense(ours=0.7, third=1.0)
    model.merge_adapter(adapter_names=["third"])
    pair.is_dense(ours=0.7, third=1.0)
    model.unmerge_adapter()
    model.delete_adapter("third")
    pair.is_dense(ours=0.7)
    x = images()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), pair.base(x))
    pair.is_dense(x, ours=0.7)
    model.set_adapter("ours")
    pair.is_dense(x, ours=0.7)
    model.delete_adapter("ours")
    model.set_adapter("second")
    pair.is_dense(x, second=1.3)


@behaviour(1)
def test_disabling_all(two: Pair) -> None:
    """`disable_adapter`, `disable_adapter_layers`, `enable_adapter_layers`"""
    x = images()
    before = two.same(x)
    for model in two.both:
        with model.disable_adapter():
            torch.testing.assert_close(model(x), two.base(x))
    assert torch.equal(two.same(x), before)
    two.call(lambda model: model.disable_adapter_layers())
    torch.testing.assert_close(two.same(x), two.base(x).detach())
    two.call(lambda model: model.enable_adapter_layers())
    assert torch.equal(two.same(x), before)


@behaviour(1)
@pytest.mark.parametrize("deleted", ["ours", "second"])
def test_deleting_one(two: Pair, deleted: str) -> None:
    """Deleting the active adapter or another one"""
    two.call(lambda model: model.delete_adapter(deleted))
    two.same()
    assert not masked_layers(two.ours, deleted)
    assert not [name for name in two.ours.state_dict() if deleted in name.split(".")]
    two.is_dense(**({"second": 1.3} if deleted == "ours" else {"ours": 0.7}))


@behaviour(1)
def test_deleting_and_adding_again(pair: Pair) -> None:
    """A name that was deleted is free again"""
    pair.neighbour("style", style(target_modules=list(targets_of(pair.mask))))
    pair.call(lambda model: model.delete_adapter("ours"))
    pair.masked("ours", scale=0.4)
    pair.call(lambda model: model.set_adapter("ours"))
    pair.same()
    pair.is_dense(ours=0.4)


# Merging


@behaviour(1)
@pytest.mark.parametrize("safe", [False, True])
def test_merged_is_unmerged(two: Pair, safe: bool) -> None:
    """`merge_adapter`, also safely: the output stays, disabling takes the adapters out, `unmerge_adapter` as well"""
    activate(two, "ours", "second")
    x = images()
    before = two.same(x)
    two.call(lambda model: model.merge_adapter(safe_merge=safe))
    torch.testing.assert_close(two.same(x), before, rtol=1e-4, atol=1e-5)
    two.call(lambda model: model.unmerge_adapter())
    assert torch.equal(two.same(x), before)
    two.call(lambda model: model.merge_adapter())
    two.call(lambda model: model.disable_adapter_layers())
    torch.testing.assert_close(two.same(x), two.base(x).detach(), rtol=1e-4, atol=1e-5)


@behaviour(1, "PEFT subtracts what it added, which leaves rounding behind; ours puts the overwritten bits back")
@BOTH_FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unmerging_restores_every_bit(form: str, dtype: torch.dtype) -> None:
    """Unmerging restores every bit, also after several merges, with a plain LoRA between, in every dtype"""
    pair = Pair(form, "random", Net().to(dtype)).masked().masked("second").neighbour("style", style())
    before = pair.base_weights()
    for names in (["ours"], ["ours", "style", "second"], ["style", "ours"]):
        activate(pair, *names)
        for _ in range(3):
            pair.ours.merge_adapter()
            assert not same_bits(pair.base_weights(), before)
            pair.ours.unmerge_adapter()
            assert same_bits(pair.base_weights(), before)
    for name in ("second", "style", "ours"):
        pair.ours.merge_adapter(adapter_names=[name])
    pair.ours.unmerge_adapter()
    assert same_bits(pair.base_weights(), before)


@behaviour(1)
def test_merging_leaves_entries_outside_the_mask(pair: Pair) -> None:
    """Merging changes no entry outside the mask"""
    before = pair.base_weights()
    pair.ours.merge_adapter()
    masks = {name: layer.lora_mask["ours"].mask.unpack() for name, layer in masked_layers(pair.ours, "ours").items()}
    for path, weight in pair.base_weights().items():
        name = path.removesuffix(".base_layer").rpartition(".")[2]
        outside = ~masks[name].view(weight.shape) if name in masks else torch.ones(weight.shape, dtype=torch.bool)
        assert torch.equal(weight[outside], before[path][outside])
        assert name not in masks or not torch.equal(weight, before[path])


@behaviour(1, "PEFT silences the active adapters that are not merged; here merged and unmerged ones both act")
@pytest.mark.parametrize("merged", ["ours", "second"])
def test_one_of_two_merged(two: Pair, merged: str) -> None:
    """Merging one of several active adapters"""
    activate(two, "ours", "second")
    x = images()
    two.ours.merge_adapter(adapter_names=[merged])
    two.is_dense(x, ours=0.7, second=1.3)
    other = "second" if merged == "ours" else "ours"
    two.ours.base_model.set_adapter([merged])
    two.is_dense(x, **{merged: {"ours": 0.7, "second": 1.3}[merged]})
    two.ours.base_model.set_adapter([merged, other])
    two.ours.merge_adapter(adapter_names=[other])
    two.is_dense(x, ours=0.7, second=1.3)


@behaviour(1, "PEFT silences the active adapters that are not merged; here merged and unmerged ones both act")
@pytest.mark.parametrize("merged", ["ours", "style"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_neighbour_beside_a_merged_one(pair: Pair, merged: str, settings: dict[str, Any]) -> None:
    """A plain LoRA or a DoRA beside a merged masked adapter, and a masked adapter beside a merged one"""
    if merged == "ours" and settings:
        pytest.skip("a DoRA beside what is merged decomposes the merged weight: another test")
    pair.neighbour("style", style(target_modules=list(targets_of(pair.mask)), **settings))
    activate(pair, "style", "ours")
    x = images()
    before = pair.same(x)
    pair.ours.merge_adapter(adapter_names=[merged])
    torch.testing.assert_close(pair.ours(x), before, rtol=1e-4, atol=1e-5)
    pair.ours.unmerge_adapter()
    assert torch.equal(pair.ours(x), before)


@behaviour(1)
def test_merged_only_what_is_merged(two: Pair) -> None:
    """Merging an adapter that is not active, alone"""
    x = images()
    activate(two)
    two.call(lambda model: model.merge_adapter(adapter_names=["second"]))
    two.same(x)
    two.is_dense(x, second=1.3)


@behaviour(1)
def test_broken_adapter_does_not_merge(pair: Pair) -> None:
    """`safe_merge` of a broken adapter raises ValueError and leaves the layer as it was"""
    x = images()
    before = pair.base_weights()
    layers = masked_layers(pair.ours, "ours")
    with torch.no_grad():
        for layer in layers.values():
            layer.adapter_parameters("ours")[-1].view(-1)[0] = math.inf
    for layer in layers.values():
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            layer.merge(safe_merge=True)
        assert not layer.merged
    assert same_bits(pair.base_weights(), before)
    pair.ours.disable_adapter_layers()
    assert torch.equal(pair.ours(x), pair.base(x))


@behaviour(1)
def test_merge_and_unload(two: Pair) -> None:
    """`merge_and_unload`, `unload`"""
    activate(two, "ours", "second")
    x = images()
    unloaded = copy.deepcopy(two.ours).unload()
    torch.testing.assert_close(unloaded(x), two.base(x))
    assert unloaded.state_dict().keys() == two.base.state_dict().keys()
    two.ours, two.peft = (model.merge_and_unload(safe_merge=True) for model in two.both)
    two.same(x)
    two.is_dense(x, ours=0.7, second=1.3)
    assert two.ours.state_dict().keys() == two.base.state_dict().keys()


@behaviour(1, "PEFT's layer forgets a merged adapter and leaves it in the weight; ours is taken out of the weight")
@BOTH_FORMS
def test_deleting_a_merged_adapter(form: str) -> None:
    """Deleting a merged adapter on the layers, as diffusers' `delete_adapters` does"""
    pair = Pair(form).masked().masked("second")
    activate(pair, "ours", "second")
    pair.ours.merge_adapter()
    for layer in tuner_layers(pair.ours).values():
        layer.delete_adapter("ours")
    pair.is_dense(second=1.0)
    for layer in tuner_layers(pair.ours).values():
        layer.unmerge()
        layer.set_adapter([])
    x = images()
    assert torch.equal(pair.ours(x), pair.base(x))


@behaviour(1)
@BOTH_FORMS
def test_deleting_a_merged_adapter_of_a_peft_model(form: str) -> None:
    """Deleting a merged adapter through a PeftModel raises and changes nothing"""
    pair = Pair(form).masked().masked("second")
    x = images()
    pair.call(lambda model: model.merge_adapter())
    before = pair.same(x)
    for model in pair.both:
        with pytest.raises(ValueError, match="merged"):
            model.delete_adapter("ours")
    assert torch.equal(pair.same(x), before)


@behaviour(1)
@BOTH_FORMS
def test_unmerging_after_a_cast(form: str) -> None:
    """Unmerging after the merged model was cast"""
    pair = Pair(form).masked()
    pair.call(lambda model: model.merge_adapter())
    pair.call(lambda model: model.to(torch.float16))
    pair.ours.unmerge_adapter()
    wanted = {name: weight.half() for name, weight in Pair(base=pair.base).masked().base_weights().items()}
    assert same_bits(pair.base_weights(), wanted)


# Scales


@behaviour(1)
def test_set_scale(pair: Pair) -> None:
    """`set_scale`, 0 included"""
    for scale in (0.0, 2.5, 1.0):
        pair.on_layers(lambda layer, scale=scale: layer.set_scale("ours", scale))
        pair.same()
        pair.is_dense(ours=0.7 * scale)


@behaviour(1)
def test_scale_and_unscale_layer(two: Pair) -> None:
    """`scale_layer` and `unscale_layer` of active adapters"""
    pair = two
    for scale in (0.25, 3.0):
        pair.on_layers(lambda layer, scale=scale: layer.scale_layer(scale))
        pair.is_dense(ours=0.7 * scale)
        pair.same()
        pair.on_layers(lambda layer, scale=scale: layer.unscale_layer(scale))
        pair.is_dense(ours=0.7)
        pair.same()
    pair.on_layers(lambda layer: layer.scale_layer(0.5))
    pair.on_layers(lambda layer: layer.unscale_layer())
    pair.is_dense(ours=0.7)
    pair.call(lambda model: model.set_adapter("second"))
    pair.same()
    pair.is_dense(second=1.3)


@behaviour(1, "diffusers brings plain LoRAs back to 1 after a scale of 0; ours to what they were")
@BOTH_FORMS
def test_scaled_by_diffusers_and_back(form: str) -> None:
    """diffusers' `scale_lora_layers` and `unscale_lora_layers`, 0 included, one inside another"""
    pair = Pair(form).masked(scale=0.7)
    for layer in tuner_layers(pair.ours).values():
        layer.set_scale("ours", 0.5)
    for scale in (0.0, 0.25, 1.0, 3.0):
        scale_lora_layers(pair.ours, scale)
        pair.is_dense(ours=0.35 * scale)
        unscale_lora_layers(pair.ours, scale)
        pair.is_dense(ours=0.35)
    scale_lora_layers(pair.ours, 0.5)
    scale_lora_layers(pair.ours, 0.0)
    unscale_lora_layers(pair.ours, 0.0)
    pair.is_dense(ours=0.175)
    unscale_lora_layers(pair.ours, 0.5)
    pair.is_dense(ours=0.35)


@behaviour(1, "PEFT divides by zero; ours comes back to the scale it had")
@BOTH_FORMS
def test_scaled_to_zero_and_back(form: str) -> None:
    """`scale_layer(0)`, `unscale_layer(0)`"""
    pair = Pair(form).masked(scale=0.7)
    for layer in tuner_layers(pair.ours).values():
        layer.scale_layer(0)
    pair.is_dense(ours=0.0)
    for layer in tuner_layers(pair.ours).values():
        layer.unscale_layer(0)
    pair.is_dense(ours=0.7)


@behaviour(1)
@BOTH_FORMS
def test_rank_stabilised(form: str) -> None:
    """Rank-stabilised scaling (`use_rslora`), also after `set_scale` and `unscale_layer`"""
    pair = Pair(form)
    config = masked_config(form, r=4, lora_alpha=6, use_rslora=True)
    pair.ours = get_peft_model(pair.ours, config, adapter_name="ours")
    pair.deltas["ours"] = {n: fill(m, "ours", form, "random") for n, m in tuner_layers(pair.ours).items()}
    pair.is_dense(ours=3.0)
    for layer in tuner_layers(pair.ours).values():
        layer.scale_layer(0.5)
        layer.unscale_layer()
    pair.is_dense(ours=3.0)


# Beside other adapters

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.5},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa", "target_modules": ["lin0", "lin1"]},
    "OLoRA": {"init_lora_weights": "olora", "target_modules": ["lin0", "lin1"]},
    "MiCA": {"init_lora_weights": "mica", "target_modules": ["lin0", "lin1"]},
}


@behaviour(2)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ours_first", [True, False])
@BOTH_FORMS
def test_lora_variants_on_the_same_layers(form: str, variant: str, ours_first: bool) -> None:
    """Every LoRA variant on the same layers: rsLoRA, lora_bias, dropout, DoRA, PiSSA, OLoRA, MiCA, plain"""
    pair, config = Pair(form), style(**VARIANTS[variant])
    if ours_first:
        pair.masked().neighbour("style", config)
    else:
        pair.neighbour("style", config).masked()
    for model in pair.both:
        # What begins at zero would prove nothing.
        generator = torch.Generator().manual_seed(7)
        for name, parameter in model.named_parameters():
            if ".lora_A.style" in name or ".lora_B.style" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    x = images()
    pair.call(lambda model: model.eval())
    for names in (["style"], ["ours"], ["style", "ours"]):
        activate(pair, *names)
        pair.same(x)
    alone = {}
    for name in ("style", "ours"):
        activate(pair, name)
        alone[name] = pair.same(x)
    assert not torch.allclose(alone["style"], alone["ours"], atol=1e-3)
    activate(pair, "style", "ours")
    pair.call(lambda model: model.merge_adapter())
    pair.same(x)
    pair.ours.unmerge_adapter()
    activate(pair, "ours")
    assert torch.equal(pair.ours(x), alone["ours"])


@behaviour(2, "PEFT's result depends on the order: a DoRA rescales what was added before it; ours is never rescaled")
@BOTH_FORMS
def test_dora_does_not_rescale_ours(form: str) -> None:
    """A DoRA that was switched on after ours"""
    pair = Pair(form, "single layer").masked().neighbour("style", style(target_modules=["lin1"], use_dora=True))
    x = images()
    activate(pair, "style", "ours")
    wanted = pair.same(x)
    pair.ours.base_model.set_adapter(["ours", "style"])
    torch.testing.assert_close(pair.ours(x), wanted, rtol=1e-4, atol=1e-5)


OTHERS: dict[str, PeftConfig] = {
    "LoHa": LoHaConfig(r=2, target_modules=["lin0", "lin1"], init_weights=False),
    "LoKr": LoKrConfig(r=2, target_modules=["lin0", "lin1"], init_weights=False),
    "LoHa on a convolution": LoHaConfig(r=2, target_modules=["conv"], init_weights=False),
    "LoKr on a convolution": LoKrConfig(r=2, target_modules=["conv"], init_weights=False),
    "IA3": IA3Config(target_modules=["lin0", "lin1"], feedforward_modules=["lin1"], init_ia3_weights=False),
    "OFT": OFTConfig(r=2, oft_block_size=0, target_modules=["lin0", "lin1"], init_weights=False),
    "BOFT": BOFTConfig(boft_block_size=2, target_modules=["lin0", "lin1"], init_weights=False),
    "HRA": HRAConfig(r=2, target_modules=["lin0", "lin1"], init_weights=False),
    "SHiRA": ShiraConfig(r=1, target_modules=["lin0", "lin1"], init_weights=False),
    "MiSS": MissConfig(r=2, target_modules=["lin0", "lin1"], init_weights=False),
}


@behaviour(2)
@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("fade", [False, True])
@BOTH_FORMS
def test_other_methods_on_the_same_layers(form: str, method: str, ours_first: bool, fade: bool) -> None:
    """Another method's layer around ours, or ours around it: LoHa, LoKr, IA³, OFT, BOFT, HRA, SHiRA, MiSS"""
    pair = Pair(form, wrapped=False, fade=fade)
    if ours_first and method == "SHiRA":
        pair.masked()
        for model in pair.both:
            with pytest.raises(ValueError, match="nested"):
                inject_adapter_in_model(OTHERS[method], model, "other")
        pair.is_dense(ours=1.0)
        return
    if "convolution" in method and not ours_first:
        pytest.skip("PEFT's own LoRA cannot sit on them either")
    if ours_first:
        pair.masked().neighbour("other", OTHERS[method])
    else:
        pair.neighbour("other", OTHERS[method]).masked()
    x = images()
    both_on = pair.same(x)
    assert not torch.allclose(both_on, pair.expected(x, ours=1.0).float(), atol=1e-3)
    ours_off = pair.on_layers(lambda layer: "lora_A" in dir(layer) and layer.enable_adapters(False)).same(x)
    assert not torch.allclose(both_on, ours_off, atol=1e-3)
    pair.on_layers(lambda layer: layer.enable_adapters(False))
    torch.testing.assert_close(pair.same(x), pair.base(x).detach())
    pair.on_layers(lambda layer: layer.enable_adapters(True))
    assert torch.equal(pair.same(x), both_on)


@behaviour(2)
@pytest.mark.parametrize("method", ["LoHa", "LoKr", "OFT"])
@BOTH_FORMS
def test_mixed_models(form: str, method: str) -> None:
    """PeftMixedModel with a masked adapter and LoHa, LoKr or OFT"""
    base = Net().eval()
    config = copy.deepcopy(OTHERS[method])
    seed = int(torch.randint(2**31, ()))
    outputs = []
    x = images()
    delta = None
    for masked in (True, False):
        settings = masked_config(form, ["lin1"]) if masked else LoraConfig(r=8, lora_alpha=8, target_modules=["lin1"])
        model = get_peft_model(copy.deepcopy(base), settings, adapter_name="ours", mixed=True)
        layer = tuner_layers(model)["lin1"]
        if masked:
            delta = fill(layer, "ours", form, "random")
        else:
            layer.lora_A["ours"].weight.data.copy_(torch.eye(8))
            layer.lora_B["ours"].weight.data.copy_(delta)
        torch.manual_seed(seed)
        model.add_adapter("other", config)
        model.eval()
        drawn = []
        for names in (["ours"], ["other"], ["ours", "other"]):
            model.set_adapter(names)
            drawn.append(model(x))
        outputs.append(torch.stack(drawn))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        outputs[0][0].double(), dense_definition(base, x, (1.0, {"lin1": delta})), rtol=1e-4, atol=1e-5
    )


@behaviour(2)
@BOTH_FORMS
def test_modules_to_save(form: str) -> None:
    """`modules_to_save` beside masked layers, saved, loaded and switched"""
    pair = Pair(form)
    config = masked_config(form, ["lin0"], modules_to_save=["lin1"])
    pair.ours = get_peft_model(pair.ours, config, adapter_name="ours")
    pair.deltas["ours"] = {"lin0": fill(tuner_layers(pair.ours)["lin0"], "ours", form, "random")}
    saved = pair.ours.base_model.model.lin1.modules_to_save["ours"]
    nn.init.normal_(saved.weight)
    x = images()
    changed = copy.deepcopy(pair.base)
    changed.lin1.load_state_dict(saved.state_dict())
    wanted = dense_definition(changed, x, (1.0, pair.deltas["ours"]))
    torch.testing.assert_close(pair.ours(x).double(), wanted, rtol=1e-4, atol=1e-5)
    with pair.ours.disable_adapter():
        torch.testing.assert_close(pair.ours(x), pair.base(x))
    state = get_peft_model_state_dict(pair.ours, adapter_name="ours")
    fresh = get_peft_model(copy.deepcopy(pair.base), copy.deepcopy(config), adapter_name="ours").eval()
    fill(tuner_layers(fresh)["lin0"], "ours", form, "random")
    set_peft_model_state_dict(fresh, state, adapter_name="ours")
    assert torch.equal(fresh(x), pair.ours(x))


@behaviour(2)
def test_mixed_batches(two: Pair) -> None:
    """`adapter_names`: another adapter for each sample of a batch, plain LoRA and the base among them"""
    two.neighbour("style", style(target_modules=["lin0", "lin1"]))
    names = ["ours", "__base__", "second", "style", "ours", "style", "__base__"]
    x = images(len(names))
    mixed = two.same(x, adapter_names=names)
    for active in ("second", "style"):
        two.call(lambda model, active=active: model.set_adapter(active))
        torch.testing.assert_close(two.same(x, adapter_names=names), mixed)
    for name in ("ours", "second", "style"):
        two.call(lambda model, name=name: model.set_adapter(name))
        rows = [i for i, n in enumerate(names) if n == name]
        torch.testing.assert_close(mixed[rows], two.ours(x)[rows], rtol=1e-4, atol=1e-5)
    rows = [i for i, n in enumerate(names) if n == "__base__"]
    torch.testing.assert_close(mixed[rows], two.base(x)[rows], rtol=1e-4, atol=1e-5)


@behaviour(2, "a pinned adapter acts on every sample but those of `__base__`")
@BOTH_FORMS
def test_mixed_batches_beside_a_pinned_one(form: str) -> None:
    """`adapter_names` beside a pinned adapter that is on, and one that is off"""
    pair = Pair(form, fade=True).masked(scale=0.7, pinned=True).masked("second", scale=1.3)
    names = ["second", "__base__", "ours", "second", "ours"]
    x = images(len(names))
    strengths = {"second": {"ours": 0.7, "second": 1.3}, "ours": {"ours": 0.7}, "__base__": {}}
    wanted = torch.stack([pair.expected(x[i : i + 1], **strengths[name])[0] for i, name in enumerate(names)])
    torch.testing.assert_close(pair.ours(x, adapter_names=names).double(), wanted, rtol=1e-4, atol=1e-5)
    for layer in masked_layers(pair.ours, "ours").values():
        layer.switch("ours", False)
    strengths["second"] = {"second": 1.3}
    wanted = torch.stack([pair.expected(x[i : i + 1], **strengths[name])[0] for i, name in enumerate(names)])
    torch.testing.assert_close(pair.ours(x, adapter_names=names).double(), wanted, rtol=1e-4, atol=1e-5)


@behaviour(2)
@BOTH_FORMS
def test_mixed_batches_that_are_refused(form: str) -> None:
    """Mixed batches of a wrong length, with unknown names, while merged, in training: refused as by PEFT"""
    pair = Pair(form).masked()
    x = images(3)
    for model in pair.both:
        for names, message in ((["ours"], "Length of `adapter_names`"), (["ours", "nobody", "ours"], "nobody")):
            with pytest.raises(ValueError, match=message):
                model(x, adapter_names=names)
        model.merge_adapter()
        with pytest.raises(ValueError, match="merged adapters"):
            model(x, adapter_names=["ours"] * 3)
        model.unmerge_adapter()
        model.train()
        with pytest.raises(ValueError, match="training"):
            model(x, adapter_names=["ours"] * 3)
        model.eval()
        with model.disable_adapter():
            torch.testing.assert_close(model(x, adapter_names=["ours"] * 3), pair.base(x))


@behaviour(2)
@BOTH_FORMS
def test_weighted_combination_of_neighbours(form: str) -> None:
    """`add_weighted_adapter` over plain LoRAs beside ours"""
    pair = Pair(form).masked().neighbour("first", style()).neighbour("third", style())
    for kind in ("linear", "cat", "svd", "ties", "magnitude_prune"):
        pair.call(
            lambda model, kind=kind: model.add_weighted_adapter(
                ["first", "third"], [0.7, 0.4], f"by_{kind}", combination_type=kind, density=0.9
            )
        )
        activate(pair, "ours", f"by_{kind}")
        pair.same()


@behaviour(2, "PEFT adds up factors, exactly for `cat` alone; ours is Σ w·s·Δ on the union of the masks for each")
@pytest.mark.parametrize("combination", ["cat", "linear", "svd"])
def test_weighted_combination_of_ours(ours: Pair, combination: str) -> None:
    """`add_weighted_adapter` of masked adapters: `cat`, `linear`, `svd`"""
    ours.masked("second", scale=1.3)
    ours.ours.add_weighted_adapter(["ours", "second"], [0.6, -1.5], "sum", combination_type=combination)
    ours.ours.set_adapter("sum")
    ours.is_dense(ours=0.7 * 0.6, second=-1.5 * 1.3)
    for layer in masked_layers(ours.ours, "sum").values():
        masks = [layer.lora_mask[name].mask.unpack() for name in ("ours", "second", "sum")]
        assert torch.equal(masks[0] | masks[1], masks[2])
    x = images()
    before = ours.ours(x)
    ours.ours.merge_adapter()
    torch.testing.assert_close(ours.ours(x), before, rtol=1e-4, atol=1e-5)
    ours.ours.unmerge_adapter()
    ours.ours.delete_adapter("sum")
    ours.ours.set_adapter("ours")
    ours.is_dense(ours=0.7)


@behaviour(2)
@BOTH_FORMS
def test_weighted_combination_under_a_plain_config(form: str) -> None:
    """`add_weighted_adapter` of masked adapters that a plain LoraConfig made; `modules_to_save` in both is refused"""
    pair = Pair(form).masked(scale=0.7).masked("second", scale=1.3)
    pair.ours.add_weighted_adapter(["ours", "second"], [0.5, -2.0], "sum", combination_type="cat")
    pair.ours.set_adapter("sum")
    pair.is_dense(ours=0.35, second=-2.6)
    base = Net()
    model = get_peft_model(base, masked_config(form, ["lin0"], modules_to_save=["lin1"]), "ours")
    model.add_adapter("second", masked_config(form, ["lin0"], modules_to_save=["lin1"]))
    for name in ("ours", "second"):
        fill(tuner_layers(model)["lin0"], name, form, "random")
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["ours", "second"], [1.0, 1.0], "sum", combination_type="cat")
    assert "sum" not in model.peft_config


@behaviour(2, "PEFT prunes factors at random or by size; of masked adapters nothing is pruned, the call is refused")
@BOTH_FORMS
@pytest.mark.parametrize(
    "combination", ["ties", "ties_svd", "dare_linear", "dare_ties", "magnitude_prune", "magnitude_prune_svd", "typo"]
)
def test_combinations_that_prune(form: str, combination: str) -> None:
    """`add_weighted_adapter` by ways that prune, and unknown ones: refused, nothing is changed"""
    pair = Pair(form, fade=True).masked().masked("second")
    names = set(pair.ours.state_dict())
    with pytest.raises(ValueError, match=combination):
        pair.ours.add_weighted_adapter(["ours", "second"], [1.0, 1.0], "sum", combination_type=combination)
    assert set(pair.ours.state_dict()) == names and "sum" not in pair.ours.peft_config
    pair.is_dense(ours=1.0)


@behaviour(2)
@BOTH_FORMS
def test_hotswapping_a_neighbour(form: str, tmp_path: Path) -> None:
    """Hot-swapping a plain LoRA beside ours, prepared for other ranks or not"""
    others = [get_peft_model(Net(), style(r=rank, lora_alpha=rank)) for rank in (2, 4)]
    for index, other in enumerate(others):
        other.save_pretrained(tmp_path / str(index))
    for prepared in (False, True):
        pair = Pair(form).masked()
        seed = int(torch.randint(2**31, ()))
        for model in pair.both:
            torch.manual_seed(seed)
            model.add_adapter("style", style(r=2, lora_alpha=2))
            if prepared:
                # PEFT pads every adapter that the model has, and ours has no rank to pad: its own is left alone.
                prepare_model_for_compiled_hotswap(model, target_rank=30, config=model.peft_config)
        x = images()
        pair.call(lambda model: model.set_adapter("style"))
        before = pair.same(x)
        swapped = tmp_path / ("1" if prepared else "0")
        pair.call(lambda model, swapped=swapped: hotswap_adapter(model, swapped, adapter_name="style"))
        assert not torch.allclose(pair.same(x), before, atol=1e-4)
        pair.call(lambda model: model.set_adapter("ours"))
        pair.is_dense(x, ours=1.0)


@behaviour(2)
@BOTH_FORMS
def test_dropout_on_a_masked_adapter(form: str) -> None:
    """`lora_dropout` of a masked adapter: drops in training, not in evaluation"""
    pair = Pair(form).masked(lora_dropout=1.0)
    pair.is_dense(ours=1.0)
    x = images()
    pair.call(lambda model: model.train())
    torch.testing.assert_close(pair.same(x), pair.base(x).detach())


@behaviour(2)
@BOTH_FORMS
def test_a_neighbours_training(form: str) -> None:
    """Training a plain LoRA beside ours: its gradients see our Δ, ours stays as it is"""
    pair = Pair(form).masked().neighbour("style", style())
    activate(pair, "ours", "style")
    x, wanted = images(), torch.randn(5, 4)
    for model in pair.both:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".style" in name)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), wanted).backward()
            optimizer.step()
    pair.same(x)
    pair.call(lambda model: model.set_adapter("ours"))
    pair.is_dense(x, ours=1.0)


# Wrapped and moved


@behaviour(3)
def test_which_parameters_train(two: Pair) -> None:
    """`requires_grad` after adding, switching, disabling, deleting and in inference mode: the active adapter's alone"""

    def trained(model: nn.Module) -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def check() -> None:
        assert trained(two.ours) == trained(two.peft)

    check()
    for action in (
        lambda model: model.set_adapter("second"),
        lambda model: model.set_adapter("ours", inference_mode=True),
        lambda model: model.set_adapter("ours"),
        lambda model: model.disable_adapter_layers(),
        lambda model: model.enable_adapter_layers(),
        lambda model: model.set_requires_grad("second", requires_grad=True),
        lambda model: model.delete_adapter("ours"),
    ):
        two.call(action)
        check()


@behaviour(3)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_bases(dtype: torch.dtype, pair: Pair) -> None:
    """Bases in fp16 and bf16"""
    x = images()
    wanted = pair.expected(x, ours=0.7)
    model = pair.ours.to(dtype)
    found = model(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@behaviour(3)
@BOTH_FORMS
def test_autocast(form: str) -> None:
    """Under autocast"""
    pair = Pair(form).masked().neighbour("style", style())
    activate(pair, "ours", "style")
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        ours, peft = pair.ours(x), pair.peft(x)
    assert ours.dtype == peft.dtype
    torch.testing.assert_close(ours.float(), peft.float(), rtol=6e-2, atol=6e-2)


@behaviour(3)
@BOTH_FORMS
def test_gradient_checkpointing(form: str) -> None:
    """Gradient checkpointing gives the same gradients"""
    pair = Pair(form).masked()
    pair.ours.train()
    x = images()
    gradients = []
    for checkpointed in (False, True):
        pair.ours.zero_grad()
        for layer in masked_layers(pair.ours, "ours").values():
            for parameter in layer.adapter_parameters("ours"):
                parameter.requires_grad_(True)
        leaf = x.clone().requires_grad_()
        output = checkpoint(pair.ours, leaf, use_reentrant=False) if checkpointed else pair.ours(leaf)
        output.square().sum().backward()
        found = [leaf.grad]
        for layer in masked_layers(pair.ours, "ours").values():
            found += [parameter.grad.clone() for parameter in layer.adapter_parameters("ours")]
        gradients.append(found)
    for first, second in zip(*gradients, strict=True):
        assert first.abs().sum() > 0
        torch.testing.assert_close(first, second)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@behaviour(3)
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies(two: Pair, copied: Any) -> None:
    """Copies by `deepcopy`, pickle and `torch.save(module)`: equal, and independent of the original"""
    activate(two, "ours", "second")
    two.ours.merge_adapter(adapter_names=["second"])
    x = images()
    before = two.ours(x)
    other = copied(two.ours)
    assert torch.equal(other(x), before)
    other.unmerge_adapter()
    for layer in tuner_layers(other).values():
        layer.set_scale("ours", 0.0)
        layer.set_scale("second", 0.0)
    torch.testing.assert_close(other(x), two.base(x))
    assert torch.equal(two.ours(x), before)
    two.ours.unmerge_adapter()
    two.is_dense(x, ours=0.7, second=1.3)


@behaviour(3)
def test_forward_hooks_of_base_layers(pair: Pair) -> None:
    """Forward hooks and pre-hooks on base layers fire, and what they return counts"""
    seen: dict[str, list[str]] = {"ours": [], "peft": []}

    def watch(side: str, name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
            seen[side].append(name)
            return output * 1.5

        return hook

    def double(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        return (arguments[0] * 2,)

    for side, model in (("ours", pair.ours), ("peft", pair.peft)):
        for name, layer in tuner_layers(model).items():
            layer.get_base_layer().register_forward_hook(watch(side, name))
            layer.get_base_layer().register_forward_pre_hook(double)
    pair.same()
    assert seen["ours"] == seen["peft"]
    assert len(seen["ours"]) == len(targets_of(pair.mask))


@behaviour(3)
@BOTH_FORMS
def test_channels_last(form: str) -> None:
    """Channels-last inputs and weights"""
    pair = Pair(form).masked()
    x = images()
    pair.ours.to(memory_format=torch.channels_last)
    pair.is_dense(x.to(memory_format=torch.channels_last), ours=1.0)
    before = pair.base_weights()
    pair.ours.merge_adapter()
    pair.is_dense(x.to(memory_format=torch.channels_last), ours=1.0)
    pair.ours.unmerge_adapter()
    assert same_bits(pair.base_weights(), before)


@behaviour(3)
@BOTH_FORMS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_made_under_inference_mode(form: str, mode: Any) -> None:
    """Made, merged and un-merged under `no_grad` and `inference_mode`"""
    with mode():
        pair = Pair(form).masked()
        pair.is_dense(ours=1.0)
        before = pair.base_weights()
        pair.ours.merge_adapter()
        pair.is_dense(ours=1.0)
        pair.ours.unmerge_adapter()
        assert same_bits(pair.base_weights(), before)
    for layer in tuner_layers(pair.ours).values():
        layer.set_scale("ours", 0.5)
    with torch.no_grad():
        pair.is_dense(ours=0.5)


@behaviour(3)
@BOTH_FORMS
def test_compiled(form: str) -> None:
    """Under `torch.compile`: other scales, other active adapters"""
    pair = Pair(form).masked().masked("second")
    pair.call(lambda model: model.requires_grad_(False))
    x = images()
    compiled = torch.compile(pair.ours, backend="eager")
    activate(pair, "ours")
    torch.testing.assert_close(compiled(x).double(), pair.expected(x, ours=1.0), rtol=1e-4, atol=1e-5)
    for layer in tuner_layers(pair.ours).values():
        layer.set_scale("ours", 0.5)
    torch.testing.assert_close(compiled(x).double(), pair.expected(x, ours=0.5), rtol=1e-4, atol=1e-5)
    pair.ours.base_model.set_adapter(["ours", "second"])
    torch.testing.assert_close(compiled(x).double(), pair.expected(x, ours=0.5, second=1.0), rtol=1e-4, atol=1e-5)


# Saved whole


@behaviour(4)
def test_state_dict_names(pair: Pair) -> None:
    """Names in the state dict: PEFT's own for the trained tensors, and the mask's words beside them"""
    ours, peft = set(pair.ours.state_dict()), set(pair.peft.state_dict())
    assert peft <= ours
    assert {name.rpartition("lora_mask.")[2] for name in ours - peft} == {"ours.words"}
    ours, peft = (set(get_peft_model_state_dict(model, adapter_name="ours")) for model in pair.both)
    assert peft <= ours
    assert {name.rpartition("lora_mask.")[2] for name in ours - peft} == {"words"}
    assert {n for n, _ in pair.ours.named_parameters()} == {n for n, _ in pair.peft.named_parameters()}


@behaviour(4)
def test_base_state_dict(two: Pair) -> None:
    """`get_base_model_state_dict` holds the base weights and nothing of the adapters"""
    ours, peft = (get_base_model_state_dict(model) for model in two.both)
    assert same_bits(ours, peft)
    assert ours.keys() == two.base.state_dict().keys()


@behaviour(4)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_brings_its_mask(pair: Pair, assign: bool) -> None:
    """`load_state_dict` over an adapter with another mask: the mask comes along, merging and un-merging are exact"""
    state = {name: tensor.clone() for name, tensor in pair.ours.state_dict().items()}
    x = images()
    wanted = pair.ours(x)
    other = get_peft_model(copy.deepcopy(pair.base), masked_config(pair.form, targets_of(pair.mask)), "ours").eval()
    for layer in tuner_layers(other).values():
        fill(layer, "ours", pair.form, "random")
        layer.set_scale("ours", 0.7)
    other(x)
    other.load_state_dict(state, assign=assign)
    torch.testing.assert_close(other(x), wanted)
    masks = masked_layers(pair.ours, "ours")
    for name, layer in masked_layers(other, "ours").items():
        found, sent = layer.lora_mask["ours"].mask, masks[name].lora_mask["ours"].mask
        assert torch.equal(found.unpack(), sent.unpack())
        assert found.count == sent.count
    before = {name: p.clone() for name, p in other.named_parameters() if "base_layer" in name}
    other.merge_adapter()
    torch.testing.assert_close(other(x), wanted, rtol=1e-4, atol=1e-5)
    other.unmerge_adapter()
    assert same_bits({name: p for name, p in other.named_parameters() if "base_layer" in name}, before)
    assert torch.equal(other(x), wanted)


@behaviour(4)
@pytest.mark.parametrize("wrapped", [True, False])
def test_peft_state_dict(ours: Pair, wrapped: bool) -> None:
    """`get_peft_model_state_dict` and `set_peft_model_state_dict`, under another name, in a PeftModel or without"""
    x = images()
    wanted = ours.ours(x)
    state = get_peft_model_state_dict(ours.ours, adapter_name="ours")
    config = masked_config(ours.form, targets_of(ours.mask), scale=0.7, fade=True)
    base = copy.deepcopy(ours.base)
    other = get_peft_model(base, config, "other") if wrapped else inject_adapter_in_model(config, base, "other")
    other.eval()
    torch.testing.assert_close(other(x), ours.base(x))
    result = set_peft_model_state_dict(other, state, adapter_name="other")
    assert not result.unexpected_keys
    torch.testing.assert_close(other(x), wanted)
    layers = masked_layers(other, "other")
    assert layers.keys() == set(targets_of(ours.mask))
    for name, layer in masked_layers(ours.ours, "ours").items():
        assert torch.equal(layer.lora_mask["ours"].mask.unpack(), layers[name].lora_mask["other"].mask.unpack())


@behaviour(4)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(ours: Pair, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    """`save_pretrained`, `from_pretrained`, `load_adapter`, also with `low_cpu_mem_usage`"""
    x = images()
    wanted = ours.ours(x)
    ours.ours.save_pretrained(tmp_path, selected_adapters=["ours"])
    folder = tmp_path / "ours"
    loaded = PeftModel.from_pretrained(
        copy.deepcopy(ours.base), folder, adapter_name="again", low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    torch.testing.assert_close(loaded(x), wanted)
    assert masked_layers(loaded, "again").keys() == set(targets_of(ours.mask))
    loaded.load_adapter(folder, adapter_name="third", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("third")
    torch.testing.assert_close(loaded.eval()(x), wanted)
    loaded.base_model.set_adapter(["again", "third"])
    loaded.merge_adapter()
    loaded.unmerge_adapter()
    torch.testing.assert_close(loaded(x).double(), ours.expected(x, ours=1.4), rtol=1e-4, atol=1e-5)
    assert not any(parameter.is_meta for parameter in loaded.parameters())


@behaviour(4, "a plain LoRA's state dict loads; a masked one without its mask would be another edit")
def test_a_loader_that_knows_no_masks(ours: Pair) -> None:
    """A masked adapter's state dict in layers that know no masks: an error"""
    state = get_peft_model_state_dict(ours.ours, adapter_name="ours")
    rank = 1 if ours.form == "values" else RANK
    plain = get_peft_model(copy.deepcopy(ours.base), LoraConfig(r=rank, target_modules=list(targets_of(ours.mask))))
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(plain, state)


@behaviour(4)
@BOTH_FORMS
def test_words_beyond_a_rows_end(form: str) -> None:
    """A state dict whose mask has bits beyond its rows' ends, or another shape: refused, nothing is changed"""
    pair = Pair(form, "single layer").masked()
    x = images()
    before = pair.ours(x)
    state = pair.ours.state_dict()
    name = next(name for name in state if name.endswith("words"))
    for damaged in (torch.full_like(state[name], -1), torch.zeros(9, 9, dtype=torch.int32)):
        with pytest.raises((ValueError, RuntimeError), match="mask|words|padding|size"):
            pair.ours.load_state_dict(state | {name: damaged})
    pair.ours.load_state_dict(state)
    assert torch.equal(pair.ours(x), before)


def test_masks_of_another_shape_are_refused() -> None:
    pair = Pair("factors").masked()
    layer = tuner_layers(pair.ours)["lin0"]
    weight = layer.get_base_layer().weight
    with pytest.raises(ValueError, match="does not fit"):
        layer.set_mask("ours", BitMask.full((weight.shape[0], columns(weight) + 1)))


def test_the_table_is_what_the_tests_say() -> None:
    """`python -m tests.fade.conformance_table` writes it."""
    assert DOCUMENT.read_text(encoding="utf-8") == table()
