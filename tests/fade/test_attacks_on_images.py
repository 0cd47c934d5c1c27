"""Attacks on the image side: levels and steps against their formulas, for DDPM and for flow matching."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer

from fade.adapter import Adapter
from fade.backbones import Backbone, backbone_for
from fade.evaluation.attacks import Subject
from fade.evaluation.attacks.image_to_image import ImageToImage
from fade.evaluation.attacks.inpainting import Inpainting
from fade.evaluation.attacks.noise_probe import NoiseProbe, ancestral
from fade.evaluation.attacks.null_text_inversion import NullTextInversion
from fade.evaluation.attacks.trajectory import Level, ask, deterministic, levels, start_noise, walk

from .backbones.pipelines import build
from .test_attacks import PREDICTIONS, adapter_on, predicting, subject_of


@pytest.fixture
def adapter(pipeline: StableDiffusionPipeline) -> Adapter:
    return adapter_on(pipeline)


def alone(backbone: Backbone, guidance_scale: float = 1.0) -> Subject:
    """A pipeline without an adapter."""
    return Subject(
        backbone, None, ("a cat", "a dog"), (5, 6), lambda images: images, steps=5, guidance_scale=guidance_scale,
        batch_size=1,
    )  # type: ignore[arg-type]  # fmt: skip


def all_kinds(tokenizer: CLIPTokenizer) -> list[Backbone]:
    families = ("FLUX.1", "Sana", "AuraFlow")
    return [backbone_for(predicting(tokenizer, kind)) for kind in PREDICTIONS] + [
        backbone_for(build(name)) for name in families
    ]


def test_a_perfect_answer_gives_picture_and_noise_back(tokenizer: CLIPTokenizer) -> None:
    for backbone in all_kinds(tokenizer):
        clean = torch.randn(2, 4, 8, 8)
        noise = torch.randn(clean.shape)
        path = levels(backbone, 6, clean.shape)
        assert len(path) == 7
        assert [one.noise for one in path] == sorted((one.noise for one in path), reverse=True)
        for one in path[1:-1]:
            at = one.time.expand(2)
            torch.testing.assert_close(
                one.noised(clean, noise), backbone.add_noise(clean, noise, at), rtol=1e-4, atol=1e-4
            )
            z, e = one.estimates(one.noised(clean, noise), backbone.target(clean, noise, at))
            torch.testing.assert_close(z, clean, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(e, noise, rtol=1e-3, atol=1e-3)
            keep, lead = one.step_to(path[-1])
            torch.testing.assert_close(
                keep * one.noised(clean, noise) + lead * backbone.target(clean, noise, at),
                path[-1].noised(clean, noise), rtol=1e-3, atol=1e-3,
            )  # fmt: skip


@pytest.mark.parametrize("name", [*PREDICTIONS, "FLUX.1", "Sana"])
def test_a_deterministic_walk_is_the_backbones_own(tokenizer: CLIPTokenizer, name: str) -> None:
    backbone = backbone_for(predicting(tokenizer, name) if name in PREDICTIONS else build(name))
    subject = alone(backbone)
    noise = torch.randn_like(subject.sample(subject.prompts, subject.seeds, "").float())
    prompts = backbone.encode_prompts(list(subject.prompts))
    found = walk(subject, noise, prompts, lambda rows: deterministic, 5)
    torch.testing.assert_close(found, backbone.ode(noise, prompts, 5, batch_size=1), rtol=1e-2, atol=1e-2)


def test_a_guided_walk_is_the_pipelines_own(pipeline: StableDiffusionPipeline) -> None:
    subject = alone(backbone_for(pipeline), guidance_scale=4.0)
    wanted = subject.sample(subject.prompts, subject.seeds, "")
    noise = start_noise(subject, wanted)
    prompts = subject.backbone.encode_prompts(list(subject.prompts))
    found = walk(subject, noise, prompts, lambda rows: deterministic, 5)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["Qwen-Image", "Z-Image", "HiDream-I1"])
def test_a_guided_walk_asks_with_and_without_the_prompt_whatever_their_lengths(name: str) -> None:
    backbone = backbone_for(build(name))
    subject = alone(backbone, guidance_scale=4.0)
    prompts, without = backbone.encode_prompts(["a cat", "a very long dog with a hat"]), backbone.negative()
    noise = torch.randn_like(subject.sample(subject.prompts, subject.seeds, "").float())
    now, then = levels(backbone, 1, noise.shape)
    with torch.no_grad():
        with_it, without_it = (ask(backbone, noise, now, one) for one in (prompts, without.repeat(2)))
    z, e = now.estimates(noise, without_it + 4.0 * (with_it - without_it))
    subject.batch_size = 2
    found = walk(subject, noise, prompts, lambda rows: deterministic, 1)
    torch.testing.assert_close(found, then.noised(z, e), rtol=1e-3, atol=1e-3)


# --- noise probe -----------------------------------------------------------------------------------------------------


def test_an_ancestral_step_is_ddpms(pipeline: StableDiffusionPipeline) -> None:
    backbone = backbone_for(pipeline)
    path = levels(backbone, 8, torch.Size((1, 4, 8, 8)))
    alphas = pipeline.scheduler.alphas_cumprod.double()
    z, e, new = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    for now, then in itertools.pairwise(path):
        high, low = alphas[now.time.item()], alphas[then.time.item()]
        beta = 1 - high / low
        noised = high.sqrt() * z + (1 - high).sqrt() * e
        mean = low.sqrt() * beta / (1 - high) * z + (high / low).sqrt() * (1 - low) / (1 - high) * noised
        variance = (1 - low) / (1 - high) * beta
        for eta in (0.0, 1.0, 1.7):
            wanted = mean + eta * variance.sqrt() * new
            torch.testing.assert_close(ancestral(z, e, new, now, then, eta), wanted, rtol=1e-3, atol=1e-4)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() == [one.time.item() for one in path[:-1]]


def test_an_ancestral_step_keeps_what_noise_there_is() -> None:
    """Of flow matching as of DDPM: a z + s ε with fresh and old noise has the variance of the level."""
    now, then = Level(torch.zeros(1), 0.3, 0.7, -1, 1), Level(torch.zeros(1), 0.55, 0.45, -1, 1)
    z, e, new = torch.zeros(1, 1, 400, 400), torch.randn(1, 1, 400, 400), torch.randn(1, 1, 400, 400)
    drawn = ancestral(z, e, new, now, then, 1.0)
    assert drawn.std().item() == pytest.approx(0.45, rel=0.02)
    assert ancestral(z, e, new, now, then, 1.8).std() > 0.5
    end = Level(torch.zeros(1), 1.0, 0.0, -1, 1)
    torch.testing.assert_close(ancestral(z + 2, e, new, now, end, 1.8), z + 2)


def test_pictures_of_the_noise_probe_do_not_depend_on_the_batch(adapter: Adapter) -> None:
    probe = NoiseProbe(1.5)
    subject = subject_of(adapter)
    together = probe(subject).images
    subject.batch_size = 2
    torch.testing.assert_close(probe(subject).images, together, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(NoiseProbe(1.0)(subject).images, together, atol=1e-2)


# --- image to image, inpainting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_image_to_image_draws_the_rest_of_the_way_from_the_noised_picture(adapter: Adapter, strength: float) -> None:
    pipeline, subject = adapter.pipeline, subject_of(adapter)
    found = ImageToImage(strength)(subject)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(4)
    left = scheduler.timesteps[round(4 - 4 * strength) :]
    text, empty = (subject.backbone.encode_prompts(p)["prompt_embeds"] for p in (subject.prompts, [""] * 3))
    noise = torch.cat(
        [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in subject.seeds]
    )
    start = left[0] if len(left) else torch.tensor(0)
    latents = scheduler.add_noise(subject.concept_latents, noise, start.expand(3))
    with torch.no_grad():
        for timestep in left:
            without, prompted = (pipeline.unet(latents, timestep, c).sample for c in (empty, text))
            latents = scheduler.step(without + 3.0 * (prompted - without), timestep, latents).prev_sample
    torch.testing.assert_close(found.images, subject.decode(latents), rtol=1e-3, atol=1e-3)
    assert found.numbers == {"base_recognised": 3}
    assert adapter.enabled


@pytest.mark.parametrize("hidden", ["lower", "right"])
def test_the_known_half_is_put_back_and_the_hidden_one_is_drawn(adapter: Adapter, hidden: str) -> None:
    one, subject = Inpainting(hidden), subject_of(adapter)
    kept: list[torch.Tensor] = []
    subject.backbone.decode = lambda latents, size: kept.append(latents) or torch.zeros(len(latents), 3, 32, 32)
    one(subject)
    base, drawn = kept
    pictures, noise = subject.concept_latents, start_noise(subject, subject.concept_latents)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[slice(4, 8) if hidden == "lower" else slice(None), slice(None) if hidden == "lower" else slice(4, 8)] = True
    alpha = adapter.pipeline.scheduler.alphas_cumprod[0]
    known = alpha.sqrt() * pictures + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(drawn[..., ~mask], known[..., ~mask], rtol=1e-4, atol=1e-4)
    assert (drawn[..., mask] - pictures[..., mask]).abs().mean() > 0.1
    assert (drawn - base).abs()[..., mask].mean() > 1e-3


# --- null-text inversion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PREDICTIONS, "FLUX.1"])
def test_one_iteration_is_the_plain_inversion(tokenizer: CLIPTokenizer, name: str) -> None:
    backbone = backbone_for(predicting(tokenizer, name) if name in PREDICTIONS else build(name))
    subject = alone(backbone)
    pictures = subject.sample(subject.prompts, subject.seeds, "")
    wanted = backbone.ode(pictures, subject.empty_prompt, 6, invert=True, batch_size=1)
    found = NullTextInversion(6).inverted(subject, pictures)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_the_fixed_point_leads_back_to_the_picture(pipeline: StableDiffusionPipeline) -> None:
    subject = alone(backbone_for(pipeline))
    pictures = subject.sample(subject.prompts, subject.seeds, "").float()

    def away(iterations: int) -> float:
        noise = NullTextInversion(5, iterations).inverted(subject, pictures)
        drawn = subject.backbone.ode(noise, subject.empty_prompt, 5, batch_size=1)
        return (drawn - pictures).square().mean().sqrt().item()

    assert away(8) < 0.2 * away(1)
