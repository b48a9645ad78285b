"""A simulation of clips on their way through workers: queues, stages, and workers that are lost.

Discrete events in a heap. A pool is a number of equal workers with one queue. A clip passes through
its stages in their order, each on a worker of a pool; in a queue, later stages come first, and then
earlier clips. Workers may be lost at their work, which is then done again by the next free one.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

_WARM_UP = 0.2  # of the clips, at the beginning and as many at the end, that no figure is made of


@dataclass(frozen=True)
class Stage:
    """Work on a clip: its pool, and its seconds on a worker of it."""

    pool: str
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What came out.

    rate:         clips a second, between the first and the last that count
    wait:         mean seconds that a clip stood in queues; wait95: what 95 % of clips stood at most
    latency:      mean seconds from a clip's arrival to its end
    busy:         of each pool, the share of its workers' time that was work
    lost:         workers that were lost
    """

    rate: float
    wait: float
    wait95: float
    latency: float
    busy: dict[str, float]
    lost: int


@dataclass
class _Clip:
    arrived: float
    stage: int = 0
    queued: float = 0.0
    waited: float = 0.0


def simulate(
    pools: Mapping[str, int],
    stages: Sequence[Stage],
    clips: int,
    *,
    rate: float | None = None,
    in_flight: int | None = None,
    exponential: bool = False,
    hours_to_loss: float = math.inf,
    restart: float = 0.0,
    seed: int = 0,
) -> Outcome:
    """The clips' passage.

    rate:        clips a second that arrive at random (Poisson)
    in_flight:   in its place: so many clips at all times, a new one whenever one is finished
    exponential: whether a stage's seconds are the mean of exponential ones, and not fixed
    hours_to_loss: mean hours of work until a worker is lost; restart: seconds until it is back

    Raises ValueError unless there is either a rate or a number in flight.
    """
    if (rate is None) == (in_flight is None):
        raise ValueError("expected either rate or in_flight")
    chance, number = random.Random(seed), count()
    events: list[tuple[float, int, str, object]] = []
    queues: dict[str, list] = {name: [] for name in pools}
    free, worked, finished = Counter(pools), Counter[str](), []
    made, lost, now = 0, 0, 0.0

    def at(moment: float, what: str, of: object) -> None:
        heapq.heappush(events, (moment, next(number), what, of))

    def enter(clip: _Clip) -> None:
        clip.queued = now
        pool = stages[clip.stage].pool
        heapq.heappush(queues[pool], (-clip.stage, clip.arrived, next(number), clip))
        serve(pool)

    def serve(pool: str) -> None:
        while free[pool] and queues[pool]:
            clip = heapq.heappop(queues[pool])[-1]
            free[pool] -= 1
            clip.waited += now - clip.queued
            seconds = stages[clip.stage].seconds
            seconds = chance.expovariate(1 / seconds) if exponential and seconds else seconds
            lasts = math.inf
            if math.isfinite(hours_to_loss):
                lasts = chance.expovariate(1 / (3600 * hours_to_loss))
            at(now + min(seconds, lasts), "lost" if lasts < seconds else "done", clip)
            worked[pool] += min(seconds, lasts)

    def arrive(moment: float) -> None:
        nonlocal made
        if made < clips:
            made += 1
            at(moment, "arrives", _Clip(moment))

    for _ in range(in_flight or 1):
        arrive(0.0)
    while events:
        now, _, what, of = heapq.heappop(events)
        if what == "back":
            free[of] += 1
            serve(of)
            continue
        pool = stages[of.stage].pool
        if what == "arrives":
            if rate is not None:
                arrive(now + chance.expovariate(rate))
            enter(of)
        elif what == "lost":
            lost += 1
            at(now + restart, "back", pool)
            enter(of)
        else:
            free[pool] += 1
            of.stage += 1
            if of.stage < len(stages):
                enter(of)
            else:
                finished.append((now, of.waited, now - of.arrived))
                if in_flight is not None:
                    arrive(now)
            serve(pool)
    skip = int(_WARM_UP * clips)
    kept = finished[skip : clips - skip]
    waits = sorted(waited for _, waited, _ in kept)
    return Outcome(
        rate=(len(kept) - 1) / (kept[-1][0] - kept[0][0]),
        wait=statistics.fmean(waits),
        wait95=waits[math.ceil(0.95 * len(waits)) - 1],
        latency=statistics.fmean(latency for *_, latency in kept),
        busy={name: worked[name] / (size * now) for name, size in pools.items()},
        lost=lost,
    )
