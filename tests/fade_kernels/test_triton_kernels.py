"""Runs tests/interpreter in a process of its own: Triton interprets its kernels only if told before it is imported."""

import os
import subprocess
import sys
from pathlib import Path

from kernel_testing import needs_interpreter

ROOT = Path(__file__).parents[2]


@needs_interpreter
def test_kernels_under_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreter"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
