"""Drawn images as one picture to look at: side by side, scaled to a size that shows, as a file inside a page."""

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

TILE = 160
"""Largest side in pixels of an image in the report: larger ones are scaled down, small ones up by a whole factor."""


def strip(images: "Tensor", tile: int = TILE, columns: int | None = None) -> "Image":
    """Images [n, 3, H, H] in [0, 1] side by side, in rows of `columns`, with a transparent gap between them."""
    from PIL import Image

    side = images.shape[-1]
    size = side * max(1, min(tile, 96) // side) if side <= tile else tile
    resample = Image.Resampling.NEAREST if side <= tile else Image.Resampling.LANCZOS
    gap = max(2, size // 24)
    across = min(columns or len(images), len(images))
    rows = -(-len(images) // across)
    sheet = Image.new("RGBA", (across * (size + gap) - gap, rows * (size + gap) - gap), (0, 0, 0, 0))
    for index, image in enumerate(images):
        levels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
        place = (index % across * (size + gap), index // across * (size + gap))
        sheet.paste(Image.fromarray(levels).resize((size, size), resample), place)
    return sheet


def data_uri(image: "Image", exact: bool) -> str:
    """WebP as a data URI: every pixel as it was, or at photographic quality."""
    buffer = io.BytesIO()
    # Lossless, quality means effort: the least is 200 times faster than the most and a third larger.
    image.save(buffer, "WEBP", lossless=exact, quality=0 if exact else 85, method=0 if exact else 4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
