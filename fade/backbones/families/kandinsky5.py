"""Kandinsky 5: latents with the channels last and an axis of time, prompts without padding, fixed sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones.families.descriptor import Family, Reader, Segment
from fade.backbones.families.shared import SCALED, USUAL_LENGTH, named, stacked
from fade.conditioning import Conditioning, Rows
from fade.errors import FadeError

if TYPE_CHECKING:
    from fade.backbones.base import Backbone

TEXT_LENGTH = 512
"""Most tokens of a prompt, as the pipeline's own call has it."""


def encode(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    embeddings, pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=TEXT_LENGTH, device=device)
    return {"prompt_embeds_qwen": embeddings, "prompt_embeds_clip": pooled}


def text(pipeline: Any, prompt: str) -> str:
    """What the pipeline tokenizes of a prompt for its first encoder."""
    from diffusers.pipelines.kandinsky5.pipeline_kandinsky_t2i import prompt_clean

    return pipeline.prompt_template.format(prompt_clean(prompt))


def call(backbone: Backbone, conditioning: Conditioning, negative: Conditioning, guidance: float) -> dict[str, Any]:
    def given(one: Conditioning, prefix: str = "") -> dict[str, Tensor]:
        embeddings = stacked(one["prompt_embeds_qwen"])
        count, length = embeddings.shape[:2]
        return {
            f"{prefix}prompt_embeds_qwen": embeddings,
            f"{prefix}prompt_embeds_clip": one["prompt_embeds_clip"],
            f"{prefix}prompt_cu_seqlens": length * torch.arange(count + 1, dtype=torch.int32, device=backbone.device),
        }

    return {**given(conditioning), **given(negative, "negative_"), "guidance_scale": guidance}


def forward(backbone: Backbone, noised: Tensor, times: Tensor, conditioning: Conditioning) -> dict[str, Any]:
    embeddings, device = conditioning["prompt_embeds_qwen"], noised.device
    _, height, width = backbone.denoiser.config.patch_size
    return {
        "hidden_states": noised.permute(0, 2, 3, 1)[:, None],
        "encoder_hidden_states": embeddings,
        "pooled_projections": conditioning["prompt_embeds_clip"],
        "timestep": (1000 * times.to(device)).to(noised.dtype),
        "visual_rope_pos": [
            torch.arange(count, device=device) for count in (1, noised.shape[2] // height, noised.shape[3] // width)
        ],
        "text_rope_pos": torch.arange(embeddings.shape[1], device=device),
        "scale_factor": (1.0, 1.0, 1.0),
    }


def channels_first(latents: Tensor) -> Tensor:
    """[n, 1, h, w, C] -> [n, C, h, w]."""
    return latents[:, 0].permute(0, 3, 1, 2)


def sides(backbone: Backbone) -> tuple[int, ...]:
    return tuple(width for width, height in backbone.pipeline.resolutions if width == height)


def refuse(backbone: Backbone) -> None:
    """Raises FadeError for a denoiser that draws from a picture, too."""
    if backbone.denoiser.config.visual_cond:
        raise FadeError(
            "this Kandinsky 5 needs a picture beside the prompt (visual_cond=True), so a prompt alone draws nothing: "
            "unlearn on the text-to-image model"
        )


KANDINSKY5 = Family(
    name="Kandinsky 5",
    kind="flow",
    pipeline="Kandinsky5T2IPipeline",
    denoiser="Kandinsky5Transformer3DModel",
    parts=("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"),
    classes={"vae": "AutoencoderKL"},  # not a video's
    since="0.36",
    encoders=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    encode=encode,
    prompt_shapes=lambda backbone: {
        "prompt_embeds_qwen": (min(USUAL_LENGTH, TEXT_LENGTH), backbone.denoiser.config.in_text_dim),
        "prompt_embeds_clip": (backbone.denoiser.config.in_text_dim2,),
    },
    own_lengths=True,
    asked_twice=True,
    call=call,
    forward=forward,
    output=lambda backbone, output, noised: channels_first(output),
    unpack_result=lambda backbone, latents, side: channels_first(latents),
    guidance=3.5,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor_spatial,
    sides=sides,
    resolution=lambda backbone: sides(backbone)[0],
    vae=SCALED,
    targets=("to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer"),
    readers={
        "prompt": Reader(
            named("text_embeddings.in_layer"),
            lambda backbone, conditioning: stacked(conditioning["prompt_embeds_qwen"]),
            (Segment("tokenizer", text=text, skip=lambda pipeline: pipeline.prompt_template_encode_start_idx),),
        ),
        "pooled": Reader(
            named("pooled_text_embeddings.in_layer"),
            lambda backbone, conditioning: conditioning["prompt_embeds_clip"][:, None],
            (),
        ),
    },
    refuse=refuse,
    one_by_one=True,
)
