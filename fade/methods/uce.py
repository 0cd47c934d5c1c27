"""Unified Concept Editing (UCE; Gandikota et al., WACV 2024, arXiv 2308.14761): keys and values of cross-attention,
solved in closed form.

With the embeddings c_i of the concept, those c*_i of what takes its place and those p_j of what must stay, each key or
value matrix W₀ becomes

    W = (λ W₀ + Σ s_e W₀c*_i c_iᵀ + Σ s_p W₀p_j p_jᵀ) (λ I + Σ s_e c_i c_iᵀ + Σ s_p p_j p_jᵀ)⁻¹,

the minimum of Σ s_e ‖W c_i − W₀ c*_i‖² + Σ s_p ‖W p_j − W₀ p_j‖² + λ ‖W − W₀‖². With C, C*, P their columns and G the
matrix that is inverted, W − W₀ = W₀ s_e (C* − C) Cᵀ G⁻¹: a product of rank at most the number of embeddings, in which
only the first factor depends on the layer.
"""

import torch
from torch import Tensor


def uce_factors(
    concept: Tensor, guide: Tensor, preserved: Tensor, erase_scale: float, preserve_scale: float, weight: float
) -> tuple[Tensor, Tensor]:
    """Two matrices D and X, float64 [k, d] each, with W − W₀ = (W₀ Dᵀ) X for every layer.

    Args:
        concept, guide: c and c* as rows, [k, d]. preserved: p as rows, [m, d]; m may be 0.
        erase_scale, preserve_scale, weight: s_e, s_p and λ, all positive.
    """
    c, guide, kept = concept.double(), guide.double(), preserved.double()
    gram = erase_scale * c.T @ c + preserve_scale * kept.T @ kept
    gram.diagonal().add_(weight)
    return erase_scale * (guide - c), torch.cholesky_solve(c.T, torch.linalg.cholesky(gram)).T
