"""Captions and paraphrases: what they say, what they leave out, how long they are."""

import re
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest

from vfengine.training.mocap.captions import (
    ACTIONS,
    LABEL_PROMPTS,
    MAX_TOKENS,
    caption,
    count_tokens,
    paraphrase,
)

README = "a person with red hair in a blue sweater and white shorts doing a cartwheel on a lawn"


@dataclass(frozen=True)
class Scene:
    """What captions read of a scene."""

    action: str = "cartwheel"
    hair: str = "red"
    skin: str = "light"
    top: str = "sweater"
    top_colour: str = "blue"
    stripes: str | None = None
    bottom: str = "shorts"
    bottom_colour: str = "white"
    shoes: str = "black"
    place: str = "lawn"
    wall: str = ""
    carpet: str = ""
    light: str = "daylight"
    yaw: float = 0.0


LAWN = Scene()
ROOM = replace(LAWN, place="carpet", wall="yellow", carpet="green", light="dim light", yaw=20.0)
ROOM = replace(ROOM, top="t-shirt", top_colour="orange", stripes="black", action="getup_faceup")
WORDS = {  # at least one of which names the attribute
    "cartwheel": ("cartwheel", "cartwheels", "cartwheeling"),
    "blue": ("blue", "azure"),
    "white": ("white",),
    "red": ("red", "ginger", "auburn", "copper"),
}


def paraphrases(scene: Scene, count: int) -> list[str]:
    return [paraphrase(scene, np.random.default_rng((0, n))) for n in range(count)]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (LAWN, f"{README} under a blue sky"),
        (replace(LAWN, yaw=-13.0), f"{README} under a blue sky, seen from the left"),
        (
            ROOM,
            "a person with red hair in a striped orange t-shirt and white shorts getting up from "
            "lying on the back in a room with a yellow wall and a green carpet, dim light, seen "
            "from the right",
        ),
        (
            replace(ROOM, place="wood", carpet="", stripes=None, action="kick", yaw=-12.0),
            "a person with red hair in an orange t-shirt and white shorts kicking in a room with a "
            "yellow wall and a wooden floor, dim light",
        ),
    ],
)
def test_captions(scene, text):
    assert caption(scene) == text


@pytest.mark.parametrize("place", ["wood", "tiles", "carpet", "lawn"])
def test_no_sentence_is_too_long(place):
    carpet = "green" if place == "carpet" else ""
    base = replace(ROOM, place=place, carpet=carpet, wall="" if place == "lawn" else "yellow")
    for action, bottom in product(ACTIONS, ("trousers", "shorts")):
        scene = replace(base, action=action, bottom=bottom)
        for text in (caption(scene), *paraphrases(scene, 60)):
            assert count_tokens(text) <= MAX_TOKENS, text
            assert text == " ".join(text.split()) and " ," not in text and text[0] not in " ,", text


def test_paraphrases_are_many_and_drawn_from_the_generator():
    texts = paraphrases(LAWN, 500)
    assert len(set(texts)) > 400
    assert texts == paraphrases(LAWN, 500)


def test_paraphrases_leave_out_much_or_little():
    lengths = [len(words(text)) for text in paraphrases(replace(ROOM, action="kick"), 1000)]
    assert sum(length <= 8 for length in lengths) > 100  # "somebody getting up"
    assert sum(length >= 25 for length in lengths) > 100


def test_every_paraphrase_names_the_action():
    for text in paraphrases(LAWN, 500):
        assert set(WORDS["cartwheel"]) & set(words(text)), text


def test_nothing_false_is_told():
    """Of a scene without red, green or a room, no sentence tells any of them."""
    scene = replace(LAWN, hair="black", place="wood", wall="white", action="walk")
    false = "red crimson green yellow pink lawn grass tiles carpet striped trousers slacks kicking"
    for text in paraphrases(scene, 500):
        assert not set(false.split()) & set(words(text)), text


def test_what_is_told_is_told_of_the_right_thing():
    """The colour beside a garment is its own, also where a paraphrase reverses them."""
    tops = r"(?:azure|blue|cobalt blue|royal blue) (?:sweater|jumper|pullover|sweatshirt|top)"
    bottoms = r"(?:bright )?white (?:shorts|short pants)"
    texts = paraphrases(LAWN, 1000)
    assert sum(bool(re.search(tops, text)) for text in texts) > 300
    assert sum(bool(re.search(bottoms, text)) for text in texts) > 300
    for text in texts:
        assert not re.search(r"white (?:sweater|jumper|top)|(?:blue|azure) short", text), text


def test_short_sentences_people_write_are_among_them():
    kicks = set(paraphrases(replace(LAWN, action="kick"), 4000))
    assert {"a person kicking", "a person kicks", "kicking", "someone kicking"} <= kicks


def test_every_label_has_a_prompt():
    assert list(LABEL_PROMPTS) == list(ACTIONS) and len(ACTIONS) == 15
    assert LABEL_PROMPTS["kick"] == "a person kicking"
    assert len(set(LABEL_PROMPTS.values())) == 15
