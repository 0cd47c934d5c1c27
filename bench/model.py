"""`python -m bench model`: what the roofline model expects of a chip, beside targets and the specification's ratios.

The same tables as a GPU run, filled with predicted seconds. Nothing here is measured.
"""

from dataclasses import replace
from pathlib import Path

from bench import gpu_tables, roofline, targets
from bench.harness import print_table
from bench.masked_layer import RANK
from bench.plans import predict_plans
from bench.results_file import Results, show
from bench.roofline import Chip, Cost
from bench.shapes import FLUX1, SD15, SDXL, Linear, Model, batched

# Forward + backward of the attention linears over the frozen layer's, as stated in the specification (kernels.md,
# section 9) for SD 1.5, SDXL and FLUX.1.
STATED = {
    "PEFT dense": (4.2, 2.9, 1.5),
    "PEFT default": (6.5, 4.2, 2.0),
    "naive masked": (4.6, 3.9, 2.8),
    "exact fused, occupancy 1": (2.5, 2.7, 2.9),
    "exact fused, occupancy 0.1": (1.6, 1.5, 1.4),
    "one GEMM from scratch": (1.7, 1.7, 1.6),
}
NOTES = (
    "PEFT default: the stated ratios are those of autocast to bf16 (x to fp32 and back, products in bf16). Without it, "
    "as in the line below, its products run in fp32 and their tensors are twice as large.",
    "exact fused: the stated ratios leave out that a tile of B A is made anew for every 128 rows of x; the line below "
    "counts it.",
    "one GEMM from scratch: the stated ratios keep W + D of every layer for the backward pass; the line below makes it "
    "again, as the code does. It rounds W + D, and is no choice of ours.",
    "gather: the rate at which operands are fetched by an index follows from counted instructions alone.",
    "naive masked is the exact form with two products; adding the delta to the weight first costs less and rounds.",
)


def _ratio(model: Model, path: str, chip: Chip) -> float:
    """Weighted forward + backward seconds of a path over the frozen layer's."""

    def cost(layer: Linear) -> Cost:
        return {
            "PEFT dense": lambda: roofline.peft(layer, RANK),
            "PEFT default": lambda: roofline.peft_autocast(layer, RANK),
            "PEFT default, no autocast": lambda: roofline.peft_default(layer, RANK),
            "naive masked": lambda: roofline.naive_masked(layer, RANK),
            "naive masked, one product": lambda: roofline.naive_masked(layer, RANK, two_products=False),
            "exact fused, occupancy 1": lambda: roofline.fused(layer, RANK, 1.0, chip),
            "exact fused, occupancy 0.1": lambda: roofline.fused(layer, RANK, 0.1, chip),
            "split, occupancy 1": lambda: roofline.split(layer, RANK, 1.0, chip),
            "split, occupancy 0.1": lambda: roofline.split(layer, RANK, 0.1, chip),
            "whole": lambda: roofline.whole(layer, RANK),
            "one GEMM from scratch": lambda: roofline.scratch(layer, RANK, kept=True),
            "one GEMM from scratch, made twice": lambda: roofline.scratch(layer, RANK),
            "gather, 1 %": lambda: roofline.gather(layer, RANK, 0.01),
            "gather, 0.1 %": lambda: roofline.gather(layer, RANK, 0.001),
        }[path]()

    layers = batched(model.attention, model.batch)
    above = roofline.total([(layer.count, cost(layer)) for layer in layers], chip)
    return above / roofline.total([(layer.count, roofline.frozen(layer)) for layer in layers], chip)


def stated_ratios(chip: Chip) -> dict[str, tuple[float, float, float]]:
    """The paths of `STATED` under its assumptions: no cost for making tiles of B A."""
    free = replace(chip, row_tile=0)
    return {path: tuple(_ratio(model, path, free) for model in (SD15, SDXL, FLUX1)) for path in STATED}


def further_ratios(chip: Chip) -> dict[str, tuple[float, float, float]]:
    """The other paths, and those that differ with every cost counted."""
    paths = (
        "PEFT default, no autocast", "naive masked, one product", "exact fused, occupancy 1",
        "exact fused, occupancy 0.1", "split, occupancy 1", "split, occupancy 0.1", "whole",
        "one GEMM from scratch, made twice", "gather, 1 %",
        "gather, 0.1 %",
    )  # fmt: skip
    return {path: tuple(_ratio(model, path, chip) for model in (SD15, SDXL, FLUX1)) for path in paths}


def predict(chip: Chip, work: gpu_tables.Workload = gpu_tables.FULL, path: Path | None = None) -> Results:
    """Every table with the model's seconds, and the targets that follow from them."""
    results = Results(None, {"kind": "model", "chip": vars(chip)})
    predict_plans(gpu_tables.plans(work), results, chip)
    results.payload["targets"] = targets.evaluate(results)
    results.payload["complete"] = True
    results.path = path
    results.save()
    return results


def main(chip: Chip, output: Path | None) -> None:
    print(
        f"{chip.name}: {chip.bandwidth / 1e12:g} TB/s, {chip.matrix / 1e15:g} PFLOP/s, "
        f"{chip.launch * 1e6:g} us a launch; own kernels at {chip.efficiency:g} of the matrix rate\n"
        "predicted, not measured"
    )
    results = predict(chip, path=output)
    for table in results.tables:
        show(table)
        _print_rows(table)
    models = (SD15.name, SDXL.name, FLUX1.name)
    print("\nattention linears, forward + backward, x the frozen layer; in brackets the specification's")
    rows = [
        [path, *(f"{value:.2f} ({stated:g})" for value, stated in zip(values, STATED[path], strict=True))]
        for path, values in stated_ratios(chip).items()
    ]
    print_table(["under its assumptions", *models], rows)
    print()
    further = [[path, *(f"{v:.2f}" for v in values)] for path, values in further_ratios(chip).items()]
    print_table(["every cost counted", *models], further)
    for note in NOTES:
        print(f"- {note}")
    targets.show(results.payload["targets"], predicted=True)


def _print_rows(table: dict) -> None:
    """Microseconds of each shape, for the columns that differ."""
    if len(table["rows"]) < 2:
        return
    chosen = [c for c in table["rows"][0]["cells"] if c == table["base"] or c.startswith(("ours,", "fade_kernels"))]
    rows = [
        [row["row"], str(row["count"]), *(f"{1e6 * row['cells'][c]['median']:.1f}" for c in chosen)]
        for row in table["rows"]
    ]
    print_table(["  microseconds", "count", *chosen], rows)
