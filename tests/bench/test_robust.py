"""The robust benchmark's rows, its order and its table, without running a model."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import robust
from fade.config import Config
from fade.evaluation.attacks import ATTACKS, Attack
from fade.evaluation.attacks.textual_inversion import TextualInversion


def row(recipe: str, forget: str, recognised: int) -> dict:
    made = [
        {
            "attack": one.name, "setting": one.setting(None), "settings": json.loads(json.dumps(asdict(one))),
            "recognised": recognised, "pictures": 8, "numbers": {}, "seconds": 1.0,
        }
        for one in robust.attacks()
        if one.name in ("null-text-inversion", "null-text-inversion with controls", "embedding-inversion")
    ]  # fmt: skip
    learnt = {"recognised_after": {"0": 0, "50": 2}, "steps_to_half": None, "anew_steps_to_half": 20}
    made.append({"attack": "relearning", "setting": "x", "settings": {}, "recognised": 2, "pictures": 8})
    made[-1]["numbers"] = learnt
    metrics = {"UA": 100.0, "IRA": 99.0, "CRA": 98.0, "drift": 0.0123}
    told = {"recipe": recipe, "forget": forget, "surrogate": robust.CONCEPTS[forget]}
    return {**told, "metrics": metrics, "attacks": made, "seconds": 12.3, "adapter_bytes": 4567}


def test_every_row_has_settings_that_exist() -> None:
    assert len(set(robust.ROWS)) == len(robust.ROWS)
    assert {recipe for recipe, _ in robust.ROWS} == set(robust.RECIPES)
    for method, settings in robust.RECIPES.values():
        assert Config.of(method).replace(**settings).overwrite.method == method


def test_the_table_has_what_attacks_brought_back_by_setting() -> None:
    lines = robust.markdown({"rows": [row(robust.ROBUST, "three", 3)]}).splitlines()
    cells = dict(zip(*([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (0, 2)), strict=True))
    assert (cells["forgotten"], cells["IRA"], cells["drift"], cells["kB"]) == ("three → eight", "99.0", "0.012", "5")
    assert {cells[name] for name in ("null-text inversion", "turned", "scaled", "turned, scaled")} == {"3 / 3"}
    assert (cells["embedding inversion"], cells["completion"]) == ("3", "")
    assert cells["relearning: half back after"] == "not after 50; anew 20 steps"


def test_a_setting_that_was_not_run_is_a_dash() -> None:
    one = row(robust.ROBUST, "three", 4)
    vectors = ATTACKS["textual-inversion"][0]
    one["attacks"].append({**one["attacks"][0], "attack": vectors.name, "settings": asdict(vectors), "recognised": 6})
    assert "| 4 | 6 / – |" in robust.markdown({"rows": [one]})


def test_a_comparison_that_the_checks_do_not_decide_is_marked() -> None:
    one = row(robust.ROBUST, "neon", 8)
    one["attacks"][-1]["numbers"] = {
        "recognised_after": {"0": 0, "10": 8}, "steps_to_half": 10, "anew_steps_to_half": 10,
    }  # fmt: skip
    assert "| 10 steps; anew 10 steps, which is sooner the checks do not tell |" in robust.markdown({"rows": [one]})


@pytest.mark.parametrize("same", [True, False])
def test_a_row_that_lacks_attacks_is_completed_if_its_adapter_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool
) -> None:
    """The adapter is no longer there; what is made anew measures the same, or not."""
    known = row(robust.ROBUST, "neon", 5)
    asked: list[list[Attack]] = []

    def unlearn(pipeline: Any, *words: str, output: Path, **options: Any) -> Any:
        output.mkdir(parents=True)
        (output / "adapter.safetensors").write_bytes(b"123")
        return SimpleNamespace(run={"selected": 7})

    def attack(pipeline: Any, adapter: Any, attacks: list[Attack], **options: Any) -> Any:
        asked.append(list(attacks))
        names = {"setting": "y", "recognised": 3, "pictures": 8, "numbers": {}, "seconds": 2.0}
        return SimpleNamespace(
            find=lambda one: SimpleNamespace(attack=one.name, settings=json.loads(json.dumps(asdict(one))), **names)
        )

    metrics = known["metrics"] | {"drift": known["metrics"]["drift"] if same else 0.5, "new": 1.0}
    monkeypatch.setattr("fade.bundled.model", lambda name: SimpleNamespace(load_pipeline=lambda: None))
    monkeypatch.setattr("fade.unlearn", unlearn)
    monkeypatch.setattr("fade.evaluation.evaluate", lambda *a, **k: SimpleNamespace(metrics=metrics, base={}))
    monkeypatch.setattr("fade.evaluation.attacks.attack", attack)
    found = robust.run_row(robust.ROBUST, "neon", dict(known), tmp_path)
    had = [one for one in robust.attacks() if robust.stood(known, one) is not None]
    assert had and asked == [[one for one in robust.attacks() if not (same and one in had)]]
    assert {one.vectors for one in asked[0] if isinstance(one, TextualInversion)} == {1, 5}
    assert [(one["attack"], one["settings"]) for one in found["attacks"]] == [
        (one.name, json.loads(json.dumps(asdict(one)))) for one in robust.attacks()
    ]
    kept = {one["recognised"] for one in found["attacks"] if one["attack"] == "embedding-inversion"}
    assert kept == ({5} if same else {3}) and found["metrics"] == (known["metrics"] if same else metrics)


def test_the_document_quotes_the_committed_file() -> None:
    text, table = (robust.ROOT / "docs" / "threats.md").read_text("utf-8"), robust.markdown(robust.load(robust.RESULTS))
    assert table in text, "put the output of `python -m bench.robust --show` there"


def test_the_committed_rows_say_what_was_attacked() -> None:
    for one in robust.load(robust.RESULTS)["rows"]:
        assert all(robust.stood(one, variant) for variant in ATTACKS["embedding-inversion"])
        assert len(one["attacks"]) > 10 and all(attack["settings"] for attack in one["attacks"])


def test_a_finished_file_is_shown_and_another_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "robust.json"
    file.write_text(json.dumps({"kind": "robust", "rows": [row(robust.DEFAULT, "neon", 1)]}))
    assert robust.main(["--show", "--output", str(file)]) == 0
    assert "neon → plain" in capsys.readouterr().out
    file.write_text("{}")
    with pytest.raises(SystemExit, match=r"is not a file of `python -m bench.robust`"):
        robust.main(["--show", "--output", str(file)])
