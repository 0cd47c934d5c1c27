"""A tiny random Stable Diffusion pipeline, so that the two stages are tested in seconds and without trained weights."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from fade.config import Config
from fade.digitcanvas.models import TEXT_WIDTH, build_scheduler, build_text_encoder, build_tokenizer, build_vae


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer sets that a command keeps are this test's own."""
    monkeypatch.setenv("FADE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def tiny_pipeline(tokenizer: CLIPTokenizer, seed: int = 0, scheduler: object | None = None) -> StableDiffusionPipeline:
    """Random weights that depend on the seed alone; latents 4x8x8, two levels with cross-attention."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    text_encoder: CLIPTextModel = build_text_encoder(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 24),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
    )
    pipeline = StableDiffusionPipeline(
        vae=build_vae(),
        text_encoder=text_encoder,
        tokenizer=copy.deepcopy(tokenizer),  # which textual inversion adds words to
        unet=unet,
        scheduler=scheduler or build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    torch.random.set_rng_state(state)
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.eval()
    return pipeline


@pytest.fixture
def pipeline(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    return tiny_pipeline(tokenizer)


@pytest.fixture
def velocity_pipeline(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """As Stable Diffusion 2.x: velocity prediction."""
    scheduler = DDIMScheduler.from_config(build_scheduler().config, prediction_type="v_prediction")
    return tiny_pipeline(tokenizer, scheduler=scheduler)


@pytest.fixture
def quick() -> Config:
    """Settings with which a whole run takes a second or two."""
    return Config().replace(
        data__forget_samples=6,
        data__retain_samples=7,
        data__sampling_steps=2,
        locate__batch_size=4,
        locate__keep=0.05,
        overwrite__steps=6,
        overwrite__batch_size=3,
        overwrite__retain_batch_size=2,
        overwrite__method="distillation",
        overwrite__checkpoint_every=2,
        overwrite__learning_rate=1e-2,
        overwrite__stop_forget=0.0,
    )


def denoise(pipeline: StableDiffusionPipeline, seed: int = 0) -> torch.Tensor:
    """One call of the denoiser on random input, to compare states of the pipeline."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, TEXT_WIDTH, generator=generator)
    unet = pipeline.unet
    with torch.no_grad():
        return unet(latents.to(unet.dtype), torch.tensor([10, 700]), text.to(unet.dtype)).sample


def weights(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """Copies of the base weights, by name."""
    from fade.base_model import base_parameters

    return {name: parameter.detach().clone() for name, parameter in base_parameters(pipeline.unet)}


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first
    )
