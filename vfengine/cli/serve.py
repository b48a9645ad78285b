"""`python -m vfengine.serve`: an HTTP API, a page and a queue over engines that make clips.

This process imports no torch: engines, processes of their own, have the model. The exit status is 0
when SIGTERM or SIGHUP stops it, and else that of ending.py.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .ending import ended
from .flags import Failure, UsageError, one_line
from .serve_settings import read_settings
from .start import on_stop, short_name
from .streams import tell

if TYPE_CHECKING:
    import socket
    from types import FrameType

    from ..cluster.serving import RayWorkers
    from ..serving.metrics import Metrics
    from ..serving.model_info import ModelInfo
    from ..serving.store import Store
    from ..serving.workers import Workers


class _Terminated(BaseException):
    """SIGTERM or SIGHUP, before requests are taken."""


def main(argv: Sequence[str] | None = None, program: str = "python -m vfengine.serve") -> int:
    """Runs one command line; returns the exit status.

    argv:    without the program's name; None is the process's own
    program: how it was called, for help and errors
    """
    name = short_name(program)

    def run() -> int:
        settings = read_settings(sys.argv[1:] if argv is None else argv, program)
        return _serve(settings, name)

    try:
        return ended(run, name)
    except _Terminated:
        return 0


def _serve(settings: argparse.Namespace, program: str) -> int:
    _check_extra()
    if settings.ray is not None:
        from ..cluster.connect import check_address, check_package

        check_package()
        check_address(settings.ray)
    keys = _keys(settings)
    if settings.model is not None and not settings.model.is_dir():
        raise UsageError(f"--model {settings.model}: no such folder")
    from ..serving.http_server import listen, share_heap

    share_heap()
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        address = f"{settings.host}:{settings.port}"
        raise UsageError(f"cannot listen at {address}: {one_line(error)}") from error
    with closing(listener), _store(settings.store) as store:
        return _run(settings, program, keys, listener, store)


def _run(
    settings: argparse.Namespace,
    program: str,
    keys: tuple[str, ...],
    listener: socket.socket,
    store: Store,
) -> int:
    """Starts the engines, takes requests until a signal comes, and stops the engines."""
    from ..serving.app import AppOptions, create_app
    from ..serving.gate import GateOptions, is_loopback
    from ..serving.http_server import Server
    from ..serving.metrics import Metrics
    from ..serving.request_forms import Bounds

    metrics, keep = Metrics(store.count), settings.keep * 3600 if settings.keep else None
    options = AppOptions(
        gate=GateOptions(
            keys=keys,
            any_host=not is_loopback(settings.host),
            max_body=settings.max_body * 2**20,
            log=not settings.quiet,
        ),
        bounds=Bounds(settings.max_steps, settings.max_seconds, settings.max_scale),
        max_queue=settings.max_queue,
    )
    on_stop(_terminate)
    if not settings.quiet:
        tell(f"{program}: reading {settings.model or 'the shipped model'}")
    try:
        with _engines(settings, store, keep, metrics) as workers:
            workers.start()
            info = _model(workers)
            if refused := store.refuse_other_models(info.name, keep):
                tell(f"{program}: jobs of other models, now failed: {refused}")
            app = create_app(store, info, workers, options, metrics)
            server = Server(app, ready=lambda: _say_address(listener, settings.host))
            asyncio.run(server.serve(sockets=[listener]))
    except sqlite3.Error as error:
        raise Failure(f"--store {settings.store}: {one_line(error)}") from error
    if server.interrupted:
        raise KeyboardInterrupt
    return 0


@contextmanager
def _engines(
    settings: argparse.Namespace, store: Store, keep: float | None, metrics: Metrics
) -> Iterator[Workers | RayWorkers]:
    """The engines, not started yet; they are stopped in the end."""
    told = {"keep": keep, "on_event": metrics.engine_event}
    with ExitStack() as stack:
        if settings.ray is None:
            from ..serving.workers import Workers

            workers = Workers(store, _engine_flags(settings), count=settings.workers, **told)
        else:
            from .engines_on_ray import on_ray

            workers = stack.enter_context(on_ray(settings, store, **told))
        stack.callback(workers.stop)
        yield workers


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def _model(workers: Workers | RayWorkers) -> ModelInfo:
    """What the engines say of the model once they have read it; UsageError if they cannot."""
    while workers.error is None:
        info = workers.wait_ready(0.5)  # not for ever: a signal must be able to end it
        if info is not None:
            return info
    raise UsageError(workers.error)


def _engine_flags(settings: argparse.Namespace) -> list[str]:
    flags = ["--name", settings.served_model_name]
    flags += ["--device", settings.device, "--dtype", settings.dtype]
    for name in ("model", "base_unet", "base_device", "residual_device", "batch_size"):
        value = getattr(settings, name)
        if value is not None:
            flags += ["--" + name.replace("_", "-"), str(value)]
    flags += [f"--lora={file}" for file in settings.lora or ()]
    return [*flags, *(["--no-capture"] if settings.no_capture else [])]


def _keys(settings: argparse.Namespace) -> tuple[str, ...]:
    from ..serving.gate import is_loopback, read_keys

    if settings.api_key_file is not None:
        try:
            return read_keys(settings.api_key_file)
        except OSError as error:
            message = f"--api-key-file {settings.api_key_file}: {one_line(error)}"
            raise UsageError(message) from error
    if not is_loopback(settings.host):
        message = f"--host {settings.host} lets other machines in: --api-key-file must name keys"
        raise UsageError(message)
    return ()


def _check_extra() -> None:
    """UsageError without what the extra installs."""
    for module in ("prometheus_client", "python_multipart", "starlette", "uvicorn"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            message = f"a server needs {module}, which pip install '.[serve]' brings"
            raise UsageError(message) from error


@contextmanager
def _store(folder: Path) -> Iterator[Store]:
    """The store, which no other server uses meanwhile."""
    from ..serving.store import Store

    with ExitStack() as stack:
        try:
            store = stack.enter_context(closing(Store(folder)))
            store.hold()
            uploads = folder / "uploads"  # bodies of requests that are too large for memory
            uploads.mkdir(exist_ok=True)
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"--store {folder}: {one_line(error)}") from error
        tempfile.tempdir = str(uploads.resolve())
        yield store


def _say_address(listener: socket.socket, host: str) -> None:
    port = listener.getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    tell(f"listening on http://{name}:{port}")
