"""python -m vfengine.train --base: from a text-to-image model and videos to clips."""

import json

import numpy as np
import pytest
from published_images import SIDE, image_networks, save_decomposed, save_images
from test_train import weights_of

from vfengine.cli import generate, train
from vfengine.cli.flags import UsageError
from vfengine.cli.train_settings import read_settings
from vfengine.formats.checkpoint import read_config
from vfengine.media.video import read_video, write_video

SMALL = [
    *("--num-frames", "4", "--layers-per-block", "1,1", "--residual-channels", "32,32"),
    *("--batch-size", "2", "--warmup", "1", "--log-every", "1", "--precision", "fp32"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"), image_networks())


@pytest.fixture
def command(images, tmp_path):
    """Trains a tiny residual network on two clips; --output and --steps are still to be given."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 20, 24, 3), dtype=np.uint8)
    (tmp_path / "videos" / "walk").mkdir(parents=True)
    write_video(tmp_path / "videos" / "walk" / "a.webp", pixels, fps=5)
    (tmp_path / "videos" / "walk" / "a.txt").write_text("a red cat walks")
    return ["--base", str(images), "--data", str(tmp_path / "videos"), *SMALL]


def test_from_a_published_model_and_videos_to_a_clip(command, tmp_path, capsys):
    output, steps = tmp_path / "run", ["--steps", "3", "--sample-every", "3"]
    assert train.main([*command, *steps, "--output", str(output)]) == 0
    config = read_config(output / "checkpoint")
    assert config.picture_size == (2 * SIDE, 2 * SIDE)  # that of the published model
    assert (config.lam, config.clean_share, config.base_path) == (0.5, 1.0, "clean")
    assert config.prompts == ("walk",) and config.fps == 5
    assert (output / "samples" / "step-0000003.png").exists()
    halves = tmp_path / "halves"
    part = [*command, *steps, "--sample-every", "0", "--output", str(halves)]
    assert train.main([*part, "--max-minutes", "0"]) == 0
    assert train.main([*part, "--resume"]) == 0
    assert weights_of(halves) == weights_of(output)
    capsys.readouterr()
    clip = tmp_path / "clip.webp"
    asked = ["--model", str(output / "checkpoint"), "--prompt", "a cat", "--json"]
    asked += ["--num-inference-steps", "2", "--device", "cpu", "--output", str(clip)]
    assert generate.main(asked) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["guidance_scale"] == 2.0
    assert read_video(clip).frames.shape == (4, 16, 16, 3)


def test_joint_training_writes_a_base_network_of_its_own(command, tmp_path):
    output = tmp_path / "run"
    steps = ["--train", "both", "--clean-share", "0.5", "--steps", "1", "--sample-every", "0"]
    assert train.main([*command, *steps, "--output", str(output)]) == 0
    config = read_config(output / "checkpoint")
    assert config.published.trained and config.clean_share == 0.5
    clip = tmp_path / "clip.webp"
    asked = ["--model", str(output / "checkpoint"), "--label", "walk", "--num-inference-steps", "2"]
    assert generate.main([*asked, "--device", "cpu", "--output", str(clip)]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--autoencoder", "x"], "--autoencoder cannot go with --base"),
        (["--base-channels", "8,8"], "--base-channels cannot go with --base"),
        (["--size", "18"], "--size must be a multiple of 4, got 18"),
        (["--base", "nowhere"], "no text-to-image model in nowhere"),
        (["--objective", "vdm"], "--base has no meaning for --objective vdm"),
    ],
)
def test_wrong_usage_of_a_base_ends_in_one_line(command, tmp_path, capsys, flags, message):
    output = tmp_path / "new"
    assert train.main([*command, "--output", str(output), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not output.exists()


def test_such_a_model_is_no_teacher(images, command, tmp_path, capsys):
    model = save_decomposed(tmp_path / "model", images)
    asked = ["--objective", "distill", "--from", str(model), "--steps", "2"]
    assert train.main([*asked, *command[2:4], "--output", str(tmp_path / "new")]) == 2
    assert "a model on a published base network cannot be distilled" in capsys.readouterr().err


def test_folders_of_other_shapes_are_refused(images, command, tmp_path, capsys):
    for changes, message in (
        ({"cross_attention_dim": 16}, "its UNet takes texts of width 16, its text encoder makes"),
        ({"in_channels": 8, "out_channels": 8}, "8 input and 8 output channels, its autoencoder 4"),
    ):
        folder = save_images(tmp_path / message[:5], image_networks())
        image_networks(**changes).unet.save_pretrained(folder / "unet")
        asked = [*command, "--base", str(folder), "--output", str(tmp_path / "new")]
        assert train.main(asked) == 2
        assert message in capsys.readouterr().err
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    image_networks().unet.save_pretrained(folder / "unet")
    assert train.main(asked) == 2
    assert str(weights) in capsys.readouterr().err


def test_latents_may_be_said_beside_what_says_so_itself():
    given = ["--output", "out", "--data", "videos"]
    assert read_settings([*given, "--latents", "--base", "sd"]).base is not None
    with pytest.raises(UsageError, match="--latents needs --base, or --autoencoder"):
        read_settings([*given, "--latents"])
