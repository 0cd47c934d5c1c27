"""Which kernel serves a tensor on a CUDA device: one function per decision, one table of thresholds.

Apart from the kernels because it is the only place that knows all of them. Operators: `_ops.py`; kernels:
`triton_kernels/` and csrc/cuda (accumulate, select, masks, gather: registered by their own library). What cannot run on
a machine (an old GPU, a Triton that does not compile) is served by the definition, after one warning that says why.
"""

import functools
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fade_kernels import _ops, reference
from fade_kernels._environment import FORCED, INTERPRETED
from fade_kernels._extension import MISSING_CUDA, build_info, cuda_library_loaded, missing_cuda, runs_on
from fade_kernels.masked_lora import REGIMES, is_linear, pixels
from fade_kernels.positions import MaskPositions, find_positions

# --- thresholds ------------------------------------------------------------------------------------------------------


class Thresholds(NamedTuple):
    """Where one path overtakes another, in the linear's forward pass where nothing else is said.

    None is measured yet: each is where the roofline model of an H200 (`bench/roofline.py`: 4.3 TB/s, 0.77 PFLOP/s,
    2.5 us a launch, own kernels at 0.85 of that rate) predicts that two paths take equally long; microseconds below are
    its predictions.
    """

    gather_density: float = 0.0125
    """Up to this density over the share of occupied tiles, only the mask's positions are computed. Two paths take
    equally long at 0.0132 (8192 tokens, 3072 channels) and 0.0135 (4096 tokens, 1280 channels); at 0.01 363 us against
    414 and 38 against 43. Clear of 0.01, which a random mask of 1 % meets on one side or the other."""
    gather_occupancy: float = 0.4
    """Below this share of occupied tiles they are cheaper, however few bits they hold: 4096 tokens at 1280 channels,
    both passes, 77 us against 74."""
    gather_flops: float = 1e10
    """Below, the memory that the products at positions move, and their launches, cost more than the tiles: 8192 tokens
    at 640 channels 24 us against 23."""
    sampled_density: float = 0.003
    """Up to this density over the share of occupied tiles, the gradient too is computed at the positions alone: 4096
    tokens at 1280 channels 18 us, all tiles 23. Lower, because blocks read x again, which the model leaves out."""
    library_flops: float = 1.3e10
    """From this much arithmetic in x W^T on, a library product and a second kernel for the delta beat one fused kernel:
    46 us either way at 1.3e10 (4096 tokens, 1280 channels), 472 against 505 at 1.5e11, tiles all occupied."""
    whole_occupancy: float = 0.85
    """From this share of occupied tiles on, the delta's product is the library's too, on a delta in scratch: 43 us at
    1.3e10, where all tiles take 46; at 1.5e11 414, where they take 472."""
    compact_channels: float = 0.75
    """Up to this share of active channels, a convolution with the delta runs on copies of those channels alone. A
    guess: the model has no convolutions."""


THRESHOLDS = Thresholds()
OCCUPANCY_TILE = 64
OLDEST_CAPABILITY = (8, 0)  # bf16 and TF32 products; Triton 3 compiles for nothing older


# --- what is known of a mask -----------------------------------------------------------------------------------------


@dataclass
class MaskFacts:
    """Counted once per mask, with one synchronisation, and kept as long as its words live."""

    version: int
    density: float
    occupancy: float
    """Share of 64 x 64 tiles that hold any set bit."""


_facts: Any = WeakIdKeyDictionary()
_positions: Any = WeakIdKeyDictionary()
_UNKNOWN = MaskFacts(version=-1, density=1.0, occupancy=1.0)


def _capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, so that nothing may wait for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def mask_facts(mask_words: Tensor, columns: int) -> MaskFacts:
    """Density and tile occupancy of a mask. While a CUDA graph is captured an unknown mask counts as full."""
    version = 0 if mask_words.is_inference() else mask_words._version
    facts = _facts.get(mask_words)
    if facts is not None and facts.version == version:
        return facts
    if _capturing(mask_words):
        return _UNKNOWN
    rows = mask_words.shape[0]
    count = torch.ops.fade_kernels.mask_row_counts(mask_words, columns).sum()
    occupied = torch.ops.fade_kernels.mask_occupancy(mask_words, columns, OCCUPANCY_TILE, OCCUPANCY_TILE)
    density, occupancy = torch.stack([count.double() / max(1, rows * columns), occupied.double().mean()]).tolist()
    facts = MaskFacts(version, density, occupancy if occupied.numel() else 0.0)
    _facts[mask_words] = facts
    return facts


def _positions_known(mask_words: Tensor) -> bool:
    known = _positions.get(mask_words)
    return known is not None and known[0] == (0 if mask_words.is_inference() else mask_words._version)


def mask_positions(mask_words: Tensor, columns: int) -> MaskPositions:
    """Where a mask's bits are, found once per mask, with a synchronisation, and kept as long as its words live.

    Raises RuntimeError where they are asked for first while a CUDA graph is captured.
    """
    if not _positions_known(mask_words):
        if _capturing(mask_words):
            raise RuntimeError(
                "the mask's positions are not known yet, and finding them cannot be captured in a CUDA graph: call the "
                "operator once before the capture, on inputs of the same shapes"
            )
        positions = find_positions(mask_words, columns)
        if mask_words.is_cuda:
            # Other streams may read them without having waited for this one.
            torch.cuda.current_stream(mask_words.device).synchronize()
        _positions[mask_words] = (0 if mask_words.is_inference() else mask_words._version, positions)
    return _positions[mask_words][1]


@functools.cache
def _widest_slab(index: int | None) -> int:
    """Columns of x or dY of which the gather kernels hold eight words a row and some more (`csrc/cuda/gather.cu`)."""
    shared_bytes = torch.cuda.get_device_properties(index).shared_memory_per_block_optin
    return shared_bytes // (4 * 9) - 256


def _can_gather(mask_words: Tensor, columns: int) -> bool:
    """Whether the gather kernels are there and fit; the definitions that serve elsewhere are only for tests."""
    if not mask_words.is_cuda:
        return True
    return cuda_library_loaded() and max(mask_words.shape[0], columns) <= _widest_slab(mask_words.device.index)


def _facts_for_choice(mask_words: Tensor, columns: int) -> MaskFacts:
    """The facts; but a mask that cannot be gathered counts as too full for it.

    So does one whose positions are not known while a graph is captured.
    """
    facts = mask_facts(mask_words, columns)
    gatherable = _can_gather(mask_words, columns) and (not _capturing(mask_words) or _positions_known(mask_words))
    return facts if gatherable or facts.density == 0.0 else replace(facts, density=1.0)


# --- choices ---------------------------------------------------------------------------------------------------------


def _tf32(tensor: Tensor) -> bool:
    # Not `allow_tf32`: reading it raises where the setting was made by this newer name; this follows both.
    return tensor.dtype == torch.float32 and tensor.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _sparse_enough(facts: MaskFacts, density: float) -> bool:
    return facts.density <= density * facts.occupancy and facts.occupancy >= THRESHOLDS.gather_occupancy


def choose_linear(dtype: torch.dtype, tokens: int, rows: int, columns: int, facts: MaskFacts, tf32: bool) -> str:
    """Path of the masked linear's forward and input gradient.

    Args:
        dtype: of the activations; tokens, rows, columns: T, N, K; facts: of the mask; tf32: fp32 products may round.

    Returns:
        `frozen`: the mask is empty. `scratch`: one product with W + Delta, exact enough in fp32 alone. `gather`: a
        library product, then the delta at the mask's positions. `fused`: both terms in one kernel. `split`: a library
        product, then the delta's occupied tiles. `whole`: two library products.
    """
    if facts.density == 0.0:
        return "frozen"
    if dtype == torch.float32 and not tf32:
        return "scratch"
    flops = 2.0 * tokens * rows * columns
    if _sparse_enough(facts, THRESHOLDS.gather_density) and flops >= THRESHOLDS.gather_flops:
        return "gather"
    if flops < THRESHOLDS.library_flops:
        return "fused"
    return "whole" if facts.occupancy >= THRESHOLDS.whole_occupancy else "split"


_FORCED_PATHS = {REGIMES["gather"]: "gather", REGIMES["tile"]: "fused", REGIMES["whole"]: "whole"}


def _path(like: Tensor, mask_words: Tensor, tokens: int, columns: int, regime: int, rank: int = 1) -> str:
    if regime in _FORCED_PATHS:
        path = _FORCED_PATHS[regime]
    else:
        facts = _facts_for_choice(mask_words, columns)
        path = choose_linear(like.dtype, tokens, mask_words.shape[0], columns, facts, _tf32(like))
    if path in ("fused", "split"):
        from fade_kernels.triton_kernels.masked_lora_launch import MAX_RANK

        return "whole" if rank > MAX_RANK else path
    return path


def choose_factor_gradients(tokens: int, rows: int, columns: int, facts: MaskFacts) -> str:
    """`zero`: an empty mask. `gather`: the weight gradient at the mask's positions. `tile`: in its occupied tiles."""
    if facts.density == 0.0:
        return "zero"
    large = 2.0 * tokens * rows * columns >= THRESHOLDS.gather_flops
    return "gather" if large and _sparse_enough(facts, THRESHOLDS.sampled_density) else "tile"


def choose_linear_magnitude(dtype: torch.dtype, tf32: bool) -> str:
    """`fused`: the magnitude is taken in the product's epilogue. `scratch`: a library product, folded in and freed.

    A product in full fp32 uses no matrix unit, and the library's is the faster one there.
    """
    return "scratch" if dtype == torch.float32 and not tf32 else "fused"


def _precision(tensor: Tensor) -> str:
    return "tf32" if _tf32(tensor) else "ieee"


# --- masked LoRA and masked values, linear ---------------------------------------------------------------------------


def _alike(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors in one dtype; factors of two dtypes become fp32."""
    return (lora_a, lora_b) if lora_a.dtype == lora_b.dtype else (lora_a.float(), lora_b.float())


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, rows: int) -> Tensor:
    """x W^T + bias of the library; zeros without a weight."""
    if weight is None:
        # A copy, even for one token: the callers add to it.
        return x.new_zeros((x.shape[0], rows)) if bias is None else bias.repeat(x.shape[0], 1)
    return F.linear(x, weight, bias)


def masked_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
) -> Tensor:
    """Forward of x [..., K]; the choice: `choose_linear`."""
    from fade_kernels.triton_kernels import effective_weight as merging
    from fade_kernels.triton_kernels import masked_lora_forward as forward

    rows, columns = lora_b.shape[0], lora_a.shape[1]
    flat = reference.as_rows(x)
    delta = (lora_a, lora_b, mask_words, scale)
    path = _path(x, mask_words, flat.shape[0], columns, regime, rank=lora_a.shape[0])
    if path == "fused":
        y = forward.masked_lora_forward(flat, weight, bias, *delta, input_precision=_precision(x))
    elif path == "scratch":
        y = F.linear(flat, merging.effective_weight(weight, *delta, dtype=x.dtype), bias)
    else:
        y = _linear(flat, weight, bias, rows)
        if path == "gather":
            by_row = mask_positions(mask_words, columns).by_row
            torch.ops.fade_kernels.add_gathered_lora_(y, flat, *_alike(lora_a, lora_b), *by_row, False, scale.float())
        elif path == "split":
            forward.add_masked_lora(y, flat, *delta, input_precision=_precision(x))
        elif path == "whole":
            y.addmm_(flat, merging.effective_weight(None, *delta, dtype=x.dtype).t())
    return y.reshape(*x.shape[:-1], rows)


def masked_lora_linear_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
) -> Tensor:
    """dX of dY [..., N], by the same paths."""
    from fade_kernels.triton_kernels import effective_weight as merging
    from fade_kernels.triton_kernels import masked_lora_input_gradient as backward

    columns = lora_a.shape[1]
    flat = reference.as_rows(grad_output)
    delta = (lora_a, lora_b, mask_words, scale)
    path = _path(grad_output, mask_words, flat.shape[0], columns, regime, rank=lora_a.shape[0])
    if path == "fused":
        dx = backward.masked_lora_input_gradient(flat, weight, *delta, input_precision=_precision(grad_output))
    elif path == "scratch":
        dx = flat @ merging.effective_weight(weight, *delta, dtype=flat.dtype)
    else:
        dx = flat.new_zeros((flat.shape[0], columns)) if weight is None else flat @ weight
        if path == "gather":
            by_column = mask_positions(mask_words, columns).by_column
            factors = _alike(lora_a, lora_b)
            torch.ops.fade_kernels.add_gathered_lora_(dx, flat, *factors, *by_column, True, scale.float())
        elif path == "split":
            backward.add_masked_lora_input_gradient(dx, flat, *delta, input_precision=_precision(grad_output))
        elif path == "whole":
            dx.addmm_(flat, merging.effective_weight(None, *delta, dtype=flat.dtype))
    return dx.reshape(*grad_output.shape[:-1], columns)


def masked_lora_linear_factor_gradients(
    grad_output: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
) -> tuple[Tensor, Tensor]:
    """dA, dB without a weight gradient in memory; the choice: `choose_factor_gradients`."""
    from fade_kernels.triton_kernels import masked_lora_factor_gradients as kernel

    dy, flat = reference.as_rows(grad_output), reference.as_rows(x)
    columns = lora_a.shape[1]
    path = {REGIMES["gather"]: "gather", REGIMES["tile"]: "tile", REGIMES["whole"]: "tile"}.get(regime)
    if path is None:
        facts = _facts_for_choice(mask_words, columns)
        path = choose_factor_gradients(flat.shape[0], dy.shape[1], columns, facts)
    if path == "zero" or flat.shape[0] == 0:
        return lora_a.new_zeros(lora_a.shape), lora_b.new_zeros(lora_b.shape)
    if path == "gather":
        by_row, by_column, order = mask_positions(mask_words, columns)
        sampled = torch.ops.fade_kernels.sampled_gradient(dy, flat, *by_row)
        grad_a, grad_b = torch.ops.fade_kernels.sampled_factor_gradients(
            sampled,
            by_row.starts,
            by_row.index,
            by_column.starts,
            by_column.index,
            order,
            *_alike(lora_a, lora_b),
            scale.float(),
        )
        return grad_a.to(lora_a.dtype), grad_b.to(lora_b.dtype)
    return kernel.masked_lora_factor_gradients(
        dy, flat, lora_a, lora_b, mask_words, scale, input_precision=_precision(x)
    )


def masked_values_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
) -> Tensor:
    """Forward with the delta given by its values: at their positions, or as a second library product where many."""
    rows, columns = mask_words.shape[0], x.shape[-1]
    flat = reference.as_rows(x)
    path = _path(x, mask_words, flat.shape[0], columns, regime)
    if path == "scratch" and weight is not None:
        y = F.linear(flat, _values_weight(x, weight, values, mask_words, scale, columns), bias)
    else:
        y = _linear(flat, weight, bias, rows)
        if path == "gather":
            by_row = mask_positions(mask_words, columns).by_row
            torch.ops.fade_kernels.add_gathered_values_(
                y, flat, values, None, by_row.starts, by_row.index, scale.float()
            )
        elif path != "frozen":
            y.addmm_(flat, _values_weight(x, None, values, mask_words, scale, columns).t())
    return y.reshape(*x.shape[:-1], rows)


def masked_values_linear_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    in_features: int,
    regime: int,
) -> Tensor:
    """dX of `masked_values_linear`, by the same paths."""
    flat = reference.as_rows(grad_output)
    path = _path(grad_output, mask_words, flat.shape[0], in_features, regime)
    if path == "scratch" and weight is not None:
        dx = flat @ _values_weight(flat, weight, values, mask_words, scale, in_features)
    else:
        dx = flat.new_zeros((flat.shape[0], in_features)) if weight is None else flat @ weight
        if path == "gather":
            _, by_column, order = mask_positions(mask_words, in_features)
            torch.ops.fade_kernels.add_gathered_values_(
                dx, flat, values, order, by_column.starts, by_column.index, scale.float()
            )
        elif path != "frozen":
            dx.addmm_(flat, _values_weight(flat, None, values, mask_words, scale, in_features))
    return dx.reshape(*grad_output.shape[:-1], in_features)


def masked_values_linear_gradient(
    grad_output: Tensor, x: Tensor, values: Tensor, mask_words: Tensor, scale: Tensor, regime: int
) -> Tensor:
    """dV, the weight gradient at the mask's positions: sampled where few, read out of a library product where many."""
    dy, flat = reference.as_rows(grad_output), reference.as_rows(x)
    sampled = regime == REGIMES["gather"]
    if regime == REGIMES["auto"]:
        facts = _facts_for_choice(mask_words, flat.shape[1])
        sampled = choose_factor_gradients(flat.shape[0], dy.shape[1], flat.shape[1], facts) == "gather"
    if sampled:
        gathered = torch.ops.fade_kernels.sampled_gradient(dy, flat, *mask_positions(mask_words, flat.shape[1]).by_row)
    else:
        gradient = dy.t() @ flat
        gathered = torch.ops.fade_kernels.gather_masked(gradient, mask_words, values.numel()).float()
    return (_on(scale, gathered) * gathered).to(values.dtype)


def _on(scale: Tensor, like: Tensor) -> Tensor:
    """The scale as fp32; a 0-d tensor on the host may multiply one on the device, and need not be copied there."""
    return scale.to(like.dtype)


def _values_weight(
    like: Tensor, weight: Tensor | None, values: Tensor, mask_words: Tensor, scale: Tensor, columns: int
) -> Tensor:
    """Scratch [N, K] with W + Delta, or Delta alone, in the dtype of `like`."""
    out = like.new_empty((mask_words.shape[0], columns))
    effective_weight_from_values_out(out, weight, values, mask_words, scale)
    return out


# --- merging ---------------------------------------------------------------------------------------------------------


def effective_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor) -> Tensor:
    """W + Delta in one pass."""
    from fade_kernels.triton_kernels import effective_weight as merging

    return merging.effective_weight(weight, lora_a, lora_b, mask_words, scale)


def effective_weight_out(
    out: Tensor, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor
) -> None:
    """The same into existing memory."""
    from fade_kernels.triton_kernels import effective_weight as merging

    merging.effective_weight(weight, lora_a, lora_b, mask_words, scale, out=out)


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
    """The same of many layers: a launch for each combination of dtypes and alignment."""
    from fade_kernels.triton_kernels import effective_weight as merging

    layers = [
        merging.Layer(base, *delta, out=result)
        for result, base, *delta in zip(out, weight, lora_a, lora_b, mask_words, scale, strict=True)
    ]
    merging.effective_weights(layers, stochastic=stochastic, seed=seed)


def effective_weight_from_values_out(
    out: Tensor, weight: Tensor | None, values: Tensor, mask_words: Tensor, scale: Tensor
) -> None:
    """W + Delta with the delta given by its values: added in fp32 at the mask's positions, the rest copied."""
    before = None
    if weight is not None:
        before = torch.ops.fade_kernels.gather_masked(weight, mask_words, values.numel()).float()
        out.copy_(weight)
    else:
        out.zero_()
    delta = _on(scale, values.float()) * values.float()
    changed = (delta if before is None else before + delta).to(out.dtype)
    torch.ops.fade_kernels.scatter_masked_(out, changed, mask_words)


def masked_factor_values(lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, count: int) -> Tensor:
    """(B A) at the mask's positions, read out of one pass that masks it: 4 N K bytes for the length of the call, where
    a list of positions would stay with the mask."""
    from fade_kernels.triton_kernels import effective_weight as merging

    product = merging.effective_weight(None, lora_a, lora_b, mask_words, torch.ones(()), dtype=torch.float32)
    return torch.ops.fade_kernels.gather_masked(product, mask_words, count)


# --- convolution -----------------------------------------------------------------------------------------------------
#
# 1 x 1 is a linear layer on the pixels. k x k: the library's convolution with W, and one with the delta on the channels
# that have any, in the activations' dtype; where fp32 convolutions do not round to TF32, one with W + Delta.


class _Channels(NamedTuple):
    """Output rows and input channels that a mask touches; None where none or so many that copies would not pay."""

    rows: Tensor | None
    inputs: Tensor | None


_channels: Any = WeakIdKeyDictionary()


def _active_channels(mask_words: Tensor, in_channels: int, kernel: list[int]) -> _Channels:
    version = 0 if mask_words.is_inference() else mask_words._version
    known = _channels.get(mask_words)
    if known is None or known[0] != version:
        if _capturing(mask_words):
            return _Channels(None, None)
        columns = in_channels * kernel[0] * kernel[1]
        mask = torch.ops.fade_kernels.unpack_mask(mask_words, columns).reshape(-1, in_channels, kernel[0] * kernel[1])
        touched = mask.any(dim=2)
        active = (touched.any(dim=1).nonzero().flatten(), touched.any(dim=0).nonzero().flatten())
        if mask_words.is_cuda:
            # Other streams may read them without having waited for this one.
            torch.cuda.current_stream(mask_words.device).synchronize()
        few = [
            index if 0 < index.numel() <= THRESHOLDS.compact_channels * size else None
            for index, size in zip(active, touched.shape, strict=True)
        ]
        known = (version, _Channels(*few))
        _channels[mask_words] = known
    return known[1]


def _one_convolution(x: Tensor) -> bool:
    return x.dtype == torch.float32 and not (x.is_cuda and torch.backends.cudnn.conv.fp32_precision == "tf32")


def _select(tensor: Tensor, dim: int, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor.index_select(dim, index)


def _conv2d(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    delta: Tensor,
    mask_words: Tensor,
    window: tuple[list[int], ...],
) -> Tensor:
    """conv(x, W) + conv(x, Delta) for Delta [C_out, C_in, kh, kw]."""
    channels = _active_channels(mask_words, delta.shape[1], list(delta.shape[2:]))
    part = _select(_select(delta, 0, channels.rows), 1, channels.inputs)
    term = F.conv2d(_select(x, 1, channels.inputs), part, None, *window)
    if weight is None:
        y = term.new_zeros((x.shape[0], delta.shape[0], *term.shape[2:]))
        if bias is not None:
            y += bias.reshape(-1, 1, 1)
    else:
        y = F.conv2d(x, weight, bias, *window)
    return y.add_(term) if channels.rows is None else y.index_add_(1, channels.rows, term)


def _conv2d_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    delta: Tensor,
    mask_words: Tensor,
    input_size: list[int],
    window: tuple[list[int], ...],
) -> Tensor:
    channels = _active_channels(mask_words, delta.shape[1], list(delta.shape[2:]))
    part = _select(_select(delta, 0, channels.rows), 1, channels.inputs)
    size = [input_size[0], part.shape[1], *input_size[2:]]
    term = torch.nn.grad.conv2d_input(size, part, _select(grad_output, 1, channels.rows), *window)
    if weight is None:
        dx = term.new_zeros(input_size)
    else:
        dx = torch.nn.grad.conv2d_input(input_size, weight, grad_output, *window)
    return dx.add_(term) if channels.inputs is None else dx.index_add_(1, channels.inputs, term)


def _on_pixels(images: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> bool:
    """Whether a convolution is computed as a linear layer on the pixels, seen as rows.

    1 x 1 is, but for images that would have to be copied into channels last where one convolution with W + Delta does.
    """
    if not is_linear(kernel, stride, padding):
        return False
    return images.is_contiguous(memory_format=torch.channels_last) or not _one_convolution(images)


def _flat(weight: Tensor | None) -> Tensor | None:
    """A convolution's weight as [C_out, C_in kh kw]."""
    return None if weight is None else weight.flatten(1)


def _images(rows: Tensor, like: Tensor) -> Tensor:
    """[n h w, C] -> [n, C, h, w] for images of the size of `like`."""
    return rows.reshape(like.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)


def masked_lora_conv2d(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """Forward of x [n, C_in, h, w]."""
    from fade_kernels.triton_kernels import effective_weight as merging

    shape, window = (lora_b.shape[0], *lora_a.shape[1:]), (stride, padding, dilation)
    delta = (lora_a.flatten(1), lora_b.flatten(1), mask_words, scale)
    if _on_pixels(x, list(shape[2:]), stride, padding):
        y = _images(masked_lora_linear(pixels(x), _flat(weight), bias, *delta, REGIMES["auto"]), x)
    elif _one_convolution(x):
        y = F.conv2d(x, merging.effective_weight(_flat(weight), *delta, dtype=x.dtype).reshape(shape), bias, *window)
    else:
        added = merging.effective_weight(None, *delta, dtype=x.dtype).reshape(shape)
        y = _conv2d(x, weight, bias, added, mask_words, window)
    return reference.in_layout_of(x, y)


def masked_lora_conv2d_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    input_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """dX of `masked_lora_conv2d`."""
    from fade_kernels.triton_kernels import effective_weight as merging

    shape, window = (lora_b.shape[0], *lora_a.shape[1:]), (stride, padding, dilation)
    delta = (lora_a.flatten(1), lora_b.flatten(1), mask_words, scale)
    if _on_pixels(grad_output, list(shape[2:]), stride, padding):
        rows = masked_lora_linear_input_gradient(pixels(grad_output), _flat(weight), *delta, REGIMES["auto"])
        dx = _images(rows, grad_output)
    elif _one_convolution(grad_output):
        effective = merging.effective_weight(_flat(weight), *delta, dtype=grad_output.dtype).reshape(shape)
        dx = torch.nn.grad.conv2d_input(input_size, effective, grad_output, *window)
    else:
        added = merging.effective_weight(None, *delta, dtype=grad_output.dtype).reshape(shape)
        dx = _conv2d_input_gradient(grad_output, weight, added, mask_words, list(input_size), window)
    return reference.in_layout_of(grad_output, dx)


def masked_lora_conv2d_factor_gradients(
    grad_output: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor]:
    """dA, dB of `masked_lora_conv2d`; k x k by the library's weight gradient, contracted and freed."""
    kernel, factors = list(lora_a.shape[2:]), (lora_a.flatten(1), lora_b.flatten(1), mask_words, scale)
    if is_linear(kernel, stride, padding):
        grads = masked_lora_linear_factor_gradients(pixels(grad_output), pixels(x), *factors, REGIMES["auto"])
    else:
        size = (grad_output.shape[1], x.shape[1], *kernel)
        gradient = torch.nn.grad.conv2d_weight(x, size, grad_output, stride, padding, dilation).flatten(1)
        grads = torch.ops.fade_kernels.masked_factor_gradients(gradient, *factors)
    return grads[0].reshape(lora_a.shape), grads[1].reshape(lora_b.shape)


def masked_values_conv2d(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """`masked_lora_conv2d` with the delta given by its values."""
    shape, window = (mask_words.shape[0], x.shape[1], *kernel_size), (stride, padding, dilation)
    columns = shape[1] * shape[2] * shape[3]
    if _on_pixels(x, kernel_size, stride, padding):
        y = _images(masked_values_linear(pixels(x), _flat(weight), bias, values, mask_words, scale, REGIMES["auto"]), x)
    elif _one_convolution(x):
        effective = _values_weight(x, _flat(weight), values, mask_words, scale, columns)
        y = F.conv2d(x, effective.reshape(shape), bias, *window)
    else:
        added = _values_weight(x, None, values, mask_words, scale, columns)
        y = _conv2d(x, weight, bias, added.reshape(shape), mask_words, window)
    return reference.in_layout_of(x, y)


def masked_values_conv2d_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """dX of `masked_values_conv2d`."""
    shape, window = (mask_words.shape[0], input_size[1], *kernel_size), (stride, padding, dilation)
    columns = shape[1] * shape[2] * shape[3]
    if _on_pixels(grad_output, kernel_size, stride, padding):
        frozen, delta = _flat(weight), (values, mask_words, scale)
        flat_dx = masked_values_linear_input_gradient(pixels(grad_output), frozen, *delta, shape[1], REGIMES["auto"])
        dx = _images(flat_dx, grad_output)
    elif _one_convolution(grad_output):
        effective = _values_weight(grad_output, _flat(weight), values, mask_words, scale, columns)
        dx = torch.nn.grad.conv2d_input(input_size, effective.reshape(shape), grad_output, *window)
    else:
        added = _values_weight(grad_output, None, values, mask_words, scale, columns).reshape(shape)
        dx = _conv2d_input_gradient(grad_output, weight, added, mask_words, list(input_size), window)
    return reference.in_layout_of(grad_output, dx)


def masked_values_conv2d_gradient(
    grad_output: Tensor,
    x: Tensor,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """dV of `masked_values_conv2d`."""
    if is_linear(kernel_size, stride, padding):
        rows = (pixels(grad_output), pixels(x))
        return masked_values_linear_gradient(*rows, values, mask_words, scale, REGIMES["auto"])
    size = (grad_output.shape[1], x.shape[1], *kernel_size)
    gradient = torch.nn.grad.conv2d_weight(x, size, grad_output, stride, padding, dilation)
    gathered = torch.ops.fade_kernels.gather_masked(gradient, mask_words, values.numel()).float()
    return (_on(scale, gathered) * gathered).to(values.dtype)


# --- saliency --------------------------------------------------------------------------------------------------------


def accumulate_linear_gradient_magnitude_(
    saliency: Tensor, grad_output: Tensor, input: Tensor, magnitude: str, per_sample: bool
) -> None:
    """S += |dY^T X|; the choice: `choose_linear_magnitude`."""
    from fade_kernels.triton_kernels import weight_gradient_magnitude as kernel

    if saliency.numel() == 0 or input.numel() == 0 or grad_output.numel() == 0:
        return
    dtype = torch.promote_types(grad_output.dtype, input.dtype)
    grad_output, input = grad_output.to(dtype), input.to(dtype)
    if not saliency.is_contiguous():
        scratch = saliency.contiguous()
        accumulate_linear_gradient_magnitude_(scratch, grad_output, input, magnitude, per_sample)
        saliency.copy_(scratch)
    elif choose_linear_magnitude(input.dtype, _tf32(input)) == "fused":
        precision = _precision(input)
        kernel.accumulate_linear_gradient_magnitude_(
            saliency, grad_output, input, magnitude, per_sample, input_precision=precision
        )
    else:
        samples = input.shape[0] if per_sample else 1
        dy = grad_output.reshape(samples, -1, saliency.shape[0])
        x = input.reshape(samples, -1, saliency.shape[1])
        for i in range(samples):
            gradient = dy[i].float().t() @ x[i].float()
            torch.ops.fade_kernels.accumulate_gradient_magnitude_([saliency], [gradient], magnitude)


# --- registration ----------------------------------------------------------------------------------------------------

_KERNELS: dict[str, Callable[..., Any]] = {
    kernel.__name__: kernel
    for kernel in (
        masked_lora_linear,
        masked_lora_linear_input_gradient,
        masked_lora_linear_factor_gradients,
        masked_values_linear,
        masked_values_linear_input_gradient,
        masked_values_linear_gradient,
        masked_lora_conv2d,
        masked_lora_conv2d_input_gradient,
        masked_lora_conv2d_factor_gradients,
        masked_values_conv2d,
        masked_values_conv2d_input_gradient,
        masked_values_conv2d_gradient,
        masked_factor_values,
        effective_weight,
        effective_weight_out,
        effective_weights_out,
        effective_weight_from_values_out,
        accumulate_linear_gradient_magnitude_,
    )
}

_unusable: set[str] = set()


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    """Those among the arguments that are no scalars, in lists too."""
    flat = [b for a in arguments for b in (a if isinstance(a, list) else [a])]
    return [a for a in flat if isinstance(a, Tensor) and a.dim() > 0]


def _wide(arguments: tuple[Any, ...]) -> bool:
    """fp64 is for definitions: nobody trains in it, and no matrix unit that Triton reaches computes it."""
    return any(tensor.dtype == torch.float64 for tensor in _tensors(arguments))


@functools.cache
def _too_old(index: int | None) -> str:
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST_CAPABILITY:
        return ""
    return f"the GPU has compute capability {capability[0]}.{capability[1]}, older than 8.0"


def _cannot_run(error: Exception) -> bool:
    """Whether the tool chain failed, and not the call: what went wrong on the device must be heard."""
    if isinstance(error, (ImportError, FileNotFoundError, subprocess.CalledProcessError)):
        return True
    if isinstance(error, RuntimeError) and "C compiler" in str(error):  # Triton builds its launchers with one
        return True
    return type(error).__module__.startswith("triton")


def _with_definition(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    definition = getattr(reference, name)

    def serve(*arguments: Any) -> Any:
        if name in _unusable or _wide(arguments):
            return definition(*arguments)
        first = _tensors(arguments)[0]
        reason = _too_old(first.device.index) if first.is_cuda else ""
        if not reason:
            try:
                return kernel(*arguments)
            except Exception as error:
                if not _cannot_run(error):
                    raise
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        _unusable.add(name)
        warnings.warn(
            f"fade_kernels::{name} runs as its plain-PyTorch definition, slower, because its GPU kernel cannot run "
            f"here ({reason}). FADE_KERNELS=reference silences this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return definition(*arguments)

    return serve


def served_by_definitions() -> list[str]:
    """Operators of this file whose kernel could not run here, so that their definitions serve."""
    return sorted(_unusable)


def register(device: str) -> None:
    """Makes the kernels of this file serve tensors on a device type."""
    for name, kernel in _KERNELS.items():
        _ops.implement(name, _with_definition(name, kernel), device)


def _register_definitions(names: tuple[str, ...], reason: str) -> None:
    """Definitions serve CUDA for what the CUDA library would; the first call says so, once for all."""
    told: list[bool] = []

    def with_warning(definition: Callable[..., Any]) -> Callable[..., Any]:
        def serve(*arguments: Any) -> Any:
            if not told:
                told.append(True)
                warnings.warn(reason, RuntimeWarning, stacklevel=2)
            return definition(*arguments)

        return serve

    for name in names:
        _ops.implement(name, with_warning(getattr(reference, name)), "CUDA")


LIBRARY_OPERATORS = (
    "accumulate_gradient_magnitude_",
    "select_top_k",
    "pack_mask",
    "unpack_mask",
    "mask_row_counts",
    "mask_occupancy",
    "gather_masked",
    "scatter_masked_",
    "add_gathered_lora_",
    "add_gathered_values_",
    "sampled_gradient",
    "sampled_factor_gradients",
)
"""What csrc/cuda serves."""


def _serve_gpus_without_code() -> None:
    """Definitions take the CUDA library's place where it holds no code for a GPU of this machine."""
    held = build_info()["architectures"]
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not runs_on(held, capability):
            shown = ".".join(map(str, capability))
            reason = f"it was built for compute capability {', '.join(held)}, and GPU {index} has {shown}"
            _register_definitions(LIBRARY_OPERATORS, MISSING_CUDA.format(reason=reason))
            return


if FORCED in ("", "triton"):
    register("CUDA")
if missing_cuda():
    _register_definitions(LIBRARY_OPERATORS, missing_cuda())
elif cuda_library_loaded() and not FORCED:
    # Once torch has made contact with the driver, and so before any tensor is on a GPU; not by importing this package.
    torch.cuda._lazy_call(_serve_gpus_without_code)
if INTERPRETED:
    register("CPU")
