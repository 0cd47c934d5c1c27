"""Wall time and peak memory of a piece of work, on whichever device it runs.

Both stages are measured with it, because a cost figure that leaves one of them out says nothing.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psutil
import torch


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
