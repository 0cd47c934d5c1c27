"""One run in several processes: which of them this one is, its share of the work, sums over all, one end for all.

`torchrun -m fade unlearn …` and `accelerate launch -m fade unlearn …` start the same program several times and say so
in the environment; a program may also have made a process group of its own. Within `together()` all of them go through
one run. Outside of it, and where there is a single process, everything here gives back what it was given and
torch.distributed is left alone.

That nobody waits for a process that has failed rests on one rule: data are exchanged only after all have told that they
are well, and a process that leaves `together()` by an error tells that instead, at the same point of the others' walk.
So every exchange is either made by all or ends in the same error on all.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fade import errors
from fade.errors import FadeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PATIENCE = timedelta(hours=2)
"""How long a process waits for another at an exchange. One that has ended is noticed at once, so that this is for those
that hang alone; the first may take long over pictures that the others only receive."""

JOINING = timedelta(minutes=10)
"""How long all processes may take to be there."""

_AT_ONCE = 2**22
"""Numbers of small tensors that are summed as one."""


class OtherProcessError(FadeError):
    """Another process of the run failed, and not for bad input."""


class LostProcessError(OtherProcessError):
    """Another process of the run ended without a word, or does not answer."""


@dataclass
class _Group:
    rank: int
    world: int
    control: Any
    """A process group for tensors in host memory, whatever the program's own group is for."""
    thread: int
    machines: tuple[str, ...] = ()
    """The host name of each process."""
    over: bool = False
    """Whether all know of an error, so that nothing is exchanged any more."""


_group: _Group | None = None
_store: Any = None
_joined = 0


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    number = os.environ.get("WORLD_SIZE", "")
    return number.isdecimal() and int(number) > 1 and all(name in os.environ for name in names)


def local_rank() -> int | None:
    """Which of the launched processes on this machine this is, None where none were launched."""
    return int(os.environ["LOCAL_RANK"]) if launched() else None


def rank() -> int:
    """Which of the run's processes this is, from 0."""
    return 0 if _group is None else _group.rank


def world() -> int:
    """How many processes go through the run."""
    return 1 if _group is None else _group.world


def on_this_machine() -> int:
    """How many of the run's processes are on this machine."""
    return 1 if _group is None else _group.machines.count(socket.gethostname())


def first() -> bool:
    """Whether this is the process that reads pictures, writes files and speaks."""
    return rank() == 0


def speaks(lost: bool = False) -> bool:
    """Whether this process is the one that tells how the program ended: the first, or, where a process was `lost` (it
    may be that one), whichever notices it first."""
    if not launched():
        return True
    if lost and _store is not None:
        try:
            return _store.add("fade told of a lost process", 1) == 1
        except RuntimeError:  # it was lost, too
            return True
    return os.environ["RANK"] == "0"


# --- shares ----------------------------------------------------------------------------------------------------------


def share(count: int) -> slice:
    """This process's part of `count` samples: adjacent, and of all processes together each sample once. Empty on some
    where there are fewer samples than processes."""
    return slice(rank() * count // world(), (rank() + 1) * count // world())


def largest_share(count: int) -> int:
    """The most samples that `share` gives a process."""
    return -(-count // world())


def own(numbers: range) -> range:
    """Every so-many-th of the numbers, this process's: a whole number of batches for each."""
    return numbers[rank() :: world()]


# --- a run -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All processes go through the block as one run: what one raises ends it on all, and all leave it when all are
    through. Within another such block it changes nothing. On other processes than the first, warnings are not shown.

    Joins the processes that a launcher started, and leaves them at the end; a process group that is there is used as it
    is. Raises FadeError where they cannot reach one another, what another process raised (an error that is no FadeError
    as an OtherProcessError that tells it) and LostProcessError where one is gone.
    """
    global _group
    if _group is not None:
        if _group.thread != threading.get_ident():
            raise FadeError("several processes go through one run at a time; wait for the one in the other thread")
        yield
        return
    with _default_group() as several:
        if not several:
            yield
            return
        import torch.distributed as dist

        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        _group = _Group(dist.get_rank(), dist.get_world_size(), control, threading.get_ident())
        try:
            _group.machines = tuple(everyones(socket.gethostname()))
            with warnings.catch_warnings():
                if not first():
                    warnings.simplefilter("ignore")
                yield
            with _exchange():
                _group.over = True
        except BaseException as error:
            if not _group.over:
                with contextlib.suppress(LostProcessError), _exchange(error):
                    pass
            raise
        finally:
            _group = None
            dist.destroy_process_group(control)


@contextlib.contextmanager
def _default_group() -> Iterator[bool]:
    """Whether there are several processes; makes their group where a launcher started them and there is none."""
    import torch
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        yield dist.get_world_size() > 1
    elif not launched():
        yield False
    else:
        global _store, _joined
        on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
        if on_gpu and local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
        try:
            if _store is None:
                _store, _, _ = next(dist.rendezvous("env://", timeout=JOINING))
            _joined += 1  # a group that is made again must not find the addresses of the one before
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", store=dist.PrefixStore(f"fade {_joined}", _store),
                rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]), timeout=PATIENCE,
            )  # fmt: skip
        except (RuntimeError, ValueError, OSError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            told = (str(error).splitlines() or [type(error).__name__])[0]
            raise FadeError(
                f"the {os.environ['WORLD_SIZE']} processes cannot reach one another at {where} ({told}); start them "
                "with torchrun or accelerate launch, and unset WORLD_SIZE to run as one"
            ) from error
        try:
            yield True
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def _exchange(error: BaseException | None = None) -> Iterator[None]:
    """What is done in the block, all processes do, if all are well: each tells the others before whether it is, or of
    its `error`. Ctrl-C waits until the exchange is through, or the others would be left in the middle of it.

    Raises, where this process is well and another is not, what the first such process tells; LostProcessError where one
    of them is gone.
    """
    came: list[tuple[Any, ...]] = []
    handler = None
    if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
        handler = signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        _hear_of_others(error)
        yield
    except RuntimeError as failed:
        _group.over = True
        told = (str(failed).splitlines() or [type(failed).__name__])[0]
        raise LostProcessError(
            f"another process of this run has ended or does not answer ({told}); start all of them again, with "
            "--resume (in Python: resume=True) where there is an output folder"
        ) from failed
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
    if came:
        handler(*came[0])


def _hear_of_others(error: BaseException | None) -> None:
    import torch
    import torch.distributed as dist

    failed = [torch.zeros(1, dtype=torch.uint8) for _ in range(world())]
    dist.all_gather(failed, torch.full((1,), error is not None, dtype=torch.uint8), group=_group.control)
    if not any(failed):
        return
    teller = next(process for process in range(world()) if failed[process])
    told = _broadcast_json(_description(error) if teller == rank() else None, teller)
    _group.over = True
    if error is None:
        raise _described(told)


def _description(error: BaseException) -> tuple[str, str]:
    """The name of the class that the others raise, and its message."""
    if isinstance(error, KeyboardInterrupt):
        return "KeyboardInterrupt", ""
    if isinstance(error, FadeError):
        return type(error).__name__, str(error)
    told = (str(error).strip() or "no message").splitlines()[0]
    return "OtherProcessError", f"process {rank() + 1} of {world()} failed with {type(error).__name__}: {told}"


def _described(told: Sequence[str]) -> BaseException:
    name, message = told
    if name == "KeyboardInterrupt":
        return KeyboardInterrupt()
    return OtherProcessError(message) if name == "OtherProcessError" else getattr(errors, name, FadeError)(message)


def wait_for_all() -> None:
    """Until all processes are here. Raises what another raised meanwhile."""
    if _group is not None:
        with _exchange():
            pass


# --- exchanging data -------------------------------------------------------------------------------------------------


def sum_(tensors: Iterable["Tensor"]) -> None:
    """Replaces each tensor by its sum over the processes, the same bits on all. Each process gives as many, of the same
    shapes and dtypes, in the same order."""
    if _group is None:
        return
    import torch
    import torch.distributed as dist

    with _exchange(), torch.no_grad():
        for bucket in _buckets(tensors):
            group = _group.control if bucket[0].device.type == "cpu" else None
            whole = bucket[0] if len(bucket) == 1 and bucket[0].is_contiguous() else _flat(bucket)
            dist.all_reduce(whole, group=group)
            if whole is not bucket[0]:
                for tensor, part in zip(bucket, whole.split([tensor.numel() for tensor in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))


def _flat(tensors: Sequence["Tensor"]) -> "Tensor":
    import torch

    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _buckets(tensors: Iterable["Tensor"]) -> Iterator[list["Tensor"]]:
    """The tensors, neighbours of one device and dtype together as long as they are small."""
    bucket: list[Tensor] = []
    for tensor in (tensor.detach() for tensor in tensors):
        alike = bucket and (tensor.device, tensor.dtype) == (bucket[0].device, bucket[0].dtype)
        if bucket and (not alike or sum(other.numel() for other in bucket) + tensor.numel() > _AT_ONCE):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def everyones(value: Any) -> list[Any]:
    """What each process gives, in their order: numbers, texts and lists of them, as JSON has them."""
    if _group is None:
        return [value]
    with _exchange():
        return [_broadcast_json(value if process == rank() else None, process) for process in range(world())]


def total(numbers: Sequence[float]) -> list[float]:
    """The sums of numbers over the processes, the same bits on all, so that all decide alike by them."""
    return [sum(each) for each in zip(*everyones(list(numbers)), strict=True)]


def from_first(
    tensors: Mapping[str, "Tensor"], record: Any = None, device: "torch.device | str" = "cpu"
) -> tuple[Mapping[str, "Tensor"], Any]:
    """What the first process gives, on all: tensors, on the others in memory of `device`, and a record, there as JSON
    has it. What the others give is not read."""
    if _group is None:
        return tensors, record
    with _exchange():
        names, record = _broadcast_json([list(tensors), record] if first() else None, 0)
        return {name: _broadcast(tensors[name] if first() else None, 0, device) for name in names}, record


def like_first_(tensors: Sequence["Tensor"]) -> None:
    """Makes tensors what they are on the first process."""
    if _group is None:
        return
    import torch

    found, _ = from_first({str(index): tensor for index, tensor in enumerate(tensors)})
    if not first():
        with torch.no_grad():
            for index, tensor in enumerate(tensors):
                tensor.copy_(found[str(index)])


def in_order(parts: Sequence["Tensor"], count: int, device: "torch.device") -> list["Tensor"]:
    """`count` tensors, of which each process has those whose numbers are its `own(range(count))`, on all."""
    if _group is None:
        return list(parts)
    with _exchange():
        places = range(count)
        return [
            _broadcast(parts[number // world()] if number in own(places) else None, number % world(), device)
            for number in places
        ]


def _broadcast(tensor: "Tensor | None", source: int, device: "torch.device | str") -> "Tensor":
    """A process's tensor, on all; there its own, on the others on `device`."""
    import torch
    import torch.distributed as dist

    if tensor is not None:
        sent = tensor.detach().cpu().contiguous()
        _broadcast_json([list(tensor.shape), str(tensor.dtype).removeprefix("torch.")], source)
    else:
        shape, dtype = _broadcast_json(None, source)
        sent = torch.empty(shape, dtype=getattr(torch, dtype))
    if sent.numel():  # as bytes, which every back end can send
        dist.broadcast(sent.reshape(-1).view(torch.uint8), source, group=_group.control)
    return sent.to(device) if tensor is None else tensor


def _broadcast_json(value: Any, source: int) -> Any:
    import torch
    import torch.distributed as dist

    sent = torch.zeros(1, dtype=torch.int64)
    if source == rank():
        words = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sent.fill_(len(words))
    dist.broadcast(sent, source, group=_group.control)
    if source != rank():
        words = torch.empty(int(sent), dtype=torch.uint8)
    dist.broadcast(words, source, group=_group.control)
    return json.loads(words.numpy().tobytes())


def check_alike(request: str, device: "torch.device") -> None:
    """Raises FadeError where the processes were asked for different runs, or where two of them are on one GPU."""
    if _group is None:
        return
    asked, places = zip(*everyones([request, _place(device)]), strict=True)
    if len(set(asked)) > 1:
        raise FadeError(
            "the processes were asked for different runs, or loaded different weights; give all of them the same "
            "model, arguments and settings"
        )
    if device.type != "cpu" and len(set(places)) < len(places):
        raise FadeError(
            "several processes are on the same GPU, and each needs one of its own; start no more processes than there "
            "are GPUs, and in Python move the pipeline to the one whose number is in LOCAL_RANK"
        )


def _place(device: "torch.device") -> str:
    """Which device of all machines it is: where each process sees one GPU alone, all of them have the number 0."""
    import torch

    name = str(device)
    if device.type == "cuda":
        name = str(torch.cuda.get_device_properties(device).uuid)
    return f"{socket.gethostname()} {name}"
