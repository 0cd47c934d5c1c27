"""Which tiles of a mask hold any bit, as a list per strip: what a kernel walks instead of testing every tile.

A branch inside a kernel's loop keeps the loads behind it out of the pipeline; a loop over a list of occupied tiles is
pipelined like any other. The list is small, one int32 per tile, and holds only while the mask is unchanged.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fade_kernels.triton_kernels.launch import CompileCase, Tiling, on_device

TILINGS: tuple[Tiling, ...] = (Tiling({"CHUNK": 32}, num_warps=8, num_stages=1),)


class OccupiedTiles(NamedTuple):
    """The occupied tiles of every strip of a mask, in order."""

    tiles: Tensor
    """Int32 [strips, tiles of a strip]: the first counts[i] entries of row i are valid."""
    counts: Tensor
    """Int32 [strips]."""


@triton.jit
def occupied_tiles_kernel(
    mask_words,
    tiles,
    counts,
    N,
    WORDS,
    TILES,
    stride_mask,
    BN: tl.constexpr,
    BW: tl.constexpr,
    CHUNK: tl.constexpr,
    ALONG_N: tl.constexpr,
):
    # A tile is BN rows x BW words. A strip of N runs along K, a strip of K along N.
    i_strip = tl.program_id(0)
    o_tile = tl.arange(0, CHUNK)
    count = 0
    for i_chunk in range(0, TILES, CHUNK):
        if ALONG_N:
            o_n = i_chunk * BN + tl.arange(0, CHUNK * BN)
            o_word = i_strip * BW + tl.arange(0, BW)
        else:
            o_n = i_strip * BN + tl.arange(0, BN)
            o_word = i_chunk * BW + tl.arange(0, CHUNK * BW)
        p_mask = mask_words + o_n.to(tl.int64)[:, None] * stride_mask + o_word[None, :]
        b_words = tl.load(p_mask, mask=(o_n < N)[:, None] & (o_word < WORDS)[None, :], other=0)
        b_any = (b_words != 0).to(tl.int32)  # [CHUNK BN, BW] or [BN, CHUNK BW]
        if ALONG_N:
            b_any = tl.max(tl.reshape(b_any, (CHUNK, BN * BW)), axis=1)  # [CHUNK]
        else:
            b_any = tl.max(tl.reshape(tl.max(b_any, axis=0), (CHUNK, BW)), axis=1)  # [CHUNK]
        o_place = count + tl.cumsum(b_any, axis=0) - 1
        tl.store(tiles + i_strip.to(tl.int64) * TILES + o_place, i_chunk + o_tile, mask=b_any != 0)
        count += tl.sum(b_any, axis=0)
    tl.store(counts + i_strip, count)


def occupied_tiles(mask_words: Tensor, rows: int, columns: int, *, along: str) -> OccupiedTiles:
    """The occupied tiles of `rows` x `columns` bits (columns a multiple of 32), listed along "k" or "n".

    Args:
        mask_words: int32 [N, ceil(K/32)], stride 1 in the last dimension.
        rows, columns: size of a tile, powers of two.
        along: "k": one strip per `rows` rows, its tiles numbered along K; "n": one per `columns` columns, along N.
    """
    n, words = mask_words.shape
    tile_words = columns // 32
    tiles_n, tiles_k = triton.cdiv(n, rows), triton.cdiv(words, tile_words)
    strips, length = (tiles_n, tiles_k) if along == "k" else (tiles_k, tiles_n)
    tiles = torch.empty((strips, length), dtype=torch.int32, device=mask_words.device)
    counts = torch.empty((strips,), dtype=torch.int32, device=mask_words.device)
    if strips:
        (tiling,) = TILINGS
        # Bits of about 8192 words a step, whatever the tile.
        chunk = max(1, min(tiling.blocks["CHUNK"], 8192 // (rows * tile_words)))
        with on_device(mask_words):
            occupied_tiles_kernel[(strips,)](
                mask_words,
                tiles,
                counts,
                n,
                words,
                length,
                mask_words.stride(0),
                BN=rows,
                BW=tile_words,
                CHUNK=chunk,
                ALONG_N=along == "n",
                num_warps=tiling.num_warps,
                num_stages=tiling.num_stages,
            )
    return OccupiedTiles(tiles, counts)


def compile_cases() -> list[CompileCase]:
    """Both directions, for the tile most kernels use."""
    (tiling,) = TILINGS
    signature = {
        **dict.fromkeys(("mask_words", "tiles", "counts"), "*i32"),
        **dict.fromkeys(("N", "WORDS", "TILES", "stride_mask"), "i32"),
        **dict.fromkeys(("BN", "BW", "CHUNK", "ALONG_N"), "constexpr"),
    }
    return [
        CompileCase(
            name=f"occupied_tiles, along {'N' if along_n else 'K'}",
            kernel=occupied_tiles_kernel,
            dtype="int32",
            signature=signature,
            constants={"BN": 128, "BW": 2, "CHUNK": 32, "ALONG_N": along_n},
            tiling=tiling,
            tensor_cores=False,
        )
        for along_n in (False, True)
    ]
