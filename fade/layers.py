"""Masked LoRA layers as PEFT tuner layers, so that diffusers' and PEFT's own calls keep their meaning on an unlearned
pipeline: `add_adapter`, `set_adapters`, `disable_adapters`, `fuse_lora`, `unfuse_lora`, `delete_adapters`.

A layer computes y = x Wᵀ + Σ_i x Δ_iᵀ over its active adapters, where a masked adapter has Δ = s·M⊙(BA) or, in the
values form, Δ = s·v scattered to the mask's positions (FADE, arXiv 2602.07058, section 3). Adapters without a mask are
ordinary LoRA. Unlike PEFT's own layers, `unmerge` restores the weight bit for bit: what `merge` overwrites is kept.
"""

from typing import Any, ClassVar

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from fade.errors import FadeError
from fade_kernels import (
    BitMask,
    gather_masked,
    masked_factor_values,
    masked_lora_conv2d,
    masked_lora_linear,
    masked_values_conv2d,
    masked_values_linear,
    scatter_masked_,
)


class MaskBuffer(nn.Module):
    """A BitMask that moves with its module and is part of the state dict (`words`, int32 [N, ceil(K/32)]).

    Beside it the adapter's scale as a 0-d tensor, float32 whatever the model is cast to: under torch.compile and in a
    captured CUDA graph another scale is then another input, and nothing is compiled or captured again.
    """

    def __init__(self, mask: BitMask, scale: float) -> None:
        super().__init__()
        self.shape = mask.shape
        self.register_buffer("words", mask.words)
        self.register_buffer("scale", torch.tensor(scale, device=mask.device), persistent=False)
        self._mask, self._exact_scale = mask, scale

    def set_scale(self, scale: float) -> None:
        self._exact_scale = scale
        self.scale.fill_(scale)

    def _apply(self, fn: Any, recurse: bool = True) -> "MaskBuffer":
        super()._apply(fn, recurse)
        self.scale = torch.tensor(self._exact_scale, device=self.scale.device)
        return self

    @property
    def mask(self) -> BitMask:
        if self._mask.words is not self.words:
            self._mask = BitMask.from_words(self.words, self.shape)
        return self._mask


class _Scaling(dict[str, float]):
    """PEFT's `scaling` of a layer, which writes every change through to the adapter's scale tensor."""

    def __init__(self, scaling: dict[str, float], masks: nn.ModuleDict) -> None:
        super().__init__(scaling)
        self._masks = masks

    def __setitem__(self, adapter: str, scale: float) -> None:
        super().__setitem__(adapter, scale)
        if adapter in self._masks:
            self._masks[adapter].set_scale(scale)


# In a state dict a masked adapter's factors have names of their own: under PEFT's, diffusers' `save_lora_weights` would
# write a file that every loader that knows no masks takes for a dense LoRA. Under these it finds no factors and fails.
_MASKED_NAMES = {"lora_A": "lora_masked_A", "lora_B": "lora_masked_B"}


def _rename_factors(layer: "MaskedLoraLayer", state: dict[str, Any], prefix: str, names: dict[str, str]) -> None:
    for adapter in layer.lora_mask:
        for old, new in names.items():
            key = f"{prefix}{old}.{adapter}.weight"
            if key in state:
                state[f"{prefix}{new}.{adapter}.weight"] = state.pop(key)


def _name_masked_factors(layer: "MaskedLoraLayer", state: dict[str, Any], prefix: str, _: Any) -> None:
    _rename_factors(layer, state, prefix, _MASKED_NAMES)


def _unname_masked_factors(layer: "MaskedLoraLayer", state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename_factors(layer, state, prefix, {new: old for old, new in _MASKED_NAMES.items()})


class MaskedLoraLayer:
    """What the linear and the convolution layer share. Mixed into a PEFT LoRA layer, before it."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = (*lora.LoraLayer.adapter_layer_names, "lora_values")
    other_param_names: ClassVar[tuple[str, ...]] = (*lora.LoraLayer.other_param_names, "lora_mask")

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        # PEFT's constructor calls this before ours could add anything, and it walks `adapter_layer_names`.
        if "lora_mask" not in self._modules:
            self._add_mask_storage()
        super().update_layer(*args, **kwargs)

    def _add_mask_storage(self) -> None:
        self.lora_mask = nn.ModuleDict()
        self.lora_values = nn.ParameterDict()
        self.scaling = _Scaling(self.scaling, self.lora_mask)
        self._overwritten: list[tuple[str, Tensor, Tensor | None]] = []
        self._register_state_dict_hook(_name_masked_factors)
        self.register_load_state_dict_pre_hook(_unname_masked_factors)

    @classmethod
    def adopt(cls, layer: lora.LoraLayer) -> "MaskedLoraLayer":
        """Turns a plain PEFT layer into a masked one in place; the adapters that it has stay as they are."""
        layer.__class__ = cls
        layer._add_mask_storage()
        return layer

    def set_mask(self, adapter_name: str, mask: BitMask) -> None:
        """Restricts an adapter's factors to `mask`, of shape [N, K] of the (flattened) weight."""
        weight = self.get_base_layer().weight
        expected = (weight.shape[0], weight[0].numel())
        if mask.shape != expected:
            raise FadeError(f"mask of shape {mask.shape} does not fit a weight seen as {expected}")
        self.lora_mask[adapter_name] = MaskBuffer(mask.to(weight.device), self.scaling.get(adapter_name, 1.0))

    def set_values(self, adapter_name: str, mask: BitMask, values: Tensor) -> None:
        """Gives an adapter the values form: `values` [nnz] at the mask's positions in row-major order, no factors."""
        self.set_mask(adapter_name, mask)
        if values.shape != (mask.count,):
            raise FadeError(f"values of shape {tuple(values.shape)} do not fit a mask of {mask.count} entries")
        # PEFT asks lora_A whether the layer has an adapter, so the name stays there.
        self.lora_A[adapter_name], self.lora_B[adapter_name] = nn.Identity(), nn.Identity()
        self.lora_values[adapter_name] = nn.Parameter(values.to(self.get_base_layer().weight.device))

    def adapter_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """The trained tensors of a masked adapter: [values], or [A, B]."""
        if adapter_name in self.lora_values:
            return [self.lora_values[adapter_name]]
        return [self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight]

    def packed_values(self, adapter_name: str) -> Tensor:
        """M⊙(BA) at the mask's positions, float32 [nnz], without the scale."""
        if adapter_name in self.lora_values:
            return self.lora_values[adapter_name].detach().float()
        lora_a, lora_b = (p.detach() for p in self.adapter_parameters(adapter_name))
        return masked_factor_values(lora_a, lora_b, self.lora_mask[adapter_name].mask)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Δ as a dense tensor of the weight's shape, float32. Without a mask: PEFT's own."""
        if adapter not in self.lora_mask:
            return super().get_delta_weight(adapter)
        weight = self.get_base_layer().weight
        delta = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        values = self.packed_values(adapter) * self.scaling[adapter]
        return scatter_masked_(delta, values, self.lora_mask[adapter].mask)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters' Δ to the weight, in float32, rounded once, and keeps what was overwritten.

        With `safe_merge`, a weight that would not be finite raises ValueError and nothing changes.
        """
        weight = self.get_base_layer().weight
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            if name not in self.lora_mask:
                bias = self.get_base_layer().bias if self.lora_bias[name] else None
                before = (name, weight.detach().clone(), None if bias is None else bias.detach().clone())
                super().merge(safe_merge, [name])
                self._overwritten.append(before)
                continue
            mask = self.lora_mask[name].mask
            before = gather_masked(weight.detach(), mask)
            merged = (before.float() + self.packed_values(name) * self.scaling[name]).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merging adapter {name} would make weights infinite or NaN; the adapter is broken")
            scatter_masked_(weight.detach(), merged, mask)
            self.merged_adapters.append(name)
            self._overwritten.append((name, before, None))

    def unmerge(self) -> None:
        """Restores the weight to the bits it had before the first `merge`."""
        weight = self.get_base_layer().weight.detach()
        while self._overwritten:
            name, before, bias = self._overwritten.pop()
            if before.shape == weight.shape:
                weight.copy_(before)
            else:
                scatter_masked_(weight, before, self.lora_mask[name].mask)
            if bias is not None:
                self.get_base_layer().bias.detach().copy_(bias)
        self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; one that is merged is taken out of the weight first."""
        merged = list(self.merged_adapters)
        if adapter_name in merged:
            self.unmerge()
        super().delete_adapter(adapter_name)
        if adapter_name in merged and len(merged) > 1:
            self.merge(adapter_names=[name for name in merged if name != adapter_name])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        masked = [name for name in self.active_adapters if name in self.lora_mask]
        if self.disable_adapters or self.merged or not masked:
            return super().forward(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            raise ValueError("`adapter_names` (mixed batches) is not supported by masked adapters")
        base = self.get_base_layer()
        if getattr(base, "_hf_hook", None) is None:
            x = self._cast_input_dtype(x, base.weight.dtype)
            result = self._masked_forward(masked[0], x, base.weight, base.bias)
            rest = masked[1:]
        else:
            # An accelerate hook fetches the weight only while the base layer itself runs.
            result = base(x, *args, **kwargs)
            rest = masked
        for name in rest:
            result = result + self._masked_forward(name, x, None, None)
        for name in self.active_adapters:
            if name in self.lora_A and name not in self.lora_mask:
                lora_a, lora_b = self.lora_A[name], self.lora_B[name]
                dense = lora_b(lora_a(self.lora_dropout[name](self._cast_input_dtype(x, lora_a.weight.dtype))))
                result = result + (dense * self.scaling[name]).to(result.dtype)
        return result


class MaskedLoraLinear(MaskedLoraLayer, lora.Linear):
    """Masked LoRA on an `nn.Linear`; factors A [r, K] and B [N, r], mask [N, K]."""

    def _masked_forward(self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mask, scale = self.lora_mask[name].mask, self.lora_mask[name].scale
        if name in self.lora_values:
            return masked_values_linear(x, weight, bias, self.lora_values[name], mask, scale)
        lora_a, lora_b = self.lora_A[name].weight, self.lora_B[name].weight
        return masked_lora_linear(x, weight, bias, lora_a, lora_b, mask, scale)


class MaskedLoraConv2d(MaskedLoraLayer, lora.Conv2d):
    """Masked LoRA on an `nn.Conv2d`; factors A [r, C_in, kh, kw] and B [C_out, r, 1, 1], mask [C_out, C_in·kh·kw]."""

    def _masked_forward(self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        base, mask, scale = self.get_base_layer(), self.lora_mask[name].mask, self.lora_mask[name].scale
        geometry = (base.stride, base.padding, base.dilation, base.groups)
        if name in self.lora_values:
            return masked_values_conv2d(
                x, weight, bias, self.lora_values[name], mask, scale, *geometry, kernel_size=base.kernel_size
            )
        lora_a, lora_b = self.lora_A[name].weight, self.lora_B[name].weight
        return masked_lora_conv2d(x, weight, bias, lora_a, lora_b, mask, scale, *geometry)


MASKED_LAYERS: dict[type[nn.Module], type[MaskedLoraLayer]] = {
    nn.Linear: MaskedLoraLinear,
    nn.Conv2d: MaskedLoraConv2d,
}
"""Which masked layer wraps which module, as registered with PEFT."""
