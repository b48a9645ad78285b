"""vfengine/training/mocap.py: every action moves, a seed gives one clip, kept clips are safe."""

import os

import numpy as np
import pytest

from vfengine.training.mocap import ACTIONS, SECONDS, MocapRenderer, render_clips

SMALL = {"size": 16, "num_frames": 2}


@pytest.fixture(scope="module")
def renderer():
    renderer = MocapRenderer(size=32, num_frames=6)
    yield renderer
    renderer.close()


@pytest.fixture
def bare_room(renderer, monkeypatch):
    """Draws before a wall of one colour that no actor wears, so that the figure can be told."""
    side = 2 * renderer.size
    monkeypatch.setattr(renderer, "_room", lambda rng: np.full((side, side, 3), (0, 255, 1)))
    return renderer


# -- what is drawn ---------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ACTIONS)
def test_action_shows_a_moving_figure(bare_room, action):
    clip = bare_room.clip(action, seed=3)
    assert clip.shape == (6, 32, 32, 3)
    assert clip.dtype == np.uint8
    figure = (clip != (0, 255, 1)).any(-1)  # [N, H, W]
    share = figure.mean((1, 2))
    assert 0.04 < share.min() and share.max() < 0.6
    longer_side = np.maximum(figure.any(2).sum(1), figure.any(1).sum(1))
    assert longer_side.min() > 8 and longer_side.mean() > 18  # of 32: it fills the picture
    changed = (figure[1:] != figure[:-1]).mean((1, 2))
    assert changed.mean() > 0.02


def test_clips_differ_in_their_content_by_seed(renderer):
    clips = [renderer.clip("walk", seed) for seed in range(4)]
    for i in range(4):
        for j in range(i):
            assert np.abs(clips[i].astype(int) - clips[j]).mean() > 10


def test_actions_of_one_seed_share_their_room(renderer):
    walk, jump = renderer.clip("walk", 5), renderer.clip("jump", 5)
    assert np.array_equal(walk[:, 0, 0], jump[:, 0, 0])  # a corner that the figure does not reach
    assert not np.array_equal(walk, jump)


def test_clip_does_not_depend_on_the_clips_before_it(renderer):
    first = renderer.clip("kick", (7, 1))
    renderer.clip("roll", 8)
    assert np.array_equal(renderer.clip("kick", (7, 1)), first)


def test_unknown_action_is_refused(renderer):
    with pytest.raises(ValueError, match="unknown action 'fly': expected one of backflip, "):
        renderer.clip("fly", 0)


@pytest.mark.parametrize("action", ACTIONS)
def test_motion_is_interpolated_between_its_rows(renderer, action):
    motion = renderer.motions[action]
    assert motion.duration >= SECONDS[action] / 2
    row = len(motion.rows) // 2
    before, after = motion.times[row], motion.times[row + 1]
    at_row, between = motion.at(before), motion.at(0.7 * before + 0.3 * after)
    assert np.allclose(at_row[1:4], motion.rows[row, 1:4])
    root = 0.7 * motion.rows[row, 1:4] + 0.3 * motion.rows[row + 1, 1:4]
    assert np.allclose(between[1:4], root)
    for part in motion.quaternions:
        assert np.isclose(np.linalg.norm(between[part]), 1)
        assert abs(between[part] @ at_row[part]) > 0.9  # along the shorter way


def test_periodic_motion_goes_on_and_others_hold_their_ends(renderer):
    walk, jump = renderer.motions["walk"], renderer.motions["jump"]
    assert np.allclose(walk.at(0.3 + walk.duration), walk.at(0.3))
    assert np.allclose(jump.at(jump.duration + 9), jump.at(jump.duration))
    assert np.allclose(jump.at(-1), jump.at(0))


# -- many clips, and the file that keeps them ------------------------------------------------------


def test_clips_depend_on_seed_and_index_alone():
    many, labels = render_clips(62, seed=9, workers=2, **SMALL)  # more than one worker's share
    alone, _ = render_clips(62, seed=9, workers=1, **SMALL)
    few, _ = render_clips(3, seed=9, workers=1, **SMALL)
    assert many.shape == (62, 2, 16, 16, 3)
    assert np.array_equal(many, alone)
    assert np.array_equal(few, many[:3])
    assert labels.dtype == np.int64
    assert labels.tolist() == [i % 15 for i in range(62)]
    renderer = MocapRenderer(**SMALL)
    assert np.array_equal(renderer.clip(ACTIONS[61 % 15], (9, 61)), many[61])
    renderer.close()


def test_other_seeds_give_other_clips():
    first, _ = render_clips(2, seed=0, workers=1, **SMALL)
    second, _ = render_clips(2, seed=1, workers=1, **SMALL)
    for a, b in zip(first, second, strict=True):
        assert np.abs(a.astype(int) - b).mean() > 5


def test_kept_clips_are_found_again(tmp_path):
    file, finished = tmp_path / "cache" / "clips.npy", []
    kept, labels = render_clips(2, 4, file=file, workers=1, progress=finished.append, **SMALL)
    assert finished == [2]
    assert list(file.parent.iterdir()) == [file]
    before = file.stat().st_mtime_ns
    found, same_labels = render_clips(2, 4, file=file, progress=finished.append, **SMALL)
    assert finished == [2]
    assert file.stat().st_mtime_ns == before
    assert isinstance(found, np.memmap)
    assert np.array_equal(found, kept)
    assert np.array_equal(same_labels, labels)


@pytest.mark.parametrize(
    ("clips", "found"),
    [
        (np.zeros((3, 2, 16, 16, 3), np.uint8), r"uint8 \(3, 2, 16, 16, 3\)"),
        (np.zeros((2, 2, 16, 16, 3), np.float32), r"float32 \(2, 2, 16, 16, 3\)"),
    ],
)
def test_file_of_other_clips_is_refused(tmp_path, clips, found):
    file = tmp_path / "clips.npy"
    np.save(file, clips)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=rf"clips\.npy holds {found}, expected uint8 \(2, 2, 16"):
        render_clips(2, file=file, workers=1, **SMALL)
    assert file.read_bytes() == before


def test_truncated_file_of_clips_is_refused(tmp_path):
    file = tmp_path / "clips.npy"
    np.save(file, np.zeros((2, 2, 16, 16, 3), np.uint8))
    for length in (file.stat().st_size - 100, 20, 0):
        os.truncate(file, length)
        with pytest.raises(ValueError, match=r"clips\.npy is no complete \.npy file"):
            render_clips(2, file=file, workers=1, **SMALL)


def test_failing_worker_leaves_no_file_behind(tmp_path):
    with pytest.raises(ValueError, match="non-negative"):  # raised by the worker's generator
        render_clips(2, seed=-1, file=tmp_path / "clips.npy", workers=1, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_no_file_behind(tmp_path):
    def interrupt(finished):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file = tmp_path / "clips.npy"
        render_clips(2, file=file, workers=1, progress=interrupt, **SMALL)
    assert list(tmp_path.iterdir()) == []
