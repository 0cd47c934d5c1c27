"""The tables in docs/engine.md of what a GPU run measured: `python -m bench show FILE --markdown`."""

from collections.abc import Mapping
from typing import Any

from bench import targets
from bench.gpu_tables import MASKS, ONE, TEN
from bench.masked_layer import (
    FROZEN,
    KEPT,
    NAIVE_ONE,
    NAIVE_TWO,
    PEFT,
    PEFT_AUTOCAST,
    PEFT_DEFAULT,
    RANK,
    REFILLED,
    Provider,
)
from bench.results_file import Results, ratio
from bench.shapes import MODELS

LEAST_RUNS = 3
"""A table with fewer runs in any row is not quoted."""

TILES = MASKS[2]
ROWS: dict[str, Provider] = {
    "PEFT dense LoRA, bf16 factors": PEFT,
    "PEFT's default (fp32 factors), autocast": PEFT_AUTOCAST,
    "PEFT's default (fp32 factors)": PEFT_DEFAULT,
    "naive masked, two products": NAIVE_TWO,
    "naive masked, one product": NAIVE_ONE,
    "ours, exact, random 10 % or 1 %": Provider("ours", TEN.name),
    "ours, exact, tiles 10 %": Provider("ours", TILES.name),
    "ours, one-product, refilled, random 10 %": Provider("ours", TEN.name, REFILLED),
    "ours, one-product, kept, random 10 %": Provider("ours", TEN.name, KEPT),
    "ours, one-product, kept, random 1 %": Provider("ours", ONE.name, KEPT),
    "ours, one-product, kept, tiles 10 %": Provider("ours", TILES.name, KEPT),
}


def _runs(table: Mapping[str, Any]) -> int:
    return min(cell["repeats"] for row in table["rows"] for cell in row["cells"].values() if "repeats" in cell)


def markdown(results: Results) -> str:
    """Modes in units of the frozen layer, and the targets with what was reached."""
    facts = results.payload["environment"]
    tables = {model: results.table(f"linear / {model.name} / attention / training") for model in MODELS}
    tables = {model: table for model, table in tables.items() if table and table["rows"] and _runs(table) >= LEAST_RUNS}
    chip = results.payload["chip"]
    lines = [
        f"Measured on an {facts['gpu']} with torch {facts['torch']} and Triton {facts['versions']['triton']}: forward "
        f"+ backward of all attention linears in bf16, rank {RANK}, in units of the frozen layer, whose large products "
        f"run at {chip['matrix'] / 1e12:.0f} TFLOP/s. The device's time: the host is taken to keep up, with a CUDA "
        "graph.",
        "",
        "| | " + " | ".join(f"{model.name}, batch {model.batch}" for model in tables) + " |",
        "|---" * (1 + len(tables)) + "|",
    ]
    for label, provider in ROWS.items():
        cells = [ratio(table, provider.name, FROZEN.name) for table in tables.values()]
        lines.append(f"| {label} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    found = {target["what"]: target for target in targets.evaluate(results)}
    names = list(targets.LINEAR)
    lines += [
        "",
        "The project's targets for a random mask of 10 %, forward + backward; one-product is the kept form, the lower "
        "bound what no algorithm undercuts that forms the gradient of every weight.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (1 + len(names)) + "|",
    ]
    for mode in reversed(targets.MODES):
        for base in (PEFT.name, PEFT_AUTOCAST.name, PEFT_DEFAULT.name, NAIVE_TWO.name, "lower bound"):
            cells = [_cell(found.pop(targets.linear_name(name, mode, base))) for name in names]
            lines.append(f"| {mode} / {base} | " + " | ".join(cells) + " |")
    lines += ["", "The others:", ""]
    lines += [f"- {what}: {_cell(target)}" for what, target in found.items() if target["limit"] is not None]
    return "\n".join(lines) + "\n"


def _cell(target: Mapping[str, Any]) -> str:
    sign = "≥" if target["least"] else "≤"
    return f"{target['ratio']:.2f} ({sign} {target['limit']:g}: {'met' if target['met'] else 'missed'})"
