"""Both stages together: what a run leaves behind, that it can be repeated, interrupted and resumed, and that bad input
costs nothing."""

import contextlib
import dataclasses
import itertools
import json
import random
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import fade
import fade.run_folder
import fade.unlearning
from fade.adapter_file import read_adapter_file
from fade.backbones import Backbone
from fade.config import Config
from fade.distillation import Losses
from fade.errors import DivergedError, FadeError
from fade.modes import plain_mode

from .adapters import on, random_adapter
from .conftest import denoise, same_bits, tiny_pipeline, weights

TEMPLATES = ("{}", "an image of {}", "a picture of {}")
WORDS = {"forget": "cat", "surrogate": "dog", "templates": TEMPLATES, "progress": False}


def tensors(adapter: fade.Adapter) -> dict[str, torch.Tensor]:
    return {f"{i}": p.detach().clone() for i, p in enumerate(adapter.parameters())}


@pytest.mark.parametrize("parameters", ["factors", "values"])
@pytest.mark.parametrize("kind", ["pipeline", "velocity_pipeline"])
def test_a_run_changes_nothing_but_the_adapter(
    request: pytest.FixtureRequest, quick: Config, tmp_path: Path, kind: str, parameters: str
) -> None:
    pipeline: StableDiffusionPipeline = request.getfixturevalue(kind)
    pipeline.unet.train()
    before, base = weights(pipeline), denoise(pipeline)
    config = quick.replace(overwrite__parameters=parameters, overwrite__steps=30)
    adapter = fade.unlearn(pipeline, **WORDS, config=config, output=tmp_path / "out")
    assert same_bits(weights(pipeline), before)
    assert pipeline.unet.training
    assert all(p.requires_grad for n, p in pipeline.unet.named_parameters() if n == "conv_in.weight")
    assert adapter.enabled and not torch.allclose(denoise(pipeline), base)

    left = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert left == ["adapter.safetensors", "latents.safetensors", "run.json"]
    run = adapter.run
    assert json.loads((tmp_path / "out" / "run.json").read_text())["run"] == json.loads(json.dumps(run))
    assert len(run["losses"]["forget"]) == len(run["losses"]["retain"]) == 30
    assert min(run["losses"]["forget"][-5:]) < run["losses"]["forget"][0]
    assert all(run["seconds"][s] > 0 for s in ("data", "locate", "overwrite"))
    assert all(run["peak_memory_bytes"][s] > 2**20 for s in ("locate", "overwrite"))
    assert run["selected"] == int(0.05 * run["total"]) == sum(layer["selected"] for layer in run["layers"])

    file = read_adapter_file(tmp_path / "out" / "adapter.safetensors")
    assert file.metadata["concept"]["forget"] == "cat"
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    assert Config.from_dict(file.metadata["config"]) == config.replace(locate__targets=attention)
    assert file.metadata["run"]["losses"] == run["losses"]
    assert file.selected == run["selected"]


def test_the_surrogate_takes_the_concepts_place(pipeline: StableDiffusionPipeline, quick: Config) -> None:
    """On an overfitted toy: the adapted answer to the concept moves towards the frozen answer to the surrogate."""
    from fade.backbones import backbone_for

    backbone = backbone_for(pipeline)
    embeddings = backbone.encode_prompts(["cat", "dog", "a house"])
    noised = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps = torch.arange(50, 850, 100)

    def answers() -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([backbone.predict(noised, timesteps, embeddings.rows(i).repeat(8)) for i in range(3)])

    before = answers()
    config = quick.replace(
        locate__granularity="none", overwrite__steps=80, overwrite__batch_size=8, overwrite__retain_batch_size=8
    ).without_ignored()
    fade.unlearn(pipeline, "cat", "dog", templates=["{}"], retain=["a house"], config=config, progress=False)
    after = answers()
    gap = (before[0] - before[1]).norm()
    assert (after[0] - before[1]).norm() < 0.5 * gap
    assert (after[2] - before[2]).norm() < 0.5 * gap


def test_same_seed_same_result(tokenizer: CLIPTokenizer, quick: Config) -> None:
    runs = [
        tensors(fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=quick.replace(seed=seed))) for seed in (3, 3, 4)
    ]
    assert same_bits(runs[0], runs[1])
    assert not same_bits(runs[0], runs[2])


@pytest.mark.parametrize("parameters", ["factors", "values"])
@pytest.mark.parametrize("stop_after", [3, 5])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    tokenizer: CLIPTokenizer,
    quick: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int,
    parameters: str,
) -> None:
    config = quick.replace(overwrite__parameters=parameters, overwrite__accumulation=2)
    whole = fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config)
    pipeline, out = tiny_pipeline(tokenizer), tmp_path / "out"
    steps, step = [], torch.optim.AdamW.step

    def interrupted(self, *args, **kwargs):
        if len(steps) == stop_after:
            raise KeyboardInterrupt
        steps.append(1)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fade.unlearn(pipeline, **WORDS, config=config, output=out)
    assert not getattr(pipeline.unet, "peft_config", {})
    assert {p.name for p in out.iterdir()} >= {"checkpoint.safetensors", "masks.safetensors", "request.json"}
    with pytest.raises(FadeError, match=r"in use; pass --overwrite to replace it or --resume"):
        fade.unlearn(pipeline, **WORDS, config=config, output=out)
    with pytest.raises(FadeError, match=r"has another config\.seed; resume with the same settings"):
        fade.unlearn(pipeline, **WORDS, config=config.replace(seed=9), output=out, resume=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler")
        resumed = fade.unlearn(pipeline, **WORDS, config=config, output=out, resume=True)
    assert same_bits(tensors(resumed), tensors(whole))
    assert resumed.run["losses"] == whole.run["losses"]
    with pytest.raises(FadeError, match=r"nothing to resume .* is complete"):
        fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config, output=out, resume=True)


@contextlib.contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    """A run inside ends with Ctrl-C after so many optimiser steps."""
    real, done = torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(1)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.fixture
def stopping(quick: Config) -> Config:
    """Whatever the losses, forgotten at the first look after three steps, and cooled down after four more."""
    return quick.replace(
        overwrite__stop_forget=1e9, overwrite__stop_flat=1.0, overwrite__stop_every=3, overwrite__cooldown_steps=4,
        overwrite__steps=30, overwrite__checkpoint_every=1, overwrite__pool=3,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["distillation", "both"])
@pytest.mark.parametrize("stop_after", [2, 4, 6], ids=["before it is forgotten", "just after", "in the last step"])
def test_a_run_that_stops_is_resumed_to_the_same_end(
    tokenizer: CLIPTokenizer, stopping: Config, tmp_path: Path, stop_after: int, method: str
) -> None:
    config = stopping.replace(overwrite__method=method).without_ignored()
    whole = fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config)
    with interrupted_after(stop_after):
        fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config, output=tmp_path / "out")
    resumed = fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config, output=tmp_path / "out", resume=True)
    assert same_bits(tensors(resumed), tensors(whole))
    assert resumed.run["losses"] == whole.run["losses"]
    assert resumed.run["held_out_losses"] == whole.run["held_out_losses"]
    for run in (resumed.run, whole.run):
        assert (run["steps"], run["stopped_by"]) == (7, "forgotten")
        assert len(run["losses"]["forget"]) == 7
        assert [len(losses) for losses in run["held_out_losses"].values()] == [2, 2]


def test_training_stops_when_the_concept_is_forgotten(tokenizer: CLIPTokenizer, quick: Config) -> None:
    """Until then it is the run that never stops, and what it stops at is what it was told."""
    config = quick.replace(
        locate__granularity="none", overwrite__steps=60, overwrite__batch_size=6, overwrite__stop_every=2,
        overwrite__cooldown_steps=3, overwrite__stop_flat=1.0, overwrite__stop_forget=0.7,
    ).without_ignored()  # fmt: skip
    words = {**WORDS, "templates": ["{}"], "retain": ["a house"]}
    runs = {
        share: fade.unlearn(tiny_pipeline(tokenizer), **words, config=config.replace(overwrite__stop_forget=share)).run
        for share in (0.7, 1e-12)
    }
    stopped, whole = runs[0.7], runs[1e-12]
    assert (whole["steps"], whole["stopped_by"], stopped["stopped_by"]) == (60, "steps", "forgotten")
    held_out = stopped["held_out_losses"]["forget"]
    last = len(held_out) - 1
    assert stopped["steps"] == len(stopped["losses"]["forget"]) == 2 * last + 3 < 60
    assert held_out[last - 1] <= 0.7 and all(share > 0.7 for share in held_out[: last - 1])
    assert held_out[:last] == whole["held_out_losses"]["forget"][:last]
    assert stopped["losses"]["forget"][: 2 * last] == whole["losses"]["forget"][: 2 * last]


def test_training_goes_on_while_the_retain_loss_falls() -> None:
    changes = {"stop_forget": 0.5, "stop_flat": 0.1, "stop_every": 5, "cooldown_steps": 2}
    config = dataclasses.replace(Config().overwrite, steps=100, **changes)
    forget, retain = [0.6, 0.4, 0.3, 0.3, 0.3, 0.2], [0.5, 0.4, 0.3, 0.2, 0.19, 0.1]
    looks = [Losses(held_out_forget=forget[:n], held_out_retain=retain[:n]) for n in range(7)]
    assert [losses.end(config) for losses in looks] == [(100, False)] * 5 + [(27, True)] * 2
    assert looks[6].end(dataclasses.replace(config, steps=27)) == (27, False)


def test_the_teacher_is_asked_once_about_a_pool(
    pipeline: StableDiffusionPipeline, quick: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fade.backbones.ddpm import DdpmBackbone

    teacher, student, predict = [], [], DdpmBackbone.predict

    def watched(self, noised, *args):
        (teacher if torch.is_inference_mode_enabled() else student).append(noised.detach().clone())
        return predict(self, noised, *args)

    monkeypatch.setattr(DdpmBackbone, "predict", watched)
    config = quick.replace(locate__saliency="random", overwrite__steps=12).without_ignored()
    fade.unlearn(pipeline, **WORDS, config=config.replace(overwrite__pool=3))
    asked = torch.cat(teacher)
    assert len(asked) == 3 * 5 and len(student) == 12
    seen = [next(k for k in range(3) if torch.equal(batch, asked[5 * k : 5 * k + 5])) for batch in student]
    epochs = [seen[start : start + 3] for start in range(0, 12, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs) and len(set(map(tuple, epochs))) > 1

    teacher.clear(), student.clear()
    fade.unlearn(pipeline, **WORDS, config=config.replace(overwrite__pool=0), name="fresh")
    assert all(torch.equal(said, learnt) for said, learnt in zip(teacher, student, strict=True))
    assert len({batch.sum().item() for batch in student}) == 12


def test_a_loss_that_diverges_stops_and_keeps_the_last_checkpoint(
    pipeline: StableDiffusionPipeline, quick: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights(pipeline)
    step, steps = torch.optim.AdamW.step, []

    def poisoned(self, *args, **kwargs):
        steps.append(1)
        result = step(self, *args, **kwargs)
        if len(steps) == 5:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    told = r"the loss became nan at step 6\. The last good checkpoint is kept in .* Start again with --overwrite and"
    with pytest.raises(DivergedError, match=told):
        fade.unlearn(pipeline, **WORDS, config=quick.replace(overwrite__checkpoint_every=1), output=tmp_path / "out")
    kept = load_file(tmp_path / "out" / "checkpoint.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())  # not what the poisoned step left
    assert same_bits(weights(pipeline), before)
    assert not getattr(pipeline.unet, "peft_config", {})


def test_a_gradient_that_diverges_changes_nothing(
    pipeline: StableDiffusionPipeline, quick: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self, *args, **kwargs):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    with pytest.raises(DivergedError, match="the gradient became inf at step 1"):
        fade.unlearn(pipeline, **WORDS, config=quick)


def test_a_prompt_whose_concept_does_not_reach_the_encoder(
    pipeline: StableDiffusionPipeline, quick: Config, tmp_path: Path
) -> None:
    template = "very " * 200 + "{}"
    with pytest.raises(FadeError, match="its surrogate as the same; .* shorten the template"):
        fade.unlearn(pipeline, **{**WORDS, "templates": [template]}, config=quick, output=tmp_path / "out")
    assert not (tmp_path / "out" / "request.json").exists()


def test_clipping_clips(pipeline: StableDiffusionPipeline, quick: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient that reaches the optimiser is no longer than the bound, and the bound really acts."""
    norms, step = [], torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    fade.unlearn(pipeline, **WORDS, config=quick.replace(overwrite__max_grad_norm=1e-5))
    assert len(norms) == 6
    assert all(norm == pytest.approx(1e-5, rel=1e-2) for norm in norms)


@pytest.mark.parametrize("sampler", ["band", "targeted"])
def test_timestep_samplers(
    pipeline: StableDiffusionPipeline, quick: Config, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fade.backbones.ddpm import DdpmBackbone

    seen, add_noise = [], DdpmBackbone.add_noise
    monkeypatch.setattr(DdpmBackbone, "add_noise", lambda s, z, n, t: seen.append(t) or add_noise(s, z, n, t))
    config = quick.replace(
        overwrite__timesteps=sampler, overwrite__timestep_band=[0.2, 0.3], overwrite__steps=20, overwrite__pool=0
    ).without_ignored()
    adapter = fade.unlearn(pipeline, **WORDS, config=config)
    training = torch.stack([t for t in seen[-20:]])
    forget, retain = training[:, :3], training[:, 3:]
    assert retain.min() < 200 and retain.max() > 700
    if sampler == "band":
        assert 200 <= forget.min() and forget.max() < 300
    else:
        assert 0 <= forget.min() and forget.max() < 1000
    assert all(torch.isfinite(p).all() for p in adapter.parameters())


def test_a_second_concept_beside_the_first(pipeline: StableDiffusionPipeline, quick: Config) -> None:
    alone = tensors(fade.unlearn(pipeline, **WORDS, config=quick))
    first_only = denoise(pipeline)
    second = fade.unlearn(pipeline, "bird", "fish", templates=TEMPLATES, config=quick, name="second", progress=False)
    assert on(pipeline) == ["fade", "second"]
    first = fade.Adapter(pipeline, "fade", second.metadata)
    assert same_bits(tensors(first), alone)
    both = denoise(pipeline)
    second.disable()
    assert torch.equal(denoise(pipeline), first_only)
    first.disable()
    second.enable()
    only_second = denoise(pipeline)
    second.remove()
    first.remove()
    again = fade.unlearn(pipeline, "bird", "fish", templates=TEMPLATES, config=quick, name="second", progress=False)
    torch.testing.assert_close(denoise(pipeline), only_second)
    assert not torch.allclose(both, only_second)
    assert again.enabled


def test_bad_requests_cost_nothing(pipeline: StableDiffusionPipeline, quick: Config, tmp_path: Path) -> None:
    before = weights(pipeline)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious").write_text("keep me")
    (tmp_path / "file").write_text("")
    for changes, message in [
        ({"forget": "dog"}, "nothing would change"),
        ({"forget": None}, "name the concept"),
        ({"config": quick.replace(locate__targets=["no_such_layer"])}, "matches no Linear or Conv2d"),
        ({"config": quick.replace(locate__keep=1e-9)}, "keep"),
        ({"output": tmp_path / "used"}, "in use"),
        ({"output": tmp_path / "file"}, "is a file; name a folder"),
        ({"output": tmp_path / "new", "resume": True}, "nothing to resume .* was never started"),
        ({"config": quick.replace(data__forget_images=str(tmp_path / "none"))}, "no image folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            fade.unlearn(pipeline, **{**WORDS, "config": quick, **changes})
    with pytest.raises(FadeError, match="not supported"):
        fade.unlearn(object(), **WORDS)
    assert (tmp_path / "used" / "precious").read_text() == "keep me"
    assert same_bits(weights(pipeline), before)
    assert not getattr(pipeline.unet, "peft_config", {})
    adapter = random_adapter(pipeline)
    with pytest.raises(FadeError, match="already has an adapter called 'fade'"):
        fade.unlearn(pipeline, **WORDS, config=quick)
    adapter.merge()
    with pytest.raises(FadeError, match="merged into the weights"):
        fade.unlearn(pipeline, **WORDS, config=quick, name="other")


@pytest.mark.parametrize("method", ["distillation", "both", "closed-form"])
def test_a_keep_that_leaves_nothing_is_told_before_anything_is_drawn(
    pipeline: StableDiffusionPipeline, quick: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(Backbone, "sample_latents", lambda *_, **__: pytest.fail("drawn"))
    config = quick.replace(overwrite__method=method, locate__keep=1e-6).without_ignored()
    with pytest.raises(FadeError, match="keep 1e-06 selects none of .* use at least"):
        fade.unlearn(pipeline, **WORDS, config=config, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_overwriting_keeps_the_old_adapter_until_the_new_one_is_whole(
    tokenizer: CLIPTokenizer, quick: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=quick, output=out)
    old = (out / "adapter.safetensors").read_bytes()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=quick.replace(seed=1), output=out, overwrite=True)
    assert (out / "adapter.safetensors").read_bytes() == old
    fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=quick.replace(seed=1), output=out, overwrite=True)
    assert (out / "adapter.safetensors").read_bytes() != old


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_16_bit_model_learns_the_surrogate_too(
    pipeline: StableDiffusionPipeline, quick: Config, dtype: torch.dtype
) -> None:
    pipeline.to(dtype)
    config = quick.replace(overwrite__steps=40, locate__keep=0.3)
    words = {"templates": ["{}"], "retain": ["a house"]}
    adapter = fade.unlearn(pipeline, "cat", "dog", config=config, progress=False, **words)
    losses = adapter.run["losses"]["forget"]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), losses
    assert all(p.dtype == torch.float32 for p in adapter.parameters())


def state(pipeline: StableDiffusionPipeline) -> dict[str, object]:
    """All of a pipeline that a run must leave as it found it."""
    unet = pipeline.unet
    return {
        "modules": [[(n, type(m), m.training) for n, m in p.named_modules()] for p in pipeline_modules(pipeline)],
        "parameters": {name: (id(p), p.requires_grad, p.grad) for name, p in unet.named_parameters()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in unet.named_modules()},
        "adapters": list(getattr(unet, "peft_config", {})),
        "switches": [
            (name, list(m.active_adapters), m.disable_adapters, list(getattr(m, "suspended", [])))
            for name, m in unet.named_modules()
            if isinstance(m, BaseTunerLayer)
        ],
        "progress bar": getattr(pipeline, "_progress_bar_config", None),
        "dtypes": {name: part.dtype for name, part in pipeline.components.items() if hasattr(part, "dtype")},
    }


def pipeline_modules(pipeline: StableDiffusionPipeline) -> list[torch.nn.Module]:
    return [pipeline.unet, pipeline.vae, pipeline.text_encoder]


def global_randomness() -> tuple:
    return torch.random.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients switched off": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast under no_grad": lambda: nested(torch.no_grad(), torch.autocast("cpu", torch.bfloat16)),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: default_device("meta"),
    "cpu": lambda: default_device("cpu"),
    "meta as a context": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "saved tensors on the CPU": torch.autograd.graph.save_on_cpu,
    "single-threaded backward": lambda: torch.autograd.set_multithreading_enabled(False),
}


@contextlib.contextmanager
def nested(*contexts: contextlib.AbstractContextManager) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


FEW = {**WORDS, "retain": ("a house", "a boat", "")}


@pytest.fixture(scope="module")
def brief() -> Config:
    return Config().replace(
        data__forget_samples=3, data__retain_samples=3, data__sampling_steps=2, locate__batch_size=3,
        locate__keep=0.05, locate__passes=1, overwrite__steps=3, overwrite__batch_size=2,
        overwrite__retain_batch_size=2, overwrite__method="distillation", overwrite__rank=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plainly(tokenizer: CLIPTokenizer, brief: Config) -> dict[str, torch.Tensor]:
    """What `brief` trains outside of any mode."""
    return tensors(fade.unlearn(tiny_pipeline(tokenizer), **FEW, config=brief))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("mode", MODES)
def test_modes_of_the_caller_change_nothing(
    pipeline: StableDiffusionPipeline, brief: Config, plainly: dict[str, torch.Tensor], mode: str
) -> None:
    with MODES[mode]():
        adapter = fade.unlearn(pipeline, **FEW, config=brief)
    assert same_bits(tensors(adapter), plainly)
    assert not any(p.is_inference() for p in adapter.parameters())


def test_attention_by_cudnn_is_off_meanwhile_and_as_it_was_afterwards() -> None:
    """Its gradients can be wrong (`fade.modes`). What is asked here is a switch: what it does, only a GPU can show."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    for before in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(before)
        with plain_mode(), plain_mode():
            assert not enabled()
        assert enabled() is before


def test_a_gradient_that_is_nan_names_its_layer(pipeline: StableDiffusionPipeline, brief: Config) -> None:
    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")

    def watch(module: torch.nn.Module, given: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(spoil)

    pipeline.unet.up_blocks[-1].register_forward_hook(watch)
    with pytest.raises(FadeError, match=r"the saliency of \S+ holds NaN: gradients of the torch.float32 model"):
        fade.unlearn(pipeline, **FEW, config=brief)


def test_a_pipeline_loaded_under_inference_mode(
    tokenizer: CLIPTokenizer, brief: Config, plainly: dict[str, torch.Tensor]
) -> None:
    with torch.inference_mode():
        pipeline = tiny_pipeline(tokenizer)
        before = weights(pipeline)
        assert all(p.is_inference() for p in pipeline.unet.parameters())
        adapter = fade.unlearn(pipeline, **FEW, config=brief)
        assert same_bits(weights(pipeline), before)
    assert same_bits(tensors(adapter), plainly)
    adapter.disable()
    with torch.inference_mode():
        assert torch.equal(denoise(pipeline), denoise(tiny_pipeline(tokenizer)))


def test_global_generators_are_left_alone(pipeline: StableDiffusionPipeline, brief: Config, tmp_path: Path) -> None:
    torch.rand(3)
    before = global_randomness()
    fade.unlearn(pipeline, **FEW, config=brief, output=tmp_path)
    assert global_randomness() == before


def test_runs_in_threads_are_as_alone(
    tokenizer: CLIPTokenizer, brief: Config, plainly: dict[str, torch.Tensor]
) -> None:
    pipelines = [tiny_pipeline(tokenizer) for _ in range(4)]
    before = global_randomness()
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda pipeline: tensors(fade.unlearn(pipeline, **FEW, config=brief)), pipelines))
    assert all(same_bits(run, plainly) for run in runs)
    assert global_randomness() == before


def test_a_second_thread_on_the_same_pipeline_is_refused(
    pipeline: StableDiffusionPipeline, brief: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, refused = fade.unlearning.prepare_latents, []

    def meanwhile(*args, **kwargs):
        def second() -> None:
            with pytest.raises(FadeError, match="is unlearning in another thread already") as error:
                fade.unlearn(pipeline, **FEW, config=brief, name="second")
            refused.append(error)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        return prepare(*args, **kwargs)

    monkeypatch.setattr(fade.unlearning, "prepare_latents", meanwhile)
    fade.unlearn(pipeline, **FEW, config=brief)
    assert len(refused) == 1


def fail_at(patch: pytest.MonkeyPatch, owner: object, name: str, call: int, error: BaseException) -> None:
    """The `call`-th call raises instead of doing anything."""
    real, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    patch.setattr(owner, name, failing)


FAILURES = {
    "before latents": (fade.unlearning, "prepare_latents", 1),
    "sampling": (StableDiffusionPipeline, "__call__", 2),
    "decoding the prompts": (fade.unlearning, "_encode", 1),
    "keeping what it began with": (fade.run_folder.RunFolder, "begin_with", 1),
    "in the first forward pass": (torch.nn.GroupNorm, "forward", 1),
    "in a later forward pass": (torch.nn.GroupNorm, "forward", 150),
    "in a backward pass": (torch.Tensor, "backward", 1),
    "in the second backward pass": (torch.Tensor, "backward", 2),
    "keeping masks": (fade.run_folder.RunFolder, "keep_located", 1),
    "wrapping the first layer": (peft.tuners.lora.LoraModel, "_create_and_replace", 1),
    "wrapping the third layer": (peft.tuners.lora.LoraModel, "_create_and_replace", 3),
    "just attached": (fade.Adapter, "enable", 1),
    "making the optimiser": (torch.optim.AdamW, "__init__", 1),
    "the first step": (torch.optim.AdamW, "step", 1),
    "the last step": (torch.optim.AdamW, "step", 3),
    "saving": (fade.Adapter, "save", 1),
    "writing the record": (fade.run_folder, "_write_json", 6),
    "switching on": (fade.Adapter, "enable", 2),
    "removing leftovers": (fade.run_folder, "_remove_leftovers", 1),
}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside others"])
def test_whatever_is_raised_leaves_the_pipeline_as_it_was(
    pipeline: StableDiffusionPipeline, brief: Config, plainly: dict[str, torch.Tensor], tmp_path: Path, beside: bool
) -> None:
    others = []
    if beside:
        others = [random_adapter(pipeline, "first", targets=("to_q", "conv1"))]
        others.append(random_adapter(pipeline, "second", targets=("to_v",)).disable())
    for module in list(pipeline.unet.modules())[::3]:
        module.training = not module.training
    before, answer, randomness = state(pipeline), denoise(pipeline), global_randomness()
    errors = itertools.cycle([KeyboardInterrupt(), RuntimeError("out of memory"), MemoryError()])
    for point, failure in FAILURES.items():
        error = next(errors)
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, *failure, error)
            with pytest.raises((type(error), FadeError)):
                fade.unlearn(pipeline, **FEW, config=brief, output=tmp_path / "out", overwrite=True)
        assert state(pipeline) == before, point
        assert torch.equal(denoise(pipeline), answer), point
        assert global_randomness() == randomness, point
        assert not (tmp_path / "out" / ".fade.lock").exists(), point
    for other in others:
        other.remove()
    adapter = fade.unlearn(pipeline, **FEW, config=brief, output=tmp_path / "out", overwrite=True)
    assert same_bits(tensors(adapter), plainly)


def test_each_modules_mode_is_its_own(pipeline: StableDiffusionPipeline, brief: Config) -> None:
    modules = [m for part in pipeline_modules(pipeline) for m in part.modules()]
    for module in modules:
        module.training = bool(torch.rand(()) < 0.5)
    before = [module.training for module in modules]
    fade.unlearn(pipeline, **FEW, config=brief)
    assert [module.training for module in modules] == before


def test_a_text_encoder_in_training_mode_draws_nothing_random(
    tokenizer: CLIPTokenizer, brief: Config, plainly: dict[str, torch.Tensor]
) -> None:
    pipeline = tiny_pipeline(tokenizer)
    for module in pipeline.text_encoder.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    pipeline.text_encoder.train()
    before = global_randomness()
    assert same_bits(tensors(fade.unlearn(pipeline, **FEW, config=brief)), plainly)
    assert global_randomness() == before


@pytest.mark.parametrize(
    "beside", [{"forget": "cat"}, {"surrogate": "dog"}, {"templates": ["{}"]}, {"retain": ["a house"]}], ids=str
)
def test_what_would_be_ignored_beside_a_concept_is_refused(
    pipeline: StableDiffusionPipeline, brief: Config, beside: dict[str, object]
) -> None:
    concept = fade.Concept("cat", "dog", ("cat",), ("dog",), ("a house",))
    with pytest.raises(FadeError, match=f"{next(iter(beside))} would be ignored beside concept"):
        fade.unlearn(pipeline, concept=concept, config=brief, **beside)
    with pytest.raises(FadeError, match="concept must be a fade.Concept, not a str"):
        fade.unlearn(pipeline, concept="cat", config=brief)


@pytest.mark.parametrize(
    "wrong", [{"forget": 3}, {"surrogate": ["dog"]}, {"name": None}, {"output": 3}, {"config": {"seed": 1}}], ids=str
)
def test_arguments_of_another_type_are_refused(
    pipeline: StableDiffusionPipeline, brief: Config, wrong: dict[str, object]
) -> None:
    with pytest.raises(FadeError, match=f"{next(iter(wrong))} must be a"):
        fade.unlearn(pipeline, **{**FEW, "config": brief, **wrong})


def test_threads_share_the_default_dtype(
    tokenizer: CLIPTokenizer, brief: Config, plainly: dict[str, torch.Tensor]
) -> None:
    """The run that ends first must not put the process's default dtype back under the others."""
    pipelines = [tiny_pipeline(tokenizer) for _ in range(3)]
    configs = [brief, brief.replace(overwrite__steps=9), brief.replace(overwrite__steps=9)]
    with default_dtype(torch.float64), ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda p, c: tensors(fade.unlearn(p, **FEW, config=c)), pipelines, configs))
    assert same_bits(runs[0], plainly)
    assert same_bits(runs[1], runs[2]) and not same_bits(runs[0], runs[1])
