"""Peak memory of VDM*, interleaved and two phases, graphs off and on, a process each."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from lib import peak_memory
from lib.table4_ways import INTERLEAVED, TWO_PHASE, VDM

from gpu_run.sections import DEVICE, DRY, PREPARE, emit, guarded

SIZES = ("paper", "large", "default")
NAMES = (VDM, TWO_PHASE, INTERLEAVED)
AT_ONCE = 1 if DRY else 6  # processes that share the card
GIB = 1024  # MiB


def peak(size: str, name: str, graph: bool) -> peak_memory.Peak:
    arguments = {
        "contender": name,
        "size_name": "tiny" if DRY else size,
        "dtype": "bfloat16",
        "device": DEVICE,
        "steps": 2,
        "capture": graph,
    }
    return peak_memory.measure("lib.table4_ways:sampling_probe", arguments, DEVICE)


def main() -> None:
    """Those that targets are for come first: a run may be cut off."""
    sizes, graphs = (SIZES[:1], (True,)) if DRY else (SIZES, (True, False))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        pending = {
            (size, graph, name): pool.submit(peak, size, name, graph)
            for graph in graphs
            for size in sizes
            for name in NAMES
        }
        seen: dict[tuple, peak_memory.Peak] = {}
        for (size, graph, name), answer in pending.items():
            place = {"contender": name, "dtype": "bf16", "graph": graph}
            with guarded(f"{size}, 1 clip", **place):
                seen[size, graph, name] = found = answer.result()
                report(f"{size}, 1 clip", found, seen.get((size, graph, VDM)), **place)


def report(case: str, found: peak_memory.Peak, vdm: peak_memory.Peak | None, **place) -> None:
    kinds = {"allocated": "allocated", "reserved": "reserved", "driver": "driver, afterwards"}
    for kind, metric in {"resident": "resident"}.items() if DRY else kinds.items():
        value = getattr(found, kind)
        if value is None:
            note = "NVML does not tell processes apart here"
            emit(case, metric=metric, status="unavailable", note=note, **place)
            continue
        emit(case, metric=metric, value=value / GIB, unit="GiB", **place)
        if vdm is not None and getattr(vdm, kind):
            ratio = value / getattr(vdm, kind)
            emit(case, metric=f"{metric} / VDM*", value=ratio, **place)


if __name__ == "__main__" and not PREPARE:
    main()
