"""What a text encoder understands: python benchmarks/judge_text.py runs/text/checkpoint

1. How near its token states are to its teacher's, through a linear map that is fitted to other
   sentences, on sentences of which it saw none: mean cosine, of words and of whole sentences.
2. Whether a word's state is nearest to that of its plain word, in place of which it stands in a
   sentence. Thesaurus: words that training said the meaning of. Others: what it makes of words that
   no caption has, which the teacher alone could tell it.
3. Whether a linear probe reads a scene from the caption's states: from the garment's own row, and
   from the last row, which is padding. 2,000 captions to fit, 500 others to test; and those with
   pairs of colours that training never sees.

Needs the extra [train].
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vfengine.formats.parts import read_text_encoder
from vfengine.formats.word_tokenizer import WordTokenizer
from vfengine.models import TextEncoder
from vfengine.training.mocap import draw_scene
from vfengine.training.mocap.captions import caption
from vfengine.training.teacher import Teacher, teacher_folder
from vfengine.training.text import Sentences, plain
from vfengine.training.thesaurus import PLAIN

SEED = 10**9  # of sentences and scenes that no training draws
COLOURS = "red orange yellow green turquoise blue navy purple pink brown grey black white beige"
# a sentence with a gap, the plain words for it, and others with the plain word that they mean
CASES = (
    ("a person in a {} sweater and white shorts kicking", COLOURS, {}),
    ("someone in {} trousers on a lawn", COLOURS, {}),
    (
        "a person in a red {} kicking in a room",
        "sweater tshirt trousers shorts",
        {"jersey": "sweater", "turtleneck": "sweater", "polo": "tshirt", "tights": "trousers"},
    ),
    (
        "a person in a blue sweater {} on a lawn",
        "running walking jumping kicking punching crawling spinning dancing rolling",
        {
            **dict.fromkeys(("dashing", "racing", "trotting", "galloping"), "running"),
            **dict.fromkeys(("wandering", "marching", "striding", "hiking"), "walking"),
            **dict.fromkeys(("bouncing", "skipping"), "jumping"),
            **dict.fromkeys(("hitting", "jabbing", "striking"), "punching"),
            **dict.fromkeys(("rotating", "twisting"), "spinning"),
            **dict.fromkeys(("waltzing", "swaying"), "dancing"),
            **dict.fromkeys(("slithering", "creeping"), "crawling"),
            "tumbling": "rolling",
        },
    ),
    (
        "a person kicking on a {}",
        "lawn carpet floor",
        {"pasture": "lawn", "mat": "carpet", "garden": "lawn"},
    ),
)
PAIRS = (
    *(("crimson", "red"), ("ruby", "red"), ("red", "blue"), ("jumper", "sweater")),
    *(("jersey", "sweater"), ("sweater", "shorts"), ("sprinting", "running")),
    *(("dashing", "running"), ("running", "walking"), ("running", "kicking")),
)
SENTENCE = "a person in a {colour} {garment} {action} on a lawn"
_CHUNK = 64


class Student:
    """The text encoder in a folder, in fp32, and its tokenizer."""

    def __init__(self, folder: Path):
        config, state, text = read_text_encoder(folder)
        self.encoder = TextEncoder(config).eval()
        self.encoder.load_state_dict(state)
        self.tokenizer = WordTokenizer(text, config.max_length)

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), L, D]"""
        return torch.cat([self.encoder(ids) for ids in self.tokenizer(texts).split(_CHUNK)])

    def state_of(self, sentence: str, word: str) -> Tensor:
        """[D], of a word of the sentence."""
        return self.states([sentence])[0][self.tokenizer.tokens(sentence).index(word)]


def fitted(x: Tensor, y: Tensor, ridge: float = 3.0) -> Tensor:
    """The affine map [D + 1, E] with the least squares from x [n, D] to y [n, E]."""
    x = with_one(x)
    eye = ridge * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.T @ x + eye, x.T @ y.double())


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)


def print_similarity(student: Student, teacher: Teacher) -> None:
    words = student.tokenizer.vocabulary[2:]
    drawn = Sentences(words, student.tokenizer).draw(900, np.random.default_rng(SEED))
    sentences = [sentence.words for sentence in drawn]
    ours = student.states([" ".join(words) for words in sentences])
    theirs = teacher.states(plain(sentences), ours.shape[1])
    is_word = (
        torch.arange(ours.shape[1]) < torch.tensor([len(words) for words in sentences])[:, None]
    )
    for name, rows in (("words", is_word), ("sentences", ~is_word)):
        fit, test = rows.clone(), rows.clone()
        fit[600:], test[:600] = False, False
        matrix = fitted(ours[fit], theirs[fit])
        cosine = F.cosine_similarity(with_one(ours[test]) @ matrix, theirs[test].double(), dim=-1)
        print(f"cosine to the teacher, {name}: {cosine.mean():.3f}")


def print_nearest(student: Student) -> None:
    for sentence, plain_words, others in CASES:
        names = plain_words.split()
        states = torch.stack([student.state_of(sentence.format(n), n) for n in names])
        centre = states.mean(0)
        own = {word: meant for word, meant in PLAIN.items() if meant in names}
        for kind, meanings in (("thesaurus", own), ("others", others)):
            wrong = []
            for word, meant in meanings.items():
                state = student.state_of(sentence.format(word), word) - centre
                nearest = names[int(F.cosine_similarity(states - centre, state[None]).argmax())]
                wrong += [f"{word} is taken for {nearest}"] if nearest != meant else []
            if meanings:
                right = len(meanings) - len(wrong)
                print(f"{sentence}: {kind} {right}/{len(meanings)}", *wrong, sep="; ")


def print_pairs(student: Student) -> None:
    usual = {"colour": "red", "garment": "sweater", "action": "running"}
    for words in PAIRS:
        slot = next(name for name, value in usual.items() if value in words)
        states = [student.state_of(SENTENCE.format(**usual | {slot: w}), w) for w in words]
        print(f"{' and '.join(words)}: {F.cosine_similarity(*states, dim=0):.2f}")


def print_probes(student: Student) -> None:
    scenes = [draw_scene(SEED, number) for number in range(2500)]
    scenes += [draw_scene(SEED, number, held_out=True) for number in range(500)]
    texts = [caption(scene) for scene in scenes]
    states = student.states(texts)
    tokens = [student.tokenizer.tokens(text) for text in texts]

    def rows(*words: str) -> Tensor:
        places = [next(i for i, w in enumerate(own) if w in words) for own in tokens]
        return states[torch.arange(len(states)), places]

    sources = {
        "top": rows("sweater", "tshirt"),
        "bottom": rows("trousers", "shorts"),
        "last row": states[:, -1],
    }
    for source, x in sources.items():
        for name in ("top_colour", "bottom_colour", "hair", "action", "place", "wall"):
            values = [getattr(scene, name) for scene in scenes]
            known = sorted(set(values))
            right = torch.tensor([known.index(value) for value in values])
            matrix = fitted(x[:2000], F.one_hot(right[:2000], len(known)))
            hits = ((with_one(x) @ matrix).argmax(1) == right).double()
            print(
                f"{name} from {source}: {hits[2000:2500].mean():.1%}, "
                f"unseen pairs {hits[2500:].mean():.1%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a checkpoint of --objective text")
    student = Student(parser.parse_args().folder)
    print_similarity(student, Teacher(teacher_folder()))
    print_nearest(student)
    print_pairs(student)
    print_probes(student)


if __name__ == "__main__":
    main()
