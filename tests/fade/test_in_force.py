"""Other adapters' lives leave a FADE adapter in force: whatever is loaded, set, fused, scaled, trained or deleted
beside it, the pipeline draws its base plus exactly the changes that are on; and what fails half-way changes nothing."""

import copy
import itertools
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from transformers import CLIPTokenizer

import fade
from fade.errors import FadeError

from .adapters import random_adapter
from .conftest import denoise, same_bits, tiny_pipeline, weights
from .neighbours import Deltas, Reference, deltas_of, draws, random_lora

FORMS = pytest.mark.parametrize("values", [False, True], ids=["factors", "values"])
TARGETS = ("to_q", "attn2.to_k", "to_out.0", "conv1", "conv_shortcut")
SHARED, ELSEWHERE = ("to_q", "to_k"), ("ff.net.0.proj", "conv2")


@pytest.fixture(scope="module")
def reference(tokenizer: CLIPTokenizer) -> Reference:
    return Reference(tokenizer)


@pytest.fixture
def seed() -> int:
    return random.SystemRandom().randrange(2**31)


def told(action: Callable[[], Any]) -> list[str]:
    """What warnings of ours a call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in caught if "FADE" in str(warning.message)]


def states(pipeline: StableDiffusionPipeline) -> dict[str, str]:
    return {row.name: row.state for row in fade.status(pipeline)}


def masked(
    pipeline: StableDiffusionPipeline, values: bool, seed: int = 0, name: str = "fade", **options: Any
) -> tuple[fade.Adapter, Deltas]:
    adapter = random_adapter(pipeline, name, values=values, seed=seed, strength=0.3, targets=TARGETS, **options)
    return adapter, deltas_of(adapter)


@FORMS
@pytest.mark.parametrize("first", [True, False], ids=["loaded-before", "loaded-after"])
def test_loading_setting_and_deleting_others(
    pipeline: StableDiffusionPipeline, reference: Reference, seed: int, values: bool, first: bool
) -> None:
    lora, other = random_lora(pipeline, (*SHARED, *ELSEWHERE), seed)
    if first:
        pipeline.load_lora_weights(dict(lora), adapter_name="style")
    adapter, own = masked(pipeline, values)
    if not first:
        assert not told(lambda: pipeline.load_lora_weights(dict(lora), adapter_name="style"))
    assert draws(pipeline, reference((own, 1), (other, 1)))
    assert not told(lambda: pipeline.set_adapters("style", 0.5))
    assert draws(pipeline, reference((own, 1), (other, 0.5)))
    pipeline.set_adapters(["style", "fade"], [0.5, 0.25])
    assert draws(pipeline, reference((own, 0.25), (other, 0.5)))
    assert adapter.scale == 0.25
    pipeline.set_adapters("style", 2.0)
    assert draws(pipeline, reference((own, 0.25), (other, 2)))
    pipeline.unet.set_adapters(["fade", "style"], [{"down": 0.5, "mid": 0, "up": 2.0}, 1.0])
    by_block = {name: delta * adapter.scales[name] for name, delta in own.items()}
    assert set(adapter.scales.values()) == {0.5, 0, 2.0, 1.0}  # 1.0 outside attention blocks, as diffusers has it
    assert draws(pipeline, reference((by_block, 1), (other, 1)))
    with pytest.raises(FadeError, match="different scales"):
        _ = adapter.scale
    pipeline.set_adapters(["style", "fade"], [1.0, 0.0])
    assert draws(pipeline, reference((other, 1)))
    pipeline.set_adapters("fade")
    assert draws(pipeline, reference((own, 1)))
    assert states(pipeline) == {"fade": "on", "style": "off"}
    assert not told(lambda: pipeline.delete_adapters("style"))
    assert draws(pipeline, reference((own, 1)))
    assert adapter.enabled


@FORMS
def test_switched_off_by_its_name_it_stays_off(
    pipeline: StableDiffusionPipeline, reference: Reference, seed: int, values: bool
) -> None:
    lora, other = random_lora(pipeline, SHARED, seed)
    adapter, own = masked(pipeline, values)
    adapter.disable()
    pipeline.load_lora_weights(dict(lora), adapter_name="style")
    pipeline.set_adapters("style")
    pipeline.disable_lora()
    pipeline.enable_lora()
    assert draws(pipeline, reference((other, 1)))
    pipeline.delete_adapters("style")
    assert draws(pipeline, reference())
    assert not adapter.enabled
    with adapter.disabled():
        pass
    assert states(pipeline) == {"fade": "off"}
    adapter.enable()
    with adapter.disabled():
        assert draws(pipeline, reference())
    assert draws(pipeline, reference((own, 1)))
    assert not told(lambda: pipeline.delete_adapters("fade"))
    assert draws(pipeline, reference())
    assert not adapter.enabled


@FORMS
def test_everything_off_says_so_once_for_each_adapter(
    pipeline: StableDiffusionPipeline, reference: Reference, seed: int, values: bool
) -> None:
    lora, other = random_lora(pipeline, SHARED, seed)
    pipeline.load_lora_weights(dict(lora), adapter_name="style")
    (first, one), (second, two) = masked(pipeline, values), masked(pipeline, not values, seed=1, name="second")
    said = told(pipeline.disable_lora)
    assert [("'fade'" in text, "'second'" in text, "'cat'" in text) for text in said] == [
        (True, False, True),
        (False, True, True),
    ]
    assert not told(pipeline.disable_lora)
    assert draws(pipeline, reference())
    assert not first.enabled
    second.enable()
    assert draws(pipeline, reference((two, 1)))
    with first.disabled():
        assert draws(pipeline, reference((two, 1)))
    pipeline.set_adapters("style")
    assert not told(pipeline.enable_lora)
    assert draws(pipeline, reference((one, 1), (two, 1), (other, 1)))

    # fused by PEFT's own call, it goes out with everything as well, and at once
    pipeline.fuse_lora()
    assert states(pipeline) == {"style": "merged", "fade": "merged", "second": "merged"}
    assert len(told(pipeline.unet.disable_adapters)) == 2
    assert states(pipeline)["fade"] == "off"
    assert draws(pipeline, reference())
    pipeline.unet.enable_adapters()
    assert draws(pipeline, reference((one, 1), (two, 1), (other, 1)))

    # merged by name, it stays
    first.merge()
    assert len(told(pipeline.disable_lora)) == 1
    assert draws(pipeline, reference((one, 1)))
    pipeline.enable_lora()
    first.unmerge()
    said = told(pipeline.unload_lora_weights)
    assert len(said) == 2
    assert all("fade.load_adapter" in text for text in said)
    assert draws(pipeline, reference())
    assert not (first.enabled or first.merged or first.pinned)
    assert str(fade.status(pipeline)) == "no adapter is attached"
    assert not told(pipeline.unload_lora_weights)
    with pytest.raises(FadeError, match="no longer attached"):
        first.enable()
    _, again = masked(pipeline, values)
    assert draws(pipeline, reference((again, 1)))


@FORMS
def test_unpinned_it_is_an_adapter_like_others(
    pipeline: StableDiffusionPipeline, reference: Reference, seed: int, values: bool
) -> None:
    lora, other = random_lora(pipeline, SHARED, seed)
    adapter, own = masked(pipeline, values, pinned=False)
    pipeline.load_lora_weights(dict(lora), adapter_name="style")
    assert draws(pipeline, reference((other, 1)))
    pipeline.set_adapters(["style", "fade"])
    assert draws(pipeline, reference((own, 1), (other, 1)))
    assert not told(pipeline.disable_lora)
    pipeline.enable_lora()
    second, _ = masked(pipeline, values, seed=1, name="second", pinned=False)
    adapter.disable()
    pipeline.delete_adapters("style")
    second.remove()
    assert not adapter.enabled


@pytest.mark.parametrize(("dtype", "values"), [(torch.float32, False), (torch.float16, True), (torch.bfloat16, False)])
def test_fused_and_unfused_any_number_of_times(
    pipeline: StableDiffusionPipeline, seed: int, dtype: torch.dtype, values: bool
) -> None:
    pipeline.unet.to(dtype)
    # on layers of ours alone: on others PEFT un-merges by subtracting, which is not exact
    pipeline.load_lora_weights(random_lora(pipeline, TARGETS[:2], seed)[0], adapter_name="style")
    adapter, _ = masked(pipeline, values)
    before, drawn = weights(pipeline), denoise(pipeline)
    tolerance = {torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 0.2}[dtype]

    def same() -> bool:
        return torch.allclose(denoise(pipeline).float(), drawn.float(), rtol=tolerance, atol=tolerance)

    for names in (["style"], None, ["fade"]):
        pipeline.fuse_lora(adapter_names=names, safe_fusing=names is None)
        assert same()
        assert adapter.enabled
        pipeline.unfuse_lora()
        assert same_bits(weights(pipeline), before)
        assert torch.equal(denoise(pipeline), drawn)
    adapter.merge()
    held = weights(pipeline)
    for _ in range(2):
        pipeline.fuse_lora()
        assert same()
        pipeline.unfuse_lora()
        assert same_bits(weights(pipeline), held)
        pipeline.set_adapters("style")
    adapter.unmerge()
    second, _ = masked(pipeline, not values, seed=1, name="second")
    for order in (("fade", "second", "style"), ("style", "fade", "second"), ("second", "style", "fade")):
        for name in order:
            pipeline.fuse_lora(adapter_names=[name]) if name == "style" else fade.adapters(pipeline)[name].merge()
        for name in (*order[1:], order[0]):
            pipeline.unfuse_lora() if name == "style" else fade.adapters(pipeline)[name].unmerge()
        assert same_bits(weights(pipeline), before)
    second.remove()
    assert torch.equal(denoise(pipeline), drawn)


@FORMS
def test_fused_with_a_scale_it_comes_back_at_its_own(
    pipeline: StableDiffusionPipeline, reference: Reference, seed: int, values: bool
) -> None:
    lora, other = random_lora(pipeline, TARGETS[:2], seed)
    pipeline.load_lora_weights(lora, adapter_name="style")
    adapter, own = masked(pipeline, values)
    for strength, scales in ((1.0, (0.5, 0.0)), (0.75, (2.0, -1.0))):
        adapter.scale = strength
        for fused_at in scales:
            pipeline.set_adapters("style")
            pipeline.fuse_lora(lora_scale=fused_at)
            assert draws(pipeline, reference((own, strength * fused_at), (other, fused_at)))
            assert adapter.scale == strength * fused_at
            pipeline.unfuse_lora()
            assert adapter.scale == strength
    pipeline.set_adapters("style")
    pipeline.fuse_lora(adapter_names=["style"], lora_scale=0.5)
    assert draws(pipeline, reference((own, 0.75), (other, 0.5)))
    pipeline.unfuse_lora()
    pipeline.fuse_lora(lora_scale=0.5)
    pipeline.delete_adapters("style")  # un-merges it, and merges ours again as it was merged
    assert draws(pipeline, reference((own, 0.375)))


@FORMS
def test_a_scale_for_one_call_is_for_that_call(
    pipeline: StableDiffusionPipeline, reference: Reference, seed: int, values: bool
) -> None:
    lora, other = random_lora(pipeline, SHARED, seed)
    pipeline.load_lora_weights(lora, adapter_name="style")
    adapter, own = masked(pipeline, values)
    seen = []

    def note(module: torch.nn.Module, *_: Any) -> None:
        seen.append(next(iter(adapter.layers.values())).scaling["fade"])

    handle = pipeline.unet.mid_block.register_forward_hook(note)

    def run(scale: float) -> None:
        latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 64)
        pipeline.unet(latents, torch.tensor([3]), text, cross_attention_kwargs={"scale": scale})

    full = next(iter(adapter.layers.values())).full_scale("fade")
    for strength, scale in itertools.product((1.0, 0.3, 0.0), (0.5, 0, 1.0, -2, 0.0)):
        adapter.scale = strength
        run(scale)
        assert seen.pop() == pytest.approx(strength * full * scale)
        assert adapter.scale == strength
    handle.remove()

    def fail(*_: Any) -> None:
        raise RuntimeError("within the forward")

    handle = pipeline.unet.mid_block.register_forward_hook(fail)
    adapter.scale = 0.3
    for scale in (0.5, 0, 3):
        with pytest.raises(RuntimeError, match="within"):
            run(scale)
        assert adapter.scale == 0.3
    handle.remove()
    strengths = []

    def change(pipe: object, step: int, _: object, tensors: dict) -> dict:
        strengths.append(adapter.scale)
        adapter.scale = (0.0, 0.5, -1.0)[step]
        return tensors

    pipeline("a cat", num_inference_steps=3, output_type="latent", callback_on_step_end=change,
             cross_attention_kwargs={"scale": 0.5})  # fmt: skip
    assert strengths == [0.3, 0.0, 0.5]
    assert adapter.scale == -1.0
    for bad in (float("nan"), float("inf"), 1e9):
        with pytest.raises(FadeError, match="scale must be a number"):
            adapter.scale = bad
    adapter.scale = 1.0
    assert draws(pipeline, reference((own, 1), (other, 1)))


@pytest.mark.parametrize(("ours_first", "values"), [(True, True), (False, False), (False, True)])
def test_a_neighbour_is_hot_swapped(
    pipeline: StableDiffusionPipeline, reference: Reference, tmp_path: Path, seed: int, values: bool, ours_first: bool
) -> None:
    narrow, wide = (random_lora(pipeline, SHARED, seed + rank, rank) for rank in (4, 8))
    if not ours_first:
        pipeline.unet.enable_lora_hotswap(target_rank=8)
        pipeline.load_lora_weights(dict(narrow[0]), adapter_name="style")
    adapter, own = masked(pipeline, values)
    if ours_first:
        pipeline.unet.enable_lora_hotswap(target_rank=8, check_compiled="ignore")
        pipeline.load_lora_weights(dict(narrow[0]), adapter_name="style")
    assert draws(pipeline, reference((own, 1), (narrow[1], 1)))
    pipeline.load_lora_weights(dict(wide[0]), adapter_name="style", hotswap=True)
    assert draws(pipeline, reference((own, 1), (wide[1], 1)))
    adapter.merge()
    pipeline.load_lora_weights(dict(narrow[0]), adapter_name="style", hotswap=True)
    assert draws(pipeline, reference((own, 1), (narrow[1], 1)))
    adapter.unmerge()
    adapter.scale = 0.5
    assert draws(pipeline, reference((own, 0.5), (narrow[1], 1)))
    adapter.save(tmp_path / "a.safetensors")
    pipeline.unload_lora_weights()
    fade.load_adapter(pipeline, tmp_path / "a.safetensors")
    assert draws(pipeline, reference((own, 1)))


@FORMS
def test_anothers_training_goes_on_undisturbed(
    pipeline: StableDiffusionPipeline, reference: Reference, values: bool
) -> None:
    adapter, own = masked(pipeline, values)
    pipeline.unet.requires_grad_(False)
    config = LoraConfig(r=2, target_modules=["to_q", "ff.net.0.proj"], init_lora_weights=False)
    pipeline.unet.add_adapter(config, adapter_name="trained")

    def needed() -> set[str]:
        return {name for name, parameter in pipeline.unet.named_parameters() if parameter.requires_grad}

    trained = needed()
    assert trained
    assert all(".trained." in name for name in trained)
    second, _ = masked(pipeline, not values, seed=1, name="second")
    for action in (
        pipeline.disable_lora, pipeline.enable_lora, adapter.disable, adapter.enable, adapter.merge, adapter.unmerge,
        lambda: pipeline.set_adapters("trained"), lambda: setattr(adapter, "scale", 0.5), second.remove,
    ):  # fmt: skip
        action()
        if action != pipeline.disable_lora:  # PEFT freezes what it switches off
            assert needed() == trained
    adapter.scale = 1.0
    before = {name: parameter.detach().clone() for name, parameter in pipeline.unet.named_parameters()}
    optimizer = torch.optim.SGD([p for p in pipeline.unet.parameters() if p.requires_grad], lr=1e-2)
    sample = pipeline.unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 64)).sample
    sample.square().mean().backward()
    optimizer.step()
    changed = {name for name, p in pipeline.unet.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained
    pipeline.delete_adapters("trained")
    assert draws(pipeline, reference((own, 1)))
    for parameter in adapter.parameters():
        parameter.requires_grad_(True)
    pipeline.load_lora_weights(random_lora(pipeline, SHARED, 0)[0], adapter_name="style")
    pipeline.set_adapters("style")
    pipeline.disable_lora()
    pipeline.enable_lora()
    assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_pipelines_that_share_a_model_share_its_adapters(
    pipeline: StableDiffusionPipeline, reference: Reference
) -> None:
    adapter, own = masked(pipeline, values=True)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    handle = fade.adapters(other)["fade"]
    handle.scale = 0.5
    assert adapter.scale == 0.5
    assert draws(pipeline, reference((own, 0.5)))
    assert len(told(other.unload_lora_weights)) == 1
    assert not adapter.enabled
    assert draws(pipeline, reference())


def test_a_lora_that_cannot_be_loaded_leaves_ours_on(
    pipeline: StableDiffusionPipeline, reference: Reference, tmp_path: Path, seed: int
) -> None:
    adapter, own = masked(pipeline, values=True)
    lora, _ = random_lora(pipeline, SHARED, seed)
    lora[next(key for key in lora if "lora_B" in key)] = torch.zeros(3, 5)
    save_file(lora, tmp_path / "broken.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "broken.safetensors").read_bytes()[:500])
    for file, name in itertools.product(("broken", "cut"), ("style", "fad")):  # "fad" is a part of our name
        with pytest.raises(Exception, match=r".+"):
            pipeline.load_lora_weights(tmp_path, weight_name=f"{file}.safetensors", adapter_name=name)
        assert adapter.enabled
        assert draws(pipeline, reference((own, 1)))
        assert states(pipeline) == {"fade": "on"}


# --- errors half-way -------------------------------------------------------------------------------------------------


def everything(pipeline: StableDiffusionPipeline) -> dict[str, Any]:
    """All that a failed call must leave as it was."""
    unet = pipeline.unet
    found: dict[str, Any] = {
        "attributes": sorted(vars(unet)),
        "configurations": {name: type(config) for name, config in getattr(unet, "peft_config", {}).items()},
        "flag": unet._hf_peft_config_loaded,
        "random": bytes(torch.get_rng_state().numpy()),
    }
    for path, module in unet.named_modules():
        found[f"module {path}"] = type(module)
        if isinstance(module, BaseTunerLayer):
            names = ("active_adapters", "merged_adapters", "suspended")
            found[f"layer {path}"] = [list(getattr(module, name, [])) for name in names]
            found[f"layer {path}"] += [module.disable_adapters, dict(module.scaling), sorted(module.lora_A)]
            for name, mask in getattr(module, "lora_mask", {}).items():
                found[f"mask {path} {name}"] = mask.scale.item()
    for path, parameter in unet.named_parameters():
        found[f"tensor {path}"] = (parameter.requires_grad, bytes(parameter.detach().view(torch.uint8).numpy()))
    return found


class Failing:
    """Stands in for a function, and fails before or after its work in the n-th call."""

    def __init__(self, original: Callable[..., Any], call: int, error: type[BaseException], late: bool) -> None:
        self.original, self.left, self.error, self.late = original, call, error, late

    def __get__(self, instance: object, owner: type) -> Callable[..., Any]:
        return lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.late:
            raise self.error("injected")
        result = self.original(*args, **kwargs)
        if self.left == 0:
            raise self.error("injected")
        return result


LAYER = "fade.layers.MaskedLoraLayer."
ATTACHING = (
    "fade.adapter.inject_adapter_in_model", "fade.adapter.put_guards", "fade.adapter.execution_device",
    "fade.adapter.Configurations", LAYER + "set_mask", LAYER + "set_values", LAYER + "update_layer",
    LAYER + "set_scale", LAYER + "switch",
)  # fmt: skip
MERGING = (LAYER + "packed_values", LAYER + "_merge_one", "fade.layers.scatter_masked_", "fade.layers.gather_masked")
OPERATIONS = {
    "load": ATTACHING,
    "enable": (LAYER + "switch",),
    "scale": (LAYER + "set_scale",),
    "merge": MERGING,
    "unmerge": (*MERGING, LAYER + "_unmerge_all", LAYER + "take_out"),
    "remove": (LAYER + "drop", "fade.adapter.remove_guards", LAYER + "_unmerge_all", "fade.layers.scatter_masked_"),
    "save": (LAYER + "adapter_tensors", "fade.adapter.write_adapter_file"),
    "save_pretrained": (*MERGING, "fade.guards.own_modules"),
}


@pytest.fixture(scope="module")
def saved(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("saved")
    paths = {values: folder / f"{values}.safetensors" for values in (False, True)}
    for values, path in paths.items():
        density = 0.1 if values else 0.9  # so that this form is the smaller file
        random_adapter(tiny_pipeline(tokenizer), values=values, density=density, targets=SHARED).save(path)
    return paths


def prepared(
    operation: str, neighbour: str, values: bool, reference: Reference, saved: dict[bool, Path], out: Path
) -> tuple[StableDiffusionPipeline, Callable[[], Any]]:
    """A pipeline in the midst of other work, and the call that will fail."""
    reference()
    parts = {**reference.pipeline.components, "unet": copy.deepcopy(reference.pipeline.unet).to(torch.bfloat16)}
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    if neighbour != "none":
        pipeline.load_lora_weights(random_lora(pipeline, SHARED, 1)[0], adapter_name="style")
        pipeline.set_adapters("style", 0.5)
    if neighbour == "off":
        pipeline.disable_lora()
    for name, parameter in pipeline.unet.named_parameters():
        parameter.requires_grad_(neighbour == "trained" and ".style." in name)
    if operation == "load":
        return pipeline, lambda: fade.load_adapter(pipeline, saved[values], scale=0.5)
    beside = fade.load_adapter(pipeline, saved[not values], name="beside")
    adapter = fade.load_adapter(pipeline, saved[values])
    if operation in ("merge", "remove", "unmerge"):
        beside.merge()
    if operation in ("unmerge", "remove"):
        adapter.merge()
    if operation == "enable":
        adapter.disable()
    if operation == "save_pretrained" and neighbour != "none":
        pipeline.delete_adapters("style")
    return pipeline, {
        "enable": adapter.enable,
        "scale": lambda: setattr(adapter, "scale", 0.3),
        "merge": adapter.merge,
        "unmerge": adapter.unmerge,
        "remove": adapter.remove,
        "save": lambda: adapter.save(out / "file"),
        "save_pretrained": lambda: pipeline.unet.save_pretrained(out / "unet"),
    }[operation]


@pytest.mark.parametrize(
    ("operation", "neighbours"),
    [("load", "none"), ("load", "on"), ("load", "off"), ("load", "trained")]
    + [(operation, "none on off trained") for operation in OPERATIONS if operation != "load"],
)
def test_what_fails_half_way_changes_nothing(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: dict[bool, Path],
    seed: int, operation: str, neighbours: str,
) -> None:  # fmt: skip
    chance = random.Random(seed)
    neighbour = chance.choice(neighbours.split())
    values = chance.random() < 0.5
    pipeline, act = prepared(operation, neighbour, values, reference, saved, tmp_path)
    before = everything(pipeline)
    failed = 0
    sure, *others = OPERATIONS[operation]
    for target in (sure, *chance.sample(others, min(2, len(others)))):
        call = 1 if target == sure else chance.choice((1, 2, 7, 12))
        error, late = chance.choice((KeyboardInterrupt, RuntimeError, MemoryError)), chance.random() < 0.5
        owner, _, attribute = target.rpartition(".")
        where = fade.layers.MaskedLoraLayer if owner.endswith("MaskedLoraLayer") else __import__(owner, fromlist="_")
        failing = Failing(getattr(where, attribute), call, error, late)
        with monkeypatch.context() as patch:
            patch.setattr(where, attribute, failing)
            try:
                act()
                raised = False
            except error:
                raised = True
        if not raised:
            assert failing.left > 0, f"{target}: the error was swallowed"  # or never called so often
            pipeline, act = prepared(operation, neighbour, values, reference, saved, tmp_path)
            before = everything(pipeline)
            continue
        failed += 1
        after = everything(pipeline)
        different = [key for key in before | after if before.get(key) != after.get(key)]
        assert not different, f"{target} call {call}, {error.__name__}, late {late}: {different[:5]}"
    assert failed
    act()
