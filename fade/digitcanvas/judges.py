"""The judges: two small classifiers that tell which digit and which style a picture shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import LongTensor, Tensor, nn

from fade.digitcanvas.data import IMAGE_SIZE, Digits, draw_all
from fade.judges import Classifiers, convolution_block, read_classifiers

if TYPE_CHECKING:
    from PIL.Image import Image

JUDGES_PATH = Path(__file__).parent / "judges"
AXES = ("digit", "style")


class Classifier(nn.Sequential):
    """A convolutional classifier of pictures [n, 3, 32, 32] in [0, 1] -> logits [n, classes]."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(
            *convolution_block(3, width, 1),
            *convolution_block(width, width, 2),
            *convolution_block(width, 2 * width, 1),
            *convolution_block(2 * width, 2 * width, 2),
            *convolution_block(2 * width, 4 * width, 1),
            *convolution_block(4 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(4 * width, classes),
        )


class Judges(Classifiers):
    """The two classifiers; both take a float tensor [n, 3, 32, 32] in [0, 1] or a sequence of PIL images."""

    def digit(self, images: Tensor | Sequence[Image]) -> LongTensor:
        """The digit (0..9) each picture shows: int64 [n] on the CPU."""
        return self.judge("digit", images)

    def style(self, images: Tensor | Sequence[Image]) -> LongTensor:
        """The index into :data:`fade.digitcanvas.STYLES` of each picture's style: int64 [n] on the CPU."""
        return self.judge("style", images)


def load_judges(device: str | torch.device = "cpu", path: str | Path = JUDGES_PATH) -> Judges:
    """The trained judges of a folder (default: those of this package).

    Raises:
        FileNotFoundError: the folder holds no judges.
    """
    return Judges(IMAGE_SIZE, read_classifiers(path, AXES, Classifier, "python -m fade.digitcanvas.train"), device)


def judge_accuracy(judges: Judges, digits: Digits) -> dict[str, float]:
    """The share of drawn pictures (every digit in every style) that the judges name rightly."""
    pictures = draw_all(digits).float() / 255
    digit_right = [judges.digit(batch) == digits.labels for batch in pictures]
    style_right = [judges.style(batch) == style for style, batch in enumerate(pictures)]
    return {
        "digit": torch.cat(digit_right).float().mean().item(),
        "style": torch.cat(style_right).float().mean().item(),
    }
