"""How commands end: what an error comes to, and which signals stop a process."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import vfengine.files
from vfengine.cli.ending import begun, ended, verdict
from vfengine.cli.flags import Failure, UsageError
from vfengine.cli.start import begin, on_stop
from vfengine.cli.train_loop import Limit


def allocation_error():
    with pytest.raises(RuntimeError) as told:
        torch.empty(1 << 60)
    return told.value


def system_error(number):
    return OSError(number, os.strerror(number), "a.mp4")


BAD_INPUT = {
    "usage": UsageError("a flag"),
    "value": ValueError("a value"),
    "package": ImportError("no package"),
    "missing": FileNotFoundError("no file"),
    "refused": system_error(errno.EACCES),
    "folder": system_error(errno.EISDIR),
}
TROUBLE = {
    "failure": Failure("it failed"),
    "loss": FloatingPointError("the loss is not finite"),
    **{
        errno.errorcode[number]: system_error(number)
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE)
    },
}
MEMORY = {
    "python": MemoryError(),
    "native": MemoryError("std::bad_alloc"),
    "torch": allocation_error(),
    "torch native": RuntimeError("std::bad_alloc"),
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "library": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "system": system_error(errno.ENOMEM),
}


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize("name", [*BAD_INPUT, *TROUBLE, *MEMORY])
def test_an_error_is_one_line_and_a_status(name, capsys):
    error = {**BAD_INPUT, **TROUBLE, **MEMORY}[name]
    status = ended(raising(error), "a command", less_memory="less")
    assert status == (2 if name in BAD_INPUT else 1)
    err = capsys.readouterr().err
    assert err.startswith("a command: error: ") and err.count("\n") == 1
    assert (err == "a command: error: not enough memory: try less\n") == (name in MEMORY)
    if name not in MEMORY:
        assert ("a.mp4: " in err) == (getattr(error, "filename", None) is not None)


def test_a_file_is_named_and_complete_ones_after_it(capsys):
    error, files = system_error(errno.ENOSPC), [Path("a"), Path("b")]
    assert ended(raising(error), "x", files) == 1
    assert capsys.readouterr().err == (
        "x: error: a.mp4: No space left on device (complete: a, b)\n"
    )
    assert ended(raising(KeyboardInterrupt()), "x", files) == 130
    assert capsys.readouterr().err == "x: interrupted (complete: a, b)\n"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), TypeError("a bug"), KeyError("a bug")])
def test_a_bug_is_not_hidden(error):
    assert verdict(error) is None
    with pytest.raises(type(error), match="a bug"):
        ended(raising(error), "x")
    with pytest.raises(type(error), match="a bug"), begun():
        raise error


def test_statuses_of_commands_that_go_well():
    assert (ended(lambda: None, "x"), ended(lambda: 143, "x")) == (0, 143)


@pytest.mark.parametrize("error", [ValueError("odd"), system_error(errno.EACCES)])
def test_no_error_is_of_the_input_once_work_has_begun(error, capsys):
    def run():
        with begun():
            raise error

    assert ended(run, "x") == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, OSError), (errno.EINVAL, ValueError)])
def test_a_disk_that_cannot_be_read_is_no_fault_of_the_file(tmp_path, monkeypatch, number, kind):
    def failing(*_):
        raise SafetensorError(f"I/O error (os error {number})")

    monkeypatch.setattr(vfengine.files, "safe_open", failing)
    with pytest.raises(kind, match="x"), vfengine.files.open_tensors(tmp_path / "x"):
        pass


# -- signals ---------------------------------------------------------------------------------------


@pytest.fixture
def signals():
    """Puts back what handles signals; a SIGHUP is not ignored, as it is under nohup."""
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unwinds_the_stack(signals, number, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    begin()
    unwound = []
    with pytest.raises(SystemExit) as told:
        try:
            signal.raise_signal(number)
        finally:
            unwound.append(True)
    assert (told.value.code, unwound) == (128 + number, [True])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_training_after_its_step(signals, number):
    limit = Limit(type("Settings", (), {"max_hours": None, "max_minutes": None}), 0.0)
    with limit.watching():
        assert not limit.reached
        signal.raise_signal(number)
        assert limit.reached and limit.signal == number
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_a_hangup_that_is_ignored_stays_so(signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert on_stop(lambda *_: None).keys() == {signal.SIGTERM}
    signal.raise_signal(signal.SIGHUP)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hangup_stops_a_server_unless_it_is_ignored(signals, ignored):
    from vfengine.serving.http_server import Server

    server = Server(app=None)
    if ignored:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with server.capture_signals():
        signal.raise_signal(signal.SIGHUP)
    assert (server.should_exit, server.interrupted) == (not ignored, False)
    assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if ignored else signal.SIG_DFL)
