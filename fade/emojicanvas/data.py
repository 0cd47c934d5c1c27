"""The pictures of EmojiCanvas: a hundred objects, each drawn in six openly licensed sets of emoji.

The drawings (SVG) are part of the package, so nothing is downloaded; where each set comes from and its licence are told
in ``pictures/NOTICE.md``. ``resvg`` turns them into pixels, the same ones every time.
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fade.emojicanvas.config import IMAGE_SIZE
from fade.emojicanvas.prompts import ICONS, OBJECTS, STYLES

SOURCES_PATH = Path(__file__).parent / "pictures" / "pictures.json.xz"
SETS: dict[str, str] = {
    "noto": "noto",
    "blob": "noto-v1",
    "twemoji": "twemoji",
    "glossy": "fluent-emoji",
    "flat": "fluent-emoji-flat",
    "ink": "fluent-emoji-high-contrast",
}
"""Each style's picture set, by its name in the collection Iconify."""

# What pictures are rendered at before they are moved and scaled; sharper than any of the scales used below.
RENDER_SIZE = 80


@dataclass(frozen=True)
class Jitter:
    """How far training pictures are moved: each value is the half-width of a uniform range, but for ``scale``.

    ``angle`` in degrees, ``shift`` as a share of the picture's side, ``hue`` in turns; ``scale`` is the range of the
    drawing's size as a share of the picture's.
    """

    angle: float
    scale: tuple[float, float]
    shift: float
    hue: float


STRONG = Jitter(angle=8.0, scale=(0.75, 1.0), shift=0.06, hue=0.03)
"""For the judges."""
MILD = Jitter(angle=3.0, scale=(0.87, 0.93), shift=0.02, hue=0.01)
"""For the VAE and for the transformer, which draws what it was shown."""
STILL = Jitter(angle=0.0, scale=(0.9, 0.9), shift=0.0, hue=0.0)


@cache
def load_sources() -> dict[str, Any]:
    """The drawings as the package holds them: ``{"styles": {style: {"set", "version", "icons": {icon: {...}}}}}``.

    An icon has ``body`` (the inside of an SVG element) and the view box's ``left``, ``top``, ``width`` and ``height``.
    """
    return json.loads(lzma.decompress(SOURCES_PATH.read_bytes()))


def svg(object: str, style: str) -> str:
    """One drawing as an SVG document.

    Raises:
        ValueError: the object or the style is unknown.
    """
    if object not in OBJECTS or style not in STYLES:
        raise ValueError(f"no picture of {object!r} in {style!r}: see OBJECTS and STYLES for what there is")
    icon = load_sources()["styles"][style]["icons"][ICONS[OBJECTS.index(object)]]
    side = max(icon["width"], icon["height"])  # a square, in whose middle a few drawings of other shapes lie
    box = f"{icon['left']} {icon['top']} {icon['width']} {icon['height']}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{side}" height="{side}">{icon["body"]}</svg>'
    )


def render(objects: Sequence[str] = OBJECTS, size: int = RENDER_SIZE) -> Tensor:
    """Objects in every style on white, filling their frame: uint8 [objects, styles, 3, size, size].

    Raises:
        ValueError: an object is unknown.
        ImportError: ``resvg-py`` is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError("the emoji are rendered by resvg: pip install resvg-py") from error
    from io import BytesIO

    from PIL import Image

    pictures = np.empty((len(objects), len(STYLES), size, size, 3), dtype=np.uint8)
    for i, object in enumerate(objects):
        for j, style in enumerate(STYLES):
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg(object, style), width=size, height=size))
            picture = Image.open(BytesIO(png)).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            pictures[i, j] = np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
    return torch.from_numpy(pictures).permute(0, 1, 4, 2, 3).contiguous()


def _hue_rotation(turns: Tensor) -> Tensor:
    """Rotations [n, 3, 3] of RGB about the grey axis, by parts of a turn [n] (Rodrigues' formula)."""
    angle = turns * (2 * math.pi)
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None] / math.sqrt(3)
    third, cross = torch.full((3, 3), 1 / 3), torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return cosine * torch.eye(3) + (1 - cosine) * third + sine * cross


def jitter(pictures: Tensor, amount: Jitter, generator: torch.Generator | None = None) -> Tensor:
    """Pictures turned, scaled, shifted and tinted at random: uint8 [n, 3, s, s] on white -> float32 [n, 3, 64, 64].

    Values lie in [0, 1]; what comes into view from outside is white.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(pictures), generator=generator) * (high - low) + low

    angle = uniform(-amount.angle, amount.angle).deg2rad()
    scale = uniform(*amount.scale)
    # Coordinates run over [-1, 1], so a shift by a share of the side is twice as much.
    x, y = uniform(-2 * amount.shift, 2 * amount.shift), uniform(-2 * amount.shift, 2 * amount.shift)
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    affine = torch.stack([cosine, -sine, x, sine, cosine, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, [len(pictures), 3, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    # Zeros outside stand for white.
    dark = F.grid_sample(1 - pictures.float() / 255, grid, padding_mode="zeros", align_corners=False)
    rotation = _hue_rotation(uniform(-amount.hue, amount.hue))
    return (1 - torch.bmm(rotation, dark.flatten(2)).view_as(dark)).clamp(0, 1)


def draw(objects: Sequence[str] = OBJECTS) -> Tensor:
    """Objects in every style as the model should draw them: uint8 [objects, styles, 3, 64, 64].

    Raises:
        ValueError, ImportError: as :func:`render`.
    """
    pictures = render(objects)
    drawn = jitter(pictures.flatten(0, 1), STILL)
    return drawn.mul(255).round().byte().view(*pictures.shape[:2], 3, IMAGE_SIZE, IMAGE_SIZE)
