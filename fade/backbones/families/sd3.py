"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fade.backbones.families.descriptor import JOINT_PROJECTIONS, Family, Reader, Segment
from fade.backbones.families.shared import (
    call_with_negative,
    clip_length,
    latent_side,
    named,
    pooled_states,
    prompt_states,
)
from fade.conditioning import Rows

if TYPE_CHECKING:
    from fade.backbones.base import Backbone


def encode(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        prompt=prompts, prompt_2=None, prompt_3=None, device=device, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}


def targets(backbone: Backbone) -> tuple[str, ...]:
    """The last block drops what becomes of the text, and with it what the text asks for."""
    others = tuple(name for name in JOINT_PROJECTIONS if name != "add_q_proj")
    blocks = range(backbone.denoiser.config.num_layers - 1)
    return (*others, *(f"transformer_blocks.{block}.attn.add_q_proj" for block in blocks))


SD3 = Family(
    name="Stable Diffusion 3/3.5",
    kind="flow",
    pipeline="StableDiffusion3Pipeline",
    denoiser="SD3Transformer2DModel",
    parts=(
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
        "transformer",
        "scheduler",
    ),
    since="0.29",
    encoders=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    encode=encode,
    prompt_shapes=lambda backbone: {
        "prompt_embeds": (clip_length(backbone) + 256, backbone.denoiser.config.joint_attention_dim),
        "pooled_prompt_embeds": (backbone.denoiser.config.pooled_projection_dim,),
    },
    call=call_with_negative,
    forward=lambda backbone, noised, times, conditioning: {
        "hidden_states": noised,
        "timestep": 1000 * times,
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "pooled_projections": conditioning["pooled_prompt_embeds"],
    },
    guidance=7.0,
    multiple=lambda backbone: backbone.pipeline.vae_scale_factor * backbone.denoiser.config.patch_size,
    largest=lambda backbone: SD3.multiple(backbone) * backbone.denoiser.config.pos_embed_max_size,
    resolution=latent_side,
    targets=targets,
    readers={
        "prompt": Reader(named("context_embedder"), prompt_states, (Segment("tokenizer", 77), Segment("tokenizer_3"))),
        "pooled": Reader(named("time_text_embed.text_embedder.linear_1"), pooled_states, ()),
    },
)
