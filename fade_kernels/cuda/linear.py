"""Masked LoRA and masked values of a linear layer on a CUDA device, by the path that `choices.py` takes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fade_kernels import choices, reference
from fade_kernels.cuda.merging import lora_weight, on, values_weight
from fade_kernels.cuda.precision import precision, tf32
from fade_kernels.cuda.products import wide_linear, wide_product
from fade_kernels.mask_facts import facts_for_choice, mask_facts, mask_positions
from fade_kernels.masked_lora import REGIMES

_FORCED_PATHS = {REGIMES["gather"]: "gather", REGIMES["tile"]: "fused", REGIMES["whole"]: "two products"}


def _path(
    like: Tensor,
    mask_words: Tensor,
    columns: int,
    regime: int,
    seed: int | None,
    rounded: Tensor | None,
    rank: int | None,
) -> str:
    """The path of a call on rows `like` [T, *]; rank: of the factors, None where the delta is given by its values."""
    if rounded is not None or (seed is not None and like.dtype.itemsize == 2):
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


def _alike(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors in one dtype; factors of two dtypes become fp32."""
    return (lora_a, lora_b) if lora_a.dtype == lora_b.dtype else (lora_a.float(), lora_b.float())


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, rows: int) -> Tensor:
    """x W^T + bias of the library; without a weight the bias, or zeros."""
    if weight is None:
        return x.new_zeros((x.shape[0], rows)) if bias is None else bias.repeat(x.shape[0], 1)
    return F.linear(x, weight, bias)


def _input_gradient(flat: Tensor, weight: Tensor | None, columns: int) -> Tensor:
    return flat.new_zeros((flat.shape[0], columns)) if weight is None else flat @ weight


def _wide_input_gradient(flat: Tensor, weight: Tensor | None, columns: int) -> Tensor:
    if weight is None:
        return flat.new_zeros((flat.shape[0], columns), dtype=torch.float32)
    return wide_product(flat, weight)


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
    """Forward of x [..., K]; the choice: `choose_linear`."""
    from fade_kernels.triton_kernels import masked_lora_forward as forward

    rows, columns = lora_b.shape[0], lora_a.shape[1]
    flat = reference.as_rows(x)
    delta = (lora_a, lora_b, mask_words, scale)
    path = _path(flat, mask_words, columns, regime, seed, rounded, rank=lora_a.shape[0])
    if path == "fused":
        skip = choices.skips_empty_tiles(mask_facts(mask_words, columns))
        y = forward.masked_lora_forward(flat, weight, bias, *delta, input_precision=precision(x), skip_empty=skip)
    elif path in ("scratch", "one product"):
        y = F.linear(flat, lora_weight(x, weight, *delta, seed) if rounded is None else rounded, bias)
    elif path == "frozen":
        y = _linear(flat, weight, bias, rows)
    else:
        y = wide_linear(flat, weight, bias, rows)
        if path == "gather":
            by_row = mask_positions(mask_words, columns).by_row
            torch.ops.fade_kernels.add_gathered_lora_(y, flat, *_alike(lora_a, lora_b), *by_row, False, scale.float())
        else:
            y += wide_product(flat, lora_weight(x, None, *delta).t())
        y = y.to(x.dtype)
    return y.reshape(*x.shape[:-1], rows)


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
    """dX of dY [..., N], by the same paths."""
    from fade_kernels.triton_kernels import masked_lora_input_gradient as backward

    columns = lora_a.shape[1]
    flat = reference.as_rows(grad_output)
    delta = (lora_a, lora_b, mask_words, scale)
    path = _path(flat, mask_words, columns, regime, seed, rounded, rank=lora_a.shape[0])
    if path == "fused":
        skip = choices.skips_empty_tiles(mask_facts(mask_words, columns))
        dx = backward.masked_lora_input_gradient(
            flat, weight, *delta, input_precision=precision(grad_output), skip_empty=skip
        )
    elif path in ("scratch", "one product"):
        dx = flat @ (lora_weight(flat, weight, *delta, seed) if rounded is None else rounded)
    elif path == "frozen":
        dx = _input_gradient(flat, weight, columns)
    else:
        dx = _wide_input_gradient(flat, weight, columns)
        if path == "gather":
            by_column = mask_positions(mask_words, columns).by_column
            factors = _alike(lora_a, lora_b)
            torch.ops.fade_kernels.add_gathered_lora_(dx, flat, *factors, *by_column, True, scale.float())
        else:
            dx += wide_product(flat, lora_weight(flat, None, *delta))
        dx = dx.to(flat.dtype)
    return dx.reshape(*grad_output.shape[:-1], columns)


def masked_lora_linear_factor_gradients(
    grad_output: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
) -> tuple[Tensor, Tensor]:
    """dA, dB without a weight gradient in memory; the choice: `choose_factor_gradients`."""
    from fade_kernels.triton_kernels import masked_lora_factor_gradients as kernel

    dy, flat = reference.as_rows(grad_output), reference.as_rows(x)
    columns = lora_a.shape[1]
    path = {REGIMES["gather"]: "gather", REGIMES["tile"]: "tile", REGIMES["whole"]: "tile"}.get(regime)
    if path is None:
        facts = facts_for_choice(mask_words, columns)
        path = choices.choose_factor_gradients(flat.shape[0], dy.shape[1], columns, facts)
    if path == "zero" or flat.shape[0] == 0:
        return lora_a.new_zeros(lora_a.shape), lora_b.new_zeros(lora_b.shape)
    if path == "gather":
        by_row, by_column, order = mask_positions(mask_words, columns)
        sampled = torch.ops.fade_kernels.sampled_gradient(dy, flat, *by_row)
        grad_a, grad_b = torch.ops.fade_kernels.sampled_factor_gradients(
            sampled,
            by_row.starts,
            by_row.index,
            by_column.starts,
            by_column.index,
            order,
            *_alike(lora_a, lora_b),
            scale.float(),
        )
        return grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype)
    return kernel.masked_lora_factor_gradients(
        dy, flat, lora_a, lora_b, mask_words, scale, input_precision=precision(x)
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
    rows, columns = mask_words.shape[0], x.shape[-1]
    flat = reference.as_rows(x)
    delta = (values, mask_words, scale, columns)
    path = _path(flat, mask_words, columns, regime, seed, rounded, rank=None)
    if path in ("scratch", "one product"):
        y = F.linear(flat, values_weight(x, weight, *delta, seed) if rounded is None else rounded, bias)
    elif path == "frozen":
        y = _linear(flat, weight, bias, rows)
    else:
        y = wide_linear(flat, weight, bias, rows)
        if path == "gather":
            by_row = mask_positions(mask_words, columns).by_row
            torch.ops.fade_kernels.add_gathered_values_(
                y, flat, values, None, by_row.starts, by_row.index, scale.float()
            )
        else:
            y += wide_product(flat, values_weight(x, None, *delta).t())
        y = y.to(x.dtype)
    return y.reshape(*x.shape[:-1], rows)


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
    flat = reference.as_rows(grad_output)
    delta = (values, mask_words, scale, in_features)
    path = _path(flat, mask_words, in_features, regime, seed, rounded, rank=None)
    if path in ("scratch", "one product"):
        dx = flat @ (values_weight(flat, weight, *delta, seed) if rounded is None else rounded)
    elif path == "frozen":
        dx = _input_gradient(flat, weight, in_features)
    else:
        dx = _wide_input_gradient(flat, weight, in_features)
        if path == "gather":
            _, by_column, order = mask_positions(mask_words, in_features)
            torch.ops.fade_kernels.add_gathered_values_(
                dx, flat, values, order, by_column.starts, by_column.index, scale.float()
            )
        else:
            dx += wide_product(flat, values_weight(flat, None, *delta))
        dx = dx.to(flat.dtype)
    return dx.reshape(*grad_output.shape[:-1], in_features)


def masked_values_linear_gradient(
    grad_output: Tensor, x: Tensor, values: Tensor, mask_words: Tensor, scale: Tensor, regime: int
) -> Tensor:
    """dV, the weight gradient at the mask's positions: sampled where few, read out of a library product where many."""
    dy, flat = reference.as_rows(grad_output), reference.as_rows(x)
    sampled = regime == REGIMES["gather"]
    if regime == REGIMES["auto"]:
        facts = facts_for_choice(mask_words, flat.shape[1])
        sampled = choices.choose_factor_gradients(flat.shape[0], dy.shape[1], flat.shape[1], facts) == "gather"
    if sampled:
        gathered = torch.ops.fade_kernels.sampled_gradient(dy, flat, *mask_positions(mask_words, flat.shape[1]).by_row)
    else:
        gradient = dy.t() @ flat
        gathered = torch.ops.fade_kernels.gather_masked(gradient, mask_words, values.numel()).float()
    return (on(scale, gathered) * gathered).to(values.dtype)
