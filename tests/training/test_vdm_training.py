"""Training VDM*: its loss, that it repeats and resumes, where it may start from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_video_config
from safetensors.torch import load_file
from test_models import randomise
from test_training import assert_equal_states, new_trainer, state_of

from vfengine.formats.checkpoint import build_network, save_checkpoint
from vfengine.models import vdm_config

BASE = tiny_config().base
SCHEDULE = tiny_config().noise_schedule()


def test_loss_is_the_weighted_error_of_every_frame():
    trainer = new_trainer(config=tiny_video_config(), batch_size=3)
    randomise(trainer.networks["video"])
    calls = []
    trainer.networks["video"].register_forward_hook(
        lambda _, args, kwargs, out: calls.append((*args, kwargs, out)), with_kwargs=True
    )
    losses = trainer.losses(0)
    (z, t, conditions, estimate), (loss, loss_t) = calls[0], losses["video"]
    assert list(losses) == ["video"] and len(calls) == 1
    assert z.shape == (3, 4, 3, 16, 16)
    assert torch.equal(t, loss_t)
    assert conditions["class_labels"].shape == (3,)
    batch = trainer.batch_sampler(0)
    x, labels, _ = batch.clips(3)
    assert torch.equal(labels, conditions["class_labels"])
    assert torch.equal(batch.timesteps(3), t)
    eps = batch.normal(x.shape)
    a = SCHEDULE.alphas_cumprod[t].view(3, 1, 1, 1, 1)
    torch.testing.assert_close(z.double(), a.sqrt() * x + (1 - a).sqrt() * eps, rtol=0, atol=1e-5)
    covariance = (eps.flatten(2) @ eps.flatten(2).mT) / eps[0, 0].numel()
    torch.testing.assert_close(covariance, torch.eye(4).expand(3, 4, 4), rtol=0, atol=0.2)
    ratio = ((1 - a) / a).flatten()
    weight = ratio * ((1 / ratio).clamp(max=10) + 4)  # as the base network's, at std 0.5
    expected = (eps - estimate).double().square().flatten(1).mean(1) * weight
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


def test_vdm_learns_and_every_weight_moves():
    clip = np.full((1, 4, 16, 16, 3), 40, np.uint8)
    for i in range(4):
        clip[0, i, 4:10, 2 * i + 1 : 2 * i + 7] = (220, 120, 60)  # a square that moves
    options = {"steps": 30, "batch_size": 4, "learning_rate": 5e-3}
    trainer = new_trainer(
        config=tiny_video_config(), clips=(clip, np.zeros(1, np.int64)), **options
    )
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    losses = [trainer.step().losses["video"] for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert not any(map(torch.equal, before, trainer.parameters))


def test_vdm_trains_as_repeatably_as_it_resumes(tmp_path):
    whole, first = new_trainer(config=tiny_video_config()), new_trainer(config=tiny_video_config())
    assert repr(whole.step()) == repr(first.step())
    first.save(tmp_path / "state")
    resumed = new_trainer(config=tiny_video_config())
    resumed.restore(tmp_path / "state")
    assert repr(resumed.step()) == repr(whole.step())
    assert_equal_states(state_of(resumed, tmp_path / "a"), state_of(whole, tmp_path / "b"))


def test_states_of_the_other_objective_are_refused(tmp_path):
    trainers = {"vdm": new_trainer(config=tiny_video_config()), "decomposed": new_trainer()}
    for name, trainer in trainers.items():
        trainer.save(tmp_path / name)
    for name, other in (("vdm", "decomposed"), ("decomposed", "vdm")):
        with pytest.raises(ValueError, match="state of another model"):
            trainers[name].restore(tmp_path / other)
    feeding = replace(vdm_config(BASE), temporal_feed_forward=True)
    with pytest.raises(ValueError, match="state of another model"):
        new_trainer(config=tiny_video_config(video=feeding)).restore(tmp_path / "vdm")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved VDM* with random weights."""
    state = randomise(build_network(tiny_video_config(), "video")).unet.state_dict()
    save_checkpoint(tmp_path / "model", tiny_video_config(), state)
    return tmp_path / "model"


def test_vdm_starts_from_a_base_network_or_from_its_like(folder, tiny_checkpoint):
    trainer = new_trainer(config=tiny_video_config())
    fresh = trainer.warm_start(tiny_checkpoint)
    assert fresh and all(name.startswith("video.") and ".temporal." in name for name in fresh)
    base = load_file(tiny_checkpoint / "base.safetensors")
    for network in (trainer.networks["video"], trainer.averaged["video"]):
        state = network.unet.state_dict()
        assert all(torch.equal(state[key], value) for key, value in base.items())
    assert trainer.warm_start(folder) == []
    video = load_file(folder / "video.safetensors")
    state = trainer.averaged["video"].unet.state_dict()
    assert all(torch.equal(state[key], value.float()) for key, value in video.items())


def test_decomposed_model_does_not_start_from_a_vdm(folder):
    with pytest.raises(ValueError, match=r"starts from a decomposed model, not from a VDM\*"):
        new_trainer().warm_start(folder)
