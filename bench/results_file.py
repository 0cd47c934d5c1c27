"""A benchmark's results: tables of rows and columns in one JSON file that is complete after every row.

    {"schema": 1, "kind": "gpu" | "cpu" | "model", "environment": {...}, "steps": {...}, "complete": true,
     "tables": [{"name", "title", "mode", "base", "rows": [{"row", "count", "cells": {column: cell}}]}],
     "targets": [{"what", "limit", "ratio", "met"}]}

A cell holds `median`, `low`, `high`, `fastest` (seconds), `repeats`, and where they are known `host` (seconds to queue
the work), `extra_bytes` (peak memory beyond what was allocated), `flops`, `bytes`, `predicted` (seconds by the roofline
model), `bound` (seconds that no training of a masked layer undercuts, by the same model), `relative_error`; or only
`error`, why there is no number. Totals weigh a row by its `count`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.harness import print_table, write_json

SCHEMA = 1
Cell = dict[str, Any]
Table = dict[str, Any]


class BadResultsError(ValueError):
    """A file that is no result file of this benchmark."""


class Results:
    """A result file being written.

    Args:
        path: where it is kept; None: nowhere.
        payload: its content so far.
    """

    def __init__(self, path: Path | None, payload: dict[str, Any]) -> None:
        self.path = path
        self.payload = {"schema": SCHEMA, "complete": False, "steps": {}, "tables": []} | payload

    @classmethod
    def load(cls, path: Path) -> "Results":
        return cls(path, load(path))

    def save(self) -> None:
        if self.path is not None:
            write_json(self.path, self.payload)

    @property
    def pulse(self) -> Path | None:
        """A file beside this one while a process measures: the candidate whose first calls run, "" for timed ones."""
        return None if self.path is None else self.path.with_name(self.path.name + ".candidate")

    def beat(self, candidate: str) -> None:
        """Shows that the run goes on, and with what."""
        if self.pulse is not None:
            self.pulse.write_text(candidate, encoding="utf-8")

    @property
    def crashed(self) -> list[str]:
        """Candidates that have ended a measuring process."""
        return self.payload.setdefault("crashed", [])

    @property
    def tables(self) -> list[Table]:
        return self.payload["tables"]

    def table(self, name: str) -> Table | None:
        return next((table for table in self.tables if table["name"] == name), None)

    def open_table(self, name: str, title: str, mode: str, base: str) -> Table:
        """The table of this name, made where it is missing."""
        table = self.table(name)
        if table is None:
            table = {"name": name, "title": title, "mode": mode, "base": base, "rows": []}
            self.tables.append(table)
        return table

    def add_row(self, table: Table, row: str, count: int, cells: Mapping[str, Cell]) -> None:
        table["rows"].append({"row": row, "count": count, "cells": dict(cells)})
        self.save()


def load(path: Path) -> dict[str, Any]:
    """A result file's content. Raises BadResultsError with a message for people."""
    try:
        payload = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadResultsError(f"cannot read {path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadResultsError(f"{path} is not a result file: it is not JSON ({error})") from error
    if not isinstance(payload, dict) or "tables" not in payload:
        raise BadResultsError(f"{path} is not a result file of `python -m bench`: it has no tables")
    if payload.get("schema") != SCHEMA:
        raise BadResultsError(f"{path} has schema {payload.get('schema')}, this version reads {SCHEMA}")
    return payload


def columns(table: Table) -> list[str]:
    """Every column that a row has, in order of appearance."""
    return list(dict.fromkeys(name for row in table["rows"] for name in row["cells"]))


def total(table: Table | None, column: str, field: str = "median") -> float | None:
    """Sum over rows of count times a field of a column; None where any row lacks it."""
    if table is None or not table["rows"]:
        return None
    values = [(row["count"], row["cells"].get(column, {}).get(field)) for row in table["rows"]]
    if any(value is None for _, value in values):
        return None
    return sum(count * value for count, value in values)


def ratio(table: Table | None, column: str, base: str, field: str = "median") -> float | None:
    """Weighted total of a column over that of another."""
    above, below = total(table, column, field), total(table, base, field)
    return None if above is None or not below else above / below


def wrong(table: Table) -> list[str]:
    """Columns with a result that was compared and found wrong."""
    return [name for name in columns(table) if any(row["cells"].get(name, {}).get("wrong") for row in table["rows"])]


def show(table: Table, speedups: bool = True) -> None:
    """Prints a table: one line per column, totals over its rows weighed by their counts."""
    names, base = columns(table), table["base"]
    print(f"\n{table['title']}")
    header = ["", "ms", f"x {base}", "x bound", "host ms", "GB", "TFLOP", "model ms", "extra MiB", "runs"]
    lines = []
    for name in names:
        cells = [row["cells"].get(name, {}) for row in table["rows"]]
        relative = ratio(table, name, base) if speedups and name not in wrong(table) else None
        seconds, bound = total(table, name), total(table, name, "bound")
        memory = [cell["extra_bytes"] for cell in cells if cell.get("extra_bytes") is not None]
        runs = [cell["repeats"] for cell in cells if "repeats" in cell]
        error = next((cell["error"] for cell in cells if "error" in cell), None)
        lines.append(
            [
                name + (" (WRONG)" if name in wrong(table) else ""),
                _number(seconds, 1e3) or (error or "-")[:60],
                _number(relative),
                _number(seconds / bound if relative is not None and seconds and bound else None),
                _number(total(table, name, "host"), 1e3),
                _number(total(table, name, "bytes"), 1e-9),
                _number(total(table, name, "flops"), 1e-12),
                _number(total(table, name, "predicted"), 1e3),
                _number(max(memory) if memory else None, 2**-20),
                str(min(runs)) if runs else "",
            ]
        )
    kept = [i for i in range(len(header)) if i < 2 or any(line[i] for line in lines)]
    print_table([header[i] for i in kept], [[line[i] for i in kept] for line in lines])


def _number(value: float | None, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:.4g}"
