"""Makes the DigitCanvas weights and judges again from nothing: ``python -m fade.digitcanvas.train --output DIR``.

Three stages, in order: judges, VAE, and denoiser with text encoder (latent diffusion, Rombach et al., 2022). Each stage
leaves safetensors files in ``DIR/checkpoints`` and a rerun continues from them; random numbers are a function of seed,
stage and step alone, so an interrupted run ends at the same weights as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from fade.digitcanvas.data import Digits, draw_all, load_digits
from fade.digitcanvas.judges import AXES, Classifier, judge_accuracy, load_judges
from fade.digitcanvas.models import (
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
)
from fade.digitcanvas.prompts import DIGITS, STYLES, digit_prompt, prompt, style_prompt
from fade.errors import DivergedError, FadeError


@dataclass(frozen=True)
class Recipe:
    """What is trained for how long; the defaults made the weights that ship with the package."""

    seed: int = 0
    digit_judge_steps: int = 2000
    style_judge_steps: int = 400
    vae_steps: int = 1000
    steps: int = 6000
    batch_size: int = 64
    checkpoint_every: int = 500

    judge_batch_size: int = 128
    judge_learning_rate: float = 3e-3
    vae_learning_rate: float = 2e-3
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    ema_decay: float = 0.995
    # Shares of captions: without words (for classifier-free guidance), without the style, without the digit.
    empty_captions: float = 0.10
    digit_captions: float = 0.05
    style_captions: float = 0.05

    def __post_init__(self) -> None:
        for name in ("digit_judge_steps", "style_judge_steps", "vae_steps", "steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def generator_for(seed: int, stage: str, step: int) -> torch.Generator:
    """The random numbers of one step: they depend on seed, stage and step, not on what ran before."""
    stage_number = ("digit", "style", "vae", "latents", "denoiser").index(stage)
    return torch.Generator().manual_seed((seed * 8 + stage_number) * 1_000_003 + step)


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def draw_batch(pictures: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pick ``count`` of ``pictures`` [styles, n, ...]: the picked ones, their style index and their picture index."""
    style = torch.randint(pictures.shape[0], (count,), generator=generator)
    index = torch.randint(pictures.shape[1], (count,), generator=generator)
    return pictures[style, index], style, index


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors to a temporary name, then rename: an interrupted write leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# Training loop with checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class Training:
    """Model, AdamW, learning-rate schedule and average of the weights: everything that a checkpoint holds.

    The exponential moving average (EMA) of the weights is what is used afterwards; buffers are taken as they are.
    """

    def __init__(
        self, model: nn.Module, path: Path, stage: str, steps: int, learning_rate: float, recipe: Recipe
    ) -> None:
        self.model = model
        self.path = path
        self.stage = stage
        self.steps = steps
        self.learning_rate = learning_rate
        self.recipe = recipe
        self.step = 0
        self.parameters = dict(model.named_parameters())
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2, fused=True)
        # Longer or shorter schedules are another training: a checkpoint of one must not continue the other.
        self.fingerprint = json.dumps({"stage": stage, "steps": steps, **asdict(recipe)}, sort_keys=True)

    def save(self) -> None:
        """Write weights, average, optimiser state and step as one safetensors file."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        save_atomically(tensors, self.path, {"step": str(self.step), "training": self.fingerprint})

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one.

        Raises:
            FadeError: the checkpoint was made with another recipe.
        """
        if not self.path.is_file():
            return
        with safe_open(self.path, "pt") as file:
            metadata = file.metadata()
        if metadata["training"] != self.fingerprint:
            raise FadeError(f"{self.path} was made with another recipe: use the same options or another output folder")
        tensors = load_file(self.path)
        self.step = int(metadata["step"])
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        for name, parameter in self.parameters.items():
            self.average[name].copy_(tensors[f"average.{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                state = tensors[f"optimizer.{key}.{name}"]
                # The model may keep its weights channels-last; the fused optimiser wants its state in the same layout.
                value = torch.empty_like(parameter).copy_(state) if state.dim() else state
                self.optimizer.state[parameter][key] = value

    def run(self, loss_of_step: Callable[[torch.Generator], Tensor], progress: Progress) -> None:
        """Take the steps that are still to do, with a checkpoint now and then."""
        task = progress.add_task(self.stage, total=self.steps, completed=self.step, loss="")
        self.model.train()
        while self.step < self.steps:
            # Dropout draws from the global generator; seeding it per step keeps a resumed run identical.
            generator = generator_for(self.recipe.seed, self.stage, self.step)
            torch.manual_seed(generator.initial_seed())
            factor = learning_rate_factor(self.step, self.steps, self.recipe.warmup_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * factor
            self.optimizer.zero_grad(set_to_none=True)
            loss = loss_of_step(generator)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            if not math.isfinite(norm):
                raise DivergedError(f"{self.stage}: the gradient is not finite at step {self.step}")
            self.optimizer.step()
            self.step += 1
            # Early on a shorter memory, so that the random start is forgotten.
            decay = min(self.recipe.ema_decay, self.step / (self.step + 10))
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
            if self.step % self.recipe.checkpoint_every == 0 or self.step == self.steps:
                self.save()
                progress.console.print(f"{self.stage}: step {self.step} of {self.steps}, loss {loss.item():.4f}")
            progress.update(task, completed=self.step, loss=f"loss {loss.item():.4f}")

    def averaged(self) -> nn.Module:
        """The model with the averaged weights written into it, in evaluation mode."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])
        return self.model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Judges
# ---------------------------------------------------------------------------------------------------------------------


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, shear, scale, shift, bend, blur and grain pictures [n, 3, 32, 32] in [0, 1].

    Bending is the elastic distortion of Simard et al. (2003); blur and grain stand for what a VAE does to a picture.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    count, size = len(pictures), pictures.shape[-1]
    angle, shear, scale = uniform(-0.22, 0.22), uniform(-0.15, 0.15), uniform(0.88, 1.12)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    shift = uniform(-0.12, 0.12, 2)
    affine = torch.stack([cosine, shear - sine, shift[:, 0], sine, cosine, shift[:, 1]], 1).view(count, 2, 3)
    grid = F.affine_grid(affine, [count, 3, size, size], align_corners=False)
    bend = torch.randn(count, 2, 5, 5, generator=generator) * 0.05
    grid = grid + F.interpolate(bend, size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    blur = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = torch.lerp(pictures, blur, uniform(-0.5, 0.6, 1, 1, 1))
    grain = uniform(0.0, 0.05, 1, 1, 1)
    return (pictures + grain * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)


def train_judges(
    recipe: Recipe, digits: Digits, pictures: Tensor, checkpoints: Path, folder: Path, progress: Progress
) -> None:
    """Train both judges on ``pictures`` uint8 [styles, n, 3, 32, 32] of ``digits`` and write them to ``folder``."""
    config = {"digit": {"classes": len(DIGITS), "width": 32}, "style": {"classes": len(STYLES), "width": 12}}
    for axis in AXES:
        torch.manual_seed(recipe.seed)
        classifier = Classifier(**config[axis])
        steps = recipe.digit_judge_steps if axis == "digit" else recipe.style_judge_steps
        path = checkpoints / f"judge-{axis}.safetensors"
        training = Training(classifier, path, axis, steps, recipe.judge_learning_rate, recipe)
        training.resume()

        def loss(generator: torch.Generator, axis: str = axis, classifier: nn.Module = classifier) -> Tensor:
            batch, style, index = draw_batch(pictures, recipe.judge_batch_size, generator)
            labels = digits.labels[index] if axis == "digit" else style
            return F.cross_entropy(classifier(augment(batch.float() / 255, generator)), labels, label_smoothing=0.05)

        training.run(loss, progress)
        weights = training.averaged().state_dict()
        halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
        save_atomically(halves, folder / f"{axis}.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# VAE
# ---------------------------------------------------------------------------------------------------------------------


def train_vae(recipe: Recipe, pictures: Tensor, checkpoints: Path, progress: Progress) -> AutoencoderKL:
    """Train the VAE on ``pictures`` uint8 [styles, n, 3, 32, 32] and set its ``scaling_factor`` to 1 / std."""
    torch.manual_seed(recipe.seed)
    vae = build_vae()
    path = checkpoints / "vae.safetensors"
    training = Training(vae, path, "vae", recipe.vae_steps, recipe.vae_learning_rate, recipe)
    training.resume()

    def loss(generator: torch.Generator) -> Tensor:
        batch = draw_batch(pictures, recipe.batch_size, generator)[0].float() / 127.5 - 1
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        divergence = posterior.kl().mean()
        return F.mse_loss(decoded, batch) + 0.5 * F.l1_loss(decoded, batch) + 1e-5 * divergence

    training.run(loss, progress)
    return training.averaged()


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor, progress: Progress) -> Tensor:
    """Latents of ``pictures`` uint8 [styles, n, 3, 32, 32] with unit deviation: float32 [styles, n, 4, 8, 8].

    Sets ``scaling_factor`` of the VAE, by which every diffusers pipeline multiplies latents.
    """
    task = progress.add_task("latents", total=pictures.shape[0], loss="")
    latents = []
    for style in pictures:
        latents.append(torch.cat([vae.encode(b.float() / 127.5 - 1).latent_dist.mean for b in style.split(250)]))
        progress.advance(task)
    latents = torch.stack(latents)
    scaling_factor = 1.0 / latents.std().item()
    vae.register_to_config(scaling_factor=scaling_factor)
    return latents * scaling_factor


# ---------------------------------------------------------------------------------------------------------------------
# Denoiser and text encoder
# ---------------------------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """UNet and text encoder, trained together: noised latents, time steps and token ids -> predicted noise."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(latents, timesteps, self.text_encoder(tokens).last_hidden_state).sample


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [n, 16], padded as diffusers' pipelines pad them."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def build_captions(tokenizer: CLIPTokenizer) -> dict[str, Tensor]:
    """Token ids of every caption: ``full`` [digits, styles, 16], ``digit``, ``style`` and ``empty`` [n, 16]."""
    full = [tokenize(tokenizer, [prompt(digit, style) for style in STYLES]) for digit in DIGITS]
    return {
        "full": torch.stack(full),
        "digit": tokenize(tokenizer, [digit_prompt(digit) for digit in DIGITS]),
        "style": tokenize(tokenizer, [style_prompt(style) for style in STYLES]),
        "empty": tokenize(tokenizer, [""]),
    }


def caption_batch(
    captions: dict[str, Tensor], labels: Tensor, style: Tensor, recipe: Recipe, generator: torch.Generator
) -> Tensor:
    """Token ids [n, 16] for digits ``labels`` [n] in ``style`` [n], some of them with words left out."""
    tokens = captions["full"][labels, style]
    choice = torch.rand(len(labels), generator=generator)[:, None]
    bounds = torch.tensor([recipe.empty_captions, recipe.digit_captions, recipe.style_captions]).cumsum(0)
    tokens = torch.where(choice < bounds[2], captions["style"][style], tokens)
    tokens = torch.where(choice < bounds[1], captions["digit"][labels], tokens)
    return torch.where(choice < bounds[0], captions["empty"], tokens)


def build_denoiser_training(recipe: Recipe, tokenizer: CLIPTokenizer, checkpoints: Path) -> Training:
    """The untrained denoiser, or the one of the last checkpoint, ready to be trained."""
    torch.manual_seed(recipe.seed)
    # Channels-last convolutions are the faster ones on CPUs here.
    denoiser = Denoiser(build_unet().to(memory_format=torch.channels_last), build_text_encoder(tokenizer))
    path = checkpoints / "denoiser.safetensors"
    training = Training(denoiser, path, "denoiser", recipe.steps, recipe.learning_rate, recipe)
    training.resume()
    return training


def train_denoiser(
    training: Training,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    labels: Tensor,
    progress: Progress,
) -> Denoiser:
    """Train on ``latents`` [styles, n, 4, 8, 8] of digits ``labels`` [n] to predict noise (Ho et al., 2020, eq. 14)."""
    recipe, scheduler, captions = training.recipe, build_scheduler(), build_captions(tokenizer)

    def loss(generator: torch.Generator) -> Tensor:
        clean, style, index = draw_batch(latents, recipe.batch_size, generator)
        tokens = caption_batch(captions, labels[index], style, recipe, generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        return F.mse_loss(training.model(scheduler.add_noise(clean, noise, timesteps), timesteps, tokens), noise)

    training.run(loss, progress)
    return training.averaged()


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------


def save_pipeline(denoiser: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write everything in diffusers' layout, the large parts in half precision. The modules are converted in place."""
    # transformers keeps a file's precision where diffusers loads in float32: a text encoder in half precision would not
    # fit the UNet of a plain from_pretrained.
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=denoiser.text_encoder.float(),
        tokenizer=tokenizer,
        unet=denoiser.unet.to(torch.float16, memory_format=torch.contiguous_format),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    # The names of Stable Diffusion's own files, which transformers reads before and after its version 5; version 5 by
    # itself writes names that version 4 does not know.
    file = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_atomically(weights, file, {"format": "pt"})


def train(output: Path, recipe: Recipe, digits: Digits, held_out: Digits, progress: Progress) -> None:
    """Run the stages that are still to do on ``digits``; leaves ``output/judges`` and ``output/model``."""
    checkpoints = output / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(digits)
    train_judges(recipe, digits, pictures, checkpoints, output / "judges", progress)
    accuracy = judge_accuracy(load_judges(path=output / "judges"), held_out)
    progress.console.print(f"judges on held-out digits: {accuracy['digit']:.2%} digit, {accuracy['style']:.2%} style")
    vae = train_vae(recipe, pictures, checkpoints, progress)
    latents = encode_pictures(vae, pictures, progress)
    tokenizer = build_tokenizer(output / "model" / "tokenizer")
    training = build_denoiser_training(recipe, tokenizer, checkpoints)
    denoiser = train_denoiser(training, tokenizer, latents, digits.labels, progress)
    save_pipeline(denoiser, vae, tokenizer, output / "model")


def main(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, model and judges; a rerun resumes in it.")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the denoiser.")] = Recipe.steps,
    vae_steps: Annotated[int, typer.Option(min=1, help="Training steps of the VAE.")] = Recipe.vae_steps,
    seed: Annotated[int, typer.Option(help="Seed of every random number.")] = Recipe.seed,
) -> None:
    """Train the DigitCanvas judges, VAE, text encoder and UNet from nothing."""
    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}")) as progress:
        recipe = Recipe(seed=seed, steps=steps, vae_steps=vae_steps)
        try:
            train(output, recipe, load_digits("train"), load_digits("held_out"), progress)
        except FadeError as error:
            progress.console.print(f"[red]error:[/red] {error}")
            raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
