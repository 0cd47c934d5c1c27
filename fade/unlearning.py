"""The walk of one unlearning run: prompts, latents, locate, solve, attach, train, save. Each part lives in its own
file; here they only follow one another, and a later part never reaches into an earlier one."""

import contextlib
import dataclasses
import json
import math
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fade import processes
from fade.adapter import Adapter, adapters_off, attach, check_carriers, check_name, load_adapter, new_metadata
from fade.backbones import Backbone, backbone_for
from fade.base_model import (
    base_layers,
    base_name,
    bring_to_its_device,
    fingerprint,
    maskable_layers,
    outline,
    refuse_merged,
    refuse_offloaded,
    target_layers,
    target_regions,
)
from fade.bundled import BundledModel, recognised
from fade.closed_form import (
    FIRST_WEIGHT,
    NormalEquations,
    TextPairs,
    TextPrompts,
    TokenStatistics,
    normal_equations,
    protected_directions,
    refitted,
    residual,
    select,
    shares,
    solution,
    token_statistics,
    working_bytes,
)
from fade.concept import Concept, Pair, holding_surrogates, mentions, together
from fade.concept import beside as concept_beside
from fade.conditioning import EncodedPrompts
from fade.config import TARGET_KINDS, ClosedFormConfig, Config, TargetKind
from fade.distillation import Trained
from fade.distillation import overwrite as run_overwrite
from fade.errors import FadeError
from fade.latents import Latents, prepare_latents, warn_of_retain_prompts
from fade.measure import Measurement, free_memory, measured
from fade.methods import Editing
from fade.modes import evaluation_mode, out_of_inference_mode, plain_mode
from fade.objective import Objective
from fade.quantised import refuse_untrainable
from fade.regions import Region, cut, matrix_shape, target_shapes
from fade.request import check_arguments, concepts_of, requested_concepts, settings_for, slugs, with_method
from fade.run_folder import ADAPTER_FILE, REQUEST_FILE, RunFolder, located_parts, located_whole, open_run_folder
from fade.saliency import Located, kept_units, locate, located_in, plan_of, unit_count
from fade_kernels import BitMask

__all__ = ["ADAPTER_FILE", "unlearn", "unlearn_each"]

ROOM = 0.8
"""Part of the free memory that solving may take with everything else left where it is."""
REFIT_WEIGHT = 0.5
"""Of λ of the first solution, for refitting. Of 12 DigitCanvas concepts, forgotten one after another, all stay
forgotten (UA 100) at 0.25, 0.5 and 1, and "three" is drawn in all pictures when it is taken out of the sum, at a drift
of 0.037, 0.030 and 0.024 then; at 2 one is at UA 62.5, at 4 at 0."""


@plain_mode()
@processes.together()
def unlearn(
    pipeline: Any,
    forget: str | Mapping[str, str] | None = None,
    surrogate: str | None = None,
    *,
    concept: Concept | Sequence[Concept] | None = None,
    templates: Sequence[str] | None = None,
    retain: Sequence[str] | None = None,
    beside: Sequence[str | Path | Adapter] = (),
    method: str | None = None,
    config: Config | None = None,
    output: str | Path | None = None,
    name: str = "fade",
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> Adapter:
    """Makes a pipeline answer `forget` as it answers `surrogate`, and everything else as before.

    Args:
        pipeline: a diffusers pipeline of a supported family (`fade.backbones.FAMILIES`) that draws from a prompt alone,
            or one made of its parts. Its own weights are never changed.
        forget, surrogate: the concept and what takes its place, put into `templates` (one `{}` each). On a bundled
            model, two words of one domain. Several concepts at once: `forget={"three": "eight", "seven": "one"}`
            without `surrogate`; one adapter forgets all of them (`unlearn_each` makes one for each).
        concept: the prompts themselves, instead of words and templates; or a list of such, for several concepts.
        retain: prompts of what must stay; neutral ones by default. Of several concepts, those that name one are left
            out.
        beside: adapters, or their files, that the new one is to act beside. What they forget is left to them, so that
            the changes of all add up and each can be taken off alone.
        method: how, by name (`fade methods` lists them); its defaults take the place of the settings' that `config`
            leaves at theirs. None is the one that `config` names, by default `both`.
        config: every other setting (`fade.Config`); where neither words nor prompts are given, also the concepts.
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

    Called with the same arguments in each of several processes (that torchrun or accelerate launch started, or whose
    process group there is), it is one run: they share the work, the first writes the files, all get the adapter.

    Raises FadeError for bad input, DivergedError where the loss is not finite.
    """
    check_arguments(output, name, overwrite, resume)
    config = with_method(config, method, resume)
    backbone = backbone_for(pipeline)
    backbone.check_trainable()
    concepts = requested_concepts(pipeline, forget, surrogate, concept, templates, retain, config)
    concept = together(concepts, config.data.plurals)
    config = config.replace(concepts=())  # the record names them as the concept
    others = concepts_of(backbone, beside)
    concept = _retaining(concept, others, config)
    config = with_targets(backbone, settings_for(config, len(concept.pairs), bool(others)))
    return _unlearn(backbone, concept, config, output, name, overwrite, resume, progress)


def _unlearn(
    backbone: Backbone,
    concept: Concept,
    config: Config,
    output: str | Path | None,
    name: str,
    overwrite: bool,
    resume: bool,
    progress: bool,
) -> Adapter:
    """One adapter for a request whose settings and retain prompts are the final ones."""
    pipeline, progress = backbone.pipeline, progress and processes.first()
    with _alone(backbone.denoiser), contextlib.ExitStack() as resources:
        for module in _modules(pipeline):
            out_of_inference_mode(module)
        layers = target_layers(backbone.denoiser, config.locate.targets)
        regions = target_regions(backbone.denoiser, config.locate.targets)
        check_carriers(backbone.denoiser, base_layers(backbone.denoiser), layers)
        if config.gradient_checkpointing:
            backbone.check_checkpointing()
        if config.method.check is not None:
            config.method.check(backbone, config)
        if config.uses_closed_form and not text_path(backbone, layers):
            raise FadeError(
                "the closed form changes layers that read the prompt alone, and there is none among the targets; "
                "target the keys and values of cross-attention, e.g. to_k and to_v, or choose the method distillation "
                "and another saliency"
            )
        if config.method.edit is None and config.locate.granularity != "none":
            kept_units(layers, config.locate, regions)  # that there are any, before anything is drawn
        check_name(backbone.denoiser, name)
        refuse_merged(backbone.denoiser)
        refuse_offloaded(backbone.denoiser)
        if config.needs_latents:
            refuse_untrainable(target_layers(backbone.denoiser), backbone.dtype, backbone.device)
        if processes.world() > 1 and len({weight.device for weight in backbone.denoiser.parameters()}) > 1:
            raise FadeError(
                "each of several processes needs the denoiser on one device, and this one is spread over several "
                "(device_map): load it without, or start a single process"
            )
        digests = fingerprint(backbone.denoiser)
        folder = None
        phrased = [[pair.phrasings, pair.neighbours] for pair in concept.pairs]
        request = {
            "concept": {**concept.to_dict(), "phrasings": phrased},
            "config": _deciding(config.to_dict()),
            "fingerprint": digests,
        }
        processes.check_alike(json.dumps([request, config.to_dict(), backbone.device.type]), backbone.device)
        if config.locate.memory_budget is not None:  # that it holds the accumulators, before anything is drawn
            read = text_path(backbone, layers) if config.uses_closed_form else None
            plan_of(layers, dataclasses.replace(config.locate, saliency=config.saliency), read, regions)
        if output is not None and processes.first():
            # Absolute, because a program may change its working directory while this runs.
            path = Path(output).absolute()
            folder = resources.enter_context(open_run_folder(path, request, backbone, overwrite, resume))
        for module in _modules(pipeline):
            resources.enter_context(evaluation_mode(module))
        if config.gradient_checkpointing:
            resources.enter_context(backbone.gradient_checkpointing())
        return _run(backbone, concept, config, layers, regions, digests, folder, name, progress)


@plain_mode()
@processes.together()
def unlearn_each(
    pipeline: Any,
    forget: Mapping[str, str] | None = None,
    *,
    concept: Sequence[Concept] | None = None,
    templates: Sequence[str] | None = None,
    retain: Sequence[str] | None = None,
    beside: Sequence[str | Path | Adapter] = (),
    method: str | None = None,
    config: Config | None = None,
    output: str | Path | None = None,
    name: str = "fade",
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Adapter]:
    """An adapter for each of several concepts, made so that they add up and each can be taken off alone.

    Each is made as with `unlearn(…, beside=<all the others>)`: what the others forget, and what takes its place there,
    is among what it leaves as it is. Arguments as for `unlearn`; the adapters are called `NAME_CONCEPT` and written to
    `output`/CONCEPT (`slugs`). `resume` goes on where a run was interrupted: what was finished is loaded from its
    folder.

    Returns the adapters by concept, attached and enabled. Whatever is raised, the pipeline is as it was before.
    """
    check_arguments(output, name, overwrite, resume)
    config = with_method(config, method, resume)
    backbone = backbone_for(pipeline)
    backbone.check_trainable()
    concepts = requested_concepts(pipeline, forget, None, concept, templates, retain, config)
    config = config.replace(concepts=())
    together(concepts, config.data.plurals)  # what does not go together is told before anything begins
    taken = [pair for one in concepts for pair in one.pairs]
    names = slugs([one.forget for one in concepts])
    folders = dict.fromkeys(one.forget for one in concepts)
    if output is not None:
        folders = {one.forget: Path(output) / slug for one, slug in zip(concepts, names, strict=True)}
    if not overwrite and not resume and processes.first():
        for folder in folders.values():
            if folder is not None and folder.is_dir() and any(folder.iterdir()):
                raise FadeError(f"the output folder {folder} is in use; pass --overwrite to replace it")
    others = concepts_of(backbone, beside)
    made: dict[str, Adapter] = {}
    try:
        for one, slug in zip(concepts, names, strict=True):
            theirs = [pair for pair in taken if pair not in one.pairs] + others
            request = _retaining(one, theirs, config)
            folder = folders[one.forget]
            _, there = processes.from_first(
                {}, [folder is not None and (folder / file).is_file() for file in (REQUEST_FILE, ADAPTER_FILE)]
            )
            going_on = resume and there[0]
            settings = with_targets(backbone, settings_for(config, len(one.pairs), bool(theirs)))
            own = f"{name}_{slug}"
            if resume and not going_on and there[1]:
                made[one.forget] = _finished(backbone, folder, request, settings, own)
            else:
                made[one.forget] = _unlearn(backbone, request, settings, folder, own, overwrite, going_on, progress)
    except BaseException:
        for adapter in made.values():
            adapter.remove()
        raise
    return made


def _retaining(concept: Concept, others: Sequence[Pair], config: Config) -> Concept:
    """The request with all that must stay: beside the adapters that forget `others`, as its method trains."""
    concept = concept_beside(concept, others, config.data.plurals)
    return holding_surrogates(concept, config.data.plurals) if config.method.holds_surrogate else concept


def _finished(backbone: Backbone, folder: Path, concept: Concept, config: Config, name: str) -> Adapter:
    """The adapter that an earlier run left in its folder. Raises FadeError where it was asked for something else."""
    adapter = load_adapter(backbone.pipeline, folder / ADAPTER_FILE, name)
    asked = json.loads(json.dumps({"concept": concept.to_dict(), "config": _deciding(config.to_dict())}))
    found = {"concept": adapter.metadata.get("concept"), "config": _deciding(adapter.metadata.get("config"))}
    other = [part for part, value in asked.items() if found[part] != value]
    if other:
        adapter.remove()
        raise FadeError(
            f"the finished run in {folder} has another {other[0]}; resume with the same settings, or start again with "
            "--overwrite"
        )
    return adapter


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what the result does not depend on, so that a run may be resumed on another machine."""
    return {**settings, "locate": {k: v for k, v in settings["locate"].items() if k != "memory_budget"}}


def _run(
    backbone: Backbone,
    concept: Concept,
    config: Config,
    layers: dict[str, nn.Module],
    regions: dict[str, Region],
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
                        if config.data.forget_images is None and not (folder and folder.resumed):
                            # Before anything is drawn for prompts that say nothing.
                            _refuse_unread(_encoded(backbone, pairs), pairs)
                        latents = prepare_latents(
                            backbone, concept, config.data, config.seed, next(iter(digests.values())),
                            folder and folder.latents_file, progress, config.denoises,
                        )  # fmt: skip
                        pairs = list(zip(latents.forget_prompts, latents.surrogate_prompts, strict=True))
                        retain = list(latents.retain_prompts)
                    else:
                        warn_of_retain_prompts(concept, config.data)
                    text = _text_prompts(concept, pairs, retain, config, recognised(pipeline))
                    prompts = _encode(backbone, pairs, [*retain, *text.all()], folder if latents is not None else None)
            except FadeError as error:
                # A wrong image folder is no run to go on with: the next try finds the output folder free.
                if folder is not None and not isinstance(error, processes.OtherProcessError):
                    folder.abandon()
                raise
            # Without latents nothing is done that would be worth keeping: an interrupted run is done again.
            kept = folder if latents is not None else None
            if kept is not None:
                kept.begin_with(latents, prompts, backbone)
            with _others_waiting(backbone, layers, regions, config):
                bring_to_its_device(backbone.called_denoiser)
                if config.needs_latents:
                    refuse_untrainable(target_layers(denoiser), backbone.dtype, backbone.device)
                edits, edit, begun = {}, None, None
                editing = Editing(
                    backbone, layers, regions, concept, latents, prompts, config, config.method_options, progress
                )
                with stage("locate"):
                    if config.method.edit is not None:
                        edit = config.method.edit(editing)
                    elif config.uses_closed_form:
                        edits = _text_edits(backbone, layers, regions, text, prompts, config)
                    before = None if kept is None or edit is not None else kept.located_before(layers)
                    located = _of_first(before if edit is None else edit.located)
                    if located is None:
                        located = _of_first(
                            _locate(backbone, layers, regions, latents, prompts, config, edits, progress)
                        )
                        if kept is not None:
                            kept.keep_located(located)
                    if config.method.start is not None:
                        _, begun = _change_of_first(None, config.method.start(editing))
                solved, left = None, None
                if edit is not None:
                    with stage("overwrite"):
                        solved, begun = _change_of_first(edit.values, edit.factors)
                if config.solves:
                    with stage("overwrite"):
                        solved, left = processes.from_first(
                            *(_solve(edits, located.masks, config.closed_form) if processes.first() else ({}, None))
                        )
                edits = {}  # as large as the layers; training has no use for them
                in_values, times = config.in_values and begun is None, config.method.ranks
                rank, alpha = config.overwrite.rank * times, config.overwrite.alpha * times
                if edit is not None and begun is not None:  # at strength 1, whatever rank the settings have
                    rank = alpha = len(next(iter(begun.values()))[0])
                scale = 1.0 if in_values else alpha / rank
                adapter = attach(
                    pipeline, name, located.masks, rank=rank, alpha=scale if in_values else alpha,
                    values=in_values,
                    metadata=new_metadata(
                        concept, config, base_name(pipeline), {**digests, **outline(denoiser)}, scale,
                        backbone.family.component,
                    ), seed=config.seed,
                    solved=solved, factors=begun,
                )  # fmt: skip
                adapter.enable()
                trained: Trained | None = None
                if config.trains:
                    with stage("overwrite"):
                        trained = run_overwrite(
                            backbone, adapter, latents, prompts, config.overwrite, config.seed,
                            folder and folder.checkpoint(located), progress,
                            config.method.objective or Objective, config.method_options,
                        )  # fmt: skip
                        if config.method.finish is not None:
                            config.method.finish(adapter, config.method_options)
                        if config.closed_form.refit:
                            _refit(
                                adapter,
                                located.masks,
                                left,
                                _text_edits(backbone, layers, regions, text, prompts, config),
                            )
            adapter.metadata["run"] = {
                "method": config.overwrite.method,
                "path": edit_path(located.masks, text_path(backbone, layers)),
                "saliency": config.saliency,
                **_run_record(costs, located, left),
                **(trained.record(config.overwrite) if trained else {}),
            }
            if folder is not None:
                folder.finish(adapter)
            processes.wait_for_all()  # so that nobody keeps an adapter that the first could not write
        return adapter.enable()
    except BaseException as error:
        if adapter is not None:
            adapter.remove()
        elif folder is not None and isinstance(error, FadeError) and not config.needs_latents:
            folder.abandon()  # bad input to the closed form: there is nothing to go on with either
        raise


def _of_first(located: Located | None) -> Located | None:
    """What the first process located, on all: where devices differ, so may the last bits of a saliency, and by them
    which of two weights is in."""
    if processes.world() == 1:
        return located
    words, record = processes.from_first(*(({}, None) if located is None else located_parts(located)))
    return None if record is None else located_whole(words, record)


def _change_of_first(
    values: Mapping[str, Tensor] | None, factors: Mapping[str, tuple[Tensor, Tensor]] | None
) -> tuple[dict[str, Tensor] | None, dict[str, tuple[Tensor, Tensor]] | None]:
    """What the first process computed, on all, for the reason that `_of_first` gives: values by layer, or else
    factors."""
    own, in_values = values, values is not None
    if not in_values:
        own = {f"{part}.{name}": pair[i] for name, pair in factors.items() for i, part in enumerate("ab")}
    parts, in_values = processes.from_first(own, in_values)
    if in_values:
        return dict(parts), None
    return None, {key[2:]: (factor, parts[f"b.{key[2:]}"]) for key, factor in parts.items() if key.startswith("a.")}


def with_targets(backbone: Backbone, config: Config) -> Config:
    """Settings that name the layers to edit: the family's, and, where something is solved, the layers that read the
    prompt alone; or those that the settings name, kinds of layers (`TARGET_KINDS`) as the layers of that kind."""
    if config.locate.targets is not None:
        asked = config.locate.targets
        named = tuple(name for one in asked for name in (_of_kind(backbone, one) if one in TARGET_KINDS else (one,)))
        return config.replace(locate__targets=tuple(dict.fromkeys(named)))
    if config.method.targets is not None:
        return config.replace(locate__targets=config.method.targets(backbone))
    targets = list(backbone.targets)
    if config.uses_closed_form:
        named = target_layers(backbone.denoiser, backbone.targets)
        targets += sorted(frozenset().union(*backbone.text_layers().values()) - named.keys())
    return config.replace(locate__targets=tuple(targets))


def _of_kind(backbone: Backbone, kind: TargetKind) -> tuple[str, ...]:
    """Patterns of the layers of a kind that can carry masks. Raises FadeError where the denoiser has none of it."""
    patterns = {"all": ("*",), "attention": backbone.targets}.get(kind)
    found = maskable_layers(backbone.denoiser, patterns)
    if kind == "convolutions":
        found = {name: layer for name, layer in found.items() if isinstance(layer, nn.Conv2d)}
    elif kind == "beyond-attention":
        attention = target_layers(backbone.denoiser, backbone.targets)
        found = {name: layer for name, layer in found.items() if name not in attention}
    if not found:
        raise FadeError(f"the targets name {kind}, and {backbone.family.name} has none; name others, or all")
    if patterns is not None and len(found) == len(target_layers(backbone.denoiser, patterns)):
        return patterns
    return tuple(found)


def text_path(backbone: Backbone, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of the layers that read the prompt alone."""
    readers = frozenset().union(*backbone.text_layers().values())
    return {name: layer for name, layer in layers.items() if name in readers}


def solving_bytes(
    backbone: Backbone, layers: Mapping[str, nn.Module], regions: Mapping[str, Region]
) -> tuple[int, int, int]:
    """`fade.closed_form.working_bytes` of the layers that read the prompt alone."""
    areas = {name: math.prod(shape) for name, shape in target_shapes(layers, regions).items()}
    entries: dict[tuple[str, int], int] = {}
    for reader, names in backbone.text_layers().items():
        for name in names & layers.keys():
            columns = matrix_shape(layers[name])[1]
            entries[reader, columns] = entries.get((reader, columns), 0) + areas[name]
    return working_bytes([(count, columns) for (_, columns), count in entries.items()])


def _others_waiting(
    backbone: Backbone, layers: Mapping[str, nn.Module], regions: Mapping[str, Region], config: Config
) -> contextlib.AbstractContextManager[None]:
    """The denoiser alone on the device; all parts where they are, where nothing is trained and there is room: to move
    them there and back takes longer than a closed form."""
    if not config.needs_latents:
        held, choosing, solving = solving_bytes(backbone, layers, regions) if config.uses_closed_form else (0, 0, 0)
        if held + max(choosing, solving) < ROOM * free_memory(backbone.device):
            return contextlib.nullcontext()
    return backbone.only_denoiser_on_device()


def edit_path(masks: Mapping[str, BitMask], readers: Collection[str]) -> str:
    """Where an edit sits: in the `text path` (it changes what the prompt means to the denoiser, and not what the
    denoiser can draw), in the `denoiser` behind it, or in `both`."""
    places = {name in readers for name, mask in masks.items() if mask.count}
    return "both" if len(places) == 2 else "text path" if places == {True} else "denoiser"


def _text_prompts(
    concept: Concept,
    pairs: Sequence[tuple[str, str]],
    retain: Sequence[str],
    config: Config,
    bundled: BundledModel | None,
) -> TextPrompts:
    """What the closed form reads: each different prompt once, whatever it was trained with how often."""
    if not config.uses_closed_form:
        return TextPrompts((), ())
    settings, plurals = config.closed_form, config.data.plurals
    pairs, phrased, kept = tuple(dict.fromkeys(pairs)), {}, ()
    if settings.phrasings:
        phrased = {one: tuple(dict.fromkeys(concept.phrased(one, plurals))) for one in concept.pairs}
        kept = concept.phrased_neighbours(plurals)
    each = [
        TextPairs(own, phrased.get(one, ()))
        for one in concept.pairs
        if (own := tuple(pair for pair in pairs if _is_of(pair, one, concept, plurals)))
    ]
    protect = (text if bundled is None else bundled.alone(text) for text in settings.protect)
    return TextPrompts(each, tuple(dict.fromkeys(retain)), kept, tuple(protect))


@dataclass(frozen=True)
class _TextEdit:
    """What is solved for the layers that read the same of a prompt, and of it the same entries."""

    layers: dict[str, nn.Module]
    regions: dict[str, Region]
    tokens: TokenStatistics
    equations: NormalEquations


def _text_edits(
    backbone: Backbone,
    layers: Mapping[str, nn.Module],
    regions: Mapping[str, Region],
    text: TextPrompts,
    prompts: EncodedPrompts,
    config: Config,
) -> dict[tuple[str, range], _TextEdit]:
    """By reader and the columns that may change, of those of the layers that read the prompt alone. A reader that
    cannot tell concept and surrogate apart is left out; raises FadeError where none can."""
    settings, edits, told = config.closed_form, {}, None
    weight = FIRST_WEIGHT if settings.retain_weight is None else settings.retain_weight
    for reader, names in backbone.text_layers().items():
        read = {name: layer for name, layer in layers.items() if name in names}
        if not read:
            continue
        try:
            tokens = token_statistics(backbone, reader, text, prompts)
        except FadeError as error:
            told = told or error
            continue
        protected = None
        if text.protect:
            rows = prompts.conditioning.rows(prompts.rows(text.protect))
            protected = protected_directions(backbone, reader, rows, tokens)
        of_columns: dict[range, dict[str, nn.Module]] = {}
        for name, layer in read.items():
            columns = regions[name].columns if name in regions else range(matrix_shape(layer)[1])
            of_columns.setdefault(columns, {})[name] = layer
        for columns, alike in of_columns.items():
            own = {name: regions[name] for name in alike if name in regions}
            held = None if protected is None else protected[columns.start : columns.stop]
            equations = normal_equations(alike, tokens, weight, settings.damping, held, own)
            edits[reader, columns] = _TextEdit(alike, own, tokens, equations)
    if not edits:
        raise told
    return edits


def _solve(
    edits: Mapping[tuple[str, range], _TextEdit], masks: Mapping[str, BitMask], settings: ClosedFormConfig
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The values of every layer with a mask, and λ and what is left undone of each of the edits that has one."""
    solved, left = {name: torch.zeros(0, device="cpu", dtype=torch.float32) for name in masks}, []
    for edit in edits.values():
        if not any(masks[name].count for name in edit.layers):
            continue
        own = cut({name: masks[name] for name in edit.layers}, edit.regions)
        equations, values = solution(
            edit.layers, edit.tokens, edit.equations, own, settings.change, settings.left, settings.hardening,
            edit.regions,
        )  # fmt: skip
        solved |= values
        left.append({"retain_weight": equations.retain, **vars(residual(equations, own, values))})
    return solved, left


def _refit(
    adapter: Adapter,
    masks: Mapping[str, BitMask],
    left: Sequence[Mapping[str, float]],
    edits: Mapping[tuple[str, range], _TextEdit],
) -> None:
    """The trained adapter's values solved for anew (`closed_form.refitted`)."""
    trained = {name: layer.packed_values(adapter.name) for name, layer in adapter.layers.items()}
    fitted: dict[str, Tensor] = {}
    if processes.first():
        solved = [edit for edit in edits.values() if any(masks[name].count for name in edit.layers)]
        for edit, record in zip(solved, left, strict=True):
            equations = edit.equations.weighed(REFIT_WEIGHT * record["retain_weight"])
            none = equations.rhs.new_zeros(0, dtype=torch.float32)
            own = {name: trained.get(name, none).to(none.device) for name in edit.layers}
            fitted |= refitted(equations, cut({name: masks[name] for name in edit.layers}, edit.regions), own)
    fitted, _ = processes.from_first(fitted, None)
    with torch.no_grad():
        for name, layer in adapter.layers.items():
            if name in fitted:
                (parameter,) = layer.adapter_parameters(adapter.name)
                parameter.copy_(fitted[name].view_as(parameter))


def _is_of(pair: tuple[str, str], one: Pair, concept: Concept, plurals: bool) -> bool:
    """Whether a prompt and its answer are those of one of the concepts."""
    named = pair[0] in one.forget_prompts or mentions(pair[0], one.forget, plurals, one.apart)
    return not concept.several or named


def _locate(
    backbone: Backbone,
    layers: Mapping[str, nn.Module],
    regions: Mapping[str, Region],
    latents: Latents | None,
    prompts: EncodedPrompts,
    config: Config,
    edits: Mapping[tuple[str, range], _TextEdit],
    progress: bool,
) -> Located:
    """Masks by the saliency that the settings name; where something is solved, in its layers alone."""
    within = {name for edit in edits.values() for name in edit.layers} or None
    locating = dataclasses.replace(config.locate, saliency=config.saliency)
    if config.saliency != "closed-form" or locating.granularity == "none":
        return locate(backbone, layers, latents, prompts, locating, config.seed, progress, within, regions)
    shapes = target_shapes({name: layers[name] for name in within}, regions)
    most = sum(unit_count(shape, locating.granularity, locating.tile) for shape in shapes.values())
    units = min(kept_units(layers, locating, regions), most)
    settings, masks, spread, thresholds = config.closed_form, {}, {}, []
    systems = {reader: edit.equations for reader, edit in edits.items()}
    given = shares(systems, units, locating.granularity, locating.tile)
    for reader, edit in edits.items():
        if not given[reader]:
            continue
        chosen = select(
            edit.equations, given[reader], locating.granularity, locating.tile, progress, settings.change,
            settings.left,
        )  # fmt: skip
        masks |= chosen.masks
        spread |= chosen.spread
        thresholds.append(chosen.threshold)
    return located_in(layers, masks, spread, min(thresholds), regions)


def _run_record(
    costs: dict[str, Measurement], located: Located, left: Sequence[Mapping[str, float]] | None
) -> dict[str, Any]:
    """`left`: of each of the edits (`_solve`); their mean is recorded."""
    solved = {}
    if left is not None:
        mean = {name: sum(one[name] for one in left) / len(left) for name in left[0]}
        solved = {"residual": {name: float(f"{share:.5g}") for name, share in mean.items()}}
    return {
        **solved,
        **({"processes": processes.world()} if processes.world() > 1 else {}),
        "seconds": {part: cost.seconds for part, cost in costs.items()},
        "peak_memory_bytes": {part: costs[part].peak_memory_bytes for part in ("locate", "overwrite")},
        "losses": {half: [] for half in Objective.losses},
        "saliency_plan": located.plan,
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


def _encode(
    backbone: Backbone, pairs: Sequence[tuple[str, str]], retain: Sequence[str], folder: RunFolder | None
) -> EncodedPrompts:
    """Every prompt of the run, encoded once, or as an interrupted run kept them. Raises FadeError where a concept does
    not reach the text encoder."""
    prompts = _names(pairs, retain)
    encoded = None if folder is None else folder.prompts_before(prompts, backbone)
    if encoded is None:
        encoded = _encoded(backbone, pairs, retain)
    _refuse_unread(encoded, pairs)
    return encoded


def _names(pairs: Sequence[tuple[str, str]], retain: Sequence[str]) -> list[str]:
    return sorted({*(prompt for pair in pairs for prompt in pair), *retain})


def _encoded(backbone: Backbone, pairs: Sequence[tuple[str, str]], retain: Sequence[str] = ()) -> EncodedPrompts:
    prompts = _names(pairs, retain)
    return EncodedPrompts(prompts, backbone.encode_prompts(prompts))


def _refuse_unread(encoded: EncodedPrompts, pairs: Sequence[tuple[str, str]]) -> None:
    """Raises FadeError where a concept does not reach the text encoder."""
    for forget, surrogate in set(pairs):
        if encoded[forget].equal(encoded[surrogate]):
            shown = forget if len(forget) <= 60 else f"{forget[:60]}…"
            raise FadeError(
                f"the text encoder reads the prompt {shown!r} and its surrogate as the same; if they are longer than "
                "the tokens it takes, shorten the template so that the concept is among them"
            )


@contextlib.contextmanager
def _frozen(denoiser: nn.Module) -> Iterator[None]:
    """The denoiser's weights needing no gradient, its adapters off; all as it was afterwards."""
    with adapters_off(denoiser):
        denoiser.requires_grad_(False)
        yield
