"""Adapters added up into one sparse file: one product a layer at inference, however many there were.

The sum Σ w_i s_i Δ_i is made of the files alone, in float32 and in the order of the files, on the union of their
positions. The file remembers its parts (`fade.adapter_file`), so that any of them can be taken out again: what is left
is, bit for bit, what combining the others gives. `fade.tuner` does the same with adapters on a model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fade.adapter import versions
from fade.adapter_file import MOST_SCALE, AdapterFile, LayerTensors, component_of, read_parts, write_adapter_file
from fade.base_model import check_same_base, short_digest
from fade.concept import Pair, check_together, pairs_in, plain_words, record_of, without_mention
from fade.errors import AdapterFileError, FadeError
from fade.files import check_writable, digest
from fade.peft_file import read_any_file
from fade_kernels import BitMask, masked_factor_values


@dataclass(frozen=True)
class Part:
    """One adapter of a sum: what adapter files record of it, and w s Δ by layer, float32 values at its positions."""

    record: dict[str, Any]
    layers: dict[str, LayerTensors]

    @property
    def pairs(self) -> tuple[Pair, ...]:
        return pairs_in(self.record["concept"])

    @property
    def forgets(self) -> str:
        return self.record["concept"]["forget"]


@dataclass(frozen=True)
class Combined:
    """What `combine_adapters` wrote: the concepts of its parts in order, the positions of the union, its share of the
    layers' weights, and the file's bytes."""

    concepts: tuple[str, ...]
    selected: int
    density: float
    bytes: int


def combine_adapters(
    adapters: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    without: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> Combined:
    """Adds adapter files up into one file, and takes parts out again. Needs no model.

    Args:
        adapters: files, or folders that `fade.unlearn` wrote; of a file that was itself combined, its parts are taken.
        output: the file to write.
        weights: of each of `adapters`; 1 by default.
        without: parts to leave out: the words of their concept, or their file.
        overwrite: replace `output` where it exists.

    Raises WrongBaseError for adapters of different weights, AdapterFileError for a bad file, and FadeError where the
    same adapter or concept is there twice, the surrogate of one is forgotten by another, a part to take out is not
    there or none is left, weights do not fit, or `output` cannot be written.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise FadeError(f"{output} exists already; pass --overwrite to replace it (in Python: overwrite=True)")
    if not adapters:
        raise FadeError("there is no adapter to combine; give the files")
    check_writable(output)
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise FadeError(f"there must be one weight for each of {len(adapters)} adapters, not {len(weights)}")
    for weight in weights:
        if not (math.isfinite(weight) and 0 < abs(weight) <= MOST_SCALE):
            raise FadeError(f"a weight must be a number up to {MOST_SCALE:g} other than 0, not {weight:g}")
    files = [read_any_file(path) for path in adapters]
    _check_bases(files)
    parts = [part for (path, file), weight in zip(files, weights, strict=True) for part in _parts(path, file, weight)]
    for name in without:
        parts = _taken_out(parts, name)
    _check_parts(parts)
    layers = _sum(parts)
    size = write_adapter_file(output, _metadata(parts, [file for _, file in files]), layers, [p.layers for p in parts])
    selected = sum(layer.mask.count for layer in layers.values())
    total = sum(math.prod(layer.mask.shape) for layer in layers.values())
    return Combined(tuple(part.forgets for part in parts), selected, selected / max(1, total), size)


def _check_bases(files: Sequence[tuple[Path, AdapterFile]]) -> None:
    (first, reference), *others = files
    for path, file in others:
        theirs, ours = file.metadata["fingerprint"], reference.metadata["fingerprint"]
        check_same_base(
            theirs,
            ours,
            f"{path} was trained on {file.metadata.get('base', 'another model')} ({short_digest(theirs)}), {first} on "
            f"{reference.metadata.get('base', 'another model')} ({short_digest(ours)})",
            "; only adapters of the same weights add up",
        )


def _parts(path: Path, file: AdapterFile, weight: float) -> list[Part]:
    """What a file adds to the sum: itself, or its parts."""
    try:
        inner = read_parts(file)
    except AdapterFileError as error:
        raise AdapterFileError(f"{path}: {error}") from error
    if inner:
        records = [{**record, "weight": record["weight"] * weight} for record in file.metadata["parts"]]
        return [
            Part(record, {name: _weighted(layer, weight) for name, layer in layers.items()})
            for record, layers in zip(records, inner, strict=True)
        ]
    scale = weight * float(file.metadata["scale"])
    metadata = file.metadata
    record = {
        "concept": metadata["concept"],
        "weight": weight,
        "digest": _digest(file),
        "path": metadata.get("run", {}).get("path", ""),
        "created": metadata.get("created", ""),
        "config": metadata.get("config", {}),
    }
    return [Part(record, {name: _weighted(layer, scale) for name, layer in file.layers.items()})]


def _weighted(layer: LayerTensors, weight: float) -> LayerTensors:
    values = layer.values if layer.factors is None else masked_factor_values(*layer.factors, layer.mask)
    weighted = values.float() * weight
    if not bool(torch.isfinite(weighted).all()):
        raise FadeError(f"with a weight of {weight:g} a change is beyond what float32 holds; choose a smaller one")
    return LayerTensors(layer.mask, values=weighted, kernel=layer.kernel)


def _digest(file: AdapterFile) -> str:
    """Of what an adapter changes, whatever file it is in."""
    tensors = {"scale": torch.tensor(float(file.metadata["scale"]), dtype=torch.float64)}
    for name, layer in file.layers.items():
        tensors[f"{name}.mask"] = layer.mask.words
        own = {"values": layer.values} if layer.factors is None else dict(zip("ab", layer.factors, strict=True))
        tensors |= {f"{name}.{part}": tensor for part, tensor in own.items()}
    return digest(tensors)


def _taken_out(parts: Sequence[Part], name: str | Path) -> list[Part]:
    """The parts without the one of this name: a concept's words, or an adapter's file or folder."""
    forgotten = ", ".join(repr(part.forgets) for part in parts) or "nothing any more"
    wanted = plain_words(str(name))
    named = [part for part in parts if plain_words(part.forgets) == wanted]
    if not named and Path(name).exists():
        path, file = read_any_file(name)
        digests = {part["digest"] for part in file.metadata.get("parts", [])} or {_digest(file)}
        named = [part for part in parts if part.record["digest"] in digests]
        if not named:
            raise FadeError(f"{path} is no part of the sum, which forgets {forgotten}")
    for part in parts:
        if not named and any(plain_words(pair.forget) == wanted for pair in part.pairs):
            raise FadeError(
                f"{str(name)!r} is forgotten together with others by one adapter, which comes out only whole: name "
                f"{part.forgets!r}"
            )
    if not named:
        raise FadeError(f"there is no part that forgets {str(name)!r}, and no such file; the sum forgets {forgotten}")
    return [part for part in parts if not any(part is other for other in named)]


def _check_parts(parts: Sequence[Part]) -> None:
    if not parts:
        raise FadeError("no adapter is left; nothing is written")
    seen: dict[str, Part] = {}
    for part in parts:
        if part.record["digest"] in seen:
            raise FadeError(f"the adapter that forgets {part.forgets!r} is in the sum twice; give it once, or a weight")
        seen[part.record["digest"]] = part
        concept = part.record["concept"]
        if len(parts) > 1 and len(concept["forget_prompts"]) != len(concept["surrogate_prompts"]):
            raise FadeError(f"the adapter that forgets {part.forgets!r} does not say which prompts answer which")
    check_together([pair for part in parts for pair in part.pairs])


def _sum(parts: Sequence[Part]) -> dict[str, LayerTensors]:
    layers = {}
    for name in dict.fromkeys(layer for part in parts for layer in part.layers):
        terms = [part.layers[name] for part in parts if name in part.layers]
        shapes = {term.mask.shape for term in terms}
        if len(shapes) > 1:
            raise AdapterFileError(f"{name} has the shapes {' and '.join(map(str, sorted(shapes)))} in the files")
        words = terms[0].mask.words.clone()
        dense = torch.zeros(terms[0].mask.shape, dtype=torch.float32)
        for term in terms:
            words |= term.mask.words
            dense[term.mask.unpack()] += term.values
        if not bool(torch.isfinite(dense).all()):
            raise FadeError(f"the sum of {name} is beyond what float32 holds; choose smaller weights")
        union = BitMask.from_words(words, terms[0].mask.shape)
        layers[name] = LayerTensors(union, values=dense[union.unpack()], kernel=terms[0].kernel)
    return layers


def _metadata(parts: Sequence[Part], files: Sequence[AdapterFile]) -> dict[str, Any]:
    pairs = [pair for part in parts for pair in part.pairs]
    concept = parts[0].record["concept"]
    if len(parts) > 1:
        retain = dict.fromkeys(prompt for part in parts for prompt in part.record["concept"]["retain_prompts"])
        concept = record_of(pairs, without_mention(retain, pairs))
    paths = {part.record.get("path") for part in parts}
    # Of a quantised base where the first is: what differs was told.
    fingerprints = [file.metadata["fingerprint"] for file in reversed(files)]
    fingerprints = [one for one in fingerprints if ("scheme" in one) == ("scheme" in fingerprints[-1])]
    return {
        "component": component_of(files[0].metadata),  # one, because all have the same fingerprint
        "concept": concept,
        "parts": [part.record for part in parts],
        "base": files[0].metadata.get("base", "unknown"),
        "fingerprint": {dtype: value for fingerprint in fingerprints for dtype, value in fingerprint.items()},
        "scale": 1.0,
        "run": {"path": paths.pop() if len(paths) == 1 else "both"},
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
