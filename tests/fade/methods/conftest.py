"""A training that is about to begin, with an adapter that says something other than the frozen model."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from fade.adapter import attach
from fade.backbones import backbone_for
from fade.base_model import target_layers
from fade.concept import concept_from_words
from fade.conditioning import EncodedPrompts
from fade.config import Config
from fade.latents import Latents
from fade.methods import method
from fade.objective import Batch, Objective, Training
from fade_kernels import BitMask

CONCEPT = concept_from_words("cat", "dog", ["a {}", "one {}"], ["a house", "a tree", "a car"])


def training_of(pipeline: StableDiffusionPipeline, name: str, options: Any = None) -> Training:
    """Random latents and an adapter with random factors on the attention."""
    backbone, generator = backbone_for(pipeline), torch.Generator().manual_seed(torch.randint(1000, ()).item())
    pipeline.unet.requires_grad_(False)
    layers = target_layers(backbone.denoiser, backbone.targets)
    masks = {name: BitMask.full(tuple(layer.weight.shape)) for name, layer in layers.items()}
    metadata = {"scale": 1.0, "concept": CONCEPT.to_dict()}
    adapter = attach(pipeline, "fade", masks, rank=2, alpha=2.0, values=False, metadata=metadata)
    for parameter in adapter.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    adapter.enable()
    latents = Latents(
        torch.randn(4, 4, 8, 8, generator=generator), CONCEPT.forget_prompts * 2, CONCEPT.surrogate_prompts * 2,
        torch.randn(6, 4, 8, 8, generator=generator), CONCEPT.retain_prompts * 2,
    )  # fmt: skip
    texts = sorted({*latents.forget_prompts, *latents.surrogate_prompts, *latents.retain_prompts})
    prompts = EncodedPrompts(texts, backbone.encode_prompts(texts))
    config = Config.of(name)
    return Training(
        backbone, adapter, latents, prompts, config.overwrite, options or method(name).options(), config.seed
    )  # fmt: skip


def batch_of(training: Training, forget: int = 3, retain: int = 2) -> Batch:
    """The first latents of both halves, at random times."""
    latents, prompts = training.latents, training.prompts
    clean = torch.cat([latents.forget[:forget], latents.retain[:retain]])
    noise, times = torch.randn_like(clean), torch.randint(50, 900, (len(clean),))
    asked, answers = (
        prompts.rows([*first[:forget], *latents.retain_prompts[:retain]])
        for first in (latents.forget_prompts, latents.surrogate_prompts)
    )
    noised = training.backbone.add_noise(clean, noise, times)
    return Batch(clean, noise, noised, times, asked, answers, torch.arange(len(clean)) < forget)


Ask = Callable[..., torch.Tensor]


def asker(training: Training) -> Ask:
    """(noised, times, texts, frozen) -> the UNet's own answer, past everything that is tested."""
    pipeline = training.backbone.pipeline

    def ask(noised: torch.Tensor, times: torch.Tensor, texts: list[str], frozen: bool) -> torch.Tensor:
        ids = pipeline.tokenizer(
            texts, padding="max_length", max_length=pipeline.tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            states = pipeline.text_encoder(ids)[0]
            training.adapter.disable() if frozen else training.adapter.enable()
            answer = pipeline.unet(noised, times, states).sample
        training.adapter.enable()
        return answer

    return ask


def target_of(training: Training, batch: Batch, objective: type[Objective]) -> torch.Tensor:
    with torch.no_grad():
        return objective(training).target(batch)
