"""The closed-form overwrite at the size of SD 1.5: 32 key and value layers of random weights, 24,960 rows of 768.

    python -m bench.bench_closed_form [--output FILE] [--keep 0.01] [--rounds 3]

Each run is a fresh process; seconds are those of the Gram matrices, the selection and the solve, beyond encoding the
prompts (whose embeddings are random, with a few directions that dominate, as CLIP's have). Extra memory is the peak of
the process above what it held before, weights and embeddings being there already. Beside them: the processor time of
all threads, which tells what a busy machine hides; the error of sampled rows against float64 by torch.linalg, and the
load of the machine before each run.
"""

import argparse
import json
import os
from pathlib import Path
from statistics import median

from bench.harness import environment, in_subprocess, print_table, write_json

WIDTHS = (320,) * 5 + (640,) * 5 + (1280,) * 6
TOKENS, COLUMNS, PAIRS, RETAIN = 77, 768, 4, 113


def target_weights() -> int:
    """Weights of all attention projections of SD 1.5's UNet, of which `keep` is a fraction."""
    return sum(6 * width**2 + 2 * width * COLUMNS for width in WIDTHS)


def run(keep: float) -> dict[str, float]:
    import time

    import torch
    from torch import nn

    from fade.closed_form import FIRST_WEIGHT, TokenStatistics, normal_equations, residual, select, solution
    from fade.config import ClosedFormConfig
    from fade.measure import measured
    from fade_kernels import scatter_masked_

    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(200, COLUMNS, generator=generator) * torch.logspace(1, -1, 200)[:, None]

    def tokens(prompts: int) -> torch.Tensor:
        mixed = torch.randn(prompts * TOKENS, 200, generator=generator) @ basis / 200**0.5
        return mixed + 0.05 * torch.randn(mixed.shape, generator=generator)

    forget, retain = tokens(PAIRS), tokens(RETAIN)
    difference = 0.3 * tokens(PAIRS)
    layers = {}
    for index, width in enumerate(WIDTHS):
        for projection in ("to_k", "to_v"):
            layers[f"{index}.{projection}"] = layer = nn.Linear(COLUMNS, width, bias=False)
            layer.weight.requires_grad_(False).normal_(0, 0.03, generator=generator)
    units, settings = int(keep * target_weights()), ClosedFormConfig()
    seconds = {}
    with measured() as before:
        time.sleep(0.1)
    with measured() as cost:
        start, busy = time.perf_counter(), time.process_time()
        x, d, kept = forget.double(), difference.double(), retain.double()
        statistics = TokenStatistics(x.T @ x / len(x), d.T @ x / len(x), d.T @ d / len(x), kept.T @ kept / len(kept))
        equations = normal_equations(layers, statistics, FIRST_WEIGHT, settings.damping)
        seconds["equations"] = time.perf_counter() - start
        masks = select(equations, units, change=settings.change, left=settings.left).masks
        seconds["selection"] = time.perf_counter() - start - seconds["equations"]
        equations, values = solution(layers, statistics, equations, masks, settings.change, settings.left)
        left = residual(equations, masks, values)
        seconds["solve"] = time.perf_counter() - start - seconds["equations"] - seconds["selection"]
        busy = time.process_time() - busy
    name = "12.to_v"
    delta = scatter_masked_(torch.zeros(layers[name].weight.shape), values[name], masks[name]).double()
    error, rhs = 0.0, dict(zip(equations.rows, equations.by_layer(equations.rhs), strict=True))[name]
    for row in range(0, len(delta), 50):
        support = masks[name].unpack()[row].nonzero()[:, 0]
        block = equations.gram[support][:, support]
        exact = torch.linalg.solve(block, rhs[row, support])
        if len(support):
            error = max(error, float((delta[row, support] - exact).norm() / exact.norm()))
    return {
        **seconds,
        "total": sum(seconds.values()),
        "cpu": busy,
        "extra_memory": cost.peak_memory_bytes - before.peak_memory_bytes,
        "selected": sum(mask.count for mask in masks.values()),
        "largest_support": max(int(mask.row_counts.max()) for mask in masks.values()),
        "retain_weight": equations.retain,
        "forget_residual": left.forget,
        "retain_change": left.retain,
        "relative_error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results/closed_form.json"))
    parser.add_argument("--keep", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(arguments.keep)))
        return
    before, runs = environment(), []
    for _ in range(arguments.rounds):
        load = os.getloadavg()[0]
        found = in_subprocess("bench.bench_closed_form", "--run", "--keep", str(arguments.keep))
        runs.append({**found, "load_before": load})
    rows = [[key, f"{median(r[key] for r in runs):.4g}", f"{max(r[key] for r in runs):.4g}"] for key in runs[0]]
    print_table(["", "median", "largest"], rows)
    write_json(arguments.output, {"environment": before, "keep": arguments.keep, "runs": runs})


if __name__ == "__main__":
    main()
