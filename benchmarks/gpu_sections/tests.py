"""pytest tests/gpu, in parallel; a line for every test that fails."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from gpu_sections import DRY, emit, verdict

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 10


def main() -> None:
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-rfE", "--tb=short"]
    command += ["-p", "no:cacheprovider", "--color=no", "-W", "ignore"]
    if importlib.util.find_spec("xdist") and not DRY:
        command += ["-n", str(WORKERS)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr)
    counts = {
        what: int(number)
        for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", last(done.stdout))
    }
    for what in ("passed", "failed", "skipped"):
        emit("tests/gpu", "pytest", what, counts.get(what, 0))
    for line in done.stdout.splitlines():
        if match := re.match(r"(?:FAILED|ERROR) (\S+)(?: - (.*))?", line):
            verdict(match[1], False, match[2] or "", contender="pytest")
    wanted = "skipped" if DRY else "passed"  # without a GPU every test says so
    passed = done.returncode == 0 and counts.get(wanted, 0) > 0
    note = last(done.stdout) or f"exit status {done.returncode}"
    verdict("tests/gpu", passed, note, contender="pytest")


def last(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1].strip("= ") if lines else ""


if __name__ == "__main__":
    main()
