"""The solved overwrite: tokens at aligned positions, equations against a direct minimisation, the selection against
random masks and exhaustive search."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from transformers import CLIPTokenizer

import fade
import fade.closed_form
import fade.unlearning
from fade.adapter_file import read_adapter_file
from fade.backbones import backbone_for
from fade.backbones.families import PROJECTIONS
from fade.base_model import target_layers
from fade.cli import main
from fade.closed_form import (
    NormalEquations,
    TextPairs,
    TextPrompts,
    TokenStatistics,
    align,
    balanced,
    normal_equations,
    refitted,
    residual,
    select,
    solution,
    solve,
    token_statistics,
)
from fade.conditioning import Conditioning, EncodedPrompts
from fade.config import Config
from fade.digitcanvas.bundled import MODEL as DIGITCANVAS
from fade.errors import FadeError
from fade.report import where_it_sits
from fade_kernels import BitMask, scatter_masked_

from .conftest import same_bits, tiny_pipeline, weights


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
        (left + 2.0 * changed + equations.shift * delta.square().sum()).backward()
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


def test_refitting_keeps_what_values_do_to_the_forget_tokens_and_leaves_the_others() -> None:
    """The minimum of Σ w ‖(Δ − Δ') x_f‖² + λ mean ‖Δ x_r‖² + μ ‖Δ‖² on the masks, Δ' being the values given."""
    equations, layers, tokens = random_equations(11)
    generator = torch.Generator().manual_seed(12)
    masks = {n: BitMask.pack(torch.rand(m.weight.shape, generator=generator) < 0.5) for n, m in layers.items()}
    given = {name: torch.randn(mask.count, generator=generator) for name, mask in masks.items()}
    fitted = refitted(equations, masks, given)
    forget, _, weights, kept = tokens
    for name, mask in masks.items():
        delta, trained = (
            scatter_masked_(torch.zeros(mask.shape, dtype=torch.float64), values[name].double(), mask)
            for values in (fitted, given)
        )

        def cost(delta: torch.Tensor, trained: torch.Tensor = trained) -> torch.Tensor:
            undone = (weights * (forget @ (delta - trained).T).square().sum(1)).sum()
            return undone + 2.0 * (kept @ delta.T).square().sum(1).mean() + equations.shift * delta.square().sum()

        delta.requires_grad_(True)
        cost(delta).backward()
        assert float(delta.grad[mask.unpack()].abs().max()) < 1e-4 * float(delta.grad.abs().max())
        assert float((kept @ delta.detach().T).norm()) < float((kept @ trained.T).norm())


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


def test_the_weight_is_found_that_changes_so_much_and_no_more() -> None:
    for seed, change in ((4, 0.05), (5, 0.01), (6, 0.002)):
        equations, layers, _ = random_equations(seed, columns=20)
        generator = torch.Generator().manual_seed(seed)
        masks = {n: BitMask.pack(torch.rand(m.weight.shape, generator=generator) < 0.3) for n, m in layers.items()}
        found = balanced(equations, masks, change)
        assert residual(found, masks, solve(found, masks)).retain == pytest.approx(change, rel=0.1)
        same = random_equations(seed, columns=20, retain=found.retain)[0]
        assert torch.allclose(found.gram, same.gram)
        assert torch.equal(found.rhs, same.rhs)


@pytest.mark.parametrize(("rows", "entries"), [(250, 256), (1000, 1)], ids=["many", "long"])
def test_the_weight_is_found_on_some_of_many_rows(monkeypatch: pytest.MonkeyPatch, rows: int, entries: int) -> None:
    """Every sixth, where there are six times the rows, or entries in them, that one λ needs."""
    monkeypatch.setattr("fade.closed_form.ROWS_TO_BALANCE", rows)
    monkeypatch.setattr("fade.closed_form.MOST_PER_ROW", entries)
    equations, layers, _ = random_equations(seed := 40, rows=(333, 1400), columns=20)
    generator = torch.Generator().manual_seed(seed)
    masks = {n: BitMask.pack(torch.rand(m.weight.shape, generator=generator) < 0.3) for n, m in layers.items()}
    looked_at = []

    def seen(equations: NormalEquations, *given: Any) -> Any:
        looked_at.append(len(equations.rhs))
        return residual(equations, *given)

    monkeypatch.setattr("fade.closed_form.residual", seen)
    found = balanced(equations, masks, 0.01)
    step = 6 if entries > 1 else sum(mask.count for mask in masks.values()) // rows
    assert set(looked_at) == {-(-333 // step) + -(-1400 // step)}
    assert found.rows == equations.rows and found.rhs is equations.rhs
    assert residual(found, masks, solve(found, masks)).retain == pytest.approx(0.01, rel=0.25)


def test_the_change_follows_what_is_left() -> None:
    equations, layers, _ = random_equations(30, columns=20)
    generator = torch.Generator().manual_seed(31)
    masks = {n: BitMask.pack(torch.rand(m.weight.shape, generator=generator) < 0.3) for n, m in layers.items()}
    held = balanced(equations, masks, 0.01)
    left = residual(held, masks, solve(held, masks)).forget
    for wanted, times in ((left, 1.0), (left / 1.5, 1.5), (left / 3, 2.0), (left * 1.5, 1 / 1.5), (left * 3, 0.5)):
        found = balanced(equations, masks, 0.01, wanted)
        assert residual(found, masks, solve(found, masks)).retain == pytest.approx(0.01 * times, rel=0.15)


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


def test_no_row_outgrows_what_is_solved_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one for which all that is left to gain is in it."""
    monkeypatch.setattr("fade.closed_form.MOST_PER_ROW", 10)
    equations, _, _ = random_equations(10, rows=(20, 30), columns=40)
    equations.rhs[:6] *= 100
    largest, solved = [], fade.closed_form._solved

    def seen(equations: NormalEquations, mask: BitMask, with_prices: bool) -> Any:
        largest.append(int(mask.row_counts.max()))
        return solved(equations, mask, with_prices)

    monkeypatch.setattr("fade.closed_form._solved", seen)
    chosen = select(equations, 100)
    assert max(largest) == 10 and len(largest) > 7  # grown again at least once
    assert sum(mask.count for mask in chosen.masks.values()) == 100


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


def constrained(
    seed: int, protected: int, **shape: object
) -> tuple[NormalEquations, dict[str, nn.Module], torch.Tensor]:
    """Random equations with so many protected directions; and the directions, [K, P]."""
    equations, layers, _ = random_equations(seed, **shape)
    generator = torch.Generator().manual_seed(seed + 100)
    columns = equations.gram.shape[0]
    basis = torch.linalg.qr(torch.randn(columns, protected, generator=generator, dtype=torch.float64)).Q
    shifted = dataclasses.replace(equations, protected=basis)
    return shifted.weighed(equations.retain), layers, basis


def test_the_constrained_solution_is_the_optimum_that_leaves_the_protected_alone() -> None:
    """Against the multipliers' system of each row, solved densely, on random masks with rows of every size."""
    equations, layers, basis = constrained(21, 3, rows=(17, 8), columns=14)
    generator = torch.Generator().manual_seed(22)
    density = torch.rand(25, 1, generator=generator)
    mask = (torch.rand(25, 14, generator=generator) < density) | (torch.arange(25) == 3)[:, None]
    mask[4] = False
    masks = dict(zip(layers, map(BitMask.pack, mask.split([17, 8])), strict=True))
    found = fade.closed_form._constrained(equations, BitMask.pack(mask))
    rows = found.split(mask.sum(1).tolist())
    plain = equations.gram - fade.closed_form.PENALTY * float(
        (equations.forget_gram + equations.retain * equations.retain_gram).diagonal().mean()
    ) * (basis @ basis.T)  # fmt: skip
    solved = 0
    for row, values in enumerate(rows):
        support = mask[row].nonzero()[:, 0]
        if len(support) <= 3:
            assert not values.any()
            continue
        solved += 1
        edge = basis[support]
        system = torch.cat(
            [torch.cat([plain[support][:, support], edge], 1), torch.cat([edge.T, torch.zeros(3, 3).double()], 1)]
        )
        answer = torch.linalg.solve(system, torch.cat([equations.rhs[row, support], torch.zeros(3).double()]))
        assert torch.allclose(values, answer[: len(support)], rtol=1e-9, atol=1e-12 * float(values.abs().max()))
        assert float((values @ edge).norm()) < 1e-13 * float(values.norm())
    assert solved > 10
    rounded = torch.cat([solve(equations, masks)[name] for name in layers])
    assert torch.equal(rounded, found.float())


def test_the_selection_knows_of_the_protected() -> None:
    """Rows that it chooses have more entries than there are constraints; at random most would be lost."""
    equations, layers, _ = constrained(23, 4, rows=(30, 30), columns=16)
    chosen = select(equations, 150)
    values = solve(equations, chosen.masks)
    counts = torch.cat([mask.row_counts for mask in chosen.masks.values()])
    assert int(counts[counts > 4].sum()) > 0.8 * 150
    random = torch.zeros(60 * 16, dtype=torch.bool)
    random[torch.randperm(960, generator=torch.Generator().manual_seed(24))[:150]] = True
    control = dict(zip(layers, map(BitMask.pack, random.reshape(60, 16).split([30, 30])), strict=True))
    assert residual(equations, chosen.masks, values).forget < residual(
        equations, control, solve(equations, control)
    ).forget - 0.1  # fmt: skip


def test_more_constraints_than_positions_are_refused() -> None:
    equations, layers, _ = constrained(25, 6, columns=12)
    mask = torch.rand(12, 12, generator=torch.Generator().manual_seed(26)).argsort(1) < 5
    masks = dict(zip(layers, map(BitMask.pack, mask.split([7, 5])), strict=True))
    with pytest.raises(FadeError, match="6 independent tokens, and no row .*more than 5 entries .*or raise keep"):
        solve(equations, masks)


def test_statistics_of_mapped_tokens() -> None:
    generator = torch.Generator().manual_seed(27)
    forget, surrogate, kept = (torch.randn(20, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    weights = torch.rand(20, 1, generator=generator, dtype=torch.float64)
    change = torch.randn(6, 6, generator=generator, dtype=torch.float64)

    def statistics(x: torch.Tensor) -> TokenStatistics:
        d = surrogate - x
        return TokenStatistics(x.T @ (weights * x), d.T @ (weights * x), d.T @ (weights * d), kept.T @ kept)

    found, expected = statistics(forget).mapped(change), statistics(forget @ change.T)
    for field in dataclasses.fields(expected):
        assert torch.allclose(getattr(found, field.name), getattr(expected, field.name)), field.name


def test_the_revival_gives_back_what_the_edit_took() -> None:
    """Edited layers answer T x as the unedited answer x, better than any x' near it."""
    equations, layers, tokens = random_equations(28, rows=(20, 30), columns=10)
    masks = select(equations, 200).masks
    values = solve(equations, masks)
    revived = tokens[0] @ fade.closed_form.revival(layers, equations, masks, values).T

    def distance(x: torch.Tensor) -> float:
        total = 0.0
        for (name, layer), energy in zip(layers.items(), equations.energy / equations.weights, strict=True):
            weight = layer.weight.detach().double()
            edited = weight + scatter_masked_(torch.zeros_like(weight), values[name].double(), masks[name])
            total += float((x @ edited.T - tokens[0] @ weight.T).square().sum() / energy)
        return total

    assert distance(revived) < 0.3 * distance(tokens[0])
    generator = torch.Generator().manual_seed(29)
    for _ in range(5):
        step = 0.02 * torch.randn(revived.shape, generator=generator, dtype=torch.float64) * revived.std()
        assert distance(revived) < distance(revived + step)


# --- on a pipeline ---------------------------------------------------------------------------------------------------


def test_the_layers_that_read_the_prompt(pipeline: StableDiffusionPipeline) -> None:
    backbone = backbone_for(pipeline)
    readers = backbone.text_layers()["prompt"]
    assert readers and all(name.endswith((".attn2.to_k", ".attn2.to_v")) for name in readers)
    layers = target_layers(pipeline.unet)
    assert readers == {name for name, m in layers.items() if name.endswith(("attn2.to_k", "attn2.to_v"))}
    embeddings = backbone.encode_prompts(["cat"])
    assert all(layers[name].weight.shape[1] == backbone.text_states("prompt", embeddings).shape[-1] for name in readers)


def test_statistics_weigh_prompts_by_how_far_apart_they_are(pipeline: StableDiffusionPipeline) -> None:
    backbone = backbone_for(pipeline)
    pairs = [("cat", "dog"), ("a picture of cat", "a picture of dog")]
    phrased = [("the cat", "the dog"), ("see cat", "see dog"), ("cat here", "dog here")]
    read = TextPrompts([TextPairs(pairs, phrased)], ["a house", ""], ["the dog"], ["a horse"])
    assert read.all() == (
        "cat", "dog", "a picture of cat", "a picture of dog", "the cat", "the dog", "see cat", "see dog", "cat here",
        "dog here", "a house", "", "a horse",
    )  # fmt: skip
    encoded = EncodedPrompts(read.all(), backbone.encode_prompts(read.all()))
    found = token_statistics(backbone, "prompt", read, encoded)
    embeddings = {text: encoded[text]["prompt_embeds"][0] for text in read.all()}
    x = [embeddings[forget].double() for forget, _ in (*pairs, *phrased)]
    d = [embeddings[surrogate].double() - embeddings[forget].double() for forget, surrogate in (*pairs, *phrased)]
    # The three phrasings together count as much as the two pairs.
    apart = [part.square().sum() / count for part, count in zip(d, [2, 2, 3, 3, 3], strict=True)]
    weights = [a / sum(apart) / len(x[0]) for a in apart]
    for name, left, right in (("forget", x, x), ("change", d, x), ("difference", d, d)):
        expected = sum(w * a.T @ b for w, a, b in zip(weights, left, right, strict=True))
        assert torch.allclose(getattr(found, name), expected)
    kept = torch.cat([embeddings[p] for p in ("a house", "", "the dog", "the dog")]).double()
    assert torch.allclose(found.retain, kept.T @ kept / len(kept))


def test_a_surrogate_that_is_read_alike_is_refused(pipeline: StableDiffusionPipeline) -> None:
    backbone = backbone_for(pipeline)
    states, empty = backbone.encode_prompts(["cat", ""])["prompt_embeds"]
    alike = Conditioning({"prompt_embeds": torch.stack([states, states * (1 + 1e-7), empty])})
    read = TextPrompts([TextPairs([("cat", "dog")])], [""])
    with pytest.raises(FadeError, match=r"reads the concept and its surrogate alike \('cat', 'dog'\)"):
        token_statistics(backbone, "prompt", read, EncodedPrompts(["cat", "dog", ""], alike))


TEMPLATES = ("{}", "an image of {}", "a picture of {}")
WORDS = {"forget": "cat", "surrogate": "dog", "templates": TEMPLATES, "retain": ["a house", ""], "progress": False}


def solved(quick: Config, **changes: object) -> Config:
    return quick.replace(overwrite__method="closed-form", **changes).without_ignored()


def answers(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    """What the denoiser makes of concept, surrogate and a retain prompt."""
    backbone = backbone_for(pipeline)
    noised = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([50, 300, 600, 900])
    read = backbone.encode_prompts(["an image of cat", "an image of dog", "a house"])
    with torch.no_grad():
        return torch.stack([backbone.predict(noised, steps, read.rows(i).repeat(4)) for i in range(3)])


def test_a_solved_run_needs_no_latents_and_changes_only_the_text_path(
    pipeline: StableDiffusionPipeline, quick: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = type(backbone_for(pipeline))
    for name in ("sample_latents", "encode_images", "predict"):
        monkeypatch.setattr(backbone, name, lambda *_, **__: pytest.fail("the denoiser or the VAE was used"))
    before = weights(pipeline)
    config = solved(quick, closed_form__retain_change=0.01, closed_form__left=None)
    adapter = fade.unlearn(pipeline, **WORDS, config=config, output=tmp_path / "out")
    assert same_bits(weights(pipeline), before)
    assert adapter.enabled
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter.safetensors", "run.json"]
    run = adapter.run
    assert run["path"] == "text path" and run["saliency"] == "closed-form"
    assert run["selected"] == int(0.05 * run["total"])
    assert run["total"] == sum(m.weight.numel() for m in target_layers(pipeline.unet, PROJECTIONS).values())
    assert all(".attn2.to_" in layer["name"] for layer in run["layers"] if layer["selected"])
    assert run["losses"] == {"forget": [], "retain": []}
    assert 0 < run["residual"]["forget"] < 1 and run["residual"]["retain_weight"] > 0
    assert 0 < run["residual"]["retain"] < 0.015
    file = read_adapter_file(tmp_path / "out" / "adapter.safetensors")
    assert file.metadata["form"] == "values" and file.metadata["run"]["path"] == "text path"
    again = fade.unlearn(pipeline, **WORDS, config=config, name="again")
    for first, second in zip(adapter.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)


def test_the_solved_edit_puts_the_surrogate_in_the_concepts_place(
    pipeline: StableDiffusionPipeline, quick: Config
) -> None:
    before = answers(pipeline)
    config = solved(
        quick, locate__granularity="none", closed_form__retain_weight=1.0, closed_form__phrasings=False
    )  # fmt: skip
    fade.unlearn(pipeline, **WORDS, config=config)
    after = answers(pipeline)
    gap = (before[0] - before[1]).norm()
    assert (after[0] - before[1]).norm() < 0.2 * gap
    assert (after[2] - before[2]).norm() < 0.2 * gap


@pytest.mark.parametrize("saliency", ["random", "denoising"])
def test_a_mask_of_another_saliency_is_solved_on(
    pipeline: StableDiffusionPipeline, quick: Config, saliency: str
) -> None:
    adapter = fade.unlearn(pipeline, **WORDS, config=solved(quick, locate__saliency=saliency))
    run = adapter.run
    assert (run["path"], run["saliency"]) == ("text path", saliency)
    assert run["selected"] == int(0.05 * run["total"])
    chosen = fade.unlearn(pipeline, **WORDS, config=solved(quick), name="chosen")
    assert chosen.run["residual"]["forget"] < run["residual"]["forget"] < 1


def test_training_goes_on_from_what_is_solved(tokenizer: CLIPTokenizer, quick: Config, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tokenizer)
    start = fade.unlearn(pipeline, **WORDS, config=solved(quick), name="start")
    config = quick.replace(overwrite__method="both", overwrite__learning_rate=1e-6).without_ignored()
    adapter = fade.unlearn(pipeline, **WORDS, config=config, output=tmp_path / "out")
    assert len(adapter.run["losses"]["forget"]) == 6
    assert adapter.run["path"] == "text path" and "residual" in adapter.run
    for before, after in zip(start.parameters(), adapter.parameters(), strict=True):
        assert not torch.equal(before, after)
        assert torch.allclose(before, after, atol=1e-5)
    assert (tmp_path / "out" / "latents.safetensors").exists()


def test_an_adapter_that_acts_beside_others_is_refitted(tokenizer: CLIPTokenizer, quick: Config) -> None:
    """It changes the concept's tokens more, beside those of what must stay, than training does."""
    pipeline = tiny_pipeline(tokenizer)
    config = quick.replace(overwrite__method="both", overwrite__learning_rate=0.05, locate__keep=0.3).without_ignored()
    other = fade.unlearn(
        pipeline, "horse", "car", templates=TEMPLATES, retain=["a tree"], config=solved(quick), progress=False,
        name="other",
    )  # fmt: skip
    other.disable()
    prompts = ["an image of cat", "a house", "an image of horse"]
    before, found = keys_and_values(pipeline, prompts), {}
    for refit in (False, None, True):
        beside = [] if refit else [other]
        own = config.replace(closed_form__refit=refit)
        adapter = fade.unlearn(pipeline, **WORDS, config=own, beside=beside)
        assert adapter.metadata["config"]["closed_form"]["refit"] == (refit is not False)
        found[refit] = changes(before, keys_and_values(pipeline, prompts))
        adapter.remove()
    trained, fitted = found[False], found[None]
    for kept in (1, 2):  # what must stay, and what is the other's
        assert float(fitted[kept]) < 0.7 * float(trained[kept])
        assert float(fitted[0] / fitted[kept]) > 1.05 * float(trained[0] / trained[kept])
    assert not torch.equal(found[True], fitted)  # alone, it has more room
    with pytest.raises(FadeError, match="refit would be ignored: the method closed-form does not train"):
        solved(quick, closed_form__refit=True)


def test_other_parts_wait_elsewhere_where_something_is_trained_or_room_is_short(
    pipeline: StableDiffusionPipeline, quick: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To move them takes longer than a closed form, so they stay where there is room for it beside them."""
    moved, move = [], type(backbone_for(pipeline)).only_denoiser_on_device

    def watched(backbone: Any) -> Any:
        moved.append(1)
        return move(backbone)

    monkeypatch.setattr(type(backbone_for(pipeline)), "only_denoiser_on_device", watched)
    for config, room, expected in (
        (solved(quick), 0.8, 0), (solved(quick), 0.0, 1),
        (quick.replace(overwrite__method="both").without_ignored(), 0.8, 1),
    ):  # fmt: skip
        monkeypatch.setattr(fade.unlearning, "ROOM", room)
        moved.clear()
        fade.unlearn(pipeline, **WORDS, config=config).remove()
        assert len(moved) == expected


@pytest.mark.parametrize("refit", [None, True])
def test_both_resumes_where_it_was(
    tokenizer: CLIPTokenizer, quick: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refit: bool | None
) -> None:
    config = quick.replace(overwrite__method="both", closed_form__refit=refit).without_ignored()
    whole = fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config)
    steps, step = [], torch.optim.AdamW.step

    def interrupted(self, *args, **kwargs):
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(1)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=config, output=tmp_path / "out")
    resumed = fade.unlearn(
        tiny_pipeline(tokenizer), **WORDS, config=config, output=tmp_path / "out", resume=True
    )  # fmt: skip
    for first, second in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second)


def test_an_interrupted_solve_is_done_again(
    pipeline: StableDiffusionPipeline, quick: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fade.unlearning, "solution", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fade.unlearn(pipeline, **WORDS, config=solved(quick), output=tmp_path / "out")
    assert not getattr(pipeline.unet, "peft_config", {})
    with pytest.raises(FadeError, match="in use; pass --overwrite to replace it or --resume"):
        fade.unlearn(pipeline, **WORDS, config=solved(quick), output=tmp_path / "out")
    with pytest.raises(FadeError, match=r"another config\.overwrite\.method"):
        fade.unlearn(pipeline, **WORDS, config=quick, output=tmp_path / "out", resume=True)
    resumed = fade.unlearn(pipeline, **WORDS, config=solved(quick), output=tmp_path / "out", resume=True)
    fresh = fade.unlearn(pipeline, **WORDS, config=solved(quick), name="fresh")
    for first, second in zip(resumed.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(first, second)


def test_bad_input_costs_nothing(pipeline: StableDiffusionPipeline, quick: Config, tmp_path: Path) -> None:
    few = {**WORDS, "templates": ["{}"], "retain": [""]}  # fewer tokens than columns
    for config, message in (
        (solved(quick, locate__targets=["attn1.to_q", "proj_in"]), "reads? the prompt alone, and there is none among"),
        (solved(quick, locate__keep=1e-6), "keep 1e-06 selects none of"),
        (
            solved(quick, closed_form__damping=0.0, closed_form__phrasings=False, locate__granularity="none"),
            "no solution .*singular .* row 0",
        ),
    ):
        with pytest.raises(FadeError, match=message):
            fade.unlearn(pipeline, **few, config=config, output=tmp_path / "out")
        assert not getattr(pipeline.unet, "peft_config", {})
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    for changes, message in (
        ({"overwrite__parameters": "factors"}, "solves the masked weights themselves"),
        ({"data__forget_images": "photos"}, "forget_images would be ignored: the method closed-form reads prompts"),
        ({"closed_form__retain_weight": 0.0}, "closed_form.retain_weight must be a positive"),
        ({"closed_form__retain_change": 1.0}, "closed_form.retain_change must be between 0 and 1"),
        ({"closed_form__damping": -1e-4}, "closed_form.damping must be finite and not negative"),
        ({"closed_form__left": 0.0}, r"closed_form.left must be in \(0, 1\], not 0.0"),
        ({"closed_form__hardening": 4}, "closed_form.hardening must be from 0 to 3 rounds, not 4"),
        ({"closed_form__protect": ["a house", " "]}, "closed_form.protect holds an empty prompt"),
        ({"closed_form__protect": ["a house"], "overwrite__method": "both"}, "protect would not hold: the method both"),
        ({"closed_form__hardening": 1, "overwrite__method": "distillation"}, "hardening would be ignored: the method"),
    ):
        with pytest.raises(FadeError, match=message):
            solved(quick).replace(**changes)
    with pytest.warns(UserWarning, match="1 of 2 retain prompts name 'cat'"):
        fade.unlearn(pipeline, **{**WORDS, "retain": ["a cat", "a house"]}, config=solved(quick))


def keys_and_values(pipeline: StableDiffusionPipeline, prompts: list[str]) -> dict[str, torch.Tensor]:
    """What the layers that read the prompt make of prompts, adapters included: [prompts, tokens, N] each."""
    backbone = backbone_for(pipeline)
    states = backbone.text_states("prompt", backbone.encode_prompts(prompts))
    with torch.no_grad():
        return {name: pipeline.unet.get_submodule(name)(states) for name in backbone.text_layers()["prompt"]}


def changes(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> torch.Tensor:
    """The largest relative change of any layer, for each prompt."""
    ratios = [(after[n] - before[n]).flatten(1).norm(dim=1) / before[n].flatten(1).norm(dim=1) for n in before]
    return torch.stack(ratios).amax(0)


def test_protected_prompts_mean_exactly_what_they_meant(pipeline: StableDiffusionPipeline, quick: Config) -> None:
    prompts = ["an image of cat", "two horses", "the cat sat", "a house"]
    before = keys_and_values(pipeline, prompts)
    config = solved(quick, closed_form__protect=prompts[1:2])
    adapter = fade.unlearn(pipeline, **WORDS, config=config)
    changed = changes(before, keys_and_values(pipeline, prompts))
    assert changed[1] < 1e-5 and changed[0] > 0.05
    adapter.remove()
    adapter = fade.unlearn(pipeline, **WORDS, config=solved(quick))
    assert changes(before, keys_and_values(pipeline, prompts))[1] > 1e-3
    adapter.remove()
    # Five prompts of 16 tokens are more tokens than there are columns.
    for protect, keep, message in (
        (["two horses", "six horses", "many horses", "no horses", "ten horses"], 0.5, "the concept's are combinations"),
        (prompts[1:3], 0.001, "independent tokens, and no row .* may change, so that nothing can; protect fewer, or"),
    ):
        config = solved(quick, closed_form__protect=protect, locate__keep=keep)
        with pytest.raises(FadeError, match=message):
            fade.unlearn(pipeline, **WORDS, config=config)
        assert not getattr(pipeline.unet, "peft_config", {})


def test_a_protected_word_of_digitcanvas_is_its_caption() -> None:
    alone = DIGITCANVAS.alone
    assert alone("eight") == "the digit eight" and alone("neon") == "a digit in neon style"
    assert alone("the digit two in ink style") == "the digit two in ink style"


def test_hardening_takes_back_what_revives_the_concept(pipeline: StableDiffusionPipeline, quick: Config) -> None:
    """The tokens that revive the concept under the plain edit do so less under the hardened one."""
    backbone = backbone_for(pipeline)
    layers = {name: pipeline.unet.get_submodule(name) for name in sorted(backbone.text_layers()["prompt"])}
    read = TextPrompts(
        [TextPairs([("an image of cat", "an image of dog"), ("cat", "dog")])], ["a house", "", "two horses"]
    )
    encoded = EncodedPrompts(read.all(), backbone.encode_prompts(read.all()))
    statistics = token_statistics(backbone, "prompt", read, encoded)
    equations = normal_equations(layers, statistics, 1.0, 1e-4)
    masks = select(equations, 6000).masks
    x, wanted = (encoded[f"an image of {word}"]["prompt_embeds"][0].double() for word in ("cat", "dog"))

    def left(values: dict[str, torch.Tensor], tokens: torch.Tensor) -> float:
        """How far the edited values of the tokens are from the surrogate's, over how far the concept's were."""
        apart = total = 0.0
        for name, layer in layers.items():
            weight = layer.weight.detach().double()
            delta = scatter_masked_(torch.zeros_like(weight), values[name].double(), masks[name])
            if name.endswith("to_v"):
                apart += float((tokens @ (weight + delta).T - wanted @ weight.T).square().sum())
                total += float(((x - wanted) @ weight.T).square().sum())
        return apart / total

    _, plain = solution(layers, statistics, equations, masks, None)
    revived = x @ fade.closed_form.revival(layers, equations, masks, plain).T
    _, hardened = solution(layers, statistics, equations, masks, None, hardening=1)
    assert left(hardened, revived) < 0.9 * left(plain, revived)
    first = fade.unlearn(pipeline, **WORDS, config=solved(quick), name="first")
    second = fade.unlearn(pipeline, **WORDS, config=solved(quick, closed_form__hardening=1), name="second")
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_phrasings_are_read_unless_they_are_off(pipeline: StableDiffusionPipeline, quick: Config) -> None:
    """In words that are no template the concept means more of the surrogate, and its neighbour more of itself."""
    prompts = ["the cat", "the dog", "a drawing of dog"]
    before = keys_and_values(pipeline, prompts)
    values = [name for name in before if name.endswith("to_v")]

    def gap(config: Config) -> float:
        adapter = fade.unlearn(pipeline, **{**WORDS, "templates": ["an image of {}"]}, config=config)
        after = keys_and_values(pipeline, prompts)
        adapter.remove()
        return sum(float((after[n][0] - before[n][1]).norm() / (before[n][0] - before[n][1]).norm()) for n in values)

    assert gap(solved(quick)) < gap(solved(quick, closed_form__phrasings=False))


def test_every_record_says_where_the_edit_sits(pipeline: StableDiffusionPipeline, quick: Config) -> None:
    for targets, place in (("attn2.to_k", "text path"), ("attn1.to_k", "denoiser"), ("to_k", "both")):
        config = quick.replace(locate__targets=[targets], overwrite__steps=1, locate__keep=0.5)
        adapter = fade.unlearn(pipeline, **WORDS, config=config, name=f"f{len(place)}")
        assert adapter.run["path"] == place
        assert where_it_sits(place).startswith("the ")
    assert where_it_sits(None) == "a place that its file does not tell"


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["unlearn", "digitcanvas", "--forget", "three", "--surrogate", "eight", "--method", "closed-form", "-q"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "3,686 of 368,640 target weights changed" in told and "the edit sits in the text path" in told
    assert json.loads((tmp_path / "out" / "run.json").read_text())["run"]["path"] == "text path"
    assert main(["inspect", str(tmp_path / "out" / "adapter.safetensors")]) == 0
    assert "the text path" in capsys.readouterr().out
    options = ["--protect", "eight", "--protect", "a digit in ink style", "--hardening", "1"]
    assert main([*arguments, "--output", str(tmp_path / "three"), *options]) == 0
    settings = json.loads((tmp_path / "three" / "run.json").read_text())["config"]["closed_form"]
    assert settings["protect"] == ["eight", "a digit in ink style"] and settings["hardening"] == 1
    capsys.readouterr()
    assert main([*arguments, "--output", str(tmp_path / "two"), "--target", "to_q"]) == 2
    failed = capsys.readouterr().err
    assert failed.startswith("error: the closed form changes layers") and failed.count("\n") == 1
    assert not (tmp_path / "two").exists()
