"""benchmarks/lib/picture_measures.py: blur lowers the one, noise in limbs raises the other."""

import numpy as np
import pytest
from conftest import benchmark_file

measures = benchmark_file("lib.picture_measures")

SIZE, FRAMES = 64, 8


def walker(grain=0.0, top=(200, 40, 40)):
    """A clip [1, N, H, W, 3] of a two-coloured block that crosses a plain room.

    grain: standard deviation of the noise inside the block, of 255
    """
    clip = np.full((1, FRAMES, SIZE, SIZE, 3), (165, 168, 172), np.float64)
    rng = np.random.default_rng(0)
    for i in range(FRAMES):
        left = 4 + 6 * i
        clip[0, i, 20:35, left : left + 12] = top
        clip[0, i, 35:50, left : left + 12] = (30, 40, 85)
        clip[0, i, 20:50, left : left + 12] += grain * rng.normal(size=(30, 12, 3))
    return clip.clip(0, 255).round().astype(np.uint8)


def blurred(clips):
    x = clips.astype(np.float64)
    for axis in (2, 3):
        x = (np.roll(x, 1, axis) + 2 * x + np.roll(x, -1, axis)) / 4
    return x.round().astype(np.uint8)


def waves(length):
    """A clip [1, 2, H, W, 3] of one wave of so many pixels."""
    row = 128 + 100 * np.cos(2 * np.pi * np.arange(SIZE) / length)
    return np.broadcast_to(row[:, None], (1, 2, SIZE, SIZE, 3)).round().astype(np.uint8)


def test_fine_share_tells_waves_by_their_length():
    assert measures.fine_share(waves(3), 4)[0] == pytest.approx(1, abs=0.01)
    assert measures.fine_share(waves(16), 4)[0] == pytest.approx(0, abs=0.01)
    assert measures.fine_share(waves(6), 4)[0] == pytest.approx(0, abs=0.01)
    assert measures.fine_share(waves(6), 8)[0] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("wave", [4, 8])
def test_blur_lowers_the_fine_share_and_noise_raises_it(wave):
    sharp = measures.fine_share(walker(), wave)
    assert sharp.shape == (1,) and 0 < sharp[0] < 1
    assert measures.fine_share(blurred(walker()), wave)[0] < 0.9 * sharp[0]
    assert measures.fine_share(walker(grain=20), wave)[0] > 1.1 * sharp[0]


def test_a_plain_clip_has_no_fine_waves():
    assert measures.fine_share(np.full((1, 2, SIZE, SIZE, 3), 77, np.uint8), 4)[0] < 1e-6


def test_noise_in_limbs_raises_speckle():
    clean = measures.speckle(walker())[0]
    assert clean[1] == pytest.approx(0, abs=1e-6)  # plain cloth
    values = [measures.speckle(walker(grain))[0] for grain in (4, 8, 16)]
    for fine, coarse in zip([clean, *values], values, strict=False):
        assert np.all(coarse > fine)


def test_speckle_is_the_chroma_variance_of_a_grain():
    """Of grey noise there is none; of noise in the three channels it is that of its chroma."""
    grain = 8
    added = measures.speckle(walker(grain))[0, 0] - measures.speckle(walker())[0, 0]
    blue = np.array([-0.299, -0.587, 1 - 0.114]) / 1.772
    red = np.array([1 - 0.299, -0.587, -0.114]) / 1.402
    per_pixel = (grain / 127.5) ** 2 * (blue @ blue + red @ red)
    assert added == pytest.approx(per_pixel * 8 / 9, rel=0.2)  # of nine pixels about their mean


def test_the_moving_figure_is_found_and_its_rim_left_out():
    planes = measures._planes(walker()[0])
    found = measures.moving(planes).numpy()
    for i, frame in enumerate(found):
        rows, columns = np.nonzero(frame)
        left = 4 + 6 * i
        assert rows.min() >= 22 and rows.max() < 48
        assert columns.min() >= left + 2 and columns.max() < left + 10
    assert found[0].sum() == 26 * 8


def test_speckle_of_a_frozen_clip_is_nan():
    assert np.isnan(measures.speckle(np.repeat(walker()[:, :1], FRAMES, 1))).all()
