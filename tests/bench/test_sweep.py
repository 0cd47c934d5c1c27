"""The study of methods: its cells, what reaches the targets, and its table."""

import random

from rich.console import Console

from bench.sweep import STUDIES, Cell, best_by_method, cells, met, summary
from fade import bundled


def test_a_study_asks_for_words_that_its_model_has() -> None:
    for study in STUDIES.values():
        model, every = bundled.model(study.model), cells(study)
        assert len(set(every)) == len(study.pairs) * len(study.seeds) * len(study.keeps) * len(study.recipes)
        assert all(cell.surrogate in model.domain(cell.forget).words for cell in every)


def row(cell: Cell, **numbers: float | None) -> dict:
    base = {"UA": 0.0, "IRA": 90.0, "NA": 80.0, "CRA": 100.0}
    measured = {"UA": 100.0, "IRA": 89.0, "NA": 70.0, "CRA": 99.0, "drift": 0.02, "adapter_bytes": 4e4, **numbers}
    return {**vars(cell), **measured, "base": base}


def test_targets_are_shares_of_what_the_base_model_has() -> None:
    cell = random.choice(cells(STUDIES["emojicanvas"]))
    assert met(row(cell))
    for short in ({"UA": 97.9}, {"IRA": 88.1}, {"CRA": 97.9}):
        assert not met(row(cell, **short))


def test_the_table_says_how_many_runs_reach_the_targets() -> None:
    study = STUDIES["emojicanvas"]
    chosen = [cell for cell in cells(study) if cell.recipe == "both" and cell.seed == 0]
    rows = [row(cell, UA=100.0 if i else 50.0, NA=None if i % 2 else 70.0) for i, cell in enumerate(chosen)]
    console = Console(width=200, record=True)
    console.print(summary(study, {"rows": rows}))
    shown = console.export_text()
    assert f"{len(chosen) - 1} of {len(chosen)}" in shown and "89.0 (90.0)" in shown and "70.0 (80.0)" in shown
    assert "worst UA: object / style" in shown


def test_the_settings_of_a_peer_are_those_whose_worst_number_is_best() -> None:
    study = STUDIES["peers"]
    own, other, third = (name for name in study.recipes if name.split(",")[0] == "leco")
    of = {cell.recipe: cell for cell in cells(study)}
    assert len([cell for cell in cells(study) if cell.recipe == own]) == 2
    rows = [
        row(of[own], UA=100.0, IRA=60.0), row(of[own], UA=90.0, IRA=90.0),  # 66.7 and 90 at worst
        row(of[other], UA=80.0, IRA=90.0), row(of[other], UA=100.0, IRA=72.0, CRA=90.0),  # 80 and 80
        row(of[third], UA=80.0), row(of[third], UA=80.0),  # as good, and later
    ]  # fmt: skip
    assert best_by_method(study, {"rows": rows}) == {"leco": other}
    assert best_by_method(study, {"rows": rows[:3]}) == {"leco": own}  # the other lacks a run
