"""Wall time and peak memory of a piece of work, on whichever device it runs.

Both stages are measured with it, because a cost figure that leaves one of them out says nothing.
"""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Measurement:
    """`seconds` of wall time; `peak_memory_bytes`: resident set size on CPU, allocated device memory on CUDA."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    _read: Callable[[], tuple[float, int]] | None = field(default=None, repr=False, compare=False)

    def update(self) -> None:
        """Brings the numbers up to now while the block still runs; afterwards they stay as they are."""
        if self._read is not None:
            self.seconds, self.peak_memory_bytes = self._read()


@contextlib.contextmanager
def measured(
    device: torch.device | str = "cpu", interval: float = 0.005, earlier: Measurement | None = None
) -> Iterator[Measurement]:
    """Measures the block, on top of `earlier`, which was measured before an interruption of the same work.

    On CPU the peak is sampled every `interval` seconds, so shorter spikes are not seen.
    """
    earlier = earlier or Measurement()
    result = Measurement(earlier.seconds, earlier.peak_memory_bytes)
    with _peak_memory(torch.device(device), interval) as peak:
        start = time.perf_counter()
        result._read = lambda: (
            earlier.seconds + time.perf_counter() - start,
            max(earlier.peak_memory_bytes, peak()),
        )
        try:
            yield result
        finally:
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize(device)
            result.update()
            result._read = None


@contextlib.contextmanager
def _peak_memory(device: torch.device, interval: float) -> Iterator[Callable[[], int]]:
    """Yields what tells the peak so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    process, stop, largest = psutil.Process(), threading.Event(), [0]

    def look() -> int:
        largest[0] = max(largest[0], process.memory_info().rss)
        return largest[0]

    def sample() -> None:
        while not stop.wait(interval):
            look()

    sampler = threading.Thread(target=sample, name="peak-memory", daemon=True)
    sampler.start()
    try:
        yield look
    finally:
        stop.set()
        sampler.join()


def free_memory(device: torch.device | str) -> int:
    """Bytes that new tensors on the device can have: what nobody has, and on CUDA what PyTorch keeps for reuse."""
    device = torch.device(device)
    if device.type != "cuda":
        return psutil.virtual_memory().available
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reusable


@contextlib.contextmanager
def live_bytes(device: torch.device | str) -> Iterator[Callable[[], int]]:
    """Yields what tells the most bytes that tensors made in the block had at once, on the device's type.

    Counted tensor by tensor, and so alike on every device and whatever else the process does; what an operator takes
    for itself is not seen.
    """
    with _LiveStorages(torch.device(device).type) as storages:
        yield lambda: storages.most


class _LiveStorages(TorchDispatchMode):
    """Follows every storage that an operator returns until it is freed."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.most = 0
        self._device, self._now, self._known = device, 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._see(tensor, made=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._see(tensor, made=True)
        self.most = max(self.most, self._now)
        return result

    def _see(self, tensor: Any, made: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            size = storage.nbytes() if made else 0
            self._now += size
            weakref.finalize(storage, self._freed, storage._cdata, size).atexit = False

    def _freed(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self._now -= size


def human_bytes(count: int) -> str:
    """Bytes in decimal units: 43.1 kB."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
