"""Batches and trainings that are killed, and two at once (tests/tools/kill_commands.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent / "tools" / "kill_commands.py"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "train"])
def test_commands_that_are_killed_go_on_to_the_same_bytes(command, tmp_path):
    argv = [sys.executable, TOOL, "--only", command, "--kills", "10", "--folder", tmp_path]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(argv, capture_output=True, text=True, env=environ)
    assert run.returncode == 0, run.stdout + run.stderr
