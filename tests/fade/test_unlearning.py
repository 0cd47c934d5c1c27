"""Both stages together: what a run leaves behind, that it can be repeated, interrupted and resumed, and that bad input
costs nothing."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import fade
from fade.adapter_file import read_adapter_file
from fade.config import Config
from fade.errors import DivergedError, FadeError

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
    assert Config.from_dict(file.metadata["config"]) == config
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
            return torch.stack([backbone.predict(noised, timesteps, e.expand(8, -1, -1)) for e in embeddings])

    before = answers()
    config = quick.replace(
        locate__granularity="none", overwrite__steps=80, overwrite__batch_size=8, overwrite__retain_batch_size=8
    )
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

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", interrupted)
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
    from fade.backbones import Backbone

    seen, add_noise = [], Backbone.add_noise
    monkeypatch.setattr(Backbone, "add_noise", lambda s, z, n, t: seen.append(t) or add_noise(s, z, n, t))
    config = quick.replace(overwrite__timesteps=sampler, overwrite__timestep_band=[0.2, 0.3], overwrite__steps=20)
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


def test_overwriting_keeps_the_old_adapter_until_the_new_one_is_whole(
    tokenizer: CLIPTokenizer, quick: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=quick, output=out)
    old = (out / "adapter.safetensors").read_bytes()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", interrupted)
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
