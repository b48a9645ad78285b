"""Is a model worth showing? Judges read its clips, and real clips of the same scenes beside them.

    python benchmarks/judge_model.py --work FOLDER [--model CHECKPOINT] [--json FILE]
    python benchmarks/judge_model.py --work FOLDER --sheet docs/generated.png

Scenes are of a seed of their own, and garments have two colours that training never shows together.
Their captions are the prompts. None of them is chosen.

    actions     an action judge reads what somebody does. It sees motion alone: frozen clips are all
                the same to it
    attributes  an attribute judge reads the colours of top, bottom, hair and wall, and the place
    distances   Fréchet and kernel distance, on features of both judges, to real clips of other
                scenes; the real clips of the same scenes give the floor
    pictures    how much of a frame's energy is in fine waves (lost by blur), and how much the
                colour of limbs varies from a pixel to its neighbours (speckle)

Judges and clips are kept in FOLDER and found again. With `--base-path real` the real clips' base
frames are animated: what is wrong there is not the base network's fault. A model of labels is asked
for its labels; --real-clips gives the clips of one that learned from another renderer.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lib.harness import Row, Target, machine, table, verdicts, write_json
from lib.judged_clips import (
    PROMPT_SEED,
    REAL,
    REFERENCE_SEED,
    Sampling,
    coded,
    generated,
    kept_clips,
    scenes_of,
    write_sheet,
)
from lib.judges import (
    ATTRIBUTES,
    ActionJudge,
    AttributeJudge,
    attributes_of,
    blurred,
    kept_judge,
    read_actions,
    read_attributes,
    train_action_judge,
    train_attribute_judge,
)
from lib.picture_measures import fine_share, speckle

from vfengine import VideoFusionPipeline
from vfengine.formats.checkpoint import DEFAULT, DecomposedConfig, read_config
from vfengine.media.pictures import network_to_pixels, pixels_to_network
from vfengine.media.video import write_video
from vfengine.metrics import frechet_distance, kernel_distance
from vfengine.names import SOLVERS
from vfengine.pipelines.request import SamplingRequest
from vfengine.pipelines.reuse_every import plain_reuse_every
from vfengine.training.mocap import ACTIONS, VERSION, Renderer, Scene
from vfengine.training.mocap.captions import caption


@dataclass(frozen=True)
class Subject:
    """What is judged: real clips, and others of the same actions (and scenes) to compare with them.

    scenes:    of the clips; None for real clips of unknown making, whose attributes nobody knows
    actions:   int64 [M], an index into ACTIONS for each clip
    reference: real clips of other scenes
    clips:     by contender, uint8 [M, N, H, W, 3], with "real" among them
    """

    scenes: list[Scene] | None
    actions: np.ndarray
    reference: np.ndarray
    clips: dict[str, np.ndarray]


DISTANCES = {"Fréchet": frechet_distance, "kernel": kernel_distance}


def judged(subject: Subject, motion: ActionJudge, look: AttributeJudge) -> list[Row]:
    """All rows of a subject. What the judges make of harmed real clips tells how good they are."""
    rows: list[Row] = []
    reads = {"motion": partial(read_actions, motion), "look": partial(read_attributes, look)}
    reference = {name: read(subject.reference)[1] for name, read in reads.items()}
    real = subject.clips["real"]
    harmed = {"real, frozen": frozen(real), "real, blurred and noisy": blurred_and_noisy(real)}
    for contender, clips in {**subject.clips, **harmed}.items():
        seen = {name: read(clips) for name, read in reads.items()}
        rows += _actions(contender, seen["motion"][0], subject.actions)
        if subject.scenes is not None:
            rows += _attributes(contender, seen["look"][0], attributes_of(subject.scenes))
        for name, features in reference.items():
            for metric, distance in DISTANCES.items():
                value = distance(features, seen[name][1])
                rows.append(Row("distances", contender, f"{metric}, {name}", value, ""))
    return rows + pictures(subject.clips)


def _actions(contender: str, seen: np.ndarray, actions: np.ndarray) -> list[Row]:
    right = 100 * (seen == actions)
    rows = [Row("actions", contender, "right", float(right.mean()), "%")]
    for index in np.unique(actions):
        share = float(right[actions == index].mean())
        rows.append(Row("each action", ACTIONS[index], contender, share, "%"))
    return rows


def _attributes(contender: str, seen: np.ndarray, there: np.ndarray) -> list[Row]:
    right = 100 * (seen == there)
    shares = dict(zip(ATTRIBUTES, right.mean(0), strict=True))
    shares |= {"on average": right.mean(), "all": right.min(1).mean()}
    return [Row("attributes", contender, name, float(v), "%") for name, v in shares.items()]


def pictures(clips: dict[str, np.ndarray]) -> list[Row]:
    """Rows of sharpness and speckle, each also in times real's."""
    rows = []
    real: dict[str, float] = {}
    for contender, made in clips.items():
        grain = speckle(made)
        found = {
            "waves below 8 pixels": 100 * fine_share(made, 8).mean(),
            "below 4 pixels": 100 * fine_share(made, 4).mean(),
            "speckle": 1e3 * np.nanmean(grain[:, 0]),
            "speckle of cloth": 1e3 * np.nanmean(grain[:, 1]),
        }
        real = real or found
        units = ("%", "%", "e-3", "e-3")
        for (metric, value), unit in zip(found.items(), units, strict=True):
            rows.append(Row("pictures", contender, metric, float(value), unit))
            ratio = float(value / real[metric])
            rows.append(Row("pictures, times real's", contender, metric, ratio, "x"))
    return rows


def targets(contender: str) -> list[Target]:
    """What a model to be proud of reaches."""
    ratio = "pictures, times real's"
    return [
        Target("actions", contender, "right", 90),
        Target("attributes", contender, "on average", 85),
        Target(ratio, contender, "waves below 8 pixels", 0.85),
        Target(ratio, contender, "waves below 8 pixels", 1.15, at_most=True),
        Target(ratio, contender, "below 4 pixels", 0.85),
        Target(ratio, contender, "below 4 pixels", 1.15, at_most=True),
        Target(ratio, contender, "speckle", 1.5, at_most=True),
        Target(ratio, contender, "speckle of cloth", 1.5, at_most=True),
    ]


def frozen(clips: np.ndarray) -> np.ndarray:
    """Each clip's first frame, repeated."""
    return np.broadcast_to(clips[:, :1], clips.shape)


def blurred_and_noisy(clips: np.ndarray) -> np.ndarray:
    """As bad as generated clips may be: half the resolution, and noise of 6 of 255."""
    noise = torch.Generator().manual_seed(0)

    def harmed(clip: np.ndarray) -> np.ndarray:
        x = blurred(pixels_to_network(torch.from_numpy(clip)))
        return network_to_pixels(x + 0.05 * torch.randn(x.shape, generator=noise)).numpy()

    return np.stack([harmed(clip) for clip in clips])


# -- what is judged --------------------------------------------------------------------------------


def of_scenes(pipeline: VideoFusionPipeline, options: argparse.Namespace) -> Subject:
    """Scenes rendered, and what the model's autoencoder makes of them."""
    config, rounds = pipeline.config, range(options.per_action)
    actions = known_actions(pipeline)
    renderer = Renderer(config.picture_size[0], config.num_frames)
    kind = f"{len(actions)}x{config.num_frames}x{renderer.size}-drawn{VERSION}"

    def real_clips(seed: int) -> np.ndarray:
        name = f"real-{seed}-{kind}"
        return kept_clips(
            options.work / name,
            rounds,
            lambda i: renderer.clips(scenes_of(seed, actions, i)).numpy(),
        )

    clips = {"real": real_clips(PROMPT_SEED)}
    if config.autoencoder is not None:
        through = coded(pipeline.folder, config)
        folder = options.work / f"coded-{config.sha256['autoencoder'][:12]}-{kind}"
        real = clips["real"].reshape(len(rounds), len(actions), *clips["real"].shape[1:])
        clips["real, coded"] = kept_clips(folder, rounds, lambda i: through(real[i]))
    flat = [scene for i in rounds for scene in scenes_of(PROMPT_SEED, actions, i)]
    indices = np.array([ACTIONS.index(scene.action) for scene in flat])
    return Subject(flat, indices, real_clips(REFERENCE_SEED), clips)


def of_real_clips(pipeline: VideoFusionPipeline, options: argparse.Namespace) -> Subject:
    """The first real clips of a file, of the model's labels in turns."""
    actions = known_actions(pipeline)
    count = options.per_action * len(actions)
    real = np.load(options.real_clips, mmap_mode="r")
    if len(real) < 2 * count:
        raise ValueError(f"{options.real_clips}: expected {2 * count} clips, found {len(real)}")
    indices = [ACTIONS.index(action) for action in actions] * options.per_action
    clips = {"real": np.array(real[:count])}
    return Subject(None, np.array(indices), np.array(real[count : 2 * count]), clips)


def loaded(model: Path, options: argparse.Namespace) -> VideoFusionPipeline:
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    return VideoFusionPipeline.from_pretrained(model, dtype=dtype)


def known_actions(pipeline: VideoFusionPipeline) -> list[str]:
    return [action for action in ACTIONS if action in pipeline.labels]


def generated_clips(
    pipeline: VideoFusionPipeline, real: np.ndarray, sampling: Sampling, options: argparse.Namespace
) -> np.ndarray:
    """The model's clips of the scenes of these real ones."""
    actions = known_actions(pipeline)
    scenes = [scenes_of(PROMPT_SEED, actions, i) for i in range(options.per_action)]
    real = real.reshape(len(scenes), -1, *real.shape[1:])
    folder = options.work / f"generated-{sampling.base_path}-{sampling.key(pipeline.config)}"
    clips = kept_clips(
        folder,
        range(len(scenes)),
        lambda i: generated(pipeline, scenes[i], real[i], sampling, i),
    )
    first = clips[: len(scenes[0])]
    write_video(folder / "first.png", first.reshape(-1, *first.shape[2:]))
    return clips


# -- the command -----------------------------------------------------------------------------------


def every(text: str) -> int | str:
    return plain_reuse_every(text, SamplingRequest.sampled)


def add_judges(parser: argparse.ArgumentParser) -> None:
    """Flags of the judges, of how much they read and of where all is kept."""
    add = parser.add_argument
    add("--work", type=Path, help="folder that keeps judges and clips")
    add("--json", type=Path, metavar="FILE", help="write machine and rows there")
    add("--per-action", type=int, default=20, help="clips of each action")
    add("--seed", type=int, default=0, help="of the noise")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--judge-clips", type=int, default=2000, help="that the action judge learns from")
    add("--judge-scenes", type=int, default=3000, help="that the attribute judge learns from")
    about = "of the attribute judge's training; the action judge's takes half as many"
    add("--judge-steps", type=int, default=800, help=about)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=DEFAULT, help="checkpoint folder; default: the package's")
    add_judges(parser)
    add("--sheet", type=Path, metavar="FILE", help="write the first clips there, as .png")
    add("--base-path", choices=("clean", "stepwise", REAL), nargs="+", help="default: the model's")
    add("--steps", type=int, help="default: as many as are usual for the model")
    add("--solver", choices=SOLVERS, help="default: the model's usual one")
    add("--guidance-scale", type=float, default=2.0)
    add("--reuse-every", type=every, default=1, metavar="N", help="N, or base=N,residual=N")
    about = "uint8 [M, N, H, W, 3] of the model's actions in turns, .npy, for rendered clips"
    add("--real-clips", type=Path, metavar="FILE", help=about)
    options = parser.parse_args(arguments)
    if not options.work:
        parser.error("--work FOLDER is needed")
    if options.sheet and options.real_clips:
        parser.error("--sheet shows rendered scenes, and --real-clips takes their place")
    return options


def main(arguments: list[str] | None = None) -> list[Row]:
    options = parse(arguments)
    config = read_config(options.model)
    if not isinstance(config, DecomposedConfig):
        raise ValueError(f"expected a decomposed model, got {config.objective}")
    options.work.mkdir(parents=True, exist_ok=True)
    motion, look = judges(options)
    pipeline = loaded(options.model, options)
    subject = (of_real_clips if options.real_clips else of_scenes)(pipeline, options)
    real, made = subject.clips["real"], []
    asked = SamplingRequest(num_inference_steps=options.steps, solver=options.solver)
    steps = pipeline.fill_defaults(asked)
    for base_path in options.base_path or [config.base_path]:
        taken = steps.num_inference_steps, steps.solver
        way = (*taken, options.guidance_scale, options.seed)
        sampling = Sampling(base_path, *way, options.reuse_every)
        made.append(f"generated, {base_path}")
        subject.clips[made[-1]] = generated_clips(pipeline, real, sampling, options)
    rows = judged(subject, motion, look)
    print(table(rows))
    held = [name for name in made if not name.endswith(REAL)]
    print(verdicts(rows, [target for name in held for target in targets(name)]))
    if options.sheet:
        count = len(np.unique(subject.actions))
        titles = [caption(scene) for scene in subject.scenes[:count]]
        columns = {name: subject.clips[name][:count] for name in (made[0], "real")}
        write_sheet(options.sheet, titles, columns)
    if options.json:
        told = {name: str(value) for name, value in vars(options).items()}
        facts = machine() | {"model": config.fingerprint()}
        write_json(options.json, rows, facts, {"options": told})
    return rows


def judges(options: argparse.Namespace) -> tuple[ActionJudge, AttributeJudge]:
    """Both judges, trained or found again."""
    steps, clips, scenes = options.judge_steps, options.judge_clips, options.judge_scenes
    motion = kept_judge(
        options.work / f"actions-{clips}-drawn{VERSION}-{steps // 2}.safetensors",
        ActionJudge(),
        lambda: train_action_judge(clips, steps // 2),
    )
    look = kept_judge(
        options.work / f"attributes-{scenes}-drawn{VERSION}-{steps}.safetensors",
        AttributeJudge(),
        lambda: train_attribute_judge(scenes, steps),
    )
    return motion, look


if __name__ == "__main__":
    main()
