"""One saliency pass over SD 1.5's attention projections on the CPU: streamed, against gradients that are kept.

    python -m bench.bench_saliency --output bench/results/saliency.json

A network of the linear layers alone (no softmax, no convolutions: nothing hides their cost), at 512 px, batch 1. The
opponent is an ordinary backward pass that keeps every weight's `.grad` and then adds its magnitude; also shown: that
backward alone, and one without any weight gradient, the floor. The saliency of both is compared before it is timed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bench.harness import environment, in_subprocess, interleaved, peak_memory, print_table, timings_json, write_json
from fade_kernels import GradientMagnitude, accumulate_linear_gradient_magnitude_

# Of SD 1.5's UNet: (width, tokens at 512 px, number of transformer blocks).
LEVELS = ((320, 4096, 5), (640, 1024, 5), (1280, 256, 5), (1280, 64, 1))
TEXT = (77, 768)


class Block(nn.Module):
    """The eight attention projections of one transformer block, joined by sums instead of attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out, self.cross_q, self.cross_out = (
            nn.Linear(width, width, bias=False) for _ in range(6)
        )
        self.cross_k, self.cross_v = (nn.Linear(TEXT[1], width, bias=False) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.out(self.q(x) + self.k(x) + self.v(x))
        joined = (self.cross_k(text) + self.cross_v(text)).mean(1, keepdim=True)
        return x + self.cross_out(self.cross_q(x) + joined)


class Projections(nn.Module):
    def __init__(self, levels: Sequence[tuple[int, int, int]] = LEVELS) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.ModuleList(Block(width) for _ in range(count)) for width, _, count in levels)

    def forward(self, inputs: list[Tensor], text: Tensor) -> Tensor:
        loss = text.new_zeros((), dtype=torch.float32)
        for blocks, x in zip(self.levels, inputs, strict=True):
            for block in blocks:
                x = block(x, text)
            loss = loss + x.float().square().mean()
        return loss


class Pass:
    """One saliency pass in each of its forms, on the same network and inputs."""

    def __init__(
        self,
        divide_tokens: int,
        *,
        levels: Sequence[tuple[int, int, int]] = LEVELS,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        torch.manual_seed(0)
        self.network = Projections(levels).requires_grad_(False).to(device, dtype)
        self.layers = {name: m for name, m in self.network.named_modules() if isinstance(m, nn.Linear)}
        self.inputs = [
            torch.randn(batch, tokens // divide_tokens, width).to(device, dtype) for width, tokens, _ in levels
        ]
        self.text = torch.randn(batch, *TEXT).to(device, dtype)
        self.accumulators: dict[str, Tensor] = {}
        self.watch: GradientMagnitude | None = None

    def _backward(self, weights: bool) -> None:
        self.network.requires_grad_(weights)
        # Without weight gradients something else must ask for the backward pass.
        inputs = [x.requires_grad_(not weights) for x in self.inputs]
        self.network(inputs, self.text).backward()
        for x in inputs:
            x.requires_grad_(False).grad = None

    def frozen(self) -> None:
        """Forward and input gradients only."""
        self._backward(weights=False)

    def kept(self) -> None:
        """Forward, input gradients, and every weight's gradient kept in `.grad`; no accumulator."""
        self._backward(weights=True)
        self.network.zero_grad(set_to_none=True)
        self.network.requires_grad_(False)

    def kept_then_added(self) -> None:
        """The same, then `S += grad.abs()` for each weight."""
        if not self.accumulators:
            self.accumulators = {
                name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in self.layers.items()
            }
        self._backward(weights=True)
        for name, layer in self.layers.items():
            self.accumulators[name].add_(layer.weight.grad.abs())
        self.network.zero_grad(set_to_none=True)
        self.network.requires_grad_(False)

    def streamed(self) -> None:
        """With GradientMagnitude, whose hooks stay on this network from the first call on."""
        if self.watch is None:
            self.watch = GradientMagnitude(self.layers).__enter__()
            self.accumulators = self.watch.saliency
        self.network(self.inputs, self.text).backward()


def measure_memory(form: str, divide_tokens: int) -> dict[str, int]:
    """Growth of resident memory over one pass, accumulators included, in this process, which must be fresh."""
    run = Pass(divide_tokens)
    with peak_memory() as peak:
        getattr(run, form)()
    return {"extra_bytes": peak.extra}


def layer_candidates(
    width: int,
    columns: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Callable[[], object]]:
    """One layer's weight gradient alone: streamed into the accumulator, against made whole and added."""
    dy, x = (torch.randn(1, tokens, size, device=device).to(dtype) for size in (width, columns))
    saliency = torch.zeros(width, columns, device=device)
    return {
        "matmul + abs().add_": lambda: saliency.add_((dy[0].T @ x[0]).abs()),
        "fade_kernels": lambda: accumulate_linear_gradient_magnitude_(saliency, dy, x),
    }


def check(plain: Pass, streamed: Pass) -> None:
    plain.kept_then_added()
    streamed.streamed()
    for name, expected in plain.accumulators.items():
        error = float((streamed.accumulators[name] - expected).abs().max() / expected.abs().max())
        if error > 1e-4:
            sys.exit(f"wrong saliency of {name} (relative error {error:.1e}): nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="JSON file to write")
    forms = ("frozen", "kept", "kept_then_added", "streamed")
    parser.add_argument("--divide-tokens", type=int, default=1, help="fewer tokens, for a quick look (default: 1)")
    parser.add_argument("--memory", choices=forms, help="only print one form's extra memory as JSON")
    arguments = parser.parse_args()
    divide = arguments.divide_tokens
    if arguments.memory:
        print(json.dumps(measure_memory(arguments.memory, divide)))
        return

    before = environment()
    memory = {
        form: in_subprocess("bench.bench_saliency", "--memory", form, "--divide-tokens", str(divide)) for form in forms
    }
    plain, streamed = Pass(divide), Pass(divide)
    check(plain, streamed)
    weights = sum(layer.weight.nbytes for layer in plain.layers.values())
    passes = interleaved(
        {form: getattr(streamed if form == "streamed" else plain, form) for form in forms},
        repeats=9,
        warmup=1,
        budget=50.0,
    )
    layers = []
    for width, tokens, _ in LEVELS:
        for columns, n in ((width, max(1, tokens // divide)), (TEXT[1], TEXT[0])):
            timings = interleaved(layer_candidates(width, columns, n), repeats=15, warmup=2, budget=3.0)
            layers.append({"rows": width, "columns": columns, "tokens": n, "seconds": timings_json(timings)})

    base = passes["kept"].median
    print_table(
        ["pass", "seconds", "x kept", "extra MiB", "x weight bytes"],
        [
            [
                form,
                f"{passes[form].median:.3f}",
                f"{passes[form].median / base:.3f}",
                f"{memory[form]['extra_bytes'] / 2**20:.0f}",
                f"{memory[form]['extra_bytes'] / weights:.2f}",
            ]
            for form in forms
        ],
    )
    print()
    print_table(
        ["layer", "matmul + abs().add_ ms", "fade_kernels ms", "ratio"],
        [
            [
                f"[{row['rows']}, {row['columns']}] x {row['tokens']} tokens",
                *(f"{seconds['median'] * 1e3:.2f}" for seconds in row["seconds"].values()),
                f"{row['seconds']['fade_kernels']['median'] / row['seconds']['matmul + abs().add_']['median']:.3f}",
            ]
            for row in layers
        ],
    )
    if arguments.output:
        payload = {
            "benchmark": "saliency",
            "tokens": [tokens // divide for _, tokens, _ in LEVELS],
            "weight_bytes": weights,
            "environment": before,
            "memory": memory,
            "seconds": timings_json(passes),
            "ratio_to_kept": {form: timing.median / base for form, timing in passes.items()},
            "layers": layers,
        }
        write_json(arguments.output, payload)


if __name__ == "__main__":
    main()
