"""generate --prompts FILE --ray: the bytes of one machine, on two nodes, whatever is lost."""

import json
import os
import threading
from pathlib import Path

import pytest
from command_line import refused
from ray_cluster import cluster, kill, start_cluster, workers_of
from server_process import until

from vfengine.cli.generate import main

LINES = [
    {"label": "walk"},
    {"label": "jump", "num_videos": 3, "batch_size": 2},
    {"label": "walk", "num_residuals": 2},
    {"label": "jump", "preview": True},
    {"label": "walk", "base_path": "clean", "num_frames": 6},
    {"label": "jump", "solver": "dpmsolver++", "eta": 0.0, "sample_offset": 4},
    {"label": "walk", "image": "picture.png"},
    {"label": "walk", "fps": 12, "scale": 2, "codec": "ffv1", "output": "{index}.mkv"},
]


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def files_in(folder):
    return {name: (Path(folder) / name).read_bytes() for name in sorted(os.listdir(folder))}


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
    lines = [dict(line) for line in LINES]
    lines[6]["image"] = str(picture[0])
    lines += [{"label": "fly"}, {"lable": "walk"}]
    local, ray = both(lines, "--seed", 3, ray=("--ray", cluster.address))
    assert local[0] == ray[0] == 1
    assert sorted(local[2].splitlines()) == sorted(ray[2].splitlines())
    by_index = sorted(ray[1], key=lambda line: line["index"])
    assert [line["index"] for line in by_index] == list(range(len(lines)))
    for one, other in zip(local[1], by_index, strict=True):
        assert told(one) == told(other)
        if "error" not in one:
            assert one["timings"].keys() == other["timings"].keys()
            assert other["timings"]["residual"] > 0 or "preview" in lines[one["index"]]
