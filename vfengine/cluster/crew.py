"""The workers of a run: orders go to those that are free, and what was lost is made again.

Ray places the workers and starts lost ones again, wherever there is room. What a lost one was at
goes to another that is free, and a base path that was lost with its machine is walked again: the
same bytes, whoever makes them. An error of a worker's own code is the order's, and not tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from .model import Model, parts
from .sizes import Kind, Sizes
from .workers import BaseWorker, Made, Order, ResidualWorker

MAX_LOSSES = 5  # workers that an order may lose: it may be what kills them
_AHEAD = 3  # orders in flight for each worker of the residual phase
_GRACE = 5.0  # seconds in which calls of workers that were dismissed must end
_PATIENCE = 30.0  # seconds without any worker after which that is told


class Lost(RuntimeError):
    """An order whose workers were lost again and again, or that no worker is left for."""


class Crew:
    """The workers of a run, driven from a thread of their own.

    tell: gets lines for people, such as that a worker was lost
    """

    def __init__(self, sizes: Sizes, model: Model, tell: Callable[[str], None]) -> None:
        self._sizes, self._model, self._tell = sizes, model, tell
        workers = max(1, sizes.residual.count)
        self._room = threading.BoundedSemaphore(_AHEAD * workers + sizes.base.count)
        self._flights, self._ending = 0, False
        self._landed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="crew", daemon=True)

    def __enter__(self) -> Crew:
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._hired(), self._loop).result()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._dismissed(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(
        self, order: Order, done: Callable[[Made | Exception], None], keeps_path: bool = False
    ) -> None:
        """Has an order made; waits while many are in flight.

        done:       called in the crew's thread, with what was made or why it was not
        keeps_path: whether what was made has the base path as well
        """
        self._room.acquire()
        with self._landed:
            self._flights += 1
        asyncio.run_coroutine_threadsafe(self._flight(order, done, keeps_path), self._loop)

    def drain(self) -> None:
        """Waits until no order is in flight."""
        with self._landed:
            while self._flights:
                self._landed.wait(1.0)  # not for ever: a signal must be able to end it

    # -- in the thread -----------------------------------------------------------------------------

    async def _hired(self) -> None:
        """Starts all workers, and waits for the first of each kind; ValueError if none can work."""
        told = (self._model, self._tell)
        self._base = _Pool("base", BaseWorker, self._sizes.base, *told)
        self._residual = _Pool("residual", ResidualWorker, self._sizes.residual, *told)
        pools = [pool for pool in (self._base, self._residual) if pool.kind.count]
        for pool in pools:
            pool.hire()
        for pool in pools:
            try:
                pool.free.put_nowait(await pool.next())
            except Lost as error:
                raise ValueError(str(error)) from error

    async def _dismissed(self) -> None:
        self._ending = True
        for pool in (self._base, self._residual):
            pool.dismiss()
        for seconds in (_GRACE, 0.0):  # of a cluster that has gone, a call may never end
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            _, late = await asyncio.wait(tasks, timeout=seconds) if tasks else ((), ())
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _flight(
        self, order: Order, done: Callable[[Made | Exception], None], keeps_path: bool
    ) -> None:
        try:
            try:
                result = await self._made(order, keeps_path)
            except Exception as error:
                result = getattr(error, "cause", None) or error  # of Ray's wrapping
            if not self._ending:
                done(result)
        finally:
            self._room.release()
            with self._landed:
                self._flights -= 1
                self._landed.notify_all()

    async def _made(self, order: Order, keeps_path: bool) -> Made:
        from ray.exceptions import ObjectLostError

        for _ in range(MAX_LOSSES):
            timings, path = {}, None
            if order.walks:
                timings, path = await self._base.do("walk", order)
            try:
                made = await self._residual.do("follow", order, path)
                made.path = await path if keeps_path and path is not None else None
            except ObjectLostError:  # with the machine that it was on
                self._tell("a base path was lost with its machine, and is walked again")
                continue
            for name, seconds in timings.items():
                made.timings[name] = made.timings.get(name, 0.0) + seconds
            return made
        raise Lost(f"its base path was lost {MAX_LOSSES} times")


class _Pool:
    """The workers of one kind, and which of them are free."""

    def __init__(
        self, name: str, made: type, kind: Kind, model: Model, tell: Callable[[str], None]
    ) -> None:
        import ray

        self.name, self.kind, self.model, self.tell = name, kind, model, tell
        # Ray starts a lost worker again; what it was at is for the next free one.
        self.actor = ray.remote(max_restarts=-1, max_task_retries=0, **kind.options)(made)
        self.free: asyncio.Queue[Any] = asyncio.Queue()
        self.left = kind.count
        self.ready = 0
        self.error = ""
        self.workers: list[Any] = []
        self.joining: set[asyncio.Task] = set()

    def hire(self) -> None:
        for _ in range(self.kind.count):
            self.workers.append(self.actor.remote(self.model, self.kind.threads))
            self._join(self.workers[-1])

    def dismiss(self) -> None:
        """Ends all workers, so that whatever waits for one ends as well."""
        import ray
        from ray.exceptions import RayError

        self.left, self.error = 0, "the run has ended"
        self.free.put_nowait(None)
        for worker in self.workers:
            with contextlib.suppress(RayError):  # a cluster that has gone has no workers
                ray.kill(worker)

    async def do(self, method: str, order: Order, *values: Any) -> Any:
        """What a free worker makes of an order; of `walk` timings, and the path's reference."""
        from ray.exceptions import RayActorError

        for _ in range(MAX_LOSSES):
            worker = await self.next()
            walks = method == "walk"
            call = getattr(worker, method).options(num_returns=2 if walks else 1)
            refs = call.remote(order, *values)
            try:
                result = await (refs[0] if walks else refs)
            except RayActorError:
                if not self.left:
                    raise  # dismissed
                self.ready -= 1
                self.tell(f"a {self.name} worker was lost; what it was at is made again")
                self._join(worker)
                continue
            except BaseException:
                self.free.put_nowait(worker)
                raise
            self.free.put_nowait(worker)
            return (result, refs[1]) if walks else result
        raise Lost(f"{MAX_LOSSES} workers were lost at it: it may need more memory than they have")

    async def next(self) -> Any:
        """A worker that is free; Lost where none is left."""
        while True:
            try:
                worker = await asyncio.wait_for(self.free.get(), _PATIENCE)
            except asyncio.TimeoutError:
                if not self.ready:
                    asked = ", ".join(f"{n} {v:g}" for n, v in self.kind.options.items())
                    self.tell(f"waiting for Ray to start a {self.name} worker ({asked})")
                continue
            if worker is None:  # and none will come
                self.free.put_nowait(None)
                raise Lost(self.error)
            return worker

    def _join(self, worker: Any) -> None:
        task = asyncio.get_running_loop().create_task(self._joined(worker))
        self.joining.add(task)
        task.add_done_callback(self.joining.discard)

    async def _joined(self, worker: Any) -> None:
        """Waits until Ray has started a worker, sends it what it lacks, and has it work."""
        from ray.exceptions import ActorUnavailableError, RayError

        from .. import __version__

        while True:
            try:
                again = {"max_task_retries": -1}
                for name in await worker.missing.options(**again).remote():
                    files = parts(self.model.sources[name])
                    await worker.take.options(**again).remote(name, list(files), *files.values())
                version = await worker.open.options(**again).remote()
                if version != __version__:
                    raise ValueError(f"a worker has vfengine {version}, not {__version__}")
            except ActorUnavailableError:
                if not self.left:
                    return
                continue
            except (RayError, ValueError, OSError) as error:
                if not self.left:
                    return  # dismissed
                self.error = f"a {self.name} worker cannot work: {_reason(error)}"
                self.left -= 1
                if not self.left:
                    self.free.put_nowait(None)
                else:
                    self.tell(self.error)
                return
            self.ready += 1
            self.free.put_nowait(worker)
            return


def _reason(error: Exception) -> str:
    """Why a worker cannot work, in a line; of what Ray tells with a traceback its last one."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if len(lines) > 1 and "No module named" in lines[-1]:
        return f"{lines[-1]}: each machine needs the same version of vfengine"
    return lines[-1] if lines else type(cause).__name__
