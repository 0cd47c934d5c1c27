"""What is exported, whatever the format: Δ of every layer, and the record that goes with it.

Δ = s · M⊙(BA), or s times the masked values; float32 [N, K], of a convolution [N, C·height·width].
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fade
from fade.adapter_file import MOST_SCALE, LayerTensors
from fade.errors import FadeError
from fade.files import check_replaceable, check_writable, digest
from fade.peft_file import read_any_file
from fade_kernels import masked_factor_values, scatter_masked_

if TYPE_CHECKING:
    from fade.adapter import Adapter

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXACT = 1e-6
"""Relative Frobenius error of Δ up to which a file is called exact: a few roundings of float32, of which Δ's own values
have one already. Pictures in float32 then agree to 1e-5."""


@dataclass(frozen=True)
class Edit:
    """An adapter to be exported: its metadata, its layers by name, and the factor s of each.

    `adapter` is the attached one, or None where the edit comes from a file alone.
    """

    metadata: Mapping[str, Any]
    layers: Mapping[str, LayerTensors]
    scales: Mapping[str, float]
    adapter: "Adapter | None" = None

    def delta(self, name: str) -> Tensor:
        """A layer's Δ, float32 [N, K] on the CPU. Raises FadeError where it holds NaN or infinity."""
        layer = self.layers[name]
        values = layer.values if layer.factors is None else masked_factor_values(*layer.factors, layer.mask)
        values = (values.double() * self.scales[name]).float()
        if not bool(values.isfinite().all()):
            raise FadeError(f"the change of {name} is not finite at this strength; export at a smaller one")
        delta = torch.zeros(layer.mask.shape, dtype=torch.float32, device=values.device)
        return scatter_masked_(delta, values, layer.mask).cpu()

    def kernel(self, name: str) -> tuple[int, ...]:
        """() of a Linear, (height, width) of a convolution. Raises FadeError where the file does not say."""
        kernel = self.layers[name].kernel
        if kernel is None:
            raise FadeError(
                f"the adapter file does not say whether {name} is a convolution; pass --model, the model that it was "
                "made for (in Python: load it with fade.load_adapter and call adapter.export)"
            )
        return kernel

    def record(self, form: str, exactness: str) -> dict[str, str]:
        """What every exported file says of itself, as safetensors metadata."""
        concept = self.metadata["concept"]
        base = str(self.metadata.get("base", "unknown"))
        tensors = {}
        for name, layer in self.layers.items():
            tensors[f"{name}.mask"] = layer.mask.words
            parts = (layer.values,) if layer.factors is None else layer.factors
            tensors |= {f"{name}.{index}": part for index, part in enumerate(parts)}
        return {
            "format": "pt",
            "fade.version": fade.__version__,
            "fade.export": form,
            "fade.exactness": exactness,
            "fade.forgets": str(concept["forget"]),
            "fade.surrogate": str(concept.get("surrogate", "")),
            "fade.adapter_sha256": digest(tensors),
            "fade.base": base,
            "fade.base_sha256": json.dumps(dict(self.metadata["fingerprint"])),
            "fade.license": f"The licence of the base model ({base}) applies to what derives from it: this file.",
        }


def read_edit(path: str | Path, scale: float = 1.0) -> Edit:
    """The edit of an adapter file, without a model, at a strength; 1 is as trained. Raises AdapterFileError."""
    if not abs(scale) <= MOST_SCALE:
        raise FadeError(f"the scale must be a number between {-MOST_SCALE:g} and {MOST_SCALE:g}, not {scale}")
    _, file = read_any_file(path)
    return Edit(file.metadata, file.layers, dict.fromkeys(file.layers, scale * float(file.metadata["scale"])))


@dataclass
class ErrorSum:
    """Relative Frobenius errors of what is written against Δ: by layer, and of all layers together."""

    layers: dict[str, float] = field(default_factory=dict)
    _lost: float = 0.0
    _whole: float = 0.0

    def add(self, name: str, delta: Tensor, written: Tensor) -> None:
        """Both [N, K]. Raises FadeError where what is written is not finite: beyond its dtype's range."""
        if not bool(written.isfinite().all()):
            raise FadeError(f"the change of {name} is beyond the range of that dtype; choose another one, or fp32")
        lost = float((written.double() - delta.double()).square().sum())
        whole = float(delta.double().square().sum())
        self.layers[name] = (lost / whole) ** 0.5 if whole else 0.0
        self._lost, self._whole = self._lost + lost, self._whole + whole

    @property
    def total(self) -> float:
        return (self._lost / self._whole) ** 0.5 if self._whole else 0.0

    @property
    def worst(self) -> float:
        return max(self.layers.values(), default=0.0)

    def words(self, lossy: bool) -> str:
        """For the file's record and for people. Raises FadeError where it is not exact and not to be `lossy`."""
        if self.worst > EXACT and not lossy:
            name = max(self.layers, key=self.layers.__getitem__)
            raise FadeError(
                f"float32 factors hold the change of {name} with a relative error of {self.worst:.1g}, because it "
                "is small beside them; export it as diff, or pass --lossy"
            )
        if self.worst <= EXACT:
            return f"exact (largest relative error of a layer {self.worst:.1g})"
        return (
            f"lossy: relative error {self.total:.3g} in all, {self.worst:.3g} in the worst layer, of the change; "
            f"{100 * (1 - self.total**2):.3g} % of its energy is kept"
        )


@dataclass(frozen=True)
class ExportReport:
    """What was written: where, its bytes, in words how exact it is, and relative Frobenius errors of Δ: of all layers
    together (of `merged`: the worst layer's) and by layer."""

    path: Path
    bytes: int
    exactness: str
    error: float
    layer_errors: dict[str, float]

    @property
    def exact(self) -> bool:
        """Whether every layer's error is within float32's rounding."""
        return max([self.error, *self.layer_errors.values()]) <= EXACT


def chosen_dtype(dtype: str, lossy: bool) -> torch.dtype:
    """Raises FadeError for an unknown dtype, and for 16 bits without `lossy`."""
    if dtype not in DTYPES:
        raise FadeError(f"the dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    if DTYPES[dtype] != torch.float32 and not lossy:
        raise FadeError(f"{dtype} rounds the change, which is not exact; pass --lossy too, or leave the dtype at fp32")
    return DTYPES[dtype]


def check_file(path: Path, overwrite: bool) -> None:
    """Raises FadeError where no safetensors file may or can be written to `path`."""
    if path.suffix != ".safetensors":
        raise FadeError(f"the output {path} must end in .safetensors")
    check_replaceable(path, overwrite)
    check_writable(path)


def kohya_name(layer: str) -> str:
    """A denoiser's layer as kohya's trainers, ComfyUI and A1111 call it."""
    return f"lora_unet_{layer.replace('.', '_')}"


def refuse_nothing(edit: Edit, written: int) -> None:
    """Raises FadeError where no layer changes anything."""
    if not written:
        raise FadeError(
            f"the adapter changes nothing at this strength ({max(map(abs, edit.scales.values()), default=0.0):g}); "
            "there is nothing to export"
        )
