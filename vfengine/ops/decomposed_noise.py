"""decomposed_noise: base noise b, or each frame's residual noise r_i, straight from a counter.

    b, r_i ~ N(0, I), b shared by all frames

One number depends on its seed and on where it sits, and on nothing else:

    key     = (seed mod 2^32, seed div 2^32)
    counter = (e div 4, frame, sample, stream * 2^24 + step)        e = index within [C, H, W]
    words   = philox4x32_10(counter, key)                           4 words, for e = 4k … 4k+3

    u = ((w >> 8) + 1) / 2^24 in (0, 1]      v = (w >> 8) / 2^24 in [0, 1)      exact in fp32
    n_0 = √(-2 ln u(w_0)) cos 2π v(w_1)      n_1 = √(-2 ln u(w_0)) sin 2π v(w_1)
    n_2 = √(-2 ln u(w_2)) cos 2π v(w_3)      n_3 = √(-2 ln u(w_2)) sin 2π v(w_3)

Stream 0 is base noise (frame 0 always: all frames share it), stream 1 residual noise. Step 0 is
the initial noise, step k+1 the noise a stochastic solver adds in its k-th step (k = 0, 1 …).

ln, cos and sin are polynomials in fp32, evaluated in one order by operations that IEEE 754 rounds
correctly and without FMA. So the normals, and not just the words, are equal bit for bit on every
device, instruction set and backend. Both factors of a normal are within 1 unit in the last place of
the exact ones, over all 2^24 arguments each.

Kernels: csrc/common/noise.h, csrc/cpu/decomposed_noise.cpp, csrc/cuda/decomposed_noise.cu,
kernels/decomposed_noise.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from vfengine.arguments import as_int
from vfengine.ops._dispatch import (
    DTYPE_NUMBERS,
    check_kinds,
    check_no_grad,
    check_tensor,
    choose_backend,
    register,
    run_native,
    unobserved,
)

BASE_STREAM = 0
RESIDUAL_STREAM = 1
STEP_BITS = 24

_NAME = "decomposed_noise"
_OUT_NUMBERS = {**DTYPE_NUMBERS, torch.int32: 3}
_MASK = 0xFFFFFFFF
_MUL = (0xD2511F53, 0xCD9E8D57)  # Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"
_WEYL = (0x9E3779B9, 0xBB67AE85)


def decomposed_noise(
    out: Tensor,
    base_seed: int | None = None,
    residual_seed: int | None = None,
    *,
    step: int = 0,
    sample_offset: int = 0,
    frame_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Fill `out` with one part of decomposed noise (VideoFusion, eq. of ε_i), rounded once.

    base_seed:     b, out [B, C, H, W]
    residual_seed: r, out [B, N, C, H, W]; exactly one of the two seeds

    out:           fp32, fp16 or bf16, contiguous. int32 takes the random 32-bit words themselves,
                   as two's complement
    step:          0 for the initial noise, k+1 for what step k of a stochastic solver adds
    sample_offset: index of the first sample, where out is part of a larger batch
    frame_offset:  index of the first frame, where out is part of a longer clip
    backend:       "auto", "cpu", "cuda", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns out. Raises TypeError for a dtype or a seed that is no int; ValueError for a shape,
    stride, device, backend or number it cannot take, and for tensors that autograd records.
    """
    check_kinds(_NAME, {"out": out}, backend=backend)
    given = {"base_seed": base_seed, "residual_seed": residual_seed}
    seeds = [
        None if seed is None else signed_seed(check_seed(seed, name))
        for name, seed in given.items()
    ]
    if (base_seed is None) == (residual_seed is None):
        got = "none" if base_seed is None else "both"
        raise ValueError(f"{_NAME}: expected base_seed or residual_seed, got {got}")
    place = {"step": step, "sample_offset": sample_offset, "frame_offset": frame_offset}
    place = check_place(_NAME, **place)
    (_run if unobserved(out) else _OP)(out, *seeds, *place.values(), backend)
    return out


def decomposed_noise_reference(
    shape: Sequence[int],
    base_seed: int | None = None,
    residual_seed: int | None = None,
    *,
    step: int = 0,
    sample_offset: int = 0,
    frame_offset: int = 0,
    words: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """What `decomposed_noise` writes into fp32 of this shape, in plain PyTorch.

    words: the random 32-bit words instead, int64 in [0, 2^32)
    """
    place = {"step": step, "sample_offset": sample_offset, "words": words, "device": device}
    if residual_seed is None:
        b = _draw((shape[0], 1, *shape[1:]), base_seed, BASE_STREAM, **place)
        return b.squeeze(1)
    return _draw(shape, residual_seed, RESIDUAL_STREAM, frame_offset=frame_offset, **place)


def philox4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """Ten Philox rounds (Salmon et al. 2011; bit-equal to Random123's philox4x32).

    counter: int64 [..., 4], key: int64 [..., 2], broadcastable, every value a word in [0, 2^32)
    returns: int64 [..., 4], words in [0, 2^32)
    """
    if counter.dtype != torch.int64 or key.dtype != torch.int64:
        raise TypeError(f"philox4x32_10: expected int64, got {counter.dtype} and {key.dtype}")
    if counter.shape[-1:] != (4,) or key.shape[-1:] != (2,):
        raise ValueError(
            f"philox4x32_10: expected counter [..., 4] and key [..., 2], "
            f"got {list(counter.shape)} and {list(key.shape)}"
        )
    return torch.stack(torch.broadcast_tensors(*_rounds(counter.unbind(-1), key.unbind(-1))), -1)


def check_seed(seed: int, name: str = "seed") -> int:
    """seed as Python's int; TypeError when it is none, ValueError outside [0, 2^64)."""
    number = as_int(seed)
    if number is None:
        raise TypeError(f"{name} must be an int, got {type(seed).__name__}")
    if not 0 <= number < 2**64:
        raise ValueError(f"{name} must be in [0, 2^64), got {seed}")
    return number


def signed_seed(seed: int | None) -> int | None:
    """A seed in [0, 2^64) as the int64 that an op's schema takes."""
    return seed - 2**64 if seed is not None and seed >> 63 else seed


def unsigned_seed(seed: int | None) -> int:
    """The seed that `signed_seed` was given; 0 for None."""
    return 0 if seed is None else seed % 2**64


def check_place(op: str, **place: int) -> dict[str, int]:
    """Python's ints; ValueError unless step is in [0, 2^24) and the offsets are in [0, 2^31)."""
    numbers = {name: as_int(value) for name, value in place.items()}
    for name, number in numbers.items():
        limit = 1 << (STEP_BITS if name == "step" else 31)
        if number is None or not 0 <= number < limit:
            raise ValueError(f"{op}: {name} must be an int in [0, {limit}), got {place[name]!r}")
    return numbers


def _draw(
    shape: Sequence[int],
    seed: int,
    stream: int,
    *,
    step: int,
    sample_offset: int,
    words: bool,
    device: torch.device | str | None,
    frame_offset: int = 0,
) -> Tensor:
    """Normals fp32, or words int64, [B, N, C, H, W] of one stream."""
    batch, frames, *image = shape
    size = torch.Size(image).numel()
    out = torch.empty((batch, frames, size), dtype=torch.int64 if words else None, device=device)
    frame = torch.arange(frame_offset, frame_offset + frames, device=device, dtype=torch.int64)[
        :, None
    ]
    group = torch.arange((size + 3) // 4, device=device, dtype=torch.int64)
    constant = torch.zeros_like(group)
    for b in range(batch):  # one sample at a time: the words of a sample fit in cache
        place = constant + sample_offset + b, constant + (stream << STEP_BITS | step)
        counter = (group, frame, *place)
        drawn = torch.broadcast_tensors(*_rounds(counter, (seed & _MASK, seed >> 32)))
        four = torch.stack(drawn if words else _box_muller(drawn), -1)
        out[b] = four.flatten(1)[:, :size]
    return out.view(batch, frames, *image)


def _rounds(counter: Sequence[Tensor], key: Sequence[Tensor | int]) -> tuple[Tensor, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64; masking after the shift makes it a logical one.
        p0, p1 = c0 * _MUL[0], c2 * _MUL[1]
        c0, c2 = (p1 >> 32 & _MASK) ^ c1 ^ k0, (p0 >> 32 & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _box_muller(words: Sequence[Tensor]) -> list[Tensor]:
    """The four normals of four words."""
    normals = []
    for first, second in (words[:2], words[2:]):
        r = _radius((first >> 8).int())
        cos, sin = _cos_and_sin((second >> 8).int())
        normals += [r * cos, r * sin]
    return normals


def _radius(w: Tensor) -> Tensor:
    """√(-2 ln((w + 1) / 2^24)) for int32 w in [0, 2^24), fp32.

    (w + 1) / 2^24 = 2^e (1 + f) with 1 + f in [√½, √2), and ln = e ln 2 + f - f²/2 + f³ p(f).
    """
    from_root = (w + 1).float().view(torch.int32) - 0x3F3504F3  # √½
    e = ((from_root >> 23) - 24).float()
    f = ((from_root & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    p = f * 0.06746640801429749 - 0.11675652116537094
    p = p * f + 0.11888162046670914
    p = p * f - 0.1240558922290802
    p = p * f + 0.14219552278518677
    p = p * f - 0.1666799634695053
    p = p * f + 0.2000211924314499
    p = p * f - 0.25000008940696716
    p = p * f + 0.3333331346511841
    ff = f * f
    e_ln2 = e * 0.693145751953125  # 19 bits times 5 bits: exact
    total = e_ln2 + f
    lost = (e_ln2 - total) + f  # what the sum was rounded by, exactly
    rest = (ff * 0.5 - (ff * f) * p) - e * 1.428606765330187e-06
    return _sqrt((total + (lost - rest)) * -2.0)


def _cos_and_sin(w: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2π w / 2^24 for int32 w in [0, 2^24), fp32.

    The angle is π/2 (quadrant + f), f in [-½, ½) exact.
    """
    quadrant = (w + (1 << 21)) >> 22
    f = (w - (quadrant << 22)).float() * 2.0**-22
    ff = f * f
    s = ff * 0.00015820674889255315 - 0.004681266378611326  # sin(π/2 f) / f - 3/2
    s = s * ff + 0.07969257980585098
    s = s * ff - 0.6459640860557556
    s = s * ff + 0.07079632580280304
    s = f * 1.5 + f * s  # f * 1.5 is exact
    c = ff * -0.0009040216682478786 + 0.02086028829216957  # (1 - cos(π/2 f)) / f² - 1
    c = c * ff - 0.25366923213005066
    c = c * ff + 0.2337005138397217
    rounded = 1.0 - ff
    c = rounded + (((1.0 - rounded) - ff) - ff * c)
    odd = (quadrant & 1) == 1
    cos, sin = torch.where(odd, s, c), torch.where(odd, c, s)
    return (
        torch.where(((quadrant + 1) & 2) == 2, -cos, cos),
        torch.where((quadrant & 2) == 2, -sin, sin),
    )


def _sqrt(x: Tensor) -> Tensor:
    """√x of fp32, rounded correctly, which torch.sqrt of fp32 does not promise on a CPU."""
    return x.double().sqrt().float()


def _run(out, base_seed, residual_seed, step, sample_offset, frame_offset, backend):
    _check(out, base_seed, residual_seed, step, sample_offset, frame_offset, backend)
    backend = choose_backend(_NAME, backend, out.device)
    increment_version(out)  # as torch's own ops do, so that autograd sees the write
    place = {"step": step, "sample_offset": sample_offset, "frame_offset": frame_offset}
    base = residual_seed is None
    seed = unsigned_seed(base_seed if base else residual_seed)
    batch, frames = out.shape[0], 1 if base else out.shape[1]
    if backend == "reference":
        part = {"base_seed" if base else "residual_seed": seed}
        words = out.dtype == torch.int32
        drawn = decomposed_noise_reference(
            out.shape, **part, **place, words=words, device=out.device
        )
        out.copy_(drawn)  # int64 words wrap to int32
    elif backend == "triton":
        from vfengine.kernels.decomposed_noise import launch

        launch(out.view(batch, frames, -1), seed, base=base, **place)
    else:
        run_native(
            _NAME,
            backend,
            out,
            out=out.data_ptr(),
            batch=batch,
            frames=frames,
            pixels=out.numel() // (batch * frames),
            base=base,
            seed=seed,
            dtype=_OUT_NUMBERS[out.dtype],
            **place,
        )


def _check(out, base_seed, residual_seed, step, sample_offset, frame_offset, backend):
    if out.dtype not in _OUT_NUMBERS:
        raise TypeError(f"{_NAME}: out must be fp32, fp16, bf16 or int32, got {out.dtype}")
    axes = "[B, C, H, W]" if residual_seed is None else "[B, N, C, H, W]"
    if out.ndim != axes.count(",") + 1 or out.numel() == 0:
        raise ValueError(f"{_NAME}: out must be {axes} and not empty, got {list(out.shape)}")
    check_tensor(_NAME, "out", out, out.shape, out.dtype, out.device)
    check_no_grad(_NAME, out)


_OP = register(
    f"{_NAME}(Tensor(a!) out, int? base_seed, int? residual_seed, int step, int sample_offset, "
    "int frame_offset, str backend) -> ()",
    _run,
    _check,
)
