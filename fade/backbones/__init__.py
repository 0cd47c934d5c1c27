"""One file per model family: how to encode a prompt, noise a latent and call the denoiser. A new family is a new file
and one line here."""

from typing import Any

from torch import nn

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


def denoiser_of(pipeline: Any) -> tuple[str, nn.Module]:
    """The name and the module of a pipeline's denoiser, without what torch.compile or PEFT wrap around it; a module
    given itself is its own denoiser. Raises FadeError where there is none."""
    for component in ("unet", "transformer"):
        module = getattr(pipeline, component, None)
        if isinstance(module, nn.Module) and not isinstance(pipeline, nn.Module):
            break
    else:
        component, module = "denoiser", pipeline
    if not isinstance(module, nn.Module):
        raise FadeError(f"{type(pipeline).__name__} has no denoiser (a unet or a transformer)")
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and hasattr(module, "get_base_model"):
            inner = module.get_base_model()
        if inner is None:
            return component, module
        module = inner
