"""Every operator of `fade_kernels::` in one place: schema, checks, fake, default kernel (its definition) and autograd.

Compiled libraries only register kernels for the operators defined here, so that an operator exists, with its
definition, on every device and where nothing was compiled. Definitions: `reference.py`; public functions: the modules beside it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fade_kernels import reference

# The library object owns the definitions: they live as long as this module.
_LIBRARY = torch.library.Library("fade_kernels", "DEF")


def _define(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    default: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines one operator and returns the function that checks its arguments and calls it.

    Args:
        schema: `name(arguments) -> returns` in torch.library's schema language.
        check: takes the operator's arguments; raises ValueError or TypeError that says what to do.
        fake: shapes and dtypes of the outputs, for tracing.
        default: the definition in plain PyTorch, used on every device that has no kernel of its own.
        setup_context, backward: autograd, as for torch.library.register_autograd; None: not differentiable.
    """
    name = schema.split("(", 1)[0]
    qualified = f"fade_kernels::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    torch.library.register_fake(qualified, checked_fake, lib=_LIBRARY)
    _LIBRARY.impl(name, default, "CompositeExplicitAutograd")
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    operator = getattr(torch.ops.fade_kernels, name).default

    def call(*args: Any) -> Any:
        check(*args)
        return operator(*args)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"Checks its arguments and calls torch.ops.{qualified.replace('::', '.')}: `{schema}`."
    return call


def _no_output(*_: Any) -> None:
    """Fake of an operator that only writes into its arguments."""


# --- checks shared by several operators ------------------------------------------------------------------------------


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def words_per_row(columns: int) -> int:
    """Number of 32-bit words that hold a row of `columns` mask bits."""
    return (columns + 31) // 32


def check_mask_words(words: Tensor, rows: int | None = None, columns: int | None = None) -> None:
    """Raises unless `words` is int32 [rows, ceil(columns/32)]; None leaves a size open."""
    if words.dtype != torch.int32:
        raise TypeError(f"mask words must be int32, not {words.dtype}: use BitMask.pack to make them")
    if words.dim() != 2:
        raise ValueError(f"mask words must have two dimensions [N, ceil(K/32)], not {_shape(words)}")
    if rows is not None and words.shape[0] != rows:
        raise ValueError(f"the mask has {words.shape[0]} rows, the weight {rows}")
    if columns is not None and words.shape[1] != words_per_row(columns):
        raise ValueError(
            f"mask words {_shape(words)} do not fit {columns} columns, which need {words_per_row(columns)} words a row"
        )


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all given tensors are on one device."""
    present = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(present.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in present.items())
        raise ValueError(f"all tensors must be on one device, got {where}: move them with .to(device)")


# --- pack_mask, unpack_mask, mask_row_counts, mask_occupancy ---------------------------------------------------------


def _check_pack_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask must be bool, not {mask.dtype}: compare first, e.g. `mask != 0`")
    if mask.dim() != 2:
        raise ValueError(f"a mask must have two dimensions [N, K], not {_shape(mask)}")


def _check_unpack_mask(mask_words: Tensor, columns: int) -> None:
    check_mask_words(mask_words, columns=columns)


def _check_mask_occupancy(mask_words: Tensor, columns: int, tile_n: int, tile_k: int) -> None:
    check_mask_words(mask_words, columns=columns)
    if tile_n < 1 or tile_k < 1:
        raise ValueError(f"tile sizes must be at least 1, got {tile_n} x {tile_k}")


pack_mask = _define(
    "pack_mask(Tensor mask) -> Tensor",
    check=_check_pack_mask,
    fake=lambda mask: mask.new_empty((mask.shape[0], words_per_row(mask.shape[1])), dtype=torch.int32),
    default=reference.pack_mask,
)

unpack_mask = _define(
    "unpack_mask(Tensor mask_words, int columns) -> Tensor",
    check=_check_unpack_mask,
    fake=lambda mask_words, columns: mask_words.new_empty((mask_words.shape[0], columns), dtype=torch.bool),
    default=reference.unpack_mask,
)

mask_row_counts = _define(
    "mask_row_counts(Tensor mask_words) -> Tensor",
    check=check_mask_words,
    fake=lambda mask_words: mask_words.new_empty((mask_words.shape[0],), dtype=torch.int64),
    default=reference.mask_row_counts,
)

mask_occupancy = _define(
    "mask_occupancy(Tensor mask_words, int columns, int tile_n, int tile_k) -> Tensor",
    check=_check_mask_occupancy,
    fake=lambda mask_words, columns, tile_n, tile_k: mask_words.new_empty(
        (-(-mask_words.shape[0] // tile_n), -(-columns // tile_k)), dtype=torch.bool
    ),
    default=reference.mask_occupancy,
)


# --- gather_masked, scatter_masked_ ----------------------------------------------------------------------------------


def check_masked_weight(weight: Tensor, mask_words: Tensor) -> None:
    """Raises unless `weight` [N, ...] has at least two dimensions and `mask_words` fit it seen as [N, K]."""
    if weight.dim() < 2:
        raise ValueError(f"a masked weight must have at least two dimensions, not {_shape(weight)}")
    columns = 1
    for size in weight.shape[1:]:
        columns *= size
    check_mask_words(mask_words, weight.shape[0], columns)
    check_same_device(weight=weight, mask=mask_words)


def _check_gather_masked(weight: Tensor, mask_words: Tensor, count: int) -> None:
    check_masked_weight(weight, mask_words)
    if count < 0:
        raise ValueError(f"count must be the number of set bits, got {count}")


def _check_scatter_masked_(weight: Tensor, values: Tensor, mask_words: Tensor) -> None:
    check_masked_weight(weight, mask_words)
    check_same_device(weight=weight, values=values)
    if values.dtype != weight.dtype:
        raise TypeError(f"values are {values.dtype}, the weight {weight.dtype}: cast the values to the weight's dtype")
    if values.dim() != 1:
        raise ValueError(f"values must be one-dimensional [nnz], not {_shape(values)}")


gather_masked = _define(
    "gather_masked(Tensor weight, Tensor mask_words, int count) -> Tensor",
    check=_check_gather_masked,
    fake=lambda weight, mask_words, count: weight.new_empty((count,)),
    default=reference.gather_masked,
)

scatter_masked_ = _define(
    "scatter_masked_(Tensor(a!) weight, Tensor values, Tensor mask_words) -> ()",
    check=_check_scatter_masked_,
    fake=_no_output,
    default=reference.scatter_masked_,
)
