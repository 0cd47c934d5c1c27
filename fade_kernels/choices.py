"""Which path serves a call on a CUDA device: one function per decision, one table of thresholds, no side effects.

What is known of a mask: `mask_facts.py`; the paths: `cuda/`.
"""

from typing import NamedTuple

import torch

from fade_kernels.mask_facts import MaskFacts


class Thresholds(NamedTuple):
    """Where one path overtakes another, in the linear's forward pass where nothing else is said.

    None is measured yet: each is where the roofline model of an H200 (`bench/roofline.py`: 4.3 TB/s, 0.77 PFLOP/s,
    2.5 us a launch, own kernels at 0.85 of that rate) predicts that two paths take equally long; microseconds below are
    its predictions.
    """

    gather_density: float = 0.0125
    """Up to this density over the share of occupied tiles, only the mask's positions are computed. Two paths take
    equally long at 0.0132 (8192 tokens, 3072 channels) and 0.0135 (4096 tokens, 1280 channels); at 0.01 363 us against
    414 and 38 against 43. Clear of 0.01, which a random mask of 1 % meets on one side or the other."""
    gather_occupancy: float = 0.4
    """Below this share of occupied tiles they are cheaper, however few bits they hold: 4096 tokens at 1280 channels,
    both passes, 77 us against 74."""
    gather_flops: float = 1e10
    """Below, the memory that the products at positions move, and their launches, cost more than the tiles: 8192 tokens
    at 640 channels 24 us against 23."""
    sampled_density: float = 0.003
    """Up to this density over the share of occupied tiles, the gradient too is computed at the positions alone: 4096
    tokens at 1280 channels 18 us, all tiles 23. Lower, because blocks read x again, which the model leaves out."""
    library_flops: float = 1.3e10
    """From this much arithmetic in x W^T on, a library product and a second kernel for the delta beat one fused kernel:
    46 us either way at 1.3e10 (4096 tokens, 1280 channels), 472 against 505 at 1.5e11, tiles all occupied."""
    whole_occupancy: float = 0.85
    """From this share of occupied tiles on, the delta's product is the library's too, on a delta in scratch: 43 us at
    1.3e10, where all tiles take 46; at 1.5e11 414, where they take 472."""
    compact_channels: float = 0.75
    """Up to this share of active channels, a convolution with the delta runs on copies of those channels alone. A
    guess: the model has no convolutions."""


THRESHOLDS = Thresholds()


def _sparse_enough(facts: MaskFacts, density: float) -> bool:
    return facts.density <= density * facts.occupancy and facts.occupancy >= THRESHOLDS.gather_occupancy


def choose_linear(dtype: torch.dtype, tokens: int, rows: int, columns: int, facts: MaskFacts, tf32: bool) -> str:
    """Path of the masked linear's forward and input gradient.

    Args:
        dtype: of the activations; tokens, rows, columns: T, N, K; facts: of the mask; tf32: fp32 products may round.

    Returns:
        `frozen`: the mask is empty. `scratch`: one product with W + Delta, exact enough in fp32 alone. `gather`: a
        library product, then the delta at the mask's positions. `fused`: both terms in one kernel. `split`: a library
        product, then the delta's occupied tiles. `whole`: two library products.
    """
    if facts.density == 0.0:
        return "frozen"
    if dtype == torch.float32 and not tf32:
        return "scratch"
    flops = 2.0 * tokens * rows * columns
    if _sparse_enough(facts, THRESHOLDS.gather_density) and flops >= THRESHOLDS.gather_flops:
        return "gather"
    if flops < THRESHOLDS.library_flops:
        return "fused"
    return "whole" if facts.occupancy >= THRESHOLDS.whole_occupancy else "split"


def choose_factor_gradients(tokens: int, rows: int, columns: int, facts: MaskFacts) -> str:
    """`zero`: an empty mask. `gather`: the weight gradient at the mask's positions. `tile`: in its occupied tiles."""
    if facts.density == 0.0:
        return "zero"
    large = 2.0 * tokens * rows * columns >= THRESHOLDS.gather_flops
    return "gather" if large and _sparse_enough(facts, THRESHOLDS.sampled_density) else "tile"


def choose_linear_magnitude(dtype: torch.dtype, tf32: bool) -> str:
    """`fused`: the magnitude is taken in the product's epilogue. `scratch`: a library product, folded in and freed.

    A product in full fp32 uses no matrix unit, and the library's is the faster one there.
    """
    return "scratch" if dtype == torch.float32 and not tf32 else "fused"
