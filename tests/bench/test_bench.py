"""`python -m bench` in toy sizes on the CPU: every table, the file, the budget, what happens to failures."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import checks, cpu_tables, gpu_tables, results_file, targets
from bench.harness import interleaved
from bench.masked_layer import ONE_PRODUCT, Mask, MaskedLayer, Provider, worst_error
from bench.plans import Budget, Plan, Prepared, Row, measure_row, predict_plans, run_plans
from bench.results_file import Results
from bench.roofline import CHIPS
from bench.shapes import Conv2d, Linear

CPU, CHIP = torch.device("cpu"), CHIPS["h200"]


def plan(rows, name="table", base="a"):
    return Plan(name, name, "forward", base, rows)


def row(name="row", count=1, error=None, **calls):
    return Row(name, count, lambda device: Prepared(calls, error, 0.1))


# --- the tables ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Every table of a GPU run in toy sizes, measured on the CPU with no time to spare."""
    results = Results(tmp_path_factory.mktemp("bench") / "gpu.json", {"kind": "gpu", "environment": {"gpu": "toy"}})
    command.measure(results, CPU, 0.0, gpu_tables.plans(gpu_tables.TOY))
    return Results.load(results.path)


def test_every_gpu_table_is_there_and_right(measured):
    expected = gpu_tables.plans(gpu_tables.TOY)
    assert {table["name"] for table in measured.tables} == {p.name for p in expected}
    for p in expected:
        table = measured.table(p.name)
        assert [r["row"] for r in table["rows"]] == [r.name for r in p.rows]
        for r in table["rows"]:
            for name, cell in r["cells"].items():
                assert "error" not in cell, (p.name, name, cell)
                assert not cell.get("wrong"), (p.name, r["row"], name, cell)
                assert cell["low"] <= cell["median"] <= cell["high"]


def test_no_time_means_one_repetition_and_no_missing_table(measured):
    assert {c["repeats"] for t in measured.tables for r in t["rows"] for c in r["cells"].values()} == {1}


def test_linear_tables_have_every_competitor(measured):
    names = results_file.columns(measured.table("linear / SD 1.5 / attention / training"))
    assert {"frozen", "PEFT dense", "PEFT default (fp32)", "naive, two products", "naive, one product"} <= set(names)
    for mask in ("random 10 %", "random 1 %", "tiles 10 %", "tiles 20 %"):
        assert {f"ours{regime}, {mask}" for regime in ("", *(f" {name}" for name in gpu_tables.FORCED))} <= set(names)
    assert "merged" in results_file.columns(measured.table("linear / SD 1.5 / attention / forward"))


def test_cells_carry_bytes_flops_and_a_prediction(measured):
    cell = measured.table("linear / SD 1.5 / attention / training")["rows"][0]["cells"]["frozen"]
    assert cell["flops"] == 2 * 2 * 10 * 32 * 48
    assert cell["bytes"] == 2 * 2 * (10 * 48 + 32 * 48 + 10 * 32)
    assert cell["predicted"] > 0
    assert "current" not in measured.payload


def test_the_model_fills_the_same_tables():
    results = Results(None, {})
    predict_plans(gpu_tables.plans(), results, replace(CHIP, cache_bytes=0.0))
    found = {target["what"]: target for target in targets.evaluate(results)}
    assert found["selection / reading four times"]["ratio"] == pytest.approx(1.0, abs=0.05)
    sd15 = results.table("linear / SD 1.5 / attention / training")
    assert results_file.ratio(sd15, "PEFT dense", "frozen") == pytest.approx(4.2, abs=0.05)
    assert sum(r["count"] for r in sd15["rows"]) == 128
    assert {"linear / FLUX.1 / other / training", "linear / SD 3.5 large / attention / forward"} <= {
        table["name"] for table in results.tables
    }


def test_cpu_run(tmp_path, capsys):
    path = tmp_path / "cpu.json"
    assert command.main(["--device", "cpu", "--toy", "--budget", "0", "--output", str(path)]) == 0
    payload = results_file.load(path)
    assert payload["complete"] and payload["kind"] == "cpu" and payload["environment"]["torch"] == torch.__version__
    assert [t["name"] for t in payload["tables"]] == [p.name for p in cpu_tables.plans(toy=True)]
    assert not any(
        c.get("wrong") or "error" in c for t in payload["tables"] for r in t["rows"] for c in r["cells"].values()
    )
    assert "masked" not in capsys.readouterr().err
    assert targets.cpu_targets()[0].evaluate(Results.load(path))["ratio"] > 0


# --- one layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize(
    "shape", [Linear(5, 33, 40, bias=True, count=1), Conv2d(2, 4, 6, 5, 3, 1, 1), Conv2d(2, 4, 6, 6, 1, 1, 1)], ids=str
)
def test_every_provider_computes_the_same_layer(shape, mode):
    problem = MaskedLayer(shape, [Mask(0.5), Mask(0.5, 32)], dtype=torch.float32, rank=3, scale=2.0)
    for provider in (
        *gpu_tables.BASELINES[:3],
        *gpu_tables.BASELINES[4:],
        Provider("ours", "random 50 %"),
        Provider("ours", "tiles 50 %"),
        *(Provider("ours", "random 50 %", regime) for regime in ONE_PRODUCT),
    ):
        assert worst_error(problem.step(provider, mode), problem.expected(provider, mode)) < 1e-5, provider.name


def test_errors_see_nan():
    assert worst_error([torch.tensor([1.0, float("nan")])], [torch.ones(2)]) != 0
    assert not worst_error([torch.tensor([float("nan")]), torch.ones(1)], [torch.ones(1), torch.ones(1)]) <= 0.1


# --- budget, failures, going on --------------------------------------------------------------------------------------


def test_rows_share_what_is_left():
    now = [100.0]
    budget = Budget(40, clock=lambda: now[0])
    assert budget.share(1, 4) == 10
    now[0] += 30
    assert budget.share(1, 2) == 5
    now[0] += 30
    assert budget.share(1, 1) == 0


def test_less_time_makes_fewer_repetitions():
    cells = measure_row(row(a=lambda: time.sleep(0.01)), "forward", CPU, CHIP, 0.12)
    assert 1 <= cells["a"]["repeats"] < 12
    assert measure_row(row(a=lambda: None), "forward", CPU, CHIP, 5.0)["a"]["repeats"] == 21


def test_a_failing_candidate_is_a_cell_and_a_wrong_one_is_marked():
    def fail():
        raise ValueError("does not fit")

    cells = measure_row(row(a=lambda: 0.0, b=lambda: 1.0, c=fail, error=lambda n, r: r), "forward", CPU, CHIP, 1)
    assert "wrong" not in cells["a"] and cells["b"]["wrong"] and cells["c"] == {"error": "ValueError: does not fit"}
    table = {"name": "t", "title": "t", "base": "a", "rows": [{"row": "r", "count": 1, "cells": cells}]}
    assert results_file.wrong(table) == ["b"]
    assert results_file.total(table, "c") is None
    assert not targets._sound(table, "b")


def test_wrong_results_and_red_tests_print_no_ratio(capsys):
    cell = {"median": 0.002, "low": 0.002, "high": 0.002, "repeats": 3}
    cells = {"a": cell, "b": cell | {"median": 0.001}, "c": cell | {"wrong": True}}
    table = {"name": "t", "title": "t", "base": "a", "rows": [{"row": "r", "count": 2, "cells": cells}]}
    results_file.show(table)
    lines = capsys.readouterr().out.splitlines()
    assert "x a" in lines[2] and lines[4].split()[:3] == ["b", "2", "0.5"] and "(WRONG)" in lines[5]
    results_file.show(table, speedups=False)
    assert "x a" not in capsys.readouterr().out


def test_a_run_goes_on_where_it_stopped(tmp_path):
    calls = []
    plans = [plan([row(name, a=lambda n=name: calls.append(n)) for name in ("one", "two")])]
    results = Results(tmp_path / "r.json", {})
    results.add_row(results.open_table("table", "table", "forward", "a"), "one", 1, {"a": {"median": 1.0}})
    run_plans(plans, Results.load(results.path), CPU, CHIP, Budget(0))
    assert set(calls) == {"two"}
    assert [r["row"] for r in Results.load(results.path).tables[0]["rows"]] == ["one", "two"]


def test_the_file_is_whole_after_every_row(tmp_path):
    seen = []

    def look():
        seen.append(json.loads((tmp_path / "r.json").read_text()))

    run_plans([plan([row("one", a=look), row("two", a=look)])], Results(tmp_path / "r.json", {}), CPU, CHIP, Budget(0))
    assert seen[0]["current"] == {"table": "table", "row": "one"} and not seen[0]["complete"]
    assert [r["row"] for r in seen[-1]["tables"][0]["rows"]] == ["one"]


def test_a_row_that_cannot_be_set_up_does_not_stop_the_others(tmp_path):
    def prepare(device):
        raise RuntimeError("out of something")

    results = Results(None, {})
    run_plans([plan([Row("one", 1, prepare), row("two", a=lambda: None)])], results, CPU, CHIP, Budget(0))
    first, second = results.tables[0]["rows"]
    assert first["cells"] == {"a": {"error": "RuntimeError: out of something"}} and "median" in second["cells"]["a"]


@pytest.mark.parametrize("candidate", ["", "b"])
@pytest.mark.parametrize(
    ("script", "what"), [("import sys; sys.exit(7)", "exit code 7"), ("import time; time.sleep(60)", "no sign")]
)
def test_a_worker_that_dies_or_hangs_loses_one_candidate_or_one_row(tmp_path, monkeypatch, script, what, candidate):
    path = tmp_path / "r.json"
    results = Results(path, {"current": {"table": "table", "row": "one"}})
    results.open_table("table", "table", "forward", "a")
    results.save()
    results.beat(candidate)
    scripts = iter([script, "pass"])
    started = []

    def popen(arguments, **kwargs):
        started.append(arguments)
        return subprocess_popen([sys.executable, "-S", "-c", next(scripts)], **kwargs)

    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(command.subprocess, "Popen", popen)
    troubles = command.supervise(path, Budget(5), "cpu", toy=True, hanging=1.0)
    assert len(started) == 2 and "--worker" in started[0]
    assert len(troubles) == 1 and what in troubles[0]
    after = Results.load(path)
    if candidate:
        assert after.crashed == ["b"] and not after.tables[0]["rows"]
        return
    (lost,) = after.tables[0]["rows"]
    assert lost["row"] == "one" and what in lost["cells"]["a"]["error"]


def test_a_candidate_that_ended_a_process_is_left_out():
    cells = measure_row(row(a=lambda: None, b=lambda: 1 / 0), "forward", CPU, CHIP, 1.0, crashed=["b"])
    assert "median" in cells["a"] and "left out" in cells["b"]["error"]


def test_a_stopped_run_keeps_and_shows_what_it_has(tmp_path, monkeypatch, capsys):
    path = tmp_path / "r.json"

    def stopped(path, *_):
        results = Results.load(path)
        cell = {"median": 0.25, "low": 0.25, "high": 0.25, "repeats": 3}
        results.add_row(results.open_table("table", "what was measured", "forward", "a"), "one", 1, {"a": cell})
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "supervise", stopped)
    arguments = SimpleNamespace(budget=5.0, output=path, device="cpu", toy=False, build=False, tests=False)
    with pytest.raises(KeyboardInterrupt):
        command.run_gpu(arguments)
    payload = results_file.load(path)
    assert payload["troubles"] == ["the run was stopped"] and not payload["complete"]
    assert "what was measured" in capsys.readouterr().out
    assert command.main(["show", str(path)]) == 0
    assert "what was measured" in capsys.readouterr().out


def test_steps_leave_the_tables_their_time(monkeypatch):
    limits = []
    monkeypatch.setattr(checks, "build", lambda limit: limits.append(limit) or checks._step("built", 0.0))
    monkeypatch.setattr(checks, "gpu_tests", lambda limit: limits.append(limit) or checks._step("passed", 0.0))
    monkeypatch.setattr(checks, "sanitizer", lambda tool, limit: limits.append(limit) or checks._step("passed", 0.0))
    now = [0.0]
    budget = Budget(100, clock=lambda: now[0])
    now[0] = 55.0  # what came before took long
    command.run_steps(Results(None, {}), budget, 100, SimpleNamespace(build=True, tests=True, sanitizers=True))
    assert limits == [5.0, 5.0, 5.0, 5.0]
    limits.clear()
    command.run_steps(Results(None, {}), budget, 100, SimpleNamespace(build=False, tests=True, sanitizers=False))
    assert limits == [5.0]


def test_interleaved_takes_turns():
    order = []
    timings = interleaved({n: lambda n=n: order.append(n) for n in "ab"}, repeats=2, warmup=1)
    assert "".join(order) == "ba" + "ab" + "ba"
    assert timings["a"].repeats == 2 and timings["a"].host is None


# --- what comes before the tables ------------------------------------------------------------------------------------


def test_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--output", "never.json"]) == 2
    message = capsys.readouterr().err
    assert "no CUDA device" in message and "--device cpu" in message and "bench model" in message


def test_status_of_the_gpu_tests(tmp_path, monkeypatch):
    path = tmp_path / "test_some.py"
    path.write_text("def test_some():\n    pass\n")
    step = checks.gpu_tests(60, str(path))
    assert step["status"] == "passed" and step["passed"] == 1 and step["seconds"] > 0
    for answer, status in {
        (1, "2 failed, 3 passed in 1s"): "failed",
        (0, "4 skipped in 1s"): "skipped",
        (5, "no tests ran"): "absent",
        (None, "..."): "unfinished",
        (2, "1 error in 1s"): "failed",
    }.items():
        monkeypatch.setattr(checks, "_run", lambda *_, answer=answer: answer)
        step = checks.gpu_tests(60, str(path))
        assert step["status"] == status
        assert not checks.green({"tests": step})


def test_what_went_well_leaves_one_line_and_what_did_not_its_output():
    said = "platform of this machine\n=== 3 passed in 1 s ===\n"
    assert checks._step("passed", 0.0, said)["output"] == "=== 3 passed in 1 s ==="
    assert checks._step("failed", 0.0, said)["output"] == said


def test_steps_that_cannot_be_done(monkeypatch):
    assert checks.gpu_tests(5, "tests/none.py")["status"] == "absent"
    monkeypatch.setattr(checks, "find_sanitizer", lambda: None)
    assert checks.sanitizer("memcheck", 5)["status"] == "unavailable"
    code, output = checks._run([sys.executable, "-S", "-c", "print(1, flush=True); import time; time.sleep(60)"], 1)
    assert code is None and output == "1\n"


def test_what_the_sanitizer_says(monkeypatch):
    monkeypatch.setattr(checks, "find_sanitizer", lambda: "tool")
    for answer, status in {
        (0, "bench.sanitized: done\n== ERROR SUMMARY: 0 errors"): "passed",
        (86, "== ERROR SUMMARY: 3 errors"): "failed",
        (0, "Device not supported"): "unavailable",
        (1, "Traceback (most recent call last)"): "unavailable",
        (None, ""): "unfinished",
    }.items():
        monkeypatch.setattr(checks, "_run", lambda *_, answer=answer: answer)
        step = checks.sanitizer("memcheck", 5)
        assert step["status"] == status
        assert checks.green({"tests": {"status": "passed"}, "sanitizer memcheck": step}) == (status != "failed")


def test_sanitized_selection_runs_everywhere():
    from bench import sanitized

    sanitized.cuda_library(CPU)
    sanitized.triton_kernels(CPU)


def test_a_run_without_passed_tests_is_red(tmp_path, monkeypatch, capsys):
    path = tmp_path / "r.json"
    monkeypatch.setattr(command, "supervise", lambda *_: [])
    arguments = SimpleNamespace(budget=5.0, output=path, device="cpu", toy=False, build=False, tests=False)
    assert command.run_gpu(arguments) == 1
    assert "no speed-up is printed" in capsys.readouterr().out
    assert results_file.load(path)["speedups"] is False


def test_stages_in_toy_size():
    pytest.importorskip("diffusers")
    from bench import bench_gpu_stages

    results = Results(None, {})
    run_plans([bench_gpu_stages.plan(bench_gpu_stages.TOY)], results, CPU, CHIP, Budget(0))
    (only,) = results.table("stages")["rows"]
    for name in ("ours", "authors"):
        assert set(only["cells"][name]["stages"]) == {"locate", "overwrite"} and only["cells"][name]["median"] > 0


def test_regimes_are_forced_and_given_back():
    from bench.masked_layer import _forced
    from fade_kernels import masked_lora

    for regime, expected in (("gather", "gather"), ("one-product", "auto"), ("one-product kept", "auto")):
        with _forced(regime):
            assert masked_lora._regime == masked_lora.REGIMES[expected]
        assert masked_lora._regime == masked_lora.REGIMES["auto"]
