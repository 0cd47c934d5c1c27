"""Selection of the top fraction of 86 million saliency values on the CPU: time and extra memory against plain torch.

    python -m bench.bench_selection --output bench/results/selection.json

The opponents find only the threshold (concatenate + kthvalue, as the FADE authors' package does) or the indices
(concatenate + topk); `fade_kernels` also packs the masks. Every result is checked before it is timed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.harness import environment, in_subprocess, interleaved, peak_memory, print_table, timings_json, write_json
from fade_kernels import select_top_fraction

VALUES = 86_000_000
KEEPS = (0.5, 0.1, 0.01)
TOPK_KEEP = 0.1  # topk is slow: it is timed at one fraction only
# Transformer blocks of SD 1.5's UNet by width: q, k, v, out twice, the second k and v on the text's 768 columns.
BLOCKS = ((320, 5), (640, 5), (1280, 6))


ATTENTION_SHAPES = tuple(
    shape for width, count in BLOCKS for _ in range(count) for shape in 6 * [(width, width)] + 2 * [(width, 768)]
)


def saliency(
    values: int,
    shapes: Sequence[tuple[int, int]] = ATTENTION_SHAPES,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Accumulators in the shapes of SD 1.5's attention projections, repeated until there are enough values.

    Magnitudes of normal numbers, with a scale of its own for each layer, as real gradients have.
    """
    generator = torch.Generator(device).manual_seed(0)
    tensors: list[Tensor] = []
    total = 0
    while total < values:
        rows, columns = shapes[len(tensors) % len(shapes)]
        rows = min(rows, -(-(values - total) // columns))
        scale = torch.randn((), generator=generator, device=device).mul(1.5).exp()
        tensors.append(torch.randn(rows, columns, generator=generator, device=device).abs_().mul_(scale))
        total += rows * columns
    return tensors


def kth_value(tensors: list[Tensor], keep: float) -> Tensor:
    flat = torch.cat([t.flatten() for t in tensors])
    return flat.kthvalue(flat.numel() - int(keep * flat.numel()) + 1).values


def top_k(tensors: list[Tensor], keep: float) -> Tensor:
    flat = torch.cat([t.flatten() for t in tensors])
    return flat.topk(int(keep * flat.numel()), sorted=False).indices


METHODS: dict[str, Callable[[list[Tensor], float], object]] = {
    "cat + kthvalue": kth_value,
    "cat + topk": top_k,
    "fade_kernels": select_top_fraction,
}


def measure_memory(method: str, values: int) -> dict[str, int]:
    """Extra resident bytes of one method in this process, which must be fresh; the packed masks are counted."""
    tensors = saliency(values)
    METHODS[method]([torch.rand(64, 64)], TOPK_KEEP)
    with peak_memory() as peak:
        result = METHODS[method](tensors, TOPK_KEEP)
    masks = sum(m.words.nbytes for m in result.masks) if method == "fade_kernels" else 0
    return {"extra_bytes": peak.extra, "returned_mask_bytes": masks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--values", type=int, default=VALUES, help="number of saliency values (default: %(default)s)")
    parser.add_argument("--memory", choices=METHODS, help="only print one method's extra memory as JSON")
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(measure_memory(arguments.memory, arguments.values)))
        return

    before = environment()
    size = ("--values", str(arguments.values))
    memory = {name: in_subprocess("bench.bench_selection", "--memory", name, *size) for name in METHODS}
    tensors = saliency(arguments.values)
    total = sum(t.numel() for t in tensors)
    results, rows = [], []
    for keep in KEEPS:
        selection = select_top_fraction(tensors, keep)
        if selection.threshold != float(kth_value(tensors, keep)) or sum(m.count for m in selection.masks) != int(
            keep * total
        ):
            sys.exit(f"wrong selection at keep {keep}: nothing was timed")
        names = [name for name in METHODS if name != "cat + topk" or keep == TOPK_KEEP]
        candidates = {name: lambda m=METHODS[name], k=keep: m(tensors, k) for name in names}
        candidates["read once (sum)"] = lambda: sum(float(t.sum()) for t in tensors)
        timings = interleaved(candidates, repeats=9, warmup=1, budget=18.0)
        base = timings["cat + kthvalue"].median
        results.append(
            {
                "keep": keep,
                "seconds": timings_json(timings),
                "ratio_to_cat_kthvalue": {name: timing.median / base for name, timing in timings.items()},
            }
        )
        for name, timing in timings.items():
            extra = f"{memory[name]['extra_bytes'] / 2**20:.1f}" if name in memory and keep == TOPK_KEEP else ""
            rows.append([name, f"{keep:g}", f"{timing.median:.3f}", f"{timing.median / base:.3f}", extra])
    print_table(["method", "keep", "seconds", "x cat+kthvalue", "extra MiB"], rows)
    if arguments.output:
        payload = {"benchmark": "selection", "values": total, "tensors": len(tensors), "memory_keep": TOPK_KEEP}
        write_json(arguments.output, payload | {"environment": before, "memory": memory, "results": results})


if __name__ == "__main__":
    main()
