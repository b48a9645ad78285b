"""vfengine/formats/scheduler.py: published schedules against diffusers, and what is refused."""

import json
import math

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from seeded import normal

from vfengine.diffusion.schedule import SPACINGS, NoiseSchedule
from vfengine.formats.published import Unsupported
from vfengine.formats.scheduler import (
    MODELSCOPE_SCHEDULE,
    PublishedSchedule,
    base_schedule,
    diffusers_schedule,
    noise_schedule,
)

# scheduler_config.json of text-to-video-ms-1.7b
PUBLISHED = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.15.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def saved(scheduler) -> dict:
    """What diffusers writes to scheduler_config.json."""
    return json.loads(scheduler.to_json_string())


def test_the_published_checkpoint_is_modelscopes_schedule():
    assert diffusers_schedule(PUBLISHED) == MODELSCOPE_SCHEDULE
    assert MODELSCOPE_SCHEDULE.prediction_type == "epsilon"


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 5, 8, 20, 50])
def test_a_step_is_that_of_diffusers(steps, spacing, steps_offset, set_alpha_to_one, eta):
    """diffusers steps to t - T // n, which with these spacings is the next visited step."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=steps_offset,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(steps)
    published = diffusers_schedule(saved(scheduler))
    table = published.table("ddim", steps, eta)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    z, eps, xi = (normal(64, 64, seed=seed) for seed in range(3))
    for t, (c1, c2, sigma) in zip(table.timesteps.tolist(), table.coeffs.tolist(), strict=True):
        noise = {"eta": eta, "variance_noise": xi if eta else None}
        expected = scheduler.step(eps, t, z, **noise).prev_sample
        found = c1 * z + c2 * eps + sigma * xi
        assert (found - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_timesteps_are_those_of_diffusers(spacing, steps_offset):
    scheduler = DDIMScheduler(
        clip_sample=False, timestep_spacing=spacing, steps_offset=steps_offset
    )
    published = diffusers_schedule(saved(scheduler))
    for steps in (1, 2, 3, 7, 10, 25, 50, 64, 333, 999):
        scheduler.set_timesteps(steps)
        table = published.table("ddim", steps)
        assert table.timesteps.tolist() == scheduler.timesteps.tolist()


def test_linspace_steps_go_to_the_next_visited_one():
    """diffusers steps down by T // n = 20 timesteps and visits every 20.39th: a small gap."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(50)
    visited = scheduler.timesteps.tolist()
    theirs = [t - 1000 // 50 for t in visited[:-1]]
    assert theirs != visited[1:]
    published = diffusers_schedule(saved(scheduler))
    alphas = published.schedule.alphas_cumprod
    assert torch.equal(published.table("ddim", 50).alphas_cumprod[1:-1], alphas[visited[1:]])


# -- ModelScope's own formulas ---------------------------------------------------------------------


def modelscope_walk(model, z: torch.Tensor, steps: int) -> tuple[list[int], list[torch.Tensor]]:
    """The timesteps and states of its DDIM loop at eta 0, restated in float64."""
    betas = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    stride = 1000 // steps
    timesteps = (1 + torch.arange(0, 1000, stride)).clamp(0, 999).flip(0)
    states = []
    for t in timesteps.tolist():
        alpha, previous = alphas_cumprod[t], alphas_cumprod[max(t - stride, 0)]
        x0 = z / alpha.sqrt() - (1 / alpha - 1).sqrt() * model(z, t)
        eps = (z / alpha.sqrt() - x0) / (1 / alpha - 1).sqrt()
        z = previous.sqrt() * x0 + (1 - previous).sqrt() * eps
        states.append(z)
    return timesteps.tolist(), states


@pytest.mark.parametrize("steps", [1, 5, 50, 200])
def test_modelscopes_loop_where_steps_divide_1000(steps):
    def model(z, t):
        return 0.6 * torch.tanh(z + math.cos(t / 300))

    z = normal(4, 16).double()
    timesteps, states = modelscope_walk(model, z, steps)
    table = MODELSCOPE_SCHEDULE.table("ddim", steps)
    assert table.timesteps.tolist() == timesteps
    if steps == 50:
        assert (timesteps[:2], timesteps[-1]) == ([981, 961], 1)
    for t, row, expected in zip(timesteps, table.coeffs.tolist(), states, strict=True):
        z = row[0] * z + row[1] * model(z, t)
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [7, 30, 64])
def test_modelscope_takes_one_step_more_where_they_do_not(steps):
    """Its own loop begins one stride higher; ours, as diffusers', takes as many steps as asked."""
    timesteps, _ = modelscope_walk(lambda z, t: z, normal(1), steps)
    ours = MODELSCOPE_SCHEDULE.table("ddim", steps).timesteps.tolist()
    assert len(ours) == steps < len(timesteps)
    assert timesteps[-steps:] == ours


# -- what a base network takes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "others"),
    [
        ({"steps_offset": 0, "set_alpha_to_one": True}, {}),
        ({}, {"steps_offset": 1, "set_alpha_to_one": False}),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
            {"timestep_spacing": "linspace", "use_karras_sigmas": True, "steps_offset": 1},
        ),
        (
            {"_class_name": "DDPMScheduler", "clip_sample": True, "thresholding": True},
            {"clip_sample": True, "thresholding": True, "steps_offset": 1},
        ),
        (
            {"_class_name": "SASolverScheduler", "steps_offset": 0, "timestep_spacing": "leading"},
            {"_class_name": "SASolverScheduler"},
        ),
        ({"a_new_way": 3}, {"a_new_way": 3, "steps_offset": 1, "set_alpha_to_one": False}),
    ],
)
def test_a_base_network_leaves_the_way_of_sampling_by_name(changes, others):
    schedule, prediction_type, found = base_schedule({**PUBLISHED, **changes})
    assert (schedule, prediction_type) == (MODELSCOPE_SCHEDULE.schedule, "epsilon")
    assert found == others


# Each is made with a package of its own only (torchsde, scipy).
NEED_MORE = ("DPMSolverSDEScheduler", "LMSDiscreteScheduler")


def test_every_class_of_diffusers_is_decided():
    """Its noise levels are read, or it is refused by a reason; none is taken for another."""
    names = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    read = set()
    for name in sorted(names):
        values = {"_class_name": name}
        if name not in NEED_MORE:
            try:
                base_schedule(values)
            except Unsupported as error:
                assert error.entry == "_class_name"
                assert not str(error).startswith(f'_class_name = "{name}" is not one of')
                continue
            scheduler = getattr(diffusers, name)(20)
            values = saved(scheduler)
        schedule, _, _ = base_schedule(values)
        diffusers_schedule({**values, "clip_sample": False})
        if name not in NEED_MORE:
            torch.testing.assert_close(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod)
        read.add(name)
    assert len(read) == 17 < len(names)


# -- what else a configuration says ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (DDPMScheduler(clip_sample=False), ("leading", 0, True)),
        (PNDMScheduler(steps_offset=1), ("leading", 1, False)),
        (PNDMScheduler(set_alpha_to_one=True), ("leading", 0, True)),
        (EulerDiscreteScheduler(), ("linspace", 0, True)),
        (EulerDiscreteScheduler(final_sigmas_type="sigma_min"), ("linspace", 0, False)),
        (EulerAncestralDiscreteScheduler(timestep_spacing="leading"), ("leading", 0, True)),
        (DPMSolverMultistepScheduler(steps_offset=1), ("linspace", 1, True)),
        (UniPCMultistepScheduler(final_sigmas_type="sigma_min"), ("linspace", 0, False)),
        (diffusers.DDPMParallelScheduler(clip_sample=False), ("leading", 0, True)),
        (diffusers.DEISMultistepScheduler(), ("linspace", 0, False)),
        (diffusers.SASolverScheduler(timestep_spacing="leading"), ("leading", 0, False)),
        (diffusers.DPMSolverSinglestepScheduler(), ("linspace", 0, True)),
        (EulerAncestralDiscreteScheduler(timestep_spacing="trailing"), ("trailing", 0, True)),
    ],
)
def test_classes_that_share_the_entries(scheduler, expected):
    found = diffusers_schedule(saved(scheduler))
    assert (found.spacing, found.steps_offset, found.set_alpha_to_one) == expected
    assert found.schedule == NoiseSchedule.linear(1000, 1e-4, 2e-2)


def test_entries_left_by_another_class_do_not_count():
    """A DPM-Solver made from the configuration of a DDIM goes to a clean sample."""
    values = {
        **saved(DDIMScheduler(set_alpha_to_one=False)),
        **saved(DPMSolverMultistepScheduler()),
    }
    assert values["clip_sample"] and not values["set_alpha_to_one"]
    assert diffusers_schedule(values).set_alpha_to_one


def test_prediction_type_and_cosine_are_read():
    scheduler = DDIMScheduler(
        clip_sample=False, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"
    )
    found = diffusers_schedule(saved(scheduler))
    assert found == PublishedSchedule(NoiseSchedule.cosine(1000), "v_prediction")


def test_trained_betas_are_the_schedule():
    betas = [0.01, 0.02, 0.05, 0.1]
    scheduler = DDIMScheduler(4, trained_betas=betas, clip_sample=False)
    found = diffusers_schedule(saved(scheduler)).schedule
    torch.testing.assert_close(found.alphas_cumprod.float(), scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": None}, "_class_name = null is not one of DDIMScheduler"),
        ({"_class_name": ["DDIMScheduler"]}, "_class_name = "),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching.* is not one of DDIM"),
        ({"_class_name": "EDMEulerScheduler"}, "noise levels σ"),
        ({"_class_name": "LCMScheduler"}, "distilled networks"),
        ({"_class_name": "NextYearsScheduler"}, "is not one of DDIMScheduler"),
        ({"clip_sample": True}, "clip_sample = true is not supported"),
        ({"thresholding": True}, "thresholding = true is not supported"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = true is not supported"),
        ({"prediction_type": "sample"}, 'prediction_type = "sample" is not supported'),
        ({"timestep_spacing": "karras"}, 'timestep_spacing = "karras" is not supported'),
        ({"beta_schedule": "sigmoid"}, 'beta_schedule = "sigmoid" is not supported'),
        ({"steps_offset": -1}, "steps_offset = -1 must be an int from 0 on"),
        ({"steps_offset": "1"}, 'steps_offset = "1" must be an int from 0 on'),
        ({"beta_schedule": ["linear"]}, "beta_schedule = .*linear.* is not supported"),
        ({"beta_schedule": None}, "beta_schedule = null is not supported"),
        ({"beta_start": "0.1"}, 'beta_start = "0.1" must be a number'),
        ({"beta_start": None}, "beta_start = null must be a number"),
        ({"beta_end": True}, "beta_end = true must be a number"),
        ({"beta_end": math.nan}, "expected 0 < beta_start <= beta_end < 1"),
        ({"num_train_timesteps": None}, "num_train_timesteps must be an int"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps must be an int"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas = true is not supported"),
        ({"timestep_type": "continuous"}, 'timestep_type = "continuous" is not supported'),
        ({"num_train_timesteps": 1e3}, "num_train_timesteps must be an int"),
        ({"trained_betas": [0.1, 0.2]}, "num_train_timesteps = 1000 does not fit trained_betas"),
        ({"trained_betas": 0.1}, "does not fit trained_betas"),
        ({"set_alpha_to_one": "no"}, 'set_alpha_to_one = "no" is not supported'),
        ({"use_karras_sigmas": True}, "use_karras_sigmas = true is not supported"),
        ({"prediction": "epsilon"}, 'prediction = "epsilon" is an unknown entry'),
    ],
)
def test_refuses_by_name_what_would_change_the_result(changes, message):
    with pytest.raises(ValueError, match=message):
        diffusers_schedule({**PUBLISHED, **changes})


def test_clipping_that_is_on_by_default_is_refused():
    values = {name: value for name, value in PUBLISHED.items() if name != "clip_sample"}
    with pytest.raises(Unsupported, match="clip_sample = true"):
        diffusers_schedule(values)


def test_noise_levels_alone_may_come_without_a_class():
    values = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    assert noise_schedule(values) == MODELSCOPE_SCHEDULE.schedule
    assert noise_schedule({}) == NoiseSchedule.linear(1000, 1e-4, 2e-2)
