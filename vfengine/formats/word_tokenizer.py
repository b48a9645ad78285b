"""The tokenizer of our own text encoder: a token a word.

A text is lower-cased and cut into words of letters, numbers, and commas; all else between them is
dropped. A hyphen cuts, so "red-haired" is two words; a "t-shirt", however it is written, is one, a
possessive 's is none. The vocabulary is a file that Hugging Face's `tokenizers` reads: a WordLevel
model with its rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Encoding, Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

PADDING, UNKNOWN = "[PAD]", "[UNK]"  # tokens 0 and 1
_T_SHIRT = Regex(r"\bt(ee)?[\s\-‐‑]?shirt")
_POSSESSIVE = Regex(r"['’]s\b")
_WORD = Regex(r"\p{L}+|\p{N}+|,")


def word_tokenizer_json(words: Iterable[str]) -> str:
    """The file of a `WordTokenizer` that knows these words: tokens from 2 on, in their order.

    Raises ValueError for a word that comes twice, or that no text would be cut into.
    """
    vocabulary = {PADDING: 0, UNKNOWN: 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(_POSSESSIVE, ""),
            normalizers.Replace(_T_SHIRT, "tshirt"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_WORD, behavior="removed", invert=True)
    for word in words:
        if word in vocabulary:
            raise ValueError(f"word_tokenizer_json: {word!r} comes twice")
        if _cut(tokenizer, word) != [word]:
            raise ValueError(f"word_tokenizer_json: {word!r} is no word, lower-cased and whole")
        vocabulary[word] = len(vocabulary)
    tokenizer.model = models.WordLevel(vocabulary, unk_token=UNKNOWN)
    return tokenizer.to_str()


def _cut(tokenizer: Tokenizer, text: str) -> list[str]:
    normal = tokenizer.normalizer.normalize_str(text)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


class WordTokenizer:
    """Texts to int64 [B, length]: a text's tokens, then padding; longer texts are cut.

    text:   of a tokenizer.json, such as `word_tokenizer_json` makes
    length: L, tokens of a text

    Raises ValueError for another file, or a length below 1.
    """

    def __init__(self, text: str, length: int) -> None:
        if type(length) is not int or length < 1:
            raise ValueError(f"WordTokenizer: length must be a positive int, got {length!r}")
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"WordTokenizer: not a tokenizer.json ({error})") from error
        found = [self._tokenizer.id_to_token(number) for number in (0, 1)]
        if not isinstance(self._tokenizer.model, models.WordLevel) or found != [PADDING, UNKNOWN]:
            raise ValueError(
                f"WordTokenizer: expected a WordLevel model whose tokens 0 and 1 are {PADDING} and "
                f"{UNKNOWN}, got a {type(self._tokenizer.model).__name__} with {found}"
            )
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.length = length

    @property
    def room(self) -> int:
        """How many tokens of a text are read."""
        return self.length

    @property
    def vocabulary(self) -> list[str]:
        """All tokens, in the order of their numbers."""
        tokens = self._tokenizer.get_vocab()
        return sorted(tokens, key=tokens.__getitem__)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Raises TypeError for what is no list of texts."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"tokenize: expected a list of texts, got {texts!r}")
        out = torch.zeros(len(texts), self.length, dtype=torch.int64, device="cpu")
        for row, text in zip(out, texts, strict=True):
            ids = self.encode(text).ids[: self.length]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64, device="cpu")
        return out

    def encode(self, text: str) -> Encoding:
        """All tokens of a text: their `ids`, `tokens`, and `offsets` in the text's characters."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def words(self, text: str) -> list[str]:
        """What a text is cut into, known or not."""
        return _cut(self._tokenizer, text)

    def tokens(self, text: str) -> list[str]:
        """All tokens of a text: words that are known, and [UNK] for others."""
        return self.encode(text).tokens

    def unknown(self, text: str) -> list[str]:
        """The words of a text that are not known, as they are written there, each once."""
        found = self.encode(text)
        spans = [span for token, span in zip(found.ids, found.offsets, strict=True) if token == 1]
        return list(dict.fromkeys(text[start:end] for start, end in spans))
