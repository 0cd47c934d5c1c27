"""Families that were trained as DDPM (Ho et al., arXiv 2006.11239): a time is an integer timestep, noise levels are
those that the scheduler of a pipeline states.

A scheduler is a way of drawing; what the model was trained on are the betas in its config. Schedulers that have none
(EDM, flow matching, consistency models, score-based ones) are refused for training, not for drawing: replacing the
missing betas by some class's defaults would train at noise levels that the model has never seen.
"""

import functools
import warnings
from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from torch import Tensor

from fade.backbones.base import Backbone
from fade.conditioning import Conditioning
from fade.errors import FadeError
from fade.progress import progress_bar

_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

_NOT_TEXT_TO_IMAGE = (
    "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler", "RePaintScheduler", "UnCLIPScheduler",
)  # fmt: skip
"""They have betas, but turn images into noise, inpaint, or belong to other models: they draw no prompt here."""

_INSTEAD = (
    "for unlearning set the scheduler that the model came with, e.g. pipeline.scheduler = "
    "DDIMScheduler.from_pretrained(MODEL, subfolder='scheduler'); the adapter then works with any scheduler"
)


class DdpmBackbone(Backbone):
    """Times are int64 in [0, T), T the number of training timesteps. Noise-, velocity- and sample-prediction models
    alike, with whatever scheduler the pipeline carries: training follows the scheduler's betas, sampling calls the
    pipeline itself."""

    @functools.cached_property
    def schedule(self) -> DDPMScheduler:
        """The noise levels and the prediction type to train with. Raises FadeError where the scheduler states none."""
        return training_schedule(self.pipeline.scheduler)

    @property
    def time_span(self) -> int:
        """T."""
        return len(self.schedule.alphas_cumprod)

    def check_trainable(self) -> None:
        super().check_trainable()
        _ = self.schedule

    def times(self, values: Tensor) -> Tensor:
        return values.long().clamp(max=self.time_span - 1)

    def draw_times(self, count: int, generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform integers in [low·T, high·T)."""
        first = round(low * self.time_span)
        last = max(round(high * self.time_span), first + 1)
        return torch.randint(first, last, (count,), generator=generator)

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """z_t = √ᾱ_t z + √(1 − ᾱ_t) ε."""
        return self.schedule.add_noise(latents, noise, times)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """ε, the velocity √ᾱ_t ε − √(1 − ᾱ_t) z, or z, as the model was trained."""
        kind = self.schedule.config.prediction_type
        if kind == "v_prediction":
            return self.schedule.get_velocity(latents, noise, times)
        return latents if kind == "sample" else noise

    def predict(self, noised: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        arguments = self.family.forward(self, noised, times, conditioning)
        output = self.called_denoiser(noised, timestep=times, return_dict=False, **arguments)[0]
        # Some were trained to predict a variance as well, in channels of its own behind.
        return output[:, : noised.shape[1]] if output.shape[1] != noised.shape[1] else output

    @torch.no_grad()
    def ode(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        steps: int,
        *,
        invert: bool = False,
        batch_size: int = 64,
        progress: bool = False,
        description: str = "drawing",
    ) -> Tensor:
        """DDIM (Song et al., arXiv 2010.02502), with the noise levels and the prediction type that the model was
        trained with, whatever scheduler the pipeline draws with. Inverted and drawn again with the same prompts and
        steps, latents come back but for what the network's answer changes within a step."""
        self._check_steps(steps)
        scheduler = self._ddim_scheduler(DDIMInverseScheduler if invert else DDIMScheduler)
        scheduler.set_timesteps(steps, self.device)
        latents = latents.to(self.device, torch.float32)
        if conditioning.count == 1:
            conditioning = conditioning.repeat(len(latents))
        parts = []
        starts = range(0, len(latents), batch_size)
        with progress_bar(description, len(starts) * steps, progress) as advance:
            for start in starts:
                chunk = latents[start : start + batch_size]
                prompts = conditioning.rows(slice(start, start + batch_size))
                for timestep in scheduler.timesteps:
                    output = self.predict(chunk.to(self.dtype), timestep.expand(len(chunk)), prompts).float()
                    chunk = scheduler.step(output, timestep, chunk).prev_sample
                    advance()
                parts.append(chunk)
        return torch.cat(parts)

    def grid(self, steps: int) -> Tensor:
        self._check_steps(steps)
        scheduler = self._ddim_scheduler(DDIMScheduler)
        scheduler.set_timesteps(steps)
        return torch.cat([scheduler.timesteps, scheduler.timesteps.new_zeros(1)]).long()

    def _check_steps(self, steps: int) -> None:
        if not 1 <= steps <= self.time_span:
            raise FadeError(f"denoising steps must be between 1 and the model's {self.time_span}, not {steps}")

    def _ddim_scheduler(self, kind: type[DDIMScheduler] | type[DDIMInverseScheduler]) -> Any:
        given = self.pipeline.scheduler.config
        trailing = given.get("timestep_spacing") == "trailing"
        scheduler = kind.from_config(
            self.schedule.config,
            # Defaults of the class that hold for pixels: a latent's values are not in [-1, 1].
            clip_sample=False,
            thresholding=False,
            # A picture is at the lowest noise level that the model knows, not at none, of which it knows nothing.
            set_alpha_to_one=False,
            timestep_spacing="trailing" if trailing else "leading",
            steps_offset=0 if trailing else given.get("steps_offset", 0),
        )
        scheduler.alphas_cumprod = self.schedule.alphas_cumprod
        lowest = "initial_alpha_cumprod" if kind is DDIMInverseScheduler else "final_alpha_cumprod"
        setattr(scheduler, lowest, self.schedule.alphas_cumprod[0])
        return scheduler


def training_schedule(scheduler: Any) -> DDPMScheduler:
    """The noise levels ᾱ_t (float32 [num_train_timesteps], on the CPU) and the prediction type to train with.

    Both are the scheduler's own, whatever its class. Raises FadeError naming the scheduler where it has no betas, is
    made for flow matching or continuous noise levels, draws no image from a prompt alone, or predicts something else
    than noise, velocity or sample. Warns where the betas are not the model's or the last noise level teaches nothing.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if scheduler is None:
        raise FadeError(f"the pipeline has no scheduler; {_INSTEAD}")
    if name in _NOT_TEXT_TO_IMAGE:
        raise FadeError(f"{name} does not draw Stable Diffusion's images from a prompt; {_INSTEAD}")
    if not torch.is_tensor(alphas_cumprod) or not {"beta_schedule", "trained_betas"} & config.keys():
        raise FadeError(f"{name} does not state the betas that the model was trained with; {_INSTEAD}")
    if config.get("use_flow_sigmas"):
        raise FadeError(f"{name} has use_flow_sigmas=True, the noise levels of flow matching, not of DDPM; {_INSTEAD}")
    if config.get("timestep_type", "discrete") != "discrete":
        raise FadeError(f"{name} gives the model continuous noise levels, not DDPM's timesteps; {_INSTEAD}")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTION_TYPES:
        raise FadeError(
            f"{name} has the prediction type {prediction!r}, which cannot be trained with; set one of "
            f"{', '.join(PREDICTION_TYPES)}, as the model was trained, e.g. pipeline.scheduler = "
            f"{name}.from_config(pipeline.scheduler.config, prediction_type='epsilon')"
        )
    alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float32)
    stated = config.get("num_train_timesteps", len(alphas_cumprod))
    if alphas_cumprod.shape != (stated,):
        raise FadeError(f"{name} has {len(alphas_cumprod)} noise levels but num_train_timesteps={stated}; {_INSTEAD}")
    if not ((alphas_cumprod >= 0) & (alphas_cumprod <= 1)).all():
        raise FadeError(f"{name} has betas that are not between 0 and 1; {_INSTEAD}")
    _warn(name, config, prediction)

    # DDPM's add_noise and get_velocity read alphas_cumprod alone, which some schedulers do not derive from betas alone.
    schedule = DDPMScheduler(num_train_timesteps=len(alphas_cumprod), prediction_type=prediction)
    schedule.register_to_config(**{name: config[name] for name in _BETAS if name in config})
    schedule.alphas_cumprod = alphas_cumprod
    return schedule


def _warn(name: str, config: Any, prediction: str) -> None:
    if config.get("rescale_betas_zero_snr") and prediction == "epsilon":
        warnings.warn(
            f"{name} has rescale_betas_zero_snr=True but predicts noise: at the last timestep nothing is left to "
            "predict. Set prediction_type='v_prediction' if the model predicts velocities, else "
            "rescale_betas_zero_snr=False",
            stacklevel=2,
        )
    defaults = set(config.get("_use_default_values", ()))
    if defaults.issuperset(_BETAS) and config["beta_schedule"] == "linear":
        warnings.warn(
            f"{name} was made with its class's default betas (linear, {config['beta_start']} to {config['beta_end']}), "
            "which no Stable Diffusion was trained with; make it with "
            f"{name}.from_config(CONFIG), CONFIG being that of the scheduler that the model came with",
            stacklevel=2,
        )
