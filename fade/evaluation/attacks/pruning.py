"""Pruning: of every weight matrix of the merged model the smallest entries by magnitude are set to zero (Han et al.,
arXiv 1506.02626), and the model is asked again.

Models are pruned to run faster; an edit of small numbers might be what goes first. Every Linear and Conv2d of the
denoiser loses the same share.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fade.evaluation.attacks.settings import Share
from fade.evaluation.attacks.subject import Drawn, Subject
from fade.evaluation.attacks.weights import draw_changed


@dataclass(frozen=True)
class Pruning:
    name: ClassVar[str] = "pruning"
    needs: ClassVar[str] = "the weights"

    share: Share
    """Of each weight's entries, set to zero."""

    def setting(self, subject: Subject) -> str:
        return f"{100 * self.share:g} % of every weight to zero"

    def __call__(self, subject: Subject) -> Drawn:
        return Drawn(draw_changed(subject, lambda weight: pruned(weight, self.share)))


def pruned(weight: Tensor, share: float) -> Tensor:
    """The weight without its round(share · n) entries of least magnitude; of equals, any."""
    gone = weight.abs().flatten().topk(round(share * weight.numel()), largest=False, sorted=False).indices
    return weight.flatten().index_fill(0, gone, 0).reshape(weight.shape)


VARIANTS = (Pruning(0.1), Pruning(0.3))
