"""vfengine bench: its figures, its table, what it refuses."""

import json
import os

import pytest
from few_step_models import save_student
from latent_models import save_latent_model
from published_folders import small_diffusers_folder

from vfengine.cli import bench


@pytest.fixture
def measured(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """Runs the command: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, model=tiny_checkpoint, steps=("--num-inference-steps", "2")):
        fixed = ["--model", str(model), *steps, "--device", "cpu"]
        status = bench.main([*fixed, *map(str, argv)])
        return status, *capsys.readouterr()

    return run


def test_figures_of_a_decomposed_model(measured):
    argv = ["--batch-sizes", "2,1", "--repeats", 3, "--solver", "unipc", "--num-frames", 5]
    status, out, err = measured(*argv, "--dtype", "fp32", "--json", "a.json")
    assert (status, err) == (0, "")
    assert os.listdir() == ["a.json"]
    with open("a.json") as file:
        figures = json.load(file)
    assert figures["settings"]["label"] == "cartwheel"
    assert figures["settings"]["num_frames"] == 5 and figures["settings"]["solver"] == "unipc"
    assert (figures["device"], figures["dtype"], figures["repeats"]) == ("cpu", "float32", 3)
    assert figures["threads"] >= 1 and figures["torch"] and figures["device_name"]
    assert set(figures["seconds"]) == {"start", "load", "first_clip"}
    assert [batch["batch_size"] for batch in figures["batches"]] == [2, 1]
    for batch in figures["batches"]:
        assert len(batch["seconds"]) == 3
        assert batch["least"] <= batch["median"] <= batch["most"]
        assert batch["clips_per_second"] == pytest.approx(batch["batch_size"] / batch["median"])
        assert set(batch["phases"]) == {"base", "residual", "write"}
        assert sum(batch["phases"].values()) < 1.5 * batch["most"]
        assert batch["peak_memory"]["process"] > 1e7
    assert set(figures["other_motion"]["phases"]) == {"residual", "write"}
    first, second, third, _, head, *rows = out.splitlines()
    assert first.startswith(figures["device_name"]) and "float32 on cpu; torch " in first
    assert "'cartwheel', 5 frames, 2 steps of unipc" in second and "first clip" in third
    assert "clips/s" in head and "phases" in head
    assert [row[:15].strip() for row in rows] == ["batch of 2", "warm clip", "another motion"]


def test_steps_that_nobody_gave_are_the_model_s(measured, tmp_path):
    status, out, _ = measured("--repeats", 1, model=save_student(tmp_path / "few"), steps=())
    assert status == 0
    assert ", 4 frames, 4 steps of ddim" in out


@pytest.mark.parametrize(
    ("save", "shown", "phases"),
    [
        (save_latent_model, "cartwheel", {"base", "residual", "decode", "write"}),
        (small_diffusers_folder, "a person walking", {"load", "video", "decode", "write"}),
    ],
)
def test_phases_of_other_models(measured, tmp_path_factory, save, shown, phases):
    model = save(tmp_path_factory.mktemp("models") / "model")
    status, out, err = measured("--repeats", 1, "--num-frames", 3, "--json", "a.json", model=model)
    assert (status, err) == (0, "")
    with open("a.json") as file:
        figures = json.load(file)
    assert set(figures["batches"][0]["phases"]) == phases  # the rows of a known text are kept
    assert (figures["other_motion"] is None) == (save is small_diffusers_folder)
    assert repr(shown) in out


def test_a_plain_video_model_has_no_other_motion(measured, tiny_video_checkpoint):
    status, out, _ = measured("--repeats", 1, model=tiny_video_checkpoint)
    assert status == 0 and "another motion" not in out and "residual" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batch-sizes", "1,x"], "whole numbers from 1 to 1024"),
        (["--batch-sizes", "0"], "whole numbers from 1 to 1024"),
        (["--batch-sizes", "2,2"], "different whole numbers"),
        (["--repeats", "0"], "from 1 to"),
        (["--label", "fly"], "unknown label 'fly'"),
        (["--prompt", "a walk"], "labels alone"),
        (["--json", "none/a.json"], "none: no such folder"),
        (["--device", "tpu"], "tpu"),
        (["--model", "none"], "none"),
    ],
)
def test_bad_input_is_refused_in_one_line(measured, argv, words):
    status, out, err = measured(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("vfengine.bench: error: ") and err.count("\n") == 1 and words in err


def test_a_batch_that_memory_cannot_hold_costs_its_row_alone(measured, monkeypatch):
    clip = bench._Bench.clip

    def limited(self, size, **changes):
        if size == 4:
            raise MemoryError
        return clip(self, size, **changes)

    monkeypatch.setattr(bench._Bench, "clip", limited)
    status, out, _ = measured("--repeats", 1, "--batch-sizes", "1,4")
    assert status == 0
    assert "batch of 4            not enough memory" in out and "another motion" in out
