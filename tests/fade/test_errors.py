"""Text from elsewhere is shown on one line, and nothing in it steers a terminal."""

import unicodedata

import pytest

from fade.errors import AdapterFileError, FadeError, WrongBaseError, printable


def test_what_steers_a_terminal_or_reorders_a_line_is_written_as_its_code() -> None:
    text = "a\x1b[2Jb\x9b31mc\u202ed\u2066e\ng\rh\x00i\u2028j\ud800k\U000e0041"
    assert printable(text) == r"a\x1b[2Jb\x9b31mc\u202ed\u2066e\ng\rh\x00i\u2028j\ud800k\U000e0041"


def test_no_control_or_format_character_but_the_joiners_is_left() -> None:
    for code in range(0x110000):
        character = chr(code)
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            assert printable(character) != character, hex(code)
        elif unicodedata.category(character) not in ("Cf", "Cn"):
            assert printable(character) == character, hex(code)
    for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C, 0xFEFF, 0xE0001):
        assert printable(chr(code)) != chr(code), hex(code)


def test_text_as_people_write_it_is_left_alone() -> None:
    for text in ("Van Gogh", "naïve café", "梵高", "می\u200cخواهم", "👩\u200d🎨", r"C:\new", "[bold] <b> $x$ 'q'"):
        assert printable(text) == text


@pytest.mark.parametrize("kind", [FadeError, AdapterFileError, WrongBaseError])
def test_errors_quote_it_so(kind: type[FadeError]) -> None:
    assert str(kind("the file \x1b]0;title\x07\nerror: x")) == r"the file \x1b]0;title\x07\nerror: x"
    assert str(kind()) == ""
