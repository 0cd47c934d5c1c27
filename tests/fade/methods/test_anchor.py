"""Concept Ablation's target moves with the model, so that its anchor must be held by what is retained."""

import pytest
from diffusers import StableDiffusionPipeline

import fade
from fade import unlearning
from fade.bundled import PACKAGES, model
from fade.concept import bundled_concept, concept_from_words, holding_surrogates, together
from fade.config import Config

SMALL = {
    "data__forget_samples": 2, "data__retain_samples": 2, "data__sampling_steps": 1, "overwrite__steps": 1,
    "overwrite__batch_size": 1, "overwrite__retain_batch_size": 1,
}  # fmt: skip


@pytest.mark.parametrize(("name", "held"), [("concept-ablation", True), ("salun", False)])
def test_the_anchors_prompts_are_retained_where_the_target_moves_along_them(
    pipeline: StableDiffusionPipeline, name: str, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, prepare = [], unlearning.prepare_latents

    def seen(*given: object, **named: object) -> object:
        trained.append(prepare(*given, **named))
        return trained[-1]

    monkeypatch.setattr(unlearning, "prepare_latents", seen)
    words = {"templates": ["a {}", "one {}"], "retain": ["a house", "a dog"]}
    adapter = fade.unlearn(pipeline, "cat", "dog", config=Config.of(name, **SMALL), progress=False, **words)
    wanted = ["a house", "a dog", "one dog"] if held else ["a house", "a dog"]
    assert list(adapter.metadata["concept"]["retain_prompts"]) == wanted
    (latents,) = trained
    assert sorted(set(latents.retain_prompts)) == sorted(wanted)


def test_what_is_held_already_and_what_names_the_concept_are_left_out() -> None:
    concept = concept_from_words("cat", "dog", ["a {}"], ["a dog"])
    assert holding_surrogates(concept) is concept
    assert holding_surrogates(concept_from_words("cat", "black cat", ["a {}"], ["a dog"])).retain_prompts == ("a dog",)
    plain = concept_from_words("cat", "dog", ["a {}", "{}"])
    assert holding_surrogates(plain).retain_prompts == (*plain.retain_prompts, "a dog", "dog")
    two = together([plain, concept_from_words("tree", "lamp", ["a {}"])])
    assert holding_surrogates(two) is two


def test_bundled_models_hold_every_surrogate_of_their_own() -> None:
    for name in PACKAGES:
        for domain in model(name).domains:
            for forget, surrogate in zip(domain.words, domain.words[1:], strict=False):
                concept = bundled_concept(model(name), forget, surrogate)
                assert holding_surrogates(concept) is concept
