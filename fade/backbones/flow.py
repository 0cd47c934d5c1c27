"""Families that were trained by flow matching (Lipman et al., arXiv 2210.02747; rectified flow, Liu et al., arXiv
2209.03003): a time is the noise level σ in [0, 1], z_σ = (1 − σ) z + σ ε, and the denoiser predicts the velocity ε − z.

Some denoisers are told another number than σ, or answer the negative velocity; their family says so, and nothing
outside sees it. The scheduler's own noising (`scale_noise`) is never used: after a picture was drawn it noises every
sample to the first level.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fade.backbones.base import Backbone
from fade.conditioning import Conditioning
from fade.errors import FadeError
from fade.progress import progress_bar

_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")


class FlowBackbone(Backbone):
    """Times are float32 σ in [0, 1], or what the scheduler shifts to σ, where that is what the denoiser is told
    (`told_share`). They are drawn as the pipeline's scheduler places its steps: uniform, then shifted towards noise as
    its configuration says."""

    time_span = 1.0

    def check_trainable(self) -> None:
        super().check_trainable()
        scheduler = self._part("scheduler")
        config = getattr(scheduler, "config", {})
        if type(scheduler).__name__ in _FLOW_SCHEDULERS or config.get("use_flow_sigmas"):
            return
        raise FadeError(
            f"{type(scheduler).__name__} has no noise levels of flow matching, with which {self.family.name} was "
            f"trained; set the scheduler that the model came with, e.g. pipeline.scheduler = "
            "FlowMatchEulerDiscreteScheduler.from_pretrained(MODEL, subfolder='scheduler')"
        )

    def shifted(self, share: Tensor, tokens: int) -> Tensor:
        """σ of a share u in [0, 1] of the way to noise: s u / (1 + (s − 1) u), where s is the scheduler's shift, or
        depends on the number of image tokens (`use_dynamic_shifting`; SD 3, arXiv 2403.03206, section 5.3.2)."""
        config: Any = self._part("scheduler").config
        if config.get("use_dynamic_shifting"):
            mu = (self.family.shift or _linear_shift)(self, tokens)
            shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
        else:
            shift = config.get("shift") or config.get("flow_shift") or 1.0
        return shift * share / (1 + (shift - 1) * share)

    def sigma(self, times: Tensor, latents: Tensor) -> Tensor:
        """The noise level σ of times, for latents of that size."""
        if not self.family.told_share:
            return times
        return self.shifted(times, math.prod(latents.shape[2:]) // self.denoiser.config.patch_size**2)

    @property
    def image_tokens(self) -> int:
        """Tokens of an image of the model's resolution."""
        return (self.resolution // self.family.multiple(self)) ** 2

    def times(self, values: Tensor) -> Tensor:
        return values.float().clamp(0, 1)

    def draw_times(self, count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Of uniform shares in [low, high)."""
        shares = low + (high - low) * torch.rand(count, generator=generator)
        return shares if self.family.told_share else self.shifted(shares, self.image_tokens)

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """(1 − σ) z + σ ε, in float32 and rounded once."""
        sigma = self.sigma(times.to(latents.device, torch.float32), latents)
        sigma = sigma.reshape(-1, *[1] * (latents.dim() - 1))
        return ((1 - sigma) * latents.float() + sigma * noise.float()).to(latents.dtype)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The velocity ε − z."""
        return noise - latents

    def predict(self, noised: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        family = self.family
        if (groups := _groups(conditioning)) is not None:
            output = torch.empty_like(noised)
            for rows in groups:
                output[rows] = self.predict(noised[rows], times[rows], conditioning.rows(rows).stacked())
            return output
        arguments = family.forward(self, noised, times, conditioning)
        output = self.called_denoiser(**arguments, return_dict=False)
        return family.output(self, output, noised)

    @torch.no_grad()
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
        """Euler's method on the pipeline's own levels. Inverting, each step asks for the velocity at the level that
        drawing will ask for it."""
        times = self.grid(steps)
        levels = self.sigma(times, latents)
        latents = latents.to(self.device, torch.float32)
        if conditioning.count == 1:
            conditioning = conditioning.repeat(len(latents))
        pairs = list(pairwise(zip(times.tolist(), levels.tolist(), strict=True)))  # from more noise to less
        parts = []
        starts = range(0, len(latents), batch_size)
        with progress_bar(description, len(starts) * steps, progress) as advance:
            for start in starts:
                chunk = latents[start : start + batch_size]
                prompts = conditioning.rows(slice(start, start + batch_size))
                for (time, high), (_, low) in reversed(pairs) if invert else pairs:
                    at = torch.full((len(chunk),), time, device=self.device)
                    velocity = self.predict(chunk.to(self.dtype), at, prompts).float()
                    chunk = chunk + (high - low if invert else low - high) * velocity
                    advance()
                parts.append(chunk)
        return torch.cat(parts)

    def grid(self, steps: int) -> Tensor:
        if steps < 1:
            raise FadeError(f"there must be at least one denoising step, not {steps}")
        shares = torch.linspace(1, 0, steps + 1)
        return shares if self.family.told_share else self.shifted(shares, self.image_tokens)


def _linear_shift(backbone: Backbone, tokens: int) -> float:
    config = backbone.pipeline.scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (high - low)
    return config.get("base_shift", 0.5) + slope * (tokens - low)


def _groups(conditioning: Conditioning) -> list[list[int]] | None:
    """Rows whose texts are equally long, where a conditioning has rows of different sizes; else None."""
    ragged = [value for value in conditioning.values() if not isinstance(value, Tensor)]
    if not ragged:
        return None
    found: dict[tuple[torch.Size, ...], list[int]] = {}
    for row in range(conditioning.count):
        found.setdefault(tuple(value[row].shape for value in ragged), []).append(row)
    return list(found.values())


def rounded(noised: Tensor, times: Tensor) -> Tensor:
    """σ as pipelines tell it that round 1000 σ to the latents' dtype first: in 16 bits not the same as σ rounded."""
    return (1000 * times).to(noised.device, noised.dtype) / 1000


def pack(latents: Tensor) -> Tensor:
    """[n, C, h, w] -> [n, h/2 · w/2, 4 C]: patches of 2 x 2 as tokens, values in the order channel, row, column."""
    n, channels, height, width = latents.shape
    patches = latents.reshape(n, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(n, height // 2 * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for latents of this height and width."""
    n, channels = tokens.shape[0], tokens.shape[2] // 4
    patches = tokens.reshape(n, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(n, channels, height, width)


def grid_ids(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Positions of image tokens, [h w, 3]: (0, row, column)."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)[None]
    return ids.reshape(-1, 3).to(device, dtype)
