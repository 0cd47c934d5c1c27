"""What is known of a mask on a device: its density and occupancy, where its bits are, the channels it touches.

Found once, with a synchronisation, and kept as long as the mask's words live. While a CUDA graph is captured nothing
may wait for the device: what is not known yet then counts as full.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fade_kernels._extension import cuda_library_loaded
from fade_kernels.positions import MaskPositions, find_positions

OCCUPANCY_TILE = 64


@dataclass
class MaskFacts:
    """Counted once per mask, with one synchronisation, and kept as long as its words live."""

    version: int
    density: float
    occupancy: float
    """Share of 64 x 64 tiles that hold any set bit."""


_facts: Any = WeakIdKeyDictionary()
_positions: Any = WeakIdKeyDictionary()
_UNKNOWN = MaskFacts(version=-1, density=1.0, occupancy=1.0)


def _capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, so that nothing may wait for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def mask_facts(mask_words: Tensor, columns: int) -> MaskFacts:
    """Density and tile occupancy of a mask. While a CUDA graph is captured an unknown mask counts as full."""
    version = 0 if mask_words.is_inference() else mask_words._version
    facts = _facts.get(mask_words)
    if facts is not None and facts.version == version:
        return facts
    if _capturing(mask_words):
        return _UNKNOWN
    rows = mask_words.shape[0]
    count = torch.ops.fade_kernels.mask_row_counts(mask_words, columns).sum()
    occupied = torch.ops.fade_kernels.mask_occupancy(mask_words, columns, OCCUPANCY_TILE, OCCUPANCY_TILE)
    density, occupancy = torch.stack([count.double() / max(1, rows * columns), occupied.double().mean()]).tolist()
    facts = MaskFacts(version, density, occupancy if occupied.numel() else 0.0)
    _facts[mask_words] = facts
    return facts


def positions_known(mask_words: Tensor) -> bool:
    """Whether `mask_positions` would not have to find them."""
    known = _positions.get(mask_words)
    return known is not None and known[0] == (0 if mask_words.is_inference() else mask_words._version)


def mask_positions(mask_words: Tensor, columns: int) -> MaskPositions:
    """Where a mask's bits are, found once per mask, with a synchronisation, and kept as long as its words live.

    Raises RuntimeError where they are asked for first while a CUDA graph is captured.
    """
    if not positions_known(mask_words):
        if _capturing(mask_words):
            raise RuntimeError(
                "the mask's positions are not known yet, and finding them cannot be captured in a CUDA graph: call the "
                "operator once before the capture, on inputs of the same shapes"
            )
        positions = find_positions(mask_words, columns)
        if mask_words.is_cuda:
            # Other streams may read them without having waited for this one.
            torch.cuda.current_stream(mask_words.device).synchronize()
        _positions[mask_words] = (0 if mask_words.is_inference() else mask_words._version, positions)
    return _positions[mask_words][1]


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
    gatherable = _can_gather(mask_words, columns) and (not _capturing(mask_words) or positions_known(mask_words))
    return facts if gatherable or facts.density == 0.0 else replace(facts, density=1.0)


class Channels(NamedTuple):
    """Output rows and input channels of a convolution that a mask touches; None: not known."""

    rows: Tensor | None
    inputs: Tensor | None


_channels: Any = WeakIdKeyDictionary()


def active_channels(mask_words: Tensor, in_channels: int, kernel: Sequence[int]) -> Channels:
    """The channels that a mask touches; not known where they are asked for first while a CUDA graph is captured."""
    version = 0 if mask_words.is_inference() else mask_words._version
    known = _channels.get(mask_words)
    if known is None or known[0] != version:
        if _capturing(mask_words):
            return Channels(None, None)
        columns = in_channels * kernel[0] * kernel[1]
        mask = torch.ops.fade_kernels.unpack_mask(mask_words, columns).reshape(-1, in_channels, kernel[0] * kernel[1])
        touched = mask.any(dim=2)
        active = Channels(touched.any(dim=1).nonzero().flatten(), touched.any(dim=0).nonzero().flatten())
        if mask_words.is_cuda:
            # Other streams may read them without having waited for this one.
            torch.cuda.current_stream(mask_words.device).synchronize()
        known = (version, active)
        _channels[mask_words] = known
    return known[1]
