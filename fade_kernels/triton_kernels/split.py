"""How the rows of a contraction over T are divided over programs, where a layer alone has too few tiles for the device.

A 320 x 320 layer has 9 tiles of 128 x 128 for 132 multiprocessors. Splitting T multiplies the programs and the partial
results, which have to be written, read and summed.
"""

from dataclasses import dataclass

import torch

from fade_kernels.triton_kernels.launch import ceil_div

ASSUMED_MULTIPROCESSORS = 132
"""Of an H100 or H200: what the interpreter, which has none, plans for."""

PROGRAMS_PER_MULTIPROCESSOR = 2
"""So many 128 x 128 tiles in registers fit into one: below it, splitting adds programs that run at the same time."""

LEAST_STEPS = 4
"""A split shorter than this many steps of the loop spends its time filling the pipeline and writing its partials."""


@dataclass(frozen=True)
class Split:
    """`count` ranges of `rows` rows each, the last one shorter."""

    count: int
    rows: int


def split_rows(
    total: int, block: int, step: int, tiles: int, device: torch.device, most: int, asked: int | None = None
) -> Split:
    """Divides `total` > 0 rows for `tiles` tiles: a multiple of `block` rows to each split, at most `most` splits.

    `step` is the number of rows that the kernel's loop takes at a time. With `asked`, so many splits, or as many as
    there are blocks.

    Depends on shapes and the device alone, so that the order of summation, and with it every bit of the result, is the
    same in every run.
    """
    blocks = ceil_div(total, block)
    if asked is None:
        processors = ASSUMED_MULTIPROCESSORS
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        useful = ceil_div(PROGRAMS_PER_MULTIPROCESSOR * processors, max(tiles, 1))
        asked = min(useful, total // (LEAST_STEPS * step), most)
    elif asked < 1:
        raise ValueError(f"splits must be at least 1, not {asked}")
    rows = ceil_div(blocks, max(1, min(asked, blocks))) * block
    return Split(count=ceil_div(total, rows), rows=rows)
