"""All of this folder needs a GPU: without one, every test is skipped, saying "no GPU".

Nothing here may import what a bare GPU machine lacks (av, diffusers, openvino, hypothesis,
pybullet), nor may what it imports. tests/gpu_dry_run.py runs the bodies on a CPU, to find what is
wrong with the tests themselves; it alone sets VFENGINE_TEST_DEVICE.
"""

import os

import pytest
import torch

DEVICE = os.environ.get("VFENGINE_TEST_DEVICE", "cuda")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")


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
