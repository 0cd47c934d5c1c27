"""One file per model family: how to encode a prompt, noise a latent and call the denoiser. A new family is a new file
and one line here."""

from typing import Any

from fade.backbones.stable_diffusion import StableDiffusionBackbone
from fade.errors import FadeError

Backbone = StableDiffusionBackbone
BACKBONES: dict[str, type[Backbone]] = {"StableDiffusionPipeline": StableDiffusionBackbone}


def backbone_for(pipeline: Any) -> Backbone:
    """The backbone for the pipeline's class or a base class of it. Raises FadeError naming those supported."""
    for cls in type(pipeline).__mro__:
        if cls.__name__ in BACKBONES:
            return BACKBONES[cls.__name__](pipeline)
    raise FadeError(
        f"{type(pipeline).__name__} is not supported; supported pipelines: {', '.join(BACKBONES)} "
        "(Stable Diffusion 1.x and 2.x)"
    )
