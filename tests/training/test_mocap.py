"""vfengine/training/mocap: every action moves, names decide pixels, kept clips are safe."""

import os
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from vfengine.training.mocap import ACTIONS, SECONDS, Renderer, draw_scene, render_clips
from vfengine.training.mocap.backdrop import Camera, root
from vfengine.training.mocap.figure import PARTS, RADII, cones
from vfengine.training.mocap.motions import motions
from vfengine.training.mocap.scenes import COLOURS, is_held_out

SMALL = {"size": 16, "num_frames": 2}


@pytest.fixture(scope="module")
def renderer():
    return Renderer(size=32, num_frames=6)


def scenes_of(action, count=2):
    index = ACTIONS.index(action)
    return [draw_scene(3, index + 15 * i) for i in range(count)]


def figure_masks(renderer, scene):
    """bool [N, H, W], where the figure stands."""
    frames = renderer.frames([scene], range(renderer.num_frames), with_figure=True)
    return (frames[0, ..., 3] > 127).numpy()


# -- what is drawn ---------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ACTIONS)
def test_action_shows_a_moving_figure(renderer, action):
    for scene in scenes_of(action):
        figure = figure_masks(renderer, scene)
        share = figure.mean((1, 2))
        assert 0.02 < share.min() and share.max() < 0.4
        longer_side = np.maximum(figure.any(2).sum(1), figure.any(1).sum(1))
        assert longer_side.min() > 6 and longer_side.mean() > 12  # of 32: it fills the picture
        changed = (figure[1:] != figure[:-1]).mean((1, 2))
        assert changed.mean() > 0.01


def test_figure_is_where_pixels_change_with_its_colours(renderer):
    scene = scenes_of("kick")[0]
    colours = ("top_colour", "bottom_colour", "shoes")
    dark, bright = (
        renderer.clips(
            [replace(scene, **dict.fromkeys(colours, c), hair=h, skin=s, stripes=None)]
        ).int()
        for c, h, s in (("black", "black", "dark"), ("white", "blond", "light"))
    )
    changes = (bright - dark).abs().amax(-1)[0] > 60
    share = renderer.frames([scene], range(6), with_figure=True)[0, ..., 3]
    assert bool((share[changes] > 0).all())
    assert bool(changes[share == 255].float().mean() > 0.95)


def test_scenes_depend_on_seed_and_index_alone():
    assert draw_scene(1, 7) == draw_scene(1, 7)
    assert draw_scene(1, 7) != draw_scene(2, 7)
    assert [draw_scene(0, i).action for i in range(15)] == list(ACTIONS)


def test_training_never_sees_the_pairs_of_colours_that_judges_ask_for():
    held_out = [(a, b) for a in COLOURS for b in COLOURS if is_held_out(a, b)]
    assert len(held_out) == len(COLOURS) ** 2 / 7
    assert {a for a, _ in held_out} == {b for _, b in held_out} == set(COLOURS)
    for held in (False, True):
        scenes = [draw_scene(0, i, held_out=held) for i in range(300)]
        assert {is_held_out(s.top_colour, s.bottom_colour) for s in scenes} == {held}


def test_every_name_changes_the_picture(renderer):
    scene = next(
        s for s in (draw_scene(0, i) for i in range(200)) if s.place == "carpet" and s.stripes
    )
    other = {
        "action": "walk" if scene.action != "walk" else "jump",
        "hair": "blond" if scene.hair != "blond" else "black",
        "skin": "light" if scene.skin != "light" else "dark",
        "top": "sweater" if scene.top == "t-shirt" else "t-shirt",
        "top_colour": "green" if scene.top_colour != "green" else "pink",
        "stripes": None,
        "bottom": "shorts" if scene.bottom == "trousers" else "trousers",
        "bottom_colour": "green" if scene.bottom_colour != "green" else "pink",
        "shoes": "white" if scene.shoes != "white" else "black",
        "place": "tiles",
        "wall": "green" if scene.wall != "green" else "pink",
        "carpet": "green" if scene.carpet != "green" else "red",
        "light": "dim light" if scene.light != "dim light" else "daylight",
        "yaw": -scene.yaw,
        "elevation": scene.elevation + 5,
        "distance": scene.distance + 0.3,
        "light_side": -scene.light_side,
        "mirrored": not scene.mirrored,
        "speed": scene.speed * 1.2,
        "phase": 1 - scene.phase,
    }
    assert other.keys() == {f.name for f in fields(scene)} - {"shift"}  # a carpet has no texture
    big = Renderer(size=64, num_frames=4)
    plain = big.clips([scene])
    for name, value in other.items():
        assert not torch.equal(big.clips([replace(scene, **{name: value})]), plain), name


def test_clips_do_not_depend_on_their_neighbours_nor_on_the_chosen_frames(renderer):
    scenes = [draw_scene(0, i) for i in range(12)]
    together = renderer.clips(scenes)
    assert together.dtype == torch.uint8 and together.shape == (12, 6, 32, 32, 3)
    for i in (0, 5, 11):
        assert torch.equal(renderer.clips([scenes[i]])[0], together[i])
    assert torch.equal(renderer.frames(scenes, [1, 4]), together[:, [1, 4]])


def test_rays_meet_what_marching_along_them_meets():
    """Sphere tracing in float64 gives the same silhouettes and, between parts, the same ones."""
    from vfengine.training.mocap.renderer import _Hits

    scenes, side = [draw_scene(2, i) for i in (1, 8)], 48
    poses = np.concatenate([motions()[s.action].at(np.array([0.4, 0.9])) for s in scenes])
    camera = Camera(scenes)
    ends = camera.sees(cones(poses, np.array([False, True, False, True])), 2)
    hits = _Hits(ends, camera.focal, side, torch.device("cpu"))
    u = (np.arange(side) + 0.5 - side / 2) / (camera.focal * side)
    rays = np.stack(np.broadcast_arrays(u, -u[:, None], 1.0), -1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    for frame in range(4):
        a, b = ends[frame, :, 0], ends[frame, :, 1]
        t = np.full((side, side), 2.0)
        for _ in range(120):
            distance = _distances(rays * t[..., None], a, b)
            t = np.minimum(t + distance.min(-1), 9.0)
        expected = np.where(t < 8, distance.argmin(-1), -1)
        found = np.full((side, side), -1)
        mine = hits.frame == frame
        found[hits.row[mine], hits.column[mine]] = hits.part[mine]
        assert (found >= 0).sum() > 50
        assert ((found >= 0) == (expected >= 0)).mean() > 0.998  # rays that graze
        both = (found >= 0) & (expected >= 0)
        assert (found == expected)[both].mean() > 0.97  # at seams two parts are as near


def _distances(points, a, b):
    """Of points [H, W, 3] to round cones with ends [P, 3]: [H, W, P]."""
    ra, rb = RADII.T
    axis = b - a
    length = np.linalg.norm(axis, axis=1)
    unit = axis / length[:, None]
    local = points[..., None, :] - a
    y = (local * unit).sum(-1)
    x = np.sqrt(np.maximum((local**2).sum(-1) - y * y, 0))
    slope = (ra - rb) / length
    flank = np.sqrt(1 - slope**2)
    place = y * flank - x * slope  # along the flank, from the first tangent point
    first = np.sqrt(x * x + y * y) - ra
    second = np.sqrt(x * x + (y - length) ** 2) - rb
    between = x * flank + y * slope - ra
    return np.where(place < 0, first, np.where(place > flank * length, second, between))


@pytest.mark.parametrize("action", ACTIONS)
def test_no_part_reaches_below_the_floor(action):
    poses = motions()[action].at(np.linspace(0, 3, 40))
    ends = cones(poses, np.arange(40) % 2 == 0)
    assert ends.shape == (40, len(PARTS), 2, 3)
    assert (ends[..., 1] - RADII).min() > -1e-9


def test_mirrored_figures_are_mirror_images():
    poses = motions()["kick"].at(np.array([0.5, 0.5]))
    plain, mirrored = cones(poses, np.array([False, True]))
    assert np.allclose(plain * [-1, 1, 1], mirrored)


@pytest.mark.parametrize("settings", [{"size": 15}, {"size": 8}, {"num_frames": 0}])
def test_impossible_sizes_are_refused(settings):
    with pytest.raises(ValueError, match=r"Renderer: (size must be even|num_frames must be)"):
        Renderer(**settings)


@pytest.mark.parametrize("action", ACTIONS)
def test_motion_is_interpolated_between_its_rows(action):
    motion = motions()[action]
    assert motion.duration >= SECONDS[action] / 2
    row = len(motion.rows) // 2
    before, after = motion.times[row], motion.times[row + 1]
    at_row, between = motion.at(np.array([before, 0.7 * before + 0.3 * after]))
    assert np.allclose(at_row[1:4], motion.rows[row, 1:4])
    root = 0.7 * motion.rows[row, 1:4] + 0.3 * motion.rows[row + 1, 1:4]
    assert np.allclose(between[1:4], root)
    assert np.isclose(np.linalg.norm(between[4:8]), 1)
    assert abs(between[4:8] @ at_row[4:8]) > 0.9  # along the shorter way


def test_periodic_motion_goes_on_and_others_hold_their_ends():
    walk, jump = motions()["walk"], motions()["jump"]
    times = np.array([0.3 + walk.duration, 0.3])
    assert np.allclose(*walk.at(times))
    assert np.allclose(*jump.at(np.array([jump.duration + 9, jump.duration])))
    assert np.allclose(*jump.at(np.array([-1.0, 0.0])))


# -- many clips, and the file that keeps them ------------------------------------------------------


def test_clips_depend_on_seed_and_index_alone():
    many, labels = render_clips(62, seed=9, **SMALL)
    few, _ = render_clips(3, seed=9, **SMALL)
    assert many.shape == (62, 2, 16, 16, 3)
    assert np.array_equal(few, many[:3])
    assert labels.dtype == np.int64
    assert labels.tolist() == [i % 15 for i in range(62)]
    alone = Renderer(**SMALL).clips([draw_scene(9, 61)])[0]
    assert np.array_equal(alone.numpy(), many[61])


def test_other_seeds_give_other_clips():
    first, _ = render_clips(2, seed=0, **SMALL)
    second, _ = render_clips(2, seed=1, **SMALL)
    for a, b in zip(first, second, strict=True):
        assert np.abs(a.astype(int) - b).mean() > 5


def test_kept_clips_are_found_again(tmp_path):
    file, finished = tmp_path / "cache" / "clips.npy", []
    kept, labels = render_clips(2, 4, file=file, progress=finished.append, **SMALL)
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
        render_clips(2, file=file, **SMALL)
    assert file.read_bytes() == before


def test_truncated_file_of_clips_is_refused(tmp_path):
    file = tmp_path / "clips.npy"
    np.save(file, np.zeros((2, 2, 16, 16, 3), np.uint8))
    for length in (file.stat().st_size - 100, 20, 0):
        os.truncate(file, length)
        with pytest.raises(ValueError, match=r"clips\.npy is no complete \.npy file"):
            render_clips(2, file=file, **SMALL)


def test_failure_leaves_no_file_behind(tmp_path):
    with pytest.raises(ValueError, match="non-negative"):  # raised by the scene's generator
        render_clips(2, seed=-1, file=tmp_path / "clips.npy", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_no_file_behind(tmp_path):
    def interrupt(finished):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file = tmp_path / "clips.npy"
        render_clips(2, file=file, progress=interrupt, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_roots_are_rounded_correctly():
    """As on a GPU: torch's roots on a CPU are not, and rays then meet other surfaces."""
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 10
    assert torch.equal(root(x), x.double().sqrt().float())
