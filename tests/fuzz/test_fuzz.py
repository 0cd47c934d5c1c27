"""Ten seconds of mutated adapter files, and that the fuzzer would notice a reader that lets something through."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import fade.adapter_file
from fade_kernels import BitMask

from .run import LIMITED, Fuzzer, run


def test_mutated_adapter_files_are_refused_or_read_as_they_are() -> None:
    result = run(seed=random.getrandbits(24), seconds=10)
    assert not result.failures, result.failures[:3]
    assert result.files > result.accepted > 0


def one_bit_more(file: Any) -> Any:
    name, layer = next(iter(file.layers.items()))
    bits = layer.mask.unpack()
    bits.view(-1)[int(torch.randint(bits.numel(), ()))] ^= True
    return dataclasses.replace(file, layers={**file.layers, name: dataclasses.replace(layer, mask=BitMask.pack(bits))})


def one_number_more(file: Any) -> Any:
    name, layer = next(iter(file.layers.items()))
    wrong = fade.adapter_file.LayerTensors(layer.mask, values=torch.zeros(layer.mask.count + 1))
    return dataclasses.replace(file, layers={**file.layers, name: wrong})


def a_large_table(file: Any) -> Any:
    torch.empty(200 << 20, dtype=torch.uint8)
    return file


@pytest.mark.parametrize("fault", [one_bit_more, one_number_more, *([a_large_table] if LIMITED else [])])
def test_a_reader_at_fault_is_noticed(fault: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzzer = Fuzzer(5, tmp_path)
    read = fade.adapter_file.read_adapter_file
    accepted = next(i for i in range(500) if fuzzer.check(i) == "accepted")
    monkeypatch.setattr("fade.adapter_file.read_adapter_file", lambda path: fault(read(path)))
    with pytest.raises((AssertionError, RuntimeError, MemoryError)):
        fuzzer.check(accepted)


def test_a_file_is_the_same_each_time(tmp_path: Path) -> None:
    first, second = (Fuzzer(6, tmp_path) for _ in range(2))
    assert [first.file(i) for i in range(50)] == [second.file(i) for i in range(50)]
