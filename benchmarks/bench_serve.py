"""A server under load: 200 clips for 16 clients, and what the server costs beside one pipeline.

`python -m vfengine.serve` runs in a process of its own, its engine in another. Each client sends a
request, asks for the video until it is done, and fetches it, its thumbnail and its sheet of frames.
A third of the requests are remixes of the video before, and some looks are asked for twice. All
but the polls go through the openai client. Polls go through http.client: a GET is timed from its
request to its answer, while the engine makes clips, on the same cores.

The checks come first: none lost, none done twice, all decode, all frames are the pipeline's own.

Memory     of both processes after the 20th clip and at the end, and by how much that differs
Throughput clips a second from the first request to the last file that was fetched
Alone      the same requests by one pipeline in one process, each clip written as a video
Over alone seconds a clip through the server, over seconds a clip alone. In so few steps all else
           is far more of a clip than in the usual 50
CPU        seconds of cores a clip, by process; those of the clients slow the server as well

Under pytest it is 24 clips of 4 clients; with --short, 2 of 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import av
import numpy as np
import openai
from lib.harness import Row, Target, main, say, table, verdicts

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "tools"))
from server_process import ServerProcess, ask, cpu_seconds, resident

from vfengine.media.pictures import to_uint8
from vfengine.media.video import write_video
from vfengine.pipelines.load import load_pipeline
from vfengine.pipelines.together import keep_networks, sample_together
from vfengine.serving.frames import read_sheet
from vfengine.serving.jobs import SPRITESHEET
from vfengine.serving.making import Maker
from vfengine.serving.store import Store

SERVER, ALONE, POLL = "server", "one pipeline", 0.25  # seconds between two polls of a client
WARM = 20  # clips after which memory is to stay as it is


@dataclass(frozen=True)
class Plan:
    clips: int = 200
    clients: int = 16
    steps: int = 2
    model: str | None = None

    @property
    def case(self) -> str:
        return f"{self.clips} clips, {self.clients} clients, {self.steps} steps"


FULL, REDUCED, LEAST = Plan(), Plan(24, 4), Plan(2, 1)
TARGETS = [
    Target(FULL.case, SERVER, "GET p95", 50, at_most=True),
    Target(FULL.case, SERVER, "server changed", 5, at_most=True),
    Target(FULL.case, SERVER, "engine changed", 5, at_most=True),
    Target(FULL.case, SERVER, "over alone", 1.15, at_most=True),
]


@dataclass
class Load:
    """What clients did and saw."""

    videos: list[str] = field(default_factory=list)
    gets: list[float] = field(default_factory=list)  # seconds
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)


def client(server: ServerProcess, load: Load, number: int, plan: Plan) -> None:
    """Makes its share of the clips, one after the other."""
    api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2)
    connection, last = server.connect(), None
    try:
        labels = ask(connection, "GET", "/v1/models").json["data"][0]["labels"] or ["a walk"]
        for k in range(number, plan.clips, plan.clients):
            prompt = labels[k % len(labels)]
            if last is not None and k // plan.clients % 3 == 1:
                video = api.videos.remix(last, prompt=prompt, extra_body={"seed": k})
            else:
                seeds = {"base_seed": k % 150, "residual_seed": k}  # the last 50 looks were seen
                more = {"num_inference_steps": plan.steps, **seeds}
                video = api.videos.create(prompt=prompt, extra_body=more)
            load.videos.append(video.id)
            status = video.status
            while status in ("queued", "in_progress"):
                time.sleep(POLL)
                began = time.perf_counter()
                answer = ask(connection, "GET", f"/v1/videos/{video.id}")
                load.gets.append(time.perf_counter() - began)
                status = answer.json["status"]
            if k % 5 == 0:
                assert video.id in {one.id for one in api.videos.list(limit=100).data}
            for variant in ("video", "thumbnail", "spritesheet"):
                data = api.videos.download_content(video.id, variant=variant).read()
                load.files[video.id, variant] = data
            last = video.id
    except BaseException as error:
        load.errors.append(error)
    finally:
        connection.close()
        api.close()


@dataclass
class Watched:
    """Memory of the server and its engine, and clips that were done, over time."""

    server: list[float] = field(default_factory=list)
    engine: list[float] = field(default_factory=list)
    done: list[int] = field(default_factory=list)

    def watch(
        self, server: ServerProcess, engine: int, store: Store, over: threading.Event
    ) -> None:
        while not over.wait(0.1):
            self.done.append(store.count("completed"))
            self.server.append(resident(server.process.pid))
            self.engine.append(resident(engine))

    def between(self, values: list[float], first: int, last: int) -> float:
        """The mean while so many clips were done."""
        found = [v for v, n in zip(values, self.done, strict=True) if first <= n <= last]
        return statistics.mean(found or values[-1:])


def measure(plan: Plan = FULL) -> list[Row]:
    warnings.filterwarnings("ignore", ".*Sora API.*", DeprecationWarning)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = [] if plan.model is None else ["--model", plan.model]
        server = ServerProcess(folder / "store", folder / "log", *model)
        server.start()
        store = Store(folder / "store")
        try:
            rows, load = under_load(server, store, plan)
        finally:
            status = server.stop()
        if status != 0 or "Traceback" in server.log.read_text():
            raise RuntimeError(f"the server ended with {status}: {server.log.read_text()[-2000:]}")
        checked(store, load, plan)
        say("one pipeline makes the same clips")
        rows += alone(store, load, folder, plan, rows)
        store.close()
    return rows


def under_load(server: ServerProcess, store: Store, plan: Plan) -> tuple[list[Row], Load]:
    (engine,), load, watched, over = server.engines(), Load(), Watched(), threading.Event()
    pids = {"server": server.process.pid, "engine": engine}
    before = {name: cpu_seconds(pid) for name, pid in pids.items()} | {
        "clients": time.process_time()
    }
    watcher = threading.Thread(target=watched.watch, args=(server, engine, store, over))
    watcher.start()
    clients = [
        threading.Thread(target=client, args=(server, load, number, plan))
        for number in range(plan.clients)
    ]
    began = time.perf_counter()
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    seconds = time.perf_counter() - began
    over.set()
    watcher.join()
    if load.errors:
        raise RuntimeError(f"{len(load.errors)} clients failed") from load.errors[0]
    after = {name: cpu_seconds(pid) for name, pid in pids.items()} | {
        "clients": time.process_time()
    }

    def row(metric: str, value: float, unit: str) -> Row:
        return Row(plan.case, SERVER, metric, value, unit)

    cuts = statistics.quantiles(load.gets, n=100, method="inclusive") if len(load.gets) > 1 else []
    rows = [row("throughput", plan.clips / seconds, "clips/s")]
    rows += [row(f"GET p{p}", 1e3 * cuts[p - 1], "ms") for p in (50, 95, 99) if cuts]
    rows += [row("GETs", len(load.gets), "")]
    for name in pids:
        values = getattr(watched, name)
        first = watched.between(values, WARM, WARM + 10)
        last = watched.between(values, plan.clips - 10, plan.clips)
        rows += [
            row(f"{name} at clip {WARM}", first, "MiB"),
            row(f"{name} at the end", last, "MiB"),
            row(f"{name} changed", max(100 * abs(last / first - 1), 0.01), "%"),
        ]
    for name, value in after.items():
        rows.append(row(f"CPU {name}", (value - before[name]) / plan.clips, "s/clip"))
    page = ask(server.connect(), "GET", "/metrics").body.decode()
    for how in ("walked", "found"):
        line = f'vfengine_base_paths_total{{how="{how}"}} '
        rows.append(row(f"paths {how}", float(page.partition(line)[2].split()[0]), ""))
    clips = float(page.partition("\nvfengine_clips_total ")[2].split()[0])
    if clips != plan.clips:
        raise RuntimeError(f"the engine made {clips:g} clips of {plan.clips}")
    return rows, load


def checked(store: Store, load: Load, plan: Plan) -> None:
    """RuntimeError for a request that was lost, done twice, or has no clip."""
    jobs, _ = store.list(limit=plan.clips + 100)
    if len(load.videos) != plan.clips or {job.id for job in jobs} != set(load.videos):
        raise RuntimeError(f"{len(load.videos)} videos were asked for, the store has {len(jobs)}")
    for job in jobs:
        if (job.status, job.attempts) != ("completed", 1):
            raise RuntimeError(f"not made at once: {job}")
        file = store.file(job.id, job.settings.video_file)
        if load.files[job.id, "video"] != file.read_bytes():
            raise RuntimeError(f"{job.id}: other bytes were sent")
        with av.open(str(file)) as video:
            frames = sum(1 for _ in video.decode(video=0))
        if frames != job.settings.num_frames:
            raise RuntimeError(f"{job.id}: {frames} frames, expected {job.settings.num_frames}")


def alone(store: Store, load: Load, folder: Path, plan: Plan, served: list[Row]) -> list[Row]:
    """The same requests, in the same order, by one pipeline; the frames must be those served."""
    pipe = load_pipeline(plan.model)
    keep_networks(pipe)
    jobs = store.list(limit=plan.clips, order="asc")[0]
    maker = Maker(pipe, store, "none", None, threading.Event())
    prepared = [maker.prepared(job) for job in jobs]
    clips, began, cpu = [], time.perf_counter(), time.process_time()
    for one in prepared:
        looks = [one.look or one.request]
        (made,) = sample_together(pipe, [one.request], looks=looks, base_cache=folder / "paths")
        clips.append(to_uint8(made.frames[0]))
        write_video(folder / "clip.mp4", clips[-1], one.job.settings.fps)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    for job, clip in zip(jobs, clips, strict=True):
        if not np.array_equal(read_sheet(store.file(job.id, SPRITESHEET)).frames, clip):
            raise RuntimeError(f"{job.id}: other frames than the pipeline's own")
    throughput = next(row.value for row in served if row.metric == "throughput")
    return [
        Row(plan.case, ALONE, "throughput", plan.clips / seconds, "clips/s"),
        Row(plan.case, ALONE, "CPU engine", cpu / plan.clips, "s/clip"),
        Row(plan.case, SERVER, "over alone", plan.clips / throughput / seconds, "x"),
        Row(plan.case, SERVER, "overhead", 1 / throughput - seconds / plan.clips, "s"),
    ]


def bench_serve(benchmark, capsys, short):
    plan = LEAST if short else REDUCED
    rows = benchmark.pedantic(measure, kwargs={"plan": plan}, rounds=1)
    benchmark.extra_info["rows"] = [vars(row) for row in rows]
    with capsys.disabled():
        print(f"\n{table(rows)}\n{verdicts(rows, TARGETS)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", help="folder of a model; the shipped one unless given")
    parser.add_argument("--clips", type=int, default=FULL.clips)
    parser.add_argument("--clients", type=int, default=FULL.clients)
    parser.add_argument("--num-inference-steps", type=int, default=FULL.steps)
    flags = parser.parse_known_args()[0]
    plan = Plan(flags.clips, flags.clients, flags.num_inference_steps, flags.model)
    targets = [
        Target(plan.case, target.contender, target.metric, target.value, at_most=True)
        for target in TARGETS
    ]
    main(partial(measure, plan), __doc__, targets, parser)
