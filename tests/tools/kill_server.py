"""kill -9 at random moments, while clients create videos: what was accepted is made all the same.

python tests/tools/kill_server.py --kills 50 [--seed 0] [--model FOLDER] [--steps 40]

Each time the server, an engine, or both end, or a server that has just been started. Then a server
starts on the same store. Clients send a request until it is answered, under one Idempotency-Key,
and go on with the next. At the end the jobs of the store are those that were answered, all are
completed, and their files are those of a run that nothing disturbed, byte for byte.
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server_process import Answer, ServerProcess, ask, engine_processes, runs, until

FORMATS = ("mp4", "webp", "webm", "gif")
KINDS = ("server", "engine", "both", "starting server")
WAITING = 6  # jobs that clients let wait


@dataclass
class Wanted:
    """A request: its fields, and the number of the one that it is a remix of."""

    fields: dict[str, Any]
    remix_of: int | None = None
    id: str = ""


@dataclass
class Outcome:
    """What happened, and what was wrong with it."""

    kills: Counter = field(default_factory=Counter)
    at_work: int = 0  # kills while a clip was made
    accepted: int = 0
    sent_again: int = 0  # creates that broke off before the answer
    made_again: int = 0  # jobs that more than one engine began
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kills = ", ".join(f"{self.kills[kind]} {kind}" for kind in KINDS if self.kills[kind])
        return (
            f"{self.kills.total()} kills ({kills}), {self.at_work} of them while a clip was made; "
            f"{self.accepted} accepted jobs, {self.sent_again} creates broken off and sent again, "
            f"{self.made_again} jobs begun again; {self.seconds:.0f} s\n"
            + "\n".join(self.wrong or ["all completed, byte for byte; database ok; no orphans"])
        )


class Clients:
    """Threads that create videos until `finish`."""

    def __init__(self, server: ServerProcess, count: int, steps: int, seed: int) -> None:
        self.server, self.steps = server, steps
        self.wanted: list[Wanted] = []
        self.broken = 0
        self.wrong: list[str] = []
        self._chance = random.Random(seed)
        self._lock, self._over = threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Returns once all that was begun has been answered."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while not self._over.is_set():
            wanted = self._next()
            name = f"request {id(wanted)} {wanted.fields['seed']}"
            while (answer := self._sent(wanted, name)) is None or answer.status == 429:
                time.sleep(0.05)
            if answer.status != 200:
                self.wrong.append(f"refused: {answer}")
                continue
            with self._lock:
                wanted.id = answer.json["id"]
                self.wanted.append(wanted)
            while not self._over.is_set() and self._waiting() >= WAITING:
                time.sleep(0.05)

    def _next(self) -> Wanted:
        with self._lock:
            chance = self._chance
            fields: dict[str, Any] = {"seed": chance.randrange(2**31)}
            if self.wanted and chance.random() < 0.3:
                return Wanted(fields, chance.randrange(len(self.wanted)))
            fields |= {"format": chance.choice(FORMATS), "num_inference_steps": self.steps}
            if chance.random() < 0.3:
                fields["base_seed"] = chance.randrange(3)  # paths that others walk as well
            return Wanted(fields)

    def _sent(self, wanted: Wanted, name: str) -> Answer | None:
        """None where the server has gone."""
        try:
            source = None if wanted.remix_of is None else self.wanted[wanted.remix_of].id
            return create(self.server, wanted.fields, source, idempotency_key=name)
        except ConnectionRefusedError:
            return None
        except (OSError, http.client.HTTPException):  # broken off: it may have been accepted
            self.broken += 1
            return None

    def _waiting(self) -> int:
        try:
            return ask(self.server.connect(), "GET", "/health").json["queued"]
        except (OSError, http.client.HTTPException):
            return 0


def create(server: ServerProcess, fields: dict, source: str | None, **headers: str) -> Answer:
    """Asks for a video, or for a remix of one."""
    connection = server.connect()
    try:
        if source is not None:
            return ask(connection, "POST", f"/v1/videos/{source}/remix", fields, **headers)
        if "prompt" not in fields:
            labels = ask(connection, "GET", "/v1/models").json["data"][0]["labels"]
            fields["prompt"] = labels[fields["seed"] % len(labels)] if labels else "a person walks"
        return ask(connection, "POST", "/v1/videos", fields, **headers)
    finally:
        connection.close()


def kill_often(
    folder: Path, model: Path | None, kills: int, seed: int = 0, clients: int = 4, steps: int = 40
) -> Outcome:
    """Kills the server of a store in this folder so many times, and looks at what is left.

    model: None is the shipped one
    """
    outcome, began = Outcome(), time.monotonic()
    chance = random.Random(seed)
    flags = [] if model is None else ["--model", model]
    server = ServerProcess(folder / "killed", folder / "killed.log", *flags)
    server.start()
    senders = Clients(server, clients, steps, seed)
    try:
        until(lambda: senders.wanted, "a first request")
        for _ in range(kills):
            kind = chance.choice(KINDS)
            time.sleep(chance.uniform(0.0, 2.0))
            outcome.kills[kind] += 1
            outcome.at_work += _count(server.store, "in_progress") > 0
            _kill(server, kind, chance)
        senders.finish()
        until(lambda: not _count(server.store, "queued", "in_progress"), "jobs to be made", 0.1)
        strays = set(engine_processes(server.store)) - set(server.engines())
        outcome.wrong += [f"an engine of an earlier server: {pid}" for pid in strays]
    finally:
        if runs(server.process.pid):
            server.stop()
    outcome.wrong += senders.wrong
    outcome.accepted, outcome.sent_again = len(senders.wanted), senders.broken
    calm = ServerProcess(folder / "calm", folder / "calm.log", *flags)
    again = _calm(calm, senders.wanted)
    _examine(server, senders.wanted, calm, again, outcome)
    outcome.seconds = time.monotonic() - began
    return outcome


def _kill(server: ServerProcess, kind: str, chance: random.Random) -> None:
    """Kills, and starts a server where there is none."""
    engines = server.engines()
    if kind != "engine":
        server.end(signal.SIGKILL)
    if kind in ("engine", "both"):
        for pid in engines:
            os.kill(pid, signal.SIGKILL)
    if kind == "starting server":
        server.launch()
        time.sleep(chance.uniform(0.0, 1.5))
        server.end(signal.SIGKILL)
    if kind != "engine":
        server.start()


def _calm(server: ServerProcess, wanted: list[Wanted]) -> list[str]:
    """The ids of the same requests, sent to a server that nobody kills, once they are made."""
    server.start()
    try:
        ids: list[str] = []
        for one in wanted:
            source = None if one.remix_of is None else ids[one.remix_of]
            until(lambda: _count(server.store, "queued") < 50, "a place in the queue")
            ids.append(create(server, one.fields, source).json["id"])
        until(lambda: not _count(server.store, "queued", "in_progress"), "jobs to be made", 0.1)
    finally:
        server.stop()
    return ids


def _examine(
    killed: ServerProcess, wanted: list[Wanted], calm: ServerProcess, ids: list[str], out: Outcome
) -> None:
    """Looks at the stores of both, whose servers have stopped."""
    rows = _rows(killed.store, "SELECT id, status, attempts + outages, error FROM jobs")
    known = {row[0] for row in rows}
    accepted = [one.id for one in wanted]
    out.made_again = sum(row[2] > 1 for row in rows)
    out.wrong += [f"lost: {name}" for name in accepted if name not in known]
    out.wrong += [f"done twice: {name}" for name in known - set(accepted)]
    out.wrong += [f"answered twice: {n}" for n, count in Counter(accepted).items() if count > 1]
    out.wrong += [f"not completed: {row}" for row in rows if row[1] != "completed"]
    for one, other in zip(wanted, ids, strict=True):
        made, expected = (_files(*pair) for pair in ((killed.store, one.id), (calm.store, other)))
        if made != expected or not any(name.startswith("video.") for name in made):
            out.wrong.append(f"other files: {one}: {sorted(made)} for {sorted(expected)}")
    check = _rows(killed.store, "PRAGMA integrity_check")
    if check != [("ok",)]:
        out.wrong.append(f"database: {check}")
    folders = {folder.name for folder in (killed.store / "jobs").iterdir()}
    out.wrong += [f"files of no job: {name}" for name in folders - known]
    out.wrong += [f"a half file: {file}" for file in killed.store.rglob("*.part")]
    out.wrong += [f"an orphan: {pid}" for pid in engine_processes(killed.store)]
    if "Traceback" in killed.log.read_text():
        out.wrong.append(f"a traceback: {killed.log.read_text()[-3000:]}")


def _files(store: Path, job_id: str) -> dict[str, bytes]:
    folder = store / "jobs" / job_id
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.is_dir() else {}


def _rows(store: Path, query: str, *values: object) -> list[tuple]:
    with closing(sqlite3.connect(store / "jobs.sqlite3", timeout=30)) as database:
        return database.execute(query, values).fetchall()


def _count(store: Path, *statuses: str) -> int:
    marks = ", ".join("?" * len(statuses))
    return _rows(store, f"SELECT count(*) FROM jobs WHERE status IN ({marks})", *statuses)[0][0]


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a server at random moments, under load.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--model", type=Path, help="the shipped one unless given")
    parser.add_argument("--folder", type=Path, help="where the stores are made, and stay")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        outcome = kill_often(
            folder, flags.model, flags.kills, flags.seed, flags.clients, flags.steps
        )
    print(outcome)
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
