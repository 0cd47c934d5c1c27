"""CogView4."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones.families.descriptor import Family, Reader, Segment
from fade.backbones.families.shared import USUAL_LENGTH, latent_side, named, prompt_states, stacked
from fade.conditioning import Conditioning, Rows

if TYPE_CHECKING:
    from fade.backbones.base import Backbone


def encode(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    embeddings, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=device)
    return {"prompt_embeds": embeddings}


def forward(backbone: Backbone, noised: Tensor, times: Tensor, conditioning: Conditioning) -> dict[str, Any]:
    sides = (size * backbone.pipeline.vae_scale_factor for size in noised.shape[2:])
    size = torch.tensor([*sides]).to(conditioning["prompt_embeds"]).expand(len(noised), -1)
    steps = backbone.pipeline.scheduler.config.num_train_timesteps
    return {
        "hidden_states": noised,
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "timestep": steps * times.to(noised.device),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
    }


def shift(backbone: Backbone, tokens: int) -> float:
    """As the pipeline has it: linear in the root of the tokens."""
    config = backbone.pipeline.scheduler.config
    root = (tokens / config.get("base_image_seq_len", 256)) ** 0.5
    return config.get("base_shift", 0.25) + config.get("max_shift", 0.75) * root


COGVIEW4 = Family(
    name="CogView4",
    kind="flow",
    pipeline="CogView4Pipeline",
    denoiser="CogView4Transformer2DModel",
    parts=("tokenizer", "text_encoder", "vae", "transformer", "scheduler"),
    since="0.33",
    encode=encode,
    prompt_shapes=lambda backbone: {"prompt_embeds": (USUAL_LENGTH, backbone.denoiser.config.text_embed_dim)},
    own_lengths=True,
    call=lambda backbone, conditioning, negative, guidance: {
        "prompt_embeds": stacked(conditioning["prompt_embeds"]),
        "negative_prompt_embeds": stacked(negative["prompt_embeds"]),
        "guidance_scale": guidance,
    },
    forward=forward,
    unpack_result=lambda backbone, latents, side: latents.to(backbone.dtype),
    guidance=5.0,
    shift=shift,
    told_share=True,
    # What the pipeline refuses, and what the denoiser's patches take.
    multiple=lambda backbone: math.lcm(16, backbone.pipeline.vae_scale_factor * backbone.denoiser.config.patch_size),
    resolution=latent_side,
    readers={
        "prompt": Reader(
            named("patch_embed.text_proj"), prompt_states, (Segment("tokenizer", padded_before=lambda pipeline: 16),)
        ),
    },
    one_by_one=True,
)
