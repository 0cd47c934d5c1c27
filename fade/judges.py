"""What the judges of bundled models have in common: how pictures are given to a classifier, and how a folder of them is
read. Each package has the classifiers themselves.

Unlearning accuracy (UA) and in-domain and cross-domain retention (IRA, CRA; UnlearnCanvas, Zhang et al., 2024) are
fractions of generated pictures that these recognise. They are trained on drawn pictures, never on generated ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch import LongTensor, Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image


def as_batch(images: Tensor | Sequence[Image], side: int) -> Tensor:
    """Pictures as one float32 tensor [n, 3, side, side] in [0, 1].

    Raises:
        TypeError: ``images`` is neither a floating tensor nor a sequence of PIL images.
        ValueError: a picture has another size, or tensor values leave [0, 1].
    """
    if isinstance(images, Tensor):
        if not images.is_floating_point():
            raise TypeError(f"pictures must be a float tensor in [0, 1], got {images.dtype}: divide by 255 first")
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"pictures must be [n, 3, {side}, {side}], got {list(images.shape)}")
        images = images.float()
        # Written so that NaN fails as well.
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError("picture values must lie in [0, 1]: use (x / 2 + 0.5).clamp(0, 1) on a VAE's output")
        return images
    if not all(hasattr(image, "convert") for image in images):
        raise TypeError(f"pictures must be a float tensor [n, 3, {side}, {side}] or a sequence of PIL images")
    for image in images:
        if image.size != (side, side):
            raise ValueError(f"pictures must be {side}x{side} pixels, got {image.size[0]}x{image.size[1]}")
    if not images:
        return torch.empty(0, 3, side, side)
    array = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div_(255)


def convolution_block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    """A 3 x 3 convolution, batch norm and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class Classifiers:
    """Classifiers of pictures of one size, by domain, in evaluation mode on one device."""

    def __init__(self, side: int, classifiers: dict[str, nn.Sequential], device: str | torch.device = "cpu") -> None:
        self.device, self._side = torch.device(device), side
        self._classifiers = {
            domain: classifier.eval().requires_grad_(False).to(self.device)
            for domain, classifier in classifiers.items()
        }

    @torch.no_grad()
    def judge(self, domain: str, images: Tensor | Sequence[Image]) -> LongTensor:
        """The class of each picture: int64 [n] on the CPU. See :func:`as_batch` for the input."""
        classifier, batches = self._classifiers[domain], as_batch(images, self._side).split(256)
        return torch.cat([classifier(batch.to(self.device)).argmax(1).cpu() for batch in batches])

    @torch.no_grad()
    def features(self, images: Tensor | Sequence[Image]) -> Tensor:
        """The penultimate features of all classifiers, one after the other: float32 [n, D] on the CPU."""
        batches = as_batch(images, self._side).split(256)
        parts = [
            torch.cat([nn.Sequential(*list(classifier)[:-1])(batch.to(self.device)).cpu() for batch in batches])
            for classifier in self._classifiers.values()
        ]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def maps(self, images: Tensor | Sequence[Image]) -> list[Tensor]:
        """What every ReLU of every classifier gives: float32 [n, C, h, w] each, on the CPU."""
        found = []
        for classifier in self._classifiers.values():
            states = as_batch(images, self._side).to(self.device)
            for layer in classifier:
                states = layer(states)
                if isinstance(layer, nn.ReLU):
                    found.append(states.clone().cpu())  # the next layer may work in place
        return found


def read_classifiers(
    path: str | Path, domains: Sequence[str], make: Callable[..., nn.Module], remake: str
) -> dict[str, nn.Module]:
    """The trained classifiers of a folder, by domain; ``make`` takes what its ``config.json`` says of each.

    Raises:
        FileNotFoundError: the folder holds no judges; ``remake`` is the command that makes them.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no judges in {path}: run {remake}")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    classifiers = {domain: make(**config[domain]) for domain in domains}
    for domain, classifier in classifiers.items():
        classifier.load_state_dict(load_file(path / f"{domain}.safetensors"))
    return classifiers
