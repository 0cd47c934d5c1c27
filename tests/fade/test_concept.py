"""Words become prompts: surrogate prompts mirror forget prompts, and nothing retained shows the concept."""

from pathlib import Path

import pytest

from fade.concept import (
    RETAIN_PROMPTS,
    Concept,
    bundled_concept,
    concept_from_words,
    mentions,
    plural,
    read_prompts,
    substitute,
)
from fade.digitcanvas import DIGITS, STYLES, prompt
from fade.digitcanvas.bundled import MODEL as DIGITCANVAS
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
    digit = bundled_concept(DIGITCANVAS, "three", "eight")
    assert digit.forget_prompts == tuple(prompt("three", s) for s in STYLES)
    assert digit.surrogate_prompts == tuple(prompt("eight", s) for s in STYLES)
    assert len(digit.retain_prompts) == 9 * len(STYLES)
    style = bundled_concept(DIGITCANVAS, "neon", "plain")
    assert style.surrogate_prompts == tuple(prompt(d, "plain") for d in DIGITS)
    assert not any("neon" in p for p in style.retain_prompts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: concept_from_words("cat", "Cat "), "nothing would change"),
        (lambda: concept_from_words(" ", "cat"), "empty"),
        (lambda: concept_from_words("cat", "dog", ["a cat"]), "exactly one {}"),
        (lambda: concept_from_words("cat", "dog", ["{} and {}"]), "exactly one {}"),
        (lambda: bundled_concept(DIGITCANVAS, "three", "three"), "nothing would change"),
        (lambda: bundled_concept(DIGITCANVAS, "three", "neon"), "surrogate of 'three' must be one of zero"),
        (lambda: bundled_concept(DIGITCANVAS, "cat", "dog"), "DigitCanvas knows the digits"),
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
        bundled_concept(DIGITCANVAS, "three", "eight", "the digit two")


@pytest.mark.parametrize(
    "make",
    [
        lambda **given: concept_from_words("cat", "dog", **given),
        lambda retain: bundled_concept(DIGITCANVAS, "three", "eight", retain),
    ],
)
def test_an_empty_list_is_not_the_default(make) -> None:
    with pytest.raises(FadeError, match="retain is an empty list; give at least one, or leave it out"):
        make(retain=[])
    with pytest.raises(FadeError, match="retain must be a list of texts; 3 is none"):
        make(retain=["a house", 3])
    assert make(retain=iter(["a house"])).retain_prompts == ("a house",)


def test_an_empty_list_of_templates_is_not_the_default() -> None:
    with pytest.raises(FadeError, match="templates is an empty list"):
        concept_from_words("cat", "dog", [])


@pytest.mark.parametrize(
    ("concept", "found", "passed_over"),
    [
        ("man", ["a man", "Man!", "(man)", "the man's hat", "old-man", "1 man_walking", "«man»", "man"],
         ["woman", "a human", "mankind", "men", "Herman", "man2", "manège"]),
        ("cat", ["CAT", "cat’s eye", "the cats' cat", "a cat-like thing"], ["category", "cats", "concatenate", "cät"]),
        ("Van Gogh", ["van gogh", "VAN-GOGH style", "by van_gogh", "van\n gogh's", "van‑gogh"],
         ["vangogh", "van goghs", "van der gogh", "ivan gogh"]),
        ("spider-man", ["Spider Man", "a spider-man"], ["spider", "man", "spider-manx"]),
        ("can", ["a tin can", "the can's lid"], ["can't", "cans", "can’t"]),
        ("café", ["un cafe\u0301 noir", "CAFÉ"], ["cafe", "cafés"]),
        ("c++", ["in C++.", "c++"], ["c", "xc++"]),
        ("猫", ["可爱的猫在睡觉", "猫", "cat猫"], ["狗"]),
        ("แมว", ["รูปแมวน่ารัก"], ["หมา"]),
        ("고양이", ["고양이가 잔다"], ["강아지"]),
        ("कल", ["कल सुबह"], ["कला"]),
        ("Дом", ["белый дом,"], ["домик", "мадом"]),
        (".*", ["a .* b"], ["anything"]),
        ("  cat ", ["a cat"], ["dog"]),
        (" - ", [], ["a - b"]),
    ],
)  # fmt: skip
def test_a_concept_is_found_as_words(concept: str, found: list[str], passed_over: list[str]) -> None:
    assert [text for text in found if not mentions(text, concept)] == []
    assert [text for text in passed_over if mentions(text, concept)] == []


@pytest.mark.parametrize(
    ("text", "concept", "surrogate", "wanted"),
    [
        ("one carved in stone by someone, one", "one", "seven", "seven carved in stone by someone, seven"),
        ("a Cat, the cat's tail; a category", "cat", "dog", "a dog, the dog's tail; a category"),
        ("by Vincent van-gogh", "van gogh", "a painter", "by Vincent a painter"),
        ("cat cat", "cat", "a toy cat", "a toy cat a toy cat"),
        ("a cat", "cat", r"\1 \g<0>", r"a \1 \g<0>"),
        ("nothing here", "cat", "dog", "nothing here"),
    ],
)
def test_the_surrogate_takes_the_concepts_place_alone(text: str, concept: str, surrogate: str, wanted: str) -> None:
    assert substitute(text, concept, surrogate) == wanted


def test_plurals_are_an_option() -> None:
    assert not mentions("two cats", "cat") and mentions("two Cats", "cat", plurals=True)
    assert not mentions("a category of concats", "cat", plurals=True)
    assert substitute("two wild cats and a wild cat", "wild cat", "a fox", plurals=True) == "two foxes and a a fox"
    for one, many in {"man": "men", "snowman": "snowmen", "city": "cities", "boy": "boys", "glass": "glasses",
                      "a wild goose": "wild geese", "mongoose": "mongooses", "brush": "brushes"}.items():  # fmt: skip
        assert plural(one) == many
    with_them = concept_from_words("flower", "stone", plurals=True)
    assert len(with_them.retain_prompts) == len(concept_from_words("flower", "stone").retain_prompts) - 4
    assert not any("flowers" in prompt for prompt in with_them.retain_prompts)


@pytest.mark.parametrize("word", ["man", "car", "art", "train", "at", "s"])
def test_default_retain_prompts_are_dropped_by_words(word: str) -> None:
    kept = concept_from_words(word, "robot").retain_prompts
    assert {p for p in RETAIN_PROMPTS if p not in kept} == {
        p for p in RETAIN_PROMPTS if word in p.replace(",", "").split()
    }


def test_text_that_is_none_is_refused() -> None:
    with pytest.raises(FadeError, match="is no valid text"):
        concept_from_words("cat", "dog", ["\udcff{}"])
