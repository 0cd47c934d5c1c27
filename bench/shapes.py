"""Layer shapes of public diffusion models as data, so that benchmarks need neither diffusers nor a download.

Source: `unet/config.json` of Stable Diffusion 1.5: block_out_channels (320, 640, 1280, 1280), layers_per_block 2,
cross_attention_dim 768, latents of 64 x 64 for 512 pixels; two transformer blocks on the way down and three on the
way up at each of three resolutions, one in the middle, each with a self- and a cross-attention.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """One kind of linear layer: [tokens, in_features] -> [tokens, out_features], and how often a model has it."""

    tokens: int
    out_features: int
    in_features: int
    bias: bool
    count: int

    def __str__(self) -> str:
        return f"{self.tokens} x {self.in_features} -> {self.out_features}{' + bias' if self.bias else ''}"


TEXT_TOKENS, TEXT_FEATURES = 77, 768
# (channels, image tokens at 512 pixels, transformer blocks)
SD15_BLOCKS = ((320, 4096, 5), (640, 1024, 5), (1280, 256, 5), (1280, 64, 1))


def sd15_attention(batch: int = 1) -> list[Linear]:
    """The attention projections of Stable Diffusion 1.5: q, k, v, out of self- and of cross-attention.

    Args:
        batch: images; tokens grow with it.
    """
    layers = []
    for channels, tokens, blocks in SD15_BLOCKS:
        layers.append(Linear(batch * tokens, channels, channels, bias=False, count=4 * blocks))
        layers.append(Linear(batch * tokens, channels, channels, bias=True, count=2 * blocks))
    for channels in (320, 640, 1280):
        blocks = sum(count for width, _, count in SD15_BLOCKS if width == channels)
        layers.append(Linear(batch * TEXT_TOKENS, channels, TEXT_FEATURES, bias=False, count=2 * blocks))
    return layers
