"""python -m vfengine.generate with a model of latents and prompts: clips, warnings, refusals."""

import json
import os

import numpy as np
import pytest
from command_line import close, done, frames_of, refused
from conftest import ON_CPU
from latent_models import PROMPTS, SIZE, save_latent_model
from PIL import Image

import vfengine as vf
from vfengine.media.pictures import to_uint8

WALK = PROMPTS[2]
RED = "A person, in a RED sweater!"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_latent_model(tmp_path_factory.mktemp("models") / "latent")


@pytest.fixture
def clip(cli, folder):
    """Runs a command line with a model of latents and prompts."""

    def run(*argv):
        return cli(*argv, model=folder, steps="2")

    return run


def test_a_prompt_makes_the_pipelines_clip(clip, folder):
    flags = ["--negative-prompt", "blue", "--seed", 4, "--output", "a.webp", "--json"]
    record = done(clip("--prompt", RED, *flags))
    pipe = vf.load_pipeline(folder, **ON_CPU)
    seeds = {"base_seed": 4, "residual_seed": 5}
    out = pipe(prompt=RED, negative_prompt="blue", num_inference_steps=2, **seeds)
    assert np.array_equal(frames_of("a.webp"), to_uint8(out.frames)[0])
    phases = ["text", "base", "residual", "decode"]
    assert set(record["timings"]) == {"startup", "load", *phases, "write", "total"}
    assert record["settings"]["prompt"] == RED and record["settings"]["label"] is None
    assert record["settings"]["guidance_scale"] == 2.0
    assert (record["base_seed"], record["residual_seed"]) == (4, 5)
    assert record["model_fingerprint"] == pipe.fingerprint


def test_a_label_is_its_prompt(clip):
    assert clip("--list-labels")[1].split() == ["cartwheel", "jump", "walk"]
    status, out, err = clip("--label", "walk")
    assert (status, err) == (0, "")
    assert out.startswith("walk.mp4: 4 frames, 2 steps, float32 on cpu, ")
    assert all(f"{words} " in out for words in ("text", "base", "residual", "decoding"))
    clip("--label", "walk", "--output", "a.webp")
    clip("--prompt", WALK, "--output", "b.webp")
    assert np.array_equal(frames_of("a.webp"), frames_of("b.webp"))


def test_files_are_named_after_the_prompt(clip):
    clip("--prompt", RED)
    clip("--prompt", RED, "--preview")
    assert sorted(os.listdir()) == [f"a-person-in-a-red-sweater.{end}" for end in ("mp4", "png")]
    assert Image.open("a-person-in-a-red-sweater.png").size == (SIZE, SIZE)


def test_unknown_words_are_named_on_stderr(clip):
    status, out, err = clip("--prompt", "a zebra walking", "--output", "a.webp")
    assert status == 0 and out.startswith("a.webp: ")
    assert err == (
        "vfengine.generate: warning: the text encoder does not know these words: zebra\n"
    )
    assert clip("--prompt", "a zebra walking", "--output", "a.webp", "--quiet") == (0, "", "")


def test_batches_motions_windows_and_overlap(clip):
    clip("--prompt", RED, "--num-videos", 3, "--output", "a.webp")
    clip("--prompt", RED, "--num-videos", 3, "--batch-size", 2, "--output", "b.webp")
    for k in range(3):
        assert close(frames_of(f"a-{k:03d}.webp"), frames_of(f"b-{k:03d}.webp"))
    clip("--prompt", RED, "--num-residuals", 2, "--output", "c.webp")
    assert np.array_equal(frames_of("c-000.webp")[2], frames_of("c-001.webp")[2])
    clip("--prompt", RED, "--num-frames", 9, "--output", "d.webp")
    out = clip("--prompt", RED, "--num-frames", 9, "--overlap-phases", "--output", "e.webp")[1]
    assert "both phases " in out
    assert np.array_equal(frames_of("d.webp"), frames_of("e.webp"))


def test_a_picture_is_animated(clip):
    Image.new("RGB", (50, 40), "teal").save("p.png")
    record = done(clip("--prompt", RED, "--image", "p.png", "--output", "a.webp", "--json"))
    assert frames_of("a.webp").shape == (4, SIZE, SIZE, 3)
    assert record["settings"]["base_path"] == "clean" and record["base_seed"] is None


def test_base_paths_in_files_and_in_a_folder(clip):
    flags = ["--prompt", RED, "--output", "a.webp"]
    clip(*flags, "--base-trajectory", "t.safetensors", "--negative-prompt", "blue")
    record = done(clip(*flags, "--base-trajectory", "t.safetensors", "--json"))
    assert record["base_trajectory_read"] is True
    assert refused(
        clip("--label", "walk", "--base-trajectory", "t.safetensors"),
        f"made with prompts {json.dumps([RED])}, but {json.dumps([WALK])} is asked for",
    )
    assert refused(
        clip(*flags, "--base-trajectory", "t.safetensors", "--negative-prompt", "lawn"),
        'made with negative prompts ["blue"], but ["lawn"] is asked for',
    )
    hits = [done(clip(*flags, "--base-cache", "c", "--json"))["base_cache_hit"] for _ in range(2)]
    assert hits == [False, True]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["no --prompt, and no --label, expected one of: cartwheel, jump, walk"]),
        (["--label", "swim"], ["unknown label 'swim', expected one of: cartwheel, jump, walk"]),
        (["--label", "walk", "--prompt", "x"], ["--prompt cannot go with --label: each says what"]),
        (["--prompt", "x", "--height", 64], ["one size, so it takes no --height"]),
        (["--prompt", "x", "--save-latents", "l.safetensors"], ["takes no --save-latents"]),
    ],
)
def test_refused(clip, flags, words):
    assert refused(clip(*flags), *words)
    assert os.listdir() == []


def test_a_model_of_labels_takes_no_prompt(cli):
    assert refused(cli("--prompt", "x"), "knows labels alone, so it takes no --prompt")
    flags = ["--label", "walk", "--negative-prompt", "x"]
    assert refused(cli(*flags), "knows labels alone, so it takes no --negative-prompt")
    assert os.listdir() == []


def test_broken_models_are_refused_in_one_line(clip, cli, folder, tmp_path):
    broken = save_latent_model(tmp_path.parent / f"{tmp_path.name}-broken")
    (broken / "tokenizer.json").unlink()
    result = cli("--prompt", RED, model=broken)
    assert refused(result, f"checkpoint {broken} has no tokenizer.json")
    (broken / "tokenizer.json").write_text("{}")
    assert refused(cli("--prompt", RED, model=broken), "tokenizer.json is truncated or not the")
    assert os.listdir() == []
