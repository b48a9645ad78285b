"""Clips to files and back: counts, pixels, bytes, and what happens when things break off."""

import os
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, features

from vfengine import media
from vfengine.media import video as video_io
from vfengine.media.codecs import SUFFIXES as ENCODED
from vfengine.media.pictures import enlarge, sheet
from vfengine.media.video import (
    SUFFIXES,
    VideoReader,
    check_target,
    read_video,
    write_video,
)

ANIMATED = [suffix for suffix in SUFFIXES if suffix != ".png"]


def moving_clip(num_frames=16, height=64, width=64):
    """A disc over a colour ramp, uint8 [N, H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    clip = np.zeros((num_frames, height, width, 3), np.uint8)
    for i in range(num_frames):
        disc = (x - width / 4 - i) ** 2 + (y - height / 2) ** 2 < (height / 4) ** 2
        clip[i] = np.stack([x * 2, y * 2, 40 + 150 * disc], axis=-1)
    return clip


@pytest.mark.parametrize("suffix", ANIMATED)
@pytest.mark.parametrize("clip", ["moving", "frozen", "single", "odd"])
def test_every_frame_comes_back(tmp_path, suffix, clip):
    frames = {
        "moving": moving_clip(),
        "frozen": np.full((16, 64, 64, 3), (200, 60, 30), np.uint8),
        "single": moving_clip(1),
        "odd": moving_clip(3, 33, 47),
    }[clip]
    path = tmp_path / f"clip{suffix}"
    write_video(path, frames, fps=12.5)
    video = read_video(path)
    assert video.frames.dtype == np.uint8
    assert len(video.frames) == len(frames)
    assert not video.truncated
    if clip != "single":
        assert video.fps == pytest.approx(12.5, rel=0.01)
    _, height, width, _ = frames.shape
    error = np.abs(video.frames[:, :height, :width].astype(int) - frames).mean()
    assert error <= (0.0 if suffix in (".webp", ".mkv") else 5.0)
    even = suffix in (".mp4", ".webm")
    expected = (height + height % 2, width + width % 2) if even else (height, width)
    assert video.frames.shape[1:3] == expected
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_same_frames_same_bytes(tmp_path, suffix):
    rng = np.random.default_rng(0)
    written = set()
    for k in range(12):
        # Other allocations in between: an encoder that reads stale memory would show it.
        _ = [rng.bytes(int(n)) for n in rng.integers(1_000, 100_000, 20)]
        path = tmp_path / f"{k}{suffix}"
        write_video(path, moving_clip(), fps=8)
        written.add(path.read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_colours_are_tagged_and_kept(tmp_path, suffix):
    colours = [(0, 0, 0), (255, 255, 255), (128, 128, 128), (200, 60, 30), (30, 60, 200)]
    frames = np.stack([np.full((32, 32, 3), c, np.uint8) for c in colours])
    path = tmp_path / f"colours{suffix}"
    write_video(path, frames, fps=8)
    assert np.abs(read_video(path).frames.astype(int) - frames).max() <= 4
    with av.open(str(path)) as file:
        frame = next(file.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (1, 1)  # BT.709, limited
        assert frame.format.name == "yuv420p"


def test_write_rejects_what_it_cannot_write(tmp_path):
    clip = moving_clip(2)
    with pytest.raises(ValueError, match=r"unknown suffix '\.avi', expected one of \.mp4, \.webm"):
        write_video(tmp_path / "a.avi", clip)
    with pytest.raises(ValueError, match="unknown suffix ''"):
        write_video(tmp_path / "a", clip)
    with pytest.raises(TypeError, match="uint8 array, got float64"):
        write_video(tmp_path / "a.mp4", clip / 255.0)
    with pytest.raises(ValueError, match=r"\[N, H, W, 3\], got \[2, 64, 64\]"):
        write_video(tmp_path / "a.mp4", clip[..., 0])
    with pytest.raises(ValueError, match=r"\[0, 64, 64, 3\]"):
        write_video(tmp_path / "a.gif", clip[:0])
    for fps in (0, -1, float("nan"), float("inf"), 2000, 0.0004, 1e-9, Fraction(1, 101)):
        for suffix in SUFFIXES:
            with pytest.raises(ValueError, match=r"fps must be in \[0\.01, 1000\], got"):
                write_video(tmp_path / f"a{suffix}", clip, fps=fps)
    for fps in ("8", None, True, 8j, [8]):
        with pytest.raises(TypeError, match="fps must be a number, got"):
            write_video(tmp_path / "a.mp4", clip, fps=fps)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write_video(tmp_path / "missing" / "a.mp4", clip)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rates_of_any_kind_and_at_the_ends_are_written(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    for fps in (Fraction(25, 2), np.float32(12.5), np.float64(12.5), np.int64(5), 0.01, 1000):
        write_video(path, moving_clip(3, 16, 16), fps=fps)
        video = read_video(path)
        if suffix != ".png":
            assert len(video.frames) == 3
            fastest = 100 if suffix == ".gif" else 1000
            assert video.fps == pytest.approx(min(fps, fastest), rel=0.01)


def test_target_is_checked(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_target(tmp_path / "folder.mp4")
    with pytest.raises(NotADirectoryError, match="not a folder"):
        check_target(tmp_path / "file" / "a.mp4")
    assert check_target(str(tmp_path / "A.MP4")) == tmp_path / "A.MP4"


def test_folder_without_write_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="not writable"):
        check_target(tmp_path / "a.mp4")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_break_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix, error):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    writer = video_io._WRITERS.get(suffix, video_io.encode)

    def breaks_off(temporary, *rest):
        writer(temporary, *rest)
        raise error

    monkeypatch.setitem(video_io._WRITERS, suffix, breaks_off)
    monkeypatch.setattr(video_io, "encode", breaks_off)
    if suffix in ENCODED:
        monkeypatch.delitem(video_io._WRITERS, suffix)
    with pytest.raises(error):
        write_video(path, moving_clip(2))
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == b"old"


def test_sheet_places_every_frame():
    clip = moving_clip(20, 8, 6)
    picture = sheet(clip, columns=16, gap=1)
    assert picture.shape == (2 * 9 - 1, 16 * 7 - 1, 3)
    for i in range(20):
        top, left = i // 16 * 9, i % 16 * 7
        assert np.array_equal(picture[top : top + 8, left : left + 6], clip[i])
    assert not picture[9:, 4 * 7 :].any()
    clips = np.stack([clip[:4], clip[4:8]])
    both = sheet(clips, gap=0)
    assert np.array_equal(both, np.concatenate([np.concatenate(list(c), 1) for c in clips]))
    with pytest.raises(ValueError, match="frames must be"):
        sheet(clip[0])
    with pytest.raises(ValueError, match="columns >= 1"):
        sheet(clip, columns=0)


def test_png_is_the_sheet(tmp_path):
    clip = moving_clip()
    write_video(tmp_path / "a.png", clip)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), sheet(clip))


def test_enlarge():
    clip = moving_clip(2, 8, 6)
    nearest = enlarge(clip, 3)
    assert nearest.shape == (2, 24, 18, 3)
    assert np.array_equal(nearest[:, 1::3, 1::3], clip)
    smooth = enlarge(clip, 3, "lanczos")
    assert smooth.shape == nearest.shape
    assert smooth.dtype == np.uint8
    assert not np.array_equal(smooth, nearest)
    assert enlarge(clip, 1, "lanczos") is clip
    for factor in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="factor must be an int"):
            enlarge(clip, factor)
    with pytest.raises(ValueError, match="filter must be"):
        enlarge(clip, 2, "cubic")


def write_long(path, codec, num_frames=60, rotation_matrix=None, **options):
    """A noisy clip whose size is spread evenly over the file, indexed at its front."""
    rng = np.random.default_rng(0)
    mux = {"movflags": "+faststart"} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=mux) as file:
        stream = file.add_stream(codec, rate=Fraction(10), options={"g": "10", **options})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for frame in moving_clip(num_frames, 64, 96):
            noisy = frame // 2 + rng.integers(0, 120, frame.shape, dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(noisy, format="rgb24")))
        file.mux(stream.encode())


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        (".mp4", "libx264"),
        (".mov", "mpeg4"),
        (".avi", "mpeg4"),
        (".mkv", "libx264"),
        (".webm", "libvpx-vp9"),
        (".gif", None),
    ],
)
def test_truncated_files_give_the_frames_they_hold(tmp_path, suffix, codec):
    path = tmp_path / f"whole{suffix}"
    if codec is None:
        noise = np.random.default_rng(0).integers(0, 255, (60, 32, 48, 3), dtype=np.uint8)
        write_video(path, noise, fps=10)
    else:
        write_long(path, codec, **({"cpu-used": "8"} if codec == "libvpx-vp9" else {}))
    whole = read_video(path)
    assert len(whole.frames) == 60
    assert not whole.truncated
    assert whole.fps == pytest.approx(10)

    data = path.read_bytes()
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(data[: len(data) * 6 // 10])
    part = read_video(cut)
    assert part.truncated
    assert 20 <= len(part.frames) <= 40
    assert np.array_equal(part.frames, whole.frames[: len(part.frames)])


def test_header_is_not_believed(tmp_path):
    path = tmp_path / "short.avi"
    write_long(path, "mpeg4", num_frames=12)
    data = bytearray(path.read_bytes())
    frames_field = data.index(b"strh") + 8 + 32  # dwLength of AVISTREAMHEADER
    assert int.from_bytes(data[frames_field : frames_field + 4], "little") == 12
    data[frames_field : frames_field + 4] = (400).to_bytes(4, "little")
    path.write_bytes(data)
    video = read_video(path)
    assert len(video.frames) == 12
    assert video.truncated


def test_rotated_video_is_turned_upright(tmp_path):
    path = tmp_path / "phone.mov"
    write_long(path, "libx264", num_frames=2)
    upright = read_video(path).frames
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    one, minus_one = (1 << 16).to_bytes(4, "big"), (-(1 << 16)).to_bytes(4, "big", signed=True)
    zero, last = bytes(4), (1 << 30).to_bytes(4, "big")
    # "play turned a quarter clockwise", as a phone held upright writes it
    quarter = [zero, one, zero, minus_one, zero, zero, zero, zero, last]
    data[matrix : matrix + 36] = b"".join(quarter)
    path.write_bytes(data)
    assert np.array_equal(read_video(path).frames, np.rot90(upright, -1, axes=(1, 2)))


def test_unreadable_files_are_refused(tmp_path):
    for name in ("a.mp4", "a.gif", "a.webp", "a.avi"):
        path = tmp_path / name
        path.write_bytes(b"not a video at all" * 50)
        with pytest.raises(ValueError, match=r"not a readable|no frame could be decoded"):
            read_video(path)
        path.write_bytes(b"")
        with pytest.raises(ValueError, match=r"not a readable|no frame could be decoded"):
            read_video(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_video(tmp_path / "missing.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=44100, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 44100
        file.mux(stream.encode(sound))
        file.mux(stream.encode())
    with pytest.raises(ValueError, match="holds no video stream"):
        read_video(tmp_path / "sound.mp4")


def test_reader_can_be_used_twice(tmp_path):
    write_video(tmp_path / "a.mp4", moving_clip(5))
    reader = VideoReader(tmp_path / "a.mp4")
    assert len(list(reader)) == len(list(reader)) == 5


def test_a_missing_encoder_is_told_before_a_file_is_written(tmp_path, monkeypatch, cli):
    monkeypatch.setattr(video_io, "has_encoder", lambda name: name != "gif")
    monkeypatch.setattr(features, "check", lambda name: name != "webp")
    for name, package in (("a.gif", "PyAV"), ("a.webp", "Pillow")):
        with pytest.raises(ValueError, match=rf"{name}: {package} [\d.]+ has no encoder for it"):
            check_target(tmp_path / name)
        status, out, err = cli("--label", "jump", "--output", name)
        assert (status, out, err.count("\n")) == (2, "", 1)
    assert check_target(tmp_path / "a.png") and check_target(tmp_path / "a.mp4")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("version", "status"), [("16.1.0", 2), ("17.0.0", 0), ("100.0.0rc1", 0)])
def test_a_pyav_that_is_too_old_is_told_before_sampling(version, status, monkeypatch, cli):
    monkeypatch.setattr(av, "__version__", version)
    for module in ("codecs", "video"):  # imported anew, and put back
        monkeypatch.setattr(media, module, getattr(media, module))
        monkeypatch.delitem(sys.modules, f"vfengine.media.{module}")
    found, _, err = cli("--label", "jump", "--output", "a.png", steps="1")
    assert found == status
    if status:
        expected = f"vfengine.generate: error: videos need PyAV 17 or newer, got {version}\n"
        assert err == expected
