"""A user's own folder: classes, cutting, and everything a real folder contains that is no video."""

from fractions import Fraction

import av
import numpy as np
import pytest

from vfengine.media.video import write_video
from vfengine.training.folder import read_folder


def numbered(num_frames, height=16, width=16):
    """Frame i has grey value 5 i everywhere: a clip tells which frames it was cut from."""
    values = 5 * np.arange(num_frames, dtype=np.uint8)
    return np.broadcast_to(values[:, None, None, None], (num_frames, height, width, 3)).copy()


def frame_numbers(clips):
    """[M, N], of clips cut from `numbered`."""
    return (clips[:, :, 4:12, 4:12].mean((2, 3, 4)) / 5).round().astype(int)


def test_subfolders_are_classes(tmp_path):
    for name, suffix in (("walk", ".mp4"), ("run", ".webp"), ("jump", ".gif"), ("roll", ".webm")):
        (tmp_path / name / "deeper").mkdir(parents=True)
        write_video(tmp_path / name / "deeper" / f"a{suffix}", numbered(20, 40, 60))
    (tmp_path / "cut").mkdir()
    with av.open(str(tmp_path / "cut" / "a.avi"), "w") as file:
        stream = file.add_stream("ffv1", rate=Fraction(10))
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in numbered(20, 48, 64):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    seen = []
    data = read_folder(tmp_path, num_frames=8, size=(16, 24), on_file=seen.append)
    assert data.label_names == ("cut", "jump", "roll", "run", "walk")
    assert data.clips.dtype == np.uint8
    assert data.clips.shape == (10, 8, 16, 24, 3)
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert data.skipped == data.truncated == ()
    assert len(seen) == 5
    numbers = frame_numbers(data.clips)
    assert (np.diff(numbers, axis=1) == 1).all()


def test_no_subfolders_is_one_class(tmp_path):
    folder = tmp_path / "waves"
    folder.mkdir()
    write_video(folder / "a.webp", numbered(4))
    data = read_folder(folder, num_frames=4, size=16)
    assert data.label_names == ("waves",)
    assert data.labels.tolist() == [0]
    assert np.array_equal(data.clips[0], numbered(4))


def test_long_videos_give_several_clips_with_stride(tmp_path):
    write_video(tmp_path / "a.webp", numbered(50))
    data = read_folder(tmp_path, num_frames=4, size=16, stride=3)
    numbers = frame_numbers(data.clips)
    assert numbers.shape == (5, 4)  # a clip spans 10 frames
    assert (np.diff(numbers, axis=1) == 3).all()
    assert (np.diff(numbers[:, 0]) == 10).all()


def test_seed_moves_the_first_clip_and_nothing_else_does(tmp_path):
    write_video(tmp_path / "a.webp", numbered(39))

    def starts(seed):
        numbers = frame_numbers(read_folder(tmp_path, num_frames=20, size=16, seed=seed).clips)
        return numbers[:, 0].tolist()

    by_seed = [starts(seed) for seed in range(12)]
    assert len({tuple(s) for s in by_seed}) > 4
    assert all(len(s) == 1 and 0 <= s[0] <= 19 for s in by_seed)
    write_video(tmp_path / "Z.webp", numbered(20))  # sorts before a.webp
    assert [starts(seed)[1:] for seed in range(12)] == by_seed


def test_centre_is_cut_and_resized_without_aliasing(tmp_path):
    wide = np.zeros((2, 32, 96, 3), np.uint8)
    wide[:, :, 32:64] = 255  # the centred square is white
    write_video(tmp_path / "wide.webp", wide)
    clips = read_folder(tmp_path, 2, 8).clips
    assert clips[:, :, :, 1:-1].min() == 255
    assert clips.min() > 200  # the filter sees a little of the black beside the cut
    stripes = np.zeros((2, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255  # at a quarter of the size only grey is right
    write_video(tmp_path / "wide.webp", stripes)
    inner = read_folder(tmp_path, 2, 16).clips[:, :, 2:-2, 2:-2].astype(int)
    assert np.abs(inner - 128).max() <= 4


def test_what_cannot_be_used_is_named(tmp_path):
    for name in ("good", "bad", "empty"):
        (tmp_path / name).mkdir()
    write_video(tmp_path / "good" / "a.webp", numbered(8))
    write_video(tmp_path / "good" / "short.gif", numbered(5))
    write_video(tmp_path / "loose.mp4", numbered(8))
    (tmp_path / "good" / "broken.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "good" / "notes.txt").write_text("hello")
    (tmp_path / "good" / ".DS_Store").write_bytes(b"hidden")
    (tmp_path / "bad" / "a.webm").write_bytes(b"")
    data = read_folder(tmp_path, num_frames=8, size=16)
    assert data.label_names == ("good",)
    assert len(data.clips) == 1
    reasons = {path.relative_to(tmp_path).as_posix(): reason for path, reason in data.skipped}
    assert set(reasons) == {
        *("good/short.gif", "good/broken.mp4", "good/notes.txt", "loose.mp4"),
        *("bad/a.webm", "bad", "empty"),
    }
    assert reasons["good/short.gif"] == "too short: 5 frames, 8 needed"
    assert reasons["good/broken.mp4"].startswith("not a readable video")
    assert reasons["good/notes.txt"] == "suffix '.txt' is not one of a video"
    assert reasons["loose.mp4"] == "lies beside the class folders, not in one"
    assert reasons["bad"] == reasons["empty"] == "no usable video in this class"


def test_truncated_files_are_used_up_to_the_break(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", noise)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) // 2])
    clips = read_folder(tmp_path, num_frames=4, size=16)
    assert 2 <= len(clips.clips) < 10
    assert clips.truncated == (tmp_path / "a.mp4",)
    assert clips.skipped == ()


def test_folder_is_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_folder(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="not a folder"):
        read_folder(tmp_path / "file")
    with pytest.raises(ValueError, match=r"no usable video \(file: suffix '' is not one"):
        read_folder(tmp_path)
    for wrong in ({"num_frames": 0}, {"size": 0}, {"stride": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            read_folder(tmp_path, **wrong)
