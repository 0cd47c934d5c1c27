"""FADE_KERNELS, read once: which kind of kernel the user forces.

Unset, every tensor gets the fastest kernel its device has. `reference`: the definitions in plain PyTorch, everywhere.
`cpu`: the compiled CPU kernels or an error; CUDA tensors get definitions. `triton`: Triton alone on CUDA (and, under
TRITON_INTERPRET=1, on the CPU, block by block). `cuda`: the compiled CUDA library alone on CUDA.
"""

import os

CHOICES = ("reference", "cpu", "triton", "cuda")

FORCED = os.environ.get("FADE_KERNELS", "")
INTERPRETED = FORCED == "triton" and os.environ.get("TRITON_INTERPRET") == "1"

if FORCED and FORCED not in CHOICES:
    raise ImportError(f"FADE_KERNELS must be one of {', '.join(CHOICES)} or unset, not {FORCED!r}")
