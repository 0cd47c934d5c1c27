"""The frozen model an adapter sits on: its own parameters and layers, seen through whatever is attached, wrapped around
or offloaded, and the fingerprint that ties an adapter file to them."""

import contextlib
import hashlib
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fade.bundled import name_of
from fade.errors import FadeError, WrongBaseError
from fade.layers import carries_masks, groups_on_disk, why_unmasked
from fade.quantised import quantisation
from fade.regions import Region, region_of, split_pattern
from fade_kernels import weight_shape

# Coarsest last: an adapter trained in a wide dtype also fits the same weights loaded in a narrower one.
_FINGERPRINT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# What wrapping puts into a module's path: PEFT, PEFT's modules_to_save, torch.compile.
_WRAPPINGS = ("base_layer", "original_module", "_orig_mod")


@dataclass(frozen=True)
class BaseLayer:
    """A Linear or Conv2d of the base model, and the path at which it, or what wraps it, hangs in the model now."""

    module: nn.Module
    path: str


def own_modules(denoiser: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(name in the bare model, path now, module) of every module that is the model's own and not an adapter's."""
    foreign: set[str] = set()
    for path, module in denoiser.named_modules():
        if not foreign.isdisjoint(_ancestors(path)):
            continue
        inner = (
            "base_layer" if isinstance(module, BaseTunerLayer)
            else "original_module" if isinstance(module, AuxiliaryTrainingWrapper)
            else None
        )  # fmt: skip
        for name, child in module.named_children():
            added = (
                # attention processors have weights where an IP-Adapter was loaded; fused projections are copies
                (inner is not None and name != inner)
                or name == "processor"
                or type(child).__name__ == "MultiIPAdapterImageProjection"
                or (name in ("to_qkv", "to_kv", "to_added_qkv") and getattr(module, "fused_projections", False))
            )
            if added:
                foreign.add(f"{path}.{name}" if path else name)
        if inner is None:
            yield ".".join(part for part in path.split(".") if part not in _WRAPPINGS), path, module


def draws_with_fused_projections(attention: nn.Module) -> bool:
    """Whether an attention module computes with fused copies of its projections (`fuse_qkv_projections`)."""
    if not getattr(attention, "fused_projections", False):
        return False
    # diffusers' older class keeps its copies and the flag when it is unfused, and only changes the processor.
    return hasattr(attention, "unfuse_projections") or type(attention.processor).__name__.startswith("Fused")


def under_fused_projections(denoiser: nn.Module) -> set[nn.Module]:
    """Every projection, with what is in it, that is passed over because its attention computes with a fused copy."""
    projections = (
        getattr(module, name)
        for module in denoiser.modules()
        if draws_with_fused_projections(module)
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
        if isinstance(getattr(module, name, None), nn.Module)
    )
    return {inner for projection in projections for inner in projection.modules()}


def _ancestors(path: str) -> list[str]:
    """A module's path and those of the modules around it."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def base_parameters(denoiser: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The denoiser's own parameters under the names they have in the bare model, whatever is attached or wrapped."""
    for name, _, module in own_modules(denoiser):
        for own, parameter in module.named_parameters(recurse=False):
            yield f"{name}.{own}" if name else own, parameter


def base_layers(denoiser: nn.Module) -> dict[str, BaseLayer]:
    """Every Linear and Conv2d of the base model by its name in the bare model."""
    layers = {}
    for name, path, module in own_modules(denoiser):
        if carries_masks(module):
            outermost = path
            while outermost.endswith(".base_layer"):
                outermost = outermost.removesuffix(".base_layer")
            layers[name] = BaseLayer(module, outermost)
    return layers


def target_layers(denoiser: nn.Module, patterns: tuple[str, ...] | None = None) -> dict[str, nn.Module]:
    """Linear and Conv2d layers of the denoiser by name, without adapters' own; all, or those matching a pattern.

    A pattern is a name, the end of a name after a dot, or a glob such as `*.attn2.to_k`; behind it may stand a region
    (`target_regions`). The modules are the base layers, also where an adapter wraps them. Raises FadeError naming a
    pattern that matches nothing.
    """
    layers = {name: layer.module for name, layer in base_layers(denoiser).items()}
    if patterns is None:
        return layers
    found = _matched(layers, patterns)
    return {name: layers[name] for name in layers if name in found}


def maskable_layers(denoiser: nn.Module, patterns: tuple[str, ...] | None = None) -> dict[str, nn.Module]:
    """Those of `target_layers` that can carry a masked adapter: what stands for layers of a kind that nobody named one
    by one. A layer that is named and cannot is an error (`fade.adapter.check_carriers`)."""
    return {name: layer for name, layer in target_layers(denoiser, patterns).items() if why_unmasked(layer) is None}


def target_regions(denoiser: nn.Module, patterns: tuple[str, ...]) -> dict[str, Region]:
    """By layer, the region that patterns such as `to_out[:, :3072]` or `to_qkv_mlp_proj[0:9216]` limit it to: rows and
    columns of its weight [N, K] from the first to the one before the last; layers without one are left out.

    Where another pattern names the whole layer, it has none. Raises FadeError as `target_layers` does, for a region
    that is empty or outside a weight, and where two patterns name different ones of a layer.
    """
    layers = {name: layer.module for name, layer in base_layers(denoiser).items()}
    regions: dict[str, Region] = {}
    for name, named_by in _matched(layers, patterns).items():
        asked = [(pattern, split_pattern(pattern)[1]) for pattern in named_by]
        found = {None if b is None else region_of(pattern, b, name, layers[name]) for pattern, b in asked}
        if None in found:
            continue
        if len(found) > 1:
            raise FadeError(f"the target patterns {' and '.join(named_by)} name different regions of {name}; name one")
        (regions[name],) = found
    return regions


def _matched(layers: Mapping[str, nn.Module], patterns: tuple[str, ...]) -> dict[str, list[str]]:
    """By layer that patterns match, those patterns."""

    def matches(name: str, pattern: str) -> bool:
        return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)

    matched: dict[str, list[str]] = {}
    for pattern in patterns:
        own, _ = split_pattern(pattern)
        if not (names := [name for name in layers if matches(name, own)]):
            some = ", ".join(list(layers)[:: max(1, len(layers) // 4)][:4])
            raise FadeError(f"the target pattern {pattern!r} matches no Linear or Conv2d layer; there are e.g. {some}")
        for name in names:
            matched.setdefault(name, []).append(pattern)
    return matched


@contextlib.contextmanager
def fetched(module: nn.Module) -> Iterator[None]:
    """A module's own tensors in memory meanwhile, also where accelerate has put them elsewhere."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


_fingerprints: WeakKeyDictionary[nn.Module, tuple[int, dict[str, str]]] = WeakKeyDictionary()


def fingerprint(denoiser: nn.Module, dtypes: Collection[str] | None = None) -> dict[str, str]:
    """SHA-256 of all base weights, in their own dtype and in the coarser ones that they may be loaded in.

    Of these the finest of `dtypes` alone, where they are given: what comparing with another fingerprint takes.

    Of a model with quantised weights, whose bytes libraries pack again as they please, `quantised` is a digest of what
    they are packed by, and of `outline`; both stand beside it. Where `dtypes` are those of such a fingerprint, that is
    what is told of an ordinary model, too.

    Kept for the model as long as its weights are the same (a checksum of every bit, some twenty times faster).
    Raises FadeError while adapters are merged into the weights, for weights in an integer, 8-bit or 64-bit dtype, and
    for weights that are offloaded to a disk.
    """
    refuse_merged(denoiser)
    refuse_on_disk(denoiser, "load or make the adapter before enable_group_offload")
    modules = [(name, module) for name, _, module in own_modules(denoiser) if module._parameters]
    schemes = sorted({words for _, module in modules if (words := quantisation(module)) is not None})
    if schemes or "scheme" in (dtypes or ()):
        told = {"scheme": ", ".join(schemes) or UNQUANTISED, **outline(denoiser)}
        return {"quantised": hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest(), **told}
    own = _weights_dtype(modules)
    order = list(_FINGERPRINT_DTYPES)
    wanted = order[order.index(own) :]
    if dtypes is not None:
        wanted = [dtype for dtype in wanted if dtype in dtypes][:1] or wanted[:1]
    checksum = hashlib.sha256()
    for key, weight in _weights(modules):
        bits = torch.hash_tensor(weight).view(torch.int64) if weight.numel() else 0
        checksum.update(f"{key}{weight.dtype}{tuple(weight.shape)}{int(bits)}".encode())
    stamp = int.from_bytes(checksum.digest()[:8], "little")
    known_stamp, known = _fingerprints.get(denoiser, (None, {}))
    if known_stamp != stamp:
        known = {}
    missing = {dtype: hashlib.sha256() for dtype in wanted if dtype not in known}
    if missing:
        _digest(_weights(modules), missing)
        known = {**known, **{dtype: digest.hexdigest() for dtype, digest in missing.items()}}
        _fingerprints[denoiser] = (stamp, known)
    return {dtype: known[dtype] for dtype in wanted}


UNQUANTISED = "none"
"""The scheme of a base whose weights are ordinary ones."""


def outline(denoiser: nn.Module) -> dict[str, str]:
    """What is the same of a model whether its weights are quantised or not, so that both can be told from others: a
    SHA-256 of the names and shapes of its parameters, and, by dtype, of those that are never packed: norms, biases,
    position tables and whatever else is no weight of a linear layer, a convolution or an embedding."""
    modules = [(name, module) for name, _, module in own_modules(denoiser) if module._parameters]
    shapes, plain, dtypes = [], [], set()
    for name, module in modules:
        packable = isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd)
        for own, parameter in module._parameters.items():
            if parameter is None:
                continue
            packed = own == "weight" and quantisation(module) is not None
            shapes.append((name, own, weight_shape(module) if packed else tuple(parameter.shape)))
            if not (packable and own == "weight") and parameter.dtype in _FINGERPRINT_DTYPES.values():
                plain.append((name, module, own))
                dtypes.add(parameter.dtype)
    known = list(_FINGERPRINT_DTYPES)
    coarsest = max((known.index(name) for name, dtype in _FINGERPRINT_DTYPES.items() if dtype in dtypes), default=0)
    digests = {f"unpacked {dtype}": hashlib.sha256() for dtype in known[coarsest:]}
    _digest(_fetched(plain), digests)
    structure = hashlib.sha256(repr(sorted(shapes)).encode()).hexdigest()
    return {"structure": structure, **{key: digest.hexdigest() for key, digest in digests.items()}}


def _digest(weights: Iterable[tuple[str, Tensor]], digests: Mapping[str, Any]) -> None:
    """Puts every weight into each digest, in the dtype that the last word of the digest's key names."""
    for key, parameter in weights:
        for name, digest in digests.items():
            digest.update(f"{key}{tuple(parameter.shape)}".encode())
            weight = parameter.to("cpu", _FINGERPRINT_DTYPES[name.rpartition(" ")[2]]).reshape(-1)
            digest.update(weight.view(torch.uint8).numpy().data)


def _weights(modules: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
    """All weights, detached, in the order of their full names."""
    return _fetched(
        (name, module, own)
        for name, module in modules
        for own, parameter in module._parameters.items()
        if parameter is not None
    )


def _fetched(parameters: Iterable[tuple[str, nn.Module, str]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters by module name, module and own name: detached, in the order of their full names."""
    named = {f"{name}.{own}" if name else own: (module, own) for name, module, own in parameters}
    for key, (module, own) in sorted(named.items()):
        with fetched(module):
            weight = module._parameters[own].detach()
            if weight.device.type == "meta":
                raise FadeError(f"the denoiser's weights are not loaded yet ({key} is on the meta device)")
            yield key, weight


def _weights_dtype(modules: list[tuple[str, nn.Module]]) -> str:
    found = {p.dtype for _, module in modules for p in module._parameters.values() if p is not None}
    if any(dtype.is_floating_point and dtype.itemsize == 1 for dtype in found):
        raise FadeError(
            "the denoiser's weights are stored in 8 bits (layerwise casting or quantisation), so they cannot be told "
            "from others; load the adapter before enable_layerwise_casting, or pass check_base=False"
        )
    unknown = sorted(str(dtype).removeprefix("torch.") for dtype in found - set(_FINGERPRINT_DTYPES.values()))
    if unknown or not found:
        names = ", ".join(unknown) or "missing"
        raise FadeError(f"the denoiser's weights are {names}; load the pipeline in {', '.join(_FINGERPRINT_DTYPES)}")
    # Where some are kept in float32 beside 16 bits, the 16 bits are what both sides have.
    return [name for name, dtype in _FINGERPRINT_DTYPES.items() if dtype in found][-1]


def same_base(trained_on: Mapping[str, str], found: Mapping[str, str]) -> bool:
    """Whether two fingerprints are of the same weights, compared in the finest dtype that both could be in."""
    shared = [dtype for dtype in _FINGERPRINT_DTYPES if dtype in trained_on and dtype in found]
    return bool(shared) and trained_on[shared[0]] == found[shared[0]]


def check_same_base(trained_on: Mapping[str, str], found: Mapping[str, str], told: str, instead: str) -> None:
    """Raises WrongBaseError, which says what was `told` and what to do `instead`, where two fingerprints are of
    different weights. Where one is of quantised weights, what differs is a warning: quantising changes each of them,
    and adapters are meant for both."""
    if "scheme" not in trained_on and "scheme" not in found:
        if not same_base(trained_on, found):
            raise WrongBaseError(told + instead)
        return
    differs = []
    schemes = [fingerprint.get("scheme", UNQUANTISED) for fingerprint in (trained_on, found)]
    if schemes[0] != schemes[1]:
        there, here = (f"quantised ({one})" if one != UNQUANTISED else "not quantised" for one in schemes)
        differs.append(f"the weights are {there} there and {here} here")
    if trained_on.get("structure") != found.get("structure"):
        unknown = "structure" not in trained_on or "structure" not in found
        differs.append("whether the rest is the same is not known" if unknown else "layers have other names or shapes")
    shared = [key for key in (f"unpacked {dtype}" for dtype in _FINGERPRINT_DTYPES) if key in trained_on.keys() & found]
    if shared and trained_on[shared[0]] != found[shared[0]]:
        differs.append("norms, biases and what else is not quantised are others, so that it may be another model")
    if differs:
        warnings.warn(f"{told}: {'; '.join(differs)}", stacklevel=3)


def refuse_merged(denoiser: nn.Module) -> None:
    """Raises FadeError where an adapter is merged into the weights."""
    for module in denoiser.modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            names = ", ".join(module.merged_adapters)
            raise FadeError(f"the adapters {names} are merged into the weights; call unmerge() or unfuse_lora() first")


def refuse_on_disk(denoiser: nn.Module, instead: str) -> None:
    """Raises FadeError, which says what to do `instead`, where diffusers keeps weights in files."""
    if groups_on_disk(denoiser):
        raise FadeError(f"the denoiser's weights are offloaded to a disk; {instead}")


def refuse_offloaded(denoiser: nn.Module) -> None:
    """Raises FadeError where the weights are not at hand for training: offloaded in pieces, or stored in 8 bits."""
    for _, _, module in own_modules(denoiser):
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if parameter.device.type == "meta" or getattr(module, "_diffusers_hook", None) is not None:
                raise FadeError(
                    "the denoiser is offloaded piece by piece (sequential CPU offload, group offload, layerwise "
                    "casting, or a device_map with cpu or disk), and cannot be trained so: unlearn first, then offload "
                    "(load_adapter works on both)"
                )
            if parameter.dtype.itemsize == 1 and quantisation(module) is None:
                raise FadeError("the denoiser's weights are stored in 8 bits; load it in fp32, fp16 or bf16 to unlearn")


def bring_to_its_device(denoiser: nn.Module) -> None:
    """Where `enable_model_cpu_offload` has the denoiser wait in host memory, brings it to the device that it computes
    on, as its next call would: what is made beside its weights is then made there. It stays until another part's turn.
    """
    from accelerate.hooks import CpuOffload

    for module in denoiser.modules():
        hook = getattr(module, "_hf_hook", None)
        for own in getattr(hook, "hooks", (hook,)):
            if isinstance(own, CpuOffload):
                own.pre_forward(module)


def base_name(pipeline: Any) -> str:
    """What the pipeline was loaded from: a bundled model's name, a hub id, or a folder's name without the folders above
    it."""
    source = str(getattr(pipeline, "name_or_path", "") or pipeline.config.get("_name_or_path") or "unnamed")
    if (bundled := name_of(source)) is not None:
        return bundled
    return Path(source).name if Path(source).is_absolute() else source


def short_digest(digests: Mapping[str, str]) -> str:
    """The first digits of a fingerprint, to tell two apart in a message."""
    dtype, digest = next(iter(digests.items()))
    return f"{dtype}:{digest[:12]}"
