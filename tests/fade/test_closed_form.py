"""The solved overwrite: tokens at aligned positions, equations against a direct minimisation, the selection against
random masks and exhaustive search."""

import itertools

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from fade.backbones import backbone_for
from fade.base_model import target_layers
from fade.closed_form import (
    NormalEquations,
    TokenStatistics,
    align,
    normal_equations,
    residual,
    select,
    solve,
    token_statistics,
)
from fade.errors import FadeError
from fade_kernels import BitMask, scatter_masked_


@pytest.mark.parametrize(
    ("forget", "surrogate", "expected"),
    [
        # begin 0, end 9; 6 positions
        ([0, 5, 9], [0, 6, 9], [0, 1, 2, 3, 4, 5]),
        ([0, 1, 5, 2, 9], [0, 1, 6, 2, 9], [0, 1, 2, 3, 4, 5]),
        ([0, 5, 9], [0, 6, 7, 9], [0, 2, 3, 4, 4, 5]),  # the later of two in the middle; padding where both have it
        ([0, 5, 6, 9], [0, 7, 9], [0, 1, 1, 2, 4, 5]),
        ([0, 5, 6, 7, 2, 9], [0, 8, 4, 2, 9], [0, 1, 2, 2, 3, 4]),
        ([0, 3, 5, 9], [0, 3, 9], [0, 1, 2, 2, 4, 5]),  # the surrogate has nothing there: what follows answers
        ([0, 5, 9], [0, 3, 5, 9], [0, 2, 3, 4, 4, 5]),
        ([0, 5, 5, 9], [0, 5, 5, 5, 9], [0, 1, 2, 4, 5, 5]),
        ([0, 1, 2, 3, 4, 5], [0, 6, 9], [0, 1, 1, 2, 2, 2]),  # cut off at the end
    ],
)
def test_alignment(forget: list[int], surrogate: list[int], expected: list[int]) -> None:
    assert align(forget, surrogate, 6) == expected


def test_alignment_keeps_order_and_stays_in_range() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        sizes = torch.randint(2, 12, (2,), generator=generator).tolist()
        forget, surrogate = ([0, *torch.randint(1, 4, (n,), generator=generator).tolist(), 9] for n in sizes)
        length = 16
        answer = align(forget, surrogate, length)
        assert len(answer) == length and answer[0] == 0 and answer[-1] == length - 1
        assert all(a <= b for a, b in itertools.pairwise(answer))
        assert answer[len(forget) - 1] == len(surrogate) - 1  # end answers end
        assert align(forget, forget, length) == list(range(length))


def random_equations(
    seed: int, rows: tuple[int, ...] = (7, 5), columns: int = 12, retain: float = 2.0, damping: float = 1e-3
) -> tuple[NormalEquations, dict[str, nn.Module], list[torch.Tensor]]:
    """Of random layers and tokens, and the tokens: forget, difference, weights, retain."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)

    def tokens(n: int) -> torch.Tensor:
        return torch.randn(n, columns, generator=generator, dtype=torch.float64) @ mixing

    forget, difference, kept = tokens(9), tokens(9), tokens(40)
    weights = torch.rand(9, generator=generator, dtype=torch.float64)
    weights /= weights.sum()
    layers = {}
    for index, count in enumerate(rows):
        layers[f"layer{index}"] = layer = nn.Linear(columns, count, bias=False)
        with torch.no_grad():
            layer.weight.copy_((index + 1) * torch.randn(count, columns, generator=generator))
    weighted = weights[:, None] * forget
    statistics = TokenStatistics(
        forget.T @ weighted, difference.T @ weighted, difference.T @ (weights[:, None] * difference),
        kept.T @ kept / len(kept),
    )  # fmt: skip
    return normal_equations(layers, statistics, retain, damping), layers, [forget, difference, weights, kept]


def parts(
    delta: torch.Tensor, layer: nn.Module, tokens: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the edit leaves undone, what it changes on the retain tokens, and what is wanted, as the formula says it."""
    forget, difference, weights, kept = tokens
    wanted = difference @ layer.weight.double().T
    undone = (weights * (forget @ delta.T - wanted).square().sum(1)).sum()
    return undone, (kept @ delta.T).square().sum(1).mean(), (weights * wanted.square().sum(1)).sum()


def test_the_solution_minimises_the_objective_on_its_mask() -> None:
    equations, layers, tokens = random_equations(1)
    generator = torch.Generator().manual_seed(2)
    masks = {n: BitMask.pack(torch.rand(m.weight.shape, generator=generator) < 0.4) for n, m in layers.items()}
    values = solve(equations, masks)
    undone = wanted = kept = 0.0
    for (name, layer), energy in zip(layers.items(), equations.energy.tolist(), strict=True):
        mask = masks[name].unpack()
        delta = torch.zeros(mask.shape, dtype=torch.float64)
        scatter_masked_(delta, values[name].double(), masks[name])
        delta.requires_grad_(True)
        left, changed, whole = parts(delta, layer, tokens)
        (left + 2.0 * changed + equations.damping * delta.square().sum()).backward()
        assert float(delta.grad[mask].abs().max()) < 1e-4 * float(delta.grad.abs().max())
        outputs = tokens[3] @ layer.weight.detach().double().T
        assert float(outputs.square().sum(1).mean()) == pytest.approx(energy, rel=1e-4)
        undone, wanted, kept = (
            undone + left.item() / energy,
            wanted + whole.item() / energy,
            kept + changed.item() / energy,
        )
    found = residual(equations, masks, values)
    assert found.forget == pytest.approx(undone / wanted, rel=1e-4)
    assert found.retain == pytest.approx(kept / 2, rel=1e-4)


def objective(equations: NormalEquations, masks: dict[str, BitMask]) -> float:
    """Less what every mask has gained, relative to energy: lower is better."""
    values, gained = solve(equations, masks), 0.0
    for name, rhs, energy in zip(
        equations.rows, equations.by_layer(equations.rhs), equations.energy.tolist(), strict=True
    ):
        gained += float((rhs[masks[name].unpack()] * values[name].double()).sum()) / energy
    return -gained


def test_the_selection_is_close_to_the_best_there_is() -> None:
    """Of a row of ten, four entries: every choice is tried. Columns are strongly correlated, as tokens' are."""
    shares = []
    for seed in range(12):
        equations, _, _ = random_equations(seed, rows=(1,), columns=10)
        choices = [
            objective(equations, {"layer0": BitMask.pack(torch.zeros(1, 10).index_fill(1, torch.tensor(c), 1) > 0)})
            for c in itertools.combinations(range(10), 4)
        ]
        shares.append(objective(equations, select(equations, 4).masks) / min(choices))
    assert sum(shares) / len(shares) > 0.93, shares


@pytest.mark.parametrize("columns", [12, 300])
def test_the_selection_spends_its_budget_where_it_counts(columns: int) -> None:
    equations, layers, _ = random_equations(7, rows=(20, 30), columns=columns)
    for units in (1, 37, 50 * columns // 10, 50 * columns - 3, 50 * columns):
        chosen = select(equations, units)
        assert sum(mask.count for mask in chosen.masks.values()) == units
        assert {name: mask.shape for name, mask in chosen.masks.items()} == {
            name: tuple(layer.weight.shape) for name, layer in layers.items()
        }
    chosen = select(equations, 5 * columns)
    order = torch.randperm(50 * columns, generator=torch.Generator().manual_seed(8))
    mask = torch.zeros(50 * columns, dtype=torch.bool).index_fill(0, order[: 5 * columns], True)
    control = dict(zip(layers, map(BitMask.pack, mask.reshape(50, columns).split([20, 30])), strict=True))
    assert objective(equations, chosen.masks) < 1.2 * objective(equations, control)


@pytest.mark.parametrize("granularity", ["tile", "channel", "module"])
def test_the_selection_of_whole_units(granularity: str) -> None:
    equations, _, _ = random_equations(9, rows=(8, 12), columns=12)
    masks = {name: mask.unpack() for name, mask in select(equations, 2, granularity, tile=4).masks.items()}
    stacked = torch.cat(list(masks.values()))
    expected = {"tile": 32, "module": 240}.get(granularity)
    if expected is None:  # two rows or columns, of either layer
        assert 1 <= sum((m.all(0).sum() + m.all(1).sum()).item() for m in masks.values()) <= 3
    else:
        assert int(stacked.sum()) == expected


def test_a_system_without_a_solution_says_so() -> None:
    layers = {"layer": nn.Linear(12, 3, bias=False)}
    few = torch.randn(2, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    product = few.T @ few
    statistics = TokenStatistics(product, product.clone(), product, product)
    assert select(normal_equations(layers, statistics, 1.0, 1e-4), 30).masks
    with pytest.raises(FadeError, match=r"no solution .*singular on the support of row \d+.*raise closed_form.damping"):
        select(normal_equations(layers, statistics, 1.0, 0.0), 30)
    nothing = TokenStatistics(*(torch.zeros(12, 12, dtype=torch.float64) for _ in range(4)))
    with pytest.raises(FadeError, match="some entry is 0 in every token.*raise closed_form.damping"):
        normal_equations(layers, nothing, 1.0, 0.0)


# --- on a pipeline ---------------------------------------------------------------------------------------------------


def test_the_layers_that_read_the_prompt(pipeline: StableDiffusionPipeline) -> None:
    backbone = backbone_for(pipeline)
    readers = backbone.text_layers()
    assert readers and all(name.endswith((".attn2.to_k", ".attn2.to_v")) for name in readers)
    layers = target_layers(pipeline.unet)
    assert readers == {name for name, m in layers.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    embeddings = backbone.encode_prompts(["cat"])
    assert all(layers[name].weight.shape[1] == backbone.text_states(embeddings).shape[-1] for name in readers)


def test_statistics_weigh_prompts_by_how_far_apart_they_are(pipeline: StableDiffusionPipeline) -> None:
    backbone = backbone_for(pipeline)
    pairs = [("cat", "dog"), ("a picture of cat", "a picture of dog")]
    prompts = [*pairs[0], *pairs[1], "a house", ""]
    embeddings = dict(zip(prompts, backbone.encode_prompts(prompts), strict=True))
    found = token_statistics(backbone, pairs, ["a house", ""], embeddings)
    x = [embeddings[forget].double() for forget, _ in pairs]
    d = [embeddings[surrogate].double() - embeddings[forget].double() for forget, surrogate in pairs]
    apart = [part.square().sum() for part in d]
    weights = [a / sum(apart) / len(x[0]) for a in apart]
    for name, left, right in (("forget", x, x), ("change", d, x), ("difference", d, d)):
        expected = sum(w * a.T @ b for w, a, b in zip(weights, left, right, strict=True))
        assert torch.allclose(getattr(found, name), expected)
    kept = torch.cat([embeddings["a house"], embeddings[""]]).double()
    assert torch.allclose(found.retain, kept.T @ kept / len(kept))


def test_a_surrogate_that_is_read_alike_is_refused(pipeline: StableDiffusionPipeline) -> None:
    backbone = backbone_for(pipeline)
    states = backbone.encode_prompts(["cat"])[0]
    embeddings = {"cat": states, "dog": states * (1 + 1e-7), "": backbone.encode_prompts([""])[0]}
    with pytest.raises(FadeError, match=r"reads the concept and its surrogate alike \('cat', 'dog'\)"):
        token_statistics(backbone, [("cat", "dog")], [""], embeddings)
