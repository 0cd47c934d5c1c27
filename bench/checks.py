"""What comes before the first number on a GPU machine: build the extension, run the GPU tests, run the sanitizers.

Each step is a process of its own with a time limit, and leaves a record: its status, its seconds and, where it did
not go well, the end of its output. Without passed tests a run records times but prints no speed-up.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.harness import ROOT

GPU_TESTS = "tests/fade_kernels/test_cuda.py"
Step = dict[str, Any]

# Exit codes of pytest: all passed; nothing was collected.
_PASSED, _NOTHING = 0, 5
_SANITIZER_FOUND = 86


def _run(command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None) -> tuple[int | None, str]:
    """Exit code (None: over its time) and output. The whole process group ends with the command."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, limit))
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output
    finally:
        if process.poll() is None:  # this program is told to stop
            os.killpg(process.pid, signal.SIGKILL)


def _step(status: str, start: float, output: str = "", **more: Any) -> Step:
    """A record; of a step that went well only the last line is kept: the rest is about the machine, not the kernels."""
    kept = output.strip().rpartition("\n")[2] if status in ("passed", "built") else output[-30_000:]
    return {"status": status, "seconds": time.perf_counter() - start, "output": kept, **more}


def build(limit: float) -> Step:
    """Builds the extension in place; what is up to date is not compiled again."""
    start = time.perf_counter()
    code, output = _run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], limit, {"FADE_REQUIRE_EXT": "1"}
    )  # fmt: skip
    return _step({0: "built", None: "unfinished"}.get(code, "failed"), start, output)


def gpu_tests(limit: float, path: str = GPU_TESTS) -> Step:
    """Runs the GPU's half of the kernels' tests.

    Status: passed, failed, skipped (all of them), unfinished or absent.
    """
    start = time.perf_counter()
    if not (ROOT / path).exists():
        return _step("absent", start, f"there is no {path}")
    command = [sys.executable, "-m", "pytest", path, "-v", "--tb=short", "-p", "no:cacheprovider"]
    if find_spec("xdist") is not None:  # most of the time is Triton's compiler's
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    code, output = _run(command, limit, {"FADE_TEST_DEVICES": "cuda", "OMP_NUM_THREADS": "1"})
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    if code is None:
        status = "unfinished"
    elif code == _PASSED:
        status = "passed" if counts.get("passed") else "skipped"
    else:
        status = "absent" if code == _NOTHING else "failed"
    return _step(status, start, output, **counts)


def find_sanitizer() -> str | None:
    """compute-sanitizer, on the path or in the toolkit."""
    if found := shutil.which("compute-sanitizer"):
        return found
    folders = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    candidates = [Path(folder) / "bin" / "compute-sanitizer" for folder in folders if folder]
    return next((str(path) for path in candidates if path.exists()), None)


def sanitizer(tool: str, limit: float) -> Step:
    """Runs `bench.sanitized` under memcheck (every kernel) or racecheck (those of the CUDA library).

    Status: passed, failed (it found something), unfinished, or unavailable: no such tool, or it cannot watch this GPU.
    """
    start = time.perf_counter()
    executable = find_sanitizer()
    if executable is None:
        return _step("unavailable", start, "compute-sanitizer is not installed")
    # torch's caching allocator would hide accesses beyond an allocation.
    # Calls of the driver that fail by design, when torch asks for what may not be there, are no findings.
    code, output = _run(
        [executable, "--tool", tool, "--error-exitcode", str(_SANITIZER_FOUND),
         *(["--report-api-errors", "no"] if tool == "memcheck" else []), sys.executable, "-m", "bench.sanitized",
         *(["--cuda-library"] if tool == "racecheck" else [])],
        limit,
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    # Any other code is that of a tool or a program that did not get as far as checking: the output says why.
    status = {None: "unfinished", 0: "passed", _SANITIZER_FOUND: "failed"}.get(code, "unavailable")
    if "not supported" in output or (status == "passed" and "bench.sanitized: done" not in output):
        status = "unavailable"
    summary = [line.strip("= ") for line in output.splitlines() if "SUMMARY" in line]
    return _step(status, start, output, summary=summary)


def green(steps: Mapping[str, Step]) -> bool:
    """Whether speed-ups may be printed: the tests have passed, and no sanitizer found anything."""
    found = [step for name, step in steps.items() if name.startswith("sanitizer") and step["status"] == "failed"]
    return steps.get("tests", {}).get("status") == "passed" and not found
