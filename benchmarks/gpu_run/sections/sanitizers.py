"""compute-sanitizer over every kernel on small shapes: memory, races, reads of nothing, barriers.

Torch's caching allocator is off, so that an access beyond a tensor is one beyond its memory. Only
our own kernels are checked, by the beginning of their mangled names. But initcheck has to see every
kernel, since it must know what all of them wrote; only reads by our kernels count.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_run.sections import BACKENDS, DEVICE, DRY, emit, verdict

ROOT = Path(__file__).resolve().parents[3]
NATIVE, TRITON = BACKENDS
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
RUNS = [(tool, NATIVE, "race") for tool in TOOLS] + [("memcheck", TRITON, "gpu")]  # of SETS
OURS = {"cuda": "_ZN2vf", "cpu": "_ZN2vf", "triton": "_kernel"}  # torch has more of the last kind
READ_BY_US = re.compile(r"Uninitialized .* read of size \d+ bytes\n=+\s+at .*\bvf::")
FOUND = 86  # the exit status that says that the tool found something


def run(tool: str, backend: str, shapes: str) -> None:
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "100000"]
    command += [] if tool == "initcheck" else ["--kernel-regex", f"kns={OURS[backend]}"]
    command += ["--error-exitcode", str(FOUND), sys.executable, "tests/ops/kernel_cases.py"]
    command += [backend, "--shapes", shapes, "--device", DEVICE]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(f"== {tool} on {backend}\n{done.stdout[-6000:]}", file=sys.stderr)
    summary = [x for x in done.stdout.splitlines() if "SUMMARY" in x]
    note = (summary or done.stdout.splitlines() or ["no output"])[-1].strip("= ")
    note = f"{note}, exit status {done.returncode}"
    passed = done.returncode == 0
    if tool == "initcheck" and done.returncode == FOUND:
        ours = READ_BY_US.findall(done.stdout)
        passed, note = not ours, f"{note}; {len(ours)} of them reads by our kernels"
    verdict(tool, passed, note, contender=backend)


def main() -> None:
    if shutil.which("compute-sanitizer") is None:
        emit("compute-sanitizer", status="unavailable", note="compute-sanitizer is not on PATH")
        return
    runs = [("memcheck", NATIVE, "small")] if DRY else RUNS
    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(lambda these: run(*these), runs))


if __name__ == "__main__":
    main()
