"""Work done in several processes at once: a job is a function of this file, run by each of them, and what each returns
or raises comes back. Started once, because starting takes longer than the work."""

import contextlib
import functools
import io
import multiprocessing
import os
import random
import signal
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fade import processes

PATIENCE = 300
"""Seconds after which a job hangs: what a busy machine takes for the longest of them, many times over."""


class Processes:
    """`count` processes whose environment says what a launcher says to the two that it starts."""

    def __init__(self, count: int = 2) -> None:
        port = free_port()
        spawn = multiprocessing.get_context("spawn")
        self._ends = []
        for rank in range(count):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append((process, ours))

    def run(self, job: Callable[..., Any], *arguments: Any, count: int = 2, **options: Any) -> list[Any]:
        """What the job returns in each of the first `count` processes, or its exception, or None where the process is
        gone."""
        ends = [end for _, end in self._ends[:count]]
        for end in ends:
            end.send((job, arguments, options))
        answers = []
        for end in ends:
            assert end.poll(PATIENCE), f"{job.__name__} hangs"
            try:
                answers.append(end.recv())
            except EOFError:
                answers.append(None)
        return answers

    def stop(self) -> None:
        for process, end in self._ends:
            end.close()
            process.kill()
            process.join()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _serve(rank: int, port: int, end: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with contextlib.suppress(EOFError):
        while True:
            job, arguments, options = end.recv()
            try:
                answer = job(*arguments, **options)
            except BaseException as error:
                answer = error
            try:
                end.send(answer)
            except TypeError:  # an exception that cannot be sent
                end.send(RuntimeError(repr(answer)))


# --- jobs ------------------------------------------------------------------------------------------------------------


def sums(seed: int, shapes: list[tuple[int, ...]]) -> list[Any]:
    """Random tensors of those shapes, of which process i scales its own by i + 1, summed; float32 and bfloat16."""
    import torch

    with processes.together():
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        tensors.append(tensors[0].to(torch.bfloat16))
        tensors.append(torch.randn(5, 7, generator=generator).T)  # not contiguous
        for tensor in tensors:
            tensor.mul_(processes.rank() + 1)
        processes.sum_(tensors)
        return [tensor.float().numpy() for tensor in tensors]


def exchanged(seed: int) -> dict[str, Any]:
    """What every exchange gives."""
    import torch

    with processes.together():
        rank, count = processes.rank(), processes.world()
        generator = torch.Generator().manual_seed(seed + rank)
        mine = {"a": torch.randn(3, 2, generator=generator).to(torch.float16), "none": torch.zeros(0, 4)}
        mine["mask"] = mine["a"] > 0
        mine["count"] = torch.tensor(rank)
        tensors, record = processes.from_first(mine, {"rank": rank, "text": "naïve"})
        parameter = torch.nn.Parameter(torch.full((4,), float(rank)))
        processes.like_first_([parameter])
        parts = [torch.full((2, number + 1), number) for number in processes.own(range(5))]
        return {
            "from_first": {name: tensor.float().numpy() for name, tensor in tensors.items()},
            "record": record,
            "like_first": parameter.detach().numpy(),
            "in_order": [part.numpy() for part in processes.in_order(parts, 5, torch.device("cpu"))],
            "everyones": processes.everyones([rank, float("inf")]),
            "total": processes.total([0.1 * (rank + 1), 1e-17]),
            "share": [list(range(n))[processes.share(n)] for n in range(2 * count + 2)],
        }


def failing(where: int, error: BaseException, exchanges: int) -> None:
    """The process `where` raises after so many exchanges; the others wait in the next."""
    import torch

    with processes.together():
        for number in range(exchanges + 2):
            if processes.rank() == where and number == exchanges:
                raise error
            processes.sum_([torch.ones(3)])


def interrupted(where: int, sent: str) -> None:
    """Ctrl-C reaches the process `where` while it waits for the others, which come when it was `sent` (a file)."""
    import threading
    import time

    import torch

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        open(sent, "w").close()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background inherits that it is ignored
    with processes.together():
        if processes.rank() == where:
            threading.Timer(0.2, interrupt).start()
        else:
            while not os.path.exists(sent):
                time.sleep(0.02)
        tensor = torch.ones(3)
        processes.sum_([tensor])
        assert tensor.tolist() == [processes.world()] * 3
        processes.sum_([tensor])


def killed(where: int) -> None:
    """The process `where` is killed, the others wait for it."""
    import torch

    with processes.together():
        processes.sum_([torch.ones(3)])
        if processes.rank() == where:
            os.kill(os.getpid(), signal.SIGKILL)
        processes.sum_([torch.ones(3)])


def saliencies(seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Saliency of a random model on random latents, by layer."""
    backbone, latents, prompts, layers = _given(seed)
    from fade.config import Config
    from fade.saliency import measure_saliency

    config = Config().replace(**changes).locate
    with processes.together():
        found = measure_saliency(backbone, layers, latents, prompts, config, seed)
    return {name: value.numpy() for name, value in found.items()}


def _given(seed: int) -> tuple[Any, ...]:
    import torch

    from fade.backbones import backbone_for
    from fade.base_model import target_layers
    from fade.conditioning import EncodedPrompts
    from fade.latents import Latents

    backbone = backbone_for(_pipeline(seed))
    generator = torch.Generator().manual_seed(seed)
    forget, retain = (torch.randn(n, 4, 8, 8, generator=generator) for n in (7, 6))
    texts = {kind: tuple(f"{kind} {i}" for i in range(n)) for kind, n in (("cat", 7), ("dog", 7), ("tree", 6))}
    latents = Latents(forget, texts["cat"], texts["dog"], retain, texts["tree"])
    every = sorted({text for some in texts.values() for text in some})
    prompts = EncodedPrompts(every, backbone.encode_prompts(every))
    backbone.denoiser.requires_grad_(False)
    return backbone, latents, prompts, target_layers(backbone.denoiser, ("to_q", "to_k", "conv2"))


def _pipeline(seed: int) -> Any:
    from .conftest import tiny_pipeline

    return tiny_pipeline(_tokenizer(), seed)


def _tokenizer() -> Any:
    from fade.digitcanvas.models import build_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        return build_tokenizer(Path(folder))


def unlearned(
    seed: int, changes: dict[str, Any], output: Path | None = None, stop_at: int | None = None, **options: Any
) -> dict[str, Any]:
    """A whole run on a random model. With `stop_at`, the last process fails in that training step."""
    import torch

    import fade
    from fade.config import Config

    pipeline = _pipeline(seed)
    with (
        warnings.catch_warnings(record=True) as caught,
        _failing_step(stop_at),
        _watched_gradients() as gradients,
        _steady_steps(),
    ):
        warnings.simplefilter("always")
        adapter = fade.unlearn(
            pipeline, "cat", "dog", templates=("{}", "an image of {}", "a picture of {}"), retain=("a tree", "a house"),
            config=Config().replace(**_QUICK | {"seed": seed} | changes).without_ignored(), output=output,
            progress=False, **options,
        )  # fmt: skip
    return {
        "parameters": [parameter.detach().numpy() for parameter in adapter.parameters()],
        "changes": {name: layer.get_delta_weight(adapter.name).numpy() for name, layer in adapter.layers.items()},
        "masks": {name: layer.lora_mask[adapter.name].mask.words.numpy() for name, layer in adapter.layers.items()},
        "gradients": gradients,
        "run": adapter.run,
        "warnings": [str(warning.message) for warning in caught],
        "group left": torch.distributed.is_initialized(),
    }


def unlearned_each(seed: int, output: Path | None = None, **options: Any) -> dict[str, Any]:
    """Two concepts solved, an adapter each: their changes by layer."""
    import fade
    from fade.config import Config

    config = Config().replace(**_QUICK | {"seed": seed, "overwrite__method": "closed-form"}).without_ignored()
    adapters = fade.unlearn_each(
        _pipeline(seed), {"cat": "dog", "three": "eight"}, templates=("{}", "a picture of {}"), retain=("a tree",),
        config=config, output=output, progress=False, **options,
    )  # fmt: skip
    return {
        concept: {name: layer.get_delta_weight(adapter.name).numpy() for name, layer in adapter.layers.items()}
        for concept, adapter in adapters.items()
    }


_QUICK = {
    "data__forget_samples": 5, "data__retain_samples": 7, "data__sampling_steps": 2, "data__batch_size": 2,
    "locate__batch_size": 2, "locate__keep": 0.2, "locate__granularity": "channel",
    "overwrite__steps": 6, "overwrite__batch_size": 3, "overwrite__retain_batch_size": 2,
    "overwrite__method": "distillation", "overwrite__checkpoint_every": 2, "overwrite__learning_rate": 0.1,
    "overwrite__stop_forget": 0.0,
}  # fmt: skip


@contextlib.contextmanager
def _failing_step(number: int | None) -> Iterator[None]:
    from fade.training_mode import ResolvedMode

    before = ResolvedMode.step

    def step(self: ResolvedMode, now: int) -> Any:
        if now == number and processes.rank() == processes.world() - 1:
            raise ArithmeticError("lightning")
        return before(self, now)

    ResolvedMode.step = step
    try:
        yield
    finally:
        ResolvedMode.step = before


def differing(seed: int) -> dict[str, Any]:
    """A run whose processes were not asked for the same."""
    return unlearned(seed, {"overwrite__rank": 4 + int(os.environ["RANK"])})


@contextlib.contextmanager
def _steady_steps() -> Iterator[None]:
    """With its own epsilon AdamW divides a gradient by its size: that blows up the rounding of those near 0, which
    several processes sum otherwise than one, and hides a wrong factor. With one far above all gradients a step is in
    proportion to them."""
    import torch

    before = torch.optim.AdamW
    torch.optim.AdamW = functools.partial(before, eps=1e-2)
    try:
        yield
    finally:
        torch.optim.AdamW = before


@contextlib.contextmanager
def _watched_gradients() -> Iterator[list[Any]]:
    """Yields the gradients of all parameters in each step, as the optimiser is about to get them, in one piece."""
    import torch

    found, before = [], torch.nn.utils.clip_grad_norm_

    def clip(parameters: list[torch.Tensor], norm: float) -> torch.Tensor:
        found.append(torch.cat([parameter.grad.flatten() for parameter in parameters]).numpy())
        return before(parameters, norm)

    torch.nn.utils.clip_grad_norm_ = clip
    try:
        yield found
    finally:
        torch.nn.utils.clip_grad_norm_ = before


def in_own_group(port: int, count: int, job: Callable[..., Any], *arguments: Any) -> Any:
    """A job in a process group that the program made, which must still be there afterwards."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    store = dist.TCPStore("127.0.0.1", port, count, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    try:
        result = job(*arguments)
        dist.barrier()
        return result
    finally:
        dist.destroy_process_group()


def command(*arguments: str) -> tuple[int, str, str]:
    """Status, output and errors of the command line."""
    from fade.cli import main

    printed, told = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(told):
        status = main(arguments)
    return status, printed.getvalue(), told.getvalue()


def fresh() -> int:
    return random.SystemRandom().randrange(2**20)
