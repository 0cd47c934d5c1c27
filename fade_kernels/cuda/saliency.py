"""Gradient magnitudes of linear layers on a CUDA device."""

import torch
from torch import Tensor

from fade_kernels import choices
from fade_kernels.cuda.precision import precision, tf32


def accumulate_linear_gradient_magnitude_(
    saliency: Tensor, grad_output: Tensor, input: Tensor, magnitude: str, per_sample: bool
) -> None:
    """S += |dY^T X|; the choice: `choose_linear_magnitude`."""
    from fade_kernels.triton_kernels import weight_gradient_magnitude as kernel

    if saliency.numel() == 0 or input.numel() == 0 or grad_output.numel() == 0:
        return
    dtype = torch.promote_types(grad_output.dtype, input.dtype)
    grad_output, input = grad_output.to(dtype), input.to(dtype)
    if not saliency.is_contiguous():
        scratch = saliency.contiguous()
        accumulate_linear_gradient_magnitude_(scratch, grad_output, input, magnitude, per_sample)
        saliency.copy_(scratch)
    elif choices.choose_linear_magnitude(input.dtype, tf32(input)) == "fused":
        kernel.accumulate_linear_gradient_magnitude_(
            saliency, grad_output, input, magnitude, per_sample, input_precision=precision(input)
        )
    else:
        samples = input.shape[0] if per_sample else 1
        dy = grad_output.reshape(samples, -1, saliency.shape[0])
        x = input.reshape(samples, -1, saliency.shape[1])
        for i in range(samples):
            gradient = dy[i].float().t() @ x[i].float()
            torch.ops.fade_kernels.accumulate_gradient_magnitude_([saliency], [gradient], magnitude)
