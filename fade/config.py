"""Everything that can be set for one unlearning run: its unit, its default and why.

Plain frozen dataclasses, readable from TOML. An unknown key, a value of the wrong type or out of range is an error,
because a silently ignored option is how other packages came to believe in a dropout they never had. The defaults are
those that measured best over many concepts and seeds (`bench/sweep.py`); the paper's own settings, but for steps and
learning rate, are in `PAPER`. A method (`fade.methods`) brings defaults of its own: `Config.of`.
"""

import dataclasses
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fade.errors import FadeError
from fade.methods import Method
from fade.methods import method as method_called
from fade.unread import unread, unread_by_parts

Saliency = Literal["denoising", "distillation", "contrast", "guided", "random", "closed-form", "auto"]
Scaling = Literal["none", "module"]
Granularity = Literal["element", "tile", "channel", "module", "none"]
Parameters = Literal["factors", "values", "auto"]
TrainingMode = Literal["exact", "one-product", "auto"]
CudaGraph = Literal["auto", "on", "off"]
TargetKind = Literal["attention", "beyond-attention", "convolutions", "all"]
TARGET_KINDS = get_args(TargetKind)
TimestepSampler = Literal["uniform", "band", "targeted"]

MOST_SEED = 2**40
"""Seeds of images are made from it by multiplication, and torch takes 64 bits."""


@dataclass(frozen=True)
class DataConfig:
    """Where the forget and the retain latents come from.

    Without image folders they are sampled from the frozen model itself, from the prompts: no data set is needed.
    Folders are read with their subfolders and captions (`fade.images`). A forget image is trained with the first line
    of its caption that names the concept, else with a template; a retain image with the first line of its caption,
    else with a retain prompt. (Trainers that read several lines take them for several captions, too, and use the first
    or a random one.) Retain images whose caption names the concept in any line are left out, with a warning.
    """

    forget_images: str | None = None
    """Folder of images that show the concept, with its subfolders; None samples them from the frozen model."""
    forget_from: Literal["concept", "surrogate"] = "concept"
    """What forget latents that are sampled show: the concept, or what takes its place."""
    retain_images: str | None = None
    """Folder of images of everything else, with its subfolders; None samples them from the frozen model."""
    forget_samples: int = 24
    """Forget latents to sample, or the most images to read from the folder, spread evenly over it. Every prompt is
    trained with: where there are more prompts than samples, neighbours in the list share a latent, or, where latents
    are denoised to their own noise (`Config.denoises`), one is sampled for each prompt."""
    retain_samples: int = 48
    """Retain latents to sample, or the most images to read from the folder, spread evenly over it. Every retain prompt
    is trained with: where there are more prompts than samples, neighbours in the list share a latent (teacher and
    student see the same one, so it need not show the prompt); where there are more prompts than images without a
    caption, those images are used again. Where every image has a caption, the retain prompts are not needed. Where
    latents are denoised to their own noise (`Config.denoises`) they must show their prompts: one is sampled for each
    prompt at least, and images without a caption are warned of."""
    sampling_steps: int = 5
    """Denoising steps a sampled latent takes; only its rough content matters, it is noised again in training. Of
    "three" and "five", 24 and 48 latents of 5 steps taught as much as 48 and 96 of 10, at a quarter of the cost."""
    guidance_scale: float = 3.0
    """Classifier-free guidance of sampled latents."""
    batch_size: int = 64
    """Images sampled or encoded at once."""
    resolution: int | None = None
    """Side in pixels of images read or sampled; None takes the model's own."""
    plurals: bool = False
    """Take the concept's English plural for the concept, too, in captions and in the default retain prompts. Off by
    default: names of people and styles have none, and what is no plural ("glass", "news") may look like one."""


@dataclass(frozen=True)
class LocateConfig:
    """Stage 1: which weights carry the concept (FADE, section 3; `fade.saliency` has the formulas)."""

    saliency: Saliency = "auto"
    """Loss whose gradient magnitude is summed. `denoising` is the paper's; `guided` is SalUn's, whose gradients are
    summed before the magnitude is taken; `random` is the control. `closed-form` sums
    no gradient: it drops the entries of the solved edit that cost least (`fade.closed_form`), in the layers that read
    the prompt alone. `auto` is `closed-form` where the overwrite is solved, else `distillation`."""
    guidance: float = 7.5
    """Guidance scale g of the saliency `guided`."""
    scaling: Scaling = "module"
    """`module` divides a layer's saliency by its mean, so that no layer wins by the size of its gradients alone."""
    keep: float = 0.01
    """Fraction of the target weights that may change, in (0, 1]; for each concept, where several are forgotten."""
    granularity: Granularity = "element"
    """What is kept or dropped as a whole; `none` keeps everything, which is ordinary dense LoRA."""
    tile: int = 32
    """Side of a tile, for granularity `tile`."""
    targets: tuple[str, ...] | None = None
    """Names or glob patterns of Linear and Conv2d layers of the denoiser; a name also matches as the end of a path. A
    region of rows and columns of the weight may follow, `to_out[:, :3072]`: that alone changes, and counts. None is the
    family's own choice, the projections of its attention (and, where the closed form is used, the layers that read the
    prompt alone). Four words stand for layers of a kind: `attention` for those projections, `beyond-attention` for all
    others, `convolutions`, and `all`."""
    passes: int = 1
    """Times the forget latents are gone through, with fresh noise and timesteps each time."""
    batch_size: int = 16
    """Latents per backward pass. The magnitude is taken per pass, so this is part of the definition."""
    per_sample: bool = False
    """Take the magnitude per sample instead of per pass; independent of the batch size."""
    memory_budget: int | str | None = None
    """Device memory, in bytes or as "8GB" or "7.5 GiB", that the passes and the accumulators may take beside the model;
    None is 90 % of what is free when the stage begins. Where it does not hold all accumulators they are kept in host
    memory, or layers are measured group after group (`fade.saliency_plan`); the result is the same."""

    @property
    def budget_bytes(self) -> int | None:
        """`memory_budget` in bytes. Raises FadeError for what is none."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)


@dataclass(frozen=True)
class OverwriteConfig:
    """Stage 2: self-distillation of the sparse adapter (FADE, section 3; `fade.distillation`), or its closed form."""

    method: str = "both"
    """How, by a name of `fade.methods`, whose defaults come with it (`Config.of`, `Config.replace`). `distillation`
    trains the adapter. `closed-form` solves it in the layers that read the prompt alone, within the same budget and
    without a pass of the denoiser; images and all settings below but `parameters` then have no part in it. `both` goes
    on from what is solved: over all 18 DigitCanvas concepts and three seeds it forgot everything at keep 1 %, and at
    0.1 % all but one picture, where the closed form left UA at 73 and distillation at 97; at 1 % it disturbed as little
    as the closed form (drift 0.016; distillation 0.028)."""
    parameters: Parameters = "auto"
    """`factors` trains B and A of M⊙(BA), as the paper does; `values` trains the masked entries themselves, which is
    also the form of what is solved. `auto` is `values` where the overwrite is solved, else `factors`."""
    rank: int = 8
    """Rank r of the factors."""
    alpha: float = 16.0
    """LoRA alpha; the adapter's scale is alpha / rank. Values are scaled by 1."""
    steps: int = 200
    """The most optimiser steps; exactly so many where `stop_forget` is 0."""
    stop_forget: float = 0.05
    """Ends the training, after a cool-down, when the forget loss on held-out noise is down to this share of what it is
    without the adapter, and the retain loss flat; looked at after every `stop_every` steps. 0 makes all `steps`, as the
    paper does. At a keep of 1 % three digits and a style of DigitCanvas ended after 50 to 110 steps in all.
    At 0.1 they ended after 40 to 60, and two of them sooner than was good: "eight" at UA 96 instead of 100, "four" at
    IRA 95.8 instead of 97.2 (96 images)."""
    stop_flat: float = 0.1
    """The retain loss is flat where it fell by no more than this share since it was looked at last."""
    stop_every: int = 10
    """Steps between two looks at the held-out noise."""
    cooldown_steps: int = 30
    """Steps in which the learning rate falls to zero when the concept is forgotten, or before `steps` are up. With 20
    and 40 of them the drift of "five" was 0.037 and 0.032, of "three" 0.035 and 0.029, at UA 100 and the same IRA; 200
    steps of half the learning rate ended at 0.028 and 0.030."""
    pool: int = 32
    """Batches of noised latents that the teacher is asked about once, and that are then gone through again and again,
    in another order every time; two latents a sample, kept in host memory. 0 draws fresh noise and asks the teacher in
    every step, as the paper does. In 40 steps 32 taught as much as fresh ones, 16 left one picture in eight of "three"
    recognised."""
    batch_size: int = 8
    """Forget latents per step."""
    retain_batch_size: int = 8
    """Retain latents per step."""
    accumulation: int = 1
    """Batches whose gradients are added up before a step."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW. None is 1e-2, and 5e-3 for what is solved. There, at a keep of 0.3 %, 5e-3 took
    "three" from UA 71 to 100 in 20 steps at a drift of 0.030 (1e-2: 0.034). At 1 % the pictures still finished as
    threes after the base model had drawn the first 5 of 20 steps went from 8 to 0 %; the drift is 0.021 solved, 0.025
    then, and 0.033 trained alone."""
    warmup_steps: int = 10
    """Steps of linear warm-up of the learning rate. Where `stop_forget` is 0 a cosine decay to zero follows."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay on the adapter."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down."""
    forget_weight: float = 0.3
    """Weight of the forget loss; the paper's value, which also measured best here."""
    retain_weight: float = 1.0
    """Weight of the retain loss."""
    dual_rate: float = 0.0
    """Step size ρ of the dual ascent that changes the forget loss's weight after every step, beginning at
    `forget_weight` (`fade.methods.primal_dual`); 0 leaves it there."""
    dual_bound: float = 0.05
    """Share of the first forget loss that dual ascent wants it to stay below."""
    gift: float = 0.0
    """Weight of GIFT's pull of the adapter's parameters to their start, by their Fisher information in each step, which
    takes a second pass (`fade.regularisers`); 0 is none. Over six DigitCanvas concepts (`bench/results/table.json`, one
    seed) 1e-4 ended at a drift of 0.025 in the median instead of 0.027, and left a quarter of one concept where nothing
    was left without; with 1e-3 nothing of "three" was forgotten."""
    ekpc: float = 0.0
    """Weight of EKPC's penalty on what the adapter changes, by how much each weight matters to the retain latents
    (`fade.regularisers`); 0 is none. Over the same concepts 1e-3 ended at a drift of 0.024, less in five of six, all at
    UA 100."""
    timesteps: TimestepSampler = "uniform"
    """`band` draws from `timestep_band`; `targeted` where forget and surrogate predictions differ most (ours)."""
    timestep_band: tuple[float, float] = (0.0, 1.0)
    """Bounds of the band as fractions of the training timesteps."""
    checkpoint_every: int = 50
    """Steps between checkpoints, when there is an output folder."""
    training_mode: TrainingMode = "auto"
    """How a model in 16 bits is trained (`fade.training_mode`; the run's record says what each layer used): `exact`
    sums x Wᵀ and x Δᵀ in float32, `one-product` multiplies by W + Δ stochastically rounded once a step, `auto` takes
    for each layer what the cost model prefers on a GPU, and is exact on a CPU. In float32 there is nothing to round:
    always exact."""
    cuda_graph: CudaGraph = "auto"
    """Record the student's pass once as a CUDA graph and replay it, which spares the launches from Python: `auto` where
    it can be, `on` also keeps whatever memory that takes and warns where it cannot be, `off` never."""

    @property
    def peak_rate(self) -> float:
        """`learning_rate`, with what None stands for."""
        if self.learning_rate is not None:
            return self.learning_rate
        recipe = method_called(self.method)
        return 5e-3 if recipe.solves and recipe.trains else 1e-2

    @property
    def stops(self) -> bool:
        """Whether the training may end before `steps`."""
        return self.stop_forget > 0


@dataclass(frozen=True)
class ClosedFormConfig:
    """The solved edit (`fade.closed_form` has the formula): how it weighs what must change against what must stay."""

    retain_change: float = 0.02
    """How much of the retain tokens' output energy may change, in (0, 1): the weight λ is searched for until it is so
    much. Larger forgets more and disturbs more. On DigitCanvas at keep 1 %, of six concepts 0.01 left one at UA 69 and
    0.02 none below 100, at a drift of 0.008 to 0.028 instead of 0.006 to 0.016."""
    left: float | None = 0.15
    """Share of the wanted change of the concept's tokens that is meant to be left undone, in (0, 1]: the retain change
    becomes up to twice as large or half as large where more or less is left; None holds it. At keep 1 % (160 pictures
    of 10 steps) 0.15 had UA 100 for seven DigitCanvas concepts and IRA 98.6 to 100; 0.1 had IRA 96.5 and 97.9 for the
    two hardest of them. At keep 0.3 % about 0.27 is left at a change of 0.02."""
    retain_weight: float | None = None
    """λ itself, of a retain token's mean square change beside a forget token's mean square error; None searches."""
    phrasings: bool = True
    """Solve for the concept's `phrasings`, too, and not for its templates alone."""
    protect: tuple[str, ...] = ()
    """Prompts whose tokens' keys and values must not change at all; on DigitCanvas a digit or a style alone stands for
    the caption that leaves the other open. Each independent token is a constraint on every row, and a row can change
    only where more of its entries may change than there are constraints."""
    hardening: int = 0
    """Times that the tokens which revive the concept under the edit are forgotten, too (RECE), from 0 to 3. It takes
    those tokens away and not their like: on DigitCanvas, tokens that revive the concept anew still did in all pictures
    after one round (95 to 100 % after two), while the drift of what is retained grew by a quarter."""
    refit: bool | None = None
    """After training (method `both`), solve for the values anew: for those that do to the concept's tokens what
    training made of them, and leave the retain tokens alone (`fade.closed_form.refitted`). Training holds each prompt
    as a whole; what it leaves undone adds up over adapters. None is where the adapter acts beside others: of 12
    DigitCanvas concepts, forgotten one after another, "three" came back in 12.5 % of its pictures when it was taken out
    of the sum, and in all with it; the sum's drift was 0.019 instead of 0.040, at UA and IRA 100 both (80 pictures).
    What it gives up: with all of λ (here half of it), 62.5 % of the pictures of "three" that the base model had drawn
    the first 10 of 20 steps of were finished as threes, 12.5 without; of "neon" none either way."""
    damping: float = 1e-4
    """μ as a share of the tokens' mean square entry: keeps the edit small where no token says what it should be, and
    the system solvable. Hardly matters between 1e-6 and 1e-2."""

    @property
    def change(self) -> float | None:
        """What λ is searched for; None where it is given."""
        return self.retain_change if self.retain_weight is None else None


@dataclass(frozen=True)
class ConceptWords:
    """A concept to forget and what takes its place, in words."""

    forget: str
    surrogate: str


@dataclass(frozen=True)
class Config:
    """One unlearning run."""

    concepts: tuple[ConceptWords, ...] = ()
    """What to forget, where it is not given beside the settings: in TOML
    `concepts = [{forget = "three", surrogate = "eight"}, …]`. Several are forgotten by one adapter."""

    data: DataConfig = field(default_factory=DataConfig)
    locate: LocateConfig = field(default_factory=LocateConfig)
    overwrite: OverwriteConfig = field(default_factory=OverwriteConfig)
    closed_form: ClosedFormConfig = field(default_factory=ClosedFormConfig)
    options: dict[str, Any] = field(default_factory=dict)
    """Settings that only the method has, with its defaults for those that are not given."""
    gradient_checkpointing: bool = False
    """Compute the denoiser's activations again in the backward pass instead of keeping them: about a third more time
    for much less memory (`fade plan` says how much)."""
    seed: int = 0
    """Seeds sampling, noise, timesteps and the adapter's initial values."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", dataclasses.asdict(self.method_options))
        _check(self)

    @classmethod
    def of(cls, method: str, **changes: Any) -> "Config":
        """The settings of a method, with `changes` as for `replace`. Raises FadeError for an unknown method."""
        return _merge(cls(), _nested({"overwrite__method": method, **method_called(method).settings, **changes}), "")

    @property
    def method(self) -> Method:
        """The method that the settings name."""
        return method_called(self.overwrite.method)

    @property
    def method_options(self) -> Any:
        """`options` as the method's own dataclass. Raises FadeError for one that it does not have."""
        kind = self.method.options
        if self.options and not dataclasses.fields(kind):
            named = ", ".join(self.options)
            raise FadeError(f"the method {self.overwrite.method} has no options; leave out {named}")
        return _merge(kind(), self.options, "options.")

    @property
    def saliency(self) -> str:
        """`locate.saliency`, with what `auto` stands for; of a method that edits without training, its name."""
        if self.method.edit is not None:
            return self.overwrite.method
        if self.locate.saliency != "auto":
            return self.locate.saliency
        return "closed-form" if self.solves else "distillation"

    @property
    def solves(self) -> bool:
        """Whether the overwrite is solved, if only as a start."""
        return self.method.solves

    @property
    def uses_closed_form(self) -> bool:
        """Whether the equations of the closed form are needed: to solve them, or to choose entries by them."""
        return self.solves or self.saliency == "closed-form"

    @property
    def trains(self) -> bool:
        """Whether the adapter is trained."""
        return self.method.trains

    @property
    def measures(self) -> bool:
        """Whether every target weight is given a saliency, and not its part in a solved edit or none."""
        return self.method.edit is None and self.saliency != "closed-form" and self.locate.granularity != "none"

    @property
    def needs_latents(self) -> bool:
        """Whether any part of the run looks at latents, so that images are read or sampled."""
        if self.method.edit is not None:
            return self.method.reads_latents
        return self.trains or (self.measures and self.saliency != "random")

    @property
    def denoises(self) -> frozenset[str]:
        """Which parts of the latents, `forget` and `retain`, a run denoises to their own noise anywhere, instead of
        asking the frozen model what it would do. Their pictures must show the prompts that they go with."""
        found = {*self.method.denoises}
        if self.measures:
            of_saliency = {"denoising": ("forget",), "guided": ("forget",), "contrast": ("forget", "retain")}
            found |= {*of_saliency.get(self.saliency, ())}
        return frozenset(found | ({"retain"} if self.trains and self.overwrite.ekpc else set()))

    @property
    def in_values(self) -> bool:
        """Whether the adapter is the masked entries themselves, and no product of factors; of a method that computes
        its change, unless that turns out to be of a low rank (`fade.methods.base.Edit`)."""
        if self.method.edit is not None:
            return True
        return self.solves if self.overwrite.parameters == "auto" else self.overwrite.parameters == "values"

    def replace(self, **changes: Any) -> "Config":
        """A copy with `changes`, whose keys are dotted with a double underscore: `locate__keep=0.1`, `seed=3`.

        Another method (`overwrite__method`) brings its own defaults: settings that were the former method's become the
        new one's, those that somebody changed stay.
        """
        nested = _nested(changes)
        overwrite = nested.get("overwrite")
        method = overwrite.get("method") if isinstance(overwrite, dict) else None
        if not isinstance(method, str) or method == self.overwrite.method:
            return _merge(self, nested, "")
        kept = _difference(self, Config.of(self.overwrite.method))
        kept.pop("options", None)
        return Config.of(method, **{**kept, **changes})

    def unread(self) -> dict[str, str]:
        """Settings that a run with these reads nowhere, by dotted name, with the reason (`fade.unread`)."""
        return unread(self)

    def ignored(self) -> dict[str, str]:
        """Those of `unread` that somebody gave: that are not the method's own."""
        return {name: why for name, why in self.unread().items() if self._is_given(name)}

    def refuse_ignored(self) -> None:
        """Raises FadeError, which names the setting and the method, where one was given that a run does not read."""
        for name, why in self.ignored().items():
            raise FadeError(f"{name} would be ignored: {why}")

    def without_ignored(self) -> "Config":
        """A copy without what would be `ignored`: for those who go through several methods with one set of settings."""
        return _merge(self, _nested({_keyed(name): self._own(name) for name in self.ignored()}), "")

    def _own(self, name: str) -> Any:
        """What the method has for a setting, by its dotted name."""
        table, _, own = name.rpartition(".")
        if table == "options":
            return getattr(self.method.options(), own)
        return self.method.settings.get(_keyed(name), getattr(type(getattr(self, table)) if table else Config, own))

    def _is_given(self, name: str) -> bool:
        table, _, own = name.rpartition(".")
        value = self.options[own] if table == "options" else getattr(getattr(self, table) if table else self, own)
        return value != self._own(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, as saved in adapter files."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`; missing keys take their method's defaults. Raises FadeError for unknown keys."""
        overwrite = values.get("overwrite")
        method = overwrite.get("method") if isinstance(overwrite, dict) else None
        return _merge(cls.of(method) if isinstance(method, str) else cls(), values, "")

    @classmethod
    def load(cls, path: str | Path, method: str | None = None) -> "Config":
        """Read a TOML file with tables [data], [locate], [overwrite], [closed_form], [options], `seed` and `concepts`.
        With `method` it is that, whatever the file says. Raises FadeError."""
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FadeError(f"cannot read the config file {path}: {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise FadeError(f"the config file {path} is not valid TOML: {error}") from error
        if method is not None and isinstance(values.setdefault("overwrite", {}), dict):
            if values["overwrite"].get("method", method) != method:
                values.pop("options", None)  # which are another method's
            values["overwrite"]["method"] = method
        return cls.from_dict(values)


def _keyed(name: str) -> str:
    """A setting's dotted name, as `Config.replace` takes it."""
    return name.replace(".", "__")


def _nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes dotted with a double underscore, as nested dictionaries."""
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            nested.setdefault(section, {})[name] = value
        elif isinstance(value, dict):
            nested.setdefault(section, {}).update(value)
        else:
            nested[section] = value
    return nested


def _difference(config: Any, other: Any, path: str = "") -> dict[str, Any]:
    """What differs from `other`, as changes for `Config.replace`."""
    changes: dict[str, Any] = {}
    for one in dataclasses.fields(config):
        value, before = getattr(config, one.name), getattr(other, one.name)
        if dataclasses.is_dataclass(value):
            changes |= _difference(value, before, f"{path}{one.name}__")
        elif value != before:
            changes[f"{path}{one.name}"] = value
    return changes


_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("", 1000), ("B", 1000), ("IB", 1024))
}


def parse_bytes(amount: int | str) -> int:
    """An amount of memory in bytes: a number, or text such as "8GB" (10^9), "7.5 GiB" (2^30). Raises FadeError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(amount), re.ASCII)
    unit = found and _UNITS.get(found[2].upper())
    count = math.floor(float(found[1]) * unit) if unit else 0
    if count < 1:
        raise FadeError(f"{amount!r} is no amount of memory: give a number of bytes, or one such as 8GB or 512MiB")
    return count


def _merge(instance: Any, values: dict[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(type(instance))
    known = {f.name for f in dataclasses.fields(instance)}
    changes = {}
    for key, value in values.items():
        where = f"{path}{key}"
        if key not in known:
            raise FadeError(f"unknown setting '{where}'; known here: {', '.join(sorted(known))}")
        current = getattr(instance, key)
        if dataclasses.is_dataclass(current):
            if dataclasses.is_dataclass(value) and isinstance(value, type(current)):
                changes[key] = value
                continue
            if not isinstance(value, dict):
                raise FadeError(f"setting '{where}' must be a table of settings, not {value!r}")
            changes[key] = _merge(current, value, f"{where}.")
        elif isinstance(current, dict):
            changes[key] = {**current, **_coerce(value, hints[key], where)}
        else:
            changes[key] = _coerce(value, hints[key], where)
    return dataclasses.replace(instance, **changes)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as type `hint`; only lossless conversions (int to float, list to tuple)."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in args:
            raise FadeError(f"setting '{where}' must be one of {', '.join(map(repr, args))}, not {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        if len(kinds) == 1:
            return _coerce(value, kinds[0], where)
        if type(value) not in kinds:
            named = " or ".join(kind.__name__ for kind in kinds)
            raise FadeError(f"setting '{where}' must be of type {named}, not {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise FadeError(f"setting '{where}' must be a list, not {value!r}")
        if args[-1] is Ellipsis:
            return tuple(_coerce(v, args[0], where) for v in value)
        if len(value) != len(args):
            raise FadeError(f"setting '{where}' must have {len(args)} entries, not {len(value)}")
        return tuple(_coerce(v, a, where) for v, a in zip(value, args, strict=True))
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise FadeError(f"setting '{where}' must be a table of settings, not {value!r}")
        return dict(value)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        names = [f.name for f in dataclasses.fields(hint)]
        if not isinstance(value, dict) or sorted(value) != sorted(names):
            raise FadeError(f"each entry of '{where}' must be a table of {' and '.join(names)}, not {value!r}")
        return hint(**{name: _coerce(value[name], str, f"{where}.{name}") for name in names})
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise FadeError(f"setting '{where}' must be of type {hint.__name__}, not {value!r}")
    return value


_WISHES = (
    "locate.memory_budget", "overwrite.rank", "overwrite.alpha", "overwrite.gift", "overwrite.ekpc",
    "closed_form.hardening", "closed_form.refit", "data.forget_images", "data.retain_images",
)  # fmt: skip
"""Settings that are refused as soon as they are given to a method without the part that they are for. Others are
refused when a run is asked for (`Config.refuse_ignored`), because they go along where the method is changed."""


def _check(config: Config) -> None:
    data, locate, overwrite = config.data, config.locate, config.overwrite

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise FadeError(message)

    require(0.0 < locate.keep <= 1.0, f"keep must be in (0, 1], not {locate.keep}: it is the fraction of weights kept")
    _ = locate.budget_bytes  # raises for what is no amount of memory
    require(overwrite.rank >= 1, f"rank must be at least 1, not {overwrite.rank}")
    require(locate.targets is None or len(locate.targets) > 0, "targets must name at least one layer pattern")
    require(1 <= locate.tile <= 4096, f"tile must be in [1, 4096], not {locate.tile}")
    require(0 <= config.seed <= MOST_SEED, f"seed must be in [0, 2^40], not {config.seed}")
    require(overwrite.rank <= 4096, f"rank must be at most 4096, not {overwrite.rank}")
    require(math.isfinite(locate.guidance), f"locate.guidance must be a finite number, not {locate.guidance}")
    objective = config.method.objective
    require(
        objective is None or not objective.moving or not (overwrite.pool or overwrite.stops),
        f"the method {overwrite.method} asks the adapter as it is for its targets, so that none can be kept: leave "
        "pool and stop_forget at 0",
    )
    require(math.isfinite(data.guidance_scale), f"guidance_scale must be a finite number, not {data.guidance_scale}")
    for section, name in (
        (data, "forget_samples"), (data, "retain_samples"), (data, "sampling_steps"), (data, "batch_size"),
        (locate, "passes"), (locate, "batch_size"),
        (overwrite, "steps"), (overwrite, "batch_size"), (overwrite, "retain_batch_size"),
        (overwrite, "accumulation"), (overwrite, "checkpoint_every"), (overwrite, "stop_every"),
    ):  # fmt: skip
        require(getattr(section, name) >= 1, f"{name} must be at least 1, not {getattr(section, name)}")
    for name in ("learning_rate", "alpha", "max_grad_norm"):
        value = getattr(overwrite, name)
        require(value is None or 0 < value < math.inf, f"{name} must be a positive, finite number, not {value}")
    for name in (
        "forget_weight", "retain_weight", "dual_rate", "dual_bound", "gift", "ekpc", "weight_decay", "warmup_steps",
        "stop_forget", "stop_flat", "cooldown_steps", "pool",
    ):  # fmt: skip
        value = getattr(overwrite, name)
        require(0 <= value < math.inf, f"{name} must be finite and not negative, not {value}")
    require(
        not (overwrite.gift and overwrite.ekpc),
        "gift and ekpc are two ways of holding the adapter near its start; choose one and leave the other at 0",
    )
    low, high = overwrite.timestep_band
    require(0.0 <= low < high <= 1.0, f"timestep_band must satisfy 0 <= low < high <= 1, not ({low}, {high})")
    solving = config.closed_form
    require(
        solving.retain_weight is None or 0 < solving.retain_weight < math.inf,
        f"closed_form.retain_weight must be a positive, finite number, not {solving.retain_weight}",
    )
    require(
        0 < solving.retain_change < 1, f"closed_form.retain_change must be between 0 and 1, not {solving.retain_change}"
    )
    require(solving.left is None or 0 < solving.left <= 1, f"closed_form.left must be in (0, 1], not {solving.left}")
    require(0 <= solving.hardening <= 3, f"closed_form.hardening must be from 0 to 3 rounds, not {solving.hardening}")
    require(all(map(str.strip, solving.protect)), "closed_form.protect holds an empty prompt")
    require(
        config.overwrite.method == "closed-form" or not solving.protect,
        f"closed_form.protect would not hold: the method {overwrite.method} has no such constraints. Choose "
        "closed-form, or give what must stay as retain prompts",
    )
    require(
        0 <= solving.damping < math.inf,
        f"closed_form.damping must be finite and not negative, not {solving.damping}",
    )
    require(
        not config.solves or config.in_values,
        f"the method {overwrite.method} solves the masked weights themselves, and no factors: leave out parameters",
    )
    passed_over = unread_by_parts(config)
    for name in _WISHES:
        table, _, own = name.partition(".")
        require(
            name not in passed_over or not getattr(getattr(config, table), own) or not config._is_given(name),
            f"{name} would be ignored: {passed_over.get(name)}",
        )
    require(
        data.forget_from == "concept" or data.forget_images is None,
        "forget_images would be trained as pictures of the surrogate: the method draws those itself (forget_from = "
        "surrogate). Leave forget_images out, or set forget_from to concept",
    )
    require(data.resolution is None or data.resolution >= 8, f"resolution must be at least 8, not {data.resolution}")


PAPER = Config.of("fade")
"""The authors' settings for their sparse-per-weight variant, as far as public (a starting point, not our advice), but
for steps and learning rate, which are for a small model (`fade.methods.fade`)."""
