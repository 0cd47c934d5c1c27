"""How much an adapter changes what DigitCanvas predicts for the concept, and for what must stay."""

import torch

import fade
from fade.backbones import backbone_for
from fade.digitcanvas.bundled import MODEL


def changes(adapter: fade.Adapter, seed: int = 0) -> tuple[float, float]:
    """Mean squared changes of predictions for three in all styles, and for six other digits in them."""
    backbone = backbone_for(adapter.pipeline)
    noised = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(600, 980, 16).long()
    found = []
    for digits in (("three",), ("zero", "one", "four", "six", "seven", "nine")):
        prompts = [prompt for digit in digits for prompt in MODEL.prompts(digit)]
        read = backbone.encode_prompts([prompts[i * len(prompts) // 16] for i in range(16)])
        with torch.no_grad():
            with_it = backbone.predict(noised, times, read)
            with adapter.disabled():
                without = backbone.predict(noised, times, read)
        assert torch.isfinite(with_it).all()
        found.append((with_it - without).square().mean().item())
    return tuple(found)
