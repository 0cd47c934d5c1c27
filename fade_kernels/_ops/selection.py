"""The exact top k of many tensors, as masks: csrc/*/select.*."""

import torch
from torch import Tensor

from fade_kernels import reference
from fade_kernels._ops.define import define, shape_of, words_per_row


def _check_select_top_k(scores: list[Tensor], k: int) -> None:
    if not scores:
        raise ValueError("there are no saliency tensors to select from")
    for i, s in enumerate(scores):
        if s.dtype != torch.float32:
            raise TypeError(f"saliency[{i}] must be float32, not {s.dtype}: convert it with .float()")
        if s.dim() < 2:
            raise ValueError(f"saliency[{i}] must have at least two dimensions [N, ...], not {shape_of(s)}")
        if s.device != scores[0].device:
            raise ValueError(f"saliency[{i}] is on {s.device}, saliency[0] on {scores[0].device}: move them together")
    total = sum(s.numel() for s in scores)
    if not 1 <= k <= total:
        raise ValueError(f"k must be between 1 and the number of values {total}, not {k}")


def _fake_select_top_k(scores: list[Tensor], k: int) -> tuple[list[Tensor], Tensor, Tensor]:
    words = []
    for s in scores:
        columns = 1
        for size in s.shape[1:]:
            columns *= size
        words.append(s.new_empty((s.shape[0], words_per_row(columns)), dtype=torch.int32))
    return words, scores[0].new_empty(()), scores[0].new_empty((), dtype=torch.int64)


# Third output: index of the first tensor with NaN or a negative value, -1 if there is none; the masks are then empty.
select_top_k = define(
    "select_top_k(Tensor[] scores, int k) -> (Tensor[] mask_words, Tensor threshold, Tensor invalid)",
    check=_check_select_top_k,
    fake=_fake_select_top_k,
    default=reference.select_top_k,
)
