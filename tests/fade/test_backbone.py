"""The backbone: noise-prediction and velocity-prediction models, any scheduler, seeds that fix each image alone."""

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from fade.backbones import backbone_for
from fade.digitcanvas.models import build_scheduler
from fade.errors import FadeError

from .conftest import tiny_pipeline


def test_an_unknown_pipeline_names_those_supported() -> None:
    class OtherPipeline:
        pass

    with pytest.raises(FadeError, match="OtherPipeline is not supported; supported pipelines: StableDiffusionPipeline"):
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
        wanted = velocity_pipeline.unet(noised, timesteps, embeddings).sample
        assert F.mse_loss(backbone.predict(noised, timesteps, embeddings), wanted) == 0
