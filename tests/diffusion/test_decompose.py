"""vfengine/diffusion/noise.py and decompose.py: noise law, placement, forward process, loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vfengine.diffusion.decompose import (
    add_noise,
    base_index,
    combine,
    frame_weights,
    joint_loss,
    remove_base,
)
from vfengine.diffusion.noise import base_noise, decomposed_noise, philox4x32_10, residual_noise
from vfengine.diffusion.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 2e-2)


def words(text: str) -> torch.Tensor:
    return torch.tensor([int(word, 16) for word in text.split()])


# -- Philox and the placement rule -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert torch.equal(philox4x32_10(words(counter), words(key)), words(expected))


def test_philox_broadcasts_and_rejects_other_layouts():
    counters = torch.arange(24).reshape(2, 3, 4)
    out = philox4x32_10(counters, torch.tensor([7, 9]))
    assert torch.equal(out[1, 2], philox4x32_10(counters[1, 2], torch.tensor([7, 9])))
    with pytest.raises(TypeError, match="int64"):
        philox4x32_10(counters.int(), torch.tensor([7, 9]))
    with pytest.raises(ValueError, match="counter"):
        philox4x32_10(counters[..., :3], torch.tensor([7, 9]))


def test_one_number_by_hand():
    """Element 6 of frame 3, sample 2, step 5: lane 2 of counter (1, 3, 2, 1 << 24 | 5)."""
    seed = 2**40 + 12345
    key = torch.tensor([seed % 2**32, seed // 2**32])
    w = philox4x32_10(torch.tensor([1, 3, 2, 1 << 24 | 5]), key).tolist()
    u, v = ((w[2] >> 8) + 1) / 2**24, (w[3] >> 8) / 2**24
    by_hand = math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v)
    drawn = residual_noise((3, 4, 1, 3, 3), seed, step=5)[2, 3].flatten()[6]
    assert drawn.item() == pytest.approx(by_hand, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**24 - 1),
    sizes=st.tuples(*[st.integers(1, 4)] * 3, st.integers(1, 5), st.integers(1, 7)),
    sample=st.integers(0, 3),
    frame=st.integers(0, 3),
)
def test_noise_depends_on_place_alone(seed, step, sizes, sample, frame):
    """A larger batch, a longer clip or a part drawn alone: the same numbers, bit for bit."""
    b, n, *rest = sizes
    whole = decomposed_noise((b + sample, n + frame, *rest), seed, seed, step=step)
    part = decomposed_noise(
        (b, n, *rest), seed, seed, step=step, sample_offset=sample, frame_offset=frame
    )
    assert torch.equal(whole.residual[sample:, frame:], part.residual)
    assert torch.equal(whole.base[sample:], part.base)


def test_noise_does_not_depend_on_the_thread_count():
    before = torch.get_num_threads()
    drawn = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        drawn.append(residual_noise((1, 16, 3, 64, 64), 11))
    torch.set_num_threads(before)
    assert torch.equal(*drawn)


def test_streams_steps_samples_frames_and_seeds_are_independent():
    shape = (1, 1, 1, 64, 64)
    drawn = [
        base_noise((1, 1, 64, 64), 5)[None],
        residual_noise(shape, 5),
        residual_noise(shape, 5, step=1),
        residual_noise(shape, 5, sample_offset=1),
        residual_noise(shape, 5, frame_offset=1),
        residual_noise(shape, 6),
        residual_noise(shape, 5 + 2**32),
    ]
    correlation = torch.corrcoef(torch.stack([x.flatten() for x in drawn]))
    assert (correlation - torch.eye(len(drawn))).abs().max() < 5 / 64


def test_noise_is_standard_normal():
    x = residual_noise((4, 16, 1, 64, 64), 3).double().flatten()
    n = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(n)
    for power, moment, variance in ((2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((x**power).mean() - moment) < 4 * math.sqrt(variance / n), power
    for z in (0.5, 1.0, 2.0, 3.0):
        p = 0.5 * math.erfc(z / math.sqrt(2))
        assert abs((x > z).double().mean() - p) < 4 * math.sqrt(p / n), z


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_the_fp32_noise_cast(dtype):
    shape = (1, 2, 3, 5, 7)
    cast = decomposed_noise(shape, 0, 1, dtype=dtype)
    fp32 = decomposed_noise(shape, 0, 1)
    assert torch.equal(cast.base, fp32.base.to(dtype))
    assert torch.equal(cast.residual, fp32.residual.to(dtype))


@pytest.mark.parametrize(
    ("seed", "error"),
    [(-1, ValueError), (2**64, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError)],
)
def test_rejects_seeds(seed, error):
    with pytest.raises(error, match="base_seed"):
        base_noise((1, 1, 2, 2), seed)
    with pytest.raises(error, match="residual_seed"):
        residual_noise((1, 1, 1, 2, 2), seed)


@pytest.mark.parametrize(
    ("shape", "place", "error"),
    [
        ((1, 1, 2, 2), {}, ValueError),
        ((1, 0, 1, 2, 2), {}, ValueError),
        ((1, 1, 1, 2, 2), {"step": 2**24}, ValueError),
        ((1, 1, 1, 2, 2), {"frame_offset": -1}, ValueError),
        ((1, 1, 1, 2, 2), {"dtype": torch.int32}, TypeError),
    ],
)
def test_rejects_places(shape, place, error):
    with pytest.raises(error):
        decomposed_noise(shape, 0, 1, **place)


# -- the law of the frames -------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 3, 16])
def test_base_frame_weight_is_one(frames):
    weights = frame_weights(0.25, frames)
    assert weights.dtype == torch.float32
    assert weights[base_index(frames)] == 1
    assert weights.sum() == 1 + 0.25 * (frames - 1)
    assert torch.equal(frame_weights(weights, frames), weights)
    assert torch.equal(frame_weights(weights.tolist(), frames), weights)


@pytest.mark.parametrize("lam", [-0.1, 1.1, float("nan"), [0.5, 0.5], torch.ones(3, 1)])
def test_rejects_lam(lam):
    with pytest.raises(ValueError, match="lam"):
        frame_weights(lam, 3)


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.5, 1.0])
def test_covariance_is_lam_between_frames_and_its_root_with_the_base(lam):
    eps = decomposed_noise((4, 5, 1, 128, 128), 0, 1, dtype=torch.float64).combine(lam)
    x = eps.transpose(0, 1).flatten(1)  # [N, elements]
    covariance = x @ x.T / x.shape[1]
    expected = torch.full((5, 5), lam, dtype=torch.float64)
    expected[2, :] = expected[:, 2] = math.sqrt(lam)
    expected.fill_diagonal_(1.0)
    assert (covariance - expected).abs().max() < 5 * math.sqrt(2 / x.shape[1])


def test_covariance_of_unequal_frames_is_the_root_of_the_product():
    lam = torch.tensor([0.1, 0.9, 0.0, 0.6])
    x = decomposed_noise((4, 4, 1, 128, 128), 2, 3).combine(lam).transpose(0, 1).flatten(1).double()
    roots = frame_weights(lam, 4).double().sqrt()
    expected = torch.outer(roots, roots).fill_diagonal_(1.0)
    assert (x @ x.T / x.shape[1] - expected).abs().max() < 5 * math.sqrt(2 / x.shape[1])


def test_combined_base_frame_is_the_base_noise():
    noise = decomposed_noise((2, 3, 1, 5, 7), 0, 1)
    assert torch.equal(noise.combine(0.3)[:, 1], noise.base)


def test_half_precision_keeps_an_fp32_share():
    noise = decomposed_noise((1, 2, 1, 4, 4), 0, 1, dtype=torch.bfloat16)
    expected = combine(noise.base.float(), noise.residual.float(), 0.3).bfloat16()
    assert torch.equal(noise.combine(0.3), expected)


# -- forward process and removal -------------------------------------------------------------------


def test_forward_and_removal_by_hand():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    noise = decomposed_noise(x.shape, 0, 1, dtype=torch.float64)
    b_hat = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    t, lam = torch.tensor([10, 700]), [0.25, 0.0, 0.75]
    z = add_noise(x, noise.combine(lam), t, SCHEDULE)
    removed = remove_base(z, b_hat, lam, t, SCHEDULE)
    for s in range(2):
        a = SCHEDULE.alphas_cumprod[t[s]].item()
        for i, share in enumerate((0.25, 1.0, 0.75)):
            eps = math.sqrt(share) * noise.base[s] + math.sqrt(1 - share) * noise.residual[s, i]
            z_i = math.sqrt(a) * x[s, i] + math.sqrt(1 - a) * eps
            torch.testing.assert_close(z[s, i], z_i)
            z_removed = z_i - math.sqrt(share) * math.sqrt(1 - a) * b_hat[s]
            torch.testing.assert_close(removed[s, i], z_removed)


def test_exact_removal_leaves_no_base_noise():
    x = torch.randn(1, 4, 1, 5, 7, dtype=torch.float64)
    noise, t = decomposed_noise(x.shape, 0, 1, dtype=torch.float64), torch.tensor([500])
    removed = remove_base(
        add_noise(x, noise.combine(0.5), t, SCHEDULE), noise.base, 0.5, t, SCHEDULE
    )
    signal, level = SCHEDULE.signal_and_noise(t, x)
    own = (1 - frame_weights(0.5, 4).double()).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(removed, signal * x + level * own * noise.residual)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, b: add_noise(x, x[:, :1], torch.tensor([1]), SCHEDULE),
        lambda x, b: add_noise(x, x, torch.tensor([1000]), SCHEDULE),
        lambda x, b: combine(b[:, :, :1], x, 0.5),
        lambda x, b: combine(b, b, 0.5),
        lambda x, b: remove_base(x, b[..., :1], 0.5, torch.tensor([1]), SCHEDULE),
        lambda x, b: base_index(0),
    ],
)
def test_rejects_shapes(call):
    with pytest.raises(ValueError):
        call(torch.zeros(1, 2, 1, 3, 3), torch.zeros(1, 1, 3, 3))


# -- the loss --------------------------------------------------------------------------------------


class Scale(torch.nn.Module):
    """ε̂ = scale * z * (1 + t/1000); counts its calls and keeps its inputs."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        self.inputs = []

    def forward(self, z, t):
        self.inputs.append(z)
        return self.scale * z * (1 + t.double() / 1000).view(-1, *[1] * (z.ndim - 1))


def loss_case(frames: int, lam, **options):
    torch.manual_seed(1)
    x = torch.randn(3, frames, 2, 3, 5, dtype=torch.float64)
    noise = decomposed_noise(x.shape, 4, 5, dtype=torch.float64)
    t = torch.tensor([3, 400, 990])
    models = Scale(0.6), Scale(0.3)
    losses = joint_loss(*models, x, t, *noise, schedule=SCHEDULE, lam=lam, **options)
    return x, noise, t, models, losses


@pytest.mark.parametrize("exact", [None, False, True, torch.tensor([True, False, True])])
@pytest.mark.parametrize("frames", [2, 3])
def test_loss_by_hand(frames, exact):
    lam = [0.2, 0.7, 0.4][:frames]
    x, noise, t, _, (base_loss, residual_loss) = loss_case(frames, lam, exact_base=exact)
    share = frame_weights(lam, frames).double()
    m = frames // 2
    for s in range(3):
        a = SCHEDULE.alphas_cumprod[t[s]]
        gain = 1 + t[s] / 1000
        b = noise.base[s]
        b_hat = 0.6 * gain * (a.sqrt() * x[s, m] + (1 - a).sqrt() * b)
        torch.testing.assert_close(base_loss[s], ((b - b_hat) ** 2).mean())
        is_exact = bool(exact[s]) if isinstance(exact, torch.Tensor) else bool(exact)
        given = b if is_exact else b_hat
        errors = []
        for i in range(frames):
            if i == m:
                continue
            eps = share[i].sqrt() * b + (1 - share[i]).sqrt() * noise.residual[s, i]
            z = a.sqrt() * x[s, i] + (1 - a).sqrt() * eps
            r_hat = 0.3 * gain * (z - share[i].sqrt() * (1 - a).sqrt() * given)
            error = eps - share[i].sqrt() * given - (1 - share[i]).sqrt() * r_hat
            errors.append((error**2).mean())
        torch.testing.assert_close(residual_loss[s], torch.stack(errors).mean())


def test_loss_calls_the_base_network_once_on_base_frames():
    x, noise, t, (base, residual), _ = loss_case(3, 0.5)
    assert [tuple(z.shape) for z in base.inputs] == [(3, 2, 3, 5)]
    assert [tuple(z.shape) for z in residual.inputs] == [(3, 3, 2, 3, 5)]
    torch.testing.assert_close(base.inputs[0], add_noise(x[:, 1], noise.base, t, SCHEDULE))


def test_stop_gradient_keeps_the_residual_loss_from_the_base_network():
    *_, (base, residual), (_, residual_loss) = loss_case(3, 0.5)
    residual_loss.sum().backward()
    assert base.scale.grad is None
    assert residual.scale.grad.abs() > 0


def test_without_stop_gradient_the_residual_loss_trains_the_base_network():
    """Its gradient is the finite difference of the loss, through (5) and through z'."""
    *_, (base, _), (_, residual_loss) = loss_case(3, 0.5, stop_gradient=False)
    residual_loss.sum().backward()

    def at(scale: float) -> float:
        torch.manual_seed(1)
        x = torch.randn(3, 3, 2, 3, 5, dtype=torch.float64)
        noise = decomposed_noise(x.shape, 4, 5, dtype=torch.float64)
        t = torch.tensor([3, 400, 990])
        models = Scale(scale), Scale(0.3)
        losses = joint_loss(*models, x, t, *noise, schedule=SCHEDULE, lam=0.5, stop_gradient=False)
        return losses[1].sum().item()

    slope = (at(0.6 + 1e-5) - at(0.6 - 1e-5)) / 2e-5
    assert base.scale.grad.item() == pytest.approx(slope, rel=1e-6)
    assert abs(slope) > 1e-2


def test_exact_base_leaves_nothing_for_the_base_network_even_without_stop_gradient():
    *_, (base, _), (_, residual_loss) = loss_case(3, 0.5, stop_gradient=False, exact_base=True)
    residual_loss.sum().backward()
    assert base.scale.grad is None or base.scale.grad == 0


def test_single_frame_has_no_residual_loss_but_a_graph():
    *_, (_, residual), (base_loss, residual_loss) = loss_case(1, 0.5)
    assert torch.equal(residual_loss, torch.zeros(3, dtype=torch.float64))
    (base_loss + residual_loss).sum().backward()
    assert residual.scale.grad == 0


def test_weights_multiply_the_squared_errors():
    weights = torch.tensor([0.0, 2.0, 5.0]), torch.tensor([3.0, 1.0, 0.0])
    plain, weighted = loss_case(3, 0.5)[-1], loss_case(3, 0.5, weights=weights)[-1]
    for loss, weight, expected in zip(plain, weights, weighted, strict=True):
        torch.testing.assert_close(loss * weight, expected)


def test_cell_weights_multiply_the_squared_errors_of_their_pixels():
    noise = decomposed_noise((2, 3, 2, 4, 4), 0, 1)
    weights = torch.zeros(2, 3, 1, 4, 4)
    weights[0, :, 0, 1, 2] = torch.tensor([2.0, 3.0, 5.0])
    weights[1, 0, 0, 0, 0] = 7.0
    losses = joint_loss(
        lambda z, t: torch.zeros_like(z),
        lambda z, t: torch.zeros_like(z),
        torch.randn(2, 3, 2, 4, 4),
        torch.tensor([5, 800]),
        *noise,
        schedule=SCHEDULE,
        lam=0.5,
        exact_base=True,
        cell_weights=weights,
    )
    b, r = noise.base.square(), noise.residual.square() / 2
    base = [3.0 * float(b[0, :, 1, 2].sum()), 0.0]
    residual = [
        2.0 * float(r[0, 0, :, 1, 2].sum()) + 5.0 * float(r[0, 2, :, 1, 2].sum()),
        7.0 * float(r[1, 0, :, 0, 0].sum()),
    ]
    torch.testing.assert_close(losses[0], torch.tensor(base) / 32)
    torch.testing.assert_close(losses[1], torch.tensor(residual) / 64)


def test_loss_is_zero_for_exact_networks():
    x = torch.randn(2, 3, 1, 4, 4)
    noise = decomposed_noise(x.shape, 0, 1)
    base_loss, residual_loss = joint_loss(
        lambda z, t: noise.base,
        lambda z, t: noise.residual,
        x,
        torch.tensor([5, 800]),
        *noise,
        schedule=SCHEDULE,
        lam=0.5,
    )
    assert base_loss.abs().max() == 0
    assert residual_loss.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model": lambda z, t: z[:, :1]}, "base model's output"),
        ({"residual_model": lambda z, t: z[:, :1]}, "residual model's output"),
        ({"x": torch.zeros(2, 2, 2, 3, 3)}, "residual_noise must both"),
        ({"t": torch.tensor([1, 1000])}, "t must lie"),
        ({"base_noise": torch.zeros(2, 2, 3, 4)}, "base must be"),
        ({"exact_base": torch.zeros(2)}, "exact_base"),
        ({"lam": 2.0}, "lam"),
        ({"cell_weights": torch.ones(2, 1, 3, 3)}, r"cell_weights must be \[B, N, 1, H, W\]"),
    ],
)
def test_loss_rejects(change, message):
    arguments = {
        "base_model": lambda z, t: z,
        "residual_model": lambda z, t: z,
        "x": torch.zeros(2, 3, 2, 3, 3),
        "t": torch.tensor([1, 2]),
        "base_noise": torch.zeros(2, 2, 3, 3),
        "residual_noise": torch.zeros(2, 3, 2, 3, 3),
        "schedule": SCHEDULE,
        "lam": 0.5,
    }
    with pytest.raises(ValueError, match=message):
        joint_loss(**{**arguments, **change})
