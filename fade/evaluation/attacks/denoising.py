"""The denoising loss that attacks with gradients lower, whatever it is that they change."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fade.backbones import Backbone
from fade.conditioning import Conditioning
from fade.errors import FadeError
from fade.noise import loss_scale


def denoising_loss(backbone: Backbone, clean: Tensor, conditioning: Conditioning, generator: torch.Generator) -> Tensor:
    """mean (f(z_t, t, c) − y)² over latents [n, C, h, w] and their n prompts, as the model was trained: y the noise,
    picture or velocity, t and noise from the generator."""
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    times = backbone.draw_times(len(clean), generator).to(clean.device)
    predicted = backbone.predict(backbone.add_noise(clean, noise, times), times, conditioning)
    return F.mse_loss(predicted.float(), backbone.target(clean, noise, times).float())


def descend(
    loss: Tensor, free: Sequence[Tensor], optimizer: torch.optim.Optimizer, backbone: Backbone, count: int, attack: str
) -> float:
    """One step of the optimiser for its parameters by the loss's gradients with respect to `free`, in their order, and
    the loss as a number. `count` is how many numbers the loss is the mean of. What the loss does not depend on stays
    as it is: families have layers that no picture goes through.

    Raises FadeError where a gradient is not finite.
    """
    scale = loss_scale(backbone.dtype, count)
    gradients = torch.autograd.grad(scale * loss, free, allow_unused=True)
    if not all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None):
        raise FadeError(
            f"the loss of {attack} became {loss.item()}; load the model in fp32 or bf16, or lower the attack's "
            "learning rate"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.float() / scale
    optimizer.step()
    return loss.item()
