"""The sparse adapter on a pipeline: attach, switch, scale, merge, un-merge, save and load it.

It is an ordinary PEFT adapter whose layers are masked (`fade.layers`); its file is `fade.adapter_file`'s.
"""

import dataclasses
import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fade.adapter_file import MOST_SCALE, LayerTensors, read_adapter_file, write_adapter_file
from fade.backbones import backbone_for
from fade.base_model import base_name, fingerprint, refuse_merged, same_base, short_digest, target_layers
from fade.errors import AdapterFileError, FadeError, WrongBaseError
from fade.layers import MASKED_LAYERS, MaskedLoraLayer
from fade_kernels import BitMask, gather_masked


@dataclass(frozen=True)
class MergeReport:
    """What merging did: entries changed, and the largest relative error ‖round(W + Δ) − W − Δ‖ / ‖Δ‖ of a layer."""

    entries: int
    relative_loss: float


class Adapter:
    """A sparse adapter attached to a pipeline's denoiser.

    Made by `fade.unlearn` or `fade.load_adapter`. It is an ordinary PEFT adapter called `name`, so diffusers' own
    calls act on it too; these methods act on it alone and leave other adapters as they are.
    """

    def __init__(self, pipeline: Any, name: str, metadata: dict[str, Any]) -> None:
        self.pipeline = pipeline
        self.name = name
        self.metadata = metadata

    @property
    def denoiser(self) -> nn.Module:
        return self.pipeline.unet

    @property
    def run(self) -> dict[str, Any]:
        """Seconds, peak memory, losses and per-layer statistics of the run that made the adapter."""
        return self.metadata.get("run", {})

    @property
    def layers(self) -> dict[str, MaskedLoraLayer]:
        """The masked layers that carry this adapter, by the name of the layer they wrap."""
        return {
            name: module
            for name, module in self.denoiser.named_modules()
            if isinstance(module, MaskedLoraLayer) and self.name in module.lora_mask
        }

    def parameters(self) -> list[nn.Parameter]:
        """Every tensor that training changes."""
        return [p for layer in self._require_layers().values() for p in layer.adapter_parameters(self.name)]

    def _require_layers(self) -> dict[str, MaskedLoraLayer]:
        layers = self.layers
        if not layers:
            raise FadeError(f"the adapter {self.name!r} is no longer attached; load it again with fade.load_adapter")
        return layers

    @property
    def merged(self) -> bool:
        return any(self.name in layer.merged_adapters for layer in self._require_layers().values())

    @property
    def enabled(self) -> bool:
        return all(
            self.name in layer.active_adapters and not layer.disable_adapters
            for layer in self._require_layers().values()
        )

    def _refuse_while_merged(self) -> None:
        if self.merged:
            raise FadeError(f"the adapter {self.name!r} is merged into the weights; call unmerge() first")

    def enable(self) -> "Adapter":
        """Switches the adapter on, beside those already on."""
        self._refuse_while_merged()
        others = [name for name in active_adapters(self.denoiser) if name != self.name]
        set_active_adapters(self.denoiser, [*others, self.name])
        return self

    def disable(self) -> "Adapter":
        """Switches the adapter off; the pipeline draws what it would without it."""
        self._refuse_while_merged()
        others = [name for name in active_adapters(self.denoiser) if name != self.name]
        set_active_adapters(self.denoiser, others)
        return self

    @property
    def scale(self) -> float:
        """Strength: 1 as trained, 0 nothing, between them a part of the way, beyond 1 more of it."""
        layer = next(iter(self._require_layers().values()))
        return layer.scaling[self.name] * layer.r[self.name] / layer.lora_alpha[self.name]

    @scale.setter
    def scale(self, value: float) -> None:
        self._refuse_while_merged()
        if not (math.isfinite(value) and abs(value) <= MOST_SCALE):
            raise FadeError(f"the scale must be a number between {-MOST_SCALE:g} and {MOST_SCALE:g}, not {value}")
        for layer in self._require_layers().values():
            layer.set_scale(self.name, float(value))

    def merge(self) -> MergeReport:
        """Adds Δ to the base weights, so that drawing costs what it did before. `unmerge` undoes it bit for bit."""
        layers = self._require_layers()
        if self.merged:
            raise FadeError(f"the adapter {self.name!r} is merged already")
        if not self.enabled:
            raise FadeError(f"the adapter {self.name!r} is disabled; enable() it before merging")
        entries, worst = 0, 0.0
        for layer in layers.values():
            mask, weight = layer.lora_mask[self.name].mask, layer.get_base_layer().weight.detach()
            before = gather_masked(weight, mask).double()
            delta = layer.packed_values(self.name).double() * layer.scaling[self.name]
            layer.merge(safe_merge=True, adapter_names=[self.name])
            lost = (gather_masked(weight, mask).double() - before - delta).norm()
            entries += mask.count
            worst = max(worst, (lost / delta.norm()).item() if delta.norm() > 0 else 0.0)
        return MergeReport(entries, worst)

    def unmerge(self) -> "Adapter":
        """Restores every base weight to the bits it had before `merge`; other merged adapters stay merged."""
        if not self.merged:
            raise FadeError(f"the adapter {self.name!r} is not merged")
        for layer in self._require_layers().values():
            others = [name for name in layer.merged_adapters if name != self.name]
            layer.unmerge()
            if others:
                layer.merge(adapter_names=others)
        return self

    def remove(self) -> None:
        """Takes the adapter off the pipeline; the base weights are what they were."""
        if self.merged:
            self.unmerge()
        self.denoiser.delete_adapters(self.name)
        if not getattr(self.denoiser, "peft_config", None):
            # The last one takes PEFT's wrappers along, so that the model saves under its own parameter names again.
            self.denoiser.unload_lora()

    def save(self, path: str | Path) -> int:
        """Writes the adapter to one safetensors file and returns its bytes. Raises FadeError where it cannot."""
        layers = {}
        for name, layer in self._require_layers().items():
            mask = layer.lora_mask[self.name].mask
            parameters = [p.detach() for p in layer.adapter_parameters(self.name)]
            layers[name] = (
                LayerTensors(mask, values=parameters[0])
                if len(parameters) == 1
                else LayerTensors(mask, factors=(parameters[0], parameters[1]))
            )
        return write_adapter_file(path, self.metadata, layers)

    def __repr__(self) -> str:
        concept = self.metadata["concept"]
        return f"Adapter({self.name!r}: forgets {concept['forget']!r} as {concept['surrogate']!r})"


def check_name(denoiser: nn.Module, name: str) -> None:
    """Raises FadeError where an adapter cannot be called `name` on this denoiser."""
    if name in getattr(denoiser, "peft_config", {}):
        raise FadeError(f"the pipeline already has an adapter called {name!r}; choose another name or remove it")
    if not name.isidentifier():
        raise FadeError(
            f"the adapter name {name!r} must be letters, digits and underscores, and not begin with a digit"
        )


def attach(
    pipeline: Any,
    name: str,
    masks: Mapping[str, BitMask],
    *,
    rank: int,
    alpha: float,
    values: bool,
    metadata: dict[str, Any],
) -> Adapter:
    """Injects an adapter through PEFT into the layers named in `masks`, with factors (A normal, B zero) or zero values.

    Raises FadeError where the name is taken, a layer does not exist or does not fit, or no mask selects anything.
    """
    denoiser = pipeline.unet
    check_name(denoiser, name)
    refuse_merged(denoiser)
    masks = {layer: mask for layer, mask in masks.items() if mask.count}
    if not masks:
        raise FadeError("the mask selects no weight in any target layer; raise keep or widen the targets")
    layers = target_layers(denoiser)
    for layer, mask in masks.items():
        if layer not in layers:
            raise FadeError(f"the model has no Linear or Conv2d layer {layer}; was the adapter made for another model?")
        weight = layers[layer].weight
        if (weight.shape[0], weight[0].numel()) != mask.shape:
            raise FadeError(f"the adapter's mask of {layer} is {mask.shape}, the layer's weight {tuple(weight.shape)}")
        if getattr(layers[layer], "groups", 1) > 1:
            raise FadeError(f"{layer} is a grouped convolution, which masked adapters do not support; do not target it")

    for layer in masks:
        module = denoiser.get_submodule(layer)
        if isinstance(module, lora.LoraLayer) and not isinstance(module, MaskedLoraLayer):
            MASKED_LAYERS[type(module.get_base_layer())].adopt(module)
    config = LoraConfig(
        r=1 if values else rank,
        lora_alpha=alpha,
        target_modules=sorted(masks),
        lora_dropout=0.0,
        bias="none",
        init_lora_weights="gaussian",
    )
    config._register_custom_module(MASKED_LAYERS)
    denoiser.add_adapter(config, adapter_name=name)
    adapter = Adapter(pipeline, name, metadata)
    for layer, mask in masks.items():
        module = denoiser.get_submodule(layer)
        if values:
            module.set_values(name, mask, torch.zeros(mask.count))
        else:
            module.set_mask(name, mask)
            # PEFT makes them in the weight's dtype; a step of training is smaller than half an ulp of 16 bits.
            for factor in module.adapter_parameters(name):
                factor.data = factor.data.float()
    denoiser.requires_grad_(False)
    return adapter


def load_adapter(
    pipeline: Any, path: str | Path, name: str = "fade", scale: float = 1.0, check_base: bool = True
) -> Adapter:
    """Attaches an adapter file to a pipeline and switches it on.

    Raises AdapterFileError for a bad file, WrongBaseError where the pipeline's weights are not those that the adapter
    was trained on (`check_base=False` overrides), and FadeError where the name is taken or a layer does not fit.
    """
    backbone = backbone_for(pipeline)
    file = read_adapter_file(path)
    if check_base:
        found = fingerprint(backbone.denoiser)
        trained_on = file.metadata["fingerprint"]
        if not same_base(trained_on, found):
            raise WrongBaseError(
                f"{path} was trained on {file.metadata.get('base', 'another model')} ({short_digest(trained_on)}), but "
                f"this pipeline is {base_name(pipeline)} ({short_digest(found)}). Load the base it was made for, "
                "or pass --any-base (in Python: check_base=False)"
            )
    first = next(iter(file.layers.values()), None)
    if first is None:
        raise AdapterFileError(f"{path} holds no layer")
    values = first.factors is None
    rank = 1 if values else first.factors[0].shape[0]
    active = active_adapters(backbone.denoiser)
    adapter = attach(
        pipeline,
        name,
        {layer: tensors.mask for layer, tensors in file.layers.items()},
        rank=rank,
        alpha=float(file.metadata["scale"]) * rank,
        values=values,
        metadata=file.metadata,
    )
    try:
        with torch.no_grad():
            for layer, tensors in file.layers.items():
                if layer not in adapter.layers:
                    continue
                parameters = adapter.layers[layer].adapter_parameters(name)
                for parameter, tensor in zip(parameters, tensors.factors or (tensors.values,), strict=True):
                    parameter.copy_(tensor.view(parameter.shape))
        set_active_adapters(backbone.denoiser, [*active, name])
        adapter.scale = scale
    except BaseException:
        adapter.remove()
        set_active_adapters(backbone.denoiser, active)
        raise
    return adapter


def active_adapters(denoiser: nn.Module) -> list[str]:
    """Names of the adapters that are on, in the order in which they were switched on."""
    for module in denoiser.modules():
        if isinstance(module, BaseTunerLayer):
            return [] if module.disable_adapters else list(module.active_adapters)
    return []


def set_active_adapters(denoiser: nn.Module, names: Sequence[str]) -> None:
    """Switches exactly these adapters on, without gradients."""
    for module in denoiser.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(True)
            module.set_adapter(list(names))
            for layer_name in module.adapter_layer_names:
                getattr(module, layer_name).requires_grad_(False)


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    return {
        package: importlib.metadata.version(package)
        for package in ("fade-unlearning", "torch", "diffusers", "transformers", "peft", "safetensors")
    }


def new_metadata(concept: Any, config: Any, base: str, digests: Mapping[str, str], scale: float) -> dict[str, Any]:
    """Metadata of an adapter to be trained; the run record joins it at the end."""
    return {
        "concept": dataclasses.asdict(concept),
        "config": config.to_dict(),
        "base": base,
        "fingerprint": dict(digests),
        "scale": scale,
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
