"""Masked layers inside what users wrap around a denoiser: torch.compile, activation checkpointing, autocast."""

from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .adapters import random_adapter


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def block_and_inputs(pipeline: StableDiffusionPipeline) -> tuple[nn.Module, Tensor, Tensor]:
    """A transformer block of the denoiser, its hidden states and its text."""
    block = pipeline.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    generator = torch.Generator().manual_seed(3)
    width, text = block.attn1.to_q.in_features, block.attn2.to_k.in_features
    return block, torch.randn(2, 9, width, generator=generator), torch.randn(2, 5, text, generator=generator)


def run(block: Callable[..., Tensor], hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The block's output and the gradient of its input."""
    hidden = hidden.clone().requires_grad_()
    output = block(hidden, encoder_hidden_states=text)
    (gradient,) = torch.autograd.grad(output.square().sum(), hidden)
    return output.detach(), gradient


@pytest.mark.parametrize("values", [False, True], ids=["factors", "values"])
def test_one_graph_for_every_scale(pipeline: StableDiffusionPipeline, values: bool) -> None:
    adapter = random_adapter(pipeline, values=values)
    block, hidden, text = block_and_inputs(pipeline)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    run(compiled, hidden, text)
    outputs = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for scale in (0.0, 0.5, 3.0):
            adapter.scale = scale
            output, gradient = run(compiled, hidden, text)
            expected = run(block, hidden, text)
            torch.testing.assert_close((output, gradient), expected)
            outputs.append(output)
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


def test_switching_adapters_compiles_each_set_once(pipeline: StableDiffusionPipeline) -> None:
    random_adapter(pipeline, name="first", seed=1, pinned=False)
    random_adapter(pipeline, name="second", seed=2, pinned=False)
    block, hidden, text = block_and_inputs(pipeline)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")

    def visit() -> list[Tensor]:
        outputs = []
        for names in (["first"], ["second"], ["first", "second"]):
            pipeline.set_adapters(names)
            outputs.append(run(compiled, hidden, text)[0])
            torch.testing.assert_close(outputs[-1], run(block, hidden, text)[0])
        pipeline.unet.disable_adapters()
        outputs.append(run(compiled, hidden, text)[0])
        pipeline.unet.enable_adapters()
        return outputs

    first = visit()
    with torch._dynamo.config.patch(error_on_recompile=True):
        second = visit()
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before, after)
    assert len({tuple(output.flatten().tolist()) for output in first}) == len(first)


def test_checkpointing_gives_the_same_gradients(pipeline: StableDiffusionPipeline) -> None:
    adapter = random_adapter(pipeline)
    block, hidden, text = block_and_inputs(pipeline)
    prefix = "down_blocks.0.attentions.0."
    parameters = [
        p for n, layer in adapter.layers.items() if n.startswith(prefix) for p in layer.adapter_parameters("fade")
    ]
    assert parameters
    for parameter in parameters:
        parameter.requires_grad_(True)

    def gradients(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output.square().sum(), parameters)

    plain = gradients(block(hidden, encoder_hidden_states=text))
    again = gradients(checkpoint(lambda h: block(h, encoder_hidden_states=text), hidden, use_reentrant=False))
    for expected, got in zip(plain, again, strict=True):
        assert torch.equal(expected, got)


def test_the_scale_keeps_its_precision_in_a_16_bit_model(pipeline: StableDiffusionPipeline) -> None:
    adapter = random_adapter(pipeline)
    adapter.scale = 0.3
    pipeline.unet.to(torch.bfloat16)
    for layer in adapter.layers.values():
        scale = layer.lora_mask[adapter.name].scale
        assert scale.dtype == torch.float32
        assert scale.item() == pytest.approx(layer.scaling[adapter.name], rel=1e-7)


def test_autocast_rounds_no_more_than_it_does_without_the_adapter(pipeline: StableDiffusionPipeline) -> None:
    adapter = random_adapter(pipeline)
    adapter.scale = 0.05  # the block's softmax amplifies rounding errors where the adapter makes it sharp
    block, hidden, text = block_and_inputs(pipeline)

    def rounding() -> float:
        exact = block(hidden, encoder_hidden_states=text)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = block(hidden, encoder_hidden_states=text)
        assert not torch.equal(rounded.float(), exact)
        return ((rounded - exact).norm() / exact.norm()).item()

    adapted = rounding()
    adapter.disable()
    assert adapted <= 2 * rounding()
