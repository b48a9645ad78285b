"""What is random in a clip, and has a name: clothes, hair, skin, place, light and view.

Everything is drawn from (seed, index) alone. What is drawn decides the pixels (renderer.py) and
the words (captions.py), so every clip comes with a caption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .motions import ACTIONS

COLOURS = {  # sRGB, 0..255
    "red": (200, 40, 40),
    "orange": (232, 126, 34),
    "yellow": (240, 205, 60),
    "green": (46, 140, 70),
    "turquoise": (50, 180, 175),
    "blue": (45, 90, 195),
    "navy": (30, 40, 85),
    "purple": (125, 65, 165),
    "pink": (235, 130, 170),
    "brown": (115, 75, 45),
    "grey": (130, 130, 135),
    "black": (35, 35, 38),
    "white": (238, 238, 235),
    "beige": (215, 195, 160),
}
HAIR = {
    "black": (32, 28, 27),
    "brown": (92, 58, 34),
    "blond": (218, 178, 98),
    "red": (165, 70, 32),
    "grey": (168, 168, 168),
}
SKIN = {
    "light": (238, 196, 170),
    "tan": (205, 150, 110),
    "brown": (145, 95, 65),
    "dark": (88, 58, 42),
}
SHOES = ("black", "white", "brown", "red", "blue")
WALLS = {
    "white": (228, 226, 220),
    "beige": (214, 200, 172),
    "blue": (150, 180, 210),
    "green": (160, 190, 160),
    "yellow": (235, 215, 150),
    "pink": (225, 180, 185),
    "grey": (165, 168, 172),
    "red": (165, 85, 75),
}
CARPETS = ("grey", "brown", "beige", "blue", "red", "green")
PLACES = {"wood": 0.3, "tiles": 0.2, "carpet": 0.2, "lawn": 0.3}  # and how often they come
LIGHTS = {  # tint, and how much of the light comes from everywhere
    "daylight": ((1.0, 0.98, 0.94), 0.42),
    "warm light": ((1.05, 0.95, 0.82), 0.42),
    "cool light": ((0.90, 0.97, 1.06), 0.42),
    "dim light": ((0.76, 0.74, 0.74), 0.30),
}


@dataclass(frozen=True)
class Scene:
    """Everything about a clip: what its caption may tell, then what it does not.

    stripes   the other colour of a striped top; None: it is plain
    wall      of a room; empty on a lawn
    carpet    its colour; empty where there is none
    yaw       degrees to the right that the camera stands; a caption tells only the side
    mirrored  whether left and right of the motion are exchanged, so that it goes the other way
    speed     how much faster than recorded
    phase     where in the motion the clip begins, 0..1
    shift     where textures begin
    """

    action: str
    hair: str
    skin: str
    top: str
    top_colour: str
    stripes: str | None
    bottom: str
    bottom_colour: str
    shoes: str
    place: str
    wall: str
    carpet: str
    light: str
    yaw: float
    elevation: float
    distance: float
    light_side: float
    mirrored: bool
    speed: float
    phase: float
    shift: tuple[float, float]


def is_held_out(top_colour: str, bottom_colour: str) -> bool:
    """Whether training never sees these two colours together: a seventh of all pairs."""
    names = list(COLOURS)
    return (names.index(top_colour) + 3 * names.index(bottom_colour)) % 7 == 3


def draw_scene(seed: int, index: int, held_out: bool = False) -> Scene:
    """Scene `index` of a seed; its action is ACTIONS[index % 15].

    held_out: top and bottom have two colours that training never sees together, for the judges
    """
    rng = np.random.default_rng((seed, index))

    def pick(names) -> str:
        return str(rng.choice(list(names)))

    top_colour, bottom_colour = pick(COLOURS), pick(COLOURS)
    while is_held_out(top_colour, bottom_colour) != held_out:
        top_colour, bottom_colour = pick(COLOURS), pick(COLOURS)
    place = str(rng.choice(list(PLACES), p=list(PLACES.values())))
    outdoors = place == "lawn"
    stripes = pick(name for name in ("white", "black", "grey") if name != top_colour)
    return Scene(
        action=ACTIONS[index % len(ACTIONS)],
        hair=pick(HAIR),
        skin=pick(SKIN),
        top=pick(("sweater", "t-shirt")),
        top_colour=top_colour,
        stripes=stripes if rng.uniform() < 0.15 else None,
        bottom="shorts" if rng.uniform() < 0.35 else "trousers",
        bottom_colour=bottom_colour,
        shoes=pick(SHOES),
        place=place,
        wall="" if outdoors else pick(WALLS),
        carpet=pick(CARPETS) if place == "carpet" else "",
        light="daylight" if outdoors else pick(LIGHTS),
        yaw=rng.uniform(-35, 35),
        elevation=rng.uniform(3, 18),
        distance=rng.uniform(3.1, 3.5),
        light_side=rng.uniform(-1, 1),
        mirrored=bool(rng.uniform() < 0.5),
        speed=rng.uniform(0.85, 1.15),
        phase=rng.uniform(),
        shift=(rng.uniform(), rng.uniform()),
    )
