"""What attacks through the text encoder share: the words that a prompt can be searched in, and encoding prompts in
which some tokens' embeddings are replaced by others, with gradients.

A pipeline may read a prompt with several tokenizers and text encoders (SDXL, SD 3, FLUX). A prompt is one text, so the
words are those that are one token for each of them; what is found is then a text that anybody can type.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fade.adapter import gradients_as_found
from fade.concept import mentions, substitute
from fade.conditioning import Conditioning, Rows
from fade.evaluation.attacks.subject import CannotAttackError, Subject
from fade.modes import evaluation_mode, out_of_inference_mode

Embeddings = Mapping[str, Tensor]
"""By text encoder, embeddings of the words that take the placeholder's places: [n or 1, k, width]."""


@dataclass(frozen=True)
class Encoder:
    """A text encoder, and how it reads."""

    tokenizer: Any
    module: nn.Module
    tables: tuple[nn.Embedding, ...]
    """Of token ids to embeddings, all of the same weight."""
    ids: Tensor
    """Of each of the words the token, int64 [V]."""

    def embeddings(self) -> Tensor:
        """Of every word, [V, width]."""
        return self.of_tokens(self.ids)

    def of_tokens(self, ids: Tensor) -> Tensor:
        """Of token ids [n], [n, width]."""
        weight = self.tables[0].weight.detach()
        return weight[ids.to(weight.device)]


@dataclass(frozen=True)
class Words:
    """The words that are one token for every text encoder of a pipeline, without those that name the concept."""

    texts: tuple[str, ...]
    encoders: dict[str, Encoder]
    placeholder: int
    """A word that is in none of the prompts: its tokens are replaced."""

    def placeholders(self, count: int) -> str:
        return " ".join([self.texts[self.placeholder]] * count)


def words_of(subject: Subject) -> Words:
    """The words of the model under attack, in the first tokenizer's order. Raises CannotAttackError where there are
    none, and where a text encoder has no table of embeddings."""
    pipeline, family = subject.backbone.pipeline, subject.backbone.family
    if missing := [name for name in family.encoders if getattr(pipeline, name, None) is None]:
        raise CannotAttackError(f"this {type(pipeline).__name__} was loaded without its {missing[0]}; load it with one")
    parts = {name: getattr(pipeline, name, None) for name in pipeline.components}
    pairs = {}
    for name, tokenizer in parts.items():
        encoder = parts.get(read_by := name.replace("tokenizer", "text_encoder"))
        if name.startswith("tokenizer") and tokenizer is not None and encoder is not None:
            pairs[read_by] = (getattr(tokenizer, "tokenizer", tokenizer), encoder)  # a processor has its tokenizer
    if not pairs:
        raise CannotAttackError(f"{family.name} has no tokenizer beside a text encoder, whose words could be searched")
    texts = _candidates(next(iter(pairs.values()))[0], subject)
    ids: dict[str, list[int | None]] = {name: _single(tokenizer, texts) for name, (tokenizer, _) in pairs.items()}
    kept = [i for i in range(len(texts)) if all(found[i] is not None for found in ids.values())]
    prompts = (*subject.prompts, *subject.surrogates)
    unused = (place for place, i in enumerate(kept) if not any(mentions(prompt, texts[i]) for prompt in prompts))
    if len(kept) < 2 or (placeholder := next(unused, None)) is None:
        raise CannotAttackError(
            f"{family.name}'s tokenizers have no words in common that are one token wherever they stand in a prompt, "
            "so there is nothing to search in; attack with embedding-inversion instead"
        )
    encoders = {
        name: Encoder(tokenizer, module, _tables(module), torch.tensor([ids[name][i] for i in kept]))
        for name, (tokenizer, module) in pairs.items()
    }
    return Words(tuple(texts[i] for i in kept), encoders, placeholder)


def _candidates(tokenizer: Any, subject: Subject) -> list[str]:
    """Every token of a vocabulary that is a word of its own."""
    special = set(tokenizer.all_special_ids)
    # CLIP's mark of a word's end, which some versions of its tokenizer decode to nothing and some to itself.
    texts = (
        tokenizer.decode([token]).strip().removesuffix("</w>")
        for token in range(len(tokenizer))
        if token not in special
    )
    words = (text for text in texts if text.isprintable() and text and not any(c.isspace() for c in text))
    return [word for word in dict.fromkeys(words) if not (subject.forget and mentions(word, subject.forget))]


def _single(tokenizer: Any, texts: Sequence[str]) -> list[int | None]:
    """Of each text its token, where it is the same one at the beginning of a prompt and later."""
    found = tokenizer([f"{text} {text} {text}" for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    return [one[0] if len(one) == 3 and len(set(one)) == 1 else None for one in found]


def _tables(module: nn.Module) -> tuple[nn.Embedding, ...]:
    """Whatever of a text encoder turns token ids into embeddings: tied tables may be several modules."""
    table = module.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise CannotAttackError(f"{type(module).__name__} has no table of token embeddings that could be replaced")
    return tuple(one for one in module.modules() if isinstance(one, nn.Embedding) and one.weight is table.weight)


def named_by_placeholders(subject: Subject, words: Words, prompts: Sequence[str], count: int) -> tuple[str, ...]:
    """Prompts with `count` placeholders where they name the concept. Raises CannotAttackError for one that does not."""
    for prompt in prompts:
        if not subject.forget or not mentions(prompt, subject.forget):
            raise CannotAttackError(f"the prompt {prompt!r} does not contain {subject.forget!r} for a new word's place")
    return tuple(substitute(prompt, subject.forget, words.placeholders(count)) for prompt in prompts)


def encoded(subject: Subject, words: Words, prompts: Sequence[str], embeddings: Embeddings) -> Conditioning:
    """A row for each prompt, in which the j-th placeholder of prompt i reads as `embeddings[encoder][i, j]` (of one row
    for all, [0, j]). Gradients come through to the embeddings.

    Raises CannotAttackError where a text encoder did not read every placeholder of a prompt, or was not asked.
    """
    start = 0

    def encode(pipeline: Any, texts: list[str], device: torch.device) -> Mapping[str, Rows]:
        nonlocal start
        rows = slice(start, start := start + len(texts))
        own = {name: value if len(value) == 1 else value[rows] for name, value in embeddings.items()}
        with _replaced(words, own) as read:
            result = subject.backbone.family.encode(pipeline, texts, device)
        if unread := [name for name in words.encoders if name not in read]:
            raise CannotAttackError(f"{subject.backbone.family.name} does not ask its {unread[0]} for token embeddings")
        return result

    with contextlib.ExitStack() as state:
        for encoder in words.encoders.values():
            out_of_inference_mode(encoder.module)
            state.enter_context(gradients_as_found(encoder.module))
            state.enter_context(evaluation_mode(encoder.module))
            encoder.module.requires_grad_(False)
        return subject.backbone.encoded_with_gradients(encode, prompts)


@contextlib.contextmanager
def _replaced(words: Words, embeddings: Embeddings) -> Iterator[set[str]]:
    """Placeholders read as embeddings meanwhile; gives the text encoders that did."""
    read: set[str] = set()

    def hook(name: str, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        values, encoder = embeddings[name], words.encoders[name]
        found = arguments[0] == encoder.ids[words.placeholder].item()
        count = values.shape[1]
        if not (found.sum(1) == count).all():
            raise CannotAttackError(
                f"{name} reads {found.sum(1).min().item()} words in the place of {count}: the prompt is too long for "
                "it, or what the family puts around prompts has such words, too"
            )
        read.add(name)
        place = (found.cumsum(1) - 1).clamp(0, count - 1)
        rows = torch.arange(len(found), device=found.device)[:, None] if len(values) > 1 else torch.zeros_like(place)
        values = values.to(output.device, output.dtype)
        return torch.where(found[..., None], values[rows, place], output)

    with contextlib.ExitStack() as hooks:
        for name, encoder in words.encoders.items():
            for table in encoder.tables:
                hooks.callback(table.register_forward_hook(functools.partial(hook, name)).remove)
        yield read
