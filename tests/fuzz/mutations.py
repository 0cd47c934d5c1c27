"""Valid adapter files from random tensors, and ways to damage them: in their bytes, tensors, header and metadata.

A file is held in the open (`Parts`) and put together without any library's checks, so that every kind of wrong file can
be made. Everything is drawn from one `random.Random`: the same seed gives the same file.
"""

import copy
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fade.adapter_file import LayerTensors, write_adapter_file
from fade_kernels import BitMask

DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL", "X9")
HOSTILE_TEXT = (
    "", " ", "\x1b[31mred\x1b[0m", "\x9b2J", "\u202eevil", "line\nerror: another", "\r", "\x00", "\u2066x", "$\\foo$",
    "[bold]x[/bold]", "<script>", "{}", "{0.__class__}", "%s", "../..", "\udc80", "😀", "x" * 2000, "nan",
)  # fmt: skip
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3.5, 1e-320, 1e300, -1e300, float("nan"), float("inf"), 2**31, 2**63, -(2**63),
    10**400, [], {}, [[]], [0, 0], [1, 2, 3], ["40", "70"], [2**20, 2**16], {"a": {}}, [None],
)  # fmt: skip


@dataclass
class Parts:
    """A file's parts. `entries` are the header's tensors in order: name, dtype, shape, [first, last) byte, or None for
    the offsets that follow from the data."""

    metadata: Any
    entries: list[tuple[str, str, list[int], list[int] | None]]
    data: dict[str, bytes]
    outer: dict[str, Any] = field(default_factory=lambda: {"format": "fade-adapter"})
    raw_metadata: str | None = None

    def build(self) -> bytes:
        header, offset, body = [], 0, b""
        metadata = json.dumps(self.metadata) if self.raw_metadata is None else self.raw_metadata
        header.append(f'"__metadata__":{json.dumps({**self.outer, "fade": metadata})}')
        for index, (name, dtype, shape, offsets) in enumerate(self.entries):
            content = self.data.get(f"{index}", self.data.get(name, b""))
            offsets = [offset, offset + len(content)] if offsets is None else offsets
            offset, body = offset + len(content), body + content
            entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            header.append(f"{json.dumps(name)}:{json.dumps(entry)}")
        text = ("{" + ",".join(header) + "}").encode("utf-8", "surrogatepass")
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + body


def valid_file(path: Path, shapes: dict[str, tuple[int, int]], seed: int) -> Parts:
    """A file for layers of these shapes, written by the product, of one of its forms: words or columns, values or
    factors."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    form, layers = rng.choice(("values", "factors")), {}
    rank = 2
    for name, (n, k) in shapes.items():
        mask = BitMask.pack(torch.rand(n, k, generator=generator) < rng.choice((0.01, 0.04, 0.3, 1.0)))
        if form == "values":
            layers[name] = LayerTensors(mask, values=torch.randn(mask.count, generator=generator))
        else:
            factors = torch.randn(rank, k, generator=generator), torch.randn(n, rank, generator=generator)
            layers[name] = LayerTensors(mask, factors=factors)
    record = {
        "shape": [8, 8], "saliency_mean": 0.1, "saliency_max": None, "selected": 3, "density": 0.1,
        "tiles_occupied": 1.0,
    }  # fmt: skip
    metadata = {
        "concept": {
            "forget": "cat", "surrogate": "dog", "forget_prompts": ["a cat"], "surrogate_prompts": ["a dog"],
            "retain_prompts": ["", "a bird"],
        },
        "config": {"seed": 0, "locate": {"keep": 0.01, "saliency": "denoising"}, "overwrite": {}, "data": {}},
        "base": "tiny", "fingerprint": {"float32": "0" * 64, "bfloat16": "1" * 64}, "scale": 2.0,
        "versions": {"torch": "2"}, "created": "2026-01-01T00:00:00+00:00",
        "run": {
            "seconds": {"locate": 1.0, "overwrite": 2.0}, "peak_memory_bytes": {"locate": 10},
            "losses": {"forget": [1.0, 0.5], "retain": [0.0, 0.1]}, "selected": 3, "total": 64, "threshold": 0.5,
            "layers": [{"name": name, **record} for name in shapes],
        },
    }  # fmt: skip
    write_adapter_file(path, metadata, layers)
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    table = json.loads(header)
    tensors = load_file(path)
    outer = table.pop("__metadata__")
    entries = [(name, entry["dtype"], entry["shape"], None) for name, entry in table.items()]
    data = {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}
    return Parts(json.loads(outer.pop("fade")), entries, data, outer)


# --- mutations -------------------------------------------------------------------------------------------------------


def _path_to_node(value: Any, rng: random.Random) -> list[Any]:
    """Keys from the metadata to one of its values."""
    keys = []
    while isinstance(value, (dict, list)) and value and (not keys or rng.random() < 0.8):
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        keys.append(key)
        value = value[key]
    return keys


def _change_metadata(parts: Parts, rng: random.Random) -> None:
    *above, last = _path_to_node(parts.metadata, rng)
    holder = parts.metadata
    for key in above:
        holder = holder[key]
    kind = rng.randrange(6)
    if kind == 0:
        del holder[last]
    elif kind == 1:
        holder[last] = rng.choice(HOSTILE_TEXT)
    elif kind == 2:
        holder[last] = copy.deepcopy(parts.metadata[rng.choice(list(parts.metadata))])
    elif kind == 3 and isinstance(holder, dict):
        holder[rng.choice(HOSTILE_TEXT)] = holder.pop(last)
    elif kind == 4:
        holder[last] = nested = []
        for _ in range(rng.choice((3, 12, 40, 400))):
            nested.append([])
            nested = nested[0]
    else:
        holder[last] = copy.deepcopy(rng.choice(HOSTILE_VALUES))


def _change_raw_metadata(parts: Parts, rng: random.Random) -> None:
    text = json.dumps(parts.metadata)
    place = rng.randrange(len(text))
    parts.raw_metadata = rng.choice(
        (
            text[:place],
            text[:place] + rng.choice('{}[],:"\\0e-\x00é') + text[place + 1 :],
            "[" * rng.choice((10, 2000, 200_000)),
            '{"a":' * rng.choice((10, 2000, 100_000)),
            "[" + "{}," * 60_000 + "{}]",
            text[:-1] + "," + text[1:],  # every key twice
            text[:-1] + ', "scale": 1e999}',
            text[:-1] + ', "scale": -0.0}',
            text[:-1] + ', "created": "\\ud800"}',
            "null", "7", '"text"', "",
        )
    )  # fmt: skip


def _change_outer(parts: Parts, rng: random.Random) -> None:
    rng.choice(
        (
            lambda: parts.outer.update(format="pt"),
            lambda: parts.outer.update(format=3),
            lambda: parts.outer.update(more=rng.choice(HOSTILE_TEXT)),
            lambda: parts.outer.update(more={"a": 1}),
            lambda: parts.outer.clear(),
        )
    )()


def _change_shapes(parts: Parts, rng: random.Random) -> None:
    """A layer's shape in the metadata, alone or together with tensors that agree with it."""
    shapes = parts.metadata.get("shapes") if isinstance(parts.metadata, dict) else None
    if not isinstance(shapes, dict) or not shapes:
        return
    name = rng.choice(list(shapes))
    kind = rng.randrange(4)
    if kind == 0:
        shapes[name] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
    elif kind == 1:
        size = rng.choice((-1, 0, 1, 31, 32, 33, 2**16, 2**31, 2**40))
        shapes[name] = [size, rng.choice((size, 8, 65536))]
    elif kind == 2:
        shapes[rng.choice(("a", "x" * 5000, *HOSTILE_TEXT))] = shapes.pop(name)
    else:  # as large as it can be, with next to nothing behind it
        rows = rng.choice((100, 5000, 32768))
        shapes[name] = [rows, 65536]
        key = "fade.unet." + name
        parts.entries = [entry for entry in parts.entries if not entry[0].startswith(f"{key}.")]
        for part, dtype, shape, content in (
            ("row_counts", "I32", [rows], struct.pack("<i", 1) + bytes(4 * (rows - 1))),
            ("columns", "U16", [1], struct.pack("<H", 65535)),
            ("values", "F32", [1], struct.pack("<f", 1.0)),
        ):
            parts.entries.append((f"{key}.{part}", dtype, shape, None))
            parts.data[f"{key}.{part}"] = content


def _change_entry(parts: Parts, rng: random.Random) -> None:
    """One tensor's name, dtype, shape, place or presence in the header."""
    if not parts.entries:
        return
    index = rng.randrange(len(parts.entries))
    name, dtype, shape, offsets = parts.entries[index]
    parts.data[name] = parts.data.get(name, b"")
    size = len(parts.data[name])
    kind = rng.randrange(9)
    if kind == 0:
        del parts.entries[index]
        return
    if kind == 1:
        parts.entries.insert(rng.randrange(len(parts.entries) + 1), parts.entries[index])  # the name twice
        return
    if kind == 2:
        other = rng.choice(parts.entries)[0]
        parts.data[name], parts.data[other] = parts.data.get(other, b""), parts.data[name]
        return
    if kind == 3:
        new = rng.choice(
            (rng.choice(parts.entries)[0], name + "x", "fade.unet.", name.replace("values", "a"), *HOSTILE_TEXT)
        )
        parts.data[new] = parts.data[name]
        name = new
    elif kind == 4:
        dtype = rng.choice(DTYPES)
    elif kind == 5:
        shape = list(rng.choice(([], [0], [-1], [2**62, 4], [*shape, 1], shape[::-1], [size], [1, *shape], [2**70])))
    elif kind == 6:
        first, last = rng.choice(((0, size), (-8, size), (size, 0), (1, size + 1), (0, 2**64), (2**63, 2**63 + size)))
        offsets = [first, last]
    elif kind == 7:
        cut = rng.randrange(size + 1)
        parts.data[name] = rng.choice((parts.data[name][:cut], parts.data[name] + bytes(cut)))
        if rng.random() < 0.5 and len(shape) == 1:
            width = {"F32": 4, "I32": 4, "U16": 2}.get(dtype, 1)
            shape = [len(parts.data[name]) // width]
    else:
        parts.data[f"{index}"] = parts.data[name][: size // 2]
    parts.entries[index] = (name, dtype, shape, offsets)


def _change_numbers(parts: Parts, rng: random.Random) -> None:
    """Numbers in one tensor: mask words, counts, columns, values or factors."""
    if not parts.entries:
        return
    name, dtype, *_ = rng.choice(parts.entries)
    content = bytearray(parts.data.get(name, b""))
    width, codes = {
        "F32": (4, [struct.pack("<f", x) for x in (float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, 0.0)]),
        "I32": (4, [struct.pack("<i", x) for x in (-1, 0, 1, 2, -(2**31), 2**31 - 1, rng.getrandbits(31))]),
        "U16": (2, [struct.pack("<H", x) for x in (0, 1, 63, 65535, rng.getrandbits(16))]),
    }.get(dtype, (1, [b"\x00", b"\xff"]))
    count = len(content) // width
    if count == 0:
        return
    kind = rng.randrange(4)
    if kind == 0:
        content[:] = rng.choice(codes) * count
    elif kind == 1:
        content[:] = rng.randbytes(len(content))
    else:
        for _ in range(rng.choice((1, 1, 2, 5))):
            place = rng.randrange(count) * width
            content[place : place + width] = rng.choice(codes)
    parts.data[name] = bytes(content)


CHANGES: tuple[Callable[[Parts, random.Random], None], ...] = (
    _change_metadata, _change_metadata, _change_raw_metadata, _change_outer, _change_shapes, _change_entry,
    _change_entry, _change_numbers, _change_numbers,
)  # fmt: skip


def _change_bytes(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    kind = rng.randrange(8)
    place = rng.choice((rng.randrange(len(changed)), rng.randrange(min(len(changed), 300))))
    if kind == 0:
        return bytes(changed[:place])
    if kind == 1:
        changed[:8] = struct.pack("<Q", rng.choice((0, 2, len(changed) - 8, len(changed), 2**24 + 1, 2**63, 2**64 - 1)))
    elif kind == 2:
        changed += rng.randbytes(rng.choice((1, 8, 1000)))
    elif kind == 3:
        del changed[place : place + rng.choice((1, 4, 100))]
    elif kind == 4:
        changed[place:place] = rng.randbytes(rng.choice((1, 4, 100)))
    elif kind == 5:
        changed[place : place + 4] = b"\xff\xfe\x80\xc0"
    else:
        for _ in range(rng.choice((1, 1, 3, 30))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def mutated(parts: Parts, rng: random.Random) -> bytes:
    """The file with one to three changes, and now and then another one in its bytes."""
    parts = copy.deepcopy(parts)
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3))):
        if not isinstance(parts.metadata, dict) or not parts.metadata:
            break
        rng.choice(CHANGES)(parts, rng)
    content = parts.build()
    return _change_bytes(content, rng) if rng.random() < 0.2 else content
