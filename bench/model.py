"""`python -m bench model`: bound, prediction and their ratio for every mode, and the targets that follow; nothing is
measured here.

A summary of the attention linears of every model, and with `tables` the tables of a GPU run filled with predicted
seconds.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import gpu_tables, roofline, targets
from bench.gpu_tables import TEN
from bench.harness import ROOT, print_table
from bench.masked_layer import (
    FROZEN,
    KEPT,
    NAIVE_ONE,
    NAIVE_TWO,
    ONE_PRODUCT,
    PEFT,
    PEFT_AUTOCAST,
    PEFT_DEFAULT,
    RANK,
    REFILLED,
    Provider,
)
from bench.plans import Plan, predict_plans
from bench.results_file import Results, show
from bench.roofline import EFFICIENCIES, HOST, Chip, Cost
from bench.shapes import FLUX1, MODELS, SD15, SDXL, Linear, Model, batched
from fade_kernels import choices

GOAL = 1.25
"""Of the first lower bound, that every mode of ours should reach."""

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
    "A bound is no design: no known kernel reaches it. The first forms the gradient of every weight, the second only "
    "those of a mask of 1 %; PEFT forms none, and so can undercut the first.",
    "Own kernels are assumed at three shares of the library's rate; the library's products stay where they are.",
    "one-product, kept: W + delta of all layers is made by one launch a step and stays until the backward pass; "
    "refilled: each pass of a layer makes it anew in one scratch.",
    "PEFT default: its factors are in fp32; with autocast its products run in bf16.",
    "naive masked, one product, rounds W + delta to nearest, where a small delta is lost; ours, in both modes, keeps "
    "it.",
    "gather: the rate at which operands are fetched by an index follows from counted instructions alone.",
)


@dataclass(frozen=True)
class Mode:
    """One line of the summary.

    Attributes:
        cost: what it moves and computes for a layer.
        host: whose host time it takes, a key of `roofline.HOST`; "": unknown.
        ours: whether the goal holds for it.
    """

    name: str
    cost: Callable[[Linear, Chip], Cost]
    host: str = ""
    ours: bool = False


def _provided(name: str, provider: Provider, host: str = "", ours: bool = False) -> Mode:
    return Mode(name, lambda layer, chip: gpu_tables.linear_cost(provider, layer, chip), host, ours)


def _ours(name: str, mask: str, regime: str = "auto") -> Mode:
    host = "one-product" if regime in ONE_PRODUCT else "exact"
    return _provided(name, Provider("ours", mask, regime), host, ours=True)


def _auto(layer: Linear, chip: Chip) -> Cost:
    """What `training_mode = "auto"` takes for each layer, one-product weights kept."""
    sizes = (layer.tokens, layer.out_features, layer.in_features)
    chosen = choices.choose_training_mode(torch.bfloat16, *sizes, TEN.keep, gpu_tables.occupancy(TEN))
    return gpu_tables.linear_cost(Provider("ours", TEN.name, targets.MODES[chosen]), layer, chip)


FIRST = Mode("lower bound: gradient of every weight", lambda layer, chip: roofline.lower_bound(layer))
SECOND = Mode("lower bound: gradients of 1 %", lambda layer, chip: roofline.lower_bound(layer, 0.01))
BASE = _provided("frozen layer", FROZEN, "frozen")
SUMMARY = (
    BASE,
    FIRST,
    SECOND,
    _provided("PEFT dense LoRA, bf16 adapters", PEFT, "PEFT"),
    _provided("PEFT default (fp32), autocast", PEFT_AUTOCAST, "PEFT"),
    _provided("PEFT default (fp32)", PEFT_DEFAULT, "PEFT"),
    _provided("naive masked, two products", NAIVE_TWO),
    _provided("naive masked, one product", NAIVE_ONE),
    _ours("ours, exact, random 10 %", "random 10 %"),
    _ours("ours, exact, random 1 %", "random 1 %"),
    _ours("ours, exact by gather, random 1 %", "random 1 %", "gather"),
    _ours("ours, exact, tiles 10 %", "tiles 10 %"),
    _ours("ours, one-product, kept, random 10 % or 1 %", "random 10 %", KEPT),
    _ours("ours, one-product, refilled, random 10 % or 1 %", "random 10 %", REFILLED),
    _ours("ours, one-product, kept, tiles 10 %", "tiles 10 %", KEPT),
    Mode("ours, the mode chosen for each layer, random 10 %", _auto, "one-product", ours=True),
    Mode(
        "not built: one-product, gradients contracted once, 10 %",
        lambda layer, chip: roofline.one_product_stored(layer, RANK, 0.1, 1.0, chip),
        ours=True,
    ),
    Mode(
        "not built: one-product, gradients sampled beside dX, 1 %",
        lambda layer, chip: roofline.one_product_sampled(layer, RANK, 0.01, chip),
        ours=True,
    ),
)


# --- the summary -----------------------------------------------------------------------------------------------------


def measured_host(path: Path = ROOT / "bench" / "results" / "host_overhead.json") -> dict[str, float]:
    """Host seconds of one layer, forward + backward, by the keys of `roofline.HOST`: those of a measurement where its
    file (`bench/host_overhead.py`) is there."""
    rows = {"frozen": "frozen", "PEFT": "PEFT's three linears", "exact": "fused", "one-product": "one-product"}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["tables"]["gpu"]
    except (OSError, ValueError, KeyError):
        return dict(HOST)
    measured = {name: found.get(f"{row}, forward + backward") for name, row in rows.items()}
    return {name: float(row["processor"]) if row else HOST[name] for name, row in measured.items()}


def seconds(model: Model, mode: Mode, chip: Chip) -> float:
    """Forward + backward of a model's attention linears on the device."""
    layers = batched(model.attention, model.batch)
    return roofline.total([(layer.count, mode.cost(layer, chip)) for layer in layers], chip)


def summary(model: Model, chip: Chip, host: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """A row for each mode: seconds by the efficiency of own kernels, ratios to the frozen layer and to the first bound.

    Args:
        host: seconds of the host for a layer. Given, a mode takes the longer of the device's time and the host's, as
            does the frozen layer; None: the host keeps up.
    """
    number = sum(layer.count for layer in model.attention)

    def taken(mode: Mode, chip: Chip) -> float:
        waited = number * host[mode.host] if host is not None and mode.host else 0.0
        return max(seconds(model, mode, chip), waited)

    base, bound = taken(BASE, chip), seconds(model, FIRST, chip)
    rows = []
    for mode in SUMMARY:
        times = {f"{e:g}": taken(mode, replace(chip, efficiency=e)) for e in EFFICIENCIES}
        rows.append(
            {
                "mode": mode.name,
                "ours": mode.ours,
                "seconds": times,
                "over_frozen": {e: t / base for e, t in times.items()},
                "bound_seconds": bound,
                "over_bound": {e: t / bound for e, t in times.items()},
                "goal_reached": {e: t <= GOAL * bound for e, t in times.items()} if mode.ours else None,
                "host_seconds": number * host[mode.host] if host is not None and mode.host else None,
            }
        )
    return rows


def _three(values: Mapping[str, float], digits: int = 2) -> str:
    """The values for each efficiency, or one where they agree."""
    texts = [f"{value:.{digits}f}" for value in values.values()]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _reached(verdicts: Mapping[str, bool] | None) -> str:
    """Whether a limit is reached; at which efficiencies, where they differ."""
    if verdicts is None:
        return ""
    if len(set(verdicts.values())) == 1:
        return "reached" if next(iter(verdicts.values())) else "missed"
    return "reached at " + ", ".join(e for e, met in verdicts.items() if met)


def print_summary(model: Model, rows: Sequence[Mapping[str, Any]]) -> None:
    efficiencies = " / ".join(f"{e:g}" for e in EFFICIENCIES)
    print(f"\n{model.name}, attention linears, forward + backward: batch {model.batch}, {model.pixels} px, bf16")
    hosted = any(row["host_seconds"] for row in rows)
    header = [f"at {efficiencies}", "ms", "x frozen", "x first bound", f"<= {GOAL:g} x bound"]
    lines = []
    for row in rows:
        milliseconds = {e: 1e3 * t for e, t in row["seconds"].items()}
        cells = [row["mode"], _three(milliseconds), _three(row["over_frozen"]), _three(row["over_bound"])]
        waited = row["host_seconds"]
        host = [f"{1e3 * waited:.1f}" if waited else "-"] if hosted else []
        lines.append([*cells, _reached(row["goal_reached"]), *host])
    print_table([*header, *(["host ms"] if hosted else [])], lines)


# --- targets ---------------------------------------------------------------------------------------------------------


def predict(chip: Chip, path: Path | None = None, plans: Sequence[Plan] | None = None) -> Results:
    """Every table, or those of `plans`, with the model's seconds, and the targets that follow from them."""
    results = Results(None, {"kind": "model", "chip": vars(chip)})
    predict_plans(gpu_tables.plans() if plans is None else plans, results, chip)
    results.payload["targets"] = targets.evaluate(results)
    results.payload["complete"] = True
    results.path = path
    results.save()
    return results


def predicted_targets(chip: Chip) -> list[dict[str, Any]]:
    """Every target with its ratio, and whether it is reached, by the efficiency of own kernels."""
    plans = [
        plan for plan in gpu_tables.plans() if not plan.name.endswith(" / forward") and " / other / " not in plan.name
    ]
    by_efficiency = {
        f"{e:g}": predict(replace(chip, efficiency=e), plans=plans).payload["targets"] for e in EFFICIENCIES
    }
    found = []
    for same in zip(*by_efficiency.values(), strict=True):
        ratios = {e: target["ratio"] for e, target in zip(by_efficiency, same, strict=True)}
        met = {e: target["met"] for e, target in zip(by_efficiency, same, strict=True)}
        first = {name: same[0][name] for name in ("what", "limit", "least")}
        found.append({**first, "ratio": ratios, "reached": None if same[0]["met"] is None else met})
    return found


def print_targets(found: Iterable[Mapping[str, Any]]) -> None:
    print("\ntargets: predicted, not measured")
    lines = []
    for target in found:
        limit = "" if target["limit"] is None else f"{'>=' if target['least'] else '<='} {target['limit']:g}"
        lines.append([target["what"], _three(target["ratio"]), limit, _reached(target["reached"])])
    print_table(["", "ratio", "target", ""], lines)


# --- the specification's ratios --------------------------------------------------------------------------------------


def stated_ratios(chip: Chip) -> dict[str, tuple[float, ...]]:
    """The paths of `STATED` under its assumptions: no cost for making tiles of B A or for partial sums, no caches, and
    a launch for each layer's W + D."""
    free = replace(chip, row_tile=0, partial_sums=False, cache_bytes=0.0)

    def scratch(layer: Linear, chip: Chip) -> Cost:
        made, *rest = (cost := roofline.one_product(layer, RANK, 1.0, chip)).forward
        return replace(cost, forward=(replace(made, launches=1.0), *rest))

    paths = {
        "PEFT dense": lambda layer, chip: roofline.peft(layer, RANK),
        "PEFT default": lambda layer, chip: roofline.peft_autocast(layer, RANK),
        "naive masked": lambda layer, chip: roofline.naive_masked(layer, RANK),
        "exact fused, occupancy 1": lambda layer, chip: roofline.fused(layer, RANK, 1.0, chip),
        "exact fused, occupancy 0.1": lambda layer, chip: roofline.fused(layer, RANK, 0.1, chip),
        "one GEMM from scratch": scratch,
    }
    return {
        name: tuple(seconds(m, Mode(name, cost), free) / seconds(m, BASE, free) for m in (SD15, SDXL, FLUX1))
        for name, cost in paths.items()
    }


# --- the command -----------------------------------------------------------------------------------------------------


def report(chip: Chip, host: Mapping[str, float] | None = None) -> dict[str, Any]:
    """All of it as data: chip, host seconds a layer, a summary for each model, targets."""
    return {
        "kind": "model summary",
        "chip": asdict(chip),
        "host": None if host is None else dict(host),
        "goal": GOAL,
        "models": {model.name: summary(model, chip, host) for model in MODELS},
        "targets": predicted_targets(chip),
        "notes": list(NOTES),
    }


def main(
    chip: Chip,
    output: Path | None = None,
    host: Mapping[str, float] | None = None,
    tables: bool = False,
    as_json: bool = False,
) -> None:
    """Prints the summary and the targets, as text, JSON or Markdown, and writes the predicted tables to `output`."""
    results = predict(chip, path=output) if tables or output is not None else None
    if as_json:
        print(json.dumps(report(chip, host), indent=2))
        return
    found = report(chip, host)
    print(
        f"{chip.name}: {chip.bandwidth / 1e12:g} TB/s, {chip.matrix / 1e15:g} PFLOP/s, {chip.launch * 1e6:g} us a "
        f"launch, {chip.cache / 1e12:g} TB/s from cache up to {chip.cache_bytes / 1e6:g} MB; own kernels at "
        f"{' / '.join(f'{e:g}' for e in EFFICIENCIES)} of the matrix rate\npredicted, not measured"
    )
    if host is None:
        print("the host is assumed to keep up (--host counts its time)")
    else:
        print("host: " + ", ".join(f"{name} {1e6 * t:.0f} us" for name, t in host.items()) + " a layer")
    for model in MODELS:
        print_summary(model, found["models"][model.name])
    print_targets(found["targets"])
    print()
    for note in NOTES:
        print(f"- {note}")
    if tables:
        for table in results.tables:
            show(table)
            _print_rows(table)
        print("\nover the frozen layer, under the specification's assumptions; in brackets its ratios")
        rows = [
            [path, *(f"{value:.2f} ({stated:g})" for value, stated in zip(values, STATED[path], strict=True))]
            for path, values in stated_ratios(chip).items()
        ]
        print_table(["", SD15.name, SDXL.name, FLUX1.name], rows)


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
