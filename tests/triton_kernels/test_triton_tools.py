"""The tools of tests/tools/triton_tools.py catch what they are for."""

import mmap
import signal

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton_tools import compute_bf16_correctly, guarded, interpret, specialise

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
all_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@triton.jit
def copy_kernel(x_ptr, out_ptr, size, OVERRUN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size + OVERRUN
    x = tl.load(x_ptr + at, mask=inside, other=0)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def multiply_add_kernel(a_ptr, b_ptr, c_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(a_ptr + at) * tl.load(b_ptr + at) + tl.load(c_ptr + at))


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def interpret_copy(guards: str, dtype: torch.dtype = torch.bfloat16, overrun: int = 0) -> None:
    x = torch.arange(1, 100).to(dtype)
    out = torch.zeros_like(x)
    # One element more of room for the other, so that it is this one that is found out.
    x, out = (guarded(t, offset=0 if guards == name else 1) for name, t in [("x", x), ("out", out)])
    copy_kernel[(2,)](x, out, 99, OVERRUN=overrun, BLOCK=64)
    assert torch.equal(out, x)


def interpret_copies() -> None:
    for dtype in (*DTYPES.values(), torch.int32, torch.int64, torch.uint8):
        for guards in ("x", "out"):
            interpret_copy(guards, dtype)


def interpret_rounding() -> None:
    every = torch.arange(2**16, dtype=torch.int32) << 16  # the upper half of an fp32 is a bf16
    # Exact, just below, at and just above half a unit: NaN, infinity and subnormals among them.
    x = torch.cat([every + low for low in (0, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(torch.float32)
    truncated, out = (torch.empty(x.shape, dtype=torch.bfloat16) for _ in range(2))
    copy_kernel[(1,)](x, truncated, x.numel(), OVERRUN=0, BLOCK=2**19)
    compute_bf16_correctly()
    copy_kernel[(1,)](x, out, x.numel(), OVERRUN=0, BLOCK=2**19)
    expected = x.to(torch.bfloat16)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    # Where this fails the interpreter has learned to round, and the patch can go.
    assert not torch.equal(truncated.nan_to_num(), expected.nan_to_num())


def interpret_products() -> None:
    for dtype in DTYPES.values():
        a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        out, wrong = torch.empty(16, 16), torch.empty(16, 16)
        if dtype == torch.bfloat16:
            # Where this fails the interpreter has learned to multiply, and the patch can go.
            product_kernel[(1,)](a, b, wrong)
            assert (wrong - a.float() @ b.float()).abs().max() > 1e3
            compute_bf16_correctly()
        product_kernel[(1,)](a, b, out)
        torch.testing.assert_close(out, a.float() @ b.float())


def test_products_are_as_on_a_gpu():
    interpret("import test_triton_tools as tests; tests.interpret_products()")


@pytest.mark.parametrize("guards", ["x", "out"])
def test_off_by_one_mask_is_fatal(guards):
    script = f"import test_triton_tools as tests; tests.interpret_copy({guards!r}, overrun=1)"
    interpret(script, returncode=-signal.SIGSEGV)


def test_right_mask_passes():
    interpret("import test_triton_tools as tests; tests.interpret_copies()")


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.int32, torch.int8], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_guarded_is_a_copy(dtype, offset):
    tensor = torch.arange(2 * 3 * 1000).to(dtype).view(2, 3, 1000)
    copy = guarded(tensor, offset=offset)
    assert torch.equal(copy, tensor)
    assert copy.is_contiguous()
    end = copy.data_ptr() + copy.nbytes
    assert (end + offset * copy.element_size()) % mmap.PAGESIZE == 0
    row = copy[1, 2]
    del copy  # the memory lives as long as a view of it
    assert torch.equal(row, tensor[1, 2])
    with pytest.raises(ValueError, match="not empty"):
        guarded(tensor[:0])


def test_interpreter_rounds_bf16_as_torch_does():
    interpret("import test_triton_tools as tests; tests.interpret_rounding()")


def test_interpret_shows_why_it_failed():
    with pytest.raises(AssertionError, match=r"returncode 1, expected 0\n(.|\n)*lamp"):
        interpret("raise ValueError('lamp')")


def test_specialise_sees_alignment():
    x, out = torch.zeros(1025), torch.zeros(1024)
    constants = {"OVERRUN": 0, "BLOCK": 1024}
    aligned = specialise(copy_kernel, x[:1024], out, 1024, **constants)
    assert (aligned.loads, aligned.stores) == ({16: 2}, {16: 2})
    assert (aligned.count("LDG*.128*"), aligned.count("STG*.128*")) == (2, 2)
    assert aligned.usage["STACK"] == aligned.usage["LOCAL"] == aligned.count("LDL*") == 0
    assert 8 <= aligned.usage["REG"] <= 32
    shifted = specialise(copy_kernel, x[1:], out, 1024, **constants)
    assert (shifted.loads, shifted.stores) == ({4: 8}, {16: 2})
    assert shifted.count("LDG*.128*") == 0
    ragged = specialise(copy_kernel, x[:1024], out, 1023, **constants)
    assert (ragged.loads, ragged.stores) == ({4: 8}, {4: 8})
    halves = specialise(copy_kernel, x[:1024].half(), out.half(), 1024, **constants)
    assert (halves.loads, halves.stores) == ({16: 1}, {16: 1})


def test_specialise_takes_options_and_architectures():
    tensors = [torch.zeros(128) for _ in range(4)]
    for arch in (80, 90):
        fused, plain = (
            specialise(multiply_add_kernel, *tensors, arch=arch, BLOCK=128, enable_fp_fusion=fuse)
            for fuse in (True, False)
        )
        assert f".target sm_{arch}" in fused.asm["ptx"]
        assert (fused.count("FFMA*"), fused.count("FMUL*"), fused.count("FADD*")) == (1, 0, 0)
        assert (plain.count("FFMA*"), plain.count("FMUL*"), plain.count("FADD*")) == (0, 1, 1)


def test_specialise_leaves_the_driver_alone():
    former = driver._active
    specialise(copy_kernel, torch.zeros(64), torch.zeros(64), 64, OVERRUN=0, BLOCK=64)
    assert driver._active is former
    with pytest.raises(TypeError, match="specialise: expected"):
        specialise(specialise)
