"""Operators on packed masks, and on weights at a mask's positions: csrc/*/bitmask.*."""

import torch
from torch import Tensor

from fade_kernels import reference
from fade_kernels._ops.define import check_mask_words, check_same_device, define, no_output, shape_of, words_per_row


def _check_pack_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask must be bool, not {mask.dtype}: compare first, e.g. `mask != 0`")
    if mask.dim() != 2:
        raise ValueError(f"a mask must have two dimensions [N, K], not {shape_of(mask)}")


def _check_unpack_mask(mask_words: Tensor, columns: int) -> None:
    check_mask_words(mask_words, columns=columns)


def _check_mask_occupancy(mask_words: Tensor, columns: int, tile_n: int, tile_k: int) -> None:
    check_mask_words(mask_words, columns=columns)
    if tile_n < 1 or tile_k < 1:
        raise ValueError(f"tile sizes must be at least 1, got {tile_n} x {tile_k}")


pack_mask = define(
    "pack_mask(Tensor mask) -> Tensor",
    check=_check_pack_mask,
    fake=lambda mask: mask.new_empty((mask.shape[0], words_per_row(mask.shape[1])), dtype=torch.int32),
    default=reference.pack_mask,
)

unpack_mask = define(
    "unpack_mask(Tensor mask_words, int columns) -> Tensor",
    check=_check_unpack_mask,
    fake=lambda mask_words, columns: mask_words.new_empty((mask_words.shape[0], columns), dtype=torch.bool),
    default=reference.unpack_mask,
)

mask_row_counts = define(
    "mask_row_counts(Tensor mask_words, int columns) -> Tensor",
    check=_check_unpack_mask,
    fake=lambda mask_words, columns: mask_words.new_empty((mask_words.shape[0],), dtype=torch.int64),
    default=reference.mask_row_counts,
)

mask_occupancy = define(
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
        raise ValueError(f"a masked weight must have at least two dimensions, not {shape_of(weight)}")
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
        raise ValueError(f"values must be one-dimensional [nnz], not {shape_of(values)}")


gather_masked = define(
    "gather_masked(Tensor weight, Tensor mask_words, int count) -> Tensor",
    check=_check_gather_masked,
    fake=lambda weight, mask_words, count: weight.new_empty((count,)),
    default=reference.gather_masked,
)

scatter_masked_ = define(
    "scatter_masked_(Tensor(a!) weight, Tensor values, Tensor mask_words) -> ()",
    check=_check_scatter_masked_,
    fake=no_output,
    default=reference.scatter_masked_,
)
