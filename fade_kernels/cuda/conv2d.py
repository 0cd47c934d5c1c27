"""Masked LoRA and masked values of a convolution on a CUDA device.

1 x 1 is a linear layer on the pixels. k x k, exact: the library's convolution with W, and one with the delta on the
channels that have any, both in fp32 and their sum rounded once. Where such convolutions round to TF32, 16-bit images
and weights lose nothing by it; where they do not, one convolution with W + Delta does. One product: the library's
convolution with the rounded weight.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fade_kernels import choices, reference
from fade_kernels.cuda.linear import (
    masked_lora_linear,
    masked_lora_linear_factor_gradients,
    masked_lora_linear_input_gradient,
    masked_values_linear,
    masked_values_linear_gradient,
    masked_values_linear_input_gradient,
)
from fade_kernels.cuda.merging import lora_weight, on, values_weight
from fade_kernels.mask_facts import Channels, active_channels
from fade_kernels.masked_lora import REGIMES, pixels
from fade_kernels.window import Window


def _one_product(like: Tensor, seed: int | None, rounded: Tensor | None) -> bool:
    return rounded is not None or (seed is not None and like.dtype.itemsize == 2)


def _one_convolution(x: Tensor) -> bool:
    return x.dtype == torch.float32 and not (x.is_cuda and torch.backends.cudnn.conv.fp32_precision == "tf32")


def _compact(mask_words: Tensor, in_channels: int, kernel: Sequence[int]) -> Channels:
    """Channels that the mask touches, where they are so few that it pays to compute on copies of them; else None."""
    active = active_channels(mask_words, in_channels, kernel)
    most = choices.THRESHOLDS.compact_channels
    return Channels(
        *(
            index if index is not None and 0 < index.numel() <= most * size else None
            for index, size in zip(active, (mask_words.shape[0], in_channels), strict=True)
        )
    )


def _select(tensor: Tensor, dim: int, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor.index_select(dim, index)


def _conv2d(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, delta: Tensor, mask_words: Tensor, window: Window
) -> Tensor:
    """conv(x, W) + conv(x, Delta) of fp32 images x, for Delta [C_out, C_in, kh, kw]."""
    channels = _compact(mask_words, delta.shape[1], list(delta.shape[2:]))
    part = _select(_select(delta, 0, channels.rows), 1, channels.inputs)
    term = F.conv2d(_select(x, 1, channels.inputs), part, None, *window)
    if weight is None:
        y = term.new_zeros((x.shape[0], delta.shape[0], *term.shape[2:]))
    else:
        y = F.conv2d(x, weight.float(), None, *window)
    if bias is not None:
        y += bias.reshape(-1, 1, 1)
    return y.add_(term) if channels.rows is None else y.index_add_(1, channels.rows, term)


def _conv2d_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    delta: Tensor,
    mask_words: Tensor,
    input_size: list[int],
    window: Window,
) -> Tensor:
    channels = _compact(mask_words, delta.shape[1], list(delta.shape[2:]))
    part = _select(_select(delta, 0, channels.rows), 1, channels.inputs)
    size = [input_size[0], part.shape[1], *input_size[2:]]
    term = torch.nn.grad.conv2d_input(size, part, _select(grad_output, 1, channels.rows), *window)
    if weight is None:
        dx = term.new_zeros(input_size)
    else:
        dx = torch.nn.grad.conv2d_input(input_size, weight.float(), grad_output, *window)
    return dx.add_(term) if channels.inputs is None else dx.index_add_(1, channels.inputs, term)


def _on_pixels(images: Tensor, kernel: list[int], window: Window) -> bool:
    """Whether a convolution is computed as a linear layer on the pixels, seen as rows.

    1 x 1 is, but for images that would have to be copied into channels last where one convolution with W + Delta does.
    """
    if not window.is_linear(kernel):
        return False
    return images.is_contiguous(memory_format=torch.channels_last) or not _one_convolution(images)


def _flat(weight: Tensor | None) -> Tensor | None:
    """A convolution's weight as [C_out, C_in kh kw]."""
    return None if weight is None else weight.flatten(1)


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """[n h w, C] -> [n, C, h, w] for images of the size of `like`."""
    return rows.reshape(like.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)


def masked_lora_conv2d(
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
    """Forward of x [n, C_in, h, w]."""
    shape = (lora_b.shape[0], *lora_a.shape[1:])
    delta = (lora_a.flatten(1), lora_b.flatten(1), mask_words, scale)
    if _one_product(x, seed, rounded):
        effective = lora_weight(x.dtype, _flat(weight), *delta, seed).reshape(shape) if rounded is None else rounded
        y = F.conv2d(x, effective, bias, *window)
    elif _on_pixels(x, list(shape[2:]), window):
        y = _images(masked_lora_linear(pixels(x), _flat(weight), bias, *delta, REGIMES["auto"]), x)
    else:
        wide = x.float()
        if _one_convolution(wide):
            effective = lora_weight(wide.dtype, _flat(weight), *delta).reshape(shape)
            y = F.conv2d(wide, effective, None if bias is None else bias.float(), *window)
        else:
            y = _conv2d(wide, weight, bias, lora_weight(wide.dtype, None, *delta).reshape(shape), mask_words, window)
        y = y.to(x.dtype)
    return reference.in_layout_of(x, y)


def masked_lora_conv2d_input_gradient(
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
    """dX of `masked_lora_conv2d`."""
    shape = (lora_b.shape[0], *lora_a.shape[1:])
    delta = (lora_a.flatten(1), lora_b.flatten(1), mask_words, scale)
    if _one_product(grad_output, seed, rounded):
        effective = rounded
        if effective is None:
            effective = lora_weight(grad_output.dtype, _flat(weight), *delta, seed).reshape(shape)
        dx = torch.nn.grad.conv2d_input(input_size, effective, grad_output, *window)
    elif _on_pixels(grad_output, list(shape[2:]), window):
        rows = masked_lora_linear_input_gradient(pixels(grad_output), _flat(weight), *delta, REGIMES["auto"])
        dx = _images(rows, grad_output)
    else:
        wide = grad_output.float()
        if _one_convolution(wide):
            effective = lora_weight(wide.dtype, _flat(weight), *delta).reshape(shape)
            dx = torch.nn.grad.conv2d_input(input_size, effective, wide, *window)
        else:
            added = lora_weight(wide.dtype, None, *delta).reshape(shape)
            dx = _conv2d_input_gradient(wide, weight, added, mask_words, list(input_size), window)
        dx = dx.to(grad_output.dtype)
    return reference.in_layout_of(grad_output, dx)


def masked_lora_conv2d_factor_gradients(
    grad_output: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    window: Window,
) -> tuple[Tensor, Tensor]:
    """dA, dB of `masked_lora_conv2d`; k x k by the library's weight gradient, contracted and freed."""
    kernel, factors = list(lora_a.shape[2:]), (lora_a.flatten(1), lora_b.flatten(1), mask_words, scale)
    if window.is_linear(kernel):
        grads = masked_lora_linear_factor_gradients(pixels(grad_output), pixels(x), *factors, REGIMES["auto"])
    else:
        size = (grad_output.shape[1], x.shape[1], *kernel)
        gradient = torch.nn.grad.conv2d_weight(x, size, grad_output, *window).flatten(1)
        grads = torch.ops.fade_kernels.masked_factor_gradients(gradient, *factors)
    return grads[0].reshape(lora_a.shape), grads[1].reshape(lora_b.shape)


def masked_values_conv2d(
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
    """`masked_lora_conv2d` with the delta given by its values."""
    shape = (mask_words.shape[0], x.shape[1], *kernel_size)
    delta = (values, mask_words, scale)
    columns = shape[1] * shape[2] * shape[3]
    if _one_product(x, seed, rounded):
        effective = rounded
        if effective is None:
            effective = values_weight(x.dtype, _flat(weight), *delta, columns, seed).reshape(shape)
        y = F.conv2d(x, effective, bias, *window)
    elif _on_pixels(x, kernel_size, window):
        y = _images(masked_values_linear(pixels(x), _flat(weight), bias, *delta, REGIMES["auto"]), x)
    else:
        wide = x.float()
        if _one_convolution(wide):
            effective = values_weight(wide.dtype, _flat(weight), *delta, columns).reshape(shape)
            y = F.conv2d(wide, effective, None if bias is None else bias.float(), *window)
        else:
            added = values_weight(wide.dtype, None, *delta, columns).reshape(shape)
            y = _conv2d(wide, weight, bias, added, mask_words, window)
        y = y.to(x.dtype)
    return reference.in_layout_of(x, y)


def masked_values_conv2d_input_gradient(
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
    """dX of `masked_values_conv2d`."""
    shape = (mask_words.shape[0], input_size[1], *kernel_size)
    delta = (values, mask_words, scale)
    columns = shape[1] * shape[2] * shape[3]
    if _one_product(grad_output, seed, rounded):
        effective = rounded
        if effective is None:
            effective = values_weight(grad_output.dtype, _flat(weight), *delta, columns, seed).reshape(shape)
        dx = torch.nn.grad.conv2d_input(input_size, effective, grad_output, *window)
    elif _on_pixels(grad_output, kernel_size, window):
        rows = pixels(grad_output)
        flat_dx = masked_values_linear_input_gradient(rows, _flat(weight), *delta, shape[1], REGIMES["auto"])
        dx = _images(flat_dx, grad_output)
    else:
        wide = grad_output.float()
        if _one_convolution(wide):
            effective = values_weight(wide.dtype, _flat(weight), *delta, columns).reshape(shape)
            dx = torch.nn.grad.conv2d_input(input_size, effective, wide, *window)
        else:
            added = values_weight(wide.dtype, None, *delta, columns).reshape(shape)
            dx = _conv2d_input_gradient(wide, weight, added, mask_words, list(input_size), window)
        dx = dx.to(grad_output.dtype)
    return reference.in_layout_of(grad_output, dx)


def masked_values_conv2d_gradient(
    grad_output: Tensor,
    x: Tensor,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    kernel_size: list[int],
    window: Window,
) -> Tensor:
    """dV of `masked_values_conv2d`."""
    if window.is_linear(kernel_size):
        rows = (pixels(grad_output), pixels(x))
        return masked_values_linear_gradient(*rows, values, mask_words, scale, REGIMES["auto"])
    size = (grad_output.shape[1], x.shape[1], *kernel_size)
    gradient = torch.nn.grad.conv2d_weight(x, size, grad_output, *window)
    gathered = torch.ops.fade_kernels.gather_masked(gradient, mask_words, values.numel()).float()
    return (on(scale, gathered) * gathered).to(values.dtype)
