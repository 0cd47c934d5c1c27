"""Masked least squares with prices on a GPU: the compiled kernel beside torch's batched Cholesky of padded blocks.

    python -m bench.bench_least_squares [--output FILE]

Rows of the closed form's sizes: keys and values of SD 1.5 (768 columns) and SDXL (2048), with so many entries a row as
a keep of 1 % has at the end of the selection and at its beginning, and the most that a row may have. The candidates of
a row take turns in one process; both agree in every number to 1e-9 of the largest before they are timed.
"""

import argparse
from functools import partial
from pathlib import Path

import torch

from bench.harness import ROOT, device_memory, environment, interleaved, print_table, write_json
from fade_kernels import reference
from fade_kernels.cuda.least_squares import masked_least_squares, padded_masked_least_squares

SHAPES = ((4096, 768, 38), (4096, 768, 76), (8192, 2048, 56), (8192, 2048, 112), (4096, 2048, 200), (1024, 2048, 256))
"""Rows, columns, and entries of a row on average: half of it to half as much again."""


def problem(rows: int, columns: int, entries: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    random = torch.Generator(device).manual_seed(0)
    points = torch.randn(columns, 2 * columns, generator=random, device=device, dtype=torch.float64)
    gram = points @ points.T / points.shape[1] + 0.05 * torch.eye(columns, device=device, dtype=torch.float64)
    sizes = torch.randint(entries // 2, entries * 3 // 2, (rows, 1), generator=random, device=device).clamp_max(256)
    mask = torch.rand(rows, columns, generator=random, device=device).argsort(1).argsort(1) < sizes
    rhs = torch.randn(rows, columns, generator=random, device=device, dtype=torch.float64)
    return rhs, (gram + gram.T) / 2, reference.pack_mask(mask), int(mask.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "gpu_least_squares.json")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu tries the program without one")
    found = []
    for rows, columns, entries in SHAPES:
        given = (*problem(rows, columns, entries, arguments.device), True)
        calls = {
            "kernel": partial(masked_least_squares, *given),
            "torch": partial(padded_masked_least_squares, *given),
        }
        for own, other in zip(*(call()[:2] for call in calls.values()), strict=True):
            error = float((own - other).abs().max() / other.abs().max())
            assert error < 1e-9, error
        memory = {name: device_memory(arguments.device, call) for name, call in calls.items()}
        timings = interleaved(calls, device=arguments.device, repeats=10, warmup=1, budget=2.0)
        row = {"rows": rows, "columns": columns, "entries": entries}
        for name, timing in timings.items():
            row |= {f"{name}_ms": 1e3 * timing.median, f"{name}_extra_bytes": memory[name]}
        found.append(row | {"ratio": timings["kernel"].median / timings["torch"].median})
        write_json(arguments.output, {"schema": 1, "environment": environment(), "rows": found})
    table = []
    for row in found:
        memory = [f"{(row[f'{name}_extra_bytes'] or 0) / 1e6:.0f}" for name in ("kernel", "torch")]
        took = [f"{row[f'{name}_ms']:.2f}" for name in ("kernel", "torch")]
        table.append(
            [*(str(row[key]) for key in ("rows", "columns", "entries")), *took, f"{row['ratio']:.3f}", *memory]
        )
    print_table(["rows", "columns", "entries", "kernel ms", "torch ms", "ratio", "kernel MB", "torch MB"], table)


if __name__ == "__main__":
    main()
