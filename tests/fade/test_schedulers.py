"""Every scheduler that diffusers exports: trained with its own noise levels and prediction type, or refused by name."""

import warnings
from typing import Any

import diffusers
import pytest
import torch
from diffusers import EulerDiscreteScheduler, SchedulerMixin
from transformers import CLIPTokenizer

import fade
from fade.backbones import Backbone, backbone_for
from fade.backbones.ddpm import training_schedule
from fade.config import Config
from fade.errors import FadeError

from .adapters import random_adapter
from .conftest import denoise, tiny_pipeline

SCHEDULERS = sorted(
    name
    for name in dir(diffusers)
    if name != "SchedulerMixin"
    and isinstance(cls := getattr(diffusers, name), type)
    and issubclass(cls, SchedulerMixin)
)
TRAINED = {
    "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMParallelScheduler", "DDIMScheduler",
    "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
}  # fmt: skip
NEEDED = {
    "AmusedScheduler": {"mask_token_id": 0},
    "UnCLIPScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0},
}


def config_of_a_model(**changes: Any) -> dict[str, Any]:
    """A scheduler's config as a model's folder states it, with betas that are no class's default."""
    start, end = (torch.rand(2).double() * torch.tensor([1e-3, 2e-2]) + torch.tensor([5e-4, 1e-2])).tolist()
    betas = {"beta_start": start, "beta_end": end, "beta_schedule": "scaled_linear"}
    return {"num_train_timesteps": 1000, "prediction_type": "epsilon", **betas, **changes}


def made(name: str, config: dict[str, Any]) -> Any:
    cls = getattr(diffusers, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return cls.from_config(config, **NEEDED.get(name, {}))
    except ValueError as error:
        pytest.skip(f"{name} cannot be made: {error}")


def noise_levels(config: dict[str, Any]) -> torch.Tensor:
    betas = torch.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_trained_with_the_models_noise_levels_or_refused_by_name(name: str) -> None:
    config = config_of_a_model()
    scheduler = made(name, config)
    if name not in TRAINED:
        with pytest.raises(FadeError, match=f"^{name} .*set the scheduler that the model came with") as refused:
            training_schedule(scheduler)
        assert "\n" not in str(refused.value)
        return
    schedule = training_schedule(scheduler)
    assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod.float())
    assert schedule.config.beta_start == config["beta_start"] and schedule.config.beta_schedule == "scaled_linear"
    if not name.startswith("CogVideoX"):  # shifts its signal-to-noise ratios
        torch.testing.assert_close(schedule.alphas_cumprod.double(), noise_levels(config), rtol=1e-4, atol=1e-6)
    assert schedule.config.prediction_type == "epsilon"


def test_no_scheduler_class_is_forgotten() -> None:
    assert len(SCHEDULERS) > 30
    assert set(SCHEDULERS) & TRAINED >= TRAINED - {"DPMSolverSDEScheduler"}  # needs torchsde


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rescale_betas_zero_snr", True),
        ("trained_betas", "random"),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("beta_schedule", "linear"),
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("timestep_spacing", "trailing"),
        ("prediction_type", "v_prediction"),
        ("prediction_type", "sample"),
    ],
)
@pytest.mark.parametrize("name", sorted(TRAINED & set(SCHEDULERS)))
def test_options_of_the_scheduler_reach_training(name: str, option: str, value: Any) -> None:
    if value == "random":
        value = (torch.rand(1000) * 0.02 + 1e-4).tolist()
    config = config_of_a_model(**{"prediction_type": "v_prediction", option: value})
    try:
        scheduler = made(name, config)
    except (ImportError, NotImplementedError) as error:
        pytest.skip(str(error))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing here is suspicious
        schedule = training_schedule(scheduler)
    assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod.float())
    if option == "trained_betas" and not name.startswith("CogVideoX"):
        wanted = (1 - torch.tensor(value, dtype=torch.float64)).cumprod(0)
        torch.testing.assert_close(schedule.alphas_cumprod.double(), wanted, rtol=1e-4, atol=1e-7)
    if option == "rescale_betas_zero_snr" and option in scheduler._get_init_keys(type(scheduler)):
        assert schedule.alphas_cumprod[-1] < 1e-6
    # z_t and the target by the definition, in float64.
    latents, noise, timesteps = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 17, 500, 999])
    alpha = scheduler.alphas_cumprod[timesteps].double().view(-1, 1, 1, 1)
    noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(schedule.add_noise(latents, noise, timesteps).double(), noised, rtol=1e-5, atol=1e-5)
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    torch.testing.assert_close(
        schedule.get_velocity(latents, noise, timesteps).double(), velocity, rtol=1e-5, atol=1e-5
    )
    assert schedule.config.prediction_type == scheduler.config.prediction_type == config["prediction_type"]


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "flow matching"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "flow matching"),
        ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "prediction type 'flow_prediction'"),
        ("EulerDiscreteScheduler", {"prediction_type": "epsilom"}, "prediction type 'epsilom'.*epsilon, v_prediction"),
        ("PNDMScheduler", {"prediction_type": None}, "prediction type None"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "continuous noise levels"),
        ("DDIMScheduler", {"trained_betas": [0.1] * 10}, "10 noise levels but num_train_timesteps=1000"),
        ("DDIMScheduler", {"trained_betas": [2.5] * 1000}, "not between 0 and 1"),
        ("DDIMScheduler", {"trained_betas": [float("nan")] * 1000}, "not between 0 and 1"),
    ],
)
def test_configs_that_cannot_be_trained_with(name: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(FadeError, match=f"^{name} .*{reason}"):
        training_schedule(made(name, config_of_a_model(**changes)))


def test_a_scheduler_without_betas_is_not_given_the_defaults_of_ddpm(tokenizer: CLIPTokenizer) -> None:
    """The EDM scheduler keeps betas of a config it was made from, unused; made alone it has none at all."""
    for scheduler in (made("EDMEulerScheduler", config_of_a_model()), diffusers.EDMEulerScheduler()):
        backbone = backbone_for(tiny_pipeline(tokenizer, scheduler=scheduler))
        for read in (lambda b: b.schedule, lambda b: b.time_span, lambda b: b.check_trainable()):
            with pytest.raises(FadeError, match="EDMEulerScheduler does not state the betas"):
                read(backbone)
        with pytest.raises(FadeError, match="EDMEulerScheduler"):
            backbone.target(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8), torch.tensor([3]))


def test_suspicious_betas_are_told(tokenizer: CLIPTokenizer) -> None:
    with pytest.warns(
        UserWarning, match=r"EulerDiscreteScheduler was made with its class's default betas \(linear, 0.0001"
    ):
        training_schedule(EulerDiscreteScheduler())
    with pytest.warns(UserWarning, match="rescale_betas_zero_snr=True but predicts noise"):
        training_schedule(made("DDIMScheduler", config_of_a_model(rescale_betas_zero_snr=True)))


def test_refused_before_anything_is_drawn_but_adapters_load(
    tokenizer: CLIPTokenizer, tmp_path: Any, quick: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny_pipeline(tokenizer)
    adapter = random_adapter(pipeline)
    adapter.save(tmp_path / "adapter.safetensors")
    wanted = denoise(pipeline)
    monkeypatch.setattr(Backbone, "sample_latents", lambda *_, **__: pytest.fail("drawn"))
    for scheduler in (diffusers.EDMEulerScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()):
        other = tiny_pipeline(tokenizer, scheduler=scheduler)
        with pytest.raises(FadeError, match=f"{type(scheduler).__name__} does not state the betas"):
            fade.unlearn(other, "three", "eight", config=quick, progress=False, output=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        fade.load_adapter(other, tmp_path / "adapter.safetensors")
        # In the file are values, which are drawn with in one product: rounded otherwise than two products of factors.
        torch.testing.assert_close(denoise(other), wanted, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "UniPCMultistepScheduler", "KDPM2DiscreteScheduler"])
def test_unlearning_and_drawing_with_another_scheduler(tokenizer: CLIPTokenizer, quick: Config, name: str) -> None:
    pipeline = tiny_pipeline(tokenizer, scheduler=made(name, config_of_a_model()))
    before = pipeline.scheduler.config
    fade.unlearn(pipeline, "three", "eight", config=quick.replace(data__sampling_steps=4), progress=False)
    assert torch.isfinite(backbone_for(pipeline).generate(["a cat"], [3], steps=4)).all()
    assert pipeline.scheduler.config == before


def test_a_scheduler_that_cannot_draw_says_so(tokenizer: CLIPTokenizer) -> None:
    for name, changes in {
        "PNDMScheduler": {"prediction_type": "sample"},
        "RePaintScheduler": {},
        "LCMScheduler": {"original_inference_steps": 1},
    }.items():
        backbone = backbone_for(tiny_pipeline(tokenizer, scheduler=made(name, config_of_a_model(**changes))))
        with pytest.raises(FadeError, match=f"cannot draw 2 steps with {name}: ."):
            backbone.generate(["a cat"], [0], steps=2)
