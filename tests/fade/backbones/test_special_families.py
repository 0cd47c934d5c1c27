"""What only some families have: padding in front of a prompt, templates around it, fixed sizes, routed experts, latents
that are patches, guidance by a part of the pipeline."""

import copy
import itertools

import diffusers
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from fade.backbones import Backbone, backbone_for
from fade.backbones.families.flux2 import STEPS
from fade.errors import FadeError

from .pipelines import build
from .tokenizers import VOCABULARY

PADDING = (VOCABULARY["<pad>"], VOCABULARY["</s>"])

CAUSAL = {
    "Z-Image": ("prompt",), "CogView4": ("prompt",), "FLUX.2": ("prompt",), "FLUX.2 klein": ("prompt",),
    "HiDream-I1": ("llama.0", "llama.1"), "Kandinsky 5": ("prompt",),
    "HunyuanImage 2.1": ("prompt",),
}  # fmt: skip
"""Readers of what a language model makes of a prompt, which knows of a token and those before it."""


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("words", [("a cat in the house", "a dog in the house"), ("two red", "two red and a blue car")])
def test_token_ids_are_those_of_the_states(name: str, words: tuple[str, str]) -> None:
    """The states of two prompts differ from the first token on that differs, padding and template counted in."""
    backbone = backbone_for(build(name))
    conditioning = backbone.encode_prompts(words)
    for reader in CAUSAL[name]:
        (((first, _),), ((second, _),)) = backbone.token_ids(words, reader)
        position = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
        states = [backbone.text_states(reader, conditioning.rows(row))[0] for row in range(2)]
        assert min(map(len, states)) > position
        length = min(map(len, states))
        apart = (states[0][:length] - states[1][:length]).abs().amax(1)
        before = [i for i in range(position) if first[i] not in PADDING]  # padding in front may see everything
        assert apart[position] > 1e-3 and all(apart[i] < 1e-5 for i in before)


def test_left_padding_goes_up_to_sixteen_tokens() -> None:
    backbone = backbone_for(build("CogView4"))
    words = ["a cat", " ".join(["red"] * 20)]
    conditioning = backbone.encode_prompts(words)
    assert [len(backbone.text_states("prompt", conditioning.rows(i))[0]) for i in range(2)] == [16, 32]
    assert [len(segments[0][0]) for segments in backbone.token_ids(words, "prompt")] == [16, 32]


@pytest.mark.parametrize("name", ["HiDream-I1", "Kandinsky 5"])
def test_other_sizes_than_the_pipeline_draws_are_refused(name: str) -> None:
    backbone = backbone_for(build(name))
    assert backbone.side(None) == backbone.side(16) == 16
    with pytest.raises(FadeError, match=f"{name} draws squares of 16 pixels, not of 32"):
        backbone.side(32)


def test_a_denoiser_that_needs_a_picture_is_refused() -> None:
    pipeline = build("Kandinsky 5")
    pipeline.transformer.register_to_config(visual_cond=True)
    with pytest.raises(FadeError, match="needs a picture beside the prompt"):
        backbone_for(pipeline)


def test_gradients_go_through_routed_experts() -> None:
    """They are those of the branch that the denoiser has for its own training; the answer is that of drawing."""
    pipeline = build("HiDream-I1")
    theirs = copy.deepcopy(pipeline.transformer.double_stream_blocks[0].block.ff_i)
    backbone_for(pipeline)
    ours = pipeline.transformer.double_stream_blocks[0].block.ff_i
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drawn = theirs(x)
        assert torch.equal(ours(x), drawn)
    theirs.train()
    theirs._force_inference_output = False
    gradients = []
    for module in (ours, theirs):
        given = x.clone().requires_grad_()
        answer = module(given)
        torch.testing.assert_close(answer, drawn, rtol=1e-4, atol=1e-5)
        weights = [module.experts[1].w2.weight, module.gate.weight]
        gradients.append(torch.autograd.grad(answer.sin().sum(), [given, *weights]))
    for own, reference in zip(*gradients, strict=True):
        assert reference.abs().max() > 1e-4
        torch.testing.assert_close(own, reference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tokens", [16, 1024, 4096, 4301, 9000])
def test_noise_levels_of_flux2_are_those_of_its_pipeline(tokens: int) -> None:
    backbone = backbone_for(build("FLUX.2 klein"))
    assert backbone.family.shift(backbone, tokens) == pytest.approx(compute_empirical_mu(tokens, STEPS), rel=1e-6)


def test_patches_are_those_of_flux2s_pipeline() -> None:
    pipeline = build("FLUX.2")
    backbone = backbone_for(pipeline)
    encoded = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    patches = pipeline._patchify_latents(encoded)
    norm = pipeline.vae.bn
    wanted = torch.nn.functional.batch_norm(
        patches, norm.running_mean, norm.running_var, eps=pipeline.vae.config.batch_norm_eps
    )
    vae = backbone.family.vae
    torch.testing.assert_close(vae.normalise(pipeline.vae, encoded), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.denormalise(pipeline.vae, wanted), encoded, rtol=1e-4, atol=1e-5)


def test_pipelines_of_another_purpose_are_of_the_family_whose_encoder_they_have() -> None:
    """Both models of FLUX.2 have parts of the same names; what one was told stays told."""
    given = build("FLUX.2 klein")
    other = diffusers.Flux2KleinInpaintPipeline(**given.components, is_distilled=True)
    backbone: Backbone = backbone_for(other)
    assert backbone.family.name == "FLUX.2 klein" and backbone.guidance == 1.0
    assert backbone_for(given).guidance == 4.0


def test_z_image_draws_without_guidance_where_it_was_distilled() -> None:
    pipeline = build("Z-Image")
    assert backbone_for(pipeline).guidance == 1.0
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    assert backbone_for(pipeline).guidance == 5.0


def test_times_that_are_shares_are_noised_as_the_scheduler_shifts_them() -> None:
    """CogView4: the denoiser is told u, and sees σ = μ u / (1 + (μ − 1) u); drawn and inverted alike."""
    backbone = backbone_for(build("CogView4"))
    clean = torch.zeros(3, 4, 8, 8)
    share = torch.tensor([0.0, 0.3, 1.0])
    mu = 0.25 + 0.75 * (16 / 256) ** 0.5
    noised = backbone.add_noise(clean, torch.ones_like(clean), share)
    torch.testing.assert_close(noised[:, 0, 0, 0], mu * share / (1 + (mu - 1) * share))
    prompts = backbone.encode_prompts(["a cat"])
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    there = backbone.ode(start, prompts, 40)
    assert (there - start).abs().max() > 0.1
    back = backbone.ode(there, prompts, 40, invert=True)
    assert (back - start).norm() < 0.1 * (there - start).norm()


QUOTED = 'a red car and "cat"'


def test_a_picture_does_not_depend_on_a_quoted_text_beside_it() -> None:
    """HunyuanImage 2.1 guides a batch with a quoted text by another guider."""
    pipeline = build("HunyuanImage 2.1")
    pipeline.ocr_guider = pipeline.ocr_guider.new(adaptive_projected_guidance_start_step=0)
    backbone = backbone_for(pipeline)
    prompts = ["a cat", QUOTED]
    together = backbone.sample_latents(prompts, [0, 1], steps=3)
    for index, prompt in enumerate(prompts):
        alone = backbone.sample_latents([prompt], [index], steps=3)
        torch.testing.assert_close(alone[0], together[index], rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            theirs = pipeline(
                prompt=[prompt], num_inference_steps=3, height=16, width=16, output_type="latent",
                generator=[torch.Generator().manual_seed(index)],
            )[0]  # fmt: skip
        torch.testing.assert_close(alone, theirs, rtol=1e-4, atol=1e-5)
    unquoted = backbone.sample_latents([QUOTED.replace('"', "")], [1], steps=3)
    assert (unquoted[0] - together[1]).abs().max() > 1e-3


def test_the_guiders_of_a_pipeline_stay_as_they_are() -> None:
    pipeline = build("HunyuanImage 2.1")
    guiders = pipeline.guider, pipeline.ocr_guider
    backbone = backbone_for(pipeline)
    assert backbone.guidance == 3.5
    guided = [backbone.sample_latents(["a cat"], [0], steps=2, guidance_scale=scale) for scale in (1.0, 3.5, 5.0)]
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.pairwise(guided))
    assert (pipeline.guider, pipeline.ocr_guider) == guiders and pipeline.guider.guidance_scale == 3.5
    pipeline.guider = pipeline.ocr_guider = None
    assert backbone.guidance == 1.0
    torch.testing.assert_close(backbone.sample_latents(["a cat"], [0], steps=2), guided[0])
    torch.testing.assert_close(backbone.sample_latents(["a cat"], [0], steps=2, guidance_scale=5.0), guided[2])
    assert pipeline.guider is pipeline.ocr_guider is None
