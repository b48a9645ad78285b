"""Commands under a limit on their memory: they do their work, or say in a line that they cannot.

python tests/tools/limit_memory.py [--only generate|batch|train|shipped] [--mebibytes 0 4 16 ...]

A process that has imported torch forks each command with so much address space beside its own
(RLIMIT_AS). Its end must be status 0, or status 1 or 2 and a line; never a signal, a traceback, or
a file that is half there.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from kill_commands import CASES, contents, finished, forked

PATIENCE = 300.0  # seconds, after which a command is said to hang
SIZES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)


def address_space() -> int:
    """Bytes of this process's."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def limited(argv: list[str], log: Path, mebibytes: int) -> int | None:
    """The status of a command with so much more memory; None for one that hangs."""

    def limit() -> None:
        most = address_space() + (mebibytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    return finished(forked(argv, log, limit), PATIENCE)


def shipped(output: Path, begun: bool) -> list[str]:
    flags = ["--label", "cartwheel", "--device", "cpu", "--num-inference-steps", 2]
    return ["generate", *map(str, flags), "--output", f"{output}.mp4"]


def problems(status: int | None, said: str) -> list[str]:
    """What is wrong with an end."""
    wrong = ["it hangs"] if status is None else []
    if status is not None and status not in (0, 1, 2):
        wrong.append(f"status {status}")
    if "Traceback" in said:
        wrong.append(f"a traceback: {said.strip().splitlines()[-1]}")
    if status and "error:" not in said:
        wrong.append(f"no error: {said[-200:]!r}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description="Run commands with little memory.")
    parser.add_argument("--only", choices=[*CASES, "shipped"])
    parser.add_argument("--mebibytes", type=int, nargs="+", default=SIZES)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in [flags.only] if flags.only else [*CASES, "shipped"]:
            folder = Path(temporary) / name
            folder.mkdir()
            argv = shipped if name == "shipped" else CASES[name](folder).argv
            statuses = Counter()
            for size in flags.mebibytes:
                output, log = folder / f"with-{size}", folder / "log"
                status = limited(argv(output, False), log, size)
                statuses[status] += 1
                found = problems(status, log.read_text())
                if output.exists() and status != 0:
                    found += [f"a half file: {f}" for f in output.rglob(".*")]
                    found += [
                        f"an empty file: {f}" for f, data in contents(output).items() if not data
                    ]
                wrong += len(found)
                print(
                    f"{name}, {size} MiB more: status {status}; {'; '.join(found) or 'right'}",
                    flush=True,
                )
            print(f"{name}: {dict(statuses)}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
