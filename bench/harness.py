"""What every benchmark shares: interleaved timing, peak memory, and the facts that make a number readable later.

Candidates are timed in turns, so that drift of the machine meets all of them; what counts are ratios within one run.
Results are JSON files with quantiles, device, versions and commit beside the numbers.
"""

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fade_kernels

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate: median, 20 % and 80 % quantiles, fastest run, number of runs."""

    median: float
    low: float
    high: float
    fastest: float
    repeats: int

    @staticmethod
    def of(seconds: list[float]) -> "Timing":
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return Timing(
            statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], ordered[0], len(ordered)
        )


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 20,
    warmup: int = 2,
    budget: float = 60.0,
    prepare: Callable[[], Any] | None = None,
) -> dict[str, Timing]:
    """Times every candidate once per round, in turns, with the order reversed every other round.

    Args:
        candidates: name -> call; what it returns is dropped within its own timing.
        repeats: rounds that are timed.
        warmup: rounds before that.
        budget: seconds after which no further timed round starts (three are always made).
        prepare: called before each candidate, outside the timing.

    Returns:
        name -> Timing, in the order given.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(-warmup, repeats):
            if turn >= 3 and time.perf_counter() - start > budget:
                break
            for name in names if turn % 2 == 0 else reversed(names):
                if prepare is not None:
                    prepare()
                begin = time.perf_counter()
                candidates[name]()
                elapsed = time.perf_counter() - begin
                if turn >= 0:
                    seconds[name].append(elapsed)
    finally:
        gc.enable()
    return {name: Timing.of(values) for name, values in seconds.items()}


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
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


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
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fade_kernels": fade_kernels.__version__,
        "build": build,
    }


def timings_json(timings: Mapping[str, Timing]) -> dict[str, dict[str, float]]:
    return {name: asdict(timing) for name, timing in timings.items()}


def write_json(path: str | Path, payload: Mapping[str, Any]) -> None:
    """Writes a result file: under a temporary name first, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(payload, indent=2) + "\n")
    temporary.replace(path)


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A plain table: first column left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]))
