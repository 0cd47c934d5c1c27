"""Device functions that the kernels share: the order of tiles, mask words to bits, the product of the factors."""

import triton
import triton.language as tl


@triton.jit
def grouped_tile(i_tile, TILES_T, TILES_N, GROUP_T: tl.constexpr):
    """Tile number -> (i_t, i_n): T fastest within a strip of N, GROUP_T tiles of T before the next strip.

    Blocks that run together then share a strip's weight, factors and mask, and the same rows of x come again soon.
    """
    i_group = i_tile // (GROUP_T * TILES_N)
    i_rest = i_tile % (GROUP_T * TILES_N)
    tiles = tl.minimum(TILES_T - i_group * GROUP_T, GROUP_T)
    return i_group * GROUP_T + i_rest % tiles, i_rest // tiles


@triton.jit
def column_bits(o_word, K):
    """The bits of words `o_word` of a row that are columns below K, which are all of them but in its last word.

    Every kernel drops the others from the words that it loads: a mask from a file may have them set.
    """
    b_left = tl.minimum(tl.maximum(K - o_word * 32, 0), 32)
    return tl.where(b_left == 32, -1, (1 << tl.minimum(b_left, 31)) - 1)


@triton.jit
def expand_rows(b_words, BN: tl.constexpr, BK: tl.constexpr):
    """Mask words [BN, BK/32] -> bits [BN, BK]: one load per word, not one per element."""
    b_bits = (b_words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1  # [BN, BK/32, 32]
    return tl.reshape(b_bits, (BN, BK))


@triton.jit
def expand_columns(b_words, BN: tl.constexpr, BK: tl.constexpr):
    """Mask words [BK/32, BN], one column per row of the mask -> bits [BK, BN]: `expand_rows` transposed."""
    b_bits = (b_words[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1  # [BK/32, 32, BN]
    return tl.reshape(b_bits, (BK, BN))


@triton.jit
def any_nonzero(b_words):
    """Whether a two-dimensional block holds anything but 0."""
    return tl.max(tl.max((b_words != 0).to(tl.int32), axis=1), axis=0) != 0


@triton.jit
def product_by_rank_steps(
    p_left, p_right, step_left, step_right, m_left, m_right, R,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """The factors' product [ROWS, COLUMNS] in steps of BR ranks.

    For fp32 without tensor cores, where one dot over a large rank would be unrolled beyond the registers.
    """
    b_product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for i_r in range(0, R, BR):
        m_r = i_r + tl.arange(0, BR) < R
        b_left = tl.load(p_left + i_r * step_left, mask=m_left[:, None] & m_r[None, :], other=0.0)  # [ROWS, BR]
        b_right = tl.load(p_right + i_r * step_right, mask=m_r[:, None] & m_right[None, :], other=0.0)  # [BR, COLUMNS]
        # [ROWS, BR] @ [BR, COLUMNS] -> [ROWS, COLUMNS]
        b_product = tl.dot(b_left, b_right, b_product, input_precision=INPUT_PRECISION)
    return b_product
