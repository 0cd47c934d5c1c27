"""What a benchmark run consists of, and the loop that measures it row by row within a budget.

A plan is one table: rows that each know how to set up their candidates and what the roofline model expects of them. The
loop does what the result file lacks, so that a run which was cut off, or whose process died, goes on where it stopped.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.harness import DeviceLostError, device_memory, interleaved, still_alive
from bench.results_file import Cell, Results
from bench.roofline import Chip, Cost

REPEATS = 21


@dataclass(frozen=True)
class Prepared:
    """One row set up on a device.

    Attributes:
        calls: candidate -> one step of it.
        error: relative error of a candidate's result; None: results are not compared.
        tolerance: error beyond which a candidate is wrong.
        memory: candidate -> extra bytes, where the device does not tell.
    """

    calls: Mapping[str, Callable[[], Any]]
    error: Callable[[str, Any], float] | None = None
    tolerance: float = 0.0
    memory: Callable[[str], int | None] | None = None


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        count: how often the model has it: its weight in totals.
        prepare: sets the candidates up on a device.
        costs: candidate -> what it moves and computes.
        bound: what no candidate that trains a masked layer can undercut, where that is known.
        weight: its share of the time, relative to other rows.
        repeats: timed rounds, where time allows.
        measure: does all of it instead of `prepare`, for candidates that are whole runs.
    """

    name: str
    count: int
    prepare: Callable[[torch.device], Prepared] | None = None
    costs: Callable[[Chip], Mapping[str, Cost]] = lambda chip: {}
    bound: Callable[[Chip], Cost | None] = lambda chip: None
    weight: float = 1.0
    repeats: int = REPEATS
    measure: Callable[[torch.device, Callable[[str], None]], dict[str, Cell]] | None = None


@dataclass(frozen=True)
class Plan:
    """One table. `mode`: which kernels of a Cost count ("forward" or "training"). `base`: column to compare with."""

    name: str
    title: str
    mode: str
    base: str
    rows: Sequence[Row]


class Budget:
    """Seconds that are left of a run, and how rows share them."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.end = clock() + seconds

    def remaining(self) -> float:
        return max(0.0, self.end - self._clock())

    def share(self, weight: float, of: float) -> float:
        """Seconds for work of this weight, out of what is left for work of weight `of`."""
        return self.remaining() * weight / max(of, weight)


def measure_row(
    row: Row, mode: str, device: torch.device, chip: Chip, seconds: float,
    beat: Callable[[str], None] = lambda candidate: None, crashed: Collection[str] = (),
) -> dict[str, Cell]:  # fmt: skip
    """Measures one row's candidates in about `seconds`: with less time fewer repetitions, at least one.

    A candidate that fails is a cell that says why; one whose result is wrong is timed and marked. `beat` is called
    with the name of each candidate before its first calls, and with "" before the timed ones. Candidates in `crashed`
    have ended a process before and are left out.

    Raises:
        DeviceLostError: the device can be used no more by this process.
    """
    if row.measure is not None:
        return row.measure(device, beat)
    start = time.perf_counter()
    cells: dict[str, Cell] = {}
    prepared = row.prepare(device)
    working, one_round = {}, 0.0
    for name, call in prepared.calls.items():
        if name in crashed:
            cells[name] = {"error": "left out: it ended the measuring process in an earlier row"}
            continue
        beat(name)
        try:
            cell: Cell = {}
            result = call()
            if prepared.error is not None:
                error = prepared.error(name, result)
                cell["relative_error"] = error
                if not error <= prepared.tolerance:
                    cell["wrong"] = True
            del result
            began = time.perf_counter()
            extra = device_memory(device, call)
            one_round += time.perf_counter() - began
            cell["extra_bytes"] = extra if prepared.memory is None else prepared.memory(name)
        except Exception as error:
            still_alive(device)
            cells[name] = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            continue
        cells[name] = cell
        working[name] = call
    beat("")
    # First calls compile kernels, which other rows then find compiled: half of a row's time stays its own.
    left = max(0.5 * seconds, seconds - (time.perf_counter() - start))
    affordable = int(left / max(one_round, 1e-6))
    try:
        timings = interleaved(
            working,
            repeats=max(1, min(row.repeats, affordable)),
            # One at least on a GPU: only then is it known for how long the host must be waited for.
            warmup=max(int(device.type == "cuda"), min(2, affordable // 4)),
            budget=left,
            device=device,
            least=max(1, min(3, affordable)),
        )
    except RuntimeError as error:
        still_alive(device)
        timings = {}
        cells |= {name: {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"} for name in working}
    costs, bound = row.costs(chip), row.bound(chip)
    for name, timing in timings.items():
        cells[name] |= asdict(timing)
        if bound is not None:
            cells[name]["bound"] = bound.seconds(chip, mode)
        if name in costs:
            cost = costs[name]
            expected = {"flops": cost.flops(mode), "bytes": cost.bytes(mode), "predicted": cost.seconds(chip, mode)}
            cells[name] |= expected
    return {name: cells[name] for name in prepared.calls}


def run_plans(
    plans: Sequence[Plan],
    results: Results,
    device: torch.device,
    chip: Chip,
    budget: Budget,
    show: Callable[[dict[str, Any]], None] = lambda table: None,
) -> None:
    """Measures every row that the results lack and saves after each; `show` gets every finished table.

    A row that cannot be set up is a row without cells. `current` in the file names the row being measured.

    Raises:
        DeviceLostError: as `measure_row`; what was measured is in the file.
    """

    def missing(plan: Plan) -> list[Row]:
        table = results.table(plan.name)
        done = {row["row"] for row in table["rows"]} if table else set()
        return [row for row in plan.rows if row.name not in done]

    left = sum(row.weight for plan in plans for row in missing(plan))
    for plan in plans:
        table = results.open_table(plan.name, plan.title, plan.mode, plan.base)
        todo = missing(plan)
        for row in todo:
            results.payload["current"] = {"table": plan.name, "row": row.name}
            results.save()
            results.beat("")
            seconds = budget.share(row.weight, left)
            try:
                cells = measure_row(row, plan.mode, device, chip, seconds, results.beat, results.crashed)
            except DeviceLostError:
                raise
            except Exception as error:
                still_alive(device)
                cells = {plan.base: {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}}
            left -= row.weight
            results.add_row(table, row.name, row.count, cells)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if todo:
            show(table)
    results.payload.pop("current", None)
    results.save()


def predict_plans(plans: Sequence[Plan], results: Results, chip: Chip) -> None:
    """Fills the same tables with the model's seconds instead of measured ones."""
    for plan in plans:
        table = results.open_table(plan.name, plan.title, plan.mode, plan.base)
        for row in plan.rows:
            costs, bound = row.costs(chip), row.bound(chip)
            limit = {} if bound is None else {"bound": bound.seconds(chip, plan.mode)}
            cells = {
                name: {
                    "median": cost.seconds(chip, plan.mode),
                    "flops": cost.flops(plan.mode),
                    "bytes": cost.bytes(plan.mode),
                }
                | limit
                for name, cost in costs.items()
            }
            if cells:
                results.add_row(table, row.name, row.count, cells)
    results.payload["tables"] = [table for table in results.tables if table["rows"]]
