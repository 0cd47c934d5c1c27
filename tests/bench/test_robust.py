"""The robust benchmark's rows, its order and its table, without running a model."""

import json
from pathlib import Path

import pytest

from bench import robust
from fade.config import Config


def row(recipe: str, forget: str, recognised: int) -> dict:
    made = [
        {"attack": one.name, "setting": one.setting(None), "recognised": recognised, "pictures": 8, "numbers": {}}
        for one in robust.attacks()
        if one.name in ("null-text-inversion", "null-text-inversion with controls", "embedding-inversion")
    ]
    learnt = {"recognised_after": {"0": 0, "50": 2}, "steps_to_half": None, "anew_steps_to_half": 20}
    made.append({"attack": "relearning", "setting": "x", "recognised": 2, "pictures": 8, "numbers": learnt})
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


def test_a_finished_file_is_shown_and_another_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "robust.json"
    file.write_text(json.dumps({"kind": "robust", "rows": [row(robust.DEFAULT, "neon", 1)]}))
    assert robust.main(["--show", "--output", str(file)]) == 0
    assert "neon → plain" in capsys.readouterr().out
    file.write_text("{}")
    with pytest.raises(SystemExit, match=r"is not a file of `python -m bench.robust`"):
        robust.main(["--show", "--output", str(file)])
