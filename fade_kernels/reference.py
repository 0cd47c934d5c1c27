"""Each operator in plain PyTorch: the definition, the default kernel, and what tests compare the compiled kernels with.

Written for reading, not for speed; works on every device and, where the arithmetic is floating point, in the dtype of
its inputs, so that float64 inputs give a float64 definition. Schemas and checks: `_ops.py`.
"""

import torch
from torch import Tensor

# --- masks -----------------------------------------------------------------------------------------------------------


def pack_mask(mask: Tensor) -> Tensor:
    """Bool [N, K] -> int32 words [N, ceil(K/32)]; bit j of word w is column 32 w + j, padding bits are 0."""
    rows, columns = mask.shape
    padded = torch.nn.functional.pad(mask.to(torch.int64), (0, -columns % 32)).reshape(rows, (columns + 31) // 32, 32)
    unsigned = (padded << torch.arange(32, device=mask.device)).sum(dim=-1)
    # Two's complement by hand: values of 2^31 and above are the negative int32 with the same bits.
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def unpack_mask(mask_words: Tensor, columns: int) -> Tensor:
    """Int32 words [N, ceil(K/32)] -> bool [N, K], the inverse of `pack_mask`."""
    bits = (mask_words.unsqueeze(-1) >> torch.arange(32, device=mask_words.device, dtype=torch.int32)) & 1
    return bits.to(torch.bool).reshape(mask_words.shape[0], mask_words.shape[1] * 32)[:, :columns].contiguous()


def mask_row_counts(mask_words: Tensor) -> Tensor:
    """Number of set bits in each row: int64 [N]."""
    return unpack_mask(mask_words, mask_words.shape[1] * 32).sum(dim=1)


def mask_occupancy(mask_words: Tensor, columns: int, tile_n: int, tile_k: int) -> Tensor:
    """Which tile_n x tile_k tiles hold any set bit: bool [ceil(N/tile_n), ceil(K/tile_k)]."""
    mask = unpack_mask(mask_words, columns)
    rows = mask.shape[0]
    padded = torch.nn.functional.pad(mask, (0, -columns % tile_k, 0, -rows % tile_n))
    tiles = padded.reshape(-(-rows // tile_n), tile_n, -(-columns // tile_k), tile_k)
    return tiles.any(dim=3).any(dim=1)


def _weight_mask(weight: Tensor, mask_words: Tensor) -> Tensor:
    columns = weight[0].numel() if weight.shape[0] else 0
    return unpack_mask(mask_words, columns).reshape(weight.shape)


def gather_masked(weight: Tensor, mask_words: Tensor, count: int) -> Tensor:
    """The weight's values at the mask's positions, row-major: [count] in the weight's dtype."""
    values = weight[_weight_mask(weight, mask_words)]
    if values.numel() != count:
        raise ValueError(f"the mask has {values.numel()} set bits, not {count}")
    return values


def scatter_masked_(weight: Tensor, values: Tensor, mask_words: Tensor) -> None:
    """Writes values [nnz] into the weight at the mask's positions, row-major; everything else keeps its bits."""
    mask = _weight_mask(weight, mask_words)
    count = int(mask.sum())
    if values.numel() != count:
        raise ValueError(f"the mask has {count} set bits, but there are {values.numel()} values")
    weight[mask] = values
