"""SPEED (Li et al., ICLR 2026, arXiv 2503.07392): the values of cross-attention, solved in closed form within the null
space of what must stay.

With P the projector on the directions in which the retained embeddings r hardly reach (those of the eigenvalues of
mean r rᵀ below a threshold), C₁ the concept's embeddings, C* those of what takes its place and C₂ some of the empty
prompt's, which must not move at all,

    M = (C₁C₁ᵀ P + ρ I)⁻¹,   Q = I − M C₂ (C₂ᵀ P M C₂ + λ I)⁻¹ C₂ᵀ P,   Δ = W (C* − C₁) C₁ᵀ P Q M,

which, for λ = 0, minimises ‖(W + Δ) C₁ − W C*‖² + ρ ‖Δ‖² over Δ = Δ P with Δ C₂ = 0. The retained embeddings are first
narrowed down to those that matter to a layer: those whose outputs the edit without a null space would move at least as
much as the mean of all.

As in the authors' code, a concept is embedded by its last token, and values alone are changed. Ours: retained are all
tokens of the retain prompts, which are captions where theirs are words, and which are not multiplied by noise along the
matrix's smallest singular direction; of the empty prompt, C₂ are the first token and three centres of the others.
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
from fade.quantised import float_weight

ENDS = ("to_v",)
CENTRES, ROUNDS = 3, 20
"""Of the empty prompt's tokens, and how often they are moved at most."""


def null_space(retained: Tensor, threshold: float) -> Tensor:
    """P [K, K], float64: the projector on the eigenvectors of mean r rᵀ whose eigenvalues are below `threshold`;
    `retained` are r as rows, [m, K]."""
    kept = retained.double()
    values, vectors = torch.linalg.eigh(kept.T @ kept / max(1, len(kept)))
    free = vectors[:, values < threshold]
    return free @ free.T


def most_moved(weight: Tensor, concept: Tensor, guide: Tensor, retained: Tensor, damping: float) -> Tensor:
    """Which retained embeddings the plain edit W (C* − C₁) C₁ᵀ (C₁C₁ᵀ + ρ I)⁻¹ moves at least as much as the mean: bool
    [m].

    `weight` is W [N, K]; embeddings are rows."""
    c, kept = concept.double(), retained.double()
    gram = c.T @ c
    gram.diagonal().add_(damping)
    read = torch.linalg.solve(gram, kept.T)  # [K, m]
    moved = (weight.double() @ ((guide.double() - c).T @ (c @ read))).norm(dim=0)
    return moved >= moved.mean()


def speed_factors(
    concept: Tensor, guide: Tensor, fixed: Tensor, projector: Tensor, damping: float, slack: float
) -> tuple[Tensor, Tensor]:
    """Two matrices D and X, float64 [k, K] each, with Δ = (W Dᵀ) X.

    Args:
        concept, guide: C₁ and C* as rows, [k, K]. fixed: C₂ as rows, [q, K]; q may be 0.
        projector: P [K, K]. damping, slack: ρ and λ, positive.
    """
    c, held = concept.double(), fixed.double().T
    size = torch.eye(len(projector), dtype=torch.float64, device=projector.device)
    m = torch.linalg.inv(c.T @ c @ projector + damping * size)
    inner = held.T @ projector @ m @ held
    inner.diagonal().add_(slack)
    q = size - m @ held @ torch.linalg.solve(inner, held.T @ projector)
    return guide.double() - c, c @ projector @ q @ m


def centres(tokens: Tensor) -> Tensor:
    """Lloyd's k-means of rows, from rows spread evenly over them: [CENTRES, K], or the rows where they are no more."""
    if len(tokens) <= CENTRES:
        return tokens
    found = tokens[torch.linspace(0, len(tokens) - 1, CENTRES).round().long().to(tokens.device)]
    for _ in range(ROUNDS):
        nearest = torch.cdist(tokens, found).argmin(1)
        own = [tokens[nearest == i] for i in range(CENTRES)]
        moved = torch.stack([part.mean(0) if len(part) else found[i] for i, part in enumerate(own)])
        if torch.equal(moved, found):
            break
        found = moved
    return found


@dataclass(frozen=True)
class Options:
    """Settings of SPEED."""

    threshold: float = 0.1
    """Eigenvalues of mean r rᵀ below it span the null space: more changes freely the larger it is."""
    damping: float = 0.1
    """ρ, of the change's own size."""
    slack: float = 1e-4
    """λ, by which the empty prompt's tokens may move after all."""
    tokens: Tokens = "last"
    """The concept's last token, or that one and all `following` it, the end and the padding among them."""
    preserved: Kept = "all"
    """Of the retain prompts all tokens, or each one's `last` word's last."""

    def __post_init__(self) -> None:
        check_choice("speed", "tokens", self.tokens, Tokens)
        check_choice("speed", "preserved", self.preserved, Kept)
        for name in ("threshold", "damping", "slack"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise FadeError(f"the option {name} of speed must be a positive, finite number, not {value}")


def edit(editing: Editing) -> Edit:
    options, products = editing.options, {}
    for reader, layers in edited_layers(editing, ENDS).items():
        embeddings = Embeddings(editing, reader)
        concept, guide = embeddings.paired(options.tokens)
        retained, empty = embeddings.retained(options.preserved), embeddings.empty()
        fixed = torch.cat([empty[:1], centres(empty[1:])])
        for name, layer in layers.items():
            weight = float_weight(layer).to(concept)
            matter = retained[most_moved(weight, concept, guide, retained, options.damping)]
            projector = null_space(matter, options.threshold)
            if not projector.any():
                raise FadeError(
                    f"what must stay takes every direction of {name}'s input, so that speed can change nothing; raise "
                    "its option threshold, or give fewer retain prompts"
                )
            found = speed_factors(concept, guide, fixed, projector, options.damping, options.slack)
            products[name] = low_rank(*found)
    return product_edit(editing, products)


def targets(backbone: Backbone) -> tuple[str, ...]:
    return attention_layers(backbone, "speed", ENDS)


def check(backbone: Backbone, config: Config) -> None:
    check_targets(backbone, "speed", ENDS, config.locate.targets)


SPEED = Method(
    name="speed",
    summary="Solves values of cross-attention for the concept within the null space of what must stay.",
    source="SPEED, arXiv 2503.07392",
    settings={"locate__granularity": "none"},
    trains=False,
    edit=edit,
    reads_latents=False,
    options=Options,
    targets=targets,
    check=check,
)
