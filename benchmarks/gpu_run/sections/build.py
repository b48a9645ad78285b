"""Builds the package into a folder, for this machine's GPU alone, with what is installed here.

    python -m gpu_run.sections.build FOLDER

It uses no package registry: a machine with a GPU may reach none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from gpu_run.sections import emit, verdict

ROOT = Path(__file__).resolve().parents[3]
PIP = "pip install -q --no-index --no-deps --no-build-isolation --no-compile --upgrade --target"


def main(folder: str) -> int:
    architecture = os.environ.get("CUDAARCHS", "90")
    settings = {"CUDAARCHS": architecture, "VFENGINE_CUDA": "on", "VFENGINE_ISAS": "avx512_bf16"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *PIP.split(), folder, "."], cwd=ROOT, env={**settings, **os.environ}
    )
    emit("build", f"sm_{architecture}", "time", time.perf_counter() - start, "s")
    verdict("build", done.returncode == 0, f"pip ended with exit status {done.returncode}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
