"""The command line: what a user types, what comes back, and that every mistake ends in one line and a status."""

import functools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import fade.demo
import fade.unlearning
from fade import cli
from fade.adapter import load_adapter
from fade.adapter_file import read_adapter_file, write_adapter_file
from fade.cli.options import config_from
from fade.config import Config
from fade.digitcanvas import DIGITS, STYLES
from fade.errors import FadeError, printable
from fade.evaluation import first_seeds
from fade.loading import load_model

from .adapters import random_adapter
from .conftest import denoise, same_bits, weights

COMMANDS = ("demo", "unlearn", "generate", "evaluate", "attack", "merge", "export", "inspect", "plan", "env")


@pytest.fixture
def model(pipeline: StableDiffusionPipeline, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(pipeline: StableDiffusionPipeline, model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "adapter.safetensors"
    attached = random_adapter(pipeline, strength=0.3)
    attached.save(path)
    attached.remove()
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must fail with one line on stderr and status 2, and returns the line."""

    def run(*arguments: object, status: int = 2) -> str:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == status
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1, captured.err
        assert "Traceback" not in captured.err
        return lines[0]

    return run


QUICK_TOML = """
[data]
forget_samples = 4
retain_samples = 4
sampling_steps = 2
[locate]
keep = 0.05
[overwrite]
steps = 3
batch_size = 2
retain_batch_size = 2
"""


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from fade.cli import main; status = main(['--help']);"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'numpy', 'PIL', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'imports {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_every_option_has_help_and_an_example(command: str) -> None:
    import typer

    app = typer.main.get_command(cli.app)
    parsed = app.commands[command]
    assert f"fade {command}" in parsed.help
    for parameter in parsed.params:
        if parameter.name != "help":
            assert parameter.help, parameter.name


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "unlearn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["unlearned"], "No such command"),
        (["unlearn", "digitcanvas", "--forget", "three"], "Missing option"),
        (["demo", "--keeep", "0.1"], "No such option"),
        (["demo", "--steps", "many"], "'--steps'"),
        (["demo", "--keep", "0"], "keep must be in (0, 1]"),
        (["demo", "--keep", "1.5"], "keep must be in (0, 1]"),
        (["demo", "--steps", "0"], "steps must be at least 1"),
        (["inspect", "nowhere.safetensors"], "there is no adapter file"),
    ],
)
def test_wrong_arguments(refused: Any, arguments: list[str], words: str) -> None:
    line = refused(*arguments)
    assert line.startswith("error: ")
    assert words in line


def test_settings_out_of_range_or_unknown(refused: Any, tmp_path: Path) -> None:
    words = ["unlearn", "nowhere", "--forget", "a", "--surrogate", "b", "--output", tmp_path / "out"]
    assert "rank must be at least 1" in refused(*words, "--rank", 0)
    assert "'denoising', 'distillation'" in refused(*words, "--saliency", "gradient")
    file = tmp_path / "settings.toml"
    file.write_text("[locate]\nkeeep = 0.1\n")
    assert "unknown setting 'locate.keeep'" in refused(*words, "--config", file)
    file.write_text("[locate\n")
    assert "not valid TOML" in refused(*words, "--config", file)
    assert "cannot read the config file" in refused(*words, "--config", tmp_path / "none.toml")
    assert "holds no prompt" in refused(*words, "--retain-file", os.devnull)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_used(refused: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def load(model: object) -> str:
        return refused("generate", model, "--prompt", "x", "--output", tmp_path / "x.png")

    assert "there is no model './nowhere'" in load("./nowhere")
    assert "not a hub id (owner/name)" in load("nowhere")
    assert "holds no model_index.json" in load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    assert "is a WanPipeline, which is not supported; supported: Stable Diffusion XL, Stable" in load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"]}')
    assert "cannot load the model" in load(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    assert "cannot load the model" in load(tmp_path)
    assert not (tmp_path / "x.png").exists()


def test_devices_and_dtypes_that_do_not_exist(model: Path) -> None:
    with pytest.raises(FadeError, match="unknown device 'gpu0'"):
        load_model(str(model), device="gpu0")
    with pytest.raises(FadeError, match="there is no device cuda:99"):
        load_model(str(model), device="cuda:99")
    for unusable in ("meta", "mps"):
        with pytest.raises(FadeError, match=f"the device '{unusable}' cannot be used here"):
            load_model(str(model), device=unusable)
    with pytest.raises(FadeError, match="unknown dtype 'int4'"):
        load_model(str(model), dtype="int4")
    assert load_model(str(model), "cpu", "bf16").unet.dtype == torch.bfloat16


def test_options_come_before_the_config_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('seed = 4\n[locate]\nkeep = 0.2\ngranularity = "tile"\ntile = 16\n[overwrite]\nsteps = 2\n')
    config = config_from(file, locate__keep=0.5, overwrite__steps=None, locate__targets=["to_q"])
    expected = Config().replace(
        seed=4, locate__keep=0.5, locate__granularity="tile", locate__tile=16, overwrite__steps=2,
        locate__targets=("to_q",),
    )  # fmt: skip
    assert config == expected


def test_the_whole_walk_on_a_model_folder(
    model: Path, tmp_path: Path, refused: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    toml, output = tmp_path / "quick.toml", tmp_path / "out"
    toml.write_text(QUICK_TOML)
    words = ["unlearn", model, "--forget", "cat", "--surrogate", "dog", "--output", output, "--config", toml]
    words += ["--template", "a photo of {}", "--retain", "a horse", "--steps", 2, "--device", "cpu", "--quiet"]
    assert cli.main([str(word) for word in words]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    file = output / "adapter.safetensors"
    assert f"adapter: {file}" in printed
    assert "trained for 2 steps, all that were allowed" in printed
    record = json.loads((output / "run.json").read_text())
    assert record["concept"]["forget_prompts"] == ["a photo of cat"]
    assert record["concept"]["retain_prompts"] == ["a horse"]
    assert record["config"]["overwrite"]["steps"] == 2
    assert record["config"]["locate"]["keep"] == 0.05

    before = file.read_bytes()
    assert "--overwrite" in refused(*words)
    assert "is complete" in refused(*words, "--resume")
    assert file.read_bytes() == before

    assert cli.main(["inspect", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "cat, as dog" in printed
    assert "locate.keep" in printed
    assert cli.main(["inspect", str(file), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["bytes"] == file.stat().st_size
    assert sum(layer["selected"] for layer in described["layers"].values()) == described["selected"]

    evaluate = ("evaluate", model, "--adapter", file, "--device", "cpu", "--quiet")
    assert "--judge" in refused(*evaluate)
    assert "there is no judge 'clip'" in refused(*evaluate, "--judge", "clip", "--classes", "cat,horse")


def test_the_training_mode_is_asked_for_and_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml, output = tmp_path / "quick.toml", tmp_path / "out"
    toml.write_text(QUICK_TOML)
    words = ["unlearn", model, "--forget", "one", "--surrogate", "two", "--config", toml, "--device", "cpu", "--quiet"]
    words += ["--training-mode", "one-product", "--output", output]
    assert cli.main([str(word) for word in [*words, "--dtype", "bf16"]]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    layers = json.loads((output / "run.json").read_text())["run"]["training_mode"]["layers"]["one-product"]
    assert layers > 0
    assert f"{layers} layers in one product, weights rounded once a step and kept" in printed
    assert cli.main([str(word) for word in [*words, "--overwrite"]]) == 0
    assert "every product exact (nothing to round in float32)" in " ".join(capsys.readouterr().out.split())


def test_a_keep_that_selects_nothing_is_refused(refused: Any, model: Path, tmp_path: Path) -> None:
    toml = tmp_path / "quick.toml"
    toml.write_text(QUICK_TOML)
    words = ["unlearn", model, "--forget", "one", "--surrogate", "two", "--output", tmp_path / "out", "--config", toml]
    assert "keep" in refused(*words, "--keep", 1e-9, "--device", "cpu", "--quiet")
    assert "matches no Linear" in refused(*words, "--target", "nothing", "--device", "cpu", "--quiet", "--overwrite")


def test_a_memory_budget_that_holds_nothing_is_refused(refused: Any, model: Path, tmp_path: Path) -> None:
    toml, output = tmp_path / "quick.toml", tmp_path / "out"
    toml.write_text(QUICK_TOML)
    words = ["unlearn", model, "--forget", "one", "--surrogate", "two", "--output", output, "--config", toml]
    words += ["--device", "cpu", "--quiet", "--saliency"]
    told = refused(*words, "denoising", "--memory-budget", "1kB")
    assert "at least" in told and "Raise --memory-budget" in told
    assert "'lots' is no amount of memory" in refused(*words, "denoising", "--memory-budget", "lots")
    assert "memory_budget would be ignored" in refused(*words, "closed-form", "--memory-budget", "8GB")
    assert not output.exists()


def test_a_call_that_fails_early_leaves_the_output_folder_free(refused: Any, model: Path, tmp_path: Path) -> None:
    toml, output, images = tmp_path / "quick.toml", tmp_path / "out", tmp_path / "images"
    toml.write_text(QUICK_TOML)
    words = ["unlearn", model, "--forget", "one", "--surrogate", "two", "--config", toml, "--device", "cpu", "--quiet"]
    assert "must be letters, digits" in refused(*words, "--output", output, "--name", "a-b")
    assert not output.exists()
    images.mkdir()
    for _ in range(2):
        assert "image" in refused(*words, "--output", output, "--forget-images", images)
    assert list(output.iterdir()) == []
    assert "is a file, not a folder" in refused(*words, "--output", toml / "below")


def test_results_that_could_not_be_written_are_refused_before_the_work(
    refused: Any, model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fade.loading.load_model", lambda *_: pytest.fail("the work began"))
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert "it is a folder" in refused("generate", model, "--prompt", "x", "--output", folder)
    assert "is a file, not a folder" in refused("generate", model, "--prompt", "x", "--output", adapter / "x.png")
    for option in ("--json", "--report"):
        assert "it is a folder" in refused("evaluate", model, "--adapter", adapter, option, folder)


def test_a_scale_must_be_a_number(refused: Any, model: Path, adapter: Path, tmp_path: Path) -> None:
    words = ["generate", model, "--adapter", adapter, "--prompt", "x", "--output", tmp_path / "x.png"]
    assert "must be a number between -1e+06 and 1e+06, not nan" in refused(*words, "--scale", "nan", "--device", "cpu")


def test_others_may_read_what_is_written(model: Path, adapter: Path, tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    words = ["merge", model, "--adapter", adapter, "--output", tmp_path / "merged"]
    assert cli.main([str(word) for word in words]) == 0
    written = [adapter, *(tmp_path / "merged").rglob("*.safetensors")]
    assert len(written) > 2
    assert {path.stat().st_mode for path in written} == {usual.stat().st_mode}


def test_generate_draws_the_same_image_for_the_same_seed(
    model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(name: str, *more: object) -> bytes:
        words = ["generate", model, "--prompt", "a cat", "--output", tmp_path / name, "--steps", 2, "--device", "cpu"]
        assert cli.main([str(word) for word in (*words, "--quiet", *more)]) == 0
        path = tmp_path / name
        return Image.open(path).convert("RGB").tobytes() if path.exists() else b""

    base = draw("base.png")
    adapted = draw("adapted.png", "--adapter", adapter)
    assert adapted != base
    assert draw("again.png", "--adapter", adapter) == adapted
    assert draw("off.png", "--adapter", adapter, "--scale", 0) == base
    assert draw("other.png", "--seed", 1) != base
    assert draw("twice.png", "--adapter", adapter, "--adapter", adapter) != adapted
    draw("many.png", "--count", 2)
    assert Image.open(tmp_path / "many-1.png").convert("RGB").tobytes() == base
    assert (tmp_path / "many-2.png").is_file()
    assert "many-2.png" in "".join(capsys.readouterr().out.split())


def test_generate_refuses_a_file_that_is_no_image(refused: Any, tmp_path: Path) -> None:
    line = refused("generate", "digitcanvas", "--prompt", "x", "--output", tmp_path / "x.txt")
    assert "known image type" in line


def test_an_adapter_for_another_base_is_refused_by_name(
    refused: Any, model: Path, adapter: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    changed = load_model(str(model), "cpu")
    with torch.no_grad():
        changed.unet.conv_in.weight[0, 0, 0, 0] += 1
    changed.save_pretrained(other)
    words = ["generate", other, "--adapter", adapter, "--prompt", "x", "--output", tmp_path / "x.png", "--steps", 1]
    line = refused(*words, "--device", "cpu", "--quiet")
    assert "was trained on" in line
    assert "this pipeline is" in line
    assert cli.main([str(word) for word in (*words, "--any-base", "--device", "cpu", "--quiet")]) == 0


def test_damaged_adapter_files_are_refused(refused: Any, model: Path, adapter: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(adapter.read_bytes()[:-10])
    foreign = tmp_path / "foreign.safetensors"
    foreign.write_bytes((model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    for file, words in ((truncated, "truncated or damaged"), (foreign, "is not a FADE adapter")):
        assert words in refused("inspect", file)
        assert words in refused("merge", model, "--adapter", file, "--output", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


HOSTILE = "\x1b[2J\x9b31m\u202e\u2066\r\nerror: all is well [red]"


@pytest.mark.parametrize("as_json", [False, True])
def test_text_in_a_file_never_reaches_the_terminal_raw(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    content = read_adapter_file(adapter)
    metadata = content.metadata | {"base": HOSTILE, "created": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    metadata["concept"] |= {"forget": f"cat{HOSTILE}", "surrogate": HOSTILE}
    metadata["config"]["locate"] |= {HOSTILE: [HOSTILE]}
    metadata["run"] = {"seconds": {HOSTILE: 1.0}}
    layers = {f"{name}{HOSTILE}": tensors for name, tensors in content.layers.items()}
    hostile = tmp_path / "\x1b[2J\u202e[bold]\n.safetensors"
    write_adapter_file(hostile, metadata, layers)
    assert cli.main(["inspect", str(hostile), *(["--json"] if as_json else [])]) == 0
    out, err = capsys.readouterr()
    assert all(printable(line) == line for line in out.split("\n"))
    assert err == ""
    if as_json:
        assert json.loads(out)["concept"]["forget"] == f"cat{HOSTILE}"
    else:
        assert r"cat\x1b[2J\x9b31m" in out


def test_names_of_files_never_reach_the_terminal_raw(
    refused: Any, adapter: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused("inspect", tmp_path / "\x1b[2J\u202e\n.safetensors")
    assert printable(line) == line and r"\x1b[2J\u202e" in line
    output = tmp_path / "\x1b[2J[bold]"
    assert cli.main(["merge", str(model), "--adapter", str(adapter), "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert all(printable(line) == line for line in out.split("\n"))
    assert f"model: {tmp_path}/\\x1b[2J[bold]" in out
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["env", "--json"]) == 0
        assert warnings.formatwarning("\x1b[2J\nx", UserWarning, "", 1) == "warning: \\x1b[2J x\n"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merge_writes_a_plain_model_with_the_adapters_weights(
    dtype: str, model: Path, adapter: Path, tmp_path: Path, refused: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    words = ["merge", model, "--adapter", adapter, "--output", output, "--dtype", dtype, "--scale", "0.5"]
    assert cli.main([str(word) for word in words]) == 0
    assert "weights changed" in capsys.readouterr().out
    reference = load_model(str(model), "cpu", dtype)
    merged = StableDiffusionPipeline.from_pretrained(output, torch_dtype=reference.unet.dtype)
    assert not getattr(merged.unet, "peft_config", {})
    attached = load_adapter(reference, adapter, scale=0.5)
    attached.merge()
    assert same_bits(weights(merged), weights(reference))
    assert torch.equal(denoise(merged), denoise(reference))

    mark = output / "mark"
    mark.write_text("old")
    assert "exists already" in refused(*words)
    assert mark.exists()
    assert cli.main([str(word) for word in (*words, "--overwrite")]) == 0
    assert not mark.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "merged", "model"]


def test_merge_never_replaces_what_is_no_model(refused: Any, model: Path, adapter: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    line = refused("merge", model, "--adapter", adapter, "--output", precious, "--overwrite")
    assert "is not a diffusers model folder" in line
    assert (precious / "thesis.txt").read_text() == "years"


def test_a_merge_that_fails_half_way_keeps_the_old_folder(
    refused: Any, model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "merged"
    words = ["merge", model, "--adapter", adapter, "--output", output]
    assert cli.main([str(word) for word in words]) == 0
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}

    def full(self: object, folder: Path, **_: object) -> None:
        Path(folder).mkdir()
        (Path(folder) / "model_index.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", full)
    assert "No space left on device; nothing was changed" in refused(*words, "--overwrite", status=1)
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "merged", "model"]


def test_what_nobody_thought_of_is_one_line(
    refused: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the moon is full\nand more")

    monkeypatch.setattr(fade.unlearning, "unlearn", fail)
    words = ["unlearn", model, "--forget", "a cat", "--surrogate", "dog", "--output", tmp_path / "out"]
    line = refused(*words, status=1)
    assert line.startswith("error: RuntimeError: the moon is full (unexpected: FADE_DEBUG=1 shows where")
    monkeypatch.setenv("FADE_DEBUG", "1")
    with pytest.raises(RuntimeError):
        cli.main([str(word) for word in words])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seed", "99999999999999999999"], "seed"),
        (["--count", "1000000000"], "count"),
        (["--steps", "5000"], "denoising steps must be between 1 and"),
        (["--guidance", "nan"], "guidance scale must be a finite number"),
    ],
)
def test_numbers_nobody_can_draw_with(refused: Any, model: Path, tmp_path: Path, words: list[str], told: str) -> None:
    assert told in refused("generate", model, "--prompt", "a dog", "--output", tmp_path / "o.png", *words)
    assert not list(tmp_path.glob("*.png"))


def test_ctrl_c_says_how_to_go_on(refused: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fade.unlearning, "unlearn", interrupt)
    words = ["unlearn", model, "--forget", "a cat", "--surrogate", "dog", "--output", tmp_path / "out", "--overwrite"]
    assert "nothing was started yet" in refused(*words, status=130)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "request.json").write_text("{}")
    line = refused(*words, status=130)
    assert line.startswith("interrupted: go on with: fade unlearn ")
    assert "--forget 'a cat'" in line
    assert line.endswith("--resume")
    assert "--overwrite" not in line
    monkeypatch.setattr(fade.demo, "run_demo", interrupt)
    assert "run the same command again" in refused("demo", status=130)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "file"), "file: No space left on device (the disk is full"),
        (PermissionError(13, "Permission denied", "here"), "here: Permission denied"),
    ],
)
def test_a_failing_system_is_one_line(
    refused: Any, monkeypatch: pytest.MonkeyPatch, error: OSError, words: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(fade.demo, "run_demo", fail)
    assert words in refused("demo", status=1)


def test_env_tells_versions_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    for name in ("torch", "diffusers", "peft", "python", "kernels:"):
        assert name in printed
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] in printed


def test_seeds_are_unlearncanvas_first() -> None:
    assert first_seeds(3) == (188, 288, 588)
    assert first_seeds(5) == (188, 288, 588, 688, 888)
    assert len(set(first_seeds(40))) == 40
    with pytest.raises(FadeError, match="at least one seed"):
        first_seeds(0)


@pytest.mark.parametrize(("method", "path"), [("distillation", "both"), ("closed-form", "text path")])
def test_the_demo_leaves_everything_and_replaces_only_when_told(
    refused: Any,
    method: str,
    path: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    opened: list[str] = []
    monkeypatch.setattr(fade.demo, "evaluate", functools.partial(fade.demo.evaluate, steps=2, seeds=(188,)))
    monkeypatch.setattr("webbrowser.open", opened.append)
    output = tmp_path / "report"
    steps = ["--steps", 2] if method == "distillation" else []
    words = ["demo", "--output", output, "--method", method, *steps, "--keep", 0.02, "--quiet"]
    assert cli.main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    assert "UA" in printed
    assert opened == [(output / "report.html").resolve().as_uri()]
    metrics = json.loads((output / "metrics.json").read_text())
    right = {word: row["after"] for rows in metrics["receivers"].values() for word, row in rows.items()}
    assert set(right) == {*DIGITS, *STYLES}
    assert metrics["UA"] == pytest.approx(100 - right["three"])
    assert metrics["IRA"] == pytest.approx(sum(right[word] for word in DIGITS if word != "three") / 9)
    assert metrics["CRA"] == pytest.approx(sum(right[word] for word in STYLES) / 8)
    assert metrics["keep"] == 0.02
    assert metrics["path"] == path
    assert metrics["drift"] > 0
    assert metrics["adapter_bytes"] == (output / "adapter.safetensors").stat().st_size
    assert {"locate", "overwrite", "evaluate", "total"} <= metrics["seconds"].keys()
    assert metrics["seconds"]["total"] > metrics["seconds"]["evaluate"] > 0
    assert metrics["peak_memory_bytes"].keys() == {"locate", "overwrite"}
    assert metrics["settings"]["images"] == 80
    assert "three" in (output / "report.html").read_text(encoding="utf-8")
    assert Image.open(output / "before-after.png").width > 300

    before = (output / "metrics.json").read_bytes()
    assert "--overwrite" in refused(*words)
    assert (output / "metrics.json").read_bytes() == before

    file, report = tmp_path / "numbers.json", tmp_path / "again.html"
    again = ["evaluate", "digitcanvas", "--adapter", output / "adapter.safetensors", "--json", file, "--report", report]
    assert cli.main([str(word) for word in (*again, "--seeds", 1, "--steps", 3, "--device", "cpu", "--quiet")]) == 0
    numbers = json.loads(file.read_text())
    assert numbers["settings"]["seeds"] == [188]
    assert numbers["adapter_bytes"] == metrics["adapter_bytes"]
    assert report.stat().st_size > 10_000
    assert "do not know" not in capsys.readouterr().err


def test_options_of_training_are_not_ignored_in_silence(refused: Any, tmp_path: Path) -> None:
    words = ["--method", "closed-form", "--output", tmp_path / "out", "--quiet"]
    assert "--steps would be ignored: the method closed-form trains nothing" in refused("demo", *words, "--steps", 3)
    for option, value in (
        ("--steps", 3), ("--learning-rate", 0.1), ("--forget-weight", 1), ("--retain-weight", 2),
        ("--timesteps", "band"),
    ):  # fmt: skip
        line = refused("unlearn", "digitcanvas", "--forget", "three=eight", *words, option, value)
        assert f"{option} would be ignored" in line and "both or distillation" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("forget", "surrogate"), [("three", "neon"), ("cat", "dog"), ("three", "three")])
def test_the_demo_refuses_words_it_cannot_draw(refused: Any, tmp_path: Path, forget: str, surrogate: str) -> None:
    line = refused("demo", "--forget", forget, "--surrogate", surrogate, "--output", tmp_path / "out", "--quiet")
    assert forget in line
    assert not (tmp_path / "out").exists()


def test_a_program_of_its_own_keeps_freed_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """glibc's switches are set where `fade` is started, and nowhere else: not from within another program, not where
    the C library has none, and not where somebody has set them."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(sys, "argv", ["fade", "--help"])
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    with_it, without = SimpleNamespace(mallopt=lambda *given: asked.append(given)), SimpleNamespace()
    monkeypatch.setattr("ctypes.CDLL", lambda name: without)
    cli.main()
    monkeypatch.setattr("ctypes.CDLL", lambda name: with_it)
    cli.main(["--help"])
    assert asked == []
    cli.main()
    assert {parameter for parameter, _ in asked} == {-1, -2, -3} and all(size > 0 for _, size in asked)
    asked.clear()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    cli.main()
    assert asked == []
    capsys.readouterr()
