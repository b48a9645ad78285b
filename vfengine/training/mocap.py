"""Rendered motion capture: recorded human motions with a random actor, room and viewpoint.

The motions are the 15 performances that pybullet ships (`humanoid3d_*.txt` in its data/motions);
pybullet's software renderer draws them. A clip is 16 frames of 64 x 64 by default, about one period
of the action. The camera follows the actor, who fills the image. Content (actor, room, view, light,
phase) is random; motion is the class. This is not real video, and there is only one performance of
each action.
"""

from __future__ import annotations

import colorsys
import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from ..files import replacing

# seconds that one clip of each action spans
SECONDS = {
    "backflip": 1.6,
    "cartwheel": 2.0,
    "crawl": 1.8,
    "dance_a": 1.6,
    "dance_b": 1.6,
    "getup_facedown": 2.5,
    "getup_faceup": 2.5,
    "jump": 1.5,
    "kick": 1.4,
    "punch": 1.5,
    "roll": 1.8,
    "run": 0.8,
    "spin": 1.3,
    "spinkick": 1.4,
    "walk": 1.1,
}
ACTIONS = tuple(SECONDS)
_PERIODIC = ("walk", "run")  # the others would jump where their end meets their start

# joints in the order of a motion's columns, after time, root position and root rotation, and how
# many columns each has: 4 for a quaternion, 1 for an angle
_JOINTS = {
    "chest": 4,
    "neck": 4,
    "right_hip": 4,
    "right_knee": 1,
    "right_ankle": 4,
    "right_shoulder": 4,
    "right_elbow": 1,
    "left_hip": 4,
    "left_knee": 1,
    "left_ankle": 4,
    "left_shoulder": 4,
    "left_elbow": 1,
}
_SUPERSAMPLING = 2


class Motion:
    """One recorded performance, interpolated to any time.

    A pose is a row [time step, root x y z, root quaternion w x y z, joints...], as in the file.
    """

    def __init__(self, file: Path, periodic: bool):
        self.rows = np.array(json.loads(file.read_text())["Frames"])
        self.periodic = periodic
        self.times = np.concatenate([[0.0], np.cumsum(self.rows[:-1, 0])])
        self.duration = float(self.times[-1])
        widths = [4, *_JOINTS.values()]
        starts = 4 + np.concatenate([[0], np.cumsum(widths)[:-1]])
        self.quaternions = [
            slice(s, s + 4) for s, width in zip(starts, widths, strict=True) if width == 4
        ]

    def at(self, time: float) -> np.ndarray:
        """The pose at `time` seconds: linear between rows, unit quaternions the shorter way."""
        time = time % self.duration if self.periodic else min(max(time, 0.0), self.duration)
        i = min(int(np.searchsorted(self.times, time, "right")) - 1, len(self.times) - 2)
        share = (time - self.times[i]) / max(self.times[i + 1] - self.times[i], 1e-6)
        before, after = self.rows[i], self.rows[i + 1]
        pose = before * (1 - share) + after * share
        for part in self.quaternions:
            end = after[part] if before[part] @ after[part] > 0 else -after[part]
            blend = before[part] * (1 - share) + end * share
            pose[part] = blend / np.linalg.norm(blend)
        return pose


class MocapRenderer:
    """Draws clips. One per process: it owns a pybullet simulation; `close` ends it."""

    def __init__(self, size: int = 64, num_frames: int = 16):
        with _native_output_hidden():
            import pybullet
            import pybullet_data

        self.size, self.num_frames, self.bullet = size, num_frames, pybullet
        root = Path(pybullet_data.getDataPath())
        with _native_output_hidden():  # the URDF parser prints a warning per joint
            self.client = pybullet.connect(pybullet.DIRECT)
            self.actor = pybullet.loadURDF(
                str(root / "humanoid" / "humanoid.urdf"),
                globalScaling=0.25,
                useFixedBase=True,
                flags=pybullet.URDF_MAINTAIN_LINK_ORDER,
                physicsClientId=self.client,
            )
        self.joints = {
            pybullet.getJointInfo(self.actor, i, physicsClientId=self.client)[1].decode(): i
            for i in range(pybullet.getNumJoints(self.actor, physicsClientId=self.client))
        }
        motions = root / "data" / "motions"
        self.motions = {
            action: Motion(motions / f"humanoid3d_{action}.txt", action in _PERIODIC)
            for action in ACTIONS
        }

    def close(self) -> None:
        self.bullet.disconnect(self.client)

    def clip(self, action: str, seed: int | tuple[int, ...]) -> np.ndarray:
        """One clip uint8 [N, H, W, 3]; the same seed gives the same clip.

        Raises ValueError for an unknown action.
        """
        if action not in self.motions:
            raise ValueError(f"unknown action {action!r}: expected one of {', '.join(ACTIONS)}")
        rng = np.random.default_rng(seed)
        motion, span = self.motions[action], SECONDS[action]
        latest = motion.duration if motion.periodic else max(motion.duration - span, 0.05)
        times = rng.uniform(0, latest) + np.arange(self.num_frames) * span / max(
            self.num_frames - 1, 1
        )
        self._dress(rng)
        camera = self._camera(rng)
        room = self._room(rng)
        light = [rng.uniform(-1, 1), 2.0, rng.uniform(1, 2)]
        return np.stack([self._frame(motion.at(time), camera, light, room) for time in times])

    def _dress(self, rng: np.random.Generator) -> None:
        """Random shirt, trousers (or one suit) and skin."""
        shirt, trousers = _colour(rng, (0.35, 1), (0.45, 1)), _colour(rng, (0.35, 1), (0.35, 1))
        skin = np.clip(np.array([0.95, 0.76, 0.62]) * rng.uniform(0.55, 1.05), 0, 1)
        if rng.uniform() < 0.3:
            trousers = shirt
        for name, link in [*self.joints.items(), ("base", -1)]:
            if any(part in name for part in ("neck", "wrist", "elbow")):
                colour = skin
            elif any(part in name for part in ("hip", "knee", "ankle", "base", "root")):
                colour = trousers
            else:
                colour = shirt
            self.bullet.changeVisualShape(
                self.actor, link, rgbaColor=[*colour, 1], physicsClientId=self.client
            )

    def _camera(self, rng: np.random.Generator) -> dict:
        """In front, up to 35 degrees to a side and 18 above, close enough to fill the image."""
        yaw, elevation = np.radians(rng.uniform(-35, 35)), np.radians(rng.uniform(0, 18))
        distance, target = rng.uniform(2.85, 3.25), np.array([0, 0.9, 0])
        direction = [
            np.sin(yaw) * np.cos(elevation),
            np.sin(elevation),
            np.cos(yaw) * np.cos(elevation),
        ]
        eye = target + distance * np.array(direction)
        return {
            "viewMatrix": self.bullet.computeViewMatrix(eye.tolist(), target.tolist(), [0, 1, 0]),
            "projectionMatrix": self.bullet.computeProjectionMatrixFOV(35, 1, 0.1, 20),
        }

    def _room(self, rng: np.random.Generator) -> np.ndarray:
        """A wall and a floor, shaded across or down, perhaps with stripes: [S, S, 3] in 0..255."""
        side = self.size * _SUPERSAMPLING
        down, across = np.mgrid[0:side, 0:side] / side
        wall, floor = _colour(rng, (0, 0.5), (0.25, 0.95)), _colour(rng, (0, 0.5), (0.2, 0.8))
        is_wall = down < rng.uniform(0.62, 0.8)
        shade = 1 - rng.uniform(0, 0.35) * (down if rng.uniform() < 0.5 else across)
        room = np.where(is_wall[..., None], wall, floor) * shade[..., None]
        if rng.uniform() < 0.3:
            stripe = np.floor(across * rng.integers(2, 5) + rng.uniform()) % 2 >= 1
            room = room * np.where(stripe & is_wall, 1 - rng.uniform(0.08, 0.25), 1)[..., None]
        return room * 255

    def _frame(
        self, pose: np.ndarray, camera: dict, light: list[float], room: np.ndarray
    ) -> np.ndarray:
        """uint8 [H, W, 3]: the actor in this pose before the room, averaged down."""
        bullet, client = self.bullet, self.client
        # the camera follows: only the height of the root is kept
        bullet.resetBasePositionAndOrientation(
            self.actor, [0, pose[2], 0], _xyzw(pose[4:8]), physicsClientId=client
        )
        column = 8
        for name, width in _JOINTS.items():
            value = pose[column : column + width]
            if width == 4:
                bullet.resetJointStateMultiDof(
                    self.actor, self.joints[name], _xyzw(value), physicsClientId=client
                )
            else:
                bullet.resetJointState(
                    self.actor, self.joints[name], value[0], physicsClientId=client
                )
            column += width
        side = self.size * _SUPERSAMPLING
        _, _, colour, _, segmentation = bullet.getCameraImage(
            side,
            side,
            renderer=bullet.ER_TINY_RENDERER,
            shadow=0,
            lightDirection=light,
            lightAmbientCoeff=0.6,
            lightDiffuseCoeff=0.45,
            lightSpecularCoeff=0,
            physicsClientId=client,
            **camera,
        )
        actor = np.asarray(colour, np.uint8).reshape(side, side, 4)[..., :3]
        outside = np.asarray(segmentation).reshape(side, side, 1) < 0
        image = np.where(outside, room, actor)
        blocks = image.reshape(self.size, _SUPERSAMPLING, self.size, _SUPERSAMPLING, 3)
        return blocks.mean((1, 3)).round().astype(np.uint8)


def render_clips(
    num_clips: int,
    seed: int = 0,
    *,
    file: Path | None = None,
    workers: int | None = None,
    size: int = 64,
    num_frames: int = 16,
    progress=None,
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 clips [M, N, H, W, 3] and int64 labels [M] (indices into ACTIONS, in turns).

    Clip i depends on seed and i alone, not on the number of workers. With `file`, clips are kept
    there as .npy (memory-mapped) and found again by the next call. progress(n) is called as clips
    are finished. Raises ValueError for a file that is truncated or holds clips of another shape.
    """
    shape = (num_clips, num_frames, size, size, 3)
    labels = np.arange(num_clips, dtype=np.int64) % len(ACTIONS)
    if file is not None and file.exists():
        try:
            clips = np.load(file, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{file} is no complete .npy file, remove it: {error}") from error
        if clips.shape != shape or clips.dtype != np.uint8:
            raise ValueError(
                f"{file} holds {clips.dtype} {clips.shape}, expected uint8 {shape}: remove it"
            )
        return clips, labels
    render = partial(_render_chunk, seed=seed, size=size, num_frames=num_frames)
    chunks = [range(i, min(i + 60, num_clips)) for i in range(0, num_clips, 60)]
    workers = workers or os.cpu_count()
    with (
        _new_clips(shape, file) as clips,
        ProcessPoolExecutor(workers, initializer=_start_worker) as pool,
    ):
        for done, part in zip(chunks, pool.map(render, chunks), strict=True):
            clips[done.start : done.stop] = part
            if progress is not None:
                progress(len(done))
    return clips, labels


@contextlib.contextmanager
def _new_clips(shape: tuple[int, ...], file: Path | None) -> Iterator[np.ndarray]:
    """An array to fill, in memory or mapped; the file is there once the block has ended."""
    if file is None:
        yield np.empty(shape, np.uint8)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as unfinished:
        clips = np.lib.format.open_memmap(unfinished, "w+", np.uint8, shape)
        yield clips
        clips.flush()


_worker: dict[tuple[int, int], MocapRenderer] = {}


def _start_worker() -> None:
    """Drops the renderers that a forked worker process inherits."""
    _worker.clear()


def _render_chunk(indices: range, seed: int, size: int, num_frames: int) -> np.ndarray:
    renderer = _worker.get((size, num_frames))
    if renderer is None:
        renderer = _worker[size, num_frames] = MocapRenderer(size, num_frames)
    return np.stack([renderer.clip(ACTIONS[i % len(ACTIONS)], (seed, i)) for i in indices])


@contextlib.contextmanager
def _native_output_hidden():
    """Discards what C code writes to stdout and stderr."""
    saved = [(stream, os.dup(stream)) for stream in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream, _ in saved:
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, copy in saved:
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)


def _colour(
    rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]
) -> np.ndarray:
    """A random RGB colour in 0..1 of any hue."""
    return np.array(
        colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value))
    )


def _xyzw(quaternion: np.ndarray) -> list[float]:
    """w x y z (motion files) -> x y z w (pybullet)."""
    return [*quaternion[1:], quaternion[0]]
