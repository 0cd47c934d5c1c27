"""Every benchmark behind one command.

    python -m bench --output FILE.json          on a CUDA machine: build, test, measure everything
    python -m bench --device cpu --output FILE  the tables of the CPU kernels
    python -m bench --first-contact [--output FILE.json]   the first five minutes on a GPU machine: what works, and why
                                                what does not (--device cpu: what can be known without one)
    python -m bench model [--chip h200]         what the roofline model predicts; nothing is measured
    python -m bench show FILE                   print a result file's tables and targets, also of a run cut short
    python -m bench plot FILE... [--output PNG] draw results, predictions beside measurements
    python -m bench compare A B                 what differs between two results

A GPU run ends within its budget by making fewer repetitions, never by leaving a table out, and writes its file after
every row. Measuring happens in a process of its own: a candidate that ends it is left out of later rows.
"""

import argparse
import importlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from bench import checks, gpu_tables, targets
from bench.harness import ROOT, DeviceLostError, environment
from bench.plans import Budget, Plan, run_plans
from bench.results_file import BadResultsError, Results, Table, show
from bench.roofline import CHIPS, GRAPH_LAUNCH, Chip
from fade_kernels import registration

NO_GPU = """There is no CUDA device here, so the GPU tables cannot be measured.
  python -m bench --first-contact                   finds out why, where there should be one
  python -m bench --device cpu --output FILE.json   measures the CPU kernels
  python -m bench model                             prints what is predicted for a GPU"""
EXIT_NO_GPU, EXIT_RED = 2, 1

# Shares of the budget that a step may take at most, and the share that they leave to the tables.
MOST_BUILD, MOST_TESTS = 0.35, 0.45
MOST_SANITIZER = {"memcheck": 0.12, "racecheck": 0.08}
LEAST_TABLES = 0.4
HANGING = 120.0  # seconds without a candidate's first result after which the measuring process is ended
MOST_RESTARTS = 16
RESERVE = 6.0  # seconds kept for the end of the run


def gpu_plans(toy: bool) -> list[Plan]:
    """Every table of a GPU run; the stages where diffusers is there to make a model."""
    plans = gpu_tables.plans(gpu_tables.TOY if toy else gpu_tables.FULL)
    if find_spec("diffusers") is not None:
        from bench import bench_gpu_stages as stages

        last = next(i for i, plan in enumerate(plans) if plan.name == "selection")
        plans.insert(last, stages.plan(stages.TOY) if toy else stages.plan())
    return plans


def measure(
    results: Results,
    device: torch.device,
    seconds: float,
    plans: Sequence[Plan],
    chip: Chip = CHIPS["h200"],
    unit: str = "matrix",
    show: Callable[[Table], None] = lambda table: None,
) -> None:
    """Measures in this process what the results lack; the ceilings, of `unit` for products, enter the predictions."""
    if find_spec("peft") is not None:
        importlib.import_module("peft")  # seconds that belong to no row
    budget = Budget(seconds)
    ceilings = [plan for plan in plans if plan.name == "ceilings"]
    rest = [plan for plan in plans if plan.name != "ceilings"]
    if ceilings:
        run_plans(ceilings, results, device, chip, Budget(min(seconds, 10.0)))
        chip = gpu_tables.measured_chip(results.table("ceilings"), chip, unit)
        name = results.payload["environment"].get("gpu") or chip.name
        results.payload["chip"] = vars(replace(chip, name=str(name)))
    run_plans(rest, results, device, chip, budget, show)


def supervise(path: Path, budget: Budget, device: str, toy: bool, hanging: float = HANGING) -> list[str]:
    """Lets worker processes fill the file at `path` until it is complete; returns what went wrong on the way.

    A worker that dies, or gives no sign for `hanging` seconds, is ended. Another worker goes on without the candidate
    that did it; where that is not known, without the row, which is recorded as failed.
    """
    troubles: list[str] = []
    for _ in range(MOST_RESTARTS):
        seconds = max(0.0, budget.remaining() - RESERVE)
        command = [sys.executable, "-m", "bench", "--worker", "--output", str(path), "--device", device]
        command += ["--budget", str(seconds), *(["--toy"] if toy else [])]
        worker = subprocess.Popen(command, cwd=ROOT)
        try:
            reason = _wait(worker, Results(path, {}).pulse, hanging)
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        if reason is None:
            return troubles
        results = Results.load(path)
        current = results.payload.pop("current", None)
        if current is None:
            troubles.append(f"the measuring process {reason} before its first row")
            return troubles
        candidate = results.pulse.read_text(encoding="utf-8") if results.pulse.exists() else ""
        where = f"{current['table']}, {current['row']}" + (f", {candidate}" if candidate else "")
        troubles.append(f"{where}: the measuring process {reason}")
        if candidate:
            results.crashed.append(candidate)
            results.save()
        else:
            table = results.table(current["table"])
            results.add_row(table, current["row"], 0, {table["base"]: {"error": f"the process {reason}"}})
    return troubles


def _wait(worker: subprocess.Popen, pulse: Path, hanging: float) -> str | None:
    """None when the worker is done; else what became of it."""
    started = time.time()
    while True:
        try:
            code = worker.wait(timeout=0.5)
            return None if code == 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            last = max(pulse.stat().st_mtime, started) if pulse.exists() else started
            if time.time() - last > hanging:
                return f"gave no sign for {hanging:g} s"


def run_steps(results: Results, budget: Budget, seconds: float, arguments: argparse.Namespace) -> None:
    """Builds and tests, as far as asked for, and records every step. The tables keep their share of the time."""
    steps = results.payload["steps"]

    def limit(share: float) -> float:
        return max(1.0, min(share * seconds, budget.remaining() - LEAST_TABLES * seconds))

    def record(name: str, step: checks.Step) -> None:
        steps[name] = step
        results.save()
        extra = f" ({'; '.join(step['summary'])})" if step.get("summary") else ""
        print(f"{name}: {step['status']} in {step['seconds']:.1f} s{extra}", flush=True)
        if step["status"] in ("failed", "unfinished"):
            print("  " + "\n  ".join(step["output"].strip().splitlines()[-15:]))

    if arguments.build:
        record("build", checks.build(limit(MOST_BUILD)))
    if arguments.tests:
        record("tests", checks.gpu_tests(limit(MOST_TESTS)))
        for tool, share in MOST_SANITIZER.items() if arguments.sanitizers else ():
            record(f"sanitizer {tool}", checks.sanitizer(tool, limit(share)))


def finish(results: Results, speedups: bool) -> None:
    """Prints every table and, with `speedups`, ratios and targets; completes the file."""
    for table in results.tables:
        if table["name"] == "ceilings":
            _show_ceilings(table)
        else:
            show(table, speedups)
        for row in table["rows"]:
            for column, cell in row["cells"].items():
                if "error" in cell:
                    print(f"  {row['row']}: {column}: {cell['error'].splitlines()[0][:150]}")
    for operator in results.payload.get("definitions", ()):
        print(f"  not ours: fade_kernels::{operator} ran as its definition, because its kernel cannot run here")
    found = targets.evaluate(results) if speedups else []
    if found:
        targets.show(found)
        targets.show_unanswered(results)
    results.payload |= {"targets": found, "speedups": speedups}


def _show_ceilings(table: Table) -> None:
    chip: Chip = gpu_tables.measured_chip(table, CHIPS["h200"])
    print(
        f"\nceilings here: {chip.bandwidth / 1e12:.3g} TB/s copied, {chip.matrix / 1e12:.3g} TFLOP/s in a large product"
    )


def run_gpu(arguments: argparse.Namespace) -> int:
    budget = Budget(arguments.budget)
    results = Results(arguments.output, {"kind": "gpu", "budget": arguments.budget})
    results.payload["environment"] = {}
    results.save()
    run_steps(results, budget, arguments.budget, arguments)
    troubles, complete = ["the run was stopped"], False
    try:
        troubles = supervise(results.path, budget, arguments.device, arguments.toy)
        complete = True
    finally:
        results = Results.load(results.path)
        results.payload["troubles"] = troubles
        results.payload["seconds"] = arguments.budget - (budget.end - time.perf_counter())
        passed = checks.green(results.payload["steps"])
        finish(results, speedups=passed and not arguments.toy)
        results.payload["complete"] = complete
        results.save()
        results.pulse.unlink(missing_ok=True)
    for trouble in troubles:
        print(f"trouble: {trouble}")
    if not passed:
        print("\nThe GPU tests have not passed, so times are recorded but no speed-up is printed.")
    print(f"written to {results.path} after {results.payload['seconds']:.0f} s")
    return 0 if passed and not troubles else EXIT_RED


def run_worker(arguments: argparse.Namespace) -> int:
    """The process that measures: fills the file it is given."""
    results = Results.load(arguments.output)
    results.payload["environment"] = results.payload["environment"] or environment()
    try:
        measure(results, torch.device(arguments.device), arguments.budget, gpu_plans(arguments.toy))
    except DeviceLostError as error:
        print(f"the device is lost to this process: {error}", file=sys.stderr)
        return EXIT_RED
    finally:
        before = results.payload.get("definitions", ())
        results.payload["definitions"] = sorted({*before, *registration.served_by_definitions()})
        results.save()
    return 0


def run_cpu(arguments: argparse.Namespace) -> int:
    from bench import cpu_tables

    results = Results(arguments.output, {"kind": "cpu", "budget": arguments.budget, "environment": environment()})
    results.save()
    plans, device = cpu_tables.plans(arguments.toy), torch.device("cpu")
    measure(results, device, arguments.budget, plans, cpu_tables.CHIP, "fp32", _progress)
    finish(results, speedups=not arguments.toy)
    results.payload["complete"] = True
    results.save()
    if results.path is not None:
        results.pulse.unlink(missing_ok=True)
        print(f"written to {results.path}")
    return 0


def _progress(table: Table) -> None:
    print(f"measured: {table['name']}", flush=True)


def _measuring_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for everything (default: %(default)s)")
    parser.add_argument(
        "--first-contact", action="store_true", help="look at everything once, in order of likely trouble"
    )
    parser.add_argument("--no-build", dest="build", action="store_false", help="take the extension as it is")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="no tests, and so no speed-ups")
    parser.add_argument("--no-sanitizers", dest="sanitizers", action="store_false", help="leave the time to the tables")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: a test of this program, not of speed")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _command(name: str, rest: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}")
    if name == "model":
        from bench import model

        parser.add_argument("--chip", choices=CHIPS, default="h200")
        parser.add_argument("--bandwidth", type=float, help="TB/s, instead of the chip's")
        parser.add_argument("--matrix", type=float, help="PFLOP/s of large bf16 products, instead of the chip's")
        parser.add_argument("--launch", type=float, help="microseconds a launch, instead of the chip's")
        parser.add_argument("--no-cache", action="store_true", help="everything is read from device memory")
        parser.add_argument("--graph", action="store_true", help="1 microsecond a launch, as within a CUDA graph")
        parser.add_argument(
            "--host", action="store_true", help="a step takes at least the time of the host in eager mode"
        )
        parser.add_argument("--tables", action="store_true", help="also every table of a GPU run, predicted")
        parser.add_argument("--json", action="store_true", help="print the summary and the targets as JSON")
        parser.add_argument("--output", type=Path, help="JSON file to write the predicted tables to")
        arguments = parser.parse_args(rest)
        given = {
            "bandwidth": (arguments.bandwidth, 1e12),
            "matrix": (arguments.matrix, 1e15),
            "launch": (1e6 * GRAPH_LAUNCH if arguments.graph else arguments.launch, 1e-6),
            "cache_bytes": (0.0 if arguments.no_cache else None, 1.0),
        }
        changes = {field: value * unit for field, (value, unit) in given.items() if value is not None}
        model.main(
            replace(CHIPS[arguments.chip], **changes),
            arguments.output,
            model.measured_host() if arguments.host else None,
            tables=arguments.tables,
            as_json=arguments.json,
        )
    elif name == "show":
        parser.add_argument("file", type=Path)
        parser.add_argument("--markdown", action="store_true", help="print the tables as docs/engine.md has them")
        arguments = parser.parse_args(rest)
        results = Results.load(arguments.file)
        if arguments.markdown:
            from bench import measured

            print(measured.markdown(results), end="")
            return 0
        finish(results, speedups=results.payload["kind"] != "gpu" or checks.green(results.payload["steps"]))
    elif name == "plot":
        from bench import plots

        parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
        parser.add_argument("--output", type=Path, help="PNG to write (default: the first file's name with .png)")
        arguments = parser.parse_args(rest)
        print(plots.draw(arguments.files, arguments.output))
    else:
        from bench import compare

        parser.add_argument("before", type=Path)
        parser.add_argument("after", type=Path)
        parser.add_argument("--all", action="store_true", help="also what did not change beyond the quantiles")
        arguments = parser.parse_args(rest)
        compare.main(arguments.before, arguments.after, arguments.all)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ("model", "show", "plot", "compare"):
        try:
            return _command(argv[0], argv[1:])
        except BadResultsError as error:
            print(error, file=sys.stderr)
            return EXIT_RED
    if "--first-contact" in argv:
        from bench import first_contact

        return first_contact.command([argument for argument in argv if argument != "--first-contact"])
    arguments = _measuring_parser().parse_args(argv)
    if arguments.worker:
        return run_worker(arguments)
    # The measuring process must end with this one, also when this one is told to stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_RED))
    if arguments.device == "cpu":
        return run_cpu(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return EXIT_NO_GPU
    arguments.output = (arguments.output or ROOT / "bench" / "results" / "gpu.json").resolve()
    return run_gpu(arguments)


if __name__ == "__main__":
    sys.exit(main())
