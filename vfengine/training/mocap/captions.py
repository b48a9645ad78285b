"""Words for a scene: its plain caption, and paraphrases of it.

    caption(scene)          "a person with red hair in a blue sweater and white shorts doing a
                            cartwheel on a lawn under a blue sky, seen from the right"
    paraphrase(scene, rng)  "on the grass, a ginger-haired woman wearing a jumper is cartwheeling"

Both come from one grammar. A caption takes the first entry of every table. A paraphrase takes that
entry half of the time, and leaves out a share of what there is to tell, up to everything but the
action. What is left out is not there; nothing false is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .scenes import Scene

MAX_TOKENS = 40  # of a caption or paraphrase; words and commas count

# What may be told of a scene, and how often a full paraphrase tells it. What matters least comes
# first. A caption tells what full paraphrases mostly do.
TOLD = {
    "shoes": 0.2,
    "skin": 0.3,
    "sky": 0.6,
    "light": 0.6,
    "view": 0.6,
    "stripes": 0.9,
    "hair": 0.9,
    "floor": 0.8,
    "wall": 0.8,
    "bottom": 0.95,
    "place": 0.95,
    "top": 0.95,
}
_FULL = 0.35  # share of paraphrases; the others leave out more, each another share
_COLOURED = 0.93  # share of garments whose colour is told with them

# action -> what somebody is doing; then what somebody does
ACTIONS = {
    "backflip": (
        ("doing a backflip", "performing a backflip", "backflipping", "doing a back flip")
        + ("doing a back somersault", "flipping backwards", "somersaulting backwards"),
        ("does a backflip", "performs a backflip", "flips backwards", "backflips"),
    ),
    "cartwheel": (
        ("doing a cartwheel", "cartwheeling", "performing a cartwheel", "turning a cartwheel")
        + ("doing cartwheels", "turning cartwheels"),
        ("does a cartwheel", "turns a cartwheel", "performs a cartwheel", "cartwheels"),
    ),
    "crawl": (
        ("crawling", "crawling on all fours", "crawling on hands and knees", "crawling along")
        + ("creeping on all fours", "moving on hands and knees"),
        ("crawls", "crawls on all fours", "crawls along", "creeps on hands and knees"),
    ),
    "dance_a": (
        ("dancing with a turn", "dancing", "dancing in a circle", "turning in a dance")
        + ("dancing and turning", "doing a turning dance"),
        ("dances with a turn", "dances", "dances in a circle", "dances and turns"),
    ),
    "dance_b": (
        ("dancing on the spot", "dancing", "dancing in place", "doing a dance on the spot")
        + ("dancing without a turn", "doing a dance in place"),
        ("dances on the spot", "dances", "dances in place", "does a dance in place"),
    ),
    "getup_facedown": (
        ("getting up from lying face down", "standing up from lying face down")
        + ("getting up from the belly", "rising from lying on the stomach", "getting up")
        + ("getting up from lying on the stomach", "pushing up from lying face down"),
        ("gets up from lying face down", "stands up from lying on the stomach")
        + ("rises from lying face down", "gets up from the belly", "gets up"),
    ),
    "getup_faceup": (
        ("getting up from lying on the back", "standing up from lying on the back")
        + ("getting up from the back", "rising from lying face up", "getting up")
        + ("getting up from lying face up", "sitting up and standing up"),
        ("gets up from lying on the back", "stands up from lying face up")
        + ("rises from lying on the back", "gets up from the back", "gets up"),
    ),
    "jump": (
        ("jumping", "jumping up", "leaping", "jumping into the air", "hopping", "doing a jump")
        + ("jumping forward", "leaping into the air"),
        ("jumps", "jumps up", "leaps", "jumps into the air", "does a jump", "hops"),
    ),
    "kick": (
        ("kicking", "throwing a kick", "doing a kick", "kicking the air", "kicking forward")
        + ("doing a front kick", "performing a kick"),
        ("kicks", "throws a kick", "does a kick", "kicks the air", "kicks forward"),
    ),
    "punch": (
        ("punching", "throwing a punch", "boxing", "doing a punch", "punching the air")
        + ("throwing punches", "punching forward"),
        ("punches", "throws a punch", "boxes", "punches the air", "does a punch"),
    ),
    "roll": (
        ("rolling over the floor", "rolling", "doing a roll", "doing a forward roll")
        + ("rolling on the ground", "rolling forward", "rolling over the ground"),
        ("rolls over the floor", "rolls", "does a roll", "does a forward roll")
        + ("rolls over the ground", "rolls forward"),
    ),
    "run": (
        ("running", "jogging", "running along", "sprinting", "running fast", "going for a run"),
        ("runs", "jogs", "runs along", "sprints", "runs fast", "goes for a run"),
    ),
    "spin": (
        ("spinning around", "spinning", "twirling", "whirling around", "turning around")
        + ("doing a pirouette", "twirling around", "doing a spin"),
        ("spins around", "spins", "twirls", "whirls around", "turns around", "does a spin"),
    ),
    "spinkick": (
        ("doing a spin kick", "doing a spinning kick", "performing a spin kick", "spin kicking")
        + ("doing a roundhouse kick", "throwing a spinning kick", "kicking with a spin"),
        ("does a spin kick", "does a spinning kick", "performs a spin kick")
        + ("throws a roundhouse kick", "kicks with a spin"),
    ),
    "walk": (
        ("walking", "strolling", "walking along", "taking a walk", "going for a walk")
        + ("taking a stroll", "walking forward", "pacing"),
        ("walks", "strolls", "walks along", "takes a walk", "goes for a walk", "paces"),
    ),
}
LABEL_PROMPTS = {action: f"a person {doing[0]}" for action, (doing, _) in ACTIONS.items()}

_PEOPLE = ("a person", "a man", "a woman", "an athlete", "a figure", "a human", "a character")
_PEOPLE += ("a dancer", "a boy", "a girl", "a guy", "a lady", "an actor")
_SOMEONE = (*_PEOPLE, "someone", "somebody")
_COLOURS = {
    "red": ("red", "crimson", "scarlet", "bright red"),
    "orange": ("orange", "tangerine", "bright orange"),
    "yellow": ("yellow", "lemon yellow", "golden yellow", "bright yellow"),
    "green": ("green", "emerald", "emerald green", "grass green"),
    "turquoise": ("turquoise", "teal", "aqua", "cyan"),
    "blue": ("blue", "azure", "cobalt blue", "royal blue"),
    "navy": ("navy", "navy blue", "dark blue", "midnight blue"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose", "light pink"),
    "brown": ("brown", "chocolate brown", "chocolate"),
    "grey": ("grey", "gray"),
    "black": ("black", "black", "jet black"),
    "white": ("white", "white", "bright white"),
    "beige": ("beige", "cream", "sandy", "light brown"),
}
_WALLS = {
    "white": ("white", "white", "bright"),
    "beige": ("beige", "cream"),
    "blue": ("blue", "light blue", "pale blue"),
    "green": ("green", "light green", "pale green"),
    "yellow": ("yellow", "light yellow", "pale yellow"),
    "pink": ("pink", "light pink", "rose"),
    "grey": ("grey", "gray"),
    "red": ("red", "brick red"),
}
_HAIR = {
    "black": ("black", "dark"),
    "brown": ("brown", "chestnut", "brunette"),
    "blond": ("blond", "blonde", "golden", "fair"),
    "red": ("red", "ginger", "auburn", "copper"),
    "grey": ("grey", "gray", "silver"),
}
_SKIN = {
    "light": ("light", "fair", "pale"),
    "tan": ("tan", "tanned"),
    "brown": ("brown",),
    "dark": ("dark",),
}
_TOPS = {
    "sweater": ("sweater", "jumper", "pullover", "long sleeved shirt", "sweatshirt", "top"),
    "t-shirt": ("t-shirt", "shirt", "tee", "short sleeved shirt", "top"),
}
_BOTTOMS = {
    "trousers": ("trousers", "pants", "long pants", "slacks", "long trousers"),
    "shorts": ("shorts", "shorts", "short pants"),
}
_SHOES = ("shoes", "sneakers", "trainers")
_FLOORS = {
    "wood": ("a wooden floor", "a wood floor", "a parquet floor", "parquet", "wooden boards"),
    "tiles": ("a tiled floor", "a tile floor", "tiles", "floor tiles"),
}
_CARPETS = ("carpet", "rug", "carpeted floor")
_LAWN = ("on a lawn", "on the grass", "on grass", "on the lawn", "on a green lawn", "on a meadow")
_LAWN += ("in a meadow", "in a field", "outdoors", "outside", "outside on the grass", "in a park")
_SKY = ("under a blue sky", "under the blue sky", "under a clear sky")
_LAWNS = ("lawn", "grass", "meadow", "field", "outdoors", "blue sky")
_INDOORS = ("in a room", "indoors", "inside", "inside a room")
_LIGHTS = {
    "daylight": ("daylight", "in daylight", "by day", "bright light", "natural light"),
    "warm light": ("warm light", "in warm light", "warm lighting", "warmly lit"),
    "cool light": ("cool light", "in cool light", "cool lighting", "cold light"),
    "dim light": ("dim light", "in dim light", "dim lighting", "dimly lit", "low light"),
}
VIEWS = {
    "left": ("seen from the left", "viewed from the left", "from the left", "left view"),
    "right": ("seen from the right", "viewed from the right", "from the right", "right view"),
    "front": ("seen from the front", "viewed from the front", "from the front", "front view"),
}
_SIDE = 12  # degrees of yaw from which on a view is one from the side
_FORMS = ("person first", "person first", "action first", "action first", "place first", "list")
_VIDEOS = ("a video of", "a clip of", "an animation of", "footage of")


def caption(scene: Scene) -> str:
    """The plain sentence of a scene: all that is usual, in the first words."""
    usual = {name for name, share in TOLD.items() if share > 0.5}
    if scene.place == "lawn":
        usual.discard("light")  # it is always the same
    if view_of(scene) == "front":
        usual.discard("view")
    return _Phrases(scene, usual, None).sentence()


def paraphrase(scene: Scene, rng: np.random.Generator) -> str:
    """A sentence about a scene, with synonyms and omissions drawn from `rng`."""
    keep = 1.0 if rng.uniform() < _FULL else rng.uniform()
    told = {name for name, share in TOLD.items() if rng.uniform() < keep * share}
    if view_of(scene) == "front" and rng.uniform() < 0.7:
        told.discard("view")
    text = _Phrases(scene, told, rng).sentence()
    for name in TOLD:
        if count_tokens(text) <= MAX_TOKENS:
            break
        told.discard(name)
        text = _Phrases(scene, told, rng).sentence()
    return text


def count_tokens(text: str) -> int:
    """Words and commas: at least as many as the tokenizer finds."""
    return len(re.findall(r"\w+|,", text))


def view_of(scene: Scene) -> str:
    """ "left", "right" or "front": from where the scene is seen."""
    return "front" if abs(scene.yaw) <= _SIDE else "left" if scene.yaw < 0 else "right"


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _joined(parts: Iterable[str], last: str = " and ") -> str:
    """ "x, y and z" of what is not empty."""
    parts = [part for part in parts if part]
    return last.join([*([", ".join(parts[:-1])] if parts[1:] else []), *parts[-1:]])


class _Phrases:
    """The parts of one sentence about a scene, each empty where it is not told.

    told: names of TOLD;  rng: None for the first words of all tables
    """

    def __init__(self, scene: Scene, told: set[str], rng: np.random.Generator | None) -> None:
        self.scene, self.told, self.rng = scene, told, rng

    def word(self, options: Sequence[str]) -> str:
        """The first, half of the time; else any of the others."""
        if self.rng is None or len(options) == 1 or self.rng.uniform() < 0.5:
            return options[0]
        return options[int(self.rng.integers(1, len(options)))]

    def chance(self, share: float) -> bool:
        return self.rng is not None and self.rng.uniform() < share

    def sentence(self) -> str:
        form = self.word(_FORMS)
        if form == "list":
            return self.list()
        person, place = self.person(clothed=form != "action first"), self.place()
        if self.chance(0.15) and not self.told & {"hair", "skin", "top", "bottom", "shoes"}:
            person = ""
        text = f"{person} {self.action(person)}".strip()
        text = f"{place}, {text}" if form == "place first" and place else f"{text} {place}".strip()
        clothes = self.clothes() if form == "action first" else ""
        text = ", ".join(part for part in (text, clothes, self.light(), self.view()) if part)
        if self.chance(0.05):
            text = f"{self.word(_VIDEOS)} {text}"
        if self.chance(0.05):  # as telegrams have it
            text = re.sub(r"\b(an?|the) ", "", text)
        return text

    def list(self) -> str:
        """Keywords side by side, as many people write prompts."""
        scene, told = self.scene, self.told
        hair = f"{self.word(_HAIR[scene.hair])} hair" if "hair" in told else ""
        skin = f"{self.word(_SKIN[scene.skin])} skin" if "skin" in told else ""
        place = "" if "place" not in told else self.word(_LAWNS)
        if scene.place != "lawn":
            place = f"{self.wall()} wall" if "wall" in told else ""
        floor = self.floor() if "floor" in told and scene.place != "lawn" else ""
        parts = [hair, skin, self.top(), self.bottom(), self.shoes(), place, floor]
        parts += [self.light(), self.view()]
        if self.rng is not None and self.chance(0.5):
            self.rng.shuffle(parts)
        what = re.sub("^(doing|performing|throwing|taking) ", "", self.action(""))
        who = self.word(("", "", "person", "man", "woman"))
        parts = [part for part in (f"{who} {what}".strip(), *parts) if part]
        return re.sub(r"\b(an?|the) ", "", ", ".join(parts))

    def action(self, person: str) -> str:
        doing, does = ACTIONS[self.scene.action]
        if not person or self.chance(0.5) or self.rng is None:
            return self.word(doing)
        return f"is {self.word(doing)}" if self.chance(0.5) else self.word(does)

    def person(self, clothed: bool) -> str:
        """ "a person with red hair and fair skin in a blue sweater and white shorts"."""
        scene, told = self.scene, self.told
        who = self.word(_PEOPLE if told & {"hair", "skin"} else _SOMEONE)
        hair = self.word(_HAIR[scene.hair]) if "hair" in told else ""
        skin = self.word(_SKIN[scene.skin]) if "skin" in told else ""
        if hair and self.chance(0.2):  # a red-haired person
            noun = who.partition(" ")[2]
            who, hair = _with_article(f"{hair}-haired {noun}"), ""
        body = _joined([hair and f"{hair} hair", skin and f"{skin} skin"])
        clothes = self.clothes() if clothed else ""
        if body and clothes and self.chance(0.1):
            return f"{who} {clothes} and with {body}"
        return " ".join(part for part in (who, body and f"with {body}", clothes) if part)

    def clothes(self) -> str:
        garments = [_article_of(self.top()), self.bottom()]
        if self.chance(0.15):
            garments.reverse()
        worn = _joined([*garments, self.shoes()], self.word((" and ", " with ")))
        return worn and f"{self.word(('in', 'wearing', 'dressed in', 'who wears'))} {worn}"

    def top(self) -> str:
        """ "striped blue sweater"."""
        scene, told = self.scene, self.told
        if "top" not in told:
            return ""
        colour = self.colour(scene.top_colour)
        top = " ".join(part for part in (colour, self.word(_TOPS[scene.top])) if part)
        if not scene.stripes or "stripes" not in told:
            return top
        if colour and self.chance(0.5):
            return f"{top} with {self.word(_COLOURS[scene.stripes])} stripes"
        return f"striped {top}"

    def bottom(self) -> str:
        scene, told = self.scene, self.told
        if "bottom" not in told:
            return ""
        return f"{self.colour(scene.bottom_colour)} {self.word(_BOTTOMS[scene.bottom])}".strip()

    def shoes(self) -> str:
        if "shoes" not in self.told:
            return ""
        return f"{self.colour(self.scene.shoes)} {self.word(_SHOES)}".strip()

    def colour(self, name: str) -> str:
        """Of a garment."""
        return "" if self.chance(1 - _COLOURED) else self.word(_COLOURS[name])

    def place(self) -> str:
        scene, told = self.scene, self.told
        if "place" not in told:
            return ""
        if scene.place == "lawn":
            return " ".join([self.word(_LAWN), *([self.word(_SKY)] if "sky" in told else [])])
        floor = self.floor() if "floor" in told else ""
        if "wall" not in told:
            options = (f"in a room with {floor}", f"on {floor}", f"inside on {floor}")
            return self.word(options if floor else _INDOORS)
        wall = self.wall()
        before = (f"in front of {_with_article(wall)} wall", f"against {_with_article(wall)} wall")
        inside = (f"in a room with {_with_article(wall)} wall", f"in a room with {wall} walls")
        inside += (f"in {_with_article(wall)} room",)
        if not floor:
            return self.word((*inside, *before))
        joined = tuple(
            f"{room} {link} {floor}"
            for room, link in zip(inside, ("and", "and", "with"), strict=True)
        )
        return self.word((*joined, *(f"on {floor} {wall}" for wall in before)))

    def wall(self) -> str:
        return self.word(_WALLS[self.scene.wall])

    def floor(self) -> str:
        """ "a wooden floor", of a room."""
        scene = self.scene
        if scene.place != "carpet":
            return self.word(_FLOORS[scene.place])
        colour = "" if self.chance(0.1) else self.word(_COLOURS[scene.carpet])
        return _with_article(f"{colour} {self.word(_CARPETS)}".strip())

    def light(self) -> str:
        return self.word(_LIGHTS[self.scene.light]) if "light" in self.told else ""

    def view(self) -> str:
        return self.word(VIEWS[view_of(self.scene)]) if "view" in self.told else ""


def _article_of(noun: str) -> str:
    return noun and _with_article(noun)
