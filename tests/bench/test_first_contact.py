"""`python -m bench --first-contact` on the CPU: every step, what is written, and what a step that goes wrong leaves."""

import json

import pytest
import torch

from bench import __main__ as command
from bench import contact_steps, first_contact
from bench.first_contact import Contact, Skip, Step, run_step

HERE = "tests.bench.steps_that_fail"


def contact_with(tmp_path, function):
    found = Contact(tmp_path / "step.json", "cpu")
    run_step(f"{HERE}:{function}", found)
    return json.loads((tmp_path / "step.json").read_text())


def test_a_failing_part_is_recorded_and_the_step_goes_on(tmp_path, capsys):
    payload = contact_with(tmp_path, "fails")
    right, wrong, _ = payload["parts"]
    assert [part["status"] for part in payload["parts"]] == ["passed", "failed", "passed"]
    assert (wrong["exception"], wrong["message"], wrong["seen"], wrong["shape"]) == (
        "ValueError", "not the same", 7, "4 x 5",
    )  # fmt: skip
    assert "raise ValueError" in wrong["traceback"] and isinstance(right["seconds"], float)
    text = capsys.readouterr().out
    assert "FAILED wrong: ValueError: not the same" in text and "ok     after it: goes on" in text


def test_steps_end_as_they_end_and_the_run_goes_on(tmp_path, capsys):
    names = ("fails", "crashes", "hangs", "works")
    steps = [Step(name, f"that it {name}", f"{HERE}:{name}", 3 if name == "hangs" else 60) for name in names]
    path = tmp_path / "contact.json"
    first_contact.contact("cpu", path, 300, steps)
    payload = json.loads(path.read_text())
    assert payload["complete"] and payload["kind"] == "first contact" and payload["device"] == "cpu"
    found = {step["step"]: step for step in payload["steps"]}
    assert [found[name]["status"] for name in names] == ["failed", "crashed", "over its time", "passed"]
    assert [part["status"] for part in found["crashes"]["parts"]] == ["passed", "running"]
    assert "Fatal Python error: Aborted" in found["crashes"]["output"]
    assert found["crashes"]["exit_code"] < 0 and found["hangs"]["exit_code"] is None
    assert "output" not in found["works"]
    text = capsys.readouterr().out
    assert "crashed, in 'at the brink'" in text and "2/4 crashes: that it crashes" in text


def test_steps_that_find_no_time_are_left_out(tmp_path):
    now = iter(range(0, 1000, 100))
    payload = first_contact.contact("cpu", None, 50, [Step("late", "", f"{HERE}:works", 10)], clock=lambda: next(now))
    assert payload["steps"][0]["status"] == "left out"


def test_a_step_alone_by_the_command(tmp_path, capsys):
    path = tmp_path / "contact.json"
    assert command.main(["--first-contact", "--device", "cpu", "--only", "environment", "--output", str(path)]) == 0
    (only,) = json.loads(path.read_text())["steps"]
    parts = {part["part"]: part for part in only["parts"]}
    assert parts["machine"]["torch"] == torch.__version__ and parts["machine"]["build"]
    assert parts["device"]["status"] == "skipped"
    assert "1/1 environment: driver, device" in capsys.readouterr().out


# Compiling needs a second, the environment is seen above, and Triton's interpreter a process of its own.
@pytest.mark.parametrize(
    "step", [step for step in first_contact.STEPS if step.name not in ("environment", "compiling", "layers")],
    ids=lambda step: step.name,
)  # fmt: skip
def test_every_step_does_what_it_can_without_a_gpu(step, tmp_path):
    found = Contact(tmp_path / "step.json", "cpu")
    run_step(step.run, found)
    wrong = [part for part in found.payload["parts"] if part["status"] not in ("passed", "skipped")]
    assert not wrong, wrong
    assert any(part["status"] == "passed" for part in found.payload["parts"]) or step.name == "memory"


def test_survival_is_the_share_of_the_exact_term():
    base, term = (torch.randn(64, 32, dtype=torch.float64) for _ in range(2))
    for share in (0.0, 0.4, 1.0):
        found, error = contact_steps.survived(base + share * term, base, base + term, dim=-1)
        assert found == pytest.approx(share, abs=1e-9) and error < 1e-9


def test_a_skipped_part_says_why(tmp_path, capsys):
    found = Contact(tmp_path / "step.json", "cpu")
    with found.part("device"):
        raise Skip("no GPU")
    assert found.payload["parts"][0]["status"] == "skipped" and not found.failed
    assert "-      device: no GPU" in capsys.readouterr().out
