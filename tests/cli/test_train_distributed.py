"""torchrun -m vfengine.train: several processes, one log; what ends them, and what goes on."""

import json
import os
import signal

import numpy as np
import pytest
from safetensors.torch import load_file
from test_train import SHAPE, contents
from torchrun import end, start, until, worker

from vfengine.cli import train
from vfengine.files import open_tensors
from vfengine.formats.checkpoint import read_config, read_weights
from vfengine.media.video import write_video

SCHEDULE = [
    *("--steps", "400", "--batch-size", "3", "--extra-images", "3", "--warmup", "1"),
    *("--save-every", "4", "--log-every", "1", "--sample-every", "0"),
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two classes, and a file that is no video."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for name in ("left", "right"):
        (folder / name).mkdir()
        write_video(folder / name / "a.webp", rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    (folder / "left" / "broken.mp4").write_bytes(b"no video")
    return folder


def argv(videos, output, *more):
    return [*("--data", str(videos), "--output", str(output)), *SHAPE, *SCHEDULE, *map(str, more)]


def started(*flags, torchrun=()):
    return start("-m", "vfengine.train", *flags, flags=torchrun)


def logged(output):
    """The lines of the log, whole ones alone."""
    file = output / "log.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_of(output):
    return [line["step"] for line in logged(output) if "step" in line]


def own_lines(err):
    """What the command said of its end, once for all its processes."""
    return [line for line in err.splitlines() if line.startswith("vfengine.train: ")]


def saved(output):
    """The steps of a state, beside a whole checkpoint that is its own."""
    config = read_config(output / "checkpoint")
    for network in config.networks:
        read_weights(output / "checkpoint", network, config)  # compares SHA-256
    with open_tensors(output / "training.safetensors") as state:
        return int(state.metadata()["steps_done"])


def kill_at(process, output, step, rank):
    until(process, lambda: max(steps_of(output), default=0) >= step)
    os.kill(worker(process, rank), signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_worker_is_told_in_a_line_and_the_run_goes_on(videos, tmp_path, rank):
    run = started(*argv(videos, tmp_path / "run", *(["--shard"] * rank)))
    kill_at(run, tmp_path / "run", 6, rank)
    status, _, err = end(run)
    assert status == 1
    (line,) = own_lines(err)
    steps = saved(tmp_path / "run")
    assert steps >= 4 and steps % 4 == 0
    assert "error: a worker was lost at step " in line
    assert line.endswith(f"; --resume goes on from step {steps}")
    assert not list((tmp_path / "run").rglob(".*"))  # nothing half-written
    last = max(steps_of(tmp_path / "run")) + 1
    more = ["--resume", "--steps", last]
    assert train.main(argv(videos, tmp_path / "run", *more)) == 0  # one process
    begun = [line["start"] for line in logged(tmp_path / "run") if "start" in line]
    assert begun == [0, steps] and saved(tmp_path / "run") == last


def test_torchrun_starts_a_run_anew_that_lost_a_worker(videos, tmp_path):
    flags = argv(videos, tmp_path / "run", "--steps", 16)
    run = started(*flags, torchrun=["--max-restarts", "1"])
    kill_at(run, tmp_path / "run", 5, 1)
    status, out, err = end(run)
    assert status == 0, err
    assert out.count("generate with --model") == 1 and saved(tmp_path / "run") == 16
    first, second = (line for line in logged(tmp_path / "run") if "start" in line)
    assert (first["start"], first["processes"], second["processes"]) == (0, 2, 2)
    assert second["start"] >= 4 and second["start"] % 4 == 0 and second["resume"] is True
    assert steps_of(tmp_path / "run")[-1] == 16
    # another torchrun does not take that state for its own, nor where it starts anew
    before = contents(tmp_path / "run")
    status, _, err = end(started(*flags, torchrun=["--max-restarts", "1"]))
    assert status == 1 and contents(tmp_path / "run") == before
    assert len(own_lines(err)) == 2  # of both starts
    assert all("training.safetensors exists: pass --resume" in line for line in own_lines(err))


def test_a_signal_stops_all_processes_at_a_step(videos, tmp_path):
    run = started(*argv(videos, tmp_path / "run"))
    until(run, lambda: max(steps_of(tmp_path / "run"), default=0) >= 2)
    os.kill(run.pid, signal.SIGTERM)
    _, out, err = end(run)
    steps = saved(tmp_path / "run")
    assert steps == steps_of(tmp_path / "run")[-1]
    assert err.count(f"stopped after {steps} of 400 steps") == 1
    assert out.count("generate with --model") == 1
    assert err.count("skipped ") == err.count("4 clips of 2 classes") == 1
    assert "fp32 on cpu, 2 processes" in err and err.count("peak memory ") == 1
    assert logged(tmp_path / "run")[1]["peak_memory_mib"] > 50


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--device", "cuda:1"], "device 'cuda:1' under torchrun: with cuda, each process takes"),
        (["--accumulate", "2"], "batch_size must be at least 4, a clip for each of 4 parts"),
    ],
)
def test_refusals_come_once_and_hang_nobody(videos, tmp_path, more, problem):
    status, out, err = end(started(*argv(videos, tmp_path / "run", *more)))
    assert (status, out) == (1, "") and not (tmp_path / "run").exists()
    (line,) = own_lines(err)
    assert line.startswith(f"vfengine.train: error: {problem}")
    assert "exitcode  : 2 " in err and "exitcode  : 1 " not in err


def test_trainings_of_one_process_are_refused_by_name(tmp_path):
    status, _, err = end(started("--objective", "text", "--output", tmp_path / "run"))
    assert status == 1
    (line,) = own_lines(err)
    assert "--objective text trains in one process, torchrun started 2" in line


# -- one process -----------------------------------------------------------------------------------


def test_flags_of_execution_leave_the_steps_as_they_are(videos, tmp_path, capsys):
    flags = ["--accumulate", "3", "--checkpoint-activations"]
    states = []
    for name, more in (("plain", []), ("parts", flags)):
        more = [*more, "--steps", "3"]
        assert train.main(argv(videos, tmp_path / name, *more)) == 0
        states.append(load_file(tmp_path / name / "training.safetensors"))
        assert "peak memory " in capsys.readouterr().err
    for key, value in states[0].items():
        assert (value - states[1][key]).abs().max() < 1e-4, key
    start = logged(tmp_path / "parts")[0]
    assert (start["accumulate"], start["checkpoint_activations"]) == (3, True)
    assert (start["processes"], start["torchrun"]) == (1, None)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--shard"], "shard needs several processes: torchrun --nproc-per-node K"),
        (["--accumulate", "0"], "accumulate must be at least 1, got 0"),
        (["--accumulate", "4"], "batch_size must be at least 4, a clip for each of 4 parts"),
        (["--accumulate", "x"], "argument --accumulate: invalid int value: 'x'"),
        (["--lora", "2", "--shard"], "--shard cannot go with --lora"),
    ],
)
def test_flags_of_execution_that_cannot_be_are_refused(videos, tmp_path, capsys, flags, problem):
    shape = [] if "--lora" in flags else SHAPE[:-2]
    given = ["--data", str(videos), "--output", str(tmp_path / "run"), *shape, "--batch-size", "3"]
    assert train.main([*given, *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and problem in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", ["autoencoder", "text"])
@pytest.mark.parametrize("name", ["accumulate", "shard", "checkpoint-activations", "compile"])
def test_parts_of_models_take_no_flags_of_execution(tmp_path, capsys, objective, name):
    given = [f"--{name}", *(["2"] if name == "accumulate" else [])]
    output = ["--objective", objective, "--output", str(tmp_path / "run")]
    assert train.main([*output, *given]) == 2
    expected = f"--{name} has no meaning for --objective {objective}"
    assert expected in capsys.readouterr().err
