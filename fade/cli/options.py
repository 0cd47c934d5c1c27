"""Options that several commands take, and what is made of them."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from fade import bundled
from fade import config as settings
from fade.errors import FadeError

DATA, LOCATE, OVERWRITE = settings.DataConfig(), settings.LocateConfig(), settings.OverwriteConfig()


def choice(literal: Any) -> str:
    return "|".join(get_args(literal))


def of_method(default: Any, method: str = OVERWRITE.method) -> str:
    """The default of a setting that methods bring their own of, for help, with what one of them has."""
    shown = f"{default:g}" if isinstance(default, float) else default
    return f"Default: the method's own (fade methods NAME), with {method} {shown}."


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A diffusers folder, a hub id (owner/name), or a bundled model: "
        f"{', '.join(f'[bold]{name}[/bold]' for name in bundled.PACKAGES)}.",
    ),
]
Device = Annotated[
    str | None, typer.Option(metavar="cpu|cuda|cuda:N", help="Where to run. Default: a GPU where there is one.")
]
Dtype = Annotated[
    str | None, typer.Option(metavar="fp32|fp16|bf16", help="Dtype in which the model is loaded. Default fp32.")
]
Keep = Annotated[
    float | None,
    typer.Option(metavar="X", help=f"Fraction of target weights that may change, in (0, 1]. {of_method(LOCATE.keep)}"),
]
OverwriteMethod = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help="How: distillation trains the adapter, closed-form solves it (in the layers that read the prompt alone, "
        f"in about a second), both trains on from what is solved; more by fade methods. Default {OVERWRITE.method}.",
    ),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="NAME=VALUE", help="A setting that only the method has; repeat for several."),
]
TrainingSteps = Annotated[
    int | None, typer.Option(metavar="N", help=f"Most optimiser steps of stage 2. {of_method(OVERWRITE.steps)}")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed of everything random. Default 0.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output where it exists already.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
NoCache = Annotated[
    bool,
    typer.Option(
        "--no-cache", help="Draw everything, and keep no pictures for a rerun ($FADE_CACHE, else ~/.cache/fade)."
    ),
]
AdapterPath = Annotated[Path, typer.Option("--adapter", metavar="FILE", help="Adapter file (.safetensors).")]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Attach the adapter although it was trained on other weights.")
]
_AS_MEASURED = "Default: what a bundled model's accuracy was measured with, else"
DrawSteps = Annotated[
    int | None,
    typer.Option(
        "--steps", min=1, metavar="N", help=f"Denoising steps per image. {_AS_MEASURED} {bundled.Drawing.steps}."
    ),
]
JudgeModel = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="CLIP|python:M.F",
        help="Folder or hub id of a CLIP model that judges, or a function of yours, python:module.function, that is "
        "given pictures and returns a word of the classes or None for each; bundled models need none.",
    ),
]
Classes = Annotated[
    str | None,
    typer.Option("--classes", metavar="A,B,C", help="Words that judge tells apart, beside concept and surrogate."),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        metavar="X",
        help=f"Classifier-free guidance scale. {_AS_MEASURED} {bundled.Drawing.guidance_scale:g}.",
    ),
]


def config_from(file: Path | None, resume: bool = False, **changes: Any) -> settings.Config:
    """The file's settings, or the defaults of the method that is asked for, with every change that is not None.

    Raises FadeError for an option that was given, though it were at its default, and for a setting of the file, that a
    run does not read; not where one that was begun with it is to be resumed.
    """
    method = changes.pop("overwrite__method", None)
    if file is not None:
        config = settings.Config.load(file, method)
    else:
        config = settings.Config() if method is None else settings.Config.of(method)
    given = {name: value for name, value in changes.items() if value is not None}
    config = config.replace(**given)
    if not resume:
        passed_over = config.unread()
        options = {f"option {name}": f"options.{name}" for name in given.pop("options", {})}
        named = {name.rpartition("__")[2].replace("_", "-"): name.replace("__", ".") for name in given} | options
        for option, name in named.items():
            if name in passed_over:
                raise FadeError(f"--{option} would be ignored: {passed_over[name]}")
        config.refuse_ignored()
    return config


def options_from(given: list[str] | None) -> dict[str, Any] | None:
    """A method's own settings from texts such as guidance=2. Raises FadeError for what is none."""
    found: dict[str, Any] = {}
    for text in given or []:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise FadeError(f"--option {text!r} is no NAME=VALUE, such as guidance=2")
        try:
            found[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = value
    return found or None


def listed(words: str | None) -> list[str]:
    return [word for word in (words or "").split(",") if word.strip()]


def path_text(path: Path | None) -> str | None:
    return None if path is None else str(path)
