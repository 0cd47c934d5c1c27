"""What differs from one model family to another: a descriptor for each, and the table of all.

A new family is a descriptor here (`docs/add-a-family.md`). One that needs more than data has a file of its own for
that, and its descriptor here all the same.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fade.backbones import flux2, hidream, hunyuan_image, kandinsky5
from fade.backbones.base import MOST_PIXELS
from fade.backbones.flow import grid_ids, pack, rounded, unpack
from fade.base_model import own_modules
from fade.conditioning import Conditioning, Rows
from fade.errors import FadeError

if TYPE_CHECKING:
    from fade.backbones.base import Backbone
    from fade.backbones.ddpm import DdpmBackbone

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Of a diffusers attention, as in most families."""
JOINT_PROJECTIONS = (*PROJECTIONS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Where text and image tokens attend to one another, each with projections of its own."""


@dataclass(frozen=True)
class Vae:
    """Between pictures and latents. Functions of the VAE and of pixels [n, 3, H, W] in [-1, 1], its own latents
    (`encode` gives what has a `latent_dist`, `latents` or `latent`), or the denoiser's, normalised."""

    encode: Callable[[Any, Tensor], Any] = lambda vae, pixels: vae.encode(pixels)
    decode: Callable[..., Tensor] = lambda vae, latents, **noise: vae.decode(latents, return_dict=False, **noise)[0]
    normalise: Callable[[Any, Tensor], Tensor] = lambda vae, latents: _affine(vae, latents)
    denormalise: Callable[[Any, Tensor], Tensor] = lambda vae, latents: _affine(vae, latents, invert=True)


@dataclass(frozen=True)
class Segment:
    """Tokens that one tokenizer makes of a prompt: `tokenizer` is the pipeline's part, `length` how many of a reader's
    tokens they are, None for all that are left; `text` what of a prompt is tokenized, `skip` how many tokens of that
    the text encoder's output leaves out in front; `padded_before`: padding goes in front, up to a multiple of this;
    `tokens`: the token ids of a prompt, where they are more than those of a text."""

    tokenizer: str
    length: int | None = None
    text: Callable[[Any, str], str] = lambda pipeline, prompt: prompt
    skip: Callable[[Any], int] = lambda pipeline: 0
    padded_before: Callable[[Any], int] = lambda pipeline: 1
    tokens: Callable[[Any, str], list[int]] | None = None


@dataclass(frozen=True)
class Reader:
    """Layers that read the prompt alone, which the closed form can solve for.

    `layers` picks them from all names of modules; `states` is what they read of a conditioning, [n, tokens, K];
    `segments` whose tokens those are, in their order: none where a prompt is one vector; `mask` the conditioning's
    tensor [n, tokens] that is 0 for tokens that nothing in the denoiser attends to, None where it attends to all.
    `padded`: the denoiser pads them behind to a multiple of this, and throws away what the layers make of the padding.
    """

    layers: Callable[[Backbone, Sequence[str]], set[str]]
    states: Callable[[Backbone, Conditioning], Tensor]
    segments: tuple[Segment, ...] = (Segment("tokenizer"),)
    mask: str | None = None
    padded: int = 1


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: as people call it.
        kind: `ddpm` or `flow`: which backbone.
        pipeline: diffusers' class that draws from a prompt alone; `others`: more classes that do.
        denoiser: the denoiser's class; component: where pipelines keep it.
        parts: the pipeline's parts by name, which pipelines of its kind (image-to-image, inpainting, …) share, so that
            one can be made of theirs; classes: the classes of those that tell it from another family with the same
            denoiser; make: other arguments of its constructor; kept: those that it takes from the other's
            configuration.
        since: the first release of diffusers that has it.
        encoders: parts that encoding a prompt needs.
        encode: (pipeline, prompts, device) -> the conditioning's tensors.
        call: (backbone, conditioning, negative, guidance scale) -> the pipeline's arguments for them.
        forward: (backbone, noised latents, times, conditioning) -> the denoiser's arguments (of a `ddpm` denoiser but
            the first two).
        output: (backbone, what the denoiser returned, noised latents) -> its velocity [n, C, h, w].
        unpack_result: (backbone, what the pipeline returns as latents, side in pixels) -> latents [n, C, h, w].
        negative: what guidance leads away from; None: the empty prompt.
        guidance: the guidance scale that people draw with, or a function of the backbone; 1 is none.
        guided: (backbone, guidance scale) -> a context in which the pipeline draws at that scale, where not its call is
            told the scale (`call`) but one of its parts has it.
        shift: of a `flow` scheduler's dynamic shift, (backbone, image tokens) -> μ; None: linear in the tokens, as the
            scheduler's config says.
        told_share: the denoiser of a `flow` is told which share u of the way to noise it is at, not the σ that the
            scheduler's shift makes of it; its times are such shares.
        multiple: pixels that a side must be a multiple of; largest: pixels that a side may have at most; sides: those
            that there are, where they are few.
        resolution: the side in pixels that the model was trained on.
        targets: patterns of the attention's projections (`fade.base_model.target_regions`), or a function of the
            backbone that names them.
        readers: layers that read the prompt alone, by a name, or a function of the backbone that makes them.
        prepare: is called with every new backbone, for what its denoiser needs to be trained.
        refuse: raises FadeError for a denoiser of the class that is another model.
        foreign: by name, pipelines made of parts as the family's, but for another model, and what to say of them.
        checkpointing: whether gradient checkpointing leaves the denoiser's answer as it is.
        one_by_one: prompts are encoded, and pictures drawn, one at a time, because padding or what else is in the batch
            would change them.
    """

    name: str
    kind: str
    pipeline: str
    denoiser: str
    parts: tuple[str, ...]
    since: str
    encode: Callable[[Any, list[str], torch.device], Mapping[str, Rows]]
    call: Callable[[Backbone, Conditioning, Conditioning, float], dict[str, Any]]
    forward: Callable[[Backbone, Tensor, Tensor, Conditioning], dict[str, Any]]
    encoders: tuple[str, ...] = ("text_encoder", "tokenizer")
    others: tuple[str, ...] = ()
    component: str = "transformer"
    classes: Mapping[str, str] = field(default_factory=dict)
    make: Mapping[str, Any] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    output: Callable[[Backbone, Any, Tensor], Tensor] = lambda backbone, output, noised: output[0]
    unpack_result: Callable[[Backbone, Any, int], Tensor] = lambda backbone, latents, side: latents
    negative: Callable[[Backbone], Conditioning] | None = None
    guidance: float | Callable[[Backbone], float] = 3.0
    guided: Callable[[Backbone, float], AbstractContextManager[None]] = lambda backbone, guidance: nullcontext()
    shift: Callable[[Backbone, int], float] | None = None
    told_share: bool = False
    multiple: Callable[[Backbone], int] = lambda backbone: backbone.pipeline.vae_scale_factor
    largest: Callable[[Backbone], int] = lambda backbone: MOST_PIXELS
    sides: Callable[[Backbone], tuple[int, ...]] | None = None
    resolution: Callable[[Backbone], int] = lambda backbone: 1024
    vae: Vae = field(default_factory=Vae)
    targets: tuple[str, ...] | Callable[[Backbone], tuple[str, ...]] = PROJECTIONS
    readers: Mapping[str, Reader] | Callable[[Backbone], Mapping[str, Reader]] = field(default_factory=dict)
    prepare: Callable[[Backbone], None] | None = None
    refuse: Callable[[Backbone], None] | None = None
    foreign: Mapping[str, str] = field(default_factory=dict)
    checkpointing: bool = True
    one_by_one: bool = False

    def draws(self, cls: type) -> bool:
        """Whether pipelines of this class draw from a prompt alone with a model of the family."""
        return any(base.__name__ in (self.pipeline, *self.others) for base in cls.__mro__)

    def has_parts(self, classes: Mapping[str, str]) -> bool:
        """Whether a pipeline whose parts have these classes, by name, is made of the family's, and of no text encoder
        more."""
        more = any(name.startswith("text_encoder") and name not in self.parts for name in classes)
        known = {self.component: self.denoiser, **self.classes}.items() <= classes.items()
        return set(self.parts) <= classes.keys() and known and not more


def _affine(vae: Any, latents: Tensor, invert: bool = False) -> Tensor:
    """(z − shift) · scale of the VAE's config, per channel where it has statistics; or back."""
    config = vae.config
    scale = config.get("scaling_factor") or 1.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        size = (1, -1, *[1] * (latents.dim() - 2))
        mean, std = (torch.tensor(value).to(latents).reshape(size) for value in (mean, std))
        return latents * std / scale + mean if invert else (latents - mean) * scale / std
    shift = config.get("shift_factor")
    if invert:
        return latents / scale if not shift else latents / scale + shift
    return latents * scale if not shift else (latents - shift) * scale


_SCALED = Vae(
    normalise=lambda vae, latents: latents * vae.config.scaling_factor,
    denormalise=lambda vae, latents: latents / vae.config.scaling_factor,
)
"""As Stable Diffusion's pipelines do it, whatever else the VAE's config says."""


def _stack(rows: Rows) -> Tensor:
    """Rows of one size as a tensor."""
    return rows if isinstance(rows, Tensor) else torch.stack(rows)


def _latent_side(backbone: Backbone) -> int:
    """A denoiser that says the side of its latents."""
    size = backbone.denoiser.config.sample_size
    if size is None:
        raise FadeError(
            f"the denoiser's config has no sample_size, so the model's resolution is unknown; set the resolution "
            f"(data.resolution), or pipeline.{backbone.family.component}.register_to_config(sample_size=PIXELS // 8)"
        )
    return (size if isinstance(size, int) else min(size)) * backbone.pipeline.vae_scale_factor


def _default_side(backbone: Backbone) -> int:
    """A pipeline that says the side of its latents."""
    return backbone.pipeline.default_sample_size * backbone.pipeline.vae_scale_factor


def _cross_attention(backbone: Backbone, names: Sequence[str]) -> set[str]:
    """Keys and values of the cross-attentions."""
    return {
        f"{name}.{projection}"
        for name, _, module in own_modules(backbone.denoiser)
        if getattr(module, "is_cross_attention", False)
        and module.added_kv_proj_dim is None
        and module.norm_cross is None
        for projection in ("to_k", "to_v")
    }


def _named(*layers: str) -> Callable[[Backbone, Sequence[str]], set[str]]:
    return lambda backbone, names: set(layers) & set(names)


# --- Stable Diffusion 1.x and 2.x, DigitCanvas -----------------------------------------------------------------------

DISTILLED_GUIDANCE = 8.5
"""The guidance scale that a distilled denoiser (LCM: `time_cond_proj_dim`) is told while it is trained: the one that
LatentConsistencyModelPipeline draws with unless told otherwise."""


def _refuse_other_inputs(backbone: Backbone, *known: tuple[str, str]) -> None:
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


def _encode_sd(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    embeddings, _ = pipeline.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeddings}


def _told_guidance(backbone: DdpmBackbone, noised: Tensor) -> dict[str, Tensor]:
    """What a denoiser distilled from guided drawing is told beside the time."""
    if (width := backbone.denoiser.config.time_cond_proj_dim) is None:
        return {}
    told = torch.full((len(noised),), DISTILLED_GUIDANCE - 1, dtype=torch.float32, device="cpu")
    condition = backbone.pipeline.get_guidance_scale_embedding(told, embedding_dim=width)
    return {"timestep_cond": condition.to(noised.device, noised.dtype)}


_UNET_READER = Reader(
    _cross_attention,
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
    encode=_encode_sd,
    call=lambda backbone, conditioning, negative, guidance: {
        "prompt_embeds": conditioning["prompt_embeds"],
        "negative_prompt_embeds": negative["prompt_embeds"],
        "guidance_scale": guidance,
    },
    forward=lambda backbone, noised, times, conditioning: {
        "encoder_hidden_states": conditioning["prompt_embeds"],
        **_told_guidance(backbone, noised),
    },
    resolution=_latent_side,
    vae=_SCALED,
    readers={"prompt": _UNET_READER},
    refuse=_refuse_other_inputs,
)


# --- Stable Diffusion XL ---------------------------------------------------------------------------------------------


def _encode_sdxl(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}


def _negative_sdxl(backbone: Backbone) -> Conditioning:
    """Zeros, where the pipeline takes them for an empty prompt."""
    empty = backbone.encode_prompts([""])
    if not backbone.pipeline.config.get("force_zeros_for_empty_prompt"):
        return empty
    return Conditioning({name: torch.zeros_like(value) for name, value in empty.items()})


def _forward_sdxl(backbone: DdpmBackbone, noised: Tensor, times: Tensor, conditioning: Conditioning) -> dict[str, Any]:
    embeddings, pooled = conditioning["prompt_embeds"], conditioning["pooled_prompt_embeds"]
    height, width = (size * backbone.pipeline.vae_scale_factor for size in noised.shape[2:])
    # Original size, crop and target size (SDXL, arXiv 2307.01952, section 2.2), as the pipeline tells them.
    sizes = torch.tensor([height, width, 0, 0, height, width]).to(embeddings).expand(len(noised), -1)
    return {
        "encoder_hidden_states": embeddings,
        "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes},
        **_told_guidance(backbone, noised),
    }


def _refuse_refiner(backbone: Backbone) -> None:
    if getattr(backbone.pipeline, "text_encoder", None) is None and backbone.pipeline.config.get(
        "requires_aesthetics_score"
    ):
        raise FadeError(
            "this is SDXL's refiner, which finishes pictures that another model begins: unlearn on the base model"
        )
    if backbone.denoiser.config.addition_embed_type != "text_time":
        raise FadeError("this UNet takes no pooled prompt and no sizes, so it is none of SDXL's")
    _refuse_other_inputs(backbone, ("addition_embed_type", "text_time"))


SDXL = Family(
    name="Stable Diffusion XL",
    kind="ddpm",
    pipeline="StableDiffusionXLPipeline",
    denoiser="UNet2DConditionModel",
    component="unet",
    parts=("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler"),
    since="0.18",
    encoders=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    encode=_encode_sdxl,
    call=lambda backbone, conditioning, negative, guidance: {
        **conditioning,
        **{f"negative_{name}": value for name, value in negative.items()},
        "guidance_scale": guidance,
    },
    forward=_forward_sdxl,
    negative=_negative_sdxl,
    guidance=5.0,
    resolution=_latent_side,
    readers={"prompt": _UNET_READER},
    refuse=_refuse_refiner,
)


# --- PixArt-Sigma ----------------------------------------------------------------------------------------------------


def _default(pipeline: Any, name: str) -> Any:
    """What the pipeline's `__call__` takes for an argument that it is not given."""
    return inspect.signature(pipeline.__call__).parameters[name].default


def _encode_as_called(pipeline: Any, prompts: list[str], device: torch.device, **given: Any) -> tuple[Any, ...]:
    """What `encode_prompt` gives, without guidance, for the arguments that `__call__` gives it: their defaults differ
    in lengths and instructions, and people draw with the latter's."""
    called = inspect.signature(pipeline.__call__).parameters
    own = inspect.signature(pipeline.encode_prompt).parameters
    shared = {name: one.default for name, one in called.items() if name in own and one.kind is not one.VAR_KEYWORD}
    given = {"prompt": prompts, "device": device, "do_classifier_free_guidance": False, **given}
    return pipeline.encode_prompt(**{**shared, **{name: value for name, value in given.items() if name in own}})


def _encode_masked(pipeline: Any, prompts: list[str], device: torch.device, **given: Any) -> dict[str, Rows]:
    embeddings, mask, *_ = _encode_as_called(pipeline, prompts, device, **given)
    return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}


def _call_unbinned(
    backbone: Backbone, conditioning: Conditioning, negative: Conditioning, guidance: float
) -> dict[str, Any]:
    """Sides as they are asked for, not those of the nearest of the trained shapes; no negative prompt as text, which
    is an empty one by default."""
    return {
        **SDXL.call(backbone, conditioning, negative, guidance),
        "negative_prompt": None,
        "use_resolution_binning": False,
    }


def _cleaned(pipeline: Any, prompt: str) -> str:
    """A prompt as pipelines with a `clean_caption` tokenize it."""
    return pipeline._text_preprocessing(prompt, clean_caption=_default(pipeline, "clean_caption"))[0]


_PIXART_ALPHA = (
    "draws with PixArt-Alpha, which reads 120 tokens and may be told the picture's size; that is not supported: use "
    "PixArt-Sigma"
)


def _refuse_pixart_alpha(backbone: Backbone) -> None:
    if backbone.denoiser.use_additional_conditions:
        raise FadeError(f"this pipeline {_PIXART_ALPHA}")


PIXART_SIGMA = Family(
    name="PixArt-Sigma",
    kind="ddpm",
    pipeline="PixArtSigmaPipeline",
    denoiser="PixArtTransformer2DModel",
    parts=("tokenizer", "text_encoder", "vae", "transformer", "scheduler"),
    since="0.28",
    encode=_encode_masked,
    call=_call_unbinned,
    forward=lambda backbone, noised, times, conditioning: {
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "encoder_attention_mask": conditioning["prompt_attention_mask"],
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
    guidance=4.5,
    multiple=lambda backbone: max(8, backbone.pipeline.vae_scale_factor * backbone.denoiser.config.patch_size),
    resolution=_latent_side,
    readers={
        "prompt": Reader(
            _cross_attention,
            lambda backbone, conditioning: backbone.denoiser.caption_projection(conditioning["prompt_embeds"]),
            (Segment("tokenizer", text=_cleaned),),
            mask="prompt_attention_mask",
        )
    },
    refuse=_refuse_pixart_alpha,
    foreign={"PixArtAlphaPipeline": _PIXART_ALPHA},
)


# --- Stable Diffusion 3, 3.5 -----------------------------------------------------------------------------------------


def _encode_sd3(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        prompt=prompts, prompt_2=None, prompt_3=None, device=device, do_classifier_free_guidance=False
    )
    return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}


def _prompt(backbone: Backbone, conditioning: Conditioning) -> Tensor:
    return _stack(conditioning["prompt_embeds"])


def _pooled(backbone: Backbone, conditioning: Conditioning) -> Tensor:
    return conditioning["pooled_prompt_embeds"][:, None]


def _targets_sd3(backbone: Backbone) -> tuple[str, ...]:
    """The last block drops what becomes of the text, and with it what the text asks for."""
    others = tuple(name for name in JOINT_PROJECTIONS if name != "add_q_proj")
    blocks = range(backbone.denoiser.config.num_layers - 1)
    return (*others, *(f"transformer_blocks.{block}.attn.add_q_proj" for block in blocks))


SD3 = Family(
    name="Stable Diffusion 3/3.5",
    kind="flow",
    pipeline="StableDiffusion3Pipeline",
    denoiser="SD3Transformer2DModel",
    parts=(
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
        "transformer",
        "scheduler",
    ),
    since="0.29",
    encoders=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    encode=_encode_sd3,
    call=SDXL.call,
    forward=lambda backbone, noised, times, conditioning: {
        "hidden_states": noised,
        "timestep": 1000 * times,
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "pooled_projections": conditioning["pooled_prompt_embeds"],
    },
    guidance=7.0,
    multiple=lambda backbone: backbone.pipeline.vae_scale_factor * backbone.denoiser.config.patch_size,
    largest=lambda backbone: SD3.multiple(backbone) * backbone.denoiser.config.pos_embed_max_size,
    resolution=_latent_side,
    targets=_targets_sd3,
    readers={
        "prompt": Reader(_named("context_embedder"), _prompt, (Segment("tokenizer", 77), Segment("tokenizer_3"))),
        "pooled": Reader(_named("time_text_embed.text_embedder.linear_1"), _pooled, ()),
    },
)


# --- FLUX.1, EmojiCanvas ---------------------------------------------------------------------------------------------


def _encode_flux(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    length = {} if (most := text_length(pipeline)) is None else {"max_sequence_length": most}
    embeddings, pooled, _ = pipeline.encode_prompt(prompt=prompts, prompt_2=None, device=device, **length)
    return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}


def text_length(pipeline: Any) -> int | None:
    """Tokens that prompts are padded to, where the model was trained on fewer than its family: the text tokenizer's
    own limit, if that is lower than what the pipeline pads to."""
    limit = getattr(getattr(pipeline, "tokenizer_2", None), "model_max_length", None)
    return limit if limit is not None and limit < 512 else None


def _forward_flux(backbone: Backbone, noised: Tensor, times: Tensor, conditioning: Conditioning) -> dict[str, Any]:
    height, width = noised.shape[2] // 2, noised.shape[3] // 2
    embeddings = conditioning["prompt_embeds"]
    told = {}
    if backbone.denoiser.config.guidance_embeds:
        # What people draw with, for teacher and student alike: neither is asked for the data's velocity.
        told["guidance"] = torch.full((len(noised),), backbone.guidance, device=noised.device)
    return {
        "hidden_states": pack(noised),
        "timestep": rounded(noised, times),
        "encoder_hidden_states": embeddings,
        "pooled_projections": conditioning["pooled_prompt_embeds"],
        "txt_ids": torch.zeros(embeddings.shape[1], 3, device=noised.device, dtype=noised.dtype),
        "img_ids": grid_ids(height, width, noised.device, noised.dtype),
        **told,
    }


def _call_flux(
    backbone: Backbone, conditioning: Conditioning, negative: Conditioning, guidance: float
) -> dict[str, Any]:
    """Of a model that is told its guidance, that; of another, classifier-free guidance where it is above 1."""
    arguments: dict[str, Any] = dict(conditioning)
    if (most := text_length(backbone.pipeline)) is not None:
        arguments["max_sequence_length"] = most
    if backbone.denoiser.config.guidance_embeds:
        return {**arguments, "guidance_scale": guidance}
    if guidance > 1:
        arguments |= {f"negative_{name}": value for name, value in negative.items()}
    return {**arguments, "true_cfg_scale": guidance}


def _unpacked(backbone: Backbone, output: Any, noised: Tensor) -> Tensor:
    return unpack(output[0], *noised.shape[2:])


def _unpacked_result(backbone: Backbone, latents: Tensor, side: int) -> Tensor:
    size = side // backbone.pipeline.vae_scale_factor
    return unpack(latents, size, size)


FLUX1 = Family(
    name="FLUX.1",
    kind="flow",
    pipeline="FluxPipeline",
    denoiser="FluxTransformer2DModel",
    parts=("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer"),
    since="0.30",
    encoders=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    encode=_encode_flux,
    call=_call_flux,
    forward=_forward_flux,
    output=_unpacked,
    unpack_result=_unpacked_result,
    guidance=3.5,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor,
    resolution=lambda backbone: backbone.pipeline.vae.config.sample_size,
    targets=JOINT_PROJECTIONS,
    readers={
        "prompt": Reader(_named("context_embedder"), _prompt, (Segment("tokenizer_2"),)),
        "pooled": Reader(_named("time_text_embed.text_embedder.linear_1"), _pooled, ()),
    },
)


# --- Chroma ----------------------------------------------------------------------------------------------------------


def _encode_chroma(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    embeddings, _, mask, *_ = _encode_as_called(pipeline, prompts, device)
    return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}


def _forward_chroma(backbone: Backbone, noised: Tensor, times: Tensor, conditioning: Conditioning) -> dict[str, Any]:
    height, width = noised.shape[2] // 2, noised.shape[3] // 2
    mask = conditioning["prompt_attention_mask"]
    return {
        "hidden_states": pack(noised),
        "timestep": rounded(noised, times),
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "txt_ids": torch.zeros(mask.shape[1], 3, device=noised.device, dtype=noised.dtype),
        "img_ids": grid_ids(height, width, noised.device, noised.dtype),
        # A number as the pipeline's, which attention adds to its scores instead of masking (diffusers issue 12116):
        # people draw with this model, not with the one that was meant.
        "attention_mask": torch.cat([mask, mask.new_ones(len(noised), height * width)], dim=1),
    }


CHROMA = Family(
    name="Chroma",
    kind="flow",
    pipeline="ChromaPipeline",
    denoiser="ChromaTransformer2DModel",
    parts=("scheduler", "vae", "text_encoder", "tokenizer", "transformer"),
    since="0.34",
    encode=_encode_chroma,
    call=SDXL.call,
    forward=_forward_chroma,
    output=_unpacked,
    unpack_result=_unpacked_result,
    guidance=5.0,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor,
    resolution=_default_side,
    targets=JOINT_PROJECTIONS,
    readers={"prompt": Reader(_named("context_embedder"), _prompt)},
    checkpointing=False,  # its single blocks are not given the mask then
)


# --- Qwen-Image ------------------------------------------------------------------------------------------------------


def _encode_qwen(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    """Rows of their own lengths: nothing attends to the padding of the longest."""
    embeddings, mask = _encode_as_called(pipeline, prompts, device)
    lengths = [embeddings.shape[1]] * len(prompts) if mask is None else mask.sum(1).tolist()
    return {"prompt_embeds": tuple(row[:length] for row, length in zip(embeddings, lengths, strict=True))}


def _call_qwen(
    backbone: Backbone, conditioning: Conditioning, negative: Conditioning, guidance: float
) -> dict[str, Any]:
    def padded(rows: Rows, prefix: str) -> dict[str, Tensor]:
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows], True)
        return {f"{prefix}prompt_embeds": pad_sequence(list(rows), True), f"{prefix}prompt_embeds_mask": mask}

    arguments: dict[str, Any] = {"true_cfg_scale": guidance, **padded(conditioning["prompt_embeds"], "")}
    return arguments if guidance <= 1 else arguments | padded(negative["prompt_embeds"], "negative_")


def _encode_frame(vae: Any, pixels: Tensor) -> Any:
    """A picture is a video of one frame; its distribution without the axis of frames."""
    parameters = vae.encode(pixels[:, :, None]).latent_dist.parameters
    return AutoencoderKLOutput(DiagonalGaussianDistribution(parameters[:, :, 0]))


def _decode_frame(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]


def _targets_qwen(backbone: Backbone) -> tuple[str, ...]:
    """Without those of the last block whose answer, what becomes of the text, is dropped."""
    dropped = ("add_q_proj", "to_add_out")
    blocks = range(backbone.denoiser.config.num_layers - 1)
    return (
        *(name for name in JOINT_PROJECTIONS if name not in dropped),
        *(f"transformer_blocks.{block}.attn.{name}" for block in blocks for name in dropped),
    )


_QWEN_SEGMENT = Segment(
    "tokenizer",
    text=lambda pipeline, prompt: pipeline.prompt_template_encode.format(prompt),
    skip=lambda pipeline: pipeline.prompt_template_encode_start_idx,
)
"""A prompt in Qwen's chat template, of which the text encoder's output leaves out the beginning."""

_QWEN_EDITS = (
    "edits pictures or draws layers, so a prompt alone draws nothing: unlearn on the text-to-image model and load the "
    "adapter here with check_base=False"
)


def _refuse_other_qwen(backbone: Backbone) -> None:
    for name in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
        if backbone.denoiser.config.get(name):
            raise FadeError(f"this Qwen-Image denoiser ({name}=True) {_QWEN_EDITS}")


QWEN_IMAGE = Family(
    name="Qwen-Image",
    kind="flow",
    pipeline="QwenImagePipeline",
    denoiser="QwenImageTransformer2DModel",
    parts=("scheduler", "vae", "text_encoder", "tokenizer", "transformer"),
    since="0.35",
    encode=_encode_qwen,
    call=_call_qwen,
    forward=lambda backbone, noised, times, conditioning: {
        "hidden_states": pack(noised),
        "timestep": rounded(noised, times),
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "img_shapes": [[(1, noised.shape[2] // 2, noised.shape[3] // 2)]] * len(noised),
    },
    output=_unpacked,
    unpack_result=_unpacked_result,
    # Without a negative prompt the pipeline is not guided; the model's authors give it a space.
    negative=lambda backbone: backbone.encode_prompts([" "]),
    guidance=4.0,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor,
    resolution=_default_side,
    vae=Vae(encode=_encode_frame, decode=_decode_frame),
    targets=_targets_qwen,
    readers={
        "prompt": Reader(
            _named("txt_in"),
            lambda backbone, conditioning: backbone.denoiser.txt_norm(conditioning["prompt_embeds"]),
            (_QWEN_SEGMENT,),
        )
    },
    refuse=_refuse_other_qwen,
    foreign=dict.fromkeys(
        (
            "QwenImageEditPipeline",
            "QwenImageEditInpaintPipeline",
            "QwenImageEditPlusPipeline",
            "QwenImageLayeredPipeline",
        ),
        _QWEN_EDITS,
    ),
)


# --- Sana ------------------------------------------------------------------------------------------------------------


def _instruction(pipeline: Any) -> list[str] | None:
    """The lines that Sana's pipeline puts in front of every prompt."""
    return _default(pipeline, "complex_human_instruction")


def _instructed(pipeline: Any, prompt: str) -> str:
    return "\n".join(_instruction(pipeline) or ()) + _cleaned(pipeline, prompt)


def _skipped_sana(pipeline: Any) -> int:
    """Of the instruction, the pipeline keeps the first and the last token alone: two that all prompts share."""
    instruction = _instruction(pipeline)
    return len(pipeline.tokenizer.encode("\n".join(instruction))) - 2 if instruction else 0


def _states_sana(backbone: Backbone, conditioning: Conditioning) -> Tensor:
    denoiser = backbone.denoiser
    return denoiser.caption_norm(denoiser.caption_projection(conditioning["prompt_embeds"]))


_SPRINT = (
    "draws with Sana-Sprint, distilled to few steps of another diffusion (TrigFlow) than the one trained here: unlearn "
    "on Sana and load the adapter here with check_base=False"
)


def _refuse_sprint(backbone: Backbone) -> None:
    if backbone.denoiser.config.guidance_embeds:
        raise FadeError(f"this pipeline {_SPRINT}")


SANA = Family(
    name="Sana",
    kind="flow",
    pipeline="SanaPipeline",
    denoiser="SanaTransformer2DModel",
    parts=("tokenizer", "text_encoder", "vae", "transformer", "scheduler"),
    since="0.32",
    encode=_encode_masked,
    call=_call_unbinned,
    forward=lambda backbone, noised, times, conditioning: {
        "hidden_states": noised,
        "timestep": 1000 * times.to(noised.device) * backbone.denoiser.config.timestep_scale,
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "encoder_attention_mask": conditioning["prompt_attention_mask"],
    },
    # The pipeline gives the negative prompt no instruction.
    negative=lambda backbone: backbone.encoded(
        lambda *given: _encode_masked(*given, complex_human_instruction=None), [""]
    ),
    guidance=4.5,
    multiple=lambda backbone: max(32, backbone.pipeline.vae_scale_factor * backbone.denoiser.config.patch_size),
    resolution=_latent_side,
    readers={
        "prompt": Reader(
            _cross_attention,
            _states_sana,
            (Segment("tokenizer", text=_instructed, skip=_skipped_sana),),
            mask="prompt_attention_mask",
        )
    },
    refuse=_refuse_sprint,
    foreign=dict.fromkeys(("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"), _SPRINT),
)


# --- AuraFlow --------------------------------------------------------------------------------------------------------


def _encode_aura(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    return {"prompt_embeds": _encode_as_called(pipeline, prompts, device)[0]}


def _call_aura(
    backbone: Backbone, conditioning: Conditioning, negative: Conditioning, guidance: float
) -> dict[str, Any]:
    """With masks, which the pipeline asks for and has no use for: what they mask is zero in the embeddings."""
    arguments = SDXL.call(backbone, conditioning, negative, guidance)
    masks = {
        name.replace("embeds", "attention_mask"): torch.ones(value.shape[:2], device=value.device)
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    }
    return arguments | masks


def _largest_aura(backbone: Backbone) -> int:
    """What its square table of positions has places for."""
    config = backbone.denoiser.config
    return math.isqrt(config.pos_embed_max_size) * config.patch_size * backbone.pipeline.vae_scale_factor


AURAFLOW = Family(
    name="AuraFlow",
    kind="flow",
    pipeline="AuraFlowPipeline",
    denoiser="AuraFlowTransformer2DModel",
    parts=("tokenizer", "text_encoder", "vae", "transformer", "scheduler"),
    since="0.30",
    encode=_encode_aura,
    call=_call_aura,
    forward=lambda backbone, noised, times, conditioning: {
        "hidden_states": noised,
        "timestep": times.to(noised.device, noised.dtype),
        "encoder_hidden_states": conditioning["prompt_embeds"],
    },
    guidance=3.5,
    multiple=lambda backbone: backbone.pipeline.vae_scale_factor * backbone.denoiser.config.patch_size,
    largest=_largest_aura,
    resolution=lambda backbone: min(1024, _largest_aura(backbone)),
    targets=JOINT_PROJECTIONS,
    readers={"prompt": Reader(_named("context_embedder"), _prompt)},
)


# --- Lumina 2 --------------------------------------------------------------------------------------------------------


def _encode_negative_lumina(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    """As negatives, which the pipeline gives no system prompt."""
    _, _, embeddings, mask = _encode_as_called(
        pipeline, prompts, device, negative_prompt=prompts, do_classifier_free_guidance=True
    )
    return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}


def _caption_lumina(backbone: Backbone, conditioning: Conditioning) -> Tensor:
    return backbone.denoiser.time_caption_embed.caption_embedder[0](conditioning["prompt_embeds"])


LUMINA2 = Family(
    name="Lumina 2",
    kind="flow",
    pipeline="Lumina2Pipeline",
    denoiser="Lumina2Transformer2DModel",
    parts=("transformer", "scheduler", "vae", "text_encoder", "tokenizer"),
    since="0.33",
    encode=_encode_masked,
    call=SDXL.call,
    forward=lambda backbone, noised, times, conditioning: {
        "hidden_states": noised,
        "timestep": 1 - times.to(noised.device),
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "encoder_attention_mask": conditioning["prompt_attention_mask"],
    },
    output=lambda backbone, output, noised: -output[0],
    negative=lambda backbone: backbone.encoded(_encode_negative_lumina, [""]),
    guidance=4.0,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor,
    resolution=_default_side,
    readers={
        "prompt": Reader(
            _named("time_caption_embed.caption_embedder.1"),
            _caption_lumina,
            (Segment("tokenizer", text=lambda pipeline, prompt: f"{pipeline.system_prompt} <Prompt Start> {prompt}"),),
            mask="prompt_attention_mask",
        )
    },
)


# --- Z-Image ---------------------------------------------------------------------------------------------------------


def _encode_z_image(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    embeddings, _ = pipeline.encode_prompt(list(prompts), device, do_classifier_free_guidance=False)
    return {"prompt_embeds": tuple(embeddings)}


def _z_image_text(pipeline: Any, prompt: str) -> str:
    """What the pipeline tokenizes of a prompt."""
    message = [{"role": "user", "content": prompt}]
    return pipeline.tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )


def _z_image_states(backbone: Backbone, conditioning: Conditioning) -> Tensor:
    """The prompt, normalised. Its linear layer reads each token alone, so that padding is no part of it."""
    return backbone.denoiser.cap_embedder[0](_stack(conditioning["prompt_embeds"]))


def _guidance_z_image(backbone: Backbone) -> float:
    """None for Turbo, which was distilled from guided drawing; its scheduler's shift (3; the base model's is 6) is all
    that tells it apart."""
    return 5.0 if backbone.pipeline.scheduler.config.get("shift", 1.0) > 3 else 1.0


Z_IMAGE = Family(
    name="Z-Image",
    kind="flow",
    pipeline="ZImagePipeline",
    denoiser="ZImageTransformer2DModel",
    parts=("scheduler", "vae", "text_encoder", "tokenizer", "transformer"),
    since="0.36",
    encode=_encode_z_image,
    # The pipeline adds guidance_scale times the difference to the answer for the prompt, and nothing at 0.
    call=lambda backbone, conditioning, negative, guidance: {
        "prompt_embeds": list(conditioning["prompt_embeds"]),
        "negative_prompt_embeds": list(negative["prompt_embeds"]),
        "guidance_scale": max(guidance - 1, 0.0),
    },
    forward=lambda backbone, noised, times, conditioning: {
        "x": list(noised[:, :, None]),
        "t": 1 - times.to(noised.device),
        "cap_feats": list(conditioning["prompt_embeds"]),
    },
    output=lambda backbone, output, noised: -torch.stack(output[0]).squeeze(2),
    unpack_result=lambda backbone, latents, side: latents.to(backbone.dtype),
    guidance=_guidance_z_image,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor,
    resolution=lambda backbone: backbone.pipeline.vae.config.sample_size,
    readers={
        "prompt": Reader(
            _named("cap_embedder.1"), _z_image_states, (Segment("tokenizer", text=_z_image_text),), padded=32
        )
    },
)


# --- CogView4 --------------------------------------------------------------------------------------------------------


def _encode_cogview4(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Rows]:
    embeddings, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=device)
    return {"prompt_embeds": embeddings}


def _forward_cogview4(backbone: Backbone, noised: Tensor, times: Tensor, conditioning: Conditioning) -> dict[str, Any]:
    sides = (size * backbone.pipeline.vae_scale_factor for size in noised.shape[2:])
    size = torch.tensor([*sides]).to(conditioning["prompt_embeds"]).expand(len(noised), -1)
    steps = backbone.pipeline.scheduler.config.num_train_timesteps
    return {
        "hidden_states": noised,
        "encoder_hidden_states": conditioning["prompt_embeds"],
        "timestep": steps * times.to(noised.device),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
    }


def _shift_cogview4(backbone: Backbone, tokens: int) -> float:
    """As the pipeline has it: linear in the root of the tokens."""
    config = backbone.pipeline.scheduler.config
    root = (tokens / config.get("base_image_seq_len", 256)) ** 0.5
    return config.get("base_shift", 0.25) + config.get("max_shift", 0.75) * root


COGVIEW4 = Family(
    name="CogView4",
    kind="flow",
    pipeline="CogView4Pipeline",
    denoiser="CogView4Transformer2DModel",
    parts=("tokenizer", "text_encoder", "vae", "transformer", "scheduler"),
    since="0.33",
    encode=_encode_cogview4,
    call=lambda backbone, conditioning, negative, guidance: {
        "prompt_embeds": _stack(conditioning["prompt_embeds"]),
        "negative_prompt_embeds": _stack(negative["prompt_embeds"]),
        "guidance_scale": guidance,
    },
    forward=_forward_cogview4,
    unpack_result=lambda backbone, latents, side: latents.to(backbone.dtype),
    guidance=5.0,
    shift=_shift_cogview4,
    told_share=True,
    # What the pipeline refuses, and what the denoiser's patches take.
    multiple=lambda backbone: math.lcm(16, backbone.pipeline.vae_scale_factor * backbone.denoiser.config.patch_size),
    resolution=_latent_side,
    readers={
        "prompt": Reader(
            _named("patch_embed.text_proj"), _prompt, (Segment("tokenizer", padded_before=lambda pipeline: 16),)
        ),
    },
    one_by_one=True,
)


# --- FLUX.2 ----------------------------------------------------------------------------------------------------------

_FLUX2_VAE = Vae(normalise=flux2.normalise, denormalise=flux2.denormalise)
_FLUX2_PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")

FLUX2 = Family(
    name="FLUX.2",
    kind="flow",
    pipeline="Flux2Pipeline",
    denoiser="Flux2Transformer2DModel",
    parts=_FLUX2_PARTS,
    since="0.36",
    encode=flux2.encode,
    call=flux2.call_dev,
    forward=flux2.forward,
    output=flux2.output,
    unpack_result=flux2.unpack_result,
    guidance=4.0,
    shift=flux2.shift,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor,
    resolution=lambda backbone: backbone.pipeline.vae.config.sample_size,
    vae=_FLUX2_VAE,
    targets=flux2.targets,
    readers={
        "prompt": Reader(
            _named("context_embedder"),
            _prompt,
            (Segment("tokenizer", tokens=flux2.tokens_dev, padded_before=flux2.padded_before),),
        )
    },
)

FLUX2_KLEIN = dataclasses.replace(
    FLUX2,
    name="FLUX.2 klein",
    pipeline="Flux2KleinPipeline",
    classes={"text_encoder": "Qwen3ForCausalLM"},
    kept=("is_distilled",),
    since="0.37",
    call=flux2.call_klein,
    guidance=flux2.guidance_klein,
    readers={
        "prompt": Reader(
            _named("context_embedder"),
            _prompt,
            (Segment("tokenizer", text=flux2.text_klein, padded_before=flux2.padded_before),),
        )
    },
)


# --- HiDream-I1 ------------------------------------------------------------------------------------------------------


def _readers_hidream(backbone: Backbone) -> dict[str, Reader]:
    """T5, the pooled states of both CLIPs, and each layer of Llama that is read: the closed form solves for each apart,
    and holds some matrices of the width of its states for each."""

    def of_layer(layer: int, projections: tuple[str, ...]) -> Reader:
        return Reader(
            _named(*projections),
            lambda backbone, conditioning: conditioning["prompt_embeds_llama3"][:, layer],
            (Segment("tokenizer_4", padded_before=hidream.padded_before("tokenizer_4")),),
        )

    last = len(backbone.denoiser.caption_projection) - 1
    return {
        "prompt": Reader(
            _named(f"caption_projection.{last}.linear"),
            lambda backbone, conditioning: conditioning["prompt_embeds_t5"],
            (Segment("tokenizer_3"),),
        ),
        "pooled": Reader(_named("p_embedder.pooled_embedder.linear_1"), _pooled, ()),
        **{f"llama.{layer}": of_layer(layer, names) for layer, names in hidream.llama_layers(backbone).items()},
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
    encode=hidream.encode,
    call=hidream.call,
    forward=hidream.forward,
    output=lambda backbone, output, noised: -output[0],
    guidance=5.0,
    shift=hidream.shift,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor,
    sides=hidream.side,
    resolution=lambda backbone: hidream.side(backbone)[0],
    targets=("to_q", "to_k", "to_v", "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t"),
    readers=_readers_hidream,
    prepare=hidream.let_gradients_through_experts,
)  # fmt: skip


# --- Kandinsky 5 -----------------------------------------------------------------------------------------------------

KANDINSKY5 = Family(
    name="Kandinsky 5",
    kind="flow",
    pipeline="Kandinsky5T2IPipeline",
    denoiser="Kandinsky5Transformer3DModel",
    parts=("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"),
    classes={"vae": "AutoencoderKL"},  # not a video's
    since="0.36",
    encoders=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    encode=kandinsky5.encode,
    call=kandinsky5.call,
    forward=kandinsky5.forward,
    output=lambda backbone, output, noised: kandinsky5.channels_first(output),
    unpack_result=lambda backbone, latents, side: kandinsky5.channels_first(latents),
    guidance=3.5,
    multiple=lambda backbone: 2 * backbone.pipeline.vae_scale_factor_spatial,
    sides=kandinsky5.sides,
    resolution=lambda backbone: kandinsky5.sides(backbone)[0],
    # The pipeline leaves out the shift of the VAE's config.
    vae=Vae(
        normalise=lambda vae, latents: latents * vae.config.scaling_factor,
        denormalise=lambda vae, latents: latents / vae.config.scaling_factor,
    ),
    targets=(
        "to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer",
    ),
    readers={
        "prompt": Reader(
            _named("text_embeddings.in_layer"),
            lambda backbone, conditioning: _stack(conditioning["prompt_embeds_qwen"]),
            (
                Segment(
                    "tokenizer", text=kandinsky5.text, skip=lambda pipeline: pipeline.prompt_template_encode_start_idx
                ),
            ),
        ),
        "pooled": Reader(
            _named("pooled_text_embeddings.in_layer"),
            lambda backbone, conditioning: conditioning["prompt_embeds_clip"][:, None],
            (),
        ),
    },
    refuse=kandinsky5.refuse,
    one_by_one=True,
)  # fmt: skip


# --- HunyuanImage 2.1 ------------------------------------------------------------------------------------------------

HUNYUAN_IMAGE = Family(
    name="HunyuanImage 2.1",
    kind="flow",
    pipeline="HunyuanImagePipeline",
    denoiser="HunyuanImageTransformer2DModel",
    parts=("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer"),
    since="0.36",
    encoders=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    encode=hunyuan_image.encode,
    call=lambda backbone, conditioning, negative, guidance: {
        **conditioning,
        **{f"negative_{name}": value for name, value in negative.items()},
    },
    forward=hunyuan_image.forward,
    guidance=hunyuan_image.guidance,
    guided=hunyuan_image.guided,
    resolution=_default_side,
    targets=JOINT_PROJECTIONS,
    # Not the embedder of quoted texts (`context_embedder_2`): most prompts quote none, and a concept is more than a
    # text that is to be written.
    readers={
        "prompt": Reader(_named("context_embedder.proj_in"), _prompt, (_QWEN_SEGMENT,), mask="prompt_embeds_mask"),
        "pooled": Reader(_named("context_embedder.time_text_embed.text_embedder.linear_1"), hunyuan_image.pooled, ()),
    },
    refuse=hunyuan_image.refuse,
    checkpointing=False,  # diffusers' own function for it does not take the arguments that this denoiser gives it
    one_by_one=True,  # one quoted text in a batch has the pipeline guide all of it otherwise
)


FAMILIES: tuple[Family, ...] = (
    SDXL,
    STABLE_DIFFUSION,
    PIXART_SIGMA,
    SD3,
    FLUX1,
    CHROMA,
    QWEN_IMAGE,
    SANA,
    AURAFLOW,
    LUMINA2,
    Z_IMAGE,
    COGVIEW4,
    FLUX2_KLEIN,
    FLUX2,
    HIDREAM,
    KANDINSKY5,
    HUNYUAN_IMAGE,
)
"""Where pipelines of two families share the denoiser's class, the one with more parts, or with `classes`, first."""
