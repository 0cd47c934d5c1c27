"""The student's step as a recorded graph: its bookkeeping, with a stand-in for CUDA's that runs the work again."""

import functools
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

import fade
import fade.distillation
from fade.captured_step import CapturedStep, why_not_captured
from fade.conditioning import Conditioning
from fade.config import Config

from .conftest import tiny_pipeline
from .test_unlearning import WORDS, tensors


class Graph:
    """Records as CUDA does: the work is run once before and once for the recording, and every replay reads and writes
    the memory of the recording."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        work()
        outputs = tuple(output.clone() for output in work())

        def replay() -> None:
            self.replays += 1
            for kept, new in zip(outputs, work(), strict=True):
                kept.copy_(new)

        return outputs, replay


def test_inputs_are_copied_and_gradients_added_up() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator, requires_grad=True)
    read: list[int] = []

    def losses(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        read.append(x.data_ptr())
        loss = ((x @ weight.t()).square() * factor).mean()
        return loss, 2 * loss

    batches = [(torch.randn(5, 4, generator=generator), torch.randn((), generator=generator)) for _ in range(3)]
    step = CapturedStep(losses, [weight], batches[0], Graph().record)
    assert weight.grad.count_nonzero() == 0
    wanted, memory = torch.zeros_like(weight), weight.grad.data_ptr()
    for batch in batches:
        loss, twice = losses(*batch)
        wanted += torch.autograd.grad(loss, weight)[0]
        read.clear()
        found = step(*batch)
        assert torch.equal(found[0], loss.detach()) and torch.equal(found[1], twice.detach())
        assert read == [step._inputs[0].data_ptr()] != [batch[0].data_ptr()]
    torch.testing.assert_close(weight.grad, wanted)
    assert weight.grad.data_ptr() == memory
    with pytest.raises(ValueError, match=r"recorded for an input \[5, 4\], called with \[1, 4\]"):
        step(batches[0][0][:1], batches[0][1])


def test_what_cannot_be_recorded_leaves_no_gradient() -> None:
    weight = torch.ones(2, requires_grad=True)

    def refuse(work: Callable[[], Any]) -> Any:
        work()
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        CapturedStep(lambda x: ((weight * x).sum(),), [weight], [torch.ones(2)], refuse)
    assert weight.grad is None


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Graph:
    """Runs inside record their student's step, on the CPU."""
    graph = Graph()
    monkeypatch.setattr(fade.distillation, "why_not_captured", lambda *_: None)
    monkeypatch.setattr(fade.distillation, "CapturedStep", functools.partial(CapturedStep, record=graph.record))
    return graph


@pytest.mark.parametrize(("method", "mode"), [("distillation", "exact"), ("both", "one-product")])
def test_a_run_is_the_same_recorded_or_not(
    tokenizer: CLIPTokenizer, quick: Config, request: pytest.FixtureRequest, method: str, mode: str
) -> None:
    config = quick.replace(
        overwrite__accumulation=2, overwrite__method=method, overwrite__training_mode=mode, overwrite__pool=3,
        overwrite__stop_forget=1e-9, overwrite__stop_every=2, overwrite__steps=4,
    ).without_ignored()  # fmt: skip

    def run() -> fade.Adapter:
        pipeline = tiny_pipeline(tokenizer)
        pipeline.to(torch.bfloat16)
        return fade.unlearn(pipeline, **WORDS, config=config)

    eager = run()
    graph: Graph = request.getfixturevalue("recorded")
    captured = run()
    assert graph.replays == 4 * 2
    assert (eager.run["cuda_graph"], captured.run["cuda_graph"]) == ("the denoiser is on the cpu", "captured")
    assert captured.run["training_mode"] == eager.run["training_mode"]
    assert captured.run["losses"] == eager.run["losses"]
    assert captured.run["held_out_losses"] == eager.run["held_out_losses"]
    for name, parameter in tensors(captured).items():
        assert torch.equal(parameter, tensors(eager)[name])
    assert all(parameter.grad is None for parameter in captured.parameters())


def test_a_step_that_cannot_be_recorded_is_run_as_ever(
    tokenizer: CLIPTokenizer, quick: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = quick.replace(locate__saliency="random", overwrite__steps=2).without_ignored()
    eager = fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=quick)

    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(fade.distillation, "why_not_captured", lambda *_: None)
    monkeypatch.setattr(fade.distillation, "CapturedStep", functools.partial(CapturedStep, record=refuse))
    with pytest.warns(UserWarning, match="kernel by kernel .* cannot be captured .operation not permitted") as told:
        refused = fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=quick)
    assert len(told) == 1
    assert refused.run["cuda_graph"] == ("it cannot be captured (operation not permitted when stream is capturing)")
    assert refused.run["losses"] == eager.run["losses"]


def test_who_asks_for_a_graph_is_told_where_there_is_none(pipeline: StableDiffusionPipeline, quick: Config) -> None:
    quick = quick.replace(locate__saliency="random", overwrite__steps=1).without_ignored()
    with pytest.warns(UserWarning, match="not as a CUDA graph: the denoiser is on the cpu"):
        fade.unlearn(pipeline, **WORDS, config=quick.replace(overwrite__cuda_graph="on"), name="on")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        off = fade.unlearn(pipeline, **WORDS, config=quick.replace(overwrite__cuda_graph="off"), name="off")
    assert off.run["cuda_graph"] == "switched off"


def test_reasons_that_are_known_before() -> None:
    def reason(plan: str | None = None, **flags: Any) -> str | None:
        denoiser = nn.Linear(1, 1)
        for name, value in flags.items():
            setattr(denoiser, name, value)
        backbone = SimpleNamespace(device=torch.device("cuda"), denoiser=denoiser)
        return why_not_captured("auto", backbone, SimpleNamespace(plan=plan), prompts)

    prompts = Conditioning({"prompt_embeds": torch.zeros(2, 3, 4)})
    assert reason() is None and reason("kept") is None
    assert "Python" in reason("refilled")
    prompts = Conditioning({"prompt_embeds": (torch.zeros(3, 4), torch.zeros(2, 4))})
    assert "lengths" in reason("kept")
    assert "checkpointing" in reason(is_gradient_checkpointing=True)
    assert "hooks" in reason(_hf_hook=object())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["exact", "one-product"])
def test_on_a_gpu_a_recorded_run_learns_what_an_eager_one_does(
    tokenizer: CLIPTokenizer, quick: Config, mode: str
) -> None:
    runs = {}
    for graph in ("off", "on"):
        pipeline = tiny_pipeline(tokenizer)
        pipeline.to("cuda", torch.bfloat16)
        config = quick.replace(
            overwrite__cuda_graph=graph, overwrite__training_mode=mode, overwrite__accumulation=2,
            overwrite__steps=10,
        )  # fmt: skip
        runs[graph] = fade.unlearn(pipeline, **WORDS, config=config)
    assert runs["on"].run["cuda_graph"] == "captured"
    for name, parameter in tensors(runs["on"]).items():
        torch.testing.assert_close(parameter, tensors(runs["off"])[name], rtol=2e-2, atol=2e-2)
