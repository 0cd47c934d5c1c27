"""Stable Diffusion 1.x and 2.x (and the bundled DigitCanvas): a UNet with cross-attention on one text encoder.

Noise-prediction and velocity-prediction models alike, with whatever scheduler the pipeline carries: training follows
the scheduler's betas (DDPM's closed form), sampling calls the pipeline itself.
"""

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from fade.errors import FadeError
from fade.progress import track

_tokenizing = threading.Lock()
"""A tokenizer, which pipelines may share, keeps padding and truncation as state: one thread must not set another's."""

MOST_PIXELS = 8192
"""Side of an image; attention over more takes more memory than there is."""


class StableDiffusionBackbone:
    """What the two stages need of a StableDiffusionPipeline. Holds no state of its own but the noise schedule.

    Latents are [n, 4, H/f, W/f] and prompt embeddings [n, tokens, width], both in the denoiser's dtype and on its
    device; timesteps are int64 in [0, num_timesteps).
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.num_timesteps: int = self.schedule.config.num_train_timesteps

    @property
    def denoiser(self) -> nn.Module:
        return self.pipeline.unet

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def dtype(self) -> torch.dtype:
        return self.denoiser.dtype

    @property
    def resolution(self) -> int:
        """Side in pixels of the images the model was trained on."""
        size = self.denoiser.config.sample_size
        return (size if isinstance(size, int) else size[0]) * self.pipeline.vae_scale_factor

    def _side(self, resolution: int | None) -> int:
        """Side in pixels of images to read or draw. Raises FadeError where latents cannot have it."""
        side, least = resolution or self.resolution, self.pipeline.vae_scale_factor
        if side % least or side > MOST_PIXELS:
            raise FadeError(f"resolution must be a multiple of {least} up to {MOST_PIXELS}, not {side}")
        return side

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Embeddings [len(prompts), tokens, width]."""
        parts = []
        for start in range(0, len(prompts), batch_size):
            with _tokenizing:
                embeddings, _ = self.pipeline.encode_prompt(
                    list(prompts[start : start + batch_size]), self.device, 1, do_classifier_free_guidance=False
                )
            parts.append(embeddings.to(self.dtype))
        return torch.cat(parts)

    @torch.no_grad()
    def encode_images(
        self, images: Sequence[Image.Image], resolution: int | None, generator: torch.Generator
    ) -> Tensor:
        """Latents of images, resized and centre-cropped to `resolution`. The VAE runs in float32: in float16 it
        overflows."""
        side = self._side(resolution)
        pixels = self.pipeline.image_processor.preprocess(
            [_square(image, side) for image in images], height=side, width=side
        )
        with self._vae_in_float32() as vae:
            posterior = vae.encode(pixels.to(self.device, torch.float32)).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(self.device)
            latents = posterior.mean + posterior.std * noise
        return (latents * vae.config.scaling_factor).to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 64) -> Tensor:
        """Images [n, 3, H, W], float32 in [0, 1], on the CPU."""
        parts = []
        with self._vae_in_float32() as vae:
            for chunk in latents.split(batch_size):
                image = vae.decode(chunk.float() / vae.config.scaling_factor, return_dict=False)[0]
                parts.append((image / 2 + 0.5).clamp(0, 1).cpu())
        return torch.cat(parts)

    def sample_latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int = 20,
        guidance_scale: float = 3.0,
        batch_size: int = 64,
        resolution: int | None = None,
        progress: bool = False,
        description: str = "sampling",
    ) -> Tensor:
        """Latents [n, 4, h, w] sampled by the pipeline. Image i depends on `prompts[i]` and `seeds[i]` alone."""
        side = self._side(resolution)
        if not math.isfinite(guidance_scale):
            raise FadeError(f"the guidance scale must be a finite number, not {guidance_scale}")
        if not 1 <= steps <= self.num_timesteps:
            raise FadeError(f"denoising steps must be between 1 and the model's {self.num_timesteps}, not {steps}")
        if not all(0 <= seed < 2**63 for seed in (min(seeds, default=0), max(seeds, default=0))):
            raise FadeError("seeds must be between 0 and 2^63 - 1")
        unique = sorted(set(prompts))
        embeddings = self.encode_prompts([*unique, ""])
        row = {prompt: index for index, prompt in enumerate(unique)}
        latents = []
        with self._quiet():
            for start in track(range(0, len(prompts), batch_size), description, progress):
                rows = [row[prompt] for prompt in prompts[start : start + batch_size]]
                generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
                result = self.pipeline(
                    prompt_embeds=embeddings[rows],
                    negative_prompt_embeds=embeddings[-1:].expand(len(rows), -1, -1),
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    height=side,
                    width=side,
                    generator=generators,
                    output_type="latent",
                )
                latents.append(result.images)
        return torch.cat(latents)

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
        return self.denoiser(noised, timesteps, encoder_hidden_states=embeddings, return_dict=False)[0]

    @contextlib.contextmanager
    def only_denoiser_on_device(self) -> Iterator[None]:
        """The text encoder and the VAE wait in host memory meanwhile (nothing happens on the CPU)."""
        moved = [m for m in (self.pipeline.text_encoder, self.pipeline.vae) if m.device.type != "cpu"]
        device = self.device
        for module in moved:
            module.to("cpu")
        try:
            yield
        finally:
            for module in moved:
                module.to(device)

    @contextlib.contextmanager
    def _vae_in_float32(self) -> Iterator[nn.Module]:
        vae, dtype = self.pipeline.vae, self.pipeline.vae.dtype
        # nn.Module.to, because diffusers' own warns of layers "to be kept in float32" on every call.
        nn.Module.to(vae, torch.float32)
        try:
            yield vae
        finally:
            nn.Module.to(vae, dtype)

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        before = getattr(self.pipeline, "_progress_bar_config", {})
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            yield
        finally:
            self.pipeline.set_progress_bar_config(**before)


def _square(image: Image.Image, side: int) -> Image.Image:
    """Scaled so that the shorter side fits, then cropped around the centre."""
    image = image.convert("RGB")
    scale = side / min(image.size)
    width, height = (max(side, round(extent * scale)) for extent in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))
