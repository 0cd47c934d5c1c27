"""A masked layer's mask: what is known of it fits its words, whatever is loaded, moved or compiled."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from fade.layers import MaskBuffer, MaskedLoraLinear
from fade_kernels import BitMask, gather_masked


def random_mask(rows: int, columns: int, density: float) -> BitMask:
    return BitMask.pack(torch.rand(rows, columns) < density)


def values_layer(mask: BitMask) -> MaskedLoraLinear:
    base = nn.Linear(mask.shape[1], mask.shape[0]).requires_grad_(False)
    layer = MaskedLoraLinear.adopt(lora.Linear(base, "default", config=LoraConfig(), r=1, lora_alpha=1))
    layer.set_values("default", mask, torch.randn(mask.count))
    return layer


def test_another_mask_is_loaded_with_its_count_and_occupancy() -> None:
    first, second = random_mask(48, 72, 0.1), random_mask(48, 72, 0.6)
    buffer = MaskBuffer(first, 1.0)
    buffer.mask.count, buffer.mask.occupancy(8)
    buffer.load_state_dict(MaskBuffer(second, 1.0).state_dict())
    assert buffer.mask == second
    assert buffer.mask.count == second.count != first.count
    assert torch.equal(buffer.mask.occupancy(8), second.occupancy(8))
    weight = torch.randn(48, 72)
    assert torch.equal(gather_masked(weight, buffer.mask), weight[second.unpack()])


def test_words_of_another_width_are_refused_and_nothing_changes() -> None:
    mask = random_mask(16, 70, 0.1)
    buffer = MaskBuffer(mask, 1.0)
    for other, message in ((BitMask.full((16, 96)), "beyond column 70"), (BitMask.full((16, 33)), "do not fit 70")):
        with pytest.raises(RuntimeError, match=f"words: .*{message}"):
            buffer.load_state_dict(MaskBuffer(other, 1.0).state_dict())
    assert buffer.mask == mask


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to another device and back": lambda layer: layer._apply(lambda tensor: tensor.clone()),
    "to another dtype": lambda layer: layer.to(torch.float64),
    "within inference mode": torch.inference_mode()(lambda layer: layer._apply(lambda tensor: tensor.clone())),
    "loaded": lambda layer: (layer.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}), layer)[1],
}


@pytest.mark.parametrize("move", MOVES)
def test_a_values_layer_compiles_as_one_graph_after_a_move(move: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = values_layer(random_mask(48, 72, 0.1))
    if move != "loaded":
        monkeypatch.setattr(BitMask, "row_counts", property(lambda self: pytest.fail("counted anew")))
    layer = MOVES[move](layer)
    x = torch.randn(5, 72, dtype=layer.get_base_layer().weight.dtype)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_a_mask_moved_within_inference_mode_can_be_trained_with() -> None:
    layer = values_layer(random_mask(48, 72, 0.1))
    buffer = layer.lora_mask["default"]
    with torch.inference_mode():
        buffer._apply(lambda tensor: tensor.clone())
    assert buffer.mask.words is buffer.words
    assert not buffer.words.is_inference()
    x: Tensor = torch.randn(5, 72, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
