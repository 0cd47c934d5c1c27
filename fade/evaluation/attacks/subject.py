"""What every attack is given and what it gives back, and the few pictures that attacks share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

import fade
from fade.cache_key import module_digest, sources_digest
from fade.errors import FadeError
from fade.evaluation.drawings import Kept, drawing_conditions

if TYPE_CHECKING:
    from fade.adapter import Adapter
    from fade.backbones import Backbone
    from fade.conditioning import Conditioning

_EXAMPLE_SEEDS = 1_000_000
"""Where the seeds of `Subject.examples` begin: far from those that pictures are counted with."""


class CannotAttackError(FadeError):
    """A model, a concept or a family that an attack cannot take; the message says why. Raised before it draws."""


@dataclass
class Subject:
    """An adapted model under attack, and the budget of the attack.

    The adapter is on when an attack begins, and is switched on again after it. Picture i is of `prompts[i]` and, where
    it begins from noise, of `seeds[i]`; each prompt asks for the concept that `recognised` looks for in it.
    """

    backbone: Backbone
    adapter: Adapter
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    recognised: Callable[[Tensor], Tensor]
    """The judge: images [n, 3, H, W] in [0, 1] -> bool [n], whether image i still shows the concept of prompt i."""
    steps: int = 20
    guidance_scale: float = 3.0
    batch_size: int = 64
    seed: int = 0
    """Of everything random in an attack but the noise that pictures begin from."""
    progress: bool = False
    forget: str = ""
    """The concept in words."""
    surrogates: tuple[str, ...] = ()
    """The prompts with what stands for the concept in its place, in their order."""
    retained: tuple[str, ...] = ()
    """Prompts of what was to be kept."""
    kept: Kept = field(default_factory=lambda: Kept(None), repr=False, compare=False)
    """Where `of_base` and `of_adapted` keep what they computed."""

    def of_base(
        self, what: str, depends_on: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Tensors by name, on the CPU, of a computation with the adapter off: the same for every adapter of the base,
        so it is done once for all of them. `depends_on`, ready for JSON, is what it depends on beside the model, the
        budget (`steps`, `guidance_scale`, `batch_size`) and the project's code."""

        def off() -> dict[str, Tensor]:
            with self.adapter.disabled():
                return compute()

        return self.kept({**self._base, "what": what, "depends_on": depends_on}, off)

    def of_adapted(
        self, what: str, depends_on: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`of_base`, with the adapter as it was when the attacks began."""
        return self.kept({**self._adapted, "what": what, "depends_on": depends_on}, compute)

    def note_model(self) -> None:
        """Takes down what model is attacked; called before any weight is changed."""
        _ = self._base, self._adapted

    @property
    def digests(self) -> dict[str, str]:
        """Of what is attacked, by the pipeline's parts: everything that pictures go through, the adapter included."""
        return {"denoiser": self._adapted["denoiser"], **self._adapted["pipeline"]}

    @functools.cached_property
    def _base(self) -> dict[str, Any]:
        with self.adapter.disabled():
            return {**self._conditions, "denoiser": module_digest(self.adapter.denoiser)}

    @functools.cached_property
    def _adapted(self) -> dict[str, Any]:
        return {**self._conditions, "denoiser": module_digest(self.adapter.denoiser)}

    @functools.cached_property
    def _conditions(self) -> dict[str, Any]:
        drawn = {"steps": self.steps, "guidance_scale": self.guidance_scale}
        return {**drawing_conditions(self.backbone, self.batch_size), **drawn, "code": _code()}

    def sample(
        self,
        prompts: tuple[str, ...] | Conditioning,
        seeds: tuple[int, ...],
        description: str,
        on_step: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Latents [n, C, h, w] of prompts, or of a conditioning, with the adapter as it is now."""
        return self.backbone.sample_latents(
            prompts, seeds, self.steps, self.guidance_scale, self.batch_size, progress=self.progress,
            description=description, on_step=on_step,
        )  # fmt: skip

    def decode(self, latents: Tensor) -> Tensor:
        """Images [n, 3, H, W], float32 in [0, 1], on the CPU."""
        return self.backbone.decode(latents, self.batch_size)

    @property
    def different_seeds(self) -> tuple[int, ...]:
        """As many seeds as pictures, no two the same, for an attack that draws every picture from one conditioning: of
        the same seed it would draw the same picture again, and count it as another."""
        return tuple(range(self.seeds[0], self.seeds[0] + len(self.seeds)))

    def drawn_by_base_model(self, prompts: tuple[str, ...], seeds: tuple[int, ...], description: str) -> Tensor:
        """Latents [n, C, h, w] of prompts with the adapter off."""
        found = self.of_base(
            "drawing",
            {"prompts": prompts, "seeds": seeds},
            lambda: {"latents": self.sample(prompts, seeds, description)},
        )
        return found["latents"].to(self.backbone.device)

    @functools.cached_property
    def concept_latents(self) -> Tensor:
        """What the base model draws of every prompt and seed: latents [n, C, h, w]. Drawn once."""
        return self.drawn_by_base_model(self.prompts, self.seeds, "drawing with the base model")

    @functools.cached_property
    def adapted_latents(self) -> Tensor:
        """What the adapted model draws of them: latents [n, C, h, w]."""
        found = self.of_adapted(
            "drawing",
            {"prompts": self.prompts, "seeds": self.seeds},
            lambda: {"latents": self.sample(self.prompts, self.seeds, "drawing with the adapter")},
        )
        return found["latents"].to(self.backbone.device)

    @functools.cached_property
    def base_recognised(self) -> int:
        """How many pictures of `concept_latents` the judge recognises."""
        return self.count(self.concept_latents)

    def count(self, latents: Tensor) -> int:
        """How many pictures the judge recognises, of latents [n, C, h, w]: of picture i the concept of prompt i."""
        return int(self.recognised(self.decode(latents)).sum())

    def counted_under(self, prompts: tuple[str, ...]) -> tuple[dict[str, int], str]:
        """How many pictures of the base model the judge recognises when it is asked with other prompts, one for each of
        the subject's: as a number of an attack that asks with them, and in words."""
        count = self.count(self.drawn_by_base_model(prompts, self.seeds, "drawing with the base model"))
        return {"base_recognised": count}, f"base model {count} of {len(prompts)}"

    def example_prompts(self, count: int) -> tuple[str, ...]:
        """The forget prompts in turn."""
        prompts = list(dict.fromkeys(self.prompts))
        return tuple(prompts[i % len(prompts)] for i in range(count))

    def examples(self, count: int) -> Tensor:
        """Pictures of the concept that an attacker has, as latents [count, C, h, w]: drawn by the base model from
        `example_prompts`, with seeds that no counted picture has. The first ones do not depend on the count."""
        return self.drawn_by_base(self.example_prompts(count))

    def drawn_by_base(self, prompts: tuple[str, ...]) -> Tensor:
        """Pictures for training, as latents [n, C, h, w]: the base model's, of seeds that no counted picture has. What
        was drawn already is not drawn again."""
        drawn = self._examples
        wanted = list(enumerate(prompts))
        missing = [one for one in wanted if one not in drawn]
        if missing:
            seeds = tuple(_EXAMPLE_SEEDS + place for place, _ in missing)
            latents = self.drawn_by_base_model(tuple(prompt for _, prompt in missing), seeds, "drawing examples")
            drawn |= dict(zip(missing, latents, strict=True))
        return torch.stack([drawn[one] for one in wanted])

    @functools.cached_property
    def _examples(self) -> dict[tuple[int, str], Tensor]:
        return {}

    @functools.cached_property
    def empty_prompt(self) -> Conditioning:
        """One row."""
        return self.backbone.encode_prompts([""])


@dataclass(frozen=True)
class Drawn:
    """What an attack drew: image i for prompt i of its subject, float32 [n, 3, H, W] in [0, 1] on the CPU, and numbers
    of its own, ready for JSON."""

    images: Tensor
    numbers: dict[str, Any] = field(default_factory=dict)
    found: str = ""
    """What the count of pictures does not tell, in a few words for a table."""


class Attack(Protocol):
    """One way to get a forgotten concept back: a frozen dataclass whose fields are its settings, ready for JSON; their
    types say what they may be (`fade.evaluation.attacks.settings`).

    It leaves weights, adapter and gradients as they were. What it cannot attack it refuses with CannotAttackError,
    before it draws.
    """

    name: ClassVar[str]
    """As it is called on the command line; several settings of one attack share it."""
    needs: ClassVar[str]
    """What whoever attacks must have."""

    def setting(self, subject: Subject) -> str:
        """In a few words, for a table."""
        ...

    def __call__(self, subject: Subject) -> Drawn: ...


@functools.cache
def _code() -> str:
    """Digest of the project's sources: attacks go through most of them (noise, prompts, losses, drawing), and what was
    kept is not taken for what another version would compute."""
    return sources_digest(Path(fade.__file__).parent)
