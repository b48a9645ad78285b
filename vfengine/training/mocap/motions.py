"""The recorded motions: 15 performances that pybullet ships, as poses at any time.

A pose is a row [time step, root x y z, root quaternion w x y z, joints...], as in the files
`humanoid3d_*.txt` in pybullet's data/motions. Only these files of pybullet are used.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

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

# joints in the order of a motion's columns, after time, root position and root rotation: their
# parent and their place in the parent's frame (humanoid.urdf); knees and elbows have one angle,
# the others a quaternion
JOINTS = {
    "chest": ("root", (0, 0.944604, 0)),
    "neck": ("chest", (0, 0.895576, 0)),
    "right_hip": ("root", (0, 0, 0.339548)),
    "right_knee": ("right_hip", (0, -1.686184, 0)),
    "right_ankle": ("right_knee", (0, -1.63948, 0)),
    "right_shoulder": ("chest", (-0.0962, 0.974, 0.73244)),
    "right_elbow": ("right_shoulder", (0, -1.099152, 0)),
    "left_hip": ("root", (0, 0, -0.339548)),
    "left_knee": ("left_hip", (0, -1.686184, 0)),
    "left_ankle": ("left_knee", (0, -1.63948, 0)),
    "left_shoulder": ("chest", (-0.0962, 0.974, -0.73244)),
    "left_elbow": ("left_shoulder", (0, -1.099152, 0)),
}
SCALE = 0.25  # metres of a unit of the places in JOINTS


def _has_angle(joint: str) -> bool:
    return joint.endswith(("knee", "elbow"))


def _quaternion_columns() -> list[slice]:
    columns, column = [slice(4, 8)], 8
    for joint in JOINTS:
        if not _has_angle(joint):
            columns.append(slice(column, column + 4))
        column += 1 if _has_angle(joint) else 4
    return columns


_QUATERNIONS = _quaternion_columns()


class Motion:
    """One recorded performance, interpolated to any time."""

    def __init__(self, file: Path, periodic: bool):
        self.rows = np.array(json.loads(file.read_text())["Frames"])
        self.periodic = periodic
        self.times = np.concatenate([[0.0], np.cumsum(self.rows[:-1, 0])])
        self.duration = float(self.times[-1])

    def at(self, times: np.ndarray) -> np.ndarray:
        """Poses [F, 44] at times [F] in seconds.

        Linear between rows; unit quaternions the shorter way.
        """
        wrapped = times % self.duration if self.periodic else np.clip(times, 0.0, self.duration)
        i = np.minimum(np.searchsorted(self.times, wrapped, "right") - 1, len(self.times) - 2)
        share = (wrapped - self.times[i]) / np.maximum(self.times[i + 1] - self.times[i], 1e-6)
        share = share[:, None]
        before, after = self.rows[i], self.rows[i + 1]
        poses = before * (1 - share) + after * share
        for part in _QUATERNIONS:
            start, end = before[:, part], after[:, part]
            nearer = np.where((start * end).sum(1, keepdims=True) > 0, end, -end)
            blend = start * (1 - share) + nearer * share
            poses[:, part] = blend / np.linalg.norm(blend, axis=1, keepdims=True)
        return poses


@cache
def motions() -> dict[str, Motion]:
    """The motion of each action. Raises ImportError without pybullet, whose files they are."""
    import pybullet_data

    folder = Path(pybullet_data.getDataPath()) / "data" / "motions"
    return {
        action: Motion(folder / f"humanoid3d_{action}.txt", action in _PERIODIC)
        for action in ACTIONS
    }


def skeletons(poses: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Joint -> (rotations [F, 3, 3], places [F, 3] in metres) of poses [F, 44].

    x is forward, y up, z to the right of an upright figure. The root stays over the origin: only
    its height is kept, as if a camera followed.
    """
    root = np.zeros((len(poses), 3))
    root[:, 1] = poses[:, 2]
    frames = {"root": (_rotations(poses[:, 4:8]), root)}
    column = 8
    for joint, (parent, offset) in JOINTS.items():
        rotation, place = frames[parent]
        if _has_angle(joint):
            half = poses[:, column] / 2
            zero = np.zeros_like(half)
            turn = _rotations(np.stack([np.cos(half), zero, zero, np.sin(half)], 1))
            column += 1
        else:
            turn = _rotations(poses[:, column : column + 4])
            column += 4
        frames[joint] = (rotation @ turn, place + rotation @ (np.array(offset) * SCALE))
    return frames


def _rotations(q: np.ndarray) -> np.ndarray:
    """Unit quaternions [F, 4], w x y z -> matrices [F, 3, 3]."""
    w, x, y, z = q.T
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, -1) for row in rows], -2)
