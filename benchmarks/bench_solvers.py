"""The distance of each solver's clips in few steps from 1,000 steps of DDIM, and the seconds.

The shipped model in bf16, one clip at a time, from the same seeds, along the model's own base path.
A distance is the root mean square over all pixels, in % of the range from black to white: of the
base frame, and of the clip. Seconds are of both phases, networks loaded. Solvers of higher order
are shown at their usual spacing of timesteps, at the one of DDIM, and at the timesteps that the
model names.

The script takes three labels. Under pytest it is the base frame of one, against 500 steps.
"""

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from lib.harness import Row, main, say, table
from torch import Tensor

from vfengine import VideoFusionPipeline
from vfengine.diffusion.solvers import usual_spacing
from vfengine.formats.checkpoint import CheckpointConfig
from vfengine.formats.few_steps import UsualSteps

LABELS = ("cartwheel", "kick", "walk")
FEW = (4, 8, 20)
HIGHER = ("dpmsolver", "dpmsolver++", "unipc")
NAMED = "the model's"  # in place of a spacing: the timesteps in its config.json


@dataclass(frozen=True)
class Contender:
    solver: str
    steps: int
    spacing: str

    @property
    def name(self) -> str:
        other = "" if self.spacing == usual_spacing(self.solver) else f", {self.spacing}"
        return f"{self.solver} {self.steps}{other}"

    def usual_steps(self, config: CheckpointConfig) -> UsualSteps:
        """What names its timesteps in a model's configuration."""
        row = tuple(config.noise_schedule().timesteps(self.steps, self.spacing).tolist())
        return UsualSteps(solver=self.solver, timesteps=(row,))


CONTENDERS = (
    *(Contender("ddim", steps, "leading") for steps in (*FEW, 50)),
    *(
        Contender(solver, steps, spacing)
        for solver in HIGHER
        for spacing in ("trailing", "leading")
        for steps in FEW
    ),
    *(Contender("unipc", steps, NAMED) for steps in FEW[:2]),
)


def pictures(
    pipeline: VideoFusionPipeline, label: str, contender: Contender, clip: bool = True
) -> dict[str, tuple[Tensor, float]]:
    """The base frame and the clip: pixels in 0..1, and the seconds each takes."""
    how = {"solver": contender.solver, "num_inference_steps": contender.steps, "output_type": "pt"}
    shipped = pipeline.config
    if contender.spacing != NAMED:
        pipeline.config = replace(shipped, usual_steps=contender.usual_steps(shipped))
    started = time.perf_counter()
    base = pipeline.preview(label, **how)
    made = {"base frame": (base.frames, time.perf_counter() - started)}
    if clip:
        out = pipeline(label, trajectory=base.trajectory, **how)
        made["clip"] = (out.frames, time.perf_counter() - started)
    pipeline.config = shipped
    return made


def measure(
    labels: tuple[str, ...] = LABELS, clip: bool = True, reference_steps: int = 1000
) -> list[Row]:
    pipeline = VideoFusionPipeline.from_pretrained(dtype=torch.bfloat16)
    reference = Contender("ddim", reference_steps, "leading")
    pictures(pipeline, labels[0], Contender("ddim", 2, "leading"), clip)  # loads the networks
    distances: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for label in labels:
        say(f"{label}: {reference.name}")
        references = pictures(pipeline, label, reference, clip)
        for contender in CONTENDERS:
            for what, (pixels, spent) in pictures(pipeline, label, contender, clip).items():
                key = (f"{what} against {reference.name}", contender.name)
                error = (pixels - references[what][0]).square().mean().sqrt().item()
                distances[key][label] = 100 * error
                seconds[key].append(spent)
    rows = []
    for (case, contender), by_label in distances.items():
        rows += [Row(case, contender, label, value, "%") for label, value in by_label.items()]
        mean, spent = statistics.mean(by_label.values()), seconds[case, contender]
        rows.append(Row(case, contender, "mean", mean, "%"))
        rows.append(Row(case, contender, "time", statistics.median(spent), "s"))
    return rows


def bench_solvers(benchmark, capsys, short):
    steps = 20 if short else 500
    arguments = {"labels": LABELS[:1], "clip": False, "reference_steps": steps}
    rows = benchmark.pedantic(measure, kwargs=arguments, rounds=1)
    benchmark.extra_info["rows"] = [vars(row) for row in rows]
    with capsys.disabled():
        print("\n" + table(rows))


if __name__ == "__main__":
    main(measure, __doc__)
