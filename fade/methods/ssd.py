"""Selective Synaptic Dampening (SSD; Foster, Schoepf and Brintrup, AAAI 2024, arXiv 2308.07707): no training; weights
that matter far more to the concept than to everything else are made smaller.

With the diagonal of the Fisher information, I_i = mean over batches of (∂L/∂θ_i)², of the concept (I_f) and of the rest
(I_D), each weight with I_f > α I_D becomes

    θ_i ← min((λ I_D / I_f)^p, 1) θ_i;   the paper's α 10 (times a size of the model's own), λ 1, p 1.

Each squared gradient is folded into its accumulator as it appears, and the result is the sparse change (factor − 1) θ of
the chosen weights, so that, unlike the paper's, it can be taken off.
"""

import torch
from torch import Tensor


def dampening_factors(
    forget: Tensor, retain: Tensor, alpha: float, dampening: float = 1.0, exponent: float = 1.0
) -> Tensor:
    """What each weight is multiplied by: min((λ I_D / I_f)^p, 1) where I_f > α I_D, and 1 elsewhere.

    Args:
        forget, retain: importances I_f and I_D, not negative, of one shape and dtype (float32 or float64).
        alpha: α, how many times more important to the concept than to the rest a weight must be.
        dampening: λ. exponent: p.

    Returns a tensor of their shape and dtype, in [0, 1].
    """
    chosen = forget > alpha * retain
    ratio = dampening * retain / torch.where(chosen, forget, 1.0)
    return torch.where(chosen, ratio.pow(exponent).clamp_max(1.0), 1.0)
