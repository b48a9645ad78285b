"""Videos and animations as they are to be looked at: upright, in square pixels, opaque."""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from odd_media import EIGHT, corners, cover_first, set_matrix, write_odd
from PIL import Image

from vfengine.media.video import read_video, write_video
from vfengine.serving.frames import read_source


def both_readers(path):
    """First frame of training's reader, and that of the server's at the same size."""
    first = read_video(path).frames[0]
    sent = read_source(path, *first.shape[1::-1], 10.0)[0]
    assert np.array_equal(first, sent)
    return first


@pytest.mark.parametrize("place", EIGHT, ids=lambda place: str(place.exif))
def test_all_eight_display_matrices(tmp_path, place):
    path = tmp_path / "a.mp4"
    write_odd(path, corners()[None])
    plain = read_video(path).frames[0]
    set_matrix(path, place.matrix)
    assert np.array_equal(both_readers(path), place.shows(plain))


@pytest.mark.parametrize("place", EIGHT, ids=lambda place: str(place.exif))
def test_turned_mirrored_and_stretched_at_once(tmp_path, place):
    path = tmp_path / "a.mp4"
    write_odd(path, corners()[None], aspect=2)
    set_matrix(path, place.matrix)
    shown = place.shows(corners(32, 96))
    first = both_readers(path)
    assert first.shape == shown.shape
    assert np.abs(first.astype(int) - shown).mean() < 6


@pytest.mark.parametrize(
    ("aspect", "size"),
    [
        ("1", (32, 48)),
        ("4/3", (32, 64)),
        ("8/9", (36, 48)),
        ("0", (32, 48)),
        ("1001/1000", (32, 48)),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_pixels_become_square_and_sides_only_grow(tmp_path, suffix, aspect, size):
    path = tmp_path / f"a{suffix}"
    write_odd(path, corners()[None], aspect=Fraction(aspect))
    assert both_readers(path).shape == (*size, 3)


def test_pixels_of_an_absurd_shape_are_refused(tmp_path):
    path = tmp_path / "a.mp4"
    write_odd(path, corners()[None], aspect=20)
    with pytest.raises(ValueError, match=r"a\.mp4.*16 times as wide as high, got 20"):
        read_video(path)
    with pytest.raises(ValueError, match="16 times as wide as high"):
        read_source(path, 48, 32, 10.0)


def test_a_cover_is_not_the_video(tmp_path):
    path = tmp_path / "a.mp4"
    write_odd(path, corners()[None].repeat(3, 0), cover=np.full((8, 8, 3), 9, np.uint8))
    expected = read_video(path).frames
    cover_first(path)
    video = read_video(path)
    assert not video.truncated
    assert np.array_equal(video.frames, expected)
    assert np.array_equal(read_source(path, 48, 32, 10.0), expected)


def test_a_cover_alone_is_no_video(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_odd(path, corners()[None], cover=np.full((8, 8, 3), 9, np.uint8))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"trak", b"free"))
    with pytest.raises(ValueError, match=r"a\.mp4.*holds no video stream, but a cover picture"):
        read_video(path)


HALF = np.full((2, 16, 16, 4), (240, 10, 10, 255), np.uint8)
HALF[:, 8:, :, 3] = 0  # the lower half is red that nobody sees


@pytest.mark.parametrize(
    ("name", "codec", "form"),
    [
        ("a.webm", "libvpx-vp9", "yuva420p"),
        ("b.webm", "libvpx", "yuva420p"),
        ("c.mov", "qtrle", "argb"),
        ("d.mkv", "ffv1", "bgra"),
        ("e.mov", "prores_ks", "yuva444p10le"),
        ("f.mov", "png", "rgba"),
    ],
)
def test_what_is_transparent_in_a_video_is_black(tmp_path, name, codec, form):
    options = {"auto-alt-ref": "0"} if name.endswith(".webm") else {}
    path = tmp_path / name
    write_odd(path, HALF, codec, form, **options)
    sent = () if name.endswith(".mov") else (read_source(path, 16, 16, 10.0),)
    for frames in (read_video(path).frames, *sent):
        assert len(frames) == 2
        assert np.abs(frames[:, :6].astype(int) - (240, 10, 10)).max() < 16
        assert frames[:, 10:].max() < 8


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".apng"])
def test_what_is_transparent_in_an_animation_is_black(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    first, second = map(Image.fromarray, (HALF[0], HALF[1] // np.uint8([1, 2, 1, 1])))
    options = {"lossless": True, "exact": True} if suffix == ".webp" else {"disposal": 2}
    kind = "PNG" if "png" in suffix else suffix[1:].upper()
    first.save(path, kind, save_all=True, append_images=[second], duration=100, **options)
    video = read_video(path)
    assert len(video.frames) == 2 and video.fps == pytest.approx(10)
    assert np.abs(video.frames[:, :8].astype(int) - (240, 10, 10)).max() < 10
    assert video.frames[:, 8:].max() == 0
    if "png" not in suffix:
        assert np.array_equal(read_source(path, 16, 16, 10.0), video.frames)


@pytest.mark.parametrize("place", EIGHT, ids=lambda place: str(place.exif))
@pytest.mark.parametrize("suffix", [".webp", ".png"])
def test_animations_are_turned_as_their_exif_says(tmp_path, place, suffix):
    exif = Image.Exif()
    exif[0x0112] = place.exif
    path = tmp_path / f"a{suffix}"
    frames = [Image.fromarray(corners()), Image.fromarray(corners()[::-1].copy())]
    options = {"save_all": True, "append_images": frames[1:], "duration": 100}
    frames[0].save(path, exif=exif, lossless=True, **options)
    expected = [place.shows(np.asarray(frame)) for frame in frames]
    assert np.array_equal(read_video(path).frames, expected)


def test_a_rate_that_the_header_has_wrong_is_measured(tmp_path):
    path = tmp_path / "a.mkv"
    still = corners()[None].repeat(9, 0)
    write_odd(path, still, "ffv1", "bgr0", ticks=[0, 20, 40, 80, 100, 120, 140, 180, 200])
    assert read_video(path).fps == pytest.approx(0.4)  # 8 pauses in 20 seconds
    write_odd(path, still, "ffv1", "bgr0")
    assert read_video(path).fps == 10.0


def test_the_content_says_the_format_and_not_the_name(tmp_path):
    """An animation is decoded as one whatever its name, and a video too."""
    clip = corners(16, 16)[None].repeat(2, 0)
    for suffix, other in ((".gif", ".mp4"), (".webp", ".mkv"), (".mkv", ".gif")):
        write_video(tmp_path / f"a{suffix}", clip)
        expected = read_video(tmp_path / f"a{suffix}").frames
        (tmp_path / f"a{suffix}").rename(tmp_path / f"b{other}")
        assert np.array_equal(read_video(tmp_path / f"b{other}").frames, expected)


def test_a_title_in_another_encoding_is_no_fault(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, corners(16, 16)[None], metadata="a title")
    path.write_bytes(path.read_bytes().replace(b"a title", b"\xe4 title"))
    assert both_readers(path).shape == (16, 16, 3)


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile other.mkv\n", "#EXTM3U\nother.mkv\n"])
def test_a_file_that_names_others_is_not_a_video(tmp_path, text):
    write_video(tmp_path / "other.mkv", corners(16, 16)[None])
    for name in ("list.mp4", "list.ts", "list.m3u8"):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}: not a readable video"):
            read_video(tmp_path / name)


@pytest.mark.parametrize(
    ("codec", "form"), [("libx264", "yuv420p10le"), ("ffv1", "gray16le"), ("mjpeg", "yuvj422p")]
)
def test_other_depths_and_ranges(tmp_path, codec, form):
    path = tmp_path / "a.mkv"
    grey = np.repeat(corners()[None].mean(-1, keepdims=True).astype(np.uint8), 3, -1)
    write_odd(path, grey, codec, form)
    assert np.abs(read_video(path).frames[0].astype(int) - grey[0]).mean() < 4


def bomb(width, height, kind):
    """A gif or png that only says what size it has."""
    if kind == "gif":
        size = width.to_bytes(2, "little") + height.to_bytes(2, "little")
        frame = b"," + bytes(4) + size + b"\0\x02\x02\x44\x01\0;"
        return b"GIF89a" + size + b"\x80\0\0" + bytes(6) + frame
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + size + b"\x08\x02\0\0\0" + bytes(40)


@pytest.mark.parametrize("kind", ["gif", "png"])
def test_bombs_are_refused_by_name(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(bomb(30_000, 30_000, kind))
    with pytest.raises(
        ValueError, match=rf"a\.{kind}: not a readable picture or animation"
    ) as refused:
        read_video(path)
    assert "\n" not in str(refused.value)


def test_a_frame_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_odd(path, corners()[None])
    monkeypatch.setattr("vfengine.media.decoding.MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"a\.mp4.*may have 1000 pixels, got 48 x 32"):
        read_video(path)


FORKS = """
import sys
from multiprocessing import get_context
from vfengine.media.video import read_video
path = sys.argv[1]
first = read_video(path).frames
with get_context("fork").Pool(1) as pool:
    again = pool.apply_async(read_video, (path,)).get(30).frames
assert (first == again).all()
"""


def test_a_process_that_is_forked_after_reading_reads_too(tmp_path):
    """The threads that convert frames would be missing in it, and it would wait for them."""
    write_odd(tmp_path / "a.mp4", corners()[None])
    subprocess.run([sys.executable, "-c", FORKS, tmp_path / "a.mp4"], check=True)


FORKS_MEANWHILE = """
import gc, os, signal, sys
from vfengine.media.video import VideoReader
frames = iter(VideoReader(sys.argv[1]))
next(frames)
assert len(os.listdir("/proc/self/task")) == int(sys.argv[2])
child = os.fork()
if child == 0:
    signal.alarm(30)
    frames.close()
    del frames
    gc.collect()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("suffix, codec", [("mp4", "h264"), ("mp4", "av1"), ("webm", "vp9")])
def test_a_process_that_is_forked_while_reading_can_let_go_of_the_file(tmp_path, suffix, codec):
    """A decoder's threads would be missing in it, and it would wait for them."""
    path = tmp_path / f"a.{suffix}"
    write_video(path, np.stack([corners()] * 4), codec=codec)
    counted = "import os, vfengine.media.video; print(len(os.listdir('/proc/self/task')))"
    said = subprocess.run([sys.executable, "-c", counted], check=True, capture_output=True)
    command = [sys.executable, "-c", FORKS_MEANWHILE, path, said.stdout.decode().strip()]
    subprocess.run(command, check=True)
