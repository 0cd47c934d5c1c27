"""What the launchers of the masked-LoRA linear's forward and input gradient share: arguments, precisions, ranks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fade_kernels.triton_kernels.launch import TRITON_DTYPES, CompileCase, Tiling
from fade_kernels.triton_kernels.tuning import Problem

GROUP_T = 16
"""Tiles of T per strip before the next strip: 16 x 128 rows of x stay in a 60 MB L2 up to 14000 channels in 16 bits."""

RANK_STEP = 16
"""Ranks at a time without tensor cores, where a dot is unrolled; also the least that tl.dot takes."""

MAX_RANK = 128


def with_unit_stride(matrix: Tensor) -> Tensor:
    """The matrix itself if the elements of a row follow each other, else a contiguous copy."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] <= 1 else matrix.contiguous()


def as_factors(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors in one dtype, with unit stride; factors of two dtypes become fp32."""
    if lora_a.dtype != lora_b.dtype:
        lora_a, lora_b = lora_a.float(), lora_b.float()
    return with_unit_stride(lora_a), with_unit_stride(lora_b)


def check_arguments(rank: int, input_precision: str, **matrices: Tensor | None) -> None:
    """Raises TypeError for an element type the kernels do not take, ValueError for a rank or precision they do not."""
    for name, tensor in matrices.items():
        if tensor is not None and tensor.dtype not in TRITON_DTYPES:
            raise TypeError(f"{name} must be float32, float16 or bfloat16 for the Triton kernels, not {tensor.dtype}")
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"the Triton kernels take ranks from 1 to {MAX_RANK}, not {rank}")
    if input_precision not in ("ieee", "tf32"):
        raise ValueError(f"input_precision must be 'ieee' or 'tf32', not {input_precision!r}")


def precision_constants(dtype: torch.dtype, rank: int, input_precision: str) -> dict[str, Any]:
    """The compile-time arguments that say how the factors' product and the two terms are computed.

    The product of the factors is a dot in the factors' own dtype, not in that of the activations: fp32 factors beside
    fp16 activations would lose to its subnormals what training has just begun to write into B. In TF32 the error of
    x Delta^T stays what the rounding of Delta to 16 bits makes it, 2^-9 or 2^-12 per element.
    """
    ieee = dtype == torch.float32 and input_precision == "ieee"
    padded = max(RANK_STEP, triton.next_power_of_2(rank))
    return {
        "BR": RANK_STEP if ieee else padded,
        "RANK_STEPS": ieee and padded > RANK_STEP,
        "INPUT_PRECISION": "ieee" if ieee else "tf32",
    }


def check_output(name: str, output: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Raises unless a kernel can write `output`: [T, C] of the activations' dtype or fp32, rows without gaps inside."""
    if tuple(output.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {list(output.shape)}")
    if output.dtype not in (dtype, torch.float32):
        raise TypeError(f"{name} must be {dtype} like the rows, or float32, not {output.dtype}")
    if output.stride(-1) != 1 and output.shape[-1] > 1:
        raise ValueError(f"{name} must have stride 1 in its last dimension, not {output.stride(-1)}")


def precision_name(dtype: torch.dtype, input_precision: str) -> str:
    """Element type and precision in one word: "fp32", "tf32", "fp16" or "bf16"."""
    return "tf32" if dtype == torch.float32 and input_precision == "tf32" else TRITON_DTYPES[dtype]


def problem(rows: Tensor, lora_a: Tensor, lora_b: Tensor, input_precision: str) -> Problem:
    """What the tiling of a launch depends on, for the rows' dtype and number and the factors' sizes."""
    (R, K), N = lora_a.shape, lora_b.shape[0]
    return Problem(precision_name(rows.dtype, input_precision), rows.shape[0], N, K, R)


def compile_cases_of(
    kernel: Any,
    name: str,
    pointers: Sequence[str],
    integers: Sequence[str],
    divisible: Sequence[str],
    candidates: Callable[[torch.dtype, int, str], tuple[Tiling, ...]],
    flags: Mapping[str, bool],
) -> list[CompileCase]:
    """The forms of a masked-LoRA kernel that ship: dtypes x tilings x ranks, fused and add, factors of two dtypes.

    fp16 compiles to the same code as bf16 but for the instruction's name: its fused form stands for all.
    """
    dtypes = {name: dtype for dtype, name in TRITON_DTYPES.items()}
    cases = []

    def add(dtype: str, rank: int, factors: str, form: str) -> None:
        element = "fp32" if dtype == "tf32" else dtype
        precision = "tf32" if dtype == "tf32" else "ieee"
        for tiling in candidates(dtypes[element], rank, precision):
            constants = {
                **tiling.blocks,
                **precision_constants(dtypes[element], rank, precision),
                **flags,
                "GROUP_T": GROUP_T,
                "HAS_WEIGHT": form != "add",
                "ADD": form == "add",
                "SKIP": form == "fused",
                "SCALE_POINTER": True,
            }
            if form == "add":
                constants |= dict.fromkeys(flags, False)
            signature = {
                **{pointer: f"*{element}" for pointer in pointers},
                **dict.fromkeys(("lora_a", "lora_b"), f"*{factors}"),
                **dict.fromkeys(("mask_words", "tiles", "counts"), "*i32"),
                "scale": "*fp32",
                **dict.fromkeys(integers, "i32"),
            }
            ordered = {
                argument: "constexpr" if argument in constants else signature[argument] for argument in kernel.arg_names
            }
            cases.append(
                CompileCase(
                    name=f"{name}, {form}, r = {rank}, {factors} factors",
                    kernel=kernel,
                    dtype=dtype,
                    signature=ordered,
                    constants=constants,
                    tiling=tiling,
                    tensor_cores=dtype != "fp32",
                    divisible_by_16=tuple(divisible),
                )
            )

    for dtype in ("bf16", "tf32", "fp32"):
        own = "fp32" if dtype == "tf32" else dtype
        for rank in (16, 128):
            add(dtype, rank, own, "fused")
            add(dtype, rank, own, "add")
    add("bf16", 16, "bf16", "fused, full mask")
    for rank in (32, 128):
        add("bf16", rank, "fp32", "fused")
    add("fp16", 16, "fp16", "fused")
    return cases
