"""UCE and SPEED on pipelines: which tokens they read, which layers they change and how, and whom they refuse."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

import fade
from fade.adapter_file import read_adapter_file
from fade.backbones import backbone_for
from fade.config import Config
from fade.digitcanvas.bundled import MODEL as DIGITCANVAS
from fade.errors import FadeError
from fade.methods.embeddings import last_difference
from fade.methods.speed import centres

from ..backbones.pipelines import build
from ..conftest import same_bits, tiny_pipeline, weights
from .changes import changes

# Words that are one token each.
WORDS = {"forget": "three", "surrogate": "eight", "templates": ("{}",), "retain": ("neon",), "progress": False}
ENDS = {"uce": ("to_k", "to_v"), "speed": ("to_v",)}


@pytest.mark.parametrize(
    ("ids", "others", "position"),
    [([0, 5, 9], [0, 6, 9], 1), ([0, 5, 6, 2, 9], [0, 7, 2, 9], 2), ([0, 5, 9], [0, 9], 1), ([0, 9], [0, 5, 9], 0)],
)
def test_the_concepts_last_token(ids: list[int], others: list[int], position: int) -> None:
    assert last_difference(ids, others) == position


def test_centres_are_means_of_what_is_nearest() -> None:
    places = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 7.0]], dtype=torch.float64)
    noise = 0.1 * torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = places.repeat_interleave(10, 0) + noise
    expected = torch.stack([part.mean(0) for part in tokens.split(10)])
    torch.testing.assert_close(centres(tokens), expected)
    assert torch.equal(centres(tokens[:2]), tokens[:2])


def test_uce_of_one_word_is_the_papers_weight(pipeline: StableDiffusionPipeline, tokenizer: CLIPTokenizer) -> None:
    """Of "three" the one token between begin and end, read and answered at position 1; nothing else changes."""
    options = {"erase_scale": 0.7, "preserve_scale": 1.3, "weight": 0.2, "preserved": "last"}
    base = weights(pipeline)
    adapter = fade.unlearn(pipeline, **WORDS, method="uce", config=Config.of("uce", options=options))
    assert same_bits(weights(pipeline), base)
    assert adapter.run["path"] == "text path"

    other = tiny_pipeline(tokenizer)
    states = backbone_for(other).encode_prompts(["three", "eight", "neon"])["prompt_embeds"].double()
    assert len(tokenizer("three")["input_ids"]) == len(tokenizer("neon")["input_ids"]) == 3
    c, guide, kept = states[:, 1]
    right = 0.7 * torch.outer(guide, c) + 1.3 * torch.outer(kept, kept) + 0.2 * torch.eye(len(c)).double()
    gram = 0.7 * torch.outer(c, c) + 1.3 * torch.outer(kept, kept) + 0.2 * torch.eye(len(c)).double()
    names = [n for n, m in other.unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]
    assert sorted(adapter.layers) == sorted(names)
    for name in names:
        weight = other.unet.get_submodule(name).weight.detach().double()
        expected = weight @ right @ torch.linalg.inv(gram) - weight
        torch.testing.assert_close(adapter.layers[name].get_delta_weight("fade").double(), expected, atol=1e-5, rtol=0)


def test_speed_leaves_what_is_retained_and_the_empty_prompts_begin(pipeline: StableDiffusionPipeline) -> None:
    """With one retain prompt of few tokens there is a null space for certain, and what is in it does not move."""
    backbone = backbone_for(pipeline)
    options = {"threshold": 1e-6, "slack": 1e-9, "preserved": "last"}
    adapter = fade.unlearn(pipeline, **WORDS, method="speed", config=Config.of("speed", options=options))
    states = backbone.encode_prompts(["three", "eight", "neon", ""])["prompt_embeds"].double()
    for layer in adapter.layers.values():
        delta = layer.get_delta_weight("fade").double()
        weight = layer.get_base_layer().weight.double()
        wanted = weight @ (states[1, 1] - states[0, 1])
        moved = delta @ states[0, 1]
        assert torch.cosine_similarity(moved, wanted, 0) > 0.99 and moved.norm() > 0.5 * wanted.norm()
        assert (delta @ states[3, 0]).norm() < 1e-3 * moved.norm()  # the empty prompt's begin
        assert (delta @ states[2, 1]).norm() < 1e-2 * moved.norm()


@pytest.mark.parametrize(("method", "tokens"), [("uce", "last"), ("speed", "following")])
def test_the_concept_changes_more_and_the_file_does_the_same(tmp_path: Path, method: str, tokens: str) -> None:
    pipeline = DIGITCANVAS.load_pipeline()
    config = Config.of(method, options={"tokens": tokens})
    adapter = fade.unlearn(pipeline, "three", "eight", config=config, output=tmp_path, progress=False)
    before = changes(adapter)
    assert before[0] > 3 * before[1] > 0
    file = read_adapter_file(tmp_path / "adapter.safetensors")
    assert file.metadata["run"]["method"] == method and file.metadata["config"]["options"]["tokens"] == tokens
    assert {name.rpartition(".")[2] for name in file.layers} == set(ENDS[method])
    adapter.remove()
    assert changes(fade.load_adapter(pipeline, tmp_path)) == before


@pytest.mark.parametrize("method", ["uce", "speed"])
def test_an_edit_of_one_token_is_kept_as_factors_of_rank_one(
    pipeline: StableDiffusionPipeline, tmp_path: Path, method: str
) -> None:
    """At strength 1, whatever rank the settings have."""
    fade.unlearn(pipeline, **WORDS, method=method, output=tmp_path)
    file = read_adapter_file(tmp_path / "adapter.safetensors")
    assert {layer.factors[0].shape[0] for layer in file.layers.values()} == {1} and file.metadata["scale"] == 1.0


def test_an_edit_of_many_tokens_is_kept_as_values(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    """Where factors would be no fewer numbers."""
    templates = tuple(f"{{}} {word}" for word in DIGITCANVAS.domains[1].words)
    config = Config.of("uce", options={"tokens": "following"})
    fade.unlearn(pipeline, **{**WORDS, "templates": templates}, config=config, output=tmp_path)
    file = read_adapter_file(tmp_path / "adapter.safetensors")
    assert all(layer.values is not None for layer in file.layers.values())


@pytest.mark.parametrize("method", ["uce", "speed"])
@pytest.mark.parametrize("family", ["Stable Diffusion XL", "PixArt-Sigma", "Sana"])
def test_every_family_with_cross_attention(method: str, family: str) -> None:
    adapter = fade.unlearn(build(family), **{**WORDS, "forget": "cat", "surrogate": "dog"}, method=method)
    assert adapter.layers and all(torch.isfinite(p).all() for p in adapter.parameters())
    assert any(p.any() for p in adapter.parameters())
    assert {name.rpartition(".")[2] for name in adapter.layers} == set(ENDS[method])


@pytest.mark.parametrize("method", ["uce", "speed"])
def test_a_family_without_cross_attention_is_refused(method: str) -> None:
    pipeline = build("FLUX.1")
    with pytest.raises(FadeError, match=f"{method} solves for .* of cross-attention, and FLUX.*Use closed-form"):
        fade.unlearn(pipeline, **WORDS, method=method)


def test_bad_options_and_targets_are_told(pipeline: StableDiffusionPipeline) -> None:
    for method, options, words in (
        ("uce", {"weight": 0.0}, "weight of uce must be a positive"),
        ("uce", {"tokens": "first"}, "must be one of"),
        ("speed", {"threshold": -1.0}, "threshold of speed must be a positive"),
        ("speed", {"preserved": "some"}, "must be one of"),
    ):
        with pytest.raises(FadeError, match=words):
            Config.of(method, options=options)
    for method, targets, words in (
        ("uce", ("to_k[:4]",), "leave the region out"),
        ("uce", ("to_q",), "no to_k or to_v of cross-attention among the targets"),
        ("speed", ("to_k",), "no to_v of cross-attention among the targets"),
    ):
        with pytest.raises(FadeError, match=words):
            fade.unlearn(pipeline, **WORDS, config=Config.of(method, locate__targets=targets))
    # Else all states lie in the plane of the normalisation, which leaves a direction free.
    (norm,) = (m for name, m in pipeline.text_encoder.named_modules() if name.endswith("final_layer_norm"))
    torch.nn.init.normal_(norm.bias)
    retain = [prompt for word in ("one", "two", "four", "five", "six") for prompt in DIGITCANVAS.prompts(word)]
    with pytest.raises(FadeError, match="takes every direction of .*raise its option threshold"):
        fade.unlearn(pipeline, **{**WORDS, "retain": retain}, config=Config.of("speed", options={"threshold": 1e-14}))
    assert not fade.adapters(pipeline)
