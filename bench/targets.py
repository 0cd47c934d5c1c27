"""The speed and memory targets of this project, read off the tables of a run: met or missed, with the ratio.

A target is a ratio of weighted totals within one run. It is evaluated where its tables have the numbers, from measured
seconds or from the model's, and left out where they have not.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.gpu_tables import MASKS, TEN
from bench.gpu_tables import ONE as VERY_SPARSE
from bench.masked_layer import (
    FROZEN,
    KEPT,
    MERGED,
    NAIVE_ONE,
    NAIVE_TWO,
    PEFT,
    PEFT_AUTOCAST,
    PEFT_DEFAULT,
    REFILLED,
    Provider,
)
from bench.results_file import Results, Table, ratio, total, wrong

Measure = Callable[[Results], float | None]


@dataclass(frozen=True)
class Target:
    """`limit`: the largest ratio that meets it, or the smallest where `least`; None: shown without a verdict."""

    what: str
    limit: float | None
    measure: Measure
    least: bool = False

    def evaluate(self, results: Results) -> dict[str, object] | None:
        """The target with its ratio and whether it is met; None where the results lack a number."""
        found = self.measure(results)
        if found is None:
            return None
        met = None if self.limit is None else (found >= self.limit if self.least else found <= self.limit)
        return {"what": self.what, "limit": self.limit, "least": self.least, "ratio": found, "met": met}


def _ours(mask: str, regime: str = "auto") -> str:
    return Provider("ours", mask, regime).name


def _sound(table: Table | None, *names: str) -> bool:
    """Whether a table is there and none of the columns was found wrong."""
    return table is not None and not set(names) & set(wrong(table))


def _columns(table: str, ours: str, base: str, field: str = "median") -> Measure:
    def measure(results: Results) -> float | None:
        found = results.table(table)
        return ratio(found, ours, base, field) if _sound(found, ours, base) else None

    return measure


def _over_bound(table: str, ours: str) -> Measure:
    """Over what no training of a masked layer that forms every weight's gradient undercuts."""

    def measure(results: Results) -> float | None:
        found = results.table(table)
        taken, least = total(found, ours), total(found, ours, "bound")
        return taken / least if _sound(found, ours) and taken is not None and least else None

    return measure


def _extra_memory(table: str, ours: str, other: str) -> Measure:
    """What ours takes beyond the frozen layer over what the other takes beyond it, layers added up."""

    def measure(results: Results) -> float | None:
        found = results.table(table)
        taken = [total(found, name, "extra_bytes") for name in (ours, other, FROZEN.name)]
        if any(t is None for t in taken) or taken[1] <= taken[2]:
            return None
        return max(0.0, taken[0] - taken[2]) / (taken[1] - taken[2])

    return measure


def _inverse(measure: Measure) -> Measure:
    return lambda results: (lambda found: 1 / found if found else None)(measure(results))


MODES = {"exact": "auto", "one-product": KEPT}
"""The modes that the targets of masked LoRA are evaluated for, with their regimes."""

# Batch and size of each model, and the limits of forward + backward with a mask of 10 %. PEFT's default factors are in
# fp32: with autocast, as most train, and without, as its layers come.
LINEAR = {
    "SD 1.5": ("batch 8, 512 px", {PEFT: 0.55, PEFT_AUTOCAST: 0.35, PEFT_DEFAULT: 0.35, NAIVE_TWO: 0.5}),
    "SDXL": ("batch 4, 1024 px", {PEFT: 0.8, PEFT_AUTOCAST: 0.5, PEFT_DEFAULT: 0.5, NAIVE_TWO: 0.5}),
    "FLUX.1": ("batch 2, 1024 px", {PEFT: 1.1, PEFT_AUTOCAST: 0.85, PEFT_DEFAULT: 0.85, NAIVE_TWO: 0.6}),
}


def linear_name(model: str, mode: str, base: str) -> str:
    """Name of the target of a model's attention linears against `base`, a key of LINEAR and one of MODES."""
    return f"{model} attention, {LINEAR[model][0]}, keep 10 %, {mode}, forward + backward / {base}"


def gpu_targets() -> list[Target]:
    targets = []
    for model, (_, limits) in LINEAR.items():
        table = f"linear / {model} / attention / training"
        for mode, regime in MODES.items():
            ours = _ours(TEN.name, regime)
            for base, limit in (limits | {NAIVE_ONE: None}).items():
                what = linear_name(model, mode, base.name)
                targets.append(Target(what, limit, _columns(table, ours, base.name)))
            targets.append(Target(linear_name(model, mode, "lower bound"), 1.25, _over_bound(table, ours)))
        # A kept W + Delta belongs to the step, not to the layer: what a layer takes is that of a refilled one.
        for mode, regime in (("exact", "auto"), ("one-product, refilled", REFILLED)):
            for other, limit in ((NAIVE_TWO, 0.25), (NAIVE_ONE, None)):
                what = f"{model} attention, keep 10 %, {mode}, memory beyond the frozen layer's / {other.name}"
                targets.append(Target(what, limit, _extra_memory(table, _ours(TEN.name, regime), other.name)))
    table = "linear / SD 1.5 / attention / training"
    kept = "backward with all weight gradients"
    # An exact forward with every tile occupied computes two products, so it cannot reach three quarters of one.
    forward, tiles = "fused forward at T = 4096, speed over the library's on a merged weight", MASKS[2].name
    speed = {
        mask: _inverse(_columns("forward at 4096", _ours(mask, "tile"), MERGED.name)) for mask in (TEN.name, tiles)
    }
    for mode, regime in MODES.items():
        what, sparse = f"SD 1.5 attention, keep 1 %, {mode}, forward + backward / ", _ours(VERY_SPARSE.name, regime)
        # 1.07 is the lower bound where only the gradients under the mask are formed.
        targets.append(Target(what + FROZEN.name, 1.45, _columns(table, sparse, FROZEN.name)))
        targets.append(Target(what + PEFT.name, 0.4, _columns(table, sparse, PEFT.name)))
    targets += [
        Target(f"{forward}, {tiles}", 0.75, speed[tiles], least=True),
        Target(f"{forward}, keep 10 %", None, speed[TEN.name]),
        Target(f"saliency pass / {kept}", 1.05, _columns("saliency pass", "streamed", "kept")),
        Target(
            "saliency, gradient and accumulator memory / gradients kept, then added",
            0.55,
            _columns("saliency memory", "streamed", "kept_then_added", "extra_bytes"),
        ),
        Target("selection / reading four times", 1.5, _columns("selection", "fade_kernels", "read four times")),
        Target("selection / cat + kthvalue", None,
               _columns("selection, concatenated", "fade_kernels", "cat + kthvalue")),
        Target("both stages / authors' procedure, time", 0.33, _columns("stages", "ours", "authors")),
        Target("both stages / authors' procedure, memory", 0.5, _columns("stages", "ours", "authors", "extra_bytes")),
    ]  # fmt: skip
    return targets


def cpu_targets() -> list[Target]:
    table = "linear / SD 1.5 / attention / training, CPU"
    sparse, ten, tiles = (_ours(name) for name in (VERY_SPARSE.name, TEN.name, "tiles 20 %"))
    kept = _ours(TEN.name, KEPT)
    what = "CPU, SD 1.5 attention, forward + backward, "
    return [
        Target(f"{what}keep 10 % / {NAIVE_TWO.name}", 0.55, _columns(table, ten, NAIVE_TWO.name)),
        Target(f"{what}keep 10 % / {NAIVE_ONE.name}", None, _columns(table, ten, NAIVE_ONE.name)),
        Target(f"{what}keep 10 % / {PEFT.name}", 1.35, _columns(table, ten, PEFT.name)),
        Target(f"{what}tiles 20 % / {NAIVE_TWO.name}", 0.5, _columns(table, tiles, NAIVE_TWO.name)),
        Target(f"{what}tiles 20 % / {PEFT.name}", 1.0, _columns(table, tiles, PEFT.name)),
        Target(f"{what}keep 10 %, W + delta kept / {FROZEN.name}", None, _columns(table, kept, FROZEN.name)),
        Target(f"{what}keep 10 % / lower bound", None, _over_bound(table, ten)),
        Target(f"{what}keep 1 % / {FROZEN.name}", 1.15, _columns(table, sparse, FROZEN.name)),
        Target(f"{what}keep 1 % / {PEFT.name}", 0.95, _columns(table, sparse, PEFT.name)),
        Target("CPU, selection / cat + kthvalue", 0.5, _columns("selection, CPU", "fade_kernels", "cat + kthvalue")),
        Target("CPU, saliency pass / backward with all weight gradients", 1.05,
               _columns("saliency pass, CPU", "streamed", "kept")),
        Target("CPU, saliency, gradient and accumulator memory / gradients kept, then added", 0.55,
               _columns("saliency memory, CPU", "streamed", "kept_then_added", "extra_bytes")),
        Target("CPU, saliency pass, all memory, activations too / gradients kept, then added", None,
               _columns("saliency pass, CPU", "streamed", "kept_then_added", "extra_bytes")),
    ]  # fmt: skip


def evaluate(results: Results) -> list[dict[str, object]]:
    """Every target that the results can answer."""
    found = (target.evaluate(results) for target in (*gpu_targets(), *cpu_targets()))
    return [target for target in found if target is not None]


def show_unanswered(results: Results) -> None:
    """Names the targets of a GPU run that its tables cannot answer."""
    for target in gpu_targets():
        if target.evaluate(results) is None:
            print(f"  no answer: {target.what}")


def show(targets: Iterable[dict[str, object]], predicted: bool = False) -> None:
    """Prints the targets, one a line: verdict, ratio, limit."""
    print("\ntargets" + (" (predicted by the roofline model, not measured)" if predicted else ""))
    for target in targets:
        verdict = {True: "met", False: "MISSED", None: ""}[target["met"]]
        limit = "" if target["limit"] is None else f"{'>=' if target['least'] else '<='} {target['limit']:g}"
        print(f"  {verdict:6}  {target['ratio']:7.3f}  {limit:8}  {target['what']}")
