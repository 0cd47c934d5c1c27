"""The roofline model against counts made by hand, and against the ratios that the specification states."""

import pytest

from bench import model, roofline
from bench.roofline import CHIPS, Kernel
from bench.shapes import Linear

CHIP = CHIPS["h200"]
LAYER = Linear(4096, 1280, 1280, bias=False, count=1)
X, W = 2 * 4096 * 1280, 2 * 1280 * 1280  # bytes of the activations (in and out alike) and of the weight in bf16
GEMM = 2 * 4096 * 1280 * 1280


# Launches and megabytes of the forward pass and of both, GFLOP of both, counted with a dispatcher that watches eager
# PyTorch: the layer of 4096 x 1280 -> 1280 with r = 16.
@pytest.mark.parametrize(
    ("cost", "launches", "megabytes", "gigaflops"),
    [
        (roofline.frozen(LAYER), (1, 2), (24, 48), 26.8),
        (roofline.peft(LAYER, 16), (5, 12), (98, 217), 27.9),
        (roofline.peft_default(LAYER, 16), (7, 17), (224, 501), 27.9),
        (roofline.peft_autocast(LAYER, 16), (9, 20), (161, 344), 27.9),
        (roofline.naive_masked(LAYER, 16, two_products=False), (5, 11), (52, 122), 40.4),
    ],
    ids=["frozen", "PEFT bf16", "PEFT default", "PEFT autocast", "naive masked"],
)
def test_eager_paths(cost, launches, megabytes, gigaflops):
    assert (len(cost.forward), len(cost.kernels("training"))) == launches
    assert (round(cost.bytes("forward") / 1e6), round(cost.bytes() / 1e6)) == pytest.approx(megabytes, abs=1)
    assert cost.flops() / 1e9 == pytest.approx(gigaflops, abs=0.1)


def test_frozen_by_hand():
    cost = roofline.frozen(LAYER)
    assert cost.flops() == 2 * GEMM
    assert cost.bytes() == 2 * (X + W + X)


def test_fused_by_hand():
    full, empty = roofline.fused(LAYER, 16, 1.0, CHIP), roofline.fused(LAYER, 16, 0.0, CHIP)
    mask = 1280 * 1280 / 8
    # Without an occupied tile: the frozen layer's arithmetic, and the mask and the factors on top of its bytes.
    assert empty.flops() == 2 * GEMM
    assert empty.forward[0].bytes == 2 * X + W + mask + 2 * 16 * 2560
    # Full: x Delta^T as well, and each of the 32 blocks of 128 rows makes B A anew.
    assert full.forward[0].flops == 2 * GEMM + 32 * 2 * 1280 * 1280 * 16
    assert full.backward[1].flops == GEMM + 4 * 1280 * 1280 * 16
    assert [kernel.name for kernel in full.kernels("training")] == ["x (W, D)ᵀ", "dY (W, D)", "factor gradients"]


def test_split_whole_scratch_and_gather_by_hand():
    split = roofline.split(LAYER, 16, 0.1, CHIP)
    assert split.forward[0] == roofline.frozen(LAYER).forward[0]
    assert split.forward[1].bytes == pytest.approx(0.4 * 3 * X + 1280 * 1280 / 8 + 2 * 16 * 2560)
    scratch = roofline.scratch(LAYER, 16)
    assert scratch.forward[0].bytes == 2 * W + 1280 * 1280 / 8 + 2 * 16 * 2560
    assert scratch.flops() == 3 * GEMM + 8 * 1280 * 1280 * 16
    whole = roofline.whole(LAYER, 16)
    assert whole.forward[2].bytes == 3 * X + W and whole.forward[1].bytes == W + 1280 * 1280 / 8 + 2 * 16 * 2560
    assert whole.flops() == 5 * GEMM + 8 * 1280 * 1280 * 16
    gather = roofline.gather(LAYER, 16, 0.01)
    nnz = 16384
    # Values of the delta are made in both passes; 128 blocks of 32 rows leave a partial sum each.
    assert gather.flops() == pytest.approx(2 * GEMM + 3 * 2 * 4096 * nnz + 8 * 16 * nnz)
    assert gather.backward[4].bytes == 8 * 128 * nnz
    assert gather.forward[2].bytes == 8 * nnz + 3 * X


def test_seconds_take_the_longer_of_memory_and_arithmetic():
    assert Kernel("", 0.77e15, 1).seconds(CHIP) == pytest.approx(1 + 2.5e-6)
    assert Kernel("", 1, 4.3e12).seconds(CHIP) == pytest.approx(1 + 2.5e-6)
    assert Kernel("", 0.77e15, 1, ours=True).seconds(CHIP) == pytest.approx(1 / 0.85 + 2.5e-6)
    assert Kernel("", 0.77e15, 4 * 4.3e12).seconds(CHIP) == pytest.approx(4 + 2.5e-6)


def test_selection_and_accumulation_by_hand():
    assert roofline.selection(8000).bytes("forward") == 4 * 4 * 8000 + 1000
    assert roofline.accumulate(1000, 10, None).bytes("forward") == 10 * 1000
    loop = roofline.accumulate(1000, 10, foreach=False)
    assert (len(loop.forward), loop.bytes("forward")) == (20, pytest.approx(14 * 1000))


def test_ratios_that_the_specification_states():
    for path, values in model.stated_ratios(CHIP).items():
        assert values == pytest.approx(model.STATED[path], rel=0.05), path


def test_gradients_of_one_path_beside_products_of_another():
    whole, gather = roofline.whole(LAYER, 16), roofline.gather(LAYER, 16, 0.01)
    both = roofline.combined(whole, gather)
    assert both.forward == whole.forward
    assert [k.name for k in both.backward] == ["dY W", "D", "dX += dY D", "dYᵀ X sampled", "its partial sums", "dA, dB"]
    assert roofline.combined(gather, whole).backward == (*gather.backward[:3], whole.backward[-1])


def test_ours_costs_what_the_dispatch_would_choose():
    from bench.gpu_tables import linear_cost
    from bench.masked_layer import Provider

    def names(mask: str, tokens: int) -> list[str]:
        layer = Linear(tokens, 3072, 3072, bias=False, count=1)
        return [kernel.name for kernel in linear_cost(Provider("ours", mask), layer, CHIP).kernels("training")]

    assert names("random 10 %", 64) == ["x (W, D)ᵀ", "dY (W, D)", "factor gradients"]
    assert names("random 10 %", 8192) == ["x Wᵀ", "D", "y += x Dᵀ", "dY W", "D", "dX += dY D", "factor gradients"]
    assert names("random 1 %", 8192)[:3] == ["x Wᵀ", "values of D", "y += x Dᵀ"]
    assert names("random 1 %", 8192)[-1] == "factor gradients"
    assert names("tiles 10 %", 8192) == ["x Wᵀ", "y += x Dᵀ", "dY W", "dX += dY D", "factor gradients"]


def test_occupancy_of_masks():
    from bench.gpu_tables import occupancy
    from bench.masked_layer import Mask

    assert occupancy(Mask(0.1)) == pytest.approx(1.0)
    assert occupancy(Mask(0.1, 64)) == pytest.approx(0.1)
    assert occupancy(Mask(0.1, 32)) == pytest.approx(1 - 0.9**4)
