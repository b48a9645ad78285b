"""Texts inside of files: every format gives back what it was given, and trusts nobody."""

import json
import os

import av
import numpy as np
import pytest
from PIL import Image
from test_video_io import moving_clip

from vfengine.media.codecs import available_codecs
from vfengine.media.metadata import MAX_BYTES, exif_with_description, read_metadata
from vfengine.media.video import SUFFIXES, read_video, write_video

TEXTS = {
    "json": json.dumps({"label": "walk", "prompt": 'a "quoted" line\nand = ; # \\ more', "n": 1.5}),
    "letter": "x",
    "blocks": "0123456789" * 51,  # 510: two full blocks of a gif
    "unicode": "ein Mädchen läuft — 跑 \U0001f3c3",
    "long": "long " * (MAX_BYTES // 5),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_comes_back_and_changes_no_frame(tmp_path, suffix, name):
    frames, text = moving_clip(3, 32, 48), TEXTS[name]
    with_text, without = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    write_video(with_text, frames, 12.5, metadata=text)
    write_video(without, frames, 12.5)
    assert read_metadata(with_text) == text
    assert read_metadata(str(without)) is None
    a, b = read_video(with_text), read_video(without)
    assert np.array_equal(a.frames, b.frames)
    assert (a.fps, a.truncated) == (b.fps, False)
    data = with_text.read_bytes()
    write_video(with_text, frames, 12.5, metadata=text)
    assert with_text.read_bytes() == data


@pytest.mark.parametrize(
    ("suffix", "codec"), [(s, c) for s in (".mp4", ".webm", ".mkv") for c in available_codecs(s)]
)
def test_files_of_every_codec_carry_texts(tmp_path, suffix, codec):
    path = tmp_path / f"a{suffix}"
    write_video(path, moving_clip(2), 8, codec=codec, metadata=TEXTS["json"])
    assert read_metadata(path) == TEXTS["json"]
    assert len(read_video(path).frames) == 2


def test_others_read_the_texts(tmp_path):
    text = TEXTS["json"]
    for suffix in SUFFIXES:
        write_video(tmp_path / f"a{suffix}", moving_clip(2), 8, metadata=text)
    for suffix in (".mp4", ".webm", ".mkv"):
        with av.open(str(tmp_path / f"a{suffix}")) as file:
            assert {k.lower(): v for k, v in file.metadata.items()}["comment"] == text
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["comment"] == text.encode()
        assert (image.n_frames, image.info["loop"]) == (2, 0)
    with Image.open(tmp_path / "a.webp") as image:
        assert image.getexif()[0x010E] == text  # ImageDescription
        assert image.n_frames == 2
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"Comment": text}


def test_a_picture_as_a_gif_carries_a_text(tmp_path):
    write_video(tmp_path / "a.gif", moving_clip(1), 8, metadata="one")
    assert read_metadata(tmp_path / "a.gif") == "one"
    assert len(read_video(tmp_path / "a.gif").frames) == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_texts_that_are_refused(tmp_path, suffix):
    for text, error in (
        ("", ValueError),
        ("a\0b", ValueError),
        ("\ud800", ValueError),
        ("x" * (MAX_BYTES + 1), ValueError),
        ("é" * (MAX_BYTES // 2 + 1), ValueError),
        (b"bytes", TypeError),
    ):
        with pytest.raises(error):
            write_video(tmp_path / f"a{suffix}", moving_clip(1), 8, metadata=text)
    assert os.listdir(tmp_path) == []


def test_texts_of_others(tmp_path):
    clip = moving_clip(2)
    pictures = [Image.fromarray(frame) for frame in clip]
    for number, comment in enumerate((b"made elsewhere", b"x" * 300, b"\xff\xfe")):
        file = tmp_path / f"{number}.gif"
        pictures[0].save(file, save_all=True, append_images=pictures[1:], comment=comment)
    assert read_metadata(tmp_path / "0.gif") == "made elsewhere"
    assert read_metadata(tmp_path / "1.gif") == "x" * 300
    with pytest.raises(ValueError, match=r"2\.gif: its text is not UTF-8"):
        read_metadata(tmp_path / "2.gif")
    exif = Image.Exif()
    exif[0x010F], exif[0x010E] = "a camera", "a walk"
    pictures[0].save(tmp_path / "a.webp", exif=exif)
    assert read_metadata(tmp_path / "a.webp") == "a walk"
    del exif[0x010E]
    pictures[0].save(tmp_path / "a.webp", exif=exif)
    assert read_metadata(tmp_path / "a.webp") is None
    pictures[0].save(tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png") is None


def test_long_texts_of_others_are_refused(tmp_path):
    file = tmp_path / "a.mkv"
    with av.open(str(file), "w") as output:
        output.metadata["comment"] = "x" * (MAX_BYTES + 1)
        stream = output.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "bgr0"
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(ValueError, match=f"its text is longer than {MAX_BYTES} bytes"):
        read_metadata(file)
    picture = Image.fromarray(moving_clip(1)[0])
    picture.save(tmp_path / "a.gif", comment=b"x" * (MAX_BYTES + 1))
    with pytest.raises(ValueError, match="is longer than"):
        read_metadata(tmp_path / "a.gif")
    picture.save(tmp_path / "a.webp", exif=exif_with_description(b"x" * (MAX_BYTES + 1)))
    with pytest.raises(ValueError, match="is longer than"):
        read_metadata(tmp_path / "a.webp")


def test_files_that_hold_nothing_of_the_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_metadata(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a\.txt: unknown suffix '\.txt', expected one of \.mp4"):
        read_metadata(tmp_path / "a.txt")
    for suffix in SUFFIXES:
        for data in (b"", b"not a video at all" * 50, b"ffconcat version 1.0\nfile b.mp4\n"):
            (tmp_path / f"a{suffix}").write_bytes(data)
            with pytest.raises(ValueError, match="not a readable"):
                read_metadata(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_raise_nothing_else(tmp_path, suffix):
    path, rng = tmp_path / f"a{suffix}", np.random.default_rng(0)
    write_video(path, moving_clip(2, 16, 16), 8, metadata=TEXTS["json"])
    whole = path.read_bytes()
    for _ in range(150):
        data = bytearray(whole[: int(rng.integers(1, len(whole)))])
        for place in rng.integers(0, min(len(data), 600), 3):
            data[place] = int(rng.integers(256))
        path.write_bytes(data)
        try:
            found = read_metadata(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert found is None or len(found.encode()) <= MAX_BYTES
