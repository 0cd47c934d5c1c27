"""Stage 1 within a memory budget: the plan by itself, and that what is located does not depend on it."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fade
import fade.saliency
from fade.backbones import Backbone, backbone_for
from fade.base_model import target_layers, target_regions
from fade.concept import bundled_concept, concept_from_words
from fade.conditioning import EncodedPrompts
from fade.config import Config, LocateConfig
from fade.digitcanvas.bundled import MODEL as DIGITCANVAS
from fade.errors import FadeError
from fade.latents import Latents, prepare_latents
from fade.loading import load_model
from fade.measure import free_memory, live_bytes
from fade.regions import Region
from fade.saliency import Located, locate, measure_pass, measure_saliency, plan_of, saliency_by_group
from fade.saliency_plan import SaliencyPlan, plan_saliency

from .backbones.pipelines import build
from .conftest import same_bits

CAT = concept_from_words("cat", "dog", ["a {}", "one {}"], ["a house", "a tree", "a car"])
WORDS = {"forget": "cat", "surrogate": "dog", "templates": ["a {}"], "retain": ["a house", "a tree"]}
HOST = 10**12

# --- the plan by itself ----------------------------------------------------------------------------------------------


def test_everything_at_once_where_it_fits() -> None:
    weights = {"a": 1000, "b": 3000}
    needed = 4 * 4000 + 4 * 3000 + 4000 // 8 + 700
    plan = plan_saliency(weights, needed, HOST, pass_bytes=700, passes=3)
    assert plan == SaliencyPlan("device", (("a", "b"),), 4000, 16000, 700, needed, 0, 3)
    assert plan_saliency(weights, needed - 1, HOST, pass_bytes=700).place == "host"
    twice = plan_saliency(weights, needed + 16000, HOST, accumulators=2, pass_bytes=700)
    assert (twice.place, twice.accumulator_bytes) == ("device", 32000)
    assert plan_saliency(weights, needed + 15999, HOST, accumulators=2, pass_bytes=700).place == "host"


def test_host_memory_comes_before_groups_where_there_is_some() -> None:
    weights = dict.fromkeys("abcdefgh", 1000)
    host = plan_saliency(weights, 16_000, HOST, kept=80, passes=2)
    assert (host.place, len(host.groups), host.passes) == ("host", 1, 2)
    assert (host.accumulator_bytes, host.host_bytes) == (32_000, 33_000)
    for memory in (32_999, None):
        groups = plan_saliency(weights, 16_000, memory, kept=80, passes=2)
        assert groups.place == "groups" and groups.passes == 2 * len(groups.groups)
        assert groups.accumulator_bytes < 32_000


sizes = st.lists(st.integers(1, 500), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(
    sizes=sizes, budget=st.integers(1, 20_000), host=st.none() | st.integers(1, 20_000), accumulators=st.integers(1, 2),
    kept=st.integers(1, 400), pass_bytes=st.integers(0, 3000),
)  # fmt: skip
def test_plans_are_within_the_budget_and_errors_say_the_least(
    sizes: list[int], budget: int, host: int | None, accumulators: int, kept: int, pass_bytes: int
) -> None:
    weights = {f"layer {i}": size for i, size in enumerate(sizes)}
    planned = functools.partial(
        plan_saliency, weights, host=host, accumulators=accumulators, kept=min(kept, sum(sizes)), pass_bytes=pass_bytes
    )
    try:
        plan = planned(budget=budget)
    except FadeError as error:
        least = int(str(error).split("at least ")[1].split(" bytes")[0].replace(",", ""))
        assert least > budget and planned(budget=least).device_bytes == least
        with pytest.raises(FadeError, match="at least"):
            planned(budget=least - 1)
        return
    assert [name for group in plan.groups for name in group] == list(weights)
    assert pass_bytes + 4 * accumulators * max(sizes) <= plan.device_bytes <= budget or plan.place == "host"
    assert plan.host_bytes <= (host or 0)
    assert (len(plan.groups) > 1) == (plan.place == "groups")
    assert plan.weights == sum(sizes)
    json.dumps(plan.record())


def test_the_plan_is_told_on_one_line() -> None:
    weights = {f"blocks.{i}": 10**6 for i in range(6)}
    line = plan_saliency(weights, 10**9, None, passes=2).remark("cuda:0")
    assert line == (
        "saliency of 6 layers (6,000,000 weights), accumulators on cuda:0: 24.0 MB at once; 2 backward passes"
    )
    grouped = plan_saliency(weights, 25 * 10**6, None, kept=1000, pass_bytes=4 * 10**6, passes=2)
    assert "on cuda:0 in 2 groups of 4 + 2: 16.0 MB at once, 24.8 MB with a backward pass; 4 backward" in (
        grouped.remark("cuda:0")
    )
    assert grouped.record()["groups"][1] == {"layers": 2, "first": "blocks.4", "last": "blocks.5"}
    host = plan_saliency(weights, 20 * 10**6, HOST, pass_bytes=4 * 10**6, passes=2)
    assert "in host memory, each brought to cuda:0 and back: 24.0 MB at once" in host.remark("cuda:0")


# --- what is located -------------------------------------------------------------------------------------------------


def prepared(backbone: Backbone, concept: Any, samples: int = 6) -> tuple[Latents, EncodedPrompts]:
    backbone.denoiser.requires_grad_(False)
    data = Config().replace(
        data__forget_samples=samples, data__retain_samples=samples, data__sampling_steps=1
    ).data  # fmt: skip
    latents = prepare_latents(backbone, concept, data, 0, "base")
    prompts = sorted({*latents.forget_prompts, *latents.surrogate_prompts, *latents.retain_prompts})
    return latents, EncodedPrompts(prompts, backbone.encode_prompts(prompts))


def budget_for_groups(layers: dict[str, nn.Module], config: LocateConfig, needed: int, regions: Any = None) -> int:
    """One in which half of the accumulators have no room."""
    everything = dataclasses.replace(config, memory_budget=10**12)
    plan = plan_of(layers, everything, regions=regions, pass_bytes=needed)
    return plan.device_bytes - plan.accumulator_bytes // 2


def same(ours: Located, theirs: Located) -> bool:
    """But for the plan, everything."""
    return dataclasses.replace(ours, plan=None) == dataclasses.replace(theirs, plan=None)


@pytest.mark.parametrize(
    ("family", "kind", "granularity", "per_sample"),
    [
        ("Qwen-Image", "distillation", "element", False),
        ("Stable Diffusion 1.x/2.x", "contrast", "element", True),
        ("FLUX.2 klein", "denoising", "element", False),  # whose layers have regions
        ("PixArt-Sigma", "random", "element", False),
        ("PixArt-Sigma", "denoising", "tile", False),
        ("PixArt-Sigma", "denoising", "channel", False),
    ],
)
def test_groups_and_the_host_locate_what_one_pass_does(
    family: str, kind: str, granularity: str, per_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = backbone_for(build(family))
    layers = target_layers(backbone.denoiser, backbone.targets)
    regions = target_regions(backbone.denoiser, backbone.targets)
    latents, prompts = prepared(backbone, CAT)
    config = LocateConfig(
        saliency=kind, keep=0.05, batch_size=4, granularity=granularity, tile=5, per_sample=per_sample
    )  # fmt: skip
    for only in (None, set(list(layers)[: len(layers) * 3 // 4])):
        chosen = {name: layer for name, layer in layers.items() if only is None or name in only}
        run = functools.partial(locate, backbone, layers, latents, prompts, seed=0, within=only, regions=regions)
        once = run(config=config)
        assert once.plan["place"] == "device" and once.selected > 0
        needed = 0 if kind == "random" else measure_pass(backbone, chosen, latents, prompts, config, 0)
        budget = budget_for_groups(chosen, config, needed, regions)
        grouped = run(config=dataclasses.replace(config, memory_budget=budget))
        assert grouped.plan["place"] == "groups" and len(grouped.plan["groups"]) > 1
        assert same(grouped, once)
        host = dataclasses.replace(plan_of(layers, config, only, regions), place="host")
        with monkeypatch.context() as patch:
            patch.setattr(fade.saliency, "plan_of", lambda *_, host=host, **__: host)
            assert same(run(config=config), once)


def test_groups_on_digitcanvas() -> None:
    backbone = backbone_for(load_model("digitcanvas"))
    layers = target_layers(backbone.denoiser, backbone.targets)
    latents, prompts = prepared(backbone, bundled_concept(DIGITCANVAS, "three", "eight"), samples=4)
    config = LocateConfig(saliency="distillation", batch_size=4)
    budget = budget_for_groups(layers, config, measure_pass(backbone, layers, latents, prompts, config, 0))
    once = locate(backbone, layers, latents, prompts, config, 0)
    grouped = locate(
        backbone, layers, latents, prompts, dataclasses.replace(config, memory_budget=f"{budget / 1024:.6f}KiB"), 0
    )
    assert len(grouped.plan["groups"]) > 1 and same(grouped, once)


@pytest.mark.parametrize("kind", ["denoising", "contrast"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_stage_1_takes_no_more_than_is_planned(kind: str, checkpointing: bool) -> None:
    """Tensors that exist at once, counted, whichever plan it is; a plan with groups holds fewer."""
    backbone = backbone_for(build("PixArt-Sigma"))
    if checkpointing:
        backbone.denoiser.enable_gradient_checkpointing()
    layers = target_layers(backbone.denoiser, backbone.targets)
    latents, prompts = prepared(backbone, CAT)
    config = LocateConfig(saliency=kind, keep=0.1, batch_size=3)
    locate(backbone, layers, latents, prompts, config, 0)  # what is kept from then on is not a pass's
    needed = measure_pass(backbone, layers, latents, prompts, config, 0)
    taken = []
    for budget in (10**12, budget_for_groups(layers, config, needed)):
        plan = plan_of(layers, dataclasses.replace(config, memory_budget=budget), passes=1, pass_bytes=needed)
        with pytest.MonkeyPatch.context() as patch, live_bytes("cpu") as most:
            patch.setattr(fade.saliency, "plan_of", lambda *_, plan=plan, **__: plan)
            locate(backbone, layers, latents, prompts, config, 0)
        assert 0.6 * plan.device_bytes < most() <= plan.device_bytes
        taken.append(most())
    assert taken[1] < taken[0]


@pytest.mark.parametrize("family", ["Stable Diffusion 1.x/2.x", "FLUX.1", "Z-Image", "HiDream-I1"])
def test_checkpointing_of_either_kind_changes_no_saliency(family: str) -> None:
    """Of text blocks, too, which nothing that is noised reaches."""
    backbone = backbone_for(build(family))
    layers = target_layers(backbone.denoiser, backbone.targets)
    latents, prompts = prepared(backbone, CAT, samples=2)
    config = LocateConfig(saliency="distillation", batch_size=2)
    found: list[dict[str, Tensor]] = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            backbone.denoiser.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))
        found.append(measure_saliency(backbone, layers, latents, prompts, config, 0))
    assert all(value.abs().max() > 0 for value in found[0].values())
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=0, msg=name)
    assert all(not tensor.requires_grad for tensor in prompts.conditioning.tensors().values())


def test_a_group_of_regions_has_their_shapes() -> None:
    layers = {"first": nn.Linear(8, 12), "second": nn.Linear(12, 6), "third": nn.Linear(6, 5)}
    regions = {"second": Region(range(1, 5), range(2, 10))}
    config = LocateConfig(saliency="random")
    groups = saliency_by_group(None, layers, None, None, config, 3, [["first", "second"], ["third"]], regions=regions)
    shapes = [{name: tuple(value.shape) for name, value in group.items()} for group in groups]
    assert shapes == [{"first": (12, 8), "second": (4, 8)}, {"third": (5, 6)}]
    assert plan_of(layers, config, regions=regions).weights == 96 + 32 + 30


# --- a run -----------------------------------------------------------------------------------------------------------


def whole(pipeline: StableDiffusionPipeline, config: Config) -> int:
    """Bytes of all accumulators and what is beside them, but for a pass."""
    layers = target_layers(pipeline.unet, backbone_for(pipeline).targets)
    return plan_of(layers, config.replace(locate__memory_budget=10**12).locate).device_bytes


def test_a_budget_that_nothing_fits_in_is_told_before_anything_is_drawn(
    pipeline: StableDiffusionPipeline, quick: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backbone, "encode_prompts", lambda *_, **__: pytest.fail("too late"))
    config = quick.replace(locate__memory_budget="1kB")
    with pytest.raises(
        FadeError, match=r"does not fit into the memory budget of 1\.0 kB: it takes at least [\d,]+ byte"
    ):
        fade.unlearn(pipeline, **WORDS, config=config, output=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_budget_without_room_for_a_pass_is_told_before_the_first(
    pipeline: StableDiffusionPipeline, quick: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = whole(pipeline, quick)
    monkeypatch.setattr(fade.saliency, "saliency_by_group", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(FadeError, match=r"bytes, [\d.]+ .B of them for a backward pass\. Raise --memory-budget"):
        fade.unlearn(pipeline, **WORDS, config=quick.replace(locate__memory_budget=budget), progress=False)


def test_a_run_tells_and_records_its_plan(
    pipeline: StableDiffusionPipeline, quick: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def run(name: str, **changes: Any) -> dict[str, Any]:
        adapter = fade.unlearn(
            pipeline, "cat", "dog", templates=["a {}"], config=quick.replace(**changes), output=tmp_path / name,
            name=name,
        )  # fmt: skip
        adapter.remove()
        return json.loads((tmp_path / name / "run.json").read_text())["run"]

    free = run("free")
    told = capsys.readouterr().err
    assert "saliency of 32 layers" in told and "accumulators on cpu" in told
    assert free["saliency_plan"]["place"] == "device" and free["saliency_plan"]["passes"] == 2
    with pytest.raises(FadeError, match="at least") as error:
        run("least", locate__memory_budget=whole(pipeline, quick))
    least = int(str(error.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    tight = run("tight", locate__memory_budget=least)
    assert tight["saliency_plan"]["place"] == "groups" and tight["saliency_plan"]["device_bytes"] <= least
    assert f"in {len(tight['saliency_plan']['groups'])} groups of " in capsys.readouterr().err
    assert [layer["selected"] for layer in tight["layers"]] == [layer["selected"] for layer in free["layers"]]
    assert same_bits(*(load_file(tmp_path / name / "adapter.safetensors") for name in ("free", "tight")))


def test_the_budget_may_be_another_when_a_run_is_resumed(
    pipeline: StableDiffusionPipeline, quick: Config, tmp_path: Path
) -> None:
    """What is asked for is the same, and so is the result; a run that ran out of memory goes on with less of it."""
    arguments = {**WORDS, "output": tmp_path / "out", "progress": False}
    without_pass = whole(pipeline, quick)
    with pytest.raises(FadeError, match="for a backward pass"):
        fade.unlearn(
            pipeline, config=quick.replace(locate__memory_budget=without_pass), **arguments
        )  # fmt: skip
    adapter = fade.unlearn(pipeline, config=quick, resume=True, **arguments)
    assert adapter.run["saliency_plan"]["place"] == "device"


# --- settings and measures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amount", "count"),
    [(12345, 12345), ("12345", 12345), ("8GB", 8 * 10**9), ("7.5 GiB", 7.5 * 2**30), ("512mib", 2**29), ("1k", 1000)],
)
def test_budgets_in_bytes_and_in_words(amount: int | str, count: int) -> None:
    config = Config().replace(overwrite__method="distillation", locate__memory_budget=amount)
    assert config.locate.budget_bytes == count
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("amount", ["", "8 XB", "-1", 0, "0GB", "inf", "1e9", True, 1.5, [8]])
def test_budgets_that_are_none(amount: Any) -> None:
    with pytest.raises(FadeError, match=r"no amount of memory: give a number of bytes|must be of type int or str"):
        Config().replace(overwrite__method="distillation", locate__memory_budget=amount)


@pytest.mark.parametrize("changes", [{}, {"overwrite__method": "distillation", "locate__granularity": "none"}])
def test_a_budget_for_what_is_not_measured_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(FadeError, match="memory_budget would be ignored"):
        Config().replace(locate__memory_budget="8GB", **changes)


def test_live_bytes_are_those_of_tensors_at_once() -> None:
    before = torch.ones(1000)
    with live_bytes("cpu") as most:
        kept = before * 2
        for _ in range(5):
            passing = (before[None] + kept).sum()
        view = kept[:10].add_(1)
        assert most() == 4000 + 4000 + 2 * 4
        del kept, view
        torch.empty(2500)
        assert most() == 10_004
    assert math.isfinite(passing)


def test_free_memory_of_the_host() -> None:
    assert 2**20 < free_memory("cpu") < 2**60
