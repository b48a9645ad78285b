"""generate --prompts FILE --ray: the bytes of one machine, on two nodes, whatever is lost."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import refused
from latent_models import save_latent_model
from ray_cluster import kill, running_cluster, workers_of
from server_process import until

from vfengine.cli.generate import main
from vfengine.cluster import connect, model
from vfengine.cluster.model import Source
from vfengine.cluster.sizes import Needs, check_free, sizes

LINES = [
    {"label": "walk"},
    {"label": "jump", "num_videos": 3, "batch_size": 2},
    {"label": "walk", "num_residuals": 2},
    {"label": "jump", "preview": True},
    {"label": "walk", "base_path": "clean", "num_frames": 6},
    {"label": "jump", "solver": "dpmsolver++", "eta": 0.0, "sample_offset": 4},
    {"label": "walk", "fps": 12, "scale": 2, "codec": "ffv1", "output": "{index}.mkv"},
]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of a core each."""
    with running_cluster() as found:
        yield found


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def files_in(folder):
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def both(cli, tmp_path, monkeypatch):
    """Runs lines on one machine and on Ray; the JSON lines of both, whose files are equal."""

    def run(lines, *argv, model=None, ray=("--ray",), meanwhile=None):
        options = {} if model is None else {"model": model}
        found = []
        for name, more in (("local", ()), ("ray", ray)):
            folder = tmp_path / name
            folder.mkdir()
            monkeypatch.chdir(folder)
            Path("lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
            if more and meanwhile is not None:
                thread = threading.Thread(target=meanwhile, args=(folder,))
                thread.start()
            flags = ("--prompts", "lines.jsonl", "--output", "{index}.webp", *argv, *more)
            status, out, err = cli(*flags, **options)
            if more and meanwhile is not None:
                thread.join()
            found.append((status, lines_of(out), err))

        assert files_in(tmp_path / "local") == files_in(tmp_path / "ray")
        return found

    return run


def told(line):
    """What a line of JSON says that does not depend on time and place."""
    return {
        name: value
        for name, value in line.items()
        if name not in ("timings", "peak_memory", "threads")
    }


def test_lines_on_two_nodes_have_the_bytes_of_one_machine(cluster, both, picture, tmp_path):
    path = {"label": "jump", "base_trajectory": "path.safetensors", "num_videos": 2}
    lines = [
        *LINES,
        {"label": "walk", "image": str(picture[0])},
        {"label": "walk", "base_seed": 5, "base_cache": str(tmp_path / "paths")},
        path,
        {**path, "num_videos": 1, "base_offset": 1, "residual_seed": 9},  # follows the one before
        {"label": "fly"},
        {"lable": "walk"},
    ]
    local, ray = both(lines, "--seed", 3, ray=("--ray", cluster.address))
    assert local[0] == ray[0] == 1
    assert sorted(local[2].splitlines()) == sorted(ray[2].splitlines())
    by_index = sorted(ray[1], key=lambda line: line["index"])
    assert [line["index"] for line in by_index] == list(range(len(lines)))
    cached = len(LINES) + 1  # on one machine it was walked, and now found
    assert local[1][cached]["base_cache_hit"] is False
    assert by_index[cached]["base_cache_hit"] is True
    assert by_index[cached]["timings"]["base"] == 0.0
    local[1][cached]["base_cache_hit"] = True
    for one, other in zip(local[1], by_index, strict=True):
        assert told(one) == told(other)
        if "error" not in one:
            assert one["timings"].keys() == other["timings"].keys()


def test_base_paths_that_workers_walk_are_kept(cluster, both):
    """In a cache of its own, each batch's under the name that it has on one machine."""
    line = {"label": "walk", "num_videos": 3, "batch_size": 2, "base_cache": "paths"}
    both([line, {**line, "residual_seed": 7}], ray=("--ray", cluster.address))


def test_a_model_that_a_machine_has_not_is_sent_there(cluster, both, tmp_path, monkeypatch):
    folder = save_latent_model(tmp_path / "latent")
    source = Source.of(folder)
    moved = replace(source, path=str(tmp_path / "elsewhere" / "latent"))
    assert source.here() == folder and moved.here() is None
    monkeypatch.setattr(Source, "of", lambda path: moved)
    monkeypatch.setattr(Source, "read", lambda self, name: (folder / name).read_bytes())
    lines = [{"prompt": "a person in red"}, {"prompt": "jumping", "negative_prompt": "blue"}]
    both(lines, model=folder, ray=("--ray", cluster.address))
    (sent,) = (cluster.temporary / f"vfengine-models-{os.getuid()}").iterdir()
    assert dict(model._told(sent / "latent")) == source.files
    assert stat.S_IMODE(sent.parent.stat().st_mode) == 0o700


def test_plain_models_have_no_base_workers(cluster, both, tiny_video_checkpoint, cli):
    argv = {"model": tiny_video_checkpoint, "ray": ("--ray", cluster.address)}
    both([{"label": "walk", "num_videos": 2}], **argv)
    flags = ("--ray", cluster.address, "--base-workers", 1)
    Path("lines").write_text("walk")
    ended = cli("--prompts", "lines", *flags, model=tiny_video_checkpoint)
    assert refused(ended, "--base-workers 1: this model has no base network")


def test_lines_of_a_stream_are_told_before_it_ends(cluster, tiny_checkpoint, tmp_path):
    """The second line is written once the first one's result has been read."""
    argv = [sys.executable, "-m", "vfengine.generate", "--prompts", "-", "--ray", cluster.address]
    argv += ["--model", str(tiny_checkpoint), "--device", "cpu", "--num-inference-steps", "4"]
    argv += ["--resume"]
    (tmp_path / "0002-walk.mp4").touch()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    with subprocess.Popen(argv, **pipes) as process:
        for index, label in enumerate(("walk", "jump", "walk")):
            process.stdin.write(f"{label}\n")
            process.stdin.flush()
            line = json.loads(process.stdout.readline())
            assert line["files"] == [f"{index:04d}-{label}.mp4"]
            assert line.get("skipped", False) is (index == 2)
        process.stdin.close()
        assert process.stdout.read() == ""
    assert process.returncode == 0


# -- what is lost ----------------------------------------------------------------------------------

MANY = [{"label": ("walk", "jump")[k % 2], "num_frames": 24} for k in range(24)]


def test_workers_that_are_killed_lose_nothing(cluster, both):
    def meanwhile(folder):
        for count, kind in ((1, "ResidualWorker"), (5, "BaseWorker"), (9, "ResidualWorker")):
            until(lambda count=count: len(list(folder.glob("*.webp"))) >= count, f"clip {count}")
            until(lambda kind=kind: workers_of(cluster, kind), kind)
            kill(workers_of(cluster, kind)[0])

    argv = {"ray": ("--ray", cluster.address), "meanwhile": meanwhile}
    local, ray = both(MANY, **argv)
    assert local[0] == ray[0] == 0
    assert sorted(line["index"] for line in ray[1]) == list(range(len(MANY)))


def test_a_node_that_is_killed_loses_nothing(both):
    """With what lay on it; its worker finds no other place, and the run goes on with the rest."""
    with running_cluster() as own:

        def meanwhile(folder):
            until(lambda: list(folder.glob("*.webp")), "a clip")
            (other,) = own.worker_nodes
            own.remove_node(other, allow_graceful=False)

        argv = {"ray": ("--ray", own.address), "meanwhile": meanwhile}
        local, ray = both(MANY, **argv)
    assert local[0] == ray[0] == 0
    assert sorted(line["index"] for line in ray[1]) == list(range(len(MANY)))


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def lines_file(cli):
    """The cli in a folder with a file of a line."""
    Path("lines").write_text("walk")
    return cli


def test_ray_needs_its_package(lines_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = lines_file("--prompts", "lines", "--ray")
    assert refused(ended, "--ray needs ray, which pip install '.[ray]' brings")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--label", "walk", "--ray"], ["--ray needs --prompts"]),
        (["--base-workers", "2"], ["--base-workers 2 needs --ray"]),
        (["--residual-workers", "2"], ["--residual-workers 2 needs --ray"]),
        (["--ray", "--base-workers", "0"], ["--base-workers", "from 1 to 10000, got '0'"]),
        (["--ray", "--residual-workers", "-1"], ["--residual-workers", "'-1'"]),
        (["--ray", "--overlap-phases"], ["--ray cannot go with --overlap-phases"]),
        (["--ray", "--offload-base"], ["--ray cannot go with --offload-base"]),
        (["--ray", "--dry-run"], ["--ray cannot go with --dry-run"]),
        (["--ray", "--base-device", "cpu"], ["--ray cannot go with --base-device"]),
        (["--ray", "--residual-device", "cpu"], ["--ray cannot go with --residual-device"]),
        (["--ray", "here"], ["--ray here: expected local, auto, HOST:PORT"]),
        (["--ray", "ray://"], ["--ray ray://: expected local"]),
        (["--ray", "host:0"], ["--ray host:0: expected local"]),
    ],
)
def test_flags_that_ray_does_not_go_with(lines_file, argv, words):
    prompts = [] if "--label" in argv else ["--prompts", "lines"]
    assert refused(lines_file(*prompts, *argv), *words)


def test_ray_gives_each_worker_its_gpu(tiny_checkpoint, capsys, tmp_path):
    (tmp_path / "lines").write_text("walk")
    argv = ["--model", str(tiny_checkpoint), "--prompts", str(tmp_path / "lines")]
    status = main([*argv, "--ray", "--device", "cuda:1"])
    out, err = capsys.readouterr()
    assert refused((status, out, err), "--device cuda:1 cannot go with --ray", "--device cuda")


def test_an_address_where_nobody_answers(lines_file):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        ended = lines_file("--prompts", "lines", "--ray", address)
    assert refused(ended, f"--ray {address}: no cluster answers")


def test_an_address_of_another_server(lines_file):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        ended = lines_file("--prompts", "lines", "--ray", address)
    assert refused(ended, f"--ray {address}: what answers there is no cluster")


def test_a_cluster_of_another_version(cluster, lines_file, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "__version__", "2.0.0")
    ended = lines_file("--prompts", "lines", "--ray", cluster.address)
    assert refused(ended, f"--ray {cluster.address}: Version mismatch", "2.0.0")


def test_more_workers_than_the_cluster_holds(cluster, lines_file):
    ended = lines_file("--prompts", "lines", "--ray", cluster.address, "--residual-workers", 3)
    assert refused(ended, "--residual-workers 3: the cluster has 2 CPU cores, on 2 machines")


def test_a_cluster_that_others_use(cluster, lines_file):
    with connect.connected(cluster.address):
        import ray

        group = ray.util.placement_group([{"CPU": 1}] * 2)
        ray.get(group.ready())
        with pytest.raises(ValueError, match="need 1 of CPU, but only 0 are free: others use"):
            found = sizes([{"CPU": 1, "memory": 8e9}], Needs(1, 1, 0.1))
            check_free([found.base, found.residual], connect.free())
