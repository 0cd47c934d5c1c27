"""Two and three processes really started, against one: sums, shares, errors, and whole runs on fresh random models."""

import json
import math
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fade import processes
from fade.errors import DivergedError, FadeError
from fade.files import read_tensors

from . import in_processes as jobs
from .conftest import tiny_pipeline
from .in_processes import Processes, fresh


@pytest.fixture(scope="module")
def started() -> Iterator[Processes]:
    """Three, of which two are a launcher's."""
    found = Processes(3)
    yield found
    found.stop()


def apart(first: np.ndarray, second: np.ndarray) -> float:
    """The relative difference, in the norm."""
    assert first.shape == second.shape
    return float(np.linalg.norm(first - second) / max(np.linalg.norm(second), 1e-30))


def same(first: np.ndarray, second: np.ndarray) -> bool:
    return first.dtype == second.dtype and first.tobytes() == second.tobytes()


# --- exchanges -------------------------------------------------------------------------------------------------------


def test_a_single_process_gets_back_what_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not processes.launched() and processes.speaks() and processes.local_rank() is None
    with processes.together():
        assert (processes.rank(), processes.world(), processes.first()) == (0, 1, True)
        given, record = {"a": object()}, {"kept": ("as", "it", "is")}
        assert all(a is b for a, b in zip(processes.from_first(given, record), (given, record), strict=True))
        assert processes.total([math.pi]) == [math.pi] and processes.everyones(3) == [3]
        assert processes.share(5) == slice(0, 5) and processes.own(range(2, 9)) == range(2, 9)


def test_sums(started: Processes) -> None:
    """Of tensors that are put together and of one too large for it, the same bits in both processes."""
    seed, shapes = fresh(), [(3, 4), (0, 2), (), (processes._AT_ONCE + 1,), (17,)]
    single = jobs.sums(seed, shapes)
    first, second = started.run(jobs.sums, seed, shapes)
    for alone, ours, theirs in zip(single, first, second, strict=True):
        assert same(ours, theirs)
        np.testing.assert_allclose(ours, 3 * alone, rtol=1e-2 if alone is single[-2] else 1e-6)


def test_exchanges(started: Processes) -> None:
    seed = fresh()
    alone = jobs.exchanged(seed)
    both = started.run(jobs.exchanged, seed)
    for rank, found in enumerate(both):
        assert found["record"] == {"rank": 0, "text": "naïve"}
        for name, tensor in alone["from_first"].items():
            assert same(found["from_first"][name], tensor)
        assert found["like_first"].tolist() == [0.0] * 4
        assert [part.tolist() for part in found["in_order"]] == [[[n] * (n + 1)] * 2 for n in range(5)]
        assert found["everyones"] == [[0, math.inf], [1, math.inf]]
        assert found["total"] == both[0]["total"] == pytest.approx([0.3, 2e-17], rel=1e-12)
        halves = [[share["share"][n] for share in both] for n in range(6)]
        assert [own + other for own, other in halves] == [list(range(n)) for n in range(6)]
        assert all(abs(len(own) - len(other)) <= 1 for own, other in halves), rank


ERRORS = [
    (FadeError("the folder is gone"), FadeError, "the folder is gone"),
    (DivergedError("loss became nan"), DivergedError, "loss became nan"),
    (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    (MemoryError("no room"), processes.OtherProcessError, r"process \d of 2 failed with MemoryError: no room"),
]


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize(("error", "kind", "message"), ERRORS, ids=[type(e).__name__ for e, _, _ in ERRORS])
def test_an_error_on_one_ends_all(
    started: Processes, where: int, error: BaseException, kind: type[BaseException], message: str
) -> None:
    for exchanges in (0, 2):
        answers = started.run(jobs.failing, where, error, exchanges)
        assert type(answers[where]) is type(error)
        assert type(answers[1 - where]) is kind
        with pytest.raises(kind, match=message):
            raise answers[1 - where]


def test_an_interrupt_waits_for_the_exchange_that_it_comes_into(started: Processes, tmp_path: Path) -> None:
    for where in (0, 1):
        answers = started.run(jobs.interrupted, where, str(tmp_path / str(where)))
        assert [type(answer) for answer in answers] == [KeyboardInterrupt] * 2


def test_a_process_that_is_killed_is_missed_at_once() -> None:
    pair, where = Processes(), fresh() % 2
    answers = pair.run(jobs.killed, where)
    pair.stop()
    assert answers[where] is None
    assert type(answers[1 - where]) is processes.LostProcessError
    assert "start all of them again, with --resume" in str(answers[1 - where])


# --- the stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "per_sample"), [("denoising", False), ("distillation", True), ("contrast", False)])
def test_saliency_is_that_of_one_process(started: Processes, kind: str, per_sample: bool) -> None:
    """Seven latents in batches of three, twice through: six batches; then one batch, which leaves a process without."""
    for batch_size, passes in ((3, 2), (7, 1)):
        changes = {
            "locate__saliency": kind, "locate__per_sample": per_sample, "locate__batch_size": batch_size,
            "locate__passes": passes,
        }  # fmt: skip
        seed = fresh()
        alone = jobs.saliencies(seed, changes)
        first, second = started.run(jobs.saliencies, seed, changes)
        for name, value in alone.items():
            assert same(first[name], second[name])
            np.testing.assert_allclose(first[name], value, rtol=1e-5, atol=1e-5 * value.mean(), err_msg=f"{seed}")


RUNS = {
    "factors": {},
    "values, solved before": {"overwrite__method": "both"},
    "solved alone": {"overwrite__method": "closed-form"},
    "computed as factors": {"overwrite__method": "uce"},
    "fresh noise at targeted times, accumulated": {
        "overwrite__pool": 0, "overwrite__accumulation": 2, "overwrite__timesteps": "targeted",
    },
    "halves of one sample, stopped by what is held out": {
        "overwrite__batch_size": 1, "overwrite__retain_batch_size": 1,
        "overwrite__stop_forget": 50.0, "overwrite__stop_flat": 0.9, "overwrite__stop_every": 2,
        "overwrite__cooldown_steps": 2, "overwrite__steps": 40,
    },
}  # fmt: skip


def check_alike(alone: dict[str, Any], several: list[dict[str, Any]], changes: dict[str, Any]) -> None:
    for one in several[1:]:
        assert all(same(a, b) for a, b in zip(several[0]["parameters"], one["parameters"], strict=True))
        assert not one["warnings"]
    for name, mask in alone["masks"].items():
        assert same(several[0]["masks"][name], mask)
    # Those of the difference between two predictions that are nearly the same, which is less exact than either.
    if alone["gradients"]:
        assert apart(several[0]["gradients"][0], alone["gradients"][0]) < 2e-4
        assert len(several[0]["gradients"]) == len(alone["gradients"])
    assert max(np.abs(change).max() for change in alone["changes"].values()) > 1e-3
    for name, change in alone["changes"].items():
        np.testing.assert_allclose(several[0]["changes"][name], change, rtol=1e-5, atol=2e-6)
    ours, theirs = alone["run"], several[0]["run"]
    assert theirs["processes"] == len(several) and "processes" not in ours
    assert len(ours["losses"]["forget"]) == len(theirs["losses"]["forget"])
    for half in ("forget", "retain"):  # as differences between predictions; of nothing learned they are rounding alone
        np.testing.assert_allclose(np.sqrt(theirs["losses"][half]), np.sqrt(ours["losses"][half]), rtol=1e-4, atol=1e-5)
    assert ours.get("stopped_by") == theirs.get("stopped_by")
    assert "cuda_graph" not in theirs or theirs["cuda_graph"].startswith("several processes train together")
    assert not any(one["group left"] for one in several)


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_run_is_that_of_one_process(started: Processes, changes: dict[str, Any]) -> None:
    seed = fresh()
    alone = jobs.unlearned(seed, changes)
    check_alike(alone, started.run(jobs.unlearned, seed, changes), changes)
    if "overwrite__stop_forget" in changes:
        assert alone["run"]["stopped_by"] == "forgotten" and alone["run"]["steps"] < 40


def test_groups_of_layers_are_those_of_all(started: Processes) -> None:
    """Within a memory budget: what is measured together must be the same on all processes."""
    seed, saliency = fresh(), {"locate__saliency": "distillation"}
    alone = jobs.unlearned(seed, saliency)
    budget = 1000
    for _ in range(2):  # too little for the accumulators, then for a backward pass beside them
        with pytest.raises(FadeError, match="it takes at least [0-9,]+ bytes") as told:
            jobs.unlearned(seed, saliency | {"locate__memory_budget": budget})
        budget = int(re.search("at least ([0-9,]+) bytes", str(told.value))[1].replace(",", ""))
    changes = saliency | {"locate__memory_budget": int(1.03 * budget)}
    several = started.run(jobs.unlearned, seed, changes)
    assert len(several[0]["run"]["saliency_plan"]["groups"]) > 1
    check_alike(alone, several, changes)


def test_three_processes_in_a_group_of_their_own(started: Processes) -> None:
    """Of two samples a step a third process has none; the group is used as it is and left."""
    seed, changes = fresh(), {
        "overwrite__batch_size": 1, "overwrite__retain_batch_size": 1, "overwrite__stop_forget": 1e-6,
    }  # fmt: skip
    alone = jobs.unlearned(seed, changes)
    several = started.run(jobs.in_own_group, jobs.free_port(), 3, jobs.unlearned, seed, changes, count=3)
    assert all(one.pop("group left") for one in several)
    check_alike(alone, [one | {"group left": False} for one in several], changes)


def test_the_same_latents_are_drawn(started: Processes, tmp_path: Path) -> None:
    seed = fresh()
    jobs.unlearned(seed, {}, tmp_path / "one")
    started.run(jobs.unlearned, seed, {}, tmp_path / "two")
    (one, record), (two, other) = (read_tensors(tmp_path / name / "latents.safetensors") for name in ("one", "two"))
    assert record == other and all(same(one[kind].numpy(), two[kind].numpy()) for kind in ("forget", "retain"))
    left = sorted(file.name for file in (tmp_path / "two").iterdir())
    assert left == ["adapter.safetensors", "latents.safetensors", "run.json"]
    assert json.loads((tmp_path / "two/run.json").read_text())["run"]["processes"] == 2


def test_pictures_are_read_by_the_first_alone(started: Processes, tmp_path: Path) -> None:
    seed = fresh()
    generator = np.random.default_rng(seed)
    for number in range(4):
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"a cat, number {number}")
    (tmp_path / "broken.png").write_bytes(b"none")
    changes = {"data__forget_images": str(tmp_path)}
    alone = jobs.unlearned(seed, changes)
    several = started.run(jobs.unlearned, seed, changes)
    assert any("unreadable" in warning for warning in several[0]["warnings"])
    check_alike(alone, several, changes)


def test_two_processes_go_on_with_what_one_began(started: Processes, tmp_path: Path) -> None:
    seed, output = fresh(), tmp_path / "out"
    alone = jobs.unlearned(seed, {})
    with pytest.raises(ArithmeticError):
        jobs.unlearned(seed, {}, output, stop_at=5)
    first, second = started.run(jobs.unlearned, seed, {}, output, resume=True)
    assert any("processes 1 -> 2" in warning for warning in first["warnings"])
    assert len(first["gradients"]) == len(second["gradients"]) == 2
    for name, change in alone["changes"].items():
        np.testing.assert_allclose(first["changes"][name], change, rtol=1e-5, atol=2e-6)
        assert same(first["changes"][name], second["changes"][name])


def test_one_process_goes_on_with_what_two_began(started: Processes, tmp_path: Path) -> None:
    seed, output = fresh(), tmp_path / "out"
    alone = jobs.unlearned(seed, {})
    first, second = started.run(jobs.unlearned, seed, {}, output, stop_at=5)
    assert type(second) is ArithmeticError
    assert type(first) is processes.OtherProcessError and "process 2 of 2" in str(first) and "lightning" in str(first)
    assert (output / "checkpoint.safetensors").is_file() and not (output / ".fade.lock").exists()
    resumed = jobs.unlearned(seed, {}, output, resume=True)
    assert any("processes 2 -> 1" in warning for warning in resumed["warnings"]) and len(resumed["gradients"]) == 2
    for name, change in alone["changes"].items():
        np.testing.assert_allclose(resumed["changes"][name], change, rtol=1e-5, atol=2e-6)


def test_an_adapter_for_each_concept(started: Processes, tmp_path: Path) -> None:
    """Made by two processes, then found finished."""
    seed = fresh()
    alone = jobs.unlearned_each(seed)
    made = started.run(jobs.unlearned_each, seed, tmp_path / "out")
    assert (tmp_path / "out/cat/adapter.safetensors").is_file() and (tmp_path / "out/three/run.json").is_file()
    found = started.run(jobs.unlearned_each, seed, tmp_path / "out", resume=True)
    for results in (*made, *found):
        for name, changes in alone.items():
            assert all(apart(results[name][layer], change) < 1e-5 for layer, change in changes.items())


def test_what_only_the_first_can_tell_is_told_to_all(started: Processes, tmp_path: Path) -> None:
    seed, used = fresh(), tmp_path / "used"
    used.mkdir()
    (used / "a file").touch()
    for changes, output, message in (
        ({}, used, "is in use; pass --overwrite"),
        ({"data__forget_images": str(tmp_path / "missing")}, None, "missing"),
        ({"overwrite__learning_rate": 1e30, "overwrite__steps": 30}, None, "start again with --overwrite"),
    ):
        answers = started.run(jobs.unlearned, seed, changes, output)
        assert type(answers[0]) is type(answers[1]) and isinstance(answers[0], FadeError)
        assert str(answers[0]) == str(answers[1]) and message.lower() in str(answers[0]).lower()


def test_different_requests_are_refused(started: Processes) -> None:
    answers = started.run(jobs.differing, fresh())
    assert all("asked for different runs" in str(answer) for answer in answers), answers


# --- the command line ------------------------------------------------------------------------------------------------


def test_a_module_that_a_launcher_starts_gives_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fade", "unlearn", "digitcanvas", "--no-such-option"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("fade", run_name="__main__")
    assert stop.value.code == 2


def test_the_command_line_speaks_once(started: Processes, tokenizer: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_pipeline(tokenizer, fresh()).save_pretrained(model)
    settings = tmp_path / "quick.toml"
    settings.write_text(
        "[data]\nforget_samples = 4\nretain_samples = 4\nsampling_steps = 2\n[overwrite]\nbatch_size = 2\n"
        'retain_batch_size = 2\nmethod = "distillation"\n'
    )
    output = tmp_path / "out"
    words = [
        "unlearn", str(model), "--forget", "cat", "--surrogate", "dog", "--template", "a picture of {}", "--output",
        str(output), "--config", str(settings), "--keep", "0.05", "--device", "cpu",
    ]  # fmt: skip
    (status, printed, told), (other, nothing, silent) = started.run(jobs.command, *words, "--steps", "4")
    assert (status, other) == (0, 0), told
    assert f"adapter: {output}" in printed and "overwriting" in told
    assert nothing == silent == ""
    assert (output / "adapter.safetensors").is_file()

    for more, expected in (
        ([], "is in use; pass --overwrite"),
        (["--overwrite", "--keep", "7"], "keep"),
        (["--overwrite", "--no-such-option"], "no-such-option"),
    ):
        (status, printed, told), (other, nothing, silent) = started.run(jobs.command, *words, *more)
        assert status == other == 2 and printed == nothing == silent == ""
        assert expected in told.lower() and told.startswith("error: ") and told.count("\n") == 1

    (status, _, told), (other, *quiet) = started.run(jobs.command, "inspect", str(output / "adapter.safetensors"))
    assert status == other == 2 and quiet == ["", ""]
    assert "fade inspect runs in one process" in told
