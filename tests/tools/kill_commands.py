"""kill -9 at random moments of a batch and of a training, which go on with --resume.

python tests/tools/kill_commands.py --kills 100 [--seed 0] [--only generate|train] [--folder DIR]

A process that has imported torch forks each command, and kills it. What is there after a kill is
whole, and is what a run that nothing disturbed has written, byte for byte. A run that ends is
compared with that run; then it begins anew. Hidden files must not pile up. At last the command runs
twice at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from conftest import TINY_LABELS, save_tiny  # noqa: E402

from vfengine.cli import main as commands  # noqa: E402
from vfengine.files import open_tensors  # noqa: E402
from vfengine.formats.checkpoint import read_config, read_weights  # noqa: E402
from vfengine.media.video import write_video  # noqa: E402

ENDINGS = ("mp4", "webp", "gif", "webm", "png")
LINES = 20
SHAPE = (
    *("--num-frames", "4", "--size", "16", "--patch-size", "2", "--layers-per-block", "1,1"),
    *("--base-channels", "16,16", "--residual-channels", "16,16", "--precision", "fp32"),
    *("--batch-size", "2", "--extra-images", "2", "--warmup", "1", "--log-every", "1"),
)


@dataclass
class Outcome:
    """What happened, and what was wrong with it."""

    command: str
    kills: int = 0
    ended: int = 0  # runs that were over before their kill
    whole: int = 0  # runs that came to their end, over several kills, and were compared
    left: int = 0  # kills that left a hidden file
    most: int = 0  # hidden files at once
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.command}: {self.kills} kills, {self.left} of them while a file was written; "
            f"{self.whole} runs completed; hidden files at once: {self.most} at most; "
            f"{self.seconds:.0f} s\n" + "\n".join(self.wrong or ["all whole, byte for byte"])
        )


@dataclass
class Case:
    """A command, the folder that it writes, and what must hold after a kill."""

    name: str
    argv: Callable[[Path, bool], list[str]]  # of the folder, and whether a run has begun there
    check: Callable[[Path, dict[str, bytes]], list[str]]  # of the folder and an undisturbed one's


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but hidden ones and logs, which tell of times."""
    found = [f for f in sorted(folder.rglob("*")) if f.is_file() and not hidden(f, folder)]
    return {str(f.relative_to(folder)): f.read_bytes() for f in found if f.suffix != ".jsonl"}


def hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


# -- cases -----------------------------------------------------------------------------------------


def batch(folder: Path) -> Case:
    """20 lines, of all formats, some of two clips; base paths are kept for several."""
    model = save_tiny(folder / "model")
    lines = [
        {
            "label": TINY_LABELS[k % 3],
            "output": f"{{folder}}/clips/{k:02d}.{ENDINGS[k % 5]}",
            "num_videos": 1 + k % 2,
            "base_seed": k % 4,
            "residual_seed": k,
        }
        for k in range(LINES)
    ]

    def argv(output: Path, begun: bool) -> list[str]:
        file = output.with_name(f"{output.name}.lines")
        text = "\n".join(map(json.dumps, lines)).replace("{folder}", str(output))
        file.write_text(text)
        flags = ["--model", model, "--device", "cpu", "--dtype", "float32", "--resume"]
        flags += ["--num-inference-steps", 2, "--base-cache", output / "cache", "--batch-size", 1]
        return ["generate", "--prompts", str(file), *map(str, flags)]

    def check(output: Path, expected: dict[str, bytes]) -> list[str]:
        found = contents(output)
        return [f"another file: {name}" for name in found if found[name] != expected.get(name)]

    return Case("generate --prompts --resume", argv, check)


def training(folder: Path) -> Case:
    """6 steps, each of which is saved, with samples in the middle and at the end."""
    rng = np.random.default_rng(0)
    for name in ("left", "right"):
        (folder / "videos" / name).mkdir(parents=True)
        frames = rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
        write_video(folder / "videos" / name / "a.webp", frames)

    def argv(output: Path, begun: bool) -> list[str]:
        flags = ["--data", folder / "videos", "--output", output, "--steps", 6, "--save-every", 1]
        flags += [*SHAPE, "--sample-every", 3, *(["--resume"] if begun else [])]
        return ["train", *map(str, flags)]

    def check(output: Path, expected: dict[str, bytes]) -> list[str]:
        wrong = []
        if (output / "training.safetensors").exists():  # then all that goes with it is there
            with open_tensors(output / "training.safetensors") as state:
                assert all(state.get_tensor(name) is not None for name in state.keys())  # noqa: SIM118
            config = read_config(output / "checkpoint")
            for network in config.networks:
                read_weights(output / "checkpoint", network, config)  # compares SHA-256
        for name, data in contents(output).items():
            if name.startswith("samples/") and data != expected[name]:
                wrong.append(f"another file: {name}")
        for line in (output / "log.jsonl").read_text().splitlines() if output.exists() else ():
            json.loads(line)
        return wrong

    return Case("train --resume", argv, check)


CASES = {"generate": batch, "train": training}


# -- kills -----------------------------------------------------------------------------------------


def forked(argv: list[str], log: Path, first: Callable[[], None] = lambda: None) -> int:
    """The process of a command; first: what it does before."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            first()
            status = commands.main(argv)
            sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finished(pid: int, seconds: float) -> int | None:
    """The exit status of a process, None where it is killed after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if status == -signal.SIGKILL else status


def kill_often(
    folder: Path, name: str, kills: int, seed: int = 0, minutes: float = math.inf
) -> Outcome:
    """Kills a command so many times in a folder, and looks at what is left.

    minutes: after which no other kill follows
    """
    folder.mkdir(parents=True)
    case, chance, began = CASES[name](folder), random.Random(seed), time.monotonic()
    out, log = Outcome(case.name), folder / "log"

    def run(output: Path, seconds: float) -> int | None:
        begun = (output / "training.safetensors").exists()
        return finished(forked(case.argv(output, begun), log), seconds)

    calm = folder / "calm"
    started = time.monotonic()
    if run(calm, 1e9) != 0:
        raise RuntimeError(log.read_text())
    whole, expected = time.monotonic() - started, contents(calm)
    number = 0
    over = False
    while not over:
        output = folder / f"run-{number}"
        last = chance.uniform(0, whole)
        status = run(output, last)
        out.kills += status is None
        out.ended += status is not None
        left = list(output.rglob(".*")) if output.exists() else []
        out.left += bool(left) and status is None
        out.most = max(out.most, len(left))
        try:
            out.wrong += case.check(output, expected)
        except Exception as error:
            out.wrong.append(f"after {last:.3f} s: {type(error).__name__}: {error}")
        over = out.kills >= kills or time.monotonic() - began > 60 * minutes
        if status is None and not over:
            continue
        if status is None:
            status = run(output, 1e9)
        if status != 0:
            out.wrong.append(f"status {status}: {log.read_text()[-500:]}")
        out.wrong += [f"hidden: {f}" for f in output.rglob(".*")]
        found = contents(output)
        names = sorted(found.keys() | expected.keys())
        differ = [name for name in names if found.get(name) != expected.get(name)]
        out.wrong += [f"{output}: another result: {differ}"] if differ else []
        out.whole += 1
        number += 1
    out.seconds = time.monotonic() - began
    return out


def together(folder: Path, name: str) -> list[str]:
    """Runs a command twice at once, in one folder; returns what was wrong.

    Two batches write the same files, whole at any time. Of two trainings one is refused.
    """
    folder.mkdir(parents=True)
    case, wanted = CASES[name](folder), [0, 0] if name == "generate" else [0, 2]
    if finished(forked(case.argv(folder / "calm", False), folder / "log"), 1e9) != 0:
        raise RuntimeError((folder / "log").read_text())
    argv = case.argv(folder / "run", False)
    pids = [forked(argv, folder / f"log-{k}") for k in range(2)]
    statuses = sorted(finished(pid, 1e9) for pid in pids)
    found, expected = contents(folder / "run"), contents(folder / "calm")
    wrong = [] if statuses == wanted else [f"status {statuses}, expected {wanted}"]
    wrong += [f"hidden: {file}" for file in (folder / "run").rglob(".*")]
    return wrong if found == expected else [*wrong, f"another result: {sorted(found)}"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill commands at random moments.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=math.inf, help="for each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--folder", type=Path, help="where all is written, and stays")
    flags = parser.parse_args()
    torch.set_num_threads(1)  # a process that is forked has no other threads
    wrong = False
    with tempfile.TemporaryDirectory() as temporary:
        for name in [flags.only] if flags.only else CASES:
            folder = (flags.folder or Path(temporary)) / name
            outcome = kill_often(folder, name, flags.kills, flags.seed, flags.minutes)
            print(outcome, flush=True)
            problems = together(folder.with_name(f"{name}-together"), name)
            print(f"two at once: {'; '.join(problems) or 'as it should be'}", flush=True)
            wrong |= bool(outcome.wrong or problems)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
