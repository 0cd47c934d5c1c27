"""Every method beside every other: the same models, data, seeds, judges, metrics and attacks, from one command.

    python -m bench.table            everything: hours on two cores; what the file lacks is run, cell by cell
    python -m bench.table --quick    one concept and the quick attacks, in a quarter of an hour
    python -m bench.table --show     run nothing: print the table of a file (--markdown: as README has it)

A cell is one method on one concept with one seed. It is a process of its own, so that its memory is its own and a
failure is a line of the table with its reason. What it makes stays in `--folder` (adapter, attacks) until the file has
it; a run that is stopped goes on where it was, also within a cell's attacks. What depends on the base model alone, all
cells share (`kept` in that folder).

    {"schema": 1, "kind": "table", "environment", "quick", "rows": [
        {"model", "method", "forget", "surrogate", "seed", "seconds", "peak_memory_bytes", "adapter_bytes",
         "metrics": {name: number}, "base": {name: number}, "attacks": {"attack, setting": success rate in percent},
         "left_out": {attack: why}} | {..., "reason": why there is nothing}]}
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.files import ROOT, load_kind, write_json

SCHEMA = 1
RESULTS = ROOT / "bench" / "results" / "table.json"
AUTHORS = RESULTS.with_name("authors_package.json")
FOLDER = ROOT / "build" / "table"
SHOWN = ("UA", "IRA", "CRA", "NA", "drift", "KID")
"""Metrics of the printed table; the file has all that the evaluation measures."""
PICTURES = 8
"""That an attack draws."""
QUICK_ATTACKS = ("removal", "completion", "noise-probe", "quantising")
PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "digitcanvas": (
        ("three", "eight"), ("seven", "one"), ("four", "nine"), ("zero", "six"), ("neon", "plain"), ("ink", "pencil"),
    ),
    "emojicanvas": (
        ("tiger", "dog"), ("pizza", "taco"), ("apple", "tomato"), ("guitar", "violin"), ("castle", "cactus"),
        ("rocket", "airplane"), ("glossy", "flat"), ("ink", "twemoji"),
    ),
}  # fmt: skip
"""Concepts and what takes their place, by bundled model."""
TOLD = ("model", "method", "forget", "surrogate", "seed")
"""What tells a row from another."""
ATTACKED = {"digitcanvas": ("three", "neon"), "emojicanvas": ("tiger", "glossy")}
"""Concepts on which every attack is made, with the first seed."""


@dataclass(frozen=True)
class Cell:
    """One method on one concept; `attacks`: those that its adapter must stand."""

    model: str
    method: str
    forget: str
    surrogate: str
    seed: int
    attacks: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[Any, ...]:
        return self.model, self.method, self.forget, self.surrogate, self.seed

    @property
    def told(self) -> dict[str, Any]:
        """What a row says of it."""
        return dict(zip(TOLD, self.key, strict=True))

    @property
    def name(self) -> str:
        return "-".join(str(part).replace(" ", "_") for part in self.key)


def cells(quick: bool, methods: Sequence[str]) -> list[Cell]:
    """In the order in which an interrupted table is most worth having."""
    from fade.evaluation.attacks.registry import ATTACKS

    if quick:
        pair = PAIRS["digitcanvas"][0]
        return [Cell("digitcanvas", method, *pair, 0, QUICK_ATTACKS) for method in methods]
    return [
        Cell(model, method, forget, surrogate, seed, tuple(ATTACKS) if seed == 0 and forget in ATTACKED[model] else ())
        for seed in (0, 1)
        for model, pairs in PAIRS.items()
        for forget, surrogate in sorted(pairs, key=lambda pair, model=model: pair[0] not in ATTACKED[model])
        for method in methods
    ]


# --- one cell, in a process of its own -------------------------------------------------------------------------------


def run_cell(cell: Cell, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Unlearns, evaluates and attacks; what is in `folder` already is not done again."""
    import fade
    from fade import bundled
    from fade.errors import FadeError
    from fade.evaluation import evaluate
    from fade.evaluation.attacks import attack
    from fade.measure import measured

    made, path, kept = folder / cell.name, folder / f"{cell.name}.json", folder / "kept"
    row: dict[str, Any] = json.loads(path.read_text()) if path.exists() else cell.told
    pipeline = bundled.model(cell.model).load_pipeline().to(device)
    try:
        if "metrics" not in row:
            with measured(device) as cost:
                adapter = fade.unlearn(
                    pipeline, cell.forget, cell.surrogate, method=cell.method,
                    config=fade.Config().replace(seed=cell.seed), output=made, overwrite=True, progress=False,
                )  # fmt: skip
            row |= {"seconds": cost.seconds, "peak_memory_bytes": cost.peak_memory_bytes}
            row["adapter_bytes"] = (made / "adapter.safetensors").stat().st_size
            found = evaluate(pipeline, adapter, seeds=(cell.seed + 1,), cache=kept, progress=False)
            row |= {"metrics": found.metrics, "base": found.base, "notes": found.notes}
            write_json(path, row)
        elif cell.attacks:
            adapter = fade.load_adapter(pipeline, made / "adapter.safetensors")
        if cell.attacks:
            record = attack(
                pipeline, adapter, cell.attacks, pictures=PICTURES, record=made / "attacks.json", cache=kept,
                progress=False,
            )  # fmt: skip
            row["attacks"] = {f"{one.attack}, {one.setting}": one.rate for one in record.results}
            row |= {"unattacked": record.unattacked.rate, "left_out": record.left_out}
    except FadeError as reason:
        row["reason"] = str(reason)
    write_json(path, row)
    return row


# --- all of them -----------------------------------------------------------------------------------------------------


def _finished(row: dict[str, Any], cell: Cell) -> bool:
    if "reason" in row:
        return True
    known = {name.partition(",")[0] for name in row.get("attacks", {})} | set(row.get("left_out", {}))
    return "metrics" in row and set(cell.attacks) <= known


def _run(cell: Cell, folder: Path, device: str) -> dict[str, Any]:
    """The cell in its process; a process that fails leaves its last words as the reason."""
    command = [sys.executable, "-m", "bench.table", "--cell", json.dumps(asdict(cell)), "--folder", str(folder)]
    command += ["--device", device]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    path = folder / f"{cell.name}.json"
    if done.returncode == 0 and path.exists():
        return json.loads(path.read_text())
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
    return {**cell.told, "reason": f"the process failed: {last[0]}"}


def fill(
    todo: Iterable[Cell], output: Path, folder: Path, workers: int, quick: bool, device: str = "cpu"
) -> dict[str, Any]:
    """Runs what the file lacks, and writes it after every cell."""
    from bench.harness import environment
    from fade.progress import progress_bar

    empty = {"schema": SCHEMA, "kind": "table", "quick": quick, "rows": []}
    payload = load_kind(output, "table") if output.exists() else empty
    rows = {tuple(row[name] for name in TOLD): row for row in payload["rows"]}
    wanted = [cell for cell in todo if cell.key not in rows or not _finished(rows[cell.key], cell)]
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar("table", len(wanted), True) as advance, ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_run, cell, folder, device): cell for cell in wanted}
        for future in as_completed(futures):
            cell, row = futures[future], future.result()
            rows[cell.key] = row
            payload |= {"environment": environment(), "rows": list(rows.values())}
            write_json(output, payload)
            reached = row.get("reason") or f"UA {row['metrics']['UA']:.0f}, {row['seconds']:.0f} s"
            advance(f"{cell.method}, {cell.forget}: {reached}")
    return payload


# --- what is shown ---------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _middle(numbers: list[float]) -> str:
    """The median, and where there are several the range of the middle half."""
    if not numbers:
        return ""
    ordered = sorted(numbers)
    text = _number(median(ordered))
    if len(ordered) < 4:
        return text
    low, high = (_number(ordered[round(share * (len(ordered) - 1))]) for share in (0.25, 0.75))
    return text if low == high else f"{text} ({low}-{high})"


def _worst(row: dict[str, Any]) -> dict[str, float]:
    """Of each attack that a cell stood the setting that succeeds most, in percent."""
    found: dict[str, float] = {}
    for name, rate in row.get("attacks", {}).items():
        attack = name.partition(",")[0]
        found[attack] = max(rate, found.get(attack, 0.0))
    return found


def _attacked(row: dict[str, Any]) -> float | None:
    """Their mean over the attacks; without taking the adapter off, which brings the concept back by design."""
    rates = [rate for attack, rate in _worst(row).items() if attack != "removal"]
    return sum(rates) / len(rates) if rates else None


def _by_method(payload: dict[str, Any], model: str) -> Iterator[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """Of each method all its rows and those that have numbers."""
    rows = [row for row in payload["rows"] if row["model"] == model]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        yield method, own, [row for row in own if "metrics" in row]


def lines(payload: dict[str, Any], model: str) -> list[list[str]]:
    """Header and one line a method: metrics, the mean over attacks, seconds, MB of memory, kB of the file."""
    rows = [row for row in payload["rows"] if row["model"] == model]
    shown = [name for name in SHOWN if any(row.get("metrics", {}).get(name) is not None for row in rows)]
    header = ["method", "cells", *shown, "attacks", "s", "MB", "kB"]
    table = [header]
    for method, own, good in _by_method(payload, model):
        if not good:
            table.append([method, "0", own[0].get("reason", "not run"), *[""] * (len(header) - 3)])
            continue
        metrics = [[row["metrics"][name] for row in good if row["metrics"].get(name) is not None] for name in shown]
        attacked = [mean for mean in map(_attacked, good) if mean is not None]
        costs = [(row["seconds"], row["peak_memory_bytes"] / 1e6, row["adapter_bytes"] / 1e3) for row in good]
        columns = [*metrics, attacked, *map(list, zip(*costs, strict=True))]
        table.append([method, str(len(good)), *(_middle(column) or "-" for column in columns)])
    return table


def attack_lines(payload: dict[str, Any], model: str) -> list[list[str]]:
    """Header and one line a method: each attack, of its settings the one that succeeds most."""
    rows = [row for row in payload["rows"] if row["model"] == model]
    attacks = list(dict.fromkeys(attack for row in rows for attack in _worst(row)))
    table = [["method", *attacks]]
    for method, _, good in _by_method(payload, model):
        cells = []
        for attack in attacks:
            rates = [_worst(row)[attack] for row in good if attack in _worst(row)]
            refused = any(attack in row.get("left_out", {}) for row in good)
            cells.append(_middle(rates) or ("cannot" if refused else "-"))
        if set(cells) - {"-"}:
            table.append([method, *cells])
    return table


def markdown(payload: dict[str, Any]) -> str:
    """For each model a table, and one of every attack to unfold; and the reasons of what is not there."""
    text = []

    def add(table: list[list[str]]) -> None:
        header, *rows = table
        text.extend(["| " + " | ".join(header) + " |", "|---" * len(header) + "|"])
        text.extend("| " + " | ".join(row) + " |" for row in rows)
        text.append("")

    for model in dict.fromkeys(row["model"] for row in payload["rows"]):
        text += [f"{model}:", ""]
        add(lines(payload, model))
        attacks = attack_lines(payload, model)
        if len(attacks) > 1:
            text += [f"<details><summary>{model}, attack by attack</summary>", ""]
            add(attacks)
            text += ["</details>", ""]
    reasons = {(row["method"], row["model"]): row["reason"] for row in payload["rows"] if "reason" in row}
    text += [f"- {method} on {model}: {reason}" for (method, model), reason in reasons.items()]
    return "\n".join(text).rstrip() + "\n"


def draw(payload: dict[str, Any], path: Path) -> None:
    """What is kept against what attacks bring back, a point a method and model; a figure without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in payload["rows"]))
    figure = Figure(figsize=(7 * len(models), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for index, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), index + 1)
        for method, _, good in _by_method(payload, model):
            attacked = [mean for mean in map(_attacked, good) if mean is not None]
            if not attacked:
                continue
            x, y = median(row["metrics"]["IRA"] for row in good), median(attacked)
            forgets = median(row["metrics"]["UA"] for row in good) >= 95
            axes.plot(x, y, "o", color="#1f77b4" if forgets else "#bbbbbb")
            axes.annotate(method, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=8)
        axes.set(title=model, xlabel="IRA in percent", ylabel="attacks that succeed, mean in percent")
        axes.grid(alpha=0.3)
    figure.suptitle("right and below is better; grey: the concept is not forgotten (UA under 95)", fontsize=9)
    figure.savefig(path, dpi=120)


def defaults(quick: bool, device: str) -> tuple[Path, Path]:
    """File and folder, others for each device: what one took is not to stand beside what another did."""
    beside = "-gpu" if device == "cuda" else ""
    return RESULTS.with_name(f"table{'-quick' if quick else ''}{beside}.json"), FOLDER.with_name(f"table{beside}")


def main(argv: Sequence[str] | None = None) -> int:
    import torch

    from bench.harness import print_table
    from fade.methods import METHODS

    parser = argparse.ArgumentParser(
        prog="python -m bench.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one concept, the quick attacks")
    parser.add_argument("--output", type=Path, help="file to fill (default: bench/results/table[-quick][-gpu].json)")
    parser.add_argument("--folder", type=Path, help="where adapters are kept meanwhile (default: build/table[-gpu])")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where a cell runs (default: cpu)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help="only these")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--markdown", action="store_true", help="print as README has it")
    parser.add_argument(
        "--beside", type=Path, nargs="*", metavar="FILE",
        help="files of rows of other programs to show as well (default, of the whole table: bench.authors_package's)",
    )  # fmt: skip
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.cell:
        given = json.loads(a.cell)
        run_cell(replace(Cell(**given), attacks=tuple(given["attacks"])), a.folder, a.device)
        return 0
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; leave out --device")
    output, folder = defaults(a.quick, a.device)
    output, folder = a.output or output, a.folder or folder
    if a.show:
        payload = load_kind(output, "table")
    else:
        payload = fill(cells(a.quick, a.methods or list(METHODS)), output, folder, a.workers, a.quick, a.device)
    usual = [] if output != RESULTS else [path for path in (AUTHORS,) if path.exists()]
    others = [load_kind(path, "table")["rows"] for path in (usual if a.beside is None else a.beside)]
    payload = {**payload, "rows": [*payload["rows"], *itertools.chain(*others)]}
    if a.markdown:
        print(markdown(payload), end="")
    else:
        for model in dict.fromkeys(row["model"] for row in payload["rows"]):
            header, *rows = lines(payload, model)
            print(f"\n{model}: medians over cells")
            print_table(header, rows)
            header, *rows = attack_lines(payload, model)
            if rows:
                print(f"\n{model}: of each attack the setting that succeeds most, in percent still recognised")
                print_table(header, rows)
    draw(payload, output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
