"""`generate --prompts FILE --ray`: the lines on a cluster, each told as soon as it is finished.

This process checks each line as it does without a cluster, and writes its files: names, records and
bytes are the same. The workers (vfengine/cluster) get requests and give back encoded clips.
"""

from __future__ import annotations

import argparse
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cluster.connect import check_address, check_package, connected, free, nodes
from ..cluster.crew import Crew
from ..cluster.model import Model
from ..cluster.needs import needs_of, probed
from ..cluster.sizes import check_free, sizes
from ..cluster.workers import Made, Order
from ..files import replacing
from ..pipelines.batches import Batches
from .flags import Failure, one_line
from .job import Task, open_pipeline, teller, try_encoder
from .output import Job, Record, json_line, write_trajectory
from .prompt_lines import Line, Lines
from .prompts import LinesBar, Run, generate_lines
from .streams import only_results, tell

if TYPE_CHECKING:
    from ..diffusion.base_path import BaseTrajectory


def generate_on_ray(
    settings: argparse.Namespace, started: float, files: list[Path], name: str
) -> None:
    """`generate_lines` on a cluster; also ValueError for one that cannot be used, or not so."""
    check_package()
    check_address(settings.ray)
    generate_lines(settings, started, files, name, _make_on_ray)


def _make_on_ray(settings: argparse.Namespace, lines: Lines, *told: Any) -> None:
    """told: started, files and name of `generate_lines`"""
    pipe = open_pipeline(argparse.Namespace(**{**vars(settings), "device": "cpu"}))
    run = _RayRun(settings, pipe, lines, *told)
    run.check_names()
    with only_results(), connected(settings.ray):
        machines = nodes()
        device, dtype, memory = probed(machines, settings.device, settings.dtype)
        if dtype != str(pipe.dtype).removeprefix("torch."):
            run.pipe = open_pipeline(
                argparse.Namespace(**{**vars(settings), "device": "cpu", "dtype": dtype})
            )
        run.device = device
        size = sizes(
            machines,
            needs_of(run.pipe, settings.batch_size),
            settings.base_workers,
            settings.residual_workers,
            memory,
        )
        check_free([size.base, size.residual], free())
        capture = not settings.no_capture
        model = Model.of(settings.model, settings.base_unet, settings.lora, device, dtype, capture)
        with Crew(size, model, run.note) as crew:
            run.crew = crew
            run.all()


class _RayRun(Run):
    """The lines of one command, several of which are in flight.

    Lines are read and checked in the main thread; what comes back is written and told in the
    crew's.
    """

    crew: Crew
    device: str

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._lock = threading.RLock()  # of all that is told and counted
        self._paths: set[Path] = set()  # files of base paths that lines in flight write

    def note(self, text: str) -> None:
        """Says on stderr what the crew tells."""
        if not self.settings.quiet:
            with self._lock:
                tell(f"{self.name}: {text}")

    def _lines(self, bar: LinesBar) -> None:
        for line in self.lines.lines:
            self.started = time.perf_counter() if self.count else self.started
            self._line(line, bar)
            self._check_told()
        self.crew.drain()
        self._check_told()

    def _check_told(self) -> None:
        """Ends a stream, which might have no end, once nobody reads what is told."""
        if self.unsaid is not None and self.unsaid.unread and self.lines.count is None:
            raise self.unsaid

    def _wait_for(self, settings: argparse.Namespace) -> None:
        if settings.base_trajectory is not None:
            if Path(settings.base_trajectory).absolute() in self._paths:
                self.crew.drain()

    def _line(self, line: Line, bar: LinesBar) -> None:
        record = Record(self.started)
        self.count += 1
        try:
            begun = self._begun(line, bar)
            if isinstance(begun, Task):
                self._send(line, begun, record, bar)
                return
            told = begun
        except Exception as error:  # the other lines may go well
            told = self._failure(line, error, record, bar)
        self._tell(line, told, bar)

    def _send(self, line: Line, task: Task, record: Record, bar: LinesBar) -> None:
        """Has the crew make a line."""
        settings, pipe, request, _ = task
        settings.device = self.device
        walks = "base" in pipe.phases(request)
        if hasattr(request, "offload_base") and not request.preview:
            request = replace(request, offload_base=False)
        batches = Batches(pipe, request, settings.batch_size, base_needed_again=True)
        job = Job(settings, pipe, batches.request)
        try_encoder(job)
        text = teller(job, self.device)
        found = None
        if walks and settings.base_cache is not None:
            found = _found(batches)
            walks = found is None
        order = Order(
            request=batches.request if found is None else batches.request.along(found),
            batch_size=settings.batch_size,
            walks=walks,
            suffix=Path(settings.output).suffix,
            texts=[text(number) for number in range(request.num_clips)],
            encoding={name: getattr(settings, name) for name in ("codec", "crf", "chroma")},
            fps=settings.fps,
            scale=settings.scale,
            scale_filter=settings.scale_filter,
        )
        if walks and settings.base_cache is not None:
            order = replace(order, request=replace(order.request, base_cache=None))
        keeps = job.keeps_paths or (walks and settings.base_cache is not None)
        if job.keeps_paths:
            self._paths.add(Path(settings.base_trajectory).absolute())

        def done(result: Made | Exception) -> None:
            self._arrived(line, job, batches, task, record, result, bar)

        self.crew.submit(order, done, keeps_path=keeps)

    def _arrived(
        self,
        line: Line,
        job: Job,
        batches: Batches,
        task: Task,
        record: Record,
        result: Made | Exception,
        bar: LinesBar,
    ) -> None:
        """Writes and tells what has come of a line."""
        with self._lock:
            try:
                if isinstance(result, Exception):
                    raise result
                _write(task.targets, result.files, record)
                if job.keeps_paths and result.path is not None:
                    write_trajectory(Path(job.settings.base_trajectory), [result.path])
                elif result.path is not None:
                    _keep(batches, result.path)
                record.add(result.timings)
                record.timings["total"] = time.perf_counter() - record.started
                waited = record.timings["total"] - sum(result.timings.values())
                record.timings = {"startup": max(0.0, waited), **record.timings}
                bar.made()
                told = json_line(job, record) | result.facts
            except Exception as error:
                told = self._failure(line, error, record, bar)
            finally:
                self.files += record.files
            self._tell(line, told, bar)

    def _failure(self, *arguments: Any) -> dict[str, Any]:
        with self._lock:
            return super()._failure(*arguments)

    def _tell(self, line: Line, told: dict[str, Any], bar: LinesBar) -> None:
        with self._lock:
            try:
                super()._tell(line, told, bar)
            except Exception:
                if threading.current_thread() is threading.main_thread():
                    raise  # else `_check_told` does


def _write(targets: list[Path], contents: list[bytes], record: Record) -> None:
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    for target, content in zip(targets, contents, strict=True):
        try:
            with replacing(target) as file:
                file.write_bytes(content)
        except OSError as error:
            raise Failure(f"{target}: cannot be written ({one_line(error)})") from error
        record.files.append(target)


# -- the base cache, which is the driver's ---------------------------------------------------------


def _found(batches: Batches) -> BaseTrajectory | None:
    """The base path of all batches, if a cache has each of them."""
    import torch

    from ..pipelines.base_cache import find_path

    paths = []
    for part in _walked_parts(batches):
        path = find_path(part.base_cache, batches.pipe.base_cache_key(part))
        if path is None:
            return None
        paths.append(path)
    return replace(paths[0], states=torch.cat([path.states for path in paths], dim=1))


def _keep(batches: Batches, path: BaseTrajectory) -> None:
    """Adds a path to the cache: the part of each batch by its own key."""
    from ..pipelines.base_cache import find_path, keep_path

    first = 0
    for part in _walked_parts(batches):
        key, last = batches.pipe.base_cache_key(part), first + part.num_paths
        try:
            if find_path(part.base_cache, key) is None:
                keep_path(part.base_cache, key, replace(path, states=path.states[:, first:last]))
        except OSError as error:
            raise Failure(f"--base-cache {part.base_cache}: {one_line(error)}") from error
        first = last


def _walked_parts(batches: Batches) -> list[Any]:
    """The parts of a request that have base paths of their own."""
    parts = list(batches.parts())
    return parts[:1] if batches.request.shares_path else parts
