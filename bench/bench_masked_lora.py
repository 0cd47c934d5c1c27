"""Masked LoRA on the CPU, forward + backward on the attention projections of Stable Diffusion 1.5, fp32.

    python -m bench.bench_masked_lora --output bench/results/masked_lora.json

Beside the frozen layer (the floor): dense LoRA by PEFT, and two naive masked LoRAs at 10 %, which materialise B A and
multiply it by the mask. "two products" adds x (M o B A)^T to the frozen layer's output, as a PEFT tuner layer would;
"one product" adds M o B A to the weight first, as SparsePEFT does. Each layer's results are compared with float64
before it is timed; totals are weighted by how often the model has the layer.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from bench.harness import Timing, environment, in_subprocess, interleaved, peak_memory, timings_json, write_json
from bench.masked_layer import FROZEN, NAIVE_ONE, NAIVE_TWO, PEFT, RANK, Mask, MaskedLayer, Provider, worst_error
from bench.shapes import Linear, sd15_attention

MASKS = (Mask(0.1), Mask(0.01), Mask(0.2, tile=32))
MEMORY_LAYER = Linear(256, 1280, 1280, bias=False, count=1)
TOLERANCE = 1e-5  # Frobenius norm of the error over that of the float64 result
BASELINES = tuple(provider.name for provider in (FROZEN, PEFT, NAIVE_TWO, NAIVE_ONE))
PROVIDERS = {
    provider.name: provider
    for provider in (FROZEN, PEFT, NAIVE_TWO, NAIVE_ONE, *(Provider("ours", mask.name) for mask in MASKS))
}


def measure_memory(provider: str) -> dict[str, int]:
    """Extra resident bytes of one step of one layer in this process, which must be fresh."""
    layer = MaskedLayer(MEMORY_LAYER, MASKS)
    MaskedLayer(Linear(8, 32, 32, bias=False, count=1), MASKS).training(PROVIDERS[provider])
    with peak_memory() as peak:
        layer.training(PROVIDERS[provider])
    return {"extra_bytes": peak.extra}


def weighted(results: list[tuple[Linear, dict[str, Timing]]], provider: str, value: Callable[[Timing], float]) -> float:
    return sum(layer.count * value(timings[provider]) for layer, timings in results)


def ratios(
    results: list[tuple[Linear, dict[str, Timing]]], value: Callable[[Timing], float]
) -> dict[str, dict[str, float]]:
    """Weighted time of every provider over that of each baseline."""
    totals = {provider: weighted(results, provider, value) for provider in PROVIDERS}
    return {base: {p: totals[p] / totals[base] for p in PROVIDERS} for base in BASELINES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--batch", type=int, default=1, help="images (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=25, help="timed rounds for each layer (default: %(default)s)")
    parser.add_argument("--memory", choices=PROVIDERS, help="only print one provider's extra memory as JSON")
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(measure_memory(arguments.memory)))
        return

    before = environment()
    memory = {name: in_subprocess("bench.bench_masked_lora", "--memory", name) for name in PROVIDERS}
    results: list[tuple[Linear, dict[str, Timing]]] = []
    for layer in sd15_attention(arguments.batch):
        problem = MaskedLayer(layer, MASKS)
        for name, provider in PROVIDERS.items():
            worst = worst_error(problem.training(provider), problem.expected(provider, "training"))
            if not worst <= TOLERANCE:
                sys.exit(f"{name} is wrong on {layer} (relative error {worst:.1e}): nothing was timed")
        candidates = {name: lambda p=provider, q=problem: q.training(p) for name, provider in PROVIDERS.items()}
        results.append((layer, interleaved(candidates, repeats=arguments.repeats, warmup=3, budget=20.0)))

    summary = ratios(results, lambda timing: timing.median)
    table = Table(title=f"forward + backward, x the frozen layer (fp32, rank {RANK}, batch {arguments.batch})")
    table.add_column("layer")
    for heading in ("count", "frozen ms", *list(PROVIDERS)[1:]):
        table.add_column(heading, justify="right")
    for layer, timings in results:
        frozen = timings["frozen"].median
        cells = [f"{timings[provider].median / frozen:.2f}" for provider in list(PROVIDERS)[1:]]
        table.add_row(str(layer), str(layer.count), f"{1e3 * frozen:.2f}", *cells)
    table.add_section()
    total = weighted(results, "frozen", lambda timing: timing.median)
    table.add_row("weighted", "", f"{1e3 * total:.0f}", *(f"{summary['frozen'][p]:.3f}" for p in list(PROVIDERS)[1:]))
    for base in BASELINES[1:]:
        table.add_row(f"weighted, x {base}", "", "", *(f"{summary[base][p]:.3f}" for p in list(PROVIDERS)[1:]))
    extra = (f"{memory[provider]['extra_bytes'] / 2**20:.1f}" for provider in list(PROVIDERS)[1:])
    table.add_row(f"extra MiB, {MEMORY_LAYER}", "", f"{memory['frozen']['extra_bytes'] / 2**20:.1f} MiB", *extra)
    Console(width=170).print(table)
    if arguments.output:
        payload = {
            "benchmark": "masked_lora",
            "model": "Stable Diffusion 1.5, attention projections",
            "batch": arguments.batch,
            "rank": RANK,
            "environment": before,
            "ratio_of_medians": summary,
            "ratio_of_fastest": ratios(results, lambda timing: timing.fastest),
            "memory": memory,
            "layers": [asdict(layer) | {"seconds": timings_json(timings)} for layer, timings in results],
        }
        write_json(arguments.output, payload)


if __name__ == "__main__":
    main()
