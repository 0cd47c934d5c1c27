"""The FADE authors' procedure, sparse per weight, in plain eager PyTorch: the baseline of the stage benchmarks.

Written from the description of their package (arXiv 2602.07058 and its public code), not from its text: a saliency pass
that keeps a gradient and an accumulator for every parameter of the denoiser, a threshold by `kthvalue` over their
concatenation, and a training loop in which images and prompts are encoded in every step, teacher and student run
separately on the forget and on the retain half, and M⊙(BA) is made as a dense tensor in every forward pass. Their
defects of correctness (clipping that never acts, a mask that is not saved) are left out.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn


class NaiveMaskedLora(nn.Module):
    """y = W x + (s·M⊙(BA)) x with the product materialised, as SparsePEFT does it."""

    def __init__(self, base: nn.Linear, mask: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale, self.on = base, alpha / rank, True
        self.register_buffer("mask", mask)
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features).to(base.weight) / rank)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank).to(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        if self.on:
            result = result + F.linear(x, (self.lora_b @ self.lora_a) * self.mask * self.scale)
        return result


@contextlib.contextmanager
def adapters_off(layers: Sequence[NaiveMaskedLora]) -> Iterator[None]:
    for layer in layers:
        layer.on = False
    yield
    for layer in layers:
        layer.on = True


def locate(
    pipeline: Any, images: Tensor, prompts: Sequence[str], targets: Sequence[str], keep: float, passes: int, batch: int
) -> dict[str, Tensor]:
    """Masks (bool, of the weights' shapes) of the target layers, from one threshold over the whole denoiser."""
    unet, schedule = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config)
    unet.requires_grad_(True)
    saliency = {name: torch.zeros_like(p) for name, p in unet.named_parameters()}
    for _ in range(passes):
        for start in range(0, len(images), batch):
            latents, text = encode(pipeline, images[start : start + batch], prompts[start : start + batch])
            noise = torch.randn_like(latents)
            t = torch.randint(schedule.config.num_train_timesteps, (len(latents),), device=latents.device)
            unet.zero_grad(set_to_none=True)
            F.mse_loss(unet(schedule.add_noise(latents, noise, t), t, text).sample, noise).backward()
            for name, parameter in unet.named_parameters():
                if parameter.grad is not None:
                    saliency[name] += parameter.grad.abs()
    unet.requires_grad_(False)
    unet.zero_grad(set_to_none=True)
    together = torch.cat([value.flatten() for value in saliency.values()])
    kept = max(1, int(together.numel() * keep))
    threshold = together.kthvalue(together.numel() - kept + 1).values
    layers = [name for name, m in unet.named_modules() if isinstance(m, nn.Linear) and name.endswith(tuple(targets))]
    return {name: saliency[f"{name}.weight"] >= threshold for name in layers}


def overwrite(
    pipeline: Any,
    masks: dict[str, Tensor],
    forget: tuple[Tensor, Sequence[str], Sequence[str]],
    retain: tuple[Tensor, Sequence[str]],
    *,
    steps: int,
    batch: int,
    rank: int,
    alpha: float,
    learning_rate: float,
    merge: bool = False,
) -> list[float]:
    """Trains the adapters, removes them (`merge`: into the weights) and returns the losses. `forget` is images, prompts
    and surrogate prompts."""
    unet, schedule = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config)
    wrapped = {name: NaiveMaskedLora(unet.get_submodule(name), mask, rank, alpha) for name, mask in masks.items()}
    layers = list(wrapped.values())
    for name, layer in wrapped.items():
        unet.set_submodule(name, layer)
    parameters = [p for layer in layers for p in (layer.lora_a, layer.lora_b)]
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps)))
    losses = []
    for _ in range(steps):
        total = 0.0
        for images, prompts, taught in (forget, (*retain, retain[1])):
            chosen = torch.randint(len(images), (batch,))
            latents, text = encode(pipeline, images[chosen], [prompts[i] for i in chosen])
            _, teacher_text = encode(pipeline, images[:1], [taught[i] for i in chosen])
            t = torch.randint(schedule.config.num_train_timesteps, (batch,), device=latents.device)
            noised = schedule.add_noise(latents, torch.randn_like(latents), t)
            with torch.no_grad(), adapters_off(layers):
                target = unet(noised, t, teacher_text).sample
            total = total + F.mse_loss(unet(noised, t, text).sample, target)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(total.item())
    for name, layer in wrapped.items():
        unet.set_submodule(name, layer.base)
        if merge:
            layer.base.weight.data += layer.scale * layer.mask * (layer.lora_b @ layer.lora_a).detach()
    return losses


@torch.no_grad()
def encode(pipeline: Any, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Latents of images [n, 3, H, W] in [0, 1] and embeddings of prompts."""
    posterior = pipeline.vae.encode((images * 2 - 1).to(pipeline.vae.device, pipeline.vae.dtype)).latent_dist
    text, _ = pipeline.encode_prompt(list(prompts), pipeline.unet.device, 1, do_classifier_free_guidance=False)
    return posterior.sample() * pipeline.vae.config.scaling_factor, text
