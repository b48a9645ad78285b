"""The --output of a training: its checkpoint is that of its state, whatever ended the run before.

A stand-in with the surface of vfengine/cli/train_loop.py trains here. The real ones are in
test_train.py and its neighbours.
"""

import argparse
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from test_train import contents

import vfengine.files
from vfengine.cli import train, train_output
from vfengine.cli.ending import ended
from vfengine.cli.flags import Failure, UsageError
from vfengine.cli.train_loop import Limit, run, tell_end
from vfengine.cli.train_output import open_output
from vfengine.files import open_tensors, write_tensors
from vfengine.formats.folders import folder_digest, write_folder
from vfengine.training.options import TrainingOptions
from vfengine.training.report import StepReport


class Counting:
    """A training whose one weight is the number of its steps."""

    device = torch.device("cpu")

    def __init__(self, steps=4):
        self.options, self.steps_done = TrainingOptions(steps=steps, warmup=1), 0

    def step(self):
        self.steps_done += 1
        return StepReport({"all": torch.zeros(())}, step=self.steps_done)

    def export(self, folder):
        weights = {"weight": torch.tensor(float(self.steps_done))}
        write_folder(folder, {"only": weights}, json.dumps, torch.float32)

    def save(self, file, checkpoint=""):
        metadata = {"steps_done": str(self.steps_done), "checkpoint": checkpoint}
        write_tensors(file, {"a": torch.zeros(1)}, {k: v for k, v in metadata.items() if v})

    def restore(self, file):
        with open_tensors(file) as state:
            self.steps_done = int(state.metadata()["steps_done"])

    def write_samples(self, file):
        Path(file).write_text(str(self.steps_done))


def settings_of(**values):
    fixed = {"max_hours": None, "max_minutes": None, "log_every": 2, "sample_every": 4}
    return argparse.Namespace(**{**fixed, "save_every": 2, "resume": False, **values})


def trained(folder, training=None, **values):
    """Trains as the command does; the training, once it has ended."""
    settings, training = settings_of(**values), training or Counting()
    with open_output(folder, settings.resume) as output:
        if settings.resume:
            training.restore(output.state)
        first = training.steps_done
        run(training, settings, output, Limit(settings, 0.0))
    tell_end(training, first)
    return training


def exported(folder):
    """The steps that the checkpoint in an output has seen."""
    with open_tensors(folder / "checkpoint" / "only.safetensors") as weights:
        return int(weights.get_tensor("weight"))


def failing_at(monkeypatch, owner, name, error, after=0):
    """Has a function raise the one time after it has been called so often."""
    plain, calls = getattr(owner, name), []

    def failing(*values, **more):
        calls.append(values)
        if len(calls) == after + 1:
            raise error
        return plain(*values, **more)

    monkeypatch.setattr(owner, name, failing)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- the checkpoint --------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), FULL])
def test_a_run_that_stops_between_checkpoint_and_state(tmp_path, monkeypatch, capsys, stopped):
    training = Counting()
    with monkeypatch.context() as patch:
        failing_at(patch, training, "save", stopped, after=1)
        with pytest.raises((KeyboardInterrupt, Failure)):
            trained(tmp_path, training)
    assert exported(tmp_path) == 4  # beside a state of 2 steps
    minutes = {"max_minutes": 0.0}  # no time for a step
    trained(tmp_path, resume=True, **minutes)
    assert exported(tmp_path) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'checkpoint'} was not that of the state" in said
    assert "stopped after 2 of 4 steps" in said
    assert trained(tmp_path, resume=True).steps_done == exported(tmp_path) == 4
    assert "was not that of the state" not in capsys.readouterr().err


def test_what_a_kill_left_behind_goes_though_nothing_is_left_to_write(tmp_path):
    trained(tmp_path)
    left = [tmp_path / ".training.safetensors.0123456789abcdef.part"]
    left += [tmp_path / "samples" / ".step-0000004.png.0123456789abcdef.part"]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "new").write_bytes(b"half")
    vfengine.files.sweep.cache_clear()  # as in the process that comes next
    trained(tmp_path, resume=True)
    assert not any(folder.exists() for folder in left)


def test_a_finished_run_is_resumed(tmp_path, capsys):
    trained(tmp_path)
    before = contents(tmp_path)
    trained(tmp_path, resume=True)
    said = capsys.readouterr().err
    assert said.endswith("no step to take: 4 of 4 are done\n") and "anew" not in said
    changed = {name for name, held in contents(tmp_path).items() if before.get(name) != held}
    assert changed == {"log.jsonl"}


def remove(checkpoint):
    shutil.rmtree(checkpoint)


def cut_off(checkpoint):
    file = checkpoint / "only.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def lose_weights(checkpoint):
    (checkpoint / "only.safetensors").unlink()


@pytest.mark.parametrize("damage", [remove, cut_off, lose_weights])
def test_a_finished_run_gets_its_checkpoint_again(tmp_path, capsys, damage):
    trained(tmp_path)
    before = folder_digest(tmp_path / "checkpoint")
    damage(tmp_path / "checkpoint")
    assert folder_digest(tmp_path / "checkpoint") != before
    trained(tmp_path, resume=True)
    assert folder_digest(tmp_path / "checkpoint") == before
    assert "has been written anew" in capsys.readouterr().err


def test_a_state_of_earlier_releases_names_no_checkpoint(tmp_path, capsys):
    training = trained(tmp_path)
    training.save(tmp_path / "training.safetensors")
    for anew in (True, False):
        trained(tmp_path, resume=True)
        assert ("written anew" in capsys.readouterr().err) == anew


@pytest.mark.parametrize("every", [4, 0])
def test_samples_that_failed_are_made_up_for(tmp_path, monkeypatch, every):
    sheet = tmp_path / "samples" / "step-0000004.png"
    training = Counting()
    with monkeypatch.context() as patch:
        failing_at(patch, training, "write_samples", FULL)
        with pytest.raises(Failure, match="No space left"):
            trained(tmp_path, training)
    assert exported(tmp_path) == 4 and os.listdir(sheet.parent) == []
    trained(tmp_path, resume=True, sample_every=every)
    assert sheet.exists() == bool(every)


# -- full disks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("renames", range(2, 5))  # of the first state, then the second save
def test_a_full_disk_leaves_the_last_whole_files(tmp_path, monkeypatch, capsys, renames):
    with monkeypatch.context() as patch:
        failing_at(patch, vfengine.files.os, "replace", FULL, after=renames)
        assert ended(lambda: trained(tmp_path) and None, "train") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("train: error: ")
    assert not [name for name in contents(tmp_path) if Path(name).name.startswith(".")]
    if (tmp_path / "training.safetensors").exists():
        assert trained(tmp_path, resume=True).steps_done == exported(tmp_path) == 4


def test_a_full_disk_leaves_whole_lines_in_the_log(tmp_path, monkeypatch):
    plain = os.write

    def half(number, data):
        if b'"step": 4' not in data:
            return plain(number, data)
        plain(number, data[: len(data) // 2])
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(train_output.os, "write", half)
        with pytest.raises(Failure, match="No space left"):
            trained(tmp_path)
    trained(tmp_path, resume=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line.get("start"), line.get("step")) for line in lines] == [
        *((0, None), (None, 2), (2, None), (None, 4)),
    ]


def test_clips_that_find_no_room_are_no_crash(tmp_path, monkeypatch):
    import numpy as np

    from vfengine.training import arrays

    failing_at(monkeypatch, arrays.os, "posix_fallocate", FULL)
    with pytest.raises(OSError, match="No space left"):
        arrays.kept(tmp_path / "x.npy", [np.zeros((2, 3), np.uint8)], 2, np.uint8)
    assert os.listdir(tmp_path) == []


# -- the folder ------------------------------------------------------------------------------------


def test_a_second_training_is_refused_by_name(tmp_path):
    folder = tmp_path / "run"
    with open_output(folder, resume=False) as output:
        output.log({"start": 0})
        for resume in (False, True):
            with pytest.raises(UsageError, match="run: another training writes there"):
                open_output(folder, resume).__enter__()
        with open_output(tmp_path / "other", resume=False):
            pass  # is nobody else's
    with open_output(folder, resume=False):
        pass  # the first has ended
    assert contents(tmp_path).keys() == {"run", "run/log.jsonl"}


def test_a_disk_without_locks_is_told(tmp_path, monkeypatch, capsys):
    failing_at(monkeypatch, fcntl, "flock", OSError(errno.ENOLCK, "No locks available"))
    assert trained(tmp_path).steps_done == 4
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def folder_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")


def folder_below_a_file(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "file" / "run")
    (tmp_path / "file").write_text("")


def foreign_checkpoint(tmp_path):
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint" / "diary.txt").write_text("mine")


def foreign_samples(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("mine")


def foreign_log(tmp_path):
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)


@pytest.mark.parametrize(
    "prepare",
    [folder_is_a_file, folder_below_a_file, foreign_checkpoint, foreign_samples, foreign_log],
)
def test_an_output_that_cannot_be_used_is_found_before_data_is_read(
    tmp_path, monkeypatch, capsys, prepare
):
    prepare(tmp_path)
    before = contents(tmp_path)
    failing_at(monkeypatch, train, "_pixels", AssertionError("data were read"))
    assert train.main(["--output", str(tmp_path / "run"), "--steps", "1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(tmp_path / "run") in err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("number", "status"), [(errno.EACCES, 2), (errno.ENOSPC, 1)])
def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, capsys, number, status):
    failing_at(monkeypatch, train_output.Path, "mkdir", OSError(number, os.strerror(number)))
    assert train.main(["--output", str(tmp_path / "run")]) == status
    assert os.strerror(number) in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
