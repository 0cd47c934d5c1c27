"""Latents: from folders with good, bad and no images, from the model itself, and from the cache."""

import copy
import json
import os
import shutil
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from fade import images as images_module
from fade import latents as latents_module
from fade.backbones import backbone_for
from fade.cache_key import module_digest
from fade.concept import Concept, concept_from_words
from fade.config import Config, DataConfig
from fade.errors import FadeError
from fade.latents import Latents, prepare_latents

CONCEPT = concept_from_words("cat", "dog", ["a {}", "one {}"], ["a house", "a tree", "a car"])


def folder_of(path: Path, count: int, first: int = 0) -> Path:
    path.mkdir(parents=True, exist_ok=True)
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
    with pytest.warns(
        UserWarning, match="1 of 2 captions in .*forget do not name 'cat'; their images are trained with"
    ):
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


# --- prompts ---------------------------------------------------------------------------------------------------------


def words(count: int, word: str) -> list[str]:
    return [f"{word} {i}" for i in range(count)]


@pytest.mark.parametrize(("prompts", "samples"), [(5, 2), (8, 5), (9, 8), (4, 1)])
def test_every_prompt_is_trained_with(
    pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, prompts: int, samples: int
) -> None:
    templates = [f"{word} {{}}" for word in words(prompts, "style")]
    concept = concept_from_words("cat", "dog", templates, words(prompts, "house"))
    backbone = backbone_for(pipeline)
    drawn = []
    sample = type(backbone).sample_latents
    monkeypatch.setattr(type(backbone), "sample_latents", lambda self, p, *a: drawn.extend(p) or sample(self, p, *a))
    config = DataConfig(forget_samples=samples, retain_samples=samples, sampling_steps=1)
    latents = prepare_latents(backbone, concept, config, 0, "base")
    assert len(drawn) == 2 * samples
    assert latents.retain_prompts == concept.retain_prompts
    assert latents.forget_prompts == concept.forget_prompts
    assert latents.surrogate_prompts == concept.surrogate_prompts
    for part, chosen, own in ((latents.forget, drawn[:samples], concept.forget_prompts),
                              (latents.retain, drawn[samples:], concept.retain_prompts)):  # fmt: skip
        assert len(part.flatten(1).unique(dim=0)) == samples
        holders = [next(p for p in reversed(own[: i + 1]) if p in chosen) for i in range(prompts)]
        for i in range(prompts):  # a prompt that was not drawn shares the latent of the one before it that was
            assert torch.equal(part[i], part[own.index(holders[i])])
        assert max(holders.count(holder) for holder in chosen) <= -(-prompts // samples)


@pytest.mark.parametrize("denoised", [("forget",), ("retain",), ("forget", "retain")])
def test_what_is_denoised_shows_the_prompt_that_it_goes_with(
    pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, denoised: tuple[str, ...]
) -> None:
    concept = concept_from_words("cat", "dog", [f"{word} {{}}" for word in words(5, "style")], words(7, "house"))
    backbone = backbone_for(pipeline)
    drawn: dict[bytes, str] = {}
    sample = type(backbone).sample_latents

    def noted(self: object, prompts: list[str], *rest: object) -> torch.Tensor:
        latents = sample(self, prompts, *rest)
        drawn.update((latent.numpy().tobytes(), prompt) for latent, prompt in zip(latents, prompts, strict=True))
        return latents

    monkeypatch.setattr(type(backbone), "sample_latents", noted)
    config = DataConfig(forget_samples=2, retain_samples=2, sampling_steps=1)
    latents = prepare_latents(backbone, concept, config, 0, "base", denoised=denoised)
    for part, asked, own in (("forget", latents.forget_prompts, concept.forget_prompts),
                             ("retain", latents.retain_prompts, concept.retain_prompts)):  # fmt: skip
        shown = [drawn[latent.numpy().tobytes()] for latent in getattr(latents, part)]
        assert asked == own and (tuple(shown) == own) == (part in denoised) and len({*shown}) in (2, len(own))
    if "retain" in denoised:  # more than one for each where so many are asked for
        many = prepare_latents(backbone, concept, replace(config, retain_samples=9), 0, "base", denoised=denoised)
        assert len(many.retain) == 9


def test_every_default_retain_prompt_is_trained_with_at_the_default_number() -> None:
    prompts, samples = len(concept_from_words("Van Gogh", "a painter").retain_prompts), DataConfig().retain_samples
    sampled, sample_of = latents_module._spread(prompts, samples)
    assert prompts > samples == len(set(sampled)) == len(set(sample_of)) and len(sample_of) == prompts


def test_retain_prompts_that_name_the_concept_are_told(pipeline: StableDiffusionPipeline) -> None:
    config = DataConfig(forget_samples=1, retain_samples=2, sampling_steps=1)
    naming = concept_from_words("cat", "dog", ["a {}"], ["a house", "my Cat", "a category"])
    with pytest.warns(UserWarning, match=r"1 of 3 retain prompts name 'cat', which is to be forgotten: 'my Cat'; they"):
        prepare_latents(backbone_for(pipeline), naming, config, 0, "base")
    plural = concept_from_words("cat", "dog", ["a {}"], ["two cats"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepare_latents(backbone_for(pipeline), plural, config, 0, "base")
        assert not [w for w in caught if "retain prompts" in str(w.message)]
        prepare_latents(backbone_for(pipeline), plural, Config().replace(data__plurals=True, data__sampling_steps=1,
                        data__forget_samples=1).data, 0, "base")  # fmt: skip
        assert len([w for w in caught if "retain prompts" in str(w.message)]) == 1


# --- folders ---------------------------------------------------------------------------------------------------------


def test_captions_of_several_lines(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    forget, retain = folder_of(tmp_path / "forget", 2), folder_of(tmp_path / "retain", 2)
    (forget / "00.txt").write_text("an animal\nthe cats' Cat, black\na cat\n")
    (forget / "01.caption").write_text("a cat\nanother cat")
    (retain / "00.txt").write_text("a wall\na red wall")
    (retain / "01.txt").write_text("a wall\nwith a cat on it")
    config = DataConfig(forget_images=str(forget), retain_images=str(retain))
    with pytest.warns(UserWarning, match=r"left out 1 of 2 images in .*retain whose captions name 'cat'.*: 01\.png"):
        latents = prepare_latents(backbone_for(pipeline), CONCEPT, config, 0, "base")
    assert latents.forget_prompts == ("the cats' Cat, black", "a cat")
    assert latents.surrogate_prompts == ("the cats' dog, black", "a dog")
    assert latents.retain_prompts == ("a wall",)


def test_a_caption_too_long_for_the_text_encoder_gives_way_to_a_template(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    forget = folder_of(tmp_path / "forget", 2)
    (forget / "00.txt").write_text("a very long story " * 60 + "about a cat")
    (forget / "01.txt").write_text("a cat in " + "a very long story " * 60)
    config = DataConfig(forget_images=str(forget), retain_samples=1, sampling_steps=1)
    with pytest.warns(
        UserWarning, match="1 of 2 captions in .*forget name only behind what the text encoder reads 'cat'"
    ):
        latents = prepare_latents(backbone_for(pipeline), CONCEPT, config, 0, "base")
    assert latents.forget_prompts[0] == "a cat" and latents.forget_prompts[1].startswith("a cat in a very")


def one_caption_of_three(retain: Path) -> tuple[Concept, DataConfig]:
    """Six retain prompts, and a folder of three retain images, one of them with a caption."""
    (folder_of(retain, 3) / "01.txt").write_text("a blue wall")
    config = DataConfig(forget_samples=1, sampling_steps=1, retain_images=str(retain))
    return concept_from_words("cat", "dog", ["a {}"], words(6, "house")), config


def test_retain_images_without_caption_serve_every_retain_prompt(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    concept, config = one_caption_of_three(tmp_path / "retain")
    latents = prepare_latents(backbone_for(pipeline), concept, config, 0, "base")
    assert latents.retain_prompts[:3] == ("house 0", "a blue wall", "house 2")
    assert set(latents.retain_prompts[3:]) == {"house 1", "house 3", "house 4", "house 5"}
    first, _, third, *again = latents.retain
    assert all(torch.equal(latent, (first, third)[i % 2]) for i, latent in enumerate(again))


def test_retain_images_without_caption_that_are_denoised_are_told(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    concept, config = one_caption_of_three(tmp_path / "retain")
    cache = tmp_path / "latents.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents = prepare_latents(backbone_for(pipeline), concept, config, 0, "base", cache)
    with pytest.warns(
        UserWarning, match=r"2 of 3 images in .*retain have no caption and go with retain prompts, which"
    ):
        denoised = prepare_latents(backbone_for(pipeline), concept, config, 0, "base", cache, denoised=("retain",))
    assert denoised.retain_prompts == latents.retain_prompts and len({*latents.retain_prompts}) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in (0, 2):
            (tmp_path / "retain" / f"{number:02}.txt").write_text("a red wall")
        prepare_latents(backbone_for(pipeline), concept, config, 0, "base", denoised=("retain",))


def test_retain_images_that_all_show_the_concept(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    retain = folder_of(tmp_path / "retain", 2)
    for i in range(2):
        (retain / f"{i:02}.txt").write_text("a CAT")
    config = DataConfig(forget_samples=1, sampling_steps=1, retain_images=str(retain))
    with (
        pytest.warns(UserWarning, match="left out 2 of 2"),
        pytest.raises(FadeError, match="every image in .* is left"),
    ):
        prepare_latents(backbone_for(pipeline), CONCEPT, config, 0, "base")


def test_one_folder_in_the_other(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    forget = folder_of(tmp_path / "all", 2)
    retain = folder_of(tmp_path / "all" / "retain", 3)
    config = DataConfig(forget_images=str(forget), retain_images=str(retain))
    latents = prepare_latents(backbone_for(pipeline), CONCEPT, config, 0, "base")
    assert (len(latents.forget), len(latents.retain)) == (2, 3)
    config = DataConfig(forget_images=str(forget), retain_images=f"{forget}/retain/..")
    with pytest.raises(FadeError, match="in the same folder .*; give each a folder of its own"):
        prepare_latents(backbone_for(pipeline), CONCEPT, config, 0, "base")


def test_what_was_found_is_told(
    pipeline: StableDiffusionPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path / "forget" / "more", 2)
    forget = folder_of(tmp_path / "forget", 3)
    (forget / "00.txt").write_text("a cat")
    (forget / "metadata.csv").write_text("file_name,text\n01.png,a cat\n")
    config = DataConfig(forget_images=str(forget), forget_samples=4, retain_samples=1, sampling_steps=1)
    prepare_latents(backbone_for(pipeline), CONCEPT, config, 0, "base")
    assert capsys.readouterr().err == ""
    prepare_latents(backbone_for(pipeline), CONCEPT, config, 0, "base", progress=True)
    told = "5 pictures in 2 folders, 4 of them used; 2 captions (1 in .txt, 1 in metadata.csv)"
    assert f"forget images in {forget}: {told}" in capsys.readouterr().err.splitlines()


def test_pictures_are_dropped_as_soon_as_they_are_encoded(
    pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget = folder_of(tmp_path / "forget", 11)
    alive = most = 0
    read = images_module.read_square

    def dropped() -> None:
        nonlocal alive
        alive -= 1

    def watched(path: Path, side: int) -> Image.Image:
        nonlocal alive, most
        image = read(path, side)
        assert image.size == (side, side)
        weakref.finalize(image, dropped)
        alive += 1
        most = max(most, alive)
        return image

    monkeypatch.setattr(images_module, "read_square", watched)
    config = DataConfig(forget_images=str(forget), retain_samples=1, sampling_steps=1, batch_size=4)
    latents = prepare_latents(backbone_for(pipeline), CONCEPT, config, 0, "base")
    assert len(latents.forget) == 11 and most <= 5
    monkeypatch.setattr(latents_module, "MOST_PIXELS_AT_ONCE", 2 * 32 * 32)
    most = 0
    assert len(prepare_latents(backbone_for(pipeline), CONCEPT, config, 0, "base").forget) == 11 and most <= 3


def test_bombs_are_skipped_and_named_and_others_stand_in(
    pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget = folder_of(tmp_path / "forget", 4)
    for i, size in ((1, (120, 120)), (2, (300, 300))):  # a warning of Pillow's, and an error
        Image.new("L", size).save(forget / f"0{i}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    config = DataConfig(forget_images=str(forget), forget_samples=2, retain_samples=1, sampling_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        latents = prepare_latents(backbone_for(pipeline), CONCEPT, config, 0, "base")
    (warning,) = (str(w.message) for w in caught)
    assert warning.startswith(f"skipped 2 unreadable image(s) in {forget}: 02.png, 01.png; of the first: ")
    assert len(latents.forget) == 2


# --- the cache -------------------------------------------------------------------------------------------------------


def lora(pipeline: StableDiffusionPipeline) -> None:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), pipeline.text_encoder)


def switch(pipeline: StableDiffusionPipeline, enabled: bool) -> None:
    for module in pipeline.text_encoder.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(enabled)


def scale(pipeline: StableDiffusionPipeline) -> None:
    for module in pipeline.text_encoder.modules():
        if isinstance(module, BaseTunerLayer):
            module.scale_layer(0.5)


@torch.no_grad()
def double(module: torch.nn.Module) -> None:
    next(iter(module.parameters())).data.mul_(2)  # through .data, which PyTorch's version counter does not see


def scheduled(pipeline: StableDiffusionPipeline, **changes: object) -> None:
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)


def repainted(folder: Path) -> None:
    """Other content under the same name, size and time."""
    path = folder / "01.png"
    state = path.stat()
    old = path.read_bytes()
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    new = path.read_bytes()
    path.write_bytes(new.ljust(max(len(old), len(new)), b"\0"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def written(name: str, text: str) -> Callable[[StableDiffusionPipeline, Path], None]:
    return lambda pipeline, folder: (folder / name).write_text(text) and None


EDITS: dict[str, Callable[[StableDiffusionPipeline, Path], object]] = {
    "picture": lambda pipeline, folder: repainted(folder),
    "another picture": lambda pipeline, folder: folder_of(folder, 1, first=7),
    "a picture less": lambda pipeline, folder: (folder / "00.png").unlink(),
    "caption": written("00.txt", "one fat cat"),
    "caption in a table": written("metadata.csv", "file_name,text\n01.png,a cat\n"),
    "VAE": lambda pipeline, folder: double(pipeline.vae),
    "VAE's scaling": lambda pipeline, folder: pipeline.vae.register_to_config(scaling_factor=0.1),
    "text encoder": lambda pipeline, folder: double(pipeline.text_encoder),
    "token": lambda pipeline, folder: pipeline.tokenizer.add_tokens("<mine>"),
    "LoRA on the text encoder": lambda pipeline, folder: lora(pipeline),
    "strength of the LoRA": lambda pipeline, folder: (lora(pipeline), scale(pipeline)),
    "prediction": lambda pipeline, folder: scheduled(pipeline, prediction_type="v_prediction"),
    "noise levels": lambda pipeline, folder: scheduled(pipeline, beta_end=0.03),
    "levels by hand": lambda pipeline, folder: pipeline.scheduler.alphas_cumprod.mul_(0.99),
    "scheduler": lambda pipeline, folder: setattr(
        pipeline, "scheduler", diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    ),
    "dtype": lambda pipeline, folder: pipeline.to(torch.bfloat16),
}
HARMLESS: dict[str, Callable[[StableDiffusionPipeline, Path], object]] = {
    "nothing": lambda pipeline, folder: None,
    "time": lambda pipeline, folder: os.utime(folder / "00.png", (1, 1)),
    "use": lambda pipeline, folder: pipeline("a cat " * 90, num_inference_steps=2, output_type="latent"),
    "a file beside": written("notes.md", "x"),
    "LoRA that is off": lambda pipeline, folder: (lora(pipeline), switch(pipeline, False)),
    "copy": lambda pipeline, folder: setattr(pipeline, "vae", copy.deepcopy(pipeline.vae)),
}


@pytest.mark.parametrize("edit", [*EDITS, *HARMLESS])
def test_the_cache_is_keyed_by_all_that_latents_depend_on(
    pipeline: StableDiffusionPipeline, tmp_path: Path, edit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.tokenizer = copy.deepcopy(pipeline.tokenizer)
    folder = folder_of(tmp_path / "forget", 3)
    (folder / "00.txt").write_text("one thin cat")
    config = DataConfig(forget_images=str(folder), retain_samples=2, sampling_steps=1)
    if edit == "strength of the LoRA":
        lora(pipeline)
        torch.manual_seed(0)
    made = []
    save = latents_module._save
    monkeypatch.setattr(latents_module, "_save", lambda *arguments: made.append(1) or save(*arguments))

    def prepare() -> Latents:
        return prepare_latents(backbone_for(pipeline), CONCEPT, config, 0, "base", tmp_path / "latents.safetensors")

    prepare()
    if edit == "strength of the LoRA":
        scale(pipeline)
    else:
        (EDITS | HARMLESS)[edit](pipeline, folder)
    prepare()
    assert len(made) == (2 if edit in EDITS else 1)
    prepare()
    assert len(made) == (2 if edit in EDITS else 1)


def test_a_folder_may_move(pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = folder_of(tmp_path / "forget", 2), tmp_path / "latents.safetensors"
    config = Config().replace(data__retain_samples=1, data__sampling_steps=1)
    backbone = backbone_for(pipeline)
    prepare_latents(backbone, CONCEPT, config.replace(data__forget_images=str(folder)).data, 0, "base", cache)
    moved = shutil.move(folder, tmp_path / "moved")
    monkeypatch.setattr(latents_module, "_save", lambda *arguments: pytest.fail("made again"))
    prepare_latents(backbone, CONCEPT, config.replace(data__forget_images=str(moved)).data, 0, "base", cache)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


def rewritten(path: Path, **changes: object) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = file.metadata()
    record = json.loads(metadata["record"]) | changes.get("record", {})
    save_file(changes.get("tensors", tensors), path, metadata | {"record": json.dumps(record)})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(os.urandom(4000)),
    "cut": cut,
    "a bit": flipped,
    "prompts": lambda path: rewritten(path, record={"prompts": {"forget": ["x"], "surrogate": ["y"], "retain": []}}),
    "no prompts": lambda path: rewritten(path, record={"prompts": []}),
    "a tensor": lambda path: rewritten(path, tensors={"forget": torch.zeros(2)}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_again(
    pipeline: StableDiffusionPipeline, quick: Config, tmp_path: Path, damage: str
) -> None:
    backbone, cache = backbone_for(pipeline), tmp_path / "latents.safetensors"
    first = prepare_latents(backbone, CONCEPT, quick.data, 0, "base", cache)
    DAMAGE[damage](cache)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = prepare_latents(backbone, CONCEPT, quick.data, 0, "base", cache)
    (warning,) = (str(w.message) for w in caught)
    assert warning.startswith(f"the cached latents in {cache} are damaged and are made again: ")
    assert "\n" not in warning
    assert torch.equal(again.forget, first.forget) and again.retain_prompts == first.retain_prompts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(prepare_latents(backbone, CONCEPT, quick.data, 0, "base", cache).forget, first.forget)


def test_a_modules_digest_sees_through_what_wraps_it(pipeline: StableDiffusionPipeline) -> None:
    encoder = pipeline.text_encoder
    plain = module_digest(encoder)
    assert module_digest(torch.compile(encoder)) == plain
    cpu_offload(encoder, torch.device("cpu"))
    assert any(parameter.is_meta for parameter in encoder.parameters())
    assert module_digest(encoder) == plain

    wrapped = get_peft_model(
        copy.deepcopy(pipeline.vae), LoraConfig(r=2, target_modules=["conv1"], init_lora_weights=False)
    )
    on = module_digest(wrapped)
    with wrapped.disable_adapter():
        assert module_digest(wrapped) == module_digest(pipeline.vae) != on
    double(wrapped)
    with wrapped.disable_adapter():
        assert module_digest(wrapped) != module_digest(pipeline.vae)
    assert module_digest(copy.deepcopy(pipeline.vae).half()) != module_digest(pipeline.vae)
    hidden = copy.deepcopy(pipeline.vae).to("meta")
    assert module_digest(hidden) != module_digest(hidden)  # unseen weights match no cache
