"""ReTrack (arXiv 2509.13007): on the forgotten pictures' noised latents, denoise towards retained pictures.

Retraining without the concept minimises Σ_i q(z_t | x_i) ‖ε̂(z_t) − ε_i‖² over retained x_i, with ε_i the noise that
makes z_t of x_i. At a noised forget latent z_t = α z + σ ε this is, but for a constant, ‖ε̂ − Σ_i w_i ε_i‖² with

    w = softmax_i(−‖z_t − α x_i‖² / 2σ²),

which is the target here; of the w_i the k largest are kept and sum to 1. With k of all it is the unbiased loss. The
softmax is of differences to the largest exponent (log-sum-exp), or nothing would be left at small t, where the nearest
retained picture has all the weight. Reconstruction from the abstract: the weights, and that the retain half, with the
weight `retain_weight`, is the paper's regulariser of quality. z_t is asked with the concept's prompt.

Ours is which x_i there are for a prompt: where a model draws from prompts, retraining sees pictures with theirs, and of
the forgotten prompt none is retained. With `among="answer"` they are the retained pictures of what answers it, as those
of the forgotten picture's own prompt are where single pictures of Stable Diffusion are unlearned (SISS, ICLR 2025);
with "all", as in a model without prompts, the whole retain set's. Ours, too: the forget half is noised to the upper
60 % of the diffusion alone. Below, z_t looks like nothing but the forgotten picture, the nearest retained one is far
from it as measured in noise, and such targets are most of the loss: with them "three" had CRA 85 and UA 50 to 75.

On DigitCanvas (80 pictures) "three" had UA 100, IRA 98.6 and CRA 100, "neon" 100, 100 and 93.8.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fade.errors import FadeError
from fade.methods.base import AS_THE_MODEL_DRAWS, Method
from fade.noise import levels
from fade.objective import Batch, Objective


@dataclass(frozen=True)
class Options:
    """ReTrack's own settings."""

    neighbours: int = 10
    """k, how many retained pictures a target is made of; 0 all."""
    among: str = "answer"
    """Of which retained pictures: those whose prompt `answer`s the concept's, where there are such, or `all`."""

    def __post_init__(self) -> None:
        if self.among not in ("answer", "all"):
            raise FadeError(f"options.among must be answer or all, not {self.among!r}")
        if self.neighbours < 0:
            raise FadeError(f"options.neighbours must be 0 or more, not {self.neighbours}")


def neighbour_weights(
    noised: Tensor, retained: Tensor, alpha: Tensor, sigma: Tensor, neighbours: int, among: Tensor | None = None
) -> Tensor:
    """w [n, m] in float32 of noised latents [n, C, h, w] and retained ones [m, C, h, w], at levels [n, 1, 1, 1]; zero
    but for the k largest of each row (0: all of them) of those `among`, bool [n, m], at least one in each row."""
    alpha, sigma = alpha.flatten(1).double(), sigma.flatten(1).double()  # [n, 1]
    z, x = noised.flatten(1).double(), retained.flatten(1).double()
    apart = z.square().sum(1, keepdim=True) - 2 * alpha * (z @ x.T) + alpha.square() * x.square().sum(1)
    exponents = -apart / (2 * sigma.square())
    if among is not None:
        exponents = exponents.masked_fill(~among, -torch.inf)
    if 0 < neighbours < len(retained):
        kept = exponents.topk(neighbours, dim=1).indices
        exponents = torch.full_like(exponents, -torch.inf).scatter(1, kept, exponents.gather(1, kept))
    return exponents.softmax(1).float()


class Retained(Objective):
    """What ReTrack trains on."""

    def target(self, batch: Batch) -> Tensor:
        return self.forget_only(batch, self.retracked, self.backbone.target(batch.clean, batch.noise, batch.times))

    def retracked(self, half: Batch) -> Tensor:
        """The forget half's targets."""
        retained = self.training.latents.retain
        alpha, sigma = levels(self.backbone, half.noised, half.times)
        weights = neighbour_weights(half.noised, retained, alpha, sigma, self.options.neighbours, self.among(half))
        clean = (weights @ retained.flatten(1).float()).view(half.noised.shape)
        noise = (half.noised.float() - alpha * clean) / sigma
        return self.backbone.target(clean, noise, half.times)

    def among(self, half: Batch) -> Tensor:
        """Which retained pictures each of the half's may be denoised towards, bool [n, m]."""
        prompts, latents = self.training.prompts, self.training.latents
        answering = half.answers[:, None] == prompts.rows(latents.retain_prompts)
        if self.options.among == "all":
            return torch.ones_like(answering).to(half.noised.device)
        return (answering | ~answering.any(1, keepdim=True)).to(half.noised.device)


RETRACK = Method(
    name="retrack",
    summary="Trains the concept's noised pictures to be denoised towards their nearest retained pictures.",
    source="ReTrack, arXiv 2509.13007",
    settings={
        **AS_THE_MODEL_DRAWS,
        "locate__granularity": "none",
        "overwrite__forget_weight": 1.0,
        "overwrite__retain_weight": 1.0,
        "overwrite__retain_batch_size": 16,
        "overwrite__learning_rate": 1e-3,
        "overwrite__steps": 200,
        "overwrite__stop_forget": 0.0,
        "overwrite__pool": 0,
        "overwrite__timesteps": "band",
        "overwrite__timestep_band": (0.4, 1.0),
    },
    denoises=("retain",),
    options=Options,
    objective=Retained,
)
