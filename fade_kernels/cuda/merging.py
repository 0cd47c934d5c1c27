"""Effective weights and values of factors on a CUDA device."""

import torch
from torch import Tensor


def on(scale: Tensor, like: Tensor) -> Tensor:
    """The scale as fp32; a 0-d tensor on the host may multiply one on the device, and need not be copied there."""
    return scale.to(like.dtype)


def lora_weight(
    dtype: torch.dtype,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    seed: int | None = None,
) -> Tensor:
    """Scratch [N, K] with W + Delta, or Delta alone, in a dtype; with a seed rounded stochastically."""
    from fade_kernels.triton_kernels import effective_weight as merging

    delta = (lora_a, lora_b, mask_words, scale)
    return merging.effective_weight(weight, *delta, dtype=dtype, stochastic=seed is not None, seed=seed or 0)


def values_weight(
    dtype: torch.dtype,
    weight: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    columns: int,
    seed: int | None = None,
) -> Tensor:
    """The same with the delta given by its values."""
    from fade_kernels.triton_kernels import effective_weight as merging

    out = torch.empty(mask_words.shape[0], columns, dtype=dtype, device=mask_words.device)
    delta = (values, mask_words, scale)
    merging.effective_weight_from_values(out, weight, *delta, stochastic=seed is not None, seed=seed or 0)
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
    """W + Delta with the delta given by its values, in one pass."""
    from fade_kernels.triton_kernels import effective_weight as merging

    merging.effective_weight_from_values(out, weight, values, mask_words, scale)


def effective_weights_from_values_out(
    out: list[Tensor],
    weight: list[Tensor],
    values: list[Tensor],
    mask_words: list[Tensor],
    scale: list[Tensor],
    stochastic: bool,
    seed: int,
) -> None:
    """The same of many layers, a launch for each."""
    from fade_kernels.triton_kernels import effective_weight as merging

    for i, (result, *arguments) in enumerate(zip(out, weight, values, mask_words, scale, strict=True)):
        merging.effective_weight_from_values(result, *arguments, stochastic=stochastic, seed=seed, layer=i)


def masked_factor_values(lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, count: int) -> Tensor:
    """(B A) at the mask's positions, read out of one pass that masks it: 4 N K bytes for the length of the call, where
    a list of positions would stay with the mask."""
    from fade_kernels.triton_kernels import effective_weight as merging

    product = merging.effective_weight(None, lora_a, lora_b, mask_words, torch.ones(()), dtype=torch.float32)
    return torch.ops.fade_kernels.gather_masked(product, mask_words, count)
