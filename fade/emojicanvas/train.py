"""Makes the EmojiCanvas weights and judges again from nothing: ``python -m fade.emojicanvas.train --folder DIR``.

The stages, in order: ``data`` renders the pictures; ``judges``; ``vae``; ``latents`` encodes moved copies of every
picture; ``decoder`` trains the VAE's decoder further while its encoder, and so every latent, stays; ``transformer``
trains it and both text encoders by flow matching (Lipman et al., 2023; Esser et al., 2024); ``export`` writes
``DIR/model`` and ``DIR/judges`` from what has been trained so far. One can be run by itself with ``--stage``.

Every stage leaves its state in ``DIR/checkpoints`` and a rerun continues from there, killed or not. Random numbers are
a function of seed, stage and step alone, so an interrupted run ends at the same weights as an uninterrupted one. A
stage that has ended is continued by a larger number of steps.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from fade.emojicanvas import data
from fade.emojicanvas.config import IMAGE_SIZE, MAX_TOKENS
from fade.emojicanvas.judges import AXES, Classifier, judge_accuracy, load_judges
from fade.emojicanvas.models import (
    LATENT_SIZE,
    build_clip_tokenizer,
    build_scheduler,
    build_t5_tokenizer,
    build_text_encoder,
    build_text_encoder_2,
    build_transformer,
    build_vae,
)
from fade.emojicanvas.prompts import CAPTIONS, OBJECT_CAPTIONS, OBJECTS, PHRASES, STYLE_CAPTIONS, STYLES
from fade.errors import DivergedError, FadeError
from fade.files import atomic_folder, digest, read_tensors, remove_parts, write_tensors


@dataclass(frozen=True)
class Recipe:
    """What is trained for how long; the defaults are those of the weights that ship with the package.

    The numbers of steps may differ from one run in a folder to the next; everything else may not.
    """

    judge_steps: int = 1400
    vae_steps: int = 640
    decoder_steps: int = 2000
    steps: int = 3200
    checkpoint_every: int = 100

    seed: int = 0
    judge_batch_size: int = 96
    judge_learning_rate: float = 3e-3
    judge_width: int = 20
    vae_batch_size: int = 16
    vae_learning_rate: float = 3e-3
    decoder_batch_size: int = 16
    decoder_learning_rate: float = 3e-3
    batch_size: int = 96
    learning_rate: float = 3e-3
    # Moved copies of every picture whose latents the transformer and the decoder are trained with.
    copies: int = 10
    ema_decay: float = 0.998
    # Shares of captions: without words (for classifier-free guidance), without the style, without the object; and of
    # what is left, those put into one of PHRASES.
    empty_captions: float = 0.08
    object_captions: float = 0.08
    style_captions: float = 0.04
    phrased_captions: float = 0.20

    def __post_init__(self) -> None:
        for name in ("judge_steps", "vae_steps", "decoder_steps", "steps", "batch_size", "checkpoint_every", "copies"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def fixed(self, stage: str) -> dict[str, float]:
        """What must be the same in every run that continues a stage: its own settings, but for the number of steps."""
        prefixes = {"judges": "judge_", "vae": "vae_", "decoder": "decoder_"}
        others = tuple(prefix for name, prefix in prefixes.items() if name != stage)
        free = ("steps", "checkpoint_every")
        own = {name: value for name, value in asdict(self).items() if not name.startswith(others)}
        if stage in prefixes:
            own = {name: value for name, value in own.items() if name.startswith((prefixes[stage], "seed", "ema_"))}
        return {name: value for name, value in own.items() if not name.endswith(free)}


class Stage(StrEnum):
    """What one run of the command does."""

    all = "all"
    data = "data"
    judges = "judges"
    vae = "vae"
    latents = "latents"
    decoder = "decoder"
    transformer = "transformer"
    export = "export"


def generator_for(seed: int, stage: str, step: int) -> torch.Generator:
    """The random numbers of one step: they depend on seed, stage and step, not on what ran before."""
    number = ("judges", "held_out", "vae", "latents", "decoder", "transformer").index(stage)
    return torch.Generator().manual_seed((seed * 8 + number) * 1_000_003 + step)


def learning_rate_factor(step: int, steps: int) -> float:
    """A hundred steps of warm-up (fewer in a short run), a constant rate, and a linear decay over the second half."""
    warmup = min(100, steps // 10)
    return min((step + 1) / (warmup + 1), 2 * (steps - step) / steps, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Training loop with checkpoints
# ---------------------------------------------------------------------------------------------------------------------


class Training:
    """Model, optimisers, learning-rate schedule and average of the weights: everything that a checkpoint holds.

    Matrices in the middle of a network are trained by Muon (Jordan et al., 2024), with convolutions as matrices [out,
    in * k * k]; all else by Adam at ``share`` of the learning rate. The exponential moving average (EMA) of the weights
    is what is used afterwards; buffers are taken as they are.

    Args:
        matrices: names of the parameters that Muon trains, out of those that require a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        path: Path,
        stage: str,
        steps: int,
        learning_rate: float,
        recipe: Recipe,
        matrices: Callable[[str], bool] = lambda name: False,
        share: float = 2 / 3,
    ) -> None:
        self.model = model
        self.path = path
        self.stage = stage
        self.steps = steps
        self.recipe = recipe
        self.step = 0
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        # Muon takes matrices; these are others' memory in the shape of one.
        self.matrices = {
            name: nn.Parameter(value.detach().flatten(1))
            for name, value in self.parameters.items()
            if matrices(name) and value.dim() > 1
        }
        rest = [value for name, value in self.parameters.items() if name not in self.matrices]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=learning_rate * share, betas=(0.9, 0.97), weight_decay=1e-2, fused=True)
        ]
        if self.matrices:
            self.optimizers.append(
                torch.optim.Muon(
                    self.matrices.values(), lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
                )
            )
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def _weights(self) -> dict[str, Tensor]:
        """Parameters and buffers as a state dict has them, but those that modules share only once."""
        kept = self.model.state_dict().keys()
        tensors = itertools.chain(self.model.named_parameters(), self.model.named_buffers())
        return {name: tensor for name, tensor in tensors if name in kept}

    def _states(self) -> Iterator[tuple[str, torch.optim.Optimizer, Tensor]]:
        for name, parameter in self.parameters.items():
            if name in self.matrices:
                yield name, self.optimizers[1], self.matrices[name]
            else:
                yield name, self.optimizers[0], parameter

    def save(self) -> None:
        """Write weights, average, optimiser state and step as one safetensors file."""
        tensors = {f"model.{name}": tensor for name, tensor in self._weights().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, optimizer, parameter in self._states():
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        record = {"step": self.step, "stage": self.stage, "recipe": self.recipe.fixed(self.stage)}
        write_tensors(self.path, tensors, record)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one.

        Raises:
            FadeError: the checkpoint was made with another recipe, or is damaged.
        """
        if not self.path.is_file():
            return
        tensors, record = read_tensors(self.path)
        if record["recipe"] != self.recipe.fixed(self.stage):
            raise FadeError(f"{self.path} was made with another recipe: use the same options or another folder")
        self.step = record["step"]
        with torch.no_grad():
            for name, tensor in self._weights().items():
                tensor.copy_(tensors[f"model.{name}"])
        for name, optimizer, parameter in self._states():
            self.average[name].copy_(tensors[f"average.{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                if f"optimizer.{key}.{name}" in tensors:
                    optimizer.state[parameter][key] = tensors[f"optimizer.{key}.{name}"]

    def run(self, loss_of_step: Callable[[torch.Generator], Tensor], progress: Progress) -> None:
        """Take the steps that are still to do, with a checkpoint now and then.

        Another process may read the checkpoints meanwhile, but none may train the same stage.
        """
        remove_parts(self.path)
        task = progress.add_task(self.stage, total=self.steps, completed=self.step, loss="")
        self.model.train()
        losses: list[float] = []
        while self.step < self.steps:
            generator = generator_for(self.recipe.seed, self.stage, self.step)
            factor = learning_rate_factor(self.step, self.steps)
            for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * factor
            self.model.zero_grad(set_to_none=True)
            loss = loss_of_step(generator)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            if not math.isfinite(norm):
                raise DivergedError(f"{self.stage}: the gradient is not finite at step {self.step}")
            for name, matrix in self.matrices.items():
                matrix.grad = self.parameters[name].grad.flatten(1)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            # Early on a shorter memory, so that the random start is forgotten.
            decay = min(self.recipe.ema_decay, self.step / (self.step + 10))
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
            losses.append(loss.item())
            if self.step % self.recipe.checkpoint_every == 0 or self.step == self.steps:
                self.save()
                mean = sum(losses) / len(losses)
                progress.console.print(f"{self.stage}: step {self.step} of {self.steps}, loss {mean:.4f}")
                losses.clear()
            progress.update(task, completed=self.step, loss=f"loss {loss.item():.4f}")

    def averaged(self) -> nn.Module:
        """The model with the averaged weights written into it, in evaluation mode."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])
        return self.model.eval()


@contextmanager
def _fast_attention() -> Iterator[None]:
    """bf16 where it is safe, and attention written out: CPU flash attention is slow on sequences as short as these."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Data and judges
# ---------------------------------------------------------------------------------------------------------------------


def load_pictures(folder: Path) -> Tensor:
    """The rendered pictures, uint8 [objects, styles, 3, s, s], which the stage ``data`` left in ``folder``."""
    path = folder / "checkpoints" / "pictures.safetensors"
    if not path.is_file():
        raise FadeError(f"there are no pictures in {folder}: run --stage data first")
    return read_tensors(path)[0]["pictures"]


def save_pictures(pictures: Tensor, folder: Path) -> None:
    """Keep rendered pictures, uint8 [objects, styles, 3, s, s], for the other stages."""
    write_tensors(folder / "checkpoints" / "pictures.safetensors", {"pictures": pictures}, {})


def draw_batch(pictures: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pick ``count`` of ``pictures`` [objects, styles, ...]: the picked ones, their object and their style index."""
    object = torch.randint(pictures.shape[0], (count,), generator=generator)
    style = torch.randint(pictures.shape[1], (count,), generator=generator)
    return pictures[object, style], object, style


def blur_and_grain(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """What a VAE does to a picture, for the judges: a third of [n, 3, 64, 64] in [0, 1] blurred, a third with noise."""
    blur, grain = (
        (torch.rand(len(pictures), 1, 1, 1, generator=generator) < 1 / 3).float()
        * torch.rand(len(pictures), 1, 1, 1, generator=generator)
        for _ in range(2)
    )
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.randn(pictures.shape, generator=generator)
    return (torch.lerp(pictures, soft, blur) + 0.08 * grain * noise).clamp(0, 1)


def held_out_accuracy(judges_folder: Path, pictures: Tensor, recipe: Recipe, amount: data.Jitter) -> dict[str, float]:
    """The judges' accuracy on three moved copies of every picture that they were not trained on."""
    judges = load_judges(path=judges_folder)
    answers = []
    for i in range(3):
        moved = data.jitter(pictures.flatten(0, 1), amount, generator_for(recipe.seed, "held_out", i))
        answers.append(judge_accuracy(judges, moved.view(*pictures.shape[:2], 3, IMAGE_SIZE, IMAGE_SIZE)))
    return {axis: sum(answer[axis] for answer in answers) / 3 for axis in AXES}


def train_judges(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Train both judges on moved, blurred and grainy pictures and write them to ``folder/judges``."""
    pictures = load_pictures(folder)
    config = {
        "object": {"classes": pictures.shape[0], "width": recipe.judge_width},
        "style": {"classes": pictures.shape[1], "width": recipe.judge_width},
    }
    torch.manual_seed(recipe.seed)
    judges = nn.ModuleDict({axis: Classifier(**config[axis]) for axis in AXES})
    path = folder / "checkpoints" / "judges.safetensors"
    training = Training(judges, path, "judges", recipe.judge_steps, recipe.judge_learning_rate, recipe, share=1.0)
    training.resume()

    def loss(generator: torch.Generator) -> Tensor:
        batch, object, style = draw_batch(pictures, recipe.judge_batch_size, generator)
        moved = blur_and_grain(data.jitter(batch, data.STRONG, generator), generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = [judges[axis](moved).float() for axis in AXES]
        answers = zip(logits, (object, style), strict=True)
        return sum(F.cross_entropy(*answer, label_smoothing=0.05) for answer in answers)

    training.run(loss, progress)
    state = training.averaged().state_dict()
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    weights = {
        axis: {name.removeprefix(f"{axis}."): tensor for name, tensor in halves.items() if name.startswith(f"{axis}.")}
        for axis in AXES
    }
    with atomic_folder(folder / "judges", "config.json") as fresh:
        fresh.mkdir()
        for axis in AXES:
            save_file(weights[axis], fresh / f"{axis}.safetensors")
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, amount in (("mildly", data.MILD), ("strongly", data.STRONG)):
        accuracy = held_out_accuracy(folder / "judges", pictures, recipe, amount)
        progress.console.print(
            f"judges on {name} moved pictures: object {accuracy['object']:.2%}, style {accuracy['style']:.2%}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# VAE
# ---------------------------------------------------------------------------------------------------------------------


def _convolution(name: str) -> bool:
    return "conv" in name and not name.startswith(("encoder.conv_in", "decoder.conv_out"))


def _reconstruction(decoded: Tensor, pictures: Tensor) -> Tensor:
    error = decoded.float() - pictures
    return error.abs().mean() + error.square().mean()


def vae_training(recipe: Recipe, folder: Path) -> Training:
    """The untrained VAE, or the one of the last checkpoint, ready to be trained."""
    torch.manual_seed(recipe.seed)
    path = folder / "checkpoints" / "vae.safetensors"
    training = Training(build_vae(), path, "vae", recipe.vae_steps, recipe.vae_learning_rate, recipe, _convolution)
    training.resume()
    return training


def train_vae(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Train encoder and decoder together (Kingma & Welling, 2014)."""
    pictures, training = load_pictures(folder), vae_training(recipe, folder)
    vae: AutoencoderKL = training.model

    def loss(generator: torch.Generator) -> Tensor:
        batch, _, _ = draw_batch(pictures, recipe.vae_batch_size, generator)
        batch = data.jitter(batch, data.MILD, generator) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
        # Per value of a latent, not per picture.
        divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
        return _reconstruction(decoded, batch) + 5e-4 * divergence

    training.run(loss, progress)


@torch.no_grad()
def make_latents(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Encode ``recipe.copies`` moved copies of every picture: what the decoder and the transformer are trained with.

    Leaves ``latents.safetensors``: ``pictures`` uint8 [copies, objects, styles, 3, 64, 64], and ``mean`` and ``std`` of
    the posterior in half precision [copies, objects, styles, 16, 8, 8], as the encoder gives them.
    """
    pictures = load_pictures(folder)
    vae: AutoencoderKL = vae_training(recipe, folder).averaged()
    encoder = digest(vae.encoder.state_dict())
    path = folder / "checkpoints" / "latents.safetensors"
    remove_parts(path)
    if path.is_file() and read_tensors(path)[1] == {"encoder": encoder, "copies": recipe.copies}:
        return
    task = progress.add_task("latents", total=recipe.copies, loss="")
    copies, means, stds = [], [], []
    for copy in range(recipe.copies):
        moved = data.jitter(pictures.flatten(0, 1), data.MILD, generator_for(recipe.seed, "latents", copy))
        moved = moved.mul(255).round().byte()
        posteriors = [vae.encode(batch.float() / 127.5 - 1).latent_dist for batch in moved.split(60)]
        copies.append(moved.view(*pictures.shape[:2], *moved.shape[1:]))
        means.append(torch.cat([posterior.mean for posterior in posteriors]).half().unflatten(0, pictures.shape[:2]))
        stds.append(torch.cat([posterior.std for posterior in posteriors]).half().unflatten(0, pictures.shape[:2]))
        progress.advance(task)
    tensors = {"pictures": torch.stack(copies), "mean": torch.stack(means), "std": torch.stack(stds)}
    write_tensors(path, tensors, {"encoder": encoder, "copies": recipe.copies})


def load_latents(recipe: Recipe, folder: Path) -> tuple[dict[str, Tensor], AutoencoderKL]:
    """What the stage ``latents`` left, and the VAE with the encoder that it is of and the decoder trained furthest.

    The VAE's ``scaling_factor`` is 1 / std of all latents, by which every diffusers pipeline multiplies them.
    """
    path = folder / "checkpoints" / "latents.safetensors"
    if not path.is_file():
        raise FadeError(f"there are no latents in {folder}: run --stage latents first")
    tensors, record = read_tensors(path)
    vae: AutoencoderKL = vae_training(recipe, folder).averaged()
    if record["encoder"] != digest(vae.encoder.state_dict()):
        raise FadeError(f"{path} is of another encoder: run --stage latents again, and all that comes after it")
    vae.register_to_config(scaling_factor=round(1.0 / tensors["mean"].float().std().item(), 6))
    training = decoder_training(recipe, folder, vae.decoder)
    if training.step:
        training.averaged()
    return tensors, vae.requires_grad_(False)


def decoder_training(recipe: Recipe, folder: Path, decoder: nn.Module) -> Training:
    """A decoder as the stage ``vae`` left it, or the one of the last checkpoint, ready to be trained."""
    path = folder / "checkpoints" / "decoder.safetensors"
    rate = recipe.decoder_learning_rate
    training = Training(decoder, path, "decoder", recipe.decoder_steps, rate, recipe, _convolution)
    training.resume()
    return training


def train_decoder(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Train the decoder alone, on latents with some noise, as the transformer does not draw them exactly."""
    latents, _ = load_latents(recipe, folder)
    decoder = vae_training(recipe, folder).averaged().decoder
    training = decoder_training(recipe, folder, decoder)

    def loss(generator: torch.Generator) -> Tensor:
        count, noise = recipe.decoder_batch_size, 0.1
        pictures, mean = latents["pictures"], latents["mean"]
        index = [torch.randint(size, (count,), generator=generator) for size in mean.shape[:3]]
        batch, code = pictures[*index].float() / 127.5 - 1, mean[*index].float()
        code = code + noise * torch.randn(code.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = decoder(code)
        return _reconstruction(decoded, batch)

    training.run(loss, progress)


# ---------------------------------------------------------------------------------------------------------------------
# Transformer and text encoders
# ---------------------------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """Transformer and both text encoders, trained together: noised latents, times and token ids -> velocity."""

    def __init__(
        self, transformer: FluxTransformer2DModel, text_encoder: CLIPTextModel, text_encoder_2: T5EncoderModel
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        side = LATENT_SIZE // 2
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        positions = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).float()
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, latents: Tensor, sigmas: Tensor, clip_tokens: Tensor, t5_tokens: Tensor) -> Tensor:
        """[n, 16, 64] packed latents, sigmas [n] in [0, 1] and two [n, 16] of token ids -> velocity [n, 16, 64]."""
        return self.transformer(
            hidden_states=latents,
            timestep=sigmas,
            pooled_projections=self.text_encoder(clip_tokens).pooler_output,
            encoder_hidden_states=self.text_encoder_2(t5_tokens).last_hidden_state,
            txt_ids=self.positions.new_zeros(t5_tokens.shape[1], 3),
            img_ids=self.positions,
            return_dict=False,
        )[0]


def pack_latents(latents: Tensor) -> Tensor:
    """Patches of 2x2 as FLUX.1 packs them: [n, c, h, w] -> [n, h/2 * w/2, 4c], channels ordered (c, row, column)."""
    return latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def caption_templates() -> dict[str, list[str]]:
    """All captions by kind: ``full``, ``phrased``, ``object``, ``style`` and ``empty``, with {object} and {style}."""
    plain = (CAPTIONS[0], CAPTIONS[4])
    return {
        "full": list(CAPTIONS),
        "phrased": [phrase.replace("{}", caption) for phrase in PHRASES for caption in plain],
        "object": [*OBJECT_CAPTIONS, *(p.replace("{}", caption) for p in PHRASES for caption in OBJECT_CAPTIONS[:2])],
        "style": list(STYLE_CAPTIONS),
        "empty": [""],
    }


def tokenize(tokenizer: CLIPTokenizer | T5TokenizerFast, captions: list[str]) -> Tensor:
    """Token ids int32 [n, 16], padded as diffusers' pipelines pad them."""
    padded = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return padded.input_ids.int()


def build_captions(*tokenizers: CLIPTokenizer | T5TokenizerFast) -> dict[str, Tensor]:
    """Token ids of every caption for every tokenizer: int32 [objects, styles, templates, tokenizers, 16] by kind."""
    captions = {}
    for kind, templates in caption_templates().items():
        texts = [t.format(object=object, style=style) for object in OBJECTS for style in STYLES for t in templates]
        ids = torch.stack([tokenize(tokenizer, texts) for tokenizer in tokenizers], 1)
        captions[kind] = ids.view(len(OBJECTS), len(STYLES), len(templates), len(tokenizers), MAX_TOKENS)
    return captions


def caption_batch(
    captions: dict[str, Tensor], object: Tensor, style: Tensor, recipe: Recipe, generator: torch.Generator
) -> Tensor:
    """Token ids int64 [n, tokenizers, 16] for pictures of ``object`` [n] in ``style`` [n], in varied words."""
    choice = torch.rand(len(object), generator=generator)
    shares = torch.tensor([recipe.empty_captions, recipe.object_captions, recipe.style_captions]).cumsum(0)
    bounds = [*shares.tolist(), shares[2].item() + recipe.phrased_captions * (1 - shares[2].item()), 1.0]
    tokens, lower = None, 0.0
    for kind, upper in zip(("empty", "object", "style", "phrased", "full"), bounds, strict=True):
        ids = captions[kind]
        template = torch.randint(ids.shape[2], (len(object),), generator=generator)
        ids = ids[object, style, template].long()
        chosen = ((choice >= lower) & (choice < upper))[:, None, None]
        tokens = ids if tokens is None else torch.where(chosen, ids, tokens)
        lower = upper
    return tokens


def build_tokenizers(folder: Path) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Both tokenizers, kept in the folder's ``tokenizers``."""
    return (
        build_clip_tokenizer(folder / "tokenizers" / "tokenizer"),
        build_t5_tokenizer(folder / "tokenizers" / "tokenizer_2"),
    )


def _block_matrix(name: str) -> bool:
    return "transformer_blocks." in name and ".norm" not in name


def transformer_training(recipe: Recipe, folder: Path, tokenizers: tuple[CLIPTokenizer, T5TokenizerFast]) -> Training:
    """The untrained transformer and text encoders, or those of the last checkpoint, ready to be trained."""
    torch.manual_seed(recipe.seed)
    denoiser = Denoiser(build_transformer(), build_text_encoder(tokenizers[0]), build_text_encoder_2(tokenizers[1]))
    path = folder / "checkpoints" / "transformer.safetensors"
    training = Training(denoiser, path, "transformer", recipe.steps, recipe.learning_rate, recipe, _block_matrix)
    training.resume()
    return training


def train_transformer(recipe: Recipe, folder: Path, progress: Progress, compiled: bool = False) -> None:
    """Train transformer and text encoders to predict the velocity from picture to noise.

    ``compiled`` has the transformer's blocks compiled, which is 1.4 times as fast on a CPU and rounds differently.
    """
    latents, vae = load_latents(recipe, folder)
    tokenizers = build_tokenizers(folder)
    captions = build_captions(*tokenizers)
    training = transformer_training(recipe, folder, tokenizers)
    if compiled:
        training.model.transformer.compile_repeated_blocks()
    scale = vae.config.scaling_factor
    mean, std = (pack_latents(latents[name].flatten(0, 2) * scale) for name in ("mean", "std"))
    shape = latents["mean"].shape[:3]
    mean, std = mean.unflatten(0, shape), std.unflatten(0, shape)

    def loss(generator: torch.Generator) -> Tensor:
        index = [torch.randint(size, (recipe.batch_size,), generator=generator) for size in shape]
        tokens = caption_batch(captions, index[1], index[2], recipe, generator)
        clean = mean[*index].float()
        # Half the posterior's deviation: enough that latents are no points, and little to blur.
        clean = clean + 0.5 * std[*index].float() * torch.randn(clean.shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        sigmas = torch.randn(len(clean), generator=generator).sigmoid()
        noised = torch.lerp(clean, noise, sigmas[:, None, None])
        with _fast_attention():
            velocity = training.model(noised, sigmas, tokens[:, 0], tokens[:, 1])
        return F.mse_loss(velocity.float(), noise - clean)

    training.run(loss, progress)


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------


def export(recipe: Recipe, folder: Path) -> None:
    """Write what has been trained so far to ``folder/model``, in diffusers' layout and half precision."""
    tokenizers = build_tokenizers(folder)
    _, vae = load_latents(recipe, folder)
    training = transformer_training(recipe, folder, tokenizers)
    if not training.step:
        raise FadeError(f"there is no transformer in {folder}: run --stage transformer first")
    denoiser: Denoiser = training.averaged()
    pipeline = FluxPipeline(
        scheduler=build_scheduler(),
        vae=vae.half(),
        text_encoder=denoiser.text_encoder.half(),
        tokenizer=tokenizers[0],
        text_encoder_2=denoiser.text_encoder_2.half(),
        tokenizer_2=tokenizers[1],
        transformer=denoiser.transformer.half(),
    )
    with atomic_folder(folder / "model", "model_index.json") as fresh:
        pipeline.save_pretrained(fresh, safe_serialization=True)
        for name in ("vocab.json", "merges.txt"):  # what transformers before its version 5 reads
            shutil.copyfile(folder / "tokenizers" / "tokenizer" / name, fresh / "tokenizer" / name)
        _finish(fresh)


def _finish(folder: Path) -> None:
    """Mend what the libraries write so that every version of them reads it alike."""
    for path in folder.glob("*/tokenizer_config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in config.items() if name not in ("is_local", "local_files_only")}
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    for name in ("text_encoder", "text_encoder_2"):
        # transformers keeps the precision that a configuration names, where diffusers loads in float32: in half
        # precision its states would not fit the transformer of a plain from_pretrained.
        path = folder / name / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # The names of CLIP's own files, which transformers reads before and after its version 5.
    file = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    # Version 4 reads a T5Tokenizer from a sentencepiece file alone; the fast one is an alias in version 5.
    index = folder / "model_index.json"
    parts = json.loads(index.read_text(encoding="utf-8"))
    parts["tokenizer_2"] = ["transformers", "T5TokenizerFast"]
    index.write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")


def train(folder: Path, recipe: Recipe, progress: Progress, stage: Stage = Stage.all, compiled: bool = False) -> None:
    """Run one stage, or all that are still to do; leaves ``folder/judges`` and ``folder/model``.

    Raises:
        FadeError: what an earlier stage leaves is missing, or was made with another recipe.
    """
    wanted = list(Stage)[1:] if stage is Stage.all else [stage]
    if Stage.data in wanted and not (folder / "checkpoints" / "pictures.safetensors").is_file():
        save_pictures(data.render(), folder)
    for name, work in (
        (Stage.judges, train_judges),
        (Stage.vae, train_vae),
        (Stage.latents, make_latents),
        (Stage.decoder, train_decoder),
        (Stage.transformer, partial(train_transformer, compiled=compiled)),
    ):
        if name in wanted:
            work(recipe, folder, progress)
    if Stage.export in wanted:
        export(recipe, folder)


def main(
    folder: Annotated[Path, typer.Option(help="Folder for checkpoints, model and judges; a rerun resumes in it.")],
    stage: Annotated[Stage, typer.Option(help="What to do.")] = Stage.all,
    judge_steps: Annotated[int, typer.Option(min=1, help="Training steps of each judge.")] = Recipe.judge_steps,
    vae_steps: Annotated[int, typer.Option(min=1, help="Training steps of the VAE.")] = Recipe.vae_steps,
    decoder_steps: Annotated[int, typer.Option(min=1, help="More steps of its decoder.")] = Recipe.decoder_steps,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the transformer.")] = Recipe.steps,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = Recipe.checkpoint_every,
    seed: Annotated[int, typer.Option(help="Seed of every random number.")] = Recipe.seed,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the transformer: faster after minutes.")] = False,
) -> None:
    """Train the EmojiCanvas judges, VAE, text encoders and transformer from nothing, or one of them."""
    columns = (TextColumn("{task.description:>11}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}")) as progress:
        recipe = Recipe(
            judge_steps=judge_steps,
            vae_steps=vae_steps,
            decoder_steps=decoder_steps,
            steps=steps,
            checkpoint_every=checkpoint_every,
            seed=seed,
        )
        try:
            train(folder, recipe, progress, stage, compiled)
        except FadeError as error:
            progress.console.print(f"[red]error:[/red] {error}")
            raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
