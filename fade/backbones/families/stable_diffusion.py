"""Stable Diffusion 1.x and 2.x, DigitCanvas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones.families.descriptor import Family, Reader
from fade.backbones.families.shared import SCALED, clip_length, cross_attention, latent_side
from fade.conditioning import Rows
from fade.errors import FadeError

if TYPE_CHECKING:
    from fade.backbones.base import Backbone
    from fade.backbones.ddpm import DdpmBackbone

DISTILLED_GUIDANCE = 8.5
"""The guidance scale that a distilled denoiser (LCM: `time_cond_proj_dim`) is told while it is trained: the one that
LatentConsistencyModelPipeline draws with unless told otherwise."""


def refuse_other_inputs(backbone: Backbone, *known: tuple[str, str]) -> None:
    """Raises FadeError for a UNet that takes more than noised latents, a timestep, a prompt, and what is `known`."""
    config, vae = backbone.denoiser.config, backbone.pipeline.vae
    channels = 4 if vae is None else vae.config.latent_channels
    if config.in_channels != channels:
        raise FadeError(
            f"this UNet takes {config.in_channels} channels where latents have {channels} (as those for inpainting, "
            "editing, depth and upscaling do), so a prompt alone draws nothing: unlearn on the text-to-image model of "
            "its family and load the adapter here with check_base=False"
        )
    if config.out_channels != channels:
        raise FadeError(
            f"this UNet predicts {config.out_channels} channels where latents have {channels}; that is not supported"
        )
    if vae is not None and vae.config.get("out_channels", 3) != 3:
        raise FadeError(f"this VAE decodes to {vae.config.out_channels} channels, not to an RGB image; not supported")
    if config.encoder_hid_dim_type not in (None, "text_proj"):
        raise FadeError(
            "this UNet needs an image beside the prompt (an IP-Adapter is loaded): call pipeline.unload_ip_adapter() "
            "first, and load the IP-Adapter again beside the finished adapter"
        )
    for name in ("class_embed_type", "num_class_embeds", "addition_embed_type"):
        if config.get(name) is not None and (name, config[name]) not in known:
            raise FadeError(f"this UNet needs more than a prompt ({name}={config[name]!r}), which is not supported")


def encode(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    embeddings, _ = pipeline.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeddings}


def told_guidance(backbone: DdpmBackbone, noised: Tensor) -> dict[str, Tensor]:
    """What a denoiser distilled from guided drawing is told beside the time."""
    if (width := backbone.denoiser.config.time_cond_proj_dim) is None:
        return {}
    told = torch.full((len(noised),), DISTILLED_GUIDANCE - 1, dtype=torch.float32, device="cpu")
    condition = backbone.pipeline.get_guidance_scale_embedding(told, embedding_dim=width)
    return {"timestep_cond": condition.to(noised.device, noised.dtype)}


UNET_READER = Reader(
    cross_attention,
    lambda backbone, conditioning: backbone.denoiser.process_encoder_hidden_states(conditioning["prompt_embeds"], {}),
)


STABLE_DIFFUSION = Family(
    name="Stable Diffusion 1.x/2.x",
    kind="ddpm",
    pipeline="StableDiffusionPipeline",
    denoiser="UNet2DConditionModel",
    component="unet",
    parts=("vae", "text_encoder", "tokenizer", "unet", "scheduler"),
    make={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    since="0.2",
    encode=encode,
    prompt_shapes=lambda backbone: {
        "prompt_embeds": (clip_length(backbone), backbone.denoiser.config.cross_attention_dim)
    },
    call=lambda backbone, conditioning, negative, guidance: {
        "prompt_embeds": conditioning["prompt_embeds"],
        "negative_prompt_embeds": negative["prompt_embeds"],
        "guidance_scale": guidance,
    },
    forward=lambda backbone, noised, times, conditioning: {
        "encoder_hidden_states": conditioning["prompt_embeds"],
        **told_guidance(backbone, noised),
    },
    resolution=latent_side,
    vae=SCALED,
    readers={"prompt": UNET_READER},
    refuse=refuse_other_inputs,
)
