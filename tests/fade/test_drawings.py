"""Answer sets that are kept: nothing is drawn twice, and nothing is taken for something else."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from fade.backbones import backbone_for
from fade.bundled import Drawing
from fade.cache_key import sources_digest
from fade.evaluation import drawings
from fade.evaluation.drawings import Drawings, default_cache

from .adapters import random_adapter

PROMPTS, SEEDS = ("cat", "a photo of dog"), (3, 4)


class Counted:
    """A pipeline's drawings, and how often they were really drawn."""

    def __init__(self, pipeline: StableDiffusionPipeline, cache: Path | None, **settings: Any) -> None:
        self.drawn = 0
        backbone = backbone_for(pipeline)
        generate = backbone.generate

        def counted(*arguments: Any) -> torch.Tensor:
            self.drawn += 1
            return generate(*arguments)

        backbone.generate = counted
        self._draw = Drawings(backbone, Drawing(**{"steps": 1, **settings}), batch_size=2, cache=cache)

    def __call__(self, prompts: tuple[str, ...] = PROMPTS, seeds: tuple[int, ...] = SEEDS) -> torch.Tensor:
        return self._draw(prompts, seeds, "drawing")


def test_a_set_is_drawn_once(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    first, again = Counted(pipeline, tmp_path), Counted(pipeline, tmp_path)
    images = first()
    assert torch.equal(again(), images) and (first.drawn, again.drawn) == (1, 0)
    assert torch.equal(Counted(pipeline, None)(), images)
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]


def test_what_pictures_depend_on_tells_sets_apart(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    Counted(pipeline, tmp_path)()
    draw = Counted(pipeline, tmp_path)
    for prompts, seeds in ((PROMPTS[::-1], SEEDS), (PROMPTS, (3, 5)), (PROMPTS[:1], SEEDS[:1])):
        draw(prompts, seeds)
    assert draw.drawn == 3
    for settings in ({"steps": 2}, {"guidance_scale": 1.5}):
        other = Counted(pipeline, tmp_path, **settings)
        other()
        assert other.drawn == 1, settings

    adapter = random_adapter(pipeline, strength=2.0)
    with_it = Counted(pipeline, tmp_path)
    images = with_it()
    adapter.scale = 0.5
    assert not torch.equal(with_it(), images)
    adapter.scale = 1.0
    assert torch.equal(with_it(), images) and with_it.drawn == 2
    adapter.disable()
    base = Counted(pipeline, tmp_path)
    base()
    assert base.drawn == 0  # the base model's pictures serve every adapter
    adapter.remove()
    other = random_adapter(pipeline, strength=2.0, seed=1)
    another = Counted(pipeline, tmp_path)
    assert not torch.equal(another(), images) and another.drawn == 1
    other.remove()
    with torch.no_grad():
        next(pipeline.text_encoder.parameters()).mul_(1.5)
    changed = Counted(pipeline, tmp_path)
    changed()
    assert changed.drawn == 1


def test_a_damaged_set_is_drawn_again(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    images = Counted(pipeline, tmp_path)()
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    draw = Counted(pipeline, tmp_path)
    with pytest.warns(UserWarning, match="damaged and are drawn again"):
        assert torch.equal(draw(), images)
    assert draw.drawn == 1 and torch.equal(Counted(pipeline, tmp_path)(), images)


def test_a_folder_that_cannot_be_written_costs_a_warning(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match="not kept"):
        images = Counted(pipeline, blocked / "cache")()
    assert len(images) == 2


def test_several_processes_may_keep_the_same_set(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """What another is writing is left alone; what a killed one left, and what another removed, is not in the way."""
    images = Counted(pipeline, tmp_path)()
    (file,) = tmp_path.iterdir()
    file.unlink()
    writing, left = (tmp_path / f".{file.name}.{mark}.part" for mark in ("0123abcd", "4567cdef"))
    for part in (writing, left):
        part.mkdir()
        (part / file.name).write_bytes(b"half of it")
    os.utime(left, (1, 1))
    (tmp_path / f"{'0' * 64}.safetensors").symlink_to(tmp_path / "removed")  # listed, and gone when it is looked at
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(Counted(pipeline, tmp_path)(), images)
    assert file.exists() and writing.exists() and not left.exists()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(Path, "is_file", lambda path: True)  # removed between the look and the reading
        file.unlink()
        again = Counted(pipeline, tmp_path)
        assert torch.equal(again(), images) and again.drawn == 1


def test_the_oldest_sets_go(pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Counted(pipeline, tmp_path)
    for seed in range(3):
        draw(PROMPTS[:1], (seed,))
    for age, file in enumerate(sorted(tmp_path.iterdir())):
        os.utime(file, (age, age))
    oldest, *others = sorted(tmp_path.iterdir())
    monkeypatch.setattr(drawings, "MOST_BYTES", 3 * oldest.stat().st_size)
    draw(PROMPTS[:1], (9,))
    kept = set(tmp_path.iterdir())
    assert oldest not in kept and set(others) < kept and len(kept) == 3


def test_where_sets_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FADE_CACHE", str(tmp_path / "own"))
    assert default_cache() == tmp_path / "own" / "answers"
    monkeypatch.delenv("FADE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "fade" / "answers"


def test_sources_are_told_apart_by_what_they_say_and_where(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    one, other = tmp_path / "one.py", tmp_path / "inner" / "other.py"
    found = []
    for first, second in (("a", "b"), ("b", "a"), ("a", "c"), ("a", "b")):
        one.write_text(first)
        other.write_text(second)
        found.append(sources_digest(tmp_path))
    other.rename(tmp_path / "other.py")
    found.append(sources_digest(tmp_path))
    (tmp_path / "notes.txt").write_text("no source")
    assert found[0] == found[3] and len(set(found)) == 4 and sources_digest(tmp_path) == found[-1]
