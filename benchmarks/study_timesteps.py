"""At which timesteps do few steps keep what many show? Of the shipped model, which names them.

    python benchmarks/study_timesteps.py [--solver unipc] [--timesteps 999,740,480,150 …]
        [--rounds N] [--json FILE]

Clips of new scenes, --rounds of each action, from their captions and the same seeds in all ways.
They are held against 50 steps of the same solver: by pixels (root mean square, in % of the range
from black to white), and by the energy in waves below 8 and 4 pixels, which is what too few steps
lose. The first rows are of the solver's own timesteps.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from judge_model import known_actions
from lib.harness import Row, main, say
from lib.judged_clips import scenes_of
from lib.picture_measures import fine_share

from vfengine import VideoFusionPipeline
from vfengine.diffusion.solvers import usual_spacing
from vfengine.formats.few_steps import UsualSteps
from vfengine.media.pictures import to_uint8
from vfengine.names import SOLVERS
from vfengine.training.mocap.captions import caption

MANY, OWN = 50, (8, 4)
SCENES = 9_000  # no model and no judge sees these
TRIED = (
    *((999, 740, 440, 150), (999, 740, 480, 150), (999, 749, 480, 120), (999, 720, 440, 100)),
    *((999, 760, 460, 130), (999, 740, 480, 180), (999, 650, 350, 120)),
    (999, 840, 680, 540, 400, 280, 160, 60),
    (999, 874, 749, 624, 480, 330, 190, 70),
    (999, 860, 720, 580, 440, 300, 160, 50),
)


def study(solver: str, tried: list[tuple[int, ...]], rounds: int) -> list[Row]:
    pipeline = VideoFusionPipeline.from_pretrained()
    pipeline.keep_parts()
    config, schedule = pipeline.config, pipeline.config.noise_schedule()
    actions = known_actions(pipeline)
    prompts = [caption(scene) for i in range(rounds) for scene in scenes_of(SCENES, actions, i)]

    def clips(timesteps: tuple[int, ...]) -> np.ndarray:
        count = len(timesteps)
        usual = UsualSteps(solver=solver, num_inference_steps=count, timesteps=(timesteps,))
        pipeline.config = replace(config, usual_steps=usual)
        return pipeline(prompt=prompts, base_seed=0, residual_seed=1).frames

    def own(steps: int) -> tuple[int, ...]:
        return tuple(schedule.timesteps(steps, usual_spacing(solver)).tolist())

    rows: list[Row] = []
    many = clips(own(MANY))
    waves = {size: fine_share(to_uint8(many), size).mean() for size in (8, 4)}
    for timesteps in (*map(own, OWN), *tried):
        name = " ".join(map(str, timesteps))
        say(f"timesteps {name}")
        made = clips(timesteps)
        away = 100 * float(np.sqrt(np.mean((made - many) ** 2)))
        rows.append(Row(solver, name, f"from {MANY} steps", away, "%"))
        for size, energy in waves.items():
            ratio = float(fine_share(to_uint8(made), size).mean() / energy)
            rows.append(Row(solver, name, f"waves below {size} pixels", ratio, "x"))
    return rows


def descending(text: str) -> tuple[int, ...]:
    return tuple(int(t) for t in text.split(","))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--solver", choices=SOLVERS, default="unipc")
    add("--timesteps", type=descending, nargs="+", default=TRIED, metavar="T,T,…")
    add("--rounds", type=int, default=2, help="clips of each action")
    options, _ = parser.parse_known_args()
    main(lambda: study(options.solver, options.timesteps, options.rounds), __doc__, parser=parser)
