"""Every operator of `fade_kernels::` in one place: schema, checks, fake, default kernel (its definition) and autograd.

Compiled libraries only register kernels for the operators defined here, so that an operator exists, with its
definition, on every device and where nothing was compiled. Definitions: `reference.py`; public functions: the modules
beside it.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fade_kernels import reference

# The library object owns the definitions: they live as long as this module.
_LIBRARY = torch.library.Library("fade_kernels", "DEF")


def _define(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    default: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines one operator and returns the function that checks its arguments and calls it.

    Args:
        schema: `name(arguments) -> returns` in torch.library's schema language.
        check: takes the operator's arguments; raises ValueError or TypeError that says what to do.
        fake: shapes and dtypes of the outputs, for tracing.
        default: the definition in plain PyTorch, used on every device that has no kernel of its own.
        setup_context, backward: autograd, as for torch.library.register_autograd; None: not differentiable.
    """
    name = schema.split("(", 1)[0]
    qualified = f"fade_kernels::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    torch.library.register_fake(qualified, checked_fake, lib=_LIBRARY)
    _LIBRARY.impl(name, default, "CompositeExplicitAutograd")
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    operator = getattr(torch.ops.fade_kernels, name).default

    def call(*args: Any) -> Any:
        check(*args)
        return operator(*args)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"Checks its arguments and calls torch.ops.{qualified.replace('::', '.')}: `{schema}`."
    return call


def implement(name: str, kernel: Callable[..., Any], device: str) -> None:
    """Registers a kernel written in Python for one device type, where a composition of operators is the kernel."""
    _LIBRARY.impl(name, kernel, device)


def _no_output(*_: Any) -> None:
    """Fake of an operator that only writes into its arguments."""


# --- checks shared by several operators ------------------------------------------------------------------------------


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def words_per_row(columns: int) -> int:
    """Number of 32-bit words that hold a row of `columns` mask bits."""
    return (columns + 31) // 32


def check_mask_words(words: Tensor, rows: int | None = None, columns: int | None = None) -> None:
    """Raises unless `words` is int32 [rows, ceil(columns/32)]; None leaves a size open."""
    if words.dtype != torch.int32:
        raise TypeError(f"mask words must be int32, not {words.dtype}: use BitMask.pack to make them")
    if words.dim() != 2:
        raise ValueError(f"mask words must have two dimensions [N, ceil(K/32)], not {_shape(words)}")
    if rows is not None and words.shape[0] != rows:
        raise ValueError(f"the mask has {words.shape[0]} rows, the weight {rows}")
    if columns is not None and words.shape[1] != words_per_row(columns):
        raise ValueError(
            f"mask words {_shape(words)} do not fit {columns} columns, which need {words_per_row(columns)} words a row"
        )


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all given tensors are on one device."""
    present = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(present.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in present.items())
        raise ValueError(f"all tensors must be on one device, got {where}: move them with .to(device)")


# --- pack_mask, unpack_mask, mask_row_counts, mask_occupancy ---------------------------------------------------------


def _check_pack_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask must be bool, not {mask.dtype}: compare first, e.g. `mask != 0`")
    if mask.dim() != 2:
        raise ValueError(f"a mask must have two dimensions [N, K], not {_shape(mask)}")


def _check_unpack_mask(mask_words: Tensor, columns: int) -> None:
    check_mask_words(mask_words, columns=columns)


def _check_mask_occupancy(mask_words: Tensor, columns: int, tile_n: int, tile_k: int) -> None:
    check_mask_words(mask_words, columns=columns)
    if tile_n < 1 or tile_k < 1:
        raise ValueError(f"tile sizes must be at least 1, got {tile_n} x {tile_k}")


pack_mask = _define(
    "pack_mask(Tensor mask) -> Tensor",
    check=_check_pack_mask,
    fake=lambda mask: mask.new_empty((mask.shape[0], words_per_row(mask.shape[1])), dtype=torch.int32),
    default=reference.pack_mask,
)

unpack_mask = _define(
    "unpack_mask(Tensor mask_words, int columns) -> Tensor",
    check=_check_unpack_mask,
    fake=lambda mask_words, columns: mask_words.new_empty((mask_words.shape[0], columns), dtype=torch.bool),
    default=reference.unpack_mask,
)

mask_row_counts = _define(
    "mask_row_counts(Tensor mask_words, int columns) -> Tensor",
    check=_check_unpack_mask,
    fake=lambda mask_words, columns: mask_words.new_empty((mask_words.shape[0],), dtype=torch.int64),
    default=reference.mask_row_counts,
)

mask_occupancy = _define(
    "mask_occupancy(Tensor mask_words, int columns, int tile_n, int tile_k) -> Tensor",
    check=_check_mask_occupancy,
    fake=lambda mask_words, columns, tile_n, tile_k: mask_words.new_empty(
        (-(-mask_words.shape[0] // tile_n), -(-columns // tile_k)), dtype=torch.bool
    ),
    default=reference.mask_occupancy,
)


# --- gather_masked, scatter_masked_ ----------------------------------------------------------------------------------


def check_masked_weight(weight: Tensor, mask_words: Tensor) -> None:
    """Raises unless `weight` [N, ...] has at least two dimensions and `mask_words` fit it seen as [N, K]."""
    if weight.dim() < 2:
        raise ValueError(f"a masked weight must have at least two dimensions, not {_shape(weight)}")
    columns = 1
    for size in weight.shape[1:]:
        columns *= size
    check_mask_words(mask_words, weight.shape[0], columns)
    check_same_device(weight=weight, mask=mask_words)


def _check_gather_masked(weight: Tensor, mask_words: Tensor, count: int) -> None:
    check_masked_weight(weight, mask_words)
    if count < 0:
        raise ValueError(f"count must be the number of set bits, got {count}")


def _check_scatter_masked_(weight: Tensor, values: Tensor, mask_words: Tensor) -> None:
    check_masked_weight(weight, mask_words)
    check_same_device(weight=weight, values=values)
    if values.dtype != weight.dtype:
        raise TypeError(f"values are {values.dtype}, the weight {weight.dtype}: cast the values to the weight's dtype")
    if values.dim() != 1:
        raise ValueError(f"values must be one-dimensional [nnz], not {_shape(values)}")


gather_masked = _define(
    "gather_masked(Tensor weight, Tensor mask_words, int count) -> Tensor",
    check=_check_gather_masked,
    fake=lambda weight, mask_words, count: weight.new_empty((count,)),
    default=reference.gather_masked,
)

scatter_masked_ = _define(
    "scatter_masked_(Tensor(a!) weight, Tensor values, Tensor mask_words) -> ()",
    check=_check_scatter_masked_,
    fake=_no_output,
    default=reference.scatter_masked_,
)


# --- accumulate_gradient_magnitude_, accumulate_linear_gradient_magnitude_ -------------------------------------------

MODES = ("abs", "signed", "square")
GRADIENT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_mode(mode: str) -> None:
    """Raises ValueError unless `mode` names what a gradient adds to its accumulator."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")


def _check_accumulator(saliency: Tensor, name: str) -> None:
    if saliency.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, not {saliency.dtype}: 16-bit sums lose small gradients")


def _check_gradient_dtype(gradient: Tensor, name: str) -> None:
    if gradient.dtype not in GRADIENT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, not {gradient.dtype}")


def _check_accumulate(saliency: list[Tensor], gradient: list[Tensor], magnitude: str) -> None:
    check_mode(magnitude)
    if len(saliency) != len(gradient):
        raise ValueError(f"one gradient per accumulator is needed, got {len(saliency)} and {len(gradient)}")
    if len({id(tensor) for tensor in saliency}) < len(saliency):
        raise ValueError("an accumulator may appear only once in a call")
    for i, (s, g) in enumerate(zip(saliency, gradient, strict=True)):
        _check_accumulator(s, f"saliency[{i}]")
        _check_gradient_dtype(g, f"gradient[{i}]")
        if s.shape != g.shape:
            raise ValueError(f"gradient[{i}] is {_shape(g)}, but saliency[{i}] is {_shape(s)}")
        check_same_device(**{f"saliency[{i}]": s, f"gradient[{i}]": g})


def _check_accumulate_linear(
    saliency: Tensor, grad_output: Tensor, input: Tensor, magnitude: str, per_sample: bool
) -> None:
    check_mode(magnitude)
    _check_accumulator(saliency, "saliency")
    _check_gradient_dtype(grad_output, "grad_output")
    _check_gradient_dtype(input, "input")
    check_same_device(saliency=saliency, grad_output=grad_output, input=input)
    shapes = f"saliency {_shape(saliency)}, grad_output {_shape(grad_output)}, input {_shape(input)}"
    if saliency.dim() != 2:
        raise ValueError(f"the accumulator of a linear layer must be [N, K], got {shapes}")
    fits = input.dim() >= 1 and input.shape[:-1] == grad_output.shape[:-1]
    if not fits or (*grad_output.shape[-1:], *input.shape[-1:]) != tuple(saliency.shape):
        raise ValueError(f"grad_output [..., N] and input [..., K] must fit an accumulator [N, K], got {shapes}")
    if per_sample and input.dim() < 2:
        raise ValueError(f"per_sample needs a leading sample dimension, got {shapes}")


# The schemas say `magnitude` because torch's functionalization reserves the argument name `mode` for itself.
accumulate_gradient_magnitude_ = _define(
    "accumulate_gradient_magnitude_(Tensor(a!)[] saliency, Tensor[] gradient, str magnitude) -> ()",
    check=_check_accumulate,
    fake=_no_output,
    default=reference.accumulate_gradient_magnitude_,
)

accumulate_linear_gradient_magnitude_ = _define(
    "accumulate_linear_gradient_magnitude_("
    "Tensor(a!) saliency, Tensor grad_output, Tensor input, str magnitude, bool per_sample) -> ()",
    check=_check_accumulate_linear,
    fake=_no_output,
    default=reference.accumulate_linear_gradient_magnitude_,
)


# --- select_top_k ----------------------------------------------------------------------------------------------------


def _check_select_top_k(scores: list[Tensor], k: int) -> None:
    if not scores:
        raise ValueError("there are no saliency tensors to select from")
    for i, s in enumerate(scores):
        if s.dtype != torch.float32:
            raise TypeError(f"saliency[{i}] must be float32, not {s.dtype}: convert it with .float()")
        if s.dim() < 2:
            raise ValueError(f"saliency[{i}] must have at least two dimensions [N, ...], not {_shape(s)}")
        if s.device != scores[0].device:
            raise ValueError(f"saliency[{i}] is on {s.device}, saliency[0] on {scores[0].device}: move them together")
    total = sum(s.numel() for s in scores)
    if not 1 <= k <= total:
        raise ValueError(f"k must be between 1 and the number of values {total}, not {k}")


def _fake_select_top_k(scores: list[Tensor], k: int) -> tuple[list[Tensor], Tensor, Tensor]:
    words = []
    for s in scores:
        columns = 1
        for size in s.shape[1:]:
            columns *= size
        words.append(s.new_empty((s.shape[0], words_per_row(columns)), dtype=torch.int32))
    return words, scores[0].new_empty(()), scores[0].new_empty((), dtype=torch.int64)


# Third output: index of the first tensor with NaN or a negative value, -1 if there is none; the masks are then empty.
select_top_k = _define(
    "select_top_k(Tensor[] scores, int k) -> (Tensor[] mask_words, Tensor threshold, Tensor invalid)",
    check=_check_select_top_k,
    fake=_fake_select_top_k,
    default=reference.select_top_k,
)


# --- masked_least_squares --------------------------------------------------------------------------------------------


def _check_masked_least_squares(rhs: Tensor, gram: Tensor, mask_words: Tensor, count: int, with_prices: bool) -> None:
    for name, tensor in (("rhs", rhs), ("gram", gram)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, not {tensor.dtype}: convert it first")
    if rhs.dtype != gram.dtype:
        raise TypeError(f"dtypes must agree, got rhs {rhs.dtype}, gram {gram.dtype}")
    if rhs.dim() != 2 or tuple(gram.shape) != (rhs.shape[1], rhs.shape[1]):
        raise ValueError(f"rhs must be [N, K] and gram [K, K], not {_shape(rhs)} and {_shape(gram)}")
    check_mask_words(mask_words, *rhs.shape)
    check_same_device(rhs=rhs, gram=gram, mask=mask_words)
    if count < 0:
        raise ValueError(f"count must be the number of set bits, got {count}")


# Third output: the first row whose block of the Gram matrix is singular, -1 if there is none; its values mean nothing.
masked_least_squares = _define(
    "masked_least_squares(Tensor rhs, Tensor gram, Tensor mask_words, int count, bool with_prices) "
    "-> (Tensor values, Tensor prices, Tensor singular)",
    check=_check_masked_least_squares,
    fake=lambda rhs, gram, mask_words, count, with_prices: (
        rhs.new_empty((count,)),
        rhs.new_empty((count if with_prices else 0,)),
        rhs.new_empty((), dtype=torch.int64),
    ),
    default=reference.masked_least_squares,
)


# --- masked LoRA: checks ---------------------------------------------------------------------------------------------


_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check_floats(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, not {tensor.dtype}")


def _check_same_dtype(**tensors: Tensor | None) -> None:
    present = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len(set(present.values())) > 1:
        raise TypeError(f"dtypes must agree, got {', '.join(f'{name} {dtype}' for name, dtype in present.items())}")


def _check_scale(scale: Tensor, like: Tensor) -> None:
    """Raises unless the scale is 0-d, floating-point, and on the host or on the device of `like`."""
    if scale.dim() != 0 or not scale.is_floating_point():
        raise ValueError(f"scale must be a number or a 0-d floating-point tensor, not {scale.dtype} {_shape(scale)}")
    if scale.requires_grad:
        raise ValueError("scale must not require a gradient: masked LoRA is not differentiable in it")
    if scale.device.type != "cpu" and scale.device != like.device:
        raise ValueError(f"scale is on {scale.device}, the other tensors on {like.device}: pass a number, or move it")


def _check_factors(lora_a: Tensor, lora_b: Tensor, dims: int) -> None:
    for name, factor, layout in (
        ("lora_a", lora_a, "[r, K]" if dims == 2 else "[r, C_in, kh, kw]"),
        ("lora_b", lora_b, "[N, r]" if dims == 2 else "[C_out, r, 1, 1]"),
    ):
        if factor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions {layout}, not {_shape(factor)}")
    if lora_a.shape[0] < 1:
        raise ValueError("lora_a has rank 0: the rank must be at least 1")
    if lora_b.shape[1] != lora_a.shape[0] or (dims == 4 and tuple(lora_b.shape[2:]) != (1, 1)):
        raise ValueError(f"lora_b {_shape(lora_b)} does not fit lora_a {_shape(lora_a)}: the ranks must agree")
    _check_floats(lora_a=lora_a, lora_b=lora_b)


def _check_values(values: Tensor) -> None:
    if values.dim() != 1:
        raise ValueError(f"values must be one-dimensional [nnz], not {_shape(values)}")
    _check_floats(values=values)


def _check_rows(name: str, rows: Tensor, columns: int) -> None:
    if rows.dim() < 1 or rows.shape[-1] != columns:
        raise ValueError(f"{name} {_shape(rows)} must end in {columns} features")
    _check_floats(**{name: rows})


def _check_weight(weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> None:
    if weight is not None and tuple(weight.shape) != shape:
        raise ValueError(f"weight {_shape(weight)} does not fit the adapter, which is for {list(shape)}")
    if bias is not None and tuple(bias.shape) != shape[:1]:
        raise ValueError(f"bias {_shape(bias)} must be [{shape[0]}]")


def _check_images(name: str, images: Tensor, channels: int) -> None:
    if images.dim() != 4 or images.shape[1] != channels:
        raise ValueError(f"{name} {_shape(images)} must be [n, {channels}, height, width]")
    _check_floats(**{name: images})


def _flat_columns(shape: tuple[int, ...] | torch.Size) -> int:
    columns = 1
    for size in shape[1:]:
        columns *= size
    return columns


# --- masked LoRA, linear: forward, input gradient, factor gradients --------------------------------------------------


def _check_masked_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
) -> None:
    _check_factors(lora_a, lora_b, 2)
    rows, columns = lora_b.shape[0], lora_a.shape[1]
    _check_rows("x", x, columns)
    _check_weight(weight, bias, (rows, columns))
    _check_same_dtype(x=x, weight=weight, bias=bias)
    check_mask_words(mask_words, rows, columns)
    _check_scale(scale, mask_words)
    check_same_device(x=x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, mask=mask_words)


def _check_masked_lora_linear_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
) -> None:
    _check_factors(lora_a, lora_b, 2)
    rows, columns = lora_b.shape[0], lora_a.shape[1]
    _check_rows("grad_output", grad_output, rows)
    _check_weight(weight, None, (rows, columns))
    _check_same_dtype(grad_output=grad_output, weight=weight)
    check_mask_words(mask_words, rows, columns)
    _check_scale(scale, mask_words)


def _check_masked_lora_linear_factor_gradients(
    grad_output: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
) -> None:
    _check_factors(lora_a, lora_b, 2)
    _check_rows("grad_output", grad_output, lora_b.shape[0])
    _check_rows("x", x, lora_a.shape[1])
    if grad_output.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"grad_output {_shape(grad_output)} and x {_shape(x)} must have the same leading dimensions")
    _check_same_dtype(grad_output=grad_output, x=x)
    check_mask_words(mask_words, lora_b.shape[0], lora_a.shape[1])
    _check_scale(scale, mask_words)


def without_autocast(tensor: Tensor) -> Any:
    """Backward may run under autocast, which must not cast what the operators do inside."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _setup_masked_lora_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, lora_a, lora_b, mask_words, scale, regime = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, mask_words, scale)
    ctx.regime = regime


def _backward_frozen_linear(ctx: Any, grad_output: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias (arguments 1 and 2), for callers that did not freeze them."""
    grad_weight = reference.as_rows(grad_output).t() @ reference.as_rows(x) if ctx.needs_input_grad[1] else None
    grad_bias = reference.as_rows(grad_output).sum(dim=0) if ctx.needs_input_grad[2] else None
    return grad_weight, grad_bias


def _backward_masked_lora_linear(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b, mask_words, scale = ctx.saved_tensors
    delta = (lora_a, lora_b, mask_words, scale, ctx.regime)
    grad_x = grad_a = grad_b = None
    with without_autocast(grad_output):
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.fade_kernels.masked_lora_linear_input_gradient(grad_output, weight, *delta)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            grad_a, grad_b = torch.ops.fade_kernels.masked_lora_linear_factor_gradients(grad_output, x, *delta)
        grad_weight, grad_bias = _backward_frozen_linear(ctx, grad_output, x)
    return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None, None


_define(
    "masked_lora_linear_input_gradient(Tensor grad_output, Tensor? weight, Tensor lora_a, Tensor lora_b, "
    "Tensor mask_words, Tensor scale, int regime) -> Tensor",
    check=_check_masked_lora_linear_input_gradient,
    fake=lambda grad_output, weight, lora_a, *_: grad_output.new_empty((*grad_output.shape[:-1], lora_a.shape[1])),
    default=reference.masked_lora_linear_input_gradient,
)

_define(
    "masked_lora_linear_factor_gradients(Tensor grad_output, Tensor x, Tensor lora_a, Tensor lora_b, "
    "Tensor mask_words, Tensor scale, int regime) -> (Tensor, Tensor)",
    check=_check_masked_lora_linear_factor_gradients,
    fake=lambda grad_output, x, lora_a, lora_b, *_: (
        lora_a.new_empty(lora_a.shape),
        lora_b.new_empty(lora_b.shape),
    ),
    default=reference.masked_lora_linear_factor_gradients,
)

masked_lora_linear = _define(
    "masked_lora_linear(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor mask_words, "
    "Tensor scale, int regime) -> Tensor",
    check=_check_masked_lora_linear,
    fake=lambda x, weight, bias, lora_a, lora_b, *_: x.new_empty((*x.shape[:-1], lora_b.shape[0])),
    default=reference.masked_lora_linear,
    setup_context=_setup_masked_lora_linear,
    backward=_backward_masked_lora_linear,
)


# --- masked values, linear: forward, input gradient, values' gradient ------------------------------------------------


def _check_masked_values_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    regime: int,
) -> None:
    _check_values(values)
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension [..., K]")
    shape = (mask_words.shape[0], x.shape[-1])
    _check_rows("x", x, shape[1])
    _check_weight(weight, bias, shape)
    _check_same_dtype(x=x, weight=weight, bias=bias)
    check_mask_words(mask_words, *shape)
    _check_scale(scale, mask_words)
    check_same_device(x=x, weight=weight, bias=bias, values=values, mask=mask_words)


def _check_masked_values_linear_input_gradient(
    grad_output: Tensor,
    weight: Tensor | None,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    in_features: int,
    regime: int,
) -> None:
    _check_values(values)
    _check_rows("grad_output", grad_output, mask_words.shape[0])
    _check_weight(weight, None, (mask_words.shape[0], in_features))
    _check_same_dtype(grad_output=grad_output, weight=weight)
    check_mask_words(mask_words, columns=in_features)
    _check_scale(scale, mask_words)


def _check_masked_values_linear_gradient(
    grad_output: Tensor, x: Tensor, values: Tensor, mask_words: Tensor, scale: Tensor, regime: int
) -> None:
    _check_values(values)
    _check_rows("grad_output", grad_output, mask_words.shape[0])
    if grad_output.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"grad_output {_shape(grad_output)} and x {_shape(x)} must have the same leading dimensions")
    _check_same_dtype(grad_output=grad_output, x=x)
    check_mask_words(mask_words, columns=x.shape[-1])
    _check_scale(scale, mask_words)


def _setup_masked_values_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, values, mask_words, scale, regime = inputs
    ctx.save_for_backward(x, weight, values, mask_words, scale)
    ctx.regime = regime


def _backward_masked_values_linear(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, values, mask_words, scale = ctx.saved_tensors
    grad_x = grad_values = None
    with without_autocast(grad_output):
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.fade_kernels.masked_values_linear_input_gradient(
                grad_output, weight, values, mask_words, scale, x.shape[-1], ctx.regime
            )
        if ctx.needs_input_grad[3]:
            grad_values = torch.ops.fade_kernels.masked_values_linear_gradient(
                grad_output, x, values, mask_words, scale, ctx.regime
            )
        grad_weight, grad_bias = _backward_frozen_linear(ctx, grad_output, x)
    return grad_x, grad_weight, grad_bias, grad_values, None, None, None


_define(
    "masked_values_linear_input_gradient(Tensor grad_output, Tensor? weight, Tensor values, Tensor mask_words, "
    "Tensor scale, int in_features, int regime) -> Tensor",
    check=_check_masked_values_linear_input_gradient,
    fake=lambda grad_output, weight, values, mask_words, scale, in_features, regime: grad_output.new_empty(
        (*grad_output.shape[:-1], in_features)
    ),
    default=reference.masked_values_linear_input_gradient,
)

_define(
    "masked_values_linear_gradient(Tensor grad_output, Tensor x, Tensor values, Tensor mask_words, Tensor scale, "
    "int regime) -> Tensor",
    check=_check_masked_values_linear_gradient,
    fake=lambda grad_output, x, values, *_: values.new_empty(values.shape),
    default=reference.masked_values_linear_gradient,
)

masked_values_linear = _define(
    "masked_values_linear(Tensor x, Tensor? weight, Tensor? bias, Tensor values, Tensor mask_words, Tensor scale, "
    "int regime) -> Tensor",
    check=_check_masked_values_linear,
    fake=lambda x, weight, bias, values, mask_words, *_: x.new_empty((*x.shape[:-1], mask_words.shape[0])),
    default=reference.masked_values_linear,
    setup_context=_setup_masked_values_linear,
    backward=_backward_masked_values_linear,
)


# --- very sparse masks: add_gathered_lora_, add_gathered_values_, sampled_gradient, sampled_factor_gradients ----------
#
# What `dispatch` composes the gather path of the operators above from; positions: `positions.py`.


def _check_positions(starts: Tensor, segments: int, **positions: Tensor | None) -> None:
    present = {"starts": starts, **{name: tensor for name, tensor in positions.items() if tensor is not None}}
    for name, tensor in present.items():
        if tensor.dtype != torch.int32 or tensor.dim() != 1:
            raise ValueError(f"{name} must be int32 with one dimension, not {tensor.dtype} {_shape(tensor)}")
    if starts.numel() != segments + 1:
        raise ValueError(f"starts {_shape(starts)} must have one element more than there are segments, {segments}")
    lists = {name: tensor for name, tensor in present.items() if name != "starts"}
    if any(tensor.numel() != next(iter(lists.values())).numel() for tensor in lists.values()):
        lengths = ", ".join(f"{name} {_shape(tensor)}" for name, tensor in lists.items())
        raise ValueError(f"all lists of positions must be equally long, got {lengths}")


def _check_products(names: tuple[str, str], first: Tensor, second: Tensor) -> None:
    if first.dim() != 2 or second.dim() != 2 or first.shape[0] != second.shape[0]:
        raise ValueError(f"{names[0]} {_shape(first)} and {names[1]} {_shape(second)} must be [T, *] with one T")
    _check_same_dtype(**{names[0]: first, names[1]: second})


def _check_add_gathered_lora_(
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
    _check_factors(lora_a, lora_b, 2)
    _check_products(("y", "x"), y, x)
    widths = (lora_b.shape[0], lora_a.shape[1])
    if (y.shape[1], x.shape[1]) != (widths[::-1] if by_column else widths):
        raise ValueError(f"y {_shape(y)} and x {_shape(x)} do not fit B A [{widths[0]}, {widths[1]}]")
    _check_positions(starts, y.shape[1], index=index, segment=segment)
    _check_scale(scale, y)
    check_same_device(y=y, x=x, lora_a=lora_a, lora_b=lora_b, starts=starts, index=index, segment=segment)


def _check_add_gathered_values_(
    y: Tensor, x: Tensor, values: Tensor, order: Tensor | None, starts: Tensor, index: Tensor, scale: Tensor
) -> None:
    _check_values(values)
    _check_products(("y", "x"), y, x)
    _check_positions(starts, y.shape[1], index=index, order=order)
    if values.numel() != index.numel():
        raise ValueError(f"values {_shape(values)} must be one for each of the {index.numel()} positions")
    _check_scale(scale, y)
    check_same_device(y=y, x=x, values=values, order=order, starts=starts, index=index)


def _check_sampled_gradient(grad_output: Tensor, x: Tensor, starts: Tensor, index: Tensor, segment: Tensor) -> None:
    _check_products(("grad_output", "x"), grad_output, x)
    _check_positions(starts, grad_output.shape[1], index=index, segment=segment)
    check_same_device(grad_output=grad_output, x=x, starts=starts, index=index, segment=segment)


def _check_sampled_factor_gradients(
    gradient: Tensor,
    row_starts: Tensor,
    row_index: Tensor,
    column_starts: Tensor,
    column_index: Tensor,
    order: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
) -> None:
    _check_factors(lora_a, lora_b, 2)
    _check_positions(row_starts, lora_b.shape[0], row_index=row_index)
    _check_positions(column_starts, lora_a.shape[1], row_index=row_index, column_index=column_index, order=order)
    if tuple(gradient.shape) != (row_index.numel(),):
        raise ValueError(f"gradient {_shape(gradient)} must be one for each of the {row_index.numel()} positions")
    _check_scale(scale, gradient)
    check_same_device(
        gradient=gradient,
        **{"row_starts": row_starts, "row_index": row_index, "column_starts": column_starts},
        **{"column_index": column_index, "order": order, "lora_a": lora_a, "lora_b": lora_b},
    )


add_gathered_lora_ = _define(
    "add_gathered_lora_(Tensor(a!) y, Tensor x, Tensor lora_a, Tensor lora_b, Tensor starts, Tensor index, "
    "Tensor segment, bool by_column, Tensor scale) -> ()",
    check=_check_add_gathered_lora_,
    fake=_no_output,
    default=reference.add_gathered_lora_,
)

add_gathered_values_ = _define(
    "add_gathered_values_(Tensor(a!) y, Tensor x, Tensor values, Tensor? order, Tensor starts, Tensor index, "
    "Tensor scale) -> ()",
    check=_check_add_gathered_values_,
    fake=_no_output,
    default=reference.add_gathered_values_,
)

sampled_gradient = _define(
    "sampled_gradient(Tensor grad_output, Tensor x, Tensor starts, Tensor index, Tensor segment) -> Tensor",
    check=_check_sampled_gradient,
    fake=lambda grad_output, x, starts, index, segment: x.new_empty(
        (index.numel(),), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32
    ),
    default=reference.sampled_gradient,
)

sampled_factor_gradients = _define(
    "sampled_factor_gradients(Tensor gradient, Tensor row_starts, Tensor row_index, Tensor column_starts, "
    "Tensor column_index, Tensor order, Tensor lora_a, Tensor lora_b, Tensor scale) -> (Tensor, Tensor)",
    check=_check_sampled_factor_gradients,
    fake=lambda gradient, row_starts, row_index, column_starts, column_index, order, lora_a, lora_b, scale: (
        torch.empty_like(lora_a, memory_format=torch.contiguous_format),
        torch.empty_like(lora_b, memory_format=torch.contiguous_format),
    ),
    default=reference.sampled_factor_gradients,
)


# --- effective_weight, masked_factor_values, masked_factor_gradients -------------------------------------------------


def _check_effective_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor) -> None:
    _check_factors(lora_a, lora_b, 2)
    shape = (lora_b.shape[0], lora_a.shape[1])
    _check_weight(weight, None, shape)
    _check_floats(weight=weight)
    check_mask_words(mask_words, *shape)
    _check_scale(scale, mask_words)
    check_same_device(weight=weight, lora_a=lora_a, lora_b=lora_b, mask=mask_words)


def _check_effective_weight_out(
    out: Tensor, weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor
) -> None:
    _check_effective_weight(out if weight is None else weight, lora_a, lora_b, mask_words, scale)
    if tuple(out.shape) != (lora_b.shape[0], lora_a.shape[1]):
        raise ValueError(f"out {_shape(out)} must have the weight's shape [{lora_b.shape[0]}, {lora_a.shape[1]}]")
    _check_same_dtype(out=out, weight=weight)


def _check_effective_weights_out(
    out: list[Tensor],
    weight: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    mask_words: list[Tensor],
    scale: list[Tensor],
    stochastic: bool,
    seed: int,
) -> None:
    lists = {"out": out, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "mask": mask_words, "scale": scale}
    if len({len(tensors) for tensors in lists.values()}) > 1:
        lengths = ", ".join(f"{name} {len(tensors)}" for name, tensors in lists.items())
        raise ValueError(f"every layer needs one of each, got {lengths}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    for i, layer in enumerate(zip(*lists.values(), strict=True)):
        try:
            _check_effective_weight_out(*layer)
            check_same_device(out=layer[0], **{"out[0]": out[0]})
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {i}: {error}") from None


def _check_effective_weight_from_values_out(
    out: Tensor, weight: Tensor | None, values: Tensor, mask_words: Tensor, scale: Tensor
) -> None:
    _check_values(values)
    if out.dim() != 2:
        raise ValueError(f"out must have two dimensions [N, K], not {_shape(out)}")
    _check_weight(weight, None, tuple(out.shape))
    _check_floats(out=out)
    _check_same_dtype(out=out, weight=weight)
    check_mask_words(mask_words, *out.shape)
    _check_scale(scale, mask_words)
    check_same_device(out=out, weight=weight, values=values, mask=mask_words)


def _check_masked_factor_values(lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, count: int) -> None:
    _check_factors(lora_a, lora_b, 2)
    check_mask_words(mask_words, lora_b.shape[0], lora_a.shape[1])
    check_same_device(lora_a=lora_a, lora_b=lora_b, mask=mask_words)
    if count < 0:
        raise ValueError(f"count must be the number of set bits, got {count}")


def _check_masked_factor_gradients(
    weight_gradient: Tensor, lora_a: Tensor, lora_b: Tensor, mask_words: Tensor, scale: Tensor
) -> None:
    _check_factors(lora_a, lora_b, 2)
    if tuple(weight_gradient.shape) != (lora_b.shape[0], lora_a.shape[1]):
        raise ValueError(
            f"weight_gradient {_shape(weight_gradient)} must be [{lora_b.shape[0]}, {lora_a.shape[1]}], like B A"
        )
    _check_floats(weight_gradient=weight_gradient)
    check_mask_words(mask_words, *weight_gradient.shape)
    _check_scale(scale, mask_words)


def _setup_effective_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, lora_a, lora_b, mask_words, scale = inputs
    ctx.save_for_backward(lora_a, lora_b, mask_words, scale)


def _backward_effective_weight(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad_a = grad_b = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        with without_autocast(grad_output):
            grad_a, grad_b = torch.ops.fade_kernels.masked_factor_gradients(grad_output, *ctx.saved_tensors)
    return grad_output if ctx.needs_input_grad[0] else None, grad_a, grad_b, None, None


def _setup_masked_factor_values(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    lora_a, lora_b, mask_words, _ = inputs
    ctx.save_for_backward(lora_a, lora_b, mask_words)


def _backward_masked_factor_values(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    lora_a, lora_b, mask_words = ctx.saved_tensors
    with without_autocast(grad_output):
        dense = grad_output.new_zeros((lora_b.shape[0], lora_a.shape[1]))
        one = torch.ones((), dtype=grad_output.dtype)
        torch.ops.fade_kernels.scatter_masked_(dense, grad_output, mask_words)
        grads = torch.ops.fade_kernels.masked_factor_gradients(dense, lora_a, lora_b, mask_words, one)
    return *grads, None, None


masked_factor_gradients = _define(
    "masked_factor_gradients(Tensor weight_gradient, Tensor lora_a, Tensor lora_b, Tensor mask_words, Tensor scale) "
    "-> (Tensor, Tensor)",
    check=_check_masked_factor_gradients,
    fake=lambda weight_gradient, lora_a, lora_b, mask_words, scale: (
        lora_a.new_empty(lora_a.shape),
        lora_b.new_empty(lora_b.shape),
    ),
    default=reference.masked_factor_gradients,
)

effective_weight = _define(
    "effective_weight(Tensor weight, Tensor lora_a, Tensor lora_b, Tensor mask_words, Tensor scale) -> Tensor",
    check=_check_effective_weight,
    fake=lambda weight, *_: weight.new_empty(weight.shape),
    default=reference.effective_weight,
    setup_context=_setup_effective_weight,
    backward=_backward_effective_weight,
)

effective_weight_out = _define(
    "effective_weight_out(Tensor(a!) out, Tensor? weight, Tensor lora_a, Tensor lora_b, Tensor mask_words, "
    "Tensor scale) -> ()",
    check=_check_effective_weight_out,
    fake=_no_output,
    default=reference.effective_weight_out,
)

effective_weights_out = _define(
    "effective_weights_out(Tensor(a!)[] out, Tensor[] weight, Tensor[] lora_a, Tensor[] lora_b, Tensor[] mask_words, "
    "Tensor[] scale, bool stochastic, int seed) -> ()",
    check=_check_effective_weights_out,
    fake=_no_output,
    default=reference.effective_weights_out,
)

effective_weight_from_values_out = _define(
    "effective_weight_from_values_out(Tensor(a!) out, Tensor? weight, Tensor values, Tensor mask_words, "
    "Tensor scale) -> ()",
    check=_check_effective_weight_from_values_out,
    fake=_no_output,
    default=reference.effective_weight_from_values_out,
)

masked_factor_values = _define(
    "masked_factor_values(Tensor lora_a, Tensor lora_b, Tensor mask_words, int count) -> Tensor",
    check=_check_masked_factor_values,
    fake=lambda lora_a, lora_b, mask_words, count: lora_a.new_empty(
        (count,), dtype=torch.float64 if lora_a.dtype == torch.float64 else torch.float32
    ),
    default=reference.masked_factor_values,
    setup_context=_setup_masked_factor_values,
    backward=_backward_masked_factor_values,
)


# --- masked LoRA and masked values, convolution: forward, input gradient, adapter gradients --------------------------


def _conv2d_size(
    x_size: tuple[int, ...], kernel_size: tuple[int, ...], stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    """Height and width of a convolution's output."""
    return [
        (x_size[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]


def _check_window(
    x_size: tuple[int, ...], kernel_size: tuple[int, ...], stride: list[int], padding: list[int], dilation: list[int]
) -> None:
    for name, pair in (("kernel_size", kernel_size), ("stride", stride), ("padding", padding), ("dilation", dilation)):
        if len(pair) != 2 or min(pair) < (0 if name == "padding" else 1):
            raise ValueError(f"{name} must be two positive integers (height, width), not {list(pair)}")
    if min(_conv2d_size(x_size, kernel_size, stride, padding, dilation)) < 1:
        raise ValueError(f"an image of {x_size[2]} x {x_size[3]} is smaller than the kernel {list(kernel_size)}")


def _check_masked_lora_conv2d(
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
) -> None:
    _check_factors(lora_a, lora_b, 4)
    _check_images("x", x, lora_a.shape[1])
    _check_weight(weight, bias, (lora_b.shape[0], *lora_a.shape[1:]))
    _check_same_dtype(x=x, weight=weight, bias=bias)
    check_mask_words(mask_words, lora_b.shape[0], _flat_columns(lora_a.shape))
    _check_scale(scale, mask_words)
    _check_window(x.shape, lora_a.shape[2:], stride, padding, dilation)
    check_same_device(x=x, weight=weight, bias=bias, lora_a=lora_a, lora_b=lora_b, mask=mask_words)


def _check_masked_lora_conv2d_input_gradient(
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
) -> None:
    _check_factors(lora_a, lora_b, 4)
    _check_images("grad_output", grad_output, lora_b.shape[0])
    _check_weight(weight, None, (lora_b.shape[0], *lora_a.shape[1:]))
    _check_same_dtype(grad_output=grad_output, weight=weight)
    check_mask_words(mask_words, lora_b.shape[0], _flat_columns(lora_a.shape))
    _check_scale(scale, mask_words)
    _check_window(tuple(input_size), lora_a.shape[2:], stride, padding, dilation)


def _check_masked_lora_conv2d_factor_gradients(
    grad_output: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    _check_factors(lora_a, lora_b, 4)
    _check_images("x", x, lora_a.shape[1])
    _check_images("grad_output", grad_output, lora_b.shape[0])
    _check_same_dtype(grad_output=grad_output, x=x)
    check_mask_words(mask_words, lora_b.shape[0], _flat_columns(lora_a.shape))
    _check_scale(scale, mask_words)
    _check_window(x.shape, lora_a.shape[2:], stride, padding, dilation)


def _check_masked_values_conv2d(
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
) -> None:
    _check_values(values)
    if x.dim() != 4:
        raise ValueError(f"x {_shape(x)} must be [n, C_in, height, width]")
    _check_floats(x=x)
    _check_window(x.shape, tuple(kernel_size), stride, padding, dilation)
    shape = (mask_words.shape[0], x.shape[1], *kernel_size)
    _check_weight(weight, bias, shape)
    _check_same_dtype(x=x, weight=weight, bias=bias)
    check_mask_words(mask_words, shape[0], _flat_columns(shape))
    _check_scale(scale, mask_words)
    check_same_device(x=x, weight=weight, bias=bias, values=values, mask=mask_words)


def _check_masked_values_conv2d_input_gradient(
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
) -> None:
    _check_values(values)
    _check_images("grad_output", grad_output, mask_words.shape[0])
    _check_window(tuple(input_size), tuple(kernel_size), stride, padding, dilation)
    shape = (mask_words.shape[0], input_size[1], *kernel_size)
    _check_weight(weight, None, shape)
    _check_same_dtype(grad_output=grad_output, weight=weight)
    check_mask_words(mask_words, shape[0], _flat_columns(shape))
    _check_scale(scale, mask_words)


def _check_masked_values_conv2d_gradient(
    grad_output: Tensor,
    x: Tensor,
    values: Tensor,
    mask_words: Tensor,
    scale: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> None:
    _check_masked_values_conv2d(x, None, None, values, mask_words, scale, kernel_size, stride, padding, dilation)
    _check_images("grad_output", grad_output, mask_words.shape[0])
    _check_same_dtype(grad_output=grad_output, x=x)


def _setup_masked_lora_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, lora_a, lora_b, mask_words, scale, stride, padding, dilation = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, mask_words, scale)
    ctx.window = (stride, padding, dilation)


def _setup_masked_values_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, values, mask_words, scale, kernel_size, stride, padding, dilation = inputs
    ctx.save_for_backward(x, weight, values, mask_words, scale)
    ctx.window = (kernel_size, stride, padding, dilation)


def _backward_frozen_conv2d(
    ctx: Any, grad_output: Tensor, x: Tensor, weight: Tensor | None, window: tuple[list[int], ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias (arguments 1 and 2), for callers that did not freeze them."""
    grad_weight = None
    if ctx.needs_input_grad[1]:
        grad_weight = torch.nn.grad.conv2d_weight(x, weight.shape, grad_output, *window)
    return grad_weight, grad_output.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[2] else None


def _backward_masked_lora_conv2d(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b, mask_words, scale = ctx.saved_tensors
    delta = (lora_a, lora_b, mask_words, scale)
    grad_x = grad_a = grad_b = None
    with without_autocast(grad_output):
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.fade_kernels.masked_lora_conv2d_input_gradient(
                grad_output, weight, *delta, x.shape, *ctx.window
            )
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            grad_a, grad_b = torch.ops.fade_kernels.masked_lora_conv2d_factor_gradients(
                grad_output, x, *delta, *ctx.window
            )
        grad_weight, grad_bias = _backward_frozen_conv2d(ctx, grad_output, x, weight, ctx.window)
    return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None, None, None, None


def _backward_masked_values_conv2d(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, values, mask_words, scale = ctx.saved_tensors
    delta = (values, mask_words, scale)
    grad_x = grad_values = None
    with without_autocast(grad_output):
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.fade_kernels.masked_values_conv2d_input_gradient(
                grad_output, weight, *delta, x.shape, *ctx.window
            )
        if ctx.needs_input_grad[3]:
            grad_values = torch.ops.fade_kernels.masked_values_conv2d_gradient(grad_output, x, *delta, *ctx.window)
        grad_weight, grad_bias = _backward_frozen_conv2d(ctx, grad_output, x, weight, ctx.window[1:])
    return grad_x, grad_weight, grad_bias, grad_values, None, None, None, None, None, None


def _new_images(like: Tensor, size: Sequence[int]) -> Tensor:
    """Empty images in the memory layout of `like`."""
    layout = reference.image_layout(like)
    return torch.empty(tuple(size), dtype=like.dtype, device=like.device, memory_format=layout)


_define(
    "masked_lora_conv2d_input_gradient(Tensor grad_output, Tensor? weight, Tensor lora_a, Tensor lora_b, "
    "Tensor mask_words, Tensor scale, SymInt[] input_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation) "
    "-> Tensor",
    check=_check_masked_lora_conv2d_input_gradient,
    fake=lambda grad_output, weight, lora_a, lora_b, words, scale, input_size, *_: _new_images(grad_output, input_size),
    default=reference.masked_lora_conv2d_input_gradient,
)

_define(
    "masked_lora_conv2d_factor_gradients(Tensor grad_output, Tensor x, Tensor lora_a, Tensor lora_b, "
    "Tensor mask_words, Tensor scale, SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> (Tensor, Tensor)",
    check=_check_masked_lora_conv2d_factor_gradients,
    fake=lambda grad_output, x, lora_a, lora_b, *_: (
        lora_a.new_empty(lora_a.shape),
        lora_b.new_empty(lora_b.shape),
    ),
    default=reference.masked_lora_conv2d_factor_gradients,
)

masked_lora_conv2d = _define(
    "masked_lora_conv2d(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor mask_words, "
    "Tensor scale, SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> Tensor",
    check=_check_masked_lora_conv2d,
    fake=lambda x, weight, bias, lora_a, lora_b, mask_words, scale, *window: _new_images(
        x, (x.shape[0], lora_b.shape[0], *_conv2d_size(x.shape, lora_a.shape[2:], *window))
    ),
    default=reference.masked_lora_conv2d,
    setup_context=_setup_masked_lora_conv2d,
    backward=_backward_masked_lora_conv2d,
)

_define(
    "masked_values_conv2d_input_gradient(Tensor grad_output, Tensor? weight, Tensor values, Tensor mask_words, "
    "Tensor scale, SymInt[] input_size, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation) "
    "-> Tensor",
    check=_check_masked_values_conv2d_input_gradient,
    fake=lambda grad_output, weight, values, words, scale, input_size, *_: _new_images(grad_output, input_size),
    default=reference.masked_values_conv2d_input_gradient,
)

_define(
    "masked_values_conv2d_gradient(Tensor grad_output, Tensor x, Tensor values, Tensor mask_words, Tensor scale, "
    "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> Tensor",
    check=_check_masked_values_conv2d_gradient,
    fake=lambda grad_output, x, values, *_: values.new_empty(values.shape),
    default=reference.masked_values_conv2d_gradient,
)

masked_values_conv2d = _define(
    "masked_values_conv2d(Tensor x, Tensor? weight, Tensor? bias, Tensor values, Tensor mask_words, Tensor scale, "
    "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation) -> Tensor",
    check=_check_masked_values_conv2d,
    fake=lambda x, weight, bias, values, mask_words, scale, kernel_size, *window: _new_images(
        x, (x.shape[0], mask_words.shape[0], *_conv2d_size(x.shape, kernel_size, *window))
    ),
    default=reference.masked_values_conv2d,
    setup_context=_setup_masked_values_conv2d,
    backward=_backward_masked_values_conv2d,
)
