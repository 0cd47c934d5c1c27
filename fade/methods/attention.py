"""The layers that several methods change: those of cross-attention, where a family has it."""

from fade.backbones import Backbone
from fade.base_model import maskable_layers, target_layers
from fade.errors import FadeError


def keys_and_values(backbone: Backbone) -> tuple[str, ...]:
    """The keys and values of cross-attention, which read the prompt alone, by name. Raises FadeError where a family has
    none."""
    read = frozenset().union(*backbone.text_layers().values())
    found = tuple(sorted(name for name in read if name.endswith((".to_k", ".to_v"))))
    if not found:
        raise FadeError(
            f"{backbone.family.name} has no cross-attention, whose keys and values alone read the prompt: text and "
            "picture attend to one another in layers of both. Name the layers to change (--target), or choose another "
            "method"
        )
    return found


def cross_attention(backbone: Backbone) -> tuple[str, ...]:
    """All projections of cross-attention, by name. Raises FadeError as `keys_and_values`."""
    attentions = {name.rpartition(".")[0] + "." for name in keys_and_values(backbone)}
    layers = target_layers(backbone.denoiser, backbone.targets)
    return tuple(name for name in layers if name.startswith(tuple(attentions)))


def beside_cross_attention(backbone: Backbone) -> tuple[str, ...]:
    """Every layer but cross-attention's that can carry masks, by name; every such layer where a family has none."""
    read = frozenset().union(*backbone.text_layers().values())
    crossed = cross_attention(backbone) if any(name.endswith((".to_k", ".to_v")) for name in read) else ()
    return tuple(name for name in maskable_layers(backbone.denoiser) if name not in crossed)
