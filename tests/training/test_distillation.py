"""training/distillation.py: what a student learns of its teacher."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import save_random, save_tiny, tiny_config
from few_step_models import GUIDANCE, student_config
from test_training import assert_equal_states, random_clips

from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.diffusion.solvers import solver_table
from vfengine.files import open_tensors
from vfengine.formats.checkpoint import read_config
from vfengine.sampling.api import sample
from vfengine.training.distillation import CLEAN, Distillation, Jumps, Teacher, distilled_config
from vfengine.training.options import TrainingOptions
from vfengine.training.trainer import Trainer

SCHEDULE = NoiseSchedule.linear()
FAST = {"steps": 100, "batch_size": 4, "extra_images": 4, "warmup": 2, "precision": "fp32"}


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A tiny model whose weights are all random."""
    return save_tiny(tmp_path_factory.mktemp("teacher") / "tiny", base_path="clean")


def new_student(folder, train="both", steps=4, teacher_steps=8, **options) -> Trainer:
    options = {"clean_share": 1.0, **FAST, **options}
    options = TrainingOptions(train=train, teacher_steps=teacher_steps, **options)
    teacher = Teacher(folder, teacher_steps)
    names = ("base", "residual") if train == "both" else (train,)
    config = distilled_config(teacher.config, names, steps, GUIDANCE)
    made = partial(Distillation, teacher=teacher)
    trainer = Trainer(config, options, *random_clips(), objective=made)
    trainer.warm_start(folder)
    return trainer


# -- the rule of a step ----------------------------------------------------------------------------


def test_steps_are_those_of_ddim():
    table = solver_table("ddim", SCHEDULE, 4, timesteps=(999, 749, 499, 249))
    ends = [*table.timesteps.tolist(), CLEAN]
    z, eps = torch.randn(2, 1, 3, 4, 4)
    for (t, p), (c1, c2, _) in zip(pairwise(ends), table.coeffs.tolist(), strict=True):
        place = torch.tensor([t]), torch.tensor([p])
        landed = Jumps(SCHEDULE).step(z, eps, *place)
        torch.testing.assert_close(landed, c1 * z + c2 * eps, rtol=1e-6, atol=1e-6)
        found = Jumps(SCHEDULE).between(z, landed, *place)
        torch.testing.assert_close(found, eps, rtol=1e-3, atol=1e-3)


def test_each_sample_steps_at_its_own_time():
    jumps, (z, eps) = Jumps(SCHEDULE), torch.randn(2, 3, 2, 4, 4)
    t, p = torch.tensor([999, 500, 249]), torch.tensor([749, 100, CLEAN])
    together = jumps.step(z, eps, t, p)
    for k in range(3):
        alone = jumps.step(z[k : k + 1], eps[k : k + 1], t[k : k + 1], p[k : k + 1])
        assert torch.equal(together[k : k + 1], alone)


def test_the_times_of_a_teacher_hold_those_of_its_student(teacher_folder):
    times = Teacher(teacher_folder, 48).times("base", (999, 749, 499, 249))
    assert times.shape == (4, 13)
    assert times[:, 0].tolist() == [999, 749, 499, 249]
    assert times[:, -1].tolist() == [749, 499, 249, CLEAN]
    assert bool((times.diff() < 0).all())


def test_a_distilled_teacher_takes_its_own_steps(tmp_path):
    folder = save_random(tmp_path / "eight", student_config(steps=8))
    teacher = Teacher(folder, 48)
    timesteps = tuple(SCHEDULE.timesteps(4, "trailing").tolist())
    times = teacher.times("base", timesteps)
    assert times.tolist() == [
        [999, 874, 749],
        [749, 624, 499],
        [499, 374, 249],
        [249, 124, CLEAN],
    ]
    with pytest.raises(ValueError, match="takes 8 steps, which are not a multiple of 3"):
        teacher.times("base", (999, 666, 332))
    with pytest.raises(ValueError, match="not a multiple of 8"):
        teacher.times("base", tuple(SCHEDULE.timesteps(8, "trailing").tolist()))


# -- the loss --------------------------------------------------------------------------------------


class Constant(Teacher):
    """A teacher whose estimates are the same wherever it is asked: its path is straight."""

    def estimate(self, name, z, t, conditions, scales):
        return torch.full_like(z, 0.25)


def test_of_a_straight_path_a_student_learns_the_estimate_itself(teacher_folder):
    trainer = new_student(teacher_folder, "base")
    trainer.objective.teacher = Constant(teacher_folder, 8)
    seen = {}
    trainer.objective._weighed = lambda error, t, *rest: seen.update(error=error) or error.mean()
    trainer.objective.student = lambda name, z, *rest: torch.zeros_like(z)
    trainer.objective.losses(trainer.batch_sampler(0))
    torch.testing.assert_close(
        seen["error"], torch.full_like(seen["error"], 0.25), atol=2e-3, rtol=0
    )


def restated_base_loss(trainer, teacher_unets, step):
    """The base network's loss, one sample after the other."""
    batch, few = trainer.batch_sampler(step), trainer.config.distilled["base"]
    x, labels, _ = batch.clips(8, only_base=True)
    place = (torch.arange(8) + batch.uniform(1)) / 8
    scales = few.guidance[0] + (few.guidance[1] - few.guidance[0]) * batch.uniform(8)
    noise, ends = batch.normal(x.shape), [*few.timesteps, CLEAN]
    alphas = [*SCHEDULE.alphas_cumprod.tolist(), 1.0]
    losses = []
    for k in range(8):
        part = int(place[k] * 4)
        t, p = ends[part], ends[part + 1]
        z = alphas[t] ** 0.5 * x[k : k + 1] + (1 - alphas[t]) ** 0.5 * noise[k : k + 1]
        first, middle = z, round(t + (p - t) / 2)
        for a, b in ((t, middle), (middle, p)):
            network, at = teacher_unets["base"], torch.tensor([a])
            shown = network(z, at, class_labels=labels[k : k + 1])
            plain = network(z, at, class_labels=torch.tensor([trainer.config.null_class]))
            eps = plain + scales[k] * (shown - plain)
            c1 = (alphas[b] / alphas[a]) ** 0.5
            z = c1 * z + ((1 - alphas[b]) ** 0.5 - c1 * (1 - alphas[a]) ** 0.5) * eps
        c1 = (alphas[p] / alphas[t]) ** 0.5
        target = (z - c1 * first) / ((1 - alphas[p]) ** 0.5 - c1 * (1 - alphas[t]) ** 0.5)
        told = {"class_labels": labels[k : k + 1], "guidance": scales[k : k + 1]}
        error = target - trainer.networks["base"](first, torch.tensor([t]), **told)
        sigma = (1 - alphas[t]) / alphas[t]
        weight = sigma * (min(1 / sigma, 10) + trainer.config.base_std**-2)
        losses.append(float(error.square().mean() * weight))
    return losses


def test_the_loss_of_the_base_network_is_that_of_its_formula(teacher_folder):
    trainer = new_student(teacher_folder, "base")
    trainer.step()  # no longer its teacher's copy
    found, t = trainer.losses(5)["base"]
    with torch.no_grad():
        own = {"base": trainer.objective.teacher._network("base")}
        expected = restated_base_loss(trainer, own, 5)
    assert sorted(set(t.tolist())) == [249, 499, 749, 999]
    np.testing.assert_allclose(found.tolist(), expected, rtol=2e-3)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_teacher_is_its_own_best_student(teacher_folder, share):
    """One that takes the teacher's steps one by one has nothing to learn where guidance is 1."""
    teacher = Teacher(teacher_folder, 2)
    config = replace(
        distilled_config(teacher.config, ("residual",), 1, (1.0, 1.0)), base_path="stepwise"
    )
    options = TrainingOptions(train="residual", teacher_steps=2, clean_share=share, **FAST)
    made = partial(Distillation, teacher=teacher)
    trainer = Trainer(config, options, *random_clips(), objective=made)
    trainer.warm_start(teacher_folder)
    one_step = torch.tensor([[999, CLEAN]])
    two_steps, trainer.objective._times["residual"] = trainer.objective._times["residual"], one_step
    alike = trainer.losses(0)["residual"][0].detach()
    trainer.objective._times["residual"] = two_steps
    unlike = trainer.losses(0)["residual"][0].detach()
    assert float(alike.max()) < 1e-6 < float(unlike.min())


def test_clips_under_the_exact_noise_ask_no_base_network(teacher_folder):
    for share, asked in ((1.0, {"residual"}), (0.5, {"base", "residual"})):
        trainer = new_student(teacher_folder, "residual", clean_share=share, batch_size=8)
        trainer.step()
        assert set(trainer.objective.teacher._networks) == asked


# -- training --------------------------------------------------------------------------------------


def test_a_student_begins_as_its_teacher_and_comes_nearer(teacher_folder):
    trainer = new_student(teacher_folder, "base", learning_rate=5e-3, batch_size=8)
    fresh = trainer.warm_start(teacher_folder)
    assert {name.split(".")[1] for name in fresh} == {"guidance_embedding"}
    one, draw = trainer.batch_sampler(0), trainer.batch_sampler
    trainer.batch_sampler = lambda *_: draw(0)  # one batch, again and again
    assert one.null == 3
    losses = [trainer.step().losses["base"] for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]


def test_a_resumed_student_takes_the_same_steps(teacher_folder, tmp_path):
    whole, first, second = (new_student(teacher_folder, clean_share=0.5) for _ in range(3))
    for _ in range(3):
        whole.step()
    first.step()
    first.save(tmp_path / "state")
    second.restore(tmp_path / "state")
    for _ in range(2):
        second.step()
    states = []
    for trainer in (whole, second):
        trainer.save(tmp_path / "end")
        with open_tensors(tmp_path / "end") as file:
            states.append({key: file.get_tensor(key) for key in list(file.keys())})
    assert_equal_states(*states)


def test_a_state_is_that_of_one_teacher(teacher_folder, tmp_path):
    new_student(teacher_folder).save(tmp_path / "state")
    other = save_tiny(tmp_path / "other", seed=1, base_path="clean")
    for trainer in (new_student(other), new_student(teacher_folder, steps=2)):
        with pytest.raises(ValueError, match="of another model"):
            trainer.restore(tmp_path / "state")


def test_a_checkpoint_names_its_steps_and_its_teacher(teacher_folder, tmp_path):
    trainer = new_student(teacher_folder, "base")
    trainer.export(tmp_path / "student")
    config = read_config(tmp_path / "student")
    assert list(config.distilled) == ["base"]
    few = config.distilled["base"]
    assert few.timesteps == (999, 749, 499, 249)
    assert (few.guidance, few.solver) == (GUIDANCE, "ddim")
    assert few.teacher == read_config(teacher_folder).sha256["base"][:16]
    assert (config.base.guidance_embedding, config.residual.guidance_embedding) == (True, False)


def test_samples_are_taken_in_the_students_steps(teacher_folder):
    trainer = new_student(teacher_folder)
    labels, seen = torch.tensor([0, 2]), []
    networks = {
        name: lambda z, t, _net=net, **told: (
            seen.append((int(t[0]), told["guidance"])) or _net(z, t, **told)
        )
        for name, net in trainer.networks.items()
    }
    clips = trainer.objective.sample(networks, labels, 25)
    assert clips.shape == (2, 4, 3, 16, 16)
    assert seen == 2 * [(t, 2.0) for t in (999, 749, 499, 249)]


def test_sampling_functions_visit_given_timesteps():
    visited = []
    model = lambda z, t: visited.append(int(t[0])) or 0.1 * z  # noqa: E731
    noise = torch.randn(1, 3, 4, 4), torch.randn(1, 2, 3, 4, 4)
    sample(model, model, *noise, schedule=SCHEDULE, timesteps=[999, 300, 20])
    assert visited == [999, 300, 20] * 2
    with pytest.raises(ValueError, match="timesteps must descend"):
        sample(model, model, *noise, schedule=SCHEDULE, timesteps=[10, 300])


def test_a_plain_video_model_is_no_teacher(tiny_video_checkpoint):
    with pytest.raises(ValueError, match=r"only decomposed models are distilled, not a VDM\*"):
        Teacher(tiny_video_checkpoint)


def test_others_keep_their_own_steps():
    first = distilled_config(tiny_config(), ("base",), 4, GUIDANCE)
    both = distilled_config(tiny_config(), ("residual",), 2, (1.0, 3.0), others=first)
    assert {name: len(few.timesteps) for name, few in both.distilled.items()} == {
        "base": 4,
        "residual": 2,
    }
    assert both.base.guidance_embedding
