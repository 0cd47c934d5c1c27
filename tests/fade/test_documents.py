"""The commands that README and docs/ tell people to type are ones that the command line takes."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from fade import cli
from fade.evaluation.requirements import requirements

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")], key=lambda path: path.name)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(path: Path, language: str | None = None) -> list[str]:
    """What is fenced off in a document, of one language or of any."""
    return [body for kind, body in FENCED.findall(path.read_text("utf-8")) if language in (None, kind)]


def steps(path: Path) -> list[dict]:
    """The steps of all jobs of the workflows in a document, in order."""
    workflows = [yaml.safe_load(body) for body in blocks(path, "yaml")]
    return [step for one in workflows for job in one["jobs"].values() for step in job["steps"]]


def typed(path: Path) -> list[list[str]]:
    """The words of every `fade …` line of a document's blocks, after a prompt or without, and of its workflows."""
    lines = [line.strip().removeprefix("$ ") for body in blocks(path) for line in body.splitlines()]
    if path.name == "regression-gate.md":
        lines = [line for line in lines if "adapters/" not in line]  # of the workflow, where it is cut in lines
        lines += [line.strip() for step in steps(path) for line in step.get("run", "").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("fade ")]


def parse(words: list[str]) -> typer.Context:
    """Reads a command as `fade` does, and runs nothing. Raises what typer raises."""
    _, name, *arguments = words
    group = typer.main.get_command(cli.app)
    with group.make_context("fade", [name], resilient_parsing=True) as context:
        command = group.get_command(context, name)
        assert command is not None, f"there is no fade {name}"
        return command.make_context(name, arguments, parent=context)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_blocks_are_taken(path: Path) -> None:
    for words in typed(path):
        context = parse(words)
        requirements(context.params.get("require"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_text_have_the_options_that_they_name(path: Path) -> None:
    text, group = FENCED.sub("", path.read_text("utf-8")), typer.main.get_command(cli.app)
    for words in (found.split() for found in re.findall(r"`fade ([a-z][^`]*)`", text)):
        command = group.commands.get(words[0])
        assert command is not None, f"there is no fade {words[0]}"
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        named = {word.partition("=")[0] for word in words if word.startswith("-")} - {"-h", "--help"}
        assert named <= known, f"fade {words[0]} has no {', '.join(sorted(named - known))}"


def test_what_the_command_line_does_not_take_would_be_found() -> None:
    for words in (["fade", "evaluate", "M", "--adapter", "A", "--nothing"], ["fade", "evaluate", "--adapter", "A"]):
        with pytest.raises(cli._USAGE_ERROR):
            parse(words)


def test_the_workflow_installs_what_the_build_needs_before_the_build_and_then_asks() -> None:
    page = ROOT / "docs" / "regression-gate.md"
    run = [shlex.split(step["run"]) for step in steps(page) if "run" in step]
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    first, second, gate = run
    assert first[:3] == ["pip", "install", "$TORCH"] and set(first[3:]) == set(needed)
    assert second == ["pip", "install", "--no-build-isolation", "$FADE"]
    (workflow,) = map(yaml.safe_load, blocks(page, "yaml"))
    assert workflow["env"]["TORCH"].startswith("torch==") and workflow["env"]["FADE"].startswith("git+https://")
    assert [gate] == [words for words in typed(page) if "adapters/no-three.safetensors" in words]
    (kept,) = (step["with"]["path"] for step in steps(page) if "actions/cache@" in step.get("uses", ""))
    (asking,) = (step for step in steps(page) if step.get("run", "").startswith("fade "))
    assert asking["env"] == {"FADE_CACHE": kept}
    written = {parse(gate).params[name].name for name in ("json_file", "report")}
    (upload,) = (step["with"]["path"] for step in steps(page) if "upload-artifact@" in step.get("uses", ""))
    assert set(upload.split()) == written
