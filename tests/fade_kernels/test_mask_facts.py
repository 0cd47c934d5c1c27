"""What is kept with a mask's memory: found once for the same words, gone with them, unknown in a capture."""

import gc
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fade_kernels import (
    BitMask,
    mask_facts,
    masked_lora_conv2d,
    masked_lora_linear,
    masked_values_linear,
    reference,
)
from fade_kernels.positions import find_tile_order


def words_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 3 / rows
    return BitMask.pack(mask).words


def test_the_same_words_are_found_through_any_tensor() -> None:
    words = words_of(70, 100)
    kept = mask_facts.kept_with(words)
    assert mask_facts.kept_with(words.detach()) is kept
    assert mask_facts.kept_with(words.view(70, 4)) is kept
    others = (words[1:], words[:, :3], words.clone())
    assert all(mask_facts.kept_with(other) is not kept for other in others)
    first = words.detach()
    del words
    assert mask_facts.kept_with(first) is kept


def test_what_is_known_goes_with_the_memory_and_with_a_change() -> None:
    words = words_of(70, 100)
    before = len(mask_facts._by_storage)
    kept = mask_facts.kept_with(words)
    assert len(mask_facts._by_storage) == before + 1
    words[0, 0] ^= 1
    assert mask_facts.kept_with(words) is not kept
    view = words.detach()
    del words
    gc.collect()
    assert len(mask_facts._by_storage) == before + 1
    del view
    gc.collect()
    assert len(mask_facts._by_storage) == before


@pytest.mark.parametrize("kind", ["linear", "values", "convolution"])
def test_hooks_on_saved_tensors_do_not_reach_the_words(kind: str) -> None:
    """As offloading of what is saved has: hooks that give back other memory, of which nothing would be known."""
    rows, columns, given = 70, 100, []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if "backward" in str(operator) or "gradient" in str(operator):
                given.extend(a.data_ptr() for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.int32)
            return operator(*args, **(kwargs or {}))

    mask = BitMask.pack(torch.rand(rows, columns) < 0.1)
    a, b, values = (torch.randn(size, requires_grad=True) for size in ((4, columns), (rows, 4), (mask.count,)))

    def call() -> torch.Tensor:
        if kind == "linear":
            return masked_lora_linear(x, torch.zeros(rows, columns), None, a, b, mask)
        if kind == "values":
            return masked_values_linear(x, torch.zeros(rows, columns), None, values, mask)
        return masked_lora_conv2d(
            x, torch.zeros(rows, columns, 1, 1), None, a[..., None, None], b[..., None, None], mask
        )

    x = torch.randn((2, columns, 3, 3) if kind == "convolution" else (5, columns), requires_grad=True)
    call().square().sum().backward()
    wanted, x.grad = x.grad, None
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor.clone()):
        y = call()
    with Watched():
        y.square().sum().backward()
    assert given and set(given) == {mask.words.data_ptr()}
    torch.testing.assert_close(x.grad, wanted)


def test_a_capture_warns_once_of_masks_that_it_counts_as_full(monkeypatch: pytest.MonkeyPatch) -> None:
    known, unknown = words_of(70, 100), words_of(70, 100, seed=1)
    facts = mask_facts.mask_facts(known, 100)
    monkeypatch.setattr(mask_facts, "capturing", lambda words: True)
    mask_facts._warn_of_unknown_masks.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mask_facts.mask_facts(known, 100) == facts
    with pytest.warns(RuntimeWarning, match="Run the step once before the capture"):
        assert mask_facts.mask_facts(unknown, 100).density == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mask_facts.mask_facts(words_of(70, 100, seed=2), 100).occupancy == 1.0
    assert not mask_facts.kept_with(unknown)
    assert mask_facts.tile_order(known, 100, 16, 32, along="k") is None
    monkeypatch.setattr(mask_facts, "capturing", lambda words: False)
    order = mask_facts.tile_order(known, 100, 16, 32, along="k")
    monkeypatch.setattr(mask_facts, "capturing", lambda words: True)
    assert mask_facts.tile_order(known, 100, 16, 32, along="k") is order


@pytest.mark.parametrize("tile", [(16, 32), (64, 64), (32, 128)])
@pytest.mark.parametrize("shape", [(1, 1), (70, 100), (33, 1500), (1100, 40)])
def test_occupied_tiles_come_first(shape: tuple[int, int], tile: tuple[int, int]) -> None:
    words = words_of(*shape, seed=shape[0])
    padding = -shape[1] % 32
    if padding:
        words[:, -1] |= -1 << (32 - padding)  # bits beyond the last column are no bits
    occupancy = reference.mask_occupancy(words, shape[1], *tile)
    for along, strips in (("k", occupancy), ("n", occupancy.t())):
        tiles, counts = find_tile_order(words, shape[1], *tile, along=along)
        assert tiles.dtype == counts.dtype == torch.int32 and tiles.is_contiguous()
        for strip, listed, count in zip(strips, tiles.tolist(), counts.tolist(), strict=True):
            assert listed[:count] == strip.nonzero().flatten().tolist()
            assert listed[count:] == (~strip).nonzero().flatten().tolist()
