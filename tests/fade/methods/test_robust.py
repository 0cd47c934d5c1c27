"""Robust distillation: what is asked, what is answered and what an attack makes, written out with the UNet itself."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.testing import assert_close

import fade
from fade.config import Config
from fade.digitcanvas import load_pipeline
from fade.errors import FadeError
from fade.latents import Latents
from fade.methods.robust import Options, Robust
from fade.noise import step_generator
from fade.objective import Batch, Objective, Training
from tests.fade.conftest import tiny_pipeline
from tests.fade.test_unlearning import interrupted_after

from .conftest import CONCEPT, asker, batch_of, target_of, training_of

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
QUIET = {"redrawn": False, "anchors": 0.0, "empty": 0.0}


def placed(aim: Robust, forget: int = 400, retain: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch of the concept's first prompt and the first retained one, at the last time, as the objective asks it."""
    prompts = aim.training.prompts
    row, answer, kept = (prompts.rows([text]) for text in ("a cat", "a dog", "a house"))
    asked, answers = torch.cat([row.repeat(forget), kept.repeat(retain)]), torch.cat([answer.repeat(forget), kept.repeat(retain)])
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
    texts = pipeline.tokenizer("", padding="max_length", max_length=pipeline.tokenizer.model_max_length, return_tensors="pt")
    wanted = pipeline.text_encoder(texts.input_ids)[0]
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


def test_the_loop_asks_trains_and_resumes_with_attacked_conditionings(tmp_path: Path) -> None:
    small = {
        "data__forget_samples": 3, "data__retain_samples": 3, "data__sampling_steps": 1, "overwrite__steps": 6,
        "overwrite__batch_size": 2, "overwrite__retain_batch_size": 2, "overwrite__pool": 3,
        "overwrite__checkpoint_every": 1, "seed": torch.randint(1000, ()).item(),
    }  # fmt: skip
    attacked = {"attacked": 2, "attacked_share": 0.25, "attack_every": 2, "attack_steps": 1, "drawing_steps": 1}

    def made(options: dict, output: Path | None = None, **arguments: bool) -> list[torch.Tensor]:
        config = Config.of("robust", **small, options=options)
        adapter = fade.unlearn(
            tiny_pipeline(), concept=CONCEPT, config=config, output=output, progress=False, **arguments
        )
        return [p.detach().clone() for p in adapter.parameters()]

    whole = made(attacked)
    with interrupted_after(3):
        made(attacked, tmp_path)
    resumed = made(attacked, tmp_path, resume=True)
    assert all(map(torch.equal, whole, resumed))
    for name, value in {"attacked": 0, "anchors": 0.0, "redrawn": False, "empty": 0.0}.items():
        other = made({**attacked, name: value})
        assert not all(map(torch.equal, whole, other)), name
