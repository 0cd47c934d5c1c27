"""What a method is made of. Apart from the methods, and without torch, because settings ask before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fade.adapter import Adapter
    from fade.backbones import Backbone
    from fade.concept import Concept
    from fade.conditioning import EncodedPrompts
    from fade.config import Config
    from fade.latents import Latents
    from fade.objective import Objective
    from fade.regions import Region
    from fade.saliency import Located


AS_THE_MODEL_DRAWS = {"data__guidance_scale": 1.0, "data__sampling_steps": 10, "data__retain_samples": 192}
"""Of methods that denoise retained pictures to their own noise, as their authors do real ones. What is sampled must be
like what the model was trained on: with the default's latents, few, drawn in 5 steps and sharpened by guidance, SalUn's
CRA was 82.5 for DigitCanvas's "three", with these 100. And each must show its prompt (`Method.denoises`): on
EmojiCanvas, which has 630 retain prompts, 192 latents that neighbours shared left SalUn and ReTrack a CRA of 72.5 and
67.9 in the median over six objects, one for each prompt 98.3."""


@dataclass(frozen=True)
class NoOptions:
    """Of a method that has no settings of its own."""


@dataclass(frozen=True)
class Method:
    """How a concept is forgotten.

    Attributes:
        name: as people ask for it; the key in `METHODS`.
        summary: one sentence, for the list.
        source: the paper, with its number, or "ours".
        settings: what it changes in the default settings, keys as for `Config.replace`; whoever uses the method may
            change them again.
        options: a frozen dataclass of settings that only this method has, with defaults; its `__post_init__` raises
            FadeError for values out of range.
        trains: whether an adapter is trained, on the `objective`.
        solves: whether the project's closed form is solved, before the training if there is one.
        objective: what the adapter is trained on; None is FADE's self-distillation.
        edit: computes the adapter without training it; then neither `trains` nor `solves`.
        start: computes the factors that the training begins with, float32 (A [r, K], B [N, r]) on the CPU for every
            layer, all of the settings' rank times `ranks`; None begins at no change.
        accumulators: numbers that `edit` or `start` sums up for every weight (`fade.importance`), for planning.
        reads_latents: of an edit, whether it looks at forget and retain latents.
        denoises: the parts of the latents, `forget` and `retain`, that it learns to denoise to their own noise, or
            measures weights by: each must show the prompt that it goes with (`Config.denoises`).
        holds_surrogate: whether the surrogate's prompts are retain prompts, too, of a method that would drift with
            them.
        targets: the layers that are edited, as patterns; None is the family's own choice.
        unread: which settings its own code passes over, though other methods with such parts read them: dotted names,
            each with the reason, in words that follow "would be ignored:" (`fade.unread` has what follows from parts).
        check: raises FadeError, saying why, for a pipeline or settings with which the method cannot work. Called before
            anything is drawn.
        finish: changes the trained adapter before it is recorded and saved.
    """

    name: str
    summary: str
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: type[Any] = NoOptions
    trains: bool = True
    solves: bool = False
    objective: type[Objective] | None = None
    edit: Callable[[Editing], Edit] | None = None
    start: Callable[[Editing], Mapping[str, tuple[Tensor, Tensor]]] | None = None
    ranks: int = 1
    accumulators: int = 0
    reads_latents: bool = True
    denoises: tuple[str, ...] = ()
    holds_surrogate: bool = False
    targets: Callable[[Backbone], tuple[str, ...]] | None = None
    unread: Callable[[Config], Mapping[str, str]] | None = None
    check: Callable[[Backbone, Config], None] | None = None
    finish: Callable[[Adapter, Any], None] | None = None


@dataclass(frozen=True)
class Editing:
    """What an `edit` or a `start` computes from. The weights are frozen, and the denoiser's adapters off.

    Attributes:
        layers: the layers to edit by name, nn.Linear or nn.Conv2d; regions: of some, the part that may change.
        latents: None where the method reads none.
        prompts: every prompt of the concept and of the latents, encoded; `backbone.negative()` is the empty one.
        options: the method's own settings.
    """

    backbone: Backbone
    layers: Mapping[str, nn.Module]
    regions: Mapping[str, Region]
    concept: Concept
    latents: Latents | None
    prompts: EncodedPrompts
    config: Config
    options: Any
    progress: bool = False


@dataclass(frozen=True)
class Edit:
    """What an `edit` computed: a change of every layer, as values or as factors.

    Attributes:
        located: a mask for every layer (`fade.saliency.located_in` makes it).
        values: for every layer, what is added to its weight at the mask's entries, row by row: float32 [entries].
        factors: for every layer with a mask that is not empty, A [r, K] and B [N, r], float32 on the CPU, of one r, of
            whose product the mask's entries are added.
    """

    located: Located
    values: Mapping[str, Tensor] | None = None
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None
