"""What every attack is given and what it gives back, and the few pictures that attacks share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from fade.adapter import Adapter
    from fade.backbones import Backbone
    from fade.conditioning import Conditioning

_EXAMPLE_SEEDS = 1_000_000
"""Where the seeds of `Subject.examples` begin: far from those that pictures are counted with."""


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

    @functools.cached_property
    def concept_latents(self) -> Tensor:
        """What the base model draws of every prompt and seed: latents [n, C, h, w]. Drawn once."""
        with self.adapter.disabled():
            return self.sample(self.prompts, self.seeds, "drawing with the base model")

    def examples(self, count: int) -> Tensor:
        """Pictures of the concept that an attacker has, as latents [count, C, h, w]: drawn by the base model from the
        same prompts in turn, with seeds that no counted picture has."""
        prompts = list(dict.fromkeys(self.prompts))
        chosen = tuple(prompts[i % len(prompts)] for i in range(count))
        with self.adapter.disabled():
            return self.sample(chosen, tuple(range(_EXAMPLE_SEEDS, _EXAMPLE_SEEDS + count)), "drawing examples")

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


class Attack(Protocol):
    """One way to get a forgotten concept back: a frozen dataclass whose fields are its settings, ready for JSON.

    It leaves weights, adapter and gradients as they were.
    """

    name: ClassVar[str]
    """As it is called on the command line; several settings of one attack share it."""
    needs: ClassVar[str]
    """What whoever attacks must have."""

    def setting(self, subject: Subject) -> str:
        """In a few words, for a table."""
        ...

    def __call__(self, subject: Subject) -> Drawn: ...
