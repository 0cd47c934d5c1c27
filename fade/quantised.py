"""Layers whose weight is packed: by bitsandbytes, torchao, GGUF, quanto, or whatever else keeps the interface of
`nn.Linear`. They are told by their attributes alone, so that no such library is needed or imported.

A masked adapter sits on them as it does on others, but computes past the weight: y = base(x) + x Δᵀ.
"""

from collections.abc import Mapping

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from fade.errors import FadeError
from fade.modes import evaluation_mode
from fade_kernels import weight_shape


def is_ordinary(layer: nn.Module) -> bool:
    """Whether the weight of a Linear or Conv2d is a floating-point tensor of the shape that the layer's sizes say, and
    nothing else, so that a product may be made with it in the layer's place."""
    weight = getattr(layer, "weight", None)
    return (
        type(weight) in (nn.Parameter, Tensor)  # a subclass is a library's own
        and weight.dtype.is_floating_point
        and tuple(weight.shape) == weight_shape(layer)
    )


def quantisation(layer: nn.Module) -> str | None:
    """What packs the weight of a Linear or Conv2d, in words: the library, its class and its type of number, such as
    `bitsandbytes Params4bit nf4`. None for ordinary weights, for those computed from others, and for other layers."""
    if not isinstance(layer, nn.Linear | nn.Conv2d) or (weight := layer._parameters.get("weight")) is None:
        return None
    if type(weight) in (nn.Parameter, Tensor) and weight.dtype.is_floating_point:
        return None
    kind = getattr(weight, "quant_type", None) or getattr(weight, "qtype", None)
    words = (type(weight).__module__.partition(".")[0], type(weight).__name__, getattr(kind, "name", kind))
    return " ".join(str(word) for word in words if word is not None)


def refuse_untrainable(layers: Mapping[str, nn.Module], dtype: torch.dtype, device: torch.device) -> None:
    """Raises FadeError where packed layers (by name) pass no gradient on to their input, as those do that round it,
    too, or whose product knows no backward pass. One of each kind is asked, with an input of `dtype`; none that waits
    elsewhere than on the `device` where it computes, and where it may be laid out and multiplied otherwise."""
    kinds: dict[str, tuple[str, nn.Module]] = {}
    for name, layer in layers.items():
        if (words := quantisation(layer)) is not None and layer.weight.device.type == device.type:
            kinds.setdefault(words, (name, layer))
    for words, (name, layer) in kinds.items():
        if layer.weight.is_inference():
            raise FadeError(
                f"{name} is quantised ({words}) and was loaded under torch.inference_mode(), so that no gradient comes "
                "through it; load the model outside of it"
            )
        inputs = torch.randn(2, weight_shape(layer)[1], dtype=dtype, device=layer.weight.device)
        try:
            with evaluation_mode(layer):
                with torch.no_grad():
                    layer(inputs)  # on some CPUs bitsandbytes packs weights anew when they are first drawn with
                with torch.enable_grad():
                    answer = layer(inputs.requires_grad_())
                    (gradient,) = torch.autograd.grad(answer.float().sum(), inputs, allow_unused=True)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise _untrainable(name, words) from error
        if gradient is None or not gradient.count_nonzero():
            raise _untrainable(name, words)


def _untrainable(name: str, words: str) -> FadeError:
    return FadeError(
        f"{name} is quantised ({words}), and no gradient comes through it here, so that nothing before it can be "
        "trained; unlearn on the 16-bit model, or on one whose quantisation lets gradients through "
        "(docs/quantised.md), and load the adapter on this one"
    )


def float_weight(layer: nn.Module) -> Tensor:
    """The weight of a Linear or Conv2d as numbers, detached: itself, or what its library unpacks it to.

    Raises FadeError where there is no known way to unpack it.
    """
    if is_ordinary(layer):
        return layer.weight.detach()
    weight = layer.weight.detach()
    if type(weight).__module__.startswith("diffusers.quantizers.gguf"):
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        weight = dequantize_gguf_tensor(weight)
    elif type(weight).__module__.startswith("optimum."):
        weight = weight.dequantize()
    else:
        weight = dequantize_module_weight(layer).detach()
    if not weight.is_floating_point() or tuple(weight.shape) != weight_shape(layer):
        raise FadeError(
            f"the closed form needs a weight's numbers, and there is no known way to unpack {quantisation(layer)}; "
            "choose the method distillation, or solve on the 16-bit model and load the adapter on this one"
        )
    return weight
