"""Figures of a server, in the form that Prometheus reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_METHODS = ("GET", "HEAD", "POST", "DELETE")


class _Queue:
    """Jobs by status, counted when they are asked for."""

    def __init__(self, count: Callable[[str], int]) -> None:
        self._count = count

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily("vfengine_jobs", "Jobs in the store", labels=["status"])
        for status in ("queued", "in_progress", "completed", "failed"):
            family.add_metric([status], self._count(status))
        yield family


class Metrics:
    """Counts of one server; count: the number of jobs with a status."""

    def __init__(self, count: Callable[[str], int]) -> None:
        registry = self._registry = CollectorRegistry()
        registry.register(_Queue(count))

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"vfengine_{name}", words, labels, registry=registry)

        self._requests = counter(
            "http_requests", "HTTP requests answered", "method", "route", "status"
        )
        self._clips = counter("clips", "Clips made")
        self._failures = counter("failures", "Jobs that failed", "code")
        self._batches = counter("batches", "Batches made")
        self._paths = counter("base_paths", "Base paths, walked or found in the cache", "how")
        self._seconds = Histogram(
            "vfengine_phase_seconds",
            "Seconds that a batch spent in a phase",
            ("phase",),
            registry=registry,
            buckets=_SECONDS,
        )
        self._memory = Gauge(
            "vfengine_memory_bytes", "Memory in use", ("process",), registry=registry
        )
        self._peak = Gauge(
            "vfengine_peak_memory_bytes", "Most memory of a batch", ("process",), registry=registry
        )

    def request(self, method: str, route: str, status: int) -> None:
        """Counts an answer; other methods than HTTP's usual ones count as one."""
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()

    def engine_event(self, event: dict, engine: str = "engine") -> None:
        """Notes what an engine says: {"event": "batch" or "failed", ...}; others are left out.

        Of a batch: clips, seconds by phase, process_memory_mb, peak_memory_mb and, where it has
        them, walked and found, the numbers of base paths.
        """
        if event.get("event") == "failed":
            self._failures.labels(str(event.get("code", "unknown"))[:60]).inc()
        if event.get("event") != "batch":
            return
        self._batches.inc()
        self._clips.inc(event.get("clips", 0))
        for phase, seconds in event.get("seconds", {}).items():
            self._seconds.labels(phase).observe(seconds)
        for how in ("walked", "found"):
            if how in event:
                self._paths.labels(how).inc(event[how])
        for gauge, name in ((self._memory, "process_memory_mb"), (self._peak, "peak_memory_mb")):
            if event.get(name) is not None:
                gauge.labels(engine).set(event[name] * 2**20)

    def page(self) -> bytes:
        memory = _resident()
        if memory is not None:
            self._memory.labels("server").set(memory)
        return generate_latest(self._registry)


def _resident() -> int | None:
    """Bytes of memory of this process; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
