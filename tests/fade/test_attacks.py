"""Attacks: each one's mechanics against its definition on a tiny random model, the record they leave, the command."""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

import fade
from fade import bundled, cli
from fade.adapter import Adapter, attach, new_metadata
from fade.backbones import backbone_for
from fade.backbones.ddpm import DdpmBackbone
from fade.base_model import base_name, fingerprint, target_layers
from fade.concept import bundled_concept, together
from fade.digitcanvas import DIGITS, STYLES, load_judges, load_pipeline, prompt
from fade.digitcanvas.bundled import MODEL as DIGITCANVAS
from fade.digitcanvas.models import build_scheduler
from fade.errors import FadeError
from fade.evaluation.attacks import (
    ATTACKS,
    Attack,
    AttackRecord,
    CannotAttackError,
    Drawn,
    Subject,
    attack,
    chosen_attacks,
)
from fade.evaluation.attacks.completion import Completion
from fade.evaluation.attacks.embedding_inversion import EmbeddingInversion
from fade.evaluation.attacks.null_text_inversion import NullTextInversion
from fade.evaluation.attacks.registry import setting_of
from fade.evaluation.attacks.relearning import Relearning
from fade.evaluation.attacks.removal import Removal
from fade.evaluation.attacks.settings import checked, told, usual
from fade.evaluation.attacks.textual_inversion import TextualInversion
from fade.evaluation.attacks.token_search import TokenSearch
from fade.evaluation.drawings import Kept, default_cache
from fade.noise import step_generator
from fade.report import render_report, write_attack_report
from fade_kernels import BitMask

from .adapters import random_adapter
from .conftest import same_bits, tiny_pipeline, weights
from .test_evaluation import synthetic
from .test_report import Page, metadata

QUICK = {"pictures": 3, "steps": 4, "progress": False}
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def adapter_on(pipeline: StableDiffusionPipeline, strength: float = 0.7) -> Adapter:
    """A random adapter that claims to forget three."""
    adapter = random_adapter(pipeline, strength=strength, seed=random.randrange(2**31))
    adapter.metadata["concept"] = json.loads(json.dumps(bundled_concept(DIGITCANVAS, "three", "eight").to_dict()))
    return adapter


@pytest.fixture
def adapter(pipeline: StableDiffusionPipeline) -> Adapter:
    return adapter_on(pipeline)


def subject_of(adapter: Adapter, prompts: tuple[str, ...] = ("a cat", "a dog", "a cat"), **more: Any) -> Subject:
    seeds = tuple(random.randrange(2**31) for _ in prompts)
    backbone = backbone_for(adapter.pipeline)
    return Subject(backbone, adapter, prompts, seeds, lambda images: images.mean((1, 2, 3)) > 0, steps=4, **more)


def predicting(tokenizer: CLIPTokenizer, kind: str) -> StableDiffusionPipeline:
    scheduler = diffusers.DDIMScheduler.from_config(build_scheduler().config, prediction_type=kind)
    return tiny_pipeline(tokenizer, seed=random.randrange(2**31), scheduler=scheduler)


# --- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_completion_of_nothing_is_the_adapted_model_and_of_everything_the_base(
    pipeline: StableDiffusionPipeline, scheduler: str
) -> None:
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    adapter = adapter_on(pipeline)
    subject = subject_of(adapter, batch_size=2)
    adapted = subject.backbone.generate(subject.prompts, subject.seeds, steps=4, batch_size=2)
    adapter.disable()
    base = subject.backbone.generate(subject.prompts, subject.seeds, steps=4, batch_size=2)
    adapter.enable()
    assert not torch.equal(adapted, base)
    assert torch.equal(Completion(0.0)(subject).images, adapted)
    assert torch.equal(Completion(1.0)(subject).images, base)
    half = Completion(0.5)(subject).images
    assert not torch.equal(half, adapted)
    assert not torch.equal(half, base)


@pytest.mark.parametrize("base_steps", [1, 2, 3])
def test_completion_hands_over_after_the_base_models_steps(adapter: Adapter, base_steps: int) -> None:
    pipeline, subject = adapter.pipeline, subject_of(adapter)
    drawn = Completion(base_steps / 4)(subject).images

    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(4)
    text, empty = (subject.backbone.encode_prompts(p)["prompt_embeds"] for p in (subject.prompts, [""] * 3))
    noise = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in subject.seeds]
    latents = torch.cat(noise)
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            adapter.disable() if step < base_steps else adapter.enable()
            without, prompted = (pipeline.unet(latents, timestep, c).sample for c in (empty, text))
            latents = scheduler.step(without + 3.0 * (prompted - without), timestep, latents).prev_sample
    torch.testing.assert_close(drawn, subject.decode(latents), rtol=1e-4, atol=1e-4)


def test_the_base_model_draws_at_least_one_step_of_a_share() -> None:
    assert [Completion(share).base_steps(20) for share in (0.0, 0.1, 0.25, 0.5, 1.0)] == [0, 2, 5, 10, 20]
    assert [Completion(share).base_steps(30) for share in (0.1, 0.2, 0.3, 0.7)] == [3, 6, 9, 21]
    assert Completion(0.1).base_steps(4) == 1


def test_steps_are_told_by_their_share_also_where_a_scheduler_takes_more(pipeline: StableDiffusionPipeline) -> None:
    for name in ("DDIMScheduler", "PNDMScheduler"):
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
        pipeline.scheduler.set_timesteps(4)
        taken = len(pipeline.scheduler.timesteps)
        assert (taken > 4) == (name == "PNDMScheduler")
        told: list[float] = []
        backbone_for(pipeline).sample_latents(["a", "b", "c"], [1, 2, 3], steps=4, batch_size=2, on_step=told.append)
        assert told == 2 * [step / taken for step in range(taken + 1)]


# --- DDIM ------------------------------------------------------------------------------------------------------------


def by_hand(
    pipeline: StableDiffusionPipeline, latents: torch.Tensor, text: torch.Tensor, steps: int, invert: bool
) -> torch.Tensor:
    """Equation 12 of DDIM without noise, from level to level; the network is asked at the noisier of the two."""
    alphas = pipeline.scheduler.alphas_cumprod.double()
    kind, apart = pipeline.scheduler.config.prediction_type, 1000 // steps
    for level in sorted(range(1, 1000, apart)[:steps], reverse=not invert):
        high, low = alphas[level], alphas[max(0, level - apart)] if level >= apart else alphas[0]
        now, then = (low, high) if invert else (high, low)
        with torch.no_grad():
            told = pipeline.unet(latents.float(), torch.tensor(level), text).sample.double()
        if kind == "epsilon":
            noise, clean = told, (latents - (1 - now).sqrt() * told) / now.sqrt()
        elif kind == "sample":
            noise, clean = (latents - now.sqrt() * told) / (1 - now).sqrt(), told
        else:
            noise = now.sqrt() * told + (1 - now).sqrt() * latents
            clean = now.sqrt() * latents - (1 - now).sqrt() * told
        latents = then.sqrt() * clean + (1 - then).sqrt() * noise
    return latents


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("invert", [False, True])
def test_ddim_in_both_directions_against_its_formula(tokenizer: CLIPTokenizer, kind: str, invert: bool) -> None:
    pipeline = predicting(tokenizer, kind)
    backbone = backbone_for(pipeline)
    latents, text = torch.randn(3, 4, 8, 8), backbone.encode_prompts(["a cat"])
    wanted = by_hand(pipeline, latents.double(), text["prompt_embeds"].expand(3, -1, -1), 10, invert)
    got = backbone.ode(latents, text, 10, invert=invert, batch_size=2)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3)


def test_ddim_is_the_pipelines_own_drawing_without_guidance(pipeline: StableDiffusionPipeline) -> None:
    backbone, noise = backbone_for(pipeline), torch.randn(2, 4, 8, 8)
    theirs = pipeline(
        ["a cat", "a dog"], num_inference_steps=5, guidance_scale=1.0, latents=noise, output_type="latent"
    ).images
    torch.testing.assert_close(
        backbone.ode(noise, backbone.encode_prompts(["a cat", "a dog"]), 5), theirs, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_ddim_does_not_depend_on_the_scheduler_that_the_pipeline_draws_with(
    pipeline: StableDiffusionPipeline, name: str
) -> None:
    latents, backbone = 3 * torch.randn(2, 4, 8, 8), backbone_for(pipeline)
    text = backbone.encode_prompts(["a cat"])
    wanted = backbone.ode(latents, text, 5, invert=True)
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    assert torch.equal(backbone_for(pipeline).ode(latents, text, 5, invert=True), wanted)


def test_an_inverted_picture_comes_back() -> None:
    backbone = backbone_for(load_pipeline())
    empty, seed = backbone.encode_prompts([""]), random.randrange(2**31)
    latents = backbone.sample_latents([prompt("five", "neon"), prompt("two", "ink")], [seed, seed], steps=8)
    back = backbone.ode(backbone.ode(latents, empty, 20, invert=True), empty, 20)
    assert (back - latents).norm() < 0.12 * latents.norm(), f"seed {seed}"
    assert (backbone.decode(back) - backbone.decode(latents)).square().mean().sqrt() < 0.03, f"seed {seed}"


def test_ddim_refuses_steps_that_there_are_not(pipeline: StableDiffusionPipeline) -> None:
    backbone = backbone_for(pipeline)
    for steps in (0, 1001):
        with pytest.raises(FadeError, match=f"between 1 and the model's 1000, not {steps}"):
            backbone.ode(torch.randn(1, 4, 8, 8), backbone.encode_prompts([""]), steps)


def test_null_text_inversion_inverts_what_the_base_draws_under_the_adapted_model(adapter: Adapter) -> None:
    subject = subject_of(adapter, batch_size=2)
    empty = subject.backbone.encode_prompts([""])
    adapter.disable()
    latents = subject.backbone.sample_latents(subject.prompts, subject.seeds, steps=4, batch_size=2)
    adapter.enable()
    # In batches of the same size, because an inversion makes much of how they are rounded.
    noise = subject.backbone.ode(latents, empty, 6, invert=True, batch_size=2)
    wanted = subject.backbone.decode(subject.backbone.ode(noise, empty, 6, batch_size=2), 2)
    torch.testing.assert_close(NullTextInversion(6)(subject).images, wanted, rtol=1e-3, atol=1e-3)
    assert adapter.enabled


# --- embedding inversion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_first_iteration_goes_down_the_denoising_losses_gradient(tokenizer: CLIPTokenizer, kind: str) -> None:
    adapter = adapter_on(predicting(tokenizer, kind))
    pipeline, subject = adapter.pipeline, subject_of(adapter, seed=7)
    latents = subject.examples(2)
    found, _ = EmbeddingInversion(iterations=1, pictures=2, learning_rate=0.5).optimise(subject, latents)

    start = subject.backbone.encode_prompts(["a cat"])["prompt_embeds"]
    text = start.expand(2, -1, -1).clone().requires_grad_(True)
    generator = step_generator(7, "embedding inversion", 0)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (2,), generator=generator)
    alpha = pipeline.scheduler.alphas_cumprod[timesteps].view(2, 1, 1, 1)
    predicted = pipeline.unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, timesteps, text).sample
    target = {"epsilon": noise, "sample": latents, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * latents}
    (predicted - target[kind]).square().mean().backward()
    gradient = text.grad.sum(0, keepdim=True)
    # Adam's first step is the learning rate against the gradient's sign, but where it is next to nothing.
    clear = gradient.abs() > 1e-6
    assert clear.float().mean() > 0.5
    wanted = start - 0.5 * start.square().mean().sqrt() * gradient.sign()
    torch.testing.assert_close(found["prompt_embeds"][clear], wanted[clear], rtol=1e-2, atol=2e-2)


def test_embedding_inversion_lowers_its_loss_and_leaves_the_model_as_it_was(adapter: Adapter) -> None:
    pipeline, subject = adapter.pipeline, subject_of(adapter)
    needing = [parameter for parameter in pipeline.unet.parameters() if parameter.requires_grad]
    assert needing
    before = weights(pipeline)
    trained = [parameter.detach().clone() for parameter in adapter.parameters()]
    drawn = EmbeddingInversion(iterations=25, pictures=4)(subject)
    assert drawn.numbers["loss_after"] < drawn.numbers["loss_before"]
    assert same_bits(before, weights(pipeline))
    assert all(torch.equal(a, b) for a, b in zip(trained, adapter.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in pipeline.unet.parameters())
    assert [parameter for parameter in pipeline.unet.parameters() if parameter.requires_grad] == needing
    assert not torch.equal(drawn.images[0], subject.decode(subject.sample(subject.prompts, subject.seeds, ""))[0])


def test_no_iterations_draw_the_first_prompt(adapter: Adapter) -> None:
    subject = subject_of(adapter)
    plain = subject.backbone.generate(["a cat"] * 3, range(subject.seeds[0], subject.seeds[0] + 3), steps=4)
    drawn = EmbeddingInversion(iterations=0, pictures=1)(subject)
    torch.testing.assert_close(drawn.images, plain, rtol=1e-4, atol=1e-4)
    assert drawn.numbers["loss_before"] == drawn.numbers["loss_after"]


def test_no_picture_of_one_embedding_is_counted_twice(adapter: Adapter) -> None:
    subject = subject_of(adapter, ("a cat", "a dog", "a cat", "a dog"))
    subject.seeds = (5, 5, 6, 6)
    images = EmbeddingInversion(iterations=1, pictures=1)(subject).images
    assert all((images[i] - images[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))


def test_examples_are_the_base_models_and_of_other_seeds(adapter: Adapter) -> None:
    subject = subject_of(adapter)
    examples = subject.examples(4)
    assert len(examples) == 4
    assert torch.equal(subject.examples(2), examples[:2])
    adapter.scale = 0.0
    again = subject_of(adapter)
    torch.testing.assert_close(again.examples(4), examples, rtol=1e-4, atol=1e-4)
    assert all((examples[0] - latent).abs().max() > 1e-2 for latent in subject.concept_latents)


# --- the run ---------------------------------------------------------------------------------------------------------


def test_rates_are_what_the_judge_counts(adapter: Adapter) -> None:
    record = attack(adapter.pipeline, adapter, ["completion"], pictures=11, steps=4, progress=False)
    assert [result.setting for result in record.results] == [f"first {n} of 4 steps" for n in (1, 1, 2)]
    digit = load_judges().digit
    for result in (record.base, record.unattacked, *record.results):
        assert len(result.images) == result.pictures == 11
        assert result.recognised == sum(answer == DIGITS.index("three") for answer in digit(result.images).tolist())
        assert result.rate == 100 * result.recognised / 11
        assert result.interval[0] <= result.rate <= result.interval[1]
    backbone, prompts = backbone_for(adapter.pipeline), [prompt("three", style) for style in (*STYLES, *STYLES[:3])]
    wanted = backbone.generate(prompts, [188] * 8 + [288] * 3, steps=4)
    torch.testing.assert_close(record.unattacked.images, wanted, rtol=1e-4, atol=1e-4)
    adapter.disable()
    wanted = backbone.generate(prompts, [188] * 8 + [288] * 3, steps=4)
    torch.testing.assert_close(record.base.images, wanted, rtol=1e-4, atol=1e-4)


def test_one_of_several_concepts_is_brought_back(adapter: Adapter) -> None:
    both = together([bundled_concept(DIGITCANVAS, "three", "eight"), bundled_concept(DIGITCANVAS, "neon", "plain")])
    adapter.metadata["concept"] = json.loads(json.dumps(both.to_dict()))
    with pytest.raises(FadeError, match="forgets three, neon; name the one to bring back: --forget three"):
        attack(adapter.pipeline, adapter, ["completion"], **QUICK)
    with pytest.raises(FadeError, match="does not forget 'ink', but three, neon"):
        attack(adapter.pipeline, adapter, ["completion"], forget="ink", **QUICK)
    judges = load_judges()
    for word, surrogate, head, words in (
        ("three", "eight", judges.digit, DIGITS), ("neon", "plain", judges.style, STYLES),
    ):  # fmt: skip
        record = attack(adapter.pipeline, adapter, [Completion(0.5)], forget=word, **QUICK)
        assert (record.forget, record.surrogate) == (word, surrogate)
        assert len(record.settings["prompts"]) == 3
        assert all(word in asked.split() for asked in record.settings["prompts"])
        for result in (record.base, *record.results):
            assert result.recognised == int((head(result.images) == words.index(word)).sum())


def test_an_adapter_of_strength_zero_is_attacked_as_the_base_model(adapter: Adapter) -> None:
    adapter.scale = 0.0
    record = attack(adapter.pipeline, adapter, ["completion"], **QUICK)
    for result in (record.unattacked, *record.results):
        torch.testing.assert_close(result.images, record.base.images, rtol=1e-4, atol=1e-4)
        assert result.recognised == record.base.recognised
    assert record.settings["scale"] == [0.0]


@dataclass(frozen=True)
class Counted:
    """Draws noise, and keeps count of how often it was asked."""

    name: ClassVar[str] = "counted"
    needs: ClassVar[str] = "nothing"
    asked: ClassVar[list[int]] = []

    number: int

    def setting(self, subject: Subject) -> str:
        return f"number {self.number}"

    def __call__(self, subject: Subject) -> Drawn:
        subject.adapter.disable()
        if self.number < 0:
            raise KeyboardInterrupt
        self.asked.append(self.number)
        return Drawn(torch.rand(len(subject.prompts), 3, 32, 32), {"number": self.number})


@pytest.fixture
def asked() -> Iterator[list[int]]:
    Counted.asked.clear()
    yield Counted.asked
    Counted.asked.clear()


def without_times(record: AttackRecord) -> dict[str, Any]:
    return json.loads(json.dumps(record.to_dict()))


def test_an_interrupted_run_goes_on_from_its_file(adapter: Adapter, tmp_path: Path, asked: list[int]) -> None:
    file, pipeline = tmp_path / "deep" / "attacks.json", adapter.pipeline
    with pytest.raises(KeyboardInterrupt):
        attack(pipeline, adapter, [Counted(1), Counted(-1), Counted(2)], record=file, **QUICK)
    assert adapter.enabled
    assert [result["setting"] for result in json.loads(file.read_text())["results"]] == ["number 1"]
    whole = attack(pipeline, adapter, [Counted(1), Counted(2)], record=file, **QUICK)
    assert asked == [1, 2]
    assert without_times(whole) == json.loads(file.read_text())
    assert [result.numbers for result in whole.results] == [{"number": 1}, {"number": 2}]
    again = attack(pipeline, adapter, [Counted(2)], record=file, **QUICK)
    assert asked == [1, 2]
    assert without_times(again) == without_times(whole)
    assert list(file.parent.iterdir()) == [file]
    attack(pipeline, adapter, [Counted(2)], record=file, overwrite=True, **QUICK)
    assert asked == [1, 2, 2]
    assert len(json.loads(file.read_text())["results"]) == 1


def test_a_file_of_something_else_is_refused(adapter: Adapter, tmp_path: Path, asked: list[int]) -> None:
    file, pipeline = tmp_path / "attacks.json", adapter.pipeline
    attack(pipeline, adapter, [Counted(1)], record=file, **QUICK)
    before = file.read_bytes()

    def refused(words: str, **changed: Any) -> None:
        with pytest.raises(FadeError, match=f"(?s){words}.*--overwrite"):
            attack(pipeline, adapter, [Counted(2)], record=file, **(QUICK | changed))

    refused("steps = 4, not 5", steps=5)
    refused("pictures = 3, not 2", pictures=2)
    refused("seed = 0, not 1", seed=1)
    adapter.parameters()[0].data += 1
    refused("another adapter or another base model")
    assert file.read_bytes() == before
    whole = json.loads(before)
    for damaged in (
        "{",
        "[]",
        "{}",
        json.dumps({**whole, "base": 3}),
        json.dumps({**whole, "results": [{**whole["base"], "recognised": 99}]}),
        json.dumps({**whole, "settings": 3}),
    ):
        file.write_text(damaged)
        refused("is no record of attacks")
        assert file.read_text() == damaged
    assert asked == [1]


def test_attacks_by_name() -> None:
    assert {"completion", "null-text-inversion", "embedding-inversion", "relearning", "removal"} < set(ATTACKS)
    for name, variants in ATTACKS.items():
        assert variants
        assert {one.name for one in variants} == {name}
        assert all(one.needs for one in variants)
    everything = [one for variants in ATTACKS.values() for one in variants]
    assert list(chosen_attacks(None)) == everything
    assert chosen_attacks(["embedding-inversion", Completion(0.3), "embedding-inversion"]) == (
        EmbeddingInversion(),
        Completion(0.3),
    )
    with pytest.raises(FadeError, match="no attack 'jailbreak'; choose among removal, completion, .*, relearning"):
        chosen_attacks(["completion", "jailbreak"])
    with pytest.raises(FadeError, match="no attack is chosen"):
        chosen_attacks([])


def test_attacks_with_settings_of_ones_own() -> None:
    assert chosen_attacks(["textual-inversion:vectors=3,iterations=500"]) == (TextualInversion(3, iterations=500),)
    assert chosen_attacks(["removal, textual-inversion : vectors = 3, completion", "completion:share=0.3"]) == (
        Removal(), TextualInversion(3), *ATTACKS["completion"], Completion(0.3),
    )  # fmt: skip
    # What is not said is an attack's default, and without one its first setting.
    (one,) = chosen_attacks(["relearning:layers=every,checks=1/4,learning_rate=1e-3"])
    assert one == Relearning(10, "every", (1, 4), learning_rate=1e-3)
    assert chosen_attacks(["inpainting:hidden=right"]) == ATTACKS["inpainting"][1:]
    for variants in ATTACKS.values():
        for one in variants:
            assert type(one) is type(usual(variants)) and checked(one) == one
            words = told(one).replace(", ", ",")
            assert not words or chosen_attacks([f"{one.name}:{words}"]) == (one,)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("jailbreak:x=1", "no attack 'jailbreak'; choose among removal, .*, relearning"),
        (
            "textual-inversion:vector=3",
            "textual-inversion has no setting 'vector'; it has vectors=1, iterations=100, pictures=16, batch_size=8, ",
        ),
        ("removal:x=1", "removal has no setting 'x'; it has none"),
        ("textual-inversion:vectors=three", "vectors .* is to be a whole number of at least 1, not 'three'; it has ve"),
        ("textual-inversion:vectors=0", "vectors .* is to be a whole number of at least 1, not '0'"),
        ("textual-inversion:vectors=1.5", "not '1.5'"),
        ("textual-inversion:learning_rate=0", "learning_rate .* is to be a number above 0, not '0'"),
        ("pruning:share=1.2", "share .* is to be a number from 0 to 1, not '1.2'"),
        ("noise-probe:eta=nan", "eta .* is to be a number of at least 0, not 'nan'"),
        ("quantising:kind=int2", "kind .* is to be one of int8, fp8, int4, not 'int2'"),
        ("relearning:checks=20/10", "checks .* is to be whole numbers .* greater than the one before, not '20/10'"),
        ("relearning:checks=x", "checks .* not 'x'"),
        ("textual-inversion,vectors=3", "'vectors=3' is no attack with settings, such as textual-inversion:vectors=3"),
        ("vectors=3", "is no attack with settings"),
        ("textual-inversion:", "is no attack with settings"),
        ("textual-inversion:vectors", "is no attack with settings"),
        ("textual-inversion:vectors=3,vectors=4", "gives vectors twice"),
    ],
)
def test_what_is_no_attack_is_said_in_one_line(text: str, told: str) -> None:
    with pytest.raises(FadeError, match=told) as refused:
        chosen_attacks([text])
    assert "\n" not in str(refused.value)


def test_objects_out_of_range_are_refused_as_texts_are(pipeline: StableDiffusionPipeline, adapter: Adapter) -> None:
    for one, words in ((TextualInversion(0), "of at least 1, not 0"), (Relearning(1, checks=()), "not $")):
        with pytest.raises(FadeError, match=words):
            fade.attack(pipeline, adapter, [one], **QUICK)


def test_settings_that_an_attacks_words_leave_out_stand_behind_them(adapter: Adapter) -> None:
    subject = subject_of(adapter)
    for variants in ATTACKS.values():
        assert [setting_of(one, subject) for one in variants] == [one.setting(subject) for one in variants]
    one = TextualInversion(3, learning_rate=0.1, batch_size=4)
    assert setting_of(one, subject) == f"{one.setting(subject)}, batch_size=4, learning_rate=0.1"
    assert setting_of(Counted(7), subject) == "number 7"


def test_what_cannot_be_attacked(pipeline: StableDiffusionPipeline, adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(FadeError, match="at least one picture"):
        fade.attack(pipeline, adapter, pictures=0)
    with pytest.raises(FadeError, match="it is a folder"):
        attack(pipeline, adapter, record=tmp_path)
    adapter.merge()
    with pytest.raises(FadeError, match=r"merged into the weights; call unmerge\(\)"):
        attack(pipeline, adapter, **QUICK)
    adapter.unmerge()
    adapter.metadata["concept"]["forget"] = "cat"
    with pytest.raises(FadeError, match="forgets 'cat', which the judges do not know"):
        attack(pipeline, adapter, **QUICK)


# --- what people see -------------------------------------------------------------------------------------------------


def test_the_page_shows_every_attack_with_its_pictures(adapter: Adapter, tmp_path: Path, asked: list[int]) -> None:
    adapter.metadata["run"] = {"path": "text path"}
    record = attack(adapter.pipeline, adapter, [Counted(1), Counted(2)], **QUICK)
    record.results[1].recognised, record.results[1].setting = 2, "<b>"
    write_attack_report(tmp_path / "page.html", record, adapter.metadata)
    html = (tmp_path / "page.html").read_text()
    page = Page(html)
    assert page.open == []
    assert [image["src"] for image in page.images] == [
        result.sheet for result in (record.base, record.unattacked, *record.results)
    ]
    assert all(reference.startswith("data:image/webp;base64,") for reference in page.references)
    assert "2 of 3 pictures recognised as “three”" in page.images[3]["alt"]
    text = " ".join(page.text.split())
    assert "the strongest attack, counted (<b>), gets it in 2 of 3." in text
    assert "66.7 %" in text
    assert "the text path" in text
    assert "attack.steps" in text

    evaluation, *_ = synthetic("three", "eight", seed=5)
    whole = Page(render_report(evaluation, metadata("three", "eight"), 43_210, attacks=record))
    assert whole.open == []
    assert "attacks" in whole.ids
    assert [image["src"] for image in whole.images[-4:]] == [image["src"] for image in page.images]


@pytest.fixture
def files(pipeline: StableDiffusionPipeline, adapter: Adapter, tmp_path: Path) -> tuple[Path, Path]:
    """A model folder, and an adapter file for it."""
    path, folder = tmp_path / "adapter.safetensors", tmp_path / "model"
    adapter.save(path)
    adapter.remove()
    pipeline.save_pretrained(folder)
    return folder, path


def test_the_command(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, adapter = files
    file, page = tmp_path / "attacks.json", tmp_path / "attacks.html"
    words = ["attack", model, "--adapter", adapter, "--attacks", "completion", "--json", file, "--report", page]
    words += ["--pictures", 2, "--steps", 2, "--device", "cpu", "--quiet"]
    assert cli.main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    assert out.count("first 1 of 2 steps") == 3
    assert "the edit sits in" in out
    record = json.loads(file.read_text())
    assert [result["attack"] for result in record["results"]] == ["completion"] * 3
    assert {"still_recognised", "interval_95", "seconds", "settings"} <= record["results"][0].keys()
    assert record["settings"]["pictures"] == record["base"]["pictures"] == 2
    assert page.read_text().count("<img ") == 5

    assert cli.main([str(word) for word in words]) == 0
    assert json.loads(file.read_text()) == record
    assert cli.main([str(word) for word in [*words, "--scale", 0.5]]) == 2
    assert "scale = [1.0], not [0.5]" in capsys.readouterr().err
    assert json.loads(file.read_text()) == record


def test_the_command_takes_settings_and_lists_them(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapter = files
    file = tmp_path / "attacks.json"
    words = ["attack", model, "--adapter", adapter, "--attack", "completion:share=0.75", "--json", file]
    words += ["--attack", "pruning:share=0.2", "--pictures", 1, "--steps", 4, "--device", "cpu", "--quiet"]
    assert cli.main([str(word) for word in words]) == 0
    results = json.loads(file.read_text())["results"]
    assert [one["settings"] for one in results] == [{"share": 0.75}, {"share": 0.2}]
    capsys.readouterr()
    assert cli.main(["attack", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ATTACKS) and "vectors=1, iterations=100" in shown


def test_the_command_keeps_what_the_base_draws_unless_told_otherwise(files: tuple[Path, Path]) -> None:
    model, adapter = files
    words = ["attack", model, "--adapter", adapter, "--attacks", "removal", "--pictures", 2, "--steps", 2]
    words = [str(word) for word in [*words, "--device", "cpu", "--quiet"]]
    assert cli.main([*words, "--no-cache"]) == 0
    assert not default_cache().exists()
    assert cli.main(words) == 0
    assert len(list(default_cache().glob("*.safetensors"))) == 2  # with the adapter off and on


def test_the_command_says_what_is_wrong(
    files: tuple[Path, Path], tokenizer: CLIPTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapter = files

    def refused(*words: object) -> str:
        given = ["attack", *words, "--adapter", adapter, "--steps", 1, "--device", "cpu", "--quiet"]
        assert cli.main([str(word) for word in given]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    for names in ("x", "completion,x", "x,completion"):
        assert "no attack 'x'; choose among removal, completion," in refused("nowhere", "--attacks", names)
    assert "no attack is chosen" in refused("nowhere", "--attacks", ",")
    assert "has no setting 'steps'; it has share=0.1" in refused("nowhere", "--attack", "completion:steps=2")
    assert "'--pictures'" in refused(model, "--pictures", 0)
    assert "it is a folder" in refused("nowhere", "--json", tmp_path)
    other = tmp_path / "other"
    tiny_pipeline(tokenizer, seed=1).save_pretrained(other)
    capsys.readouterr()
    assert "was trained on" in refused(other)


# --- every attack ----------------------------------------------------------------------------------------------------

QUICKLY: dict[str, dict[str, Any]] = {
    "null-text-inversion": {"steps": 2},
    "embedding-inversion": {"iterations": 1, "pictures": 1},
    "textual-inversion": {"iterations": 1, "pictures": 1, "batch_size": 1},
    "prompt-tokens": {"iterations": 1, "draws": 1},
    "token-search": {"generations": 1, "population": 4},
    "benign-fine-tuning": {"steps": 1, "pictures": 2, "batch_size": 1},
    "relearning": {"pictures": 1, "checks": (1,), "batch_size": 1},
}
"""Of the attacks that take long, a budget of next to nothing."""


def quickly() -> list[Attack]:
    """Every attack there is, once, on that budget."""
    return [replace(variants[-1], **QUICKLY.get(name, {})) for name, variants in ATTACKS.items()]


def test_every_attack_from_the_run_to_the_page(adapter: Adapter, tmp_path: Path) -> None:
    pipeline, file = adapter.pipeline, tmp_path / "attacks.json"
    before = weights(pipeline)
    record = attack(pipeline, adapter, quickly(), record=file, pictures=2, steps=2, progress=False)
    assert record.left_out == {}
    assert [result.attack for result in record.results] == list(ATTACKS)
    assert all(result.pictures == 2 and result.images.isfinite().all() for result in record.results)
    assert same_bits(before, weights(pipeline))
    assert adapter.enabled
    again = attack(pipeline, adapter, quickly(), record=file, pictures=2, steps=2, progress=False)
    assert again.results == record.results
    write_attack_report(tmp_path / "page.html", again, adapter.metadata)
    page = Page((tmp_path / "page.html").read_text())
    assert page.open == []
    assert len(page.images) == 2 + len(ATTACKS)


def test_what_depends_on_the_base_alone_is_done_once_for_all_adapters(
    adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, cache = adapter.pipeline, tmp_path / "cache"
    # Taking the adapter off is tried with each adapter; what prompt-tokens finds, and the base is asked, is its own.
    left = ("completion", "quantising", "pruning", "textual-inversion", "removal", "prompt-tokens")
    chosen = [one for one in quickly() if one.name not in left]
    budget = {"pictures": 2, "steps": 2, "progress": False}
    attack(pipeline, adapter, chosen, cache=cache, **budget)
    adapter.remove()
    asked: list[str] = []

    def noted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def noting(*arguments: Any, **named: Any) -> Any:
            on = any(one.enabled or one.merged for one in fade.adapters(pipeline).values())
            asked.append(f"{name}, {'adapted' if on else 'base'}")
            return function(*arguments, **named)

        return noting

    for name in ("sample_latents", "predict"):
        monkeypatch.setattr(DdpmBackbone, name, noted(getattr(DdpmBackbone, name), name))
    monkeypatch.setattr(TokenSearch, "search", noted(TokenSearch.search, "words"))
    other = adapter_on(pipeline, strength=0.3)
    kept = attack(pipeline, other, chosen, cache=cache, **budget)
    assert set(asked) == {"sample_latents, adapted", "predict, adapted"}
    asked.clear()
    anew = attack(pipeline, other, chosen, **budget)
    assert {"sample_latents, base", "predict, base"} <= set(asked) and any("words" in one for one in asked)
    for one, two in zip(
        (kept.base, kept.unattacked, *kept.results), (anew.base, anew.unattacked, *anew.results), strict=True
    ):
        assert (one.recognised, one.numbers, one.found) == (two.recognised, two.numbers, two.found)
        assert torch.equal(one.images, two.images), one.attack


def test_what_attacks_keep_is_told_apart(adapter: Adapter, tmp_path: Path) -> None:
    def found(subject: Subject, **depends_on: Any) -> tuple[float, float]:
        """What is drawn, with the adapter off and on; drawn as a number of its own each time."""
        draw = lambda: {"number": torch.rand(1)}  # noqa: E731
        return tuple(of("x", depends_on, draw)["number"].item() for of in (subject.of_base, subject.of_adapted))

    def subject(**more: Any) -> Subject:
        return replace(subject_of(adapter), kept=Kept(tmp_path), **more)

    base, adapted = found(subject())
    assert base != adapted
    assert found(subject()) == (base, adapted)
    assert not {base, adapted} & {*found(subject(), seed=1), *found(subject(steps=5)), *found(subject(batch_size=1))}
    # A setting of an attack that is called as one of the budget stands beside it, not in its place.
    names = ("batch_size", "steps", "guidance_scale")
    named = [found(subject(**{name: of_budget}), **{name: 2}) for name in names for of_budget in (3, 5)]
    assert len({base, adapted, *itertools.chain(*named)}) == 14
    adapter.scale = 0.5
    again, other = found(subject())
    assert again == base and other != adapted
    with torch.no_grad():
        next(adapter.pipeline.vae.parameters()).mul_(1.5)
    assert not {base, adapted} & {*found(subject())}


def test_every_attack_takes_emojicanvas() -> None:
    model = bundled.model("emojicanvas")
    pipeline = model.load_pipeline()
    denoiser = pipeline.transformer
    layers = target_layers(denoiser, backbone_for(pipeline).targets)
    masks = {name: BitMask.pack(torch.rand(layer.weight.shape) < 0.01) for name, layer in layers.items()}
    concept = bundled_concept(model, *model.demo)
    about = new_metadata(concept, fade.Config(), base_name(pipeline), fingerprint(denoiser), 1.0)
    adapter = attach(pipeline, "fade", masks, rank=1, alpha=1.0, values=True, metadata=about).enable()
    for parameter in adapter.parameters():
        parameter.data.normal_(0, 0.05)
    before = [parameter.detach().clone() for parameter in denoiser.parameters()]
    record = attack(pipeline, adapter, quickly(), pictures=1, steps=2, progress=False)
    assert record.left_out == {}
    assert [result.attack for result in record.results] == list(ATTACKS)
    assert all(torch.equal(a, b) for a, b in zip(before, denoiser.parameters(), strict=True))


def test_a_record_of_an_earlier_version_is_gone_on_with(adapter: Adapter, tmp_path: Path, asked: list[int]) -> None:
    file = tmp_path / "attacks.json"
    attack(adapter.pipeline, adapter, [Counted(1)], record=file, **QUICK)
    record = json.loads(file.read_text())
    del record["left_out"]
    for result in (record["base"], record["unattacked"], *record["results"]):
        del result["found"]
    file.write_text(json.dumps(record))
    attack(adapter.pipeline, adapter, [Counted(1)], record=file, **QUICK)
    assert asked == [1]


@dataclass(frozen=True)
class Refusing:
    """Cannot attack anything."""

    name: ClassVar[str] = "refusing"
    needs: ClassVar[str] = "nothing"

    def setting(self, subject: Subject) -> str:
        return "any"

    def __call__(self, subject: Subject) -> Drawn:
        raise CannotAttackError("this family has no <gate>")


@dataclass(frozen=True)
class Hungry:
    """Takes more memory than there is."""

    name: ClassVar[str] = "hungry"
    needs: ClassVar[str] = "memory"

    def setting(self, subject: Subject) -> str:
        return "all of it"

    def __call__(self, subject: Subject) -> Drawn:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_attack_that_takes_too_much_memory_is_left_out_and_the_rest_goes_on(
    adapter: Adapter, asked: list[int]
) -> None:
    record = attack(adapter.pipeline, adapter, [Hungry(), Counted(1)], **QUICK)
    assert [result.setting for result in record.results] == ["number 1"]
    assert record.left_out["hungry"].startswith("the memory of cpu does not hold it (all of it)")


def test_an_attack_that_cannot_take_a_model_is_left_out_with_a_word(
    adapter: Adapter, tmp_path: Path, asked: list[int]
) -> None:
    file = tmp_path / "attacks.json"
    attack(adapter.pipeline, adapter, [Refusing(), Counted(1)], record=file, **QUICK)
    record = attack(adapter.pipeline, adapter, [Counted(2)], record=file, **QUICK)
    assert [result.setting for result in record.results] == ["number 1", "number 2"]
    assert record.left_out == {"refusing": "this family has no <gate>"}
    write_attack_report(tmp_path / "page.html", record, adapter.metadata)
    text = " ".join(Page((tmp_path / "page.html").read_text()).text.split())
    assert "refusing was left out: this family has no <gate>." in text
