"""Stage 2 without training: the edit of the layers that read the prompt alone, solved instead of learnt.

A cross-attention layer's keys and values are `W x` of text tokens x. With the tokens x_f of the forget prompts, those
x_s of the surrogate prompts at the same positions, and the retain prompts' tokens x_r, the change Δ of `W` is

    min over Δ with support M of  Σ_f w_f ‖Δ x_f − W (x_s − x_f)‖²  +  λ mean_r ‖Δ x_r‖²  +  μ ‖Δ‖²,   Σ_f w_f = 1,

whose rows decouple: with G = Σ w_f x_f x_fᵀ + λ mean x_r x_rᵀ + μ I and B = W Σ w_f (x_s − x_f) x_fᵀ, row i with
support S is B[i, S] (G[S, S])⁻¹ (`fade_kernels.masked_least_squares`). Where M is everything, Δ = W E with one E for
all layers: the edit of UCE (Gandikota et al., arXiv 2308.14761), seen from the text's side.

Which entries: those that gain most alone are taken first, more than the budget allows; then the cheapest are dropped,
in a few geometric rounds with the rest solved anew, as in optimal brain surgeon (Hassibi and Stork, 1993); then the
best missing ones are added and the cheapest dropped again, a few times, as in subspace pursuit (Dai and Milenkovic,
arXiv 0803.0811). Gains and prices are changes of the objective above, divided by the layer's mean output energy on the
retain tokens, so that all layers share one budget, of which keys get less than values. No denoiser pass and no latent
is needed. The edit changes what the text means to the denoiser, not what the denoiser can draw.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fade.backbones import Backbone
from fade.conditioning import Conditioning, EncodedPrompts
from fade.errors import FadeError
from fade.progress import progress_bar
from fade.quantised import float_weight
from fade.regions import Region
from fade.saliency import unit_count
from fade_kernels import (
    BitMask,
    gather_masked,
    masked_least_squares,
    masked_least_squares_prices,
    scatter_masked_,
    select_top_fraction,
    weight_shape,
)

# Of the objective at Δ = 0, averaged over three DigitCanvas concepts at keep 1 % and 0.3 %, dropping from the dense
# edit leaves 0.43 in 8 rounds and 0.40 in 50; growing, pruning and growing again three times 0.36, in less time. Of the
# forget residual, a growth of 2.5 and 4 rounds leave 3 % less at a third more arithmetic.
FIRST_GROWTH = 2.0
"""Times the budget that the best single entries make up at the start."""
GROWTH, MOST_REGROWN, WORTH_IT = 0.5, 4, 0.02
"""Part of the budget that is added after each pruning, how often at most, and the gain for which it is done again."""
ROUNDS = 3
"""In which the cheapest are dropped, the rest being solved anew before each."""
KEYS, KEY_WEIGHT = ("to_k", "add_k_proj"), 0.1
"""Ends of the names of layers that say where attention looks, not what it finds there, and what they count beside
others. For four DigitCanvas concepts each, the dense edit of the values alone forgets all (UA 100), that of the keys
alone nothing (UA 0); at keep 0.3 % and equal drift, UA is 100/100/100/70 with 0.1 or 0, but 62/88/100/40 with 1."""
LEAST_WEIGHT, FIRST_WEIGHT, MOST_WEIGHT = 0.1, 5.0, 100.0
"""Of λ where it is searched for; entries are selected with the one in the middle."""
ROWS_TO_BALANCE = 4096
"""Rows of all layers that λ is searched on, where there are twice as many or more, if none has more than MOST_PER_ROW
entries; of longer ones as many as have so many entries together: what SD 3.5 and FLUX.1 read of a prompt is one layer,
whose rows may keep thousands."""
MOST_SHIFT = 2.0
"""Times that the change of retain tokens may become larger or smaller for the sake of forgetting."""
MOST_PER_ROW = 256
"""Entries of a row that are solved for again and again while they are chosen: the time grows with their cube."""
PENALTY = 1e4
"""Of changes of protected tokens while entries and λ are chosen, in mean square entries of the tokens."""
PROTECTED_PRECISION = 1e-7
"""Relative to the longest: shorter components of protected tokens are rounding of their float32."""
REVIVAL_DAMPING = 1e-4
"""Of a reviving token's length, in mean square gains of the edited layers: hardly matters, there are many rows."""
_CHUNK_BYTES = 2**25
"""Of blocks that are factored at once where tokens are protected."""


_Segments = Sequence[tuple[list[int], int | None]]
"""A prompt's token ids by segment, and how many positions each has (`Backbone.token_ids`)."""

# --- tokens ----------------------------------------------------------------------------------------------------------


def align(forget: Sequence[int], surrogate: Sequence[int], length: int, other_length: int | None = None) -> list[int]:
    """For each of `length` positions of the forget prompt, the position of the surrogate prompt that answers it.

    `forget` and `surrogate` are token ids with begin and end, without the padding that fills both up to `length` (the
    surrogate up to `other_length`, where that is another). What
    they have in common at the beginning and at the end is aligned, what differs in between is spread evenly (where the
    surrogate has nothing there, on what follows), and padding answers padding at its own position.
    """
    shorter = min(len(forget), len(surrogate))
    prefix = next((i for i in range(shorter) if forget[i] != surrogate[i]), shorter)
    most = shorter - prefix
    suffix = next((i for i in range(most) if forget[-1 - i] != surrogate[-1 - i]), most)
    own, other = len(forget) - prefix - suffix, len(surrogate) - prefix - suffix
    middle = [prefix + (2 * i + 1) * other // (2 * own) for i in range(own)]
    end = [len(surrogate) - suffix + i for i in range(suffix)]
    padding = [max(i, len(surrogate)) for i in range(len(forget), length)]
    return [min(i, (other_length or length) - 1) for i in (*range(prefix), *middle, *end, *padding)][:length]


@dataclass(frozen=True)
class TextPairs:
    """What is to be answered otherwise of one concept: (concept, surrogate) prompts, and the same in further
    phrasings."""

    pairs: Sequence[tuple[str, str]]
    phrased: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class TextPrompts:
    """What the solve reads: the pairs of each concept, prompts to retain, of which some in further phrasings, and
    prompts that must not change at all."""

    concepts: Sequence[TextPairs]
    retain: Sequence[str]
    phrased_retain: Sequence[str] = ()
    protect: Sequence[str] = ()

    def all(self) -> tuple[str, ...]:
        """Every prompt once."""
        asked = (prompt for one in self.concepts for pair in (*one.pairs, *one.phrased) for prompt in pair)
        return tuple(dict.fromkeys((*asked, *self.retain, *self.phrased_retain, *self.protect)))


@dataclass(frozen=True)
class TokenStatistics:
    """What the solve needs of all tokens, float64 [K, K] each; x are columns.

    `forget` is Σ w x_f x_fᵀ and `change` Σ w (x_s − x_f) x_fᵀ with weights of sum 1, `difference` Σ w (x_s − x_f)(…)ᵀ;
    `retain` is mean x_r x_rᵀ.
    """

    forget: Tensor
    change: Tensor
    difference: Tensor
    retain: Tensor

    def joined(self, other: "TokenStatistics", weight: float) -> "TokenStatistics":
        """With another's forget tokens beside these, `weight` being their share."""
        return TokenStatistics(
            self.forget.lerp(other.forget, weight),
            self.change.lerp(other.change, weight),
            self.difference.lerp(other.difference, weight),
            self.retain,
        )

    def mapped(self, change: Tensor) -> "TokenStatistics":
        """Of forget tokens T x_f in the place of x_f, with the same surrogates; T is [K, K]."""
        answer = (self.change + self.forget) @ change.T  # Σ w x_s (T x_f)ᵀ
        forget = change @ self.forget @ change.T
        surrogate = self.difference + self.change + self.change.T + self.forget  # Σ w x_s x_sᵀ
        return TokenStatistics(
            forget, answer - forget, surrogate - answer - answer.T + forget, self.retain
        )  # fmt: skip


def token_statistics(backbone: Backbone, reader: str, prompts: TextPrompts, encoded: EncodedPrompts) -> TokenStatistics:
    """The statistics of prompts as a reader's layers see them (`Backbone.text_layers`).

    A pair weighs as much as concept and surrogate lie apart in it, ‖x_s − x_f‖² summed over its tokens: one that
    hardly tells them apart must not dilute the edit. However many the phrasings are, all together weigh as much as the
    prompts proper. Of several concepts each counts the same, divided by how far its tokens are to be moved: else a
    digit beside a style would hardly be forgotten. Raises FadeError where no pair tells concept and surrogate apart.
    """
    device = torch.device("cuda" if backbone.device.type == "cuda" else "cpu")

    def states(prompt: str) -> Tensor:
        return backbone.text_states(reader, encoded[prompt])[0].to(device, torch.float64)

    def attended(prompt: str) -> Tensor | slice:
        return _attended(backbone, reader, encoded[prompt], device)

    kept, parts = 0.0, [part for part in (prompts.retain, prompts.phrased_retain) if part]
    for part in parts:
        for prompt in part:
            x = states(prompt)[attended(prompt)]
            kept = kept + x.T @ x / (len(x) * len(part) * len(parts))
    each = [_forget_statistics(backbone, reader, one, states, attended) for one in prompts.concepts]
    shares = [1 / float(difference.trace()) for _, _, difference in each]
    forget, change, difference = (
        sum(share * one[part] for share, one in zip(shares, each, strict=True)) / sum(shares) for part in range(3)
    )
    return TokenStatistics(forget, change, difference, kept)


def _attended(backbone: Backbone, reader: str, row: Conditioning, device: torch.device) -> Tensor | slice:
    """Index of the tokens of a row that count: what is masked out of the picture may become anything."""
    mask = backbone.attended(reader, row)
    return slice(None) if mask is None else mask[0].to(device)


def _aligned(forget: _Segments, surrogate: _Segments, length: int, other_length: int) -> list[int]:
    """`align` of each segment of the tokens in turn; where there are no tokens, position answers position."""
    if not forget:
        return [min(i, other_length - 1) for i in range(length)]
    places, begin, other_begin = [], 0, 0
    for (own, size), (other, _) in zip(forget, surrogate, strict=True):
        size, other_size = (size, size) if size is not None else (length - begin, other_length - other_begin)
        places += [other_begin + place for place in align(own, other, size, other_size)]
        begin, other_begin = begin + size, other_begin + other_size
    return places


def _forget_statistics(
    backbone: Backbone,
    reader: str,
    concept: TextPairs,
    states: Callable[[str], Tensor],
    attended: Callable[[str], Tensor | slice],
) -> tuple[Tensor, Tensor, Tensor]:
    """`TokenStatistics`' forget, change and difference of one concept."""
    words = sorted({word for pair in (*concept.pairs, *concept.phrased) for word in pair})
    identifiers = dict(zip(words, backbone.token_ids(words, reader), strict=True))
    forget = change = difference = total = largest = 0.0
    for pairs in (concept.pairs, concept.phrased):
        for prompt, answer in pairs:
            x, y = states(prompt), states(answer)
            d = y[_aligned(identifiers[prompt], identifiers[answer], len(x), len(y))] - x
            x, d = x[attended(prompt)], d[attended(prompt)]
            apart = float(d.square().sum())
            weight = apart / len(pairs)
            weighted = weight * x.T
            forget, change = forget + weighted @ x, change + d.T @ weighted.T
            difference, total = difference + weight * d.T @ d, total + weight * len(x)
            if pairs is concept.pairs:
                largest = max(largest, apart / float(x.square().sum()))
    # Beyond rounding of the states' own dtype, squared.
    if not largest > (4 * torch.finfo(backbone.dtype).eps) ** 2:
        first = concept.pairs[0]
        raise FadeError(
            f"the text encoder reads the concept and its surrogate alike ({first[0]!r}, {first[1]!r}); choose a "
            "surrogate, or templates, that it tells apart"
        )
    return forget / total, change / total, difference / total


# --- the solve -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormalEquations:
    """What the change Δ of all layers together solves: Δ G = B on its support, in float64.

    `rows` has the number of rows of each layer; stacked in that order they are the [R, K] of `rhs`, which is B, and of
    masks and values. `gram` is G [K, K]. `wanted` is what the forget tokens' outputs should change by,
    Σ w ‖W (x_s − x_f)‖², and `energy` the mean square ‖W x_r‖² of the retain tokens' outputs, of each layer; `weights`
    are the layers' shares in what is gained and changed, of sum 1 (`KEYS`).
    `forget_gram` is Σ w x_f x_fᵀ, `retain_gram` mean x_r x_rᵀ, `retain` λ, `shift` μ and `damping` its share of the
    tokens' mean square entry. `protected` [K, P] has orthonormal columns, on which Δ is to be 0; G holds PENALTY times
    their projector, so that whatever is chosen by G is chosen for edits that leave them nearly alone.
    """

    rows: dict[str, int]
    rhs: Tensor
    gram: Tensor
    wanted: Tensor
    energy: Tensor
    weights: Tensor
    forget_gram: Tensor
    retain_gram: Tensor
    retain: float
    damping: float
    shift: float
    protected: Tensor | None = None

    def weighed(self, retain: float) -> "NormalEquations":
        """The same with another λ."""
        gram, shift = _gram(self.forget_gram, self.retain_gram, retain, self.damping, self.protected)
        return dataclasses.replace(self, gram=gram, retain=retain, shift=shift)

    def by_layer(self, stacked: Tensor) -> tuple[Tensor, ...]:
        """Views of a tensor [R, ...], one for each layer."""
        return stacked.split(list(self.rows.values()))

    def row_scale(self) -> Tensor:
        """What the outputs' squares of each row count, [R]: its layer's weight, divided by the layer's energy."""
        counts = torch.tensor(list(self.rows.values()), device=self.energy.device)
        return (self.weights / self.energy).repeat_interleave(counts)

    def relative(self, values: Tensor, mask: BitMask) -> Tensor:
        """Values [nnz] at a mask's positions, times the scale of their rows."""
        return values * self.row_scale().repeat_interleave(mask.row_counts)


def normal_equations(
    layers: Mapping[str, nn.Module],
    statistics: TokenStatistics,
    retain: float,
    damping: float,
    protected: Tensor | None = None,
    regions: Mapping[str, Region] | None = None,
) -> NormalEquations:
    """The equations of layers (name to base layer) whose input are the text states.

    `retain` is λ; μ is `damping` times the mean square entry of the tokens; `protected` as `protected_directions` gives
    it. Of layers with a region only that changes: R are its rows and K its columns, which must be the same of all
    layers, as must those of `protected`. Raises FadeError where μ is 0 and some entry is 0 in every token.
    """
    rows_of, columns = _cuts(layers, regions)
    forget, held = statistics.forget[columns, columns], statistics.retain[columns, columns]
    gram, shift = _gram(forget, held, retain, damping, protected)
    rows = {name: len(range(weight_shape(layer)[0])[rows_of[name]]) for name, layer in layers.items()}
    rhs = gram.new_empty(sum(rows.values()), len(gram))
    wanted, energy = [], []
    # Norms of outputs only scale prices: half the precision is plenty for them, and twice as fast.
    difference, kept = statistics.difference.float(), statistics.retain.float()
    change = statistics.change[:, columns]
    for (name, layer), part in zip(layers.items(), rhs.split(list(rows.values())), strict=True):
        weight = float_weight(layer)[rows_of[name]].to(gram.device, torch.float32)
        torch.mm(weight.double(), change, out=part)
        wanted.append(torch.dot((weight @ difference).flatten(), weight.flatten()))
        energy.append(torch.dot((weight @ kept).flatten(), weight.flatten()))
    # A layer of zeros has no output to disturb, and no change to make either.
    energies = torch.stack(energy).double().clamp_min(1e-30)
    weights = torch.tensor([KEY_WEIGHT if name.endswith(KEYS) else 1.0 for name in layers]).to(energies)
    return NormalEquations(
        rows, rhs, gram, torch.stack(wanted).double(), energies, weights / weights.sum(), forget, held, retain,
        damping, shift, protected,
    )  # fmt: skip


def working_bytes(systems: Collection[tuple[int, int]]) -> tuple[int, int, int]:
    """Of equations by their entries R K and columns K: the bytes of all, and the most that choosing entries and that
    solving takes beside them."""
    entries = [count for count, _ in systems]
    held = sum(8 * count + 8 * 8 * columns**2 for count, columns in systems)
    # Large supports: the Gram matrix's inverse, and what its factorisation takes.
    inverse = 3 * 8 * max((columns**2 for _, columns in systems), default=0)
    # Scores, what is gained by an entry more (float64, then float32), and where entries are already.
    return held, 17 * max(entries, default=0) + inverse, 5 * max(entries, default=0) + inverse


def _cuts(layers: Mapping[str, nn.Module], regions: Mapping[str, Region] | None) -> tuple[dict[str, slice], slice]:
    """The rows of each layer that may change, and the columns, of all."""
    whole = {name: Region(*map(range, weight_shape(layer))) for name, layer in layers.items()}
    cuts = {name: (regions or {}).get(name, region) for name, region in whole.items()}
    (columns,) = {region.columns for region in cuts.values()}
    return {name: region.slices[0] for name, region in cuts.items()}, slice(columns.start, columns.stop)


def _gram(
    forget: Tensor, kept: Tensor, retain: float, damping: float, protected: Tensor | None
) -> tuple[Tensor, float]:
    gram = forget + retain * kept
    mean = float(gram.diagonal().mean())
    shift = damping * mean
    if protected is not None:
        gram = gram.addmm(protected, protected.T, alpha=PENALTY * mean)
    gram = (gram + gram.T) / 2
    gram.diagonal().add_(shift)
    if not bool((gram.diagonal() > 0).all()):
        raise FadeError(_singular("some entry is 0 in every token"))
    return gram, shift


def balanced(
    equations: NormalEquations,
    masks: Mapping[str, BitMask],
    change: float,
    left: float | None = None,
    tolerance: float = 0.09,
) -> NormalEquations:
    """The equations with the λ whose optimum on these masks changes `change` of the retain tokens' output energy.

    Found by secants of the logarithms, within LEAST_WEIGHT and MOST_WEIGHT, to a part `tolerance` of the change. Where
    the forget residual is then another than `left`, the change becomes larger or smaller by their ratio, up to
    MOST_SHIFT times: small masks would forget too little, and what is forgotten easily need not disturb so much.
    """
    some, masks = _thinned(equations, masks)
    some, found, slope = _balanced(some, masks, change, tolerance)
    if left is not None:
        shift = min(MOST_SHIFT, max(1 / MOST_SHIFT, found.forget / left))
        some, _, _ = _balanced(some, masks, change * shift, tolerance, found, slope)
    return equations if some.retain == equations.retain else equations.weighed(some.retain)


def _thinned(equations: NormalEquations, masks: Mapping[str, BitMask]) -> tuple[NormalEquations, Mapping[str, BitMask]]:
    """Every n-th row of each layer, so that about ROWS_TO_BALANCE are left, or as many entries as so many may have: one
    λ needs no more."""
    entries = sum(masks[name].count for name in equations.rows)
    step = max(1, len(equations.rhs) // ROWS_TO_BALANCE, entries // (ROWS_TO_BALANCE * MOST_PER_ROW))
    if step == 1:
        return equations, masks
    rows = {name: -(-many // step) for name, many in equations.rows.items()}
    shares = torch.tensor([rows[name] / many for name, many in equations.rows.items()]).to(equations.energy)
    some = dataclasses.replace(
        equations,
        rows=rows,
        rhs=torch.cat([part[::step] for part in equations.by_layer(equations.rhs)]),
        wanted=equations.wanted * shares,
        energy=equations.energy * shares,
    )
    columns = equations.rhs.shape[1]
    return some, {name: BitMask(masks[name].words[::step].contiguous(), (rows[name], columns)) for name in rows}


def _balanced(
    equations: NormalEquations,
    masks: Mapping[str, BitMask],
    change: float,
    tolerance: float,
    found: "Residual | None" = None,
    slope: float = -0.8,  # the change falls a little slower than 1 / λ
) -> tuple[NormalEquations, "Residual", float]:
    """The equations with the λ found, their residual where the search came to an end, and the slope it ended with.
    Another search may begin with the last two."""
    before = None
    for _ in range(10):
        found = found or residual(equations, masks, _optimum(equations, masks))
        over = math.log(max(found.retain, 1e-12) / change)
        if before is not None:
            step = math.log(equations.retain / before[0])
            slope = min(-0.2, max(-3.0, (over - before[1]) / step))
        weight = min(max(equations.retain * math.exp(-over / slope), LEAST_WEIGHT), MOST_WEIGHT)
        if abs(over) < tolerance or weight == equations.retain:
            break
        before, last, found = (equations.retain, over), found, None
        equations = equations.weighed(weight)
    return equations, found or last, slope


@dataclass(frozen=True)
class Selected:
    """Masks by layer, the price of the last unit kept, and the mean and largest first gain of each layer's entries."""

    masks: dict[str, BitMask]
    threshold: float
    spread: dict[str, tuple[float, float]]


def select(
    equations: NormalEquations,
    units: int,
    granularity: str = "element",
    tile: int = 32,
    progress: bool = False,
    change: float | None = None,
    left: float | None = None,
) -> Selected:
    """Masks of `units` entries (tiles, …: `granularity`) over all layers at once, grown and pruned in turns.

    A unit's score is the sum or mean of its entries' (`select_top_fraction`). With `change`, λ is `balanced` to it and
    to `left` after the first turn: entries are best for the λ that they are solved with. Raises FadeError where a
    row's system is singular.
    """
    shape = tuple(equations.rhs.shape)
    total = sum(unit_count((rows, shape[1]), granularity, tile) for rows in equations.rows.values())

    def best(scores: Tensor, count: int) -> tuple[BitMask, float]:
        # Half a unit more: the fraction must not round below the count.
        fraction = min(1.0, (count + 0.5) / total)
        chosen = select_top_fraction(equations.by_layer(scores), fraction, granularity, tile)
        return BitMask(torch.cat([mask.words for mask in chosen.masks]), shape), chosen.threshold

    def most_per_row_(scores: Tensor, mask: BitMask | None = None) -> None:
        """Leaves those that make no row larger, what is on the mask counting first."""
        held = None if mask is None else mask.unpack()
        if held is not None:
            scores.masked_fill_(held, torch.inf)
        scores.mul_(scores >= scores.kthvalue(shape[1] - MOST_PER_ROW + 1, dim=1, keepdim=True).values)
        if held is not None:
            scores.masked_fill_(held, 0.0)

    scores = _gains(equations)
    spread = [(float(score.mean()), float(score.max())) for score in equations.by_layer(scores)]
    limited = granularity == "element" and shape[1] > MOST_PER_ROW
    if limited:
        if 2 * units > shape[0] * MOST_PER_ROW:
            mask, threshold = best(_dense_prices(equations), units)
            return _selected(equations, mask, threshold, spread)
        most_per_row_(scores)
    many = min(total, round(FIRST_GROWTH * units))
    mask, threshold = best(scores, many)
    gained = 0.0
    with progress_bar("selecting", (1 + MOST_REGROWN) * ROUNDS, progress) as advance:
        for turn in range(1 + MOST_REGROWN):
            for step in range(1, ROUNDS + 1):
                mask, threshold = best(_prices(equations, mask), round(many * (units / many) ** (step / ROUNDS)))
                advance()
            if many == units or turn == MOST_REGROWN:
                break
            if turn == 0 and change is not None:
                equations = balanced(equations, _split(equations, mask), change, left, tolerance=0.3)
            values, _ = _solved(equations, mask, with_prices=False)
            before, gained = gained, float(torch.dot(*_gained(equations, mask, values)))
            if gained < (1 + WORTH_IT) * before:
                break
            many = min(total, round((1 + GROWTH) * units))
            gains = _gains(equations, mask, values)
            if limited:
                most_per_row_(gains, mask)
            added, _ = best(gains, many - units)
            mask = BitMask(mask.words | added.words, shape)
    return _selected(equations, mask, threshold, spread)


def shares(
    equations: Mapping[str, NormalEquations], units: int, granularity: str = "element", tile: int = 32
) -> dict[str, int]:
    """How many of `units` each of several systems of equations gets: as many as it has among the units that gain most
    alone, over all of them. Layers that read different things of a prompt are solved apart, under one budget."""
    if len(equations) == 1:
        return dict.fromkeys(equations, units)
    scores = {(key, i): s for key, one in equations.items() for i, s in enumerate(one.by_layer(_gains(one)))}
    total = sum(unit_count(tuple(score.shape), granularity, tile) for score in scores.values())
    chosen = select_top_fraction(list(scores.values()), min(1.0, (units + 0.5) / total), granularity, tile)
    found = dict.fromkeys(equations, 0)
    for (key, _), mask in zip(scores, chosen.masks, strict=True):
        found[key] += mask.count
    picked = sum(found.values())
    most = {
        key: sum(unit_count((rows, one.rhs.shape[1]), granularity, tile) for rows in one.rows.values())
        for key, one in equations.items()
    }
    given = {key: min(most[key], round(units * many / picked)) for key, many in found.items()}
    first = max(found, key=found.get)
    given[first] = min(most[first], units - sum(many for key, many in given.items() if key != first))
    return given


def _selected(
    equations: NormalEquations, mask: BitMask, threshold: float, spread: Sequence[tuple[float, float]]
) -> Selected:
    return Selected(_split(equations, mask), threshold, dict(zip(equations.rows, spread, strict=True)))


def _split(equations: NormalEquations, mask: BitMask) -> dict[str, BitMask]:
    words = equations.by_layer(mask.words)
    return {
        name: BitMask(part.clone(), (len(part), mask.shape[1]))
        for name, part in zip(equations.rows, words, strict=True)
    }


def _gains(equations: NormalEquations, mask: BitMask | None = None, values: Tensor | None = None) -> Tensor:
    """What adding each entry alone to the optimum on the mask gains, times its row's scale: float32 [R, K]."""
    if mask is None:
        gains = equations.rhs.square()
    else:
        gains = equations.rhs.sub(_times(mask, values, equations.gram)).square_()
        gains.masked_fill_(mask.unpack(), 0.0)  # the gradient is rounding there
    return gains.div_(equations.gram.diagonal()).mul_(equations.row_scale()[:, None]).float()


def _gained(equations: NormalEquations, mask: BitMask, values: Tensor) -> tuple[Tensor, Tensor]:
    """B on the mask, and the values times their rows' scale: their product is what the optimum has gained."""
    return gather_masked(equations.rhs, mask), equations.relative(values, mask)


def _prices(equations: NormalEquations, mask: BitMask) -> Tensor:
    """What dropping each entry from the optimum on the mask costs, likewise; 0 outside of it."""
    _, prices = _solved(equations, mask, with_prices=True)
    scores = torch.zeros(mask.shape, dtype=torch.float32, device=prices.device)
    return scatter_masked_(scores, equations.relative(prices, mask).float(), mask)


def _dense_prices(equations: NormalEquations) -> Tensor:
    """`_prices` of the dense edit, whose rows share one factor."""
    factor, info = torch.linalg.cholesky_ex(equations.gram)
    if int(info):
        raise FadeError(_singular("the tokens' Gram matrix is singular"))
    inverse = torch.cholesky_inverse(factor)
    prices = (equations.rhs @ inverse).square_().div_(inverse.diagonal())
    return prices.mul_(equations.row_scale()[:, None]).float()


def solve(equations: NormalEquations, masks: Mapping[str, BitMask]) -> dict[str, Tensor]:
    """The optimum on the masks of the equations' layers: float32 [mask.count], row-major; where there are protected
    tokens, 0 on them to float64's precision before it is rounded.

    Raises FadeError for a singular system, and where every row has fewer entries than there are constraints.
    """
    if equations.protected is None:
        return _optimum(equations, masks)
    return _by_layer(equations, masks, _constrained(equations, _stacked(equations, masks)))


def _optimum(equations: NormalEquations, masks: Mapping[str, BitMask]) -> dict[str, Tensor]:
    """The optimum of the objective as G states it, protected tokens being nothing but dear."""
    values, _ = _solved(equations, _stacked(equations, masks), with_prices=False)
    return _by_layer(equations, masks, values)


def _by_layer(equations: NormalEquations, masks: Mapping[str, BitMask], values: Tensor) -> dict[str, Tensor]:
    parts = values.float().split([masks[name].count for name in equations.rows])
    return dict(zip(equations.rows, parts, strict=True))


def _constrained(equations: NormalEquations, mask: BitMask) -> Tensor:
    """The optimum on the mask among the changes that are 0 on the protected tokens: float64 [mask.count].

    Row i with support S is x = z Nᵀ, where N spans the null space of `protected[S]ᵀ`: z = b N (Nᵀ G[S, S] N)⁻¹. Rows of
    equal size are solved together, dimensions outside of the null space being those of an identity.
    """
    columns, rhs = mask.unpack().nonzero()[:, 1], gather_masked(equations.rhs, mask)
    sizes = mask.row_counts
    values, free = torch.zeros_like(rhs), 0
    starts = sizes.cumsum(0) - sizes
    for size in sizes.unique().tolist():
        rows = (sizes == size).nonzero()[:, 0]
        for chunk in rows.split(max(1, _CHUNK_BYTES // (8 * max(1, size) ** 2))):
            place = starts[chunk, None] + torch.arange(size, device=rhs.device)
            support = columns[place]
            basis, singular, _ = torch.linalg.svd(equations.protected[support], full_matrices=True)
            # Directions that the constraints take: what is beyond the number of singular values is free anyway.
            taken = torch.zeros(len(chunk), size, dtype=torch.bool, device=rhs.device)
            taken[:, : singular.shape[1]] = singular > 1e-10
            free += int((~taken).sum())
            basis = basis.masked_fill(taken[:, None, :], 0.0)
            block = basis.mT @ equations.gram[support[:, :, None], support[:, None, :]] @ basis
            block = (block + block.mT) / 2 + torch.diag_embed(taken.to(block.dtype))
            factor, info = torch.linalg.cholesky_ex(block)
            if bool(info.any()):
                raise FadeError(_singular("a row's system is singular where the protected tokens leave it free"))
            z = torch.cholesky_solve(basis.mT @ rhs[place][:, :, None], factor)
            values[place] = (basis @ z)[:, :, 0]
    if not free:
        raise FadeError(
            f"the protected prompts have {equations.protected.shape[1]} independent tokens, and no row of a layer more "
            f"than {int(sizes.max())} entries that may change, so that nothing can; protect fewer, or raise keep"
        )
    return values


def _stacked(equations: NormalEquations, masks: Mapping[str, BitMask]) -> BitMask:
    words = torch.cat([masks[name].words for name in equations.rows]).to(equations.rhs.device)
    return BitMask(words, tuple(equations.rhs.shape))


def _solved(equations: NormalEquations, mask: BitMask, with_prices: bool) -> tuple[Tensor, Tensor | None]:
    try:
        if with_prices:
            return masked_least_squares_prices(equations.rhs, equations.gram, mask)
        return masked_least_squares(equations.rhs, equations.gram, mask), None
    except ValueError as error:
        raise FadeError(_singular(str(error))) from error


def protected_directions(
    backbone: Backbone, reader: str, protected: Conditioning, statistics: TokenStatistics
) -> Tensor:
    """An orthonormal basis [K, P] of all tokens of protected prompts.

    Tokens that differ from others by less than rounding of the text encoder are no further direction. Raises FadeError
    where the forget tokens of the statistics lie within their span, so that nothing about them could change.
    """
    rows = [protected.rows(i) for i in range(protected.count)]
    states = torch.cat(
        [backbone.text_states(reader, row)[0][_attended(backbone, reader, row, backbone.device)] for row in rows]
    )
    directions, lengths, _ = torch.linalg.svd(states.to(statistics.forget).T, full_matrices=False)
    basis = directions[:, lengths > PROTECTED_PRECISION * lengths[0]].contiguous()
    outside = statistics.forget.trace() - ((basis.T @ statistics.forget) * basis.T).sum()
    if float(outside) <= 1e-9 * float(statistics.forget.trace()):
        raise FadeError(
            f"the protected prompts have {basis.shape[1]} independent tokens, of which the concept's are combinations, "
            "so that nothing could change; protect fewer prompts"
        )
    return basis


def revival(
    layers: Mapping[str, nn.Module], equations: NormalEquations, masks: Mapping[str, BitMask],
    values: Mapping[str, Tensor], regions: Mapping[str, Region] | None = None,
) -> Tensor:  # fmt: skip
    """T [K, K], float64, so that T x is what the edited layers answer most as the unedited answer x.

    It minimises Σ ‖(W + Δ) x' − W x‖² + ε ‖x'‖² over x' (RECE, Gong et al., arXiv 2407.12298), layers being weighed as
    in the equations: a solve with one factor for all x. Of layers with a region, answers are those of its rows.
    """
    width = weight_shape(next(iter(layers.values())))[1]
    inner, mixed = equations.gram.new_zeros(width, width), equations.gram.new_zeros(width, width)
    rows_of, columns = _cuts(layers, regions)
    for (name, layer), scale in zip(layers.items(), equations.weights / equations.energy, strict=True):
        weight = float_weight(layer)[rows_of[name]].to(equations.gram.device, torch.float32)
        edited, own = weight.clone(), torch.zeros_like(weight[:, columns]).contiguous()
        edited[:, columns] += scatter_masked_(own, values[name].to(weight.device), masks[name])
        inner += (edited.T @ edited).double() * scale
        mixed += (edited.T @ weight).double() * scale
    inner.diagonal().add_(REVIVAL_DAMPING * float(inner.diagonal().mean()))
    return torch.linalg.solve(inner, mixed)


def solution(
    layers: Mapping[str, nn.Module],
    statistics: TokenStatistics,
    equations: NormalEquations,
    masks: Mapping[str, BitMask],
    change: float | None,
    left: float | None = None,
    hardening: int = 0,
    regions: Mapping[str, Region] | None = None,
) -> tuple[NormalEquations, dict[str, Tensor]]:
    """The equations that were solved last, and their `solve` on the masks, which are those of the regions.

    With `change`, λ is `balanced` to it and to `left`. In each round of `hardening` the tokens that revive the
    concept under the last edit join the forget tokens, with the same answers, and everything is solved anew. Raises
    what `solve` raises.
    """

    def solved(equations: NormalEquations) -> tuple[NormalEquations, dict[str, Tensor]]:
        if change is not None:
            equations = balanced(equations, masks, change, left)
        return equations, solve(equations, masks)

    equations, values = solved(equations)
    joined = statistics
    for done in range(1, 1 + hardening):
        revived = statistics.mapped(revival(layers, equations, masks, values, regions))
        joined = joined.joined(revived, 1 / (1 + done))
        equations, values = solved(
            normal_equations(layers, joined, equations.retain, equations.damping, equations.protected, regions)
        )
    return equations, values


def refitted(
    equations: NormalEquations, masks: Mapping[str, BitMask], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The values on the masks that do to the forget tokens what `values` do and leave the retain tokens alone, the two
    weighed as the equations weigh them: `solve` with Δ x_f in the place of W (x_s − x_f). Raises what `solve` raises.
    """
    mask = _stacked(equations, masks)
    delta = torch.cat([values[name] for name in equations.rows])
    return solve(dataclasses.replace(equations, rhs=_times(mask, delta, equations.forget_gram).double()), masks)


def _singular(what: str) -> str:
    return f"the closed form has no solution ({what}); raise closed_form.damping, or give more different retain prompts"


def _times(mask: BitMask, values: Tensor, matrix: Tensor) -> Tensor:
    """Values at a mask's positions, as a matrix, times a dense one: float32, which is plenty to compare entries by."""
    index = mask.unpack().nonzero().T
    sparse = torch.sparse_coo_tensor(index, values.float(), mask.shape, is_coalesced=True, check_invariants=False)
    return torch.sparse.mm(sparse, matrix.float())


@dataclass(frozen=True)
class Residual:
    """What an edit leaves undone of the wanted change on the forget tokens, and what it changes on the retain tokens:
    shares of the wanted change and of the outputs' energy, averaged over layers by their weights."""

    forget: float
    retain: float


def residual(equations: NormalEquations, masks: Mapping[str, BitMask], values: Mapping[str, Tensor]) -> Residual:
    """Of the solution on these masks; `values` as `solve` gives them."""
    mask = _stacked(equations, masks)
    delta = torch.cat([values[name] for name in equations.rows]).double()
    rhs, weight = _gained(equations, mask, delta)
    retained = torch.dot(gather_masked(_times(mask, delta, equations.retain_gram), mask).double(), weight)
    # At the optimum x G xᵀ = b xᵀ, so that the whole objective is the wanted change less b xᵀ.
    gained = torch.dot(rhs, weight)
    spent = equations.retain * retained + equations.shift * torch.dot(delta, weight)
    wanted = (equations.wanted * equations.weights / equations.energy).sum()
    return Residual(float(1 - (gained + spent) / wanted), float(retained))
