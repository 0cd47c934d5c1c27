"""The adapter's life on a pipeline: the mask holds, merging is undone bit for bit, diffusers' own calls keep their
meaning, several adapters add up."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from transformers import CLIPTokenizer

import fade
from fade.base_model import base_parameters, fingerprint, target_layers
from fade.errors import FadeError, WrongBaseError
from fade.layers import MaskedLoraConv2d, MaskedLoraLinear

from .adapters import ATTENTION, CONVOLUTIONS, on, random_adapter
from .conftest import denoise, same_bits, tiny_pipeline, weights

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS = pytest.mark.parametrize("values", [False, True], ids=["factors", "values"])


def expected_weights(adapter: fade.Adapter, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Base weights plus the dense definition of Δ, in float64."""
    changed = {name: weight.double() for name, weight in before.items()}
    for name, layer in adapter.layers.items():
        mask = layer.lora_mask[adapter.name].mask
        if layer.has_values(adapter.name):
            delta = torch.zeros(mask.shape, dtype=torch.float64)
            delta[mask.unpack()] = layer.adapter_parameters(adapter.name)[0].detach().double().flatten()
        else:
            lora_a, lora_b = (p.detach().double().flatten(1) for p in layer.adapter_parameters(adapter.name))
            delta = (lora_b @ lora_a) * mask.unpack()
        weight = before[f"{name}.weight"]
        changed[f"{name}.weight"] = weight.double() + layer.scaling[adapter.name] * delta.view(weight.shape)
    return changed


@FORMS
@pytest.mark.parametrize("targets", [ATTENTION, (*ATTENTION, *CONVOLUTIONS)], ids=["attention", "convolutions"])
def test_the_adapted_model_is_the_model_with_masked_weights(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, values: bool, targets: tuple[str, ...]
) -> None:
    before = weights(pipeline)
    base = denoise(pipeline)
    adapter = random_adapter(pipeline, values=values, targets=targets)
    assert any(isinstance(layer, MaskedLoraConv2d) for layer in adapter.layers.values()) == (targets != ATTENTION)
    other = tiny_pipeline(tokenizer)
    wanted = expected_weights(adapter, before)
    for name, parameter in other.unet.named_parameters():
        parameter.data = wanted[name].to(parameter)
    assert not torch.allclose(denoise(pipeline), base, atol=1e-2)
    torch.testing.assert_close(denoise(pipeline), denoise(other), rtol=1e-4, atol=1e-4)
    assert same_bits(weights(pipeline), before)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_then_unmerge_restores_every_bit(
    pipeline: StableDiffusionPipeline, dtype: torch.dtype, values: bool
) -> None:
    pipeline.to(dtype)
    adapter = random_adapter(pipeline, values=values, targets=(*ATTENTION, *CONVOLUTIONS), strength=0.3)
    before, adapted = weights(pipeline), denoise(pipeline)
    masks = {name: layer.lora_mask["fade"].mask.unpack() for name, layer in adapter.layers.items()}
    for _ in range(5):
        report = adapter.merge()
        merged = weights(pipeline)
        for name, mask in masks.items():
            was, now = before[f"{name}.weight"].flatten(1), merged[f"{name}.weight"].flatten(1)
            assert torch.equal(was[~mask], now[~mask])
            assert (was[mask] != now[mask]).float().mean() > 0.9
        untouched = {n: w for n, w in before.items() if n.removesuffix(".weight") not in masks}
        assert same_bits({n: merged[n] for n in untouched}, untouched)
        assert report.entries == sum(int(mask.sum()) for mask in masks.values())
        assert 0 < report.relative_loss < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
        tolerance = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 0.3}[dtype]
        torch.testing.assert_close(denoise(pipeline).float(), adapted.float(), rtol=tolerance, atol=tolerance)
        adapter.unmerge()
        assert same_bits(weights(pipeline), before)


def test_merged_adapters_come_out_in_any_order(pipeline: StableDiffusionPipeline) -> None:
    pipeline.to(torch.bfloat16)
    first, second = random_adapter(pipeline, "first"), random_adapter(pipeline, "second", seed=1)
    before = weights(pipeline)
    second.merge()
    only_second = weights(pipeline)
    second.unmerge()
    first.merge()
    second.merge()
    first.unmerge()
    assert second.merged and not first.merged
    assert same_bits(weights(pipeline), only_second)
    second.unmerge()
    assert same_bits(weights(pipeline), before)


@FORMS
def test_switching_scaling_removing(pipeline: StableDiffusionPipeline, values: bool) -> None:
    base = denoise(pipeline)
    names = {name for name, _ in pipeline.unet.named_modules()}
    adapter = random_adapter(pipeline, values=values, strength=0.1)
    full = denoise(pipeline)
    assert adapter.enabled and adapter.scale == 1.0
    adapter.disable()
    assert not adapter.enabled
    assert torch.equal(denoise(pipeline), base)
    adapter.enable()
    assert torch.equal(denoise(pipeline), full)
    adapter.scale = 0.0
    torch.testing.assert_close(denoise(pipeline), base)
    adapter.scale = 0.5
    assert adapter.scale == pytest.approx(0.5)
    half = denoise(pipeline)
    assert (half - base).norm() < (full - base).norm()
    adapter.scale = 1.0
    assert torch.equal(denoise(pipeline), full)
    adapter.remove()
    assert torch.equal(denoise(pipeline), base)
    assert not getattr(pipeline.unet, "peft_config", {})
    assert {name for name, _ in pipeline.unet.named_modules()} == names
    with pytest.raises(FadeError, match="no longer attached"):
        adapter.enable()


def test_diffusers_own_calls_keep_their_meaning(pipeline: StableDiffusionPipeline) -> None:
    base, before = denoise(pipeline), weights(pipeline)
    first = random_adapter(pipeline, "first", strength=0.3, pinned=False)
    alone = denoise(pipeline)
    random_adapter(pipeline, "second", seed=1, values=True, strength=0.3, pinned=False)
    both = denoise(pipeline)
    assert not torch.allclose(both, alone)

    pipeline.set_adapters("first")
    assert torch.equal(denoise(pipeline), alone)
    pipeline.set_adapters(["first", "second"], [1.0, 0.0])
    torch.testing.assert_close(denoise(pipeline), alone)
    pipeline.set_adapters(["first", "second"], [0.25, 1.0])
    assert first.scale == pytest.approx(0.25)
    weighted = denoise(pipeline)
    pipeline.fuse_lora(adapter_names=["first", "second"])
    torch.testing.assert_close(denoise(pipeline), weighted, rtol=1e-4, atol=1e-4)
    assert not same_bits(weights(pipeline), before)
    pipeline.unfuse_lora()
    assert same_bits(weights(pipeline), before)
    assert torch.equal(denoise(pipeline), weighted)

    pipeline.disable_lora()
    assert torch.equal(denoise(pipeline), base)
    pipeline.enable_lora()
    assert torch.equal(denoise(pipeline), weighted)
    pipeline.set_adapters(["first", "second"])
    torch.testing.assert_close(denoise(pipeline), both)
    pipeline.delete_adapters("second")
    assert torch.equal(denoise(pipeline), alone)
    pipeline.delete_adapters("first")
    assert torch.equal(denoise(pipeline), base)
    assert same_bits(weights(pipeline), before)


@pytest.mark.parametrize("masked_first", [True, False])
def test_adds_up_with_an_ordinary_lora(pipeline: StableDiffusionPipeline, masked_first: bool) -> None:
    before = weights(pipeline)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False)

    def add_dense() -> None:
        torch.manual_seed(3)
        pipeline.unet.add_adapter(config, adapter_name="dense")

    if masked_first:
        random_adapter(pipeline, strength=0.3)
        add_dense()
    else:
        add_dense()
        random_adapter(pipeline, strength=0.3)
    pipeline.set_adapters(["fade", "dense"])
    both = denoise(pipeline)
    deltas = {}
    for name, layer in pipeline.unet.named_modules():
        if isinstance(layer, MaskedLoraLinear):
            active = [a for a in ("fade", "dense") if a in layer.lora_A]
            deltas[name] = sum(layer.get_delta_weight(a).detach() for a in active)
    pipeline.disable_lora()
    for name, delta in deltas.items():
        pipeline.unet.get_submodule(name).get_base_layer().weight.data += delta
    torch.testing.assert_close(both, denoise(pipeline), rtol=1e-4, atol=1e-4)
    for name in deltas:
        pipeline.unet.get_submodule(name).get_base_layer().weight.data.copy_(before[f"{name}.weight"])
    pipeline.enable_lora()
    pipeline.fuse_lora(adapter_names=["fade", "dense"])
    torch.testing.assert_close(both, denoise(pipeline), rtol=1e-4, atol=1e-4)
    pipeline.unfuse_lora()
    assert same_bits(weights(pipeline), before)


def test_deleting_a_merged_adapter_takes_it_out_of_the_weights(pipeline: StableDiffusionPipeline) -> None:
    before = weights(pipeline)
    adapter = random_adapter(pipeline)
    adapter.merge()
    pipeline.delete_adapters("fade")
    assert same_bits(weights(pipeline), before)


def test_merged_state_is_guarded(pipeline: StableDiffusionPipeline) -> None:
    adapter = random_adapter(pipeline)
    with pytest.raises(FadeError, match="is not merged"):
        adapter.unmerge()
    adapter.disable()
    with pytest.raises(FadeError, match="enable"):
        adapter.merge()
    adapter.enable()
    adapter.merge()
    with pytest.raises(FadeError, match="merged already"):
        adapter.merge()
    for action in (adapter.enable, adapter.disable, lambda: setattr(adapter, "scale", 0.5)):
        with pytest.raises(FadeError, match="unmerge"):
            action()
    with pytest.raises(FadeError, match="merged into the weights"):
        fingerprint(pipeline.unet)
    before = denoise(pipeline)
    adapter.remove()
    assert not torch.equal(denoise(pipeline), before)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, tmp_path: Path, dtype: torch.dtype, values: bool
) -> None:
    pipeline.to(dtype)
    path = tmp_path / "adapter.safetensors"
    size = random_adapter(pipeline, values=values, targets=(*ATTENTION, *CONVOLUTIONS), density=0.02).save(path)
    assert size == path.stat().st_size
    wanted = denoise(pipeline)
    other = tiny_pipeline(tokenizer).to(dtype)
    before = weights(other)
    base = denoise(other)
    adapter = fade.load_adapter(other, path)
    assert adapter.enabled and adapter.scale == pytest.approx(1.0)
    torch.testing.assert_close(denoise(other), wanted)
    assert same_bits(weights(other), before)
    adapter.merge()
    adapter.unmerge()
    assert same_bits(weights(other), before)
    adapter.remove()
    assert torch.equal(denoise(other), base)
    half = fade.load_adapter(other, path, name="again", scale=0.5)
    assert half.scale == pytest.approx(0.5)
    assert on(other) == ["again"]


def test_the_same_weights_in_another_dtype_are_the_same_base(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    random_adapter(pipeline).save(tmp_path / "wide.safetensors")
    for dtype in (torch.float16, torch.bfloat16):
        narrow = tiny_pipeline(tokenizer).to(dtype)
        fade.load_adapter(narrow, tmp_path / "wide.safetensors").remove()
        random_adapter(narrow).save(tmp_path / "narrow.safetensors")
        fade.load_adapter(tiny_pipeline(tokenizer), tmp_path / "narrow.safetensors")


def test_another_base_is_refused_by_name(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "adapter.safetensors"
    random_adapter(pipeline).save(path)
    other = tiny_pipeline(tokenizer, seed=1)
    with pytest.raises(WrongBaseError, match=r"trained on unnamed \(float32:\w{12}\), but this pipeline is unnamed"):
        fade.load_adapter(other, path)
    one_bit = tiny_pipeline(tokenizer)
    weight = next(p for n, p in base_parameters(one_bit.unet) if n.endswith("conv2.weight"))
    weight.data.view(-1)[-1] = torch.nextafter(weight.data.view(-1)[-1], torch.tensor(9.0))
    with pytest.raises(WrongBaseError):
        fade.load_adapter(one_bit, path)
    assert fade.load_adapter(other, path, check_base=False).enabled


def test_names_and_targets_are_checked(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapter = random_adapter(pipeline)
    adapter.save(tmp_path / "a.safetensors")
    with pytest.raises(FadeError, match="already has an adapter called 'fade'"):
        fade.load_adapter(pipeline, tmp_path / "a.safetensors")
    with pytest.raises(FadeError, match="letters, digits and underscores"):
        fade.load_adapter(pipeline, tmp_path / "a.safetensors", name="a.b")
    with pytest.raises(FadeError, match="'to_x' matches no Linear or Conv2d layer; there are e.g. "):
        target_layers(pipeline.unet, ("to_q", "to_x"))
    with pytest.raises(FadeError, match="selects no weight"):
        random_adapter(pipeline, "empty", density=0.0)


def test_target_patterns(pipeline: StableDiffusionPipeline) -> None:
    unet = pipeline.unet
    plain = set(target_layers(unet, ATTENTION))
    assert plain and all(name.rpartition("attn")[2][2:] in ATTENTION for name in plain)
    assert set(target_layers(unet, ("*.attn2.to_?",))) < plain
    assert set(target_layers(unet, ("conv_in",))) == {"conv_in"}
    everything = set(target_layers(unet))
    random_adapter(pipeline)
    assert set(target_layers(unet)) == everything
    assert set(target_layers(unet, ATTENTION)) == plain


def test_gradients_reach_the_adapter_alone(pipeline: StableDiffusionPipeline) -> None:
    pipeline.unet.requires_grad_(False)
    adapter = random_adapter(pipeline)
    assert not any(p.requires_grad for p in pipeline.unet.parameters())
    for parameter in adapter.parameters():
        parameter.requires_grad_(True)
    sample = pipeline.unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 64)).sample
    sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(p.grad is None for _, p in base_parameters(pipeline.unet))


@FORMS
def test_a_loader_that_knows_no_masks_fails_on_what_diffusers_saves(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, tmp_path: Path, values: bool
) -> None:
    adapter = random_adapter(pipeline, values=values)
    state = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    before = denoise(pipeline)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    pipeline.unet.load_state_dict(state)
    assert torch.equal(denoise(pipeline), before)
    pipeline.unet.save_lora_adapter(tmp_path, adapter_name=adapter.name)
    plain = tiny_pipeline(tokenizer)
    base = denoise(plain)
    with pytest.raises(Exception, match=r".+"):
        plain.unet.load_lora_adapter(tmp_path / "pytorch_lora_weights.safetensors", prefix=None)
    assert torch.equal(denoise(plain), base)
