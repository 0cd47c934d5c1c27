"""Stable Diffusion 1.x and 2.x (and the bundled DigitCanvas): a UNet with cross-attention on one text encoder.

Noise-prediction and velocity-prediction models alike, with whatever scheduler the pipeline carries: training follows
the scheduler's betas (`ddpm.py`), sampling calls the pipeline itself.
"""

import contextlib
import copy
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    ConsistencyDecoderVAE,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn

from fade.backbones.ddpm import training_schedule
from fade.backbones.parts import execution_device, is_managed, tensors, unwrapped
from fade.base_model import own_modules
from fade.errors import FadeError
from fade.images import square
from fade.progress import progress_bar, track

_tokenizing = threading.Lock()
"""A tokenizer, which pipelines may share, keeps padding and truncation as state: one thread must not set another's."""

MOST_PIXELS = 8192
"""Side of an image; attention over more takes more memory than there is."""


DISTILLED_GUIDANCE = 8.5
"""The guidance scale that a distilled denoiser (LCM: `time_cond_proj_dim`) is told while it is trained: the one that
LatentConsistencyModelPipeline draws with unless told otherwise."""

_PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


class StableDiffusionBackbone:
    """What the two stages need of a StableDiffusionPipeline. Holds no state of its own but the noise schedule.

    Latents are [n, 4, H/f, W/f] and prompt embeddings [n, tokens, width], both in the denoiser's dtype and on the
    device it computes on; timesteps are int64 in [0, num_timesteps). Raises FadeError for a denoiser that needs more
    than noised latents, a timestep and a prompt: such a pipeline takes adapters, but cannot be unlearned here.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        if not isinstance(self.denoiser, UNet2DConditionModel):
            raise FadeError(
                f"{type(pipeline).__name__} has no UNet2DConditionModel as its unet, so it cannot be used here"
            )
        _refuse_other_inputs(self.denoiser, pipeline.vae)

    @staticmethod
    def has_its_parts(parts: Mapping[str, str]) -> bool:
        """Whether a pipeline whose parts have these classes, by name, is made of Stable Diffusion's."""
        return parts.keys() >= set(_PARTS) and parts["unet"] == "UNet2DConditionModel" and "text_encoder_2" not in parts

    @staticmethod
    def text_to_image(pipeline: Any) -> StableDiffusionPipeline | None:
        """A text-to-image pipeline of the same parts as an image-to-image, inpainting, ControlNet, … pipeline of Stable
        Diffusion; None for a pipeline of another family."""
        found = getattr(pipeline, "components", {})
        classes = {name: type(part).__name__ for name, part in found.items()}
        if isinstance(unet := found.get("unet"), nn.Module) and isinstance(unwrapped(unet), UNet2DConditionModel):
            classes["unet"] = UNet2DConditionModel.__name__
        if not StableDiffusionBackbone.has_its_parts(classes):
            return None
        parts = {name: found[name] for name in _PARTS}
        # Its constructor rewrites the config of a scheduler that it finds outdated, so it is shown a copy.
        given = {**parts, "scheduler": copy.deepcopy(parts["scheduler"])}
        whole = StableDiffusionPipeline(
            **given, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        whole.scheduler = parts["scheduler"]
        return whole

    @property
    def denoiser(self) -> nn.Module:
        """The UNet itself, also where torch.compile or data parallelism wraps it; `predict` calls the wrapper."""
        return unwrapped(self.pipeline.unet) if self.pipeline.unet is not None else None

    @property
    def device(self) -> torch.device:
        return execution_device(self.denoiser)

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @functools.cached_property
    def schedule(self) -> DDPMScheduler:
        """The noise levels and the prediction type to train with. Raises FadeError where the scheduler states none."""
        return training_schedule(self.pipeline.scheduler)

    @property
    def num_timesteps(self) -> int:
        return len(self.schedule.alphas_cumprod)

    def check_trainable(self) -> None:
        """Raises FadeError where the pipeline's scheduler cannot be trained with."""
        _ = self.schedule

    @property
    def resolution(self) -> int:
        """Side in pixels of the images the model was trained on. Raises FadeError where its config does not say."""
        size = self.denoiser.config.sample_size
        if size is None:
            raise FadeError(
                "the UNet's config has no sample_size, so the model's resolution is unknown; set the resolution "
                "(data.resolution), or pipeline.unet.register_to_config(sample_size=PIXELS // 8)"
            )
        return (size if isinstance(size, int) else min(size)) * self.pipeline.vae_scale_factor

    def side(self, resolution: int | None) -> int:
        """Side in pixels of images to read or draw. Raises FadeError where latents cannot have it."""
        side, least = resolution or self.resolution, self.pipeline.vae_scale_factor
        if side % least or side > MOST_PIXELS:
            raise FadeError(f"resolution must be a multiple of {least} up to {MOST_PIXELS}, not {side}")
        return side

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Embeddings [len(prompts), tokens, width]; textual-inversion tokens count. Raises FadeError where the pipeline
        was loaded without a text encoder."""
        text_encoder = self._part("text_encoder")
        self._part("tokenizer")
        device, parts = execution_device(text_encoder), []
        for start in range(0, len(prompts), batch_size):
            with _tokenizing:
                embeddings, _ = self.pipeline.encode_prompt(
                    list(prompts[start : start + batch_size]), device, 1, do_classifier_free_guidance=False
                )
            parts.append(embeddings.to(self.device, self.dtype))
        return torch.cat(parts)

    def token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """The token ids of each prompt as `encode_prompts` reads it: begin, words and end, without the padding."""
        tokenizer = self._part("tokenizer")
        texts = [self.pipeline.maybe_convert_prompt(prompt, tokenizer) for prompt in prompts]
        with _tokenizing:
            return tokenizer(texts, truncation=True, max_length=tokenizer.model_max_length)["input_ids"]

    @torch.no_grad()
    def text_states(self, embeddings: Tensor) -> Tensor:
        """What the `text_layers` read of embeddings [n, tokens, width]: [n, tokens, K]."""
        return self.denoiser.process_encoder_hidden_states(embeddings, {})

    def text_layers(self) -> set[str]:
        """Names of the layers that read the prompt alone, as `text_states` gives it: keys and values of the
        cross-attentions."""
        return {
            f"{name}.{projection}"
            for name, _, module in own_modules(self.denoiser)
            if getattr(module, "is_cross_attention", False)
            and module.added_kv_proj_dim is None
            and module.norm_cross is None
            for projection in ("to_k", "to_v")
        }

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
            encoded = vae.encode(pixels.to(execution_device(vae), vae.dtype))
            if hasattr(encoded, "latent_dist"):
                mean, std = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
                noise = torch.randn(mean.shape, generator=generator, device="cpu", dtype=torch.float32)
                latents = mean + std * noise.to(mean.device)
            else:  # AutoencoderTiny and VQ models have no distribution
                latents = encoded.latents.float()
        return (latents * vae.config.scaling_factor).to(self.device, self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 64) -> Tensor:
        """Images [n, 3, H, W], float32 in [0, 1], on the CPU. A decoder that draws noise (ConsistencyDecoderVAE) draws
        the same for every image."""
        parts = []
        with self._vae_in_float32() as vae:
            draws = isinstance(unwrapped(vae), ConsistencyDecoderVAE)
            for chunk in latents.split(batch_size):
                unscaled = (chunk.float() / vae.config.scaling_factor).to(execution_device(vae), vae.dtype)
                noise = {"generator": [torch.Generator("cpu").manual_seed(0) for _ in chunk]} if draws else {}
                image = vae.decode(unscaled, return_dict=False, **noise)[0].float()
                parts.append((image / 2 + 0.5).clamp(0, 1).cpu())
        return torch.cat(parts)

    def sample_latents(
        self,
        prompts: Sequence[str] | Tensor,
        seeds: Sequence[int],
        steps: int = 20,
        guidance_scale: float = 3.0,
        batch_size: int = 64,
        resolution: int | None = None,
        progress: bool = False,
        description: str = "sampling",
        on_step: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Latents [n, 4, h, w] sampled by the pipeline. Image i depends on `prompts[i]` and `seeds[i]` alone.

        `prompts` are texts or embeddings [n, tokens, width]. `on_step` is called before a batch's first step and after
        each of its steps, with the share of its steps that is done, in [0, 1]: it may switch adapters in between.

        Raises FadeError for settings out of range and where the pipeline cannot draw with its scheduler.
        """
        side = self.side(resolution)
        if not math.isfinite(guidance_scale):
            raise FadeError(f"the guidance scale must be a finite number, not {guidance_scale}")
        scheduler = self._part("scheduler")
        most = getattr(scheduler, "config", {}).get("num_train_timesteps") or steps
        if not 1 <= steps <= most:
            raise FadeError(f"denoising steps must be between 1 and the model's {most}, not {steps}")
        if not all(0 <= seed < 2**63 for seed in (min(seeds, default=0), max(seeds, default=0))):
            raise FadeError("seeds must be between 0 and 2^63 - 1")
        if isinstance(prompts, Tensor):
            embeddings = torch.cat([prompts.detach().to(self.device, self.dtype), self.encode_prompts([""])])
            row = list(range(len(prompts)))
        else:
            unique = sorted(set(prompts))
            embeddings = self.encode_prompts([*unique, ""])
            place = {prompt: index for index, prompt in enumerate(unique)}
            row = [place[prompt] for prompt in prompts]
        watch = {} if on_step is None else {"callback_on_step_end": _told(on_step)}
        latents = []
        with self._quiet():
            for start in track(range(0, len(prompts), batch_size), description, progress):
                rows = row[start : start + batch_size]
                generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch_size]]
                if on_step is not None:
                    on_step(0.0)
                try:
                    result = self.pipeline(
                        prompt_embeds=embeddings[rows],
                        negative_prompt_embeds=embeddings[-1:].expand(len(rows), -1, -1),
                        num_inference_steps=steps,
                        guidance_scale=guidance_scale,
                        height=side,
                        width=side,
                        generator=generators,
                        output_type="latent",
                        **watch,
                    )
                # What a scheduler that does not suit the model raises, somewhere inside its step or the pipeline.
                except (ValueError, TypeError, AttributeError, NotImplementedError, IndexError) as error:
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    name = type(scheduler).__name__
                    raise FadeError(f"the pipeline cannot draw {steps} steps with {name}: {reason}") from error
                latents.append(result.images)
        return torch.cat(latents)

    @torch.no_grad()
    def ddim(
        self,
        latents: Tensor,
        embeddings: Tensor,
        steps: int,
        *,
        invert: bool = False,
        batch_size: int = 64,
        progress: bool = False,
        description: str = "DDIM",
    ) -> Tensor:
        """Deterministic DDIM (Song et al., arXiv 2010.02502) without guidance, from noise to pictures or back.

        With the noise levels and the prediction type that the model was trained with, whatever scheduler the pipeline
        draws with. Inverted and drawn again with the same embeddings and steps, latents come back but for what the
        network's answer changes within a step.

        Args:
            latents: [n, 4, h, w]: noise to draw from, or with `invert` latents of pictures.
            embeddings: [1, tokens, width], or one for each latent.

        Returns float32 [n, 4, h, w] on the denoiser's device. Raises FadeError for steps out of range and where the
        scheduler states no noise levels.
        """
        if not 1 <= steps <= self.num_timesteps:
            raise FadeError(f"denoising steps must be between 1 and the model's {self.num_timesteps}, not {steps}")
        scheduler = self._ddim_scheduler(DDIMInverseScheduler if invert else DDIMScheduler)
        scheduler.set_timesteps(steps, self.device)
        latents = latents.to(self.device, torch.float32)
        embeddings = embeddings.expand(len(latents), -1, -1)
        parts = []
        starts = range(0, len(latents), batch_size)
        with progress_bar(description, len(starts) * steps, progress) as advance:
            for start in starts:
                chunk, prompts = latents[start : start + batch_size], embeddings[start : start + batch_size]
                for timestep in scheduler.timesteps:
                    output = self.predict(chunk.to(self.dtype), timestep.expand(len(chunk)), prompts).float()
                    chunk = scheduler.step(output, timestep, chunk).prev_sample
                    advance()
                parts.append(chunk)
        return torch.cat(parts)

    def _ddim_scheduler(self, kind: type[DDIMScheduler] | type[DDIMInverseScheduler]) -> Any:
        given = self.pipeline.scheduler.config
        trailing = given.get("timestep_spacing") == "trailing"
        scheduler = kind.from_config(
            self.schedule.config,
            # Defaults of the class that hold for pixels: a latent's values are not in [-1, 1].
            clip_sample=False,
            thresholding=False,
            # A picture is at the lowest noise level that the model knows, not at none, of which it knows nothing.
            set_alpha_to_one=False,
            timestep_spacing="trailing" if trailing else "leading",
            steps_offset=0 if trailing else given.get("steps_offset", 0),
        )
        scheduler.alphas_cumprod = self.schedule.alphas_cumprod
        lowest = "initial_alpha_cumprod" if kind is DDIMInverseScheduler else "final_alpha_cumprod"
        setattr(scheduler, lowest, self.schedule.alphas_cumprod[0])
        return scheduler

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int = 20,
        guidance_scale: float = 3.0,
        batch_size: int = 64,
        progress: bool = False,
        description: str = "drawing",
    ) -> Tensor:
        """Images [n, 3, H, W], float32 in [0, 1], on the CPU: `sample_latents` decoded. No safety checker runs."""
        latents = self.sample_latents(
            prompts, seeds, steps, guidance_scale, batch_size, progress=progress, description=description
        )
        return self.decode(latents, batch_size)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = √ᾱ_t z + √(1 − ᾱ_t) ε."""
        return self.schedule.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect denoiser predicts: ε, the velocity √ᾱ_t ε − √(1 − ᾱ_t) z, or z, as the model was trained."""
        kind = self.schedule.config.prediction_type
        if kind == "v_prediction":
            return self.schedule.get_velocity(latents, noise, timesteps)
        return latents if kind == "sample" else noise

    def predict(self, noised: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """The denoiser's output for noised latents, without classifier-free guidance."""
        more = {}
        if (width := self.denoiser.config.time_cond_proj_dim) is not None:
            told = torch.full((len(noised),), DISTILLED_GUIDANCE - 1, dtype=torch.float32, device="cpu")
            condition = self.pipeline.get_guidance_scale_embedding(told, embedding_dim=width)
            more["timestep_cond"] = condition.to(noised.device, noised.dtype)
        return self.pipeline.unet(noised, timesteps, encoder_hidden_states=embeddings, return_dict=False, **more)[0]

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


def _told(on_step: Callable[[float], None]) -> Callable[..., dict[str, Tensor]]:
    """A pipeline's callback that tells the share of its steps that is done. Some schedulers take more steps than they
    were asked for."""

    def callback(pipeline: Any, step: int, timestep: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        on_step((step + 1) / pipeline.num_timesteps)
        return {}

    return callback


def _refuse_other_inputs(unet: nn.Module, vae: nn.Module | None) -> None:
    """Raises FadeError for a UNet that takes more than noised latents, a timestep and a prompt."""
    config, channels = unet.config, 4 if vae is None else vae.config.latent_channels
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
        if config.get(name) is not None:
            raise FadeError(f"this UNet needs more than a prompt ({name}={config[name]!r}), which is not supported")
