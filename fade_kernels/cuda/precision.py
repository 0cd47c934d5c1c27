"""In which precision the device multiplies."""

import torch
from torch import Tensor


def tf32(tensor: Tensor) -> bool:
    """Whether products of a tensor may round to TF32."""
    # Not `allow_tf32`: reading it raises where the setting was made by this newer name; this follows both.
    return tensor.dtype == torch.float32 and tensor.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"


def precision(tensor: Tensor) -> str:
    """What the Triton kernels call it."""
    return "tf32" if tf32(tensor) else "ieee"
