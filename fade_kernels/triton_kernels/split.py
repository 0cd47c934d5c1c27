"""How the rows of a contraction over T are divided over programs, where a layer's tiles alone do not fill the device.

A 320 x 320 layer has 9 tiles of 128 x 128 for 132 multiprocessors. Splitting T multiplies the programs and the partial
results, which have to be written, read and summed. What counts are whole rounds of programs: 270 of them take twice as
long as 261 where 264 run at a time.
"""

from dataclasses import dataclass

import torch

ASSUMED_MULTIPROCESSORS = 132
"""Of an H100 or H200: what the interpreter, which has none, plans for."""

FILL = 8.0
"""Steps of the loop that a program's begin and end take: filling the pipeline, the product with the factors."""

ALONE = 0.6
"""Of the time that programs take side by side on a multiprocessor, what one takes that has it to itself."""


@dataclass(frozen=True)
class Split:
    """`count` ranges of `rows` rows each, the last one shorter."""

    count: int
    rows: int


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; elsewhere an assumed number."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return ASSUMED_MULTIPROCESSORS


def together(tile: int) -> int:
    """Programs that a multiprocessor holds at a time, with an fp32 tile of so many elements in registers: two of
    128 x 128, three of 128 x 64, four of 64 x 64."""
    return 2 if tile >= 16384 else 3 if tile >= 8192 else 4


def split_rows(
    total: int,
    block: int,
    step: int,
    tiles: int,
    processors: int,
    most: int,
    asked: int | None = None,
    *,
    side_by_side: int = 2,
    partial: float = 0.0,
) -> Split:
    """Divides `total` > 0 rows for `tiles` tiles: a multiple of `block` rows to each split, at most `most` splits.

    `step` is the number of rows that the kernel's loop takes at a time; `processors` times `side_by_side` programs run
    at once; `partial`: steps that each further partial result costs every program. With `asked`, so many splits, or as
    many as there are blocks.

    Depends on shapes and the device alone, so that the order of summation, and with it every bit of the result, is the
    same in every run.
    """
    blocks = -(-total // block)
    if asked is not None:
        if asked < 1:
            raise ValueError(f"splits must be at least 1, not {asked}")
        return _divided(total, blocks, block, asked)
    if tiles > processors * side_by_side:  # a round and more: splits would add workspace, and little else
        return _divided(total, blocks, block, 1)
    splits = {_divided(total, blocks, block, count) for count in range(1, max(1, min(most, blocks)) + 1)}

    def time(split: Split) -> float:
        rounds = _rounds(tiles * split.count, processors, side_by_side)
        return rounds * (split.rows / step + FILL + (partial * split.count if split.count > 1 else 0.0))

    return min(splits, key=lambda split: (time(split), split.count))


def _divided(total: int, blocks: int, block: int, count: int) -> Split:
    rows = -(-blocks // min(count, blocks)) * block
    return Split(-(-total // rows), rows)


def _rounds(programs: int, processors: int, side_by_side: int) -> float:
    """Rounds of programs, the last of them shorter where multiprocessors have less to share."""
    full, rest = divmod(programs, processors * side_by_side)
    if rest == 0 or side_by_side == 1:
        return full + (rest > 0)
    return full + ALONE + (1 - ALONE) * (-(-rest // processors) - 1) / (side_by_side - 1)
