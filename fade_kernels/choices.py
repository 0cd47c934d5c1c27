"""Which path serves a call on a CUDA device: one function per decision, one table of thresholds, no side effects.

What is known of a mask: `mask_facts.py`; the paths: `cuda/`.
"""

from typing import Literal, NamedTuple

import torch

from fade_kernels.mask_facts import MaskFacts


class Thresholds(NamedTuple):
    """Where one path overtakes another, in the linear's forward pass where nothing else is said.

    Measured on an H100 in bf16 with rank 16 (`bench/results/tilings.json`): layers of SD 1.5, SDXL, SD 3.5 and FLUX.1;
    times below are in units of the frozen layer.
    """

    gather_density: float = 0.0
    """Up to this density over the share of occupied tiles, only the mask's positions are computed. None of 1, 0.3 and
    0.1 % is low enough: 9216 tokens at 3072 channels 7.75, 5.1 and 4.3, all tiles 2.9; smaller layers likewise."""
    gather_occupancy: float = 0.6
    """Below this share of occupied tiles they are cheaper, however few bits they hold."""
    gather_flops: float = 3e10
    """Below this much arithmetic in x W^T, the sum in fp32 that the positions are added to costs more than tiles."""
    sampled_density: float = 0.0
    """Up to this density over the share of occupied tiles, the gradient too is computed at the positions alone: at
    0.1 % it takes 2.7 products of the library at 3072 channels, all of it 1.15."""
    sampled_flops: float = 1e10
    """Below this much arithmetic in dY^T X the tiles are cheaper."""
    library_flops: float = 1e10
    """From this much arithmetic in dY^T X on, the library's product and a pass over it overtake the occupied tiles:
    1.15 products against 1.58 at 3072 channels, 1.49 against 1.82 at 4096 x 1280; 2048 x 1280 1.85 against 1.92, for
    which the memory is not worth it."""
    library_occupancy: float = 0.4
    """From this share of occupied tiles on; with a tenth of them the tiles take 0.46 products."""
    rounded_density: float = 0.2
    """Up to this density the noise of rounding W + Delta stochastically is small beside that of rounding y: rounding a
    share d of bf16 weights adds an error of 2.3e-3 sqrt(d) of y to the 1.7e-3 of y's own rounding, at 0.2 a sixth."""
    skip_occupancy: float = 0.9
    """Below this share of occupied tiles the fused kernels walk a list that leaves the delta of the others out; above,
    the list's address, one load a step, is not worth what is left out: with 70 % of them 2.7 against 2.9 at 3072
    channels, 1.87 against 1.88 at 320."""
    sparse_occupancy: float = 0.25
    """Up to this share of occupied tiles the tilings are those of sparse masks: faster with 10 %, slower with 40 %."""
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
        library product with its sum in fp32, to which the delta is added at the mask's positions. `fused`: both terms
        in one kernel, summed in fp32.
    """
    if facts.density == 0.0:
        return "frozen"
    if dtype == torch.float32 and not tf32:
        return "scratch"
    large = 2.0 * tokens * rows * columns >= THRESHOLDS.gather_flops
    return "gather" if large and _sparse_enough(facts, THRESHOLDS.gather_density) else "fused"


def mask_form(facts: MaskFacts) -> Literal["full", "mixed", "sparse"]:
    """What a fused kernel is told of the mask's tiles: but for "full" it leaves the delta of empty ones out, by a list
    of the others."""
    if facts.occupancy >= THRESHOLDS.skip_occupancy:
        return "full"
    return "sparse" if facts.occupancy <= THRESHOLDS.sparse_occupancy else "mixed"


def choose_factor_gradients(dtype: torch.dtype, tokens: int, rows: int, columns: int, facts: MaskFacts) -> str:
    """`zero`: an empty mask. `gather`: the weight gradient at the mask's positions. `tile`: in its occupied tiles.
    `library`: all of it by the library's product, in bf16, which has the range of fp32."""
    if facts.density == 0.0:
        return "zero"
    flops = 2.0 * tokens * rows * columns
    if flops >= THRESHOLDS.sampled_flops and _sparse_enough(facts, THRESHOLDS.sampled_density):
        return "gather"
    whole = flops >= THRESHOLDS.library_flops and facts.occupancy >= THRESHOLDS.library_occupancy
    return "library" if whole and dtype == torch.bfloat16 else "tile"


def choose_linear_magnitude(dtype: torch.dtype, tf32: bool) -> str:
    """`fused`: the magnitude is taken in the product's epilogue. `scratch`: a library product, folded in and freed.

    A product in full fp32 uses no matrix unit, and the library's is the faster one there.
    """
    return "scratch" if dtype == torch.float32 and not tf32 else "fused"


# --- the training mode -----------------------------------------------------------------------------------------------


class Chip(NamedTuple):
    """The constants of the roofline model, those of an H100 as measured (`bench/results/gpu.json`)."""

    bandwidth: float = 3.0e12
    """Bytes a second."""
    matrix: float = 0.8e15
    """FLOP/s of the library's 16-bit products."""
    launch: float = 2.5e-6
    """Seconds."""
    efficiency: float = 0.7
    """Of both rates, in kernels of our own."""

    def seconds(self, flops: float, moved: float, rate: float, efficiency: float = 1.0) -> float:
        """One kernel: the longer of its arithmetic and its memory traffic, and a launch."""
        return max(flops / rate, moved / self.bandwidth) / efficiency + self.launch


_CHIP = Chip()
_RANK, _ROW_TILE = 16, 128  # a usual rank; rows of x for which the fused kernel makes a tile of Delta once


def choose_training_mode(
    dtype: torch.dtype, tokens: int, rows: int, columns: int, density: float, occupancy: float
) -> str:
    """Training mode of a layer by the roofline model: what the products of a step take, forward and for dX.

    The adapter's gradients are the same in both modes and left out. In the one-product mode W + Delta is counted as
    made once a step, with other layers in one launch.

    Args:
        dtype: of the activations; tokens, rows, columns: T, N, K (a convolution: pixels, C_out, C_in kh kw).
        density: share of set bits in the mask; occupancy: share of its 64 x 64 tiles that hold any.

    Returns:
        "exact" or "one-product"; "exact" wherever nothing is rounded to 16 bits, the mask is empty, or too dense for
        rounding noise to be small (`Thresholds.rounded_density`).
    """
    if dtype.itemsize != 2 or not 0.0 < density <= THRESHOLDS.rounded_density:
        return "exact"
    t, n, k, chip = tokens, rows, columns, _CHIP
    product, weights = 2.0 * t * n * k, n * k
    activations = t * (n + k)
    once = chip.seconds(product, 2 * (activations + weights), chip.matrix)
    made = max(2.0 * weights * _RANK / chip.matrix, (2 + 2 + 1 / 8) * weights / chip.bandwidth) / chip.efficiency
    delta = occupancy * (product + 2.0 * -(-t // _ROW_TILE) * weights * _RANK)
    exact = chip.seconds(product + delta, 2 * (activations + weights) + weights / 8, chip.matrix, chip.efficiency)
    return "one-product" if once + made / 2 < exact else "exact"
