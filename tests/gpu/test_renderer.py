"""A GPU draws the pixels that a CPU draws."""

import numpy as np
import pytest

from vfengine.training.mocap import renderer
from vfengine.training.mocap.motions import ACTIONS
from vfengine.training.mocap.scenes import draw_scene


class Swaying:
    """A motion from no file: every joint turns a little, as time goes by."""

    periodic, duration = True, 3.0

    def at(self, times):
        poses = np.zeros((len(times), 44))
        poses[:, 2] = 0.9
        column = 4
        for width in (4, 4, 4, 4, 1, 4, 4, 1, 4, 1, 4, 4, 1):
            angle = 0.4 * np.sin(times + column)
            if width == 1:
                poses[:, column] = angle
            else:
                poses[:, column] = np.cos(angle / 2)
                poses[:, column + 1 + column % 3] = np.sin(angle / 2)
            column += width
        assert column == poses.shape[1]
        return poses


@pytest.fixture
def draw(monkeypatch):
    monkeypatch.setattr(renderer, "motions", lambda: dict.fromkeys(ACTIONS, Swaying()))

    def on(device):
        scenes = [draw_scene(0, i) for i in range(60)]
        return renderer.Renderer(128, 4, device).clips(scenes).cpu().int()

    return on


def test_pixels_are_the_cpu_s(draw, device):
    """Within 1 of 255: sines, means and sums round differently, but no ray meets another cone."""
    theirs, ours = draw("cpu"), draw(device)
    assert theirs.float().std() > 30
    difference = (theirs - ours).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 0.01


def test_clips_do_not_depend_on_their_neighbours(draw, device, monkeypatch):
    whole = draw(device)
    monkeypatch.setattr(renderer, "_CHUNK", {"cpu": 4, "cuda": 8})
    # the rays of a pixel are added in any order on a GPU
    assert int((draw(device) - whole).abs().max()) <= 1
