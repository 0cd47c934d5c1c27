"""Models of their real size with random weights on a GPU: what each stage takes, beside what `fade plan` says.

    python -m bench.gpu_models [--case NAME] [--device cuda] [--output FILE]

Every part is made from the configurations that `fade plan` knows, and nothing is downloaded; only the tokenizers are
DigitCanvas's own. Time and memory of a step are the model's, its pictures are not. Each case is a process of its own,
which edits in closed form and then trains, a few steps unmeasured first, so that no step is charged for compiling.

    {"schema": 1, "kind": "GPU models", "environment", "rows": [
        {"case", "method", "dtype", "checkpointing", "pixels", "latents" of a step, "steps",
         "seconds": {part: seconds}, "planned": {stage: bytes}, "measured": {stage: bytes}, "others": bytes of the
         pipeline's other parts, where they stay on the device meanwhile, "run": said by the run}
        | {"case", "method", "failed": why, "not_finite": {"output" or "gradient": the modules of the first few}}
        | {"case", "failed": why, "stderr"}]}
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.harness import ROOT, environment, print_table, write_json

SCHEMA = 1
STAGES = ("locate", "overwrite")
CHAT = "{% for message in messages %}the {{ message.content }} picture of {% endfor %}"


@dataclass(frozen=True)
class Case:
    """A known model; `half` of a step's latents are the concept's, and so many are drawn at once; `steps` of training
    after `steps // 2` unmeasured."""

    model: str
    pixels: int
    half: int
    steps: int
    checkpointing: bool = True
    methods: tuple[str, ...] = ("distillation", "closed-form", "both")


CASES: dict[str, Case] = {
    "SD 1.5": Case("stable-diffusion-v1-5", 512, 8, 16, checkpointing=False),
    "SDXL": Case("sdxl", 1024, 8, 8),
    "SD 3.5 medium": Case("stable-diffusion-3.5-medium", 1024, 8, 8),
    "FLUX.1-dev": Case("flux.1-dev", 1024, 2, 4, methods=("distillation", "closed-form")),
    "Z-Image": Case("z-image-turbo", 1024, 2, 4, methods=("distillation", "closed-form")),
    "Qwen-Image": Case("qwen-image", 1024, 1, 4, methods=("distillation", "closed-form")),
    "toy": Case("digitcanvas", 24, 2, 2),
}
"""By name; the last is a test of this program, not of speed."""


def random_pipeline(case: Case, device: str) -> Any:
    """The case's pipeline in bfloat16, matrices of variance 1/fan-in, so that no gate is shut and nothing explodes."""
    from transformers import CLIPTokenizer

    from fade.digitcanvas import MODEL_PATH
    from fade.planning.models import describe, made

    found = describe(case.model)
    tokenizers = {}
    for name, (_, _, config) in found.parts.items():
        if name.startswith("tokenizer"):
            length = min(config.get("model_max_length") or 512, 1024)
            tokenizers[name] = CLIPTokenizer.from_pretrained(MODEL_PATH / "tokenizer", model_max_length=length)
            tokenizers[name].chat_template = CHAT
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        pipeline = made(found, device, tokenizers)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for part in pipeline.components.values():
            for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
                if parameter.dim() > 1:
                    parameter.normal_(0, parameter[0].numel() ** -0.5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, torch.bfloat16)


@contextlib.contextmanager
def first_not_finite(pipeline: Any, most: int = 5) -> Iterator[dict[str, list[str]]]:
    """Fills in, at its end, which modules of the pipeline's parts were the first to put out what is no finite number,
    and of which outputs the gradients were so first. What is looked at stays on its device until then."""
    looked: dict[str, list[tuple[str, torch.Tensor]]] = {"output": [], "gradient": []}
    found: dict[str, list[str]] = {}
    hooks = []

    def look(kind: str, name: str, tensor: torch.Tensor) -> None:
        looked[kind].append((name, tensor.detach().isfinite().all()))

    def watch(module: torch.nn.Module, given: Any, output: Any, name: str) -> None:
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                look("output", name, value)
                if value.requires_grad:
                    value.register_hook(partial(look, "gradient", name))

    for part, model in pipeline.components.items():
        for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
            hooks.append(module.register_forward_hook(partial(watch, name=f"{part}.{name}".rstrip("."))))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for kind, seen in looked.items():
            found[kind] = [name for name, finite in seen if not bool(finite)][:most]


def run_case(name: str, device: str, methods: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """A row for each method, if only to say why it failed."""
    import warnings

    warnings.simplefilter("ignore")
    began = time.perf_counter()
    pipeline = random_pipeline(CASES[name], device)
    print(f"{name}: made in {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    for method in methods or CASES[name].methods:
        yield run_method(name, pipeline, method, device)
        if device != "cpu":
            torch.cuda.empty_cache()


def run_method(name: str, pipeline: Any, method: str, device: str) -> dict[str, Any]:
    import fade
    from fade.backbones import backbone_for
    from fade.planning import plan
    from fade.training_mode import device_memory

    case, denoiser = CASES[name], backbone_for(pipeline).denoiser
    changes = {
        "data__forget_samples": 2 * case.half, "data__retain_samples": 2 * case.half, "data__sampling_steps": 2,
        "data__batch_size": 2 * case.half, "data__resolution": case.pixels, "locate__batch_size": 2 * case.half,
        "overwrite__batch_size": case.half, "overwrite__retain_batch_size": case.half, "overwrite__pool": 2,
        "overwrite__stop_forget": 0.0, "overwrite__warmup_steps": 0,
        "gradient_checkpointing": case.checkpointing,
    }  # fmt: skip
    trains = fade.Config.of(method).trains
    for steps in (case.steps // 2, case.steps) if trains else (1, 1):
        config = fade.Config.of(method, **changes, overwrite__steps=steps).without_ignored()
        unlearn = partial(
            fade.unlearn, pipeline, "three", "eight", templates=["a {}", "a handwritten {}"],
            retain=["a two", "a four"], config=config, progress=False,
        )  # fmt: skip
        began = time.perf_counter()
        try:
            adapter = unlearn()
        except fade.FadeError as error:
            with first_not_finite(pipeline) as found, contextlib.suppress(fade.FadeError):
                unlearn()
            return {"case": name, "method": method, "failed": str(error), "not_finite": found}
        took = time.perf_counter() - began
        said = adapter.run
        adapter.remove()
        print(f"{name}, {method}, {steps} steps: {took:.1f} s", file=sys.stderr, flush=True)
    on_gpu, size = device != "cpu", device_memory(denoiser.device)
    column = plan(case.model, config, case.pixels, ("bf16",), on_gpu, size).columns[0]
    mode = "checkpointed" if case.checkpointing else "plain"
    planned = {stage: column.peaks[stage][mode] for stage in STAGES}
    stay = [p for p in pipeline.components.values() if isinstance(p, torch.nn.Module) and p is not denoiser]
    others = 0 if config.needs_latents else sum(w.numel() * w.element_size() for p in stay for w in p.parameters())
    record = {key: said[key] for key in ("steps", "training_mode", "cuda_graph", "residual") if key in said}
    return {
        "case": name, "method": method, "dtype": "bfloat16", "checkpointing": case.checkpointing,
        "pixels": case.pixels, "latents": 2 * case.half, "steps": steps if trains else 0,
        "seconds": {**said["seconds"], "all": took}, "planned": planned,
        "measured": said["peak_memory_bytes"], "others": others, "run": record,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_models", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--methods", nargs="+", help="in place of the case's own")
    parser.add_argument("--case", action="append", choices=CASES, help="repeat for several; default: all real ones")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "gpu_models.json")
    parser.add_argument("--seconds", type=float, default=600, help="that a case may take at most (default: 600)")
    parser.add_argument("--run", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu tries the program without one")
    if arguments.run:
        from fade import FadeError

        try:
            for row in run_case(arguments.run, arguments.device, arguments.methods):
                print(json.dumps(row, default=str), flush=True)
        except FadeError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    payload: dict[str, Any] = {"schema": SCHEMA, "kind": "GPU models", "environment": environment(), "rows": []}
    for name in arguments.case or [name for name in CASES if name != "toy"]:
        command = [sys.executable, "-m", "bench.gpu_models", "--run", name, "--device", arguments.device]
        command += ["--methods", *arguments.methods] if arguments.methods else []
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, said = process.communicate(timeout=arguments.seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, said = process.communicate()
            said += f"\nnot done after {arguments.seconds:g} s"
        rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        if process.returncode != 0:
            rows.append({"case": name, "failed": said.strip().splitlines()[-1], "stderr": said[-3000:]})
        payload["rows"] += rows
        write_json(arguments.output, payload)
        print(said[-1500:] if process.returncode else "\n".join(said.strip().splitlines()[-7:]), flush=True)
    show(payload)
    return 1 if any("failed" in row for row in payload["rows"]) else 0


def show(payload: dict[str, Any]) -> None:
    table = []
    for row in payload["rows"]:
        if "failed" in row:
            first = [f"first {kind}: {names[0]}" for kind, names in row.get("not_finite", {}).items() if names]
            why = "; ".join([row["failed"][:100], *first])
            table.append([row["case"], f"{row.get('method', '')} failed".strip(), why, *[""] * 5])
            continue
        seconds = row["seconds"]
        step = f"{seconds['overwrite'] / row['steps']:.2f}" if row["steps"] else "-"
        memory = [
            f"{row['measured'].get(stage, 0) / 1e9:.2f} ({((row['planned'][stage] or 0) + row['others']) / 1e9:.2f})"
            for stage in STAGES
        ]
        parts = [f"{seconds.get(part, 0):.2f}" for part in ("data", *STAGES)]
        table.append([row["case"], row["method"], *parts, step, *memory])
    print_table(["model", "method", "data s", "locate s", "overwrite s", "s/step", "locate GB", "overwrite GB"], table)


if __name__ == "__main__":
    raise SystemExit(main())
