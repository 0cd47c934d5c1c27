"""The very sparse path under the interpreter, against the definitions in float64."""

from types import ModuleType

import pytest
import torch
from interpreter_testing import frobenius_error, random_mask, strided_rows
from torch import Tensor

from fade_kernels import reference
from fade_kernels.triton_kernels import gather as module

# T, N, K, R: one of each; beside whole blocks; more rows than a block; a large rank.
SHAPES = [(1, 1, 1, 1), (77, 33, 65, 3), (300, 20, 70, 16), (20, 40, 35, 128)]
MASKS = ["empty", "sparse", "block", "random", "full"]
# No matrix instructions here, so that bf16 can be interpreted too; the interpreter truncates to it, devices round.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 2**-7}


def words_of(rows: int, columns: int, kind: str, rng: torch.Generator) -> Tensor:
    if kind == "sparse":
        return reference.pack_mask(torch.rand(rows, columns, generator=rng) < 0.02)
    return random_mask(rows, columns, kind, rng)


def layer(shape: tuple[int, int, int, int], dtype: torch.dtype, rng: torch.Generator) -> tuple[Tensor, ...]:
    """x, dY, A, B."""
    rows, n, k, rank = shape
    return tuple(torch.randn(s, generator=rng).to(dtype) for s in ((rows, k), (rows, n), (rank, k), (n, rank)))


def worst_error(
    built: ModuleType, tensors: tuple[Tensor, ...], words: Tensor, splits: int | None = None
) -> tuple[float, float]:
    """Relative errors against float64: of fp32 results, and of those rounded to the inputs' dtype."""
    x, dy, lora_a, lora_b = tensors
    scale, k = torch.tensor(0.7), x.shape[1]
    csr = built.csr_from_words(words, k)
    csc = built.csc_from_csr(csr, k)
    wide = [t.double() for t in tensors]
    exact = {"mask_words": words, "scale": scale.double()}

    values = built.gather_values(lora_a, lora_b, csr)
    exact_values = reference.masked_factor_values(wide[2], wide[3], words, csr.index.numel())
    y, dx = torch.ones(dy.shape, dtype=dy.dtype), torch.ones(x.shape, dtype=x.dtype)
    built.add_sparse_product(y, x, csr, values, scale)
    built.add_sparse_product(dx, dy, csc, values, scale)
    gradient = built.sampled_gradient(dy, x, csr, splits=splits)
    grad_a, grad_b = built.factor_gradients_from_values(gradient, csr, csc, lora_a, lora_b, scale)
    exact_y = reference.masked_values_linear(wide[0], None, None, exact_values, **exact)
    exact_dx = reference.masked_values_linear_input_gradient(wide[1], None, exact_values, **exact, in_features=k)
    one = {**exact, "scale": torch.tensor(1.0).double()}
    exact_gradient = reference.masked_values_linear_gradient(wide[1], wide[0], exact_values, **one)
    exact_a, exact_b = reference.masked_lora_linear_factor_gradients(wide[1], wide[0], *wide[2:], **exact)
    assert values.dtype == gradient.dtype == torch.float32
    assert (grad_a.dtype, grad_b.dtype) == (lora_a.dtype, lora_b.dtype)
    single = ((values, exact_values), (gradient, exact_gradient))
    rounded = ((y, exact_y + 1), (dx, exact_dx + 1), (grad_a, exact_a), (grad_b, exact_b))
    return tuple(max(frobenius_error(a, e) for a, e in pairs) for pairs in (single, rounded))


@pytest.mark.parametrize("kind", MASKS)
def test_positions(kind: str, rng: torch.Generator) -> None:
    for n, k in ((1, 1), (33, 65), (40, 100)):
        words = words_of(n, k, kind, rng)
        rows, columns = reference.unpack_mask(words, k).nonzero(as_tuple=True)
        csr = module.csr_from_words(words, k)
        csc = module.csc_from_csr(csr, k)
        assert csr.order is None
        assert torch.equal(csr.segment.long(), rows) and torch.equal(csr.index.long(), columns)
        order = csc.order.long()
        assert torch.equal(csc.segment, csr.index[order]) and torch.equal(csc.index, csr.segment[order])
        assert torch.equal(torch.sort(order).values, torch.arange(len(rows)))
        for segments, count in ((csr, n), (csc, k)):
            assert all(t.dtype == torch.int32 for t in segments if t is not None)
            assert segments.starts.shape == (count + 1,)
            counts = torch.bincount(segments.segment, minlength=count)
            assert torch.equal(segments.starts.long().diff(), counts)
            assert (segments.segment.long().diff() >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int, int], dtype: torch.dtype, rng: torch.Generator) -> None:
    for kind in ("empty", "sparse", "random"):
        single, rounded = worst_error(module, layer(shape, dtype, rng), words_of(*shape[1:3], kind, rng))
        assert single < 1e-5, kind
        assert rounded < max(ROUNDING[dtype], 1e-5), kind


def test_full_mask_and_splits(rng: torch.Generator) -> None:
    tensors = layer((1100, 9, 20, 5), torch.float32, rng)
    for splits in (2, 100):
        assert max(worst_error(module, tensors, words_of(9, 20, "full", rng), splits)) < 1e-5


def test_strided_and_transposed_inputs(rng: torch.Generator) -> None:
    x, dy, lora_a, lora_b = layer((50, 40, 70, 4), torch.float32, rng)
    words = words_of(40, 70, "random", rng)
    assert max(worst_error(module, (strided_rows(x), strided_rows(dy), lora_a, lora_b), words)) < 1e-5
    assert max(worst_error(module, tuple(t.t().contiguous().t() for t in (x, dy, lora_a, lora_b)), words)) < 1e-5


def test_strided_outputs_and_transposes_at_hand(rng: torch.Generator) -> None:
    x, dy, lora_a, lora_b = layer((50, 40, 70, 4), torch.float32, rng)
    csr, scale = module.csr_from_words(words_of(40, 70, "random", rng), 70), torch.tensor(0.7)
    values = module.gather_values(lora_a, lora_b, csr)
    y, strided = torch.ones(50, 40), strided_rows(torch.ones(50, 40))
    x_transposed, dy_transposed = x.t().contiguous(), dy.t().contiguous()
    assert torch.equal(module.transpose(strided_rows(x)), x_transposed)
    module.add_sparse_product(y, x, csr, values, scale)
    module.add_sparse_product(strided, x, csr, values, scale, x_transposed=x_transposed)
    assert torch.equal(y, strided)
    at_hand = {"x_transposed": x_transposed, "dy_transposed": dy_transposed}
    assert torch.equal(module.sampled_gradient(dy, x, csr), module.sampled_gradient(dy, x, csr, **at_hand))


def test_sizes_of_zero() -> None:
    csr = module.csr_from_words(torch.full((3, 1), 0xFF, dtype=torch.int32), 8)
    one = torch.tensor(1.0)
    y = torch.ones(0, 3)
    module.add_sparse_product(y, torch.ones(0, 8), csr, torch.ones(24), one)
    assert torch.equal(module.sampled_gradient(torch.ones(0, 3), torch.ones(0, 8), csr), torch.zeros(24))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("o_k[:, None] * T + o_t[None, :], tl.trans", "o_k[:, None] * T + o_t[None, :] // 2, tl.trans"),
        ("if HAS_ORDER else o_j", "if HAS_ORDER and BS < 0 else o_j"),
        ("    b_sum *= b_scale\n", ""),
        ("        m_j = i_j < b_length\n", "        m_j = i_j < b_length - 1\n"),
        ("    if ADD:\n", "    if ADD and BS < 0:\n"),
        ("tl.minimum((i_range + 1) * RANGE, COLUMNS)", "COLUMNS"),
        ("b_sum += b_left * b_right", "b_sum += b_left * b_left"),
    ],
    ids=["transpose", "order dropped", "scale dropped", "last one missed", "overwrites", "counted twice", "wrong rows"],
)  # fmt: skip
def test_mutants_fail(old: str, new: str, mutate, rng: torch.Generator) -> None:
    tensors = layer((1100, 17, 20, 5), torch.float32, rng)
    words = words_of(17, 20, "random", rng)
    assert max(worst_error(module, tensors, words, splits=2)) < 1e-5
    assert max(worst_error(mutate(module, old, new), tensors, words, splits=2)) > 1e-2
