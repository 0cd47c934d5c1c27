"""A hundred adapters on one model: what drawing costs with their sum attached, and attached one by one.

    python -m bench.bench_combine [--output FILE] [--adapters 100] [--repeats 15] [--quick]

Adapters of random positions and values, 1 % of the targets each: in the layers that read the prompt alone (where the
closed form puts them; 5 % of those), or spread over all attention projections. Timed in turns, unmerged, as ratios to
the bare model: whole drawings by DigitCanvas, and one pass of a UNet of SD 1.5's layer shapes and random weights at
256 pixels, two samples (one image with guidance), where the adapter has as many positions as the sum would have but is
made at once. The processor time of the process stands beside the wall time, since
a busy machine hides the second. What is kept dense is counted in bytes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.harness import environment, print_table, write_json

TEXT, ALL = ("attn2.to_k", "attn2.to_v"), ("to_q", "to_k", "to_v", "to_out.0")


def write_adapters(
    unet: Any, targets: tuple[str, ...], count: int, folder: Path, as_if: int | None = None
) -> list[Path]:
    """Files of random adapters that change 1 % of all attention projections, in the layers of `targets`; with `as_if`,
    each has as many positions as the sum of so many."""
    from fade.adapter_file import LayerTensors, write_adapter_file
    from fade.base_model import fingerprint, target_layers
    from fade_kernels import BitMask

    layers = target_layers(unet, targets)
    everything = sum(layer.weight.numel() for layer in target_layers(unet, ALL).values())
    density = 0.01 * everything / sum(layer.weight.numel() for layer in layers.values())
    if as_if is not None:
        density = 1 - (1 - density) ** as_if
    digests, files = fingerprint(unet), []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        tensors = {}
        for name, layer in layers.items():
            mask = BitMask.pack(torch.rand(layer.weight.shape, generator=generator) < density)
            tensors[name] = LayerTensors(mask, values=1e-3 * torch.randn(mask.count, generator=generator))
        metadata = {"concept": {"forget": f"concept {index}"}, "fingerprint": digests, "scale": 1.0}
        files.append(folder / f"{index}.safetensors")
        write_adapter_file(files[-1], metadata, tensors)
    return files


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of each, by the wall and by the processor, and the median ratio to the first of the same round."""
    for call in calls.values():
        call()
    wall: dict[str, list[float]] = {name: [] for name in calls}
    busy: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(repeats):
        for name in list(calls)[:: 1 if index % 2 else -1]:
            start, spent = time.perf_counter(), time.process_time()
            calls[name]()
            wall[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - spent)
    first = next(iter(calls))
    return {
        name: {
            "wall": statistics.median(wall[name]),
            "processor": statistics.median(busy[name]),
            "ratio": statistics.median(a / b for a, b in zip(wall[name], wall[first], strict=True)),
            "ratio_processor": statistics.median(a / b for a, b in zip(busy[name], busy[first], strict=True)),
        }
        for name in calls
    }


def kept_dense(adapter: Any) -> int:
    """Bytes that are kept to draw with an adapter."""
    from fade.layers import _dense_deltas

    kept = [_dense_deltas[layer] for layer in adapter.layers.values() if layer in _dense_deltas]
    return sum(d.delta.nbytes + sum(t.nbytes for part in d.made_of for t in part[:3]) for d in kept)


def measure(
    bare: Any, attached: Any, call: Callable[[Any], Callable[[], Any]], targets: tuple[str, ...], count: int,
    repeats: int, one_by_one: int = 0, at_once: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """`bare` and `attached` are two copies of a pipeline or denoiser; `call` makes the drawing of one."""
    import fade
    from fade.backbones import denoiser_of

    with tempfile.TemporaryDirectory() as folder:
        files = write_adapters(
            denoiser_of(attached)[1], targets, 1 if at_once else count, Path(folder), count if at_once else None
        )  # fmt: skip
        start = time.perf_counter()
        made = fade.combine_adapters(files, Path(folder) / "all.safetensors")
        seconds = time.perf_counter() - start
        combined = fade.load_adapter(attached, Path(folder) / "all.safetensors")
        row = {
            "density": made.density, "bytes": made.bytes, "combine_seconds": seconds,
            **in_turns({"bare": call(bare), "combined": call(attached)}, repeats),
        }  # fmt: skip
        row["kept_bytes"] = kept_dense(combined)
        combined.remove()
        if one_by_one:
            for index, file in enumerate(files):
                fade.load_adapter(attached, file, name=f"part_{index}")
            calls = {"bare": call(bare), "one by one": call(attached)}
            row["one by one"] = in_turns(calls, one_by_one)["one by one"]
            for adapter in fade.adapters(attached).values():
                adapter.remove()
    return row


def digitcanvas(images: int) -> Callable[[Any], Callable[[], Any]]:
    from fade.backbones import backbone_for

    prompts = [f"the digit {'three' if index % 2 else 'eight'} in ink style" for index in range(images)]

    def call(pipeline: Any) -> Callable[[], Any]:
        backbone = backbone_for(pipeline)
        return lambda: backbone.generate(prompts, range(images), 5, 3.0, images, False, "")

    return call


def sd15() -> Any:
    """A UNet of SD 1.5's shapes, random."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(cross_attention_dim=768).eval().requires_grad_(False)


def unet_pass(unet: Any) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 32, 32, generator=generator), torch.randn(2, 77, 768, generator=generator)

    def call() -> None:
        with torch.inference_mode():
            unet(x, torch.tensor(500), text)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results/combine.json"))
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="DigitCanvas alone")
    arguments = parser.parse_args()

    from fade.digitcanvas import load_pipeline

    rows: dict[str, Any] = {}
    count, facts = arguments.adapters, environment()

    def keep(name: str, row: dict[str, Any]) -> None:
        """Adds a row to the file, so that what is cut short leaves what it measured."""
        rows[name] = row
        write_json(arguments.output, {"environment": facts, "adapters": count, "rows": rows})

    places = (("text path", TEXT), ("all attention", ALL))
    for images in (1, 8, 64):
        for place, targets in places:
            repeats = max(3, arguments.repeats if images < 64 else arguments.repeats // 3)
            call, one_by_one = digitcanvas(images), 3 if images == 8 else 0
            row = measure(load_pipeline(), load_pipeline(), call, targets, count, repeats, one_by_one)
            keep(f"DigitCanvas, {images} image{'s' if images > 1 else ''}, {place}", row)
    if not arguments.quick:
        import copy

        bare = sd15()
        attached = copy.deepcopy(bare)
        for place, targets in places:
            row = measure(
                bare, attached, unet_pass, targets, count, max(3, arguments.repeats // 5), at_once=True
            )  # fmt: skip
            keep(f"SD 1.5's shapes, 256 pixels, {place}", row)
    head = ["", "density", "ratio", "by processor time", "one by one", "kept MB"]
    lines = [
        [
            name, f"{row['density']:.2f}", f"{row['combined']['ratio']:.3f}",
            f"{row['combined']['ratio_processor']:.3f}",
            f"{row['one by one']['ratio']:.1f}" if "one by one" in row else "", f"{row['kept_bytes'] / 1e6:.1f}",
        ]
        for name, row in rows.items()
    ]  # fmt: skip
    print_table(head, lines)


if __name__ == "__main__":
    main()
