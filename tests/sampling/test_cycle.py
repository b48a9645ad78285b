"""sampling/cycle.py: windows around a cycle, and clips that repeat without a seam."""

from itertools import pairwise

import pytest
import torch
from conftest import ON_CPU
from hypothesis import given, settings
from hypothesis import strategies as st
from test_windows import (
    BF16,
    FP32,
    FP64,
    LONG,
    SCHEDULE,
    TRAINED,
    WALK,
    T,
    clip_of,
    frames_of,
    framewise_model,
    mixing_model,
    path_and_noise,
)

from vfengine import VideoFusionPipeline
from vfengine.diffusion.base_path import BaseTrajectory
from vfengine.diffusion.noise import NoisePlace
from vfengine.diffusion.solvers import solver_table
from vfengine.sampling.api import sample_residual, sample_video
from vfengine.sampling.cycle import cycle_windows, largest_cycle_stride, plan_cycle
from vfengine.sampling.driver import Driver
from vfengine.sampling.guidance import ModelSpec
from vfengine.sampling.reuse import KeptLoops
from vfengine.sampling.run import Run
from vfengine.sampling.windows import choose_windows, plan_windows, windowed

# -- where windows lie -----------------------------------------------------------------------------


@st.composite
def plans(draw):
    """(num_frames, window, overlap, base), all that is allowed."""
    base = draw(st.booleans())
    num_frames = draw(st.integers(4 if base else 3, 120))
    window = draw(st.integers(4 if base else 3, 40))
    shorter = min(window, num_frames)
    least = shorter - largest_cycle_stride(shorter, base)
    return num_frames, window, draw(st.none() | st.integers(least, shorter - 1)), base


def frames_seen(plan):
    """Of each window, the frame in each place; None in the middle, where the base frame is."""
    seen = [[(start + j) % plan.num_frames for j in range(plan.window)] for start in plan.starts]
    for frames in seen:
        if plan.base and frames[plan.window // 2] != plan.num_frames // 2:
            frames[plan.window // 2] = None
    return seen


@settings(max_examples=300, deadline=None)
@given(plans())
def test_weights_of_a_cycle_sum_to_one(arguments):
    num_frames, window, overlap, base = arguments
    plan = plan_cycle(num_frames, window, overlap, base=base)
    assert (plan.num_frames, plan.window) == (num_frames, min(window, num_frames))
    assert plan.weights.shape == (len(plan.starts), plan.window)
    assert plan.weights.dtype == FP32
    assert bool((plan.weights >= 0).all())
    total = torch.zeros(num_frames, dtype=FP64)
    for start, row in zip(plan.starts, plan.weights, strict=True):
        for j, weight in enumerate(row):
            total[(start + j) % num_frames] += weight
    assert (total - 1).abs().max() < 1e-6
    if base:
        assert bool((plan.weights[:, plan.window // 2] == 0).all())


@settings(max_examples=300, deadline=None)
@given(plans())
def test_any_two_neighbours_of_a_cycle_stand_side_by_side_in_a_window(arguments):
    num_frames, window, overlap, base = arguments
    plan = plan_cycle(num_frames, window, overlap, base=base)
    pairs = {pair for frames in frames_seen(plan) for pair in pairwise(frames)}
    for i in range(num_frames):
        assert (i, (i + 1) % num_frames) in pairs, plan


@settings(max_examples=300, deadline=None)
@given(plans())
def test_windows_are_spread_evenly(arguments):
    num_frames, window, overlap, base = arguments
    plan = plan_cycle(num_frames, window, overlap, base=base)
    starts = [*plan.starts, num_frames]
    gaps = {after - before for before, after in pairwise(starts)}
    assert plan.starts[0] == 0
    assert len(plan.starts) >= 3
    assert max(gaps) - min(gaps) <= 1
    if overlap is not None:
        assert max(gaps) <= plan.window - overlap


def test_examples_by_hand():
    """6 frames in windows of 6 without their middle: triangles 1 2 3 (3) 2 1 from 0, 2 and 4."""
    plan = plan_cycle(6, 16)
    assert (plan.window, plan.starts) == (6, (0, 2, 4))
    sums = torch.tensor([1 + 2 + 3, 2 + 1, 3 + 1 + 2, 1 + 2, 2 + 3 + 1, 1 + 2.0])
    triangle = torch.tensor([1, 2, 3, 0, 2, 1.0])
    for start, row in zip(plan.starts, plan.weights, strict=True):
        torch.testing.assert_close(row, triangle / sums.roll(-start))
    assert plan_cycle(16, 16).starts == (0, 5, 10)
    assert plan_cycle(40, 16).starts == (0, 6, 13, 20, 26, 33)
    assert plan_cycle(16, 16, base=False).starts == (0, 5, 10)
    assert plan_cycle(40, 16, base=False).starts == (0, 8, 16, 24, 32)


@pytest.mark.parametrize(
    ("arguments", "base", "message"),
    [
        ((3, 16), True, "a loop must have at least 4 frames, got 3"),
        ((1, 16), True, "a loop must have at least 4 frames, got 1"),
        ((2, 16), False, "a loop must have at least 3 frames, got 2"),
        ((9, 3), True, "window must be at least 4 frames in a loop, got 3"),
        ((9, 0), True, "window must be at least 4 frames in a loop, got 0"),
        ((9, 2), False, "window must be at least 3 frames in a loop, got 2"),
        ((9, 4.0), True, "window must be an int, got 4.0"),
        ((9, True), True, "window must be an int, got True"),
        ((20, 8, 5.0), True, "window_overlap must be an int"),
        ((20, 8, 4), True, "window of 8 frames must be from 5 to 7 in a loop, got 4"),
        ((20, 8, 8), True, "from 5 to 7"),
        ((6, 8, 6), True, "window of 6 frames must be from 4 to 5"),
        ((20, 8, 0), False, "from 1 to 7"),
    ],
)
def test_plan_of_a_cycle_rejects(arguments, base, message):
    for refuse in (
        plan_cycle,
        lambda *given, base: windowed(mixing_model, *given, base=base, loop=True),
    ):
        with pytest.raises(ValueError, match=message):
            refuse(*arguments, base=base)


@pytest.mark.parametrize(
    ("arguments", "base", "chosen"),
    [
        ((16, 16), True, (16, 9)),
        ((9, 16), True, (9, 6)),
        ((40, 16), True, (16, 9)),
        ((40, 16, 0), True, (40, 21)),
        ((40, 16, 24), True, (24, 13)),
        ((40, 16, None, 12), True, (16, 12)),
        ((40, 16), False, (16, 8)),
        ((16, 16), False, (16, 8)),
    ],
)
def test_windows_of_a_loop(arguments, base, chosen):
    assert cycle_windows(*arguments, base=base) == chosen
    assert choose_windows(*arguments, base=base, loop=True) == chosen
    with pytest.raises(ValueError, match="window=0 asks for none"):
        choose_windows(arguments[0], 16, 0, 9, base=base, loop=True)


# -- what the network sees, and what becomes of it -------------------------------------------------


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize(("frames", "window"), [(4, 9), (9, 9), (16, 7), (17, 8)])
def test_network_sees_windows_around_the_cycle(frames, window, base):
    z, seen = clip_of(frames, batch=2), []
    before = z.clone()
    model = windowed(
        lambda part, t: seen.append(part.clone()) or part, frames, window, base=base, loop=True
    )
    model(z, T)
    assert torch.equal(z, before)
    plan = plan_cycle(frames, window, base=base)
    assert len(seen) == len(plan.starts) > 1
    for start, part in zip(plan.starts, seen, strict=True):
        expected = torch.cat([z, z], 1)[:, start : start + plan.window].clone()
        if base:
            expected[:, plan.window // 2] = z[:, frames // 2]
        assert torch.equal(part, expected)


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize(("frames", "window"), [(6, 6), (17, 8)])
def test_estimates_of_a_cycle_are_blended_by_the_plan(frames, window, base):
    z, plan = clip_of(frames, FP64), plan_cycle(frames, window, base=base)
    expected = torch.zeros_like(z)
    for start, weights in zip(plan.starts, plan.weights.double(), strict=True):
        part = torch.cat([z, z], 1)[:, start : start + plan.window].clone()
        if base:
            part[:, plan.window // 2] = z[:, frames // 2]
        for j, weight in enumerate(weights):
            expected[:, (start + j) % frames] += weight * mixing_model(part, T)[:, j]
    r = windowed(mixing_model, frames, window, base=base, loop=True)(z, T)
    assert (r - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert (r - windowed(mixing_model, frames, window, base=base)(z, T)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("frames", "window", "overlap", "base"), [(12, 6, 4, True), (8, 4, 2, False)]
)
def test_frames_away_from_the_seam_are_those_of_plain_windows(frames, window, overlap, base):
    z = clip_of(frames)
    plain = windowed(mixing_model, frames, window, overlap, base=base)(z, T)
    loop = windowed(mixing_model, frames, window, overlap, base=base, loop=True)(z, T)
    reached = overlap  # by the last window that goes over the seam
    inside = slice(reached, frames - reached)
    assert plan_windows(frames, window, overlap, base=base).starts[1] == window - overlap
    assert torch.equal(loop[:, inside], plain[:, inside])
    assert not torch.equal(loop[:, 0], plain[:, 0])
    assert not torch.equal(loop[:, -1], plain[:, -1])


def test_no_frame_of_a_cycle_is_the_first():
    """A cycle turned by a stride, of a network that knows places in a window, stays itself."""
    z = clip_of(12, FP64)
    model = windowed(mixing_model, 12, 6, 3, base=False, loop=True)
    torch.testing.assert_close(model(z.roll(3, 1), T), model(z, T).roll(3, 1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(FP64, 1e-6), (FP32, 1e-5), (BF16, 0.06)])
@pytest.mark.parametrize(
    ("solver", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("dpmsolver++", 0.0), ("unipc", 0.0)]
)
def test_framewise_network_makes_the_same_clip_around_a_cycle(solver, eta, dtype, tolerance):
    path, noise = path_and_noise(17, dtype, batch=2, solver=solver, eta=eta)
    plain = sample_residual(framewise_model, path, noise)
    for window in (None, 17, 6):
        video = sample_residual(framewise_model, path, noise, window=window, loop=True)
        assert video.dtype == dtype
        assert (video - plain).abs().max() <= tolerance * plain.abs().max()
    options = {**WALK, "solver": solver, "eta": eta}
    plain = sample_video(framewise_model, noise, **options)
    video = sample_video(framewise_model, noise, window=6, loop=True, **options)
    assert (video - plain).abs().max() <= tolerance * plain.abs().max()


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize(("solver", "eta"), [("ddim", 0.0), ("ddpm", 1.0), ("unipc", 0.0)])
@pytest.mark.parametrize(("frames", "window"), [(4, None), (17, None), (17, 6)])
def test_base_frame_of_a_loop_is_the_path_bit_for_bit(frames, window, solver, eta, dtype):
    path, noise = path_and_noise(frames, dtype, batch=2, solver=solver, eta=eta)
    for followed in (path, path.clean()):
        video = sample_residual(mixing_model, followed, noise, window=window, loop=True)
        assert video.isfinite().all()
        assert torch.equal(video[:, frames // 2], path.final.to(dtype))
        again = sample_residual(mixing_model, followed, noise, window=window, loop=True)
        assert torch.equal(video, again)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_clips_of_a_batch_close_as_they_do_alone(eta):
    path, _ = path_and_noise(9, eta=eta)
    noise = clip_of(9, batch=3)
    many = sample_residual(framewise_model, path, noise, window=4, loop=True)
    for b in range(3):
        alone = noise[b : b + 1]
        one = sample_residual(framewise_model, path, alone, window=4, loop=True, sample_offset=b)
        assert torch.equal(one, many[b : b + 1])


# -- clips that close ------------------------------------------------------------------------------


def smoothing_model(z, t):
    """The noise in z, if a clean frame is the mean of its neighbours in the window."""
    share = SCHEDULE.alphas_cumprod[t].to(z.dtype).view(-1, 1, 1, 1, 1)
    mean = z
    for _ in range(6):
        before, after = (
            torch.cat(pair, 1)
            for pair in ((mean[:, :1], mean[:, :-1]), (mean[:, 1:], mean[:, -1:]))
        )
        mean = (before + 2 * mean + after) / 4
    return (z - share * mean) / (1 - share).sqrt()


def seam(video):
    """The step from the last frame to the first, over the mean of the others."""
    steps = (video - video.roll(1, 1)).abs().mean((0, 2, 3, 4))
    return float(steps[0] / steps[1:].mean())


@pytest.mark.parametrize(("frames", "window"), [(8, 16), (16, 16), (40, 16), (41, 15)])
@pytest.mark.parametrize("base", [True, False])
def test_a_loop_closes_where_a_clip_does_not(frames, window, base):
    noise, steps = clip_of(frames, batch=4), {**WALK, "num_inference_steps": 20}
    path = BaseTrajectory.from_image(torch.zeros(1, 2, 4, 5), **steps)

    def made(**how):
        how["window"] = window
        if base:
            return sample_residual(smoothing_model, path, noise, lam=0.0, **how)
        return sample_video(smoothing_model, noise, **steps, **how)

    assert seam(made()) > 2
    assert seam(made(loop=True)) < 1.3


def test_a_loop_is_part_of_a_kept_loop():
    noise, table = clip_of(9), solver_table("ddim", WALK["schedule"], 3)
    driver, spec = Driver(loops=KeptLoops()), ModelSpec(mixing_model)
    made = set()
    for windows, loop in (((4, None), False), ((4, None), True), (None, True), (None, False)):
        kept = driver.video(spec, noise, table, NoisePlace(0), Run(), windows, loop)
        new = Driver().video(mixing_model, noise, table, NoisePlace(0), Run(), windows, loop)
        assert torch.equal(kept, new)
        made.add(kept.numpy().tobytes())
    assert len(made) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 3}, "window must be at least 4 frames in a loop"),
        ({"window_overlap": 3}, "window of 9 frames must be from 6 to 8"),
        ({"lam": [0.5] * 9}, "a loop needs one lam for all frames"),
    ],
)
def test_sample_residual_rejects_what_no_loop_has(change, message):
    path, noise = path_and_noise(9)
    calls = []
    with pytest.raises(ValueError, match=message):
        sample_residual(lambda z, t: calls.append(t), path, noise, loop=True, **change)
    assert calls == []


# -- the pipeline ----------------------------------------------------------------------------------


@pytest.fixture
def tiny(tiny_checkpoint):
    return VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)


@pytest.mark.parametrize("frames", [TRAINED, LONG])
@pytest.mark.parametrize("settings", [{}, {"eta": 1.0}, {"base_path": "clean"}, {"window": 0}])
def test_pipeline_makes_loops(tiny, frames, settings):
    made = frames_of(tiny, num_frames=frames, loop=True, **settings)
    plain = frames_of(tiny, num_frames=frames, **settings)
    assert made.shape == plain.shape
    assert torch.equal(made[:, frames // 2], plain[:, frames // 2])  # the base frame
    assert not torch.equal(made, plain)
    again = frames_of(
        tiny,
        num_frames=frames,
        loop=True,
        window=settings.get("window", TRAINED),
        **{name: value for name, value in settings.items() if name != "window"},
    )
    assert torch.equal(made, again)


def test_loops_go_with_motions_batches_caches_and_overlapped_phases(tiny, tmp_path):
    made = frames_of(tiny, loop=True)
    assert torch.equal(made, frames_of(tiny, loop=True, overlap_phases=True))
    for _ in range(2):
        assert torch.equal(made, frames_of(tiny, loop=True, base_cache=tmp_path))
    motions = frames_of(tiny, loop=True, num_residuals=3)
    torch.testing.assert_close(motions[:1], made, atol=2e-4, rtol=0)
    second = frames_of(tiny, loop=True, sample_offset=1)
    batch = frames_of(tiny, loop=True, num_videos=2)
    torch.testing.assert_close(batch[1:], second, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 3}, "a loop must have at least 4 frames, got 3"),
        ({"window": 3}, "window must be at least 4 frames in a loop"),
        ({"window": 0, "window_overlap": 3}, "window=0 asks for none"),
        ({"window": 8, "window_overlap": 4}, "from 5 to 7 in a loop"),
        ({"lam": [0.5] * LONG}, "a loop needs one lam"),
        ({"lam": [0.5] * LONG, "window": 0}, "a loop needs one lam"),
    ],
)
def test_pipeline_refuses_loops_before_the_base_phase_runs(tiny, change, message):
    calls = []
    with pytest.raises(ValueError, match=message):
        frames_of(tiny, loop=True, callback=lambda *call: calls.append(call), **change)
    assert calls == []
