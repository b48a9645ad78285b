"""A server whose disk is full: clients are told, nothing accepted is lost, and it goes on after.

The system refuses to let the processes' files grow past RLIMIT_FSIZE, as it would on a full disk.
"""

import resource
import sqlite3

import pytest
from conftest import save_tiny
from server_process import ServerProcess, ask, until
from serving_engines import engine_of
from serving_jobs import add, settings_of

from vfengine.serving.engine import Engine
from vfengine.serving.store import Store
from vfengine.serving.workers import Workers

CLIP = {"label": "walk", "num_inference_steps": 2, "num_frames": 4, "format": "webp"}
FULL = sqlite3.OperationalError("database or disk is full")


@pytest.fixture
def server(tmp_path):
    model = save_tiny(tmp_path / "model")
    flags = ("--model", model, "--device", "cpu", "--dtype", "float32")
    server = ServerProcess(tmp_path / "store", tmp_path / "log", *flags)
    server.start()
    yield server
    server.stop()


def test_requests_are_told_and_accepted_jobs_are_made_once_there_is_room(server):
    connection, unlimited = server.connect(), (resource.RLIM_INFINITY,) * 2

    def status(job_id):
        return ask(connection, "GET", f"/v1/videos/{job_id}").json["status"]

    def limit(limits):
        for pid in (server.process.pid, *server.engines()):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)

    first = ask(connection, "POST", "/v1/videos", {**CLIP, "seed": 1}).json["id"]
    until(lambda: status(first) == "completed", "the first clip")
    engines = server.engines()
    limit((0, resource.RLIM_INFINITY))
    for seed in (2, 3):
        answer = ask(connection, "POST", "/v1/videos", {**CLIP, "seed": seed})
        assert answer.status == 507 and answer.headers["retry-after-ms"] == "5000"
        assert answer.json["error"]["code"] == "disk_full"
    assert ask(connection, "DELETE", f"/v1/videos/{first}").status == 507
    assert ask(connection, "GET", f"/v1/videos/{first}/content").status == 200
    limit(unlimited)
    second = ask(connection, "POST", "/v1/videos", {**CLIP, "seed": 2}).json["id"]
    until(lambda: status(second) == "completed", "the second clip")
    assert ask(connection, "GET", "/v1/videos").json["data"][0]["id"] == second
    assert len(ask(connection, "GET", "/v1/videos").json["data"]) == 2
    assert server.engines() == engines
    assert "Traceback" not in server.log.read_text()


class _Failing:
    """A store one of whose methods meets a full disk a few times."""

    def __init__(self, store: Store, method: str, times: int) -> None:
        self._store, self._method, self.left = store, method, times

    def __getattr__(self, name):
        if name == self._method and self.left:
            self.left -= 1

            def fail(*_, **__):
                raise FULL

            return fail
        return getattr(self._store, name)


@pytest.mark.parametrize("method", ["claim", "report", "finish"])
def test_an_engine_waits_for_room_and_its_jobs_are_not_to_blame(
    tmp_path, monkeypatch, capsys, method
):
    """A report that fails makes the job's error fail to be noted too."""
    monkeypatch.setattr("vfengine.serving.engine._POLL", 0.01)
    store = Store(tmp_path / "store")
    (job,) = add(store, settings_of())
    failing = _Failing(store, method, 3)
    engine: Engine = engine_of(save_tiny(tmp_path / "model"), store)
    engine.store = engine.maker.store = failing
    if method != "claim":
        monkeypatch.setattr(engine.maker, "fail", _raise_full)
    for _ in range(9):
        engine.run_once()
    assert failing.left == 0
    made = store.get(job)
    assert (made.status, made.attempts) == ("completed", 1)
    said = capsys.readouterr().err
    assert said.count("disk is full\nvfengine: the engine waits") == (method == "claim")
    store.close()


def _raise_full(*_):
    raise FULL


def test_engines_that_end_on_a_full_disk_are_recovered_later(tmp_path, monkeypatch, capsys):
    store = Store(tmp_path / "store")
    (job,) = add(store, settings_of())
    store.claim("engine-gone")
    workers = Workers(_Failing(store, "recover", 2))
    assert not workers._recovered() and not workers._recovered()
    assert store.get(job).status == "in_progress"
    assert workers._recovered()
    assert store.get(job).status == "queued"
    assert capsys.readouterr().err.count("vfengine: database or disk is full") == 2
    store.close()
