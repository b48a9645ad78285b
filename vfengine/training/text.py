"""Training of our own text encoder: its token states learn those of a larger sentence encoder.

    loss = mean over words of 1 - cos(head(student), teacher)
           + 1/4 of the same for the rows after the last word, which learn the sentence's state
           + 1/2 of the cross-entropy of what is read of the scene, mean over its attributes

Heads are linear layers that are thrown away (distillation of hidden states: Jiao et al. 2019,
TinyBERT, arXiv 1909.10351, eq. 8). The teacher reads plain words where the student reads others of
the same meaning (thesaurus.py). Sentences are paraphrases of rendered scenes, some with words of
the vocabulary in place of their own, and words side by side, so that all of them are learnt.

The teacher's states tell little of which colour belongs to which garment. The cross-entropy asks
for it. An attribute is read as a UNet will read it, by attention to the rows with a query of its
own. What a sentence does not tell stays as likely as it was.

Everything random in step k is drawn from (seed, k). A run that is resumed takes the steps, bit for
bit, of one that was never stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..formats.parts import read_text_encoder, save_text_encoder
from ..formats.word_tokenizer import WordTokenizer, word_tokenizer_json
from ..models.empty import new_weights
from ..models.text_encoder import TextEncoder, TextEncoderConfig
from .mocap import ACTIONS, Scene, draw_scene
from .mocap.captions import LABEL_PROMPTS, VIEWS, caption, paraphrase, view_of
from .mocap.scenes import CARPETS, COLOURS, HAIR, LIGHTS, PLACES, SHOES, SKIN, WALLS
from .options import TrainingOptions
from .report import StepReport
from .teacher import Teacher
from .thesaurus import OTHERS, PLAIN, SYNONYMS
from .updates import Updates

OWN = TextEncoderConfig(
    vocab_size=6000,
    max_length=40,
    width=256,
    num_layers=3,
    num_heads=4,
    mlp_width=512,
    causal=False,
    embedding_width=128,
)
_WEIGHTS = {"words": 1.0, "sentence": 0.25, "attributes": 0.5}
# What a caption may tell, and the values that it may have.
_ATTRIBUTES = {
    "action": tuple(ACTIONS),
    "hair": tuple(HAIR),
    "skin": tuple(SKIN),
    "top": ("sweater", "t-shirt"),
    "top_colour": tuple(COLOURS),
    "stripes": (None, "white", "black", "grey"),
    "bottom": ("trousers", "shorts"),
    "bottom_colour": tuple(COLOURS),
    "shoes": SHOES,
    "place": tuple(PLACES),
    "wall": ("", *WALLS),
    "carpet": ("", *CARPETS),
    "light": tuple(LIGHTS),
    "view": tuple(VIEWS),
}
_UNTOLD = -100  # of a sentence that is about no scene
_SAMPLED = 12_000  # paraphrases that show all words of their grammar
_AS_TEACHERS_WRITE = {"tshirt": "t-shirt", "tshirts": "t-shirts"}


def vocabulary(teacher: Teacher, size: int) -> list[str]:
    """`size` words: those of captions and the thesaurus, then the teacher's most frequent ones.

    Raises ValueError where they are too few or too many.
    """
    ours = dict.fromkeys([*_words_of_captions(), *SYNONYMS, *PLAIN, *OTHERS.split()])
    if len(ours) > size:
        raise ValueError(f"captions have {len(ours)} words, which do not fit into {size}")
    words = list(dict.fromkeys([*ours, *teacher.vocabulary()]))[:size]
    if len(words) < size:
        raise ValueError(f"expected a vocabulary of {size} words, found {len(words)}")
    return words


@cache
def _words_of_captions() -> tuple[str, ...]:
    cut = WordTokenizer(word_tokenizer_json(()), 1).words
    rng = np.random.default_rng(0)
    found = {word for text in LABEL_PROMPTS.values() for word in cut(text)}
    for index in range(_SAMPLED):
        found.update(cut(paraphrase(draw_scene(0, index), rng)))
    return tuple(sorted(found))


@dataclass(frozen=True)
class Sentence:
    """Known words, and the number of each attribute's value in the scene; none: of no scene."""

    words: list[str]
    attributes: list[int]


class Sentences:
    """Sentences of known words, drawn from a generator.

    words: of the vocabulary
    """

    def __init__(self, words: Sequence[str], tokenizer: WordTokenizer):
        self._words, self._tokenizer = np.array(words), tokenizer

    def draw(self, count: int, rng: np.random.Generator) -> list[Sentence]:
        return [self._sentence(rng) for _ in range(count)]

    def _sentence(self, rng: np.random.Generator) -> Sentence:
        """Most are captions, with synonyms; others have foreign words, or are those alone."""
        kind, unknown = rng.uniform(), [_UNTOLD] * len(_ATTRIBUTES)
        if kind < 0.02:
            return Sentence([], unknown)
        if kind < 0.12:
            return Sentence(list(map(str, rng.choice(self._words, rng.integers(1, 13)))), unknown)
        scene = draw_scene(int(rng.integers(2**31)), int(rng.integers(len(ACTIONS))))
        text = caption(scene) if kind > 0.6 else paraphrase(scene, rng)
        words, foreign = self._tokenizer.words(text), kind < 0.3
        for place, word in enumerate(words):
            if foreign and rng.uniform() < 0.2:
                words[place] = str(rng.choice(self._words))
            elif word in SYNONYMS and rng.uniform() < 0.3:
                words[place] = str(rng.choice(SYNONYMS[word]))
        return Sentence(words, unknown if foreign else _attributes_of(scene))


def _attributes_of(scene: Scene) -> list[int]:
    said = {**vars(scene), "view": view_of(scene)}
    return [values.index(said[name]) for name, values in _ATTRIBUTES.items()]


class Reader(nn.Module):
    """states [B, L, D] -> logits [B, values] of each attribute, by attention to the rows."""

    def __init__(self, width: int):
        super().__init__()
        self.scores = nn.Linear(width, len(_ATTRIBUTES))
        self.values = nn.Linear(width, sum(map(len, _ATTRIBUTES.values())))

    def forward(self, states: Tensor) -> list[Tensor]:
        weights = self.scores(states).float().softmax(1)  # [B, L, A]
        values = self.values(states).split([len(values) for values in _ATTRIBUTES.values()], -1)
        return [
            (weights[..., number, None] * logits).sum(1) for number, logits in enumerate(values)
        ]


class TextTraining:
    """Owns the text encoder, its head, averaged copies and the optimizer; `step` takes one step.

    device: where it trains; the teacher should be there too
    """

    def __init__(
        self,
        options: TrainingOptions,
        teacher: Teacher,
        device: torch.device | str = "cpu",
        config: TextEncoderConfig = OWN,
    ):
        self.options, self.teacher, self.config = options, teacher, config
        self.device, self.steps_done = torch.device(device), 0
        words = vocabulary(teacher, config.vocab_size - 2)
        self.tokenizer_json = word_tokenizer_json(words)
        self.tokenizer = WordTokenizer(self.tokenizer_json, config.max_length)
        self.sentences = Sentences(words, self.tokenizer)
        torch.manual_seed(options.seed)
        with new_weights():
            self.encoder = TextEncoder(config)
            self.head = nn.Linear(config.width, teacher.width)
            self.reader = Reader(config.width)
        with torch.no_grad():
            nn.init.normal_(self.encoder.embeddings.position_embedding.weight, std=0.3)
            rows = nn.init.zeros_(self.encoder.embeddings.token_embedding.weight)
            first = self._first_rows(words, rows.shape[1])
            rows[2:, : first.shape[1]] = first
        networks = {"text_encoder": self.encoder, "head": self.head, "reader": self.reader}
        self.updates = Updates({name: net.to(device) for name, net in networks.items()}, options)

    def step(self) -> StepReport:
        """One optimizer step on the sentences of this step."""
        k, options = self.steps_done, self.options
        rng = np.random.default_rng((options.seed, k))
        sentences = self.sentences.draw(options.batch_size, rng)
        losses = self.losses(sentences, rng)
        self.updates.apply(sum(_WEIGHTS[name] * loss for name, loss in losses.items()), k)
        self.steps_done += 1
        return StepReport({name: loss.detach() for name, loss in losses.items()}, step=k)

    def losses(self, sentences: Sequence[Sentence], rng: np.random.Generator) -> dict[str, Tensor]:
        """By the names of _WEIGHTS, means over the rows of all sentences that they are about."""
        words = [sentence.words for sentence in sentences]
        ids = self.tokenizer([" ".join(own) for own in words])
        is_word = (
            torch.arange(ids.shape[1], dtype=torch.int64, device="cpu")
            < torch.tensor([len(own) for own in words], dtype=torch.int64, device="cpu")[:, None]
        )
        hidden = torch.from_numpy(rng.uniform(size=ids.shape) < 0.02)  # words it will not know
        ids = torch.where(is_word & hidden, 1, ids).to(self.device)
        attributes = torch.tensor(
            [sentence.attributes for sentence in sentences], dtype=torch.int64, device="cpu"
        )
        target = self.teacher.states(plain(words), ids.shape[1])
        bf16 = self.options.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            states = self.encoder(ids)
            far = 1 - F.cosine_similarity(self.head(states).float(), target, dim=-1)
            read = self.reader(states)
        is_word = is_word.to(self.device)
        return {
            "words": _mean(far, is_word),
            "sentence": _mean(far, ~is_word),
            "attributes": _misread(read, attributes.to(self.device)),
        }

    def _first_rows(self, words: Sequence[str], width: int) -> Tensor:
        """Token rows to begin with: principal components of the teacher's states of lone words.

        As many as `width`, or as the teacher has.
        """
        states = torch.cat(
            [
                self.teacher.states(plain([[word] for word in words[start : start + 256]]), 1)
                for start in range(0, len(words), 256)
            ]
        )[:, 0].cpu()
        states = states - states.mean(0)
        directions = torch.linalg.eigh(states.T @ states).eigenvectors  # the last matter most
        rows = states @ directions[:, -width:]
        return rows / rows.std()

    def describe(self) -> str:
        """Words, network and device, in one line."""
        size = sum(p.numel() for p in self.encoder.parameters())
        return (
            f"{self.config.vocab_size} words; text encoder {size / 1e6:.2f} M parameters; "
            f"{self.options.precision} on {self.device}"
        )

    # -- on disk -------------------------------------------------------------------------------

    def warm_start(self, folder: Path) -> list[str]:
        """Start from the weights of a text encoder of this configuration and these words.

        Returns the names of the weights that keep their fresh initialisation: the heads'. Raises
        ValueError for another text encoder.
        """
        config, state, tokenizer_json = read_text_encoder(folder)
        if config != self.config or tokenizer_json != self.tokenizer_json:
            raise ValueError(f"{folder} holds a text encoder of another shape, or of other words")
        for network in (self.encoder, self.updates.averaged["text_encoder"]):
            network.load_state_dict(state)
        heads = {"head": self.head, "reader": self.reader}
        return [f"{name}.{key}" for name, head in heads.items() for key in head.state_dict()]

    def export(self, folder: Path) -> None:
        """Write the averaged weights as a folder that `--text-encoder` takes."""
        state = self.updates.averaged["text_encoder"].state_dict()
        save_text_encoder(folder, self.config, state, self.tokenizer_json)

    def save(self, file: Path, checkpoint: str = "") -> None:
        """Writes everything that a run continues from to one .safetensors file, atomically.

        checkpoint: names the checkpoint that was exported of this state
        """
        self.updates.save(file, self._identity(), self.steps_done, checkpoint)

    def restore(self, file: Path) -> None:
        """Continue from `save`. Raises ValueError for a damaged file or another training's."""
        self.steps_done = self.updates.restore(file, self._identity())

    def _identity(self) -> str:
        named = (self.config, self.tokenizer_json, self.teacher.width, self.options.seed)
        return hashlib.sha256(repr(named).encode()).hexdigest()[:16]


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """The mean of the values that count; 0 if none does."""
    return (values * where).sum() / where.sum().clamp(min=1)


def _misread(read: Sequence[Tensor], attributes: Tensor) -> Tensor:
    """Mean cross-entropy of what a `Reader` read for attributes int64 [B, A]."""
    told = attributes[:, 0] != _UNTOLD
    losses = [
        F.cross_entropy(
            logits.float(), attributes[:, number], ignore_index=_UNTOLD, reduction="none"
        )
        for number, logits in enumerate(read)
    ]
    return torch.stack([_mean(loss, told) for loss in losses]).mean()


def plain(sentences: Sequence[Sequence[str]]) -> list[list[str]]:
    """What the teacher reads for these words."""
    return [
        [_AS_TEACHERS_WRITE.get(word, word) for word in (PLAIN.get(w, w) for w in words)]
        for words in sentences
    ]
