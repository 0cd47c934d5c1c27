"""The text embeddings that closed forms of the literature read: of a prompt the token in which it differs from another,
or that one and all behind it.

UCE's authors embed a concept by itself and take its last token, or, in their first code, the tokens from the last one
on, the end and the padding among them. With a template around the concept its last token is the last one in which the
prompt differs from its surrogate.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fade.backbones import Backbone
from fade.conditioning import EncodedPrompts

Tokens = Literal["last", "following"]


def last_difference(ids: Sequence[int], others: Sequence[int]) -> int:
    """The position of the last token of `ids` before what both have in common at the end; 0 where that is all."""
    same = 0
    while same < min(len(ids), len(others)) and ids[-1 - same] == others[-1 - same]:
        same += 1
    return max(0, len(ids) - 1 - same)


def paired_embeddings(
    backbone: Backbone, reader: str, pairs: Sequence[tuple[str, str]], encoded: EncodedPrompts, tokens: Tokens
) -> tuple[Tensor, Tensor]:
    """What a reader's layers read of the concept and, row by row, of its surrogate: float64 [k, K] each, on the
    denoiser's device. `encoded` has every prompt of the pairs."""
    ids = _ids(backbone, reader, [prompt for pair in pairs for prompt in pair])
    own, others = [], []
    for prompt, answer in pairs:
        x = _from(backbone, reader, prompt, encoded, last_difference(ids[prompt], ids[answer]), tokens)
        y = _from(backbone, reader, answer, encoded, last_difference(ids[answer], ids[prompt]), tokens)
        many = min(len(x), len(y))
        own.append(x[:many])
        others.append(y[:many])
    return torch.cat(own), torch.cat(others)


def embeddings(
    backbone: Backbone, reader: str, prompts: Sequence[str], encoded: EncodedPrompts, tokens: Tokens
) -> Tensor:
    """The same of prompts by themselves, which are compared with the empty one: float64 [m, K]."""
    ids = _ids(backbone, reader, [*prompts, ""])
    rows = [
        _from(backbone, reader, prompt, encoded, last_difference(ids[prompt], ids[""]), tokens) for prompt in prompts
    ]
    return torch.cat(rows)


def all_embeddings(backbone: Backbone, reader: str, prompt: str, encoded: EncodedPrompts) -> Tensor:
    """Of every token of a prompt that the denoiser attends to: float64 [n, K]."""
    return _from(backbone, reader, prompt, encoded, 0, "following")


def _ids(backbone: Backbone, reader: str, prompts: Sequence[str]) -> dict[str, list[int]]:
    """Token ids by prompt, those of all segments in turn."""
    found = backbone.token_ids(prompts, reader)
    return {
        prompt: [one for ids, _ in segments for one in ids] for prompt, segments in zip(prompts, found, strict=True)
    }


def _from(
    backbone: Backbone, reader: str, prompt: str, encoded: EncodedPrompts, position: int, tokens: Tokens
) -> Tensor:
    row = encoded[prompt]
    states = backbone.text_states(reader, row)[0].double()
    if tokens == "last":
        return states[position : position + 1]
    mask = backbone.attended(reader, row)
    behind = states[position:]
    return behind if mask is None else behind[mask[0, position:].to(behind.device)]
