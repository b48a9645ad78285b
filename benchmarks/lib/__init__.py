"""Shared code of benchmarks/: `from lib.harness import Row`."""

import os
from pathlib import Path

BENCHMARKS = str(Path(__file__).resolve().parent.parent)


def child_environment() -> dict[str, str]:
    """For a file of this folder that runs as a program, and imports as the benches do."""
    path = filter(None, [BENCHMARKS, os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
