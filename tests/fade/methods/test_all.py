"""Every method of the registry, whole: made by name, finite, on the way to what it is for, saved, loaded into a fresh
pipeline, evaluated."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import fade
from fade.config import PAPER, Config
from fade.digitcanvas import STYLES, load_pipeline, prompt
from fade.digitcanvas.bundled import MODEL as DIGITCANVAS
from fade.errors import FadeError
from fade.evaluation import Evaluation
from fade.methods import METHODS, method

SMALL = {
    "data__forget_samples": 4, "data__retain_samples": 4, "data__sampling_steps": 2, "overwrite__steps": 2,
    "overwrite__batch_size": 4, "overwrite__retain_batch_size": 2, "seed": 5,
}  # fmt: skip


GENTLE = {"robust": 1e-4, "salun": 1e-4, "negated-lora": 3e-4}
"""Learning rates of methods whose first two steps otherwise go past what they aim at, or help whichever way they go."""
UNDONE = ("gradient-ascent", "negated-lora", "ssd")
"""Methods that aim at nothing but that the concept is denoised worse."""


def small(name: str) -> Config:
    config = Config.of(name, **SMALL, **({"overwrite__pool": 2} if Config.of(name).overwrite.pool else {}))
    if name in GENTLE:
        config = config.replace(overwrite__learning_rate=GENTLE[name])
    steps = {key: 1 for key in config.options if key.endswith("steps")}
    return (config.replace(options=steps) if steps else config).without_ignored()


@dataclasses.dataclass(frozen=True)
class Probe:
    """Noised latents of threes in every style, twice; [16, 4, 8, 8] and times [16]. Always the same: the first two
    steps move some methods by half a percent."""

    noised: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor

    def ask(self, pipeline: StableDiffusionPipeline, texts: list[str]) -> torch.Tensor:
        """What a pipeline's UNet predicts of them for prompts."""
        tokenizer = pipeline.tokenizer
        ids = tokenizer(
            texts * (16 // len(texts)), padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            return pipeline.unet(self.noised, self.times, pipeline.text_encoder(ids)[0]).sample

    def aim(self, name: str) -> torch.Tensor:
        """What the method wants said of them for their own prompts, by the frozen model."""
        frozen = load_pipeline()
        surrogate, concept, empty = (
            self.ask(frozen, texts) for texts in (captions("eight"), [DIGITCANVAS.alone("three")], [""])
        )
        if name.startswith("esd"):
            return self.ask(frozen, captions("three")) - 2 * (concept - empty)
        return surrogate - (concept - empty) if name == "leco" else surrogate

    def gone(self, name: str, pipeline: StableDiffusionPipeline) -> float:
        """How far a pipeline is from where the method wants it for the concept's prompts."""
        said = self.ask(pipeline, captions("three"))
        if name in UNDONE:
            return -(said - self.noise).square().mean().item()
        return (said - self.aim(name)).square().mean().item()


def captions(word: str) -> list[str]:
    return [prompt(word, style) for style in STYLES]


@cache
def probe() -> Probe:
    pipeline, generator = load_pipeline(), torch.Generator().manual_seed(0)
    clean = pipeline(
        captions("three"), num_inference_steps=4, guidance_scale=3.0, output_type="latent", generator=generator
    ).images.repeat(2, 1, 1, 1)
    noise = torch.randn(clean.shape, generator=generator)
    times = torch.linspace(250, 950, 16).long()[torch.randperm(16, generator=generator)]
    return Probe(pipeline.scheduler.add_noise(clean, noise, times), noise, times)


@cache
def baseline() -> Evaluation:
    pipeline = load_pipeline()
    adapter = fade.unlearn(pipeline, "three", "eight", config=Config.of("closed-form"), progress=False)
    return fade.evaluate(pipeline, adapter, seeds=[1], steps=1, progress=False)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_makes_an_adapter_that_is_saved_loaded_and_evaluated(name: str, tmp_path: Path) -> None:
    pipeline = load_pipeline()
    made = fade.unlearn(pipeline, "three", "eight", config=small(name), output=tmp_path, progress=False)
    assert made.run["method"] == name and made.metadata["config"]["overwrite"]["method"] == name
    parameters = [p.detach().clone() for p in made.parameters()]
    assert all(p.isfinite().all() for p in parameters) and any(p.abs().sum() > 0 for p in parameters)
    trained = method(name).trains
    assert {len(values) for values in made.run["losses"].values()} == {2 if trained else 0}
    if trained and method(name).objective is not None:
        assert tuple(made.run["losses"]) == method(name).objective.losses

    fresh = load_pipeline()
    loaded = fade.load_adapter(fresh, tmp_path / "adapter.safetensors")
    assert loaded.layers.keys() <= made.layers.keys()
    for layer, module in made.layers.items():  # a file leaves out layers that do not change
        delta = module.get_delta_weight(made.name)
        there = loaded.layers.get(layer)
        assert torch.equal(delta, there.get_delta_weight(loaded.name)) if there is not None else not delta.any()
    found = fade.evaluate(fresh, loaded, seeds=[1], steps=1, baseline=baseline(), progress=False)
    assert found.metrics["UA"] is not None and found.metrics["drift"] > 0

    # Two steps go the right way; what is computed is there at once.
    before, after = probe().gone(name, load_pipeline()), probe().gone(name, fresh)
    assert after < (before if trained or name in UNDONE else 0.5 * before)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_description_is_whole(name: str) -> None:
    found = method(name)
    assert found.name == name and found.summary.endswith(".") and found.source
    assert not (found.edit is not None and (found.trains or found.solves))
    assert all(one.default is not dataclasses.MISSING for one in dataclasses.fields(found.options))
    config = Config.of(name)
    assert Config.from_dict(config.to_dict()) == config
    assert Config.from_dict({"overwrite": {"method": name}}) == config


def test_another_method_brings_its_defaults_and_leaves_what_was_set() -> None:
    set_by_hand = Config().replace(overwrite__steps=17, locate__targets=["to_k"])
    there = set_by_hand.replace(overwrite__method="fade")
    assert there == PAPER.replace(overwrite__steps=17, locate__targets=["to_k"])
    assert there.replace(overwrite__method="both") == set_by_hand
    assert Config.of("esd-x", options={"guidance": 2}).options == {"guidance": 2.0, "direction": "concept"}
    assert Config.of("leco").replace(options__steps=3).options == {**Config.of("leco").options, "steps": 3}


def test_a_methods_settings_come_before_the_defaults_and_after_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[overwrite]\nmethod = "salun"\nsteps = 7\n[options]\nanswer = "random"\n')
    config = Config.load(file)
    assert (config.overwrite.steps, config.locate.saliency, config.options) == (7, "guided", {"answer": "random"})
    other = Config.load(file, "esd-u")
    assert (other.overwrite.steps, other.locate.granularity) == (7, "none")
    assert other.options == {"guidance": 1.0, "direction": "concept"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overwrite__method": "forget-it"}, "there is no method 'forget-it'; known are both, closed-form"),
        ({"options": {"guidance": 1}}, "the method both has no options; leave out guidance"),
        (
            {"overwrite__method": "esd-x", "options": {"eta": 1}},
            "unknown setting 'options.eta'; known here: direction, guidance",
        ),
        ({"overwrite__method": "salun", "options__answer": "yes"}, "answer must be surrogate or random"),
        ({"overwrite__method": "salun", "overwrite__pool": 4}, "salun asks the adapter as it is .* leave pool"),
        ({"overwrite__method": "leco", "overwrite__stop_forget": 0.1}, "leco asks the adapter as it is"),
        ({"overwrite__dual_rate": -1.0}, "dual_rate must be finite and not negative"),
        ({"overwrite__method": "concept-ablation", "data__forget_images": "x"}, "pictures of the surrogate"),
    ],
)
def test_what_a_method_cannot_be_asked_is_told(change: dict, message: str) -> None:
    with pytest.raises(FadeError, match=message):
        Config().replace(**change)


def test_an_unknown_method_is_told_before_anything_runs() -> None:
    with pytest.raises(FadeError, match="there is no method 'x'; known are .*salun"):
        fade.unlearn(load_pipeline(), "three", "eight", method="x")
    with pytest.raises(FadeError, match="method must be a name"):
        fade.unlearn(load_pipeline(), "three", "eight", method=3)  # type: ignore[arg-type]
