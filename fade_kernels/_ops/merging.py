"""Effective weights, a delta's values, and the contraction of a dense weight gradient with the factors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fade_kernels import reference
from fade_kernels._ops.define import (
    check_factors,
    check_floats,
    check_mask_words,
    check_same_device,
    check_same_dtype,
    check_scale,
    check_values,
    check_weight,
    define,
    no_output,
    shape_of,
    without_autocast,
)


def _check_effective_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor) -> None:
    check_factors(lora_a, lora_b, 2)
    shape = (lora_b.shape[0], lora_a.shape[1])
    check_weight(weight, None, shape)
    check_floats(weight=weight)
    check_mask_words(mask_words, *shape)
    check_scale(scale, mask_words)
    check_same_device(weight=weight, lora_a=lora_a, lora_b=lora_b, mask=mask_words)


def _check_effective_weight_out(
    out: Tensor, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor
) -> None:
    _check_effective_weight(out if weight is None else weight, lora_a, lora_b, mask_words, scale)
    if tuple(out.shape) != (lora_b.shape[0], lora_a.shape[1]):
        raise ValueError(f"out {shape_of(out)} must have the weight's shape [{lora_b.shape[0]}, {lora_a.shape[1]}]")
    check_same_dtype(out=out, weight=weight)


def _check_layers(check: Callable[..., None], seed: int, **lists: list[Any]) -> None:
    """`check`s each layer, in words that name it; every list holds one thing a layer, the first the outputs."""
    if len({len(tensors) for tensors in lists.values()}) > 1:
        lengths = ", ".join(f"{name} {len(tensors)}" for name, tensors in lists.items())
        raise ValueError(f"every layer needs one of each, got {lengths}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    for i, layer in enumerate(zip(*lists.values(), strict=True)):
        try:
            check(*layer)
            check_same_device(out=layer[0], **{"out[0]": lists["out"][0]})
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {i}: {error}") from None


def _check_effective_weights_out(
    out: list[Tensor],
    weight: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    mask_words: list[Tensor],
    scale: list[Tensor],
    stochastic: bool,
    seed: int,
) -> None:
    lists = {"out": out, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "mask": mask_words, "scale": scale}
    _check_layers(_check_effective_weight_out, seed, **lists)


def _check_effective_weight_from_values_out(
    out: Tensor, weight: Tensor | None, values: Tensor, mask_words: Tensor, scale: Tensor
) -> None:
    check_values(values)
    if out.dim() != 2:
        raise ValueError(f"out must have two dimensions [N, K], not {shape_of(out)}")
    check_weight(weight, None, tuple(out.shape))
    check_floats(out=out)
    check_same_dtype(out=out, weight=weight)
    check_mask_words(mask_words, *out.shape)
    check_scale(scale, mask_words)
    check_same_device(out=out, weight=weight, values=values, mask=mask_words)


def _check_effective_weights_from_values_out(
    out: list[Tensor],
    weight: list[Tensor],
    values: list[Tensor],
    mask_words: list[Tensor],
    scale: list[Tensor],
    stochastic: bool,
    seed: int,
) -> None:
    lists = {"out": out, "weight": weight, "values": values, "mask": mask_words, "scale": scale}
    _check_layers(_check_effective_weight_from_values_out, seed, **lists)


def _check_masked_factor_values(lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, count: int) -> None:
    check_factors(lora_a, lora_b, 2)
    check_mask_words(mask_words, lora_b.shape[0], lora_a.shape[1])
    check_same_device(lora_a=lora_a, lora_b=lora_b, mask=mask_words)
    if count < 0:
        raise ValueError(f"count must be the number of set bits, got {count}")


def _check_masked_factor_gradients(
    weight_gradient: Tensor, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor
) -> None:
    check_factors(lora_a, lora_b, 2)
    if tuple(weight_gradient.shape) != (lora_b.shape[0], lora_a.shape[1]):
        raise ValueError(
            f"weight_gradient {shape_of(weight_gradient)} must be [{lora_b.shape[0]}, {lora_a.shape[1]}], like B A"
        )
    check_floats(weight_gradient=weight_gradient)
    check_mask_words(mask_words, *weight_gradient.shape)
    check_scale(scale, mask_words)


def _setup_effective_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, lora_a, lora_b, mask_words, scale = inputs
    ctx.save_for_backward(lora_a, lora_b, mask_words, scale)


def _backward_effective_weight(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad_a = grad_b = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        with without_autocast(grad_output):
            grad_a, grad_b = torch.ops.fade_kernels.masked_factor_gradients(grad_output, *ctx.saved_tensors)
    return grad_output if ctx.needs_input_grad[0] else None, grad_a, grad_b, None, None


def _setup_masked_factor_values(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    lora_a, lora_b, mask_words, _ = inputs
    ctx.save_for_backward(lora_a, lora_b, mask_words)


def _backward_masked_factor_values(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    lora_a, lora_b, mask_words = ctx.saved_tensors
    with without_autocast(grad_output):
        dense = grad_output.new_zeros((lora_b.shape[0], lora_a.shape[1]))
        one = torch.ones((), dtype=grad_output.dtype)
        if torch.is_grad_enabled():  # create_graph
            dense = dense.masked_scatter(reference.unpack_mask(mask_words, dense.shape[1]), grad_output)
        else:
            torch.ops.fade_kernels.scatter_masked_(dense, grad_output, mask_words)
        grads = torch.ops.fade_kernels.masked_factor_gradients(dense, lora_a, lora_b, mask_words, one)
    return *grads, None, None


masked_factor_gradients = define(
    "masked_factor_gradients(Tensor weight_gradient, Tensor lora_a, Tensor lora_b, Tensor mask_words, Tensor scale) "
    "-> (Tensor, Tensor)",
    check=_check_masked_factor_gradients,
    fake=lambda weight_gradient, lora_a, lora_b, mask_words, scale: (
        lora_a.new_empty(lora_a.shape),
        lora_b.new_empty(lora_b.shape),
    ),
    default=reference.masked_factor_gradients,
)

effective_weight = define(
    "effective_weight(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor mask_words, Tensor scale) -> Tensor",
    check=_check_effective_weight,
    fake=lambda weight, *_: weight.new_empty(weight.shape),
    default=reference.effective_weight,
    setup_context=_setup_effective_weight,
    backward=_backward_effective_weight,
)

effective_weight_out = define(
    "effective_weight_out(Tensor(a!) out, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor mask_words, "
    "Tensor scale) -> ()",
    check=_check_effective_weight_out,
    fake=no_output,
    default=reference.effective_weight_out,
)

effective_weights_out = define(
    "effective_weights_out(Tensor(a!)[] out, Tensor[] weight, Tensor[] lora_a, Tensor[] lora_b, Tensor[] mask_words, "
    "Tensor[] scale, bool stochastic, int seed) -> ()",
    check=_check_effective_weights_out,
    fake=no_output,
    default=reference.effective_weights_out,
)

effective_weight_from_values_out = define(
    "effective_weight_from_values_out(Tensor(a!) out, Tensor? weight, Tensor values, Tensor mask_words, "
    "Tensor scale) -> ()",
    check=_check_effective_weight_from_values_out,
    fake=no_output,
    default=reference.effective_weight_from_values_out,
)

effective_weights_from_values_out = define(
    "effective_weights_from_values_out(Tensor(a!)[] out, Tensor[] weight, Tensor[] values, Tensor[] mask_words, "
    "Tensor[] scale, bool stochastic, int seed) -> ()",
    check=_check_effective_weights_from_values_out,
    fake=no_output,
    default=reference.effective_weights_from_values_out,
)

masked_factor_values = define(
    "masked_factor_values(Tensor lora_a, Tensor lora_b, Tensor mask_words, int count) -> Tensor",
    check=_check_masked_factor_values,
    fake=lambda lora_a, lora_b, mask_words, count: lora_a.new_empty(
        (count,), dtype=torch.float64 if lora_a.dtype == torch.float64 else torch.float32
    ),
    default=reference.masked_factor_values,
    setup_context=_setup_masked_factor_values,
    backward=_backward_masked_factor_values,
)
