"""W + Delta rounded stochastically where the mask has bits, in plain PyTorch: what the one-product mode multiplies by.

Everywhere else W is representable and keeps its bits, so that only as many random numbers are drawn as the masks have
set bits, and for all layers at once. The same bits as those of the definition, `reference.effective_weights_out`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fade_kernels import reference


class RoundedLayer(NamedTuple):
    """One layer of `write_rounded`."""

    out: Tensor
    """fp16 or bf16 [N, K]; may be the weight itself."""
    weight: Tensor | None
    """[N, K] in that dtype; None: Delta alone."""
    delta: Tensor
    """fp32 [nnz], scaled, at the mask's positions, row-major."""
    mask_words: Tensor
    elements: Tensor
    """int64 [nnz]: those positions as n K + k."""
    index: int
    """Place among all layers of the call, on which its random bits depend."""


def write_rounded(layers: Sequence[RoundedLayer], seed: int) -> None:
    """out = W + Delta of every layer, rounded stochastically to 16 bits; all on one device."""
    for dtype in {layer.out.dtype for layer in layers}:
        _write_rounded([layer for layer in layers if layer.out.dtype == dtype], dtype, seed)


def _write_rounded(layers: Sequence[RoundedLayer], dtype: torch.dtype, seed: int) -> None:
    gather, scatter = torch.ops.fade_kernels.gather_masked, torch.ops.fade_kernels.scatter_masked_
    sums, indices = [], []
    for layer in layers:
        count = layer.delta.numel()
        base = None if layer.weight is None else gather(layer.weight, layer.mask_words, count)
        sums.append(layer.delta if base is None else base.float() + layer.delta)
        indices.append(torch.full_like(layer.elements, layer.index))
    random = reference.random_bits(torch.cat([layer.elements for layer in layers]), torch.cat(indices), seed)
    rounded = reference.round_stochastically(torch.cat(sums), dtype, random)
    for layer, values in zip(layers, rounded.split([one.numel() for one in sums]), strict=True):
        if layer.weight is None:
            layer.out.zero_()
        else:
            layer.out.copy_(layer.weight)
        scatter(layer.out, values, layer.mask_words)
