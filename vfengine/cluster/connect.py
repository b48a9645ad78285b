"""To a Ray cluster and back: one of this machine's own, or one that runs at an address."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

LOCAL = "local"
_CLIENT = "ray://"
_CLIENT_PORT = 10001
_SECONDS = 5.0  # in which an address must answer
_STORE = 256 * 2**20  # bytes for base paths and clips on their way; Ray spills what is more


def check_package() -> None:
    """ImportError, naming the extra, where Ray is not installed."""
    try:
        importlib.import_module("ray")
    except ImportError as error:
        raise ImportError("--ray needs ray, which pip install '.[ray]' brings") from error


def check_address(address: str) -> None:
    """ValueError for what is no address, OSError naming it for one where nobody answers."""
    if address in (LOCAL, "auto"):
        return
    host, _, port = address.removeprefix(_CLIENT).rpartition(":")
    if not host and address.startswith(_CLIENT):
        host, port = port, str(_CLIENT_PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"--ray {address}: expected local, auto, HOST:PORT or ray://HOST[:{_CLIENT_PORT}]"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"--ray {address}: no cluster answers ({reason})") from error
    if os.environ.get("RAY_USE_TLS", "0") != "1" and not _speaks_grpc(f"{host}:{port}"):
        raise ValueError(f"--ray {address}: what answers there is no cluster")


def _speaks_grpc(target: str) -> bool:
    """Whether a server speaks Ray's protocol; Ray itself would try for minutes to find out."""
    import grpc

    with grpc.insecure_channel(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_SECONDS)
        except grpc.FutureTimeoutError:
            return False
    return True


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to a cluster; `LOCAL` starts one, which ends with the connection.

    Raises ValueError, in one line, for an address without a cluster, and for a cluster of another
    version of Ray or Python.
    """
    check_package()
    check_address(address)
    # Nothing here reaches for a network but the cluster's own.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a cluster of our own: as this process
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    own = {"num_cpus": _cores(), "include_dashboard": False, "object_store_memory": _STORE}
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(address, **quiet, **(own if address == LOCAL else {}))
    except (ConnectionError, RuntimeError, TimeoutError, ImportError, AssertionError) as error:
        raise ValueError(f"--ray {address}: {' '.join(str(error).split())}") from error
    for number, handler in handlers.items():  # Ray has put its own in their place
        signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()


def nodes() -> list[dict[str, float]]:
    """What each machine of the cluster has: "CPU", "GPU", "memory" in bytes."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def free() -> dict[str, float]:
    """What all machines have together that nobody uses; empty until Ray knows it."""
    import ray

    for _ in range(20):  # a cluster that has just started does not know it yet
        if found := ray.available_resources():
            return found
        time.sleep(0.1)
    return {}


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
