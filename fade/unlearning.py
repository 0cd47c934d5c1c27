"""The walk of one unlearning run: prompts, latents, locate, attach, overwrite, save. Each part lives in its own file;
here they only follow one another, and a later part never reaches into an earlier one."""

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fade.adapter import Adapter, adapters_off, attach, check_carriers, check_name, new_metadata
from fade.backbones import Backbone, backbone_for
from fade.base_model import (
    base_layers,
    base_name,
    fingerprint,
    is_digitcanvas,
    refuse_merged,
    refuse_offloaded,
    target_layers,
)
from fade.concept import Concept, concept_from_words, digitcanvas_concept
from fade.config import Config
from fade.distillation import Losses
from fade.distillation import overwrite as run_overwrite
from fade.errors import FadeError
from fade.latents import Latents, prepare_latents
from fade.measure import Measurement, measured
from fade.modes import evaluation_mode, out_of_inference_mode, plain_mode
from fade.run_folder import ADAPTER_FILE, RunFolder, open_run_folder
from fade.saliency import Located, locate

__all__ = ["ADAPTER_FILE", "unlearn"]


@plain_mode()
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
    them, against the base weights. Called under `no_grad`, `inference_mode`, autocast or another default dtype or
    device it does the same as outside of them (weights that were loaded under `inference_mode` become ordinary ones of
    the same bits); what torch.compile has compiled runs uncompiled meanwhile, in the whole process; the global random
    generators are left alone. Whatever is raised, the pipeline is as it was before.
    Raises FadeError for bad input, DivergedError where the loss is not finite.
    """
    config = config or Config()
    if not isinstance(config, Config):
        raise FadeError(f"config must be a fade.Config, not a {type(config).__name__}; see fade.Config().replace")
    if resume and (output is None or overwrite):
        why = "needs the output folder of the interrupted run" if output is None else "excludes overwrite"
        raise FadeError(f"resume {why}; give output and resume alone to go on, or overwrite to start again")
    for argument, text in (("forget", forget), ("surrogate", surrogate), ("name", name)):
        if not isinstance(text, str if argument == "name" else str | None):
            raise FadeError(f"{argument} must be a text, not {text!r}"[:200])
    if not isinstance(output, str | os.PathLike | None):
        raise FadeError(f"output must be a folder's path, not {output!r}"[:200])
    backbone = backbone_for(pipeline)
    backbone.check_trainable()
    if concept is None:
        concept = _concept(pipeline, forget, surrogate, templates, retain, config.data.plurals)
    else:
        given = {"forget": forget, "surrogate": surrogate, "templates": templates, "retain": retain}
        _check_concept(concept, [name for name, value in given.items() if value is not None])
    with _alone(backbone.denoiser), contextlib.ExitStack() as resources:
        for module in _modules(pipeline):
            out_of_inference_mode(module)
        layers = target_layers(backbone.denoiser, config.locate.targets)
        check_carriers(backbone.denoiser, base_layers(backbone.denoiser), layers)
        check_name(backbone.denoiser, name)
        refuse_merged(backbone.denoiser)
        refuse_offloaded(backbone.denoiser)
        digests = fingerprint(backbone.denoiser)
        folder = None
        if output is not None:
            request = {"concept": vars(concept), "config": config.to_dict(), "fingerprint": digests}
            # Absolute, because a program may change its working directory while this runs.
            path = Path(output).absolute()
            folder = resources.enter_context(open_run_folder(path, request, backbone, overwrite, resume))
        for module in _modules(pipeline):
            resources.enter_context(evaluation_mode(module))
        return _run(backbone, concept, config, layers, digests, folder, name, progress)


def _run(
    backbone: Backbone,
    concept: Concept,
    config: Config,
    layers: dict[str, nn.Module],
    digests: dict[str, str],
    folder: RunFolder | None,
    name: str,
    progress: bool,
) -> Adapter:
    pipeline, denoiser = backbone.pipeline, backbone.denoiser
    costs = {} if folder is None else folder.costs

    @contextlib.contextmanager
    def stage(part: str) -> Iterator[None]:
        """Measures a part of the run; what it cost is kept however it ends."""
        try:
            with measured(backbone.device, earlier=costs.get(part)) as costs[part]:
                yield
        except BaseException:
            if folder is not None:
                with contextlib.suppress(FadeError):
                    folder.keep()
            raise
        if folder is not None:
            folder.keep()

    adapter = None
    try:
        with _frozen(denoiser):
            try:
                with stage("data"):
                    latents = prepare_latents(
                        backbone, concept, config.data, config.seed, next(iter(digests.values())),
                        folder and folder.latents_file, progress,
                    )  # fmt: skip
                    embeddings = _encode(backbone, latents)
            except FadeError:
                # A wrong image folder is no run to go on with: the next try finds the output folder free.
                if folder is not None:
                    folder.abandon()
                raise
            if folder is not None:
                folder.begin_with(latents, embeddings, backbone)
            with backbone.only_denoiser_on_device():
                with stage("locate"):
                    located = None if folder is None else folder.located_before(layers)
                    if located is None:
                        located = locate(backbone, layers, latents, embeddings, config.locate, config.seed, progress)
                        if folder is not None:
                            folder.keep_located(located)
                values = config.overwrite.parameters == "values"
                scale = 1.0 if values else config.overwrite.alpha / config.overwrite.rank
                adapter = attach(
                    pipeline, name, located.masks, rank=config.overwrite.rank,
                    alpha=scale if values else config.overwrite.alpha, values=values,
                    metadata=new_metadata(concept, config, base_name(pipeline), digests, scale), seed=config.seed,
                )  # fmt: skip
                adapter.enable()
                with stage("overwrite"):
                    losses = run_overwrite(
                        backbone, adapter, latents, embeddings, config.overwrite, config.seed,
                        folder and folder.checkpoint(located), progress,
                    )  # fmt: skip
            adapter.metadata["run"] = _run_record(costs, losses, located)
            if folder is not None:
                folder.finish(adapter)
        return adapter.enable()
    except BaseException:
        if adapter is not None:
            adapter.remove()
        raise


def _run_record(costs: dict[str, Measurement], losses: Losses, located: Located) -> dict[str, Any]:
    return {
        "seconds": {part: cost.seconds for part, cost in costs.items()},
        "peak_memory_bytes": {part: costs[part].peak_memory_bytes for part in ("locate", "overwrite")},
        "losses": vars(losses),
        "threshold": located.threshold,
        "selected": located.selected,
        "total": located.total,
        "layers": located.layers,
    }


def _modules(pipeline: Any) -> list[nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


_in_training: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_guard = threading.Lock()


@contextlib.contextmanager
def _alone(denoiser: nn.Module) -> Iterator[None]:
    """Raises FadeError where another thread is unlearning on the same denoiser."""
    with _guard:
        if denoiser in _in_training:
            raise FadeError("this pipeline is unlearning in another thread already; wait, or load it a second time")
        _in_training.add(denoiser)
    try:
        yield
    finally:
        with _guard:
            _in_training.discard(denoiser)


def _check_concept(concept: Concept, beside: Sequence[str]) -> None:
    if not isinstance(concept, Concept):
        raise FadeError(f"concept must be a fade.Concept, not a {type(concept).__name__}")
    if beside:
        raise FadeError(f"{', '.join(beside)} would be ignored beside concept, which holds all prompts; give either")


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
    """The denoiser's weights needing no gradient, its adapters off; all as it was afterwards."""
    with adapters_off(denoiser):
        denoiser.requires_grad_(False)
        yield
