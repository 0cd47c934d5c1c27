"""`python -m bench plot`: one panel per table, bars of weighted time, predictions beside measurements."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results_file import BadResultsError, columns, load, total, wrong


def _panels(files: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """Tables by name in order of appearance, each with the files that have a total in it."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for label, payload in files:
        for table in payload["tables"]:
            if table["name"] != "ceilings" and any(total(table, name) is not None for name in columns(table)):
                found.setdefault(table["name"], []).append((label, table))
    return list(found.items())


def draw(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Draws result files into one picture.

    Args:
        paths: files of `python -m bench` (measured) and of `python -m bench model` (predicted).
        output: PNG to write; None: the first file's name with .png.

    Raises:
        BadResultsError: a file is none, or holds nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    files = []
    for path in paths:
        payload = load(path)
        files.append((path.stem + (", predicted" if payload.get("kind") == "model" else ""), payload))
    panels = _panels(files)
    if not panels:
        raise BadResultsError(f"there is nothing to draw in {', '.join(map(str, paths))}")
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    bars = [max(len(columns(table)) * len(tables) for _, table in tables) for _, tables in panels]
    heights = [0.17 * max(bars[row * across : (row + 1) * across]) + 1.2 for row in range(down)]
    figure, axes = plt.subplots(
        down, across, figsize=(8 * across, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for (_, tables), axis in zip(panels, axes.flat, strict=False):
        _draw_panel(axis, tables)
    output = output or paths[0].with_suffix(".png")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=80)
    plt.close(figure)
    return output


def _draw_panel(axis: Any, tables: Sequence[tuple[str, dict[str, Any]]]) -> None:
    names = list(dict.fromkeys(name for _, table in tables for name in columns(table)))
    height = 0.8 / len(tables)
    for index, (label, table) in enumerate(tables):
        drawn = [name for name in names if total(table, name) is not None]
        places = [names.index(name) + (index - (len(tables) - 1) / 2) * height for name in drawn]
        middle = [1e3 * total(table, name) for name in drawn]
        reach = None
        if all(total(table, name, field) is not None for name in drawn for field in ("low", "high")):
            low = [max(0.0, m - 1e3 * total(table, name, "low")) for m, name in zip(middle, drawn, strict=True)]
            high = [max(0.0, 1e3 * total(table, name, "high") - m) for m, name in zip(middle, drawn, strict=True)]
            reach = [low, high]
        bars = axis.barh(places, middle, height=height, xerr=reach, label=label, color=f"C{index}", alpha=0.85)
        axis.bar_label(bars, [f" {value:.3g}" for value in middle], fontsize=6, clip_on=True)
        expected = [(p, total(table, name, "predicted")) for p, name in zip(places, drawn, strict=True)]
        expected = [(p, 1e3 * value) for p, value in expected if value is not None]
        if expected:
            axis.plot(
                [value for _, value in expected], [p for p, _ in expected], "k|", markersize=9,
                label="predicted" if index == 0 else None,
            )  # fmt: skip
    # A regime forced where it does not fit may take many times as long: its bar is cut, its number stands.
    usual = [total(t, n) for _, t in tables for n in columns(t) if not n.startswith("ours ")]
    most = max((value for value in usual if value is not None), default=None)
    if most is not None:
        axis.set_xlim(0, 1.25e3 * most)
    bad = {name for _, table in tables for name in wrong(table)}
    axis.set_yticks(range(len(names)), [f"{name} (wrong)" if name in bad else name for name in names], fontsize=7)
    axis.invert_yaxis()
    axis.set_title(tables[0][1]["title"], fontsize=9, loc="left")
    axis.set_xlabel("ms, weighted by how often each shape occurs", fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.legend(fontsize=7, loc="lower right")
