"""Tests of the Triton kernels without a GPU: the interpreter runs them block by block on CPU tensors.

Triton reads TRITON_INTERPRET when it is imported, so these tests need a process of their own:
`TRITON_INTERPRET=1 python -m pytest tests/interpreter`. A plain `pytest` passes them over here and runs them through
`tests/fade_kernels/test_triton_kernels.py`.
"""

import importlib.util
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:
        return
    asked = [Path(config.invocation_params.dir, arg.split("::", 1)[0]).resolve() for arg in config.args]
    if any(path.is_relative_to(HERE) for path in asked):
        raise pytest.UsageError("tests/interpreter needs TRITON_INTERPRET=1 set before Python starts")


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor.fill_(True)

    return make_poisoned


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN (integers: their largest value), so that an element nobody wrote shows up."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", _poisoned(Tensor.new_empty))


@pytest.fixture
def rng() -> torch.Generator:
    """Random numbers from a fresh seed, printed with a failure; FADE_TEST_SEED repeats one."""
    seed = int(os.environ.get("FADE_TEST_SEED") or secrets.randbits(32))
    print(f"FADE_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def mutate(tmp_path: Path) -> Iterator[Callable[[ModuleType, str, str], ModuleType]]:
    """mutate(module, old, new): the module built from its source with `old`, which must occur once, replaced.

    A check of a kernel is worth something only if it fails on the mutant.
    """
    loaded = []

    def build(module: ModuleType, old: str, new: str) -> ModuleType:
        source = Path(module.__file__).read_text()
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__name__}"
        name = f"{module.__name__.rsplit('.', 1)[-1]}_mutant_{len(loaded)}"
        path = tmp_path / f"{name}.py"
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(name, path)
        mutant = importlib.util.module_from_spec(spec)
        sys.modules[name] = mutant
        loaded.append(name)
        spec.loader.exec_module(mutant)
        return mutant

    yield build
    for name in loaded:
        sys.modules.pop(name, None)
