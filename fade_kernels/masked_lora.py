"""Masked LoRA: y = x (W + s M o (B A))^T with a frozen weight and a packed mask, for linear and convolution layers.

The public functions, and CPU kernels that are compositions: the convolutions, of torch's own with the effective weight,
and the effective weights of many layers. Definitions: `reference.py`; the linear's CPU kernels and their choice:
csrc/cpu/masked_lora.cpp and cost.h. The method: FADE's sparse LoRA, the masked product B A of SparsePEFT (SQFT, arXiv
2410.03750).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import prod

import torch
from torch import Tensor

from fade_kernels import _ops, reference
from fade_kernels._environment import FORCED, INTERPRETED
from fade_kernels.bitmask import BitMask
from fade_kernels.overlap import find_shared
from fade_kernels.window import Window

# How the CPU kernels do what the mask makes sparse; the numbers are those of `Regime` in csrc/cpu/cost.h.
# auto: the cheapest by the measured cost table there. gather: only at the mask's positions. tile: dense, in the
# occupied 32 x 32 tiles. whole: one more matrix product, in blocks of rows.
REGIMES = {"auto": 0, "gather": 1, "tile": 2, "whole": 3}

_regime = REGIMES["auto"]


@contextmanager
def force_regime(name: str) -> Iterator[None]:
    """Makes the linear operators' CPU kernels use one regime (a key of REGIMES) inside a `with` block.

    For tests and benchmarks. A backward pass uses the regime of its forward. The results differ only in rounding.

    Raises:
        ValueError: unknown name.
    """
    global _regime
    if name not in REGIMES:
        raise ValueError(f"unknown regime {name!r}: choose one of {', '.join(REGIMES)}")
    previous, _regime = _regime, REGIMES[name]
    try:
        yield
    finally:
        _regime = previous


def masked_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask: BitMask,
    scale: float | Tensor = 1.0,
    *,
    rounding_seed: int | None = None,
    rounded_weight: Tensor | None = None,
) -> Tensor:
    """y = x W^T + x (s M o (B A))^T + bias, differentiable in x, lora_a and lora_b (and weight and bias).

    Nothing is kept for backward but the inputs: neither the delta nor a weight gradient outlives a call. In 16 bits
    there are two modes. Exact: the two terms are summed in fp32 and the sum is rounded once, so that a delta far below
    the weight's or the output's rounding still counts. One product, asked for by one of the keywords: W + Delta is
    rounded to 16 bits so that its mean over seeds is exact, and one product forward and one for the input gradient use
    these same bits; what a single step loses or gains by the rounding is zero on average. In fp32 and fp64 both are
    one. Under autocast x, weight and bias are cast to its dtype; the factors stay.

    Args:
        x: [..., K], any strides; fp32, fp64, fp16 or bf16.
        weight: [N, K] in x's dtype; None: only the adapter's term.
        bias: [N] in x's dtype, or None.
        lora_a: [r, K], r >= 1; lora_b: [N, r]. fp32 factors may serve a 16-bit layer.
        mask: of shape (N, K).
        scale: a number or a 0-d tensor, on the host or on x's device; not differentiable. Under torch.compile another
            number compiles again, another tensor does not.
        rounding_seed: seed of the one-product mode, from 0 on, counted modulo 2^31; the training step, so that every
            step rounds anew. The rounded weight is made twice, forward and for the input gradient, and not kept in
            between.
        rounded_weight: [N, K] in x's dtype; the one-product mode with a weight that `effective_weights(...,
            stochastic=True, seed=step)` made beforehand, for many layers at once. It is used as it is, without a check
            that it holds this adapter, and must stay as it is until the backward pass is over.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError: dtypes that do not agree. ValueError: shapes or devices that do not, both keywords at once, a
        negative seed; the message names the argument.
    """
    _check_mask(mask, lora_b.shape[:1], lora_a.shape[1:])
    x, weight, bias, guard = _autocast(x, weight, bias)
    with guard:
        return _ops.masked_lora_linear(
            x, weight, bias, lora_a, lora_b, mask.words, _scale(scale), _regime, rounding_seed, rounded_weight
        )


def masked_values_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    mask: BitMask,
    scale: float | Tensor = 1.0,
    *,
    rounding_seed: int | None = None,
    rounded_weight: Tensor | None = None,
) -> Tensor:
    """`masked_lora_linear` with the delta given by its values: s times `values` at the mask's positions.

    Args:
        values: [nnz], row-major, fp32, fp64, fp16 or bf16. Other arguments and the result: `masked_lora_linear`; a
            `rounded_weight` comes from `effective_weights_from_values`.

    Differentiable in x and values (and weight and bias).

    Raises:
        As `masked_lora_linear`; ValueError where the number of values is not `mask.count`.
    """
    _check_mask(mask, mask.shape[:1], x.shape[-1:])
    _check_count(values, mask)
    x, weight, bias, guard = _autocast(x, weight, bias)
    with guard:
        return _ops.masked_values_linear(
            x, weight, bias, values, mask.words, _scale(scale), _regime, rounding_seed, rounded_weight
        )


def masked_lora_conv2d(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask: BitMask,
    scale: float | Tensor = 1.0,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    rounding_seed: int | None = None,
    rounded_weight: Tensor | None = None,
) -> Tensor:
    """Convolution with W + s M o (B A), all seen as [C_out, C_in kh kw]; differentiable like `masked_lora_linear`.

    Args:
        x: [n, C_in, height, width]; fp32, fp64, fp16 or bf16.
        weight: [C_out, C_in, kh, kw] in x's dtype; None: only the adapter's term.
        bias: [C_out] in x's dtype, or None.
        lora_a: [r, C_in, kh, kw]; lora_b: [C_out, r, 1, 1]: PEFT's shapes.
        mask: of shape (C_out, C_in kh kw), as BitMask.pack makes it from a bool [C_out, C_in, kh, kw].
        scale: a number or a 0-d tensor, on the host or on x's device; not differentiable. Under torch.compile another
            number compiles again, another tensor does not.
        stride, padding, dilation: as for torch.nn.functional.conv2d, numbers or pairs.
        groups: only 1: a grouped weight has another shape than B A.
        rounding_seed, rounded_weight: as for `masked_lora_linear`; the rounded weight is [C_out, C_in, kh, kw].

    Returns:
        [n, C_out, height', width'] in x's dtype.

    Raises:
        TypeError: dtypes that do not agree. ValueError: shapes or devices that do not, or groups other than 1.
    """
    _check_groups(groups)
    _check_mask(mask, lora_b.shape[:1], lora_a.shape[1:])
    window = Window(_pair(stride), _pair(padding), _pair(dilation))
    x, weight, bias, guard = _autocast(x, weight, bias)
    with guard:
        return _ops.masked_lora_conv2d(
            x, weight, bias, lora_a, lora_b, mask.words, _scale(scale), *window, rounding_seed, rounded_weight
        )


def masked_values_conv2d(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    mask: BitMask,
    scale: float | Tensor = 1.0,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    kernel_size: int | tuple[int, int] | None = None,
    *,
    rounding_seed: int | None = None,
    rounded_weight: Tensor | None = None,
) -> Tensor:
    """`masked_lora_conv2d` with the delta given by its values: s times `values` at the mask's positions.

    Args:
        values: [nnz], row-major, fp32, fp64, fp16 or bf16.
        kernel_size: needed only where there is no weight to take it from. Others and the result: `masked_lora_conv2d`.

    Differentiable in x and values (and weight and bias).

    Raises:
        As `masked_lora_conv2d`; ValueError where the number of values is not `mask.count`.
    """
    _check_groups(groups)
    if kernel_size is None:
        if weight is None:
            raise ValueError("kernel_size is needed when there is no weight to take it from")
        kernel_size = tuple(weight.shape[2:])
    kernel = _pair(kernel_size)
    _check_mask(mask, mask.shape[:1], (x.shape[1], *kernel) if x.dim() == 4 else ())
    _check_count(values, mask)
    window = Window(_pair(stride), _pair(padding), _pair(dilation))
    x, weight, bias, guard = _autocast(x, weight, bias)
    with guard:
        return _ops.masked_values_conv2d(
            x, weight, bias, values, mask.words, _scale(scale), kernel, *window, rounding_seed, rounded_weight
        )


def effective_weight(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask: BitMask,
    scale: float | Tensor = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """W + s M o (B A), added in fp32 (fp64 for an fp64 weight) and rounded once to the weight's dtype: a merge.

    Args:
        weight: [N, K], or [C_out, C_in, kh, kw] with the factors in PEFT's convolution shapes.
        lora_a, lora_b, mask, scale: as for `masked_lora_linear`, `masked_lora_conv2d`.
        out: memory for the result, of the weight's shape and dtype; may be the weight itself, but share
            no memory with anything else. Not differentiable.

    Returns:
        The effective weight, `out` where given. Without `out`, differentiable in weight, lora_a and lora_b.

    Raises:
        TypeError: dtypes that do not agree. ValueError: shapes or devices that do not.
    """
    _check_mask(mask, lora_b.shape[:1], lora_a.shape[1:])
    if weight.shape[1:] != lora_a.shape[1:]:
        raise ValueError(f"lora_a {list(lora_a.shape)} does not fit a weight {list(weight.shape)}")
    factors = (lora_a.flatten(1), lora_b.flatten(1), mask.words, _scale(scale))
    if out is None:
        return _ops.effective_weight(weight.flatten(1), *factors).reshape(weight.shape)
    if out.shape != weight.shape:
        raise ValueError(f"out {list(out.shape)} must have the weight's shape {list(weight.shape)}")
    shared = find_shared([out], [weight, lora_a, lora_b])
    if shared is not None:
        raise ValueError(
            f"out shares memory with {('weight', 'lora_a', 'lora_b')[shared[1] - 1]}: only the weight "
            "itself may be overwritten"
        )
    with torch.no_grad():
        if out.is_contiguous():
            _ops.effective_weight_out(out.view(mask.shape), weight.flatten(1), *factors)
        else:
            out.copy_(_ops.effective_weight(weight.flatten(1), *factors).reshape(weight.shape))
    return out


def effective_weights(
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    masks: Sequence[BitMask],
    scales: Sequence[float | Tensor],
    *,
    out: Sequence[Tensor] | None = None,
    stochastic: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """`effective_weight` of many layers; on CUDA one launch for all that agree in dtypes. Not differentiable.

    Args:
        weights, lora_as, lora_bs, masks, scales: one of each per layer, as for `effective_weight`.
        out: memory for the results, contiguous, of the weights' shapes and dtypes; may be the weights themselves.
        stochastic: rounds fp16 and bf16 results up or down so that their mean over seeds is the exact value; a delta
            below half the weight's spacing is then not lost but there as often as it is large.
        seed: of that rounding, from 0 on; counted modulo 2^31. The same seed gives the same bits.

    Raises:
        TypeError: dtypes that do not agree. ValueError: numbers of layers, shapes or devices that do not agree, memory
        that is not contiguous; the message names the layer.
    """
    weights = [weight.detach() for weight in weights]
    results = _results(weights, out)
    _check_masks(masks, ((*b.shape[:1], *a.shape[1:]) for a, b in zip(lora_as, lora_bs, strict=False)))
    if weights or results:
        _ops.effective_weights_out(
            [result.detach().flatten(1) for result in results],
            [weight.flatten(1) for weight in weights],
            [a.detach().flatten(1) for a in lora_as],
            [b.detach().flatten(1) for b in lora_bs],
            [mask.words for mask in masks],
            [_scale(scale) for scale in scales],
            stochastic,
            seed,
        )
    return results


def effective_weights_from_values(
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[BitMask],
    scales: Sequence[float | Tensor],
    *,
    out: Sequence[Tensor] | None = None,
    stochastic: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """`effective_weights` with each layer's delta given by its values, as for `masked_values_linear`.

    Args:
        values: [nnz] per layer, row-major, fp32, fp64, fp16 or bf16. Others and the result: `effective_weights`.

    Raises:
        As `effective_weights`; ValueError where the number of values is not the mask's count.
    """
    weights = [weight.detach() for weight in weights]
    results = _results(weights, out)
    _check_masks(masks, (weight.shape for weight in weights))
    for i, (given, mask) in enumerate(zip(values, masks, strict=False)):
        try:
            _check_count(given, mask)
        except ValueError as error:
            raise ValueError(f"layer {i}: {error}") from None
    if weights or results:
        _ops.effective_weights_from_values_out(
            [result.detach().flatten(1) for result in results],
            [weight.flatten(1) for weight in weights],
            [given.detach() for given in values],
            [mask.words for mask in masks],
            [_scale(scale) for scale in scales],
            stochastic,
            seed,
        )
    return results


def _results(weights: list[Tensor], out: Sequence[Tensor] | None) -> list[Tensor]:
    """Memory for one result a weight: that given, or new."""
    results = [w.new_empty(w.shape) for w in weights] if out is None else list(out)
    for i, result in enumerate(results):
        if not result.is_contiguous():
            raise ValueError(f"layer {i}: out must be contiguous, not of strides {result.stride()}")
    shared = None if out is None else find_shared(results, weights)
    if shared is not None:
        which, of = ("out", shared[1]) if shared[1] < len(results) else ("weight", shared[1] - len(results))
        raise ValueError(
            f"layer {shared[0]}: out shares memory with the {which} of layer {of}: only a layer's own weight may be "
            "overwritten"
        )
    return results


def _check_masks(masks: Sequence[BitMask], shapes: Iterable[tuple[int, ...]]) -> None:
    for i, (mask, shape) in enumerate(zip(masks, shapes, strict=False)):
        try:
            _check_mask(mask, shape[:1], shape[1:])
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {i}: {error}") from None


def masked_factor_values(lora_a: Tensor, lora_b: Tensor, mask: BitMask) -> Tensor:
    """(B A) at the mask's positions, row-major: the values that `masked_values_linear` takes.

    Args:
        lora_a: [r, K] or [r, C_in, kh, kw]; lora_b: [N, r] or [C_out, r, 1, 1].
        mask: of shape (N, K).

    Returns:
        [mask.count], fp32 (fp64 for fp64 factors), without any scale; differentiable in both factors.

    Raises:
        TypeError, ValueError: factors and mask that do not fit each other.
    """
    _check_mask(mask, lora_b.shape[:1], lora_a.shape[1:])
    return _ops.masked_factor_values(lora_a.flatten(1), lora_b.flatten(1), mask.words, mask.count)


_MOST_SCALES = 256
_scales: dict[float, Tensor] = {}


def _scale(scale: float | Tensor) -> Tensor:
    """The scale as a 0-d tensor. Under torch.compile a number is a constant of the graph, a tensor its input.

    A number's tensor is kept, but for those that belong to a trace or a transform.
    """
    if isinstance(scale, Tensor):
        return scale
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    ):
        return torch.tensor(scale, dtype=torch.float64)
    kept = _scales.get(scale)
    if kept is None:
        with torch.inference_mode(False):
            kept = torch.tensor(scale, dtype=torch.float64, device="cpu")
        if len(_scales) >= _MOST_SCALES:
            _scales.clear()
        _scales[scale] = kept
    return kept


def _pair(value: int | tuple[int, int] | list[int]) -> list[int]:
    if isinstance(value, str):
        raise ValueError(f"{value!r} is no number: pad the input first, then give padding=0")
    return [value, value] if isinstance(value, int) else list(value)


def _check_mask(mask: BitMask, rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
    if not isinstance(mask, BitMask):
        raise TypeError(f"mask must be a BitMask, not {type(mask).__name__}: use BitMask.pack(bool tensor)")
    shape = (*rows, prod(columns))
    if mask.shape != shape:
        raise ValueError(f"a mask of shape {mask.shape} does not fit an adapter of shape {shape}")


def _check_count(values: Tensor, mask: BitMask) -> None:
    if mask._count is None and torch.compiler.is_compiling():
        return  # a graph cannot wait for the count; the kernels stay within both
    if values.numel() != mask.count:
        raise ValueError(f"values has {values.numel()} elements, but the mask has {mask.count} set bits")


def _check_groups(groups: int) -> None:
    if groups != 1:
        raise ValueError(f"groups is {groups}: masked convolutions support groups=1 only")


_NO_CONTEXT = nullcontext()


def _autocast(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, torch.autocast | nullcontext]:
    """Casts as autocast casts a linear layer, and a context in which it casts nothing more."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias, _NO_CONTEXT
    dtype = torch.get_autocast_dtype(device)
    x, weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (x, weight, bias))
    return x, weight, bias, torch.autocast(device, enabled=False)


# --- CPU kernels of the convolutions ---------------------------------------------------------------------------------


def _wide(tensor: Tensor | None) -> Tensor | None:
    """16 bits become fp32: the sum of weight and delta must not be rounded to 16."""
    return tensor.float() if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _flat_copy(like: Tensor, weight: Tensor | None, size: tuple[int, int]) -> Tensor:
    """The weight as [N, K] in new memory, zeros without one."""
    return like.new_zeros(size) if weight is None else like.new_empty(size).copy_(weight.reshape(size))


def _lora_weight(
    like: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    seed: int | None,
    rounded: Tensor | None,
) -> Tensor:
    """W + Delta, or Delta alone, as [C_out, C_in, kh, kw] in the type to compute in.

    In the one-product mode of 16 bits its values are rounded to the dtype of `like`.
    """
    if rounded is not None:
        return _wide(rounded)
    factors = (lora_a.flatten(1), lora_b.flatten(1))
    if seed is None or like.dtype.itemsize != 2:
        out = _wide(like.new_empty((lora_b.shape[0], prod(lora_a.shape[1:]))))
        flat = None if weight is None else _wide(weight).flatten(1)
        torch.ops.fade_kernels.effective_weight_out(out, flat, *factors, mask_words, scale)
    else:
        out = _flat_copy(like, weight, (lora_b.shape[0], prod(lora_a.shape[1:])))
        layer = ([tensor] for tensor in (*factors, mask_words, scale))
        torch.ops.fade_kernels.effective_weights_out([out], [out], *layer, True, seed)
    return _wide(out).reshape(lora_b.shape[0], *lora_a.shape[1:])


def _values_weight(
    like: Tensor,
    weight: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    shape: tuple[int, ...],
    seed: int | None,
    rounded: Tensor | None,
) -> Tensor:
    """The same with the delta given by its values."""
    if rounded is not None:
        return _wide(rounded)
    if seed is None or like.dtype.itemsize != 2:
        out = _wide(like.new_empty((mask_words.shape[0], prod(shape))))
        flat = None if weight is None else _wide(weight).flatten(1)
        torch.ops.fade_kernels.effective_weight_from_values_out(out, flat, values, mask_words, scale)
    else:
        out = _flat_copy(like, weight, (mask_words.shape[0], prod(shape)))
        layer = ([tensor] for tensor in (values, mask_words, scale))
        torch.ops.fade_kernels.effective_weights_from_values_out([out], [out], *layer, True, seed)
    return _wide(out).reshape(mask_words.shape[0], *shape)


def _conv2d_weight_gradient(grad_output: Tensor, x: Tensor, kernel: list[int], window: Window) -> Tensor:
    """The whole weight gradient [C_out, C_in kh kw], for as long as it takes to contract it."""
    shape = (grad_output.shape[1], x.shape[1], *kernel)
    return torch.nn.grad.conv2d_weight(_wide(x), shape, _wide(grad_output), *window).flatten(1)


def pixels(images: Tensor) -> Tensor:
    """[n, C, h, w] -> [n h w, C]."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def _masked_lora_conv2d_cpu(
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
) -> Tensor:
    wide = _wide(x)
    effective = _lora_weight(x, weight, lora_a, lora_b, mask_words, scale, seed, rounded)
    y = torch.nn.functional.conv2d(wide, effective, _wide(bias), *window)
    return reference.in_layout_of(x, y.to(x.dtype))


def _masked_lora_conv2d_input_gradient_cpu(
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
) -> Tensor:
    wide = _wide(grad_output)
    effective = _lora_weight(grad_output, weight, lora_a, lora_b, mask_words, scale, seed, rounded)
    gradient = torch.nn.grad.conv2d_input(input_size, effective, wide, *window)
    return reference.in_layout_of(grad_output, gradient.to(grad_output.dtype))


def _masked_lora_conv2d_factor_gradients_cpu(
    grad_output: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    window: Window,
) -> tuple[Tensor, Tensor]:
    kernel, factors = list(lora_a.shape[2:]), (lora_a.flatten(1), lora_b.flatten(1), mask_words, scale)
    if window.is_linear(kernel):
        grads = torch.ops.fade_kernels.masked_lora_linear_factor_gradients(
            pixels(grad_output), pixels(x), *factors, REGIMES["auto"]
        )
    else:
        gradient = _conv2d_weight_gradient(grad_output, x, kernel, window)
        grads = torch.ops.fade_kernels.masked_factor_gradients(gradient, *factors)
    return grads[0].reshape(lora_a.shape), grads[1].reshape(lora_b.shape)


def _masked_values_conv2d_cpu(
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
) -> Tensor:
    wide = _wide(x)
    effective = _values_weight(x, weight, values, mask_words, scale, (x.shape[1], *kernel_size), seed, rounded)
    y = torch.nn.functional.conv2d(wide, effective, _wide(bias), *window)
    return reference.in_layout_of(x, y.to(x.dtype))


def _masked_values_conv2d_input_gradient_cpu(
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
) -> Tensor:
    wide = _wide(grad_output)
    effective = _values_weight(
        grad_output, weight, values, mask_words, scale, (input_size[1], *kernel_size), seed, rounded
    )
    gradient = torch.nn.grad.conv2d_input(input_size, effective, wide, *window)
    return reference.in_layout_of(grad_output, gradient.to(grad_output.dtype))


def _masked_values_conv2d_gradient_cpu(
    grad_output: Tensor,
    x: Tensor,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    kernel_size: list[int],
    window: Window,
) -> Tensor:
    if window.is_linear(kernel_size):
        return torch.ops.fade_kernels.masked_values_linear_gradient(
            pixels(grad_output), pixels(x), values, mask_words, scale, REGIMES["auto"]
        )
    gradient = _conv2d_weight_gradient(grad_output, x, kernel_size, window)
    gathered = torch.ops.fade_kernels.gather_masked(gradient, mask_words, values.numel())
    return (scale.to(gathered.dtype) * gathered).to(values.dtype)


_CPU_KERNELS = (
    ("masked_lora_conv2d", _masked_lora_conv2d_cpu),
    ("masked_lora_conv2d_input_gradient", _masked_lora_conv2d_input_gradient_cpu),
    ("masked_lora_conv2d_factor_gradients", _masked_lora_conv2d_factor_gradients_cpu),
    ("masked_values_conv2d", _masked_values_conv2d_cpu),
    ("masked_values_conv2d_input_gradient", _masked_values_conv2d_input_gradient_cpu),
    ("masked_values_conv2d_gradient", _masked_values_conv2d_gradient_cpu),
)

if FORCED != "reference" and not INTERPRETED:
    for _name, _kernel in _CPU_KERNELS:
        _ops.implement(_name, _kernel, "CPU")
