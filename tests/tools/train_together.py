"""Tiny trainings, each by one process or by those of torchrun (tests/training/test_distributed.py).

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/tools/train_together.py DIR

DIR holds teacher/, and one.safetensors: the state of case "pixels" after 10 steps of one process.
Each case leaves CASE.safetensors there, and the first process results.json: losses by case and
step, and what the words of a team came to.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from conftest import tiny_config, tiny_video_config  # noqa: E402

from vfengine.cli.train_team import team_of_process  # noqa: E402
from vfengine.training.distillation import Distillation, Teacher, distilled_config  # noqa: E402
from vfengine.training.options import TrainingOptions  # noqa: E402
from vfengine.training.team import Execution, FailedElsewhere, Team  # noqa: E402
from vfengine.training.trainer import Trainer  # noqa: E402

STEPS = 20
FAST = {"steps": 100, "warmup": 2, "precision": "fp32", "clean_share": 0.5}
# the model, its options, and how several processes execute it; parts of 3 of 2 are uneven
CASES = {
    "pixels": ("decomposed", {"batch_size": 3, "extra_images": 3}, {}),
    "parts": ("decomposed", {"batch_size": 5, "extra_images": 1}, {"accumulate": 2}),
    "shard": ("decomposed", {"batch_size": 3, "extra_images": 3}, {"shard": True}),
    "shard_parts": (
        "decomposed",
        {"batch_size": 5, "extra_images": 4},
        {"shard": True, "accumulate": 2, "checkpoint_activations": True},
    ),
    "base": ("decomposed", {"batch_size": 2, "extra_images": 1, "train": "base"}, {}),
    "vdm": ("vdm", {"batch_size": 3, "extra_images": 0, "clean_share": 0}, {}),
    "student": ("distill", {"batch_size": 3, "extra_images": 1, "teacher_steps": 8}, {}),
}
COUNTS = {name: STEPS if name in ("pixels", "shard") else 5 for name in CASES}


def clips() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 4, 16, 16, 3), dtype=np.uint8)
    return pixels, np.arange(6, dtype=np.int64) % 3


def trainer(case: str, folder: Path, team: Team | None = None) -> Trainer:
    """Of a case; team: None: one process, which does all at once."""
    model, options, how = CASES[case]
    options = TrainingOptions(**{**FAST, **options})
    execution = Execution() if team is None else Execution(team, **how)
    if model != "distill":
        config = tiny_config() if model == "decomposed" else tiny_video_config()
        return Trainer(config, options, *clips(), execution=execution)
    teacher = Teacher(folder / "teacher", 8)
    config = distilled_config(teacher.config, ("base", "residual"), 4, (1.0, 4.0))
    made = partial(Distillation, teacher=teacher)
    found = Trainer(config, options, *clips(), objective=made, execution=execution)
    found.warm_start(folder / "teacher")
    return found


def losses(training: Trainer, count: int) -> list[dict]:
    reports = [training.step() for _ in range(count)]
    return [{**report.losses, **report.by_t} for report in reports]


def words(team: Team) -> dict:
    """What the first process hears, of two whose second fails while the first waits for it."""
    found = {
        "largest": team.largest(10 * team.rank),
        "of_first": team.of_first(lambda: f"of {team.rank}"),
        "in_turn": team.in_turn(lambda: team.rank),
    }

    def work() -> None:
        if team.rank == 1:
            raise ValueError("alone")
        team.in_turn(lambda: "waits for the other")

    try:
        team.agreed(work)
    except FailedElsewhere as error:
        found["elsewhere"] = error.status
    except ValueError as error:
        assert str(error) == "alone" and team.rank == 1
    return found


def main(folder: Path) -> None:
    team = team_of_process()
    team.open()
    results = {}
    for case, count in COUNTS.items():
        training = trainer(case, folder, team)
        results[case] = losses(training, count)
        training.save(folder / f"{case}.safetensors")
    for case in ("pixels", "shard"):  # from a state of one process, and to its next one
        training = trainer(case, folder, team)
        training.restore(folder / "one.safetensors")
        results[f"{case}_resumed"] = losses(training, STEPS - 10)
        training.export(folder / f"{case}_checkpoint")
        training.write_samples(folder / f"{case}.png")
    results["words"] = words(team)
    if team.is_first:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
