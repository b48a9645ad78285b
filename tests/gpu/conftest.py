"""All of this folder needs a GPU: without one, every test is skipped, saying "no GPU".

Nothing here may import what a bare GPU machine lacks (av, diffusers, openvino, hypothesis,
pybullet), nor may what it imports. tests/tools/gpu_dry_run.py runs the bodies on a CPU, to find
what is wrong with the tests themselves; it alone sets VFENGINE_TEST_DEVICE.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
DEVICE = os.environ.get("VFENGINE_TEST_DEVICE", "cuda")
SECONDS = 150  # of a test in a process of its own; one that hangs says where a little earlier

os.environ.setdefault("VFENGINE_TUNING", "process")  # side by side, nothing is measured well

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # each would take all cores
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(workers)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Runs a test that takes `alone` in a child, and only there."""
    if "alone" not in pyfuncitem.fixturenames or "VFENGINE_TEST_ALONE" in os.environ:
        return None
    timeout = f"faulthandler_timeout={SECONDS - 30}"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", timeout]
    # The import path of this process, xdist's workers and `python -m pytest` included.
    path = os.pathsep.join(sys.path)
    env = {"PYTHONPATH": path, "VFENGINE_TEST_ALONE": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"{ROOT}/{pyfuncitem.nodeid}"],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return True


@pytest.fixture
def alone() -> None:
    """For a test whose failure may leave CUDA broken: it has a process of its own."""


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests run: "cuda"."""
    return DEVICE


@pytest.fixture(autouse=True)
def exact_fp32():
    """No TF32, which torch lets convolutions use: fp32 here means fp32."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value
