"""PixArt-Sigma."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fade.backbones.families.descriptor import Family, Reader, Segment
from fade.backbones.families.shared import (
    call_unbinned,
    cleaned,
    cross_attention,
    encode_masked,
    latent_side,
    masked_shapes,
)
from fade.errors import FadeError

if TYPE_CHECKING:
    from fade.backbones.base import Backbone

PIXART_ALPHA = (
    "draws with PixArt-Alpha, which reads 120 tokens and may be told the picture's size; that is not supported: use "
    "PixArt-Sigma"
)


def refuse(backbone: Backbone) -> None:
    if backbone.denoiser.use_additional_conditions:
        raise FadeError(f"this pipeline {PIXART_ALPHA}")


PIXART_SIGMA = Family(
    name="PixArt-Sigma",
    kind="ddpm",
    pipeline="PixArtSigmaPipeline",
    denoiser="PixArtTransformer2DModel",
    parts=("tokenizer", "text_encoder", "vae", "transformer", "scheduler"),
    since="0.28",
    encode=encode_masked,
    prompt_shapes=lambda backbone: masked_shapes(300, backbone.denoiser.config.caption_channels),
    call=call_unbinned,
    forward=lambda backbone, noised, times, conditioning: {
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "encoder_attention_mask": conditioning["prompt_attention_mask"],
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
    guidance=4.5,
    multiple=lambda backbone: max(8, backbone.pipeline.vae_scale_factor * backbone.denoiser.config.patch_size),
    resolution=latent_side,
    readers={
        "prompt": Reader(
            cross_attention,
            lambda backbone, conditioning: backbone.denoiser.caption_projection(conditioning["prompt_embeds"]),
            (Segment("tokenizer", text=cleaned),),
            mask="prompt_attention_mask",
        )
    },
    refuse=refuse,
    foreign={"PixArtAlphaPipeline": PIXART_ALPHA},
)
