"""The judges: two small classifiers that tell which object and which style a picture shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import LongTensor, Tensor, nn

from fade.emojicanvas.config import IMAGE_SIZE
from fade.judges import Classifiers, convolution_block, read_classifiers

if TYPE_CHECKING:
    from PIL.Image import Image

JUDGES_PATH = Path(__file__).parent / "judges"
AXES = ("object", "style")


class Classifier(nn.Sequential):
    """A convolutional classifier of pictures [n, 3, 64, 64] in [0, 1] -> logits [n, classes]."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(
            *convolution_block(3, width, 2),
            *convolution_block(width, 2 * width, 1),
            *convolution_block(2 * width, 3 * width, 2),
            *convolution_block(3 * width, 4 * width, 1),
            *convolution_block(4 * width, 5 * width, 2),
            *convolution_block(5 * width, 5 * width, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5 * width, classes),
        )


class Judges(Classifiers):
    """The two classifiers; both take a float tensor [n, 3, 64, 64] in [0, 1] or a sequence of PIL images."""

    def object(self, images: Tensor | Sequence[Image]) -> LongTensor:
        """The index into :data:`fade.emojicanvas.OBJECTS` of what each picture shows: int64 [n] on the CPU."""
        return self.judge("object", images)

    def style(self, images: Tensor | Sequence[Image]) -> LongTensor:
        """The index into :data:`fade.emojicanvas.STYLES` of each picture's style: int64 [n] on the CPU."""
        return self.judge("style", images)


def load_judges(device: str | torch.device = "cpu", path: str | Path = JUDGES_PATH) -> Judges:
    """The trained judges of a folder (default: those of this package).

    Raises:
        FileNotFoundError: the folder holds no judges.
    """
    remake = "python -m fade.emojicanvas.train --stage judges"
    return Judges(IMAGE_SIZE, read_classifiers(path, AXES, Classifier, remake), device)


def judge_accuracy(judges: Judges, pictures: Tensor) -> dict[str, float]:
    """The share of ``pictures`` [objects, styles, 3, 64, 64], uint8 or float in [0, 1], that are named rightly."""
    objects, styles = pictures.shape[:2]
    batch = pictures.flatten(0, 1)
    batch = batch if batch.is_floating_point() else batch.float() / 255
    object_right = judges.object(batch).view(objects, styles) == torch.arange(objects)[:, None]
    style_right = judges.style(batch).view(objects, styles) == torch.arange(styles)
    return {"object": object_right.float().mean().item(), "style": style_right.float().mean().item()}
