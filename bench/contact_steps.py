"""The steps of `python -m bench --first-contact`: what each looks at. Sizes are tiny on the CPU."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.first_contact import Contact, Skip
from bench.gpu_tables import ONE, TEN, TOLERANCES, linear_cost
from bench.harness import device_memory, interleaved
from bench.harness import environment as machine
from bench.masked_layer import (
    FROZEN,
    KEPT,
    NAIVE_TWO,
    ONE_PRODUCT,
    RANK,
    REFILLED,
    SEED,
    MaskedLayer,
    Provider,
    worst_error,
)
from bench.roofline import CHIPS, Chip
from bench.shapes import FLUX1, SD15, SDXL, Conv2d, Linear, batched

OLDEST = {"torch": (2, 10), "triton": (3, 5)}
REGIMES = ("auto", "gather", "tile", *ONE_PRODUCT)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _says(*command: str) -> str:
    """What a program prints; why it does not, where it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"


def _layer(contact: Contact, large: Linear, small: Linear | None = None) -> Linear:
    """The layer, or a tiny one where no GPU is."""
    return large if contact.cuda else small or Linear(48, 64, 96, bias=True, count=1)


def _problem(contact: Contact, shape: Linear | Conv2d, dtype: torch.dtype = torch.bfloat16, **more: Any) -> MaskedLayer:
    return MaskedLayer(shape, (TEN, ONE), dtype=dtype, device=contact.device, **more)


def _ours(regime: str = "auto", mask: str = TEN.name) -> Provider:
    return Provider("ours", mask, regime)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


# --- environment and libraries ---------------------------------------------------------------------------------------


def environment(contact: Contact) -> None:
    with contact.part("machine") as found:
        found.update(machine())
        found["variables"] = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("FADE_", "TRITON_", "CUDA_", "PYTORCH_", "TORCH_", "OMP_", "NVIDIA_"))
        }
        found["torch_config"] = torch.__config__.show()
        found["text"] = f"torch {torch.__version__}, {found['cpu']}, commit {str(found['commit'])[:8]}"
    with contact.part("versions") as found:
        found["torch"] = torch.__version__
        _require(_version(torch.__version__) >= OLDEST["torch"], f"torch {torch.__version__} is older than 2.10")
        import triton

        found["triton"] = triton.__version__
        found["text"] = f"torch {torch.__version__}, Triton {triton.__version__}"
        _require(_version(triton.__version__) >= OLDEST["triton"], f"Triton {triton.__version__} is older than 3.5")
    with contact.part("Triton's cache") as found:
        folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
        entries = list(folder.iterdir()) if folder.is_dir() else []
        found |= {"folder": str(folder), "entries": len(entries), "free_bytes": shutil.disk_usage(Path.home()).free}
        from fade_kernels.triton_kernels import tuning

        path = tuning.cache_path()
        found["tilings"] = path.read_text(encoding="utf-8")[:4000] if path.is_file() else None
        found["text"] = f"{len(entries)} entries; {'measured' if found['tilings'] else 'no measured'} tilings"
    with contact.part("device") as found:
        if not contact.cuda:
            raise Skip("the CPU was asked for")
        found["nvidia_smi"] = _says("nvidia-smi", "-q", "-d", "CLOCK,PERFORMANCE,POWER,TEMPERATURE,MEMORY,COMPUTE")
        found["nvcc"] = _says("nvcc", "--version")
        torch.cuda.init()  # says why, where there is no device
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found["properties"], found["free_bytes"], found["total_bytes"] = str(properties), free, total
        found["capability"] = list(torch.cuda.get_device_capability())
        found["text"] = f"{properties.name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        _require(tuple(found["capability"]) >= (8, 0), f"compute capability {found['capability']} is older than 8.0")
    with contact.part("a product by the library") as found:
        x = torch.randn(64, 64, device=contact.device, dtype=torch.bfloat16)
        found["finite"] = bool((x @ x).isfinite().all())
        _require(found["finite"], "the result is not finite")


def libraries(contact: Contact) -> None:
    import fade_kernels
    from fade_kernels import BitMask
    from fade_kernels._extension import runs_on

    with contact.part("build") as found:
        found.update(fade_kernels.build_info())
        found["text"] = f"{found['compiler']}, CPU code for {found['cpu_capability']}, CUDA {found['cuda_runtime']}"
        _require(bool(found["extension"]), f"no CPU library: {found['reason']}")
    with contact.part("CUDA library") as found:
        if not contact.cuda:
            raise Skip("the CPU was asked for")
        info = fade_kernels.build_info()
        _require(bool(info["cuda"]), f"no CUDA library: {info['cuda_reason']}")
        held, capability = info["architectures"], torch.cuda.get_device_capability()
        found |= {"architectures": held, "capability": list(capability)}
        found["text"] = f"code for {', '.join(held)}; the chip is {capability[0]}.{capability[1]}"
        _require(runs_on(held, capability), f"no code for {capability} among {held}")
    with contact.part("a mask is packed, counted and unpacked"):
        mask = torch.rand(67, 97, device=contact.device) < 0.3
        packed = BitMask.pack(mask)
        _require(packed.count == int(mask.sum()), f"{packed.count} bits counted of {int(mask.sum())}")
        _require(bool((packed.unpack() == mask).all()), "other bits come back")


# --- operators -------------------------------------------------------------------------------------------------------


def _compare(found: dict[str, Any], actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    error = worst_error(actual, expected)
    found |= {"error": error, "tolerance": tolerance, "text": f"error {error:.1e}"}
    _require(error <= tolerance, f"relative error {error:.2e} beyond {tolerance:g}")


def operators(contact: Contact) -> None:
    shapes = (
        Linear(67, 72, 97, bias=True, count=1),
        Linear(1, 33, 40, bias=False, count=1),
        Linear(256, 128, 192, bias=True, count=1),
        Conv2d(2, 5, 7, 6, 3, 1, 1),
        Conv2d(2, 16, 8, 4, 1, 1, 1),
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for shape in shapes:
            for regime in REGIMES:
                name = f"masked LoRA, {regime}, {_name(dtype)}, {shape}"
                with contact.part(name, shape=str(shape), rank=5) as found:
                    problem = _problem(contact, shape, dtype, rank=5, scale=0.7)
                    provider = _ours(regime)
                    actual, expected = problem.training(provider), problem.expected(provider, "training")
                    _compare(found, actual, expected, TOLERANCES[dtype])
        for shape in shapes[:4:3]:
            with contact.part(f"masked values, {_name(dtype)}, {shape}", shape=str(shape)) as found:
                actual, expected = _values_step(_problem(contact, shape, dtype))
                _compare(found, actual, expected, TOLERANCES[dtype])
        _small_operators(contact, dtype)
    _selection(contact)


def _values_step(problem: MaskedLayer) -> tuple[list[Tensor], list[Tensor]]:
    """y, dX, dV of a values adapter, and the same in float64."""
    from fade_kernels import masked_values_conv2d, masked_values_linear

    mask, packed = problem.masks[TEN.name], problem.packed[TEN.name]
    values = (0.1 * torch.randn(packed.count, device=problem.device)).requires_grad_()
    shape = problem.shape

    def step(x: Tensor, weight: Tensor, bias: Tensor | None, v: Tensor, ours: bool) -> list[Tensor]:
        if not ours:
            delta = torch.zeros(mask.shape, dtype=v.dtype, device=v.device).masked_scatter(mask, 0.7 * v)
            y = problem._layer(x, weight + delta.view(weight.shape), bias)
        elif isinstance(shape, Linear):
            y = masked_values_linear(x, weight, bias, v, packed, 0.7)
        else:
            y = masked_values_conv2d(x, weight, bias, v, packed, 0.7, stride=shape.stride, padding=shape.kernel // 2)
        return [y.detach(), *torch.autograd.grad(y, (x, v), problem.grad_output.to(y.dtype))]

    wide = [None if t is None else t.detach().double() for t in (problem.x, problem.weight, problem.bias, values)]
    wide[0].requires_grad_()
    wide[3].requires_grad_()
    return step(problem.x, problem.weight, problem.bias, values, True), step(*wide, False)


def _small_operators(contact: Contact, dtype: torch.dtype) -> None:
    from fade_kernels import (
        accumulate_gradient_magnitude_,
        accumulate_linear_gradient_magnitude_,
        effective_weight,
        effective_weights,
        gather_masked,
        masked_factor_values,
        scatter_masked_,
    )

    problem = _problem(contact, Linear(67, 72, 97, bias=False, count=1), dtype, rank=5)
    mask, packed = problem.masks[TEN.name], problem.packed[TEN.name]
    weight, a, b = problem.weight, problem.lora_a.detach(), problem.lora_b.detach()
    product = b.double() @ a.double()
    exact = weight.double() + 0.7 * torch.where(mask, product, 0.0)
    tolerance, name = TOLERANCES[dtype], _name(dtype)
    with contact.part(f"effective weight, {name}") as found:
        _compare(found, [effective_weight(weight, a, b, packed, 0.7)], [exact], tolerance)
    with contact.part(f"effective weights, rounded at random, {name}") as found:
        rounded = effective_weights([weight], [a], [b], [packed], [0.7], stochastic=True, seed=3)
        _compare(found, rounded, [exact], tolerance)
    with contact.part(f"values of the factors, {name}") as found:
        _compare(found, [masked_factor_values(a, b, packed)], [product[mask]], tolerance)
    with contact.part(f"gather and scatter, {name}") as found:
        values = gather_masked(weight, packed)
        target = scatter_masked_(torch.zeros_like(weight), values, packed)
        _compare(found, [values, target], [weight[mask], torch.where(mask, weight, 0.0)], 0.0)
    with contact.part(f"gradient magnitude, {name}") as found:
        sums = [torch.ones(72, 97, device=contact.device), torch.ones(5, device=contact.device)]
        gradients = [weight, weight[0, :5].clone()]
        expected = [one.double() + g.double().abs() for one, g in zip(sums, gradients, strict=True)]
        accumulate_gradient_magnitude_(sums, gradients)
        _compare(found, sums, expected, 1e-6)
    with contact.part(f"gradient magnitude of a linear layer, {name}") as found:
        total, x, dy = torch.zeros(72, 97, device=contact.device), problem.x.detach(), problem.grad_output
        accumulate_linear_gradient_magnitude_(total, dy, x)
        _compare(found, [total], [(dy.double().t() @ x.double()).abs()], max(tolerance, 1e-4))


def _selection(contact: Contact) -> None:
    from fade_kernels import masked_least_squares, select_top_fraction

    with contact.part("selection of the top fraction") as found:
        sums = [torch.rand(shape, device=contact.device) for shape in ((37, 70), (64, 33), (1, 5))]
        sums[0][:, ::2] = 0.5  # ties
        chosen = select_top_fraction(sums, 0.3)
        kept, number = int(0.3 * sum(s.numel() for s in sums)), sum(mask.count for mask in chosen.masks)
        found |= {"kept": number, "wanted": kept, "text": f"{number} of {kept}"}
        _require(abs(number - kept) <= 1, f"{number} values are kept, not {kept}")
        inside = torch.cat([s[m.unpack()] for s, m in zip(sums, chosen.masks, strict=True)])
        outside = torch.cat([s[~m.unpack()] for s, m in zip(sums, chosen.masks, strict=True)])
        _require(float(inside.min()) >= float(outside.max()), "a smaller value is kept than one that is left out")
    with contact.part("masked least squares") as found:
        data = torch.randn(80, 24, device=contact.device, dtype=torch.float64)
        gram, rhs = data.t() @ data, torch.randn(6, 24, device=contact.device, dtype=torch.float64)
        mask = torch.rand(6, 24, device=contact.device) < 0.5
        from fade_kernels import BitMask

        solution = masked_least_squares(rhs, gram, BitMask.pack(mask))
        rows = [torch.linalg.solve(gram[m][:, m], r[m]) for r, m in zip(rhs, mask, strict=True)]
        _compare(found, [solution], [torch.cat(rows)], 1e-9)


# --- survival of the delta -------------------------------------------------------------------------------------------


def survived(actual: Tensor, base: Tensor, exact: Tensor, dim: int, groups: int = 16) -> tuple[float, float]:
    """Share of the exact term `exact - base` that is in `actual`, by regression, and its standard error.

    From groups of output channels (`dim`), which share neither weights nor their rounding.
    """
    term = (exact - base).movedim(dim, 0).flatten(1)
    rest = (actual.double() - base).movedim(dim, 0).flatten(1)
    shares = [
        float((r * t).sum() / (t * t).sum())
        for r, t in zip(rest.chunk(groups), term.chunk(groups), strict=True)
        if float((t * t).sum()) > 0
    ]
    found = torch.tensor(shares, dtype=torch.float64)
    return float(found.mean()), float(found.std() / len(shares) ** 0.5)


def survival(contact: Contact) -> None:
    large = Linear(8192, 4096, 4096, bias=False, count=1)
    linear = _layer(contact, large, Linear(384, 384, 384, bias=False, count=1))
    conv = Conv2d(8, 320, 320, 64, 3, 1, 1) if contact.cuda else Conv2d(4, 32, 32, 12, 3, 1, 1)
    cases = [(linear, mask, regime) for mask in (TEN, ONE) for regime in REGIMES]
    cases += [(conv, TEN, regime) for regime in ("auto", KEPT)]
    for dtype in (torch.bfloat16, torch.float16):
        for shape, mask, regime in cases:
            ratios = (3e-3, 1e-3, 1e-4) if contact.cuda else (1e-2,)
            kind = "linear" if isinstance(shape, Linear) else "convolution"
            with contact.part(f"{kind}, {regime}, {mask.name}, {_name(dtype)}", shape=str(shape)) as found:
                found["shares"] = [_share(contact, shape, dtype, _ours(regime, mask.name), r) for r in ratios]
                found["text"] = ", ".join(
                    f"{s['delta_over_weight']:g}: y {s['y'][0]:.3f} ± {s['y'][1]:.3f}, dX {s['dx'][0]:.3f} ± "
                    f"{s['dx'][1]:.3f}"
                    for s in found["shares"]
                )
                for one in found["shares"]:
                    for what in ("y", "dx"):
                        share, error = one[what]
                        _require(abs(share - 1) <= max(0.05, 3 * error), f"{found['text']} of the delta is there")


def _share(
    contact: Contact, shape: Linear | Conv2d, dtype: torch.dtype, provider: Provider, ratio: float
) -> dict[str, Any]:
    # Entries of B A are 0.1 sqrt(rank) of the weight's, by how MaskedLayer draws them.
    problem = _problem(contact, shape, dtype, scale=ratio / (0.1 * RANK**0.5))
    actual = problem.training(provider)
    base, exact = problem.expected(FROZEN, "training"), problem.expected(provider, "training")
    dim = -1 if isinstance(shape, Linear) else 1
    y, dx = (survived(actual[i].detach(), base[i], exact[i], dim) for i in (0, 1))
    return {"delta_over_weight": ratio, "y": y, "dx": dx}


# --- host time, compiling, layers ------------------------------------------------------------------------------------


def _peft_like(problem: MaskedLayer) -> list[Tensor]:
    """Three linears, as PEFT computes a layer, without PEFT."""
    y = F.linear(problem.x, problem.weight, problem.bias)
    y = y + F.linear(F.linear(problem.x, problem.lora_a), problem.lora_b) * problem.scale
    return [y, *torch.autograd.grad(y, (problem.x, problem.lora_a, problem.lora_b), problem.grad_output)]


def host(contact: Contact) -> None:
    shapes = batched(SD15.attention, SD15.batch)[::3] if contact.cuda else [_layer(contact, SD15.attention[0])]
    for shape in shapes:
        with contact.part(f"SD 1.5, {shape}", shape=str(shape)) as found:
            problem = _problem(contact, shape)
            calls: dict[str, Callable[[], Any]] = {
                "frozen": lambda p=problem: p.training(FROZEN),
                "PEFT, three linears": lambda p=problem: _peft_like(p),
            }
            for regime in ("auto", REFILLED, KEPT):
                calls[f"ours, {regime}"] = lambda p=problem, r=regime: p.training(_ours(r))
            timings = interleaved(calls, repeats=15, warmup=3, budget=4.0, device=contact.device)
            found["candidates"] = {name: asdict(timing) for name, timing in timings.items()}
            found["text"] = "; ".join(
                f"{name}: {1e6 * (timing.host or timing.median):.0f} us host"
                + (f", {1e6 * timing.median:.0f} us device" if contact.cuda else "")
                for name, timing in timings.items()
            )
            found["bound_by_host"] = [n for n, t in timings.items() if t.host is not None and t.host > t.median]


def compiling(contact: Contact) -> None:
    from fade_kernels import compile_report

    arch = 90
    if contact.cuda:
        capability = torch.cuda.get_device_capability()
        arch = 10 * capability[0] + capability[1]
    cases = [case for module in compile_report.triton_modules() for case in compile_report.cases_of(module)]
    # bf16 is what trains here; kernels without a dtype of their own (masks) too.
    cases = [case for case in cases if case.dtype not in ("fp16", "fp32", "tf32")]
    for case in cases if contact.cuda else cases[:1]:
        configuration = compile_report.configuration(case)
        with contact.part(f"{case.name}, {configuration}", architecture=arch) as found:
            row = compile_report.compile_triton_case(case, arch)
            found.update({name: value for name, value in asdict(row).items() if name != "violations"})
            found["text"] = f"{row.registers} registers, {row.spill_bytes} bytes spilled, {row.shared_bytes} shared"
            _require(not row.violations, "; ".join(row.violations))


def _measured_chip(contact: Contact) -> Chip:
    """The chip's name tells the constants; its bandwidth and rate are looked at here."""
    name = torch.cuda.get_device_name().lower()
    chip = CHIPS[next((key for key in CHIPS if key in name), "h200")]
    source = torch.empty(2**28, device=contact.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(8192, 8192, device=contact.device, dtype=torch.bfloat16) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    timings = interleaved(calls, repeats=7, budget=3.0, device=contact.device)
    bandwidth, matrix = 2 * 4 * 2**28 / timings["copy"].median, 2 * 8192.0**3 / timings["product"].median
    return replace(chip, bandwidth=bandwidth, matrix=matrix)


def layers(contact: Contact) -> None:
    # Triton's interpreter multiplies bf16 bit patterns wrongly.
    dtype = torch.bfloat16 if contact.cuda else torch.float16
    chip = CHIPS["h200"]
    with contact.part("ceilings") as found:
        if not contact.cuda:
            raise Skip("no prediction for a CPU")
        chip = _measured_chip(contact)
        found |= asdict(chip)
        found["text"] = f"{chip.bandwidth / 1e12:.2f} TB/s, {chip.matrix / 1e12:.0f} TFLOP/s"
    shapes = batched(SD15.attention, SD15.batch) if contact.cuda else [Linear(20, 32, 48, bias=True, count=1)]
    for shape in shapes:
        providers = [FROZEN, *(_ours(regime) for regime in ("tile", "gather", *ONE_PRODUCT)), _ours("auto", ONE.name)]
        with contact.part(f"first calls, {shape}", shape=str(shape)) as found:
            problem, found["seconds_of_first_call"] = _problem(contact, shape, dtype), {}
            for provider in providers:
                begin = time.perf_counter()
                actual = problem.training(provider)
                if contact.cuda:
                    torch.cuda.synchronize()
                found["seconds_of_first_call"][provider.name] = time.perf_counter() - begin
                expected = problem.expected(provider, "training", torch.float32 if contact.cuda else torch.float64)
                error = worst_error(actual, expected)
                _require(error <= TOLERANCES[dtype], f"{provider.name}: relative error {error:.2e}")
            slowest = max(found["seconds_of_first_call"].values())
            found["text"] = f"all right; slowest {slowest:.2f} s"
        with contact.part(f"times, {shape}", shape=str(shape)) as found:
            if not contact.cuda:
                raise Skip("no prediction for a CPU")
            calls = {p.name: lambda p=p, problem=problem: problem.training(p) for p in providers}
            timings = interleaved(calls, repeats=11, budget=3.0, device=contact.device)
            found["candidates"] = {
                p.name: asdict(timings[p.name]) | {"predicted": linear_cost(p, shape, chip).seconds(chip)}
                for p in providers
            }
            found["text"] = "measured over predicted: " + ", ".join(
                f"{name} {cell['median'] / cell['predicted']:.2f}" for name, cell in found["candidates"].items()
            )


# --- the one-product mode --------------------------------------------------------------------------------------------


def one_product(contact: Contact) -> None:
    from fade_kernels import effective_weights, masked_lora_linear

    shape = _layer(contact, Linear(2048, 1280, 768, bias=False, count=1))
    problem = _problem(contact, shape, scale=0.01)
    mask, packed = problem.masks[TEN.name], problem.packed[TEN.name]
    a, b = problem.lora_a.detach(), problem.lora_b.detach()

    def rounded(seed: int) -> Tensor:
        layer = [[part] for part in (problem.weight, a, b, packed, problem.scale)]
        return effective_weights(*layer, stochastic=True, seed=seed)[0]

    def product(x: Tensor, seed: int) -> Tensor:
        return masked_lora_linear(x, problem.weight, None, a, b, packed, problem.scale, rounding_seed=seed)

    with contact.part("the seed decides, and nothing else") as found:
        same = torch.equal(product(problem.x.detach(), 5), product(problem.x.detach(), 5))
        other = torch.equal(product(problem.x.detach(), 5), product(problem.x.detach(), 6))
        found |= {"same": same, "other": other}
        _require(same, "the same seed gives other bits")
        _require(not other, "another seed gives the same bits")
    with contact.part("forward and input gradient multiply with the same weight"):
        n, k = problem.weight.shape
        ones = [torch.eye(size, device=contact.device, dtype=problem.dtype) for size in (k, n)]
        forward = product(ones[0], 5).t()
        x = torch.zeros(n, k, device=contact.device, dtype=problem.dtype, requires_grad=True)
        (backward,) = torch.autograd.grad(product(x, 5), x, ones[1])
        _require(torch.equal(forward, backward), "they differ")
    with contact.part("a weight made beforehand is the one made within") as found:
        found["equal"] = torch.equal(rounded(5), forward)
        _require(found["equal"], "the same seed rounds otherwise in `effective_weights`")
    with contact.part("it differs from the frozen weight under the mask alone"):
        _require(torch.equal(rounded(5)[~mask], problem.weight[~mask]), "entries outside the mask have changed")
    with contact.part("the mean over seeds is the exact weight") as found:
        seeds = 256 if contact.cuda else 64
        exact = (problem.weight.double() + problem.scale * (b.double() @ a.double()))[mask]
        draws = torch.stack([rounded(seed)[mask].double() for seed in range(seeds)])
        spread = draws.std(dim=0).clamp_min(1e-12) / seeds**0.5
        z = float(((draws.mean(dim=0) - exact) / spread)[draws.std(dim=0) > 0].mean())
        z *= int((draws.std(dim=0) > 0).sum()) ** 0.5
        found |= {"z": z, "text": f"{z:+.2f} standard errors off"}
        _require(abs(z) < 5, f"biased: {z:.1f} standard errors off")
    with contact.part("errors beside the exact mode's") as found:
        errors = {
            regime: [
                worst_error([one], [other])
                for one, other in zip(
                    problem.training(_ours(regime)), problem.expected(_ours(regime), "training"), strict=True
                )
            ]
            for regime in ("auto", *ONE_PRODUCT)
        }
        found["y, dX, dA, dB"] = errors
        found["text"] = "; ".join(f"{name}: y {e[0]:.2e}, dX {e[1]:.2e}" for name, e in errors.items())
        _require(errors[KEPT][0] <= 1.25 * errors["auto"][0], "the output's error is more than a quarter larger")
    for model in (SD15, SDXL, FLUX1):
        large = max(batched(model.attention, model.batch), key=lambda layer: layer.count * layer.out_features)
        _race(contact, model.name, large)


def _race(contact: Contact, model: str, large: Linear) -> None:
    shape = _layer(contact, large)
    with contact.part(f"time, {model}, {shape}", shape=str(shape)) as found:
        problem, chip = _problem(contact, shape), CHIPS["h200"]
        providers = [FROZEN, _ours("auto"), *(_ours(regime) for regime in ONE_PRODUCT)]
        calls = {p.name: lambda p=p: problem.training(p) for p in providers}
        timings = interleaved(calls, repeats=11, budget=3.0, device=contact.device)
        predicted = {p.name: linear_cost(p, shape, chip).seconds(chip) for p in providers}
        base, base_predicted = timings[FROZEN.name].median, predicted[FROZEN.name]
        found["candidates"] = {name: asdict(timing) for name, timing in timings.items()}
        found["over_frozen"] = {name: timing.median / base for name, timing in timings.items()}
        found["text"] = "; ".join(
            f"{name}: {ratio:.2f}" + (f" (predicted {predicted[name] / base_predicted:.2f})" if contact.cuda else "")
            for name, ratio in found["over_frozen"].items()
        )


# --- captures, memory, hooks -----------------------------------------------------------------------------------------


@contextmanager
def _elsewhere(contact: Contact) -> Iterator[None]:
    """A stream of its own, as warm-up before a capture needs."""
    if not contact.cuda:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _captured(contact: Contact, call: Callable[[], Sequence[Tensor]]) -> Callable[[], Sequence[Tensor]]:
    """The call as a CUDA graph, after three calls; on the CPU the call itself."""
    with _elsewhere(contact):
        for _ in range(3):
            call()
    if not contact.cuda:
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Sequence[Tensor]:
        graph.replay()
        torch.cuda.synchronize()
        return results

    return replay


def captures(contact: Contact) -> None:
    shape = _layer(contact, Linear(4096, 640, 640, bias=True, count=1))
    for provider in (_ours(), _ours("gather", ONE.name), _ours("tile"), _ours(REFILLED)):
        with contact.part(f"forward and backward, {provider.name}", shape=str(shape)) as found:
            problem = _problem(contact, shape)
            replay = _captured(contact, lambda layer=problem, provider=provider: layer.training(provider))
            with torch.no_grad():
                problem.x.copy_(torch.randn_like(problem.x))
            captured = [t.detach().clone() for t in replay()]
            eager = problem.training(provider)
            found["equal"] = all(torch.equal(*pair) for pair in zip(captured, eager, strict=True))
            _compare(found, captured, [t.detach().double() for t in eager], 1e-2)
    with contact.part("a step with Adam, on a weight rounded before each replay", shape=str(shape)) as found:
        moved = {graph: _steps(contact, shape, graph) for graph in (False, True)}
        _compare(found, moved[True], [t.double() for t in moved[False]], 1e-2)
    with contact.part("a first call inside a capture says what it does") as found:
        if not contact.cuda:
            raise Skip("nothing is captured on a CPU")
        _problem(contact, shape).training(_ours())  # compiles
        fresh, graph, before = _problem(contact, shape), torch.cuda.CUDAGraph(), len(contact.payload["warnings"])
        with torch.cuda.graph(graph):
            fresh.training(_ours())
        found["warnings"] = contact.payload["warnings"][before:]
        found["text"] = f"captured, with {len(found['warnings'])} warnings"
        _require(bool(found["warnings"]), "captured without a word, though nothing was known of the mask")


def _steps(contact: Contact, shape: Linear, graph: bool) -> list[Tensor]:
    """A and B after three steps of Adam in the one-product mode, each with another seed."""
    from fade_kernels import effective_weights, masked_lora_linear

    problem = _problem(contact, shape)
    a, b = (t.detach().clone().requires_grad_() for t in (problem.lora_a, problem.lora_b))
    packed, buffer = problem.packed[TEN.name], torch.empty_like(problem.weight)
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    optimiser = torch.optim.Adam([a, b], lr=1e-2, **({"capturable": True} if contact.cuda else {}))

    def step() -> list[Tensor]:
        a.grad.zero_()
        b.grad.zero_()
        y = masked_lora_linear(
            problem.x, problem.weight, problem.bias, a, b, packed, problem.scale, rounded_weight=buffer
        )
        (y.float() - 1).square().mean().backward()
        optimiser.step()
        return [a, b]

    def refill(seed: int) -> None:
        layer = [[part] for part in (problem.weight, a, b, packed, problem.scale)]
        effective_weights(*layer, out=[buffer], stochastic=True, seed=seed)

    refill(0)
    replay = _captured(contact, step) if graph else None
    if replay is None:
        with _elsewhere(contact):
            for _ in range(3):  # as the warm-up of the other
                step()
    for seed in range(1, 4):
        refill(seed)
        (replay or step)()
    return [a.detach().clone(), b.detach().clone()]


def out_of_memory(contact: Contact) -> None:
    from fade_kernels import BitMask, effective_weight, masked_lora_linear, select_top_fraction

    wide = _layer(contact, Linear(8192, 8192, 8192, bias=False, count=1), Linear(4, 64, 64, bias=False, count=1))
    problem = _problem(contact, wide)
    with contact.part("with memory"):
        problem.training(_ours())  # compiles
    delta = (problem.lora_a.detach(), problem.lora_b.detach(), problem.packed[TEN.name], 0.5)
    x = problem.x.detach()
    if contact.cuda:
        sums, bits = torch.rand(32768, 16384, device="cuda"), torch.rand(32768, 16384, device="cuda") < 0.5
    else:
        # More tokens than any memory holds, without taking any.
        x, sums, bits = x[:1].expand(2**42, -1), None, None
    calls: dict[str, Callable[[], Any]] = {
        "masked LoRA": lambda: masked_lora_linear(x, problem.weight, None, *delta),
        "masked LoRA, one-product": lambda: masked_lora_linear(x, problem.weight, None, *delta, rounding_seed=SEED),
    }
    if contact.cuda:
        calls |= {
            "effective weight": lambda: effective_weight(problem.weight, *delta),
            "packing a mask": lambda: BitMask.pack(bits),
            "selection": lambda: select_top_fraction([sums], 0.1),
        }
    for name, call in calls.items():
        with contact.part(name) as found, _full(contact):
            try:
                with torch.no_grad():
                    call()
            except Exception as error:
                found |= {"class": type(error).__name__, "said": str(error)[:2000]}
                found["text"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
                if contact.cuda:
                    _require(isinstance(error, torch.OutOfMemoryError), f"{found['text']}")
                else:
                    _require("alloc" in str(error), f"its text does not name the allocation: {found['text']}")
            else:
                raise AssertionError("nothing failed, though there was no memory")
    with contact.part("the device goes on") as found:
        _compare(found, problem.training(_ours()), problem.expected(_ours(), "training", torch.float32), 2e-2)


@contextmanager
def _full(contact: Contact) -> Iterator[None]:
    """No more memory than is reserved now, and nothing free within it."""
    if not contact.cuda:
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    filling, size = [], 2**30
    while size >= 512:
        try:
            filling.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    try:
        yield
    finally:
        filling.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


def saved_tensor_hooks(contact: Contact) -> None:
    shape = _layer(contact, Linear(4096, 640, 640, bias=True, count=1))
    for provider in (_ours(), _ours("gather", ONE.name), _ours(REFILLED), _ours(KEPT)):
        problem, plain = _problem(contact, shape), []
        with contact.part(f"no hooks, {provider.name}"):
            plain += [t.detach().clone() for t in problem.training(provider)]
        with contact.part(f"copies, {provider.name}", shape=str(shape)) as found, _copies():
            again = problem.training(provider)
            found["equal"] = all(torch.equal(*pair) for pair in zip(plain, again, strict=True))
            _compare(found, again, [t.double() for t in plain], 1e-2)
        with contact.part(f"copies, {provider.name}, without waiting for the device"), _copies():
            if not contact.cuda:
                raise Skip("nothing waits for a CPU")
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                problem.training(provider)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        with contact.part(f"kept on the host, {provider.name}") as found:
            with torch.autograd.graph.save_on_cpu(pin_memory=contact.cuda):
                again = problem.training(provider)
            _compare(found, again, [t.double() for t in plain], 1e-2)


def _copies() -> torch.autograd.graph.saved_tensors_hooks:
    """Hooks under which every saved tensor comes back as another object."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor)


def memory(contact: Contact) -> None:
    shape = _layer(contact, Linear(8192, 3072, 3072, bias=False, count=1))
    weight = 2 * shape.out_features * shape.in_features
    with contact.part("beyond the frozen layer, in bf16 weights", shape=str(shape), weight_bytes=weight) as found:
        problem, taken = _problem(contact, shape), {}
        for provider in (FROZEN, NAIVE_TWO, *(_ours(regime) for regime in REGIMES), _ours("auto", ONE.name)):
            problem.training(provider)
            taken[provider.name] = device_memory(contact.device, lambda p=provider: problem.training(p))
        found["bytes"] = taken
        if not contact.cuda:
            raise Skip("only a GPU's allocator tells")
        extra = {name: (size - taken[FROZEN.name]) / weight for name, size in taken.items()}
        found["weights"] = extra
        found["text"] = ", ".join(f"{name} {ratio:.2f}" for name, ratio in extra.items())
        naive = extra[NAIVE_TWO.name]
        # A second weight of the layer, for as long as a product takes, is what one product and the library's need.
        for regime, most in (("tile", 0.25), ("auto", 0.3), (REFILLED, 0.3)):
            taken = extra[_ours(regime).name]
            _require(taken <= most * naive, f"{regime}: {taken:.2f} weights, naive masked LoRA {naive:.2f}")
    with contact.part("nothing is left behind") as found:
        if not contact.cuda:
            raise Skip("only a GPU's allocator tells")
        problem.training(_ours())
        before = torch.cuda.memory_allocated()
        for regime in REGIMES:
            problem.training(_ours(regime))
        torch.cuda.synchronize()
        found["bytes"] = torch.cuda.memory_allocated() - before
        _require(found["bytes"] <= 0, f"{found['bytes']} bytes are")
