"""Z-Image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones.families.descriptor import Family, Reader, Segment
from fade.backbones.families.shared import USUAL_LENGTH, named, stacked
from fade.conditioning import Conditioning, Rows

if TYPE_CHECKING:
    from fade.backbones.base import Backbone


def encode(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    embeddings, _ = pipeline.encode_prompt(list(prompts), device, do_classifier_free_guidance=False)
    return {"prompt_embeds": tuple(embeddings)}


def text(pipeline: Any, prompt: str) -> str:
    """What the pipeline tokenizes of a prompt."""
    message = [{"role": "user", "content": prompt}]
    return pipeline.tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )


def states(backbone: Backbone, conditioning: Conditioning) -> Tensor:
    """The prompt, normalised. Its linear layer reads each token alone, so that padding is no part of it."""
    return backbone.denoiser.cap_embedder[0](stacked(conditioning["prompt_embeds"]))


def guidance(backbone: Backbone) -> float:
    """None for Turbo, which was distilled from guided drawing; its scheduler's shift (3; the base model's is 6) is all
    that tells it apart."""
    return 5.0 if backbone.pipeline.scheduler.config.get("shift", 1.0) > 3 else 1.0


Z_IMAGE = Family(
    name="Z-Image",
    kind="flow",
    pipeline="ZImagePipeline",
    denoiser="ZImageTransformer2DModel",
    parts=("scheduler", "vae", "text_encoder", "tokenizer", "transformer"),
    since="0.36",
    encode=encode,
    # The pipeline adds guidance_scale times the difference to the answer for the prompt, and nothing at 0.
    prompt_shapes=lambda backbone: {"prompt_embeds": (USUAL_LENGTH, backbone.denoiser.config.cap_feat_dim)},
    own_lengths=True,
    call=lambda backbone, conditioning, negative, guidance: {
        "prompt_embeds": list(conditioning["prompt_embeds"]),
        "negative_prompt_embeds": list(negative["prompt_embeds"]),
        "guidance_scale": max(guidance - 1, 0.0),
    },
    forward=lambda backbone, noised, times, conditioning: {
        "x": list(noised[:, :, None]),
        "t": 1 - times.to(noised.device),
        "cap_feats": list(conditioning["prompt_embeds"]),
    },
    output=lambda backbone, output, noised: -torch.stack(output[0]).squeeze(2),
    unpack_result=lambda backbone, latents, side: latents.to(backbone.dtype),
    guidance=guidance,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor,
    resolution=lambda backbone: backbone.pipeline.vae.config.sample_size,
    readers={"prompt": Reader(named("cap_embedder.1"), states, (Segment("tokenizer", text=text),), padded=32)},
)
