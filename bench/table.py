"""Every method beside every other: the same models, data, seeds, judges, metrics and attacks, from one command.

    python -m bench.table            everything: hours on two cores; what the file lacks is run, cell by cell
    python -m bench.table --quick    one concept and the quick attacks, in a quarter of an hour
    python -m bench.table --show     run nothing: print the table of a file (--markdown: as README has it)

A cell is one method on one concept with one seed. It is a process of its own, so that its memory is its own and a
failure is a line of the table with its reason; a process that was killed is run again the next time. What a cell makes
stays in `--folder` (adapter, attacks) until the file has it; a run that is stopped goes on where it was, also within a
cell's attacks. Cells whose settings have changed since are measured anew. Of attacks that are new, or have other
settings than before, only these are made; where the adapter is gone it is made again, and if it then measures
otherwise, the whole cell is replaced. What depends on the base model alone, all cells share (`kept` in that folder).

    {"schema": 3, "kind": "table", "environment", "quick",
     "settings": {model: {method: {"section.setting": value}}}, "rows": [
        {"model", "method", "forget", "surrogate", "seed", "code": the last commit to what was measured,
         "seconds", "peak_memory_bytes", "adapter_bytes", "metrics": {name: number}, "base": {name: number},
         "interval_95": {name: [low, high]}, "change_95": {name: [low, high]}, paired, "notes": {name: text},
         "attacks": {"attack, setting": {"recognised", "pictures", "settings", and numbers of its own}},
         "attacked": the last commit to what made the last of them,
         "unattacked": {"recognised", "pictures"}, "left_out": {attack: why}} | {..., "reason": why there is nothing}]}
"""

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.files import ROOT, load_kind, write_json

SCHEMA = 3
RESULTS = ROOT / "bench" / "results" / "table.json"
AUTHORS = RESULTS.with_name("authors_package.json")
FOLDER = ROOT / "build" / "table"
SHOWN = ("UA", "IRA", "CRA", "NA", "drift")
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
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "distillation + gift": ("distillation", {"overwrite__gift": 1e-4}),
    "distillation + ekpc": ("distillation", {"overwrite__ekpc": 1e-3}),
    "fade, whole modules": ("fade", {"locate__granularity": "module"}),
    "fade, dense": ("fade", {"locate__granularity": "none"}),
}
"""Options of methods, measured on the first model with the first seed, without attacks: the method and what is set."""
TUNED: dict[str, dict[str, dict[str, Any]]] = {
    "emojicanvas": {
        "erasediff": {"overwrite__learning_rate": 2e-3, "options__eta": 0.5},
        "esd-u": {"overwrite__learning_rate": 4.5e-4},
        "gradient-ascent": {"overwrite__learning_rate": 2e-3},
        "negated-lora": {"options__strength": 3.0},
        "ssd": {"options__alpha": 4.0},
    },
}
"""By model and method what is set where the method's own settings, which were chosen on DigitCanvas, serve it less well
than others (`python -m bench.sweep peers`; a test holds this to its file)."""
PUBLISHED: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "salun": ((86.9, 96.4, 99.6), (86.3, 90.4, 95.1)),
    "erasediff": ((86.7, 94.0, 48.5), (92.4, 73.9, 98.9)),
    "esd-x": ((92.2, 55.8, 44.2), (98.6, 81.0, 94.0)),
    "concept-ablation": ((46.7, 90.1, 82.0), (60.8, 96.0, 92.7)),
    "uce": ((94.3, 39.4, 34.7), (98.4, 60.2, 47.7)),
}
"""UA, IRA and CRA of objects and of styles in UnlearnCanvas (arXiv 2402.11846), Stable Diffusion 1.5, in percent."""
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


def names() -> list[str]:
    """Every method, then the variants."""
    from fade.methods import METHODS

    return [*METHODS, *VARIANTS]


def config_of(method: str, model: str, seed: int = 0) -> Any:
    """The `fade.Config` of a method or variant on a model."""
    import fade

    tuned = TUNED.get(model, {}).get(method, {})
    method, changes = VARIANTS.get(method, (method, {}))
    return fade.Config.of(method, seed=seed, **{**changes, **tuned})


def settings_of(method: str, model: str) -> dict[str, Any]:
    """Its settings by section and name, ready for JSON."""
    found: dict[str, Any] = {}
    for section, values in config_of(method, model).to_dict().items():
        found |= {f"{section}.{name}": value for name, value in values.items()} if isinstance(values, dict) else {}
    return json.loads(json.dumps(found))


def cells(quick: bool, methods: Sequence[str]) -> list[Cell]:
    """In the order in which an interrupted table is most worth having."""
    from fade.evaluation.attacks.registry import ATTACKS

    whole = [method for method in methods if method not in VARIANTS]
    first = next(iter(PAIRS))
    if quick:
        return [Cell(first, method, *PAIRS[first][0], 0, QUICK_ATTACKS) for method in whole]

    def of(model: str, seed: int, methods: Sequence[str], attacks: tuple[str, ...]) -> list[Cell]:
        return [
            Cell(model, method, forget, surrogate, seed, attacks if forget in ATTACKED[model] else ())
            for forget, surrogate in sorted(PAIRS[model], key=lambda pair: pair[0] not in ATTACKED[model])
            for method in methods
        ]

    return [
        *(cell for model in PAIRS for cell in of(model, 0, whole, tuple(ATTACKS))),
        *of(first, 0, [method for method in methods if method in VARIANTS], ()),
        *(cell for model in PAIRS for cell in of(model, 1, whole, ())),
    ]


# --- one cell, in a process of its own -------------------------------------------------------------------------------


def _rounded(value: Any) -> Any:
    """Floats of five digits, also in what is within."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def measured_metrics(found: Any) -> dict[str, Any]:
    """What a row has of an `Evaluation`."""
    spans = {"interval_95": found.intervals, "change_95": found.changes}
    ends = {kind: {name: [one["low"], one["high"]] for name, one in by.items()} for kind, by in spans.items()}
    rounded = {kind: {name: [*map(_rounded, both)] for name, both in by.items()} for kind, by in ends.items()}
    return {"metrics": _rounded(found.metrics), "base": _rounded(found.base), **rounded, "notes": found.notes}


def measured_attacks(record: Any) -> dict[str, Any]:
    """What a row has of an `AttackRecord`: counts and numbers, no pictures and no words."""
    from bench.harness import engine_version

    def counts(one: Any) -> dict[str, Any]:
        own = {name: number for name, number in one.numbers.items() if not isinstance(number, list)}
        return {"recognised": one.recognised, "pictures": one.pictures, **_rounded(own)}

    attacks = {f"{one.attack}, {one.setting}": counts(one) | {"settings": one.settings} for one in record.results}
    told = {"unattacked": counts(record.unattacked), "left_out": record.left_out}
    return {"attacks": attacks, "attacked": engine_version(), **told}


def stood(row: dict[str, Any], attack: Any) -> dict[str, dict[str, Any]]:
    """What a row has of an attack with these very settings, by its name in the row; empty where it has not stood it."""
    asked = json.dumps(asdict(attack))
    found = row.get("attacks", {}).items()
    return {
        name: counts
        for name, counts in found
        if name.partition(",")[0] == attack.name and json.dumps(counts.get("settings")) == asked
    }


def run_cell(cell: Cell, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Unlearns, evaluates and attacks; what is in `folder` already is not done again."""
    import fade
    from bench.harness import engine_version
    from fade import bundled
    from fade.errors import FadeError
    from fade.evaluation import evaluate
    from fade.evaluation.attacks import attack
    from fade.evaluation.attacks.registry import chosen_attacks
    from fade.measure import measured

    made, path, kept = folder / cell.name, folder / f"{cell.name}.json", folder / "kept"
    file, checked = made / "adapter.safetensors", made / "measured.json"
    row: dict[str, Any] = json.loads(path.read_text()) if path.exists() else cell.told
    wanted = {"settings": settings_of(cell.method, cell.model), "metrics": row.get("metrics")}
    pipeline = bundled.model(cell.model).load_pipeline().to(device)
    try:
        if checked.exists() and json.loads(checked.read_text()) == wanted:  # the adapter is the row's
            adapter = fade.load_adapter(pipeline, file)
        else:
            for stale in (checked, made / "attacks.json"):
                stale.unlink(missing_ok=True)
            with measured(device) as cost:
                adapter = fade.unlearn(
                    pipeline, cell.forget, cell.surrogate, output=made, overwrite=True, progress=False,
                    config=config_of(cell.method, cell.model, cell.seed),
                )  # fmt: skip
            found = measured_metrics(evaluate(pipeline, adapter, seeds=(cell.seed + 1,), cache=kept, progress=False))
            if row.get("metrics") != found["metrics"]:
                if "metrics" in row:
                    print(f"{cell.name} measures otherwise than before: all of it is made anew", file=sys.stderr)
                row = cell.told | {"code": engine_version(), "seconds": _rounded(cost.seconds)}
                row |= {"peak_memory_bytes": cost.peak_memory_bytes, "adapter_bytes": file.stat().st_size, **found}
            write_json(path, row)
            write_json(checked, wanted | {"metrics": row["metrics"]})
    except FadeError as reason:
        row = cell.told | {"reason": str(reason)}
    asked = chosen_attacks(cell.attacks) if cell.attacks and "reason" not in row else ()
    lacking = [one for one in asked if not stood(row, one)]
    if lacking:
        record = attack(
            pipeline, adapter, lacking, pictures=PICTURES, record=made / "attacks.json", cache=kept, progress=False
        )
        new = measured_attacks(record)
        row |= new | {"attacks": row.get("attacks", {}) | new["attacks"]}
        row["attacks"] = {name: counts for one in asked for name, counts in stood(row, one).items()}
    write_json(path, row)
    return row


# --- all of them -----------------------------------------------------------------------------------------------------


def _finished(row: dict[str, Any], cell: Cell) -> bool:
    if "failed" in row:
        return False
    if "reason" in row:
        return True
    from fade.evaluation.attacks.registry import ATTACKS

    left_out = row.get("left_out", {})
    return "metrics" in row and all(
        name in left_out or all(stood(row, one) for one in ATTACKS[name]) for name in cell.attacks
    )


class _Runner:
    """Runs cells in processes of one thread each, from several threads."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """The cell's row; a process that fails leaves what it had measured, and its last words."""
        command = [sys.executable, "-m", "bench.table", "--cell", json.dumps(asdict(cell))]
        command += ["--folder", str(self.folder), "--device", self.device]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
            self._running.add(process)
            if self._stopped:
                process.terminate()
            said = process.communicate()[1]
            self._running.discard(process)
        path = self.folder / f"{cell.name}.json"
        row = json.loads(path.read_text()) if path.exists() else cell.told
        if process.returncode != 0:
            last = [line for line in said.splitlines() if line.strip()][-1:] or [f"exit code {process.returncode}"]
            row["failed"] = f"the process failed, and is run again with the table: {last[0]}"
        return row

    def stop(self) -> None:
        self._stopped = True
        for process in list(self._running):
            process.terminate()


def read(path: Path) -> dict[str, Any]:
    """A table's file. Raises SystemExit with a message for people where it is none, or another version's."""
    payload = load_kind(path, "table")
    if payload.get("schema") != SCHEMA:
        raise SystemExit(f"{path} was written by another version of this program; give another --output")
    return payload


def _forget_changed(payload: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The rows whose methods have the settings that they were measured with; what the others left is removed."""
    kept, changed = [], {}
    for model, methods in payload.get("settings", {}).items():
        for method, before in methods.items():
            now = settings_of(method, model) if method in names() else {}
            changed[method, model] = sorted(name for name in before if name in now and before[name] != now[name])
    for row in payload["rows"]:
        if not changed.get((row["method"], row["model"])):
            kept.append(row)
            continue
        name = Cell(*(row[part] for part in TOLD)).name
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / f"{name}.json").unlink(missing_ok=True)
    for (method, model), what in changed.items():
        if what:
            print(f"{method} is measured anew on {model}: other settings now: {', '.join(what)}", file=sys.stderr)
    return kept


def fill(
    todo: Sequence[Cell], output: Path, folder: Path, workers: int, quick: bool, device: str = "cpu"
) -> dict[str, Any]:
    """Runs what the file lacks, and writes it after every cell. Interrupted, it ends the cells that are running."""
    from bench.harness import environment
    from fade.progress import progress_bar

    empty = {"schema": SCHEMA, "kind": "table", "quick": quick, "rows": []}
    payload = read(output) if output.exists() else empty
    rows = {tuple(row[name] for name in TOLD): row for row in _forget_changed(payload, folder)}
    wanted = [cell for cell in todo if cell.key not in rows or not _finished(rows[cell.key], cell)]
    settings = {model: dict(methods) for model, methods in payload.get("settings", {}).items()}
    for cell in wanted:
        settings.setdefault(cell.model, {})[cell.method] = settings_of(cell.method, cell.model)
    folder.mkdir(parents=True, exist_ok=True)
    for cell in wanted:
        known, path = rows.get(cell.key, {}), folder / f"{cell.name}.json"
        if "metrics" in known and not path.exists():
            write_json(path, {name: value for name, value in known.items() if name != "failed"})
    runner, pool = _Runner(folder, device), ThreadPoolExecutor(workers)
    try:
        with progress_bar("table", len(wanted), True) as advance:
            futures = {pool.submit(runner, cell): cell for cell in wanted}
            for future in as_completed(futures):
                cell, row = futures[future], future.result()
                rows[cell.key] = row
                payload |= {"environment": environment(), "settings": settings, "rows": list(rows.values())}
                write_json(output, payload, line_a_row=True)
                reached = row.get("failed") or row.get("reason")
                advance(f"{cell.method}, {cell.forget}: {reached or _in_short(row)}")
    finally:
        runner.stop()
        pool.shutdown(cancel_futures=True)
    return payload


def _in_short(row: dict[str, Any]) -> str:
    return f"UA {row['metrics']['UA']:.0f}, {row['seconds']:.0f} s"


# --- what is shown ---------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def _middle(numbers: list[float]) -> str:
    """The median over cells, and where they differ the range that has it with 95 %, by order statistics; of fewer than
    six cells, from which none follows, the least and the most."""
    if not numbers:
        return ""
    ordered, count = sorted(numbers), len(numbers)
    without = 0  # of the least and of the most, as many as leave the median outside in 5 % at the most
    while 2 * sum(math.comb(count, k) for k in range(without + 2)) <= 0.05 * 2**count:
        without += 1
    low, high = _number(ordered[without]), _number(ordered[count - 1 - without])
    text = _number(median(ordered))
    return text if low == high else f"{text} ({low}-{high})"


def _worst(row: dict[str, Any]) -> dict[str, float]:
    """Of each attack that a cell stood the setting that succeeds most, in percent."""
    found: dict[str, float] = {}
    for name, counts in row.get("attacks", {}).items():
        attack, rate = name.partition(",")[0], 100 * counts["recognised"] / counts["pictures"]
        found[attack] = max(rate, found.get(attack, 0.0))
    return found


def _attacked(row: dict[str, Any]) -> float | None:
    """Their mean over the attacks; without taking the adapter off, which brings the concept back by design."""
    rates = [rate for attack, rate in _worst(row).items() if attack != "removal"]
    return sum(rates) / len(rates) if rates else None


def _relearnt(row: dict[str, Any]) -> str | None:
    """Steps of every layer on ten pictures after which half of the concept is back, and to learn it anew; 0 where half
    of it was never gone."""
    for name, counts in row.get("attacks", {}).items():
        if name.startswith("relearning, 10 pictures, every layer,"):
            steps = (counts[which] for which in ("steps_to_half", "anew_steps_to_half"))
            return " / ".join("never" if step is None else str(step) for step in steps)
    return None


def _by_method(payload: dict[str, Any], model: str) -> Iterator[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """Of each method all its rows and those that have numbers."""
    rows, order = [row for row in payload["rows"] if row["model"] == model], names()
    found = dict.fromkeys(row["method"] for row in rows)
    for method in sorted(found, key=lambda name: order.index(name) if name in order else len(order)):
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
            table.append([method, "0", "failed" if "failed" in own[0] else "cannot", *["-"] * (len(header) - 3)])
            continue
        metrics = [[row["metrics"][name] for row in good if row["metrics"].get(name) is not None] for name in shown]
        attacked = [mean for mean in map(_attacked, good) if mean is not None]
        costs = [(row["seconds"], row["peak_memory_bytes"] / 1e6, row["adapter_bytes"] / 1e3) for row in good]
        medians = [_number(median(column)) for column in zip(*costs, strict=True)]
        table.append([method, str(len(good)), *(_middle(column) or "-" for column in (*metrics, attacked)), *medians])
    return table


def attack_lines(payload: dict[str, Any], model: str) -> list[list[str]]:
    """Header and one line a method: each attack, of its settings the one that succeeds most."""
    rows = [row for row in payload["rows"] if row["model"] == model]
    attacks = list(dict.fromkeys(attack for row in rows for attack in _worst(row)))
    relearnt = any(_relearnt(row) for row in rows)
    table = [["method", *attacks, *(["relearning every layer: steps to half / anew"] if relearnt else [])]]
    for method, _, good in _by_method(payload, model):
        cells = []
        for attack in attacks:
            rates = [_worst(row)[attack] for row in good if attack in _worst(row)]
            refused = any(attack in row.get("left_out", {}) for row in good)
            cells.append(_middle(rates) or ("cannot" if refused else "-"))
        if set(cells) - {"-"}:
            steps = [text for text in map(_relearnt, good) if text]
            table.append([method, *cells, *([", ".join(steps) or "-"] if relearnt else [])])
    return table


def papers(payload: dict[str, Any]) -> str:
    """A Markdown table beside `PUBLISHED`: UA / IRA / CRA of each method, objects and styles apart, medians over
    concepts and seeds."""
    from fade import bundled

    models = list(dict.fromkeys(row["model"] for row in payload["rows"]))
    header = [f"{model}, {domain.name}s" for model in models for domain in bundled.model(model).domains]
    table = [["method", *header, "UnlearnCanvas, objects", "styles"]]
    found: dict[str, dict[str, str]] = {}
    for model in models:
        for method, own, good in _by_method(payload, model):
            for domain in bundled.model(model).domains:
                rows = [row["metrics"] for row in good if row["forget"] in domain.words]
                middle = [f"{median(row[name] for row in rows):.1f}" for name in ("UA", "IRA", "CRA") if rows]
                text = " / ".join(middle) or ("cannot" if "reason" in own[0] else "-")
                found.setdefault(method, {})[f"{model}, {domain.name}s"] = text
    for method, by_column in found.items():
        texts = [by_column.get(column, "-") for column in header]
        published = [" / ".join(map(str, numbers)) for numbers in PUBLISHED.get(method, ())]
        table.append([method, *texts, *(published or ["-", "-"])])
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]]) + "\n"


def reasons(payload: dict[str, Any]) -> list[str]:
    """A line for each method that cannot take a model, or failed on it, with why."""
    found = {
        (row["method"], row["model"]): row.get("failed") or row["reason"]
        for row in payload["rows"]
        if "reason" in row or "failed" in row
    }
    return [f"{method} on {model}: {why}" for (method, model), why in found.items()]


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
    text += [f"- {line}" for line in reasons(payload)]
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

    parser = argparse.ArgumentParser(
        prog="python -m bench.table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one concept, the quick attacks")
    parser.add_argument("--output", type=Path, help="file to fill (default: bench/results/table[-quick][-gpu].json)")
    parser.add_argument("--folder", type=Path, help="where adapters are kept meanwhile (default: build/table[-gpu])")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where a cell runs (default: cpu)")
    parser.add_argument("--methods", nargs="+", choices=names(), metavar="NAME", help="only these")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--markdown", action="store_true", help="print as README has it")
    parser.add_argument(
        "--papers", action="store_true", help="print what docs/methods.md has: beside published numbers"
    )
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
        payload = read(output)
    else:
        # A shell has the former ignored by what it starts in the background.
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, signal.default_int_handler)
        payload = fill(cells(a.quick, a.methods or names()), output, folder, a.workers, a.quick, a.device)
    usual = [] if output != RESULTS else [path for path in (AUTHORS,) if path.exists()]
    others = [read(path)["rows"] for path in (usual if a.beside is None else a.beside)]
    payload = {**payload, "rows": [*payload["rows"], *itertools.chain(*others)]}
    if a.papers:
        print(papers(payload), end="")
    elif a.markdown:
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
        print("\n".join(["", *reasons(payload)]))
    draw(payload, output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
