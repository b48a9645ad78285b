"""pytest tests/gpu, in parallel; a line for every test that fails, as soon as it has."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from gpu_run.sections import DRY, emit, verdict

ROOT = Path(__file__).resolve().parents[3]
WORKERS = 10
FAILED = re.compile(  # as xdist's workers say it, and as pytest does without them
    r"^\[gw\d+\] \[ *\d+%\] (?:FAILED|ERROR) (tests/.+)|^(tests/.+) (?:FAILED|ERROR) +\[ *\d+%\]"
)
SUMMARY = re.compile(r"(?:FAILED|ERROR) (tests/.+?) - (.+)")


def main() -> None:
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-v", "-rfE", "--tb=short"]
    command += ["-p", "no:cacheprovider", "--color=no", "-W", "ignore", "--durations=15"]
    if importlib.util.find_spec("xdist") and not DRY:
        command += ["-n", str(WORKERS)]
    wide = {**os.environ, "COLUMNS": "400"}  # or pytest leaves out why
    pytest = subprocess.Popen(command, cwd=ROOT, env=wide, stdout=subprocess.PIPE, text=True)
    told, line = "", ""
    for line in pytest.stdout:
        print(line, end="", file=sys.stderr, flush=True)
        if summary := SUMMARY.match(line):  # after all, with the reason
            verdict(summary[1], False, summary[2], contender="pytest")
        elif failed := FAILED.match(line):
            verdict((failed[1] or failed[2]).strip(), False, contender="pytest")
        if re.match(r"=+ .* in [\d.]+s", line):
            told = line.strip().strip("= ")
    status = pytest.wait()
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", told)}
    for what in ("passed", "failed", "skipped"):
        emit("tests/gpu", "pytest", what, counts.get(what, 0))
    wanted = "skipped" if DRY else "passed"  # without a GPU every test says so
    passed = status == 0 and counts.get(wanted, 0) > 0
    verdict("tests/gpu", passed, told or f"exit status {status}", contender="pytest")


if __name__ == "__main__":
    main()
