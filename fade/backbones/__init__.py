"""One file per model family: how to encode a prompt, noise a latent and call the denoiser. A new family is a new file
and one line here.

An adapter needs the denoiser alone (`denoiser_of`); unlearning and drawing need a backbone (`backbone_for`)."""

from typing import Any

from torch import nn

from fade.backbones.parts import unwrapped
from fade.backbones.stable_diffusion import StableDiffusionBackbone
from fade.errors import FadeError

Backbone = StableDiffusionBackbone
BACKBONES: dict[str, type[Backbone]] = {"StableDiffusionPipeline": StableDiffusionBackbone}
COMPONENTS = ("unet", "transformer")
"""Where pipelines keep the denoiser."""


def backbone_for(pipeline: Any) -> Backbone:
    """The backbone for the pipeline's class, a base class of it, or the parts that it is made of.

    Raises FadeError naming the supported pipelines, or saying why a prompt alone cannot drive this one's denoiser.
    """
    for cls in type(pipeline).__mro__:
        if cls.__name__ in BACKBONES:
            return BACKBONES[cls.__name__](pipeline)
    for backbone in BACKBONES.values():
        if (whole := backbone.text_to_image(pipeline)) is not None:
            return backbone(whole)
    raise FadeError(
        f"{type(pipeline).__name__} is not supported; supported pipelines: {', '.join(BACKBONES)} "
        "(Stable Diffusion 1.x and 2.x) and those made of the same parts"
    )


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
