"""python -m vfengine.train on latents with captions: what it writes, when it stops, one network."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from test_train import interrupt_training, weights_of
from tiny_parts import save_tiny_parts

from vfengine.cli import train
from vfengine.cli.train_settings import read_settings
from vfengine.formats.checkpoint import read_config
from vfengine.formats.parts import read_autoencoder, save_autoencoder
from vfengine.training.trainer import Trainer

SHAPE = [
    *("--num-frames", "4", "--size", "16", "--num-clips", "6", "--captions", "2"),
    *("--layers-per-block", "1,1", "--base-channels", "32,32", "--residual-channels", "32,32"),
]
SCHEDULE = [
    *("--steps", "4", "--batch-size", "2", "--extra-images", "2", "--warmup", "1"),
    *("--save-every", "4", "--log-every", "2", "--precision", "fp32", "--sample-every", "4"),
]


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    """Trains tiny networks on six clips, kept in a folder; --output is still to be given."""
    folder = tmp_path_factory.mktemp("parts")
    autoencoder, text = save_tiny_parts(folder)
    parts = ["--autoencoder", str(autoencoder), "--text-encoder", str(text)]
    return [*parts, "--clips-cache", str(folder / "clips"), *SHAPE, *SCHEDULE]


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory) -> Path:
    """The output of a complete run."""
    output = tmp_path_factory.mktemp("runs") / "trained"
    assert train.main([*command, "--output", str(output)]) == 0
    return output


def trained_autoencoder(command: list[str]) -> Path:
    return Path(command[command.index("--autoencoder") + 1])


def logged(output: Path, key: str) -> list:
    lines = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def test_command_writes_a_model_with_its_parts(trained):
    assert {str(file.relative_to(trained)) for file in trained.rglob("*.*")} == {
        *("checkpoint/config.json", "checkpoint/base.safetensors"),
        *("checkpoint/residual.safetensors", "checkpoint/autoencoder.safetensors"),
        *("checkpoint/text_encoder.safetensors", "checkpoint/tokenizer.json", "log.jsonl"),
        *("samples/step-0000004.png", "samples/prompts.txt", "training.safetensors"),
    }
    config = read_config(trained / "checkpoint")
    assert config.labels[:2] == ("backflip", "cartwheel") and len(config.prompts) == 15
    assert (config.channels, config.height, config.width) == (4, 4, 4)
    assert config.picture_size == (16, 16)
    assert len((trained / "samples" / "prompts.txt").read_text().splitlines()) == 8
    assert logged(trained, "step") == [2, 4]


def test_clips_are_kept_for_the_next_run(command, trained, tmp_path):
    kept = sorted(Path(command[command.index("--clips-cache") + 1]).iterdir())
    assert [file.name.split("-")[0] for file in kept] == ["captions", "clips"]
    before = [file.stat().st_mtime_ns for file in kept]
    assert train.main([*command, "--output", str(tmp_path / "other")]) == 0
    assert [file.stat().st_mtime_ns for file in kept] == before
    assert weights_of(tmp_path / "other") == weights_of(trained)


# -- when it stops ---------------------------------------------------------------------------------


def test_run_without_time_saves_what_there_is(command, trained, tmp_path, capsys):
    output = ["--output", str(tmp_path / "run")]
    assert train.main([*command, *output, "--max-minutes", "0"]) == 0
    assert "stopped after 0 of 4 steps: the same command with --resume" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "checkpoint")  # as if interrupted between it and the state
    assert train.main([*command, *output, "--resume", "--max-hours", "1"]) == 0
    said = capsys.readouterr().err
    assert "stopped" not in said and "has been written anew" in said
    assert weights_of(tmp_path / "run") == weights_of(trained)


def test_run_ends_with_its_time(command, trained, tmp_path, monkeypatch, capsys):
    clock = iter([0.0])
    monkeypatch.setattr(train.Limit, "reached", property(lambda _: next(clock, 1.0) >= 1.0))
    plain = Trainer.step
    steps = []

    def step(trainer):
        steps.append(trainer.steps_done)
        return plain(trainer)

    monkeypatch.setattr(Trainer, "step", step)
    clock = iter([0.0] * 2)  # before the first step, and after it
    assert train.main([*command, "--output", str(tmp_path / "run")]) == 0
    done = len(steps)
    assert 0 < done < 4
    assert f"stopped after {done} of 4 steps" in capsys.readouterr().err
    assert logged(tmp_path / "run", "step")[-1] == done
    monkeypatch.undo()
    assert train.main([*command, "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert weights_of(tmp_path / "run") == weights_of(trained)


def test_sigterm_saves_and_stops(command, trained, tmp_path, monkeypatch, capsys):
    plain = Trainer.step

    def step(trainer):
        report = plain(trainer)
        if trainer.steps_done == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    former = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        assert train.main([*command, "--output", str(tmp_path / "run")]) == 143
    assert signal.getsignal(signal.SIGTERM) is former
    assert "stopped after 3 of 4 steps" in capsys.readouterr().err
    assert train.main([*command, "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert logged(tmp_path / "run", "start") == [0, 3]
    assert weights_of(tmp_path / "run") == weights_of(trained)


def test_interrupted_run_resumes_to_the_same_weights(command, trained, tmp_path, monkeypatch):
    command = [*command, "--output", str(tmp_path), "--save-every", "2"]
    with monkeypatch.context() as patch:
        interrupt_training(patch, step=3)
        assert train.main(command) == 130
    assert train.main([*command, "--resume"]) == 0
    assert weights_of(tmp_path) == weights_of(trained)


# -- one network -----------------------------------------------------------------------------------


def test_networks_are_trained_by_themselves_and_merged(command, tmp_path):
    base, residual, merged = (tmp_path / name for name in ("base", "residual", "merged"))
    assert train.main([*command, "--train", "base", "--output", str(base)]) == 0
    start = ["--init-from", str(base / "checkpoint")]
    assert train.main([*command, "--train", "residual", *start, "--output", str(residual)]) == 0
    assert weights_of(residual)["base"] == weights_of(base)["base"]
    assert read_config(residual / "checkpoint").clean_share == 1
    both = [*start, "--residual-from", str(residual / "checkpoint"), "--max-minutes", "0"]
    assert train.main([*command, *both, "--output", str(merged)]) == 0
    assert weights_of(merged)["base"] == weights_of(base)["base"]
    assert weights_of(merged)["residual"] == weights_of(residual)["residual"]


def test_residual_network_keeps_the_scale_of_its_training(command, trained, tmp_path):
    """Its weights rely on it, and other clips have another."""
    measured = read_config(trained / "checkpoint").residual_std
    output = ["--output", str(tmp_path / "run"), "--max-minutes", "0", "--num-clips", "3"]
    assert train.main([*command, *output]) == 0
    assert read_config(tmp_path / "run" / "checkpoint").residual_std != measured
    start = ["--init-from", str(tmp_path / "run" / "checkpoint")]
    start += ["--residual-from", str(trained / "checkpoint"), "--output", str(tmp_path / "on")]
    assert train.main([*command, *output, *start]) == 0
    assert read_config(tmp_path / "on" / "checkpoint").residual_std == measured
    assert train.main([*command, *output, *start, "--resume", "--max-minutes", "9"]) == 0
    assert read_config(tmp_path / "on" / "checkpoint").residual_std == measured


def test_networks_of_different_latents_are_not_merged(command, trained, tmp_path, capsys):
    config, state, mean, std = read_autoencoder(trained_autoencoder(command))
    save_autoencoder(tmp_path / "autoencoder", config, state, mean, [2 * x for x in std])
    other = [*command, "--autoencoder", str(tmp_path / "autoencoder"), "--max-minutes", "0"]
    assert train.main([*other, "--output", str(tmp_path / "other")]) == 0
    both = ["--init-from", str(trained / "checkpoint")]
    both += ["--residual-from", str(tmp_path / "other" / "checkpoint")]
    assert train.main([*command, *both, "--output", str(tmp_path / "merged")]) == 2
    assert "are of different latents" in capsys.readouterr().err


# -- settings --------------------------------------------------------------------------------------


def test_defaults_are_those_of_what_is_trained():
    output = ["--output", "x"]
    pixels = read_settings(output)
    assert (pixels.size, pixels.patch_size, pixels.base_channels) == (64, 4, (80, 160, 272))
    latents = read_settings([*output, "--autoencoder", "a", "--text-encoder", "t"])
    assert (latents.size, latents.patch_size, latents.base_channels) == (128, 1, (96, 160, 160))
    assert (latents.train, latents.clean_share, latents.base_path) == ("both", 0.85, "clean")
    assert (latents.cell_weight, latents.timestep_shift, pixels.cell_weight) == (3.0, 0.6, 1.0)
    alone = read_settings([*output, "--train", "residual"])
    assert (alone.clean_share, alone.base_path) == (1.0, "clean")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--autoencoder", "nowhere"], "--autoencoder and --text-encoder go together"),
        (["--data", "videos"], "videos: no such folder"),
        (["--data", "videos", "--cell-weight", "3"], "--cell-weight needs rendered clips"),
        (["--autoencoder", "nowhere", "--text-encoder", "nowhere"], "nowhere"),
        (["--size", "18"], "--size must be a multiple of 4, got 18"),
        (["--captions", "0"], "--captions must be at least 1"),
        (["--train", "residual", "--clean-share", "0.5"], "clean_share must be 1"),
        (["--max-minutes", "-1"], "--max-minutes must not be negative"),
        (["--objective", "vdm"], "has no meaning for --objective vdm"),
        (["--objective", "text"], "has no meaning for --objective text"),
        (["--cell-weight", "0"], "cell_weight must be positive"),
        (["--base-images", "-1"], "--base-images must not be negative"),
        (["--timestep-shift", "0"], "timestep_shift must be positive"),
    ],
)
def test_wrong_usage_ends_in_one_line(command, tmp_path, capsys, flags, message):
    known = command if "--autoencoder" not in flags else command[4:]
    assert train.main([*known, "--output", str(tmp_path / "new"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vfengine.train: error: ") and error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "new").exists()
