"""Does a generated clip show the action of its label? A classifier of rendered clips reads it.

    python benchmarks/judge_actions.py --model CHECKPOINT --work FOLDER [--json FILE]

1. Trains a 3D CNN on rendered mocap (kept in FOLDER and found again), and reads held-out clips
   with it: other actors, rooms, views and phases of the same 15 performances. Frozen clips (one
   frame, repeated) must fall to chance, or the judge would be reading poses and not motion.
2. Generates --per-action clips of every action, in both `base_path` modes from the same seeds, and
   reads them.
3. Writes a sheet of generated clips a mode into FOLDER, for people to look at.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lib.harness import Row, machine, write_json
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from vfengine import VideoFusionPipeline
from vfengine.diffusion.base_path import BaseTrajectory
from vfengine.media.pictures import pixels_to_network
from vfengine.media.video import write_video
from vfengine.training.mocap import ACTIONS, render_clips

HELD_OUT_SEED, HELD_OUT_CLIPS = 1_000_003, 600


class Judge(nn.Module):
    """Clips [B, N, 3, H, W] in -1..1 -> logits [B, classes], from colours and their changes."""

    def __init__(self, classes: int = len(ACTIONS)):
        super().__init__()

        def layer(inputs, outputs, kernel, stride):
            padding = tuple(side // 2 for side in kernel)
            conv = nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)
            return nn.Sequential(conv, nn.BatchNorm3d(outputs), nn.ReLU())

        self.features = nn.Sequential(
            layer(6, 24, (1, 5, 5), (1, 2, 2)),
            layer(24, 48, (3, 3, 3), (1, 2, 2)),
            layer(48, 96, (3, 3, 3), (2, 2, 2)),
            layer(96, 128, (3, 3, 3), (2, 2, 2)),
            layer(128, 128, (3, 3, 3), (1, 1, 1)),
        )
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(256, classes))

    def forward(self, clips: Tensor) -> Tensor:
        change = F.pad(clips[:, 1:] - clips[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        centred = clips - clips.mean((1, 3, 4), keepdim=True)
        features = self.features(torch.cat([centred, 2 * change], 2).transpose(1, 2))
        return self.head(F.adaptive_max_pool3d(features, (2, 1, 1)).flatten(1))


def to_input(clips: np.ndarray) -> Tensor:
    """uint8 [B, N, H, W, 3] -> float [B, N, 3, H, W] in -1..1."""
    return pixels_to_network(torch.from_numpy(clips))


def train_judge(
    clips: np.ndarray, labels: np.ndarray, steps: int, batch: int = 32, seed: int = 0
) -> Judge:
    """Cross-entropy on real clips, half of them blurred or noisy as generated ones may be."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    judge = Judge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1
    )
    progress = tqdm(range(steps), desc="judge", disable=None)
    for _ in progress:
        chosen = rng.integers(0, len(clips), batch)
        x = to_input(np.stack([clips[i] for i in chosen]))[:, :, torch.randperm(3)]
        x = _degraded(x, rng)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(
                judge(x).float(), torch.from_numpy(labels[chosen]), label_smoothing=0.05
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return judge.eval()


def _degraded(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Every second batch is blurred, noisy or both."""
    kind = rng.integers(0, 6)
    if kind in (0, 2):
        small = F.avg_pool2d(x.flatten(0, 1), 2)
        x = F.interpolate(small, scale_factor=2, mode="bilinear").view_as(x)
    if kind in (1, 2):
        x = x + rng.uniform(0.02, 0.12) * torch.randn_like(x)
    return x


@torch.inference_mode()
def read(judge: Judge, clips: np.ndarray) -> np.ndarray:
    """The action that the judge sees in each of uint8 clips [M, N, H, W, 3]: int64 [M]."""
    parts = [judge(to_input(clips[i : i + 50])).argmax(1) for i in range(0, len(clips), 50)]
    return torch.cat(parts).numpy()


def generate(
    pipeline: VideoFusionPipeline, base_path: str, paths: dict[str, BaseTrajectory], options
) -> np.ndarray:
    """uint8 clips [15 * per_action, N, H, W, 3]; clip j of an action is sample j of its seeds.

    paths keeps the base paths of the actions: both modes start from the same ones.
    """
    parts = []
    for action in tqdm(ACTIONS, desc=base_path, disable=None):
        output = pipeline(
            action,
            num_videos=options.per_action,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            base_path=base_path,
            base_seed=options.seed + ACTIONS.index(action),
            residual_seed=options.seed + 1000 + ACTIONS.index(action),
            trajectory=paths.get(action),
        )
        paths[action] = output.trajectory
        parts.append((output.frames * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="checkpoint folder; default: the one in the package"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the judge, clips and sheets"
    )
    parser.add_argument("--per-action", type=int, default=20)
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument(
        "--base-path", choices=("stepwise", "clean"), nargs="*", default=("clean", "stepwise")
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--judge-steps", type=int, default=600)
    parser.add_argument("--judge-clips", type=int, default=6000)
    parser.add_argument(
        "--judge-clips-file", type=Path, help="clips rendered before, e.g. by vfengine.train"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)

    judge, rows = _judge(options)
    pipeline = None
    if options.base_path:
        pipeline = VideoFusionPipeline.from_pretrained(
            options.model, dtype=getattr(torch, options.dtype)
        )
    paths: dict[str, BaseTrajectory] = {}
    labels = np.repeat(np.arange(len(ACTIONS)), options.per_action)
    for base_path in options.base_path:
        clips = generate(pipeline, base_path, paths, options)
        seen = read(judge, clips)
        case = f"{len(clips)} generated, {base_path}"
        rows.append(Row(case, "judge", "top-1", 100 * float((seen == labels).mean()), "%"))
        for index, action in enumerate(ACTIONS):
            mine = seen[labels == index]
            rows.append(Row(case, action, "top-1", 100 * float((mine == index).mean()), "%"))
            named = ", ".join(
                f"{ACTIONS[a]} {n}" for a, n in enumerate(np.bincount(mine, minlength=15)) if n
            )
            print(f"  {action:15s} read as {named}")
        first = clips.reshape(len(ACTIONS), options.per_action, *clips.shape[1:])[:, 0]
        write_video(
            options.work / f"generated-{base_path}.png", first.reshape(-1, *first.shape[2:]), fps=10
        )
        print(
            f"{case}: {rows[-1 - len(ACTIONS)].value:.1f} % (chance {100 / len(ACTIONS):.1f} %)",
            flush=True,
        )
    if options.json:
        write_json(options.json, rows)
    print(machine())
    return 0


def _judge(options) -> tuple[Judge, list[Row]]:
    """The judge, trained or found again, and its figures on held-out and on frozen clips."""
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / "judge.safetensors"
    judge = Judge().eval()
    if file.exists():
        judge.load_state_dict(load_file(file))
    else:
        if options.judge_clips_file:
            clips = np.load(options.judge_clips_file, mmap_mode="r")
            labels = np.arange(len(clips)) % len(ACTIONS)
        else:
            clips, labels = render_clips(
                options.judge_clips,
                seed=100,
                file=options.work / f"judge-{options.judge_clips}.npy",
            )
        judge = train_judge(clips, labels, options.judge_steps)
        save_file(judge.state_dict(), file)
    held_out, labels = render_clips(
        HELD_OUT_CLIPS, HELD_OUT_SEED, file=options.work / f"held-out-{HELD_OUT_CLIPS}.npy"
    )
    frames = np.random.default_rng(0).integers(0, held_out.shape[1], len(held_out))
    frozen = np.stack(
        [np.repeat(clip[i : i + 1], len(clip), 0) for clip, i in zip(held_out, frames, strict=True)]
    )
    rows = []
    for case, clips in (("held-out rendered", held_out), ("frozen rendered", frozen)):
        accuracy = 100 * float((read(judge, np.array(clips)) == labels).mean())
        rows.append(Row(f"{len(clips)} {case}", "judge", "top-1", accuracy, "%"))
        print(f"{len(clips)} {case}: {accuracy:.1f} %", flush=True)
    return judge, rows


if __name__ == "__main__":
    sys.exit(main())
