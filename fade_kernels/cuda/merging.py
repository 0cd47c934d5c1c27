"""Effective weights and values of factors on a CUDA device."""

import torch
from torch import Tensor

from fade_kernels.mask_facts import mask_positions
from fade_kernels.one_product import RoundedLayer, write_rounded


def on(scale: Tensor, like: Tensor) -> Tensor:
    """The scale as fp32; a 0-d tensor on the host may multiply one on the device, and need not be copied there."""
    return scale.to(like.dtype)


def lora_weight(
    like: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    seed: int | None = None,
) -> Tensor:
    """Scratch [N, K] with W + Delta, or Delta alone, in the dtype of `like`; with a seed rounded stochastically."""
    from fade_kernels.triton_kernels import effective_weight as merging

    delta = (lora_a, lora_b, mask_words, scale)
    return merging.effective_weight(weight, *delta, dtype=like.dtype, stochastic=seed is not None, seed=seed or 0)


def values_weight(
    like: Tensor,
    weight: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    columns: int,
    seed: int | None = None,
) -> Tensor:
    """The same with the delta given by its values."""
    out = like.new_empty((mask_words.shape[0], columns))
    if seed is not None and out.dtype.itemsize == 2:
        write_rounded([_rounded_values(0, out, weight, values, mask_words, scale)], seed)
    else:
        effective_weight_from_values_out(out, weight, values, mask_words, scale)
    return out


def effective_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor) -> Tensor:
    """W + Delta in one pass."""
    from fade_kernels.triton_kernels import effective_weight as merging

    return merging.effective_weight(weight, lora_a, lora_b, mask_words, scale)


def effective_weight_out(
    out: Tensor, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor
) -> None:
    """The same into existing memory."""
    from fade_kernels.triton_kernels import effective_weight as merging

    merging.effective_weight(weight, lora_a, lora_b, mask_words, scale, out=out)


def effective_weights_out(
    out: list[Tensor],
    weight: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    mask_words: list[Tensor],
    scale: list[Tensor],
    stochastic: bool,
    seed: int,
) -> None:
    """The same of many layers: a launch for each combination of dtypes and alignment."""
    from fade_kernels.triton_kernels import effective_weight as merging

    layers = [
        merging.Layer(base, *delta, out=result)
        for result, base, *delta in zip(out, weight, lora_a, lora_b, mask_words, scale, strict=True)
    ]
    merging.effective_weights(layers, stochastic=stochastic, seed=seed)


def effective_weight_from_values_out(
    out: Tensor, weight: Tensor | None, values: Tensor, mask_words: Tensor, scale: Tensor
) -> None:
    """W + Delta with the delta given by its values: added in fp32 at the mask's positions, the rest copied."""
    before = None
    if weight is not None:
        before = torch.ops.fade_kernels.gather_masked(weight, mask_words, values.numel()).float()
        out.copy_(weight)
    else:
        out.zero_()
    delta = on(scale, values.float()) * values.float()
    changed = (delta if before is None else before + delta).to(out.dtype)
    torch.ops.fade_kernels.scatter_masked_(out, changed, mask_words)


def effective_weights_from_values_out(
    out: list[Tensor],
    weight: list[Tensor],
    values: list[Tensor],
    mask_words: list[Tensor],
    scale: list[Tensor],
    stochastic: bool,
    seed: int,
) -> None:
    """The same of many layers; stochastically with the random numbers of all of them at once."""
    rounded = []
    for i, (result, base, *delta) in enumerate(zip(out, weight, values, mask_words, scale, strict=True)):
        if stochastic and result.dtype.itemsize == 2:
            rounded.append(_rounded_values(i, result, base, *delta))
        else:
            effective_weight_from_values_out(result, base, *delta)
    if rounded:
        write_rounded(rounded, seed)


def _rounded_values(
    index: int, out: Tensor, weight: Tensor | None, values: Tensor, mask_words: Tensor, scale: Tensor
) -> RoundedLayer:
    """What `write_rounded` writes into out [N, K], at positions which stay with the mask."""
    by_row = mask_positions(mask_words, out.shape[1]).by_row
    elements = by_row.segment.long() * out.shape[1] + by_row.index
    return RoundedLayer(out, weight, on(scale, values.float()) * values.float(), mask_words, elements, index)


def masked_factor_values(lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, count: int) -> Tensor:
    """(B A) at the mask's positions, read out of one pass that masks it: 4 N K bytes for the length of the call, where
    a list of positions would stay with the mask."""
    from fade_kernels.triton_kernels import effective_weight as merging

    product = merging.effective_weight(None, lora_a, lora_b, mask_words, torch.ones(()), dtype=torch.float32)
    return torch.ops.fade_kernels.gather_masked(product, mask_words, count)
