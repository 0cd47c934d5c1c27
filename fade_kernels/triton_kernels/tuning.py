"""Choice of a kernel's tiling: its deterministic default, or with FADE_AUTOTUNE=1 the fastest of a few, measured once.

Measured choices are kept on disk, one JSON file in $FADE_CACHE (default ~/.cache/fade_kernels), under a key of device,
torch and Triton versions, kernel and problem; T is bucketed to powers of two, so that a new batch size is not a new
problem. The file may be deleted at any time.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fade_kernels.triton_kernels.launch import Tiling

MAX_CANDIDATES = 6
"""At most so many tilings are measured for a problem: the first call has to stay bearable."""


class Problem(NamedTuple):
    """What a kernel's tiling depends on."""

    dtype: str
    T: int
    N: int
    K: int
    R: int

    def bucket(self) -> str:
        """Its name in the cache, with T rounded up to a power of two."""
        return f"{self.dtype} T{1 << max(self.T - 1, 0).bit_length()} N{self.N} K{self.K} R{self.R}"


def cache_path() -> Path:
    """The cache file: in $FADE_CACHE, or ~/.cache/fade_kernels."""
    folder = os.environ.get("FADE_CACHE")
    return (Path(folder).expanduser() if folder else Path.home() / ".cache" / "fade_kernels") / "tilings.json"


def tiling_name(tiling: Tiling) -> str:
    """A tiling as one word, e.g. "BT128-BN64-BK64-w4-s3"."""
    blocks = "-".join(f"{name}{size}" for name, size in tiling.blocks.items())
    return f"{blocks}-w{tiling.num_warps}-s{tiling.num_stages}"


_choices: dict[Path, dict[str, str]] = {}


def _read(path: Path) -> dict[str, str] | None:
    """The choices in a cache file, none if it does not exist; None if it is damaged."""
    try:
        entries = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError):
        return None
    sound = isinstance(entries, dict) and all(isinstance(value, str) for value in entries.values())
    return entries if sound else None


def _load(path: Path) -> dict[str, str]:
    """The choices of a cache file, read once per process; a damaged one counts as empty, with a warning."""
    if path not in _choices:
        entries = _read(path)
        if entries is None:
            warnings.warn(f"{path} is not a readable tiling cache: ignored and measured anew", stacklevel=4)
        _choices[path] = entries or {}
    return _choices[path]


def _save(path: Path, entries: dict[str, str]) -> None:
    """Replaces the file in one step, so that a reader never meets half of it; without a writable disk, nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump(entries, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"the measured tilings could not be kept in {path}: {error}", stacklevel=4)


def measured_choice(
    key: str, tilings: Sequence[Tiling], milliseconds: Callable[[Tiling], float], *, path: Path | None = None
) -> Tiling:
    """The tiling that `key` has in the cache, or else the one of least measured time, which is then cached.

    Args:
        key: names device, versions, kernel and problem.
        tilings: the candidates, at most MAX_CANDIDATES.
        milliseconds: measures one; infinity for one that cannot run.
        path: the cache file; None: `cache_path()`.

    Raises:
        ValueError: no tiling or too many.
        RuntimeError: none of them can run.
    """
    if not 1 <= len(tilings) <= MAX_CANDIDATES:
        raise ValueError(f"between 1 and {MAX_CANDIDATES} tilings can be measured, not {len(tilings)}")
    path = path or cache_path()
    by_name = {tiling_name(tiling): tiling for tiling in tilings}
    known = by_name.get(_load(path).get(key, ""))
    if known is not None:
        return known
    times = {name: milliseconds(tiling) for name, tiling in by_name.items()}
    best = min(times, key=times.__getitem__)
    if times[best] == float("inf"):
        raise RuntimeError(f"no tiling of {', '.join(times)} could run for {key}")
    _choices[path][key] = best
    # Read again: other processes may have added theirs since.
    _choices[path] = (_read(path) or {}) | _choices[path]
    _save(path, _choices[path])
    return by_name[best]


def _milliseconds(run: Callable[[], None]) -> float:
    """Median time of a launch; infinity where the device lacks the registers or shared memory."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(run, warmup=10, rep=40, return_mode="median"))
    except (OutOfResources, CompilationError):
        return float("inf")


def choose_tiling(
    kernel: str,
    problem: Problem,
    default: Tiling,
    tilings: Sequence[Tiling],
    device: torch.device,
    run: Callable[[Tiling], None],
) -> Tiling:
    """The tiling for a launch: `default`, or with FADE_AUTOTUNE=1 on a CUDA device the measured one.

    Args:
        kernel: its name in the cache.
        problem: sizes and element type.
        default: the choice without measurement.
        tilings: the candidates that a measurement compares with it.
        device: where the launch is to happen.
        run: launches the kernel once with a tiling; must leave nothing behind that a second run would change.
    """
    if os.environ.get("FADE_AUTOTUNE") != "1" or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return default
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    key = f"{torch.cuda.get_device_name(device)}, {versions}: {kernel} {problem.bucket()}"
    candidates = tuple({tiling_name(tiling): tiling for tiling in (default, *tilings)}.values())[:MAX_CANDIDATES]
    return measured_choice(key, candidates, lambda tiling: _milliseconds(lambda: run(tiling)))
