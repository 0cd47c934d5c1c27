"""The memory of an unlearning run before it begins: what each part of the model takes, and the peak of each phase.

Sizes of tensors that stay come from the model's configuration; what passes take is counted by `fade.planning.passes`.
Device memory on a GPU, where text encoders and VAE leave when they are done; on a CPU everything, where nothing leaves.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fade.backbones import Backbone
from fade.base_model import target_layers, target_regions
from fade.config import Config
from fade.distillation import TEACHER_BATCHES
from fade.latents import MOST_PIXELS_AT_ONCE
from fade.planning.models import build, describe
from fade.planning.passes import AdapterShapes, Passes, encoding, latent_shape
from fade.regions import matrix_shape, target_shapes
from fade.saliency import kept_units
from fade.saliency_plan import SaliencyPlan, plan_saliency
from fade.training_mode import memory_plan
from fade.unlearning import solving_bytes, text_path, with_targets

Dtype = Literal["fp32", "bf16", "nf4"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}
"""What the rest of the model is in; of nf4 the denoiser's linear layers have 4 bits a weight."""

NF4_BYTES = 0.5 + 4 / 64
"""Of a weight: 4 bits, and a float32 scale for each block of 64."""

PROMPTS = 64
"""Prompts of a run, which are encoded at once."""

PHASES = ("encode prompts", "sample latents", "encode pictures", "locate", "overwrite", "merge")


@dataclass(frozen=True)
class Column:
    """A dtype's peaks in bytes by phase; of phases that differentiate, with and without gradient checkpointing. None
    where there is no such phase."""

    dtype: Dtype
    denoiser: int
    encoders: int
    vae: int
    prompts: int
    latents: int
    resident: int
    """What of these is there while both stages run."""
    activations: dict[str, int | None]
    """Of a training step, without and with gradient checkpointing."""
    peaks: dict[str, dict[str, int | None]]

    def most(self, checkpointing: bool) -> int:
        """The largest peak."""
        return max(peak for phase in self.peaks.values() if (peak := phase[mode(checkpointing)]) is not None)


def mode(checkpointing: bool) -> str:
    return "checkpointed" if checkpointing else "plain"


@dataclass
class Model:
    """What a plan knows of a model, of which dtypes and settings are tried."""

    backbone: Backbone
    name: str
    side: int
    latent: tuple[int, ...]
    picture_bytes: int
    """What encoding a picture takes beyond the VAE in float32."""
    _passes: dict[Dtype, Passes] = field(default_factory=dict)
    _encoding: dict[Dtype, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str, size: int | None = None) -> "Model":
        """Raises FadeError for a model that is unknown or has no configurations, and for a side that it cannot have."""
        description = describe(model)
        backbone = build(description)
        side = backbone.side(size)
        return cls(backbone, description.name, side, *latent_shape(backbone, side))

    @cached_property
    def parts(self) -> dict[str, nn.Module]:
        """Every part with weights by the pipeline's name for it, the denoiser first."""
        found = {name: part for name, part in self.backbone.pipeline.components.items() if isinstance(part, nn.Module)}
        own = self.backbone.family.component
        return {own: self.backbone.denoiser, **{name: part for name, part in found.items() if name != own}}

    @cached_property
    def parameters(self) -> dict[str, int]:
        return {name: sum(one.numel() for one in part.parameters()) for name, part in self.parts.items()}

    @property
    def encoders(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.parts.items() if name not in (self.backbone.family.component, "vae")}

    @property
    def checkpoints(self) -> bool:
        """Whether the family can be trained with gradient checkpointing."""
        return self.backbone.family.checkpointing

    def passes(self, dtype: Dtype) -> Passes:
        if dtype not in self._passes:
            linear = (module for module in self.backbone.denoiser.modules() if type(module) is nn.Linear)
            quantised = frozenset(linear if dtype == "nf4" else ())
            self._passes[dtype] = Passes(self.backbone, self.latent, quantised)
        cast(self.backbone.denoiser, DTYPES[dtype])
        return self._passes[dtype]

    def encoding(self, dtype: Dtype) -> int:
        """Bytes that encoding a batch of prompts takes beyond the encoders."""
        if dtype not in self._encoding:
            count, found = min(PROMPTS, self.backbone.prompts_at_once), [0]
            shapes = self.backbone.family.prompt_shapes(self.backbone).values()
            lengths = [shape[-2] for shape in shapes if len(shape) > 1]
            for name, encoder in self.encoders.items():
                cast(encoder, DTYPES[dtype])
                number = name.removeprefix("text_encoder").removeprefix("_")
                tokenizer = getattr(self.backbone.pipeline, f"tokenizer_{number}" if number else "tokenizer", None)
                length = min(max(lengths), getattr(tokenizer, "model_max_length", max(lengths)))
                found.append(encoding(encoder, count, length))
            self._encoding[dtype] = max(found)
        return self._encoding[dtype]


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """As `from_pretrained` loads it: modules that a class keeps in float32 stay so."""
    nn.Module.to(module, dtype)
    kept = _kept_wide(module)
    for name, part in module.named_modules():
        if name.rpartition(".")[2] in kept:
            part.float()


def _kept_wide(module: nn.Module) -> tuple[str, ...]:
    """What stays in float32 where the rest is in bfloat16: diffusers keeps all that a class names, transformers in
    float16 only, unless it is named strictly."""
    of_transformers = type(module).__module__.startswith("transformers")
    name = "_keep_in_fp32_modules_strict" if of_transformers else "_keep_in_fp32_modules"
    return tuple(getattr(module, name, None) or ())


def stored(module: nn.Module, dtype: torch.dtype, quantised: bool = False) -> int:
    """Bytes of a part's parameters and buffers in a dtype."""
    kept = _kept_wide(module)
    packed = {part.weight for part in module.modules() if type(part) is nn.Linear} if quantised else set()

    def size(name: str, tensor: Tensor) -> float:
        if tensor in packed:
            return tensor.numel() * NF4_BYTES
        if not tensor.is_floating_point():
            return tensor.numel() * tensor.itemsize
        wide = any(part in kept for part in name.split("."))
        return tensor.numel() * (4 if wide else dtype.itemsize)

    named = [*module.named_parameters(), *module.named_buffers()]
    return math.ceil(sum(size(name, tensor) for name, tensor in named))


@dataclass(frozen=True)
class Run:
    """What of a run's settings decides its memory, for one model."""

    model: Model
    config: Config
    on_gpu: bool = True
    device_bytes: int | None = None
    """Of the GPU, where it is known: what it takes to keep rounded weights there."""

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        return target_layers(self.model.backbone.denoiser, self.targets)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        return with_targets(self.model.backbone, self.config).locate.targets

    @cached_property
    def regions(self) -> dict[str, Any]:
        return target_regions(self.model.backbone.denoiser, self.targets)

    @cached_property
    def areas(self) -> dict[str, int]:
        """How many weights of each target layer may change."""
        return {name: math.prod(shape) for name, shape in target_shapes(self.layers, self.regions).items()}

    @cached_property
    def editable(self) -> dict[str, int]:
        """`areas` of the layers that end up with an adapter: where something is solved, those that read the prompt."""
        if not self.config.uses_closed_form:
            return self.areas
        return {name: self.areas[name] for name in text_path(self.model.backbone, self.layers)}

    @property
    def weights(self) -> int:
        return sum(self.areas.values())

    @cached_property
    def kept(self) -> int:
        """Weights that the masks select."""
        if self.config.locate.granularity == "none":
            return sum(self.editable.values())
        kept_units(self.layers, self.config.locate, self.regions)  # that there are any
        return min(sum(self.editable.values()), math.floor(self.config.locate.keep * self.weights))

    @property
    def mask_bytes(self) -> int:
        """A bit for each weight of the target layers, rows rounded up to words."""
        return sum(4 * rows * -(-columns // 32) for rows, columns in map(matrix_shape, self.layers.values()))

    @cached_property
    def accumulators(self) -> int:
        """Bytes of the gradients' summed magnitudes, float32, wherever they are; 0 where no gradient is measured."""
        return 4 * sum(self.editable.values()) * self.sums

    @property
    def sums(self) -> int:
        """Numbers that stage 1 sums up for every weight."""
        config = self.config
        if config.method.accumulators or not config.measures:
            return config.method.accumulators
        return 2 if config.saliency == "contrast" else 1

    @cached_property
    def adapter(self) -> AdapterShapes:
        if self.config.in_values:
            share = self.kept / sum(self.editable.values())
            return AdapterShapes({name: (math.ceil(share * area),) for name, area in self.editable.items()})
        rank = self.config.overwrite.rank * self.config.method.ranks
        shapes = {name: matrix_shape(self.layers[name]) for name in self.editable}
        return AdapterShapes({name: (rank * columns, rows * rank) for name, (rows, columns) in shapes.items()})

    @property
    def adapter_bytes(self) -> int:
        """Of what is trained, float32."""
        return 4 * self.adapter.numbers

    @property
    def step_latents(self) -> int:
        """Latents of a training step."""
        return self.config.overwrite.batch_size + self.config.overwrite.retain_batch_size

    @cached_property
    def systems(self) -> tuple[int, int, int]:
        """`solving_bytes`. Zeros where nothing is solved."""
        if not self.config.uses_closed_form:
            return 0, 0, 0
        return solving_bytes(self.model.backbone, self.layers, self.regions)

    # --- the phases ---

    def column(self, dtype: Dtype) -> Column:
        model, config = self.model, self.config
        itemsize, passes = DTYPES[dtype].itemsize, model.passes(dtype)
        denoiser = stored(model.backbone.denoiser, DTYPES[dtype], dtype == "nf4")
        encoders = sum(stored(part, DTYPES[dtype]) for part in model.encoders.values())
        vae, wide_vae = (stored(model.parts["vae"], kind) for kind in (DTYPES[dtype], torch.float32))
        prompts = PROMPTS * itemsize * sum(map(math.prod, model.backbone.family.prompt_shapes(model.backbone).values()))
        one = math.prod(model.latent) * itemsize
        latents = one * (config.data.forget_samples + config.data.retain_samples) if config.needs_latents else 0

        phases: dict[str, dict[str, int | None]] = {
            "encode prompts": _both(denoiser + encoders + vae + prompts + model.encoding(dtype))
        }
        left = 0 if self.on_gpu else encoders
        if config.needs_latents:
            phases["sample latents"] = _both(denoiser + vae + left + latents + passes.frozen(self.drawn_at_once))
            pictures = max(1, min(config.data.batch_size, MOST_PIXELS_AT_ONCE // model.side**2))
            phases["encode pictures"] = _both(denoiser + wide_vae + left + latents + pictures * model.picture_bytes)
        # On a GPU only the denoiser is left, where there is a choice.
        resident = denoiser + prompts + latents + (0 if self.on_gpu else encoders + vae)
        activations, phases["locate"], phases["overwrite"] = {}, {}, {}
        for on in (False, True):
            possible = model.checkpoints or not on
            activations[mode(on)] = self.step_bytes(dtype, on) if possible and config.trains else None
            phases["locate"][mode(on)] = resident + self.locate_bytes(dtype, on) if possible else None
            phases["overwrite"][mode(on)] = resident + self.overwrite_bytes(dtype, on) if possible else None
        if dtype != "nf4":
            largest = max(math.prod(matrix_shape(layer)) for layer in self.layers.values())
            kept = 2 * itemsize * self.kept  # what was there before, and what was written
            phases["merge"] = _both(
                denoiser + encoders + vae + self.mask_bytes + self.adapter_bytes + kept + itemsize * largest
            )
        return Column(dtype, denoiser, encoders, vae, prompts, latents, resident, activations, phases)

    @property
    def drawn_at_once(self) -> int:
        """Latents in a pass of the denoiser while latents are sampled, those without a prompt (guidance) included."""
        data, family = self.config.data, self.model.backbone.family
        count = 1 if family.one_by_one else min(data.batch_size, max(data.forget_samples, data.retain_samples))
        once = self.model.backbone.tells_guidance or family.asked_twice
        return count if once else 2 * count

    def step_bytes(self, dtype: Dtype, checkpointing: bool) -> int:
        """Activations of a training step, or of the teacher's pass over several steps' latents if that takes more."""
        passes, count = self.model.passes(dtype), self.step_latents
        student = passes.student("overwrite", count, checkpointing, self.layers, self.regions, self.adapter)
        return max(student, passes.frozen(count * (TEACHER_BATCHES if self.config.overwrite.pool else 1)))

    def overwrite_bytes(self, dtype: Dtype, checkpointing: bool) -> int:
        """What stage 2 takes beside the model, prompts and latents."""
        held, _, solving = self.systems
        most = held + solving
        if self.config.trains:
            pool = 0
            if not self.on_gpu:  # else it waits in host memory
                one = math.prod(self.model.latent) * DTYPES[dtype].itemsize
                pool = 2 * one * self.step_latents * self.config.overwrite.pool
            # Beside the adapter its gradients and two moments of AdamW; GIFT's start and gradients before the pull.
            beside = (5 if self.config.overwrite.gift else 3) * self.adapter_bytes + pool + self.rounded_bytes(dtype)
            if self.config.overwrite.ekpc:
                most = max(most, self.importance_bytes(dtype, checkpointing))
                beside += 2 * 4 * self.kept  # importances and where the values began
            most = max(most, self.step_bytes(dtype, checkpointing) + beside)
        return self.mask_bytes + self.adapter_bytes + most

    def rounded_bytes(self, dtype: Dtype) -> int:
        """Of the weights of layers that train in one product (`fade.training_mode`), at most: of all of them where the
        device is known to be large enough to keep them, else of the largest. 0 where there is nothing to round."""
        overwrite = self.config.overwrite
        if not self.on_gpu or dtype != "bf16" or overwrite.training_mode == "exact":
            return 0
        sizes = [2 * math.prod(matrix_shape(self.layers[name])) for name in self.editable]
        keep = overwrite.cuda_graph == "on" or memory_plan(sum(sizes), self.device_bytes or 0) == "kept"
        return sum(sizes) if keep else max(sizes, default=0)

    def importance_bytes(self, dtype: Dtype, checkpointing: bool) -> int:
        """What EKPC takes before the training to measure every weight's importance, all of it on the device."""
        count, layers = self.config.overwrite.retain_batch_size, {name: self.layers[name] for name in self.editable}
        once = self.model.passes(dtype).student("locate", count, checkpointing, layers, self.regions)
        return 4 * sum(self.editable.values()) + once + 4 * self.kept

    def locate_pass(self, dtype: Dtype, checkpointing: bool) -> int:
        """Bytes of a backward pass of stage 1; 0 where it makes none."""
        if not self.accumulators or self.config.saliency == "random":
            return 0
        passes, count = self.model.passes(dtype), self.config.locate.batch_size
        layers = {name: self.layers[name] for name in self.editable}
        at_once = 2 * count if self.config.saliency == "guided" else count  # asked twice before the backward pass
        most = passes.student("locate", at_once, checkpointing, layers, self.regions)
        taught = self.config.saliency in ("distillation", "auto")
        return max(most, passes.frozen(count)) if taught else most

    def locate_bytes(self, dtype: Dtype, checkpointing: bool) -> int:
        """What stage 1 takes beside the model, prompts and latents, with all accumulators on the device."""
        held, choosing, _ = self.systems
        at_once = max(self.locate_pass(dtype, checkpointing), choosing, self.mask_bytes)
        return held + self.accumulators + at_once

    def saliency_plan(self, dtype: Dtype, checkpointing: bool, budget: int, host: int | None) -> SaliencyPlan:
        """How stage 1 measures within a budget (`fade.saliency_plan`). Raises FadeError where it cannot."""
        batches = self.config.locate.passes * -(-self.config.data.forget_samples // self.config.locate.batch_size)
        sums = max(1, self.sums)
        return plan_saliency(
            self.editable, budget, host if self.on_gpu else None, accumulators=sums, kept=self.kept,
            pass_bytes=self.locate_pass(dtype, checkpointing), passes=batches * sums,
        )  # fmt: skip


def _both(peak: int) -> dict[str, int | None]:
    return {mode(False): peak, mode(True): peak}


def with_batch(config: Config, count: int) -> Config:
    """Settings of `count` latents at once: in each pass that is differentiated, half of them retained ones in stage 2,
    and when latents are sampled."""
    half = max(1, count // 2)
    overwrite = {"overwrite__batch_size": half, "overwrite__retain_batch_size": half}
    return config.replace(locate__batch_size=count, data__batch_size=count, **overwrite)


@dataclass(frozen=True)
class Plan:
    """A run's memory, by dtype."""

    run: Run
    columns: tuple[Column, ...]

    def to_dict(self) -> dict[str, Any]:
        run, config = self.run, self.run.config
        return {
            "model": run.model.name,
            "family": run.model.backbone.family.name,
            "size": run.model.side,
            "latent": list(run.model.latent),
            "device": "gpu" if run.on_gpu else "cpu",
            "method": config.overwrite.method,
            "saliency": config.saliency,
            "keep": config.locate.keep,
            "latents_at_once": {
                "sample": config.data.batch_size, "locate": config.locate.batch_size, "overwrite": run.step_latents,
            },
            "parameters": run.model.parameters,
            "targets": {"layers": len(run.layers), "weights": run.weights},
            "kept_weights": run.kept,
            "mask_bytes": run.mask_bytes,
            "accumulator_bytes": run.accumulators,
            "adapter": {
                "parameters": run.adapter.numbers, "bytes": run.adapter_bytes,
                "gradient_bytes": run.adapter_bytes if config.trains else 0,
                "optimizer_bytes": 2 * run.adapter_bytes if config.trains else 0,
            },
            "dtypes": {column.dtype: dataclasses.asdict(column) for column in self.columns},
        }  # fmt: skip


def plan(
    model: str,
    config: Config | None = None,
    size: int | None = None,
    dtypes: tuple[Dtype, ...] = ("fp32", "bf16", "nf4"),
    on_gpu: bool = True,
    device_bytes: int | None = None,
) -> Plan:
    """The memory of a run on a model (a diffusers folder, a bundled or a shipped name) with these settings, of pictures
    of `size` pixels a side (default: the model's own), on a GPU of `device_bytes` if that is known. Nothing is loaded
    or downloaded.

    Raises FadeError for an unknown model, a folder without configurations, a size or target that the model cannot have.
    """
    run = Run(Model.of(model, size), config or Config(), on_gpu, device_bytes)
    return Plan(run, tuple(run.column(dtype) for dtype in dtypes))
