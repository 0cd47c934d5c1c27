"""The judges: two small classifiers that tell which object and which style a picture shows.

Unlearning accuracy (UA) and in-domain and cross-domain retention (IRA, CRA; UnlearnCanvas, Zhang et al., 2024) are
fractions of generated pictures that these recognise. They are trained on drawn pictures, never on generated ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch import LongTensor, Tensor, nn

from fade.emojicanvas.config import IMAGE_SIZE

if TYPE_CHECKING:
    from PIL.Image import Image

JUDGES_PATH = Path(__file__).parent / "judges"
AXES = ("object", "style")


class Classifier(nn.Sequential):
    """A convolutional classifier of pictures [n, 3, 64, 64] in [0, 1] -> logits [n, classes]."""

    def __init__(self, classes: int, width: int) -> None:
        def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

        super().__init__(
            *block(3, width, 2),
            *block(width, 2 * width, 1),
            *block(2 * width, 3 * width, 2),
            *block(3 * width, 4 * width, 1),
            *block(4 * width, 5 * width, 2),
            *block(5 * width, 5 * width, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5 * width, classes),
        )


def as_batch(images: Tensor | Sequence[Image]) -> Tensor:
    """Pictures as one float32 tensor [n, 3, 64, 64] in [0, 1].

    Raises:
        TypeError: ``images`` is neither a floating tensor nor a sequence of PIL images.
        ValueError: a picture has another size, or tensor values leave [0, 1].
    """
    size = (IMAGE_SIZE, IMAGE_SIZE)
    if isinstance(images, Tensor):
        if not images.is_floating_point():
            raise TypeError(f"pictures must be a float tensor in [0, 1], got {images.dtype}: divide by 255 first")
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, *size):
            raise ValueError(f"pictures must be [n, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {list(images.shape)}")
        images = images.float()
        # Written so that NaN fails as well.
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError("picture values must lie in [0, 1]: use (x / 2 + 0.5).clamp(0, 1) on a VAE's output")
        return images
    if not all(hasattr(image, "convert") for image in images):
        raise TypeError(f"pictures must be a float tensor [n, 3, {IMAGE_SIZE}, {IMAGE_SIZE}] or PIL images")
    for image in images:
        if image.size != size:
            raise ValueError(f"pictures must be {IMAGE_SIZE}x{IMAGE_SIZE} pixels, got {image.size[0]}x{image.size[1]}")
    if not images:
        return torch.empty(0, 3, *size)
    array = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div_(255)


class Judges:
    """The two classifiers, in evaluation mode on one device."""

    def __init__(self, object: Classifier, style: Classifier, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._object = object.eval().requires_grad_(False).to(self.device)
        self._style = style.eval().requires_grad_(False).to(self.device)

    def object(self, images: Tensor | Sequence[Image]) -> LongTensor:
        """The index into :data:`fade.emojicanvas.OBJECTS` of what each picture shows: int64 [n] on the CPU.

        See :func:`as_batch` for the input.
        """
        return self._judge(self._object, images)

    def style(self, images: Tensor | Sequence[Image]) -> LongTensor:
        """The index into :data:`fade.emojicanvas.STYLES` of each picture's style: int64 [n] on the CPU."""
        return self._judge(self._style, images)

    @torch.no_grad()
    def _judge(self, classifier: Classifier, images: Tensor | Sequence[Image]) -> LongTensor:
        batches = as_batch(images).split(256)
        answers = [classifier(batch.to(self.device)).argmax(1).cpu() for batch in batches]
        return torch.cat(answers)


def load_judges(device: str | torch.device = "cpu", path: str | Path = JUDGES_PATH) -> Judges:
    """The trained judges of a folder (default: those of this package).

    Raises:
        FileNotFoundError: the folder holds no judges.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no judges in {path}: run python -m fade.emojicanvas.train --stage judges")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    classifiers = {}
    for axis in AXES:
        classifiers[axis] = Classifier(**config[axis])
        classifiers[axis].load_state_dict(load_file(path / f"{axis}.safetensors"))
    return Judges(classifiers["object"], classifiers["style"], device)


def judge_accuracy(judges: Judges, pictures: Tensor) -> dict[str, float]:
    """The share of ``pictures`` [objects, styles, 3, 64, 64], uint8 or float in [0, 1], that are named rightly."""
    objects, styles = pictures.shape[:2]
    batch = pictures.flatten(0, 1)
    batch = batch if batch.is_floating_point() else batch.float() / 255
    object_right = judges.object(batch).view(objects, styles) == torch.arange(objects)[:, None]
    style_right = judges.style(batch).view(objects, styles) == torch.arange(styles)
    return {"object": object_right.float().mean().item(), "style": style_right.float().mean().item()}
