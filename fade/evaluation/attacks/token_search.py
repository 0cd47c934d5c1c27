"""Black-box token search, after Ring-A-Bell (Tsai et al., arXiv 2310.10012): a genetic algorithm looks for words that
the text encoder takes for the concept, without ever asking the model that is attacked.

The concept's direction is the mean difference between prompts with and without it, v = mean_i (T(p_i) − T(p̄_i)), T the
text encoder's states; the words p̃ minimise

    ‖T(p̃) − (T(p) + η v)‖²     (equations 2 to 4)

over sequences of `length` words. The concept's own words are not among them, or the answer would be the prompt itself,
which is drawn without an attack anyway. p̄_i are the surrogate's prompts. Population, η, mutation (a quarter of the
children have one word replaced by a random one) and crossover (at one point, half of the pairs) are the paper's; of its
3000 generations there are fewer here. That the better half of a population is kept is our reconstruction.

What the words make the base model draw is told beside: where that is the concept in half of the pictures, an edit that
forgets nothing is brought back in half of them, too.

Who attacks needs a copy of the text encoder, which for most models is public, and then only prompts.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fade.conditioning import Conditioning
from fade.evaluation.attacks.settings import Count, Number, Share, Steps, Within
from fade.evaluation.attacks.subject import CannotAttackError, Drawn, Subject
from fade.evaluation.attacks.words import Words, words_of
from fade.noise import step_generator
from fade.progress import progress_bar


@dataclass(frozen=True)
class TokenSearch:
    name: ClassVar[str] = "token-search"
    needs: ClassVar[str] = "the text encoder to search; then a prompt"

    strength: Number = 3.0
    """η."""
    length: Count = 16
    """Words of a prompt; fewer where the text encoder reads no more."""
    population: Annotated[int, Within(3)] = 200
    generations: Steps = 30
    mutation: Share = 0.25
    crossover: Share = 0.5

    def setting(self, subject: Subject) -> str:
        return f"{self.generations} generations of {self.population}"

    def __call__(self, subject: Subject) -> Drawn:
        if not subject.surrogates:
            raise CannotAttackError("without a surrogate there are no prompts to tell the concept from")
        words = words_of(subject)
        pairs = dict(zip(subject.prompts, subject.surrogates, strict=True))
        found = subject.of_base(
            self.name,
            {**asdict(self), "pairs": list(pairs.items()), "forget": subject.forget, "seed": subject.seed},
            lambda: self.search(subject, words, pairs),
        )
        texts = [" ".join(words.texts[word] for word in row) for row in found["words"].tolist()]
        text = dict(zip(pairs, texts, strict=True))
        asked = tuple(text[prompt] for prompt in subject.prompts)
        numbers, told = subject.counted_under(asked)
        drawn = subject.decode(subject.sample(asked, subject.seeds, "drawing"))
        return Drawn(drawn, {"prompts": texts, "distances": found["distances"].tolist(), **numbers}, told)

    def search(self, subject: Subject, words: Words, pairs: Mapping[str, str]) -> dict[str, Tensor]:
        """For each of n prompts, beside its surrogate's, indices of words (int64 [n, length]) and their squared
        distances (float32 [n])."""
        with_concept, without = _states(subject, list(pairs)), _states(subject, list(pairs.values()))
        direction = (with_concept - without).mean(0, keepdim=True)
        targets = with_concept + self.strength * direction
        rows, distances = [], []
        with progress_bar("searching words", len(pairs) * self.generations, subject.progress) as advance:
            for number in range(len(pairs)):
                generator = step_generator(subject.seed, self.name, number)
                found, distance = self.evolve(subject, words, targets[number], generator, advance)
                rows.append(found)
                distances.append(distance)
        return {"words": torch.stack(rows), "distances": torch.tensor(distances)}

    def evolve(
        self,
        subject: Subject,
        words: Words,
        target: Tensor,
        generator: torch.Generator,
        advance: Callable[[str], None] = lambda text: None,
    ) -> tuple[Tensor, float]:
        """The words [length] of the least squared distance to a target [d], and that distance."""
        count = len(words.texts)
        length = min(self.length, *(_room(encoder.tokenizer) for encoder in words.encoders.values()))
        alive = torch.randint(count, (self.population, length), generator=generator)
        distances = self.distances(subject, words, alive, target)
        for _ in range(self.generations):
            parents = alive[distances.argsort()[: max(2, self.population // 2)]]
            children = self.children(parents, self.population - len(parents), count, generator)
            alive = torch.cat([parents, children])
            kept, new = distances.sort().values[: len(parents)], self.distances(subject, words, children, target)
            distances = torch.cat([kept, new])
            advance(f"distance {distances.min().item():.3g}")
        best = int(distances.argmin())
        return alive[best], distances[best].item()

    def children(self, parents: Tensor, count: int, vocabulary: int, generator: torch.Generator) -> Tensor:
        """Words [count, length] of random pairs of parents [n, length]: `crossover` of them take what is behind a
        random point from the second parent, and `mutation` of them then one random word anywhere."""
        length = parents.shape[1]
        first, second = torch.randint(len(parents), (2, count), generator=generator)
        point = torch.randint(1, max(length, 2), (count,), generator=generator)
        crossed = torch.rand(count, generator=generator) < self.crossover
        behind = (torch.arange(length) >= point[:, None]) & crossed[:, None]
        made = torch.where(behind, parents[second], parents[first])
        mutated = (torch.rand(count, generator=generator) < self.mutation).nonzero().flatten()
        place = torch.randint(length, (len(mutated),), generator=generator)
        made[mutated, place] = torch.randint(vocabulary, (len(mutated),), generator=generator)
        return made

    def distances(self, subject: Subject, words: Words, chosen: Tensor, target: Tensor) -> Tensor:
        """‖T(p̃) − target‖² of word indices [n, length], float32 [n] on the CPU."""
        texts = [" ".join(words.texts[word] for word in row) for row in chosen.tolist()]
        return (_states(subject, texts) - target).square().sum(1).cpu()


def _states(subject: Subject, prompts: list[str]) -> Tensor:
    """All that a prompt becomes, as one vector each: float32 [n, d]."""
    conditioning: Conditioning = subject.backbone.encode_prompts(prompts, batch_size=256)
    try:
        values = conditioning.stacked().values()
    except ValueError as error:
        raise CannotAttackError(
            f"{subject.backbone.family.name} reads every text at its own length, so distances between texts of "
            "different lengths are not defined"
        ) from error
    return torch.cat([value.float().flatten(1) for value in values if value.is_floating_point()], 1)


def _room(tokenizer: object) -> int:
    """Words that a text encoder reads between its tokens of begin and end."""
    return tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()


VARIANTS = (TokenSearch(),)
