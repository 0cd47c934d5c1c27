"""Qwen-Image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fade.backbones.families.descriptor import JOINT_PROJECTIONS, Family, Reader, Segment, Vae
from fade.backbones.families.shared import (
    USUAL_LENGTH,
    default_side,
    encode_as_called,
    named,
    unpacked,
    unpacked_result,
)
from fade.backbones.flow import pack, rounded
from fade.conditioning import Conditioning, Rows
from fade.errors import FadeError

if TYPE_CHECKING:
    from fade.backbones.base import Backbone


def encode(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    """Rows of their own lengths: nothing attends to the padding of the longest."""
    embeddings, mask = encode_as_called(pipeline, prompts, device)
    lengths = [embeddings.shape[1]] * len(prompts) if mask is None else mask.sum(1).tolist()
    return {"prompt_embeds": tuple(row[:length] for row, length in zip(embeddings, lengths, strict=True))}


def call(backbone: Backbone, conditioning: Conditioning, negative: Conditioning, guidance: float) -> dict[str, Any]:
    def padded(rows: Rows, prefix: str) -> dict[str, Tensor]:
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows], True)
        return {f"{prefix}prompt_embeds": pad_sequence(list(rows), True), f"{prefix}prompt_embeds_mask": mask}

    arguments: dict[str, Any] = {"true_cfg_scale": guidance, **padded(conditioning["prompt_embeds"], "")}
    return arguments if guidance <= 1 else arguments | padded(negative["prompt_embeds"], "negative_")


def encode_frame(vae: Any, pixels: Tensor) -> Any:
    """A picture is a video of one frame; its distribution without the axis of frames."""
    parameters = vae.encode(pixels[:, :, None]).latent_dist.parameters
    return AutoencoderKLOutput(DiagonalGaussianDistribution(parameters[:, :, 0]))


def decode_frame(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]


def targets(backbone: Backbone) -> tuple[str, ...]:
    """Without those of the last block whose answer, what becomes of the text, is dropped."""
    dropped = ("add_q_proj", "to_add_out")
    blocks = range(backbone.denoiser.config.num_layers - 1)
    return (
        *(name for name in JOINT_PROJECTIONS if name not in dropped),
        *(f"transformer_blocks.{block}.attn.{name}" for block in blocks for name in dropped),
    )


SEGMENT = Segment(
    "tokenizer",
    text=lambda pipeline, prompt: pipeline.prompt_template_encode.format(prompt),
    skip=lambda pipeline: pipeline.prompt_template_encode_start_idx,
)
"""A prompt in Qwen's chat template, of which the text encoder's output leaves out the beginning."""


EDITS = (
    "edits pictures or draws layers, so a prompt alone draws nothing: unlearn on the text-to-image model and load the "
    "adapter here with check_base=False"
)


def refuse(backbone: Backbone) -> None:
    for name in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
        if backbone.denoiser.config.get(name):
            raise FadeError(f"this Qwen-Image denoiser ({name}=True) {EDITS}")


QWEN_IMAGE = Family(
    name="Qwen-Image",
    kind="flow",
    pipeline="QwenImagePipeline",
    denoiser="QwenImageTransformer2DModel",
    parts=("scheduler", "vae", "text_encoder", "tokenizer", "transformer"),
    since="0.35",
    encode=encode,
    prompt_shapes=lambda backbone: {"prompt_embeds": (USUAL_LENGTH, backbone.denoiser.config.joint_attention_dim)},
    own_lengths=True,
    asked_twice=True,
    call=call,
    forward=lambda backbone, noised, times, conditioning: {
        "hidden_states": pack(noised),
        "timestep": rounded(noised, times),
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "img_shapes": [[(1, noised.shape[2] // 2, noised.shape[3] // 2)]] * len(noised),
    },
    output=unpacked,
    unpack_result=unpacked_result,
    # Without a negative prompt the pipeline is not guided; the model's authors give it a space.
    negative=lambda backbone: backbone.encode_prompts([" "]),
    guidance=4.0,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor,
    resolution=default_side,
    vae=Vae(encode=encode_frame, decode=decode_frame),
    targets=targets,
    readers={
        "prompt": Reader(
            named("txt_in"),
            lambda backbone, conditioning: backbone.denoiser.txt_norm(conditioning["prompt_embeds"]),
            (SEGMENT,),
        )
    },
    refuse=refuse,
    foreign=dict.fromkeys(
        (
            "QwenImageEditPipeline",
            "QwenImageEditInpaintPipeline",
            "QwenImageEditPlusPipeline",
            "QwenImageLayeredPipeline",
        ),
        EDITS,
    ),
)
