"""Held-out phrasings: words that nothing was made with, and what a judge makes of their pictures."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

import fade
from fade.backbones import Backbone, backbone_for
from fade.cli import main
from fade.concept import PHRASINGS, TEMPLATES, bundled_concept, concept_from_words
from fade.config import Config
from fade.digitcanvas import DIGITS, STYLES, load_judges, load_pipeline
from fade.digitcanvas.bundled import MODEL as DIGITCANVAS
from fade.errors import FadeError
from fade.evaluation import evaluate, held_out
from fade.evaluation.metrics.phrasings import HELD_OUT, held_out_prompts
from fade.unlearning import ADAPTER_FILE

from .adapters import random_adapter

SOLVED = Config().replace(overwrite__method="closed-form")
QUICK = {"seeds": (5,), "steps": 2, "progress": False}


@pytest.mark.parametrize("axis", [DIGITS, STYLES])
def test_nothing_is_measured_with_what_was_read(axis: tuple[str, ...]) -> None:
    for word, surrogate in zip(axis, axis[1:] + axis[:1], strict=True):
        concept = bundled_concept(DIGITCANVAS, word, surrogate)
        asked = held_out_prompts(word, DIGITCANVAS)
        assert len({phrasing for phrasing, _ in asked}) >= 6
        assert all(word in prompt.split() or f"{word}," in prompt for _, prompt in asked)
        assert not {prompt for _, prompt in asked} & {
            *concept.forget_prompts,
            *sum(concept.phrased(*concept.pairs), ()),
        }
        read = {*concept.retain_prompts, *concept.phrased_neighbours()}
        assert not read & {prompt for other in axis for _, prompt in held_out_prompts(other, DIGITCANVAS)}


def test_general_phrasings_are_others_than_what_is_read() -> None:
    assert not set(HELD_OUT) & {*PHRASINGS, *TEMPLATES}
    concept = concept_from_words("cat", "dog")
    assert not {prompt for _, prompt in held_out_prompts("cat", None)} & {*sum(concept.phrased(*concept.pairs), ())}
    with pytest.raises(FadeError, match="not 'cat'"):
        held_out_prompts("cat", DIGITCANVAS)


def test_shares_with_the_adapter_and_without() -> None:
    pipeline = load_pipeline()
    adapter = fade.unlearn(pipeline, "three", "eight", config=SOLVED, progress=False)
    found = held_out(pipeline, adapter, **QUICK)
    asked = held_out_prompts("three", DIGITCANVAS)
    assert found.images == len(asked) and list(found.phrasings) == list(dict.fromkeys(p for p, _ in asked))
    adapter.disable()
    images = backbone_for(pipeline).generate([prompt for _, prompt in asked], [5] * len(asked), 2, 3.0)
    adapter.enable()
    shown = (load_judges().digit(images) == DIGITS.index("three")).double()
    assert found.base == pytest.approx(100 * float(shown.mean()))
    sizes = {name: sum(p == name for p, _ in asked) for name in found.phrasings}
    for kind in ("base", "adapted", "surrogate"):
        total = sum(shares[kind] * sizes[name] for name, shares in found.phrasings.items())
        assert total / found.images == pytest.approx(getattr(found, kind))
    low, high = found.interval_95
    assert 0 <= low <= found.adapted <= high <= 100
    assert found.adapted < found.base
    for kind, hits in found.hits.items():
        assert len(hits) == found.images and 100 * sum(hits) / len(hits) == pytest.approx(getattr(found, kind))
    assert found.hits["base"] == tuple(shown.bool().tolist())
    low, high = found.change_95
    assert low < found.adapted - found.base < high
    again = held_out(pipeline, adapter, baseline=found, **QUICK)
    assert again == found
    other = dataclasses.replace(found, phrasings={"{}": found.phrasings["{} digit"]})
    for arguments, message in (
        ({**QUICK, "seeds": ()}, "at least one seed"),
        ({**QUICK, "baseline": other}, "of other phrasings"),
        ({**QUICK, "baseline": found, "seeds": (5, 6)}, "of other phrasings or seeds"),
    ):
        with pytest.raises(FadeError, match=message):
            held_out(pipeline, adapter, **arguments)


def test_several_concepts_are_asked_for_one_by_one() -> None:
    pipeline = load_pipeline()
    adapter = fade.unlearn(pipeline, {"three": "eight", "neon": "plain"}, config=SOLVED, progress=False)
    found = held_out(pipeline, adapter, **QUICK)
    asked = {word: held_out_prompts(word, DIGITCANVAS) for word in ("three", "neon")}
    assert found.images == sum(map(len, asked.values()))
    assert list(found.phrasings) == list(dict.fromkeys(phrasing for one in asked.values() for phrasing, _ in one))
    adapter.disable()
    shown = []
    for word, head, words in (("three", "digit", DIGITS), ("neon", "style", STYLES)):
        prompts = [prompt for _, prompt in asked[word]]
        images = backbone_for(pipeline).generate(prompts, [5] * len(prompts), 2, 3.0)
        shown.append(getattr(load_judges(), head)(images) == words.index(word))
    assert found.base == pytest.approx(100 * float(torch.cat(shown).double().mean()), abs=2.0)


def test_phrasings_of_ones_own() -> None:
    pipeline = load_pipeline()
    adapter = fade.unlearn(pipeline, "three", "eight", config=SOLVED, progress=False)
    texts = ("ink {three=five}", "a {} in ink", "a {} in ink")
    found = held_out(pipeline, adapter, phrasings=texts, **QUICK)
    assert list(found.phrasings) == list(dict.fromkeys(texts)) and found.images == 2
    for kind, prompts in (("base", ["ink three", "a three in ink"]), ("surrogate", ["ink five", "a eight in ink"])):
        adapter.disable()
        shown = load_judges().digit(backbone_for(pipeline).generate(prompts, [5, 5], 2, 3.0)) == DIGITS.index("three")
        adapter.enable()
        assert [found.phrasings[text][kind] for text in found.phrasings] == (100.0 * shown.double()).tolist()
    assert evaluate(pipeline, adapter, phrasings=texts, **QUICK).phrasings == found


def test_without_a_surrogate_the_word_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load_pipeline()
    adapter = fade.unlearn(pipeline, "three", "eight", config=SOLVED, progress=False)
    del adapter.metadata["concept"]["surrogate"]
    asked: list[str] = []

    def drawn(backbone: Backbone, prompts: list[str], *args: object) -> torch.Tensor:
        asked.extend(prompts)
        return torch.rand(len(prompts), 3, 32, 32)

    monkeypatch.setattr(Backbone, "generate", drawn)
    found = held_out(pipeline, adapter, **QUICK)
    prompts = [prompt for _, prompt in held_out_prompts("three", DIGITCANVAS)]
    assert asked[len(prompts) : 2 * len(prompts)] == [prompt.replace("three", "") for prompt in prompts]
    assert found.images == len(prompts)


@pytest.mark.parametrize(
    ("forget", "text", "message"),
    [
        ({"three": "eight"}, "a digit", r"must say where the concept goes: with \{\}"),
        ({"three": "eight"}, "a {digit}", "must say where the concept goes"),
        ({"three": "eight"}, "{} {", "must say where the concept goes"),
        ({"three": "eight"}, "a { =acht}", "must say where the concept goes"),
        ({"three": "eight"}, "a {}\udcff", "is no valid text; check its encoding"),
        ({"three": "eight", "neon": "plain"}, "{drei=acht}", "names one concept, but the adapter forgets 2"),
    ],
)
def test_a_phrasing_without_the_concept_is_refused_before_anything_is_drawn(
    forget: dict[str, str], text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load_pipeline()
    adapter = fade.unlearn(pipeline, forget, config=SOLVED, progress=False)
    monkeypatch.setattr(Backbone, "generate", lambda *args, **kwargs: pytest.fail("drawn"))
    for measure in (evaluate, held_out):
        with pytest.raises(FadeError, match=message):
            measure(pipeline, adapter, phrasings=["{}", text], **QUICK)


def test_a_pipeline_without_a_judge(pipeline: StableDiffusionPipeline) -> None:
    adapter = random_adapter(pipeline)
    pipeline.unet.register_to_config(sample_size=16)  # no longer DigitCanvas
    with pytest.raises(FadeError, match="no judge of its own .*; name a CLIP model"):
        held_out(pipeline, adapter, **QUICK)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fade.unlearn(load_pipeline(), "neon", "plain", config=SOLVED, output=tmp_path / "out", progress=False)
    file = str(tmp_path / "out" / ADAPTER_FILE)
    options = ["--seeds", "1", "--steps", "1", "--phrasings", "--json", str(tmp_path / "m.json"), "--quiet"]
    assert main(["evaluate", "digitcanvas", "--adapter", file, *options]) == 0
    assert "held-out phrasings" in capsys.readouterr().out
    whole = json.loads((tmp_path / "m.json").read_text())
    record, change = whole["held_out_phrasings"], whole["change_95"]["phrasings"]
    assert set(record) == {"adapted", "base", "surrogate", "images", "interval_95", "change_95", "phrasings"}
    assert [change["low"], change["high"]] == record["change_95"] and change["images"] == record["images"]
    options += ["--phrasing", "ein Bild in {neon=plain}", "--phrasing", "{}"]
    assert main(["evaluate", "digitcanvas", "--adapter", file, *options]) == 0
    record = json.loads((tmp_path / "m.json").read_text())["held_out_phrasings"]
    assert list(record["phrasings"]) == ["ein Bild in {neon=plain}", "{}"]
