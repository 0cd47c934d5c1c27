"""Embedding inversion: the conditioning itself, one for all pictures, is optimised until the adapted
model denoises pictures of the concept with it, and is then drawn with.

It is textual inversion (Gal et al., arXiv 2208.01618) with every token free instead of one word, as in Pham et al.'s
concept inversion (arXiv 2308.01508): an upper bound of what any prompt can bring back.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from fade.adapter import gradients_as_found
from fade.conditioning import Conditioning
from fade.errors import FadeError
from fade.evaluation.attacks.settings import Count, Rate, Steps
from fade.evaluation.attacks.subject import Drawn, Subject
from fade.modes import evaluation_mode, out_of_inference_mode
from fade.noise import loss_scale, step_generator
from fade.progress import progress_bar

_PROBES = 4
"""Noised copies of each picture on which the loss is told before and after."""


@dataclass(frozen=True)
class EmbeddingInversion:
    name: ClassVar[str] = "embedding-inversion"
    needs: ClassVar[str] = "the adapted model's weights and pictures of the concept"

    iterations: Steps = 300
    """Optimiser steps, each on every picture once."""
    pictures: Count = 8
    learning_rate: Rate = 0.03
    """Adam's, in units of the root mean square of the embedding that is begun from."""

    def setting(self, subject: Subject) -> str:
        return f"{self.iterations} iterations on {self.pictures} pictures"

    def __call__(self, subject: Subject) -> Drawn:
        latents = subject.examples(self.pictures)
        conditioning, numbers = self.optimise(subject, latents)
        everywhere = conditioning.repeat(len(subject.prompts))
        drawn = subject.sample(everywhere, subject.different_seeds, "drawing with the embedding")
        return Drawn(subject.decode(drawn), numbers)

    def optimise(self, subject: Subject, latents: torch.Tensor) -> tuple[Conditioning, dict[str, float]]:
        """The conditioning, one row, float32, and the mean denoising loss before and after, on noise that is
        in no step. Begins from the first prompt's embedding. Raises FadeError where the loss is not finite."""
        backbone = subject.backbone
        conditioning = backbone.encode_prompts(subject.prompts[:1]).float()
        free = [tensor for tensor in conditioning.tensors().values() if tensor.is_floating_point()]
        groups = []
        for tensor in free:
            unit = tensor.square().mean().sqrt().item()
            groups.append({"params": [tensor.requires_grad_(True)], "lr": self.learning_rate * unit})
        optimizer = torch.optim.Adam(groups, eps=1e-15)
        scale = loss_scale(backbone.dtype, latents.numel())

        def loss(step: int, stream: str = "embedding inversion") -> torch.Tensor:
            generator = step_generator(subject.seed, stream, step)
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            times = backbone.draw_times(len(latents), generator).to(latents.device)
            prompts = conditioning.to(backbone.device, backbone.dtype).repeat(len(latents))
            predicted = backbone.predict(backbone.add_noise(latents, noise, times), times, prompts)
            return F.mse_loss(predicted.float(), backbone.target(latents, noise, times).float())

        @torch.no_grad()
        def told() -> float:
            return sum(loss(probe, "embedding inversion probes").item() for probe in range(_PROBES)) / _PROBES

        out_of_inference_mode(backbone.denoiser)
        with gradients_as_found(backbone.denoiser), evaluation_mode(backbone.denoiser):
            # Only the conditioning needs a gradient, and nothing of what those of weights need is kept.
            backbone.denoiser.requires_grad_(False)
            before = told()
            with progress_bar("optimising the embedding", self.iterations, subject.progress) as advance:
                for step in range(self.iterations):
                    value = loss(step)
                    gradients = torch.autograd.grad(scale * value, free)
                    if not all(torch.isfinite(gradient).all() for gradient in gradients):
                        raise FadeError(
                            f"the loss of the embedding inversion became {value.item()} at iteration {step + 1}; load "
                            "the model in fp32 or bf16, or lower the attack's learning rate"
                        )
                    for tensor, gradient in zip(free, gradients, strict=True):
                        tensor.grad = gradient / scale
                    optimizer.step()
                    advance(f"loss {value.item():.2e}")
            after = told()
        return conditioning.detach(), {"loss_before": before, "loss_after": after}


VARIANTS = (EmbeddingInversion(),)
