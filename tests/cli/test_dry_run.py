"""generate --dry-run: what it tells is what a run does, and it refuses what a run refuses."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from command_line import done
from latent_models import save_latent_model
from published_folders import small_diffusers_folder

from vfengine.cli import job
from vfengine.media.video import read_video
from vfengine.pipelines import networks, session
from vfengine.plan.network import PlannedUNet


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory):
    return save_latent_model(tmp_path_factory.mktemp("models") / "latent")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return small_diffusers_folder(tmp_path_factory.mktemp("published") / "diffusers")


@pytest.fixture
def no_weights(monkeypatch):
    """Makes the reading of weights an error."""

    def refuse(*_):
        raise AssertionError("weights were read")

    monkeypatch.setattr(session.Session, "load", refuse)
    monkeypatch.setattr(networks.Networks, "network", refuse)


@pytest.fixture
def counted(monkeypatch):
    """Counts pictures, clips or windows that UNets are called on, by their dimensions."""
    calls, forward = Counter(), PlannedUNet.forward

    def counting(self, x, *arguments, **options):
        calls["residual" if self.config.is_video else "base"] += len(x)
        return forward(self, x, *arguments, **options)

    monkeypatch.setattr(PlannedUNet, "forward", counting)
    return calls


CASES = {
    "plain": ["--label", "walk"],
    "windows": ["--label", "walk", "--num-frames", "11"],
    "loop": ["--label", "walk", "--num-frames", "11", "--loop"],
    "batches": ["--label", "walk", "--num-videos", "5", "--batch-size", "2"],
    "motions": ["--label", "walk", "--num-residuals", "3", "--batch-size", "2"],
    "unguided": ["--label", "walk", "--guidance-scale", "1"],
    "preview": ["--label", "walk", "--preview", "--num-videos", "2", "--output", "a.png"],
}


@pytest.mark.parametrize("case", CASES)
def test_steps_and_calls_are_those_of_the_run(cli, counted, case, monkeypatch):
    told = done(cli(*CASES[case], "--dry-run", "--json"))
    assert os.listdir() == [] and not counted
    steps = []
    monkeypatch.setattr(job, "summary", lambda job, record: "")
    progress = job.Progress.__call__
    monkeypatch.setattr(
        job.Progress, "__call__", lambda self, s: (steps.append(s), progress(self, s))[1]
    )
    record = done(cli(*CASES[case], "--json"))
    assert sum(told["steps"].values()) == steps[-1].done == steps[-1].total
    assert told["calls"] == dict(counted)
    assert told["files"] == record["files"] == sorted(os.listdir())
    assert told["frames"] == record["settings"]["num_frames"]
    assert told["dtype"] == record["settings"]["dtype"]
    assert told["exist"] == 0 and done(cli(*CASES[case], "--dry-run", "--json"))["exist"] > 0


def test_what_is_told_of_the_clip(cli, no_weights):
    flags = ["--label", "walk", "--num-frames", 11, "--scale", 3, "--fps", 4, "--output", "a.webp"]
    told = done(cli(*flags, "--dry-run", "--json"))
    assert (told["width"], told["height"], told["frames"]) == (48, 48, 11)
    assert (told["fps"], told["seconds"], told["batches"]) == (4.0, 2.75, 1)
    starts = [0, 1, 2, 3, 4, 5, 6, 7]
    assert told["windows"] == {"length": 4, "overlap": 3, "starts": starts, "loop": False}
    assert told["base_path"] == {"kind": "stepwise", "from": "network", "batches_in_cache": None}
    memory = told["memory_estimate"]
    assert set(memory["weights"]) == {"base", "residual"}
    assert memory["peak"] > memory["process"] + max(memory["weights"].values())
    status, out, err = cli(*flags, "--dry-run")
    assert (status, err) == (0, "")
    assert out.startswith("a.webp: 1 of 48 x 48 pixels, 11 frames, 2.75 s at 4 frames a second\n")
    assert "of 4 frames, 3 shared with the next; they begin at 0, 1, 2, 3" in out
    assert "an estimate" in out
    assert cli(*flags, "--dry-run", "--quiet") == (0, "", "")
    assert os.listdir() == []


def test_weights_are_counted_by_their_files(cli, tiny_checkpoint, no_weights):
    told = done(cli("--label", "walk", "--dry-run", "--json", "--dtype", "bf16"))
    for name, size in told["memory_estimate"]["weights"].items():
        stored = (tiny_checkpoint / f"{name}.safetensors").stat().st_size / 4  # of float32
        assert 0.5 * stored < size / 2 <= stored


def test_base_paths_are_looked_up_in_the_cache(cli):
    flags = ["--label", "walk", "--base-cache", "cache", "--num-videos", 3, "--batch-size", 2]
    told = done(cli(*flags, "--dry-run", "--json"))
    assert told["base_path"]["batches_in_cache"] == 0 and told["steps"]["base"] == 8
    done(
        cli(
            "--label",
            "walk",
            "--base-cache",
            "cache",
            "--num-videos",
            2,
            "--batch-size",
            2,
            "--json",
        )
    )
    told = done(cli(*flags, "--dry-run", "--json"))
    assert told["base_path"] == {"kind": "stepwise", "from": "network", "batches_in_cache": 1}
    assert told["steps"]["base"] == 4
    done(cli(*flags, "--json"))
    told = done(cli(*flags, "--dry-run", "--json"))
    assert told["base_path"] == {"kind": "stepwise", "from": "cache", "batches_in_cache": 2}
    assert "base" not in told["steps"] and "base" not in told["calls"]
    assert "(in the cache: 2 of 2 batches)" in cli(*flags, "--dry-run")[1]


def test_a_model_of_latents_and_prompts(cli, latent_model, counted):
    flags = ["--prompt", "a person walking", "--negative-prompt", "red", "--base-cache", "cache"]
    told = done(cli(*flags, "--dry-run", "--json", model=latent_model))
    assert told["calls"]["text"] == 2 and told["calls"]["decode"] == told["frames"]
    done(cli(*flags, "--json", model=latent_model))
    assert {name: told["calls"][name] for name in ("base", "residual")} == dict(counted)
    again = done(cli(*flags, "--dry-run", "--json", model=latent_model))
    assert again["base_path"]["from"] == "cache" and again["base_path"]["batches_in_cache"] == 1
    height, width = read_video("a-person-walking.mp4").frames.shape[1:3]
    assert (told["height"], told["width"]) == (height, width)
    alike = done(
        cli(
            "--prompt", "red", "--negative-prompt", "red", "--dry-run", "--json", model=latent_model
        )
    )
    assert alike["calls"]["base"] == told["calls"]["base"] / 2  # nothing to guide


def test_a_text_to_video_model(cli, text_model, counted):
    flags = ["--prompt", "A panda", "--num-frames", 5, "--window", 3, "--window-overlap", 1]
    told = done(cli(*flags, "--dry-run", "--json", model=text_model, steps="2"))
    assert told["base_path"] is None and told["windows"]["starts"] == [0, 2]
    done(cli(*flags, "--json", model=text_model, steps="2"))
    assert told["calls"]["video"] == sum(counted.values())
    assert set(told["memory_estimate"]["weights"]) == {"text", "video", "decode"}


def test_a_plain_video_model(cli, tiny_video_checkpoint, counted):
    told = done(cli("--label", "walk", "--dry-run", "--json", model=tiny_video_checkpoint))
    done(cli("--label", "walk", "--json", model=tiny_video_checkpoint))
    assert told["base_path"] is None and told["windows"] is None
    assert told["calls"]["video"] == sum(counted.values())


@pytest.mark.parametrize(
    "flags",
    [
        ["--label", "fly"],
        [],
        ["--label", "walk", "--num-frames", "0"],
        ["--label", "walk", "--output", "none/a.mp4"],
        ["--label", "walk", "--output", "a.avi"],
        ["--label", "walk", "--solver", "unipc", "--eta", "0.5"],
        ["--label", "walk", "--num-inference-steps", "5000"],
        ["--label", "walk", "--window", "2"],
        ["--label", "walk", "--loop", "--num-frames", "2"],
        ["--label", "walk", "--window", "4", "--window-overlap", "1"],
        ["--label", "walk", "--prompt", "a walk"],
        ["--prompt", "a walk"],
        ["--label", "walk", "--device", "tpu"],
        ["--label", "walk", "--output", "a.webm", "--codec", "h264"],
        ["--label", "walk", "--output", "a.gif", "--crf", "3"],
        ["--label", "walk", "--image", "none.png"],
        ["--label", "walk", "--image", "picture.png"],
        ["--label", "walk", "--base-cache", "file"],
        ["--label", "walk", "--base-trajectory", "file"],
        ["--label", "walk", "--base-trajectory", "broken.safetensors"],
        ["--label", "walk", "--overlap-phases", "--base-path", "clean"],
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(cli, flags, picture):
    Path("file").write_text("no folder")
    Path("broken.safetensors").write_text("broken")
    Path("picture.png").write_bytes(picture[0].read_bytes())
    status, out, err = cli(*flags)
    assert (status, out) == (2, "")
    assert cli(*flags, "--dry-run") == (2, "", err)


@pytest.mark.parametrize("name", ["base", "residual"])
def test_missing_weights_are_refused(cli, tiny_checkpoint, tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("models")
    for file in tiny_checkpoint.iterdir():
        if file.stem != name:
            (folder / file.name).write_bytes(file.read_bytes())
    for flags in ([], ["--dry-run"]):
        status, _, err = cli("--label", "walk", *flags, model=folder)
        assert status == 2 and f"{name}.safetensors" in err


def test_lines_of_prompts_are_told_one_by_one(cli, no_weights):
    Path("lines").write_text('{"label": "walk", "output": "new/{seed}.mp4"}\n{"label": "fly"}\n')
    status, out, err = cli("--prompts", "lines", "--dry-run", "--json")
    first, second = map(json.loads, out.splitlines())
    assert status == 1 and "1 of 2 lines failed: 2" in err
    assert (first["index"], first["line"], first["files"]) == (0, 1, ["new/0.mp4"])
    assert first["steps"] == {"base": 4, "residual": 4} and "unknown label" in second["error"]
    assert cli("--prompts", "lines", "--dry-run")[1].startswith("line 1: new/0.mp4: 1 of 16 x 16")
    assert os.listdir() == ["lines"]
