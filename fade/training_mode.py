"""How the student's layers compute with W + Δ in 16 bits while they are trained: exactly, or in one product.

Exact: x Wᵀ + x Δᵀ summed in float32 and rounded once, which on a GPU costs a second product. One product: y = x W'ᵀ
and dX = dY W', where W' is W + Δ rounded to 16 bits up or down at random, so that its mean over the steps is W + Δ
(stochastic rounding, Gupta et al., arXiv 1502.02551); rounded to nearest, whatever is smaller than half the spacing of
W would never be seen. The rounding is drawn from the step, so both passes, a recomputation of them and a resumed run
see the same W'. The adapter's gradients are those of either mode. Only the student is trained with W': the teacher is
the frozen model, and what is judged or drawn is exact.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from fade.layers import MaskedLoraLayer, Rounding, takes_product
from fade_kernels import choices, effective_weights, effective_weights_from_values, weight_shape
from fade_kernels.mask_facts import OCCUPANCY_TILE

Plan = Literal["kept", "refilled"]

WHERE_EXACT_COSTS = ("cuda",)
"""Devices on which the exact mode costs a second product. The CPU's kernels take W + Δ in float32 in one."""

KEPT_SHARE = 1 / 16
"""Of the device's memory that kept weights may take."""


def memory_plan(kept_bytes: int, device_bytes: int) -> Plan:
    """Where the rounded weights of a step live.

    `kept`: made once a step for all layers together, in memory of their own, 2 N K bytes a layer: for the attention
    projections of SD 1.5 0.19 GB, of SDXL 1.9 GB, of FLUX.1 5.0 GB. `refilled`: made by each product for itself,
    forward and again for dX, in memory of one layer at a time: 3.3 MB at 1280 x 1280, 19 MB at 3072 x 3072.

    Kept where that takes no more than `KEPT_SHARE` of the device. Of the whole device and not of what is free: a
    resumed run must round as the interrupted one did, and the two plans draw other bits.
    """
    return "kept" if kept_bytes <= KEPT_SHARE * device_bytes else "refilled"


def device_memory(device: torch.device) -> int:
    """Bytes of a CUDA device, else of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


@dataclass(frozen=True)
class ResolvedMode:
    """What `overwrite.training_mode` comes to for the layers of one adapter."""

    adapter: str
    one_product: list[MaskedLoraLayer]
    """The layers that train in one product; all others are exact."""
    exact: int
    """How many others there are."""
    plan: Plan | None
    reasons: tuple[str, ...]
    """Why the others are exact."""
    _kept: list[Tensor] = field(default_factory=list, repr=False)

    @staticmethod
    def of(
        asked: str,
        adapter: str,
        layers: Sequence[MaskedLoraLayer],
        rows: Callable[[], Sequence[int]],
        keep: bool = False,
    ) -> "ResolvedMode":
        """Resolves "exact", "one-product" or "auto" for each layer.

        Args:
            adapter: the adapter that is trained; others that act beside it are added as always.
            rows: tells each layer's rows (`rows_in`) in one training step; asked only where "auto" needs it.
            keep: keep the rounded weights whatever they take.
        """
        why = [_why_exact(asked, layer) for layer in layers]
        if asked == "auto" and not all(why):
            for i, (layer, count) in enumerate(zip(layers, rows(), strict=True)):
                why[i] = why[i] or _why_exact_by_cost(adapter, layer, count)
        chosen = [layer for layer, reason in zip(layers, why, strict=True) if reason is None]
        reasons = tuple(dict.fromkeys(filter(None, why)))
        if not chosen:
            return ResolvedMode(adapter, [], len(layers), None, reasons)
        weights = [layer.get_base_layer().weight for layer in chosen]
        needed = sum(weight.numel() * weight.itemsize for weight in weights)
        plan = "kept" if keep else memory_plan(needed, device_memory(weights[0].device))
        kept = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights] if plan == "kept" else []
        return ResolvedMode(adapter, chosen, len(layers) - len(chosen), plan, reasons, kept)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Training step `number`, from its first forward pass to the end of its last backward pass."""
        try:
            if self.plan == "kept":
                self._round(number)
            for index, layer in enumerate(self.one_product):
                if self.plan == "kept":
                    layer.rounding = Rounding(self.adapter, weight=self._kept[index])
                else:  # with a seed of its own, or layers of one shape would all be rounded alike
                    layer.rounding = Rounding(self.adapter, seed=number * len(self.one_product) + index)
            yield
        finally:
            for layer in self.one_product:
                layer.rounding = None

    def _round(self, seed: int) -> None:
        """Makes the kept weights from what the adapter is now."""
        masks, tensors, scales = [], [], []
        for layer in self.one_product:
            mask, parts = layer.adapter_tensors(self.adapter)
            masks.append(mask)
            tensors.append(parts)
            scales.append(layer.lora_mask[self.adapter].scale)
        weights = [layer.get_base_layer().weight for layer in self.one_product]
        make = effective_weights if len(tensors[0]) == 2 else effective_weights_from_values
        make(weights, *zip(*tensors, strict=True), masks, scales, out=self._kept, stochastic=True, seed=seed)

    def record(self, asked: str) -> dict[str, Any]:
        """What a run's record says of it: which mode was `asked` for and `used` ("mixed" where layers differ), in how
        many layers, where the rounded weights were, and why layers are exact."""
        used = "exact" if not self.one_product else "mixed" if self.exact else "one-product"
        return {
            "asked": asked,
            "used": used,
            "layers": {"one-product": len(self.one_product), "exact": self.exact},
            **({"rounded_weights": self.plan} if self.plan else {}),
            **({"exact_because": list(self.reasons)} if self.exact and asked != "exact" else {}),
        }


def rows_in(layers: Sequence[MaskedLoraLayer], call: Callable[[], Any]) -> list[int]:
    """Rows of each layer's product in what `call` does: tokens of a linear layer, output pixels of a convolution."""
    rows = [0] * len(layers)

    def count(index: int, output: Tensor) -> None:
        rows[index] += output.numel() // weight_shape(layers[index].get_base_layer())[0]

    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, output, index=index: count(index, output))
        for index, layer in enumerate(layers)
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def _why_exact(asked: str, layer: MaskedLoraLayer) -> str | None:
    """Why a layer trains exactly whatever it would cost; None where it may train in one product."""
    base = layer.get_base_layer()
    if asked == "exact":
        return "asked for"
    if not takes_product(base):
        return "the weight is computed, quantised or fetched by hooks"
    weight = base.weight
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"nothing to round in {str(weight.dtype).removeprefix('torch.')}"
    if asked == "auto" and weight.device.type not in WHERE_EXACT_COSTS:
        return f"it costs no second product on {weight.device.type}"
    return None


def _why_exact_by_cost(adapter: str, layer: MaskedLoraLayer, rows: int) -> str | None:
    weight, mask = layer.get_base_layer().weight, layer.lora_mask[adapter].mask
    occupancy = mask.occupancy(OCCUPANCY_TILE).float().mean().item()
    mode = choices.choose_training_mode(weight.dtype, rows, *mask.shape, mask.density, occupancy)
    return None if mode == "one-product" else "the cost model prefers it"
