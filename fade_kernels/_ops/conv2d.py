"""Masked LoRA and masked values of a convolution: forward, input gradient, gradients of the adapter."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fade_kernels import reference
from fade_kernels._ops.define import (
    below,
    check_factors,
    check_floats,
    check_images,
    check_mask_words,
    check_one_product,
    check_same_device,
    check_same_dtype,
    check_scale,
    check_values,
    check_weight,
    define,
    flat_columns,
    shape_of,
    without_autocast,
)
from fade_kernels.window import Window


def _check_window(x_size: Sequence[int], kernel_size: Sequence[int], window: Window) -> None:
    for name, pair in (("kernel_size", kernel_size), *window._asdict().items()):
        if len(pair) != 2 or min(pair) < (0 if name == "padding" else 1):
            raise ValueError(f"{name} must be two positive integers (height, width), not {list(pair)}")
    if min(window.output_size(x_size[2:], kernel_size)) < 1:
        raise ValueError(f"an image of {x_size[2]} x {x_size[3]} is smaller than the kernel {list(kernel_size)}")


def _check_masked_lora_conv2d(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    window: Window,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> None:
    check_factors(lora_a, lora_b, 4)
    check_images("x", x, lora_a.shape[1])
    check_weight(weight, bias, (lora_b.shape[0], *lora_a.shape[1:]))
    check_same_dtype(x=x, weight=weight, bias=bias)
    check_mask_words(mask_words, lora_b.shape[0], flat_columns(lora_a.shape))
    check_scale(scale, mask_words)
    check_one_product(x, (lora_b.shape[0], *lora_a.shape[1:]), seed, rounded)
    _check_window(x.shape, lora_a.shape[2:], window)
    check_same_device(x=x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, mask=mask_words)


def _check_masked_lora_conv2d_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    input_size: list[int],
    window: Window,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> None:
    check_factors(lora_a, lora_b, 4)
    check_images("grad_output", grad_output, lora_b.shape[0])
    check_weight(weight, None, (lora_b.shape[0], *lora_a.shape[1:]))
    check_same_dtype(grad_output=grad_output, weight=weight)
    check_mask_words(mask_words, lora_b.shape[0], flat_columns(lora_a.shape))
    check_scale(scale, mask_words)
    check_one_product(grad_output, (lora_b.shape[0], *lora_a.shape[1:]), seed, rounded)
    _check_window(tuple(input_size), lora_a.shape[2:], window)


def _check_masked_lora_conv2d_factor_gradients(
    grad_output: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    window: Window,
) -> None:
    check_factors(lora_a, lora_b, 4)
    check_images("x", x, lora_a.shape[1])
    check_images("grad_output", grad_output, lora_b.shape[0])
    check_same_dtype(grad_output=grad_output, x=x)
    check_mask_words(mask_words, lora_b.shape[0], flat_columns(lora_a.shape))
    check_scale(scale, mask_words)
    _check_window(x.shape, lora_a.shape[2:], window)


def _check_masked_values_conv2d(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    kernel_size: list[int],
    window: Window,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> None:
    check_values(values)
    if x.dim() != 4:
        raise ValueError(f"x {shape_of(x)} must be [n, C_in, height, width]")
    check_floats(x=x)
    _check_window(x.shape, tuple(kernel_size), window)
    shape = (mask_words.shape[0], x.shape[1], *kernel_size)
    check_weight(weight, bias, shape)
    check_same_dtype(x=x, weight=weight, bias=bias)
    check_mask_words(mask_words, shape[0], flat_columns(shape))
    check_scale(scale, mask_words)
    check_one_product(x, shape, seed, rounded)
    check_same_device(x=x, weight=weight, bias=bias, values=values, mask=mask_words)


def _check_masked_values_conv2d_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    window: Window,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> None:
    check_values(values)
    check_images("grad_output", grad_output, mask_words.shape[0])
    _check_window(tuple(input_size), tuple(kernel_size), window)
    shape = (mask_words.shape[0], input_size[1], *kernel_size)
    check_weight(weight, None, shape)
    check_same_dtype(grad_output=grad_output, weight=weight)
    check_mask_words(mask_words, shape[0], flat_columns(shape))
    check_scale(scale, mask_words)
    check_one_product(grad_output, shape, seed, rounded)


def _check_masked_values_conv2d_gradient(
    grad_output: Tensor,
    x: Tensor,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    kernel_size: list[int],
    window: Window,
) -> None:
    _check_masked_values_conv2d(x, None, None, values, mask_words, scale, kernel_size, window)
    check_images("grad_output", grad_output, mask_words.shape[0])
    check_same_dtype(grad_output=grad_output, x=x)


def _setup_masked_lora_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, lora_a, lora_b, mask_words, scale, ctx.window, ctx.seed, rounded = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, mask_words, scale, rounded)


def _setup_masked_values_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, values, mask_words, scale, ctx.kernel_size, ctx.window, ctx.seed, rounded = inputs
    ctx.save_for_backward(x, weight, values, mask_words, scale, rounded)


def _backward_frozen_conv2d(
    ctx: Any, grad_output: Tensor, x: Tensor, weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias (arguments 1 and 2), for callers that did not freeze them."""
    grad_weight = None
    if ctx.needs_input_grad[1]:
        grad_weight = torch.nn.grad.conv2d_weight(x, weight.shape, grad_output, *ctx.window)
    return grad_weight, grad_output.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[2] else None


def _backward_masked_lora_conv2d(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b, mask_words, scale, rounded = ctx.saved_tensors
    delta = (lora_a, lora_b, mask_words, scale)
    grad_x = grad_a = grad_b = None
    with without_autocast(grad_output):
        if ctx.needs_input_grad[0]:
            grad_x = below.masked_lora_conv2d_input_gradient(
                grad_output, weight, *delta, x.shape, *ctx.window, ctx.seed, rounded
            )
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            grad_a, grad_b = below.masked_lora_conv2d_factor_gradients(grad_output, x, *delta, *ctx.window)
        grad_weight, grad_bias = _backward_frozen_conv2d(ctx, grad_output, x, weight)
    return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None, None, None, None, None, None


def _backward_masked_values_conv2d(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, values, mask_words, scale, rounded = ctx.saved_tensors
    delta = (values, mask_words, scale)
    grad_x = grad_values = None
    with without_autocast(grad_output):
        if ctx.needs_input_grad[0]:
            grad_x = below.masked_values_conv2d_input_gradient(
                grad_output, weight, *delta, x.shape, ctx.kernel_size, *ctx.window, ctx.seed, rounded
            )
        if ctx.needs_input_grad[3]:
            grad_values = below.masked_values_conv2d_gradient(grad_output, x, *delta, ctx.kernel_size, *ctx.window)
        grad_weight, grad_bias = _backward_frozen_conv2d(ctx, grad_output, x, weight)
    return grad_x, grad_weight, grad_bias, grad_values, None, None, None, None, None, None, None, None


def _new_images(like: Tensor, size: Sequence[int]) -> Tensor:
    """Empty images in the memory layout of `like`."""
    layout = reference.image_layout(like)
    return torch.empty(tuple(size), dtype=like.dtype, device=like.device, memory_format=layout)


define(
    "masked_lora_conv2d_input_gradient(Tensor grad_output, Tensor? weight, Tensor lora_a, Tensor lora_b, "
    "Tensor mask_words, Tensor scale, SymInt[] input_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt? seed=None, Tensor? rounded=None) -> Tensor",
    check=_check_masked_lora_conv2d_input_gradient,
    fake=lambda grad_output, weight, lora_a, lora_b, words, scale, input_size, *_: _new_images(grad_output, input_size),
    default=reference.masked_lora_conv2d_input_gradient,
)

define(
    "masked_lora_conv2d_factor_gradients(Tensor grad_output, Tensor x, Tensor lora_a, Tensor lora_b, "
    "Tensor mask_words, Tensor scale, SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> (Tensor, Tensor)",
    check=_check_masked_lora_conv2d_factor_gradients,
    fake=lambda grad_output, x, lora_a, lora_b, *_: (
        lora_a.new_empty(lora_a.shape),
        lora_b.new_empty(lora_b.shape),
    ),
    default=reference.masked_lora_conv2d_factor_gradients,
)

masked_lora_conv2d = define(
    "masked_lora_conv2d(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor mask_words, "
    "Tensor scale, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt? seed=None, "
    "Tensor? rounded=None) -> Tensor",
    check=_check_masked_lora_conv2d,
    fake=lambda x, weight, bias, lora_a, lora_b, mask_words, scale, window, *_: _new_images(
        x, (x.shape[0], lora_b.shape[0], *window.output_size(x.shape[2:], lora_a.shape[2:]))
    ),
    default=reference.masked_lora_conv2d,
    setup_context=_setup_masked_lora_conv2d,
    backward=_backward_masked_lora_conv2d,
)

define(
    "masked_values_conv2d_input_gradient(Tensor grad_output, Tensor? weight, Tensor values, Tensor mask_words, "
    "Tensor scale, SymInt[] input_size, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt? seed=None, Tensor? rounded=None) -> Tensor",
    check=_check_masked_values_conv2d_input_gradient,
    fake=lambda grad_output, weight, values, words, scale, input_size, *_: _new_images(grad_output, input_size),
    default=reference.masked_values_conv2d_input_gradient,
)

define(
    "masked_values_conv2d_gradient(Tensor grad_output, Tensor x, Tensor values, Tensor mask_words, Tensor scale, "
    "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> Tensor",
    check=_check_masked_values_conv2d_gradient,
    fake=lambda grad_output, x, values, *_: values.new_empty(values.shape),
    default=reference.masked_values_conv2d_gradient,
)

masked_values_conv2d = define(
    "masked_values_conv2d(Tensor x, Tensor? weight, Tensor? bias, Tensor values, Tensor mask_words, Tensor scale, "
    "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt? seed=None, "
    "Tensor? rounded=None) -> Tensor",
    check=_check_masked_values_conv2d,
    fake=lambda x, weight, bias, values, mask_words, scale, kernel_size, window, *_: _new_images(
        x, (x.shape[0], mask_words.shape[0], *window.output_size(x.shape[2:], kernel_size))
    ),
    default=reference.masked_values_conv2d,
    setup_context=_setup_masked_values_conv2d,
    backward=_backward_masked_values_conv2d,
)
