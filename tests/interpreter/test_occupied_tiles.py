"""Lists of occupied tiles under the interpreter, against the definition of occupancy."""

from types import ModuleType
from typing import Any

import pytest
import torch
from interpreter_testing import random_mask

from fade_kernels import reference
from fade_kernels.triton_kernels import occupied_tiles as kernel


def agrees(module: ModuleType, words: torch.Tensor, columns: int, tile: tuple[int, int]) -> bool:
    """Whether the lists along K and along N are those of `reference.mask_occupancy`."""
    occupancy = reference.mask_occupancy(words, columns, *tile)
    for along, strips in (("k", occupancy), ("n", occupancy.t())):
        tiles, counts = module.occupied_tiles(words, *tile, along=along)
        expected = [strip.nonzero().flatten().tolist() for strip in strips]
        listed = [row[:count].tolist() for row, count in zip(tiles, counts.tolist(), strict=True)]
        if listed != expected:
            return False
    return True


def sparse_mask(rows: int, columns: int, rng: torch.Generator) -> torch.Tensor:
    return reference.pack_mask(torch.rand(rows, columns, generator=rng) < 3 / rows)


@pytest.mark.parametrize("tile", [(16, 32), (64, 64), (32, 128)])
@pytest.mark.parametrize("shape", [(1, 1), (70, 100), (33, 1500), (1100, 40)])
def test_lists_the_occupied_tiles(shape: tuple[int, int], tile: tuple[int, int], rng: torch.Generator) -> None:
    assert agrees(kernel, sparse_mask(*shape, rng), shape[1], tile)
    for kind in ("empty", "full"):
        assert agrees(kernel, random_mask(*shape, kind, rng), shape[1], tile)


def test_rows_may_be_strided(rng: torch.Generator) -> None:
    words = sparse_mask(70, 100, rng)
    padded = torch.full((70, 9), -1, dtype=torch.int32)
    padded[:, : words.shape[1]] = words
    assert agrees(kernel, padded[:, : words.shape[1]], 100, (16, 32))


def test_check_fails_on_a_mutant(rng: torch.Generator, mutate: Any) -> None:
    mutant = mutate(kernel, "count += tl.sum(b_any, axis=0)", "count = tl.sum(b_any, axis=0)")
    assert not agrees(mutant, random_mask(33, 1500, "full", rng), 1500, (16, 32))
