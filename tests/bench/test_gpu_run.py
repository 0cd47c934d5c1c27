"""Whole runs as they are timed on a GPU, here on the CPU with few steps."""

import json
from pathlib import Path

import pytest

from bench import gpu_run


def test_runs_are_judged_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.json"
    assert gpu_run.main(["--device", "cpu", "--only", "0", "--output", str(path)]) == 0
    (run,) = json.loads(path.read_text())["runs"]
    assert (run["method"], run["dtype"]) == gpu_run.RUNS[0][:2]
    assert run["UA"] >= 95 and run["IRA"] >= 95 and 0 < run["seconds"]["overwrite"] < run["seconds"]["all"]
    assert "closed-form, float32" in capsys.readouterr().out


def test_a_run_that_fails_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(gpu_run, "run", broken)
    path = tmp_path / "runs.json"
    assert gpu_run.main(["--device", "cpu", "--only", "0", "3", "--output", str(path)]) == 1
    runs = json.loads(path.read_text())["runs"]
    assert [run["failed"] for run in runs] == ["RuntimeError: no such device"] * 2
