"""Robust distillation: what is asked, what is answered and what an attack makes, written out with the UNet itself."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.testing import assert_close
from transformers import CLIPTokenizer

import fade
from fade.backbones import backbone_for
from fade.base_model import target_layers
from fade.config import Config
from fade.errors import FadeError
from fade.methods.robust import Options, Robust
from fade.noise import step_generator
from fade.objective import Objective
from fade.unlearning import with_targets
from tests.fade.backbones.pipelines import build
from tests.fade.conftest import tiny_pipeline
from tests.fade.test_unlearning import interrupted_after

from .conftest import CONCEPT, asker, batch_of, target_of, training_of

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
QUIET = {"redrawn": False, "anchors": 0.0, "empty": 0.0}


def placed(aim: Robust, forget: int = 400, retain: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch of the concept's first prompt and the first retained one, at the last time, as the objective asks it."""
    prompts = aim.training.prompts
    row, answer, kept = (prompts.rows([text]) for text in ("a cat", "a dog", "a house"))
    asked, answers = (torch.cat([one.repeat(forget), kept.repeat(retain)]) for one in (row, answer))
    return aim.placed(asked, answers, torch.full((forget + retain,), 999), forget, step_generator(7, "placed", 0))


def test_anchors_ask_without_the_word_and_want_the_surrogate(pipeline: StableDiffusionPipeline) -> None:
    options = Options(redrawn=False, anchors=0.6, anchor_times=0.3, empty=0.5)
    aim = Robust(training_of(pipeline, "robust", options))
    asked, answers, times = placed(aim)
    prompts = aim.training.prompts
    concept, surrogate = prompts.rows(["a cat"]), prompts.rows(["a dog"])
    retained, kept = prompts.rows(CONCEPT.retain_prompts).tolist(), prompts.rows(["a house"])
    own, empty = asked[:400] == concept, asked[:400] == aim.empty
    others = ~own & ~empty
    assert (answers[:400] == surrogate).all()
    for share, wanted in ((own, 0.4), (empty, 0.3), (others, 0.3)):
        assert share.double().mean().item() == pytest.approx(wanted, abs=0.1)
    assert set(asked[:400][others].tolist()) == set(retained)
    assert (times[:400][own] == 999).all() and (times[:400][~own] < 300).all() and (times[400:] == 999).all()
    without = asked[400:] == aim.empty
    assert torch.equal(answers[400:], asked[400:]) and 0.35 < without.double().mean().item() < 0.65
    assert (asked[400:][~without] == kept).all()
    size = pipeline.tokenizer.model_max_length
    ids = pipeline.tokenizer("", padding="max_length", max_length=size, return_tensors="pt").input_ids
    wanted = pipeline.text_encoder(ids)[0]
    assert_close(aim.read(torch.tensor([aim.empty]))["prompt_embeds"], wanted)


def test_without_its_options_it_is_distillation(pipeline: StableDiffusionPipeline) -> None:
    training = training_of(pipeline, "robust", Options(**QUIET))
    batch, aim = batch_of(training), Robust(training)
    same = (batch.asked, batch.answers, batch.times)
    assert all(map(torch.equal, aim.placed(*same, 3, step_generator(0, "x", 0)), same))
    assert torch.equal(target_of(training, batch, Robust), target_of(training, batch, Objective))
    aim.prepare(20)
    assert not aim.state()


@pytest.mark.parametrize(("overshoot", "bound"), [(0.0, 1e2), (0.5, 1e2), (0.0, 0.7)])
def test_the_answer_is_noise_that_makes_the_redrawn_picture_of_what_is_seen(
    pipeline: StableDiffusionPipeline, overshoot: float, bound: float
) -> None:
    training = training_of(pipeline, "robust", Options(overshoot=overshoot, bound=bound, drawing_steps=2))
    batch, ask = batch_of(training), asker(training)
    found = target_of(training, batch, Robust)
    alphas, seen = pipeline.scheduler.alphas_cumprod, training.latents.forget
    state, noise = seen, torch.randn(seen.shape, generator=step_generator(training.seed, "redrawing", 0))
    surrogates = list(training.latents.surrogate_prompts)
    for step, (now, then) in enumerate(((800, 400), (400, 0))):  # DDIM with guidance, by its own formula
        a, b = alphas[now], alphas[then]
        state = a.sqrt() * state + (1 - a).sqrt() * noise if step == 0 else state
        times = torch.full((len(state),), now)
        empty, wanted = ask(state, times, [""] * 4, True), ask(state, times, surrogates, True)
        noise = empty + 3 * (wanted - empty)
        picture = (state - (1 - a).sqrt() * noise) / a.sqrt()
        state = b.sqrt() * picture + (1 - b).sqrt() * noise
    for i in range(3):
        a = alphas[batch.times[i]]
        answer = batch.clean[i] + (1 + overshoot) * (picture[i] - batch.clean[i])
        change = (batch.noised[i] - a.sqrt() * answer) / (1 - a).sqrt() - batch.noise[i]
        most = bound * batch.noise[i].square().mean().sqrt()
        change = change * min(1.0, (most / change.square().mean().sqrt()).item())
        assert_close(found[i], batch.noise[i] + change, **CLOSE)
    assert_close(found[3:], ask(batch.noised[3:], batch.times[3:], ["a house", "a tree"], True), **CLOSE)


def test_errors_are_relative_to_targets_above_one(pipeline: StableDiffusionPipeline) -> None:
    aim = Robust(training_of(pipeline, "robust", Options(redrawn=False)))
    sizes = torch.tensor([0.2, 1.5, 6.0]).view(3, 1, 1, 1)
    predicted, taught = torch.randn(3, 4, 8, 8), sizes * torch.randn(3, 4, 8, 8)
    wanted = sum(
        (one - other).square().mean() / max(1.0, other.square().mean().item())
        for one, other in zip(predicted, taught, strict=True)
    )
    assert_close(aim.error(predicted, taught), wanted / 3)


def test_an_attack_descends_the_adapted_models_denoising_loss(pipeline: StableDiffusionPipeline) -> None:
    options = Options(**QUIET, attacked=3, attacked_share=0.5, attack_every=2, attack_steps=2, attack_rate=0.2)
    training = training_of(pipeline, "robust", options)
    aim, latents, unet = Robust(training), training.latents.forget, pipeline.unet
    slots = torch.arange(aim.empty + 1, aim.empty + 4)
    begun = aim.read(training.prompts.rows(["a cat", "one cat", "a cat"]))["prompt_embeds"]
    assert torch.equal(aim.read(slots)["prompt_embeds"], begun)
    for step in (0, 1, 3):
        aim.prepare(step)
        assert torch.equal(aim.read(slots)["prompt_embeds"], begun)
    aim.prepare(4)
    found, moved = aim.read(slots)["prompt_embeds"], begun.clone()
    for inner in range(2):
        generator = step_generator(training.seed, "attack before step 4", inner)
        z = latents[torch.randint(4, (3,), generator=generator)]
        noise, t = torch.randn(z.shape, generator=generator), torch.randint(1000, (3,), generator=generator)
        a = pipeline.scheduler.alphas_cumprod[t].view(3, 1, 1, 1)
        for i in range(3):
            c = moved[i : i + 1].clone().requires_grad_(True)
            answer = unet(a[i].sqrt() * z[i : i + 1] + (1 - a[i]).sqrt() * noise[i : i + 1], t[i : i + 1], c).sample
            g = torch.autograd.grad((answer - noise[i : i + 1]).square().mean(), c)[0]
            moved[i] = (c - 0.2 * c.square().mean().sqrt() * g / g.square().mean().sqrt()).detach()
    assert_close(found, moved, **CLOSE)
    assert not torch.allclose(found, begun) and not any(p.requires_grad for p in unet.parameters())
    aim.prepare(4)
    assert torch.equal(aim.read(slots)["prompt_embeds"], found)  # a resumed step makes the same
    other = Robust(training)
    other.restore(aim.state())
    assert torch.equal(other.read(slots)["prompt_embeds"], found)
    asked, answers, _ = placed(aim)
    moved_rows = asked[:400] > aim.empty
    assert set(asked[:400][moved_rows].tolist()) == set(slots.tolist())
    assert 0.4 < moved_rows.double().mean().item() < 0.6 and (asked[400:] == answers[400:]).all()


def test_the_loop_asks_trains_and_resumes_with_attacked_conditionings(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    small = {
        "data__forget_samples": 3, "data__retain_samples": 3, "data__sampling_steps": 1, "overwrite__steps": 4,
        "overwrite__batch_size": 5, "overwrite__retain_batch_size": 1, "overwrite__pool": 3,
        "overwrite__checkpoint_every": 1, "seed": torch.randint(1000, ()).item(),
    }  # fmt: skip
    # Of 15 samples none is attacked, or none an anchor, once in 30,000 runs.
    attacked = {
        "attacked": 2, "attacked_share": 0.5, "anchors": 0.5, "attack_every": 1, "attack_steps": 1, "drawing_steps": 1,
    }  # fmt: skip

    def made(options: dict, output: Path | None = None, **arguments: bool) -> list[torch.Tensor]:
        config = Config.of("robust", **small, options=options).without_ignored()
        adapter = fade.unlearn(
            tiny_pipeline(tokenizer), concept=CONCEPT, config=config, output=output, progress=False, **arguments
        )
        return [p.detach().clone() for p in adapter.parameters()]

    whole = made(attacked)
    with interrupted_after(2):
        made(attacked, tmp_path)
    resumed = made(attacked, tmp_path, resume=True)
    assert all(map(torch.equal, whole, resumed))
    for name, value in {"attacked": 0, "anchors": 0.0}.items():
        other = made({**attacked, name: value})
        assert not all(map(torch.equal, whole, other)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": 1.5}, r"options.anchors must be in \[0, 1\], not 1.5: it is a share"),
        ({"anchor_times": 0.0}, r"options.anchor_times must be in \(0, 1\], not 0.0"),
        ({"attacked": 4, "anchors": 0.9}, "together at most 1, not 0.9 and 0.25"),
        ({"attacked": -1}, "options.attacked must be from 0 to 1024"),
        ({"attack_every": 0}, "options.attack_every must be from 1 to 1000"),
        ({"bound": 0.0}, r"options.bound must be in \(0, 1000\)"),
        ({"overshoot": -1.0}, r"options.overshoot must be in \[0, 1000\)"),
    ],
)
def test_options_out_of_range_are_told(options: dict, message: str) -> None:
    with pytest.raises(FadeError, match=message):
        Config.of("robust", options=options)


def test_targets_by_kind_are_the_layers_of_that_kind(pipeline: StableDiffusionPipeline) -> None:
    backbone = backbone_for(pipeline)

    def named(*targets: str) -> set[str]:
        config = with_targets(backbone, Config().replace(locate__targets=targets))
        return set(target_layers(backbone.denoiser, config.locate.targets))

    layers = target_layers(backbone.denoiser)
    attention = {name for name in layers if re.search(r"\.attn\d\.to_(q|k|v|out\.0)$", name)}
    convolutions = {name for name, layer in layers.items() if isinstance(layer, torch.nn.Conv2d)}
    assert attention and convolutions and attention | convolutions < set(layers)
    assert named("attention") == attention and named("all") == set(layers)
    assert named("beyond-attention") == set(layers) - attention
    assert named("convolutions", "attn2.to_k") == convolutions | {n for n in layers if n.endswith("attn2.to_k")}


def test_a_kind_of_layers_that_a_family_has_not_is_told() -> None:
    backbone = backbone_for(build("FLUX.1"))
    with pytest.raises(FadeError, match="the targets name convolutions, and .* has none; name others, or all"):
        with_targets(backbone, Config.of("robust", locate__targets=["convolutions"]))


@pytest.mark.parametrize("family", ["FLUX.1", "Z-Image"])
def test_it_takes_flow_matching_and_prompts_of_their_own_lengths(family: str) -> None:
    config = Config.of(
        "robust", data__forget_samples=2, data__retain_samples=2, data__sampling_steps=1, overwrite__steps=2,
        overwrite__batch_size=2, overwrite__retain_batch_size=1, locate__targets=("attention",),
        options={"attacked": 2, "attack_every": 1, "attack_steps": 1, "drawing_steps": 1},
    )  # fmt: skip
    adapter = fade.unlearn(build(family), "cat", "dog", templates=["a {}"], retain=["a tree"], config=config)
    changes = [parameter.detach() for parameter in adapter.parameters()]
    assert all(one.isfinite().all() for one in changes) and any(one.any() for one in changes)
    assert all(loss > 0 for loss in adapter.run["losses"]["forget"])
