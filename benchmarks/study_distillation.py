"""Which way of distilling is worth its time? Short runs from one teacher, one network of it.

    python benchmarks/study_distillation.py --teacher CHECKPOINT --clips clips.npy [--json FILE]

    progressive  towards where the teacher lands after all its steps from one of the student's
                 timesteps to the next (training/distillation.py)
    in stages    the same in three runs, to 16, 8 and 4 steps, each the next one's teacher
                 (Salimans & Ho 2022, arXiv 2202.00512); each has a third of the time
    consistency  from any of the teacher's timesteps towards where the student itself lands from
                 the next one, up to the next of the student's (Song et al. 2023, arXiv 2303.01469;
                 in segments: Heek et al. 2024, arXiv 2403.06807)
    matching     the student's clean samples take the gradient of how two estimates of their noised
                 versions differ: the teacher's, and that of a network that learns the student's
                 samples meanwhile (Yin et al. 2024, arXiv 2311.18828)

The network is the base network of a model on pixels: clips are rendered ones, uint8 [M, N, H, W, 3]
as `vfengine train` keeps them. All have equal seconds of CPU, read by the process's clock, so that
other work beside does not favour one. Read from the averaged weights, on the same noise and labels:

    distance  root mean square to the picture of the teacher in 50 steps, in % of the range
    kernel    unbiased kernel distance to real base frames, on pixels of a quarter of the size
    fine      share of energy in waves below 4 pixels, times that of real base frames
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lib.harness import Row, machine, say, table, write_json
from lib.picture_measures import fine_share
from torch import Tensor

from vfengine.diffusion.decompose import add_noise, base_index
from vfengine.diffusion.noise import base_noise
from vfengine.formats.checkpoint import load_network
from vfengine.media.pictures import network_to_pixels, pixels_to_network
from vfengine.metrics import kernel_distance
from vfengine.models import BaseGenerator
from vfengine.sampling.api import sample_base
from vfengine.training.batch import BatchSampler
from vfengine.training.distillation import CLEAN, Distillation, Teacher, distilled_config
from vfengine.training.options import TrainingOptions
from vfengine.training.trainer import Trainer
from vfengine.training.updates import adamw

STEPS, TEACHER_STEPS, SHOWN = 4, 48, 256  # student, teacher, pictures that are read
SCALE = 2.0  # guidance scale of what is read


# -- the other ways --------------------------------------------------------------------------------


class Consistency(Distillation):
    """Towards the student's own end of a segment, one step of the teacher further on."""

    def _base_loss(self, batch: BatchSampler) -> tuple[Tensor, Tensor]:
        count = self.options.batch_size + self.options.extra_images
        x, condition, _ = batch.clips(count, only_base=True)
        times, scales = self._times_of(batch, "base", count), self._scales(batch, "base", count)
        place = (batch.uniform(count) * (len(times) - 1)).long()
        rows = torch.arange(count)
        t, further, p = times[place, rows], times[place + 1, rows], times[-1]
        z = add_noise(x, batch.normal(x.shape), t, self.schedule)
        estimate = self.teacher.estimate("base", z, t, self._both(batch, condition), scales)
        landed = self.jumps.step(z, estimate, t, further)
        with torch.no_grad():
            on = further.clamp(min=0)  # where that is the end itself, its jump goes nowhere
            own = self.student("base", landed, on, condition, scales)
            ended = (further == p).view(-1, 1, 1, 1)
            landed = torch.where(ended, landed, self.jumps.step(landed, own, on, p))
        error = self.jumps.between(z, landed, t, p) - self.student("base", z, t, condition, scales)
        return self._weighed(error, t, "base", None), t


class Matching(Distillation):
    """Gradients from two scores of its samples: the teacher's, and one that is learnt meanwhile."""

    def __init__(self, *args, **more) -> None:
        super().__init__(*args, **more)
        self.fake = load_network(self.teacher.folder, self.teacher.config, "base")
        self.fake.train().requires_grad_(True)
        own = list(self.fake.parameters())
        self.optimizer = adamw(own, self.options.learning_rate, (0.9, 0.99), 0.01)

    def _base_loss(self, batch: BatchSampler) -> tuple[Tensor, Tensor]:
        count = self.options.batch_size + self.options.extra_images
        x, condition, _ = batch.clips(count, only_base=True)
        t = self._times_of(batch, "base", count)[0]
        scales = self._scales(batch, "base", count)
        z = add_noise(x, batch.normal(x.shape), t, self.schedule)
        estimate = self.student("base", z, t, condition, scales)
        made = self.jumps.step(z, estimate, t, torch.full_like(t, CLEAN))
        self._learn(batch, made.detach(), condition)
        at = (20 + batch.uniform(count) * 960).long()
        noisy = add_noise(made.detach(), batch.normal(x.shape), at, self.schedule)
        real = self.teacher.estimate("base", noisy, at, self._both(batch, condition), scales)
        with torch.no_grad():
            fake = self.fake(noisy, at, **{self.condition: condition})
        clean = torch.full_like(at, CLEAN)
        ends = [self.jumps.step(noisy, eps, at, clean) for eps in (real, fake)]
        size = (made.detach() - ends[0]).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
        pull = (ends[1] - ends[0]) / size  # downhill: from the student's samples to the data
        loss = F.mse_loss(made, (made - pull).detach(), reduction="none").flatten(1).mean(1)
        return loss, t

    def _learn(self, batch: BatchSampler, made: Tensor, condition: Tensor) -> None:
        """A step of the network that knows the student's samples."""
        t, eps = batch.timesteps(len(made)), batch.normal(made.shape)
        estimate = self.fake(
            add_noise(made, eps, t, self.schedule), t, **{self.condition: condition}
        )
        weight = self.clean_weight(t, 1.0, self.fake.data_std)
        ((eps - estimate).square().flatten(1).mean(1) * weight).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.fake.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


# -- runs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """What all runs share: the teacher, clips and their labels, seconds of CPU."""

    teacher: Path
    clips: np.ndarray
    labels: np.ndarray
    seconds: float
    batch_size: int
    learning_rate: float
    seed: int = 0

    def run(
        self,
        kind: type[Distillation] = Distillation,
        steps: int = STEPS,
        teacher: Path | None = None,
        share: float = 1.0,
    ) -> Trainer:
        """Trains a student of the base network for a share of the seconds."""
        source = self.teacher if teacher is None else teacher
        master = Teacher(source, TEACHER_STEPS, dtype=torch.bfloat16)
        options = TrainingOptions(
            train="base",
            teacher_steps=TEACHER_STEPS,
            batch_size=self.batch_size,
            extra_images=0,
            learning_rate=self.learning_rate,
            warmup=50,
            decay=1.0,
            ema=0.99,
            seed=self.seed,
            steps=10**6,
        )
        config = distilled_config(master.config, ("base",), steps, (1.0, 4.0))
        made = partial(kind, teacher=master)
        trainer = Trainer(config, options, self.clips, self.labels, objective=made)
        trainer.warm_start(source)
        start, seconds = time.process_time(), share * self.seconds
        while (spent := time.process_time() - start) < seconds:
            left = 1 - spent / seconds  # the rate falls by the clock, which decides when it ends
            steps_left = replace(options, learning_rate=max(left, 0.02) * self.learning_rate)
            trainer.updates.options = replace(steps_left, decay=0.0)
            trainer.step()
        return trainer

    def in_stages(self) -> Trainer:
        with tempfile.TemporaryDirectory() as work:
            source = None
            for steps in (16, 8, 4):
                trainer = self.run(steps=steps, teacher=source, share=1 / 3)
                source = Path(work) / str(steps)
                trainer.export(source)
        return trainer


def drawn(trainer: Trainer | None, study: Study) -> np.ndarray:
    """Base frames, uint8 [SHOWN, H, W, 3], of a student; None: of the teacher in 50 steps."""
    teacher = Teacher(study.teacher, dtype=torch.bfloat16)
    config, out = teacher.config, []
    for first in range(0, SHOWN, 64):
        labels = torch.arange(first, first + 64) % len(config.labels)
        shape = (64, config.channels, config.height, config.width)
        noise = base_noise(shape, 123, sample_offset=first)
        at = {"schedule": config.noise_schedule()}
        if trainer is None:
            null = torch.full_like(labels, config.null_class)
            shown, scales = {"class_labels": torch.cat([labels, null])}, torch.full((64,), SCALE)
            model = lambda z, t, s=shown, w=scales: teacher.estimate("base", z, t, s, w)  # noqa: E731
        else:
            network: BaseGenerator = trainer.averaged["base"]
            told = {"class_labels": labels, "guidance": SCALE}
            model = lambda z, t, n=network, w=told: n(z, t, **w)  # noqa: E731
            at["timesteps"] = trainer.config.distilled["base"].timesteps
        frames = sample_base(model, noise, **at).final
        out.append(network_to_pixels(frames[:, None])[:, 0].numpy())
    return np.concatenate(out)


def read(name: str, frames: np.ndarray, of_teacher: np.ndarray, real: np.ndarray) -> list[Row]:
    """The three figures of one way."""
    error = (frames.astype(np.float64) - of_teacher) / 255
    fine = float(fine_share(frames[:, None], 4).mean() / fine_share(real[:, None], 4).mean())
    found = {
        "distance": (100 * float(np.sqrt(np.mean(error**2))), "%"),
        "kernel": (1e3 * kernel_distance(_coarse(real), _coarse(frames)), "e-3"),
        "fine": (fine, "x"),
    }
    return [
        Row("base network", name, metric, value, unit) for metric, (value, unit) in found.items()
    ]


def _coarse(frames: np.ndarray) -> Tensor:
    x = pixels_to_network(torch.from_numpy(frames))
    return F.avg_pool2d(x, 4).flatten(1).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=400, help="of CPU, for each way")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    clips = np.load(args.clips, mmap_mode="r")
    labels = np.arange(len(clips), dtype=np.int64) % 15  # as render_clips orders them
    how = args.seconds, args.batch_size, args.learning_rate
    study = Study(args.teacher, clips, labels, *how)
    m = base_index(clips.shape[1])
    real = np.ascontiguousarray(clips[-2 * SHOWN :, m])
    of_teacher = drawn(None, study)
    ways: dict[str, Callable[[], Trainer]] = {
        "progressive": study.run,
        "in stages": study.in_stages,
        "consistency": lambda: study.run(Consistency),
        "matching": lambda: study.run(Matching),
        "untrained": lambda: replace(study, seconds=0.0).run(),
    }
    rows = read("teacher, 50 steps", of_teacher, of_teacher, real)
    for name, train in ways.items():
        if args.only and name not in args.only:
            continue
        trainer = train()
        say(f"{name}: {trainer.steps_done} updates")
        rows.append(Row("base network", name, "updates", trainer.steps_done, ""))
        rows += read(name, drawn(trainer, study), of_teacher, real)
    print(table(rows))
    if args.json:
        write_json(args.json, rows, machine())


if __name__ == "__main__":
    main()
