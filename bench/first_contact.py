"""`python -m bench --first-contact`: the first five minutes on a machine with a GPU, in order of likely trouble.

Each step is a process of its own with a time limit, so that one that crashes or hangs poisons no other. It prints what
it proves, and part by part what it found; everything goes into one JSON file, with enough to mend from afar: versions,
clocks, caches, shapes, times, tracebacks, warnings, and which operators were served by their definitions. With
`--device cpu` every step does what it can with the CPU library, Triton's interpreter and Triton's compiler.
`python -m bench.first_contact` is the same without importing torch or the kernels here: for where that itself fails.

    {"schema": 1, "kind": "first contact", "device", "complete", "seconds", "steps": [
        {"step", "proves", "status": "passed" | "failed" | "crashed" | "over its time" | "left out",
         "seconds", "limit", "exit_code", "output",
         "parts": [{"part", "status": "passed" | "failed" | "skipped" | "running", "seconds", ...}],
         "warnings": [...], "definitions": [...]}]}
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.files import ROOT, write_json

SCHEMA = 1
BUDGET = 300.0
"""Seconds for all steps together."""
LEAST = 8.0
"""A step with less time than this left is left out: a process may need so long to start."""
MOST_WARNINGS = 40
SAID = "\x1e"
"""Begins a line of a step's process that is for people to read; what libraries print goes into the file alone."""
INTERPRETED = {"cpu": {"TRITON_INTERPRET": "1", "FADE_KERNELS": "triton"}}


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        proves: a sentence.
        run: "module:function", called with a `Contact`.
        limit: seconds.
        environment: variables of the process, by kind of device.
    """

    name: str
    proves: str
    run: str
    limit: float
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def _step(
    name: str, proves: str, function: str, limit: float, environment: Mapping[str, Mapping[str, str]] | None = None
) -> Step:
    return Step(name, proves, f"bench.contact_steps:{function}", limit, environment or {})


STEPS = (
    _step("environment", "driver, device, torch and Triton are there and new enough", "environment", 40),
    _step("libraries", "both compiled libraries load, and the CUDA one has code for this chip", "libraries", 40),
    _step("operators", "every operator agrees with float64 on small odd shapes", "operators", 75),
    _step("survival", "a delta far below the weight's rounding is there on average in 16-bit results, on every path",
          "survival", 60),
    _step("host", "how long the host takes to launch a layer, beside how long its kernels run", "host", 45),
    _step("compiling", "Triton compiles every bf16 kernel for this chip, without spills", "compiling", 90),
    _step("layers", "SD 1.5's attention layers run, right, in the time that the roofline model predicts", "layers", 75,
          INTERPRETED),
    _step("one-product", "the one-product mode rounds without bias, alike in both passes, and is faster", "one_product",
          60),
    _step("captures", "a forward and backward pass, and a step with its optimiser, can be a CUDA graph", "captures",
          45),
    _step("out of memory", "an allocation that fails is a torch.OutOfMemoryError, and the device goes on",
          "out_of_memory", 40),
    _step("saved-tensor hooks", "hooks that return other tensors change no result and wait for nothing",
          "saved_tensor_hooks", 40),
    _step("memory", "what every mode takes beyond the frozen layer", "memory", 40),
)  # fmt: skip


# --- within a step ---------------------------------------------------------------------------------------------------


class Skip(Exception):
    """Raised within a part that this device has no use for: says why."""


class LostDevice(Exception):
    """The device can be used no more by this process."""


class Contact:
    """What one step finds out: printed and written as it is found, so that a crash loses nothing.

    Args:
        path: the step's own file.
        device: "cuda" or "cpu".
    """

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device, self.cuda = path, device, device == "cuda"
        self.payload: dict[str, Any] = {"parts": [], "warnings": [], "definitions": []}
        self.save()

    def save(self) -> None:
        # What JSON does not know is written as its text: no fact may end a step.
        write_json(self.path, json.loads(json.dumps(self.payload, default=str)))

    @property
    def failed(self) -> bool:
        return any(part["status"] == "failed" for part in self.payload["parts"])

    @contextmanager
    def part(self, name: str, **facts: Any) -> Iterator[dict[str, Any]]:
        """One thing to find out. An exception inside is its failure, and the step goes on.

        Yields:
            A dict for facts. Its "text", if given, is what is printed.

        Raises:
            LostDevice: an error after which this process cannot use the device.
        """
        entry = {"part": name, "status": "running", **facts}
        self.payload["parts"].append(entry)
        self.save()
        begin = time.perf_counter()
        lost = ""
        try:
            yield entry
            if reason := self._lost():
                raise RuntimeError(reason)
            entry["status"] = "passed"
        except Skip as reason:
            entry |= {"status": "skipped", "text": str(reason)}
        except Exception as error:
            entry |= {
                "status": "failed",
                "exception": type(error).__name__,
                "message": str(error).strip()[:4000],
                "traceback": traceback.format_exc()[-8000:],
            }
            lost = self._lost()
        entry["seconds"] = time.perf_counter() - begin
        self.save()
        text = entry.get("text", "")
        if entry["status"] == "failed":
            text = f"{entry['exception']}: {entry['message']}".splitlines()[0][:200]
        mark = {"passed": "ok", "failed": "FAILED", "skipped": "-"}[entry["status"]]
        print(f"{SAID}    {mark:6} {name}{': ' if text else ''}{text}", flush=True)
        if lost:
            raise LostDevice(lost)

    def _lost(self) -> str:
        """Waits for the device; why it cannot be used any more, "" where it can or there is none."""
        if self.cuda and "torch" in sys.modules:
            from bench.harness import DeviceLostError, still_alive

            try:
                still_alive(self.device)
            except DeviceLostError as error:
                return str(error)
        return ""

    def note_warning(self, message: Warning | str, *_: Any, **__: Any) -> None:
        text = str(message)
        if text not in self.payload["warnings"] and len(self.payload["warnings"]) < MOST_WARNINGS:
            self.payload["warnings"].append(text)
            print(f"{SAID}    warning: {text.splitlines()[0][:200]}", flush=True)


def run_step(run: str, contact: Contact) -> None:
    """Calls "module:function" with a contact, and adds which operators ran as their definitions."""
    module, function = run.split(":")
    shown = warnings.showwarning
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", RuntimeWarning)
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = contact.note_warning
            getattr(importlib.import_module(module), function)(contact)
    finally:
        warnings.showwarning = shown
        if "fade_kernels.registration" in sys.modules:
            contact.payload["definitions"] = sys.modules["fade_kernels.registration"].served_by_definitions()
        contact.save()


# --- the run ---------------------------------------------------------------------------------------------------------


def _command(step: Step, device: str, path: Path) -> list[str]:
    return [sys.executable, "-m", "bench.first_contact", "--step", step.run, "--device", device,
            "--output", str(path)]  # fmt: skip


def _watch(step: Step, device: str, path: Path, limit: float) -> tuple[int | None, str]:
    """Runs a step's process and repeats what it prints; exit code (None: over its time) and the end of its output."""
    process = subprocess.Popen(
        _command(step, device, path),
        cwd=ROOT,
        env=os.environ | {"PYTHONFAULTHANDLER": "1"} | dict(step.environment.get(device, {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    last: deque[str] = deque(maxlen=150)

    def repeat() -> None:
        for line in process.stdout:
            last.append(line)
            if line.startswith(SAID):
                print(line.removeprefix(SAID), end="", flush=True)

    reader = threading.Thread(target=repeat, daemon=True)
    reader.start()
    try:
        code: int | None = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    reader.join(timeout=5)
    return code, "".join(last)


def _attempt(step: Step, device: str, limit: float) -> dict[str, Any]:
    """Runs one step; its record."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.json"
        code, output = _watch(step, device, path, limit)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {"parts": [], "warnings": [], "definitions": []}
    if code is None:
        status = "over its time"
    elif code == 0:
        status = "passed"
    else:
        status = "failed" if code == 1 and found["parts"] else "crashed"
    record = {"status": status, "seconds": time.perf_counter() - begin, "limit": limit, "exit_code": code, **found}
    if status != "passed":
        record["output"] = output
    return record


def contact(
    device: str,
    output: Path | None,
    budget: float = BUDGET,
    steps: Sequence[Step] = STEPS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Runs the steps one after the other within `budget` seconds, and writes the file after each.

    Returns:
        What was written.
    """
    begin = clock()
    payload: dict[str, Any] = {"schema": SCHEMA, "kind": "first contact", "device": device, "complete": False}
    payload["steps"] = []
    for number, step in enumerate(steps, start=1):
        print(f"{number}/{len(steps)} {step.name}: {step.proves}", flush=True)
        left = budget - (clock() - begin)
        if left < LEAST:
            record: dict[str, Any] = {"status": "left out", "reason": f"{left:.0f} s of {budget:.0f} s were left"}
        else:
            record = _attempt(step, device, min(step.limit, left))
        payload["steps"].append({"step": step.name, "proves": step.proves, **record})
        payload["seconds"] = clock() - begin
        if output is not None:
            write_json(output, payload)
        running = [part["part"] for part in record.get("parts", ()) if part["status"] == "running"]
        where = f", in {running[-1]!r}" if running else ""
        print(f"  {record['status']}{where}, {record.get('seconds', 0.0):.1f} s\n", flush=True)
    payload["complete"] = True
    if output is not None:
        write_json(output, payload)
    return payload


def show(payload: Mapping[str, Any]) -> None:
    """What passed, what did not, and what was not ours."""
    counts: dict[str, list[str]] = {}
    for step in payload["steps"]:
        counts.setdefault(step["status"], []).append(step["step"])
    for status, names in counts.items():
        print(f"{status}: {', '.join(names)}")
    definitions = sorted({name for step in payload["steps"] for name in step.get("definitions", ())})
    if definitions:
        print(f"ran as their definitions, not as our kernels: {', '.join(definitions)}")


def main(device: str, output: Path | None, budget: float = BUDGET, only: Sequence[str] = ()) -> int:
    """Exit code 0 where every step passed."""
    steps = [step for step in STEPS if not only or step.name in only]
    payload = contact(device, output, budget, steps)
    show(payload)
    if output is not None:
        print(f"written to {output} after {payload['seconds']:.0f} s")
    return 0 if all(step["status"] == "passed" for step in payload["steps"]) else 1


def command(argv: Sequence[str] | None = None) -> int:
    """The command line: the whole run, or with --step the process of one step."""
    parser = argparse.ArgumentParser(prog="python -m bench.first_contact", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "first_contact.json")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=(), metavar="STEP", choices=[step.name for step in STEPS])
    parser.add_argument("--step", metavar="MODULE:FUNCTION", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.step is None:
        return main(arguments.device, arguments.output.resolve(), arguments.budget, arguments.only)
    found = Contact(arguments.output, arguments.device)
    try:
        run_step(arguments.step, found)
    except LostDevice as error:
        print(f"{SAID}    the device is lost to this process: {error}", flush=True)
        return 1
    return 1 if found.failed else 0


if __name__ == "__main__":
    # Under its own name: the steps import the same classes from there.
    from bench import first_contact

    sys.exit(first_contact.command())
