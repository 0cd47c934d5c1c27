"""The planner (`fade plan`) against what runs take: peak memory of both stages, planned and measured.

    python -m bench.plan_check [--device cpu] [--output FILE] [--case NAME]

The bundled models, and one of random weights in SDXL's shape (its blocks, narrower, at 256 pixels), each case in a
process of its own. On a CPU the peak is the resident set's, less what it was with everything imported and no model
loaded; the C library is told to give freed memory back at once, or its reserves would be measured, too.
"""

import argparse
import gc
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from bench.harness import environment, in_subprocess, print_table, write_json

TOLERANCE = 0.15
LEAST = 50_000_000
"""Bytes from which a peak is judged: what a process takes for itself varies by some 8 MB."""
PIXELS = 256
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}

_SHORT = {
    "overwrite__steps": 2, "overwrite__stop_forget": 0.0, "overwrite__warmup_steps": 0, "data__sampling_steps": 2,
}  # fmt: skip


def _batches(count: int) -> dict[str, Any]:
    half = {"overwrite__batch_size": count // 2, "overwrite__retain_batch_size": count // 2}
    samples = {"data__forget_samples": count, "data__retain_samples": count, "data__batch_size": count}
    return {**_SHORT, **half, **samples, "locate__batch_size": count, "overwrite__pool": 2}


CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "digitcanvas, distillation": (
        "digitcanvas", False, {**_batches(128), "overwrite__method": "distillation"}
    ),
    "digitcanvas, distillation, checkpointing": (
        "digitcanvas", True, {**_batches(256), "overwrite__method": "distillation"}
    ),
    "digitcanvas, both": ("digitcanvas", False, _batches(128)),
    "emojicanvas, distillation": (
        "emojicanvas", False, {**_batches(32), "overwrite__method": "distillation"}
    ),
    "emojicanvas, distillation, checkpointing": (
        "emojicanvas", True, {**_batches(64), "overwrite__method": "distillation"}
    ),
    "emojicanvas, both": ("emojicanvas", False, _batches(32)),
    "SDXL's shape, distillation": (
        "sdxl-shaped", False,
        {**_batches(2), "overwrite__method": "distillation", "data__resolution": PIXELS},
    ),
    "SDXL's shape, distillation, checkpointing": (
        "sdxl-shaped", True,
        {**_batches(4), "overwrite__method": "distillation", "data__resolution": PIXELS},
    ),
    "SDXL's shape, both": ("sdxl-shaped", False, {**_batches(2), "data__resolution": PIXELS}),
}  # fmt: skip
"""By name: the model, whether with gradient checkpointing, and settings."""


def sdxl_shaped(folder: Path, device: str = "cpu") -> Any:
    """A pipeline of random weights with SDXL's blocks, 0.4 as wide, and its configurations in a folder."""
    import torch

    from fade.backbones import backbone_for
    from fade.digitcanvas import load_pipeline
    from fade.planning.models import Description, describe, made

    whole, own = describe("sdxl"), load_pipeline()
    parts = {name: (library, cls, dict(config)) for name, (library, cls, config) in whole.parts.items()}
    parts["unet"][2].update(
        block_out_channels=[128, 256, 512],
        attention_head_dim=[2, 4, 8],
        cross_attention_dim=512,
        projection_class_embeddings_input_dim=6 * 256 + 256,
    )
    parts["vae"][2].update(block_out_channels=[32, 32, 32, 32])
    for name in ("text_encoder", "text_encoder_2"):
        parts[name][2].update(
            vocab_size=len(own.tokenizer),
            hidden_size=256,
            projection_dim=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=own.text_encoder.config.max_position_embeddings,
        )
    tokenizers = {"model_max_length": own.tokenizer.model_max_length}
    for name in ("tokenizer", "tokenizer_2"):
        parts[name] = ("transformers", "CLIPTokenizer", tokenizers)
    described = Description("sdxl-shaped", whole.index, parts)
    described.write(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = made(described, "cpu", {"tokenizer": own.tokenizer, "tokenizer_2": own.tokenizer})
    backbone_for(pipeline)
    return pipeline.to(device)


def run_case(name: str, device: str) -> dict[str, Any]:
    import ctypes
    import warnings

    import psutil

    import fade
    from fade import digitcanvas, emojicanvas
    from fade.planning import plan

    warnings.simplefilter("ignore")
    model, checkpointing, changes = CASES[name]
    config = fade.Config().replace(**changes).without_ignored()

    def run(pipeline: Any, config: fade.Config) -> Any:
        return fade.unlearn(
            pipeline,
            "three",
            "eight",
            templates=["a {}", "a handwritten {}"],
            retain=["a two", "a four"],
            config=config,
            progress=False,
        )

    # Everything that either method imports, with no model left afterwards.
    small = _batches(2)
    for method in ("distillation", "both"):
        run(digitcanvas.load_pipeline(), fade.Config().replace(**small, overwrite__method=method).without_ignored())
    with tempfile.TemporaryDirectory() as folder:
        found = str(folder) if model == "sdxl-shaped" else model
        if model == "sdxl-shaped":
            sdxl_shaped(Path(folder))
        planned = plan(found, config, config.data.resolution, ("fp32",), on_gpu=device != "cpu").columns[0]
    gc.collect()
    before = 0
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
        before = psutil.Process().memory_info().rss
    loaders = {"digitcanvas": digitcanvas.load_pipeline, "emojicanvas": emojicanvas.load_pipeline}
    with tempfile.TemporaryDirectory() as folder:
        pipeline = sdxl_shaped(Path(folder), device) if model == "sdxl-shaped" else loaders[model]().to(device)
    if checkpointing:
        getattr(pipeline, "transformer" if hasattr(pipeline, "transformer") else "unet").enable_gradient_checkpointing()
    peaks = run(pipeline, config).run["peak_memory_bytes"]
    mode = "checkpointed" if checkpointing else "plain"
    return {
        stage: {"planned": planned.peaks[stage][mode], "measured": peaks[stage] - before}
        for stage in ("locate", "overwrite")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("bench/results/plan.json"))
    parser.add_argument("--case", action="append", choices=CASES, help="repeat for several; default: all")
    parser.add_argument("--run", choices=CASES, help="one case, here; prints JSON")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run_case(arguments.run, arguments.device)))
        return
    rows = []
    os.environ |= GIVE_BACK
    for name in arguments.case or CASES:
        found = in_subprocess("bench.plan_check", "--run", name, "--device", arguments.device)
        for stage, bytes_of in found.items():
            ratio = bytes_of["planned"] / bytes_of["measured"]
            rows.append({"case": name, "stage": stage, **bytes_of, "ratio": round(ratio, 3)})
            print(json.dumps(rows[-1]), flush=True)
    table = []
    for row in rows:
        sizes = [f"{row[kind] / 1e6:.1f}" for kind in ("planned", "measured")]
        table.append([f"{row['case']}: {row['stage']}", *sizes, str(row["ratio"])])
    print_table(["case", "planned MB", "measured MB", "ratio"], table)
    write_json(arguments.output, {"environment": environment(), "tolerance": TOLERANCE, "rows": rows})
    far = [row for row in rows if row["measured"] >= LEAST and abs(row["ratio"] - 1) > TOLERANCE]
    if far:
        raise SystemExit(f"{len(far)} of {len(rows)} are off by more than {TOLERANCE:.0%}")


if __name__ == "__main__":
    main()
