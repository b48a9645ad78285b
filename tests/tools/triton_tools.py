"""Shared code of tests of Triton kernels without a GPU.

Semantics: `interpret` runs a script under Triton's interpreter, where `guarded` makes an access
past a tensor's end fatal and `compute_bf16_correctly` mends a conversion and a product.
Code: `specialise` compiles the specialisation that a GPU run with these arguments would pick, and
counts its memory accesses. It starts no kernel.
"""

import contextlib
import ctypes
import fnmatch
import functools
import mmap
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver, interpreter

NVIDIA_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
PROT_NONE = 0  # of sys/mman.h; the mmap module does not name it


def interpret(script: str, *, returncode: int = 0) -> str:
    """Run `script` in a child under TRITON_INTERPRET=1, with this sys.path; return its output.

    Raises AssertionError with that output where the child ends otherwise than with `returncode`,
    such as -signal.SIGSEGV. Triton reads TRITON_INTERPRET as kernels are defined, hence the child.
    """
    path = os.pathsep.join(sys.path)
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    output = child.stdout + child.stderr
    if child.returncode != returncode:
        raise AssertionError(f"returncode {child.returncode}, expected {returncode}\n{output}")
    return output


def compute_bf16_correctly() -> None:
    """Make the interpreter round fp32 to bf16 to nearest even, as a GPU does; it truncates.

    And make tl.dot multiply bf16 matrices: it multiplies their bits, as integers.
    """
    convert = interpreter._convert_float
    if getattr(convert, "rounds_bf16", False):
        return

    def rounding_bf16(x, source, target, rounding):
        truncate = rounding is not None and "RTZ" in str(rounding)
        if (source, target) != (tl.float32, tl.bfloat16) or truncate:
            return convert(x, source, target, rounding)
        rounded = torch.from_numpy(x.copy()).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view("uint16")

    rounding_bf16.rounds_bf16 = True
    interpreter._convert_float = rounding_bf16
    product = interpreter.InterpreterBuilder.create_dot

    def product_of_bf16(self, a, b, d, *options):
        return product(self, _widened(a), _widened(b), d, *options)

    interpreter.InterpreterBuilder.create_dot = product_of_bf16


def _widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    """bf16, which the interpreter holds as the bits, as fp32; anything else as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.view("uint16").astype("uint32") << 16
    return interpreter.TensorHandle(bits.view("float32"), tl.float32)


def guarded(tensor: Tensor, *, offset: int = 0) -> Tensor:
    """A contiguous copy, `offset` elements before an inaccessible page.

    With offset=0 any access past the last element kills the process with SIGSEGV; so does one more
    than a page before the first element. Between those, bytes are 0xFF: NaN in fp32, fp16 and bf16,
    -1 in integers. The address has whatever alignment the size leaves it; `offset` picks another.
    """
    if tensor.numel() == 0:
        raise ValueError("guarded: expected a tensor that is not empty")
    page, nbytes = mmap.PAGESIZE, tensor.nbytes
    slack = offset * tensor.element_size()
    inner = -(-(nbytes + slack) // page) * page
    memory = mmap.mmap(-1, page + inner + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[page : page + inner] = b"\xff" * inner
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (address, address + page + inner):
        if libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    # The storage holds `memory`, so the pages live as long as any view of the tensor.
    copy = torch.frombuffer(
        memory, dtype=tensor.dtype, count=tensor.numel(), offset=page + inner - slack - nbytes
    )
    return copy.view(tensor.shape).copy_(tensor)


class StubDriver:
    """As much of a Triton driver as compiling needs; it names a GPU that may be absent."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        # JITFunction keeps its target and its kernels per device: never those of a real one.
        return f"stub sm_{self.arch}"

    def get_current_stream(self, device=None) -> int:
        return 0


@contextlib.contextmanager
def stub_driver(arch: int) -> Iterator[None]:
    """Within it, Triton compiles for sm_`arch`."""
    former = driver._active  # reset_active() would ask for a real driver
    driver.set_active(StubDriver(arch))
    try:
        yield
    finally:
        driver.set_active(former)


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled. Counts are of instructions in the code, not of executions."""

    asm: dict[str, str | bytes]  # ttir, ttgir, llir, ptx, cubin
    shared: int = 0  # bytes of shared memory that a launch asks for

    @property
    def loads(self) -> Counter[int]:
        """How many ld.global of the PTX move how many bytes per thread: Counter({16: 6, 4: 3})."""
        return _accesses(self.asm["ptx"], "ld")

    @property
    def stores(self) -> Counter[int]:
        """The same of st.global."""
        return _accesses(self.asm["ptx"], "st")

    @property
    def waits_first(self) -> bool:
        """Whether the PTX waits for the kernels before this one, and only then touches memory."""
        access = r"\b(?:ld|st|atom|red)\.global|\bcp\.(?:async|reduce)"
        first = re.search(rf"griddepcontrol\.wait|{access}", self.asm["ptx"])
        return first is not None and first[0] == "griddepcontrol.wait"

    @functools.cached_property
    def usage(self) -> dict[str, int]:
        """Resources of a thread: {"REG": registers, "STACK": bytes, ...}; spills are in STACK."""
        return {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", self._dump("resource-usage"))}

    @functools.cached_property
    def sass(self) -> Counter[str]:
        """Instructions of the machine code by name: Counter({"LDG.E.128": 6, "FFMA": 12, ...})."""
        instruction = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
        return Counter(re.findall(instruction, self._dump("sass"), re.MULTILINE))

    def count(self, pattern: str) -> int:
        """How many instructions match: "LDG*.128*" has 16-byte loads with any cache hint."""
        return sum(n for name, n in self.sass.items() if fnmatch.fnmatchcase(name, pattern))

    def _dump(self, what: str) -> str:
        env = {**os.environ, "PATH": f"{NVIDIA_BIN}:{os.environ['PATH']}"}  # it calls nvdisasm
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            command = [NVIDIA_BIN / "cuobjdump", f"--dump-{what}", file.name]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return done.stdout


def specialise(
    kernel_fn: JITFunction, *args, arch: int = 90, grid: tuple[int, ...] = (1,), **meta
) -> Compiled:
    """Compile kernel_fn for sm_`arch` as kernel_fn[grid](*args, **meta) would, without running it.

    The arguments are those of a launch, with CPU tensors: their dtypes and the alignment of their
    addresses count, and the divisibility of integers.
    """
    if not isinstance(kernel_fn, JITFunction):  # TRITON_INTERPRET=1 makes InterpretedFunctions
        raise TypeError(f"specialise: expected a JITFunction, got {type(kernel_fn).__name__}")
    with stub_driver(arch):
        kernel = kernel_fn.warmup(*args, grid=grid, **meta)
        return Compiled(dict(kernel.asm), kernel.metadata.shared)


def _accesses(ptx: str, instruction: str) -> Counter[int]:
    """Bytes of each access: ld.global.v4.b32 has 16, as has ld.global.L1::evict_last.v2.b64."""
    counts: Counter[int] = Counter()
    for form in re.findall(rf"\b{instruction}\.global(\S*)", ptx):
        vector = re.search(r"\.v(\d)", form)
        bits = re.search(r"\.[busf](\d+)$", form)
        counts[int(bits[1]) // 8 * (int(vector[1]) if vector else 1)] += 1
    return counts
