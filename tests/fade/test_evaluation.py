"""The metrics against counting by hand, their orchestration on a tiny pipeline,
and the zero-shot judge on a tiny CLIP."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from fade.digitcanvas import DIGITS, STYLES, load_pipeline
from fade.digitcanvas.bundled import MODEL as DIGITCANVAS
from fade.errors import FadeError
from fade.evaluation import SEEDS, Evaluation, evaluate, held_out, rms_difference
from fade.evaluation.answers import class_answers, crossed_answers
from fade.evaluation.clip_judge import Clip, ClipJudge
from fade.evaluation.features import ModelFeatures, levels
from fade.evaluation.judging import judge_for
from fade.evaluation.metrics.phrasings import HELD_OUT
from fade.evaluation.metrics.unlearncanvas import (
    cell_accuracy,
    neighbour_accuracy,
    receiver_accuracy,
    unlearncanvas_intervals,
    unlearncanvas_metrics,
    wilson_interval,
)
from fade.evaluation.run import _summarise

from .adapters import random_adapter


def synthetic(
    forget: str, surrogate: str, seed: int, wrong: float = 0.1
) -> tuple[Evaluation, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An evaluation of random judgements and random images, and the judgements before and after."""
    generator = torch.Generator().manual_seed(seed)
    answers = crossed_answers(DIGITCANVAS, forget, surrogate, SEEDS)
    n = len(answers.prompts)

    def judge(share: float) -> dict[str, torch.Tensor]:
        judged = {}
        for domain, words in answers.classes.items():
            guess = torch.randint(len(words), (n,), generator=generator)
            judged[domain] = torch.where(torch.rand(n, generator=generator) < share, guess, answers.prompted[domain])
        return judged

    before, after = judge(0.05), judge(wrong)
    baseline, images = torch.rand(2, n, 3, 32, 32, generator=generator)
    settings = {"judge": "synthetic", "images": n, "seeds": list(SEEDS), "steps": 20, "guidance_scale": 3.0}
    return _summarise(answers, before, after, baseline, images, settings), before, after


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("forget", "surrogate"), [("three", "eight"), ("neon", "plain")])
def test_metrics_are_what_counting_one_image_at_a_time_gives(forget: str, surrogate: str, seed: int) -> None:
    evaluation, _, judged = synthetic(forget, surrogate, seed, wrong=0.4)
    answers = evaluation.answers
    domain, other = ("digit", "style") if forget in DIGITS else ("style", "digit")
    words, across = answers.classes[domain], answers.classes[other]
    truth = [prompt.split() for prompt in answers.prompts]  # "the digit three in neon style"
    said = {d: [answers.classes[d][i] for i in judged[d].tolist()] for d in answers.classes}
    place = {"digit": 2, "style": 4}

    def accuracy(kind: str, word: str, keep: callable = lambda i: True) -> float:
        asked = [i for i in range(len(truth)) if truth[i][place[kind]] == word and keep(i)]
        return 100 * sum(said[kind][i] == word for i in asked) / len(asked)

    def retained(i: int) -> bool:
        return truth[i][place[domain]] != forget

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    metrics = evaluation.metrics
    assert metrics["UA"] == pytest.approx(100 - accuracy(domain, forget))
    assert metrics["IRA"] == pytest.approx(mean([accuracy(domain, w) for w in words if w != forget]))
    assert metrics["CRA"] == pytest.approx(mean([accuracy(other, w) for w in across]))
    assert metrics["CRA_retained"] == pytest.approx(mean([accuracy(other, w, retained) for w in across]))
    forgotten = [i for i in range(len(truth)) if not retained(i)]
    redirected = 100 * sum(said[domain][i] == surrogate for i in forgotten) / len(forgotten)
    assert metrics["redirected"] == pytest.approx(redirected)
    assert evaluation.receivers[domain][forget]["after"] == pytest.approx(100 - metrics["UA"])
    assert sum(evaluation.forgotten_as.values()) == pytest.approx(100)

    changes = (evaluation.images.double() - evaluation.baseline.double()).square()
    kept = torch.tensor([retained(i) for i in range(len(truth))])
    assert metrics["drift"] == pytest.approx(math.sqrt(changes[kept].mean()))
    assert metrics["drift_forget"] == pytest.approx(math.sqrt(changes[~kept].mean()))

    cell = [i for i in range(len(truth)) if truth[i][2] == "six" and truth[i][4] == "ink"]
    share = 100 * sum(said["digit"][i] == "six" for i in cell) / len(cell)
    assert evaluation.matrix["digit"]["after"][DIGITS.index("six")][STYLES.index("ink")] == pytest.approx(share)


def test_a_perfect_and_a_useless_run() -> None:
    prompted = {"digit": torch.tensor([0, 0, 1, 1, 2]), "style": torch.tensor([0, 1, 0, 1, 1])}
    sizes = {"digit": 3, "style": 2}
    gone = {"digit": torch.tensor([1, 1, 1, 1, 2]), "style": prompted["style"]}
    perfect = unlearncanvas_metrics(prompted, gone, sizes, "digit", 0, surrogate=1)
    assert perfect == {"UA": 100.0, "IRA": 100.0, "CRA": 100.0, "CRA_retained": 100.0, "redirected": 100.0}
    unchanged = unlearncanvas_metrics(prompted, prompted, sizes, "digit", 0)
    assert unchanged == {"UA": 0.0, "IRA": 100.0, "CRA": 100.0, "CRA_retained": 100.0, "redirected": None}


def test_only_cra_counts_the_forgotten_concepts_images_in_the_other_domain() -> None:
    prompted = {"digit": torch.tensor([0, 0, 1, 1]), "style": torch.tensor([0, 1, 0, 1])}
    judged = {"digit": prompted["digit"], "style": torch.tensor([1, 1, 0, 1])}  # image 0 lost its style
    metrics = unlearncanvas_metrics(prompted, judged, {"digit": 2, "style": 2}, "digit", 0)
    assert metrics["CRA"] == pytest.approx(75.0)
    assert metrics["CRA_retained"] == pytest.approx(100.0)
    assert metrics["IRA"] == pytest.approx(100.0)


def test_receivers_weigh_the_same_whatever_their_number_of_images() -> None:
    prompted = {"class": torch.tensor([0, 1, 1, 1, 2])}
    judged = {"class": torch.tensor([0, 1, 1, 1, 0])}
    metrics = unlearncanvas_metrics(prompted, judged, {"class": 3}, "class", 0)
    assert metrics["IRA"] == pytest.approx(50.0)
    assert metrics["CRA"] is None


@pytest.mark.parametrize(
    ("prompted", "judged", "forget"),
    [([0, 1], [0], 0), ([0, 3], [0, 0], 0), ([0, 1], [0, -1], 0), ([1, 1], [1, 1], 0)],
)
def test_labels_that_do_not_fit_are_refused(prompted: list[int], judged: list[int], forget: int) -> None:
    with pytest.raises(ValueError, match=r"labels must be|no image was prompted"):
        unlearncanvas_metrics(
            {"class": torch.tensor(prompted)}, {"class": torch.tensor(judged)}, {"class": 3}, "class", forget
        )


def test_a_third_domain_is_refused() -> None:
    labels = {name: torch.tensor([0]) for name in "abc"}
    with pytest.raises(ValueError, match="at most one other"):
        unlearncanvas_metrics(labels, labels, dict.fromkeys("abc", 1), "a", 0)


def test_accuracy_of_a_class_without_images_is_nan_and_left_out() -> None:
    accuracy = receiver_accuracy(torch.tensor([0, 2, 2]), torch.tensor([0, 2, 1]), 3)
    assert accuracy.tolist()[0::2] == [1.0, 0.5]
    assert math.isnan(accuracy[1])
    cells = cell_accuracy(torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([True, False]), (2, 2))
    assert cells[:, 1].tolist() == [1.0, 0.0]
    assert cells[:, 0].isnan().all()


@pytest.mark.parametrize(("right", "total"), [(0, 24), (24, 24), (12, 24), (1, 216), (215, 216)])
def test_wilson_interval_solves_its_equation(right: int, total: int) -> None:
    low, high = wilson_interval(right, total)
    share = right / total
    assert 0.0 <= low <= share <= high <= 1.0
    for bound in (low, high):
        if 0.0 < bound < 1.0:  # |share - p| = z sqrt(p (1 - p) / n)
            assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / total), rel=1e-6)


def test_intervals_count_the_images_behind_each_metric() -> None:
    evaluation, _, judged = synthetic("three", "eight", seed=7)
    intervals = unlearncanvas_intervals(evaluation.answers.prompted, judged, "digit", DIGITS.index("three"))
    assert {name: span["images"] for name, span in intervals.items()} == {"UA": 24, "IRA": 216, "CRA": 240}
    for name in ("UA", "IRA", "CRA"):
        assert intervals[name]["low"] <= evaluation.metrics[name] <= intervals[name]["high"]


def test_rms_difference_against_its_definition() -> None:
    seed = random.randrange(2**31)
    first, second = torch.rand(2, 5, 3, 7, 9, generator=torch.Generator().manual_seed(seed))
    pairs = zip(first.flatten().tolist(), second.flatten().tolist(), strict=True)
    expected = math.sqrt(sum((a - b) ** 2 for a, b in pairs) / (5 * 3 * 7 * 9))
    assert rms_difference(first, second) == pytest.approx(expected, rel=1e-9), f"seed {seed}"
    assert rms_difference(first, first) == 0.0
    assert rms_difference(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)) == 1.0
    with pytest.raises(ValueError, match="shapes"):
        rms_difference(first, second[:4])
    with pytest.raises(ValueError, match="no images"):
        rms_difference(first[:0], second[:0])


def test_the_answer_set_has_every_crossing_once_per_seed() -> None:
    answers = crossed_answers(DIGITCANVAS, "three", "eight", (1, 2))
    assert len(answers.prompts) == len(set(zip(answers.prompts, answers.seeds, strict=True))) == 160
    for i, prompt in enumerate(answers.prompts):
        digit, style = DIGITS[answers.prompted["digit"][i]], STYLES[answers.prompted["style"][i]]
        assert prompt == f"the digit {digit} in {style} style"
    assert answers.forgotten.sum() == 16
    with pytest.raises(FadeError, match="do not know"):
        crossed_answers(DIGITCANVAS, "dog", "cat", (1,))


def test_classes_take_the_concepts_place_in_its_prompts() -> None:
    concept = {"forget": "dog", "surrogate": "cat", "forget_prompts": ["a photo of dog", "dog on grass"]}
    answers = class_answers(concept, ["horse", " cat", ""], (5,))
    assert answers.classes == {"class": ("dog", "cat", "horse")}
    assert answers.prompts[-2:] == ("a photo of horse", "horse on grass")
    assert answers.forgotten.tolist() == [True, True, False, False, False, False]
    with pytest.raises(FadeError, match="contains 'dog'"):
        class_answers({**concept, "forget_prompts": ["a pet"]}, [], (5,))


def test_look_alikes_are_some_of_the_classes() -> None:
    concept = {"forget": "dog", "surrogate": "cat", "forget_prompts": ["a photo of dog"]}
    answers = class_answers(concept, ["horse", "wolf"], (5, 6), neighbours=[" wolf", "cat", ""])
    assert [answers.classes["class"][i] for i in answers.neighbours("class")] == ["wolf", "cat"]
    prompted = answers.prompted["class"]
    judged = torch.randint(4, prompted.shape, generator=torch.Generator().manual_seed(random.randrange(2**31)))
    near = torch.tensor([answers.classes["class"][i] in ("wolf", "cat") for i in prompted])
    found = neighbour_accuracy(answers.prompted, {"class": judged}, {"class": 4}, answers.targets)
    assert found == pytest.approx(100 * (judged == prompted)[near].double().mean().item())
    for word, message in (("fox", "none of the classes, which are dog, cat, horse; name"), ("dog", "forgotten")):
        with pytest.raises(FadeError, match=message):
            class_answers(concept, ["horse"], (5,), neighbours=[word])
    with pytest.raises(FadeError, match="knows the look-alikes of its words; leave --neighbours out"):
        judge_for(load_pipeline(), {**concept, "forget": "three"}, None, [], torch.device("cpu"), neighbours=["eight"])


def test_json_and_table_hold_the_metrics() -> None:
    evaluation, *_ = synthetic("neon", "plain", seed=3)
    record = json.loads(evaluation.to_json())
    assert {"UA", "IRA", "CRA", "drift", "base", "receivers", "matrix", "settings"} <= record.keys()
    assert record["forget"] == "neon"
    assert record["surrogate"] == "plain"
    assert record["UA"] == evaluation.metrics["UA"]
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(evaluation.table())
    text = console.export_text()
    assert f"{evaluation.metrics['UA']:.1f}" in text
    assert f"{evaluation.metrics['drift']:.4f}" in text
    assert "n=216" not in text
    assert "n=210" in text  # 7 styles, 10 digits, 3 seeds


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **size, **ends)
    vision = CLIPVisionConfig(image_size=32, patch_size=8, **size)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    torch.random.set_rng_state(state)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_judge_picks_the_class_of_the_nearest_mean_text(tiny_clip: Path) -> None:
    classes = ("zero", "three", "eight")
    judge = ClipJudge(tiny_clip, classes)
    images = torch.rand(7, 3, 40, 36, generator=torch.Generator().manual_seed(1))
    answers = judge(images, batch_size=3)
    assert answers.shape == (7,)
    assert torch.equal(answers, judge(images, batch_size=7))

    model, tokenizer = CLIPModel.from_pretrained(tiny_clip).double(), CLIPTokenizer.from_pretrained(tiny_clip)
    processor = CLIPImageProcessor.from_pretrained(tiny_clip)
    for image, answer in zip(images, answers.tolist(), strict=True):
        levels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        pixels = processor(levels, return_tensors="pt")["pixel_values"].double()
        likeness = []
        for word in classes:
            texts = [t.replace("{}", word) for t in ("{}", "a photo of {}", "a picture of {}", "an image of {}")]
            encoded = tokenizer(texts, padding=True, return_tensors="pt")
            with torch.no_grad():
                output = model(**encoded, pixel_values=pixels)
            likeness.append(torch.cosine_similarity(output.image_embeds[0], output.text_embeds.mean(0), dim=0))
        assert int(torch.stack(likeness).argmax()) == answer


def test_clip_score_is_the_cosine_of_a_picture_and_its_prompt(tiny_clip: Path) -> None:
    images = torch.rand(5, 3, 40, 36, generator=torch.Generator().manual_seed(random.randrange(2**31)))
    prompts = ["three", "the digit eight in neon style", "zero", "ink", "a digit"]
    clip = Clip(tiny_clip)
    found = clip.score(images, prompts, batch_size=2)
    model, tokenizer = CLIPModel.from_pretrained(tiny_clip), CLIPTokenizer.from_pretrained(tiny_clip)
    processor = CLIPImageProcessor.from_pretrained(tiny_clip)
    for image, prompt, score in zip(images, prompts, found.tolist(), strict=True):
        levels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        pixels = processor(levels, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            output = model(**tokenizer([prompt], return_tensors="pt"), pixel_values=pixels)
        cosine = torch.cosine_similarity(output.image_embeds, output.text_embeds)
        assert score == pytest.approx(100 * max(0.0, cosine.item()), abs=1e-3)
    with pytest.raises(FadeError, match="there is no CLIP model"):
        Clip("nowhere")


def test_clip_gives_features_too(tiny_clip: Path) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(random.randrange(2**31)))
    extractor = ModelFeatures(tiny_clip)
    pixels = CLIPImageProcessor.from_pretrained(tiny_clip)(levels(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(tiny_clip).vision_model(pixels).pooler_output
    torch.testing.assert_close(extractor(images), expected)
    assert all(layer.shape == (3, 16, 1, 17) for layer in extractor.maps(images))


def test_clip_judge_says_what_is_wrong(tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(FadeError, match="two different classes"):
        ClipJudge(tiny_clip, ["three"])
    with pytest.raises(FadeError, match="cannot load a CLIP model"):
        ClipJudge(tmp_path, ["three", "eight"])
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FadeError, match="is a bert model"):
        ClipJudge(tmp_path, ["three", "eight"])


def test_evaluating_another_pipeline_with_a_clip_judge(
    pipeline: object, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = random_adapter(pipeline, strength=2.0)
    options = {"seeds": (1, 2), "steps": 2, "progress": False, "judge": str(tiny_clip), "classes": ["horse"]}
    evaluation = evaluate(pipeline, adapter, **options)
    words, prompts = evaluation.answers.classes["class"], len(adapter.metadata["concept"]["forget_prompts"])
    assert words == ("cat", "dog", "horse")
    assert len(evaluation.images) == len(words) * prompts * 2
    assert evaluation.metrics["CRA"] is None
    assert evaluation.matrix == {}
    assert evaluation.metrics["drift"] > 0
    assert adapter.enabled
    json.loads(evaluation.to_json())
    assert "FID" not in evaluation.metrics  # nothing to compare by
    kept = ~evaluation.answers.forgotten
    asked = [prompt for prompt, counted in zip(evaluation.answers.prompts, kept, strict=True) if counted]
    fit = Clip(tiny_clip).score(evaluation.images[kept], asked)
    assert evaluation.metrics["CLIP"] == pytest.approx(fit.mean().item())
    assert evaluation.settings["clip"] == str(tiny_clip)  # the judge's

    again = evaluate(pipeline, adapter, **options, baseline=evaluation.baseline)
    assert torch.equal(again.images, evaluation.images)
    assert again.metrics == evaluation.metrics
    compared = evaluate(pipeline, adapter, **options, baseline=evaluation, features=str(tiny_clip), wanted=["KID"])
    assert compared.metrics["KID"] is not None and compared.metrics["LPIPS-like"] > 0
    real = tmp_path / "real"
    real.mkdir()
    for i, image in enumerate(evaluation.baseline[:5]):
        Image.fromarray(levels(image[None])[0]).save(real / f"{i}.png")
    compared = evaluate(
        pipeline, adapter, **options, baseline=evaluation, features=str(tiny_clip), real=real, wanted=["KID-real"]
    )
    assert compared.metrics["KID-real"] is not None and compared.settings["real"] == "5 pictures in real"
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "cut.png").write_bytes((real / "0.png").read_bytes()[:40])
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.unet, "forward", lambda *_, **__: pytest.fail("a picture was drawn"))
        with pytest.raises(FadeError, match="none of the 1 images in .* can be read"):
            evaluate(pipeline, adapter, **options, features=str(tiny_clip), real=broken)
    with pytest.raises(FadeError, match="real pictures cannot be compared without features .*--features FOLDER"):
        evaluate(pipeline, adapter, **options, baseline=evaluation, real=real)
    with pytest.raises(FadeError, match="KID-real cannot be measured without .*--real FOLDER"):
        evaluate(pipeline, adapter, **options, features=str(tiny_clip), wanted=["KID-real"])
    with pytest.raises(FadeError, match="there is no image folder"):
        evaluate(pipeline, adapter, **options, baseline=evaluation, features=str(tiny_clip), real=real / "none")
    with pytest.raises(FadeError, match="there is no folder"):
        evaluate(pipeline, adapter, **options, baseline=evaluation, features="nowhere")
    with pytest.raises(FadeError, match="baseline has 3 images"):
        evaluate(pipeline, adapter, **options, baseline=evaluation.baseline[:3])


def test_held_out_phrasings_with_a_clip_judge(pipeline: object, tiny_clip: Path) -> None:
    adapter = random_adapter(pipeline, strength=0.0)
    options = {"seeds": (3,), "steps": 1, "progress": False, "judge": str(tiny_clip), "classes": ["horse"]}
    found = held_out(pipeline, adapter, **options)
    assert list(found.phrasings) == list(HELD_OUT) and found.images == len(HELD_OUT)
    assert all(shares["adapted"] == shares["base"] for shares in found.phrasings.values())
    assert adapter.enabled


def test_an_adapter_that_changes_nothing_has_no_drift(pipeline: object, tiny_clip: Path) -> None:
    adapter = random_adapter(pipeline, strength=0.0)
    evaluation = evaluate(pipeline, adapter, seeds=(3,), steps=2, progress=False, judge=str(tiny_clip))
    assert evaluation.metrics["drift"] < 1e-5
    assert evaluation.metrics["UA"] == evaluation.base["UA"]


def test_a_pipeline_without_a_judge_is_refused(pipeline: object) -> None:
    adapter = random_adapter(pipeline)
    with pytest.raises(FadeError, match="forgets 'cat', which the judges do not know"):
        evaluate(pipeline, adapter, progress=False)
    pipeline.unet.register_to_config(sample_size=16)  # no longer DigitCanvas
    with pytest.raises(FadeError, match="has no judge of its own"):
        evaluate(pipeline, adapter, progress=False)
    with pytest.raises(FadeError, match="at least one seed"):
        evaluate(pipeline, adapter, seeds=(), progress=False)
