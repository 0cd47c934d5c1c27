"""What the library's own calls save: a pipeline that draws the same without this package, or an adapter that comes back
with its mask; and a loader that knows no masks refuses it."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer
from typer.testing import CliRunner

import fade
from fade.cli import app
from fade.errors import AdapterFileError, FadeError, WrongBaseError
from fade.export.merged import save_merged
from fade.tuner import HEADER

from .adapters import random_adapter
from .conftest import denoise, same_bits, tiny_pipeline, weights
from .neighbours import Reference, deltas_of, draws, random_lora

FORMS = pytest.mark.parametrize("values", [False, True], ids=["factors", "values"])
TARGETS = ("to_q", "attn2.to_k", "to_out.0", "conv1", "conv_shortcut")
LORA_FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def reference(tokenizer: CLIPTokenizer) -> Reference:
    return Reference(tokenizer)


@pytest.fixture
def plain(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    return tiny_pipeline(tokenizer)


def masked(pipeline: StableDiffusionPipeline, values: bool = True, name: str = "fade", seed: int = 0) -> fade.Adapter:
    return random_adapter(pipeline, name, values=values, seed=seed, strength=0.3, targets=TARGETS)


# --- adapters alone --------------------------------------------------------------------------------------------------


def by_save_lora_adapter(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    pipeline.unet.save_lora_adapter(folder, adapter_name="fade")


def by_save_lora_weights(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    state = get_peft_model_state_dict(pipeline.unet, adapter_name="fade")
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=convert_state_dict_to_diffusers(state))


def by_save_lora_weights_with_metadata(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet, adapter_name="fade"),
        unet_lora_adapter_metadata=pipeline.unet.peft_config["fade"].to_dict(),
    )


def by_peft(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    state = get_peft_model_state_dict(pipeline.unet, adapter_name="fade")
    config = pipeline.unet.peft_config["fade"]
    fade.adapters(pipeline)["fade"].remove()
    model = get_peft_model(pipeline.unet, config)
    set_peft_model_state_dict(model, {f"base_model.model.{key}": tensor for key, tensor in state.items()})
    model.save_pretrained(folder)


@FORMS
@pytest.mark.parametrize(
    "save", [by_save_lora_adapter, by_save_lora_weights, by_save_lora_weights_with_metadata, by_peft]
)
def test_an_adapter_saved_by_others_calls_comes_back_with_its_mask(
    pipeline: StableDiffusionPipeline, plain: StableDiffusionPipeline, tmp_path: Path, values: bool,
    save: Callable[[StableDiffusionPipeline, Path], None],
) -> None:  # fmt: skip
    adapter = masked(pipeline, values)
    drawn, base = denoise(pipeline), denoise(plain)
    masks = {name: layer.lora_mask["fade"].mask for name, layer in adapter.layers.items()}
    save(pipeline, tmp_path)
    file = tmp_path / ("adapter_model.safetensors" if save is by_peft else LORA_FILE)

    # who knows no masks refuses it, and changes nothing that is drawn
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        plain.load_lora_weights(tmp_path, weight_name=file.name)
    assert not hasattr(plain.unet, "peft_config")
    with pytest.raises(Exception, match=r".+"):
        plain.unet.load_lora_adapter(file, prefix="unet" if "weights" in save.__name__ else None)
    assert torch.equal(denoise(plain), base)

    loaded = fade.load_adapter(plain, tmp_path if values else file, name="again")
    assert torch.equal(denoise(plain), drawn)
    assert {name: layer.lora_mask["again"].mask for name, layer in loaded.layers.items()} == masks
    assert (loaded.scale, loaded.pinned) == (1.0, True)
    assert loaded.metadata["concept"]["forget"] == "cat"
    loaded.save(tmp_path / "own.safetensors")
    loaded.remove()
    fade.load_adapter(plain, tmp_path / "own.safetensors")
    assert torch.allclose(denoise(plain), drawn, rtol=1e-5, atol=1e-5)
    told = CliRunner().invoke(app, ["inspect", str(file), "--json"])
    assert json.loads(told.stdout)["selected"] == sum(mask.count for mask in masks.values())


@FORMS
def test_peft_loads_what_peft_saved(
    pipeline: StableDiffusionPipeline, plain: StableDiffusionPipeline, tmp_path: Path, values: bool
) -> None:
    masked(pipeline, values)
    drawn, base = denoise(pipeline), denoise(plain)
    by_peft(pipeline, tmp_path)
    model = PeftModel.from_pretrained(plain.unet, tmp_path)
    assert torch.equal(denoise(plain), drawn)
    with pytest.warns(UserWarning, match="'default' is off now"):
        model.disable_adapter_layers()
    assert torch.equal(denoise(plain), base)
    model.enable_adapter_layers()
    model.load_adapter(tmp_path, "second")
    fade.adapters(plain)["default"].disable()
    model.set_adapter("second")
    assert torch.equal(denoise(plain), drawn)


def test_another_base_is_refused_and_half_precision_is_not(
    pipeline: StableDiffusionPipeline, plain: StableDiffusionPipeline, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    masked(pipeline, values=False)
    drawn = denoise(pipeline)
    by_save_lora_adapter(pipeline, tmp_path)
    with pytest.raises(WrongBaseError, match="was trained on"):
        fade.load_adapter(tiny_pipeline(tokenizer, seed=1), tmp_path)
    state = load_file(tmp_path / LORA_FILE)
    save_file({k: t.half() if t.dtype == torch.float32 else t for k, t in state.items()}, tmp_path / LORA_FILE)
    fade.load_adapter(plain, tmp_path)
    assert draws(plain, drawn, tolerance=2e-2)
    assert all(p.dtype == torch.float32 for p in fade.adapters(plain)["fade"].parameters())


def header_with(state: dict[str, torch.Tensor], **changes: Any) -> torch.Tensor:
    header = {**json.loads(state[HEADER].numpy().tobytes()), **changes}
    return torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)


def first(state: dict[str, torch.Tensor], part: str) -> str:
    return next(key for key in state if part in key)


DAMAGES: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, Any]]] = {
    "no header": lambda state: {HEADER: None},
    "header cut": lambda state: {HEADER: state[HEADER][:-9]},
    "header of noise": lambda state: {HEADER: torch.randint(0, 256, (100,), dtype=torch.uint8)},
    "no base": lambda state: {HEADER: header_with(state, metadata={})},
    "rank 0": lambda state: {HEADER: header_with(state, r=0)},
    "rank of text": lambda state: {HEADER: header_with(state, r="3")},
    "strength without end": lambda state: {HEADER: header_with(state, lora_alpha=1e300)},
    "shapes that do not fit": lambda state: {HEADER: header_with(state, shapes={"x": [2**20, 2**20]})},
    "no shapes": lambda state: {HEADER: header_with(state, shapes=[])},
    "no mask": lambda state: {first(state, "words"): None},
    "mask as floats": lambda state: {first(state, "words"): state[first(state, "words")].half()},
    "bits beyond a row": lambda state: {first(state, "words"): torch.full_like(state[first(state, "words")], -1)},
    "mask of another shape": lambda state: {first(state, "words"): state[first(state, "words")][:-1]},
    "factor not finite": lambda state: {first(state, "lora_A"): state[first(state, "lora_A")] * float("nan")},
    "factor cut": lambda state: {first(state, "lora_A"): state[first(state, "lora_A")][..., :-1]},
    "factor flat": lambda state: {first(state, "lora_B"): state[first(state, "lora_B")][0]},
    "factor of another rank": lambda state: {first(state, "lora_B"): torch.ones(1, 16, 7)},
    "another tensor": lambda state: {"a.lora_C.weight": torch.ones(1)},
    "a name without parts": lambda state: {"lora_": torch.ones(1)},
}


@FORMS
def test_damaged_files_are_refused_before_anything_is_built(
    pipeline: StableDiffusionPipeline, plain: StableDiffusionPipeline, tmp_path: Path, values: bool
) -> None:
    masked(pipeline, values)
    by_save_lora_adapter(pipeline, tmp_path)
    good = load_file(tmp_path / LORA_FILE)
    for name, damage in DAMAGES.items():
        state = {key: tensor for key, tensor in (good | damage(good)).items() if tensor is not None}
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "damaged.safetensors")
        with pytest.raises(AdapterFileError) as refused:
            fade.load_adapter(plain, tmp_path / "damaged.safetensors")
        assert "\n" not in str(refused.value), name
        assert len(str(refused.value)) < 600, name
        assert not hasattr(plain.unet, "peft_config"), name
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / LORA_FILE).read_bytes()[:-7])
    with pytest.raises(AdapterFileError, match="truncated or damaged"):
        fade.load_adapter(plain, tmp_path / "cut.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match="there is no adapter file in"):
        fade.load_adapter(plain, tmp_path / "empty")


def test_a_process_without_this_package_refuses_the_files(
    pipeline: StableDiffusionPipeline, plain: StableDiffusionPipeline, tmp_path: Path
) -> None:
    masked(pipeline, values=False)
    by_save_lora_adapter(pipeline, tmp_path / "lora")
    by_peft(pipeline, tmp_path / "peft")
    plain.unet.save_pretrained(tmp_path / "unet")
    program = f"""
import sys
from diffusers import UNet2DConditionModel
from peft import PeftModel
unet = UNet2DConditionModel.from_pretrained({str(tmp_path / "unet")!r})
for load in (
    lambda: PeftModel.from_pretrained(unet, {str(tmp_path / "peft")!r}),
    lambda: unet.load_lora_adapter({str(tmp_path / "lora" / LORA_FILE)!r}, prefix=None),
):
    try:
        load()
    except Exception as error:
        print("refused", type(error).__name__)
assert "fade" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split("\n")[:-1] == ["refused KeyError", "refused RuntimeError"], done.stderr[-2000:]


# --- whole pipelines -------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_draws_what_this_one_draws(
    pipeline: StableDiffusionPipeline, reference: Reference, tmp_path: Path
) -> None:
    adapter, second = masked(pipeline), masked(pipeline, values=False, name="second", seed=1)
    one, two = deltas_of(adapter), deltas_of(second)
    lora, style = random_lora(pipeline, TARGETS[:2], 2)
    pipeline.load_lora_weights(lora, adapter_name="style")

    folders = (tmp_path / str(index) for index in itertools.count())

    def check(*terms: tuple[dict[str, torch.Tensor], float], whole: bool = False, **options: Any) -> None:
        before, drawn, folder = weights(pipeline), denoise(pipeline), next(folders)
        (pipeline if whole else pipeline.unet).save_pretrained(folder, **options)
        assert same_bits(weights(pipeline), before)
        assert torch.equal(denoise(pipeline), drawn)
        part = {"subfolder": "unet"} if whole else {}
        variant = {name: value for name, value in options.items() if name == "variant"}
        loaded = UNet2DConditionModel.from_pretrained(folder, **part, **variant)
        assert not any("lora" in name for name, _ in loaded.named_modules())
        other = StableDiffusionPipeline(**{**pipeline.components, "unet": loaded}, requires_safety_checker=False)
        assert draws(other, reference(*terms))
        assert draws(pipeline, reference(*terms))

    with pytest.raises(FadeError, match=r"adapters style are on.*switch them off or delete them"):
        pipeline.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused" / "model_index.json").exists()
    pipeline.fuse_lora(adapter_names=["style"])
    check((one, 1), (two, 1), (style, 1))
    pipeline.unfuse_lora()
    pipeline.set_adapters(["fade", "second"])
    check((one, 1), (two, 1), whole=True)
    adapter.scale = 0.5
    second.merge()
    check((one, 0.5), (two, 1), variant="fp16")
    pipeline.delete_adapters("style")
    pipeline.fuse_lora(lora_scale=2.0)
    check((one, 1.0), (two, 1), max_shard_size="100KB")
    pipeline.unfuse_lora()
    second.unmerge()
    second.disable()
    check((one, 0.5), push_to_hub=False)
    adapter.disable()
    check()
    compiled = torch.compile(pipeline.unet)
    adapter.enable()
    compiled.save_pretrained(tmp_path / "compiled")
    assert not any("_orig_mod" in key for key in load_file(next((tmp_path / "compiled").glob("*.safetensors"))))
    for handle in (adapter, second):
        handle.remove()
    assert "save_pretrained" not in vars(pipeline.unet)
    check()


@FORMS
@pytest.mark.parametrize("merged", [False, True])
def test_exporting_leaves_the_pipeline_as_it_was(
    pipeline: StableDiffusionPipeline, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    values: bool, merged: bool,
) -> None:  # fmt: skip
    adapter, second = masked(pipeline, values), masked(pipeline, not values, name="second", seed=1)
    one, two = deltas_of(adapter), deltas_of(second)
    second.merge()
    if merged:
        adapter.merge()
    before, states = weights(pipeline), str(fade.status(pipeline))
    save_merged(pipeline, adapter, tmp_path / "out")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert draws(loaded, reference((one, 1), (two, 1)))
    kept = sorted(tmp_path.rglob("*"))
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()):

        def fail(*_: Any, error: BaseException = error, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("diffusers.models.modeling_utils.safetensors.torch.save_file", fail)
            with pytest.raises(FadeError if isinstance(error, OSError) else type(error)):
                save_merged(pipeline, adapter, tmp_path / "out", overwrite=True)
        assert sorted(tmp_path.rglob("*")) == kept
        assert same_bits(weights(pipeline), before)
        assert str(fade.status(pipeline)) == states
