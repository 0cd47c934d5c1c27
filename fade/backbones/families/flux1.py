"""FLUX.1, EmojiCanvas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones.families.descriptor import JOINT_PROJECTIONS, Family, Reader, Segment
from fade.backbones.families.shared import named, pooled_states, prompt_states, unpacked, unpacked_result
from fade.backbones.flow import grid_ids, pack, rounded
from fade.conditioning import Conditioning, Rows

if TYPE_CHECKING:
    from fade.backbones.base import Backbone


def encode(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    length = {} if (most := text_length(pipeline)) is None else {"max_sequence_length": most}
    embeddings, pooled, _ = pipeline.encode_prompt(prompt=prompts, prompt_2=None, device=device, **length)
    return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}


def text_length(pipeline: Any) -> int | None:
    """Tokens that prompts are padded to, where the model was trained on fewer than its family: the text tokenizer's
    own limit, if that is lower than what the pipeline pads to."""
    limit = getattr(getattr(pipeline, "tokenizer_2", None), "model_max_length", None)
    return limit if limit is not None and limit < 512 else None


def forward(backbone: Backbone, noised: Tensor, times: Tensor, conditioning: Conditioning) -> dict[str, Any]:
    height, width = noised.shape[2] // 2, noised.shape[3] // 2
    embeddings = conditioning["prompt_embeds"]
    told = {}
    if backbone.denoiser.config.guidance_embeds:
        # What people draw with, for teacher and student alike: neither is asked for the data's velocity.
        told["guidance"] = torch.full((len(noised),), backbone.guidance, device=noised.device)
    return {
        "hidden_states": pack(noised),
        "timestep": rounded(noised, times),
        "encoder_hidden_states": embeddings,
        "pooled_projections": conditioning["pooled_prompt_embeds"],
        "txt_ids": torch.zeros(embeddings.shape[1], 3, device=noised.device, dtype=noised.dtype),
        "img_ids": grid_ids(height, width, noised.device, noised.dtype),
        **told,
    }


def call(backbone: Backbone, conditioning: Conditioning, negative: Conditioning, guidance: float) -> dict[str, Any]:
    """Of a model that is told its guidance, that; of another, classifier-free guidance where it is above 1."""
    arguments: dict[str, Any] = dict(conditioning)
    if (most := text_length(backbone.pipeline)) is not None:
        arguments["max_sequence_length"] = most
    if backbone.denoiser.config.guidance_embeds:
        return {**arguments, "guidance_scale": guidance}
    if guidance > 1:
        arguments |= {f"negative_{name}": value for name, value in negative.items()}
    return {**arguments, "true_cfg_scale": guidance}


FLUX1 = Family(
    name="FLUX.1",
    kind="flow",
    pipeline="FluxPipeline",
    denoiser="FluxTransformer2DModel",
    parts=("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer"),
    since="0.30",
    encoders=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    encode=encode,
    prompt_shapes=lambda backbone: {
        "prompt_embeds": (
            min(512, backbone.pipeline.tokenizer_2.model_max_length),
            backbone.denoiser.config.joint_attention_dim,
        ),
        "pooled_prompt_embeds": (backbone.denoiser.config.pooled_projection_dim,),
    },
    asked_twice=True,
    call=call,
    forward=forward,
    output=unpacked,
    unpack_result=unpacked_result,
    guidance=3.5,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor,
    resolution=lambda backbone: backbone.pipeline.vae.config.sample_size,
    targets=JOINT_PROJECTIONS,
    readers={
        "prompt": Reader(named("context_embedder"), prompt_states, (Segment("tokenizer_2"),)),
        "pooled": Reader(named("time_text_embed.text_embedder.linear_1"), pooled_states, ()),
    },
)
