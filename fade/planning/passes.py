"""Passes of a denoiser on the meta device, as both stages make them: what they take beyond what is resident.

What is trained, watched or quantised is stood in for where the real layer needs numbers: a masked layer keeps its input
and its adapter for the backward pass (`fade_kernels._ops`), a 4-bit one makes its weight for each product and keeps
nothing. A test holds the first against the real layers.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config

from fade.backbones import Backbone
from fade.backbones.parts import tensors
from fade.conditioning import Conditioning, Rows
from fade.planning.timeline import Timeline, fused_attention, marked, peak, shortened, unrolled
from fade.regions import Region
from fade_kernels import GradientMagnitude

Stage = Literal["locate", "overwrite"]


@dataclass(frozen=True)
class AdapterShapes:
    """By layer, how many numbers are trained: of the factors A and B, or of the masked values alone."""

    trained: Mapping[str, tuple[int, ...]]

    @property
    def numbers(self) -> int:
        return sum(map(sum, self.trained.values()))


def prompts_on_meta(backbone: Backbone, count: int) -> Conditioning:
    """Prompts as the denoiser reads them, without numbers."""
    rows: dict[str, Rows] = {}
    family = backbone.family
    for name, shape in family.prompt_shapes(backbone).items():
        if "mask" in name:
            where = "cpu" if family.reads_lengths else "meta"
            kind = backbone.dtype if family.number_masks else torch.int64
            rows[name] = torch.ones(count, *shape, dtype=kind, device=where)
        elif family.own_lengths and len(shape) > 1:
            rows[name] = tuple(torch.empty(shape, dtype=backbone.dtype, device="meta") for _ in range(count))
        else:
            rows[name] = torch.empty(count, *shape, dtype=backbone.dtype, device="meta")
    return Conditioning(rows)


class _Masked(torch.autograd.Function):
    """A masked product's memory: the input and the adapter are kept, their gradients are made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Callable[[Tensor], Tensor], *adapter: Tensor) -> Tensor:
        ctx.save_for_backward(x, *adapter)
        return product(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, *adapter = ctx.saved_tensors
        needed = ctx.needs_input_grad
        gradients = [torch.empty_like(part) for part in adapter]
        return (torch.empty_like(x) if needed[0] else None, None, *gradients)


class _Dequantised(torch.autograd.Function):
    """A product with a weight that is made for it, forward and again backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, torch.empty_like(layer.weight), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output @ torch.empty_like(ctx.layer.weight), None


@dataclass
class Passes:
    """Passes of a backbone whose parts are on the meta device, its denoiser in the dtype to plan for.

    Attributes:
        latent: [C, h, w] of the latents.
        quantised: linear layers whose weights are in 4 bits.
    """

    backbone: Backbone
    latent: tuple[int, ...]
    quantised: frozenset[nn.Module] = frozenset()
    _known: dict[Any, int] = field(default_factory=dict, repr=False)

    def frozen(self, count: int) -> int:
        """Bytes of a pass of so many latents of which nothing is differentiated."""
        return self._once(("frozen", count), lambda: self._measure(count, None))

    def student(
        self, stage: Stage, count: int, checkpointing: bool, layers: Mapping[str, nn.Module],
        regions: Mapping[str, Region], adapter: AdapterShapes | None = None,
    ) -> int:  # fmt: skip
        """Bytes of a forward and backward pass of so many latents: with the gradients of `layers` folded into
        accumulators, or with an adapter in them."""

        def run() -> int:
            def watched() -> Any:
                if stage == "overwrite":
                    return adapted(_within(self.backbone.denoiser, layers), adapter)
                slices = {name: region.slices for name, region in regions.items()}
                return GradientMagnitude(_within(self.backbone.denoiser, layers), regions=slices)

            with self.backbone.gradient_checkpointing() if checkpointing else contextlib.nullcontext():
                return self._measure(count, watched, differentiated=checkpointing and stage == "locate")

        return self._once((stage, count, checkpointing), run)

    def _once(self, key: Any, run: Callable[[], int]) -> int:
        if key not in self._known:
            self._known[key] = run()
        return self._known[key]

    def _measure(self, count: int, watched: Callable[[], Any] | None, differentiated: bool = False) -> int:
        backbone, denoiser = self.backbone, self.backbone.denoiser
        noised = torch.empty(count, *self.latent, dtype=backbone.dtype, device="meta")
        times, taught = backbone.times(torch.zeros(count)).to("meta"), torch.empty_like(noised)
        prompts = prompts_on_meta(backbone, count)
        there = [*resident(denoiser), noised, times, taught, *prompts.tensors().values()]
        if differentiated:  # as `fade.saliency` has it under checkpointing
            for tensor in (noised, *prompts.tensors().values()):
                tensor.requires_grad_(tensor.is_floating_point())
        with contextlib.ExitStack() as resources:
            runs = resources.enter_context(shortened(denoiser))
            resources.enter_context(quantised(self.quantised))
            if watched is not None:
                found = resources.enter_context(watched())
                there += found if isinstance(found, list) else found.saliency.values()
            timeline = Timeline(there)
            resources.enter_context(marked(timeline, runs))
            resources.enter_context(fused_attention())
            # A denoiser that sorts tokens by their mask (HunyuanImage) is planned with all of them as words and as
            # padding: too many, never too few.
            resources.enter_context(fx_config.patch(meta_nonzero_assume_all_nonzero=True))
            resources.enter_context(torch.set_grad_enabled(watched is not None))
            with timeline:
                predicted = backbone.predict(noised, times, prompts)
                if watched is not None:
                    F.mse_loss(predicted.float(), taught.float()).backward()
        timeline.end()
        return peak(unrolled(timeline, runs))


def resident(module: nn.Module) -> list[Tensor]:
    """What a module holds: parameters, buffers, and tables of positions that some keep beside them."""
    found = list(tensors(module))
    for part in module.modules():
        for value in vars(part).values():
            values = value if isinstance(value, list | tuple) else (value,)
            found += [one for one in values if isinstance(one, Tensor)]
    return found


def _within(denoiser: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of the layers that a shortened denoiser still has."""
    there = set(denoiser.modules())
    return {name: layer for name, layer in layers.items() if layer in there}


@contextlib.contextmanager
def _instead(layers: Sequence[nn.Module], forward: Callable[[nn.Module], Callable[..., Tensor]]) -> Iterator[None]:
    for layer in layers:
        layer.forward = forward(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextlib.contextmanager
def quantised(layers: Sequence[nn.Module] | frozenset[nn.Module]) -> Iterator[None]:
    """Linear layers compute as 4-bit ones meanwhile."""

    def forward(layer: nn.Module) -> Callable[..., Tensor]:
        return lambda x: _Dequantised.apply(x, layer)

    with _instead(list(layers), forward):
        yield


@contextlib.contextmanager
def adapted(layers: Mapping[str, nn.Module], adapter: AdapterShapes) -> Iterator[list[Tensor]]:
    """Layers compute with an adapter meanwhile; yields what is resident of it here, its gradients included."""
    parameters = {
        name: [torch.zeros(size, device="meta", requires_grad=True) for size in adapter.trained[name]]
        for name in layers
        if name in adapter.trained
    }
    for parameter in (one for own in parameters.values() for one in own):
        parameter.grad = torch.zeros_like(parameter)
    names = {layer: name for name, layer in layers.items() if name in parameters}

    def forward(layer: nn.Module) -> Callable[..., Tensor]:
        own, given = parameters[names[layer]], layer.__dict__.get("forward")

        def product(x: Tensor) -> Tensor:
            return type(layer).forward(layer, x)

        def delta(x: Tensor) -> Tensor:
            return F.linear(x, layer.weight) if isinstance(layer, nn.Linear) else product(x)

        if given is None:  # an ordinary weight: one product with both
            return lambda x: _Masked.apply(x, product, *own)
        return lambda x: given(x) + _Masked.apply(x, delta, *own)

    before = {layer: layer.__dict__.get("forward") for layer in names}
    for layer in names:
        layer.forward = forward(layer)
    try:
        yield [tensor for own in parameters.values() for one in own for tensor in (one, one.grad)]
    finally:
        for layer, given in before.items():
            if given is None:
                del layer.forward
            else:
                layer.forward = given


def latent_shape(backbone: Backbone, side: int) -> tuple[tuple[int, ...], int]:
    """[C, h, w] of a picture's latents, and the bytes that encoding one takes beyond the VAE (which does so in
    float32)."""
    vae = backbone.pipeline.vae
    pixels = torch.empty(1, 3, side, side, device="meta")
    timeline = Timeline([*tensors(vae), pixels])
    with fused_attention(), torch.no_grad(), timeline:
        encoded = backbone.family.vae.encode(vae, pixels)
        if hasattr(encoded, "latent_dist"):
            latents = encoded.latent_dist.mean
        else:
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        latents = backbone.family.vae.normalise(vae, latents)
    timeline.end()
    return tuple(latents.shape[1:]), peak(list(timeline.segments.values()))


def encoding(encoder: nn.Module, prompts: int, tokens: int) -> int:
    """Bytes that a text encoder takes beyond itself for a batch of prompts: of all but T5, pipelines ask for the states
    of every layer."""
    ids = torch.zeros(prompts, tokens, dtype=torch.int64, device="meta")
    timeline = Timeline([*tensors(encoder), ids])
    with fused_attention(), torch.no_grad(), timeline:
        encoder(input_ids=ids, output_hidden_states="T5" not in type(encoder).__name__)
    timeline.end()
    return peak(list(timeline.segments.values()))
