"""files.py: a file or folder is whole or not there, and tensors are read with one error text."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from contextlib import nullcontext

import pytest
import safetensors.torch
import torch

from vfengine import files
from vfengine.files import (
    check_writable,
    open_tensors,
    parse_json,
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


# -- what killed processes leave ------------------------------------------------------------------

WRITER = """
import os, signal, sys
from vfengine import files

def end(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "between":  # the old folder is moved aside, the new one is not in its place
    files._exchanged = lambda *_: False
    replace = os.replace
    os.replace = lambda one, other: end() if str(one).endswith("new") else replace(one, other)
write = files.replacing if sys.argv[1] == "file" else files.replacing_folder
with write(sys.argv[2]) as temporary:
    if sys.argv[1] != "between":
        end()
"""


def killed(how, path):
    run = subprocess.run([sys.executable, "-c", WRITER, how, str(path)])
    assert run.returncode == -signal.SIGKILL
    files.sweep.cache_clear()  # as in the process that comes next


@pytest.mark.parametrize("how", ["file", "folder"])
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path, how):
    (tmp_path / ".x.part").write_text("another program's")
    (tmp_path / f".x.{'0' * 16}.part").write_text("of an earlier release")
    foreign = sorted(os.listdir(tmp_path))
    killed(how, tmp_path / "x")
    assert len(os.listdir(tmp_path)) == 3
    with replacing(tmp_path / "y") as other:
        other.write_text("y")
        assert len(os.listdir(tmp_path)) == 3
    assert sorted(os.listdir(tmp_path)) == [*foreign, "y"]


def test_a_folder_that_was_moved_aside_comes_back(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("old")
    killed("between", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with replacing(tmp_path / "y") as other:
        other.write_text("y")
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]
    assert (tmp_path / "x" / "old").read_text() == "old"


def test_what_a_living_writer_has_begun_is_left_alone(tmp_path):
    with replacing(tmp_path / "x") as mine:
        mine.write_text("mine")
        files.sweep.cache_clear()
        with replacing(tmp_path / "y") as other:
            other.write_text("other")
    assert (tmp_path / "x").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_without_locks_files_are_written_and_nothing_is_swept(tmp_path, monkeypatch):
    killed("file", tmp_path / "x")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "x").read_text() == "x" and len(os.listdir(tmp_path)) == 2


def test_a_writer_whose_folder_is_swept_before_it_is_locked_takes_another(tmp_path, monkeypatch):
    flock, swept = fcntl.flock, []

    def late(descriptor, how):
        if not swept:
            swept.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            os.rmdir(swept[0])
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("x")
        assert str(temporary.parent) != swept[0]
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_is_never_missing_while_it_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    monkeypatch.setattr(os, "replace", None)  # which takes two steps
    with replacing_folder(tmp_path / "x") as fresh:
        (fresh / "new").write_text("new")
    assert os.listdir(tmp_path) == ["x"] and os.listdir(tmp_path / "x") == ["new"]
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "x")
    with replacing_folder(link) as fresh:
        (fresh / "newer").write_text("newer")
    assert os.listdir(link) == ["newer"] and os.listdir(tmp_path / "x") == ["new"]


# -- places ----------------------------------------------------------------------------------------


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


def test_the_same_tensors_and_notes_make_the_same_bytes(tmp_path):
    notes = {f"name {k}": f'"\u00fc\u2028\x1f\\/{k}\n' for k in range(20)}
    written = set()
    for k in range(8):
        order = dict(reversed(notes.items())) if k % 2 else notes
        write_tensors(tmp_path / "x", TENSORS, order)
        written.add((tmp_path / "x").read_bytes())
    assert len(written) == 1
    with open_tensors(tmp_path / "x") as file:
        assert file.metadata() == notes


def test_files_of_tensors_are_those_of_safetensors(tmp_path):
    """Of every dtype, a scalar, nothing, and names in any order."""
    tensors = {f"z {name}": torch.arange(3).to(getattr(torch, name)) for name in files._DTYPES}
    one = torch.ones(1)
    tensors |= {"b": TENSORS["a"], "a": TENSORS["b"], "none": torch.ones(0, 3), "ü": one}
    for notes in (None, {}, {"note": 'y"\n'}):
        safetensors.torch.save_file(tensors, tmp_path / "theirs", notes)
        write_tensors(tmp_path / "ours", tensors, notes)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with pytest.raises(ValueError, match="x: c is complex64, expected one of: int64"):
        write_tensors(tmp_path / "x", {"c": torch.zeros(1, dtype=torch.complex64)})


def test_tensors_that_cannot_be_written_are_an_os_error(tmp_path, monkeypatch):
    os.symlink("/dev/full", tmp_path / "new")
    monkeypatch.setattr(files, "_folder_beside", lambda path: nullcontext(tmp_path))
    with pytest.raises(OSError, match=r"x: cannot be written \(No space left") as caught:
        write_tensors(tmp_path / "x", TENSORS)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
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


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[1", "", "nan"])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        parse_json(text)
    assert parse_json('{"a": [1, null]}') == {"a": [1, None]}
    assert parse_json("[" * 100 + "]" * 100)
