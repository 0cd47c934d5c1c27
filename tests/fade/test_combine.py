"""Adapters added up into one file, taken out again, and what is refused; then several concepts together."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fade
from fade.adapter_file import AdapterFile, LayerTensors, read_adapter_file, read_parts, write_adapter_file
from fade.combine import combine_adapters
from fade.concept import pairs_in
from fade.errors import AdapterFileError, FadeError, WrongBaseError
from fade_kernels import BitMask

SHAPES = {"a.to_k": (40, 24), "a.to_v": (33, 24), "b.to_v": (16, 70)}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter of random positions and values, in values or factors form."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**32)

    def make(
        forget: str, surrogate: str = "nothing", base: str = "one", factors: bool = False, scale: float = 1.0,
        layers: tuple[str, ...] = tuple(SHAPES),
    ) -> Path:  # fmt: skip
        tensors = {}
        for name in layers:
            n, k = SHAPES[name]
            mask = BitMask.pack(torch.rand(n, k, generator=generator) < 0.3)
            tensors[name] = LayerTensors(mask, values=torch.randn(mask.count, generator=generator))
            if factors:
                ab = torch.randn(2, k, generator=generator), torch.randn(n, 2, generator=generator)
                tensors[name] = LayerTensors(mask, factors=ab)
        path = tmp_path / f"{forget}.safetensors"
        concept = {
            "forget": forget, "surrogate": surrogate, "forget_prompts": [f"a {forget}", forget],
            "surrogate_prompts": [f"a {surrogate}", surrogate],
            "retain_prompts": ["a horse", "the owl", f"no {forget}s"],
        }  # fmt: skip
        metadata = {"concept": concept, "fingerprint": {"float32": base}, "scale": scale, "run": {"path": "text path"}}
        write_adapter_file(path, metadata, tensors)
        return path

    return make


def delta(file: AdapterFile, name: str) -> torch.Tensor:
    dense = torch.zeros(file.layers[name].mask.shape)
    dense[file.layers[name].mask.unpack()] = file.layers[name].values
    return dense


def same_layers(first: Path, second: Path) -> bool:
    one, two = read_adapter_file(first), read_adapter_file(second)
    return one.layers.keys() == two.layers.keys() and all(
        layer.mask == two.layers[name].mask and torch.equal(layer.values, two.layers[name].values)
        for name, layer in one.layers.items()
    )


def test_the_sum_is_that_of_all_on_the_union_of_their_positions(write: Any, tmp_path: Path) -> None:
    files = [write("cat"), write("dog", scale=0.5, layers=("a.to_k", "b.to_v")), write("elk", factors=True, scale=2.0)]
    weights = [1.0, -0.3, 0.7]
    made = combine_adapters(files, tmp_path / "all", weights)
    total, parts = read_adapter_file(tmp_path / "all"), [read_adapter_file(file) for file in files]
    assert made.concepts == ("cat", "dog", "elk") and made.selected == total.selected
    for name, (n, k) in SHAPES.items():
        expected, union = torch.zeros(n, k, dtype=torch.float64), torch.zeros(n, k, dtype=torch.bool)
        for weight, part in zip(weights, parts, strict=True):
            if name not in part.layers:
                continue
            layer = part.layers[name]
            own = torch.zeros(n, k, dtype=torch.float64)
            if layer.factors is not None:
                own = (layer.factors[1] @ layer.factors[0]).double() * layer.mask.unpack()
            else:
                own[layer.mask.unpack()] = layer.values.double()
            expected += weight * part.metadata["scale"] * own
            union |= layer.mask.unpack()
        assert torch.equal(total.layers[name].mask.unpack(), union)
        torch.testing.assert_close(delta(total, name).double(), expected, atol=1e-5, rtol=1e-5)
    assert [pair.forget for pair in pairs_in(total.metadata["concept"])] == ["cat", "dog", "elk"]
    assert total.metadata["concept"]["retain_prompts"] == ["a horse", "the owl", "no cats", "no dogs", "no elks"]


def test_any_one_taken_out_leaves_what_the_others_make_bit_for_bit(write: Any, tmp_path: Path) -> None:
    files = {name: write(name, factors=name == "dog") for name in ("cat", "dog", "elk")}
    combine_adapters(list(files.values()), tmp_path / "all", [1.0, 0.1, 3.0])
    weights = dict(zip(files, [1.0, 0.1, 3.0], strict=True))
    for name, by in itertools.product(files, ("concept", "file")):
        rest = tmp_path / f"without-{name}-{by}"
        combine_adapters([tmp_path / "all"], rest, without=[name.upper() if by == "concept" else files[name]])
        others = [other for other in files if other != name]
        combine_adapters([files[o] for o in others], tmp_path / "others", [weights[o] for o in others], overwrite=True)
        assert same_layers(rest, tmp_path / "others")
        assert [pair.forget for pair in pairs_in(read_adapter_file(rest).metadata["concept"])] == others
    (whole,) = combine_adapters([rest], tmp_path / "last", without=["cat"]).concepts
    assert whole == "dog"


def test_a_combined_file_adds_up_part_by_part_like_any_other(write: Any, tmp_path: Path) -> None:
    a, b, c = write("cat"), write("dog"), write("elk")
    combine_adapters([a, b], tmp_path / "two")
    combine_adapters([tmp_path / "two", c], tmp_path / "nested")
    combine_adapters([a, b, c], tmp_path / "flat")
    assert same_layers(tmp_path / "nested", tmp_path / "flat")
    combine_adapters([tmp_path / "nested"], tmp_path / "rest", without=[tmp_path / "two"])
    assert same_layers(tmp_path / "rest", c)
    parts = read_parts(read_adapter_file(tmp_path / "flat"))
    for part, file in zip(parts, (a, b, c), strict=True):
        for name, layer in read_adapter_file(file).layers.items():
            assert part[name].mask == layer.mask and torch.equal(part[name].values, layer.values)


def test_what_cannot_be_combined_is_refused_in_one_line(write: Any, tmp_path: Path) -> None:
    a, b, out = write("cat"), write("dog"), tmp_path / "out"
    other_base, chained = write("owl", base="two"), write("fox", surrogate="a cat")
    for files, options, error, told in (
        ([a, other_base], {}, WrongBaseError, "only adapters of the same weights add up"),
        ([a, chained], {}, FadeError, "the surrogate 'a cat' of 'fox' is itself to be forgotten"),
        ([a, a], {}, FadeError, "in the sum twice"),
        ([a, b], {"weights": [1.0]}, FadeError, "one weight for each of 2"),
        ([a, b], {"weights": [1.0, 0.0]}, FadeError, "other than 0"),
        ([a, b], {"weights": [1.0, float("nan")]}, FadeError, "a weight must be a number"),
        ([a, b], {"without": ["owl"]}, FadeError, "the sum forgets 'cat', 'dog'"),
        ([a, b], {"without": [other_base]}, FadeError, "is no part of the sum"),
        ([a, b], {"without": ["cat", "dog"]}, FadeError, "no adapter is left"),
        ([a, tmp_path / "missing"], {}, AdapterFileError, "there is no adapter file"),
        ([], {}, FadeError, "there is no adapter"),
    ):
        with pytest.raises(error, match=told) as raised:
            combine_adapters(files, out, **options)
        assert "\n" not in str(raised.value)
        assert not out.exists()
    out.write_text("old")
    with pytest.raises(FadeError, match="exists already; pass --overwrite"):
        combine_adapters([a, b], out)
    assert out.read_text() == "old"


def test_parts_that_are_not_what_the_sum_is_of_are_refused(write: Any, tmp_path: Path) -> None:
    combine_adapters([write("cat"), write("dog")], tmp_path / "all")
    file = read_adapter_file(tmp_path / "all")
    key = next(key for key in file.part_tensors if key.endswith(".values") and file.part_tensors[key].numel())
    file.part_tensors[key] = file.part_tensors[key] + 1
    with pytest.raises(AdapterFileError, match="do not add up"):
        read_parts(file)
    del file.part_tensors[key]
    with pytest.raises(AdapterFileError, match="parts are damaged"):
        read_parts(file)


def test_a_combined_adapter_on_a_pipeline_is_the_sum_and_saves_as_one(
    pipeline: Any, tmp_path: Path, random_files: Callable[..., list[Path]]
) -> None:
    files = random_files(pipeline, 3)
    combine_adapters(files, tmp_path / "all.safetensors")
    several = [fade.load_adapter(pipeline, file, name=f"part{index}") for index, file in enumerate(files)]
    sums = {name: sum(layer.get_delta_weight(a.name) for a in several) for name, layer in several[0].layers.items()}
    for adapter in several:
        adapter.remove()
    combined = fade.load_adapter(pipeline, tmp_path / "all.safetensors")
    for name, layer in combined.layers.items():
        torch.testing.assert_close(layer.get_delta_weight("fade"), sums[name])
    combined.save(tmp_path / "again.safetensors")
    saved = read_adapter_file(tmp_path / "again.safetensors")
    assert same_layers(tmp_path / "again.safetensors", tmp_path / "all.safetensors")
    assert "parts" not in saved.metadata and read_parts(saved) == []
    assert len(pairs_in(saved.metadata["concept"])) == 3


@pytest.fixture
def random_files(tmp_path: Path) -> Callable[..., list[Path]]:
    from tests.fade.adapters import random_adapter

    def make(pipeline: Any, count: int, **options: Any) -> list[Path]:
        files = []
        for index in range(count):
            adapter = random_adapter(pipeline, values=True, seed=index, **options)
            concept = {"forget": f"thing {index}", "surrogate": "dust", "retain_prompts": ["a horse"]}
            adapter.metadata["concept"] = {
                **concept,
                "forget_prompts": [f"thing {index}"],
                "surrogate_prompts": ["dust"],
            }
            adapter.save(tmp_path / f"part{index}.safetensors")
            adapter.remove()
            files.append(tmp_path / f"part{index}.safetensors")
        return files

    return make


def test_drawing_follows_every_change_of_what_is_kept_dense(
    pipeline: Any, tmp_path: Path, random_files: Callable[..., list[Path]]
) -> None:
    """What is kept from one call to the next is never older than what it was made of, however that was written."""
    from fade.layers import _dense_deltas

    combine_adapters(random_files(pipeline, 2, density=0.4), tmp_path / "all.safetensors")
    adapter = fade.load_adapter(pipeline, tmp_path / "all.safetensors")
    layer = next(iter(adapter.layers.values()))
    weight, x = layer.get_base_layer().weight, torch.randn(3, 5, layer.get_base_layer().weight.shape[1])

    def check() -> None:
        expected = torch.nn.functional.linear(x, weight + layer.get_delta_weight("fade"), layer.get_base_layer().bias)
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(layer(x), expected.detach())
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), expected.detach())

    check()
    assert layer in _dense_deltas
    changes: list[Callable[[], Any]] = [
        lambda: weight.data.mul_(1.5),  # unseen by any version counter, as are the next two
        lambda: layer.lora_A["fade"].weight.data.mul_(-2),
        lambda: layer.lora_B["fade"].weight.data.fill_(0.5),
        lambda: setattr(adapter, "scale", 0.25),
    ]
    for change in changes:
        change()
        check()
    adapter.disable()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.get_base_layer()(x))
    adapter.enable()
    check()
    adapter.merge()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.get_base_layer()(x))
    adapter.unmerge()
    check()
