"""The evidence behind the defaults: whole runs on the bundled models, judged at seeds they were not trained on.

    python -m bench.sweep methods      which method, by concept, seed and keep   -> bench/results/methods.json
    python -m bench.sweep saliency     which saliency, likewise                  -> bench/results/sweep.json
    python -m bench.sweep emojicanvas  which method on EmojiCanvas, keep 1 %     -> bench/results/emojicanvas.json
    python -m bench.sweep peers        which settings of other people's methods there, for `bench.table`
                                                                                 -> bench/results/peers_emojicanvas.json

A study runs what its file lacks and writes it after every run, so that it may be interrupted and split; then it draws
its plot, where it has one, and prints its table, which --plot does alone. Runs are spread over worker processes of one
thread each, so the seconds in their rows are not timings to quote: --timings makes those, one run at a time with all
threads, the recipes in turns.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

EVALUATION_SEEDS = (188, 288, 588)
EVALUATION_STEPS = 10
RESULTS = Path("bench/results")

SOME = (
    ("three", "eight"), ("seven", "one"), ("zero", "six"), ("five", "two"), ("neon", "plain"), ("mosaic", "outline"),
)  # fmt: skip
ALL = (
    *SOME, ("one", "seven"), ("two", "five"), ("four", "nine"), ("six", "zero"), ("eight", "three"), ("nine", "four"),
    ("plain", "ink"), ("ink", "pencil"), ("pencil", "ink"), ("laser", "neon"), ("outline", "plain"),
    ("stripes", "mosaic"),
)  # fmt: skip
"""Every digit and every style, some with the neighbour that is hardest to tell from it as surrogate."""
EMOJI = (
    ("tiger", "dog"), ("glossy", "flat"), ("pizza", "taco"), ("apple", "tomato"), ("leopard", "lion"),
    ("ink", "twemoji"), ("hamster", "rabbit"), ("fish", "shark"), ("noto", "twemoji"), ("taxi", "bus"),
    ("guitar", "violin"), ("castle", "cactus"), ("rocket", "airplane"),
)  # fmt: skip
"""Of EmojiCanvas, seven objects with many or very near look-alikes, one of which takes their place for some; three with
none or one; and three styles, of which `glossy` and `noto` each have a near one."""
TARGETS = {"UA": 98.0, "IRA": 0.98, "CRA": 0.98}
"""What a run should reach: UA in percent, the others as a share of the base model's."""


@dataclass(frozen=True)
class Study:
    """Every recipe (changes of the default settings, by `Config.replace`) on every pair, seed and keep.

    `by_words` adds held-out phrasings to every run. At the keeps in `attacked` the first seed's runs on `SOME` pairs
    are attacked, too, on eight pictures.
    """

    output: Path
    recipes: dict[str, dict[str, Any]]
    pairs: Sequence[tuple[str, str]]
    seeds: Sequence[int]
    keeps: Sequence[float | None]
    """None is each method's own."""
    draw: "Callable[[Study, dict[str, Any], Path], None] | None"
    by_words: bool = False
    attacked: Sequence[float] = ()
    model: str = "digitcanvas"
    """The bundled model's name."""
    steps: int | None = EVALUATION_STEPS
    """That pictures are drawn in to be judged; None are those that the model's accuracy was measured with."""
    dtype: str = "float32"
    """In which the model is unlearned; its runs are judged on the float32 model, which any adapter of it fits."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    forget: str
    surrogate: str
    seed: int
    recipe: str
    keep: float | None

    @staticmethod
    def of(row: dict[str, Any]) -> "Cell":
        return Cell(**{name: row[name] for name in Cell.__dataclass_fields__})


def cells(study: Study) -> list[Cell]:
    """Every run, in the order in which an interrupted study is most worth having."""
    return [
        Cell(forget, surrogate, seed, recipe, keep)
        for keep in study.keeps
        for seed in study.seeds
        for forget, surrogate in study.pairs
        for recipe in study.recipes
    ]


_shared: dict[Any, Any] = {}
"""What the runs of one worker process share: what the base model draws is the same for all of them."""


def config_of(study: Study, recipe: str, keep: float | None) -> Any:
    """A recipe's `fade.Config`, without what of the study's common settings its method does not read."""
    from fade import Config

    kept = {} if keep is None else {"locate__keep": keep}
    return Config().replace(**study.recipes[recipe], **kept).without_ignored()


def _kept(keep: float | None) -> str:
    return "own" if keep is None else f"{keep:g}"


def run_cell(cell: Cell, study: Study, images: int, folder: str) -> dict[str, Any]:
    """One run, judged by `images` pictures of each prompt. In `folder` the runs of a process share sampled latents."""
    import torch

    torch.set_num_threads(1)
    import fade
    from fade import bundled
    from fade.evaluation import evaluate
    from fade.evaluation.attacks import attack
    from fade.evaluation.metrics.phrasings import held_out

    model = bundled.model(study.model)
    pipeline = model.load_pipeline(torch_dtype=getattr(torch, study.dtype))
    output = Path(folder) / f"{cell.forget}-{cell.surrogate}-{cell.seed}-{os.getpid()}"
    config = config_of(study, cell.recipe, cell.keep).replace(seed=cell.seed)
    adapter = fade.unlearn(
        pipeline, cell.forget, cell.surrogate, config=config, output=output, overwrite=True, progress=False
    )  # fmt: skip
    if study.dtype != "float32":
        pipeline = model.load_pipeline()
        adapter = fade.load_adapter(pipeline, output / "adapter.safetensors")
    first = cell.seed % len(EVALUATION_SEEDS)
    drawn = {"seeds": (EVALUATION_SEEDS * 2)[first : first + images], "steps": study.steps, "progress": False}
    asked = (drawn["seeds"], model.concerned([cell.forget]))
    result = evaluate(pipeline, adapter, baseline=_shared.get(asked), **drawn)
    _shared[asked] = dataclasses.replace(result, images=result.baseline)
    run, record = adapter.run, fade.adapter_file.read_adapter_file(output / "adapter.safetensors")
    occupied = sum(layer["tiles_occupied"] * layer["shape"][0] * layer["shape"][1] for layer in run["layers"])
    row = {
        **asdict(cell),
        **{name: result.metrics[name] for name in ("UA", "IRA", "NA", "CRA", "drift", "redirected")},
        "base": {name: result.base[name] for name in ("UA", "IRA", "NA", "CRA")},
        "neighbours": {word: row["after"] for word, row in result.neighbours.items()},
        "adapter_bytes": record.bytes,
        "form": record.metadata["form"],
        "path": run["path"],
        "tiles_occupied": occupied / run["total"],
        "training_steps": len(next(iter(run.get("losses", {}).values()), ())),
        "seconds": run["seconds"],
        "images": len(result.images),
    }
    if "training_mode" in run:
        row["training_mode"] = run["training_mode"]
    if study.by_words:
        words = (cell.forget, cell.surrogate, drawn["seeds"])
        found = _shared[words] = held_out(pipeline, adapter, baseline=_shared.get(words), **drawn)
        row["phrasings"] = {name: getattr(found, name) for name in ("adapted", "base", "surrogate", "images")}
    attacked = cell.keep in study.attacked and cell.seed == study.seeds[0]
    if attacked and (cell.forget, cell.surrogate) in SOME:
        made = attack(pipeline, adapter, pictures=8, progress=False)
        row["attacks"] = {f"{one.attack}, {one.setting}": one.rate for one in made.results}
        row["unattacked"], row["attacked_pictures"] = made.unattacked.rate, made.base.pictures
    return row


def sweep(study: Study, todo: list[Cell], images: int, workers: int) -> None:
    """Runs what the study's file lacks, and writes it after every run."""
    from bench.harness import environment, write_json
    from fade.config import Config
    from fade.progress import progress_bar

    content = _content(study)
    done = {Cell.of(row) for row in content["rows"]}
    todo = [cell for cell in todo if cell not in done]
    content["settings"] = {
        "evaluation_seeds": EVALUATION_SEEDS,
        "evaluation_steps": study.steps,
        "recipes": {name: Config().replace(**changes).to_dict() for name, changes in study.recipes.items()},
    }
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar("sweeping", len(todo), True) as advance,
        ProcessPoolExecutor(workers, mp_context=context) as pool,
    ):
        runs = [pool.submit(run_cell, cell, study, images, folder) for cell in todo]
        try:
            for future in as_completed(runs):
                row = future.result()
                content["rows"].append(row)
                write_json(study.output, {"environment": environment(), **content})
                kept = _kept(row["keep"])
                advance(f"{row['forget']}, {row['recipe']}, {kept}: UA {row['UA']:.0f} IRA {row['IRA']:.0f}")
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or what is left would run for nothing
            raise


def time_recipes(study: Study, pairs: Sequence[tuple[str, str]], keeps: Sequence[float | None]) -> None:
    """Seconds of whole runs of this process, the recipes in turns: `timings` of the study's file."""
    import fade
    from bench.harness import environment, write_json
    from fade import bundled
    from fade.measure import measured
    from fade.progress import progress_bar

    timings = []
    pipeline = bundled.model(study.model).load_pipeline()

    def run(forget: str, surrogate: str, recipe: str, keep: float | None) -> float:
        config = config_of(study, recipe, keep)
        with measured() as cost:
            adapter = fade.unlearn(pipeline, forget, surrogate, config=config, progress=False)
        adapter.remove()
        return cost.seconds

    for recipe in study.recipes:  # whatever is loaded or built at the first call
        run(*pairs[0], recipe, keeps[0])
    with progress_bar("timing", len(pairs) * len(keeps) * len(study.recipes), True) as advance:
        for forget, surrogate in pairs:
            for keep in keeps:
                for recipe in study.recipes:
                    seconds = run(forget, surrogate, recipe, keep)
                    timings.append({"forget": forget, "recipe": recipe, "keep": keep, "seconds": seconds})
                    advance(f"{recipe}: {seconds:.1f} s")
    content = _content(study)
    write_json(study.output, {**content, "timings": timings, "timings_environment": environment()})


def _content(study: Study) -> dict[str, Any]:
    return json.loads(study.output.read_text()) if study.output.exists() else {"rows": []}


def summary(study: Study, content: dict[str, Any]) -> Any:
    """Means by recipe and keep over all concepts and seeds, the worst UA of an object and of a style, and, where the
    rows have them, base rates in brackets, the accuracy on look-alikes, and how many runs reach `TARGETS`."""
    from rich.table import Table

    from fade import bundled

    objects, styles = bundled.model(study.model).domains
    table = Table(title=f"mean over concepts and seeds (worst UA: {objects.name} / {styles.name})")
    columns = ["recipe", "keep", "runs", "UA", "worst", "IRA", "CRA", "drift", "kB"]
    based = bool(content["rows"]) and all("base" in row for row in content["rows"])
    columns += ["NA", "targets met"] * based
    attacks = list(dict.fromkeys(name for row in content["rows"] for name in row.get("attacks", ())))
    columns += ["other words"] * study.by_words + ["seconds"] * ("timings" in content) + attacks
    for name in columns:
        table.add_column(name, justify="right")
    for (recipe, keep), group in _groups(study, content["rows"]).items():
        worst = [
            min((r["UA"] for r in group if r["forget"] in domain.words), default=float("nan"))
            for domain in (objects, styles)
        ]
        means = {name: mean(r[name] for r in group) for name in ("UA", "IRA", "CRA", "drift", "adapter_bytes")}
        cells = [
            recipe, _kept(keep), str(len(group)), f"{means['UA']:.1f}", f"{worst[0]:.0f} / {worst[1]:.0f}",
            _beside_base(group, "IRA"), _beside_base(group, "CRA"), f"{means['drift']:.4f}",
            f"{means['adapter_bytes'] / 1e3:.1f}",
        ]  # fmt: skip
        if based:
            cells += [_beside_base(group, "NA"), f"{sum(map(met, group))} of {len(group)}"]
        if study.by_words:
            shares = [mean(row["phrasings"][name] for row in group) for name in ("adapted", "surrogate", "base")]
            cells.append("{:.1f} ({:.1f}, {:.1f})".format(*shares))
        if "timings" in content:
            found = _seconds(content, recipe, keep)
            cells.append(f"{found:.1f}" if found is not None else "")
        attacked = [row["attacks"] for row in group if "attacks" in row]
        cells += [f"{mean(a[name] for a in attacked):.0f}" if attacked else "" for name in attacks]
        table.add_row(*cells)
    return table


def best_by_method(study: Study, content: dict[str, Any]) -> dict[str, str]:
    """By method the recipe that is best at its worst: of UA, IRA and CRA, the latter as shares of the base model's, the
    least, in the mean over concepts and seeds; of equals the first. Of recipes that have all their runs."""
    found: dict[str, tuple[float, str]] = {}
    for recipe, changes in study.recipes.items():
        rows = [row for row in content["rows"] if row["recipe"] == recipe]
        if len(rows) < len(study.pairs) * len(study.seeds) * len(study.keeps):
            continue
        least = mean(min(row["UA"], *(100 * row[name] / row["base"][name] for name in ("IRA", "CRA"))) for row in rows)
        method = changes["overwrite__method"]
        if method not in found or least > found[method][0]:
            found[method] = least, recipe
    return {method: recipe for method, (_, recipe) in found.items()}


def met(row: dict[str, Any]) -> bool:
    """Whether a run reaches `TARGETS`."""
    shares = {name: least * row["base"][name] for name, least in TARGETS.items() if name != "UA"}
    return row["UA"] >= TARGETS["UA"] and all(row[name] >= least for name, least in shares.items())


def _beside_base(group: Sequence[dict[str, Any]], name: str) -> str:
    """The mean of a metric over the runs that have it, with that of the base model in brackets where it is kept."""
    found = [row for row in group if row.get(name) is not None]
    if not found:
        return ""
    shown = f"{mean(row[name] for row in found):.1f}"
    return f"{shown} ({mean(row['base'][name] for row in found):.1f})" if all("base" in row for row in found) else shown


def _groups(study: Study, rows: Sequence[dict[str, Any]]) -> dict[tuple[str, float | None], list[dict[str, Any]]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["recipe"], row["keep"]].append(row)
    keeps = sorted(study.keeps, key=lambda keep: keep or 0.0, reverse=True)
    order = [(recipe, keep) for keep in keeps for recipe in study.recipes]
    return {key: groups[key] for key in order if key in groups}


def _seconds(content: dict[str, Any], recipe: str, keep: float | None) -> float | None:
    """The median over concepts of the quiet machine's seconds."""
    found = [t["seconds"] for t in content.get("timings", ()) if (t["recipe"], t["keep"]) == (recipe, keep)]
    return median(found) if found else None


def draw_by_keep(study: Study, content: dict[str, Any], path: Path) -> None:
    """UA against keep, digits left, styles right: a line per recipe, the mean; dots are the worst runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from fade import bundled

    domains = bundled.model(study.model).domains
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True, layout="constrained")
    colors = list(dict.fromkeys(name.split(",")[0] for name in study.recipes))
    for axis, domain in zip(axes, domains, strict=True):
        for index, name in enumerate(study.recipes):
            chosen = [r for r in content["rows"] if r["recipe"] == name and r["forget"] in domain.words]
            if not chosen:
                continue
            keeps = sorted({r["keep"] for r in chosen})
            values = [[r["UA"] for r in chosen if r["keep"] == keep] for keep in keeps]
            color, solid = f"C{colors.index(name.split(',')[0])}", "," in name
            axis.plot(keeps, [mean(v) for v in values], "-" if solid else "--", color=color, label=name, linewidth=2)
            # Side by side, so that equal ones can be told apart.
            beside = [keep * 1.04 ** (index - len(study.recipes) // 2) for keep in keeps]
            axis.plot(beside, [min(v) for v in values], "o", color=color, markersize=4,
                      markerfacecolor=color if solid else "white")  # fmt: skip
        title = f"forgetting {domain.name}s"
        axis.set(xscale="log", xlabel="kept fraction of target weights", title=title, ylim=(-3, 103))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("UA, % forgotten")
    title = "lines: mean\ndots: worst run"
    figure.legend(*axes[0].get_legend_handles_labels(), title=title, loc="outside right center")
    figure.savefig(path, dpi=150)


QUALITIES = {
    "UA, % forgotten": lambda row: row["UA"],
    "least of UA, IRA, CRA, %": lambda row: min(row[name] for name in ("UA", "IRA", "CRA")),
    "still recognised in other words, %": lambda row: row["phrasings"]["adapted"],
}


def draw_by_seconds(study: Study, content: dict[str, Any], path: Path) -> None:
    """Quality against seconds, a line per recipe through its keeps; bars reach from the first to the third quartile."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, len(QUALITIES), figsize=(14, 4), layout="constrained")
    groups = _groups(study, content["rows"])
    for axis, (title, quality) in zip(axes, QUALITIES.items(), strict=True):
        for index, recipe in enumerate(study.recipes):
            points = []
            for keep in sorted(study.keeps):
                seconds, group = _seconds(content, recipe, keep), groups.get((recipe, keep))
                if seconds is not None and group:
                    found = [quality(row) for row in group]
                    points.append((keep, seconds, mean(found), *np.quantile(found, (0.25, 0.75))))
            if not points:
                continue
            keeps, x, y, low, high = zip(*points, strict=True)
            axis.plot(x, y, "-o", color=f"C{index}", label=recipe, markersize=4)
            axis.vlines(x, low, high, color=f"C{index}", alpha=0.4)
            for keep, *at in zip(keeps, x, y, strict=True):
                axis.annotate(f"{100 * keep:g} %", at, textcoords="offset points", xytext=(4, 4), fontsize=7)
        axis.set(xscale="log", xlabel="seconds, whole run, two cores", title=title)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), title="points: kept fraction", loc="outside right center")
    figure.savefig(path, dpi=130)


_FIXED = {
    "overwrite__method": "distillation", "overwrite__stop_forget": 0.0, "overwrite__pool": 0,
    "overwrite__steps": 100, "overwrite__learning_rate": 5e-3, "overwrite__forget_weight": 1.0,
    "data__forget_samples": 48, "data__retain_samples": 96, "data__sampling_steps": 10, "locate__passes": 2,
}  # fmt: skip
"""Fixed steps and fresh noise, as the paper trains, and the settings that the rows of `saliency` were made with."""

_TRIED: dict[str, tuple[dict[str, Any], ...]] = {
    "esd-u": ({"overwrite__learning_rate": 4.5e-4}, {"overwrite__learning_rate": 3e-4}),
    "leco": ({"overwrite__learning_rate": 3e-4}, {"overwrite__learning_rate": 1.5e-4}),
    "gradient-ascent": ({"overwrite__learning_rate": 2e-3}, {"options__most": 1.0}),
    "erasediff": (
        {"overwrite__learning_rate": 2e-3},
        {"overwrite__learning_rate": 2e-3, "options__eta": 0.5},
    ),
    "negated-lora": ({"options__strength": 2.0}, {"options__strength": 3.0}),
    "ssd": (
        {"options__alpha": 4.0},
        {"options__alpha": 8.0},
        {"options__alpha": 10.0, "options__dampening": 1.0},
    ),
}
"""What is tried of methods that EmojiCanvas does not suit with the settings that were chosen on DigitCanvas."""


def _named(method: str, changes: dict[str, Any]) -> str:
    return ", ".join([method, *(f"{name.rpartition('__')[2]} {value:g}" for name, value in changes.items())])


STUDIES = {
    "methods": Study(
        RESULTS / "methods.json",
        recipes={
            "closed form": {"overwrite__method": "closed-form"},
            "distillation": {"overwrite__method": "distillation"},
            "both": {"overwrite__method": "both"},
            "closed form, channels": {"overwrite__method": "closed-form", "locate__granularity": "channel"},
            "both, channels": {"overwrite__method": "both", "locate__granularity": "channel"},
        },
        pairs=ALL, seeds=(0, 1, 2), keeps=(0.01, 0.1, 0.005, 0.001), draw=draw_by_seconds, by_words=True,
        attacked=(0.01,),
    ),
    "saliency": Study(
        RESULTS / "sweep.json",
        recipes={
            saliency + (", scaled by module" if scaling == "module" else ""): {
                **_FIXED, "locate__saliency": saliency, "locate__scaling": scaling,
            }
            for saliency, scaling in (
                ("denoising", "none"), ("denoising", "module"), ("distillation", "none"), ("distillation", "module"),
                ("contrast", "none"), ("contrast", "module"), ("random", "none"),
            )
        },
        pairs=SOME, seeds=(0, 1), keeps=(0.1, 0.01, 0.001), draw=draw_by_keep,
    ),
    "emojicanvas": Study(
        RESULTS / "emojicanvas.json",
        recipes={
            "closed form": {"overwrite__method": "closed-form"},
            "both": {"overwrite__method": "both"},
            "distillation": {"overwrite__method": "distillation"},
        },
        pairs=EMOJI, seeds=(0, 1), keeps=(0.01,), draw=None, model="emojicanvas", steps=None,
    ),
    "peers": Study(
        RESULTS / "peers_emojicanvas.json",
        recipes={
            _named(method, changes): {"overwrite__method": method, **changes}
            for method, tried in _TRIED.items()
            for changes in ({}, *tried)
        },
        pairs=EMOJI[:2], seeds=(0,), keeps=(None,), draw=None, model="emojicanvas", steps=None,
    ),
}  # fmt: skip
"""Of the recipes for the saliency the first is the paper's, the last the control."""


def main() -> None:
    from rich.console import Console

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--output", type=Path, help="another file than the study's own")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument(
        "--images", type=int, choices=(1, 2, 3), default=1, help="images of each prompt to judge a run by"
    )
    parser.add_argument("--plot", action="store_true", help="draw plot and table of an existing file, run nothing")
    parser.add_argument("--timings", action="store_true", help="time the recipes on a machine with nothing else to do")
    for name in ("concepts", "keeps", "recipes", "seeds"):
        parser.add_argument(f"--{name}", metavar="A;B", help=f"semicolon-separated {name} to run; default all")
    a = parser.parse_args()
    study = STUDIES[a.study]
    study = dataclasses.replace(study, output=a.output or study.output)
    if a.timings:
        pairs = [pair for pair in study.pairs if a.concepts is None or pair[0] in a.concepts.split(";")]
        keeps = [keep for keep in study.keeps if a.keeps is None or _kept(keep) in a.keeps.split(";")]
        time_recipes(study, pairs, keeps)
    elif not a.plot:
        wanted = {"forget": a.concepts, "keep": a.keeps, "recipe": a.recipes, "seed": a.seeds}
        only = {name: set(given.split(";")) for name, given in wanted.items() if given is not None}
        told = {cell: {**asdict(cell), "keep": _kept(cell.keep)} for cell in cells(study)}
        todo = [cell for cell in told if all(str(told[cell][name]) in values for name, values in only.items())]
        sweep(study, todo, a.images, a.workers)
    content = _content(study)
    if study.draw is not None:
        study.draw(study, content, study.output.with_suffix(".png"))
    Console(width=200).print(summary(study, content))


if __name__ == "__main__":
    main()
