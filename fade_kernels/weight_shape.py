"""The shape of a layer's weight as the layer's own sizes tell it, which a packed weight's tensor does not."""

from torch import nn


def weight_shape(layer: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    """[N, K] of a linear layer, [C_out, C_in / groups, kh, kw] of a convolution; reads no weight.

    Quantisation libraries keep a weight packed: 4 bits as uint8 [N·K/2, 1] in bitsandbytes, blocks of bytes in GGUF.
    """
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size
    return layer.out_features, layer.in_features
