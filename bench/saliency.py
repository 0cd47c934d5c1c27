"""One saliency pass over SD 1.5's attention projections, as a problem to measure: streamed, or with kept gradients.

A network of the linear layers alone (no softmax, no convolutions: nothing hides their cost), at 512 px, batch 1. The
opponent is an ordinary backward pass that keeps every weight's `.grad` and then adds its magnitude; also shown: that
backward alone, and one without any weight gradient, the floor. The saliency of both is compared before it is timed.
"""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fade_kernels import GradientMagnitude, accumulate_linear_gradient_magnitude_

# Of SD 1.5's UNet: (width, tokens at 512 px, number of transformer blocks).
LEVELS = ((320, 4096, 5), (640, 1024, 5), (1280, 256, 5), (1280, 64, 1))
TEXT = (77, 768)
FORMS = ("frozen", "kept", "kept_then_added", "streamed")
FEW_TOKENS = 64
"""With an image of this many times fewer tokens, activations are small against gradients and accumulators."""
MEMORY_TITLE = f"the same pass over 1/{FEW_TOKENS} of the tokens: its memory is gradients and accumulators"


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
            torch.randn(batch, max(1, tokens // divide_tokens), width).to(device, dtype) for width, tokens, _ in levels
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
