"""The evidence behind the defaults: UA, IRA, CRA, drift and adapter bytes by concept, seed, saliency, scaling and keep.

    python -m bench.sweep --output bench/results/sweep.json          runs what the file lacks, then draws the plot
    python -m bench.sweep --output bench/results/sweep.json --plot   draws the plot alone

Every run is a whole unlearning run on the bundled model followed by an evaluation at seeds it was not trained on. Runs
are spread over worker processes of one thread each, so the seconds in the rows are not timings to quote.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any

CONCEPTS = (
    ("three", "eight"), ("seven", "one"), ("zero", "six"), ("five", "two"), ("neon", "plain"), ("mosaic", "outline"),
)  # fmt: skip
SEEDS = (0, 1)
VARIANTS = (
    ("denoising", "none"), ("denoising", "module"), ("distillation", "none"), ("distillation", "module"),
    ("contrast", "none"), ("contrast", "module"), ("random", "none"),
)  # fmt: skip
"""Saliency and its scaling; the first is the paper's, the last the control."""
KEEPS = (0.1, 0.01, 0.001)
EVALUATION_SEEDS = (188, 288, 588)
EVALUATION_STEPS = 10

Cell = tuple[str, str, int, str, str, float]


def cells() -> list[Cell]:
    """Every run of the sweep: (forget, surrogate, seed, saliency, scaling, keep)."""
    return [
        (forget, surrogate, seed, saliency, scaling, keep)
        for seed in SEEDS
        for keep in KEEPS
        for forget, surrogate in CONCEPTS
        for saliency, scaling in VARIANTS
    ]


def run_cell(cell: Cell, changes: dict[str, Any], images: int, folder: str) -> dict[str, Any]:
    """One run and its evaluation on `images` per prompt. `changes` go to `Config.replace`; `folder` keeps what runs of
    a concept share."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    import fade
    from fade.digitcanvas import load_pipeline
    from fade.evaluation import evaluate

    forget, surrogate, seed, saliency, scaling, keep = cell
    pipeline = load_pipeline()
    settings = {"locate__saliency": saliency, "locate__scaling": scaling, "locate__keep": keep, "seed": seed}
    config = fade.Config().replace(**settings, **changes)
    output = Path(folder) / f"{forget}-{surrogate}-{seed}-{os.getpid()}"
    adapter = fade.unlearn(pipeline, forget, surrogate, config=config, output=output, overwrite=True, progress=False)
    kept = Path(folder) / f"baseline-{os.getpid()}.safetensors"
    baseline = load_file(kept)["images"] if kept.exists() else None
    result = evaluate(
        pipeline, adapter, seeds=EVALUATION_SEEDS[:images], steps=EVALUATION_STEPS, baseline=baseline, progress=False
    )
    if baseline is None:
        save_file({"images": result.baseline}, kept)
    run, record = adapter.run, fade.adapter_file.read_adapter_file(output / "adapter.safetensors")
    occupied = sum(layer["tiles_occupied"] * layer["shape"][0] * layer["shape"][1] for layer in run["layers"])
    return {
        "forget": forget, "surrogate": surrogate, "seed": seed,
        "saliency": saliency, "scaling": scaling, "keep": keep,
        **{name: result.metrics[name] for name in ("UA", "IRA", "CRA", "drift")},
        "adapter_bytes": record.bytes,
        "form": record.metadata["form"],
        "tiles_occupied": occupied / run["total"],
        "final_losses": {half: mean(run["losses"][half][-20:]) for half in ("forget", "retain")},
        "seconds": run["seconds"],
        "changes": changes,
        "images": images,
    }  # fmt: skip


def key(row: dict[str, Any]) -> Cell:
    return (row["forget"], row["surrogate"], row["seed"], row["saliency"], row["scaling"], row["keep"])


def label(row: dict[str, Any]) -> str:
    return row["saliency"] + (", scaled by module" if row["scaling"] == "module" else "")


def sweep(output: Path, todo: list[Cell], changes: dict[str, Any], images: int, workers: int) -> list[dict[str, Any]]:
    """Runs what `output` lacks, writing it after every run, and returns all rows."""
    from bench.harness import environment
    from fade.config import Config
    from fade.progress import progress_bar

    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    done = {key(row) for row in rows if row["changes"] == changes}
    todo = [cell for cell in todo if cell not in done]
    settings = {
        "evaluation_seeds": EVALUATION_SEEDS[:images], "evaluation_steps": EVALUATION_STEPS,
        "config": Config().replace(**changes).to_dict(),
    }  # fmt: skip
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar("sweeping", len(todo), True) as advance,
        ProcessPoolExecutor(workers, mp_context=context) as pool,
    ):
        for future in as_completed([pool.submit(run_cell, cell, changes, images, folder) for cell in todo]):
            row = future.result()
            rows.append(row)
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps({"environment": environment(), "settings": settings, "rows": rows}, indent=1))
            advance(f"{row['forget']} {row['saliency']} {row['keep']}: UA {row['UA']:.0f} IRA {row['IRA']:.0f}")
    return rows


def summary(rows: list[dict[str, Any]]) -> Any:
    """Means by saliency and keep, over all concepts and seeds, and the worst UA of a digit and of a style."""
    from rich.table import Table

    from fade.digitcanvas import DIGITS

    table = Table(title="mean over concepts and seeds (worst UA of a digit / a style)")
    for name in ("saliency", "keep", "UA", "worst", "IRA", "CRA", "drift", "kB", "tiles"):
        table.add_column(name, justify="right")
    groups = defaultdict(list)
    for row in rows:
        groups[label(row), row["keep"]].append(row)
    for (saliency, keep), group in sorted(groups.items(), key=lambda item: (-item[0][1], item[0][0])):
        worst = [
            min((r["UA"] for r in group if (r["forget"] in DIGITS) == digit), default=float("nan"))
            for digit in (True, False)
        ]
        means = {name: mean(r[name] for r in group) for name in ("UA", "IRA", "CRA", "drift", "adapter_bytes")}
        table.add_row(
            saliency, f"{keep:g}", f"{means['UA']:.1f}", f"{worst[0]:.0f} / {worst[1]:.0f}", f"{means['IRA']:.1f}",
            f"{means['CRA']:.1f}", f"{means['drift']:.4f}", f"{means['adapter_bytes'] / 1e3:.1f}",
            f"{mean(r['tiles_occupied'] for r in group):.2f}",
        )  # fmt: skip
    return table


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """UA against keep, digits left, styles right: a colour per saliency, dashed unscaled; dots are the worst runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from fade.digitcanvas import DIGITS

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    colors = list(dict.fromkeys(saliency for saliency, _ in VARIANTS))
    for axis, digits, title in zip(axes, (True, False), ("digits", "styles"), strict=True):
        for index, (saliency, scaling) in enumerate(VARIANTS):
            name = label({"saliency": saliency, "scaling": scaling})
            chosen = [r for r in rows if label(r) == name and (r["forget"] in DIGITS) == digits]
            if not chosen:
                continue
            keeps = sorted({r["keep"] for r in chosen})
            values = [[r["UA"] for r in chosen if r["keep"] == keep] for keep in keeps]
            color = f"C{colors.index(saliency)}"
            style = "-" if scaling == "module" else "--"
            axis.plot(keeps, [mean(v) for v in values], style, color=color, label=name, linewidth=2)
            # Side by side, so that equal ones can be told apart.
            beside = [keep * 1.04 ** (index - len(VARIANTS) // 2) for keep in keeps]
            axis.plot(beside, [min(v) for v in values], "o", color=color, markersize=4,
                      markerfacecolor=color if style == "-" else "white")  # fmt: skip
        axis.set(xscale="log", xlabel="kept fraction of target weights", title=f"forgetting {title}", ylim=(-3, 103))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("UA, % forgotten")
    title = "lines: mean\ndots: worst run"
    figure.legend(*axes[0].get_legend_handles_labels(), title=title, loc="outside right center")
    figure.savefig(path, dpi=150)


def main() -> None:
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results/sweep.json"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument(
        "--images", type=int, choices=(1, 2, 3), default=1, help="images of each prompt to judge a run by"
    )
    parser.add_argument("--plot", action="store_true", help="draw plot and table of an existing file, run nothing")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION__NAME=JSON", help="change a setting")
    parser.add_argument("--concepts", help="comma-separated concepts to run, e.g. three,neon")
    parser.add_argument("--keeps", help="comma-separated fractions")
    parser.add_argument("--saliencies", help="comma-separated saliencies")
    parser.add_argument("--scalings", help="comma-separated scalings")
    parser.add_argument("--seeds", help="comma-separated seeds")
    arguments = parser.parse_args()
    if not arguments.plot:
        changes = {name: json.loads(value) for name, _, value in (item.partition("=") for item in arguments.set)}
        a = arguments
        columns = (a.concepts, None, a.seeds, a.saliencies, a.scalings, a.keeps)
        wanted = [
            column and {float(value) if index in (2, 5) else value for value in column.split(",")}
            for index, column in enumerate(columns)
        ]
        todo = [c for c in cells() if all(w is None or v in w for v, w in zip(c, wanted, strict=True))]
        sweep(arguments.output, todo, changes, arguments.images, arguments.workers)
    rows = json.loads(arguments.output.read_text())["rows"]
    plot(rows, arguments.output.with_suffix(".png"))
    Console().print(summary(rows))


if __name__ == "__main__":
    main()
