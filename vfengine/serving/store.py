"""Jobs on disk: a row of SQLite each, and a folder of files beside it.

The database decides. A job exists once its row is committed, so a process that is killed loses no
accepted job. A clip is finished once its row says so: its file was complete under its name before.
Files without a row are rubbish, and are removed. Several processes use one store at a time: the
server, which adds and deletes jobs, and the engines, which claim and finish them.

    FOLDER/jobs.sqlite3              rows (WAL)
    FOLDER/server.lock               locked by the one server that uses the folder
    FOLDER/jobs/<id>/video.mp4 …     files of a job
    FOLDER/base_paths/               base paths, by what decides them (pipelines/base_cache.py)

Nothing here imports torch.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .jobs import Job, JobSettings

_PATIENCE = 30.0  # seconds that one process waits for another's writing
MAX_ATTEMPTS = 3  # engines that may die of one job before it has failed
MAX_OUTAGES = 10  # ends of server and engine at once, of which the job is hardly the cause
_RUBBISH = 3600.0  # seconds that a folder without a row is left, for its upload may go on
_ID = frozenset("0123456789abcdef_video")
_OWN = "status = 'in_progress' AND worker = ?"  # no worker touches what has become another's
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    seq          INTEGER PRIMARY KEY AUTOINCREMENT,
    id           TEXT NOT NULL UNIQUE,
    request_key  TEXT UNIQUE,
    status       TEXT NOT NULL,
    shape        TEXT NOT NULL,
    settings     TEXT NOT NULL,
    model        TEXT NOT NULL,
    seconds      TEXT NOT NULL,
    size         TEXT NOT NULL,
    phase        TEXT NOT NULL DEFAULT '',
    progress     INTEGER NOT NULL DEFAULT 0,
    has_base     INTEGER NOT NULL DEFAULT 0,
    attempts     INTEGER NOT NULL DEFAULT 0,
    outages      INTEGER NOT NULL DEFAULT 0,
    worker       TEXT,
    created_at   REAL NOT NULL,
    started_at   REAL,
    completed_at REAL,
    expires_at   REAL,
    remixed_from TEXT,
    result       TEXT NOT NULL DEFAULT '{}',
    error        TEXT
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, seq);
CREATE INDEX IF NOT EXISTS jobs_by_expiry ON jobs (expires_at);
PRAGMA user_version = 1;
"""


class QueueFull(Exception):
    """As many jobs wait as may."""


class Store:
    """The jobs of a folder, which is made if it is not there.

    durable: whether a commit outlasts a loss of power, as what was accepted must; progress need not

    Its methods may be called from any thread. They raise sqlite3.Error or OSError for a disk that
    does not work; ValueError for a folder that holds another version's jobs.
    """

    def __init__(self, folder: str | Path, durable: bool = True) -> None:
        self.folder = Path(folder)
        self.base_paths = self.folder / "base_paths"
        self._jobs = self.folder / "jobs"
        self._jobs.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._held: sqlite3.Connection | None = None
        self._rubbish: dict[Path, float] = {}  # when a folder was first seen without a row
        self._db = sqlite3.connect(
            self.folder / "jobs.sqlite3",
            timeout=_PATIENCE,
            isolation_level=None,  # transactions are ours to begin
            check_same_thread=False,
        )
        self._db.row_factory = sqlite3.Row
        end = time.monotonic() + _PATIENCE
        while not self._opened():
            if time.monotonic() > end:
                raise sqlite3.OperationalError(f"{self.folder}: the jobs are locked")
            time.sleep(0.01)
        self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version != 1:
            raise ValueError(f"{self.folder}: jobs of another version ({version}), expected 1")

    def _opened(self) -> bool:
        """Makes the tables if there are none; False where others are at it, whatever the timeout.

        SQLite does not wait where a database becomes one in WAL mode.
        """
        try:
            self._db.execute("PRAGMA journal_mode = WAL")
            if self._db.execute("PRAGMA user_version").fetchone()[0] == 0:
                self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        except sqlite3.OperationalError as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if "locked" not in str(error):
                raise
            return False
        return True

    def close(self) -> None:
        self.let_go()
        with self._lock:
            self._db.close()

    def hold(self) -> None:
        """Makes this the folder's one server, until `let_go` or the process's end.

        Raises ValueError where another is.
        """
        if self._held is not None:
            return
        held = sqlite3.connect(
            self.folder / "server.lock", timeout=0, isolation_level=None, check_same_thread=False
        )
        try:
            held.execute("BEGIN EXCLUSIVE")  # a lock that works on every system
        except sqlite3.OperationalError as error:
            held.close()
            raise ValueError(f"{self.folder}: another server uses this folder") from error
        self._held = held

    def let_go(self) -> None:
        """Ends `hold`."""
        if self._held is not None:
            self._held.close()
            self._held = None

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk may have ended it
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    # -- files -------------------------------------------------------------------------------------

    def folder_of(self, job_id: str) -> Path:
        """The folder of a job's files. ValueError for what is no id, so that no path gets out."""
        if not job_id.startswith("video_") or not set(job_id) <= _ID or len(job_id) > 64:
            raise ValueError(f"expected the id of a video, got {job_id[:80]!r}")
        return self._jobs / job_id

    def file(self, job_id: str, name: str) -> Path:
        """A file of a job, which may not be there yet: "video.mp4", "thumbnail.png", "upload" …"""
        return self.folder_of(job_id) / name

    # -- what the server does ----------------------------------------------------------------------

    def add(self, job: Job, max_queue: int, request_key: str | None = None) -> Job:
        """Takes a job in, whose files are complete in its folder; returns it.

        request_key: a name of the request by its sender; a second one with it is not taken in, and
                     the first's job is returned

        Raises QueueFull, once max_queue jobs wait.
        """
        with self._writing() as db:
            if request_key is not None:
                found = db.execute("SELECT * FROM jobs WHERE request_key = ?", (request_key,))
                row = found.fetchone()
                if row is not None:
                    return _job(row)
            if self.count("queued") >= max_queue:
                raise QueueFull
            db.execute(
                "INSERT INTO jobs (id, request_key, status, shape, settings, model, seconds, size,"
                " created_at, expires_at, remixed_from) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(job.id, request_key, job.status, job.settings.shape),
                    *(job.settings.to_json(), job.model, job.seconds, job.size),
                    *(job.created_at, job.expires_at, job.remixed_from),
                ),
            )
        return job

    def get(self, job_id: str) -> Job | None:
        rows = self._rows("SELECT * FROM jobs WHERE id = ?", job_id)
        return _job(rows[0]) if rows else None

    def list(
        self, after: str | None = None, limit: int = 20, order: str = "desc"
    ) -> tuple[list[Job], bool]:
        """A page of jobs by age, and whether there are more. KeyError for an unknown `after`."""
        descending = order == "desc"
        bound = 2**62 if descending else 0
        if after is not None:
            rows = self._rows("SELECT seq FROM jobs WHERE id = ?", after)
            if not rows:
                raise KeyError(after)
            bound = rows[0]["seq"]
        sign, direction = ("<", "DESC") if descending else (">", "ASC")
        query = f"SELECT * FROM jobs WHERE seq {sign} ? ORDER BY seq {direction} LIMIT ?"
        rows = self._rows(query, bound, limit + 1)
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, job_id: str) -> bool:
        """Removes a job and its files; an engine that makes it stops. False: there is none."""
        with self._writing() as db:
            found = db.execute("DELETE FROM jobs WHERE id = ?", (job_id,)).rowcount > 0
        if found:
            shutil.rmtree(self.folder_of(job_id), ignore_errors=True)
        return found

    def count(self, status: str) -> int:
        return self._rows("SELECT count(*) FROM jobs WHERE status = ?", status)[0][0]

    def ahead(self, job_id: str) -> int:
        """How many jobs wait before this one."""
        query = (
            "SELECT count(*) FROM jobs WHERE status = 'queued' AND "
            "seq < (SELECT seq FROM jobs WHERE id = ?)"
        )
        return self._rows(query, job_id)[0][0]

    def expire(self, now: float, unused_paths: float) -> int:
        """Removes finished jobs whose time is over, and rubbish; returns the number of jobs.

        now:          by the clock on the wall, as the jobs' times are
        unused_paths: base paths that were not used for so many seconds go as well
        """
        done = "status IN ('completed', 'failed') AND expires_at <= ?"
        expired = self._rows(f"SELECT id FROM jobs WHERE {done}", now)
        for row in expired:
            self.delete(row["id"])
        self._remove_rubbish()
        for file in self.base_paths.glob("*.safetensors"):  # what is being written ends in .part
            if now - _modified(file, now) > unused_paths:
                file.unlink(missing_ok=True)
        return len(expired)

    def _remove_rubbish(self) -> None:
        """Removes folders of jobs that were deleted, or whose upload was broken off.

        Their age is measured here, so that a clock that is set forward ends no upload.
        """
        now, seen = time.monotonic(), {}
        for folder in self._jobs.iterdir():
            if self.exists(folder.name):
                continue
            seen[folder] = self._rubbish.get(folder, now)
            if now - seen[folder] > _RUBBISH:
                shutil.rmtree(folder, ignore_errors=True)
        self._rubbish = seen

    def recover(
        self, alive: Iterable[str] = (), keep: float | None = None, outage: bool = False
    ) -> list[str]:
        """Queues again what engines other than these were at; returns the ids.

        keep:   seconds for which a job is kept that has failed: MAX_ATTEMPTS engines died of it
        outage: whether the server ended as well. Jobs are then queued again MAX_OUTAGES times,
                unblamed
        """
        names = list(alive)
        others = "" if not names else f" AND worker NOT IN ({','.join('?' * len(names))})"
        running = f"status = 'in_progress'{others}"
        with self._writing() as db:
            rows = db.execute(
                f"SELECT id, attempts, outages FROM jobs WHERE {running}", names
            ).fetchall()
            for row in rows:
                ends, most = row["attempts"], MAX_ATTEMPTS
                if outage:
                    ends, most = row["outages"] + 1, MAX_OUTAGES
                if ends < most:
                    db.execute(
                        "UPDATE jobs SET status = 'queued', worker = NULL, phase = '', "
                        "progress = 0, started_at = NULL, attempts = attempts - ?, "
                        "outages = outages + ? WHERE id = ?",
                        (outage, outage, row["id"]),
                    )
                    continue
                message = f"the engine ended {most} times while it made this clip"
                _give_up(db, "engine_died", message, keep, "id = ?", row["id"])
        return [row["id"] for row in rows]

    def refuse_other_models(self, model: str, keep: float | None = None) -> int:
        """Jobs that were asked of another model have failed; returns their number.

        keep: seconds for which they are kept
        """
        message = f"it was asked of another model than {model}, which is served now"
        others = "status IN ('queued', 'in_progress') AND model <> ?"
        with self._writing() as db:
            return _give_up(db, "model_not_served", message, keep, others, model)

    # -- what an engine does -----------------------------------------------------------------------

    def claim(self, worker: str, most: int = 1) -> list[Job]:
        """The job that has waited longest, and others of its shape, now in progress; or none.

        A job at which an engine has died is alone, lest it takes others with it again.
        """
        if not self._rows("SELECT 1 FROM jobs WHERE status = 'queued' LIMIT 1"):
            return []  # without waiting for those who write
        with self._writing() as db:
            first = db.execute(
                "SELECT seq, shape, attempts FROM jobs WHERE status = 'queued' ORDER BY seq LIMIT 1"
            ).fetchone()
            if first is None:
                return []
            rows = db.execute(
                "SELECT id FROM jobs WHERE status = 'queued' AND shape = ? "
                "AND (attempts = 0 OR seq = ?) ORDER BY seq LIMIT ?",
                (first["shape"], first["seq"], 1 if first["attempts"] else most),
            ).fetchall()
            now = time.time()
            for row in rows:
                db.execute(
                    "UPDATE jobs SET status = 'in_progress', worker = ?, started_at = ?, "
                    "attempts = attempts + 1 WHERE id = ?",
                    (worker, now, row["id"]),
                )
        return [job for job in (self.get(row["id"]) for row in rows) if job is not None]

    def report(
        self,
        job_id: str,
        worker: str,
        phase: str,
        progress: int,
        has_base: bool | None = None,
    ) -> bool:
        """Notes how far a job has come; False: it was deleted, or is another's, so stop."""
        with self._writing() as db:
            changed = db.execute(
                "UPDATE jobs SET phase = ?, progress = max(progress, ?), "
                f"has_base = coalesce(?, has_base) WHERE id = ? AND {_OWN}",
                (phase, progress, has_base, job_id, worker),
            )
            return changed.rowcount > 0

    def exists(self, job_id: str) -> bool:
        return bool(self._rows("SELECT 1 FROM jobs WHERE id = ?", job_id))

    def holds(self, job_id: str, worker: str) -> bool:
        """Whether a worker still has to make a job that it claimed."""
        return bool(self._rows(f"SELECT 1 FROM jobs WHERE id = ? AND {_OWN}", job_id, worker))

    def finish(self, job_id: str, worker: str, result: dict, expires_at: float | None) -> bool:
        """A job whose files are complete is completed; False: it was deleted, or is another's."""
        return self._end(job_id, worker, "completed", "result", result, expires_at, 100)

    def fail(
        self, job_id: str, worker: str, code: str, message: str, expires_at: float | None
    ) -> bool:
        error = {"code": code, "message": message}
        return self._end(job_id, worker, "failed", "error", error, expires_at, None)

    def _end(
        self,
        job_id: str,
        worker: str,
        status: str,
        column: str,
        value: dict,
        expires_at: float | None,
        progress: int | None,
    ) -> bool:
        with self._writing() as db:
            changed = db.execute(
                f"UPDATE jobs SET status = ?, {column} = ?, completed_at = ?, expires_at = ?, "
                f"phase = '', worker = NULL, progress = coalesce(?, progress) "
                f"WHERE id = ? AND {_OWN}",
                (status, json.dumps(value), time.time(), expires_at, progress, job_id, worker),
            )
            found = changed.rowcount > 0
        if not found:
            self.sweep(job_id)
        return found

    def sweep(self, job_id: str) -> None:
        """Removes the files of a job that was deleted while an engine wrote them."""
        if not self.exists(job_id):
            shutil.rmtree(self.folder_of(job_id), ignore_errors=True)

    def requeue(self, job_ids: Iterable[str], worker: str) -> None:
        """Gives claimed jobs back, unblamed: an engine that stops in good order does so."""
        with self._writing() as db:
            for job_id in job_ids:
                db.execute(
                    "UPDATE jobs SET status = 'queued', worker = NULL, phase = '', progress = 0, "
                    f"started_at = NULL, attempts = attempts - 1 WHERE id = ? AND {_OWN}",
                    (job_id, worker),
                )


def _give_up(
    db: sqlite3.Connection, code: str, message: str, keep: float | None, which: str, *values: object
) -> int:
    """The jobs that a condition of SQL names have failed; returns their number."""
    error, now = json.dumps({"code": code, "message": message}), time.time()
    ended = db.execute(
        "UPDATE jobs SET status = 'failed', worker = NULL, phase = '', error = ?, "
        f"completed_at = ?, expires_at = ? WHERE {which}",
        (error, now, None if keep is None else now + keep, *values),
    )
    return ended.rowcount


def _modified(path: Path, default: float) -> float:
    """When a file was last written; the default where it has just been removed."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return default


def _job(row: sqlite3.Row) -> Job:
    plain = ("id", "model", "seconds", "size", "status", "phase", "progress", "attempts")
    times = ("created_at", "started_at", "completed_at", "expires_at", "remixed_from")
    return Job(
        **{name: row[name] for name in (*plain, *times)},
        settings=JobSettings.from_json(row["settings"]),
        has_base=bool(row["has_base"]),
        result=json.loads(row["result"]),
        error=None if row["error"] is None else json.loads(row["error"]),
    )
