"""Runs every harness of this folder: each script ends with code 0, and its last line sums up what it tried."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.chaos
HERE = Path(__file__).parent
WITHOUT = ("conftest", "peers")  # peers.py tries other projects, which are not installed here
HARNESSES = sorted(file.stem for file in HERE.glob("*.py") if not file.stem.startswith(("test_", "_", *WITHOUT)))


@pytest.mark.parametrize("harness", HARNESSES)
def test_harness(harness: str, summary: Callable[[str], None]) -> None:
    """In a process of its own: some fork, which is only safe before a process has threads."""
    done = subprocess.run([sys.executable, HERE / f"{harness}.py"], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{harness}.py ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    summary(lines[-1])
