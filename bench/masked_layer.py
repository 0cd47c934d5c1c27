"""One masked layer with random data, and a forward or forward + backward step of it by each of its competitors.

Shared by the CPU and the GPU benchmarks of masked LoRA. Competitors ("providers"): the frozen layer (the floor), PEFT's
dense LoRA in three precisions, masked LoRA in eager PyTorch in two forms, and fade_kernels: exact, with its own choice
of regime or with one forced, and in the one-product mode.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from bench.shapes import Conv2d, Linear
from fade_kernels import BitMask, effective_weights, masked_lora_conv2d, masked_lora_linear
from fade_kernels.masked_lora import force_regime

RANK = 16
REFILLED, KEPT = "one-product", "one-product kept"
ONE_PRODUCT = (REFILLED, KEPT)
"""The mode that multiplies with a stochastically rounded W + Delta, which each pass makes anew, or which is made before
the forward pass and kept for the backward pass. Here a layer has that launch to itself; a training step makes one for
all layers."""
SEED = 1
"""Of the rounding."""


@dataclass(frozen=True)
class Mask:
    """A random mask: entries (tile 0) or whole tiles of tile x tile entries, each kept with probability `keep`."""

    keep: float
    tile: int = 0

    @property
    def name(self) -> str:
        return f"{'tiles' if self.tile else 'random'} {100 * self.keep:g} %"

    def make(self, rows: int, columns: int, generator: torch.Generator) -> Tensor:
        """Bool [rows, columns] on the generator's device; at least one entry is set."""
        side = self.tile or 1
        size = (-(-rows // side), -(-columns // side))
        tiles = torch.rand(size, generator=generator, device=generator.device) < self.keep
        tiles[0, 0] |= ~tiles.any()
        return tiles.repeat_interleave(side, 0).repeat_interleave(side, 1)[:rows, :columns].contiguous()


@dataclass(frozen=True)
class Provider:
    """Who computes a step.

    Attributes:
        kind: "frozen", "merged", "PEFT dense" and so on (`BASELINES`), or "ours".
        mask: name of the mask; the baselines that have one use the first.
        regime: of ours; "auto" is its own choice among the exact ones; or one of ONE_PRODUCT.
        factors: dtype of ours' A and B; None: the layer's.
    """

    kind: str
    mask: str = ""
    regime: str = "auto"
    factors: torch.dtype | None = None

    @property
    def name(self) -> str:
        if self.kind != "ours":
            return self.kind
        forced = "" if self.regime == "auto" else f" {self.regime}"
        wide = "" if self.factors is None else f", {str(self.factors).removeprefix('torch.')} factors"
        return f"ours{forced}, {self.mask}{wide}"


FROZEN, MERGED = Provider("frozen"), Provider("merged")
PEFT, PEFT_DEFAULT, PEFT_AUTOCAST = (
    Provider(kind) for kind in ("PEFT dense", "PEFT default (fp32)", "PEFT default, autocast")
)
NAIVE_TWO, NAIVE_ONE = Provider("naive, two products"), Provider("naive, one product")


class MaskedLayer:
    """A linear layer or a convolution with its data and its adapters.

    Args:
        shape: the layer.
        masks: whose first also serves the naive forms.
        dtype: of activations and weights; the factors of `PEFT default` are fp32.
        scale: of the adapter; where it is 1 the naive forms leave the multiplication out.
    """

    def __init__(
        self,
        shape: Linear | Conv2d,
        masks: Sequence[Mask],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rank: int = RANK,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(*size, generator=generator, device=device)).to(dtype)

        self.shape, self.scale, self.device, self.dtype = shape, scale, torch.device(device), dtype
        if isinstance(shape, Linear):
            n, columns = shape.out_features, (shape.in_features,)
            x_size, y_size, tail = (shape.tokens, *columns), (shape.tokens, n), ()
        else:
            n, columns = shape.out_channels, (shape.in_channels, shape.kernel, shape.kernel)
            x_size = (shape.images, shape.in_channels, shape.size, shape.size)
            y_size, tail = (shape.images, n, shape.size_out, shape.size_out), (1, 1)
        k = prod(columns)
        self.x = normal(*x_size).requires_grad_()
        self.grad_output = normal(*y_size)
        self.weight = normal(n, *columns, std=k**-0.5)
        self.bias = normal(n) if isinstance(shape, Conv2d) or shape.bias else None
        self.lora_a = normal(rank, *columns, std=k**-0.5).requires_grad_()
        self.lora_b = normal(n, rank, *tail, std=0.1).requires_grad_()
        self.masks = {mask.name: mask.make(n, k, generator) for mask in masks}
        self.packed = {name: BitMask.pack(mask) for name, mask in self.masks.items()}
        self.first = masks[0].name
        # The naive forms keep it in one byte an entry on a GPU; on the CPU a product with the layer's dtype is faster.
        self.naive_mask = self.masks[self.first].reshape(self.weight.shape)
        if self.device.type == "cpu":
            self.naive_mask = self.naive_mask.to(dtype)
        self.rounded = torch.empty_like(self.weight)  # what the one-product mode keeps through a training run
        self.peft: dict[torch.dtype, nn.Module] = {}

    def _layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.shape, Linear):
            return nn.functional.linear(x, weight, bias)
        return nn.functional.conv2d(x, weight, bias, self.shape.stride, self.shape.kernel // 2)

    def _ours(self, lora_a: Tensor, lora_b: Tensor, mask: BitMask, regime: str) -> Tensor:
        delta, rounding = (lora_a, lora_b, mask, self.scale), {}
        if regime == REFILLED:
            rounding["rounding_seed"] = SEED
        elif regime == KEPT:
            layer = [[part] for part in (self.weight, *delta)]
            effective_weights(*layer, out=[self.rounded], stochastic=True, seed=SEED)
            rounding["rounded_weight"] = self.rounded
        if isinstance(self.shape, Linear):
            return masked_lora_linear(self.x, self.weight, self.bias, *delta, **rounding)
        window = {"stride": self.shape.stride, "padding": self.shape.kernel // 2}
        return masked_lora_conv2d(self.x, self.weight, self.bias, *delta, **window, **rounding)

    def _peft_layer(self, dtype: torch.dtype) -> nn.Module:
        """PEFT's own layer around this weight, with this layer's factors in `dtype`."""
        from peft import LoraConfig, inject_adapter_in_model

        if dtype not in self.peft:
            if isinstance(self.shape, Linear):
                base = nn.Linear(self.shape.in_features, self.shape.out_features, self.bias is not None, device="meta")
            else:
                s = self.shape
                base = nn.Conv2d(s.in_channels, s.out_channels, s.kernel, s.stride, s.kernel // 2, device="meta")
            base.weight = nn.Parameter(self.weight, requires_grad=False)
            if self.bias is not None:
                base.bias = nn.Parameter(self.bias, requires_grad=False)
            rank = self.lora_a.shape[0]
            config = LoraConfig(
                r=rank, lora_alpha=self.scale * rank, target_modules=["layer"], init_lora_weights=False
            )  # fmt: skip
            layer = inject_adapter_in_model(config, nn.ModuleDict({"layer": base}))["layer"]
            for factor, value in ((layer.lora_A["default"], self.lora_a), (layer.lora_B["default"], self.lora_b)):
                factor.weight = nn.Parameter(value.detach().to(dtype))
            self.peft[dtype] = layer
        return self.peft[dtype]

    def _delta(self) -> Tensor:
        delta = (self.lora_b.flatten(1) @ self.lora_a.flatten(1)).view(self.weight.shape) * self.naive_mask
        return delta if self.scale == 1 else delta * self.scale

    def _output(self, provider: Provider) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y, and the trained tensors."""
        own = (self.lora_a, self.lora_b)
        if provider in (FROZEN, MERGED):
            return self._layer(self.x, self.weight, self.bias), ()
        if provider in (PEFT, PEFT_DEFAULT, PEFT_AUTOCAST):
            layer = self._peft_layer(self.dtype if provider == PEFT else torch.float32)
            autocast = provider == PEFT_AUTOCAST
            with torch.autocast(self.device.type, self.dtype) if autocast else contextlib.nullcontext():
                return layer(self.x), (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        if provider == NAIVE_TWO:
            base = self._layer(self.x, self.weight, self.bias)
            return base + self._layer(self.x, self._delta(), None), own
        if provider == NAIVE_ONE:
            return self._layer(self.x, self.weight + self._delta(), self.bias), own
        if provider.factors is not None:
            own = tuple(factor.detach().to(provider.factors).requires_grad_() for factor in own)
        return self._ours(*own, self.packed[provider.mask], provider.regime), own

    def forward(self, provider: Provider) -> list[Tensor]:
        """Output, without recording for a backward pass."""
        with torch.no_grad(), _forced(provider.regime):
            return [self._output(provider)[0]]

    def training(self, provider: Provider) -> list[Tensor]:
        """Output and gradients of the input and of the trained tensors."""
        with _forced(provider.regime):
            y, trained = self._output(provider)
            return [y, *torch.autograd.grad(y, (self.x, *trained), self.grad_output.to(y.dtype))]

    def step(self, provider: Provider, mode: str) -> list[Tensor]:
        return self.training(provider) if mode == "training" else self.forward(provider)

    def expected(self, provider: Provider, mode: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """What `step` should return, computed in `dtype`."""
        if provider in (FROZEN, MERGED):
            mask = torch.zeros_like(self.masks[self.first])
        elif provider in (PEFT, PEFT_DEFAULT, PEFT_AUTOCAST):
            mask = torch.ones_like(self.masks[self.first])
        else:
            mask = self.masks[provider.mask or self.first]
        x, a, b = (tensor.detach().to(dtype).requires_grad_() for tensor in (self.x, self.lora_a, self.lora_b))
        delta = self.scale * torch.where(mask, b.flatten(1) @ a.flatten(1), 0.0)
        bias = None if self.bias is None else self.bias.to(dtype)
        y = self._layer(x, self.weight.to(dtype) + delta.view(self.weight.shape), bias)
        if mode != "training":
            return [y.detach()]
        trained = () if provider in (FROZEN, MERGED) else (a, b)
        return [y.detach(), *torch.autograd.grad(y, (x, *trained), self.grad_output.to(dtype))]


@contextlib.contextmanager
def _forced(regime: str) -> Iterator[None]:
    """A regime, for forward and backward inside the block; the one-product mode has none."""
    with contextlib.nullcontext() if regime in ONE_PRODUCT else force_regime(regime):
        yield


def worst_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest ‖actual - expected‖ / ‖expected‖ (Frobenius) of the pairs; NaN where an entry is."""
    errors = [
        float((one.detach().to(other.dtype) - other).norm() / other.norm().clamp_min(1e-30))
        for one, other in zip(actual, expected, strict=True)
    ]
    return max(errors, key=lambda error: (error != error, error))
