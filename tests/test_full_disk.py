"""A disk that is full, at every write: an OSError, the old file stays, and nothing else is left.

The system refuses to let a file grow past RLIMIT_FSIZE, as it would on a full disk. So the real
writers fail, those in C too.
"""

import errno
import io
import json
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vfengine.files import write_tensors
from vfengine.formats.folders import write_folder
from vfengine.media.video import write_video
from vfengine.serving.frames import write_sheet as write_frames
from vfengine.serving.uploads import store_video
from vfengine.training.arrays import kept
from vfengine.training.samples import write_sheet

FRAMES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
NOISE = FRAMES.tobytes()


def clip(suffix):
    return suffix, lambda file: write_video(file, FRAMES, 8.0)


def rows(file):
    file.unlink(missing_ok=True)  # else its rows are read
    kept(file, iter([FRAMES]), len(FRAMES), np.uint8)


def model(folder):
    parts = {"base": {"x": torch.ones(3000)}, "words": "{}"}
    write_folder(folder, parts, json.dumps, torch.float32)


WRITERS = [
    *map(clip, (".mp4", ".mkv", ".webm", ".gif", ".webp", ".png")),
    (".safetensors", lambda file: write_tensors(file, {"x": torch.ones(3000)}, {"a": "b"})),
    (".sheet.png", lambda file: write_frames(file, FRAMES, 8.0)),
    (".samples.png", lambda file: write_sheet(torch.from_numpy(FRAMES[None]), file)),
    (".npy", rows),
    (".upload", lambda file: store_video(io.BytesIO(b"RIFF0000WEBP" + NOISE), file)),
    ("model", model),
]
NAMES = [name for name, _ in WRITERS]


@contextmanager
def largest_file(size):
    """No file may grow past so many bytes meanwhile."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=NAMES)
def test_a_full_disk_leaves_what_was_there(tmp_path, name, write):
    file = tmp_path / f"a{name}"
    write(file)
    whole = contents(tmp_path)
    size = max(map(len, whole.values()))
    if name == ".npy":  # is never written twice
        whole = {}
    for limit in (0, 1, size // 2, size - 1):
        with largest_file(limit), pytest.raises((OSError, av.FFmpegError)):
            write(file)
        assert contents(tmp_path) == whole
        assert not list(tmp_path.glob(".*"))
    with largest_file(2 * size):  # gifs are written, and written again with their comment
        write(file)
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_last_step_that_fails_leaves_what_was_there(tmp_path, monkeypatch, code):
    """A quota and a disk that has become read-only, which only root could make."""
    files = {name: tmp_path / f"a{name}" for name in NAMES}
    for name, write in WRITERS:
        write(files[name])
    files[".npy"].unlink()
    before = contents(tmp_path)

    def fails(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", fails)
    monkeypatch.setattr("vfengine.files._exchanged", fails)
    for name, write in WRITERS:
        with pytest.raises(OSError, match=os.strerror(code)):
            write(files[name])
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_rows_have_their_place_on_the_disk_before_they_are_written(tmp_path, monkeypatch):
    """A page of a mapped file that has no place on a full disk ends the process."""
    asked = []

    def full(descriptor, start, length):
        asked.append((start, length, os.fstat(descriptor).st_size))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        rows(tmp_path / "a.npy")
    assert asked == [(0, FRAMES.nbytes + 128, FRAMES.nbytes + 128)]
    assert not os.listdir(tmp_path)
