"""Programmatic dependent launch: every Triton kernel waits for those before it, and then reads."""

import ast
from pathlib import Path

import pytest
import torch
from test_triton_kernels import ARCHITECTURES, specialised
from test_triton_network_kernels import group_norm, temporal

from vfengine.kernels import launch

KERNELS = sorted(Path(launch.__file__).parent.glob("*.py"))


def functions(file: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(file.read_text())) if type(node) is ast.FunctionDef]


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: file.stem)
def test_every_kernel_begins_with_the_wait(file):
    """A kernel is what is launched, and its name ends in _kernel."""
    for function in functions(file):
        if function.name.endswith("_kernel") and function.decorator_list:
            first = function.body[ast.get_docstring(function) is not None]
            assert ast.unparse(first) == "wait_for_inputs()", function.name


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: file.stem)
def test_kernels_are_launched_in_one_place(file):
    """kernel[grid](...) stands in kernels/launch.py alone, and takes what ends in _kernel."""
    for call in ast.walk(ast.parse(file.read_text())):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript):
            assert file.stem == "launch", ast.unparse(call)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_kernels_wait_before_they_touch_memory(arch):
    """Where the architecture has the instruction; older ones know nothing of it."""
    kernels = [
        specialised("residual_step", torch.float32, arch=arch),
        *group_norm(torch.bfloat16, arch),
        temporal(torch.bfloat16, arch, 16, 64),
    ]
    for compiled in kernels:
        assert compiled.waits_first == (arch >= 90)
        assert ("griddepcontrol" in compiled.asm["ptx"]) == (arch >= 90)


class Recorder:
    """In place of a kernel: the options that it is launched with."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: vars(self).update(options=options)


@pytest.mark.parametrize(
    ("able", "switch", "options"),
    [
        (True, None, {"num_warps": 4, "launch_pdl": True}),
        (True, "on", {"num_warps": 4, "launch_pdl": True}),
        (True, "off", {"num_warps": 4}),
        (False, "on", {"num_warps": 4}),
    ],
)
def test_launches_depend_where_they_can_and_may(able, switch, options, monkeypatch):
    monkeypatch.delenv("VFENGINE_PDL", raising=False)
    if switch is not None:
        monkeypatch.setenv("VFENGINE_PDL", switch)
    monkeypatch.setattr(launch, "_can_depend", lambda device: able)
    kernel = Recorder()
    launch.launch_kernel(kernel, (1,), (torch.zeros(1),), {"num_warps": 4})
    assert kernel.options == options


@pytest.mark.parametrize(
    ("device", "capability", "able"),
    [("cpu", None, False), ("cuda", (8, 9), False), ("cuda", (9, 0), True)],
)
def test_an_older_gpu_gets_plain_launches(device, capability, able, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    launch._can_depend.cache_clear()
    assert launch._can_depend(torch.device(device)) is able
    launch._can_depend.cache_clear()
