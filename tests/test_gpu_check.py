"""benchmarks/gpu_check.py as far as a machine without a GPU can tell."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vfengine.ops import residual_step_reference

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_check")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: make gpu-check runs")
def test_says_in_one_line_that_there_is_no_gpu(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, "benchmarks/gpu_check.py", "--json", str(report)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "gpu-check: torch sees no NVIDIA GPU here; nothing was run\n"
    assert not report.exists()


def test_loop_reads_its_step_from_the_counter(gpu_check):
    """The loop that a GPU captures, run plainly, against the formula step by step."""
    loop = gpu_check.Loop("cpu", "cpu")
    out = loop.run(loop.advance)
    u = loop.noise.double()
    for k in range(gpu_check.STEPS):
        step = torch.tensor([k])
        tables = (loop.g.double(), loop.lam, loop.coeffs, step)
        u = residual_step_reference(u, u.tanh(), *tables, seed=7)
    torch.testing.assert_close(out.double(), u, rtol=1e-5, atol=1e-5)
    assert torch.equal(loop.run(loop.advance), out)


def test_whole_clips_are_the_same_in_all_forms(gpu_check):
    report = gpu_check.whole_clips("cpu", num_inference_steps=2)
    assert report["passed"], report
    assert len(report["seconds"]) == 6


def test_benches_are_all_there(gpu_check):
    for name in gpu_check.BENCHES:
        assert callable(importlib.import_module(name).measure)


def test_kernel_tests_name_what_exists(gpu_check, monkeypatch):
    """The commands run; on a machine without a GPU the kernel cases fail, and that is reported."""
    ran = []

    def record(command, **_):
        ran.append(command)
        return subprocess.CompletedProcess(command, len(ran) == 2, "one\ntwo\n", "")

    monkeypatch.setattr(subprocess, "run", record)
    report = gpu_check.kernel_tests()
    assert not report["passed"]
    assert [run["passed"] for run in report["runs"]][:2] == [True, False]
    for command in ran[1:]:
        assert (ROOT / command[1]).exists()


def test_a_crash_is_reported_and_not_fatal(gpu_check):
    def crash():
        raise RuntimeError("no kernel image")

    report = gpu_check.guarded(crash)
    assert report == {"passed": False, "error": "RuntimeError: no kernel image"}
