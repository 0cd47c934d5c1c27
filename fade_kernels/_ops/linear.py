"""Masked LoRA and masked values of a linear layer: forward, input gradient, gradients of the adapter."""

from typing import Any

from torch import Tensor

from fade_kernels import reference
from fade_kernels._ops.define import (
    below,
    check_factors,
    check_mask_words,
    check_one_product,
    check_rows,
    check_same_device,
    check_same_dtype,
    check_scale,
    check_values,
    check_weight,
    define,
    shape_of,
    without_autocast,
)

# --- masked LoRA -----------------------------------------------------------------------------------------------------


def _check_masked_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> None:
    check_factors(lora_a, lora_b, 2)
    rows, columns = lora_b.shape[0], lora_a.shape[1]
    check_rows("x", x, columns)
    check_weight(weight, bias, (rows, columns))
    check_same_dtype(x=x, weight=weight, bias=bias)
    check_mask_words(mask_words, rows, columns)
    check_scale(scale, mask_words)
    check_one_product(x, (rows, columns), seed, rounded)
    check_same_device(x=x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, mask=mask_words)


def _check_masked_lora_linear_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> None:
    check_factors(lora_a, lora_b, 2)
    rows, columns = lora_b.shape[0], lora_a.shape[1]
    check_rows("grad_output", grad_output, rows)
    check_weight(weight, None, (rows, columns))
    check_same_dtype(grad_output=grad_output, weight=weight)
    check_mask_words(mask_words, rows, columns)
    check_scale(scale, mask_words)
    check_one_product(grad_output, (rows, columns), seed, rounded)


def _check_alike(grad_output: Tensor, x: Tensor) -> None:
    if grad_output.shape[:-1] != x.shape[:-1]:
        shapes = f"grad_output {shape_of(grad_output)} and x {shape_of(x)}"
        raise ValueError(f"{shapes} must have the same leading dimensions")
    check_same_dtype(grad_output=grad_output, x=x)


def _check_masked_lora_linear_factor_gradients(
    grad_output: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
) -> None:
    check_factors(lora_a, lora_b, 2)
    check_rows("grad_output", grad_output, lora_b.shape[0])
    check_rows("x", x, lora_a.shape[1])
    _check_alike(grad_output, x)
    check_mask_words(mask_words, lora_b.shape[0], lora_a.shape[1])
    check_scale(scale, mask_words)


def _check_masked_lora_linear_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
    need_input: bool,
    need_factors: bool,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> None:
    delta = (lora_a, lora_b, mask_words, scale, regime)
    _check_masked_lora_linear_input_gradient(grad_output, weight, *delta, seed, rounded)
    _check_masked_lora_linear_factor_gradients(grad_output, x, *delta)


def masked_lora_linear_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
    need_input: bool,
    need_factors: bool,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The two operators in turn, for devices that have no kernel for both."""
    delta = (lora_a, lora_b, mask_words, scale, regime)
    if need_input:
        grad_x = below.masked_lora_linear_input_gradient(grad_output, weight, *delta, seed, rounded)
    else:
        grad_x = grad_output.new_empty(0)
    if need_factors:
        return grad_x, *below.masked_lora_linear_factor_gradients(grad_output, x, *delta)
    return grad_x, lora_a.new_empty(0), lora_b.new_empty(0)


def _setup_masked_lora_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, lora_a, lora_b, mask_words, scale, ctx.regime, ctx.seed, rounded = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, mask_words, scale, rounded)


def _backward_frozen_linear(ctx: Any, grad_output: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias (arguments 1 and 2), for callers that did not freeze them."""
    grad_weight = reference.as_rows(grad_output).t() @ reference.as_rows(x) if ctx.needs_input_grad[1] else None
    grad_bias = reference.as_rows(grad_output).sum(dim=0) if ctx.needs_input_grad[2] else None
    return grad_weight, grad_bias


def _backward_masked_lora_linear(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b, mask_words, scale, rounded = ctx.saved_tensors
    delta = (lora_a, lora_b, mask_words, scale, ctx.regime)
    need_input, need_factors = ctx.needs_input_grad[0], ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    grad_x = grad_a = grad_b = None
    with without_autocast(grad_output):
        if need_input or need_factors:
            grad_x, grad_a, grad_b = below.masked_lora_linear_backward(
                grad_output, x, weight, *delta, need_input, need_factors, ctx.seed, rounded
            )
        grad_weight, grad_bias = _backward_frozen_linear(ctx, grad_output, x)
    factors = (grad_a, grad_b) if need_factors else (None, None)
    return grad_x if need_input else None, grad_weight, grad_bias, *factors, None, None, None, None, None


define(
    "masked_lora_linear_input_gradient(Tensor grad_output, Tensor? weight, Tensor lora_a, Tensor lora_b, "
    "Tensor mask_words, Tensor scale, int regime, SymInt? seed=None, Tensor? rounded=None) -> Tensor",
    check=_check_masked_lora_linear_input_gradient,
    fake=lambda grad_output, weight, lora_a, *_: grad_output.new_empty((*grad_output.shape[:-1], lora_a.shape[1])),
    default=reference.masked_lora_linear_input_gradient,
)

define(
    "masked_lora_linear_factor_gradients(Tensor grad_output, Tensor x, Tensor lora_a, Tensor lora_b, "
    "Tensor mask_words, Tensor scale, int regime) -> (Tensor, Tensor)",
    check=_check_masked_lora_linear_factor_gradients,
    fake=lambda grad_output, x, lora_a, lora_b, *_: (
        lora_a.new_empty(lora_a.shape),
        lora_b.new_empty(lora_b.shape),
    ),
    default=reference.masked_lora_linear_factor_gradients,
)

# One call for all gradients: the mask is decoded and dY read once. What is not needed comes back empty, [0].
define(
    "masked_lora_linear_backward(Tensor grad_output, Tensor x, Tensor? weight, Tensor lora_a, Tensor lora_b, "
    "Tensor mask_words, Tensor scale, int regime, bool need_input, bool need_factors, SymInt? seed=None, "
    "Tensor? rounded=None) -> (Tensor, Tensor, Tensor)",
    check=_check_masked_lora_linear_backward,
    fake=lambda grad_output, x, weight, lora_a, lora_b, words, scale, regime, need_input, need_factors, *_: (
        grad_output.new_empty(x.shape if need_input else 0),
        lora_a.new_empty(lora_a.shape if need_factors else 0),
        lora_b.new_empty(lora_b.shape if need_factors else 0),
    ),
    default=masked_lora_linear_backward,
)

masked_lora_linear = define(
    "masked_lora_linear(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor mask_words, "
    "Tensor scale, int regime, SymInt? seed=None, Tensor? rounded=None) -> Tensor",
    check=_check_masked_lora_linear,
    fake=lambda x, weight, bias, lora_a, lora_b, *_: x.new_empty((*x.shape[:-1], lora_b.shape[0])),
    default=reference.masked_lora_linear,
    setup_context=_setup_masked_lora_linear,
    backward=_backward_masked_lora_linear,
)


# --- masked values ---------------------------------------------------------------------------------------------------


def _check_masked_values_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> None:
    check_values(values)
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension [..., K]")
    shape = (mask_words.shape[0], x.shape[-1])
    check_rows("x", x, shape[1])
    check_weight(weight, bias, shape)
    check_same_dtype(x=x, weight=weight, bias=bias)
    check_mask_words(mask_words, *shape)
    check_scale(scale, mask_words)
    check_one_product(x, shape, seed, rounded)
    check_same_device(x=x, weight=weight, bias=bias, values=values, mask=mask_words)


def _check_masked_values_linear_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    in_features: int,
    regime: int,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> None:
    check_values(values)
    check_rows("grad_output", grad_output, mask_words.shape[0])
    check_weight(weight, None, (mask_words.shape[0], in_features))
    check_same_dtype(grad_output=grad_output, weight=weight)
    check_mask_words(mask_words, columns=in_features)
    check_scale(scale, mask_words)
    check_one_product(grad_output, (mask_words.shape[0], in_features), seed, rounded)


def _check_masked_values_linear_gradient(
    grad_output: Tensor, x: Tensor, values: Tensor, mask_words: Tensor, scale: Tensor, regime: int
) -> None:
    check_values(values)
    check_rows("grad_output", grad_output, mask_words.shape[0])
    _check_alike(grad_output, x)
    check_mask_words(mask_words, columns=x.shape[-1])
    check_scale(scale, mask_words)


def _check_masked_values_linear_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
    need_input: bool,
    need_values: bool,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> None:
    delta = (values, mask_words, scale)
    _check_masked_values_linear_input_gradient(grad_output, weight, *delta, x.shape[-1], regime, seed, rounded)
    _check_masked_values_linear_gradient(grad_output, x, *delta, regime)


def masked_values_linear_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
    need_input: bool,
    need_values: bool,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The two operators in turn, for devices that have no kernel for both."""
    delta = (values, mask_words, scale)
    if need_input:
        columns = x.shape[-1]
        grad_x = below.masked_values_linear_input_gradient(grad_output, weight, *delta, columns, regime, seed, rounded)
    else:
        grad_x = grad_output.new_empty(0)
    if need_values:
        return grad_x, below.masked_values_linear_gradient(grad_output, x, *delta, regime)
    return grad_x, values.new_empty(0)


def _setup_masked_values_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, values, mask_words, scale, ctx.regime, ctx.seed, rounded = inputs
    ctx.save_for_backward(x, weight, values, mask_words, scale, rounded)


def _backward_masked_values_linear(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, values, mask_words, scale, rounded = ctx.saved_tensors
    need_input, need_values = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    grad_x = grad_values = None
    with without_autocast(grad_output):
        if need_input or need_values:
            grad_x, grad_values = below.masked_values_linear_backward(
                *(grad_output, x, weight, values, mask_words, scale, ctx.regime),
                *(need_input, need_values, ctx.seed, rounded),
            )
        grad_weight, grad_bias = _backward_frozen_linear(ctx, grad_output, x)
    grads = (grad_x if need_input else None, grad_weight, grad_bias, grad_values if need_values else None)
    return *grads, None, None, None, None, None


define(
    "masked_values_linear_input_gradient(Tensor grad_output, Tensor? weight, Tensor values, Tensor mask_words, "
    "Tensor scale, int in_features, int regime, SymInt? seed=None, Tensor? rounded=None) -> Tensor",
    check=_check_masked_values_linear_input_gradient,
    fake=lambda grad_output, weight, values, mask_words, scale, in_features, *_: grad_output.new_empty(
        (*grad_output.shape[:-1], in_features)
    ),
    default=reference.masked_values_linear_input_gradient,
)

define(
    "masked_values_linear_gradient(Tensor grad_output, Tensor x, Tensor values, Tensor mask_words, Tensor scale, "
    "int regime) -> Tensor",
    check=_check_masked_values_linear_gradient,
    fake=lambda grad_output, x, values, *_: values.new_empty(values.shape),
    default=reference.masked_values_linear_gradient,
)

define(
    "masked_values_linear_backward(Tensor grad_output, Tensor x, Tensor? weight, Tensor values, Tensor mask_words, "
    "Tensor scale, int regime, bool need_input, bool need_values, SymInt? seed=None, Tensor? rounded=None) "
    "-> (Tensor, Tensor)",
    check=_check_masked_values_linear_backward,
    fake=lambda grad_output, x, weight, values, words, scale, regime, need_input, need_values, *_: (
        grad_output.new_empty(x.shape if need_input else 0),
        values.new_empty(values.shape if need_values else 0),
    ),
    default=masked_values_linear_backward,
)

masked_values_linear = define(
    "masked_values_linear(Tensor x, Tensor? weight, Tensor? bias, Tensor values, Tensor mask_words, Tensor scale, "
    "int regime, SymInt? seed=None, Tensor? rounded=None) -> Tensor",
    check=_check_masked_values_linear,
    fake=lambda x, weight, bias, values, mask_words, *_: x.new_empty((*x.shape[:-1], mask_words.shape[0])),
    default=reference.masked_values_linear,
    setup_context=_setup_masked_values_linear,
    backward=_backward_masked_values_linear,
)
