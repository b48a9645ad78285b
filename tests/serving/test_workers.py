"""Engine processes: ready, killed in any phase, started again, stopped; and what they say."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import save_tiny
from serving_engines import acting, engine_of, run_all
from serving_jobs import STEPS, add, files_of, frames_of, settings_of

from vfengine.serving import workers as workers_module
from vfengine.serving.store import MAX_ATTEMPTS, Store
from vfengine.serving.workers import Workers

ON_CPU = ("--device", "cpu", "--dtype", "float32", "--name", "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    yield store
    store.close()


def wait_for(condition):
    """Waits until something is so, for two minutes at most."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


# -- kill -9 ---------------------------------------------------------------------------------------


def die_in(folder, store_folder, phase, step):
    """An engine's process that is killed, as by kill -9, at a step of a phase."""
    engine = engine_of(folder, Store(store_folder), worker="doomed", batch_size=2)
    patch = pytest.MonkeyPatch()
    acting(patch, phase, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run_all(engine)


@pytest.mark.parametrize("phase, step", [("base", 2), ("residual", 2), ("write", 0), ("write", 1)])
def test_a_killed_engine_loses_nothing(folder, tmp_path, monkeypatch, phase, step):
    many = [settings_of(residual_seed=seed) for seed in (1, 2)]
    whole = Store(tmp_path / "whole")
    expected = add(whole, *many)
    run_all(engine_of(folder, whole, batch_size=2))
    store = Store(tmp_path / "killed")
    names = add(store, *many)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vfengine.serving.making"])
    process = context.Process(target=die_in, args=(folder, store.folder, phase, step))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = [store.get(name).status for name in names]
    first = "completed" if (phase, step) == ("write", 1) else "in_progress"
    assert done == [first, "in_progress"]
    assert sorted(store.recover()) == sorted(
        name for name, status in zip(names, done, strict=True) if status == "in_progress"
    )
    steps = acting(monkeypatch, "none", 0, None)
    run_all(engine_of(folder, store, batch_size=2))
    walked = sum(step[0] == "base" and step[1] > 0 for step in steps)
    assert walked == (STEPS if phase == "base" else 0)
    for name, other in zip(names, expected, strict=True):
        assert files_of(store, name) == files_of(whole, other)
        assert np.array_equal(frames_of(store, name), frames_of(whole, other))
    assert store._rows("PRAGMA integrity_check")[0][0] == "ok"
    leftover = [f.name for f in store.folder.rglob("*") if f.name.endswith(".part")]
    assert not leftover


def test_engines_of_a_server(folder, store, monkeypatch):
    """One real process: it makes a job, is killed, another takes its place, and is stopped."""
    monkeypatch.setattr(workers_module, "_BACKOFF", (0.0,))
    events = []
    workers = Workers(store, ["--model", str(folder), *ON_CPU], keep=60, on_event=events.append)
    store.claim("an engine of an earlier server")
    first = add(store, settings_of())[0]
    store.claim("an engine of an earlier server")
    workers.start()
    info = workers.wait_ready(60)
    assert info.name == "tiny" and info.device == "cpu" and workers.alive == 1
    wait_for(lambda: store.get(first).status == "completed")
    job = store.get(first)
    assert job.attempts == 1 and job.expires_at - job.completed_at == pytest.approx(60, abs=5)
    (pid,) = workers.pids
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: workers.alive == 0)
    (second,) = add(store, settings_of(residual_seed=9))
    workers.wake()
    wait_for(lambda: store.get(second).status == "completed")
    (third,) = add(store, settings_of(residual_seed=10))
    workers.wake()  # not one that looks for work by itself now and then
    wait_for(lambda: store.get(third).status == "completed")
    wait_for(lambda: len(events) == 5)  # the last is said after the store knows it
    assert [event["event"] for event in events] == ["ready", "batch", "ready", "batch", "batch"]
    assert workers.restarts == 1 and events[-1]["clips"] == 1
    assert events[-1]["seconds"]["residual"] > 0 and events[-1]["process_memory_mb"] > 0
    (again,) = workers.pids
    workers.stop()
    assert workers.alive == 0 and not workers.pids
    with pytest.raises(ProcessLookupError):
        os.kill(again, 0)


def ended(pid):
    """Whether a process has ended, though nobody may have asked for its status."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_no_engine_outlives_a_killed_server(folder, store):
    """It gives back what it was at."""
    (name,) = add(store, settings_of(num_inference_steps=1000, num_frames=16))
    code = (
        "import sys, time\n"
        "from vfengine.serving.store import Store\n"
        "from vfengine.serving.workers import Workers\n"
        "workers = Workers(Store(sys.argv[1]), sys.argv[2:])\n"
        "workers.start()\n"
        "workers.wait_ready()\n"
        "print(*workers.pids, flush=True)\n"
        "time.sleep(999)\n"
    )
    argv = [sys.executable, "-c", code, str(store.folder), "--model", str(folder), *ON_CPU]
    server = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    pid = int(server.stdout.readline())
    with pytest.raises(ValueError, match="another server"):
        Workers(store).start()
    wait_for(lambda: store.get(name).progress > 0)
    server.kill()
    server.communicate()
    wait_for(lambda: ended(pid))
    job = store.get(name)
    assert (job.status, job.attempts) == ("queued", 0)
    store.hold()  # the folder is free again


# -- engines that are none, so that they start at once ---------------------------------------------

READY = {
    **{"name": "m", "kind": "plain", "labels": [], "takes_prompts": True, "width": 8, "height": 8},
    **{"num_frames": 4, "fps": 8.0, "steps": 5, "guidance_scale": 2.0, "solver": "ddim"},
    **{"solvers": ["ddim"], "base_paths": [], "base_path": None, "animates_pictures": False},
    **{"has_base": False, "least_loop": None, "max_batch": 1, "fingerprint": ""},
    **{"device": "cpu", "dtype": "float32"},
}


def stand_in(body: str) -> list[str]:
    """A command that runs this code in the place of an engine."""
    code = (
        "import json, os, signal, sys, time\n"
        "from vfengine.serving.store import Store\n"
        "store = Store(sys.argv[sys.argv.index('--store') + 1])\n"
        "worker = sys.argv[sys.argv.index('--worker') + 1]\n"
        "def say(**event): print(json.dumps(event), flush=True)\n"
        f"ready = dict(event='ready', model=json.loads({json.dumps(READY)!r}))\n"
    )
    return [sys.executable, "-c", code + body]


def test_a_model_that_cannot_be_used(store, capfd):
    """Without a stand-in: the message is the pipeline's."""
    workers = Workers(store, ["--model", str(store.folder / "none"), *ON_CPU])
    workers.start()
    assert workers.wait_ready(60) is None
    assert "none" in workers.error and workers.restarts == 0
    workers.stop()
    assert "Traceback" not in capfd.readouterr().err  # one line says it


def test_a_job_that_kills_every_engine(store, monkeypatch, capfd):
    monkeypatch.setattr(workers_module, "_BACKOFF", (0.0,))
    bad, good = add(store, settings_of(), settings_of(base_seed=9))
    body = (
        "say(**ready)\n"
        "while True:\n"
        "    for job in store.claim(worker, 2):\n"
        "        if job.settings.base_seed == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        store.finish(job.id, worker, {}, None)\n"
        "    if not sys.stdin.readline(): break\n"
    )
    workers = Workers(store, command=stand_in(body), keep=60)
    workers.start()
    wait_for(lambda: {store.get(name).status for name in (bad, good)} == {"failed", "completed"})
    job = store.get(bad)
    assert job.error["code"] == "engine_died" and job.attempts == MAX_ATTEMPTS and job.expires_at
    workers.stop()
    assert workers.restarts == MAX_ATTEMPTS
    assert "an engine ended with status -9" in capfd.readouterr().err


def test_an_engine_that_does_not_stop_is_killed(store, monkeypatch):
    monkeypatch.setattr(workers_module, "_GRACE", 0.2)
    body = "say(**ready)\nstore.claim(worker)\nsay(event='claimed')\nwhile True: time.sleep(1)\n"
    (name,) = add(store, settings_of())
    claimed = threading.Event()
    workers = Workers(
        store,
        command=stand_in(body),
        on_event=lambda event: event["event"] == "claimed" and claimed.set(),
    )
    workers.start()
    assert claimed.wait(60) and store.get(name).status == "in_progress"
    (pid,) = workers.pids
    workers.stop()
    assert store.get(name).status == "queued"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_two_engines_share_the_work(store, capfd):
    body = (
        "assert sys.argv[sys.argv.index('--threads') + 1].isdigit()\n"
        "say(**ready)\n"
        "print('no event', flush=True)\n"
        "for line in sys.stdin:\n"
        "    for job in store.claim(worker):\n"
        "        store.finish(job.id, worker, {'by': worker}, None)\n"
        "        say(event='failed', code='x')\n"
    )
    events = []
    workers = Workers(store, command=stand_in(body), count=2, on_event=events.append)
    workers.start()
    wait_for(lambda: workers.alive == 2)
    names = add(store, settings_of(), settings_of(base_seed=9))
    workers.wake()
    wait_for(lambda: all(store.get(name).status == "completed" for name in names))
    wait_for(lambda: [e["event"] for e in events].count("failed") == 2)
    assert len({store.get(name).result["by"] for name in names}) == 2
    workers.stop()
    assert "an engine said 'no event'" in capfd.readouterr().err


def test_what_expires_goes_by_itself(store, monkeypatch):
    monkeypatch.setattr(workers_module, "_HOUSEKEEPING", 0.01)
    (name,) = add(store, settings_of())
    store.claim("x")
    store.finish(name, "x", {}, time.time() + 0.05)
    workers = Workers(store, command=stand_in("say(**ready)\nsys.stdin.read()\n"))
    workers.start()
    wait_for(lambda: store.get(name) is None)
    workers.stop()


def test_engines_that_never_start(store, monkeypatch, capfd):
    monkeypatch.setattr(workers_module, "_BACKOFF", (0.0, 0.0))
    marker = store.folder / "works"
    body = (
        f"sys.exit(3) if not os.path.exists({str(marker)!r}) else say(**ready)\nsys.stdin.read()\n"
    )
    workers = Workers(store, command=stand_in(body), on_event=lambda event: event["nothing"])
    workers.start()
    wait_for(lambda: workers.error is not None)
    assert workers.error == "no engine starts: they end with status 3"
    marker.touch()
    assert workers.wait_ready(60).name == "m" and workers.error is None
    workers.stop()
    assert "KeyError: 'nothing'" in capfd.readouterr().err  # of a listener, which does no harm
    missing = Workers(store, command=[str(store.folder / "no program")])
    missing.start()
    wait_for(lambda: missing.error is not None)
    assert "no program" in missing.error
    missing.stop()
