"""What people give as MODEL: variants, shards, single files, cached hub models; what is refused, in one line each."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPTokenizer

from fade.backbones import backbone_for
from fade.base_model import base_name
from fade.errors import FadeError
from fade.evaluation.clip_judge import ClipJudge
from fade.loading import load_model

from .conftest import same_bits, tiny_pipeline, weights

FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(scope="module")
def half(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the fp16 variant alone."""
    folder = tmp_path_factory.mktemp("model") / "half"
    tiny_pipeline(tokenizer).to(torch.float16).save_pretrained(folder, variant="fp16")
    return folder


@pytest.fixture
def folder(half: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(half, tmp_path / "copy"))


def refused(model: object) -> str:
    with pytest.raises(FadeError) as error:
        load_model(str(model), "cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_folder_with_the_fp16_variant_alone(half: Path, pipeline: StableDiffusionPipeline, dtype: str) -> None:
    loaded = load_model(str(half), "cpu", dtype)
    assert loaded.unet.dtype == (torch.float16 if dtype == "fp16" else torch.float32)
    halved = pipeline.to(torch.float16)
    assert same_bits(weights(loaded.to(torch.float16)), weights(halved))


def test_plain_weights_are_preferred_to_a_variant(folder: Path, pipeline: StableDiffusionPipeline) -> None:
    pipeline.save_pretrained(folder)  # beside the fp16 files
    assert (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    assert same_bits(weights(load_model(str(folder), "cpu")), weights(pipeline))


@pytest.mark.parametrize("variant", [None, "fp16", "ema"])
def test_sharded_weights(pipeline: StableDiffusionPipeline, tmp_path: Path, variant: str | None) -> None:
    pipeline.save_pretrained(tmp_path / "model", max_shard_size="100KB", variant=variant)
    shards = sorted((tmp_path / "model" / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert same_bits(weights(load_model(str(tmp_path / "model"), "cpu")), weights(pipeline))
    shards[1].unlink()
    assert f"unet/{shards[1].name} is missing, one of {len(shards)} files" in refused(tmp_path / "model")
    next((tmp_path / "model" / "unet").glob("*.index*.json")).write_text("[]")
    assert "is damaged" in refused(tmp_path / "model")


def test_one_part_as_a_variant_beside_plain_ones(folder: Path, pipeline: StableDiffusionPipeline) -> None:
    shutil.rmtree(folder / "vae")
    pipeline.vae.save_pretrained(folder / "vae")
    loaded = load_model(str(folder), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(loaded.vae.parameters(), pipeline.vae.parameters(), strict=True))
    shutil.rmtree(folder / "vae")
    pipeline.vae.save_pretrained(folder / "vae", variant="bf16")
    assert "no variant of the weights in common" in refused(folder)


def test_pickled_weights_are_refused_with_the_way_out(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    model = tmp_path / "model"
    pipeline.save_pretrained(model, safe_serialization=False)
    assert list(model.glob("unet/*.bin")) and not list(model.glob("unet/*.safetensors"))
    said = refused(model)
    assert "pickled weights (unet/diffusion_pytorch_model.bin)" in said and "save_pretrained(FOLDER)" in said
    for suffix in (".ckpt", ".pt", ".bin"):
        file = tmp_path / f"model{suffix}"
        torch.save({"state_dict": {}}, file)
        assert "is a pickle" in (said := refused(file)) and "from_single_file" in said


def test_incomplete_and_misplaced_folders(folder: Path) -> None:
    assert f"it is one part of a pipeline, give {folder}" in refused(folder / "unet")
    assert f"give its folder, {folder}" in refused(folder / "model_index.json")
    weights_file = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    whole = weights_file.read_bytes()
    (folder / "unet" / "LICENSE").write_text("free")
    assert "unet/LICENSE" in refused(folder)
    (folder / "unet" / "LICENSE").unlink()
    weights_file.write_bytes(whole[: len(whole) // 2])
    assert "cannot load the model" in refused(folder)
    weights_file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "is a Git LFS pointer" in refused(folder)
    weights_file.unlink()
    assert "unet/ holds no weights" in refused(folder)
    shutil.rmtree(folder / "scheduler")
    assert "its folder scheduler/ is missing" in refused(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    assert "names no text_encoder" in refused(folder)
    snapshot = folder.parent / "models--a--b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    assert f"it is a hub cache, give {snapshot}" in refused(folder.parent / "models--a--b")


def test_other_pipelines_of_the_same_parts_load_as_themselves(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionImg2ImgPipeline"}))
    loaded = load_model(str(folder), "cpu")
    assert type(loaded) is StableDiffusionImg2ImgPipeline
    assert backbone_for(loaded).generate(["a cat"], [0], steps=1).shape == (1, 3, 32, 32)
    for name in ("WanPipeline", "DDPMPipeline", "DDIMScheduler", "utils", "no_such"):
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
        assert f"is a {name}, which is not supported" in refused(folder)


def test_single_files(pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "checkpoint.safetensors"
    save_file({FIRST_CONVOLUTION: torch.zeros(16, 4, 3, 3)}, file)
    calls: list[Any] = []
    monkeypatch.setattr(
        StableDiffusionPipeline,
        "from_single_file",
        lambda path, **options: calls.append((path, options)) or pipeline,
    )
    assert load_model(str(file), "cpu", "bf16") is pipeline
    assert calls == [(str(file), {"torch_dtype": torch.bfloat16})]
    assert base_name(pipeline) == "checkpoint.safetensors"

    def offline(path: str, **_: Any) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", offline)
    said = refused(file)
    assert "single-file checkpoint" in said and "no network. Its configuration comes from the hub" in said
    assert "config=ANY_FOLDER_OF_ITS_FAMILY" in said
    assert f"to load the checkpoint in it, give {file}" in refused(tmp_path)

    for tensors, reason in (
        ({"conditioner.embedders.0.weight": torch.zeros(1), FIRST_CONVOLUTION: torch.zeros(1)}, "one text encoder"),
        ({"model.diffusion_model.joint_blocks.0.weight": torch.zeros(1)}, "is no single-file checkpoint"),
        ({"fade.unet.to_q.values": torch.zeros(1)}, "is an adapter, not a model"),
    ):
        save_file(tensors, file)
        assert reason in refused(file)
    file.write_bytes(b"\xff" * 100)
    assert "cannot read the checkpoint file" in refused(file)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "is no model" in refused(tmp_path / "model.gguf")


def test_a_hub_that_does_not_answer_is_asked_once(
    half: Path, pipeline: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model in the local cache is used then, under its own name."""
    asked: list[str] = []

    def no_network(self: Any, model: str, **_: Any) -> None:
        asked.append(model)
        raise ConnectionError("no route to host\nsorry")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "it is not in the local cache, and the hub cannot be reached (no route to host)" in refused("someone/tiny")
    cached = tmp_path / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(half, cached / "snapshots" / ("0" * 40))
    loaded = load_model("someone/tiny", "cpu", "fp16")
    assert same_bits(weights(loaded), weights(pipeline.to(torch.float16)))
    assert base_name(loaded) == "someone/tiny"
    assert asked == ["someone/tiny"] * 2


def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    answer: Any = None

    def model_info(self: Any, model: str, **_: Any) -> Any:
        raise answer

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    response = SimpleNamespace(headers={}, request=None)
    for kind, reason in ((GatedRepoError, "it is gated"), (RepositoryNotFoundError, "has no such model")):
        answer = kind("no", response=response)
        assert reason in refused("someone/tiny")


def test_a_pickled_clip_model_is_no_judge(tmp_path: Path, tokenizer: CLIPTokenizer) -> None:
    from transformers import CLIPConfig

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(text_config={**size, "vocab_size": len(tokenizer)}, vision_config={**size, "patch_size": 16})
    config.save_pretrained(tmp_path)
    torch.save(CLIPModel(config).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FadeError, match=r"pickled weights \(pytorch_model.bin\).*CLIPModel.from_pretrained"):
        ClipJudge(tmp_path, ["three", "eight"])
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FadeError, match="holds no weights"):
        ClipJudge(tmp_path, ["three", "eight"])
