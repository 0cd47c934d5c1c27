"""Stage 2, overwrite: self-distillation of the sparse adapter (FADE, arXiv 2602.07058, section 3).

With ε_θ the frozen model and ε_{θ+Δ} the adapted one, on noised latents z_t,

    L_f = ‖ε_{θ+Δ}(z_t^f, c_forget) − ε_θ(z_t^f, c_surrogate)‖²
    L_r = ‖ε_{θ+Δ}(z_t^r, c_retain) − ε_θ(z_t^r, c_retain)‖²
    L   = w_f L_f + w_r L_r,   averaged over elements,

and only the adapter is trained. Teacher and student are one network, with the adapter off and on. What the teacher says
does not change while the student learns, so it is asked once about a pool of noised latents, which the student then
goes through again and again; and on others, held out, both losses tell when the concept is forgotten. Both are ours:
in the paper noise is fresh and the number of steps fixed.

The loop is every trained method's. What a method trains on instead of L is its `Objective` (`fade.objective`).
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from fade import processes
from fade.adapter import Adapter
from fade.backbones import Backbone
from fade.captured_step import CapturedStep, why_not_captured
from fade.conditioning import Conditioning, EncodedPrompts
from fade.config import OverwriteConfig
from fade.errors import DivergedError
from fade.latents import Latents
from fade.noise import epoch_order, loss_scale, step_generator, times_between
from fade.objective import Batch, Objective, Training, without_adapters
from fade.progress import progress_bar
from fade.regularisers import FisherPull
from fade.run_folder import Checkpoint
from fade.training_mode import ResolvedMode, rows_in


@dataclass
class Losses:
    """Mean losses of each optimiser step, unweighted; and both on held-out noise, after every `stop_every` steps and
    after the last, as shares of the frozen model's own forget loss there (empty where the run does not stop)."""

    forget: list[float] = field(default_factory=list)
    retain: list[float] = field(default_factory=list)
    held_out_forget: list[float] = field(default_factory=list)
    held_out_retain: list[float] = field(default_factory=list)

    def end(self, config: OverwriteConfig) -> tuple[int, bool]:
        """After how many steps the run ends as far as is known by now, and whether because the concept is forgotten."""
        checks = zip(self.held_out_forget, self.held_out_retain, [0.0, *self.held_out_retain], strict=False)
        for number, (forget, retain, before) in enumerate(checks, 1):
            if forget <= config.stop_forget and retain >= (1 - config.stop_flat) * before:
                end = number * config.stop_every + config.cooldown_steps
                return (end, True) if end < config.steps else (config.steps, False)
        return config.steps, False

    def record(self, config: OverwriteConfig, names: tuple[str, str] = Objective.losses) -> dict[str, Any]:
        """What a run's record says of its training: the losses by what the method calls them, how many steps were made,
        whether they ended because the concept is `forgotten` or at the setting's number of `steps`, and the losses on
        held-out noise."""
        held_out = dict(zip(names, (self.held_out_forget, self.held_out_retain), strict=True))
        return {
            "losses": dict(zip(names, (self.forget, self.retain), strict=True)),
            "steps": len(self.forget),
            "stopped_by": "forgotten" if self.end(config)[1] else "steps",
            **({"held_out_losses": held_out} if config.stops else {}),
        }


@dataclass(frozen=True)
class Trained:
    """What training made, beside the adapter."""

    losses: Losses
    training_mode: dict[str, Any]
    """`ResolvedMode.record`."""
    cuda_graph: str
    """`captured`, or why the student's passes were launched one kernel at a time."""
    names: tuple[str, str] = Objective.losses
    """What the method calls both losses."""

    def record(self, config: OverwriteConfig) -> dict[str, Any]:
        """What a run's record says of its training."""
        return {
            **self.losses.record(config, self.names),
            "training_mode": self.training_mode,
            "cuda_graph": self.cuda_graph,
        }


@dataclass(frozen=True)
class _Taught:
    """Noised latents [n, C, h, w], the forget half first, and what the teacher says of them. In a run of several
    processes this one's share of them, which may be none."""

    asked: Tensor
    """The rows of the prompts that the student is asked with."""
    noised: Tensor
    times: Tensor
    taught: Tensor


TEACHER_BATCHES = 2
"""Batches that the teacher is asked about at once. Without gradients, twice the latents of a training step take less
memory than the step. On one CPU core a sample of DigitCanvas costs 2.0 ms in a pass of 32, 2.4 ms in one of 16, and no
less in larger ones."""


def overwrite(
    backbone: Backbone,
    adapter: Adapter,
    latents: Latents,
    prompts: EncodedPrompts,
    config: OverwriteConfig,
    seed: int,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
    objective: type[Objective] = Objective,
    options: Any = None,
) -> Trained:
    """Trains the adapter in place on a method's objective, which has options of its own, and returns the losses, and
    how they were computed.

    `prompts` has every prompt of `latents`. With `checkpoint` the state is written there every
    `config.checkpoint_every` steps; where one is there already, training goes on from it and ends as it would have
    without the interruption. Raises DivergedError at the first loss that is not finite, and leaves the last checkpoint;
    FadeError for a checkpoint that does not fit.
    """
    forget, surrogate, retain = (
        prompts.rows(texts) for texts in (latents.forget_prompts, latents.surrogate_prompts, latents.retain_prompts)
    )
    aim = objective(Training(backbone, adapter, latents, prompts, config, options, seed))
    read = aim.read
    sample_forget, sample_retain = aim.forget_times(), times_between(backbone)
    device, halves = backbone.device, [config.batch_size, config.retain_batch_size]
    # Noise and times are drawn for whole batches, so that however many processes share them train on the same.
    own = processes.share(sum(halves))
    own_halves = [max(0, min(own.stop, halves[0]) - own.start), max(0, own.stop - max(own.start, halves[0]))]
    weights = [count / whole for count, whole in zip(own_halves, halves, strict=True)]
    of_forget = torch.arange(sum(own_halves), device=device) < own_halves[0]
    # The names of a batch's prompts as tensors, the same for all batches.
    names = tuple(read(forget[:1].expand(sum(own_halves))).tensors())
    # A pool waits in host memory, two latents a sample, and takes nothing from an accelerator.
    keep = torch.device("cpu") if config.pool else device
    layers = list(adapter.layers.values())
    scale = loss_scale(backbone.dtype, sum(halves) * latents.forget[0].numel())

    def batches(stream: str, numbers: Sequence[int]) -> list[_Taught]:
        """Those batches of a stream of noise, with what one pass of the teacher says of them."""
        parts = []
        for number in numbers:
            i_f = epoch_order(seed, f"{stream} forget", len(latents.forget), number, halves[0])
            i_r = epoch_order(seed, f"{stream} retain", len(latents.retain), number, halves[1])
            generator = step_generator(seed, stream, number)
            clean = torch.cat([latents.forget[i_f], latents.retain[i_r]])
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            drawn = [sample_forget(halves[0], generator), sample_retain(halves[1], generator)]
            answers = aim.answers(torch.cat([surrogate[i_f], retain[i_r]]), halves[0], generator)
            asked = torch.cat([forget[i_f], retain[i_r]])
            asked, answers, times = aim.placed(asked, answers, torch.cat(drawn), halves[0], generator)
            asked, answers, times = asked[own], answers[own], times[own].to(device)
            clean, noise = clean[own], noise[own]
            with torch.no_grad():
                noised = aim.noised(clean, noise, times, asked, of_forget) if len(clean) else clean
            parts.append(Batch(clean, noise, noised, times, asked, answers, of_forget))
        joined = Batch(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Batch)))
        taught = joined.noised
        if len(taught):
            with torch.no_grad():
                taught = aim.target(joined)
        # Autograd may not save a tensor made under inference mode, so the loss gets a copy.
        taught = taught.clone().split([len(part.noised) for part in parts])
        return [
            _Taught(part.asked, part.noised.to(keep), part.times.to(keep), target.to(keep))
            for part, target in zip(parts, taught, strict=True)
        ]

    def student_inputs(batch: _Taught) -> tuple[Tensor, ...]:
        asked = read(batch.asked).tensors()
        return batch.noised.to(device), batch.times.to(device), batch.taught.to(device), *asked.values()

    def halved_losses(noised: Tensor, times: Tensor, taught: Tensor, *asked: Tensor) -> tuple[Tensor, Tensor]:
        conditioning = Conditioning.from_tensors(dict(zip(names, asked, strict=True)))
        predicted = backbone.predict(noised, times, conditioning).float()
        pairs = zip(predicted.split(own_halves), taught.float().split(own_halves), weights, strict=True)
        return tuple(_share_of_mean(aim.error, *halved) for halved in pairs)

    def student_losses(weights_of_both: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is differentiated, and the losses of both halves: this process's summands of the means."""
        loss_forget, loss_retain = halved_losses(*inputs)
        loss = weights_of_both[0] * loss_forget + weights_of_both[1] * loss_retain
        if (penalty := aim.penalty()) is not None:
            loss = loss + sum(own_halves) / sum(halves) * penalty
        return scale * loss / config.accumulation, loss_forget, loss_retain

    def pooled() -> list[_Taught]:
        pool: list[_Taught] = []
        size = min(config.pool, config.steps * config.accumulation)
        with progress_bar("asking the teacher", size, progress) as advance:
            while len(pool) < size:
                more = batches("overwrite", range(len(pool), min(len(pool) + TEACHER_BATCHES, size)))
                pool += more
                for _ in more:
                    advance()
        return pool

    def held_out_losses() -> list[float]:
        if not sum(own_halves):
            return processes.total([0.0, 0.0])
        with torch.inference_mode():
            return processes.total([loss.item() for loss in halved_losses(*student_inputs(held_out))])

    def rows_in_a_step() -> list[int]:
        """Counted in a pass of the frozen model on one sample: every sample has as many."""
        start = backbone.times(torch.zeros(1, device=device))
        with torch.inference_mode(), without_adapters(layers):
            rows = rows_in(layers, lambda: backbone.predict(latents.retain[:1], start, read(retain[:1])))
        # The same on all processes, so that all train in the same mode.
        return [processes.largest_share(sum(halves)) * count for count in rows]

    parameters = adapter.parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    pull = FisherPull(parameters, config.gift) if config.gift else None
    optimizer = torch.optim.AdamW(parameters, config.peak_rate, weight_decay=config.weight_decay, fused=True)
    losses = _restore(checkpoint, parameters, optimizer, aim, config)
    first = len(losses.forget)
    mode = ResolvedMode.of(
        config.training_mode, adapter.name, layers, rows_in_a_step, keep=config.cuda_graph == "on"
    )  # fmt: skip
    eager, captured = why_not_captured(config.cuda_graph, backbone, mode, prompts.conditioning), None
    if eager is not None and config.cuda_graph == "on":
        _warn_of_eager(eager)
    pool = pooled() if config.pool else None
    held_out, frozen = None, 1.0
    if config.stops:
        (held_out,) = batches("overwrite held out", [0])
        with without_adapters(layers):
            frozen = held_out_losses()[0]

    def check(step: int) -> None:
        """Both losses on held-out noise after so many steps, as rounded in the record: a resumed run reads them there
        and must end where an uninterrupted one ends."""
        shares = [float(f"{loss / frozen:.5g}") if frozen else 0.0 for loss in held_out_losses()]
        if not all(map(math.isfinite, shares)):
            raise _diverged(f"loss on held-out noise became {sum(shares)}", step, config, checkpoint)
        losses.held_out_forget.append(shares[0])
        losses.held_out_retain.append(shares[1])

    def one_pass(batch: _Taught, weights_of_both: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a batch's gradients to those of the step, and returns both its losses."""
        nonlocal captured, eager
        if not sum(own_halves):
            return torch.zeros(()), torch.zeros(())
        inputs = (weights_of_both, *student_inputs(batch))
        if captured is None and eager is None:
            try:
                captured = CapturedStep(student_losses, parameters, inputs)
            except RuntimeError as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                eager = f"it cannot be captured ({reason})"
                _warn_of_eager(eager)
        if captured is not None:
            return captured(*inputs)[1:]
        loss, *both = student_losses(*inputs)
        loss.backward()
        return tuple(both)

    def learn(step: int, *of_both: float) -> tuple[float, float]:
        """`Learn` on the batches of a step."""
        sums, weights_of_both = torch.zeros(2), torch.tensor(of_both, dtype=torch.float32, device=device)
        optimizer.zero_grad(set_to_none=captured is None)
        with mode.step(step):
            for micro in range(config.accumulation):
                number = step * config.accumulation + micro
                if pool is None:
                    (batch,) = batches("overwrite", [number])
                else:
                    batch = pool[epoch_order(seed, "overwrite pool", len(pool), number, 1).item()]
                sums += torch.stack(one_pass(batch, weights_of_both)).detach().cpu() / config.accumulation
        if processes.world() > 1:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            processes.sum_([sums, *(parameter.grad for parameter in parameters)])
        if scale != 1.0:
            torch._foreach_div_([p.grad for p in parameters], scale)
        return tuple(sums.tolist())

    end, forgotten = losses.end(config)
    with progress_bar("overwriting", config.steps, progress) as advance:
        for _ in range(first):
            advance()
        step = first
        while step < end:
            aim.prepare(step)
            of_both = aim.weights(losses.forget, losses.retain)
            loss_forget, loss_retain = aim.step(functools.partial(learn, step), of_both)
            if pull is not None:
                pull.add_(functools.partial(learn, step))
            if not math.isfinite(loss_forget + loss_retain):
                raise _diverged(f"loss became {loss_forget + loss_retain}", step, config, checkpoint)
            # Written only now, when what the steps before made is known to have a finite loss.
            if checkpoint is not None and step > first and step % config.checkpoint_every == 0:
                checkpoint.save(_state(parameters, optimizer, aim), vars(losses))
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            if not torch.isfinite(norm):
                raise _diverged(f"gradient became {norm.item()}", step, config, checkpoint)
            for group in optimizer.param_groups:
                group["lr"] = config.peak_rate * _rate(step, end, config)
            optimizer.step()
            losses.forget.append(float(f"{loss_forget:.5g}"))
            losses.retain.append(float(f"{loss_retain:.5g}"))
            step += 1
            if config.stops and (step == end or (not forgotten and step % config.stop_every == 0)):
                check(step)
                end, forgotten = losses.end(config)
            advance(f"{aim.losses[0]} {loss_forget:.2e}  {aim.losses[1]} {loss_retain:.2e}")
    processes.like_first_(parameters)  # where devices differ, so may the last bits of what each computed
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    return Trained(losses, mode.record(config.training_mode), eager or "captured", aim.losses)


def _share_of_mean(
    error: Callable[[Tensor, Tensor], Tensor], predicted: Tensor, taught: Tensor, weight: float
) -> Tensor:
    """What samples contribute to the mean error of a half, of which they are the share `weight`."""
    if not weight:
        return predicted.sum()  # of nothing: 0, where the mean would be NaN
    loss = error(predicted, taught)
    return loss if weight == 1 else weight * loss


def _warn_of_eager(reason: str) -> None:
    warnings.warn(f"the student's step is launched kernel by kernel and not as a CUDA graph: {reason}", stacklevel=3)


def _rate(step: int, end: int, config: OverwriteConfig) -> float:
    """Factor of the learning rate, of a run that ends after `end` steps as far as is known: linear up to 1 over the
    warm-up, 1 until the last `cooldown_steps`, then half a cosine down to 0; without a criterion to stop by, the cosine
    follows the warm-up."""
    warmup = min(config.warmup_steps, config.steps - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = max(warmup, end - config.cooldown_steps) if config.stops else warmup
    return 1.0 if step < start else 0.5 * (1 + math.cos(math.pi * (step - start) / (end - start)))


def _diverged(what: str, step: int, config: OverwriteConfig, checkpoint: Checkpoint | None) -> DivergedError:
    there = checkpoint is not None and checkpoint.path.is_file()
    kept = f" The last good checkpoint is kept in {checkpoint.path}." if there else ""
    return DivergedError(
        f"the {what} at step {step + 1}.{kept} Start again with --overwrite and a learning rate below "
        f"{config.peak_rate:g}"
    )


def _state(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, aim: Objective) -> dict[str, Tensor]:
    """What a checkpoint holds: each parameter and its optimiser state, by the parameter's number, and what the
    objective has of its own."""
    tensors = {f"{_OWN}{name}": tensor for name, tensor in aim.state().items()}
    for index, parameter in enumerate(parameters):
        tensors[f"{index}.parameter"] = parameter
        tensors |= {f"{index}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def _restore(
    checkpoint: Checkpoint | None,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    aim: Objective,
    config: OverwriteConfig,
) -> Losses:
    """Restores parameters, optimiser and objective where there is a checkpoint, and returns the losses until then. In a
    run of several processes the first one's is that of all.

    Raises FadeError, before anything has changed, where it does not fit.
    """
    saved = None if checkpoint is None else _fitting(checkpoint, parameters, aim.state(), config)
    tensors, losses = processes.from_first(*(saved or ({}, None)))
    if losses is None:
        return Losses()
    for index, parameter in enumerate(parameters):
        state = {kind: tensors[f"{index}.{kind}"] for kind in _KINDS}
        with torch.no_grad():
            parameter.copy_(state.pop("parameter"))
        optimizer.state[parameter] = {kind: tensor.to(parameter.device) for kind, tensor in state.items()}
    aim.restore({name.removeprefix(_OWN): one for name, one in tensors.items() if name.startswith(_OWN)})
    return Losses(**losses)


_KINDS = ("parameter", "step", "exp_avg", "exp_avg_sq")
"""What a checkpoint has of each parameter."""
_OWN = "objective."
"""Begins the names of what a checkpoint has of the objective."""


def _fitting(
    checkpoint: Checkpoint, parameters: Sequence[Tensor], own: Mapping[str, Tensor], config: OverwriteConfig
) -> tuple[dict[str, Tensor], dict[str, list[float]]] | None:
    """Tensors and losses of the checkpoint, None where there is none yet. Raises FadeError where it does not fit."""
    saved = checkpoint.load()
    if saved is None:
        return None
    tensors, losses = saved[0], Losses(**saved[1])
    done, checks = len(losses.forget), len(losses.held_out_forget)
    of_parameters = {f"{index}.{kind}" for index in range(len(parameters)) for kind in _KINDS}
    if tensors.keys() != of_parameters | {f"{_OWN}{name}" for name in own}:
        raise checkpoint.misfit("it holds other tensors")
    for index, parameter in enumerate(parameters):
        for kind in _KINDS:
            tensor = tensors[f"{index}.{kind}"]
            shape = () if kind == "step" else parameter.shape
            if tensor.shape != shape or tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
                raise checkpoint.misfit(f"{index}.{kind} has another shape or dtype, or numbers that are not finite")
        if tensors[f"{index}.step"] != done:
            raise checkpoint.misfit("its losses are of another number of steps")
    for name, tensor in own.items():
        saved_own = tensors[f"{_OWN}{name}"]
        if (saved_own.shape, saved_own.dtype) != (tensor.shape, tensor.dtype) or not torch.isfinite(saved_own).all():
            raise checkpoint.misfit(f"{name} of its objective has another shape or dtype, or numbers not finite")
    end, forgotten = losses.end(config)
    if not 0 < done < end:
        raise checkpoint.misfit(f"it is of {done} steps")
    # While the learning rate falls, nothing is checked any more.
    until = end - config.cooldown_steps if forgotten else done
    if checks != (until // config.stop_every if config.stops else 0):
        raise checkpoint.misfit("its losses on held-out noise are of another number of steps")
    return saved
