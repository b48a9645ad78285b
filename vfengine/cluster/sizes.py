"""How many workers of each kind a cluster gets, and what each asks Ray for. Plain arithmetic.

A worker of the residual phase and one of the base phase share a core, or a GPU: while the one
waits, the operating system gives all of it to the other. So both kinds have machines of their own
choice, and none stands still: base workers run ahead as far as lines are in flight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_BASE, _RESIDUAL = 0.25, 0.75  # of a slot, which is a core, several of them, or a GPU
_GPU_ROOM = 0.9  # of a GPU's memory, for networks and what they work in


@dataclass(frozen=True)
class Needs:
    """What the workers of a model need.

    base, residual: bytes of memory of a worker; base is 0 for a model without a base network
    base_share:     of a clip's work that is the base phase's, 0 to 1
    """

    base: int
    residual: int
    base_share: float


@dataclass(frozen=True)
class Kind:
    """Workers of one kind: how many, their threads, and what each asks Ray for."""

    count: int
    threads: int
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The workers of a run; `base` has none for a model without a base network."""

    base: Kind
    residual: Kind


def check_free(kinds: Sequence[Kind], free: Mapping[str, float]) -> None:
    """ValueError, naming both, where not one worker of each kind would find room now.

    free: what nobody uses of the cluster
    """
    for option, name in (("num_cpus", "CPU"), ("num_gpus", "GPU"), ("memory", "memory")):
        asked = sum(kind.options.get(option, 0) for kind in kinds if kind.count)
        if asked > free.get(name, 0):
            raise ValueError(
                f"--ray: the workers need {asked:g} of {name}, but only {free.get(name, 0):g} are "
                "free: others use the cluster"
            )


def sizes(
    nodes: Sequence[Mapping[str, float]],
    needs: Needs,
    base: int | None = None,
    residual: int | None = None,
    gpu_memory: int | None = None,
) -> Sizes:
    """The workers that a cluster can hold.

    nodes:          what each machine has (`connect.nodes`)
    base, residual: how many workers are asked for; None: as many as suit the cluster
    gpu_memory:     bytes of a GPU, to run on GPUs; None is on CPUs

    Raises ValueError, naming what was asked for and what there is, where they do not fit.
    """
    if base is not None and not needs.base:
        raise ValueError(f"--base-workers {base}: this model has no base network")
    if gpu_memory is not None:
        return _on_gpus(nodes, needs, base, residual, gpu_memory)
    asked = max(base or 1, residual or 1)
    threads = _threads(nodes, asked) if base or residual else 1
    slots = _slots(nodes, threads)
    if asked > slots:
        raise ValueError(_too_many(base, residual, f"{slots} CPU cores", nodes))
    room = [
        min(int(node.get("CPU", 0)) // threads, int(node.get("memory", 0) // _both(needs)))
        for node in nodes
    ]
    fit = sum(room)
    if not fit or max(base or 0, residual or 0) > fit:
        mega = _both(needs) / 1e6
        raise ValueError(_too_many(base, residual, f"memory for {fit} of {mega:.0f} MB", nodes))
    residual = fit if residual is None else residual
    if base is None:
        base = min(fit, max(1, math.ceil(needs.base_share * residual))) if needs.base else 0
    shares = (_BASE, _RESIDUAL) if base else (0.0, 1.0)
    cpus = [share * threads for share in shares]
    return Sizes(
        Kind(base, threads, {"num_cpus": cpus[0], "memory": needs.base}),
        Kind(residual, threads, {"num_cpus": cpus[1], "memory": needs.residual}),
    )


def engines(nodes: Sequence[Mapping[str, float]], count: int, on_gpus: bool) -> Kind:
    """Engines of a server, which hold all networks: a GPU each, or all cores between them.

    Raises ValueError, naming what was asked for and what there is, where they do not fit.
    """
    machines = "1 machine" if len(nodes) == 1 else f"{len(nodes)} machines"
    if on_gpus:
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        if count > gpus:
            raise ValueError(f"--workers {count}: the cluster has {gpus} GPUs, on {machines}")
        return Kind(count, 1, {"num_gpus": 1, "num_cpus": 1})
    threads = _threads(nodes, count)
    slots = _slots(nodes, threads)
    if count > slots:
        raise ValueError(f"--workers {count}: the cluster has {slots} CPU cores, on {machines}")
    return Kind(count, threads, {"num_cpus": threads})


def _on_gpus(
    nodes: Sequence[Mapping[str, float]],
    needs: Needs,
    base: int | None,
    residual: int | None,
    memory: int,
) -> Sizes:
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    room = int(_GPU_ROOM * memory)
    if max(needs.base, needs.residual) > room:
        raise ValueError(
            f"--ray: a worker needs {max(needs.base, needs.residual) / 1e9:.1f} GB of a GPU, which "
            f"has {memory / 1e9:.1f}"
        )
    together = needs.base + needs.residual <= room
    if together or not needs.base:
        residual = gpus if residual is None else residual
        if base is None:
            base = min(gpus, max(1, math.ceil(needs.base_share * residual))) if needs.base else 0
        fits = max(base, residual) <= gpus
    else:  # a GPU each
        if base is None:
            base = max(1, round(needs.base_share * gpus)) if residual is None else gpus - residual
        residual = gpus - base if residual is None else residual
        fits = min(base, residual) >= 1 and base + residual <= gpus
    if not fits:
        held = "which hold both networks" if together else "each of which holds one network"
        raise ValueError(_too_many(base, residual, f"{gpus} GPUs, {held}", nodes))
    shares = (_BASE, _RESIDUAL) if together and base else (1.0, 1.0)
    options = [{"num_gpus": share, "num_cpus": share} for share in shares]
    return Sizes(Kind(base, 1, options[0]), Kind(residual, 1, options[1]))


def _both(needs: Needs) -> int:
    return max(1, needs.base + needs.residual)


def _slots(nodes: Sequence[Mapping[str, float]], threads: int) -> int:
    return sum(int(node.get("CPU", 0)) // threads for node in nodes)


def _threads(nodes: Sequence[Mapping[str, float]], asked: int) -> int:
    """The most threads at which there are so many slots."""
    most = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    return next((t for t in range(most, 0, -1) if _slots(nodes, t) >= asked), 1)


def _too_many(base: int | None, residual: int | None, has: str, nodes: Sequence[object]) -> str:
    asked = [
        f"--{name}-workers {count}"
        for name, count in (("base", base), ("residual", residual))
        if count is not None
    ]
    machines = "1 machine" if len(nodes) == 1 else f"{len(nodes)} machines"
    return f"{' '.join(asked) or '--ray'}: the cluster has {has}, on {machines}"
