"""Two ways of holding an adapter near where its training began, options of every trained method. Both are from
continual learning, where what is held is what earlier tasks need; here that is what the retain prompts need.

`gift` (GIFT, Wu et al., CVPR 2025, arXiv 2503.04229; its adaptive weight consolidation, as its code has it): with φ the
adapter's parameters, φ⁰ their start, and F the squared gradient of the distillation from the frozen model in this very
step, divided by its mean over each tensor,

    L + w Σ_i F_i (φ_i − φ⁰_i)²,   F not differentiated.

GIFT distils, against forgetting, on pictures of earlier tasks, which the retain loss does here: F is of that alone, at
a second pass in each step.

`ekpc` (EKPC, arXiv 2506.12351; its importance-aware penalty on the adapter): with Δ what the adapter adds to the
weights that it may change, and Ω their importance to the retain latents before the training (`fade.importance`),
divided by its mean over them,

    L + w Σ_i Ω_i (Δ_i − Δ⁰_i)².

EKPC's own importance is not public: this one, the Fisher information of elastic weight consolidation, is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fade.config import LocateConfig
from fade.importance import Importance
from fade_kernels import gather_masked, masked_factor_values

if TYPE_CHECKING:
    from fade.layers import MaskedLoraLayer
    from fade.objective import Learn, Training


def normalised_fisher(gradient: Tensor) -> Tensor:
    """g² divided by its mean, 0 where that is 0."""
    squared = gradient.square()
    return squared / squared.mean().clamp_min(torch.finfo(squared.dtype).tiny)


class FisherPull:
    """GIFT's pull of parameters to where they are when this is made."""

    def __init__(self, parameters: Sequence[Tensor], weight: float) -> None:
        self._parameters, self._weight = list(parameters), weight
        self._start = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def add_(self, learn: Learn) -> None:
        """Adds the pull's gradient, 2 w F (φ − φ⁰), to the gradients that are there, of a step whose `learn` is given
        (`fade.objective`)."""
        gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in self._parameters]
        with torch.enable_grad():
            learn(0.0, 1.0)
        for parameter, gradient, start in zip(self._parameters, gradients, self._start, strict=True):
            if gradient is not None:  # of a layer that the model does not call
                pull = normalised_fisher(parameter.grad) * (parameter - start)
                parameter.grad.copy_(gradient.add_(pull, alpha=2 * self._weight))


class ImportancePenalty:
    """EKPC's penalty on an adapter as it is when this is made."""

    def __init__(self, training: Training, weight: float) -> None:
        adapter, config = training.adapter, training.config
        self._name, self._layers, self._weight = adapter.name, adapter.layers, weight
        base = {name: layer.get_base_layer() for name, layer in self._layers.items()}
        measuring = LocateConfig(batch_size=config.retain_batch_size)
        with adapter.disabled():
            importance = Importance(
                training.backbone, base, training.latents, training.prompts, measuring, training.seed, ("retain",)
            )
            self._importance = {
                name: gather_masked(of["retain"].contiguous(), self._layers[name].lora_mask[adapter.name].mask)
                for name, of in importance.measure()
            }
        mean = torch.cat([one.cpu() for one in self._importance.values()]).mean().item()
        for one in self._importance.values():
            one.div_(max(mean, torch.finfo(one.dtype).tiny))
        self._start = {name: self._delta(layer).detach().clone() for name, layer in self._layers.items()}

    def __call__(self) -> Tensor:
        """w Σ Ω (Δ − Δ⁰)², float32 []."""
        terms = [
            (self._importance[name] * (self._delta(layer) - self._start[name]).square()).sum()
            for name, layer in self._layers.items()
        ]
        return self._weight * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def _delta(self, layer: MaskedLoraLayer) -> Tensor:
        """What the adapter adds at its mask's positions, [nnz]."""
        tensors, scale = layer.adapter_parameters(self._name), layer.scaling[self._name]
        if len(tensors) == 1:
            return tensors[0].flatten() * scale
        return masked_factor_values(*tensors, layer.lora_mask[self._name].mask) * scale
