"""Counts what a captured step launches, computes and moves, on a machine without a GPU.

    python benchmarks/count_steps.py [--sizes NAMES] [--out FILE]

It prints the launches of each network's step by name, and writes docs/gpu-counts.json, of which
`make gpu-report` predicts milliseconds (gpu_run/prediction.py). It takes half a minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("default", "large", "paper")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(SIZES), metavar="NAMES", help="by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu-counts.json")
    arguments = parser.parse_args()
    sys.path.append(str(ROOT / "tests" / "tools"))  # fake_cuda
    from lib import step_costs

    sizes = {}
    for size in arguments.sizes.split(","):
        counted = step_costs.count(size)
        sizes[size] = {network: asdict(step.counts) for network, step in counted.items()}
        for network, step in counted.items():
            print(f"{size}, {network}: {step.counts.kernels} kernels")
            for name, kernels in step.by_name.items():
                print(f"  {kernels:5} {name}")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    whole = {"commit": commit.stdout.strip() or "unknown", "sizes": sizes}
    arguments.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
