"""What describes a bundled model, and that EmojiCanvas is asked, judged, attacked and shown through it."""

import ast
import functools
import json
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fade
from fade import bundled, cli, emojicanvas
from fade.bundled import BundledModel, Drawing
from fade.concept import TEMPLATES, bundled_concept, mentions, substitute, together
from fade.config import Config
from fade.demo import run_demo
from fade.digitcanvas.bundled import MODEL as DIGITCANVAS
from fade.emojicanvas import OBJECTS, STYLES
from fade.emojicanvas.bundled import MODEL as EMOJICANVAS
from fade.errors import FadeError
from fade.evaluation import Evaluation, evaluate, held_out
from fade.evaluation.answers import crossed_answers
from fade.evaluation.metrics.phrasings import held_out_prompts
from fade.evaluation.run import _summarise
from fade.loading import load_model
from fade.report import before_after_picture, outcome, render_report

MODELS = [DIGITCANVAS, EMOJICANVAS]
QUICK = {"seeds": (5,), "steps": 1, "guidance_scale": 1.0, "progress": False}


# Descriptors ---------------------------------------------------------------------------------------------------------


def test_describing_a_model_imports_no_torch() -> None:
    code = (
        "import sys; from fade import bundled; [bundled.model(name) for name in bundled.PACKAGES]; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_module_but_the_descriptors_knows_a_bundled_model() -> None:
    package = Path(fade.__file__).parent
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] in ("digitcanvas", "emojicanvas"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not any(model in name for name in named for model in bundled.PACKAGES), path


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_descriptor_fits_together(model: BundledModel) -> None:
    first, second = model.domains
    assert len(model.all_prompts) == len(first.words) * len(second.words)
    for domain in model.domains:
        word = random.choice(domain.words)
        assert model.domain(word) is domain and model.other(word) is (second if domain is first else first)
        assert model.alone(f" {word} ") == domain.caption.format(word) and model.alone(f"not {word}") == f"not {word}"
        own = model.prompts(word)
        assert [word in model.all_prompts[prompt] for prompt in own] == [True] * len(model.other(word).words)
        assert {other for group in domain.look_alikes for other in group} <= set(domain.words)
        for other in domain.neighbours(word):
            assert other != word and word in domain.neighbours(other)
        assert all(template.count("{}") == 1 for template in (*domain.phrasings, *domain.held_out))
        read = {template.replace("{}", word) for _, template in model.crossed(domain.phrasings, word)}
        asked = {prompt for _, prompt in held_out_prompts(word, model)}
        assert len(asked) >= 6 and not asked & {*read, *own, *(t.replace("{}", word) for t in TEMPLATES)}
        assert not asked & set(bundled_concept(model, *_two(domain.words, word)).retain_prompts)
    assert model.domain(model.demo[0]) is model.domain(model.demo[1])


def _two(words: tuple[str, ...], word: str) -> tuple[str, str]:
    return word, random.choice([other for other in words if other != word])


def test_prompts_are_the_packages_own() -> None:
    word, style = random.choice(OBJECTS), random.choice(STYLES)
    assert EMOJICANVAS.prompt(word, style) == emojicanvas.prompt(word, style)
    assert EMOJICANVAS.alone(word) == emojicanvas.object_prompt(word)
    assert EMOJICANVAS.alone(style) == emojicanvas.style_prompt(style)
    assert all(EMOJICANVAS.domain(w).neighbours(w) == emojicanvas.neighbours(w) for w in (word, style))


def test_an_evaluation_draws_what_a_request_is_about_and_some_others() -> None:
    objects, styles = EMOJICANVAS.concerned(["tiger"])
    assert len(objects) == 20 and styles == STYLES
    assert {"tiger", *emojicanvas.neighbours("tiger")} < set(objects)
    assert EMOJICANVAS.concerned(["tiger"]) == (objects, styles)
    assert len(set(objects) & set(EMOJICANVAS.concerned(["ink"])[0])) >= 12
    many = random.sample(OBJECTS, 40)
    assert set(many) < set(EMOJICANVAS.concerned(many)[0])
    assert EMOJICANVAS.concerned(["tiger"], everything=True) == (OBJECTS, STYLES)
    for word in (*DIGITCANVAS.domains[0].words, *DIGITCANVAS.domains[1].words):
        assert DIGITCANVAS.concerned([word]) == tuple(domain.words for domain in DIGITCANVAS.domains)


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda: bundled_concept(EMOJICANVAS, "Tigre", "dog"), FadeError),
        (lambda: bundled_concept(EMOJICANVAS, "dog", "tigre"), FadeError),
        (lambda: crossed_answers(EMOJICANVAS, "tigre", "dog", (1,)), FadeError),
        (lambda: held_out_prompts("tigre", EMOJICANVAS), FadeError),
        (lambda: emojicanvas.prompt("tigre", "noto"), ValueError),
        (lambda: emojicanvas.neighbours("tigre"), ValueError),
    ],
)
def test_a_wrong_word_is_answered_with_the_nearest(ask: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"tiger, .*… \(10\d in all\)") as told:
        ask()
    assert len(str(told.value)) < 300


def test_a_surrogate_is_of_the_same_domain() -> None:
    with pytest.raises(FadeError, match="the surrogate of 'ink' must be one of noto, blob, .*, not 'tiger'"):
        bundled_concept(EMOJICANVAS, "ink", "tiger")


def test_a_model_that_is_none_names_those_that_are() -> None:
    with pytest.raises(FadeError, match="no bundled model 'emojicanva'; there are digitcanvas and emojicanvas"):
        bundled.model("emojicanva")
    with pytest.raises(FadeError, match="not one of the bundled digitcanvas and emojicanvas"):
        load_model("emojicanva")


# Words within words --------------------------------------------------------------------------------------------------


def test_a_word_in_a_longer_name_is_no_mention_of_it() -> None:
    apart = ("hot dog", "dog house")
    assert not mentions("a hot dog in ink style", "dog", apart=apart)
    assert mentions("a dog beside a hot dog", "dog", apart=apart) and mentions("a hot dog", "dog")
    assert (
        substitute("a hot-dog, a dog and a dog house", "dog", "cat", apart=apart) == "a hot-dog, a cat and a dog house"
    )
    concept = bundled_concept(EMOJICANVAS, "dog", "tiger")
    assert concept.apart == ("hot dog",)
    assert not any(map(concept.named_in, concept.retain_prompts))
    assert "a hot dog" in concept.phrased_neighbours()


def test_names_within_names_are_forgotten_beside_each_other() -> None:
    pairs = {"dog": "tiger", "hot dog": "pizza", "pear": "tropical fish", "fish": "shark"}
    concept = together([bundled_concept(EMOJICANVAS, *pair) for pair in pairs.items()])
    for pair in concept.pairs:
        expected = tuple(prompt.replace(pair.forget, pairs[pair.forget], 1) for prompt in pair.forget_prompts)
        assert pair.surrogate_prompts == expected
    assert EMOJICANVAS.prompt("tropical fish", "ink") in concept.retain_prompts
    assert not any(
        word in f" {prompt} " for prompt in concept.retain_prompts for word in (" dog ", "hot dog", " pear ")
    )


def test_look_alikes_are_a_tenth_of_what_is_retained() -> None:
    for word in ("fish", "guitar", "tiger", random.choice(STYLES)):
        kept = bundled_concept(EMOJICANVAS, *_two(EMOJICANVAS.domain(word).words, word)).retain_prompts
        near = EMOJICANVAS.domain(word).neighbours(word)
        of_near = [prompt for prompt in kept if set(EMOJICANVAS.all_prompts[prompt]) & set(near)]
        assert not near or 0.07 <= len(of_near) / len(kept) <= 0.25
        assert {prompt for prompt, words in EMOJICANVAS.all_prompts.items() if word not in words} == set(kept)
    for domain in DIGITCANVAS.domains:  # whose few words make up as much anyway
        kept = bundled_concept(DIGITCANVAS, *_two(domain.words, random.choice(domain.words))).retain_prompts
        assert len(set(kept)) == len(kept)


# Metrics -------------------------------------------------------------------------------------------------------------


def synthetic(forget: str | list[str], surrogate: str | list[str | None], seed: int) -> tuple[Evaluation, Any]:
    """An evaluation of random judgements of EmojiCanvas, and what was judged."""
    generator = torch.Generator().manual_seed(seed)
    answers = crossed_answers(EMOJICANVAS, forget, surrogate, (1, 2))
    judged = []
    for wrong in (0.1, 0.5):
        judged.append({})
        for domain, words in answers.classes.items():
            asked = answers.prompted[domain]
            guess = torch.randint(len(words), asked.shape, generator=generator)
            judged[-1][domain] = torch.where(torch.rand(len(asked), generator=generator) < wrong, guess, asked)
    baseline, images = torch.rand(2, len(answers.prompts), 3, 64, 64, generator=generator)
    settings = {"judge": "synthetic", "seeds": [1, 2], "steps": 12, "guidance_scale": 1.5}
    return _summarise(answers, *judged, baseline, images, settings), judged[1]


@pytest.mark.parametrize(
    ("forget", "surrogate"),
    [("tiger", "dog"), ("glossy", "ink"), ("cactus", "rose"), (["tiger", "apple", "noto"], ["cat", None, "ink"])],
)
def test_look_alikes_are_counted_apart(forget: str | list[str], surrogate: str | list[str | None]) -> None:
    evaluation, judged = synthetic(forget, surrogate, random.randrange(2**32))
    gone = [forget] if isinstance(forget, str) else forget
    shares, total = [], 0
    for kind, words in (("object", OBJECTS), ("style", STYLES)):
        near = {n for word in gone if word in words for n in emojicanvas.neighbours(word)} - set(gone)
        for word in near:
            asked = [
                i for i, pair in enumerate(map(EMOJICANVAS.all_prompts.get, evaluation.answers.prompts))
                if word in pair and not set(gone) & set(pair)
            ]  # fmt: skip
            total += len(asked)
            shares.append(100 * sum(words[judged[kind][i]] == word for i in asked) / len(asked))
    if not shares:
        assert evaluation.metrics["NA"] is None and evaluation.neighbours == {}
        assert "NA" not in evaluation.intervals
        return
    assert evaluation.metrics["NA"] == pytest.approx(sum(shares) / len(shares))
    assert set(evaluation.neighbours) == {n for word in gone for n in emojicanvas.neighbours(word)} - set(gone)
    assert json.loads(evaluation.to_json())["neighbours"] == evaluation.neighbours
    span = evaluation.intervals["NA"]
    assert 0 <= span["low"] <= span["high"] <= 100
    assert span["images"] == total


def test_a_report_shows_the_words_that_were_drawn() -> None:
    evaluation, _ = synthetic("tiger", "dog", random.randrange(2**32))
    drawn, _ = EMOJICANVAS.concerned(["tiger"])
    assert list(evaluation.receivers["object"]) == list(drawn)
    for judged in evaluation.matrix.values():
        assert len(judged["after"]) == 20 and {len(row) for row in judged["after"]} == {6}
    assert "NaN" not in evaluation.to_json()
    metadata = {"concept": bundled_concept(EMOJICANVAS, "tiger", "dog").to_dict(), "base": "emojicanvas"}
    html = render_report(evaluation, metadata, 1000)
    assert "nearest look-alikes kept (NA)" in html and "(cat, dog, lion, fox, wolf, leopard)" in html
    assert "violin" not in html.split("Every setting")[0]
    assert f"{evaluation.metrics['IRA']:.1f} % of the other objects" in outcome(evaluation)
    assert before_after_picture(evaluation).width > 300


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_pipeline_is_known_and_drawn_as_its_accuracy_was_measured(model: BundledModel) -> None:
    pipeline = load_model(model.name, "cpu")
    assert bundled.recognised(pipeline) is model and fade.base_model.base_name(pipeline) == model.name
    assert bundled.drawing(pipeline) == Drawing(model.steps, model.guidance_scale)
    assert bundled.drawing(pipeline, 3, 7.5) == Drawing(3, 7.5)
    part, name, value = model.marks[0]
    getattr(pipeline, part).register_to_config(**{name: 2 * value})
    assert bundled.recognised(pipeline) is None
    assert bundled.drawing(pipeline) == Drawing(20, 3.0)


FEW = (("tiger", "cat", "leopard", "pizza"), ("noto", "flat", "ink"))
"""What is drawn of EmojiCanvas in the whole runs here."""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The demo's folder, and what its metrics file holds: solved, without phrasings, drawn in one step."""
    output = tmp_path_factory.mktemp("demo") / "report"
    config = Config().replace(overwrite__method="closed-form", closed_form__phrasings=False)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(fade.demo, "evaluate", functools.partial(evaluate, **{**QUICK, "steps": 2}))
        patch.setattr(BundledModel, "concerned", lambda *asked, **more: FEW)
        warnings.simplefilter("error", UserWarning)
        _, record = run_demo(output, config=config, model="emojicanvas", progress=False)
    return output, record


def test_the_demo_shows_emojicanvas(shown: tuple[Path, dict[str, Any]]) -> None:
    output, record = shown
    assert (record["forget"], record["surrogate"], record["path"]) == ("tiger", "dog", "text path")
    assert json.loads((output / "metrics.json").read_text())["NA"] == record["NA"] is not None
    assert record["settings"]["images"] == 12 and record["settings"]["judge"] == "EmojiCanvas classifiers"
    assert record["UA"] > record["base"]["UA"]
    assert "tiger" in (output / "report.html").read_text(encoding="utf-8")


def test_the_demo_takes_both_words_or_none(tmp_path: Path) -> None:
    with pytest.raises(FadeError, match="both|neither"):
        run_demo(tmp_path / "out", "tiger", model="emojicanvas", progress=False)
    assert not (tmp_path / "out").exists()


def test_it_is_judged_and_attacked_from_the_command_line(
    shown: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(BundledModel, "concerned", lambda *asked, **more: FEW)
    file, numbers = str(shown[0] / "adapter.safetensors"), tmp_path / "numbers.json"
    asked = ["--adapter", file, "--steps", "1", "--guidance", "1", "--quiet"]
    report = ["--json", str(numbers), "--report", str(tmp_path / "report.html")]
    assert cli.main(["evaluate", "emojicanvas", *asked, "--seeds", "1", "--phrasings", *report]) == 0
    printed = capsys.readouterr().out
    assert "NA" in printed and "leopard" in printed and "held-out phrasings" in printed
    record = json.loads(numbers.read_text())
    assert record["NA"] is not None and record["base"]["NA"] is not None
    assert record["held_out_phrasings"]["images"] == len(held_out_prompts("tiger", EMOJICANVAS))
    attacked = tmp_path / "attacks.json"
    words = ["--attack", "completion", "--pictures", "2", "--json", str(attacked)]
    assert cli.main(["attack", "emojicanvas", *asked, *words]) == 0
    assert json.loads(attacked.read_text())["settings"]["judge"] == "EmojiCanvas classifiers"
    drawn = tmp_path / "tiger.png"
    picture = ["--adapter", file, "--prompt", "a tiger in ink style", "--output", str(drawn), "--quiet"]
    assert cli.main(["generate", "emojicanvas", *picture]) == 0
    assert drawn.stat().st_size > 100


@pytest.mark.parametrize(("words", "told"), [("tiger=dog", False), ("noto=twemoji", True)])
def test_an_edit_that_leaves_much_undone_is_told(
    words: str, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A style is in every token of a prompt, and no linear map takes it out of all."""
    settings = tmp_path / "settings.toml"
    settings.write_text("[closed_form]\nphrasings = false\n")
    asked = ["unlearn", "emojicanvas", "--forget", words, "--method", "closed-form", "--config", str(settings)]
    assert cli.main([*asked, "--output", str(tmp_path / "out"), "--quiet"]) == 0
    left = json.loads((tmp_path / "out" / "run.json").read_text())["run"]["residual"]["forget"]
    assert (left > Config().closed_form.left) is told
    printed = " ".join(capsys.readouterr().out.split())
    assert (f"leaves {100 * left:.0f} % of the wanted change undone" in printed) is told


def test_a_baseline_of_other_prompts_is_refused(shown: tuple[Path, dict[str, Any]]) -> None:
    pipeline = emojicanvas.load_pipeline()
    adapter = fade.load_adapter(pipeline, shown[0] / "adapter.safetensors")
    tiger, _ = synthetic("tiger", "dog", 0)
    with pytest.raises(FadeError, match="the baseline is of other prompts, seeds, steps or guidance"):
        evaluate(pipeline, adapter, baseline=tiger, **QUICK)
    with pytest.raises(FadeError, match="of other phrasings"):
        held_out(pipeline, adapter, baseline=_phrasings_of("ink"), **QUICK)


def _phrasings_of(word: str) -> Any:
    from fade.evaluation import PhrasingResult

    shares = {"base": 0.0, "adapted": 0.0, "surrogate": 0.0}
    return PhrasingResult(
        **shares, images=1, interval_95=(0.0, 100.0),
        phrasings={phrasing: shares for phrasing, _ in held_out_prompts(word, EMOJICANVAS)},
        hits={kind: (False,) for kind in shares},
    )  # fmt: skip
