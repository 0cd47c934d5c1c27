"""FLUX.2: latents are patches of 2 x 2 of what its VAE encodes, normalised by the VAE's batch norm; positions have four
columns; prompts are the states of several layers of a language model, side by side."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones.families.descriptor import Family, Reader, Segment, Vae
from fade.backbones.families.shared import named, prompt_states
from fade.backbones.flow import pack, rounded, unpack
from fade.conditioning import Conditioning, Rows

if TYPE_CHECKING:
    from fade.backbones.base import Backbone

TEXT_LENGTH = 512
"""Tokens that prompts are padded to, as the pipelines' own call has it."""
STEPS = 50
"""The pipelines' default, for which the noise levels of training are spaced: their shift depends on the number."""


def targets(backbone: Backbone) -> tuple[str, ...]:
    """The projections of the attentions; in blocks of one stream, which have one layer for them and the MLP's input,
    and one for both outputs, the attention's rows and columns of these."""
    width = backbone.denoiser.config.num_attention_heads * backbone.denoiser.config.attention_head_dim
    double = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    single = "single_transformer_blocks.*.attn"
    return (*double, f"{single}.to_qkv_mlp_proj[:{3 * width}]", f"{single}.to_out[:, :{width}]")


def encode(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    embeddings, _ = pipeline.encode_prompt(prompts, device, max_sequence_length=TEXT_LENGTH)
    return {"prompt_embeds": embeddings}


def call_dev(backbone: Backbone, conditioning: Conditioning, negative: Conditioning, guidance: float) -> dict[str, Any]:
    return {**conditioning, "guidance_scale": guidance}


def call_klein(
    backbone: Backbone, conditioning: Conditioning, negative: Conditioning, guidance: float
) -> dict[str, Any]:
    return {**conditioning, "negative_prompt_embeds": negative["prompt_embeds"], "guidance_scale": guidance}


def guidance_klein(backbone: Backbone) -> float:
    """The distilled ones draw without."""
    return 1.0 if backbone.pipeline.config.get("is_distilled") else 4.0


def forward(backbone: Backbone, noised: Tensor, times: Tensor, conditioning: Conditioning) -> dict[str, Any]:
    embeddings, (height, width) = conditioning["prompt_embeds"], noised.shape[2:]
    device = noised.device
    told = None
    if backbone.tells_guidance:  # what people draw with, for teacher and student alike
        told = torch.full((len(noised),), backbone.guidance, device=device)
    zero, one = torch.zeros(1, dtype=torch.int64), torch.arange(1)
    text = torch.cartesian_prod(zero, one, one, torch.arange(embeddings.shape[1]))
    image = torch.cartesian_prod(zero, torch.arange(height), torch.arange(width), one)
    return {
        "hidden_states": noised.flatten(2).transpose(1, 2),
        "timestep": rounded(noised, times),
        "encoder_hidden_states": embeddings,
        "txt_ids": text.to(device),
        "img_ids": image.to(device),
        "guidance": told,
    }


def output(backbone: Backbone, output: Any, noised: Tensor) -> Tensor:
    return output[0].transpose(1, 2).reshape(noised.shape)


def unpack_result(backbone: Backbone, latents: Tensor, side: int) -> Tensor:
    """Of tokens, or of the VAE's latents, which the pipeline of the small models returns."""
    if latents.dim() == 4:
        return normalise(backbone.pipeline.vae, latents)
    size = side // (2 * backbone.pipeline.vae_scale_factor)
    return latents.transpose(1, 2).reshape(len(latents), -1, size, size)


def normalise(vae: Any, latents: Tensor) -> Tensor:
    """[n, C, 2 h, 2 w] -> [n, 4 C, h, w]."""
    mean, std = _statistics(vae, latents)
    height, width = (size // 2 for size in latents.shape[2:])
    return (pack(latents).transpose(1, 2).reshape(len(latents), -1, height, width) - mean) / std


def denormalise(vae: Any, latents: Tensor) -> Tensor:
    mean, std = _statistics(vae, latents)
    height, width = latents.shape[2:]
    return unpack((latents * std + mean).flatten(2).transpose(1, 2), 2 * height, 2 * width)


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    norm = vae.bn
    mean = norm.running_mean.to(latents).reshape(1, -1, 1, 1)
    variance = norm.running_var.to(latents).reshape(1, -1, 1, 1)
    return mean, (variance + vae.config.batch_norm_eps).sqrt()


def shift(backbone: Backbone, tokens: int) -> float:
    """μ of the pipelines' own rule (`compute_empirical_mu`): linear in the tokens, at 10 and at 200 steps; between them
    linear in the steps."""
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    return few + (many - few) * (STEPS - 10) / 190


def tokens_dev(pipeline: Any, prompt: str) -> list[int]:
    """Ids of the system message and the prompt, by the processor's chat template."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": pipeline.system_message}]},
        {"role": "user", "content": [{"type": "text", "text": prompt.replace("[IMG]", "")}]},
    ]
    inputs = pipeline.tokenizer.apply_chat_template(
        [messages], add_generation_prompt=False, tokenize=True, return_dict=True, truncation=True,
        max_length=TEXT_LENGTH,
    )  # fmt: skip
    return list(inputs["input_ids"][0])


def text_klein(pipeline: Any, prompt: str) -> str:
    """What the pipeline tokenizes of a prompt."""
    return pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )


def padded_before(pipeline: Any) -> int:
    """Padding is where the tokenizer, or the processor's tokenizer, puts it."""
    tokenizer = getattr(pipeline.tokenizer, "tokenizer", pipeline.tokenizer)
    return TEXT_LENGTH if tokenizer.padding_side == "left" else 1


FLUX2 = Family(
    name="FLUX.2",
    kind="flow",
    pipeline="Flux2Pipeline",
    denoiser="Flux2Transformer2DModel",
    parts=("scheduler", "vae", "text_encoder", "tokenizer", "transformer"),
    since="0.36",
    encode=encode,
    prompt_shapes=lambda backbone: {"prompt_embeds": (TEXT_LENGTH, backbone.denoiser.config.joint_attention_dim)},
    call=call_dev,
    forward=forward,
    output=output,
    unpack_result=unpack_result,
    guidance=4.0,
    shift=shift,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor,
    resolution=lambda backbone: backbone.pipeline.vae.config.sample_size,
    vae=Vae(normalise=normalise, denormalise=denormalise),
    targets=targets,
    readers={
        "prompt": Reader(
            named("context_embedder"),
            prompt_states,
            (Segment("tokenizer", tokens=tokens_dev, padded_before=padded_before),),
        )
    },
)


FLUX2_KLEIN = dataclasses.replace(
    FLUX2,
    name="FLUX.2 klein",
    asked_twice=True,
    pipeline="Flux2KleinPipeline",
    classes={"text_encoder": "Qwen3ForCausalLM"},
    kept=("is_distilled",),
    since="0.37",
    call=call_klein,
    guidance=guidance_klein,
    readers={
        "prompt": Reader(
            named("context_embedder"),
            prompt_states,
            (Segment("tokenizer", text=text_klein, padded_before=padded_before),),
        )
    },
)
