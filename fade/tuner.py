"""FADE as a PEFT method: the configuration, the tuner that puts masked layers into a model, and how a masked adapter
looks in a file that PEFT or diffusers writes.

It is registered with PEFT under the type `FADE`, so that PEFT's own calls (`inject_adapter_in_model`,
`get_peft_model_state_dict`, `save_pretrained`, `load_adapter`, `add_weighted_adapter`) find it. A process without this
package does not know the type and refuses the folder; a bare state dict it refuses by its shapes and by a key that is
no LoRA's (see `FadeModel`).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import lora
from torch import Tensor, nn

from fade.errors import FadeError
from fade.layers import MASKED_LAYERS, MaskedLoraLayer
from fade.quantised import quantisation
from fade_kernels import BitMask, scatter_masked_, weight_shape

PEFT_TYPE = "FADE"

HEADER = "fade_adapter"
"""The key in a state dict made for a file under which the adapter's own record lies: JSON as bytes, uint8 [length].
It has no `lora` in it, for which diffusers' pipelines refuse the file before they change anything."""

# Methods whose layers call the layer that they wrap. Others (SHiRA, HRA, MiSS, …) compute from the frozen weight, past
# every adapter on it.
_CALL_WHAT_THEY_WRAP = frozenset(
    (
        PEFT_TYPE, "LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "VERA", "RANDLORA", "FOURIERFT", "VBLORA", "C3A",
        "LN_TUNING",
    )
)  # fmt: skip


@dataclass
class FadeConfig(LoraConfig):
    """A masked adapter's configuration: LoRA's, what the adapter forgets, and whether it is pinned."""

    pinned: bool = field(default=True, metadata={"help": "Stay on whatever is done to other adapters."})
    metadata: dict[str, Any] = field(default_factory=dict, metadata={"help": "What the adapter file's header says."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self._register_custom_module(MASKED_LAYERS)

    @property
    def forgets(self) -> str:
        """The concept in words, or the empty string."""
        return str(self.metadata.get("concept", {}).get("forget", ""))


class FadeModel(lora.LoraModel):
    """LoRA's tuner with masked layers.

    In a state dict that PEFT hands out for a file (`get_peft_model_state_dict`), factors and values have one dimension
    more, of size 1, in front, and lie beside the mask's words and a record of what the adapter is (`HEADER`). A loader
    that knows no masks finds shapes that fit no LoRA and fails, where under the usual ones it would attach a dense
    adapter that nobody trained. `fade.load_adapter` reads such files (`fade.peft_file`).
    """

    def _create_and_replace(
        self, lora_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, *args: Any,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        base = target.get_base_layer() if isinstance(target, lora.LoraLayer) else None
        if type(target) in (lora.Linear, lora.Conv2d) and type(base) in MASKED_LAYERS:
            MASKED_LAYERS[type(base)].adopt(target)
        elif isinstance(base, nn.Linear) and not isinstance(target, MaskedLoraLayer) and quantisation(base):
            MASKED_LAYERS[nn.Linear].adopt(target)  # PEFT has a class for each kind of quantised layer
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, *args, **kwargs)
        layer = getattr(parent, target_name)
        if not isinstance(layer, MaskedLoraLayer):
            raise FadeError(f"{target_name} is a {type(target).__name__}, which a masked adapter cannot sit on")
        if adapter_name not in layer.lora_mask:
            # Until its mask arrives with the state dict, it changes nothing: never a dense adapter.
            rows, *columns = weight_shape(layer.get_base_layer())
            empty = torch.zeros((rows, -(-math.prod(columns) // 32)), dtype=torch.int32, device="cpu")
            layer.set_mask(adapter_name, BitMask.from_words(empty, (rows, *columns)))
        if lora_config.pinned:
            told = self.__dict__.get("_told") is lora_config  # by an earlier layer of the same injection
            layer.pinned[adapter_name] = None if told else concept_is_back(adapter_name, lora_config.forgets)
            self.__dict__["_told"] = lora_config

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: FadeConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        state = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        layers = {
            bare_name(path): layer
            for path, layer in model.named_modules()
            if isinstance(layer, MaskedLoraLayer) and adapter_name in layer.lora_mask
        }
        record = {
            "metadata": config.metadata,
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "shapes": {name: list(layer.lora_mask[adapter_name].shape) for name, layer in layers.items()},
            "values": [name for name, layer in layers.items() if layer.has_values(adapter_name)],
        }
        text = bytearray(json.dumps(record, separators=(",", ":")).encode())
        saved = {HEADER: torch.frombuffer(text, dtype=torch.uint8)}
        for key, tensor in state.items():
            if not _is_factor(key):
                saved[key] = tensor
            elif bare_name(key.partition(".lora_")[0]) in record["values"]:
                saved[key] = tensor[None, :1] if ".lora_A." in key else tensor[None, :1, :1]  # without padding
            else:
                saved[key] = tensor[None]
        return saved

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = {
            key: tensor[0] if _is_factor(key) and tensor.dim() in (3, 5) and len(tensor) == 1 else tensor
            for key, tensor in state_dict.items()
            if key != HEADER
        }
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


_add_weighted_adapter_of_peft = lora.LoraModel.add_weighted_adapter


def _add_weighted_adapter(
    self: lora.LoraModel, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "svd",
    **options: Any,
) -> None:  # fmt: skip
    """PEFT's `add_weighted_adapter`; for masked adapters Σ w_i s_i Δ_i in the values form, on the union of the masks.

    That is exact for every way to combine that adds (`cat`, `linear`, `svd`). Raises ValueError for those that prune
    (`ties`, `dare_…`), and where only some of the adapters have a mask.
    """
    layers = {
        name: layer
        for name, layer in self.model.named_modules()
        if isinstance(layer, lora.LoraLayer) and any(adapter in layer.lora_A for adapter in adapters)
    }
    masked = {
        adapter: [adapter in getattr(layer, "lora_mask", ()) for layer in layers.values() if adapter in layer.lora_A]
        for adapter in adapters
    }
    if not any(any(kinds) for kinds in masked.values()):
        _add_weighted_adapter_of_peft(self, adapters, weights, adapter_name, combination_type, **options)
        return
    if adapter_name in self.peft_config:
        return
    self._check_add_weighted_adapter(adapters=adapters, combination_type="cat", svd_rank=None)
    unmasked = [adapter for adapter, kinds in masked.items() if not (kinds and all(kinds))]
    if unmasked:
        raise ValueError(f"the adapter {unmasked[0]!r} has no mask: it adds up with no masked one")
    if combination_type not in ("cat", "linear", "svd"):
        raise ValueError(f"masked adapters are added up exactly (cat), not combined by {combination_type!r}")
    if len(adapters) != len(weights):
        raise ValueError(f"there must be one weight for each of {len(adapters)} adapters, not {len(weights)}")
    self.peft_config[adapter_name] = replace(
        self.peft_config[adapters[0]], r=1, lora_alpha=1, rank_pattern={}, alpha_pattern={}, use_rslora=False,
        target_modules=exactly(layers),
    )  # fmt: skip
    if isinstance(self.peft_config[adapter_name], FadeConfig):
        self.peft_config[adapter_name].metadata = {**self.peft_config[adapters[0]].metadata, "scale": 1.0}
    self.inject_adapter(self.model, adapter_name)
    for layer in layers.values():
        layer.set_values(adapter_name, *weighted_sum(layer, adapters, weights))


# PEFT's own reads factors past the layers that own them, and would make a dense adapter of masked ones.
lora.LoraModel.add_weighted_adapter = _add_weighted_adapter


def weighted_sum(layer: MaskedLoraLayer, adapters: Sequence[str], weights: Sequence[float]) -> tuple[BitMask, Tensor]:
    """Σ w_i s_i Δ_i of a layer's masked adapters: the union of their masks and float32 values [nnz] on it."""
    present = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.lora_mask]
    masks = [layer.lora_mask[name].mask for name, _ in present]
    words = masks[0].words.clone()
    for mask in masks[1:]:
        words |= mask.words
    union = BitMask.from_words(words, masks[0].shape)
    dense = torch.zeros(union.shape, dtype=torch.float32, device=words.device)
    for (name, weight), mask in zip(present, masks, strict=True):
        term = torch.zeros_like(dense)
        dense += scatter_masked_(term, layer.packed_values(name) * (weight * layer.scaling[name]), mask)
    return union, dense[union.unpack()]


def exactly(names: Mapping[str, Any] | Sequence[str]) -> str:
    """A target pattern that matches these module names and no others, ends of longer names included."""
    return "|".join(re.escape(name) for name in names)


def concept_is_back(name: str, forgets: str) -> str:
    """What to tell a user whose call has switched everything off."""
    back = f"draw {forgets!r} again" if forgets else "draw again what it had forgotten"
    return (
        f"the FADE adapter {name!r} is off now with all the others: the model can {back}. Switch it on with "
        "adapter.enable(), or merge() it so that it stays whatever is switched"
    )


def _is_factor(key: str) -> bool:
    return (".lora_A." in key or ".lora_B." in key) and key.endswith(".weight")


def bare_name(path: str) -> str:
    """The name that a layer has in the bare model, from its path in a wrapped one or from a key in a saved file."""
    path = path.removeprefix("base_model.model.")
    return ".".join(part for part in path.split(".") if part not in ("base_layer", "_orig_mod"))


class Configurations(dict[str, PeftConfig]):
    """A model's PEFT configurations, which refuses methods that would compute past a masked adapter.

    PEFT enters a configuration before it changes any layer, so that a refusal leaves the model as it was.
    """

    def __setitem__(self, name: str, config: PeftConfig) -> None:
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        masked = [other for other, theirs in self.items() if isinstance(theirs, FadeConfig)]
        if masked and kind not in _CALL_WHAT_THEY_WRAP:
            raise FadeError(
                f"a {kind} adapter computes from the frozen weights, so the FADE adapter {masked[0]!r} would have no "
                f"effect beside it; attach {name!r} first, or merge the FADE adapter for good (fade merge)"
            )
        super().__setitem__(name, config)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for name, config in dict(*args, **kwargs).items():
            self[name] = config


# PEFT's `register_peft_method` takes only members of its own enumeration; the tables behind it take any name.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = FadeConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = FadeModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = FadeModel.prefix
