"""What the two stages need of a pipeline, whatever its family: prompts encoded, pictures encoded and decoded, latents
noised, the denoiser asked, latents drawn by the pipeline itself.

`ddpm.py` and `flow.py` say what a time is and how it noises; `families/` says what differs from family to family.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConsistencyDecoderVAE
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from PIL import Image
from torch import Tensor, nn

from fade import processes
from fade.backbones.parts import execution_device, is_managed, tensors, unwrapped
from fade.base_model import own_modules
from fade.conditioning import Conditioning, Rows
from fade.errors import FadeError
from fade.images import square
from fade.progress import track

if TYPE_CHECKING:
    from fade.backbones.families import Family, Reader

_tokenizing = threading.Lock()
"""A tokenizer, which pipelines may share, keeps padding and truncation as state: one thread must not set another's."""

NO_GRADIENTS = {one.value for one in AttentionBackendName if one.value.lstrip("_").startswith(("native_cudnn", "sage"))}
"""Attention whose gradients are wrong (cuDNN's: `fade.modes`) or that has none (SageAttention computes in 8 bits)."""

MOST_TOKENS_AT_ONCE = 64 * 77
"""Tokens of prompts that are encoded at once: 64 prompts of CLIP's length, 9 of 512 tokens. T5-XXL takes about 0.3 GB
for each of these beside its weights."""

MOST_PIXELS = 8192
"""Side of an image; attention over more takes more memory than there is."""


class Backbone(ABC):
    """A pipeline of a known family. Holds no state of its own but what it derives from the pipeline's configuration.

    Latents are [n, C, h, w] (unpacked, whatever the denoiser eats), normalised as the denoiser was trained, and
    conditionings (`fade.conditioning`) have a row for each prompt; both in the denoiser's dtype and on the device it
    computes on. A time is a tensor [n] of the family's own type, from 0 (a picture) to `time_span` (noise). Raises
    FadeError for a denoiser that needs more than noised latents, a time and a prompt: such a pipeline takes adapters,
    but cannot be unlearned here.
    """

    time_span: float

    def __init__(self, pipeline: Any, family: Family) -> None:
        self.pipeline, self.family = pipeline, family
        if type(self.denoiser).__name__ != family.denoiser:
            raise FadeError(
                f"{type(pipeline).__name__} has no {family.denoiser} as its {family.component}, so it cannot be used "
                "here"
            )
        if family.refuse is not None:
            family.refuse(self)
        if family.prepare is not None:
            family.prepare(self)

    # --- the denoiser ------------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser itself, also where torch.compile or data parallelism wraps it; `predict` calls the wrapper."""
        wrapped = getattr(self.pipeline, self.family.component, None)
        return unwrapped(wrapped) if wrapped is not None else None

    @property
    def called_denoiser(self) -> Any:
        """The denoiser as the pipeline calls it: inside what torch.compile or data parallelism put around it."""
        return getattr(self.pipeline, self.family.component)

    @property
    def device(self) -> torch.device:
        return execution_device(self.denoiser)

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    def tells_guidance(self) -> bool:
        """Whether the denoiser is told the guidance scale, instead of being asked twice."""
        return bool(self.denoiser.config.get("guidance_embeds"))

    @property
    def guidance(self) -> float:
        """The guidance scale that people draw with; 1 is no classifier-free guidance."""
        guidance = self.family.guidance
        return guidance(self) if callable(guidance) else guidance

    @property
    def targets(self) -> tuple[str, ...]:
        """Patterns of the layers that are edited unless the settings say others: the attention's projections."""
        targets = self.family.targets
        return targets(self) if callable(targets) else targets

    def check_trainable(self) -> None:
        """Raises FadeError where the pipeline's scheduler is none that the model can be trained with, where gradient
        checkpointing is on and would train on other answers than the denoiser gives, or where attention was asked of
        kernels without a backward pass that can be trusted."""
        if not self.family.checkpointing and getattr(self.denoiser, "is_gradient_checkpointing", False):
            raise FadeError(
                f"with gradient checkpointing {type(self.denoiser).__name__} does not answer as without, so that "
                f"training would be off; call pipeline.{self.family.component}.disable_gradient_checkpointing() first"
            )

        if untrusted := _attention_backends(self.denoiser) & NO_GRADIENTS:
            raise FadeError(
                f"attention is computed by {', '.join(sorted(untrusted))}, whose gradients are wrong or missing; call "
                f'pipeline.{self.family.component}.set_attention_backend("native") first'
            )

    def check_checkpointing(self) -> None:
        """Raises FadeError where gradient checkpointing would change the denoiser's answer, or is not there."""
        if not self.family.checkpointing or not getattr(self.denoiser, "_supports_gradient_checkpointing", False):
            raise FadeError(
                f"{self.family.name} cannot be trained with gradient checkpointing, with which "
                f"{type(self.denoiser).__name__} answers otherwise or not at all; leave it out"
            )

    @contextlib.contextmanager
    def gradient_checkpointing(self) -> Iterator[None]:
        """Gradient checkpointing on meanwhile. Raises FadeError as `check_checkpointing`."""
        self.check_checkpointing()
        if self.denoiser.is_gradient_checkpointing:
            yield
            return
        self.denoiser.enable_gradient_checkpointing()
        try:
            yield
        finally:
            self.denoiser.disable_gradient_checkpointing()

    # --- sizes -------------------------------------------------------------------------------------------------------

    @property
    def resolution(self) -> int:
        """Side in pixels of the images the model was trained on. Raises FadeError where its config does not say."""
        return self.family.resolution(self)

    def side(self, resolution: int | None) -> int:
        """Side in pixels of images to read or draw. Raises FadeError where latents cannot have it."""
        side, least = resolution or self.resolution, self.family.multiple(self)
        most = min(MOST_PIXELS, self.family.largest(self))
        if self.family.sides is not None and side not in (sides := self.family.sides(self)):
            raise FadeError(f"{self.family.name} draws squares of {', '.join(map(str, sides))} pixels, not of {side}")
        if side % least or not least <= side <= most:
            raise FadeError(f"resolution must be a multiple of {least} up to {most}, not {side}")
        return side

    # --- prompts -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], batch_size: int = 64) -> Conditioning:
        """A row for each prompt; textual-inversion tokens count. Raises FadeError where the pipeline was loaded without
        a text encoder."""
        return self.encoded(self.family.encode, prompts, batch_size)

    @torch.no_grad()
    def encoded(
        self,
        encode: Callable[[Any, list[str], torch.device], Mapping[str, Rows]],
        prompts: Sequence[str],
        batch_size: int = 64,
    ) -> Conditioning:
        """`encode_prompts` by another function of a pipeline, prompts and the device to encode on."""
        return self.encoded_with_gradients(encode, prompts, batch_size)

    def encoded_with_gradients(
        self,
        encode: Callable[[Any, list[str], torch.device], Mapping[str, Rows]],
        prompts: Sequence[str],
        batch_size: int = 64,
    ) -> Conditioning:
        """`encoded`, through which gradients pass where the caller's mode and the text encoders let them."""
        for name in self.family.encoders:
            self._part(name)
        size, parts = min(batch_size, self.prompts_at_once), []
        for start in range(0, len(prompts), size):
            with _tokenizing:
                encoded = encode(self.pipeline, list(prompts[start : start + size]), self._text_device())
            parts.append(Conditioning(encoded).to(self.device, self.dtype))
        return Conditioning.cat(parts)

    @property
    def prompts_at_once(self) -> int:
        """How many prompts are encoded together at most."""
        if self.family.one_by_one:
            return 1
        longest = max((shape[-2] for shape in self.family.prompt_shapes(self).values() if len(shape) > 1), default=1)
        return max(1, MOST_TOKENS_AT_ONCE // longest)

    def _text_device(self) -> torch.device:
        modules = [part for name in self.family.encoders if isinstance(part := self._part(name), nn.Module)]
        return execution_device(modules[0]) if modules else self.device

    def token_ids(self, prompts: Sequence[str], reader: str) -> list[list[tuple[list[int], int | None]]]:
        """Of each prompt and each segment of a reader's states, the token ids as the text encoder reads them (begin,
        words and end, with the padding in front, if there is, and without that behind), and how many of the states'
        tokens the segment has, None for the rest."""
        segments = []
        for segment in self.readers[reader].segments:
            if (tokenizer := getattr(self.pipeline, segment.tokenizer, None)) is None:
                continue  # a text encoder that the pipeline was loaded without
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
            with _tokenizing:
                if segment.tokens is not None:
                    ids = [segment.tokens(self.pipeline, prompt) for prompt in prompts]
                else:
                    convert = getattr(self.pipeline, "maybe_convert_prompt", lambda prompt, tokenizer: prompt)
                    texts = [segment.text(self.pipeline, convert(prompt, tokenizer)) for prompt in prompts]
                    ids = tokenizer(texts, truncation=True, max_length=tokenizer.model_max_length)["input_ids"]
            skip, before = segment.skip(self.pipeline), segment.padded_before(self.pipeline)
            front = [[tokenizer.pad_token_id] * (-len(one) % before) for one in ids]
            segments.append([([*pad, *one][skip:], segment.length) for pad, one in zip(front, ids, strict=True)])
        return [list(one) for one in zip(*segments, strict=True)] if segments else [[] for _ in prompts]

    @property
    def readers(self) -> Mapping[str, Reader]:
        """The layers that read the prompt alone, by a name."""
        readers = self.family.readers
        return readers(self) if callable(readers) else readers

    def text_layers(self) -> dict[str, frozenset[str]]:
        """By reader (a key of the family's `readers`), the names of the layers that read the prompt alone."""
        names = [name for name, _, _ in own_modules(self.denoiser)]
        found = {reader: frozenset(one.layers(self, names)) for reader, one in self.readers.items()}
        return {reader: layers for reader, layers in found.items() if layers}

    @torch.no_grad()
    def text_states(self, reader: str, conditioning: Conditioning) -> Tensor:
        """What a reader's layers read of a conditioning: [n, tokens, K]. Raises ValueError for rows that differ in
        size."""
        return self.readers[reader].states(self, conditioning.stacked())

    def attended(self, reader: str, conditioning: Conditioning) -> Tensor | None:
        """Which tokens of `text_states` the denoiser attends to, bool [n, tokens]; None for all, padding too."""
        mask = self.readers[reader].mask
        return None if mask is None else conditioning.stacked()[mask].bool()

    def negative(self) -> Conditioning:
        """What classifier-free guidance leads away from, one row, as a pipeline that is given no negative prompt has
        it: most often the empty prompt."""
        return self.encode_prompts([""]) if self.family.negative is None else self.family.negative(self)

    # --- pictures ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(
        self, images: Sequence[Image.Image], resolution: int | None, generator: torch.Generator
    ) -> Tensor:
        """Latents of images, cropped and resized to `resolution` (`fade.images.square`). The VAE runs in float32: in
        float16 it overflows."""
        side = self.side(resolution)
        pixels = self.pipeline.image_processor.preprocess(
            [square(image, side) for image in images], height=side, width=side
        )
        with self._vae_in_float32() as vae:
            encoded = self.family.vae.encode(vae, pixels.to(execution_device(vae), vae.dtype))
            if hasattr(encoded, "latent_dist"):
                mean, std = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
                noise = torch.randn(mean.shape, generator=generator, device="cpu", dtype=torch.float32)
                latents = mean + std * noise.to(mean.device)
            else:  # AutoencoderTiny, AutoencoderDC and VQ models have no distribution
                latents = (encoded.latents if hasattr(encoded, "latents") else encoded.latent).float()
            latents = self.family.vae.normalise(vae, latents)
        return latents.to(self.device, self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 64) -> Tensor:
        """Images [n, 3, H, W], float32 in [0, 1], on the CPU. A decoder that draws noise (ConsistencyDecoderVAE) draws
        the same for every image."""
        parts = []
        with self._vae_in_float32() as vae:
            draws = isinstance(unwrapped(vae), ConsistencyDecoderVAE)
            for chunk in latents.split(batch_size):
                plain = self.family.vae.denormalise(vae, chunk.float()).to(execution_device(vae), vae.dtype)
                noise = {"generator": [torch.Generator("cpu").manual_seed(0) for _ in chunk]} if draws else {}
                image = self.family.vae.decode(vae, plain, **noise).float()
                parts.append((image / 2 + 0.5).clamp(0, 1).cpu())
        return torch.cat(parts)

    # --- drawing -----------------------------------------------------------------------------------------------------

    def sample_latents(
        self,
        prompts: Sequence[str] | Conditioning,
        seeds: Sequence[int],
        steps: int = 20,
        guidance_scale: float | None = None,
        batch_size: int = 64,
        resolution: int | None = None,
        progress: bool = False,
        description: str = "sampling",
        on_step: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Latents [n, C, h, w] sampled by the pipeline. Image i depends on prompt i and `seeds[i]` alone.

        `prompts` are texts or a conditioning. In a run of several processes each draws a share of the batches, and all
        get all of them. `guidance_scale` None is the family's own. `on_step` is called before a
        batch's first step and after each of its steps, with the share of its steps that is done, in [0, 1]: it may
        switch adapters in between.

        Raises FadeError for settings out of range and where the pipeline cannot draw with its scheduler.
        """
        side = self.side(resolution)
        guidance_scale = self.guidance if guidance_scale is None else guidance_scale
        if not math.isfinite(guidance_scale):
            raise FadeError(f"the guidance scale must be a finite number, not {guidance_scale}")
        scheduler = self._part("scheduler")
        most = getattr(scheduler, "config", {}).get("num_train_timesteps") or steps
        # Such schedulers place the last step at a level of its own, and divide by zero where it is the first, too.
        least = 2 if getattr(scheduler, "config", {}).get("shift_terminal") else 1
        if not least <= steps <= most:
            raise FadeError(f"denoising steps must be between {least} and the model's {most}, not {steps}")
        if not all(0 <= seed < 2**63 for seed in (min(seeds, default=0), max(seeds, default=0))):
            raise FadeError("seeds must be between 0 and 2^63 - 1")
        if isinstance(prompts, Conditioning):
            encoded, negative = prompts.detach().to(self.device, self.dtype), self.negative()
            row = list(range(prompts.count))
        else:
            unique = sorted(set(prompts))
            if self.family.negative is None:  # in one batch: a text encoder's last bits depend on the batch
                both = self.encode_prompts([*unique, ""])
                encoded, negative = both, both.rows(len(unique))
            else:
                encoded, negative = self.encode_prompts(unique), self.negative()
            place = {prompt: index for index, prompt in enumerate(unique)}
            row = [place[prompt] for prompt in prompts]
        watch = {} if on_step is None else _told(self.pipeline, on_step)
        latents = []
        size = 1 if self.family.one_by_one else batch_size
        starts = range(0, len(row), size)
        with self._quiet(), self.without_encoders(), self.family.guided(self, guidance_scale):
            for start in track(processes.own(starts), description, progress):
                rows = row[start : start + size]
                generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + size]]
                if on_step is not None:
                    on_step(0.0)
                arguments = self.family.call(self, encoded.rows(rows), negative.repeat(len(rows)), guidance_scale)
                try:
                    result = self.pipeline(
                        **arguments, num_inference_steps=steps, height=side, width=side, generator=generators,
                        output_type="latent", **watch,
                    )  # fmt: skip
                # What a scheduler that does not suit the model raises, somewhere inside its step or the pipeline.
                except (ValueError, TypeError, AttributeError, NotImplementedError, IndexError) as error:
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    name = type(scheduler).__name__
                    raise FadeError(f"the pipeline cannot draw {steps} steps with {name}: {reason}") from error
                latents.append(self.family.unpack_result(self, result[0], side))
        return torch.cat(processes.in_order(latents, len(starts), self.device))

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int = 20,
        guidance_scale: float | None = None,
        batch_size: int = 64,
        progress: bool = False,
        description: str = "drawing",
    ) -> Tensor:
        """Images [n, 3, H, W], float32 in [0, 1], on the CPU: `sample_latents` decoded. No safety checker runs."""
        latents = self.sample_latents(
            prompts, seeds, steps, guidance_scale, batch_size, progress=progress, description=description
        )
        return self.decode(latents, batch_size)

    @abstractmethod
    def ode(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        steps: int,
        *,
        invert: bool = False,
        batch_size: int = 64,
        progress: bool = False,
        description: str = "drawing",
    ) -> Tensor:
        """Deterministic sampling without guidance, from noise to pictures or, with `invert`, back.

        Args:
            latents: [n, C, h, w]: noise to draw from, or with `invert` latents of pictures.
            conditioning: one row, or one for each latent.

        Returns float32 [n, C, h, w] on the denoiser's device. Raises FadeError for steps out of range and where the
        scheduler states no noise levels.
        """

    @abstractmethod
    def grid(self, steps: int) -> Tensor:
        """The times [steps + 1] between which `ode` goes, from noise to a picture, on the CPU. Raises FadeError for
        steps out of range and where the scheduler states no noise levels."""

    # --- noise -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def times(self, values: Tensor) -> Tensor:
        """Real numbers in [0, time_span] as times of the family's type."""

    @abstractmethod
    def draw_times(self, count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Times [count] on the CPU from the share [low, high) of the span, as the model was trained with."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Latents noised to times [n]."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What a perfect denoiser predicts."""

    @abstractmethod
    def predict(self, noised: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output [n, C, h, w] for noised latents, without classifier-free guidance; of `target`'s kind
        and sign."""

    # --- parts -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def only_denoiser_on_device(self) -> Iterator[None]:
        """All parts but the denoiser wait in host memory meanwhile, then return to where each was. Nothing happens to
        parts on the CPU and to those that offloading manages."""
        parts = {
            id(part): part
            for part in self.pipeline.components.values()
            if isinstance(part, nn.Module) and unwrapped(part) is not self.denoiser and not is_managed(part)
        }
        moved = []
        try:
            for part in parts.values():
                device = next((tensor.device for tensor in tensors(part)), torch.device("cpu"))
                if device.type != "cpu":
                    moved.append((part, device))
                    part.to("cpu")
            yield
        finally:
            for part, device in moved:
                part.to(device)

    @contextlib.contextmanager
    def without_encoders(self) -> Iterator[None]:
        """Text encoders wait in host memory meanwhile, and the pipeline, which draws from encoded prompts, has none.
        Nothing happens to those on the CPU and to those that offloading manages."""
        found = {
            name: (part, device)
            for name, part in self.pipeline.components.items()
            if name.startswith("text_encoder") and isinstance(part, nn.Module) and not is_managed(part)
            if (device := execution_device(part)).type != "cpu"
        }
        with self._hidden(found):
            try:
                for part, _ in found.values():
                    part.to("cpu")
                yield
            finally:
                for part, device in found.values():
                    part.to(device)

    @contextlib.contextmanager
    def _hidden(self, names: Iterable[str]) -> Iterator[None]:
        """The pipeline as one that was loaded without these parts: it asks the first that it has for its device."""
        parts = {name: getattr(self.pipeline, name) for name in names}
        # Past diffusers' own setter, which would forget in the pipeline's configuration what the parts were.
        try:
            for name in parts:
                object.__setattr__(self.pipeline, name, None)
            yield
        finally:
            for name, part in parts.items():
                object.__setattr__(self.pipeline, name, part)

    @contextlib.contextmanager
    def _vae_in_float32(self) -> Iterator[nn.Module]:
        """The VAE, meanwhile in float32 unless hooks manage its weights. Afterwards each tensor has its dtype again."""
        vae = self._part("vae")
        if is_managed(vae):
            yield vae
            return
        dtypes = [tensor.dtype for tensor in tensors(vae)]
        # nn.Module.to, because diffusers' own warns of layers "to be kept in float32" on every call.
        nn.Module.to(vae, torch.float32)
        try:
            yield vae
        finally:
            for tensor, dtype in zip(tensors(vae), dtypes, strict=True):
                tensor.data = tensor.data.to(dtype)

    def _part(self, name: str) -> Any:
        if (part := getattr(self.pipeline, name, None)) is None:
            raise FadeError(f"the pipeline has no {name.replace('_', ' ')} (pipeline.{name} is None); load it with one")
        return part

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        before = getattr(self.pipeline, "_progress_bar_config", {})
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            yield
        finally:
            self.pipeline.set_progress_bar_config(**before)


def _attention_backends(denoiser: nn.Module) -> set[str]:
    """diffusers' names of what computes the denoiser's attention, where its processors leave that to be chosen: for
    each of them, or for the whole program."""
    everywhere, _ = _AttentionBackendRegistry.get_active_backend()
    processors = (getattr(module, "processor", None) for module in denoiser.modules())
    chosen = {processor._attention_backend for processor in processors if hasattr(processor, "_attention_backend")}
    return {AttentionBackendName(one or everywhere).value for one in chosen}


def _told(pipeline: Any, on_step: Callable[[float], None]) -> dict[str, Callable[..., Any]]:
    """The pipeline's argument that tells the share of its steps that is done. Some schedulers take more steps than
    they were asked for, and some pipelines have diffusers' older callback alone."""

    def callback(pipeline: Any, step: int, timestep: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        on_step((step + 1) / pipeline.num_timesteps)
        return {}

    def older(step: int, timestep: Any, latents: Tensor) -> None:
        scheduler = pipeline.scheduler
        on_step(min(1.0, (step + 1) * scheduler.order / len(scheduler.timesteps)))

    known = inspect.signature(pipeline.__call__).parameters
    return {"callback_on_step_end": callback} if "callback_on_step_end" in known else {"callback": older}
