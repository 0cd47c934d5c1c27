"""What is known of a mask on a device: density and occupancy, where its bits are, the order of its tiles, its channels.

Found once, with a synchronisation, and kept as long as the mask's words live. While a CUDA graph is captured nothing
may wait for the device: what is not known yet then counts as full.
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fade_kernels._extension import cuda_library_loaded
from fade_kernels.positions import MaskPositions, TileOrder, find_first_places, find_positions, find_tile_order

Found = TypeVar("Found")

OCCUPANCY_TILE = 64


@dataclass(frozen=True)
class MaskFacts:
    """What a path is chosen by."""

    version: int
    """Of the words that were counted."""
    density: float
    occupancy: float
    """Share of 64 x 64 tiles that hold any set bit."""


_UNKNOWN = MaskFacts(version=-1, density=1.0, occupancy=1.0)

_by_storage: dict[int, tuple[weakref.ref[Any], dict[Any, Any]]] = {}
"""By address of the storage, until it dies."""


def _version(words: Tensor) -> int:
    return 0 if words.is_inference() else words._version


def kept_with(words: Tensor) -> dict[Any, Any]:
    """A dict that lives as long as the words' memory and their version: for what was found out about these words.

    By memory and not by tensor, because another tensor may come in its place: hooks on saved tensors, detach and views
    make new objects for the same words.
    """
    storage = words.untyped_storage()
    address = storage._cdata
    entry = _by_storage.get(address)
    if entry is None or entry[0]() is not storage:
        gone = weakref.ref(storage, lambda gone: _forget(address, gone))
        entry = _by_storage[address] = (gone, {})
    place, version = (words.storage_offset(), words.shape, words.stride()), _version(words)
    known = entry[1].get(place)
    if known is None or known[0] != version:
        entry[1][place] = known = (version, {})
    return known[1]


def _forget(address: int, gone: "weakref.ref[Any]") -> None:
    entry = _by_storage.get(address)
    if entry is not None and entry[0] is gone:
        del _by_storage[address]


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, so that nothing may wait for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.cache
def _warn_of_unknown_masks() -> None:
    warnings.warn(
        "a mask is used for the first time while a CUDA graph is captured, so that nothing is known of it: in this "
        "graph it counts as full for good, which is right but slower. Run the step once before the capture.",
        RuntimeWarning,
        stacklevel=2,
    )


def _found(mask_words: Tensor, what: Any, find: Callable[[], Found]) -> Found | None:
    """What is kept with the words under this key, found where it is missing; None while a graph is captured."""
    known = kept_with(mask_words)
    found = known.get(what)
    if found is None:
        if capturing(mask_words):
            return None
        found = find()
        if mask_words.is_cuda:
            # Other streams may read it without having waited for this one.
            torch.cuda.current_stream(mask_words.device).synchronize()
        known[what] = found
    return found


def mask_facts(mask_words: Tensor, columns: int) -> MaskFacts:
    """Density and tile occupancy of a mask; while a CUDA graph is captured an unknown mask counts as full, with a
    warning."""

    def count() -> MaskFacts:
        rows = mask_words.shape[0]
        bits = torch.ops.fade_kernels.mask_row_counts(mask_words, columns).sum()
        occupied = torch.ops.fade_kernels.mask_occupancy(mask_words, columns, OCCUPANCY_TILE, OCCUPANCY_TILE)
        shares = torch.stack([bits.double() / max(1, rows * columns), occupied.double().mean()])
        density, occupancy = shares.tolist()
        return MaskFacts(_version(mask_words), density, occupancy if occupied.numel() else 0.0)

    facts = _found(mask_words, "facts", count)
    if facts is None:
        _warn_of_unknown_masks()
        return _UNKNOWN
    return facts


def positions_known(mask_words: Tensor) -> bool:
    """Whether `mask_positions` would not have to find them."""
    return "positions" in kept_with(mask_words)


def mask_positions(mask_words: Tensor, columns: int) -> MaskPositions:
    """Where a mask's bits are.

    Raises:
        RuntimeError: they are asked for first while a CUDA graph is captured.
    """
    positions = _found(mask_words, "positions", lambda: find_positions(mask_words, columns))
    if positions is None:
        raise RuntimeError(
            "the mask's positions are not known yet, and finding them cannot be captured in a CUDA graph: call the "
            "operator once before the capture, on inputs of the same shapes"
        )
    return positions


def tile_order(mask_words: Tensor, columns: int, tile_n: int, tile_k: int, *, along: str) -> TileOrder | None:
    """The order in which the fused kernels walk the mask's tiles; None: asked for first while a graph is captured."""
    return _found(
        mask_words,
        (tile_n, tile_k, along),
        lambda: find_tile_order(mask_words, columns, tile_n, tile_k, along=along),
    )


def first_places(mask_words: Tensor, columns: int, width: int) -> Tensor:
    """Where the values of each row's tiles of `width` columns begin: `find_first_places`, which can be captured too."""

    def find() -> Tensor:
        return find_first_places(mask_words, columns, width)

    places = _found(mask_words, ("places", width), find)
    return find() if places is None else places


@functools.cache
def _widest_slab(index: int | None) -> int:
    """Columns of x or dY of which the gather kernels hold eight words a row and some more (`csrc/cuda/gather.cu`)."""
    shared_bytes = torch.cuda.get_device_properties(index).shared_memory_per_block_optin
    return shared_bytes // (4 * 9) - 256


def _can_gather(mask_words: Tensor, columns: int) -> bool:
    """Whether the gather kernels are there and fit; the definitions that serve elsewhere are only for tests."""
    if not mask_words.is_cuda:
        return True
    return cuda_library_loaded() and max(mask_words.shape[0], columns) <= _widest_slab(mask_words.device.index)


def facts_for_choice(mask_words: Tensor, columns: int) -> MaskFacts:
    """The facts; but a mask that cannot be gathered counts as too full for it.

    So does one whose positions are not known while a graph is captured.
    """
    facts = mask_facts(mask_words, columns)
    gatherable = _can_gather(mask_words, columns) and (not capturing(mask_words) or positions_known(mask_words))
    return facts if gatherable or facts.density == 0.0 else replace(facts, density=1.0)


class Channels(NamedTuple):
    """Output rows and input channels of a convolution that a mask touches; None: not known."""

    rows: Tensor | None
    inputs: Tensor | None


def active_channels(mask_words: Tensor, in_channels: int, kernel: Sequence[int]) -> Channels:
    """The channels that a mask touches; not known where they are asked for first while a CUDA graph is captured."""

    def find() -> Channels:
        columns = in_channels * kernel[0] * kernel[1]
        mask = torch.ops.fade_kernels.unpack_mask(mask_words, columns).reshape(-1, in_channels, kernel[0] * kernel[1])
        touched = mask.any(dim=2)
        return Channels(touched.any(dim=1).nonzero().flatten(), touched.any(dim=0).nonzero().flatten())

    return _found(mask_words, "channels", find) or Channels(None, None)
