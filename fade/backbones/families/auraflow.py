"""AuraFlow."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones.families.descriptor import JOINT_PROJECTIONS, Family, Reader
from fade.backbones.families.shared import call_with_negative, encode_as_called, named, prompt_states
from fade.conditioning import Conditioning, Rows

if TYPE_CHECKING:
    from fade.backbones.base import Backbone


def encode(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    return {"prompt_embeds": encode_as_called(pipeline, prompts, device)[0]}


def call(backbone: Backbone, conditioning: Conditioning, negative: Conditioning, guidance: float) -> dict[str, Any]:
    """With masks, which the pipeline asks for and has no use for: what they mask is zero in the embeddings."""
    arguments = call_with_negative(backbone, conditioning, negative, guidance)
    masks = {
        name.replace("embeds", "attention_mask"): torch.ones(value.shape[:2], device=value.device)
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    }
    return arguments | masks


def largest(backbone: Backbone) -> int:
    """What its square table of positions has places for."""
    config = backbone.denoiser.config
    return math.isqrt(config.pos_embed_max_size) * config.patch_size * backbone.pipeline.vae_scale_factor


AURAFLOW = Family(
    name="AuraFlow",
    kind="flow",
    pipeline="AuraFlowPipeline",
    denoiser="AuraFlowTransformer2DModel",
    parts=("tokenizer", "text_encoder", "vae", "transformer", "scheduler"),
    since="0.30",
    encode=encode,
    prompt_shapes=lambda backbone: {"prompt_embeds": (256, backbone.denoiser.config.joint_attention_dim)},
    call=call,
    forward=lambda backbone, noised, times, conditioning: {
        "hidden_states": noised,
        "timestep": times.to(noised.device, noised.dtype),
        "encoder_hidden_states": conditioning["prompt_embeds"],
    },
    guidance=3.5,
    multiple=lambda backbone: backbone.pipeline.vae_scale_factor * backbone.denoiser.config.patch_size,
    largest=largest,
    resolution=lambda backbone: min(1024, largest(backbone)),
    targets=JOINT_PROJECTIONS,
    readers={"prompt": Reader(named("context_embedder"), prompt_states)},
)
