"""Whether tensors share memory: what operators that write into their arguments refuse, because threads and blocks would
read what others have written already. Under torch.compile nothing is asked: its tensors have no memory yet.
"""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace

import numpy
import torch
from torch import Tensor

_MOST_WORK = 10_000
"""Steps of numpy's search for a common element of two strided tensors, after which they count as sharing one."""


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether a byte belongs to both; of views that interlace without touching, such as even and odd columns, none."""
    if not (_has_memory(first) and _has_memory(second)):
        return False
    (begin, end), (other_begin, other_end) = _span(first), _span(second)
    if end <= other_begin or other_end <= begin:
        return False
    if first.is_contiguous() and second.is_contiguous():
        return True
    try:
        return numpy.shares_memory(_addresses(first), _addresses(second), max_work=_MOST_WORK)
    except numpy.exceptions.TooHardError:
        return True


def same_memory(first: Tensor, second: Tensor) -> bool:
    """Whether both are the same elements in the same order."""
    return (
        first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first.dtype == second.dtype
    )


def find_shared(written: Sequence[Tensor], read: Iterable[Tensor] = ()) -> tuple[int, int] | None:
    """Indices of two tensors, counted through `written` and then `read`, that share memory; the first is written.

    `written[i]` may be `read[i]` itself. None where all is well.
    """
    if torch.compiler.is_compiling():
        return None
    tensors = [*written, *read]
    spans = sorted((*_span(tensor), i) for i, tensor in enumerate(tensors) if _has_memory(tensor))
    open_spans: list[tuple[int, int]] = []  # (end, index) of those that begin before the current one ends
    for begin, end, i in spans:
        open_spans = [entry for entry in open_spans if entry[0] > begin]
        for _, j in open_spans:
            low, high = min(i, j), max(i, j)
            if low >= len(written) or (high == len(written) + low and same_memory(tensors[low], tensors[high])):
                continue
            if share_memory(tensors[low], tensors[high]):
                return low, high
        open_spans.append((end, i))
    return None


def _has_memory(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type != "meta" and tensor.numel() > 0


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the one after its last."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.itemsize


def _addresses(tensor: Tensor) -> numpy.ndarray:
    """An array of the tensor's addresses, wherever they are: nothing is read."""
    size = tensor.itemsize
    interface = {
        "version": 3,
        "data": (tensor.data_ptr(), True),
        "shape": tuple(tensor.shape),
        "strides": tuple(stride * size for stride in tensor.stride()),
        "typestr": f"|V{size}",
    }
    return numpy.asarray(SimpleNamespace(__array_interface__=interface))
