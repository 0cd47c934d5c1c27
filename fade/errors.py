"""The errors a user can cause and mend. Every message says what is wrong and what to do; the command line prints it
on one line and exits with status 2."""


class FadeError(ValueError):
    """Bad input or a state that the user can change. Base of every error this package raises on purpose."""


class AdapterFileError(FadeError):
    """An adapter file that is truncated, foreign, or inconsistent with itself."""


class WrongBaseError(FadeError):
    """An adapter that was trained on other weights than the pipeline's."""


class DivergedError(FadeError):
    """A loss that became NaN or infinite; the last good checkpoint is kept."""
