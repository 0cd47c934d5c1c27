"""Does unlearning in bf16 forget as well in one product (`fade.training_mode`) as exactly? All DigitCanvas concepts.

    python -m bench.one_product                 what bench/results/one_product.json lacks, then table and verdict
    python -m bench.one_product --table         table and verdict of what is there

Every concept is unlearned in bf16 arithmetic on the CPU with both modes from the same seed, mask and latents, and its
adapter judged on the float32 model, so that what differs is the training alone. The file is written after every run:
started again, the study goes on. Beside both modes the table has the same runs in float32 (bench/results/methods.json).
"""

import argparse
import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench.sweep import ALL, RESULTS, STUDIES, Study, cells, sweep

METHODS = ("distillation", "both")
MODES = ("exact", "one-product")
METRICS = ("UA", "IRA", "CRA", "drift")
MOST_DRIFT = 1.05
"""Of one product, as a share of the exact mode's."""

STUDY = Study(
    RESULTS / "one_product.json",
    recipes={
        f"{method}, {mode}": {"overwrite__method": method, "overwrite__training_mode": mode}
        for method in METHODS
        for mode in MODES
    },
    pairs=ALL, seeds=(0, 1), keeps=(0.01,), draw=None, dtype="bfloat16",
)  # fmt: skip

Row = dict[str, Any]


def pairs_of(rows: Sequence[Row], method: str) -> dict[tuple[str, int], tuple[Row, Row]]:
    """The exact run and that in one product of every concept and seed that has both."""
    found: dict[tuple[str, int], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        named, _, mode = row["recipe"].partition(", ")
        if named == method:
            found[row["forget"], row["seed"]][mode] = row
    return {key: tuple(both[mode] for mode in MODES) for key, both in found.items() if both.keys() == set(MODES)}


def seed_spread(exact: dict[tuple[str, int], float]) -> float | None:
    """Standard deviation between the seeds of one concept, pooled over concepts; None where none has two seeds."""
    by_concept = defaultdict(list)
    for (concept, _), value in exact.items():
        by_concept[concept].append(value)
    several = [values for values in by_concept.values() if len(values) > 1]
    if not several:
        return None
    squares = sum(sum((value - mean(values)) ** 2 for value in values) for values in several)
    return math.sqrt(squares / sum(len(values) - 1 for values in several))


def comparison(rows: Sequence[Row], method: str) -> dict[str, Any] | None:
    """Paired differences, one product minus exact, of a method; None without a pair.

    Of every metric: both means, the mean difference with its standard error, and the `spread` between seeds of the
    exact runs. `holds`: accuracies fall by no more than that spread, or by one picture in all runs where seeds do not
    differ, and the drift is at most `MOST_DRIFT` of the exact mode's; None as long as no concept has two seeds.
    """
    pairs = pairs_of(rows, method)
    if not pairs:
        return None
    result: dict[str, Any] = {"runs": len(pairs)}
    for name in METRICS:
        exact = {key: pair[0][name] for key, pair in pairs.items()}
        differences = [pair[1][name] - pair[0][name] for pair in pairs.values()]
        average = mean(differences)
        deviation = math.sqrt(sum((d - average) ** 2 for d in differences) / max(1, len(differences) - 1))
        result[name] = {
            "exact": mean(exact.values()),
            "one-product": mean(exact.values()) + average,
            "difference": average,
            "standard_error": deviation / math.sqrt(len(differences)),
            "spread": seed_spread(exact),
        }
    if result["UA"]["spread"] is None:
        return {**result, "holds": None}
    # A run's fewest pictures behind an accuracy are the eight of a digit in every style.
    one_picture = 100 / (8 * len(pairs))
    accuracies = all(
        result[name]["difference"] >= -max(result[name]["spread"], one_picture) for name in ("UA", "IRA", "CRA")
    )
    drift = result["drift"]["one-product"] <= MOST_DRIFT * result["drift"]["exact"]
    return {**result, "holds": accuracies and drift}


def verdict(rows: Sequence[Row]) -> dict[str, Any]:
    """The comparison of each method, and whether all runs are there and hold."""
    found = {method: comparison(rows, method) for method in METHODS}
    whole = len(STUDY.pairs) * len(STUDY.seeds)
    complete = all(one is not None and one["runs"] == whole for one in found.values())
    return {**found, "complete": complete, "holds": complete and all(one["holds"] for one in found.values())}


def table(rows: Sequence[Row], float32: Sequence[Row]) -> Any:
    """A line for each mode of each method, the float32 runs of the same concepts and seeds, and the difference."""
    from rich.table import Table

    shown = Table(title="bf16 training judged in float32, means over concepts and seeds")
    for name in ("method", "training", "runs", *METRICS, "steps"):
        shown.add_column(name, justify="right" if name in ("runs", *METRICS, "steps") else "left")

    def add(method: str, name: str, group: Sequence[Row]) -> None:
        means = [f"{mean(row[metric] for row in group):.{4 if metric == 'drift' else 2}f}" for metric in METRICS]
        steps = f"{mean(row['training_steps'] for row in group):.1f}"
        shown.add_row(method, name, str(len(group)), *means, steps)

    for method in METHODS:
        pairs = pairs_of(rows, method)
        if not pairs:
            continue
        same = [
            row for row in float32
            if row["recipe"] == method and row["keep"] in STUDY.keeps and (row["forget"], row["seed"]) in pairs
        ]  # fmt: skip
        if same:
            add(method, "float32", same)
        for index, mode in enumerate(MODES):
            add(method, f"bf16, {mode}", [pair[index] for pair in pairs.values()])
        found = comparison(rows, method)
        digits = {name: 4 if name == "drift" else 2 for name in METRICS}
        shown.add_row(
            "", "difference ± its error", "",
            *(f"{found[n]['difference']:+.{digits[n]}f} ± {found[n]['standard_error']:.{digits[n]}f}" for n in METRICS),
        )  # fmt: skip
        if found["holds"] is not None:
            spreads = (f"{found[name]['spread']:.{digits[name]}f}" for name in METRICS)
            shown.add_row("", "spread between seeds", "", *spreads)
    return shown


def verdict_line(found: dict[str, Any]) -> str:
    """The verdict in one sentence."""
    runs = sum(found[method]["runs"] for method in METHODS if found[method])
    if not found["complete"]:
        return f"no verdict yet: {runs} of {len(METHODS) * len(STUDY.pairs) * len(STUDY.seeds)} pairs of runs"
    drifts = ", ".join(
        f"{100 * (d['one-product'] / d['exact'] - 1):+.1f} %" for d in (found[m]["drift"] for m in METHODS)
    )
    said = (
        "within the seeds' spread, drift within 5 %"
        if found["holds"]
        else "NOT within the seeds' spread and 5 % of drift"
    )
    return f"one product against exact: {said} (drift {drifts})"


def main() -> None:
    from rich.console import Console

    from bench.harness import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=STUDY.output)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--concepts", metavar="A;B", help="semicolon-separated concepts to run; default all")
    parser.add_argument("--table", action="store_true", help="run nothing")
    a = parser.parse_args()
    study = dataclasses.replace(STUDY, output=a.output)
    if not a.table:
        todo = [cell for cell in cells(study) if a.concepts is None or cell.forget in a.concepts.split(";")]
        sweep(study, todo, images=1, workers=a.workers)
    content = json.loads(study.output.read_text())
    content["verdict"] = verdict(content["rows"])
    write_json(study.output, content)
    methods = STUDIES["methods"].output
    float32 = json.loads(methods.read_text())["rows"] if methods.exists() else []
    console = Console(width=160)
    console.print(table(content["rows"], float32))
    console.print(verdict_line(content["verdict"]))


if __name__ == "__main__":
    main()
