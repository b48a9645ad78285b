"""Clips on Ray beside one process on the same cores, and workers that are killed meanwhile.

`vfengine generate --prompts FILE` with `--ray` and without take turns, as whole commands: with the
start of the cluster, of its workers, and their end. The check comes first: both write the same
bytes. Each contender makes the clips once in a turn, and the faster of its turns counts.

    python benchmarks/bench_ray.py              # 64 clips, twice each
    python benchmarks/bench_ray.py --kills 10   # and a run in which ten workers are killed

Seconds    of the command; overhead is what Ray's takes more, in per cent of one process's
Kills      a worker at a time, by kill -9, at random moments of the run; the bytes must be the same,
           and each line told once

Under pytest it is 8 clips and one kill; with --short, 2 and one kill.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lib.harness import Row, Target, main, say, table, verdicts

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "tools"))
from server_process import children

ALONE, RAY, KILLED = "one process", "Ray", "Ray, killed"
FLAGS = {ALONE: [], RAY: ["--ray"], KILLED: ["--ray"]}


@dataclass(frozen=True)
class Plan:
    clips: int = 64
    turns: int = 2
    kills: int = 0
    model: str | None = None
    more: tuple[str, ...] = ()

    @property
    def case(self) -> str:
        return f"{self.clips} clips"


FULL, REDUCED, LEAST = Plan(), Plan(8, 1, 1), Plan(2, 1, 1, more=("--num-inference-steps", "2"))
TARGETS = [Target(FULL.case, RAY, "overhead", 10, at_most=True)]


def measure(plan: Plan = FULL) -> list[Row]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lines = [f'{{"seed": {k}, "prompt": "a person walking"}}' for k in range(plan.clips)]
        (folder / "lines.jsonl").write_text("\n".join(lines))
        seconds: dict[str, list[float]] = {ALONE: [], RAY: []}
        expected: dict[str, bytes] | None = None
        for turn in range(plan.turns):
            for name in seconds if turn % 2 == 0 else reversed(seconds):
                say(f"{name}, turn {turn + 1} of {plan.turns}")
                took, files = command(folder, name, plan)
                seconds[name].append(took)
                expected = same(files, expected)
        rows = [Row(plan.case, name, "seconds", min(took), "s") for name, took in seconds.items()]
        over = 100 * (min(seconds[RAY]) / min(seconds[ALONE]) - 1)
        rows.append(Row(plan.case, RAY, "overhead", over, "%"))
        if plan.kills:
            say(f"{plan.kills} workers are killed")
            took, files = command(folder, KILLED, plan)
            same(files, expected)
            rows += [
                Row(plan.case, KILLED, "seconds", took, "s"),
                Row(plan.case, KILLED, "kills", plan.kills, ""),
            ]
    return rows


def command(folder: Path, name: str, plan: Plan) -> tuple[float, dict[str, bytes]]:
    """Seconds of a command, and its files; RuntimeError where it fails or loses a line."""
    clips = folder / name.replace(", ", "-").replace(" ", "-")
    argv = [sys.executable, "-m", "vfengine.generate", "--prompts", str(folder / "lines.jsonl")]
    argv += ["--output", str(clips / "{index:03d}.mp4"), "--json", *FLAGS[name], *plan.more]
    argv += [] if plan.model is None else ["--model", plan.model]
    began = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed: list[int] = []
    killer = threading.Thread(target=kill_some, args=(process, plan, clips, killed))
    if name == KILLED:
        killer.start()
    out, err = process.communicate()
    took = time.perf_counter() - began
    if name == KILLED:
        killer.join()
    if process.returncode:
        raise RuntimeError(f"{name}: status {process.returncode}: {err[-2000:]}")
    told = sorted(json.loads(line)["index"] for line in out.splitlines())
    if told != list(range(plan.clips)):
        raise RuntimeError(f"{name}: lines {told} were told, of {plan.clips}")
    if name == KILLED and len(killed) != plan.kills:
        raise RuntimeError(f"{len(killed)} of {plan.kills} workers were killed")
    return took, {file.name: file.read_bytes() for file in sorted(clips.iterdir())}


def same(files: dict[str, bytes], expected: dict[str, bytes] | None) -> dict[str, bytes]:
    """The files expected; RuntimeError for others. None expects what comes first."""
    expected = files if expected is None else expected
    other = [name for name in expected if files.get(name) != expected[name]]
    if other or files.keys() != expected.keys():
        raise RuntimeError(f"other bytes: {other or sorted(files)}")
    return expected


def kill_some(process: subprocess.Popen, plan: Plan, clips: Path, killed: list[int]) -> None:
    """Kills a worker at a time, at moments of a seed: so long after so many clips are there."""
    chance = random.Random(0)
    last = max(0.5, plan.clips - 6)  # later, all might be done before
    moments = sorted(chance.uniform(0.0, last) for _ in range(plan.kills))
    for moment in moments:
        while sum(1 for _ in clips.glob("*.mp4")) < int(moment) or not workers(process.pid):
            if process.poll() is not None:
                return
            time.sleep(0.02)
        time.sleep(moment % 1.0 / 2)
        for pid in chance.sample(found := workers(process.pid), min(1, len(found))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)


def workers(pid: int) -> list[int]:
    """Process ids of the workers of a command's own cluster; of those at work, if there are any."""
    found: dict[bool, list[int]] = {True: [], False: []}
    for raylet in children(pid):
        for child in children(raylet):
            try:
                title = Path(f"/proc/{child}/cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith((b"ray::BaseWorker", b"ray::ResidualWorker")):
                found[b"." in title].append(child)
    return found[True] or found[False]


def bench_ray(benchmark, capsys, short):
    plan = LEAST if short else REDUCED
    rows = benchmark.pedantic(measure, kwargs={"plan": plan}, rounds=1)
    benchmark.extra_info["rows"] = [vars(row) for row in rows]
    with capsys.disabled():
        print(f"\n{table(rows)}\n{verdicts(rows, TARGETS)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", help="folder of a model; the shipped one unless given")
    parser.add_argument("--clips", type=int, default=FULL.clips)
    parser.add_argument("--turns", type=int, default=FULL.turns)
    parser.add_argument("--kills", type=int, default=FULL.kills)
    flags = parser.parse_known_args()[0]
    plan = Plan(flags.clips, flags.turns, flags.kills, flags.model)
    targets = [Target(plan.case, RAY, "overhead", 10, at_most=True)]
    main(partial(measure, plan), __doc__, targets, parser)
