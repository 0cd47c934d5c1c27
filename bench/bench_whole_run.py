"""A whole run until the concept is forgotten, from a folder of images, against the authors' procedure in eager PyTorch.

    python -m bench.bench_whole_run [--output FILE] [--rounds 3]

Every run is a fresh process, all in turns, and begins when the model is loaded; its images are those of the concept and
of what must stay that the model itself draws, as PNG files that the methods which train read. The authors' procedure
(their keep of 50 %, our rank, alpha, learning rate and batch sizes, which forget sooner than theirs) gets the smallest
of some numbers of steps at which the concept is forgotten (UA >= 99), whatever that cost the rest. Memory is the
process's largest resident size.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness import environment, in_subprocess, print_table, write_json

FORGET, SURROGATE, KEEP, AUTHORS_KEEP = "three", "eight", 0.01, 0.5
STEPS = (10, 25, 50, 100, 200, 400)
FORGOTTEN = 99.0


def make_images(folder: Path) -> None:
    """The images that all runs share, in `folder`/forget and `folder`/retain with captions."""
    from PIL import Image

    from fade.backbones import backbone_for
    from fade.concept import bundled_concept
    from fade.config import Config
    from fade.digitcanvas import load_pipeline
    from fade.digitcanvas.bundled import MODEL
    from fade.latents import prepare_latents

    backbone = backbone_for(load_pipeline())
    latents = prepare_latents(backbone, bundled_concept(MODEL, FORGET, SURROGATE), Config().data, 0, "")
    for kind, clean, prompts in (
        ("forget", latents.forget, latents.forget_prompts), ("retain", latents.retain, latents.retain_prompts),
    ):  # fmt: skip
        (folder / kind).mkdir(parents=True)
        for index, (image, prompt) in enumerate(zip(backbone.decode(clean), prompts, strict=True)):
            pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / kind / f"{index:03}.png")
            (folder / kind / f"{index:03}.txt").write_text(prompt)


def judged(pipeline: Any) -> dict[str, float]:
    """UA, IRA and CRA in percent of 240 pictures: every digit in every style at three seeds, in 10 steps."""
    from fade.backbones import backbone_for
    from fade.digitcanvas import DIGITS, load_judges
    from fade.digitcanvas.bundled import MODEL
    from fade.evaluation import SEEDS
    from fade.evaluation.answers import crossed_answers
    from fade.evaluation.metrics.unlearncanvas import unlearncanvas_metrics

    answers, judges = crossed_answers(MODEL, FORGET, SURROGATE, SEEDS), load_judges()
    images = backbone_for(pipeline).generate(answers.prompts, answers.seeds, steps=10)
    said = {"digit": judges.digit(images), "style": judges.style(images)}
    sizes = {domain: len(words) for domain, words in answers.classes.items()}
    metrics = unlearncanvas_metrics(
        answers.prompted, said, sizes, "digit", DIGITS.index(FORGET), DIGITS.index(SURROGATE)
    )  # fmt: skip
    return {name: metrics[name] for name in ("UA", "IRA", "CRA")}


def run_ours(method: str, folder: Path) -> dict[str, float]:
    import fade
    from fade.digitcanvas import load_pipeline
    from fade.measure import measured

    pipeline, changes = load_pipeline(), {"overwrite__method": method, "locate__keep": KEEP}
    if method != "closed-form":
        changes |= {f"data__{kind}_images": str(folder / kind) for kind in ("forget", "retain")}
    with measured() as cost:
        fade.unlearn(pipeline, FORGET, SURROGATE, config=fade.Config().replace(**changes), progress=False)
    return {"seconds": cost.seconds, "peak_memory": cost.peak_memory_bytes, **judged(pipeline)}


def run_authors(steps: int, folder: Path) -> dict[str, float]:
    import numpy as np
    import torch
    from PIL import Image

    from bench import authors_procedure
    from fade.backbones.families import PROJECTIONS
    from fade.config import Config
    from fade.digitcanvas import load_pipeline
    from fade.measure import measured

    torch.manual_seed(0)
    pipeline, config = load_pipeline(), Config()

    def read(kind: str) -> tuple[torch.Tensor, list[str]]:
        files = sorted((folder / kind).glob("*.png"))
        pixels = np.stack([np.asarray(Image.open(file), dtype=np.float32) / 255 for file in files])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), [file.with_suffix(".txt").read_text() for file in files]

    with measured() as cost:
        forget, prompts = read("forget")
        masks = authors_procedure.locate(
            pipeline, forget, prompts, PROJECTIONS, AUTHORS_KEEP, 1, config.locate.batch_size
        )
        surrogates = [prompt.replace(FORGET, SURROGATE) for prompt in prompts]
        authors_procedure.overwrite(
            pipeline, masks, (forget, prompts, surrogates), read("retain"), steps=steps,
            batch=config.overwrite.batch_size, rank=config.overwrite.rank, alpha=config.overwrite.alpha,
            learning_rate=config.overwrite.peak_rate, merge=True,
        )  # fmt: skip
    return {"seconds": cost.seconds, "peak_memory": cost.peak_memory_bytes, **judged(pipeline)}


def run_loaded(folder: Path) -> dict[str, float]:
    """The model loaded and nothing done: what every run's memory contains."""
    import torch

    from fade.digitcanvas import load_pipeline
    from fade.measure import measured

    load_pipeline()
    with measured() as cost:
        torch.zeros(1)
    return {"seconds": 0.0, "peak_memory": cost.peak_memory_bytes}


METHODS = ("closed-form", "distillation", "both")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results/whole_run.json"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--images", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        if arguments.run == "loaded":
            found = run_loaded(arguments.images)
        elif arguments.run in METHODS:
            found = run_ours(arguments.run, arguments.images)
        else:
            found = run_authors(int(arguments.run), arguments.images)
        print(json.dumps(found))
        return
    before = environment()
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder))

        def run(name: str) -> dict[str, float]:
            return in_subprocess("bench.bench_whole_run", "--run", name, "--images", folder)

        tried = {}
        for steps in STEPS:
            tried[steps] = run(str(steps))
            told = ", ".join(f"{name} {tried[steps][name]:.1f}" for name in ("UA", "IRA", "CRA"))
            print(f"the authors' procedure, {steps} steps: {told}", flush=True)
            if tried[steps]["UA"] >= FORGOTTEN:
                break
        names = {"loaded": "loaded", **{method: method for method in METHODS}, "authors": str(steps)}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name, results in runs.items():
                results.append(run(names[name]))
    medians = {
        name: {field: median(r[field] for r in results) for field in results[0]} for name, results in runs.items()
    }
    authors, rows = medians["authors"], []
    ratios = {
        name: {field: medians[name][field] / authors[field] for field in ("seconds", "peak_memory")} for name in METHODS
    }
    for name, m in medians.items():
        shares = ratios.get(name, {})
        rows.append([
            name, f"{m['seconds']:.2f}", f"{m['peak_memory'] / 1e6:.0f}",
            *(f"{m[metric]:.1f}" if metric in m else "" for metric in ("UA", "IRA", "CRA")),
            *(f"{shares[field]:.2f}" if shares else "" for field in ("seconds", "peak_memory")),
        ])  # fmt: skip
    print_table(["run", "seconds", "peak MB", "UA", "IRA", "CRA", "/ authors' time", "/ authors' memory"], rows)
    payload = {
        "environment": before, "keep": KEEP, "authors_keep": AUTHORS_KEEP, "authors_steps": steps, "tried": tried,
        "medians": medians, "ratios": ratios, "runs": runs,
    }  # fmt: skip
    write_json(arguments.output, payload)


if __name__ == "__main__":
    main()
