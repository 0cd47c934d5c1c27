"""Chroma."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones.families.descriptor import JOINT_PROJECTIONS, Family, Reader
from fade.backbones.families.shared import (
    call_with_negative,
    default_side,
    encode_as_called,
    masked_shapes,
    named,
    prompt_states,
    unpacked,
    unpacked_result,
)
from fade.backbones.flow import grid_ids, pack, rounded
from fade.conditioning import Conditioning, Rows

if TYPE_CHECKING:
    from fade.backbones.base import Backbone


def encode(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    embeddings, _, mask, *_ = encode_as_called(pipeline, prompts, device)
    return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}


def forward(backbone: Backbone, noised: Tensor, times: Tensor, conditioning: Conditioning) -> dict[str, Any]:
    height, width = noised.shape[2] // 2, noised.shape[3] // 2
    mask = conditioning["prompt_attention_mask"]
    return {
        "hidden_states": pack(noised),
        "timestep": rounded(noised, times),
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "txt_ids": torch.zeros(mask.shape[1], 3, device=noised.device, dtype=noised.dtype),
        "img_ids": grid_ids(height, width, noised.device, noised.dtype),
        # A number as the pipeline's, which attention adds to its scores instead of masking (diffusers issue 12116):
        # people draw with this model, not with the one that was meant.
        "attention_mask": torch.cat([mask, mask.new_ones(len(noised), height * width)], dim=1),
    }


CHROMA = Family(
    name="Chroma",
    kind="flow",
    pipeline="ChromaPipeline",
    denoiser="ChromaTransformer2DModel",
    parts=("scheduler", "vae", "text_encoder", "tokenizer", "transformer"),
    since="0.34",
    encode=encode,
    prompt_shapes=lambda backbone: masked_shapes(512, backbone.denoiser.config.joint_attention_dim),
    number_masks=True,
    call=call_with_negative,
    forward=forward,
    output=unpacked,
    unpack_result=unpacked_result,
    guidance=5.0,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor,
    resolution=default_side,
    targets=JOINT_PROJECTIONS,
    readers={"prompt": Reader(named("context_embedder"), prompt_states)},
    checkpointing=False,  # its single blocks are not given the mask then
)
