"""formats/parts.py: autoencoders and text encoders of checkpoints, and in folders of their own."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from latent_models import (
    AUTOENCODER,
    LATENTS,
    PROMPTS,
    TEXT,
    latent_config,
    latent_video_config,
    part_modules,
    save_latent_model,
)
from safetensors.torch import load_file, save_file
from seeded import normal
from test_checkpoint import contents, edit_config, entries

from vfengine.formats import parts
from vfengine.formats.checkpoint import CheckpointConfig, read_config, save_checkpoint
from vfengine.formats.parts import (
    load_checkpoint_autoencoder,
    load_checkpoint_text_encoder,
    read_autoencoder,
    read_text_encoder,
    save_autoencoder,
    save_text_encoder,
)
from vfengine.formats.stored import StoredNetwork
from vfengine.formats.word_tokenizer import WordTokenizer
from vfengine.models import (
    Decoder,
    Encoder,
    PlannedDecoder,
    PlannedEncoder,
    PlannedTextEncoder,
    TextEncoder,
)
from vfengine.plan.cuda import CudaImages
from vfengine.sampling.captured_call import CapturedCall

MODULES = part_modules(latent_config())
MEAN, STD = LATENTS["latent_mean"], LATENTS["latent_std"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_latent_model(tmp_path_factory.mktemp("models") / "latent")


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A copy of the latent model, to break."""
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture
def autoencoder(tmp_path) -> Path:
    state = MODULES["autoencoder"].state_dict()
    save_autoencoder(tmp_path / "ae", AUTOENCODER, state, MEAN, STD)
    return tmp_path / "ae"


@pytest.fixture
def text(tmp_path) -> Path:
    state = MODULES["text_encoder"].state_dict()
    save_text_encoder(tmp_path / "text", TEXT, state, MODULES["tokenizer"])
    return tmp_path / "text"


def both(folder: Path, **options):
    """A checkpoint's autoencoder and text encoder."""
    config = read_config(folder)
    text = load_checkpoint_text_encoder(folder, config)
    return load_checkpoint_autoencoder(folder, config, **options), text


# -- of a checkpoint -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [latent_config(), latent_video_config()])
def test_configurations_round_trip(config):
    assert CheckpointConfig.from_json(config.to_json()) == config
    assert config.parts == ("autoencoder", "text_encoder", "tokenizer")
    assert (config.picture_size, config.picture_channels) == ((32, 32), 3)
    assert config.animates_pictures is (config.objective == "decomposed")


def test_entries_are_absent_where_there_are_no_parts():
    config, later = tiny_config(), {*LATENTS, "text_encoder", "prompts"}
    assert not later & json.loads(config.to_json()).keys()
    assert (config.parts, config.picture_size, config.picture_channels) == ((), (16, 16), 3)


def test_a_checkpoint_is_written_with_its_parts(tmp_path):
    state = {"conv_in.weight": torch.zeros(2)}
    files = {n: p if isinstance(p, str) else p.state_dict() for n, p in MODULES.items()}
    config = save_checkpoint(tmp_path / "m", latent_config(), state, state, parts=files)
    assert read_config(tmp_path / "m") == config
    assert config.sha256.keys() == {*config.networks, *config.parts}
    assert sorted(contents(tmp_path / "m")) == [
        *("autoencoder.safetensors", "base.safetensors", "config.json", "residual.safetensors"),
        *("text_encoder.safetensors", "tokenizer.json"),
    ]
    stored = load_file(tmp_path / "m" / "autoencoder.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for wrong in ({}, {**files, "vocoder": "x"}):
        with pytest.raises(ValueError, match="the model has the parts autoencoder, text_encoder, "):
            save_checkpoint(tmp_path / "m", latent_config(), state, state, parts=wrong)
    with pytest.raises(ValueError, match="has the parts none, got autoencoder"):
        save_checkpoint(tmp_path / "m", tiny_config(), state, state, parts=files)
    assert read_config(tmp_path / "m") == config


@torch.no_grad()
def test_parts_compute_what_the_plain_modules_do(model):
    autoencoder, text = both(model)
    assert isinstance(autoencoder.decoder, PlannedDecoder)
    assert isinstance(autoencoder.encoder, PlannedEncoder)
    assert isinstance(text, PlannedTextEncoder)
    z, x = normal(2, 3, 4, 5, 6), normal(2, 3, 3, 20, 24)
    plain = MODULES["autoencoder"]
    torch.testing.assert_close(autoencoder.decode(z), plain.decode(z), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(autoencoder.encode(x), plain.encode(x), atol=1e-4, rtol=1e-4)
    ids = text.tokenize([*PROMPTS, ""])
    assert torch.equal(ids, WordTokenizer(MODULES["tokenizer"], TEXT.max_length)(PROMPTS + ("",)))
    assert ids.shape == (4, TEXT.max_length) and not ids[3].any()
    torch.testing.assert_close(text(ids), MODULES["text_encoder"](ids), atol=1e-4, rtol=1e-4)


def test_parts_in_other_forms(model, monkeypatch):
    config = read_config(model)
    assert load_checkpoint_autoencoder(model, config, encodes=False).encoder is None
    half = load_checkpoint_autoencoder(model, config, dtype=torch.float16)
    assert [type(part) for part in (half.decoder, half.encoder)] == [Decoder, Encoder]
    text = load_checkpoint_text_encoder(model, config, dtype=torch.float16)
    assert isinstance(text, TextEncoder) and text.norm.weight.dtype is torch.float16
    read = StoredNetwork.read  # on CUDA nothing runs: the weights stay where they are
    monkeypatch.setattr(StoredNetwork, "read", lambda self, dtype, _: read(self, dtype, "cpu"))
    for capture in (True, False):
        on_cuda = load_checkpoint_autoencoder(
            model, config, "cuda", torch.bfloat16, capture=capture
        )
        for part in (on_cuda.decoder, on_cuda.encoder):
            assert isinstance(part, CapturedCall) is capture
            assert isinstance(part.network if capture else part, CudaImages)


@pytest.mark.parametrize("name", ["autoencoder.safetensors", "text_encoder.safetensors"])
def test_missing_damaged_and_exchanged_weights_are_refused(folder, tmp_path, name):
    file = folder / name
    other = save_latent_model(tmp_path / "other", seed=7)
    shutil.copy(other / name, folder)
    with pytest.raises(ValueError, match=f"{name} is truncated or not the file its config.json"):
        both(folder)
    edit_config(folder, sha256={})
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match=f"{name} is not a complete safetensors file"):
        both(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"model has no {name}"):
        both(folder)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("autoencoder", lambda s: s.pop("decoder.conv_in.bias"), "misses weights: decoder.conv_in"),
        ("autoencoder", lambda s: s.pop("encoder.conv_in.bias"), "misses weights: encoder.conv_in"),
        ("autoencoder", lambda s: s.update(x=torch.zeros(1)), "has weights of no known layer: x"),
        (
            "autoencoder",
            lambda s: s.update({"encoder.x": torch.zeros(1)}),
            "no known layer: encoder.x",
        ),
        (
            "autoencoder",
            lambda s: s.update({"decoder.conv_in.bias": torch.zeros(3)}),
            r"of other shapes: decoder.conv_in.bias \[3\] instead of \[16\]",
        ),
        ("text_encoder", lambda s: s.pop("norm.bias"), "misses weights: norm.bias"),
        ("text_encoder", lambda s: s.update(x=torch.zeros(1)), "no known layer: x"),
    ],
)
def test_other_weights_are_refused_by_name(folder, name, change, message):
    file = folder / f"{name}.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    edit_config(folder, sha256={})
    with pytest.raises(ValueError, match=rf"{name}\.safetensors .*{message}"):
        both(folder)


def test_other_tokenizers_are_refused(folder):
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text())
    edit_config(folder, sha256={})
    vocabulary = {f"w{k}": k for k in range(TEXT.vocab_size - 1)}
    words["model"]["vocab"] = {"[PAD]": 0, "[UNK]": 1, **{w: k + 2 for w, k in vocabulary.items()}}
    for damage, message in (
        (json.dumps(words).encode(), "has 25 words, the text encoder 24"),
        (b"{}", "tokenizer.json: WordTokenizer: not a tokenizer.json"),
        (b"\xff\xfe", "tokenizer.json is no text in UTF-8"),
    ):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=message):
            both(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model has no tokenizer\.json"):
        both(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"latent_mean": [0.0] * 3}, r"latent_mean must be 4 numbers, got \(0.0, 0.0, 0.0\)"),
        ({"latent_mean": None}, "latent_mean must be 4 numbers, got None"),
        ({"latent_std": [1.0, 1.0, 1.0, 0.0]}, "latent_std is out of range: 0.0"),
        ({"latent_mean": [0, 0, 0, 10**400]}, "latent_mean is out of range"),
        ({"latent_std": [1.0, 1.0, 1.0, "1"]}, "latent_std must be a number, got '1'"),
        ({"latent_std": 1.0}, "latent_std must be a list, got 1.0"),
        ({"autoencoder": None}, "latent_mean is of latents, but there is no autoencoder"),
        ({"autoencoder": {"latent_channels": 8}}, "has 8 latent channels, the networks' clips 4"),
        ({"autoencoder": {"latent_channels": 5}}, "latent_channels must be even"),
        ({"autoencoder": {"colour": 3}}, "of another version .*colour"),
        ({"autoencoder": 4}, "autoencoder must be an object, got 4"),
        ({"prompts": None}, "needs prompts, one for each of 3 labels, got None"),
        ({"prompts": ["one", "two"]}, r"one for each of 3 labels, got \('one', 'two'\)"),
        ({"prompts": [1, 2, 3]}, "prompts must be strings"),
        ({"prompts": "walk"}, "prompts must be a list"),
        ({"text_encoder": None}, "there are prompts, but there is no text_encoder"),
        ({"text_encoder": None, "prompts": None}, "base has None classes, not 3"),
        (
            {"text_encoder": {"width": 1024}},
            "context_dim of 16, the text encoder makes rows of 102",
        ),
        ({"text_encoder": {"num_heads": 0}}, "num_heads must be a positive int"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(folder, changes, reason):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=rf"config\.json is not the configuration .*{reason}"):
        read_config(folder)


def test_networks_with_classes_cannot_take_prompts():
    base = latent_config().base
    with pytest.raises(ValueError, match="base has 3 classes, but prompts replace labels"):
        latent_config(base=replace(base, num_classes=3))
    with pytest.raises(ValueError, match="base has a context_dim of None, the text encoder makes"):
        latent_config(base=replace(base, context_dim=None))


def test_any_damage_to_the_parts_is_taken_or_refused_in_words():
    text = latent_config().to_json()
    places = [
        place for place in entries(json.loads(text)) if place[0] in (*LATENTS, "text_encoder")
    ]
    for place in places:
        for value in [None, True, -1, 0, 3.5, float("nan"), 10**12, "x", "", [], [[1]], {"a": 1}]:
            values = part = json.loads(text)
            for key in place[:-1]:
                part = part[key]
            part[place[-1]] = value
            try:
                CheckpointConfig.from_json(json.dumps(values))
            except ValueError as error:
                assert str(error)


# -- by themselves ---------------------------------------------------------------------------------


def test_an_autoencoder_is_read_as_written(autoencoder):
    config, state, mean, std = read_autoencoder(autoencoder)
    assert (config, mean, std) == (AUTOENCODER, MEAN, STD)
    for name, value in MODULES["autoencoder"].state_dict().items():
        assert torch.equal(state[name], value.half()), name
    entries = json.loads((autoencoder / "config.json").read_text())
    assert entries["format"] == "vfengine-autoencoder-1"
    assert sorted(contents(autoencoder)) == ["autoencoder.safetensors", "config.json"]


def test_a_text_encoder_is_read_as_written(text):
    config, state, tokenizer = read_text_encoder(text)
    assert (config, tokenizer) == (TEXT, MODULES["tokenizer"])
    for name, value in MODULES["text_encoder"].state_dict().items():
        assert torch.equal(state[name], value.half()), name
    assert json.loads((text / "config.json").read_text())["format"] == "vfengine-text-1"


def test_saving_again_replaces_the_folder_and_an_error_leaves_it(autoencoder, monkeypatch):
    state = part_modules(latent_config(), seed=9)["autoencoder"].state_dict()
    before = contents(autoencoder.parent)
    monkeypatch.setattr(parts, "write_folder", None)
    with pytest.raises(TypeError):
        save_autoencoder(autoencoder, AUTOENCODER, state, MEAN, STD)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="latent_std must be 4 numbers"):
        save_autoencoder(autoencoder, AUTOENCODER, state, MEAN, (1.0, 1.0))
    with pytest.raises(ValueError, match="misses weights"):
        save_autoencoder(autoencoder, AUTOENCODER, {}, MEAN, STD)
    assert contents(autoencoder.parent) == before
    save_autoencoder(autoencoder, AUTOENCODER, state, MEAN, STD)
    assert contents(autoencoder.parent).keys() == before.keys()
    assert not torch.equal(
        read_autoencoder(autoencoder)[1]["decoder.conv_in.bias"],
        MODULES["autoencoder"].state_dict()["decoder.conv_in.bias"].half(),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "vfengine-text-1"}, '"format" is not vfengine-autoencoder-1'),
        ({"latent_std": [1, 1]}, r"latent_std must be 4 numbers, got \[1, 1\]"),
        ({"latent_mean": None}, "latent_mean must be 4 numbers, got None"),
        ({"autoencoder": {"colour": 1}}, "colour"),
        ({"autoencoder": None}, "config.json"),
        ({"more": 1}, "expected autoencoder, latent_mean, latent_std and sha256"),
        ({"sha256": {"autoencoder": "00"}}, "truncated or not the file"),
    ],
)
def test_damaged_folders_of_autoencoders_are_refused(autoencoder, changes, message):
    edit_config(autoencoder, **changes)
    with pytest.raises(ValueError, match=message):
        read_autoencoder(autoencoder)


def test_parts_are_read_from_a_whole_model(model, folder):
    config, state, mean, std = read_autoencoder(model)
    assert (config, mean, std) == (AUTOENCODER, MEAN, STD)
    stored = load_file(model / "autoencoder.safetensors")
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
    assert read_text_encoder(model)[2] == MODULES["tokenizer"]
    edit_config(folder, autoencoder=None)
    with pytest.raises(
        ValueError, match="expected autoencoder, latent_mean, latent_std and sha256"
    ):
        read_autoencoder(folder)


def test_folders_of_another_kind_are_refused(autoencoder, text, tmp_path):
    for read, other in (
        (read_autoencoder, text),
        (read_text_encoder, autoencoder),
    ):
        with pytest.raises(ValueError, match='"format" is not'):
            read(other)
    with pytest.raises(FileNotFoundError, match=r"nowhere has no config\.json"):
        read_text_encoder(tmp_path / "nowhere")
    (text / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"text has no tokenizer\.json"):
        read_text_encoder(text)
