"""One run on a machine with an NVIDIA GPU that answers what no other machine can: `make gpu-check`.

A GPU may be available for minutes only. So every section is a process of its own, with a time
limit, and is killed with its children. Its results are appended to gpu.jsonl line by line, each on
disk at once. A section that no longer fits the budget is recorded as skipped. A missing package
costs its own rows only. Sections that compile or check run in parallel; timed ones run alone.

    python benchmarks/gpu_check.py [--budget SECONDS] [--only NAMES] [--until NAME] [--out FOLDER]

Writes FOLDER/gpu.jsonl (appended to; the format is gpu_run/results.py's) and FOLDER/gpu.log.
`python benchmarks/gpu_report.py` makes a page of it. Exit status, which speaks of correctness
alone: 0 nothing was found wrong, 1 something was, 2 no NVIDIA GPU that torch can use, or bad usage.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from gpu_run import results as gpu_results

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
SITE = ROOT / "build" / "gpu-site"
FAILED = "failed"  # --only failed: what failed, was skipped or has not run yet
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Section:
    """A program of gpu_run.sections.

    stage     those of one stage run beside one another, stages after one another
    expected  seconds, the least that are of use: a section that has not as many left is skipped
    limit     seconds, after which it is killed
    checks    whether it speaks of correctness: cut off, it has failed
    prepares  compiles for the section of this name, ahead of it
    """

    name: str
    stage: int
    expected: float
    limit: float
    checks: bool = False
    prepares: str = ""

    @property
    def module(self) -> str:
        return f"gpu_run.sections.{self.prepares or self.name}"


SECTIONS = (  # in the order of their worth
    Section("build", 0, 70, 200, checks=True),
    Section("ceilings", 0, 6, 40),
    Section("smoke", 1, 18, 60, checks=True),
    Section("tests", 2, 100, 170, checks=True),
    Section("prepare network_ops", 2, 45, 100, prepares="network_ops"),
    Section("prepare table4", 2, 60, 120, prepares="table4"),
    Section("prepare peers", 2, 60, 120, prepares="peers"),
    Section("prepare unet3d", 2, 80, 150, prepares="unet3d"),
    Section("capture", 3, 15, 70),
    Section("profile", 4, 20, 90),
    Section("table4", 5, 60, 150),
    Section("kernels", 6, 25, 60),
    Section("network_ops", 7, 40, 90),
    Section("steps", 8, 30, 60),
    Section("memory", 9, 45, 120),
    Section("peers", 10, 35, 120),
    Section("unet3d", 11, 60, 150),
    Section("variants", 12, 40, 90),
    Section("counters", 13, 15, 70),
    Section("sanitizers", 14, 100, 170, checks=True),
    Section("train", 15, 270, 450),
)
NAMES = tuple(section.name for section in SECTIONS)


class Journal:
    """Appends lines to gpu.jsonl, each on disk before the next; and says in short what happens."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.start = time.monotonic()
        self.run = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{os.getpid()}"
        self.gpu, self.failures = "", 0
        self.found: dict[str, list[dict]] = {}
        self._file = (folder / "gpu.jsonl").open("ab")
        self._log = (folder / "gpu.log").open("ab", buffering=0)
        self._lock = threading.Lock()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run writes to {folder / 'gpu.jsonl'}") from None
        if self._file.tell():
            self._file.write(b"\n")  # a killed run may have left half a line

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def write(self, section: str, **line: object) -> None:
        """A line; what is not given is empty."""
        empty = {
            "case": "",
            "contender": "",
            "metric": "",
            "value": None,
            "unit": "",
            "spread": None,
            "n": None,
            "graph": False,
            "dtype": "",
            "status": "measured",
            "note": "",
        }
        place = {
            "section": section,
            "gpu": self.gpu,
            "time": round(self.seconds, 3),
            "run": self.run,
        }
        whole = empty | line | place
        try:
            gpu_results.validate(whole)
        except ValueError as error:
            note = f"the section wrote {line}: {error}"
            whole = empty | place | {"status": "failed", "note": note[:600]}
        with self._lock:
            self.found.setdefault(section, []).append(whole)
            self.failures += whole["status"] == "failed"
            self._file.write(json.dumps(whole).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        if whole["status"] == "failed":
            names = (whole["case"], whole["contender"], whole["dtype"])
            self.say(f"FAILED {section}: {', '.join(filter(None, names))}: {whole['note']}")

    def say(self, what: str) -> None:
        print(f"gpu-check {self.seconds:6.1f} s  {what}", flush=True)

    def log(self, section: str, text: bytes) -> None:
        with self._lock:
            self._log.write(
                b"".join(b"[%s] %s\n" % (section.encode(), x) for x in text.split(b"\n"))
            )


class Runner:
    """Runs sections as processes; all that still run are killed at the end, however it comes."""

    def __init__(self, journal: Journal, environment: dict[str, str]) -> None:
        self.journal, self.environment = journal, environment
        self._running: set[subprocess.Popen] = set()

    def stage(self, sections: Sequence[Section], budget: float) -> None:
        """Runs those that fit, in parallel."""
        threads = []
        for section in sections:
            left = budget - self.journal.seconds
            if section.expected > left:
                note = f"{section.expected:.0f} s expected, {max(left, 0):.0f} s left"
                self.journal.write(section.name, status="skipped", note=note)
                self.journal.say(f"{section.name}: skipped, {note}")
                continue
            threads.append(threading.Thread(target=self._run, args=(section, left)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _run(self, section: Section, left: float) -> None:
        limit, start = min(section.limit, left), self.journal.seconds
        command = [sys.executable, "-m", section.module]
        command += [str(SITE)] if section.name == "build" else []
        command += ["--prepare"] if section.prepares else []
        process = self.start(command)
        tail: list[bytes] = []
        readers = [
            threading.Thread(target=self._read, args=(section.name, process)),
            threading.Thread(target=self._keep, args=(section.name, process, tail)),
        ]
        for reader in readers:
            reader.start()
        cut = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            cut = True
        self.kill(process)
        for reader in readers:
            reader.join(5)
        seconds = self.journal.seconds - start
        if cut:
            status = "failed" if section.checks else "skipped"
            self.journal.write(section.name, status=status, note=f"cut off after {seconds:.0f} s")
        elif process.returncode:
            words = b" ".join(tail[-3:]).decode(errors="replace")[-500:]
            note = f"ended with exit status {process.returncode}: {words}"
            self.journal.write(section.name, status="failed", note=note)
        self.journal.write(section.name, status="done", value=seconds, unit="s")
        lines = self.journal.found[section.name]
        counts = {s: sum(x["status"] == s for x in lines) for s in gpu_results.STATUSES}
        told = [f"{n} {s}" for s, n in counts.items() if n and s != "done"]
        self.journal.say(f"{section.name}: {seconds:.1f} s; {', '.join(told) or 'nothing to tell'}")

    def start(self, command: Sequence[str]) -> subprocess.Popen:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        self._running.add(process)
        return process

    def kill(self, process: subprocess.Popen) -> None:
        """The process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._running.discard(process)

    def kill_all(self) -> None:
        for process in list(self._running):
            self.kill(process)

    def _read(self, section: str, process: subprocess.Popen) -> None:
        """Lines of the section's, as they come; what is no line goes to the log."""
        for raw in process.stdout:
            try:
                line = json.loads(raw)
                if not isinstance(line, dict):
                    raise ValueError
            except ValueError:
                self.journal.log(section, raw.rstrip(b"\n"))
            else:
                self.journal.write(section, **line)

    def _keep(self, section: str, process: subprocess.Popen, tail: list[bytes]) -> None:
        for raw in process.stderr:
            self.journal.log(section, raw.rstrip(b"\n"))
            tail.append(raw.strip())
            del tail[:-5]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def environment(dry: bool, module: Path | None, out: Path) -> dict[str, str]:
    """The environment of sections: our sources, the built module, one thread a process.

    out: where a section may leave files
    """
    tools = ROOT / "tests" / "tools"
    paths = [str(module or SITE), str(ROOT), str(BENCHMARKS), str(tools)]
    if dry:
        paths = [*paths[1:], os.environ.get("PYTHONPATH", "")]
    elif former := os.environ.get("PYTHONPATH"):
        paths.append(former)
    values = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    values["VFENGINE_GPU_OUT"] = str(out.resolve())
    values["OMP_NUM_THREADS"] = "1"  # many processes on few cores: teams would wait for each other
    values.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "6")  # others compile and test meanwhile
    if dry:
        stand_ins = str(tools / "gpu_tools")  # for ncu and compute-sanitizer
        values |= {
            "VFENGINE_GPU_CHECK": "dry",
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PATH": os.pathsep.join([stand_ins, os.environ["PATH"]]),
        }
    return values


def facts(runner: Runner) -> dict | None:
    """Facts of the machine (gpu_run/sections/facts.py); None: no GPU that torch can use."""
    process = runner.start([sys.executable, "-m", "gpu_run.sections.facts"])
    out, err = process.communicate()
    runner.kill(process)
    runner.journal.log("facts", err)
    if process.returncode == 2:
        return None
    if process.returncode:
        return {"gpu": "unknown", "error": err.decode(errors="replace")[-500:]}
    return json.loads(out.splitlines()[-1])


def chosen(only: str | None, until: str | None, folder: Path, module: Path | None, dry: bool):
    """The sections to run. ValueError for a name that is none."""
    names = set(NAMES)
    if only == FAILED:
        names = _unfinished(folder)
    elif only:
        names = set(only.split(","))
    for name in (*names, *filter(None, [until])):
        if name not in NAMES:
            raise ValueError(
                f"unknown section {name!r}, expected {FAILED} or of {', '.join(NAMES)}"
            )
    last = SECTIONS[NAMES.index(until)].stage if until else SECTIONS[-1].stage
    if module is not None or dry:
        names.discard("build")
    else:
        names.add("build")
    # Compilers run in parallel ahead of what they compile for, and one after another inside it.
    return [s for s in SECTIONS if s.stage <= last and names & {s.name, s.prepares}]


def within(budget: float, sections: Sequence[Section]) -> list[Section]:
    """The sections without preparations for what will not fit the budget (seconds) anyway."""
    fit, start = set(), 0.0
    for stage in sorted({s.stage for s in sections}):
        timed = [s for s in sections if s.stage == stage and not s.prepares]
        fit |= {s.name for s in timed if start + s.expected <= budget}
        start += max((s.expected for s in timed if s.name in fit), default=0.0)
    return [s for s in sections if not s.prepares or s.prepares in fit]


def _unfinished(folder: Path) -> set[str]:
    """Sections that failed, were skipped in part or whole, or have never run."""
    results = gpu_results.read(folder / "gpu.jsonl")
    names = set()
    for section in SECTIONS:
        if section.prepares:
            continue
        if section.name not in results.sections:
            names.add(section.name)
            continue
        lines = results.latest(section.name).lines
        mine = [x["status"] for x in lines if x["section"] == section.name]
        if "done" not in mine or {"failed", "skipped"} & set(mine):
            names.add(section.name)
    return names


def run(arguments: argparse.Namespace) -> int:
    wanted = chosen(
        arguments.only, arguments.until, arguments.out, arguments.module, arguments.dry_run
    )
    wanted = within(arguments.budget, wanted)
    journal = Journal(arguments.out)
    choices = tempfile.TemporaryDirectory()  # measured ones: sections share them, runs do not
    values = environment(arguments.dry_run, arguments.module, arguments.out)
    runner = Runner(journal, values | {"XDG_CACHE_HOME": choices.name})

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        head = facts(runner)
        if head is None:
            print("gpu-check: torch sees no NVIDIA GPU here; nothing was run", file=sys.stderr)
            return 2
        journal.gpu = str(head["gpu"])
        head |= {"budget_s": arguments.budget, "date": f"{datetime.now(timezone.utc):%Y-%m-%d}"}
        journal.write("head", status="head", note=json.dumps(head))
        journal.say(", ".join(f"{key} {value}" for key, value in head.items()))
        for stage in sorted({section.stage for section in wanted}):
            runner.stage([s for s in wanted if s.stage == stage], arguments.budget)
            if journal.found.get("build") and not _passed(journal, "build"):
                break
            if stage == 1 and _native_failed(journal):
                runner.environment["VFENGINE_KERNEL_BACKEND"] = "triton"
                journal.say("a kernel in CUDA C++ failed: what follows runs Triton's")
        after = {
            k: v for k, v in (facts(runner) or {}).items() if "mhz" in k or k == "temperature_c"
        }
        status = 1 if journal.failures else 0
        journal.write("tail", status="tail", note=json.dumps(after | {"exit_status": status}))
        journal.say(f"{journal.failures} failed, see {arguments.out / 'gpu.jsonl'}")
        return status
    finally:
        runner.kill_all()
        choices.cleanup()


def _passed(journal: Journal, section: str) -> bool:
    return any(line["status"] == "passed" for line in journal.found.get(section, []))


def _native_failed(journal: Journal) -> bool:
    """Whether smoke found a wrong CUDA C++ kernel, or broke off, as only such a kernel makes it."""
    lines = journal.found.get("smoke", [])
    return any(line["status"] == "failed" and line["contender"] in ("cuda", "") for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=560, metavar="SECONDS", help="of the whole")
    parser.add_argument("--only", metavar="NAMES", help=f"sections, by commas; or {FAILED!r}")
    parser.add_argument("--until", metavar="NAME", help="the last section to run")
    parser.add_argument("--list", action="store_true", help="show the sections and run nothing")
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="default: here")
    parser.add_argument("--module", type=Path, metavar="FOLDER", help="of a built vfengine_native")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU, without a GPU")
    arguments = parser.parse_args()
    if arguments.list:
        for section in SECTIONS:
            print(f"{section.stage:2}  {section.name:20}{section.expected:5.0f} s")
        return 0
    try:
        return run(arguments)
    except ValueError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
