"""The output folder of one unlearning run: who may use it, what was asked for, and what an interruption left.

    adapter.safetensors, run.json   the result
    latents.safetensors             the latents, which a later run with the same request reuses
    request.json                    what was asked for, what it was begun with, what it has cost   } these only while
    prompts.safetensors             the prompts, encoded                                           } the run is
    masks.safetensors               what stage 1 located                                           } unfinished
    checkpoint.safetensors          how far stage 2 is                                             }
    .fade.lock                      held while a run is going on

Whatever moment a process is killed at, each of these files is whole or absent, and says what it was made with; so a
resumed run either ends bit for bit as an uninterrupted one or is told in one line what does not fit.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fade import processes
from fade.adapter import Adapter, versions
from fade.backbones import Backbone
from fade.conditioning import Conditioning, EncodedPrompts
from fade.errors import FadeError
from fade.files import (
    WRITE_ERRORS,
    atomic_write,
    check_writable,
    digest,
    read_tensors,
    reason,
    remove_parts,
    write_tensors,
)
from fade.latents import Latents
from fade.measure import Measurement
from fade.regions import matrix_shape
from fade.saliency import Located
from fade_kernels import BitMask

ADAPTER_FILE, RUN_FILE, LATENTS_FILE = "adapter.safetensors", "run.json", "latents.safetensors"
REQUEST_FILE, MASKS_FILE, CHECKPOINT_FILE = "request.json", "masks.safetensors", "checkpoint.safetensors"
PROMPTS_FILE = "prompts.safetensors"
LOCK_FILE = ".fade.lock"
REQUEST = ("concept", "config", "fingerprint")
"""The tables of a request; a run that differs in them is another run."""

LOSSES = ("forget", "retain", "held_out_forget", "held_out_retain")
"""What a checkpoint records beside its tensors: numbers by step, two lists of the same steps each."""

_AGAIN = "start again with --overwrite"


@dataclass(frozen=True)
class Checkpoint:
    """Where stage 2 keeps its state. `origin` names what it was reached from; a file of another origin is refused."""

    path: Path
    origin: dict[str, str]
    on_save: Callable[[], None] | None = None
    """Called after every save."""

    def save(self, tensors: Mapping[str, Tensor], losses: dict[str, list[float]]) -> None:
        with _kept_when_full(self.path):
            write_tensors(self.path, tensors, {"origin": self.origin, "losses": losses})
        if self.on_save is not None:
            self.on_save()

    def load(self) -> tuple[dict[str, Tensor], dict[str, list[float]]] | None:
        """Tensors and losses as saved, None where nothing was. Raises FadeError for what does not fit this run."""
        if not self.path.exists():
            return None
        try:
            tensors, record = read_tensors(self.path)
            if record["origin"] != self.origin:
                raise FadeError("it was made with other settings, latents or masks")
            losses = {name: [float(loss) for loss in record["losses"][name]] for name in LOSSES}
            if any(len(losses[f"{where}forget"]) != len(losses[f"{where}retain"]) for where in ("", "held_out_")):
                raise FadeError("its losses are of different steps")
            if not all(math.isfinite(loss) for values in losses.values() for loss in values):
                raise FadeError("its losses are not finite")
        except (FadeError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise self.misfit(error) from error
        return tensors, losses

    def misfit(self, error: object) -> FadeError:
        return FadeError(f"the checkpoint {self.path} does not fit this run ({error}); {_AGAIN}")


class RunFolder:
    """One run's folder, locked; made by `open_run_folder`.

    `costs` are the seconds and peak memory of each stage so far, those of interrupted parts included.
    """

    def __init__(self, path: Path, state: dict[str, Any], resumed: bool) -> None:
        self.path = path
        self.resumed = resumed
        self.costs = {name: Measurement(*cost) for name, cost in state.pop("costs", {}).items()}
        self._state = state
        self._has_prompts = False

    @property
    def latents_file(self) -> Path:
        return self.path / LATENTS_FILE

    def keep(self) -> None:
        """Writes the request with all that is known by now."""
        for cost in self.costs.values():
            cost.update()
        costs = {name: [cost.seconds, cost.peak_memory_bytes] for name, cost in self.costs.items()}
        _write_json(self.path / REQUEST_FILE, {**self._state, "costs": costs})

    def abandon(self) -> None:
        """Makes a run that begins one that was never begun, so that its folder is free; a resumed one stays."""
        if not self.resumed:
            (self.path / REQUEST_FILE).unlink(missing_ok=True)

    def prompts_before(self, prompts: Sequence[str], backbone: Backbone) -> EncodedPrompts | None:
        """These prompts as an interrupted run encoded them; None where it had not, or with another text encoder.

        What is damaged costs a warning and being encoded again. The latents must be there: they are made with all that
        encoding depends on.
        """
        path = self.path / PROMPTS_FILE
        if not path.exists():
            return None
        try:
            tensors, record = read_tensors(path)
            if record != self._prompts_record(prompts):
                return None
            encoded = EncodedPrompts(prompts, Conditioning.from_tensors(tensors).to(backbone.device))
        except (FadeError, LookupError, TypeError, ValueError, AttributeError) as error:
            warnings.warn(f"the prompts of the interrupted run are encoded again: {error}", stacklevel=2)
            return None
        self._has_prompts = True
        return encoded

    def _prompts_record(self, prompts: Sequence[str]) -> dict[str, Any]:
        return {"request": read_tensors(self.latents_file)[1]["request"], "prompts": list(prompts)}

    def begin_with(self, latents: Latents, prompts: EncodedPrompts, backbone: Backbone) -> None:
        """Keeps what the stages depend on beside the request, or compares it with what an interrupted run began with.

        Raises FadeError where the latents, their prompts, the text encoder or the noise schedule are other ones.
        """
        inputs = {"latents": _latents_digest(latents), "sketch": _sketch(latents, prompts, backbone)}
        before = self._state.get("inputs")
        if not self._has_prompts:
            record = self._prompts_record(prompts.prompts)
            write_tensors(self.path / PROMPTS_FILE, prompts.conditioning.tensors(), record)
        if before is None:
            self._state["inputs"] = inputs
            self.keep()
        elif before["latents"] != inputs["latents"]:
            raise FadeError(
                f"the pictures, captions or latents of the run in {self.path} are not those it was begun with; put "
                f"them back and resume, or {_AGAIN}"
            )
        elif not _close(before["sketch"], inputs["sketch"], backbone.dtype):
            raise FadeError(
                f"the run in {self.path} was begun with another text encoder, tokenizer or scheduler; resume with the "
                f"same, or {_AGAIN}"
            )

    def checkpoint(self, located: Located) -> Checkpoint:
        masks = digest({name: mask.words for name, mask in located.masks.items()})
        return Checkpoint(self.path / CHECKPOINT_FILE, {**self._origin, "masks": masks}, self.keep)

    @property
    def _origin(self) -> dict[str, str]:
        request = json.dumps({name: self._state[name] for name in REQUEST}, sort_keys=True)
        return {
            "request": hashlib.sha256(request.encode()).hexdigest(),
            "latents": self._state["inputs"]["latents"],
        }

    def keep_located(self, located: Located) -> None:
        words, record = located_parts(located)
        write_tensors(self.path / MASKS_FILE, words, {"origin": self._origin, **record})

    def located_before(self, layers: Mapping[str, nn.Module]) -> Located | None:
        """What an interrupted run located in `layers`; None where it had not come that far.

        Masks that are damaged or of something else cost a warning and being made again, nothing else.
        """
        path = self.path / MASKS_FILE
        if not path.exists():
            return None
        try:
            words, record = read_tensors(path)
            if record.pop("origin") != self._origin:
                raise FadeError("they were made with other settings or latents")
            shapes = {name: matrix_shape(m) for name, m in layers.items()}
            recorded = {name: tuple(shape) for name, shape in record["shapes"].items()}
            if recorded != shapes or words.keys() != shapes.keys():
                raise FadeError("they are another model's")
            located = located_whole(words, record)
            if located.selected != sum(mask.count for mask in located.masks.values()):
                raise FadeError("they select another number of weights than they say")
        except (FadeError, LookupError, TypeError, ValueError, AttributeError) as error:
            warnings.warn(f"the masks of the interrupted run are made again: {error}", stacklevel=2)
            return None
        return located

    def finish(self, adapter: Adapter) -> None:
        """Writes the result, then removes what only an unfinished run needs. Raises FadeError where it cannot."""
        with _kept_when_full(self.path):
            adapter.save(self.path / ADAPTER_FILE)
            _write_json(self.path / RUN_FILE, adapter.metadata)
        _remove_leftovers(self.path)


def located_parts(located: Located) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The words of the masks by layer, and all else as JSON has it."""
    record = {
        "layers": located.layers, "threshold": located.threshold,
        "selected": located.selected, "total": located.total, "plan": located.plan,
        "shapes": {name: list(mask.shape) for name, mask in located.masks.items()},
    }  # fmt: skip
    return {name: mask.words for name, mask in located.masks.items()}, record


def located_whole(words: Mapping[str, Tensor], record: Mapping[str, Any]) -> Located:
    """What was located, from its `located_parts`."""
    masks = {name: BitMask.from_words(words[name], tuple(shape)) for name, shape in record["shapes"].items()}
    return Located(masks=masks, **{name: value for name, value in record.items() if name != "shapes"})


@contextlib.contextmanager
def _kept_when_full(path: Path) -> Iterator[None]:
    """Says of a file that cannot be written how to go on: what the run had done so far is kept."""
    try:
        yield
    except (FadeError, *WRITE_ERRORS) as error:
        told = str(error) if isinstance(error, FadeError) else f"cannot write to {path}: {reason(error)}"
        raise FadeError(
            f"{told.removesuffix('; nothing was changed')}. The run is kept: mend that and finish it with --resume "
            "(in Python: resume=True)"
        ) from (error.__cause__ or error)


@contextlib.contextmanager
def open_run_folder(
    path: Path, request: dict[str, Any], backbone: Backbone, overwrite: bool = False, resume: bool = False
) -> Iterator[RunFolder]:
    """The folder, locked, ready for a new run or for going on with an interrupted one.

    `request` holds the tables of `REQUEST`. Raises FadeError where another run is going on in the folder, where it is
    in use and neither `overwrite` nor `resume` is given, and where there is nothing to resume or another request.
    """
    if path.exists() and not path.is_dir():
        raise FadeError(f"the output {path} is a file; name a folder")
    if resume and not path.is_dir():
        raise FadeError(f"there is nothing to resume in {path}: the run was never started; leave out --resume")
    check_writable(path / ADAPTER_FILE)
    with _locked(path):
        for name in (ADAPTER_FILE, RUN_FILE, LATENTS_FILE, REQUEST_FILE, PROMPTS_FILE, MASKS_FILE, CHECKPOINT_FILE):
            if (path / name).is_dir():
                raise FadeError(f"{path / name} is a folder, where a file of the run belongs; move it away")
            remove_parts(path / name)
        request = json.loads(json.dumps(request))
        environment = _environment(backbone)
        if resume:
            folder = RunFolder(path, _request_before(path, request), resumed=True)
            _warn_of_changes(folder._state["environment"], environment)
        else:
            _refuse_used(path, overwrite)
            for leftover in (CHECKPOINT_FILE, MASKS_FILE, PROMPTS_FILE):
                (path / leftover).unlink(missing_ok=True)
            folder = RunFolder(path, {**request, "environment": environment}, resumed=False)
            folder.keep()
        yield folder


def _refuse_used(path: Path, overwrite: bool) -> None:
    if not overwrite and any(entry.name != LOCK_FILE for entry in path.iterdir()):
        going_on = " or --resume to go on" if (path / REQUEST_FILE).exists() else ""
        raise FadeError(f"the output folder {path} is in use; pass --overwrite to replace it{going_on}")


def _request_before(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What an interrupted run kept of its request. Raises FadeError where there is none, or of another request."""
    try:
        before = json.loads((path / REQUEST_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if (path / ADAPTER_FILE).exists():
            _remove_leftovers(path)
            state = "is complete; leave out --resume"
        elif (path / MASKS_FILE).exists() or (path / CHECKPOINT_FILE).exists():
            state = f"has lost its {REQUEST_FILE}; {_AGAIN}"
        else:
            state = "was never started; leave out --resume"
        raise FadeError(f"there is nothing to resume in {path}: the run {state}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise FadeError(f"{path / REQUEST_FILE} is damaged ({error}); {_AGAIN}") from error
    if not _is_request(before):
        raise FadeError(f"{path / REQUEST_FILE} is damaged or was not written by this release of FADE; {_AGAIN}")
    now, then = _flat(request), _flat({name: before[name] for name in REQUEST})
    changed = [key for key in now.keys() | then.keys() if now.get(key, ...) != then.get(key, ...)]
    changed.sort(key=lambda key: (key != "config.overwrite.method", key))  # which brings other settings
    names = dict.fromkeys("base model" if key.startswith("fingerprint.") else _shown(key) for key in changed)
    if names:
        raise FadeError(
            f"the run in {path} has another {', '.join(list(names)[:3])}; resume with the same settings, or {_AGAIN}"
        )
    return before


def _is_request(value: Any) -> bool:
    """Whether this is what `RunFolder.keep` writes, as far as it is read again."""
    if not isinstance(value, dict):
        return False
    tables = (*REQUEST, "environment", "costs")
    inputs = value.get("inputs", {"latents": "", "sketch": []})
    return (
        all(isinstance(value.get(name), dict) for name in tables)
        and all(_is_cost(cost) for cost in value["costs"].values())
        and isinstance(inputs, dict)
        and isinstance(inputs.get("latents"), str)
        and isinstance(inputs.get("sketch"), list)
        and all(type(number) is float for number in inputs["sketch"])
    )


def _is_cost(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) in (int, float) and 0 <= number < 2**60 for number in value)
    )


def _environment(backbone: Backbone) -> dict[str, Any]:
    """What a result's last bits may depend on, beside the request."""
    return {
        **versions(), "device": backbone.device.type, "threads": torch.get_num_threads(),
        "processes": processes.world(),
    }  # fmt: skip


def _warn_of_changes(before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"{name} {_shown(before.get(name, 'none'))} -> {value}"
        for name, value in sorted(now.items())
        if before.get(name) != value
    ]
    if changed:
        warnings.warn(
            f"the run was begun with something else ({', '.join(changed)}); it goes on, but may end a little different "
            "from an uninterrupted one",
            stacklevel=3,
        )


def _shown(value: Any) -> str:
    """What a file says, short and without characters that a terminal obeys."""
    return "".join(character for character in str(value)[:60] if character.isprintable())


def _remove_leftovers(path: Path) -> None:
    # The request first: without it the run is complete, whatever else is still there.
    for leftover in (REQUEST_FILE, CHECKPOINT_FILE, MASKS_FILE, PROMPTS_FILE):
        (path / leftover).unlink(missing_ok=True)


def _flat(value: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{path}{key}.") if isinstance(inner, dict) else {f"{path}{key}": inner}
    return flat


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _latents_digest(latents: Latents) -> str:
    prompts = json.dumps([latents.forget_prompts, latents.surrogate_prompts, latents.retain_prompts])
    words = torch.frombuffer(bytearray(prompts.encode()), dtype=torch.uint8)
    return digest({"forget": latents.forget, "retain": latents.retain, "prompts": words})


def _sketch(latents: Latents, prompts: EncodedPrompts, backbone: Backbone) -> list[float]:
    """A few numbers that are others where prompts are encoded, latents noised or targets formed in another way.

    Numbers and no digest, because their last bits may depend on the number of threads.
    """
    numbers = []
    for prompt in sorted(prompts.prompts):
        for tensor in prompts[prompt].tensors().values():
            embedding = tensor.detach().float().cpu().reshape(-1)
            direction = torch.randn(embedding.shape, generator=torch.Generator(device="cpu").manual_seed(0))
            numbers.append(torch.dot(embedding, direction) / embedding.norm().clamp_min(1e-12))
    steps = backbone.times(torch.linspace(0, backbone.time_span, 8)).to(latents.forget.device)
    clean = torch.ones_like(latents.forget[:1]).expand(len(steps), *latents.forget.shape[1:])
    for formed in (backbone.add_noise(clean, 2 * clean, steps), backbone.target(clean, 2 * clean, steps)):
        numbers += formed.float().flatten(1).mean(1).cpu()
    return [number.item() for number in numbers]


def _close(before: list[float], now: list[float], dtype: torch.dtype) -> bool:
    tolerance = max(1e-3, 32 * torch.finfo(dtype).eps)
    return len(before) == len(now) and all(
        math.isclose(first, second, rel_tol=tolerance, abs_tol=tolerance)
        for first, second in zip(before, now, strict=True)
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the operating system takes back from a process that dies.

    Raises FadeError where another run, of this process or another, holds it.
    """
    path = folder / LOCK_FILE
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise FadeError(f"cannot write {path}: {error.strerror}; name another folder") from error
        try:
            _lock(descriptor, folder)
            # The run before may have removed the file between the two calls: then the lock is on nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        # Removed while still held, so that nobody's lock is removed; Windows wants an open file closed first.
        if os.name == "nt":
            os.close(descriptor)
        with contextlib.suppress(OSError):
            path.unlink()
        if os.name != "nt":
            os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            raise FadeError(
                f"another run is going on in the output folder {folder}; wait for it to end, or name another folder"
            ) from error
        warnings.warn(f"{folder} cannot be locked ({error.strerror}): start no other run in it meanwhile", stacklevel=4)
