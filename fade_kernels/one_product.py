"""W + Delta rounded stochastically where the mask has bits, in plain PyTorch: what the one-product mode multiplies by.

Everywhere else W is representable and keeps its bits, so that only as many random numbers are drawn as the mask has set
bits. The same bits as those of the definition, `reference.effective_weights_out`.
"""

import torch
from torch import Tensor

from fade_kernels import reference


def write_rounded(
    out: Tensor,
    weight: Tensor | None,
    delta: Tensor,
    mask_words: Tensor,
    elements: Tensor,
    layer: int,
    seed: int,
) -> None:
    """out = W + Delta, rounded stochastically to out's dtype, fp16 or bf16; `out` may be the weight itself.

    Args:
        out, weight: [N, K] of one dtype; without a weight, Delta alone.
        delta: fp32 [nnz], scaled, at the mask's positions, row-major.
        elements: int64 [nnz], those positions as n K + k.
        layer, seed: what the random bits depend on beside the position.
    """
    exact = delta
    if weight is None:
        out.zero_()
    else:
        exact = torch.ops.fade_kernels.gather_masked(weight, mask_words, delta.numel()).float() + delta
        out.copy_(weight)
    rounded = reference.round_stochastically(exact, out.dtype, reference.random_bits(elements, layer, seed))
    torch.ops.fade_kernels.scatter_masked_(out, rounded, mask_words)
