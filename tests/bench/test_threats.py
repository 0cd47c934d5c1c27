"""The table of docs/threats.md: each attack's line, what a cell says, going on, and that the document has it."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import threats
from fade.evaluation.attacks import ATTACKS, Attack

CURVES = {"recognised_after": {"0": 0, "2": 0, "5": 9}, "steps_to_half": 5, "anew_steps_to_half": None}


def told(one: Attack, recognised: int = 0, **numbers: Any) -> dict[str, Any]:
    settings = json.loads(json.dumps(asdict(one)))
    numbers = numbers or (CURVES if one.name == "relearning" else {})
    result = {"attack": one.name, "setting": "x", "settings": settings, "recognised": recognised, "pictures": 24}
    return {**result, "numbers": numbers, "found": ""}


def row(forget: str, **more: Any) -> dict[str, Any]:
    attacks = [told(one, number) for variants in ATTACKS.values() for number, one in enumerate(variants)]
    about = {"forget": forget, "surrogate": "x", "base": 23, "unattacked": 1, "left_out": {}, "cpu_seconds": {}}
    return {**about, "attacks": attacks, **more}


def cells(payload: dict[str, Any], column: int = -1) -> dict[str, str]:
    return {line[2]: line[column] for line in threats.lines(payload)[1:]}


def test_every_setting_of_every_attack_is_in_one_line() -> None:
    for variants in ATTACKS.values():
        for one in variants:
            settings = told(one)["settings"]
            lines = [line for line in threats.THREATS if line.attack == one.name and line.settings(settings)]
            assert len(lines) == 1, one
    assert {line.attack for line in threats.THREATS} == {"", *ATTACKS}


def test_a_cell_has_the_counts_by_setting_and_what_is_to_be_known_beside() -> None:
    payload = {"rows": [row("three"), row("neon", left_out={"pruning": "no"}, attacks=[])]}
    header, *_ = threats.lines(payload)
    assert header[-2:] == ["three → x (base model 23)", "neon → x (base model 23)"]
    found = cells(payload, -2)
    assert found["–"] == "1" and found["`null-text-inversion`"] == "0 / 1"
    assert found["`relearning`"].startswith("half back at 5 steps, learnt anew at never; 4 after 5")
    assert cells(payload)["`pruning`"] == "cannot" and cells(payload)["`quantising`"] == "not run"
    (removal,), (search,) = ATTACKS["removal"], ATTACKS["token-search"]
    inpainting, ten = ATTACKS["inpainting"], next(one for one in ATTACKS["relearning"] if one.layers == "every")
    open_ = {"recognised_after": {"0": 0, "2": 12}, "steps_to_half": 2, "anew_steps_to_half": 2}
    attacks = [
        told(removal, 24, pictures_equal_base=True), told(search, 12, base_recognised=18), told(ten, 20, **open_),
        *(told(one, number, base_recognised=20 + number) for number, one in enumerate(inpainting)),
    ]  # fmt: skip
    found = cells({"rows": [row("three", attacks=attacks)]})
    assert found["`removal`"] == "24, the base model's pictures bit for bit"
    assert found["`token-search`"] == "12 (base model 18)" and found["`inpainting`"] == "0 / 1 (base model 20 / 21)"
    assert "half back at 2 steps, learnt anew at 2 (the checks do not tell which is sooner); 20 after 2" in str(found)
    attacks[0] = told(removal, 24, pictures_equal_base=False)
    found = cells({"rows": [row("three", attacks=attacks)]})
    assert found["`removal`"] == "24, not the base model's pictures bit for bit"


def test_what_the_file_lacks_is_run_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def attack(pipeline: Any, adapter: Any, names: list[str], **options: Any) -> Any:
        asked.extend(names)
        found = {one: SimpleNamespace(**told(one, 3)) for one in ATTACKS[names[0]]}
        count = SimpleNamespace(recognised=5)
        return SimpleNamespace(find=found.get, base=count, unattacked=count, left_out={})

    monkeypatch.setattr("fade.evaluation.attacks.attack", attack)
    adapter = SimpleNamespace(pipeline=None)
    monkeypatch.setattr(threats, "_made", lambda forget, folder, known: (adapter, known or row(forget, attacks=[])))
    whole, output = row("three"), tmp_path / "threats.json"
    whole["attacks"] = [one for one in whole["attacks"] if one["attack"] not in ("pruning", "quantising")]
    whole["attacks"].append(told(ATTACKS["pruning"][0]))  # and not the other setting
    whole["left_out"] = {"quantising": "packed"}
    output.write_text(json.dumps({"kind": "threats", "rows": [whole]}))
    payload = threats.fill(output, tmp_path)
    assert asked == ["pruning", *ATTACKS]
    assert payload["rows"] == json.loads(output.read_text())["rows"] and len(payload["rows"]) == 2
    three = {(one["attack"], one["recognised"]) for one in payload["rows"][0]["attacks"]}
    assert ("pruning", 3) in three and ("pruning", 0) not in three
    threats.fill(output, tmp_path)
    assert len(asked) == 1 + len(ATTACKS)


def test_the_document_quotes_the_committed_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert threats.main(["--markdown"]) == 0
    text = (threats.ROOT / "docs" / "threats.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in text, "put the output of `python -m bench.threats --markdown` there"


def test_a_file_is_shown_and_what_is_none_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "threats.json"
    file.write_text(json.dumps({"kind": "threats", "rows": [row("three")]}))
    assert threats.main(["--show", "--output", str(file)]) == 0
    assert "null-text-inversion" in capsys.readouterr().out
    file.write_text("{}")
    with pytest.raises(SystemExit, match="is not a file of `python -m bench.threats`"):
        threats.main(["--show", "--output", str(file)])
