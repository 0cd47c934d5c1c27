"""Stage 2, overwrite: self-distillation of the sparse adapter (FADE, arXiv 2602.07058, section 3).

With ε_θ the frozen model and ε_{θ+Δ} the adapted one, on noised latents z_t,

    L_f = ‖ε_{θ+Δ}(z_t^f, c_forget) − ε_θ(z_t^f, c_surrogate)‖²
    L_r = ‖ε_{θ+Δ}(z_t^r, c_retain) − ε_θ(z_t^r, c_retain)‖²
    L   = w_f L_f + w_r L_r,   averaged over elements,

and only the adapter is trained. Teacher and student are one network, with the adapter off and on; each runs once per
step on the forget and the retain half together.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fade.adapter import Adapter
from fade.backbones import Backbone
from fade.config import OverwriteConfig
from fade.errors import DivergedError
from fade.latents import Latents
from fade.layers import MaskedLoraLayer
from fade.noise import epoch_order, forget_timesteps, loss_scale, step_generator, uniform_timesteps
from fade.progress import progress_bar
from fade.run_folder import Checkpoint


@dataclass
class Losses:
    """Mean losses of each optimiser step, unweighted."""

    forget: list[float] = field(default_factory=list)
    retain: list[float] = field(default_factory=list)


def overwrite(
    backbone: Backbone,
    adapter: Adapter,
    latents: Latents,
    embeddings: Mapping[str, Tensor],
    config: OverwriteConfig,
    seed: int,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
) -> Losses:
    """Trains the adapter in place and returns the losses.

    `embeddings` maps every prompt of `latents` to [tokens, width]. With `checkpoint` the state is written there every
    `config.checkpoint_every` steps; where one is there already, training goes on from it and ends as it would have
    without the interruption. Raises DivergedError at the first loss that is not finite, and leaves the last checkpoint;
    FadeError for a checkpoint that does not fit.
    """
    forget = torch.stack([embeddings[p] for p in latents.forget_prompts])
    surrogate = torch.stack([embeddings[p] for p in latents.surrogate_prompts])
    retain = torch.stack([embeddings[p] for p in latents.retain_prompts])
    sample_forget = forget_timesteps(config, backbone, latents.forget[:16], forget[:16], surrogate[:16], seed)
    sample_retain = uniform_timesteps(backbone.num_timesteps)
    device, halves = backbone.device, [config.batch_size, config.retain_batch_size]
    layers = list(adapter.layers.values())
    scale = loss_scale(backbone.dtype, sum(halves) * latents.forget[0].numel())

    def batch_losses(batch: int) -> tuple[Tensor, Tensor]:
        i_f = epoch_order(seed, "overwrite forget", len(latents.forget), batch, halves[0])
        i_r = epoch_order(seed, "overwrite retain", len(latents.retain), batch, halves[1])
        generator = step_generator(seed, "overwrite", batch)
        clean = torch.cat([latents.forget[i_f], latents.retain[i_r]])
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        timesteps = torch.cat([sample_forget(halves[0], generator), sample_retain(halves[1], generator)]).to(device)
        noised = backbone.add_noise(clean, noise, timesteps)
        with torch.inference_mode(), _adapters_off(layers):
            taught = backbone.predict(noised, timesteps, torch.cat([surrogate[i_f], retain[i_r]]))
        # Autograd may not save a tensor made under inference mode, so the loss gets a copy.
        target_forget, target_retain = taught.float().clone().split(halves)
        student = backbone.predict(noised, timesteps, torch.cat([forget[i_f], retain[i_r]])).float()
        student_forget, student_retain = student.split(halves)
        return F.mse_loss(student_forget, target_forget), F.mse_loss(student_retain, target_retain)

    parameters = adapter.parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay, foreach=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine_with_warmup(step, config))
    losses = Losses() if checkpoint is None else _restore(checkpoint, parameters, optimizer, schedule, config.steps)
    first = len(losses.forget)

    with progress_bar("overwriting", config.steps, progress) as advance:
        for _ in range(first):
            advance()
        for step in range(first, config.steps):
            sums = torch.zeros(2)
            for micro in range(config.accumulation):
                loss_forget, loss_retain = batch_losses(step * config.accumulation + micro)
                loss = config.forget_weight * loss_forget + config.retain_weight * loss_retain
                (scale * loss / config.accumulation).backward()
                sums += torch.stack([loss_forget, loss_retain]).detach().cpu() / config.accumulation
            if not torch.isfinite(sums).all():
                raise _diverged(f"loss became {sums.sum().item()}", step, config, checkpoint)
            # Written only now, when what the steps before made is known to have a finite loss.
            if checkpoint is not None and step > first and step % config.checkpoint_every == 0:
                checkpoint.save(_state(parameters, optimizer), vars(losses))
            if scale != 1.0:
                torch._foreach_div_([p.grad for p in parameters], scale)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            if not torch.isfinite(norm):
                raise _diverged(f"gradient became {norm.item()}", step, config, checkpoint)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.forget.append(float(f"{sums[0].item():.5g}"))
            losses.retain.append(float(f"{sums[1].item():.5g}"))
            advance(f"forget {sums[0]:.2e}  retain {sums[1]:.2e}")
    for parameter in parameters:
        parameter.requires_grad_(False)
    return losses


def _diverged(what: str, step: int, config: OverwriteConfig, checkpoint: Checkpoint | None) -> DivergedError:
    there = checkpoint is not None and checkpoint.path.is_file()
    kept = f" The last good checkpoint is kept in {checkpoint.path}." if there else ""
    return DivergedError(
        f"the {what} at step {step + 1}.{kept} Start again with --overwrite and a learning rate below "
        f"{config.learning_rate:g}"
    )


def _cosine_with_warmup(step: int, config: OverwriteConfig) -> float:
    """Factor of the learning rate: linear up to 1 over the warm-up, then half a cosine down to 0."""
    warmup = min(config.warmup_steps, config.steps - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))


@contextlib.contextmanager
def _adapters_off(layers: Sequence[MaskedLoraLayer]) -> Iterator[None]:
    """The frozen model: the flag that `disable_adapters` sets, without its walk over the whole model."""
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _state(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint holds: each parameter and its optimiser state, by the parameter's number."""
    tensors = {}
    for index, parameter in enumerate(parameters):
        tensors[f"{index}.parameter"] = parameter
        tensors |= {f"{index}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def _restore(
    checkpoint: Checkpoint,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    steps: int,
) -> Losses:
    """Restores parameters, optimiser and schedule where there is a checkpoint, and returns the losses until then.

    Raises FadeError, before anything has changed, where it does not fit.
    """
    saved = checkpoint.load()
    if saved is None:
        return Losses()
    tensors, losses = saved[0], Losses(**saved[1])
    done = len(losses.forget)
    kinds = ("parameter", "step", "exp_avg", "exp_avg_sq")
    if tensors.keys() != {f"{index}.{kind}" for index in range(len(parameters)) for kind in kinds}:
        raise checkpoint.misfit("it holds other tensors")
    for index, parameter in enumerate(parameters):
        for kind in kinds:
            tensor = tensors[f"{index}.{kind}"]
            shape = () if kind == "step" else parameter.shape
            if tensor.shape != shape or tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
                raise checkpoint.misfit(f"{index}.{kind} has another shape or dtype, or numbers that are not finite")
        if tensors[f"{index}.step"] != done:
            raise checkpoint.misfit("its losses are of another number of steps")
    if not 0 < done < steps:
        raise checkpoint.misfit(f"it is of {done} steps")
    for index, parameter in enumerate(parameters):
        state = {kind: tensors[f"{index}.{kind}"] for kind in kinds}
        with torch.no_grad():
            parameter.copy_(state.pop("parameter"))
        optimizer.state[parameter] = {
            kind: tensor if kind == "step" else tensor.to(parameter.device) for kind, tensor in state.items()
        }
    # Not by schedule.step(), which warns where no optimiser step of this process went before it.
    schedule.last_epoch = done
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(done)
    return losses
