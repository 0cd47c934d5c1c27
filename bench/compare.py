"""`python -m bench compare A B`: two result files, cell by cell, flagged where their quantiles do not meet."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness import print_table
from bench.results_file import load


@dataclass(frozen=True)
class Difference:
    """One cell in both files: seconds, B over A, and "slower" or "faster" where B's quantiles lie outside A's."""

    table: str
    row: str
    column: str
    before: float
    after: float
    verdict: str

    @property
    def ratio(self) -> float:
        return self.after / self.before


def _cells(payload: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {
        (table["name"], row["row"], column): cell
        for table in payload["tables"]
        for row in table["rows"]
        for column, cell in row["cells"].items()
        if "median" in cell
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Difference]:
    """Every cell that both have, in the first's order."""
    others = _cells(after)
    for key, a in _cells(before).items():
        if (b := others.get(key)) is None:
            continue
        low_a, high_a = a.get("low", a["median"]), a.get("high", a["median"])
        low_b, high_b = b.get("low", b["median"]), b.get("high", b["median"])
        verdict = "slower" if low_b > high_a else "faster" if high_b < low_a else ""
        yield Difference(*key, a["median"], b["median"], verdict)


def unmatched(before: dict[str, Any], after: dict[str, Any]) -> tuple[int, int]:
    """Cells that only the first has, and only the second."""
    a, b = _cells(before).keys(), _cells(after).keys()
    return len(a - b), len(b - a)


def main(first: Path, second: Path, everything: bool = False) -> None:
    """Prints the cells beyond the quantiles, or all of them. Raises BadResultsError."""
    before, after = load(first), load(second)
    for path, payload in ((first, before), (second, after)):
        facts = payload.get("environment", {})
        print(f"{path}: {payload.get('kind')}, {facts.get('gpu') or facts.get('cpu')}, {facts.get('commit')}")
    found = list(differences(before, after))
    shown = [d for d in found if everything or d.verdict]
    rows = [
        [
            f"{d.table}: {d.row}: {d.column}",
            f"{1e3 * d.before:.4g}",
            f"{1e3 * d.after:.4g}",
            f"{d.ratio:.3f}",
            d.verdict,
        ]
        for d in shown
    ]
    if rows:
        print_table(["", "ms before", "ms after", "after / before", ""], rows)
    slower, faster = (sum(d.verdict == verdict for d in found) for verdict in ("slower", "faster"))
    print(f"{len(found)} cells in both: {slower} slower, {faster} faster beyond the quantiles")
    only = unmatched(before, after)
    if any(only):
        print(f"{only[0]} cells only in {first}, {only[1]} only in {second}")
