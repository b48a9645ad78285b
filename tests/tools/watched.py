"""Random cases in a child process: a crash or a hang of one is a finding, and the others go on.

A case is a function `case(chance, folder)`: `chance` decides everything, and may come from
hypothesis; `folder` is empty and is the current one. It returns a word that is counted, such as
"done" or "refused". It raises where something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

Case = Callable[[random.Random, Path], str]
LIMIT = 10.0  # seconds of one case
_HALF = (".part", ".new", ".old")  # endings of vfengine/files.py's temporary names


class Outcome(NamedTuple):
    """word: the case's own, or "wrong", "crash", "hang";  text: the traceback, or the signal"""

    number: int
    word: str
    text: str = ""

    @property
    def bad(self) -> bool:
        return self.word in ("wrong", "crash", "hang")


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Makes a new folder the current one, and the place of temporary files, which must go."""
    former, temporary = Path.cwd(), tempfile.tempdir
    tempfile.tempdir = str(folder / "tmp")
    os.makedirs(tempfile.tempdir)
    os.chdir(folder)
    try:
        yield
        left = [str(path) for path in Path("tmp").iterdir()]
        assert not left, f"temporary files were left: {left}"
        assert not half_files(folder), f"half-written: {half_files(folder)}"
    finally:
        os.chdir(former)
        tempfile.tempdir = temporary
        shutil.rmtree(folder)


def half_files(folder: Path) -> list[Path]:
    """Files below a folder that nobody finished or removed."""
    return [p for p in folder.rglob(".*") if p.name.endswith(_HALF)]


def run_case(case: Case, chance: random.Random, folder: Path) -> str:
    """One case in a new folder, here."""
    with working_in(folder):
        return case(chance, folder)


def watched(
    case: Case, seed: int, numbers: Iterable[int], folder: Path, limit: float = LIMIT
) -> Iterator[Outcome]:
    """The outcomes of these cases of a seed, in order, each run in a child forked from here."""
    left = list(numbers)
    while left:
        read, write = os.pipe()
        child = os.fork()
        trace = folder / f"{child or os.getpid()}.trace"
        if child == 0:
            os.close(read)
            _child(case, seed, left, folder, trace, write)
        os.close(write)
        done, word = 0, "crash"
        try:
            for outcome in _received(read, limit):
                done += 1
                yield outcome
        except TimeoutError:
            word = "hang"
        finally:
            os.close(read)
            # one that hangs writes where it is, and all end
            for end in (signal.SIGABRT, signal.SIGKILL) if word == "hang" else (signal.SIGKILL,):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, end)
                time.sleep(0.1 if end == signal.SIGABRT else 0)
            status = os.waitpid(child, 0)[1]
        trace = folder / f"{child}.trace"
        if done < len(left):
            yield Outcome(
                left[done],
                word,
                f"wait status {status}\n{trace.read_text() if trace.exists() else ''}",
            )
            done += 1
        trace.unlink(missing_ok=True)
        left = left[done:]


def _child(
    case: Case, seed: int, numbers: list[int], folder: Path, trace: Path, write: int
) -> None:
    """Never returns."""
    faulthandler.disable()  # else it leaves handlers that a library has put in place of its own
    faulthandler.enable(trace.open("w"))
    with os.fdopen(write, "w", buffering=1) as pipe:
        for number in numbers:
            place = folder / f"{os.getpid()}-{number}"
            try:
                word, text = run_case(case, random.Random(f"{seed}/{number}"), place), ""
            except BaseException:
                word, text = "wrong", traceback.format_exc()
            print(json.dumps([number, word, text]), file=pipe)
    os._exit(0)


def _received(pipe: int, limit: float) -> Iterator[Outcome]:
    """What a child tells until it ends; TimeoutError for a case that takes longer."""
    rest = b""
    while True:
        deadline = time.monotonic() + limit
        while b"\n" not in rest:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            block = os.read(pipe, 65536)
            if not block:
                return
            rest += block
        line, _, rest = rest.partition(b"\n")
        yield Outcome(*json.loads(line))


def main(cases: dict[str, Case], argv: list[str] | None = None) -> int:
    """Runs so many cases of a target, prints what is wrong, and one line of JSON; 1 if any is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=[*cases, "all"])
    parser.add_argument("--cases", type=int, default=1000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a case")
    options = parser.parse_args(argv)
    bad = 0
    for name in cases if options.target == "all" else [options.target]:
        words, started = Counter(), time.monotonic()
        numbers = range(options.first, options.first + options.cases)
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
            for outcome in watched(cases[name], options.seed, numbers, Path(folder), options.limit):
                words[outcome.word] += 1
                if outcome.bad:
                    bad += 1
                    print(f"{name} {outcome.number}: {outcome.word}\n{outcome.text}", flush=True)
                if words.total() % 1000 == 0:
                    told = f"{name}: to go on: --first {outcome.number + 1}; {dict(words)}"
                    print(told, file=sys.stderr, flush=True)
        result = {"target": name, "seed": options.seed, "first": options.first, **words}
        print(json.dumps({**result, "seconds": round(time.monotonic() - started)}), flush=True)
    return 1 if bad else 0
