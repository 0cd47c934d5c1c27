"""What the text encoders of a family make of a prompt, as shapes: known from configurations alone, without a
tokenizer's files or a weight.

Apart from the descriptors because only planning asks, and no weights are there to ask instead. A test compares every
family's with what its encoders return.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from fade.backbones import flux2, hidream, kandinsky5
from fade.conditioning import Conditioning, Rows

if TYPE_CHECKING:
    from fade.backbones.base import Backbone

Shape = tuple[int, ...]

WORDS = 64
"""Tokens of a prompt that keeps its own length, with what the pipeline puts around it."""

MASKS = ("prompt_attention_mask",)
"""Tensors that say which tokens are words: integers, but of one family numbers, which its denoiser multiplies."""


def _clip_length(backbone: Backbone) -> int:
    return backbone.pipeline.tokenizer.model_max_length


def _flux(backbone: Backbone) -> dict[str, Shape]:
    config = backbone.denoiser.config
    length = min(512, backbone.pipeline.tokenizer_2.model_max_length)
    return {
        "prompt_embeds": (length, config.joint_attention_dim),
        "pooled_prompt_embeds": (config.pooled_projection_dim,),
    }


def _masked(length: int, width: int) -> dict[str, Shape]:
    return {"prompt_embeds": (length, width), "prompt_attention_mask": (length,)}


def _hidream(backbone: Backbone) -> dict[str, Shape]:
    config, length = backbone.denoiser.config, hidream.TEXT_LENGTH
    t5, llama = config.caption_channels
    return {
        "prompt_embeds_t5": (length, t5),
        "prompt_embeds_llama3": (1 + max(config.llama_layers), length, llama),
        "pooled_prompt_embeds": (config.text_emb_dim,),
    }


PROMPT_SHAPES: Mapping[str, Callable[[Backbone], dict[str, Shape]]] = {
    "Stable Diffusion 1.x/2.x": lambda backbone: {
        "prompt_embeds": (_clip_length(backbone), backbone.denoiser.config.cross_attention_dim)
    },
    "Stable Diffusion XL": lambda backbone: {
        "prompt_embeds": (_clip_length(backbone), backbone.denoiser.config.cross_attention_dim),
        "pooled_prompt_embeds": (
            backbone.denoiser.config.projection_class_embeddings_input_dim
            - 6 * backbone.denoiser.config.addition_time_embed_dim,
        ),
    },
    "PixArt-Sigma": lambda backbone: _masked(300, backbone.denoiser.config.caption_channels),
    "Stable Diffusion 3/3.5": lambda backbone: {
        "prompt_embeds": (_clip_length(backbone) + 256, backbone.denoiser.config.joint_attention_dim),
        "pooled_prompt_embeds": (backbone.denoiser.config.pooled_projection_dim,),
    },
    "FLUX.1": _flux,
    "Chroma": lambda backbone: _masked(512, backbone.denoiser.config.joint_attention_dim),
    "Qwen-Image": lambda backbone: {"prompt_embeds": (WORDS, backbone.denoiser.config.joint_attention_dim)},
    "Sana": lambda backbone: _masked(300, backbone.denoiser.config.caption_channels),
    "AuraFlow": lambda backbone: {"prompt_embeds": (256, backbone.denoiser.config.joint_attention_dim)},
    "Lumina 2": lambda backbone: _masked(256, backbone.denoiser.config.cap_feat_dim),
    "Z-Image": lambda backbone: {"prompt_embeds": (WORDS, backbone.denoiser.config.cap_feat_dim)},
    "CogView4": lambda backbone: {"prompt_embeds": (WORDS, backbone.denoiser.config.text_embed_dim)},
    "FLUX.2": lambda backbone: {
        "prompt_embeds": (flux2.TEXT_LENGTH, backbone.denoiser.config.joint_attention_dim)
    },
    "FLUX.2 klein": lambda backbone: {
        "prompt_embeds": (flux2.TEXT_LENGTH, backbone.denoiser.config.joint_attention_dim)
    },
    "HiDream-I1": _hidream,
    "Kandinsky 5": lambda backbone: {
        "prompt_embeds_qwen": (min(WORDS, kandinsky5.TEXT_LENGTH), backbone.denoiser.config.in_text_dim),
        "prompt_embeds_clip": (backbone.denoiser.config.in_text_dim2,),
    },
}  # fmt: skip
"""By family, each tensor of a conditioning without its first dimension, the prompt's."""

READS_LENGTHS = ("Lumina 2",)
NUMBERS_AS_MASKS = ("Chroma",)

ASKED_TWICE = ("Qwen-Image", "FLUX.1", "FLUX.2 klein", "Kandinsky 5")
"""Families whose pipelines, guided, ask the denoiser twice in turn, and not once about a batch of both."""

OWN_LENGTHS = ("Qwen-Image", "Z-Image", "Kandinsky 5", "CogView4")
"""Families whose prompts keep their own lengths, so that rows are tensors of their own."""


def prompt_shapes(backbone: Backbone) -> dict[str, Shape]:
    return PROMPT_SHAPES[backbone.family.name](backbone)


def on_meta(backbone: Backbone, count: int) -> Conditioning:
    """Prompts as the denoiser reads them, without numbers, on the meta device."""
    tensors: dict[str, Rows] = {}
    for name, shape in prompt_shapes(backbone).items():
        if name in MASKS:
            # One family's denoiser reads from the mask how long a text is.
            where = "cpu" if backbone.family.name in READS_LENGTHS else "meta"
            kind = backbone.dtype if backbone.family.name in NUMBERS_AS_MASKS else torch.int64
            tensors[name] = torch.ones(count, *shape, dtype=kind, device=where)
        elif backbone.family.name in OWN_LENGTHS and len(shape) > 1:
            tensors[name] = tuple(torch.empty(shape, dtype=backbone.dtype, device="meta") for _ in range(count))
        else:
            tensors[name] = torch.empty(count, *shape, dtype=backbone.dtype, device="meta")
    return Conditioning(tensors)
