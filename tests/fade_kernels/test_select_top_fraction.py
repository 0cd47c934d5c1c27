"""Exact global selection: against a stable sort on adversarial floats, for every granularity, with its errors."""

import math
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import OPS, generator, opcheck

from fade_kernels import BitMask, GroupedSelection, reference, select_top_fraction

SMALLEST = 1.401298464324817e-45  # the smallest denormal
SPECIAL = [0.0, -0.0, SMALLEST, 2 * SMALLEST, 1.1754942e-38, 1.17549435e-38, 1.0, 1.0000001, 3.4028235e38, math.inf]


def sorted_selection(scores: list[torch.Tensor], k: int) -> tuple[list[torch.Tensor], float]:
    """The definition by sorting: stable, descending, so that ties go to the lower (tensor, flat index)."""
    flat = torch.cat([s.flatten() for s in scores])
    order = torch.sort(flat, descending=True, stable=True).indices[:k]
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[order] = True
    parts = chosen.split([s.numel() for s in scores])
    masks = [part.reshape(s.shape[0], math.prod(s.shape[1:])) for part, s in zip(parts, scores, strict=True)]
    return masks, float(flat[order[-1]])


def check_against_sort(scores: list[torch.Tensor], k: int) -> None:
    masks, threshold = sorted_selection(scores, k)
    for select in (OPS.select_top_k, reference.select_top_k):
        words, found, invalid = select(scores, k)
        assert int(invalid) == -1
        assert float(found) == threshold
        for word, mask in zip(words, masks, strict=True):
            assert torch.equal(word, reference.pack_mask(mask)), select


tensors = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 70)), min_size=1, max_size=5)
kinds = st.sampled_from(["normal", "special", "constant", "few", "zeros", "exponents", "close"])


def make_scores(shapes: list[tuple[int, int]], kind: str, seed: int) -> list[torch.Tensor]:
    random = generator(seed)
    scores = []
    for shape in shapes:
        if kind == "normal":
            s = torch.randn(shape, generator=random).abs()
        elif kind == "special":
            s = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), shape, generator=random)]
        elif kind == "constant":
            s = torch.full(shape, 0.3)
        elif kind == "few":
            s = torch.randint(0, 3, shape, generator=random).float()
        elif kind == "zeros":
            s = torch.randn(shape, generator=random).abs() * (torch.rand(shape, generator=random) < 0.05)
        elif kind == "exponents":
            s = torch.exp2(torch.randint(-149, 128, shape, generator=random).double()).float()
        else:  # values that share their upper 16 bits
            s = (0x3F800000 + torch.randint(0, 50, shape, generator=random)).to(torch.int32).view(torch.float32)
        scores.append(s)
    return scores


@settings(max_examples=100, deadline=None)
@given(tensors, kinds, st.integers(0, 2**31), st.floats(0, 1))
def test_selection_is_the_stable_sort(shapes: list[tuple[int, int]], kind: str, seed: int, fraction: float) -> None:
    scores = make_scores(shapes, kind, seed)
    total = sum(s.numel() for s in scores)
    check_against_sort(scores, max(1, min(total, round(fraction * total))))


@pytest.mark.parametrize("kind", ["normal", "few", "zeros", "constant", "special", "close"])
def test_large_tensors(kind: str) -> None:
    """Many blocks and several threads; ties spread over all of them."""
    scores = make_scores([(1, 200_003), (700, 333), (1, 1), (64, 64)], kind, 1)
    total = sum(s.numel() for s in scores)
    for k in (1, total // 100, total // 2, total):
        masks, threshold = sorted_selection(scores, k)
        words, found, _ = OPS.select_top_k(scores, k)
        assert float(found) == threshold
        assert all(torch.equal(w, reference.pack_mask(m)) for w, m in zip(words, masks, strict=True))


def test_one_element_and_empty_tensors() -> None:
    check_against_sort([torch.tensor([[0.0]])], 1)
    check_against_sort([torch.zeros(0, 5), torch.rand(3, 40, generator=generator(2)), torch.zeros(4, 0)], 7)
    selection = select_top_fraction([torch.zeros(3, 0), torch.ones(2, 2)], 0.5)
    assert [mask.count for mask in selection.masks] == [0, 2]


def test_strided_and_convolution_saliency() -> None:
    conv = torch.rand(8, 6, 3, 3, generator=generator(3))
    linear = torch.rand(20, 9, generator=generator(4))
    expected = select_top_fraction([conv, linear], 0.25)
    strided = select_top_fraction([conv.to(memory_format=torch.channels_last), linear.t().contiguous().t()], 0.25)
    assert expected.masks == strided.masks
    assert expected.masks[0].shape == (8, 54)
    top = torch.cat([conv.flatten(), linear.flatten()]).topk(expected.count).values
    assert float(top[-1]) == expected.threshold


@pytest.mark.parametrize("keep", [0.001, 0.1, 1 / 3, 0.5, 0.999, 1.0])
def test_exact_count(keep: float) -> None:
    scores = make_scores([(40, 40), (33, 65)], "few", 5)
    selection = select_top_fraction(scores, keep)
    total = 40 * 40 + 33 * 65
    assert selection.total == total
    assert selection.count == math.floor(keep * total) == sum(mask.count for mask in selection.masks)
    assert selection.density == selection.count / total


@settings(max_examples=40, deadline=None)
@given(tensors, kinds, st.integers(0, 2**31), st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_masks_grow_with_keep(shapes: list[tuple[int, int]], kind: str, seed: int, keeps: tuple[float, float]) -> None:
    scores = make_scores(shapes, kind, seed)
    total = sum(s.numel() for s in scores)
    small, large = sorted(min(1.0, keep + 1.5 / total) for keep in keeps)  # at least one unit
    first, second = select_top_fraction(scores, small), select_top_fraction(scores, large)
    for inner, outer in zip(first.masks, second.masks, strict=True):
        assert not bool((inner.unpack() & ~outer.unpack()).any())
    assert select_top_fraction(scores, small).masks == first.masks  # deterministic


def test_number_of_threads_does_not_matter() -> None:
    scores = make_scores([(500, 333), (77, 1001)], "few", 6)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(select_top_fraction(scores, 0.37).masks)
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


def test_tile_granularity() -> None:
    scores = [torch.rand(70, 45, generator=generator(7)), torch.rand(8, 4, 3, 3, generator=generator(8))]
    selection = select_top_fraction(scores, 0.3, granularity="tile", tile=16)
    sums = []
    for t, s in enumerate(scores):
        matrix = s.flatten(1).double()
        for i in range(0, matrix.shape[0], 16):
            for j in range(0, matrix.shape[1], 16):
                sums.append((float(matrix[i : i + 16, j : j + 16].sum()), t, i, j))
    assert selection.total == len(sums)
    assert selection.count == math.floor(0.3 * len(sums))
    expected = [torch.zeros_like(s.flatten(1), dtype=torch.bool) for s in scores]
    best = sorted(sums, reverse=True)[: selection.count]
    for _, t, i, j in best:
        expected[t][i : i + 16, j : j + 16] = True
    assert [mask.unpack().tolist() for mask in selection.masks] == [mask.tolist() for mask in expected]
    assert selection.threshold == pytest.approx(best[-1][0], rel=1e-5)


def test_channel_granularity() -> None:
    scores = [torch.rand(12, 7, generator=generator(9)), torch.rand(5, 4, 2, 2, generator=generator(10)) * 1.5]
    selection = select_top_fraction(scores, 0.25, granularity="channel")
    means = []
    for t, s in enumerate(scores):
        matrix = s.flatten(1).double()
        means += [(float(row.mean()), t, 0, i) for i, row in enumerate(matrix)]
        means += [(float(column.mean()), t, 1, i) for i, column in enumerate(matrix.t())]
    assert selection.total == len(means) == 12 + 7 + 5 + 16
    assert selection.count == 10
    expected = [torch.zeros_like(s.flatten(1), dtype=torch.bool) for s in scores]
    for _, t, dimension, i in sorted(means, reverse=True)[:10]:
        expected[t].select(dimension, i).fill_(True)
    assert all(torch.equal(m.unpack(), e) for m, e in zip(selection.masks, expected, strict=True))


def test_module_granularity() -> None:
    scores = [torch.full((3, 4), 0.5), torch.full((2, 40), 2.0), torch.full((2, 3, 3, 3), 0.7), torch.zeros(5, 0)]
    selection = select_top_fraction(scores, 0.7, granularity="module")
    assert (selection.count, selection.total) == (2, 3)
    assert selection.threshold == pytest.approx(0.7)
    assert [mask.density for mask in selection.masks] == [0.0, 1.0, 1.0, 0.0]
    assert selection.masks[2] == BitMask.full((2, 27))


def test_operator_passes_opcheck() -> None:
    scores = make_scores([(6, 40), (3, 33)], "few", 11)
    opcheck(OPS.select_top_k, (scores, 50))
    strided = torch.rand(4, 3, 2, 2, generator=generator(12)).to(memory_format=torch.channels_last)
    opcheck(OPS.select_top_k, ([strided], 5))


@pytest.mark.parametrize("granularity", ["element", "tile", "channel", "module"])
@pytest.mark.parametrize(
    ("value", "word"), [(math.nan, "NaN"), (-math.nan, "NaN"), (-1e-30, "negative"), (-math.inf, "negative")]
)
def test_invalid_saliency_names_the_tensor(granularity: str, value: float, word: str) -> None:
    scores = [torch.rand(50, 50, generator=generator(13)) for _ in range(3)]
    scores[1][49, 49] = value
    scores[2][0, 0] = math.inf
    with pytest.raises(ValueError, match=rf"saliency\[1\] holds {word}"):
        select_top_fraction(scores, 0.5, granularity)
    for select in (OPS.select_top_k, reference.select_top_k):
        words, _, invalid = select(scores, 100)
        assert int(invalid) == 1
        assert not any(bool(w.any()) for w in words)


def test_infinity_and_negative_zero_are_valid() -> None:
    scores = [torch.tensor([[-0.0, 0.0, math.inf, 1.0]])]
    assert select_top_fraction(scores, 0.25).masks[0].unpack().tolist() == [[False, False, True, False]]
    assert select_top_fraction(scores, 0.75).masks[0].unpack().tolist() == [[True, False, True, True]]


def test_errors_say_what_to_do() -> None:
    scores = [torch.rand(5, 10, generator=generator(14))]
    for keep in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
            select_top_fraction(scores, keep)
    with pytest.raises(ValueError, match=r"selects none of 50 element units: use at least 0\.02"):
        select_top_fraction(scores, 0.019)
    assert select_top_fraction(scores, 0.02).count == 1
    with pytest.raises(ValueError, match="none of 1 module units"):
        select_top_fraction(scores, 0.5, "module")
    with pytest.raises(ValueError, match="granularity must be one of"):
        select_top_fraction(scores, 0.5, "row")
    with pytest.raises(ValueError, match="tile must be at least 1"):
        select_top_fraction(scores, 0.5, "tile", 0)
    with pytest.raises(ValueError, match="no saliency"):
        select_top_fraction([], 0.5)
    with pytest.raises(ValueError, match="no saliency"):
        select_top_fraction([torch.zeros(3, 0)], 0.5)
    for granularity in ("element", "tile", "channel", "module"):
        with pytest.raises(TypeError, match=r"saliency\[0\] must be float32"):
            select_top_fraction([scores[0].double()], 0.5, granularity)
        with pytest.raises(ValueError, match="at least two dimensions"):
            select_top_fraction([scores[0][0]], 0.9, granularity)
    with pytest.raises(ValueError, match="move them together"):
        select_top_fraction([scores[0], scores[0].to("meta")], 0.5)
    with pytest.raises(ValueError, match="k must be between 1"):
        OPS.select_top_k([scores[0].to("meta")], 51)


@pytest.mark.parametrize("total", [3, 10, 49, 1000, 12345])
def test_smallest_keep_of_the_message_selects_one(total: int) -> None:
    scores = [torch.rand(1, total, generator=generator(total))]
    with pytest.raises(ValueError, match="use at least") as info:
        select_top_fraction(scores, 0.5 / total)
    smallest = float(str(info.value).rsplit(" ", 1)[1])
    assert select_top_fraction(scores, smallest).count == 1


# --- group after group -----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    shapes=tensors,
    kind=kinds,
    seed=st.integers(0, 2**20),
    keep=st.floats(0.01, 1.0),
    cuts=st.sets(st.integers(0, 5)),
    granularity=st.sampled_from(["element", "tile", "channel", "module"]),
)
def test_groups_select_what_all_at_once_do(
    shapes: list[tuple[int, int]], kind: str, seed: int, keep: float, cuts: set[int], granularity: str
) -> None:
    scores = make_scores(shapes, kind, seed)
    weights = sum(s.numel() for s in scores)
    try:
        expected = select_top_fraction(scores, keep, granularity, tile=3)
    except ValueError:
        keep = 1.0
        expected = select_top_fraction(scores, keep, granularity, tile=3)
    selection = GroupedSelection(weights, keep, granularity, tile=3)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(scores)), len(scores)]
    for first, last in pairwise(bounds):
        selection.add([s.clone() for s in scores[first:last]])
        if granularity == "element":
            assert sum(values.numel() for values in selection._values) <= expected.count
    found = selection.result()
    assert found == expected


def test_groups_hold_candidates_alone() -> None:
    """Nothing keeps a group's tensors: what is held of weights are k values and a bit each."""
    random = generator(15)
    for granularity in ("element", "tile", "channel", "module"):
        selection = GroupedSelection(3 * 400, 0.4, granularity, tile=8)
        for _ in range(3):
            group = [torch.rand(20, 20, generator=random)]
            freed = weakref.ref(group[0].untyped_storage())
            selection.add(group)
            del group
            assert freed() is None, granularity
        assert selection.result().masks[0].shape == (20, 20)


def test_groups_name_the_tensor_and_miss_none() -> None:
    selection = GroupedSelection(75, 0.5)
    selection.add([torch.ones(5, 5)])
    with pytest.raises(ValueError, match=r"saliency\[2\] holds NaN"):
        selection.add([torch.ones(5, 5), torch.full((5, 5), math.nan)])
    with pytest.raises(ValueError, match="75 weights were to come, and 25 did"):
        selection.result()
