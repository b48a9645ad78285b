"""files.py: a file or folder is whole or not there, and tensors are read with one error text."""

import os
import stat

import pytest
import safetensors.torch
import torch

from vfengine.files import (
    check_writable,
    open_tensors,
    parse_tensors,
    replacing,
    replacing_folder,
    write_tensors,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}


def test_replacing_renames_only_a_finished_file(tmp_path):
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_text() == "new"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_break_leaves_the_old_file_and_the_old_folder(tmp_path, error):
    file, folder = tmp_path / "x", tmp_path / "y"
    file.write_text("old")
    folder.mkdir()
    (folder / "z").write_text("old")
    for replace, part in ((replacing, ""), (replacing_folder, "z")):
        with pytest.raises(error), replace(folder if part else file) as temporary:
            (temporary / part).write_text("new")
            raise error
    assert file.read_text() == (folder / "z").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_two_writers_of_one_file_are_not_in_each_others_way(tmp_path):
    with replacing(tmp_path / "x") as first, replacing(tmp_path / "x") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "x").read_text() == "first"  # the last to end
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    for text in ("old", "new"):
        with replacing_folder(tmp_path / "x") as fresh:
            (fresh / text).write_text(text)
    assert os.listdir(tmp_path) == ["x"]
    assert os.listdir(tmp_path / "x") == ["new"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert check_writable(str(tmp_path / "file")) == tmp_path / "file"
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        check_writable(tmp_path / "none" / "x")
    with pytest.raises(NotADirectoryError, match="not a folder"):
        check_writable(tmp_path / "file" / "x")


def test_tensors_come_back(tmp_path):
    tensors = {**TENSORS, "transposed": TENSORS["a"].T}
    umask = os.umask(0o027)
    try:
        write_tensors(tmp_path / "x", tensors, {"note": "y"})
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["x"]
    with open_tensors(tmp_path / "x") as file:
        assert file.metadata() == {"note": "y"}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    parsed = parse_tensors((tmp_path / "x").read_bytes(), tmp_path / "x")
    assert found.keys() == parsed.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and torch.equal(parsed[name], tensor)


def test_tensors_that_cannot_be_written_are_an_os_error(tmp_path, monkeypatch):

    def full_disk(*_):
        raise safetensors.SafetensorError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match=r"x: cannot be written \(no space"):
        write_tensors(tmp_path / "x", TENSORS)
    assert os.listdir(tmp_path) == []
    with pytest.raises(OSError):
        write_tensors(tmp_path / "none" / "x", TENSORS)


def test_a_file_that_is_cut_off_is_named(tmp_path):
    file = tmp_path / "x"
    write_tensors(file, TENSORS)
    for length in (file.stat().st_size - 1, 100, 4, 0):
        os.truncate(file, length)
        refused = pytest.raises(ValueError, match="x is not a complete set of weights: ")
        with refused, open_tensors(file, "set of weights"):
            pass
        with pytest.raises(ValueError, match="x is not a complete safetensors file: "):
            parse_tensors(file.read_bytes(), file)
    with pytest.raises(FileNotFoundError), open_tensors(tmp_path / "none"):
        pass
