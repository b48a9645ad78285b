"""The Triton kernels without a GPU: in the interpreter, and as compiled for one (triton_tools)."""

import signal
from pathlib import Path

import pytest
import torch
from kernel_cases import DTYPES, all_dtypes
from triton_tools import Compiled, interpret, specialise

from vfengine.kernels import (
    base_step,
    decomposed_noise,
    decomposed_step,
    frames,
    path_step,
    remove_base,
    residual_step,
)
from vfengine.ops import Clock

RULES = {
    "residual_step": residual_step.RULE,
    "decomposed_step": decomposed_step.RULE,
    "remove_base": remove_base.RULE,
}
OPERANDS = {"residual_step": 3, "decomposed_step": 3, "remove_base": 2}  # clips and image read
VECTORS = {4: 2, 2: 1}  # of 16 bytes, for the 8 elements that one of 128 threads has of BLOCK
SCALARS = {"residual_step": 5, "decomposed_step": 5, "remove_base": 3}  # step, its row, λ
ARCHITECTURES = (80, 90, 100, 120)


def test_kernels_in_the_interpreter_with_a_guard_page_behind_every_buffer():
    """Values as the reference, bits as the CPU; an access past an end would kill the process."""
    script = "import sys, kernel_cases; sys.argv = {argv}; kernel_cases.main()"
    argv = ["kernel_cases", "triton", "--shapes", "small", "--guarded"]
    assert "decomposed_noise" in interpret(script.format(argv=argv))


def test_an_access_past_the_end_of_a_table_is_fatal(tmp_path):
    """The mask that keeps lam within its N entries, taken out of a copy of the kernels."""
    folder = Path(frames.__file__).parent
    for source in folder.glob("*.py"):
        text = source.read_text()
        if source.name == "frames.py":
            masked = "lam = tl.load(lam_ptr + n, mask=n < frames, other=0.0)"
            assert text.count(masked) == 1
            text = text.replace(masked, "lam = tl.load(lam_ptr + n)")
        (tmp_path / source.name).write_text(text)
    script = """
import sys, vfengine.kernels
vfengine.kernels.__path__ = [{folder!r}]
import kernel_cases
sys.argv = ["kernel_cases", "triton", "--shapes", "small", "--guarded"]
kernel_cases.main()
"""
    interpret(script.format(folder=str(tmp_path)), returncode=-signal.SIGSEGV)


def specialised(
    op: str,
    dtype: torch.dtype,
    pixels: int = 3 * 64 * 64,
    offset: int = 0,
    arch: int = 90,
    **options,
) -> Compiled:
    """Compiled for 2 clips of 16 frames, x lying `offset` elements off alignment."""
    size = 2 * 16 * pixels
    x = torch.zeros(size + offset, dtype=dtype)[offset:].view(2, 16, 1, 1, pixels)
    other = torch.zeros(x.shape, dtype=dtype)
    rule = RULES[op]
    coeffs = torch.zeros(10, rule.columns)
    step = torch.zeros(1, dtype=torch.int32)
    if rule.residual:
        options["r"] = other
    tables = {"lam": torch.zeros(16), "coeffs": coeffs, "step": step}
    grid, arguments, constants = frames.launch_arguments(
        rule, x=x, g=other[:, 0], out=torch.zeros_like(x), **tables, **options
    )
    return specialise(frames.frames_kernel, *arguments, arch=arch, grid=grid, **constants)


@all_dtypes
@pytest.mark.parametrize("op", RULES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_main_path_moves_16_bytes_an_instruction(op, dtype, arch):
    compiled = specialised(op, dtype, arch=arch)
    vectors = VECTORS[dtype.itemsize]
    assert compiled.loads == {16: OPERANDS[op] * vectors, 4: SCALARS[op]}
    assert compiled.stores == {16: vectors}
    assert compiled.count("LDG*.128*") == OPERANDS[op] * vectors
    assert compiled.count("STG*.128*") == vectors
    assert_no_local_memory(compiled, registers=64)


@all_dtypes
@pytest.mark.parametrize("op", ["residual_step", "decomposed_step"])
def test_guidance_and_drawn_noise_keep_whole_vectors(op, dtype):
    vectors = VECTORS[dtype.itemsize]
    shape = (2, 16, 1, 1, 3 * 64 * 64)
    drawn = specialised(op, dtype, base_seed=1, residual_seed=2)
    assert drawn.loads == {16: 3 * vectors, 4: 5}
    assert drawn.stores == {16: vectors}
    assert_no_local_memory(drawn, registers=168)
    if op == "residual_step":  # the other has no guidance
        guided = specialised(op, dtype, r_uncond=torch.zeros(shape, dtype=dtype))
        assert guided.loads == {16: 4 * vectors, 4: 5}
        assert_no_local_memory(guided, registers=64)


def a_clock() -> Clock:
    number = torch.zeros(1, dtype=torch.int32)
    return Clock(number, number.clone(), torch.zeros(10, dtype=torch.int64), torch.zeros(2).long())


@all_dtypes
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("seed", [None, 1], ids=["quiet", "drawn"])
def test_step_along_a_path_keeps_whole_vectors(dtype, arch, seed):
    vectors, pixels = VECTORS[dtype.itemsize], 3 * 64 * 64
    u, r = torch.zeros(2, 2, 16, 1, 1, pixels, dtype=dtype)
    states, c1 = torch.zeros(11, 2, 1, 1, pixels), torch.zeros(10, dtype=torch.float64)
    grid, arguments, constants = frames.launch_arguments(
        path_step.RULE,
        **{"x": u, "g": u, "r": r, "out": u, "lam": torch.zeros(16), "coeffs": torch.zeros(10, 3)},
        **{"step": torch.zeros(1, dtype=torch.int32), "residual_seed": seed},
        path=frames.BasePath(a_clock(), states, c1, 8),
    )
    compiled = specialise(frames.frames_kernel, *arguments, arch=arch, grid=grid, **constants)
    # d_t and d_p are fp32; c1 and the next timestep have 8 bytes
    assert compiled.loads == {16: 2 * vectors + 2 * VECTORS[4], 8: 2, 4: 5}
    assert compiled.stores[16] == vectors
    assert compiled.count("ATOM*") == 1
    assert "fma.rn" not in compiled.asm["ptx"]
    assert_no_local_memory(compiled, registers=168 if seed else 80)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("seed", [None, 1], ids=["quiet", "drawn"])
def test_base_step_moves_16_bytes_an_instruction(arch, seed):
    z, b, mixed = torch.zeros(3, 2, 3, 64, 64)
    states, tables = torch.zeros(11, 2, 3, 64, 64), (torch.zeros(10), torch.zeros(10, 3))
    grid, arguments, constants = base_step.launch_arguments(
        z, b, mixed, states, *tables, a_clock(), seed, 0
    )
    compiled = specialise(base_step.base_step_kernel, *arguments, arch=arch, grid=grid, **constants)
    assert compiled.loads == {16: 3 * VECTORS[4], 8: 1, 4: 5}
    assert compiled.stores[16] == 3 * VECTORS[4]
    assert compiled.count("ATOM*") == 1
    assert "fma.rn" not in compiled.asm["ptx"]
    assert_no_local_memory(compiled, registers=168 if seed else 80)


@all_dtypes
def test_misaligned_and_odd_clips_take_narrower_accesses(dtype):
    vectors = VECTORS[dtype.itemsize]
    shifted = specialised("residual_step", dtype, offset=1)
    assert shifted.loads[16] == 2 * vectors  # g and r, not u
    assert shifted.stores == {16: vectors}
    odd = specialised("residual_step", dtype, pixels=3 * 7 * 11)
    assert odd.loads[16] == odd.stores[16] == 0  # rows start anywhere
    assert odd.loads[dtype.itemsize] > 0


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.int32])
@pytest.mark.parametrize("base", [True, False], ids=["base", "residual"])
def test_noise_is_written_16_bytes_an_instruction(dtype, base):
    out = torch.zeros(2, 1 if base else 16, 3 * 64 * 64, dtype=dtype)
    grid, arguments, constants = decomposed_noise.launch_arguments(
        out, 1, base=base, step=0, sample_offset=0, frame_offset=0
    )
    compiled = specialise(decomposed_noise.noise_kernel, *arguments, grid=grid, **constants)
    assert compiled.stores == {16: VECTORS[dtype.itemsize]}
    assert compiled.loads[16] == 0
    assert_no_local_memory(compiled, registers=168)


def test_no_multiplication_is_fused_with_an_addition():
    """Fused, the bits would not be those of the CPU; what is left belongs to square roots."""
    guided = torch.zeros(2, 16, 1, 1, 3 * 64 * 64)
    compiled = specialised("residual_step", torch.float32, r_uncond=guided)
    assert "fma.rn" not in compiled.asm["ptx"]


def assert_no_local_memory(compiled: Compiled, registers: int) -> None:
    assert compiled.usage["LOCAL"] == compiled.usage["STACK"] == 0
    assert compiled.count("LDL*") == compiled.count("STL*") == 0
    assert compiled.usage["REG"] <= registers
