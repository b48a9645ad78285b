"""vfengine/diffusion/schedule.py: ᾱ and timesteps against diffusers, identity, refusals."""

import json

import pytest
import torch
from diffusers import DDIMScheduler

from vfengine.diffusion.schedule import SPACINGS, NoiseSchedule

NAMED = {
    "linear": NoiseSchedule.linear(1000, 1e-4, 2e-2),
    "scaled_linear": NoiseSchedule.scaled_linear(1000, 8.5e-4, 1.2e-2),
    "squaredcos_cap_v2": NoiseSchedule.cosine(1000),
}


def peer(name: str, spacing: str = "leading") -> DDIMScheduler:
    start, end = (8.5e-4, 1.2e-2) if name == "scaled_linear" else (1e-4, 2e-2)
    return DDIMScheduler(
        1000, start, end, beta_schedule=name, timestep_spacing=spacing, clip_sample=False
    )


@pytest.mark.parametrize("name", NAMED)
def test_alphas_cumprod_equal_diffusers(name):
    schedule = NAMED[name]
    assert schedule.alphas_cumprod.dtype == torch.float64
    # diffusers multiplies a thousand factors in fp32
    torch.testing.assert_close(
        schedule.alphas_cumprod.float(), peer(name).alphas_cumprod, rtol=2e-4, atol=1e-9
    )


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_diffusers(spacing):
    schedule, scheduler = NAMED["linear"], peer("linear", spacing)
    for steps in (1, 2, 3, 7, 10, 25, 50, 64, 333, 999, 1000):
        scheduler.set_timesteps(steps)
        ours = schedule.timesteps(steps, spacing=spacing)
        assert ours.dtype == torch.int64
        assert ours.tolist() == scheduler.timesteps.tolist(), steps


@pytest.mark.parametrize("spacing", SPACINGS)
def test_an_offset_moves_leading_timesteps_alone(spacing):
    schedule = NAMED["linear"]
    moved = schedule.timesteps(50, spacing, steps_offset=1) - schedule.timesteps(50, spacing)
    assert bool((moved == (1 if spacing == "leading" else 0)).all())


def test_offsets_are_refused_that_lead_past_the_schedule():
    schedule = NAMED["linear"]
    assert schedule.timesteps(999, steps_offset=1)[0] == 999
    with pytest.raises(ValueError, match="1000 steps with steps_offset 1 begin at 1000, past"):
        schedule.timesteps(1000, steps_offset=1)
    with pytest.raises(ValueError, match=f"50 steps with steps_offset {10**30} begin at "):
        schedule.timesteps(50, steps_offset=10**30)
    for offset in (-1, 1.0, True):
        with pytest.raises(ValueError, match="steps_offset must be an int >= 0"):
            schedule.timesteps(50, steps_offset=offset)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_count_descends_inside_the_schedule(spacing):
    schedule = NoiseSchedule.linear(97)
    for steps in range(1, 98):
        t = schedule.timesteps(steps, spacing)
        assert t.numel() == steps
        assert int(t[-1]) >= 0 and int(t[0]) < 97
        assert bool((t[1:] < t[:-1]).all())


def test_previous_is_the_next_selected_step_and_one_at_the_end():
    schedule = NAMED["linear"]
    t = schedule.timesteps(7, "trailing")
    expected = [*schedule.alphas_cumprod[t][1:].tolist(), 1.0]
    assert schedule.selected_previous(t).tolist() == expected
    expected[-1] = float(schedule.alphas_cumprod[0])
    assert schedule.selected_previous(t, set_alpha_to_one=False).tolist() == expected


def test_signal_and_noise_are_of_unit_power():
    z = torch.zeros(3, 2, 1, 4, 4, dtype=torch.float64)
    signal, noise = NAMED["linear"].signal_and_noise(torch.tensor([0, 500, 999]), z)
    assert signal.shape == noise.shape == (3, 1, 1, 1, 1)
    torch.testing.assert_close(signal**2 + noise**2, torch.ones_like(signal))


def test_own_values_are_kept_as_a_float64_copy():
    values = torch.tensor([0.9, 0.5, 0.1])
    schedule = NoiseSchedule(values)
    values[0] = 0.0
    assert schedule.alphas_cumprod.dtype == torch.float64
    assert schedule.alphas_cumprod[0] == pytest.approx(0.9)
    assert schedule.num_train_timesteps == 3


@pytest.mark.parametrize("schedule", [*NAMED.values(), NoiseSchedule(torch.tensor([0.9, 0.2]))])
def test_dict_round_trips_through_json(schedule):
    again = NoiseSchedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.to_dict() == schedule.to_dict()


def test_fingerprint_names_the_schedule():
    prints = {schedule.fingerprint() for schedule in NAMED.values()}
    assert len(prints) == 3
    assert NoiseSchedule.linear(1000, 1e-4, 2e-2).fingerprint() in prints
    # one float64 bit, as another machine's cosine may give, is the same schedule
    alphas = NAMED["squaredcos_cap_v2"].alphas_cumprod.clone()
    alphas[3] *= 1 + 2**-52
    assert NoiseSchedule(alphas).fingerprint() in prints


@pytest.mark.parametrize(
    "values",
    [[], [[0.9, 0.5]], [0.5, 0.9], [0.5, 0.5], [1.0, 0.5], [0.5, 0.0], [0.9, float("nan")]],
)
def test_rejects_values_that_are_no_schedule(values):
    with pytest.raises(ValueError, match="alphas_cumprod"):
        NoiseSchedule(torch.tensor(values))


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, None])
def test_rejects_step_counts(steps):
    with pytest.raises(ValueError, match="1 … 1000"):
        NAMED["linear"].timesteps(steps)


@pytest.mark.parametrize(
    "call",
    [
        lambda: NAMED["linear"].timesteps(10, "even"),
        lambda: NoiseSchedule.linear(0),
        lambda: NoiseSchedule.linear(10, 0.0, 0.1),
        lambda: NoiseSchedule.scaled_linear(10, 0.2, 0.1),
        lambda: NoiseSchedule.cosine(10, offset=1.5),
        lambda: NoiseSchedule.from_dict({"name": "quadratic"}),
        lambda: NoiseSchedule.from_dict({"name": "linear", "gamma": 1}),
        lambda: NAMED["linear"].selected(torch.tensor([3, 5])),
        lambda: NAMED["linear"].selected(torch.tensor([1000, 5])),
        lambda: NAMED["linear"].selected(torch.tensor([5.0])),
        lambda: NAMED["linear"].signal_and_noise(torch.tensor([-1]), torch.zeros(1, 1)),
        lambda: NAMED["linear"].signal_and_noise(torch.tensor([1, 2]), torch.zeros(1, 1)),
    ],
)
def test_rejects_bad_arguments(call):
    with pytest.raises(ValueError):
        call()
