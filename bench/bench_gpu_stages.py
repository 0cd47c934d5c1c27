"""Both stages on a model of Stable Diffusion 1.5's size with random weights, against the authors' procedure.

    python -m bench.bench_gpu_stages [--device cuda] [--output FILE]

Ours is `fade.unlearn` as a user calls it; the other is `authors_procedure`, in the same dtype, on the same images. Each
runs once unmeasured, so that neither is charged for compiling. Nothing is downloaded: every part of the pipeline is
made here from its configuration. Needs diffusers.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import environment, print_table, write_json
from bench.plans import Plan, Row
from bench.results_file import Cell

FORGET, SURROGATE, KEEP = "a dog", "a cat", 0.01


@dataclass(frozen=True)
class Scale:
    """How large the model is and how much is done with it.

    Attributes:
        channels: of the UNet's levels; `text`: width of the text encoder, and `layers` of it; `latent`: side.
        images: forget images, and as many retain images; `batch` of each half; `steps` of training.
    """

    channels: tuple[int, ...]
    text: int
    layers: int
    tokens: int
    heads: int
    latent: int
    images: int
    batch: int
    steps: int
    groups: int = 32
    vae: tuple[int, ...] = (128, 256, 512, 512)


SD15 = Scale((320, 640, 1280, 1280), text=768, layers=12, tokens=77, heads=8, latent=64, images=8, batch=4, steps=6)
TOY = Scale((16, 24), 64, 1, 16, 2, latent=8, images=2, batch=2, steps=2, groups=8, vae=(8, 8))
"""Sizes for tests of this program."""


def random_pipeline(scale: Scale, device: torch.device, dtype: torch.dtype) -> Any:
    """A StableDiffusionPipeline of this size with random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from fade.digitcanvas import MODEL_PATH

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(MODEL_PATH / "tokenizer", model_max_length=scale.tokens)
    deep = len(scale.channels) - 1
    with device:
        unet = UNet2DConditionModel(
            sample_size=scale.latent,
            block_out_channels=scale.channels,
            down_block_types=("CrossAttnDownBlock2D",) * deep + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * deep,
            cross_attention_dim=scale.text,
            attention_head_dim=scale.heads,
            norm_num_groups=scale.groups,
        )
        vae = AutoencoderKL(
            block_out_channels=scale.vae,
            down_block_types=("DownEncoderBlock2D",) * len(scale.vae),
            up_block_types=("UpDecoderBlock2D",) * len(scale.vae),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=scale.groups,
            force_upcast=False,
        )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=scale.text,
            intermediate_size=4 * scale.text,
            num_hidden_layers=scale.layers,
            num_attention_heads=max(1, scale.text // 64),
            max_position_embeddings=scale.tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for module in (unet, vae, text_encoder):
        torch.nn.Module.to(module, device, dtype)
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_ours(pipeline: Any, scale: Scale, steps: int) -> dict[str, dict[str, float]]:
    """Seconds and peak bytes of `locate` and `overwrite` through fade's own call."""
    import fade
    from fade.concept import TEMPLATES

    config = fade.Config().replace(
        data__forget_samples=scale.images, data__retain_samples=scale.images, data__sampling_steps=2,
        data__batch_size=scale.images, locate__keep=KEEP, locate__saliency="denoising", locate__passes=1,
        locate__batch_size=scale.batch, overwrite__steps=steps, overwrite__batch_size=scale.batch,
        overwrite__retain_batch_size=scale.batch, overwrite__method="distillation",
        overwrite__stop_forget=0.0, overwrite__pool=0,
    )  # fmt: skip
    adapter = fade.unlearn(pipeline, FORGET, SURROGATE, templates=TEMPLATES, config=config, progress=False)
    run = adapter.run
    adapter.remove()
    stages = ("locate", "overwrite")
    return {stage: {"seconds": run["seconds"][stage], "bytes": run["peak_memory_bytes"][stage]} for stage in stages}


def run_authors(pipeline: Any, scale: Scale, steps: int) -> dict[str, dict[str, float]]:
    """The same of the authors' procedure, which encodes its images in every step."""
    import fade
    from bench import authors_procedure
    from fade.backbones.families import PROJECTIONS
    from fade.concept import concept_from_words
    from fade.measure import measured

    config, device = fade.Config(), pipeline.unet.device
    concept = concept_from_words(FORGET, SURROGATE)
    side = scale.latent * pipeline.vae_scale_factor
    forget, retain = (torch.rand(scale.images, 3, side, side) for _ in range(2))

    def repeated(prompts: tuple[str, ...]) -> list[str]:
        return [prompts[i % len(prompts)] for i in range(scale.images)]

    prompts, surrogates = repeated(concept.forget_prompts), repeated(concept.surrogate_prompts)
    with measured(device) as locating:
        masks = authors_procedure.locate(
            pipeline, forget, prompts, PROJECTIONS, KEEP, 1, scale.batch
        )  # fmt: skip
    with measured(device) as overwriting:
        authors_procedure.overwrite(
            pipeline, masks, (forget, prompts, surrogates), (retain, repeated(concept.retain_prompts)),
            steps=steps, batch=scale.batch, rank=config.overwrite.rank, alpha=config.overwrite.alpha,
            learning_rate=config.overwrite.peak_rate,
        )  # fmt: skip
    found = {"locate": locating, "overwrite": overwriting}
    return {stage: {"seconds": m.seconds, "bytes": m.peak_memory_bytes} for stage, m in found.items()}


PROCEDURES = {"ours": run_ours, "authors": run_authors}


def measure(
    device: torch.device,
    scale: Scale = SD15,
    dtype: torch.dtype = torch.bfloat16,
    beat: Callable[[str], None] = lambda candidate: None,
) -> dict[str, Any]:
    """Each procedure's stages, after an unmeasured run of one step each: {procedure: {stage: {seconds, bytes}}}.

    `beat` is called before every run.
    """
    pipeline = random_pipeline(scale, device, dtype)
    found: dict[str, Any] = {}
    for name, run in PROCEDURES.items():
        beat("")
        run(pipeline, scale, 1)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        beat("")
        found[name] = run(pipeline, scale, scale.steps)
    return found


def plan(scale: Scale = SD15, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """The same as a table: time of both stages, the larger of their peaks, and each stage beside it."""

    def cells(device: torch.device, beat: Callable[[str], None]) -> dict[str, Cell]:
        result: dict[str, Cell] = {}
        for name, stages in measure(device, scale, dtype, beat).items():
            seconds = sum(stage["seconds"] for stage in stages.values())
            result[name] = {
                "median": seconds, "low": seconds, "high": seconds, "fastest": seconds, "repeats": 1,
                "extra_bytes": max(stage["bytes"] for stage in stages.values()), "stages": stages,
            }  # fmt: skip
        return result

    title = f"both stages on a random model of SD 1.5's size, {scale.steps} steps of {scale.batch} + {scale.batch}"
    return Plan("stages", title, "training", "authors", [Row("locate + overwrite", 1, measure=cells, weight=30.0)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    before, found = environment(), measure(torch.device(arguments.device))
    rows = [
        [name, stage, f"{value['seconds']:.3f}", f"{value['bytes'] / 2**20:.0f}"]
        for name, stages in found.items()
        for stage, value in stages.items()
    ]
    print_table(["procedure", "stage", "seconds", "peak MiB"], rows)
    if arguments.output:
        write_json(arguments.output, {"benchmark": "gpu_stages", "environment": before, "stages": found})


if __name__ == "__main__":
    main()
