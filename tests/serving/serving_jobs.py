"""Jobs for tests of the server, of tiny models. Nothing here imports torch."""

import json
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np

from vfengine.serving.frames import read_sheet
from vfengine.serving.jobs import SPRITESHEET, Job, JobSettings, new_id
from vfengine.serving.store import Store

STEPS = 3


def settings_of(**changes) -> JobSettings:
    """A clip of a tiny model: 4 frames, as webp, which is lossless."""
    values = {
        "num_frames": 4,
        "num_inference_steps": STEPS,
        "guidance_scale": 2.0,
        "base_seed": 5,
        "residual_seed": 6,
        "fps": 8.0,
        "format": "webp",
    }
    if not changes.keys() & {"label", "prompt"}:
        values["label"] = "walk"
    return JobSettings(**{**values, **changes})


def job_of(settings: JobSettings | None = None, **values) -> Job:
    settings = settings_of() if settings is None else settings
    seconds = f"{settings.num_frames / settings.fps:g}"
    plain = {"id": new_id(), "model": "tiny", "seconds": seconds, "size": "16x16"}
    return Job(settings=settings, **{**plain, "created_at": time.time(), **values})


def add(store: Store, *many: JobSettings) -> list[str]:
    """Queues a job of each of these settings, and returns the ids."""
    return [store.add(job_of(settings), max_queue=1000).id for settings in many]


def put(store, name, source, file):
    """Gives a file to a job that waits."""
    target = store.file(name, file)
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(source)


def files_of(store: Store, job_id: str) -> dict[str, bytes]:
    """The files of a job, by name."""
    folder = store.folder_of(job_id)
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.is_dir() else {}


def frames_of(store: Store, job_id: str) -> np.ndarray:
    """A finished clip's frames, exact."""
    assert store.get(job_id).status == "completed", store.get(job_id)
    return read_sheet(store.file(job_id, SPRITESHEET)).frames


# -- in processes of their own ---------------------------------------------------------------------


def send(folder: Path, count: int) -> None:
    """Queues so many jobs."""
    store = Store(folder)
    add(store, *[settings_of(base_seed=seed) for seed in range(count)])


def work(folder: Path, worker: str, out: Path, sent: Event) -> None:
    """Finishes jobs, without making them, until all that were sent are claimed; writes down which.

    sent: set once no more are sent
    """
    store, made = Store(folder, durable=False), []
    while True:
        last = sent.is_set()
        jobs = store.claim(worker, 3)
        for job in jobs:
            assert store.report(job.id, worker, "base", 50)
            assert store.finish(job.id, worker, {"by": worker}, None)
            made.append(job.id)
        if last and not jobs:
            break
    out.write_text(json.dumps(made))
