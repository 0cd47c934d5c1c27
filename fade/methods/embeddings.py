"""The text embeddings that closed forms of the literature read, and the layers that they change.

Their authors embed a concept by itself and take its last token, or, in UCE's first code, the tokens from the last one
on, the end and the padding among them. In a template around the concept that last token is the last in which the prompt
differs from its surrogate.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fade.backbones import Backbone
from fade.conditioning import Conditioning
from fade.errors import FadeError
from fade.methods.base import Edit, Editing
from fade.quantised import float_weight
from fade.regions import matrix_shape
from fade.saliency import located_in
from fade_kernels import BitMask

Tokens = Literal["last", "following"]
"""Of the concept's prompts: the concept's last token, or that one and all behind it."""
Kept = Literal["all", "last"]
"""Of the retain prompts: every token, or the last word's last."""


def check_choice(method: str, name: str, value: object, kinds: object) -> None:
    """Raises FadeError for an option that is none of the kinds that a `Literal` names."""
    if value not in get_args(kinds):
        raise FadeError(f"the option {name} of {method} must be one of {', '.join(get_args(kinds))}, not {value!r}")


# --- layers ----------------------------------------------------------------------------------------------------------


def attention_layers(backbone: Backbone, method: str, ends: tuple[str, ...]) -> tuple[str, ...]:
    """Names of cross-attention's projections that end so (`to_k`, `to_v`), sorted.

    Raises FadeError for a family without cross-attention: where text and picture attend to one another in one layer,
    its input changes with the picture, and there is no matrix of which a prompt's keys and values are fixed products.
    """
    found = sorted(
        name for names in backbone.text_layers().values() for name in names if name.rpartition(".")[2] in ends
    )
    if not found:
        raise FadeError(
            f"the method {method} solves for {' and '.join(ends)} of cross-attention, and {backbone.family.name} has "
            "none: its text and picture attend to one another in the same layers, whose input depends on the picture. "
            "Use closed-form, which changes the layers that read the prompt alone, or both"
        )
    return tuple(found)


def check_targets(backbone: Backbone, method: str, ends: tuple[str, ...], targets: Sequence[str] | None) -> None:
    """Raises FadeError where a user's own targets hold a region: rows and columns of one matrix are solved together."""
    attention_layers(backbone, method, ends)
    if regions := [pattern for pattern in targets or () if pattern.endswith("]")]:
        raise FadeError(f"the method {method} solves for whole matrices; leave the region out of {regions[0]!r}")


def edited_layers(editing: Editing, ends: tuple[str, ...]) -> dict[str, dict[str, nn.Module]]:
    """Those of the layers to edit that are such projections, by the name of their reader (`Backbone.text_layers`)."""
    found = {
        reader: {
            name: layer
            for name, layer in editing.layers.items()
            if name in names and name.rpartition(".")[2] in ends
        }
        for reader, names in editing.backbone.text_layers().items()
    }  # fmt: skip
    found = {reader: layers for reader, layers in found.items() if layers}
    if not found:
        raise FadeError(
            f"there is no {' or '.join(ends)} of cross-attention among the targets; leave targets out, which takes all"
        )
    return found


def low_rank(difference: Tensor, reading: Tensor) -> tuple[Tensor, Tensor]:
    """Dᵀ X of matrices D and X, float64 [k, K] each, as L [K, r] and R [r, K] with L R the same to float32's precision,
    and r its rank at that precision; the rows of R are orthonormal, so that nothing cancels in a product rounded to
    float32."""
    q, r = torch.linalg.qr(difference.T)
    basis, coefficients = torch.linalg.qr(reading.T)
    u, sizes, v = torch.linalg.svd(r @ coefficients.T)
    many = max(1, int((sizes > torch.finfo(torch.float32).eps / 2 * sizes[0]).sum()))
    return (q @ u[:, :many]) * sizes[:many], v[:many] @ basis.T


def product_edit(editing: Editing, products: Mapping[str, tuple[Tensor, Tensor]]) -> Edit:
    """Of L and R by layer (`low_rank`), the edit W L R of these layers: as factors of one rank, or as every entry's
    change where those would be fewer numbers."""
    layers = {name: editing.layers[name] for name in products}
    masks = {name: BitMask.full(matrix_shape(layer), layer.weight.device) for name, layer in layers.items()}
    located = located_in(editing.layers, masks, {}, 0.0)
    rank = max(right.shape[0] for _, right in products.values())
    shapes = [matrix_shape(layer) for layer in layers.values()]
    in_factors = sum(rank * (rows + columns) for rows, columns in shapes) < sum(math.prod(shape) for shape in shapes)
    values = {name: torch.zeros(0) for name in editing.layers}
    factors = {}
    for name, (left, right) in products.items():
        outer = float_weight(layers[name]).to(left) @ left
        if in_factors:
            more = rank - right.shape[0]
            factors[name] = F.pad(right, (0, 0, 0, more)).float().cpu(), F.pad(outer, (0, more)).float().cpu()
        else:
            values[name] = (outer @ right).flatten().float().cpu()
    return Edit(located, factors=factors) if in_factors else Edit(located, values)


# --- embeddings ------------------------------------------------------------------------------------------------------


def last_difference(ids: Sequence[int], others: Sequence[int]) -> int:
    """The position of the last token of `ids` before what both have in common at the end; 0 where that is all."""
    same = 0
    while same < min(len(ids), len(others)) and ids[-1 - same] == others[-1 - same]:
        same += 1
    return max(0, len(ids) - 1 - same)


@dataclass(frozen=True)
class Embeddings:
    """What one reader's layers read, float64 on a device that has it: rows are tokens."""

    editing: Editing
    reader: str

    def paired(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Of every different pair of prompts of the concepts: the concept's tokens and, row by row, its surrogate's,
        [k, K] each."""
        concept = self.editing.concept
        pairs = list(dict.fromkeys(zip(concept.forget_prompts, concept.surrogate_prompts, strict=True)))
        ids = self._ids([prompt for pair in pairs for prompt in pair])
        own, others = [], []
        for prompt, answer in pairs:
            x = self._from(prompt, last_difference(ids[prompt], ids[answer]), tokens)
            y = self._from(answer, last_difference(ids[answer], ids[prompt]), tokens)
            many = min(len(x), len(y))
            own.append(x[:many])
            others.append(y[:many])
        return torch.cat(own), torch.cat(others)

    def retained(self, kept: Kept) -> Tensor:
        """Of every different retain prompt, [m, K]; none where there are no retain prompts."""
        prompts = list(dict.fromkeys(self.editing.concept.retain_prompts))
        if kept == "all":
            rows = [self._from(prompt, 0, "following") for prompt in prompts]
        else:
            ids = self._ids([*prompts, ""])
            rows = [self._from(prompt, last_difference(ids[prompt], ids[""]), "last") for prompt in prompts]
        return torch.cat(rows) if rows else self.empty()[:0]

    def empty(self) -> Tensor:
        """Every token of the empty prompt, as the family has it, [n, K]."""
        return self._states(self.editing.backbone.negative(), 0)

    def _ids(self, prompts: Sequence[str]) -> dict[str, list[int]]:
        """Token ids by prompt, those of all segments in turn."""
        prompts = list(dict.fromkeys(prompts))
        found = self.editing.backbone.token_ids(prompts, self.reader)
        return {
            prompt: [one for ids, _ in segments for one in ids]
            for prompt, segments in zip(prompts, found, strict=True)
        }  # fmt: skip

    def _from(self, prompt: str, position: int, tokens: Tokens) -> Tensor:
        behind = self._states(self.editing.prompts[prompt], position)
        return behind[:1] if tokens == "last" else behind

    def _states(self, row: Conditioning, position: int) -> Tensor:
        """From a position on, without what the denoiser does not attend to."""
        backbone = self.editing.backbone
        device = torch.device("cuda" if backbone.device.type == "cuda" else "cpu")
        states = backbone.text_states(self.reader, row)[0, position:].to(device, torch.float64)
        mask = backbone.attended(self.reader, row)
        return states if mask is None else states[mask[0, position:].to(device)]
