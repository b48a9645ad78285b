"""python -m vfengine.train on the latents of a folder of videos, whose captions lie beside them."""

import numpy as np
import pytest
from test_train import weights_of
from test_train_latents import SCHEDULE, SHAPE
from tiny_parts import save_tiny_parts

from vfengine.cli import train
from vfengine.formats.checkpoint import read_config
from vfengine.media.video import write_video


@pytest.fixture
def command(tmp_path):
    """Trains tiny networks on two videos of two classes; --output is still to be given."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 20, 24, 3), dtype=np.uint8)
    for name in ("walk", "jump_high"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        write_video(tmp_path / "videos" / name / "a.webp", pixels, fps=5)
    (tmp_path / "videos" / "walk" / "a.txt").write_text("a red person\na blue lawn\n")
    autoencoder, text = save_tiny_parts(tmp_path)
    parts = ["--autoencoder", str(autoencoder), "--text-encoder", str(text)]
    return [*parts, "--data", str(tmp_path / "videos"), *SHAPE, *SCHEDULE, "--frame-stride", "2"]


def test_folder_trains_a_model_of_its_classes_and_resumes(command, tmp_path, capsys):
    output = tmp_path / "run"
    assert train.main([*command, "--output", str(output)]) == 0
    config = read_config(output / "checkpoint")
    assert config.labels == ("jump_high", "walk") and config.prompts == ("jump high", "walk")
    assert config.fps == 2.5
    assert (output / "samples" / "prompts.txt").read_text() == "jump high\na red person\n"
    kept = {file.name.split("-")[0] for file in output.iterdir() if file.suffix != ".jsonl"}
    assert kept == {"checkpoint", "samples", "training.safetensors", "videos", "clips", "captions"}
    halves, command = tmp_path / "halves", [*command, "--sample-every", "0"]
    assert train.main([*command, "--output", str(halves), "--max-minutes", "0"]) == 0
    assert train.main([*command, "--output", str(halves), "--resume"]) == 0
    assert weights_of(halves) == weights_of(output)
    capsys.readouterr()
    other = ["--output", str(tmp_path / "other"), "--num-frames", "9"]
    assert train.main([*command, *other]) == 2
    assert "no usable video (a.webp: too short: 8 frames, 17 needed" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
