"""Unified Concept Editing (UCE; Gandikota et al., WACV 2024, arXiv 2308.14761): keys and values of cross-attention,
solved in closed form.

With the embeddings c_i of the concept, those c*_i of what takes its place and those p_j of what must stay, each key or
value matrix W₀ becomes

    W = (λ W₀ + Σ s_e W₀c*_i c_iᵀ + Σ s_p W₀p_j p_jᵀ) (λ I + Σ s_e c_i c_iᵀ + Σ s_p p_j p_jᵀ)⁻¹,

the minimum of Σ s_e ‖W c_i − W₀ c*_i‖² + Σ s_p ‖W p_j − W₀ p_j‖² + λ ‖W − W₀‖². With C, C*, P their columns and G the
matrix that is inverted, W − W₀ = W₀ s_e (C* − C) Cᵀ G⁻¹: only the first factor depends on the layer, and one matrix is
inverted for all of them.

As in the authors' code, a concept is embedded by its last token. Their prompts to preserve are bare words, of which
they read the last token, too; ours are captions, of which every token is read unless `preserved` is `last`. The edit
is dense, of the rank of C* − C: the adapter has it as factors.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fade.backbones import Backbone
from fade.config import Config
from fade.errors import FadeError
from fade.methods.base import Edit, Editing, Method
from fade.methods.embeddings import (
    Embeddings,
    Kept,
    Tokens,
    attention_layers,
    check_choice,
    check_targets,
    edited_layers,
    low_rank,
    product_edit,
)

ENDS = ("to_k", "to_v")


def uce_factors(
    concept: Tensor, guide: Tensor, preserved: Tensor, erase_scale: float, preserve_scale: float, weight: float
) -> tuple[Tensor, Tensor]:
    """Two matrices D and X, float64 [k, K] each, with W − W₀ = (W₀ Dᵀ) X for every layer.

    Args:
        concept, guide: c and c* as rows, [k, K]. preserved: p as rows, [m, K]; m may be 0.
        erase_scale, preserve_scale, weight: s_e, s_p and λ, all positive.
    """
    c, guide, kept = concept.double(), guide.double(), preserved.double()
    gram = erase_scale * c.T @ c + preserve_scale * kept.T @ kept
    gram.diagonal().add_(weight)
    return erase_scale * (guide - c), torch.cholesky_solve(c.T, torch.linalg.cholesky(gram)).T


@dataclass(frozen=True)
class Options:
    """Settings of UCE."""

    erase_scale: float = 1.0
    """s_e, of each of the concept's embeddings."""
    preserve_scale: float = 1.0
    """s_p, of each embedding that must stay."""
    weight: float = 0.5
    """λ, of the matrices as they are."""
    tokens: Tokens = "last"
    """The concept's last token, or that one and all `following` it, the end and the padding among them."""
    preserved: Kept = "all"
    """Of the retain prompts all tokens, or each one's `last` word's last."""

    def __post_init__(self) -> None:
        check_choice("uce", "tokens", self.tokens, Tokens)
        check_choice("uce", "preserved", self.preserved, Kept)
        for name in ("erase_scale", "preserve_scale", "weight"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise FadeError(f"the option {name} of uce must be a positive, finite number, not {value}")


def edit(editing: Editing) -> Edit:
    options, products = editing.options, {}
    for reader, layers in edited_layers(editing, ENDS).items():
        embeddings = Embeddings(editing, reader)
        of_all = uce_factors(
            *embeddings.paired(options.tokens), embeddings.retained(options.preserved), options.erase_scale,
            options.preserve_scale, options.weight,
        )  # fmt: skip
        products |= dict.fromkeys(layers, low_rank(*of_all))
    return product_edit(editing, products)


def targets(backbone: Backbone) -> tuple[str, ...]:
    return attention_layers(backbone, "uce", ENDS)


def check(backbone: Backbone, config: Config) -> None:
    check_targets(backbone, "uce", ENDS, config.locate.targets)


UCE = Method(
    name="uce",
    summary="Solves keys and values of cross-attention so that the concept's token reads as its surrogate's.",
    source="Unified Concept Editing, arXiv 2308.14761",
    settings={"locate__granularity": "none"},
    trains=False,
    edit=edit,
    reads_latents=False,
    options=Options,
    targets=targets,
    check=check,
)
