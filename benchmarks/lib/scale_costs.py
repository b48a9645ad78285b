"""What bench_scale.py measures of the shipped model: seconds on one core, and bytes, of a clip."""

from __future__ import annotations

import json
import logging
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from vfengine import VideoFusionPipeline
from vfengine.cli.job import prepare, teller
from vfengine.cli.output import Job, Record, json_line
from vfengine.cli.settings import line_settings, read_settings
from vfengine.files import replacing
from vfengine.media.video import write_video
from vfengine.pipelines.clip_settings import clip_settings, settings_text
from vfengine.pipelines.request import SamplingRequest
from vfengine.pipelines.videofusion import to_uint8

AHEAD = 3  # clips in flight for each worker, as with --ray
STORE = 80 * 2**20  # bytes of a local node's object store


@dataclass(frozen=True)
class Measured:
    """Of a clip: seconds of a core, and bytes."""

    base: float
    residual: float
    driver: float
    path_bytes: float
    clip_bytes: float
    order_bytes: float


def measure(rounds: int = 5, calls: int = 200) -> Measured:
    """Of the shipped model, on one core of this machine; medians.

    Seconds are this process's own, all threads together, so that neighbours count little.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _measured(Path(folder), rounds, calls)
    finally:
        torch.set_num_threads(threads)


def _measured(folder: Path, rounds: int, calls: int) -> Measured:
    pipe = VideoFusionPipeline.from_pretrained(device="cpu")
    pipe.keep_parts()
    base, residual = [], []
    prompts = [f"{one} {other}" for one in pipe.config.prompts for other in pipe.config.prompts]
    for prompt in prompts[: rounds + 1]:  # a new one each: its rows are not known yet
        request = SamplingRequest(prompt=prompt, offload_base=False)
        started = time.process_time()
        path = pipe.walk_base(prompt=prompt)
        walked = time.process_time()
        out = pipe(prompt=prompt, offload_base=False, trajectory=path)
        record = settings_text(clip_settings(pipe, request))
        file = folder / "clip.mp4"
        write_video(file, to_uint8(out.frames)[0], pipe.config.fps, metadata=record)
        base.append(walked - started)
        residual.append(time.process_time() - walked)
    order = len(pickle.dumps(request)) + len(record)
    clip = file.read_bytes()
    checks = _checking(pipe, folder, clip, max(calls // 4, 1))
    path_bytes = len(pickle.dumps(path))
    carries = _carrying(path_bytes, len(clip), calls)
    return Measured(
        base=statistics.median(base[1:]),  # the first reads the weights
        residual=statistics.median(residual[1:]),
        driver=checks + carries,
        path_bytes=path_bytes,
        clip_bytes=len(clip),
        order_bytes=order,
    )


def _checking(pipe: VideoFusionPipeline, folder: Path, clip: bytes, calls: int) -> float:
    """Seconds in which a line is checked, its clip written and told; median."""
    command = read_settings(["--prompts", "-", "--output", str(folder / "{index}.mp4")])
    seconds = []
    for k in range(calls):
        started = time.process_time()
        entries = {"label": pipe.labels[k % len(pipe.labels)], "output": str(folder / f"{k}.mp4")}
        settings = line_settings(command, entries, k)
        task = prepare(settings, pipe)
        job = Job(task.settings, pipe, pipe.fill_defaults(task.request, True))
        pickle.dumps((job.request, teller(job)(0)))
        with replacing(task.targets[0]) as file:
            file.write_bytes(clip)
        record = Record(started, list(task.targets), {"base": 0.0, "total": 0.0})
        json.dumps(json_line(job, record))
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def _carrying(path_bytes: int, clip_bytes: int, calls: int) -> float:
    """Seconds in which Ray calls both workers for a clip, and gets its file; they do no work."""
    import ray

    class Base:
        def walk(self) -> bytes:
            return bytes(path_bytes)

    class Residual:
        def follow(self, path: bytes) -> bytes:
            return bytes(clip_bytes)

    with local_cluster(1, cpus=2) as address:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            walker, follower = (ray.remote(kind).remote() for kind in (Base, Residual))
            waiting, started = [], 0.0
            for k in range(calls + 2 * AHEAD):
                if k == 2 * AHEAD:  # the workers are there
                    started = time.process_time()
                waiting.append(follower.follow.remote(walker.walk.remote()))
                if len(waiting) > 2 * AHEAD:
                    ray.get(waiting.pop(0))
            ray.get(waiting)
            return (time.process_time() - started) / calls
        finally:
            ray.shutdown()


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets variables of the environment, which processes that are started inherit."""
    former = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(former)


@contextmanager
def local_cluster(nodes: int, cpus: int = 1) -> Iterator[str]:
    """The address of a Ray cluster of so many nodes, all of them on this machine."""
    from ray.cluster_utils import Cluster

    own = {"num_cpus": cpus, "object_store_memory": STORE}
    tempfile.gettempdir()  # is kept from its first call on: not the folder of a cluster that ends
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as files,
        environment(TMPDIR=files, RAY_TMPDIR=files, RAY_USAGE_STATS_ENABLED="0"),
    ):
        head = {**own, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(nodes - 1):
                cluster.add_node(**own)
            yield cluster.address
        finally:
            cluster.shutdown()


def read_measured(file: Path) -> Measured:
    """Measured figures from a file of their own, or of --json; ValueError for anything else."""
    names = [field.name for field in fields(Measured)]
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    content = content.get("measured", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or content.keys() != set(names):
        raise ValueError(f"{file}: expected an object of {', '.join(names)}")
    for name, value in content.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{file}: {name} must be a number above 0, got {value!r}")
    return Measured(**content)
