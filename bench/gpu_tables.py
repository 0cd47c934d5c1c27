"""The tables of a GPU run, as plans: ceilings, linear layers, convolutions, saliency, accumulation, selection.

Every plan also runs on the CPU in toy sizes (`TOY`), so that it is tested where no GPU is; and the roofline model fills
the same tables (`python -m bench model`), so that measurement and prediction share their rows and columns.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from bench import roofline, saliency, selection
from bench.harness import device_memory
from bench.masked_layer import (
    FROZEN,
    KEPT,
    MERGED,
    NAIVE_ONE,
    NAIVE_TWO,
    ONE_PRODUCT,
    PEFT,
    PEFT_AUTOCAST,
    PEFT_DEFAULT,
    RANK,
    Mask,
    MaskedLayer,
    Provider,
    worst_error,
)
from bench.plans import REPEATS, Plan, Prepared, Row
from bench.roofline import CHIPS, Chip, Cost
from bench.shapes import MODELS, SD15, SD35, Conv2d, Linear, Model, batched
from fade_kernels import accumulate_gradient_magnitude_, choices, select_top_fraction
from fade_kernels.mask_facts import MaskFacts

SCALE = 2.0  # alpha / rank; not 1, so that nobody can leave the multiplication out
KERNEL_TILE = 64  # tiles that the kernels skip when they are empty, and those of the tile masks here
TEN, ONE = Mask(0.1), Mask(0.01)
MASKS = (TEN, ONE, Mask(0.1, KERNEL_TILE), Mask(0.2, KERNEL_TILE))
EXACT = ("gather", "tile")  # regimes that a 16-bit linear has on CUDA; "tile" is the fused kernel there
FORCED = (*EXACT, *ONE_PRODUCT)
BASELINES = (FROZEN, PEFT, PEFT_DEFAULT, PEFT_AUTOCAST, NAIVE_TWO, NAIVE_ONE)
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
KEEP = 0.1  # of selection
OVERHEAD = 0.6  # seconds that a row costs beside its timed work: setting up, comparing, first calls


@dataclass(frozen=True)
class Workload:
    """What is measured, so that tests can ask for little.

    Attributes:
        models: whose linear layers are measured, at each model's own batch.
        conv: convolutions of one image, and the batch.
        levels: of the saliency pass: (width, tokens, transformer blocks).
        selection_shapes: accumulators, seen as matrices; repeated until there are `values`.
        forward_layers: of the fused forward against the library's on a merged weight.
        copied: bytes, and `side`: of the square product, that find the chip's ceilings.
    """

    models: tuple[Model, ...]
    conv: tuple[Conv2d, ...]
    conv_batch: int
    levels: tuple[tuple[int, int, int], ...]
    saliency_batch: int
    selection_shapes: tuple[tuple[int, int], ...]
    values: int
    forward_layers: tuple[Linear, ...]
    copied: int
    side: int
    dtype: torch.dtype = torch.bfloat16


def weight_shapes(model: Model) -> tuple[tuple[int, int], ...]:
    """The weights of a model's layers as matrices, once for every layer (calls and layers are one in these models)."""
    layers = [*model.attention, *model.other, *(conv.as_linear() for conv in model.conv)]
    return tuple((x.out_features, x.in_features) for x in layers for _ in range(x.count))


FULL = Workload(
    models=MODELS,
    conv=SD15.conv,
    conv_batch=SD15.batch,
    levels=saliency.LEVELS,
    saliency_batch=SD15.batch,
    selection_shapes=weight_shapes(SD15),
    values=860_000_000,
    forward_layers=tuple(
        Linear(4096, n, k, bias=False, count=1)
        for n, k in ((640, 640), (1280, 1280), (5120, 1280), (1280, 5120), (3072, 3072), (12288, 3072))
    ),
    copied=2**32,
    side=8192,
)

_TINY = (Linear(5, 32, 48, bias=False, count=2), Linear(3, 40, 32, bias=True, count=1))
TOY = Workload(
    models=(replace(SD15, batch=2, attention=_TINY, other=_TINY[1:], conv=()),),
    conv=(Conv2d(1, 8, 16, 6, 3, 1, 2), Conv2d(1, 8, 8, 6, 1, 1, 1), Conv2d(1, 8, 8, 6, 3, 2, 1)),
    conv_batch=2,
    levels=((32, 8, 1), (48, 4, 1)),
    saliency_batch=2,
    selection_shapes=((32, 32), (48, 32)),
    values=10_000,
    forward_layers=_TINY,
    copied=2**16,
    side=64,
)
"""Sizes for tests of this program."""


# --- linear layers and convolutions ----------------------------------------------------------------------------------


def linear_providers(forced: bool, merged: bool) -> list[Provider]:
    """The competitors of a linear layer; `forced`: ours also in every regime; `merged`: and the merged weight."""
    regimes = ("auto", *FORCED) if forced else ("auto", KEPT)
    ours = [Provider("ours", mask.name, regime) for regime in regimes for mask in MASKS]
    if forced:
        ours.append(Provider("ours", TEN.name, factors=torch.float32))
    return [*BASELINES, *([MERGED] if merged else []), *ours]


def conv_providers() -> list[Provider]:
    baselines = (FROZEN, PEFT, PEFT_DEFAULT, NAIVE_TWO, NAIVE_ONE)
    return [*baselines, *(Provider("ours", mask.name, regime) for regime in ("auto", KEPT) for mask in MASKS[:3])]


def occupancy(mask: Mask, tile: int = KERNEL_TILE) -> float:
    """Expected share of tile x tile tiles that hold any entry."""
    independent = max(1, -(-tile // mask.tile)) ** 2 if mask.tile else tile * tile
    return 1 - (1 - mask.keep) ** independent


def linear_cost(provider: Provider, layer: Linear, chip: Chip) -> Cost:
    """What the roofline model expects a provider to do for a linear layer."""
    if provider in (FROZEN, MERGED):
        return roofline.frozen(layer)
    simple = {PEFT: roofline.peft, PEFT_DEFAULT: roofline.peft_default, PEFT_AUTOCAST: roofline.peft_autocast}
    if provider in simple:
        return simple[provider](layer, RANK)
    if provider in (NAIVE_TWO, NAIVE_ONE):
        return roofline.naive_masked(layer, RANK, provider == NAIVE_TWO)
    mask = next(mask for mask in MASKS if mask.name == provider.mask)

    def cost(path: str) -> Cost:
        if path == "gather":
            return roofline.gather(layer, RANK, mask.keep)
        if path in ONE_PRODUCT:
            return roofline.one_product(layer, RANK, occupancy(mask), chip, kept=path == KEPT)
        if path == "library":
            return roofline.from_library(layer, RANK)
        return roofline.fused(layer, RANK, occupancy(mask), chip)

    if provider.regime in EXACT:
        return cost(provider.regime)
    # What would be chosen: a path for the products, and one for the factors' gradients.
    facts = MaskFacts(0, mask.keep, occupancy(mask))
    sizes = (layer.tokens, layer.out_features, layer.in_features)
    gradients = choices.choose_factor_gradients(torch.bfloat16, *sizes, facts)
    if provider.regime == "auto":
        path = choices.choose_linear(torch.bfloat16, *sizes, facts, tf32=False)
    else:
        path = provider.regime
    return roofline.combined(cost(path), cost(gradients))


def _masked_row(
    layer: Linear | Conv2d, providers: Sequence[Provider], mode: str, dtype: torch.dtype, masks: Sequence[Mask] = MASKS
) -> Row:
    def prepare(device: torch.device) -> Prepared:
        problem = MaskedLayer(layer, masks, dtype=dtype, device=device, scale=SCALE)
        by_name = {provider.name: provider for provider in providers}
        expected: dict[object, list[Tensor]] = {}

        def error(name: str, result: list[Tensor]) -> float:
            provider = by_name[name]
            # One reference for all that should agree, and only the latest is kept.
            key = provider.kind in ("frozen", "merged"), provider.kind.startswith("PEFT"), provider.mask
            if key not in expected:
                expected.clear()
                expected[key] = problem.expected(provider, mode, torch.float32)
            return worst_error(result, expected[key])

        calls = {name: lambda p=provider: problem.step(p, mode) for name, provider in by_name.items()}
        return Prepared(calls, error, TOLERANCES[dtype])

    matrix = layer if isinstance(layer, Linear) else layer.as_linear()

    # The model has no account of what convolutions read again.
    modelled = isinstance(layer, Linear) or layer.kernel == 1

    def costs(chip: Chip) -> Mapping[str, Cost]:
        if not modelled:
            return {}
        return {provider.name: linear_cost(provider, matrix, chip) for provider in providers}

    def bound(chip: Chip) -> Cost | None:
        return roofline.lower_bound(matrix) if modelled else None

    chip = CHIPS["h200"]
    step = sum(linear_cost(provider, matrix, chip).seconds(chip, mode) for provider in providers)
    return Row(str(layer), layer.count, prepare, costs, bound, weight=OVERHEAD + (REPEATS + 5) * step)


def linear_plan(
    model: Model, group: str, layers: Iterable[Linear], mode: str, dtype: torch.dtype, forced: bool
) -> Plan:
    providers = linear_providers(forced, merged=mode == "forward")
    what = "forward + backward" if mode == "training" else "forward"
    return Plan(
        name=f"linear / {model.name} / {group} / {mode}",
        title=f"{model.name}, {group} linears, {what}: batch {model.batch}, {model.pixels} px, rank {RANK}, "
        f"{str(dtype).removeprefix('torch.')}",
        mode=mode,
        base=FROZEN.name,
        rows=[_masked_row(layer, providers, mode, dtype) for layer in layers],
    )


def forward_plan(work: Workload) -> Plan:
    providers = [MERGED, PEFT, NAIVE_ONE, *(Provider("ours", m.name) for m in MASKS)]
    providers += [Provider("ours", TEN.name, regime) for regime in FORCED]
    providers.append(Provider("ours", MASKS[2].name, "tile"))
    rows = [_masked_row(layer, providers, "forward", work.dtype) for layer in work.forward_layers]
    return Plan("forward at 4096", "forward at T = 4096 against a merged weight", "forward", MERGED.name, rows)


def conv_plan(work: Workload, kernel: int) -> Plan:
    chosen = [replace(c, images=work.conv_batch) for c in work.conv if c.kernel == kernel]
    rows = [_masked_row(c, conv_providers(), "training", work.dtype, MASKS[:3]) for c in chosen]
    title = f"SD 1.5, {kernel}x{kernel} convolutions, forward + backward: batch {work.conv_batch}, rank {RANK}"
    return Plan(f"conv {kernel}x{kernel} / SD 1.5", title, "training", FROZEN.name, rows)


# --- saliency, accumulation, selection -------------------------------------------------------------------------------


def _prepare_saliency(work: Workload, divide_tokens: int) -> Callable[[torch.device], Prepared]:
    def prepare(device: torch.device) -> Prepared:
        settings = {"levels": work.levels, "batch": work.saliency_batch, "dtype": work.dtype, "device": device}
        plain, streamed = (saliency.Pass(divide_tokens, **settings) for _ in range(2))
        once: dict[str, Tensor] = {}  # accumulators of the plain form after its first pass

        def error(name: str, _: object) -> float:
            if name == "kept_then_added":
                once.update({n: accumulator.clone() for n, accumulator in plain.accumulators.items()})
            if name != "streamed":
                return 0.0
            # The plain form adds gradients that were rounded to the layer's dtype.
            return worst_error([streamed.accumulators[n] for n in once], list(once.values()))

        def memory(name: str) -> int | None:
            """Of a first pass, so that accumulators count."""
            return device_memory(device, getattr(saliency.Pass(divide_tokens, **settings), name))

        calls = {form: getattr(streamed if form == "streamed" else plain, form) for form in saliency.FORMS}
        return Prepared(calls, error, 5 * TOLERANCES[work.dtype], memory)

    return prepare


def saliency_pass_plan(work: Workload) -> Plan:
    """A whole pass over a network of the attention projections (bench/saliency.py)."""

    def costs(chip: Chip) -> Mapping[str, Cost]:
        layers = [
            Linear(work.saliency_batch * tokens, rows, columns, bias=False, count=count * number)
            for width, image, count in work.levels
            for rows, columns, tokens, number in (
                (width, width, image, 6), (width, saliency.TEXT[1], saliency.TEXT[0], 2),
            )
        ]  # fmt: skip
        forms = (
            roofline.frozen,
            roofline.weight_gradient_kept,
            roofline.weight_gradient_added,
            roofline.saliency_streamed,
        )
        return {name: _together(form, layers) for name, form in zip(saliency.FORMS, forms, strict=True)}

    title = f"saliency pass over SD 1.5's attention projections alone, batch {work.saliency_batch}"
    row = Row("pass", 1, _prepare_saliency(work, 1), costs, weight=4.0)
    return Plan("saliency pass", title, "training", "kept", [row])


def saliency_memory_plan(work: Workload) -> Plan:
    """The same pass over so few tokens that what it takes is gradients and accumulators, not activations."""
    row = Row("pass", 1, _prepare_saliency(work, saliency.FEW_TOKENS), weight=2.0)
    return Plan("saliency memory", saliency.MEMORY_TITLE, "training", "kept_then_added", [row])


def _together(form: Callable[[Linear], Cost], layers: Iterable[Linear]) -> Cost:
    """One cost of all layers, each as often as it occurs."""
    forward, backward = [], []
    for layer in layers:
        cost = form(layer)
        forward += layer.count * list(cost.forward)
        backward += layer.count * list(cost.backward)
    return Cost(tuple(forward), tuple(backward))


def linear_gradient_plan(work: Workload) -> Plan:
    """One layer's S += |dY^T X| alone."""
    rows = []
    for width, image, count in work.levels:
        for columns, tokens, number in ((width, image, 6), (saliency.TEXT[1], saliency.TEXT[0], 2)):
            layer = Linear(work.saliency_batch * tokens, width, columns, bias=False, count=count * number)

            def prepare(device: torch.device, layer: Linear = layer) -> Prepared:
                size = (layer.out_features, layer.in_features, layer.tokens)
                return Prepared(saliency.layer_candidates(*size, work.dtype, device))

            def costs(chip: Chip, layer: Linear = layer) -> Mapping[str, Cost]:
                skipped = len(roofline.frozen(layer).backward)
                forms = (roofline.weight_gradient_added, roofline.saliency_streamed)
                names = ("matmul + abs().add_", "fade_kernels")
                kernels = (form(layer).backward[skipped:] for form in forms)
                return {name: Cost((), tuple(k)) for name, k in zip(names, kernels, strict=True)}

            rows.append(Row(str(layer), layer.count, prepare, costs))
    title = "weight-gradient magnitude of one linear layer"
    return Plan("linear gradient magnitude", title, "training", "matmul + abs().add_", rows)


def accumulate_plan(work: Workload) -> Plan:
    """S += |g| over all gradients of a model at once."""
    names = ("loop of abs, add_", "foreach abs, add_", "fade_kernels")

    def prepare(device: torch.device) -> Prepared:
        sums = selection.saliency(work.values, work.selection_shapes, device)
        gradients = [torch.randn_like(s).to(work.dtype) for s in sums]

        def loop() -> None:
            for s, g in zip(sums, gradients, strict=True):
                s.add_(g.abs())

        calls = (
            loop,
            lambda: torch._foreach_add_(sums, torch._foreach_abs(gradients)),
            lambda: accumulate_gradient_magnitude_(sums, gradients),
        )
        return Prepared(dict(zip(names, calls, strict=True)))

    def costs(chip: Chip) -> Mapping[str, Cost]:
        tensors = _tensors(work)
        return {
            n: roofline.accumulate(work.values, tensors, f) for n, f in zip(names, (False, True, None), strict=True)
        }

    title = f"S += |g|, {work.values / 1e6:.0f} million values in {_tensors(work)} tensors"
    return Plan("accumulate", title, "forward", "foreach abs, add_", [Row("all", 1, prepare, costs, weight=3.0)])


def _tensors(work: Workload) -> int:
    whole, rest = divmod(work.values, sum(map(prod, work.selection_shapes)))
    return whole * len(work.selection_shapes) + bool(rest)


def selection_plan(work: Workload) -> Plan:
    """The top fraction of all values: ours, and reading everything four times."""
    names = ("read four times", "fade_kernels")

    def prepare(device: torch.device) -> Prepared:
        tensors = selection.saliency(work.values, work.selection_shapes, device)
        # One flat tensor, so that reading is one launch: the floor, not the loop over tensors.
        flat = torch.ones(work.values, device=device).uniform_()
        calls = (lambda: [flat.sum() for _ in range(4)], lambda: select_top_fraction(tensors, KEEP))
        return Prepared(dict(zip(names, calls, strict=True)))

    def costs(chip: Chip) -> Mapping[str, Cost]:
        return {names[0]: roofline.reading(work.values, 4), names[1]: roofline.selection(work.values)}

    return Plan("selection", _selection_title(work), "forward", names[0], [Row("all", 1, prepare, costs, weight=3.0)])


def _selection_title(work: Workload) -> str:
    return f"selection of {100 * KEEP:g} % of {work.values / 1e6:.0f} million values in {_tensors(work)} tensors"


def kth_value_plan(work: Workload) -> Plan:
    """The same against cat + kthvalue, whose threshold must be ours. A table of its own: it takes seconds a call."""
    names = ("cat + kthvalue", "fade_kernels")

    def prepare(device: torch.device) -> Prepared:
        tensors = selection.saliency(work.values, work.selection_shapes, device)
        kept = int(KEEP * sum(t.numel() for t in tensors))

        def error(name: str, result: Any) -> float:
            if name == "cat + kthvalue":
                found["threshold"] = float(result)
            if name != "fade_kernels":
                return 0.0
            count = sum(mask.count for mask in result.masks)
            same = found.get("threshold", result.threshold) == result.threshold and count == kept
            return 0.0 if same else 1.0

        found: dict[str, float] = {}
        calls = (lambda: selection.kth_value(tensors, KEEP), lambda: select_top_fraction(tensors, KEEP))
        return Prepared(dict(zip(names, calls, strict=True)), error)

    row = Row("all", 1, prepare, weight=6.0, repeats=3)
    return Plan("selection, concatenated", _selection_title(work), "forward", names[0], [row])


def ceilings_plan(work: Workload) -> Plan:
    """What the chip does at best here: a copy, and a product on random data by the library."""

    def copy(device: torch.device) -> Prepared:
        source = torch.randn(work.copied // 4, device=device)
        target = torch.empty_like(source)
        return Prepared({"library": lambda: target.copy_(source)})

    def product(device: torch.device) -> Prepared:
        left, right = (torch.randn(work.side, work.side, device=device).to(work.dtype) for _ in range(2))
        return Prepared({"library": lambda: left @ right})

    def copy_costs(chip: Chip) -> Mapping[str, Cost]:
        return {"library": Cost((roofline.Kernel("copy", 0, 2 * work.copied),))}

    def product_costs(chip: Chip) -> Mapping[str, Cost]:
        return {"library": Cost((roofline.gemm("product", work.side, work.side, work.side),))}

    rows = [Row("copy", 1, copy, copy_costs), Row("product", 1, product, product_costs)]
    return Plan("ceilings", "ceilings: a large copy and a large matrix product", "forward", "library", rows)


def measured_chip(table: Mapping[str, Any] | None, chip: Chip, unit: str = "matrix") -> Chip:
    """The chip with the bandwidth and the rate of large products, by `unit`, that the `ceilings` table found."""
    for row in table["rows"] if table else ():
        cell = row["cells"].get("library", {})
        if "median" in cell and "bytes" in cell:
            if row["row"] == "copy":
                chip = replace(chip, bandwidth=cell["bytes"] / cell["median"])
            else:
                chip = replace(chip, **{unit: cell["flops"] / cell["median"]})
    return chip


def plans(work: Workload = FULL) -> list[Plan]:
    """Every table, the most telling ones first."""
    main = [model for model in work.models if model.name != SD35.name]
    rest = [model for model in work.models if model.name == SD35.name]

    def linears(models: Sequence[Model], group: str, mode: str, forced: bool) -> list[Plan]:
        return [
            linear_plan(model, group, batched(getattr(model, group), model.batch), mode, work.dtype, forced)
            for model in models
        ]

    return [
        ceilings_plan(work),
        *linears(main, "attention", "training", forced=True),
        selection_plan(work),
        accumulate_plan(work),
        kth_value_plan(work),
        saliency_pass_plan(work),
        saliency_memory_plan(work),
        linear_gradient_plan(work),
        forward_plan(work),
        *linears(main, "attention", "forward", forced=True),
        conv_plan(work, 3),
        conv_plan(work, 1),
        *linears(main, "other", "training", forced=False),
        *linears(rest, "attention", "training", forced=True),
        *linears(rest, "attention", "forward", forced=True),
        *linears(rest, "other", "training", forced=False),
        *linears(work.models, "other", "forward", forced=False),
    ]
