"""A dressed figure of round cones: where they are in a pose, and what colours they have.

A round cone is the hull of two spheres. A part of the figure is one of them between two joints.
"""

from __future__ import annotations

import numpy as np

from .motions import SCALE, skeletons
from .scenes import COLOURS, HAIR, SKIN, Scene

# part: (joint a, place in its frame, radius; joint b, place, radius), in units of SCALE metres
PARTS = {
    "waist": ("root", (0, 0.20, 0), 0.36, "chest", (0, 0.10, 0), 0.37),
    "breast": ("chest", (-0.02, 0.15, 0), 0.38, "chest", (-0.04, 0.74, 0), 0.34),
    "neck": ("chest", (0, 0.85, 0), 0.17, "neck", (0.03, 0.45, 0), 0.15),
    "head": ("neck", (0.08, 0.54, 0), 0.26, "neck", (0.03, 0.78, 0), 0.33),
    "hair": ("neck", (-0.10, 0.66, 0), 0.30, "neck", (-0.03, 0.88, 0), 0.32),
}
for _side, _sign in (("right", 1), ("left", -1)):
    _hip, _knee, _ankle = f"{_side}_hip", f"{_side}_knee", f"{_side}_ankle"
    _shoulder, _elbow = f"{_side}_shoulder", f"{_side}_elbow"
    _low, _high = (0, 0.14, 0.17 * _sign), (-0.04, 0.78, 0.33 * _sign)
    _collar = (-0.04, 0.86, 0.16 * _sign)
    PARTS |= {
        f"torso_{_side}": ("root", _low, 0.34, "chest", _high, 0.34),
        f"yoke_{_side}": ("chest", _collar, 0.27, _shoulder, (0, -0.02, 0), 0.23),
        f"hip_{_side}": ("root", (0, 0.04, 0.16 * _sign), 0.35, _hip, (0, -0.15, 0), 0.31),
        f"thigh_{_side}": (_hip, (0, -0.05, 0), 0.31, _knee, (0, 0, 0), 0.215),
        f"shin_{_side}": (_knee, (0, 0, 0), 0.215, _ankle, (0, 0, 0), 0.145),
        f"foot_{_side}": (_ankle, (-0.08, -0.05, 0), 0.16, _ankle, (0.46, -0.10, 0), 0.125),
        f"upper_{_side}": (_shoulder, (0, 0, 0), 0.205, _elbow, (0, 0, 0), 0.155),
        f"fore_{_side}": (_elbow, (0, 0, 0), 0.155, _elbow, (0, -1.0, 0), 0.115),
        f"hand_{_side}": (_elbow, (0, -1.02, 0), 0.13, _elbow, (0, -1.26, 0), 0.11),
    }
RADII = np.array([(part[2], part[5]) for part in PARTS.values()]) * SCALE  # [P, 2] in metres
_STRIPES = 7.0  # half periods along the torso


def cones(poses: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """The ends [F, P, 2, 3] in metres of all parts' cones in poses [F, 44]; radii are `RADII`.

    mirrored: bool [F], whether left and right are exchanged. A pose that reaches below the floor,
    as recorded ones do by a centimetre or two, is lifted onto it.
    """
    frames = skeletons(poses)

    def place(joint: str, offset: tuple[float, float, float]) -> np.ndarray:
        rotation, origin = frames[joint]
        return origin + rotation @ (np.array(offset) * SCALE)

    ends = np.stack(
        [np.stack([place(ja, a), place(jb, b)], 1) for ja, a, _, jb, b, _ in PARTS.values()], 1
    )
    below = (ends[..., 1] - RADII).min((1, 2))
    ends[..., 1] -= np.minimum(below, 0)[:, None, None]
    ends[mirrored, ..., 0] *= -1
    return ends


def colouring(scene: Scene) -> np.ndarray:
    """How each part is coloured: [P, 8] = colour a, colour b (RGB 0..1), change, stripes.

    A point at `along` (0..1 from a cone's first end to its second) has colour a up to `change`, and
    colour b beyond it. With stripes > 0, every second of so many stripes of colour b is the colour
    that the scene names.
    """
    rgb = {
        "top": COLOURS[scene.top_colour],
        "bottom": COLOURS[scene.bottom_colour],
        "shoes": COLOURS[scene.shoes],
        "hair": HAIR[scene.hair],
        "skin": SKIN[scene.skin],
    }
    sleeves, shorts = scene.top == "sweater", scene.bottom == "shorts"
    rows = []
    for name in PARTS:
        part = name.partition("_")[0]
        change, stripes = 2.0, 0.0
        if part in ("head", "hand", "neck"):
            pair = ("skin", "skin")
        elif part == "hair":
            pair = ("hair", "hair")
        elif part == "foot":
            pair = ("shoes", "shoes")
        elif part == "hip":
            pair = ("bottom", "bottom")
        elif part == "thigh":
            pair, change = ("bottom", "skin"), 0.75 if shorts else 2.0
        elif part == "shin":
            pair = ("skin", "skin") if shorts else ("bottom", "bottom")
        elif part == "fore":
            pair, change = ("top", "skin"), 0.93 if sleeves else -1.0
        elif part == "upper":
            pair, change = ("top", "skin"), 2.0 if sleeves else 0.55
        elif part in ("torso", "waist"):
            pair, change = ("bottom", "top"), 0.06
        else:
            pair = ("top", "top")
        if part in ("torso", "breast", "waist") and scene.stripes is not None:
            stripes = _STRIPES if part == "torso" else _STRIPES / 2
        rows.append([*rgb[pair[0]], *rgb[pair[1]], change * 255, stripes * 255])
    return np.array(rows, np.float64) / 255
