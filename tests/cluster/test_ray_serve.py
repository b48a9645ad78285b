"""serve --ray: the same API and the same bytes from engines on two nodes, whatever is lost."""

import dataclasses
import sys
from pathlib import Path

import pytest
from command_line import refused
from ray_cluster import kill, running_cluster, workers_of
from server_process import ServerProcess, ask, until
from serving_engines import engine_of, run_all
from serving_jobs import add, files_of, settings_of

from vfengine.cli import serve
from vfengine.cluster.desk import Desk
from vfengine.cluster.sizes import engines
from vfengine.serving.engine import Engine
from vfengine.serving.store import Store

FLAGS = ("--device", "cpu", "--dtype", "float32")
REPLICA = "ServeReplica:"


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of a core each."""
    with running_cluster() as found:
        yield found


def of_one_machine(model, store, settings):
    """The files of jobs that an engine of this process makes, in order."""
    names = add(store, *settings)
    run_all(engine_of(model, store))
    return [files_of(store, name) for name in names]


def test_jobs_of_a_server_on_two_nodes(cluster, tiny_checkpoint, tmp_path, store):
    """Jobs that waited, one that is deleted, and an engine that is killed: the same files."""
    changes = [{}, {"label": "jump"}, {"residual_seed": 9}, {"scale": 2, "format": "mp4"}]
    changes += [{"base_seed": seed, "num_frames": 16} for seed in range(20, 26)]
    settings = [settings_of(**change) for change in changes]
    expected = of_one_machine(tiny_checkpoint, store, settings)
    folder = tmp_path / "server"
    waiting = Store(folder)
    names = add(waiting, *settings)
    flags = ("--model", tiny_checkpoint, *FLAGS, "--ray", cluster.address, "--workers", 2)
    server = ServerProcess(folder, tmp_path / "log", *flags)
    server.start()
    try:
        until(lambda: waiting.count("completed") >= 2, "two clips")
        kill(workers_of(cluster, REPLICA)[0])
        until(lambda: not waiting.count("queued") and not waiting.count("in_progress"), "all")
        assert [waiting.get(name).status for name in names] == ["completed"] * len(names)
        for name, files in zip(names, expected, strict=True):
            assert files_of(waiting, name) == files
        connection = server.connect()
        until(lambda: ask(connection, "GET", "/health").json["engines"] == 2, "both engines")
        long = {"prompt": "walk", "num_inference_steps": 200, "seconds": "2"}
        made = ask(connection, "POST", "/v1/videos", long).json
        url = f"/v1/videos/{made['id']}"
        until(lambda: ask(connection, "GET", url).json["progress"] > 0, "progress")
        assert ask(connection, "DELETE", url).status == 200
        again = {"prompt": "walk", "num_inference_steps": 3, "seconds": "0.5", "seed": 5}
        video = ask(connection, "POST", "/v1/videos", again).json
        url = f"/v1/videos/{video['id']}"
        until(lambda: ask(connection, "GET", url).json["status"] == "completed", "a clip")
        assert ask(connection, "GET", f"{url}/content?variant=thumbnail").body[1:4] == b"PNG"
        page = ask(connection, "GET", "/metrics").body.decode()
        assert f"vfengine_clips_total {len(names) + 1:.1f}" in page
        connection.close()
    finally:
        status = server.stop()
        waiting.close()
    assert status == 0 and "Traceback" not in server.log.read_text()
    until(lambda: not workers_of(cluster, REPLICA), "the end of the engines")


def test_a_model_that_engines_on_ray_cannot_use(cluster, tmp_path):
    (tmp_path / "none").mkdir()
    flags = ("--model", tmp_path / "none", *FLAGS, "--ray", cluster.address)
    server = ServerProcess(tmp_path / "store", tmp_path / "log", *flags)
    server.launch()
    assert server.process.wait(120) == 2
    last = server.log.read_text().splitlines()[-1]
    assert last.startswith("vfengine.serve: error: ") and "none" in last


# -- a desk, without a cluster ---------------------------------------------------------------------


def test_an_engine_works_on_a_desk_as_on_a_store(tiny_checkpoint, store, tmp_path, picture):
    """A picture travels there; the files, thumbnails and failures come back as events."""
    settings = [settings_of(), settings_of(picture=True), settings_of(label="fly")]
    names = add(store, *settings)
    for name in names:
        store.folder_of(name).mkdir(parents=True, exist_ok=True)
    store.file(names[1], "upload").write_bytes(Path(picture[0]).read_bytes())
    jobs = [store.get(name) for name in names]
    files = {(names[1], "upload"): store.file(names[1], "upload").read_bytes()}
    run_all(engine_of(tiny_checkpoint, store))
    events = []
    desk = Desk(tmp_path / "desk", events.append)
    engine = Engine(engine_of(tiny_checkpoint, store).maker.pipe, desk)
    for job in jobs:
        desk.lay([job], files if job.id == names[1] else {})
        engine.run_once()
    finished = {event[1]: event[3] for event in events if event[0] == "finish"}
    failed = {event[1]: event[2] for event in events if event[0] == "fail"}
    shown = {event[1]: event[4] for event in events if event[0] == "report" and event[4]}
    for name, job in zip(names, map(store.get, names), strict=True):
        if job.status == "failed":
            assert failed[name] == job.error["code"]
            continue
        on_store = {n: c for n, c in files_of(store, name).items() if n != "upload"}
        assert finished[name] == on_store and shown[name] == on_store["thumbnail.png"]
    assert failed and finished


def test_a_batch_that_nobody_wants_ends_at_its_next_step(tiny_checkpoint, store, tmp_path):
    (name,) = add(store, settings_of(num_inference_steps=500))
    events = []

    def tell(event):
        events.append(event)
        if event[0] == "report" and event[2] == "residual":
            desk.drop()

    desk = Desk(tmp_path / "desk", tell)
    desk.lay([store.get(name)], {})
    engine = Engine(engine_of(tiny_checkpoint, store).maker.pipe, desk)
    assert engine.run_once() and not engine.run_once()
    assert events and all(event[0] == "report" for event in events)


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def serve_cli(tiny_checkpoint, tmp_path, capsys):
    """Runs vfengine.serve in this process: (status, stdout, stderr)."""

    def run(*argv):
        fixed = ["--model", str(tiny_checkpoint), "--store", str(tmp_path / "store"), "--port", "0"]
        status = serve.main([*fixed, *map(str, argv)])
        out, err = capsys.readouterr()
        return status, out, err.replace("vfengine.serve: ", "vfengine.generate: ")

    return run


def test_engines_on_ray_need_its_package(serve_cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refused(serve_cli("--ray"), "--ray needs ray, which pip install '.[ray]' brings")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--ray", "nowhere"], ["--ray nowhere: expected local, auto, HOST:PORT"]),
        (["--ray", "127.0.0.1:1"], ["--ray 127.0.0.1:1: no cluster answers"]),
        (["--ray", "--device", "cuda:1"], ["--device cuda:1 cannot go with --ray"]),
        (["--ray", "--base-device", "cpu"], ["--base-device cannot go with --ray"]),
        (["--ray", "--residual-device", "cpu"], ["--residual-device cannot go with --ray"]),
    ],
)
def test_flags_of_a_server_that_ray_does_not_go_with(serve_cli, argv, words):
    assert refused(serve_cli(*argv), *words)


def test_more_engines_than_a_cluster_holds(cluster, serve_cli):
    ended = serve_cli("--ray", cluster.address, "--workers", 3, "--dtype", "float32", "--quiet")
    assert refused(ended, "--workers 3: the cluster has 2 CPU cores, on 2 machines")


def test_sizes_of_engines():
    nodes = [{"CPU": 8, "GPU": 1}, {"CPU": 4}]
    assert dataclasses.astuple(engines(nodes, 3, False)) == (3, 4, {"num_cpus": 4})
    assert dataclasses.astuple(engines(nodes, 1, True)) == (1, 1, {"num_gpus": 1, "num_cpus": 1})
    with pytest.raises(ValueError, match="--workers 2: the cluster has 1 GPUs, on 2 machines"):
        engines(nodes, 2, True)
