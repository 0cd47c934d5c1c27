"""The formulas of methods that solve instead of train, each against an independent definition in float64."""

import pytest
import torch

from fade.methods.embeddings import low_rank
from fade.methods.loku import EPSILON, fila
from fade.methods.speed import most_moved, null_space, speed_factors
from fade.methods.ssd import dampening_factors
from fade.methods.uce import uce_factors


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "dampening", "exponent"), [(10.0, 1.0, 1.0), (2.0, 3.0, 1.0), (1.0, 0.5, 2.0)])
def test_dampening_is_the_papers_loop_over_weights(alpha: float, dampening: float, exponent: float) -> None:
    forget, retain = normal(7, 9, seed=0).square() * 4, normal(7, 9, seed=1).square()
    forget[0, :3], retain[0, 1:4] = 0.0, 0.0  # of no importance to the one, to the other, and to both
    expected = torch.ones_like(forget)
    for i in range(7):
        for j in range(9):
            f, r = forget[i, j].item(), retain[i, j].item()
            if f > alpha * r:
                expected[i, j] = min((dampening * r / f) ** exponent, 1.0)
    found = dampening_factors(forget, retain, alpha, dampening, exponent)
    assert 0 < int((expected < 1).sum()) < expected.numel()
    torch.testing.assert_close(found, expected)


def test_uce_is_the_papers_weight() -> None:
    """W of the paper's closed form, and the gradient of its objective, which is 0 there."""
    concept, guide, kept, weight = (normal(rows, 8, seed=seed) for seed, rows in enumerate((3, 3, 5, 6)))
    erase, preserve, damping = 0.7, 1.3, 0.5
    answers = (erase * weight @ guide.T @ concept) + (preserve * weight @ kept.T @ kept) + damping * weight
    gram = erase * concept.T @ concept + preserve * kept.T @ kept + damping * torch.eye(8, dtype=torch.float64)
    expected = answers @ torch.linalg.inv(gram)

    difference, reading = uce_factors(concept, guide, kept, erase, preserve, damping)
    assert difference.shape == reading.shape == (3, 8)
    found = weight + (weight @ difference.T) @ reading
    torch.testing.assert_close(found, expected)

    solved = found.requires_grad_(True)
    objective = (
        erase * (concept @ solved.T - guide @ weight.T).square().sum()
        + preserve * (kept @ (solved - weight).T).square().sum()
        + damping * (solved - weight).square().sum()
    )
    (gradient,) = torch.autograd.grad(objective, solved)
    assert gradient.abs().max() < 1e-10


@pytest.mark.parametrize(("rows", "rank"), [(3, 3), (7, 4), (30, 9)])
def test_a_product_has_factors_of_its_rank(rows: int, rank: int) -> None:
    """Also of more rows than its rank, of nearly the same rows, and of sizes far apart."""
    mixing = normal(rows, rank, seed=0)
    difference = mixing @ normal(rank, 12, seed=1)
    reading = 1e3 * mixing @ normal(rank, 12, seed=2) + 1e-9 * normal(rows, 12, seed=3)
    left, right = low_rank(difference, reading)
    assert left.shape == (12, rank) and right.shape == (rank, 12)
    expected = difference.T @ reading
    torch.testing.assert_close(left @ right, expected, rtol=0.0, atol=1e-7 * expected.abs().max().item())
    torch.testing.assert_close(right @ right.T, torch.eye(rank, dtype=torch.float64))
    rounded = (left.float() @ right.float()).double()
    assert (rounded - expected).abs().max() < 1e-6 * expected.abs().max()


def test_the_null_space_holds_what_retained_embeddings_hardly_reach() -> None:
    basis, _ = torch.linalg.qr(normal(10, 10, seed=0))
    large, small = normal(400, 4, seed=1) @ basis[:, :4].T, 1e-3 * normal(400, 6, seed=2) @ basis[:, 4:].T
    projector = null_space(large + small, 0.05)
    torch.testing.assert_close(projector, basis[:, 4:] @ basis[:, 4:].T, atol=1e-3, rtol=0.0)
    torch.testing.assert_close(null_space(large + small, 1e-9), torch.zeros(10, 10, dtype=torch.float64))


def test_speed_is_the_constrained_least_squares() -> None:
    """Against the optimality conditions of all unknowns at once: a basis of the null space, and multipliers."""
    rows, width, free = 4, 9, 6
    basis, _ = torch.linalg.qr(normal(width, free, seed=0))
    projector = basis @ basis.T
    concept, guide, fixed, weight = (normal(n, width, seed=n) for n in (3, 13, 2, rows))
    guide, damping = guide[:3], 0.4

    # Δ = Z basisᵀ: min ‖Z bᵀ C − W (C* − C)‖² + ρ ‖Z‖² with Z bᵀ C₂ = 0.
    c, held = concept @ basis, fixed @ basis
    zero = torch.zeros(2, 2, dtype=torch.float64)
    kkt = torch.cat(
        [
            torch.cat([c.T @ c + damping * torch.eye(free, dtype=torch.float64), held.T], dim=1),
            torch.cat([held, zero], dim=1),
        ]
    )
    wanted = (guide - concept) @ weight.T
    right = torch.cat([c.T @ wanted, torch.zeros(2, rows, dtype=torch.float64)])
    expected = torch.linalg.solve(kkt, right)[:free].T @ basis.T

    difference, reading = speed_factors(concept, guide, fixed, projector, damping, 1e-12)
    found = (weight @ difference.T) @ reading
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(found @ fixed.T, torch.zeros(rows, 2, dtype=torch.float64), atol=1e-8, rtol=0.0)
    torch.testing.assert_close(found @ projector, found)


def test_retained_embeddings_that_matter_are_those_the_plain_edit_moves() -> None:
    concept, guide, kept, weight = (normal(n, 6, seed=n) for n in (2, 12, 20, 5))
    guide = guide[:2]
    edit = weight @ (guide - concept).T @ concept @ torch.linalg.inv(concept.T @ concept + 0.1 * torch.eye(6).double())
    moved = torch.stack([(edit @ r).norm() for r in kept])
    found = most_moved(weight, concept, guide, kept, 0.1)
    assert torch.equal(found, moved > moved.mean()) and 0 < int(found.sum()) < 20


def test_fila_is_the_weighted_low_rank_part() -> None:
    weight, rank, scale = normal(12, 10, seed=0), 3, 2.0
    forget, retain = normal(12, 10, seed=1).square(), normal(12, 10, seed=2).square()
    state = torch.random.get_rng_state()
    a, b = fila(weight, forget, retain, rank, scale)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert a.shape == (rank, 10) and b.shape == (12, rank)

    importance = [
        sum((forget[j, k] / retain.mean()) / (retain[j, k] / retain.mean() + EPSILON) for k in range(10)) ** 0.5
        for j in range(12)
    ]
    rho = torch.stack(importance)
    u, s, v = torch.linalg.svd(torch.diag(rho) @ weight)
    best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    torch.testing.assert_close(scale * b @ a, torch.diag(1 / (rho + EPSILON)) @ best, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(a.norm(dim=1), (s[:rank] / scale).sqrt())  # both factors have the singular value's root
