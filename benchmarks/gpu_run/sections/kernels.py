"""The kernels of a step and of noise, C++ and Triton, beside a copy, eager and compiled PyTorch.

Every contender is checked against the op's reference before it is timed, in a graph of up to 64
calls that rotate over several sets of buffers. Bytes are what the op must move: a clip and a half
of images at least. Shapes: one clip that no cache holds, and the default one, which the compiler
takes no part in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import bench_decomposed_step
import bench_remove_base
import torch
from bench_residual_step import with_randn
from lib.clips import Clip, algorithm_2, algorithm_2_into, check, clip_of
from torch import Tensor

from gpu_run.sections import BACKENDS, DEVICE, DRY, guarded, timed
from vfengine import ops

SHAPES = [(1, 4, 3, 8, 8)] if DRY else [(1, 64, 3, 512, 512), (1, 16, 3, 64, 64)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETS = 4  # of buffers, taken in turns
SECONDS = 0.2  # of turns
LARGE = 2**24  # numbers in a clip that no cache holds
GUIDED = {"guidance_scale": 2.0}
SEEDS = {"base_seed": 1, "residual_seed": 2}

Calls = dict[str, Callable[[], Tensor]]


def main() -> None:
    with torch.inference_mode():
        for shape, (name, dtype) in itertools.product(SHAPES, DTYPES.items()):
            clips = [clip_of(shape, dtype) for _ in range(SETS)]
            what = "x".join(map(str, shape[1:]))
            residual_steps(f"{{}}, {what}", clips, name)
            others(f"{{}}, {what}", clips, name)
            noise(f"{{}}, {what}", clips, name)
            with guarded(f"path_step, {what}", dtype=name):
                path_steps(f"{{}}, {what}", clips, name)
            if name == "fp32" and clips[0].z.numel() < LARGE:
                with guarded(f"base_step, {what}", dtype=name):
                    base_step(f"{{}}, {what}", clips)
            del clips


def exact(clip: Clip) -> tuple[Tensor, ...]:
    return clip.z.float(), clip.r.float(), clip.b.float()


def bytes_of(clip: Clip, clips: int, images: int = 1) -> int:
    return (clips * clip.z.numel() + images * clip.b.numel()) * clip.z.element_size()


def rotating(calls: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def residual_steps(case: str, clips: list[Clip], dtype: str) -> None:
    z, r, b = exact(clips[0])
    tables, quiet, noisy = clips[0].table, clips[0].quiet, clips[0].noisy
    reference = ops.residual_step_reference
    pair = {"r_uncond": clips[0].r_uncond.float(), **GUIDED}

    def step(clip: Clip, backend: str, kind: str) -> Callable[[], Tensor]:
        u = clip.z.clone()
        options = {
            "plain": {},
            "guided": {"r_uncond": clip.r_uncond, **GUIDED},
            "drawn": {"seed": 1},
        }
        place = (*clip.table, clip.noisy if kind == "drawn" else clip.quiet)
        return lambda: ops.residual_step(
            u, clip.r, clip.b, *place, **options[kind], backend=backend
        )

    results = {
        "plain": reference(z, r, b, *tables, quiet),
        "guided": reference(z, r, b, *tables, quiet, **pair),
        "drawn": reference(z, r, b, *tables, noisy, seed=1),
    }
    for kind, result in results.items():
        here = case.format(f"residual_step, {kind}")
        calls = checked(
            here,
            dtype,
            result,
            {backend: [step(clip, backend, kind) for clip in clips] for backend in BACKENDS},
        )
        if kind == "plain":
            calls |= written(here, dtype, clips)
        if kind == "drawn":
            calls["randn, eager"] = rotating([with_randn(clip) for clip in clips])
        moved = bytes_of(clips[0], 4 if kind == "guided" else 3)
        timed(here, calls, moved_bytes=moved, dtype=dtype, seconds=SECONDS)


def written(case: str, dtype: str, clips: list[Clip]) -> Calls:
    """Algorithm 2 as one would write it: eager, compiled, and compiled into given buffers."""
    z, r, b = exact(clips[0])
    result = algorithm_2(z, r, b, clips[0].lam)[1]
    compiled = torch.compile(algorithm_2, fullgraph=True, dynamic=False)
    into = torch.compile(algorithm_2_into, fullgraph=True, dynamic=False)
    spare = torch.empty_like(clips[0].z), torch.empty_like(clips[0].z)
    operands = [(c.z, c.r, c.b, c.lam) for c in clips]
    ways: dict[str, list[Callable[[], Tensor]]] = {
        "eager": [lambda o=o: algorithm_2(*o)[1] for o in operands],
    }
    if clips[0].z.numel() >= LARGE:  # nor is a dry run for compilers
        ways["compiled"] = [lambda o=o: compiled(*o)[1] for o in operands]
        ways["compiled into"] = [lambda o=o: into(*o, *spare) for o in operands]
    return checked(case, dtype, result, ways)


def others(case: str, clips: list[Clip], dtype: str) -> None:
    """decomposed_step, with and without noise, and remove_base."""
    z, r, b = exact(clips[0])
    tables, quiet, noisy = clips[0].table, clips[0].quiet, clips[0].noisy

    def decomposed(clip: Clip, backend: str, drawn: bool) -> Callable[[], Tensor]:
        own, at = clip.z.clone(), clip.noisy if drawn else clip.quiet
        seeds = SEEDS if drawn else {}
        return lambda: ops.decomposed_step(
            own, clip.b, clip.r, *clip.table, at, **seeds, backend=backend
        )

    def removed(clip: Clip, backend: str) -> Callable[[], Tensor]:
        out = torch.empty_like(clip.z)
        place = (clip.lam, clip.noise_levels, clip.quiet)
        return lambda: ops.remove_base(clip.z, clip.b, *place, out=out, backend=backend)

    for kind, drawn in (("plain", False), ("drawn", True)):
        here = case.format(f"decomposed_step, {kind}")
        seeds = SEEDS if drawn else {}
        result = ops.decomposed_step_reference(z, b, r, *tables, noisy if drawn else quiet, **seeds)
        ways = {name: [decomposed(clip, name, drawn) for clip in clips] for name in BACKENDS}
        if not drawn:
            ways["eager"] = [
                lambda c=c: bench_decomposed_step.written(c.z, c.b, c.r, c.lam) for c in clips
            ]
        calls = checked(here, dtype, result, ways)
        timed(here, calls, moved_bytes=bytes_of(clips[0], 3), dtype=dtype, seconds=SECONDS)
    here = case.format("remove_base")
    result = ops.remove_base_reference(z, b, clips[0].lam, clips[0].noise_levels, quiet)
    ways = {name: [removed(clip, name) for clip in clips] for name in BACKENDS}
    ways["eager"] = [lambda c=c: bench_remove_base.written(c.z, c.b, c.lam) for c in clips]
    calls = checked(here, dtype, result, ways)
    timed(here, calls, moved_bytes=bytes_of(clips[0], 2), dtype=dtype, seconds=SECONDS)


def noise(case: str, clips: list[Clip], dtype: str) -> None:
    """Residual noise, one write, beside torch.randn into the same memory; checked bit for bit."""
    here, like = case.format("decomposed_noise"), clips[0].z
    outs = [torch.empty_like(like) for _ in clips]
    small = like[:, :2].shape  # a frame's noise does not depend on how many there are
    result = ops.decomposed_noise_reference(small, None, 1).to(like.dtype)
    calls: Calls = {}
    for backend in BACKENDS:
        ways = [
            lambda o=o, name=backend: ops.decomposed_noise(o, residual_seed=1, backend=name)
            for o in outs
        ]
        with guarded(here, contender=backend, dtype=dtype):
            if not torch.equal(ways[0]()[:, :2].cpu(), result):
                raise ValueError("not the reference's noise, bit for bit")
            calls[backend] = rotating(ways)
    calls["randn"] = rotating([lambda o=o: torch.randn(o.shape, out=o) for o in outs])
    timed(here, calls, moved_bytes=like.nbytes, dtype=dtype, seconds=SECONDS)


class Loop:
    """A sampling loop's clock, tables and base path, for steps that count themselves.

    The counter goes back to 0 ahead of every call on a large clip, which costs it nothing; else
    ahead of every 32nd, for a graph has 64.
    """

    def __init__(self, clip: Clip, noisy: bool = False) -> None:
        self.period, steps = (1, 2) if clip.z.numel() >= LARGE else (32, 128)
        image = (clip.z.shape[0], *clip.z.shape[2:])
        self.coeffs = clip.coeffs[int(noisy)].expand(steps, -1).contiguous()
        self.c1 = self.coeffs[:, 0].double()
        self.noise_levels = clip.noise_levels[:1].expand(steps).contiguous()
        self.states = clip.b.float().expand(steps + 1, *image).clone()
        t = torch.zeros(image[0], dtype=torch.int64, device=DEVICE)
        counter, ticket = torch.zeros(2, dtype=torch.int32, device=DEVICE).split(1)
        self.clock = ops.Clock(counter, ticket, torch.arange(steps, device=DEVICE), t)
        self.calls = 0

    def take(self, step: Callable[[], Tensor]) -> Tensor:
        if self.calls % self.period == 0:
            self.clock.counter.zero_()
        self.calls += 1
        return step()


def path_steps(case: str, clips: list[Clip], dtype: str) -> None:
    """A step of the residual loop: path, solver, base frame, counter and timestep in one launch."""

    def step(clip: Clip, u: Tensor, options: dict, backend: str) -> Callable[[], Tensor]:
        loop = Loop(clip, noisy="seed" in options)
        path = {"states": loop.states, "c1": loop.c1, "base_frame": u.shape[1] // 2}
        options = {**path, **options, "backend": backend}
        place = (clip.r.to(u.dtype), clip.lam, loop.coeffs, loop.clock)
        return lambda: loop.take(lambda: ops.path_step(u, *place, **options))

    for kind, options in (("plain", {}), ("drawn", {"seed": 1})):
        here = case.format(f"path_step, {kind}")
        exact = clips[0].z.to(torch.float32, copy=True)
        result = step(clips[0], exact, options, "reference")()
        ways = {
            name: [step(clip, clip.z.clone(), options, name) for clip in clips] for name in BACKENDS
        }
        calls = checked(here, dtype, result, ways)
        moved = bytes_of(clips[0], 3, 0) + 2 * clips[0].b.numel() * 4
        timed(here, calls, moved_bytes=moved, dtype=dtype, seconds=SECONDS)


def base_step(case: str, clips: list[Clip]) -> None:
    """A step of the base loop, of one image: its path and the solver."""

    def step(clip: Clip, backend: str) -> Callable[[], Tensor]:
        z, loop = clip.z[:, 0].clone(), Loop(clip)
        place = (clip.b, loop.states, loop.noise_levels, loop.coeffs, loop.clock)
        return lambda: loop.take(lambda: ops.base_step(z, *place, backend=backend))

    here = case.format("base_step, plain")
    ways = {name: [step(clip, name) for clip in clips] for name in BACKENDS}
    calls = checked(here, "fp32", step(clips[0], "reference")(), ways)
    timed(here, calls, moved_bytes=5 * clips[0].b.nbytes, dtype="fp32", seconds=SECONDS)


def checked(
    case: str, dtype: str, result: Tensor, ways: dict[str, list[Callable[[], Tensor]]]
) -> Calls:
    """A rotating call of each contender whose first set of buffers gives the right result."""
    calls: Calls = {}
    for name, sets in ways.items():
        with guarded(case, contender=name, dtype=dtype):
            check(name, sets[0](), result)
            calls[name] = rotating(sets)
    return calls


if __name__ == "__main__":
    print(f"kernels on {DEVICE}")
    main()
