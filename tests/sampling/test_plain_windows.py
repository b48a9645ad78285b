"""Windows of plain video clips, which have no base frame (sampling/windows.py)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_windows import BF16, FP32, FP64, WALK, T, clip_of, framewise_model, mixing_model

from vfengine.diffusion.noise import NoisePlace
from vfengine.diffusion.solvers import solver_table
from vfengine.sampling.api import sample_video
from vfengine.sampling.driver import Driver
from vfengine.sampling.guidance import ModelSpec
from vfengine.sampling.reuse import KeptLoops
from vfengine.sampling.run import Run
from vfengine.sampling.windows import choose_windows, plan_windows, windowed


@st.composite
def plans(draw):
    """(num_frames, window, overlap), all that is allowed."""
    window = draw(st.integers(2, 40))
    return draw(st.integers(1, 200)), window, draw(st.integers(1, window - 1))


@settings(max_examples=200, deadline=None)
@given(plans())
def test_windows_cover_the_clip_and_weigh_one(arguments):
    num_frames, window, overlap = arguments
    plan = plan_windows(num_frames, window, overlap, base=False)
    assert plan.starts[0] == 0
    assert plan.starts[-1] + plan.window == num_frames
    assert plan.window == min(window, num_frames)
    total = torch.zeros(num_frames)
    for start, row in zip(plan.starts, plan.weights, strict=True):
        assert bool((row > 0).all())  # every frame of a window counts
        total[start : start + plan.window] += row
    assert (total - 1).abs().max() < 1e-6


def test_example_by_hand():
    """8 frames, windows of 4 from 0, 2 and 4: triangles 1 2 2 1."""
    plan = plan_windows(8, 4, base=False)
    assert plan.starts == (0, 2, 4)
    sums = torch.tensor([1, 2, 3, 3, 3, 3, 2, 1.0])
    for start, row in zip(plan.starts, plan.weights, strict=True):
        torch.testing.assert_close(row, torch.tensor([1, 2, 2, 1.0]) / sums[start : start + 4])


@pytest.mark.parametrize(
    ("window", "overlap", "message"),
    [(1, None, "at least 2"), (8, 0, "from 1 to 7"), (8, 8, "from 1 to 7"), (2, 0, "from 1 to 1")],
)
def test_plan_rejects(window, overlap, message):
    with pytest.raises(ValueError, match=message):
        plan_windows(20, window, overlap, base=False)


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ((16, 16), None),
        ((17, 16), (16, 8)),
        ((17, 16, 0), None),
        ((17, 16, 24), (24, 12)),
        ((17, 16, None, 1), (16, 1)),
        ((17, 7), (7, 3)),
        ((9, 2), (2, 1)),
        ((9, 1), None),  # too short to make windows of
    ],
)
def test_choose_windows(arguments, chosen):
    assert choose_windows(*arguments, base=False) == chosen


def test_network_sees_its_windows_as_they_are():
    frames, window, overlap = 17, 6, 2
    z, seen = clip_of(frames, FP64), []
    plan = plan_windows(frames, window, overlap, base=False)
    expected = torch.zeros_like(z)
    for start, weights in zip(plan.starts, plan.weights.double(), strict=True):
        part = mixing_model(z[:, start : start + window], T)
        expected[:, start : start + window] += weights.view(-1, 1, 1, 1) * part

    def model(part, t):
        seen.append(part.clone())
        return mixing_model(part, t)

    r = windowed(model, frames, window, overlap, base=False)(z, T)
    assert (r - expected).abs().max() <= 1e-12 * expected.abs().max()
    for start, part in zip(plan.starts, seen, strict=True):
        assert torch.equal(part, z[:, start : start + window])


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("overlap", [None, 1, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP64, 1e-6), (FP32, 1e-5), (BF16, 0.06)])
def test_framewise_network_makes_the_same_clip_in_windows(dtype, tolerance, overlap, eta):
    noise, options = clip_of(17, dtype, batch=2), {**WALK, "eta": eta}
    windows = {"window": 6, "window_overlap": overlap}
    plain = sample_video(framewise_model, noise, **options)
    video = sample_video(framewise_model, noise, **windows, **options)
    assert (video - plain).abs().max() <= tolerance * plain.abs().max()
    mixed = sample_video(mixing_model, noise, **windows, **options)
    assert not torch.equal(mixed, sample_video(mixing_model, noise, **options))


@pytest.mark.parametrize("window", [9, 10, 50])
def test_window_as_long_as_the_clip_changes_no_bit(window):
    noise = clip_of(9)
    video = sample_video(mixing_model, noise, window=window, **WALK)
    assert torch.equal(video, sample_video(mixing_model, noise, **WALK))


def test_windows_are_part_of_a_kept_loop():
    noise, table = clip_of(9), solver_table("ddim", WALK["schedule"], 3)
    driver, spec = Driver(loops=KeptLoops()), ModelSpec(mixing_model)
    for windows in ((4, None), (4, 3), None, (4, None)):
        kept = driver.video(spec, noise, table, NoisePlace(0), Run(), windows)
        new = Driver().video(mixing_model, noise, table, NoisePlace(0), Run(), windows)
        assert torch.equal(kept, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 1}, "at least 2"),
        ({"window": 4.0}, "must be an int"),
        ({"window_overlap": 3}, "without a window"),
        ({"window": 6, "window_overlap": 6}, "from 1 to 5"),
    ],
)
def test_sample_video_rejects(change, message):
    calls = []
    with pytest.raises(ValueError, match=message):
        sample_video(lambda z, t: calls.append(t), clip_of(17), **WALK, **change)
    assert calls == []
