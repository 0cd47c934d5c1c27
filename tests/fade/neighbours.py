"""Ordinary LoRAs beside an adapter, and what a pipeline must draw with given changes of its weights."""

import torch
from diffusers import StableDiffusionPipeline

import fade
from fade.base_model import target_layers

from .conftest import denoise, tiny_pipeline

Deltas = dict[str, torch.Tensor]
"""Dense changes [N, K] of weights, by layer."""


def random_lora(
    pipeline: StableDiffusionPipeline, targets: tuple[str, ...], seed: int, rank: int = 4
) -> tuple[dict[str, torch.Tensor], Deltas]:
    """A LoRA as `load_lora_weights` takes it, and what it changes."""
    generator = torch.Generator().manual_seed(seed)
    state, deltas = {}, {}
    for name, layer in target_layers(pipeline.unet, targets).items():
        rows, *rest = layer.weight.shape
        lora_a = 0.3 * torch.randn(rank, *rest, generator=generator)
        lora_b = 0.3 * torch.randn(rows, rank, *(1 for _ in rest[1:]), generator=generator)
        state |= {f"unet.{name}.lora_A.weight": lora_a, f"unet.{name}.lora_B.weight": lora_b}
        deltas[name] = lora_b.flatten(1) @ lora_a.flatten(1)
    return state, deltas


def deltas_of(adapter: fade.Adapter) -> Deltas:
    """Dense definition of what an adapter changes at the strength 1."""
    deltas = {}
    for name, layer in adapter.layers.items():
        dense = torch.zeros(layer.lora_mask[adapter.name].mask.shape)
        dense[layer.lora_mask[adapter.name].mask.unpack()] = layer.packed_values(adapter.name).detach()
        deltas[name] = dense * layer.full_scale(adapter.name)
    return deltas


class Reference:
    """What the tiny pipeline's denoiser gives with its weights changed by Σ s·Δ."""

    def __init__(self, tokenizer: object) -> None:
        self.pipeline = tiny_pipeline(tokenizer)
        self.weights = {name: p.detach().clone() for name, p in self.pipeline.unet.named_parameters()}

    def __call__(self, *terms: tuple[Deltas, float]) -> torch.Tensor:
        for name, parameter in self.pipeline.unet.named_parameters():
            parameter.data.copy_(self.weights[name])
        for deltas, scale in terms:
            for name, delta in deltas.items():
                weight = self.pipeline.unet.get_submodule(name).weight
                weight.data += scale * delta.view(weight.shape)
        return denoise(self.pipeline)


def draws(pipeline: StableDiffusionPipeline, wanted: torch.Tensor, tolerance: float = 2e-4) -> bool:
    """Whether the denoiser gives that, and not merely something near the base's answer."""
    return torch.allclose(denoise(pipeline), wanted, rtol=tolerance, atol=tolerance)
