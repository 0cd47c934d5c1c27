"""Lumina 2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones.families.descriptor import Family, Reader, Segment
from fade.backbones.families.shared import (
    call_with_negative,
    default_side,
    encode_as_called,
    encode_masked,
    masked_shapes,
    named,
)
from fade.conditioning import Conditioning, Rows

if TYPE_CHECKING:
    from fade.backbones.base import Backbone


def encode_negative(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    """As negatives, which the pipeline gives no system prompt."""
    _, _, embeddings, mask = encode_as_called(
        pipeline, prompts, device, negative_prompt=prompts, do_classifier_free_guidance=True
    )
    return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}


def states(backbone: Backbone, conditioning: Conditioning) -> Tensor:
    return backbone.denoiser.time_caption_embed.caption_embedder[0](conditioning["prompt_embeds"])


LUMINA2 = Family(
    name="Lumina 2",
    kind="flow",
    pipeline="Lumina2Pipeline",
    denoiser="Lumina2Transformer2DModel",
    parts=("transformer", "scheduler", "vae", "text_encoder", "tokenizer"),
    since="0.33",
    encode=encode_masked,
    prompt_shapes=lambda backbone: masked_shapes(256, backbone.denoiser.config.cap_feat_dim),
    reads_lengths=True,
    call=call_with_negative,
    forward=lambda backbone, noised, times, conditioning: {
        "hidden_states": noised,
        "timestep": 1 - times.to(noised.device),
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "encoder_attention_mask": conditioning["prompt_attention_mask"],
    },
    output=lambda backbone, output, noised: -output[0],
    negative=lambda backbone: backbone.encoded(encode_negative, [""]),
    guidance=4.0,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor,
    resolution=default_side,
    readers={
        "prompt": Reader(
            named("time_caption_embed.caption_embedder.1"),
            states,
            (Segment("tokenizer", text=lambda pipeline, prompt: f"{pipeline.system_prompt} <Prompt Start> {prompt}"),),
            mask="prompt_attention_mask",
        )
    },
)
