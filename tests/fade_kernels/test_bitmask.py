"""Packed masks: the layout, its inverse, counts and occupancy, and the bit-exact copies under a mask.

Compiled kernels are compared with what plain PyTorch says of the bool mask; operators also through opcheck.
"""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import OPS, generator, opcheck

from fade_kernels import BitMask, gather_masked, reference, scatter_masked_

SHAPES = [(1, 1), (3, 31), (4, 32), (5, 33), (17, 64), (2, 100), (300, 257), (0, 7), (7, 0)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64]

shapes = st.tuples(st.integers(1, 40), st.integers(1, 100))
densities = st.sampled_from([0.0, 0.02, 0.5, 1.0])
seeds = st.integers(0, 2**31)


def random_mask(shape: tuple[int, ...], density: float, seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=generator(seed)) < density


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_pack_unpack_count(shape: tuple[int, int], density: float) -> None:
    mask = random_mask(shape, density, 1)
    packed = BitMask.pack(mask)
    assert packed.shape == shape
    assert packed.words.dtype == torch.int32
    assert packed.words.shape == (shape[0], -(-shape[1] // 32))
    assert torch.equal(packed.unpack(), mask)
    assert packed.count == int(mask.sum())
    assert torch.equal(packed.row_counts, mask.sum(1))
    assert packed.density == (int(mask.sum()) / mask.numel() if mask.numel() else 0.0)
    assert torch.equal(packed.words, reference.pack_mask(mask))
    assert torch.equal(reference.unpack_mask(packed.words, shape[1]), mask)
    assert torch.equal(reference.mask_row_counts(packed.words, shape[1]), mask.sum(1))


def test_layout() -> None:
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[0, 0] = mask[0, 31] = mask[1, 33] = True
    assert BitMask.pack(mask).words.tolist() == [[1 - 2**31, 0], [0, 2]]


@settings(max_examples=60, deadline=None)
@given(shapes, densities, seeds)
def test_properties(shape: tuple[int, int], density: float, seed: int) -> None:
    mask = random_mask(shape, density, seed)
    packed = BitMask.pack(mask)
    assert torch.equal(packed.unpack(), mask)
    assert packed.count == int(mask.sum())
    again = BitMask.from_words(packed.words.clone(), shape)
    assert again == packed
    assert BitMask.pack(~mask) != packed
    assert BitMask.pack(~mask).count + packed.count == mask.numel()


@settings(max_examples=60, deadline=None)
@given(shapes, densities, seeds, st.integers(1, 70), st.integers(1, 70))
def test_occupancy(shape: tuple[int, int], density: float, seed: int, tile_n: int, tile_k: int) -> None:
    mask = random_mask(shape, density / 4, seed)
    packed = BitMask.pack(mask)
    expected = torch.stack(
        [torch.stack([tile.any() for tile in rows.split(tile_k, 1)]) for rows in mask.split(tile_n, 0)]
    )
    assert torch.equal(packed.occupancy((tile_n, tile_k)), expected)
    assert torch.equal(reference.mask_occupancy(packed.words, shape[1], tile_n, tile_k), expected)


@settings(max_examples=60, deadline=None)
@given(shapes, densities, seeds)
def test_positions(shape: tuple[int, int], density: float, seed: int) -> None:
    mask = random_mask(shape, density, seed)
    columns = mask.nonzero()[:, 1].to(torch.uint16)
    lazy = BitMask.from_positions(mask.sum(1).int(), columns, shape)
    assert (lazy.shape, lazy.count, lazy.density) == (shape, int(mask.sum()), int(mask.sum()) / mask.numel())
    assert lazy.positions()[1] is columns  # nothing was built for all that
    assert torch.equal(lazy.words, reference.pack_mask(mask))
    counts, columns = lazy.positions()
    assert torch.equal(counts, mask.sum(1)) and torch.equal(columns, mask.nonzero()[:, 1])


def test_copies_are_of_the_same_bits() -> None:
    mask = random_mask((6, 70), 0.3, 5)
    lazy = BitMask.from_positions(mask.sum(1), mask.nonzero()[:, 1], mask.shape)
    for made in (BitMask.pack(mask), lazy):
        for again in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert again == made and again.count == made.count


def test_masks_made_in_inference_mode_can_be_trained_with() -> None:
    mask = random_mask((6, 70), 0.3, 6)
    with torch.inference_mode():
        packed = BitMask.pack(mask)
        lazy = BitMask.from_positions(mask.sum(1), mask.nonzero()[:, 1], mask.shape)
        made = (packed, BitMask(packed.words, packed.shape), packed.to("meta"), lazy)
        words = [each.words for each in made]
    assert not any(each.is_inference() for each in words)


def test_positions_in_blocks() -> None:
    mask = random_mask((1025, 4500), 0.9, 4)  # more than two blocks of positions
    lazy = BitMask.from_positions(mask.sum(1), mask.nonzero()[:, 1], mask.shape)
    assert torch.equal(lazy.to("cpu").unpack(), mask)


def test_occupancy_is_made_once() -> None:
    packed = BitMask.pack(random_mask((50, 50), 0.01, 3))
    assert packed.occupancy(16) is packed.occupancy((16, 16))
    assert packed.occupancy(16).shape == (4, 4)


def test_weights_of_more_dimensions_and_strided_masks() -> None:
    mask = random_mask((6, 5, 3, 3), 0.3, 4)
    packed = BitMask.pack(mask)
    assert packed.shape == (6, 45)
    assert torch.equal(packed.unpack(), mask.reshape(6, 45))
    strided = mask.to(memory_format=torch.channels_last)
    assert BitMask.pack(strided) == packed
    transposed = random_mask((33, 7), 0.5, 5).t()
    assert torch.equal(BitMask.pack(transposed).unpack(), transposed)


def test_full() -> None:
    packed = BitMask.full((3, 2, 5, 5))
    assert packed.shape == (3, 50)
    assert packed.count == 150
    assert packed.density == 1.0
    assert BitMask.from_words(packed.words, (3, 50)) == packed  # padding bits are 0


def test_equality_repr_device() -> None:
    packed = BitMask.pack(random_mask((4, 40), 0.5, 6))
    assert packed != BitMask.from_words(packed.words, (4, 64))  # the same words, another shape
    assert (packed == 3) is False
    assert "shape=(4, 40)" in repr(packed)
    assert packed.to("cpu") is packed
    meta = packed.to("meta")
    assert meta.device.type == "meta"
    with pytest.raises(TypeError):
        hash(packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (40, 3, 3, 3), (7, 0), (129, 600)])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_gather_scatter_are_bit_exact(dtype: torch.dtype, shape: tuple[int, ...], density: float) -> None:
    random = generator(7)
    size = torch.empty((), dtype=dtype).element_size()
    # Random bit patterns: NaN payloads, infinities and denormals included.
    weight = torch.randint(0, 256, (*shape, size), generator=random, dtype=torch.uint8).view(dtype).reshape(shape)
    mask = random_mask(shape, density, 8)
    packed = BitMask.pack(mask)

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(torch.uint8)

    values = gather_masked(weight, packed)
    assert values.dtype == dtype
    assert torch.equal(bits(values), bits(weight[mask]))
    assert torch.equal(bits(reference.gather_masked(weight, packed.words, packed.count)), bits(weight[mask]))

    other = torch.randint(0, 256, (*shape, size), generator=random, dtype=torch.uint8).view(dtype).reshape(shape)
    expected = other.clone()
    expected[mask] = values
    for layout in (torch.contiguous_format, torch.channels_last if len(shape) == 4 else torch.contiguous_format):
        target = other.clone(memory_format=torch.preserve_format).contiguous(memory_format=layout)
        assert scatter_masked_(target, values, packed) is target
        assert torch.equal(bits(target), bits(expected))
    by_definition = other.clone()
    reference.scatter_masked_(by_definition, values, packed.words)
    assert torch.equal(bits(by_definition), bits(expected))


def test_gather_scatter_strided_weight_and_parameter() -> None:
    base = torch.randn(33, 20, generator=generator(9))
    mask = random_mask((20, 33), 0.4, 10)
    packed = BitMask.pack(mask)
    values = gather_masked(base.t(), packed)
    assert torch.equal(values, base.t()[mask])
    scatter_masked_(base.t(), -values, packed)
    assert torch.equal(base.t()[mask], -values)
    parameter = torch.nn.Parameter(torch.zeros(20, 33))
    scatter_masked_(parameter, values, packed)
    assert torch.equal(parameter.detach()[mask], values)
    assert parameter.is_leaf


def test_operators_pass_opcheck() -> None:
    mask = random_mask((9, 70), 0.3, 11)
    packed = BitMask.pack(mask)
    weight = torch.randn(9, 70, generator=generator(12))
    conv = torch.randn(9, 7, 5, 2, generator=generator(13)).to(memory_format=torch.channels_last)
    opcheck(OPS.pack_mask, (mask,))
    opcheck(OPS.pack_mask, (mask.t(),))
    opcheck(OPS.unpack_mask, (packed.words, 70))
    opcheck(OPS.mask_row_counts, (packed.words, 70))
    opcheck(OPS.mask_occupancy, (packed.words, 70, 4, 16))
    opcheck(OPS.gather_masked, (weight, packed.words, packed.count))
    opcheck(OPS.gather_masked, (conv, packed.words, packed.count))
    values = weight[mask]
    opcheck(OPS.scatter_masked_, (weight, values, packed.words))
    opcheck(OPS.scatter_masked_, (conv, values, packed.words))


def test_positions_that_are_none() -> None:
    for counts, columns, message in [
        ([1, 1], [0], "add up to 2"),
        ([1], [0], "row_counts is out of range"),
        ([-1, 1], [], "row_counts is out of range"),
        ([6, 0], [0, 1, 2, 3, 4, 5], "row_counts is out of range"),
        ([1, 1], [0, 5], "out of range"),
        ([1, 1], [0, -1], "out of range"),
        ([2, 0], [1, 1], "out of order"),
        ([1, 2], [4, 2, 1], "out of order"),
    ]:
        with pytest.raises(ValueError, match=message):
            BitMask.from_positions(torch.tensor(counts), torch.tensor(columns, dtype=torch.int64), (2, 5))
    with pytest.raises(ValueError, match="must be integers"):
        BitMask.from_positions(torch.tensor([1, 1]), torch.tensor([0.0, 1.5]), (2, 5))
    assert BitMask.from_positions(torch.tensor([1, 2]), torch.tensor([4, 1, 2]), (2, 5)).count == 3


def with_padding_set(words: torch.Tensor, columns: int) -> torch.Tensor:
    """The words as an overwritten buffer might hold them: every bit beyond the last column is set."""
    overwritten = words.clone()
    overwritten[:, -1] |= ~reference.pack_mask(torch.ones(1, columns, dtype=torch.bool))[0, -1]
    return overwritten


@pytest.mark.parametrize("shape", [(1, 1), (40, 70), (300, 31), (129, 600)])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_padding_bits_are_ignored(shape: tuple[int, int], density: float) -> None:
    """Of every operator, compiled and defined, and no memory beyond the weight is read or written."""
    mask = random_mask(shape, density, 15)
    words, columns = with_padding_set(reference.pack_mask(mask), shape[1]), shape[1]
    count = int(mask.sum())
    memory = torch.randn(mask.numel() + 64, generator=generator(16))
    weight, beyond = memory[: mask.numel()].view(shape), memory[mask.numel() :].clone()
    for operators in (OPS, reference):
        assert torch.equal(operators.unpack_mask(words, columns), mask)
        assert torch.equal(operators.mask_row_counts(words, columns), mask.sum(1))
        clean = reference.mask_occupancy(reference.pack_mask(mask), columns, 5, 3)
        assert torch.equal(operators.mask_occupancy(words, columns, 5, 3), clean)
        assert torch.equal(operators.gather_masked(weight, words, count), weight[mask])
        values = torch.randn(count, generator=generator(17))
        expected = weight.masked_scatter(mask, values)
        operators.scatter_masked_(weight, values, words)
        assert torch.equal(weight, expected)
        assert torch.equal(memory[mask.numel() :], beyond)


def test_words_of_another_shape_are_refused() -> None:
    """By the door, and by the operators, which are called without it too."""
    words = BitMask.pack(random_mask((4, 40), 0.5, 18)).words
    for shape in ((4, 70), (5, 40), (3, 40), (4, 32)):
        weight = torch.zeros(shape)
        with pytest.raises(ValueError):
            BitMask(words, shape)
        with pytest.raises((ValueError, RuntimeError), match="rows|fit"):
            OPS.gather_masked(weight, words, 3)
        with pytest.raises((ValueError, RuntimeError), match="rows|fit"):
            OPS.scatter_masked_(weight, torch.zeros(3), words)
    with pytest.raises(AttributeError):
        BitMask(words, (4, 40)).shape = (4, 64)


def test_errors_say_what_to_do() -> None:
    mask = random_mask((4, 40), 0.5, 14)
    packed = BitMask.pack(mask)
    weight = torch.zeros(4, 40)
    with pytest.raises(TypeError, match="must be bool"):
        BitMask.pack(weight)
    with pytest.raises(ValueError, match="at least two dimensions"):
        BitMask.pack(mask[0])
    with pytest.raises(TypeError, match="int32"):
        BitMask.from_words(packed.words.long(), (4, 40))
    with pytest.raises(ValueError, match="do not fit 70 columns"):
        BitMask.from_words(packed.words, (4, 70))
    with pytest.raises(ValueError, match="4 rows, the weight 5"):
        BitMask.from_words(packed.words, (5, 40))
    with pytest.raises(ValueError, match="beyond column 40"):
        BitMask.from_words(torch.full((4, 2), -1, dtype=torch.int32), (4, 40))
    with pytest.raises(ValueError, match="beyond column 40"):
        BitMask(torch.full((4, 2), -1, dtype=torch.int32), (4, 40))
    with pytest.raises(ValueError, match="at least 1"):
        packed.occupancy(0)
    with pytest.raises(ValueError, match="does not fit a weight"):
        gather_masked(torch.zeros(4, 41), packed)
    with pytest.raises(ValueError, match="does not fit a weight"):
        gather_masked(torch.zeros(160), packed)
    with pytest.raises(ValueError, match=r"set bits, but there are 3 values"):
        scatter_masked_(weight, torch.zeros(3), packed)
    with pytest.raises(TypeError, match="cast the values"):
        scatter_masked_(weight, torch.zeros(packed.count).half(), packed)
    with pytest.raises(ValueError, match="one device"):
        gather_masked(weight.to("meta"), packed)
    with pytest.raises(RuntimeError, match="set bits, not 1"):
        OPS.gather_masked(weight, packed.words, 1)
