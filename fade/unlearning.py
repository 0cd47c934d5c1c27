"""The walk of one unlearning run: prompts, latents, locate, attach, overwrite, save. Each part lives in its own file;
here they only follow one another, and a later part never reaches into an earlier one."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fade.adapter import Adapter, adapters_off, attach, check_name, new_metadata
from fade.backbones import Backbone, backbone_for
from fade.base_model import base_name, fingerprint, is_digitcanvas, refuse_merged, refuse_offloaded, target_layers
from fade.concept import Concept, concept_from_words, digitcanvas_concept
from fade.config import Config
from fade.distillation import overwrite as run_overwrite
from fade.errors import FadeError
from fade.files import atomic_write, check_writable
from fade.latents import Latents, prepare_latents
from fade.measure import Measurement, measured
from fade.saliency import Located, locate
from fade_kernels import BitMask

ADAPTER_FILE, RUN_FILE, LATENTS_FILE = "adapter.safetensors", "run.json", "latents.safetensors"
# These three exist only while a run is unfinished.
REQUEST_FILE, MASKS_FILE, CHECKPOINT_FILE = "request.json", "masks.safetensors", "checkpoint.safetensors"


def unlearn(
    pipeline: Any,
    forget: str | None = None,
    surrogate: str | None = None,
    *,
    concept: Concept | None = None,
    templates: Sequence[str] | None = None,
    retain: Sequence[str] | None = None,
    config: Config | None = None,
    output: str | Path | None = None,
    name: str = "fade",
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> Adapter:
    """Makes a pipeline answer `forget` as it answers `surrogate`, and everything else as before.

    Args:
        pipeline: a diffusers StableDiffusionPipeline (1.x or 2.x). Its own weights are never changed.
        forget, surrogate: the concept and what takes its place, put into `templates` (one `{}` each). On the bundled
            DigitCanvas, two digits or two styles.
        concept: the prompts themselves, instead of words and templates.
        retain: prompts of what must stay; neutral ones by default.
        config: every other setting (`fade.Config`).
        output: folder for `adapter.safetensors`, `run.json`, cached latents and checkpoints; None keeps nothing.
        name: the adapter's name on the pipeline.
        overwrite: use `output` though it is in use; resume: go on with an interrupted run in it.
        progress: show progress bars.

    Returns the adapter, attached and enabled. Adapters that were on before stay on; the new one is trained without
    them, against the base weights. Raises FadeError for bad input, DivergedError where the loss is not finite.
    """
    config = config or Config()
    if not isinstance(config, Config):
        raise FadeError(f"config must be a fade.Config, not a {type(config).__name__}; see fade.Config().replace")
    backbone = backbone_for(pipeline)
    backbone.check_trainable()
    if concept is None:
        concept = _concept(pipeline, forget, surrogate, templates, retain, config.data.plurals)
    layers = target_layers(backbone.denoiser, config.locate.targets)
    check_name(backbone.denoiser, name)
    refuse_merged(backbone.denoiser)
    refuse_offloaded(backbone.denoiser)
    digests = fingerprint(backbone.denoiser)
    folder = None if output is None else _open_folder(Path(output), concept, config, digests, overwrite, resume)

    data, located_in, overwritten = Measurement(), Measurement(), Measurement()
    with _frozen(backbone.denoiser):
        with measured(backbone.device) as data:
            try:
                latents = prepare_latents(
                    backbone, concept, config.data, config.seed, next(iter(digests.values())),
                    folder and folder / LATENTS_FILE, progress,
                )  # fmt: skip
                embeddings = _encode(backbone, latents)
            except FadeError:
                # A wrong image folder is no run to go on with: the next try finds the output folder free.
                if folder is not None and not resume:
                    (folder / REQUEST_FILE).unlink(missing_ok=True)
                raise
        with backbone.only_denoiser_on_device():
            with measured(backbone.device) as located_in:
                located = _located_before(folder) if resume else None
                if located is None:
                    located = locate(backbone, layers, latents, embeddings, config.locate, config.seed, progress)
                    if folder is not None:
                        _keep_located(folder, located)
            values = config.overwrite.parameters == "values"
            scale = 1.0 if values else config.overwrite.alpha / config.overwrite.rank
            adapter = attach(
                pipeline, name, located.masks, rank=config.overwrite.rank,
                alpha=scale if values else config.overwrite.alpha, values=values,
                metadata=new_metadata(concept, config, base_name(pipeline), digests, scale), seed=config.seed,
            )  # fmt: skip
            adapter.enable()
            try:
                with measured(backbone.device) as overwritten:
                    losses = run_overwrite(
                        backbone, adapter, latents, embeddings, config.overwrite, config.seed,
                        folder and folder / CHECKPOINT_FILE, resume, progress,
                    )  # fmt: skip
            except BaseException:
                adapter.remove()
                raise
    adapter.enable()

    adapter.metadata["run"] = {
        "seconds": {"data": data.seconds, "locate": located_in.seconds, "overwrite": overwritten.seconds},
        "peak_memory_bytes": {
            "locate": located_in.peak_memory_bytes, "overwrite": overwritten.peak_memory_bytes,
        },
        "losses": vars(losses),
        "threshold": located.threshold,
        "selected": located.selected,
        "total": located.total,
        "layers": located.layers,
    }  # fmt: skip
    if folder is not None:
        adapter.save(folder / ADAPTER_FILE)
        _write_json(folder / RUN_FILE, adapter.metadata)
        for leftover in (REQUEST_FILE, CHECKPOINT_FILE, MASKS_FILE):
            (folder / leftover).unlink(missing_ok=True)
    return adapter


def _concept(
    pipeline: Any,
    forget: str | None,
    surrogate: str | None,
    templates: Sequence[str] | None,
    retain: Sequence[str] | None,
    plurals: bool,
) -> Concept:
    if forget is None or surrogate is None:
        raise FadeError("name the concept to forget and its surrogate, e.g. forget='three', surrogate='eight'")
    if templates is None and is_digitcanvas(pipeline):
        return digitcanvas_concept(forget, surrogate, retain)
    return concept_from_words(forget, surrogate, templates, retain, plurals)


def _encode(backbone: Backbone, latents: Latents) -> dict[str, Tensor]:
    """Every prompt of the run, encoded once. Raises FadeError where a concept does not reach the text encoder."""
    prompts = sorted({*latents.forget_prompts, *latents.surrogate_prompts, *latents.retain_prompts})
    embeddings = dict(zip(prompts, backbone.encode_prompts(prompts), strict=True))
    for forget, surrogate in set(zip(latents.forget_prompts, latents.surrogate_prompts, strict=True)):
        if torch.equal(embeddings[forget], embeddings[surrogate]):
            shown = forget if len(forget) <= 60 else f"{forget[:60]}…"
            raise FadeError(
                f"the text encoder reads the prompt {shown!r} and its surrogate as the same; if they are longer than "
                "the tokens it takes, shorten the template so that the concept is among them"
            )
    return embeddings


@contextlib.contextmanager
def _frozen(denoiser: nn.Module) -> Iterator[None]:
    """The denoiser in evaluation mode, its weights needing no gradient, its adapters off; all as it was afterwards."""
    training = [module for module in denoiser.modules() if module.training]
    with adapters_off(denoiser):
        denoiser.eval().requires_grad_(False)
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _open_folder(
    folder: Path, concept: Concept, config: Config, digests: dict[str, str], overwrite: bool, resume: bool
) -> Path:
    """The output folder, ready for a new run or for going on with an interrupted one. Raises FadeError."""
    request = {"concept": vars(concept), "config": config.to_dict(), "fingerprint": digests}
    request = json.loads(json.dumps(request))
    if folder.exists() and not folder.is_dir():
        raise FadeError(f"the output {folder} is a file; name a folder")
    if resume:
        try:
            before = json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            state = "is complete" if (folder / ADAPTER_FILE).exists() else "was never started"
            raise FadeError(f"there is nothing to resume in {folder}: the run {state}; leave out --resume") from error
        changed = (
            [path for path, value in _flat(request).items() if _flat(before).get(path, ...) != value]
            if isinstance(before, dict)
            else ["everything"]
        )
        if changed:
            raise FadeError(
                f"the run in {folder} has another {', '.join(changed[:3])}; resume with the same settings, or start "
                "again with --overwrite"
            )
        return folder
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        going_on = " or --resume to go on" if (folder / REQUEST_FILE).exists() else ""
        raise FadeError(f"the output folder {folder} is in use; pass --overwrite to replace it{going_on}")
    check_writable(folder / ADAPTER_FILE)
    for leftover in (CHECKPOINT_FILE, MASKS_FILE):
        (folder / leftover).unlink(missing_ok=True)
    _write_json(folder / REQUEST_FILE, request)
    return folder


def _flat(value: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{path}{key}.") if isinstance(inner, dict) else {f"{path}{key}": inner}
    return flat


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _keep_located(folder: Path, located: Located) -> None:
    record = {
        "layers": located.layers, "threshold": located.threshold,
        "selected": located.selected, "total": located.total,
        "shapes": {name: list(mask.shape) for name, mask in located.masks.items()},
    }  # fmt: skip
    with atomic_write(folder / MASKS_FILE) as temporary:
        words = {name: mask.words.cpu().contiguous() for name, mask in located.masks.items()}
        save_file(words, temporary, metadata={"located": json.dumps(record)})


def _located_before(folder: Path) -> Located | None:
    """The masks of an interrupted run, None where it had not come that far."""
    path = folder / MASKS_FILE
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["located"])
    words = load_file(path)
    masks = {name: BitMask.from_words(words[name], tuple(shape)) for name, shape in record.pop("shapes").items()}
    return Located(masks=masks, **record)
