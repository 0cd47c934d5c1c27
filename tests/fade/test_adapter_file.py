"""The adapter file: the smaller form is chosen, everything in it is checked, loaders that know no masks refuse it."""

import contextlib
import functools
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fade
from fade.adapter_file import FORMAT, LayerTensors, read_adapter_file, write_adapter_file
from fade.errors import AdapterFileError, FadeError
from fade_kernels import BitMask, masked_factor_values

from ..fuzz.run import LIMITED, memory_limit
from .adapters import random_adapter

RECORD = {
    "name": "a", "shape": [40, 70], "saliency_mean": 0.1, "saliency_max": None, "selected": 3, "density": 0.1,
    "tiles_occupied": 1.0,
}  # fmt: skip
METADATA = {"concept": {"forget": "cat", "surrogate": "dog"}, "fingerprint": {"float32": "0"}, "scale": 2.0}


def layer(density: float, rank: int | None, shape: tuple[int, int] = (40, 70), seed: int = 0) -> LayerTensors:
    generator = torch.Generator().manual_seed(seed)
    mask = BitMask.pack(torch.rand(shape, generator=generator) < density)
    if rank is None:
        return LayerTensors(mask, values=torch.randn(mask.count, generator=generator))
    factors = (torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator))
    return LayerTensors(mask, factors=factors)


@pytest.mark.parametrize(("density", "form"), [(0.01, "values"), (0.9, "factors")])
def test_the_smaller_form_is_written(tmp_path: Path, density: float, form: str) -> None:
    layers = {"a": layer(density, 4), "b.c": layer(density, 4, (33, 32), seed=1)}
    size = write_adapter_file(tmp_path / "f", METADATA, layers)
    file = read_adapter_file(tmp_path / "f")
    assert (file.metadata["form"], file.bytes) == (form, size)
    assert file.selected == sum(tensors.mask.count for tensors in layers.values())
    assert file.total == 40 * 70 + 33 * 32
    for name, tensors in layers.items():
        assert file.layers[name].mask == tensors.mask
        if form == "factors":
            assert all(torch.equal(a, b) for a, b in zip(file.layers[name].factors, tensors.factors, strict=True))
        else:
            wanted = masked_factor_values(*tensors.factors, tensors.mask)
            assert torch.equal(file.layers[name].values, wanted)
    alternative = 4 * (40 + 70 + 33 + 32) * 4 if form == "values" else 4 * file.selected
    held = sum(t.nbytes for k, t in load_file(tmp_path / "f").items() if k.rpartition(".")[2] in ("values", "a", "b"))
    assert held < alternative


@pytest.mark.parametrize("density", [0.001, 0.01, 0.5, 1.0])
def test_masks_are_stored_as_words_or_columns_whichever_is_smaller(tmp_path: Path, density: float) -> None:
    tensors = layer(density, None, (64, 640))
    write_adapter_file(tmp_path / "f", METADATA, {"a": tensors})
    stored = load_file(tmp_path / "f")
    del stored["fade.unet.a.values"]
    assert sum(t.nbytes for t in stored.values()) == min(64 * 20 * 4, 64 * 4 + 2 * tensors.mask.count)
    back = read_adapter_file(tmp_path / "f").layers["a"]
    assert back.mask == tensors.mask
    assert torch.equal(back.values, tensors.values)


def test_loaders_that_know_no_masks_refuse_it(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapter = random_adapter(pipeline)
    adapter.save(tmp_path / "adapter.safetensors")
    adapter.remove()
    with pytest.raises(ValueError, match="Invalid LoRA"):
        pipeline.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    assert not getattr(pipeline.unet, "peft_config", {})
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(pipeline.unet, str(tmp_path))


def damaged(path: Path, **changes: object) -> Path:
    """The file again with tensors (by key) replaced, dropped (None) or added, or the header's entries replaced."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    header = json.loads(metadata["fade"])
    for key, value in changes.items():
        if key.startswith("header_"):
            header[key.removeprefix("header_")] = value
        elif value is None:
            tensors.pop("fade.unet.a." + key)
        else:
            tensors["fade.unet.a." + key] = value
    target = path.with_name("damaged")
    save_file(tensors, target, metadata={"format": metadata["format"], "fade": json.dumps(header)})
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": None}, "values is missing"),
        ({"values": torch.zeros(3)}, "values has dtype torch.float32 and shape"),
        ({"values": torch.full((28,), float("nan"))}, "NaN"),
        ({"columns": torch.zeros(28, dtype=torch.uint16)}, "out of range or out of order"),
        ({"columns": torch.full((28,), 70).to(torch.uint16)}, "out of range or out of order"),
        ({"row_counts": torch.full((40,), -1, dtype=torch.int32)}, "row_counts is out of range"),
        ({"row_counts": torch.full((40,), 2**30, dtype=torch.int32)}, "row_counts is out of range"),
        ({"row_counts": torch.zeros(40)}, "row_counts has dtype"),
        ({"extra": torch.zeros(1)}, "belong to no layer"),
        ({"header_form": "dense"}, "unknown form"),
        ({"header_version": 99}, "format version 99"),
        ({"header_shapes": {"a": [41, 70]}}, "has dtype torch.int32 and shape"),
        ({"header_shapes": {"a": "wide"}}, "damaged"),
        ({"header_shapes": {"a": [2**40, 2**40]}}, "has the shape"),
        ({"header_fingerprint": None}, "damaged"),
        ({"header_concept": None}, "damaged"),
        ({"header_scale": "much"}, "damaged"),
        ({"header_scale": float("nan")}, "scale"),
        ({"header_scale": 1e300}, "scale"),
        ({"header_scale": 10**400}, "scale"),
        ({"header_shapes": {"a": [float("inf"), 70]}}, "damaged"),
        ({"header_shapes": {"a": [40, 10**30]}}, "has the shape"),
        ({"header_shapes": {"a": [0, 70]}}, "has the shape"),
        ({"header_fingerprint": {}}, "fingerprint is empty"),
        ({"header_fingerprint": {"float32": 5}}, "fingerprint is no text"),
        ({"header_config": "none"}, "config is no table"),
        ({"header_config": {"locate": 3}}, "config is no table of tables"),
        ({"header_run": []}, "run is no table"),
        ({"header_run": {"seconds": {"locate": "long"}}}, "seconds are no numbers"),
        ({"header_versions": "all"}, "versions is no table"),
        ({"header_scale": 0.0}, "scale 0.0 is no number from"),
        ({"header_scale": -0.0}, "scale -0.0 is no number from"),
        ({"header_scale": 1e-300}, "scale 1e-300 is no number from"),
        ({"header_scale": True}, "scale True is no number from"),
        ({"header_shapes": {"a": ["40", "70"]}}, "has the shape"),
        ({"header_shapes": {"a": [40, 70, 1]}}, "has the shape"),
        ({"header_concept": {"forget": " "}}, "concept has no words"),
        ({"header_concept": {"forget": "cat", "surrogate": None}}, "surrogate has no words"),
        ({"header_concept": {"forget": "cat", "forget_prompts": "cat"}}, "forget_prompts are no text"),
        ({"header_concept": {"forget": "cat", "retain_prompts": [1]}}, "retain_prompts are no text"),
        ({"header_created": 2026}, "created is no name"),
        ({"header_created": "\udc80"}, "surrogates not allowed"),
        ({"header_run": {"losses": {"forget": [None]}}}, "losses are no numbers"),
        ({"header_run": {"seconds": {"locate": 10**400}}}, "seconds are no numbers"),
        ({"header_run": {"layers": [{"name": "a"}]}}, "record of a layer has no good shape, saliency_mean"),
        ({"header_run": {"layers": [{**RECORD, "density": 2.0}]}}, "has no good density"),
        ({"header_run": {"layers": [{**RECORD, "saliency_max": "much"}]}}, "has no good saliency_max"),
        ({"header_more": functools.reduce(lambda inner, _: [inner], range(20), [])}, "more than 16 deep"),
        ({"header_more": [{}] * 300_000}, "tables of more than 200000 entries"),
        ({"values": torch.full((28,), 3e38), "header_scale": 10.0}, "a change of 3e\\+39 is none of a weight"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, changes: dict, message: str) -> None:
    chosen = torch.zeros(40 * 70, dtype=torch.bool)
    chosen[torch.randperm(40 * 70)[:28]] = True
    tensors = LayerTensors(BitMask.pack(chosen.view(40, 70)), values=torch.randn(28))
    write_adapter_file(tmp_path / "f", METADATA, {"a": tensors})
    with pytest.raises(AdapterFileError, match=message):
        read_adapter_file(damaged(tmp_path / "f", **changes))


def test_what_may_be_left_out_is_filled_in(tmp_path: Path) -> None:
    write_adapter_file(tmp_path / "f", METADATA | {"concept": {"forget": "cat"}}, {"a": layer(0.1, 4)})
    concept = read_adapter_file(tmp_path / "f").metadata["concept"]
    prompts = {"forget_prompts": [], "surrogate_prompts": [], "retain_prompts": []}
    assert concept == {"forget": "cat", "surrogate": "", **prompts}


def test_a_size_in_a_file_makes_nothing_as_large_as_it_says(tmp_path: Path) -> None:
    """One entry in 3e9 weights: as dense masks that would be 3 GB, as words 400 MB, of a file of 200 kB."""
    rows, path = 49_000, tmp_path / "f"
    counts = torch.zeros(rows, dtype=torch.int32)
    counts[-1] = 1
    tensors = {"row_counts": counts, "columns": torch.tensor([65535], dtype=torch.uint16), "values": torch.ones(1)}
    header = {**METADATA, "format": FORMAT, "version": 1, "form": "values", "shapes": {"a": [rows, 43_000]}}
    for columns, refused in ((43_000, True), (43_690, False)):
        header["shapes"]["a"][1] = columns
        tensors["columns"] = torch.tensor([43_689], dtype=torch.uint16)
        save_file(
            {f"fade.unet.a.{part}": tensor for part, tensor in tensors.items()}, path,
            metadata={"format": FORMAT, "fade": json.dumps(header)},
        )  # fmt: skip
        with memory_limit(2 * path.stat().st_size + (16 << 20)) if LIMITED else contextlib.nullcontext():
            if refused:
                with pytest.raises(AdapterFileError, match="columns is out of range"):
                    read_adapter_file(path)
                continue
            file = read_adapter_file(path)
            mask = file.layers["a"].mask
            assert (mask.shape, mask.count, file.selected) == ((rows, columns), 1, 1)
            assert file.total == rows * columns


def test_a_header_that_would_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for text in (b"[" * 2**20, b'{"a":' * 2**18, b'{"a":[' + b"{}," * 2**19 + b"{}]}", b" " * (2**24 + 1)):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with memory_limit(2 * len(text) + (16 << 20)) if LIMITED else contextlib.nullcontext():
            with pytest.raises(AdapterFileError, match="not a readable safetensors file"):
                read_adapter_file(path)


def test_a_large_file_of_another_kind_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(8 << 20)}, path)
    with memory_limit(16 << 20) if LIMITED else contextlib.nullcontext():
        with pytest.raises(AdapterFileError, match="does not say format="):
            read_adapter_file(path)


def test_factors_and_masks_are_checked(tmp_path: Path) -> None:
    write_adapter_file(tmp_path / "f", METADATA, {"a": layer(0.9, 4)})
    for changes, message in [
        ({"a": torch.zeros(4, 69)}, "the factors of"),
        ({"b": torch.zeros(40, 3)}, "the factors of"),
        ({"b": torch.zeros(40, 4, dtype=torch.int32)}, "no floating-point"),
        ({"mask": torch.full((40, 3), -1, dtype=torch.int32)}, "damaged"),  # bits set beyond the last column
        ({"mask": torch.zeros(40, 2, dtype=torch.int32)}, "mask has dtype"),
    ]:
        with pytest.raises(AdapterFileError, match=message):
            read_adapter_file(damaged(tmp_path / "f", **changes))


def test_layers_of_different_ranks(tmp_path: Path) -> None:
    write_adapter_file(tmp_path / "f", METADATA, {"a": layer(0.9, 4), "b": layer(0.9, 3)})
    with pytest.raises(AdapterFileError, match=r"ranks \[3, 4\]"):
        read_adapter_file(tmp_path / "f")


def test_a_failed_load_leaves_nothing_attached(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapter, path = random_adapter(pipeline), tmp_path / "adapter.safetensors"
    adapter.save(path)
    adapter.remove()
    with pytest.raises(FadeError, match="the scale must be a number between"):
        fade.load_adapter(pipeline, path, scale=1e300)
    assert not getattr(pipeline.unet, "peft_config", {})
    assert fade.load_adapter(pipeline, path).enabled


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(AdapterFileError, match="there is no adapter file"):
        read_adapter_file(path)
    write_adapter_file(path, METADATA, {"a": layer(0.1, 4)})
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(AdapterFileError, match="not a readable safetensors file"):
            read_adapter_file(path)
    path.write_bytes(b"\x80\x04\x95 a pickle, say" * 40)
    with pytest.raises(AdapterFileError, match="not a readable safetensors file"):
        read_adapter_file(path)
    save_file({"lora_A": torch.zeros(2, 2)}, path)
    with pytest.raises(AdapterFileError, match=f"does not say format={FORMAT}"):
        read_adapter_file(path)
    save_file({"x": torch.zeros(2, 2)}, path, metadata={"format": FORMAT, "fade": "{"})
    with pytest.raises(AdapterFileError, match="damaged"):
        read_adapter_file(path)


def test_the_old_file_survives_a_full_disk(
    pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, path = random_adapter(pipeline), tmp_path / "adapter.safetensors"
    adapter.save(path)
    old = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fade.adapter_file.save_file", full)
    with pytest.raises(FadeError, match="cannot write .*No space left on device; nothing was changed"):
        adapter.save(path)
    assert path.read_bytes() == old
    assert fade.adapter_file.read_adapter_file(path).selected > 0
