"""What a pinned adapter on a pipeline does under diffusers' own calls: it stays in force whatever is done to others.
Rows of `docs/conformance.md`, both forms, attention layers and convolutions.

Each state is compared with a bare pipeline that has the same Δ in its weights.
"""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import ControlNetModel, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.hooks import apply_group_offloading
from peft import (
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    ShiraConfig,
    get_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTokenizer

import fade
from fade.base_model import base_parameters, fingerprint
from fade.digitcanvas.models import TEXT_WIDTH
from fade.errors import FadeError

from .adapters import on, random_adapter
from .conformance_table import behaviour
from .conftest import denoise, same_bits, tiny_pipeline, weights

TARGETS = ("to_q", "to_out.0", "conv1", "conv_shortcut")
STYLE_TARGETS = ["to_q", "conv1"]


def folder_of_a_style(tokenizer: CLIPTokenizer, folder: Path, rank: int = 2, **settings: Any) -> dict[str, Tensor]:
    """Saves a random LoRA as people share them and returns its Δ by layer."""
    pipeline = tiny_pipeline(tokenizer)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=STYLE_TARGETS, init_lora_weights=False, **settings)
    pipeline.unet.add_adapter(config, "style")
    layers = {name: m for name, m in pipeline.unet.named_modules() if isinstance(m, BaseTunerLayer)}
    for layer in layers.values():
        for part in (layer.lora_A, layer.lora_B):
            part["style"].weight.data = 0.2 * torch.randn(part["style"].weight.shape)
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet, None, "style")
    )
    return {name: layer.get_delta_weight("style").detach() for name, layer in layers.items()}


Style = tuple[Path, dict[str, Tensor], StableDiffusionPipeline]


@pytest.fixture(scope="module")
def style(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Style:
    """A style LoRA's folder and its Δ by layer, and a bare pipeline to compare with."""
    folder = tmp_path_factory.mktemp("style")
    return folder, folder_of_a_style(tokenizer, folder), tiny_pipeline(tokenizer)


class Scene:
    """A pipeline with a pinned adapter of ours, and a style LoRA in a folder; `file` is a place for ours."""

    def __init__(self, tokenizer: CLIPTokenizer, style: Style, folder: Path, values: bool, pinned: bool = True) -> None:
        self.tokenizer, self.file = tokenizer, folder / "fade.safetensors"
        self.style, self.style_deltas, self.bare = style
        self.pipeline = tiny_pipeline(tokenizer)
        self.bits = weights(self.pipeline)
        self.adapter = random_adapter(
            self.pipeline, values=values, targets=TARGETS, strength=0.1, pinned=pinned,
            seed=int(torch.randint(2**31, ())),
        )  # fmt: skip
        layers = self.adapter.layers
        self.ours = {name: layer.get_delta_weight("fade").detach() for name, layer in layers.items()}

    @property
    def unet(self) -> Any:
        return self.pipeline.unet

    def load_style(self, name: str = "style") -> "Scene":
        self.pipeline.load_lora_weights(self.style, adapter_name=name)
        return self

    def reference(
        self, ours: float, style: float = 0.0, deltas: dict[str, Tensor] | None = None, bare: Any = None
    ) -> Any:
        """A bare pipeline with these in its weights: a new one, or `bare`."""
        bare = bare or tiny_pipeline(self.tokenizer)
        bare.unet.load_state_dict(self.bits)
        with torch.no_grad():
            for scale, terms in ((ours, self.ours), (style, deltas or self.style_deltas)):
                for name, delta in terms.items():
                    bare.unet.get_submodule(name).weight += scale * delta
        return bare

    def draws(self, ours: float, style: float = 0.0, pipeline: Any = None, tolerance: float = 1e-4) -> None:
        """Asserts that the pipeline draws with these strengths, and that what is said of our adapter is true."""
        found = denoise(pipeline or self.pipeline)
        wanted = denoise(self.reference(ours, style, bare=self.bare))
        torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance)
        if pipeline is None and "fade" in fade.adapters(self.pipeline):
            row = next(row for row in fade.status(self.pipeline) if row.name == "fade")
            assert self.adapter.enabled == (ours != 0)
            assert row.state == (("merged" if self.adapter.merged else "on") if ours else "off")

    def same_weights(self) -> bool:
        return same_bits(weights(self.pipeline), self.bits)


@pytest.fixture(params=[False, True], ids=["factors", "values"])
def scene(request: pytest.FixtureRequest, tokenizer: CLIPTokenizer, style: Style, tmp_path: Path) -> Scene:
    return Scene(tokenizer, style, tmp_path, request.param)


# In force


@behaviour(1, "diffusers switches on the last LoRA loaded and every other off; ours is pinned and stays on")
def test_loading_another_lora(scene: Scene) -> None:
    """`load_lora_weights` of other LoRAs"""
    scene.load_style()
    scene.draws(1, 1)
    assert set(on(scene.pipeline)) == {"fade", "style"}
    scene.load_style("again")
    scene.draws(1, 1)
    assert scene.same_weights()


@behaviour(1, "ours is pinned: `set_adapters` switches the others, and ours only where it names it")
def test_set_adapters(scene: Scene) -> None:
    """`set_adapters`, with weights, with and without ours among the names"""
    scene.load_style().load_style("other")
    scene.pipeline.set_adapters("style", 0.5)
    scene.draws(1, 0.5)
    scene.pipeline.set_adapters(["other", "style"], [0.25, 0.5])
    scene.draws(1, 0.75)
    scene.pipeline.set_adapters(["fade", "style"], [0.5, 1.0])
    scene.draws(0.5, 1)
    scene.pipeline.set_adapters(["fade", "style"], [0.0, 1.0])
    torch.testing.assert_close(denoise(scene.pipeline), denoise(scene.reference(0, 1)), rtol=1e-4, atol=1e-4)
    scene.pipeline.set_adapters(["fade"])
    scene.draws(1)


@behaviour(1, "a plain LoRA that is not fused falls silent beside a fused one; ours stays in force")
def test_fusing_another_lora(scene: Scene) -> None:
    """`fuse_lora(adapter_names=…)` of another LoRA, `unfuse_lora`"""
    scene.load_style()
    for _ in range(2):
        scene.pipeline.fuse_lora(adapter_names=["style"])
        assert not scene.same_weights()
        scene.draws(1, 1)
        scene.pipeline.unfuse_lora()
        scene.draws(1, 1)
        assert scene.same_weights()


@behaviour(1, "diffusers leaves plain LoRAs at the scale that they were fused with, and rounding in the weights")
def test_fusing_again_and_again(scene: Scene) -> None:
    """`fuse_lora`, with a `lora_scale`, and `unfuse_lora`, any number of times: strength and every bit come back"""
    for scale in (0.5, 1.0, 0.25):
        scene.pipeline.fuse_lora(lora_scale=scale)
        scene.draws(scale)
        scene.pipeline.unfuse_lora()
        scene.draws(1)
        assert scene.same_weights()
    scene.load_style()
    scene.pipeline.fuse_lora()
    scene.draws(1, 1)
    scene.pipeline.unfuse_lora()
    scene.draws(1, 1)
    assert scene.same_weights()


@behaviour(1)
def test_deleting_another_lora(scene: Scene) -> None:
    """`delete_adapters` of another LoRA, fused or not"""
    scene.load_style()
    scene.pipeline.delete_adapters("style")
    scene.draws(1)
    scene.load_style()
    scene.pipeline.fuse_lora(adapter_names=["style"])
    scene.pipeline.delete_adapters("style")
    scene.draws(1)
    assert scene.same_weights()
    scene.pipeline.delete_adapters("fade")
    scene.draws(0)
    assert scene.same_weights()


@behaviour(1, "with one warning that names the concept")
@pytest.mark.parametrize("way", ["pipeline", "unet"])
def test_everything_off_and_on(scene: Scene, way: str) -> None:
    """`disable_lora`, `enable_lora`, `disable_adapters`, `enable_adapters`: everything off, everything on"""
    scene.load_style()
    owner, noun = (scene.pipeline, "lora") if way == "pipeline" else (scene.unet, "adapters")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(owner, f"disable_{noun}")()
    assert len([w for w in caught if "'cat'" in str(w.message)]) == 1
    scene.draws(0)
    getattr(owner, f"enable_{noun}")()
    scene.draws(1, 1)


@behaviour(1, "with one warning that names the concept")
def test_unloading_everything(scene: Scene) -> None:
    """`unload_lora_weights`"""
    scene.load_style()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scene.pipeline.unload_lora_weights()
    assert len([w for w in caught if "'cat'" in str(w.message)]) == 1
    scene.draws(0)
    assert scene.same_weights()
    assert not fade.adapters(scene.pipeline)
    assert {n for n, _ in scene.unet.named_parameters()} == {n for n, _ in scene.reference(0).unet.named_parameters()}


@behaviour(1, "`Adapter.merge` holds: diffusers un-merges everything before it loads, ours stays in the weights")
def test_merged_by_name(scene: Scene) -> None:
    """A merged adapter while other LoRAs are loaded, fused, un-fused, deleted, disabled and unloaded"""
    scene.adapter.merge()
    scene.draws(1)
    scene.load_style()
    scene.draws(1, 1)
    scene.pipeline.fuse_lora(adapter_names=["style"])
    scene.draws(1, 1)
    scene.pipeline.unfuse_lora()
    scene.draws(1, 1)
    scene.pipeline.disable_lora()
    scene.draws(1)
    scene.pipeline.enable_lora()
    scene.draws(1, 1)
    scene.pipeline.delete_adapters("style")
    scene.draws(1)
    scene.adapter.unmerge()
    scene.draws(1)
    assert scene.same_weights()


@behaviour(1)
def test_not_pinned(tokenizer: CLIPTokenizer, style: Style, tmp_path: Path) -> None:
    """`pinned=False`: PEFT's and diffusers' plain semantics"""
    for values in (False, True):
        scene = Scene(tokenizer, style, tmp_path, values, pinned=False)
        scene.load_style()
        scene.draws(0, 1)
        scene.pipeline.set_adapters(["fade", "style"])
        scene.draws(1, 1)
        scene.pipeline.set_adapters("fade")
        scene.draws(1)


@behaviour(1)
def test_what_its_own_handle_switches(scene: Scene) -> None:
    """Switched off by its own handle it stays off, whatever is loaded; others stay as they were"""
    scene.adapter.disable()
    scene.load_style()
    scene.draws(0, 1)
    scene.adapter.enable()
    scene.draws(1, 1)
    scene.pipeline.disable_lora()
    scene.adapter.enable()
    scene.draws(1)
    scene.pipeline.enable_lora()
    scene.draws(1, 1)
    with scene.adapter.disabled():
        scene.draws(0, 1)
    scene.draws(1, 1)
    scene.adapter.remove()
    scene.draws(0, 1)
    assert on(scene.pipeline) == ["style"]


@behaviour(1)
def test_removed_beside_what_was_off(scene: Scene) -> None:
    """Removing ours leaves a LoRA that was off, off"""
    scene.load_style()
    scene.pipeline.set_adapters("style")
    scene.pipeline.disable_lora()
    scene.adapter.remove()
    scene.draws(0, 0)
    scene.pipeline.enable_lora()
    scene.draws(0, 1)


@behaviour(1, "diffusers brings plain LoRAs back to 1 after a scale of 0; ours to what it was")
def test_scale_of_one_call(scene: Scene) -> None:
    """`scale` in `cross_attention_kwargs`, 0 included, once and again"""
    scene.adapter.scale = 0.5
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, TEXT_WIDTH, generator=generator)
    for scale in (0.0, 0.3, 1.0, 0.0, 2.0):
        with torch.no_grad():
            once = scene.unet(latents, torch.tensor([10, 700]), text, cross_attention_kwargs={"scale": scale}).sample
        wanted = denoise(scene.reference(0.5 * scale, bare=scene.bare))
        torch.testing.assert_close(once, wanted, rtol=1e-4, atol=1e-4)
        assert scene.adapter.scale == 0.5
        scene.draws(0.5)


@behaviour(
    1, "diffusers' own hot-swap leaves the other adapters' gradients off; those of a LoRA in training stay on here"
)
def test_training_of_another_lora_goes_on(scene: Scene) -> None:
    """A LoRA in training while ours is loaded, switched, scaled, merged and removed"""
    scene.adapter.save(scene.file)
    scene.adapter.remove()
    scene.load_style()
    trained = {name for name, _ in scene.unet.named_parameters() if ".style." in name}

    def training() -> set[str]:
        return {name for name, parameter in scene.unet.named_parameters() if parameter.requires_grad}

    for name, parameter in scene.unet.named_parameters():
        parameter.requires_grad_(name in trained)
    scene.adapter = fade.load_adapter(scene.pipeline, scene.file)
    assert training() == trained
    scene.draws(1, 1)
    for action in (
        scene.adapter.disable, scene.adapter.enable, scene.adapter.merge, scene.adapter.unmerge, scene.adapter.remove,
    ):  # fmt: skip
        action()
        assert training() == trained


@behaviour(1)
@pytest.mark.parametrize("prepared", [False, True])
def test_hotswap(scene: Scene, prepared: bool, tmp_path: Path) -> None:
    """`load_lora_weights(hotswap=True)` of another LoRA, `enable_lora_hotswap` before the first adapter"""
    if prepared:
        scene.adapter.save(scene.file)
        scene.adapter.remove()
        scene.pipeline.enable_lora_hotswap(target_rank=8)
        scene.adapter = fade.load_adapter(scene.pipeline, scene.file)
    scene.load_style()
    scene.draws(1, 1)
    other = folder_of_a_style(scene.tokenizer, tmp_path / "other", rank=4 if prepared else 2)
    scene.pipeline.load_lora_weights(tmp_path / "other", adapter_name="style", hotswap=True)
    wanted = denoise(scene.reference(1, 1, other))
    torch.testing.assert_close(denoise(scene.pipeline), wanted, rtol=1e-4, atol=1e-4)
    scene.pipeline.delete_adapters("style")
    scene.draws(1)


@behaviour(1)
def test_several_of_ours(scene: Scene) -> None:
    """Several pinned adapters: each merged, un-merged, switched, scaled and removed alone"""
    second = random_adapter(scene.pipeline, "second", values=True, strength=0.1, seed=5)
    delta = {name: layer.get_delta_weight("second").detach() for name, layer in second.layers.items()}

    def draws(ours: float, other: float) -> None:
        wanted = denoise(scene.reference(ours, other, delta, bare=scene.bare))
        torch.testing.assert_close(denoise(scene.pipeline), wanted, rtol=1e-4, atol=1e-4)

    draws(1, 1)
    scene.adapter.merge()
    draws(1, 1)
    second.disable()
    draws(1, 0)
    second.enable().scale = 0.5
    draws(1, 0.5)
    second.merge()
    scene.adapter.unmerge()
    draws(1, 0.5)
    scene.adapter.disable()
    draws(0, 0.5)
    scene.adapter.remove()
    draws(0, 0.5)
    second.unmerge()
    assert scene.same_weights()
    second.remove()
    draws(0, 0)


# Beside others

METHODS: dict[str, Any] = {
    "LoHa": LoHaConfig(r=2, target_modules=["to_q", "to_v"], init_weights=False),
    "LoKr": LoKrConfig(r=2, target_modules=["to_q", "to_v"], init_weights=False),
    "IA3": IA3Config(target_modules=["to_q", "to_v"], feedforward_modules=[], init_ia3_weights=False),
    "OFT": OFTConfig(r=2, oft_block_size=0, target_modules=["to_q", "to_v"], init_weights=False),
    "LoRA": LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False),
    "LoRA in training": LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_out"], init_lora_weights=False),
    "DoRA": LoraConfig(r=2, target_modules=["to_q", "to_v"], use_dora=True, init_lora_weights=False),
    "LoRA with bias": LoraConfig(r=2, target_modules=["to_out.0"], lora_bias=True, init_lora_weights=False),
}


@behaviour(2, "ours is pinned; `add_adapter` switches plain LoRAs off")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("scene", "ours_first"), [(False, True), (True, False)], indirect=["scene"])
def test_other_methods(scene: Scene, method: str, ours_first: bool) -> None:
    """`add_adapter` of LoHa, LoKr, IA³, OFT, DoRA, LoRA with a bias, `modules_to_save`, before ours or after"""
    scene.adapter.save(scene.file)
    seed = int(torch.randint(2**31, ()))

    def add(pipeline: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            pipeline.unet.add_adapter(copy.deepcopy(METHODS[method]), adapter_name="other")
        pipeline.unet.eval()

    if ours_first:
        add(scene.pipeline)
    else:
        scene.adapter.remove()
        add(scene.pipeline)
        scene.adapter = fade.load_adapter(scene.pipeline, scene.file)
    # Ours adds x Δᵀ to each layer's output, whatever the other method makes of the frozen part.
    other = tiny_pipeline(scene.tokenizer)
    add(other)
    hooks: list[Any] = []
    around_ours = ours_first and method in ("IA3", "OFT", "LoHa", "LoKr")
    if not around_ours:
        for name, delta in scene.ours.items():
            hooks.append(other.unet.get_submodule(name).register_forward_hook(_adds(delta)))
        torch.testing.assert_close(denoise(scene.pipeline), denoise(other), rtol=1e-4, atol=1e-4)
    both = denoise(scene.pipeline)
    scene.adapter.disable()
    assert not torch.allclose(denoise(scene.pipeline), both, atol=1e-3)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(denoise(scene.pipeline), denoise(other), rtol=1e-4, atol=1e-4)
    scene.adapter.enable()
    torch.testing.assert_close(denoise(scene.pipeline), both, rtol=1e-5, atol=1e-5)


def _adds(delta: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if delta.dim() == 2:
            return output + nn.functional.linear(arguments[0], delta)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        return output + nn.functional.conv2d(arguments[0], delta, None, base.stride, base.padding)

    return hook


@behaviour(2, "these compute from the frozen weight, past every adapter on it; PEFT lets them silence a plain LoRA")
@pytest.mark.parametrize("config", [HRAConfig, MissConfig, ShiraConfig])
def test_methods_that_would_silence_ours(scene: Scene, config: Any) -> None:
    """HRA, MiSS, SHiRA on top of ours: refused by name, nothing is changed"""
    names = {name for name, _ in scene.unet.named_modules()}
    with pytest.raises(ValueError, match="'fade'"):
        scene.unet.add_adapter(config(r=1, target_modules=["to_q"]), adapter_name="other")
    assert {name for name, _ in scene.unet.named_modules()} == names
    assert [row.name for row in fade.status(scene.pipeline)] == ["fade"]
    scene.draws(1)


def ip_adapter_weights(unet: Any) -> dict[str, dict[str, Tensor]]:
    """Random weights of an IP-Adapter with four tokens for this UNet."""
    crossing = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    weights_of = {
        f"{2 * index + 1}.{part}.weight": 0.1 * torch.randn(unet.get_submodule(name).to_q.out_features, TEXT_WIDTH)
        for index, name in enumerate(crossing)
        for part in ("to_k_ip", "to_v_ip")
    }
    projection = {
        "proj.weight": 0.1 * torch.randn(4 * TEXT_WIDTH, 16), "proj.bias": torch.zeros(4 * TEXT_WIDTH),
        "norm.weight": torch.ones(TEXT_WIDTH), "norm.bias": torch.zeros(TEXT_WIDTH),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": weights_of}


@behaviour(2)
@pytest.mark.parametrize("ours_first", [True, False])
def test_ip_adapter(scene: Scene, ours_first: bool) -> None:
    """IP-Adapter, loaded before ours or after: both act, the base stays the same base"""
    scene.adapter.save(scene.file)
    before = fingerprint(scene.unet)
    state = ip_adapter_weights(scene.unet)

    def load(pipeline: Any) -> None:
        pipeline.load_ip_adapter(state, subfolder=None, weight_name=None, image_encoder_folder=None)
        pipeline.set_ip_adapter_scale(0.8)

    if ours_first:
        load(scene.pipeline)
    else:
        scene.adapter.remove()
        load(scene.pipeline)
        scene.adapter = fade.load_adapter(scene.pipeline, scene.file)
    assert fingerprint(scene.unet) == before
    reference = scene.reference(1)
    load(reference)
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, TEXT_WIDTH, generator=generator)
    for strength in (1.0, 3.0):
        images = [strength * torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1))]
        drawn = [
            pipeline.unet(latents, torch.tensor([10, 700]), text, added_cond_kwargs={"image_embeds": images}).sample
            for pipeline in (scene.pipeline, reference)
        ]
        torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)
    scene.pipeline.unload_ip_adapter()
    scene.draws(1)


@behaviour(2)
def test_textual_inversion(scene: Scene) -> None:
    """Textual inversion tokens, loaded and unloaded"""
    token = {"<place>": torch.randn(1, TEXT_WIDTH)}
    before = fingerprint(scene.unet)
    reference = scene.reference(1)
    drawn = []
    for pipeline in (scene.pipeline, reference):
        pipeline.load_textual_inversion({"<place>": token["<place>"]}, token="<place>")
        generator = torch.Generator().manual_seed(3)
        drawn.append(
            torch.as_tensor(
                pipeline("a cat in <place>", num_inference_steps=2, generator=generator, output_type="np").images
            )
        )
        pipeline.unload_textual_inversion()
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3)
    assert fingerprint(scene.unet) == before
    scene.draws(1)


@behaviour(
    2, "diffusers fails on a UNet with adapters: its names are not the ControlNet's; with ours attached it works"
)
def test_controlnet_from_the_unet(scene: Scene) -> None:
    """`ControlNetModel.from_unet` with ours attached: the frozen network's weights"""
    controlnet = ControlNetModel.from_unet(scene.unet)
    wanted = ControlNetModel.from_unet(scene.reference(0).unet).state_dict()
    found = controlnet.state_dict()
    assert found.keys() == wanted.keys()
    copied = [name for name in wanted if name.startswith(("conv_in", "time_", "down_blocks", "mid_block"))]
    assert copied
    assert all(torch.equal(found[name], wanted[name]) for name in copied)
    scene.draws(1)


@behaviour(2)
def test_residuals_of_t2i_adapters_and_controlnets(scene: Scene) -> None:
    """T2I-Adapter and ControlNet residuals into the adapted UNet"""
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, TEXT_WIDTH, generator=generator)
    arguments = (latents, torch.tensor([10, 700]), text)
    reference = scene.reference(1).unet
    controlnet = ControlNetModel.from_unet(scene.reference(0).unet)
    for parameter in controlnet.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape)
    with torch.no_grad():
        down, middle = controlnet(*arguments, controlnet_cond=torch.randn(2, 3, 64, 64), return_dict=False)
        given = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        controlled = [unet(*arguments, **given).sample for unet in (scene.unet, reference)]
        levels = [torch.randn(2, 16, 8, 8), torch.randn(2, 24, 4, 4)]
        adapted = [
            unet(*arguments, down_intrablock_additional_residuals=[level.clone() for level in levels]).sample
            for unet in (scene.unet, reference)
        ]
    torch.testing.assert_close(*controlled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*adapted, rtol=1e-4, atol=1e-4)


# Wrapped and moved


@behaviour(3, "plain LoRAs are cast with the model; our tensors stay in float32")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cast_after_loading(scene: Scene, dtype: torch.dtype) -> None:
    """`pipe.to(dtype)` after loading, merged or not, there and back"""
    before = [parameter.detach().clone() for parameter in scene.adapter.parameters()]
    scene.pipeline.to(dtype)
    assert all(torch.equal(p, b) for p, b in zip(scene.adapter.parameters(), before, strict=True))
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 0.15}[dtype]
    scene.draws(1, tolerance=tolerance)
    cast = weights(scene.pipeline)
    scene.adapter.merge()
    scene.draws(1, tolerance=tolerance)
    scene.pipeline.to(torch.float32)
    scene.adapter.unmerge()
    assert same_bits(weights(scene.pipeline), {name: weight.float() for name, weight in cast.items()})
    scene.draws(1, tolerance=tolerance)


@behaviour(3)
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("way", ["sequential offload", "group offload", "layerwise casting", "channels last"])
def test_wrapped(scene: Scene, way: str, moment: str, tmp_path: Path) -> None:
    """Sequential and group offload, layerwise casting, channels-last: before loading or after"""
    scene.adapter.save(scene.file)
    ways: dict[str, Callable[[Any], Any]] = {
        "sequential offload": lambda p: cpu_offload(p.unet, execution_device=torch.device("cpu")),
        "group offload": lambda p: apply_group_offloading(
            p.unet, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        ),
        "layerwise casting": lambda p: p.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        "channels last": lambda p: p.unet.to(memory_format=torch.channels_last),
    }
    reference = scene.reference(0)
    ways[way](reference)
    bare = denoise(reference)
    if moment == "before":
        scene.adapter.remove()
        ways[way](scene.pipeline)
        scene.adapter = fade.load_adapter(scene.pipeline, scene.file, check_base=way != "layerwise casting")
    else:
        ways[way](scene.pipeline)
    found = denoise(scene.pipeline)
    if way == "layerwise casting":  # the frozen weights are rounded to 8 bits, also in the comparison
        for name, delta in scene.ours.items():
            reference.unet.get_submodule(name).register_forward_hook(_adds(delta))
        torch.testing.assert_close(found, denoise(reference), rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(found, denoise(scene.reference(1)), rtol=1e-4, atol=1e-4)
    scene.adapter.disable()
    torch.testing.assert_close(denoise(scene.pipeline), bare, rtol=1e-4, atol=1e-4)
    scene.adapter.enable().scale = 0.5
    assert not torch.allclose(denoise(scene.pipeline), bare, atol=1e-3)
    scene.adapter.scale = 1.0
    torch.testing.assert_close(denoise(scene.pipeline), found)
    scene.adapter.save(tmp_path / "again.safetensors")
    other = tiny_pipeline(scene.tokenizer)
    fade.load_adapter(other, tmp_path / "again.safetensors")
    scene.draws(1, pipeline=other)


@behaviour(3)
def test_compiled_unet(scene: Scene) -> None:
    """`pipe.unet = torch.compile(pipe.unet)` before loading and after: saved, loaded, switched and merged as without"""
    bare = scene.unet
    scene.pipeline.unet = torch.compile(bare)
    assert set(fade.adapters(scene.pipeline)) == {"fade"}
    scene.adapter.save(scene.file)
    other = tiny_pipeline(scene.tokenizer)
    other.unet = torch.compile(other.unet)
    loaded = fade.load_adapter(other, scene.file)
    assert loaded.enabled
    other.unet = other.unet._orig_mod
    scene.draws(1, pipeline=other)
    scene.adapter.merge()
    scene.adapter.unmerge()
    scene.adapter.disable()
    scene.pipeline.unet = bare
    assert scene.same_weights()
    scene.draws(0)


@behaviour(3)
def test_fused_projections(scene: Scene) -> None:
    """`fuse_qkv_projections`: refused while ours is on and not merged, and right once it is merged"""
    with pytest.raises(FadeError, match="merge"):
        scene.unet.fuse_qkv_projections()
    scene.draws(1)
    scene.adapter.merge()
    scene.unet.fuse_qkv_projections()
    scene.draws(1)
    with pytest.raises(FadeError, match="unfuse_qkv_projections"):
        scene.adapter.unmerge()
    scene.unet.unfuse_qkv_projections()
    scene.adapter.unmerge()
    scene.draws(1)
    assert scene.same_weights()


@behaviour(3)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_the_unet(scene: Scene, way: str) -> None:
    """Copies of the UNet by deepcopy, pickle and `torch.save`: pinned as well, and independent"""
    if way == "deepcopy":
        other = copy.deepcopy(scene.unet)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(scene.unet))
    else:
        file = io.BytesIO()
        torch.save(scene.unet, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    pipeline = tiny_pipeline(scene.tokenizer)
    pipeline.unet = other
    scene.draws(1, pipeline=pipeline)
    pipeline.load_lora_weights(scene.style, adapter_name="style")
    scene.draws(1, 1, pipeline=pipeline)
    scene.draws(1)
    fade.adapters(pipeline)["fade"].disable()
    scene.draws(0, 1, pipeline=pipeline)
    scene.draws(1)


@behaviour(3)
def test_pipelines_that_share_a_unet(scene: Scene) -> None:
    """`from_pipe`: several pipelines on one UNet"""
    other = StableDiffusionImg2ImgPipeline.from_pipe(scene.pipeline)
    assert set(fade.adapters(other)) == {"fade"}
    scene.draws(1, pipeline=other)
    other.load_lora_weights(scene.style, adapter_name="style")
    scene.draws(1, 1)
    fade.adapters(other)["fade"].disable()
    scene.draws(0, 1)


@behaviour(3)
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast", "float64 default", "deterministic"])
def test_loaded_under(scene: Scene, mode: str) -> None:
    """Loaded and merged under no_grad, inference mode, autocast, another default dtype, deterministic mode"""
    scene.adapter.save(scene.file)
    scene.adapter.remove()
    contexts: dict[str, Callable[[], Any]] = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    state = torch.random.get_rng_state()
    try:
        if mode == "float64 default":
            torch.set_default_dtype(torch.float64)
        if mode == "deterministic":
            torch.use_deterministic_algorithms(True)
        with contexts.get(mode, torch.enable_grad)():
            scene.adapter = fade.load_adapter(scene.pipeline, scene.file)
            scene.adapter.merge()
            scene.adapter.unmerge()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert torch.equal(state, torch.random.get_rng_state())
    assert scene.same_weights()
    assert {parameter.dtype for parameter in scene.adapter.parameters()} == {torch.float32}
    scene.draws(1)
    for parameter in scene.adapter.parameters():
        parameter.requires_grad_(True)
    scene.unet(
        torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, TEXT_WIDTH)
    ).sample.square().sum().backward()
    assert all(parameter.grad is not None for parameter in scene.adapter.parameters())


# Saved whole


@behaviour(4, "diffusers writes a folder that cannot be loaded; with ours on it writes the merged weights")
def test_saving_the_pipeline(scene: Scene, tmp_path: Path) -> None:
    """`save_pretrained` of the pipeline and of the UNet with ours attached: it loads and draws, the concept gone"""
    scene.pipeline.save_pretrained(tmp_path / "whole")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", safety_checker=None)
    scene.draws(1, pipeline=loaded)
    assert not getattr(loaded.unet, "peft_config", {})
    scene.draws(1)
    assert scene.same_weights()
    scene.adapter.scale = 0.5
    scene.unet.save_pretrained(tmp_path / "unet")
    loaded.unet = type(loaded.unet).from_pretrained(tmp_path / "unet")
    scene.draws(0.5, pipeline=loaded)
    scene.adapter.merge()
    scene.unet.save_pretrained(tmp_path / "merged")
    loaded.unet = type(loaded.unet).from_pretrained(tmp_path / "merged")
    scene.draws(0.5, pipeline=loaded)
    scene.adapter.unmerge()
    assert scene.same_weights()


@behaviour(4, "diffusers writes a folder that cannot be loaded; here an error names the ways out")
def test_saving_the_pipeline_with_a_lora_on(scene: Scene, tmp_path: Path) -> None:
    """`save_pretrained` while another LoRA is on: refused, nothing is written that does not draw"""
    scene.load_style()
    with pytest.raises(FadeError, match="style"):
        scene.unet.save_pretrained(tmp_path / "unet")
    assert not list((tmp_path / "unet").glob("*.safetensors")) if (tmp_path / "unet").exists() else True
    scene.draws(1, 1)
    scene.pipeline.delete_adapters("style")
    scene.unet.save_pretrained(tmp_path / "unet")
    loaded = tiny_pipeline(scene.tokenizer)
    loaded.unet = type(loaded.unet).from_pretrained(tmp_path / "unet")
    scene.draws(1, pipeline=loaded)


@behaviour(4)
def test_saving_the_others(scene: Scene, tmp_path: Path) -> None:
    """`save_lora_adapter` of another LoRA beside ours: the same tensors and settings as without ours"""
    scene.load_style()
    scene.unet.save_lora_adapter(tmp_path / "with", adapter_name="style")
    bare = tiny_pipeline(scene.tokenizer)
    bare.load_lora_weights(scene.style, adapter_name="style")
    bare.unet.save_lora_adapter(tmp_path / "without", adapter_name="style")
    contents = []
    for folder in ("with", "without"):
        with safe_open(next((tmp_path / folder).glob("*.safetensors")), "pt") as file:
            contents.append((file.metadata(), {name: file.get_tensor(name) for name in file.keys()}))  # noqa: SIM118
    assert contents[0][0] == contents[1][0]
    assert same_bits(contents[0][1], contents[1][1])


@behaviour(4, "a loader that knows no masks refuses ours, because without its mask it would be another edit")
def test_saved_as_a_lora(scene: Scene, tmp_path: Path) -> None:
    """`save_lora_adapter` of ours: holds every tensor, and a loader without masks refuses it"""
    scene.unet.save_lora_adapter(tmp_path, adapter_name="fade")
    file = next(tmp_path.glob("*.safetensors"))
    kept = sum(p.numel() * 4 for p in scene.adapter.parameters())
    assert file.stat().st_size > kept
    plain = tiny_pipeline(scene.tokenizer)
    base = denoise(plain)
    with pytest.raises(Exception, match=r".+"):
        plain.unet.load_lora_adapter(file, prefix=None)
    assert torch.equal(denoise(plain), base)


@behaviour(4)
def test_unet_state_dict(scene: Scene) -> None:
    """`unet.state_dict()` and `load_state_dict` between adapted UNets with other masks"""
    state = {name: tensor.clone() for name, tensor in scene.unet.state_dict().items()}
    other = tiny_pipeline(scene.tokenizer, seed=1)
    random_adapter(
        other, values=len(scene.adapter.parameters()) == len(scene.adapter.layers),
        targets=TARGETS, density=0.3, seed=9,
    )  # fmt: skip
    other.unet.load_state_dict(state)
    for name, layer in fade.adapters(other)["fade"].layers.items():
        torch.testing.assert_close(layer.get_delta_weight("fade"), scene.ours[name])
    scene.draws(1, pipeline=other)
    fade.adapters(other)["fade"].merge()
    fade.adapters(other)["fade"].unmerge()
    assert same_bits(weights(other), dict(base_parameters(scene.unet)))
