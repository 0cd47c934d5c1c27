"""Stable Diffusion XL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones.families.descriptor import Family
from fade.backbones.families.shared import call_with_negative, clip_length, latent_side
from fade.backbones.families.stable_diffusion import UNET_READER, refuse_other_inputs, told_guidance
from fade.conditioning import Conditioning, Rows
from fade.errors import FadeError

if TYPE_CHECKING:
    from fade.backbones.base import Backbone
    from fade.backbones.ddpm import DdpmBackbone


def encode(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}


def negative(backbone: Backbone) -> Conditioning:
    """Zeros, where the pipeline takes them for an empty prompt."""
    empty = backbone.encode_prompts([""])
    if not backbone.pipeline.config.get("force_zeros_for_empty_prompt"):
        return empty
    return Conditioning({name: torch.zeros_like(value) for name, value in empty.items()})


def forward(backbone: DdpmBackbone, noised: Tensor, times: Tensor, conditioning: Conditioning) -> dict[str, Any]:
    embeddings, pooled = conditioning["prompt_embeds"], conditioning["pooled_prompt_embeds"]
    height, width = (size * backbone.pipeline.vae_scale_factor for size in noised.shape[2:])
    # Original size, crop and target size (SDXL, arXiv 2307.01952, section 2.2), as the pipeline tells them.
    sizes = torch.tensor([height, width, 0, 0, height, width]).to(embeddings).expand(len(noised), -1)
    return {
        "encoder_hidden_states": embeddings,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes},
        **told_guidance(backbone, noised),
    }


def refuse(backbone: Backbone) -> None:
    if getattr(backbone.pipeline, "text_encoder", None) is None and backbone.pipeline.config.get(
        "requires_aesthetics_score"
    ):
        raise FadeError(
            "this is SDXL's refiner, which finishes pictures that another model begins: unlearn on the base model"
        )
    if backbone.denoiser.config.addition_embed_type != "text_time":
        raise FadeError("this UNet takes no pooled prompt and no sizes, so it is none of SDXL's")
    refuse_other_inputs(backbone, ("addition_embed_type", "text_time"))


def prompt_shapes(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    config = backbone.denoiser.config
    return {
        "prompt_embeds": (clip_length(backbone), config.cross_attention_dim),
        "pooled_prompt_embeds": (config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,),
    }


SDXL = Family(
    name="Stable Diffusion XL",
    kind="ddpm",
    pipeline="StableDiffusionXLPipeline",
    denoiser="UNet2DConditionModel",
    component="unet",
    parts=("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler"),
    since="0.18",
    encoders=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    encode=encode,
    prompt_shapes=prompt_shapes,
    call=call_with_negative,
    forward=forward,
    negative=negative,
    guidance=5.0,
    resolution=latent_side,
    readers={"prompt": UNET_READER},
    refuse=refuse,
)
