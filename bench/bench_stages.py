"""Both stages on the bundled model, 200 steps of 16 + 16, against the authors' procedure in eager PyTorch.

    python -m bench.bench_stages [--output FILE] [--rounds 3]

Each run is a fresh process, all in turns; seconds and peak memory cover locate and overwrite alike. Latents are sampled
before the clock starts for ours; the authors' procedure gets the same forget and retain images, because encoding them
in every step is part of it. `frozen` is the floor: what the frozen network alone takes in as many steps, with no
adapter and no optimiser.
"""

import argparse
import json
from pathlib import Path
from statistics import median

from bench.harness import environment, in_subprocess, print_table, write_json

FORGET, SURROGATE, KEEP = "three", "eight", 0.01
STEPS, BATCH = 200, 16


def run_ours() -> dict[str, float]:
    import fade
    from fade.digitcanvas import load_pipeline

    config = fade.Config().replace(
        locate__keep=KEEP, overwrite__steps=STEPS, overwrite__batch_size=BATCH, overwrite__retain_batch_size=BATCH,
        overwrite__method="distillation", overwrite__stop_forget=0.0, overwrite__pool=0,
    )  # fmt: skip
    adapter = fade.unlearn(load_pipeline(), FORGET, SURROGATE, config=config, progress=False)
    run = adapter.run
    return {
        "locate": run["seconds"]["locate"],
        "overwrite": run["seconds"]["overwrite"],
        "peak_memory": max(run["peak_memory_bytes"].values()),
        "final_forget_loss": run["losses"]["forget"][-1],
    }


def run_authors() -> dict[str, float]:
    import torch

    from bench import authors_procedure
    from fade.backbones import backbone_for
    from fade.backbones.families import PROJECTIONS
    from fade.concept import bundled_concept
    from fade.config import Config
    from fade.digitcanvas import load_pipeline
    from fade.digitcanvas.bundled import MODEL
    from fade.latents import prepare_latents
    from fade.measure import measured

    torch.manual_seed(0)
    pipeline, config = load_pipeline(), Config()
    backbone, concept = backbone_for(pipeline), bundled_concept(MODEL, FORGET, SURROGATE)
    latents = prepare_latents(backbone, concept, config.data, 0, "")
    forget, retain = backbone.decode(latents.forget), backbone.decode(latents.retain)
    with measured() as first:
        masks = authors_procedure.locate(
            pipeline, forget, latents.forget_prompts, PROJECTIONS, KEEP, config.locate.passes,
            config.locate.batch_size,
        )  # fmt: skip
    with measured() as second:
        losses = authors_procedure.overwrite(
            pipeline, masks,
            (forget, latents.forget_prompts, latents.surrogate_prompts), (retain, latents.retain_prompts),
            steps=STEPS, batch=BATCH, rank=config.overwrite.rank, alpha=config.overwrite.alpha,
            learning_rate=config.overwrite.peak_rate,
        )  # fmt: skip
    return {
        "locate": first.seconds,
        "overwrite": second.seconds,
        "peak_memory": max(first.peak_memory_bytes, second.peak_memory_bytes),
        "final_loss": losses[-1],
    }


def run_frozen() -> dict[str, float]:
    """A teacher pass, and a student pass with a backward pass down to the prompts' embeddings, per step."""
    import torch

    from fade.backbones import backbone_for
    from fade.conditioning import Conditioning
    from fade.digitcanvas import load_pipeline, prompt
    from fade.measure import measured

    torch.manual_seed(0)
    backbone = backbone_for(load_pipeline())
    denoiser = backbone.denoiser.eval().requires_grad_(False)
    text = backbone.encode_prompts([prompt(FORGET, "plain")])["prompt_embeds"].repeat(2 * BATCH, 1, 1)
    text.requires_grad_(True)
    read = Conditioning({"prompt_embeds": text})
    side = denoiser.config.sample_size
    with measured() as taken:
        for _ in range(STEPS):
            noised = torch.randn(2 * BATCH, denoiser.config.in_channels, side, side)
            timesteps = torch.randint(backbone.time_span, (2 * BATCH,))
            with torch.inference_mode():
                backbone.predict(noised, timesteps, read)
            backbone.predict(noised, timesteps, read).square().mean().backward()
            text.grad = None
    return {"locate": 0.0, "overwrite": taken.seconds, "peak_memory": taken.peak_memory_bytes}


RUNS = {"ours": run_ours, "authors": run_authors, "frozen": run_frozen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results/stages.json"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(RUNS[arguments.run]()))
        return
    before = environment()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for _ in range(arguments.rounds):
        for name, results in runs.items():
            results.append(in_subprocess("bench.bench_stages", "--run", name))
    rows, medians = [], {}
    for name, results in runs.items():
        medians[name] = {field: median(r[field] for r in results) for field in ("locate", "overwrite", "peak_memory")}
        medians[name]["both"] = median(r["locate"] + r["overwrite"] for r in results)
        m = medians[name]
        rows.append([name, *(f"{m[f]:.2f}" for f in ("locate", "overwrite", "both")), f"{m['peak_memory'] / 1e6:.0f}"])
    ratio, above_floor = (medians["ours"]["both"] / medians[name]["both"] for name in ("authors", "frozen"))
    print_table(["procedure", "locate s", "overwrite s", "both s", "peak MB"], rows)
    print(f"ours: {ratio:.2f} of the time of the authors' procedure, {above_floor:.2f} of the frozen network's own")
    payload = {
        "environment": before, "keep": KEEP, "medians": medians, "ratio": ratio, "above_floor": above_floor,
        "runs": runs,
    }  # fmt: skip
    write_json(arguments.output, payload)


if __name__ == "__main__":
    main()
