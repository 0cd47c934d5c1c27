"""Selection of the top fraction of saliency values, as a problem to measure.

The opponent finds only the threshold (concatenate + kthvalue, as the FADE authors' package does); `fade_kernels` also
packs the masks.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fade_kernels import select_top_fraction

VALUES = 86_000_000
KEEPS = (0.5, 0.1, 0.01)
MEMORY_KEEP = 0.1
# Transformer blocks of SD 1.5's UNet by width: q, k, v, out twice, the second k and v on the text's 768 columns.
BLOCKS = ((320, 5), (640, 5), (1280, 6))


ATTENTION_SHAPES = tuple(
    shape for width, count in BLOCKS for _ in range(count) for shape in 6 * [(width, width)] + 2 * [(width, 768)]
)


def saliency(
    values: int,
    shapes: Sequence[tuple[int, int]] = ATTENTION_SHAPES,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Accumulators in the shapes of SD 1.5's attention projections, repeated until there are enough values.

    Magnitudes of normal numbers, with a scale of its own for each layer, as real gradients have.
    """
    generator = torch.Generator(device).manual_seed(0)
    tensors: list[Tensor] = []
    total = 0
    while total < values:
        rows, columns = shapes[len(tensors) % len(shapes)]
        rows = min(rows, -(-(values - total) // columns))
        scale = torch.randn((), generator=generator, device=device).mul(1.5).exp()
        tensors.append(torch.randn(rows, columns, generator=generator, device=device).abs_().mul_(scale))
        total += rows * columns
    return tensors


def kth_value(tensors: list[Tensor], keep: float) -> Tensor:
    flat = torch.cat([t.flatten() for t in tensors])
    return flat.kthvalue(flat.numel() - int(keep * flat.numel()) + 1).values


METHODS: dict[str, Callable[[list[Tensor], float], object]] = {
    "cat + kthvalue": kth_value,
    "fade_kernels": select_top_fraction,
}
