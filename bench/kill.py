"""`kill -9` at random moments of a run with checkpoints, then `--resume`: does it end as an uninterrupted run?

    python -m bench.kill --kills 100 --seed 0 --output bench/results/kill.json     goes on where the file ends

Every trial runs `fade unlearn` on the bundled model in a process of its own and kills it at a moment drawn uniformly
from an uninterrupted run's duration; what resumes is killed again in --again of a hundred cases. Then the command
resumes until it ends, and the adapter's tensors are compared, bit for bit, with those of an uninterrupted run. The
processes are forked from one that has loaded the model, so that moments are spent in the run and not in loading.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.harness import environment, print_table, write_json

SETTINGS = """
[data]
forget_samples = 4
retain_samples = 4
sampling_steps = 2
[locate]
passes = 1
batch_size = 4
[overwrite]
steps = 16
batch_size = 2
retain_batch_size = 2
checkpoint_every = 2
pool = 5
stop_forget = 1e9
stop_flat = 1.0
stop_every = 6
cooldown_steps = 6
"""
RESULT = {"adapter.safetensors", "latents.safetensors", "run.json"}
MOST_ATTEMPTS = 20
"""Starts of one trial; more would mean that a folder can be neither resumed nor begun."""


class Runs:
    """Starts `fade unlearn` in forked processes. Model and modules are loaded before the first."""

    def __init__(self, folder: Path) -> None:
        import torch

        torch.set_num_threads(1)
        import fade.cli
        import fade.loading
        import fade.unlearning
        from fade.digitcanvas import load_pipeline

        pipeline = load_pipeline()
        fade.loading.load_model = lambda *_: pipeline
        self.command, self.folder = fade.cli.main, folder
        (folder / "settings.toml").write_text(SETTINGS)

    def start(self, output: Path, *options: str) -> int:
        """Process id of a new run in `output`."""
        process = os.fork()
        if process:
            return process
        status = 1
        try:
            with open(self.folder / "told", "w") as told:
                os.dup2(told.fileno(), 1)
                os.dup2(told.fileno(), 2)
            status = self.command(
                ["unlearn", "digitcanvas", "--forget", "three", "--surrogate", "eight", "--quiet", "--config",
                 str(self.folder / "settings.toml"), "--output", str(output), *options]
            )  # fmt: skip
        finally:
            os._exit(status)

    def to_the_end(self, output: Path, *options: str) -> tuple[int, str]:
        """Exit status and what was printed."""
        _, status = os.waitpid(self.start(output, *options), 0)
        return os.waitstatus_to_exitcode(status), (self.folder / "told").read_text().strip()

    def killed(self, output: Path, after: float, *options: str) -> bool:
        """Whether the run was still going on when it was killed, `after` seconds from its start."""
        process = self.start(output, *options)
        end = time.perf_counter() + after
        while (left := end - time.perf_counter()) > 0:
            time.sleep(min(left, 0.01))
            if os.waitpid(process, os.WNOHANG)[0]:
                return False
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        return os.WIFSIGNALED(status)


def stage(output: Path) -> str:
    """How far a killed run came, by what is there."""
    there = {path.name for path in output.iterdir()} if output.is_dir() else set()
    name = "before the request"
    for file, reached in (
        ("request.json", "making latents"), ("latents.safetensors", "locating"), ("masks.safetensors", "first steps"),
        ("checkpoint.safetensors", "after a checkpoint"), ("adapter.safetensors", "saving"),
    ):  # fmt: skip
        if file in there:
            name = reached
    if there >= RESULT and "request.json" not in there:
        name = "removing leftovers" if there & {"masks.safetensors", "checkpoint.safetensors"} else "after the result"
    return name + (", in a file" if any(file.endswith(".part") for file in there) else "")


def trial(
    runs: Runs, reference: dict[str, Any], seconds: float, number: int, seed: int, again: float
) -> dict[str, Any]:
    """One run killed at least once, resumed to its end and compared."""
    from safetensors.torch import load_file

    draw = random.Random(f"{seed}/{number}")
    output = Path(tempfile.mkdtemp(dir=runs.folder)) / "out"
    kills, told, options = [], [], ()
    while not kills or draw.random() < again:
        after = draw.uniform(0, seconds)
        if runs.killed(output, after, *options):
            kills.append({"after": round(after, 4), "in": stage(output)})
            options = ("--resume",) if (output / "request.json").exists() else ()
        elif kills:
            break
        else:
            shutil.rmtree(output)
    outcome = "neither resumed nor begun"
    options = ("--resume",)
    for _ in range(MOST_ATTEMPTS):
        if not options and (output / "adapter.safetensors").exists():
            status = 0
        else:
            status, line = runs.to_the_end(output, *options)
        if status == 0:
            result = load_file(output / "adapter.safetensors")
            same = result.keys() == reference.keys() and all(
                result[name].numpy().tobytes() == reference[name].numpy().tobytes() for name in reference
            )
            clean = {path.name for path in output.iterdir()} == RESULT
            outcome = ("same" if same else "DIFFERENT") + ("" if clean else ", FILES LEFT")
            break
        told.append(line.replace(str(output), "OUT"))
        if "nothing to resume" not in line:
            break
        options = ()
    shutil.rmtree(output.parent)
    return {"trial": number, "kills": kills, "told": told, "outcome": outcome}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="trials, each killed at least once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=float, default=30, metavar="PERCENT", help="of resumed runs killed once more")
    parser.add_argument("--output", type=Path, default=Path("bench/results/kill.json"))
    arguments = parser.parse_args()
    settings = {"seed": arguments.seed, "again": arguments.again, "settings": SETTINGS}
    payload: dict[str, Any] = {"environment": environment(), **settings, "trials": []}
    if arguments.output.is_file():
        before = json.loads(arguments.output.read_text())
        if {name: before.get(name) for name in settings} != settings:
            parser.error(f"{arguments.output} is of other settings; name another file")
        payload = before

    with tempfile.TemporaryDirectory() as folder:
        from safetensors.torch import load_file

        runs = Runs(Path(folder))
        for _ in range(2):  # the first also reads files that the system then has at hand
            shutil.rmtree(runs.folder / "whole", ignore_errors=True)
            start = time.perf_counter()
            status, line = runs.to_the_end(runs.folder / "whole")
            seconds = time.perf_counter() - start
            if status:
                raise SystemExit(f"the uninterrupted run failed: {line}")
        reference = load_file(runs.folder / "whole" / "adapter.safetensors")
        for number in range(len(payload["trials"]), arguments.kills):
            payload["trials"].append(trial(runs, reference, seconds, number, arguments.seed, arguments.again / 100))
            write_json(arguments.output, payload)

    trials = payload["trials"]
    print_table(
        ["outcome", "runs"], [[name, str(count)] for name, count in Counter(t["outcome"] for t in trials).most_common()]
    )
    places = Counter(kill["in"] for t in trials for kill in t["kills"])
    print_table(["killed while", "times"], [[name, str(count)] for name, count in places.most_common()])
    for line in sorted({line for t in trials for line in t["told"]}):
        print(f"told: {line}")


if __name__ == "__main__":
    main()
