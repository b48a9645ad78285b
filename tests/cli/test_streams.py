"""Streams that are closed, full or unread: clips are made all the same, and the status tells."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vfengine.cli import bench, evaluate, generate, main, serve, streams, train

MAINS = {
    "vfengine": main.main,
    "vfengine.generate": generate.main,
    "vfengine.serve": serve.main,
    "vfengine.train": train.main,
    "vfengine.bench": bench.main,
    "vfengine.eval": evaluate.main,
}
ROOT = Path(streams.__file__).parents[2]


class Lost(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, number):
        super().__init__()
        self.error = OSError(number, os.strerror(number))  # a BrokenPipeError for EPIPE

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("name", MAINS)
def test_help_that_cannot_be_printed(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Lost(errno.ENOSPC))
    assert MAINS[name](["--help"]) == 1
    reason = "stdout cannot be written (No space left on device)"
    assert capsys.readouterr().err == f"{name}: error: {reason}\n"
    monkeypatch.setattr(sys, "stdout", Lost(errno.EPIPE))
    assert MAINS[name](["--help"]) == 1
    assert capsys.readouterr().err == ""  # a reader that has gone has seen enough


@pytest.mark.parametrize("stdout", ["closed", "full", "unread"])
@pytest.mark.parametrize("flags", [["--json"], [], ["--quiet"]])
def test_a_clip_is_written_whatever_stdout_does(cli, monkeypatch, capsys, stdout, flags):
    lost = {"closed": None, "full": Lost(errno.ENOSPC), "unread": Lost(errno.EPIPE)}[stdout]
    monkeypatch.setattr(sys, "stdout", lost)
    status, _, err = cli("--label", "walk", "--output", "a.webp", *flags, steps="1")
    assert os.listdir() == ["a.webp"]
    if flags == ["--quiet"]:
        assert (status, err) == (0, "")
    else:
        assert status == 1 and err.count("\n") == 1
        assert "stdout cannot be written" in err and err.endswith("(complete: a.webp)\n")


@pytest.mark.parametrize("flags", [["--dry-run", "--output", "a.webp"], ["--list-labels"]])
def test_what_only_tells_ends_silently_where_nobody_reads(cli, monkeypatch, flags):
    monkeypatch.setattr(sys, "stdout", Lost(errno.EPIPE))
    assert cli("--label", "walk", *flags)[::2] == (1, "")
    monkeypatch.setattr(sys, "stdout", Lost(errno.ENOSPC))
    status, _, err = cli("--label", "walk", *flags)
    assert (status, err.count("\n")) == (1, 1)


@pytest.mark.parametrize("stderr", [Lost(errno.ENOSPC), Lost(errno.EIO)])
def test_what_stderr_loses_changes_nothing(cli, monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    assert cli("--label", "walk", "--output", "a.webp", steps="1")[0] == 0
    assert cli("--label", "walk", "--output", "a.avi")[0] == 2
    assert os.listdir() == ["a.webp"]


def test_lines_of_a_file_are_all_made(cli, monkeypatch):
    Path("lines.txt").write_text("walk\nno label\njump\n")
    monkeypatch.setattr(sys, "stdout", Lost(errno.EPIPE))
    status, _, err = cli("--prompts", "lines.txt", steps="1")
    assert status == 1 and err.endswith("error: 1 of 3 lines failed: 2\n")
    assert sorted(os.listdir()) == ["0000-walk.mp4", "0002-jump.mp4", "lines.txt"]
    Path("lines.txt").write_text("walk\n")
    status, _, err = cli("--prompts", "lines.txt", steps="1")
    assert status == 1 and err.endswith("(Broken pipe) (complete: 0000-walk.mp4)\n")


@pytest.mark.parametrize(("number", "made"), [(errno.EPIPE, 1), (errno.ENOSPC, 2)])
def test_lines_of_a_stream_end_with_their_reader(cli, monkeypatch, number, made):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"walk\njump\n")))
    monkeypatch.setattr(sys, "stdout", Lost(number))
    assert cli("--prompts", "-", steps="1")[0] == 1
    assert len(os.listdir()) == made


# -- as a process ----------------------------------------------------------------------------------


def told(redirections, code):
    """Status and stderr of this code after `open_streams`, in a shell's process without torch."""
    code = f"import os, sys\nfrom vfengine.cli.streams import *\nopen_streams()\n{code}"
    line = ["sh", "-c", f'"$0" -c "$1" {redirections}', sys.executable, code]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path):
    code = (
        "opened = os.open(os.devnull, os.O_RDONLY)\n"
        "tell('lost')\nprint('by others', file=sys.stderr)\nempty = sys.stdin.read()\n"
        "try: say('a result')\n"
        "except Unsaid as error: reason = str(error)\n"
        f"open({str(tmp_path / 'told')!r}, 'w').write(repr([opened, empty, reason]))"
    )
    assert told("<&- >&- 2>&-", code) == (0, "")
    reason = "stdout cannot be written (Bad file descriptor)"
    assert (tmp_path / "told").read_text() == repr([3, "", reason])


@pytest.mark.parametrize("stdout", ["> /dev/full", ">&-", "| true"])
def test_nothing_fails_at_the_exit_either(stdout):
    code = "sys.stdin.read()\ntry: say('x' * 10**6)\nexcept Unsaid: tell('unsaid')"
    assert told(f"< /dev/null {stdout}", code) == (0, "unsaid\n")


def test_a_name_that_stdout_cannot_spell_is_written_as_escapes(tmp_path):
    code = r"say('é\udcff')"
    assert told(f"> {tmp_path / 'out'}", code) == (0, "")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "é\\udcff\n"
