"""The comparison of tilings, on the CPU in toy sizes: under Triton's interpreter, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness import ROOT


def run(output: Path, *kernels: str) -> tuple[int, str]:
    command = [
        sys.executable,
        "-m",
        "bench.tilings",
        "--device",
        "cpu",
        "--toy",
        "--jobs",
        "0",
        "--output",
        str(output),
    ]
    done = subprocess.run(
        [*command, "--kernels", *kernels], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True,
        text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_every_tiling_is_right_and_timed(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "tilings.json"
    code, output = run(path, "contraction", "one-product weight")
    assert code == 0, output
    payload = json.loads(path.read_text())
    assert payload["complete"] and payload["troubles"] == []
    assert {row["kernel"] for row in payload["rows"]} == {"contraction", "one-product weight"}
    for row in payload["rows"]:
        assert row["default"] == next(iter(row["candidates"]))
        assert all(cell["error"] < 1e-5 and cell["seconds"] > 0 for cell in row["candidates"].values())
        assert f"*{row['default']} " in output


def test_an_unknown_kernel_is_named(tmp_path: Path) -> None:
    code, output = run(tmp_path / "tilings.json", "nothing")
    assert code == 2 and "invalid choice: 'nothing'" in output


@pytest.mark.parametrize("program", ["bench.tilings", "bench.gpu_run"])
def test_without_a_gpu_one_line_says_so(program: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", program, "--device", "cuda", "--output", str(tmp_path / "none.json")]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device here" in done.stderr and "Traceback" not in done.stderr


def test_the_committed_file_is_of_a_gpu_and_right() -> None:
    payload = json.loads((ROOT / "bench" / "results" / "tilings.json").read_text())
    assert payload["complete"] and payload["environment"]["gpu"]
    errors = [cell["error"] for row in payload["rows"] for cell in row["candidates"].values() if "error" in cell]
    assert len(errors) > 500 and max(errors) < 2e-2
