"""Attacks that change weights: each one's rule against its definition, and every bit back afterwards."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from fade.adapter import Adapter
from fade.errors import FadeError
from fade.evaluation.attacks import CannotAttackError, Subject, attack, relearning
from fade.evaluation.attacks.benign_tuning import BenignTuning
from fade.evaluation.attacks.denoising import descend
from fade.evaluation.attacks.pruning import Pruning, pruned
from fade.evaluation.attacks.quantising import Quantising, rounded
from fade.evaluation.attacks.relearning import Relearning, undecided
from fade.evaluation.attacks.removal import Removal
from fade.evaluation.attacks.weights import all_layers, edited_layers, fine_tuned, open_weights
from fade.evaluation.drawings import Kept
from fade.noise import step_generator

from .conftest import same_bits, weights
from .test_attacks import PREDICTIONS, QUICK, adapter_on, predicting, subject_of

CURVES = ("recognised_after", "anew_recognised_after")
TINY = {"checks": (1, 2), "batch_size": 2}


@pytest.fixture
def adapter(pipeline: StableDiffusionPipeline) -> Adapter:
    return adapter_on(pipeline)


# --- fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "edited"), zip(PREDICTIONS, (True, False, True), strict=True))
def test_the_first_step_goes_down_the_denoising_losss_gradient(tokenizer, kind: str, edited: bool) -> None:
    adapter = adapter_on(predicting(tokenizer, kind))
    pipeline, subject = adapter.pipeline, subject_of(adapter, seed=11)
    picture = subject.examples(1)
    with open_weights(subject, edited_layers(subject), edited) as opened:
        before = {name: weight.detach().clone() for name, weight in opened.items()}
        text = subject.backbone.encode_prompts(["a cat"])["prompt_embeds"].expand(2, -1, -1)
        generator = step_generator(11, "lesson", 0)
        noise = torch.randn(2, 4, 8, 8, generator=generator)
        timesteps = torch.randint(1000, (2,), generator=generator)
        alpha = pipeline.scheduler.alphas_cumprod[timesteps].view(2, 1, 1, 1)
        for weight in opened.values():
            weight.requires_grad_(True)
        clean = picture.expand(2, -1, -1, -1)
        predicted = pipeline.unet(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, timesteps, text).sample
        target = {"epsilon": noise, "sample": clean, "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean}
        gradients = torch.autograd.grad((predicted - target[kind]).square().mean(), list(opened.values()))

        training = fine_tuned(
            subject, opened, picture, ("a cat",), (1,), batch_size=2, learning_rate=0.03, description="lesson"
        )
        assert next(training) == 1
        for (name, weight), gradient in zip(opened.items(), gradients, strict=True):
            clear = gradient.abs() > 1e-5  # Adam's first step has the sign of the gradient, and its size nowhere
            wanted = before[name] - 0.03 * before[name].square().mean().sqrt() * gradient.sign()
            torch.testing.assert_close(weight[clear], wanted[clear], rtol=1e-3, atol=1e-4)
        assert any((gradient.abs() > 1e-5).any() for gradient in gradients)


def test_what_is_trained_is_the_edited_model(adapter: Adapter) -> None:
    subject = subject_of(adapter)
    base = {name: layer.weight.detach().clone() for name, layer in edited_layers(subject).items()}
    with open_weights(subject, edited_layers(subject)) as opened:
        assert opened.keys() == adapter.layers.keys()
        assert all((opened[name] != base[name]).any() for name in opened)
        drawn = subject.decode(subject.sample(subject.prompts, subject.seeds, ""))
    with open_weights(subject, edited_layers(subject), edited=False) as opened:
        assert all(torch.equal(opened[name], base[name]) for name in opened)
        plain = subject.sample(subject.prompts, subject.seeds, "")
    torch.testing.assert_close(plain, subject.concept_latents, rtol=1e-4, atol=1e-4)
    adapted = subject.decode(subject.sample(subject.prompts, subject.seeds, ""))
    torch.testing.assert_close(drawn, adapted, rtol=1e-3, atol=1e-3)


def test_every_bit_comes_back_whatever_happened(adapter: Adapter) -> None:
    pipeline, subject = adapter.pipeline, subject_of(adapter, retained=("a house",))
    subject.surrogates = ("a dog", "a cat", "a dog")
    before = weights(pipeline)
    trained = [parameter.detach().clone() for parameter in adapter.parameters()]
    needing = [parameter for parameter in pipeline.unet.parameters() if parameter.requires_grad]
    for one in (
        Removal(), Quantising("int4"), Pruning(0.4), BenignTuning(2, 3, 2), Relearning(2, **TINY),
    ):  # fmt: skip
        images = one(subject).images
        assert len(images) == 3
        assert images.isfinite().all()
        assert same_bits(before, weights(pipeline))
        assert adapter.enabled
        assert not adapter.merged
        assert all(torch.equal(a, b) for a, b in zip(trained, adapter.parameters(), strict=True))
        assert [parameter for parameter in pipeline.unet.parameters() if parameter.requires_grad] == needing

    def interrupted(edited: bool) -> None:
        with open_weights(subject, all_layers(subject), edited) as opened:
            for weight in opened.values():
                weight.data.fill_(float("nan"))
            raise KeyboardInterrupt

    for edited in (True, False):
        with pytest.raises(KeyboardInterrupt):
            interrupted(edited)
        assert same_bits(before, weights(pipeline))
        assert adapter.enabled
        assert not adapter.merged


def test_training_in_16_bits_does_not_lose_small_steps(adapter: Adapter) -> None:
    adapter.pipeline.to(torch.bfloat16)
    subject = subject_of(adapter)
    before, picture = weights(adapter.pipeline), subject.examples(1)
    with open_weights(subject, edited_layers(subject)) as opened:
        start = {name: weight.detach().clone() for name, weight in opened.items()}
        (done,) = fine_tuned(
            subject, opened, picture, ("a cat",), (40,), batch_size=1, learning_rate=1e-3, description="lesson"
        )
        assert done == 40
        # A step of a thousandth is less than half the distance between most neighbouring numbers.
        moved = [(opened[name] != start[name]).float().mean().item() for name in opened]
        assert sum(moved) / len(moved) > 0.3
    assert same_bits(before, weights(adapter.pipeline))


def test_a_loss_that_is_not_finite_is_told(adapter: Adapter) -> None:
    subject = subject_of(adapter)
    subject.recognised = lambda images: torch.zeros(len(images), dtype=torch.bool)
    subject.base_recognised = 3
    before = weights(adapter.pipeline)
    with pytest.raises(FadeError, match="the loss of relearning became nan; load the model in fp32"):
        Relearning(1, learning_rate=float("nan"), **TINY)(subject)
    assert same_bits(before, weights(adapter.pipeline))


def test_relearning_counts_after_each_check_and_stops_once_the_concept_is_back(adapter: Adapter) -> None:
    shown: list[int] = []

    def answers(images: torch.Tensor) -> torch.Tensor:
        """The base model's pictures, all three; then none, one, all; then, anew, none, none, none, two."""
        shown.append((3, 0, 1, 3, 0, 0, 0, 2)[len(shown)])
        return torch.arange(3) < shown[-1]

    subject = subject_of(adapter)
    subject.recognised, subject.surrogates = answers, ("a dog", "a cat", "a dog")
    assert subject.base_recognised == 3
    drawn = Relearning(2, checks=(1, 2, 3), batch_size=1)(subject)
    assert drawn.numbers == {
        "recognised_after": {"0": 0, "1": 1, "2": 3},
        "steps_to_half": 2,
        "anew_recognised_after": {"0": 0, "1": 0, "2": 0, "3": 2},
        "anew_steps_to_half": 3,
    }
    assert drawn.found == "half back after 2; anew: half back after 3"
    assert len(shown) == 8


def test_early_checks_change_nothing_but_what_is_counted(adapter: Adapter) -> None:
    """The training, its noise and the pictures of the later checks are what they are without them, to the last bit."""
    subject = subject_of(adapter)
    subject.recognised = lambda images: torch.zeros(len(images), dtype=torch.bool)
    subject.base_recognised = 3
    examples, captions = subject.examples(2), subject.example_prompts(2)
    for edited in (True, False):
        late, both = (
            dict(
                Relearning(2, checks=(3, 4), early=early, batch_size=1).draws(
                    replace(subject, kept=Kept(None)), examples, captions, subject.prompts, edited=edited
                )
            )
            for early in ((), (1, 2, 3))
        )
        assert list(late) == [0, 3, 4] and list(both) == [0, 1, 2, 3, 4]
        assert all(torch.equal(late[step], both[step]) for step in late)
        assert not torch.equal(both[1], both[2])


def test_training_does_not_stop_at_an_early_check_and_the_words_say_where_none_is_fine_enough(adapter: Adapter) -> None:
    def told(edited: tuple[int, ...], anew: tuple[int, ...]) -> tuple[dict[str, Any], str]:
        counts = iter((*edited, *anew))
        subject = subject_of(adapter, surrogates=("a dog", "a cat", "a dog"))
        subject.base_recognised = 3
        subject.count = lambda latents: next(counts)
        drawn = Relearning(1, checks=(3, 4), early=(1, 2), batch_size=1)(subject)
        assert next(counts, None) is None
        return drawn.numbers, drawn.found

    numbers, found = told((0, 3, 0, 3), (0, 0, 2, 3))
    assert numbers["recognised_after"] == {"0": 0, "1": 3, "2": 0, "3": 3}
    assert (numbers["steps_to_half"], numbers["anew_steps_to_half"]) == (1, 2)
    assert found == "half back after 1; anew: half back after 2"
    for counts in ((0, 2, 2, 3), (0, 3, 3, 3)):
        numbers, found = told(counts, (0, 2, 3, 3))
        assert undecided(numbers) and found.endswith("; which is sooner the checks do not tell")
    numbers, found = told((3,), (3,))  # never gone
    assert numbers["steps_to_half"] == 0 and not undecided(numbers)


def test_every_layer_is_trained_where_that_is_asked_for(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(adapter, surrogates=("a house", "a tree", "a house"))
    subject.recognised = lambda images: torch.zeros(len(images), dtype=torch.bool)
    subject.base_recognised = 3
    opened: list[set[str]] = []

    def noting(subject: Subject, layers: dict[str, nn.Module], edited: bool) -> Any:
        opened.append(set(layers))
        return open_weights(subject, layers, edited)

    monkeypatch.setattr(relearning, "open_weights", noting)
    before = weights(adapter.pipeline)
    some, every = (Relearning(1, layers=layers, **TINY)(subject) for layers in ("edited", "every"))
    names = {name for name, one in adapter.pipeline.unet.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)}
    assert opened == [set(adapter.layers)] * 2 + [set(all_layers(subject))] * 2
    assert set(adapter.layers) < set(all_layers(subject)) and len(all_layers(subject)) <= len(names)
    assert not torch.equal(some.images, every.images)
    assert list(every.numbers["anew_recognised_after"]) == ["0", "1", "2"]
    assert same_bits(before, weights(adapter.pipeline))
    assert len({one.setting(subject) for one in relearning.VARIANTS}) == len(relearning.VARIANTS)


def test_a_weight_that_no_picture_goes_through_stays_as_it_is(adapter: Adapter) -> None:
    subject = subject_of(adapter)
    used, unused = torch.randn(2, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    kept = unused.detach().clone(), used.detach().clone()
    optimizer = torch.optim.Adam([used, unused], lr=0.1)
    descend(used.square().sum(), [used, unused], optimizer, subject.backbone, 6, "a lesson")
    assert torch.equal(unused, kept[0]) and not torch.equal(used, kept[1])


def test_what_is_drawn_before_any_step_is_drawn_once_for_all_settings(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of(adapter, surrogates=("a house", "a tree", "a house"))
    drawn: list[str] = []
    sample = subject.sample
    monkeypatch.setattr(
        subject, "sample", lambda prompts, seeds, description: drawn.append(description) or sample(prompts, seeds, "")
    )
    shown = [Relearning(count, checks=(1,), batch_size=2, enough=2.0)(subject).numbers for count in (1, 2)]
    assert all(list(numbers[name]) == ["0", "1"] for numbers in shown for name in CURVES)
    assert all(shown[0][name]["0"] == shown[1][name]["0"] for name in CURVES)
    counted = {step: drawn.count(f"drawing after {step} steps") for step in (0, 1)}
    assert counted == {0: 2, 1: 4}  # edited and anew


def test_a_judge_of_more_patience_goes_on_with_what_was_learnt_anew(adapter: Adapter, tmp_path: Path) -> None:
    """What is kept are the pictures after each check, so another judge may stop the same training elsewhere."""
    subject = subject_of(adapter)
    one = Relearning(2, checks=(1, 2, 3), batch_size=2)
    examples, captions = subject.examples(2), subject.example_prompts(2)

    def curve(back_after: int, kept: Kept) -> tuple[torch.Tensor, dict[str, int]]:
        asked = itertools.count()
        judged = replace(subject, kept=kept)
        judged.recognised = lambda images: torch.full((3,), next(asked) >= back_after)
        judged.base_recognised = 3
        return one.curve(judged, examples, captions, subject.prompts, edited=False)

    drawn, counted = curve(1, Kept(tmp_path))
    assert counted == {"0": 0, "1": 3}
    later, counted = curve(3, Kept(tmp_path))
    assert counted == {"0": 0, "1": 0, "2": 0, "3": 3}
    wanted, _ = curve(3, Kept(None))
    assert torch.equal(later, wanted) and not torch.equal(later, drawn)
    again, _ = curve(1, Kept(tmp_path))
    assert torch.equal(again, drawn)


def test_without_a_surrogate_nothing_is_learnt_anew(adapter: Adapter) -> None:
    subject = subject_of(adapter)
    subject.recognised = lambda images: torch.zeros(len(images), dtype=torch.bool)
    subject.base_recognised = 3
    drawn = Relearning(1, **TINY)(subject)
    assert drawn.numbers == {"recognised_after": {"0": 0, "1": 0, "2": 0}, "steps_to_half": None}
    assert drawn.found == "not half back after 2 steps"


def test_learning_anew_is_under_the_surrogates_prompts(adapter: Adapter) -> None:
    """Of an adapter of strength zero with the concept's own prompts as the surrogate's, both curves are one."""
    adapter.scale = 0.0
    subject = subject_of(adapter)
    subject.recognised = lambda images: torch.zeros(len(images), dtype=torch.bool)
    subject.base_recognised = 3
    one = Relearning(2, **TINY)
    examples, captions = subject.examples(2), subject.example_prompts(2)
    again, _ = one.curve(subject, examples, captions, subject.prompts, edited=False)
    other, _ = one.curve(subject, examples, ("a dog", "a house"), ("a dog", "a house", "a dog"), edited=False)
    assert (again - other).abs().max() > 1e-2


def test_benign_training_needs_retained_prompts(adapter: Adapter) -> None:
    with pytest.raises(CannotAttackError, match="no retained prompts"):
        BenignTuning()(subject_of(adapter))


def test_benign_training_trains_on_what_was_to_be_kept(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = subject_of(adapter, retained=("a house", "a dog", "a tree"))
    seen: list[tuple[str, ...]] = []
    drawn_by_base = subject.drawn_by_base
    monkeypatch.setattr(subject, "drawn_by_base", lambda prompts: seen.append(prompts) or drawn_by_base(prompts))
    BenignTuning(1, 5, 2)(subject)
    assert len(seen[0]) == 5
    assert set(seen[0]) == set(subject.retained)


# --- fewer bits, fewer entries ---------------------------------------------------------------------------------------


def test_weights_through_fewer_bits_are_the_nearest_that_there_are() -> None:
    weight = torch.randn(5, 3, 7, 7) * torch.logspace(-3, 2, 5)[:, None, None, None]
    weight[2] = 0
    rows = weight.flatten(1)
    eighths = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    for kind, levels in (
        ("int8", torch.arange(-127.0, 128)), ("fp8", eighths[eighths.isfinite()]), ("int4", torch.arange(-7.0, 8)),
    ):  # fmt: skip
        back = rounded(weight, kind)
        assert back.shape == weight.shape
        for row, got in zip(rows, back.flatten(1), strict=True):
            for part, found in zip(
                row.split(64 if kind == "int4" else len(row)),
                got.split(64 if kind == "int4" else len(row)),
                strict=True,
            ):
                scale = part.abs().max() / levels.max()
                nearest = (part[:, None] - scale * levels).abs().min(1).values
                torch.testing.assert_close((part - found).abs(), nearest, rtol=1e-3, atol=1e-5 * float(scale) + 1e-12)
                if scale > 0:
                    off = (found / scale)[:, None] - levels
                    assert off.abs().min(1).values.max() < 1e-3


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 1.0])
def test_the_smallest_entries_are_pruned(share: float) -> None:
    weight = torch.randn(6, 5, 3)
    left = pruned(weight, share)
    gone = left == 0
    assert int(gone.sum()) == round(share * weight.numel())
    assert torch.equal(left[~gone], weight[~gone])
    if 0 < share < 1:
        assert weight[gone].abs().max() <= weight[~gone].abs().min()


def test_every_weight_of_the_edited_model_is_changed(adapter: Adapter) -> None:
    pipeline, subject = adapter.pipeline, subject_of(adapter)
    drawn = Quantising("int4")(subject).images
    adapter.merge()
    for module in pipeline.unet.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data = rounded(module.weight.data, "int4")
    torch.testing.assert_close(
        drawn, subject.decode(subject.sample(subject.prompts, subject.seeds, "")), rtol=1e-3, atol=1e-3
    )


def test_removal_takes_the_adapter_out_and_draws_the_base_models_pictures(adapter: Adapter) -> None:
    subject, before = subject_of(adapter), weights(adapter.pipeline)
    drawn = Removal()(subject)
    assert drawn.numbers == {"taken_off_by": "unmerge", "weights_equal_base": True, "pictures_equal_base": True}
    assert drawn.found == "pictures are the base model's bit for bit"
    assert adapter.enabled and not adapter.merged and same_bits(before, weights(adapter.pipeline))
    adapter.remove()
    plain = subject.backbone.generate(subject.prompts, subject.seeds, steps=4)
    torch.testing.assert_close(drawn.images, plain, rtol=1e-4, atol=1e-4)


def test_removal_notices_an_adapter_that_does_not_come_out_whole(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, unmerge = subject_of(adapter), Adapter.unmerge

    def inexactly(self: Adapter) -> Adapter:
        unmerge(self)
        with torch.no_grad():
            next(iter(edited_layers(subject).values())).weight.mul_(1.5)
        return self

    monkeypatch.setattr(Adapter, "unmerge", inexactly)
    drawn = Removal()(subject)
    assert drawn.numbers == {"taken_off_by": "unmerge", "weights_equal_base": False, "pictures_equal_base": False}
    assert drawn.found == "pictures are not the base model's bit for bit"


def test_where_merging_is_refused_the_adapter_is_switched_off(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Adapter) -> None:
        raise FadeError("these weights are packed")

    monkeypatch.setattr(Adapter, "merge", refused)
    drawn = Removal()(subject_of(adapter))
    assert drawn.numbers == {
        "taken_off_by": "disable", "not_merged": "these weights are packed", "pictures_equal_base": True,
    }  # fmt: skip
    assert adapter.enabled


def test_packed_weights_are_refused_with_a_word_and_the_rest_goes_on(adapter: Adapter) -> None:
    class Packed(nn.Parameter):
        pass

    layer = next(layer for name, layer in all_layers(subject_of(adapter)).items() if "conv" in name)
    layer.weight = Packed(layer.weight.data)
    record = attack(adapter.pipeline, adapter, [Pruning(0.5), Removal()], **QUICK)
    assert [result.attack for result in record.results] == ["removal"]
    assert list(record.left_out) == ["pruning"]
    assert "packed or computed from others" in record.left_out["pruning"]
    assert record.to_dict()["left_out"] == record.left_out
    assert adapter.enabled
