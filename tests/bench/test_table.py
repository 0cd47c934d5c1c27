"""The table of methods: which cells there are, going on, reasons, what is shown."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench import authors_package, table
from bench.table import Cell
from fade import bundled
from fade.concept import bundled_concept
from fade.methods import METHODS


def row(cell: Cell, **more: Any) -> dict[str, Any]:
    found = {"model": cell.model, "method": cell.method, "forget": cell.forget, "surrogate": cell.surrogate}
    return {**found, "seed": cell.seed, **more}


def measured(cell: Cell, ua: float, attacks: dict[str, float] | None = None) -> dict[str, Any]:
    numbers = {"UA": ua, "IRA": 99.0, "CRA": 98.5, "NA": None, "drift": 0.02, "KID": 0.1}
    costs = {"seconds": 2.5, "peak_memory_bytes": 7e8, "adapter_bytes": 46_000}
    return row(cell, metrics=numbers, base=numbers, attacks=attacks or {}, left_out={}, **costs)


def test_every_method_meets_every_concept_and_every_attack() -> None:
    found = table.cells(quick=False, methods=list(METHODS))
    assert {cell.method for cell in found} == set(METHODS)
    assert len({cell.key for cell in found}) == len(found) == 14 * 2 * len(METHODS)
    for model, attacked in table.ATTACKED.items():
        assert {cell.forget for cell in found if cell.attacks and cell.model == model} == set(attacked)
    quick = table.cells(quick=True, methods=["uce", "ssd"])
    assert [(cell.method, cell.forget, cell.attacks) for cell in quick] == [
        (method, "three", table.QUICK_ATTACKS) for method in ("uce", "ssd")
    ]


def test_each_device_has_files_of_its_own() -> None:
    found = {(quick, device): table.defaults(quick, device) for quick in (False, True) for device in ("cpu", "cuda")}
    assert len({path for path, _ in found.values()}) == 4
    assert found[False, "cpu"] == (table.RESULTS, table.FOLDER)
    assert {folder for (_, device), (_, folder) in found.items() if device == "cuda"} == {
        table.FOLDER.with_name("table-gpu")
    }


def test_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(cell: Cell, folder: Path, device: str) -> dict[str, Any]:
        assert device == "a device"
        asked.append(cell.method)
        if cell.method == "ssd":
            return row(cell, reason="the process failed: no luck")
        return measured(cell, 100.0, {"removal, adapter off": 100.0})

    monkeypatch.setattr(table, "_run", run)
    todo = [Cell("digitcanvas", method, "three", "eight", 0, ("removal",)) for method in ("uce", "ssd", "both")]
    path = tmp_path / "table.json"
    table.fill(todo[:2], path, tmp_path / "cells", 1, True, "a device")
    table.fill(todo, path, tmp_path / "cells", 1, True, "a device")
    assert asked == ["uce", "ssd", "both"]
    more = [Cell("digitcanvas", "uce", "three", "eight", 0, ("removal", "completion"))]  # an attack that it lacks
    table.fill(more, path, tmp_path / "cells", 1, True, "a device")
    assert asked[3:] == ["uce"]
    assert [found["method"] for found in json.loads(path.read_text())["rows"]] == ["uce", "ssd", "both"]


def test_a_cell_without_a_number_has_a_reason() -> None:
    cells = [Cell("digitcanvas", method, "three", "eight", seed) for method in ("uce", "ssd") for seed in range(4)]
    rows = [measured(cell, 90.0 + cell.seed, {"completion, after 5": 10.0 * cell.seed, "completion, after 2": 0.0})
            for cell in cells[:4]]  # fmt: skip
    rows += [row(cell, reason="no cross-attention") for cell in cells[4:]]
    payload = {"rows": rows}
    header, uce, ssd = table.lines(payload, "digitcanvas")
    assert header == ["method", "cells", "UA", "IRA", "CRA", "drift", "KID", "attacks", "s", "MB", "kB"]
    assert uce[:3] == ["uce", "4", "91.5 (91-92)"] and uce[7] == "15 (10-20)" and uce[-3:] == ["2.5", "700", "46"]
    assert table.attack_lines(payload, "digitcanvas") == [["method", "completion"], ["uce", "15 (10-20)"]]
    assert ssd[:3] == ["ssd", "0", "no cross-attention"] and len(ssd) == len(header)
    text = table.markdown(payload)
    assert "| uce | 4 | 91.5 (91-92) |" in text and "- ssd on digitcanvas: no cross-attention" in text


def test_attacks_are_counted_once_each_and_taking_the_adapter_off_is_none() -> None:
    rates = {"removal, adapter off": 100.0, "pruning, 10 %": 0.0, "pruning, 30 %": 50.0, "completion, 5": 25.0}
    (header, line) = table.lines({"rows": [measured(Cell("m", "uce", "a", "b", 0), 100.0, rates)]}, "m")
    assert line[header.index("attacks")] == "37.5"
    (header, line) = table.lines({"rows": [measured(Cell("m", "uce", "a", "b", 0), 100.0)]}, "m")
    assert line[header.index("attacks")] == "-"


def test_readme_quotes_the_committed_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copy(table.RESULTS, tmp_path)
    beside = [str(path) for path in (table.AUTHORS,) if path.exists()]
    assert table.main(["--show", "--markdown", "--output", str(copy), "--beside", *beside]) == 0
    text = (table.ROOT / "README.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in text, "put the output of `python -m bench.table --show --markdown` there"


def test_one_cell_is_made_judged_attacked_and_gone_on_with(tmp_path: Path) -> None:
    cell = Cell("digitcanvas", "closed-form", "three", "eight", 0)
    first = table.run_cell(cell, tmp_path)
    assert first["metrics"]["UA"] >= 95 and first["adapter_bytes"] > 1000 and "attacks" not in first
    seconds = first["seconds"]
    again = table.run_cell(Cell(*cell.key[:1], "closed-form", "three", "eight", 0, ("removal",)), tmp_path)
    assert again["seconds"] == seconds  # not made anew
    assert all(name.startswith("removal") for name in again["attacks"]) and max(again["attacks"].values()) > 50


def test_what_is_no_table_is_said(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(SystemExit, match="not a file of `python -m bench.table`"):
        table.main(["--show", "--output", str(path)])


def test_shown_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell("digitcanvas", "uce", "three", "eight", 0)
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"schema": 1, "kind": "table", "rows": [measured(cell, 100.0, {"removal, off": 99.0})]}))
    assert table.main(["--show", "--output", str(path)]) == 0
    assert "uce" in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_other_programs_stand_beside_and_are_not_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = tmp_path / "table.json", tmp_path / "other.json"
    ours = measured(Cell("digitcanvas", "uce", "three", "eight", 0), 100.0)
    theirs = measured(Cell("digitcanvas", "another program", "three", "eight", 0), 75.0)
    for file, one in ((path, ours), (other, theirs)):
        file.write_text(json.dumps({"schema": table.SCHEMA, "kind": "table", "quick": False, "rows": [one]}))
    before = path.read_text()
    for options, shown in (([], False), (["--beside", str(other)], True)):
        assert table.main(["--show", "--markdown", "--output", str(path), *options]) == 0
        assert ("| another program | 1 | 75 |" in capsys.readouterr().out) == shown
    assert path.read_text() == before
    assert not {f"{authors_package.NAME}, {setting}" for setting in authors_package.SETTINGS} & set(METHODS)


def test_the_authors_package_reads_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authors_package, "DRAWN_STEPS", 1)
    monkeypatch.setattr(authors_package, "RETAIN", 3)
    monkeypatch.setattr(sys, "path", [*sys.path])
    digits = bundled.model("digitcanvas")
    concept = bundled_concept(digits, "three", "eight")
    record = json.loads(authors_package.write_data(digits.load_pipeline(), concept, 0, tmp_path).read_text())
    assert {part: len(rows) for part, rows in record.items()} == {"forget": authors_package.FORGET, "retain": 3}
    answers = dict(zip(concept.forget_prompts, concept.surrogate_prompts, strict=True))
    assert all(answers[row["text"]] == row["overwrite"] for row in record["forget"])
    assert all(row["text"] in concept.retain_prompts for row in record["retain"])
    pictures = [Image.open(row["image"]) for rows in record.values() for row in rows]
    assert {picture.size for picture in pictures} == {(32, 32)} and len({p.tobytes() for p in pictures}) > 20
    for ask in (lambda: authors_package.package(tmp_path), lambda: authors_package.main([str(tmp_path)])):
        with pytest.raises(SystemExit, match="the package is not in .*: install it there"):
            ask()
