"""A mask's words that come back from a hook on saved tensors as another object are still the mask that is known."""

import pytest
import torch

from fade_kernels import BitMask, mask_facts, masked_lora_linear


def test_facts_are_found_once_under_hooks_on_saved_tensors(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    facts = mask_facts.MaskFacts
    monkeypatch.setattr(mask_facts, "MaskFacts", lambda *given: counted.append(given) or facts(*given))
    x, weight = torch.randn(5, 40, generator=rng), torch.randn(24, 40, generator=rng)
    lora_a, lora_b = (torch.randn(shape, generator=rng).requires_grad_() for shape in ((3, 40), (24, 3)))
    mask = BitMask.pack(torch.rand(24, 40, generator=rng) < 0.2)
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach(), lambda saved: saved.view_as(saved)):
            y = masked_lora_linear(x.requires_grad_(), weight, None, lora_a, lora_b, mask, 1.0)
        y.square().sum().backward()
    assert len(counted) == 1
