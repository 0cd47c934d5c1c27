"""Host time of one masked layer: what Python and the dispatcher cost before a kernel has anything to do.

    python -m bench.host_overhead [--output FILE] [--rounds 60]

A layer so small that its arithmetic takes a few microseconds, so that what is measured is the host: the paths a GPU
takes, with CPU tensors and every launch of a Triton kernel left out behind Triton's own binder, and the CPU's path with
its kernels. Beside them, in turns within one process each: a frozen linear, the three linears of PEFT's LoRA, and
PEFT's and `fade`'s layers. Single-thread processor time, medians over rounds, and the fastest turn: on a machine with
other work the first is longer than the same code takes alone. What a GPU path computes here is meaningless; that the
same code runs on a GPU without waiting for it is `tests/fade_kernels/test_cuda.py`'s to show.
"""

import argparse
import gc
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import environment, in_subprocess, print_table, write_json
from fade_kernels import BitMask, masked_lora_linear
from fade_kernels.masked_lora import force_regime

TOKENS, WIDTH, RANK, DENSITY = 1, 64, 16, 0.1
CALLS = 10
"""Calls of a candidate in one turn."""

TARGETS = {
    "gpu": {f"{path}, forward + backward": 120e-6 for path in ("fused", "one-product", "gather")},
    "cpu": {"ours, forward": 25e-6},
}
"""Seconds of host time."""


def without_launches() -> list[int]:
    """Makes Triton's binder hand its arguments to kernels that do nothing; returns the count of launches."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches = [0]

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    class Kernel:
        function = packed_metadata = None

        def launch_metadata(self, *args: Any) -> None:
            return None

        def run(self, *args: Any) -> None:
            launches[0] += 1

    def compiled(self: Any, key: Any, signature: Any, device: int, *rest: Any) -> Kernel:
        kernel = self.device_caches[device][0][key] = Kernel()
        return kernel

    driver.set_active(Driver())
    JITFunction._do_compile = compiled
    return launches


def gpu_paths_on_the_cpu() -> None:
    """The compositions of CUDA devices serve CPU tensors; what csrc/cuda computes for the gather path does nothing."""
    from fade_kernels import registration

    registration.register("CPU")

    def nothing(*args: Any) -> None:
        return None

    def sampled(grad_output: Tensor, x: Tensor, starts: Tensor, index: Tensor, segment: Tensor) -> Tensor:
        return x.new_empty(index.numel(), dtype=torch.float32)

    def contracted(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(args[6]), torch.empty_like(args[7])

    for name, kernel in (
        ("add_gathered_lora_", nothing),
        ("sampled_gradient", sampled),
        ("sampled_factor_gradients", contracted),
    ):
        registration._ops.implement(name, kernel, "CPU")


class Problem:
    """One small layer: a step of each candidate, with and without its backward pass."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(dtype)

        self.x, self.grad_output = normal(TOKENS, WIDTH), normal(TOKENS, WIDTH)
        self.weight, self.bias = normal(WIDTH, WIDTH), normal(WIDTH)
        self.a, self.b = normal(RANK, WIDTH), normal(WIDTH, RANK)
        self.mask = BitMask.pack(torch.rand(WIDTH, WIDTH, generator=generator) < DENSITY)
        self.scale = torch.tensor(0.5)
        self.leaves = [tensor.clone().requires_grad_() for tensor in (self.x, self.a, self.b)]

    def frozen(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def peft(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, a), b) * 0.5

    def ours(self, x: Tensor, a: Tensor, b: Tensor, **mode: Any) -> Tensor:
        return masked_lora_linear(x, self.weight, self.bias, a, b, self.mask, self.scale, **mode)

    def layers(self) -> dict[str, Callable[..., Tensor]]:
        """PEFT's and fade's layers around the same weights."""
        from peft.tuners import lora

        from fade.layers import MaskedLoraLinear

        made = {}
        for name, kind in (("PEFT's layer", lora.Linear), ("fade's layer", MaskedLoraLinear)):
            base = torch.nn.Linear(WIDTH, WIDTH, dtype=self.x.dtype).requires_grad_(False)
            layer = kind(base, "default", config=_lora_config(), r=RANK, lora_alpha=RANK)
            if kind is MaskedLoraLinear:
                layer.set_mask("default", self.mask)
            made[name] = lambda x, a, b, layer=layer: layer(x)
        return made

    def forward(self, call: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: call(*self.leaves)

    def inference(self, call: Callable[..., Tensor]) -> Callable[[], Any]:
        def run() -> None:
            with torch.no_grad():
                call(self.x, self.a, self.b)

        return run

    def training(self, call: Callable[..., Tensor]) -> Callable[[], Any]:
        def run() -> None:
            call(*self.leaves).backward(self.grad_output)
            for leaf in self.leaves:
                leaf.grad = None

        return run


def _lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK)


def candidates(path: str) -> tuple[dict[str, Callable[[], Any]], list[int]]:
    """What is timed, by name, and the count of launches left out."""
    problem = Problem(torch.bfloat16 if path == "gpu" else torch.float32)
    launches: list[int] = [0]
    plain = {"frozen": problem.frozen, "PEFT's three linears": problem.peft}
    forced: dict[str, tuple[Callable[..., Tensor], str]] = {}
    if path == "gpu":
        launches = without_launches()
        gpu_paths_on_the_cpu()
        forced = {"fused": (problem.ours, "tile"), "gather": (problem.ours, "gather")}
        if "rounding_seed" in inspect.signature(masked_lora_linear).parameters:
            forced["one-product"] = (lambda *leaves: problem.ours(*leaves, rounding_seed=1), "auto")
    else:
        plain |= {"ours": problem.ours, **problem.layers()}
        words, scale = problem.mask.words, problem.scale
        operator = torch.ops.fade_kernels.masked_lora_linear.default
        extra = [None] * (len(operator._schema.arguments) - 8)
        plain["the operator alone"] = lambda x, a, b: operator(
            x, problem.weight, problem.bias, a, b, words, scale, 0, *extra
        )

    def within(call: Callable[[], Any], regime: str) -> Callable[[], Any]:
        def run() -> None:
            with force_regime(regime):
                call()

        return run

    calls: dict[str, Callable[[], Any]] = {}
    for name, call in plain.items():
        calls[f"{name}, inference"] = problem.inference(call)
        if name != "the operator alone":
            calls[f"{name}, forward"] = problem.forward(call)
            calls[f"{name}, forward + backward"] = problem.training(call)
    for name, (call, regime) in forced.items():
        for mode in ("inference", "forward", "training"):
            title = f"{name}, {'forward + backward' if mode == 'training' else mode}"
            calls[title] = within(getattr(problem, mode)(call), regime)
    return calls, launches


def measure(path: str, rounds: int) -> dict[str, dict[str, float]]:
    """name -> median seconds of the thread's processor time and of the wall for one call, fastest, launches."""
    torch.set_num_threads(1)
    calls, launches = candidates(path)
    rows: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        for _ in range(30):
            call()
        launches[0] = 0
        call()
        rows[name] = {"launches": launches[0]}
    busy: dict[str, list[float]] = {name: [] for name in calls}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    for index in range(rounds):
        for name in list(calls)[:: 1 if index % 2 else -1]:
            call, start, spent = calls[name], time.perf_counter(), time.thread_time()
            for _ in range(CALLS):
                call()
            busy[name].append((time.thread_time() - spent) / CALLS)
            wall[name].append((time.perf_counter() - start) / CALLS)
    gc.enable()
    for name, row in rows.items():
        row |= {
            "processor": statistics.median(busy[name]),
            "wall": statistics.median(wall[name]),
            "fastest": min(busy[name]),
        }
    return rows


def judge(tables: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Each target, what was measured, whether it is reached; a path that does not exist has no verdict."""
    verdicts = []
    for path, targets in TARGETS.items():
        for name, target in targets.items():
            row = tables[path].get(name)
            verdict = {"path": path, "row": name, "target": target}
            for kind in ("processor", "fastest"):
                verdict[kind] = row[kind] if row else None
            verdict["reached"] = row["processor"] <= target if row else None
            verdicts.append(verdict)
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results/host_overhead.json"))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--path", choices=list(TARGETS), help="measure this path alone and print it as JSON")
    arguments = parser.parse_args()
    if arguments.path:
        print(json.dumps(measure(arguments.path, arguments.rounds)))
        return
    facts = environment()
    tables = {
        path: in_subprocess("bench.host_overhead", "--path", path, "--rounds", str(arguments.rounds))
        for path in TARGETS
    }
    verdicts = judge(tables)
    shape = {"tokens": TOKENS, "features": WIDTH, "rank": RANK, "density": DENSITY}
    payload = {"environment": facts, "layer": shape, "tables": tables, "targets": verdicts}
    write_json(arguments.output, payload)
    for path, rows in tables.items():
        lines = [
            [name, f"{1e6 * row['processor']:.1f}", f"{1e6 * row['wall']:.1f}", f"{1e6 * row['fastest']:.1f}",
             str(int(row["launches"]) or "")]
            for name, row in rows.items()
        ]  # fmt: skip
        print_table([f"{path}, us a call", "processor", "wall", "fastest", "launches"], lines)
        print()
    for verdict in verdicts:
        word = {None: "not there", True: "reached", False: "MISSED"}[verdict["reached"]]
        found = ", ".join(f"{kind} {1e6 * verdict[kind]:.1f} us" for kind in ("processor", "fastest") if verdict[kind])
        print(f"{verdict['path']}: {verdict['row']}: {found}; target {1e6 * verdict['target']:.0f} us {word}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
