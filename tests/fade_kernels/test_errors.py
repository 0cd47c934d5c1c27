"""What is heard of errors inside the compiled libraries: torch's own text and class, out of memory above all."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

import fade_kernels
from bench.plans import Prepared, Row, measure_row
from bench.roofline import CHIPS
from fade_kernels import BitMask, _ops
from fade_kernels._ops import errors

needs_extension = pytest.mark.skipif(
    not fade_kernels.build_info()["extension"], reason="the compiled extension is not there"
)

FAILED_ALLOCATION = (
    "aoti_torch_aten_new_empty(self, sizes) API call failed at include/torch/csrc/stable/ops.h, line 143"
)


@pytest.fixture(params=["torch 2.13", "before"])
def torch_tells(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether torch can be asked for the text of an exception behind its C interface."""
    tells = request.param != "before"
    if not tells:
        monkeypatch.setattr(errors, "_last_words", lambda: lambda: "")
    elif Version(torch.__version__) < Version("2.13"):
        pytest.skip("this torch cannot be asked")
    return tells


@needs_extension
def test_the_allocator_is_heard_on_the_host(torch_tells: bool) -> None:
    """More memory than there are addresses for."""
    words = torch.zeros(1, 1, dtype=torch.int32).expand(2**23, 2**23)
    with pytest.raises(RuntimeError, match="mask_row_counts: .*DefaultCPUAllocator: can't allocate memory") as caught:
        _ops.mask_row_counts(words, 32 * 2**23)
    accelerate = pytest.importorskip("accelerate.utils.memory")
    assert accelerate.should_reduce_batch_size(caught.value)
    if torch_tells:
        assert "you tried to allocate" in str(caught.value)


def count_rows() -> Tensor:
    return BitMask.full((4, 40)).row_counts


@pytest.fixture
def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """`mask_row_counts` fails in an allocation, as if on a GPU, until the list has three entries: one for each call."""
    calls: list[int] = []

    def kernel(mask_words: Tensor, columns: int) -> Tensor:
        calls.append(columns)
        if len(calls) <= 3:
            raise RuntimeError(FAILED_ALLOCATION)
        return torch.zeros(len(mask_words), dtype=torch.int64)

    monkeypatch.setattr(errors, "_last_words", lambda: lambda: "")
    monkeypatch.setattr(errors, "_cuda_device", lambda arguments: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with torch.library._scoped_library("fade_kernels", "IMPL") as library:
        library.impl("mask_row_counts", kernel, "CPU", allow_override=True)
        yield calls


def test_out_of_memory_on_a_device_is_torch_s_own_class(out_of_memory: list[int]) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="fade_kernels::mask_row_counts: CUDA out of memory."):
        count_rows()


def test_accelerate_retries_with_a_smaller_batch(out_of_memory: list[int]) -> None:
    accelerate = pytest.importorskip("accelerate")
    batches = []

    @accelerate.utils.find_executable_batch_size(starting_batch_size=16)
    def train(batch_size: int) -> None:
        batches.append(batch_size)
        count_rows()

    train()
    assert len(batches) == 4
    assert batches == sorted(batches, reverse=True)


def test_a_benchmark_goes_on_after_it(out_of_memory: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))

    def prepare(device: torch.device) -> Prepared:
        return Prepared({"too large": count_rows, "fits": lambda: None})

    cells = measure_row(Row("row", 1, prepare), "forward", torch.device("cpu"), next(iter(CHIPS.values())), 0.1)
    assert emptied
    assert "OutOfMemoryError" in cells["too large"]["error"]
    assert "median" in cells["fits"]


def test_a_failure_of_the_device_is_no_lack_of_memory(
    out_of_memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kernel did wrong is told where memory is asked for next."""

    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        count_rows()
    assert not isinstance(caught.value, torch.OutOfMemoryError)


def test_backward_is_heard_too(out_of_memory: list[int]) -> None:
    def kernel(*args: Any) -> Tensor:
        raise RuntimeError(FAILED_ALLOCATION)

    x = torch.randn(3, 40, requires_grad=True)
    mask = BitMask.full((4, 40))
    y = fade_kernels.masked_lora_linear(x, torch.randn(4, 40), None, torch.randn(2, 40), torch.randn(4, 2), mask)
    with torch.library._scoped_library("fade_kernels", "IMPL") as library:
        for name in ("masked_lora_linear_input_gradient", "masked_lora_linear_backward"):
            if hasattr(torch.ops.fade_kernels, name):
                library.impl(name, kernel, "CPU", allow_override=True)
        with pytest.raises(torch.OutOfMemoryError, match="fade_kernels::masked_lora_linear: CUDA out of memory."):
            y.sum().backward()


@pytest.mark.parametrize("message", ["the mask has 3 set bits, not 4", "CUDA error: misaligned address"])
def test_other_errors_stay_as_they_are(message: str) -> None:
    assert errors.cause_of(RuntimeError(message), "gather_masked", ()) is None


def test_a_workspace_that_does_not_fit() -> None:
    cause = errors.cause_of(RuntimeError("std::bad_alloc"), "masked_lora_linear", ())
    assert "DefaultCPUAllocator: can't allocate memory" in str(cause)
