"""Mutated adapter files through `fade inspect` and `fade.load_adapter`, in a process of their own.

Of every file it must hold that it is refused in one printable line, or read as what is in it: masks without a bit
beyond their columns, as many values as bits, all of them finite, the same tensors again after writing and reading, and
merged into a model no change outside the mask. Nothing may end the process, raise anything but FadeError, or ask for
more memory than twice the file's and a constant.
"""

import contextlib
import faulthandler
import io
import json
import multiprocessing
import os
import random
import re
import resource
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SLACK_BYTES = 48 * 2**20
"""What reading any file may take beside twice its size: the largest header's tables, and the allocator's steps."""
LIMITED = "ASAN_OPTIONS" not in os.environ
"""Whether memory is limited: AddressSanitizer takes all address space for itself."""
BASES = 12
"""Valid files that are mutated."""


@dataclass
class Result:
    """What became of the files: how often each outcome, and what went wrong with which file."""

    files: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        return self.outcomes["accepted"]


@contextlib.contextmanager
def memory_limit(extra_bytes: int) -> Any:
    """Lets the process have `extra_bytes` of address space more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


class Fuzzer:
    """One model, some valid files, and the checks of one mutated file."""

    def __init__(self, seed: int, folder: Path) -> None:
        from diffusers import UNet2DConditionModel

        from fade.base_model import target_layers
        from fade.digitcanvas.models import TEXT_WIDTH, build_tokenizer
        from tests.fade.conftest import tiny_pipeline
        from tests.fuzz.mutations import valid_file

        self.seed, self.folder = seed, folder
        self.path = folder / "mutated.safetensors"
        self.pipeline = tiny_pipeline(build_tokenizer(folder))
        self.pipeline.unet = UNet2DConditionModel(
            sample_size=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None, block_out_channels=(16,), layers_per_block=1, norm_num_groups=8,
            cross_attention_dim=TEXT_WIDTH, attention_head_dim=2,
        )  # fmt: skip
        self.weights = {
            name: layer.weight.detach().clone()
            for name, layer in target_layers(self.pipeline.unet, ("to_k", "conv1")).items()
        }
        names = list(self.weights)
        self.bases = []
        for i in range(BASES):
            rng = random.Random(f"{seed} base {i}")
            chosen = rng.sample(names, rng.choice((1, 2, 3)))
            shapes = {name: tuple(self.weights[name].flatten(1).shape) for name in chosen}
            self.bases.append(valid_file(folder / "valid.safetensors", shapes, rng.getrandbits(32)))

    def file(self, index: int) -> bytes:
        """The file of this number: the same for the same seed."""
        from tests.fuzz.mutations import mutated

        rng = random.Random(f"{self.seed} file {index}")
        return mutated(rng.choice(self.bases), rng)

    def check(self, index: int) -> str:
        """Outcome of a file, in words without its names and numbers. Raises AssertionError for a wrong one."""
        from fade.adapter_file import read_adapter_file
        from fade.errors import FadeError, printable

        content = self.file(index)
        self.path.write_bytes(content)
        file = refusal = None
        try:
            with self._limit(content):
                file = read_adapter_file(self.path)
        except FadeError as error:
            refusal = error
        self._inspect(index, refused=file is None)
        if file is None:
            chain = (refusal, refusal.__cause__)
            assert not any(isinstance(e, MemoryError) or "allocate" in str(e) for e in chain), f"memory: {refusal}"
            assert printable(refusal) == str(refusal), f"not printable: {refusal!r}"
            return _kind(str(refusal).partition(self.path.name)[2])
        self._check_tensors(file)
        self._check_rewritten(file)
        self._check_loaded(file, content)
        return "accepted"

    def _limit(self, content: bytes) -> Any:
        return memory_limit(2 * len(content) + SLACK_BYTES) if LIMITED else contextlib.nullcontext()

    def _inspect(self, index: int, refused: bool) -> None:
        from fade import cli
        from fade.errors import FadeError, printable

        out, err = io.StringIO(), io.StringIO()
        as_json = index % 3 == 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if index % 20 == 0:  # reading the options takes longer than the command
                status = cli.main(["inspect", str(self.path), *(["--json"] if as_json else [])])
            else:
                try:
                    cli.files.inspect(self.path, as_json)
                    status = 0
                except FadeError as error:
                    status = cli._fail(str(error), 2)
        assert status == (2 if refused else 0), f"status {status}: {err.getvalue()}"
        assert err.getvalue().count("\n") == refused, f"errors: {err.getvalue()!r}"
        for line in (out.getvalue() + err.getvalue()).split("\n"):
            assert printable(line) == line, f"reaches the terminal: {line!r}"
        if as_json and not refused:
            json.loads(out.getvalue())

    def _check_tensors(self, file: Any) -> None:
        import torch
        from safetensors.torch import load_file

        from fade_kernels import BitMask

        stored = load_file(self.path)
        for name, layer in file.layers.items():
            n, k = layer.mask.shape
            tensors = [layer.values] if layer.factors is None else list(layer.factors)
            assert all(torch.isfinite(tensor).all() for tensor in tensors), "not finite"
            assert layer.factors is not None or layer.values.shape == (layer.mask.count,), "values do not fit the mask"
            if n * k > 2**22:  # that it is no larger than it is, is checked by the limit; its bits need room
                continue
            words = stored.get(f"fade.unet.{name}.mask")
            dense = torch.zeros(n, -(-k // 32) * 32, dtype=torch.bool)
            if words is not None:
                dense = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32) & 1).flatten(1).bool()
            else:
                rows = torch.arange(n).repeat_interleave(stored[f"fade.unet.{name}.row_counts"].long())
                dense[rows, stored[f"fade.unet.{name}.columns"].long()] = True
            assert not dense[:, k:].any(), "padding bits"
            assert torch.equal(layer.mask.unpack(), dense[:, :k]), "another mask than the file's"
            assert layer.mask.count == int(dense.sum()), "another count than the file's"
            BitMask(layer.mask.words, layer.mask.shape)  # is checked

    def _check_rewritten(self, file: Any) -> None:
        import torch

        from fade.adapter_file import read_adapter_file, write_adapter_file

        if file.total > 2**22:
            return
        again = self.folder / "again.safetensors"
        write_adapter_file(again, file.metadata, file.layers)
        second = read_adapter_file(again)
        assert second.layers.keys() == file.layers.keys(), "other layers after writing"
        for name, layer in file.layers.items():
            other = second.layers[name]
            assert other.mask == layer.mask, "another mask after writing"
            if other.factors is not None or layer.factors is None:
                before, after = layer.factors or (layer.values,), other.factors or (other.values,)
                assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "other numbers after writing"

    def _check_loaded(self, file: Any, content: bytes) -> None:
        import torch

        import fade
        from fade.base_model import target_layers
        from fade.errors import FadeError

        try:
            with self._limit(content):
                adapter = fade.load_adapter(self.pipeline, self.path, check_base=False)
        except FadeError:
            return
        try:
            repr(adapter)
            assert adapter.scale == 1.0, "another strength"
            try:
                adapter.merge()
            except ValueError as error:
                if "infinite" not in str(error):
                    raise
                return
            for name, layer in target_layers(self.pipeline.unet).items():
                if name in self.weights:
                    mask = file.layers[name].mask.unpack() if name in file.layers else torch.zeros(1, 1).bool()
                    weight, base = layer.weight.detach().flatten(1), self.weights[name].flatten(1)
                    outside = ~mask.expand(base.shape)
                    assert torch.equal(weight[outside], base[outside]), "changed outside the mask"
        finally:
            adapter.remove()
        for name, layer in target_layers(self.pipeline.unet).items():
            if name in self.weights:
                assert torch.equal(layer.weight, self.weights[name]), "not what it was"


def _kind(message: str) -> str:
    """A message without the names and numbers in it, to be counted."""
    words = re.sub(r"'.*'|\S*[^a-zA-Z,: ()?]\S*|x{9,}", "", message)
    return " ".join(words.split())[:90]


def _work(seed: int, indices: range, seconds: float, at: Any, results: Any) -> None:
    import warnings

    import torch

    faulthandler.enable()
    torch.set_num_threads(1)  # every new thread takes address space
    warnings.filterwarnings("ignore")
    result = Result()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(seed, Path(folder))
        start = time.perf_counter()
        for index in indices:
            result.seconds = time.perf_counter() - start
            if result.seconds > seconds:
                break
            at.value = index
            try:
                result.outcomes[fuzzer.check(index)] += 1
            except Exception:
                result.outcomes["WRONG"] += 1
                result.failures.append((index, traceback.format_exc(limit=-6)))
            result.files += 1
    results.send(result)


def run(seed: int, seconds: float = float("inf"), indices: range = range(10**9)) -> Result:
    """Checks files until the time is over or the numbers are used up, in a process of its own.

    Args:
        seed: of the valid files and of all changes.
        indices: numbers of the files.
    """
    context = multiprocessing.get_context("spawn")
    at = context.Value("q", -1)
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(seed, indices, seconds, at, sender), daemon=True)
    worker.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        worker.join()
        result = Result(failures=[(at.value, f"the process ended with status {worker.exitcode}")])
    worker.join()
    return result
