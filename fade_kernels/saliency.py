"""Gradient-magnitude saliency, streamed: as a weight's gradient appears it is folded into its accumulator and freed.

Apart from selection because this is the stage that runs the network. `GradientMagnitude` watches layers during ordinary
backward passes; the two functions below it are the operators it uses, for callers that have gradients of their own.
Source: FADE's locating stage, S = sum over batches of |gradient|; signed and squared sums serve SalUn and Fisher
methods.
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from fade_kernels import _ops
from fade_kernels.overlap import find_shared
from fade_kernels.weight_shape import weight_shape

Mode = Literal["abs", "signed", "square"]
Region = tuple[slice, slice]


def accumulate_gradient_magnitude_(saliency: Sequence[Tensor], gradient: Sequence[Tensor], mode: Mode = "abs") -> None:
    """Folds gradients into their accumulators, many tensors in one call: S += |g|, g or g^2, in place.

    Args:
        saliency: float32 accumulators that share no memory.
        gradient: one for each, of the same shape: float32, float64, float16 or bfloat16, contiguous or not.
        mode: "abs" (FADE), "signed" (take the magnitude of the sum at the end: SalUn) or "square" (Fisher information).

    Raises:
        TypeError: an accumulator is not float32, or a gradient is not floating point.
        ValueError: lists or shapes differ, an accumulator shares memory with another or with a gradient, unknown mode,
            different devices.
    """
    shared = find_shared(saliency, gradient)
    if shared is not None:
        names = [f"saliency[{i}]" if i < len(saliency) else f"gradient[{i - len(saliency)}]" for i in shared]
        raise ValueError(f"{names[0]} and {names[1]} share memory: an accumulator may appear only once in a call")
    _ops.accumulate_gradient_magnitude_([s.detach() for s in saliency], [g.detach() for g in gradient], mode)


def accumulate_linear_gradient_magnitude_(
    saliency: Tensor, grad_output: Tensor, input: Tensor, mode: Mode = "abs", per_sample: bool = False
) -> None:
    """Folds a linear layer's weight gradient dY^T X into its accumulator without ever holding it as a whole, in place.

    S += |dY^T X|, the contraction over all leading dimensions; with `per_sample`, S += sum over i of |dY_i^T X_i|, the
    contraction over all leading dimensions but the first, at the same number of operations. By the triangle inequality
    the second is never smaller. Products are accumulated in fp32. On the CPU at most 2 MiB (or 32 rows) of gradient
    exist at a time.

    Args:
        saliency: float32 [N, K].
        grad_output: dY, [..., N], float32, float64, float16 or bfloat16, contiguous or not.
        input: X, [..., K], the same leading dimensions; its dtype may differ (autocast). No tokens add nothing.
        mode: "abs", "signed" or "square", applied to the gradient (of each sample, with `per_sample`).
        per_sample: dimension 0 is the sample.

    Raises:
        TypeError: the accumulator is not float32, or a dtype is not floating point.
        ValueError: shapes do not fit, unknown mode, different devices, per_sample without a leading dimension.
    """
    with _ops.without_autocast(saliency):
        _ops.accumulate_linear_gradient_magnitude_(
            saliency.detach(), grad_output.detach(), input.detach(), mode, per_sample
        )


class _Call:
    """One forward call of a layer that waits for its gradient. Its autograd node owns it: a graph that is thrown away
    takes its calls with it."""

    __slots__ = ("__weakref__",)


class _Layer:
    """A watched layer: its accumulator, calls that wait for their gradient, and gradients that wait for other calls."""

    def __init__(self, name: str, module: nn.Linear | nn.Conv2d, region: Region | None, on_host: bool) -> None:
        self.name = name
        self.module = module
        self.region = region
        shape = weight_shape(module)  # a quantised weight's tensor has another
        if region is not None:
            matrix = (shape[0], math.prod(shape[1:]))
            shape = tuple(len(range(size)[part]) for size, part in zip(matrix, region, strict=True))
        device = "cpu" if on_host else module.weight.device
        self.saliency = torch.zeros(shape, dtype=torch.float32, device=device)
        self.buffer: Tensor | None = None  # where an accumulator on the host comes to be added to
        self.waiting: weakref.WeakSet[_Call] = weakref.WeakSet()
        self.arrived: list[tuple[Tensor, Tensor]] = []  # (gradient of the output, input)

    def fold(self, mode: Mode, per_sample: bool) -> None:
        """Folds |sum over calls| into the accumulator; the gradient itself is gone when this returns."""
        calls, self.arrived = self.arrived, []
        if not self.saliency.numel():
            return  # an empty region: nothing of the layer counts
        fold = self._fold_linear if isinstance(self.module, nn.Linear) else self._fold_conv2d
        if self.buffer is None:
            fold(self.saliency, calls, mode, per_sample)
        else:
            # There and back, and not only the gradient there: the sums are then those of an accumulator on the device.
            fold(self.buffer.copy_(self.saliency), calls, mode, per_sample)
            self.saliency.copy_(self.buffer)

    def _fold_linear(self, saliency: Tensor, calls: list[tuple[Tensor, Tensor]], mode: Mode, per_sample: bool) -> None:
        if len(calls) == 1:
            grad_output, input = calls[0]
        else:
            # The sum over calls is a longer contraction: tokens are joined, not gradients added.
            samples = self._samples(calls) if per_sample else 1
            grad_output = torch.cat([dy.reshape(samples, -1, dy.shape[-1]) for dy, _ in calls], dim=1)
            input = torch.cat([x.reshape(samples, -1, x.shape[-1]) for _, x in calls], dim=1)
        if self.region is not None:
            rows, columns = self.region
            grad_output, input = grad_output[..., rows], input[..., columns]
        accumulate_linear_gradient_magnitude_(saliency, grad_output, input, mode, per_sample)

    def _fold_conv2d(self, saliency: Tensor, calls: list[tuple[Tensor, Tensor]], mode: Mode, per_sample: bool) -> None:
        calls = [(dy, x) if x.dim() == 4 else (dy[None], x[None]) for dy, x in calls]
        samples = self._samples(calls) if per_sample else 1
        # Calls of one size are joined along the batch, so that their sum needs no second gradient.
        sizes: dict[tuple[torch.Size, torch.Size], list[tuple[Tensor, Tensor]]] = {}
        for dy, x in calls:
            sizes.setdefault((dy.shape[1:], x.shape[1:]), []).append((dy, x))
        for i in range(samples):
            batch = slice(i, i + 1) if per_sample else slice(None)
            gradient = None
            for group in sizes.values():
                dy, x = (
                    torch.cat([tensor[batch] for tensor in tensors]) if len(tensors) > 1 else tensors[0][batch]
                    for tensors in zip(*group, strict=True)
                )
                part = self._conv2d_weight_gradient(dy, x)
                gradient = part if gradient is None else gradient.add_(part)
                del part
            gradient = gradient if self.region is None else gradient.flatten(1)[self.region]
            accumulate_gradient_magnitude_([saliency], [gradient], mode)

    def _conv2d_weight_gradient(self, grad_output: Tensor, input: Tensor) -> Tensor:
        conv, padding = self.module, self.module.padding
        if isinstance(padding, str) or conv.padding_mode != "zeros":
            # 'same' may pad one side more, and the other modes pad with values: pad first, as the module itself does.
            pad_mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            input = nn.functional.pad(input, conv._reversed_padding_repeated_twice, mode=pad_mode)
            padding = (0, 0)
        return torch.ops.aten.convolution_backward(
            grad_output,
            input,
            conv.weight.detach().to(grad_output.dtype),
            None,
            conv.stride,
            padding,
            conv.dilation,
            False,
            (0, 0),
            conv.groups,
            (False, True, False),
        )[1]

    def _samples(self, calls: list[tuple[Tensor, Tensor]]) -> int:
        sizes = {x.shape[0] for _, x in calls}
        if len(sizes) > 1:
            raise ValueError(
                f"per_sample needs the same number of samples in every call of layer {self.name!r} within one backward "
                f"pass, got {sorted(sizes)}"
            )
        return sizes.pop()


class _Watch(torch.autograd.Function):
    """The identity on a layer's output, made inside the layer's call, which keeps the layer's input as autograd keeps
    what it needs: whoever changes that (checkpointing, which computes it anew; saved-tensor hooks, which move it) has
    this input, too.

    The anchor, which requires a gradient, gives outputs that nothing upstream made differentiable a place in the graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        output: Tensor,
        input: Tensor,
        watch: "GradientMagnitude",
        layer: _Layer,
        call: _Call,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.watch, ctx.layer, ctx.call = watch, layer, call
        # Autograd saves no tensor of inference mode; nothing can have been computed of one that needs a gradient.
        ctx.inference_input = input if input.is_inference() else None
        if ctx.inference_input is None:
            ctx.save_for_backward(input)
        return output.detach()  # the same memory, which may be written to in place as the layer's own output may

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_output is not None and ctx.watch._active:
            ctx.watch._gradient_arrived(ctx.layer, ctx.call, grad_output, _saved_input(ctx))
        return None, grad_output, None, None, None, None


def _saved_input(ctx: Any) -> Tensor:
    if ctx.inference_input is not None:
        return ctx.inference_input
    try:
        (input,) = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"the input of layer {ctx.layer.name!r} was changed in place after the layer used it, so its weight "
            "gradient cannot be computed: make that operation out of place"
        ) from error
    return input


class GradientMagnitude:
    """Accumulates the gradient magnitude of frozen layers' weights over ordinary backward passes.

        with GradientMagnitude({"to_q": unet_layer, ...}) as watch:
            for batch in batches:
                loss(batch).backward()
        masks = select_top_fraction(list(watch.saliency.values()), keep=0.01).masks

    As soon as a layer's output gradient dY is there, its weight gradient is formed from dY and the layer's input,
    folded into the accumulator and freed, so that at most one layer's weight gradient exists at any time. Weights need
    not require a gradient (while active, the watched ones do not) and their `.grad` stays None. Where nothing upstream
    of a layer requires a gradient, backward ends at that layer.

    What is summed is the magnitude per backward pass: sum over batches b of |sum over samples i of g_i|. With
    `per_sample` it is the sum over samples of |g_i|, where g_i is the gradient of sample i's share of the loss (for a
    mean loss that share is 1 / batch size). A layer called several times before one backward pass counts once, with
    the magnitude of the summed gradient, as `.grad` would hold it. Calls under no_grad or inference_mode count nothing.

    A layer's input is kept as autograd keeps what it saves: under gradient checkpointing it is computed anew, and
    saved-tensor hooks have it, too. A checkpointed forward pass and its backward pass must both be inside the block. A
    reentrant checkpoint (`use_reentrant=True`) makes a graph only where one of its inputs requires a gradient.

    Attributes:
        saliency: name -> float32 accumulator in the weight's shape, or its region's [n, k], on the weight's device, or
            in host memory. In mode "signed" the magnitude is taken when the block ends.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Linear | nn.Conv2d],
        mode: Mode = "abs",
        per_sample: bool = False,
        regions: Mapping[str, Region] | None = None,
        on_host: bool = False,
    ) -> None:
        """Prepares accumulators of zeros; nothing is watched before the `with` block.

        Args:
            modules: name -> nn.Linear or nn.Conv2d, each module once.
            mode: "abs" (FADE), "signed" (SalUn) or "square" (Fisher information).
            per_sample: take the magnitude of each sample's gradient; dimension 0 of a layer's input is the sample.
            regions: name -> slices of the rows and of the columns of a weight seen as [N, K], outside of which nothing
                is computed or kept; the whole weight of a layer without one.
            on_host: keep the accumulators in host memory. Each is brought to its layer's device and back when the
                gradient is there, by way of one buffer as large as the largest; the sums are the same bits.

        Raises:
            TypeError: a module is neither nn.Linear nor nn.Conv2d.
            ValueError: no modules, a module under two names, unknown mode.
        """
        _ops.check_mode(mode)
        if not modules:
            raise ValueError("there are no layers to watch: give at least one nn.Linear or nn.Conv2d")
        for name, module in modules.items():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                raise TypeError(f"layer {name!r} must be nn.Linear or nn.Conv2d, not {type(module).__name__}")
        if len({id(module) for module in modules.values()}) < len(modules):
            raise ValueError("a layer is given under two names: name each module once")
        self.mode = mode
        self.per_sample = per_sample
        self._layers = [_Layer(name, module, (regions or {}).get(name), on_host) for name, module in modules.items()]
        self._on_host = on_host
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._required_grad: list[Tensor] = []
        self._anchor = torch.zeros(0, requires_grad=True)
        self._callback_queued = False
        self._active = False
        self._finished = False

    @property
    def saliency(self) -> dict[str, Tensor]:
        return {layer.name: layer.saliency for layer in self._layers}

    def __enter__(self) -> Self:
        if self._active or self._finished:
            raise RuntimeError("a GradientMagnitude serves one `with` block: make a new one")
        self._active = True
        if self._on_host:
            self._take_buffers()
        for layer in self._layers:
            if layer.module.weight.requires_grad:
                self._required_grad.append(layer.module.weight.requires_grad_(False))
            self._hooks.append(layer.module.register_forward_hook(self._forward_hook(layer), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._active, self._finished = False, True
        for hook in self._hooks:
            hook.remove()
        for weight in self._required_grad:
            weight.requires_grad_(True)
        for layer in self._layers:
            layer.arrived.clear()
            layer.buffer = None
            if self.mode == "signed":
                layer.saliency.abs_()

    def _take_buffers(self) -> None:
        """One buffer on each device, as large as the largest accumulator of its layers; a view of it for each."""
        sizes: dict[torch.device, int] = {}
        for layer in self._layers:
            device = layer.module.weight.device
            sizes[device] = max(sizes.get(device, 0), layer.saliency.numel())
        buffers = {device: torch.empty(size, dtype=torch.float32, device=device) for device, size in sizes.items()}
        for layer in self._layers:
            buffer = buffers[layer.module.weight.device]
            layer.buffer = buffer[: layer.saliency.numel()].view(layer.saliency.shape)

    def _forward_hook(self, layer: _Layer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            input, call = args[0] if args else kwargs["input"], _Call()
            layer.waiting.add(call)
            return _Watch.apply(self._anchor, output, input.detach(), self, layer, call)

        return hook

    def _gradient_arrived(self, layer: _Layer, call: _Call, grad_output: Tensor, input: Tensor) -> None:
        layer.waiting.discard(call)
        # Under autocast the layer computed, as `.grad` would be, in the dtype of its output, not in that of its input.
        layer.arrived.append((grad_output.detach(), input.to(grad_output)))
        if not layer.waiting:
            layer.fold(self.mode, self.per_sample)
        elif not self._callback_queued:
            # Some calls of this layer may get no gradient in this pass: then its end decides.
            self._callback_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        self._callback_queued = False
        for layer in self._layers:
            if layer.arrived:
                layer.fold(self.mode, self.per_sample)
