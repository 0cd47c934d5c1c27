"""Quantising: the merged weights go through fewer bits and back, W' = s · round(W / s), and the model is asked again.

A small edit may vanish in rounding: in language models unlearning was undone that way (Zhang et al., "Catastrophic
failure of LLM unlearning via quantization", arXiv 2410.16454). Nobody need attack for it, since models are quantised to
run. Every Linear and Conv2d of the denoiser is rounded, not only those that were edited:

* `int8`: s = max|W| / 127 of each output channel;
* `fp8`: 8-bit floats e4m3 (four bits of exponent, three of mantissa), s = max|W| / 448 of each output channel;
* `int4`: s = max|W| / 7 of each group of 64 consecutive weights of an output channel.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fade.evaluation.attacks.subject import Drawn, Subject
from fade.evaluation.attacks.weights import draw_changed

GROUP = 64
"""Weights that share a scale at 4 bits."""


@dataclass(frozen=True)
class Quantising:
    name: ClassVar[str] = "quantising"
    needs: ClassVar[str] = "the weights"

    kind: Literal["int8", "fp8", "int4"]

    def setting(self, subject: Subject) -> str:
        return f"every weight to {self.kind} and back"

    def __call__(self, subject: Subject) -> Drawn:
        return Drawn(draw_changed(subject, lambda weight: rounded(weight, self.kind)))


def rounded(weight: Tensor, kind: Literal["int8", "fp8", "int4"]) -> Tensor:
    """A weight [out, …] through fewer bits and back, in float32."""
    rows = weight.float().flatten(1)
    if kind == "int4":
        size = rows.shape[1]
        padded = torch.nn.functional.pad(rows, (0, math.ceil(size / GROUP) * GROUP - size))
        groups = padded.reshape(-1, GROUP)
        scale = _scale(groups, 7)
        back = ((groups / scale).round() * scale).reshape(len(rows), -1)[:, :size]
    elif kind == "int8":
        scale = _scale(rows, 127)
        back = (rows / scale).round() * scale
    else:
        scale = _scale(rows, torch.finfo(torch.float8_e4m3fn).max)
        back = (rows / scale).to(torch.float8_e4m3fn).float() * scale
    return back.reshape(weight.shape)


def _scale(rows: Tensor, most: float) -> Tensor:
    largest = rows.abs().amax(1, keepdim=True)
    return torch.where(largest > 0, largest / most, 1.0)


VARIANTS = (Quantising("int8"), Quantising("fp8"), Quantising("int4"))
