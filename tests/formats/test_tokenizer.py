"""Token ids of both habits: open_clip's, and transformers' CLIPTokenizer from the same folder."""

import html
import importlib.util
import itertools
import json
from functools import cache
from pathlib import Path

import ftfy
import pytest
import regex
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vfengine.formats.tokenizer import MERGES, open_clip_tokenizer, read_tokenizer

# What open_clip 3.3.0's `tokenize` made of hard texts, zeros left out (recorded once).
RECORDED = json.loads(Path(__file__).with_name("open_clip_ids.json").read_text(encoding="utf-8"))
HARD = list("ab'sStT <>|_&;#1²Ⅷ½éÀßſKİ🐼中ｶﾞ.,!?-") + ["\u0301", "\u200d", "\u2003", "\x85", "\x1f"]
WORDS = ["<start_of_text>", "<END_OF_TEXT>", "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>"]
WORDS += ["&amp;lt;", "&#39;", "don't", "I'VE", "bamboo", "\n", "ﬁne", "Ã©", "日本語"]
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from(HARD), max_size=40).map("".join),
    st.lists(st.sampled_from(WORDS + HARD), max_size=12).map(" ".join),
    st.text(min_size=80, max_size=200),
)
tested = settings(max_examples=300, deadline=None)


# -- open_clip -------------------------------------------------------------------------------------


def symbols() -> tuple[list[str], list[int]]:
    shown = [b for b in range(256) if chr(b).isprintable() and b not in (32, 173)]
    hidden = [b for b in range(256) if b not in shown]
    return [*map(chr, shown), *(chr(256 + n) for n in range(len(hidden)))], shown + hidden


@cache
def restated():
    """The published algorithm, pair by pair."""
    pairs = [tuple(line.split()) for line in MERGES.read_text("utf-8").splitlines()[1:]]
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    letters, order = symbols()
    of_byte = dict(zip(order, letters, strict=True))
    names = [*letters, *(s + "</w>" for s in letters), *("".join(pair) for pair in pairs)]
    numbers = {name: n for n, name in enumerate([*names, "<start_of_text>", "<end_of_text>"])}
    words = r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    pattern = regex.compile("<start_of_text>|<end_of_text>" + words, regex.IGNORECASE)

    def ids(text: str) -> list[int]:
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        found = []
        for word in pattern.findall(" ".join(text.split()).strip().lower()):
            if word in ("<start_of_text>", "<end_of_text>"):
                found.append(numbers[word])
                continue
            parts = [of_byte[b] for b in word.encode("utf-8")]
            parts[-1] += "</w>"
            while len(parts) > 1:
                best = min(itertools.pairwise(parts), key=lambda p: ranks.get(p, 10**9))
                if best not in ranks:
                    break
                joined, at = [], 0
                while at < len(parts):
                    both = tuple(parts[at : at + 2]) == best
                    joined.append("".join(parts[at : at + 1 + both]))
                    at += 1 + both
                parts = joined
            found += [numbers[part] for part in parts]
        return found

    def tokenize(text: str) -> torch.Tensor:
        row = [49406, *ids(text), 49407]
        row = row if len(row) <= 77 else [*row[:76], 49407]
        return torch.tensor([row + [0] * (77 - len(row))])

    return tokenize


@cache
def ours():
    return open_clip_tokenizer()


@tested
@given(TEXTS)
@example("")
@example("a panda eats bamboo")
@example("word " * 100)
def test_open_clips_ids(text):
    assert torch.equal(ours()([text]), restated()(text))


@pytest.mark.parametrize("text", RECORDED)
def test_open_clips_recorded_ids(text):
    row = torch.tensor(RECORDED[text] + [0] * (77 - len(RECORDED[text])))
    assert torch.equal(ours()([text])[0], row)


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is None, reason="no open-clip-torch")
def test_open_clips_own_code():
    folder = Path(importlib.util.find_spec("open_clip").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", folder / "tokenizer.py")
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)

    @tested
    @given(TEXTS)
    def same(text):
        assert torch.equal(ours()([text]), peer.tokenize([text]))

    same()


def test_merges_are_those_that_clip_uses():
    lines = MERGES.read_text("utf-8").splitlines()
    assert (
        len(lines) == 1 + 49152 - 256 - 2
    )  # a comment; 512 bytes with and without an end, 2 marks
    assert lines[1:3] == ["i n", "t h"] and len(set(lines)) == len(lines)


# -- transformers ----------------------------------------------------------------------------------

ADDED = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
PUBLISHED = {  # as the folders of Stable Diffusion 2.x have it
    "bos_token": {"content": "<|startoftext|>", **ADDED},
    "eos_token": {"content": "<|endoftext|>", **ADDED},
    "unk_token": {"content": "<|endoftext|>", **ADDED},
    "pad_token": "!",
}


MARKS = ("bos_token", "eos_token", "unk_token")
WAYS = ["tokenizer.json", "vocab.json", "padded with !", "listed by id"]


@pytest.fixture(scope="module", params=WAYS)
def folder(request, tmp_path_factory):
    """A CLIPTokenizer as it is saved now, as it was saved, and as published."""
    from transformers import CLIPTokenizer

    pairs = [tuple(line.split()) for line in MERGES.read_text("utf-8").splitlines()[1:]]
    letters, _ = symbols()
    names = [*letters, *(s + "</w>" for s in letters), *("".join(pair) for pair in pairs)]
    vocabulary = {n: k for k, n in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "tokenizer.json":
        CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=77).save_pretrained(folder)
        return folder
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text(MERGES.read_text("utf-8"), encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    if request.param == "padded with !":
        (folder / "special_tokens_map.json").write_text(json.dumps(PUBLISHED))
        tokens = {name: {"__type": "AddedToken", **PUBLISHED[name]} for name in MARKS}
        config |= {**tokens, "pad_token": "<|endoftext|>"}
    if request.param == "listed by id":
        (folder / "special_tokens_map.json").write_text(json.dumps(PUBLISHED))
        listed = {0: {"content": "!", **ADDED}, 49406: PUBLISHED["bos_token"]}
        config |= {"added_tokens_decoder": listed, "pad_token": "<|endoftext|>"}
        config |= {"additional_special_tokens": ["panda</w>", "!"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_ids_of_transformers(folder):
    from transformers import CLIPTokenizer

    peer, own = CLIPTokenizer.from_pretrained(folder), read_tokenizer(folder)

    @tested
    @given(TEXTS)
    @example("")
    @example("hi!! !")
    @example("<|ENDOFTEXT|> x")
    @example("word " * 100)
    def same(text):
        expected = peer(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert own([text])[0].tolist() == expected

    same()


def test_lengths_and_batches(folder):
    own = read_tokenizer(folder)
    ids = own(["a", "word " * 100])
    assert ids.shape == (2, 77) and ids.dtype == torch.int64
    assert torch.equal(ids[:1], own(["a"]))
    assert ids[1, 0] == 49406 and ids[1, -1] == 49407
    assert len(own.tokens("word " * 100)) == 100


# -- what is refused -------------------------------------------------------------------------------


def test_rejects_texts_that_are_none():
    for texts in ("a panda", [1], [None]):
        with pytest.raises(TypeError, match="expected a list of texts"):
            ours()(texts)


VOCABULARY = '{"a": 1, "b": 2, "ab": 3, "<|startoftext|>": 4, "<|endoftext|>": 5}'
SPECIAL = {"vocab.json": VOCABULARY, "merges.txt": "a b"}


def test_a_small_vocabulary_is_read(tmp_path):
    for name, content in SPECIAL.items():
        (tmp_path / name).write_text(content)
    assert read_tokenizer(tmp_path).ids == (4, 5, 5)


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({}, FileNotFoundError, "neither vocab.json and merges.txt nor tokenizer.json"),
        ({"vocab.json": "{}"}, FileNotFoundError, "no tokenizer in"),
        ({"vocab.json": "{", "merges.txt": "a b"}, ValueError, "vocab.json is not JSON"),
        ({"vocab.json": '{"a": 1}', "merges.txt": ""}, ValueError, "no vocabulary of byte pairs"),
        ({"vocab.json": '{"a": "b"}', "merges.txt": "a b"}, ValueError, "no vocabulary of byte"),
        ({"tokenizer.json": '{"model": 3}'}, ValueError, "no vocabulary of byte pairs"),
        ({"tokenizer.json": '{"model": {"vocab": {}, "merges": 3}}'}, ValueError, "no vocabulary"),
        (
            {"tokenizer.json": '{"model": {"vocab": {}, "merges": [1]}}'},
            ValueError,
            "no vocabulary",
        ),
        (
            {"tokenizer.json": '{"model": {"vocab": {}, "merges": [["a", 1]]}}'},
            ValueError,
            "no vocabulary",
        ),
        (SPECIAL | {"merges.txt": "a x"}, ValueError, "cannot be used (Error while"),
        (SPECIAL | {"vocab.json": VOCABULARY.replace("1", "-1")}, ValueError, "cannot be used ("),
        (
            SPECIAL | {"tokenizer_config.json": '{"extra_special_tokens": 7}'},
            ValueError,
            "special tokens of another form",
        ),
        (
            SPECIAL | {"tokenizer_config.json": '{"added_tokens_decoder": [[]]}'},
            ValueError,
            "special tokens of another form",
        ),
        (
            {"vocab.json": '{"a": 1}', "merges.txt": "a b"},
            ValueError,
            "special token '<|startoftext|>' is not in its vocabulary",
        ),
        (
            {
                "vocab.json": '{"a": 1}',
                "merges.txt": "a b",
                "tokenizer_config.json": '{"tokenizer_class": "T5Tokenizer"}',
            },
            ValueError,
            'tokenizer_class = "T5Tokenizer" is not CLIPTokenizer',
        ),
        (
            {
                "vocab.json": '{"a": 1}',
                "merges.txt": "a b",
                "tokenizer_config.json": '{"model_max_length": 1e30}',
            },
            ValueError,
            "model_max_length = 1e+30 is no number of tokens",
        ),
    ],
)
def test_rejects_folders(tmp_path, files, error, words):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error) as caught:
        read_tokenizer(tmp_path)
    assert words in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("package", ["tokenizers", "ftfy", "regex"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=f"{package}: pip install 'vfengine\\[text\\]'"):
        open_clip_tokenizer()
