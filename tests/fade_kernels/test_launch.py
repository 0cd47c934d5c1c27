"""How kernels are launched, with a driver that only notes the launches: kept ones get what Triton itself would pass."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fade_kernels import BitMask, mask_facts
from fade_kernels.triton_kernels import (
    effective_weight,
    launch,
    masked_lora_factor_gradients,
    masked_lora_forward,
    masked_lora_input_gradient,
    weight_gradient_magnitude,
)

T, N, K, R = 40, 96, 160, 16


class Launches:
    """What was launched: by Triton's own way (`bound`), and in all (`runs`: grid and arguments)."""

    def __init__(self) -> None:
        self.bound: list[str] = []
        self.runs: list[tuple[Any, ...]] = []


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    noted = Launches()
    device = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(driver, "_active", device)

    def compiled(function: Any, key: Any, signature: Any, device: Any, *rest: Any) -> Any:
        def run(*arguments: Any) -> None:
            noted.runs.append((*arguments[:3], *arguments[9:]))

        kernel = SimpleNamespace(function=None, packed_metadata=None, launch_metadata=lambda *arguments: None, run=run)
        function.device_caches[device][0][key] = kernel
        return kernel

    bind = JITFunction.run

    def bound(function: Any, *arguments: Any, **options: Any) -> Any:
        noted.bound.append(function.fn.__name__)
        return bind(function, *arguments, **options)

    monkeypatch.setattr(JITFunction, "_do_compile", compiled)
    monkeypatch.setattr(JITFunction, "run", bound)
    kernels = (
        masked_lora_forward.masked_lora_forward_kernel,
        masked_lora_input_gradient.masked_lora_input_gradient_kernel,
        masked_lora_factor_gradients.masked_lora_factor_gradients_kernel,
        masked_lora_factor_gradients.reduce_partials_kernel,
        weight_gradient_magnitude.weight_gradient_magnitude_kernel,
        effective_weight.effective_weight_kernel,
        effective_weight.effective_weights_kernel,
    )
    kept = (
        masked_lora_forward.KERNEL._plans,
        masked_lora_input_gradient.KERNEL._plans,
        masked_lora_factor_gradients._plans,
        weight_gradient_magnitude._plans,
        effective_weight._launches,
        effective_weight._tables,
    )

    def forget() -> None:
        for kernel in kernels:
            kernel.device_caches.clear()
        for plans in kept:
            plans.clear()

    forget()
    yield noted
    forget()


def problem(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = {"x": (T, K), "dy": (T, N), "weight": (N, K), "bias": (N,), "lora_a": (R, K), "lora_b": (N, R)}
    tensors = {name: torch.randn(size, generator=random).to(dtype) for name, size in sizes.items()}
    mask = BitMask.pack(torch.rand(N, K, generator=random) < 0.01)
    return {**tensors, "mask_words": mask.words, "scale": torch.tensor(0.5), "saliency": torch.zeros(N, K)}


DELTA = ("lora_a", "lora_b", "mask_words", "scale")


def forward(p: dict[str, torch.Tensor]) -> None:
    masked_lora_forward.masked_lora_forward(p["x"], p["weight"], p["bias"], *(p[name] for name in DELTA))


def input_gradient(p: dict[str, torch.Tensor]) -> None:
    masked_lora_input_gradient.masked_lora_input_gradient(p["dy"], p["weight"], *(p[name] for name in DELTA))


def factor_gradients(p: dict[str, torch.Tensor]) -> None:
    masked_lora_factor_gradients.masked_lora_factor_gradients(p["dy"], p["x"], *(p[name] for name in DELTA))


def magnitude(p: dict[str, torch.Tensor]) -> None:
    weight_gradient_magnitude.accumulate_linear_gradient_magnitude_(p["saliency"], p["dy"], p["x"], "abs", False)


def merged(p: dict[str, torch.Tensor]) -> None:
    out = p.setdefault("out", torch.empty_like(p["weight"]))
    effective_weight.effective_weight(p["weight"], *(p[name] for name in DELTA), out=out, stochastic=True, seed=3)


def merged_together(p: dict[str, torch.Tensor]) -> None:
    out = p.setdefault("out", torch.empty_like(p["weight"]))
    layer = effective_weight.Layer(p["weight"], *(p[name] for name in DELTA), out=out)
    effective_weight.effective_weights([layer, layer], stochastic=True, seed=3)


CALLS = [forward, input_gradient, factor_gradients, magnitude, merged, merged_together]


def comparable(run: tuple[Any, ...]) -> list[Any]:
    """A launch's grid and arguments; of tensors what the code was made for, because results are new in every call."""
    return [(a.shape, a.dtype, a.stride()) if isinstance(a, torch.Tensor) else a for a in run]


@pytest.mark.parametrize("call", CALLS)
def test_a_kept_launch_passes_what_triton_does(call: Callable[..., None], launches: Launches) -> None:
    arguments = problem()
    call(arguments)
    first, bound = launches.runs[:], launches.bound[:]
    assert len(first) == len(bound) > 0
    call(arguments)
    assert launches.bound == bound  # nothing was bound again
    assert list(map(comparable, launches.runs[len(first) :])) == list(map(comparable, first))
    call(problem(torch.float16))
    assert len(launches.bound) == 2 * len(bound)


def test_a_pointer_that_is_not_aligned_has_code_of_its_own(launches: Launches) -> None:
    arguments = problem()
    forward(arguments)
    shifted = torch.empty(T * K + 1, dtype=torch.bfloat16)[1:].view(T, K)
    for _ in range(2):
        forward(arguments | {"x": shifted})
    assert len(launches.bound) == 2 and launches.runs[-1][3] is shifted
    forward(arguments)
    assert len(launches.bound) == 2


def test_the_mask_decides_what_is_walked(launches: Launches) -> None:
    arguments = problem()
    forward(arguments)
    order = mask_facts.tile_order(arguments["mask_words"], K, 64, 64, along="k")
    assert any(argument is order.tiles for argument in launches.runs[-1])
    masked_lora_forward.masked_lora_forward(
        arguments["x"], arguments["weight"], None, *(arguments[name] for name in DELTA), form="full"
    )
    assert not any(argument is order.tiles for argument in launches.runs[-1])


def test_a_table_of_layers_is_built_once(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem()
    scale = arguments["scale"]
    build = effective_weight.LayerTable.build
    built: list[int] = []
    monkeypatch.setattr(effective_weight.LayerTable, "build", lambda *given: built.append(1) or build(*given))
    for _ in range(3):
        merged_together(arguments)
    scale.fill_(2.0)  # read on the device
    merged_together(arguments)
    assert len(built) == 1
    monkeypatch.setattr(effective_weight, "capturing", lambda tensor: True)
    merged_together(arguments)
    assert effective_weight._captured_tables
    effective_weight._captured_tables.clear()
    arguments["out"] = torch.empty_like(arguments["out"])
    with pytest.raises(RuntimeError, match="call once before the capture"):
        merged_together(arguments)
    # Factors of two dtypes are copied for the call, so that their table is of no use for the next.
    monkeypatch.setattr(effective_weight, "capturing", lambda tensor: False)
    built.clear()
    for _ in range(2):
        merged_together(arguments | {"lora_a": arguments["lora_a"].float()})
    assert len(built) == 2


def test_launches_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_KEPT", 3)
    plans: dict[Any, int] = {}
    assert [launch.kept(plans, i, lambda i=i: 10 * i) for i in range(5)] == [0, 10, 20, 30, 40]
    assert plans == {2: 20, 3: 30, 4: 40}


@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33])
def test_integers(n: int) -> None:
    assert launch.ceil_div(n, 32) == (n + 31) // 32
    power = launch.power_of_2_from(n)
    assert power >= n > power // 2 and power & (power - 1) == 0
