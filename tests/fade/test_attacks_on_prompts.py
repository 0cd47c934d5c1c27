"""Attacks through the text encoder: each one's rule against its definition."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from fade.adapter import Adapter
from fade.backbones import backbone_for
from fade.evaluation.attacks import CannotAttackError, Subject
from fade.evaluation.attacks.prompt_tokens import PromptTokens, onto_simplex, straight_through
from fade.evaluation.attacks.textual_inversion import TextualInversion
from fade.evaluation.attacks.token_search import TokenSearch, _states
from fade.evaluation.attacks.words import encoded, named_by_placeholders, words_of
from fade.noise import step_generator

from .backbones.pipelines import build
from .test_attacks import adapter_on, subject_of

PROMPTS = ("the digit three in ink style", "the digit three in neon style", "the digit three in ink style")


@pytest.fixture
def adapter(pipeline: StableDiffusionPipeline) -> Adapter:
    return adapter_on(pipeline)


@pytest.fixture
def subject(adapter: Adapter) -> Subject:
    made = subject_of(adapter, PROMPTS, forget="three", seed=3)
    made.surrogates = tuple(prompt.replace("three", "eight") for prompt in PROMPTS)
    return made


def reading(name: str) -> Subject:
    """A pipeline of a family, without an adapter."""
    return Subject(backbone_for(build(name)), None, ("a cat",), (1,), lambda images: images, forget="cat")  # type: ignore[arg-type]


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Stable Diffusion 1.x/2.x", "Stable Diffusion XL", "FLUX.1", "Stable Diffusion 3/3.5", "Kandinsky 5"]
)
def test_words_read_as_their_embeddings_in_every_text_encoder(name: str) -> None:
    subject = reading(name)
    words, pipeline = words_of(subject), subject.backbone.pipeline
    assert "cat" not in words.texts
    assert words.texts[words.placeholder] not in "a cat"
    rows = torch.randint(len(words.texts), (3, 2))
    texts = [" ".join([words.texts[i] for i in row] + ["a cat"]) for row in rows.tolist()]
    embeddings = {name: encoder.embeddings()[rows].requires_grad_(True) for name, encoder in words.encoders.items()}
    found = encoded(subject, words, [f"{words.placeholders(2)} a cat"] * 3, embeddings)
    wanted = subject.backbone.encode_prompts(texts)
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=1e-4)
    total = sum(value.square().sum() for value in found.values() if value.is_floating_point())
    for gradient in torch.autograd.grad(total, list(embeddings.values())):
        assert (gradient.abs().amax(-1) > 0).all()
    for name in words.encoders:
        assert all(parameter.requires_grad for parameter in getattr(pipeline, name).parameters())
    assert not any(table._forward_hooks for encoder in words.encoders.values() for table in encoder.tables)


@pytest.mark.parametrize("name", ["Sana", "HunyuanImage 2.1"])
def test_a_family_that_reads_words_otherwise_is_refused_with_a_word(name: str) -> None:
    subject = reading(name)
    words = words_of(subject)
    own = {name: encoder.embeddings()[:1, None] for name, encoder in words.encoders.items()}
    with pytest.raises(CannotAttackError, match="puts around prompts has such words|does not ask its text_encoder_2"):
        encoded(subject, words, [f"{words.placeholders(1)} a cat"], own)


def test_one_row_of_embeddings_serves_every_prompt(subject: Subject) -> None:
    words = words_of(subject)
    encoder = words.encoders["text_encoder"]
    word = torch.randint(len(words.texts), (1, 1))
    asked = named_by_placeholders(subject, words, PROMPTS, 1)
    found = encoded(subject, words, asked, {"text_encoder": encoder.embeddings()[word]})
    texts = [prompt.replace("three", words.texts[word.item()]) for prompt in PROMPTS]
    wanted = subject.backbone.encode_prompts(texts)["prompt_embeds"]
    torch.testing.assert_close(found["prompt_embeds"], wanted, rtol=1e-4, atol=1e-4)


def test_every_word_is_one_token_wherever_it_stands(subject: Subject) -> None:
    words, tokenizer = words_of(subject), subject.backbone.pipeline.tokenizer
    assert len(set(words.texts)) == len(words.texts) > 50
    assert "three" not in words.texts
    assert {"eight", "ink"} <= set(words.texts)
    for text, token in zip(words.texts, words.encoders["text_encoder"].ids.tolist(), strict=True):
        assert tokenizer(f"ink {text} two", add_special_tokens=False)["input_ids"][1:-1] == [token]


def test_what_cannot_be_searched_is_refused(subject: Subject) -> None:
    words = words_of(subject)
    with pytest.raises(CannotAttackError, match="'a dog' does not contain 'three'"):
        named_by_placeholders(subject, words, ("a dog",), 1)
    many = {"text_encoder": torch.randn(1, 40, words.encoders["text_encoder"].embeddings().shape[1])}
    with pytest.raises(CannotAttackError, match=r"text_encoder reads \d+ words in the place of 40"):
        encoded(subject, words, [words.placeholders(40)], many)
    without = subject_of(subject.adapter, PROMPTS)
    with pytest.raises(CannotAttackError, match="without a surrogate"):
        TokenSearch()(without)
    subject.backbone.pipeline.text_encoder = None
    with pytest.raises(CannotAttackError, match="was loaded without its text_encoder"):
        PromptTokens()(subject)


# --- textual inversion -----------------------------------------------------------------------------------------------


def noised(subject: Subject, latents: torch.Tensor, stream: str, step: int) -> tuple[Any, ...]:
    """Noised latents, their timesteps and the noise, as DDPM has them."""
    generator = step_generator(subject.seed, stream, step)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(1000, (len(latents),), generator=generator)
    alpha = subject.backbone.pipeline.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, timesteps, noise


def test_the_first_iteration_moves_the_new_word_down_the_gradient(subject: Subject) -> None:
    """Against the embedding table itself, in which the new word has a row."""
    pipeline, words = subject.backbone.pipeline, words_of(subject)
    picture = subject.examples(1)
    one = TextualInversion(1, iterations=1, pictures=1, batch_size=2, learning_rate=0.1)
    found, _ = one.optimise(subject, words, picture, named_by_placeholders(subject, words, PROMPTS[:1], 1))

    table = pipeline.text_encoder.get_input_embeddings().weight
    token, three = (
        pipeline.tokenizer(w, add_special_tokens=False)["input_ids"] for w in (words.placeholders(1), "three")
    )
    start = table.data[three[0]].clone()
    unit = words.encoders["text_encoder"].embeddings().square().mean().sqrt()
    kept = table.data[token[0]].clone()
    table.data[token[0]] = start
    asked = PROMPTS[0].replace("three", words.placeholders(1))
    text, _ = pipeline.encode_prompt([asked] * 2, "cpu", 1, False)
    latents, timesteps, noise = noised(subject, picture.expand(2, -1, -1, -1), "textual-inversion", 0)
    loss = (pipeline.unet(latents, timesteps, text).sample - noise).square().mean()
    gradient = torch.autograd.grad(loss, table)[0][token[0]]
    table.data[token[0]] = kept
    clear = gradient.abs() > 1e-6
    assert clear.float().mean() > 0.5
    wanted = start - 0.1 * unit * gradient.sign()
    torch.testing.assert_close(found["text_encoder"][0, 0][clear], wanted[clear], rtol=1e-2, atol=1e-3)


def test_new_words_lower_the_loss_and_leave_the_model_as_it_was(subject: Subject) -> None:
    pipeline = subject.backbone.pipeline
    before = {name: value.clone() for name, value in pipeline.text_encoder.state_dict().items()}
    vocabulary = len(pipeline.tokenizer)
    drawn = TextualInversion(2, iterations=30, pictures=1, batch_size=8, learning_rate=0.03)(subject)
    assert drawn.numbers["loss_after"] < drawn.numbers["loss_before"]
    assert len(drawn.images) == 3
    assert len(pipeline.tokenizer) == vocabulary
    assert all(torch.equal(value, before[name]) for name, value in pipeline.text_encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in pipeline.text_encoder.parameters())


def test_no_iterations_draw_the_prompt_with_the_concepts_own_word(subject: Subject) -> None:
    drawn = TextualInversion(1, iterations=0, pictures=1)(subject).images
    plain = subject.decode(subject.sample(subject.prompts, subject.seeds, ""))
    torch.testing.assert_close(drawn, plain, rtol=1e-3, atol=1e-3)


# --- prompt tokens ---------------------------------------------------------------------------------------------------


def test_the_projection_is_the_nearest_point_of_the_simplex() -> None:
    points = torch.randn(4, 3, 9) * torch.logspace(-2, 1, 4)[:, None, None]
    found = onto_simplex(points)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 3))
    # By bisection: max(x − τ, 0) with the τ at which the sum is 1.
    low, high = points.amin(-1, keepdim=True) - 1, points.amax(-1, keepdim=True)
    for _ in range(60):
        middle = (low + high) / 2
        over = (points - middle).clamp(min=0).sum(-1, keepdim=True) > 1
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    torch.testing.assert_close(found, (points - low).clamp(min=0), rtol=1e-4, atol=1e-5)


def test_the_forward_pass_is_one_hot_and_the_gradient_goes_straight_through() -> None:
    relaxed = torch.rand(2, 3, 5, requires_grad=True)
    hard = straight_through(relaxed)
    torch.testing.assert_close(hard, torch.eye(5)[relaxed.argmax(-1)])
    weights = torch.randn(2, 3, 5)
    (gradient,) = torch.autograd.grad((weights * hard).sum(), relaxed)
    torch.testing.assert_close(gradient, weights)


def test_an_iteration_is_a_step_of_adamw_and_the_projection(subject: Subject) -> None:
    """Against gradients at the embeddings of the words that are really there."""
    pipeline, words = subject.backbone.pipeline, words_of(subject)
    one = PromptTokens(tokens=2, iterations=1, learning_rate=0.05, weight_decay=0.2, draws=1)
    prompts, pictures = tuple(dict.fromkeys(PROMPTS)), subject.examples(2)
    found = one.search(subject, words, prompts, pictures)

    start = torch.empty(2, 2, len(words.texts)).exponential_(generator=step_generator(3, "prompt-tokens", 0))
    start /= start.sum(-1, keepdim=True)
    texts = [
        " ".join([*(words.texts[i] for i in row), prompt])
        for row, prompt in zip(start.argmax(-1).tolist(), prompts, strict=True)
    ]
    read: list[torch.Tensor] = []
    hook = pipeline.text_encoder.get_input_embeddings().register_forward_hook(lambda m, a, out: read.append(out))
    text, _ = pipeline.encode_prompt(texts, "cpu", 1, False)
    hook.remove()
    latents, timesteps, noise = noised(subject, pictures, "prompt-tokens", 1)
    loss = (pipeline.unet(latents, timesteps, text).sample - noise).square().mean()
    gradient = torch.autograd.grad(loss, read[0])[0][:, 1:3] @ words.encoders["text_encoder"].embeddings().T
    moved = onto_simplex(start * (1 - 0.05 * 0.2) - 0.05 * gradient.sign())
    best = moved.topk(2, -1).values
    sure = best[..., 0] - best[..., 1] > 1e-6
    assert sure.any()
    assert torch.equal(found[sure], moved.argmax(-1)[sure])


def test_the_words_that_are_found_are_text_before_the_prompt(subject: Subject) -> None:
    drawn = PromptTokens(tokens=2, iterations=2)(subject)
    texts = drawn.numbers["prompts"]
    assert [text.split(" ", 2)[2] for text in texts] == list(dict.fromkeys(PROMPTS))
    assert drawn.found == f"base model {drawn.numbers['base_recognised']} of 3"
    asked = (texts[0], texts[1], texts[0])
    plain = subject.decode(subject.sample(asked, subject.seeds, ""))
    torch.testing.assert_close(drawn.images, plain, rtol=1e-4, atol=1e-4)


# --- token search ----------------------------------------------------------------------------------------------------


def test_children_are_crossed_or_mutated() -> None:
    parents, generator = torch.arange(5)[:, None].expand(5, 8).clone(), torch.Generator().manual_seed(0)
    crossed = TokenSearch(mutation=0.0, crossover=1.0).children(parents, 40, 100, generator)
    assert ((crossed[:, 1:] != crossed[:, :-1]).sum(1) <= 1).all()
    assert (crossed[:, 0] != crossed[:, -1]).any()
    mutated = TokenSearch(mutation=1.0, crossover=0.0).children(parents, 40, 100, generator)
    different = (mutated != mutated.mode(1).values[:, None]).sum(1)
    assert (different <= 1).all()
    assert (different == 1).sum() > 30
    same = TokenSearch(mutation=0.0, crossover=0.0).children(parents, 40, 100, generator)
    assert (same == same[:, :1]).all()


def test_the_search_comes_nearer_to_its_target_and_never_farther(subject: Subject) -> None:
    words = words_of(subject)
    texts = [" ".join(words.texts[i] for i in torch.randint(len(words.texts), (4,)).tolist())]
    target = _states(subject, texts)[0]
    distances = [
        TokenSearch(length=4, population=30, generations=count).evolve(
            subject, words, target, torch.Generator().manual_seed(1)
        )[1]
        for count in (0, 4, 20)
    ]
    assert distances[0] >= distances[1] >= distances[2]
    assert distances[2] < 0.9 * distances[0]
    chosen = torch.randint(len(words.texts), (3, 4))
    encoded_texts = [" ".join(words.texts[i] for i in row) for row in chosen.tolist()]
    states = subject.backbone.encode_prompts(encoded_texts)["prompt_embeds"].flatten(1)
    wanted = ((states - target) ** 2).sum(1)
    found = TokenSearch().distances(subject, words, chosen, target)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_the_target_is_the_prompt_led_on_by_the_concepts_direction(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets: list[torch.Tensor] = []

    def evolve(self: TokenSearch, subject: Subject, words: Any, target: torch.Tensor, *rest: Any) -> Any:
        targets.append(target)
        return torch.tensor([0, 1]), 0.0

    monkeypatch.setattr(TokenSearch, "evolve", evolve)
    drawn = TokenSearch(strength=2.5)(subject)
    states = [
        subject.backbone.encode_prompts([prompt])["prompt_embeds"].flatten()
        for prompt in (*dict.fromkeys(PROMPTS), *dict.fromkeys(subject.surrogates))
    ]
    direction = (states[0] - states[2] + states[1] - states[3]) / 2
    for target, state in zip(targets, states[:2], strict=True):
        torch.testing.assert_close(target, state + 2.5 * direction, rtol=1e-3, atol=1e-3)
    assert drawn.numbers["prompts"] == [" ".join(words_of(subject).texts[:2])] * 2


def test_what_the_base_model_draws_under_the_words_that_are_found_is_told(subject: Subject) -> None:
    """Counted by a judge that knows the base model's pictures of the words, but for one, and no others."""
    attack, shown = TokenSearch(generations=1, population=4), []
    subject.recognised = lambda images: shown.append(images) or torch.zeros(len(images), dtype=torch.bool)
    drawn = attack(subject)
    texts = dict(zip(dict.fromkeys(PROMPTS), drawn.numbers["prompts"], strict=True))
    asked = tuple(texts[prompt] for prompt in PROMPTS)
    with subject.adapter.disabled():
        wanted = subject.decode(subject.sample(asked, subject.seeds, ""))
    assert len(shown) == 1 and torch.equal(shown[0], wanted) and not torch.equal(drawn.images, wanted)
    assert (drawn.numbers["base_recognised"], drawn.found) == (0, "base model 0 of 3")
    subject.recognised = lambda images: (images == wanted).flatten(1).all(1) & (torch.arange(len(images)) > 0)
    again = attack(subject)
    assert (again.numbers["base_recognised"], again.found) == (2, "base model 2 of 3")
    assert torch.equal(again.images, drawn.images)
