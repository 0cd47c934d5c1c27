"""The benchmark of host time runs every path it names, and its stand-in for launches is still in their way."""

import pytest

from bench.harness import in_subprocess
from bench.host_overhead import TARGETS, judge


@pytest.mark.parametrize("path", TARGETS)
def test_every_row_with_a_target_is_measured(path: str) -> None:
    pytest.importorskip("peft" if path == "cpu" else "triton")
    rows = in_subprocess("bench.host_overhead", "--path", path, "--rounds", "1")
    assert set(TARGETS[path]) <= set(rows)
    assert all(0 < row["fastest"] <= row["processor"] for row in rows.values())
    if path == "gpu":
        assert rows["fused, forward"]["launches"] == 1
        assert rows["fused, forward + backward"]["launches"] >= 3
        assert rows["frozen, forward + backward"]["launches"] == 0


def test_targets_are_judged() -> None:
    row = {"processor": 30e-6, "fastest": 20e-6}
    verdicts = judge({"gpu": {"fused, forward + backward": row}, "cpu": {"ours, forward": row}})
    found = {verdict["row"]: verdict["reached"] for verdict in verdicts}
    assert found == {
        "fused, forward + backward": True,
        "one-product, forward + backward": None,
        "gather, forward + backward": None,
        "ours, forward": False,
    }
