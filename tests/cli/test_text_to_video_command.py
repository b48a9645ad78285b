"""python -m vfengine.generate with a text-to-video model: clips, latents, what is refused."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import done, frames_of, refused
from conftest import ON_CPU
from published_folders import small_diffusers_folder

import vfengine as vf
from vfengine.media.pictures import to_uint8
from vfengine.pipelines.latents import read_latents

PROMPT = "A panda, eating bamboo!"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_diffusers_folder(tmp_path_factory.mktemp("published") / "diffusers")


@pytest.fixture
def clip(cli, folder):
    """Runs a command line with a text-to-video model."""

    def run(*argv):
        return cli("--num-frames", 3, *argv, model=folder, steps="2")

    return run


def test_a_prompt_makes_the_pipelines_clip(clip, folder):
    record = done(clip("--prompt", PROMPT, "--seed", 4, "--output", "a.webp", "--json"))
    pipe = vf.TextToVideoPipeline.from_pretrained(folder, **ON_CPU)
    out = pipe(PROMPT, num_frames=3, num_inference_steps=2, seed=4)
    assert np.array_equal(frames_of("a.webp"), to_uint8(out.frames)[0])
    assert record["seed"] == 4
    assert record["settings"]["prompt"] == PROMPT
    assert record["settings"]["guidance_scale"] == 9.0
    assert record["settings"]["height"] == out.frames.shape[2]
    assert record["model_fingerprint"] is None
    assert set(record["timings"]) >= {
        "startup",
        "load",
        "text",
        "video",
        "decode",
        "write",
        "total",
    }
    assert os.listdir() == ["a.webp"]


def test_a_clip_is_named_after_its_prompt(clip):
    status, out, err = clip("--prompt", PROMPT, "--negative-prompt", "blur")
    assert (status, err) == (0, "")
    assert os.listdir() == ["a-panda-eating-bamboo.mp4"]
    assert out.startswith("a-panda-eating-bamboo.mp4: 3 frames, 2 steps, float32 on cpu, ")
    assert all(f"{words} " in out for words in ("text", "sampling", "decoding"))


def test_sizes_and_many_clips(clip):
    size = ["--height", 24, "--width", 40]
    assert clip("--prompt", PROMPT, *size, "--num-videos", 3, "--output", "a.webp")[0] == 0
    assert sorted(os.listdir()) == [f"a-{k:03d}.webp" for k in range(3)]
    assert frames_of("a-000.webp").shape == (3, 24, 40, 3)
    one = frames_of("a-002.webp")
    arguments = [*size, "--num-videos", 3, "--batch-size", 3, "--output", "b.webp"]
    assert clip("--prompt", PROMPT, *arguments)[0] == 0
    assert np.abs(frames_of("b-002.webp").astype(int) - one).max() <= 1


def test_latents_are_decoded_later(cli, clip, folder):
    arguments = ["--prompt", PROMPT, "--num-videos", 2]
    assert clip(*arguments, "--output", "a.webp", "--save-latents", "l.safetensors")[0] == 0
    assert read_latents("l.safetensors")[0].shape[:2] == (2, 3)
    fixed = ["--model", str(folder), "--device", "cpu", "--dtype", "float32"]
    from vfengine.cli.generate import main

    assert main([*fixed, "--latents", "l.safetensors", "--output", "b.webp", "--quiet"]) == 0
    for number in (0, 1):
        pair = [frames_of(f"{name}-{number:03d}.webp") for name in "ab"]
        assert np.array_equal(*pair)
    record_of = [*fixed, "--latents", "l.safetensors", "--json", "--scale", "2"]
    assert main(record_of) == 0
    assert Path("l-000.mp4").is_file() and Path("l-001.mp4").is_file()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_latents_outlive_an_error_while_decoding(clip, monkeypatch, error):
    from vfengine.models import Autoencoder

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Autoencoder, "decode", fail)
    status, out, err = clip("--prompt", PROMPT, "--save-latents", "l.safetensors")
    assert status == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert (out, err.count("\n")) == ("", 1) and "(complete: l.safetensors)" in err
    assert os.listdir() == ["l.safetensors"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["no --prompt", "--latents"]),
        (["--list-labels"], ["neither labels nor a base path", "--prompt"]),
        (["--label", "walk"], ["neither labels nor a base path, so it takes no --label"]),
        (["--prompt", "x", "--base-seed", 1], ["so it takes no --base-seed"]),
        (["--prompt", "x", "--overlap-phases"], ["so it takes no --overlap-phases"]),
        (["--prompt", "x", "--base-unet", "u"], ["so it takes no base_unet"]),
        (["--prompt", "x", "--height", 25], ["height must be a multiple of", "got 25"]),
        (["--prompt", "x", "--width", 7], ["--width", "from 8 to 8192"]),
        (["--prompt", "x", "--save-latents", "l.pt"], ["l.pt: expected a .safetensors file"]),
        (["--prompt", "x", "--save-latents", "no/l.safetensors"], ["no: no such folder"]),
        (["--prompt", "x", "--window", 2, "--window-overlap", 2], ["window_overlap of a window"]),
    ],
)
def test_refused(clip, flags, words):
    assert refused(clip(*flags), *words)
    assert os.listdir() == []


def test_a_missing_package_is_named(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    result = clip("--prompt", "x")
    assert refused(result, "prompts need the package tokenizers: pip install 'vfengine[text]'")


def test_refused_latents(folder):
    from vfengine.cli.generate import main

    fixed = ["--model", str(folder), "--device", "cpu"]
    assert main([*fixed, "--latents", "no.safetensors"]) == 2
    assert main([*fixed, "--latents", "no.safetensors", "--seed", "3"]) == 2
    assert not Path("no.mp4").exists()


def test_our_own_models_take_no_prompt(cli):
    assert refused(cli("--label", "walk", "--height", 64), "takes no --height")
    assert refused(cli("--prompt", "x"), "this model knows labels alone, so it takes no --prompt")
    assert os.listdir() == []
