"""A folder of videos as captioned latents: captions beside videos, encoded once, found again."""

import numpy as np
import pytest
import torch
from test_folder import numbered
from tiny_parts import save_tiny_parts

from vfengine.media.video import write_video
from vfengine.training.captioned import CaptionedFolder
from vfengine.training.folder import Cutting, read_folder
from vfengine.training.latents import make_latents
from vfengine.training.parts import Coder, Parts

CUTTING = Cutting(num_frames=4, size=(16, 16), stride=1, seed=3)


@pytest.fixture
def videos(tmp_path):
    """Two classes: walk/a of 9 frames with two captions, walk/b of 5, jump_high/c of 4."""
    folder = tmp_path / "videos"
    for name, frames in (("walk/a", 9), ("walk/b", 5), ("jump_high/c", 4)):
        file = folder / f"{name}.webp"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_video(file, numbered(frames))
    (folder / "walk" / "a.txt").write_text("\ufeffa red person\n\n  a blue lawn \n", "utf-8")
    return folder


def test_clips_are_those_of_the_folder(videos, tmp_path):
    seen = []
    source = CaptionedFolder(videos, CUTTING, tmp_path / "kept", on_file=seen.append)
    expected = read_folder(videos, 4, 16, 1, seed=3)
    assert len(source) == len(expected.clips) == 4 and len(seen) == 3
    assert np.array_equal(source.frames(range(4)).numpy(), expected.clips)
    base = source.frames([3, 0], only_base=True)
    assert np.array_equal(base.numpy(), expected.clips[[3, 0], 2:3])
    assert [video.rate for video in source.videos] == list(expected.rates)
    again = CaptionedFolder(videos, CUTTING, tmp_path / "kept", on_file=seen.append)
    assert len(seen) == 3 and again.name == source.name  # counted once
    assert np.array_equal(again.frames([2]).numpy(), expected.clips[2:3])


def test_captions_are_those_beside_a_video_or_its_class(videos, tmp_path):
    source = CaptionedFolder(videos, CUTTING, tmp_path)
    assert source.prompts == {"jump_high": "jump high", "walk": "walk"}
    assert source.num_captions == 2 and source.skipped == []
    assert source.captions(0, 2) == ["jump high", "jump high"]
    for clip in (1, 2):  # both of a
        assert source.captions(clip, 3) == ["a red person", "a blue lawn", "a red person"]
    assert source.captions(3, 1) == ["walk"]


def test_names_tell_contents_and_cutting_apart(videos, tmp_path):
    def names(cutting=CUTTING):
        source = CaptionedFolder(videos, cutting, tmp_path / "kept")
        return source.name, source.captions_name

    first = names()
    (videos / "walk" / "b.txt").write_text("two people")
    told = names()
    assert told[0] == first[0] and told[1] != first[1]
    write_video(videos / "walk" / "b.webp", numbered(5)[::-1])
    changed = names()
    assert changed[0] != told[0]
    assert names(Cutting(4, (16, 16), 1, seed=4))[0] != changed[0]


def test_unusable_files_are_named(videos, tmp_path):
    (videos / "walk" / "broken.mp4").write_bytes(b"no video")
    (videos / "walk" / "alone.txt").write_text("of no video")
    (videos / "empty").mkdir()
    for _ in range(2):  # counted, and found again
        source = CaptionedFolder(videos, CUTTING, tmp_path / "kept")
        named = {path.name for path, _ in source.skipped}
        assert named == {"broken.mp4", "alone.txt", "empty"} and len(source) == 4
    short = Cutting(12, (16, 16), 1, seed=0)
    with pytest.raises(ValueError, match=r"no usable video \(.*too short: 4 frames, 12 needed"):
        CaptionedFolder(videos, short, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CaptionedFolder(tmp_path / "nowhere", CUTTING, tmp_path)


def test_bad_captions_and_changed_videos_are_refused(videos, tmp_path):
    source = CaptionedFolder(videos, CUTTING, tmp_path / "kept")
    write_video(videos / "walk" / "b.webp", numbered(9))
    with pytest.raises(ValueError, match=r"b\.webp has 2 clips, and had 1 before"):
        source.frames([3])
    (videos / "walk" / "b.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"b\.txt holds no caption"):
        CaptionedFolder(videos, CUTTING, tmp_path / "kept")
    (videos / "walk" / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"b\.txt is no text in UTF-8"):
        CaptionedFolder(videos, CUTTING, tmp_path / "kept")


def test_folder_becomes_latents_without_figures(videos, tmp_path):
    parts = Parts.read(*save_tiny_parts(tmp_path / "parts"))
    coder, kept = Coder(parts), tmp_path / "kept"
    source = CaptionedFolder(videos, CUTTING, kept)
    made = make_latents(source, parts, coder, kept, len(source), 2)
    assert made.shape == (4, 4, 4, 4, 4) and made.figure is None
    assert torch.equal(made.clips, coder.encode(source.frames(range(4))))
    assert torch.equal(made.captions[3], coder.states(["walk", "walk"]))
    assert made.take(np.random.default_rng(0), 3, 0.5, 2).figure is None
    (videos / "walk" / "b.txt").write_text("a red lawn")
    told = CaptionedFolder(videos, CUTTING, kept)
    told.frames = None  # not asked for again
    found = make_latents(told, parts, coder, kept, len(told), 2)
    assert torch.equal(found.clips, made.clips)
    assert torch.equal(found.captions[3, 0], coder.states(["a red lawn"])[0])
