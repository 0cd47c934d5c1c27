"""Where every random number of a run comes from: the seed, a name and a step. Nothing is carried from step to step, so
a resumed run draws what an uninterrupted one would have drawn, and no state needs saving."""

import hashlib
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fade.backbones import Backbone
from fade.conditioning import Conditioning
from fade.config import OverwriteConfig


def step_generator(seed: int, stream: str, step: int) -> torch.Generator:
    """A CPU generator (the same numbers on every device) for one step of one stream."""
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:7], "little"))


@lru_cache(maxsize=64)
def _epoch(seed: int, stream: str, size: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=step_generator(seed, f"{stream} order", epoch))


def epoch_order(seed: int, stream: str, size: int, batch: int, batch_size: int) -> Tensor:
    """Indices [batch_size] of batch number `batch`, going through a set of `size` without replacement, reshuffled
    every time round."""
    first = batch * batch_size
    return torch.stack(
        [_epoch(seed, stream, size, position // size)[position % size] for position in range(first, first + batch_size)]
    )


TimeSampler = Callable[[int, torch.Generator], Tensor]
"""Times of the backbone's type, [count], on the CPU."""


def times_between(backbone: Backbone, low: float = 0.0, high: float = 1.0) -> TimeSampler:
    """As the model was trained, from that share of the way from picture to noise."""
    return lambda count, generator: backbone.draw_times(count, generator, low, high)


def targeted_times(
    backbone: Backbone, clean: Tensor, prompts: Conditioning, surrogates: Conditioning, seed: int, bins: int = 20
) -> TimeSampler:
    """Times in proportion to how far apart forget and surrogate predictions are there, with a floor of a fifth.

    The gap is E‖ε(z_t, c_forget) − ε(z_t, c_surrogate)‖² / E‖ε(z_t, c_forget)‖², estimated on `clean` [n, C, h, w] in
    `bins` equal ranges of t. This is ours; what SPARE (arXiv 2602.07058 v2) samples is not public.
    """
    edges = torch.linspace(0, backbone.time_span, bins + 1)
    gaps = torch.empty(bins)
    generator = step_generator(seed, "targeted timesteps", 0)
    with torch.inference_mode():
        for i in range(bins):
            t = backbone.times(((edges[i] + edges[i + 1]) / 2).expand(len(clean))).to(clean.device)
            noised = backbone.add_noise(clean, torch.randn(clean.shape, generator=generator).to(clean), t)
            forget = backbone.predict(noised, t, prompts).float()
            surrogate = backbone.predict(noised, t, surrogates).float()
            gaps[i] = ((forget - surrogate).square().mean() / forget.square().mean()).cpu()
    weights = gaps / gaps.sum() + 0.2 / bins

    def sample(count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
        within = torch.rand(count, generator=generator)
        return backbone.times(edges[chosen] + within * (edges[chosen + 1] - edges[chosen]))

    return sample


def levels(backbone: Backbone, latents: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ of z_t = α z + σ ε at times [n], for latents of that size: float32 [n, 1, 1, 1] each."""
    one = torch.ones(latents.shape, dtype=torch.float32, device=latents.device)
    zero = torch.zeros_like(one)
    both = backbone.add_noise(one, zero, times), backbone.add_noise(zero, one, times)
    return tuple(level.float()[:, :1, :1, :1] for level in both)


def split(backbone: Backbone, noised: Tensor, times: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """The picture and the noise that a prediction says noised latents [n, C, h, w] are made of, float32.

    Whatever a family predicts is linear in both, as the noised latents are: two equations for two unknowns.
    """
    one = torch.ones(noised.shape, dtype=torch.float32, device=noised.device)
    zero = torch.zeros_like(one)
    alpha, sigma = levels(backbone, noised, times)
    of_clean, of_noise = backbone.target(one, zero, times), backbone.target(zero, one, times)
    noised, predicted = noised.float(), predicted.float()
    determinant = alpha * of_noise - sigma * of_clean
    # Of pure noise a prediction of the noise says nothing of the picture.
    tiny = torch.finfo(torch.float32).eps
    determinant = torch.where(determinant.abs() < tiny, tiny, determinant)
    clean = (of_noise * noised - sigma * predicted) / determinant
    noise = (alpha * predicted - of_clean * noised) / determinant
    return clean, noise


def forget_times(
    config: OverwriteConfig,
    backbone: Backbone,
    clean: Tensor,
    prompts: Conditioning,
    surrogates: Conditioning,
    seed: int,
) -> TimeSampler:
    """The sampler that the settings name, for the forget half; the retain half is never restricted."""
    if config.timesteps == "targeted":
        return targeted_times(backbone, clean, prompts, surrogates, seed)
    low, high = config.timestep_band if config.timesteps == "band" else (0.0, 1.0)
    return times_between(backbone, low, high)


def loss_scale(dtype: torch.dtype, predictions: int) -> float:
    """What a loss averaged over this many numbers is multiplied by before its backward pass, and gradients divided by.

    A mean over 10^5 numbers has gradients of 10^-5 times the error, and fp16 ends at 6e-8. With a power of two near
    that count they have the error's own size. Other dtypes have fp32's range and need none: 1.
    """
    return 2.0 ** (predictions.bit_length() - 1) if dtype == torch.float16 else 1.0
