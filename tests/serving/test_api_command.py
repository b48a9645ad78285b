"""python -m vfengine.serve: a process with a model, its signals, its exit status and its errors."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import openai
import pytest
import torch
from api_server import INFO

from vfengine.cli import serve
from vfengine.cli.serve_settings import SETTINGS, read_settings
from vfengine.serving.engine import default_batch_size
from vfengine.serving.store import Store
from vfengine.serving.workers import Workers

pytestmark = pytest.mark.filterwarnings("ignore:.*Sora API.*:DeprecationWarning")


@contextmanager
def command(*flags):
    """A server in a process of its own; its url once requests are taken, else its last line."""
    argv = [sys.executable, "-m", "vfengine.serve", *map(str, flags)]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.fullmatch(r"listening on (http://127.0.0.1:\d+)\n", line):
                process.url = found.group(1)
                break
        else:
            raise AssertionError("".join(lines))
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(process, number) -> int:
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


def test_a_clip_from_a_model_to_a_file(clean_checkpoint, tmp_path):
    """Made, remixed and extended by an engine; then SIGTERM, and a second start finds it all."""
    flags = ("--model", clean_checkpoint, "--port", 0, "--store", tmp_path / "store")
    options = {"api_key": "x", "max_retries": 0}
    made = {"prompt": "jump", "seconds": "0.5", "extra_body": {"num_inference_steps": 3, "seed": 1}}
    with command(*flags) as process:
        client = openai.OpenAI(base_url=f"{process.url}/v1", **options)
        video = client.videos.create_and_poll(**made, poll_interval_ms=50)
        assert (video.status, video.error) == ("completed", None)
        data = client.videos.download_content(video.id).read()
        assert data[4:8] == b"ftyp"
        remix = client.videos.remix(video.id, prompt="jump")
        longer = client.videos.extend(
            prompt="jump",
            seconds="0.25",
            video=openai.omit,
            extra_body={"video": {"id": video.id}, "num_inference_steps": 3},
        )
        for other in (remix, longer):
            done = client.videos.poll(other.id, poll_interval_ms=50)
            assert (done.status, done.error) == ("completed", None)
        bases = [
            client.videos.download_content(one.id, variant="thumbnail").content
            for one in (video, remix)
        ]
        assert bases[0] == bases[1]
        page = urllib.request.urlopen(f"{process.url}/metrics").read().decode()
        assert "vfengine_clips_total 3.0" in page
        assert 'vfengine_base_paths_total{how="walked"} 1.0' in page  # a picture's is not counted
        assert 'vfengine_base_paths_total{how="found"} 1.0' in page
        assert 'vfengine_phase_seconds_count{phase="residual"} 3.0' in page
        with urllib.request.urlopen(f"{process.url}/health") as answer:
            assert json.load(answer)["model"] == clean_checkpoint.name
        client.close()
        assert finish(process, signal.SIGTERM) == 0
    with command(*flags, "--quiet") as process:
        client = openai.OpenAI(base_url=f"{process.url}/v1", **options)
        assert client.videos.download_content(video.id).read() == data
        client.close()
        assert finish(process, signal.SIGINT) == 130


def test_a_server_that_stops_gives_its_jobs_back(clean_checkpoint, tmp_path):
    flags = ("--model", clean_checkpoint, "--port", 0, "--store", tmp_path / "store")
    with command(*flags, "--max-steps", 1000) as process:
        client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="x", max_retries=0)
        long = {"num_inference_steps": 1000, "num_frames": 90}
        video = client.videos.create(prompt="jump", extra_body=long)
        while client.videos.retrieve(video.id).status == "queued":
            pass
        client.close()
        assert finish(process, signal.SIGTERM) == 0
    job = Store(tmp_path / "store").get(video.id)
    assert (job.status, job.attempts, job.progress) == ("queued", 0, 0)


# -- without a process -----------------------------------------------------------------------------


class NoWorkers(Workers):
    """Engines that are never started; the model is known at once, or an error."""

    fault = None

    def start(self):
        self.info, self.error = (None, self.fault) if self.fault else (INFO, None)
        self._known.set()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command line that ends by itself: (status, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("vfengine.serving.workers.Workers", NoWorkers)
    former = signal.getsignal(signal.SIGTERM)

    def run(*argv):
        status = serve.main([*map(str, argv)])
        return status, capsys.readouterr().err

    yield run
    signal.signal(signal.SIGTERM, former)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--port", "70000"], "--port"),
        (["--bogus"], "--bogus"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
        (["--host", "0.0.0.0"], "--api-key-file must name keys"),
        (["--host", "127.evil.example"], "--api-key-file must name keys"),
        (["--api-key-file", "none"], "--api-key-file none: No such file"),
        (["--api-key-file", "empty"], "expected a key on each line"),
        (["--host", "256.0.0.1", "--api-key-file", "keys"], "cannot listen at 256.0.0.1"),
        (["--store", "keys", "--port", "0"], "--store keys"),
        (["--keep", "-1"], "--keep"),
        (["--served-model-name", ""], "--served-model-name"),
        (["--max-seconds", "nan"], "--max-seconds"),
    ],
)
def test_bad_command_lines_end_in_one_line(run, tmp_path, argv, words):
    (tmp_path / "empty").touch()
    (tmp_path / "keys").write_text("k\n")
    status, error = run(*argv)
    assert status == 2 and words in error and error.count("\n") == 1


def test_a_port_in_use(run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, error = run("--port", port)
    assert status == 2 and f"cannot listen at 127.0.0.1:{port}" in error


def test_a_store_in_use(run, tmp_path):
    with serve._store(tmp_path / "store"):
        status, error = run("--store", "store", "--port", 0)
    assert status == 2
    assert error == "vfengine.serve: error: store: another server uses this folder\n"


def test_a_store_of_something_else(run, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "jobs.sqlite3").write_text("hello, this is no database at all\n" * 9)
    status, error = run("--store", "store", "--port", 0)
    assert (
        status == 2 and "--store store: file is not a database" in error and error.count("\n") == 1
    )


def test_a_model_that_cannot_be_read(run, monkeypatch):
    monkeypatch.setattr(NoWorkers, "fault", "no such model")
    status, error = run("--port", 0, "--quiet")
    assert (status, error) == (2, "vfengine.serve: error: no such model\n")


@pytest.mark.parametrize("missing", ["starlette", "uvicorn", "python_multipart"])
def test_without_the_extra(run, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    status, error = run("--port", 0)
    assert status == 2 and error.count("\n") == 1
    assert f"a server needs {missing}, which pip install '.[serve]' brings" in error


def test_help_needs_neither_torch_nor_the_extra():
    code = (
        "import sys\nfrom vfengine.cli.serve import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert not end.code\n"
        "named = {'torch', 'starlette', 'uvicorn', 'prometheus_client', 'openai'}\n"
        "assert not named & set(sys.modules), named & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--api-key-file" in done.stdout


def test_settings():
    settings = read_settings(["--model", "/a/b/", "--max_queue=7", "--dtype", "bf16"])
    assert (settings.served_model_name, settings.max_queue, settings.dtype) == ("b", 7, "bfloat16")
    assert read_settings([]).served_model_name == "vfengine"
    assert {setting.name for setting in SETTINGS} == set(vars(read_settings([])))


def test_flags_of_engines():
    settings = read_settings(["--model", "m", "--batch-size", "3", "--no-capture"])
    assert serve._engine_flags(settings) == [
        *("--name", "m", "--device", "auto", "--dtype", "auto"),
        *("--model", "m", "--batch-size", "3", "--no-capture"),
    ]


def test_uploads_go_to_the_store(tmp_path, monkeypatch):
    """Bodies that are too large for memory must not fill the system's folder of temporary files."""
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    with serve._store(tmp_path / "store"):
        assert tempfile.gettempdir() == os.fspath(tmp_path / "store" / "uploads")


def test_help_says_how_large_batches_are():
    (said,) = [setting.otherwise for setting in SETTINGS if setting.name == "batch_size"]
    sizes = [default_batch_size(SimpleNamespace(device=torch.device(d))) for d in ("cuda", "cpu")]
    assert said == "{} on CUDA, {} on a CPU".format(*sizes)


HEAPS = """
import ctypes, threading
from vfengine.serving.http_server import share_heap
share_heap()
held, all_there = [], threading.Barrier(9)
def hold():
    held.append([bytes(5000) for _ in range(100)])
    all_there.wait()
for _ in range(8):
    threading.Thread(target=hold).start()
all_there.wait()
libc = ctypes.CDLL(None)
libc.fopen.restype, libc.malloc_info.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
libc.fclose.argtypes = (ctypes.c_void_p,)
file = libc.fopen(b"heaps.xml", b"w")
libc.malloc_info(0, file)
libc.fclose(file)
print(open("heaps.xml").read().count("<heap nr="))
"""


def test_threads_share_a_heap(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HEAPS], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"
