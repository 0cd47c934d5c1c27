"""`fade`: a thin skin over the Python functions. It reads options, calls one function and prints what came of it.

A command is a function of a file here and a line of `COMMANDS`. Nothing heavy is imported before a command runs, so
that `fade --help` answers at once. Everything a user can cause ends in one line on stderr and a status: 2 for bad
input, 3 for a requirement that is missed, 1 for a failing system, 130 for Ctrl-C.
"""

import ctypes
import errno
import io
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import typer

from fade import processes
from fade.cli import demo, draw, env, files, judge, methods, plan, unlearn
from fade.cli.output import one_line
from fade.errors import FadeError

COMMANDS = (
    demo.demo, unlearn.unlearn, draw.generate, judge.evaluate, judge.attack, files.merge, files.export, files.combine,
    files.inspect, methods.methods, plan.plan, env.env,
)  # fmt: skip

app = typer.Typer(
    name="fade",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make a diffusion model forget a concept. Start with: [bold]fade demo[/bold]",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in COMMANDS:
    app.command()(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or what the module says."""
    if arguments is None:  # a program of its own, whose allocator is nobody else's
        _keep_freed_memory()
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # On import the libraries speak up about optional parts that nothing here uses, later about names that they change
    # and about several adapters at once, which is what was asked for.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):  # an encoding that lacks a character must not end a command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers|transformers|peft")
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {one_line(message)}\n"
    if processes.launched():
        if arguments[0] != "unlearn":
            return _fail(f"fade {arguments[0]} runs in one process; start it without torchrun or accelerate launch", 2)
        if not processes.speaks():
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    try:
        with typer.main.get_command(app).make_context("fade", list(arguments)) as context:
            context.command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except _USAGE_ERROR as error:
        where = error.ctx.command_path if getattr(error, "ctx", None) else "fade"
        return _fail(f"{error.format_message().rstrip('.')}. See {where} --help", 2)
    except FadeError as error:
        system = isinstance(error, processes.OtherProcessError) or _is_the_systems(error.__cause__)
        return _fail(str(error), 1 if system else 2, lost=isinstance(error, processes.LostProcessError))
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        full = " (the disk is full; files that were there before are unharmed)" if error.errno == errno.ENOSPC else ""
        what = f"{error.filename}: " if error.filename else ""
        return _fail(f"{what}{error.strerror or error}{full}", 1)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_how_to_go_on(arguments), 130, "interrupted")
    except Exception as error:
        if os.environ.get("FADE_DEBUG"):
            raise
        told = (str(error).strip() or "no message").splitlines()[0]
        return _fail(f"{type(error).__name__}: {told} (unexpected: FADE_DEBUG=1 shows where; please report it)", 1)
    return 0


def _keep_freed_memory() -> None:
    """Has glibc keep what is freed for what is allocated next, instead of giving the pages of every larger tensor back
    and having them zeroed anew: on a CPU a sixth of an evaluation's time, at the same peak. Other C libraries are
    left as they are, and so is glibc where somebody has set it."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim, top_pad, mmap = -1, -2, -3  # malloc.h
    for parameter, size in ((mmap, 1 << 25), (trim, (1 << 31) - 1), (top_pad, 1 << 26)):
        mallopt(parameter, size)


def _is_the_systems(cause: BaseException | None) -> bool:
    """Whether what a FadeError tells of is a failing system: a full or broken disk, and not bad input."""
    full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    return full or (type(cause).__name__ == "SafetensorError" and "I/O error" in str(cause))


_USAGE_ERROR = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def _how_to_go_on(arguments: list[str]) -> str:
    if arguments[0] != "unlearn":
        return "nothing that was there before is harmed; run the same command again"
    given = dict(zip(arguments, [*arguments[1:], ""], strict=True))
    output = next((a.partition("=")[2] for a in arguments if a.startswith("--output=")), given.get("--output", ""))
    if not (Path(output) / "request.json").is_file():
        return "nothing was started yet, and nothing that was there before is harmed; run the same command again"
    again = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    return f"go on with: {shlex.join(['fade', *again, '--resume'])}"


def _fail(message: str, status: int, word: str = "error", lost: bool = False) -> int:
    """Tells how the command failed, in one of several processes; `lost` is whether for want of another of them."""
    if processes.speaks(lost):
        print(f"{word}: {one_line(message)}", file=sys.stderr)
    return status
