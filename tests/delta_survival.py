"""How much of a delta far below the weight is in a 16-bit output: all of it, on average, on every path.

A share is the regression of y(Delta) - y(-Delta) on 2 x Delta^T: 1 where the delta is kept, 0 where it is lost. Both
outputs round the same x W^T, so that what their rounding does to it cancels, and the share has an error of about
sqrt(ulp / |x Delta^T| / outputs), where a single output's would be ulp / |x Delta^T| / sqrt(outputs).
"""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from fade_kernels import BitMask

RATIO = 1e-4
"""|Delta| where the mask is set, as a part of |W|."""


def fresh_generator() -> torch.Generator:
    """Random numbers from a fresh seed, printed with a failure."""
    generator = torch.Generator()
    print(f"seed {generator.seed()}")
    return generator


class Layer:
    """A linear layer, or with a kernel a convolution over images of side x side, and an adapter of known size.

    Args:
        tokens: rows of x, or images; rows, columns: N and K, or C_out and C_in.
        density: of the mask; ratio: |Delta| as a part of |W|.
    """

    def __init__(
        self, dtype: torch.dtype, tokens: int, rows: int, columns: int, density: float, *, ratio: float = RATIO,
        kernel: int = 0, side: int = 0, rank: int = 16,
    ) -> None:  # fmt: skip
        generator = fresh_generator()

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        tail = (kernel, kernel) if kernel else ()
        self.shape = (rows, columns, *tail)
        pixels = (side, side) if kernel else ()
        leading = (tokens,)
        self.x, self.grad_output = (
            normal(*leading, channels, *pixels).to(dtype) for channels in (columns, rows)
        )  # fmt: skip
        self.weight = (normal(*self.shape) * prod(self.shape[1:]) ** -0.5).to(dtype)
        self.lora_a, self.lora_b = normal(rank, columns, *tail), normal(rows, rank, *(1 for _ in tail))
        bits = torch.rand(self.shape, generator=generator) < density
        bits.view(-1)[0] = True
        self.mask = BitMask.pack(bits)
        product = (self.lora_b.flatten(1) @ self.lora_a.flatten(1)).reshape(self.shape)
        self.values = product[bits]
        size = self.values.square().mean().sqrt()
        self.scale = ratio * float(self.weight.float().square().mean().sqrt() / size)
        self.delta = torch.where(bits, self.scale * product, 0.0)
        self.padding = kernel // 2
        wide_x, wide_dy = self.x.float(), self.grad_output.float()
        if kernel:
            self.term = torch.nn.functional.conv2d(wide_x, self.delta, padding=self.padding)
            self.gradient_term = torch.nn.grad.conv2d_input(self.x.shape, self.delta, wide_dy, padding=self.padding)
        else:
            self.term, self.gradient_term = wide_x @ self.delta.t(), wide_dy @ self.delta

    def to(self, device: str) -> "Layer":
        """This layer with its tensors on a device."""
        for name, value in vars(self).items():
            if isinstance(value, (Tensor, BitMask)):
                setattr(self, name, value.to(device))
        return self

    def adapter(self, values: bool) -> tuple[Tensor, ...]:
        return (self.values,) if values else (self.lora_a, self.lora_b)


def share(term: Tensor, output: Callable[[float], Tensor], repeats: int = 1) -> float:
    """The share of `term` in `output(sign)`, called `repeats` times with each sign where it is random."""
    total = torch.zeros_like(term)
    for _ in range(repeats):
        total += output(1.0).float() - output(-1.0).float()
    return float((total.double() * term).sum() / (2 * repeats * term.double().square().sum()))


def assert_kept(shares: dict[str, float]) -> None:
    """Raises unless every share is within 5 % of 1."""
    assert all(0.95 <= one <= 1.05 for one in shares.values()), shares
