"""Videos that were sent, to go on from: formats, sizes and rates, limits, what is no video."""

from functools import partial

import av
import numpy as np
import pytest
from conftest import save_tiny
from serving_engines import engine_of, run_all
from serving_jobs import add, frames_of, put, settings_of

from vfengine.media.video import read_video, write_video
from vfengine.serving import frames
from vfengine.serving.jobs import SOURCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that animates pictures."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", clean_share=0.5)


@pytest.fixture
def engine(folder, store):
    return engine_of(folder, store)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
def test_a_clip_that_was_sent_goes_on(engine, store, tmp_path, suffix):
    shades = np.linspace(40, 200, 8).astype(np.uint8)
    sent = np.broadcast_to(shades[:, None, None, None], (8, 16, 16, 3)).copy()
    write_video(tmp_path / f"sent{suffix}", sent, 8.0)
    decoded = read_video(tmp_path / f"sent{suffix}").frames
    (name,) = add(store, settings_of(num_frames=2, extends=""))
    put(store, name, (tmp_path / f"sent{suffix}").read_bytes(), SOURCE)
    run_all(engine)
    made = frames_of(store, name)
    assert len(made) == 10 and np.array_equal(made[:8], decoded)


@pytest.mark.parametrize("name, codec", [("a.mov", "png"), ("a.mkv", "rawvideo")])
def test_seldom_codecs_are_not_read(tmp_path, name, codec):
    with av.open(str(tmp_path / name), "w") as file:
        stream = file.add_stream(codec, rate=8)
        stream.width, stream.height = 16, 16
        stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        file.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(ValueError, match=f"a video in {codec} is not read"):
        frames.read_source(tmp_path / name, 16, 16, 8.0)


def test_sound_is_left_out(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream, sound = file.add_stream("libx264", rate=8), file.add_stream("aac", rate=48000)
        stream.width, stream.height = 16, 16
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        silence = np.zeros((1, 48000 * 3 // 8), np.float32)
        heard = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        heard.rate = 48000
        file.mux([*stream.encode(), *sound.encode(heard), *sound.encode()])
    assert frames.read_source(tmp_path / "a.mp4", 16, 16, 8.0).shape == (3, 16, 16, 3)


def test_a_file_that_names_others_is_not_followed(tmp_path):
    """What FFmpeg would take for a playlist, under the first bytes of a video too."""
    write_video(tmp_path / "other.webm", np.zeros((3, 16, 16, 3), np.uint8), 8.0)
    lists = (b"ffconcat version 1.0\nfile other.webm\n", b"#EXTM3U\nother.webm\n")
    for text in lists:
        for start in (b"", b"\0\0\0\x18ftyp", b"\x1a\x45\xdf\xa3"):
            (tmp_path / "sent").write_bytes(start + text)
            with pytest.raises(ValueError):
                frames.read_source(tmp_path / "sent", 16, 16, 8.0)


def test_a_clip_of_another_size_and_rate(engine, store, tmp_path):
    sent = np.random.default_rng(0).integers(0, 256, (12, 24, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "sent.webp", sent, 24.0)
    (name,) = add(store, settings_of(num_frames=2, extends=""))
    put(store, name, (tmp_path / "sent.webp").read_bytes(), SOURCE)
    run_all(engine)
    assert frames_of(store, name).shape == (4 + 2, 16, 16, 3)  # half a second, at 8 a second


def test_limits_of_what_is_sent(tmp_path, monkeypatch):
    write_video(tmp_path / "sent.webm", np.zeros((6, 16, 16, 3), np.uint8), 8.0)
    read = partial(frames.read_source, tmp_path / "sent.webm", 16, 16, 8.0)
    assert len(read()) == 6
    for name, most, said in (
        ("MAX_FRAMES", 5, "more than 5 frames"),
        ("MAX_ALL_PIXELS", 3 * 256, "more than 3 frames"),
        ("MAX_PIXELS", 255, "may have 255 pixels, got 16x16"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(frames, name, most)
            with pytest.raises(ValueError, match=said):
                read()
    with pytest.raises(ValueError, match="more than 1000 frames"):
        frames.read_source(tmp_path / "sent.webm", 16, 16, 2000.0)


@pytest.mark.parametrize("deleted", [False, True])
def test_reading_a_long_video_ends_too(engine, store, tmp_path, monkeypatch, deleted):
    write_video(tmp_path / "sent.webm", np.zeros((6, 16, 16, 3), np.uint8), 8.0)
    (name,) = add(store, settings_of(num_frames=2, extends=""))
    put(store, name, (tmp_path / "sent.webm").read_bytes(), SOURCE)
    seen, fitted = [], frames._fitted

    def fitting(*picture):
        seen.append(store.delete(name) if deleted else engine.stop.set())
        return fitted(*picture)

    monkeypatch.setattr(frames, "_fitted", fitting)
    engine.run_once()
    assert len(seen) == 1
    assert not store.folder_of(name).exists() if deleted else store.get(name).status == "queued"


@pytest.mark.parametrize(
    "data, said",
    [
        (b"#EXTM3U\nfile:///etc/hostname\n", "expected a video: mp4, webm, gif or animated webp"),
        (b"", "expected a video"),
        (b"\0\0\0\x18ftypisom", "the video cannot be decoded"),
        (b"\x1a\x45\xdf\xa3 nothing", "the video cannot be decoded"),
        (b"GIF89a nothing", "the animation cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n nothing", "not a sheet of frames"),
    ],
)
def test_what_is_no_video(engine, store, data, said):
    (name,) = add(store, settings_of(num_frames=2, extends=""))
    put(store, name, data, SOURCE)
    run_all(engine)
    error = store.get(name).error
    assert error["code"] == "invalid_request" and said in error["message"]
    assert str(store.folder) not in error["message"]
