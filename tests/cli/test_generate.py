"""python -m vfengine.generate: what it writes and reports, failures, and signals."""

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
from command_line import STEPS, refused
from conftest import ON_CPU

import vfengine as vf
from vfengine.cli import generate
from vfengine.media import codecs
from vfengine.media import video as video_io
from vfengine.media.pictures import enlarge, sheet
from vfengine.media.video import read_video
from vfengine.pipelines.videofusion import to_uint8

# -- clips and lines -------------------------------------------------------------------------------


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
    assert np.array_equal(read_video("a.webp").frames, enlarge(plain.frames, 3))
    cli(*arguments, "--scale=3", "--scale-filter=lanczos")
    lanczos = enlarge(plain.frames, 3, "lanczos")
    assert np.array_equal(read_video("a.webp").frames, lanczos)
    cli(*arguments[:-1], "a.png")
    assert np.array_equal(read_video("a.png").frames[0], sheet(plain.frames))


def test_a_clip_is_encoded_as_asked_for(cli):
    walk = ["--label", "walk", "--output"]
    cli(*walk, "a.webp")
    frames = read_video("a.webp").frames
    settings = json.loads(cli(*walk, "a.mkv", "--json")[1])["settings"]
    assert [settings[name] for name in ("codec", "crf", "chroma")] == ["ffv1", None, None]
    assert np.array_equal(read_video("a.mkv").frames, frames)
    errors = []
    for flags in (["--crf", 5, "--chroma", 444], ["--crf", 5], ["--codec", "hevc", "--crf", 45]):
        settings = json.loads(cli(*walk, "a.mp4", *flags, "--json")[1])["settings"]
        assert settings["crf"] == flags[flags.index("--crf") + 1]
        errors.append(np.abs(read_video("a.mp4").frames.astype(int) - frames).mean())
    assert errors == sorted(errors)


def test_sizes_are_tried_before_sampling(cli, monkeypatch):
    def refuse(encoding, size):
        raise ValueError(f"{encoding.codec} cannot encode {size}")

    monkeypatch.setattr(codecs, "_try", refuse)
    monkeypatch.setattr(vf.VideoFusionPipeline, "sample", None)
    walk = ["--label", "walk", "--scale", 3, "--codec", "av1", "--output", "a.webm"]
    assert refused(cli(*walk), "a.webm: av1 cannot encode (48, 48)")


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


# -- failures and interrupts -----------------------------------------------------------------------


def test_failure_while_writing_names_what_was_written(cli, monkeypatch):
    write = video_io.write_video

    def full_disk(path, frames, fps, **options):
        if path.name == "a-002.webp":
            raise OSError(28, "No space left on device")
        write(path, frames, fps, **options)

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

    monkeypatch.setattr(vf.VideoFusionPipeline, "sample", greedy)
    status, out, err = cli("--label", "walk")
    assert (status, out) == (1, "")
    assert err.startswith("vfengine.generate: error: not enough memory: try fewer frames")


def test_programming_errors_are_not_hidden(cli, monkeypatch):
    def wrong(self, *args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(vf.VideoFusionPipeline, "sample", wrong)
    with pytest.raises(RuntimeError, match="a bug"):
        cli("--label", "walk")


@pytest.mark.parametrize("moment", ["sampling", "writing"])
def test_interrupt_leaves_complete_files_only(cli, monkeypatch, moment):
    if moment == "sampling":
        sample = vf.VideoFusionPipeline.sample

        def interrupted(self, request, callback):
            if request.sample_offset == 1:
                raise KeyboardInterrupt
            return sample(self, request, callback)

        monkeypatch.setattr(vf.VideoFusionPipeline, "sample", interrupted)
    else:
        write = video_io.encode

        def interrupted(path, *rest):
            write(path, *rest)
            if "-001" in str(path):
                raise KeyboardInterrupt

        monkeypatch.setattr(video_io, "encode", interrupted)
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
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
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
    """A process's output on a terminal, up to a text or to its end."""
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
        [
            *COMMAND,
            "--model",
            tiny_checkpoint,
            "--label=walk",
            "--num-inference-steps=1000",
            "--num-videos=100",
            "--base-trajectory=t.safetensors",
        ],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # nohup ignores it
    )
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
