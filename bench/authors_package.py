"""The authors' own package, vision-unlearning 1.0.0 (PyPI), on DigitCanvas, for the table of methods.

    pip install --target PACKAGE --no-deps vision-unlearning==1.0.0 torchvision \\
        datasets pyarrow dill multiprocess xxhash fsspec httpx aiohttp pyyaml
    python -m bench.authors_package PACKAGE [--output FILE]

What runs is its `UnlearnerLoraDistillation` (self-distillation of a dense LoRA), unchanged, on pictures that the
bundled model draws of the prompts that our methods train with. Its two sparse variants are not here: per weight asks
PEFT for an argument that only its authors' fork has, and per module saves a file of which its loader drops modules.
Around it:

- its evaluators are stood in for by nothing, because importing them takes a dozen packages and a GPU; the training
  ends where they would begin, when the LoRA is saved.
- the two calls to torch.cuda that its training makes do nothing where there is no GPU.
- the adapter is judged at alpha / rank, as it was trained; the file that it saves says nothing of that, and diffusers
  loads it at 1.

Each setting of `SETTINGS` is a row of `python -m bench.table`'s schema: metrics as there, seconds and memory of its
`train()` alone, without drawing the pictures. A cell is a process of its own, as there.
"""

import argparse
import contextlib
import importlib.util
import json
import re
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.files import ROOT, write_json
from bench.table import ATTACKED, PAIRS, PICTURES, SCHEMA, TOLD, measured_attacks, measured_metrics, read

RESULTS = ROOT / "bench" / "results" / "authors_package.json"
NAME = "vision-unlearning 1.0.0"
STEPS, BATCH, FORGET, RETAIN, DRAWN_STEPS = 200, 8, 24, 48, 10
SETTINGS: dict[str, dict[str, Any]] = {
    "authors": {"lora_r": 16, "lora_alpha": 4, "learning_rate": 6e-4, "lr_scheduler_type": "constant"},
    "tuned": {"lora_r": 8, "lora_alpha": 16, "learning_rate": 3e-3, "lr_scheduler_type": "cosine"},
}
"""`authors`: what they ran on people, breeds and scenes of SD 1.4, for many more epochs; `tuned`: chosen for
DigitCanvas on "three"."""


_KEPT: list[Any] = []
"""Operators are there as long as what defined them."""


class _Saved(Exception):
    """The LoRA is there."""


class _Nothing(types.ModuleType):
    """A module of classes that nobody makes instances of."""

    __all__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def find(folder: Path) -> None:
    """Lets Python look into `folder`. Raises SystemExit with a message for people where the package is not there."""
    sys.path.append(str(folder))
    if importlib.util.find_spec("vision_unlearning") is None:
        raise SystemExit(f"the package is not in {folder}: install it there as the head of this file says")


def package(folder: Path) -> Any:
    """Its class, made to end after saving. Raises SystemExit with a message for people where it is not in `folder`."""
    import torch

    find(folder)
    for name in ("metrics", "evaluator"):
        sys.modules[f"vision_unlearning.{name}"] = _Nothing(f"vision_unlearning.{name}")
    # The operators of a torchvision that was built for CUDA are not there without; nobody calls them.
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(operators)
    try:
        from vision_unlearning.unlearner.fade import UnlearnerLoraDistillation
        from vision_unlearning.utils.gradient_weighting import GradientWeightingMethodSimple
    except ImportError as error:
        raise SystemExit(f"{error}; install what it needs into {folder} as the head of this file says") from error

    if not torch.cuda.is_available():
        torch.cuda.synchronize = torch.cuda.reset_peak_memory_stats = torch.cuda.empty_cache = lambda *_: None
        torch.cuda.max_memory_allocated = lambda *_: 0

    class UntilSaved(UnlearnerLoraDistillation):
        def _save_lora_layers(self) -> None:
            super()._save_lora_layers()
            raise _Saved

    def weights() -> Any:
        return GradientWeightingMethodSimple(forget_weight=0.3, retain_weight=1.0)

    return UntilSaved, weights


def write_data(pipeline: Any, concept: Any, seed: int, folder: Path) -> Path:
    """Pictures of the frozen model and the package's JSON of them; its path."""
    from PIL import Image

    from fade.backbones import backbone_for
    from fade.evaluation.features import levels

    pairs = list(zip(concept.forget_prompts, concept.surrogate_prompts, strict=True))
    rows = {
        "forget": [pairs[i % len(pairs)] for i in range(FORGET)],
        "retain": [(concept.retain_prompts[i % len(concept.retain_prompts)], "") for i in range(RETAIN)],
    }
    record: dict[str, list[dict[str, str]]] = {}
    for part, texts in rows.items():
        first = (2 * seed + (part == "retain") + 1) * 1_000_003
        images = backbone_for(pipeline).generate(
            [text for text, _ in texts], range(first, first + len(texts)), DRAWN_STEPS, 3.0
        )
        record[part] = []
        for i, (pixels, (text, answer)) in enumerate(zip(levels(images), texts, strict=True)):
            path = folder / f"{part}-{i}.png"
            Image.fromarray(pixels).save(path)
            record[part].append({"image": str(path), "text": text, "overwrite": answer})
    path = folder / "data.json"
    path.write_text(json.dumps(record))
    return path


def run(forget: str, surrogate: str, seed: int, setting: str, where: Path) -> dict[str, Any]:
    """One row."""
    import torch
    from safetensors.torch import load_file

    import fade
    from fade import bundled
    from fade.adapter import attach, new_metadata
    from fade.base_model import base_name, fingerprint
    from fade.concept import bundled_concept
    from fade.evaluation import evaluate
    from fade.evaluation.attacks import attack
    from fade.evaluation.attacks.registry import ATTACKS
    from fade.measure import measured
    from fade_kernels import BitMask

    unlearner, weights = package(where)
    model, settings = bundled.model("digitcanvas"), SETTINGS[setting]
    pipeline, concept = model.load_pipeline(), bundled_concept(model, forget, surrogate)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pipeline.save_pretrained(folder / "model")
        trained = unlearner(
            model_name_or_path=str(folder / "model"), json_metafile=str(write_data(pipeline, concept, seed, folder)),
            dataset_forget_name="", dataset_retain_name="", cache_dir=str(folder / "cache"),
            output_dir=str(folder / "out"), report_to="all", seed=seed,
            resolution=32, center_crop=True, is_lora_negated=False, device="cpu",
            gradient_weighting_method=weights(), per_device_train_batch_size=BATCH, gradient_accumulation_steps=1,
            max_train_steps=STEPS, lr_warmup_steps=0, max_grad_norm=5.0, **settings,
        )  # fmt: skip
        with measured() as cost, contextlib.suppress(_Saved):
            trained.train()
        path = folder / "out" / "pytorch_lora_weights.safetensors"
        size, tensors = path.stat().st_size, load_file(path)
    factors: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, which = re.fullmatch(r"unet\.(.+)\.lora[._](down|up|A|B)\.weight", key).group(1, 2)
        factors.setdefault(name, {})["B" if which in ("up", "B") else "A"] = tensor
    shapes = {name: (len(pair["B"]), pair["A"].shape[1]) for name, pair in factors.items()}
    masks = {name: BitMask.pack(torch.ones(shape, dtype=torch.bool)) for name, shape in shapes.items()}
    rank, alpha = settings["lora_r"], settings["lora_alpha"]
    adapter = attach(
        pipeline, "authors", masks, rank=rank, alpha=alpha, values=False,
        factors={name: (pair["A"], pair["B"]) for name, pair in factors.items()},
        metadata=new_metadata(concept, fade.Config(), base_name(pipeline), fingerprint(pipeline.unet), alpha / rank),
    ).enable()  # fmt: skip
    found = evaluate(pipeline, adapter, seeds=(seed + 1,), progress=False)
    attacked: dict[str, Any] = {}
    if seed == 0 and forget in ATTACKED["digitcanvas"]:
        record = attack(pipeline, adapter, tuple(ATTACKS), pictures=PICTURES, progress=False)
        attacked = measured_attacks(record)
    return {
        **dict(zip(TOLD, ("digitcanvas", f"{NAME}, {setting}", forget, surrogate, seed), strict=True)),
        "seconds": cost.seconds, "peak_memory_bytes": cost.peak_memory_bytes, "adapter_bytes": size,
        **measured_metrics(found), **attacked,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    from bench.harness import environment, in_subprocess

    parser = argparse.ArgumentParser(
        prog="python -m bench.authors_package", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("package", type=Path, help="folder into which the package was installed")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to fill; what it has is not run again")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.cell:
        print(json.dumps(run(*json.loads(a.cell), a.package)))
        return 0
    find(a.package)
    payload = read(a.output) if a.output.exists() else {"rows": []}
    rows = {tuple(row[name] for name in TOLD): row for row in payload["rows"]}
    for seed in a.seeds:
        for forget, surrogate in PAIRS["digitcanvas"]:
            for setting in a.settings:
                key = "digitcanvas", f"{NAME}, {setting}", forget, surrogate, seed
                if key in rows:
                    continue
                cell = json.dumps([forget, surrogate, seed, setting])
                rows[key] = in_subprocess("bench.authors_package", str(a.package), "--cell", cell)
                print(f"{setting}, {forget}: UA {rows[key]['metrics']['UA']:.0f}, {rows[key]['seconds']:.0f} s")
                write_json(
                    a.output,
                    {
                        "schema": SCHEMA, "kind": "table", "quick": False, "environment": environment(),
                        "package": NAME, "settings": SETTINGS, "steps": STEPS, "batch": BATCH,
                        "rows": list(rows.values()),
                    },
                )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
