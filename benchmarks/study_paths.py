"""How straight are the paths that a student must cut short? Of the base and the residual network.

    python benchmarks/study_paths.py [--students FOLDER …] [--clips N] [--json FILE]

A student's step goes from one of its timesteps to the next, and should end where 12 DDIM steps of
the shipped model end, under guidance of scale 2. Where one such step ends nearly there, a path is
straight, and a solver does what distilling would. From noised latents of new rendered clips; the
residual network's under the exact base noise, as for a finished base frame. Figures are mean
squares of errors of clean latents, whose variance is 1, in e-3:

    K steps    the model's own, against 12
    unguided   one step without guidance: what the guidance scale as an input must make up for
    student    one step of a student of so many steps (training/distillation.py)
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from lib.harness import Row, main
from torch import Tensor

from vfengine.diffusion.decompose import add_noise, base_index, combine, remove_base
from vfengine.formats.checkpoint import DEFAULT
from vfengine.training.distillation import Jumps, Teacher
from vfengine.training.latents import CaptionedMocap, make_latents
from vfengine.training.parts import Coder, Parts

NETWORKS = ("base", "residual")
STEPS, MANY, FEWER = (1, 2, 4, 8), 12, (2, 4)
SCALE, SEED = 2.0, 4_000


class Paths:
    """The shipped model, and noised latents of some clips to begin at."""

    def __init__(self, clips: int):
        self.teacher = Teacher(DEFAULT)
        config = self.teacher.config
        self.schedule, self.jumps = config.noise_schedule(), Jumps(config.noise_schedule())
        self.lam, parts = config.lam, Parts.read(DEFAULT, DEFAULT)
        size, frames = config.picture_size[0], config.num_frames
        source = CaptionedMocap(SEED, size, frames, "cpu", held_out=True)
        with tempfile.TemporaryDirectory() as folder:
            made = make_latents(source, parts, Coder(parts), Path(folder), clips, 1)
            self.x, self.shown = made.clips.float(), made.captions[:, 0].float()
        self.plain = made.null.float().expand_as(self.shown)
        noise = torch.Generator().manual_seed(SEED)
        self.m = base_index(frames)
        self.b = torch.randn(self.x[:, self.m].shape, generator=noise)
        self.r = torch.randn(self.x.shape, generator=noise)
        self.scales = torch.full((clips,), SCALE)

    def start(self, name: str, t: Tensor) -> Tensor:
        noise = self.b if name == "base" else combine(self.b, self.r, self.lam)
        x = self.x[:, self.m] if name == "base" else self.x
        return add_noise(x, noise, t, self.schedule)

    def estimate(self, model: Teacher, name: str, z: Tensor, t: Tensor, guided: bool) -> Tensor:
        conditions = {"context": torch.cat([self.shown, self.plain])}
        scales = self.scales if guided else torch.ones_like(self.scales)
        if name == "base":
            return model.estimate(name, z, t, conditions, scales)
        seen = remove_base(z, self.b, self.lam, t, self.schedule)
        return combine(self.b, model.estimate(name, seen, t, conditions, scales), self.lam)

    def end(
        self, name: str, times: list[int], guided: bool = True, model: Teacher | None = None
    ) -> Tensor:
        """Where DDIM steps from each of these times to the next end."""
        every = [torch.full((len(self.x),), t) for t in times]
        z = self.start(name, every[0])
        for t, p in pairwise(every):
            estimate = self.estimate(model or self.teacher, name, z, t, guided)
            z = self.jumps.step(z, estimate, t, p)
        return z

    def error(self, name: str, times: list[int], ends: Tensor, ideal: Tensor) -> float:
        """Of the clean latents that a step to these ends means, in e-3."""
        t, p = (torch.full((len(self.x),), when) for when in (times[0], times[-1]))
        z = self.start(name, t)
        wrong = self.jumps.between(z, ends, t, p) - self.jumps.between(z, ideal, t, p)
        signal = self.schedule.alphas_cumprod[times[0]]
        return 1e3 * float(wrong.square().mean() * (1 - signal) / signal)


def study(clips: int = 16, students: tuple[Path, ...] = ()) -> list[Row]:
    paths, rows = Paths(clips), []
    others = [Teacher(folder) for folder in students]
    for steps in STEPS:
        few = tuple(paths.schedule.timesteps(steps, "trailing").tolist())
        for name in NETWORKS:
            many = Teacher(DEFAULT, MANY * steps).times(name, few).tolist()
            fewer = {k: Teacher(DEFAULT, k * steps).times(name, few).tolist() for k in FEWER}
            told = [(other.config.distilled or {}).get(name) for other in others]
            cutters = [
                o for o, own in zip(others, told, strict=True) if own and own.timesteps == few
            ]
            for number, row in enumerate(many):
                one, ideal = [row[0], row[-1]], paths.end(name, row)
                ends = {"1 step": paths.end(name, one)}
                ends |= {f"{k} steps": paths.end(name, times[number]) for k, times in fewer.items()}
                ends["unguided"] = paths.end(name, one, guided=False)
                for student in cutters:
                    ends["student"] = paths.end(name, one, model=student)
                case, place = f"{name}, {steps} steps", f"from t = {one[0]}"
                for what, end in ends.items():
                    error = paths.error(name, one, end, ideal)
                    rows.append(Row(case, place, what, error, "e-3"))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    about = "models distilled from the shipped one"
    parser.add_argument("--students", type=Path, nargs="+", default=[], help=about)
    parser.add_argument("--clips", type=int, default=16, help="that paths begin at")
    options, _ = parser.parse_known_args()
    main(lambda: study(options.clips, tuple(options.students)), __doc__, parser=parser)
