"""LoKU (Cha et al., ICLR 2025): low-rank factors that begin where the concept is (FILA).

Of a weight W [N, K] with importances I_f and I_r, the mean squared gradients of the concept and of the rest,

    R = I_f / (I_r + ε),   ρ_j = sqrt(Σ_k R_jk),   U S Vᵀ = svd_r(diag(ρ) W),   S ← S / s,
    A = (V √S)ᵀ,   B = diag(1 / (ρ + ε)) U √S,   W_res = W − s B A,   ε = 1e-5,

with s the adapter's scale: the factors hold what the concept needs most, and what is left of the weight is frozen.
"""

import torch
from torch import Tensor

EPSILON = 1e-5


def fila(
    weight: Tensor, forget: Tensor, retain: Tensor, rank: int, scale: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] in the weight's dtype, float32 or float64.

    Args:
        weight, forget, retain: W, I_f and I_r, [N, K] each; importances not negative.
        rank: r, at most min(N, K). scale: s.
        seed: of the randomised decomposition (`torch.svd_lowrank`, as in the authors' code); torch's global generators
            are as before afterwards.

    Importances are taken relative to the mean of I_r, so that ε is the same share of them in every model (ours: the
    authors' are sums over a language model's tokens).
    """
    mean = retain.mean().clamp_min(torch.finfo(retain.dtype).tiny)
    rows = (forget / mean / (retain / mean + EPSILON)).sum(1).sqrt().to(weight)
    devices = [weight.device] if weight.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(rows[:, None] * weight, q=min(*weight.shape, rank + 8), niter=4)
    root = (s[:rank] / scale).sqrt()
    return (v[:, :rank] * root).T.contiguous(), (u[:, :rank] * root) / (rows[:, None] + EPSILON)
