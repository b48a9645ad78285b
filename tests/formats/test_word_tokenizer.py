"""The tokenizer of our own text encoder: words, padding, what is not known, what is refused."""

import json

import pytest
import torch

from vfengine.formats.word_tokenizer import WordTokenizer, word_tokenizer_json

WORDS = ["a", "person", "in", "red", "tshirt", "haired", "kicking", ",", "tshirts", "7"]
FILE = word_tokenizer_json(WORDS)


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer(FILE, 6)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a person kicking", "a person kicking"),
        ("A  PERSON\tkicking.", "a person kicking"),
        ("a red-haired person", "a red haired person"),
        ("in a T-shirt", "in a tshirt"),
        ("in a t shirt; in tee-shirts, a tshirt", "in a tshirt in tshirts , a tshirt"),
        ("7 person's t‑shirts", "7 person tshirts"),
        ("a panda, kicking", "a [UNK] , kicking"),
        ("persons", "[UNK]"),
        ("", ""),
        (" ...!", ""),
    ],
)
def test_tokens_of_a_text(text, tokens, tokenizer):
    assert tokenizer.tokens(text) == tokens.split()
    words = [word if word in WORDS else "[UNK]" for word in tokenizer.words(text)]
    assert words == tokens.split()


def test_ids_are_padded_and_cut(tokenizer):
    ids = tokenizer(["a red panda", "", "a " * 9])
    assert ids.dtype is torch.int64
    assert ids.tolist() == [[2, 5, 1, 0, 0, 0], [0] * 6, [2] * 6]
    assert tokenizer([]).shape == (0, 6)


def test_unknown_words_are_named_as_they_are_written(tokenizer):
    text = "A Panda, café-red; a Panda in Çédille, ﬁne"
    assert tokenizer.unknown(text) == ["Panda", "café", "Çédille", "ﬁne"]
    assert tokenizer.unknown("a person kicking") == []


def test_vocabulary_is_that_of_the_file(tokenizer):
    assert tokenizer.vocabulary == ["[PAD]", "[UNK]", *WORDS]


def test_settings_of_the_file_do_not_pad_or_cut(tokenizer):
    """`tokenizers` would do both as the file says; the length is the caller's."""
    values = json.loads(FILE)
    values["truncation"] = {"max_length": 2, "stride": 0, "direction": "Right"}
    values["truncation"]["strategy"] = "LongestFirst"
    again = WordTokenizer(json.dumps(values), 6)
    assert again(["a red person kicking"]).equal(tokenizer(["a red person kicking"]))


@pytest.mark.parametrize("word", ["a", "Red", "t-shirt", "two words", "", "[PAD]", "person's"])
def test_rejects_words(word):
    with pytest.raises(ValueError, match=r"comes twice|is no word"):
        word_tokenizer_json(["a", word])


@pytest.mark.parametrize("text", ["", "{}", "no JSON", FILE.replace('"[UNK]":1', '"[UNK]":99')])
def test_rejects_files(text):
    with pytest.raises(ValueError, match="WordTokenizer: "):
        WordTokenizer(text, 6)


def test_rejects_a_model_of_another_kind():
    from tokenizers import Tokenizer, models

    pieces = models.WordPiece({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")
    with pytest.raises(ValueError, match=r"expected a WordLevel model .* got a WordPiece"):
        WordTokenizer(Tokenizer(pieces).to_str(), 6)


def test_rejects_lengths_and_texts(tokenizer):
    for length in (0, 2.5, None):
        with pytest.raises(ValueError, match="length must be a positive int"):
            WordTokenizer(FILE, length)
    for texts in ("a person", [None]):
        with pytest.raises(TypeError, match="expected a list of texts"):
            tokenizer(texts)
