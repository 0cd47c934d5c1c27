"""`python -m bench model`, `plot` and `compare`: what is made of result files."""

import json

import pytest

from bench import __main__ as command
from bench import compare, model, results_file, roofline
from bench.harness import ROOT


def write(path, kind="gpu", **medians):
    cells = {
        name: {"median": m, "low": 0.9 * m, "high": 1.1 * m, "fastest": m, "repeats": 21, "predicted": m / 2}
        for name, m in medians.items()
    }
    rows = [{"row": "4 x 5 -> 6", "count": 3, "cells": cells}]
    table = {"name": "linear", "title": "linear layers", "mode": "training", "base": "frozen", "rows": rows}
    path.write_text(json.dumps({"schema": 1, "kind": kind, "environment": {}, "tables": [table]}))
    return path


def test_model_prints_bounds_predictions_and_targets(capsys):
    assert command.main(["model", "--bandwidth", "2", "--launch", "0"]) == 0
    text = capsys.readouterr().out
    assert "2 TB/s, 0.77 PFLOP/s, 0 us" in text and "predicted, not measured" in text
    for name in ("SD 1.5", "SDXL", "SD 3.5 large", "FLUX.1"):
        assert f"{name}, attention linears, forward + backward" in text
    lines = {line[:60].strip(): line for line in text.splitlines()}
    for mode in ("lower bound: gradient of every weight", "ours, one-product, kept, random 10 % or 1 %"):
        assert mode in lines
    assert "SD 1.5 attention, batch 8, 512 px" in text and "reached" in text and "missed" in text


def test_model_tables_are_a_result_file(tmp_path, capsys):
    path = tmp_path / "model.json"
    assert command.main(["model", "--tables", "--no-cache", "--output", str(path)]) == 0
    text = capsys.readouterr().out
    assert "4.18 (4.2)" in text and "4096 x 320 -> 320" in text.replace("32768", "4096")
    payload = results_file.load(path)
    assert payload["kind"] == "model" and payload["complete"] and payload["targets"]
    cell = payload["tables"][1]["rows"][0]["cells"]["frozen"]
    assert cell["bound"] > cell["median"]


def test_model_as_json_counts_the_host_where_asked(capsys):
    found = {}
    for options in ((), ("--host",), ("--graph",)):
        assert command.main(["model", "--json", *options]) == 0
        payload = json.loads(capsys.readouterr().out)
        rows = {row["mode"]: row for row in payload["models"]["SD 1.5"]}
        found[options] = rows["ours, one-product, kept, random 10 % or 1 %"]
        assert set(found[options]["over_bound"]) == {"0.85", "0.65", "0.5"}
    assert found[()]["seconds"]["0.85"] < found["--host",]["host_seconds"] == found["--host",]["seconds"]["0.85"]
    assert found["--graph",]["seconds"]["0.85"] < found[()]["seconds"]["0.85"]
    for row in found.values():
        assert row["goal_reached"]["0.85"] == (row["over_bound"]["0.85"] <= 1.25)


def test_host_times_come_from_their_measurement(tmp_path):
    path = tmp_path / "host.json"
    assert model.measured_host(path) == roofline.HOST
    rows = {"fused, forward + backward": {"processor": 1e-4}, "frozen, forward + backward": {"processor": 3e-5}}
    path.write_text(json.dumps({"tables": {"gpu": rows}}))
    assert model.measured_host(path) == {**roofline.HOST, "exact": 1e-4, "frozen": 3e-5}


def test_the_documentation_has_the_measured_tables(capsys):
    path = ROOT / "bench" / "results" / "gpu.json"
    assert command.main(["show", str(path), "--markdown"]) == 0
    text = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out in text, f"put the output of `python -m bench show {path.name} --markdown` there"


def test_plot_draws_measurements_and_predictions(tmp_path, capsys):
    files = [write(tmp_path / "a.json", frozen=1e-3, ours=2e-3), write(tmp_path / "m.json", "model", frozen=1e-3)]
    assert command.main(["plot", *map(str, files), "--output", str(tmp_path / "out" / "p.png")]) == 0
    assert (tmp_path / "out" / "p.png").read_bytes().startswith(b"\x89PNG")
    assert command.main(["plot", str(files[0])]) == 0
    assert (tmp_path / "a.png").exists()
    assert "a.png" in capsys.readouterr().out


def test_compare_flags_what_lies_beyond_the_quantiles(tmp_path, capsys):
    a = write(tmp_path / "a.json", frozen=1e-3, ours=2e-3, gone=1.0)
    b = write(tmp_path / "b.json", frozen=1.05e-3, ours=1e-3)
    found = {d.column: d for d in compare.differences(results_file.load(a), results_file.load(b))}
    assert found["frozen"].verdict == "" and found["frozen"].ratio == pytest.approx(1.05)
    assert found["ours"].verdict == "faster" and found["ours"].ratio == pytest.approx(0.5)
    assert command.main(["compare", str(a), str(b)]) == 0
    text = capsys.readouterr().out
    assert "linear: 4 x 5 -> 6: ours" in text and "linear: 4 x 5 -> 6: frozen" not in text
    assert "2 cells in both: 0 slower, 1 faster" in text and "1 cells only in" in text
    assert command.main(["compare", str(b), str(a), "--all"]) == 0
    assert "slower" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [None, "{", '{"rows": []}', '{"schema": 99, "tables": []}', '{"schema": 1, "tables": []}']
)
def test_files_that_are_no_results(tmp_path, capsys, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert command.main(["plot", str(path)]) == 1
    assert "x.json" in capsys.readouterr().err
