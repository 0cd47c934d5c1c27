"""A judge of the user's own: what it may return, what is said where it does not, and `fade evaluate` with one."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from fade import cli
from fade.errors import FadeError
from fade.evaluation import evaluate, held_out
from fade.evaluation.metrics.lpips import ALEXNET
from fade.evaluation.plugin_judge import NONE, PluginJudge

from .adapters import random_adapter


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a module with a function `judge(images)` into the current folder and returns the judge's name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(body: str) -> str:
        module = f"judge_{random.randrange(2**40):x}"
        (tmp_path / f"{module}.py").write_text(f"def judge(images):\n    {body}\n")
        return f"python:{module}.judge"

    return write


def test_labels_become_classes(plugin: Any) -> None:
    name = plugin("return ['cat' if x.mean() > 0.6 else 'dog' if x.mean() > 0.3 else None for x in images]")
    judge = PluginJudge(name, ("dog", "cat"))
    images = torch.tensor([0.9, 0.1, 0.5, 0.7])[:, None, None, None].expand(4, 3, 2, 2)
    assert judge.classes == ("dog", "cat", NONE)
    for batch_size in (1, 3, 4):
        assert judge(images, batch_size).tolist() == [1, 2, 0, 1]
    assert judge(images[:0]).tolist() == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return ['cat']", "returned 1 labels; it must return one label for each of 2 images"),
        ("return 'cat'", "returned a str; it must"),
        ("return None", "returned a NoneType; it must"),
        ("return ['cat', 'lynx']", "label 'lynx'; it may return dog, cat or None"),
        ("return [0, 1]", "label 0; it may return dog, cat or None"),
        ("return images.argmax(1)", "label tensor"),
        ("return 1 / 0", "failed: ZeroDivisionError: division by zero"),
    ],
)
def test_other_answers_get_one_clear_message(plugin: Any, body: str, message: str) -> None:
    judge = PluginJudge(plugin(body), ("dog", "cat"))
    with pytest.raises(FadeError) as caught:
        judge(torch.rand(2, 3, 2, 2))
    assert message in str(caught.value) and len(str(caught.value)) < 300


def test_a_judge_that_is_not_there(plugin: Any) -> None:
    name = plugin("return []")
    for wrong, message in (
        ("python:judge", "names no function"),
        ("python:", "names no function"),
        ("python:no_such_module.judge", "cannot import the judge python:no_such_module.judge: ModuleNotFoundError"),
        (name.replace(".judge", ".jury"), "has no function 'jury'"),
    ):
        with pytest.raises(FadeError, match=message):
            PluginJudge(wrong, ("dog", "cat"))


def test_evaluating_with_a_judge_of_ones_own(pipeline: StableDiffusionPipeline, plugin: Any) -> None:
    adapter = random_adapter(pipeline, strength=2.0)
    options = {"seeds": (1,), "steps": 1, "progress": False, "judge": plugin("return [None] * len(images)")}
    evaluation = evaluate(pipeline, adapter, **options, classes=["horse"])
    assert evaluation.metrics["UA"] == 100 and evaluation.metrics["IRA"] == 0
    assert evaluation.forgotten_as == {NONE: 100.0} and NONE not in evaluation.receivers["class"]
    assert not any(NONE in prompt for prompt in evaluation.answers.prompts)
    assert held_out(pipeline, adapter, **options).adapted == 0
    json.loads(evaluation.to_json())
    with pytest.raises(FadeError, match="CLIP cannot be measured without a CLIP model: give --clip"):
        evaluate(pipeline, adapter, **options, wanted=["CLIP"])
    with pytest.raises(FadeError, match="FID cannot be measured without features"):
        evaluate(pipeline, adapter, **options, wanted=["FID"])
    with pytest.raises(FadeError, match="phrasings cannot be measured without"):
        evaluate(pipeline, adapter, **options, wanted=["phrasings"])


def test_a_gate_in_a_shell(
    pipeline: StableDiffusionPipeline, plugin: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pipeline.save_pretrained(tmp_path / "model")
    adapter = random_adapter(pipeline, strength=0.3)
    adapter.save(tmp_path / "adapter.safetensors")
    numbers, report = tmp_path / "numbers.json", tmp_path / "report.html"
    command = [
        "evaluate", tmp_path / "model", "--adapter", tmp_path / "adapter.safetensors", "--judge",
        plugin("return ['cat' if i % 2 else None for i in range(len(images))]"), "--classes", "horse", "--seeds", 1,
        "--steps", 1, "--device", "cpu", "--quiet", "--json", numbers, "--report", report,
    ]  # fmt: skip

    def status(*more: object) -> tuple[int, str, str]:
        capsys.readouterr()
        found = cli.main([str(word) for word in (*command, *more)])
        captured = capsys.readouterr()
        return found, captured.out, captured.err

    found, printed, said = status("--require", "UA=90,drift=0")
    lines = said.strip().splitlines()
    assert found == 3 and len(lines) == 2
    assert lines[0] == "falls short: UA is 50 %; at least 90 % is required"
    assert lines[1].startswith("falls short: drift is 0.")
    assert json.loads(numbers.read_text())["UA"] == 50 and report.exists() and "UA" in printed

    from fade.backbones.base import Backbone

    def drawn(*_: Any, **__: Any) -> None:
        raise AssertionError("drawn twice")

    monkeypatch.setattr(Backbone, "generate", drawn)
    assert status("--require", "UA=50")[0] == 0
    found, printed, said = status("--neighbours", "horse, dog", "--require", "NA=60")
    record = json.loads(numbers.read_text())
    right = {word: row["after"] for word, row in record["receivers"]["class"].items()}
    assert set(record["neighbours"]) == {"horse", "dog"} and "still right (horse, dog)" in printed
    assert record["NA"] == (right["horse"] + right["dog"]) / 2 and "NA" in record["change_95"]
    assert found == 3 and said.startswith(f"falls short: NA is {record['NA']:.6g} %")
    for word, message in (("lynx", "is none of the classes, which are cat, dog, horse"), ("cat", "to be forgotten")):
        found, _, said = status("--neighbours", word)
        assert found == 2 and message in said and len(said.splitlines()) == 1
    weights = {key: torch.randn(shape) / math.prod(shape[1:]) ** 0.5 for key, shape in ALEXNET.shapes().items()}
    save_file(weights, tmp_path / "lpips.safetensors")
    found, printed, said = status("--lpips", tmp_path / "lpips.safetensors", "--require", "LPIPS=-1000")
    record = json.loads(numbers.read_text())
    assert found == 3 and said.startswith("falls short: LPIPS is ") and "LPIPS_forget" in printed
    assert record["interval_95"]["LPIPS"]["low"] <= record["LPIPS"] <= record["interval_95"]["LPIPS"]["high"]
    assert record["settings"]["lpips"] == "LPIPS with AlexNet, lpips.safetensors"
    found, _, said = status("--require", "LPIPS=1")
    assert found == 2 and "LPIPS cannot be measured without its weights: give --lpips FILE" in said
    found, _, said = status("--require", "UAA=50")
    assert found == 2 and "there is no metric 'UAA'; there are UA, IRA" in said
    assert status("--no-cache")[0] == 1
