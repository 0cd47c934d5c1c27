"""What attacks on weights share: the edited model with its weights open to change, and back to the same bits
afterwards.

Whoever has the weights of a model that was delivered merged can do with them what they like; the adapter's file is not
needed. So the adapter is merged first, and what changes is W + Δ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fade.adapter import gradients_as_found
from fade.base_model import own_modules
from fade.errors import FadeError
from fade.evaluation.attacks.denoising import denoising_loss, descend
from fade.evaluation.attacks.subject import CannotAttackError, Subject
from fade.modes import evaluation_mode, out_of_inference_mode
from fade.noise import epoch_order, step_generator
from fade.progress import progress_bar
from fade.quantised import is_ordinary


@contextlib.contextmanager
def open_weights(subject: Subject, layers: dict[str, nn.Module], edited: bool = True) -> Iterator[dict[str, Tensor]]:
    """The weights of layers, by the layers' names, to be changed in place: of the edited model, its adapter merged, or
    of the base model. Afterwards every bit is as it was, and the adapter unmerged.

    Raises CannotAttackError where a weight is packed and where the adapter cannot be merged.
    """
    for name, layer in layers.items():
        if not is_ordinary(layer):
            raise CannotAttackError(
                f"the weights of {name} are packed or computed from others, so they cannot be changed one by one; "
                "attack the adapter on the 16-bit or 32-bit model"
            )
    subject.note_model()
    adapter = subject.adapter
    if edited:
        try:
            adapter.merge()
        except FadeError as error:
            raise CannotAttackError(error) from error
    else:
        adapter.disable()
    out_of_inference_mode(adapter.denoiser)
    kept = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    try:
        yield {name: layer.weight for name, layer in layers.items()}
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(kept[name])
        if edited:
            adapter.unmerge()
        else:
            adapter.enable()


def edited_layers(subject: Subject) -> dict[str, nn.Module]:
    """The layers that the adapter changes, without what it wraps around them, by name."""
    return {name: layer.get_base_layer() for name, layer in subject.adapter.layers.items()}


def all_layers(subject: Subject) -> dict[str, nn.Module]:
    """Every Linear and Conv2d of the denoiser, by name."""
    modules = own_modules(subject.adapter.denoiser)
    return {name: module for name, _, module in modules if isinstance(module, nn.Linear | nn.Conv2d)}


def draw_changed(subject: Subject, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Images [n, 3, H, W] that the edited model draws of every prompt once each of its weights W is `change(W)`."""
    with open_weights(subject, all_layers(subject)) as weights:
        with torch.no_grad():
            for weight in weights.values():
                weight.copy_(change(weight.detach()))
        return subject.decode(subject.sample(subject.prompts, subject.seeds, "drawing with the changed weights"))


def fine_tuned(
    subject: Subject,
    weights: dict[str, Tensor],
    latents: Tensor,
    prompts: Sequence[str],
    checks: Sequence[int],
    *,
    batch_size: int,
    learning_rate: float,
    description: str,
) -> Iterator[int]:
    """Trains open weights on pictures and their prompts with the loss that the model itself was trained with, and
    yields after each of the numbers of steps in `checks`, in their order.

    Adam (Kingma & Ba, arXiv 1412.6980) on float32 copies, whatever the weights' dtype; of each weight the learning rate
    is in units of its root mean square. A batch goes through the pictures in a random order, with fresh noise and
    times. Raises FadeError where a gradient is not finite.
    """
    backbone = subject.backbone
    conditioning = backbone.encode_prompts(list(prompts))
    masters = [weight.detach().float().clone().requires_grad_(True) for weight in weights.values()]
    groups = [
        {"params": [master], "lr": learning_rate * master.detach().square().mean().sqrt().item()} for master in masters
    ]
    optimizer = torch.optim.Adam(groups)

    def step(number: int) -> float:
        with gradients_as_found(backbone.denoiser), evaluation_mode(backbone.denoiser):
            backbone.denoiser.requires_grad_(False)
            for weight in weights.values():
                weight.requires_grad_(True)
            rows = epoch_order(subject.seed, description, len(latents), number, batch_size)
            generator = step_generator(subject.seed, description, number)
            loss = denoising_loss(backbone, latents[rows], conditioning.rows(rows), generator)
            told = descend(
                loss, list(weights.values()), optimizer, backbone, batch_size * latents[0].numel(), description
            )
        with torch.no_grad():
            for weight, master in zip(weights.values(), masters, strict=True):
                weight.copy_(master)
        return told

    done = 0
    for check in checks:
        with progress_bar(description, check - done, subject.progress) as advance:
            for number in range(done, check):
                advance(f"loss {step(number):.2e}")
        done = check
        yield done
