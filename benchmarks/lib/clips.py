"""The clips that the benches of per-frame ops share, and Algorithm 2 as one would write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.harness import Row, compare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEFAULT = (1, 16, 3, 64, 64)
LARGE = (1, 64, 3, 512, 512)  # 200 MB in fp32: no cache holds it
CASES = {
    f"{name} {'x'.join(map(str, shape[1:]))}": (shape, dtype)
    for shape in (LARGE, DEFAULT)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
}
LARGE_CASES = tuple(name for name, (shape, _) in CASES.items() if shape is LARGE)

# c1 < 1: repeated in place a clip stays bounded. The second step adds noise.
ROWS = ((0.98, -0.11, 0.0), (0.98, -0.11, 0.05))
NOISE_LEVEL = 0.7


@dataclass(frozen=True)
class Clip:
    """Arguments of a step: z, r and r_uncond [B, N, C, H, W], b [B, C, H, W], tables and steps."""

    z: Tensor
    r: Tensor
    r_uncond: Tensor
    b: Tensor
    lam: Tensor
    coeffs: Tensor
    noise_levels: Tensor
    quiet: Tensor  # step 0
    noisy: Tensor  # step 1

    @property
    def table(self) -> tuple[Tensor, Tensor]:
        return self.lam, self.coeffs


def make_clip(case: str) -> Clip:
    return clip_of(*CASES[case])


def clip_of(shape: tuple[int, ...], dtype: torch.dtype) -> Clip:
    """Normal numbers, drawn where they stay: 50 million of them take a CPU a second."""
    random = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=DEVICE).to(dtype)

    step = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    return Clip(
        z=normal(*shape),
        r=normal(*shape),
        r_uncond=normal(*shape),
        b=normal(shape[0], *shape[2:]),
        lam=torch.full((shape[1],), 0.5, device=DEVICE),
        coeffs=torch.tensor(ROWS, device=DEVICE),
        noise_levels=torch.full((2,), NOISE_LEVEL, device=DEVICE),
        quiet=step,
        noisy=step + 1,
    )


def compare_on_clip(
    case: str, contenders: Callable[[Clip], dict], passes: int, seconds: float
) -> list[Row]:
    """Contenders on a case's clip, of whose bytes an op moves `passes` times, and b's once."""
    clip = make_clip(case)
    moved = (passes * clip.z.numel() + clip.b.numel()) * clip.z.element_size()
    calls = contenders(clip)
    return compare(case, calls, moved, baseline="eager", device=DEVICE, seconds=seconds)


def algorithm_2(z: Tensor, r: Tensor, b: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """Removal, combination and update in the clip's dtype: (z', the next z)."""
    c1, c2, _ = ROWS[0]
    shared = lam.sqrt().view(-1, 1, 1, 1).to(z.dtype)
    own = (1 - lam).sqrt().view(-1, 1, 1, 1).to(z.dtype)
    b = b.unsqueeze(1)
    removed = z - shared * NOISE_LEVEL * b
    eps = shared * b + own * r
    return removed, c1 * z + c2 * eps


def algorithm_2_into(
    z: Tensor, r: Tensor, b: Tensor, lam: Tensor, removed_out: Tensor, z_out: Tensor
) -> Tensor:
    """The same, into buffers that are there already."""
    removed, z_next = algorithm_2(z, r, b, lam)
    removed_out.copy_(removed)
    z_out.copy_(z_next)
    return z_out


def check(name: str, out: Tensor, exact: Tensor) -> None:
    """ValueError where a contender is off by more than rounding in its dtype allows."""
    scale = exact.abs().max() * torch.finfo(out.dtype).eps
    error = (out.to(exact.dtype) - exact).abs().max()
    if not error <= 4 * scale:  # NaN, too, is wrong: it is how kernels on CUDA report errors
        raise ValueError(f"{name} is off by {error:.3g}")
