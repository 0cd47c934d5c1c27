"""DDPM's noise levels (Ho et al., arXiv 2006.11239), as the scheduler of a pipeline states them.

A scheduler is a way of drawing; what the model was trained on are the betas in its config. Schedulers that have none
(EDM, flow matching, consistency models, score-based ones) are refused for training, not for drawing: replacing the
missing betas by some class's defaults would train at noise levels that the model has never seen.
"""

import warnings
from typing import Any

import torch
from diffusers import DDPMScheduler

from fade.errors import FadeError

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
