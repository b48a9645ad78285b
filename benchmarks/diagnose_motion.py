"""Where does a model lose the motion? The action judge classifies its estimates of noisy clips.

    python benchmarks/diagnose_motion.py --model CHECKPOINT --work FOLDER [--json FILE]

FOLDER holds a judge trained by benchmarks/judge_actions.py. For held-out clips, in both base_path
modes: the clean estimate in one step from the true z' at several timesteps; and the full chain from
the true base frame, which leaves nothing to the base network ("animated").
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from judge_actions import ACTIONS, HELD_OUT_CLIPS, HELD_OUT_SEED, Judge, read, to_input
from lib.harness import Row, write_json
from safetensors.torch import load_file
from torch import Tensor

from vfengine.diffusion.base_path import BaseTrajectory
from vfengine.diffusion.decompose import add_noise, base_index, remove_base
from vfengine.diffusion.noise import decomposed_noise
from vfengine.formats.checkpoint import load_network, read_config
from vfengine.media.pictures import network_to_pixels
from vfengine.sampling.api import sample_residual
from vfengine.training.mocap import render_clips


@torch.inference_mode()
def diagnose(
    judge: Judge, model: Path | None, clips: np.ndarray, labels: np.ndarray, steps: int
) -> list[Row]:
    """Rows of top-1 accuracy and, for one step, of RMS error over the frames but the base frame."""
    config = read_config(model)
    base, residual = (load_network(model, config, name) for name in config.networks)
    schedule, m = config.noise_schedule(), base_index(config.num_frames)
    x, y = to_input(clips), torch.from_numpy(labels)
    noise = decomposed_noise(x.shape, base_seed=0, residual_seed=1)
    others = [i for i in range(config.num_frames) if i != m]
    rows = []

    def add(case: str, contender: str, made: Tensor) -> None:
        accuracy = 100 * float((read(judge, network_to_pixels(made).numpy()) == labels).mean())
        error = float((made - x)[:, others].square().mean().sqrt())
        rows.append(Row(case, contender, "top-1", accuracy, "%"))
        rows.append(Row(case, contender, "RMS error", error, "of 2"))
        print(
            f"{case:24s} {contender:10s} top-1 {accuracy:5.1f} %  RMS error {error:.3f}", flush=True
        )

    add("base frame repeated", "-", x[:, m : m + 1].expand_as(x))
    for timestep in (900, 700, 500, 300, 100):
        t = torch.full((len(x),), timestep)
        z = add_noise(x, noise.combine(config.lam), t, schedule)
        estimated = base(z[:, m], t, class_labels=y)
        for mode, b in (("clean", noise.base), ("stepwise", estimated)):
            given = remove_base(z, b, config.lam, t, schedule)
            add(f"one step, t = {timestep}", mode, residual.denoise(given, t, class_labels=y))
    path = BaseTrajectory.from_image(x[:, m], schedule=schedule, num_inference_steps=steps)
    made = sample_residual(
        lambda z, t: residual(z, t, class_labels=y), path, noise.residual, lam=config.lam
    )
    add(f"animated, {steps} steps", "clean", made)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: the one shipped")
    parser.add_argument("--work", type=Path, required=True, help="folder of judge_actions.py")
    parser.add_argument("--num-clips", type=int, default=60, help="held-out clips to use")
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    judge = Judge().eval()
    judge.load_state_dict(load_file(options.work / "judge.safetensors"))
    held_out = options.work / f"held-out-{HELD_OUT_CLIPS}.npy"
    clips, labels = render_clips(HELD_OUT_CLIPS, HELD_OUT_SEED, file=held_out)
    count = options.num_clips - options.num_clips % len(ACTIONS)
    clips, labels = np.array(clips[:count]), labels[:count]
    rows = diagnose(judge, options.model, clips, labels, options.num_inference_steps)
    if options.json:
        write_json(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
