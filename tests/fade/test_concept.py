"""Words become prompts: surrogate prompts mirror forget prompts, and nothing retained shows the concept."""

from pathlib import Path

import pytest

from fade.concept import RETAIN_PROMPTS, Concept, concept_from_words, digitcanvas_concept, read_prompts
from fade.digitcanvas import DIGITS, STYLES, prompt
from fade.errors import FadeError


def test_templates_hold_concept_and_surrogate_in_the_same_places() -> None:
    concept = concept_from_words("Van Gogh", "a painter", ["art by {}", "{}, oil"])
    assert concept.forget_prompts == ("art by Van Gogh", "Van Gogh, oil")
    assert concept.surrogate_prompts == ("art by a painter", "a painter, oil")
    assert concept.retain_prompts == RETAIN_PROMPTS


def test_default_retain_prompts_leave_the_concept_out() -> None:
    concept = concept_from_words("Dog", "cat")
    assert len(concept.retain_prompts) == len(RETAIN_PROMPTS) - 4
    assert not any("dog" in p for p in concept.retain_prompts)


def test_digit_and_style_of_digitcanvas() -> None:
    digit = digitcanvas_concept("three", "eight")
    assert digit.forget_prompts == tuple(prompt("three", s) for s in STYLES)
    assert digit.surrogate_prompts == tuple(prompt("eight", s) for s in STYLES)
    assert len(digit.retain_prompts) == 9 * len(STYLES)
    style = digitcanvas_concept("neon", "plain")
    assert style.surrogate_prompts == tuple(prompt(d, "plain") for d in DIGITS)
    assert not any("neon" in p for p in style.retain_prompts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: concept_from_words("cat", "Cat "), "nothing would change"),
        (lambda: concept_from_words(" ", "cat"), "empty"),
        (lambda: concept_from_words("cat", "dog", ["a cat"]), "exactly one {}"),
        (lambda: concept_from_words("cat", "dog", ["{} and {}"]), "exactly one {}"),
        (lambda: digitcanvas_concept("three", "three"), "nothing would change"),
        (lambda: digitcanvas_concept("three", "neon"), "surrogate of 'three' must be one of zero"),
        (lambda: digitcanvas_concept("cat", "dog"), "DigitCanvas knows the digits"),
        (lambda: Concept("a", "b", ("x",), ("y", "z"), ("r",)), "as many surrogate prompts"),
        (lambda: Concept("a", "b", ("x",), ("y",), ()), "no retain prompt"),
    ],
)
def test_bad_requests(make, message: str) -> None:
    with pytest.raises(FadeError, match=message):
        make()


def test_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog  \n")
    assert read_prompts(tmp_path / "prompts.txt") == ("a cat", "a dog")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(FadeError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(FadeError, match="cannot read"):
        read_prompts(tmp_path / "missing.txt")


def test_one_text_is_no_list_of_texts() -> None:
    for name in ("templates", "retain"):
        with pytest.raises(FadeError, match=f"{name} must be a list of texts"):
            concept_from_words("cat", "dog", **{name: "a {}"})
    with pytest.raises(FadeError, match="retain must be a list of texts"):
        digitcanvas_concept("three", "eight", "the digit two")


def test_text_that_is_none_is_refused() -> None:
    with pytest.raises(FadeError, match="is no valid text"):
        concept_from_words("cat", "dog", ["\udcff{}"])
