"""How methods weigh both losses and make a step's gradient, and which layers they take."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch.testing import assert_close
from transformers import CLIPTokenizer

import fade
from fade.backbones import backbone_for
from fade.base_model import target_layers
from fade.config import Config
from fade.errors import FadeError
from fade.latents import prepare_latents
from fade.methods.attention import beside_cross_attention, cross_attention, keys_and_values
from fade.methods.erasediff import Bilevel, Options
from fade.noise import epoch_order, step_generator
from fade.objective import Objective
from fade.saliency import gradient_sums, measure_saliency
from tests.fade.backbones.pipelines import build
from tests.fade.conftest import same_bits, tiny_pipeline
from tests.fade.test_unlearning import WORDS, interrupted_after, tensors

from .conftest import CONCEPT, training_of


def bilevel(barrier: str, parameters: list[torch.nn.Parameter], steps: int = 2, eta: float = 0.3) -> Bilevel:
    aim = object.__new__(Bilevel)
    aim.options = Options(inner_steps=steps, barrier=barrier, eta=eta)
    aim.adapter = SimpleNamespace(parameters=lambda: parameters)
    aim.config = Config.of("erasediff").replace(overwrite__learning_rate=0.05).overwrite
    return aim


@pytest.mark.parametrize("barrier", ["value", "cosine", "fixed"])
@pytest.mark.parametrize("conflict", [-1.0, 1.0])
def test_erasediffs_step(barrier: str, conflict: float) -> None:
    parameters = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2, 2))]
    goal = [torch.randn(3), torch.randn(2, 2)]
    start = [p.detach().clone() for p in parameters]

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        forget = sum((p - g).square().sum() for p, g in zip(parameters, goal, strict=True))
        pairs = zip(parameters, goal, start, strict=True)
        retain = sum((p - s - conflict * (g - s)).square().sum() for p, g, s in pairs)
        return forget, retain

    def learn(of_forget: float, of_retain: float) -> tuple[float, float]:
        for parameter in parameters:
            parameter.grad = None
        forget, retain = losses()
        (of_forget * forget + of_retain * retain).backward()
        return forget.item(), retain.item()

    found = bilevel(barrier, parameters).step(learn, (0.7, 1.0))
    assert all(map(torch.equal, parameters, start))
    assert found == pytest.approx([loss.item() for loss in losses()], rel=1e-6)
    made = torch.cat([p.grad.flatten() for p in parameters])

    q_grad, r_grad = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in losses()
    )  # fmt: skip
    if barrier == "fixed":
        weight = 0.7
    elif barrier == "cosine":
        weight = max(0.0, 0.3 - F.cosine_similarity(q_grad, r_grad, dim=0).item())
    else:
        inner = torch.cat([s.flatten() for s in start]).requires_grad_(True)
        aim, optimizer = torch.cat([g.flatten() for g in goal]), torch.optim.Adam([inner], 0.05)
        for _ in range(2):
            optimizer.zero_grad()
            (inner - aim).square().sum().backward()
            optimizer.step()
        gap = losses()[0].item() - (inner - aim).square().sum().item()
        assert gap > 0
        weight = max(0.0, 0.3 * gap - (q_grad @ r_grad).item()) / q_grad.square().sum().item()
    assert_close(made, r_grad + weight * q_grad, rtol=1e-4, atol=1e-4)
    assert (weight > 0) or conflict == 1.0


def test_dual_ascent_of_the_forget_weight() -> None:
    aim = object.__new__(Objective)
    aim.config = Config.of("primal-dual").replace(overwrite__dual_rate=0.5, overwrite__dual_bound=0.2).overwrite
    losses, dual = [4.0, 2.0, 0.4, 0.1, 0.1, 8.0], 0.0
    for done in range(len(losses)):
        assert aim.weights(losses[:done], losses[:done]) == (pytest.approx(dual), 1.0)
        dual = max(dual + 0.5 * (losses[done] / losses[0] - 0.2), 0.0)
    aim.config = Config.of("distillation").overwrite
    assert aim.weights(losses, losses) == (0.3, 1.0)


def test_saluns_saliency_is_the_magnitude_of_the_summed_guided_gradients(
    pipeline: StableDiffusionPipeline, quick: Config
) -> None:
    training = training_of(pipeline, "salun")
    training.adapter.remove()
    backbone, prompts = training.backbone, training.prompts
    config = quick.replace(locate__saliency="guided", locate__guidance=3.0, locate__passes=2).locate
    latents = prepare_latents(backbone, CONCEPT, quick.data, 0, "base")
    layers = target_layers(backbone.denoiser, ("attn1.to_v", "conv1"))
    found = measure_saliency(backbone, layers, latents, prompts, config, 0)
    sums = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
    empty = backbone.encode_prompts([""])
    for batch in range(4):
        index, generator = epoch_order(0, "locate forget", 6, batch, 4), step_generator(0, "locate forget", batch)
        z = latents.forget[index]
        noise = torch.randn(z.shape, generator=generator)
        t = torch.randint(backbone.time_span, (4,), generator=generator)
        noised = pipeline.scheduler.add_noise(z, noise, t)
        read = prompts.conditioning.rows(prompts.rows(latents.forget_prompts)[index])
        guided = 4 * backbone.predict(noised, t, read) - 3 * backbone.predict(noised, t, empty.repeat(4))
        for total, gradient in zip(sums.values(), torch.autograd.grad(F.mse_loss(guided, noise), weights), strict=True):
            total += gradient
    for name, total in sums.items():
        assert_close(found[name].view_as(total), total.abs(), rtol=2e-3, atol=1e-5)


def test_squared_gradients_are_the_fisher_information(pipeline: StableDiffusionPipeline, quick: Config) -> None:
    training = training_of(pipeline, "salun")
    training.adapter.remove()
    backbone, clean = training.backbone, training.latents.retain
    layers = target_layers(backbone.denoiser, ("attn2.to_k",))
    rows, config = training.prompts.rows(training.latents.retain_prompts), quick.replace(locate__batch_size=3).locate
    found = gradient_sums(backbone, layers, clean, rows, training.prompts, config, 7, "all", mode="square")
    once = [
        gradient_sums(backbone, layers, clean, rows, training.prompts, config, 7, "all", mode="abs", batches=count)
        for count in (1, 2)
    ]
    for name in layers:
        first, second = once[0][name], once[1][name] - once[0][name]
        assert_close(found[name], first.square() + second.square(), rtol=1e-3, atol=1e-9)


def test_cross_attention_and_what_is_beside_it(pipeline: StableDiffusionPipeline) -> None:
    backbone = backbone_for(pipeline)
    crossed, read = cross_attention(backbone), keys_and_values(backbone)
    linears = {name for name in target_layers(backbone.denoiser) if ".attn2." in name}
    assert set(crossed) == linears and set(read) == {n for n in linears if n.endswith(("to_k", "to_v"))}
    assert set(beside_cross_attention(backbone)) == set(target_layers(backbone.denoiser)) - linears


@pytest.mark.parametrize("name", ["esd-x", "concept-ablation"])
def test_a_family_without_cross_attention_is_told_why(name: str) -> None:
    with pytest.raises(FadeError, match="FLUX.* has no cross-attention.* choose another method"):
        fade.unlearn(build("FLUX.1"), "cat", "dog", method=name)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("FLUX.1", "esd-u"), ("FLUX.1", "leco"), ("Stable Diffusion 3/3.5", "retrack"), ("Qwen-Image", "leco"),
        ("PixArt-Sigma", "concept-ablation"), ("Sana", "esd-x"), ("Stable Diffusion 3/3.5", "salun"),
    ],
)  # fmt: skip
def test_flow_matching_and_transformers_take_methods(family: str, name: str) -> None:
    pipeline = build(family)
    config = Config.of(
        name, data__forget_samples=2, data__retain_samples=2, data__sampling_steps=1, overwrite__steps=1,
        overwrite__batch_size=1, overwrite__retain_batch_size=1,
    )  # fmt: skip
    if name == "leco":
        config = config.replace(options__steps=1)
    adapter = fade.unlearn(
        pipeline, "cat", "dog", templates=["a {}"], retain=["a house"], config=config, progress=False
    )  # fmt: skip
    assert all(p.isfinite().all() for p in adapter.parameters())
    assert all(math.isfinite(loss) for losses in adapter.run["losses"].values() for loss in losses)


@pytest.mark.parametrize("name", ["erasediff", "salun", "primal-dual"])
def test_a_method_is_resumed_to_the_same_end(tokenizer: CLIPTokenizer, quick: Config, tmp_path, name: str) -> None:
    config = quick.replace(overwrite__method=name).without_ignored()
    whole = fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config)
    with interrupted_after(5):
        fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config, output=tmp_path / "out")
    resumed = fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config, output=tmp_path / "out", resume=True)
    assert same_bits(tensors(resumed), tensors(whole))
    assert resumed.run["losses"] == whole.run["losses"]
