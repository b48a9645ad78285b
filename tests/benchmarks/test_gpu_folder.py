"""tests/gpu as far as a machine without a GPU can tell: nothing is missing, nothing is misspelt."""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
MOST = 220  # Triton builds, of 0.7 s each, are what a run on a GPU waits for; 150 without gradients


def run(*options: str, **variables: str) -> str:
    """pytest tests/gpu where nothing can be imported that a bare GPU machine lacks; its output."""
    folders = [str(TESTS / "tools"), str(TESTS / "ops")]  # -p imports ahead of pythonpath
    path = os.pathsep.join(filter(None, [*folders, os.environ.get("PYTHONPATH")]))
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # plugins come with hypothesis and others
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-p", "gpu_dry_run", *options]
    done = subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def test_without_a_gpu_every_test_is_skipped_and_says_so():
    output = run("-rs", "-v")
    results = re.findall(r"^tests/gpu/\S+::.*? ([A-Z]{5,})\b", output, re.MULTILINE)
    assert len(results) > 100
    assert set(results) == {"SKIPPED"}
    reasons = re.findall(r"^SKIPPED \[(\d+)\] .*: (.*)$", output, re.MULTILINE)
    assert {reason for _, reason in reasons} == {"no GPU"}
    assert sum(int(count) for count, _ in reasons) == len(results)


def test_bodies_run_on_a_cpu_and_triton_builds_are_few():
    output = run("-q", "-rs", VFENGINE_TEST_DEVICE="cpu")
    told = re.search(r"^Triton specialisations: (\d+)\n(?:  .*\n)*", output, re.MULTILINE)
    print(told[0])
    assert 60 < int(told[1]) <= MOST  # fewer would mean that they are not counted
    reasons = re.findall(r"^SKIPPED .*: (.*)$", output, re.MULTILINE)
    assert set(reasons) == {"the extra flash is missing"}
