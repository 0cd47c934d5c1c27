"""Denoisers that accelerate has placed (`hf_device_map`): hooks decide where their inputs go, and they are trained
where they are."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import attach_align_device_hook_on_blocks
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTokenizer

import fade
from fade.config import Config
from fade.errors import FadeError

from .conftest import tiny_pipeline

Place = Callable[[StableDiffusionPipeline, Path], StableDiffusionPipeline]


def everywhere(pipeline: StableDiffusionPipeline, folder: Path) -> StableDiffusionPipeline:
    dispatch_model(pipeline.unet, {"": "cpu"}, force_hooks=True)
    return pipeline


def part_by_part(pipeline: StableDiffusionPipeline, folder: Path) -> StableDiffusionPipeline:
    dispatch_model(pipeline.unet, {name: "cpu" for name, _ in pipeline.unet.named_children()}, force_hooks=True)
    return pipeline


def loaded_denoiser(pipeline: StableDiffusionPipeline, folder: Path) -> StableDiffusionPipeline:
    pipeline.save_pretrained(folder)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", device_map={"": "cpu"})
    return StableDiffusionPipeline.from_pretrained(folder, unet=unet, safety_checker=None)


def loaded_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> StableDiffusionPipeline:
    pipeline.save_pretrained(folder)
    return StableDiffusionPipeline.from_pretrained(folder, device_map="cpu", safety_checker=None)


@pytest.mark.parametrize("place", [everywhere, part_by_part, loaded_denoiser, loaded_pipeline])
def test_a_dispatched_denoiser_is_trained(
    tokenizer: CLIPTokenizer, quick: Config, tmp_path: Path, place: Place
) -> None:
    """As one that was not dispatched; behind hooks a layer's two products are rounded apart."""
    seed = random.randrange(2**20)
    changes = []
    for placed in (False, True):
        pipeline = tiny_pipeline(tokenizer, seed)
        if placed:
            pipeline = place(pipeline, tmp_path)
            pipeline.set_progress_bar_config(disable=True)
            assert getattr(pipeline.unet, "hf_device_map", None)
        config = quick.replace(locate__granularity="channel", locate__keep=0.2, overwrite__learning_rate=1e-3)
        adapter = fade.unlearn(
            pipeline, "cat", "dog", templates=("{}", "a {}"), retain=["a tree"], config=config, progress=False
        )
        changes.append({name: layer.get_delta_weight("fade") for name, layer in adapter.layers.items()})
        adapter.merge()
        adapter.unmerge()
    plain, dispatched = changes
    assert plain.keys() == dispatched.keys() and any(change.any() for change in plain.values())
    for name, change in plain.items():
        torch.testing.assert_close(dispatched[name], change, rtol=1e-5, atol=1e-5)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("other", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_parts_on_different_devices(
    pipeline: StableDiffusionPipeline, quick: Config, other: str, granularity: str
) -> None:
    parts = {name: "cpu" for name, _ in pipeline.unet.named_children()} | {"mid_block": other}
    # As `dispatch_model` does it: the whole has a hook for what goes in and out, its parts the others.
    attach_align_device_hook_on_blocks(
        pipeline.unet, execution_device={"": "cpu", **parts}, offload=dict.fromkeys(parts, False)
    )
    config = quick.replace(locate__granularity=granularity, locate__keep=0.2).without_ignored()
    adapter = fade.unlearn(pipeline, "cat", "dog", templates=("{}",), retain=["a tree"], config=config, progress=False)
    devices = {layer.get_base_layer().weight.device.type for layer in adapter.layers.values()}
    assert devices == {"cpu", other}
    for layer in adapter.layers.values():
        (device,) = {parameter.device for parameter in layer.adapter_parameters("fade")}
        assert device == layer.get_base_layer().weight.device
        assert layer.get_delta_weight("fade").isfinite().all()


def test_a_denoiser_with_parts_on_the_disk_is_refused(
    pipeline: StableDiffusionPipeline, quick: Config, tmp_path: Path
) -> None:
    places = dict.fromkeys((name for name, _ in pipeline.unet.named_children()), "cpu") | {"mid_block": "disk"}
    dispatch_model(pipeline.unet, places, main_device="cpu", offload_dir=str(tmp_path))
    with pytest.raises(FadeError, match="a device_map with cpu or disk.*unlearn first, then offload"):
        fade.unlearn(pipeline, "cat", "dog", templates=("{}",), config=quick, progress=False)
