"""The walk of one unlearning run: prompts, latents, locate, solve, attach, train, save. Each part lives in its own
file; here they only follow one another, and a later part never reaches into an earlier one."""

import contextlib
import dataclasses
import os
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from fade.closed_form import (
    FIRST_WEIGHT,
    NormalEquations,
    balanced,
    normal_equations,
    residual,
    select,
    solve,
    token_statistics,
)
from fade.concept import Concept, concept_from_words, digitcanvas_concept
from fade.config import Config
from fade.distillation import Losses
from fade.distillation import overwrite as run_overwrite
from fade.errors import FadeError
from fade.latents import Latents, prepare_latents, warn_of_retain_prompts
from fade.measure import Measurement, measured
from fade.modes import evaluation_mode, out_of_inference_mode, plain_mode
from fade.run_folder import ADAPTER_FILE, RunFolder, open_run_folder
from fade.saliency import Located, kept_units, locate, located_in, matrix_shape, unit_count
from fade_kernels import BitMask

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
        output: folder for `adapter.safetensors`, `run.json`, cached latents and checkpoints; None keeps nothing. A run
            in closed form has neither latents nor checkpoints: interrupted, it is done again.
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
        if (config.solves or config.saliency == "closed-form") and not text_path(backbone, layers):
            raise FadeError(
                "the closed form changes layers that read the prompt alone, and there is none among the targets; "
                "target the keys and values of cross-attention, e.g. to_k and to_v, or choose the method distillation "
                "and another saliency"
            )
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
                    pairs = list(zip(concept.forget_prompts, concept.surrogate_prompts, strict=True))
                    retain, latents = list(concept.retain_prompts), None
                    if config.needs_latents:
                        latents = prepare_latents(
                            backbone, concept, config.data, config.seed, next(iter(digests.values())),
                            folder and folder.latents_file, progress,
                        )  # fmt: skip
                        pairs = list(zip(latents.forget_prompts, latents.surrogate_prompts, strict=True))
                        retain = list(latents.retain_prompts)
                    else:
                        warn_of_retain_prompts(concept, config.data)
                    embeddings = _encode(backbone, pairs, retain)
            except FadeError:
                # A wrong image folder is no run to go on with: the next try finds the output folder free.
                if folder is not None:
                    folder.abandon()
                raise
            # Without latents nothing is done that would be worth keeping: an interrupted run is done again.
            kept = folder if latents is not None else None
            if kept is not None:
                kept.begin_with(latents, embeddings, backbone)
            with backbone.only_denoiser_on_device():
                with stage("locate"):
                    equations = None
                    if config.solves or config.saliency == "closed-form":
                        equations = _equations(backbone, layers, pairs, retain, embeddings, config)
                    located = None if kept is None else kept.located_before(layers)
                    if located is None:
                        located = _locate(backbone, layers, latents, embeddings, config, equations, progress)
                        if kept is not None:
                            kept.keep_located(located)
                solved, left = None, None
                if config.solves:
                    with stage("overwrite"):
                        if config.closed_form.retain_weight is None:
                            equations = balanced(equations, located.masks, config.closed_form.retain_change)
                        solved = solve(equations, located.masks)
                        left = {
                            "retain_weight": equations.retain,
                            **vars(residual(equations, located.masks, solved)),
                        }
                equations = None  # as large as the layers; training has no use for it
                scale = 1.0 if config.in_values else config.overwrite.alpha / config.overwrite.rank
                adapter = attach(
                    pipeline, name, located.masks, rank=config.overwrite.rank,
                    alpha=scale if config.in_values else config.overwrite.alpha, values=config.in_values,
                    metadata=new_metadata(concept, config, base_name(pipeline), digests, scale), seed=config.seed,
                    solved=solved,
                )  # fmt: skip
                adapter.enable()
                losses = Losses()
                if config.trains:
                    with stage("overwrite"):
                        losses = run_overwrite(
                            backbone, adapter, latents, embeddings, config.overwrite, config.seed,
                            folder and folder.checkpoint(located), progress,
                        )  # fmt: skip
            adapter.metadata["run"] = {
                "path": edit_path(located.masks, text_path(backbone, layers)),
                "saliency": config.saliency,
                **_run_record(costs, losses, located, left),
                **(losses.record(config.overwrite) if config.trains else {}),
            }
            if folder is not None:
                folder.finish(adapter)
        return adapter.enable()
    except BaseException as error:
        if adapter is not None:
            adapter.remove()
        elif folder is not None and isinstance(error, FadeError) and not config.needs_latents:
            folder.abandon()  # bad input to the closed form: there is nothing to go on with either
        raise


def text_path(backbone: Backbone, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of the layers that read the prompt alone."""
    readers = backbone.text_layers()
    return {name: layer for name, layer in layers.items() if name in readers}


def edit_path(masks: Mapping[str, BitMask], readers: Collection[str]) -> str:
    """Where an edit sits: in the `text path` (it changes what the prompt means to the denoiser, and not what the
    denoiser can draw), in the `denoiser` behind it, or in `both`."""
    places = {name in readers for name, mask in masks.items() if mask.count}
    return "both" if len(places) == 2 else "text path" if places == {True} else "denoiser"


def _equations(
    backbone: Backbone,
    layers: Mapping[str, nn.Module],
    pairs: Sequence[tuple[str, str]],
    retain: Sequence[str],
    embeddings: Mapping[str, Tensor],
    config: Config,
) -> NormalEquations:
    """Of the layers that read the prompt alone, from each different pair and retain prompt once."""
    tokens = token_statistics(backbone, list(dict.fromkeys(pairs)), list(dict.fromkeys(retain)), embeddings)
    weight = FIRST_WEIGHT if config.closed_form.retain_weight is None else config.closed_form.retain_weight
    return normal_equations(text_path(backbone, layers), tokens, weight, config.closed_form.damping)


def _locate(
    backbone: Backbone,
    layers: Mapping[str, nn.Module],
    latents: Latents | None,
    embeddings: Mapping[str, Tensor],
    config: Config,
    equations: NormalEquations | None,
    progress: bool,
) -> Located:
    """Masks by the saliency that the settings name; where there are `equations`, in their layers alone."""
    within = None if equations is None else equations.rows.keys()
    locating = dataclasses.replace(config.locate, saliency=config.saliency)
    if config.saliency != "closed-form" or locating.granularity == "none":
        return locate(backbone, layers, latents, embeddings, locating, config.seed, progress, within)
    most = sum(unit_count(matrix_shape(layers[name]), locating.granularity, locating.tile) for name in within)
    units = min(kept_units(layers, locating), most)
    chosen = select(equations, units, locating.granularity, locating.tile, progress)
    return located_in(layers, chosen.masks, chosen.spread, chosen.threshold)


def _run_record(
    costs: dict[str, Measurement], losses: Losses, located: Located, left: dict[str, float] | None
) -> dict[str, Any]:
    solved = {} if left is None else {"residual": {name: float(f"{share:.5g}") for name, share in left.items()}}
    return {
        **solved,
        "seconds": {part: cost.seconds for part, cost in costs.items()},
        "peak_memory_bytes": {part: costs[part].peak_memory_bytes for part in ("locate", "overwrite")},
        "losses": {"forget": losses.forget, "retain": losses.retain},
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


def _encode(backbone: Backbone, pairs: Sequence[tuple[str, str]], retain: Sequence[str]) -> dict[str, Tensor]:
    """Every prompt of the run, encoded once. Raises FadeError where a concept does not reach the text encoder."""
    prompts = sorted({*(prompt for pair in pairs for prompt in pair), *retain})
    embeddings = dict(zip(prompts, backbone.encode_prompts(prompts), strict=True))
    for forget, surrogate in set(pairs):
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
