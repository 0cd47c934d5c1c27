"""Feature extractors: what FID, KID, precision, recall and the LPIPS-like distance compare pictures by.

A bundled model's judges give their penultimate features; `--features` takes an image model of transformers on disk.
Numbers of different extractors are not comparable with one another, so each has a name, which the record keeps.
"""

import itertools
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fade.errors import FadeError
from fade.images import PictureFolder, readable, report_unreadable
from fade.judges import Classifiers
from fade.progress import progress_bar

_BATCH = 32


class FeatureExtractor(Protocol):
    """`name` says what it is. Pictures are float [n, 3, H, W] in [0, 1], results float32 on the CPU."""

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        """One vector a picture: [n, D]."""

    def maps(self, images: Tensor) -> list[Tensor]:
        """By layer, features by place: [n, C, h, w] each."""


class JudgeFeatures:
    """The penultimate features of a bundled model's judges, one after the other: what each tells its classes by."""

    def __init__(self, title: str, judges: Classifiers) -> None:
        self.name, self._judges = f"{title} classifiers, penultimate", judges

    def __call__(self, images: Tensor) -> Tensor:
        return self._judges.features(images)

    def maps(self, images: Tensor) -> list[Tensor]:
        return self._judges.maps(images)


class ModelFeatures:
    """A transformers image model in a folder: its pooled output, or the mean of its last states where it has none.

    Pictures go through the folder's own image processor, so the model sees what it was trained with. Raises FadeError
    where the folder holds no image model that transformers can load from safetensors without running its code.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        if not Path(folder).is_dir():
            raise FadeError(f"there is no folder {str(folder)!r}; --features takes the folder of an image model")
        try:
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            self._model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        # A damaged folder shows itself anywhere in the libraries that read it.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise FadeError(f"cannot load an image model of transformers from {str(folder)!r}: {reason}") from error
        self._model = getattr(self._model, "vision_model", self._model)  # of CLIP and its like
        if getattr(self._model, "main_input_name", None) != "pixel_values":
            raise FadeError(f"the model in {str(folder)!r} takes no pictures; --features needs an image model")
        self._model.eval().requires_grad_(False).float().to(device)
        self.name = f"{type(self._model).__name__}, {Path(folder).name}"

    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self._pooled(self._output(chunk)) for chunk in images.split(_BATCH)])

    def maps(self, images: Tensor) -> list[Tensor]:
        parts = []
        for chunk in images.split(_BATCH):
            if (hidden := getattr(self._output(chunk), "hidden_states", None)) is None:
                raise FadeError(f"the image model {self.name} does not give its hidden states; --features needs them")
            parts.append([_by_place(states) for states in hidden])
        return [torch.cat(layer) for layer in zip(*parts, strict=True)]

    @torch.no_grad()
    def _output(self, images: Tensor) -> Any:
        pixels = self._processor(levels(images), return_tensors="pt")["pixel_values"].to(self._model.device)
        return self._model(pixels, output_hidden_states=True)

    def _pooled(self, output: Any) -> Tensor:
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            states = output.last_hidden_state
            pooled = states.mean(1) if states.dim() == 3 else states.mean((2, 3))
        return pooled.flatten(1).float().cpu()


def features_of_folder(found: PictureFolder, side: int, features: FeatureExtractor, progress: bool = False) -> Tensor:
    """Of every picture in a folder, each a square of `side` pixels (`fade.images.read_square`): float32 [m, D].

    Read and shown to the extractor a batch at a time. Raises FadeError where none can be read; others that cannot be
    are skipped with a warning.
    """
    parts: list[Tensor] = []
    unreadable: dict[str, str] = {}
    images = (image for _, image in readable(found.pictures, side, unreadable))
    with progress_bar(f"features of {found.folder.name}", len(found.pictures), progress) as advance:
        while batch := list(itertools.islice(images, _BATCH)):
            pixels = np.stack([np.asarray(image) for image in batch])
            parts.append(features(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255))
            for _ in batch:
                advance()
    report_unreadable(found.folder, unreadable, bool(parts))
    return torch.cat(parts)


def levels(images: Tensor) -> list[np.ndarray]:
    """Pictures, float [n, 3, H, W] in [0, 1], as processors take them: uint8 [H, W, 3] each."""
    return [image.mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy() for image in images.cpu()]


def _by_place(states: Tensor) -> Tensor:
    """States by token, [n, tokens, C], as a map one token high; maps as they are."""
    states = states.float().cpu()
    return states if states.dim() == 4 else states.transpose(1, 2).unsqueeze(2)
