import pytest
import torch

from fade.conditioning import Conditioning


def test_rows_of_one_size_are_stacked_and_others_refused() -> None:
    rows = (torch.randn(3, 4), torch.randn(3, 4), torch.randn(5, 4))
    whole = torch.randn(3, 2)
    conditioning = Conditioning({"ragged": rows, "whole": whole})
    stacked = conditioning.rows([1, 0]).stacked()
    assert torch.equal(stacked["ragged"], torch.stack([rows[1], rows[0]]))
    assert torch.equal(stacked["whole"], whole[[1, 0]])
    with pytest.raises(ValueError, match="different sizes"):
        conditioning.stacked()
