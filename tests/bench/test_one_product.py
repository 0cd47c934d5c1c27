"""The study of the one-product mode: its pairs, its differences and its verdict, on made-up rows."""

import math
import pickle
from typing import Any

import pytest

from bench.one_product import METHODS, MODES, STUDY, comparison, seed_spread, table, verdict, verdict_line
from bench.sweep import Cell, cells


def rows(**changes: float) -> list[dict[str, Any]]:
    """Every run of the study. Between seeds UA differs by 2 and drift by 0.01; one product differs by `changes`."""
    made = []
    for cell in cells(STUDY):
        row = {**vars(cell), "UA": 95.0 + 2 * cell.seed, "IRA": 99.0, "CRA": 100.0, "drift": 0.02 + 0.01 * cell.seed}
        if cell.recipe.endswith(MODES[1]):
            row |= {name: row[name] + change for name, change in changes.items()}
        made.append({**row, "training_steps": 50})
    return made


def test_every_concept_and_seed_is_run_in_both_modes_of_both_methods() -> None:
    todo = cells(STUDY)
    assert len(set(todo)) == len(todo) == 18 * 2 * len(METHODS) * len(MODES)
    assert [Cell.of(row) for row in rows()] == todo
    assert pickle.loads(pickle.dumps(STUDY)) == STUDY  # as it goes to the worker processes


def test_the_spread_is_that_within_a_concept() -> None:
    assert seed_spread({("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 100.0, ("b", 1): 102.0}) == pytest.approx(math.sqrt(2))
    assert seed_spread({("a", 0): 1.0, ("b", 1): 3.0}) is None


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, True),
        ({"UA": -1.0, "drift": 0.0012}, True),
        ({"UA": -2.0}, False),
        ({"UA": 3.0, "drift": -0.01}, True),
        ({"drift": 0.0013}, False),
        ({"IRA": -0.3}, True),  # seeds do not differ: less than a picture
        ({"IRA": -0.4}, False),
    ],
)
def test_the_verdict(changes: dict[str, float], holds: bool) -> None:
    found = verdict(rows(**changes))
    assert found["complete"] and found["holds"] is holds
    for method in METHODS:
        for name in ("UA", "IRA", "CRA", "drift"):
            assert found[method][name]["difference"] == pytest.approx(changes.get(name, 0.0), abs=1e-9)
            assert found[method][name]["standard_error"] == pytest.approx(0, abs=1e-9)
    assert ("NOT" in verdict_line(found)) is not holds


def test_no_verdict_before_all_is_there() -> None:
    some = rows()[:-1]
    found = verdict(some)
    assert not found["complete"] and not found["holds"]
    assert verdict_line(found) == "no verdict yet: 71 of 72 pairs of runs"
    assert comparison([], "both") is None
    assert comparison([row for row in some if row["seed"] == 0], "both")["holds"] is None
    assert table(some, []).row_count > 0
