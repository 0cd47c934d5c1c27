"""PEFT's own test suite on masked layers: which tests pass on PEFT's LoRA layers and fail on ours, and why.

    python -m bench.peft_suite PATH [--form factors|values] [--output FILE]

PATH is a checkout of PEFT or its git directory, at or near the installed version; nothing of it is kept. Its
`tests/test_custom_models.py` runs in a process of its own, first with masked layers for every plain LoRA
(`bench.peft_suite_plugin` says which), then, those tests in which a masked adapter was made, on PEFT's own layers.
A test that PEFT's own layers fail says nothing about ours and is left out. Nothing is fetched: tests that need the
hub fail on both. Two minutes on two cores.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

from bench.harness import environment, print_table, write_json

SUITE = "tests/test_custom_models.py"
FORMS = ("factors", "values")
ROOT = Path(__file__).resolve().parent.parent


class NoSuiteError(ValueError):
    """A path that is no checkout and no git directory of PEFT, or a run that ended before its tests did."""


def unpack_tests(source: Path, into: Path) -> str:
    """Copies PEFT's `tests` folder from a checkout or a git directory and returns which revision it is of.

    Of a git directory the installed version's tag, where it has it, otherwise its newest commit. Raises NoSuiteError.
    """
    if (source / SUITE).is_file() and not (source / ".git").exists():
        shutil.copytree(source / "tests", into / "tests")
        return "unknown"
    git = ["git", "--git-dir", str(source / ".git" if (source / ".git").exists() else source)]

    def output(*arguments: str) -> bytes:
        return subprocess.run([*git, *arguments], check=True, capture_output=True).stdout

    tag = f"v{importlib.metadata.version('peft')}"
    try:
        revision = tag if output("tag", "--list", tag).strip() else "HEAD"
        archive = output("archive", revision, "tests")
        described = output("log", "-1", "--format=%h of %cs", revision).decode().strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoSuiteError(f"{source} is neither a checkout of PEFT with its tests nor its git directory") from error
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(into, filter="data")
    return tag if revision == tag else described


def run_suite(folder: Path, form: str, only: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Runs the suite in a fresh process on PEFT's own layers (form "plain") or on ours.

    Returns per test its `outcome` (passed, failed, skipped), the first line of the `reason`, `seconds`, and `masked`,
    the number of masked adapters made in it. Raises NoSuiteError where pytest did not get to the end.
    """
    report, selection, settings = folder / f"{form}.jsonl", folder / f"{form}.txt", folder / "pytest.ini"
    report.write_text("")
    # PEFT's own settings ask for plugins that measuring does not need.
    settings.write_text("[pytest]\nmarkers =\n    regression: of PEFT's own\n")
    command = [sys.executable, "-m", "pytest", "-c", str(settings), "--rootdir", str(folder), "-q", "--tb=no"]
    command += ["-p", "no:cacheprovider", "-p", "bench.peft_suite_plugin", "--no-header", "--no-summary", SUITE]
    command += ["--fade-form", form, "--fade-report", str(report)]
    if only is not None:
        selection.write_text("\n".join(only), encoding="utf-8")
        command += ["--fade-only", str(selection)]
    settings_of_process = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    result = subprocess.run(command, cwd=folder, env=os.environ | settings_of_process, capture_output=True, text=True)
    records = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    if result.returncode not in (0, 1) or not records:
        raise NoSuiteError(
            f"pytest ended with code {result.returncode}:\n{result.stdout[-3000:]}{result.stderr[-3000:]}"
        )
    return {record["test"]: record for record in records}


def compare(ours: dict[str, dict[str, Any]], plain: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Counts, and the tests that pass on PEFT's own layers and do not on ours, with the first line of the reason."""
    passing = [test for test, record in plain.items() if record["outcome"] == "passed"]
    failures = [
        {"test": test.removeprefix(f"{SUITE}::"), "reason": ours[test]["reason"]}
        for test in passing
        if ours[test]["outcome"] != "passed"
    ]
    return {
        "tests": len(plain),
        "pass_on_peft": len(passing),
        "pass_on_ours": len(passing) - len(failures),
        "seconds": round(sum(record["seconds"] for record in ours.values())),
        "failures": failures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a checkout of PEFT, or its git directory")
    parser.add_argument("--form", choices=FORMS, action="append", help="default: both")
    parser.add_argument("--output", type=Path, default=Path("bench/results/peft_suite.json"))
    arguments = parser.parse_args()
    forms = arguments.form or list(FORMS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            revision = unpack_tests(arguments.path, folder)
            ours = {form: run_suite(folder, form) for form in forms}
            masked = sorted({test for records in ours.values() for test, record in records.items() if record["masked"]})
            plain = run_suite(folder, "plain", masked)
        except NoSuiteError as error:
            parser.exit(1, f"{error}\n")
    results = {form: compare(records, plain) for form, records in ours.items()}
    write_json(
        arguments.output,
        {
            "environment": environment(),
            "peft": importlib.metadata.version("peft"),
            "tests_of": revision,
            "forms": results,
        },
    )
    for form, result in results.items():
        for failure in result["failures"]:
            print(f"{form}: {failure['test']}\n    {failure['reason']}")
    columns = ("tests", "pass_on_peft", "pass_on_ours")
    rows = [[form, *(str(result[column]) for column in columns)] for form, result in results.items()]
    print_table(["form", "tests", "pass on PEFT's layers", "of those on ours"], rows)


if __name__ == "__main__":
    main()
