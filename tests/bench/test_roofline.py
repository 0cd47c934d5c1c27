"""The roofline model against counts made by hand, and against the ratios that the specification states."""

import itertools
from dataclasses import replace

import pytest
import torch

from bench import model, roofline
from bench.gpu_tables import MASKS, linear_cost, occupancy
from bench.harness import ROOT
from bench.masked_layer import KEPT, REFILLED, Mask, Provider
from bench.results_file import Results
from bench.roofline import CHIPS, Kernel
from bench.shapes import FLUX1, MODELS, SD15, SDXL, Linear, batched
from fade_kernels import choices

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
    names = ["x (W, D)ᵀ", "dY (W, D)", "factor gradients", "their partial sums"]
    assert [kernel.name for kernel in full.kernels("training")] == names
    # 100 tiles of 128 x 128, T in 2 parts: each leaves 16 x (128 + 128) numbers in fp32, which are read once more.
    partials = 2 * 100 * 4 * 16 * 256
    assert roofline.splits(LAYER, CHIP) == 2
    assert full.backward[1].bytes == 2 * X + mask + 2 * 16 * 2560 + partials
    assert full.backward[2].bytes == partials + 4 * 16 * 2560
    assert empty.backward[1].bytes == 2 * X + mask + 2 * 16 * 2560


def test_one_product_by_hand():
    mask, factors = 1280 * 1280 / 8, 2 * 16 * 2560
    kept, refilled = (roofline.one_product(LAYER, 16, 1.0, CHIP, kept=kept) for kept in (True, False))
    assert kept.forward[0].bytes == 2 * W + mask + factors
    assert [kernel.launches for kernel in kept.kernels("training")] == [0, 1, 1, 1, 1]
    assert kept.flops() == 3 * GEMM + 2 * 1280 * 1280 * 16 + 4 * 1280 * 1280 * 16
    assert [k.name for k in refilled.backward[:2]] == ["W + D", "dY (W + D)"]
    assert refilled.flops() == kept.flops() + 2 * 1280 * 1280 * 16
    # What was just made is read from the cache, what was kept is not.
    assert refilled.forward[1].warm == (W,) and kept.forward[1].warm == ()
    wide = roofline.scratch(LAYER, 16, 1.0, CHIP)
    assert wide.forward[1].bytes == 2 * (2 * X + W) and wide.forward[1].unit == "fp32"
    assert wide.backward[2].unit == "fp32"


def test_gather_by_hand():
    gather = roofline.gather(LAYER, 16, 0.01)
    nnz = 16384
    # Values of the delta are made in both passes; 128 blocks of 32 rows leave a partial sum each.
    assert gather.flops() == pytest.approx(2 * GEMM + 3 * 2 * 4096 * nnz + 8 * 16 * nnz)
    assert gather.backward[5].bytes == 8 * 128 * nnz
    # The product is left in fp32, the delta added to it there, and the sum rounded once.
    assert gather.forward[0].bytes == X + W + 2 * X
    assert gather.forward[2].bytes == 8 * nnz + X + 4 * X
    assert gather.forward[3].bytes == 2 * X + X


def test_lower_bound_by_hand():
    bound = roofline.lower_bound(LAYER)
    assert bound.forward == roofline.frozen(LAYER).forward
    assert bound.flops() == 3 * GEMM and bound.backward[0].bytes == 3 * X + W
    assert roofline.lower_bound(LAYER, 0.01).flops() == pytest.approx(2.01 * GEMM)


@pytest.mark.parametrize(("mode", "stated"), [(model.FIRST, (1.34, 1.42, 1.49)), (model.SECOND, (1.07, 1.01, 1.01))])
def test_lower_bounds_in_units_of_the_frozen_layer(mode, stated):
    found = [model.seconds(m, mode, CHIP) / model.seconds(m, model.BASE, CHIP) for m in (SD15, SDXL, FLUX1)]
    assert found == pytest.approx(stated, abs=0.01)


def test_no_path_undercuts_the_lower_bound():
    for m in MODELS:
        least = model.seconds(m, model.FIRST, CHIP)
        for mode in model.SUMMARY:
            if mode.ours and "1 %" not in mode.name and "tiles" not in mode.name:
                assert model.seconds(m, mode, CHIP) >= least, (m.name, mode.name)


def test_splits_are_those_of_the_kernel():
    split = pytest.importorskip("fade_kernels.triton_kernels.split")
    kernel = pytest.importorskip("fade_kernels.triton_kernels.masked_lora_factor_gradients")
    for t, n, k in itertools.product((1, 77, 616, 4096, 32768), (320, 1280, 3072), (320, 768, 3072)):
        tiles = -(-n // 128) * -(-k // 128)
        found = split.split_rows(t, 64, 64, tiles, CHIP.multiprocessors, kernel.MOST_SPLITS)
        assert roofline.splits(Linear(t, n, k, False, 1), CHIP) == found.count, (t, n, k)


def test_seconds_take_the_longer_of_memory_and_arithmetic():
    assert Kernel("", 0.77e15, 1).seconds(CHIP) == pytest.approx(1 + 2.5e-6)
    assert Kernel("", 1, 4.3e12).seconds(CHIP) == pytest.approx(1 + 2.5e-6)
    assert Kernel("", 0.77e15, 1, ours=True).seconds(CHIP) == pytest.approx(1 / 0.85 + 2.5e-6)
    assert Kernel("", 0.77e15, 4 * 4.3e12).seconds(CHIP) == pytest.approx(4 + 2.5e-6)
    assert Kernel("", 0, 4.3e12, launches=0).seconds(CHIP) == pytest.approx(1)


def test_what_was_just_written_is_read_from_the_cache_where_it_fits():
    def seconds(*warm):
        return Kernel("", 0, 100e6, launches=0, warm=warm).seconds(CHIP)

    assert seconds(30e6) == pytest.approx(70e6 / 4.3e12 + 30e6 / 6.5e12)
    assert seconds(41e6) == seconds() == pytest.approx(100e6 / 4.3e12)
    slow = replace(CHIP, cache_bytes=0)
    assert roofline.peft(LAYER, 16).seconds(slow) > 1.05 * roofline.peft(LAYER, 16).seconds(CHIP)


def test_selection_and_accumulation_by_hand():
    assert roofline.selection(8000).bytes("forward") == 4 * 4 * 8000 + 1000
    assert roofline.accumulate(1000, 10, None).bytes("forward") == 10 * 1000
    loop = roofline.accumulate(1000, 10, foreach=False)
    assert (len(loop.forward), loop.bytes("forward")) == (20, pytest.approx(14 * 1000))


def test_ratios_that_the_specification_states():
    for path, values in model.stated_ratios(CHIP).items():
        assert values == pytest.approx(model.STATED[path], rel=0.05), path


def test_gradients_of_one_path_beside_products_of_another():
    fused, gather = roofline.fused(LAYER, 16, 1.0, CHIP), roofline.gather(LAYER, 16, 0.01)
    both = roofline.combined(fused, gather)
    assert both.forward == fused.forward
    assert [k.name for k in both.backward] == ["dY (W, D)", "dYᵀ X sampled", "its partial sums", "dA, dB"]
    assert roofline.combined(gather, fused).backward == (*gather.backward[:4], *fused.backward[1:])


def test_ours_costs_what_would_be_chosen():
    def names(mask: str, tokens: int, regime: str = "auto") -> list[str]:
        layer = Linear(tokens, 3072, 3072, bias=False, count=1)
        return [kernel.name for kernel in linear_cost(Provider("ours", mask, regime), layer, CHIP).kernels("training")]

    tiles, library = ["factor gradients", "their partial sums"], ["dYᵀ X", "dA, dB"]
    assert names("random 10 %", 64) == names("tiles 10 %", 8192) == ["x (W, D)ᵀ", "dY (W, D)", *tiles]
    assert names("random 1 %", 8192) == ["x (W, D)ᵀ", "dY (W, D)", *library]
    assert names("random 1 %", 8192, "gather")[:3] == ["x Wᵀ", "values of D", "y += x Dᵀ"]
    assert names("random 10 %", 8192, KEPT) == ["W + D", "x (W + D)ᵀ", "dY (W + D)", *library]
    assert names("random 10 %", 8192, REFILLED) == ["W + D", "x (W + D)ᵀ", "W + D", "dY (W + D)", *library]


# Where one product overtakes the fused kernel: its weight is read, written and read again, which the tokens must repay;
# here in both passes, as where it is refilled.
@pytest.mark.parametrize(
    ("tokens", "occupancy", "mode"),
    [
        (64, 1.0, "exact"), (2048, 1.0, "one-product"), (32768, 1.0, "one-product"),
        (128, 0.5, "exact"), (4096, 0.5, "one-product"),
        (256, 0.1, "exact"), (16384, 0.1, "one-product"),
        (256, 0.02, "exact"), (32768, 0.02, "one-product"),
    ],
)  # fmt: skip
def test_training_mode_is_the_models_choice(tokens, occupancy, mode):
    for rows, columns in ((1280, 768), (1280, 1280), (3072, 3072)):
        layer = Linear(tokens, rows, columns, False, 1)
        seconds = {
            "exact": roofline.fused(layer, 16, occupancy, CHIP).seconds(CHIP),
            "one-product": roofline.one_product(layer, 16, occupancy, CHIP, kept=False).seconds(CHIP),
        }
        assert seconds[mode] == min(seconds.values())
        chosen = choices.choose_training_mode(torch.bfloat16, tokens, rows, columns, 0.1 * occupancy, occupancy)
        assert chosen == mode, (rows, columns, seconds)


def test_the_training_mode_is_what_an_h100_measured_to_be_the_faster():
    results = Results.load(ROOT / "bench" / "results" / "gpu.json")
    for m, mask in itertools.product((SD15, SDXL, FLUX1), MASKS[:3]):
        rows = {row["row"]: row["cells"] for row in results.table(f"linear / {m.name} / attention / training")["rows"]}
        for layer in batched(m.attention, m.batch):
            seconds = {
                mode: rows[str(layer)][Provider("ours", mask.name, regime).name]["median"]
                for mode, regime in (("exact", "auto"), ("one-product", KEPT))
            }
            sizes = (layer.tokens, layer.out_features, layer.in_features)
            chosen = choices.choose_training_mode(torch.bfloat16, *sizes, mask.keep, occupancy(mask))
            assert seconds[chosen] <= 1.25 * min(seconds.values()), (m.name, str(layer), mask, seconds)


def test_nothing_is_rounded_where_an_element_has_32_bits_or_no_bit_is_set():
    assert choices.choose_training_mode(torch.float32, 4096, 1280, 1280, 0.1, 1.0) == "exact"
    assert choices.choose_training_mode(torch.float64, 4096, 1280, 1280, 0.1, 1.0) == "exact"
    assert choices.choose_training_mode(torch.bfloat16, 4096, 1280, 1280, 0.0, 0.0) == "exact"


def test_occupancy_of_masks():
    assert occupancy(Mask(0.1)) == pytest.approx(1.0)
    assert occupancy(Mask(0.1, 64)) == pytest.approx(0.1)
    assert occupancy(Mask(0.1, 32)) == pytest.approx(1 - 0.9**4)
