"""The words of DigitCanvas: its ten objects, its eight styles, and the captions built from them.

They live apart from the data recipe so that a caller who only needs a prompt imports neither torch nor the digits.
The two crossed axes follow UnlearnCanvas (Zhang et al., 2024): objects and styles, each of which can be forgotten.
"""

from fade.bundled import known

DIGITS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# laser is neon in another hue, pencil stands beside ink: forgetting one of such a pair shows how precise a method is.
STYLES: tuple[str, ...] = ("plain", "ink", "pencil", "neon", "laser", "outline", "mosaic", "stripes")


def prompt(digit: str, style: str) -> str:
    """The caption the model was trained with, such as ``"the digit three in neon style"``.

    Raises:
        ValueError: ``digit`` is not in :data:`DIGITS` or ``style`` is not in :data:`STYLES`.
    """
    return f"the digit {known(digit, DIGITS, 'digit')} in {known(style, STYLES, 'style')} style"


def digit_prompt(digit: str) -> str:
    """The caption that leaves the style open, such as ``"the digit three"``.

    Raises:
        ValueError: ``digit`` is not in :data:`DIGITS`.
    """
    return f"the digit {known(digit, DIGITS, 'digit')}"


def style_prompt(style: str) -> str:
    """The caption that leaves the digit open, such as ``"a digit in neon style"``.

    Raises:
        ValueError: ``style`` is not in :data:`STYLES`.
    """
    return f"a digit in {known(style, STYLES, 'style')} style"
