"""Several concepts at once: the request, one adapter or one each, the evaluation of all, and the command line."""

import itertools
import random
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fade
from fade.adapter_file import LayerTensors, read_adapter_file, write_adapter_file
from fade.cli import main
from fade.concept import (
    PHRASINGS,
    Concept,
    beside,
    bundled_concept,
    concept_from_words,
    pairs_in,
    record_of,
    together,
)
from fade.config import Config
from fade.digitcanvas import DIGITS, STYLES, prompt
from fade.digitcanvas.bundled import MODEL as DIGITCANVAS
from fade.errors import FadeError
from fade.evaluation.answers import class_answers, crossed_answers
from fade.evaluation.metrics.unlearncanvas import (
    Target,
    intervals_of_several,
    metrics_of_several,
    unlearncanvas_metrics,
)
from fade.request import slugs
from fade_kernels import BitMask

TEMPLATES = ("{}", "a photo of {}")  # the tiny pipeline has DigitCanvas's words, whose own prompts these are not
QUICK = Config().replace(overwrite__method="closed-form", locate__keep=0.05)


# --- the request -----------------------------------------------------------------------------------------------------


def test_one_request_for_several_concepts_answers_all_of_them_in_every_prompt() -> None:
    pairs = {"three": "eight", "neon": "plain", "two": "five"}
    concept = together([bundled_concept(DIGITCANVAS, *pair) for pair in pairs.items()])
    assert {pair.forget: pair.surrogate for pair in concept.pairs} == pairs
    answers = dict(zip(concept.forget_prompts, concept.surrogate_prompts, strict=True))
    for digit, style in itertools.product(DIGITS, STYLES):
        own = prompt(digit, style)
        if digit in pairs or style in pairs:
            assert answers[own] == prompt(pairs.get(digit, digit), pairs.get(style, style))
            assert own not in concept.retain_prompts
        else:
            assert own in concept.retain_prompts
    record = concept.to_dict()
    assert record["forget"] == "three, neon, two" and record["surrogate"] == "eight, plain, five"
    # A file does not hold what only the solve reads.
    assert list(pairs_in(record)) == [replace(pair, phrasings=PHRASINGS, neighbours=()) for pair in concept.pairs]
    for pair in concept.pairs:
        for asked, answer in concept.phrased(pair):
            named = {word for word in pairs if word in asked.replace(",", "").split()}
            assert pair.forget in named
            assert not named & {*answer.replace(",", "").split()}
            assert {pairs[word] for word in named} <= {*answer.replace(",", "").split()}
    kept = concept.phrased_neighbours()
    assert len(set(kept)) == len(kept) > 100
    assert not any(word in prompt.replace(",", "").split() for prompt in kept for word in pairs)
    single = bundled_concept(DIGITCANVAS, "three", "eight")
    (own,) = pairs_in(single.to_dict())
    assert "pairs" not in single.to_dict() and own.forget_prompts == single.forget_prompts
    assert all("eight" in answer for _, answer in single.phrased(*single.pairs))
    assert together([single]) is single


def test_a_hundred_concepts_have_a_short_name_and_all_their_pairs(tmp_path: Path) -> None:
    many = [concept_from_words(f"concept number {index} of many", "dust", ["{}"], ["x"]) for index in range(100)]
    record = together(many).to_dict()
    assert record["forget"].startswith("concept number 0 of many, ") and record["forget"].endswith(" more")
    assert len(record["forget"]) < 500 and [pair.forget for pair in pairs_in(record)] == [one.forget for one in many]
    metadata = {"concept": record, "fingerprint": {"float32": "x"}, "scale": 1.0}
    write_adapter_file(tmp_path / "a", metadata, {"a": LayerTensors(BitMask.full((3, 4)), values=torch.randn(12))})
    assert len(pairs_in(read_adapter_file(tmp_path / "a").metadata["concept"])) == 100


def test_a_record_without_pairs_is_one_concept_and_a_wrong_one_is_refused() -> None:
    (pair,) = pairs_in({"forget": "a cat, a dog"})
    assert pair.forget == "a cat, a dog" and pair.surrogate == "" and pair.forget_prompts == ()
    record = record_of(together([concept_from_words("cat", "owl"), concept_from_words("dog", "owl")]).pairs, ["x"])
    for wrong in ([], [{"forget": "cat", "surrogate": "owl", "prompts": 99}], record["pairs"][:1]):
        with pytest.raises(ValueError, match="other prompts than they say"):
            pairs_in({**record, "pairs": wrong})


def test_concepts_that_do_not_go_together_are_refused() -> None:
    def named(**words: str) -> list[Concept]:
        return [concept_from_words(forget, surrogate) for forget, surrogate in words.items()]

    with pytest.raises(FadeError, match="the surrogate 'a black dog' of 'cat' is itself to be forgotten"):
        together(named(cat="a black dog", dog="horse"))
    with pytest.raises(FadeError, match="'Cat' is to be forgotten twice"):
        together(named(cat="owl", Cat="horse"))
    with pytest.raises(FadeError, match="itself to be forgotten"):
        beside(named(cat="dog")[0], named(dog="owl")[0].pairs)


def test_an_adapter_beside_others_leaves_theirs_to_them() -> None:
    cat = concept_from_words("cat", "dog", templates=["a {}", "a {} with a bird"], retain=["a horse"])
    bird = concept_from_words("bird", "bat", templates=["a {}", "a {} with a cat"], retain=["a horse"])
    kept = beside(cat, bird.pairs).retain_prompts
    assert kept == ("a horse", "a bird", "a bat")
    assert beside(cat, ()) is cat


def test_names_of_folders_are_safe_and_different() -> None:
    names = slugs(["Van Gogh", "van/../gogh", "Van  Gogh!", "梵高", "…"])
    assert names == ["Van_Gogh", "van_gogh", "Van_Gogh_2", "梵高", "concept"]


# --- unlearning ------------------------------------------------------------------------------------------------------


def test_one_adapter_for_several_concepts(pipeline: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"left out 1 of 3 retain prompts.*'a photo of a cow'"):
        adapter = fade.unlearn(
            pipeline, {"cat": "dog", "cow": "horse"}, templates=TEMPLATES, config=QUICK, output=tmp_path,
            retain=["a tree", "a house", "a photo of a cow"], progress=False,
        )  # fmt: skip
    file = read_adapter_file(tmp_path / "adapter.safetensors")
    for concept in (adapter.metadata["concept"], file.metadata["concept"]):
        assert [(p.forget, p.surrogate) for p in pairs_in(concept)] == [("cat", "dog"), ("cow", "horse")]
        assert "a photo of a cow" not in concept["retain_prompts"]
    total = adapter.run["total"]
    assert abs(file.selected - 2 * QUICK.locate.keep * total) <= 1  # keep is for each concept


def test_an_adapter_each_knows_the_others(pipeline: Any, tmp_path: Path) -> None:
    words = {"cat": "dog", "cow": "horse", "hen": "duck"}
    asked = {"templates": TEMPLATES, "config": QUICK, "output": tmp_path, "progress": False}
    made = fade.unlearn_each(pipeline, words, retain=["a tree"], **asked)
    assert list(made) == list(words) and set(fade.adapters(pipeline)) == {"fade_cat", "fade_cow", "fade_hen"}
    for word, adapter in made.items():
        assert adapter.enabled and adapter.metadata["concept"]["forget"] == word
        kept = adapter.metadata["concept"]["retain_prompts"]
        assert all((other in kept) == (other != word) for other in words) and words[word] not in kept
        settings = adapter.metadata["config"]
        assert settings["closed_form"]["retain_change"] < QUICK.closed_form.retain_change
        assert settings["locate"]["keep"] == QUICK.locate.keep and settings["concepts"] in ((), [])
    with pytest.raises(FadeError, match=r"cat is in use; pass --overwrite"):
        fade.unlearn_each(pipeline, words, name="again", **asked)
    for adapter in made.values():
        adapter.remove()
    for part in (tmp_path / "hen").iterdir():
        part.unlink()
    (tmp_path / "hen").rmdir()
    again = fade.unlearn_each(pipeline, words, retain=["a tree"], resume=True, **asked)
    assert list(again) == list(words) and (tmp_path / "hen" / "adapter.safetensors").is_file()
    for adapter in again.values():
        adapter.remove()
    with pytest.raises(FadeError, match="the finished run in .*cat has another concept"):
        fade.unlearn_each(pipeline, words, retain=["a hill"], resume=True, **asked)
    assert not fade.adapters(pipeline)


def test_one_more_adapter_beside_files(pipeline: Any, tmp_path: Path) -> None:
    asked = {"templates": TEMPLATES, "config": QUICK, "progress": False}
    fade.unlearn(pipeline, "cat", "dog", output=tmp_path / "cat", **asked).remove()
    on = fade.unlearn(pipeline, "cow", "horse", name="cow", **asked)
    hen = fade.unlearn(pipeline, "hen", "duck", beside=[tmp_path / "cat", on], name="hen", **asked)
    assert {"cat", "cow", "dog", "horse"} <= set(hen.metadata["concept"]["retain_prompts"])
    with pytest.raises(FadeError, match="the surrogate 'a cow' of 'pig' is itself to be forgotten"):
        fade.unlearn(pipeline, "pig", "a cow", beside=[on], name="pig", **asked)
    for adapter in (on, hen):
        adapter.remove()
    next(iter(pipeline.unet.parameters())).data.add_(1)
    with pytest.raises(FadeError, match="the new adapter cannot act beside it"):
        fade.unlearn(pipeline, "pig", "boar", beside=[tmp_path / "cat"], name="pig", **asked)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"forget": {"cat": "dog"}, "surrogate": "dog"}, "surrogate would be ignored beside several concepts"),
        ({"forget": {}}, "there is no concept to forget"),
        ({"forget": {"cat": 3}}, "surrogate must be a text"),
        ({"forget": {"cat": "dog", "dog": "cow"}, "templates": TEMPLATES}, "is itself to be forgotten"),
        ({"concept": []}, "there is no concept to forget"),
        ({"concept": ["cat"]}, "concept must be a fade.Concept, not a str; or a list of them"),
        ({"concept": [concept_from_words("cat", "dog")], "forget": {"a": "b"}}, "forget would be ignored"),
    ],
)
def test_arguments_that_do_not_go_together(pipeline: Any, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(FadeError, match=told):
        fade.unlearn(pipeline, **arguments, config=QUICK, progress=False)
    assert not fade.adapters(pipeline)


def test_concepts_in_the_settings(tmp_path: Path, pipeline: Any) -> None:
    toml = tmp_path / "c.toml"
    toml.write_text('concepts = [{forget = "cat", surrogate = "dog"}, {forget = "a=b", surrogate = "cow"}]\nseed = 3\n')
    config = Config.load(toml)
    assert [(c.forget, c.surrogate) for c in config.concepts] == [("cat", "dog"), ("a=b", "cow")]
    assert Config.from_dict(config.to_dict()) == config and tomllib.loads(toml.read_text())
    settings = QUICK.replace(concepts=config.concepts)
    adapter = fade.unlearn(pipeline, templates=TEMPLATES, config=settings, progress=False)
    assert [pair.forget for pair in pairs_in(adapter.metadata["concept"])] == ["cat", "a=b"]
    for wrong in ("three", [{"forget": "cat"}], [{"forget": "cat", "surrogate": 1}], [{"forget": "a", "x": "b"}]):
        with pytest.raises(FadeError, match="concepts"):
            Config.from_dict({"concepts": wrong})


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--forget", "a=b", "--surrogate", "c"], "names what takes its place, and so does --surrogate"),
        (["--forget", "a", "--forget", "b", "--surrogate", "c"], "--surrogate goes with a single --forget"),
        (["--surrogate", "c"], "--surrogate goes with a single --forget"),
        (["--forget", "a"], "does not say what takes its place"),
        (["--forget", "a=b", "--forget", "=c"], "does not say what takes its place"),
        (["--forget", "a=b", "--forget", "a=c"], "names 'a' twice"),
        ([], "name the concept to forget"),
    ],
)
def test_the_forms_of_forget_do_not_mix(words: list[str], told: str, tmp_path: Path, capfd: Any) -> None:
    assert main(["unlearn", "nowhere", *words, "--output", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_unlearn_separately_combine_and_take_out_from_a_shell(pipeline: Any, tmp_path: Path, capfd: Any) -> None:
    model, out = str(tmp_path / "model"), tmp_path / "out"
    pipeline.save_pretrained(model)

    def run(*words: Any) -> str:
        status = main([str(word) for word in words])
        captured = capfd.readouterr()
        assert status == 0, captured.err
        return captured.out

    run(
        "unlearn", model, "--forget", "cat=dog", "--forget", "cow = horse", "--separate", "--method", "closed-form",
        "--keep", "0.05", "--template", "a photo of {}", "--output", out, "--quiet",
    )  # fmt: skip
    files = [out / word / "adapter.safetensors" for word in ("cat", "cow")]
    assert "forgets: cat, cow" in run("combine", *files, "--output", tmp_path / "all", "--weights", "1,0.5")
    assert "cat, as dog; cow, as horse" in run("inspect", tmp_path / "all")
    assert "forgets: cow" in run("combine", tmp_path / "all", "--without", "cat", "--output", tmp_path / "rest")
    for words in (
        ["combine", files[0]],
        ["combine", *files, "--weights", "1,x"],
        ["combine", *files, "--weights", "1"],
    ):
        assert main([*map(str, words), "--output", str(tmp_path / "no")]) == 2
        assert capfd.readouterr().err.count("\n") == 1


# --- the evaluation --------------------------------------------------------------------------------------------------


def answered(targets: tuple[Target, ...], seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What 10 x 8 prompts ask for, twice, and what a judge makes of pictures where about half went wrong."""
    generator = torch.Generator().manual_seed(seed)
    cells = [(d, s) for _ in range(2) for d in range(10) for s in range(8)]
    prompted = {"digit": torch.tensor([d for d, _ in cells]), "style": torch.tensor([s for _, s in cells])}
    judged = {}
    for domain, size in (("digit", 10), ("style", 8)):
        guess = torch.randint(size, (len(cells),), generator=generator)
        judged[domain] = torch.where(torch.rand(len(cells), generator=generator) < 0.5, guess, prompted[domain])
    return prompted, judged


@pytest.mark.parametrize("both_domains", [False, True])
def test_metrics_of_several_are_those_a_reader_would_count(both_domains: bool) -> None:
    chosen = random.Random(torch.seed())
    digits, styles = chosen.sample(range(10), 4), chosen.sample(range(8), 4)
    targets = (Target("digit", digits[0], digits[2]), Target("digit", digits[1], digits[3]))
    if both_domains:
        targets = (*targets, Target("style", styles[0], styles[1]))
    prompted, judged = answered(targets, chosen.randrange(1000))
    truth = list(zip(prompted["digit"].tolist(), prompted["style"].tolist(), strict=True))
    said = list(zip(judged["digit"].tolist(), judged["style"].tolist(), strict=True))
    gone = {("digit", t.forget) for t in targets if t.domain == "digit"}
    gone |= {("style", t.forget) for t in targets if t.domain == "style"}

    def share(hits: list[bool]) -> float:
        return 100 * sum(hits) / len(hits)

    def mean(numbers: list[float]) -> float:
        return sum(numbers) / len(numbers)

    unlearned, redirected = [], []
    for t in targets:
        axis = 0 if t.domain == "digit" else 1
        own = [said[i][axis] for i in range(len(truth)) if truth[i][axis] == t.forget]
        unlearned.append(share([answer != t.forget for answer in own]))
        redirected.append(share([answer == t.surrogate for answer in own]))

    def receivers(domain: str, retained_alone: bool) -> list[float]:
        axis, size = (0, 10) if domain == "digit" else (1, 8)
        found = []
        for x in range(size):
            if (domain, x) in gone:
                continue
            images = [i for i in range(len(truth)) if truth[i][axis] == x]
            if retained_alone:
                images = [i for i in images if not {("digit", truth[i][0]), ("style", truth[i][1])} & gone]
            found.append(share([said[i][axis] == x for i in images]))
        return found

    metrics = metrics_of_several(prompted, judged, {"digit": 10, "style": 8}, targets)
    domains = ["digit", "style"] if both_domains else ["digit"]
    across = ["digit", "style"] if both_domains else ["style"]
    assert metrics["UA"] == pytest.approx(mean(unlearned))
    assert metrics["redirected"] == pytest.approx(mean(redirected))
    assert metrics["IRA"] == pytest.approx(mean([r for d in domains for r in receivers(d, True)]))
    assert metrics["CRA"] == pytest.approx(mean([r for d in across for r in receivers(d, False)]))
    assert metrics["CRA_retained"] == pytest.approx(mean([r for d in across for r in receivers(d, True)]))
    intervals = intervals_of_several(prompted, judged, targets)
    assert intervals["UA"]["images"] == sum(2 * (8 if t.domain == "digit" else 10) for t in targets)
    for name in ("UA", "CRA"):
        assert intervals[name]["low"] < 100 > 0 and intervals[name]["low"] <= intervals[name]["high"]


def test_one_of_several_is_the_single_metric() -> None:
    prompted, judged = answered((Target("digit", 3, 8),), seed=int(torch.seed() % 1000))
    sizes = {"digit": 10, "style": 8}
    single = unlearncanvas_metrics(prompted, judged, sizes, "digit", 3, 8)
    assert single == metrics_of_several(prompted, judged, sizes, [Target("digit", 3, 8)])


def test_answer_sets_of_several_concepts() -> None:
    answers = crossed_answers(DIGITCANVAS, ["three", "neon"], ["eight", None], (1, 2))
    assert answers.domains == ("digit", "style") and answers.forget == DIGITS.index("three")
    named = [i for i, text in enumerate(answers.prompts) if "three" in text or "neon" in text]
    assert answers.forgotten.nonzero().flatten().tolist() == named
    assert DIGITS.index("three") not in answers.retained("digit") and len(answers.retained("style")) == 7
    concept = together([concept_from_words("cat", "dog"), concept_from_words("cow", "horse")]).to_dict()
    answers = class_answers(concept, ["owl", "dog"], (1,))
    assert answers.classes["class"] == ("cat", "cow", "dog", "horse", "owl")
    assert [(t.forget, t.surrogate) for t in answers.targets] == [(0, 2), (1, 3)]
    assert len(answers.prompts) == 5 * 4 and "a photo of owl" in answers.prompts


def test_four_concepts_added_up_are_gone_and_each_comes_back(tmp_path: Path) -> None:
    """Drawn and judged: all four off the model, then one of them taken out again."""
    from fade.digitcanvas import load_pipeline
    from fade.evaluation import evaluate
    from fade.report import render_report

    digitcanvas = load_pipeline()
    words = {"three": "eight", "one": "seven", "neon": "plain", "stripes": "mosaic"}
    config = Config().replace(overwrite__method="closed-form")
    made = fade.unlearn_each(digitcanvas, words, config=config, output=tmp_path / "each", progress=False)
    for adapter in made.values():
        adapter.remove()
    fade.combine_adapters([tmp_path / "each" / word for word in words], tmp_path / "all.safetensors")
    back = random.Random(torch.seed()).choice(list(words))
    fade.combine_adapters([tmp_path / "all.safetensors"], tmp_path / "rest.safetensors", without=[back])

    def measured(file: Path, baseline: torch.Tensor | None = None) -> Any:
        adapter = fade.load_adapter(digitcanvas, file)
        found = evaluate(digitcanvas, adapter, seeds=(188,), steps=6, baseline=baseline, progress=False)
        adapter.remove()
        return found, adapter

    everything, adapter = measured(tmp_path / "all.safetensors")
    assert everything.metrics["UA"] >= 99 and everything.metrics["IRA"] >= 97
    assert {concept["forget"]: concept["surrogate"] for concept in everything.concepts} == words
    html = render_report(everything, adapter.metadata, 1)
    assert "Of 4 concepts, 4 are forgotten" in html and "UA" in html
    assert "forgetting 'three', 'one', 'neon', 'stripes'" in everything.table().title
    rest, _ = measured(tmp_path / "rest.safetensors", everything.baseline)
    domain = "digit" if back in DIGITS else "style"
    assert rest.receivers[domain][back]["after"] >= 97 and rest.metrics["UA"] >= 99
