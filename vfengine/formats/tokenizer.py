"""CLIP's tokenizer: texts to token ids, by byte-pair encoding (Radford et al. 2021).

There are two habits of preparing a text. transformers' CLIPTokenizer normalises Unicode (NFC).
open_clip mends broken Unicode (ftfy), undoes HTML's escapes, and finds words with `regex`, whose
Unicode is newer. Ids are those of the library that a folder was made for. The encoding itself is
Hugging Face's `tokenizers`.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .published import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MERGES = Path(__file__).parent.parent / "assets" / "clip" / "merges.txt"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_END_OF_WORD = "</w>"


@dataclass(frozen=True, eq=False)
class ClipTokenizer:
    """Texts to int64 [B, length]: start, the text's tokens, end, then padding; longer ones are cut.

    encoder: from a text, or from its words, to tokens
    words:   splits a text for the encoder; None: it takes the text
    ids:     of start, end and padding
    """

    encoder: Tokenizer
    ids: tuple[int, int, int]
    length: int
    words: Callable[[str], list[str]] | None = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Raises TypeError for what is no list of texts."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"tokenize: expected a list of texts, got {texts!r}")
        start, end, padding = self.ids
        out = torch.full((len(texts), self.length), padding, dtype=torch.int64)
        for row, text in zip(out, texts, strict=True):
            ids = [start, *self.tokens(text)[: self.length - 2], end]
            row[: len(ids)] = torch.tensor(ids)
        return out

    def tokens(self, text: str) -> list[int]:
        """All tokens of a text, without start and end."""
        words = text if self.words is None else self.words(text)
        split = self.words is not None
        return self.encoder.encode(words, is_pretokenized=split, add_special_tokens=False).ids


def open_clip_tokenizer(length: int = 77) -> ClipTokenizer:
    """The tokenizer of open_clip's ViT-H-14, whose vocabulary the package holds."""
    lines = MERGES.read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split()) for line in lines]
    start, end = "<start_of_text>", "<end_of_text>"
    words = [*(s + e for e in ("", _END_OF_WORD) for s in _byte_symbols()), *map("".join, merges)]
    vocabulary = {word: number for number, word in enumerate([*words, start, end])}
    library = _library()
    encoder = _encoder(library, vocabulary, merges, end)
    encoder.pre_tokenizer = library.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    encoder.add_tokens([library.AddedToken(word, normalized=False) for word in (start, end)])
    words = _OpenClipWords(f"{start}|{end}|{_WORDS}")
    return ClipTokenizer(encoder, (vocabulary[start], vocabulary[end], 0), length, words)


def read_tokenizer(folder: Path) -> ClipTokenizer:
    """The CLIPTokenizer in a folder: vocab.json and merges.txt, or tokenizer.json.

    Raises FileNotFoundError, naming them, for missing files; ValueError for another tokenizer.
    """
    vocabulary, merges = _stored(folder)
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    if (kind := settings.get("tokenizer_class", "CLIPTokenizer")) not in _CLASSES:
        raise ValueError(f"{folder}: tokenizer_class = {json.dumps(kind)} is not CLIPTokenizer")
    length = settings.get("model_max_length", 77)
    if type(length) is not int or not 3 <= length <= 2**16:
        raise ValueError(f"{folder}: model_max_length = {length} is no number of tokens")
    names = {
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    }
    words = {name: _word(settings.get(name), default) for name, default in names.items()}
    for name, word in words.items():
        if word not in vocabulary:
            raise ValueError(f"{folder}: {name} {word!r} is not in its vocabulary")
    library = _library()
    encoder = _encoder(library, vocabulary, merges, words["unk_token"])
    rules, split = library.normalizers, library.pre_tokenizers
    spaces = rules.Replace(library.Regex(r"\s+"), " ")
    encoder.normalizer = rules.Sequence([rules.NFC(), spaces, rules.Lowercase()])
    pattern = library.Regex(rf"<\|startoftext\|>|<\|endoftext\|>|{_WORDS}")
    by_word = split.Split(pattern, behavior="removed", invert=True)
    # ByteLevel splits words once more, by GPT-2's pattern
    encoder.pre_tokenizer = split.Sequence([by_word, split.ByteLevel(add_prefix_space=False)])
    for name, word in words.items():
        flags = settings.get(name) if isinstance(settings.get(name), dict) else {}
        flags = {flag: flags[flag] for flag in _FLAGS if flag in flags}
        encoder.add_special_tokens([library.AddedToken(word, special=True, **flags)])
    ids = tuple(vocabulary[words[name]] for name in ("bos_token", "eos_token", "pad_token"))
    return ClipTokenizer(encoder, ids, length)


_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word")  # of a special token in a file


def _encoder(
    library: Any, vocabulary: Mapping[str, int], merges: list[tuple[str, str]], unknown: str
) -> Tokenizer:
    """Words, as bytes, to tokens: pairs are merged in the order of `merges`."""
    return library.Tokenizer(
        library.models.BPE(
            vocab=dict(vocabulary),
            merges=merges,
            end_of_word_suffix=_END_OF_WORD,
            unk_token=unknown,
        )
    )


def _stored(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges in a folder."""
    words, pairs, whole = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    if words.is_file() and pairs.is_file():
        lines = pairs.read_text(encoding="utf-8").splitlines()
        vocabulary = read_json(words)
        merges = [line for line in lines if line and not line.startswith("#version")]
    elif whole.is_file():
        model = read_json(whole).get("model")
        model = model if isinstance(model, dict) else {}
        vocabulary, merges = model.get("vocab"), model.get("merges")
    else:
        raise FileNotFoundError(
            f"no tokenizer in {folder}: neither vocab.json and merges.txt nor tokenizer.json"
        )
    merges = [pair.split() if isinstance(pair, str) else pair for pair in merges or ()]
    fits = isinstance(vocabulary, dict) and all(type(n) is int for n in vocabulary.values())
    if not fits or not merges or not all(len(pair) == 2 for pair in merges):
        raise ValueError(f"{folder}: its tokenizer has no vocabulary of byte pairs")
    return vocabulary, [tuple(pair) for pair in merges]


def _word(value: Any, default: str) -> str:
    """A special token, which files write as a text or as an object with its content."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else default


def _byte_symbols() -> list[str]:
    """The character that stands for each byte: visible ones for themselves, others from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in visible] + [chr(256 + n) for n in range(256 - len(visible))]


class _OpenClipWords:
    """The words of a text as open_clip finds them; Python's notion of blanks and of lower case."""

    def __init__(self, pattern: str) -> None:
        import ftfy
        import regex

        self.mend, self.pattern = ftfy.fix_text, regex.compile(pattern, regex.IGNORECASE)

    def __call__(self, text: str) -> list[str]:
        text = html.unescape(html.unescape(self.mend(text)))
        return self.pattern.findall(" ".join(text.split()).lower())


def _library() -> Any:
    try:
        import ftfy  # noqa: F401
        import regex  # noqa: F401
        import tokenizers
    except ImportError as error:
        raise ImportError(
            f"prompts need the package {error.name}: pip install 'vfengine[text]'"
        ) from error
    return tokenizers
