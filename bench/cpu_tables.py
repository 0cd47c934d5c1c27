"""The tables of a CPU run, as plans: the CPU benchmarks of masked LoRA, selection and saliency under one budget.

The problems are those of `bench_masked_lora`, `bench_selection` and `bench_saliency`, which also run alone. Peak memory
is measured by them too, each candidate in a process of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import bench_masked_lora, bench_saliency, bench_selection
from bench.gpu_tables import TOY
from bench.harness import in_subprocess
from bench.masked_layer import MaskedLayer, worst_error
from bench.plans import Plan, Prepared, Row
from bench.shapes import Linear, sd15_attention
from fade_kernels import accumulate_gradient_magnitude_


def _extra_bytes(module: str, *arguments: str) -> Callable[[str], int | None]:
    return lambda name: in_subprocess(f"bench.{module}", "--memory", name, *arguments)["extra_bytes"]


def masked_lora_plan(layers: Sequence[Linear], memory: bool = True) -> Plan:
    def row(layer: Linear) -> Row:
        def prepare(device: torch.device) -> Prepared:
            problem = MaskedLayer(layer, bench_masked_lora.MASKS, device=device)
            providers = bench_masked_lora.PROVIDERS

            def error(name: str, result: list[torch.Tensor]) -> float:
                return worst_error(result, problem.expected(providers[name], "training"))

            calls = {name: lambda p=provider: problem.training(p) for name, provider in providers.items()}
            sized = memory and str(layer) == str(bench_masked_lora.MEMORY_LAYER)
            extra = _extra_bytes("bench_masked_lora") if sized else lambda name: None
            return Prepared(calls, error, bench_masked_lora.TOLERANCE, extra)

        flops = layer.tokens * layer.in_features * layer.out_features
        return Row(str(layer), layer.count, prepare, weight=1 + flops / 2e8)

    title = f"SD 1.5, attention linears, forward + backward: batch 1, fp32, rank {bench_masked_lora.RANK}"
    rows = [row(layer) for layer in layers]
    return Plan("linear / SD 1.5 / attention / training, CPU", title, "training", "frozen", rows)


def selection_plan(values: int, memory: bool = True) -> Plan:
    methods = {name: method for name, method in bench_selection.METHODS.items() if name != "cat + topk"}

    def row(keep: float) -> Row:
        def prepare(device: torch.device) -> Prepared:
            tensors = bench_selection.saliency(values)
            found: dict[str, float] = {}

            def error(name: str, result: Any) -> float:
                if name == "cat + kthvalue":
                    found["threshold"] = float(result)
                return 0.0 if name != "fade_kernels" or result.threshold == found["threshold"] else 1.0

            calls = {name: lambda m=method: m(tensors, keep) for name, method in methods.items()}
            sized = memory and keep == bench_selection.TOPK_KEEP
            extra = _extra_bytes("bench_selection", "--values", str(values)) if sized else lambda name: None
            return Prepared(calls, error, memory=lambda name: extra(name) if name in bench_selection.METHODS else None)

        return Row(f"keep {100 * keep:g} %", 1, prepare, weight=8.0)

    title = f"selection among {values / 1e6:.0f} million values"
    rows = [row(keep) for keep in bench_selection.KEEPS]
    return Plan("selection, CPU", title, "forward", "cat + kthvalue", rows)


def saliency_plan(levels: Sequence[tuple[int, int, int]], memory: bool = True) -> Plan:
    forms = ("frozen", "kept", "kept_then_added", "streamed")

    def prepare(device: torch.device) -> Prepared:
        plain, streamed = (bench_saliency.Pass(1, levels=levels) for _ in range(2))
        bench_saliency.check(plain, streamed)
        calls = {form: getattr(streamed if form == "streamed" else plain, form) for form in forms}
        extra = _extra_bytes("bench_saliency") if memory else lambda name: None
        return Prepared(calls, memory=extra)

    title = "saliency pass over SD 1.5's attention projections alone, batch 1"
    return Plan("saliency pass, CPU", title, "training", "kept", [Row("pass", 1, prepare, weight=25.0)])


def linear_gradient_plan(levels: Sequence[tuple[int, int, int]]) -> Plan:
    rows = []
    for width, image, count in levels:
        for columns, tokens, number in ((width, image, 6), (bench_saliency.TEXT[1], bench_saliency.TEXT[0], 2)):
            size = (width, columns, tokens)

            def prepare(device: torch.device, size: tuple[int, int, int] = size) -> Prepared:
                return Prepared(bench_saliency.layer_candidates(*size), memory=lambda name: None)

            name = f"{size[2]} x {columns} -> {width}"
            rows.append(Row(name, count * number, prepare, weight=1.0))
    title = "weight-gradient magnitude of one linear layer"
    return Plan("linear gradient magnitude, CPU", title, "training", "matmul + abs().add_", rows)


def accumulate_plan(values: int) -> Plan:
    def prepare(device: torch.device) -> Prepared:
        sums = bench_selection.saliency(values)
        gradients = [torch.randn_like(s) for s in sums]

        def loop() -> None:
            for s, g in zip(sums, gradients, strict=True):
                s.add_(g.abs())

        calls = {"loop of abs, add_": loop, "fade_kernels": lambda: accumulate_gradient_magnitude_(sums, gradients)}
        return Prepared(calls, memory=lambda name: None)

    title = f"S += |g|, {values / 1e6:.0f} million values"
    return Plan("accumulate, CPU", title, "forward", "loop of abs, add_", [Row("all", 1, prepare, weight=6.0)])


def plans(toy: bool = False) -> list[Plan]:
    """Every table of a CPU run; `toy`: tiny sizes, and no memory, which takes a process for each candidate."""
    layers = TOY.forward_layers if toy else sd15_attention(1)
    levels = TOY.levels if toy else bench_saliency.LEVELS
    values = TOY.values if toy else bench_selection.VALUES
    return [
        masked_lora_plan(layers, not toy),
        selection_plan(values, not toy),
        accumulate_plan(values),
        saliency_plan(levels, not toy),
        linear_gradient_plan(levels),
    ]
