"""Forget and retain latents with their prompts: encoded from the user's images, or sampled from the frozen model when
there are none. Made once and kept in a file, which a rerun with the same request reuses."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fade.backbones import Backbone
from fade.concept import Concept
from fade.config import DataConfig
from fade.errors import FadeError
from fade.files import atomic_write
from fade.progress import track

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Latents:
    """Clean latents and, for each, the prompt it is trained with.

    `forget` [n, 4, h, w] pairs with `forget_prompts` and `surrogate_prompts` (n each); `retain` [m, 4, h, w] with
    `retain_prompts`.
    """

    forget: Tensor
    forget_prompts: tuple[str, ...]
    surrogate_prompts: tuple[str, ...]
    retain: Tensor
    retain_prompts: tuple[str, ...]


def prepare_latents(
    backbone: Backbone,
    concept: Concept,
    config: DataConfig,
    seed: int,
    fingerprint: str,
    cache: Path | None = None,
    progress: bool = False,
) -> Latents:
    """The latents for a request, from `cache` where it holds the same request's.

    `fingerprint` names the base weights. Raises FadeError for a missing or empty image folder and where no image in it
    can be read; images that cannot be read are skipped with one warning that names them.
    """
    key = _request_key(backbone, concept, config, seed, fingerprint)
    if cache is not None and (found := _load(cache, key, backbone)) is not None:
        return found
    forget, forget_prompts, surrogate_prompts = _forget_latents(backbone, concept, config, seed, progress)
    retain, retain_prompts = _retain_latents(backbone, concept, config, seed, progress)
    latents = Latents(forget, forget_prompts, surrogate_prompts, retain, retain_prompts)
    if cache is not None:
        _save(cache, key, latents)
    return latents


def _forget_latents(
    backbone: Backbone, concept: Concept, config: DataConfig, seed: int, progress: bool
) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    pairs = cycle(zip(concept.forget_prompts, concept.surrogate_prompts, strict=True))
    if config.forget_images is None:
        forget_prompts, surrogate_prompts = zip(*islice(pairs, config.forget_samples), strict=True)
        latents = _sample(backbone, forget_prompts, config, 2 * seed, progress, "sampling forget latents")
        return latents, forget_prompts, surrogate_prompts

    latents, captions = _read(backbone, config.forget_images, config.forget_samples, config, seed, progress)
    forget_prompts, surrogate_prompts = [], []
    for caption, (forget_prompt, surrogate_prompt) in zip(captions, pairs, strict=False):
        if caption is not None and concept.forget in caption:
            forget_prompt, surrogate_prompt = caption, caption.replace(concept.forget, concept.surrogate)
        forget_prompts.append(forget_prompt)
        surrogate_prompts.append(surrogate_prompt)
    return latents, tuple(forget_prompts), tuple(surrogate_prompts)


def _retain_latents(
    backbone: Backbone, concept: Concept, config: DataConfig, seed: int, progress: bool
) -> tuple[Tensor, tuple[str, ...]]:
    if config.retain_images is None:
        prompts = tuple(islice(cycle(concept.retain_prompts), config.retain_samples))
        return _sample(backbone, prompts, config, 2 * seed + 1, progress, "sampling retain latents"), prompts
    latents, captions = _read(backbone, config.retain_images, config.retain_samples, config, seed, progress)
    prompts = tuple(c or p for c, p in zip(captions, cycle(concept.retain_prompts), strict=False))
    return latents, prompts


def _sample(
    backbone: Backbone, prompts: Sequence[str], config: DataConfig, stream: int, progress: bool, description: str
) -> Tensor:
    # Seeds of different streams never meet, and stay clear of the small numbers people evaluate with.
    first = (stream + 1) * 1_000_003
    return backbone.sample_latents(
        prompts,
        range(first, first + len(prompts)),
        config.sampling_steps,
        config.guidance_scale,
        config.batch_size,
        config.resolution,
        progress,
        description,
    )


def image_files(folder: str | Path) -> list[Path]:
    """The image files of a folder, sorted by name. Raises FadeError where it is missing or has none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FadeError(f"there is no image folder {folder}")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FadeError(f"the folder {folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return files


def _read(
    backbone: Backbone, folder: str, most: int, config: DataConfig, seed: int, progress: bool
) -> tuple[Tensor, list[str | None]]:
    """Latents of a folder's images and their captions (from `name.txt` beside `name.png`, None where there is none)."""
    images, captions, unreadable = [], [], []
    for path in image_files(folder):
        if len(images) == most:
            break
        try:
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            unreadable.append(path.name)
            continue
        sidecar = path.with_suffix(".txt")
        try:
            captions.append(sidecar.read_text(encoding="utf-8").strip() or None if sidecar.is_file() else None)
        except (OSError, UnicodeDecodeError) as error:
            raise FadeError(f"cannot read the caption {sidecar}: {error}; write it in UTF-8 or remove it") from error
    if not images:
        raise FadeError(f"none of the {len(unreadable)} images in {folder} can be read; are they really images?")
    if unreadable:
        shown = ", ".join(unreadable[:5]) + (", …" if len(unreadable) > 5 else "")
        warnings.warn(f"skipped {len(unreadable)} unreadable image(s) in {folder}: {shown}", stacklevel=2)
    generator = torch.Generator().manual_seed(seed)
    starts = range(0, len(images), config.batch_size)
    parts = [
        backbone.encode_images(images[start : start + config.batch_size], config.resolution, generator)
        for start in track(starts, f"encoding {Path(folder).name}", progress)
    ]
    return torch.cat(parts), captions


def _request_key(backbone: Backbone, concept: Concept, config: DataConfig, seed: int, fingerprint: str) -> str:
    """A digest of everything the latents depend on."""
    images = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for folder in (config.forget_images, config.retain_images)
        if folder is not None
        for path in image_files(folder)
    ]
    request = [
        fingerprint, str(backbone.dtype), vars(concept), vars(config), seed, images,
        type(backbone.pipeline.scheduler).__name__,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _load(cache: Path, key: str, backbone: Backbone) -> Latents | None:
    if not cache.is_file():
        return None
    try:
        with safe_open(cache, framework="pt", device=str(backbone.device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("request") != key:
                return None
            prompts = json.loads(metadata["prompts"])
            return Latents(
                file.get_tensor("forget"),
                tuple(prompts["forget"]),
                tuple(prompts["surrogate"]),
                file.get_tensor("retain"),
                tuple(prompts["retain"]),
            )
    except (SafetensorError, KeyError, json.JSONDecodeError):
        return None  # a damaged cache costs a resampling, nothing else


def _save(cache: Path, key: str, latents: Latents) -> None:
    prompts = {
        "forget": latents.forget_prompts,
        "surrogate": latents.surrogate_prompts,
        "retain": latents.retain_prompts,
    }
    tensors = {"forget": latents.forget.contiguous(), "retain": latents.retain.contiguous()}
    with atomic_write(cache) as temporary:
        save_file(tensors, temporary, metadata={"request": key, "prompts": json.dumps(prompts)})
