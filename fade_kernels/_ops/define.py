"""How an operator of `fade_kernels::` is defined, and the checks that several of them share."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fade_kernels._ops.errors import cause_of
from fade_kernels.window import Window

# The library object owns the definitions: they live as long as this module.
_LIBRARY = torch.library.Library("fade_kernels", "DEF")


def _pack_window(operator: Any) -> Callable[[tuple[Any, ...]], tuple[Any, ...]] | None:
    """What makes one `Window` of an operator's stride, padding and dilation, which a schema spells out; or None."""
    names = [argument.name for argument in operator._schema.arguments]
    if "stride" not in names:
        return None
    at = names.index("stride")
    return lambda arguments: (*arguments[:at], Window(*arguments[at : at + 3]), *arguments[at + 3 :])


def _with_window(function: Callable[..., Any], operator: Any) -> Callable[..., Any]:
    """`function`, which takes a `Window`, as a kernel of the operator, which has stride, padding and dilation."""
    pack = _pack_window(operator)
    return function if pack is None else functools.wraps(function)(lambda *arguments: function(*pack(arguments)))


_MOST_SIGNATURES = 1024
"""Checked signatures that an operator remembers; a program that meets more checks all of them again now and then."""

_Signature = tuple[Any, ...]


def _signature(arguments: tuple[Any, ...], changing: int | None) -> _Signature:
    """All that a check may look at: types, shapes, dtypes, devices, what needs a gradient, and what is no tensor.

    `changing`: the position of a number that is another at every call and of which only the sign matters.
    """
    parts: list[Any] = []
    if changing is not None and changing < len(arguments):
        number = arguments[changing]
        sign = number if number is None else number >= 0
        arguments = (*arguments[:changing], sign, *arguments[changing + 1 :])
    for a in arguments:
        if isinstance(a, Tensor):
            parts += (a.__class__, a.shape, a.dtype, a.device, a.requires_grad)
        else:
            parts.append(tuple(a) if isinstance(a, list) else a)
    return tuple(parts)


# Looked up once: chains of attributes cost more than these calls.
_transforms, _tracing = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
_modes, _profiled = torch._C._len_torch_dispatch_stack, torch.autograd._profiler_enabled
_grad_enabled, _compiling = torch.is_grad_enabled, torch.compiler.is_compiling


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    return all(type(a) in (Tensor, torch.nn.Parameter) for a in arguments if isinstance(a, Tensor))


def _something_watches() -> bool:
    """Whether a transform or a tracer must see the operator itself: functorch, forward mode, torch.jit.trace."""
    return forward_ad._current_level >= 0 or _transforms() or _tracing() is not None


_composed: dict[str, dict[str, Callable[..., Any]]] = {}
"""Kernels written in Python, by operator and device type (`implement`)."""


def below_autograd(name: str) -> Callable[..., Any]:
    """What calls an operator where autograd has done its part.

    A kernel that is a composition in Python is called itself: the way through the dispatcher and back costs as much as
    three small tensors. Not where something must see the operator: autograd, a tracer, a dispatch mode, a profiler.
    """
    operator = getattr(torch.ops.fade_kernels, name).default
    composed = _composed.setdefault(name, {})

    def call(*args: Any) -> Any:
        kernel = composed.get(args[0].device.type) if composed else None
        if kernel is None or _grad_enabled() or _compiling() or _modes() or _profiled() or _something_watches():
            return operator(*args)
        return kernel(*args)

    return call


class _Below:
    """The operators as formulas for backward call them: `below.NAME` is `below_autograd(NAME)`."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        made = below_autograd(name)
        setattr(self, name, made)
        return made


below = _Below()


def _raise_version(operator: Any, written: list[int]) -> None:
    """Autograd and everything else that asks a tensor's version is told of what the operator writes."""

    def kernel(keyset: Any, *args: Any) -> None:
        for position in written:
            torch.autograd.graph.increment_version(args[position])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    _LIBRARY.impl(operator._opname, kernel, "ADInplaceOrView", with_keyset=True)


def _hold_integers(ctx: Any) -> None:
    """Of what a formula saves for backward, integers are kept as they are, out of reach of hooks on saved tensors.

    These give back other memory, as offloading does, and all that is known of a mask is kept with its memory.
    """
    saved = ctx.to_save or ()
    ctx.held = tuple(None if t is None or t.is_floating_point() else t for t in saved)
    ctx.save_for_backward(*(t if held is None else None for t, held in zip(saved, ctx.held, strict=True)))


class _Unpacked:
    """A node's context with the saved tensors in hand: a hook that recomputes them, as checkpointing does, needs the
    autograd that the formula runs below."""

    __slots__ = ("_ctx", "needs_input_grad", "saved_tensors")

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.needs_input_grad = ctx, ctx.needs_input_grad
        saved = zip(ctx.saved_tensors, ctx.held, strict=True)
        self.saved_tensors = tuple(t if held is None else held for t, held in saved)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _node(
    operator: Any, kernel: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """What applies the operator, by `below_autograd`'s kernel, as one node of autograd's graph."""

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = kernel(*args)
            setup_context(ctx, args, output)
            _hold_integers(ctx)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            unpacked = _Unpacked(ctx)
            if torch.is_grad_enabled():  # create_graph: the formula itself is differentiated
                return backward(unpacked, *grads)
            with torch._C._AutoDispatchBelowAutograd():
                try:
                    return backward(unpacked, *grads)
                except RuntimeError as error:
                    cause = cause_of(error, operator._opname, grads)
                    if cause is None:
                        raise
                    raise cause from error

    Node._backward_cls.__name__ = f"{operator._opname}Backward"
    # Past Function.apply, which costs as much again as the node.
    return super(torch.autograd.Function, Node).apply


def _autograd(operator: Any, default: Callable[..., Any], node: Callable[..., Any] | None) -> Callable[..., Any]:
    """The operator's kernel for autograd.

    Derivatives without a formula (forward mode, functorch, those of the operators that compute gradients) are those of
    the definition, which is plain PyTorch and runs in the operator's place.
    """

    defaults = [parameter.default_value for parameter in operator._schema.arguments]

    def kernel(keyset: Any, *args: Any) -> Any:
        args = (*args, *defaults[len(args) :])  # the dispatcher leaves out what is its parameter's default
        differentiated = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if forward_ad._current_level >= 0:
            return default(*args)
        if differentiated:
            return default(*args) if node is None or torch._C._are_functorch_transforms_active() else node(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


def define(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    default: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines one operator and returns the function that checks its arguments and calls it.

    Where the schema has stride, padding and dilation, all functions given here take one `Window` in their place.

    The function checks once for each signature of its arguments: `check` may look at shapes, dtypes, devices and
    numbers, not at elements or memory. In eager mode a call is one node of autograd's graph, made without a trip
    through the dispatcher; functorch, forward mode, torch.compile and whoever calls the operator itself meet the same
    formula there. What is written into raises its version.

    Args:
        schema: `name(arguments) -> returns` in torch.library's schema language.
        check: takes the operator's arguments; raises ValueError or TypeError that says what to do.
        fake: shapes and dtypes of the outputs, for tracing.
        default: the definition in plain PyTorch, used on every device that has no kernel of its own, and in place of
            any kernel where a derivative is asked for that has no formula.
        setup_context, backward: autograd's formula, as for torch.library.register_autograd.
    """
    name = schema.split("(", 1)[0]
    qualified = f"fade_kernels::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    operator = getattr(torch.ops.fade_kernels, name).default
    parameters = operator._schema.arguments
    pack = _pack_window(operator)
    check, fake, default = (_with_window(function, operator) for function in (check, fake, default))

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    torch.library.register_fake(qualified, checked_fake, lib=_LIBRARY)
    _LIBRARY.impl(name, default, "CompositeExplicitAutograd")
    written = [i for i, p in enumerate(parameters) if p.alias_info is not None and p.alias_info.is_write]
    node, kernel = None, below_autograd(name)
    if written:
        _raise_version(operator, written)
    else:
        if backward is not None:
            setup = setup_context
            if pack is not None:
                setup = lambda ctx, inputs, output: setup_context(ctx, pack(inputs), output)  # noqa: E731
            node = _node(operator, kernel, setup, backward)
        _LIBRARY.impl(name, _autograd(operator, default, node), "Autograd", with_keyset=True)

    # None: always check, because the tensors of lists have a signature as long as the check.
    lists = any(isinstance(p.type, torch.ListType) and "Tensor" in str(p.type) for p in parameters)
    checked: dict[_Signature, tuple[bool, bool]] | None = None if lists else {}
    changing = next((i for i, p in enumerate(parameters) if p.name == "seed"), None)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            check(*args)
            return operator(*args)
        plain = needs_gradient = False
        if checked is None:
            check(*args)
        else:
            signature = _signature(args, changing)
            try:
                plain, needs_gradient = checked[signature]
            except (KeyError, TypeError):  # TypeError: sizes that are symbols
                check(*args)
                plain = _is_plain(args)
                needs_gradient = any(isinstance(a, Tensor) and a.requires_grad for a in args)
                if plain:
                    if len(checked) >= _MOST_SIGNATURES:
                        checked.clear()
                    checked[signature] = plain, needs_gradient
        try:
            if not plain or written or _something_watches():
                return operator(*args)
            if needs_gradient and torch.is_grad_enabled():
                return operator(*args) if node is None else node(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return kernel(*args)
        except RuntimeError as error:
            cause = cause_of(error, name, args)
            if cause is None:
                raise
            raise cause from error

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"Checks its arguments and calls torch.ops.{qualified.replace('::', '.')}: `{schema}`."
    return call


def implement(name: str, kernel: Callable[..., Any], device: str) -> None:
    """Registers a kernel written in Python for one device type, where a composition of operators is the kernel.

    Like the functions of `define`, it takes a `Window` where the operator has stride, padding and dilation.
    """
    kernel = _with_window(kernel, getattr(torch.ops.fade_kernels, name).default)
    _LIBRARY.impl(name, kernel, device)
    _composed.setdefault(name, {})[device.lower()] = kernel


def no_output(*_: Any) -> None:
    """Fake of an operator that only writes into its arguments."""


# --- checks shared by several operators ------------------------------------------------------------------------------


def shape_of(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def words_per_row(columns: int) -> int:
    """Number of 32-bit words that hold a row of `columns` mask bits."""
    return (columns + 31) // 32


def check_mask_words(words: Tensor, rows: int | None = None, columns: int | None = None) -> None:
    """Raises unless `words` is int32 [rows, ceil(columns/32)]; None leaves a size open."""
    if words.dtype != torch.int32:
        raise TypeError(f"mask words must be int32, not {words.dtype}: use BitMask.pack to make them")
    if words.dim() != 2:
        raise ValueError(f"mask words must have two dimensions [N, ceil(K/32)], not {shape_of(words)}")
    if rows is not None and words.shape[0] != rows:
        raise ValueError(f"the mask has {words.shape[0]} rows, the weight {rows}")
    if columns is not None and words.shape[1] != words_per_row(columns):
        raise ValueError(
            f"mask words {shape_of(words)} do not fit {columns} columns, which need {words_per_row(columns)} words "
            "a row"
        )


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all given tensors are on one device."""
    present = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(present.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in present.items())
        raise ValueError(f"all tensors must be on one device, got {where}: move them with .to(device)")


_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_floats(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, not {tensor.dtype}")


def check_same_dtype(**tensors: Tensor | None) -> None:
    present = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len(set(present.values())) > 1:
        raise TypeError(f"dtypes must agree, got {', '.join(f'{name} {dtype}' for name, dtype in present.items())}")


def check_scale(scale: Tensor, like: Tensor) -> None:
    """Raises unless the scale is 0-d, floating-point, and on the host or on the device of `like`."""
    if scale.dim() != 0 or not scale.is_floating_point():
        raise ValueError(f"scale must be a number or a 0-d floating-point tensor, not {scale.dtype} {shape_of(scale)}")
    if scale.requires_grad:
        raise ValueError("scale must not require a gradient: masked LoRA is not differentiable in it")
    if scale.device.type != "cpu" and scale.device != like.device:
        raise ValueError(f"scale is on {scale.device}, the other tensors on {like.device}: pass a number, or move it")


def check_factors(lora_a: Tensor, lora_b: Tensor, dims: int) -> None:
    for name, factor, layout in (
        ("lora_a", lora_a, "[r, K]" if dims == 2 else "[r, C_in, kh, kw]"),
        ("lora_b", lora_b, "[N, r]" if dims == 2 else "[C_out, r, 1, 1]"),
    ):
        if factor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions {layout}, not {shape_of(factor)}")
    if lora_a.shape[0] < 1:
        raise ValueError("lora_a has rank 0: the rank must be at least 1")
    if lora_b.shape[1] != lora_a.shape[0] or (dims == 4 and tuple(lora_b.shape[2:]) != (1, 1)):
        raise ValueError(f"lora_b {shape_of(lora_b)} does not fit lora_a {shape_of(lora_a)}: the ranks must agree")
    check_floats(lora_a=lora_a, lora_b=lora_b)


def check_values(values: Tensor) -> None:
    if values.dim() != 1:
        raise ValueError(f"values must be one-dimensional [nnz], not {shape_of(values)}")
    check_floats(values=values)


def check_rows(name: str, rows: Tensor, columns: int) -> None:
    if rows.dim() < 1 or rows.shape[-1] != columns:
        raise ValueError(f"{name} {shape_of(rows)} must end in {columns} features")
    check_floats(**{name: rows})


def check_weight(weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> None:
    if weight is not None and tuple(weight.shape) != shape:
        raise ValueError(f"weight {shape_of(weight)} does not fit the adapter, which is for {list(shape)}")
    if bias is not None and tuple(bias.shape) != shape[:1]:
        raise ValueError(f"bias {shape_of(bias)} must be [{shape[0]}]")


def check_one_product(like: Tensor, shape: tuple[int, ...], seed: int | None, rounded: Tensor | None) -> None:
    """Raises unless seed and rounded weight fit a layer: its weight's shape, the dtype of its rows or images."""
    if seed is not None:
        if rounded is not None:
            raise ValueError("give rounding_seed or rounded_weight, not both: a rounded weight has been rounded")
        if seed < 0:
            raise ValueError(f"rounding_seed must not be negative, got {seed}")
    if rounded is None:
        return
    if tuple(rounded.shape) != shape:
        raise ValueError(f"rounded_weight {shape_of(rounded)} does not fit the adapter, which is for {list(shape)}")
    if rounded.dtype != like.dtype:
        raise TypeError(f"rounded_weight is {rounded.dtype}, the activations {like.dtype}: round the weight to theirs")
    if rounded.requires_grad:
        raise ValueError("rounded_weight must not require a gradient: the adapter's gradients come from its factors")
    check_same_device(input=like, rounded_weight=rounded)


def check_images(name: str, images: Tensor, channels: int) -> None:
    if images.dim() != 4 or images.shape[1] != channels:
        raise ValueError(f"{name} {shape_of(images)} must be [n, {channels}, height, width]")
    check_floats(**{name: images})


def flat_columns(shape: tuple[int, ...] | torch.Size) -> int:
    columns = 1
    for size in shape[1:]:
        columns *= size
    return columns


_NO_CONTEXT = nullcontext()


def without_autocast(tensor: Tensor) -> Any:
    """Backward may run under autocast, which must not cast what the operators do inside."""
    device = tensor.device.type
    if tensor.is_meta or not torch.is_autocast_enabled(device):  # the meta device knows no autocast
        return _NO_CONTEXT
    return torch.autocast(device, enabled=False)
