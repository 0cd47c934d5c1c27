"""Wall time and peak memory of a piece of work, on whichever device it runs.

Both stages are measured with it, because a cost figure that leaves one of them out says nothing.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch


@dataclass
class Measurement:
    """`seconds` of wall time; `peak_memory_bytes`: resident set size on CPU, allocated device memory on CUDA."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0


@contextlib.contextmanager
def measured(device: torch.device | str = "cpu", interval: float = 0.005) -> Iterator[Measurement]:
    """Measures the block. On CPU the peak is sampled every `interval` seconds, so shorter spikes are not seen."""
    result = Measurement()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        try:
            yield result
        finally:
            torch.cuda.synchronize(device)
            result.seconds = time.perf_counter() - start
            result.peak_memory_bytes = torch.cuda.max_memory_allocated(device)
        return

    process = psutil.Process()
    stop = threading.Event()

    def sample() -> None:
        while True:
            result.peak_memory_bytes = max(result.peak_memory_bytes, process.memory_info().rss)
            if stop.wait(interval):
                return

    sampler = threading.Thread(target=sample, name="peak-memory", daemon=True)
    sampler.start()
    start = time.perf_counter()
    try:
        yield result
    finally:
        result.seconds = time.perf_counter() - start
        stop.set()
        sampler.join()
