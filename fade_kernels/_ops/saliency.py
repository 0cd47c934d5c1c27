"""Operators that accumulate gradient magnitudes: csrc/*/accumulate.*, triton_kernels/weight_gradient_magnitude.py."""

import torch
from torch import Tensor

from fade_kernels import reference
from fade_kernels._ops.define import check_same_device, define, no_output, shape_of

MODES = ("abs", "signed", "square")
GRADIENT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_mode(mode: str) -> None:
    """Raises ValueError unless `mode` names what a gradient adds to its accumulator."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")


def _check_accumulator(saliency: Tensor, name: str) -> None:
    if saliency.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, not {saliency.dtype}: 16-bit sums lose small gradients")


def _check_gradient_dtype(gradient: Tensor, name: str) -> None:
    if gradient.dtype not in GRADIENT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, not {gradient.dtype}")


def _check_accumulate(saliency: list[Tensor], gradient: list[Tensor], magnitude: str) -> None:
    check_mode(magnitude)
    if len(saliency) != len(gradient):
        raise ValueError(f"one gradient per accumulator is needed, got {len(saliency)} and {len(gradient)}")
    if len({id(tensor) for tensor in saliency}) < len(saliency):
        raise ValueError("an accumulator may appear only once in a call")
    for i, (s, g) in enumerate(zip(saliency, gradient, strict=True)):
        _check_accumulator(s, f"saliency[{i}]")
        _check_gradient_dtype(g, f"gradient[{i}]")
        if s.shape != g.shape:
            raise ValueError(f"gradient[{i}] is {shape_of(g)}, but saliency[{i}] is {shape_of(s)}")
        check_same_device(**{f"saliency[{i}]": s, f"gradient[{i}]": g})


def _check_accumulate_linear(
    saliency: Tensor, grad_output: Tensor, input: Tensor, magnitude: str, per_sample: bool
) -> None:
    check_mode(magnitude)
    _check_accumulator(saliency, "saliency")
    _check_gradient_dtype(grad_output, "grad_output")
    _check_gradient_dtype(input, "input")
    check_same_device(saliency=saliency, grad_output=grad_output, input=input)
    shapes = f"saliency {shape_of(saliency)}, grad_output {shape_of(grad_output)}, input {shape_of(input)}"
    if saliency.dim() != 2:
        raise ValueError(f"the accumulator of a linear layer must be [N, K], got {shapes}")
    fits = input.dim() >= 1 and input.shape[:-1] == grad_output.shape[:-1]
    if not fits or (*grad_output.shape[-1:], *input.shape[-1:]) != tuple(saliency.shape):
        raise ValueError(f"grad_output [..., N] and input [..., K] must fit an accumulator [N, K], got {shapes}")
    if per_sample and input.dim() < 2:
        raise ValueError(f"per_sample needs a leading sample dimension, got {shapes}")


# The schemas say `magnitude` because torch's functionalization reserves the argument name `mode` for itself.
accumulate_gradient_magnitude_ = define(
    "accumulate_gradient_magnitude_(Tensor(a!)[] saliency, Tensor[] gradient, str magnitude) -> ()",
    check=_check_accumulate,
    fake=no_output,
    default=reference.accumulate_gradient_magnitude_,
)

accumulate_linear_gradient_magnitude_ = define(
    "accumulate_linear_gradient_magnitude_("
    "Tensor(a!) saliency, Tensor grad_output, Tensor input, str magnitude, bool per_sample) -> ()",
    check=_check_accumulate_linear,
    fake=no_output,
    default=reference.accumulate_linear_gradient_magnitude_,
)
