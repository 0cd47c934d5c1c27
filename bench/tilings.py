"""Every tiling of every Triton kernel on the layers of public models: what the shipped defaults are chosen by.

Kernels that divide T are measured with their own number of ranges and, in the tilings that ship, with others ("x5").

    python -m bench.tilings [--device cuda] [--budget SECONDS] [--jobs N] [--output FILE]

Tilings that ship and some that do not (`MORE`) take turns with the library's product of the same sizes, in bf16 with
rank 16. Every result is compared with the product in fp32 first. Kernels are compiled beforehand in `--jobs` processes,
because compiling takes far longer than measuring.

    {"schema": 1, "kind": "tilings", "environment", "complete", "seconds", "rows": [
        {"kernel" or "layer, mode", "mask", "T", "N", "K", "default", "library": seconds,
         "candidates": {tiling: {"seconds", "low", "high", "error"} | {"failed": why}}}]}
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import ROOT, DeviceLostError, environment, interleaved, still_alive, write_json
from bench.masked_layer import FROZEN, KEPT, PEFT, RANK, REFILLED, SEED, Mask, MaskedLayer, Provider, worst_error
from bench.shapes import Linear
from fade_kernels import BitMask, choices
from fade_kernels.mask_facts import MaskFacts
from fade_kernels.triton_kernels import effective_weight as merging
from fade_kernels.triton_kernels import masked_gradient_contraction as contraction
from fade_kernels.triton_kernels import masked_lora_factor_gradients as factors
from fade_kernels.triton_kernels import masked_lora_forward as forward
from fade_kernels.triton_kernels import masked_lora_input_gradient as backward
from fade_kernels.triton_kernels import weight_gradient_magnitude as magnitude
from fade_kernels.triton_kernels.launch import Tiling
from fade_kernels.triton_kernels.tuning import tiling_name

SCHEMA = 1
TOLERANCE = 2e-2
RANDOM, TILES, DENSER = Mask(0.1), Mask(0.1, 64), Mask(0.4, 64)

# (T, N, K): SD 1.5 at batch 8, SDXL at batch 4, SD 3.5 large and FLUX.1 at batch 2.
PROBLEMS = (
    (32768, 320, 320),
    (8192, 640, 640),
    (2048, 1280, 1280),
    (512, 1280, 1280),
    (616, 320, 768),
    (16384, 640, 640),
    (4096, 1280, 1280),
    (8192, 2432, 2432),
    (9216, 3072, 3072),
)
TOY = ((96, 64, 64),)


def _tilings(*rows: tuple[dict[str, int], int, int]) -> tuple[Tiling, ...]:
    return tuple(Tiling(blocks, num_warps=warps, num_stages=stages) for blocks, warps, stages in rows)


MORE = {
    "forward": _tilings(
        ({"BT": 128, "BN": 64, "BK": 64}, 4, 4),
        ({"BT": 128, "BN": 128, "BK": 64}, 8, 4),
        ({"BT": 128, "BN": 128, "BK": 32}, 8, 4),
        ({"BT": 256, "BN": 64, "BK": 64}, 8, 3),
        ({"BT": 128, "BN": 128, "BK": 64, "APART": 1}, 8, 3),
        ({"BT": 128, "BN": 128, "BK": 64, "APART": 1}, 4, 3),
        ({"BT": 256, "BN": 64, "BK": 64, "APART": 1}, 4, 4),
    ),
    "input gradient": _tilings(
        ({"BT": 128, "BN": 64, "BK": 64}, 4, 4),
        ({"BT": 128, "BN": 64, "BK": 128}, 8, 4),
        ({"BT": 128, "BN": 32, "BK": 128}, 8, 4),
        ({"BT": 256, "BN": 64, "BK": 64}, 8, 3),
        ({"BT": 128, "BN": 64, "BK": 128, "APART": 1}, 8, 3),
        ({"BT": 128, "BN": 64, "BK": 128, "APART": 1}, 4, 3),
        ({"BT": 256, "BN": 64, "BK": 64, "APART": 1}, 4, 4),
    ),
    "factor gradients": _tilings(
        ({"BT": 64, "BN": 128, "BK": 128, "BR": 16}, 8, 4),
        ({"BT": 64, "BN": 64, "BK": 64, "BR": 16}, 4, 4),
        ({"BT": 32, "BN": 128, "BK": 128, "BR": 16}, 8, 4),
        ({"BT": 64, "BN": 128, "BK": 256, "BR": 16}, 8, 3),
    ),
    "contraction": _tilings(({"BS": 32, "BC": 256}, 4, 3), ({"BS": 32, "BC": 128}, 4, 4)),
    "magnitude": _tilings(
        ({"BT": 64, "BN": 128, "BK": 128}, 8, 4),
        ({"BT": 64, "BN": 128, "BK": 64}, 4, 4),
        ({"BT": 64, "BN": 128, "BK": 256}, 8, 3),
    ),
    "one-product weight": _tilings(
        ({"BN": 64, "BK": 64, "BR": 16}, 4, 2),
        ({"BN": 32, "BK": 64, "BR": 16}, 4, 2),
        ({"BN": 16, "BK": 128, "BR": 16}, 4, 2),
        ({"BN": 64, "BK": 128, "BR": 16}, 8, 2),
        ({"BN": 64, "BK": 32, "BR": 16}, 2, 2),
    ),
}
"""Tilings that do not ship, by kernel: candidates to replace those that do."""


@dataclass(frozen=True)
class Kernel:
    """One kernel as it is measured.

    Attributes:
        shipped: (problem, mask) -> its tilings, the default first.
        masks: for which it is measured.
        run: (data, tiling, ...) -> tensors; `expected`: the same in fp32; `library`: the product to compare with.
        splits: numbers of ranges of T to measure beside the kernel's own.
    """

    shipped: Callable[[tuple[int, int, int], Mask], Sequence[Tiling]]
    masks: tuple[Mask, ...]
    run: Callable[..., Sequence[Tensor]]
    expected: Callable[["Data"], Sequence[Tensor]]
    library: Callable[["Data"], Any]
    splits: tuple[int, ...] = ()


def form_of(mask: Mask) -> str:
    """What a launch knows of such a mask's tiles."""
    return choices.mask_form(MaskFacts(0, mask.keep, mask.keep if mask.tile else 1.0))


class Data:
    """A layer's tensors in `dtype`: x [T, K], dY [T, N], W [N, K], A [r, K], B [N, r] and a mask."""

    def __init__(self, problem: tuple[int, int, int], mask: Mask, device: str, dtype: torch.dtype) -> None:
        (T, N, K), generator = problem, torch.Generator(device).manual_seed(0)

        def normal(*size: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(*size, generator=generator, device=device)).to(dtype)

        self.x, self.dy, self.weight = normal(T, K), normal(T, N), normal(N, K, std=K**-0.5)
        self.lora_a, self.lora_b = normal(RANK, K, std=K**-0.5), normal(N, RANK, std=0.1)
        self.mask = mask.make(N, K, generator)
        self.words = BitMask.pack(self.mask).words
        self.form = form_of(mask)
        self.scale = torch.tensor(2.0, device=device)
        self.saliency = torch.zeros(N, K, device=device)
        self.precision = {"input_precision": "ieee"}

    def delta(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.lora_a, self.lora_b, self.words, self.scale

    def effective(self) -> Tensor:
        """W + Delta in fp32."""
        delta = 2.0 * torch.where(self.mask, self.lora_b.float() @ self.lora_a.float(), 0.0)
        return self.weight.float() + delta

    def gradient(self) -> Tensor:
        """dY^T X in fp32."""
        return self.dy.float().t() @ self.x.float()


SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 24, 29)


def _magnitude(data: Data, t: Tiling, splits: int | None = None) -> list[Tensor]:
    magnitude.accumulate_linear_gradient_magnitude_(
        data.saliency, data.dy, data.x, "abs", False, tiling=t, splits=splits, **data.precision
    )
    return [data.saliency]


def _factor_gradients(data: Data) -> list[Tensor]:
    g = 2.0 * torch.where(data.mask, data.gradient(), 0.0)
    return [data.lora_b.float().t() @ g, g @ data.lora_a.float().t()]


def _first(default: Tiling, others: Sequence[Tiling]) -> list[Tiling]:
    return [default, *(tiling for tiling in others if tiling != default)]


def _both(module: Any) -> Callable[[tuple[int, int, int], Mask], Sequence[Tiling]]:
    return lambda p, mask: _first(
        module.default_tiling(torch.bfloat16, *p, RANK, form=form_of(mask)),
        module.candidate_tilings(torch.bfloat16, RANK, "ieee"),
    )


KERNELS = {
    "forward": Kernel(
        _both(forward),
        (RANDOM, TILES, DENSER),
        lambda d, t: [
            forward.masked_lora_forward(d.x, d.weight, None, *d.delta(), tiling=t, form=d.form, **d.precision)
        ],
        lambda d: [d.x.float() @ d.effective().t()],
        lambda d: d.x @ d.weight.t(),
    ),
    "input gradient": Kernel(
        _both(backward),
        (RANDOM, TILES, DENSER),
        lambda d, t: [
            backward.masked_lora_input_gradient(d.dy, d.weight, *d.delta(), tiling=t, form=d.form, **d.precision)
        ],
        lambda d: [d.dy.float() @ d.effective()],
        lambda d: d.dy @ d.weight,
    ),
    "factor gradients": Kernel(
        lambda p, mask: _first(factors.default_tiling(torch.bfloat16, "", form_of(mask)), factors.TILINGS["16bit"]),
        (RANDOM, TILES),
        lambda d, t, splits=None: factors.masked_lora_factor_gradients(
            d.dy, d.x, *d.delta(), tiling=t, splits=splits, **d.precision
        ),
        _factor_gradients,
        lambda d: d.dy.t() @ d.x,
        SPLITS,
    ),
    "magnitude": Kernel(
        lambda p, mask: _first(magnitude.default_tiling(torch.bfloat16, "", *p), magnitude.TILINGS["16bit"]),
        (RANDOM,),
        _magnitude,
        lambda d: [d.gradient().abs()],
        lambda d: d.dy.t() @ d.x,
        SPLITS,
    ),
    "contraction": Kernel(
        lambda p, mask: contraction.TILINGS["16bit"],
        (RANDOM,),
        lambda d, t: contraction.contract_masked_gradient(d.dy.t() @ d.x, *d.delta(), tiling=t, **d.precision),
        _factor_gradients,
        lambda d: d.dy.t() @ d.x,
    ),
    "one-product weight": Kernel(
        lambda p, mask: merging.TILINGS,
        (RANDOM,),
        lambda d, t: [merging.effective_weight(d.weight, *d.delta(), stochastic=True, seed=SEED, tiling=t)],
        lambda d: [d.effective()],
        lambda d: d.weight.clone(),
    ),
}


def tilings(name: str, problem: tuple[int, int, int], mask: Mask) -> list[Tiling]:
    """The default first, then what ships, then what does not."""
    every = [*KERNELS[name].shipped(problem, mask), *MORE[name]]
    return list({tiling_name(tiling): tiling for tiling in every}.values())


def candidates(name: str, problem: tuple[int, int, int], mask: Mask) -> dict[str, Callable[[Data], Sequence[Tensor]]]:
    """What takes part, by name, the default first."""
    kernel = KERNELS[name]
    found = {tiling_name(tiling): partial(kernel.run, t=tiling) for tiling in tilings(name, problem, mask)}
    for tiling in {tiling_name(t): t for t in kernel.shipped(problem, mask)}.values() if kernel.splits else ():
        steps = problem[0] // tiling.blocks["BT"]
        for splits in kernel.splits:
            if splits <= max(1, steps // 2):
                found[f"{tiling_name(tiling)} x{splits}"] = partial(kernel.run, t=tiling, splits=splits)
    return found


def rows(problems: Sequence[tuple[int, int, int]]) -> Iterator[tuple[str, tuple[int, int, int], Mask]]:
    """What is measured, in order: the default masks of every kernel first."""
    for turn in range(max(len(kernel.masks) for kernel in KERNELS.values())):
        for name, kernel in KERNELS.items():
            for problem in problems if turn < len(kernel.masks) else ():
                yield name, problem, kernel.masks[turn]


def _compile(name: str, tiling_index: int, problems: Sequence[tuple[int, int, int]], device: str) -> str:
    """Runs one kernel with one of its tilings once for each form of its code; why not, where it cannot."""
    try:
        for problem in problems:
            for mask in KERNELS[name].masks[:2]:
                tiling = sorted(tilings(name, problem, mask), key=tiling_name)[tiling_index]
                KERNELS[name].run(Data(problem, mask, device, torch.bfloat16), tiling)
        still_alive(device)
    except Exception as error:
        return f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return ""


def compile_all(device: str, jobs: int) -> list[str]:
    """Fills Triton's cache; what went wrong."""
    # The smallest of each form: sizes that are multiples of 16, and tokens that are not.
    problems = ((512, 1280, 1280), (616, 320, 768), (2048, 320, 320))
    work = [(name, i) for name in KERNELS for i in range(len(tilings(name, problems[0], KERNELS[name].masks[0])))]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        done = pool.map(partial(_compile, problems=problems, device=device), *zip(*work, strict=True))
        return [trouble for trouble in done if trouble]


def measure(
    name: str, problem: tuple[int, int, int], mask: Mask, device: str, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """One row: every tiling's seconds and error, the library's seconds."""
    kernel, data = KERNELS[name], Data(problem, mask, device, dtype)
    tried = candidates(name, problem, mask)
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {"library": partial(kernel.library, data)}
    expected = kernel.expected(data)
    for tiling, run in tried.items():
        data.saliency.zero_()
        try:
            error = worst_error(run(data), expected)
        # Whatever a tiling does instead of running (registers, shared memory, the compiler) makes it no candidate.
        except Exception as reason:
            still_alive(device)
            found[tiling] = {"failed": f"{type(reason).__name__}: {str(reason).splitlines()[0][:200]}"}
            continue
        found[tiling] = {"error": error}
        if error <= TOLERANCE:
            calls[tiling] = partial(run, data)
    timings = interleaved(calls, repeats=repeats, warmup=1, budget=1.0, device=device)
    for tiling, timing in timings.items():
        if tiling != "library":
            found[tiling] |= {"seconds": timing.median, "low": timing.low, "high": timing.high}
    return {
        "kernel": name,
        "mask": mask.name,
        **dict(zip("TNK", problem, strict=True)),
        "default": next(iter(tried)),
        "library": timings["library"].median,
        "candidates": found,
    }


PATHS = (Mask(0.01), Mask(0.003), Mask(0.001))
"""Masks among which the gather path and the tiles meet."""


def measure_paths(
    problem: tuple[int, int, int], mode: str, device: str, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """One row of whole layers: every path on every mask of `PATHS`, in units of the frozen layer."""
    T, N, K = problem
    layer = MaskedLayer(Linear(T, N, K, bias=False, count=1), PATHS, dtype=dtype, device=device)
    ours = [Provider("ours", mask.name, regime) for regime in ("tile", "gather", "auto") for mask in PATHS]
    ours += [Provider("ours", PATHS[0].name, regime) for regime in ("whole", REFILLED, KEPT)]
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {"library": partial(layer.step, FROZEN, mode)}
    for provider in (PEFT, *ours):
        try:
            layer.step(provider, mode)
            still_alive(device)
        except Exception as reason:
            still_alive(device)
            found[provider.name] = {"failed": f"{type(reason).__name__}: {str(reason).splitlines()[0][:200]}"}
            continue
        found[provider.name] = {}
        calls[provider.name] = partial(layer.step, provider, mode)
    timings = interleaved(calls, repeats=repeats, warmup=2, budget=1.0, device=device)
    for name, timing in timings.items():
        if name != "library":
            found[name] |= {"seconds": timing.median, "low": timing.low, "high": timing.high, "host": timing.host}
    sizes = dict(zip("TNK", problem, strict=True))
    base = timings["library"].median
    return {"kernel": f"layer, {mode}", "mask": "1 % and less", **sizes, "default": "", "library": base,
            "candidates": found}  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """One line: the library's time, and the tilings from the fastest on, in units of it."""
    timed = {name: cell["seconds"] / row["library"] for name, cell in row["candidates"].items() if "seconds" in cell}
    best = "  ".join(
        f"{'*' if name == row['default'] else ''}{name} {ratio:.2f}"
        for name, ratio in sorted(timed.items(), key=lambda item: item[1])
    )
    bad = [name for name, cell in row["candidates"].items() if "seconds" not in cell]
    sizes = f"{row['T']} x {row['K']} -> {row['N']}"
    print(f"{row['kernel']}, {row['mask']}, {sizes}: {1e6 * row['library']:.1f} us  {best}"
          + (f"  failed: {', '.join(bad)}" if bad else ""), flush=True)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tilings", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile beforehand; 0: none")
    parser.add_argument("--kernels", nargs="+", choices=[*KERNELS, "layer"], metavar="NAME", help="only these")
    parser.add_argument("--toy", action="store_true", help="one tiny problem in fp32: a test of this program")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "tilings.json")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu tries the program without one")
    begin = time.perf_counter()
    payload: dict[str, Any] = {"schema": SCHEMA, "kind": "tilings", "environment": environment(), "complete": False}
    payload["rows"], payload["troubles"] = [], []
    if arguments.jobs:
        payload["troubles"] = compile_all(arguments.device, arguments.jobs)
        print(f"compiled after {time.perf_counter() - begin:.0f} s", *payload["troubles"], sep="\n", flush=True)
    dtype, problems = (torch.float32, TOY) if arguments.toy else (torch.bfloat16, PROBLEMS)
    repeats = 1 if arguments.toy else 11
    wanted = arguments.kernels or (*KERNELS, "layer")
    work = [partial(measure, *row) for row in rows(problems) if row[0] in wanted]
    if "layer" in wanted:
        work += [partial(measure_paths, problem, mode) for mode in ("forward", "training") for problem in problems]
    for call in work:
        if time.perf_counter() - begin > arguments.budget:
            payload["troubles"].append("the budget was spent before the last row")
            break
        try:
            row = call(arguments.device, dtype, repeats)
        except DeviceLostError as error:
            payload["troubles"].append(f"{call.args}: {error}")
            break
        payload["rows"].append(row)
        show(row)
    else:
        payload["complete"] = True
    payload["seconds"] = time.perf_counter() - begin
    write_json(arguments.output, payload)
    print(*payload["troubles"], f"written to {arguments.output}", sep="\n")
    return 0 if payload["complete"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
