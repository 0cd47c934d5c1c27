"""The layer shapes that are written down as data, against diffusers' own modules without memory (device "meta")."""

from collections import Counter

import pytest
import torch
from torch import nn

from bench import shapes

diffusers = pytest.importorskip("diffusers")

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "block_out_channels": (320, 640, 1280, 1280)}
SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD35 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 38, "attention_head_dim": 64,
    "num_attention_heads": 38, "joint_attention_dim": 4096, "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
}  # fmt: skip
FLUX1 = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip
MODELS = [
    (shapes.SD15, "UNet2DConditionModel", SD15),
    (shapes.SDXL, "UNet2DConditionModel", SDXL),
    (shapes.SD35, "SD3Transformer2DModel", SD35),
    (shapes.FLUX1, "FluxTransformer2DModel", FLUX1),
]


@pytest.mark.parametrize(("model", "cls", "config"), MODELS, ids=[model.name for model, _, _ in MODELS])
def test_weights_and_counts(model, cls, config):
    with torch.device("meta"):
        denoiser = getattr(diffusers, cls)(**config)
    found, convs = Counter(), Counter()
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear):
            group = "attention" if ".attn" in name else "other"
            found[group, module.in_features, module.out_features, module.bias is not None] += 1
        elif isinstance(module, nn.Conv2d):
            convs[module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0]] += 1
    written = Counter()
    for group in ("attention", "other"):
        for layer in getattr(model, group):
            written[group, layer.in_features, layer.out_features, layer.bias] += layer.count
    assert written == found
    if model.conv:
        counted = Counter()
        for conv in model.conv:
            counted[conv.in_channels, conv.out_channels, conv.kernel, conv.stride] += conv.count
        assert counted == convs


def test_tokens_and_sizes_of_sd15():
    """What each layer is called with, in one forward pass."""
    linears, convs = Counter(), Counter()

    def record(module, inputs, output):
        x = inputs[0]
        if isinstance(module, nn.Linear):
            size = (module.in_features, module.out_features, module.bias is not None)
            linears[(x.numel() // x.shape[-1], *size)] += 1
        else:
            size = (module.in_channels, module.out_channels)
            convs[(*size, x.shape[2], module.kernel_size[0], module.stride[0])] += 1

    with torch.device("meta"), torch.no_grad():
        unet = diffusers.UNet2DConditionModel(**SD15)
        for module in unet.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(record)
        unet(torch.randn(1, 4, 64, 64), torch.zeros(1, dtype=torch.long), torch.randn(1, 77, 768))
    layers = (*shapes.SD15.attention, *shapes.SD15.other)
    assert linears == {(x.tokens, x.in_features, x.out_features, x.bias): x.count for x in layers}
    conv = shapes.SD15.conv
    assert convs == {(c.in_channels, c.out_channels, c.size, c.kernel, c.stride): c.count for c in conv}


def test_batches_and_convolutions_as_products():
    layer = shapes.batched(shapes.SD15.attention, 8)[0]
    assert (layer.tokens, layer.count) == (8 * 4096, 20)
    conv = shapes.Conv2d(2, 8, 16, 6, 3, 2, 5)
    assert conv.as_linear() == shapes.Linear(2 * 3 * 3, 16, 72, bias=True, count=5)
