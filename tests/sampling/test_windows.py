"""sampling/windows.py: where windows lie, what the network sees, and the clips that come of it."""

from itertools import pairwise

import pytest
import torch
from conftest import ON_CPU, TINY_LABELS
from hypothesis import given, settings
from hypothesis import strategies as st

from vfengine import VideoFusionPipeline
from vfengine.diffusion.decompose import frame_weights
from vfengine.diffusion.noise import decomposed_noise
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.formats.checkpoint import load_network, read_config
from vfengine.models import for_inference
from vfengine.sampling.api import sample_base, sample_residual
from vfengine.sampling.windows import choose_windows, largest_stride, plan_windows, windowed

SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 2e-2)
WALK = {"schedule": SCHEDULE, "num_inference_steps": 6}
T = torch.tensor([500])
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def base_model(z, t):
    return 0.7 * torch.tanh(z) + 0.2 * z.roll(1, -1)


def framewise_model(z, t):
    """Treats every frame alone, wherever it stands."""
    return 0.6 * torch.tanh(z + 0.1 * (t.to(z.dtype) / 300).cos().view(-1, 1, 1, 1, 1))


def mixing_model(z, t):
    """Mixes frames, and depends on a frame's place and on the frame in the middle."""
    place = torch.arange(z.shape[1], dtype=z.dtype).sin().view(1, -1, 1, 1, 1)
    return framewise_model(z, t) + 0.2 * z.mean(1, keepdim=True) + 0.1 * place * z[:, [-1]]


def clip_of(frames, dtype=FP32, batch=1):
    noise = decomposed_noise((batch, frames, 2, 4, 5), 0, 1, dtype=dtype)
    return noise.residual


def path_and_noise(frames, dtype=FP32, batch=1, **walk):
    noise = decomposed_noise((batch, frames, 2, 4, 5), 0, 1, dtype=dtype)
    return sample_base(base_model, noise.base, **{**WALK, **walk}), noise.residual


# -- where windows lie -----------------------------------------------------------------------------


@st.composite
def plans(draw):
    """(num_frames, window, overlap), all that is allowed."""
    window = draw(st.integers(3, 40))
    overlap = draw(st.integers(window - largest_stride(window), window - 1))
    return draw(st.integers(1, 200)), window, overlap


@settings(max_examples=200, deadline=None)
@given(plans())
def test_windows_cover_the_clip_and_weigh_one(arguments):
    num_frames, window, overlap = arguments
    plan = plan_windows(num_frames, window, overlap)
    starts, weights = plan.starts, plan.weights
    if num_frames <= window:
        assert starts == (0,)
        assert torch.equal(weights, torch.ones(1, num_frames))
        return
    assert (plan.num_frames, plan.window) == (num_frames, window)
    assert starts[0] == 0
    assert starts[-1] + window == num_frames
    strides = [b - a for a, b in pairwise(starts)]
    assert all(stride == window - overlap for stride in strides[:-1])
    assert 0 < strides[-1] <= window - overlap
    assert weights.shape == (len(starts), window)
    assert weights.dtype == FP32
    assert bool((weights >= 0).all())
    total = torch.zeros(num_frames, dtype=FP64)
    for start, row in zip(starts, weights, strict=True):
        total[start : start + window] += row
    assert (total - 1).abs().max() < 1e-6


@settings(max_examples=200, deadline=None)
@given(plans())
def test_middle_of_a_window_is_left_to_its_neighbours(arguments):
    num_frames, window, overlap = arguments
    plan = plan_windows(num_frames, window, overlap)
    if len(plan.starts) == 1:
        return
    middle = window // 2
    assert bool((plan.weights[:, middle] == 0).all())
    for start in plan.starts:
        places = [start + middle - other for other in plan.starts]
        assert any(0 <= p < window and p != middle for p in places)


@pytest.mark.parametrize("window", range(3, 20))
def test_default_overlap_is_the_least(window):
    least = window - largest_stride(window)
    plans = [plan_windows(50, window, overlap) for overlap in (None, least)]
    assert plans[0].starts == plans[1].starts
    assert torch.equal(plans[0].weights, plans[1].weights)
    assert plans[0].starts[1] == largest_stride(window)
    with pytest.raises(ValueError, match=f"must be from {least} to {window - 1}"):
        plan_windows(50, window, least - 1)


def test_example_by_hand():
    """9 frames, windows of 5 from 0, 2 and 4: triangles 1 2 (3) 2 1 without their middle."""
    plan = plan_windows(9, 5)
    assert plan.starts == (0, 2, 4)
    sums = torch.tensor([1, 2, 1, 4, 2, 4, 1, 2, 1.0])
    triangle = torch.tensor([1, 2, 0, 2, 1.0])
    for start, row in zip(plan.starts, plan.weights, strict=True):
        torch.testing.assert_close(row, triangle / sums[start : start + 5])


@pytest.mark.parametrize(
    ("window", "overlap", "message"),
    [
        (2, None, "at least 3"),
        (0, None, "at least 3"),
        (-4, None, "at least 3"),
        (4.0, None, "window must be an int"),
        (True, None, "window must be an int"),
        ("8", None, "window must be an int"),
        (8, 5.0, "window_overlap must be an int"),
        (8, False, "window_overlap must be an int"),
        (8, 4, "from 5 to 7"),
        (8, 8, "from 5 to 7"),
        (8, -1, "from 5 to 7"),
        (3, 1, "from 2 to 2"),
    ],
)
@pytest.mark.parametrize("num_frames", [2, 20])
def test_plan_rejects(num_frames, window, overlap, message):
    with pytest.raises(ValueError, match=message):
        plan_windows(num_frames, window, overlap)


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ((16, 16), None),  # of the trained length
        ((17, 16), (16, 9)),
        ((512, 16, 0), None),
        ((512, 16, 24), (24, 13)),
        ((512, 16, 24, 20), (24, 20)),
        ((512, 16, None, 12), (16, 12)),
        ((8, 16, None, 12), (16, 12)),
        ((8, 16, 5), (5, 3)),
        ((9, 2), None),  # too short to make windows of
    ],
)
def test_choose_windows(arguments, chosen):
    assert choose_windows(*arguments) == chosen


# -- what the network sees, and what becomes of it -------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(FP64, 1e-6), (FP32, 1e-6), (BF16, 1e-2)])
@pytest.mark.parametrize(
    ("frames", "window", "overlap"), [(4, 3, None), (17, 8, None), (17, 8, 7), (40, 5, 3)]
)
def test_framewise_network_needs_no_windows(frames, window, overlap, dtype, tolerance):
    z = clip_of(frames, dtype, batch=2)
    t = torch.tensor([500, 20])
    r = windowed(framewise_model, frames, window, overlap)(z, t)
    assert r.dtype == dtype
    expected = framewise_model(z, t)
    assert (r - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("frames", "window"), [(4, 3), (9, 4), (16, 7), (16, 8)])
def test_network_sees_windows_with_the_base_frame_in_the_middle(frames, window):
    z, seen = clip_of(frames, batch=2), []
    before = z.clone()
    windowed(lambda part, t: seen.append(part.clone()) or part, frames, window)(z, T.expand(2))
    assert torch.equal(z, before)
    starts = plan_windows(frames, window).starts
    assert len(seen) == len(starts) > 1
    for start, part in zip(starts, seen, strict=True):
        expected = z[:, start : start + window].clone()
        expected[:, window // 2] = z[:, frames // 2]
        assert torch.equal(part, expected)


def test_estimates_are_blended_by_the_plan():
    """Frame by frame in float64, for a network whose estimates differ from window to window."""
    frames, window, overlap = 17, 6, 4
    z = clip_of(frames, FP64)
    plan = plan_windows(frames, window, overlap)
    expected = torch.zeros_like(z)
    for start, weights in zip(plan.starts, plan.weights.double(), strict=True):
        part = z[:, start : start + window].clone()
        part[:, window // 2] = z[:, frames // 2]
        for i, weight in enumerate(weights):
            expected[:, start + i] += weight * mixing_model(part, T)[:, i]
    r = windowed(mixing_model, frames, window, overlap)(z, T)
    assert (r - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert (r - mixing_model(z, T)).abs().max() > 1e-2  # windows do matter to this network


def test_half_precision_is_blended_in_fp32():
    z = clip_of(17, BF16)
    r = windowed(mixing_model, 17, 6)(z, T)
    fp32 = windowed(lambda part, t: mixing_model(part.to(BF16), t).float(), 17, 6)(z.float(), T)
    assert torch.equal(r, fp32.to(BF16))


@pytest.mark.parametrize("give_back", [lambda z, t: z, lambda z, t: z.view(z.shape)])
def test_network_may_give_its_input_back(give_back):
    z = clip_of(9)
    expected = windowed(lambda part, t: part.clone(), 9, 4)(z, T)
    assert torch.equal(windowed(give_back, 9, 4)(z, T), expected)


def test_network_may_write_every_estimate_to_the_same_memory():
    z, memory = clip_of(9), torch.empty_like(clip_of(4))
    r = windowed(lambda part, t: memory.copy_(mixing_model(part, t)), 9, 4)(z, T)
    assert torch.equal(r, windowed(mixing_model, 9, 4)(z, T))


@pytest.mark.parametrize("frames", [1, 2, 7, 8])
def test_one_window_is_the_network_itself(frames):
    assert windowed(mixing_model, frames, 8) is mixing_model
    assert windowed(mixing_model, frames, 8, lam=[0.5] * frames) is mixing_model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((9, None, 4), "without a window"),
        ((9, 2), "at least 3"),
        ((9, 4, 1), "from 3 to 3"),
    ],
)
def test_windowed_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        windowed(mixing_model, *arguments)


@pytest.mark.parametrize("lam", [[0.5] * 9, torch.linspace(0, 1, 9)])
def test_a_lam_for_each_frame_is_rejected(lam):
    with pytest.raises(ValueError, match="one lam for all frames"):
        windowed(mixing_model, 9, 4, lam=lam)
    path, noise = path_and_noise(9)
    with pytest.raises(ValueError, match="one lam for all frames"):
        sample_residual(mixing_model, path, noise, window=4, lam=lam)
    one = sample_residual(mixing_model, path, noise, window=4, lam=torch.tensor(0.5))
    assert torch.equal(one, sample_residual(mixing_model, path, noise, window=4, lam=0.5))


# -- clips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize(("solver", "eta"), [("ddim", 0.0), ("ddpm", 1.0), ("unipc", 0.0)])
@pytest.mark.parametrize(("frames", "window", "overlap"), [(4, 3, None), (17, 6, 5)])
def test_base_frame_is_the_path_bit_for_bit(frames, window, overlap, solver, eta, dtype):
    path, noise = path_and_noise(frames, dtype, batch=2, solver=solver, eta=eta)
    for followed in (path, path.clean()):
        arguments = {"window": window, "window_overlap": overlap}
        video = sample_residual(mixing_model, followed, noise, **arguments)
        assert video.dtype == dtype
        assert video.isfinite().all()
        assert torch.equal(video[:, frames // 2], path.final.to(dtype))
        assert torch.equal(video, sample_residual(mixing_model, followed, noise, **arguments))
        plain = sample_residual(mixing_model, followed, noise)
        assert not torch.equal(video, plain)


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("window", [9, 10, 50])
def test_window_as_long_as_the_clip_changes_no_bit(window, eta, dtype):
    path, noise = path_and_noise(9, dtype, eta=eta)
    video = sample_residual(mixing_model, path, noise, window=window)
    assert torch.equal(video, sample_residual(mixing_model, path, noise))


@pytest.mark.parametrize(("dtype", "tolerance"), [(FP64, 1e-6), (FP32, 1e-5), (BF16, 0.06)])
@pytest.mark.parametrize(
    ("solver", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 1.0), ("dpmsolver++", 0.0)]
)
def test_framewise_network_makes_the_same_clip_in_windows(solver, eta, dtype, tolerance):
    path, noise = path_and_noise(17, dtype, batch=2, solver=solver, eta=eta)
    plain = sample_residual(framewise_model, path, noise)
    video = sample_residual(framewise_model, path, noise, window=6)
    assert (video - plain).abs().max() <= tolerance * plain.abs().max()


def test_noise_on_the_way_is_the_frames_own_whatever_the_windows():
    """A network that estimates nothing leaves the noise alone: the same bits in any windows."""
    path, noise = path_and_noise(17, eta=1.0)
    still = {"residual_model": lambda z, t: torch.zeros_like(z), "path": path}
    plain = sample_residual(residual_noise=noise, **still)
    for window, overlap in ((3, None), (6, None), (6, 5), (16, 9)):
        video = sample_residual(
            residual_noise=noise, window=window, window_overlap=overlap, **still
        )
        assert torch.equal(video, plain)
    other = sample_residual(residual_noise=noise, window=6, residual_seed=2, **still)
    assert not torch.equal(other, plain)
    part = sample_residual(residual_noise=noise[:, 12:], window=3, frame_offset=12, **still)
    others = [0, 1, 3, 4]  # 14 is the base frame of these five
    assert torch.equal(part[:, others], plain[:, 12:][:, others])


def test_a_path_serves_many_clips_in_windows():
    path, _ = path_and_noise(9)
    noise = clip_of(9, batch=3)
    many = sample_residual(mixing_model, path, noise, window=4)
    for b in range(3):
        one = sample_residual(mixing_model, path, noise[b : b + 1], window=4, sample_offset=b)
        torch.testing.assert_close(many[b : b + 1], one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "at least 3"),
        ({"window": 4.0}, "must be an int"),
        ({"window_overlap": 3}, "without a window"),
        ({"window": 4, "window_overlap": 2}, "from 3 to 3"),
    ],
)
def test_sample_residual_rejects(change, message):
    path, noise = path_and_noise(9)
    calls = []
    with pytest.raises(ValueError, match=message):
        sample_residual(lambda z, t: calls.append(t), path, noise, **change)
    assert calls == []


# -- the pipeline ----------------------------------------------------------------------------------

TRAINED, LONG = 4, 11  # frames, of conftest's tiny model and of a longer clip


@pytest.fixture
def pipe(tiny_checkpoint):
    return VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)


def frames_of(pipe, **settings):
    settings = {"num_inference_steps": 3, "num_frames": LONG, "output_type": "pt", **settings}
    return pipe("walk", **settings).frames


@pytest.mark.parametrize(
    ("asked", "window"), [({}, TRAINED), ({"window": 0}, None), ({"window": 7}, 7)]
)
def test_pipeline_is_sample_residual_by_hand(pipe, tiny_checkpoint, asked, window):
    config = read_config(tiny_checkpoint)
    network = load_network(tiny_checkpoint, config, "residual")
    network.unet = for_inference(network.unet, torch.float32, "cpu")
    walk = torch.tensor([TINY_LABELS.index("walk")])
    shares = frame_weights(config.lam, window or LONG)
    seen = set()

    def model(z, t):
        seen.add(z.shape[1])
        return network(z, t, class_labels=walk, lam=shares)

    settings = {"num_inference_steps": 3, "guidance_scale": 1.0, "base_seed": 5}
    path = pipe.walk_base("walk", **settings)
    noise = decomposed_noise((1, LONG, 3, 16, 16), 5, 6).residual
    video = sample_residual(model, path, noise, lam=config.lam, window=window, residual_seed=6)
    assert seen == {window or LONG}
    made = frames_of(pipe, residual_seed=6, **settings, **asked)
    assert torch.equal(made, (video / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("settings", [{}, {"eta": 1.0}, {"base_path": "clean"}])
def test_long_clips_take_windows_of_the_trained_length(pipe, settings):
    made = frames_of(pipe, **settings)
    assert made.shape == (1, LONG, 3, 16, 16)
    assert torch.equal(made, frames_of(pipe, window=TRAINED, **settings))
    assert torch.equal(made, frames_of(pipe, window=TRAINED, window_overlap=3, **settings))
    whole = frames_of(pipe, window=0, **settings)
    assert not torch.equal(made, whole)
    assert torch.equal(frames_of(pipe, window=LONG, **settings), whole)
    assert torch.equal(made[:, LONG // 2], whole[:, LONG // 2])  # the base frame
    assert torch.equal(made, frames_of(pipe, **settings))  # after other windows, in the same loop


@pytest.mark.parametrize("frames", [1, 3, TRAINED])
def test_clips_of_the_trained_length_are_left_whole(pipe, frames):
    made = frames_of(pipe, num_frames=frames)
    for window in (0, TRAINED, 9):
        assert torch.equal(made, frames_of(pipe, num_frames=frames, window=window))


def test_overlapped_phases_and_batches_take_windows(pipe):
    made = frames_of(pipe)
    assert torch.equal(made, frames_of(pipe, overlap_phases=True))
    batch = pipe(
        ["jump", "walk"], num_inference_steps=3, num_frames=LONG, output_type="pt", window=5
    ).frames
    one = frames_of(pipe, window=5, sample_offset=1)
    torch.testing.assert_close(batch[1:], one, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 2}, "at least 3"),
        ({"window": -1}, "at least 3"),
        ({"window": 4.0}, "must be an int"),
        ({"window": False}, "must be an int"),
        ({"window": 0, "window_overlap": 3}, "window=0 asks for none"),
        ({"window_overlap": 1}, "from 3 to 3"),
        ({"window": 8, "window_overlap": 8}, "from 5 to 7"),
        ({"lam": [0.5] * LONG}, "one lam"),
        ({"lam": [0.5] * LONG, "window": 6}, "one lam"),
    ],
)
@pytest.mark.parametrize("overlap_phases", [False, True])
def test_pipeline_refuses_before_the_base_phase_runs(pipe, change, message, overlap_phases):
    calls = []
    with pytest.raises(ValueError, match=message):
        frames_of(
            pipe, overlap_phases=overlap_phases, callback=lambda *call: calls.append(call), **change
        )
    assert calls == []


def test_a_lam_for_each_frame_goes_with_the_whole_clip(pipe):
    lam = [0.5] * LONG
    assert torch.equal(frames_of(pipe, window=0, lam=lam), frames_of(pipe, window=0))
    assert torch.equal(frames_of(pipe, window=LONG, lam=lam), frames_of(pipe, window=0))
