"""HunyuanImage 2.1: a second text encoder for quoted texts, a guidance scale that parts of the pipeline have."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones.families.descriptor import JOINT_PROJECTIONS, Family, Reader
from fade.backbones.families.qwen_image import SEGMENT
from fade.backbones.families.shared import default_side, named, prompt_states
from fade.conditioning import Conditioning, Rows
from fade.errors import FadeError

if TYPE_CHECKING:
    from fade.backbones.base import Backbone

NAMES = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
"""What the pipeline encodes a prompt to; its call takes each by the same name."""


def encode(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    return dict(zip(NAMES, pipeline.encode_prompt(prompts, device, len(prompts)), strict=True))


def forward(backbone: Backbone, noised: Tensor, times: Tensor, conditioning: Conditioning) -> dict[str, Any]:
    return {
        "hidden_states": noised,
        "timestep": (1000 * times).to(noised.device, noised.dtype),
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "encoder_attention_mask": conditioning["prompt_embeds_mask"],
        "encoder_hidden_states_2": conditioning["prompt_embeds_2"],
        "encoder_attention_mask_2": conditioning["prompt_embeds_mask_2"],
    }


def pooled(backbone: Backbone, conditioning: Conditioning) -> Tensor:
    """The mean of a prompt's tokens, as the denoiser takes it."""
    embeddings, mask = conditioning["prompt_embeds"], conditioning["prompt_embeds_mask"][..., None].float()
    return ((embeddings * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)).to(embeddings.dtype)


def guidance(backbone: Backbone) -> float:
    """The scale of the pipeline's guider; without one it draws without guidance."""
    guider = backbone.pipeline.guider
    return 1.0 if guider is None or not guider._enabled else guider.guidance_scale


@contextlib.contextmanager
def guided(backbone: Backbone, scale: float) -> Iterator[None]:
    """The pipeline with copies of its guiders that have this scale. The one for prompts with quoted texts may be
    missing: such prompts are guided by the other then."""
    from diffusers import AdaptiveProjectedMixGuidance

    pipeline = backbone.pipeline
    before = pipeline.guider, pipeline.ocr_guider
    guider = pipeline.guider or AdaptiveProjectedMixGuidance()
    for_quotes = pipeline.ocr_guider or guider
    try:
        pipeline.guider, pipeline.ocr_guider = _at(scale, guider), _at(scale, for_quotes)
        yield
    finally:
        pipeline.guider, pipeline.ocr_guider = before


def _at(scale: float, guider: Any) -> Any:
    guider = copy.copy(guider)
    guider.guidance_scale = scale
    if scale == 1:
        guider.disable()
    else:
        guider.enable()
    return guider


def refuse(backbone: Backbone) -> None:
    """Raises FadeError for the model that was distilled to few steps."""
    if backbone.denoiser.config.use_meanflow or backbone.denoiser.config.guidance_embeds:
        raise FadeError(
            "this is the distilled HunyuanImage 2.1, which predicts the mean velocity between two times (MeanFlow) "
            "instead of the velocity trained here: unlearn on the model that it was distilled from and load the "
            "adapter here with check_base=False"
        )


def prompt_shapes(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    config, pipeline = backbone.denoiser.config, backbone.pipeline
    lengths = pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length
    return {
        "prompt_embeds": (lengths[0], config.text_embed_dim),
        "prompt_embeds_mask": (lengths[0],),
        "prompt_embeds_2": (lengths[1], config.text_embed_2_dim),
        "prompt_embeds_mask_2": (lengths[1],),
    }


HUNYUAN_IMAGE = Family(
    name="HunyuanImage 2.1",
    kind="flow",
    pipeline="HunyuanImagePipeline",
    denoiser="HunyuanImageTransformer2DModel",
    parts=("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer"),
    since="0.36",
    encoders=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    encode=encode,
    prompt_shapes=prompt_shapes,
    call=lambda backbone, conditioning, negative, guidance: {
        **conditioning,
        **{f"negative_{name}": value for name, value in negative.items()},
    },
    forward=forward,
    guidance=guidance,
    guided=guided,
    resolution=default_side,
    targets=JOINT_PROJECTIONS,
    # Not the embedder of quoted texts (`context_embedder_2`): most prompts quote none, and a concept is more than a
    # text that is to be written.
    readers={
        "prompt": Reader(named("context_embedder.proj_in"), prompt_states, (SEGMENT,), mask="prompt_embeds_mask"),
        "pooled": Reader(named("context_embedder.time_text_embed.text_embedder.linear_1"), pooled, ()),
    },
    refuse=refuse,
    checkpointing=False,  # diffusers' own function for it does not take the arguments that this denoiser gives it
    one_by_one=True,  # one quoted text in a batch has the pipeline guide all of it otherwise
)
