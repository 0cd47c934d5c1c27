"""Regions of weights: what is measured, selected, solved and counted is the region alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fade
from fade.backbones import backbone_for
from fade.base_model import target_layers, target_regions
from fade.closed_form import TokenStatistics, normal_equations, revival, solution, solve
from fade.config import Config, LocateConfig
from fade.errors import FadeError
from fade.regions import Region, cut, embed, split_pattern
from fade.saliency import kept_units, locate, located_in
from fade_kernels import BitMask, GradientMagnitude

from .backbones.pipelines import build


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 6)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("to_k", ("to_k", None)),
        ("blocks.[01].to_k", ("blocks.[01].to_k", None)),
        ("*.to_out[:, :4]", ("*.to_out", ("", "", "", "4"))),
        ("to_qkv[2:9]", ("to_qkv", ("2", "9", None, None))),
        ("to_qkv[ 2:9 ,3: ]", ("to_qkv", ("2", "9", "3", ""))),
    ],
)
def test_a_pattern_may_end_with_a_region(pattern: str, parts: Any) -> None:
    assert split_pattern(pattern) == parts


def test_regions_by_layer() -> None:
    net = Net()
    patterns = ("first[:5]", "second[1:, 2:4]", "conv[:, 9:18]")
    assert list(target_layers(net, patterns)) == ["first", "second", "conv"]
    assert target_regions(net, patterns) == {
        "first": Region(range(5), range(8)),
        "second": Region(range(1, 6), range(2, 4)),
        "conv": Region(range(4), range(9, 18)),
    }
    assert target_regions(net, ("first[:5]", "first")) == {}  # the whole layer is asked for, too
    assert target_regions(net, ("first[:5]", "fir*[:5, :]")) == {"first": Region(range(5), range(8))}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("second[:7]",), r"asks for rows 0:7 and columns 0:12 of second, whose weight has 6 rows and 12 columns"),
        (("second[:, 3:13]",), r"columns 3:13 of second"),
        (("second[4:4]",), r"rows 4:4 .* not empty"),
        (("second[:, 9:3]",), r"columns 9:3"),
        (("first[:5]", "first[2:]"), r"first\[:5\] and first\[2:\] name different regions of first"),
        (("third[:5]",), r"'third\[:5\]' matches no Linear or Conv2d layer"),
    ],
)
def test_regions_that_are_none_are_told(patterns: tuple[str, ...], message: str) -> None:
    with pytest.raises(FadeError, match=message):
        target_regions(Net(), patterns)


def test_a_region_outside_a_weight_is_told_before_anything_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = build("Stable Diffusion 1.x/2.x")
    monkeypatch.setattr(type(backbone_for(pipeline)), "encode_prompts", lambda *_, **__: pytest.fail("too late"))
    config = Config().replace(locate__targets=("attn2.to_k[:, 99:200]",), overwrite__method="distillation")
    with pytest.raises(FadeError, match="columns 99:200 of .*attn2.to_k, whose weight has"):
        fade.unlearn(pipeline, "cat", "dog", config=config, progress=False)


@pytest.mark.parametrize("per_sample", [False, True])
def test_only_the_regions_gradient_is_summed(per_sample: bool) -> None:
    torch.manual_seed(0)
    net = Net()
    regions = {
        "first": (slice(2, 9), slice(0, 8)), "second": (slice(0, 6), slice(3, 7)), "conv": (slice(1, 3), slice(5, 20)),
    }  # fmt: skip

    def measured(regions: Any) -> dict[str, Tensor]:
        generator = seeded()
        with GradientMagnitude(dict(net.named_children()), per_sample=per_sample, regions=regions) as watch:
            for _ in range(2):
                x, image = torch.randn(3, 5, 8, generator=generator), torch.randn(3, 3, 4, 4, generator=generator)
                again = net.second(net.first(x).sin()).square().sum()
                (again + net.second(torch.ones(3, 2, 12)).cos().sum() + net.conv(image).square().sum()).backward()
        return watch.saliency

    whole, parts = measured(None), measured(regions)
    for name, region in regions.items():
        torch.testing.assert_close(parts[name], whole[name].flatten(1)[region], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["element", "tile", "channel", "module", "none"])
def test_what_is_selected_is_in_the_region_and_what_is_kept_counts_it_alone(granularity: str) -> None:
    torch.manual_seed(0)
    layers = dict(list(Net().named_children())[:2])
    regions = {"second": Region(range(1, 5), range(2, 10))}
    config = LocateConfig(saliency="random", keep=0.5, granularity=granularity, tile=3)
    located = locate(None, layers, None, None, config, 3, regions=regions)
    outside = torch.ones(6, 12, dtype=torch.bool)
    outside[1:5, 2:10] = False
    mask = located.masks["second"].unpack()
    assert mask.shape == outside.shape and not mask[outside].any()
    assert located.total == 12 * 8 + 4 * 8
    if granularity == "element":
        assert located.selected == kept_units(layers, config, regions) == int(0.5 * (12 * 8 + 4 * 8))
    if granularity == "none":
        assert located.selected == located.total and located.layers[1]["density"] == 1.0
    if granularity == "channel":
        assert kept_units(layers, config, regions) == int(0.5 * (12 + 8 + 4 + 8))


def test_masks_of_regions_and_of_weights_are_each_others() -> None:
    layers = {"second": Net().second}
    regions = {"second": Region(range(1, 5), range(2, 10))}
    mask = BitMask.pack(torch.rand(4, 8, generator=seeded()) < 0.5)
    whole = embed({"second": mask}, layers, regions)
    assert whole["second"].shape == (6, 12) and whole["second"].count == mask.count
    assert torch.equal(cut(whole, regions)["second"].words, mask.words)
    assert located_in(layers, {"second": mask}, {}, 0.0, regions).selected == mask.count


def statistics(width: int) -> TokenStatistics:
    forget, surrogate, kept = torch.randn(3, 40, width, generator=seeded(4), dtype=torch.float64)
    difference = surrogate - forget
    return TokenStatistics(*(a.T @ b / 40 for a, b in (
        (forget, forget), (difference, forget), (difference, difference), (kept, kept),
    )))  # fmt: skip


@pytest.mark.parametrize("held", [False, True])
def test_a_region_is_solved_as_the_whole_weight_is_on_masks_within_it(held: bool) -> None:
    torch.manual_seed(1)
    layers = {"a": nn.Linear(10, 9), "b": nn.Linear(10, 7)}
    regions = {"a": Region(range(2, 8), range(3, 10)), "b": Region(range(7), range(3, 10))}
    tokens = statistics(10)
    protected = torch.linalg.qr(torch.randn(10, 2, generator=seeded(5), dtype=torch.float64)).Q if held else None
    # Without damping, which is a share of the mean square of the entries that may change.
    whole = normal_equations(layers, tokens, 2.0, 0.0, protected)
    part = normal_equations(layers, tokens, 2.0, 0.0, protected[3:10] if held else None, regions)
    own = {
        name: BitMask.pack(torch.rand(region.shape, generator=seeded(i)) < 0.8)
        for i, (name, region) in enumerate(regions.items())
    }
    masks = embed(own, layers, regions)
    expected, found = solve(whole, masks), solve(part, own)
    for name in layers:
        assert expected[name].abs().max() > 1e-3
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_hardening_asks_the_rows_that_changed() -> None:
    """What revives the concept in a region is what does in a layer of its rows alone."""
    torch.manual_seed(2)
    layer = nn.Linear(10, 9)
    rows = nn.Linear(10, 6)
    rows.weight.data = layer.weight.data[2:8].clone()
    tokens = statistics(10)
    region = {"a": Region(range(2, 8), range(10))}
    masks = {"a": BitMask.pack(torch.rand(6, 10, generator=seeded()) < 0.5)}
    own, alone = {"a": layer}, {"a": rows}
    part = normal_equations(own, tokens, 2.0, 1e-4, None, region)
    reference = normal_equations(alone, tokens, 2.0, 1e-4)
    values = solve(reference, masks)
    torch.testing.assert_close(
        revival(own, part, masks, values, region), revival(alone, reference, masks, values), rtol=1e-6, atol=1e-8
    )
    _, found = solution(own, tokens, part, masks, 0.02, None, 1, region)
    _, expected = solution(alone, tokens, reference, masks, 0.02, None, 1)
    torch.testing.assert_close(found["a"], expected["a"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "method", "targets"),
    [
        ("Stable Diffusion 1.x/2.x", "closed-form", ("attn2.to_k[3:, 4:20]", "attn2.to_v[:, 4:20]", "attn2.to_v")),
        ("Stable Diffusion 1.x/2.x", "both", ("attn2.to_k[:10]", "attn2.to_v[:, 4:20]")),
        ("FLUX.2 klein", "distillation", None),
    ],
)
def test_a_run_changes_regions_alone(family: str, method: str, targets: tuple[str, ...] | None) -> None:
    pipeline = build(family)
    backbone = backbone_for(pipeline)
    patterns = targets or backbone.targets
    layers, regions = target_layers(backbone.denoiser, patterns), target_regions(backbone.denoiser, patterns)
    assert regions
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    config = Config().replace(
        locate__targets=targets, locate__keep=0.2, overwrite__method=method, data__forget_samples=2,
        data__retain_samples=2, data__sampling_steps=1, overwrite__steps=2, overwrite__batch_size=2,
        overwrite__retain_batch_size=2, overwrite__stop_forget=0.0, overwrite__learning_rate=0.1, overwrite__pool=2,
    ).without_ignored()  # fmt: skip
    adapter = fade.unlearn(
        pipeline, "cat", "dog", templates=["a picture of {}", "{}"], retain=["a house", "a red car"], config=config,
        progress=False,
    )  # fmt: skip
    run = adapter.metadata["run"]
    area = {name: regions[name].shape if name in regions else layer.weight.shape for name, layer in layers.items()}
    assert run["total"] == sum(rows * columns for rows, columns in area.values())
    assert run["selected"] == int(0.2 * run["total"])
    adapter.merge()
    changed = 0
    for name, weight in before.items():
        other = target_layers(backbone.denoiser, (name,))[name].weight != weight
        if name in regions:
            inside = torch.zeros_like(other)
            inside[regions[name].slices] = True
            assert not other[~inside].any()
        changed += int(other.sum())
    assert 0 < changed <= run["selected"]
