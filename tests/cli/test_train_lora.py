"""python -m vfengine.train --lora: a LoRA of a model, learnt from a folder of videos."""

import json

import numpy as np
import pytest
import torch
from conftest import ON_CPU
from latent_models import save_latent_model
from safetensors.torch import load_file

import vfengine as vf
from vfengine.cli import train
from vfengine.media.video import write_video

FEW = ["--steps", "2", "--batch-size", "2", "--extra-images", "2", "--precision", "fp32"]
FEW += ["--save-every", "1", "--log-every", "1", "--sample-every", "2"]


@pytest.fixture
def videos(tmp_path):
    """A folder of two red videos of two classes, one with a caption."""
    for number, name in enumerate(("walk", "jump")):
        (tmp_path / "videos" / name).mkdir(parents=True)
        frames = np.full((4, 32, 32, 3), (250, 20 * number, 0), np.uint8)
        write_video(tmp_path / "videos" / name / "a.webp", frames, fps=8)
    (tmp_path / "videos" / "walk" / "a.txt").write_text("a red person\n")
    return tmp_path / "videos"


def command(videos, output, model, *flags):
    return ["--data", str(videos), "--output", str(output), "--model", str(model), *FEW, *flags]


def test_a_model_of_prompts_learns_and_a_stopped_run_goes_on(videos, tmp_path, capsys):
    model, run = save_latent_model(tmp_path / "model"), tmp_path / "run"
    assert train.main(command(videos, run, model, "--lora", "2")) == 0
    out, err = capsys.readouterr()
    lora = run / "lora.safetensors"
    assert out == f"{lora}: generate with --lora {lora}\n"
    assert "the clips have 8 frames a second; the model's play at 8" in err
    assert (run / "samples" / "step-0000002.png").exists()
    written = load_file(lora)
    assert {name.split(".")[0] for name in written} == {"base", "residual"}
    assert written["base.down.1.0.spatial.attn1.to_q.lora_A.weight"].shape == (2, 16)
    assert written["residual.conv_in.lora_B.weight"].abs().max() > 0
    call = {"num_inference_steps": 2, "output_type": "pt"}
    plain, changed = (
        vf.load_pipeline(model, lora=given, **ON_CPU)("walk", **call).frames
        for given in (None, lora)
    )
    assert not torch.equal(plain, changed)
    halves = command(videos, tmp_path / "halves", model, "--lora", "2", "--sample-every", "0")
    assert train.main([*halves, "--max-minutes", "0"]) == 0
    assert train.main([*halves, "--resume"]) == 0
    assert (tmp_path / "halves" / "lora.safetensors").read_bytes() == lora.read_bytes()
    assert train.main([*halves, "--resume", "--lora", "3"]) == 2
    assert "the training state of another model" in capsys.readouterr().err
    (tmp_path / "halves" / "training.safetensors").unlink()
    assert train.main(halves) == 2
    assert "lora.safetensors exists: it is not overwritten" in capsys.readouterr().err


def test_the_base_network_of_a_model_of_labels_moves_towards_the_clips(
    videos, tmp_path, tiny_checkpoint
):
    flags = ["--lora", "16", "--train", "base", "--steps", "40", "--learning-rate", "0.02"]
    flags += ["--sample-every", "0", "--save-every", "40", "--log-every", "10"]
    assert train.main(command(videos, tmp_path / "run", tiny_checkpoint, *flags)) == 0
    _, first, *_, last = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert last["base"] < 0.5 * first["base"]
    lora = tmp_path / "run" / "lora.safetensors"
    assert {name.split(".")[0] for name in load_file(lora)} == {"base"}
    plain, changed = (
        vf.load_pipeline(tiny_checkpoint, lora=given, **ON_CPU).preview("walk").frames
        for given in (None, lora)
    )
    red = np.array([250, 0, 0]) / 255
    assert abs(changed - red).mean() < 0.7 * abs(plain - red).mean()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora", "0"], "--lora must be at least 1, got 0"),
        (["--lora", "2", "--data", "mocap"], "--lora needs --data DIR"),
        (["--lora", "2", "--lam", "0.3"], "--lam cannot go with --lora"),
        (["--lora", "2", "--size", "64"], "--size cannot go with --lora"),
        (["--lora", "2", "--init-from", "x"], "--init-from cannot go with --lora"),
        (["--lora", "2", "--objective", "vdm"], "--lora has no meaning for --objective vdm"),
        (
            ["--lora", "2", "--objective", "distill"],
            "--lora has no meaning for --objective distill",
        ),
        ([], "--model is what --lora RANK changes"),
        (["--lora", "2", "--model", "nowhere"], "no checkpoint in nowhere"),
        (["--lora", "2", "--data", "nowhere"], "no such folder"),
    ],
)
def test_refuses_what_has_no_part_in_it(flags, message, videos, tmp_path, tiny_checkpoint, capsys):
    argv = command(videos, tmp_path / "run", tiny_checkpoint)
    assert train.main([*argv, *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_refuses_classes_that_are_no_labels(videos, tmp_path, tiny_checkpoint, capsys):
    (videos / "walk").rename(videos / "swim")
    assert train.main(command(videos, tmp_path / "run", tiny_checkpoint, "--lora", "2")) == 2
    assert "no label of the model is called swim" in capsys.readouterr().err
