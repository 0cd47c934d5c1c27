"""`bench.gpu_models` on a toy, on the CPU: what a row says, and that a case that fails is a row with its reason."""

import json
from pathlib import Path

import pytest
import torch

from bench import gpu_models, table


def test_a_row_has_what_was_planned_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "models.json"
    given = ["--case", "toy", "--device", "cpu", "--output", str(output)]
    assert gpu_models.main([*given, "--methods", "closed-form"]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert (row["case"], row["method"], row["steps"]) == ("toy", "closed-form", 0)
    for stage in gpu_models.STAGES:
        assert row["planned"][stage] > 0 and row["measured"][stage] > 0 and row["seconds"][stage] > 0
    assert row["others"] > 0 and "residual" in row["run"]
    assert "closed-form" in capsys.readouterr().out
    assert gpu_models.main([*given, "--methods", "none such"]) == 1
    (row,) = json.loads(output.read_text())["rows"]
    assert "none such" in row["failed"]


@pytest.mark.parametrize("program", [gpu_models, table])
def test_without_a_gpu_one_line_says_so(
    program: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        program.main(["--device", "cuda"])
    assert error.value.code == 2 and "there is no CUDA device here" in capsys.readouterr().err
