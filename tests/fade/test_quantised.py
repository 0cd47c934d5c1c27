"""Adapters on quantised and offloaded models: every packing that docs/quantised.md names, by its own library where that
is installed, and one of no known library."""

import functools
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import CLIPTokenizer

import fade
import fade.saliency
from fade.adapter import Adapter, attach, new_metadata
from fade.adapter_file import read_adapter_file
from fade.backbones import backbone_for
from fade.base_model import base_name, fingerprint, outline, target_layers
from fade.combine import combine_adapters
from fade.concept import concept_from_words
from fade.config import Config
from fade.errors import FadeError, WrongBaseError
from fade.layers import MaskedLoraLayer, MaskedLoraLinear
from fade.quantised import float_weight, quantisation, refuse_untrainable
from fade.regions import matrix_shape
from fade.tuner import FadeConfig
from fade_kernels import BitMask, GradientMagnitude

from .backbones.pipelines import build
from .conftest import tiny_pipeline

# --- how layers are packed -------------------------------------------------------------------------------------------


class Packed(Tensor):
    """The weight of no known library: bytes of 4 bits [N·K/2, 1], as bitsandbytes lays them out."""


class PackedLinear(nn.Linear):
    """Two weights in each byte, in 16 steps of `step`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.step = layer.weight.detach().abs().max() / 7
        steps = (layer.weight.detach() / self.step).round().add(8).to(torch.uint8).view(-1, 2)
        packed = (steps[:, :1] * 16 + steps[:, 1:]).as_subclass(Packed)
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        packed = self.weight.detach().as_subclass(Tensor)
        steps = torch.cat([packed // 16, packed % 16], dim=1).view(self.out_features, self.in_features)
        return F.linear(x, ((steps.float() - 8) * self.step).to(x.dtype), self.bias)


def bitsandbytes_layer(kind: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def quantise(layer: nn.Linear) -> nn.Module:
        library = pytest.importorskip("bitsandbytes")
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        packed = getattr(library.nn, kind)(*sizes, **options)
        packed.load_state_dict(layer.state_dict())
        # As on a GPU: some CPUs have a layout of their own for drawing, which takes no width below 64 and no gradient.
        packed.support_avx512bf16_for_cpu = False
        return packed.to("cpu")

    return quantise


def torchao_layer(name: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def quantise(layer: nn.Linear) -> nn.Module:
        library = pytest.importorskip("torchao.quantization")
        given = {key: value() if callable(value) else value for key, value in options.items()}
        inside = nn.Sequential(layer)
        library.quantize_(inside, getattr(library, name)(**given))
        return inside[0]

    return quantise


def _groups_of_32() -> Any:
    return pytest.importorskip("torchao.quantization").PerGroup(32)


def gguf_layer(layer: nn.Linear) -> nn.Module:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    dtype = layer.weight.dtype
    packed = GGUFLinear(layer.in_features, layer.out_features, compute_dtype=dtype)
    data = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().float().numpy(), kind))
    packed.weight, packed.bias = GGUFParameter(data, quant_type=kind), layer.bias
    return packed


def quanto_layer(layer: nn.Linear) -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto")
    inside = nn.Sequential(layer)
    quanto.quantize(inside, weights=quanto.qint8)
    quanto.freeze(inside)
    return inside[0]


SCHEMES: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bitsandbytes NF4, FP4": bitsandbytes_layer("Linear4bit", quant_type="nf4", compute_dtype=torch.float32),
    "bitsandbytes int8": bitsandbytes_layer("Linear8bitLt", has_fp16_weights=False),
    "torchao int8 weight-only": torchao_layer("Int8WeightOnlyConfig"),
    "torchao int4 weight-only": torchao_layer(
        "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=_groups_of_32
    ),
    "torchao float8 weight-only": torchao_layer("Float8WeightOnlyConfig"),
    "torchao int8 dynamic": torchao_layer("Int8DynamicActivationInt8WeightConfig"),
    "GGUF": gguf_layer,
    "quanto": quanto_layer,
    "another subclass of `nn.Linear` with a packed weight": PackedLinear,
}
UNKNOWN = "another subclass of `nn.Linear` with a packed weight"
EVERY = pytest.mark.parametrize("scheme", SCHEMES)
"""Of a layer alone; whole pipelines, which take seconds, for those that differ in what is done with them."""
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*cast from torch.float32 to float16")


@functools.cache
def documented() -> dict[str, dict[str, str]]:
    """The first table of docs/quantised.md: what works on which base."""
    text = (Path(__file__).parents[2] / "docs" / "quantised.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in re.findall(r"(?m)^\|.*\|$", text)]
    head, _, *rows = rows[: next(i for i, row in enumerate(rows) if row[0] == "on the pipeline")]
    return {re.sub(r" \(.*\)", "", base): dict(zip(head[1:], told, strict=True)) for base, *told in rows}


def test_every_base_of_the_table_is_tested() -> None:
    assert set(documented()) == set(SCHEMES)


def quantise(model: nn.Module, scheme: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Packs every linear layer of the model's blocks, as loaders do it, and freezes the model."""
    nn.Module.to(model, dtype)
    named = {path for path, module in model.named_modules() if type(module) is nn.Linear and "blocks" in path}
    return quantise_layers(model, named, scheme)


def quantise_layers(model: nn.Module, names: Iterable[str], scheme: str) -> nn.Module:
    for name in sorted(names):
        if quantisation(layer := model.get_submodule(name)) is None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, SCHEMES[scheme](layer))
    return model.requires_grad_(False).eval()


def flux(scheme: str | None = None, seed: int = 0) -> Any:
    pipeline = build("FLUX.1", seed)
    if scheme is not None:
        quantise(pipeline.transformer, scheme)
    return pipeline


@torch.no_grad()
def draw(pipeline: Any) -> Tensor:
    """One answer of the denoiser to random latents."""
    backbone, generator = backbone_for(pipeline), torch.Generator().manual_seed(1)
    side = backbone.side(None) // 2
    latents = torch.randn(2, 4, side, side, generator=generator).to(backbone.dtype)
    prompts = backbone.encode_prompts(["a cat", "a house"])
    return backbone.predict(latents, torch.tensor([0.3, 0.8]), prompts).float()


def random_masks(layers: dict[str, nn.Module], density: float = 0.2) -> dict[str, BitMask]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: BitMask.pack(torch.rand(matrix_shape(layer), generator=generator) < density)
        for name, layer in layers.items()
    }


def random_adapter(pipeline: Any, values: bool = True, forget: str = "cat") -> Adapter:
    denoiser = pipeline.transformer
    masks = random_masks(target_layers(denoiser, backbone_for(pipeline).targets))
    digests = {**fingerprint(denoiser), **outline(denoiser)}
    concept = concept_from_words(forget, "dog")
    metadata = new_metadata(concept, Config(), base_name(pipeline), digests, 1.0, "transformer")
    adapter = attach(pipeline, "fade", masks, rank=2, alpha=2.0, values=values, metadata=metadata)
    for index, parameter in enumerate(adapter.parameters()):
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    return adapter.enable()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter made on the model as it was before it was quantised."""
    path = tmp_path_factory.mktemp("quantised") / "adapter.safetensors"
    random_adapter(flux()).save(path)
    return path


def load(pipeline: Any, file: Path) -> Adapter:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the weights are")
        return fade.load_adapter(pipeline, file)


def packed_bits(pipeline: Any) -> dict[str, Tensor]:
    """Copies of what every base layer makes of the identity: its weight as it is used, packed or not."""
    layers = target_layers(pipeline.transformer)
    with torch.no_grad():
        return {name: layer(torch.eye(matrix_shape(layer)[1])) for name, layer in layers.items()}


# --- layers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def packed_layer(scheme: str, dtype: torch.dtype, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return SCHEMES[scheme](nn.Linear(96, 64).to(dtype)).requires_grad_(False)


def masked(base: nn.Module, name: str = "fade") -> MaskedLoraLinear:
    return MaskedLoraLinear(base, name, LoraConfig(r=3, lora_alpha=6, target_modules=["x"]), r=3, lora_alpha=6)


@EVERY
@pytest.mark.parametrize("values", [False, True], ids=["factors", "values"])
def test_a_layer_adds_its_delta_to_what_the_packed_one_gives(scheme: str, values: bool, dtype: torch.dtype) -> None:
    base = packed_layer(scheme, dtype, 0)
    assert quantisation(base) is not None
    mask = random_masks({"": base})[""]
    layer = masked(base)
    if values:
        layer.set_values("fade", mask, torch.randn(mask.count))
    else:
        nn.init.normal_(layer.lora_B["fade"].weight)
        layer.set_mask("fade", mask)
    x = torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    found, own = layer(x), base(x)
    delta = layer.get_delta_weight("fade")
    assert delta.shape == (64, 96) and found.dtype == dtype
    expected = own.double() + x.double() @ delta.double().T
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= (1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)
    assert (found - own).abs().max() > 0.1
    if documented()[scheme]["train"] != "no":
        found.float().square().sum().backward()
        assert x.grad.count_nonzero() and all(p.grad.count_nonzero() for p in layer.adapter_parameters("fade")[:1])
    layer.scaling["fade"] = 0.0
    assert torch.equal(layer(x), own)


@EVERY
def test_saliency_is_the_gradient_of_the_weight_that_is_used(scheme: str, dtype: torch.dtype) -> None:
    base = packed_layer(scheme, dtype, 1)
    x = torch.randn(4, 7, 96, dtype=dtype)
    slices = (slice(3, 40), slice(10, 90))
    for region in (None, slices):
        with GradientMagnitude({"a": base}, regions={} if region is None else {"a": region}) as watch:
            y = base(x)
            (y.float() ** 2).mean().backward()
        gradient = (2 * y.detach().double() / y.numel()).flatten(0, 1).T @ x.double().flatten(0, 1)
        gradient = gradient.abs() if region is None else gradient.abs()[region]
        close = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(watch.saliency["a"].double(), gradient, rtol=close, atol=close * gradient.max())


@EVERY
def test_weights_are_unpacked_for_the_closed_form(scheme: str, dtype: torch.dtype) -> None:
    base = packed_layer(scheme, dtype, 2)
    if documented()[scheme]["closed form"] == "no":
        with pytest.raises(FadeError, match=r"no known way to unpack .*Packed; choose the method distillation"):
            float_weight(base)
        return
    weight = float_weight(base)
    assert weight.shape == (64, 96) and weight.is_floating_point() and not weight.requires_grad
    with torch.no_grad():
        used = base(torch.eye(96, dtype=dtype)) - base(torch.zeros(1, 96, dtype=dtype))
    torch.testing.assert_close(weight.float(), used.T.float(), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("first", ["LoRA", "FADE"])
@EVERY
def test_an_ordinary_lora_beside_it(scheme: str, first: str) -> None:
    """PEFT wraps quantised layers in classes of its own, which a mask is then added to."""
    base = packed_layer(scheme, torch.float32, 4)
    model = nn.ModuleDict({"a": base})
    x, mask = torch.randn(5, 96), random_masks({"": base})[""]
    own = base(x)
    configs = {
        "style": LoraConfig(r=2, target_modules=["a"], init_lora_weights=False),
        "fade": FadeConfig(r=2, target_modules=["a"], init_lora_weights=False),
    }
    for name in ("style", "fade") if first == "LoRA" else ("fade", "style"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(configs[name], model, name)
    layer = model["a"]
    assert isinstance(layer, MaskedLoraLayer)
    layer.set_values("fade", mask, torch.randn(mask.count))
    layer.set_adapter(["style", "fade"])
    deltas = {name: layer.get_delta_weight(name).float() for name in ("style", "fade")}
    torch.testing.assert_close(layer(x), own + x @ (deltas["style"] + deltas["fade"]).T, rtol=1e-4, atol=1e-4)
    layer.switch("style", False)
    torch.testing.assert_close(layer(x), own + x @ deltas["fade"].T, rtol=1e-4, atol=1e-4)
    with pytest.raises(FadeError, match="are quantised"):
        layer.merge()
    layer.drop("fade")
    layer.set_adapter(["style"])
    torch.testing.assert_close(layer(x), own + x @ deltas["style"].T, rtol=1e-4, atol=1e-4)


def test_the_sum_of_several_adapters_is_rounded_once() -> None:
    """In bfloat16, each of a hundred small changes would be lost beside the base layer's output alone."""
    base = packed_layer(UNKNOWN, torch.bfloat16, 5)
    nn.init.constant_(base.bias, 64.0)
    layer, names = masked(base, "a0"), [f"a{i}" for i in range(100)]
    every = BitMask.pack(torch.ones(64, 96, dtype=torch.bool))
    for name in names:
        if name != "a0":
            layer.update_layer(name, 3, lora_alpha=3, config=LoraConfig(r=3, target_modules=["x"]))
        layer.set_values(name, every, torch.full((every.count,), 1 / 960))
    layer.set_adapter(names)
    layer.scaling["a0"] = 1.0
    x = torch.ones(1, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close((layer(x) - base(x)).float(), torch.full((1, 64), 10.0), rtol=0.05, atol=0.5)


# --- a pipeline's life with an adapter -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["bitsandbytes NF4, FP4", "torchao int8 dynamic", "GGUF", UNKNOWN])
def test_an_adapter_of_the_16_bit_model_on_the_quantised_one(scheme: str, file: Path, tmp_path: Path) -> None:
    pipeline = flux(scheme)
    base, before = draw(pipeline), packed_bits(pipeline)
    told = r"was trained on unnamed \(float32:\w+\), but this pipeline is unnamed \(quantised:\w+\): "
    differs = r"the weights are not quantised there and quantised \(\w+ [\w ]+\) here$"
    with pytest.warns(UserWarning, match=told + differs):
        adapter = fade.load_adapter(pipeline, file)
    full = draw(pipeline)
    assert (full - base).abs().max() > 0.01
    with adapter.disabled():
        assert torch.equal(draw(pipeline), base)
    adapter.scale = 0.0
    torch.testing.assert_close(draw(pipeline), base, rtol=1e-5, atol=1e-5)
    adapter.scale = 1.0
    with pytest.raises(FadeError, match=r"was not merged: the weights are quantised .*merge it there, or export\(\)"):
        adapter.merge()
    assert not adapter.merged and torch.equal(draw(pipeline), full)
    with pytest.raises(FadeError, match="the weights are quantised"):
        pipeline.transformer.save_pretrained(tmp_path / "merged")
    adapter.save(tmp_path / "again.safetensors")
    adapter.export(tmp_path / "diff.safetensors", "diff")
    other = flux(scheme)
    load(other, tmp_path / "again.safetensors")
    assert torch.equal(draw(other), full)
    adapter.remove()
    assert torch.equal(draw(pipeline), base)
    now = packed_bits(pipeline)
    assert all(torch.equal(now[name], bits) for name, bits in before.items())


QUICK = Config().replace(
    locate__keep=0.1, locate__passes=1, locate__batch_size=2, data__forget_samples=2, data__retain_samples=2,
    data__sampling_steps=1, overwrite__method="distillation", overwrite__steps=3, overwrite__batch_size=2,
    overwrite__retain_batch_size=2, overwrite__stop_forget=0.0, overwrite__learning_rate=0.05, overwrite__pool=2,
)  # fmt: skip
WORDS = {"templates": ["a picture of {}"], "retain": ["a house", "a red car"], "progress": False}


@pytest.mark.parametrize("scheme", ["bitsandbytes NF4, FP4", "torchao int8 weight-only", "torchao int8 dynamic"])
def test_training_on_a_quantised_base(scheme: str, tmp_path: Path) -> None:
    pipeline = flux(scheme)
    base, before = draw(pipeline), packed_bits(pipeline)
    if documented()[scheme]["train"] == "no":
        with pytest.raises(FadeError, match=r"is quantised \(torchao \w+\), and no gradient comes through"):
            fade.unlearn(pipeline, "cat", "dog", config=QUICK, output=tmp_path / "run", **WORDS)
        assert not fade.adapters(pipeline) and not (tmp_path / "run").exists()
        return
    adapter = fade.unlearn(pipeline, "cat", "dog", config=QUICK, output=tmp_path, **WORDS)
    assert adapter.metadata["fingerprint"]["scheme"].count(" ") >= 1
    assert all(parameter.count_nonzero() for parameter in adapter.parameters())
    drawn = draw(pipeline)
    assert torch.isfinite(drawn).all() and not torch.allclose(drawn, base, atol=1e-4)
    with adapter.disabled():
        now = packed_bits(pipeline)
        assert all(torch.equal(now[name], bits) for name, bits in before.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fade.load_adapter(flux(scheme), tmp_path)
    plain = flux()
    with pytest.warns(UserWarning, match=r"the weights are quantised \(.*\) there and not quantised here$"):
        there = fade.load_adapter(plain, tmp_path)
    changed = draw(plain)
    there.merge()
    torch.testing.assert_close(draw(plain), changed, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", ["bitsandbytes int8", "torchao int8 weight-only", UNKNOWN])
def test_what_was_loaded_under_inference_mode_draws_and_is_not_trained(scheme: str, file: Path) -> None:
    with torch.inference_mode():
        pipeline = flux(scheme)
    base = draw(pipeline)
    with pytest.raises(FadeError, match=r"was loaded under torch\.inference_mode\(\).* load the model outside of it"):
        fade.unlearn(pipeline, "cat", "dog", config=QUICK, **WORDS)
    assert torch.equal(draw(pipeline), base)
    load(pipeline, file)
    assert not torch.allclose(draw(pipeline), base, atol=1e-3)


@pytest.mark.parametrize("scheme", ["bitsandbytes int8", UNKNOWN])
def test_the_closed_form_on_a_quantised_base(scheme: str) -> None:
    """The same values as on a model whose weights are those that the packed ones stand for."""
    config = QUICK.replace(overwrite__method="closed-form", locate__saliency="auto").without_ignored()
    pipeline = flux(scheme)
    readers = frozenset().union(*backbone_for(pipeline).text_layers().values())
    quantise_layers(pipeline.transformer, readers, scheme)
    if documented()[scheme]["closed form"] == "no":
        with pytest.raises(FadeError, match="no known way to unpack"):
            fade.unlearn(pipeline, "cat", "dog", config=config, **WORDS)
        return
    other = flux()
    for name, layer in target_layers(other.transformer).items():
        layer.weight.data = float_weight(target_layers(pipeline.transformer)[name]).float()
    found, expected = (fade.unlearn(one, "cat", "dog", config=config, **WORDS) for one in (pipeline, other))
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in found.layers.items():
        delta, reference = layer.get_delta_weight("fade"), expected.layers[name].get_delta_weight("fade")
        torch.testing.assert_close(delta, reference, rtol=1e-3, atol=1e-3 * reference.abs().max())


# --- which base it is ------------------------------------------------------------------------------------------------


def test_what_differs_is_named(file: Path, tmp_path: Path) -> None:
    quantised = random_adapter(flux(UNKNOWN))
    quantised.save(tmp_path / "quantised.safetensors")

    def told(pipeline: Any, path: Path) -> list[str]:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            fade.load_adapter(pipeline, path)
        return [str(one.message) for one in raised if "was trained on" in str(one.message)]

    norms = "norms, biases and what else is not quantised are others, so that it may be another model"
    assert told(flux(UNKNOWN), tmp_path / "quantised.safetensors") == []
    (other,) = told(flux(UNKNOWN, seed=1), tmp_path / "quantised.safetensors")
    assert other.endswith(f": {norms}")
    (other,) = told(flux(UNKNOWN, seed=1), file)
    assert re.search(r"are not quantised there and quantised \(tests Packed\) here; norms.* another model$", other)
    (other,) = told(flux(seed=1), tmp_path / "quantised.safetensors")
    assert re.search(r"are quantised \(tests Packed\) there and not quantised here; norms.* another model$", other)
    narrow = flux(UNKNOWN)
    nn.Module.to(narrow.transformer, torch.bfloat16)
    assert told(narrow, tmp_path / "quantised.safetensors") == []  # the same, rounded
    wider = flux(UNKNOWN)
    wider.transformer.norm_out.extra = nn.Linear(3, 5)
    (other,) = told(wider, tmp_path / "quantised.safetensors")
    assert "layers have other names or shapes" in other
    with pytest.raises(WrongBaseError, match="Load the base it was made for"):
        fade.load_adapter(flux(seed=1), file)  # both as they were: an error


def test_a_file_that_tells_weights_alone(tmp_path: Path) -> None:
    adapter = random_adapter(flux())
    adapter.metadata["fingerprint"] = fingerprint(adapter.denoiser)
    adapter.save(tmp_path / "adapter.safetensors")
    with pytest.warns(UserWarning, match=r"quantised \(.*\) here; whether the rest is the same is not known$"):
        fade.load_adapter(flux(UNKNOWN), tmp_path / "adapter.safetensors")


def test_adapters_of_both_add_up(file: Path, tmp_path: Path) -> None:
    adapter = random_adapter(flux(UNKNOWN), forget="bird")
    adapter.parameters()[0].data.neg_()
    adapter.save(tmp_path / "quantised.safetensors")
    for first, second in ((file, tmp_path / "quantised.safetensors"), (tmp_path / "quantised.safetensors", file)):
        with pytest.warns(UserWarning, match="the weights are"):
            combine_adapters([first, second], tmp_path / "sum.safetensors", overwrite=True)
        whole = read_adapter_file(tmp_path / "sum.safetensors").metadata["fingerprint"]
        assert whole == read_adapter_file(first).metadata["fingerprint"]


def test_a_fingerprint_outlives_attaching_and_training(tmp_path: Path) -> None:
    pipeline = flux(UNKNOWN)
    before = fingerprint(pipeline.transformer)
    assert before["scheme"] == "tests Packed" and next(iter(before)) == "quantised"
    adapter = random_adapter(pipeline, values=False)
    assert fingerprint(pipeline.transformer) == before
    assert fingerprint(flux().transformer, tuple(before))["structure"] == before["structure"]
    adapter.remove()
    assert fingerprint(pipeline.transformer) == before


def test_an_adapter_of_another_family(tokenizer: CLIPTokenizer, file: Path) -> None:
    message = r"^the model has no layer \S+; was the adapter made for another model\?$"
    for pipeline, check_base in ((tiny_pipeline(tokenizer), False), (flux(UNKNOWN), True)):
        other = build("Stable Diffusion 3/3.5") if check_base else None
        path = file
        if other is not None:
            path = file.parent / "sd3.safetensors"
            random_adapter(other).save(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(FadeError, match=message):
                fade.load_adapter(pipeline, path, check_base=check_base)
        assert not fade.adapters(pipeline)


def test_a_quantised_convolution_is_named(tokenizer: CLIPTokenizer) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    pipeline = tiny_pipeline(tokenizer)
    quanto.quantize(pipeline.unet, weights=quanto.qint8, include="*conv_in")
    quanto.freeze(pipeline.unet)
    config = QUICK.replace(locate__targets=("conv_in", "to_q"))
    with pytest.raises(FadeError, match=r"conv_in is a quantised convolution \(optimum \w+ qint8\)"):
        fade.unlearn(pipeline, "cat", "dog", config=config, **WORDS)


def test_loaded_quantised_by_diffusers(file: Path, tmp_path: Path) -> None:
    """Through `from_pretrained`, on which a quantiser of diffusers then watches."""
    torchao = pytest.importorskip("torchao.quantization")
    pipeline = flux()
    pipeline.transformer.save_pretrained(tmp_path)
    config = diffusers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    pipeline.transformer = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=config)
    base = draw(pipeline)
    adapter = load(pipeline, file)
    assert not torch.allclose(draw(pipeline), base, atol=1e-3)
    adapter.remove()
    both = QUICK.replace(overwrite__method="both").without_ignored()
    adapter = fade.unlearn(pipeline, "cat", "dog", config=both, **WORDS)
    assert len(adapter.metadata["run"]["losses"]["forget"]) > 1 and "residual" in adapter.metadata["run"]
    adapter.disable()
    assert torch.equal(draw(pipeline), base)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="diffusers quantises for bitsandbytes on a GPU alone")
@pytest.mark.parametrize("kind", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_loaded_quantised_for_bitsandbytes(kind: dict[str, Any], file: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pipeline = flux()
    nn.Module.to(pipeline.transformer, torch.bfloat16).save_pretrained(tmp_path)
    pipeline.transformer = diffusers.FluxTransformer2DModel.from_pretrained(
        tmp_path, quantization_config=diffusers.BitsAndBytesConfig(**kind), torch_dtype=torch.bfloat16
    )
    pipeline.to("cuda")
    load(pipeline, file).remove()
    adapter = fade.unlearn(pipeline, "cat", "dog", config=QUICK, **WORDS)
    assert all(parameter.isfinite().all() and parameter.count_nonzero() for parameter in adapter.parameters())


def test_what_some_cpus_pack_for_drawing_alone_draws_and_is_not_trained() -> None:
    """bitsandbytes lays 4 bits out anew in the first forward pass without gradients, and has none from then on."""
    functional = pytest.importorskip("bitsandbytes.functional")
    if not functional.has_avx512bf16():
        pytest.skip("this CPU has no bfloat16 products")
    base = bitsandbytes_layer("Linear4bit", quant_type="nf4", compute_dtype=torch.float32)(nn.Linear(128, 64)).eval()
    base.requires_grad_(False).support_avx512bf16_for_cpu = True
    layer, mask = masked(base), random_masks({"": base})[""]
    layer.set_values("fade", mask, torch.randn(mask.count))
    x = torch.randn(7, 128)
    with torch.no_grad():
        own = base(x)
        assert tuple(base.weight.shape) == (64, 64) and float_weight(base).shape == (64, 128)
        torch.testing.assert_close(layer(x), own + x @ layer.get_delta_weight("fade").T, rtol=1e-5, atol=1e-5)
    with pytest.raises(FadeError, match="a is quantised .* no gradient comes through it here"):
        refuse_untrainable({"a": base}, torch.float32, torch.device("cpu"))
    refuse_untrainable({"a": base}, torch.float32, torch.device("cuda"))  # where it will be laid out otherwise


# --- offloaded, fused ------------------------------------------------------------------------------------------------


def test_unlearning_under_model_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser is on its device before anything is made beside its weights, whichever part was there before."""
    plain, offloaded, events = flux(), flux(), []
    offloaded.enable_model_cpu_offload(device="cpu")
    before = CpuOffload.pre_forward

    def recorded(hook: CpuOffload, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        events.append(type(module).__name__)
        return before(hook, module, *args, **kwargs)

    class Watch(GradientMagnitude):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            events.append("accumulators")
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", recorded)
    monkeypatch.setattr(fade.saliency, "GradientMagnitude", Watch)
    # Without images to encode or draw, the text encoder is what was there last.
    first, second = (fade.unlearn(one, "cat", "dog", config=QUICK, **WORDS) for one in (offloaded, plain))
    assert events[events.index("accumulators") - 1] == "FluxTransformer2DModel"
    for name, layer in first.layers.items():
        torch.testing.assert_close(layer.get_delta_weight("fade"), second.layers[name].get_delta_weight("fade"))
    drawn = offloaded("a cat", num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(0))
    again = plain("a cat", num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn[0], again[0])


@pytest.mark.parametrize("how", ["sequential", "group", "casting"])
def test_what_is_offloaded_in_pieces_is_not_trained(how: str) -> None:
    pipeline = flux()
    if how == "sequential":
        cpu_offload(pipeline.transformer, torch.device("cpu"))
    elif how == "group":
        device = torch.device("cpu")
        pipeline.transformer.enable_group_offload(device, device, offload_type="leaf_level")
    else:
        pipeline.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(FadeError, match="unlearn first, then offload"):
        fade.unlearn(pipeline, "cat", "dog", config=QUICK, **WORDS)
    assert not fade.adapters(pipeline)


@pytest.mark.parametrize("scheme", [None, UNKNOWN])
def test_fused_projections_of_a_transformer_are_refused(scheme: str | None, file: Path) -> None:
    pipeline = flux()
    pipeline.transformer.fuse_qkv_projections()
    if scheme is not None:
        quantise(pipeline.transformer, scheme)
    for attach_to in (
        lambda: fade.load_adapter(pipeline, file, check_base=False),
        lambda: fade.unlearn(pipeline, "cat", "dog", config=QUICK, **WORDS),
    ):
        with pytest.raises(FadeError, match="are fused copies; call unfuse_qkv_projections"):
            attach_to()
    pipeline.transformer.unfuse_qkv_projections()
    assert load(pipeline, file).enabled
