"""What an interruption leaves in the output folder, and that going on from it ends as if nothing had happened or says
in one line why it cannot."""

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import fade
import fade.run_folder
from fade.backbones import Backbone
from fade.config import Config
from fade.errors import FadeError
from fade.files import read_tensors, write_tensors

from .conftest import same_bits, tiny_pipeline

WORDS = {
    "forget": "cat", "surrogate": "dog", "templates": ("{}", "a picture of {}"), "retain": ("a house", "a boat", ""),
    "progress": False,
}  # fmt: skip
MASKS, CHECKPOINT, REQUEST, LOCK = "masks.safetensors", "checkpoint.safetensors", "request.json", ".fade.lock"
RESULT = {"adapter.safetensors", "latents.safetensors", "run.json"}


@pytest.fixture(scope="module")
def brief() -> Config:
    return Config().replace(
        data__forget_samples=4, data__retain_samples=4, data__sampling_steps=2, locate__batch_size=4,
        locate__keep=0.05, locate__passes=1, overwrite__steps=5, overwrite__batch_size=2,
        overwrite__retain_batch_size=2, overwrite__method="distillation", overwrite__rank=2,
        overwrite__checkpoint_every=2,
    )  # fmt: skip


@pytest.fixture
def anew(tokenizer: CLIPTokenizer) -> Callable[[], StableDiffusionPipeline]:
    return lambda: tiny_pipeline(tokenizer)


@pytest.fixture(scope="module")
def whole(tokenizer: CLIPTokenizer, brief: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The tensors of an uninterrupted run's file."""
    output = tmp_path_factory.mktemp("whole") / "out"
    fade.unlearn(tiny_pipeline(tokenizer), **WORDS, config=brief, output=output)
    return load_file(output / "adapter.safetensors")


def interrupt(pipeline: StableDiffusionPipeline, config: Config, output: Path, after: int = 3, **words: object) -> None:
    """A run that ends with Ctrl-C after so many steps."""
    step, steps = torch.optim.AdamW.step, []

    def interrupted(self, *args, **kwargs):
        if len(steps) == after:
            raise KeyboardInterrupt
        steps.append(1)
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fade.unlearn(pipeline, **{**WORDS, **words}, config=config, output=output)


@pytest.fixture(scope="module")
def interrupted_once(tokenizer: CLIPTokenizer, brief: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("interrupted") / "out"
    interrupt(tiny_pipeline(tokenizer), brief, output)
    return output


@pytest.fixture
def interrupted(interrupted_once: Path, tmp_path: Path) -> Path:
    """A folder of a run that was interrupted after its first checkpoint."""
    return Path(shutil.copytree(interrupted_once, tmp_path / "out"))


@pytest.fixture
def resume(anew: Callable[[], StableDiffusionPipeline], brief: Config) -> Callable[..., fade.Adapter]:
    def go_on(output: Path, **changes: object) -> fade.Adapter:
        return fade.unlearn(
            **{"pipeline": anew(), **WORDS, "config": brief, "output": output, "resume": True} | changes
        )

    return go_on


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def snapshots(folder: Path, into: Path, patch: pytest.MonkeyPatch) -> list[Path]:
    """Copies the folder before every call that changes its files: what `kill -9` at that moment leaves, once each."""
    taken: list[Path] = []
    seen: set[frozenset] = set()
    busy: list[int] = []

    def before(name: str) -> None:
        real = getattr(os, name)

        def call(path, *args, **kwargs):
            if not busy and isinstance(path, (str, Path)) and folder in Path(path).parents and folder.exists():
                busy.append(1)
                files = folder.iterdir()
                state = frozenset(
                    "part" if p.is_dir() else (p.name, p.name == CHECKPOINT and p.stat().st_mtime_ns) for p in files
                )
                if state not in seen:
                    seen.add(state)
                    taken.append(Path(shutil.copytree(folder, into / f"{len(taken)}" / "out")))
                busy.pop()
            return real(path, *args, **kwargs)

        patch.setattr(os, name, call)

    for name in ("replace", "unlink", "rmdir", "mkdir", "chmod"):
        before(name)
    return taken


@pytest.mark.parametrize("over_an_older_result", [False, True], ids=["new folder", "over an older result"])
def test_killed_between_any_two_changes_of_a_file(
    anew: Callable[[], StableDiffusionPipeline],
    brief: Config,
    whole: dict[str, torch.Tensor],
    tmp_path: Path,
    resume: Callable[..., fade.Adapter],
    over_an_older_result: bool,
) -> None:
    output = tmp_path / "out"
    if over_an_older_result:
        fade.unlearn(anew(), **WORDS, config=brief.replace(seed=7, overwrite__steps=2), output=output)
    with pytest.MonkeyPatch.context() as patch:
        taken = snapshots(output, tmp_path / "killed", patch)
        fade.unlearn(anew(), **WORDS, config=brief, output=output, overwrite=over_an_older_result)
    reached = set().union(*map(names, taken))
    assert reached >= {*RESULT, MASKS, CHECKPOINT, REQUEST, LOCK} and any(n.endswith(".part") for n in reached)
    # Over an older result only the moments that differ: around the new request and around the new result.
    for killed in taken[:3] + taken[-5:] if over_an_older_result else taken:
        complete = (killed / "adapter.safetensors").exists()
        if (killed / REQUEST).exists():
            resume(killed)
        else:
            with pytest.raises(FadeError, match="is complete" if complete else "was never started"):
                resume(killed)
            if not complete or not same_bits(load_file(killed / "adapter.safetensors"), whole):
                resume(killed, resume=False, overwrite=complete)
        assert same_bits(load_file(killed / "adapter.safetensors"), whole), names(killed)
        assert names(killed) == RESULT


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 0x10
    path.write_bytes(content)


def text(path: Path) -> None:
    path.write_text("[]")


def foreign(path: Path) -> None:
    save_file({"words": torch.randn(3)}, path)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def forged(change: Callable[[dict, dict], None]) -> Callable[[Path], None]:
    """A file that is whole, but holds something else."""

    def forge(path: Path) -> None:
        tensors, record = read_tensors(path)
        change(tensors, record)
        write_tensors(path, tensors, record)

    return forge


def first(tensors: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor], end: str = "") -> None:
    name = next(name for name in sorted(tensors) if name.endswith(end))
    tensors[name] = change(tensors[name])


DAMAGES = {"cut": cut, "flipped": flipped, "text": text, "foreign": foreign, "emptied": emptied}
MASK_DAMAGES = DAMAGES | {
    "padding": forged(lambda tensors, _: first(tensors, lambda w: torch.full_like(w, -1))),
    "dtype": forged(lambda tensors, _: first(tensors, lambda w: w.long())),
    "shape": forged(lambda tensors, _: first(tensors, lambda w: w[:-1])),
    "layer missing": forged(lambda tensors, record: record["shapes"].pop(tensors.popitem()[0])),
    "other latents": forged(lambda _, record: record["origin"].update(latents="")),
    "other settings": forged(lambda _, record: record["origin"].update(request="")),
    "other count": forged(lambda _, record: record.update(selected=record["selected"] + 1)),
    "record": forged(lambda _, record: record.update(shapes=[1], more=2)),
}


@pytest.mark.parametrize("damage", MASK_DAMAGES)
def test_damaged_masks_are_made_again(
    interrupted: Path, resume: Callable[..., fade.Adapter], whole: dict[str, torch.Tensor], damage: str
) -> None:
    MASK_DAMAGES[damage](interrupted / MASKS)
    with pytest.warns(UserWarning, match="masks of the interrupted run are made again: "):
        resume(interrupted)
    assert same_bits(load_file(interrupted / "adapter.safetensors"), whole)


CHECKPOINT_DAMAGES = DAMAGES | {
    "nan": forged(lambda tensors, _: first(tensors, lambda t: t.fill_(float("nan")), "parameter")),
    "dtype": forged(lambda tensors, _: first(tensors, lambda t: t.half(), "exp_avg")),
    "shape": forged(lambda tensors, _: first(tensors, lambda t: t[None], "exp_avg_sq")),
    "missing": forged(lambda tensors, _: tensors.popitem()),
    "other step": forged(lambda tensors, _: first(tensors, lambda t: t + 1, "step")),
    "other masks": forged(lambda _, record: record["origin"].update(masks="")),
    "no losses": forged(lambda _, record: record.update(losses={"forget": [], "retain": []})),
    "losses": forged(lambda _, record: record["losses"].update(forget=[1.0])),
    "losses on held-out noise": forged(
        lambda _, record: record["losses"].update(held_out_forget=[0.5], held_out_retain=[0.1])
    ),
    "forgotten before": forged(lambda _, record: record["losses"].update(held_out_forget=[0.0], held_out_retain=[0.0])),
    "no losses on held-out noise": forged(lambda _, record: record["losses"].pop("held_out_retain")),
    "losses of no numbers": forged(lambda _, record: record.update(losses=3)),
    "record": forged(lambda _, record: record.clear()),
}


@pytest.mark.parametrize("damage", CHECKPOINT_DAMAGES)
def test_a_damaged_checkpoint_is_refused(interrupted: Path, resume: Callable[..., fade.Adapter], damage: str) -> None:
    CHECKPOINT_DAMAGES[damage](interrupted / CHECKPOINT)
    with pytest.raises(FadeError, match="checkpoint .* does not fit this run .*; start again with --overwrite"):
        resume(interrupted)
    assert (interrupted / REQUEST).exists()


def changed_request(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        request = json.loads(path.read_text())
        change(request)
        path.write_text(json.dumps(request))

    return write


REQUEST_DAMAGES = {
    "cut": cut,
    "text": text,
    "emptied": emptied,
    "bytes": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "another": lambda path: path.write_text('{"concept": 1}'),
    "nested": lambda path: path.write_text("[" * 10**5),
    "no environment": changed_request(lambda request: request.pop("environment")),
    "costs": changed_request(lambda request: request.update(costs={"data": ["x", 1]})),
    "inputs": changed_request(lambda request: request.update(inputs=[])),
}


@pytest.mark.parametrize("damage", REQUEST_DAMAGES)
def test_a_damaged_request_is_told(
    interrupted: Path, resume: Callable[..., fade.Adapter], whole: dict[str, torch.Tensor], damage: str
) -> None:
    REQUEST_DAMAGES[damage](interrupted / REQUEST)
    with pytest.raises(FadeError, match=r"request\.json is damaged.*; start again with --overwrite"):
        resume(interrupted)
    if damage == "cut":
        resume(interrupted, resume=False, overwrite=True)
        assert same_bits(load_file(interrupted / "adapter.safetensors"), whole)


@pytest.mark.parametrize("missing", [[MASKS], [CHECKPOINT], ["latents.safetensors"], [MASKS, CHECKPOINT]], ids=str)
def test_what_is_missing_is_made_again(
    interrupted: Path, resume: Callable[..., fade.Adapter], whole: dict[str, torch.Tensor], missing: list[str]
) -> None:
    for name in missing:
        (interrupted / name).unlink()
    resume(interrupted)
    assert same_bits(load_file(interrupted / "adapter.safetensors"), whole)


def test_a_missing_request_is_told(interrupted: Path, resume: Callable[..., fade.Adapter]) -> None:
    (interrupted / REQUEST).unlink()
    with pytest.raises(FadeError, match=r"has lost its request\.json; start again with --overwrite"):
        resume(interrupted)


def test_leftovers_of_killed_processes_go(interrupted: Path, resume: Callable[..., fade.Adapter]) -> None:
    (interrupted / ".checkpoint.safetensors.0123abcd.part").mkdir()
    (interrupted / ".checkpoint.safetensors.0123abcd.part" / ".tmpXyZ").write_text("half")
    (interrupted / ".run.json.0123abcd.part").write_text("half")
    (interrupted / LOCK).write_text("")
    (interrupted / ".mine.part").write_text("keep me")
    resume(interrupted)
    assert names(interrupted) == {*RESULT, ".mine.part"}


def test_only_another_runs_own_traces_do_not_make_a_folder_used(
    resume: Callable[..., fade.Adapter], tmp_path: Path
) -> None:
    (tmp_path / LOCK).write_text("")
    (tmp_path / ".request.json.0123abcd.part").mkdir()
    resume(tmp_path, resume=False)
    assert names(tmp_path) == RESULT


@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_a_second_run_in_the_folder_is_refused(
    interrupted: Path, resume: Callable[..., fade.Adapter], how: dict[str, bool]
) -> None:
    before = names(interrupted)
    with fade.run_folder._locked(interrupted):
        with pytest.raises(FadeError, match="another run is going on in the output folder .*; wait for it to end"):
            resume(interrupted, **{"resume": False, **how})
        assert names(interrupted) == {*before, LOCK}
    assert names(interrupted) == before


@pytest.mark.skipif(sys.platform == "win32", reason="has no flock")
def test_the_lock_of_a_killed_process_does_not_block(interrupted: Path, resume: Callable[..., fade.Adapter]) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, interrupted / LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        holder.stdout.readline()
        with pytest.raises(FadeError, match="another run is going on"):
            resume(interrupted)
        holder.kill()
    resume(interrupted)
    assert names(interrupted) == RESULT


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, resume: Callable[..., fade.Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available.: start no other run"):
        resume(tmp_path / "out", resume=False)


@pytest.mark.parametrize(
    "what", ["picture", "caption", "fewer", "text encoder", "tokenizer", "scheduler", "base model"]
)
def test_other_inputs_are_noticed_on_resuming(
    anew: Callable[[], StableDiffusionPipeline], brief: Config, tmp_path: Path, resume: Callable[..., fade.Adapter],
    what: str,
) -> None:  # fmt: skip
    pictures, output = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    noise = torch.randint(256, (2, 5, 32, 32, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)

    def put(index: int, version: int = 0) -> None:
        Image.fromarray(noise[version, index].numpy()).save(pictures / f"{index}.png")

    for index in range(5):
        put(index)
        (pictures / f"{index}.txt").write_text(f"cat number {index}")
    config = brief.replace(data__forget_images=str(pictures))
    interrupt(anew(), config, output)
    pipeline, message = anew(), "are not those it was begun with; put them back and resume, or start again"
    if what == "picture":
        put(1, version=1)
    elif what == "caption":
        (pictures / "2.txt").write_text("the cat of the house")
        (output / "latents.safetensors").unlink()
    elif what == "fewer":
        (pictures / "0.png").rename(tmp_path / "away.png")
    elif what == "text encoder":
        with torch.no_grad():
            pipeline.text_encoder.get_input_embeddings().weight.mul_(1.02).add_(0.01)
        message = "text encoder, tokenizer or scheduler|are not those it was begun with"
    elif what == "tokenizer":
        pipeline.tokenizer = copy.deepcopy(pipeline.tokenizer)
        pipeline.tokenizer.add_tokens(["number"])
        pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
        message = "text encoder, tokenizer or scheduler|are not those it was begun with"
    elif what == "scheduler":
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, beta_end=0.03)
        message = "text encoder, tokenizer or scheduler|are not those it was begun with"
    else:
        with torch.no_grad():
            pipeline.unet.conv_in.weight[0, 0, 0, 0] += 1
        message = "has another base model; resume with the same settings"
    with pytest.raises(FadeError, match=message):
        resume(output, pipeline=pipeline, config=config)
    assert names(output) >= {REQUEST, MASKS, CHECKPOINT}
    put(1)
    (pictures / "2.txt").write_text("cat number 2")
    if what == "fewer":
        (tmp_path / "away.png").rename(pictures / "0.png")
    resumed = resume(output, config=config)
    assert len(resumed.run["losses"]["forget"]) == 5


def test_the_record_counts_all_parts(
    anew: Callable[[], StableDiffusionPipeline], brief: Config, tmp_path: Path, resume: Callable[..., fade.Adapter]
) -> None:
    """By parts whose cost is set beforehand; no clock decides."""
    output = tmp_path / "out"
    interrupt(anew(), brief, output)
    kept = json.loads((output / REQUEST).read_text())
    assert all(cost[0] > 0 and cost[1] > 2**20 for cost in kept["costs"].values())
    assert kept["costs"].keys() == {"data", "locate", "overwrite"}
    peak = 2**45
    changed_request(
        lambda request: request.update(costs={"data": [1000.0, 1], "locate": [2000.0, peak], "overwrite": [3000.0, 1]})
    )(output / REQUEST)
    interrupt(anew(), brief, output, after=1, resume=True)
    run = resume(output).run
    assert [int(run["seconds"][part] // 1000) for part in ("data", "locate", "overwrite")] == [1, 2, 3]
    assert run["peak_memory_bytes"]["locate"] == peak
    assert 1 < run["peak_memory_bytes"]["overwrite"] < peak


def test_another_library_or_machine_is_one_warning(interrupted: Path, resume: Callable[..., fade.Adapter]) -> None:
    changed_request(lambda request: request["environment"].update(torch="1.0", peft="0.1"))(interrupted / REQUEST)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        resume(interrupted)
    told = [str(w.message) for w in told if "begun with something else" in str(w.message)]
    assert len(told) == 1 and "torch 1.0 -> " in told[0] and "peft 0.1 -> " in told[0] and "diffusers" not in told[0]


@pytest.mark.parametrize("file", ["adapter.safetensors", "run.json"])
def test_a_result_that_cannot_be_written_is_not_lost(
    anew: Callable[[], StableDiffusionPipeline], brief: Config, whole: dict[str, torch.Tensor], tmp_path: Path,
    resume: Callable[..., fade.Adapter], file: str,
) -> None:  # fmt: skip
    replace, pipeline = os.replace, anew()

    def full(source, target, **kwargs):
        if Path(target).name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target, **kwargs)

    told = rf"cannot write .*{file}: No space left on device\. The run is kept: mend that and finish it with --resume"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(FadeError, match=told) as raised:
            fade.unlearn(pipeline, **WORDS, config=brief, output=tmp_path / "out")
    assert raised.value.__cause__.errno == errno.ENOSPC
    assert not getattr(pipeline.unet, "peft_config", {})
    resume(tmp_path / "out", pipeline=pipeline)
    assert same_bits(load_file(tmp_path / "out" / "adapter.safetensors"), whole)
    assert names(tmp_path / "out") == RESULT


def test_resume_stands_alone(interrupted: Path, resume: Callable[..., fade.Adapter]) -> None:
    with pytest.raises(FadeError, match="resume needs the output folder"):
        resume(None)
    with pytest.raises(FadeError, match="resume excludes overwrite"):
        resume(interrupted, overwrite=True)


@pytest.mark.parametrize("file", ["latents.safetensors", REQUEST, MASKS, CHECKPOINT, "run.json"])
def test_a_folder_in_a_files_place_is_told(interrupted: Path, resume: Callable[..., fade.Adapter], file: str) -> None:
    (interrupted / file).unlink(missing_ok=True)
    (interrupted / file).mkdir()
    (interrupted / file / "precious").write_text("keep me")
    for how in ({"resume": True}, {"resume": False, "overwrite": True}):
        with pytest.raises(FadeError, match=f"{file} is a folder, where a file of the run belongs; move it away"):
            resume(interrupted, **how)
    assert (interrupted / file / "precious").read_text() == "keep me"


def test_the_working_directory_may_change(
    resume: Callable[..., fade.Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    step = torch.optim.AdamW.step

    def moving(self, *args, **kwargs):
        os.chdir(tmp_path / "elsewhere")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", moving)
    resume("out", resume=False)
    assert names(tmp_path / "out") == RESULT
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_resumed_run_encodes_no_prompt_again(
    interrupted: Path,
    resume: Callable[..., fade.Adapter],
    whole: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "prompts.safetensors" in names(interrupted)

    def encoded(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(Backbone, "encode_prompts", encoded)
    resume(interrupted)
    assert same_bits(load_file(interrupted / "adapter.safetensors"), whole)
    assert "prompts.safetensors" not in names(interrupted)


def test_damaged_prompts_are_encoded_again(
    interrupted: Path, resume: Callable[..., fade.Adapter], whole: dict[str, torch.Tensor]
) -> None:
    (interrupted / "prompts.safetensors").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="prompts of the interrupted run are encoded again: "):
        resume(interrupted)
    assert same_bits(load_file(interrupted / "adapter.safetensors"), whole)
