"""The tables of a CPU run, as plans: the CPU benchmarks of masked LoRA, selection and saliency under one budget.

Peak memory is measured by `cpu_memory`, each candidate in a process of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from bench import roofline, saliency, selection
from bench.gpu_tables import FULL, TOY, ceilings_plan
from bench.harness import in_subprocess
from bench.masked_layer import FROZEN, KEPT, NAIVE_ONE, NAIVE_TWO, PEFT, RANK, Mask, MaskedLayer, Provider, worst_error
from bench.plans import Plan, Prepared, Row
from bench.roofline import FP32, Chip, Cost
from bench.shapes import Linear, sd15_attention
from fade_kernels import accumulate_gradient_magnitude_

MASKS = (Mask(0.1), Mask(0.01), Mask(0.2, tile=32))
PROVIDERS = {
    provider.name: provider
    for provider in (
        *(FROZEN, PEFT, NAIVE_TWO, NAIVE_ONE),
        *(Provider("ours", mask.name) for mask in MASKS),
        Provider("ours", MASKS[0].name, KEPT),  # in fp32 nothing is rounded: W + delta made once for both passes
    )
}
CHIP = Chip("CPU", bandwidth=1.0, matrix=1.0, fp32=1.0, gathered=1.0, sampled=1.0, launch=0.0, cache_bytes=0.0)
"""Of which the bandwidth and the rate of fp32 products are measured in every run; only lower bounds need it."""
MEMORY_LAYER = Linear(256, 1280, 1280, bias=False, count=1)
TOLERANCE = 1e-5  # Frobenius norm of the error over that of the float64 result


def _extra_bytes(table: str, *arguments: str) -> Callable[[str], int | None]:
    return lambda name: in_subprocess("bench.cpu_memory", table, name, *arguments)["extra_bytes"]


def masked_lora_plan(layers: Sequence[Linear], memory: bool = True) -> Plan:
    def row(layer: Linear) -> Row:
        def prepare(device: torch.device) -> Prepared:
            problem = MaskedLayer(layer, MASKS, device=device)

            def error(name: str, result: list[torch.Tensor]) -> float:
                return worst_error(result, problem.expected(PROVIDERS[name], "training"))

            calls = {name: lambda p=provider: problem.training(p) for name, provider in PROVIDERS.items()}
            sized = memory and str(layer) == str(MEMORY_LAYER)
            extra = _extra_bytes("masked_lora") if sized else lambda name: None
            return Prepared(calls, error, TOLERANCE, extra)

        def bound(chip: Chip) -> Cost:
            return roofline.lower_bound(layer, element=FP32)

        flops = layer.tokens * layer.in_features * layer.out_features
        return Row(str(layer), layer.count, prepare, bound=bound, weight=1 + flops / 2e8)

    title = f"SD 1.5, attention linears, forward + backward: batch 1, fp32, rank {RANK}"
    rows = [row(layer) for layer in layers]
    return Plan("linear / SD 1.5 / attention / training, CPU", title, "training", "frozen", rows)


def selection_plan(values: int, memory: bool = True) -> Plan:
    def row(keep: float) -> Row:
        def prepare(device: torch.device) -> Prepared:
            tensors = selection.saliency(values)
            found: dict[str, float] = {}

            def error(name: str, result: Any) -> float:
                if name == "cat + kthvalue":
                    found["threshold"] = float(result)
                return 0.0 if name != "fade_kernels" or result.threshold == found["threshold"] else 1.0

            calls = {name: lambda m=method: m(tensors, keep) for name, method in selection.METHODS.items()}
            sized = memory and keep == selection.MEMORY_KEEP
            extra = _extra_bytes("selection", "--values", str(values)) if sized else lambda name: None
            return Prepared(calls, error, memory=extra)

        return Row(f"keep {100 * keep:g} %", 1, prepare, weight=8.0)

    title = f"selection among {values / 1e6:.0f} million values"
    rows = [row(keep) for keep in selection.KEEPS]
    return Plan("selection, CPU", title, "forward", "cat + kthvalue", rows)


def _saliency_row(levels: Sequence[tuple[int, int, int]], divide_tokens: int, memory: bool, weight: float) -> Row:
    def prepare(device: torch.device) -> Prepared:
        plain, streamed = (saliency.Pass(divide_tokens, levels=levels) for _ in range(2))
        saliency.check(plain, streamed)
        calls = {form: getattr(streamed if form == "streamed" else plain, form) for form in saliency.FORMS}
        extra = _extra_bytes("saliency", "--divide-tokens", str(divide_tokens))
        return Prepared(calls, memory=extra if memory else lambda name: None)

    return Row("pass", 1, prepare, weight=weight)


def saliency_plan(levels: Sequence[tuple[int, int, int]], memory: bool = True) -> Plan:
    title = "saliency pass over SD 1.5's attention projections alone, batch 1"
    return Plan("saliency pass, CPU", title, "training", "kept", [_saliency_row(levels, 1, memory, 25.0)])


def saliency_memory_plan(levels: Sequence[tuple[int, int, int]], memory: bool = True) -> Plan:
    row = _saliency_row(levels, saliency.FEW_TOKENS, memory, 8.0)
    return Plan("saliency memory, CPU", saliency.MEMORY_TITLE, "training", "kept_then_added", [row])


def linear_gradient_plan(levels: Sequence[tuple[int, int, int]]) -> Plan:
    rows = []
    for width, image, count in levels:
        for columns, tokens, number in ((width, image, 6), (saliency.TEXT[1], saliency.TEXT[0], 2)):
            size = (width, columns, tokens)

            def prepare(device: torch.device, size: tuple[int, int, int] = size) -> Prepared:
                return Prepared(saliency.layer_candidates(*size), memory=lambda name: None)

            name = f"{size[2]} x {columns} -> {width}"
            rows.append(Row(name, count * number, prepare, weight=1.0))
    title = "weight-gradient magnitude of one linear layer"
    return Plan("linear gradient magnitude, CPU", title, "training", "matmul + abs().add_", rows)


def accumulate_plan(values: int) -> Plan:
    def prepare(device: torch.device) -> Prepared:
        sums = selection.saliency(values)
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
    levels = TOY.levels if toy else saliency.LEVELS
    values = TOY.values if toy else selection.VALUES
    work = TOY if toy else replace(FULL, copied=2**28, side=2048)
    return [
        ceilings_plan(replace(work, dtype=torch.float32)),
        masked_lora_plan(layers, not toy),
        selection_plan(values, not toy),
        accumulate_plan(values),
        saliency_plan(levels, not toy),
        saliency_memory_plan(levels, not toy),
        linear_gradient_plan(levels),
    ]
