"""Training VDM*: its loss, that it repeats and resumes, where it may start from, the command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from safetensors.torch import load_file
from test_models import randomise
from test_training import assert_equal_states, new_trainer, random_clips, state_of, weights_of
from test_vdm import vdm

from vfengine.cli import train
from vfengine.formats.checkpoint import build_video, read_config, save_checkpoint
from vfengine.media.video import write_video
from vfengine.models import vdm_config
from vfengine.training.trainer import Trainer

BASE = tiny_config().base
SCHEDULE = tiny_config().noise_schedule()


# -- training --------------------------------------------------------------------------------------


def test_loss_is_the_weighted_error_of_every_frame():
    trainer = new_trainer(config=vdm(), batch_size=3)
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
    draw = trainer.draw(0)
    x, labels = draw.clips(3)
    assert torch.equal(labels, conditions["class_labels"])
    assert torch.equal(draw.timesteps(3), t)
    eps = draw.normal(x.shape)
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
    trainer = new_trainer(config=vdm(), clips=(clip, np.zeros(1, np.int64)), **options)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    losses = [trainer.step().losses["video"] for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert not any(map(torch.equal, before, trainer.parameters))


def test_vdm_trains_as_repeatably_as_it_resumes(tmp_path):
    whole, first = new_trainer(config=vdm()), new_trainer(config=vdm())
    assert repr(whole.step()) == repr(first.step())
    first.save(tmp_path / "state")
    resumed = new_trainer(config=vdm())
    resumed.restore(tmp_path / "state")
    assert repr(resumed.step()) == repr(whole.step())
    assert_equal_states(state_of(resumed, tmp_path / "a"), state_of(whole, tmp_path / "b"))


def test_states_of_the_other_objective_are_refused(tmp_path):
    trainers = {"vdm": new_trainer(config=vdm()), "decomposed": new_trainer()}
    for name, trainer in trainers.items():
        trainer.save(tmp_path / name)
    for name, other in (("vdm", "decomposed"), ("decomposed", "vdm")):
        with pytest.raises(ValueError, match="state of another model"):
            trainers[name].restore(tmp_path / other)
    feeding = replace(vdm_config(BASE), temporal_feed_forward=True)
    with pytest.raises(ValueError, match="state of another model"):
        new_trainer(config=vdm(video=feeding)).restore(tmp_path / "vdm")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved VDM* with random weights."""
    state = randomise(build_video(vdm())).unet.state_dict()
    save_checkpoint(tmp_path / "model", vdm(), state)
    return tmp_path / "model"


def test_vdm_starts_from_a_base_network_or_from_its_like(folder, tiny_checkpoint):
    trainer = new_trainer(config=vdm())
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


# -- the command -----------------------------------------------------------------------------------

FLAGS = [
    *("--objective", "vdm", "--num-frames", "4", "--size", "16", "--patch-size", "2"),
    *("--layers-per-block", "1,1", "--base-channels", "16,16", "--precision", "fp32"),
    *("--steps", "4", "--batch-size", "2", "--warmup", "1"),
    *("--save-every", "2", "--log-every", "2", "--sample-every", "4"),
]


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    """Trains on two videos of one class; --output is still to be given."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "left").mkdir()
    for i, frames in enumerate(random_clips(2)[0]):
        write_video(folder / "left" / f"{i}.webp", frames)
    return ["--data", str(folder), *FLAGS]


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory) -> Path:
    """The output of a complete run."""
    output = tmp_path_factory.mktemp("runs") / "trained"
    assert train.main([*command, "--output", str(output)]) == 0
    return output


def test_command_trains_a_vdm(trained):
    assert {str(file.relative_to(trained)) for file in trained.rglob("*.*")} == {
        *("checkpoint/config.json", "checkpoint/video.safetensors", "log.jsonl"),
        *("samples/step-0000004.png", "training.safetensors"),
    }
    config = read_config(trained / "checkpoint")
    assert config.video == replace(
        vdm_config(replace(config.video, temporal_attention=(False, False))),
        block_out_channels=(16, 16),
    )
    with Image.open(trained / "samples" / "step-0000004.png") as sheet:
        assert sheet.size == (4 * 17 - 1, 17 - 1)  # one class, its clip in a row
    start, *logged = map(json.loads, (trained / "log.jsonl").read_text().splitlines())
    assert (start["objective"], start["extra_images"], start["lam"]) == ("vdm", 0, None)
    assert [line["step"] for line in logged] == [2, 4]
    for line in logged:
        assert line.keys() == {"step", "video", "video_by_t", "clips_per_second"}
        assert line["video"] > 0 and len(line["video_by_t"]) == 5


def test_interrupted_command_resumes_to_the_same_weights(command, trained, tmp_path, monkeypatch):
    step = Trainer.step

    def interrupted(trainer):
        if trainer.steps_done == 3:
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert train.main([*command, "--output", str(tmp_path)]) == 130
    assert weights_of(tmp_path) != weights_of(trained)
    assert train.main([*command, "--output", str(tmp_path), "--resume"]) == 0
    assert weights_of(tmp_path) == weights_of(trained)


def test_command_says_how_large_the_network_is_and_what_is_new_in_it(
    command, tiny_checkpoint, tmp_path, capsys
):
    flags = ["--init-from", str(tiny_checkpoint), "--steps", "1", "--sample-every", "0"]
    assert train.main([*command, *flags, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    size = sum(p.numel() for p in build_video(read_config(tmp_path / "checkpoint")).parameters())
    assert f"video {size / 1e6:.2f} M parameters" in said
    assert "video.mid.0.temporal.proj_out.weight" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lam", "0.5"], "--lam has no meaning for --objective vdm"),
        (["--residual-channels", "16,16"], "--residual-channels has no meaning"),
        (["--base-path", "clean"], "--base-path has no meaning"),
        (["--extra-images", "40"], "--extra-images has no meaning"),
        (["--clean-share", "0"], "--clean-share has no meaning"),
        (["--base-jitter", "0.1"], "--base-jitter has no meaning"),
        (["--base-channels", "16"], "one per level"),
        (["--size", "18"], "--size must be a multiple of 4"),
    ],
)
def test_flags_of_decomposed_models_are_refused(command, tmp_path, capsys, flags, message):
    assert train.main([*command, *flags, "--output", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vfengine.train: error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "new").exists()


def test_outputs_of_the_other_objective_are_not_resumed(command, trained, tmp_path, capsys):
    output = shutil.copytree(trained, tmp_path / "run")
    other = [*command, "--output", str(output), "--resume", "--objective", "decomposed"]
    assert train.main([*other, "--residual-channels", "16,16"]) == 2
    assert "training state of another model" in capsys.readouterr().err
    assert weights_of(output) == weights_of(trained)


def test_help_tells_the_objectives_apart(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--objective {decomposed,vdm}" in text
    assert text.count("not with --objective vdm") == 6
