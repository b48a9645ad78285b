"""Philox4x32-10 and Box-Muller for the kernels of frames                      csrc/common/noise.h

The same operations in the same order as the C++ (compile with enable_fp_fusion=False, so that none
of them becomes an FMA): the same bits.
"""

import triton
import triton.language as tl
from triton.language.random import philox_impl

from vfengine.ops.decomposed_noise import STEP_BITS

BASE_STREAM = tl.constexpr(0)
RESIDUAL_STREAM = tl.constexpr(1 << STEP_BITS)
BLOCK = 1024
MAX_RUN = 8


def key_halves(seed: int) -> tuple[int, int]:
    """The two words of a seed in [0, 2^64) as signed integers, which Triton passes as int32."""
    return tuple(
        half - (1 << 32) if half >> 31 else half for half in (seed & 0xFFFFFFFF, seed >> 32)
    )


def frames_grid(batch: int, frames: int, pixels: int) -> tuple[tuple[int], int, dict[str, object]]:
    """A grid of BLOCK pixels by runs of frames: (grid, runs of a clip, constants of the kernel).

    ValueError where an index within a frame does not fit the int32 of the kernels.
    """
    if pixels > 2**31 - 2**16:
        raise ValueError(f"backend='triton' takes frames of up to 2^31 - 2^16 elements: {pixels}")
    run = min(MAX_RUN, triton.next_power_of_2(frames))
    runs = triton.cdiv(frames, run)
    constants = {
        "PIXELS": pixels,
        "RUN": run,
        "BLOCK": BLOCK,
        "num_warps": 4,
        "enable_fp_fusion": False,  # the same bits as the C++ kernels
    }
    return (triton.cdiv(pixels, BLOCK) * batch * runs,), runs, constants


@triton.jit
def words(counter, frame, sample, stream_and_step, key_lo, key_hi):
    """The four words of counters [K]; frame, sample, stream_and_step and the key are scalars."""
    counter = counter.to(tl.uint32, bitcast=True)
    zero = counter * 0
    return philox_impl(
        counter,
        zero + frame.to(tl.uint32),
        zero + sample.to(tl.uint32),
        zero + stream_and_step.to(tl.uint32),
        key_lo.to(tl.uint32, bitcast=True),
        key_hi.to(tl.uint32, bitcast=True),
    )


@triton.jit
def radius(w):
    """√(-2 ln((w + 1) / 2^24)), w in [0, 2^24)."""
    bits = (w + 1).to(tl.float32).to(tl.int32, bitcast=True)
    from_root = bits - 0x3F3504F3
    e = ((from_root >> 23) - 24).to(tl.float32)
    f = ((from_root & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = f * 0.06746640801429749 - 0.11675652116537094
    p = p * f + 0.11888162046670914
    p = p * f - 0.1240558922290802
    p = p * f + 0.14219552278518677
    p = p * f - 0.1666799634695053
    p = p * f + 0.2000211924314499
    p = p * f - 0.25000008940696716
    p = p * f + 0.3333331346511841
    ff = f * f
    e_ln2 = e * 0.693145751953125
    sum = e_ln2 + f
    lost = (e_ln2 - sum) + f
    rest = (ff * 0.5 - (ff * f) * p) - e * 1.428606765330187e-06
    return tl.sqrt_rn((sum + (lost - rest)) * -2.0)


@triton.jit
def cos_and_sin(w):
    """cos and sin of 2 π w / 2^24, w in [0, 2^24)."""
    quadrant = (w + (1 << 21)) >> 22
    f = (w - (quadrant << 22)).to(tl.float32) * 2.384185791015625e-07
    ff = f * f
    s = ff * 0.00015820674889255315 - 0.004681266378611326
    s = s * ff + 0.07969257980585098
    s = s * ff - 0.6459640860557556
    s = s * ff + 0.07079632580280304
    s = f * 1.5 + f * s
    c = ff * -0.0009040216682478786 + 0.02086028829216957
    c = c * ff - 0.25366923213005066
    c = c * ff + 0.2337005138397217
    rounded = 1.0 - ff
    c = rounded + (((1.0 - rounded) - ff) - ff * c)
    odd = (quadrant & 1) == 1
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return (
        tl.where(((quadrant + 1) & 2) == 2, -cos, cos),
        tl.where((quadrant & 2) == 2, -sin, sin),
    )


@triton.jit
def interleave(a, b, c, d):
    """[K] each -> [4 K] = a0 b0 c0 d0 a1 b1 c1 d1 …"""
    joined = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(joined, [4 * a.shape[0]])


@triton.jit
def draw(
    first, frame, sample, stream_and_step, key_lo, key_hi, BLOCK: tl.constexpr, WORDS: tl.constexpr
):
    """fp32 normals, or with WORDS the int32 words, of the elements first … first + BLOCK."""
    counter = first // 4 + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = words(counter, frame, sample, stream_and_step, key_lo, key_hi)
    if WORDS:
        drawn = interleave(w0, w1, w2, w3).to(tl.int32, bitcast=True)
    else:
        r0, r1 = radius((w0 >> 8).to(tl.int32)), radius((w2 >> 8).to(tl.int32))
        cos0, sin0 = cos_and_sin((w1 >> 8).to(tl.int32))
        cos1, sin1 = cos_and_sin((w3 >> 8).to(tl.int32))
        drawn = interleave(r0 * cos0, r0 * sin0, r1 * cos1, r1 * sin1)
    return drawn
