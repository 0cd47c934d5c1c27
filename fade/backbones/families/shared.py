"""What several families have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones.families.descriptor import Vae
from fade.backbones.flow import unpack
from fade.base_model import own_modules
from fade.conditioning import Conditioning, Rows
from fade.errors import FadeError

if TYPE_CHECKING:
    from fade.backbones.base import Backbone

SCALED = Vae(
    normalise=lambda vae, latents: latents * vae.config.scaling_factor,
    denormalise=lambda vae, latents: latents / vae.config.scaling_factor,
)
"""The scale of the VAE's config alone, whatever else that says."""


USUAL_LENGTH = 64
"""Tokens that a prompt is planned with where it keeps its own length, with what the pipeline puts around it."""


def clip_length(backbone: Backbone) -> int:
    """Tokens of a prompt that CLIP reads."""
    return backbone.pipeline.tokenizer.model_max_length


def masked_shapes(length: int, width: int) -> dict[str, tuple[int, ...]]:
    """Of a prompt that is padded to a length, with its mask."""
    return {"prompt_embeds": (length, width), "prompt_attention_mask": (length,)}


def stacked(rows: Rows) -> Tensor:
    """Rows of one size as a tensor."""
    return rows if isinstance(rows, Tensor) else torch.stack(rows)


def latent_side(backbone: Backbone) -> int:
    """A denoiser that says the side of its latents."""
    size = backbone.denoiser.config.sample_size
    if size is None:
        raise FadeError(
            f"the denoiser's config has no sample_size, so the model's resolution is unknown; set the resolution "
            f"(data.resolution), or pipeline.{backbone.family.component}.register_to_config(sample_size=PIXELS // 8)"
        )
    return (size if isinstance(size, int) else min(size)) * backbone.pipeline.vae_scale_factor


def default_side(backbone: Backbone) -> int:
    """A pipeline that says the side of its latents."""
    return backbone.pipeline.default_sample_size * backbone.pipeline.vae_scale_factor


def cross_attention(backbone: Backbone, names: Sequence[str]) -> set[str]:
    """Keys and values of the cross-attentions."""
    return {
        f"{name}.{projection}"
        for name, _, module in own_modules(backbone.denoiser)
        if getattr(module, "is_cross_attention", False)
        and module.added_kv_proj_dim is None
        and module.norm_cross is None
        for projection in ("to_k", "to_v")
    }


def named(*layers: str) -> Callable[[Backbone, Sequence[str]], set[str]]:
    return lambda backbone, names: set(layers) & set(names)


def default_argument(pipeline: Any, name: str) -> Any:
    """What the pipeline's `__call__` takes for an argument that it is not given."""
    return inspect.signature(pipeline.__call__).parameters[name].default


def encode_as_called(pipeline: Any, prompts: list[str], device: torch.device, **given: Any) -> tuple[Any, ...]:
    """What `encode_prompt` gives, without guidance, for the arguments that `__call__` gives it: their defaults differ
    in lengths and instructions, and people draw with the latter's."""
    called = inspect.signature(pipeline.__call__).parameters
    own = inspect.signature(pipeline.encode_prompt).parameters
    shared = {name: one.default for name, one in called.items() if name in own and one.kind is not one.VAR_KEYWORD}
    given = {"prompt": prompts, "device": device, "do_classifier_free_guidance": False, **given}
    return pipeline.encode_prompt(**{**shared, **{name: value for name, value in given.items() if name in own}})


def encode_masked(pipeline: Any, prompts: list[str], device: torch.device, **given: Any) -> dict[str, Rows]:
    embeddings, mask, *_ = encode_as_called(pipeline, prompts, device, **given)
    return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}


def call_with_negative(
    backbone: Backbone, conditioning: Conditioning, negative: Conditioning, guidance: float
) -> dict[str, Any]:
    """Where the pipeline takes a negative's tensors by the prompt's names with `negative_` before."""
    return {
        **conditioning,
        **{f"negative_{name}": value for name, value in negative.items()},
        "guidance_scale": guidance,
    }


def call_unbinned(
    backbone: Backbone, conditioning: Conditioning, negative: Conditioning, guidance: float
) -> dict[str, Any]:
    """Sides as they are asked for, not those of the nearest of the trained shapes; no negative prompt as text, which
    is an empty one by default."""
    return {
        **call_with_negative(backbone, conditioning, negative, guidance),
        "negative_prompt": None,
        "use_resolution_binning": False,
    }


def cleaned(pipeline: Any, prompt: str) -> str:
    """A prompt as pipelines with a `clean_caption` tokenize it."""
    return pipeline._text_preprocessing(prompt, clean_caption=default_argument(pipeline, "clean_caption"))[0]


def prompt_states(backbone: Backbone, conditioning: Conditioning) -> Tensor:
    return stacked(conditioning["prompt_embeds"])


def pooled_states(backbone: Backbone, conditioning: Conditioning) -> Tensor:
    return conditioning["pooled_prompt_embeds"][:, None]


def unpacked(backbone: Backbone, output: Any, noised: Tensor) -> Tensor:
    return unpack(output[0], *noised.shape[2:])


def unpacked_result(backbone: Backbone, latents: Tensor, side: int) -> Tensor:
    size = side // backbone.pipeline.vae_scale_factor
    return unpack(latents, size, size)
