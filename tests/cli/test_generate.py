"""python -m vfengine.generate: what it writes, what it says, and everything it refuses."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ON_CPU, save_tiny

import vfengine as vf
from vfengine.cli import generate
from vfengine.cli import settings as generate_settings
from vfengine.cli.generate import main
from vfengine.cli.settings import DEFAULTS, read_settings
from vfengine.diffusion import solvers
from vfengine.media import video as video_io
from vfengine.media.video import read_video
from vfengine.names import SOLVERS
from vfengine.pipelines.videofusion import to_uint8

STEPS = "4"


@pytest.fixture
def cli(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """Runs a command line in an empty folder; returns (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, model=tiny_checkpoint, steps=STEPS):
        fixed = ["--model", str(model), "--num-inference-steps", steps]
        fixed += ["--device", "cpu", "--dtype", "float32"]  # pixels that no machine changes
        status = main([*fixed, *map(str, argv)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def refused(result, *words):
    """Asserts that a run ended in one line on stderr that holds all the words, and status 2."""
    status, out, err = result
    assert status == 2
    assert out == ""
    assert err.startswith("vfengine.generate: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err
    return True


# -- what it writes --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
def test_writes_a_clip(cli, suffix):
    status, out, err = cli("--label", "walk", "--output", f"a{suffix}")
    assert (status, err) == (0, "")
    assert out.startswith(f"a{suffix}: 4 frames, 4 steps, ")
    assert out.count("\n") == 1
    video = read_video(f"a{suffix}")
    assert video.frames.shape == (4, 16, 16, 3)
    assert video.fps == pytest.approx(8, rel=0.02)
    assert os.listdir() == [f"a{suffix}"]


def test_the_pixels_are_the_pipelines(cli, tiny_checkpoint):
    assert cli("--label", "walk", "--seed", 5, "--output", "a.webp")[0] == 0
    pipe = vf.VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    out = pipe("walk", num_inference_steps=int(STEPS), base_seed=5, residual_seed=6)
    assert np.array_equal(read_video("a.webp").frames, to_uint8(out.frames)[0])


def test_defaults_are_the_pipelines():
    said = vf.VideoFusionPipeline.__call__.__kwdefaults__
    for name in (
        *("num_frames", "num_inference_steps", "guidance_scale", "base_seed", "residual_seed"),
        *("base_path", "num_videos", "solver", "eta", "num_residuals", "image", "base_cache"),
        *("window", "window_overlap", "overlap_phases", "offload_base"),
    ):
        assert DEFAULTS[name] == said[name], name
    opened = vf.VideoFusionPipeline.from_pretrained.__kwdefaults__
    for name in ("device", "dtype", "base_unet"):
        assert DEFAULTS[name] == opened[name], name
    assert tuple(solvers.NUM_HISTORY) == SOLVERS


def test_output_is_named_after_the_label(cli):
    assert cli("--label", "jump")[0] == 0
    assert os.listdir() == ["jump.mp4"]


def test_frames_fps_and_scale(cli):
    arguments = ["--label", "walk", "--num-frames", 7, "--fps", 20, "--output", "a.webp"]
    cli(*arguments)
    plain = read_video("a.webp")
    assert plain.frames.shape == (7, 16, 16, 3)
    assert plain.fps == pytest.approx(20)
    cli(*arguments, "--scale", 3)
    assert np.array_equal(read_video("a.webp").frames, video_io.enlarge(plain.frames, 3))
    cli(*arguments, "--scale=3", "--scale-filter=lanczos")
    lanczos = video_io.enlarge(plain.frames, 3, "lanczos")
    assert np.array_equal(read_video("a.webp").frames, lanczos)
    cli(*arguments[:-1], "a.png")
    assert np.array_equal(read_video("a.png").frames[0], video_io.sheet(plain.frames))


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_same_seeds_same_file(cli, suffix):
    files = []
    for seed in (1, 1, 2):
        cli("--label", "walk", "--seed", seed, "--output", f"a{suffix}")
        files.append(Path(f"a{suffix}").read_bytes())
    assert files[0] == files[1] != files[2]


def test_many_videos_are_numbered_and_batches_do_not_matter(cli):
    status, out, err = cli("--label", "walk", "--num-videos", 5, "--output", "a.webp")
    assert (status, err) == (0, "")
    names = [f"a-{k:03d}.webp" for k in range(5)]
    assert sorted(os.listdir()) == names
    assert out.startswith("a-000.webp ... a-004.webp: 5 clips: 4 frames")
    one_by_one = [read_video(name).frames for name in names]
    assert not np.array_equal(one_by_one[0], one_by_one[1])
    cli("--label", "walk", "--num-videos", 5, "--output", "a.webp", "--batch-size", 2)
    for name, frames in zip(names, one_by_one, strict=True):
        difference = np.abs(read_video(name).frames.astype(int) - frames)
        assert difference.max() <= 1  # rounding of a sum in another order
    cli("--label", "walk", "--output", "a.webp")
    assert np.array_equal(read_video("a.webp").frames, one_by_one[0])


def test_json_is_one_complete_line(cli, tiny_checkpoint):
    status, out, err = cli("--label", "walk", "--seed", 3, "--num-videos", 2, "--json")
    assert (status, err) == (0, "")
    assert out.count("\n") == 1
    record = json.loads(out)
    assert record["files"] == ["walk-000.mp4", "walk-001.mp4"]
    assert (record["base_seed"], record["residual_seed"]) == (3, 4)
    assert set(record["timings"]) == {"startup", "load", "base", "residual", "write", "total"}
    assert 0 < record["timings"]["startup"] < record["timings"]["total"]
    assert record["peak_memory"]["process"] > 1e7
    assert set(record["peak_memory"]) == {"process", "cuda", "cuda_reserved"}
    assert record["settings"]["num_frames"] == 4
    assert record["settings"]["fps"] == 8.0
    assert record["settings"]["base_path"] == "stepwise"
    assert record["settings"]["model"] == str(tiny_checkpoint)


def test_quiet_says_nothing(cli):
    assert cli("--label", "walk", "--quiet") == (0, "", "")
    assert os.path.exists("walk.mp4")


def test_list_labels(cli):
    assert cli("--list-labels") == (0, "cartwheel\njump\nwalk\n", "")
    status, out, _ = cli("--list_labels", "--json")
    assert (status, json.loads(out)) == (0, {"labels": ["cartwheel", "jump", "walk"]})
    assert os.listdir() == []


# -- settings --------------------------------------------------------------------------------------


def test_every_flag_takes_underscores():
    for option in generate_settings._parser()._option_string_actions:
        if "-" not in option[2:]:
            continue
        action = generate_settings._parser()._option_string_actions[option]
        if action.nargs == 0:
            hyphens, underscores = [option], ["--" + option[2:].replace("-", "_")]
        else:
            value = "clean" if "path" in option else "lanczos" if "filter" in option else "7"
            hyphens = [option, value]
            underscores = ["--" + option[2:].replace("-", "_") + "=" + value]
        assert read_settings(hyphens) == read_settings(underscores) != read_settings([])


def test_values_keep_their_underscores():
    assert read_settings(["--output", "my_file.mp4"]).output == "my_file.mp4"
    assert read_settings(["--base_trajectory=a_b.safetensors"]).base_trajectory == "a_b.safetensors"


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_config_file_and_flags_over_it(tmp_path, suffix):
    file = tmp_path / f"c.{suffix}"
    values = {"label": "walk", "num-frames": 8, "guidance_scale": 3, "json": True, "quiet": False,
              "seed": 5, "fps": None, "dtype": "bf16"}  # fmt: skip
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    file.write_text(json.dumps(values) if suffix == "json" else "\n".join(lines))
    settings = read_settings(["--config", str(file), "--num-frames", "2"])
    assert (settings.label, settings.num_frames, settings.guidance_scale) == ("walk", 2, 3.0)
    assert (settings.json, settings.quiet, settings.fps) == (True, False, None)
    assert (settings.base_seed, settings.residual_seed) == (5, 6)
    assert settings.dtype == "bfloat16"
    assert read_settings(["--config", str(file), "--seed", "9"]).residual_seed == 10
    assert read_settings(["--config", str(file), "--base-seed", "9"]).residual_seed == 6


def test_seed_flags():
    for argv, expected in (
        ([], (0, 1)),
        (["--seed", "0"], (0, 1)),
        (["--seed", "7"], (7, 8)),
        (["--seed", "7", "--residual-seed", "3"], (7, 3)),
        (["--base-seed", "4"], (4, 1)),
        (["--base-seed", str(2**64 - 1)], (2**64 - 1, 1)),
    ):
        settings = read_settings(argv)
        assert (settings.base_seed, settings.residual_seed) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("labels: walk", ["unknown entry 'labels'", "guidance_scale", "num_videos"]),
        ("list_labels: true", ["unknown entry 'list_labels'"]),
        ("config: other.yaml", ["unknown entry 'config'"]),
        ("num_frames: many", ["--num-frames", "expected a whole number from 1 to 4096", "'many'"]),
        ("num_frames: [4]", ["num_frames must be one value"]),
        ("label: yes", ["label must be one value, got True"]),
        ("quiet: 1", ["quiet must be true or false, got 1"]),
        ("seed: 1\nnum_frames: 4\nnum-frames: 4", ["num_frames is there twice"]),
        ("- walk", ["expected names and values"]),
        ("a: b: c", ["cannot be read"]),
    ],
)
def test_bad_config_files(cli, tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    assert refused(cli("--label", "walk", "--config", "c.yaml"), "--config c.yaml: ", *words)
    assert os.listdir() == ["c.yaml"]


def test_unreadable_config_files(cli, tmp_path):
    assert refused(cli("--config", "c.yaml"), "--config c.yaml: No such file")
    (tmp_path / "c.json").write_text('{"label": "walk"')
    assert refused(cli("--config", "c.json"), "--config c.json: cannot be read")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\xff")
    assert refused(cli("--config", "c.yaml"), "--config c.yaml: cannot be read")


# -- base trajectories -----------------------------------------------------------------------------


def test_trajectory_is_written_then_read(cli):
    arguments = ["--label", "walk", "--base-trajectory", "t.safetensors", "--output", "a.webp"]
    first = json.loads(cli(*arguments, "--base-seed", 3, "--json")[1])
    assert sorted(os.listdir()) == ["a.webp", "t.safetensors"]
    frames, written = read_video("a.webp").frames, Path("t.safetensors").read_bytes()
    second = json.loads(cli(*arguments, "--json")[1])
    assert [first["base_trajectory_read"], second["base_trajectory_read"]] == [False, True]
    assert second["base_seed"] == 3
    assert second["timings"]["base"] == 0.0
    assert np.array_equal(read_video("a.webp").frames, frames)
    assert Path("t.safetensors").read_bytes() == written
    cli(*arguments, "--residual-seed", 9)
    assert np.array_equal(read_video("a.webp").frames[2], frames[2])
    assert not np.array_equal(read_video("a.webp").frames[1], frames[1])


def test_trajectory_of_several_clips(cli):
    many = ["--label", "walk", "--num-videos", 3, "--output", "a.webp"]
    cli(*many, "--base-trajectory", "t.safetensors", "--batch-size", 2)
    assert vf.BaseTrajectory.load("t.safetensors").final.shape[0] == 3
    written = [read_video(f"a-{k:03d}.webp").frames for k in range(3)]
    cli(*many, "--base-trajectory", "t.safetensors", "--batch-size", 2)
    for k in range(3):
        assert np.array_equal(read_video(f"a-{k:03d}.webp").frames, written[k])
    assert refused(
        cli("--label", "walk", "--num-videos", 2, "--base-trajectory", "t.safetensors"),
        "t.safetensors: ", "holds 3 clips, neither 1 nor the 2 asked for",
    )  # fmt: skip


def test_one_trajectory_serves_several_clips(cli):
    cli("--label", "walk", "--base-trajectory", "t.safetensors", "--output", "a.webp")
    cli("--label", "walk", "--base-trajectory", "t.safetensors", "--num-videos", 3, "--output",
        "b.webp")  # fmt: skip
    clips = [read_video(f"b-{k:03d}.webp").frames for k in range(3)]
    assert np.array_equal(clips[0], read_video("a.webp").frames)
    assert np.array_equal(clips[0][2], clips[2][2])
    assert not np.array_equal(clips[0][1], clips[2][1])


def test_foreign_trajectories_are_refused(cli, tmp_path):
    file = ["--base-trajectory", "t.safetensors"]
    cli("--label", "walk", *file, "--output", "a.webp")
    Path("a.webp").unlink()
    before = os.listdir()
    other = save_tiny(tmp_path.parent / f"{tmp_path.name}-other", seed=1)
    walk = ["--label", "walk", *file]
    assert refused(cli(*walk, model=other), "t.safetensors: ", "made by another model")
    assert refused(cli(*walk, steps="5"), "num_inference_steps 4, but 5 is asked for")
    assert refused(cli(*walk, "--solver", "dpmsolver"), "solver ddim, but dpmsolver")
    assert refused(cli(*walk, "--eta", 1), "eta 0.0, but 1.0")
    assert refused(cli(*walk, "--base-seed", 5), "made with base seed 0, but 5 is asked for")
    schedule = vf.NoiseSchedule.linear(1000, 1e-4, 3e-2).to_dict()
    other = save_tiny(tmp_path.parent / f"{tmp_path.name}-schedule", schedule=schedule)
    assert refused(cli(*walk, model=other), "made with noise schedule")
    data = Path("t.safetensors").read_bytes()
    Path("t.safetensors").write_bytes(data[:-50])
    assert refused(cli(*walk), "t.safetensors: truncated")
    Path("t.safetensors").write_bytes(b"")
    assert refused(cli(*walk), "t.safetensors: ")
    assert os.listdir() == before


def test_trajectory_paths_are_checked(cli):
    walk = ["--label", "walk"]
    assert refused(cli(*walk, "--base-trajectory", "t.mp4"), "expected a .safetensors file")
    assert refused(cli(*walk, "--base-trajectory", "no/t.safetensors"), "no: no such folder")
    os.mkdir("d.safetensors")
    assert refused(cli(*walk, "--base-trajectory", "d.safetensors"), "d.safetensors")
    assert os.listdir() == ["d.safetensors"]


# -- bad input -------------------------------------------------------------------------------------


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
        (["--label", "walk", "--output", "a.avi"], ["unknown suffix '.avi'", ".mp4, .webm, .gif"]),
        (["--label", "walk", "--output", "a"], ["unknown suffix ''"]),
        (["--label", "walk", "--output", "no/a.mp4"], ["no: no such folder"]),
        (["--label", "walk", "extra"], ["unrecognized arguments: extra"]),
        (["--lab", "walk"], ["unrecognized arguments: --lab"]),
        (["--label"], ["--label", "expected one argument"]),
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
    monkeypatch.setattr(generate, "_open_pipeline", None)
    assert refused(cli("--label", "walk", "--output", "a.mp4"), "folder is not writable")
    assert refused(
        cli("--label", "walk", "--base-trajectory", "t.safetensors"), "folder is not writable"
    )


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


# -- failures and interrupts -----------------------------------------------------------------------


def test_failure_while_writing_names_what_was_written(cli, monkeypatch):
    write = video_io.write_video

    def full_disk(path, frames, fps):
        if path.name == "a-002.webp":
            raise OSError(28, "No space left on device")
        write(path, frames, fps)

    monkeypatch.setattr(video_io, "write_video", full_disk)
    status, out, err = cli("--label", "walk", "--num-videos", 4, "--output", "a.webp")
    assert (status, out) == (1, "")
    assert err == (
        "vfengine.generate: error: a-002.webp: cannot be written (No space left on device) "
        "(complete: a-000.webp, a-001.webp)\n"
    )
    assert sorted(os.listdir()) == ["a-000.webp", "a-001.webp"]


def test_out_of_memory_is_one_line(cli, monkeypatch):
    def greedy(self, *args, **kwargs):
        torch.empty(1 << 60)

    monkeypatch.setattr(vf.VideoFusionPipeline, "__call__", greedy)
    status, out, err = cli("--label", "walk")
    assert (status, out) == (1, "")
    assert err.startswith("vfengine.generate: error: not enough memory: try fewer frames")


def test_programming_errors_are_not_hidden(cli, monkeypatch):
    def wrong(self, *args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(vf.VideoFusionPipeline, "__call__", wrong)
    with pytest.raises(RuntimeError, match="a bug"):
        cli("--label", "walk")


@pytest.mark.parametrize("moment", ["sampling", "writing"])
def test_interrupt_leaves_complete_files_only(cli, monkeypatch, moment):
    if moment == "sampling":
        call = vf.VideoFusionPipeline.__call__

        def interrupted(self, *args, **kwargs):
            if kwargs["sample_offset"] == 1:
                raise KeyboardInterrupt
            return call(self, *args, **kwargs)

        monkeypatch.setattr(vf.VideoFusionPipeline, "__call__", interrupted)
    else:
        write = video_io._WRITERS[".mp4"]

        def interrupted(path, frames, fps):
            write(path, frames, fps)
            if "001" in path.name:
                raise KeyboardInterrupt

        monkeypatch.setitem(video_io._WRITERS, ".mp4", interrupted)
    status, out, err = cli(
        "--label", "walk", "--num-videos", 3, "--base-trajectory", "t.safetensors"
    )
    assert (status, out) == (130, "")
    assert err == "vfengine.generate: interrupted (complete: walk-000.mp4)\n"
    assert os.listdir() == ["walk-000.mp4"]


# -- as a process ----------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "vfengine.generate"]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(generate.__file__).parents[2]),
    "OMP_NUM_THREADS": "1",  # two threads on one busy core would wait for each other for minutes
}


def test_no_progress_bar_in_a_pipe(tiny_checkpoint, tmp_path):
    done = subprocess.run(
        [*COMMAND, "--model", tiny_checkpoint, "--label=walk", "--num_inference_steps=3", "--json"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["timings"]["startup"] > 0.1  # the interpreter and torch count
    assert os.listdir(tmp_path) == ["walk.mp4"]


def test_errors_and_help_come_without_torch(tmp_path):
    hidden = tmp_path / "torch.py"
    hidden.write_text("raise SystemExit('torch was imported')")
    environment = {
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]]),
    }
    for argv, status in (
        (["--help"], 0),
        (["--num-frames", "none"], 2),
        (["--label", "walk", "--output", "a.avi"], 2),
    ):
        done = subprocess.run(
            [*COMMAND, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == status
        assert "torch was imported" not in done.stderr
        assert done.stderr.count("\n") == (status == 2)


def read_terminal(terminal, until=None):
    """What a process writes to a terminal, up to a text or to its end."""
    seen = b""
    while until is None or until not in seen:
        if not select.select([terminal], [], [], 120)[0]:
            raise TimeoutError(f"silent after {seen!r}")
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # how a pty says that its other end is closed
            break
    return seen


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_terminal_shows_progress_and_signals_leave_nothing(
    tiny_checkpoint, tmp_path, number, status
):
    terminal, stderr = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "--model", tiny_checkpoint, "--label=walk", "--num-inference-steps=1000",
         "--num-videos=100", "--base-trajectory=t.safetensors"],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=stderr, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # nohup ignores it
    )  # fmt: skip
    os.close(stderr)
    try:
        bar = read_terminal(terminal, until=b"base:")
        process.send_signal(number)
        rest = read_terminal(terminal)
        out, _ = process.communicate()
    finally:
        process.kill()
        os.close(terminal)
    assert b"/200000 [" in bar
    assert process.returncode == status
    assert out == ""
    assert b"Traceback" not in rest
    assert (b"vfengine.generate: interrupted" in rest) == (number == signal.SIGINT)
    assert os.listdir(tmp_path) == []
