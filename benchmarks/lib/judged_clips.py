"""The clips that are judged: rendered and generated ones of the same scenes, and their sheet.

They come in rounds of one clip an action. A round is kept in a file of its own, so that an
interrupted run goes on where it was, and a longer one makes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from vfengine import VideoFusionPipeline
from vfengine.diffusion.decompose import base_index
from vfengine.files import replacing
from vfengine.formats.checkpoint import CheckpointConfig
from vfengine.formats.parts import load_checkpoint_autoencoder
from vfengine.media.pictures import network_to_pixels, pixels_to_network, sheet, to_uint8
from vfengine.training.mocap import ACTIONS, Scene, draw_scene
from vfengine.training.mocap.captions import caption

PROMPT_SEED, REFERENCE_SEED = 3_000, 2_000  # of scenes that neither models nor judges train on
REAL = "real"  # in place of a base path: the real clip's base frame is animated
_SHOWN = 4  # frames of a clip in a sheet
_MARGIN, _LINE = 6, 15  # pixels


@dataclass(frozen=True)
class Sampling:
    """How clips are sampled.

    base_path:   "clean", "stepwise" or REAL
    reuse_every: as a call takes it, in its plain form
    """

    base_path: str
    steps: int
    solver: str
    guidance_scale: float
    seed: int
    reuse_every: int | str = 1

    def key(self, config: CheckpointConfig) -> str:
        """Names the clips that a model makes in this way."""
        way = asdict(self)
        if self.reuse_every == 1:
            del way["reuse_every"]  # clips of before it was there are found again
        usual = config.usual_steps
        if usual and (own := usual.own_timesteps(self.solver, self.steps)):
            way["timesteps"] = own
        # what else is usual changes no clip, as all is said here
        told = json.dumps([replace(config, usual_steps=None).to_json(), way])
        return hashlib.sha256(told.encode()).hexdigest()[:12]


def scenes_of(seed: int, actions: Sequence[str], number: int) -> list[Scene]:
    """Round `number`: a scene for each action, in pairs of colours that training never shows."""
    indices = [number * len(ACTIONS) + ACTIONS.index(action) for action in actions]
    return [draw_scene(seed, index, held_out=True) for index in indices]


def kept_clips(
    folder: Path, rounds: Iterable[int], make: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Clips of all rounds, uint8 [M, N, H, W, 3]; make(number) gives those not yet kept."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number in tqdm(rounds, desc=folder.name, unit="round", disable=None):
        file = folder / f"{number:03d}.npy"
        if not file.exists():
            with replacing(file) as temporary, open(temporary, "wb") as out:
                np.save(out, make(number))
        parts.append(np.load(file))
    return np.concatenate(parts)


def coded(folder: Path, config: CheckpointConfig) -> Callable[[np.ndarray], np.ndarray]:
    """What a model's autoencoder makes of clips, uint8 to uint8: no clip of the model is better."""
    autoencoder = load_checkpoint_autoencoder(folder, config)

    @torch.inference_mode()
    def through(clips: np.ndarray) -> np.ndarray:
        x = pixels_to_network(torch.from_numpy(clips)).contiguous()
        return network_to_pixels(autoencoder.decode(autoencoder.encode(x))).numpy()

    return through


def generated(
    pipeline: VideoFusionPipeline,
    scenes: Sequence[Scene],
    real: np.ndarray,
    sampling: Sampling,
    number: int,
) -> np.ndarray:
    """A clip of each scene of a round, from its caption, or from its label where a model has those.

    real: clips of the same scenes, whose base frames are animated if sampling.base_path is REAL
    """
    settings = {
        "num_inference_steps": sampling.steps,
        "solver": sampling.solver,
        "guidance_scale": sampling.guidance_scale,
        "reuse_every": sampling.reuse_every,
        "base_seed": sampling.seed + 2 * number,
        "residual_seed": sampling.seed + 2 * number + 1,
    }
    if pipeline.config.text_encoder is None:
        name, asked = "label", [scene.action for scene in scenes]
    else:
        name, asked = "prompt", [caption(scene) for scene in scenes]
    if sampling.base_path != REAL:
        with tqdm(leave=False, unit="step", disable=None) as bar:
            given = {name: asked, "base_path": sampling.base_path}
            return to_uint8(pipeline(**given, **settings, callback=partial(_show, bar)).frames)
    base_frames = [Image.fromarray(clip[base_index(len(clip))]) for clip in real]
    outputs = [
        pipeline(**{name: what}, image=image, base_path="clean", sample_offset=i, **settings)
        for i, (what, image) in enumerate(zip(asked, base_frames, strict=True))
    ]
    return to_uint8(np.concatenate([output.frames for output in outputs]))


def _show(bar: tqdm, phase: str, done: int, total: int) -> None:
    bar.desc, bar.n, bar.total = phase, done, total
    bar.refresh()


def write_sheet(file: Path, titles: Sequence[str], columns: dict[str, np.ndarray]) -> None:
    """A row a title: the title, and beneath it some frames of its clip in each column.

    columns: by their headings, uint8 clips [M, N, H, W, 3], M the number of titles
    """
    strips = {}
    for heading, clips in columns.items():
        chosen = np.linspace(0, clips.shape[1] - 1, _SHOWN).round().astype(int)
        strips[heading] = [sheet(clip[chosen]) for clip in clips]
    height, width = next(iter(strips.values()))[0].shape[:2]
    step = height + _LINE + _MARGIN
    size = (len(strips) * (width + _MARGIN) - _MARGIN, _LINE + len(titles) * step - _MARGIN)
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for column, (heading, rows) in enumerate(strips.items()):
        left = column * (width + _MARGIN)
        draw.text((left + width // 2, 0), heading, "black", font, anchor="ma")
        for row, strip in enumerate(rows):
            picture.paste(Image.fromarray(strip), (left, row * step + 2 * _LINE))
    for row, title in enumerate(titles):
        draw.text((1, row * step + _LINE), title, "black", font)
    with replacing(file) as temporary:
        picture.save(temporary, "png", optimize=True)
