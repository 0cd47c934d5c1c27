"""Kernels of sparse unlearning: masks, masked LoRA, streaming saliency and exact selection, as PyTorch operators.

The whole public surface, and nothing else. Usable without the `fade` package, diffusers or peft.
"""

from fade_kernels import _ops  # noqa: F401  defines the operators, which the extension then registers kernels for
from fade_kernels._extension import build_info
from fade_kernels.bitmask import BitMask, gather_masked, scatter_masked_

__version__ = "0.1.0"

__all__ = [
    "BitMask",
    "build_info",
    "gather_masked",
    "scatter_masked_",
]
