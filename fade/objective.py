"""What an adapter is trained on. `fade.distillation` has the one loop that trains; a method that trains otherwise
subclasses `Objective` and says in what it differs: what is noised, what the adapter should predict, how the two halves
of a batch are weighed, what a step's gradient is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fade.conditioning import Conditioning, EncodedPrompts
from fade.noise import TimeSampler, forget_times
from fade.regularisers import ImportancePenalty

if TYPE_CHECKING:
    from fade.adapter import Adapter
    from fade.backbones import Backbone
    from fade.config import OverwriteConfig
    from fade.latents import Latents
    from fade.layers import MaskedLoraLayer


@contextlib.contextmanager
def without_adapters(layers: Sequence[MaskedLoraLayer]) -> Iterator[None]:
    """The frozen model: the flag that `disable_adapters` sets, without its walk over the whole model."""
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@dataclass(frozen=True)
class Training:
    """A training that is about to begin.

    Attributes:
        prompts: every prompt of `latents`, encoded.
        options: the method's own settings.
    """

    backbone: Backbone
    adapter: Adapter
    latents: Latents
    prompts: EncodedPrompts
    config: OverwriteConfig
    options: Any
    seed: int


@dataclass(frozen=True)
class Batch:
    """What a target is computed for: n samples of one batch or of several, forget and retain halves mixed.

    Attributes:
        clean, noise, noised: [n, C, h, w], on the device; `noised` is `clean` at `times` [n].
        asked: the prompts that the adapter is asked with, as rows of the run's prompts, int64 [n] on the CPU.
        answers: the same, but of the forget half the surrogate's.
        forget: which samples are of the forget half, bool [n] on the device.
    """

    clean: Tensor
    noise: Tensor
    noised: Tensor
    times: Tensor
    asked: Tensor
    answers: Tensor
    forget: Tensor

    def where(self, chosen: Tensor) -> Batch:
        """Those samples alone, of a mask [n] on the device."""
        here = chosen.cpu()
        return Batch(
            self.clean[chosen], self.noise[chosen], self.noised[chosen], self.times[chosen], self.asked[here],
            self.answers[here], self.forget[chosen],
        )  # fmt: skip


Learn = Callable[[float, float], tuple[float, float]]
"""Replaces the adapter's gradients by those of `w_f L_f + w_r L_r` on a step's batches, for these weights; returns both
losses. Called again, it asks about the same batches with the adapter as it is then."""


class Objective:
    """Self-distillation (FADE, arXiv 2602.07058): on the forget half the frozen model's prediction for the surrogate,
    on the retain half its prediction for the same prompt; the mean squared errors weighed by the settings.

    `losses` names what the two halves measure, in records and reports. `moving` says that targets depend on the adapter
    as it is, so that none is kept for later: the settings then have `pool` and `stop_forget` 0.
    """

    losses: ClassVar[tuple[str, str]] = ("forget", "retain")
    moving: ClassVar[bool] = False

    def __init__(self, training: Training) -> None:
        self.training = training
        self.backbone, self.adapter, self.config = training.backbone, training.adapter, training.config
        self.options = training.options
        self._layers = list(training.adapter.layers.values())
        self._held = ImportancePenalty(training, self.config.ekpc) if self.config.ekpc else None

    # --- what methods say -------------------------------------------------------------------------------------------

    def forget_times(self) -> TimeSampler:
        """Where in the diffusion the forget half is noised to."""
        latents, prompts = self.training.latents, self.training.prompts
        rows = [prompts.rows(texts[:16]) for texts in (latents.forget_prompts, latents.surrogate_prompts)]
        read = [self.read(row) for row in rows]
        return forget_times(self.config, self.backbone, latents.forget[:16], *read, self.training.seed)

    def answers(self, answers: Tensor, forget: int, generator: torch.Generator) -> Tensor:
        """The rows of prompts whose answers are wanted, int64, of a whole batch, whose first `forget` are the forget
        half; given are the surrogates' and the retain prompts'."""
        return answers

    def placed(
        self, asked: Tensor, answers: Tensor, times: Tensor, forget: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of a whole batch, whose first `forget` are the forget half: what its samples are asked with and the prompts
        whose answers are wanted, both as rows that `read` knows, and their times [n] on the CPU."""
        return asked, answers, times

    def noised(self, clean: Tensor, noise: Tensor, times: Tensor, asked: Tensor, forget: Tensor) -> Tensor:
        """Noised latents [n, C, h, w]; arguments as in `Batch`. Called without gradients."""
        return self.backbone.add_noise(clean, noise, times)

    def target(self, batch: Batch) -> Tensor:
        """What the adapter should predict, [n, C, h, w]. Called without gradients, the adapter on."""
        return self.frozen(batch.noised, batch.times, batch.answers)

    def error(self, predicted: Tensor, taught: Tensor) -> Tensor:
        """The loss of a half: the mean over samples of how far predictions [n, C, h, w] are from what was taught, both
        float32."""
        return F.mse_loss(predicted, taught)

    def penalty(self) -> Tensor | None:
        """What is added to the weighed losses of every batch: a number that depends on the adapter's parameters, as
        float32 []. What it is computed from, but for them, must stay where it is in memory. With `ekpc`, its penalty
        (`fade.regularisers`)."""
        return None if self._held is None else self._held()

    def weights(self, forget: Sequence[float], retain: Sequence[float]) -> tuple[float, float]:
        """The weights of both losses in the next step, after the losses of all steps before, as recorded. With
        `dual_rate`, that of the forget loss by dual ascent (`fade.methods.primal_dual`)."""
        weight, rate = self.config.forget_weight, self.config.dual_rate
        if rate and forget and forget[0]:
            for loss in forget:
                weight = max(0.0, weight + rate * (loss / forget[0] - self.config.dual_bound))
        return weight, self.config.retain_weight

    def prepare(self, step: int) -> None:
        """Called before every step, the adapter on: may change what `read` gives for rows of the objective's own."""

    def state(self) -> dict[str, Tensor]:
        """What steps leave for later ones, by name; a checkpoint keeps it beside the adapter."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state` gave, of the same names and shapes."""

    def step(self, learn: Learn, weights: tuple[float, float]) -> tuple[float, float]:
        """Leaves the gradient of a step in the adapter's parameters, which the optimiser then takes; returns both
        losses. The parameters are afterwards as before."""
        return learn(*weights)

    # --- what they say it with --------------------------------------------------------------------------------------

    def read(self, rows: Tensor) -> Conditioning:
        """The prompts of these rows."""
        return self.training.prompts.conditioning.rows(rows)

    def frozen(self, noised: Tensor, times: Tensor, prompts: Tensor | Conditioning) -> Tensor:
        """What the frozen model predicts for prompts, or rows of them."""
        with torch.inference_mode(), without_adapters(self._layers):
            return self.current(noised, times, prompts)

    def current(self, noised: Tensor, times: Tensor, prompts: Tensor | Conditioning) -> Tensor:
        """What the model with the adapter predicts, without a gradient."""
        with torch.inference_mode():
            prompts = prompts if isinstance(prompts, Conditioning) else self.read(prompts)
            return self.backbone.predict(noised, times, prompts)

    def forget_only(self, batch: Batch, wanted: Callable[[Batch], Tensor], others: Tensor) -> Tensor:
        """Targets [n, C, h, w]: `wanted` of the forget half, of the others theirs."""
        target = others.clone()
        if batch.forget.any():
            target[batch.forget] = wanted(batch.where(batch.forget)).to(target)
        return target
