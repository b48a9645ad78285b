"""formats/checkpoint.py: checkpoints are read as written; damaged or foreign ones are refused."""

import json
import math
import os
import shutil
import stat
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_LABELS, save_tiny, tiny_config
from safetensors.torch import load_file

from vfengine import files
from vfengine.formats import checkpoint, folders
from vfengine.formats.checkpoint import (
    CheckpointConfig,
    build_network,
    load_network,
    read_config,
    save_checkpoint,
)

NETWORKS = ("base", "residual")


@pytest.fixture
def folder(tiny_checkpoint, tmp_path) -> Path:
    """A copy of the tiny checkpoint, to break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


def states(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """State dicts of the two tiny UNets, every weight random."""
    torch.manual_seed(seed)
    config = tiny_config()
    networks = [build_network(config, name).unet for name in config.networks]
    return [{k: torch.randn_like(v) for k, v in net.state_dict().items()} for net in networks]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# -- what is written -------------------------------------------------------------------------------


def test_checkpoint_round_trips_weights_and_config(tmp_path):
    written = states()
    config = save_checkpoint(tmp_path / "model", tiny_config(lam=0.25, fps=12.5), *written)
    assert read_config(tmp_path / "model") == config
    assert replace(config, sha256={}) == tiny_config(lam=0.25, fps=12.5)
    assert config.null_class == len(TINY_LABELS)
    assert config.noise_schedule().fingerprint() == tiny_config().noise_schedule().fingerprint()
    for name, state in zip(NETWORKS, written, strict=True):
        stored = load_file(tmp_path / "model" / f"{name}.safetensors")
        assert {value.dtype for value in stored.values()} == {torch.float16}
        generator = load_network(tmp_path / "model", config, name)
        loaded = generator.unet.state_dict()
        assert loaded.keys() == state.keys()
        for key, value in state.items():
            assert loaded[key].dtype == torch.float32
            assert torch.equal(loaded[key], value.half().float()), key
        assert not generator.training
        assert not any(parameter.requires_grad for parameter in generator.parameters())


def test_checkpoint_loads_into_the_asked_dtype_in_channels_last(tiny_checkpoint):
    config = read_config(tiny_checkpoint)
    for name in NETWORKS:
        unet = load_network(tiny_checkpoint, config, name, dtype=torch.bfloat16).unet
        assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
        assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_checkpoint_gives_the_generators_their_lam_and_scales(tmp_path):
    folder = save_tiny(tmp_path / "model", lam=0.3, base_std=0.6, residual_std=0.2)
    config = read_config(folder)
    assert load_network(folder, config, "base").data_std == 0.6
    residual = load_network(folder, config, "residual")
    assert (residual.data_std, residual.lam) == (0.2, 0.3)


def test_fingerprint_names_the_base_weights_alone(tmp_path):
    base, residual = states(0)
    other_base, other_residual = states(1)
    first = save_checkpoint(tmp_path / "a", tiny_config(), base, residual)
    again = save_checkpoint(tmp_path / "b", tiny_config(), base, other_residual)
    other = save_checkpoint(tmp_path / "c", tiny_config(), other_base, residual)
    assert len(first.fingerprint()) == 16
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_checkpoint_files_obey_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        save_checkpoint(tmp_path / "model", tiny_config(), *states())
    finally:
        os.umask(umask)
    for file in (tmp_path / "model").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o640, file.name
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o750


def test_saving_again_replaces_the_checkpoint(folder):
    config = save_checkpoint(folder, tiny_config(labels=("a", "b", "c")), *states(5))
    assert read_config(folder) == config
    assert config.labels == ("a", "b", "c")
    assert sorted(contents(folder.parent)) == [
        "model/base.safetensors",
        "model/config.json",
        "model/residual.safetensors",
    ]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("module", "failing", "number"),
    [
        (folders, "write_tensors", 2),
        (files, "_exchanged", 1),
        *((os, "replace", number) for number in range(1, 5)),
    ],
)
def test_interrupted_save_leaves_the_old_checkpoint(
    folder, monkeypatch, module, failing, number, error
):
    """replace: of the two files of weights, of the old folder, of the new one.

    The folders are replaced one after the other where they cannot be exchanged.
    """
    if failing == "replace":
        monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    real, calls = getattr(module, failing), []

    def one_call_fails(*args):
        calls.append(args)
        if len(calls) == number:
            raise error
        return real(*args)

    before = contents(folder.parent)
    monkeypatch.setattr(module, failing, one_call_fails)
    with pytest.raises(type(error)):
        save_checkpoint(folder, tiny_config(), *states(5))
    monkeypatch.undo()
    assert len(calls) >= number
    assert contents(folder.parent) == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


def test_save_refuses_to_replace_what_is_no_checkpoint(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    before = contents(tmp_path)
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match=f"{name} exists and is no checkpoint"):
            save_checkpoint(tmp_path / name, tiny_config(), *states())
    assert contents(tmp_path) == before


def test_default_checkpoint_is_written_as_it_was_read():
    """Entries that came later are left out where not set, so that older code reads the files."""
    text = (checkpoint.DEFAULT / "config.json").read_text(encoding="utf-8")
    assert CheckpointConfig.from_json(text).to_json() + "\n" == text


@pytest.mark.parametrize(
    ("base_path", "clean_share", "animates"),
    [
        ("stepwise", None, False),  # older files do not record the share
        ("clean", None, True),
        ("stepwise", 0.0, False),
        ("stepwise", 0.85, True),
        ("clean", 1, True),
    ],
)
def test_pictures_are_animated_after_training_with_exact_base_noise(
    base_path, clean_share, animates
):
    config = tiny_config(base_path=base_path, clean_share=clean_share)
    assert config.animates_pictures is animates
    assert CheckpointConfig.from_json(config.to_json()) == config
    assert ("clean_share" in json.loads(config.to_json())) == (clean_share is not None)


# -- what is refused -------------------------------------------------------------------------------


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: it has no config\.json"):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize("name", NETWORKS)
def test_missing_weights_are_refused(folder, name):
    (folder / f"{name}.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"model has no {name}\.safetensors"):
        load_network(folder, read_config(folder), name)


@pytest.mark.parametrize("known_digest", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_truncated_weights_are_refused(folder, name, known_digest):
    file = folder / f"{name}.safetensors"
    for length in (file.stat().st_size - 1, 100, 4, 0):
        os.truncate(file, length)
        if not known_digest:  # as in a folder that somebody put together by hand
            edit_config(folder, sha256={})
        with pytest.raises(ValueError, match=rf"{name}\.safetensors is (truncated|not a complete)"):
            load_network(folder, read_config(folder), name)


@pytest.mark.parametrize("name", NETWORKS)
def test_swapped_weights_are_refused(folder, name):
    base, residual = folder / "base.safetensors", folder / "residual.safetensors"
    swapped = (residual.read_bytes(), base.read_bytes())
    base.write_bytes(swapped[0])
    residual.write_bytes(swapped[1])
    with pytest.raises(ValueError, match=rf"{name}\.safetensors is .*not the file its config.json"):
        load_network(folder, read_config(folder), name)
    edit_config(folder, sha256={})
    with pytest.raises(ValueError, match=rf"{name}\.safetensors is of another architecture"):
        load_network(folder, read_config(folder), name)


def test_weights_of_another_training_are_refused(folder, tmp_path):
    other = save_tiny(tmp_path / "other", seed=1)
    shutil.copy(other / "base.safetensors", folder)
    with pytest.raises(ValueError, match=r"base\.safetensors is .*not the file its config.json"):
        load_network(folder, read_config(folder), "base")


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_another_architecture_are_refused(folder, name):
    unet = json.loads((folder / "config.json").read_text())[name]
    edit_config(folder, **{name: {**unet, "block_out_channels": [16, 32]}})
    with pytest.raises(ValueError, match=rf"{name}\.safetensors is of another .* should be \["):
        load_network(folder, read_config(folder), name)
    edit_config(folder, **{name: {**unet, "feed_forward_mult": 0}})
    with pytest.raises(ValueError, match=r"of another architecture .* should be absent, is \["):
        load_network(folder, read_config(folder), name)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON .nested too deeply"),
        (b'{"format": "vfengine-deco', "not JSON"),
        (b"\xff\xfe\x00", "utf-8"),
        (b"[1, 2]", '"format" is not'),
        (b'{"_class_name": "UNet2DConditionModel", "sample_size": 64}', '"format" is not'),
        (b'{"format": "vfengine-decomposed-1", "labels": []}', "incomplete"),
    ],
)
def test_foreign_config_is_refused(folder, text, reason):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"config\.json is not the configuration .*{reason}"):
        read_config(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"colour": "red"}, "unknown entries: colour"),
        ({"base": {"width": 3}}, "of another version"),
        ({"residual": None}, "residual must be an object, got None"),
        ({"base": {"head_dim": 7}}, "multiple of"),
        ({"schedule": {"name": "sudden"}}, "name must be one of"),
        ({"labels": ["a", "b", "a"]}, "labels must differ, got 'a' more than once"),
        ({"clean_share": 1.5}, "clean_share is out of range"),
        ({"base_std": 10**400}, "base_std is out of range"),
        ({"residual_std": 1e200}, "residual_std is out of range"),
        ({"residual_std": 1e-200}, "residual_std is out of range"),
        ({"clean_share": True}, "clean_share must be a number"),
        ({"base_path": "clean", "clean_share": 0}, "needs a clean_share above 0"),
        ({"video": None, "video_std": 0.5}, "unknown entries: video, video_std"),
    ],
)
def test_config_of_another_version_is_refused(folder, changes, reason):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=rf"config\.json is not the configuration .*{reason}"):
        read_config(folder)


def test_config_text_round_trips():
    config = tiny_config(base_path="clean", sha256={"base": "ab", "residual": "cd"})
    assert CheckpointConfig.from_json(config.to_json()) == config


def entries(values, place=()):
    """The place of every entry of nested objects and lists."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*place, key)
        if isinstance(value, dict | list):
            yield from entries(value, (*place, key))


def test_any_damage_to_a_config_is_taken_or_refused_in_words():
    text = tiny_config().to_json()
    damage = [None, True, -1, 0, 3.5, math.nan, 1e300, 10**12, "x", "", [], [[1]], {}, {"a": 1}]
    outcomes = Counter()
    for place in entries(json.loads(text)):
        for value in damage:
            values = part = json.loads(text)
            for key in place[:-1]:
                part = part[key]
            part[place[-1]] = value
            try:
                CheckpointConfig.from_json(json.dumps(values))
                outcomes["taken"] += 1
            except ValueError as error:
                assert str(error)
                outcomes["refused"] += 1
    assert outcomes["refused"] > 10 * outcomes["taken"]
