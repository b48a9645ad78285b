"""A pytest plugin, `pytest tests/gpu -p gpu_dry_run`: finds on a CPU what is wrong with tests.

Nothing that a bare GPU machine lacks can be imported. With VFENGINE_TEST_DEVICE=cpu the bodies run
as well: the CPU's kernels stand in for the others, an input they refuse comes out as NaN, and each
specialisation that Triton would build is counted where it would be launched.
"""

import functools
import importlib
import os
import sys
import threading

for name in ("av", "diffusers", "openvino", "flash_attn", "pybullet", "hypothesis", "matplotlib"):
    sys.modules[name] = None  # `import` raises ModuleNotFoundError, find_spec returns None

import torch  # noqa: E402
from kernel_cases import LOOP_OPS, OPS  # noqa: E402
from triton.runtime import JITFunction, driver  # noqa: E402
from triton_tools import StubDriver  # noqa: E402

from vfengine import ops  # noqa: E402

DRY = os.environ.get("VFENGINE_TEST_DEVICE") == "cpu"
IN_PLACE = {"residual_step": "u", "decomposed_step": "z", "remove_base": "z"}
specialisations: set = set()
lock = threading.Lock()  # of the environment: overlapped phases run in two threads


def count_instead_of_compiling(self, key, *_):
    specialisations.add((self.fn.__qualname__, str(key)))


def stand_in(name: str, kernels: tuple[str, ...]):
    """The op as on a GPU: what "auto" takes there, and no kernel but the CPU's runs."""
    op = getattr(ops, name)
    importlib.import_module(f"vfengine.kernels.{name}")  # before TRITON_INTERPRET is set

    @functools.wraps(op)
    def call(*arguments, backend="auto", **options):
        if backend == "triton" or (backend == "auto" and "cuda" not in kernels):
            with lock:
                os.environ["TRITON_INTERPRET"] = "1"  # lets CPU tensors through
                try:
                    op(*arguments, backend="triton", **options)
                finally:
                    del os.environ["TRITON_INTERPRET"]
        try:
            backend = "cpu" if backend in ("cuda", "triton") else backend
            backend = backend if "cpu" in kernels else "reference"
            return op(*arguments, backend=backend, **options)
        except ValueError:
            if name not in IN_PLACE:
                raise
            written = options.get("out", options.get(IN_PLACE[name]))
            return written.fill_(torch.nan)

    return call


if DRY:
    driver.set_active(StubDriver(90))
    JITFunction._do_compile = count_instead_of_compiling
    loop_ops = {name: (*kernels, "cpu") for name, kernels in LOOP_OPS.items()}  # of its other ops
    for name, kernels in (OPS | loop_ops).items():
        setattr(ops, name, stand_in(name, kernels))


def pytest_terminal_summary(terminalreporter):
    if DRY:
        terminalreporter.write_line(f"Triton specialisations: {len(specialisations)}")
        names = sorted(name for name, _ in specialisations)
        for name in dict.fromkeys(names):
            terminalreporter.write_line(f"  {name}: {names.count(name)}")
