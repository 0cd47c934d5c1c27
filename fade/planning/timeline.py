"""Memory that a piece of work would take, counted while it runs on the meta device: nothing is computed, and every
tensor that autograd or anybody else keeps alive is counted for as long as it is there, once for each storage.

What kernels allocate inside themselves is not seen, and attention is taken to run in a fused kernel, as it does on GPUs
and CPUs alike.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Segment:
    """Bytes that a part of the work leaves behind, and the most that were there meanwhile, both beyond its start."""

    left: int
    peak: int


class Timeline(TorchDispatchMode):
    """Counts the bytes of all storages that are made while it is on, from one `mark` to the next; those of tensors that
    were `there` before are no part of it."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self.segments: dict[Any, Segment] = {}
        self._there = [tensor.untyped_storage() for tensor in there]  # held, so that no other storage gets their keys
        self._alive: dict[int, Any] = dict.fromkeys(storage._cdata for storage in self._there)
        self._bytes = self._most = self._start = 0
        self._label: Any = "start"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = _called_once(func, args, kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self._bytes -= size

        self._alive[key] = weakref.ref(storage, gone)
        self._bytes += size
        self._most = max(self._most, self._bytes)

    def mark(self, label: Any) -> None:
        """Ends a segment and begins the one named."""
        self.segments[self._label] = Segment(self._bytes - self._start, self._most - self._start)
        self._label, self._start, self._most = label, self._bytes, self._bytes

    def end(self) -> None:
        self.mark(None)


_results: dict[Any, tuple[Any, ...]] = {}
"""Sizes, strides and dtypes of what operators return, by what they were given."""


def _called_once(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator's result. Working out what it looks like takes longer than making it anew, and blocks repeat."""
    if func.overloadpacket in _WRITES:
        return args[0]
    schema = func._schema
    if schema.is_mutable or any(one.alias_info is not None for one in schema.returns):
        return func(*args, **kwargs)
    try:
        key = (func, _looks(args), *((name, _looks(value)) for name, value in kwargs.items()))
        known = _results.get(key)
    except TypeError:  # something that is not hashable, or not on the meta device
        return func(*args, **kwargs)
    if known is None:
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, tuple) else (result,)
        if all(one is None or (type(one) is Tensor and one.is_meta) for one in outputs):
            if len(_results) > _MOST_RESULTS:
                _results.clear()
            _results[key] = tuple(one if one is None else (one.shape, one.stride(), one.dtype) for one in outputs)
        return result
    outputs = tuple(one if one is None else torch.empty_strided(*one[:2], dtype=one[2], device="meta") for one in known)
    return outputs if len(schema.returns) > 1 else outputs[0]


_MOST_RESULTS = 50_000

_WRITES = {
    getattr(torch.ops.aten, name) for name in ("add_", "sub_", "mul_", "div_", "addcmul_", "copy_", "zero_", "fill_")
}
"""They leave everything about a tensor as it is but its numbers, of which there are none."""


def _looks(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError
        return value.shape, value.stride(), value.dtype
    return tuple(map(_looks, value)) if isinstance(value, tuple | list) else (type(value), value)


def peak(segments: Sequence[Segment]) -> int:
    """The most bytes that are there at once in segments that follow one another."""
    most = at = 0
    for segment in segments:
        most = max(most, at + segment.peak)
        at += segment.left
    return most


# --- attention -------------------------------------------------------------------------------------------------------


class _FusedAttention(torch.autograd.Function):
    """Keeps queries, keys, values, the output and a float32 number for each query and head, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Kernels write the heads of a token side by side.
        *batch, heads, tokens, width = *query.shape[:-1], value.shape[-1]
        output = query.new_empty(*batch, tokens, heads, width).transpose(-3, -2)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _FusedAttention.apply(query, key, value)


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """On the meta device attention would be computed score by score; no device does that any more."""
    with mock.patch.object(F, "scaled_dot_product_attention", _attention):
        yield


# --- repeated blocks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """Blocks of one shape in a list, of which `kept` (first, middle, last) stand for `count`."""

    kept: tuple[nn.Module, ...]
    count: int


@contextlib.contextmanager
def shortened(model: nn.Module) -> Iterator[list[_Run]]:
    """The model with three of each run of equal blocks meanwhile; what happens from one block to the next is the same
    for every one but the first and the last."""
    runs, before = [], []
    inside: set[nn.Module] = set()  # a block, of which what it chooses among (experts) is a part
    for module in list(model.modules()):
        if not isinstance(module, nn.ModuleList) or len(module) < 4 or module in inside or not _called(module):
            continue
        inside.update(module.modules())
        groups: list[list[nn.Module]] = []
        for block in module:
            if groups and _shape(groups[-1][-1]) == _shape(block):
                groups[-1].append(block)
            else:
                groups.append([block])
        kept = []
        for group in groups:
            if len(group) > 3:
                runs.append(_Run((group[0], group[1], group[-1]), len(group)))
                group = [group[0], group[1], group[-1]]
            kept += group
        if len(kept) < len(module):
            before.append((module, dict(module._modules)))
            module._modules.clear()
            module._modules.update({str(index): block for index, block in enumerate(kept)})
    try:
        yield runs
    finally:
        for module, modules in before:
            module._modules.clear()
            module._modules.update(modules)


def _called(blocks: nn.ModuleList) -> bool:
    """Whether these are blocks, which hand a tensor on from one to the next, and not single layers, of which each may
    be for another of them."""
    return sum(isinstance(inner, nn.Linear | nn.Conv2d) for inner in blocks[0].modules()) > 2


def _shape(block: nn.Module) -> tuple[Any, ...]:
    return type(block), tuple((name, parameter.shape) for name, parameter in block.named_parameters())


@contextlib.contextmanager
def marked(timeline: Timeline, runs: Sequence[_Run]) -> Iterator[None]:
    """Marks where the forward and the backward pass of each kept block begin."""
    handles = []

    def begins(run: int, place: int) -> Any:
        def before(*_: Any) -> None:
            if torch._C._current_graph_task_id() == -1:  # not where checkpointing computes it again
                timeline.mark(("forward", run, place))

        return before

    def ends(run: int, place: int) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return
            outputs = output if isinstance(output, tuple | list) else (output,)
            for tensor in outputs:
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: timeline.mark(("backward", run, place)))
                    return

        return after

    for number, run in enumerate(runs):
        for place, block in enumerate(run.kept):
            handles.append(block.register_forward_pre_hook(begins(number, place)))
            handles.append(block.register_forward_hook(ends(number, place)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def unrolled(timeline: Timeline, runs: Sequence[_Run]) -> list[Segment]:
    """The segments of the whole model, from those of the shortened one."""
    segments = []
    for label, segment in timeline.segments.items():
        middle = isinstance(label, tuple) and label[2] == 1
        segments += [segment] * (runs[label[1]].count - 2 if middle else 1)
    return segments
