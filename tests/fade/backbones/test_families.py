"""Every family, on a tiny random pipeline: what is told the denoiser is what the pipeline tells it, and a whole run.

A new family is an entry in `pipelines.FACTORIES`; all of these run for it.
"""

import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from PIL import Image

import fade
from fade.backbones import FAMILIES, Backbone, backbone_for
from fade.base_model import fingerprint, target_layers
from fade.closed_form import TextPairs, TextPrompts, token_statistics
from fade.conditioning import Conditioning, EncodedPrompts
from fade.config import Config
from fade.errors import FadeError
from fade.modes import out_of_inference_mode

from .pipelines import FACTORIES, build, cast

NAMES = [family.name for family in FAMILIES]
PROMPTS = ["a cat in the house", "van gogh"]


def test_every_family_has_a_pipeline_here() -> None:
    assert sorted(FACTORIES) == sorted(NAMES)


@pytest.fixture(params=NAMES)
def pipeline(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture
def backbone(pipeline: Any) -> Backbone:
    backbone = backbone_for(pipeline)
    backbone.denoiser.requires_grad_(False)
    return backbone


def noised(backbone: Backbone, count: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents of the family's shape, noised latents, and their times."""
    clean = backbone.sample_latents(PROMPTS[:1], [3], steps=1).expand(count, -1, -1, -1)
    times = backbone.draw_times(count, torch.Generator().manual_seed(0), 0.2, 0.8)
    return clean, backbone.add_noise(clean, torch.randn_like(clean), times), times


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_prediction_is_the_pipelines_own_first_step(
    backbone: Backbone, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sign, time, packing, positions and prompt at once: what the scheduler is given in the first step."""
    pipeline, seen = cast(backbone.pipeline, dtype), []
    step = pipeline.scheduler.step

    def recorded(output: torch.Tensor, timestep: Any, sample: torch.Tensor, *rest: Any, **named: Any) -> Any:
        seen.append((output.clone(), torch.as_tensor(timestep).clone(), sample.clone()))
        return step(output, timestep, sample, *rest, **named)

    monkeypatch.setattr(pipeline.scheduler, "step", recorded)
    conditioning = backbone.encode_prompts(PROMPTS[:1])
    guidance = backbone.guidance if backbone.tells_guidance else 1.0
    backbone.sample_latents(conditioning, [5], steps=3, guidance_scale=guidance)
    for index in (0, len(seen) - 1):
        output, timestep, sample = seen[index]
        given = {"latents": sample, "answer": output}
        if backbone.family.kind == "flow":
            time = timestep.reshape(1).float() / pipeline.scheduler.config.num_train_timesteps
            side = backbone.side(None)
            given = {name: backbone.family.unpack_result(backbone, value, side) for name, value in given.items()}
            level = backbone.add_noise(torch.zeros_like(sample), torch.ones_like(sample), time)
            # Some schedulers tell the denoiser whole thousandths.
            near = 1e-5 if timestep.is_floating_point() else 1e-3
            wanted = pipeline.scheduler.sigmas[index].expand_as(level).to(level.dtype)
            torch.testing.assert_close(level, wanted, rtol=1e-5, atol=near)
        else:
            time = timestep.reshape(1).long()
        with torch.no_grad():
            found = backbone.predict(given["latents"].to(backbone.dtype), time, conditioning)
        # Of the whole: the times may differ by a last bit, and in bfloat16 single elements by the rounding of others.
        answer = given["answer"].to(found.dtype)
        error = ((found - answer).double().norm() / answer.double().norm()).item()
        assert error <= (2e-4 if dtype == torch.float32 else 2e-2)


def test_pictures_go_to_latents_and_back_by_one_affine_map(backbone: Backbone) -> None:
    vae, family = backbone.pipeline.vae, backbone.family
    images = [Image.effect_noise((40, 30), 80).convert("RGB")] * 2
    latents = backbone.encode_images(images, None, torch.Generator().manual_seed(0))
    drawn = backbone.sample_latents(PROMPTS, [0, 1], steps=1)
    assert latents.shape == drawn.shape and latents.dim() == 4
    there = family.vae.denormalise(vae, latents)
    torch.testing.assert_close(family.vae.normalise(vae, there), latents, rtol=1e-5, atol=1e-5)
    decoded = backbone.decode(latents)
    assert decoded.shape == (2, 3, backbone.side(None), backbone.side(None))
    assert torch.isfinite(decoded).all() and 0 <= decoded.min() and decoded.max() <= 1


def test_latents_are_the_ones_that_the_pipeline_decodes(backbone: Backbone) -> None:
    conditioning = backbone.encode_prompts(PROMPTS[:1])
    arguments = backbone.family.call(backbone, conditioning, backbone.negative(), 1.0)
    side = backbone.side(None)
    with backbone.family.guided(backbone, 1.0):
        theirs = backbone.pipeline(
            **arguments, num_inference_steps=2, height=side, width=side, output_type="pt",
            generator=[torch.Generator().manual_seed(7)],
        )[0]  # fmt: skip
    ours = backbone.decode(backbone.sample_latents(conditioning, [7], steps=2, guidance_scale=1.0))
    torch.testing.assert_close(ours, theirs.float().reshape(ours.shape), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guided", [False, True])
def test_a_prompt_draws_what_the_pipeline_draws_for_it(backbone: Backbone, guided: bool) -> None:
    """Templates, instructions, lengths, masks and the negative prompt are those of the pipeline's own call."""
    pipeline, side = backbone.pipeline, backbone.side(None)
    guidance = backbone.guidance if guided else 1.0
    embedded = backbone.family.call(backbone, backbone.encode_prompts(PROMPTS[:1]), backbone.negative(), guidance)
    plain = {name: value for name, value in embedded.items() if isinstance(value, (bool, int, float))}
    if "true_cfg_scale" in plain and not backbone.tells_guidance and guided:
        plain["negative_prompt"] = " "  # without one, such a pipeline is not guided at all
    with backbone.family.guided(backbone, guidance):
        theirs = pipeline(
            prompt=PROMPTS[:1], num_inference_steps=2, height=side, width=side, output_type="latent",
            generator=[torch.Generator().manual_seed(7)], **plain,
        )[0]  # fmt: skip
    seen: list[float] = []
    ours = backbone.sample_latents(PROMPTS[:1], [7], steps=2, guidance_scale=guidance, on_step=seen.append)
    theirs = backbone.family.unpack_result(backbone, theirs, side)
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-4, atol=1e-4)
    assert seen == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    "name", ["Z-Image", "CogView4", "FLUX.2 klein", "HiDream-I1", "Kandinsky 5", "HunyuanImage 2.1"]
)
def test_guidance_leads_away_from_the_negative(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At scale g the pipeline steps by n + g (p - n), p and n the answers for the prompt and for the negative."""
    backbone, seen = backbone_for(build(name)), []
    scheduler = backbone.pipeline.scheduler
    step = scheduler.step

    def recorded(output: torch.Tensor, timestep: Any, sample: torch.Tensor, *rest: Any, **named: Any) -> Any:
        seen.append((output.clone(), timestep.clone(), sample.clone()))
        return step(output, timestep, sample, *rest, **named)

    monkeypatch.setattr(scheduler, "step", recorded)
    conditioning = backbone.encode_prompts(PROMPTS[:1])
    backbone.sample_latents(conditioning, [5], steps=2, guidance_scale=2.5)
    output, timestep, sample = seen[1]
    time = timestep.reshape(1).float() / scheduler.config.num_train_timesteps
    side = backbone.side(None)
    latents, output = (backbone.family.unpack_result(backbone, value, side) for value in (sample, output))
    with torch.no_grad():
        positive, negative = (backbone.predict(latents, time, one) for one in (conditioning, backbone.negative()))
    assert (positive - negative).abs().max() > 1e-3
    torch.testing.assert_close(output, negative + 2.5 * (positive - negative), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_batch_of_two_prompts_is_two_batches_of_one(backbone: Backbone) -> None:
    _, latents, times = noised(backbone)
    together = backbone.encode_prompts(PROMPTS)
    both = backbone.predict(latents, times, together)
    for i, prompt in enumerate(PROMPTS):
        alone = backbone.predict(latents[i : i + 1], times[i : i + 1], backbone.encode_prompts([prompt]))
        torch.testing.assert_close(alone, both[i : i + 1], rtol=1e-3, atol=1e-4)
    assert (both[0] - backbone.predict(latents, times, together.rows([1, 0]))[0]).abs().max() > 1e-4


def test_gradient_checkpointing_changes_nothing_and_every_target_has_a_gradient(backbone: Backbone) -> None:
    clean, latents, times = noised(backbone)
    conditioning = backbone.encode_prompts(PROMPTS)
    layers = target_layers(backbone.denoiser, backbone.targets)
    out_of_inference_mode(backbone.denoiser)
    weights = [layer.weight.requires_grad_(True) for layer in layers.values()]

    def run() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        output = backbone.predict(latents, times, conditioning)
        target = backbone.target(clean, torch.ones_like(clean), times)
        return output.detach(), torch.autograd.grad((output - target).square().mean(), weights, allow_unused=True)

    output, gradients = run()
    without = [name for name, g in zip(layers, gradients, strict=True) if g is None or not g.abs().max() > 0]
    assert not without
    if backbone.family.checkpointing:
        backbone.denoiser.enable_gradient_checkpointing()
        again, others = run()
        torch.testing.assert_close(again, output)
        for ours, theirs in zip(gradients, others, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6 * float(ours.abs().max()))


def test_the_layers_that_read_the_prompt_read_what_is_said(backbone: Backbone) -> None:
    """Their input in a forward pass is `text_states`."""
    _, latents, times = noised(backbone)
    conditioning = backbone.encode_prompts(PROMPTS)
    for reader, names in backbone.text_layers().items():
        for row, name in itertools.product(range(len(PROMPTS)), sorted(names)[:3]):
            one = conditioning.rows(row)
            states = backbone.text_states(reader, one)
            layer, seen = backbone.denoiser.get_submodule(name), []
            hook = layer.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
            with torch.no_grad():
                backbone.predict(latents[:1], times[:1], one)
            hook.remove()
            assert layer.weight.shape[1] == states.shape[-1]
            length, padded = states.shape[1], backbone.readers[reader].padded
            read = seen[0].reshape(1, math.ceil(length / padded) * padded, -1)
            torch.testing.assert_close(read[:, :length], states)


@pytest.mark.parametrize("pipeline", ["Qwen-Image"], indirect=True)
def test_one_step_is_refused_where_the_scheduler_would_divide_by_zero(backbone: Backbone) -> None:
    scheduler = backbone.pipeline.scheduler
    backbone.pipeline.scheduler = type(scheduler).from_config(scheduler.config, shift_terminal=0.02)
    assert torch.isfinite(backbone.sample_latents(PROMPTS[:1], [0], steps=2)).all()
    with pytest.raises(FadeError, match="between 2 and"):
        backbone.sample_latents(PROMPTS[:1], [0], steps=1)


@pytest.mark.parametrize(
    ("pipeline", "config", "message"),
    [
        ("PixArt-Sigma", {"use_additional_conditions": True}, "PixArt-Alpha"),
        ("Qwen-Image", {"zero_cond_t": True}, "edits pictures"),
        ("Sana", {"guidance_embeds": True}, "Sana-Sprint"),
        ("HunyuanImage 2.1", {"use_meanflow": True}, "MeanFlow"),
    ],
    indirect=["pipeline"],
)
def test_other_models_with_the_denoiser_of_a_family_are_refused(
    pipeline: Any, config: dict[str, Any], message: str
) -> None:
    assert backbone_for(pipeline).family.name
    transformer = pipeline.transformer
    given = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    pipeline.transformer = type(transformer)(**given | config)
    with pytest.raises(FadeError, match=message):
        backbone_for(pipeline)


@pytest.mark.parametrize(
    ("pipeline", "other"),
    [(one.name, name) for one in FAMILIES for name in one.foreign],
    indirect=["pipeline"],
)
def test_pipelines_of_other_models_are_refused_and_take_adapters(pipeline: Any, other: str, tmp_path: Path) -> None:
    cls = getattr(diffusers, other)
    own = inspect.signature(cls.__init__).parameters
    more = {name: None for name in own if name not in pipeline.components and name != "self"}
    parts = build(backbone_for(pipeline).family.name).components
    foreign = cls(**{name: part for name, part in parts.items() if name in own}, **more)
    with pytest.raises(FadeError, match=f"^{other} "):
        backbone_for(foreign)
    fade.unlearn(
        pipeline, "cat", "dog", templates=["{}"], retain=["a house"], output=tmp_path / "run", progress=False,
        config=quick().replace(overwrite__method="closed-form", closed_form__phrasings=False).without_ignored(),
    )  # fmt: skip
    assert fade.load_adapter(foreign, tmp_path / "run" / "adapter.safetensors").enabled


UNCHECKPOINTED = [one.name for one in FAMILIES if not one.checkpointing]


@pytest.mark.parametrize("pipeline", UNCHECKPOINTED, indirect=True)
def test_checkpointing_that_changes_the_answer_is_refused_for_training(backbone: Backbone) -> None:
    backbone.check_trainable()
    backbone.denoiser.enable_gradient_checkpointing()
    with pytest.raises(FadeError, match=r"transformer.disable_gradient_checkpointing\(\)"):
        backbone.check_trainable()
    backbone.denoiser.disable_gradient_checkpointing()
    backbone.check_trainable()


@pytest.mark.parametrize("pipeline", ["FLUX.1", "Qwen-Image"], indirect=True)
@pytest.mark.parametrize("chosen", ["_native_cudnn", "sage"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_attention_without_right_gradients_is_refused_for_training(
    backbone: Backbone, chosen: str, everywhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    processors = [getattr(module, "processor", None) for module in backbone.denoiser.modules()]
    last = [processor for processor in processors if hasattr(processor, "_attention_backend")][-1]
    # What set_attention_backend does, here or on another pipeline's model, which asks for the package or a GPU.
    if everywhere:
        monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName(chosen))
    else:
        last._attention_backend = chosen
    with pytest.raises(FadeError, match=rf"computed by {chosen}, .*\.set_attention_backend\(.native.\) first"):
        backbone.check_trainable()
    backbone.denoiser.set_attention_backend("native")
    backbone.check_trainable()


def test_latents_are_drawn_without_text_encoders_when_prompts_are_encoded(backbone: Backbone) -> None:
    """As on a GPU, where they leave meanwhile."""
    pipeline = backbone.pipeline
    encoded, negative = backbone.encode_prompts(PROMPTS), backbone.negative()
    drawn = backbone.sample_latents(encoded, [0, 1], steps=2)
    config, parts = dict(pipeline.config), dict(pipeline.components)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(backbone), "negative", lambda self: negative)
        with backbone._hidden(name for name in parts if name.startswith("text_encoder")):
            assert torch.equal(backbone.sample_latents(encoded, [0, 1], steps=2), drawn)
    assert dict(pipeline.config) == config and pipeline.components == parts


def test_sides_that_latents_cannot_have_are_refused_before_anything_is_drawn(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = backbone.side(None)
    for wrong in (own + 1, 3, 100_000):
        with pytest.raises(FadeError, match=f"not (of )?{wrong}"):
            backbone.side(wrong)
    monkeypatch.setattr(type(backbone.pipeline), "__call__", lambda *_, **__: pytest.fail("drawn"))
    config = Config().replace(data__resolution=own + 1, overwrite__method="distillation")
    with pytest.raises(FadeError, match=f"not (of )?{own + 1}"):
        fade.unlearn(backbone.pipeline, "van gogh", "cat", config=config, progress=False)


def test_a_concept_behind_what_the_encoder_reads_is_refused_before_anything_is_drawn(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(backbone.pipeline), "__call__", lambda *_, **__: pytest.fail("drawn"))
    template = " ".join(["house"] * 1100) + " {}"
    with pytest.raises(FadeError, match="reads the prompt .* and its surrogate as the same"):
        fade.unlearn(
            backbone.pipeline, "van", "gogh", templates=[template], retain=["a cat"],
            config=Config().replace(overwrite__method="distillation"), progress=False,
        )  # fmt: skip


LIMITED = ["Stable Diffusion 3/3.5", "AuraFlow"]


@pytest.mark.parametrize("pipeline", LIMITED, indirect=True)
def test_a_side_beyond_the_table_of_positions_is_refused(backbone: Backbone) -> None:
    most = backbone.family.largest(backbone)
    assert backbone.sample_latents(PROMPTS[:1], [0], steps=1, resolution=most).isfinite().all()
    with pytest.raises(FadeError, match=f"up to {most}, not"):
        backbone.sample_latents(PROMPTS[:1], [0], steps=1, resolution=most + backbone.family.multiple(backbone))


MASKED = [
    one.name for one in FAMILIES if not callable(one.readers) and any(reader.mask for reader in one.readers.values())
]


def test_token_ids_are_those_of_the_tokens_that_are_read(backbone: Backbone) -> None:
    """As many as there are, where padding is masked or left out; templates and instructions count."""
    for reader, one in backbone.readers.items():
        for prompt, row in zip(PROMPTS, map(backbone.encode_prompts, ([prompt] for prompt in PROMPTS)), strict=True):
            tokens = backbone.text_states(reader, row).shape[1]
            segments = backbone.token_ids([prompt], reader)[0]
            assert len(segments) == len(one.segments)
            if (attended := backbone.attended(reader, row)) is not None:
                tokens = int(attended.sum())
            elif all(isinstance(value, torch.Tensor) for value in row.values()):
                continue
            assert sum(len(ids) for ids, _ in segments) == tokens


@pytest.mark.parametrize("pipeline", MASKED, indirect=True)
def test_tokens_that_are_masked_out_change_neither_the_picture_nor_the_closed_form(backbone: Backbone) -> None:
    _, latents, times = noised(backbone)
    prompts = ("a photo of cat", "a red dog", "a house")
    plain = backbone.encode_prompts(prompts)
    for reader, one in backbone.readers.items():
        if one.mask is None:
            continue
        masked = plain[one.mask] == 0
        assert masked.any(1).all() and not masked.all(1).any()
        noise = torch.randn_like(plain["prompt_embeds"]) * masked[..., None]
        other = Conditioning({**plain, "prompt_embeds": plain["prompt_embeds"] + noise})
        with torch.no_grad():
            answers = [backbone.predict(latents, times, rows.rows([0, 1])) for rows in (plain, other)]
        torch.testing.assert_close(*answers)
        text = TextPrompts([TextPairs([prompts[:2]])], prompts[2:])
        found = [token_statistics(backbone, reader, text, EncodedPrompts(prompts, rows)) for rows in (plain, other)]
        torch.testing.assert_close(found[0].change, found[1].change)
        torch.testing.assert_close(found[0].retain, found[1].retain)
        assert found[0].change.abs().max() > 0


def quick() -> Config:
    return Config().replace(
        data__forget_samples=2, data__retain_samples=2, data__sampling_steps=1, locate__batch_size=2,
        locate__keep=0.1, overwrite__steps=3, overwrite__batch_size=2, overwrite__retain_batch_size=2,
        overwrite__method="distillation", overwrite__stop_forget=0.0, overwrite__learning_rate=0.1,
        overwrite__pool=2,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["distillation", "closed-form"])
def test_a_whole_run(pipeline: Any, method: str, tmp_path: Path) -> None:
    """Unlearn, save, load into a fresh pipeline, merge and unmerge bit for bit; at scale 0 the base answers."""
    backbone = backbone_for(pipeline)
    config = quick().replace(overwrite__method=method).without_ignored()
    _, latents, times = noised(backbone)
    conditioning = backbone.encode_prompts(["a picture of cat"])

    def answer(backbone: Backbone) -> torch.Tensor:
        with torch.no_grad():
            return backbone.predict(latents[:1], times[:1], conditioning)

    base, before = answer(backbone), fingerprint(backbone.denoiser)
    adapter = fade.unlearn(
        pipeline, "cat", "dog", templates=["a picture of {}", "{}"], retain=["a house", "a red car"],
        config=config, output=tmp_path / "run", progress=False,
    )  # fmt: skip
    edited = answer(backbone)
    assert (edited - base).abs().max() > 1e-5
    adapter.scale = 0.0
    torch.testing.assert_close(answer(backbone), base, rtol=1e-5, atol=1e-6)
    adapter.scale = 1.0
    adapter.merge()
    torch.testing.assert_close(answer(backbone), edited, rtol=1e-3, atol=1e-4)
    adapter.unmerge()
    adapter.disable()
    assert fingerprint(backbone.denoiser) == before and torch.equal(answer(backbone), base)

    other = build(backbone.family.name)
    loaded = fade.load_adapter(other, tmp_path / "run" / "adapter.safetensors")
    torch.testing.assert_close(answer(backbone_for(other)), edited, rtol=1e-4, atol=1e-5)
    assert loaded.metadata["component"] == backbone.family.component
