"""Adapters with random masks and random factors, for tests that need one without training it."""

import torch
from diffusers import StableDiffusionPipeline

import fade
from fade.adapter import Adapter, attach, new_metadata
from fade.base_model import base_name, fingerprint, target_layers
from fade.concept import concept_from_words
from fade.config import Config
from fade_kernels import BitMask

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv_shortcut")


def random_adapter(
    pipeline: StableDiffusionPipeline,
    name: str = "fade",
    density: float = 0.1,
    values: bool = False,
    targets: tuple[str, ...] = ATTENTION,
    seed: int = 0,
    strength: float = 1.0,
    pinned: bool = True,
) -> Adapter:
    """Attached and switched on beside whatever is on."""
    generator = torch.Generator().manual_seed(seed)
    layers = target_layers(pipeline.unet, targets)
    masks = {
        layer: BitMask.pack(torch.rand(m.weight.flatten(1).shape, generator=generator) < density)
        for layer, m in layers.items()
    }
    scale = 1.0 if values else 2.0
    metadata = new_metadata(
        concept_from_words("cat", "dog"), Config(), base_name(pipeline), fingerprint(pipeline.unet), scale
    )
    adapter = attach(
        pipeline,
        name,
        masks,
        rank=3,
        alpha=scale if values else 3 * scale,
        values=values,
        metadata=metadata,
        pinned=pinned,
    )
    for parameter in adapter.parameters():
        parameter.data = strength * torch.randn(parameter.shape, generator=generator).to(parameter)
    return adapter.enable()


def on(pipeline: StableDiffusionPipeline) -> list[str]:
    """Names of the adapters that act in every layer that they have."""
    return [row.name for row in fade.status(pipeline) if row.state == "on"]
