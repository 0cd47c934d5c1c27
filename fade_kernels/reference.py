"""Each operator in plain PyTorch: the definition, the default kernel, and what tests compare the compiled kernels with.

Written for reading, not for speed; works on every device and, where the arithmetic is floating point, in the dtype of
its inputs, so that float64 inputs give a float64 definition. Schemas and checks: `_ops`.
"""

from math import prod

import torch
from torch import Tensor

from fade_kernels.window import Window

# --- masks -----------------------------------------------------------------------------------------------------------
#
# Words may come from files and state dicts: padding bits, those beyond a row's columns, are ignored wherever words are
# read.


def pack_mask(mask: Tensor) -> Tensor:
    """Bool [N, K] -> int32 words [N, ceil(K/32)]; bit j of word w is column 32 w + j, padding bits are 0."""
    rows, columns = mask.shape
    padded = torch.nn.functional.pad(mask.to(torch.int64), (0, -columns % 32)).reshape(rows, (columns + 31) // 32, 32)
    unsigned = (padded << torch.arange(32, device=mask.device)).sum(dim=-1)
    # Two's complement by hand: values of 2^31 and above are the negative int32 with the same bits.
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def unpack_mask(mask_words: Tensor, columns: int) -> Tensor:
    """Int32 words [N, ceil(K/32)] -> bool [N, K], the inverse of `pack_mask`."""
    bits = (mask_words.unsqueeze(-1) >> torch.arange(32, device=mask_words.device, dtype=torch.int32)) & 1
    return bits.to(torch.bool).reshape(mask_words.shape[0], mask_words.shape[1] * 32)[:, :columns].contiguous()


def mask_row_counts(mask_words: Tensor, columns: int) -> Tensor:
    """Number of set bits in each row: int64 [N]."""
    return unpack_mask(mask_words, columns).sum(dim=1)


def mask_occupancy(mask_words: Tensor, columns: int, tile_n: int, tile_k: int) -> Tensor:
    """Which tile_n x tile_k tiles hold any set bit: bool [ceil(N/tile_n), ceil(K/tile_k)]."""
    mask = unpack_mask(mask_words, columns)
    rows = mask.shape[0]
    padded = torch.nn.functional.pad(mask, (0, -columns % tile_k, 0, -rows % tile_n))
    tiles = padded.reshape(-(-rows // tile_n), tile_n, -(-columns // tile_k), tile_k)
    return tiles.any(dim=3).any(dim=1)


def _weight_mask(weight: Tensor, mask_words: Tensor) -> Tensor:
    columns = weight[0].numel() if weight.shape[0] else 0
    return unpack_mask(mask_words, columns).reshape(weight.shape)


def gather_masked(weight: Tensor, mask_words: Tensor, count: int) -> Tensor:
    """The weight's values at the mask's positions, row-major: [count] in the weight's dtype."""
    values = weight[_weight_mask(weight, mask_words)]
    if values.numel() != count:
        raise ValueError(f"the mask has {values.numel()} set bits, not {count}")
    return values


def scatter_masked_(weight: Tensor, values: Tensor, mask_words: Tensor) -> None:
    """Writes values [nnz] into the weight at the mask's positions, row-major; everything else keeps its bits."""
    mask = _weight_mask(weight, mask_words)
    count = int(mask.sum())
    if values.numel() != count:
        raise ValueError(f"the mask has {count} set bits, but there are {values.numel()} values")
    weight[mask] = values


# --- saliency --------------------------------------------------------------------------------------------------------


def _contribution(gradient: Tensor, magnitude: str) -> Tensor:
    """What a gradient adds to its accumulator: |g| (FADE), g (SalUn, magnitude taken at the end), g^2 (Fisher)."""
    return {"abs": torch.abs, "signed": lambda g: g, "square": torch.square}[magnitude](gradient)


def accumulate_gradient_magnitude_(saliency: list[Tensor], gradient: list[Tensor], magnitude: str) -> None:
    """S += |g|, g or g^2 for each pair, in the accumulator's dtype."""
    for s, g in zip(saliency, gradient, strict=True):
        s.add_(_contribution(g.to(s.dtype), magnitude))


def accumulate_linear_gradient_magnitude_(
    saliency: Tensor, grad_output: Tensor, input: Tensor, magnitude: str, per_sample: bool
) -> None:
    """S [N, K] += |dY^T X| over all leading dimensions, or with `per_sample` the sum over dim 0 of |dY_i^T X_i|."""
    rows, columns = saliency.shape
    samples = input.shape[0] if per_sample else 1
    if input.numel() == 0 or grad_output.numel() == 0:
        return
    dy = grad_output.to(saliency.dtype).reshape(samples, -1, rows)
    x = input.to(saliency.dtype).reshape(samples, -1, columns)
    for i in range(samples):
        saliency.add_(_contribution(dy[i].T @ x[i], magnitude))


# --- selection -------------------------------------------------------------------------------------------------------


def select_top_k(scores: list[Tensor], k: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """The k largest of all scores together, as packed masks; ties go to the first in (tensor, flat index) order.

    The threshold is the largest t for which at least k scores are >= t. Non-negative floats order like their bit
    patterns, so it is found by bisection over those, with no copy of more than one tensor.

    Returns:
        Mask words of each tensor seen as [N, K]; the k-th largest score, 0-d; index of the first tensor that holds NaN
        or a negative value, int64 0-d, or -1. Where it is not -1 the masks are empty and the threshold is 0.
    """
    shapes = [(s.shape[0], s.numel() // s.shape[0] if s.shape[0] else prod(s.shape[1:])) for s in scores]
    for i, s in enumerate(scores):
        if not bool((s >= 0).all()):
            words = [pack_mask(s.new_zeros(shape, dtype=torch.bool)) for s, shape in zip(scores, shapes, strict=True)]
            return words, s.new_zeros(()), torch.tensor(i, device=s.device)

    def keys(s: Tensor) -> Tensor:
        return s.abs().contiguous().view(torch.int32)  # abs: -0 counts as 0

    low, high = 0, 0x7F800000  # bit patterns of 0 and infinity
    while low < high:
        middle = (low + high + 1) // 2
        if int(sum((keys(s) >= middle).sum() for s in scores)) >= k:
            low = middle
        else:
            high = middle - 1
    ties_left = k - int(sum((keys(s) > low).sum() for s in scores))
    words = []
    for s, shape in zip(scores, shapes, strict=True):
        key = keys(s).reshape(shape)
        tie = key == low
        rank = tie.flatten().cumsum(0).reshape(shape)
        words.append(pack_mask((key > low) | (tie & (rank <= ties_left))))
        ties_left -= min(ties_left, int(tie.sum()))
    threshold = torch.tensor(low, dtype=torch.int32, device=scores[0].device).view(torch.float32)
    return words, threshold, torch.tensor(-1, device=scores[0].device)


# --- least squares ---------------------------------------------------------------------------------------------------


def pivot_tolerance(size: int) -> float:
    """Part of its diagonal that a Cholesky pivot of a [size, size] block must exceed, or the block is singular."""
    return 8 * size * torch.finfo(torch.float64).eps


def masked_least_squares(
    rhs: Tensor, gram: Tensor, mask_words: Tensor, count: int, with_prices: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """x[i, S] = rhs[i, S] (gram[S, S])^-1 for each row i of a mask with support S, in float64 whatever the inputs.

    That is the minimum of x G x^T - 2 rhs x^T over x with support S. The price of entry j is what dropping it adds to
    the minimum, all others re-solved: x[i, j]^2 / ((gram[S, S])^-1)[j, j] (optimal brain surgeon).

    Returns:
        Values [count] and prices [count] (or [0]) in the right-hand side's dtype, row-major over the mask; the first
        row whose gram[S, S] is not positive definite, int64 0-d, or -1.
    """
    sizes = mask_row_counts(mask_words, rhs.shape[1])
    if int(sizes.sum()) != count:
        raise ValueError(f"the mask has {int(sizes.sum())} set bits, not {count}")
    values, prices = rhs.new_empty(count), rhs.new_empty(count if with_prices else 0)
    singular = torch.full((), len(sizes), device=rhs.device)
    rows, most = torch.arange(len(sizes), device=rhs.device), rhs.shape[1]
    masked_least_squares_rows_(
        values, prices, singular, rhs, gram, mask_words, sizes.cumsum(0) - sizes, rows, most
    )  # fmt: skip
    return values, prices, torch.where(singular == len(sizes), -1, singular)


def masked_least_squares_rows_(
    values: Tensor, prices: Tensor, singular: Tensor, rhs: Tensor, gram: Tensor, mask_words: Tensor, starts: Tensor,
    rows: Tensor, most: int,
) -> None:  # fmt: skip
    """`masked_least_squares` of some rows alone, of at most `most` entries each.

    A row's values go to `values` from `starts[row]` on, its prices likewise where `prices` is not [0]; `singular`,
    int64 0-d, becomes the smallest of itself and the rows whose gram[S, S] is not positive definite.
    """
    mask = unpack_mask(mask_words, rhs.shape[1])
    for row in rows.tolist():
        support = mask[row].nonzero()[:most, 0]
        if not support.numel():
            continue
        block = gram.double()[support][:, support]
        factor, info = torch.linalg.cholesky_ex(block)
        pivots = factor.diagonal().square()
        if int(info) != 0 or not bool((pivots > pivot_tolerance(len(support)) * block.diagonal()).all()):
            singular.clamp_(max=row)
            factor = torch.eye(len(support), dtype=torch.float64, device=rhs.device)
        x = torch.cholesky_solve(rhs[row, support].double()[:, None], factor)[:, 0]
        own = slice(int(starts[row]), int(starts[row]) + len(support))
        values[own] = x.to(rhs.dtype)
        if prices.numel():
            prices[own] = (x.square() / torch.cholesky_inverse(factor).diagonal()).to(rhs.dtype)


# --- masked LoRA -----------------------------------------------------------------------------------------------------
#
# Delta = s M o (B A), or s times values scattered to the mask's positions.
#
# The exact mode: two terms, x W^T + x Delta^T, each in at least fp32, and one rounding of their sum: in 16 bits
# W + Delta would lose a Delta below half an ulp of W, and x W^T rounded first an x Delta^T below half an ulp of y.
# The one-product mode (`seed`, or `rounded` made beforehand): one term, with W + Delta rounded to 16 bits so that its
# mean over seeds is exact; the same bits forward and for dX.


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _factor_delta(lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    product = lora_b.to(dtype).flatten(1) @ lora_a.to(dtype).flatten(1)  # [N, r] @ [r, K] -> [N, K]
    return torch.where(unpack_mask(mask_words, product.shape[1]), scale.to(dtype) * product, 0.0)


def _values_delta(values: Tensor, mask_words: Tensor, columns: int, scale: Tensor, dtype: torch.dtype) -> Tensor:
    delta = torch.zeros(mask_words.shape[0], columns, dtype=dtype, device=mask_words.device)
    scatter_masked_(delta, scale.to(dtype) * values.to(dtype), mask_words)
    return delta


def as_rows(x: Tensor) -> Tensor:
    """[..., C] -> [T, C], also where a size is 0."""
    return x if x.dim() == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """[T, C] -> [..., C] with the leading dimensions of `like`."""
    return rows if like.dim() == 2 else rows.reshape(*like.shape[:-1], rows.shape[1])


def _hash_bits(bits: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, held in int64, in which every input bit changes every output bit half the time."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    bits = (bits ^ (bits >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return bits ^ (bits >> 16)


def round_stochastically(values: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """fp32 values rounded to one of their two neighbours in fp16 or bf16 so that the mean over `random` is exact.

    `random` holds 32 random bits per value, in int64. How: triton_kernels/effective_weight.py.
    """
    bits = values.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    exponent = (bits >> 23) & 0xFF
    if dtype == torch.float16:
        dropped = 13 + (113 - exponent).clamp(0, 10)
        low = torch.bitwise_left_shift(torch.ones_like(bits), dropped) - 1
    else:
        low = torch.full_like(bits, 0xFFFF)
    rounded = (bits + (random & low)) & (low ^ 0xFFFFFFFF)
    if dtype == torch.float16:
        up = (random >> 8).float() < values.abs() * 2.0**48
        rounded = torch.where(exponent < 103, torch.where(up, 0x33800000, 0) | (bits & 0x80000000), rounded)
    rounded = torch.where(exponent == 255, bits, rounded)
    signed = torch.where(rounded >= 2**31, rounded - 2**32, rounded)
    return signed.int().view(torch.float32).to(dtype)


def _add_delta(
    weight: Tensor | None, delta: Tensor, dtype: torch.dtype, seed: int | None = None, layer: int = 0
) -> Tensor:
    """W + Delta, added in Delta's dtype and rounded once to `dtype`: to nearest, or with a seed stochastically."""
    exact = delta if weight is None else weight.to(delta.dtype) + delta
    if seed is None or dtype.itemsize != 2:
        return exact.to(dtype)
    elements = torch.arange(exact.numel(), device=exact.device).reshape(exact.shape) & 0xFFFFFFFF
    key = _hash_bits(torch.tensor(layer, device=exact.device)) + seed % 2**31 & 0xFFFFFFFF
    random = _hash_bits(_hash_bits(elements) + _hash_bits(key) & 0xFFFFFFFF)
    return round_stochastically(exact, dtype, random)


def _terms(
    like: Tensor, weight: Tensor | None, delta: Tensor, seed: int | None, rounded: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The weights whose products make a layer: W and Delta; in the one-product mode their rounded sum alone.

    Where nothing is rounded to 16 bits both modes are one.
    """
    if rounded is not None:
        return (rounded,)
    if seed is None or like.dtype.itemsize != 2:
        return weight, delta
    return (_add_delta(weight, delta, like.dtype, seed),)


def _linear(x: Tensor, bias: Tensor | None, *weights: Tensor | None) -> Tensor:
    dtype = _compute_dtype(x)
    y = sum(torch.nn.functional.linear(x.to(dtype), weight.to(dtype)) for weight in weights if weight is not None)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)


def _linear_input_gradient(grad_output: Tensor, *weights: Tensor | None) -> Tensor:
    dtype = _compute_dtype(grad_output)
    gradient = sum(grad_output.to(dtype) @ weight.to(dtype) for weight in weights if weight is not None)
    return gradient.to(grad_output.dtype)


def _linear_weight_gradient(grad_output: Tensor, x: Tensor) -> Tensor:
    dtype = _compute_dtype(x)
    return as_rows(grad_output).to(dtype).t() @ as_rows(x).to(dtype)  # [N, T] @ [T, K] -> [N, K]


def masked_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int = 0,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    """y = x W^T + x (s M o (B A))^T + bias for x [..., K], W [N, K] (or None), A [r, K], B [N, r]."""
    delta = _factor_delta(lora_a, lora_b, mask_words, scale, _compute_dtype(x))
    return _linear(x, bias, *_terms(x, weight, delta, seed, rounded))


def masked_lora_linear_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int = 0,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    """dX = dY W + dY (s M o (B A)) for dY [..., N]."""
    delta = _factor_delta(lora_a, lora_b, mask_words, scale, _compute_dtype(grad_output))
    return _linear_input_gradient(grad_output, *_terms(grad_output, weight, delta, seed, rounded))


def masked_lora_linear_factor_gradients(
    grad_output: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int = 0,
) -> tuple[Tensor, Tensor]:
    """dA, dB of `masked_lora_linear`: the contraction of G = dY^T X (`masked_factor_gradients`)."""
    return masked_factor_gradients(_linear_weight_gradient(grad_output, x), lora_a, lora_b, mask_words, scale)


def masked_lora_linear_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int = 0,
    need_input: bool = True,
    need_factors: bool = True,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX, dA, dB of `masked_lora_linear`; what is not needed is empty, [0]."""
    delta = (lora_a, lora_b, mask_words, scale, regime)
    grad_x, grad_a, grad_b = (tensor.new_empty(0) for tensor in (grad_output, lora_a, lora_b))
    if need_input:
        grad_x = masked_lora_linear_input_gradient(grad_output, weight, *delta, seed, rounded)
    if need_factors:
        grad_a, grad_b = masked_lora_linear_factor_gradients(grad_output, x, *delta)
    return grad_x, grad_a, grad_b


def masked_factor_gradients(
    weight_gradient: Tensor, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """dA = s B^T (M o G), dB = s (M o G) A^T for a weight gradient G [N, K], in the factors' dtypes."""
    dtype = _compute_dtype(weight_gradient)
    mask = unpack_mask(mask_words, weight_gradient.shape[1])
    masked = torch.where(mask, scale.to(dtype) * weight_gradient.to(dtype), 0.0)
    grad_a = lora_b.to(dtype).t() @ masked  # [r, N] @ [N, K] -> [r, K]
    grad_b = masked @ lora_a.to(dtype).t()  # [N, K] @ [K, r] -> [N, r]
    return grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype)


def masked_values_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int = 0,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    """y = x W^T + x Delta^T + bias with Delta = s times values [nnz] at the mask's positions, row-major."""
    delta = _values_delta(values, mask_words, x.shape[-1], scale, _compute_dtype(x))
    return _linear(x, bias, *_terms(x, weight, delta, seed, rounded))


def masked_values_linear_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    in_features: int,
    regime: int = 0,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    """dX = dY W + dY Delta for dY [..., N]."""
    delta = _values_delta(values, mask_words, in_features, scale, _compute_dtype(grad_output))
    return _linear_input_gradient(grad_output, *_terms(grad_output, weight, delta, seed, rounded))


def masked_values_linear_gradient(
    grad_output: Tensor, x: Tensor, values: Tensor, mask_words: Tensor, scale: Tensor, regime: int = 0
) -> Tensor:
    """dV = s (dY^T X) at the mask's positions: [nnz] in the values' dtype; of `values`, only size and dtype matter."""
    gradient = _linear_weight_gradient(grad_output, x)
    return (scale.to(gradient.dtype) * gather_masked(gradient, mask_words, values.numel())).to(values.dtype)


def masked_values_linear_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int = 0,
    need_input: bool = True,
    need_values: bool = True,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dX, dV of `masked_values_linear`; what is not needed is empty, [0]."""
    delta = (values, mask_words, scale)
    grad_x, grad_values = (tensor.new_empty(0) for tensor in (grad_output, values))
    if need_input:
        columns = x.shape[-1]
        grad_x = masked_values_linear_input_gradient(grad_output, weight, *delta, columns, regime, seed, rounded)
    if need_values:
        grad_values = masked_values_linear_gradient(grad_output, x, *delta, regime)
    return grad_x, grad_values


def masked_factor_values(lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, count: int) -> Tensor:
    """(B A) at the mask's positions, row-major: [count], fp32 (fp64 for fp64 factors)."""
    dtype = _compute_dtype(lora_a)
    return gather_masked(lora_b.to(dtype) @ lora_a.to(dtype), mask_words, count)


def _add_gathered(y: Tensor, x: Tensor, values: Tensor, index: Tensor, segment: Tensor, scale: Tensor) -> None:
    delta = values.new_zeros(y.shape[1], x.shape[1])
    delta[segment, index] = values
    y.copy_(y.to(values.dtype) + scale.to(values.dtype) * (x.to(values.dtype) @ delta.t()))


def add_gathered_lora_(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    starts: Tensor,
    index: Tensor,
    segment: Tensor,
    by_column: bool,
    scale: Tensor,
) -> None:
    """y[t, segment_j] += s <B[n_j], A[:, k_j]> x[t, index_j] over a mask's positions j, in place; y may be fp32.

    By row (segment: n, index: k) that is y [T, N] += s x Delta^T for x [T, K]; by column, with both exchanged,
    dx [T, K] += s dy Delta for dy [T, N].
    """
    rows, columns = (index, segment) if by_column else (segment, index)
    dtype = _compute_dtype(x)
    values = (lora_b.to(dtype)[rows] * lora_a.to(dtype).t()[columns]).sum(dim=1)
    _add_gathered(y, x, values, index, segment, scale)


def add_gathered_values_(
    y: Tensor, x: Tensor, values: Tensor, order: Tensor | None, starts: Tensor, index: Tensor, scale: Tensor
) -> None:
    """The same with the delta given by its values [nnz], row-major; order[j]: where position j stands among them."""
    segment = torch.repeat_interleave(starts.diff())
    ordered = values if order is None else values[order]
    _add_gathered(y, x, ordered.to(_compute_dtype(x)), index, segment, scale)


def sampled_gradient(grad_output: Tensor, x: Tensor, starts: Tensor, index: Tensor, segment: Tensor) -> Tensor:
    """(dY^T X) at a mask's positions by row: fp32 [nnz] (fp64 for fp64) of dY [T, N] and X [T, K]."""
    return _linear_weight_gradient(grad_output, x)[segment, index]


def sampled_factor_gradients(
    gradient: Tensor,
    row_starts: Tensor,
    row_index: Tensor,
    column_starts: Tensor,
    column_index: Tensor,
    order: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """dA = s B^T G, dB = s G A^T of a sparse G [N, K] with values [nnz] by row, in the factors' dtypes."""
    whole = gradient.new_zeros(lora_b.shape[0], lora_a.shape[1])
    whole[torch.repeat_interleave(row_starts.diff()), row_index] = scale.to(gradient.dtype) * gradient
    grad_a, grad_b = lora_b.to(whole.dtype).t() @ whole, whole @ lora_a.to(whole.dtype).t()
    return grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype)


def effective_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor) -> Tensor:
    """W + s M o (B A) for W [N, K], added in fp32 (fp64 for fp64) and rounded once to W's dtype."""
    delta = _factor_delta(lora_a, lora_b, mask_words, scale, _compute_dtype(weight))
    return _add_delta(weight, delta, weight.dtype)


def effective_weight_out(
    out: Tensor, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor
) -> None:
    """`effective_weight` into existing memory, which may be the weight itself; without a weight, the delta alone."""
    base = torch.zeros_like(out) if weight is None else weight
    out.copy_(effective_weight(base, lora_a, lora_b, mask_words, scale))


def effective_weights_out(
    out: list[Tensor],
    weight: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    mask_words: list[Tensor],
    scale: list[Tensor],
    stochastic: bool,
    seed: int,
) -> None:
    """`effective_weight_out` of every layer. `stochastic` rounds to 16 bits so that the mean over seeds is exact."""
    for i, (result, base, *delta) in enumerate(zip(out, weight, lora_a, lora_b, mask_words, scale, strict=True)):
        exact = _factor_delta(*delta, _compute_dtype(result))
        result.copy_(_add_delta(base, exact, result.dtype, seed if stochastic else None, i))


def effective_weight_from_values_out(
    out: Tensor, weight: Tensor | None, values: Tensor, mask_words: Tensor, scale: Tensor
) -> None:
    """`effective_weight_out` with the delta given by its values [nnz] at the mask's positions, row-major."""
    delta = _values_delta(values, mask_words, out.shape[1], scale, _compute_dtype(out))
    out.copy_(_add_delta(weight, delta, out.dtype))


def effective_weights_from_values_out(
    out: list[Tensor],
    weight: list[Tensor],
    values: list[Tensor],
    mask_words: list[Tensor],
    scale: list[Tensor],
    stochastic: bool,
    seed: int,
) -> None:
    """The same of every layer, rounded as `effective_weights_out` rounds."""
    for i, (result, base, v, words, s) in enumerate(zip(out, weight, values, mask_words, scale, strict=True)):
        exact = _values_delta(v, words, result.shape[1], s, _compute_dtype(result))
        result.copy_(_add_delta(base, exact, result.dtype, seed if stochastic else None, i))


def image_layout(images: Tensor) -> torch.memory_format:
    """Channels-last where only that is contiguous; what a convolution answers in."""
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def in_layout_of(images: Tensor, output: Tensor) -> Tensor:
    """The output in the memory layout of `images`, as the fakes of the operators promise."""
    return output.contiguous(memory_format=image_layout(images))


def _conv2d(x: Tensor, bias: Tensor | None, window: Window, *weights: Tensor | None) -> Tensor:
    dtype = _compute_dtype(x)
    wide = x.to(dtype)
    y = sum(torch.nn.functional.conv2d(wide, w.to(dtype), None, *window) for w in weights if w is not None)
    if bias is not None:
        y = y + bias.to(dtype).reshape(-1, 1, 1)
    return in_layout_of(x, y.to(x.dtype))


def _conv2d_input_gradient(
    grad_output: Tensor, input_size: list[int], window: Window, *weights: Tensor | None
) -> Tensor:
    dtype = _compute_dtype(grad_output)
    wide = grad_output.to(dtype)
    gradient = sum(torch.nn.grad.conv2d_input(input_size, w.to(dtype), wide, *window) for w in weights if w is not None)
    return in_layout_of(grad_output, gradient.to(grad_output.dtype))


def _conv2d_weight_gradient(
    grad_output: Tensor,
    x: Tensor,
    kernel_size: list[int],
    window: Window,
) -> Tensor:
    dtype = _compute_dtype(x)
    size = (grad_output.shape[1], x.shape[1], *kernel_size)
    return torch.nn.grad.conv2d_weight(x.to(dtype), size, grad_output.to(dtype), *window)


def masked_lora_conv2d(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    window: Window,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    """The linear's definition for W [C_out, C_in, kh, kw], A [r, C_in, kh, kw], B [C_out, r, 1, 1]."""
    delta = _factor_delta(lora_a, lora_b, mask_words, scale, _compute_dtype(x))
    delta = delta.reshape(lora_b.shape[0], *lora_a.shape[1:])
    return _conv2d(x, bias, window, *_terms(x, weight, delta, seed, rounded))


def masked_lora_conv2d_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    input_size: list[int],
    window: Window,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    """dX of `masked_lora_conv2d`."""
    delta = _factor_delta(lora_a, lora_b, mask_words, scale, _compute_dtype(grad_output))
    delta = delta.reshape(lora_b.shape[0], *lora_a.shape[1:])
    terms = _terms(grad_output, weight, delta, seed, rounded)
    return _conv2d_input_gradient(grad_output, input_size, window, *terms)


def masked_lora_conv2d_factor_gradients(
    grad_output: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    window: Window,
) -> tuple[Tensor, Tensor]:
    """dA, dB of `masked_lora_conv2d`, in the factors' four-dimensional shapes."""
    gradient = _conv2d_weight_gradient(grad_output, x, list(lora_a.shape[2:]), window)
    flat_a, flat_b = lora_a.flatten(1), lora_b.flatten(1)
    grad_a, grad_b = masked_factor_gradients(gradient.flatten(1), flat_a, flat_b, mask_words, scale)
    return grad_a.reshape(lora_a.shape), grad_b.reshape(lora_b.shape)


def masked_values_conv2d(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    kernel_size: list[int],
    window: Window,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    """`masked_values_linear` for convolutions: Delta [C_out, C_in kh kw] seen as [C_out, C_in, kh, kw]."""
    shape = (mask_words.shape[0], x.shape[1], *kernel_size)
    delta = _values_delta(values, mask_words, shape[1] * shape[2] * shape[3], scale, _compute_dtype(x))
    return _conv2d(x, bias, window, *_terms(x, weight, delta.reshape(shape), seed, rounded))


def masked_values_conv2d_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    window: Window,
    seed: int | None = None,
    rounded: Tensor | None = None,
) -> Tensor:
    """dX of `masked_values_conv2d`."""
    shape = (mask_words.shape[0], input_size[1], *kernel_size)
    delta = _values_delta(values, mask_words, shape[1] * shape[2] * shape[3], scale, _compute_dtype(grad_output))
    terms = _terms(grad_output, weight, delta.reshape(shape), seed, rounded)
    return _conv2d_input_gradient(grad_output, input_size, window, *terms)


def masked_values_conv2d_gradient(
    grad_output: Tensor,
    x: Tensor,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    kernel_size: list[int],
    window: Window,
) -> Tensor:
    """dV of `masked_values_conv2d`: [nnz] in the values' dtype."""
    gradient = _conv2d_weight_gradient(grad_output, x, kernel_size, window).flatten(1)
    return (scale.to(gradient.dtype) * gather_masked(gradient, mask_words, values.numel())).to(values.dtype)
