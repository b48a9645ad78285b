"""Programs on a team of threads (csrc/cpu/team.h): who comes late, who fails, and two at once."""

import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from test_planned import inputs, network, plan

from vfengine.native import vfengine_native as native
from vfengine.plan.builder import Builder, Source
from vfengine.plan.packing import pack

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def threads():
    former = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(former)


@pytest.mark.parametrize("case", ["image, context", "video"])
def test_more_threads_than_cores_give_the_same_bits(case, threads):
    """Some are then without a core whenever the others go on."""
    unet, values = plan(network(case), torch.float32), inputs(case)
    threads(1)
    expected = unet(**values)
    threads(4 * (os.cpu_count() or 1))
    for _ in range(20):
        assert torch.equal(unet(**values), expected)


def test_two_programs_at_once_give_the_same_bits(threads):
    threads(1)
    unets = [plan(network(case), torch.float32) for case in ("image", "video")]
    values = [inputs(case) for case in ("image", "video")]
    expected = [unet(**given) for unet, given in zip(unets, values, strict=True)]
    wrong = []

    def work(unet, given, result) -> None:
        torch.set_num_threads(3)
        wrong.extend(not torch.equal(unet(**given), result) for _ in range(10))

    workers = [
        threading.Thread(target=work, args=args)
        for args in zip(unets, values, expected, strict=True)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == [False] * 20


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_kernel_that_refuses_its_arguments_stops_the_program(count, threads):
    build = Builder(torch.float32)
    x = build.rows(64, 16)
    first = build.matmul(x, pack(torch.eye(16), None, torch.float32))
    table = torch.zeros(65, 64, dtype=torch.int32)
    wide = pack(torch.ones(16, 65 * 16), None, torch.float32)
    build.matmul([Source(first, table)], wide, items=(1, 64))
    program = build.program(first)
    program.view(x).fill_(2)
    threads(count)
    for _ in range(3):
        with pytest.raises(ValueError, match="row_matmul: too many taps, 65"):
            program.run()
        assert (program.view(first) == 2).all(), "what came before it was done"


def test_a_program_takes_native_ops_alone():
    with pytest.raises(ValueError, match="a program expects native ops, got rows"):
        native.Program([("rows", None)])


def compiled_stress(folder: Path, *flags: str) -> Path:
    """team_stress.cpp beside the team that the module is built with."""
    program = folder / "team_stress"
    sources = [Path(__file__).with_name("team_stress.cpp"), ROOT / "csrc" / "cpu" / "team.cpp"]
    command = ["g++", "-std=c++17", "-fopenmp", "-DVF_ISA=baseline", f"-I{ROOT / 'csrc'}", *flags]
    subprocess.run([*command, *map(str, sources), "-pthread", "-o", str(program)], check=True)
    return program


@pytest.mark.slow
def test_teams_under_thread_sanitizer(tmp_path):
    program = compiled_stress(tmp_path, "-O1", "-g", "-fsanitize=thread")
    # ThreadSanitizer of g++ 12 refuses the address layout of recent kernels.
    done = subprocess.run(
        ["setarch", "-R", str(program)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout == "0 wrong\n", done.stdout + done.stderr


def test_teams_of_late_and_failing_threads(tmp_path):
    program = compiled_stress(tmp_path, "-O1")
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "0 wrong\n", done.stdout + done.stderr
