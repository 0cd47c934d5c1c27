"""Products with very sparse masks, at their positions alone: csrc/cuda/gather.cu.

What `cuda/linear.py` composes the gather path of the operators in `linear.py` from; positions: `positions.py`.
"""

import torch
from torch import Tensor

from fade_kernels import reference
from fade_kernels._ops.define import (
    check_factors,
    check_same_device,
    check_same_dtype,
    check_scale,
    check_values,
    define,
    no_output,
    shape_of,
)


def _check_positions(starts: Tensor, segments: int, **positions: Tensor | None) -> None:
    present = {"starts": starts, **{name: tensor for name, tensor in positions.items() if tensor is not None}}
    for name, tensor in present.items():
        if tensor.dtype != torch.int32 or tensor.dim() != 1:
            raise ValueError(f"{name} must be int32 with one dimension, not {tensor.dtype} {shape_of(tensor)}")
    if starts.numel() != segments + 1:
        raise ValueError(f"starts {shape_of(starts)} must have one element more than there are segments, {segments}")
    lists = {name: tensor for name, tensor in present.items() if name != "starts"}
    if any(tensor.numel() != next(iter(lists.values())).numel() for tensor in lists.values()):
        lengths = ", ".join(f"{name} {shape_of(tensor)}" for name, tensor in lists.items())
        raise ValueError(f"all lists of positions must be equally long, got {lengths}")


def _check_products(names: tuple[str, str], first: Tensor, second: Tensor) -> None:
    if first.dim() != 2 or second.dim() != 2 or first.shape[0] != second.shape[0]:
        raise ValueError(f"{names[0]} {shape_of(first)} and {names[1]} {shape_of(second)} must be [T, *] with one T")


def _check_sum(y: Tensor, x: Tensor) -> None:
    """A sum y in fp32 may take products of 16 bits: its caller then rounds the whole of it once."""
    _check_products(("y", "x"), y, x)
    if y.dtype != torch.float32 or x.dtype == torch.float64:
        check_same_dtype(y=y, x=x)


def _check_add_gathered_lora_(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    starts: Tensor,
    index: Tensor,
    segment: Tensor,
    by_column: bool,
    scale: Tensor,
) -> None:
    check_factors(lora_a, lora_b, 2)
    _check_sum(y, x)
    widths = (lora_b.shape[0], lora_a.shape[1])
    if (y.shape[1], x.shape[1]) != (widths[::-1] if by_column else widths):
        raise ValueError(f"y {shape_of(y)} and x {shape_of(x)} do not fit B A [{widths[0]}, {widths[1]}]")
    _check_positions(starts, y.shape[1], index=index, segment=segment)
    check_scale(scale, y)
    check_same_device(y=y, x=x, lora_a=lora_a, lora_b=lora_b, starts=starts, index=index, segment=segment)


def _check_add_gathered_values_(
    y: Tensor, x: Tensor, values: Tensor, order: Tensor | None, starts: Tensor, index: Tensor, scale: Tensor
) -> None:
    check_values(values)
    _check_sum(y, x)
    _check_positions(starts, y.shape[1], index=index, order=order)
    if values.numel() != index.numel():
        raise ValueError(f"values {shape_of(values)} must be one for each of the {index.numel()} positions")
    check_scale(scale, y)
    check_same_device(y=y, x=x, values=values, order=order, starts=starts, index=index)


def _check_sampled_gradient(grad_output: Tensor, x: Tensor, starts: Tensor, index: Tensor, segment: Tensor) -> None:
    _check_products(("grad_output", "x"), grad_output, x)
    check_same_dtype(grad_output=grad_output, x=x)
    _check_positions(starts, grad_output.shape[1], index=index, segment=segment)
    check_same_device(grad_output=grad_output, x=x, starts=starts, index=index, segment=segment)


def _check_sampled_factor_gradients(
    gradient: Tensor,
    row_starts: Tensor,
    row_index: Tensor,
    column_starts: Tensor,
    column_index: Tensor,
    order: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
) -> None:
    check_factors(lora_a, lora_b, 2)
    _check_positions(row_starts, lora_b.shape[0], row_index=row_index)
    _check_positions(column_starts, lora_a.shape[1], row_index=row_index, column_index=column_index, order=order)
    if tuple(gradient.shape) != (row_index.numel(),):
        raise ValueError(f"gradient {shape_of(gradient)} must be one for each of the {row_index.numel()} positions")
    check_scale(scale, gradient)
    check_same_device(
        gradient=gradient,
        **{"row_starts": row_starts, "row_index": row_index, "column_starts": column_starts},
        **{"column_index": column_index, "order": order, "lora_a": lora_a, "lora_b": lora_b},
    )


add_gathered_lora_ = define(
    "add_gathered_lora_(Tensor(a!) y, Tensor x, Tensor lora_a, Tensor lora_b, Tensor starts, Tensor index, "
    "Tensor segment, bool by_column, Tensor scale) -> ()",
    check=_check_add_gathered_lora_,
    fake=no_output,
    default=reference.add_gathered_lora_,
)

add_gathered_values_ = define(
    "add_gathered_values_(Tensor(a!) y, Tensor x, Tensor values, Tensor? order, Tensor starts, Tensor index, "
    "Tensor scale) -> ()",
    check=_check_add_gathered_values_,
    fake=no_output,
    default=reference.add_gathered_values_,
)

sampled_gradient = define(
    "sampled_gradient(Tensor grad_output, Tensor x, Tensor starts, Tensor index, Tensor segment) -> Tensor",
    check=_check_sampled_gradient,
    fake=lambda grad_output, x, starts, index, segment: x.new_empty(
        (index.numel(),), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
    ),
    default=reference.sampled_gradient,
)

sampled_factor_gradients = define(
    "sampled_factor_gradients(Tensor gradient, Tensor row_starts, Tensor row_index, Tensor column_starts, "
    "Tensor column_index, Tensor order, Tensor lora_a, Tensor lora_b, Tensor scale) -> (Tensor, Tensor)",
    check=_check_sampled_factor_gradients,
    fake=lambda gradient, row_starts, row_index, column_starts, column_index, order, lora_a, lora_b, scale: (
        torch.empty_like(lora_a, memory_format=torch.contiguous_format),
        torch.empty_like(lora_b, memory_format=torch.contiguous_format),
    ),
    default=reference.sampled_factor_gradients,
)
