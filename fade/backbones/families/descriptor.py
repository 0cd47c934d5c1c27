"""What differs from one model family to another, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fade.backbones.base import MOST_PIXELS
from fade.conditioning import Conditioning, Rows

if TYPE_CHECKING:
    from fade.backbones.base import Backbone

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
        prompt_shapes: the same tensors' shapes without the first dimension, from configurations alone: what planning
            knows of a prompt. A name with `mask` in it is of integers, or, with number_masks, of the model's dtype.
        own_lengths: prompts keep their own lengths, so that rows are tensors of their own; reads_lengths: the denoiser
            reads from the mask how long each is.
        asked_twice: guided, the pipeline asks the denoiser twice in turn, not once about a batch of both.
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
    prompt_shapes: Callable[[Backbone], dict[str, tuple[int, ...]]]
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
    own_lengths: bool = False
    reads_lengths: bool = False
    asked_twice: bool = False
    number_masks: bool = False

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
