"""DigitCanvas: the data recipe, the tokenizer, the shipped pipeline and judges, and the trainer that makes them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file
from typer.testing import CliRunner

from fade import digitcanvas
from fade.digitcanvas import DIGITS, MODEL_PATH, STYLES, check, data, judges, models, train
from fade.digitcanvas.data import Digits
from fade.errors import DivergedError, FadeError
from fade.judges import as_batch


@pytest.fixture(scope="module")
def held_out() -> Digits:
    return data.load_digits("held_out")


@pytest.fixture(scope="module")
def shipped_judges() -> judges.Judges:
    return digitcanvas.load_judges()


# Prompts ------------------------------------------------------------------------------------------------------------


def test_prompts_name_every_digit_and_style() -> None:
    assert digitcanvas.prompt("three", "neon") == "the digit three in neon style"
    assert digitcanvas.digit_prompt("nine") == "the digit nine"
    assert digitcanvas.style_prompt("ink") == "a digit in ink style"
    assert len(DIGITS) == 10
    assert len(set(STYLES)) == 8
    assert all(style.isalpha() for style in STYLES)


@pytest.mark.parametrize(("digit", "style"), [("ten", "neon"), ("three", "oil"), ("Three", "neon"), ("", "neon")])
def test_unknown_word_is_named_with_the_choices(digit: str, style: str) -> None:
    with pytest.raises(ValueError, match=r"unknown (digit|style) .*choose one of (zero|plain), "):
        digitcanvas.prompt(digit, style)


# Data ---------------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_balanced(held_out: Digits) -> None:
    seen = data.load_digits("train")
    assert torch.equal(seen.labels.bincount(), torch.full((10,), 450))
    assert torch.equal(held_out.labels.bincount(), torch.full((10,), 50))
    rows = torch.cat([seen.strokes, held_out.strokes]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 5000
    assert rows.min() == 0
    assert rows.max() == 1


def test_unknown_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="choose 'train' or 'held_out'"):
        data.load_digits("test")


@pytest.mark.parametrize("style", STYLES)
def test_drawing_is_deterministic_and_independent_of_the_batch(style: str, held_out: Digits) -> None:
    strokes = held_out.strokes[::37]
    pictures = data.draw(strokes, style)
    assert pictures.shape == (len(strokes), 3, 32, 32)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert torch.equal(pictures, data.draw(strokes.clone(), style))
    reversed_strokes = strokes.transpose(1, 2).contiguous().transpose(1, 2)
    assert not reversed_strokes.is_contiguous()
    torch.testing.assert_close(data.draw(reversed_strokes, style), pictures, rtol=0, atol=1e-6)
    torch.testing.assert_close(data.draw(strokes[3:4], style), pictures[3:4], rtol=0, atol=1e-6)
    torch.testing.assert_close(data.draw(strokes.double(), style).float(), pictures, rtol=0, atol=1e-6)
    assert data.draw(strokes[:0], style).shape == (0, 3, 32, 32)


def test_styles_differ_everywhere(held_out: Digits) -> None:
    pictures = data.draw_all(held_out).float() / 255
    for first, second in itertools.combinations(range(len(STYLES)), 2):
        difference = (pictures[first] - pictures[second]).abs().amax((1, 2, 3))
        assert difference.min() > 0.3, (STYLES[first], STYLES[second])


def test_near_neighbours_are_near(held_out: Digits) -> None:
    """Neon and laser, ink and pencil: of all styles, each is the other's nearest."""
    pictures = data.draw_all(held_out).float() / 255
    grey = pictures.mean(2).flatten(1)
    distance = torch.cdist(grey, grey)
    distance.fill_diagonal_(float("inf"))
    nearest = {STYLES[i]: STYLES[j] for i, j in enumerate(distance.argmin(1).tolist())}
    assert nearest["neon"] == "laser"
    assert nearest["laser"] == "neon"
    assert nearest["ink"] == "pencil"
    assert nearest["pencil"] == "ink"


def test_what_each_style_does_to_a_stroke() -> None:
    generator = torch.Generator().manual_seed(3)
    strokes = torch.rand(2, 32, 32, generator=generator, dtype=torch.float64)
    assert torch.equal(data.draw(strokes, "plain"), strokes[:, None].expand(-1, 3, -1, -1))
    blocks = data.draw(strokes, "mosaic").unfold(2, 4, 4).unfold(3, 4, 4)
    assert torch.equal(blocks, blocks[..., :1, :1].expand_as(blocks))
    stripes = data.draw(torch.ones_like(strokes), "stripes")
    assert torch.equal(stripes[:, :, 0], stripes[:, :, 4])
    assert not torch.equal(stripes[:, :, 0], stripes[:, :, 2])
    # A square without an edge inside: only its rim is drawn.
    square = torch.zeros(1, 32, 32)
    square[:, 8:24, 8:24] = 1
    outline = data.draw(square, "outline")
    assert torch.equal(outline[:, :, 16, 16], outline[:, :, 0, 0])
    assert (outline[:, :, 7, 16] - outline[:, :, 16, 16]).abs().max() > 0.5


def test_drawing_refuses_unknown_styles_and_shapes() -> None:
    with pytest.raises(ValueError, match="unknown style 'oil'"):
        data.draw(torch.zeros(1, 32, 32), "oil")
    with pytest.raises(ValueError, match=r"\[n, 32, 32\], got \[1, 28, 28\]"):
        data.draw(torch.zeros(1, 28, 28), "ink")


# Shipped model ------------------------------------------------------------------------------------------------------


def test_shipped_files_are_small_and_hold_no_pickle() -> None:
    files = [path for path in Path(digitcanvas.__file__).parent.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.suffix for path in files} <= {".py", ".md", ".json", ".txt", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 8_000_000


def test_every_word_of_a_caption_is_one_token() -> None:
    tokenizer = digitcanvas.load_pipeline().tokenizer
    for digit, style in itertools.product(DIGITS, STYLES):
        caption = digitcanvas.prompt(digit, style)
        assert tokenizer.tokenize(caption) == [word + "</w>" for word in caption.split()]
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert tokenizer.model_max_length == models.MAX_TOKENS


@pytest.mark.parametrize("text", ["a photo of a zebra", "zürich 漢字", "🙂", "thirty-three, 33!", "threeneon"])
def test_words_never_seen_tokenise_and_come_back(text: str) -> None:
    tokenizer = digitcanvas.load_pipeline().tokenizer
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.eos_token_id not in tokens
    assert tokenizer.decode(tokens).replace(" ", "") == text.replace(" ", "")
    padded = tokenizer(text * 9, padding="max_length", truncation=True).input_ids
    assert len(padded) == models.MAX_TOKENS
    assert padded[-1] == tokenizer.eos_token_id


def test_built_tokenizer_equals_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    built = models.build_tokenizer(tmp_path)
    assert built.get_vocab() == digitcanvas.load_pipeline().tokenizer.get_vocab()
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (MODEL_PATH / "tokenizer" / name).read_text(
            encoding="utf-8"
        )


def test_merges_take_the_most_frequent_pair_first() -> None:
    merges = models.learn_merges({"low": 5, "lower": 2, "newest": 6, "widest": 3})
    assert merges[:4] == [("e", "s"), ("es", "t</w>"), ("l", "o"), ("e", "w")]
    assert {"".join(pair) for pair in merges} >= {"low</w>", "lower</w>", "newest</w>", "widest</w>"}
    assert models.learn_merges({"aaaa": 1, "b": 2}) == [("a", "a"), ("a", "a</w>"), ("aa", "aa</w>")]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plain", [True, False])
def test_pipeline_loads_in_one_dtype_and_draws(dtype: torch.dtype | None, plain: bool) -> None:
    kwargs = {} if dtype is None else {"torch_dtype": dtype}
    if plain:
        pipeline = StableDiffusionPipeline.from_pretrained(MODEL_PATH, **kwargs)
        pipeline.set_progress_bar_config(disable=True)
    else:
        pipeline = digitcanvas.load_pipeline(**kwargs)
    expected = dtype or torch.float32
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {expected}
    assert pipeline.safety_checker is None
    generator = torch.Generator().manual_seed(1)
    prompts = [digitcanvas.prompt("three", "neon"), "something else entirely"]
    images = pipeline(prompts, num_inference_steps=2, guidance_scale=3.0, generator=generator).images
    assert [image.size for image in images] == [(32, 32), (32, 32)]
    assert all(len(image.getcolors(1024)) > 10 for image in images)


def test_vae_keeps_what_the_judges_see(held_out: Digits, shipped_judges: judges.Judges) -> None:
    vae = digitcanvas.load_pipeline().vae
    digits = Digits(held_out.strokes[::5], held_out.labels[::5])
    pictures = data.draw_all(digits).flatten(0, 1).float() / 255
    with torch.no_grad():
        latents = vae.encode(pictures * 2 - 1).latent_dist.mean
        decoded = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert (decoded - pictures).square().mean() < 0.004
    assert abs((latents * vae.config.scaling_factor).std().item() - 1) < 0.05
    style = torch.arange(len(STYLES)).repeat_interleave(len(digits))
    assert (shipped_judges.style(decoded) == style).float().mean() >= 0.99
    assert (shipped_judges.digit(decoded) == digits.labels.repeat(len(STYLES))).float().mean() >= 0.95


def test_model_draws_what_the_prompt_says(shipped_judges: judges.Judges) -> None:
    """One picture of each prompt at settings that are not those of the model card (its 640 pictures take longer)."""
    result = check.check_pipeline(digitcanvas.load_pipeline(), shipped_judges, samples=1, batch_size=80, seed=1234)
    assert result.pictures.shape == (10, 8, 1, 3, 32, 32)
    assert result.digit_right.float().mean() >= 0.95
    assert result.style_right.float().mean() >= 0.97


def test_words_left_out_leave_the_rest_to_chance(shipped_judges: judges.Judges) -> None:
    pipeline = digitcanvas.load_pipeline()
    generator = torch.Generator().manual_seed(5)
    prompts = [digitcanvas.digit_prompt("seven")] * 16 + [digitcanvas.style_prompt("laser")] * 16
    drawn = pipeline(prompts, num_inference_steps=20, guidance_scale=3.0, generator=generator, output_type="pt").images
    assert (shipped_judges.digit(drawn[:16]) == DIGITS.index("seven")).float().mean() >= 0.8
    assert (shipped_judges.style(drawn[16:]) == STYLES.index("laser")).float().mean() >= 0.9
    assert len(shipped_judges.style(drawn[:16]).unique()) >= 3
    assert len(shipped_judges.digit(drawn[16:]).unique()) >= 3


def test_check_does_not_depend_on_the_batch_size(shipped_judges: judges.Judges) -> None:
    pipeline = digitcanvas.load_pipeline()
    one = check.check_pipeline(pipeline, shipped_judges, samples=1, steps=1, batch_size=80)
    other = check.check_pipeline(pipeline, shipped_judges, samples=1, steps=1, batch_size=33)
    torch.testing.assert_close(one.pictures, other.pictures, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        check.check_pipeline(pipeline, shipped_judges, samples=0)


# Judges -------------------------------------------------------------------------------------------------------------


def test_judges_are_right_on_held_out_digits(shipped_judges: judges.Judges, held_out: Digits) -> None:
    accuracy = judges.judge_accuracy(shipped_judges, held_out)
    assert accuracy["digit"] >= 0.96
    assert accuracy["style"] >= 0.99


def test_judges_take_tensors_and_pil_alike(shipped_judges: judges.Judges, held_out: Digits) -> None:
    pictures = data.draw(held_out.strokes[::20], "ink").mul(255).round().byte()
    pil = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]
    tensor = pictures.float() / 255
    assert torch.equal(as_batch(pil, data.IMAGE_SIZE), tensor)
    assert torch.equal(shipped_judges.digit(pil), shipped_judges.digit(tensor))
    answers = shipped_judges.style(tensor.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
    assert answers.dtype == torch.int64
    assert torch.equal(answers, torch.full((25,), STYLES.index("ink")))
    for nothing in ([], tensor[:0]):
        assert shipped_judges.digit(nothing).shape == (0,)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "divide by 255"),
        (torch.zeros(3, 32, 32), ValueError, r"\[n, 3, 32, 32\]"),
        (torch.full((1, 3, 32, 32), -0.5), ValueError, r"lie in \[0, 1\]"),
        (torch.full((1, 3, 32, 32), float("nan")), ValueError, r"lie in \[0, 1\]"),
        ([Image.new("RGB", (64, 32))], ValueError, "32x32 pixels, got 64x32"),
        (["a.png"], TypeError, "PIL images"),
    ],
)
def test_judges_refuse_what_they_cannot_judge(
    shipped_judges: judges.Judges, images: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        shipped_judges.digit(images)


def test_folder_without_judges_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no judges in"):
        judges.load_judges(path=tmp_path)


# Trainer ------------------------------------------------------------------------------------------------------------

QUICK = train.Recipe(
    seed=3,
    digit_judge_steps=3,
    style_judge_steps=2,
    vae_steps=4,
    steps=5,
    batch_size=4,
    checkpoint_every=2,
    judge_batch_size=4,
    warmup_steps=2,
)


class Interrupting(Progress):
    """Progress that stops the run, as Ctrl-C would, after a number of training steps."""

    steps_left = 1_000_000

    def update(self, *args: object, **kwargs: object) -> None:
        self.steps_left -= 1
        if self.steps_left < 0:
            raise KeyboardInterrupt
        super().update(*args, **kwargs)


def quick_progress(steps: int = 1_000_000) -> Interrupting:
    progress = Interrupting(disable=True, console=Console(quiet=True))
    progress.steps_left = steps
    return progress


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    files = [*folder.glob("judges/*.safetensors"), *folder.glob("model/**/*.safetensors")]
    assert len(files) == 5
    return {f"{file.parent.name}/{file.name}/{name}": t for file in files for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def few_digits(held_out: Digits) -> Digits:
    return Digits(held_out.strokes[::25], held_out.labels[::25])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, few_digits: Digits) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train.train(folder, QUICK, few_digits, few_digits, quick_progress())
    return folder


def test_interrupted_training_ends_at_the_same_weights(uninterrupted: Path, few_digits: Digits, tmp_path: Path) -> None:
    # Stops in the style judge, in the VAE before and after its checkpoint, then in the denoiser after its checkpoint.
    for steps in (3, 2, 2, 4):
        with pytest.raises(KeyboardInterrupt):
            train.train(tmp_path, QUICK, few_digits, few_digits, quick_progress(steps))
    train.train(tmp_path, QUICK, few_digits, few_digits, quick_progress())
    expected, resumed = trained_weights(uninterrupted), trained_weights(tmp_path)
    assert expected.keys() == resumed.keys()
    for name in expected:
        assert torch.equal(expected[name], resumed[name]), name
    assert not list(tmp_path.rglob("*.tmp"))


def test_trained_folder_is_a_pipeline(uninterrupted: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(uninterrupted / "model")
    pipeline.set_progress_bar_config(disable=True)
    shipped = digitcanvas.load_pipeline()
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(pipeline, name).state_dict(), getattr(shipped, name).state_dict()
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
        assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
    images = pipeline("the digit one", num_inference_steps=1, output_type="pt").images
    assert images.shape == (1, 3, 32, 32)
    assert images.isfinite().all()


def test_seed_decides_the_weights(few_digits: Digits, tmp_path: Path, uninterrupted: Path) -> None:
    def digit_judge(seed: int) -> dict[str, torch.Tensor]:
        recipe = train.Recipe(**{**vars(QUICK), "seed": seed})
        folder = tmp_path / str(seed)
        pictures = data.draw_all(few_digits)
        train.train_judges(recipe, few_digits, pictures, folder, folder / "judges", quick_progress())
        return load_file(folder / "judges" / "digit.safetensors")

    expected = load_file(uninterrupted / "judges" / "digit.safetensors")
    again, other = digit_judge(QUICK.seed), digit_judge(QUICK.seed + 1)
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    assert not torch.equal(expected["0.weight"], other["0.weight"])


def test_training_lowers_the_loss(few_digits: Digits, tmp_path: Path) -> None:
    recipe = train.Recipe(**{**vars(QUICK), "vae_steps": 40, "checkpoint_every": 40})
    pictures = data.draw_all(few_digits)

    def error(vae: torch.nn.Module) -> float:
        batch = pictures[:, 0].float() / 127.5 - 1
        with torch.no_grad():
            return (vae(batch).sample - batch).square().mean().item()

    torch.manual_seed(recipe.seed)
    before = error(models.build_vae())
    assert error(train.train_vae(recipe, pictures, tmp_path, quick_progress())) < 0.7 * before


def test_checkpoint_of_another_recipe_is_refused(few_digits: Digits, uninterrupted: Path) -> None:
    longer = train.Recipe(**{**vars(QUICK), "steps": 9})
    with pytest.raises(FadeError, match="another recipe"):
        train.train(uninterrupted, longer, few_digits, few_digits, quick_progress())


def test_diverged_training_says_so(few_digits: Digits, tmp_path: Path) -> None:
    recipe = train.Recipe(**{**vars(QUICK), "vae_learning_rate": float("inf")})
    with pytest.raises(DivergedError, match="vae: the gradient is not finite at step 1"):
        train.train_vae(recipe, data.draw_all(few_digits), tmp_path, quick_progress())


def test_recipe_and_command_refuse_nothing_to_do() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1"):
        train.Recipe(steps=0)
    app = train.typer.Typer()
    app.command()(train.main)
    result = CliRunner().invoke(app, ["--output", "unused", "--steps", "0"])
    assert result.exit_code == 2
    assert "'--steps'" in result.output


@pytest.mark.parametrize("seed", [0, 1])
def test_captions_leave_words_out_at_the_stated_rates(seed: int) -> None:
    captions = train.build_captions(digitcanvas.load_pipeline().tokenizer)
    recipe = train.Recipe()
    count = 20_000
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    style = torch.randint(8, (count,), generator=generator)
    tokens = train.caption_batch(captions, labels, style, recipe, generator)
    kinds = {
        "full": captions["full"][labels, style],
        "digit": captions["digit"][labels],
        "style": captions["style"][style],
        "empty": captions["empty"].expand(count, -1),
    }
    rates = {kind: (tokens == wanted).all(1).float().mean().item() for kind, wanted in kinds.items()}
    assert sum(rates.values()) == pytest.approx(1)
    assert rates["empty"] == pytest.approx(recipe.empty_captions, abs=0.01)
    assert rates["digit"] == pytest.approx(recipe.digit_captions, abs=0.01)
    assert rates["style"] == pytest.approx(recipe.style_captions, abs=0.01)
