"""A user's own folder: classes, cutting, and everything a real folder contains that is no video."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from odd_media import corners
from PIL import Image

from vfengine.media.video import write_video
from vfengine.training.folder import VIDEO_SUFFIXES, rate_of, read_folder


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


# -- links, and what nobody put there as data ------------------------------------------------------


def classes(folder, *names):
    """Folders with a video of four frames each."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_video(folder / name / "a.webp", numbered(4))


def reasons_of(data, folder):
    return {path.relative_to(folder).as_posix(): reason for path, reason in data.skipped}


def test_a_class_has_the_name_of_its_entry(tmp_path):
    data, videos = tmp_path / "data", tmp_path / "videos"
    classes(videos, "monday/raw", "tuesday/raw", "c")
    data.mkdir()
    for name, target in (("run", "monday/raw"), ("walk", "tuesday/raw"), ("again", "c")):
        (data / name).symlink_to(videos / target, target_is_directory=True)
    assert read_folder(data, 4, 16).label_names == ("again", "run", "walk")
    (tmp_path / "link").symlink_to(videos / "c")
    assert read_folder(tmp_path / "link", 4, 16).label_names == ("link",)


def test_the_folder_itself_may_be_named_by_dots(tmp_path, monkeypatch):
    classes(tmp_path, "waves/deep")
    write_video(tmp_path / "waves" / "b.webp", numbered(4))
    monkeypatch.chdir(tmp_path / "waves" / "deep")
    assert read_folder(".", 4, 16).label_names == ("deep",)
    assert read_folder("..", 4, 16).label_names == ("deep",)
    (tmp_path / "waves" / "deep" / "a.webp").unlink()
    (tmp_path / "waves" / "deep").rmdir()
    monkeypatch.chdir(tmp_path / "waves")
    assert read_folder(".", 4, 16).label_names == ("waves",)


LEFT_BEHIND = ("__MACOSX", "@eaDir", "lost+found", ".ipynb_checkpoints", ".git", "$RECYCLE.BIN")


def test_what_systems_leave_behind_is_passed_over_at_any_depth(tmp_path):
    classes(tmp_path, "walk", "walk/deeper", *LEFT_BEHIND, *(f"walk/{n}/x" for n in LEFT_BEHIND))
    for place in (tmp_path, tmp_path / "walk", tmp_path / "walk" / "deeper"):
        for name in ("Thumbs.db", ".DS_Store", "._a.webp", "desktop.ini", "Icon\r", "._clip.mp4"):
            (place / name).write_bytes(b"no video")
    data = read_folder(tmp_path, 4, 16)
    assert (data.label_names, data.skipped) == (("walk",), ())
    assert len(data.clips) == 2
    (tmp_path / "b.webp").write_bytes((tmp_path / "walk" / "a.webp").read_bytes())
    assert reasons_of(read_folder(tmp_path, 4, 16), tmp_path).keys() == {"b.webp"}


def test_a_folder_with_no_class_but_remains_is_one_class(tmp_path):
    classes(tmp_path, "waves", "waves/__MACOSX", "waves/.hidden")
    data = read_folder(tmp_path / "waves", 4, 16)
    assert (data.label_names, len(data.clips)) == (("waves",), 1)


def test_names_that_only_look_like_remains_are_data(tmp_path):
    names = ("MACOSX", "a.b", "eaDir", "lost", "thumbs")
    classes(tmp_path, *names)
    assert read_folder(tmp_path, 4, 16).label_names == tuple(sorted(names))


def test_links_inside_a_class_are_followed_once(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    classes(data, "walk/z")
    classes(elsewhere, "more")
    walk = data / "walk"
    for name, target in {
        **{"a": walk / "z", "more": elsewhere / "more", "more2": elsewhere / "more"},
        **{"up": walk, "top": data, "self": walk / "self", "gone": walk / "none"},
    }.items():
        (walk / name).symlink_to(target)
    (walk / "b.webp").symlink_to(elsewhere / "more" / "a.webp")
    (walk / "lost.webp").symlink_to(elsewhere / "none.webp")
    found = read_folder(data, 4, 16)
    assert (found.label_names, len(found.clips)) == (("walk",), 3)  # z/a, more/a and b
    already = "leads to a folder that was already read"
    assert reasons_of(found, data) == {
        **{f"walk/{name}": already for name in ("a", "more2", "up", "top/walk")},
        **{f"walk/{name}": "suffix '' is not one of a video" for name in ("gone", "self")},
        "walk/lost.webp": "leads to no file",
    }


def test_what_is_no_regular_file_is_named(tmp_path):
    classes(tmp_path, "walk")
    os.mkfifo(tmp_path / "walk" / "pipe.mp4")  # which a reader would wait for
    data = read_folder(tmp_path, 4, 16)
    assert reasons_of(data, tmp_path) == {"walk/pipe.mp4": "no regular file"}


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    classes(tmp_path, "run", "walk/locked")
    listed = Path.iterdir

    def refuse(path):  # root may read anywhere
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    reasons = reasons_of(read_folder(tmp_path, 4, 16), tmp_path)
    assert reasons["walk/locked"] == "cannot be read (Permission denied)"


# -- pictures of all kinds, and rates --------------------------------------------------------------


def test_training_sees_what_a_player_shows(tmp_path):
    classes(tmp_path, "a")
    pixels = corners(16, 16)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(np.rot90(pixels))
    (tmp_path / "a" / "a.webp").unlink()
    turned.save(tmp_path / "a" / "a.webp", lossless=True, exif=exif)
    glass = np.dstack([pixels, np.full((16, 16), 255, np.uint8)])
    glass[:8, :, 3] = 0
    Image.fromarray(glass).save(tmp_path / "a" / "b.webp", lossless=True, exact=True)
    clips = read_folder(tmp_path, 1, 16).clips[:, 0]
    assert np.array_equal(clips[0], pixels)
    assert not clips[1, :8].any() and np.array_equal(clips[1, 8:], pixels[8:])


def test_bombs_and_broken_files_of_every_suffix_are_named(tmp_path):
    size = (30_000).to_bytes(2, "little") * 2
    for suffix in VIDEO_SUFFIXES:
        (tmp_path / f"bomb{suffix}").write_bytes(b"GIF89a" + size + b"\x80\0\0" + bytes(99))
        (tmp_path / f"text{suffix}").write_text("#EXTM3U\nother.mp4\n")
    write_video(tmp_path / "other.mp4", numbered(4))
    data = read_folder(tmp_path, 4, 16)
    assert len(data.clips) == 1
    assert len(data.skipped) == 2 * len(VIDEO_SUFFIXES)
    said = ("not a readable ", "no frame could be decoded")
    assert all(reason.startswith(said) for _, reason in data.skipped)


def test_rates_of_the_clips(tmp_path):
    for name, fps in (("a", 30), ("b", 15), ("c", 15)):
        write_video(tmp_path / f"{name}.webp", numbered(12), fps)
    Image.fromarray(numbered(1)[0]).save(tmp_path / "d.webp")
    assert read_folder(tmp_path, 4, 16).rates == pytest.approx((30, 15, 15), rel=0.01)
    assert read_folder(tmp_path, 4, 16, 3).rates == pytest.approx((10, 5, 5), rel=0.01)
    assert read_folder(tmp_path, 1, 16).rates[3] is None


@pytest.mark.parametrize(
    ("rates", "rate", "said"),
    [
        ((25.0, 25.0), 25.0, "the clips have 25 frames a second"),
        ((29.97, 30.0, None, 29.97), 29.97, "the clips have 29.97 frames a second"),
        (
            (10.0, 25.0, None, 10.0),
            10.0,
            "the clips differ in frames a second: 10 (2 of 4), 25 (1 of 4); their median is 10",
        ),
        ((24.0, 25.0), 24.0, "the clips differ in frames a second: 24 (1 of 2), 25 (1 of 2); "
         "their median is 24"),
        ((None, None), None, "the videos state no frame rate"),
    ],
)  # fmt: skip
def test_one_rate_of_many(rates, rate, said):
    assert rate_of(rates) == (rate, said)
