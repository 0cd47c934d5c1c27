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

import torch
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.harness import Timing, environment, in_subprocess, interleaved, peak_memory, timings_json, write_json
from bench.shapes import Linear, sd15_attention
from fade_kernels import BitMask, masked_lora_linear

RANK = 16
# name -> fraction kept; tiles: every entry of a fifth of the 32 x 32 tiles.
MASKS = {"random 1 %": 0.01, "random 10 %": 0.1, "tiles 20 %": 0.2}
OURS = {f"ours, {mask}": mask for mask in MASKS}
NAIVE = ("naive, two products", "naive, one product")
BASELINES = ("frozen", "PEFT dense", *NAIVE)
PROVIDERS = (*BASELINES, *OURS)
MEMORY_LAYER = Linear(256, 1280, 1280, bias=False, count=1)
TOLERANCE = 1e-5  # Frobenius norm of the error over that of the float64 result


def make_mask(name: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    if name.startswith("tiles"):
        tiles = torch.rand(-(-rows // 32), -(-columns // 32), generator=generator) < MASKS[name]
        return tiles.repeat_interleave(32, 0).repeat_interleave(32, 1)[:rows, :columns].contiguous()
    return torch.rand(rows, columns, generator=generator) < MASKS[name]


class Problem:
    """One layer with its data, and one forward + backward step by each provider."""

    def __init__(self, layer: Linear) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int, std: float = 1.0) -> Tensor:
            return std * torch.randn(*size, generator=generator)

        n, k = layer.out_features, layer.in_features
        self.x = normal(layer.tokens, k).requires_grad_()
        self.grad_output = normal(layer.tokens, n)
        self.weight = normal(n, k, std=k**-0.5)
        self.bias = normal(n) if layer.bias else None
        self.lora_a = normal(RANK, k, std=k**-0.5).requires_grad_()
        self.lora_b = normal(n, RANK, std=0.1).requires_grad_()
        self.masks = {name: make_mask(name, n, k, generator) for name in MASKS}
        self.packed = {name: BitMask.pack(mask) for name, mask in self.masks.items()}
        self.float_mask = self.masks["random 10 %"].float()
        self.peft = self._peft_layer()

    def _peft_layer(self) -> nn.Module:
        base = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=self.bias is not None)
        base.weight.data, base.weight.requires_grad = self.weight, False
        if self.bias is not None:
            base.bias.data, base.bias.requires_grad = self.bias, False
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"], init_lora_weights=False)
        layer = inject_adapter_in_model(config, nn.ModuleDict({"layer": base}))["layer"]
        layer.lora_A["default"].weight.data = self.lora_a.detach()
        layer.lora_B["default"].weight.data = self.lora_b.detach()
        return layer

    def _backward(self, y: Tensor, *factors: Tensor) -> list[Tensor]:
        """Output and gradients of the input and of the factors."""
        return [y, *torch.autograd.grad(y, (self.x, *factors), self.grad_output)]

    def step(self, provider: str) -> list[Tensor]:
        if provider == "frozen":
            return self._backward(nn.functional.linear(self.x, self.weight, self.bias))
        if provider == "PEFT dense":
            factors = (self.peft.lora_A["default"].weight, self.peft.lora_B["default"].weight)
            return self._backward(self.peft(self.x), *factors)
        if provider in NAIVE:
            delta = (self.lora_b @ self.lora_a) * self.float_mask
            if provider == "naive, two products":
                y = nn.functional.linear(self.x, self.weight, self.bias) + nn.functional.linear(self.x, delta)
            else:
                y = nn.functional.linear(self.x, self.weight + delta, self.bias)
        else:
            mask = self.packed[OURS[provider]]
            y = masked_lora_linear(self.x, self.weight, self.bias, self.lora_a, self.lora_b, mask)
        return self._backward(y, self.lora_a, self.lora_b)

    def worst_error(self, provider: str) -> float:
        """Largest relative error of the output and the gradients against float64."""
        if provider == "frozen":
            mask = torch.zeros(self.weight.shape, dtype=torch.bool)
        elif provider == "PEFT dense":
            mask = torch.ones(self.weight.shape, dtype=torch.bool)
        else:
            mask = self.masks[OURS.get(provider, "random 10 %")]
        x, a, b = (tensor.detach().double().requires_grad_() for tensor in (self.x, self.lora_a, self.lora_b))
        delta = torch.where(mask, b @ a, 0.0)
        bias = None if self.bias is None else self.bias.double()
        y = nn.functional.linear(x, self.weight.double() + delta, bias)
        exact = [y, *torch.autograd.grad(y, (x, a, b), self.grad_output.double())]
        return max(
            float((one.detach().double() - other.detach()).norm() / other.detach().norm())
            for one, other in zip(self.step(provider), exact, strict=False)
        )


def measure_memory(provider: str) -> dict[str, int]:
    """Extra resident bytes of one step of one layer in this process, which must be fresh."""
    problem = Problem(MEMORY_LAYER)
    Problem(Linear(8, 32, 32, bias=False, count=1)).step(provider)
    with peak_memory() as peak:
        problem.step(provider)
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
        problem = Problem(layer)
        for provider in PROVIDERS:
            if (worst := problem.worst_error(provider)) > TOLERANCE:
                sys.exit(f"{provider} is wrong on {layer} (relative error {worst:.1e}): nothing was timed")
        candidates = {provider: lambda p=provider, q=problem: q.step(p) for provider in PROVIDERS}
        results.append((layer, interleaved(candidates, repeats=arguments.repeats, warmup=3, budget=20.0)))

    summary = ratios(results, lambda timing: timing.median)
    table = Table(title=f"forward + backward, x the frozen layer (fp32, rank {RANK}, batch {arguments.batch})")
    table.add_column("layer")
    for heading in ("count", "frozen ms", *PROVIDERS[1:]):
        table.add_column(heading, justify="right")
    for layer, timings in results:
        frozen = timings["frozen"].median
        cells = [f"{timings[provider].median / frozen:.2f}" for provider in PROVIDERS[1:]]
        table.add_row(str(layer), str(layer.count), f"{1e3 * frozen:.2f}", *cells)
    table.add_section()
    total = weighted(results, "frozen", lambda timing: timing.median)
    table.add_row("weighted", "", f"{1e3 * total:.0f}", *(f"{summary['frozen'][p]:.3f}" for p in PROVIDERS[1:]))
    for base in BASELINES[1:]:
        table.add_row(f"weighted, x {base}", "", "", *(f"{summary[base][p]:.3f}" for p in PROVIDERS[1:]))
    extra = (f"{memory[provider]['extra_bytes'] / 2**20:.1f}" for provider in PROVIDERS[1:])
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
