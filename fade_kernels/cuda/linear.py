"""Masked LoRA and masked values of a linear layer on a CUDA device, by the path that `choices.py` takes.

What a call needs beside its tensors (the path, a launch, the mask's positions) is found once for each mask and each
kind of arguments, and kept with the mask as a function of the tensors: a step looks up, and launches.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fade_kernels import choices, reference
from fade_kernels.cuda.merging import lora_weight, on, values_weight
from fade_kernels.cuda.precision import precision, tf32
from fade_kernels.cuda.products import wide_linear, wide_product
from fade_kernels.mask_facts import capturing, facts_for_choice, kept_with, mask_facts, mask_positions
from fade_kernels.masked_lora import REGIMES

_FORCED_PATHS = {REGIMES["gather"]: "gather", REGIMES["tile"]: "fused", REGIMES["whole"]: "two products"}

Delta = tuple[Tensor, ...]
"""The tensors that make a delta: the factors [r, K] and [N, r], or the values [nnz]."""

Product = Callable[[Tensor, Tensor | None, Tensor | None, Delta, Tensor, Tensor, int | None], Tensor]
"""Forward or input gradient: of rows [T, *], weight, bias, delta, mask words, scale and seed; [T, *]."""

Gradients = Callable[[Tensor, Tensor, Delta, Tensor, Tensor], Delta]
"""Of dY [T, N], x [T, K], delta, mask words and scale: the gradients of the delta's tensors."""

_MOST_KINDS = 64
"""Kinds of arguments that are remembered with a mask, each way; with texts of any length they are found anew now and
then."""


def _remembered(mask_words: Tensor, way: str, key: Hashable, find: Callable[[], Any]) -> Any:
    """What `find` returns, kept with the mask; while a graph is captured nothing new is kept: little is known then."""
    known = kept_with(mask_words)
    calls = known.get(way)
    if calls is None:
        calls = known[way] = {}
    found = calls.get(key)
    if found is None:
        found = find()
        if not capturing(mask_words):
            if len(calls) >= _MOST_KINDS:
                calls.clear()
            calls[key] = found
    return found


def _kind(rows: Tensor, weight: Tensor | None, delta: Delta, scale: Tensor, *more: Any) -> Hashable:
    """All that a path and its launch depend on, beside the mask."""
    return (
        *(rows.shape, rows.stride(), rows.dtype, tf32(rows), None if weight is None else weight.stride()),
        *[part for tensor in delta for part in (tensor.shape, tensor.stride(), tensor.dtype)],
        *(scale.is_cuda, scale.dtype, *more),
    )


# --- the two forms of a delta ----------------------------------------------------------------------------------------


def _rank(delta: Delta) -> int | None:
    """Of the factors; None where the delta is given by its values."""
    return delta[0].shape[0] if len(delta) == 2 else None


def _merger(
    dtype: torch.dtype, weight: Tensor | None, delta: Delta, mask_words: Tensor, scale: Tensor, columns: int,
    seed: int | None,
) -> Callable[..., Tensor]:  # fmt: skip
    """What makes W + Delta, or Delta alone, in a dtype: of weight, delta, mask words, scale and seed."""
    if len(delta) == 1:
        return lambda weight, delta, words, scale, seed: values_weight(
            dtype, weight, *delta, words, scale, columns, seed
        )
    from fade_kernels.triton_kernels import effective_weight as merging

    ready = merging.ready(weight, *delta, mask_words, scale, dtype, seed is not None)
    if ready is None:
        return lambda weight, delta, *rest: lora_weight(dtype, weight, *delta, *rest)
    return lambda weight, delta, words, scale, seed: ready(weight, *delta, words, scale, seed or 0)


def _alike(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors in one dtype; factors of two dtypes become fp32."""
    return (lora_a, lora_b) if lora_a.dtype == lora_b.dtype else (lora_a.float(), lora_b.float())


def _add_gathered(sums: Tensor, rows: Tensor, delta: Delta, positions: Any, by_column: bool, scale: Tensor) -> Tensor:
    """Adds the delta's term to fp32 sums at the mask's positions, by row or by column, and rounds."""
    ops, segments = torch.ops.fade_kernels, positions.by_column if by_column else positions.by_row
    with torch._C._AutoDispatchBelowADInplaceOrView():  # nobody else has seen the sums
        if len(delta) == 2:
            ops.add_gathered_lora_.default(sums, rows, *_alike(*delta), *segments, by_column, scale.float())
        else:
            order = positions.order if by_column else None
            ops.add_gathered_values_.default(
                sums, rows, *delta, order, segments.starts, segments.index, scale.float()
            )  # fmt: skip
    return sums.to(rows.dtype)


# --- forward and input gradient --------------------------------------------------------------------------------------


def _path(like: Tensor, mask_words: Tensor, columns: int, regime: int, seed: int | None, rank: int | None) -> str:
    """The path of a call on rows `like` [T, *]; rank: of the factors, None where the delta is given by its values."""
    if seed is not None and like.dtype.itemsize == 2:
        return "one product"
    if regime in _FORCED_PATHS:
        path = _FORCED_PATHS[regime]
    else:
        facts = facts_for_choice(mask_words, columns)
        path = choices.choose_linear(like.dtype, like.shape[0], mask_words.shape[0], columns, facts, tf32(like))
    if path != "fused":
        return path
    from fade_kernels.triton_kernels.masked_lora_launch import MAX_RANK

    return "fused" if rank is not None and rank <= MAX_RANK else "two products"


def _linear(rows: Tensor, weight: Tensor | None, bias: Tensor | None, features: int) -> Tensor:
    """x W^T + bias of the library; without a weight the bias, or zeros."""
    if weight is None:
        return rows.new_zeros((rows.shape[0], features)) if bias is None else bias.repeat(rows.shape[0], 1)
    return F.linear(rows, weight, bias)


def _forward(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, delta: Delta, mask_words: Tensor, scale: Tensor,
    columns: int, regime: int, seed: int | None,
) -> Product:  # fmt: skip
    """How calls like this one are computed; the choice: `choose_linear`."""
    features = mask_words.shape[0]
    path = _path(rows, mask_words, columns, regime, seed, _rank(delta))
    if path == "fused":
        from fade_kernels.triton_kernels import masked_lora_forward as kernel

        form = choices.mask_form(mask_facts(mask_words, columns))
        ready = kernel.KERNEL.ready(rows, weight, bias, *delta, mask_words, scale, precision(rows), form)
        call = ready or partial(kernel.masked_lora_forward, input_precision=precision(rows), form=form)
        return lambda x, weight, bias, delta, words, scale, seed: call(x, weight, bias, *delta, words, scale)
    if path == "frozen":
        return lambda x, weight, bias, *_: _linear(x, weight, bias, features)
    if path == "gather":
        positions = mask_positions(mask_words, columns)

        def gathered(x: Tensor, weight: Any, bias: Any, delta: Delta, words: Tensor, scale: Tensor, _: Any) -> Tensor:
            return _add_gathered(wide_linear(x, weight, bias, features), x, delta, positions, False, scale)

        return gathered
    if path == "two products":
        alone = _merger(rows.dtype, None, delta, mask_words, scale, columns, None)

        def twice(x: Tensor, weight: Any, bias: Any, delta: Delta, words: Tensor, scale: Tensor, _: Any) -> Tensor:
            sums = wide_linear(x, weight, bias, features)
            return sums.add_(wide_product(x, alone(None, delta, words, scale, None).t())).to(x.dtype)

        return twice
    merged = _merger(rows.dtype, weight, delta, mask_words, scale, columns, seed)
    return lambda x, weight, bias, *rest: F.linear(x, merged(weight, *rest), bias)


def _input_gradient(
    rows: Tensor, weight: Tensor | None, delta: Delta, mask_words: Tensor, scale: Tensor, columns: int, regime: int,
    seed: int | None,
) -> Product:  # fmt: skip
    """The same of dX; products have no bias."""
    path = _path(rows, mask_words, columns, regime, seed, _rank(delta))
    if path == "fused":
        from fade_kernels.triton_kernels import masked_lora_input_gradient as kernel

        form = choices.mask_form(mask_facts(mask_words, columns))
        ready = kernel.KERNEL.ready(rows, weight, None, *delta, mask_words, scale, precision(rows), form)
        if ready is not None:
            return lambda dy, weight, _, delta, words, scale, seed: ready(dy, weight, None, *delta, words, scale)
        call = partial(kernel.masked_lora_input_gradient, input_precision=precision(rows), form=form)
        return lambda dy, weight, _, delta, words, scale, seed: call(dy, weight, *delta, words, scale)
    if path == "frozen":
        return lambda dy, weight, *_: dy.new_zeros((dy.shape[0], columns)) if weight is None else dy @ weight

    def wide(dy: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return dy.new_zeros((dy.shape[0], columns), dtype=torch.float32)
        return wide_product(dy, weight)

    if path == "gather":
        positions = mask_positions(mask_words, columns)
        return lambda dy, weight, _, delta, words, scale, seed: _add_gathered(
            wide(dy, weight), dy, delta, positions, True, scale
        )
    if path == "two products":
        alone = _merger(rows.dtype, None, delta, mask_words, scale, columns, None)
        return lambda dy, weight, _, delta, words, scale, seed: (
            wide(dy, weight).add_(wide_product(dy, alone(None, delta, words, scale, None))).to(dy.dtype)
        )
    merged = _merger(rows.dtype, weight, delta, mask_words, scale, columns, seed)
    return lambda dy, weight, _, *rest: dy @ merged(weight, *rest)


def _run_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, delta: Delta, mask_words: Tensor, scale: Tensor,
    columns: int, regime: int, seed: int | None, rounded: Tensor | None,
) -> Tensor:  # fmt: skip
    rows = reference.as_rows(x)
    if rounded is not None:
        return reference.from_rows(F.linear(rows, rounded, bias), x)
    kind = _kind(rows, weight, delta, scale, None if bias is None else bias.stride(), regime, seed is None)
    find = partial(_forward, rows, weight, bias, delta, mask_words, scale, columns, regime, seed)
    run = _remembered(mask_words, "forward", kind, find)
    return reference.from_rows(run(rows, weight, bias, delta, mask_words, scale, seed), x)


def _run_input_gradient(
    grad_output: Tensor, weight: Tensor | None, delta: Delta, mask_words: Tensor, scale: Tensor, columns: int,
    regime: int, seed: int | None, rounded: Tensor | None,
) -> Tensor:  # fmt: skip
    dy = reference.as_rows(grad_output)
    if rounded is not None:
        return reference.from_rows(dy @ rounded, grad_output)
    kind = _kind(dy, weight, delta, scale, regime, seed is None)
    find = partial(_input_gradient, dy, weight, delta, mask_words, scale, columns, regime, seed)
    run = _remembered(mask_words, "input gradient", kind, find)
    return reference.from_rows(run(dy, weight, None, delta, mask_words, scale, seed), grad_output)


# --- gradients of the delta ------------------------------------------------------------------------------------------


def _factor_gradients(dy: Tensor, x: Tensor, delta: Delta, mask_words: Tensor, scale: Tensor, regime: int) -> Gradients:
    """dA, dB without a weight gradient in memory; the choice: `choose_factor_gradients`."""
    from fade_kernels.triton_kernels import masked_lora_factor_gradients as kernel

    columns = x.shape[1]
    path = {REGIMES["gather"]: "gather", REGIMES["tile"]: "tile", REGIMES["whole"]: "tile"}.get(regime)
    if path is None:
        facts = facts_for_choice(mask_words, columns)
        path = choices.choose_factor_gradients(x.dtype, x.shape[0], dy.shape[1], columns, facts)
    if path == "zero" or x.shape[0] == 0:
        return lambda dy, x, delta, *_: tuple(factor.new_zeros(factor.shape) for factor in delta)
    if path == "gather":
        by_row, by_column, order = mask_positions(mask_words, columns)
        walked = (by_row.starts, by_row.index, by_column.starts, by_column.index, order)

        def sampled(dy: Tensor, x: Tensor, delta: Delta, _: Tensor, scale: Tensor) -> Delta:
            ops = torch.ops.fade_kernels
            gradient = ops.sampled_gradient.default(dy, x, *by_row)
            grads = ops.sampled_factor_gradients.default(gradient, *walked, *_alike(*delta), scale.float())
            return tuple(grad.to(factor.dtype) for grad, factor in zip(grads, delta, strict=True))

        return sampled
    if path == "library":
        return _contracted
    form = choices.mask_form(mask_facts(mask_words, columns))
    plan = kernel.ready(dy, x, *delta, mask_words, scale, precision(x), form)
    call = plan or partial(kernel.masked_lora_factor_gradients, input_precision=precision(x), form=form)
    return lambda dy, x, delta, words, scale: call(dy, x, *delta, words, scale)


def _contracted(dy: Tensor, x: Tensor, delta: Delta, mask_words: Tensor, scale: Tensor) -> Delta:
    """dA, dB from the library's dY^T X."""
    from fade_kernels.triton_kernels.masked_gradient_contraction import contract_masked_gradient

    return contract_masked_gradient(dy.t() @ x, *delta, mask_words, scale)


def _values_gradient(dy: Tensor, x: Tensor, delta: Delta, mask_words: Tensor, scale: Tensor, regime: int) -> Gradients:
    """dV, the weight gradient at the mask's positions: sampled where few, read out of a library product where many."""
    columns, (values,) = x.shape[1], delta
    sampled, count = regime == REGIMES["gather"], values.numel()
    if regime == REGIMES["auto"]:
        facts = facts_for_choice(mask_words, columns)
        sampled = choices.choose_factor_gradients(x.dtype, x.shape[0], dy.shape[1], columns, facts) == "gather"
    by_row = mask_positions(mask_words, columns).by_row if sampled else None

    def run(dy: Tensor, x: Tensor, delta: Delta, mask_words: Tensor, scale: Tensor) -> Delta:
        ops = torch.ops.fade_kernels
        if by_row is not None:
            gathered = ops.sampled_gradient.default(dy, x, *by_row)
        else:
            gathered = ops.gather_masked.default(dy.t() @ x, mask_words, count).float()
        return ((on(scale, gathered) * gathered).to(delta[0].dtype),)

    return run


def _run_gradients(
    grad_output: Tensor, x: Tensor, delta: Delta, mask_words: Tensor, scale: Tensor, regime: int
) -> Delta:
    dy, rows = reference.as_rows(grad_output), reference.as_rows(x)
    kind = _kind(dy, None, delta, scale, rows.shape[1], rows.stride(), regime)
    choose = _factor_gradients if len(delta) == 2 else _values_gradient
    find = partial(choose, dy, rows, delta, mask_words, scale, regime)
    return _remembered(mask_words, "gradients", kind, find)(dy, rows, delta, mask_words, scale)


def _run_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor | None, delta: Delta, mask_words: Tensor, scale: Tensor,
    regime: int, need_input: bool, need_delta: bool, seed: int | None, rounded: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dX and the delta's gradients; what is not needed is empty, [0]. Where both are, they are looked up together."""
    dy, rows, columns = reference.as_rows(grad_output), reference.as_rows(x), x.shape[-1]
    if not (need_input and need_delta) or rounded is not None:
        grad_x = grad_output.new_empty(0)
        if need_input:
            grad_x = _run_input_gradient(
                grad_output, weight, delta, mask_words, scale, columns, regime, seed, rounded
            )  # fmt: skip
        if need_delta:
            return grad_x, *_run_gradients(grad_output, x, delta, mask_words, scale, regime)
        return grad_x, *(tensor.new_empty(0) for tensor in delta)

    def find() -> tuple[Product, Gradients]:
        choose = _factor_gradients if len(delta) == 2 else _values_gradient
        return (
            _input_gradient(dy, weight, delta, mask_words, scale, columns, regime, seed),
            choose(dy, rows, delta, mask_words, scale, regime),
        )

    kind = _kind(dy, weight, delta, scale, rows.stride(), regime, seed is None)
    for_input, for_delta = _remembered(mask_words, "backward", kind, find)
    grad_x = for_input(dy, weight, None, delta, mask_words, scale, seed)
    return reference.from_rows(grad_x, grad_output), *for_delta(dy, rows, delta, mask_words, scale)


# --- the operators ---------------------------------------------------------------------------------------------------


def masked_lora_linear(
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
) -> Tensor:
    """Forward of x [..., K]."""
    return _run_forward(
        x, weight, bias, (lora_a, lora_b), mask_words, scale, lora_a.shape[1], regime, seed, rounded
    )  # fmt: skip


def masked_lora_linear_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    """dX of dY [..., N]."""
    delta, columns = (lora_a, lora_b), lora_a.shape[1]
    return _run_input_gradient(grad_output, weight, delta, mask_words, scale, columns, regime, seed, rounded)


def masked_lora_linear_factor_gradients(
    grad_output: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
) -> tuple[Tensor, Tensor]:
    """dA and dB."""
    return _run_gradients(grad_output, x, (lora_a, lora_b), mask_words, scale, regime)


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
    """dX, dA and dB."""
    delta = (lora_a, lora_b)
    return _run_backward(
        grad_output, x, weight, delta, mask_words, scale, regime, need_input, need_factors, seed, rounded
    )


def masked_values_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    """Forward with the delta given by its values: at their positions, or as a second library product where many."""
    return _run_forward(x, weight, bias, (values,), mask_words, scale, x.shape[-1], regime, seed, rounded)


def masked_values_linear_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    in_features: int,
    regime: int,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    """dX of `masked_values_linear`, by the same paths."""
    return _run_input_gradient(grad_output, weight, (values,), mask_words, scale, in_features, regime, seed, rounded)


def masked_values_linear_gradient(
    grad_output: Tensor, x: Tensor, values: Tensor, mask_words: Tensor, scale: Tensor, regime: int
) -> Tensor:
    """dV."""
    return _run_gradients(grad_output, x, (values,), mask_words, scale, regime)[0]


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
    """dX and dV."""
    return _run_backward(
        grad_output, x, weight, (values,), mask_words, scale, regime, need_input, need_values, seed, rounded
    )
