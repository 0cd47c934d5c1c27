"""Forget and retain latents with their prompts: encoded from the user's images, or sampled from the frozen model when
there are none. Made once and kept in a file, which a rerun with the same request reuses."""

import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fade import processes
from fade.backbones import Backbone
from fade.cache_key import file_digest, library_versions, pipeline_digests
from fade.concept import Concept
from fade.config import DataConfig
from fade.errors import FadeError, printable
from fade.files import read_tensors, write_tensors
from fade.images import Picture, PictureFolder, find_pictures, listed, readable, report_unreadable
from fade.progress import progress_bar, tell

MOST_PIXELS_AT_ONCE = 2**21
"""Pixels of images encoded at once: 8 images of 512 x 512, for which the VAE takes about 3 GB in float32."""

_FORMAT = 3
"""Of cache files and of what is read from a picture or a caption; another one is made again."""


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
    denoised: Collection[str] = (),
) -> Latents:
    """The latents for a request, from `cache` where it holds the same request's.

    `fingerprint` names the base weights. Of the parts in `denoised`, `forget` or `retain`, every latent that is sampled
    shows the prompt that it goes with (`Config.denoises`). With `progress`, what was found in image folders is told on
    stderr, and how many are sampled where these are more than the settings say. Warns once each of images that cannot
    be read or whose caption speaks against their use, of retain images without captions that are to be denoised, of
    retain prompts that name the concept, and of a damaged cache, which is made again. Raises FadeError for a missing or
    empty image folder, a caption or metadata file that cannot be read, and where no image is left.

    Of several processes the first alone reads pictures and the cache and writes it, and all draw; all get the same.
    """
    warn_of_retain_prompts(concept, config, stacklevel=3)
    asked, config = config, _one_each(concept, config, denoised)
    key, found, forget_folder, retain_folder = "", None, None, None
    if processes.first():
        forget_folder = _find(config.forget_images, config.retain_images, "forget", config.forget_samples, progress)
        retain_folder = _find(config.retain_images, config.forget_images, "retain", config.retain_samples, progress)
        if cache is not None:
            key = request_key(backbone, concept, config, seed, fingerprint, forget_folder, retain_folder, denoised)
            found = _load(cache, key, backbone)
    if (found := _of_first(found, backbone)) is not None:
        return found
    for part in ("forget", "retain"):
        settings, drawn = (getattr(one, f"{part}_samples") for one in (asked, config))
        if drawn > settings:
            tell(f"{drawn} {part} latents, one for each prompt, instead of {settings}: they are denoised", progress)
    made: Latents | None = None
    if config.forget_images is None:
        forget = _drawn_forget_latents(backbone, concept, config, seed, progress)
    elif processes.first():
        forget = _forget_latents(backbone, concept, config, seed, forget_folder, progress)
    if config.retain_images is None:
        retain = _drawn_retain_latents(backbone, concept, config, seed, progress)
    elif processes.first():
        retain = _retain_latents(backbone, concept, config, seed, retain_folder, progress, "retain" in denoised)
    if processes.first():
        made = Latents(*forget, *retain)
        if cache is not None:
            _save(cache, key, made)
    return _of_first(made, backbone)


def _one_each(concept: Concept, config: DataConfig, denoised: Collection[str]) -> DataConfig:
    """The settings with a latent for each prompt at least, of what is sampled and denoised."""
    fewest = {}
    if "forget" in denoised and config.forget_images is None:
        fewest["forget_samples"] = max(config.forget_samples, len(concept.forget_prompts))
    if "retain" in denoised and config.retain_images is None:
        fewest["retain_samples"] = max(config.retain_samples, len(concept.retain_prompts))
    return replace(config, **fewest)


def _of_first(latents: Latents | None, backbone: Backbone) -> Latents | None:
    """The latents that the first process has."""
    if processes.world() == 1:
        return latents
    tensors, prompts = processes.from_first(*(({}, None) if latents is None else _parts(latents)), backbone.device)
    return None if prompts is None else _whole(tensors, prompts, backbone)


def warn_of_retain_prompts(concept: Concept, config: DataConfig, stacklevel: int = 2) -> None:
    """Warns of retain prompts that name the concept."""
    naming = [prompt for prompt in concept.retain_prompts if concept.named_in(prompt, config.plurals)]
    if naming:
        warnings.warn(
            f"{len(naming)} of {len(concept.retain_prompts)} retain prompts name {concept.forget!r}, which is to be "
            f"forgotten: {listed([repr(prompt) for prompt in naming])}; they hold the concept in place",
            stacklevel=stacklevel,
        )


def _find(folder: str | None, other: str | None, kind: str, most: int, progress: bool) -> PictureFolder | None:
    """What is in a folder of images, told and warned of; the other folder may lie in it and is then no part of it."""
    if folder is None:
        return None
    if other is not None and Path(folder).resolve() == Path(other).resolve():
        raise FadeError(f"forget and retain images are in the same folder {folder}; give each a folder of its own")
    found = find_pictures(folder, leave_out=other)
    tell(f"{kind} images in {folder}: {found.summary(most)}", progress)
    for warning in found.warnings:
        warnings.warn(printable(warning), stacklevel=3)
    return found


def _drawn_forget_latents(
    backbone: Backbone, concept: Concept, config: DataConfig, seed: int, progress: bool
) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    pairs = list(zip(concept.forget_prompts, concept.surrogate_prompts, strict=True))
    sampled, latent_of = _spread(len(pairs), config.forget_samples)
    drawn = [pairs[i][config.forget_from == "surrogate"] for i in sampled]
    latents = _sample(backbone, drawn, config, 2 * seed, progress, "sampling forget latents")[latent_of]
    forget_prompts, surrogate_prompts = zip(*(pairs[i % len(pairs)] for i in range(len(latents))), strict=True)
    return latents, forget_prompts, surrogate_prompts


def _forget_latents(
    backbone: Backbone, concept: Concept, config: DataConfig, seed: int, folder: PictureFolder, progress: bool
) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
    pairs = list(zip(concept.forget_prompts, concept.surrogate_prompts, strict=True))
    latents, captions = _read(backbone, folder, config.forget_samples, config, seed, progress)
    named = [next((line for line in c if concept.named_in(line, config.plurals)), None) for c in captions]
    answers = {line: concept.answer(line, config.plurals) for line in named if line}
    cut_off = {line for line, same in zip(answers, _read_as_the_same(backbone, answers), strict=True) if same}
    chosen = [
        pair if line is None or line in cut_off else (line, answers[line])
        for line, pair in zip(named, cycle(pairs), strict=False)
    ]
    for many, why in (
        (sum(line is None and bool(caption) for line, caption in zip(named, captions, strict=True)), "do not name"),
        (sum(line in cut_off for line in named), "name only behind what the text encoder reads"),
    ):
        if many:
            warnings.warn(
                f"{many} of {sum(map(bool, captions))} captions in {folder.folder} {why} {concept.forget!r}; their "
                "images are trained with the templates instead",
                stacklevel=3,
            )
    forget_prompts, surrogate_prompts = zip(*chosen, strict=True)
    return latents, forget_prompts, surrogate_prompts


def _read_as_the_same(backbone: Backbone, answers: Mapping[str, str]) -> list[bool]:
    """For each caption whether the text encoder cannot tell it from its answer: the concept is beyond its tokens."""
    if not answers:
        return []
    encoded, many = backbone.encode_prompts([*answers, *answers.values()]), len(answers)
    return [encoded.rows(i).equal(encoded.rows(many + i)) for i in range(many)]


def _drawn_retain_latents(
    backbone: Backbone, concept: Concept, config: DataConfig, seed: int, progress: bool
) -> tuple[Tensor, tuple[str, ...]]:
    prompts = concept.retain_prompts
    sampled, latent_of = _spread(len(prompts), config.retain_samples)
    drawn = [prompts[i] for i in sampled]
    latents = _sample(backbone, drawn, config, 2 * seed + 1, progress, "sampling retain latents")[latent_of]
    return latents, tuple(prompts[i % len(prompts)] for i in range(len(latents)))


def _retain_latents(
    backbone: Backbone, concept: Concept, config: DataConfig, seed: int, folder: PictureFolder, progress: bool,
    denoised: bool,
) -> tuple[Tensor, tuple[str, ...]]:  # fmt: skip
    prompts = concept.retain_prompts

    def names_the_concept(picture: Picture) -> bool:
        return any(concept.named_in(line, config.plurals) for line in picture.caption)

    naming = [picture.name for picture in folder.pictures if names_the_concept(picture)]
    if naming:
        warnings.warn(
            f"left out {len(naming)} of {len(folder.pictures)} images in {folder.folder} whose captions name "
            f"{concept.forget!r}, which is to be forgotten: {listed(naming)}",
            stacklevel=3,
        )
    latents, captions = _read(backbone, folder, config.retain_samples, config, seed, progress, names_the_concept)
    used = [caption[0] if caption else prompt for caption, prompt in zip(captions, cycle(prompts), strict=False)]
    without = [i for i, caption in enumerate(captions) if not caption]
    if without and denoised:
        warnings.warn(
            f"{len(without)} of {len(captions)} images in {folder.folder} have no caption and go with retain prompts, "
            "which they may not show, and these settings denoise them as pictures of those; give them captions",
            stacklevel=3,
        )
    if without:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in set(used)]
        again = [without[i % len(without)] for i in range(len(missing))]
        latents, used = torch.cat([latents, latents[again]]), [*used, *missing]
    return latents, tuple(used)


def _spread(prompts: int, samples: int) -> tuple[list[int], list[int]]:
    """Which prompt each sample is drawn with, and which sample each entry of the training set takes.

    With enough samples the prompts take turns and entry i is sample i. With fewer there is an entry for each prompt,
    and prompts that are neighbours in the list share the sample of the first of them.
    """
    if samples >= prompts:
        return [i % prompts for i in range(samples)], list(range(samples))
    sample_of = [i * samples // prompts for i in range(prompts)]
    return [sample_of.index(sample) for sample in range(samples)], sample_of


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


def _read(
    backbone: Backbone,
    folder: PictureFolder | str,
    most: int,
    config: DataConfig,
    seed: int,
    progress: bool,
    leave_out: Callable[[Picture], bool] = lambda picture: False,
) -> tuple[Tensor, list[tuple[str, ...]]]:
    """Latents of up to `most` of a folder's images, without those to leave out, and the lines of their captions.

    Images are read, made small and encoded batch by batch, so that memory depends neither on how many nor on how
    large they are.
    """
    found = folder if isinstance(folder, PictureFolder) else find_pictures(folder)
    side = backbone.side(config.resolution)
    batch_size = max(1, min(config.batch_size, MOST_PIXELS_AT_ONCE // side**2))
    generator = torch.Generator().manual_seed(seed)
    candidates = [picture for picture in found.order(most) if not leave_out(picture)]
    if not candidates:
        raise FadeError(f"every image in {found.folder} is left out for its caption; add images of what must stay")
    parts: list[Tensor] = []
    captions: list[tuple[str, ...]] = []
    batch: list[Image.Image] = []
    unreadable: dict[str, str] = {}
    with progress_bar(f"encoding {found.folder.name}", min(most, len(candidates)), progress) as advance:
        for picture, image in readable(candidates, side, unreadable):
            batch.append(image)
            captions.append(picture.caption)
            advance()
            if len(batch) == batch_size or len(captions) == most:
                parts.append(backbone.encode_images(batch, config.resolution, generator))
                batch = []
            if len(captions) == most:
                break
    if batch:
        parts.append(backbone.encode_images(batch, config.resolution, generator))
    report_unreadable(found.folder, unreadable, bool(parts))
    return torch.cat(parts), captions


# --- the cache -------------------------------------------------------------------------------------------------------


def request_key(
    backbone: Backbone,
    concept: Concept,
    config: DataConfig,
    seed: int,
    fingerprint: str,
    forget_folder: PictureFolder | None = None,
    retain_folder: PictureFolder | None = None,
    denoised: Collection[str] = (),
) -> str:
    """A digest of everything the latents depend on: the prompts and settings, the content of pictures and captions, the
    denoiser (`fingerprint`) and every other part of the pipeline that they go through, and the libraries."""
    settings = {name: value for name, value in vars(config).items() if name not in ("forget_images", "retain_images")}
    request = {
        "format": _FORMAT,
        "denoiser": fingerprint,
        "dtype": str(backbone.dtype),
        "pipeline": pipeline_digests(backbone.pipeline),
        "libraries": library_versions(),
        "concept": concept.to_dict(),
        "settings": settings,
        "seed": seed,
        "forget": forget_folder and _contents(forget_folder, config.forget_samples),
        "retain": retain_folder and _contents(retain_folder, config.retain_samples),
        **({"denoised": sorted(denoised)} if denoised else {}),
    }
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _contents(folder: PictureFolder, most: int) -> list[tuple[str, tuple[str, ...], str]]:
    """The name, caption and content of each picture. Pictures beyond those that are read first go by size and time of
    change: they only stand in for unreadable ones, and a folder may hold very many."""
    contents = []
    for index, picture in enumerate(folder.order(most)):
        if index < most:
            content = file_digest(picture.path)
        else:
            state = picture.path.lstat()
            content = f"{state.st_size} {state.st_mtime_ns}"
        contents.append((picture.name, picture.caption, content))
    return contents


def _load(cache: Path, key: str, backbone: Backbone) -> Latents | None:
    """The latents of the request `key`; None where the file holds another's, or, with a warning, is damaged."""
    if not cache.is_file():
        return None
    try:
        tensors, record = read_tensors(cache)
        if record["request"] != key:
            return None
        return _whole(tensors, record["prompts"], backbone)
    except (FadeError, KeyError, TypeError, AttributeError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"the cached latents in {cache} are damaged and are made again: {told}", stacklevel=3)
        return None


def _save(cache: Path, key: str, latents: Latents) -> None:
    tensors, prompts = _parts(latents)
    write_tensors(cache, tensors, {"request": key, "prompts": prompts})


def _parts(latents: Latents) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """The tensors and the prompts, by kind."""
    prompts = {
        "forget": latents.forget_prompts, "surrogate": latents.surrogate_prompts, "retain": latents.retain_prompts,
    }  # fmt: skip
    return {"forget": latents.forget, "retain": latents.retain}, prompts


def _whole(tensors: Mapping[str, Tensor], prompts: Mapping[str, Sequence[str]], backbone: Backbone) -> Latents:
    """The latents whose `_parts` these are, on the denoiser's device."""
    forget, retain = (tensors[kind].to(backbone.device) for kind in ("forget", "retain"))
    texts = {kind: tuple(texts) for kind, texts in prompts.items()}
    return Latents(forget, texts["forget"], texts["surrogate"], retain, texts["retain"])
