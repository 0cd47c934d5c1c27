"""Kernels of sparse unlearning: masks, masked LoRA, masked least squares, streaming saliency and exact selection,
as PyTorch operators.

The whole public surface, and nothing else. Usable without the `fade` package, diffusers or peft.
"""

from fade_kernels import (
    _ops,  # noqa: F401  defines the operators, which extension and registration then serve
    registration,  # noqa: F401  registers the GPU kernels, and imports none of them yet
)
from fade_kernels._extension import build_info
from fade_kernels.bitmask import BitMask, gather_masked, scatter_masked_
from fade_kernels.least_squares import masked_least_squares, masked_least_squares_prices
from fade_kernels.masked_lora import (
    effective_weight,
    effective_weights,
    effective_weights_from_values,
    masked_factor_values,
    masked_lora_conv2d,
    masked_lora_linear,
    masked_values_conv2d,
    masked_values_linear,
)
from fade_kernels.saliency import (
    GradientMagnitude,
    accumulate_gradient_magnitude_,
    accumulate_linear_gradient_magnitude_,
)
from fade_kernels.selection import GroupedSelection, Selection, select_top_fraction
from fade_kernels.weight_shape import weight_shape

__version__ = "0.1.0"

__all__ = [
    "BitMask",
    "GradientMagnitude",
    "GroupedSelection",
    "Selection",
    "accumulate_gradient_magnitude_",
    "accumulate_linear_gradient_magnitude_",
    "build_info",
    "effective_weight",
    "effective_weights",
    "effective_weights_from_values",
    "gather_masked",
    "masked_factor_values",
    "masked_least_squares",
    "masked_least_squares_prices",
    "masked_lora_conv2d",
    "masked_lora_linear",
    "masked_values_conv2d",
    "masked_values_linear",
    "scatter_masked_",
    "select_top_fraction",
    "weight_shape",
]
