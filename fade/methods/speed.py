"""SPEED (Li et al., ICLR 2026, arXiv 2503.07392): the values of cross-attention, solved in closed form within the null
space of what must stay.

With P the projector on the directions in which the retained embeddings r hardly reach (those of the eigenvalues of
mean r rᵀ below a threshold), C₁ the concept's embeddings, C* those of what takes its place and C₂ some of the empty
prompt's, which must not move at all,

    M = (C₁C₁ᵀ P + ρ I)⁻¹,   Q = I − M C₂ (C₂ᵀ P M C₂ + λ I)⁻¹ C₂ᵀ P,   Δ = W (C* − C₁) C₁ᵀ P Q M,

which, for λ = 0, minimises ‖(W + Δ) C₁ − W C*‖² + ρ ‖Δ‖² over Δ = Δ P with Δ C₂ = 0. The retained embeddings are first
narrowed down to those that matter to a layer: those whose outputs the edit without a null space would move more than
the mean of all.
"""

import torch
from torch import Tensor


def null_space(retained: Tensor, threshold: float) -> Tensor:
    """P [d, d], float64: the projector on the eigenvectors of mean r rᵀ whose eigenvalues are below `threshold`;
    `retained` are r as rows, [m, d]."""
    kept = retained.double()
    values, vectors = torch.linalg.eigh(kept.T @ kept / max(1, len(kept)))
    free = vectors[:, values < threshold]
    return free @ free.T


def most_moved(weight: Tensor, concept: Tensor, guide: Tensor, retained: Tensor, damping: float) -> Tensor:
    """Which retained embeddings the plain edit W (C* − C₁) C₁ᵀ (C₁C₁ᵀ + ρ I)⁻¹ moves more than the mean: bool [m].

    `weight` is W [N, d]; embeddings are rows."""
    c, kept = concept.double(), retained.double()
    gram = c.T @ c
    gram.diagonal().add_(damping)
    read = torch.linalg.solve(gram, kept.T)  # [d, m]
    moved = (weight.double() @ ((guide.double() - c).T @ (c @ read))).norm(dim=0)
    return moved > moved.mean()


def speed_factors(
    concept: Tensor, guide: Tensor, fixed: Tensor, projector: Tensor, damping: float, slack: float
) -> tuple[Tensor, Tensor]:
    """Two matrices D and X, float64 [k, d] each, with Δ = (W Dᵀ) X.

    Args:
        concept, guide: C₁ and C* as rows, [k, d]. fixed: C₂ as rows, [q, d]; q may be 0.
        projector: P [d, d]. damping, slack: ρ and λ, positive.
    """
    c, held = concept.double(), fixed.double().T
    size = torch.eye(len(projector), dtype=torch.float64, device=projector.device)
    m = torch.linalg.inv(c.T @ c @ projector + damping * size)
    inner = held.T @ projector @ m @ held
    inner.diagonal().add_(slack)
    q = size - m @ held @ torch.linalg.solve(inner, held.T @ projector)
    return guide.double() - c, c @ projector @ q @ m
