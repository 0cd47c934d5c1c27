"""What each method wants the adapter to predict, against its formula written out with the UNet itself."""

from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.testing import assert_close

from fade.concept import concept_from_words, together
from fade.config import DataConfig
from fade.latents import prepare_latents
from fade.methods import METHODS, method
from fade.methods.concept_ablation import CONCEPT_ABLATION, Anchor
from fade.methods.esd import NegativeGuidance, asked_in
from fade.methods.esd import Options as EsdOptions
from fade.methods.gradient_ascent import Ascent
from fade.methods.gradient_ascent import Options as AscentOptions
from fade.methods.leco import Options as LecoOptions
from fade.methods.leco import PromptsAlone
from fade.methods.negated_lora import Denoising, negate
from fade.methods.negated_lora import Options as NegateOptions
from fade.methods.retrack import Options as RetrackOptions
from fade.methods.retrack import Retained, neighbour_weights
from fade.methods.salun import Options as SalunOptions
from fade.methods.salun import RandomLabel
from fade.noise import levels, split
from fade.objective import Batch, Objective

from .conftest import CONCEPT, asker, batch_of, target_of, training_of

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_fades_target_is_the_frozen_models_answer_to_the_surrogate(pipeline: StableDiffusionPipeline) -> None:
    training = training_of(pipeline, "distillation")
    batch, ask = batch_of(training), asker(training)
    wanted = ask(batch.noised, batch.times, ["a dog", "one dog", "a dog", "a house", "a tree"], True)
    assert_close(target_of(training, batch, Objective), wanted, **CLOSE)


@pytest.mark.parametrize("name", [name for name in METHODS if method(name).trains])
def test_a_method_says_which_pictures_it_learns_to_draw(pipeline: StableDiffusionPipeline, name: str) -> None:
    """What a half is taught depends on what is under its noise, and not alone on what is seen and asked, just where the
    method says that it denoises that half: its latents must then show their prompts."""
    training = training_of(pipeline, name)
    batch, objective = batch_of(training), method(name).objective or Objective

    def taught(batch: Batch) -> torch.Tensor:
        torch.manual_seed(7)
        return target_of(training, batch, objective)

    learnt = taught(batch) - taught(replace(batch, clean=batch.clean + 1.0, noise=batch.noise - 1.0))
    halves = {"forget": learnt[batch.forget], "retain": learnt[~batch.forget]}
    found = {half for half, change in halves.items() if change.abs().max() > 1e-3}
    measured = {"forget", "retain"} if method(name).start else set()  # by its `Importance`
    assert found | measured == {*method(name).denoises}


@pytest.mark.parametrize(("name", "objective"), [("salun", RandomLabel), ("concept-ablation", Anchor)])
def test_a_moving_target_is_the_adapted_models_answer(
    pipeline: StableDiffusionPipeline, name: str, objective: type[Objective]
) -> None:
    training = training_of(pipeline, name)
    batch, ask = batch_of(training), asker(training)
    wanted = ask(batch.noised[:3], batch.times[:3], ["a dog", "one dog", "a dog"], False)
    assert_close(target_of(training, batch, objective), torch.cat([wanted, batch.noise[3:]]), **CLOSE)
    assert not torch.allclose(wanted, ask(batch.noised[:3], batch.times[:3], ["a dog", "one dog", "a dog"], True))


def test_saluns_random_labels_are_retain_prompts_for_the_forget_half_alone(pipeline: StableDiffusionPipeline) -> None:
    training = training_of(pipeline, "salun", SalunOptions("random"))
    given = torch.tensor([0, 0, 0, 0, 3, 2])
    draws = [RandomLabel(training).answers(given, 4, torch.Generator().manual_seed(seed)) for seed in range(20)]
    retained = set(training.prompts.rows(CONCEPT.retain_prompts).tolist())
    assert {row for drawn in draws for row in drawn[:4].tolist()} == retained
    assert all(drawn[4:].tolist() == [3, 2] for drawn in draws)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_esd_leads_away_from_the_concept(pipeline: StableDiffusionPipeline, guidance: float) -> None:
    """With the whole prompt for the concept, the paper's own formula."""
    training = training_of(pipeline, "esd-x", EsdOptions(guidance, "prompt"))
    batch, ask = batch_of(training), asker(training)
    z, t = batch.noised[:3], batch.times[:3]
    concept, empty = ask(z, t, ["a cat", "one cat", "a cat"], True), ask(z, t, [""] * 3, True)
    others = ask(batch.noised[3:], batch.times[3:], ["a house", "a tree"], True)
    wanted = torch.cat([empty - guidance * (concept - empty), others])
    assert_close(target_of(training, batch, NegativeGuidance), wanted, **CLOSE)


def test_esd_leads_away_from_the_concept_alone(pipeline: StableDiffusionPipeline) -> None:
    training = training_of(pipeline, "esd-x", EsdOptions(0.5))
    batch, ask = batch_of(training), asker(training)
    z, t = batch.noised[:3], batch.times[:3]
    asked, concept, empty = (ask(z, t, texts, True) for texts in (["a cat", "one cat", "a cat"], ["cat"] * 3, [""] * 3))
    found = target_of(training, batch, NegativeGuidance)
    assert_close(found[:3], asked - 1.5 * (concept - empty), **CLOSE)


def test_esd_leads_away_from_the_concept_that_is_asked_for(pipeline: StableDiffusionPipeline) -> None:
    training = training_of(pipeline, "esd-x", EsdOptions(0.5))
    tree = concept_from_words("tree", "house", ["a {}"], ["a car"])
    training.adapter.metadata["concept"] = together([tree, CONCEPT]).to_dict()
    batch, ask = batch_of(training), asker(training)
    z, t = batch.noised[:3], batch.times[:3]
    asked, concept, empty = (ask(z, t, texts, True) for texts in (["a cat", "one cat", "a cat"], ["cat"] * 3, [""] * 3))
    found = target_of(training, batch, NegativeGuidance)
    assert_close(found[:3], asked - 1.5 * (concept - empty), **CLOSE)


def test_which_concept_a_prompt_asks_for() -> None:
    names = ("dog", "hot dog", "neon")
    pairs = tuple(concept_from_words(name, "cat", ["a {}", "a {} in neon"], ["a car"]).pairs[0] for name in names)
    for text, name in (
        ("a hot dog in neon", "hot dog"), ("a dog in neon", "dog"), ("Hot dog with mustard", "hot dog"),
        ("my dog, barking", "dog"), ("a lamp of neon", "neon"), ("a neon", "neon"), ("nobody", "dog"),
    ):  # fmt: skip
        assert names[asked_in(text, pairs)] == name, text


def test_concept_ablation_draws_the_anchor(pipeline: StableDiffusionPipeline) -> None:
    training = training_of(pipeline, "concept-ablation")
    training.adapter.disable()
    assert CONCEPT_ABLATION.settings["data__forget_from"] == "surrogate"
    data = {"forget_samples": 3, "retain_samples": 1, "sampling_steps": 2}
    latents = prepare_latents(training.backbone, CONCEPT, DataConfig(forget_from="surrogate", **data), 4, "base")
    seeds = range(9 * 1_000_003, 9 * 1_000_003 + 3)
    drawn = training.backbone.sample_latents(["a dog", "one dog", "a dog"], seeds, 2, 3.0)
    assert torch.equal(latents.forget, drawn)
    assert latents.forget_prompts == ("a cat", "one cat", "a cat")


@pytest.mark.parametrize(("neutral", "direction"), [("empty", "prompt"), ("surrogate", "prompt"), ("empty", "concept")])
def test_lecos_target(pipeline: StableDiffusionPipeline, neutral: str, direction: str) -> None:
    training = training_of(pipeline, "leco", LecoOptions(guidance=1.5, direction=direction, neutral=neutral))
    batch, ask = batch_of(training), asker(training)
    z, t = batch.noised[:3], batch.times[:3]
    away = ["a cat", "one cat", "a cat"] if direction == "prompt" else ["cat"] * 3
    concept, empty = ask(z, t, away, True), ask(z, t, [""] * 3, True)
    start = empty if neutral == "empty" else ask(z, t, ["a dog", "one dog", "a dog"], True)
    found = target_of(training, batch, PromptsAlone)[:3]
    assert_close(found, start - 1.5 * (concept - empty), **CLOSE)


def test_leco_denoises_noise_with_the_adapter_on_until_the_time(pipeline: StableDiffusionPipeline) -> None:
    training = training_of(pipeline, "leco", LecoOptions(steps=2, drawing_guidance=4.0))
    batch, ask = batch_of(training), asker(training)
    with torch.no_grad():
        found = PromptsAlone(training).noised(batch.clean, batch.noise, batch.times, batch.asked, batch.forget)
    alphas, state = pipeline.scheduler.alphas_cumprod, batch.noise[:3]
    last = len(alphas) - 1
    middle = ((last + 1 + batch.times[:3]) / 2).long()
    for now, after in ((torch.full((3,), last), middle), (middle, batch.times[:3])):  # DDIM, by its own formula
        concept, empty = ask(state, now, ["a cat", "one cat", "a cat"], False), ask(state, now, [""] * 3, False)
        noise = empty + 4 * (concept - empty)
        a, b = (alphas[i].view(3, 1, 1, 1) for i in (now, after))
        clean = (state - (1 - a).sqrt() * noise) / a.sqrt()
        state = b.sqrt() * clean + (1 - b).sqrt() * noise
    assert_close(found[:3], state, rtol=1e-3, atol=1e-3)
    assert torch.equal(found[3:], batch.noised[3:])


def test_gradient_ascent_and_its_pause(pipeline: StableDiffusionPipeline) -> None:
    training = training_of(pipeline, "gradient-ascent", AscentOptions(most=1.0))
    batch = batch_of(training)
    aim = Ascent(training)
    assert torch.equal(aim.target(batch), batch.noise)
    config = training.config
    rising, paused = (-config.forget_weight, config.retain_weight), (0.0, config.retain_weight)
    assert aim.weights([], []) == rising and aim.weights([2.0, 0.9], [0.1, 0.1]) == rising
    assert aim.weights([0.9, 1.1], [0.1, 0.1]) == paused


def test_a_negated_lora_is_what_was_learned_times_minus_the_strength(pipeline: StableDiffusionPipeline) -> None:
    training = training_of(pipeline, "negated-lora")
    batch, ask = batch_of(training), asker(training)
    others = ask(batch.noised[3:], batch.times[3:], ["a house", "a tree"], True)
    assert_close(target_of(training, batch, Denoising), torch.cat([batch.noise[:3], others]), **CLOSE)
    before = {name: layer.get_delta_weight("fade") for name, layer in training.adapter.layers.items()}
    negate(training.adapter, NegateOptions(0.5))
    for name, layer in training.adapter.layers.items():
        assert torch.equal(layer.get_delta_weight("fade"), -0.5 * before[name])


def unbiased_gradient(z: torch.Tensor, predicted: torch.Tensor, retained: torch.Tensor, a: float) -> torch.Tensor:
    """Of Σ_i q(z | x_i) ‖ε̂ − ε_i‖² / Σ_i q(z | x_i) with respect to ε̂, in float64 and as it stands."""
    z, x, e = z.double(), retained.double(), predicted.double().requires_grad_(True)
    q = torch.stack([torch.exp(-((z - a**0.5 * one).square().sum() / (2 * (1 - a)))) for one in x])
    noises = [(z - a**0.5 * one) / (1 - a) ** 0.5 for one in x]
    loss = sum(weight * (e - noise).square().sum() for weight, noise in zip(q, noises, strict=True)) / q.sum()
    return torch.autograd.grad(loss, e)[0]


def test_retrack_with_all_neighbours_is_the_unbiased_loss(pipeline: StableDiffusionPipeline) -> None:
    training = training_of(pipeline, "retrack", RetrackOptions(neighbours=0, among="all"))
    batch = batch_of(training)
    batch.times[:3] = torch.tensor([700, 800, 950])  # where the densities can be written out without underflow
    batch = type(batch)(**{**vars(batch), "noised": training.backbone.add_noise(batch.clean, batch.noise, batch.times)})
    found, predicted = target_of(training, batch, Retained), torch.randn_like(batch.noised)
    assert torch.equal(found[3:], batch.noise[3:])
    for i in range(3):
        a = pipeline.scheduler.alphas_cumprod[batch.times[i]].double().item()
        wanted = unbiased_gradient(batch.noised[i], predicted[i], training.latents.retain, a)
        assert_close(2 * (predicted[i] - found[i]).double(), wanted, rtol=1e-3, atol=1e-3)


def test_retracks_pictures_are_those_of_the_answer(pipeline: StableDiffusionPipeline) -> None:
    """Where any is retained: "a dog" of those of "a cat", and everything for "one cat"."""
    training = training_of(pipeline, "retrack")
    retained = ("a house", "a dog", "a tree") * 2
    training = replace(training, latents=replace(training.latents, retain_prompts=retained))
    batch = batch_of(training)
    found = Retained(training).among(batch.where(batch.forget))
    of_a_dog = [prompt == "a dog" for prompt in retained]
    assert found.tolist() == [of_a_dog, [True] * 6, of_a_dog]


def test_retracks_weights_keep_the_nearest_and_do_not_underflow() -> None:
    noised, retained = torch.randn(5, 4, 8, 8), torch.randn(7, 4, 8, 8)
    alpha, sigma = torch.full((5, 1, 1, 1), 0.999), torch.full((5, 1, 1, 1), 0.02)
    nearest = torch.cdist(noised.flatten(1), 0.999 * retained.flatten(1)).argmin(1)
    for neighbours in (0, 1, 3, 9):
        weights = neighbour_weights(noised, retained, alpha, sigma, neighbours)
        assert_close(weights.sum(1), torch.ones(5))
        assert torch.equal(weights.argmax(1), nearest)
    sigma = torch.full((5, 1, 1, 1), 30.0)
    weights = neighbour_weights(noised, retained, alpha, sigma, 3)
    everything = neighbour_weights(noised, retained, alpha, sigma, 0)
    assert ((weights > 0).sum(1) == 3).all() and (everything > 0).all()
    top = everything.topk(3).values
    assert_close(weights.topk(3).values, top / top.sum(1, keepdim=True))


@pytest.mark.parametrize("kind", ["pipeline", "velocity_pipeline", "sample"])
def test_a_prediction_is_split_into_picture_and_noise(kind: str, request: pytest.FixtureRequest) -> None:
    made = request.getfixturevalue("pipeline" if kind == "sample" else kind)
    if kind == "sample":
        made.scheduler.register_to_config(prediction_type="sample")
    training = training_of(made, "leco")
    batch, backbone = batch_of(training), training.backbone
    predicted = backbone.target(batch.clean, batch.noise, batch.times)
    clean, noise = split(backbone, batch.noised, batch.times, predicted)
    assert_close(clean, batch.clean, rtol=1e-3, atol=1e-3)
    assert_close(noise, batch.noise, rtol=1e-3, atol=1e-3)
    alpha, sigma = levels(backbone, batch.noised, batch.times)
    assert_close(alpha * batch.clean + sigma * batch.noise, batch.noised)
