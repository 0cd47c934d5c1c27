"""The errors a user can cause and mend, and how text from elsewhere is shown. Every message says what is wrong and what
to do; the command line prints it on one line and exits with status 2."""

import re

# Controls (C0, C1), surrogates, and what changes how the text around it is laid out: bidirectional marks, embeddings,
# overrides and isolates, invisible characters, line separators, tags. Joiners stay: scripts and emoji need them.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)


def printable(text: object) -> str:
    """The text on one line, with every character that steers a terminal or reorders a line written as its code.

    For whatever comes from a file, a folder or a model and is shown to somebody: file names, metadata, layer names.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


class FadeError(ValueError):
    """Bad input or a state that the user can change. Base of every error this package raises on purpose.

    The message is `printable`, because it quotes what files say.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))


class AdapterFileError(FadeError):
    """An adapter file that is truncated, foreign, or inconsistent with itself."""


class WrongBaseError(FadeError):
    """An adapter that was trained on other weights than the pipeline's."""


class DivergedError(FadeError):
    """A loss that became NaN or infinite; the last good checkpoint is kept."""
