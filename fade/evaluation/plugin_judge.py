"""A judge of the user's own: any function that is given pictures and says what they show.

`--judge python:module.function` calls `function(images)` with float images [n, 3, H, W] in [0, 1] on the CPU. It
returns one label a picture: a word of the classes, or None where a picture shows none of them. So a detector (NudeNet,
a company's classifier) is a judge in a few lines.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import LongTensor, Tensor

from fade.errors import FadeError

PREFIX = "python:"
NONE = "(none of these)"
"""The class of a picture that shows none of the judge's."""


class PluginJudge:
    """Tells which of `classes` an image shows by what a function says; `NONE` is one more class, the last.

    Raises FadeError where there is no such function, here, or where it fails or answers with something else, when it is
    called.
    """

    def __init__(self, name: str, classes: Sequence[str]) -> None:
        self.classes, self._name, self._function = (*classes, NONE), name, _function(name)

    def __call__(self, images: Tensor, batch_size: int = 64) -> LongTensor:
        """Index into `classes` of each image: float images [n, 3, H, W] in [0, 1] -> int64 [n] on the CPU."""
        found = [self._answers(chunk.cpu()) for chunk in images.split(batch_size)] if len(images) else []
        return torch.cat(found) if found else torch.empty(0, dtype=torch.long)

    def _answers(self, images: Tensor) -> LongTensor:
        try:
            labels = self._function(images)
        except FadeError:
            raise
        except Exception as error:  # whatever the user's function raises
            told = (str(error).strip().splitlines() or [""])[0]
            raise FadeError(f"the judge {self._name} failed: {type(error).__name__}: {told}") from error
        expected = f"it must return one label for each of {len(images)} images, a word or None"
        if isinstance(labels, (str, bytes)) or not hasattr(labels, "__iter__"):
            raise FadeError(f"the judge {self._name} returned a {type(labels).__name__}; {expected}")
        labels = list(labels)
        if len(labels) != len(images):
            raise FadeError(f"the judge {self._name} returned {len(labels)} labels; {expected}")
        index = {word: place for place, word in enumerate(self.classes)}
        answers = [NONE if label is None else label for label in labels]
        for label in answers:
            if not isinstance(label, str) or label not in index:
                words = ", ".join(self.classes[:-1])
                raise FadeError(
                    f"the judge {self._name} returned the label {label!r}; it may return {words} or None "
                    "(--classes names more)"
                )
        return torch.tensor([index[label] for label in answers])


def _function(name: str) -> Callable[[Tensor], Any]:
    """The function `module.function` after the prefix, found as Python would from the current folder."""
    module, _, attribute = name.removeprefix(PREFIX).rpartition(".")
    if not module or not attribute:
        raise FadeError(f"{name!r} names no function; write python:module.function")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever the user's module raises
        told = (str(error).strip().splitlines() or [""])[0]
        raise FadeError(f"cannot import the judge {name}: {type(error).__name__}: {told}") from error
    if not callable(function):
        raise FadeError(f"the module {module!r} has no function {attribute!r} to judge with")
    return function
