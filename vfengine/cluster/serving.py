"""The engines of a server as replicas of Ray Serve, in place of processes of this machine.

Ray Serve starts the replicas, starts lost ones again, and hands each batch to one that is free. The
server claims batches from its store, hands them over, and notes what it is told; so engines need
neither its database nor its folder. No torch here.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..files import is_of_the_machine, replacing
from ..serving.jobs import THUMBNAIL, Job
from ..serving.log import log, log_error
from ..serving.model_info import ModelInfo
from ..serving.store import Store
from .desk import SENT, ServedEngine
from .model import Model
from .sizes import Kind

_POLL = 5.0  # seconds after which a hand that was not woken looks for work
_GRACE = 10.0  # seconds that Ray Serve has to end the engines in
_PAUSE = 1.0  # seconds before the next batch after an engine was lost, or a disk was full
_LOOK = 1.0  # seconds between two looks at the replicas
_HOUSEKEEPING = 30.0  # seconds between two looks for what has expired


class RayWorkers:
    """The engines of a server on Ray; what the API needs of `serving.workers.Workers`.

    kind:     how many engines, their threads, and what each asks Ray for
    sent:     references of the model's files, for machines that lack them
    leaves:   whether the cluster goes on without this process
    keep:     seconds for which finished clips are kept; None: until they are deleted
    on_event: called, in a thread of its own, with what engines say (serving/engine.py)
    """

    def __init__(
        self,
        store: Store,
        model: Model,
        kind: Kind,
        *,
        name: str,
        sent: Mapping[str, Mapping[str, Any]] | None = None,
        batch_size: int | None = None,
        leaves: bool = True,
        keep: float | None = None,
        unused_paths: float = 7 * 86400.0,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.store, self.keep, self.unused_paths = store, keep, unused_paths
        self.info: ModelInfo | None = None
        self.error: str | None = None
        self.restarts = 0
        self.alive = 0
        self._kind, self._on_event, self._leaves = kind, on_event, leaves
        self._arguments = (model, dict(sent or {}), name, batch_size, kind.threads)
        where = str(store.folder.resolve()).encode()
        self._app = f"vfengine-{hashlib.sha256(where).hexdigest()[:12]}"  # of a store, one
        self._names: dict[int, str] = {}  # who has claimed, by hand
        self._lock = threading.Lock()
        self._known, self._stopping = threading.Event(), threading.Event()
        self._woken = [threading.Event() for _ in range(kind.count)]
        self._threads: list[threading.Thread] = []

    # -- what the server does ----------------------------------------------------------------------

    def start(self) -> None:
        """Queues again what an earlier server was at, and starts the engines.

        Raises ValueError where another server uses the store.
        """
        self.store.hold()
        self.store.recover((), self.keep, outage=True)
        self._threads = [threading.Thread(target=self._deployed, name="ray")]
        self._threads.append(threading.Thread(target=self._keep_house, name="housekeeping"))
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def wait_ready(self, timeout: float | None = None) -> ModelInfo | None:
        """The model, once it is read; None after the timeout, or where there is an error."""
        self._known.wait(timeout)
        return self.info

    def wake(self) -> None:
        """Tells that there may be work."""
        for event in self._woken:
            event.set()

    def stop(self) -> None:
        """Ends all engines; what they were at is queued again."""
        self._stopping.set()
        self.wake()
        for thread in self._threads:
            thread.join(_POLL)
        if self._leaves:
            end = threading.Thread(target=self._undeployed, name="end", daemon=True)
            end.start()
            end.join(_GRACE)  # a cluster that has gone may never answer
        self.store.recover((), self.keep)
        self.store.let_go()

    def _undeployed(self) -> None:
        """Ends the engines on a cluster that goes on, and Ray Serve if nobody else uses it."""
        from ray import serve

        serve.delete(self._app, _blocking=False)
        if not serve.status().applications.keys() - {self._app}:
            serve.shutdown()

    # -- in threads --------------------------------------------------------------------------------

    def _deployed(self) -> None:
        """Starts the engines, and the hands that work with them."""
        from ray import serve

        quiet = {"log_level": "ERROR", "enable_access_log": False}
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
        try:
            serve.start(proxy_location="Disabled", logging_config=quiet)
            deployment = serve.deployment(
                name="engine",
                num_replicas=self._kind.count,
                max_ongoing_requests=1,
                ray_actor_options=dict(self._kind.options),
                logging_config=quiet,
                graceful_shutdown_timeout_s=1.0,
            )(ServedEngine)
            application = deployment.bind(*self._arguments)
            self._handle = serve.run(application, name=self._app, route_prefix=None)
            info, error = self._handle.info.remote().result()
        except Exception as problem:  # Ray's own words are all there is
            info, error = None, " ".join(str(problem).split())[-500:]
        if info is None:
            self.error = error
        else:
            self.info = info
            self._hands = [
                threading.Thread(target=self._work, args=(number,), name=f"hand {number}")
                for number in range(self._kind.count)
            ]
            for hand in self._hands:
                hand.daemon = True
                hand.start()
            self._threads += self._hands
            self._look()
        self._known.set()
        while info is not None and not self._stopping.wait(_LOOK):
            self._look()

    def _look(self) -> None:
        """Counts the replicas that run."""
        from ray import serve

        try:
            found = serve.status().applications.get(self._app)
        except Exception as error:  # a cluster that is gone, which the health tells
            log_error(error)
            found = None
        states = found.deployments["engine"].replica_states if found is not None else {}
        alive = sum(count for state, count in states.items() if str(state).endswith("RUNNING"))
        self.restarts += max(0, self.alive - alive)
        self.alive = alive

    def _work(self, number: int) -> None:
        """Hands batch after batch to the engines, one at a time."""
        while not self._stopping.is_set():
            self._woken[number].clear()
            name = f"ray-{number}-{os.urandom(4).hex()}"
            try:
                with self._lock:
                    self._names[number] = name
                jobs = self.store.claim(name, self.info.max_batch)
                if jobs:
                    self._hand_over(jobs, name)
                else:
                    self._woken[number].wait(_POLL)
            except (OSError, sqlite3.Error) as error:  # of the store
                if not is_of_the_machine(error):
                    raise
                log_error(error)
                self._give_back(jobs, name)

    def _hand_over(self, jobs: list[Job], name: str) -> None:
        """Has an engine make a batch, and notes what it tells."""
        files = {
            (job.id, file): self.store.file(job.id, file).read_bytes()
            for job in jobs
            for file in SENT
            if self.store.file(job.id, file).exists()
        }
        events = self._handle.options(stream=True).make.remote(jobs, files)
        held = {job.id for job in jobs}
        try:
            for event in events:
                if self._stopping.is_set():
                    break
                self._heard(event, name, held)
                if not held and event[0] == "report":
                    break  # all were deleted
            else:
                held &= {job.id for job in jobs if self.store.holds(job.id, name)}
        except (OSError, sqlite3.Error):
            raise
        except Exception as error:  # the engine is lost, or has a bug: the job is tried again
            if not self._stopping.is_set():
                log(f"vfengine: an engine was lost ({' '.join(str(error).split())[:300]})")
                self._lost(name)
                return
        with contextlib.suppress(Exception):  # it may have ended by itself
            events.cancel()
        if held:
            self.store.requeue(held, name)

    def _heard(self, event: tuple, name: str, held: set[str]) -> None:
        """Notes what an engine tells of a job."""
        kind, *values = event
        if kind == "say":
            self._say(values[0])
            return
        job_id, *values = values
        if not self.store.holds(job_id, name):  # it was deleted
            held.discard(job_id)
            return
        expires = None if self.keep is None else time.time() + self.keep
        if kind == "report":
            phase, progress, thumbnail = values
            if thumbnail is not None:
                self._write(job_id, {THUMBNAIL: thumbnail})
            self.store.report(job_id, name, phase, progress, thumbnail is not None or None)
            return
        held.discard(job_id)
        if kind == "finish":
            result, files = values
            self._write(job_id, files)
            self.store.finish(job_id, name, result, expires)
        else:
            self.store.fail(job_id, name, *values, expires)

    def _write(self, job_id: str, files: Mapping[str, bytes]) -> None:
        folder = self.store.folder_of(job_id)
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            with replacing(folder / file) as new:
                new.write_bytes(content)

    def _lost(self, name: str) -> None:
        """Queues again what a lost engine was at."""
        with self._lock:
            names = [other for other in self._names.values() if other != name]
            again = self.store.recover(names, self.keep)
        if again:
            self.wake()
        self._stopping.wait(_PAUSE)

    def _give_back(self, jobs: list[Job], name: str) -> None:
        while not self._stopping.wait(_PAUSE):
            with contextlib.suppress(OSError, sqlite3.Error):
                self.store.requeue([job.id for job in jobs], name)
                return

    def _say(self, event: dict[str, Any]) -> None:
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception as error:  # of the caller's: the engine goes on
                log_error(error)

    def _keep_house(self) -> None:
        """Removes what has expired."""
        while not self._stopping.is_set():
            try:
                self.store.expire(time.time(), self.unused_paths)
            except (OSError, sqlite3.Error) as error:  # there is another time
                log_error(error)
            self._stopping.wait(_HOUSEKEEPING)
