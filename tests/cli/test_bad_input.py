"""python -m vfengine.generate refuses bad input in one line, before anything is written."""

import json
import os

import pytest
import torch
from command_line import WALK, refused
from conftest import save_tiny

import vfengine as vf
from vfengine.sampling.driver import Driver


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--label", "fly"], ["unknown label 'fly', expected one of: cartwheel, jump, walk"]),
        ([], ["no --label, expected one of: cartwheel, jump, walk"]),
        (["--label", "walk", "--num-frames", "0"], ["--num-frames", "from 1 to 4096, got '0'"]),
        (["--label", "walk", "--num-frames", "4097"], ["--num-frames", "got '4097'"]),
        (["--label", "walk", "--num-frames", "4.5"], ["--num-frames", "got '4.5'"]),
        (["--label", "walk", "--num-inference-steps", "0"], ["--num-inference-steps", "from 1"]),
        (["--label", "walk", "--num-inference-steps", "1001"], ["num_inference_steps", "1000"]),
        (["--label", "walk", "--num-videos", "0"], ["--num-videos", "from 1"]),
        (["--label", "walk", "--batch-size", "0"], ["--batch-size", "from 1"]),
        (["--label", "walk", "--guidance-scale", "nan"], ["--guidance-scale", "from 0 to 100"]),
        (["--label", "walk", "--eta", "-0.1"], ["--eta", "from 0 to 1"]),
        (["--label", "walk", "--eta", "0.5", "--solver", "dpmsolver"], ["eta must be 0"]),
        (["--label", "walk", "--seed", "-1"], ["--seed", "from 0"]),
        (["--label", "walk", "--seed", str(2**64 - 1)], ["--seed", "from 0"]),
        (["--label", "walk", "--base-seed", str(2**64)], ["--base-seed", "2^64-1"]),
        (["--label", "walk", "--solver", "euler"], ["--solver", "ddim"]),
        (["--label", "walk", "--base-path", "x"], ["--base-path", "stepwise", "clean"]),
        (["--label", "walk", "--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["--label", "walk", "--device", "toaster"], ["unknown device 'toaster'"]),
        (["--label", "walk", "--fps", "0"], ["--fps", "0.1 to 1000"]),
        (["--label", "walk", "--scale", "0"], ["--scale", "from 1 to 64"]),
        (["--label", "walk", "--scale-filter", "cubic"], ["--scale-filter", "lanczos"]),
        (
            ["--label", "walk", "--output", "a.avi"],
            ["unknown suffix '.avi'", ".mp4, .webm, .mkv, .gif"],
        ),
        (["--label", "walk", "--output", "a"], ["unknown suffix ''"]),
        (["--label", "walk", "--output", "no/a.mp4"], ["no: no such folder"]),
        (["--label", "walk", "extra"], ["unrecognized arguments: extra"]),
        (["--lab", "walk"], ["unrecognized arguments: --lab"]),
        (["--label"], ["--label", "expected one argument"]),
        (["--label", "walk", "--num-frames=--"], ["--num-frames: expected"]),
        (["--codec", "mpeg2"], ["--codec", "invalid choice: 'mpeg2'"]),
        (["--crf", "64"], ["--crf", "expected a whole number from 0 to 63"]),
        (["--label", "walk", "--codec", "vp9"], ["walk.mp4: codec 'vp9'", "h264, hevc, av1"]),
        (["--label", "walk", "--crf", "60"], ["walk.mp4: crf of h264 must be an int from 0 to 51"]),
        (["--crf", "9", "--output", "a.gif"], ["a.gif: a .gif file takes no crf, got 9"]),
        (["--chroma", "444", "--output", "a.mkv"], ["ffv1 is lossless: it takes no chroma"]),
    ],
)
def test_bad_input_is_refused_in_one_line(cli, argv, words):
    assert refused(cli(*argv), *words)
    assert os.listdir() == []


def test_cuda_without_a_device(cli, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = cli("--label", "walk", "--device", "cuda")
    assert refused(result, "device 'cuda' asked for, but torch finds no CUDA device here")


def test_folder_that_cannot_be_written_to_is_found_before_sampling(cli, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    monkeypatch.setattr(vf.VideoFusionPipeline, "from_pretrained", None)
    assert refused(cli("--label", "walk", "--output", "a.mp4"), "folder is not writable")
    assert refused(
        cli("--label", "walk", "--base-trajectory", "t.safetensors"), "folder is not writable"
    )


def test_a_clip_in_the_place_of_the_base_cache(cli, monkeypatch):
    folder = str(os.getcwd())
    with monkeypatch.context() as patch:
        for phase in ("base", "residual", "overlapped"):
            patch.setattr(Driver, phase, None)
        for cache in ("a.webp", "./a.webp", f"{folder}/a.webp", "a.webp/cache"):
            result = cli(*WALK, "--output", "a.webp", "--base-cache", cache)
            assert refused(result, "a.webp: cannot be a clip and hold --base-cache")
        result = cli(*WALK, "--output", "b.webp", "--num-videos", 2, "--base-cache", "b-001.webp")
        assert refused(result, "b-001.webp: cannot be a clip")
    assert os.listdir() == []
    assert cli(*WALK, "--output", "a.webp", "--base-cache", ".", "--quiet") == (0, "", "")


def test_a_numbered_file_that_is_a_folder(cli):
    os.mkdir("a-001.mp4")
    result = cli("--label", "walk", "--num-videos", 2, "--output", "a.mp4")
    assert refused(result, "a-001.mp4: is a folder")
    assert os.listdir() == ["a-001.mp4"]


def test_broken_checkpoints(cli, tmp_path):
    model = tmp_path.parent / f"{tmp_path.name}-model"
    walk = ["--label", "walk"]
    assert refused(cli(*walk, model=model), "no checkpoint in", str(model))
    for name in ("base.safetensors", "residual.safetensors"):
        file = save_tiny(model) / name
        file.write_bytes(file.read_bytes()[:-20])
        assert refused(cli(*walk, model=model), name)
        file.unlink()
        assert refused(cli(*walk, model=model), f"has no {name}")
    save_tiny(model)
    config = json.loads((model / "config.json").read_text())
    config["base"]["block_out_channels"] = [16, 32]
    (model / "config.json").write_text(json.dumps(config))
    assert refused(cli(*walk, model=model), "base.safetensors is of another architecture")
    (model / "config.json").write_text("{")
    assert refused(cli(*walk, model=model), "config.json")
    (model / "config.json").write_text('{"model_type": "other"}')
    assert refused(cli(*walk, model=model), "config.json")
    assert os.listdir() == []


# -- settings that do not fit the model ------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--window", 2], ["window must be at least 3 frames, got 2"]),
        (["--window", -1], ["--window", "from 0 to 4096"]),
        (["--window", 5, "--window-overlap", 2], ["window_overlap of a window of 5 frames"]),
        (["--window", 5, "--window-overlap", 5], ["from 3 to 4, got 5"]),
        (["--window-overlap", 4], ["window_overlap of a window of 4 frames", "got 4"]),
        (["--window", 0, "--window-overlap", 3], ["window=0 asks for none"]),
        (["--window-overlap", 0], ["--window-overlap", "from 1"]),
        (["--loop", "--num-frames", 3], ["a loop must have at least 4 frames, got 3"]),
        (["--loop", "--window", 3], ["window must be at least 4 frames in a loop, got 3"]),
        (
            ["--loop", "--window-overlap", 2],
            ["window_overlap of a window of 4 frames", "in a loop"],
        ),
        (["--num-residuals", 0], ["--num-residuals", "from 1"]),
        (["--overlap-phases"], ["overlap_phases", "base_path='clean' finishes the base frame"]),
        (["--solver", "unipc", "--eta", 0.5], ["unipc is deterministic: eta must be 0"]),
        (["--preview", "--solver", "unipc", "--eta", 0.5], ["eta must be 0"]),
        (["--preview", "--num-inference-steps", 1001], ["num_inference_steps", "1000"]),
        (["--preview", "--output", "a.txt"], ["unknown suffix '.txt'"]),
        (["--preview", "--output", "no/a.png"], ["no: no such folder"]),
    ],
)
def test_refused_before_sampling(cli, clean_checkpoint, monkeypatch, flags, words):
    for phase in ("base", "residual", "overlapped"):
        monkeypatch.setattr(Driver, phase, None)
    many = [] if "--preview" in flags or "--num-residuals" in flags else ["--num-residuals", 2]
    assert refused(cli(*WALK, *many, *flags, model=clean_checkpoint), *words)
    assert os.listdir() == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--base-seed", "0"],
        ["--base-path", "clean"],
        ["--base-trajectory", "t.safetensors"],
        ["--base-cache", "cache"],
        ["--image", "a.png"],
        ["--preview"],
        ["--num-residuals", "2"],
        ["--window", "0", "--window-overlap", "3"],
        ["--loop"],
        ["--overlap-phases"],
        ["--offload-base"],
        ["--no-offload-base"],
    ],
)
def test_a_plain_video_model_has_no_base_path(cli, tiny_video_checkpoint, flags):
    names = [flag for flag in flags if flag.startswith("--")]
    result = cli(*WALK, *flags, model=tiny_video_checkpoint)
    assert refused(result, "a plain video model has no base path, so it takes no", *names)
    assert os.listdir() == []


def test_flags_that_can(cli, clean_checkpoint, picture):
    for flags in (
        ["--num-residuals", 1, "--num-videos", 2],
        ["--num-residuals", 2, "--num-videos", 1],
        ["--preview", "--num-residuals", 1, "--seed", 3],
        ["--image", picture[0], "--base-path", "clean", "--seed", 3],
        ["--overlap-phases", "--base-path", "stepwise", "--no-offload-base"],
    ):
        assert cli(*WALK, *flags, "--quiet", model=clean_checkpoint) == (0, "", ""), flags
