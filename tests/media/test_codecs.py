"""Codecs of video files: frames, colours and bytes of each; what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from test_video_io import moving_clip

from vfengine.media import codecs
from vfengine.media.codecs import Encoding, available_codecs, check_encoding
from vfengine.media.video import SUFFIXES, check_target, read_video, write_video
from vfengine.names import CHROMAS, CODECS

KINDS = [
    (suffix, name, chroma)
    for suffix in codecs.SUFFIXES
    for name in available_codecs(suffix)
    for chroma in codecs._CODECS[name].chromas or (None,)
]
COLOURS = [(0, 0, 0), (255, 255, 255), (128, 128, 128), (200, 60, 30), (30, 60, 200)]


def coloured_edges(num_frames=4, size=48):
    """Slanted lines of a pixel in red on blue, which move."""
    y, x = np.mgrid[:size, :size]
    lines = np.stack([(x + y + i) % 3 == 0 for i in range(num_frames)])
    return np.where(lines[..., None], (220, 30, 30), (30, 60, 220)).astype(np.uint8)


def mean_error(video, frames):
    _, height, width, _ = frames.shape
    return np.abs(video.frames[:, :height, :width].astype(int) - frames).mean()


def test_the_names_are_those_of_the_command_line():
    assert set(codecs._CODECS) == set(CODECS)
    assert {chroma for codec in codecs._CODECS.values() for chroma in codec.chromas} == set(CHROMAS)
    assert set(codecs.SUFFIXES) < set(SUFFIXES)
    for suffix in codecs.SUFFIXES:  # of the PyAV that constraints.txt names
        assert available_codecs(suffix) == codecs._CONTAINERS[suffix].codecs
    assert available_codecs(".gif") == ()


@pytest.mark.parametrize(("suffix", "codec", "chroma"), KINDS)
@pytest.mark.parametrize("clip", ["moving", "frozen", "single", "odd", "tiny"])
def test_every_frame_comes_back_from_every_codec(tmp_path, suffix, codec, chroma, clip):
    frames = {
        "moving": moving_clip(),
        "frozen": np.full((16, 64, 64, 3), (200, 60, 30), np.uint8),
        "single": moving_clip(1),
        "odd": moving_clip(3, 33, 47),
        "tiny": moving_clip(5, 16, 16),
    }[clip]
    path = tmp_path / f"clip{suffix}"
    write_video(path, frames, 12.5, codec=codec, chroma=chroma)
    video = read_video(path)
    assert not video.truncated
    assert len(video.frames) == len(frames)
    assert mean_error(video, frames) <= (0.0 if codec == "ffv1" else 6.0)
    _, height, width, _ = frames.shape
    odd = (height % 2, width % 2) if chroma == "420" else (0, 0)  # needs even sides
    assert video.frames.shape[1:3] == (height + odd[0], width + odd[1])
    if clip != "single":
        assert video.fps == pytest.approx(12.5, rel=0.01)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(("suffix", "codec", "chroma"), KINDS)
def test_the_codec_is_the_one_asked_for(tmp_path, suffix, codec, chroma):
    frames = np.stack([np.full((32, 32, 3), c, np.uint8) for c in COLOURS])
    path = tmp_path / f"colours{suffix}"
    write_video(path, frames, 8, codec=codec, chroma=chroma)
    assert np.abs(read_video(path).frames.astype(int) - frames).max() <= (0 if not chroma else 4)
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        decoder = {"av1": ("av1", "libdav1d")}.get(codec, (codec,))
        assert stream.codec_context.name in decoder
        frame = next(file.decode(video=0))
        assert frame.format.name == (f"yuv{chroma}p" if chroma else "bgr0")
        if chroma:
            assert (frame.colorspace, frame.color_range) == (1, 1)  # BT.709, limited
    if (suffix, codec) == (".mp4", "hevc"):
        assert b"hvc1" in path.read_bytes()


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mp4", "h264"), (".mp4", "hevc"), (".webm", "vp9")]
)
def test_colours_of_every_pixel(tmp_path, suffix, codec):
    frames, errors = coloured_edges(), {}
    for chroma in CHROMAS:
        write_video(tmp_path / f"a{suffix}", frames, 8, codec=codec, chroma=chroma)
        errors[chroma] = mean_error(read_video(tmp_path / f"a{suffix}"), frames)
    assert errors["444"] < errors["420"] / 4, errors
    write_video(tmp_path / "a.mkv", frames)
    assert np.array_equal(read_video(tmp_path / "a.mkv").frames, frames)


@pytest.mark.parametrize("size", [16, 64])
def test_hevc_of_small_noise_has_the_same_bytes(tmp_path, size):
    """x265 takes decisions on frames of one block out of memory that it has not written."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (5, size, size, 3), dtype=np.uint8)
    found = set()
    for _ in range(4):
        used = [random.bytes(random.integers(1000, 400_000)) for _ in range(30)]
        used.clear()  # the memory that the encoder gets next is not zero
        write_video(tmp_path / "a.mp4", noise, 8, codec="hevc")
        found.add((tmp_path / "a.mp4").read_bytes())
    assert len(found) == 1


def test_ffv1_keeps_noise_bit_for_bit(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (7, 31, 45, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mkv", noise, 8)
    assert np.array_equal(read_video(tmp_path / "a.mkv").frames, noise)
    with av.open(str(tmp_path / "a.mkv")) as file:
        assert file.streams.video[0].codec_context.name == "ffv1"


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "vp9"])
def test_less_crf_is_a_larger_and_better_file(tmp_path, codec):
    rng = np.random.default_rng(0)
    frames = moving_clip() // 2 + rng.integers(0, 100, (16, 64, 64, 3), dtype=np.uint8)
    sizes, errors = [], []
    for crf in (codecs._CODECS[codec].crfs[1], 25, 50):
        write_video(tmp_path / "a.mkv", frames, 8, codec=codec, crf=crf)
        sizes.append((tmp_path / "a.mkv").stat().st_size)
        errors.append(mean_error(read_video(tmp_path / "a.mkv"), frames))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert sizes[0] > 2 * sizes[2]


def test_defaults_by_name_give_the_same_bytes(tmp_path):
    for suffix in codecs.SUFFIXES:
        default = check_encoding(suffix)
        write_video(tmp_path / f"a{suffix}", moving_clip(4), 8)
        write_video(tmp_path / f"b{suffix}", moving_clip(4), 8, **default._asdict())
        a, b = ((tmp_path / f"{name}{suffix}").read_bytes() for name in "ab")
        assert a == b
    assert check_encoding(".MP4") == Encoding("h264", 17, "420")
    assert check_encoding(".webm") == Encoding("vp9", 18, "420")
    assert check_encoding(".mkv") == Encoding("ffv1")
    assert check_encoding(".gif") == Encoding()


ALL_KINDS = """
import sys, hashlib, numpy as np
from pathlib import Path
from test_codecs import KINDS
from test_video_io import moving_clip
from vfengine.media.video import write_video
rng = np.random.default_rng(int(sys.argv[1]))
for suffix, codec, chroma in KINDS:
    for shape in ((6, 64, 64), (5, 34, 48), (3, 16, 16), (2, 32, 32), (1, 32, 32)):
        _ = [rng.bytes(int(n)) for n in rng.integers(1_000, 100_000, 20)]  # other allocations
        path = Path(sys.argv[2]) / f"a{suffix}"
        write_video(path, moving_clip(*shape), 8, codec=codec, chroma=chroma, metadata="the same")
        print(suffix, codec, chroma, shape, hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_same_bytes_in_every_process(tmp_path):
    """In memory of another content each time: an encoder that reads stale bytes would show it."""
    printed = set()
    for k, filling in enumerate(("0", "85", "170")):
        environment = {**os.environ, "MALLOC_PERTURB_": filling}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        run = [sys.executable, "-c", ALL_KINDS, str(k), str(tmp_path)]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        printed.add(done.stdout)
    assert len(printed) == 1
    assert len(printed.pop().splitlines()) == 5 * len(KINDS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codec": "vp9"}, "codec 'vp9': a .mp4 file does not take it; there for .mp4: h264, hevc"),
        ({"codec": "mpeg2"}, "codec 'mpeg2': a .mp4 file does not take it"),
        ({"crf": 52}, "crf of h264 must be an int from 0 to 51, got 52"),
        ({"crf": -1}, "crf of h264"),
        ({"crf": 17.5}, "must be an int from 0 to 51, got 17.5"),
        ({"codec": "av1", "crf": 0}, "crf of av1 must be an int from 1 to 63, got 0"),
        ({"codec": "av1", "chroma": "444"}, "chroma of av1 must be 420, got '444'"),
        ({"chroma": "422"}, "chroma of h264 must be 420 or 444, got '422'"),
    ],
)
def test_encodings_that_are_refused(tmp_path, settings, words):
    for refuse in (check_target, lambda path, **s: write_video(path, moving_clip(1), **s)):
        with pytest.raises(ValueError, match=words.replace(".", r"\.")):
            refuse(tmp_path / "a.mp4", **settings)
    assert os.listdir(tmp_path) == []


def test_formats_and_codecs_without_a_choice():
    for suffix in (".gif", ".webp", ".png"):
        for setting, value in (("codec", "h264"), ("crf", 20), ("chroma", "444")):
            with pytest.raises(ValueError, match=f"a {suffix} file takes no {setting}, got"):
                check_encoding(suffix, **{setting: value})
    for setting, value in (("crf", 20), ("chroma", "444")):
        with pytest.raises(ValueError, match=f"ffv1 is lossless: it takes no {setting}, got"):
            check_encoding(".mkv", **{setting: value})


def test_an_encoder_that_is_not_there(monkeypatch):
    hevc = codecs._CODECS["hevc"]._replace(encoder="libnothing")
    monkeypatch.setitem(codecs._CODECS, "hevc", hevc)
    assert available_codecs(".mp4") == ("h264", "av1")
    words = r"codec 'hevc': PyAV .* has no encoder for it; there for \.mp4: h264, av1"
    with pytest.raises(ValueError, match=words):
        check_encoding(".mp4", "hevc")


def test_sizes_are_tried():
    check_encoding(".mp4", "hevc", size=(16, 16))
    with pytest.raises(ValueError, match="av1 cannot encode frames of 20000 x 16"):
        check_encoding(".mp4", "av1", size=(16, 20000))
