"""Words that stand for layers of a kind take those that can carry masks, in every family; a layer that is named and
cannot is an error."""

import pytest
from torch import nn

import fade
from fade.adapter import check_carriers
from fade.backbones import FAMILIES, backbone_for
from fade.base_model import base_layers, target_layers
from fade.config import TARGET_KINDS, Config
from fade.errors import FadeError
from fade.methods import METHODS, method
from fade.unlearning import with_targets

from ..backbones.pipelines import build


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_every_word_and_every_method_takes_what_can_carry_masks(family: str) -> None:
    backbone = backbone_for(build(family))
    denoiser = backbone.denoiser
    everything = target_layers(denoiser)
    able = {name for name, layer in everything.items() if getattr(layer, "groups", 1) == 1}
    attention = set(target_layers(denoiser, backbone.targets))
    convolutions = {name for name, layer in everything.items() if isinstance(layer, nn.Conv2d)}
    of_word = {
        "all": able, "attention": attention, "beyond-attention": able - attention, "convolutions": able & convolutions,
    }  # fmt: skip
    assert set(of_word) == set(TARGET_KINDS)
    for word, wanted in of_word.items():
        config = Config.of("distillation", locate__targets=[word])
        if not wanted:
            with pytest.raises(FadeError, match=f"the targets name {word}, and .* has none"):
                with_targets(backbone, config)
            continue
        assert set(target_layers(denoiser, with_targets(backbone, config).locate.targets)) == wanted
    for name in METHODS:
        config = Config.of(name)
        if method(name).targets is not None:
            try:
                method(name).targets(backbone)
            except FadeError:  # a family without cross-attention
                continue
        taken = target_layers(denoiser, with_targets(backbone, config).locate.targets)
        check_carriers(denoiser, base_layers(denoiser), taken)


@pytest.mark.parametrize("name", ["esd-u", "robust"])
def test_sanas_grouped_convolutions_are_passed_over_and_told_where_named(name: str) -> None:
    pipeline = build("Sana")
    few = {
        "data__forget_samples": 2, "data__retain_samples": 2, "data__sampling_steps": 1, "overwrite__steps": 1,
        "overwrite__batch_size": 1, "overwrite__retain_batch_size": 1,
        "overwrite__pool": 0, "overwrite__learning_rate": 1e-2,
    }  # fmt: skip
    config = Config.of(name, **few)
    words = {"templates": ["{}"], "retain": ["house"], "progress": False}
    adapter = fade.unlearn(pipeline, "cat", "dog", config=config, **words)
    assert any(".conv_inverted" in layer for layer in adapter.layers)
    assert not any("conv_depth" in layer for layer in adapter.layers)
    adapter.remove()
    named = config.replace(locate__targets=["transformer_blocks.0.ff.conv_depth"])
    with pytest.raises(FadeError, match="transformer_blocks.0.ff.conv_depth is a grouped convolution"):
        fade.unlearn(pipeline, "cat", "dog", config=named, **words)
