"""Masked LoRA layers as PEFT tuner layers, so that diffusers' and PEFT's own calls keep their meaning on an unlearned
pipeline: `set_adapters`, `disable_lora`, `fuse_lora`, `unfuse_lora`, `delete_adapters`, another LoRA's loading.

A layer computes y = x Wᵀ + Σ_i x Δ_iᵀ over its acting adapters (active and not merged), where a masked adapter has
Δ = s·M⊙(BA) or, in the values form, Δ = s·v scattered to the mask's positions (FADE, arXiv 2602.07058, section 3).
Adapters without a mask are ordinary LoRA. Over a quantised weight (`fade.quantised`), or one that offloading fetches,
the layer below is called as a whole: y = base(x) + Σ_i x Δ_iᵀ. Three things differ from PEFT's own layers: `unmerge`
restores the weight bit for bit, because what `merge` overwrites is kept; an adapter that is merged does not silence
those that are not; and a pinned adapter is switched off only by a call that names it or that switches everything off.
"""

import contextlib
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fade.errors import FadeError
from fade.quantised import is_ordinary, quantisation
from fade_kernels import (
    BitMask,
    gather_masked,
    masked_factor_values,
    masked_lora_conv2d,
    masked_lora_linear,
    masked_values_conv2d,
    masked_values_linear,
    scatter_masked_,
    weight_shape,
)

# --- what an adapter consists of -------------------------------------------------------------------------------------


class _Lender(nn.Module):
    """A factor as PEFT keeps it, whose forward lends its weight and bias instead of applying them.

    The product needs both factors, the mask and the scale at once, and offloading hooks of accelerate and diffusers
    fetch a module's tensors only around its own forward. Float32 factors stay float32 whatever the model is cast to: a
    training step, and what unlearning changes, is smaller than half an ulp of 16 bits.
    """

    def forward(self) -> tuple[Tensor, Tensor | None]:
        # An alias, because after the forward a hook may put other memory under the parameter.
        return self.weight.view(self.weight.shape), self.bias

    def _apply(self, fn: Any, recurse: bool = True) -> "_Lender":
        wide = {name: p.detach() for name, p in self._parameters.items() if p is not None and p.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, before in wide.items():
            parameter = self._parameters[name]
            if parameter.dtype != torch.float32:
                parameter.data = before.to(parameter.device)
        return self


class LinearFactor(_Lender, nn.Linear):
    """A factor of a linear layer; also the masked values, as a weight [1, nnz]."""


class Conv2dFactor(_Lender, nn.Conv2d):
    """A factor of a convolution."""


_FACTORS: dict[type[nn.Module], type[_Lender]] = {nn.Linear: LinearFactor, nn.Conv2d: Conv2dFactor}


def _lent(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    # PEFT replaces factors by plain layers of a larger rank when it prepares a model for hot-swapping. Without a hook
    # nothing comes between, and a call and an alias for each factor would cost as much as the product of a small layer.
    return module() if isinstance(module, _Lender) and is_hooked(module) else (module.weight, module.bias)


def _values(lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """The values [nnz] that B [1, r] and A [r, nnz] make. r is 1, but where PEFT has padded it with zeros: hot-swapping
    a neighbour of another rank does so with every adapter."""
    if len(lora_a) == 1:
        return (lora_b * lora_a).view(-1)
    lora_a, lora_b = lora_a.flatten(1), lora_b.flatten(1)
    return lora_b[0, 0] * lora_a[0] + lora_b[0, 1:] @ lora_a[1:]


def _scale_tensor(scale: float, device: torch.device) -> Tensor:
    """The scale as autograd can keep it, in inference mode, too."""
    with torch.inference_mode(False):
        return torch.tensor(scale, dtype=torch.float32, device=device)


class MaskBuffer(nn.Module):
    """A BitMask that moves with its module and is part of the state dict (`words`, int32 [N, ceil(K/32)]).

    Beside it the adapter's scale as a 0-d tensor, float32 whatever the model is cast to: under torch.compile and in a
    captured CUDA graph another scale is then another input, and nothing is compiled or captured again.
    """

    def __init__(self, mask: BitMask, scale: float) -> None:
        super().__init__()
        self.shape = mask.shape
        self.register_buffer("words", mask.words)
        # No buffer: what offloading writes to a disk once, it brings back as it was then.
        self.scale = _scale_tensor(scale, mask.device)
        self._mask, self._exact_scale = mask, scale

    def set_scale(self, scale: float) -> None:
        self._exact_scale = scale
        with torch.inference_mode(self.scale.is_inference()):
            self.scale.fill_(scale)

    def _apply(self, fn: Any, recurse: bool = True) -> "MaskBuffer":
        super()._apply(fn, recurse)
        if self._mask.words is not self.words:
            # Moved: torch.compile must find the count, and no device is waited for to count anew.
            self._mask = self._mask._with_words(self.words)
            self.words = self._mask.words
        self.scale = _scale_tensor(self._exact_scale, self.words.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any,
        errors: list[str],
    ) -> None:  # fmt: skip
        words = state_dict.get(f"{prefix}words")
        if words is not None:
            try:
                BitMask.from_words(words, self.shape)
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix}words: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if words is not None:  # written into the old memory, so what was counted of the old mask is gone
            self._mask = BitMask.from_words(self.words, self.shape)

    def lent(self) -> tuple[BitMask, Tensor]:
        """The mask and the scale, for one product."""
        return self() if is_hooked(self) else (self.mask, self.scale)

    @property
    def mask(self) -> BitMask:
        if self._mask.words is not self.words:
            self._mask = BitMask.from_words(self.words, self.shape)
        return self._mask

    def forward(self) -> tuple[BitMask, Tensor]:
        """The mask and the scale, for one product; called, so that an offloading hook fetches them."""
        # The hook puts other memory under the buffer as soon as this returns.
        return BitMask.from_words(self.words.view(self.words.shape), self.shape), self.scale


class _Scaling(dict[str, float]):
    """PEFT's `scaling` of a layer, which writes every change through to the adapter's scale tensor."""

    def __init__(self, scaling: dict[str, float], masks: nn.ModuleDict) -> None:
        super().__init__(scaling)
        self._masks = masks

    def __setitem__(self, adapter: str, scale: float) -> None:
        if adapter in self._masks:
            scale = float(scale)  # PEFT's hot-swapping makes tensors of them
            self._masks[adapter].set_scale(scale)
        super().__setitem__(adapter, scale)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Scaling, (dict(self), self._masks)


@dataclass
class _Overwritten:
    """What merging one adapter replaced in a weight: all of it, or the entries under `mask`."""

    merged: "Merged"
    before: Tensor
    bias: Tensor | None = None
    mask: BitMask | None = None
    written: Tensor | None = None


@dataclass(frozen=True)
class Merged:
    """One adapter in a layer's weight: with what scale, and whether it was merged by name (`Adapter.merge`), so that it
    is taken out by name alone."""

    name: str
    scale: float
    held: bool


@dataclass(frozen=True)
class Rounding:
    """One adapter's one-product mode (`fade.training_mode`) in one training step of one layer: the seed by which W + Δ
    is rounded, or the weight made so beforehand."""

    adapter: str
    seed: int | None = None
    weight: Tensor | None = None


DENSE_FROM = 1 / 16
"""Density of the masks from which Δ is kept dense where nothing is trained; below, it takes less memory as it is."""


@dataclass(frozen=True)
class _DenseDelta:
    """Σ s_i Δ_i of adapters in the values form as a dense tensor, and copies of all that it was made of.

    Copies, because no version counter sees what is written through `.data`, as PEFT, EMA and tests write: comparing
    them costs a small part of making the sum anew. The frozen weight is no part of it and is read at every product.
    """

    made_of: tuple[tuple[Tensor, Tensor, Tensor, float], ...]
    delta: Tensor

    @staticmethod
    def of(parts: Sequence[tuple[BitMask, Tensor, Tensor, float]], shape: torch.Size) -> "_DenseDelta":
        delta = torch.zeros(shape, dtype=torch.float32, device=parts[0][1].device)
        for mask, lora_a, lora_b, scale in parts:
            delta += scatter_masked_(torch.zeros_like(delta), _values(lora_a, lora_b).float() * scale, mask)
        copies = tuple((mask.words.clone(), a.clone(), b.clone(), scale) for mask, a, b, scale in parts)
        return _DenseDelta(copies, delta)

    def fits(self, parts: Sequence[tuple[BitMask, Tensor, Tensor, float]]) -> bool:
        return len(parts) == len(self.made_of) and all(
            scale == then
            and lora_a.dtype == a.dtype
            and torch.equal(lora_a, a)
            and torch.equal(lora_b, b)
            and torch.equal(mask.words, words)
            for (mask, lora_a, lora_b, scale), (words, a, b, then) in zip(parts, self.made_of, strict=True)
        )


# Beside the layers and not in them, so that copies and pickles of a model stay as small as its adapters are.
_dense_deltas: weakref.WeakKeyDictionary[nn.Module, _DenseDelta] = weakref.WeakKeyDictionary()


# --- the layers ------------------------------------------------------------------------------------------------------


class MaskedLoraLayer:
    """What the linear and the convolution layer share. Mixed into a PEFT LoRA layer, before it."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = lora.LoraLayer.adapter_layer_names
    other_param_names: ClassVar[tuple[str, ...]] = (
        *lora.LoraLayer.other_param_names, "lora_mask", "values_form", "pinned"
    )  # fmt: skip
    rounding: Rounding | None = None
    """Set while a step of the one-product mode is trained; else every product is exact."""

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        # PEFT's constructor calls this before ours could add anything, and it walks `other_param_names`.
        if "lora_mask" not in self._modules:
            self._add_mask_storage()
        name = kwargs["adapter_name"] if "adapter_name" in kwargs else args[0]
        if name in self.lora_mask:  # an adapter made anew is not restricted to the old one's mask
            del self.lora_mask[name]
            self.values_form.pop(name, None)
        super().update_layer(*args, **kwargs)

    def _add_mask_storage(self) -> None:
        self.lora_mask = nn.ModuleDict()
        self.scaling = _Scaling(self.scaling, self.lora_mask)
        self.pinned: dict[str, str | None] = {}
        """Adapters that stay on whatever is done to others; the text is said where they go off with everything (by one
        layer of a model for all)."""
        self.values_form: dict[str, bool] = {}
        self._overwritten: list[_Overwritten] = []
        self.suspended: list[str] = []
        self._transient: list[tuple[float, dict[str, float]]] = []

    @classmethod
    def adopt(cls, layer: lora.LoraLayer) -> "MaskedLoraLayer":
        """Turns a plain PEFT layer into a masked one in place; the adapters that it has stay as they are."""
        layer.__class__ = cls
        layer.is_target_conv_1d_layer = False  # PEFT's layers for quantised weights do not say so
        layer._add_mask_storage()
        return layer

    # --- masks and values ---

    def set_mask(self, adapter_name: str, mask: BitMask) -> None:
        """Restricts an adapter's factors to `mask`, of shape [N, K] of the (flattened) weight."""
        shape = torch.Size(weight_shape(self.get_base_layer()))
        expected = (shape[0], shape[1:].numel())
        if mask.shape != expected:
            raise FadeError(f"mask of shape {mask.shape} does not fit a weight seen as {expected}")
        if adapter_name in self.lora_variant:
            kind = type(self.lora_variant[adapter_name]).__name__
            raise FadeError(f"the adapter {adapter_name!r} is a LoRA variant ({kind}), which cannot be masked")
        for factors in (self.lora_A, self.lora_B):
            if adapter_name in factors and type(factors[adapter_name]) in _FACTORS:
                factors[adapter_name].__class__ = _FACTORS[type(factors[adapter_name])]
        self.values_form.pop(adapter_name, None)
        device = execution_device(self.get_base_layer())
        self.lora_mask[adapter_name] = MaskBuffer(mask.to(device), float(self.scaling.get(adapter_name, 1.0)))

    def set_values(self, adapter_name: str, mask: BitMask, values: Tensor) -> None:
        """Gives an adapter the values form: `values` [nnz] at the mask's positions in row-major order, no factors.

        They are kept as factors of the row of values: lora_A [1, nnz], which holds them, and lora_B [1, 1], which is
        one (of a convolution [1, nnz, 1, 1] and [1, 1, 1, 1]). PEFT's and diffusers' helpers can move, pad, train and
        save these shapes, and no loader without masks takes them for a LoRA of this layer.
        """
        if values.shape != (mask.count,):
            raise FadeError(f"values of shape {tuple(values.shape)} do not fit a mask of {mask.count} entries")
        self.set_mask(adapter_name, mask)
        device = execution_device(self.get_base_layer())
        one = torch.ones(1, dtype=values.dtype, device="cpu")
        for factors, weight in ((self.lora_A, values), (self.lora_B, one)):
            needed = factors[adapter_name].weight.requires_grad
            factors[adapter_name] = self._row(weight.to(device)).requires_grad_(needed)
        self.values_form[adapter_name] = True

    def _row(self, weight: Tensor) -> _Lender:
        """A factor of rank 1 that holds a vector."""
        if isinstance(self.get_base_layer(), nn.Conv2d):
            factor = Conv2dFactor(weight.numel(), 1, 1, bias=False, device="meta")
        else:
            factor = LinearFactor(weight.numel(), 1, bias=False, device="meta")
        factor.weight = nn.Parameter(weight.view(factor.weight.shape), requires_grad=False)
        return factor

    def has_values(self, adapter_name: str) -> bool:
        """Whether a masked adapter is in the values form."""
        return adapter_name in self.values_form

    def adapter_parameters(self, adapter_name: str) -> list[nn.Parameter]:
        """What the overwrite stage trains of a masked adapter: [values [1, nnz]] (of a convolution [1, nnz, 1, 1]), or
        [A, B]."""
        if self.has_values(adapter_name):
            return [self.lora_A[adapter_name].weight]
        return [self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight]

    def adapter_tensors(self, adapter_name: str) -> tuple[BitMask, list[Tensor]]:
        """A masked adapter's mask with [values [nnz]] or [A, B], detached, fetched from wherever they are offloaded."""
        mask, _ = self.lora_mask[adapter_name].lent()
        lora_a, lora_b = (_lent(factors[adapter_name])[0].detach() for factors in (self.lora_A, self.lora_B))
        return mask, [_values(lora_a, lora_b)] if self.has_values(adapter_name) else [lora_a, lora_b]

    def packed_values(self, adapter_name: str) -> Tensor:
        """M⊙(BA) at the mask's positions, float32 [nnz], without the scale."""
        mask, tensors = self.adapter_tensors(adapter_name)
        return tensors[0].float() if len(tensors) == 1 else masked_factor_values(*tensors, mask)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Δ as a dense tensor of the weight's shape, float32. Without a mask: PEFT's own."""
        if adapter not in self.lora_mask:
            return super().get_delta_weight(adapter)
        values = self.packed_values(adapter) * self.scaling[adapter]
        delta = torch.zeros(weight_shape(self.get_base_layer()), dtype=torch.float32, device=values.device)
        return scatter_masked_(delta, values, self.lora_mask[adapter].mask)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Makes room for the masks and values that a state dict holds, before the parts read them.

        What does not fit is an error, and the layer keeps what it has. So are other weights than there are under what
        is merged: nobody could say whether they hold it too, and un-merging would add what it should take out.
        """
        errors, own = args[-1], self.state_dict(prefix=prefix)
        if self._overwritten:
            for key, ours in own.items():
                theirs, inner = state_dict.get(key), key.removeprefix(prefix).split(".")[:-1]
                if set(inner) == {"base_layer"} and theirs is not None and not torch.equal(theirs.to(ours), ours):
                    names = ", ".join(self.merged_adapters)
                    errors.append(f"{key}: {names} is merged into other weights; unmerge() it first, then load these")
                    state_dict[key] = ours
        for adapter in list(self.lora_A):
            parts = [
                f"{prefix}{part}"
                for part in (f"lora_mask.{adapter}.words", f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight")
            ]
            words, lora_a, lora_b = (state_dict.get(part) for part in parts)
            if words is None:
                continue
            try:
                mask = BitMask.from_words(words, weight_shape(self.get_base_layer()))
                whole = lora_a is not None and lora_b is not None
                if whole and lora_b.numel() == 1 and lora_a.shape[:2] == (1, mask.count):
                    if self.r[adapter] != 1 and not self.has_values(adapter) and adapter in self.lora_mask:
                        # Its scale is alpha/r of the factors that it has.
                        raise ValueError(f"it is in the values form, the adapter {adapter!r} in the factors form")
                    if not self.has_values(adapter) or self.lora_A[adapter].weight.shape != lora_a.shape:
                        self.set_values(adapter, mask, lora_a.flatten())
                elif self.has_values(adapter):
                    raise ValueError(f"it is in the factors form, the adapter {adapter!r} in the values form")
                elif adapter not in self.lora_mask:
                    self.set_mask(adapter, mask)
            except (TypeError, ValueError) as error:
                errors.append(f"{prefix}lora_mask.{adapter}: {error}")
                state_dict.update({part: own[part] for part in parts if part in own})
        super()._load_from_state_dict(state_dict, prefix, *args)

    # --- on and off ---

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's call. Pinned adapters that are on stay on beside those named, and stay as trainable as they were."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        kept = [name for name in self.active_adapters if name in self.pinned and name not in names]
        self.suspended = [name for name in self.suspended if name in self.pinned and name not in names]
        with self._gradients_as_found(name for name in self.pinned if name not in names):
            super().set_adapter([*names, *kept], inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """PEFT's call: everything off, or on again what was on. Pinned adapters stay as trainable as they were."""
        with self._gradients_as_found(self.pinned):
            if enabled:
                suspended = [name for name in self.suspended if name not in self.active_adapters]
                super().set_adapter([*self.active_adapters, *suspended])
                self.suspended, self._disable_adapters = [], False
                return
            if not self.disable_adapters:
                # PEFT un-merges in the next forward; what is off says so at once.
                off = [*self.acting(), *(merged.name for merged in self.stack() if not merged.held)]
                for name in off:
                    if self.pinned.get(name):
                        warnings.warn(self.pinned[name], stacklevel=2)
                if any(not merged.held for merged in self.stack()):
                    self.unmerge()
            super().enable_adapters(False)

    @contextlib.contextmanager
    def _gradients_as_found(self, names: Iterable[str]) -> Iterator[None]:
        masked = [name for name in names if name in self.lora_mask]
        parameters = [p for name in masked for part in (self.lora_A, self.lora_B) for p in part[name].parameters()]
        before = [(parameter, parameter.requires_grad) for parameter in parameters]
        try:
            yield
        finally:
            for parameter, needed in before:
                parameter.requires_grad_(needed)

    def switch(self, adapter_name: str, on: bool) -> None:
        """Switches one adapter on or off; others, and what needs gradients, stay as they are."""
        active = [name for name in self.active_adapters if name != adapter_name]
        if on and self.disable_adapters:
            # The others were switched off together and come back together.
            self.suspended, active, self._disable_adapters = active, [], False
        self._active_adapter = [*active, adapter_name] if on else active

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's call, which switches on another adapter in place of the last that was on, unless one is pinned."""
        if adapter_name in self.merged_adapters:
            self.take_out(adapter_name)
        if self.pinned:
            self.drop(adapter_name)
        else:
            super().delete_adapter(adapter_name)

    def drop(self, adapter_name: str) -> None:
        """Removes an adapter; others stay as they are. One that is merged is taken out of the weight first."""
        if adapter_name in self.merged_adapters:
            self.take_out(adapter_name)
        self._active_adapter = [name for name in self.active_adapters if name != adapter_name]
        self.suspended = [name for name in self.suspended if name != adapter_name]
        super().delete_adapter(adapter_name)

    def acting(self) -> list[str]:
        """The adapters whose Δ is added in the forward."""
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.lora_A and name not in self.merged_adapters]

    # --- strength ---

    def scale_layer(self, scale: float) -> None:
        """PEFT's call, for the time of one forward or one merge; what masked adapters had is remembered."""
        masked = {name: self.scaling[name] for name in self.active_adapters if name in self.lora_mask}
        if scale != 1 and masked:
            self._transient.append((scale, masked))
        super().scale_layer(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """PEFT's call. A masked adapter gets back exactly the scale that it had."""
        if scale == 0:  # by which PEFT would divide
            for name in self.active_adapters:
                if name in self.lora_A and name not in self.lora_mask:
                    self.set_scale(name, 1.0)
        else:
            super().unscale_layer(scale)
        if scale is None:
            self._transient.clear()
        elif self._transient and self._transient[-1][0] == scale:
            self._restore_scale(self._transient.pop()[1])

    def set_scale(self, adapter: str, scale: float) -> None:
        """PEFT's call. diffusers undoes a scale of 0, by which it cannot divide, with `set_scale(adapter, 1)`."""
        if self._transient and self._transient[-1][0] == 0 and adapter in self._transient[-1][1] and scale == 1:
            saved = self._transient[-1][1]
            self._restore_scale({adapter: saved.pop(adapter)})
            if not saved:
                self._transient.pop()
            return
        for _, saved in self._transient:
            saved.pop(adapter, None)
        if adapter in self.lora_mask:
            # So multiplied, dividing gives back what was set wherever alpha/r is a power of two, PEFT's way not.
            self.scaling[adapter] = scale * self.full_scale(adapter)
        else:
            super().set_scale(adapter, scale)

    def full_scale(self, adapter: str) -> float:
        """The scaling of an adapter at the strength 1: alpha/r."""
        return self.lora_alpha[adapter] / self.r[adapter]

    def _restore_scale(self, saved: dict[str, float]) -> None:
        for name, scale in saved.items():
            if name in self.lora_mask:
                self.scaling[name] = scale

    def present_scale(self, adapter: str) -> float:
        """The scale with which an adapter is in the weight, or acts or would act beside it."""
        return next((merged.scale for merged in self.stack() if merged.name == adapter), self.scaling[adapter])

    # --- merging ---

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None, held: bool = False) -> None:
        """Adds the adapters' Δ to the weight, in float32, rounded once, and keeps what was overwritten.

        With `safe_merge`, a weight that would not be finite raises ValueError. All adapters are merged or none. What is
        merged with `held` stays in the weight when everything is un-merged (as PEFT does before it loads another
        adapter); only `take_out` takes it out.
        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already following adapters were merged")
                names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
            if names:
                self.check_mergeable()
            with self._weight_as_found_on_error():
                for name in names:
                    self._merge_one(Merged(name, self.scaling[name], held), safe_merge)
        finally:
            # `fuse_lora(lora_scale=…)` scales before it merges, and never scales back.
            while self._transient:
                self._restore_scale(self._transient.pop()[1])

    def check_mergeable(self) -> None:
        """Raises FadeError where what is written into the weight would be lost."""
        self._check_weight_at_hand()
        if (words := quantisation(self.get_base_layer())) is not None:
            raise FadeError(
                f"the weights are quantised ({words}), and rounding to that again would lose most of what is added; "
                "save() the adapter, load it on the 16-bit model and merge it there, or export() it for that model"
            )
        if self.get_base_layer().weight.dtype.itemsize == 1:
            raise FadeError(
                "the weights are stored in 8 bits, which would lose most of what is added; merge before "
                "enable_layerwise_casting or quantisation"
            )

    def _check_weight_at_hand(self) -> None:
        base = self.get_base_layer()
        weight = base._parameters.get("weight")
        if weight is None:
            raise FadeError(
                f"a weight under it is computed from other tensors ({type(base).__name__} with weight norm, a "
                "parametrisation or quantisation), so nothing written into it stays; take that off first"
            )
        if weight.device.type == "meta" or groups_on_disk(base):
            raise FadeError(
                "weights cannot be written to while they are offloaded; merge and un-merge before offloading, or take "
                "the offloading off"
            )

    def _merge_one(self, adapter: Merged, safe_merge: bool) -> None:
        name, base = adapter.name, self.get_base_layer()
        weight = base.weight
        with torch.no_grad(), torch.inference_mode(weight.is_inference()):
            bias = base.bias.detach().clone() if self.lora_bias[name] and base.bias is not None else None
            if name not in self.lora_mask:
                before, scale = weight.detach().clone(), self.scaling[name]
                try:
                    self.scaling[name] = adapter.scale
                    with warnings.catch_warnings():
                        warnings.filterwarnings("ignore", message="Already following adapters were merged")
                        super().merge(safe_merge, [name])
                finally:
                    self.scaling[name] = scale
                self._overwritten.append(_Overwritten(adapter, before, bias))
                return
            mask = self.lora_mask[name].mask
            before = gather_masked(weight.detach(), mask)
            merged = (before.float() + self.packed_values(name) * adapter.scale).to(weight.dtype)
            merged_bias = None
            if self.lora_bias[name]:
                if bias is None:
                    raise RuntimeError(
                        "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias."
                    )
                merged_bias = bias + (self.lora_B[name].bias * adapter.scale).to(bias)
            finite = torch.isfinite(merged).all() and (merged_bias is None or torch.isfinite(merged_bias).all())
            if safe_merge and not finite:
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            scatter_masked_(weight.detach(), merged, mask)
            if merged_bias is not None:
                base.bias.detach().copy_(merged_bias)
            self.merged_adapters.append(name)
            self._overwritten.append(_Overwritten(adapter, before, bias, mask, merged))

    def stack(self) -> list[Merged]:
        """What is merged into the weight, in the order in which it was."""
        return [entry.merged for entry in self._overwritten]

    def unmerge(self) -> None:
        """Restores the weight to the bits it had before the first `merge`, but for what is held there."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.restack([merged for merged in self.stack() if merged.held])

    def take_out(self, name: str) -> None:
        """Un-merges one adapter; the others stay merged."""
        self.restack([merged for merged in self.stack() if merged.name != name])

    def restack(self, adapters: Sequence[Merged]) -> None:
        """Un-merges everything and merges these, each with its scale."""
        if self._overwritten or adapters:
            self._check_weight_at_hand()
        with self._weight_as_found_on_error():
            self._unmerge_all()
            for adapter in adapters:
                self._merge_one(adapter, safe_merge=False)

    @contextlib.contextmanager
    def _weight_as_found_on_error(self) -> Iterator[None]:
        """Where something fails, the weight has the bits it had, and merged is what was."""
        base = self.get_base_layer()
        written, merged = list(self._overwritten), list(self.merged_adapters)
        own = [p.detach() for p in (base.weight, base.bias) if p is not None]
        kept = [p.clone() for p in own]
        try:
            yield
        except BaseException:
            with torch.no_grad(), torch.inference_mode(base.weight.is_inference()):
                for parameter, bits in zip(own, kept, strict=True):
                    parameter.copy_(bits)
            self._overwritten[:], self.merged_adapters[:] = written, merged
            raise

    def _unmerge_all(self) -> None:
        weight = self.get_base_layer().weight
        with torch.no_grad(), torch.inference_mode(weight.is_inference()):
            while self._overwritten:
                entry = self._overwritten.pop()
                self._restore(weight.detach(), entry)
                if entry.bias is not None:
                    self.get_base_layer().bias.detach().copy_(entry.bias)
        self.merged_adapters.clear()

    @staticmethod
    def _restore(weight: Tensor, entry: _Overwritten) -> None:
        # The module may have been moved or cast since.
        before = entry.before.to(weight.device, weight.dtype)
        if entry.mask is None:
            weight.copy_(before)
            return
        mask, written = entry.mask.to(weight.device), entry.written.to(weight.device, weight.dtype)
        now = gather_masked(weight, mask)
        if not torch.equal(now, written):
            # Another tuner layer around or inside this one merged meanwhile: what it added stays.
            before = (now.float() + (before.float() - written.float())).to(weight.dtype)
        scatter_masked_(weight, before, mask)

    # --- the product ---

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (torch.is_grad_enabled() or args or kwargs) and (drawn := self._drawn(x)) is not None:
            return drawn
        if not self.lora_mask and not self._overwritten:
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        variant_kwargs = {key: kwargs.pop(key, None) for key in lora.layer.VARIANT_KWARG_KEYS}
        if self.disable_adapters:
            if any(not merged.held for merged in self.stack()):
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is None:
            return self._adapted(self.acting(), x, args, kwargs, variant_kwargs)
        return self._mixed_batch(adapter_names, x, args, kwargs, variant_kwargs)

    def _adapted(
        self,
        acting: list[str],
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        variant_kwargs: dict[str, Any],
    ) -> Tensor:
        """The base layer's output with what the adapters `acting` add to it."""
        masked = [name for name in acting if name in self.lora_mask]
        if self.rounding is not None:  # what is trained shares the product with the weight
            masked.sort(key=lambda name: name != self.rounding.adapter)
        plain = [name for name in acting if name not in self.lora_mask]
        base = self.base_layer
        fused = (
            bool(masked)
            and not args
            and not kwargs
            and takes_product(base)
            and not any(name in self.lora_variant for name in plain)  # they start from the base's output
            and not self._drops_out(masked[0])
        )
        if fused:
            result = self._product(masked.pop(0), self._cast_input_dtype(x, base.weight.dtype), base.weight, base.bias)
        else:
            result = base(x, *args, **kwargs)
        dtype = result.dtype
        for name in plain:
            if name in self.lora_variant:
                inner = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
                result = self.lora_variant[name].forward(
                    self, active_adapter=name, x=inner, result=result, **variant_kwargs, **kwargs
                )
                continue
            lora_a, lora_b = self.lora_A[name], self.lora_B[name]
            dense = lora_b(lora_a(self.lora_dropout[name](self._cast_input_dtype(x, lora_a.weight.dtype))))
            result = result + dense * self.scaling[name]
        result = result.to(dtype)
        if len(masked) > 1:  # the sum of all is rounded once
            result = result.to(torch.promote_types(dtype, torch.float32))
        for name in masked:
            result = result + self._delta(name, x).to(result.dtype)
        return result.to(dtype)

    def _mixed_batch(
        self, adapter_names: list[str], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any],
        variant_kwargs: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """PEFT's mixed batches: sample i goes through the adapter `adapter_names[i]`, `__base__` through none.

        Pinned adapters that are on act on every sample but those of `__base__`. Samples with the same adapters go
        through the layer together, so that each group costs one product, the base layer's included.
        """
        pinned = [name for name in self.acting() if name in self.pinned]
        groups: dict[tuple[str, ...], list[int]] = {}
        for row, name in enumerate(adapter_names):
            own = [name] if name in self.lora_A and name not in pinned else []
            groups.setdefault(() if name == "__base__" else (*own, *pinned), []).append(row)
        results: dict[int, Tensor] = {}
        for acting, rows in groups.items():
            together = rows[-1] - rows[0] + 1 == len(rows)
            part = x[rows[0] : rows[-1] + 1] if together else x[rows]
            given = {key: value and [value[row] for row in rows] for key, value in variant_kwargs.items()}
            results |= zip(rows, self._adapted(list(acting), part, args, kwargs, given).split(1), strict=True)
        return torch.cat([results[row] for row in range(len(adapter_names))])

    def _drawn(self, x: Tensor) -> Tensor | None:
        """The output in one product with W + Σ s_i Δ_i, whose second part is kept from one call to the next; None where
        that cannot be done.

        For drawing on a CPU with many positions, as adapters have that were combined of many: made anew each time, Δ
        costs more than the product. Where anything is trained, traced, compiled or offloaded, where other adapters act,
        and in 16 bits (which would round Δ away), nothing is kept. Looked up without `nn.Module.__getattr__`, because
        in a small model these lookups cost more than the product, too.
        """
        own, modules = self.__dict__, self._modules
        masks, lora_a, lora_b = modules["lora_mask"]._modules, modules["lora_A"]._modules, modules["lora_B"]._modules
        base, merged, in_values = modules["base_layer"], own["merged_adapters"], own["values_form"]
        names = [name for name in self.active_adapters if name in lora_a and name not in merged]
        if (
            own["_disable_adapters"]
            or not names
            or not all(name in in_values for name in names)
            or (own["training"] and any(map(self._drops_out, names)))
            or type(base) not in MASKED_LAYERS
        ):
            return None
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        values = [lora_a[name]._parameters["weight"] for name in names]
        if (
            weight is None  # computed, by weight norm or a parametrisation
            or type(weight) is not nn.Parameter  # packed, by its own class
            or type(x) is not Tensor
            or x.dtype != torch.float32
            or weight.dtype != torch.float32
            or weight.device.type != "cpu"
            or sum(map(Tensor.numel, values)) < DENSE_FROM * weight.numel()
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or is_hooked(base)
            or any(is_hooked(part[name]) for name in names for part in (masks, lora_a, lora_b))
            or any(lora_b[name]._parameters.get("bias") is not None for name in names)
        ):
            return None
        scales = self.scaling
        parts = [
            (masks[name].mask, row, lora_b[name]._parameters["weight"], scales[name])
            for name, row in zip(names, values, strict=True)
        ]
        kept = _dense_deltas.get(self)
        if kept is None or not kept.fits(parts):
            kept = _dense_deltas[self] = _DenseDelta.of(parts, weight.shape)
        return self._base_product(x, weight + kept.delta, bias)

    def _drops_out(self, name: str) -> bool:
        return self.training and not isinstance(self.lora_dropout[name], nn.Identity)

    def _delta(self, name: str, x: Tensor) -> Tensor:
        """x Δᵀ alone (and the adapter's own bias)."""
        return self._product(name, self.lora_dropout[name](x), None, None)

    def _product(self, name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mask, scale = self.lora_mask[name].lent()
        lora_a, _ = _lent(self.lora_A[name])
        lora_b, own_bias = _lent(self.lora_B[name])
        rounded = {}
        if self.rounding is not None and self.rounding.adapter == name and weight is not None:
            rounded = {"rounding_seed": self.rounding.seed, "rounded_weight": self.rounding.weight}
        if self.has_values(name):
            return self._values_product(x, weight, bias, _values(lora_a, lora_b), mask, scale, **rounded)
        if own_bias is not None:
            own_bias = (own_bias * scale).to(x.dtype)
            bias = own_bias if bias is None else bias + own_bias
        return self._factors_product(x, weight, bias, lora_a, lora_b, mask, scale, **rounded)


class MaskedLoraLinear(MaskedLoraLayer, lora.Linear):
    """Masked LoRA on an `nn.Linear`; factors A [r, K] and B [N, r], mask [N, K]."""

    def _base_product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _values_product(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, values: Tensor, mask: BitMask, scale: Tensor,
        **rounded: Any,
    ) -> Tensor:  # fmt: skip
        return masked_values_linear(x, weight, bias, values, mask, scale, **rounded)

    def _factors_product(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, mask: BitMask,
        scale: Tensor, **rounded: Any,
    ) -> Tensor:  # fmt: skip
        return masked_lora_linear(x, weight, bias, lora_a, lora_b, mask, scale, **rounded)


class MaskedLoraConv2d(MaskedLoraLayer, lora.Conv2d):
    """Masked LoRA on an `nn.Conv2d`; factors A [r, C_in, kh, kw] and B [C_out, r, 1, 1], mask [C_out, C_in·kh·kw]."""

    def set_mask(self, adapter_name: str, mask: BitMask) -> None:
        if self.get_base_layer().groups > 1:
            raise FadeError("masked adapters do not support grouped convolutions; do not target this layer")
        super().set_mask(adapter_name, mask)

    def _base_product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.get_base_layer()._conv_forward(x, weight, bias)

    def _values_product(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, values: Tensor, mask: BitMask, scale: Tensor,
        **rounded: Any,
    ) -> Tensor:  # fmt: skip
        base, (x, padding) = self.get_base_layer(), self._padded(x)
        geometry = (base.stride, padding, base.dilation, base.groups)
        return masked_values_conv2d(
            x, weight, bias, values, mask, scale, *geometry, kernel_size=base.kernel_size, **rounded
        )

    def _factors_product(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, mask: BitMask,
        scale: Tensor, **rounded: Any,
    ) -> Tensor:  # fmt: skip
        base, (x, padding) = self.get_base_layer(), self._padded(x)
        geometry = (base.stride, padding, base.dilation, base.groups)
        return masked_lora_conv2d(x, weight, bias, lora_a, lora_b, mask, scale, *geometry, **rounded)

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int] | int]:
        """The input with the padding that is not zeros of a fixed width, and what padding is left for the product."""
        base = self.get_base_layer()
        if base.padding_mode == "zeros" and not isinstance(base.padding, str):
            return x, base.padding
        mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
        return F.pad(x, base._reversed_padding_repeated_twice, mode=mode), 0


MASKED_LAYERS: dict[type[nn.Module], type[MaskedLoraLayer]] = {
    nn.Linear: MaskedLoraLinear,
    nn.Conv2d: MaskedLoraConv2d,
}
"""Which masked layer wraps which module, as registered with PEFT."""


def carries_masks(module: nn.Module) -> bool:
    """Whether a masked layer can wrap a module: a plain Linear or Conv2d, or one whose weight is packed."""
    return type(module) in MASKED_LAYERS or quantisation(module) is not None


def why_unmasked(layer: nn.Module) -> str | None:
    """Why a Linear or Conv2d cannot carry a masked adapter, in words to follow its name; None where it can."""
    if isinstance(layer, nn.Conv2d) and (words := quantisation(layer)) is not None:
        return f"is a quantised convolution ({words}), which masked adapters do not support; do not target it"
    if getattr(layer, "groups", 1) > 1:
        return "is a grouped convolution, which masked adapters do not support; do not target it"
    return None


def takes_product(base: nn.Module) -> bool:
    """Whether one product with the base layer's own weight may take the place of calling the layer."""
    return type(base) in MASKED_LAYERS and is_ordinary(base) and not is_hooked(base)


# --- hooks and offloading --------------------------------------------------------------------------------------------


def is_hooked(module: nn.Module) -> bool:
    """Whether something happens around the module's forward, so that its weight must not be used past it."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or own.get("_hf_hook") is not None
        or own.get("_diffusers_hook") is not None
        or _has_any_global_hook()
    )


def execution_device(base: nn.Module) -> torch.device:
    """Where a layer computes: its weight's device, or where accelerate's hook will put the weight."""
    device = base.weight.device
    if device.type == "meta":
        hook = getattr(base, "_hf_hook", None)
        device = torch.device(getattr(hook, "execution_device", None) or "cpu")
    return device


def groups_on_disk(model: nn.Module) -> list[Any]:
    """diffusers' groups of parameters that lie in files: outside a forward their memory holds nothing."""
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    hooks = (registry.get_hook("group_offloading") for registry in registries if registry is not None)
    groups = (getattr(hook, "group", None) for hook in hooks)
    return [group for group in groups if getattr(group, "offload_to_disk_path", None) is not None]
