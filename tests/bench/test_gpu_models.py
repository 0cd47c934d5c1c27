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


def test_a_run_that_meets_no_number_says_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    made = gpu_models.random_pipeline

    def broken(case: gpu_models.Case, device: str) -> object:
        pipeline = made(case, device)
        pipeline.unet.mid_block.attentions[0].proj_in.bias.data[3] = torch.nan
        return pipeline

    monkeypatch.setattr(gpu_models, "random_pipeline", broken)
    (row,) = gpu_models.run_case("toy", "cpu", ["distillation"])
    assert (row["case"], row["method"]) == ("toy", "distillation") and "NaN" in row["failed"]
    assert row["not_finite"]["output"][0] == "unet.mid_block.attentions.0.proj_in"


def test_the_first_gradient_that_is_no_number() -> None:
    class Root(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (torch.nn.Linear(2, 2) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(self.second(self.first(x)).mul(0).sqrt())

    root = Root()

    class Pipeline:
        components = {"root": root, "tokenizer": None}  # noqa: RUF012 - read only

    with gpu_models.first_not_finite(Pipeline()) as found:
        root(torch.ones(1, 2)).sum().backward()
    assert found == {"output": [], "gradient": ["root.second", "root.first"]}
    assert not any(module._forward_hooks for module in root.modules())


@pytest.mark.parametrize("program", [gpu_models, table])
def test_without_a_gpu_one_line_says_so(
    program: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        program.main(["--device", "cuda"])
    assert error.value.code == 2 and "there is no CUDA device here" in capsys.readouterr().err
