"""HiDream-I1: four text encoders, of which the last is read at a layer of its own by every block; routed experts."""

from __future__ import annotations

import math
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fade.backbones.families.descriptor import Family, Reader, Segment
from fade.backbones.families.shared import named, pooled_states
from fade.base_model import own_modules
from fade.conditioning import Conditioning, Rows

if TYPE_CHECKING:
    from fade.backbones.base import Backbone

TEXT_LENGTH = 128
"""Tokens that prompts are padded to, as the pipeline's own call has it."""


def encode(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    t5, _, llama, _, pooled, _ = pipeline.encode_prompt(
        prompts, device=device, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
    )
    # The layers come first.
    return {"prompt_embeds_t5": t5, "prompt_embeds_llama3": llama.transpose(0, 1), "pooled_prompt_embeds": pooled}


def call(backbone: Backbone, conditioning: Conditioning, negative: Conditioning, guidance: float) -> dict[str, Any]:
    def given(one: Conditioning) -> dict[str, Any]:
        return {**one, "prompt_embeds_llama3": one["prompt_embeds_llama3"].transpose(0, 1)}

    against = {f"negative_{name}": value for name, value in given(negative).items()}
    return {**given(conditioning), **against, "guidance_scale": guidance}


def forward(backbone: Backbone, noised: Tensor, times: Tensor, conditioning: Conditioning) -> dict[str, Any]:
    if noised.is_meta:  # where memory is planned, the denoiser cannot read the picture's size from a tensor
        tokens = math.prod(noised.shape[2:]) // backbone.denoiser.config.patch_size**2
        backbone.denoiser.unpatchify = lambda x, *_: x[:, :tokens].reshape(noised.shape)
    return {
        "hidden_states": noised,
        "timesteps": 1000 * times.to(noised.device),
        "encoder_hidden_states_t5": conditioning["prompt_embeds_t5"],
        "encoder_hidden_states_llama3": conditioning["prompt_embeds_llama3"].transpose(0, 1),
        "pooled_embeds": conditioning["pooled_prompt_embeds"],
    }


def side(backbone: Backbone) -> tuple[int, ...]:
    """The pipeline brings every size to as many pixels as its own has."""
    return (backbone.pipeline.default_sample_size * backbone.pipeline.vae_scale_factor,)


def shift(backbone: Backbone, tokens: int) -> float:
    """μ of the tokens of the largest picture, whatever is drawn: 0.5 for 256, 1.15 for 4096, linear between."""
    return 0.5 + 0.65 * (backbone.denoiser.max_seq - 256) / (4096 - 256)


def llama_layers(backbone: Backbone) -> dict[int, tuple[str, ...]]:
    """By layer of the language model, the projections that read it."""
    found: dict[int, tuple[str, ...]] = {}
    for block, layer in enumerate(backbone.denoiser.config.llama_layers):
        found[layer] = (*found.get(layer, ()), f"caption_projection.{block}.linear")
    return found


def padded_before(tokenizer: str) -> Any:
    """Padding is where the tokenizer puts it."""

    def padded(pipeline: Any) -> int:
        return TEXT_LENGTH if getattr(pipeline, tokenizer).padding_side == "left" else 1

    return padded


def let_gradients_through_experts(backbone: Backbone) -> None:
    """diffusers computes routed experts under `no_grad` unless in training mode, in which the denoiser's output has
    another shape: with it, everything before an expert would have a gradient that lacks what went through it. Where
    gradients are asked for, the same sum is computed so that they are exact."""
    for _, _, module in own_modules(backbone.denoiser):
        if type(module).__name__ == "MOEFeedForwardSwiGLU":
            module.moe_infer = types.MethodType(_routed, module)


def _routed(self: nn.Module, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Σ_k w_k E_k(x) of tokens x [m, d]; `experts` [m k] and `weights` [m k, 1] are those of each token in turn."""
    if not torch.is_grad_enabled() and not x.is_meta:
        return type(self).moe_infer(self, x, experts, weights)
    order = experts.argsort()
    if x.is_meta:  # where memory is planned: each gets its share
        counts = [len(part) for part in order.tensor_split(len(self.experts))]
    else:
        counts = experts.bincount(minlength=len(self.experts)).tolist()
    total = torch.zeros_like(x)
    for expert, rows in zip(self.experts, order.split(counts), strict=True):
        if len(rows):
            tokens = rows // self.num_activated_experts
            total = total.index_add(0, tokens, (expert(x[tokens]) * weights[rows]).to(total.dtype))
    return total


def readers(backbone: Backbone) -> dict[str, Reader]:
    """T5, the pooled states of both CLIPs, and each layer of Llama that is read: the closed form solves for each apart,
    and holds some matrices of the width of its states for each."""

    def of_layer(layer: int, projections: tuple[str, ...]) -> Reader:
        return Reader(
            named(*projections),
            lambda backbone, conditioning: conditioning["prompt_embeds_llama3"][:, layer],
            (Segment("tokenizer_4", padded_before=padded_before("tokenizer_4")),),
        )

    last = len(backbone.denoiser.caption_projection) - 1
    return {
        "prompt": Reader(
            named(f"caption_projection.{last}.linear"),
            lambda backbone, conditioning: conditioning["prompt_embeds_t5"],
            (Segment("tokenizer_3"),),
        ),
        "pooled": Reader(named("p_embedder.pooled_embedder.linear_1"), pooled_states, ()),
        **{f"llama.{layer}": of_layer(layer, names) for layer, names in llama_layers(backbone).items()},
    }


def prompt_shapes(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    config = backbone.denoiser.config
    t5, llama = config.caption_channels
    return {
        "prompt_embeds_t5": (TEXT_LENGTH, t5),
        "prompt_embeds_llama3": (1 + max(config.llama_layers), TEXT_LENGTH, llama),
        "pooled_prompt_embeds": (config.text_emb_dim,),
    }


HIDREAM = Family(
    name="HiDream-I1",
    kind="flow",
    pipeline="HiDreamImagePipeline",
    denoiser="HiDreamImageTransformer2DModel",
    parts=(
        "scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3",
        "tokenizer_3", "text_encoder_4", "tokenizer_4", "transformer",
    ),
    since="0.34",
    encoders=(
        "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3",
        "text_encoder_4", "tokenizer_4",
    ),
    encode=encode,
    prompt_shapes=prompt_shapes,
    call=call,
    forward=forward,
    output=lambda backbone, output, noised: -output[0],
    guidance=5.0,
    shift=shift,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor,
    sides=side,
    resolution=lambda backbone: side(backbone)[0],
    targets=("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t"),
    readers=readers,
    prepare=let_gradients_through_experts,
)  # fmt: skip
