"""Clusters of several nodes on this machine, and the ends of what runs on them. Linux."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from server_process import children

_STORE = 80 * 2**20  # bytes of a node's object store: base paths and clips of tiny models


@contextmanager
def running_cluster(nodes: int = 2, cpus: int = 1):
    """A `Cluster` of so many nodes, of so many cores each.

    All its files, and the temporary ones of its workers, are in the folder `temporary`.
    """
    from ray.cluster_utils import Cluster

    # a node that is killed is missed after a second or two, not after half a minute
    health = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    own = {"num_cpus": cpus, "object_store_memory": _STORE}
    head = {**own, "include_dashboard": False, "_system_config": health}
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        with pytest.MonkeyPatch.context() as patch:  # names of sockets may have 107 bytes
            for name in ("TMPDIR", "RAY_TMPDIR"):
                patch.setenv(name, temporary)
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            patch.setenv("RAY_worker_niceness", "0")  # or a busy machine's workers never start
            cluster = Cluster(initialize_head=True, head_node_args=head)
            for _ in range(nodes - 1):
                cluster.add_node(**own)
        cluster.temporary = Path(temporary)
        try:
            yield cluster
        finally:
            cluster.shutdown()


def workers_of(cluster, kind: str) -> list[int]:
    """Process ids of a cluster's workers of a kind, which Ray names ray::KIND."""
    found = []
    for node in cluster.list_all_nodes():
        for raylet in node.all_processes["raylet"]:
            for pid in children(raylet.process.pid):
                try:
                    title = Path(f"/proc/{pid}/cmdline").read_bytes()
                except FileNotFoundError:
                    continue
                if title.startswith(f"ray::{kind}".encode()):
                    found.append(pid)
    return found


def kill(pid: int) -> None:
    """As kill -9; a process that has just ended is as good."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
