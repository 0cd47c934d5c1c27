"""`fade methods`, `--method` and `--option`."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from fade import cli
from fade.adapter_file import read_adapter_file
from fade.config import ConceptWords, Config
from fade.digitcanvas import load_pipeline
from fade.errors import FadeError
from fade.methods import METHODS, method
from fade.report import _loss_chart


def test_the_list_names_every_method_and_what_it_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["methods", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert list(found) == list(METHODS)
    assert found["esd-x"]["options"] == {"guidance": 1.0, "direction": "concept"}
    assert "2303.07345" in found["esd-x"]["source"]
    assert found["fade"]["settings"]["locate.keep"] == 0.5
    assert cli.main(["methods"]) == 0
    printed = capsys.readouterr().out
    for name in METHODS:  # a row of its own each
        assert re.search(rf"^\W*{re.escape(name)}\s+\W*{re.escape(method(name).summary[:20])}", printed, re.M), name


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_asked_for_by_its_name_and_takes_its_options(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Config] = []

    def unlearn(pipeline: object, *, config: Config, **_: object) -> None:
        asked.append(config)
        raise FadeError("far enough")

    monkeypatch.setattr("fade.loading.load_model", lambda *_: None)
    monkeypatch.setattr("fade.unlearning.unlearn", unlearn)
    options = dataclasses.asdict(method(name).options())
    words = ["--forget", "three", "--surrogate", "eight", "--output", str(tmp_path / "out"), "--method", name]
    read = [key for key in options if f"options.{key}" not in Config.of(name).unread()]
    words += [word for key in read for word in ("--option", f"{key}={json.dumps(options[key])}")]
    assert cli.main(["unlearn", "digitcanvas", *words]) == 2
    (config,) = asked
    assert config == Config.of(name, concepts=(ConceptWords("three", "eight"),)) and config.options == options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--method", "sal-un"],
            "error: there is no method 'sal-un'; known are both, closed-form, distillation, robust, fade",
        ),
        (["--method", "esd-x", "--option", "guidance"], "--option 'guidance' is no NAME=VALUE"),
        (["--method", "esd-x", "--option", "guidance=much"], "'options.guidance' must be of type float"),
        (
            ["--method", "esd-x", "--option", "alpha=1"],
            "unknown setting 'options.alpha'; known here: direction, guidance",
        ),
        (["--option", "guidance=1"], "the method both has no options; leave out guidance"),
    ],
)
def test_bad_requests_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    words_of_concept = ["--forget", "three", "--surrogate", "eight", "--output", "never"]
    assert cli.main(["unlearn", "digitcanvas", *words_of_concept, *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_a_method_is_asked_for_by_name_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "run.toml"
    settings.write_text("[data]\nforget_samples = 2\nretain_samples = 2\nsampling_steps = 1\n[overwrite]\npool = 2\n")
    arguments = ["--forget", "three", "--surrogate", "eight", "--output", str(tmp_path / "out"), "--steps", "2"]
    arguments += ["--config", str(settings), "--method", "esd-x", "--option", "guidance=2", "--quiet"]
    assert cli.main(["unlearn", "digitcanvas", *arguments]) == 0
    file = read_adapter_file(tmp_path / "out" / "adapter.safetensors")
    config = file.metadata["config"]
    assert config["overwrite"]["method"] == file.metadata["run"]["method"] == "esd-x"
    assert config["options"] == {"guidance": 2.0, "direction": "concept"}
    assert config["overwrite"]["retain_weight"] == 0.0
    assert file.layers.keys() <= {name for name, _ in load_pipeline().unet.named_modules() if ".attn2." in name}
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "out" / "adapter.safetensors")]) == 0
    assert "esd-x" in capsys.readouterr().out


def test_the_report_draws_losses_under_the_methods_names() -> None:
    chart = _loss_chart({"erase": [1.0, 0.5], "drift": [0.0, 0.25], "penalty": [3.0, 2.0]})
    assert chart is not None
    for told in ("erase from 1 to 0.5", "drift from 0 to 0.25", "penalty from 3 to 2"):
        assert told in chart["label"]
    assert _loss_chart({"forget": [], "retain": []}) is None and _loss_chart({}) is None
