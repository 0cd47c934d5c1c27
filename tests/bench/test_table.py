"""The table of methods: which cells there are, going on, reasons, what is shown."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench import authors_package, sweep, table
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
    counts = {
        name: {"recognised": round(2 * rate), "pictures": 200, "settings": {}} for name, rate in (attacks or {}).items()
    }
    return row(cell, metrics=numbers, base=numbers, attacks=counts, left_out={}, **costs)


def test_every_method_meets_every_concept_and_every_attack() -> None:
    found = table.cells(quick=False, methods=list(METHODS))
    assert {cell.method for cell in found} == set(METHODS)
    assert len({cell.key for cell in found}) == len(found) == 14 * 2 * len(METHODS)
    more = table.cells(quick=False, methods=table.names())
    assert {cell.method for cell in more} - set(METHODS) == set(table.VARIANTS)
    assert len(more) == len(found) + 6 * len(table.VARIANTS)
    assert not any(cell.attacks or cell.seed for cell in more if cell.method in table.VARIANTS)
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


def test_variants_are_settings_that_the_methods_take() -> None:
    for name, (method, changes) in table.VARIANTS.items():
        own, plain = table.settings_of(name, "digitcanvas"), table.settings_of(method, "digitcanvas")
        assert {setting for setting in own if own[setting] != plain[setting]} == {
            change.replace("__", ".") for change in changes
        }
    assert table.config_of("salun", "digitcanvas", 3).seed == 3


class Faked:
    """Stands in for the processes: which cells were asked for, and what they say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, dict[str, Any]] = {}
        monkeypatch.setattr(table._Runner, "__call__", lambda runner, cell: self.run(runner, cell))

    def run(self, runner: Any, cell: Cell) -> dict[str, Any]:
        assert runner.device == "a device"
        self.asked.append(cell.method)
        found = self.answers.get(cell.method, measured(cell, 100.0, {"removal, adapter off": 100.0}))
        return {**found, **row(cell)}


def test_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked = Faked(monkeypatch)
    faked.answers = {"ssd": {"reason": "no luck"}, "salun": {"failed": "the process failed: killed"}}
    methods = ("uce", "ssd", "salun", "both")
    todo = [Cell("digitcanvas", method, "three", "eight", 0, ("removal",)) for method in methods]
    path = tmp_path / "table.json"

    def fill(cells: list[Cell]) -> None:
        table.fill(cells, path, tmp_path / "cells", 1, True, "a device")

    fill(todo[:3])
    fill(todo)  # what failed is run again, what cannot be is not
    assert faked.asked == ["uce", "ssd", "salun", "salun", "both"]
    fill([Cell("digitcanvas", "uce", "three", "eight", 0, ("removal", "completion"))])  # an attack that it lacks
    assert faked.asked[5:] == ["uce"]
    rates = {"pruning, 10 % of every weight": 0.0}  # a setting fewer than there are
    faked.answers["loku"] = measured(Cell("", "", "", "", 0), 100.0, rates)
    for _ in range(2):
        fill([Cell("digitcanvas", "loku", "three", "eight", 0, ("pruning",))])
    assert faked.asked[6:] == ["loku"] * 2
    kept = json.loads(
        (tmp_path / "cells" / f"{Cell('digitcanvas', 'loku', 'three', 'eight', 0).name}.json").read_text()
    )
    assert kept["metrics"]["UA"] == 100.0  # what the file has is gone on from, also in a new folder
    payload = json.loads(path.read_text())
    assert [found["method"] for found in payload["rows"]] == [*methods, "loku"]
    assert payload["settings"]["digitcanvas"]["both"] == table.settings_of("both", "digitcanvas")


def test_other_settings_are_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faked, path, folder = Faked(monkeypatch), tmp_path / "table.json", tmp_path / "cells"
    todo = [Cell("digitcanvas", method, "three", "eight", 0) for method in ("uce", "both")]
    table.fill(todo, path, folder, 1, True, "a device")
    for cell in todo:
        (folder / cell.name).mkdir()
        (folder / f"{cell.name}.json").write_text("{}")
    payload = json.loads(path.read_text())
    payload["settings"]["digitcanvas"]["both"]["overwrite.forget_weight"] += 1
    path.write_text(json.dumps(payload))
    table.fill(todo, path, folder, 1, True, "a device")
    assert faked.asked == ["uce", "both", "both"]
    assert (
        "both is measured anew on digitcanvas: other settings now: overwrite.forget_weight" in capsys.readouterr().err
    )
    assert sorted(found.name for found in folder.iterdir()) == [todo[0].name, f"{todo[0].name}.json"]
    assert json.loads(path.read_text())["settings"]["digitcanvas"] == {
        name: table.settings_of(name, "digitcanvas") for name in ("uce", "both")
    }
    path.write_text(json.dumps(payload | {"schema": table.SCHEMA - 1}))
    with pytest.raises(SystemExit, match="another version"):
        table.fill(todo, path, folder, 1, True, "a device")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_what_runs_and_begins_nothing(sent: signal.Signals, tmp_path: Path) -> None:
    """Really started: processes that wait stand in for the cells'."""
    program = f"""
import signal, subprocess, sys, types
from bench import table
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in what a shell started in the background
def waiting(command, **options):
    wait = "import os, time; os.write(1, b'up' + bytes([10])); time.sleep(99)"  # in one piece
    return subprocess.Popen([sys.executable, "-c", wait], **options)
table.subprocess = types.SimpleNamespace(Popen=waiting, PIPE=subprocess.PIPE)
table.main(["--quick", "--workers", "2", "--output", {str(tmp_path / "table.json")!r}, "--folder", {str(tmp_path)!r}])
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=table.ROOT
    ) as process:
        try:
            assert process.stdout is not None
            assert [process.stdout.readline() for _ in range(2)] == ["up\n"] * 2
            process.send_signal(sent)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode != 0 and "KeyboardInterrupt" in err and out == ""
    assert not (tmp_path / "table.json").exists()


def test_a_cell_without_a_number_has_a_reason() -> None:
    cells = [Cell("digitcanvas", method, "three", "eight", seed) for method in ("uce", "ssd") for seed in range(4)]
    rows = [measured(cell, 90.0 + cell.seed, {"completion, after 5": 10.0 * cell.seed, "completion, after 2": 0.0})
            for cell in cells[:4]]  # fmt: skip
    rows += [row(cell, reason="no cross-attention") for cell in cells[4:]]
    payload = {"rows": rows}
    header, uce, ssd = table.lines(payload, "digitcanvas")
    assert header == ["method", "cells", "UA", "IRA", "CRA", "drift", "attacks", "s", "MB", "kB"]
    assert uce[:3] == ["uce", "4", "91.5 (90-93)"] and uce[6] == "15 (0-30)" and uce[-3:] == ["2.5", "700", "46"]
    assert table.attack_lines(payload, "digitcanvas") == [["method", "completion"], ["uce", "15 (0-30)"]]
    assert ssd[:4] == ["ssd", "0", "cannot", "-"] and len(ssd) == len(header)
    text = table.markdown(payload)
    assert "| uce | 4 | 91.5 (90-93) |" in text and "- ssd on digitcanvas: no cross-attention" in text


def test_attacks_are_counted_once_each_and_taking_the_adapter_off_is_none() -> None:
    rates = {"removal, adapter off": 100.0, "pruning, 10 %": 0.0, "pruning, 30 %": 50.0, "completion, 5": 25.0}
    (header, line) = table.lines({"rows": [measured(Cell("m", "uce", "a", "b", 0), 100.0, rates)]}, "m")
    assert line[header.index("attacks")] == "37.5"
    (header, line) = table.lines({"rows": [measured(Cell("m", "uce", "a", "b", 0), 100.0)]}, "m")
    assert line[header.index("attacks")] == "-"


@pytest.mark.parametrize("count", [1, 5, 6, 9, 12, 24])
def test_the_range_has_the_median_with_95_percent(count: int) -> None:
    """Against the share of all ways in which `count` values can lie on both sides of the median."""
    text = table._middle([float(10 * n) for n in range(count)])
    low, high = (int(end) // 10 for end in text.partition("(")[2].rstrip(")").split("-")) if "(" in text else (0, 0)
    assert low == count - 1 - high

    def covered(low: int) -> float:  # values under the median: more than `low`, at most count - 1 - low
        return sum(math.comb(count, k) for k in range(low + 1, count - low)) / 2**count

    assert (covered(low) >= 0.95 and covered(low + 1) < 0.95) or (low == 0 and covered(0) < 0.95)


def test_steps_of_relearning_stand_beside_those_of_learning_anew() -> None:
    one = measured(
        Cell("m", "uce", "a", "b", 0), 100.0, {"relearning, 10 pictures, every layer, up to 200 steps": 100.0}
    )
    next(iter(one["attacks"].values())).update(steps_to_half=20, anew_steps_to_half=None)
    header, line = table.attack_lines({"rows": [one]}, "m")
    assert header[-1].startswith("relearning every layer") and line[-1] == "20 / never"
    next(iter(one["attacks"].values())).update(steps_to_half=0, anew_steps_to_half=5)
    assert table.attack_lines({"rows": [one]}, "m")[1][-1] == "0 / 5"  # it had not gone


def test_peers_have_the_settings_that_serve_them_best() -> None:
    study = sweep.STUDIES["peers"]
    best = sweep.best_by_method(study, json.loads((table.ROOT / study.output).read_text()))
    wanted = {method: {**study.recipes[recipe]} for method, recipe in best.items()}
    for changes in wanted.values():
        del changes["overwrite__method"]
    assert {method: changes for method, changes in wanted.items() if changes} == table.TUNED[study.model]


def test_beside_papers_every_number_stands_in_its_column() -> None:
    rows = [measured(Cell("emojicanvas", "leco", word, "", 0), 70.0) for word in ("tiger", "pizza", "apple")]
    rows[0]["metrics"]["UA"], rows[1]["metrics"]["UA"] = 20.0, 90.0
    rows += [measured(Cell("digitcanvas", "salun", "neon", "", 0), 40.0)]
    rows += [row(Cell("digitcanvas", "uce", "three", "", 0), reason="none")]
    lines = [[text.strip() for text in line.split("|")[1:-1]] for line in table.papers({"rows": rows}).splitlines()]
    columns = ["emojicanvas, objects", "emojicanvas, styles", "digitcanvas, digits", "digitcanvas, styles"]
    assert lines[0] == ["method", *columns, "UnlearnCanvas, objects", "styles"]
    by_method = {line[0]: line[1:] for line in lines[2:]}
    assert by_method["leco"] == ["70.0 / 99.0 / 98.5", "-", "-", "-", "-", "-"]
    assert by_method["salun"] == ["-", "-", "-", "40.0 / 99.0 / 98.5", "86.9 / 96.4 / 99.6", "86.3 / 90.4 / 95.1"]
    assert by_method["uce"][:4] == ["-", "-", "cannot", "cannot"]


def test_readme_quotes_the_committed_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copy(table.RESULTS, tmp_path)
    beside = [str(path) for path in (table.AUTHORS,) if path.exists()]
    assert table.main(["--show", "--markdown", "--output", str(copy), "--beside", *beside]) == 0
    text = (table.ROOT / "README.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in text, "put the output of `python -m bench.table --show --markdown` there"
    assert table.main(["--show", "--papers", "--output", str(copy), "--beside"]) == 0
    text = (table.ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in text, "put the output of `python -m bench.table --show --papers --beside` there"


def test_one_cell_is_made_judged_attacked_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell("digitcanvas", "closed-form", "three", "eight", 0)
    first = table.run_cell(cell, tmp_path)
    assert first["metrics"]["UA"] >= 95 and first["adapter_bytes"] > 1000 and "attacks" not in first
    seconds = first["seconds"]
    again = table.run_cell(Cell(*cell.key[:1], "closed-form", "three", "eight", 0, ("removal",)), tmp_path)
    assert again["seconds"] == seconds  # not made anew
    assert all(name.startswith("removal") for name in again["attacks"])
    assert all(counts["recognised"] > counts["pictures"] / 2 for counts in again["attacks"].values())
    assert set(again["interval_95"]) > {"UA", "IRA"} and "drift" in again["interval_95"] and again["change_95"]
    assert again["interval_95"]["UA"][0] <= again["metrics"]["UA"] <= again["interval_95"]["UA"][1]
    # A table that was copied without its folder, and since when an attack has other settings: it alone is made.
    file, (name,) = tmp_path / f"{cell.name}.json", again["attacks"]
    for change in ("attack", "metric", "interrupted"):
        if change == "interrupted":  # an adapter of other settings, which nothing has measured
            (tmp_path / cell.name / "measured.json").unlink()
        else:
            shutil.rmtree(tmp_path / cell.name)
        known = json.loads(json.dumps(again))
        known["seconds"], known["attacks"] = 1e6, {name: again["attacks"][name] | {"settings": {"older": 1}}}
        known["metrics"]["UA"] -= 50 * (change != "attack")
        file.write_text(json.dumps(known))
        assert not table._finished(known, Cell(*cell.key, ("removal",)))
        third = table.run_cell(Cell(*cell.key, ("removal",)), tmp_path)
        assert (third["attacks"], third["metrics"]) == (again["attacks"], again["metrics"])
        assert (third["seconds"] == 1e6) == (change == "attack")  # another adapter than the file's is measured anew
        assert table._finished(third, Cell(*cell.key, ("removal",))) and json.loads(file.read_text()) == third
    told = capsys.readouterr().err
    assert told.count(f"{cell.name} measures otherwise than before: all of it is made anew") == 2


def test_what_is_no_table_is_said(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(SystemExit, match="not a file of `python -m bench.table`"):
        table.main(["--show", "--output", str(path)])


def test_shown_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell("digitcanvas", "uce", "three", "eight", 0)
    path = tmp_path / "table.json"
    path.write_text(
        json.dumps({"schema": table.SCHEMA, "kind": "table", "rows": [measured(cell, 100.0, {"removal, off": 99.0})]})
    )
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
