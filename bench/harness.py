"""What every benchmark shares: interleaved timing, peak memory, and the facts that make a number readable later.

Candidates are timed in turns, so that drift of the machine meets all of them; what counts are ratios within one run.
On a GPU the time is the device's, between two events with the whole candidate queued between them, and the host's
time to queue it stands beside. Results are JSON files with quantiles, device, versions and commit beside the numbers.
"""

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fade_kernels
from bench.files import ROOT, write_json  # noqa: F401  the other programs write with it


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate: median, 20 % and 80 % quantiles, fastest run, number of runs.

    `host`: median of the seconds the host took to queue the work; None on the CPU, where that is the work itself.
    """

    median: float
    low: float
    high: float
    fastest: float
    repeats: int
    host: float | None = None

    @staticmethod
    def of(seconds: list[float], host: list[float] | None = None) -> "Timing":
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return Timing(
            statistics.median(ordered),
            ordered[round(0.2 * last)],
            ordered[round(0.8 * last)],
            ordered[0],
            len(ordered),
            statistics.median(host) if host else None,
        )


class DeviceLostError(RuntimeError):
    """An error after which the process can use the GPU no more, such as an illegal access."""


class Stopwatch:
    """Times one call at a time on the CPU or on a CUDA device.

    On CUDA the second-level cache is overwritten before every call, and the device is kept busy until the host has
    queued the whole call: otherwise short kernels would be timed by how fast Python launches them.
    """

    MOST_LEAD = 0.1  # seconds of device time that a wait for the host may cost
    CLOCK = 2e9  # cycles a second; a slower clock only lengthens the wait

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.lead: dict[str, float] = {}
        if self.device.type == "cuda":
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            self.flush = torch.empty(max(2 * cache, 2**26), dtype=torch.uint8, device=self.device)
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def time(self, name: str, call: Callable[[], Any]) -> tuple[float, float | None]:
        """Seconds of the device, and of the host where that is another; `name` remembers how long the host takes."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin, None
        self.flush.fill_(1)
        torch.cuda._sleep(int(self.CLOCK * min(self.lead.get(name, 0.0), self.MOST_LEAD)))
        self.events[0].record()
        begin = time.perf_counter()
        call()
        host = time.perf_counter() - begin
        self.events[1].record()
        torch.cuda.synchronize(self.device)
        self.lead[name] = 1.25 * host + 3e-5
        return self.events[0].elapsed_time(self.events[1]) * 1e-3, host


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 20,
    warmup: int = 2,
    budget: float = 60.0,
    prepare: Callable[[], Any] | None = None,
    device: torch.device | str = "cpu",
    least: int = 3,
) -> dict[str, Timing]:
    """Times every candidate once per round, in turns, with the order reversed every other round.

    Args:
        candidates: name -> call; what it returns is dropped within its own timing.
        repeats: rounds that are timed.
        warmup: rounds before that.
        budget: seconds after which no further timed round starts (`least` are always made).
        prepare: called before each candidate, outside the timing.
        device: where the work runs.
        least: timed rounds that are made whatever the budget.

    Returns:
        name -> Timing, in the order given.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    host_seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    stopwatch = Stopwatch(device)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(-warmup, repeats):
            if turn >= least and time.perf_counter() - start > budget:
                break
            for name in names if turn % 2 == 0 else reversed(names):
                if prepare is not None:
                    prepare()
                elapsed, host = stopwatch.time(name, candidates[name])
                if turn >= 0:
                    seconds[name].append(elapsed)
                    if host is not None:
                        host_seconds[name].append(host)
    finally:
        gc.enable()
    return {name: Timing.of(values, host_seconds[name]) for name, values in seconds.items()}


def device_memory(device: torch.device | str, call: Callable[[], Any]) -> int | None:
    """Peak bytes of device memory that a call adds to what is allocated, its results included; None on the CPU."""
    if torch.device(device).type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def still_alive(device: torch.device | str) -> None:
    """Raises DeviceLostError where an earlier error has left the device unusable."""
    if torch.device(device).type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceLostError(str(error).splitlines()[0]) from error


class PeakMemory:
    """Growth of this process's resident memory, in bytes: what `peak_memory()` yields."""

    extra: int = 0


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory can be measured on Linux only")


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Largest growth of resident memory inside the block, from the kernel's own high-water mark (Linux).

    Memory that the allocator kept from before is not seen as growth: measure in a fresh process.
    """
    result = PeakMemory()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident size
    before = _status("VmRSS")
    yield result
    result.extra = max(0, _status("VmHWM") - before)


def in_subprocess(module: str, *arguments: str) -> dict[str, Any]:
    """Runs `python -m module arguments` in a fresh process and returns the JSON of its last output line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    """What git answers; "" where there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu_facts() -> dict[str, Any] | None:
    """What a number from this GPU depends on; None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        state = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        state = None
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver, SM clock, its maximum, power limit": state,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def engine_version() -> str:
    """The last commit to the packages that are measured, with a + where they have changes of their own since."""
    packages = ("fade", "fade_kernels", "csrc")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *packages)
    return _git("log", "-1", "--format=%h", "--", *packages) + ("+" if changed else "")


def environment() -> dict[str, Any]:
    """Device, versions, commit and load of the machine at this moment."""
    build = fade_kernels.build_info()
    build["path"] = Path(str(build["path"])).name if build["path"] else None
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or None,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_facts": _gpu_facts(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {name: _version(name) for name in ("triton", "peft", "diffusers", "transformers")},
        "fade_kernels": fade_kernels.__version__,
        "build": build,
    }


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A plain table: first column left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]))
