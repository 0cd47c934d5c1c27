"""Which settings a run does not read. Whoever gives one is told, and not left to believe that it did something.

What depends on a method's parts alone is here, for all of them; what its own code passes over, a method says in its
`unread` (`fade.methods.base.Method`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fade.config import Config


def unread(config: Config) -> dict[str, str]:
    """Every setting that a run with these settings reads nowhere, by its dotted name, with the reason, which names the
    method, in words that follow "would be ignored:"."""
    declared = config.method.unread
    return {**unread_by_parts(config), **(declared(config) if declared is not None else {})}


def unread_by_parts(config: Config) -> dict[str, str]:
    """Those of `unread` that no run reads whose method has such parts. The seed is never among them: where nothing is
    random, every seed gives the same."""
    data, locate, overwrite, solving = config.data, config.locate, config.overwrite, config.closed_form
    method, named, found = config.method, f"the method {config.overwrite.method}", {}

    def skip(table: str, names: str, why: str) -> None:
        for name in names.split():
            found.setdefault(f"{table}.{name}", why)

    def others(table: str, *read: str) -> str:
        return " ".join(one.name for one in dataclasses.fields(getattr(config, table)) if one.name not in read)

    if not config.needs_latents:
        skip("data", others("data", "plurals"), f"{named} reads prompts alone. Leave it out, or choose both")
        found["gradient_checkpointing"] = f"{named} has no backward pass. Leave it out, or choose both"
    elif data.forget_images is not None and data.retain_images is not None:
        skip("data", "sampling_steps guidance_scale", f"{named} is given all pictures, and samples none")

    measuring = "" if method.accumulators else "passes batch_size per_sample"
    if method.edit is not None or locate.granularity == "none":
        why = f"{named} with granularity none keeps every weight. Leave it out, or choose granularity element, too"
        if method.edit is not None:
            why = f"{named} itself says which weights change, and how much. Leave it out, or choose another method"
            skip("locate", "granularity", why)
        skip("locate", "keep scaling tile guidance memory_budget", why)
        if method.edit is not None or config.solves or locate.saliency != "closed-form":
            skip("locate", "saliency", why)
        skip("locate", measuring, why)
    else:
        kind = config.saliency
        if kind == "closed-form":
            skip(
                "locate", f"{measuring} scaling guidance memory_budget",
                f"{named} has its solved edit choose the weights. Leave it out, or choose another saliency or the "
                "method distillation",
            )  # fmt: skip
        if kind != "guided":
            why = f"{named} with saliency {kind} has none. Leave it out, or choose the saliency guided"
            skip("locate", "guidance", why)
        if kind == "random":
            why = f"{named} with saliency random looks at nothing. Leave it out, or choose another saliency"
            skip("locate", measuring, why)
        if locate.granularity != "tile":
            skip("locate", "tile", f"{named} has granularity {locate.granularity}. Leave it out, or choose tile")

    if method.edit is not None:
        skip(
            "overwrite", "rank alpha",
            f"what {named} computes has the rank that it has. Leave it out, or choose the method distillation with "
            "parameters factors",
        )  # fmt: skip
    elif config.in_values:
        skip(
            "overwrite", "rank alpha",
            f"{named} changes the masked weights themselves, and no factors. Leave it out, or choose the method "
            "distillation with parameters factors",
        )  # fmt: skip
    if not config.trains:
        read = ("method", "parameters") if config.solves else ("method",)
        skip(
            "overwrite", others("overwrite", *read),
            f"{named} trains nothing. Leave it out, or choose both or distillation",
        )  # fmt: skip
    if not overwrite.stops:
        skip("overwrite", "stop_flat stop_every cooldown_steps", f"{named} with stop_forget 0 makes all steps")
    if overwrite.timesteps != "band":
        skip("overwrite", "timestep_band", f"{named} has timesteps {overwrite.timesteps}. Leave it out, or choose band")
    if not overwrite.dual_rate:
        skip("overwrite", "dual_bound", f"{named} with dual_rate 0 leaves the forget weight as it is")

    if not config.solves:
        chooses = config.saliency == "closed-form" and locate.granularity != "none"
        names = "hardening refit" if chooses else others("closed_form")
        skip("closed_form", names, f"{named} solves nothing. Leave it out, or choose closed-form or both")
    elif not config.trains:
        skip("closed_form", "refit", f"{named} does not train what it has solved. Leave it out, or choose both")
    if solving.retain_weight is not None:
        skip("closed_form", "retain_change left", f"{named} is given closed_form.retain_weight, and searches none")
    return found
