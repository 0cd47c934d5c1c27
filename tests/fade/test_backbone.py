"""The backbone: noise-prediction and velocity-prediction models, any scheduler, seeds that fix each image alone; other
pipelines of the same parts, other VAEs, and parts that are missing, wrapped, cast or offloaded."""

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import CLIPTokenizer

import fade
from fade.backbones import backbone_for, denoiser_of
from fade.config import Config
from fade.digitcanvas.models import TEXT_WIDTH, build_scheduler
from fade.errors import FadeError

from .conftest import tiny_pipeline


def test_an_unknown_pipeline_names_those_supported() -> None:
    class OtherPipeline:
        pass

    with pytest.raises(FadeError, match=r"OtherPipeline is not supported; .* of .*Stable Diffusion 1\.x"):
        backbone_for(OtherPipeline())


def test_a_subclass_is_supported(pipeline: StableDiffusionPipeline) -> None:
    class Mine(StableDiffusionPipeline):
        pass

    assert backbone_for(Mine(**pipeline.components, requires_safety_checker=False)).denoiser is pipeline.unet


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_recovers_noise_and_latent(tokenizer: CLIPTokenizer, kind: str) -> None:
    scheduler = diffusers.DDIMScheduler.from_config(build_scheduler().config, prediction_type=kind)
    backbone = backbone_for(tiny_pipeline(tokenizer, scheduler=scheduler))
    latents, noise = torch.randn(3, 4, 8, 8).double(), torch.randn(3, 4, 8, 8).double()
    timesteps = torch.tensor([0, 400, 999])
    alpha = backbone.schedule.alphas_cumprod[timesteps].double().view(3, 1, 1, 1)
    noised, target = backbone.add_noise(latents, noise, timesteps), backbone.target(latents, noise, timesteps)
    torch.testing.assert_close(noised, alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, rtol=1e-5, atol=1e-5)
    if kind == "epsilon":
        assert torch.equal(target, noise)
    else:
        torch.testing.assert_close(alpha.sqrt() * noised - (1 - alpha).sqrt() * target, latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler"]
)
def test_every_usual_scheduler_samples_and_trains(tokenizer: CLIPTokenizer, name: str) -> None:
    scheduler = getattr(diffusers, name).from_config(build_scheduler().config)
    backbone = backbone_for(tiny_pipeline(tokenizer, scheduler=scheduler))
    images = backbone.generate(["a cat", "a dog"], [1, 2], steps=8)
    assert images.shape == (2, 3, 32, 32)
    assert torch.isfinite(images).all() and 0 <= images.min() and images.max() <= 1
    assert torch.equal(backbone.schedule.alphas_cumprod, build_scheduler().alphas_cumprod)


def test_an_image_depends_on_its_prompt_and_seed_alone(pipeline: StableDiffusionPipeline) -> None:
    backbone = backbone_for(pipeline)
    prompts, seeds = ["a cat", "a dog", "a cat", "a bird"], [5, 5, 6, 7]
    together = backbone.sample_latents(prompts, seeds, steps=2, batch_size=3)
    for i in range(4):
        alone = backbone.sample_latents(prompts[i : i + 1], seeds[i : i + 1], steps=2)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[2], atol=1e-2)


def test_latents_match_what_the_pipeline_itself_draws(pipeline: StableDiffusionPipeline) -> None:
    images = backbone_for(pipeline).generate(["a cat"], [3], steps=3, guidance_scale=2.0)
    theirs = pipeline(
        "a cat", num_inference_steps=3, guidance_scale=2.0, generator=torch.Generator().manual_seed(3), output_type="pt"
    ).images
    torch.testing.assert_close(images, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_are_encoded_to_scaled_latents(pipeline: StableDiffusionPipeline, dtype: torch.dtype) -> None:
    pipeline.to(dtype)
    backbone = backbone_for(pipeline)
    kinds = [((32, 32), "red"), ((90, 40), "blue"), ((7, 9), "white")]
    images = [Image.new("RGB", size, color) for size, color in kinds]
    latents = backbone.encode_images(images, None, torch.Generator().manual_seed(0))
    assert latents.shape == (3, 4, 8, 8) and latents.dtype == dtype
    assert pipeline.vae.dtype == dtype
    again = backbone.encode_images(images, None, torch.Generator().manual_seed(0))
    assert torch.equal(latents, again)
    larger = backbone.encode_images(images, 64, torch.Generator().manual_seed(0))
    assert larger.shape == (3, 4, 16, 16)


def test_the_prediction_is_the_denoisers_own(velocity_pipeline: StableDiffusionPipeline) -> None:
    backbone = backbone_for(velocity_pipeline)
    embeddings = backbone.encode_prompts(["a cat", ""])
    noised, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 800])
    with torch.no_grad():
        wanted = velocity_pipeline.unet(noised, timesteps, embeddings["prompt_embeds"]).sample
        assert F.mse_loss(backbone.predict(noised, timesteps, embeddings), wanted) == 0


# Other pipelines


def unet_with(**changes: Any) -> UNet2DConditionModel:
    """As the tiny pipeline's, but for some settings."""
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 24),
    }
    size = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 2}
    return UNet2DConditionModel(**{**blocks, **size, "cross_attention_dim": TEXT_WIDTH, **changes})


def pipelines_of_the_same_parts() -> list[str]:
    """Every pipeline of diffusers whose constructor takes the parts of Stable Diffusion and no second text encoder."""
    names = []
    for name in dir(diffusers):
        cls = getattr(diffusers, name) if name.startswith(("StableDiffusion", "LatentConsistency")) else None
        taken = inspect.signature(cls).parameters.keys() if isinstance(cls, type) else set()
        if taken >= {"vae", "text_encoder", "tokenizer", "unet", "scheduler"} and "text_encoder_2" not in taken:
            names.append(name)
    return names


@pytest.mark.parametrize("name", pipelines_of_the_same_parts())
def test_pipelines_of_the_same_parts_draw_as_the_ordinary_one(pipeline: StableDiffusionPipeline, name: str) -> None:
    cls = getattr(diffusers, name)
    parts = {
        part: pipeline.components.get(part)
        for part, parameter in inspect.signature(cls).parameters.items()
        if parameter.default is parameter.empty or part in pipeline.components
    }
    try:
        other = cls(**parts)
    except Exception as error:
        pytest.skip(f"{name} cannot be made of these parts alone: {error}")
    config = dict(other.scheduler.config)
    backbone = backbone_for(other)
    assert backbone.denoiser is other.unet and backbone.pipeline.scheduler is other.scheduler
    assert denoiser_of(other) == ("unet", pipeline.unet)
    wanted = backbone_for(pipeline).generate(["a cat"], [1], steps=1)
    assert torch.equal(backbone.generate(["a cat"], [1], steps=1), wanted)
    assert dict(other.scheduler.config) == config


def test_the_callers_scheduler_stays_as_it_is(pipeline: StableDiffusionPipeline) -> None:
    """StableDiffusionPipeline's constructor would set steps_offset and clip_sample in its config."""
    parts = {**pipeline.components, "image_encoder": None}
    other = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=diffusers.ControlNetModel.from_unet(pipeline.unet), requires_safety_checker=False
    )
    other.scheduler = diffusers.DDIMScheduler.from_config(other.scheduler.config, steps_offset=0, clip_sample=True)
    backbone_for(other)
    assert other.scheduler.config.steps_offset == 0 and other.scheduler.config.clip_sample


def test_unlearning_through_an_img2img_pipeline(pipeline: StableDiffusionPipeline, quick: Config) -> None:
    """The same adapter as through the ordinary pipeline; it acts in the img2img pipeline."""
    quick = quick.replace(overwrite__steps=2, overwrite__learning_rate=1.0)
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    found = fade.unlearn(other, "three", "eight", config=quick, progress=False, name="through")
    values = [parameter.detach().clone() for parameter in found.parameters()]

    def draw() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        image = Image.effect_noise((32, 32), 80).convert("RGB")
        return other("a three", image=image, num_inference_steps=2, generator=generator, output_type="np").images

    on = draw()
    found.disable()
    assert not np.allclose(on, draw(), atol=1e-3)
    found.remove()
    wanted = fade.unlearn(pipeline, "three", "eight", config=quick, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(values, wanted.parameters(), strict=True))


def test_a_distilled_denoiser_is_told_a_guidance_scale(pipeline: StableDiffusionPipeline, quick: Config) -> None:
    pipeline.unet = unet_with(time_cond_proj_dim=16)
    backbone = backbone_for(pipeline)
    noised, timesteps, embeddings = torch.randn(2, 4, 8, 8), torch.tensor([3, 800]), backbone.encode_prompts(["a", "b"])
    told = pipeline.get_guidance_scale_embedding(torch.tensor([7.5, 7.5]), embedding_dim=16)
    with torch.no_grad():
        wanted = pipeline.unet(noised, timesteps, embeddings["prompt_embeds"], timestep_cond=told).sample
        assert torch.equal(backbone.predict(noised, timesteps, embeddings), wanted)
        assert not torch.equal(pipeline.unet(noised, timesteps, embeddings["prompt_embeds"]).sample, wanted)
    fade.unlearn(pipeline, "three", "eight", config=quick.replace(overwrite__steps=1), progress=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"in_channels": 9}, "takes 9 channels where latents have 4 .*check_base=False"),
        ({"in_channels": 8}, "takes 8 channels"),
        ({"out_channels": 8}, "predicts 8 channels"),
        ({"num_class_embeds": 10}, "num_class_embeds=10"),
        ({"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8}, "class_embed_type"),
    ],
)
def test_denoisers_that_a_prompt_alone_cannot_drive(
    pipeline: StableDiffusionPipeline, quick: Config, changes: dict[str, Any], reason: str
) -> None:
    pipeline.unet = unet_with(**changes)
    for other in (pipeline, StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)):
        with pytest.raises(FadeError, match=reason):
            backbone_for(other)
        with pytest.raises(FadeError, match=reason):
            fade.unlearn(other, "three", "eight", config=quick, progress=False)
        assert denoiser_of(other) == ("unet", pipeline.unet)


def test_an_ip_adapter_is_to_be_unloaded_first(pipeline: StableDiffusionPipeline) -> None:
    width, projection = TEXT_WIDTH, {}
    for index, (name, processor) in enumerate(pipeline.unet.attn_processors.items()):
        if name.endswith("attn2.processor") and processor is not None:
            out = pipeline.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            projection[f"{index}.to_k_ip.weight"] = torch.randn(out, width)
            projection[f"{index}.to_v_ip.weight"] = torch.randn(out, width)
    image = {"proj.weight": torch.randn(4 * width, 8), "proj.bias": torch.randn(4 * width)}
    image |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    before = backbone_for(pipeline).generate(["a cat"], [0], steps=1)
    pipeline.unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": projection}])
    with pytest.raises(FadeError, match=r"call pipeline.unload_ip_adapter\(\)"):
        backbone_for(pipeline)
    pipeline.unload_ip_adapter()
    assert torch.equal(backbone_for(pipeline).generate(["a cat"], [0], steps=1), before)


# The denoiser out of its wrappers


def test_the_denoiser_is_seen_through_wrappers(pipeline: StableDiffusionPipeline) -> None:
    class Parallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *arguments: Any, **named: Any) -> Any:
            return self.module(*arguments, **named)

    unet = pipeline.unet
    for wrapped in (
        unet,
        torch.compile(unet),
        Parallel(unet),
        Parallel(torch.compile(unet)),
        torch.compile(Parallel(unet)),
        torch.optim.swa_utils.AveragedModel(unet).eval(),
        get_peft_model(unet, LoraConfig(target_modules=["to_q"])),
    ):
        inside = wrapped.module if isinstance(wrapped, torch.optim.swa_utils.AveragedModel) else unet
        assert denoiser_of(wrapped) == ("unet", inside)
        pipeline.unet = wrapped
        assert denoiser_of(pipeline) == ("unet", inside) and backbone_for(pipeline).denoiser is inside
    module = nn.Sequential(nn.Linear(2, 2))
    assert denoiser_of(module)[1] is module
    for nothing in (object(), None, diffusers.DiffusionPipeline()):
        with pytest.raises(FadeError, match="has no denoiser: neither unet nor transformer"):
            denoiser_of(nothing)


def test_predictions_go_through_the_wrapper(pipeline: StableDiffusionPipeline) -> None:
    calls = []

    class Counting(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *arguments: Any, **named: Any) -> Any:
            calls.append(1)
            return self.module(*arguments, **named)

    pipeline.unet = Counting(pipeline.unet)
    backbone = backbone_for(pipeline)
    backbone.predict(torch.randn(1, 4, 8, 8), torch.tensor([3]), backbone.encode_prompts(["a cat"]))
    assert calls == [1]


# VAEs


def vae_of(kind: str) -> nn.Module:
    """A tiny VAE with random weights; 4 latent channels, 4 pixels to a latent."""
    down, up = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    kl = {"down_block_types": down, "up_block_types": up, "block_out_channels": (8, 8, 8), "norm_num_groups": 4}
    if kind == "tiny":
        sides = ("encoder", "decoder")
        blocks = {f"{side}_block_out_channels": (8, 8, 8) for side in sides}
        return AutoencoderTiny(**blocks, **{f"num_{side}_blocks": (1, 1, 1) for side in sides})
    if kind == "asymmetric":
        return AsymmetricAutoencoderKL(
            down_block_types=down, up_block_types=up, norm_num_groups=4,
            down_block_out_channels=(8, 8, 8), up_block_out_channels=(8, 8, 8),
        )  # fmt: skip
    if kind == "consistency decoder":
        return ConsistencyDecoderVAE(
            encoder_down_block_types=down, encoder_block_out_channels=(8, 8, 8), encoder_norm_num_groups=4,
            decoder_block_out_channels=(32,) * 4, decoder_norm_num_groups=4, decoder_layers_per_block=1,
        )  # fmt: skip
    if kind == "vq":
        return VQModel(**kl, latent_channels=4)
    options = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.3}
    return AutoencoderKL(**kl, latent_channels=4, **(options if kind == "kl without quantisation" else {}))


VAES = ("kl", "kl without quantisation", "tiny", "asymmetric", "consistency decoder", "vq")


@pytest.mark.parametrize("kind", VAES)
def test_latents_of_every_vae_are_those_that_the_pipelines_use(pipeline: StableDiffusionPipeline, kind: str) -> None:
    vae = vae_of(kind).eval()
    pipeline = StableDiffusionPipeline(**{**pipeline.components, "vae": vae}, requires_safety_checker=False)
    backbone = backbone_for(pipeline)
    side = 8 * pipeline.vae_scale_factor
    pixels = torch.rand(3, 3, side, side)
    images = [Image.fromarray(image.permute(1, 2, 0).mul(255).byte().numpy()) for image in pixels]
    latents = backbone.encode_images(images, side, torch.Generator().manual_seed(5))
    assert latents.shape == (3, 4, 8, 8)
    with torch.no_grad():
        encoded = vae.encode(pipeline.image_processor.preprocess(images))
        if hasattr(encoded, "latents"):
            wanted = encoded.latents
        else:
            noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
            wanted = encoded.latent_dist.mean + encoded.latent_dist.std * noise
        torch.testing.assert_close(latents, wanted * vae.config.scaling_factor)
        drawn = backbone.decode(latents)
        assert drawn.shape == pixels.shape and torch.isfinite(drawn).all()
        # An image does not depend on those it is decoded with, nor on a global random state.
        torch.testing.assert_close(backbone.decode(latents[1:2]), drawn[1:2], rtol=1e-4, atol=1e-4)
        if kind not in ("consistency decoder", "vq"):
            theirs = pipeline(
                "a cat", height=side, width=side, num_inference_steps=2, output_type="pt",
                generator=torch.Generator().manual_seed(3), guidance_scale=3.0,
            ).images  # fmt: skip
            ours = backbone.decode(backbone.sample_latents(["a cat"], [3], steps=2, resolution=side))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_each_tensor_of_the_vae_gets_its_dtype_back(pipeline: StableDiffusionPipeline) -> None:
    pipeline.vae.to(torch.bfloat16).decoder.float()
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in pipeline.vae.state_dict().items()}
    backbone_for(pipeline).decode(torch.randn(1, 4, 8, 8))
    for name, tensor in pipeline.vae.state_dict().items():
        assert tensor.dtype == before[name][0] and torch.equal(tensor, before[name][1])


# Parts that hooks move or cast


def offloaded(pipeline: StableDiffusionPipeline, how: str) -> None:
    cpu, parts = torch.device("cpu"), (pipeline.text_encoder, pipeline.unet, pipeline.vae)
    if how == "sequential":
        for part in parts[1:]:
            cpu_offload(part, cpu)
    elif how == "model":
        hook = None
        for part in parts:
            _, hook = cpu_offload_with_hook(part, cpu, prev_module_hook=hook)
    elif how in ("leaf_level", "block_level"):
        for part in parts[1:]:
            apply_group_offloading(part, cpu, cpu, offload_type=how, num_blocks_per_group=1)
    else:
        pipeline.vae.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


@pytest.mark.parametrize("how", ["sequential", "model", "leaf_level", "block_level", "layerwise"])
def test_offloaded_and_cast_parts(pipeline: StableDiffusionPipeline, how: str) -> None:
    images = [Image.effect_noise((32, 32), 80).convert("RGB")]

    def walk() -> list[torch.Tensor]:
        backbone = backbone_for(pipeline)
        assert backbone.device == torch.device("cpu") and backbone.dtype == torch.float32
        latents = backbone.encode_images(images, None, torch.Generator().manual_seed(0))
        return [latents, backbone.decode(latents), backbone.generate(["a cat"], [1], steps=2)]

    pipeline.vae.to(torch.float16).to(torch.float32)  # so that layerwise casting loses nothing
    wanted = walk()
    offloaded(pipeline, how)
    before = [(tensor.dtype, tensor.device) for tensor in pipeline.vae.parameters()]
    with backbone_for(pipeline).only_denoiser_on_device():
        assert [(tensor.dtype, tensor.device) for tensor in pipeline.vae.parameters()] == before
    for found, expected in zip(walk(), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [(tensor.dtype, tensor.device) for tensor in pipeline.vae.parameters()] == before


def test_each_part_returns_to_its_own_device(pipeline: StableDiffusionPipeline) -> None:
    """The meta device stands in for a GPU: what would be moved from it raises, so nothing may be lost on the way."""

    class Elsewhere(nn.Module):
        def __init__(self, device: str) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, device=device))
            self.went: list[str] = []

        def to(self, device: Any) -> "Elsewhere":
            self.went.append(str(device))
            return self

    backbone = backbone_for(pipeline)
    pipeline.text_encoder, pipeline.vae = Elsewhere("meta"), Elsewhere("cpu")
    pipeline.safety_checker = Elsewhere("meta")

    def failing() -> None:
        with backbone.only_denoiser_on_device():
            assert pipeline.text_encoder.went == pipeline.safety_checker.went == ["cpu"]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        failing()
    assert pipeline.text_encoder.went == pipeline.safety_checker.went == ["cpu", "meta"]
    assert pipeline.vae.went == []


# Parts that are missing, settings that are odd


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler", "unet"])
def test_a_missing_part_is_named(pipeline: StableDiffusionPipeline, part: str) -> None:
    setattr(pipeline, part, None)
    with pytest.raises(FadeError, match=part.replace("_", ".")):
        backbone_for(pipeline).generate(["a cat"], [0], steps=1)


@pytest.mark.parametrize(("size", "resolution"), [(8, 32), ((8, 8), 32), ([12, 8], 32), (None, None)])
def test_resolution(pipeline: StableDiffusionPipeline, size: Any, resolution: int | None) -> None:
    pipeline.unet.register_to_config(sample_size=size)
    backbone = backbone_for(pipeline)
    if resolution is None:
        with pytest.raises(FadeError, match="has no sample_size.*data.resolution"):
            _ = backbone.resolution
    else:
        assert backbone.resolution == resolution
    assert backbone.sample_latents(["a cat"], [0], steps=1, resolution=64).shape == (1, 4, 16, 16)


def test_textual_inversion_tokens_of_several_vectors_reach_the_embeddings(pipeline: StableDiffusionPipeline) -> None:
    backbone = backbone_for(pipeline)
    before = backbone.encode_prompts(["a <cat> here", "a dog"])["prompt_embeds"]
    pipeline.load_textual_inversion({"<cat>": torch.randn(3, TEXT_WIDTH)}, token="<cat>")
    after = backbone.encode_prompts(["a <cat> here", "a dog"])["prompt_embeds"]
    expanded = pipeline.maybe_convert_prompt("a <cat> here", pipeline.tokenizer)
    assert expanded == "a <cat> <cat>_1 <cat>_2 here"
    tokens = pipeline.tokenizer(expanded, padding="max_length", return_tensors="pt", max_length=after.shape[1])
    with torch.no_grad():
        wanted = pipeline.text_encoder(tokens.input_ids)[0]
    torch.testing.assert_close(after[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before[0], after[0], atol=1e-2)
    torch.testing.assert_close(before[1], after[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_dtype_changes_nothing(pipeline: StableDiffusionPipeline, dtype: torch.dtype) -> None:
    image = [Image.effect_noise((32, 32), 80).convert("RGB")]

    def walk() -> list[torch.Tensor]:
        backbone = backbone_for(pipeline)
        latents = backbone.encode_images(image, None, torch.Generator().manual_seed(0))
        noised = backbone.add_noise(latents, torch.ones_like(latents), torch.tensor([3]))
        return [latents, noised, backbone.decode(latents), backbone.generate(["a cat"], [1], steps=2)]

    wanted = walk()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = walk()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))


def test_a_default_device_changes_nothing(pipeline: StableDiffusionPipeline) -> None:
    """Under the meta device every tensor made without saying where would be lost."""
    images = [Image.effect_noise((32, 32), 80).convert("RGB")]
    noise, timesteps, generator = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.Generator().manual_seed(0)
    embeddings = backbone_for(pipeline).encode_prompts(["a cat"])
    with torch.device("meta"):
        backbone = backbone_for(pipeline)
        latents = backbone.encode_images(images, None, generator)
        noised = backbone.add_noise(latents, noise, timesteps)
        results = [backbone.target(latents, noise, timesteps), backbone.decode(latents)]
    results.append(backbone.predict(noised, timesteps, embeddings))
    assert all(torch.isfinite(result).all() for result in results)
