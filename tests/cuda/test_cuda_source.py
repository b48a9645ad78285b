"""The CUDA source, every line of it, on the CPU (tests/tools/emulation), under sanitizers.

What runs is `kernel_cases.run`: every op through its public function, against its reference and,
where it promises bits, against those of the CPU kernels.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulation.build import (
    CSRC,
    EMULATION,
    build,
    build_program,
    command,
    coverage,
    environment,
)

TESTS = Path(__file__).resolve().parents[1]
DRIVER = EMULATION / "planted" / "residual_step.cu"

REFUSED_DEVICE = """
from vfengine.native import vfengine_native
try:
    clips = dict.fromkeys(("x", "g", "lam", "coeffs", "step", "out", "dtype"), 0)
    sizes = dict.fromkeys(("batch", "frames", "pixels", "num_steps"), 1)
    vfengine_native.remove_base_cuda(vfengine_native.FrameArgs(**clips, **sizes), 99, 0)
except RuntimeError as error:
    assert "cudaSetDevice" in str(error), error
else:
    raise AssertionError("device 99 was taken")
"""


# More clips than a grid has rows, so that blocks stride over the rest; and what the call of a CUDA
# kernel runs of torch's ops besides: nothing that could wait, copy or allocate.
MANY_CLIPS = """
import torch
from fake_cuda import ops_within
from vfengine.ops import residual_step
u, r = torch.randn(2, 70001, 1, 1, 1, 1)
g = torch.randn(70001, 1, 1, 1)
tables = torch.tensor([0.5]), torch.tensor([[0.9, 0.2, 0.1]]), torch.zeros(1, dtype=torch.int32)
expected = residual_step(u, r, g, *tables, seed=3, out=torch.empty_like(u), backend="cpu")
out = torch.empty_like(u)
call = lambda: residual_step(u, r, g, *tables, seed=3, out=out, backend="cuda")
assert ops_within(call) == ["vfengine.residual_step.default"], ops_within(call)
assert torch.equal(out, expected)
"""


def run_kernels(variant: str, folder: Path, *options: str, seed: int | None = None) -> str:
    env = environment(variant, folder, seed)
    script = [str(TESTS / "ops" / "kernel_cases.py"), "cuda", *options]
    done = subprocess.run(
        [*command(variant), sys.executable, *script], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("file", sorted(CSRC.glob("cuda/*.cu*")), ids=lambda file: file.name)
def test_every_kernel_begins_with_the_wait(file):
    """For those before it (csrc/common/cuda_launch.h); test_machine_code.py reads what became of it."""
    bodies = re.findall(r"^__global__[^{]*\{\n(.*)\n", file.read_text(), re.MULTILINE)
    assert all(first.strip() == "wait_for_inputs();" for first in bodies)
    assert len(bodies) == file.read_text().count("__global__")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    build("plain", folder)
    return folder


def test_kernels_on_all_shapes(plain):
    assert "decomposed_noise" in run_kernels("plain", plain)


def test_more_clips_than_a_grid_has_rows(plain):
    env = environment("plain", plain)
    env["PYTHONPATH"] += os.pathsep + str(TESTS / "tools")
    child = [sys.executable, "-c", MANY_CLIPS]
    done = subprocess.run(child, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_kernels_in_shuffled_order_of_blocks_and_threads(plain, seed):
    run_kernels("plain", plain, "--shapes", "small", seed=seed)


@pytest.mark.slow
def test_kernels_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    build("address", tmp_path)
    run_kernels("address", tmp_path)


@pytest.mark.slow
def test_kernels_under_thread_sanitizer(tmp_path):
    build("thread", tmp_path)
    run_kernels("thread", tmp_path, "--shapes", "race", seed=1)


@pytest.mark.slow
def test_every_line_of_the_cuda_source_runs(tmp_path, capsys):
    build("coverage", tmp_path)
    run_kernels("coverage", tmp_path, "--shapes", "small")
    child = [sys.executable, "-c", REFUSED_DEVICE]
    done = subprocess.run(child, env=environment("coverage", tmp_path), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    lines = coverage(tmp_path)
    names = {path.name for path in lines}
    assert {path.name for path in CSRC.glob("cuda/*")} <= names
    covered = sum(ran for ran, _ in lines.values())
    missed = {path.name: numbers for path, (_, numbers) in lines.items() if numbers}
    everything = covered + sum(map(len, missed.values()))
    with capsys.disabled():
        print(
            f"\nlines of csrc/cuda that ran: {covered} of {everything}, {covered / everything:.1%}"
        )
    assert not missed


# -- planted bugs ----------------------------------------------------------------------------------


def run_driver(
    variant: str,
    folder: Path,
    frames: int,
    pixels: int,
    *,
    misaligned: int = 0,
    overlap: int = 0,
    replace: tuple[str, str, str] | None = None,
) -> subprocess.CompletedProcess:
    """emulation/planted/residual_step.cu; replace: (file, correct text, planted text)."""
    sources = CSRC
    if replace is not None:
        name, correct, planted = replace
        sources = shutil.copytree(CSRC, folder / "csrc", dirs_exist_ok=True)
        text = (sources / name).read_text()
        assert text.count(correct) == 1, f"{name} no longer has: {correct}"
        (sources / name).write_text(text.replace(correct, planted))
    program = build_program(variant, DRIVER, folder / "driver", sources)
    numbers = (frames, pixels, misaligned, overlap)
    return subprocess.run(
        [*command(variant), str(program), *map(str, numbers)],
        env=environment(variant, None, seed=1),
        capture_output=True,
        text=True,
    )


def assert_caught(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode != 0, f"not caught; printed {result.stdout!r}"
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.mark.slow
def test_driver_is_clean_where_nothing_is_planted(tmp_path):
    for variant, pixels in (("address", 48), ("address", 33), ("thread", 48)):
        result = run_driver(variant, tmp_path, 3, pixels)
        assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    assert run_driver("address", tmp_path, 3, 48, misaligned=1).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("correct", "planted"),
    [
        ("if (k < count) x.at[k] = from[k];", "x.at[k] = from[k];"),
        ("if (k < count) to[k] = x.at[k];", "to[k] = x.at[k];"),
    ],
    ids=["load", "store"],
)
def test_tail_overrun_is_caught(tmp_path, correct, planted):
    result = run_driver("address", tmp_path, 3, 33, replace=("cuda/group.cuh", correct, planted))
    assert_caught(result, "heap-buffer-overflow", "_group")


@pytest.mark.slow
def test_missing_end_of_a_row_is_caught(tmp_path):
    planted = ("cuda/frames.cuh", "if (count > 0) {", "{")
    result = run_driver("address", tmp_path, 3, 48, replace=planted)
    assert_caught(result, "heap-buffer-overflow", "frames.cuh")


@pytest.mark.slow
def test_misaligned_vector_is_caught(tmp_path):
    planted = ("cuda/frames.cuh", "% 16 != 0) return false;", "% 16 != 0) continue;")
    result = run_driver("address", tmp_path, 3, 48, misaligned=1, replace=planted)
    assert_caught(result, "misaligned address", "16 byte alignment")


@pytest.mark.slow
def test_overlap_of_out_and_input_is_caught(tmp_path):
    """A case that vfengine.ops refuses: one thread writes what another still reads."""
    result = run_driver("thread", tmp_path, 2, 48, overlap=16)
    assert_caught(result, "data race", "frames.cuh")


@pytest.mark.slow
def test_overlap_of_blocks_is_caught(tmp_path):
    """Two blocks that own the same frame."""
    at = "at = (clip * args.frames + first)"
    planted = ("cuda/frames.cuh", at, at.replace("first", "first / 2"))
    result = run_driver("thread", tmp_path, 4, 48, replace=planted)
    assert_caught(result, "data race", "frames.cuh")
