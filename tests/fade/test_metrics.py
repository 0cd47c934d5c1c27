"""Each metric against an independent definition, the registry that table, JSON and report read, and requirements."""

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from fade.bundled import model
from fade.errors import FadeError
from fade.evaluation import run
from fade.evaluation.answers import class_answers, crossed_answers
from fade.evaluation.features import JudgeFeatures, ModelFeatures, features_of_folder
from fade.evaluation.intervals import (
    jackknife_interval,
    mean_interval,
    paired_share_interval,
    resampled,
    wilson_interval,
    without_each_group,
)
from fade.evaluation.metrics.composition import composed
from fade.evaluation.metrics.distribution import (
    _kid_to_real,
    frechet_distance,
    inside,
    kernel_distance,
    paired_kernel_terms,
    polynomial_kernel,
)
from fade.evaluation.metrics.entangled import EPS, entangled, otsu, regions
from fade.evaluation.metrics.lpips import Lpips
from fade.evaluation.metrics.metric import Drawn, Interval, Metric, Value
from fade.evaluation.metrics.perceptual import feature_distance
from fade.evaluation.metrics.registry import METRICS, known_metrics
from fade.evaluation.requirements import requirements, shortfalls
from fade.evaluation.run import _summarise
from fade.images import find_pictures, square
from fade.report import render_report


@pytest.fixture
def seed() -> int:
    """Fresh for each test; a failure names it among the test's arguments."""
    return random.randrange(2**31)


def features(seed: int, count: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mixed + torch.randn(width, generator=generator)


class Flat:
    """Means over blocks of pixels as features."""

    name = "blocks"

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 4).flatten(1)

    def maps(self, images: Tensor) -> list[Tensor]:
        return [images, torch.nn.functional.avg_pool2d(images, 4)]


def drawn(seed: int, forget: Any = "three", surrogate: Any = "eight", seeds: tuple[int, ...] = (1, 2)) -> Drawn:
    """Random pictures and judgements of DigitCanvas's answer set."""
    generator = torch.Generator().manual_seed(seed)
    answers = crossed_answers(model("digitcanvas"), forget, surrogate, seeds)
    count = len(answers.prompts)

    def judged(wrong: float) -> dict[str, Tensor]:
        return {
            domain: torch.where(
                torch.rand(count, generator=generator) < wrong,
                torch.randint(len(words), (count,), generator=generator),
                answers.prompted[domain],
            )
            for domain, words in answers.classes.items()
        }

    base = torch.rand(count, 3, 8, 8, generator=generator)
    adapted = (base + 0.1 * torch.randn(base.shape, generator=generator)).clamp(0, 1)
    return Drawn(answers, base, adapted, judged(0.1), judged(0.4), features=Flat())


def value(name: str, of: Drawn) -> Value:
    (metric,) = known_metrics([name])
    return metric.measure(of)


# --- distributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(40, 60), (9, 200)], ids=["full rank", "fewer than features"])
def test_frechet_distance_against_its_definition(seed: int, counts: tuple[int, int]) -> None:
    first, second = features(seed, counts[0], 12).double(), features(seed + 1, counts[1], 12).double()
    means, covariances = (first.mean(0), second.mean(0)), (first.T.cov(), second.T.cov())
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).sqrt().real.sum()
    expected = (means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances) - 2 * root
    assert frechet_distance(first.float(), second.float()) == pytest.approx(expected.item(), rel=1e-4)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9 * covariances[0].trace().item())
    with pytest.raises(ValueError, match="two pictures"):
        frechet_distance(first[:1], second)


def test_kernel_distance_against_its_definition(seed: int) -> None:
    first, second = features(seed, 7, 5).double(), features(seed + 1, 9, 5).double()

    def mean(a: Tensor, b: Tensor, apart: bool) -> float:
        found = [((x @ y).item() / 5 + 1) ** 3 for i, x in enumerate(a) for j, y in enumerate(b) if not apart or i != j]
        return sum(found) / len(found)

    expected = mean(first, first, True) + mean(second, second, True) - 2 * mean(first, second, False)
    assert kernel_distance(first, second) == pytest.approx(expected, rel=1e-9)

    other = second[:7]
    terms = paired_kernel_terms(first, other)
    paired = mean(first, first, True) + mean(other, other, True) - 2 * mean(first, other, True)
    assert terms.sum().item() / 42 == pytest.approx(paired, rel=1e-9)
    assert paired_kernel_terms(first, first).abs().max() == 0  # where the unpaired estimate is below zero
    assert kernel_distance(first, first) < 0


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_fid_and_kid_are_torchmetrics(seed: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance  # its import takes seconds
    from torchmetrics.image.kid import KernelInceptionDistance

    class Identity(torch.nn.Module):
        num_features = 12

        def forward(self, x: Tensor) -> Tensor:
            return x

    first, second = features(seed, 50, 12), features(seed + 1, 50, 12)
    fid = FrechetInceptionDistance(Identity(), input_img_size=(1, 1, 1)).set_dtype(torch.float64)
    kid = KernelInceptionDistance(Identity(), subsets=1, subset_size=50)
    for metric in (fid, kid):
        metric.update(first, real=True)
        metric.update(second, real=False)
    assert frechet_distance(first, second) == pytest.approx(fid.compute().item(), rel=1e-4)
    assert kernel_distance(first, second) == pytest.approx(kid.compute()[0].item(), rel=1e-4)


def test_precision_against_its_definition(seed: int) -> None:
    points, manifold = features(seed, 15, 3), features(seed, 20, 3)[5:]
    expected = []
    for point in points.double():
        found = False
        for i, centre in enumerate(manifold.double()):
            others = sorted((centre - o).norm().item() for j, o in enumerate(manifold.double()) if j != i)
            found |= (point - centre).norm().item() <= others[2]
        expected.append(found)
    assert inside(points, manifold).tolist() == expected
    assert bool(inside(manifold, manifold).all())
    assert not bool(inside(points + 1e6, manifold).any())
    with pytest.raises(ValueError, match="need more than 3"):
        inside(points, manifold[:3])


def test_distributions_are_of_retained_pictures_and_fid_needs_more_than_it_has_features(seed: int) -> None:
    few = drawn(seed)
    kept = ~few.answers.forgotten
    pair = Flat()(few.base[kept]), Flat()(few.adapted[kept])
    fid = value("FID", few)
    assert fid.adapted == pytest.approx(frechet_distance(*pair), rel=1e-9)
    assert fid.interval.low <= fid.adapted <= fid.interval.high and fid.interval.images == 144
    kid = value("KID", few)
    assert kid.interval.low <= kid.adapted <= kid.interval.high
    assert value("precision", few).adapted == 100 * inside(pair[1], pair[0]).double().mean().item()
    assert value("recall", few).adapted == 100 * inside(pair[0], pair[1]).double().mean().item()

    wide = dataclasses.replace(few, features=lambda images: images.flatten(1))
    fid = value("FID", wide)
    assert fid.adapted is None and fid.interval is None
    assert "more than 192 images" in fid.note and f"KID is {value('KID', wide).adapted:.4g}" in fid.note

    same = dataclasses.replace(few, adapted=few.base)
    assert value("KID", same) == Value(0.0, interval=Interval(0.0, 0.0, 144))
    assert value("FID", same).adapted == pytest.approx(0, abs=1e-9)


def test_real_pictures_are_compared_with_what_both_models_retain(seed: int) -> None:
    real = features(seed, 60, 12)
    compared = dataclasses.replace(drawn(seed), real=real)
    kept = ~compared.answers.forgotten
    base, adapted = Flat()(compared.base[kept]), Flat()(compared.adapted[kept])
    for name, distance in (("FID-real", frechet_distance), ("KID-real", kernel_distance)):
        found = value(name, compared)
        assert found.adapted == pytest.approx(distance(real, adapted), rel=1e-9)
        assert found.base == pytest.approx(distance(real, base), rel=1e-9)
        assert found.interval.low <= found.adapted <= found.interval.high and found.interval.images == len(adapted)
        assert found.change.low <= found.adapted - found.base <= found.change.high
        # Paired, it is far narrower than the distance itself is known, and nothing where nothing changed.
        assert found.change.high - found.change.low < found.interval.high - found.interval.low
        same = value(name, dataclasses.replace(compared, adapted=compared.base)).change
        assert (same.low, same.high) == (0.0, 0.0)
    few = dataclasses.replace(compared, real=real[:12])
    assert value("FID-real", few).adapted is None and "more than 12 images a side" in value("FID-real", few).note
    assert value("KID-real", few).adapted == pytest.approx(kernel_distance(real[:12], adapted))


def test_the_distance_to_real_pictures_in_a_resample_is_that_of_the_pictures_in_it(seed: int) -> None:
    base, adapted, real = (features(seed + i, count, 5) for i, count in enumerate((6, 6, 8)))
    estimates = []
    for one, other in zip(resampled(6).long(), resampled(8, seed=1).long(), strict=True):
        picked = [torch.repeat_interleave(torch.arange(len(counts)), counts) for counts in (one, other)]
        drew, among = adapted[picked[0]], real[picked[1]]
        apart = [index[:, None] != index for index in picked]
        own, others = (polynomial_kernel(x, x)[where].mean() for x, where in zip((drew, among), apart, strict=True))
        estimates.append(own + others - 2 * polynomial_kernel(drew, among).mean())
    expected = torch.quantile(torch.stack(estimates), torch.tensor([0.025, 0.975], dtype=torch.float64))
    found = _kid_to_real(base, adapted, real).interval
    assert [found.low, found.high] == pytest.approx(expected.tolist(), rel=1e-9)


def test_the_jackknife_of_a_mean_is_its_standard_error(seed: int) -> None:
    values = features(seed, 200, 1).double().flatten()
    left = torch.stack([values[kept].mean() for kept in without_each_group(200)])
    groups = torch.stack([values[~kept].mean() for kept in without_each_group(200)])
    low, high = jackknife_interval(values.mean().item(), left)
    assert (low + high) / 2 == pytest.approx(values.mean().item())
    assert (high - low) / 2 == pytest.approx(1.959964 * groups.std().item() / math.sqrt(len(groups)))


# --- pairs of pictures -----------------------------------------------------------------------------------------------


def test_entangled_against_its_formulas(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.rand(2, 3, 6, 5, generator=generator)
    mask = torch.rand(6, 5, generator=generator) < 0.4
    mask[0, :2] = torch.tensor([True, False])
    cells = {
        inner: [(c, i, j) for c in range(3) for i in range(6) for j in range(5) if bool(mask[i, j]) == inner]
        for inner in (True, False)
    }

    def rmse(inner: bool) -> float:
        return math.sqrt(sum((x[c].item() - y[c].item()) ** 2 for c in cells[inner]) / len(cells[inner]))

    def spread(inner: bool) -> tuple[float, float]:
        values = [y[c].item() for c in cells[inner]]
        mean = sum(values) / len(values)
        return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))

    s_in, s_out = 1 - rmse(True), rmse(False)
    s = 2 * s_in * (1 - s_out) / (s_in + 1 - s_out + EPS)
    c = 1.0
    for a, b in zip(spread(True), spread(False), strict=True):
        c *= 2 * a * b / (a * a + b * b + EPS)
    found = entangled(x, y, mask)
    expected = {"s_in": s_in, "s_out": s_out, "s": s, "c": c, "d": s * c / (0.5 * c + 0.5 * s + EPS)}
    assert dataclasses.asdict(found) == pytest.approx(expected, rel=1e-5)
    assert entangled(x, y, torch.zeros(6, 5, dtype=torch.bool)).s_in == 1.0
    with pytest.raises(ValueError, match="shapes"):
        entangled(x, y, mask[:5])


def test_otsu_parts_where_the_variance_between_is_largest(seed: int) -> None:
    values = torch.cat([torch.rand(30, generator=torch.Generator().manual_seed(seed)), torch.tensor([3.0, 3.2, 2.9])])

    def between(threshold: float) -> float:
        low, high = values[values <= threshold], values[values > threshold]
        return (len(low) * len(high) * (low.mean() - high.mean()) ** 2).item() if len(high) else 0.0

    best = max(between(v) for v in values.tolist())
    assert between(otsu(values)) == pytest.approx(best, rel=1e-5)


def test_the_region_to_forget_is_where_the_concept_is_drawn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    concept = {"forget": "dog", "surrogate": "cat", "forget_prompts": ["a dog", "dog on grass"]}
    answers = class_answers(concept, ["horse"], (5, 6))
    scenes = {key: torch.rand(3, 8, 8, generator=generator) * 0.5 for key in (("a", 5), ("a", 6), ("g", 5), ("g", 6))}
    pictures = []
    for prompt, at in zip(answers.prompts, answers.seeds, strict=True):
        picture = scenes["g" if "grass" in prompt else "a", at].clone()
        if "dog" in prompt:
            picture[:, 2:5, 3:7] = 1.0
        pictures.append(picture)
    base = torch.stack(pictures)
    judged = answers.prompted
    found = regions(Drawn(answers, base, base, judged, judged))
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 3:7] = True
    assert list(found) == answers.forgotten.nonzero().flatten().tolist()
    assert all(torch.equal(one, mask) for one in found.values())

    gone = base.clone()
    gone[answers.forgotten] *= 0.5
    pair = Drawn(answers, base, gone, judged, judged)
    assert value("S_in", pair).adapted < 1 and value("S_out", pair).adapted > 0
    assert value("S_in", Drawn(answers, base, base, judged, judged)).adapted == 1.0
    assert value("Entangled-S", pair).adapted == value("C", pair).adapted
    alone = class_answers({**concept, "surrogate": ""}, [], (5,))
    nothing = Drawn(alone, base[:2], base[:2], alone.prompted, alone.prompted)
    assert value("Entangled-D", nothing).adapted is None and value("Entangled-D", nothing).note


def test_feature_distance_against_its_formula(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = [[torch.randn(2, c, h, w, generator=generator) for c, h, w in ((4, 3, 2), (6, 2, 2))] for _ in range(2)]
    found = feature_distance(*layers)
    for n in range(2):
        expected = 0.0
        for x, y in zip(*layers, strict=True):
            places = [(i, j) for i in range(x.shape[2]) for j in range(x.shape[3])]
            likeness = [torch.cosine_similarity(x[n, :, i, j], y[n, :, i, j], dim=0).item() for i, j in places]
            expected += sum(2 - 2 * cosine for cosine in likeness) / len(places)
        assert found[n].item() == pytest.approx(expected, rel=1e-4)
    assert feature_distance(layers[0], layers[0]).abs().max() == 0


def test_the_lpips_like_distance_is_zero_only_where_nothing_changed(seed: int) -> None:
    pair = drawn(seed)
    kept = ~pair.answers.forgotten
    held = dataclasses.replace(pair, adapted=torch.where(kept[:, None, None, None], pair.base, pair.adapted))
    assert value("LPIPS-like", held).adapted == 0
    assert value("LPIPS-like_forget", held).adapted > 0


def published(net: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """torchmetrics' copy of the published LPIPS with random weights, on torchvision's layers, which are not here."""
    from torch.nn import Conv2d, MaxPool2d, ReLU, Sequential
    from torchmetrics.functional.image import lpips as theirs

    def layers(name: str, pretrained: bool) -> torch.nn.Module:
        if name == "alexnet":
            return Sequential(
                Conv2d(3, 64, 11, 4, 2), ReLU(), MaxPool2d(3, 2), Conv2d(64, 192, 5, padding=2), ReLU(),
                MaxPool2d(3, 2), Conv2d(192, 384, 3, padding=1), ReLU(), Conv2d(384, 256, 3, padding=1), ReLU(),
                Conv2d(256, 256, 3, padding=1), ReLU(), MaxPool2d(3, 2),
            )  # fmt: skip
        found, before = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            found += [Conv2d(before, width, 3, padding=1), ReLU()] if width else [MaxPool2d(2, 2)]
            before = width or before
        return Sequential(*found)

    monkeypatch.setattr(theirs, "_get_tv_model_features", layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return theirs._LPIPS(pretrained=False, net=net, pnet_rand=True)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_torchmetrics_on_the_same_weights(
    net: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = published(net, seed, monkeypatch)
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    save_file(tensors, tmp_path / "lpips.safetensors")
    first, second = torch.rand(2, 3, 3, 40, 36, generator=torch.Generator().manual_seed(seed))
    ours = Lpips(tmp_path)
    found = ours(first, second)
    assert found.tolist() == pytest.approx(theirs(first, second, normalize=True).flatten().tolist(), rel=1e-3, abs=1e-7)
    assert ours(first, first).tolist() == [0.0, 0.0, 0.0] and {"alex": "AlexNet", "vgg": "VGG-16"}[net] in ours.name
    with pytest.raises(FadeError, match="needs pictures of"):
        ours(first[..., :15, :15], second[..., :15, :15])

    pair = drawn(seed, seeds=(1,))
    answers = dataclasses.replace(
        pair.answers, prompts=("p",) * 3, seeds=(1,) * 3,
        prompted={"digit": torch.tensor([3, 1, 2]), "style": torch.zeros(3, dtype=torch.int64)},
    )  # fmt: skip
    three = dataclasses.replace(pair, answers=answers, base=first, adapted=second, lpips=ours)
    assert value("LPIPS_forget", three).adapted == pytest.approx(found[0].item())
    assert value("LPIPS", three).adapted == pytest.approx(found[1:].mean().item())


def test_what_holds_no_lpips_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FadeError, match="there are 0 safetensors files in"):
        Lpips(tmp_path)
    (tmp_path / "no").write_bytes(b"no tensors")
    for name in ("no", "none"):
        with pytest.raises(FadeError, match=f"cannot read the weights of LPIPS from .*{name}'"):
            Lpips(tmp_path / name)
    save_file({"net.slice1.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(FadeError, match=r"no weights of LPIPS with AlexNet: net\.slice1\.0\.weight has the shape"):
        Lpips(tmp_path / "a.safetensors")
    save_file({"net.slice1.2.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(FadeError, match=r"LPIPS with VGG-16: net\.slice1\.0\.weight is missing; save the state dict"):
        Lpips(tmp_path)


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forget", [["three"], ["neon"], ["three", "neon"]], ids=str)
def test_composition_counts_pictures_one_at_a_time(seed: int, forget: list[str]) -> None:
    pair = drawn(seed, forget, [None] * len(forget))
    words, hits = pair.answers.classes, []
    for judged in (pair.judged_base, pair.judged_adapted):
        found = []
        for word in forget:
            for i, prompt in enumerate(pair.answers.prompts):
                _, _, digit, _, style, _ = prompt.split()
                own, other = ("digit", "style") if word == digit else ("style", "digit")
                if word not in (digit, style) or (set(forget) <= {digit, style} and len(forget) == 2):
                    continue
                rest = style if own == "digit" else digit
                found.append(words[own][int(judged[own][i])] != word and words[other][int(judged[other][i])] == rest)
        hits.append(100 * sum(found) / len(found))
    composition = value("composition", pair)
    assert (composition.base, composition.adapted) == pytest.approx(tuple(hits))
    assert composition.change.low <= composition.adapted - composition.base <= composition.change.high
    concept = {"forget": "dog", "surrogate": "cat", "forget_prompts": ["a dog"]}
    answers = class_answers(concept, [], (1,))
    assert composed(Drawn(answers, *torch.rand(2, 2, 3, 4, 4), answers.prompted, answers.prompted)) is None


def test_accuracies_have_paired_intervals_of_their_change(seed: int) -> None:
    pair = drawn(seed)
    for name in ("UA", "IRA", "NA", "CRA", "CRA_retained", "redirected"):
        found = value(name, pair)
        assert found.change.low <= found.adapted - found.base <= found.change.high, name
        assert found.interval.low <= 100 and found.interval.images == found.change.images > 0
    unchanged = dataclasses.replace(pair, judged_adapted=pair.judged_base)
    held = value("IRA", unchanged).change
    changed = value("IRA", pair).change
    assert held.low < 0 < held.high and held.high - held.low < changed.high - changed.low


# --- intervals -------------------------------------------------------------------------------------------------------


def test_the_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    covered = 0
    for _ in range(200):
        low, high = mean_interval(torch.randn(60, generator=generator) + 5)
        covered += low <= 5 <= high
    assert 0.87 <= covered / 200 <= 1.0  # 95 % less the bootstrap's own bias and five standard errors


def test_the_interval_of_a_change_covers_it_and_gains_by_pairing() -> None:
    generator = torch.Generator().manual_seed(random.randrange(2**31))
    covered = 0
    for _ in range(200):
        before = torch.rand(60, generator=generator) < 0.8
        after = before & (torch.rand(60, generator=generator) < 0.75)  # 0.8 -> 0.6
        low, high = paired_share_interval(before, after)
        covered += low <= -0.2 <= high
    assert covered / 200 >= 0.87
    halves = torch.arange(60) < 30
    paired, apart = paired_share_interval(halves, halves), paired_share_interval(halves, halves.flip(0))
    assert paired[0] < 0 < paired[1] and paired[1] - paired[0] < 0.5 * (apart[1] - apart[0])
    gone, low_of_all = paired_share_interval(~halves & halves, halves | ~halves), wilson_interval(60, 60)[0]
    assert gone == pytest.approx((1 - math.sqrt(2) * (1 - low_of_all), 1))


# --- feature extractors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digitcanvas", "emojicanvas"])
def test_a_judges_features_are_what_its_last_layer_reads(seed: int, name: str) -> None:
    described = model(name)
    judges = described.load_judges()
    side = {"digitcanvas": 32, "emojicanvas": 64}[name]
    images = torch.rand(5, 3, side, side, generator=torch.Generator().manual_seed(seed))
    extractor = JudgeFeatures(described.title, judges)
    found, start = extractor(images), 0
    for domain in described.domains:
        last = judges._classifiers[domain.name][-1]
        own = found[:, start : start + last.in_features]
        assert torch.equal(last(own).argmax(1), getattr(judges, domain.name)(images))
        start += last.in_features
    assert start == found.shape[1]
    maps = extractor.maps(images)
    assert len(maps) == 12 and all(len(layer) == 5 and layer.dim() == 4 for layer in maps)
    assert torch.allclose(maps[5].mean((2, 3)), found[:, : maps[5].shape[1]], atol=1e-5)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = tmp_path_factory.mktemp("models") / "vit"
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(image_size=16, patch_size=8, **size)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_features_of_a_model_on_disk(vit: Path, seed: int) -> None:
    from transformers import ViTImageProcessor, ViTModel

    images = torch.rand(34, 3, 20, 20, generator=torch.Generator().manual_seed(seed))
    extractor = ModelFeatures(vit)
    found = extractor(images)
    levels = [(image * 255).round().byte().permute(1, 2, 0).numpy() for image in images]
    pixels = ViTImageProcessor.from_pretrained(vit)(levels, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = ViTModel.from_pretrained(vit).eval()(pixels).pooler_output
    torch.testing.assert_close(found, expected)
    assert [tuple(layer.shape) for layer in extractor.maps(images)] == [(34, 16, 1, 5)] * 3
    assert "vit" in extractor.name


def test_features_of_a_folder_are_those_of_its_pictures(tmp_path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (35, 9, 8, 3), dtype=np.uint8)
    (tmp_path / "more").mkdir()
    for i, one in enumerate(pixels):
        Image.fromarray(one).save((tmp_path / "more" if i % 2 else tmp_path) / f"{i:02}.png")
    found = features_of_folder(find_pictures(tmp_path), 8, Flat())
    squares = [np.asarray(square(Image.fromarray(one), 8)) for one in (*pixels[::2], *pixels[1::2])]
    expected = Flat()(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(found.sort(0).values, expected.sort(0).values)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"skipped 1 unreadable .*broken\.png"):
        assert len(features_of_folder(find_pictures(tmp_path), 8, Flat())) == 35
    (tmp_path / "alone").mkdir()
    (tmp_path / "broken.png").rename(tmp_path / "alone" / "broken.png")
    with pytest.raises(FadeError, match="none of the 1 images in .* can be read"):
        features_of_folder(find_pictures(tmp_path / "alone"), 8, Flat())


def test_what_is_no_image_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FadeError, match="there is no folder"):
        ModelFeatures(tmp_path / "none")
    with pytest.raises(FadeError, match="cannot load an image model"):
        ModelFeatures(tmp_path)


# --- the registry ----------------------------------------------------------------------------------------------------


def test_a_new_metric_is_in_table_json_and_report(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    new = Metric("brightness", "mean level", "of 1", "higher", lambda d: Value(float(d.adapted.mean()), note="so"), 3)
    hidden = dataclasses.replace(new, name="secret", shown=False)
    monkeypatch.setattr(run, "METRICS", (*METRICS, new, hidden))
    pair = drawn(seed)
    evaluation = _summarise(
        pair.answers, pair.judged_base, pair.judged_adapted, pair.base, pair.adapted, {}, features=Flat()
    )
    number = float(pair.adapted.mean())
    record = json.loads(evaluation.to_json())
    assert record["brightness"] == record["secret"] == number and record["notes"]["brightness"] == "so"
    assert {m.name for m in METRICS if m.needs not in ("clip", "phrasings", "real", "lpips")} <= record.keys()
    assert "CLIP" not in record and "FID" in record["interval_95"] and "IRA" in record["change_95"]
    console = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(evaluation.table())
    text = console.export_text()
    assert f"{number:.3f}" in text and "brightness: so" in text and "secret  " not in text
    html = render_report(evaluation, {"concept": {}}, 1000)
    assert f"{number:.3f}" in html and "brightness: so." in html


def test_names_are_told_apart_and_each_says_what_it_means() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(metric.meaning and metric.better in ("higher", "lower") for metric in METRICS)
    with pytest.raises(FadeError, match=r"no metric 'ua'; there are UA, IRA, .*FID"):
        known_metrics(["ua"])


# --- requirements ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ASR=3", "there are UA, IRA"), ("UA", "is no requirement"), ("UA=many", "is no requirement"),
        ("UA=nan", "is no requirement"), ("UA=990", "percentage"), ("UA=9,UA=8", "twice"),
        (" , ", "nothing is required"),
    ],
)  # fmt: skip
def test_a_requirement_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(FadeError, match=message):
        requirements(text)


def test_what_falls_short_is_named_in_the_metrics_own_direction(seed: int) -> None:
    pair = drawn(seed)
    evaluation = _summarise(pair.answers, pair.judged_base, pair.judged_adapted, pair.base, pair.adapted, {})
    found = evaluation.metrics
    text = ",".join(f"{name}={found[name]}" for name in ("UA", "IRA", "drift"))
    assert shortfalls(evaluation, requirements(text)) == []  # met exactly
    missed = shortfalls(evaluation, requirements(f"UA={found['UA'] / 2 + 50},drift={found['drift'] / 2},IRA=0"))
    assert len(missed) == 2
    assert missed[0].startswith(f"UA is {found['UA']:.6g} %; at least")
    assert "at most" in missed[1] and missed[1].startswith("drift is")
    evaluation.values["CRA"] = Value(None, note="of no use")
    (line,) = shortfalls(evaluation, requirements("CRA=0"))
    assert line == "CRA is undefined here (of no use); at least 0 % is required"
    assert requirements(None) == ()
