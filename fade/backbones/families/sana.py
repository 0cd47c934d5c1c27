"""Sana."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fade.backbones.families.descriptor import Family, Reader, Segment
from fade.backbones.families.shared import (
    call_unbinned,
    cleaned,
    cross_attention,
    default_argument,
    encode_masked,
    latent_side,
    masked_shapes,
)
from fade.conditioning import Conditioning
from fade.errors import FadeError

if TYPE_CHECKING:
    from fade.backbones.base import Backbone


def instruction_lines(pipeline: Any) -> list[str] | None:
    """The lines that Sana's pipeline puts in front of every prompt."""
    return default_argument(pipeline, "complex_human_instruction")


def instructed(pipeline: Any, prompt: str) -> str:
    return "\n".join(instruction_lines(pipeline) or ()) + cleaned(pipeline, prompt)


def skipped(pipeline: Any) -> int:
    """Of the instruction, the pipeline keeps the first and the last token alone: two that all prompts share."""
    instruction = instruction_lines(pipeline)
    return len(pipeline.tokenizer.encode("\n".join(instruction))) - 2 if instruction else 0


def states(backbone: Backbone, conditioning: Conditioning) -> Tensor:
    denoiser = backbone.denoiser
    return denoiser.caption_norm(denoiser.caption_projection(conditioning["prompt_embeds"]))


SPRINT = (
    "draws with Sana-Sprint, distilled to few steps of another diffusion (TrigFlow) than the one trained here: unlearn "
    "on Sana and load the adapter here with check_base=False"
)


def refuse(backbone: Backbone) -> None:
    if backbone.denoiser.config.guidance_embeds:
        raise FadeError(f"this pipeline {SPRINT}")


SANA = Family(
    name="Sana",
    kind="flow",
    pipeline="SanaPipeline",
    denoiser="SanaTransformer2DModel",
    parts=("tokenizer", "text_encoder", "vae", "transformer", "scheduler"),
    since="0.32",
    encode=encode_masked,
    prompt_shapes=lambda backbone: masked_shapes(300, backbone.denoiser.config.caption_channels),
    call=call_unbinned,
    forward=lambda backbone, noised, times, conditioning: {
        "hidden_states": noised,
        "timestep": 1000 * times.to(noised.device) * backbone.denoiser.config.timestep_scale,
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "encoder_attention_mask": conditioning["prompt_attention_mask"],
    },
    # The pipeline gives the negative prompt no instruction.
    negative=lambda backbone: backbone.encoded(
        lambda *given: encode_masked(*given, complex_human_instruction=None), [""]
    ),
    guidance=4.5,
    multiple=lambda backbone: max(32, backbone.pipeline.vae_scale_factor * backbone.denoiser.config.patch_size),
    resolution=latent_side,
    readers={
        "prompt": Reader(
            cross_attention,
            states,
            (Segment("tokenizer", text=instructed, skip=skipped),),
            mask="prompt_attention_mask",
        )
    },
    refuse=refuse,
    foreign=dict.fromkeys(("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"), SPRINT),
)
