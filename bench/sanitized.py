"""Every kernel once, on small odd shapes, for compute-sanitizer: `python -m bench.sanitized [--cuda-library]`.

Under a sanitizer a kernel runs hundreds of times slower, so this is as little as reaches every bounds check: sizes that
are no multiples of a block, an empty tensor, one row. With `--cuda-library` only the operators that are CUDA C++.
"""

import argparse

import torch

from bench.masked_layer import ONE_PRODUCT, Mask, MaskedLayer, Provider
from bench.shapes import Linear
from fade_kernels import (
    BitMask,
    accumulate_gradient_magnitude_,
    accumulate_linear_gradient_magnitude_,
    effective_weight,
    select_top_fraction,
)
from fade_kernels.masked_lora import REGIMES
from fade_kernels.positions import find_positions


def cuda_library(device: torch.device) -> None:
    """Accumulation, selection, packing, occupancy and the gather path."""
    shapes = ((37, 70), (1, 1), (5, 1025), (64, 64), (3, 0))
    sums = [torch.rand(shape, device=device) for shape in shapes]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        accumulate_gradient_magnitude_(sums, [torch.randn(shape, device=device, dtype=dtype) for shape in shapes])
    sums[0][:, 1::2] = sums[0][:, 0:1]  # ties
    for mask in select_top_fraction(sums, 0.3).masks:
        again = BitMask.pack(mask.unpack())
        assert again == mask and again.count == mask.count
        mask.occupancy(32), mask.row_counts
    for tokens, rows, columns in ((67, 72, 97), (1, 33, 40), (2200, 40, 33), (70, 40, 2500)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            gathered(device, dtype, tokens, rows, columns)


def gathered(device: torch.device, dtype: torch.dtype, tokens: int, rows: int, columns: int) -> None:
    """The products at a mask's positions, in both orders, and their gradients."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, dy, factors = random(tokens, columns), random(tokens, rows), (random(5, columns), random(rows, 5))
    mask = BitMask.pack(torch.rand(rows, columns, device=device) < 0.02)
    by_row, by_column, order = find_positions(mask.words, columns)
    scale, ops = torch.tensor(0.5, device=device), torch.ops.fade_kernels
    ops.add_gathered_lora_(dy.clone(), x, *factors, *by_row, False, scale)
    ops.add_gathered_lora_(x.clone(), dy, *factors, *by_column, True, scale)
    gradient = ops.sampled_gradient(dy, x, *by_row)
    ops.add_gathered_values_(x.clone(), dy, gradient, order, by_column.starts, by_column.index, scale)
    ops.sampled_factor_gradients(
        gradient, by_row.starts, by_row.index, by_column.starts, by_column.index, order, *factors, scale
    )


def triton_kernels(device: torch.device) -> None:
    """Masked LoRA on every path, the linear gradient magnitude and the effective weight."""
    mask = Mask(0.1)
    for layer in (Linear(67, 72, 97, bias=True, count=1), Linear(1, 33, 40, bias=False, count=1)):
        problem = MaskedLayer(layer, [mask], dtype=torch.bfloat16, device=device, rank=5)
        for regime in (*REGIMES, *ONE_PRODUCT):
            problem.training(Provider("ours", mask.name, regime))
        factors = (problem.lora_a.detach(), problem.lora_b.detach(), problem.packed[mask.name])
        effective_weight(problem.weight, *factors)
        saliency = torch.zeros(layer.out_features, layer.in_features, device=device)
        accumulate_linear_gradient_magnitude_(saliency, problem.grad_output, problem.x.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda-library", action="store_true", help="only the operators written in CUDA C++")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cuda_library(device)
    if not arguments.cuda_library:
        triton_kernels(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print("bench.sanitized: done")


if __name__ == "__main__":
    main()
