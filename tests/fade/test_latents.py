"""Latents: from folders with good, bad and no images, from the model itself, and from the cache."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from fade.backbones import backbone_for
from fade.concept import concept_from_words
from fade.config import Config, DataConfig
from fade.errors import FadeError
from fade.latents import prepare_latents

CONCEPT = concept_from_words("cat", "dog", ["a {}", "one {}"], ["a house", "a tree", "a car"])


def folder_of(path: Path, count: int, first: int = 0) -> Path:
    path.mkdir(exist_ok=True)
    for i in range(first, first + count):
        Image.new("RGB", (20 + i, 40), (9 * i, 80, 120)).save(path / f"{i:02}.png")
    return path


def test_sampled_latents_pair_with_their_prompts(pipeline: StableDiffusionPipeline, quick: Config) -> None:
    latents = prepare_latents(backbone_for(pipeline), CONCEPT, quick.data, 0, "base")
    assert latents.forget.shape == (6, 4, 8, 8) and latents.retain.shape == (7, 4, 8, 8)
    assert latents.forget_prompts == ("a cat", "one cat") * 3
    assert latents.surrogate_prompts == ("a dog", "one dog") * 3
    assert latents.retain_prompts == ("a house", "a tree", "a car", "a house", "a tree", "a car", "a house")
    assert len(torch.cat([latents.forget, latents.retain]).flatten(1).unique(dim=0)) == 13
    other = prepare_latents(backbone_for(pipeline), CONCEPT, quick.data, 1, "base")
    assert not torch.allclose(other.forget, latents.forget, atol=1e-2)


def test_images_and_captions(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    forget, retain = folder_of(tmp_path / "forget", 3), folder_of(tmp_path / "retain", 5)
    (forget / "01.txt").write_text("my cat asleep\n")
    (forget / "02.txt").write_text("no animal here")
    (retain / "00.txt").write_text("a blue wall")
    config = DataConfig(forget_images=str(forget), retain_images=str(retain), retain_samples=4, batch_size=2)
    latents = prepare_latents(backbone_for(pipeline), CONCEPT, config, 0, "base")
    assert latents.forget_prompts == ("a cat", "my cat asleep", "a cat")
    assert latents.surrogate_prompts == ("a dog", "my dog asleep", "a dog")
    assert latents.retain_prompts == ("a blue wall", "a tree", "a car", "a house")
    assert latents.retain.shape == (4, 4, 8, 8)


def test_unreadable_images_are_skipped_with_a_count(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "forget", 2)
    for name in ("bad.png", "empty.jpg"):
        (folder / name).write_bytes(b"not an image" if name == "bad.png" else b"")
    config = DataConfig(forget_images=str(folder), retain_samples=2, sampling_steps=1)
    with pytest.warns(UserWarning, match=r"skipped 2 unreadable image\(s\) in .*forget: bad.png, empty.jpg"):
        latents = prepare_latents(backbone_for(pipeline), CONCEPT, config, 0, "base")
    assert len(latents.forget) == 2


def test_bad_folders(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    backbone = backbone_for(pipeline)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"x")
    for name, message in [("missing", "no image folder"), ("empty", "holds no image"), ("broken", "none of the 1 im")]:
        with pytest.raises(FadeError, match=message):
            prepare_latents(backbone, CONCEPT, DataConfig(forget_images=str(tmp_path / name)), 0, "base")


def test_the_cache_serves_the_same_request_only(
    pipeline: StableDiffusionPipeline, quick: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, cache = backbone_for(pipeline), tmp_path / "latents.safetensors"
    calls = []
    sample = type(backbone).sample_latents
    monkeypatch.setattr(type(backbone), "sample_latents", lambda *a, **k: calls.append(1) or sample(*a, **k))

    def prepare(concept=CONCEPT, seed: int = 0, base: str = "base", data: DataConfig = quick.data) -> object:
        return prepare_latents(backbone, concept, data, seed, base, cache)

    first = prepare()
    assert len(calls) == 2
    again = prepare()
    assert len(calls) == 2
    assert torch.equal(again.forget, first.forget) and torch.equal(again.retain, first.retain)
    assert (again.forget_prompts, again.retain_prompts) == (first.forget_prompts, first.retain_prompts)
    for change in ({"seed": 1}, {"base": "other"}, {"concept": concept_from_words("cat", "bird", ["a {}"], ["x"])}):
        prepare(**change)
        assert len(calls) == 4
        calls[2:] = []
        prepare()
        calls[2:] = []
    cache.write_bytes(cache.read_bytes()[:100])
    assert torch.equal(prepare().forget, first.forget)
    assert len(calls) == 4
