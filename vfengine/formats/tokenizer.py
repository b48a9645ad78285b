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


class MissingPackage(ImportError):
    """A package of an extra is not installed."""


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

    @property
    def room(self) -> int:
        """How many tokens of a text are read."""
        return self.length - 2  # without start and end

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Raises TypeError for what is no list of texts."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"tokenize: expected a list of texts, got {texts!r}")
        start, end, padding = self.ids
        out = torch.full((len(texts), self.length), padding, dtype=torch.int64, device="cpu")
        for row, text in zip(out, texts, strict=True):
            ids = [start, *self.tokens(text)[: self.length - 2], end]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64, device="cpu")
        return out

    def unknown(self, text: str) -> list[str]:
        """The words that it does not know: none, for it knows every byte."""
        return []

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
    """The CLIPTokenizer in a folder, as transformers 5 reads it.

    tokenizer.json, or vocab.json and merges.txt, hold the vocabulary. Two more files, which may be
    missing, say which tokens are special: tokenizer_config.json and special_tokens_map.json.

    Raises FileNotFoundError, naming them, for missing files; ValueError for another tokenizer.
    """
    config, whole = (
        _optional(folder / f"{name}.json") for name in ("tokenizer_config", "tokenizer")
    )
    vocabulary, merges = _stored(folder, whole)
    if (kind := config.get("tokenizer_class", "CLIPTokenizer")) not in _CLASSES:
        raise ValueError(f"{folder}: tokenizer_class = {json.dumps(kind)} is not CLIPTokenizer")
    length = config.get("model_max_length", 77)
    if type(length) is not int or not 3 <= length <= 2**16:
        raise ValueError(f"{folder}: model_max_length = {length} is no number of tokens")
    try:
        named, special = _special_tokens(folder, config, whole)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: special tokens of another form ({error!r})") from error
    for token in special:
        if token["content"] not in vocabulary:
            raise ValueError(
                f"{folder}: special token {token['content']!r} is not in its vocabulary"
            )
    library = _library()
    try:
        encoder = _encoder(library, vocabulary, merges, named["unk_token"])
        encoder.add_tokens([library.AddedToken(**token) for token in special])
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{folder}: its tokenizer cannot be used ({error})") from error
    rules, split = library.normalizers, library.pre_tokenizers
    spaces = rules.Replace(library.Regex(r"\s+"), " ")
    encoder.normalizer = rules.Sequence([rules.NFC(), spaces, rules.Lowercase()])
    pattern = library.Regex(rf"<\|startoftext\|>|<\|endoftext\|>|{_WORDS}")
    by_word = split.Split(pattern, behavior="removed", invert=True)
    # ByteLevel splits words once more, by GPT-2's pattern
    encoder.pre_tokenizer = split.Sequence([by_word, split.ByteLevel(add_prefix_space=False)])
    ids = tuple(vocabulary[named[name]] for name in ("bos_token", "eos_token", "pad_token"))
    return ClipTokenizer(encoder, ids, length)


_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
_NAMED = {"bos_token": "<|startoftext|>"}
_NAMED |= dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word")  # of a special token in a file


def _special_tokens(
    folder: Path, config: Mapping[str, Any], whole: Mapping[str, Any]
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The special tokens that have names, by name, and all of them, as fields of an AddedToken.

    They are found in a text before its words are. special_tokens_map.json has the last word, but
    for a tokenizer_config.json that lists all tokens: the padding of Stable Diffusion 2 is "!" in
    the one and <|endoftext|> in the other.
    """
    listed = config.get("added_tokens_decoder")
    if listed is None:
        entries = {**config, **_optional(folder / "special_tokens_map.json")}
        listed = {token["id"]: token for token in whole.get("added_tokens", ())}
    else:
        entries = config
    known: dict[str, dict[str, Any]] = {}

    def add(value: Any) -> str:
        """Whoever names a token first gives it its flags."""
        flags = value if isinstance(value, dict) else {}
        content = flags.get("content") if isinstance(value, dict) else value
        if not isinstance(content, str):
            raise ValueError(f"{folder}: {value!r} is no special token")
        flags = {flag: flags[flag] for flag in _FLAGS if flag in flags}
        known.setdefault(content, {"content": content, "special": True, **flags})
        return content

    for number in sorted(listed, key=int):
        add(listed[number])
    named = {name: add(entries.get(name, default)) for name, default in _NAMED.items()}
    for name in ("extra_special_tokens", "additional_special_tokens"):
        for value in entries.get(name) or ():
            add(value)
    return named, list(known.values())


def _optional(file: Path) -> dict[str, Any]:
    """The values of a JSON file, none where it is missing."""
    return read_json(file) if file.is_file() else {}


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


def _stored(folder: Path, whole: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges in a folder; whole: the values of its tokenizer.json, if it has one."""
    words, pairs = folder / "vocab.json", folder / "merges.txt"
    if whole:
        model = whole.get("model")
        model = model if isinstance(model, dict) else {}
        vocabulary, merges = model.get("vocab"), model.get("merges")
    elif words.is_file() and pairs.is_file():
        lines = pairs.read_text(encoding="utf-8").splitlines()
        vocabulary = read_json(words)
        merges = [line for line in lines if line and not line.startswith("#version")]
    else:
        raise FileNotFoundError(
            f"no tokenizer in {folder}: neither vocab.json and merges.txt nor tokenizer.json"
        )
    merges = merges if isinstance(merges, list) else []
    merges = [pair.split() if isinstance(pair, str) else pair for pair in merges]
    fits = isinstance(vocabulary, dict) and all(type(n) is int for n in vocabulary.values())
    if not fits or not merges or not all(map(_is_pair, merges)):
        raise ValueError(f"{folder}: its tokenizer has no vocabulary of byte pairs")
    return vocabulary, [tuple(pair) for pair in merges]


def _is_pair(value: object) -> bool:
    texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return texts and len(value) == 2


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
        raise MissingPackage(
            f"prompts need the package {error.name}: pip install 'vfengine[text]'"
        ) from error
    return tokenizers
