"""Exported files, read by the loaders that they are for, and by a reader written from the formats' description."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import fade
from fade import cli
from fade.adapter import attach, load_adapter, new_metadata
from fade.adapter_file import read_adapter_file, write_adapter_file
from fade.backbones import backbone_for
from fade.base_model import base_name, fingerprint, target_layers
from fade.concept import concept_from_words
from fade.config import Config
from fade.digitcanvas import MODEL_PATH, load_pipeline
from fade.digitcanvas.models import TEXT_WIDTH, build_scheduler, build_vae
from fade.errors import AdapterFileError, FadeError
from fade.export import FORMATS, export
from fade.export.edit import EXACT, read_edit
from fade.export.merged import RECORD
from fade.export.original_layout import original_state
from fade_kernels import BitMask

from .adapters import ATTENTION, random_adapter
from .conftest import denoise, same_bits, weights
from .portable_reader import merged_state

MIXED = ("attn2.to_k", "attn1.to_v", "ff.net.2", "proj_in", "conv1", "conv_shortcut", "conv_out", "time_emb_proj")
LINEAR = ("attn2.to_k", "attn1.to_v", "to_out.0", "ff.net.2")
FORMS = pytest.mark.parametrize("values", [False, True], ids=["factors", "values"])


def chosen(kind: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    rows, columns = (torch.rand(n, generator=generator) < 0.2 for n in shape)
    rows[int(torch.randint(shape[0], (1,), generator=generator))] = True
    columns[int(torch.randint(shape[1], (1,), generator=generator))] = True
    return {
        "rows": rows[:, None].expand(shape),
        "columns": columns.expand(shape),
        "channel": rows[:, None] | columns,
        "block": rows[:, None] & columns,
        "all": torch.ones(shape, dtype=torch.bool),
        "element": torch.rand(shape, generator=generator) < 0.1,
    }[kind]


def structured(
    pipeline: Any,
    kind: str,
    values: bool,
    targets: tuple[str, ...] | None = MIXED,
    seed: int = 0,
    strength: float = 0.05,
) -> fade.Adapter:
    """A random adapter, on, of masks of a kind."""
    generator = torch.Generator().manual_seed(seed)
    layers = target_layers(pipeline.unet, targets)
    masks = {
        name: BitMask.pack(chosen(kind, (len(m.weight), m.weight[0].numel()), generator)) for name, m in layers.items()
    }
    concept = concept_from_words("cat", "dog")
    metadata = new_metadata(concept, Config(), base_name(pipeline), fingerprint(pipeline.unet), 1.0 if values else 1.5)
    adapter = attach(pipeline, "fade", masks, rank=3, alpha=1.0 if values else 4.5, values=values, metadata=metadata)
    for parameter in adapter.parameters():
        parameter.data = strength ** (1.0 if values else 0.5) * torch.randn(parameter.shape, generator=generator).to(
            parameter
        )
    return adapter.enable()


def deltas(adapter: fade.Adapter) -> dict[str, Tensor]:
    return {f"{name}.weight": layer.get_delta_weight("fade") for name, layer in adapter.layers.items()}


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def record_of(path: Path) -> dict[str, str]:
    """What an exported file or folder says of itself."""
    if (path / RECORD).is_file():
        return json.loads((path / RECORD).read_text(encoding="utf-8"))
    return header(path / "adapter_model.safetensors" if path.is_dir() else path)


def pictures(pipeline: Any) -> Tensor:
    prompts = ["the digit three", "the digit eight in neon style"]
    return torch.stack(list(backbone_for(pipeline).generate(prompts, range(2), 3, 3.0, batch_size=2)))


def close(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() < 1e-5)


# --- LoRA ------------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("kind", ["rows", "columns", "channel", "block", "all"])
def test_structured_masks_are_loras_exactly(
    pipeline: StableDiffusionPipeline, tmp_path: Path, kind: str, values: bool
) -> None:
    base = weights(pipeline)
    adapter = structured(pipeline, kind, values, seed=len(kind))
    adapter.scale = 0.5
    file = tmp_path / "lora.safetensors"
    report = adapter.export(file, "lora", keys="kohya")
    merged, expected = merged_state(file, base), deltas(adapter)
    tensors = load_file(file)
    for key, tensor in base.items():
        if key not in expected:
            assert torch.equal(merged[key], tensor)
            continue
        error = (merged[key] - tensor - expected[key]).abs().max()
        assert error <= 1e-6 * (tensor.abs().max() + expected[key].abs().max())
        rank = len(tensors[f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}.lora_down.weight"])
        assert rank <= min(expected[key].flatten(1).shape)
        if not values:
            assert rank <= 3 * (2 if kind == "channel" else 1)
    assert report.exact and report.error <= EXACT and "exact" in header(file)["fade.exactness"]
    if values and kind != "all":
        # Copies; only kohya's alpha, one for layers of every rank, costs a rounding.
        assert adapter.export(tmp_path / "copies.safetensors").error == 0.0


def test_an_edit_of_low_rank_is_a_lora_of_that_rank(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapter = structured(pipeline, "all", True, ("ff.net.2",))
    for layer in adapter.layers.values():
        n, k = layer.get_base_layer().weight.shape
        product = torch.randn(n, 2, dtype=torch.float64) @ torch.randn(2, k, dtype=torch.float64)
        layer.set_values("fade", BitMask.full((n, k)), product.float().flatten())
    file = tmp_path / "lora.safetensors"
    report = adapter.export(file)
    assert {len(tensor) for key, tensor in load_file(file).items() if "lora_A" in key} == {2}
    assert 0 < max(report.layer_errors.values()) < EXACT


@pytest.mark.parametrize("keys", ["diffusers", "kohya", "peft"])
def test_every_layer_of_the_denoiser_is_found_by_its_name(tmp_path: Path, keys: str) -> None:
    pipeline = load_pipeline()
    adapter = structured(pipeline, "all", False, None, strength=0.01)
    assert len(adapter.layers) > 100
    ours = denoise(pipeline)
    path = tmp_path / ("lora" if keys == "peft" else "lora.safetensors")
    adapter.export(path, "lora", keys=keys)
    other = load_pipeline()
    assert not close(denoise(other), ours)
    if keys == "peft":
        PeftModel.from_pretrained(other.unet, path)
    else:
        other.load_lora_weights(path)
    assert len([m for m in other.unet.modules() if hasattr(m, "lora_A")]) == len(adapter.layers)
    assert close(denoise(other), ours)


@pytest.fixture(scope="module", params=[False, True], ids=["factors", "values"])
def drawn(request: pytest.FixtureRequest) -> tuple[fade.Adapter, Tensor]:
    """An adapter of channel masks, layers of different ranks, and what DigitCanvas draws with it."""
    pipeline = load_pipeline()
    before = pictures(pipeline)
    adapter = structured(pipeline, "channel", request.param)
    ours = pictures(pipeline)
    assert not close(before, ours)
    return adapter, ours


@pytest.mark.parametrize("keys", ["diffusers", "kohya", "peft", "diff"])
def test_pictures_of_channel_masks_are_ours(drawn: tuple[fade.Adapter, Tensor], tmp_path: Path, keys: str) -> None:
    adapter, ours = drawn
    other = load_pipeline()
    file = tmp_path / "exported.safetensors"
    if keys == "peft":
        adapter.export(tmp_path / "lora", keys="peft")
        PeftModel.from_pretrained(other.unet, tmp_path / "lora")
    elif keys == "diff":
        adapter.export(file, "diff")
        other.unet.load_state_dict(merged_state(file, other.unet.state_dict()))
    else:
        adapter.export(file, keys=keys)
        other.load_lora_weights(file)
    assert close(pictures(other), ours)


def test_a_change_that_is_a_rounding_of_its_factors_is_not_called_exact(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    adapter = structured(pipeline, "all", False, ("to_q",))
    for layer in adapter.layers.values():
        lora_a, lora_b = layer.lora_A["fade"].weight.data, layer.lora_B["fade"].weight.data
        lora_a[1], lora_b[:, 1] = lora_a[0] * (1 + 1e-6), -lora_b[:, 0]
        lora_b[:, 2] = 0
    with pytest.raises(FadeError, match=r"relative error of .*export it as diff, or pass --lossy"):
        adapter.export(tmp_path / "lora.safetensors")
    assert not (tmp_path / "lora.safetensors").exists()
    assert adapter.export(tmp_path / "lora.safetensors", lossy=True).error > EXACT


@FORMS
def test_element_masks_are_refused_as_lora_but_for_a_lossy_one(
    pipeline: StableDiffusionPipeline, tmp_path: Path, values: bool
) -> None:
    adapter = structured(pipeline, "element", values, LINEAR)
    file = tmp_path / "lora.safetensors"
    with pytest.raises(FadeError, match=r"different patterns.*shira or diff.*--granularity channel.*--lossy --rank R"):
        adapter.export(file, "lora")
    with pytest.raises(FadeError, match="pass --lossy --rank R"):
        adapter.export(file, "lora", lossy=True)
    assert not file.exists()
    base = weights(pipeline)
    told: list[str] = []
    report = adapter.export(file, "lora", lossy=True, rank=4, keys="kohya", say=told.append)
    merged = merged_state(file, base)
    lost, whole = 0.0, 0.0
    for key, delta in deltas(adapter).items():
        singular = torch.linalg.svdvals(delta.double())
        best = float(singular[4:].square().sum().sqrt())
        error = float((merged[key] - base[key] - delta).norm())
        assert error == pytest.approx(best, rel=1e-4)
        assert report.layer_errors[key.removesuffix(".weight")] == pytest.approx(best / float(delta.norm()), rel=1e-4)
        lost, whole = lost + best**2, whole + float(delta.norm()) ** 2
    assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4) and not report.exact
    assert f"relative error {report.error:.3g}" in header(file)["fade.exactness"]
    assert "ranks 4 to 4" in told[0]


def test_sixteen_bits_are_lossy_and_say_so(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapter = structured(pipeline, "block", True)
    for form in ("lora", "diff"):
        file = tmp_path / f"{form}.safetensors"
        with pytest.raises(FadeError, match=r"bf16 rounds the change.*--lossy"):
            adapter.export(file, form, dtype="bf16")
        report = adapter.export(file, form, dtype="bf16", lossy=True)
        assert 1e-4 < report.error < 4e-3 and not report.exact
        assert {t.dtype for key, t in load_file(file).items() if "alpha" not in key} == {torch.bfloat16}
    adapter.scale = 1e6
    with pytest.raises(FadeError, match="beyond the range of that dtype"):
        adapter.export(tmp_path / "new.safetensors", dtype="fp16", lossy=True)
    with pytest.raises(FadeError, match=r"'fp8' is unknown; choose one of fp32, fp16, bf16"):
        adapter.export(tmp_path / "new.safetensors", dtype="fp8")


# --- SHiRA -----------------------------------------------------------------------------------------------------------


@FORMS
def test_shira_holds_element_masks_of_every_count(tmp_path: Path, values: bool) -> None:
    pipeline = load_pipeline()
    adapter = structured(pipeline, "element", values, LINEAR)
    assert len({layer.lora_mask["fade"].mask.count for layer in adapter.layers.values()}) > 3
    told: list[str] = []
    report = adapter.export(tmp_path / "shira", "shira", say=told.append)
    assert report.exact and report.error == 0.0 and "for every layer" in told[0]
    ours, expected, other = pictures(pipeline), deltas(adapter), load_pipeline()
    loaded = PeftModel.from_pretrained(other.unet, tmp_path / "shira")
    for name in adapter.layers:
        delta = loaded.get_submodule(f"base_model.model.{name}").get_delta_weight("default").to_dense()
        assert torch.equal(delta, expected[f"{name}.weight"])
    assert close(pictures(other), ours)


def test_shira_refuses_what_it_cannot_hold(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapter = structured(pipeline, "element", True, ("conv1", "to_q"))
    with pytest.raises(FadeError, match=r"conv1 is a convolution.*linear layers alone"):
        adapter.export(tmp_path / "out", "shira")
    adapter.remove()
    adapter = structured(pipeline, "all", True, ("to_q",))
    with pytest.raises(FadeError, match=r"same r in every layer.*more than the .* weights of"):
        adapter.export(tmp_path / "out", "shira")
    assert list(tmp_path.iterdir()) == []


# --- merged ----------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("single", [False, True], ids=["folder", "single file"])
def test_pictures_of_merged_models_are_ours(tmp_path: Path, values: bool, single: bool) -> None:
    pipeline = load_pipeline()
    adapter = structured(pipeline, "element", values)
    before, ours = weights(pipeline), pictures(pipeline)
    path = tmp_path / ("model.safetensors" if single else "model")
    told: list[str] = []
    report = adapter.export(path, "merged", say=told.append)
    assert report.bytes > 1e6 and report.error < 1e-3
    assert same_bits(weights(pipeline), before) and adapter.enabled and not adapter.merged
    if single:
        other = StableDiffusionPipeline.from_single_file(path, config=str(MODEL_PATH), local_files_only=True)
        assert "in the original layout" in told[0]
    else:
        other = StableDiffusionPipeline.from_pretrained(path)
    record = record_of(path)
    assert close(pictures(other), ours)
    assert record["fade.forgets"] == "cat" and "float32 lost at most" in record["fade.exactness"]


def test_original_names_are_those_of_stable_diffusion() -> None:
    """Names that the checkpoints of Stable Diffusion 1.x are known by; the conversion itself checks all others."""
    state = original_state(load_pipeline())
    for key in (
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.2.0.op.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.middle_block.2.out_layers.3.weight",
        "model.diffusion_model.output_blocks.1.2.conv.weight",
        "model.diffusion_model.time_embed.2.bias",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight",
        "first_stage_model.decoder.up.2.upsample.conv.weight",
        "first_stage_model.decoder.mid.attn_1.proj_out.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight",
    ):
        assert key in state, key
    assert state["first_stage_model.decoder.mid.attn_1.q.weight"].dim() == 4


def _text(tokenizer: CLIPTokenizer, width: int, act: str, projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16, hidden_act=act,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


@pytest.mark.parametrize("family", ["2", "XL"])
def test_single_files_of_other_families_load(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, tmp_path: Path, family: str
) -> None:
    if family == "2":
        pipeline.text_encoder = _text(tokenizer, TEXT_WIDTH, "gelu")
        model: Any = pipeline
    else:
        unet = UNet2DConditionModel(
            sample_size=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(16, 24), layers_per_block=2,
            transformer_layers_per_block=(1, 2), norm_num_groups=8, cross_attention_dim=80, attention_head_dim=(2, 4),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 48,
        )  # fmt: skip
        model = StableDiffusionXLPipeline(
            vae=build_vae(), text_encoder=_text(tokenizer, 32, "quick_gelu"), tokenizer=tokenizer, unet=unet,
            text_encoder_2=_text(tokenizer, 48, "gelu", projected=True), tokenizer_2=tokenizer,
            scheduler=build_scheduler(),
        )  # fmt: skip
    model.save_pretrained(tmp_path / "folder")
    save_file(original_state(model), tmp_path / "model.safetensors")
    loaded = type(model).from_single_file(
        tmp_path / "model.safetensors", config=str(tmp_path / "folder"), local_files_only=True
    )
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (module := getattr(model, part, None)) is not None:
            assert same_bits(dict(getattr(loaded, part).state_dict()), dict(module.state_dict())), part


def test_a_part_without_an_original_name_is_refused(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapter = structured(pipeline, "element", True)
    pipeline.unet.register_buffer("extra", torch.randn(3))
    pipeline.vae.register_parameter("extra", torch.nn.Parameter(torch.randn(3)))
    with pytest.raises(FadeError, match=r"no name for extra; write a folder instead"):
        adapter.export(tmp_path / "model.safetensors", "merged")
    assert not (tmp_path / "model.safetensors").exists() and not adapter.merged


def test_merged_needs_a_pipeline_and_says_what_16_bits_lose(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapter = structured(pipeline, "element", True)
    adapter.save(tmp_path / "adapter.safetensors")
    with pytest.raises(FadeError, match="pass --model"):
        export(read_edit(tmp_path / "adapter.safetensors"), tmp_path / "model", "merged")
    alone = load_adapter(pipeline.unet, tmp_path / "adapter.safetensors", name="alone")
    with pytest.raises(FadeError, match="on a denoiser alone"):
        alone.export(tmp_path / "model", "merged")
    alone.remove()
    pipeline.to(torch.bfloat16)
    with pytest.raises(FadeError, match=r"bfloat16 is not exact; load the model in fp32, or pass --lossy"):
        adapter.export(tmp_path / "model", "merged")
    report = adapter.export(tmp_path / "model", "merged", lossy=True)
    assert report.error > 1e-4 and "bfloat16" in report.exactness


# --- all formats -----------------------------------------------------------------------------------------------------

TARGETS = {
    "lora": "out.safetensors",
    "lora peft": "out",
    "shira": "out",
    "diff": "out.safetensors",
    "merged": "out",
    "merged single": "out.safetensors",
}


def run(adapter: fade.Adapter, form: str, folder: Path, **options: Any) -> Path:
    form, _, how = form.partition(" ")
    path = folder / TARGETS[f"{form} {how}".strip()]
    adapter.export(path, form, **({"keys": "peft"} if how == "peft" else {}), **options)
    return path


@pytest.mark.parametrize("form", TARGETS)
def test_every_file_says_what_it_is(pipeline: StableDiffusionPipeline, tmp_path: Path, form: str) -> None:
    adapter = structured(pipeline, "block", True, LINEAR)
    record = record_of(run(adapter, form, tmp_path))
    assert record["fade.forgets"] == "cat" and record["fade.surrogate"] == "dog"
    assert record["fade.version"] == fade.__version__
    assert json.loads(record["fade.base_sha256"]) == adapter.metadata["fingerprint"]
    assert record["fade.base"] in record["fade.license"] and "licence" in record["fade.license"]
    assert re.fullmatch("[0-9a-f]{64}", record["fade.adapter_sha256"]) and record["fade.exactness"]
    adapter.save(tmp_path / "adapter.safetensors")
    alone = read_edit(tmp_path / "adapter.safetensors").record("any", "")
    assert alone["fade.adapter_sha256"] == record["fade.adapter_sha256"]
    adapter.parameters()[0].data += 1
    changed = record_of(run(adapter, form, tmp_path / "other"))
    assert changed["fade.adapter_sha256"] != record["fade.adapter_sha256"]


@pytest.mark.parametrize("form", TARGETS)
def test_targets_are_replaced_whole_and_only_when_asked(
    pipeline: StableDiffusionPipeline, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = structured(pipeline, "block", True, LINEAR)
    path = run(adapter, form, tmp_path)
    found = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(FadeError, match=r"exists already; pass --overwrite"):
        run(adapter, form, tmp_path)
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(*_: Any, error: BaseException = error, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            for module in ("lora", "shira", "diff", "merged"):
                patch.setattr(f"fade.export.{module}.save_file", fail)
            patch.setattr("diffusers.models.modeling_utils.safetensors.torch.save_file", fail)
            told = "nothing was changed" if isinstance(error, OSError) else None
            with pytest.raises(FadeError if told else KeyboardInterrupt, match=told):
                run(adapter, form, tmp_path, overwrite=True)
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == found
        assert sorted(tmp_path.iterdir()) == [path]
    adapter.scale = 0.5
    run(adapter, form, tmp_path, overwrite=True)
    assert {file.name for file in tmp_path.rglob("*")} == {path.name, *(file.name for file in found)} | {
        folder.name for folder in tmp_path.rglob("*") if folder.is_dir()
    }
    assert any(file.read_bytes() != content for file, content in found.items())
    assert len({file.stat().st_mode for file in tmp_path.rglob("*") if file.is_file()}) == 1

    other = tmp_path / "kept" / path.name
    if path.is_dir():
        other.parent.mkdir()
        other.write_text("precious")
    else:
        other.mkdir(parents=True)
    with pytest.raises(FadeError, match="not replaced; name another output"):
        run(adapter, form, other.parent, overwrite=True)
    assert other.exists()


def test_wrong_options_are_one_message_each(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    adapter = structured(pipeline, "block", True, LINEAR)
    out = tmp_path / "out.safetensors"
    for form, options, told in (
        ("onnx", {}, r"no format 'onnx'; choose one of lora, shira, diff, merged"),
        ("diff", {"keys": "kohya"}, "the format diff takes no option keys"),
        ("shira", {"single_file": True}, "takes no option single-file"),
        ("lora", {"keys": "a1111"}, "no keys 'a1111'; choose one of diffusers, peft, kohya"),
        ("lora", {"rank": 3}, r"rank is for a lossy export; pass --lossy"),
        ("lora", {"rank": 0, "lossy": True}, "at least 1, not 0"),
    ):
        with pytest.raises(FadeError, match=told):
            adapter.export(out, form, **options)
    for form in ("lora", "diff"):
        with pytest.raises(FadeError, match=r"must end in \.safetensors"):
            adapter.export(tmp_path / "out.bin", form)
    adapter.scale = 0.0
    for form in ("lora", "shira", "diff"):
        with pytest.raises(FadeError, match="changes nothing at this strength"):
            adapter.export(tmp_path / "dir" if form == "shira" else out, form)
    assert list(tmp_path.iterdir()) == []


# --- from files and from the command line ----------------------------------------------------------------------------


@FORMS
def test_a_file_alone_is_enough(pipeline: StableDiffusionPipeline, tmp_path: Path, values: bool) -> None:
    adapter = structured(pipeline, "channel", values)
    adapter.save(tmp_path / "adapter.safetensors")
    adapter.scale = 0.5
    for form, keys in (("lora", "kohya"), ("diff", None)):
        attached, alone = tmp_path / f"{form}-1.safetensors", tmp_path / f"{form}-2.safetensors"
        adapter.export(attached, form, keys=keys)
        export(read_edit(tmp_path / "adapter.safetensors", scale=0.5), alone, form, keys=keys)
        merged = merged_state(alone, weights(pipeline))
        for key, tensor in merged_state(attached, weights(pipeline)).items():
            assert torch.allclose(merged[key], tensor, rtol=0, atol=1e-6)


def test_a_file_that_does_not_know_its_convolutions_asks_for_the_model(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    adapter = structured(pipeline, "block", True, ("conv1", "to_q"))
    file, old = tmp_path / "adapter.safetensors", tmp_path / "old.safetensors"
    adapter.save(file)
    content = read_adapter_file(file)
    assert {layer.kernel for layer in content.layers.values()} == {(3, 3), ()}
    write_adapter_file(old, content.metadata, {n: replace(t, kernel=None) for n, t in content.layers.items()})
    with pytest.raises(FadeError, match=r"does not say whether .* is a convolution; pass --model"):
        export(read_edit(old), tmp_path / "out.safetensors", "diff")
    adapter.remove()
    attached = load_adapter(pipeline, old)
    attached.export(tmp_path / "out.safetensors", "diff")
    assert {tensor.dim() for tensor in load_file(tmp_path / "out.safetensors").values()} == {2, 4}


@pytest.mark.parametrize("kernel", [[3, 5], [0, 3], [3], "3x3", [[3], 3], [10**6, 1]])
def test_a_file_with_an_impossible_kernel_is_refused(
    pipeline: StableDiffusionPipeline, tmp_path: Path, kernel: object
) -> None:
    adapter = structured(pipeline, "element", True, ("conv1",))
    adapter.save(tmp_path / "adapter.safetensors")
    told = header(tmp_path / "adapter.safetensors")
    metadata = json.loads(told["fade"])
    name = next(iter(metadata["kernels"]))
    metadata["kernels"][name] = kernel
    save_file(
        load_file(tmp_path / "adapter.safetensors"),
        tmp_path / "bad.safetensors",
        {**told, "fade": json.dumps(metadata)},
    )
    with pytest.raises(AdapterFileError, match="kernel"):
        read_adapter_file(tmp_path / "bad.safetensors")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: object) -> tuple[int, str, str]:
        status = cli.main([str(word) for word in words])
        told = capsys.readouterr()
        return status, told.out, told.err

    return call


@pytest.mark.parametrize("method", ["closed-form", "distillation"])
def test_channel_masks_of_real_runs_are_exact_loras(command: Any, tmp_path: Path, method: str) -> None:
    """The portable choice, from the command line to diffusers' own loader."""
    config = tmp_path / "quick.toml"
    quick = "[data]\nforget_samples = 8\nretain_samples = 8\nsampling_steps = 2\n[overwrite]\nsteps = 4\n"
    config.write_text(quick if method == "distillation" else "")
    words = ["unlearn", "digitcanvas", "--forget", "three", "--surrogate", "eight", "--granularity", "channel"]
    status, _, err = command(*words, "--method", method, "--output", tmp_path / "run", "--config", config, "--quiet")
    assert status == 0, err
    file = tmp_path / "lora.safetensors"
    status, out, err = command("export", tmp_path / "run", "--format", "lora", "--output", file)
    assert status == 0, err
    assert "exact (largest relative error" in out and f"lora: {file}" in out
    ours, theirs = load_pipeline(), load_pipeline()
    load_adapter(ours, tmp_path / "run")
    theirs.load_lora_weights(file)
    assert close(pictures(theirs), pictures(ours))
    status, _, err = command("export", tmp_path / "run", "--format", "lora", "--output", file)
    assert status == 2 and "exists already; pass --overwrite" in err and err.count("\n") == 1


def test_the_command_line_exports_every_format(command: Any, tmp_path: Path) -> None:
    pipeline = load_pipeline()
    adapter = random_adapter(pipeline, values=True, targets=ATTENTION, density=0.02, strength=0.1)
    adapter.save(tmp_path / "adapter.safetensors")
    words = ["export", tmp_path / "adapter.safetensors", "--format"]
    status, _, err = command(*words, "lora", "--output", tmp_path / "lora.safetensors")
    assert status == 2 and "--granularity channel" in err and err.count("\n") == 1
    status, out, _ = command(*words, "lora", "--output", tmp_path / "lora.safetensors", "--lossy", "--rank", "2")
    assert status == 0 and out.count("% of the change is lost") == len(adapter.layers) and "lossy: relative" in out
    status, out, _ = command(*words, "shira", "--output", tmp_path / "shira", "--scale", "0.5")
    assert status == 0 and "exact" in out
    status, out, _ = command(*words, "diff", "--output", tmp_path / "diff.safetensors")
    size = sum(layer.get_base_layer().weight.nbytes for layer in adapter.layers.values())
    assert status == 0 and out.startswith(f"writing {size:,} bytes")
    status, _, err = command(*words, "diff", "--output", words[1], "--overwrite")
    assert status == 2 and "is the adapter itself" in err
    status, _, err = command(*words, "merged", "--output", tmp_path / "model")
    assert status == 2 and "pass --model" in err
    merged = tmp_path / "model.safetensors"
    status, out, _ = command(*words, "merged", "--output", merged, "--model", "digitcanvas")
    assert status == 0 and "weights changed" in out
    assert command("merge", "digitcanvas", "--adapter", words[1], "--output", tmp_path / "folder")[0] == 0
    loaded = StableDiffusionPipeline.from_single_file(merged, config=str(MODEL_PATH), local_files_only=True)
    assert same_bits(weights(loaded), weights(StableDiffusionPipeline.from_pretrained(tmp_path / "folder")))
    assert set(FORMATS) == {"lora", "shira", "diff", "merged"}
