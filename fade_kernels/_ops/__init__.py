"""Every operator of `fade_kernels::`: schema, checks, fake, default kernel (its definition) and autograd.

One file for each source file of `csrc`; `define.py` says how an operator is made. Compiled libraries and compositions
only register kernels for the operators defined here, so that an operator exists, with its definition, on every device
and where nothing was compiled. Definitions: `reference.py`; public functions: the modules of `fade_kernels`.
"""

from fade_kernels._ops.conv2d import masked_lora_conv2d, masked_values_conv2d
from fade_kernels._ops.define import check_mask_words, implement, without_autocast, words_per_row
from fade_kernels._ops.gathered import (
    add_gathered_lora_,
    add_gathered_values_,
    sampled_factor_gradients,
    sampled_gradient,
)
from fade_kernels._ops.least_squares import masked_least_squares, masked_least_squares_rows_
from fade_kernels._ops.linear import (
    masked_lora_linear,
    masked_lora_linear_backward,
    masked_values_linear,
    masked_values_linear_backward,
)
from fade_kernels._ops.masks import (
    gather_masked,
    mask_occupancy,
    mask_row_counts,
    pack_mask,
    scatter_masked_,
    unpack_mask,
)
from fade_kernels._ops.merging import (
    effective_weight,
    effective_weight_from_values_out,
    effective_weight_out,
    effective_weights_from_values_out,
    effective_weights_out,
    masked_factor_gradients,
    masked_factor_values,
)
from fade_kernels._ops.saliency import (
    accumulate_gradient_magnitude_,
    accumulate_linear_gradient_magnitude_,
    check_mode,
)
from fade_kernels._ops.selection import select_top_k

__all__ = [
    "accumulate_gradient_magnitude_",
    "accumulate_linear_gradient_magnitude_",
    "add_gathered_lora_",
    "add_gathered_values_",
    "check_mask_words",
    "check_mode",
    "effective_weight",
    "effective_weight_from_values_out",
    "effective_weight_out",
    "effective_weights_from_values_out",
    "effective_weights_out",
    "gather_masked",
    "implement",
    "mask_occupancy",
    "mask_row_counts",
    "masked_factor_gradients",
    "masked_factor_values",
    "masked_least_squares",
    "masked_least_squares_rows_",
    "masked_lora_conv2d",
    "masked_lora_linear",
    "masked_lora_linear_backward",
    "masked_values_conv2d",
    "masked_values_linear",
    "masked_values_linear_backward",
    "pack_mask",
    "sampled_factor_gradients",
    "sampled_gradient",
    "scatter_masked_",
    "select_top_k",
    "unpack_mask",
    "without_autocast",
    "words_per_row",
]
