"""A mask's bits as lists of positions, and what the operators that walk them refuse."""

from typing import Any

import pytest
import torch
from kernel_testing import generator

from fade_kernels import _ops, reference
from fade_kernels.positions import find_positions


@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (3, 0), (5, 33), (40, 70)])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_positions_are_the_mask_in_both_orders(shape: tuple[int, int], density: float) -> None:
    mask = torch.rand(shape, generator=generator(1)) < density
    by_row, by_column, order = find_positions(reference.pack_mask(mask), shape[1])
    for segments, expected in ((by_row, mask), (by_column, mask.t())):
        rows, columns = expected.nonzero(as_tuple=True)
        assert segments.segment.tolist() == rows.tolist()
        assert segments.index.tolist() == columns.tolist()
        assert segments.starts.diff().tolist() == expected.sum(dim=1).tolist()
        assert all(tensor.dtype == torch.int32 for tensor in segments)
    assert by_row.index[order].tolist() == by_column.segment.tolist()
    assert by_row.segment[order].tolist() == by_column.index.tolist()


def arguments() -> dict[str, dict[str, Any]]:
    """Arguments of each operator that fit: T = 3, N = 4, K = 6, rank 2."""
    (starts, index, segment), by_column, order = find_positions(reference.pack_mask(torch.eye(4, 6) > 0), 6)
    y, x, scale, values = torch.zeros(3, 4), torch.ones(3, 6), torch.tensor(1.0), torch.ones(4)
    factors = {"lora_a": torch.ones(2, 6), "lora_b": torch.ones(4, 2)}
    at = {"starts": starts, "index": index}
    both = {
        "row_starts": starts, "row_index": index, "column_starts": by_column.starts, "column_index": by_column.index,
    }  # fmt: skip
    return {
        "add_gathered_lora_": {"y": y, "x": x, **factors, **at, "segment": segment, "by_column": False, "scale": scale},
        "add_gathered_values_": {"y": y, "x": x, "values": values, "order": None, **at, "scale": scale},
        "sampled_gradient": {"grad_output": y, "x": x, **at, "segment": segment},
        "sampled_factor_gradients": {"gradient": values, **both, "order": order, **factors, "scale": scale},
    }


@pytest.mark.parametrize(
    ("operator", "name", "wrong", "message"),
    [
        ("add_gathered_lora_", "x", torch.ones(3, 5), r"x \[3, 5\] do not fit B A \[4, 6\]"),
        ("add_gathered_lora_", "y", torch.ones(2, 4), "one T"),
        ("add_gathered_lora_", "y", torch.ones(3, 4).double(), "float64"),
        ("add_gathered_lora_", "by_column", True, "do not fit"),
        ("add_gathered_lora_", "starts", torch.zeros(4, dtype=torch.int32), "one element more"),
        ("add_gathered_lora_", "index", torch.zeros(4), "index must be int32"),
        ("add_gathered_lora_", "segment", torch.zeros(3, dtype=torch.int32), "equally long"),
        ("add_gathered_lora_", "lora_b", torch.ones(4, 3), "lora_b"),
        ("add_gathered_values_", "values", torch.ones(5), "one for each of the 4 positions"),
        ("add_gathered_values_", "order", torch.zeros(3, dtype=torch.int32), "equally long"),
        ("add_gathered_values_", "scale", torch.ones(2), "scale"),
        ("sampled_gradient", "grad_output", torch.ones(3, 5), "one element more"),
        ("sampled_gradient", "x", torch.ones(3, 2, 3), "one T"),
        ("sampled_factor_gradients", "gradient", torch.ones(3), "one for each of the 4 positions"),
        ("sampled_factor_gradients", "column_starts", torch.zeros(5, dtype=torch.int32), "one element more"),
        ("sampled_factor_gradients", "order", torch.zeros(4), "order must be int32"),
    ],
)
def test_what_does_not_fit_is_named(operator: str, name: str, wrong: Any, message: str) -> None:
    fitting = arguments()[operator]
    getattr(_ops, operator)(*fitting.values())
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(_ops, operator)(*{**fitting, name: wrong}.values())
