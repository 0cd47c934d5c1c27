"""The sparse adapter on a pipeline: attach, switch, scale, merge, un-merge, save and load it, and say what is on.

It is an ordinary PEFT adapter whose layers are masked (`fade.layers`, `fade.tuner`); its file is `fade.adapter_file`'s.
"""

import contextlib
import importlib.metadata
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fade.adapter_file import MOST_SCALE, LayerTensors, write_adapter_file
from fade.backbones import denoiser_of
from fade.base_model import (
    BaseLayer,
    base_layers,
    base_name,
    check_same_base,
    fingerprint,
    own_modules,
    refuse_merged,
    refuse_on_disk,
    short_digest,
    under_fused_projections,
)
from fade.errors import AdapterFileError, FadeError
from fade.guards import put_guards, remove_guards
from fade.layers import MaskedLoraLayer, execution_device, groups_on_disk, why_unmasked
from fade.noise import step_generator
from fade.peft_file import read_any_file
from fade.regions import matrix_shape
from fade.rollback import merges_as_found, structure_as_found_on_error
from fade.tuner import Configurations, FadeConfig, bare_name, exactly
from fade_kernels import BitMask, gather_masked, weight_shape

if TYPE_CHECKING:
    from fade.export.edit import ExportReport


@dataclass(frozen=True)
class MergeReport:
    """What merging did: entries changed, and the largest relative error ‖round(W + Δ) − W − Δ‖ / ‖Δ‖ of a layer."""

    entries: int
    relative_loss: float


class Adapter:
    """A sparse adapter attached to a pipeline's denoiser.

    Made by `fade.unlearn` or `fade.load_adapter`; `fade.adapters(pipeline)` gives the handles of those attached. It is
    a PEFT adapter called `name`, so diffusers' own calls act on it too; these methods act on it alone and leave other
    adapters as they are. Its scale belongs to the pipeline and is not saved with it.

    Layers are changed one after another and nothing is locked: what another thread draws on the same model meanwhile
    raises no error but may mix both states, and nothing may be attached or removed then; pipelines with denoisers of
    their own (`copy.deepcopy`) never disturb each other.
    """

    def __init__(self, pipeline: Any, name: str, metadata: dict[str, Any] | None = None) -> None:
        """A handle of the adapter `name` on a pipeline, or on a denoiser alone; attaches nothing."""
        self.pipeline = pipeline
        self.name = name
        if metadata is None:
            config = getattr(self.denoiser, "peft_config", {}).get(name)
            if not isinstance(config, FadeConfig):
                raise FadeError(f"there is no FADE adapter {name!r} on this pipeline; fade.status(pipeline) lists them")
            metadata = config.metadata
        self.metadata = metadata

    @property
    def denoiser(self) -> nn.Module:
        """The model that carries the adapter, without what torch.compile wraps around it."""
        return denoiser_of(self.pipeline)[1]

    @property
    def run(self) -> dict[str, Any]:
        """Seconds, peak memory, losses and per-layer statistics of the run that made the adapter."""
        return self.metadata.get("run", {})

    @property
    def layers(self) -> dict[str, MaskedLoraLayer]:
        """The masked layers that carry this adapter, by the name of the layer they wrap. Walks the model."""
        return masked_layers(self.denoiser, self.name)

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
        """Whether the adapter is in the weights of any layer."""
        return any(self.name in layer.merged_adapters for layer in self.layers.values())

    @property
    def enabled(self) -> bool:
        """Whether the adapter acts in every layer that it has: attached, and switched on or merged."""
        layers = self.layers
        return bool(layers) and all(
            self.name in layer.merged_adapters or self.name in layer.acting() for layer in layers.values()
        )

    @property
    def pinned(self) -> bool:
        """Whether the adapter stays on whatever is done to others."""
        return any(self.name in layer.pinned for layer in self.layers.values())

    def _refuse_while_merged(self, layers: Mapping[str, MaskedLoraLayer]) -> None:
        if any(self.name in layer.merged_adapters for layer in layers.values()):
            raise FadeError(f"the adapter {self.name!r} is merged into the weights; call unmerge() first")

    def _refuse_fused(self, layers: Mapping[str, MaskedLoraLayer]) -> None:
        if not under_fused_projections(self.denoiser).isdisjoint(layers.values()):
            raise FadeError(
                f"the projections are drawn with as fused copies, which would keep {self.name!r} as it is now; call "
                "unfuse_qkv_projections() first"
            )

    def enable(self) -> "Adapter":
        """Switches the adapter on, beside those already on."""
        return self._switch(True)

    def disable(self) -> "Adapter":
        """Switches the adapter off; the pipeline draws what it would without it."""
        return self._switch(False)

    def _switch(self, on: bool) -> "Adapter":
        layers = self._require_layers()
        self._refuse_while_merged(layers)
        self._refuse_fused(layers)
        with structure_as_found_on_error(layers.values()):
            for layer in layers.values():
                layer.switch(self.name, on)
        return self

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Off within a `with` block, and afterwards as it was."""
        layers = self._require_layers().values()
        before = [(layer, list(layer.active_adapters)) for layer in layers if self.name in layer.active_adapters]
        self.disable()
        try:
            yield
        finally:
            for layer, active in before:
                if self.name in layer.lora_mask:
                    now = [name for name in layer.active_adapters if name not in active]
                    kept = [name for name in active if name == self.name or name in layer.active_adapters]
                    layer._active_adapter = kept + now

    @property
    def scale(self) -> float:
        """Strength: 1 as trained, 0 nothing, between them a part of the way, beyond 1 more of it.

        Raises FadeError where layers have different ones (diffusers' weights by block); `scales` gives them.
        """
        scales = set(self.scales.values())
        if len(scales) > 1:
            raise FadeError(f"the layers of {self.name!r} have different scales; adapter.scales gives them")
        return scales.pop()

    @property
    def scales(self) -> dict[str, float]:
        """Strength by layer; of one that is merged, the strength with which it was."""
        return {
            # An alpha of 0 is a file that does nothing at any strength.
            name: layer.present_scale(self.name) / (layer.full_scale(self.name) or 1.0)
            for name, layer in self._require_layers().items()
        }

    @scale.setter
    def scale(self, value: float) -> None:
        layers = self._require_layers()
        self._refuse_while_merged(layers)
        if not (math.isfinite(value) and abs(value) <= MOST_SCALE):
            raise FadeError(f"the scale must be a number between {-MOST_SCALE:g} and {MOST_SCALE:g}, not {value}")
        masks = [layer.lora_mask[self.name] for layer in layers.values()]
        with structure_as_found_on_error([*layers.values(), *masks]):
            for layer in layers.values():
                layer.set_scale(self.name, float(value))

    def merge(self) -> MergeReport:
        """Adds Δ to the base weights, so that drawing costs what it did before. `unmerge` undoes it bit for bit.

        It then stays whatever is done to adapters, until `unmerge` or `remove`. All layers are merged or none.
        """
        layers = self._require_layers()
        if self.merged:
            raise FadeError(f"the adapter {self.name!r} is merged already")
        if not self.enabled:
            raise FadeError(f"the adapter {self.name!r} is disabled; enable() it before merging")
        refuse_on_disk(self.denoiser, "merge the adapter before enable_group_offload")
        self._refuse_fused(layers)
        for layer in layers.values():
            try:
                layer.check_mergeable()
            except FadeError as error:
                raise FadeError(f"the adapter {self.name!r} was not merged: {error}") from error
            for other in layer.acting():
                if layer.use_dora.get(other):
                    raise FadeError(
                        f"the DoRA adapter {other!r} would be measured against other weights once {self.name!r} is "
                        f"merged; switch {other!r} off or delete it first"
                    )
        entries, worst = 0, 0.0
        try:
            with merges_as_found(layers.values(), on_error_alone=True):
                for layer in layers.values():
                    mask, weight = layer.lora_mask[self.name].mask, layer.get_base_layer().weight.detach()
                    before = gather_masked(weight, mask).double()
                    layer.merge(safe_merge=True, adapter_names=[self.name], held=True)
                    delta = layer.packed_values(self.name).double() * layer.scaling[self.name]
                    lost = (gather_masked(weight, mask).double() - before - delta).norm()
                    entries += mask.count
                    worst = max(worst, (lost / delta.norm()).item() if delta.norm() > 0 else 0.0)
        except ValueError as error:
            raise FadeError(f"the adapter {self.name!r} was not merged: {error}") from error
        return MergeReport(entries, worst)

    def unmerge(self) -> "Adapter":
        """Restores every base weight to the bits it had before `merge`; other merged adapters stay merged."""
        layers = self.layers
        if not any(self.name in layer.merged_adapters for layer in layers.values()):
            raise FadeError(f"the adapter {self.name!r} is not merged")
        self._refuse_fused(layers)
        with merges_as_found(layers.values(), on_error_alone=True):
            for layer in layers.values():
                if self.name in layer.merged_adapters:
                    layer.take_out(self.name)
        return self

    def remove(self) -> None:
        """Takes the adapter off the pipeline; the base weights are what they were."""
        self._refuse_fused(self._require_layers())
        _discard(self.denoiser, self.name)

    def save(self, path: str | Path) -> int:
        """Writes the adapter to one safetensors file and returns its bytes. Raises FadeError where it cannot."""
        with self._layer_tensors() as layers:
            return write_adapter_file(path, self.metadata, layers)

    def export(self, path: str | Path, format: str = "lora", **options: Any) -> "ExportReport":
        """Writes the adapter as it draws now, its strength included, to a file that programs without this package load.

        `format` is `lora`, `shira`, `diff` or `merged`; `fade.export` says what each is and which options it takes
        (`keys`, `lossy`, `rank`, `dtype`, `single_file`, `overwrite`). Raises FadeError where that would not be exact
        and `lossy` was not passed, where the target exists and `overwrite` was not, and where it cannot be written.
        """
        from fade.export import export
        from fade.export.edit import Edit

        scales = {name: layer.present_scale(self.name) for name, layer in self._require_layers().items()}
        with self._layer_tensors() as layers:
            return export(Edit(self.metadata, layers, scales, adapter=self), path, format, **options)

    @contextlib.contextmanager
    def _layer_tensors(self) -> Iterator[dict[str, LayerTensors]]:
        """The adapter's masks and tensors by layer, at hand meanwhile also where weights are offloaded to a disk."""
        groups = groups_on_disk(self.denoiser)
        try:
            for group in groups:
                group.onload_()
            layers = {}
            for name, layer in self._require_layers().items():
                mask, tensors = layer.adapter_tensors(self.name)
                kernel = tuple(weight_shape(layer.get_base_layer())[2:])
                layers[name] = (
                    LayerTensors(mask, values=tensors[0], kernel=kernel)
                    if len(tensors) == 1
                    else LayerTensors(mask, factors=(tensors[0], tensors[1]), kernel=kernel)
                )
            yield layers
        finally:
            for group in groups:
                group.offload_()

    def __repr__(self) -> str:
        concept = self.metadata.get("concept", {})
        return f"Adapter({self.name!r}: forgets {concept.get('forget')!r} as {concept.get('surrogate')!r})"


def masked_layers(denoiser: nn.Module, name: str) -> dict[str, MaskedLoraLayer]:
    """The masked layers that carry the adapter `name`, by the name of the layer they wrap in the bare model."""
    found = {}
    for path, module in denoiser.named_modules():
        if isinstance(module, MaskedLoraLayer) and name in module.lora_mask:
            found[bare_name(path)] = module
    return found


def adapters(pipeline: Any) -> dict[str, Adapter]:
    """Handles of the FADE adapters attached to a pipeline (or to a denoiser), by name."""
    configs = getattr(denoiser_of(pipeline)[1], "peft_config", {})
    return {name: Adapter(pipeline, name) for name, config in configs.items() if isinstance(config, FadeConfig)}


# --- what is on ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter on a model, FADE's or another: what it is and whether it acts."""

    name: str
    kind: str
    """`FADE`, or PEFT's name of the method, such as `LORA`."""
    forgets: str
    state: str
    """`on`, `off`, `merged`, or `partly on` where layers differ."""
    scale: float | None
    """Strength of a FADE adapter; None for others, and where layers differ."""
    pinned: bool
    layers: int


class Status(tuple[AdapterStatus, ...]):
    """What is attached to a model; printed, it is a table."""

    def __repr__(self) -> str:
        head = ("adapter", "kind", "forgets", "state", "scale", "pinned", "layers")
        rows = [
            (
                row.name, row.kind, row.forgets or "-", row.state, "-" if row.scale is None else f"{row.scale:g}",
                "yes" if row.pinned else "no", str(row.layers),
            )
            for row in self
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows))
        return "\n".join(line.rstrip() for line in lines) if rows else "no adapter is attached"

    __str__ = __repr__


def status(pipeline: Any) -> Status:
    """Every adapter on a pipeline's denoiser (or on a denoiser itself) and whether it acts, as a table."""
    denoiser = denoiser_of(pipeline)[1]
    rows = []
    for name, config in getattr(denoiser, "peft_config", {}).items():
        masked = isinstance(config, FadeConfig)
        tuners = (m for m in denoiser.modules() if isinstance(m, BaseTunerLayer))
        layers = [m for m in tuners if name in m._get_available_adapters()]
        states = {
            "merged" if name in m.merged_adapters
            else "on" if name in m.active_adapters and not m.disable_adapters
            else "off"
            for m in layers
        }  # fmt: skip
        scales = set(Adapter(pipeline, name).scales.values()) if masked and layers else set()
        rows.append(
            AdapterStatus(
                name=name,
                kind=str(getattr(config.peft_type, "value", config.peft_type)),
                forgets=config.forgets if masked else "",
                state=states.pop() if len(states) == 1 else "partly on" if states else "off",
                scale=scales.pop() if len(scales) == 1 else None,
                pinned=any(name in getattr(m, "pinned", {}) for m in layers),
                layers=len(layers),
            )
        )
    return Status(rows)


@contextlib.contextmanager
def adapters_off(denoiser: nn.Module) -> Iterator[None]:
    """Every adapter off meanwhile, so that the model is its base; afterwards each is on, off, or in training as before.

    An adapter attached meanwhile is off afterwards.
    """
    layers = [m for m in denoiser.modules() if isinstance(m, BaseTunerLayer)]
    states = [(layer, list(layer.active_adapters), layer.disable_adapters, _suspended(layer)) for layer in layers]
    kept = [m for m in denoiser.modules() if isinstance(m, AuxiliaryTrainingWrapper) and not m.disable_adapters]
    with gradients_as_found(denoiser):
        try:
            for layer in layers:
                BaseTunerLayer.set_adapter(layer, [])
                layer._disable_adapters = False
            for wrapper in kept:
                wrapper.enable_adapters(False)
            yield
        finally:
            before = {id(layer) for layer in layers}
            for layer in denoiser.modules():
                if isinstance(layer, BaseTunerLayer) and id(layer) not in before:
                    BaseTunerLayer.set_adapter(layer, [])
            for layer, active, disabled, suspended in states:
                BaseTunerLayer.set_adapter(layer, active)
                layer._disable_adapters = disabled
                if isinstance(layer, MaskedLoraLayer):
                    layer.suspended = suspended
            for wrapper in kept:
                wrapper.enable_adapters(True)


def _suspended(layer: BaseTunerLayer) -> list[str]:
    return list(layer.suspended) if isinstance(layer, MaskedLoraLayer) else []


@contextlib.contextmanager
def gradients_as_found(denoiser: nn.Module) -> Iterator[None]:
    """Parameters that are there before need gradients afterwards where they did before, and nowhere else."""
    before = [(parameter, parameter.requires_grad) for parameter in denoiser.parameters()]
    try:
        yield
    finally:
        for parameter, needed in before:
            if parameter.requires_grad != needed and not parameter.is_inference():
                parameter.requires_grad_(needed)


# --- attaching -------------------------------------------------------------------------------------------------------


def check_name(denoiser: nn.Module, name: str) -> None:
    """Raises FadeError where an adapter cannot be called `name` on this denoiser."""
    if name in getattr(denoiser, "peft_config", {}):
        raise FadeError(f"the pipeline already has an adapter called {name!r}; choose another name or remove it")
    if not name.isidentifier():
        raise FadeError(
            f"the adapter name {name!r} must be letters, digits and underscores, and not begin with a digit"
        )
    # Adapters are entries of ModuleDicts, whose own attributes are no names.
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name) or name in vars(nn.ModuleDict()):
        raise FadeError(f"an adapter cannot be called {name!r}, which PyTorch uses itself; choose another name")


Initial = Callable[[str, BitMask], tuple[Tensor, ...]]
"""The first tensors of a layer, by its name and mask: (values,) or (A, B)."""


def attach(
    pipeline: Any,
    name: str,
    masks: Mapping[str, BitMask],
    *,
    rank: int,
    alpha: float,
    values: bool,
    metadata: dict[str, Any],
    seed: int = 0,
    pinned: bool = True,
    solved: Mapping[str, Tensor] | None = None,
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> Adapter:
    """Attaches a new adapter to the layers named in `masks`, switched off: `factors` (A [rank, K], B [N, rank]) by
    layer, else A normal with a deviation of 1/rank and B zero; or values: those `solved` [nnz] by layer, else zeros.
    Nothing else on the model changes.

    `seed` makes the factors; torch's global generator is neither used nor set. A `pinned` adapter stays on whatever is
    done to others. Raises FadeError where the name is taken, a layer does not exist, does not fit or cannot carry a
    masked adapter, or where no mask selects anything.
    """
    layers = base_layers(denoiser_of(pipeline)[1])

    def initial(layer: str, mask: BitMask) -> tuple[Tensor, ...]:
        if values and solved is not None:
            return (solved[layer],)
        if values:
            return (torch.zeros(mask.count, dtype=torch.float32, device="cpu"),)
        if factors is not None:
            return factors[layer]
        rows, *rest = weight_shape(layers[layer].module)
        generator = step_generator(seed, f"init {layer}", 0)
        lora_a = torch.randn(rank, *rest, generator=generator, dtype=torch.float32, device="cpu") / rank
        return lora_a, torch.zeros(rows, rank, *(1 for _ in rest[1:]), dtype=torch.float32, device="cpu")

    return _attach(pipeline, name, masks, layers, initial, rank, alpha, values, metadata, pinned)


def _attach(
    pipeline: Any,
    name: str,
    masks: Mapping[str, BitMask],
    layers: Mapping[str, BaseLayer],
    initial: Initial,
    rank: int,
    alpha: float,
    values: bool,
    metadata: dict[str, Any],
    pinned: bool,
    scale: float | None = None,
) -> Adapter:
    """Attaches an adapter: off, or on with the strength `scale`."""
    denoiser = denoiser_of(pipeline)[1]
    check_name(denoiser, name)
    refuse_merged(denoiser)
    masks = {layer: mask for layer, mask in masks.items() if mask.count}
    if not masks:
        raise FadeError("the mask selects no weight in any target layer; raise keep or widen the targets")
    check_carriers(denoiser, layers, masks)
    for layer, mask in masks.items():
        shape = weight_shape(layers[layer].module)
        if matrix_shape(layers[layer].module) != mask.shape:
            raise FadeError(f"the adapter's mask of {layer} is {mask.shape}, the layer's weight {shape}")
    paths = {layers[layer].path: layer for layer in masks}
    config = FadeConfig(
        r=1 if values else rank,
        lora_alpha=alpha,
        target_modules=exactly(paths),
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=False,
        inference_mode=True,
        pinned=pinned,
        metadata=metadata,
    )
    # Under inference mode tensors would be made that nothing could train or change later.
    with torch.inference_mode(False), torch.no_grad():
        try:
            with structure_as_found_on_error(_outermost(pipeline).modules()):
                with gradients_as_found(denoiser), _switches_as_found(denoiser):
                    with warnings.catch_warnings(), torch.device("meta"):
                        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                        inject_adapter_in_model(config, denoiser, name)
                    if hasattr(denoiser, "_hf_peft_config_loaded"):
                        denoiser._hf_peft_config_loaded = True
                    _share_configurations(pipeline, denoiser, Configurations(denoiser.peft_config))
                    for path, layer in paths.items():
                        _fill(denoiser.get_submodule(path), name, masks[layer], initial(layer, masks[layer]))
                    put_guards(denoiser)
                    _offload_anew(denoiser)
                adapter = Adapter(pipeline, name, metadata)
                if scale is not None:
                    adapter.scale = scale
                    adapter.enable()
        except BaseException as error:
            _offload_anew(denoiser)
            if isinstance(error, ValueError) and not isinstance(error, FadeError):
                raise FadeError(f"the adapter {name!r} was not attached: {error}") from error
            raise
    return adapter


def check_carriers(denoiser: nn.Module, layers: Mapping[str, BaseLayer], names: Collection[str]) -> None:
    """Raises FadeError naming the first of these layers that cannot carry a masked adapter; `layers` are all."""
    fused = under_fused_projections(denoiser)
    for name in names:
        layer = layers.get(name)
        if layer is None:
            others = [module for own, _, module in own_modules(denoiser) if own == name]
            if not others:
                raise FadeError(f"the model has no layer {name}; was the adapter made for another model?")
            kind = f"{type(others[-1]).__module__}.{type(others[-1]).__name__}"
            raise FadeError(
                f"{name} is a {kind}, where an adapter needs a plain Linear or Conv2d: load it into the model as it "
                "was before quantisation, weight norm or other wrapping"
            )
        if (why := why_unmasked(layer.module)) is not None:
            raise FadeError(f"{name} {why}")
        if "original_module" in layer.path.split("."):
            raise FadeError(
                f"the layer {name} is trained whole by another adapter (modules_to_save), which replaces it; delete "
                "that adapter first"
            )
        if layer.path.endswith("._orig_mod"):
            raise FadeError(
                f"the layer {name} was compiled by itself, which ties the compiled call to it; attach the adapter "
                "first and compile then, or compile the model or a block around the layer"
            )
        if layer.module in fused:
            raise FadeError(f"the projections around {name} are fused copies; call unfuse_qkv_projections() first")


def _fill(layer: MaskedLoraLayer, name: str, mask: BitMask, tensors: tuple[Tensor, ...]) -> None:
    """Gives an injected, still empty adapter of a layer its mask and tensors, in float32: a step of training is smaller
    than half an ulp of 16 bits."""
    if len(tensors) == 1:
        layer.set_values(name, mask, tensors[0].float())
    else:
        device = execution_device(layer.get_base_layer())
        for factors, tensor in zip((layer.lora_A, layer.lora_B), tensors, strict=True):
            shape = factors[name].weight.shape
            factors[name].weight = nn.Parameter(tensor.to(device, torch.float32).reshape(shape), requires_grad=False)
        layer.set_mask(name, mask)
    for factors in (layer.lora_A, layer.lora_B):
        factors[name].requires_grad_(False)


@contextlib.contextmanager
def _switches_as_found(denoiser: nn.Module) -> Iterator[None]:
    """PEFT switches on what it injects, and all that was off: afterwards what was on is on, and nothing else."""
    states = [
        (module, list(module.active_adapters), module.disable_adapters, _suspended(module))
        for module in denoiser.modules()
        if isinstance(module, BaseTunerLayer)
    ]
    try:
        yield
    finally:
        before = {id(module) for module, *_ in states}
        active = next((active for _, active, *_ in states), [])
        disabled = any(disabled for _, _, disabled, _ in states)
        for module in denoiser.modules():
            if isinstance(module, BaseTunerLayer) and id(module) not in before:
                module._active_adapter, module._disable_adapters = list(active), disabled
        for module, active, disabled, suspended in states:
            module._active_adapter, module._disable_adapters = active, disabled
            if isinstance(module, MaskedLoraLayer):
                module.suspended = suspended


def _share_configurations(pipeline: Any, denoiser: nn.Module, configurations: Configurations) -> None:
    """A PeftModel around the denoiser goes by the same configurations as the denoiser."""
    denoiser.peft_config = configurations
    for module in _outermost(pipeline).modules():
        if isinstance(module, BaseTuner):
            module.peft_config = configurations


def _outermost(pipeline: Any) -> nn.Module:
    """The denoiser with what is wrapped around it."""
    return pipeline if isinstance(pipeline, nn.Module) else getattr(pipeline, denoiser_of(pipeline)[0])


def _discard(denoiser: nn.Module, name: str) -> None:
    """Takes an adapter off a model, all of it or nothing; layers left without any become plain ones again."""
    layers = [m for m in denoiser.modules() if isinstance(m, MaskedLoraLayer) and name in m.lora_A]
    with merges_as_found(layers, on_error_alone=True):
        for layer in layers:
            if name in layer.merged_adapters:
                layer.take_out(name)
        with structure_as_found_on_error(denoiser.modules()), gradients_as_found(denoiser):
            for layer in layers:
                layer.drop(name)
            configs = getattr(denoiser, "peft_config", {})
            configs.pop(name, None)
            for path, layer in list(denoiser.named_modules()):
                if isinstance(layer, MaskedLoraLayer) and not layer.lora_A:
                    parent, _, own = path.rpartition(".")
                    setattr(denoiser.get_submodule(parent), own, layer.base_layer)
            if not any(isinstance(config, FadeConfig) for config in configs.values()):
                remove_guards(denoiser)
            if not configs and hasattr(denoiser, "peft_config"):
                del denoiser.peft_config
                if hasattr(denoiser, "_hf_peft_config_loaded"):
                    denoiser._hf_peft_config_loaded = False
            _offload_anew(denoiser)


def _offload_anew(denoiser: nn.Module) -> None:
    """diffusers' group offloading knows the modules there were when it was enabled: it is put on again."""
    if any(getattr(module, "_diffusers_hook", None) is not None for module in denoiser.modules()):
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        _maybe_remove_and_reapply_group_offloading(denoiser)


def load_adapter(
    pipeline: Any,
    path: str | Path,
    name: str = "fade",
    scale: float = 1.0,
    check_base: bool = True,
    pinned: bool = True,
) -> Adapter:
    """Attaches an adapter file to a pipeline and switches it on, beside whatever is on; or nothing, where it fails.

    Args:
        pipeline: any pipeline with a denoiser that the adapter fits (image-to-image, inpainting, ControlNet, …), or the
            denoiser itself.
        path: the file, or the folder that `fade.unlearn` wrote; also what diffusers' and PEFT's own calls write of a
            FADE adapter (`save_lora_adapter`, `save_lora_weights`, `PeftModel.save_pretrained`).
        name: what the adapter is called on the pipeline.
        scale: strength; 1 as trained.
        check_base: refuse weights that the adapter was not trained on.
        pinned: stay on whatever is done to other adapters; only a call that names this one, or one that switches
            everything off (`disable_lora`, `unload_lora_weights`: with a warning), switches it off. False gives PEFT's
            plain semantics.

    Raises AdapterFileError for a bad file, WrongBaseError where the pipeline's weights are not those that the adapter
    was trained on, and FadeError where the name is taken or a layer does not fit.
    """
    denoiser = denoiser_of(pipeline)[1]
    check_name(denoiser, name)
    with torch.inference_mode(False), torch.no_grad():
        path, file = read_any_file(path)
        own = {layer for layer, _, _ in own_modules(denoiser)}
        check_carriers(denoiser, base_layers(denoiser), [layer for layer in file.layers if layer in own])
        if check_base:
            trained_on = file.metadata["fingerprint"]
            found = fingerprint(denoiser, tuple(trained_on))
            if "scheme" in found:  # what differs is a warning then, and no word about another family
                check_carriers(denoiser, base_layers(denoiser), file.layers)
            check_same_base(
                trained_on,
                found,
                f"{path} was trained on {file.metadata.get('base', 'another model')} ({short_digest(trained_on)}), but "
                f"this pipeline is {base_name(pipeline)} ({short_digest(found)})",
                ". Load the base it was made for, or pass --any-base (in Python: check_base=False)",
            )
        if not file.layers:
            raise AdapterFileError(f"{path} holds no layer")
        ranks = {tensors.factors[0].shape[0] for tensors in file.layers.values() if tensors.factors is not None}
        values, rank = not ranks, max(ranks, default=1)

        def initial(layer: str, _: BitMask) -> tuple[Tensor, ...]:
            tensors = file.layers[layer]
            return tensors.factors or (tensors.values,)

        masks = {layer: tensors.mask for layer, tensors in file.layers.items()}
        # What a file was combined from stays in the file: on the pipeline there is the sum alone.
        metadata = {key: value for key, value in file.metadata.items() if key != "parts"}
        alpha = float(file.metadata["scale"]) * rank
        return _attach(
            pipeline, name, masks, base_layers(denoiser), initial, rank, alpha, values, metadata, pinned, scale
        )


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    return {
        package: importlib.metadata.version(package)
        for package in ("fade-unlearning", "torch", "diffusers", "transformers", "peft", "safetensors")
    }


def new_metadata(
    concept: Any, config: Any, base: str, digests: Mapping[str, str], scale: float, component: str = "unet"
) -> dict[str, Any]:
    """Metadata of an adapter to be trained on a component of a pipeline; the run record joins it at the end."""
    return {
        "component": component,
        "concept": concept.to_dict(),
        "config": config.to_dict(),
        "base": base,
        "fingerprint": dict(digests),
        "scale": scale,
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
