"""Masked least squares on CUDA (`least_squares_by_size.py`): which rows share a launch of the compiled kernel.

csrc/cuda/least_squares.cu keeps a row's triangle in shared memory, and gives a block as much as the largest row of its
launch needs: rows of like size share a launch, so that small ones do not wait for room.
"""

from torch import Tensor

from fade_kernels import least_squares_by_size

SIZES: tuple[int, ...] = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Entries that a row of a launch has at most; rows with more are for torch's own blocking."""


def masked_least_squares(
    rhs: Tensor, gram: Tensor, mask_words: Tensor, count: int, with_prices: bool, launches: tuple[int, ...] = SIZES
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, with rows of at most so many entries in each launch of the kernel, and larger ones by torch."""
    return least_squares_by_size.masked_least_squares(rhs, gram, mask_words, count, with_prices, launches)


def padded_masked_least_squares(
    rhs: Tensor, gram: Tensor, mask_words: Tensor, count: int, with_prices: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator by torch alone, where there is no compiled kernel."""
    return masked_least_squares(rhs, gram, mask_words, count, with_prices, launches=())
