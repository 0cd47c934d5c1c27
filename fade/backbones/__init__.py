"""Model families: how to encode a prompt, noise a latent and ask the denoiser. Nothing outside knows one.

An adapter needs the denoiser alone (`denoiser_of`); unlearning and drawing need a backbone (`backbone_for`)."""

import copy
from typing import Any

from torch import nn

from fade.backbones.base import Backbone
from fade.backbones.ddpm import DdpmBackbone
from fade.backbones.families import FAMILIES, Family
from fade.backbones.flow import FlowBackbone
from fade.backbones.parts import unwrapped
from fade.errors import FadeError

KINDS: dict[str, type[Backbone]] = {"ddpm": DdpmBackbone, "flow": FlowBackbone}
COMPONENTS = ("unet", "transformer")
"""Where pipelines keep the denoiser."""

__all__ = ["FAMILIES", "Backbone", "backbone_for", "denoiser_of", "family_of", "supported_families"]


def backbone_for(pipeline: Any) -> Backbone:
    """The backbone for the pipeline's class, a base class of it, or the parts that it is made of.

    Raises FadeError naming the supported families, or saying why a prompt alone cannot drive this one's denoiser.
    """
    for family in FAMILIES:
        if family.draws(type(pipeline)):
            return KINDS[family.kind](pipeline, family)
    if (family := family_of(pipeline)) is not None:
        for cls in type(pipeline).__mro__:
            if (reason := family.foreign.get(cls.__name__)) is not None:
                raise FadeError(f"{type(pipeline).__name__} {reason}")
        return KINDS[family.kind](_text_to_image(pipeline, family), family)
    raise FadeError(
        f"{type(pipeline).__name__} is not supported; supported are pipelines made of the parts of "
        f"{supported_families()}"
    )


def supported_families() -> str:
    """Their names, for a message."""
    return ", ".join(family.name for family in FAMILIES)


def family_of(pipeline: Any) -> Family | None:
    """The family whose parts a pipeline has, whatever it draws from; None where there is none."""
    classes = {
        name: type(unwrapped(part) if isinstance(part, nn.Module) else part).__name__
        for name, part in getattr(pipeline, "components", {}).items()
    }
    return next((family for family in FAMILIES if family.has_parts(classes)), None)


def _text_to_image(pipeline: Any, family: Family) -> Any:
    """A pipeline of the family that draws from a prompt alone, made of another's parts.

    Its constructor rewrites the config of a scheduler that it finds outdated, so it is shown a copy.
    """
    import diffusers

    found = getattr(pipeline, "components", {})
    parts = {name: found[name] for name in family.parts}
    given = {**parts, "scheduler": copy.deepcopy(parts["scheduler"])}
    whole = getattr(diffusers, family.pipeline)(
        **given, **family.make, **{name: pipeline.config[name] for name in family.kept if name in pipeline.config}
    )
    whole.scheduler = parts["scheduler"]
    return whole


def denoiser_of(pipeline: Any) -> tuple[str, nn.Module]:
    """Name and module of the pipeline's denoiser, out of what torch.compile or data parallelism wraps around it.

    A module is its own denoiser. Raises FadeError where the pipeline has none.
    """
    if isinstance(pipeline, nn.Module):
        module = unwrapped(pipeline)
        return ("transformer" if "Transformer" in type(module).__name__ else "unet"), module
    for name in COMPONENTS:
        if isinstance(module := getattr(pipeline, name, None), nn.Module):
            return name, unwrapped(module)
    raise FadeError(f"{type(pipeline).__name__} has no denoiser: neither {' nor '.join(COMPONENTS)} is a module")
