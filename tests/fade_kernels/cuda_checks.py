"""What the kernels of csrc/cuda must do, as functions of an operator namespace and a device.

Apart from the tests because the same checks run in two places: `test_cuda.py` calls them on a GPU (and on the CPU,
where they show that the checks themselves are right), `test_cuda_sources.py` on the kernels' sources compiled for the
CPU.
Results that are integers or copies must be exact; expected values come from `fade_kernels.reference` on the CPU.
"""

from collections.abc import Iterator
from typing import Any

import torch
from kernel_testing import generator
from torch import Tensor

from fade_kernels import reference
from fade_kernels.positions import find_positions

MODES = ("abs", "signed", "square")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MASK_SHAPES = [(1, 1), (0, 5), (3, 0), (5, 33), (7, 32), (129, 600), (300, 1030), (2, 5000), (70, 31)]


def random_mask(shape: tuple[int, int], seed: int, density: float = 0.3) -> Tensor:
    return torch.rand(shape, generator=generator(seed)) < density


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern: NaN payloads, infinities and denormals included."""
    size = torch.empty((), dtype=dtype).element_size()
    data = torch.randint(0, 256, (*shape, size), generator=generator(seed), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


# --- masks -----------------------------------------------------------------------------------------------------------


def check_pack_mask(ops: Any, device: str) -> None:
    for seed, shape in enumerate(MASK_SHAPES):
        for density in (0.0, 0.3, 1.0):
            mask = random_mask(shape, seed, density)
            assert torch.equal(ops.pack_mask(mask.to(device)).cpu(), reference.pack_mask(mask)), shape
    mask = random_mask((45, 70), 1)
    assert torch.equal(ops.pack_mask(mask.to(device).t()).cpu(), reference.pack_mask(mask.t()))


def check_unpack_mask(ops: Any, device: str) -> None:
    for seed, shape in enumerate(MASK_SHAPES):
        mask = random_mask(shape, seed)
        words = reference.pack_mask(mask).to(device)
        assert torch.equal(ops.unpack_mask(words, shape[1]).cpu(), mask), shape
        strided = torch.stack([words, ~words], dim=-1)[..., 0]
        assert torch.equal(ops.unpack_mask(strided, shape[1]).cpu(), mask), shape


def check_mask_row_counts(ops: Any, device: str) -> None:
    for seed, shape in enumerate(MASK_SHAPES):
        mask = random_mask(shape, seed, 0.9)
        counts = ops.mask_row_counts(reference.pack_mask(mask).to(device), shape[1])
        assert counts.dtype == torch.int64
        assert counts.tolist() == mask.sum(1).tolist(), shape


def check_padding_bits(ops: Any, device: str) -> None:
    """Words with every bit beyond the last column set: they count and move what the columns hold."""
    for seed, shape in enumerate(MASK_SHAPES):
        if 0 in shape:
            continue
        mask = random_mask(shape, seed, 0.5)
        words = reference.pack_mask(mask)
        words[:, -1] |= ~reference.pack_mask(torch.ones(1, shape[1], dtype=torch.bool))[0, -1]
        words, count = words.to(device), int(mask.sum())
        assert ops.mask_row_counts(words, shape[1]).tolist() == mask.sum(1).tolist(), shape
        assert torch.equal(ops.unpack_mask(words, shape[1]).cpu(), mask), shape
        memory = torch.randn(mask.numel() + 64)
        moved = memory.to(device)
        weight = moved[: mask.numel()].view(shape)
        assert torch.equal(ops.gather_masked(weight, words, count).cpu(), memory[: mask.numel()].view(shape)[mask])
        values = torch.randn(count)
        ops.scatter_masked_(weight, values.to(device), words)
        memory[: mask.numel()].view(shape)[mask] = values
        assert torch.equal(moved.cpu(), memory), shape


def check_mask_occupancy(ops: Any, device: str) -> None:
    for seed, shape in enumerate(MASK_SHAPES):
        words = reference.pack_mask(random_mask(shape, seed, 0.01))
        for tile in ((1, 1), (5, 7), (32, 32), (16, 48), (64, 128), (1000, 3)):
            expected = reference.mask_occupancy(words, shape[1], *tile)
            assert torch.equal(ops.mask_occupancy(words.to(device), shape[1], *tile).cpu(), expected), (shape, tile)
    words = reference.pack_mask(random_mask((9, 40), 1)).to(device)
    assert ops.mask_occupancy(words, 40, 2**40, 2**40).tolist() == [[True]]


def check_gather_scatter(ops: Any, device: str) -> None:
    for seed, shape in enumerate([*MASK_SHAPES, (6, 5, 3, 3)]):
        mask = random_mask((shape[0], max(1, torch.Size(shape[1:]).numel())), seed)[:, : torch.Size(shape[1:]).numel()]
        words, count = reference.pack_mask(mask), int(mask.sum())
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int8):
            weight = random_bits(shape, dtype, seed)
            on_device = weight.to(device)
            values = ops.gather_masked(on_device, words.to(device), count)
            assert values.dtype == dtype
            assert same_bits(values, weight.reshape(mask.shape)[mask]), (shape, dtype)
            fresh = random_bits((count,), dtype, seed + 1)
            ops.scatter_masked_(on_device, fresh.to(device), words.to(device))
            expected = weight.clone()
            expected.view(mask.shape)[mask] = fresh
            assert same_bits(on_device, expected), (shape, dtype)
    weight, mask = random_bits((40, 64), torch.float32, 1), random_mask((64, 40), 2)
    words, count = reference.pack_mask(mask).to(device), int(mask.sum())
    transposed = weight.to(device).t()
    values = ops.gather_masked(transposed, words, count)
    assert same_bits(values, weight.t()[mask])
    ops.scatter_masked_(transposed, torch.zeros_like(values), words)
    assert not transposed.cpu()[mask].any()


def check_wrong_count(ops: Any, device: str) -> None:
    """CUDA kernels take the caller's word for the number of set bits; a wrong one must stay harmless."""
    weight, mask = random_bits((64, 40), torch.int32, 1), random_mask((64, 40), 2)
    words, values = reference.pack_mask(mask).to(device), weight[mask]
    memory = torch.full((values.numel() + 8,), 7, dtype=torch.int32, device=device)
    few = ops.gather_masked(weight.to(device), words, values.numel() - 3)
    assert torch.equal(few.cpu(), values[:-3])
    many = ops.gather_masked(weight.to(device), words, values.numel() + 3)
    assert torch.equal(many.cpu(), torch.cat([values, values.new_zeros(3)]))
    target = torch.zeros_like(weight, device=device)
    ops.scatter_masked_(target, memory[: values.numel() - 3], words)
    assert target.cpu()[mask].tolist() == [7] * (values.numel() - 3) + [0] * 3
    ops.scatter_masked_(target, memory, words)
    assert torch.equal(target.cpu() == 7, mask)
    nothing = ops.gather_masked(weight[:0].to(device), words[:0], 3)
    assert nothing.tolist() == [0, 0, 0]


# --- accumulation ----------------------------------------------------------------------------------------------------


def contribution(gradient: Tensor, mode: str) -> Tensor:
    return {"abs": gradient.abs(), "signed": gradient, "square": gradient * gradient}[mode]


def check_accumulate(ops: Any, device: str) -> None:
    random = generator(1)
    # Around a chunk of 4096 elements, more tensors than one launch takes, and every dtype in one call.
    shapes = [(1,), (0, 4), (), (7, 33), (4095,), (4096,), (4097,), (3, 4099), (64, 3, 3, 3), *[(5, 3)] * 150]
    for mode in MODES:
        saliency = [torch.rand(shape, generator=random) for shape in shapes]
        gradient = [
            (torch.randn(shape, generator=random) * 10).to(DTYPES[i % len(DTYPES)]) for i, shape in enumerate(shapes)
        ]
        expected = [s.double() + contribution(g.double(), mode) for s, g in zip(saliency, gradient, strict=True)]
        on_device = [s.to(device) for s in saliency]
        ops.accumulate_gradient_magnitude_(on_device, [g.to(device) for g in gradient], mode)
        for actual, e in zip(on_device, expected, strict=True):
            assert torch.allclose(actual.cpu().double(), e, rtol=3e-7, atol=1e-30), e.shape


def check_accumulate_alignment(ops: Any, device: str) -> None:
    """Pointers that are aligned to nothing but their elements; what lies before and behind stays as it is."""
    random = generator(2)
    for dtype in DTYPES:
        for s_offset, g_offset in ((0, 0), (1, 1), (1, 0), (3, 7), (2, 5), (0, 4)):
            for size in (1, 2, 5, 9, 4100):
                s_whole = torch.rand(size + 16, generator=random)
                g_whole = torch.randn(size + 16, generator=random).to(dtype)
                s_device, g_device = s_whole.to(device), g_whole.to(device)
                s, g = s_device[s_offset : s_offset + size], g_device[g_offset : g_offset + size]
                expected = s_whole.clone()
                ops.accumulate_gradient_magnitude_([s], [g], "abs")
                expected[s_offset : s_offset + size] += g_whole[g_offset : g_offset + size].float().abs()
                assert torch.equal(s_device.cpu(), expected), (dtype, s_offset, g_offset, size)


def check_accumulate_strides(ops: Any, device: str) -> None:
    gradient = torch.randn(6, 4, 3, 3, generator=generator(3))
    start = torch.rand(6, 4, 3, 3, generator=generator(4))
    for s_format in (torch.contiguous_format, torch.channels_last):
        for g_format in (torch.contiguous_format, torch.channels_last):
            saliency = start.to(device).contiguous(memory_format=s_format)
            if saliency.data_ptr() == start.data_ptr():
                saliency = saliency.clone()
            ops.accumulate_gradient_magnitude_(
                [saliency], [gradient.to(device).contiguous(memory_format=g_format)], "abs"
            )
            assert torch.equal(saliency.cpu(), start + gradient.abs())
    wide = torch.zeros(10, 20, device=device)
    square = torch.arange(100.0, device=device).reshape(10, 10)
    ops.accumulate_gradient_magnitude_([wide[:, ::2], wide[:, 1::2].t()], [square.t(), square.t()], "signed")
    assert torch.equal(wide[:, ::2], square.t())
    assert torch.equal(wide[:, 1::2], square)


def check_accumulate_half_values(ops: Any, device: str) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        saliency = torch.zeros(2**16, device=device)
        ops.accumulate_gradient_magnitude_([saliency], [patterns.view(dtype).to(device)], "signed")
        expected = patterns.view(dtype).float() + 0.0
        assert torch.equal(saliency.cpu().nan_to_num(-7.0, 1e39, -1e39), expected.nan_to_num(-7.0, 1e39, -1e39))


# --- the gather path -------------------------------------------------------------------------------------------------

# T, N, K: all of one; sizes beside every block; slabs of 64, 32 and 16 rows (by K and T), some of them several a block.
GATHER_SHAPES = [(1, 1, 1), (77, 33, 40), (5, 1, 70), (200, 70, 41), (130, 100, 200), (40, 300, 500), (650, 34, 36)]
GATHER_DTYPES = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


class Gathered:
    """One layer with a sparse mask, its tensors on a device; `wide`: the same numbers in float64 on the CPU."""

    def __init__(self, shape: tuple[int, int, int], density: float, dtype: torch.dtype, device: str) -> None:
        tokens, rows, columns = shape
        random = generator(tokens + rows + columns)
        sizes = {"x": (tokens, columns), "dy": (tokens, rows), "lora_a": (6, columns), "lora_b": (rows, 6)}
        values = {name: torch.randn(size, generator=random).to(dtype) for name, size in sizes.items()}
        mask = random_mask((rows, columns), tokens, density)
        values["values"] = torch.randn(int(mask.sum()), generator=random)
        self.positions = find_positions(reference.pack_mask(mask), columns)
        self.wide = {name: value.double() for name, value in values.items()}
        self.device = {name: value.to(device) for name, value in values.items()}
        self.places = [tensor.to(device) for segments in self.positions[:2] for tensor in segments]
        self.order = self.positions.order.to(device)
        self.scale = torch.tensor(0.7)


def gathered_layers(device: str) -> Iterator[tuple[Gathered, float, Any]]:
    for i, shape in enumerate(GATHER_SHAPES):
        dtypes = list(GATHER_DTYPES)
        # Every shape in one dtype and density, two of them in all.
        for dtype in dtypes if shape[0] in (77, 130) else [dtypes[i % 3]]:
            for density in (0.0, 0.03, 1.0) if shape[0] in (77,) else [(0.02, 0.1)[i % 2]]:
                yield Gathered(shape, density, dtype, device), GATHER_DTYPES[dtype], (shape, dtype, density)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    return float((actual.cpu().double() - expected).norm() / expected.norm().clamp(min=1e-30))


def check_gathered_product(ops: Any, device: str) -> None:
    for layer, tolerance, what in gathered_layers(device):
        for by_column in (False, True):
            segments = layer.positions.by_column if by_column else layer.positions.by_row
            x, y = ("dy", "x") if by_column else ("x", "dy")
            places = layer.places[3:] if by_column else layer.places[:3]
            expected, by_values = layer.wide[y].clone(), layer.wide[y].clone()
            reference.add_gathered_lora_(
                expected, layer.wide[x], layer.wide["lora_a"], layer.wide["lora_b"], *segments, by_column, layer.scale
            )
            order = layer.positions.order if by_column else None
            reference.add_gathered_values_(
                by_values, layer.wide[x], layer.wide["values"], order, segments.starts, segments.index, layer.scale
            )
            actual = layer.device[y].clone()
            operands = (layer.device[x], layer.device["lora_a"], layer.device["lora_b"])
            ops.add_gathered_lora_(actual, *operands, *places, by_column, layer.scale)
            assert relative_error(actual, expected) <= tolerance, (what, by_column)
            again = layer.device[y].clone()
            ops.add_gathered_lora_(again, *operands, *places, by_column, layer.scale.to(device))
            assert same_bits(actual, again), (what, by_column)
            actual = layer.device[y].clone()
            order = layer.order if by_column else None
            ops.add_gathered_values_(
                actual, layer.device[x], layer.device["values"], order, places[0], places[1], layer.scale
            )
            assert relative_error(actual, by_values) <= tolerance, (what, by_column)
            check_sum_of_fp32(ops, layer, by_column, what)


def check_sum_of_fp32(ops: Any, layer: "Gathered", by_column: bool, what: object) -> None:
    """y in fp32 beside x in 16 bits: what is far below y's rounding in x's dtype is there."""
    x, y = ("dy", "x") if by_column else ("x", "dy")
    places = layer.places[3:] if by_column else layer.places[:3]
    segments = layer.positions.by_column if by_column else layer.positions.by_row
    start = 1000.0 * layer.wide[y]
    expected = torch.zeros_like(start)
    factors = (layer.wide["lora_a"], layer.wide["lora_b"])
    reference.add_gathered_lora_(expected, layer.wide[x], *factors, *segments, by_column, layer.scale)
    operands = (layer.device[x], layer.device["lora_a"], layer.device["lora_b"])
    order = (None, layer.order)[by_column]
    by_lora, by_values = (start.to(layer.device[y].device, torch.float32) for _ in range(2))
    before = by_lora.cpu().double()
    ops.add_gathered_lora_(by_lora, *operands, *places, by_column, layer.scale)
    assert relative_error(by_lora.cpu().double() - before, expected) <= 2e-3, (what, by_column)
    ops.add_gathered_values_(by_values, operands[0], layer.device["values"], order, *places[:2], layer.scale)
    expected.zero_()
    order = layer.positions.order if by_column else None
    reference.add_gathered_values_(
        expected, layer.wide[x], layer.wide["values"], order, segments.starts, segments.index, layer.scale
    )
    assert relative_error(by_values.cpu().double() - before, expected) <= 2e-3, (what, by_column)


def check_gathered_layouts(ops: Any, device: str) -> None:
    """Rows apart, columns apart, pointers aligned to nothing but an element, factors in other dtypes and layouts."""
    for dtype, tolerance in GATHER_DTYPES.items():
        layer = Gathered((70, 50, 48), 0.1, dtype, device)
        segments = layer.positions.by_row
        expected = layer.wide["dy"].clone()
        factors = (layer.wide["lora_a"], layer.wide["lora_b"])
        reference.add_gathered_lora_(expected, layer.wide["x"], *factors, *segments, False, layer.scale)
        gradient = reference.sampled_gradient(layer.wide["dy"], layer.wide["x"], *segments)
        x, dy, places = layer.device["x"], layer.device["dy"], layer.places[:3]
        shifted = torch.zeros(70 * 60 + 3, dtype=dtype, device=device)[3:].view(70, 60)[:, :48]
        shifted.copy_(x)
        apart = torch.stack([x, x], dim=-1)[..., 0]
        lora_a = layer.device["lora_a"].float().t().contiguous().t()
        lora_b = layer.device["lora_b"].float()
        for moved in (shifted, apart, x.t().contiguous().t()):
            y = dy.t().contiguous().t()
            ops.add_gathered_lora_(y, moved, lora_a, lora_b, *places, False, layer.scale)
            assert relative_error(y, expected) <= tolerance, (dtype, moved.stride())
            sampled = ops.sampled_gradient(dy.t().contiguous().t(), moved, *places)
            assert relative_error(sampled, gradient) <= 1e-6, (dtype, moved.stride())


def check_sampled_gradient(ops: Any, device: str) -> None:
    for layer, _, what in gathered_layers(device):
        expected = reference.sampled_gradient(layer.wide["dy"], layer.wide["x"], *layer.positions.by_row)
        actual = ops.sampled_gradient(layer.device["dy"], layer.device["x"], *layer.places[:3])
        assert actual.dtype == torch.float32
        assert relative_error(actual, expected) <= 1e-6, what
    layer = Gathered((7, 9, 40), 0.2, torch.float32, device)
    none = ops.sampled_gradient(layer.device["dy"][:0], layer.device["x"][:0], *layer.places[:3])
    assert none.tolist() == [0.0] * layer.positions.order.numel()


def check_sampled_factor_gradients(ops: Any, device: str) -> None:
    for layer, tolerance, what in gathered_layers(device):
        by_row, by_column, order = layer.positions
        places = (by_row.starts, by_row.index, by_column.starts, by_column.index, order)
        expected = reference.sampled_factor_gradients(
            layer.wide["values"], *places, layer.wide["lora_a"], layer.wide["lora_b"], layer.scale
        )
        factors = (layer.device["lora_a"], layer.device["lora_b"])
        places = tuple(tensor.to(device) for tensor in places)
        actual = ops.sampled_factor_gradients(layer.device["values"], *places, *factors, layer.scale)
        for a, e, factor in zip(actual, expected, factors, strict=True):
            assert a.dtype == factor.dtype
            assert relative_error(a, e) <= tolerance, what


# --- selection -------------------------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1e-45, 3e-45, 1.1754942e-38, 1.17549435e-38, 1.0, 1.0000001, 3.4028235e38, float("inf")]


def make_scores(kind: str, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    random = generator(5)
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
            s = torch.randn(shape, generator=random).abs() * (torch.rand(shape, generator=random) < 0.02)
        else:  # "close": values that differ in their lowest bits alone
            s = (0x3F800000 + torch.randint(0, 3000, shape, generator=random)).to(torch.int32).view(torch.float32)
        scores.append(s)
    return scores


def stable_sort_masks(scores: list[Tensor], k: int) -> tuple[list[Tensor], Tensor]:
    """The definition by sorting: stable, descending, so that ties go to the lower (tensor, flat index)."""
    flat = torch.cat([s.flatten() for s in scores])
    order = torch.sort(flat, descending=True, stable=True).indices[:k]
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[order] = True
    parts = chosen.split([s.numel() for s in scores])
    masks = [p.reshape(s.shape[0], s.shape[1:].numel()) for p, s in zip(parts, scores, strict=True)]
    return masks, flat[order[-1]]


def check_select(ops: Any, device: str) -> None:
    shapes = [(40, 36), (1, 1), (3, 0), (0, 7), (8, 6, 3, 3), (300, 77), (1, 20003)]
    for kind in ("normal", "special", "constant", "few", "zeros", "close"):
        scores = make_scores(kind, shapes)
        total = sum(s.numel() for s in scores)
        on_device = [s.to(device) for s in scores]
        for k in (1, 2, total // 100, total // 3, total - 1, total):
            masks, kth = stable_sort_masks(scores, k)
            words, threshold, invalid = ops.select_top_k(on_device, k)
            assert int(invalid) == -1
            assert float(threshold) == float(kth), (kind, k)
            for i, (word, mask) in enumerate(zip(words, masks, strict=True)):
                assert torch.equal(word.cpu(), reference.pack_mask(mask)), (kind, k, i)


def check_select_layouts(ops: Any, device: str) -> None:
    """More tensors than one launch takes, strided ones, and data that starts at any element."""
    scores = make_scores("few", [(3, 11)] * 130)
    for k in (1, 700, 3000, 130 * 33):
        words, _, _ = ops.select_top_k([s.to(device) for s in scores], k)
        masks, _ = stable_sort_masks(scores, k)
        assert all(torch.equal(w.cpu(), reference.pack_mask(m)) for w, m in zip(words, masks, strict=True)), k
    for offset in range(1, 5):
        whole = make_scores("normal", [(1, 700)])[0]
        part = whole[:, offset : offset + 600].reshape(20, 30)
        moved = whole.to(device)[0, offset : offset + 600].view(20, 30)
        words, _, _ = ops.select_top_k([moved, moved.t()], 500)
        masks, _ = stable_sort_masks([part, part.t()], 500)
        assert all(torch.equal(w.cpu(), reference.pack_mask(m)) for w, m in zip(words, masks, strict=True)), offset


def check_select_invalid(ops: Any, device: str) -> None:
    for value in (float("nan"), -1.0, -1e-45, -float("inf")):
        scores = make_scores("normal", [(4, 40), (5, 33), (6, 6), (0, 3)])
        scores[1][4, 32] = value
        scores[2][0, 0] = value
        words, threshold, invalid = ops.select_top_k([s.to(device) for s in scores], 17)
        assert int(invalid) == 1
        assert float(threshold) == 0.0
        assert not any(bool(w.any()) for w in words)


# --- least squares ---------------------------------------------------------------------------------------------------


def least_squares_problem(rows: int, columns: int, most: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A right-hand side, a Gram matrix, and a mask whose rows have 0 to `most` entries; some have `most`."""
    random = generator(seed)
    points = torch.randn(columns, 2 * columns + 1, generator=random, dtype=torch.float64)
    gram = points @ points.T / points.shape[1] + 0.05 * torch.eye(columns, dtype=torch.float64)
    sizes = torch.randint(0, most + 1, (rows,), generator=random)
    sizes[: rows // 3] = most
    mask = torch.rand(rows, columns, generator=random).argsort(1).argsort(1) < sizes[:, None]
    return torch.randn(rows, columns, generator=random, dtype=torch.float64), (gram + gram.T) / 2, mask


def solve_rows(
    ops: Any, device: str, rhs: Tensor, gram: Tensor, mask: Tensor, rows: Tensor, most: int, prices: bool
) -> list[Tensor]:
    """What `masked_least_squares_rows_` leaves in values, prices and singular that held 7 before."""
    sizes, count = mask.sum(1), int(mask.sum())
    values = torch.full((count,), 7, dtype=rhs.dtype, device=device)
    wanted = torch.full((count if prices else 0,), 7, dtype=rhs.dtype, device=device)
    singular = torch.tensor(len(mask), device=device)
    words, starts = reference.pack_mask(mask), (sizes.cumsum(0) - sizes).to(device)
    if mask.shape[1] % 32:  # what is behind the last column counts for nothing
        words[:, -1] |= -1 << mask.shape[1] % 32
    words = words.to(device)
    ops.masked_least_squares_rows_(
        values, wanted, singular, rhs.to(device), gram.to(device), words, starts, rows.to(device), most
    )
    return [values.cpu(), wanted.cpu(), singular.cpu()]


def check_least_squares(ops: Any, device: str) -> None:
    """Supports in shared memory and beyond it, of every number of threads, up to a whole row."""
    for seed, (count, columns, most) in enumerate(
        [
            (5, 1, 1),
            (9, 40, 5),
            (9, 70, 32),
            (7, 40, 40),
            (6, 150, 33),
            (5, 200, 100),
            (4, 300, 128),
            (3, 300, 131),
            (3, 1100, 20),
        ]
    ):
        rhs, gram, mask = least_squares_problem(count, columns, most, seed)
        rows = torch.randperm(count, generator=generator(seed))
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 3e-7)):
            for prices in (True, False):
                given = (rhs.to(dtype), gram.to(dtype), mask, rows, most, prices)
                found, expected = solve_rows(ops, device, *given), solve_rows(reference, "cpu", *given)
                assert int(found[2]) == int(expected[2]) == count
                for own, right in zip(found[:2], expected[:2], strict=True):
                    assert own.dtype == dtype and own.shape == right.shape
                    error = (own.double() - right.double()).abs().max() if own.numel() else torch.zeros(())
                    assert float(error) <= tolerance * (1 + float(right.abs().max()) if own.numel() else 1), most


def check_least_squares_of_some_rows(ops: Any, device: str) -> None:
    """Other rows' places are left alone, inputs may be strided, and a row's answer depends on no other."""
    rhs, gram, mask = least_squares_problem(12, 90, 40, 20)
    every = solve_rows(ops, device, rhs, gram, mask, torch.arange(12), 40, True)
    some = torch.tensor([7, 2, 11])
    wide = torch.stack([rhs, -rhs], dim=-1)[..., 0]
    found = solve_rows(ops, device, wide, gram.T, mask, some, 40, True)
    own = torch.zeros(12, dtype=torch.bool)
    own[some] = True
    own = own.repeat_interleave(mask.sum(1))
    for part in range(2):
        assert torch.equal(found[part][own], every[part][own])
        assert bool((found[part][~own] == 7).all())
    assert torch.equal(found[0][own], solve_rows(ops, device, rhs, gram, mask, some, 64, False)[0][own])


def check_least_squares_singular(ops: Any, device: str) -> None:
    """The first row whose block is singular is told; the others are solved. Nothing beyond `most` is touched."""
    rhs, gram, mask = least_squares_problem(10, 30, 9, 21)
    gram[:, 28], gram[28, :] = gram[:, 29].clone(), gram[29, :].clone()  # the last, so that nothing follows a bad pivot
    gram[28, 28] = gram[29, 29]
    mask[:, 28:] = False
    mask[6, 28:] = mask[3, 28:] = True
    most = int(mask.sum(1).max())
    found = solve_rows(ops, device, rhs, gram, mask, torch.arange(10), most, True)
    expected = solve_rows(reference, "cpu", rhs, gram, mask, torch.arange(10), most, True)
    assert int(found[2]) == int(expected[2]) == 3
    good = (torch.arange(10) != 3) & (torch.arange(10) != 6)
    good = good.repeat_interleave(mask.sum(1))
    assert float((found[0] - expected[0])[good].abs().max()) < 1e-11
    few = solve_rows(ops, device, rhs, gram + torch.eye(30), mask, torch.arange(10), 2, True)
    kept = (mask & (mask.cumsum(1) <= 2))[mask]
    assert bool((few[0][~kept] == 7).all())
