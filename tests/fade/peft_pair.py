"""One small network twice: under masked layers and under PEFT's own LoRA layers, with the same adapters and the same
calls, so that a test compares what they compute.

A masked adapter's Δ is any matrix, which PEFT's plain LoRA computes with as many ranks as the weight has columns:
A = 1, B = Δ. Each adapter's Δ is also kept as drawn, in float64, for the dense definition W + s·Δ.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fade.layers import MASKED_LAYERS, MaskedLoraLayer
from fade.tuner import FadeConfig
from fade_kernels import BitMask

FORMS = ("factors", "values")
MASKS = ("random", "full", "single layer")
RANK = 3
LAYERS = ("conv", "lin0", "lin1")


class Net(nn.Module):
    """A convolution and two linear layers; images [n, 3, 6, 6] to [n, 4]."""

    def __init__(self, padding: int | str | tuple[int, int] = 1, padding_mode: str = "zeros", stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=stride, padding=padding, padding_mode=padding_mode)
        self.lin0 = nn.Linear(6, 8)
        self.lin1 = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.lin0(self.conv(x).tanh().mean((2, 3))).tanh())


def images(count: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 6, 6).to(dtype)


def targets_of(mask: str) -> tuple[str, ...]:
    return ("lin1",) if mask == "single layer" else LAYERS


def columns(weight: Tensor) -> int:
    return weight[0].numel()


def masked_config(
    form: str, targets: Sequence[str] = LAYERS, scale: float = 1.0, fade: bool = False, **settings: Any
) -> LoraConfig:
    """A configuration whose layers are ours: a LoraConfig that names them to PEFT, or a FadeConfig, not pinned."""
    rank = 1 if form == "values" else RANK
    settings = {"r": rank, "lora_alpha": scale * rank, "target_modules": list(targets)} | settings
    if fade:
        return FadeConfig(**({"pinned": False} | settings))
    config = LoraConfig(**settings)
    config._register_custom_module(MASKED_LAYERS)
    return config


def masked_layers(model: nn.Module, name: str) -> dict[str, MaskedLoraLayer]:
    """The layers of `LAYERS` that carry the masked adapter."""
    return {
        path.rpartition(".")[2]: module
        for path, module in model.named_modules()
        if isinstance(module, MaskedLoraLayer) and name in module.lora_mask
    }


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """Outermost tuner layers by the name of the layer they wrap."""
    return {
        path.rpartition(".")[2]: module
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and path.rpartition(".")[2] in LAYERS
    }


def fill(layer: MaskedLoraLayer, name: str, form: str, mask: str, strength: float = 0.3) -> Tensor:
    """Gives an adapter on one layer a mask and random trained tensors; returns Δ without the scale, float64 [N, K]."""
    weight = layer.get_base_layer().weight
    shape = (weight.shape[0], columns(weight))
    chosen = torch.ones(shape, dtype=torch.bool) if mask == "full" else torch.rand(shape) < 0.4
    chosen[0, 0] = True
    bits = BitMask.pack(chosen)
    if form == "values":
        values = strength * torch.randn(bits.count)
        layer.set_values(name, bits, values)
        delta = torch.zeros(shape, dtype=torch.float64)
        delta[chosen] = values.double()
        return delta
    layer.set_mask(name, bits)
    lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    with torch.no_grad():
        lora_a.copy_(torch.randn(lora_a.shape))
        lora_b.copy_(strength * torch.randn(lora_b.shape))
    return (lora_b.detach().double().flatten(1) @ lora_a.detach().double().flatten(1)) * chosen


def dense_definition(base: nn.Module, x: Tensor, *terms: tuple[float, dict[str, Tensor]]) -> Tensor:
    """The network with W + Σ s·Δ for its weights, in float64."""
    model = copy.deepcopy(base).double()
    with torch.no_grad():
        for scale, deltas in terms:
            for name, delta in deltas.items():
                weight = model.get_submodule(name).weight
                weight += scale * delta.view(weight.shape)
    return model(x.double())


class Pair:
    """The two models. Every method acts on both alike.

    Args:
        form: "factors" or "values"; mask: one of MASKS.
        base: the network; a new Net without.
        wrapped: in a PeftModel; otherwise the layers are injected into the network itself, where those of several PEFT
            methods may wrap one another.
        fade: our adapters by FadeConfig, as the product makes them, and not by a LoraConfig with our layers.
    """

    def __init__(
        self,
        form: str = "factors",
        mask: str = "random",
        base: nn.Module | None = None,
        wrapped: bool = True,
        fade: bool = False,
    ) -> None:
        self.form, self.mask, self.wrapped, self.fade = form, mask, wrapped, fade
        self.base = (base or Net()).eval()
        self.ours: Any = copy.deepcopy(self.base)
        self.peft: Any = copy.deepcopy(self.base)
        self.deltas: dict[str, dict[str, Tensor]] = {}

    @property
    def both(self) -> tuple[Any, Any]:
        return self.ours, self.peft

    def _add(self, model: nn.Module, name: str, config: PeftConfig) -> Any:
        if not self.wrapped:
            return inject_adapter_in_model(config, model, name).eval()
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            return model.eval()
        return get_peft_model(model, config, adapter_name=name).eval()

    def masked(self, name: str = "ours", scale: float = 1.0, **settings: Any) -> "Pair":
        """A masked adapter with random Δ on our side, its dense equal on PEFT's."""
        targets = targets_of(self.mask)
        self.ours = self._add(self.ours, name, masked_config(self.form, targets, scale, self.fade, **settings))
        ranks = {layer: columns(self.base.get_submodule(layer).weight) for layer in targets}
        alphas = {layer: scale * rank for layer, rank in ranks.items()}
        settings = {"target_modules": list(targets)} | {k: v for k, v in settings.items() if k != "pinned"}
        plain = LoraConfig(**settings, rank_pattern=ranks, alpha_pattern=alphas)
        self.peft = self._add(self.peft, name, plain)
        self.give_delta(name)
        return self

    def give_delta(self, name: str) -> None:
        """Fills the adapter on both sides with one random Δ."""
        self.deltas[name] = {}
        dense = tuner_layers(self.peft)
        ours = {p.rpartition(".")[2]: m for p, m in self.ours.named_modules() if isinstance(m, MaskedLoraLayer)}
        for layer in targets_of(self.mask):
            delta = fill(ours[layer], name, self.form, self.mask)
            self.deltas[name][layer] = delta
            lora_a, lora_b = dense[layer].lora_A[name].weight, dense[layer].lora_B[name].weight
            with torch.no_grad():
                lora_a.copy_(torch.eye(lora_a.shape[0]).view(lora_a.shape))
                lora_b.copy_(delta.view(lora_b.shape))

    def neighbour(self, name: str, config: PeftConfig) -> "Pair":
        """Another adapter, with the same random weights on both sides."""
        seed = int(torch.randint(2**31, ()))
        sides = []
        for model in self.both:
            side = copy.deepcopy(config)
            if isinstance(side, LoraConfig) and model is self.ours:
                side._register_custom_module(MASKED_LAYERS)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                sides.append(self._add(model, name, side))
        self.ours, self.peft = sides
        return self

    def call(self, action: Callable[[Any], Any]) -> "Pair":
        for model in self.both:
            action(model)
        return self

    def on_layers(self, action: Callable[[BaseTunerLayer], Any]) -> "Pair":
        """Calls something on every tuner layer, as diffusers does."""
        for model in self.both:
            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    action(module)
        return self

    def same(self, x: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Asserts equal outputs, and returns ours."""
        x = images() if x is None else x
        ours, peft = self.ours(x, **kwargs), self.peft(x, **kwargs)
        torch.testing.assert_close(ours, peft, rtol=1e-4, atol=1e-5)
        return ours.detach()

    def expected(self, x: Tensor, **scales: float) -> Tensor:
        """The dense definition with these adapters at these scales."""
        return dense_definition(self.base, x, *((scale, self.deltas[name]) for name, scale in scales.items()))

    def is_dense(self, x: Tensor | None = None, **scales: float) -> None:
        """Asserts that our output is the dense definition's."""
        x = images() if x is None else x
        torch.testing.assert_close(self.ours(x).double(), self.expected(x, **scales), rtol=1e-4, atol=1e-5)

    def base_weights(self) -> dict[str, Tensor]:
        """Copies of our side's base weights, by layer."""
        return {
            path: module.weight.detach().clone()
            for path, module in ((p, m) for p, m in self.ours.named_modules() if type(m) in MASKED_LAYERS)
            if "lora_" not in path and "loha_" not in path
        }
