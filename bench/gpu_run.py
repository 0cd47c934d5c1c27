"""DigitCanvas forgets a digit on a GPU: every method, precision and form of the training step, timed and judged.

    python -m bench.gpu_run [--device cuda] [--output FILE]

One process; each run starts from the bundled model. The first of each method, precision and training
mode is made twice, so
that no run is charged for compiling, and the second counts. UA, IRA and CRA are those of `bench_whole_run.judged`.

    {"schema": 1, "kind": "GPU run", "environment", "runs": [
        {"method", "dtype", "cuda_graph", "training_mode", "seconds": {stage: seconds}, "captured": said by the run,
         "losses", "UA", "IRA", "CRA"} | {..., "failed": why}]}
"""

import argparse
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fade
from bench.bench_whole_run import FORGET, KEEP, SURROGATE, judged
from bench.harness import ROOT, environment, print_table, write_json
from fade.digitcanvas import load_pipeline
from fade.measure import measured

SCHEMA = 1
RUNS: tuple[tuple[str, str, str, str], ...] = (
    ("closed-form", "float32", "auto", "exact"),
    ("closed-form", "bfloat16", "auto", "exact"),
    ("distillation", "float32", "off", "exact"),
    ("distillation", "float32", "auto", "exact"),
    ("distillation", "bfloat16", "off", "exact"),
    ("distillation", "bfloat16", "auto", "exact"),
    ("distillation", "bfloat16", "auto", "one-product"),
    ("both", "float32", "auto", "exact"),
    ("both", "bfloat16", "off", "exact"),
    ("both", "bfloat16", "auto", "exact"),
    ("both", "bfloat16", "auto", "one-product"),
    ("both", "bfloat16", "auto", "auto"),
)
"""Method, dtype, `overwrite.cuda_graph`, `overwrite.training_mode`."""


def run(method: str, dtype: str, graph: str, mode: str, device: str, steps: int | None, judge: bool) -> dict[str, Any]:
    """One run and what it says of itself; judged where asked for."""
    pipeline = load_pipeline().to(device, getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    config = fade.Config().replace(
        locate__keep=KEEP, overwrite__method=method, overwrite__cuda_graph=graph, overwrite__training_mode=mode,
        **({} if steps is None else {"overwrite__steps": steps}),
    ).without_ignored()  # fmt: skip
    with measured(torch.device(device)) as cost:
        adapter = fade.unlearn(pipeline, FORGET, SURROGATE, config=config, progress=False)
    said = adapter.run
    return {
        "seconds": {**said.get("seconds", {}), "all": cost.seconds},
        "captured": said.get("cuda_graph"),
        "mode": said.get("training_mode"),
        "losses": said.get("losses"),
        **(judged(pipeline) if judge else {}),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_run", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, help="of stage 2 (default: the settings')")
    parser.add_argument("--only", type=int, nargs="+", metavar="I", help="numbers of the runs, from 0 (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "gpu_run.json")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu tries the program without one")
    payload: dict[str, Any] = {"schema": SCHEMA, "kind": "GPU run", "environment": environment(), "runs": []}
    warm: set[tuple[str, str, str]] = set()
    for index, (method, dtype, graph, mode) in enumerate(RUNS):
        if arguments.only and index not in arguments.only:
            continue
        row: dict[str, Any] = {"method": method, "dtype": dtype, "cuda_graph": graph, "training_mode": mode}
        try:
            if (method, dtype, mode) not in warm:
                run(method, dtype, graph, mode, arguments.device, arguments.steps, judge=False)
            row |= run(method, dtype, graph, mode, arguments.device, arguments.steps, judge=True)
            warm.add((method, dtype, mode))
        # What goes wrong in one run is a finding, not the end of the others.
        except Exception as error:
            row |= {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-4000:]}
        payload["runs"].append(row)
        write_json(arguments.output, payload)
        print({key: value for key, value in row.items() if key != "traceback"}, flush=True)
    print_table(
        ["run", "s", "UA", "IRA", "CRA", "graph"],
        [
            [
                f"{r['method']}, {r['dtype']}, graph {r['cuda_graph']}, {r['training_mode']}",
                f"{r['seconds']['all']:.2f}", *(f"{r[name]:.1f}" for name in ("UA", "IRA", "CRA")), str(r["captured"]),
            ]
            for r in payload["runs"] if "failed" not in r
        ],
    )  # fmt: skip
    return 1 if any("failed" in r for r in payload["runs"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
