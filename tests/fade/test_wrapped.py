"""An adapter on a denoiser that is compiled, offloaded, cast, copied, fused or shared: it draws what it draws on the
plain one, or says in one line what to do."""

import contextlib
import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.hooks import apply_layerwise_casting
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

import fade
from fade.base_model import fingerprint
from fade.config import Config
from fade.errors import FadeError, WrongBaseError

from .adapters import ATTENTION, CONVOLUTIONS, random_adapter
from .conftest import denoise, same_bits, tiny_pipeline, weights

CPU = torch.device("cpu")
FORMS = pytest.mark.parametrize("values", [False, True], ids=["factors", "values"])
ORDERS = pytest.mark.parametrize("first", ["wrapped", "loaded"])
Wrap = Callable[[StableDiffusionPipeline, Path], None]


@dataclass(frozen=True)
class Known:
    """An adapter's file, and what a plain pipeline draws without it, with it, and with half of it."""

    file: Path
    base: Tensor
    full: Tensor
    half: Tensor


@pytest.fixture(scope="module")
def known(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Known]:
    """By form, values or factors."""
    folder, forms = tmp_path_factory.mktemp("adapters"), {}
    for values in (False, True):
        pipeline = tiny_pipeline(tokenizer)
        base = denoise(pipeline)
        targets = (*ATTENTION, *CONVOLUTIONS, "conv_in", "time_emb_proj", "linear_1")
        # Dense masks are smaller as factors, sparse ones as values.
        adapter = random_adapter(
            pipeline, values=values, targets=targets, strength=0.2 if values else 0.1, density=0.1 if values else 0.9
        )
        adapter.save(folder / f"{values}.safetensors")
        full = denoise(pipeline)
        adapter.scale = 0.5
        forms[values] = Known(folder / f"{values}.safetensors", base, full, denoise(pipeline))
        assert not torch.allclose(base, full, atol=0.1) and not torch.allclose(forms[values].half, full, atol=0.05)
    return forms


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


def live(pipeline: StableDiffusionPipeline, adapter: fade.Adapter, known: Known, merges: bool = True) -> None:
    """Off, on, in part, saved, merged (or refused) and back: each draws what it must, at once."""
    close(denoise(pipeline), known.full)
    with adapter.disabled():
        close(denoise(pipeline), known.base)
    adapter.scale = 0.5
    close(denoise(pipeline), known.half)
    adapter.scale = 1.0
    close(denoise(pipeline), known.full)
    before = fingerprint(pipeline.unet)
    if merges:
        adapter.merge()
        close(denoise(pipeline), known.full)
        adapter.unmerge()
        assert fingerprint(pipeline.unet) == before
    else:
        with pytest.raises(FadeError, match="was not merged: .*offload"):
            adapter.merge()
        assert not adapter.merged
    close(denoise(pipeline), known.full)


def save_and_reload(adapter: fade.Adapter, tokenizer: CLIPTokenizer, known: Known, folder: Path) -> None:
    adapter.save(folder / "again.safetensors")
    other = tiny_pipeline(tokenizer)
    fade.load_adapter(other, folder / "again.safetensors")
    close(denoise(other), known.full)


# --- offloaded -------------------------------------------------------------------------------------------------------


def disk_and_cpu(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    places = {name: "cpu" for name, _ in pipeline.unet.named_children()} | {"mid_block": "disk"}
    dispatch_model(pipeline.unet, places, main_device="cpu", offload_dir=str(folder))


def group(kind: str, **options: Any) -> Wrap:
    return lambda pipeline, _: pipeline.unet.enable_group_offload(CPU, CPU, offload_type=kind, **options)


OFFLOADS: dict[str, Wrap] = {
    "accelerate": lambda pipeline, _: cpu_offload(pipeline.unet, CPU),
    "accelerate buffers": lambda pipeline, _: cpu_offload(pipeline.unet, CPU, offload_buffers=True),
    "accelerate hook": lambda pipeline, _: cpu_offload_with_hook(pipeline.unet, CPU),
    "accelerate disk": lambda pipeline, folder: disk_offload(pipeline.unet, folder, CPU, offload_buffers=True),
    "device map": disk_and_cpu,
    "model": lambda pipeline, _: pipeline.enable_model_cpu_offload(device="cpu"),
    "leaf group": group("leaf_level", non_blocking=True),
    "block group": group("block_level", num_blocks_per_group=1),
}
IN_PIECES = ("accelerate", "accelerate buffers", "accelerate disk", "device map")


@ORDERS
@pytest.mark.parametrize("how", OFFLOADS)
def test_offloaded(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, known: dict[bool, Known], tmp_path: Path, how: str,
    first: str,
) -> None:  # fmt: skip
    for_form = known[first == "wrapped"]
    if first == "loaded":
        adapter = fade.load_adapter(pipeline, for_form.file)
        OFFLOADS[how](pipeline, tmp_path)
    else:
        OFFLOADS[how](pipeline, tmp_path)
        close(denoise(pipeline), for_form.base)
        adapter = fade.load_adapter(pipeline, for_form.file)
    live(pipeline, adapter, for_form, merges=how not in IN_PIECES)
    save_and_reload(adapter, tokenizer, for_form, tmp_path)
    if how.startswith("accelerate"):
        remove_hook_from_module(pipeline.unet, recurse=True)
        live(pipeline, adapter, for_form)
    if how == "model":
        pipeline("a cat", num_inference_steps=1, output_type="latent")
        pipeline.remove_all_hooks()
        live(pipeline, adapter, for_form)
    adapter.remove()
    close(denoise(pipeline), for_form.base)


@pytest.mark.parametrize("how", [*IN_PIECES[2:], "leaf group"])
def test_another_base_is_seen_through_offloading(
    tokenizer: CLIPTokenizer, known: dict[bool, Known], tmp_path: Path, how: str
) -> None:
    other = tiny_pipeline(tokenizer)
    with torch.no_grad():
        other.unet.up_blocks[0].resnets[0].norm1.bias[0] += 1e-3
    OFFLOADS[how](other, tmp_path)
    with pytest.raises(WrongBaseError):
        fade.load_adapter(other, known[True].file)
    assert fade.load_adapter(other, known[True].file, check_base=False).enabled


def test_groups_on_a_disk(pipeline: StableDiffusionPipeline, known: dict[bool, Known], tmp_path: Path) -> None:
    adapter = fade.load_adapter(pipeline, known[False].file)
    group("leaf_level", offload_to_disk_path=str(tmp_path))(pipeline, tmp_path)
    close(denoise(pipeline), known[False].full)
    with pytest.raises(FadeError, match="offloaded to a disk; merge the adapter before"):
        adapter.merge()
    adapter.scale = 0.5
    close(denoise(pipeline), known[False].half)


def test_what_is_merged_cannot_be_taken_out_of_offloaded_weights(
    pipeline: StableDiffusionPipeline, known: dict[bool, Known]
) -> None:
    adapter = fade.load_adapter(pipeline, known[True].file)
    adapter.merge()
    cpu_offload(pipeline.unet, CPU)
    for action in (adapter.unmerge, adapter.remove):
        with pytest.raises(FadeError, match="offload"):
            action()
    close(denoise(pipeline), known[True].full)
    remove_hook_from_module(pipeline.unet, recurse=True)
    adapter.remove()
    close(denoise(pipeline), known[True].base)


CASTS: dict[str, Wrap] = {
    "default": lambda pipeline, _: pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "pattern": lambda pipeline, _: apply_layerwise_casting(
        pipeline.unet, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("to_q", "norm")
    ),
    "whole": lambda pipeline, _: apply_layerwise_casting(
        pipeline.unet, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=None
    ),
}


@ORDERS
@pytest.mark.parametrize("how", CASTS)
def test_layerwise_casting_rounds_the_base_alone(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, known: dict[bool, Known], tmp_path: Path, how: str,
    first: str,
) -> None:  # fmt: skip
    values = (first == "wrapped") != (how == "whole")
    rounded = tiny_pipeline(tokenizer)
    CASTS[how](rounded, tmp_path)
    plain = tiny_pipeline(tokenizer)
    with torch.no_grad():
        for ours, theirs in zip(plain.unet.parameters(), rounded.unet.parameters(), strict=True):
            ours.copy_(theirs)
    fade.load_adapter(plain, known[values].file, check_base=False)
    if first == "loaded":
        adapter = fade.load_adapter(pipeline, known[values].file)
        CASTS[how](pipeline, tmp_path)
    else:
        CASTS[how](pipeline, tmp_path)
        with pytest.raises(FadeError, match="stored in 8 bits"):
            fade.load_adapter(pipeline, known[values].file)
        adapter = fade.load_adapter(pipeline, known[values].file, check_base=False)
    close(denoise(pipeline), denoise(plain))
    with pytest.raises(FadeError, match="was not merged: the weights are stored in 8 bits"):
        adapter.merge()
    save_and_reload(adapter, tokenizer, known[values], tmp_path)
    adapter.remove()
    close(denoise(pipeline), denoise(rounded))


def test_taken_out_of_weights_that_were_cast_to_8_bits(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, known: dict[bool, Known], tmp_path: Path
) -> None:
    adapter = fade.load_adapter(pipeline, known[True].file)
    adapter.merge()
    rounded = tiny_pipeline(tokenizer)
    for each in (pipeline, rounded):
        CASTS["default"](each, tmp_path)
    adapter.unmerge()
    assert same_bits(weights(pipeline), weights(rounded))


# --- compiled --------------------------------------------------------------------------------------------------------


def a_block(pipeline: StableDiffusionPipeline, _: Path) -> None:
    pipeline.unet.mid_block = torch.compile(pipeline.unet.mid_block, backend="eager")
    pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0].compile(backend="eager")


def the_unet(pipeline: StableDiffusionPipeline, _: Path) -> None:
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")


COMPILED: dict[str, Wrap] = {
    "wrapped": the_unet,
    "in place": lambda pipeline, _: pipeline.unet.compile(backend="eager"),
    "repeated blocks": lambda pipeline, _: pipeline.unet.compile_repeated_blocks(backend="eager", fullgraph=True),
    "a block": a_block,
}


@pytest.fixture
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@ORDERS
def test_compiled_blocks_draw_no_stale_graph(
    compiler: None, pipeline: StableDiffusionPipeline, known: dict[bool, Known], first: str
) -> None:
    for_form, transformer = known[first == "wrapped"], pipeline.unet.mid_block.attentions[0]
    if first == "wrapped":
        transformer.transformer_blocks[0].compile(backend="eager", fullgraph=True)
        close(denoise(pipeline), for_form.base)
    adapter = fade.load_adapter(pipeline, for_form.file)
    if first == "loaded":
        transformer.transformer_blocks[0] = torch.compile(transformer.transformer_blocks[0], backend="eager")
    live(pipeline, adapter, for_form)
    with torch._dynamo.config.patch(error_on_recompile=True):  # each state has its graph now
        live(pipeline, adapter, for_form)
    adapter.remove()
    close(denoise(pipeline), for_form.base)


@ORDERS
@pytest.mark.parametrize("how", COMPILED)
def test_compiled_names_are_the_bare_models(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, known: dict[bool, Known], tmp_path: Path, how: str,
    first: str,
) -> None:  # fmt: skip
    for_form, plain = known[first == "wrapped"], fingerprint(pipeline.unet)
    if first == "wrapped":
        COMPILED[how](pipeline, tmp_path)
        assert fingerprint(pipeline.unet if how != "wrapped" else pipeline.unet._orig_mod) == plain
    adapter = fade.load_adapter(pipeline, for_form.file)
    if first == "loaded":
        COMPILED[how](pipeline, tmp_path)
    with torch.compiler.set_stance("force_eager"):
        save_and_reload(adapter, tokenizer, for_form, tmp_path)
        assert [row.state for row in fade.status(pipeline)] == ["on"]
        adapter.merge()
        adapter.unmerge()
        close(denoise(pipeline), for_form.full)
        adapter.remove()
        close(denoise(pipeline), for_form.base)
    other = tiny_pipeline(tokenizer, seed=1)
    COMPILED[how](other, tmp_path)
    with pytest.raises(WrongBaseError):
        fade.load_adapter(other, for_form.file)


@pytest.mark.parametrize("how", ["wrapped", "repeated blocks"])
def test_unlearning_a_compiled_model_gives_the_same_adapter(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, quick: Config, tmp_path: Path, how: str
) -> None:
    words = {"forget": "cat", "surrogate": "dog", "templates": ("a {}",), "progress": False, "config": quick}
    wanted = fade.unlearn(pipeline, **words)
    other = tiny_pipeline(tokenizer)
    COMPILED[how](other, tmp_path)
    found = fade.unlearn(other, **words)
    assert found.layers.keys() == wanted.layers.keys()
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), wanted.parameters(), strict=True))


def test_a_layer_that_was_compiled_by_itself_is_refused(
    pipeline: StableDiffusionPipeline, known: dict[bool, Known], quick: Config
) -> None:
    attention = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_q = torch.compile(attention.to_q, backend="eager")
    name = r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn1\.to_q"
    with pytest.raises(FadeError, match=f"{name} was compiled by itself"):
        fade.load_adapter(pipeline, known[True].file)
    with pytest.raises(FadeError, match=f"{name} was compiled by itself"):
        fade.unlearn(pipeline, "cat", "dog", templates=("a {}",), config=quick, progress=False)
    assert not fade.adapters(pipeline)


# --- fused projections -----------------------------------------------------------------------------------------------


def test_fused_projections_never_hide_a_change(pipeline: StableDiffusionPipeline, known: dict[bool, Known]) -> None:
    adapter, wanted = fade.load_adapter(pipeline, known[True].file), known[True]
    for switch in (adapter.enable, adapter.disable):
        switch()
        with pytest.raises(FadeError, match=r"merge\(\) or remove\(\) it first, then fuse"):
            pipeline.fuse_qkv_projections(vae=False)
    adapter.enable().merge()
    for _ in range(2):  # the second time onto the leftovers of the first
        pipeline.fuse_qkv_projections(vae=False)
        changes = (
            adapter.unmerge, adapter.remove, lambda: pipeline.delete_adapters("fade"), pipeline.unload_lora_weights,
        )  # fmt: skip
        for change in changes:
            with pytest.raises(FadeError, match="unfuse_qkv_projections"):
                change()
            close(denoise(pipeline), wanted.full, 1e-3)
        pipeline.unfuse_lora()
        close(denoise(pipeline), wanted.full, 1e-3)
        pipeline.unfuse_qkv_projections()
    adapter.unmerge()
    live(pipeline, adapter, wanted)
    adapter.remove()
    close(denoise(pipeline), wanted.base)


def test_what_was_fused_and_unfused_carries_adapters(
    pipeline: StableDiffusionPipeline, known: dict[bool, Known], quick: Config
) -> None:
    words = {"forget": "cat", "surrogate": "dog", "templates": ("a {}",), "progress": False, "config": quick}
    pipeline.fuse_qkv_projections(vae=False)
    for attach in (lambda: fade.load_adapter(pipeline, known[False].file), lambda: fade.unlearn(pipeline, **words)):
        with pytest.raises(FadeError, match="are fused copies; call unfuse_qkv_projections"):
            attach()
    pipeline.unfuse_qkv_projections()
    adapter = fade.load_adapter(pipeline, known[False].file)
    live(pipeline, adapter, known[False])


# --- cast, laid out and moved ----------------------------------------------------------------------------------------

TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 2e-1, torch.float64: 1e-4}


@FORMS
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_cast_after_loading_and_while_merged(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, known: dict[bool, Known], dtype: torch.dtype,
    values: bool,
) -> None:  # fmt: skip
    adapter = fade.load_adapter(pipeline, known[values].file)
    trained = [parameter.clone() for parameter in adapter.parameters()]
    cast_base = tiny_pipeline(tokenizer).to(dtype)
    adapter.merge()
    pipeline.to(dtype)
    adapter.unmerge()
    assert same_bits(weights(pipeline), weights(cast_base))
    close(denoise(pipeline), known[values].full, TOLERANCES[dtype])
    adapter.merge()
    pipeline.unet.float()
    adapter.unmerge()
    assert same_bits(weights(pipeline), weights(cast_base.to(torch.float32)))
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), trained, strict=True))
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())


def test_channels_last_before_after_and_while_merged(
    pipeline: StableDiffusionPipeline, known: dict[bool, Known]
) -> None:
    wanted = known[False]
    pipeline.unet.to(memory_format=torch.channels_last)
    adapter = fade.load_adapter(pipeline, wanted.file)
    live(pipeline, adapter, wanted)
    adapter.merge()
    pipeline.unet.to(memory_format=torch.contiguous_format)
    adapter.unmerge()
    live(pipeline, adapter, wanted)
    pipeline.unet.to(memory_format=torch.channels_last)
    live(pipeline, adapter, wanted)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": torch.autograd.detect_anomaly,
    "float64 by default": lambda: default_dtype(torch.float64),
    "float16 by default": lambda: default_dtype(torch.float16),
    "meta by default": lambda: default_device("meta"),
    "deterministic": deterministic,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("mode", MODES)
def test_loaded_switched_and_merged_in_any_mode(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, known: dict[bool, Known], tmp_path: Path, mode: str
) -> None:
    values = "by default" in mode
    with MODES[mode]():
        adapter = fade.load_adapter(pipeline, known[values].file, scale=0.5)
        adapter.disable().enable()
        adapter.scale = 1.0
        adapter.merge()
        adapter.unmerge()
        adapter.save(tmp_path / "adapter.safetensors")
    close(denoise(pipeline), known[values].full)
    other = tiny_pipeline(tokenizer)
    fade.load_adapter(other, tmp_path / "adapter.safetensors")
    close(denoise(other), known[values].full)
    for parameter in adapter.parameters():
        assert parameter.dtype == torch.float32
        parameter.requires_grad_(True)
    pipeline.unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 3, 64)).sample.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_drawn_under_autocast(pipeline: StableDiffusionPipeline, known: dict[bool, Known], dtype: torch.dtype) -> None:
    values = dtype == torch.float16
    adapter, wanted = fade.load_adapter(pipeline, known[values].file), known[values]
    with torch.autocast("cpu", dtype):
        adapted = denoise(pipeline)
        with adapter.disabled():
            base = denoise(pipeline)
    rounding = (base.float() - wanted.base).norm() / wanted.base.norm()
    assert adapted.dtype == base.dtype
    assert (adapted.float() - wanted.full).norm() / wanted.full.norm() <= 3 * rounding


def test_weights_that_are_not_loaded_yet(pipeline: StableDiffusionPipeline, known: dict[bool, Known]) -> None:
    with torch.device("meta"):
        pipeline.unet = UNet2DConditionModel.from_config(pipeline.unet.config)
    with pytest.raises(FadeError, match=r"weights are not loaded yet \(.* is on the meta device\)"):
        fade.load_adapter(pipeline, known[True].file)


@pytest.mark.parametrize(
    "options", [{"low_cpu_mem_usage": False}, {"low_cpu_mem_usage": True}, {"torch_dtype": torch.float16}], ids=str
)
def test_loaded_however_from_pretrained_loads(
    pipeline: StableDiffusionPipeline, known: dict[bool, Known], tmp_path: Path, options: dict[str, Any]
) -> None:
    pipeline.unet.save_pretrained(tmp_path)
    pipeline.unet = UNet2DConditionModel.from_pretrained(tmp_path, **options)
    fade.load_adapter(pipeline, known[False].file)
    close(denoise(pipeline), known[False].full, 2e-2 if "torch_dtype" in options else 2e-4)


# --- copied and shared -----------------------------------------------------------------------------------------------


def through_torch_save(unet: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(unet, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda unet: pickle.loads(pickle.dumps(unet)),
    "torch.save": through_torch_save,
    "multiprocessing": lambda unet: pickle.loads(ForkingPickler.dumps(unet)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_whole_and_independent(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, known: dict[bool, Known], how: str
) -> None:
    values = how in ("pickle", "multiprocessing")
    original, wanted = fade.load_adapter(pipeline, known[values].file), known[values]
    twin = tiny_pipeline(tokenizer)
    # Between processes memory is shared on purpose.
    twin.unet = COPIES[how](pipeline.unet if how != "multiprocessing" else copy.deepcopy(pipeline.unet))
    adapter = fade.adapters(twin)["fade"]
    live(twin, adapter, wanted)
    adapter.merge()
    again = tiny_pipeline(tokenizer)
    again.unet = COPIES[how](twin.unet)
    merged = fade.adapters(again)["fade"]
    assert merged.merged
    merged.unmerge()
    live(again, merged, wanted)
    merged.remove()
    close(denoise(again), wanted.base)
    close(denoise(pipeline), wanted.full)
    assert original.enabled and not original.merged


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pipelines_that_share_a_denoiser_share_its_adapters(
    pipeline: StableDiffusionPipeline, known: dict[bool, Known]
) -> None:
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    adapter = fade.load_adapter(other, known[True].file)
    live(pipeline, fade.adapters(pipeline)["fade"], known[True])
    live(copy.copy(pipeline), fade.adapters(copy.copy(pipeline))["fade"], known[True])
    adapter.merge()
    StableDiffusionImg2ImgPipeline.from_pipe(pipeline, torch_dtype=torch.float16)
    adapter.unmerge()
    assert adapter.parameters()[0].dtype == torch.float32
    close(denoise(pipeline), known[True].full, 2e-2)


def test_averaged_weights(pipeline: StableDiffusionPipeline, known: dict[bool, Known]) -> None:
    adapter = fade.load_adapter(pipeline, known[False].file)
    average = EMAModel(pipeline.unet.parameters())
    trained = [parameter.data.clone() for parameter in adapter.parameters()]
    for parameter in adapter.parameters():
        parameter.data.mul_(3)
    assert not torch.allclose(denoise(pipeline), known[False].full, atol=0.1)
    average.copy_to(pipeline.unet.parameters())
    live(pipeline, adapter, known[False])
    assert all(torch.equal(p, before) for p, before in zip(adapter.parameters(), trained, strict=True))


class Wrapper(nn.Module):
    """As data parallelism wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.dtype = module.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_wrapped_as_for_data_parallelism(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, known: dict[bool, Known], tmp_path: Path
) -> None:
    bare = pipeline.unet
    pipeline.unet = Wrapper(torch.compile(bare, backend="eager"))
    adapter = fade.load_adapter(pipeline, known[False].file)
    save_and_reload(adapter, tokenizer, known[False], tmp_path)
    pipeline.unet = Wrapper(bare)
    with adapter.disabled():
        close(denoise(pipeline), known[False].base)
    close(denoise(pipeline), known[False].full)
    other = tiny_pipeline(tokenizer, seed=2)
    other.unet = Wrapper(other.unet)
    with pytest.raises(WrongBaseError):
        fade.load_adapter(other, known[False].file)


def test_threads_on_two_pipelines(tokenizer: CLIPTokenizer, known: dict[bool, Known]) -> None:
    pipelines = [tiny_pipeline(tokenizer) for _ in range(2)]
    for scale, each in zip((1.0, 0.5), pipelines, strict=True):
        fade.load_adapter(each, known[True].file, scale=scale)
    drawn: list[list[Tensor]] = [[], []]
    threads = [
        threading.Thread(target=lambda i=i: drawn[i].extend(denoise(pipelines[i]) for _ in range(6))) for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pictures, wanted in zip(drawn, (known[True].full, known[True].half), strict=True):
        assert len(pictures) == 6
        for picture in pictures:
            close(picture, wanted)


@FORMS
def test_drawing_while_another_thread_switches(
    pipeline: StableDiffusionPipeline, known: dict[bool, Known], values: bool
) -> None:
    adapter = fade.load_adapter(pipeline, known[values].file)
    drawn: list[Tensor] = []
    thread = threading.Thread(target=lambda: drawn.extend(denoise(pipeline) for _ in range(20)))
    thread.start()
    while thread.is_alive():
        adapter.disable().enable()
        adapter.scale = 0.5
        adapter.scale = 1.0
        adapter.merge()
        adapter.unmerge()
    thread.join()
    assert len(drawn) == 20 and all(torch.isfinite(picture).all() for picture in drawn)
    close(denoise(pipeline), known[values].full)


# --- hooks, parametrisations, other kinds of layers, state dicts --------------------------------------------------


def test_hooks_see_base_layers(pipeline: StableDiffusionPipeline, known: dict[bool, Known]) -> None:
    adapter = fade.load_adapter(pipeline, known[True].file)
    layer, seen = next(iter(adapter.layers.values())), []
    handles = [
        layer.register_forward_hook(lambda *_: seen.append("masked layer")),
        layer.get_base_layer().register_forward_pre_hook(lambda *_: seen.append("before")),
        layer.get_base_layer().register_forward_hook(lambda *_: seen.append("base layer")),
    ]
    close(denoise(pipeline), known[True].full)
    assert seen == ["before", "base layer", "masked layer"]
    for handle in handles:
        handle.remove()
    called: set[nn.Module] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module) or None)
    try:
        close(denoise(pipeline), known[True].full)
    finally:
        handle.remove()
    assert called >= {layer.get_base_layer() for layer in adapter.layers.values()}


def test_saliency_of_hooked_layers(pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, quick: Config) -> None:
    words = {"forget": "cat", "surrogate": "dog", "templates": ("a {}",), "progress": False, "config": quick}
    wanted = fade.unlearn(pipeline, **words)
    other, calls = tiny_pipeline(tokenizer), []
    for module in other.unet.modules():
        module.register_forward_hook(lambda *_: calls.append(1) and None)
    found = fade.unlearn(other, **words)
    assert calls
    assert found.layers.keys() == wanted.layers.keys()
    for name, layer in found.layers.items():
        assert layer.lora_mask["fade"].mask == wanted.layers[name].lora_mask["fade"].mask


class EightBitLinear(nn.Linear):
    """As quantisation libraries subclass it."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_layers_that_are_not_plain_are_named_with_their_type(
    tokenizer: CLIPTokenizer, known: dict[bool, Known]
) -> None:
    name = r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn1\.to_q is a .*"
    for kind in ("EightBitLinear", "ParametrizedLinear", "dynamic.*Linear"):
        pipeline = tiny_pipeline(tokenizer)
        attention = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        if kind == "EightBitLinear":
            attention.to_q.__class__ = EightBitLinear
        elif kind == "ParametrizedLinear":
            nn.utils.parametrizations.weight_norm(attention.to_q)
        else:
            attention.to_q = quantised(attention)
        before = denoise(pipeline)
        with pytest.raises(FadeError, match=f"{name}{kind}, where an adapter needs a plain Linear or Conv2d"):
            fade.load_adapter(pipeline, known[True].file)
        assert torch.equal(denoise(pipeline), before) and not fade.adapters(pipeline)


def quantised(attention: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(attention.to_q), {nn.Linear}, torch.qint8)[0]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_nothing_is_merged_into_a_weight_that_is_computed(tokenizer: CLIPTokenizer, known: dict[bool, Known]) -> None:
    for norm in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm):
        pipeline = tiny_pipeline(tokenizer)
        adapter = fade.load_adapter(pipeline, known[True].file)
        before = weights(pipeline)
        norm(pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.get_base_layer())
        close(denoise(pipeline), known[True].full)
        with pytest.raises(FadeError, match="was not merged: a weight under it is computed"):
            adapter.merge()
        kept = {name: weight for name, weight in weights(pipeline).items() if name in before}
        assert same_bits(kept, {name: before[name] for name in kept})
        close(denoise(pipeline), known[True].full)


def test_other_weights_do_not_load_under_a_merged_adapter(
    pipeline: StableDiffusionPipeline, known: dict[bool, Known]
) -> None:
    adapter = fade.load_adapter(pipeline, known[True].file)
    state = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    adapter.merge()
    pipeline.unet.load_state_dict(pipeline.unet.state_dict())
    with pytest.raises(RuntimeError, match=r"base_layer.weight: fade is merged into other weights; unmerge\(\)"):
        pipeline.unet.load_state_dict(state)
    close(denoise(pipeline), known[True].full)
    adapter.unmerge()
    pipeline.unet.load_state_dict(state)
    live(pipeline, adapter, known[True])


@FORMS
def test_state_dicts_of_another_mask_and_of_the_other_form(
    pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer, values: bool
) -> None:
    random_adapter(pipeline, values=values, density=0.1)
    other, third = tiny_pipeline(tokenizer), tiny_pipeline(tokenizer)
    random_adapter(other, values=values, density=0.3, seed=1)
    random_adapter(third, values=not values)
    before = denoise(third)
    state = {name: tensor.clone() for name, tensor in other.unet.state_dict().items()}
    pipeline.unet.load_state_dict(state)
    torch.testing.assert_close(denoise(pipeline), denoise(other))
    fade.adapters(pipeline)["fade"].merge()
    close(denoise(pipeline), denoise(other), 1e-3)
    ours, theirs = ("values", "factors") if values else ("factors", "values")
    with pytest.raises(RuntimeError, match=f"it is in the {ours} form, the adapter 'fade' in the {theirs} form"):
        third.unet.load_state_dict(state)
    torch.testing.assert_close(denoise(third), before)


def test_processors_with_weights_of_their_own_are_no_base(
    pipeline: StableDiffusionPipeline, known: dict[bool, Known]
) -> None:
    before = fingerprint(pipeline.unet)
    processors = dict(pipeline.unet.attn_processors)
    for name in processors:
        attention = pipeline.unet.get_submodule(name.removesuffix(".processor"))
        if name.endswith("attn2.processor"):
            processors[name] = IPAdapterAttnProcessor2_0(attention.to_q.in_features, 64, num_tokens=(4,))
    pipeline.unet.set_attn_processor(processors)
    assert fingerprint(pipeline.unet) == before
    adapter = fade.load_adapter(pipeline, known[True].file)
    assert not any("processor" in name for name in adapter.layers)
